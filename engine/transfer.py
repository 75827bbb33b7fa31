"""The data that the ViT paper transfers to, as their authors publish them; each as a `data.Dataset` of files.

    pets             Oxford-IIIT Pet (Parkhi et al. 2012): 3,680 and 3,669 images of 37 breeds
    flowers          Oxford 102 Flower (Nilsback & Zisserman 2008): 2,040 and 6,149 images of 102 kinds
    imagenet_real    a folder of ImageNet, whose test images have ReaL's labels beside their own (Beyer et al. 2020)
    vtab_task        one of VTAB-1k's 19 tasks (Zhai et al. 2019), as lists: 800 and 200 images to train with

The addresses and checksums are the official ones, as torchvision lists them (datasets/oxford_iiit_pet.py and
flowers102.py); of ReaL those of google-research/reassessed-imagenet.
"""

import collections
import json
import os
import re
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import scipy.io
import torch
from tqdm import tqdm

import data
from engine import files, image_folder

PETS_URL = "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"
PETS_MD5 = {
    "images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
    "annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f",
}
FLOWERS_URL = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
FLOWERS_MD5 = {
    "102flowers.tgz": "52808999861908f626f3c1f4e79d11fa",
    "imagelabels.mat": "e0620be6f572b9609742df49c70aed4d",
    "setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c",
}
REAL_URL = "https://raw.githubusercontent.com/google-research/reassessed-imagenet/master/"
REAL_MD5 = {"real.json": "c03b536b209b127cb61430fd1ce950d5"}
REAL_IMAGES = 50_000

# VTAB's three groups; of each task the classes and the test images, as google-research/task_adaptation counts them in
# task_adaptation/data/*_test.py. The names are those of the public release, whose folders NOAH's get_vtab1k.py writes.
VTAB = {
    "natural": {
        "caltech101": (102, 6084), "cifar": (100, 10_000), "dtd": (47, 1880), "oxford_flowers102": (102, 6149),
        "oxford_iiit_pet": (37, 3669), "sun397": (397, 21_750), "svhn": (10, 26_032),
    },
    "specialized": {
        "patch_camelyon": (2, 32_768), "eurosat": (10, 5400), "resisc45": (45, 6300),
        "diabetic_retinopathy": (5, 42_670),
    },
    "structured": {
        "clevr_count": (8, 15_000), "clevr_dist": (6, 15_000), "dmlab": (6, 22_735), "kitti": (4, 711),
        "dsprites_loc": (16, 73_728), "dsprites_ori": (16, 73_728), "smallnorb_azi": (18, 12_150),
        "smallnorb_ele": (9, 12_150),
    },
}  # fmt: skip
VTAB_TRAINING = {"train800": 800, "val200": 200}


def load(name, data_dir):
    """One of the data sets above by its name, see `data.NAMES`. Raises ValueError as `data.load` does."""
    kind, _, path = name.partition(":")
    path = Path(path).expanduser()
    if kind == "oxford-pets":
        return pets(data_dir / kind)
    if kind == "oxford-flowers":
        return flowers(data_dir / kind)
    return imagenet_real(path, data_dir / kind) if kind == "imagenet-real" else vtab_task(path)


def dataset(name, classes, folder, train, test):
    """A `data.Dataset` of image files. train, test: [(path below the folder, label)].

    Raises ValueError if a file is not there. (Of SUN397 some classes have no image among VTAB's thousand.)
    """
    splits = []
    for listed in (train, test):
        paths = [os.path.join(folder, path) for path, _ in listed]
        absent = [path for path in paths if not os.path.isfile(path)]
        if absent:
            raise ValueError(
                f"{len(absent):,} of {len(paths):,} images of {folder} are not there, as "
                f"{image_folder.printable(absent[0])}; delete the folder of images, or bring them back"
            )
        found = paths, [label for _, label in listed], classes, collections.Counter()
        splits.append(image_folder.Folder(folder, data.IMAGENET_MEAN, data.IMAGENET_STD, found))
    return data.Dataset(name, classes, data.IMAGENET_MEAN, data.IMAGENET_STD, *splits)


# ---------------------------------------------------------------------------------------------
# Oxford
# ---------------------------------------------------------------------------------------------


