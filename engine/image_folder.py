"""ImageNet's layout on disk, PATH/{train,val}/CLASS/…/*.{jpg,png,…}: decoded, cropped and flipped by other processes.

load(path)     both splits, as a `data.Dataset`
Folder         one of them, with the methods of `data.InMemory`
find_classes   the images of PATH/CLASS/…
find_images    the image files of a folder, and what else is in there
read_image     from a file to a tensor
decode         from a file to all of its pixels
randaugment    RandAugment, with Pillow
"""

import atexit
import collections
import copy
import functools
import itertools
import math
import os
import random
import signal
import sys
import weakref
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from tqdm import tqdm

import data
from engine import augment, distributed

REQUEST = 64  # images that a worker decodes at a time
STAND_INS = 64  # images that come after an unreadable one, of which the first that can be decoded takes its place
# What Pillow may open, whatever a file is called, and what such files are called. Of its other formats some do more
# than decode: PostScript is a program, and starts another one.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
IMAGE_SUFFIXES = ".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .pfm".split()


class UnreadableImages(ValueError):
    """Too many images of a folder can't be decoded."""


def load(path):
    """A folder as a `data.Dataset`. Says what it leaves out; raises ValueError where it is not as it should be."""
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
    for name, split in (("train", train), ("val", test)):
        if split.ignored:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in split.ignored.most_common(6))
            more = ", and others" if len(split.ignored) > 6 else ""
            distributed.print0(
                f"{printable(path / name)}: {split.ignored.total():,} files are left out: {reasons}{more}"
            )
    return data.Dataset("folder", train.classes, data.IMAGENET_MEAN, data.IMAGENET_STD, train, test)


