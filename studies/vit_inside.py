"""Inside a trained ViT: heads look farther in deeper blocks, positions know where they are, attention finds the object.

The paper, figures 6 and 7: attention distance grows with depth, and some
heads look across the whole image from the first block on while others stay near; positions are the more alike the
nearer they are, and those of one row or column more than others; the filters of E look like smooth basis functions;
attention rollout lies on the object. Here vit_micro4 with learned positions learns the class of the item in scenes of
32 x 32 pixels, 64 patches, in 1,000 steps of 32, and beside it stands the same network after one step at a learning
rate of 1e-9. studies/inside.py measures both on 2,000 test scenes. Nothing else was tried.
"""

import sys

from studies import study

VIT = "--data scenes --arch vit_micro4 --img-size 32 --pos-embed 1d --evaluations 1 --test-images 2000"
RUNS = {"trained": f"{VIT} --steps 1000 --batch-size 32 --lr 2e-3", "untrained": f"{VIT} --steps 1 --lr 1e-9"}
PROBES = {"inside": "-m studies.inside --init {init}"}
SEEDS = range(3)
TABLE = {
    "top-1 (%)": ("train", "top1"),
    "rollout, AUC": ("inside", "rollout_auc"),
    "growth": ("inside", "growth"),
    "first block, farthest": ("inside", "first_farthest"),
    "first block, nearest": ("inside", "first_nearest"),
    "positions, falls": ("inside", "falls"),
    "positions, line": ("inside", "line"),
    "filters, smooth": ("inside", "smooth"),
}


def claims(runs):
    def trained(name):
        return study.np.array(list(study.score(runs, "trained", "inside", name).values()))

    def more(name):
        return study.differences(runs, "trained", "untrained", "inside", name)

    near, far = 0.75 - trained("first_nearest"), trained("first_farthest") - 0.9
    found = (
        ("attention finds the object, better than untrained", "figure 6", more("rollout_auc"), "AUC"),
        ("attention distance grows with depth", "figure 7", trained("growth"), "of the first block's"),
        ("a head of the first block stays near", "figure 7", near, "below 0.75 of uniform attention"),
        ("another looks across the image", "figure 7", far, "over 0.9 of uniform attention"),
        ("near positions are alike", "figure 7", more("falls"), "of the correlation"),
        ("those of one row or column more so", "figure 7", more("line"), "of the similarity"),
        ("filters are smooth", "figure 7", more("smooth"), "of the correlation"),
    )
    return [study.Claim(*claim) for claim in found]


def figure(runs):
    figure = study.Figure(figsize=(8.5, 3), layout="constrained")
    depth, similar, found = figure.subplots(1, 3)
    for row, (arm, colour) in enumerate((("trained", "#0072B2"), ("untrained", "#D55E00"))):
        for i, inside in enumerate(run["scores"]["inside"] for run in runs if run["arm"] == arm):
            heads = study.np.array(inside["distances"])  # (blocks, k)
            blocks = range(1, len(heads) + 1)
            depth.plot(blocks, heads, "o", color=colour, alpha=0.4, markersize=3)
            depth.plot(blocks, heads.mean(axis=1), color=colour, label=f"{arm}, mean" if not i else None)
            depth.axhline(inside["uniform"], color="grey", linestyle=":", linewidth=1)
            similar.plot(range(1, 1 + len(inside["similarity"])), inside["similarity"], color=colour)
            found.plot([inside["rollout_auc"]], [row], "o", color=colour, alpha=0.6)
    depth.set(xlabel="block", ylabel="attention distance (pixels)", ylim=(0, 1.1 * inside["uniform"]))
    depth.legend(frameon=False, fontsize=8)
    similar.set(xlabel="distance (patches)", ylabel="similarity of positions")
    found.set(xlabel="rollout, AUC for the item", ylim=(1.5, -0.5), xlim=(0.4, 1))
    found.set_yticks((0, 1), ("trained", "untrained"))
    found.axvline(0.5, color="grey", linestyle=":", linewidth=1)
    for axes in (depth, similar, found):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    study.main(sys.modules[__name__])
