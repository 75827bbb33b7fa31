"""The data that ViT transfers to. None of it can be had here: small made-up copies have the official layout.

Names, folders, numbering and formats are those that the authors describe: README of Oxford-IIIT Pet's annotations, the
page of Oxford 102 Flower, README of reassessed-imagenet, and NOAH's get_vtab1k.py, which writes the public VTAB-1k.
"""

import csv
import functools
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

import data
import vit
from downstream import probes
from engine import distributed, transfer
from tests.engine.runs import MICRO, checkpoint, one_line, record_steps, run
from tests.engine.site import serve

# Copied from torchvision's datasets/oxford_iiit_pet.py and flowers102.py; the last one is real.json's own at commit
# bcd006f of google-research/reassessed-imagenet.
OFFICIAL = {
    "https://www.robots.ox.ac.uk/~vgg/data/pets/data/annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f",
    "https://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
    "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/imagelabels.mat": "e0620be6f572b9609742df49c70aed4d",
    "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c",
    "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz": "52808999861908f626f3c1f4e79d11fa",
    "https://raw.githubusercontent.com/google-research/reassessed-imagenet/master/real.json": (
        "c03b536b209b127cb61430fd1ce950d5"
    ),
}


@functools.cache
def picture(value, size=(12, 10), kind="JPEG"):
    """A file of one grey: its bytes."""
    content = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(content, kind)
    return content.getvalue()


