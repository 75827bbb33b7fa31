"""What downstream/predict.py promises: the classes of images, as the run's own test would see them, and nothing lost.

The model's forward pass is that of oracles.py, NumPy loops from the papers' equations; images are prepared by Pillow
alone; the table is read by Python's csv.
"""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import data
import train
import vit
from downstream import predict, probes
from engine import distributed, image_folder
from tests.engine.pictures import CPU, pixels, save_image
from tests.engine.runs import PLAIN, coloured, small_photos
from tests.engine.test_data import CIFAR, archive, cifar_members
from tests.oracles import equal, filled, linear_loops, vit_loops

CLASSES = ["=red, bright", 'the "green"', "blåu\nund weiß"]  # commas, quotes, letters, lines: what tables trip over
MICRO = "--arch vit_micro4 --img-size 16 --batch-size 4".split()
BLOCKS = 1


def main(*arguments):
    """`python train.py ARGUMENTS` in this process: the exit code."""
    try:
        return train.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        return stop.code


def predict_images(init, images, *more):
    return main("--task", "predict", "--init", init, "--images", images, *more)


def table(path):
    """The rows of a predictions.csv: the header, and a dict for each image by its file."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        header, *rows = csv.reader(file)
    assert all(len(row) == len(header) for row in rows)
    return header, {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def errors(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def write_folder(path, n=8):
    """folder: data of the three classes, n training images and 4 test images each, which are 20 x 18 pixels."""
    for split, many in (("train", 3 * n), ("val", 12)):
        images, labels = coloured(many, seed=many)
        for i, (image, label) in enumerate(zip(images.permute(0, 2, 3, 1).numpy(), labels.tolist(), strict=True)):
            picture = Image.fromarray(image).resize((20, 18))
            save_image(picture, Path(path, split, CLASSES[label], f"{i}, a.png"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder of short runs on such data, by task. Nobody may write there."""
    root, before = tmp_path_factory.mktemp("trained"), os.getcwd()
    os.chdir(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.ARCHS, "vit_micro4", vit.ARCHS["vit_micro4"] | {"depth": BLOCKS})
        patch.setattr(train, "draw_figures", lambda *_: None)
        write_folder("pictures")
        given = *MICRO, "--data", "folder:pictures", "--lr", 0.01
        for task, *more in (
            ("supervised", "--steps", 12, "--polyak", 0.5), ("hpm", "--steps", 2), ("mae", "--steps", 1),
            ("finetune", "--steps", 6, "--init", "hpm/last.pt"), ("linear", "--steps", 12, "--init", "hpm/last.pt"),
        ):  # fmt: skip
            assert main("--task", task, *given, "--out", task, *more) == 0
    os.chdir(before)
    return root


@pytest.fixture
def runs(trained, leave_no_trace, tmp_path, monkeypatch):
    """A copy of them in the folder of the test, with vit_micro4 as deep as theirs."""
    monkeypatch.setitem(vit.ARCHS, "vit_micro4", vit.ARCHS["vit_micro4"] | {"depth": BLOCKS})
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


# ---------------------------------------------------------------------------------------------
# The probabilities
# ---------------------------------------------------------------------------------------------


