"""Images, in batches, and all randomness of a run.

Four kinds of split, one pair of methods:

    InMemory      small sets: uint8 tensors, cropped, flipped and normalised a batch at a time, on the device
    Photographs   a few large ones, of which every sample is another crop
    Folder        ImageNet's layout on disk, see engine/image_folder.py
    Scenes        made on the fly: an item before a part of a photograph, see engine/scenes.py

    split.train_batches(…)   shuffled and augmented, one batch a step
    split.test_batches(…)    every image once, in order

All randomness is a pure function of (seed, purpose, position): of order, crops, mixing, masks. So a run that resumes at
step s sees what it would have seen without the interruption, and R processes with B / R images each see the
images that one process sees with B: numbers are drawn for the whole batch, and `shard` is a process's slice of it.
"""

import difflib
import functools
import gzip
import importlib.util
import math
import os
import tarfile
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from engine import augment, files

# mean, std: one number a channel, of pixels in [0, 1]. train, test: two splits.
Dataset = namedtuple("Dataset", "name classes mean std train test")
NATIVE_SIZE = {"fashion-mnist": 28, "cifar10": 32, "cifar100": 32, "scenes": 64, "scenes-many": 96}  # pixels

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCENES = (0.525, 0.389, 0.348), (0.284, 0.236, 0.241)
STATISTICS = {  # mean, std of the training images; photos and folders have ImageNet's
    "scenes": SCENES,
    "scenes-many": SCENES,
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}

# ---------------------------------------------------------------------------------------------
# Order and randomness
# ---------------------------------------------------------------------------------------------

# Purposes: each has random numbers of its own.
ORDER, CROP, MIX, MASK, ERASE, SUBSET, MODEL, EVALUATION, SCENE = range(9)


def generator(seed, *key, device="cpu"):
    """A torch.Generator whose numbers depend on (seed, *key) alone; all non-negative integers."""
    state = np.random.SeedSequence((seed, *key)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) % 2**63)


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """A random order of n images, another one for each epoch: (n,) int64."""
    return torch.randperm(n, generator=generator(seed, ORDER, epoch))