def archive(members):
    """A .tar.gz: its bytes."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz", compresslevel=1) as tar:
        for name, value in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(value)
            tar.addfile(member, io.BytesIO(value))
    return content.getvalue()


def mat(**values):
    content = io.BytesIO()
    scipy.io.savemat(content, {name: np.array([v], np.uint16) for name, v in values.items()})
    return content.getvalue()


def refusal(*words):
    """One line that has all these words."""
    ahead = "".join(f"(?=[^\n]*{re.escape(str(word))})" for word in words)
    return pytest.raises(ValueError, match=f"^{ahead}[^\n]*$")


# ---------------------------------------------------------------------------------------------
# Oxford
# ---------------------------------------------------------------------------------------------

# Cats are written with a capital; class numbers are alphabetical without regard to that.
BREEDS = sorted([f"Cat_{chr(97 + i)}" for i in range(12)] + [f"dog_{chr(97 + i)}" for i in range(25)], key=str.lower)
PETS = {  # one of each class in each list; in the archive there are more
    split: [(f"{name}_{n}", number) for number, name in enumerate(BREEDS, 1) for n in numbers]
    for split, numbers in (("trainval", (3,)), ("test", (20,)))
}


def grey(image):
    """The grey of a made-up image: another one for its neighbours."""
    return sum(map(ord, image)) * 7 % 200


def pets_files(**changed):
    lists = {
        f"annotations/{split}.txt": "".join(f"{image} {number} 1 1\n" for image, number in rows).encode()
        for split, rows in PETS.items()
    }
    annotations = {"annotations/README": b"", "annotations/list.txt": b"#Image CLASS-ID SPECIES BREED ID\n"} | lists
    annotations |= {"annotations/trimaps/Cat_a_1.png": b"a mask"} | changed
    images = {f"images/{image}.jpg": picture(grey(image)) for rows in PETS.values() for image, _ in rows}
    images |= {"images/Cat_a_2.mat": b"no image", "images/Cat_a_9.jpg": picture(0), "elsewhere/Cat_a_1.jpg": b""}
    return {"annotations.tar.gz": archive(annotations), "images.tar.gz": archive(images)}


LABELS = [1 + (n * 7) % 102 for n in range(120)]  # of image_00001 to image_00120
SETS = dict(trnid=range(102, 40, -1), valid=range(1, 41), tstid=range(105, 118))


def flowers_files(labels=LABELS, **sets):
    images = {f"jpg/image_{n:05d}.jpg": picture(2 * n) for n in range(1, 1 + len(LABELS))}
    return {
        "imagelabels.mat": mat(labels=labels),
        "setid.mat": mat(**{name: list(numbers) for name, numbers in (SETS | sets).items()}),
        "102flowers.tgz": archive(images),
    }


FILES = {"oxford-pets": pets_files, "oxford-flowers": flowers_files}
IMAGES = {"oxford-pets": ("images", "images.tar.gz"), "oxford-flowers": ("jpg", "102flowers.tgz")}


def write(folder, contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def look_at(split):
    """The labels of a split, and the grey of each image, in order."""
    split.workers = 0
    batches = list(split.test_batches((8, 8), 64, torch.device("cpu")))
    images = torch.cat([images for images, _ in batches])
    shown = images.mean(dim=(2, 3)) * torch.tensor(split.std) + torch.tensor(split.mean)  # (n, 3)
    return torch.cat([labels for _, labels in batches]).tolist(), (255 * shown.mean(dim=1)).tolist()


def test_pets_are_those_of_the_two_lists_with_classes_numbered_from_1(tmp_path):
    """A line of trainval.txt: Image CLASS-ID SPECIES BREED-ID. Its name without the number is that of the class."""
    write(tmp_path / "oxford-pets", pets_files())
    pets = data.load("oxford-pets", data_dir=tmp_path)
    assert (pets.name, pets.classes) == ("oxford-pets", BREEDS)
    assert (pets.mean, pets.std) == (data.IMAGENET_MEAN, data.IMAGENET_STD)
    for split, rows in ((pets.train, PETS["trainval"]), (pets.test, PETS["test"])):
        labels, greys = look_at(split)
        assert labels == [number - 1 for _, number in rows]
        assert greys == pytest.approx([grey(image) for image, _ in rows], abs=3)
    there = sorted(path.name for path in (tmp_path / "oxford-pets" / "images").iterdir())
    assert there == sorted(f"{image}.jpg" for rows in PETS.values() for image, _ in rows), "nothing else is written"
    assert {path.name for path in tmp_path.iterdir()} == {"oxford-pets"}


def test_flowers_train_with_the_official_training_and_validation_images(tmp_path):
    """setid.mat numbers images from 1, imagelabels.mat has a label from 1 for each; there are 2,040 and 6,149."""
    write(tmp_path / "oxford-flowers", flowers_files())
    flowers = data.load("oxford-flowers", data_dir=tmp_path)
    assert (flowers.classes[0], flowers.classes[-1], len(flowers.classes)) == ("flower 1", "flower 102", 102)
    for split, numbers in (
        (flowers.train, [*SETS["trnid"], *SETS["valid"]]),
        (flowers.test, SETS["tstid"]),
    ):
        labels, greys = look_at(split)
        assert labels == [LABELS[number - 1] - 1 for number in numbers]
        assert greys == pytest.approx([2 * number for number in numbers], abs=3)


@pytest.mark.parametrize("name", [*FILES, "imagenet-real"])
def test_each_file_comes_from_its_official_site_with_its_checksum(name, tmp_path, monkeypatch):
    """And lies in a folder of the data set's name; a second time nothing is asked for."""
    asked, contents = {}, (FILES | {"imagenet-real": lambda: {"real.json": b""}})[name]()

    def download(url, path, checksum=None, check=None):
        if not path.exists():
            asked[url] = checksum
            write(path.parent, {path.name: contents[path.name]})
        return path

    monkeypatch.setattr(data.files, "download", download)
    if name == "imagenet-real":
        data.fetch(tmp_path / name, "real.json", transfer.REAL_URL, transfer.REAL_MD5)
        where = "reassessed"
    else:
        first = data.load(name, data_dir=tmp_path)
        where = {"oxford-pets": "/pets/", "oxford-flowers": "/flowers/"}[name]
        archive_of = tmp_path / name / IMAGES[name][1]
        archive_of.unlink()  # it is unpacked, and not needed any more
        assert (data.load(name, data_dir=tmp_path).test.files == first.test.files).all()
    assert asked == {url: f"md5:{md5}" for url, md5 in OFFICIAL.items() if where in url}
    assert {path.name for path in tmp_path.iterdir()} == {name}


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_a_wrong_checksum_is_not_kept(name, tmp_path, monkeypatch, capsys):
    """The made-up archives have another one than the official ones: a real download, from a site of this machine."""
    with serve() as site:
        where = {"oxford-pets": "PETS_URL", "oxford-flowers": "FLOWERS_URL"}[name]
        monkeypatch.setattr(transfer, where, f"{site.url}/")
        site.pages = {f"/{file}": content for file, content in FILES[name]().items()}
        with refusal(site.url, "checksum", "not kept", "try again"):
            data.load(name, data_dir=tmp_path)
    assert not [path for path in (tmp_path / name).iterdir() if path.suffix != ".lock" and path.name != ".lock"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["half", "overwritten", "empty", "one image less"])
