"""Images with a mask each, for semantic segmentation: the class of every pixel.

load         segment:PATH and ade20k:PATH, a `data.Dataset`
Pairs        one split of them, decoded, resized, cropped and flipped by other processes
augment      one image and its mask, for training
SceneMasks   engine/scenes.py, of which all masks are known

Class numbers are neither interpolated nor averaged: of a mask that is resized, every pixel is one that was there.
In a mask 255 is IGNORED: a pixel that teaches nothing, and does not count in any score.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

import data
from engine import distributed, image_folder
from engine.image_folder import printable

IGNORED = 255
MASK_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "PPM")  # those that change no value
LAYOUT = "segment:PATH needs PATH/{train,val}/images/NAME.jpg and PATH/{train,val}/masks/NAME.png"
ADE20K = "ade20k:PATH needs the folder ADEChallengeData2016, with images/ and annotations/ {training,validation}"

# Training images, as mmsegmentation's configs/_base_/datasets/ade20k.py and BEiT's have them.
SCALES = (0.5, 2.0)  # of the short side, over that of the window
CROPS, LARGEST = 10, 0.75  # tries for a window of which no class has a larger share
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32, 0.5, 0.5, 0.1  # of 255; from 1 - c to 1 + c; the same; of a turn
NUMBERS = 2 + 2 * CROPS + 9  # random ones for each image: scale, flip, windows, colours

# ---------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------


def load(name):
    """The data set segment:PATH or ade20k:PATH. Raises ValueError, in one line, where it is not as it should be.

    ADE20K's 0 is everything that is none of its 150 classes: it becomes IGNORED, and class c becomes c - 1. The names
    of the classes of segment:PATH are the lines of PATH/classes.txt; without it classes are numbers, up to the largest
    in the training masks.
    """
    kind, _, path = name.partition(":")
    path, ade = Path(path).expanduser(), kind == "ade20k"
    if ade and (path / "ADEChallengeData2016").is_dir():
        path = path / "ADEChallengeData2016"
    splits = []
    for split, official in (("train", "training"), ("val", "validation")):
        images = path / "images" / official if ade else path / split / "images"
        masks = path / "annotations" / official if ade else path / split / "masks"
        for folder in (images, masks):
            if not folder.is_dir():
                raise ValueError(f"no folder {printable(folder)}; {ADE20K if ade else LAYOUT}")
        splits.append(find_pairs(images, masks))
    classes = ade20k_classes(path) if ade else named_classes(path, splits[0][1])
    train, test = (Pairs(*files, classes, ade) for files in splits)
    return data.Dataset(kind, classes, data.IMAGENET_MEAN, data.IMAGENET_STD, train, test)


def find_pairs(images, masks):
    """The image files of one folder and the mask files of another: two lists, in order, that belong together by name.

    A mask without an image is left out, and said. Raises ValueError for an image without a mask, and for two files of
    one name.
    """
    found = []
    for folder in (images, masks):
        try:
            files, _ = image_folder.find_images(folder)
        except OSError as error:
            raise ValueError(f"{printable(error.filename)}: {error.strerror}; make it readable") from None
        names = {}
        for file in files:
            name = os.path.splitext(os.path.relpath(file, folder))[0]
            if name in names:
                raise ValueError(f"{printable(names[name])} and {printable(file)} have one name; rename one of them")
            names[name] = file
        found.append(names)
    pictures, truths = found
    if not pictures:
        raise ValueError(f"no image in {printable(images)}; add some, and their masks to {printable(masks)}")
    if lacking := sorted(pictures.keys() - truths.keys()):
        raise ValueError(
            f"{len(lacking):,} of the {len(pictures):,} images in {printable(images)} have no mask, as "
            f"{printable(lacking[0])}; add {printable(os.path.join(masks, lacking[0]))}.png, or remove the image"
        )
    if alone := len(truths) - len(pictures):
        distributed.print0(f"{printable(masks)}: {alone:,} masks without an image are left out")
    names = sorted(pictures)
    return [pictures[name] for name in names], [truths[name] for name in names]


def ade20k_classes(path):
    """The 150 names, the first word for each, of objectInfo150.txt; without the file, numbers from 1."""
    file = path / "objectInfo150.txt"
    if not file.is_file():
        return [str(i) for i in range(1, 151)]
    names = [line.split("\t")[-1].split(",")[0].strip() for line in file.read_text(errors="replace").splitlines()[1:]]
    if len(names) != 150 or not all(names):
        raise ValueError(f"{printable(file)} is damaged: it has {len(names)} lines of classes, not 150; delete it")
    return names


def named_classes(path, masks):
    """The lines of classes.txt; without it numbers, up to the largest in the masks that can be read."""
    file = path / "classes.txt"
    if file.is_file():
        names = [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
        if not 1 <= len(names) <= IGNORED:
            raise ValueError(f"{printable(file)} names {len(names)} classes; give 1 to {IGNORED}, one a line")
        return names

    def largest(file):
        try:
            values = read_mask(file)
        except Exception:  # whatever a decoder raises: such a pair is skipped, and counted, when its turn comes
            return -1
        return values[values != IGNORED].max(initial=-1)

    with ThreadPoolExecutor() as pool:
        n = 1 + max(map(int, pool.map(largest, masks)))
    if not n:
        raise ValueError(f"no mask of {printable(path)}/train/masks has a class; its pixels are to be class numbers")
    distributed.print0(f"no {printable(file)}: classes are numbers, 0 to {n - 1}, the largest in the training masks")
    return [str(i) for i in range(n)]


class Pairs(image_folder.Folder):
    """A `image_folder.Folder` of which each image has a mask: batches of images (b, 3, H, W) and masks (b, H, W) int64.

    A pair that can't be used is skipped, with a warning, as there: also one whose mask has another size than its image,
    or a class that does not exist. from_one: 0 is IGNORED, class c is c - 1.
    """

    def __init__(self, images, masks, classes, from_one):
        super().__init__(None, data.IMAGENET_MEAN, data.IMAGENET_STD, (images, [0] * len(images), classes, None))
        self.masks, self.from_one = np.array(list(map(os.fsencode, masks)), np.bytes_), from_one

    def part(self, keep):
        part = super().part(keep)
        part.masks = self.masks[keep.numpy()]
        return part

    def read(self, index, size, crop, draw):
        """An image (3, H, W) uint8 and its mask int16: of the size (H, W), augmented; without `draw` the image covers
        it, and the mask (H', W') is as it was."""
        image, width, height = image_folder.decode(os.fsdecode(self.files[index]))
        mask = read_mask(os.fsdecode(self.masks[index]))
        if mask.shape != (height, width):
            raise ValueError(f"its mask is {mask.shape[1]}x{mask.shape[0]} pixels, the image {width}x{height}")
        mask = mask - self.from_one  # -1: none of the classes
        nothing = mask == (-1 if self.from_one else IGNORED)
        if len(wrong := mask[((mask < 0) | (mask >= len(self.classes))) & ~nothing]):
            least, most = int(self.from_one), len(self.classes) - 1 + self.from_one
            raise ValueError(f"its mask has the class {wrong[0] + self.from_one}, and they go from {least} to {most}")
        mask[nothing] = IGNORED
        if draw is None:
            image = covering(image, size)
        else:
            image, mask = augment(image, mask, size, draw)
        return image_folder.to_tensor(image), torch.from_numpy(mask.astype(np.int16))

    def blank(self, size):
        return torch.zeros(3, *size, dtype=torch.uint8), torch.full(size, -1, dtype=torch.int16)

    def draw(self, batch_size, seed, step):
        return torch.rand(batch_size, NUMBERS, generator=data.generator(seed, data.CROP, step))

    def train_batches(self, *args):
        for images, masks in super().train_batches(*args):
            yield images, masks.long()

    def test_batches(self, size, batch_size, device, shard=slice(None)):
        """One image at a time, each in its own shape: it covers the size, and the mask has all of its pixels. What
        can't be read is black, and its mask -1."""
        for images, masks in super().test_batches(size, 1, device, shard):
            yield images, masks.long()


