"""ImageNet's layout on disk, PATH/{train,val}/CLASS/*.{jpg,png,…}: decoded, cropped and flipped by DataLoader workers.

load(path)     both splits, as a `data.Dataset`
Folder         one of them, with the methods of `data.InMemory`
read_image     from a file to a tensor
randaugment    RandAugment, with Pillow
"""

import copy
import functools
import itertools
import math
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from tqdm import tqdm

import data
from engine import augment, distributed

REQUEST = 64  # images that a worker decodes at a time
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


class UnreadableImages(ValueError):
    """Too many images of a folder can't be decoded."""


def load(path):
    """A folder as a `data.Dataset`. Raises ValueError where it is not laid out as it should be."""
    for split in ("train", "val"):
        if not (path / split).is_dir():
            raise ValueError(f"no folder {path / split}; folder:PATH needs PATH/train/CLASS/… and PATH/val/CLASS/…")
    train, test = (Folder(path / split, data.IMAGENET_MEAN, data.IMAGENET_STD) for split in ("train", "val"))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        where = "train" if odd in train.classes else "val"
        raise ValueError(
            f"the classes of {path}/train and {path}/val differ: {odd} is only in {where}; make them equal"
        )
    if not train.classes:
        raise ValueError(f"no class in {path / 'train'}; it needs a folder for each class")
    return data.Dataset("folder", train.classes, data.IMAGENET_MEAN, data.IMAGENET_STD, train, test)


class Folder(torch.utils.data.Dataset):
    """Images on disk, PATH/CLASS/*.{jpg,png,…}; a class is named by its folder.

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
        return self.part(data.balanced(self.labels, n, seed))

    def part(self, keep):
        """The files with these indices (n,)."""
        part = copy.copy(self)
        part.unreadable = {}
        part.files, part.labels = self.files[keep.numpy()], self.labels[keep]
        return part

    def skip(self, unreadable):
        """Take note of images that can't be decoded, {name: reason}, by this process or another.

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

    def train_batches(self, size, batch_size, steps, seed, crop, device, shard=slice(None)):
        """As `data.InMemory.train_batches`; crop is the scale of `augment.crop_box`, or None."""

        def requests():
            for step in steps:
                index = data.batch_indices(len(self), batch_size, step, seed)[shard].tolist()
                draw = data.draw_crops(batch_size, seed, step)[shard].tolist()
                rows = [(i, size, crop, d) for i, d in zip(index, draw, strict=True)]
                yield from (rows[i : i + REQUEST] for i in range(0, len(rows), REQUEST))

        loaded = self._load(requests(), device, replace=True)
        parts = math.ceil(len(range(batch_size)[shard]) / REQUEST)  # of a step, each from another worker
        while step := list(itertools.islice(loaded, parts)):
            yield step[0] if parts == 1 else tuple(torch.cat(part) for part in zip(*step, strict=True))

    def test_batches(self, size, batch_size, device, shard=slice(None)):
        """As `data.InMemory.test_batches`; an image that can't be decoded has label -1 and is black."""
        index = range(len(self))[shard]
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
            yield data.normalise(images, self.mean, self.std), labels


def workers():
    """How many processes decode images: this process's share of the machine's cores, 32 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(32, max(1, cores // distributed.LOCAL_WORLD_SIZE))


def ignore_sigterm(worker):
    """It may come to a whole group of processes: the main one finishes its step with the workers, and ends them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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
# From a file to an image
# ---------------------------------------------------------------------------------------------


def read_image(file, size, crop, draw, magnitude=0.0, crop_pct=7 / 8):
    """Decode an image file, crop it and resize it to size = (H, W): (3, H, W) uint8, RGB.

    crop, draw: scale and five numbers for the flip and `augment.crop_box`; None: the middle, as much of the
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
            top, left, h, w = (v.item() for v in augment.crop_box(height, width, torch.tensor(draw[1:]), crop))
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


# ---------------------------------------------------------------------------------------------
# RandAugment
# ---------------------------------------------------------------------------------------------

# The operations: (image, strength in [0, 1], sign -1 or 1) -> image.
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
    lambda i, s, sign: affine(i, x_of_y=0.3 * sign * s),
    lambda i, s, sign: affine(i, y_of_x=0.3 * sign * s),
    lambda i, s, sign: affine(i, x=0.45 * sign * s * i.width),
    lambda i, s, sign: affine(i, y=0.45 * sign * s * i.height),
    lambda i, s, sign: i.point([min(255, p + int(110 * s)) if p < 128 else p for p in range(256)] * 3),  # SolarizeAdd
)
GREY = tuple(round(255 * mean) for mean in data.IMAGENET_MEAN)


def affine(image, x=0.0, y=0.0, x_of_y=0.0, y_of_x=0.0):
    """Translate by pixels, or shear."""
    matrix = (1, x_of_y, x, y_of_x, 1, y)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=GREY)


def randaugment(image, magnitude, rng):
    """RandAugment (Cubuk et al. 2020), as MAE fine-tunes with: two operations, each with probability 1/2.

    magnitude out of 10, with a standard deviation of 0.5; rng: a random.Random.
    """
    for operation in rng.choices(OPERATIONS, k=2):
        strength = min(max(rng.gauss(magnitude, 0.5), 0), 10) / 10
        if rng.random() < 0.5:
            image = operation(image, strength, rng.choice((-1, 1)))
    return image