def test_a_damaged_archive_of_images_leaves_nothing_behind(name, damage, tmp_path):
    """Half of one is what a download that was broken off leaves, if another program made it."""
    contents, (below, file) = FILES[name](), IMAGES[name]
    whole = contents[file]
    if damage == "one image less":
        with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        del members["images/dog_a_3.jpg" if name == "oxford-pets" else "jpg/image_00007.jpg"]
        contents[file] = archive(members)
    else:
        contents[file] = {"half": whole[: len(whole) // 2], "overwritten": b"x" * len(whole), "empty": b""}[damage]
    write(tmp_path / name, contents)
    missing = {"oxford-pets": "images/dog_a_3.jpg", "oxford-flowers": "jpg/image_00007.jpg"}
    with refusal(tmp_path / name / file, "damaged", missing[name] if "less" in damage else "", "delete it"):
        data.load(name, data_dir=tmp_path)
    assert not (tmp_path / name / below).exists()
    write(tmp_path / name, {file: whole})
    assert len(data.load(name, data_dir=tmp_path).classes) in (37, 102)


@pytest.mark.parametrize("name", ["oxford-pet", "oxford-flowers-102", "oxford-pets:PATH", "vtab", "imagenet-real"])
def test_a_name_that_is_nearly_one_of_these_is_refused(name):
    with refusal(f"unknown data '{name}'", "did you mean", "oxford-pets, oxford-flowers"):
        data.load(name)


def test_what_a_process_that_was_killed_has_unpacked_is_not_used(tmp_path):
    folder = tmp_path / "oxford-pets"
    write(folder, pets_files())
    write(folder / "images.part", {"Cat_a_1.jpg": b"half", "other.jpg": b""})
    pets = data.load("oxford-pets", data_dir=tmp_path)
    assert look_at(pets.train)[1] == pytest.approx([grey(image) for image, _ in PETS["trainval"]], abs=3)
    assert not (folder / "images" / "other.jpg").exists()
    assert not (folder / "images.part").exists()


def test_an_image_that_was_removed_is_named(tmp_path):
    write(tmp_path / "oxford-pets", pets_files())
    data.load("oxford-pets", data_dir=tmp_path)
    (tmp_path / "oxford-pets" / "images" / "dog_b_3.jpg").unlink()
    with refusal("1 of 37 images", "dog_b_3.jpg", "delete the folder of images"):
        data.load("oxford-pets", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"Cat_a_1 1 1 1\n", ["37 classes each"]),
        (b"Cat_a_1 one 1 1\n", ["damaged"]),
        (b"Cat_a_1\n", ["damaged"]),
        (b"\xff\xfe\n", ["damaged"]),
        ("".join(f"{image} {number - 1} 1 1\n" for image, number in PETS["trainval"]).encode(), ["37 classes each"]),
        (
            "".join(f"{image} {1 + number % 37} 1 1\n" for image, number in PETS["trainval"]).encode(),
            ["37 classes each"],
        ),
        (None, ["damaged"]),
    ],
)
def test_lists_of_pets_that_are_not_the_official_ones_are_refused(text, words, tmp_path):
    """Classes missing; no number; no class; no text; numbered from 0; other numbers in one list; no list at all."""
    contents = pets_files(**{"annotations/trainval.txt": text or b""})
    if text is None:
        contents["annotations.tar.gz"] = archive({"annotations/README": b""})
    write(tmp_path / "oxford-pets", contents)
    with refusal(tmp_path / "oxford-pets" / "annotations.tar.gz", "damaged", *words, "delete it"):
        data.load("oxford-pets", data_dir=tmp_path)
    assert not (tmp_path / "oxford-pets" / "images").exists(), "that is found before all is unpacked"


