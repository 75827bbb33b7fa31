"""Images, in batches.

Two kinds of split, one pair of methods:

    InMemory   small sets: uint8 tensors, cropped, flipped and normalised a batch at a time, on the device
    Folder     ImageNet's layout on disk: decoded and cropped by DataLoader workers

    split.train_batches(…)   shuffled and augmented, one batch a step
    split.test_batches(…)    every image once, in order

And `occurring` finds images of one split in another.

All randomness is a pure function of (seed, purpose, position). So a run that resumes at step s sees
what it would have seen without the interruption, and R processes with B / R images each see the
images that one process sees with B.
"""

import copy
import difflib
import functools
import gzip
import importlib.util
import itertools
import math
import os
import random
import signal
import sys
import tarfile
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.nn import functional as F
from tqdm import tqdm

from download import BROKEN, download

# mean, std: one number a channel, of pixels in [0, 1]. train, test: InMemory or Folder.
Dataset = namedtuple("Dataset", "name classes mean std train test")
NATIVE_SIZE = {"fashion-mnist": 28, "cifar10": 32, "cifar100": 32}  # pixels

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class UnreadableImages(ValueError):
    """Too many images of a folder can't be decoded."""


# ---------------------------------------------------------------------------------------------
# Order and randomness
# ---------------------------------------------------------------------------------------------

ORDER, CROP, MIX, MASK, ERASE, SUBSET, MODEL = range(7)  # purposes: each has random numbers of its own


def generator(seed, *key, device="cpu"):
    """A torch.Generator whose numbers depend on (seed, *key) alone; all non-negative integers."""
    state = np.random.SeedSequence((seed, *key)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) % 2**63)


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """A random order of n images, another one for each epoch: (n,) int64."""
    return torch.randperm(n, generator=generator(seed, ORDER, epoch))


