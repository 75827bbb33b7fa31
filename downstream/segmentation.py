"""Semantic segmentation: UperNet on a ViT, as MAE and HPM are measured on ADE20K.

    UperNet            the encoder's features at four depths, brought to four scales, and a class for each pixel
    evaluate           mean intersection over union and pixel accuracy, of whole images
    slide              an image of any size, in windows of the size that the model was built for
    draw               predictions.png: image, truth, prediction

*Unified Perceptual Parsing for Scene Understanding* (Xiao et al. 2018, arXiv 1807.10221). MAE (appendix A.4) uses it
with the feature maps of BEiT's code, beit/semantic_segmentation of microsoft/unilm; HPM uses mmsegmentation's
configs/mae, which is the same but for relative positions. Both add those, and here positions stay absolute.

Letters in the shapes: K classes, D width of the encoder, C of the heads, h, w a feature map.
"""

import math

import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import nn
from torch.nn import functional as F

from downstream import probes
from engine import distributed
from engine.pairs import IGNORED

AUXILIARY = 0.4  # weight of the auxiliary head's loss (mmsegmentation, configs/_base_/models/upernet_mae.py)
SMALL, CHANNELS = 192, 32  # encoders narrower than the first have heads of the second: else heads take most of the time
POOLED = (1, 2, 3, 6)  # rows and columns of what pyramid pooling keeps
SHOWN = 6  # test images in predictions.png

# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------


class UperNet(nn.Module):
    """Images (B, C, H, W) -> logits (B, K, H, W); in training also the auxiliary head's, of that size.

    encoder  a `vit.ViT` without a head; its last LayerNorm is left out, as in the code of BEiT and mmsegmentation
    classes  K
    dropout  of whole channels, before the last layer of each head
    """

    def __init__(self, encoder, classes, dropout=0.0):
        super().__init__()
        self.encoder, self.dim = encoder, encoder.dim
        encoder.norm = encoder.fc_norm = nn.Identity()  # parameters that no loss reaches stop DistributedDataParallel
        D, depth = encoder.dim, len(encoder.blocks)
        C = CHANNELS if D < SMALL else D
        self.depths = [max(1, int(depth * share)) - 1 for share in (1 / 3, 1 / 2, 2 / 3, 1)]  # of 12: 3, 5, 7, 11
        finest = round(math.log2(encoder.patch_size / 4))  # doublings from a patch to a stride of 4 pixels
        self.scales = nn.ModuleList(scale(D, finest - i) for i in range(4))

        self.pools = nn.ModuleList(convolution(D, C, 1) for _ in POOLED)
        self.pyramid = convolution(D + len(POOLED) * C, C, 3)
        self.laterals = nn.ModuleList(convolution(D, C, 1) for _ in range(3))
        self.smooth = nn.ModuleList(convolution(C, C, 3) for _ in range(3))
        self.fuse = convolution(4 * C, C, 3)
        self.head = last(C, classes, dropout)
        self.auxiliary = nn.Sequential(convolution(D, min(256, C), 3), last(min(256, C), classes, dropout))

    def features(self, images):
        """The tokens after four blocks, as maps at strides of 4, 8, 16 and 32 pixels: four of (B, D, h, w)."""
        encoder, maps = self.encoder, {}
        z = encoder.embed(images)  # (B, T, D)
        for i, block in enumerate(encoder.blocks):
            z = block(z)
            if i in self.depths:
                patches = z[:, encoder.num_prefix_tokens :]  # (B, N, D)
                maps[i] = patches.transpose(1, 2).unflatten(2, encoder.grid)  # (B, D, rows, columns)
        return [scale(maps[depth]) for scale, depth in zip(self.scales, self.depths, strict=True)]

    def decode(self, maps):
        """Four maps (B, D, h, w), the finest first -> logits (B, K, h, w) of the finest."""
        top = maps[-1]
        pooled = [pool(F.adaptive_avg_pool2d(top, n)) for pool, n in zip(self.pools, POOLED, strict=True)]
        pooled = [resize(p, top.shape[-2:]) for p in pooled]
        levels = [self.pyramid(torch.cat([top, *pooled], dim=1))]  # (B, C, h, w), the coarsest first
        for lateral, finer in zip(reversed(self.laterals), reversed(maps[:-1]), strict=True):
            levels.append(lateral(finer) + resize(levels[-1], finer.shape[-2:]))
        coarsest, *finer = levels
        smooth = [conv(level) for conv, level in zip(self.smooth, reversed(finer), strict=True)]
        finest = smooth[0].shape[-2:]
        return self.head(self.fuse(torch.cat([resize(level, finest) for level in (*smooth, coarsest)], dim=1)))

    def forward(self, images):
        maps = self.features(images)
        logits = resize(self.decode(maps), images.shape[-2:])
        return (logits, resize(self.auxiliary(maps[2]), images.shape[-2:])) if self.training else logits


