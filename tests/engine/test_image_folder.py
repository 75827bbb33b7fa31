"""What engine/image_folder.py promises: which file comes when, what is made of it, and an error that helps.

Files are written by hand or by Pillow. Images that are compared with what Pillow makes of them may differ by rounding,
one level of 255; a JPEG's by what the compression costs.
"""

import functools
import gc
import io
import math
import multiprocessing
import os
import pickle
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.color
import torch
from PIL import EpsImagePlugin, Image

import data
from engine import image_folder
from tests.engine.pictures import (
    CPU,
    JUST_BELOW_1,
    PLAIN,
    crop_draw,
    flat,
    photograph,
    pixels,
    refusal,
    same,
    save_image,
    skimage_folder,
    uniform,
)
from tests.oracles import equal

# ---------------------------------------------------------------------------------------------
# The data set
# ---------------------------------------------------------------------------------------------


def folder_with(path, *images):
    for image in images:
        save_image(Image.new("RGB", (8, 8)), path / image)


def test_a_folder_is_a_data_set_with_the_classes_of_train(tmp_path, monkeypatch):
    """PATH may start with ~."""
    folder_with(tmp_path / "pets", "train/dog/1.png", "train/cat/1.png", "train/cat/2.png", "val/cat/3.png")
    folder_with(tmp_path / "pets", "val/dog/3.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (f"folder:{tmp_path}/pets", "folder:~/pets"):
        pets = data.load(name)
        assert pets.classes == ["cat", "dog"]
        assert (len(pets.train), len(pets.test)) == (3, 2)
        assert pets.train.labels.tolist() == [0, 0, 1]
        assert pets.name == "folder"
        for split in (pets, pets.train, pets.test):  # the documentation of torchvision.models
            assert (split.mean, split.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_a_folder_without_train_or_val_is_refused(tmp_path):
    with refusal(tmp_path / "train", "PATH/train/CLASS", "PATH/val/CLASS"):
        data.load(f"folder:{tmp_path}")
    folder_with(tmp_path, "train/cat/1.png")
    with refusal(tmp_path / "val", "PATH/val/CLASS"):
        data.load(f"folder:{tmp_path}")


def test_a_folder_without_classes_is_refused(tmp_path):
    folder_with(tmp_path, "train/1.png", "val/1.png")
    with refusal(tmp_path / "train", "class"):
        data.load(f"folder:{tmp_path}")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_without_an_image_is_refused(split, tmp_path):
    folder_with(tmp_path, "train/cat/1.png", "val/cat/1.png")
    dog = tmp_path / split / "dog"
    dog.mkdir()
    (dog / "dog.txt").write_text("no image")
    with refusal("no image", dog, ".jpg .jpeg", ".png"):
        data.load(f"folder:{tmp_path}")


@pytest.mark.parametrize(("train", "val", "odd"), [("cat dog", "cat dgo", "dgo"), ("ant cat", "cat", "ant")])
def test_classes_that_differ_between_train_and_val_are_refused(train, val, odd, tmp_path):
    """By name: else a label would mean one class in training and another in the test."""
    folder_with(tmp_path, *(f"train/{name}/1.png" for name in train.split()))
    folder_with(tmp_path, *(f"val/{name}/1.png" for name in val.split()))
    with refusal(tmp_path, f"{odd} is only in {'val' if odd in val.split() else 'train'}"):
        data.load(f"folder:{tmp_path}")


# ---------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------


def folder_of(images, path):
    """A folder of these images (n, 3, H, W), each in a class of its own: image i has the label i."""
    for i, image in enumerate(images):
        save_image(photograph(image), path / f"{i:02}" / "image.png")
    return image_folder.Folder(path, *PLAIN)


def test_shards_of_a_folder_together_equal_the_whole_batch(tmp_path):
    """R processes that see B / R images each train and test as one that sees B.

    Seven images: batches of six run across epochs, and no R divides the set.
    """
    split, B = folder_of(pixels(7, 3, 12, 10), tmp_path), 6

    def train(shard=slice(None)):
        return list(split.train_batches((8, 6), B, range(3), 0, (0.2, 1.0), CPU, shard))

    whole = train()
    assert [images.shape for images, _ in whole] == [(B, 3, 8, 6)] * 3
    for shard in (slice(0, 3), slice(3, 6), slice(1, None, 3)):
        assert same(train(shard), [(images[shard], labels[shard]) for images, labels in whole]), shard
    tested = [list(split.test_batches((12, 10), 3, CPU, slice(r, None, 2))) for r in range(2)]
    assert [[labels.tolist() for _, labels in batches] for batches in tested] == [[[0, 2, 4], [6]], [[1, 3, 5]]]


def test_a_resumed_run_sees_a_folder_as_an_uninterrupted_one(tmp_path):
    """And another seed sees something else. Global random numbers play no part."""
    split = folder_of(pixels(7, 3, 12, 10), tmp_path)

    def batches(steps, seed=0):
        return list(split.train_batches((12, 10), 6, steps, seed, (0.2, 1.0), CPU))

    torch.manual_seed(0)
    through = batches(range(5))
    torch.manual_seed(1)
    assert same(batches(range(3, 5)), through[3:])
    labels = [labels.tolist() for _, labels in through]
    assert labels == [data.batch_indices(7, 6, step, 0).tolist() for step in range(5)]
    assert not same(batches(range(2), seed=1), through[:2])


def test_a_folder_and_images_in_memory_crop_alike(tmp_path):
    """The same boxes and flips from the same seed. Ramps are resized alike but for the level that a byte is rounded to.

    Red grows by the row, green by the column, so that colours tell the place; the border is where they may differ.
    """
    ramp = torch.zeros(2, 3, 100, 120, dtype=torch.uint8)
    ramp[:, 0], ramp[:, 1] = torch.arange(100)[:, None] * 2, torch.arange(120) * 2
    ramp[1, 2] = 200
    in_memory, on_disk = data.InMemory(ramp, torch.arange(2), *PLAIN), folder_of(ramp, tmp_path)
    arguments = ((40, 50), 30, range(2), 0, (0.3, 0.6), CPU)
    for (a, b), (c, d) in zip(in_memory.train_batches(*arguments), on_disk.train_batches(*arguments), strict=True):
        assert b.tolist() == d.tolist()
        equal(a[..., 3:-3, 3:-3], c[..., 3:-3, 3:-3].numpy(), "another box or flip", atol=1.5)


def test_a_part_of_a_folder_keeps_files_and_labels_together(tmp_path):
    """And leaves the whole as it was, with what is unreadable noted apart."""
    split = folder_of(flat(10), tmp_path)
    part = split.subset(6, seed=0)
    assert (len(part), len(split)) == (6, 10)
    (seen, labels), *_ = part.test_batches((8, 8), 10, CPU)
    assert labels.tolist() == data.balanced(torch.arange(10), 6, seed=0).tolist()
    assert (seen.round() == 20 * labels[:, None, None, None]).all(), "another image's label"
    part.unreadable["a"] = "broken"
    assert not split.unreadable


def test_a_folder_is_tested_in_order_each_file_once(tmp_path):
    """Also with batches that do not divide it; normalised by its own mean and standard deviation."""
    split = folder_of(flat(10), tmp_path)
    split.mean, split.std = (10 / 255, 0.0, 0.0), (2 / 255, 1 / 255, 1 / 255)
    batches = list(split.test_batches((6, 6), 4, CPU))
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    images, labels = (torch.cat(values) for values in zip(*batches, strict=True))
    equal(images[:, 0, 0, 0], (20 * labels - 10) / 2, atol=1e-4)
    equal(images[:, 2, 5, 5], 20 * labels, atol=1e-4)


def test_classes_and_files_of_a_folder_come_sorted(tmp_path):
    """Images of any size and suffix share a batch; what is no image by its name is left out."""
    for i, name in enumerate(("wolf/b.JPG", "cat/1.png", "wolf/a.jpeg", "ape/x.tiff", "ape/x.bmp", "cat/0.webp")):
        image = Image.new("RGB", (20 + 9 * i, 50 - 7 * i), (40 * i, 0, 0))
        save_image(image, tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "notes.txt").write_text("no class")
    split = image_folder.Folder(tmp_path, *PLAIN)
    assert split.classes == ["ape", "cat", "wolf"]
    (images, labels), *_ = split.test_batches((8, 8), 9, CPU)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    equal(images[:, 0].mean(dim=(1, 2)), [160, 120, 200, 40, 80, 0], atol=2)  # x.bmp x.tiff 0.webp 1.png a.jpeg b.JPG


def test_reading_a_folder_leaves_the_global_random_numbers_alone(tmp_path):
    folder_with(tmp_path, "ant/1.png")
    before = torch.get_rng_state()
    list(image_folder.Folder(tmp_path, *PLAIN).test_batches((8, 8), 8, CPU))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_large_batch_is_decoded_in_parts(tmp_path, monkeypatch):
    """And is the same batch: 11 of its 12 images in requests of 4, 4 and 3."""
    for i, picture in enumerate(pixels(12, 3, 24, 20)):
        save_image(photograph(picture), tmp_path / "ant" / f"{i}.png")
    batches = []
    for request in (64, 4):
        monkeypatch.setattr(image_folder, "REQUEST", request)
        split = image_folder.Folder(tmp_path, *PLAIN)
        batches.append(list(split.train_batches((16, 16), 12, range(3), 0, (0.2, 1.0), CPU, slice(1, None))))
    assert [len(labels) for _, labels in batches[1]] == [11, 11, 11]
    assert same(*batches)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def names(split, path):
    return [os.path.relpath(os.fsdecode(file), path) for file in split.files]


def test_images_are_found_in_folders_below_a_class(tmp_path):
    """The class is the first folder; one called like an image is a folder."""
    folder_with(tmp_path, "ant/1.png", "ant/b/2.png", "ant/b/c/d.png/3.png", "bee/deep/4.png")
    split = image_folder.Folder(tmp_path, *PLAIN)
    assert split.classes == ["ant", "bee"]
    assert names(split, tmp_path) == ["ant/1.png", "ant/b/2.png", "ant/b/c/d.png/3.png", "bee/deep/4.png"]
    assert (split.labels.tolist(), split.ignored) == ([0, 0, 0, 1], {})


def test_every_name_of_a_format_that_is_read_is_an_image():
    """As Pillow lists them; upper case, too."""
    Image.init()
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in image_folder.FORMATS}
    assert set(image_folder.IMAGE_SUFFIXES) >= known
    assert {".jpg", ".jfif", ".jpe", ".png", ".webp", ".tif", ".pgm"} <= known


def test_images_without_a_suffix_are_known_by_their_content(tmp_path):
    """A JPEG's name says nothing of its format, either. With a suffix no file is opened: there may be a million."""
    folder_with(tmp_path, "ant/0.png")
    for i, kind in enumerate(("JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "WEBP")):
        save_image(Image.new("RGB", (8, 8), (200, 0, 0)), tmp_path / "ant" / f"image{i}", format=kind)
    save_image(Image.new("RGB", (8, 8)), tmp_path / "ant" / "x.JFIF", format="JPEG")
    save_image(Image.new("RGB", (8, 8)), tmp_path / "ant" / "y.jpg", format="PNG")
    save_image(Image.new("RGB", (8, 8)), tmp_path / "ant" / "picture", format="EPS")
    (tmp_path / "ant" / "README").write_text("no image")
    (tmp_path / "ant" / "empty").write_bytes(b"")
    split = image_folder.Folder(tmp_path, *PLAIN)
    assert names(split, tmp_path / "ant") == ["0.png", *(f"image{i}" for i in range(7)), "x.JFIF", "y.jpg"]
    assert split.ignored == {"without a suffix": 3}
    [(images, labels)] = split.test_batches((4, 4), 20, CPU)
    assert labels.tolist() == [0] * 10
    equal(images[:, 0].mean(dim=(1, 2)), [0, *[200] * 7, 0, 0], atol=3)


def test_files_with_a_suffix_are_not_opened(tmp_path, monkeypatch):
    folder_with(tmp_path, "ant/0.png", "ant/b/1.jpg", "bee/2.gif")
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("opened"))
    assert len(image_folder.Folder(tmp_path, *PLAIN)) == 3


def test_what_is_left_out_is_counted_and_said_in_one_line(tmp_path, capsys):
    """Hidden files and folders, as macOS and notebooks leave them; other suffixes; what is in no class."""
    folder_with(tmp_path, "train/ant/1.png", "train/.ipynb_checkpoints/1.png", "train/ant/.ipynb_checkpoints/2.png")
    folder_with(tmp_path, "train/ant/._1.png", "train/2.png", "val/ant/1.png")
    for name in ("train/notes.txt", "train/ant/a.txt", "train/ant/b.TXT", "train/ant/deep/c.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    pets = image_folder.load(tmp_path)
    assert pets.classes == ["ant"]
    assert (len(pets.train), len(pets.test)) == (1, 1)
    assert pets.train.ignored == {"hidden": 3, "outside the classes": 2, ".txt": 2, ".heic": 1}
    assert pets.test.ignored == {}
    [line] = capsys.readouterr().out.splitlines()
    assert line == f"{tmp_path}/train: 8 files are left out: 3 hidden, 2 outside the classes, 2 .txt, 1 .heic"


def test_links_that_lead_round_in_a_circle_are_left_out(tmp_path):
    """To a folder above, be it the split's or that of all data; to one that is read already; to itself; to nothing."""
    folder_with(tmp_path, "data/train/ant/1.png", "data/train/ant/b/2.png", "data/val/ant/9.png", "other/c/3.png")
    train = tmp_path / "data" / "train"
    links = {
        "ant/up": "..",
        "ant/top": "../..",
        "ant/b/back": "..",
        "ant/again": "b",
        "ant/other": "../../../other",
        "ant/one.png": "../../../other/c/3.png",
        "ant/self": "self",
        "ant/gone": "nothing",
        "ant/gone.png": "nothing.png",
        "ant/b/self.png": "self.png",
        "round": ".",
        "above": "../..",
        "bee": "../../other",
    }
    for name, target in links.items():
        (train / name).symlink_to(target)
    split = image_folder.Folder(train, *PLAIN)
    assert split.classes == ["ant", "bee"], "a link to another place may be a class"
    found = names(split, train)
    assert found[0] == "ant/1.png"
    assert sorted(Path(name).name for name in found[1:-1]) == ["2.png", "3.png", "one.png"]
    assert found[-1] == "bee/c/3.png"
    assert split.ignored == {"broken links": 4, "links to a folder that is read already": 4, "outside the classes": 2}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["a.png", "a"])
def test_named_pipes_and_sockets_are_no_images(name, tmp_path, monkeypatch):
    """To open a pipe waits for ever for who writes to it."""
    folder_with(tmp_path, "ant/1.png")
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    os.mkfifo(tmp_path / "ant" / name)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"ant/s{name}")
        split = image_folder.Folder(tmp_path, *PLAIN)
    assert names(split, tmp_path) == ["ant/1.png"]
    assert split.ignored == {"pipes, sockets or devices": 2}


def test_long_names_and_names_that_are_no_utf8_are_read(tmp_path, capfd):
    """A path of some 600 bytes. Of a broken image, and of a class, the name is printed with the bytes as numbers."""
    deep = tmp_path / "ant" / ("x" * 200) / ("y" * 200)
    save_image(Image.new("RGB", (8, 8)), deep / f"{'z' * 200}.png")
    odd = os.fsencode(tmp_path) + b"/\xff\xfe"
    try:
        os.mkdir(odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    for i in range(20):
        Image.new("RGB", (8, 8)).save(os.fsdecode(odd + b"/\xe9%d.png" % i))
    with open(odd + b"/\xe90.png", "wb"):
        pass
    split = image_folder.Folder(tmp_path, *PLAIN)
    assert split.classes == ["ant", "\\xff\\xfe"]
    labels = torch.cat([labels for _, labels in split.test_batches((4, 4), 8, CPU)])
    assert sorted(labels.tolist()) == [-1, 0, *[1] * 19]
    assert list(split.unreadable) == [f"{tmp_path}/\\xff\\xfe/\\xe90.png"]
    "".join([*split.unreadable, *split.classes]).encode()
    assert "\\xe90.png" in capfd.readouterr().err
    folder_with(tmp_path / os.fsdecode(b"\xff"), "train/ant/1.png", "val/ant/1.png", "val/2.png")
    image_folder.load(tmp_path / os.fsdecode(b"\xff"))
    assert capfd.readouterr().out.encode().startswith(f"{tmp_path}/\\xff/val: 1 files".encode())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_refused(tmp_path):
    folder_with(tmp_path, "train/ant/b/1.png", "val/ant/1.png")
    (tmp_path / "train" / "ant" / "b").chmod(0)
    with refusal(tmp_path / "train" / "ant" / "b", "ermission", "make it readable"):
        image_folder.load(tmp_path)
    (tmp_path / "train" / "ant" / "b").chmod(0o700)


def test_a_folder_that_can_not_be_read_is_refused(tmp_path, monkeypatch):
    folder_with(tmp_path, "ant/1.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("ant"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with refusal(tmp_path / "ant", "Permission denied", "make it readable"):
        image_folder.Folder(tmp_path, *PLAIN)


# ---------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "processes", "expected"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (1, 4, 1), (32, 1, 32), (200, 2, 32)]
)
def test_cores_are_shared_by_the_processes_of_a_machine(cores, processes, expected, monkeypatch):
    """At most 32 decode for each, at least one."""
    monkeypatch.setattr(image_folder.distributed, "LOCAL_WORLD_SIZE", processes)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    assert image_folder.workers() == expected


@pytest.mark.parametrize("count", [0, 1, 2])
def test_any_number_of_workers_decodes_the_same_batches(count, tmp_path):
    """Also none: then this process does. A part of a split keeps the number."""
    folder_of(pixels(7, 3, 12, 10), tmp_path)
    split = image_folder.Folder(tmp_path, *PLAIN)
    expected = list(split.train_batches((8, 6), 6, range(2), 0, (0.2, 1.0), CPU))
    split.workers = count
    split = split.part(torch.arange(7))
    batches, before = split.train_batches((8, 6), 6, range(2), 0, (0.2, 1.0), CPU), multiprocessing.active_children()
    ours = [next(batches)]
    assert len(set(multiprocessing.active_children()) - set(before)) == count
    assert same([*ours, *batches], expected)


def test_workers_end_when_batches_are_no_longer_wanted(tmp_path, monkeypatch):
    """By an error in the loop, or at the end of the program, when the traceback still holds the batches."""
    folder_of(pixels(7, 3, 12, 10), tmp_path)
    split = image_folder.Folder(tmp_path, *PLAIN)
    split.workers, before = 2, set(multiprocessing.active_children())

    def running():
        return set(multiprocessing.active_children()) - before

    batches = split.train_batches((8, 6), 6, range(9), 0, (0.2, 1.0), CPU)
    next(batches)
    assert len(running()) == 2
    del batches
    gc.collect()
    assert not running()
    kept = [split.train_batches((8, 6), 6, range(9), 0, (0.2, 1.0), CPU) for _ in range(2)]
    for batches in kept:
        next(batches)
    assert len(running()) == 4
    image_folder.end_all_workers()
    assert not running()
    monkeypatch.setattr(split, "skip", lambda unreadable: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:
        next(split.train_batches((8, 6), 6, range(9), 0, (0.2, 1.0), CPU))
    assert not running(), f"{kept.value} holds them"


def test_signals_that_come_to_all_processes_do_not_end_the_workers(tmp_path):
    """The main one finishes its step with them."""
    folder_of(pixels(7, 3, 12, 10), tmp_path)
    split = image_folder.Folder(tmp_path, *PLAIN)
    split.workers, before = 1, set(multiprocessing.active_children())
    arguments = ((8, 6), 6, range(9), 0, (0.2, 1.0), CPU)
    expected, batches = list(split.train_batches(*arguments)), split.train_batches(*arguments)
    seen = [next(batches)]
    for worker in set(multiprocessing.active_children()) - before:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert same([*seen, *batches], expected)


PROGRAM = """
import sys
from pathlib import Path
import torch
from engine import image_folder

def main():
    split = image_folder.Folder(Path(sys.argv[1]), (0.5,) * 3, (0.5,) * 3)
    split.workers = 2
    batches = split.train_batches((8, 8), 4, range(1000), 0, (0.2, 1.0), torch.device("cpu"))  # the traceback has it
    for images, labels in batches:
        raise {error}

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("error", ["RuntimeError('in a step')", "MemoryError", "SystemExit(1)", "KeyboardInterrupt"])
def test_a_program_with_an_error_in_the_middle_of_batches_ends(error, tmp_path):
    """With all its processes: what they print to is closed, else the test would wait for that."""
    folder_with(tmp_path, *(f"ant/{i}.png" for i in range(8)))
    program = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(error=error), str(tmp_path)],
        cwd=Path(image_folder.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert program.returncode != 0
    assert error.split("(")[0] in program.stderr or "SystemExit" in error
    assert "ignored" not in program.stderr


@pytest.mark.slow
def test_processes_that_are_not_forks_decode_the_same(tmp_path, monkeypatch):
    """As Windows and macOS start them: what they get is pickled."""
    folder_of(pixels(7, 3, 12, 10), tmp_path)
    split = image_folder.Folder(tmp_path, *PLAIN)
    split.workers, split.randaugment = 1, 9.0
    expected = list(split.train_batches((8, 6), 6, range(2), 0, (0.2, 1.0), CPU))
    loader = torch.utils.data.DataLoader
    monkeypatch.setattr(torch.utils.data, "DataLoader", functools.partial(loader, multiprocessing_context="spawn"))
    assert same(split.train_batches((8, 6), 6, range(2), 0, (0.2, 1.0), CPU), expected)


def test_what_workers_get_can_be_pickled(tmp_path):
    folder_of(pixels(3, 3, 12, 10), tmp_path)
    split = image_folder.Folder(tmp_path, *PLAIN)
    again = pickle.loads(pickle.dumps((split, image_folder.ignore_signals)))[0]
    assert torch.equal(again[[[1]], (8, 8), None, [None]][0], split[[[1]], (8, 8), None, [None]][0])


def test_a_machine_that_says_nothing_of_its_cores_has_workers(monkeypatch):
    """As macOS and Windows, which have no affinities."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert image_folder.workers() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert image_folder.workers() == 1


def test_an_image_for_which_memory_is_out_is_not_called_broken(tmp_path, monkeypatch):
    folder_of(pixels(3, 3, 12, 10), tmp_path)
    split = image_folder.Folder(tmp_path, *PLAIN)

    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(image_folder, "read_image", no_memory)
    with pytest.raises(MemoryError):
        split[[[1]], (8, 8), None, [None]]


# ---------------------------------------------------------------------------------------------
# From a file to an image
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "size", "rows", "columns"),
    [
        (48, 32, (28, 28), slice(2, 30), slice(10, 38)),
        (32, 48, (28, 28), slice(10, 38), slice(2, 30)),
        (48, 16, (14, 28), slice(1, 15), slice(10, 38)),
        (20, 32, (28, 14), slice(2, 30), slice(3, 17)),
    ],
)
def test_the_test_crop_is_the_middle_seven_eighths(width, height, size, rows, columns, tmp_path):
    """224 of 256, as for ImageNet. Sizes for which no pixel needs to be resized: the crop is a slice."""
    image = pixels(3, height, width)
    file = save_image(photograph(image), tmp_path / "image.png")
    ours = image_folder.read_image(file, size, None, None)
    assert ours.dtype == torch.uint8
    equal(ours, image[:, rows, columns].numpy(), "7/8 of the side that fits less often? centred?")


def test_shrinking_averages_what_a_pixel_covers(tmp_path):
    """A ramp stays a ramp; stripes one pixel wide become grey instead of a pattern that was not there."""
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[0], image[1] = torch.arange(64) * 4, torch.arange(64) % 2 * 255
    ours = image_folder.read_image(
        save_image(photograph(image), tmp_path / "image.png"), (14, 14), None, None
    ).numpy()  # by 4
    ramp = [4 * (4 + (j + 0.5) * 4 - 0.5) for j in range(14)]
    np.testing.assert_allclose(ours[0], [ramp] * 14, atol=1)
    np.testing.assert_allclose(ours[1], np.full((14, 14), 127.5), atol=12)


@pytest.mark.parametrize("flip", [False, True])
def test_a_training_crop_takes_its_box_from_the_draw(flip, tmp_path):
    """A quarter of the area, aspect 1, at a quarter and a half of the room: a slice. Below a half it is mirrored."""
    image = pixels(3, 32, 32)
    file = save_image(photograph(image), tmp_path / "image.png")
    draw = crop_draw(0.49 if flip else 0.5, 0.3, 0.5, 0.25, 0.5)
    piece = image[:, 4:20, 8:24].numpy()
    ours = image_folder.read_image(file, (16, 16), (0.25, 0.25), draw)
    equal(ours, piece[..., ::-1] if flip else piece, atol=1)


def to_rgb_of(image, path, **options):
    """The one colour that an image has once it was written and read: three numbers."""
    file = save_image(image, path, **options)
    ours = image_folder.read_image(file, (8, 8), None, None)
    assert ours.dtype == torch.uint8
    colours = ours.flatten(1).unique(dim=1)
    assert colours.shape == (3, 1), "one colour became several"
    return colours[:, 0].tolist()


COLOURS = {
    "grey": ("L", 77, (77, 77, 77), {}),
    "1 bit, white": ("1", 1, (255, 255, 255), {}),
    "1 bit, black": ("1", 0, (0, 0, 0), {}),
    "RGB": ("RGB", (10, 20, 30), (10, 20, 30), {}),
    "palette": ("P", 2, (70, 80, 90), {}),
    # On white: colour * alpha + 255 * (1 - alpha).
    "black, transparent": ("RGBA", (0, 0, 0, 0), (255, 255, 255), {}),
    "black, half transparent": ("RGBA", (0, 0, 0, 102), (153, 153, 153), {}),
    "colour, opaque": ("RGBA", (10, 20, 30, 255), (10, 20, 30), {}),
    "grey with alpha, transparent": ("LA", (0, 0), (255, 255, 255), {}),
    "grey with alpha, opaque": ("LA", (77, 255), (77, 77, 77), {}),
    "palette with alpha": ("PA", (2, 0), (255, 255, 255), {}),
    "palette, transparent entry": ("P", 2, (255, 255, 255), {"transparency": 2}),
    "palette, another is transparent": ("P", 2, (70, 80, 90), {"transparency": 1}),
    "palette, alpha for each entry": ("P", 2, (144, 150, 155), {"transparency": bytes([255, 9, 153])}),  # 3 / 5
    "grey, its level is transparent": ("L", 7, (255, 255, 255), {"transparency": 7}),
    "colour, it is transparent": ("RGB", (1, 2, 3), (255, 255, 255), {"transparency": (1, 2, 3)}),
    "1 bit, black is transparent": ("1", 0, (255, 255, 255), {"transparency": 0}),
    "16 bits, its level is transparent": ("I;16", 7, (255, 255, 255), {"transparency": 7}),
    "CMYK": ("CMYK", (51, 102, 0, 85), (136, 102, 170), {}),  # (255 - C) (255 - K) / 255
    "YCbCr": ("YCbCr", (76, 85, 255), (254, 0, 0), {}),  # JFIF: R = Y + 1.402 (Cr - 128), …
}


@pytest.mark.parametrize("kind", COLOURS)
def test_every_kind_of_colour_becomes_8_bit_rgb_on_white(kind, tmp_path):
    mode, colour, rgb, options = COLOURS[kind]
    image = Image.new(mode, (9, 9), colour)
    if mode in ("P", "PA"):
        image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    path = tmp_path / ("image.tiff" if mode in ("CMYK", "PA", "YCbCr") else "image.png")
    ours = to_rgb_of(image, path, **options)
    with Image.open(path) as stored:
        assert stored.mode[0] == mode[0], "the file is of another kind than the test needs"
    assert ours == pytest.approx(rgb, abs=1)


def test_transparent_gifs_and_webps_are_on_white(tmp_path):
    clear = Image.new("RGBA", (9, 9), (0, 0, 0, 0))
    for name in ("a.gif", "a.webp", "a.tiff"):
        assert to_rgb_of(clear, tmp_path / name) == [255, 255, 255], name


@pytest.mark.parametrize(
    "lab", [(0, 0, 0), (255, 0, 0), (128, 0, 0), (140, 30, -20), (180, -20, 40), (100, -30, 20), (150, 40, 40)]
)
def test_cielab_becomes_srgb(lab, tmp_path):
    """Against scikit-image, which adapts to the white point in another way: that is up to 9 levels.

    Of 8 bits L is of 255 in place of 100; a and b are signed, in memory Pillow adds 128 to them.
    """
    L, a, b = lab
    oracle = 255 * skimage.color.lab2rgb([[[L / 2.55, a, b]]])[0, 0]
    ours = to_rgb_of(Image.new("LAB", (9, 9), (L, a + 128, b + 128)), tmp_path / "a.tiff")
    assert np.abs(ours - oracle).max() < 10


def test_hue_saturation_value_becomes_rgb():
    """No file that is read has it."""
    assert image_folder.to_rgb(Image.new("HSV", (1, 1), (0, 255, 255))).getpixel((0, 0)) == (255, 0, 0)


# Stored type, the largest value in the file, a value, and what it is of 255; which files can have it.
RANGES = {
    "16 bits": ("<u2", 65535, 32768, 128, "tiff png pgm"),
    "16 bits, big-endian": (">u2", 65535, 32768, 128, "tiff png"),
    "12 bits in 16": ("<u2", 4095, 2048, 128, "tiff png pgm"),
    "12 bits in 16, big-endian": (">u2", 4095, 2048, 128, "tiff png"),
    "12 bits in 16, darker": ("<u2", 300, 160, 10, "tiff"),
    "8 bits in 16": ("<u2", 255, 77, 77, "tiff png pgm"),
    "8 bits in 32": ("<i4", 255, 77, 77, "tiff"),
    "12 bits in 32": ("<i4", 4000, 2048, 128, "tiff"),
    "16 bits in 32": ("<i4", 65535, 32768, 128, "tiff"),
    "floats up to 1": ("<f4", 1.0, 0.5, 128, "tiff pfm"),
    "floats up to 1, darker": ("<f4", 0.4, 0.2, 51, "tiff pfm"),
    "floats up to 255": ("<f4", 255.0, 77.0, 77, "tiff pfm"),
    "floats up to 65535": ("<f4", 65535.0, 32896.0, 128, "tiff pfm"),
}


@pytest.mark.parametrize("kind", RANGES)
def test_grey_of_other_types_is_scaled_by_the_range_that_holds_it(kind, tmp_path):
    """White is the end of the smallest of 8, 12 and 16 bits, or of 1, 255 and 65,535, that holds all values."""
    dtype, largest, value, level, suffixes = RANGES[kind]
    values = np.full((16, 16), value, dtype)
    values[:8] = largest
    for suffix in suffixes.split():
        file = save_image(Image.fromarray(values), tmp_path / f"image.{suffix}")
        ours = image_folder.read_image(file, (16, 16), None, None, crop_pct=1.0)
        assert ours[:, 15].float().mean() == pytest.approx(level, abs=1), suffix
        assert torch.equal(ours[:1].expand(3, -1, -1), ours)


@pytest.mark.parametrize(
    ("dtype", "value", "words"),
    [
        ("<i4", -1, "-1"),
        ("<i4", 65536, "65536"),
        ("<f4", -0.5, "-0.5"),
        ("<f4", 1e6, "1e+06"),
        ("<f4", math.nan, "nan"),
        ("<f4", math.inf, "inf"),
    ],
)
def test_grey_without_a_known_scale_is_refused(dtype, value, words, tmp_path):
    """In place of an image that is black, or white."""
    values = np.ones((8, 8), dtype)
    values[2, 3] = value
    with refusal(words, "no known scale", "8 or 16 bits"):
        image_folder.read_image(save_image(Image.fromarray(values), tmp_path / "a.tiff"), (8, 8), None, None)


def png_of_16_bits(value, path, alpha=()):
    """A PNG of 8 x 8 pixels of 16 bits a colour, by hand: Pillow writes none."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" + struct.pack(f">{3 + len(alpha)}H", *[value] * 3, *alpha) * 8
    header = struct.pack(">IIBBBBB", 8, 8, 16, 6 if alpha else 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 8)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("alpha", [(), (65535,)])
def test_16_bits_a_colour_keep_the_upper_8(alpha, tmp_path):
    """Pillow drops the others. Where they are all that there is, 12 bits in 16, the image is refused, not black."""
    file = tmp_path / "image.png"
    for value, level in ((65535, 255), (32768, 128), (0, 0)):
        ours = image_folder.read_image(png_of_16_bits(value, file, alpha), (8, 8), None, None)
        assert ours.unique().tolist() == [level]
    for value in (4095, 256):
        with refusal("16 bits a colour", "12", "save it with 8"):
            image_folder.read_image(png_of_16_bits(value, file, alpha), (8, 8), None, None)


def test_16_bit_grey_where_white_is_zero_is_inverted(tmp_path):
    """TIFF's PhotometricInterpretation 0. Of 8 bits Pillow does it, in writing, too."""
    for dtype, white in (("u1", 255), ("u2", 65535)):
        values = np.full((9, 9), white, dtype)
        values[0, 0] = white - 1  # a range that is full
        file = save_image(Image.fromarray(values), tmp_path / "a.tiff", tiffinfo={262: 0})
        level = image_folder.read_image(file, (8, 8), None, None)[0, 4, 4]
        assert level == (255 if dtype == "u1" else 0)


# EXIF 2.3, tag 274: where the first row and the first column of the stored image are in the picture.
ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored_loops(picture, orientation):
    """picture (H, W, 3) as a camera stores it that was held this way."""
    row_0, column_0 = ORIENTATIONS[orientation]
    H, W, _ = picture.shape
    turned = row_0 in ("left", "right")  # a stored row is a column of the picture
    stored = np.zeros((W, H, 3) if turned else (H, W, 3), np.uint8)
    for r, c, k in np.ndindex(stored.shape):
        down, across = (c, r) if turned else (r, c)
        y = H - 1 - down if "bottom" in (row_0, column_0) else down
        x = W - 1 - across if "right" in (row_0, column_0) else across
        stored[r, c, k] = picture[y, x, k]
    return stored


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_an_image_is_turned_as_its_exif_orientation_says(orientation, suffix, tmp_path):
    """A wide picture of 4 x 6 colours, each 40 x 40 pixels; the test crop and a training crop, whole and partial."""
    picture = pixels(4, 6, 3).numpy()
    exif = Image.Exif()
    exif[274] = orientation
    stored = stored_loops(picture, orientation).repeat(40, axis=0).repeat(40, axis=1)
    file = save_image(Image.fromarray(stored), tmp_path / f"turned.{suffix}", exif=exif, quality=95)
    upright = Image.fromarray(picture.repeat(40, axis=0).repeat(40, axis=1))  # 240 x 160
    for crop, draw, box in (
        (None, None, (15, 10, 225, 150)),
        ((0.8, 0.8), crop_draw(0.9, 0.5, 0.5, 0.5, 0.5), (13, 9, 228, 152)),  # 215 x 143, aspect 3 / 2
        ((0.25, 0.25), crop_draw(0.9, 0.5, 0.5, 0.0, 0.999), (120, 0, 240, 80)),
    ):
        oracle = np.asarray(upright.resize((30, 20), Image.Resampling.BICUBIC, box)).transpose(2, 0, 1)
        ours = image_folder.read_image(file, (20, 30), crop, draw).numpy()
        difference = np.abs(ours - oracle.astype(float)).mean()
        assert difference < (3 if suffix == "jpg" else 0.1), f"turned or squeezed, box {box}"


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_exif_orientation_that_does_not_exist_changes_nothing(orientation, tmp_path):
    exif, image = Image.Exif(), photograph(pixels(3, 16, 32))
    exif[274] = orientation
    odd, plain = save_image(image, tmp_path / "odd.png", exif=exif), save_image(image, tmp_path / "plain.png")
    assert torch.equal(
        image_folder.read_image(odd, (8, 8), None, None), image_folder.read_image(plain, (8, 8), None, None)
    )


@pytest.mark.parametrize("side", [32, 100, 220, 400])
@pytest.mark.parametrize("crop", [None, (0.1, 0.1)])
def test_a_jpeg_decoded_at_a_fraction_looks_as_decoded_in_full(side, crop, tmp_path):
    """Decoding at 1/2, 1/4 or 1/8 is only right as long as the crop has more pixels than the result."""
    with Image.open(skimage_folder() / "astronaut.png") as image:  # 512 x 512
        file = save_image(image.convert("RGB"), tmp_path / "image.jpg", quality=95)
    box = (32, 32, 480, 480)
    if crop:
        box = (105, 35, 267, 197)  # a tenth of the area is 162 x 162, and there are 351 places each way
    with Image.open(file) as image:
        oracle = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box)).transpose(2, 0, 1)
    ours = image_folder.read_image(file, (side, side), crop, crop_draw(0.9, 0.5, 0.5, 0.1, 0.3)).numpy()
    assert np.abs(ours - oracle.astype(float)).mean() < 3