def softmax(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


def prepared(path, size=16, share=7 / 8, mean=data.IMAGENET_MEAN, std=data.IMAGENET_STD):
    """An image as a test sees it: upright, the middle `share` of its short side, (3, size, size) float64."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
    side = share * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    image = image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return ((np.asarray(image) / 255 - mean) / std).transpose(2, 0, 1)


def by_hand(run, image):
    """The probabilities of a run's classes for a prepared image, from its last.pt."""
    state = {name: v.double().numpy() for name, v in torch.load(Path(run, "last.pt"))["model"].items()}
    if Path(run).name != "linear":
        return softmax(vit_loops(image, state, 4, pool="mean" if Path(run).name == "finetune" else "cls")[2])
    encoder = {name: v.double().numpy() for name, v in torch.load("hpm/last.pt")["model"].items()}
    encoder = {n.removeprefix("student.encoder."): v for n, v in encoder.items() if n.startswith("student.encoder.")}
    y = (vit_loops(image, encoder, 4)[1] - state["norm.running_mean"]) / np.sqrt(state["norm.running_var"] + 1e-6)
    return softmax(linear_loops(y[None], state["head.weight"], state["head.bias"])[0])


@pytest.mark.parametrize("task", ["supervised", "finetune", "linear"])
def test_probabilities_are_those_of_a_forward_pass_by_hand(task, runs):
    """An upright photograph, one that the camera turned, a tall grey one with an odd name."""
    photo = Image.fromarray(pixels(30, 50, 3).numpy()).resize((60, 44))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    save_image(photo, Path("new/deep/er/a.png"))
    save_image(photo, Path("new/turned.png"), exif=exif)
    save_image(photo.convert("L").crop((0, 0, 20, 44)), Path("new/grau, ß.png"))
    assert predict_images(task, "new") == 0
    header, rows = table(Path(task, "predictions.csv"))
    assert header == ["file", *(f"{w} {i}" for i in (1, 2, 3) for w in ("class", "probability")), "problem"]
    assert {*rows} == {"new/deep/er/a.png", "new/turned.png", "new/grau, ß.png"}
    for name, row in rows.items():
        wanted = dict(zip(sorted(CLASSES), by_hand(task, prepared(name)), strict=True))
        found = {row[f"class {i}"]: float(row[f"probability {i}"]) for i in (1, 2, 3)}
        assert found == pytest.approx(wanted, abs=2e-5)
        assert [*found.values()] == sorted(found.values(), reverse=True)
    assert len({row["probability 1"] for row in rows.values()}) == 3, "the images do not look alike to the model"


@pytest.mark.parametrize("how", [(), ("--workers", 0), ("--micro-batch", 5)], ids=str)
@pytest.mark.parametrize("task", ["supervised", "finetune", "linear"])
def test_predictions_of_the_test_images_have_the_runs_own_accuracy(task, how, runs):
    """The same preprocessing, and the same model."""
    assert predict_images(f"{task}/last.pt", "pictures/val", *how) == 0
    _, rows = table(Path(task, "predictions.csv"))
    hits = [row["class 1"] == Path(name).parent.name for name, row in rows.items()]
    assert len(hits) == 12
    assert 100 * sum(hits) / 12 == pytest.approx(json.loads(Path(task, "result.json").read_text())["top1"], abs=1e-9)


@pytest.mark.parametrize(
    ("size", "pixels"), [("16", "own"), ("24x16", "own"), ("16", "half")], ids=["own size", "resized", "half"]
)
@pytest.mark.parametrize("name", ["cifar10", "folder:pictures"])
def test_images_are_prepared_as_the_runs_test_images(name, size, pixels, runs, monkeypatch):
    """Bit for bit: the middle of a folder's; of data that are all of 16 pixels the whole, be it resized."""
    monkeypatch.setattr(data, "cifar", lambda *_: small_photos())
    monkeypatch.setitem(data.NATIVE_SIZE, "cifar10", 16)
    monkeypatch.setitem(data.STATISTICS, "cifar10", small_photos()[2:4])
    tested = coloured(10, seed=10)[0]
    for i, image in enumerate(tested.permute(0, 2, 3, 1).numpy()):
        save_image(Image.fromarray(image), Path(f"new/{i}.png"))
    seen = []
    for split in (data.InMemory, image_folder.Folder, predict.Images):
        monkeypatch.setattr(split, "test_batches", keeping(split.test_batches, seen))
    given = *MICRO, "--img-size", size, "--pixels", pixels, "--data", name, "--steps", 1, "--out", "run"
    assert main(*given) == 0
    assert predict_images("run", "new" if name == "cifar10" else "pictures/val") == 0
    images = torch.cat(seen)
    theirs, ours = images.chunk(2)
    assert torch.equal(theirs, ours)
    if name == "cifar10" and size == "16":
        mean, std = (0.5, 0.5) if pixels == "half" else (PLAIN[0][0], PLAIN[1][0])
        equal(ours, (tested.double() / 255 - mean) / std, atol=1e-5)


@pytest.mark.parametrize(("size", "share"), [(224, 7 / 8), (256, 1.0)])
def test_a_folders_images_show_their_middle_up_to_224_pixels_and_above_all(size, share, tmp_path):
    """ImageNet's custom: 224 of 256; MAE's code takes all at larger sizes."""
    path = save_image(Image.fromarray(pixels(30, 40, 3).numpy()), tmp_path / "a.png")
    images = predict.Images([str(path)], data.IMAGENET_MEAN, data.IMAGENET_STD)
    [(found, _)] = images.test_batches((size, size), 1, CPU)
    equal(found, prepared(path, size, share)[None], atol=1e-5)


def keeping(original, seen):
    """A `test_batches` that keeps what it gives."""

    def test_batches(*given):
        for images, labels in original(*given):
            seen.append(images)
            yield images, labels

    return test_batches


@pytest.mark.parametrize("size", [(28, 28), (40, 40), (28, 40)], ids=str)
def test_a_model_of_grey_images_sees_colours_as_pillow_makes_them_grey(size, tmp_path):
    """So greys, of which all 256 are here, stay what they are, as the images of Fashion-MNIST have to."""
    colours = pixels(28, 28, 3)
    save_image(Image.fromarray(colours.numpy()), tmp_path / "colours.png")
    grey = torch.arange(28 * 28).remainder(256).to(torch.uint8).view(28, 28)
    save_image(Image.fromarray(grey.numpy()), tmp_path / "grey.png")
    wanted = torch.from_numpy(np.array(Image.fromarray(colours.numpy()).convert("L")))
    wanted, statistics = torch.stack([wanted, grey])[:, None], data.STATISTICS["fashion-mnist"]
    split = predict.Images(sorted(tmp_path.glob("*.png")), *statistics, 28, whole=True)
    own = data.InMemory(wanted, torch.zeros(2).long(), *statistics)
    [(images, labels)], [(theirs, _)] = (list(s.test_batches(size, 2, CPU)) for s in (split, own))
    assert torch.equal(images, theirs)
    assert labels.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["photos", "fashion-mnist", "scenes", "scenes-many", "cifar10", "cifar100"])