def batch_indices(n, batch_size, step, seed):
    """Which of n images step `step` sees: (batch_size,) int64.

    The orders of the epochs follow each other without a gap: every image comes once an epoch, and
    a batch may be larger than the set.
    """
    first, end = step * batch_size, (step + 1) * batch_size
    orders = [epoch_order(n, seed, epoch) for epoch in range(first // n, (end - 1) // n + 1)]
    return torch.cat(orders)[first % n :][:batch_size]


# ---------------------------------------------------------------------------------------------
# Augmentation of a batch: `draw` holds uniform numbers from [0, 1), a row for each image
# ---------------------------------------------------------------------------------------------


def padded_crop(images, draw, pad):
    """Shift each image by up to `pad` pixels each way, zeros outside; flip half of them.

    images (B, C, H, W) uint8, draw (B, 3) -> (B, C, H, W) uint8.
    """
    B, C, H, W = images.shape
    top, left = (draw[:, :2] * (2 * pad + 1)).long().T  # (B) each
    rows = top[:, None] + torch.arange(H, device=images.device)  # (B, H)
    columns = left[:, None] + torch.arange(W, device=images.device)  # (B, W)
    columns = torch.where(draw[:, 2:3] < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (pad, pad, pad, pad))
    which = torch.arange(B, device=images.device)[:, None, None]
    channels = [padded[:, c][which, rows[:, :, None], columns[:, None, :]] for c in range(C)]  # (B, H, W) each
    return torch.stack(channels, dim=1)


def crop_box(height, width, draw, scale, ratio=(3 / 4, 4 / 3)):
    """The box of the random resized crop (Szegedy et al. 2015).

    height, width (B,) pixels, draw (4, B). The share of the area is uniform in `scale`, log(w / h)
    uniform in log `ratio`, the place uniform; a side that does not fit is cut to the image's.
    Returns top, left, h, w: (B,) each, in pixels and their fractions.
    """
    area = height * width * (scale[0] + draw[0] * (scale[1] - scale[0]))
    aspect = ratio[0] ** (1 - draw[1]) * ratio[1] ** draw[1]  # w / h
    h = torch.minimum((area / aspect).sqrt(), height)
    w = torch.minimum((area * aspect).sqrt(), width)
    return draw[2] * (height - h), draw[3] * (width - w), h, w


def crop_and_resize(images, box, flip, size):
    """Cut a box of its own out of each image and resize it, by bicubic interpolation.

    images (B, C, H, W), box = top, left, h, w in pixels, (B,) each, flip (B,) bool, size = (H', W')
    -> (B, C, H', W') float. Made for enlarging and mild shrinking: there is no low-pass filter.
    """
    (top, left, h, w), (H, W) = box, images.shape[-2:]
    y = (torch.arange(size[0], device=images.device) + 0.5) / size[0]  # pixel centres, in (0, 1)
    x = ((torch.arange(size[1], device=images.device) + 0.5) / size[1]).expand(len(images), -1)
    x = torch.where(flip[:, None], x.flip(1), x)
    y = 2 * (top[:, None] + y * h[:, None]) / H - 1  # (B, H'), the image spans [-1, 1]
    x = 2 * (left[:, None] + x * w[:, None]) / W - 1  # (B, W')
    places = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)  # (B, H', W', 2)
    crops = F.grid_sample(images.float(), places, mode="bicubic", padding_mode="border", align_corners=False)
    return crops.clamp(0, 255)


def resize(images, sizes, size):
    """Resize whole images to size = (H', W'), each as much of its frame as `sizes` says, see `sides`."""
    if sizes is None and size == images.shape[-2:]:
        return images
    zero = torch.zeros(len(images), device=images.device)
    return crop_and_resize(images, (zero, zero, *sides(images, sizes)), zero > 0, size)


def sides(images, sizes=None):
    """Height and width of each image inside its frame, (B,) each; sizes (B, 2): these, None: the whole frame."""
    if sizes is None:
        return [torch.full((len(images),), side, device=images.device) for side in images.shape[-2:]]
    return sizes.T


def mixup_weights(weight, size):
    """mixup (Zhang et al. 2018): the whole image counts with its weight. (B,) -> (B, 1, H, W)."""
    return weight[:, None, None, None].expand(-1, 1, *size)


def cutmix_weights(weight, centre, size):
    """CutMix (Yun et al. 2019): 0 in a box that covers 1 - weight of the image, 1 around it.

    weight (B,), centre (B, 2) in [0, 1), size = (H, W) -> (B, 1, H, W). The image's border cuts the box.
    """
    half = (1 - weight).sqrt()[:, None] / 2
    inside = []
    for axis, n in enumerate(size):
        low, high = ((centre[:, axis, None] + sign * half) * n for sign in (-1, 1))  # (B, 1)
        place = torch.arange(n, device=weight.device)
        inside.append((place >= low.round()) & (place < high.round()))  # (B, n)
    box = inside[0][:, :, None] & inside[1][:, None, :]  # (B, H, W)
    return (~box)[:, None].to(weight.dtype)


def blend(images, targets, weights):
    """Mix every image with its neighbour in the batch, and their targets by the same share.

    images (B, C, H, W), targets (B, classes) of probabilities, weights (B, 1, H, W) of the own image.
    Neighbours are 0 and 1, 2 and 3, …; an odd last one stays alone. The order is random already.
    """
    B = len(images)
    neighbour = (torch.arange(B, device=images.device) ^ 1).clamp(max=B - 1)
    share = weights.mean(dim=(1, 2, 3))[:, None]  # (B, 1)
    images = weights * images + (1 - weights) * images[neighbour]
    return images, share * targets + (1 - share) * targets[neighbour]


def mix(images, labels, classes, mixup, cutmix, seed, step, batch_size, here=slice(None)):
    """Blend with mixup or CutMix; when both are on, each image takes one of them by a fair coin.

    images (B, C, H, W), labels (B,) -> images, targets (B, classes). mixup, cutmix: parameter of
    their Beta distribution, 0 is off, not both. Weights are drawn for the whole batch of
    `batch_size` images; `here` is the slice of it that this process holds.
    """
    rng, size = np.random.default_rng(np.random.SeedSequence((seed, MIX, step))), images.shape[-2:]
    coin = rng.random(batch_size) < (0.5 if mixup and cutmix else float(mixup > 0))
    weight = np.where(
        coin, rng.beta(mixup or 1, mixup or 1, batch_size), rng.beta(cutmix or 1, cutmix or 1, batch_size)
    )
    centre = rng.random((batch_size, 2))
    coin, weight, centre = (to_device(torch.as_tensor(v[here]), images.device) for v in (coin, weight, centre))
    weight, centre = weight.float(), centre.float()
    weights = torch.where(coin[:, None, None, None], mixup_weights(weight, size), cutmix_weights(weight, centre, size))
    return blend(images, F.one_hot(labels, classes).float(), weights)


def erase(images, probability, seed, step, batch_size, here=slice(None)):
    """Random erasing (Zhong et al. 2020), pixel by pixel: noise N(0, 1) in a box of 2 to 33 % of an image.

    images (B, C, H, W), normalised; each is erased with the given probability. `here` as in `mix`.
    """
    options = dict(generator=generator(seed, ERASE, step, device=images.device), device=images.device)
    draw = torch.rand(5, batch_size, **options)[:, here]
    box = crop_box(*sides(images), draw[:4], scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))
    top, left, h, w = (side[:, None].round() for side in box)
    y, x = (torch.arange(n, device=images.device) for n in images.shape[-2:])
    inside = ((y >= top) & (y < top + h))[:, :, None] & ((x >= left) & (x < left + w))[:, None, :]  # (B, H, W)
    inside &= (draw[4] < probability)[:, None, None]
    filler = torch.randn(batch_size, *images.shape[1:], **options)[here].to(images)
    return torch.where(inside[:, None], filler, images)