def batch_indices(n, batch_size, step, seed, more=0):
    """Which of n images step `step` sees, and `more` that come after them: (batch_size + more,) int64.

    The orders of the epochs follow each other without a gap: every image comes once an epoch, and
    a batch may be larger than the set.
    """
    first, end = step * batch_size, (step + 1) * batch_size + more
    orders = [epoch_order(n, seed, epoch) for epoch in range(first // n, (end - 1) // n + 1)]
    return torch.cat(orders)[first % n :][: end - first]


def draw_crops(batch_size, seed, step):
    """Uniform numbers in [0, 1) for the crops of a step, flip and box of each image: (batch_size, 1 + augment.BOX)."""
    return torch.rand(batch_size, 1 + augment.BOX, generator=generator(seed, CROP, step))


def draw_noise(batch_size, N, columns, seed, step, device):
    """Uniform numbers in [0, 1) for the masks of a step, on the device.

    (batch_size, N), a number for each of N patches; with several columns (batch_size, N, columns).
    """
    rng = generator(seed, MASK, step, device=device)
    if columns == 1:
        return torch.rand(batch_size, N, generator=rng, device=device)
    return torch.rand(columns, batch_size, N, generator=rng, device=device).permute(1, 2, 0)


def evaluation_noise(n, N, seed, columns=1):
    """As `draw_noise`, for the masks of n test images, on the CPU.

    Row i depends on the seed and on i alone, not on n, a column not on how many there are: runs of any length and kind
    are compared on the same masks.
    """
    drawn = [torch.rand(n, N, generator=generator(seed, EVALUATION, column)) for column in range(columns)]
    return drawn[0] if columns == 1 else torch.stack(drawn, dim=-1)


def balanced(labels, n, seed):
    """Indices of n samples at random, as many of each class as of any other, or one more: (n,), sorted.

    Raises ValueError if there are not as many.
    """
    if n > len(labels):
        raise ValueError(f"{n} images were asked for, there are {len(labels)}; ask for fewer")
    order = torch.randperm(len(labels), generator=generator(seed, SUBSET))
    place = torch.zeros_like(labels)  # of each sample among those of its class, in that order
    for label in labels.unique():
        mine = order[labels[order] == label]
        place[mine] = torch.arange(len(mine))
    return order[place[order].argsort(stable=True)[:n]].sort().values


# ---------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------


class InMemory:
    """Images in memory, all of one size: images (n, C, H, W) uint8, labels (n,) int64.

    mean, std: what batches are normalised with, a number for each channel, of pixels in [0, 1].
    """

    unreadable = {}  # nothing left to decode

    def __init__(self, images, labels, mean, std):
        self.images, self.labels, self.mean, self.std = images, labels, mean, std

    def __len__(self):
        return len(self.labels)

    def subset(self, n, seed):
        """A part of n samples, the same number of each class (or one more)."""
        return self.part(balanced(self.labels, n, seed))

    def part(self, keep):
        """The samples with these indices (n,)."""
        return InMemory(self.images[keep], self.labels[keep], self.mean, self.std)

    def to(self, device):
        self.images, self.labels = self.images.to(device), self.labels.to(device)

    def train_batches(self, size, batch_size, steps, seed, crop, device, shard=slice(None)):
        """Yield images (b, C, H, W) float and labels (b,) for each step of the range `steps`.

        size = (H, W); of images of another shape the largest middle part is taken, also in `test_batches`. crop: a
        number, the pad of `augment.padded_crop`; a pair, the scale of `augment.crop_box`; or None: the images as they
        are. shard: the slice of each batch that this process wants.
        """
        self.to(device)
        for step in steps:
            index = to_device(batch_indices(len(self), batch_size, step, seed)[shard], device)
            draw = to_device(draw_crops(batch_size, seed, step)[shard], device)
            images = self.images[index]
            if isinstance(crop, tuple):
                images = augment.random_resized_crop(images, images.shape[-2:], draw, crop, size)
            elif crop is not None:
                images = resize(augment.padded_crop(images, draw, crop), size)
            else:
                images = resize(images, size)
            yield normalise(images, self.mean, self.std), self.labels[index]

    def test_batches(self, size, batch_size, device, shard=slice(None)):
        """Yield images (b, C, H, W) float and labels (b,), every sample of the slice `shard` once, in order."""
        self.to(device)
        for images, labels in zip(
            self.images[shard].split(batch_size), self.labels[shard].split(batch_size), strict=True
        ):
            yield normalise(resize(images, size), self.mean, self.std), labels


class Photographs:
    """Random crops of a few large photographs: sample i is cut from photograph labels[i], which is also its class.

    images (n, 3, H, W) uint8: the photographs, each in the top left of a frame that holds them all; sizes (n, 2): its
    height and width there; labels (m,) int64.
    """

    unreadable = {}

    def __init__(self, images, sizes, labels, mean, std):
        self.images, self.sizes, self.labels, self.mean, self.std = images, sizes, labels, mean, std

    def __len__(self):
        return len(self.labels)

    def subset(self, n, seed):
        """A part of n samples, the same number of each class (or one more)."""
        return self.part(balanced(self.labels, n, seed))

    def part(self, keep):
        """The samples with these indices (n,)."""
        return Photographs(self.images, self.sizes, self.labels[keep], self.mean, self.std)

    def to(self, device):
        self.images, self.sizes, self.labels = (v.to(device) for v in (self.images, self.sizes, self.labels))

    def train_batches(self, size, batch_size, steps, seed, crop, device, shard=slice(None)):
        """As of `InMemory`; crop is the scale of `augment.crop_box`, or None: whole photographs."""
        self.to(device)
        for step in steps:
            labels = self.labels[to_device(batch_indices(len(self), batch_size, step, seed)[shard], device)]
            draw = to_device(draw_crops(batch_size, seed, step)[shard], device)
            images, sides = self.images[labels], self.sizes[labels].T
            if crop is None:
                images = augment.resize(images, sides, size)
            else:
                images = augment.random_resized_crop(images, sides, draw, crop, size)
            yield normalise(images, self.mean, self.std), labels

    def test_batches(self, size, batch_size, device, shard=slice(None)):
        """As of `InMemory`: every sample is its whole photograph."""
        self.to(device)
        for labels in self.labels[shard].split(batch_size):
            images = augment.resize(self.images[labels], self.sizes[labels].T, size)
            yield normalise(images, self.mean, self.std), labels


class Features:
    """What a frozen encoder said of each image: features (n, D), labels (n,). Batches as of `InMemory`."""

    unreadable = {}

    def __init__(self, features, labels):
        self.features, self.labels = features, labels

    def __len__(self):
        return len(self.labels)

    def train_batches(self, size, batch_size, steps, seed, crop, device, shard=slice(None)):
        for step in steps:
            index = to_device(batch_indices(len(self), batch_size, step, seed)[shard], device)
            yield self.features[index], self.labels[index]

    def test_batches(self, size, batch_size, device, shard=slice(None)):
        yield from zip(self.features[shard].split(batch_size), self.labels[shard].split(batch_size), strict=True)


def resize(images, size):
    """Images (B, C, H, W), or their middle, in size = (H', W'); as they are, uint8, if they have it."""
    return images if size == images.shape[-2:] else augment.resize(images, images.shape[-2:], size)


def augment_batch(images, labels, classes, erasing, mixup, cutmix, seed, step, batch_size, shard=slice(None)):
    """Random erasing, then mixup and CutMix; when both are on, each image takes one of them by a fair coin.

    images (b, C, H, W) normalised, labels (b,): the slice `shard` of the step's batch -> images, targets (b, classes)
    of probabilities, or the labels if nothing was mixed. erasing: its probability. mixup, cutmix: the parameter of
    their Beta distribution. 0 is off.
    """
    device = images.device
    if erasing:
        options = dict(generator=generator(seed, ERASE, step, device=device), device=device)
        draw = torch.rand(1 + augment.BOX, batch_size, **options)[:, shard].T  # (b, 1 + BOX)
        noise = torch.randn(batch_size, *images.shape[1:], **options)[shard]
        images = augment.erase(images, draw, noise, erasing)
    if not mixup and not cutmix:
        return images, labels
    rng, size = np.random.default_rng(np.random.SeedSequence((seed, MIX, step))), images.shape[-2:]
    coin = rng.random(batch_size) < (0.5 if mixup and cutmix else float(mixup > 0))  # mixup
    beta = [rng.beta(alpha or 1, alpha or 1, batch_size) for alpha in (mixup, cutmix)]
    weight, centre = np.where(coin, *beta), rng.random((batch_size, 2))
    coin, weight, centre = (to_device(torch.as_tensor(v[shard]), device) for v in (coin, weight, centre))
    weight, centre = weight.float(), centre.float()
    mixed, cut = augment.mixup_weights(weight, size), augment.cutmix_weights(weight, centre, size)
    weights = torch.where(coin[:, None, None, None], mixed, cut)  # (b, 1, H, W)
    return augment.blend(images, F.one_hot(labels, classes).float(), weights)


def normalise(images, mean, std):
    """uint8 or 0-255 pixels (B, C, H, W) -> float with mean 0 and standard deviation 1 over the data set."""
    mean, std = (channels(values, images.device) for values in (mean, std))
    return (images.float() - 255 * mean) / (255 * std)


@functools.lru_cache(maxsize=16)
def channels(values, device):
    """A number for each channel, as (C, 1, 1) on the device. Copied there once, for the host waits for that."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def to_plus_minus_1(dataset):
    """The same data, its pixels brought to [-1, 1], as Google's models want them."""
    half = (0.5,) * len(dataset.mean)
    for split in (dataset.train, dataset.test):
        split.mean = split.std = half
    return dataset._replace(mean=half, std=half)


def to_device(tensor, device):
    """Copy from the host to a device; to a GPU of CUDA from pinned memory, so that the host need not wait for it."""
    if torch.device(device).type in ("cpu", "mps"):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


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

NAMES = ("photos", "scenes", "scenes-many", "fashion-mnist", "cifar10", "cifar100", "oxford-pets", "oxford-flowers")
NAMES += ("folder:PATH", "imagenet-real:PATH", "vtab:PATH", "segment:PATH", "ade20k:PATH", "coco:PATH")
WITH_MASKS = ("segment:", "ade20k:")
# How the names begin of data that are decoded as they come.
IN_FILES = ("folder:", "imagenet-real:", "vtab:", "oxford-", "coco:", *WITH_MASKS)


def load(name, size=(224, 224), data_dir=None):
    """Load a data set by name, see `NAMES`: a `Dataset`.

    size = (H, W) matters to `photos`, whose photographs are shrunk to suit it, and to scenes, which are square.
    data_dir: where files that can be downloaded are looked for, and kept after a download; default
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
    if name in ("scenes", "scenes-many"):
        from engine import scenes  # here, for it needs this file

        return scenes.load(data_dir, size, many=name == "scenes-many")
    if name.startswith("folder:"):
        from engine import image_folder  # here, for it needs this file

        return image_folder.load(Path(name.removeprefix("folder:")).expanduser())
    if name.startswith(WITH_MASKS):
        from engine import pairs  # here, for it needs this file

        return pairs.load(name)
    if name.startswith("coco:"):
        from engine import coco  # here, for it needs this file

        return coco.load(Path(name.removeprefix("coco:")).expanduser())
    if name in NAMES or name.startswith(("imagenet-real:", "vtab:")):  # Oxford's
        from engine import transfer  # here, for it needs this file

        return transfer.load(name, data_dir)
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0)[0]
    raise ValueError(f"unknown data {name!r}; did you mean {near}? There are {', '.join(NAMES)}")


def photos(size=(224, 224)):
    """Sixteen photographs: a sample is a crop, its class is the photograph.

    All are at least as wide as high. Training crops come from the left two thirds; the test crops, of the shape of
    `size` and four to each photograph, from the right third, which training never sees.
    """
    folder = Path(importlib.util.find_spec("skimage").submodule_search_locations[0], "data")
    train, test = [], []
    for name in PHOTOS:
        with Image.open(folder / name) as image:
            image = image.convert("RGB")
        cut = image.width * 2 // 3
        h = min(image.height, (image.width - cut) * size[0] / size[1])
        w = h * size[1] / size[0]
        left = (cut + image.width - w) / 2
        for top in np.linspace(0, image.height - h, 4):
            box = (left, top, left + w, top + h)
            test.append(np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, box)))
        image = image.crop((0, 0, cut, image.height))
        # A mild shrinking is left to `crop_and_resize`.
        shrink = max(1.0, min(image.height / size[0], image.width / size[1]) / 1.5)
        image = image.resize((round(image.width / shrink), round(image.height / shrink)), Image.Resampling.BICUBIC)
        train.append(np.asarray(image))  # (h, w, 3)
    sizes = torch.tensor([image.shape[:2] for image in train])
    H, W = sizes.amax(dim=0).tolist()
    train = [np.pad(image, ((0, H - len(image)), (0, W - image.shape[1]), (0, 0)), mode="edge") for image in train]
    train, test = (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous() for images in (train, test))
    labels, statistics = torch.arange(len(PHOTOS)), (IMAGENET_MEAN, IMAGENET_STD)
    train = Photographs(train, sizes, labels.repeat(64), *statistics)  # 1024 crops are called an epoch
    test = InMemory(test, labels.repeat_interleave(4), *statistics)
    return Dataset("photos", [name.split(".")[0] for name in PHOTOS], *statistics, train, test)


def fashion_mnist(folder):
    """Fashion-MNIST (Xiao et al. 2017): 60,000 and 10,000 grey images of 28 x 28 pixels, 10 classes."""
    statistics, splits = STATISTICS["fashion-mnist"], []
    for split, n in (("train", 60_000), ("t10k", 10_000)):
        images = read_idx(folder, f"{split}-images-idx3-ubyte.gz", 16, (n, 1, 28, 28))
        labels = read_idx(folder, f"{split}-labels-idx1-ubyte.gz", 8, (n,), largest=9)
        splits.append(InMemory(images, labels.long(), *statistics))
    return Dataset("fashion-mnist", FASHION_MNIST, *statistics, *splits)


def read_idx(folder, name, header, shape, largest=255):
    """The values of a gzipped IDX file (MNIST's format: a header, then unsigned bytes), none above `largest`."""
    path = fetch(folder, name, FASHION_MNIST_URL, FASHION_MNIST_MD5)
    size = header + math.prod(shape)
    try:
        with gzip.open(path) as file:  # no more than there should be, whatever the file would unpack to
            values = np.frombuffer(file.read(size + 1), np.uint8)
        if len(values) != size:
            raise ValueError(f"it unpacks to {'more' if len(values) > size else len(values)} bytes, not to {size}")
        values = values[header:]
        check_range(values, largest)
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
    else:
        archive, base, label_bytes, names = "cifar-100-binary.tar.gz", "cifar-100-binary", 2, "fine_label_names.txt"
        train, test = ["train.bin"], ["test.bin"]
    n, statistics = 10 if name == "cifar10" else 100, STATISTICS[name]
    path = fetch(data_dir, archive, CIFAR_URL, CIFAR_MD5)
    try:
        with tarfile.open(path, "r:gz") as tar:  # members are read, never unpacked to disk
            members = {m: tar.getmember(f"{base}/{m}") for m in (*train, *test, names)}
            for m in members.values():
                if m.size > 160_000_000:  # CIFAR-100's largest has 153,700,000 bytes
                    raise ValueError(f"{m.name} claims {m.size:,} bytes")
            read = {name: tar.extractfile(m).read() for name, m in members.items()}
        classes, splits = read[names].decode().split(), []
        if len(classes) != n:
            raise ValueError(f"{names} names {len(classes)} classes, not {n}")
        for files in (train, test):
            values = np.frombuffer(b"".join(read[f] for f in files), np.uint8).reshape(-1, label_bytes + 3072)
            images, labels = values[:, label_bytes:].reshape(-1, 3, 32, 32), values[:, label_bytes - 1]
            check_range(labels, n - 1)
            splits.append(InMemory(torch.tensor(images), torch.tensor(labels).long(), *statistics))
    except (OSError, EOFError, zlib.error, ValueError, KeyError, tarfile.TarError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged ({reason}); delete it and run again") from None
    return Dataset(name, classes, *statistics, *splits)


def check_range(values, largest):
    """Raise ValueError unless there are values, none of them above `largest`."""
    if not len(values):
        raise ValueError("it has no image")
    if values.max() > largest:
        raise ValueError(f"it has the label {values.max()}, and classes go from 0 to {largest}")


def fetch(folder, name, url, md5):
    """The path of a data file; downloads it when it is not there. md5: checksums by name.

    Raises ValueError if the network or the checksum fails.
    """
    try:
        return files.download(url + name, folder / name, f"md5:{md5[name]}")
    except ValueError as error:
        raise ValueError(f"{url}{name}: {error}; try again") from None
    except OSError as error:
        raise ValueError(
            f"{name} is not in {folder} and {url} can't be reached ({error}); put it there, or name "
            "the folder that has it with --data-dir"
        ) from None