def pets(folder):
    """Oxford-IIIT Pet: trainval.txt and test.txt; a line is an image, its class from 1, its species and breed."""
    lists, splits = ("annotations/trainval.txt", "annotations/test.txt"), []
    path = data.fetch(folder, "annotations.tar.gz", PETS_URL, PETS_MD5)
    try:
        with tarfile.open(path, "r:gz") as archive:
            texts = [archive.extractfile(name).read().decode() for name in lists]
        for text in texts:
            rows = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
            splits.append([(f"images/{row[0]}.jpg", int(row[1]) - 1) for row in rows])
        names, others = ({(label, image[7:].rpartition("_")[0]) for image, label in split} for split in splits)
        if names != others or sorted(label for label, _ in names) != list(range(37)):
            raise ValueError("its lists do not have 37 classes each, the same ones, numbered from 1")
    except DAMAGED as error:
        raise damaged(path, error) from None
    unpack(folder, "images", "images.tar.gz", PETS_URL, PETS_MD5, [image for split in splits for image, _ in split])
    return dataset("oxford-pets", [name for _, name in sorted(names)], folder, *splits)


def flowers(folder):
    """Oxford 102 Flower. Classes have numbers, no names; the official training and validation images train."""
    paths = [data.fetch(folder, name, FLOWERS_URL, FLOWERS_MD5) for name in ("imagelabels.mat", "setid.mat")]
    labels = read_mat(paths[0], "labels")
    if sorted(set(labels)) != list(range(1, 103)):
        raise damaged(paths[0], f"labels from {min(labels)} to {max(labels)}, not all from 1 to 102")
    splits = []
    for names in (("trnid", "valid"), ("tstid",)):
        numbers = [number for name in names for number in read_mat(paths[1], name)]
        if not 1 <= min(numbers) <= max(numbers) <= len(labels):
            raise damaged(paths[1], f"it numbers images up to {max(numbers)}, and there are labels for {len(labels)}")
        splits.append([(f"jpg/image_{number:05d}.jpg", labels[number - 1] - 1) for number in numbers])
    if len({label for _, label in splits[0]}) < 102:
        raise damaged(paths[1], "it has classes without an image to train with")
    unpack(folder, "jpg", "102flowers.tgz", FLOWERS_URL, FLOWERS_MD5, [image for split in splits for image, _ in split])
    return dataset("oxford-flowers", [f"flower {number}" for number in range(1, 103)], folder, *splits)


def read_mat(path, name):
    """A row of whole numbers in a MATLAB file, as a list; never empty."""
    try:
        values = np.asarray(scipy.io.loadmat(path, variable_names=[name])[name]).ravel()
        if not values.size or values.dtype.kind not in "iu":
            raise ValueError(f"{name} holds no whole numbers")
        return values.tolist()
    except Exception as error:  # whatever a reader of three formats raises for a broken file
        raise damaged(path, f"no {name}" if isinstance(error, KeyError) else error) from None


DAMAGED = (OSError, EOFError, zlib.error, ValueError, LookupError, tarfile.TarError, AttributeError)