def normalise(images, mean, std):
    """uint8 or 0-255 pixels (B, C, H, W) -> float with mean 0 and deviation 1 over the data set."""
    mean, std = (channels(values, images.device) for values in (mean, std))
    return (images.float() - 255 * mean) / (255 * std)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # a tensor of inference mode could not be used in training
def channels(values, device):
    """A number for each channel, as (C, 1, 1) on the device. Copied there once, for the host waits for that."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def to_plus_minus_1(dataset):
    """The same data, pixels brought to [-1, 1] in place of mean 0 and deviation 1, as Google's models want them."""
    half = (0.5,) * len(dataset.mean)
    for split in (dataset.train, dataset.test):
        split.mean = split.std = half
    return dataset._replace(mean=half, std=half)


def to_device(tensor, device):
    """Copy from the host to a device; from pinned memory, if that is a GPU, so that the host need not wait for it."""
    return tensor if torch.device(device).type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------


def balanced(labels, n, seed):
    """Indices of n samples at random, as many of each class as of any other, or one more: (n,), sorted.

    Raises ValueError if there are not as many.
    """
    if n > len(labels):
        raise ValueError(f"{n} labels were asked for, there are {len(labels)}; ask for fewer")
    order = torch.randperm(len(labels), generator=generator(seed, SUBSET))
    place = torch.zeros_like(labels)  # of each sample among those of its class, in that order
    for label in labels.unique():
        mine = order[labels[order] == label]
        place[mine] = torch.arange(len(mine))
    return order[place[order].argsort(stable=True)[:n]].sort().values


class InMemory:
    """Images in memory.

    images (n, C, H, W) uint8, labels (m,) int64: sample i is image i % n, so that one photograph may
    stand for many crops. sizes (n, 2): height and width of each image inside its frame; None: all of it.
    """

    unreadable = {}  # nothing left to decode

    def __init__(self, images, labels, mean, std, sizes=None):
        self.images, self.labels, self.mean, self.std = images, labels, mean, std
        self.sizes = sizes

    def __len__(self):
        return len(self.labels)

    def subset(self, n, seed):
        """A part of n samples, the same number of each class (or one more)."""
        return self.part(balanced(self.labels, n, seed))

    def part(self, keep):
        """The samples with these indices (n,)."""
        which = keep % len(self.images)
        sizes = None if self.sizes is None else self.sizes[which]
        return InMemory(self.images[which], self.labels[keep], self.mean, self.std, sizes)

    def to(self, device):
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        self.sizes = None if self.sizes is None else self.sizes.to(device)

    def train_batches(self, size, batch_size, steps, seed, crop, device, here=slice(None)):
        """Yield images (b, C, H, W) float and labels (b,) for each step of the range `steps`.

        size = (H, W). crop: a number, the pad of `padded_crop`; a pair, the scale of `crop_box`; or
        None. `here`: the slice of each batch that this process wants.
        """
        self.to(device)
        for step in steps:
            index = batch_indices(len(self), batch_size, step, seed)[here]
            draw = torch.rand(batch_size, 5, generator=generator(seed, CROP, step))[here]
            index, draw = to_device(index, device), to_device(draw, device)
            which = index % len(self.images)
            images, sizes = self.images[which], None if self.sizes is None else self.sizes[which]
            if isinstance(crop, tuple):
                box = crop_box(*sides(images, sizes), draw[:, 1:].T, crop)
                images = crop_and_resize(images, box, draw[:, 0] < 0.5, size)
            else:
                images = resize(images if crop is None else padded_crop(images, draw, crop), sizes, size)
            yield normalise(images, self.mean, self.std), self.labels[index]

    def test_batches(self, size, batch_size, device, here=slice(None)):
        """Yield images (b, C, H, W) float and labels (b,), every sample of the slice `here` once, in order."""
        self.to(device)
        for index in torch.arange(len(self), device=device)[here].split(batch_size):
            which = index % len(self.images)
            images = resize(self.images[which], None if self.sizes is None else self.sizes[which], size)
            yield normalise(images, self.mean, self.std), self.labels[index]