@pytest.mark.parametrize(
    ("changed", "file", "words"),
    [
        (dict(labels=[0, *LABELS[1:]]), "imagelabels.mat", ["0 to 102"]),
        (dict(labels=[*LABELS[:-1], 103]), "imagelabels.mat", ["1 to 103"]),
        (dict(labels=[1] * 120), "imagelabels.mat", ["1 to 1"]),
        (dict(tstid=[121]), "setid.mat", ["121", "120"]),
        (dict(trnid=[102]), "setid.mat", ["without an image"]),
        (dict(tstid=[0]), "setid.mat", ["numbers images"]),
        (dict(tstid=[]), "setid.mat", ["tstid"]),
    ],
)
def test_lists_of_flowers_that_are_not_the_official_ones_are_refused(changed, file, words, tmp_path):
    write(tmp_path / "oxford-flowers", flowers_files(**changed))
    with refusal(tmp_path / "oxford-flowers" / file, "damaged", *words, "delete it"):
        data.load("oxford-flowers", data_dir=tmp_path)


@pytest.mark.parametrize("content", [b"", b"x" * 400, mat(other=[1]), mat(labels=LABELS)[:-40]])
@pytest.mark.parametrize("file", ["imagelabels.mat", "setid.mat"])
def test_a_mat_file_that_is_none_or_has_other_names_is_refused(file, content, tmp_path):
    write(tmp_path / "oxford-flowers", flowers_files() | {file: content})
    with refusal(tmp_path / "oxford-flowers" / file, "damaged", "delete it"):
        data.load("oxford-flowers", data_dir=tmp_path)


# ---------------------------------------------------------------------------------------------
# ReaL
# ---------------------------------------------------------------------------------------------

WNIDS = [f"n{1440764 + 37 * i:08d}" for i in range(1000)]
NUMBERS = [(i * 7919) % 50_000 + 1 for i in range(1000)]  # of the validation image of each class


def reassessed():
    """Labels as real.json has them: none for every tenth image, the own one for most, others beside it or alone."""
    real = [[] for _ in range(50_000)]
    for label, number in enumerate(NUMBERS):
        kinds = [[], [label], [label, (label + 5) % 1000], [(label + 5) % 1000], [(label + 9) % 1000, label]]
        real[number - 1] = kinds[(0, 1, 2, 3, 4, 1, 1, 2, 4, 1)[label % 10]]
    return real


REASSESSED = reassessed()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """ImageNet's thousand classes with an image each in train and val, in the official names; and real.json."""
    folder = tmp_path_factory.mktemp("imagenet")
    (folder / "image").write_bytes(picture(100))
    for label, wnid in enumerate(WNIDS):
        for split, name in (("train", f"{wnid}_1.JPEG"), ("val", f"ILSVRC2012_val_{NUMBERS[label]:08d}.JPEG")):
            (folder / split / wnid).mkdir(parents=True)
            (folder / split / wnid / name).hardlink_to(folder / "image")
    write(folder / "imagenet-real", {"real.json": json.dumps(REASSESSED).encode()})
    return folder