def test_mean_and_deviation_are_those_that_the_data_come_with(name, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "read_idx", lambda folder, name, header, shape, **_: torch.zeros(10, *shape[1:]))
    if name in CIFAR:
        (tmp_path / CIFAR[name]).write_bytes(archive(cifar_members(name)[0]))
    found = data.load(name, (16, 16), tmp_path)
    assert data.STATISTICS.get(name, (data.IMAGENET_MEAN, data.IMAGENET_STD)) == (found.mean, found.std)


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------


def test_names_come_back_from_the_table_as_they_are(runs, capsys):
    """Of files and classes: commas, quotes, lines, letters beyond ASCII, bytes that are no UTF-8."""
    names = ["a, b.png", '"q".png', "line\nline.png", "grün 猫.png", "=1+1.png", os.fsdecode(b"\xff.png")]
    for name in names:
        save_image(Image.new("RGB", (20, 20), "red"), Path("new", name))
    assert predict_images("supervised", "new") == 0
    screen = capsys.readouterr().out
    text = Path("supervised/predictions.csv").read_bytes()
    assert text.startswith("\ufeff".encode()), "by which spreadsheets know UTF-8"
    with open("supervised/predictions.csv", newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["file"] for row in rows) == sorted(f"new/{name}" for name in names)
    assert all({row[f"class {i}"] for i in (1, 2, 3)} == set(CLASSES) for row in rows)
    assert "line\\nline.png " in screen
    assert "\\udcff.png " in screen
    assert all(c.isprintable() or c == "\n" for c in screen), "nothing moves the cursor"


def test_the_screen_shows_20_images_and_says_how_many_more(runs, capsys):
    assert predict_images("supervised", "pictures/train", "--out", "else/where") == 0
    assert len(table("else/where/predictions.csv")[1]) == 24
    assert not Path("supervised/predictions.csv").exists()
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if " | " in line]) == 20
    assert any("4 more" in line for line in lines)
    assert "24 images" in lines[-1]
    assert "else/where/predictions.csv" in lines[-1]


def test_a_table_names_at_most_five_classes(leave_no_trace):
    """Of seven; the five most probable ones, in order."""
    torch.save(filled(vit.create("vit_micro4", 16, 7)).float().state_dict(), "init.pt")
    save_image(Image.new("RGB", (20, 20), "red"), Path("a.png"))
    assert predict_images("init.pt", "a.png", *ONLY_WEIGHTS) == 0
    header, rows = table("predictions.csv")
    assert header[-3:] == ["class 5", "probability 5", "problem"]
    shares = [float(rows["a.png"][f"probability {i}"]) for i in range(1, 6)]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) > 5 / 7


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(runs, capsys):
    """Text, half a picture, nothing at all among the images; notes and the system's own files are no images."""
    junk = {"text.png": b"no image", "empty.jpg": b"", "half.jpg": b""}
    good = save_image(Image.fromarray(pixels(30, 30, 3).numpy()), Path("new/sub/good.jpg"))
    junk["half.jpg"] = good.read_bytes()[:600]
    for name, content in (junk | {"notes.txt": b"", "._good.jpg": b"mac", ".ipynb_checkpoints/good.jpg": b"x"}).items():
        Path("new", name).parent.mkdir(exist_ok=True)
        Path("new", name).write_bytes(content)
    assert predict_images("supervised", "new") == 0
    _, rows = table("supervised/predictions.csv")
    assert {*rows} == {"new/sub/good.jpg", *(f"new/{name}" for name in junk)}
    out, err = capsys.readouterr()
    for name in junk:
        assert rows[f"new/{name}"]["problem"]
        assert {rows[f"new/{name}"][c] for c in ("class 1", "probability 1", "class 3", "probability 3")} == {""}
        assert f"new/{name}" in err
        assert any(line.startswith(name) and "can't be read" in line for line in out.splitlines())
    assert rows["new/sub/good.jpg"]["problem"] == ""
    assert rows["new/sub/good.jpg"]["class 1"] in CLASSES
    assert "4 images, 3 of which can't be read" in out


