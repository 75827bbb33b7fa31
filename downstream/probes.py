"""What a model is worth: its scores, and what a simple method makes of its frozen features.

    evaluate               loss and accuracy of a classifier
    evaluate_pretraining   reconstruction loss of masked images; whether HPM knows its own, and where objects are
    plot_masks             masks.png: what a masked autoencoder sees and rebuilds
    extract                frozen features, for
    nearest_neighbours     a vote of the most similar training images (DINO)
    few_shot               least squares from a few examples of each class (ViT)
    LinearProbe            a linear classifier, trained (MAE)

    evaluate(model, dataset.test, (224, 224), 64, "cuda")

Of several processes, see engine/distributed.py, each takes its shard of the images, and all get the same answer. A
model is left in the mode, training or evaluation, in which it came.
"""

import contextlib
import itertools
import math
import os

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

import data
import hpm
import vit
from engine import distributed, scenes

# ---------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------


def autocast(device, dtype):
    """Matrix products in bfloat16 if `dtype` says so; weights stay in float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


HARD = 0.5  # α of the masks that are compared with random ones: HPM's last, for whatever α a run has, and when


@torch.inference_mode()
def evaluate(model, split, img_size, batch_size, device, dtype="float32"):
    """Scores over a split, every image once: loss, top-1 and, above 10 classes, top-5 accuracy in %.

    Where images have several right labels, `accepted` (engine/transfer.py), also how often the first guess is one of
    them; images without any are left out of that.

    model: images (B, C, H, W) -> logits (B, classes). split: with the `test_batches` of data.InMemory, asked for
    images of img_size = (H, W). dtype: "float32" or "bfloat16".
    """
    sums = torch.zeros(6, device=device)  # images, loss, top-1, top-5; images that have a right label, right guesses
    accepted = getattr(split, "accepted", None)
    rows = itertools.repeat(None) if accepted is None else rows_of_batches(accepted, batch_size)
    batches = test_batches(model, split, img_size, batch_size, device)
    for (images, labels), right in zip(batches, rows, strict=False):
        with autocast(device, dtype):
            logits = model(images).float()
        counts = labels >= 0
        hits = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]) & counts[:, None]  # (b, 5)
        loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        right = labels[:, None] if right is None else data.to_device(right, device)  # (b, most), -1: no more
        named = counts & (right >= 0).any(dim=1)
        found = named & (logits.argmax(dim=1, keepdim=True) == right).any(dim=1)
        sums += torch.stack([counts.sum(), loss, hits[:, 0].sum(), hits.sum(), named.sum(), found.sum()])
    n, loss, top1, top5, named, found = distributed.all_reduce_sum(sums).tolist()
    scores = {"test_loss": loss / n, "top1": 100 * top1 / n}
    scores |= {} if accepted is None else {"real_top1": 100 * found / max(1, named)}
    return scores | {"top5": 100 * top5 / n} if logits.shape[1] > 10 else scores


@torch.inference_mode()
def evaluate_pretraining(model, split, img_size, batch_size, device, dtype="float32", seed=0):
    """Scores of an `hpm.HPM` (MAE, too) or `mpp.MPP` by name.

    test_rec          the reconstruction loss
    test_correlation  Spearman's, of predicted and true loss, if the model predicts it
    test_object_auc   how well the teacher's prediction finds the object, see `object_auc`
    test_object_auc_at_place
                      how well it tells, of one and the same place, in which images the object is there: 0.5 for a map
                      that is the same for all images, however good its guess where objects usually are
    test_hard_ratio   the reconstruction loss when HARD of the hidden patches are the teacher's choice, over test_rec

    The last three if there is a teacher that predicts losses, and the split knows its objects. Whatever masks the model
    trains with, here they are random: a function of the seed and the image alone, so that runs of any length and kind
    are compared on the same ones.
    """
    masked = isinstance(model, hpm.HPM)
    asks = masked and model.teacher is not None and model.predictor != "none" and isinstance(split, scenes.Scenes)
    N = math.prod((model.student if masked else model).encoder.grid)
    columns = model.noise_columns if not masked or (asks and model.in_turn) else 1  # a random mask takes one
    noise = rows_of_batches(data.evaluation_noise(len(split), N, seed, columns), batch_size)
    batches = test_batches(model, split, img_size, batch_size, device, **({"objects": True} if asks else {}))
    sums = torch.zeros(3, device=device)  # images, rec, correlation
    found = torch.zeros(3, device=device)  # images with an object, AUC; rec with hard masks
    maps, counts = [], []  # what is predicted, less its mean, and where objects are: (b, 2, N); labels (b,)
    for (images, labels, *objects), rows in zip(batches, noise, strict=False):
        rows, count = data.to_device(rows, device), (labels >= 0).sum()  # (b, N), or (b, N, columns)
        first = rows[..., 0] if columns > 1 else rows
        with autocast(device, dtype):
            if masked:
                out = model(images, rows if asks else None, mask=hpm.random_mask(first, model.mask_ratio))
            else:
                out = model(images, rows)
            if asks:
                predicted = out["teacher_loss"].float()  # (b, N)
                hard = model(images, None, mask=hpm.hard_mask(predicted, first, model.mask_ratio, HARD))
                covered = patches_with_objects(*objects, model.student.encoder.patch_size)  # (b, N)
                auc = object_auc(predicted, covered).where(labels >= 0, math.nan)  # (b,)
                # The relative loss leaves open what is added to all patches of an image: compare without its mean.
                maps.append(torch.stack([predicted - predicted.mean(dim=1, keepdim=True), covered], dim=1))
                counts.append(labels)
                found += torch.stack([auc.isfinite().sum(), auc.nansum(), count * hard["rec"]])
        sums += count * torch.stack([torch.ones_like(out["rec"]), out["rec"], out.get("correlation", out["rec"])])
    n, rec, correlation, seen, auc, hard = distributed.all_reduce_sum(torch.cat([sums, found])).tolist()
    scores = {"test_rec": rec / n} | ({"test_correlation": correlation / n} if "correlation" in out else {})
    if not asks:
        return scores
    maps, _ = together(torch.cat(maps), torch.cat(counts), split)
    predicted, covered = maps.permute(1, 2, 0)  # (N, images) each
    at_place = object_auc(predicted, covered > 0).nanmean().item()
    return scores | {
        "test_object_auc": auc / seen, "test_object_auc_at_place": at_place, "test_hard_ratio": hard / rec
    }  # fmt: skip


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
    with evaluating(model), autocast(device, dtype):
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


def patches_with_objects(objects, patch_size):
    """Whether objects cover a quarter of a patch and more: `scenes.Objects` -> (b, N) bool."""
    covered = objects.masks.any(dim=1, keepdim=True).float()  # (b, 1, H, W)
    return vit.patchify(covered, patch_size).mean(dim=-1) >= 0.25


def object_auc(predicted, covered):
    """The area under the ROC curve of a predicted loss as a detector of objects: (b, N), (b, N) bool -> (b,).

    That is how often a patch with the object has the larger prediction than one without; 0.5 is chance, equal ones
    count as half. NaN for an image in which all patches are alike. It is counted from ranks (Mann and Whitney): those
    of the p patches with the object add up to p (p + 1) / 2, and one more for each of the p (N - p) pairs won.
    """
    predicted = predicted.contiguous()
    ordered = predicted.sort(dim=1).values
    below, up_to = (torch.searchsorted(ordered, predicted, right=right) for right in (False, True))  # (b, N)
    p = covered.sum(dim=1)
    twice = ((below + up_to + 1) * covered).sum(dim=1) - p * (p + 1)  # equal values have the mean of their ranks
    return twice / (2 * p * (covered.shape[1] - p))


@contextlib.contextmanager
def evaluating(model):
    """`with evaluating(model):` without dropout and the like; afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def test_batches(model, split, img_size, batch_size, device, **options):
    """The batches of this process's shard of a split, with the model in evaluation mode while they last.

    options: of the split's own `test_batches`. The label -1 marks an image that does not count: one that could not be
    decoded, and all of a batch that comes once more because another process has one more.
    """
    own, how = 0, (img_size, batch_size, torch.device(device), distributed.test_shard())
    with evaluating(model):
        for images, labels, *more in split.test_batches(*how, **options):
            own += 1
            yield images, labels, *more
        if distributed.is_sharded(model):
            largest = math.ceil(len(split) / distributed.WORLD_SIZE)  # images of a process
            for _ in range(math.ceil(largest / batch_size) - own):
                yield images, torch.full_like(labels, -1), *more
    share_unreadable(split)