@pytest.fixture(scope="module")
def real(imagenet):
    """Both, as a data set."""
    real = data.load(f"imagenet-real:{imagenet}", data_dir=imagenet)
    real.test.workers = 0
    return real


class Says(torch.nn.Module):
    """A classifier whose i-th answer is the i-th of `answers`, whatever the image."""

    def __init__(self, answers):
        super().__init__()
        self.answers = iter(answers)

    def forward(self, images):
        answers = torch.tensor([next(self.answers) for _ in images])
        return torch.nn.functional.one_hot(answers, 1000).float()


def test_an_image_is_right_if_the_class_is_among_its_labels(real):
    """reassessed-imagenet's README: mean of [pred in real_labels[i] for images that have any], in the numbers of the
    sorted file names. The own labels are scored beside that, on all images."""
    assert (real.name, real.classes, len(real.train), len(real.test)) == ("imagenet-real", WNIDS, 1000, 1000)
    assert real.train.accepted is None, "training has one label an image"
    seen = range(0, 1000, 7)  # --test-images: the labels go with the images
    answers = [(label + 5 * (label % 3)) % 1000 for label in seen]  # right, 5 beside, 10 beside
    right, named, own = 0, 0, 0
    for label, answer in zip(seen, answers, strict=True):
        labels = REASSESSED[NUMBERS[label] - 1]
        own += answer == label
        if labels:
            named += 1
            right += answer in labels
    scores = probes.evaluate(Says(answers), real.test.part(torch.tensor(seen)), (8, 8), 64, "cpu")
    assert 0 < own < right < named < len(seen), "the made-up labels tell them apart"
    assert scores["real_top1"] == pytest.approx(100 * right / named)
    assert scores["top1"] == pytest.approx(100 * own / len(seen))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_process_scores_its_images_with_their_own_labels(rank, real, monkeypatch):
    """Of three processes each takes every third image."""
    monkeypatch.setattr(distributed, "test_shard", lambda: slice(rank, None, 3))
    part, mine = real.test.part(torch.arange(40)), range(rank, 40, 3)
    answers = [label if label % 2 else label + 5 for label in mine]
    scores = probes.evaluate(Says(answers), part, (8, 8), 4, "cpu")
    named = [(a, REASSESSED[NUMBERS[label] - 1]) for a, label in zip(answers, mine, strict=True)]
    assert scores["real_top1"] == pytest.approx(100 * np.mean([a in labels for a, labels in named if labels]))