@pytest.mark.parametrize("size", [(1, 1), (300, 1), (1, 300)])
def test_a_very_narrow_image_can_be_cropped(size, tmp_path):
    file = save_image(Image.new("RGB", size, (10, 20, 30)), tmp_path / "image.png")
    for crop, draw in ((None, None), ((0.08, 1.0), crop_draw(0.9, 0.0, JUST_BELOW_1, JUST_BELOW_1, 0.0))):
        ours = image_folder.read_image(file, (4, 6), crop, draw)
        equal(ours, np.broadcast_to([[[10]], [[20]], [[30]]], (3, 4, 6)))


@pytest.mark.parametrize("size", [(40, 80), (80, 40), (60, 60)])
def test_nothing_is_squeezed_whatever_the_shape(size, tmp_path):
    """Red grows by the row, green by the column, both by one level a pixel: a training crop changes their ratio by at
    most 4/3 either way, from 1; a test crop keeps it. The aspect of a crop is relative to that of what it becomes."""
    ramp = np.zeros((200, 240, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(200)[:, None], np.arange(240)
    file = save_image(Image.fromarray(ramp), tmp_path / "image.png")

    def stretch(crop, draw):
        red, green, _ = image_folder.read_image(file, size, crop, draw).float()
        return float(
            (red[-5].mean() - red[5].mean()) / (size[0] - 10) * (size[1] - 10) / (green[:, -5] - green[:, 5]).mean()
        )

    assert stretch(None, None) == pytest.approx(1, abs=0.03)
    for draw, ratio in ((0.0, 4 / 3), (0.5, 1), (JUST_BELOW_1, 3 / 4)):
        ours = stretch((0.2, 0.2), crop_draw(0.9, 0.5, draw, 0.5, 0.5))
        assert ours == pytest.approx(ratio, rel=0.05)


@pytest.mark.parametrize(("side", "share"), [(32, 7 / 8), (224, 7 / 8), (256, 1.0)])
def test_above_224_pixels_a_test_sees_all_of_the_short_side(side, share, tmp_path):
    """As in MAE's code for fine-tuning at a higher resolution."""
    file = save_image(photograph(pixels(3, 40, 30)), tmp_path / "ant" / "1.png")
    split = image_folder.Folder(tmp_path, *PLAIN)
    [(image, _)] = split.test_batches((side, side), 1, CPU)
    assert torch.equal(image[0].byte(), image_folder.read_image(file, (side, side), None, None, crop_pct=share))


# ---------------------------------------------------------------------------------------------
# RandAugment
# ---------------------------------------------------------------------------------------------


def test_randaugment_applies_two_operations_each_with_probability_one_half(monkeypatch):
    """RandAugment (Cubuk et al. 2020) with the strength N(9, 1/2) of 10, cut to 0-10; both signs alike."""
    calls = []
    spies = [
        lambda image, s, sign, k=k: calls.append((k, s, sign)) or image for k in range(len(image_folder.OPERATIONS))
    ]
    monkeypatch.setattr(image_folder, "OPERATIONS", spies)
    rng, image, counts = random.Random(0), Image.new("RGB", (4, 4)), []
    for _ in range(4000):
        before = len(calls)
        assert image_folder.randaugment(image, 9.0, rng) is image
        counts.append(len(calls) - before)
    for count, share in ((0, 1 / 4), (1, 1 / 2), (2, 1 / 4)):
        assert counts.count(count) / 4000 == pytest.approx(share, abs=0.03)
    which, strength, sign = np.array(calls).T
    assert np.bincount(which.astype(int), minlength=len(spies)) == pytest.approx(len(calls) / len(spies), rel=0.25)
    assert strength.max() == 1
    assert np.median(strength) == pytest.approx(0.9, abs=0.005)
    assert np.percentile(strength, 16) == pytest.approx(0.85, abs=0.005)  # one standard deviation below
    assert set(sign) == {-1, 1}
    assert sign.mean() == pytest.approx(0, abs=0.05)
    calls.clear()
    for _ in range(100):
        image_folder.randaugment(image, 0.0, rng)
    assert min(s for _, s, _ in calls) == 0, "a strength below 0 is 0"


def test_randaugment_is_a_function_of_the_draw_in_training_only(tmp_path):
    """So that a resumed run, and a process that holds part of a batch, see the same."""
    file, draws = save_image(photograph(pixels(3, 20, 24)), tmp_path / "image.png"), uniform(20, 23).tolist()
    first = [image_folder.read_image(file, (16, 16), (0.2, 1.0), draw, 9.0) for draw in draws]
    random.seed(0)
    again = [image_folder.read_image(file, (16, 16), (0.2, 1.0), draw, 9.0) for draw in draws]
    plain = [image_folder.read_image(file, (16, 16), (0.2, 1.0), draw) for draw in draws]
    assert all(map(torch.equal, first, again))
    assert {(image.dtype, image.shape) for image in first} == {(torch.uint8, (3, 16, 16))}
    assert 10 <= sum(not torch.equal(a, b) for a, b in zip(first, plain, strict=True)) < 20
    tested = [image_folder.read_image(file, (16, 16), None, None, magnitude) for magnitude in (0.0, 9.0)]
    assert torch.equal(*tested)


def test_a_folder_hands_its_randaugment_to_training_images(tmp_path):
    """Without a crop, as a linear probe trains, they are the test's."""
    split = folder_of(pixels(1, 3, 20, 24), tmp_path)
    split.randaugment, file, draws = 9.0, tmp_path / "00" / "image.png", uniform(8, 23).tolist()
    images, labels, unreadable = split[[[0]] * 8, (16, 16), (0.2, 1.0), draws]
    for image, draw in zip(images, draws, strict=True):
        assert torch.equal(image, image_folder.read_image(file, (16, 16), (0.2, 1.0), draw, magnitude=9.0))
    assert (labels.tolist(), unreadable) == ([0] * 8, [])
    images, *_ = split[[[0]], (16, 16), None, draws[:1]]
    assert torch.equal(images[0], image_folder.read_image(file, (16, 16), None, None))


def luma(pixel):
    return (0.299 * pixel[..., 0] + 0.587 * pixel[..., 1] + 0.114 * pixel[..., 2])[..., None]


def sharper(i, factor):
    """Away from an image smoothed by [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13; the border stays."""
    smooth = i.copy()
    for y, x in np.ndindex(i.shape[0] - 2, i.shape[1] - 2):
        smooth[y + 1, x + 1] = (i[y : y + 3, x : x + 3].sum(axis=(0, 1)) + 4 * i[y + 1, x + 1]) / 13
    return smooth + factor * (i - smooth)


COLOUR_OPERATIONS = {  # place in OPERATIONS, strength, sign, and the operation by hand
    "autocontrast": (0, 0.5, 1, lambda i: (i - i.min((0, 1))) * 255 / (i.max((0, 1)) - i.min((0, 1)))),
    "invert": (2, 0.5, 1, lambda i: 255 - i),
    "posterize to 4 bits": (3, 0.0, 1, lambda i: i // 16 * 16),
    "posterize to 2 bits": (3, 0.5, 1, lambda i: i // 64 * 64),
    "posterize to 1 bit": (3, 1.0, 1, lambda i: i // 128 * 128),
    "solarize the upper half": (4, 0.5, 1, lambda i: np.where(i >= 128, 255 - i, i)),
    "more colour": (5, 0.5, 1, lambda i: luma(i) + 1.45 * (i - luma(i))),
    "less colour": (5, 1.0, -1, lambda i: luma(i) + 0.1 * (i - luma(i))),
    "more contrast": (6, 0.5, 1, lambda i: luma(i).mean() + 1.45 * (i - luma(i).mean())),
    "less contrast": (6, 1.0, -1, lambda i: luma(i).mean() + 0.1 * (i - luma(i).mean())),
    "brighter": (7, 0.5, 1, lambda i: 1.45 * i),
    "darker": (7, 1.0, -1, lambda i: 0.1 * i),
    "solarize add": (14, 0.5, 1, lambda i: np.where(i < 128, i + 55, i)),
    "sharper": (8, 0.5, 1, lambda i: sharper(i, 1.45)),
    "smoother": (8, 1.0, -1, lambda i: sharper(i, 0.1)),
}


@pytest.mark.parametrize("name", COLOUR_OPERATIONS)
def test_colour_operations_of_randaugment_are_as_by_hand(name):
    k, strength, sign, by_hand = COLOUR_OPERATIONS[name]
    image = pixels(10, 20, 3) // 2 + 40
    ours = image_folder.OPERATIONS[k](Image.fromarray(image.numpy()), strength, sign)
    equal(torch.from_numpy(np.array(ours)), by_hand(image.numpy().astype(float)).clip(0, 255), atol=2)


def test_equalize_makes_every_level_as_frequent_as_the_others():
    dark = Image.fromarray((uniform(64, 64, 3).numpy() ** 2 * 200).astype(np.uint8))
    for level in np.asarray(image_folder.OPERATIONS[1](dark, 0.5, 1)).reshape(-1, 3).T:
        np.testing.assert_allclose(np.sort(level), np.linspace(0, 255, 64 * 64), atol=20)


def turned(x, y, angle, W=24, H=16):
    """Where a picture that is turned around its middle, against the clock, has the point (x, y) from."""
    x, y, a = x - W / 2, y - H / 2, math.radians(angle)
    return math.cos(a) * x - math.sin(a) * y + W / 2, math.sin(a) * x + math.cos(a) * y + H / 2


MOVES = {  # place in OPERATIONS, and where the point (x, y) of 24 x 16 pixels comes from; t: the strength with its sign
    "rotate by up to 30 degrees": (9, lambda x, y, t: turned(x, y, 30 * t)),
    "shear rows by up to 0.3": (10, lambda x, y, t: (x + 0.3 * t * y, y)),
    "shear columns by up to 0.3": (11, lambda x, y, t: (x, y + 0.3 * t * x)),
    "shift by up to 0.45 of the width": (12, lambda x, y, t: (x + 0.45 * t * 24, y)),
    "shift by up to 0.45 of the height": (13, lambda x, y, t: (x, y + 0.45 * t * 16)),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize(("strength", "sign"), [(1.0, 1), (1.0, -1), (0.5, 1)])
def test_moves_of_randaugment_take_pixels_from_the_right_place(name, strength, sign):
    """Red grows by the column, green by the row, so that colours tell the place. What comes
    from outside is ImageNet's mean."""
    k, source = MOVES[name]
    image, outside = np.zeros((16, 24, 3), np.uint8), 0
    image[..., 0], image[..., 1] = np.arange(24) * 10, np.arange(16)[:, None] * 10
    ours = np.asarray(image_folder.OPERATIONS[k](Image.fromarray(image), strength, sign)).astype(float)
    for i, j in np.ndindex(16, 24):
        x, y = source(j + 0.5, i + 0.5, strength * sign)  # pixel centres
        if 2 < x < 22 and 2 < y < 14:
            assert ours[i, j] == pytest.approx([10 * (x - 0.5), 10 * (y - 0.5), 0], abs=2.5), (i, j)
        elif not (-0.1 < x < 24.1 and -0.1 < y < 16.1):
            assert tuple(ours[i, j]) == (124, 116, 104), (i, j)
            outside += 1
    assert outside > 0, "the test leaves no border"


@pytest.mark.parametrize("k", range(4, 14))
def test_operations_of_randaugment_at_strength_0_change_nothing(k):
    image = Image.fromarray(pixels(10, 20, 3).numpy())
    for sign in (-1, 1):
        assert (np.asarray(image_folder.OPERATIONS[k](image, 0.0, sign)) == np.asarray(image)).all()


# ---------------------------------------------------------------------------------------------
# Images that can't be decoded
# ---------------------------------------------------------------------------------------------


def broken(kind, path):
    """Write a file that has the name of an image but can't be decoded."""
    if kind == "truncated":
        file = save_image(photograph(pixels(3, 64, 64)), path.with_suffix(".jpg"))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif kind == "corrupt":
        file = save_image(photograph(pixels(3, 64, 64)), path.with_suffix(".png"))
        content = bytearray(file.read_bytes())
        content[100:200] = bytes(100)
        file.write_bytes(content)
    else:
        file = path.with_suffix(".png" if kind == "empty" else ".jpg")
        file.write_bytes(b"" if kind == "empty" else b"This is a text.\n")
    return file


def coloured_folder(path, n):
    """n images in four classes; class c has the colour 50 (c + 1)."""
    for i in range(n):
        save_image(Image.new("RGB", (8, 8), (50 * (i % 4 + 1),) * 3), path / "abcd"[i % 4] / f"{i:03}.png")


@pytest.mark.parametrize("kind", ["truncated", "corrupt", "empty", "text"])
def test_an_unreadable_image_is_skipped_with_one_warning(kind, tmp_path, capfd):
    """In training another of its batch stands in, with its label; in a test its label is -1, so that nobody counts it.

    One of twenty, exactly 5 %, is not yet too many, however often it is met.
    """
    coloured_folder(tmp_path, 20)
    (tmp_path / "b" / "005.png").unlink()
    bad = str(broken(kind, tmp_path / "b" / "005"))
    split = image_folder.Folder(tmp_path, *PLAIN)
    place = split.files.tolist().index(os.fsencode(bad))
    expected = [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5

    batches = list(split.test_batches((4, 4), 8, CPU))
    images, labels = (torch.cat(values) for values in zip(*batches, strict=True))
    assert labels.tolist() == expected[:place] + [-1] + expected[place + 1 :]
    equal(images[:, 0, 0, 0], [0 if i == place else 50 * (label + 1) for i, label in enumerate(expected)], atol=1e-3)

    for step, (images, labels) in enumerate(split.train_batches((4, 4), 10, range(6), 0, (0.2, 1.0), CPU)):
        equal(images, (50 * (labels[:, None, None, None] + 1)).expand(-1, 3, 4, 4).numpy(), "another's label", 1e-3)
        order = data.batch_indices(20, 10, step, 0).tolist()
        for index, label in zip(order, labels.tolist(), strict=True):
            assert label in [expected[i] for i in order] if index == place else label == expected[index]

    assert list(split.unreadable) == [bad]
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(warnings) == 1, warnings
    assert bad in warnings[0]
    assert split.unreadable[bad] in warnings[0]


def test_more_than_five_percent_of_unreadable_images_are_refused(tmp_path, capfd):
    """40 images: 2 are let pass, 3 are not."""
    coloured_folder(tmp_path, 38)
    bad = [str(broken("empty", tmp_path / "a" / f"bad{i}")) for i in range(2)]
    split = image_folder.Folder(tmp_path, *PLAIN)
    assert len(list(split.test_batches((4, 4), 8, CPU))) == 5
    assert sorted(split.unreadable) == bad
    (tmp_path / "a" / "000.png").write_bytes(b"")
    for run in ("test", "train"):
        split = image_folder.Folder(tmp_path, *PLAIN)
        with refusal("3 of 40", "5 %", tmp_path, error=image_folder.UnreadableImages):
            if run == "test":
                list(split.test_batches((4, 4), 8, CPU))
            else:
                list(split.train_batches((4, 4), 8, range(10), 0, (0.2, 1.0), CPU))
        assert len(split.unreadable) == 3
    assert issubclass(image_folder.UnreadableImages, ValueError)
    with refusal("4 of 40", "the last is another.png (said another process);", error=image_folder.UnreadableImages):
        split.skip({"another.png": "said another process"})
    capfd.readouterr()


def test_what_stands_in_for_an_unreadable_image_is_the_same_for_any_number_of_processes(tmp_path, capfd):
    """The next of the whole batch, or of the next batches, that can be decoded, with its label and the crop of the bad
    one. Bad are the last of the first process's half, the two that follow it, and the last of the batch."""
    folder_of(pixels(80, 3, 12, 10), tmp_path)
    split, B = image_folder.Folder(tmp_path, *PLAIN), 6
    order = data.batch_indices(80, 80, 0, seed=0).tolist()
    bad = {order[2], order[3], order[4], order[11]}
    for index in bad:
        Path(os.fsdecode(split.files[index])).write_bytes(b"no image")

    def train(shard=slice(None)):
        split = image_folder.Folder(tmp_path, *PLAIN)
        return list(split.train_batches((8, 6), B, range(2), 0, (0.2, 1.0), CPU, shard))

    whole = train()
    for step, (images, labels) in enumerate(whole):
        draws = data.draw_crops(B, 0, step)
        for place in range(B):
            index = next(i for i in order[B * step + place :] if i not in bad)
            assert labels[place] == index, "another image, or another's label"
            oracle = image_folder.read_image(os.fsdecode(split.files[index]), (8, 6), (0.2, 1.0), draws[place])
            equal(images[place], oracle.numpy(), "another crop", atol=1e-3)
    for shard in (slice(0, 3), slice(3, 6), slice(1, None, 3)):
        assert same(train(shard), [(images[shard], labels[shard]) for images, labels in whole]), shard
    capfd.readouterr()


def test_a_batch_of_one_goes_on_after_an_unreadable_image(tmp_path, capfd):
    """As a process among many may hold. A batch never has the label -1, which would fail far from the cause."""
    coloured_folder(tmp_path, 20)
    (tmp_path / "b" / "005.png").write_bytes(b"")
    split = image_folder.Folder(tmp_path, *PLAIN)
    seen = [labels.item() for _, labels in split.train_batches((4, 4), 1, range(20), 0, (0.2, 1.0), CPU)]
    assert min(seen) >= 0
    assert list(split.unreadable) == [str(tmp_path / "b" / "005.png")]
    capfd.readouterr()


def test_a_folder_in_which_nothing_can_be_decoded_is_refused(tmp_path, monkeypatch, capfd):
    """At once: each file is tried once for each request. And the last word is not that of a library."""
    for i in range(200):
        (tmp_path / "ant").mkdir(exist_ok=True)
        (tmp_path / "ant" / f"{i}.png").write_bytes(b"")
    split = image_folder.Folder(tmp_path, *PLAIN)
    with refusal("of 200", "5 %", error=image_folder.UnreadableImages):
        next(split.train_batches((4, 4), 4, range(20), 0, (0.2, 1.0), CPU))
    monkeypatch.setattr(split, "skip", lambda unreadable: None)  # as in a set so large that 65 are not 5 %
    with refusal("65 images in a row", "repair or remove", error=image_folder.UnreadableImages):
        next(split.train_batches((4, 4), 4, range(20), 0, (0.2, 1.0), CPU))
    capfd.readouterr()


@pytest.mark.parametrize("suffix", ["jpg", "png", "eps", "tiff"])
def test_a_file_can_not_start_a_program(suffix, tmp_path, monkeypatch):
    """PostScript by any name: Pillow hands it to Ghostscript, an interpreter."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: started.append(args) or Image.new("RGB", (8, 8)))
    file = tmp_path / f"image.{suffix}"
    Image.new("RGB", (8, 8)).save(file, "EPS")
    with pytest.raises(Image.UnidentifiedImageError):
        image_folder.read_image(file, (8, 8), None, None)
    assert not started


@pytest.mark.parametrize("kind", ["PCX", "TGA", "ICO", "PDF", "SGI", "DDS", "MSP"])
def test_formats_that_are_not_listed_are_not_read(kind, tmp_path):
    """Whatever Pillow knows besides, by whatever name."""
    file, image = tmp_path / "image.png", Image.new("1" if kind == "MSP" else "RGB", (16, 16))
    image.save(file, kind)
    with pytest.raises(Image.UnidentifiedImageError):
        image_folder.read_image(file, (8, 8), None, None)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_an_image_that_claims_an_absurd_size_is_refused(side, tmp_path):
    """A PNG of 100 bytes whose header says 100 million pixels, or 3.6 billion."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    png = bytearray(content.getvalue())
    png[16:24] = struct.pack(">II", side, side)  # width and height in the first chunk, IHDR, and its CRC
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    file = tmp_path / "big.png"
    file.write_bytes(png)
    with pytest.raises((ValueError, Image.DecompressionBombError), match=f"{side}x{side}|{side**2} pixels"):
        image_folder.read_image(file, (8, 8), None, None)
    folder_with(tmp_path / "data", *(f"ant/{i}.png" for i in range(19)))
    file.rename(tmp_path / "data" / "ant" / "big.png")
    split = image_folder.Folder(tmp_path / "data", *PLAIN)
    list(split.test_batches((8, 8), 8, CPU))
    assert [Path(name).name for name in split.unreadable] == ["big.png"]
    assert "pixels" in split.unreadable[str(tmp_path / "data" / "ant" / "big.png")]


# ---------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------


def seconds(work):
    """Processor time: another program on this machine does not count."""
    start = time.process_time()
    work()
    return time.process_time() - start


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("crop", [None, (0.2, 1.0)])
def test_speed_of_decoding_is_that_of_pillow_or_better(crop, one_thread, tmp_path):
    """JPEGs of 500 x 375 to 224 x 224, against Pillow's open, convert and resize of the whole image."""
    with Image.open(skimage_folder() / "coffee.png") as image:
        image = image.convert("RGB").resize((500, 375))
    files = [save_image(image.rotate(i), tmp_path / f"{i}.jpg", quality=90) for i in range(20)]
    draws = uniform(20, 23).tolist()

    def pillow():
        for file in files:
            with Image.open(file) as image:
                image.convert("RGB").resize((224, 224))

    def ours():
        for file, draw in zip(files, draws, strict=True):
            image_folder.read_image(file, (224, 224), crop, draw)

    times = [(seconds(pillow), seconds(ours)) for _ in range(21)]  # one after the other: both meet the same noise
    theirs, mine = (statistics.median(column) for column in zip(*times, strict=True))
    assert theirs / mine >= 0.9, f"{mine / 20 * 1e3:.2f} ms an image, Pillow {theirs / 20 * 1e3:.2f} ms"


@pytest.mark.parametrize("side", [29, 232])
def test_a_whole_image_is_read_whatever_its_height(tmp_path, side):
    """Of height * side / side rounding may make more than height, by 1e-15, and Pillow refuses a box outside of it."""
    for height in range(30, 130):
        Image.new("RGB", (height + 10, height), (10, 200, 30)).save(tmp_path / "image.bmp")
        image = image_folder.read_image(tmp_path / "image.bmp", (side, side), None, None, crop_pct=1.0)
        assert (image == torch.tensor([10, 200, 30]).view(3, 1, 1)).all(), height