# ---------------------------------------------------------------------------------------------
# An image and its mask
# ---------------------------------------------------------------------------------------------


def read_mask(file):
    """The class numbers in an image file, its grey values or the numbers of a palette's colours: (H, W) int64.

    Raises ValueError for what holds none.
    """
    with Image.open(file, formats=(*MASK_FORMATS, "JPEG", "WEBP")) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"its mask claims {image.width}x{image.height} pixels")
        if image.format not in MASK_FORMATS:
            raise ValueError(f"its mask is a {image.format}, which changes values; save it as PNG")
        if image.mode not in ("1", "L", "P", "I", "I;16"):
            raise ValueError(f"its mask is {image.mode}, and class numbers are grey or a palette; convert it")
        return np.asarray(ImageOps.exif_transpose(image)).astype(np.int64)


def covering(image, size):
    """A Pillow image as large as is needed to cover size = (H, W), its shape kept. Raises ValueError for a long strip,
    which would become too large."""
    (H, W), (width, height) = size, image.size
    times = max(H / height, W / width)
    sides = max(W, round(width * times)), max(H, round(height * times))
    if sides[0] * sides[1] > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"of {width}x{height} pixels it would become {sides[0]}x{sides[1]}")
    return image.resize(sides, Image.Resampling.BILINEAR)


