"""Fine-tuning at a higher resolution helps, and interpolating the positions is what makes it work: ViT, section 3.2.

The paper fine-tunes at a higher resolution than it pre-trains at, keeps the patch size, and interpolates the position
embeddings in 2-D; all of its main results do so, and it gives no number for either claim. Here vit_micro4 with learned
positions learns Fashion-MNIST at 20 x 20 pixels, 25 patches, in 600 steps of 32 images, then goes on for 200 steps at
20 x 20, or at 28 x 28, the data's own size, 49 patches: with interpolated positions; with those of the sequence (patch
i keeps position i, so it now lies elsewhere); with random ones (studies/unresized.py). Nothing else was tried.
"""

import sys

from studies import study

VIT = "--data fashion-mnist --arch vit_micro4 --pos-embed 1d --evaluations 1 --test-images 5000"
MORE = f"--task finetune {VIT} --pool cls --init {{init}} --steps 200 --batch-size 32"
RUNS = {"trained at 20 pixels": f"{VIT} --img-size 20 --steps 600 --batch-size 32 --lr 2e-3"}
PROBES = {
    "20 pixels": f"{MORE} --img-size 20",
    "28, interpolated": f"{MORE} --img-size 28",
    "28, of the sequence": f"-m studies.unresized {MORE} --img-size 28",
    "28, random": f"-m studies.unresized --random {MORE} --img-size 28",
}
SEEDS = range(3)
TABLE = {"before": ("train", "top1")} | {f"{name} (%)": (name, "top1") for name in PROBES}


def claims(runs):
    def better(stage, other):
        a, b = (study.score(runs, "trained at 20 pixels", name, "top1") for name in (stage, other))
        return study.np.array([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])

    higher, sequence = "28, interpolated", "28, of the sequence"
    found = {
        "a higher resolution helps": better(higher, "20 pixels"),
        "interpolated positions are better than those of the sequence": better(higher, sequence),
        "and than random ones": better(higher, "28, random"),
        "a higher resolution helps without interpolation, too": better(sequence, "20 pixels"),
    }
    return [study.Claim(text, "section 3.2", values, "points") for text, values in found.items()]


def figure(runs):
    figure = study.Figure(figsize=(6, 2.4), layout="constrained")
    axes = figure.subplots()
    for row, (stage, name) in enumerate(TABLE.values()):
        values = list(study.score(runs, "trained at 20 pixels", stage, name).values())
        axes.plot(values, [row] * len(values), "o", color="#0072B2", alpha=0.6, markersize=4)
        axes.plot([study.np.mean(values)] * 2, [row - 0.3, row + 0.3], color="#D55E00", linewidth=2)
    axes.set_yticks(range(len(TABLE)), [title.removesuffix(" (%)") for title in TABLE])
    axes.invert_yaxis()
    axes.set_xlabel("top-1 (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    return figure


if __name__ == "__main__":
    study.main(sys.modules[__name__])
