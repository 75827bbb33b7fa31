"""The figure of every run, curves.png: what its log says."""

from matplotlib.figure import Figure

from engine import checkpoint

CURVES = {  # axis: what is drawn there, training first
    "cross-entropy (nats)": (("loss", "training"), ("test_loss", "test")),
    "accuracy (%)": (("top1", "top-1"), ("top5", "top-5")),
    "cross-entropy of a pixel (nats)": (("cross_entropy", "training"), ("test_loss", "test")),
    "share of the test set": (("miou", "mean IoU"), ("pixel_accuracy", "pixel accuracy")),
    "sum of the five losses": (("loss", "training"),),
    "average precision on the test set": (("ap_box", "boxes"), ("ap_mask", "masks")),
    "reconstruction loss": (("rec", "training"), ("test_rec", "test, random masks")),
    "rank correlation of predicted and true loss": (
        ("correlation", "training"),
        ("test_correlation", "test, random masks"),
    ),
    "object AUC of the teacher (chance 0.5)": (
        ("test_object_auc", "in an image: place alone has 0.85 on scenes"),
        ("test_object_auc_at_place", "at a place: place alone has 0.5"),
    ),
    "loss under hard masks / random masks": (("test_hard_ratio", "test"),),
}
COLORS = ("#0072B2", "#D55E00")  # told apart by the colour-blind, too


def plot_curves(out):
    """Draw log.jsonl of the run folder `out` into curves.png: every value at its step."""
    log = checkpoint.read_log(out)
    titles = list(CURVES)[6:8] if "rec" in log[-1] else list(CURVES)[:2]
    if any("test_object_auc" in line for line in log):
        titles = list(CURVES)[6:]
    if "cross_entropy" in log[-1]:
        titles = list(CURVES)[2:4]
    if "objectness" in log[-1]:
        titles = list(CURVES)[4:6]
    figure = Figure(figsize=(5 * len(titles), 3.6), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(titles)), titles, strict=True):
        for (name, label), color in zip(CURVES[title], COLORS, strict=False):
            points = [(line["step"], line[name]) for line in log if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), ".-" if len(points) < 30 else "-", color=color, label=label)
                axes.legend(frameon=False)
        axes.set_xlabel("step")
        axes.set_ylabel(title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(out / "curves.png", dpi=120)