def rows_of_batches(values, batch_size):
    """Of values (n, …), one for each image of a split, those of each of the `test_batches`; the last ones without end,
    for batches that come once more."""
    rows = values[distributed.test_shard()].split(batch_size)
    return itertools.chain(rows, itertools.repeat(rows[-1]))


def share_unreadable(split):
    """Let each process know which images of a split others could not decode; raises UnreadableImages for too many."""
    if unreadable := distributed.gather_dicts(split.unreadable):
        split.skip(unreadable)


def together(values, labels, split):
    """What all processes have of the images that count, in the order of the split: values (n, …), labels (n,)."""
    # As many on each process: one image more that does not count, or less of those that came once more.
    missing = math.ceil(len(split) / distributed.WORLD_SIZE) - len(labels)
    labels = F.pad(labels, (0, missing), value=-1)
    values = F.pad(values, (0, 0) * (values.ndim - 1) + (0, missing))
    values, labels = (distributed.all_gather(v).transpose(0, 1).flatten(0, 1) for v in (values, labels))
    return values[labels >= 0], labels[labels >= 0]


# ---------------------------------------------------------------------------------------------
# Frozen features
# ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def extract(model, split, img_size, batch_size, device, dtype="float32"):
    """The frozen representation of every image that can be read, on all processes: features (n, D), labels (n,).

    In the order of the split. model: images (B, C, H, W) -> features (B, D).
    """
    features, labels = [], []
    for images, targets in test_batches(model, split, img_size, batch_size, device):
        with autocast(device, dtype):
            features.append(model(images).float())
        labels.append(targets)
    return together(torch.cat(features), torch.cat(labels), split)