class Features:
    """What a frozen encoder said of each image: features (n, D), labels (n,). Batches as of `InMemory`."""

    unreadable = {}

    def __init__(self, features, labels):
        self.features, self.labels = features, labels

    def __len__(self):
        return len(self.labels)

    def train_batches(self, size, batch_size, steps, seed, crop, device, here=slice(None)):
        for step in steps:
            index = to_device(batch_indices(len(self), batch_size, step, seed)[here], device)
            yield self.features[index], self.labels[index]

    def test_batches(self, size, batch_size, device, here=slice(None)):
        yield from zip(self.features[here].split(batch_size), self.labels[here].split(batch_size), strict=True)


REQUEST = 64  # images that a worker decodes at a time


class Folder(torch.utils.data.Dataset):
    """Images on disk, PATH/CLASS/*.{jpg,png,…}: decoded, cropped and flipped by DataLoader workers.

    An image that can't be decoded is skipped: a warning names it, and in training another of its
    batch stands in. `unreadable` maps the names met so far to the reasons, see `skip`. Raises ValueError for a class
    without images.
    """

    def __init__(self, path, mean, std):
        self.mean, self.std, self.unreadable, self.randaugment = mean, std, {}, 0.0
        # How much of the short side a test sees; None: 224 of 256, as usual for ImageNet, and all above (MAE's code).
        self.crop_pct = None
        self.classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        paths, labels = [], []
        for label, name in enumerate(self.classes):
            files = sorted(str(f) for f in Path(path, name).iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
            if not files:
                raise ValueError(
                    f"no image in {Path(path, name)}; add some ({' '.join(IMAGE_SUFFIXES)}) or remove the folder"
                )
            paths += files
            labels += [label] * len(files)
        # One array of bytes: a million objects would be copied by each worker, which counts references in their place.
        self.files, self.labels = np.array(list(map(os.fsencode, paths)), np.bytes_), torch.tensor(labels).long()

    def __len__(self):
        return len(self.files)

    def subset(self, n, seed):
        """A part of n files, the same number of each class (or one more)."""
        return self.part(balanced(self.labels, n, seed))

    def part(self, keep):
        """The files with these indices (n,)."""
        part = copy.copy(self)
        part.unreadable = {}
        part.files, part.labels = self.files[keep.numpy()], self.labels[keep]
        return part

    def skip(self, unreadable):
        """Take note of images that can't be decoded, {name: reason}, here or in another process.

        Raises UnreadableImages once they are more than 5 % of the split.
        """
        self.unreadable |= unreadable
        if len(self.unreadable) > 0.05 * len(self):
            raise UnreadableImages(
                f"{len(self.unreadable)} of {len(self)} images can't be decoded, more than 5 %; the last is "
                f"{list(self.unreadable)[-1]}; repair or remove them"
            )

    def __getitem__(self, request):
        """(index, size, crop, draw) -> image (3, H, W) uint8, label, and None or (name, reason) if black."""
        index, size, crop, draw = request
        file, label = os.fsdecode(self.files[index]), self.labels[index].item()
        try:
            crop_pct = self.crop_pct or (7 / 8 if max(size) <= 224 else 1.0)
            return read_image(file, size, crop, draw, self.randaugment, crop_pct), label, None
        except Exception as error:  # whatever a decoder raises for a broken file
            return torch.zeros(3, *size, dtype=torch.uint8), label, (file, str(error) or type(error).__name__)

    def train_batches(self, size, batch_size, steps, seed, crop, device, here=slice(None)):
        """As `InMemory.train_batches`; crop is the scale of `crop_box`."""

        def requests():
            for step in steps:
                index = batch_indices(len(self), batch_size, step, seed)[here].tolist()
                draw = torch.rand(batch_size, 5, generator=generator(seed, CROP, step))[here].tolist()
                rows = [(i, size, crop, d) for i, d in zip(index, draw, strict=True)]
                yield from (rows[i : i + REQUEST] for i in range(0, len(rows), REQUEST))

        loaded = self._load(requests(), device, replace=True)
        parts = math.ceil(len(range(batch_size)[here]) / REQUEST)  # of a step, each from another worker
        while step := list(itertools.islice(loaded, parts)):
            yield step[0] if parts == 1 else tuple(torch.cat(part) for part in zip(*step, strict=True))

    def test_batches(self, size, batch_size, device, here=slice(None)):
        """As `InMemory.test_batches`; an image that can't be decoded has label -1 and is black."""
        index = range(len(self))[here]
        batches = (index[i : i + batch_size] for i in range(0, len(index), batch_size))
        return self._load(([(i, size, None, None) for i in batch] for batch in batches), device, replace=False)

    def _load(self, requests, device, replace):
        loader = torch.utils.data.DataLoader(
            self,
            batch_sampler=requests,
            generator=torch.Generator(),  # else the workers' seed, which nothing uses, is drawn from the global one
            num_workers=workers(),
            worker_init_fn=ignore_sigterm,
            collate_fn=functools.partial(collate, replace=replace),
            pin_memory=device.type == "cuda",
        )
        for images, labels, failed in loader:
            for name, reason in failed:
                if name not in self.unreadable:
                    tqdm.write(f"warning: skipped {name}: {reason}", file=sys.stderr)
            if replace and len(failed) == len(labels):
                raise UnreadableImages(
                    f"no image of a batch can be decoded, {failed[0][0]} and others; repair or remove them"
                )
            self.skip(dict(failed))
            images, labels = (v.to(device, non_blocking=True) for v in (images, labels))
            yield normalise(images, self.mean, self.std), labels


def workers():
    """How many processes decode images: this process's share of the machine's cores, 32 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(32, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))  # torchrun says how many share it


def ignore_sigterm(worker):
    """It may come to a whole group of processes: the main one finishes its step with the workers, and ends them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def read_image(file, size, crop, draw, magnitude=0.0, crop_pct=7 / 8):
    """Decode an image file, crop it and resize it to size = (H, W): (3, H, W) uint8, RGB.

    crop, draw: scale and five numbers for `crop_box` and the flip; None: the middle, as much of the
    short side as `crop_pct` says. magnitude: of `randaugment`, in training.
    """
    with Image.open(file) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # a small file may claim any size; Pillow only warns
            raise ValueError(f"{image.width}x{image.height} pixels are more than {Image.MAX_IMAGE_PIXELS:,}")
        if image.format != "JPEG":
            ImageOps.exif_transpose(image, in_place=True)
        width, height = image.size
        if image.getexif().get(0x0112) in (5, 6, 7, 8):  # EXIF orientation of a JPEG: the camera was held upright
            width, height = height, width
        if crop:
            sides, draws = torch.tensor([height, width]), torch.tensor(draw[1:])
            top, left, h, w = (v.item() for v in crop_box(*sides, draws, crop))
        else:
            shrink = crop_pct * min(height / size[0], width / size[1])
            h, w = size[0] * shrink, size[1] * shrink
            top, left = (height - h) / 2, (width - w) / 2
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size: as small as the crop allows.
        shrink = max(1.0, min(h / size[0], w / size[1]))
        image.draft(None, (math.ceil(image.width / shrink), math.ceil(image.height / shrink)))
        ImageOps.exif_transpose(image, in_place=True)
        image = to_rgb(image)
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, (left + w) * x, (top + h) * y)
    image = image.resize(size[::-1], Image.Resampling.BICUBIC, box)
    if crop and draw[0] < 0.5:
        image = ImageOps.mirror(image)
    if crop and magnitude:
        image = randaugment(image, magnitude, random.Random(str(draw)))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# RandAugment's operations: (image, strength in [0, 1], sign -1 or 1) -> image.