@pytest.mark.parametrize("task", ["supervised", "hpm"])
def test_no_readable_image_is_an_error(task, runs, capsys):
    Path("new").mkdir()
    Path("new/a.png").write_text("no image")
    assert predict_images(task, "new") == 2
    [error] = errors(capsys)
    assert "of 1 image none can be read" in error
    if task == "supervised":
        assert table("supervised/predictions.csv")[1]["new/a.png"]["problem"]


def test_a_run_of_photographs_sees_all_of_an_image(small, monkeypatch):
    """As its test did, whose images are cut already: the classes are the same, image by image."""
    monkeypatch.setitem(vit.ARCHS, "vit_micro4", vit.ARCHS["vit_micro4"] | {"depth": BLOCKS})
    monkeypatch.setattr(train, "draw_figures", lambda *_: None)
    test, seen = small_photos().test, []
    test.mean, test.std = data.IMAGENET_MEAN, data.IMAGENET_STD
    for i, image in enumerate(test.images.permute(0, 2, 3, 1).numpy()):
        save_image(Image.fromarray(image), Path(f"new/{i}.png"))
    assert main(*MICRO, "--steps", 1, "--out", "run") == 0
    monkeypatch.setattr(predict.Images, "test_batches", keeping(predict.Images.test_batches, seen))
    assert predict_images("run", "new") == 0
    assert torch.equal(torch.cat(seen), next(test.test_batches((16, 16), 10, CPU))[0])


def test_several_processes_are_refused(runs, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(distributed, "start", lambda device: None)
    assert predict_images("supervised", "pictures/val") == 2
    assert "in one process" in errors(capsys)[0]


def test_predicting_changes_nothing_of_the_run(runs):
    before = contents(runs)
    assert predict_images("supervised", "pictures/val") == 0
    assert contents(runs) | before == contents(runs)
    assert contents(runs).keys() - before.keys() == {runs / "supervised/predictions.csv"}


# ---------------------------------------------------------------------------------------------
# Masked autoencoders
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["mae", "hpm"])
def test_an_autoencoder_draws_what_it_masks(task, runs, monkeypatch, capsys):
    """The first six images that can be read, prepared as in training; its own weights; α_t of the end of a run."""
    Path("pictures/val", CLASSES[0], "0, a.png").write_text("no image")
    Path(task, "masks.png").write_text("the run's own")
    drawn, seen, before = [], [], contents(runs)
    original = probes.plot_masks
    monkeypatch.setattr(probes, "plot_masks", lambda *given: drawn.append(given) or original(*given))
    monkeypatch.setattr(predict.Images, "test_batches", keeping(predict.Images.test_batches, seen))
    assert predict_images(task, "pictures/val") == 0
    [(_, model, dataset, img_size, alpha, seed, device, dtype)] = drawn
    assert (img_size, alpha, seed, device, dtype) == ((16, 16), 0.5, 0, "cpu", "float32")
    state = torch.load(Path(task, "last.pt"))["model"]
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    found = sorted(map(str, Path("pictures/val").rglob("*.png")))
    shown = [name for name in found if name != f"pictures/val/{CLASSES[0]}/0, a.png"][:6]
    equal(seen[0], np.stack([prepared(name) for name in shown]), atol=1e-5)
    with Image.open(Path(task, "predictions.png")) as picture:
        assert picture.height > 6 * 100
    assert contents(runs) | before == contents(runs)
    assert contents(runs).keys() - before.keys() == {runs / task / "predictions.png"}
    out = capsys.readouterr().out
    assert all(predict.on_screen(name) in out for name in shown)