@torch.inference_mode()
def nearest_neighbours(train, test, classes, k=20, temperature=0.07):
    """Top-1 accuracy in % of a weighted vote of the k most similar training images (DINO, section 4.1; its code's k).

    train, test: features (n, D) and labels (n,). A neighbour votes with exp(cosine similarity / temperature).
    """
    features, labels = F.normalize(train[0], dim=1), train[1]
    hits = 0
    for query, truth in zip(F.normalize(test[0], dim=1).split(500), test[1].split(500), strict=True):
        similarity, index = (query @ features.T).topk(min(k, len(features)), dim=1)  # (b, k)
        votes = query.new_zeros(len(query), classes)
        votes.scatter_add_(1, labels[index], (similarity / temperature).exp())
        hits += (votes.argmax(dim=1) == truth).sum()
    return 100 * hits.item() / len(test[1])


@torch.inference_mode()
def few_shot(train, test, classes, ridge=2.0**10):
    """Top-1 accuracy in % of regularised least squares from features to {-1, 1}^K (ViT, section 4.1).

    train, test: features (n, D) and labels (n,). W = argmin ||Z W - Y||² + ridge ||W||², Z the features with mean 0
    and standard deviation 1 over `train`, and a constant beside them for the bias: 100, so large that it is hardly
    regularised. That and the ridge are those of the authors' code, big_vision's fewshot_lsr.py.
    W = Zᵀ (Z Zᵀ + ridge I)⁻¹ Y, exactly: a system of n equations.
    """
    # On the CPU, for not every device has float64.
    (x, labels), (queries, truth) = ((features.cpu().double(), labels.cpu()) for features, labels in (train, test))
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0) + 1e-5
    Z, queries = (F.pad((v - mean) / std, (0, 1), value=100.0) for v in (x, queries))  # (n, D + 1)
    Y = 2.0 * F.one_hot(labels, classes).double() - 1  # (n, K)
    gram = Z @ Z.T + ridge * torch.eye(len(Z), dtype=Z.dtype, device=Z.device)
    W = Z.T @ torch.linalg.solve(gram, Y)  # (D + 1, K)
    return 100 * ((queries @ W).argmax(dim=1) == truth).double().mean().item()


class LinearProbe(nn.Module):
    """A frozen encoder, BatchNorm without parameters, a linear layer: only the last one learns (MAE, appendix A.1).

    images (B, C, H, W) -> logits (B, classes); dim: the width of what the encoder gives.
    """

    def __init__(self, encoder, dim, classes):
        super().__init__()
        self.frozen = (encoder.requires_grad_(False).eval(),)  # in a tuple: it stays as it is, and out of checkpoints
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        nn.init.zeros_(self.head.weight)

    def forward(self, images):
        with torch.no_grad():
            y = self.frozen[0](images).float()  # (B, dim)
            if self.training:  # with the mean and the variance of what all processes see
                everyone = self.norm(distributed.all_gather(y).flatten(0, 1))
                y = everyone[distributed.shard(len(everyone))]
            else:
                y = self.norm(y)
        return self.head(y)


def linear_probe(encoder, dataset, img_size, batch_size, device, dtype="float32"):
    """The probe and its data: the features, computed once, if they fit in a quarter of the device's free memory (they
    are there twice while they come together), else the images."""
    dim, classes = encoder.dim, len(dataset.classes)
    too_large = 4 * dim * len(dataset.train) > free_memory(device) / 4
    if distributed.all_reduce_max(too_large)[0]:
        return LinearProbe(encoder, dim, classes).to(device), dataset
    how = img_size, batch_size, device, dtype
    train, test = (data.Features(*extract(encoder, split, *how)) for split in (dataset.train, dataset.test))
    return LinearProbe(nn.Identity(), dim, classes).to(device), dataset._replace(train=train, test=test)


def free_memory(device):
    """Bytes that this process may take of the device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows and macOS do not say
        free = 2**32
    return free / distributed.LOCAL_WORLD_SIZE