def test_an_image_that_cannot_be_decoded_counts_for_neither_score(real, monkeypatch):
    part = real.test.part(torch.arange(20))
    bad = part.files[1].decode()
    monkeypatch.setattr(transfer.image_folder, "read_image", lambda file, *_: 1 / (file != bad) * torch.zeros(3, 8, 8))
    scores = probes.evaluate(Says(range(20)), part, (8, 8), 6, "cpu")
    labels = [(i, REASSESSED[NUMBERS[i] - 1]) for i in range(20) if i != 1]
    assert scores["top1"] == 100
    assert scores["real_top1"] == pytest.approx(100 * np.mean([i in them for i, them in labels if them]))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("a class less", ["999 classes", "1,000"]),
        ("another class", ["cat", "1,000"]),
        ("another name", ["0001.JPEG", "ILSVRC2012_val_"]),
        ("a number too large", ["ILSVRC2012_val_00050001.JPEG"]),
        ("another order", ["0 of 900", "a label that ReaL accepts"]),
    ],
)
def test_a_folder_that_is_not_imagenet_has_no_reassessed_labels(what, words, real, imagenet, monkeypatch):
    """Each would give a number, and a wrong one."""
    test = real.test.part(torch.arange(1000))
    if what == "another name":
        test.files[7] = b"val/n01440764/0001.JPEG"
    elif what == "a number too large":
        test.files[7] = b"val/n01440764/ILSVRC2012_val_00050001.JPEG"
    elif what == "another order":
        test.labels = (test.labels + 1) % 1000
    classes = {"a class less": WNIDS[1:], "another class": ["cat", *WNIDS[1:]]}.get(what, WNIDS)
    changed = real._replace(test=test, classes=classes)
    monkeypatch.setattr(transfer.image_folder, "load", lambda path: changed)
    with refusal(*words):
        data.load(f"imagenet-real:{imagenet}", data_dir=imagenet)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", []), (b"{}", ["0 entries"]), (b"[[1]]", ["1 entries"]), (b"[" * 10_000, []), (b"7", []),
        (json.dumps([[1000], *[[]] * 49_999]).encode(), ["no class from 0 to 999"]),
        (json.dumps([["cat"], *[[]] * 49_999]).encode(), ["no class"]),
        (json.dumps([1, *[[]] * 49_999]).encode(), ["50,000"]),
    ],
)  # fmt: skip
def test_a_damaged_real_json_is_refused(content, words, tmp_path):
    write(tmp_path, {"real.json": content})
    with refusal(tmp_path / "real.json", "damaged", *words, "delete it"):
        transfer.read_real(tmp_path / "real.json")


@pytest.mark.parametrize("task", ["linear", "knn", "fewshot", "hpm"])
def test_tasks_that_have_no_such_score_say_so(task, leave_no_trace, capsys):
    init = "" if task == "hpm" else "--init x.pt"
    assert run(f"--task {task} --data imagenet-real:/nowhere --arch vit_micro4 {init}") == 2
    assert "no score with ReaL's labels; give --data folder:PATH" in one_line(capsys)


# ---------------------------------------------------------------------------------------------
# The head of pre-training
# ---------------------------------------------------------------------------------------------


def test_fine_tuning_replaces_the_whole_head_of_pre_training(small, shallow, no_figures, monkeypatch, capsys):
    """ViT, appendix B.1.1: both linear layers go, and one that starts at zero comes; also for the same classes."""
    assert run(f"{MICRO} --head mlp --lr 0.01 --warmup 0 --out pre") == 0
    trained = checkpoint("pre")["model"]
    assert trained["pre_logits.fc.weight"].shape == (64, 64)
    (first, *_) = record_steps(monkeypatch, f"{MICRO} --task finetune --pool cls --init pre --out tuned")
    assert not [name for name in first.before if name.startswith("pre_logits")]
    assert torch.equal(first.before["blocks.0.mlp.fc1.weight"], trained["blocks.0.mlp.fc1.weight"])
    assert "head left at its initial value: the layer before it, pre_logits" in capsys.readouterr().out


def test_a_run_with_the_head_of_pre_training_predicts_with_it(small, shallow, no_figures, monkeypatch):
    """--task predict builds the model as its run did, hidden layer and all."""
    assert run(f"{MICRO} --head mlp --lr 0.01 --warmup 0 --out pre") == 0
    write(Path("images"), {"a.png": picture(90, (16, 16), "PNG")})
    assert run("--task predict --init pre --images images --out said") == 0
    trained = checkpoint("pre")["model"]
    model = vit.create("vit_micro4", img_size=16, num_classes=3, head="mlp").eval()
    model.load_state_dict(trained)
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    with torch.no_grad():
        logits = model((torch.full((1, 3, 16, 16), 90 / 255) - mean) / std)[0]
    (row,) = csv.DictReader(Path("said/predictions.csv").open(encoding="utf-8-sig"))
    found = {row[f"class {i}"]: float(row[f"probability {i}"]) for i in (1, 2, 3)}
    assert found == pytest.approx(
        dict(zip(("red", "green", "blue"), logits.softmax(0).tolist(), strict=True)), abs=1e-5
    )