class Folder(torch.utils.data.Dataset):
    """Images on disk, PATH/CLASS/…/*.{jpg,png,…}; a class is named by its folder, the first below PATH.

    An image that can't be decoded is skipped: a warning names it, and in training the next one that can be stands in.
    `unreadable` maps the names met so far to the reasons, see `skip`. `ignored` counts what is no image, by the reason.
    workers: how many processes decode; None: see `workers`, 0: this one. listed: what `find_classes` would return, if
    a list says it and not the folders. stretched: an image that is not cropped is seen whole, whatever its shape; else
    its middle. accepted: of ReaL, see transfer.py. Raises ValueError for a class without images.
    """

    workers = None

    def __init__(self, path, mean, std, listed=None):
        self.mean, self.std, self.unreadable, self.randaugment = mean, std, {}, 0.0
        # How much of the short side a test sees; None: 224 of 256, as usual for ImageNet, and all above (MAE's code).
        self.crop_pct, self.stretched, self.accepted = None, False, None
        paths, labels, self.classes, self.ignored = listed or find_classes(path)
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
        part.accepted = None if self.accepted is None else self.accepted[keep]
        return part

    def skip(self, unreadable):
        """Take note of images that can't be decoded, {name: reason}, by this process or another.

        Raises UnreadableImages once they are more than 5 % of the split.
        """
        self.unreadable |= unreadable
        if len(self.unreadable) > 0.05 * len(self):
            last = list(self.unreadable)[-1]
            raise UnreadableImages(
                f"{len(self.unreadable)} of {len(self)} images can't be decoded, more than 5 %; the last is "
                f"{last} ({self.unreadable[last]}); repair or remove them"
            )

    def __getitem__(self, request):
        """Decode several images: (b, 3, H, W) uint8, labels (b,), [(name, reason)] of those that can't be decoded, and
        tuples of what else `read` gives.

        request: candidates, size, crop, draws. candidates: b sequences of indices, the image and what may stand in for
        it; where none can be decoded the image is black and the label -1. crop, draws (b, …): as of `read_image`.
        """
        candidates, size, crop, draws = request
        samples, unreadable = [self.blank(size) for _ in candidates], {}
        for row, (indices, draw) in enumerate(zip(candidates, draws, strict=True)):
            for index in indices:
                file = printable(os.fsdecode(self.files[index]))
                if file in unreadable:
                    continue
                try:
                    samples[row] = self.read(index, size, crop, draw)
                    break
                except MemoryError:  # of this machine: that is no fault of the image
                    raise
                except Exception as error:  # whatever a decoder raises for a broken file
                    unreadable[file] = (str(error) or type(error).__name__).splitlines()[0]
        images, labels, *more = zip(*samples, strict=True)
        return torch.stack(images), torch.stack(labels), list(unreadable.items()), *more

    def read(self, index, size, crop, draw):
        """An image (3, H, W) uint8 and its label (). Raises whatever a decoder does for a broken file."""
        crop_pct = None if self.stretched else self.crop_pct or (7 / 8 if max(size) <= 224 else 1.0)
        file = os.fsdecode(self.files[index])
        return read_image(file, size, crop, draw, self.randaugment, crop_pct), self.labels[index]

    def blank(self, size):
        """What stands where nothing could be read."""
        return torch.zeros(3, *size, dtype=torch.uint8), torch.tensor(-1)

    def draw(self, batch_size, seed, step):
        """Uniform numbers in [0, 1) for the crops of a step: (batch_size, …)."""
        return data.draw_crops(batch_size, seed, step)

    def train_batches(self, size, batch_size, steps, seed, crop, device, shard=slice(None)):
        """As `data.InMemory.train_batches`; crop is the scale of `augment.crop_box`, or None.

        What stands in for an unreadable image is a function of the order, the same for any number of processes.
        """

        def requests():
            for step in steps:
                order = data.batch_indices(len(self), batch_size, step, seed, more=STAND_INS).numpy()
                draws = self.draw(batch_size, seed, step).numpy()[shard]
                candidates = [order[place : place + 1 + STAND_INS] for place in range(batch_size)[shard]]
                for i in range(0, len(draws), REQUEST):
                    yield candidates[i : i + REQUEST], size, crop, draws[i : i + REQUEST]

        loaded = self._load(requests(), device, training=True)
        parts = math.ceil(len(range(batch_size)[shard]) / REQUEST)  # of a step, each from another worker
        while step := list(itertools.islice(loaded, parts)):
            images, labels, *more = zip(*step, strict=True)
            joined = (torch.cat(images), torch.cat(labels), *(sum(part, ()) for part in more)) if parts > 1 else step[0]
            yield joined

    def test_batches(self, size, batch_size, device, shard=slice(None)):
        """As `data.InMemory.test_batches`; an image that can't be decoded has label -1 and is black."""
        index = range(len(self))[shard]
        batches = (index[i : i + batch_size] for i in range(0, len(index), batch_size))
        requests = (([[i] for i in batch], size, None, [None] * len(batch)) for batch in batches)
        return self._load(requests, device, training=False)

    def _load(self, requests, device, training):
        loader = torch.utils.data.DataLoader(
            self,
            batch_size=None,  # a request is a batch already
            sampler=requests,
            generator=torch.Generator(),  # else the workers' seed, which nothing uses, is drawn from the global one
            num_workers=workers() if self.workers is None else self.workers,
            worker_init_fn=ignore_signals,
            pin_memory=device.type == "cuda",
        )
        iterator = iter(loader)
        ITERATORS.add(iterator)
        try:
            for images, labels, unreadable, *more in iterator:
                for name, reason in unreadable:
                    if name not in self.unreadable:
                        tqdm.write(f"warning: skipped {name}: {reason}", file=sys.stderr)
                self.skip(dict(unreadable))
                if training and (labels < 0).any():
                    raise UnreadableImages(
                        f"{1 + STAND_INS} images in a row can't be decoded, {unreadable[0][0]} and others; repair or "
                        "remove them"
                    )
                images, labels = (v.to(device, non_blocking=True) for v in (images, labels))
                yield data.normalise(images, self.mean, self.std), labels, *more
        finally:
            end_workers(iterator)


def workers():
    """How many processes decode images: this process's share of the machine's cores, 32 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(32, max(1, (cores or 1) // distributed.LOCAL_WORLD_SIZE))


def ignore_signals(worker):
    """They may come to a whole group of processes: the main one finishes its step with the workers, and ends them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


ITERATORS = weakref.WeakSet()  # of DataLoaders, with the workers of each


