"""What a model is worth: scores, transfer by frozen features, figures.

    evaluate               loss and accuracy of a classifier
    evaluate_pretraining   reconstruction loss of a masked autoencoder, and whether HPM knows its own
    extract, …             frozen features, for the linear probe, for nearest neighbours, for few examples a class
    plot_curves, …         curves.png and masks.png of a run

`config` is the configuration of a run, see recipes.py: task, device, dtype, img_size, micro_batch, seed and so on. Of
several processes, see processes.py, each takes its share of the images.
"""

import json
import math
import os

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

import data
import hpm
import processes
import vit

# ---------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------


def autocast(config):
    return torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16")


@torch.inference_mode()
def evaluate(model, split, config):
    """Scores over a split, every image once: loss, top-1 and, above 10 classes, top-5 accuracy in %."""
    total = torch.zeros(4, device=config.device)  # images, loss, top-1, top-5
    for images, labels in test_batches(model, split, config):
        with autocast(config):
            logits = model(images).float()
        read = labels >= 0  # -1 marks an image that could not be decoded
        hits = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]) & read[:, None]  # (b, 5)
        loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        total += torch.stack([read.sum(), loss, hits[:, 0].sum(), hits.sum()])
    n, loss, top1, top5 = processes.total(total).tolist()
    scores = {"test_loss": loss / n, "top1": 100 * top1 / n, "top5": 100 * top5 / n}
    return scores if logits.shape[1] > 10 else {k: v for k, v in scores.items() if k != "top5"}


@torch.inference_mode()
def evaluate_pretraining(model, split, config):
    """Reconstruction loss, and rank correlation of predicted and true loss, under random masks that stay the same.

    Image i of the split is row i % COUNT of those that the processes hold at a time: all draw masks for these together.
    """
    generator = data.generator(config.seed, data.MASK, config.steps, device=config.device)
    total, left = torch.zeros(3, device=config.device), len(split)  # images, rec, correlation
    for images, _ in test_batches(model, split, config):
        with autocast(config):
            together = min(processes.COUNT * config.micro_batch, left)
            left -= together
            here = slice(processes.RANK, together, processes.COUNT)
            out = model(images, generator=generator, batch=together, here=here)
        total += len(images) * torch.stack(
            [torch.ones_like(out["rec"]), out["rec"], out.get("correlation", out["rec"])]
        )
    n, rec, correlation = processes.total(total).tolist()
    return {"test_rec": rec / n} | ({"test_correlation": correlation / n} if "correlation" in out else {})


def test_batches(model, split, config):
    """The batches of a split that are this process's, the model in evaluation mode while they last."""
    model.eval()
    device, mine = torch.device(config.device), 0
    for batch in split.test_batches(config.img_size, config.micro_batch, device, processes.every()):
        mine += 1
        yield batch
    if isinstance(model, FSDPModule):  # a forward pass needs the shards of all processes: some have to make one more
        most = math.ceil(math.ceil(len(split) / processes.COUNT) / config.micro_batch)
        for _ in range(most - mine):
            with autocast(config):
                model(batch[0])
    model.train()
    share_unreadable(split)


def share_unreadable(split):
    """Let each process know which images of a split others could not decode; raises UnreadableImages for too many."""
    if unreadable := processes.union(split.unreadable):
        split.skip(unreadable)


# ---------------------------------------------------------------------------------------------
# Transfer by frozen features
# ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def extract(model, split, config):
    """The frozen representation of every image that can be read, on all processes: features (n, D), labels (n,)."""
    features, labels = [], []
    for images, targets in test_batches(model, split, config):
        with autocast(config):
            features.append(model(images).float())
        labels.append(targets)
    features, labels = torch.cat(features), torch.cat(labels)
    missing = math.ceil(len(split) / processes.COUNT) - len(labels)  # filled up with the label of what can't be read
    features, labels = F.pad(features, (0, 0, 0, missing)), F.pad(labels, (0, missing), value=-1)
    features, labels = (processes.gather(v).transpose(0, 1).flatten(0, 1) for v in (features, labels))  # in order
    return features[labels >= 0], labels[labels >= 0]


@torch.inference_mode()
def nearest_neighbours(train, test, classes, k=20, temperature=0.07):
    """Top-1 accuracy in % of a weighted vote of the k most similar training images (DINO, section 4.1).

    train, test: features (n, D) and labels (n,). A neighbour votes with exp(cosine similarity / temperature).
    """
    features, labels = F.normalize(train[0], dim=1), train[1]
    hits = 0
    for query, truth in zip(F.normalize(test[0], dim=1).split(500), test[1].split(500), strict=True):
        similarity, index = (query @ features.T).topk(min(k, len(features)), dim=1)  # (b, k)
        votes = torch.zeros(len(query), classes, device=query.device)
        votes.scatter_add_(1, labels[index], (similarity / temperature).exp())
        hits += (votes.argmax(dim=1) == truth).sum()
    return 100 * hits.item() / len(test[1])