def scale(dim, doublings):
    """A map (B, D, h, w) 2^doublings times as large: transposed convolutions; if that is less than 0, the largest of
    each square."""
    if doublings <= 0:
        return nn.MaxPool2d(2**-doublings, ceil_mode=True) if doublings else nn.Identity()
    layers = [nn.ConvTranspose2d(dim, dim, 2, 2)]
    for _ in range(doublings - 1):
        layers += [BatchNorm(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2)]
    return nn.Sequential(*layers)


def convolution(inputs, outputs, size):
    """Convolution, BatchNorm and ReLU, which keep the height and the width."""
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, BatchNorm(outputs), nn.ReLU())


def last(inputs, classes, dropout):
    """A class for each pixel; it starts near zero, as in mmsegmentation."""
    conv = nn.Conv2d(inputs, classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return nn.Sequential(nn.Dropout2d(dropout), conv)


def resize(maps, size):
    """Bilinear, without antialias, as in mmsegmentation: (B, C, h, w) -> (B, C, *size)."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


class BatchNorm(nn.BatchNorm2d):
    """With the mean and variance of what all processes see at a time; on GPUs PyTorch's SyncBatchNorm takes its place.

    A single value has no variance: of one image at a time, what is pooled to one pixel is as in evaluation.
    """

    def forward(self, x):
        if x[:, 0].numel() * distributed.WORLD_SIZE == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if not self.training or distributed.WORLD_SIZE == 1:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        everyone = Everyone.apply(x).flatten(0, 1)
        running = self.running_mean, self.running_var
        y = F.batch_norm(everyone, *running, self.weight, self.bias, True, self.momentum, self.eps)
        return y[distributed.shard(len(everyone))]


class Everyone(torch.autograd.Function):
    """The tensors of all processes, (n, …) -> (WORLD_SIZE, n, …), and from all of them the gradient of one's own."""

    @staticmethod
    def forward(ctx, x):
        return distributed.all_gather(x)

    @staticmethod
    def backward(ctx, gradient):
        return distributed.all_reduce_sum(gradient.clone())[distributed.RANK]


def losses(model, images, masks):
    """What a step minimises: the cross-entropy of a pixel, and AUXILIARY times the auxiliary head's; and the first.

    masks (B, H, W) int64. The sum over the pixels that are not IGNORED, by the number of all of them, as in
    mmsegmentation: so the mean over the parts of a batch is that of the batch.
    """
    logits = model(images)
    loss, auxiliary = (F.cross_entropy(v, masks, ignore_index=IGNORED, reduction="sum") for v in logits)
    return {"loss": (loss + AUXILIARY * auxiliary) / masks.numel(), "cross_entropy": loss / masks.numel()}


# ---------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------


def slide(model, images, window, batch_size):
    """The mean of the logits of all windows that a pixel is in: images (B, C, H, W) -> (B, K, H, W).

    window: height and width of what the model takes, at most those of the images. The next window begins two thirds of
    it further on, and the last one ends with the image (BEiT's code: 341 of 512). batch_size: windows at a time.
    """
    (h, w), (H, W) = window, images.shape[-2:]
    places = [(top, left) for top in starts(H, h) for left in starts(W, w)]
    crops = torch.cat([images[:, :, top : top + h, left : left + w] for top, left in places])  # (windows * B, C, h, w)
    logits = torch.cat([model(some).float() for some in crops.split(batch_size)])
    if len(places) == 1:
        return logits
    total = logits.new_zeros(len(images), logits.shape[1], H, W)
    count = logits.new_zeros(H, W)
    for (top, left), seen in zip(places, logits.split(len(images)), strict=True):
        total[:, :, top : top + h, left : left + w] += seen
        count[top : top + h, left : left + w] += 1
    return total / count


def starts(side, window):
    """Where windows begin on a side of so many pixels."""
    stride = 2 * window // 3 or 1
    return [min(i * stride, side - window) for i in range(math.ceil((side - window) / stride) + 1)]


def predict(model, images, size, window, batch_size, inference):
    """Logits (B, K, *size) for images (B, C, H, W): in windows, see `slide`, or whole, squeezed into the window."""
    if inference == "whole":
        images = resize(images, window)
    return resize(slide(model, images, window, batch_size), size)


def confusion(truth, prediction, classes):
    """How many pixels of class i are taken for class j: (…), (…) int64 -> (K, K). Those of no class do not count."""
    counts = (truth >= 0) & (truth < classes)
    pairs = truth[counts] * classes + prediction[counts]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def scores_of(confusion):
    """From counts (K, K) to the scores of `evaluate`.

    Raises ValueError if no pixel counts.
    """
    counts = confusion.double().cpu()
    hits, union = counts.diag(), counts.sum(dim=0) + counts.sum(dim=1) - counts.diag()
    if not counts.sum():
        raise ValueError("no pixel of the test images has a class: all are ignored; check the masks")
    return dict(miou=(hits / union)[union > 0].mean().item(), pixel_accuracy=(hits.sum() / counts.sum()).item())


@torch.inference_mode()
def evaluate(model, split, img_size, batch_size, device, dtype, classes, inference="slide"):
    """Scores over a split, every image once, at the size of its mask.

    miou            intersection over union, the mean over classes that occur in truth or prediction, in [0, 1]
    pixel_accuracy  share of the pixels that get their class, in [0, 1]
    test_loss       cross-entropy, the mean over images of the mean over pixels

    Pixels that are IGNORED do not count. split: with `test_batches` of images (b, C, H, W) and masks (b, H', W'), both
    sides at least those of img_size = (h, w), for which the model was built. inference: see `predict`.
    """
    table = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    sums = torch.zeros(2, device=device)  # images, loss
    for images, masks in probes.test_batches(model, split, img_size, batch_size, device):
        with probes.autocast(device, dtype):
            logits = predict(model, images, masks.shape[-2:], img_size, batch_size, inference)
        table += confusion(masks, logits.argmax(dim=1), classes)
        counts = (masks >= 0) & (masks != IGNORED)
        loss = F.cross_entropy(logits, masks.where(counts, IGNORED), ignore_index=IGNORED, reduction="none")
        pixels = counts.flatten(1).sum(dim=1)  # (b,)
        loss = loss.flatten(1).sum(dim=1) / pixels.clamp(min=1)
        sums += torch.stack([(pixels > 0).sum(), loss.sum()])
    table, (n, loss) = distributed.all_reduce_sum(table), distributed.all_reduce_sum(sums).tolist()
    return scores_of(table) | {"test_loss": loss / n}


# ---------------------------------------------------------------------------------------------
# To look at
# ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def draw(out, model, dataset, img_size, batch_size, device, dtype, inference):
    """Draw predictions.png in the folder `out`: test images, truth, prediction; pixels that are IGNORED are white."""
    split = dataset.test
    some = slice(0, len(split), math.ceil(len(split) / SHOWN))
    rows = []
    with probes.evaluating(model), probes.autocast(device, dtype):
        for images, masks in split.test_batches(img_size, 1, torch.device(device), some):
            predicted = predict(model, images, masks.shape[-2:], img_size, batch_size, inference).argmax(dim=1)
            rows.append((images[0], masks[0].cpu().numpy(), predicted[0].cpu().numpy()))
    picture(out / "predictions.png", rows, dataset, ("image", "truth", "prediction"))


def picture(path, rows, dataset, titles):
    """Draw rows of an image (C, h, w), normalised, and maps of classes (H, W), and what the colours mean."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (dataset.mean, dataset.std))
    classes = len(dataset.classes)
    colors = palette(classes)
    figure = Figure(figsize=(2 * len(titles), 2 * len(rows) + 0.5), layout="constrained")
    axes, seen = figure.subplots(len(rows), len(titles), squeeze=False), set()
    for title, panel in zip(titles, axes[0], strict=True):
        panel.set_title(title, fontsize=9)
    for row, (image, *maps) in zip(axes, rows, strict=True):
        maps = [np.where((known >= 0) & (known < classes), known, classes) for known in maps]
        seen.update(*(np.unique(known).tolist() for known in maps))
        pixels = (image.float().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
        for panel, seen_there in zip(row, (pixels, *(colors[known] for known in maps)), strict=True):
            panel.imshow(seen_there, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            panel.axis("off")
    handles = [Patch(color=colors[i], label=dataset.classes[i][:20]) for i in sorted(seen - {classes})]
    figure.legend(
        handles=handles[:24], loc="outside lower center", ncols=2 * len(titles) - 2, fontsize=7, frameon=False
    )
    figure.savefig(path, dpi=100)


def palette(classes):
    """A colour for each class, the first one dark, and white for none: (K + 1, 3) in [0, 1]."""
    i = np.arange(classes)  # hues turn by the golden ratio
    hsv = np.stack([i * 0.618034 % 1, np.where(i // 3 % 2, 0.5, 0.9), np.where(i // 2 % 2, 0.6, 0.95)], axis=1)
    colors = hsv_to_rgb(hsv)
    colors[0] = 0.2
    return np.vstack([colors, np.ones((1, 3))])