def augment(image, mask, size, draw):
    """A window of the image, as Pillow has it, and of its mask (h, w): both of size = (H, W), the mask uint8.

    draw (NUMBERS,): uniform numbers in [0, 1). The image is scaled by SCALES, a window is taken of which no class has
    more than LARGEST of the labelled pixels, if CROPS tries find one, and both are flipped, every other time. Where the
    image does not reach, it is filled with the mean colour, and the mask is IGNORED.
    """
    (H, W), (height, width), draw = size, mask.shape, np.float64(draw)
    zoom = max(H / height, W / width) * (SCALES[0] + draw[0] * (SCALES[1] - SCALES[0]))
    h, w = min(H / zoom, height), min(W / zoom, width)  # of what is seen, in pixels of the file
    for i in range(CROPS):
        top, left = draw[2 + 2 * i] * (height - h), draw[3 + 2 * i] * (width - w)
        seen = mask[int(top) : int(np.ceil(top + h)), int(left) : int(np.ceil(left + w))]
        counts = np.bincount(seen[seen != IGNORED])
        if 0 < counts.max(initial=0) <= LARGEST * counts.sum():
            break
    sides = min(W, round(w * zoom)), min(H, round(h * zoom))
    box = left, top, min(left + w, width), min(top + h, height)  # rounding may lead outside
    image = image.resize(sides, Image.Resampling.BILINEAR, box)
    mask = Image.fromarray(mask.astype(np.uint8)).resize(sides, Image.Resampling.NEAREST, box)
    image = colour(image, draw[2 + 2 * CROPS :])
    if draw[1] < 0.5:
        image, mask = ImageOps.mirror(image), ImageOps.mirror(mask)
    canvas, truth = Image.new("RGB", (W, H), image_folder.GREY), Image.new("L", (W, H), IGNORED)
    canvas.paste(image)
    truth.paste(mask)
    return canvas, np.asarray(truth)


def colour(image, draw):
    """Brightness, contrast, saturation and hue, each changed every other time; contrast first or last.

    draw (9,): for each of the four whether and how much, and when the contrast. As mmsegmentation's
    PhotoMetricDistortion.
    """
    shift, contrast, saturation, hue = (2 * u - 1 for u in draw[4:8])
    changes = dict(
        brightness=lambda image: image.point(lambda p: p + BRIGHTNESS * shift),
        contrast=lambda image: image.point(lambda p: p * (1 + CONTRAST * contrast)),
        saturation=lambda image: ImageEnhance.Color(image).enhance(1 + SATURATION * saturation),
        hue=lambda image: turn(image, HUE * hue),
    )
    order = ["brightness", "contrast", "saturation", "hue"]
    if draw[8] < 0.5:
        order = ["brightness", "saturation", "hue", "contrast"]
    wanted = {name for name, u in zip(changes, draw[:4], strict=True) if u < 0.5}
    for name in order:
        if name in wanted:
            image = changes[name](image)
    return image


def turn(image, turns):
    """All hues of an image, turned by so much of a circle."""
    hue, *others = image.convert("HSV").split()
    return Image.merge("HSV", (hue.point(lambda p: (p + round(256 * turns)) % 256), *others)).convert("RGB")


# ---------------------------------------------------------------------------------------------
# Scenes
# ---------------------------------------------------------------------------------------------


class SceneMasks:
    """Scenes with masks in place of labels: class 0 is the background, 1 + c an item of class c.

    split: a `scenes.Scenes`, whose items never overlap. Batches are images (b, 3, H, W) and masks (b, H, W) int64.
    """

    unreadable = {}

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return len(self.split)

    def train_batches(self, *args):
        for images, _, objects in self.split.train_batches(*args, objects=True):
            yield images, mask_of(objects)

    def test_batches(self, *args):
        for images, _, objects in self.split.test_batches(*args, objects=True):
            yield images, mask_of(objects)


def mask_of(objects):
    """The class of each pixel: `scenes.Objects` -> (b, H, W) int64."""
    return ((1 + objects.labels)[..., None, None] * objects.masks).amax(dim=1)


def of_scenes(dataset):
    """The same scenes as a `data.Dataset` of images and masks."""
    train, test = SceneMasks(dataset.train), SceneMasks(dataset.test)
    return dataset._replace(classes=["background", *dataset.classes], train=train, test=test)