OPERATIONS = (
    lambda i, s, sign: ImageOps.autocontrast(i),
    lambda i, s, sign: ImageOps.equalize(i),
    lambda i, s, sign: ImageOps.invert(i),
    lambda i, s, sign: ImageOps.posterize(i, 4 - int(4 * s) or 1),
    lambda i, s, sign: ImageOps.solarize(i, 256 - int(256 * s)),
    lambda i, s, sign: ImageEnhance.Color(i).enhance(1 + 0.9 * sign * s),
    lambda i, s, sign: ImageEnhance.Contrast(i).enhance(1 + 0.9 * sign * s),
    lambda i, s, sign: ImageEnhance.Brightness(i).enhance(1 + 0.9 * sign * s),
    lambda i, s, sign: ImageEnhance.Sharpness(i).enhance(1 + 0.9 * sign * s),
    lambda i, s, sign: i.rotate(30 * sign * s, Image.Resampling.BICUBIC, fillcolor=GREY),
    lambda i, s, sign: shift(i, x_of_y=0.3 * sign * s),
    lambda i, s, sign: shift(i, y_of_x=0.3 * sign * s),
    lambda i, s, sign: shift(i, x=0.45 * sign * s * i.width),
    lambda i, s, sign: shift(i, y=0.45 * sign * s * i.height),
    lambda i, s, sign: i.point([min(255, p + int(110 * s)) if p < 128 else p for p in range(256)] * 3),  # SolarizeAdd
)
GREY = tuple(round(255 * mean) for mean in IMAGENET_MEAN)