def end_workers(iterator):
    """Tell the workers of a DataLoader's iterator to end, and wait for them. Else that is done when it is collected."""
    if hasattr(iterator, "_shutdown_workers"):  # else there are none
        iterator._shutdown_workers()


@atexit.register
def end_all_workers():
    """At the end of a program, also by an error that nobody catches, which keeps all that it has passed through.

    Before `multiprocessing` does, which would send SIGTERM and wait: what is registered last is called first.
    """
    for iterator in list(ITERATORS):
        end_workers(iterator)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def find_classes(path):
    """The images of PATH/CLASS/…: their paths, their labels, the names of the classes, a Counter of what else is there.

    Raises ValueError for a class without images, and where it may not read.
    """
    names, ignored, paths, labels = [], collections.Counter(), [], []
    try:
        above = with_parents(path)
        for entry in os.scandir(path):
            if entry.name.startswith("."):
                ignored["hidden"] += 1
            elif is_(entry.is_dir) and identity(entry.path) not in above:
                names.append(entry.name)
            else:
                ignored["outside the classes"] += 1
        for label, name in enumerate(sorted(names)):
            files, others = find_images(os.path.join(path, name), above)
            if not files:
                raise ValueError(
                    f"no image in {printable(os.path.join(path, name))}; add some ({' '.join(IMAGE_SUFFIXES)}) or "
                    "remove the folder"
                )
            paths += files
            labels += [label] * len(files)
            ignored += others
    except OSError as error:  # a folder that may not be read
        raise ValueError(f"{printable(error.filename)}: {error.strerror}; make it readable, or remove it") from None
    return paths, labels, [printable(name) for name in sorted(names)], ignored


def find_images(folder, above=frozenset()):
    """The image files in a folder and all below: their paths, sorted, and a Counter of what else is there, by reason.

    By their names, and without a suffix by their content. Links are followed, but to no folder twice, nor to one whose
    `identity` is in `above`; what a name with a dot in front hides is left out. Raises OSError where it may not read.
    """
    files, ignored, folders = [], collections.Counter(), [folder]
    seen = with_parents(folder) | above
    while folders:
        # In order, so that of two ways to a folder the same one is taken everywhere.
        for entry in sorted(os.scandir(folders.pop()), key=lambda entry: entry.name):
            suffix = os.path.splitext(entry.name)[1].lower().strip(".")
            if entry.name.startswith("."):
                ignored["hidden"] += 1
            elif is_(entry.is_dir):
                if (which := identity(entry.path)) in seen:
                    ignored["links to a folder that is read already"] += 1
                else:
                    seen.add(which)
                    folders.append(entry.path)
            elif not is_(entry.is_file):
                ignored["broken links" if entry.is_symlink() else "pipes, sockets or devices"] += 1
            elif f".{suffix}" in IMAGE_SUFFIXES or (not suffix and is_image(entry.path)):
                files.append(entry.path)
            else:
                ignored[f".{printable(suffix)}" if suffix else "without a suffix"] += 1
    return sorted(files), ignored


def with_parents(folder):
    """The `identity` of a folder and of all above it."""
    folder = Path(folder).resolve()
    return {identity(path) for path in (folder, *folder.parents)}