@torch.inference_mode()
def few_shot(train, test, classes, ridge=2.0**10):
    """Top-1 accuracy in % of regularised least squares from features to {-1, 1}^K (ViT, section 4.1).

    train, test: features (n, D) and labels (n,). W = argmin ||Z W - Y||² + ridge ||W||², Z the features with mean 0
    and deviation 1 over `train`, and a constant beside them for the bias; so large, 100, that it is hardly regularised.
    This constant and the ridge are the authors'. W = Zᵀ (Z Zᵀ + ridge I)⁻¹ Y, exactly: a system of n equations.
    """
    (x, labels), (queries, truth) = ((features.double(), labels) for features, labels in (train, test))
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0) + 1e-5
    Z, queries = (F.pad((v - mean) / deviation, (0, 1), value=100.0) for v in (x, queries))  # (n, D + 1)
    Y = 2.0 * F.one_hot(labels, classes).double() - 1  # (n, K)
    gram = Z @ Z.T + ridge * torch.eye(len(Z), dtype=Z.dtype, device=Z.device)
    W = Z.T @ torch.linalg.solve(gram, Y)  # (D + 1, K)
    return 100 * ((queries @ W).argmax(dim=1) == truth).double().mean().item()


class LinearProbe(nn.Module):
    """A frozen encoder, BatchNorm without parameters, a linear layer: only the last one learns (MAE, appendix A.1)."""

    def __init__(self, encoder, dim, classes):
        super().__init__()
        self.frozen = (encoder.requires_grad_(False).eval(),)  # in a tuple: it stays as it is, and out of checkpoints
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        nn.init.zeros_(self.head.weight)

    def forward(self, images):
        with torch.no_grad():
            y = self.frozen[0](images).float()
            if self.training:  # with the mean and the variance of what all processes see
                y = self.norm(processes.gather(y).flatten(0, 1))[processes.rows(processes.COUNT * len(y))]
            else:
                y = self.norm(y)
        return self.head(y)


def linear_probe(encoder, dataset, config):
    """The probe and its data: the features, computed once, if they fit in a quarter of the device's free memory (they
    are there twice while they come together), else the images."""
    dim = encoder.dim
    if config.device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / processes.LOCAL_COUNT
    if processes.agree(4 * dim * len(dataset.train) > free / 4)[0]:
        return LinearProbe(encoder, dim, len(dataset.classes)).to(config.device), dataset
    train, test = (data.Features(*extract(encoder, split, config)) for split in (dataset.train, dataset.test))
    dataset = dataset._replace(train=train, test=test)
    return LinearProbe(nn.Identity(), dim, len(dataset.classes)).to(config.device), dataset


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------

CURVES = {  # axis: what is drawn there, training first
    "cross-entropy (nats)": (("loss", "training"), ("test_loss", "test")),
    "accuracy (%)": (("top1", "top-1"), ("top5", "top-5")),
    "reconstruction loss": (("rec", "training"), ("test_rec", "test, random masks")),
    "rank correlation of predicted and true loss": (
        ("correlation", "training"),
        ("test_correlation", "test, random masks"),
    ),
}


def plot_curves(out, config):
    """Draw log.jsonl into curves.png."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    titles = list(CURVES)[2:] if "rec" in log[-1] else list(CURVES)[:2]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, title in zip(figure.subplots(1, 2), titles, strict=True):
        for (name, label), color in zip(CURVES[title], ("#0072B2", "#D55E00"), strict=True):
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
def plot_masks(out, config, model, dataset, alpha):
    """Draw masks.png: test images, the teacher's predicted loss, the mask drawn from it, the reconstruction."""
    split, generator = dataset.test, data.generator(config.seed, data.MASK, 0, device=config.device)
    rows = range(0, len(split), math.ceil(len(split) / 6))
    images, _ = next(
        split.test_batches(
            config.img_size, len(rows), torch.device(config.device), slice(rows.start, rows.stop, rows.step)
        )
    )
    model.eval()
    with autocast(config):
        seen = model(images, alpha, generator)
    model.train()
    if processes.RANK:  # shards of the model come from all processes, the figure from the first
        return
    patch_size, grid = model.student.encoder.patch_size, model.student.encoder.grid
    patches = vit.patchify(images, patch_size)  # (b, N, P*P*C)
    hidden = seen["hidden"][..., None].expand(-1, -1, patches.shape[-1])  # (b, n, P*P*C)
    columns = {"image": images}
    if seen["teacher_loss"] is not None:
        columns["predicted loss"] = images
    columns["mask"] = vit.unpatchify(patches.scatter(1, hidden, 0.0), patch_size, grid)
    if config.target in ("pixels", "norm-pixels"):
        prediction, title = seen["prediction"].float(), "reconstruction"
        if config.target == "norm-pixels":
            _, mean, deviation = hpm.normalise_patches(patches.gather(1, hidden))
            prediction, title = (
                prediction * deviation + mean,
                "reconstruction, with the true\nmean and deviation of each patch",
            )
        columns[title] = vit.unpatchify(patches.scatter(1, hidden, prediction), patch_size, grid)

    figure = Figure(figsize=(2 * len(columns), 2 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (dataset.mean, dataset.std))
    for column, (title, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=9)
        for row, picture in enumerate(pictures.float().cpu()):
            panel, pixels = axes[row, column], (picture * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
            panel.axis("off")
            if title == "predicted loss":
                panel.imshow(pixels.mean(axis=-1), cmap="gray", vmin=0, vmax=1)
                heat = seen["teacher_loss"][row].float().reshape(grid).cpu().numpy()
                panel.imshow(
                    heat, cmap="viridis", alpha=0.65, extent=(-0.5, pixels.shape[1] - 0.5, pixels.shape[0] - 0.5, -0.5)
                )
            else:
                panel.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    figure.savefig(out / "masks.png", dpi=100)