def shift(image, x=0.0, y=0.0, x_of_y=0.0, y_of_x=0.0):
    """Translate by pixels, or shear."""
    matrix = (1, x_of_y, x, y_of_x, 1, y)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=GREY)


def randaugment(image, magnitude, rng):
    """RandAugment (Cubuk et al. 2020), as MAE fine-tunes with: two operations, each with probability 1/2.

    magnitude out of 10, with a deviation of 0.5; rng: a random.Random.
    """
    for operation in rng.choices(OPERATIONS, k=2):
        strength = min(max(rng.gauss(magnitude, 0.5), 0), 10) / 10
        if rng.random() < 0.5:
            image = operation(image, strength, rng.choice((-1, 1)))
    return image


def to_rgb(image):
    """Any Pillow image as 8-bit RGB; of 16-bit grey the upper 8 bits are kept."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # palettes may have transparent entries
    if image.mode == "RGB":
        image.load()  # `convert` would copy it: 20 % of the time for a photograph of 500 pixels
        return image
    return image.convert("RGB")


def collate(samples, replace):
    """Stack what `Folder` decoded: images (b, 3, H, W), labels (b,), [(name, reason)] of the failures.

    replace: others of the batch stand in for failures; else they stay black and get the label -1.
    """
    images, labels, failures = zip(*samples, strict=True)
    images, labels = torch.stack(images), torch.tensor(labels)
    failed = torch.tensor([failure is not None for failure in failures])
    if replace and failed.any() and not failed.all():
        good, everyone = (~failed).nonzero()[:, 0], torch.arange(len(failed))
        index = torch.where(failed, good[everyone % len(good)], everyone)
        images, labels = images[index], labels[index]
    elif failed.any():
        labels = torch.where(failed, -1, labels)
    return images, labels, [failure for failure in failures if failure]


# ---------------------------------------------------------------------------------------------
# Images that occur twice
# ---------------------------------------------------------------------------------------------


def perceptual_hash(images, side=32, low=16):
    """What a picture looks like, in 255 bits: (B, C, H, W) -> (B, 255) bool.

    The mean over channels, shrunk to 32 x 32; of its cosine transform the 16 x 16 lowest frequencies but the constant;
    a bit says which are above their median (Zauner 2010, with 8 x 8). Brightness and contrast do not matter, and
    another size or compression turns few bits: two unrelated pictures differ in about half of them.
    """
    grey = F.interpolate(images.double().mean(dim=1, keepdim=True), (side, side), mode="area")[:, 0]
    places = torch.arange(side, dtype=torch.float64, device=images.device)
    cosines = torch.cos(math.pi / side * torch.outer(places[:low], places + 0.5))  # (low, side)
    frequencies = (cosines @ grey @ cosines.T).flatten(1)[:, 1:]  # (B, 255)
    return frequencies > frequencies.median(dim=1, keepdim=True).values


def hash_split(split, device):
    """The hash of every image of a split, (n, 255) of -1 and 1; and which images could be decoded (n,)."""
    split = copy.copy(split)
    split.crop_pct = 1.0  # whole images
    size = split.images.shape[-2:] if isinstance(split, InMemory) else (64, 64)
    std = torch.tensor(split.std, device=device).view(-1, 1, 1)
    batches = split.test_batches(size, 64, torch.device(device))
    codes, read = zip(*((perceptual_hash(images * std), labels >= 0) for images, labels in batches), strict=True)
    return 2.0 * torch.cat(codes) - 1, torch.cat(read)


def occurring(split, others, device="cpu", bits=20):
    """Which images of a split occur in another one too, by their hashes: (n,) bool.

    Hashes that differ in at most `bits` of 255 count as the same picture. On the photographs of `photos`, a JPEG of
    another size differs in 2 to 6 bits (median), the nearest other picture in 94. An image that can't be decoded
    occurs nowhere.
    """
    (codes, read), (known, decoded) = (hash_split(each, device) for each in (split, others))
    known = known[decoded]
    agreement = torch.cat([(part @ known.T).amax(dim=1) for part in codes.split(1000)])  # 255 - 2 * bits that differ
    return ((agreement >= 255 - 2 * bits) & read).cpu()


# ---------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------

# Photographs that scikit-image's wheel ships; each is a class.
PHOTOS = (
    "astronaut.png brick.png camera.png chelsea.png clock_motion.png coffee.png coins.png grass.png gravel.png "
    "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png page.png retina.jpg rocket.jpg"
).split()

FASHION_MNIST = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag".split() + ["Ankle boot"]
FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR_MD5 = {
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
}

NAMES = ("photos", "fashion-mnist", "cifar10", "cifar100", "folder:PATH")


def load(name, size=(224, 224), data_dir=None):
    """Load a data set by name, see `NAMES`: a `Dataset`.

    size = (H, W) matters to `photos` only, whose photographs are shrunk to suit it. data_dir: where
    the files of fashion-mnist and cifar are looked for, and kept after a download; default
    $VIT_DATA, else data/. Raises ValueError for an unknown name, and for files that are missing and
    can't be downloaded, damaged, or not laid out as they should be.
    """
    data_dir = Path(data_dir or os.environ.get("VIT_DATA") or "data")
    if name == "photos":
        return photos(size)
    if name == "fashion-mnist":
        return fashion_mnist(data_dir / name)
    if name in ("cifar10", "cifar100"):
        return cifar(name, data_dir)
    if name.startswith("folder:"):
        return folder(Path(name.removeprefix("folder:")).expanduser())
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0)[0]
    raise ValueError(f"unknown data {name!r}; did you mean {near}? There are {', '.join(NAMES)}")


def photos(size=(224, 224)):
    """Sixteen photographs: a sample is a crop, its class is the photograph.

    All are at least as wide as high. Training crops come from the left two thirds; the test crops,
    four squares to each photograph, from the right third, which training never sees.
    """
    folder = Path(importlib.util.find_spec("skimage").submodule_search_locations[0], "data")
    left, test = [], []
    for name in PHOTOS:
        with Image.open(folder / name) as image:
            image = to_rgb(image)
        cut = image.width * 2 // 3
        side = image.width - cut
        for top in np.linspace(0, image.height - side, 4):
            box = (cut, top, image.width, top + side)
            test.append(np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, box)))
        image = image.crop((0, 0, cut, image.height))
        shrink = max(1.0, min(image.size) / (1.5 * min(size)))  # a mild one is left to `crop_and_resize`
        image = image.resize((round(image.width / shrink), round(image.height / shrink)), Image.Resampling.BICUBIC)
        left.append(np.asarray(image))  # (h, w, 3)
    sizes = torch.tensor([image.shape[:2] for image in left])
    frame = sizes.amax(dim=0).tolist()
    train = [np.pad(i, ((0, frame[0] - len(i)), (0, frame[1] - i.shape[1]), (0, 0)), mode="edge") for i in left]
    images = [torch.from_numpy(np.stack(split)).permute(0, 3, 1, 2).contiguous() for split in (train, test)]
    labels = torch.arange(len(PHOTOS))
    statistics = IMAGENET_MEAN, IMAGENET_STD
    train = InMemory(images[0], labels.repeat(64), *statistics, sizes)  # 1024 crops are called an epoch
    test = InMemory(images[1], labels.repeat_interleave(4), *statistics)
    return Dataset("photos", [name.split(".")[0] for name in PHOTOS], *statistics, train, test)


def fashion_mnist(folder):
    """Fashion-MNIST (Xiao et al. 2017): 60,000 and 10,000 grey images of 28 x 28 pixels, 10 classes."""
    statistics = (0.2860,), (0.3530,)
    splits = []
    for split, n in (("train", 60_000), ("t10k", 10_000)):
        images = read_idx(folder, f"{split}-images-idx3-ubyte.gz", 16, (n, 1, 28, 28))
        labels = read_idx(folder, f"{split}-labels-idx1-ubyte.gz", 8, (n,))
        splits.append(InMemory(images, labels.long(), *statistics))
    return Dataset("fashion-mnist", FASHION_MNIST, *statistics, *splits)


def read_idx(folder, name, header, shape):
    """The values of a gzipped IDX file (MNIST's format: a header, then unsigned bytes)."""
    path = fetch(folder, name, FASHION_MNIST_URL, FASHION_MNIST_MD5)
    size = header + math.prod(shape)
    try:
        with gzip.open(path) as file:  # no more than there should be, whatever the file would unpack to
            values = np.frombuffer(file.read(size + 1), np.uint8)
        if len(values) != size:
            raise ValueError(f"it unpacks to {'more' if len(values) > size else len(values)} bytes, not to {size}")
        values = values[header:]
        return torch.from_numpy(values.reshape(shape).copy())
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run again") from None


def cifar(name, data_dir):
    """CIFAR-10 or -100 (Krizhevsky 2009): 50,000 and 10,000 colour images of 32 x 32 pixels.

    Read from the binary version: bytes at known places, so that no pickle is ever loaded. A record
    is the label (of CIFAR-100 the coarse one, then the fine one) and 3 x 32 x 32 pixels.
    """
    if name == "cifar10":
        archive, base, label_bytes, names = "cifar-10-binary.tar.gz", "cifar-10-batches-bin", 1, "batches.meta.txt"
        train, test = [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]
        statistics = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    else:
        archive, base, label_bytes, names = "cifar-100-binary.tar.gz", "cifar-100-binary", 2, "fine_label_names.txt"
        train, test = ["train.bin"], ["test.bin"]
        statistics = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    path = fetch(data_dir, archive, CIFAR_URL, CIFAR_MD5)
    try:
        with tarfile.open(path, "r:gz") as tar:  # members are read, never unpacked to disk
            members = {m: tar.getmember(f"{base}/{m}") for m in (*train, *test, names)}
            for m in members.values():
                if m.size > 160_000_000:  # CIFAR-100's largest has 153,700,000 bytes
                    raise ValueError(f"{m.name} claims {m.size:,} bytes")
            read = {name: tar.extractfile(m).read() for name, m in members.items()}
        splits = []
        for files in (train, test):
            values = np.frombuffer(b"".join(read[f] for f in files), np.uint8).reshape(-1, label_bytes + 3072)
            images, labels = values[:, label_bytes:].reshape(-1, 3, 32, 32), values[:, label_bytes - 1]
            splits.append(InMemory(torch.tensor(images), torch.tensor(labels).long(), *statistics))
    except (OSError, EOFError, zlib.error, ValueError, KeyError, tarfile.TarError, AttributeError) as error:
        reason = (str(error).splitlines() or ["it is empty"])[0]
        raise ValueError(f"{path} is damaged ({reason}); delete it and run again") from None
    return Dataset(name, read[names].decode().split(), *statistics, *splits)


def folder(path):
    """Images on disk in ImageNet's layout: PATH/{train,val}/CLASS/*.{jpg,png,…}."""
    for split in ("train", "val"):
        if not (path / split).is_dir():
            raise ValueError(f"no folder {path / split}; folder:PATH needs PATH/train/CLASS/… and PATH/val/CLASS/…")
    train, test = (Folder(path / split, IMAGENET_MEAN, IMAGENET_STD) for split in ("train", "val"))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        where = "train" if odd in train.classes else "val"
        raise ValueError(
            f"the classes of {path}/train and {path}/val differ: {odd} is only in {where}; make them equal"
        )
    if not train.classes:
        raise ValueError(f"no class in {path / 'train'}; it needs a folder for each class")
    return Dataset("folder", train.classes, IMAGENET_MEAN, IMAGENET_STD, train, test)


def fetch(folder, name, url, md5):
    """The path of a data file; downloads it when it is not there. md5: checksums by name.

    Raises ValueError if the network or the checksum fails.
    """
    try:
        return download(url + name, folder / name, f"md5:{md5[name]}")
    except ValueError as error:
        raise ValueError(f"{url}{name}: {error}; try again") from None
    except BROKEN as error:
        raise ValueError(
            f"{name} is not in {folder} and {url} can't be reached ({error}); put it there, or name "
            "the folder that has it with --data-dir"
        ) from None
