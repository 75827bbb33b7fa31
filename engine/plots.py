"""The figures of a run: curves.png, what the log says; masks.png, what a masked autoencoder sees and rebuilds."""

import math

import torch
from matplotlib.figure import Figure

import data
import hpm
import vit
from downstream import probes
from engine import checkpoint, distributed

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


@torch.inference_mode()
def plot_masks(out, model, dataset, img_size, hard_fraction, seed, device, dtype="float32"):
    """Draw masks.png: test images, the teacher's predicted loss, the mask drawn from it, the reconstruction.

    model: an `hpm.HPM`; its masks are of the kind that it trains with, drawn from the seed, and α_t is hard_fraction.
    All processes have to call it, for the model may be in shards; the first one draws.
    """
    encoder, split = model.student.encoder, dataset.test
    rows = slice(0, len(split), math.ceil(len(split) / 6))
    n = len(range(len(split))[rows])
    images, _ = next(split.test_batches(img_size, n, torch.device(device), rows))  # (n, C, H, W), n <= 6
    noise = data.draw_noise(n, math.prod(encoder.grid), model.noise_columns, seed, 0, device)
    with probes.evaluating(model), probes.autocast(device, dtype):
        seen = model(images, noise, hard_fraction)
    if distributed.RANK:
        return
    patches = vit.patchify(images, encoder.patch_size)  # (n, N, P*P*C)
    hidden = seen["hidden"][..., None].expand(-1, -1, patches.shape[-1])  # (n, hidden, P*P*C)
    columns = {"image": images}
    if seen["teacher_loss"] is not None:
        columns["predicted loss"] = images
    columns["mask"] = vit.unpatchify(patches.scatter(1, hidden, 0.0), encoder.patch_size, encoder.grid)
    if model.target in ("pixels", "norm-pixels"):
        prediction, title = seen["prediction"].float(), "reconstruction"
        if model.target == "norm-pixels":
            _, mean, std = hpm.normalise_patches(patches.gather(1, hidden))
            prediction = prediction * std + mean
            title = "reconstruction, with the true mean\nand standard deviation of each patch"
        columns[title] = vit.unpatchify(patches.scatter(1, hidden, prediction), encoder.patch_size, encoder.grid)

    figure = Figure(figsize=(2 * len(columns), 2 * n), layout="constrained")
    axes = figure.subplots(n, len(columns), squeeze=False)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (dataset.mean, dataset.std))
    for column, (title, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=9)
        for row, picture in enumerate(pictures.float().cpu()):
            panel, pixels = axes[row, column], (picture * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
            panel.axis("off")
            if title == "predicted loss":
                panel.imshow(pixels.mean(axis=-1), cmap="gray", vmin=0, vmax=1)
                heat = seen["teacher_loss"][row].float().reshape(encoder.grid).cpu().numpy()
                extent = (-0.5, pixels.shape[1] - 0.5, pixels.shape[0] - 0.5, -0.5)
                panel.imshow(heat, cmap="viridis", alpha=0.65, extent=extent)
            else:
                panel.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    figure.savefig(out / "masks.png", dpi=100)