def damaged(path, error):
    """The ValueError for a file that is not what it should be."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(f"{path} is damaged ({reason}); delete it and run again")


def unpack(folder, name, archive, url, md5, members):
    """Bring these members of an archive, all below NAME/, to FOLDER/NAME, unless that is there: all of them, or none.

    Nothing else of it is written. A process may be killed meanwhile, and others may want the same.
    """
    if (folder / name).is_dir():
        return
    path, wanted = data.fetch(folder, archive, url, md5), set(members)
    with files.lock(folder):
        if (folder / name).is_dir():  # another process has had it in the meantime
            return
        part = folder / f"{name}.part"
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        part.mkdir()
        try:
            with tarfile.open(path, "r:gz") as tar, tqdm(total=len(wanted), desc=f"unpacking {archive}") as bar:
                for member in tar:
                    if member.name in wanted and member.isfile():
                        with (part / member.name.removeprefix(f"{name}/")).open("wb") as file:
                            shutil.copyfileobj(tar.extractfile(member), file)
                        wanted.remove(member.name)
                        bar.update()
            if wanted:
                raise ValueError(f"it has no {min(wanted)}, and {len(wanted) - 1:,} others are missing")
        except DAMAGED as error:
            shutil.rmtree(part, ignore_errors=True)
            if isinstance(error, OSError) and error.errno:  # a full disk, not the archive
                raise
            raise damaged(path, error) from None
        part.rename(folder / name)


# ---------------------------------------------------------------------------------------------
# ImageNet's reassessed labels
# ---------------------------------------------------------------------------------------------


def imagenet_real(path, folder):
    """ImageNet as `image_folder.load` has it; `test.accepted` (n, most) are the labels of each image, -1 for none more.

    Raises ValueError if the classes are not ImageNet's thousand, or its images not called as they officially are: the
    numbers in real.json are those of the sorted names.
    """
    imagenet = image_folder.load(path)
    classes, test = imagenet.classes, imagenet.test
    if len(classes) != 1000 or not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        odd = next((name for name in classes if not re.fullmatch(r"n\d{8}", name)), f"{len(classes)} classes")
        raise ValueError(f"{path} has {odd}; imagenet-real:PATH needs ImageNet's 1,000 classes, as n01440764")
    real = read_real(data.fetch(folder, "real.json", REAL_URL, REAL_MD5))
    labels = []
    for file in map(os.fsdecode, test.files):
        number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.\w+", os.path.basename(file))
        if not number or not 1 <= int(number[1]) <= REAL_IMAGES:
            name = image_folder.printable(file)
            raise ValueError(
                f"{name} is not called as ImageNet's images are; ReaL's labels go with ILSVRC2012_val_….JPEG"
            )
        labels.append(real[int(number[1]) - 1])
    agree = [own in them for own, them in zip(test.labels.tolist(), labels, strict=True) if them]
    if sum(agree) < len(agree) / 2:  # of ImageNet's own labels nine of ten are among ReaL's
        raise ValueError(
            f"{sum(agree):,} of {len(agree):,} images in {path}/val have a label that ReaL accepts: the classes are "
            "not ImageNet's, or the files are mixed up; unpack it again"
        )
    most = max(1, *map(len, labels))
    test.accepted = torch.tensor([them + [-1] * (most - len(them)) for them in labels])
    return imagenet._replace(name="imagenet-real")


def read_real(path):
    """real.json: of each of the 50,000 validation images, sorted by name, a list of classes, which may be empty."""
    try:
        real = json.loads(path.read_text())
        if len(real) != REAL_IMAGES or not all(isinstance(labels, list) for labels in real):
            raise ValueError(f"{len(real):,} entries, not {REAL_IMAGES:,} lists")
        if not all(type(label) is int and 0 <= label < 1000 for labels in real for label in labels):
            raise ValueError("it has labels that are no class from 0 to 999")
        return real
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged(path, error) from None


# ---------------------------------------------------------------------------------------------
# VTAB
# ---------------------------------------------------------------------------------------------


def vtab_task(path):
    """PATH/{train800,val200,test}.txt, PATH's last part being the name of a task; a line is an image and its class.

    Images are seen whole, without crops or flips, which would change what some tasks ask for: a place, an orientation.
    """
    task = dataset("vtab", *read_lists(path))
    task.train.stretched = task.test.stretched = True
    return task


def read_lists(path):
    """The classes of the task in a folder, the folder, and [(image, label)] to train and to test with."""
    tasks = {name: task for group in VTAB.values() for name, task in group.items()}
    if path.name not in tasks:
        raise ValueError(f"{path} is no task of VTAB; vtab:PATH/TASK has one of {', '.join(sorted(tasks))}")
    n, tests = tasks[path.name]
    lists = [read_list(path / f"{name}.txt", n, m) for name, m in (*VTAB_TRAINING.items(), ("test", tests))]
    return [f"{path.name} {i}" for i in range(n)], path, lists[0] + lists[1], lists[2]


def read_list(path, classes, length):
    """[(image, label)] of a list. Raises ValueError for one that is not as long as the official one."""
    try:
        rows = [line.rsplit(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read ({error}); unpack VTAB-1k again") from None
    for number, row in enumerate(rows, 1):
        if len(row) < 2 or not row[1].isdecimal() or int(row[1]) >= classes:
            raise ValueError(
                f"{path}, line {number}: {' '.join(row)[:100]!r} is no image and a class from 0 to {classes - 1}; "
                "unpack VTAB-1k again"
            )
    if len(rows) != length:
        raise ValueError(f"{path} lists {len(rows):,} images, and the official one {length:,}; unpack VTAB-1k again")
    return [(image, int(label)) for image, label in rows]