# ---------------------------------------------------------------------------------------------
# Weights from elsewhere, and what is refused
# ---------------------------------------------------------------------------------------------

ONLY_WEIGHTS = "--arch", "vit_micro4", "--img-size", "16"


@pytest.mark.parametrize("names", [None, CLASSES], ids=["numbers", "names"])
def test_weights_alone_need_an_arch_and_number_their_classes_unless_they_name_them(names, runs, capsys):
    """Public files are ImageNet's, as a rule: its mean and deviation, the middle of the image."""
    model = vit.create("vit_micro4", 16, 3)
    model.load_state_dict(torch.load("supervised/last.pt")["model"])
    if names:
        vit.save_weights(model, "some/vit.safetensors", classes=sorted(names))
    else:
        Path("some").mkdir()
        torch.save(model.state_dict(), "some/vit.pth")
    [init] = Path("some").iterdir()
    assert predict_images(init, "pictures/val", *ONLY_WEIGHTS) == 0
    assert predict_images("supervised", "pictures/val") == 0
    header, rows = table("some/predictions.csv")
    _, wanted = table("supervised/predictions.csv")
    for name, row in rows.items():
        for i in (1, 2, 3):
            assert row[f"probability {i}"] == wanted[name][f"probability {i}"]
            mine = row[f"class {i}"] if names else sorted(CLASSES)[int(row[f"class {i}"])]
            assert mine == wanted[name][f"class {i}"]
    assert ("numbers" in capsys.readouterr().out) == (names is None)


def test_what_makes_no_prediction_is_refused_in_one_line(runs, capsys):
    """And nothing is written."""
    Path("empty").mkdir()
    torch.save(vit.create("vit_micro4", 16, 0).state_dict(), "headless.pt")
    torch.save(vit.create("vit_micro4", 16, 3, pool="mean").state_dict(), "mean.pt")
    saved = torch.load("supervised/last.pt")
    torch.save(torch.load("linear/last.pt") | {"classes": ["a"]}, "fewer.pt")
    torch.save(saved | {"config": saved["config"] | {"task": "mpp"}}, "mpp.pt")
    huge = {"head.weight": torch.full_like(saved["model"]["head.weight"], 3e38)}
    torch.save(saved | {"model": saved["model"] | huge}, "huge.pt")
    before = set(Path().rglob("*"))
    for init, images, *more, words in (
        ("supervised", "nowhere", "--images nowhere"),
        ("supervised", "empty", "no image in"),
        ("empty", "pictures/val", "last.pt"),
        ("nowhere.pt", "pictures/val", "nowhere.pt"),
        ("headless.pt", "pictures/val", *ONLY_WEIGHTS, "no classifier"),
        ("mean.pt", "pictures/val", *ONLY_WEIGHTS, "--pool"),
        ("fewer.pt", "pictures/val", "1 classes"),
        ("mpp.pt", "pictures/val", "mpp"),
        ("supervised", "pictures/val", "--out", "huge.pt", "another --out"),
        ("huge.pt", "pictures/val", "not finite"),
    ):
        assert predict_images(init, images, *more) == 2, init
        [error] = errors(capsys)
        assert words in error, error
    assert set(Path().rglob("*")) == before


def test_the_configuration_of_another_program_is_not_taken_for_a_run(runs):
    """It may have a task by the same name."""
    model = torch.load("supervised/last.pt")["model"]
    torch.save({"model": model, "config": {"task": "linear", "lr": 0.1}}, "theirs.pt")
    assert predict_images("theirs.pt", "pictures/val", *ONLY_WEIGHTS, "--out", "new") == 0
    assert predict_images("supervised", "pictures/val") == 0
    theirs, ours = (table(Path(out, "predictions.csv"))[1] for out in ("new", "supervised"))
    assert all(row["probability 1"] == ours[name]["probability 1"] for name, row in theirs.items())


@pytest.mark.parametrize("change", ["gone", "other"])
def test_a_linear_probe_needs_the_encoder_that_it_was_trained_on(change, runs, capsys):
    """Another one would be another model, without a word."""
    Path("hpm/last.pt").unlink()
    if change == "other":
        shutil.copy("mae/last.pt", "hpm/last.pt")
    assert predict_images("linear", "pictures/val") == 2
    [error] = errors(capsys)
    assert "linear probe of hpm/last.pt" in error
    assert {"gone": "no weights", "other": "changed"}[change] in error