def identity(path):
    """What a folder is, by whatever path."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def is_(kind):
    """Whether a directory entry is of a kind; False for a link that leads nowhere, or round in a circle."""
    try:
        return kind()
    except OSError:
        return False


def is_image(file):
    """Whether a file begins as an image does."""
    try:
        with Image.open(file, formats=FORMATS):
            return True
    except Exception:  # whatever a decoder raises for what it does not know
        return False


def printable(path):
    """A path as text, in which bytes that are no UTF-8 are written as \\xff."""
    return os.fsencode(path).decode(errors="backslashreplace")


# ---------------------------------------------------------------------------------------------
# From a file to an image
# ---------------------------------------------------------------------------------------------


def read_image(file, size, crop, draw, magnitude=0.0, crop_pct=7 / 8):
    """Decode an image file, crop it and resize it to size = (H, W): (3, H, W) uint8, RGB.

    crop, draw (1 + augment.BOX,): scale, and numbers for the flip and `augment.crop_box`; None: the middle, as much of
    the short side as `crop_pct` says; crop_pct None: all of it, stretched. magnitude: of `randaugment`, in training.
    """

    @functools.cache
    def seen(width, height):  # top, left, height, width in pixels
        if crop:
            box = augment.crop_box(height, width, torch.as_tensor(draw)[1:], crop, aspect=size[1] / size[0])
            return [v.item() for v in box]
        if crop_pct is None:
            return 0, 0, height, width
        shrink = crop_pct * min(height / size[0], width / size[1])
        h, w = size[0] * shrink, size[1] * shrink
        return (height - h) / 2, (width - w) / 2, h, w

    def shrink(width, height):
        _, _, h, w = seen(width, height)
        return min(h / size[0], w / size[1])

    image, width, height = decode(file, shrink)
    top, left, h, w = seen(width, height)
    x, y = image.width / width, image.height / height
    right, bottom = min((left + w) * x, image.width), min((top + h) * y, image.height)  # rounding may lead outside,
    box = (max(left * x, 0), max(top * y, 0), right, bottom)  # and Pillow refuses that
    image = image.resize(size[::-1], Image.Resampling.BICUBIC, box)
    if crop and draw[0] < 0.5:
        image = ImageOps.mirror(image)
    if crop and magnitude:
        image = randaugment(image, magnitude, random.Random(np.float32(draw).tobytes()))
    return to_tensor(image)


def to_tensor(image):
    """A Pillow image as (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode(file, shrink=lambda width, height: 1.0):
    """An image file as a Pillow image, RGB and upright, and how wide and high it is.

    shrink(width, height): how many times smaller it may come; a JPEG can be decoded at 1/2, 1/4 or 1/8 of its size.
    """
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # a small file may claim any size; Pillow only warns
            raise ValueError(f"{image.width}x{image.height} pixels are more than {Image.MAX_IMAGE_PIXELS:,}")
        halved = ";16" in str(image.tile)  # 16 bits of a colour, of which Pillow keeps the upper 8
        if image.format != "JPEG":
            ImageOps.exif_transpose(image, in_place=True)
        width, height = image.size
        if image.getexif().get(0x0112) in (5, 6, 7, 8):  # EXIF orientation of a JPEG: the camera was held upright
            width, height = height, width
        times = max(1.0, shrink(width, height))
        image.draft(None, (math.ceil(image.width / times), math.ceil(image.height / times)))
        ImageOps.exif_transpose(image, in_place=True)
        if halved and image.mode.startswith("RGB") and 0 < max(high for _, high in image.getextrema()[:3]) < 16:
            raise ValueError("of 16 bits a colour it uses 12 alone; save it with 8")
        return to_rgb(image), width, height


def to_rgb(image):
    """Any Pillow image as 8-bit RGB, before a white background where it is transparent.

    Raises ValueError for numbers that are no known scale of grey, see `to_grey`.
    """
    if image.mode[0] in "IF":
        image = to_grey(image)
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    if image.mode == "RGB":
        image.load()  # `convert` would copy it: 20 % of the time for a photograph of 500 pixels
        return image
    return image.convert("RGB")


def to_grey(image):
    """Grey values of more than 8 bits, or floats, as 8 bits.

    White is the end of the smallest range that holds all values: integers of 8, 12 or 16 bits, whatever the size that
    they are stored in; floats up to 1, 255 or 65,535. Raises ValueError for negative, larger and infinite ones.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    ranges = (1, 255, 65535) if image.mode == "F" else (255, 4095, 65535)
    if not (low >= 0 and high <= ranges[-1]):  # so that NaN is refused, too
        raise ValueError(f"grey values from {low:g} to {high:g} have no known scale; save it with 8 or 16 bits")
    white = next(top for top in ranges if high <= top)
    grey = values * (255 / white) if image.mode == "F" else values // ((white + 1) // 256)
    if getattr(image, "tag_v2", {}).get(262) == 0:  # TIFF, WhiteIsZero: of 8 bits Pillow inverts it
        grey = 255 - grey
    if "transparency" in image.info:
        grey = np.where(values == image.info["transparency"], 255, grey)
    return Image.fromarray(grey.round().astype(np.uint8))


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
