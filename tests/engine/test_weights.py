"""Public weights, in whatever file they come, have to give the logits that their own code gives.

Most tests make a model of another code base with random weights, save it as that code does, load the file here and
compare outputs on the same images. Where the code base can't be installed beside this one (Google's, HPM's, CLIP's),
its file and its forward pass are written out below, in NumPy. Random weights do: a name or an axis mixed up shows at
once. Both sides compute in float64, so they may differ by rounding alone: 1e-10, see oracles.py.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import scipy.ndimage
import torch
from torch.nn import functional as F

import hpm
import vit
from engine import weights
from related import positions, resnet
from tests import oracles
from tests.engine.site import serve

P, D, DEPTH, HEADS, CLASSES = 8, 48, 2, 4, 5
SMALL = dict(img_size=32, num_classes=CLASSES, patch_size=P, dim=D, depth=DEPTH, num_heads=HEADS)  # 4x4 patches


def small(**options):
    return vit.create("vit_b16", **(SMALL | options)).eval()


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(values):
    """Random numbers in place of a state dict's, matrices scaled by their inputs so that depth does no harm."""
    out = {}
    for seed, (name, value) in enumerate(values.items()):
        scale = 0.2 if value.ndim == 1 else 1 / value[0].numel() ** 0.5
        out[name] = scale * random(*value.shape, seed=seed) + (value.ndim == 1 and name.endswith("weight"))
    return out


def load(model, path, **which):
    """A model with every weight of a file: nothing left, adapted or unused."""
    notes = weights.load(model, path, **which)
    assert notes == [], notes
    return model.eval()


@torch.no_grad()
def equal(ours, theirs, atol=1e-10):
    """The same outputs, and outputs that are worth comparing."""
    theirs = torch.as_tensor(theirs)
    assert theirs.std() > 0.1, "the outputs are all alike, so that they agree means nothing"
    print(f"largest difference {(ours.double() - theirs.double()).abs().max().item():.1e}")  # pytest -rP shows it
    oracles.equal(ours, theirs.detach().numpy(), atol=atol)


FLOAT32 = (
    1e-4  # of ViT-B/16, logits near 1 after 12 blocks of float32: found 3e-6, on other processors a few times that
)


def same(ours, theirs):
    """The same names and, bit for bit, the same tensors."""
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)


def put(path, state):
    """A .safetensors file as other programs write it: names and tensors alone."""
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit.pth", "vit.npz", "vit"])
@pytest.mark.parametrize("kind", ["torch", "torch before 1.6", "safetensors"])
def test_the_content_of_a_file_tells_its_format(tmp_path, kind, name):
    """Its name says nothing."""
    state = filled(small().state_dict())
    if kind == "safetensors":
        safetensors.torch.save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=kind == "torch")
    same(weights.read(tmp_path / name), state)
    same(weights.read(str(tmp_path / name)), state)


def one_line(path, match):
    """`read` refuses the file with one line that names it."""
    with pytest.raises(ValueError, match=match) as refusal:
        weights.read(path)
    message = str(refusal.value)
    assert str(path) in message, "which file?"
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "0 bytes"),
        (b"<!DOCTYPE html><html><body>Please log in</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "neither"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "neither"),
        (b"PK\x03\x04", "damaged"),
        (b"\x80\x02", "."),
        (bytes(8) + b"{", "."),
        (b"\xff" * 8 + b'{"a": 1}', "."),
    ],
    ids=["empty", "web page", "text", "picture", "zip", "pickle", "safetensors", "safetensors, absurd length"],
)
def test_what_holds_no_weights_is_refused_in_one_line(tmp_path, content, match):
    """What a failed download leaves behind, and files with a right start and nothing after it."""
    path = tmp_path / "vit.pth"
    path.write_bytes(content)
    one_line(path, match)


def test_a_missing_file_a_folder_and_other_archives_are_refused(tmp_path):
    one_line(tmp_path / "missing.pth", "no weights")
    one_line(tmp_path, "folder")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("cat.jpg", b"cat")
    one_line(tmp_path / "photos.zip", "cat.jpg")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    one_line(tmp_path / "empty.zip", "nothing in it")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("read", [weights.read, weights.metadata, weights.digest], ids=["read", "metadata", "digest"])
def test_only_regular_files_are_opened(tmp_path, read, monkeypatch):
    """A pipe waits for ever for its writer, a device has no end, and a link to itself nothing behind it."""
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    cases = [("pipe.pt", "no regular file"), ("loop.pt", "."), ("x" * 300, "."), ("zero\0byte", "."), ("", "a folder")]
    for path, match in [("/dev/zero", "no regular file"), *((tmp_path / name, what) for name, what in cases)]:
        with pytest.raises(ValueError, match=f"no weights at .*{match}") as refusal:
            read(path)
        assert "\n" not in str(refusal.value)
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "vit.safetensors")
    put(tmp_path / "vit.safetensors", small().state_dict())
    read(tmp_path / "link.safetensors")
    monkeypatch.setenv("VIT_CACHE", "~nouser/cache")
    with pytest.raises(ValueError, match="can't download http://127.0.0.1:9/x.pt: .*home directory"):
        read("http://127.0.0.1:9/x.pt")


def files_of_all_kinds(folder):
    """The same weights as safetensors, torch (both formats) and .npz."""
    state = filled(small(depth=1).state_dict())
    torch.save(state, folder / "zip.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    np.savez(folder / "vit.npz", **google_file(small(depth=1)))
    put(folder / "vit.safetensors", state)
    return ["zip.pth", "old.pth", "vit.npz", "vit.safetensors"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's
def test_a_file_cut_short_is_refused_wherever_it_was_cut(tmp_path):
    for name in files_of_all_kinds(tmp_path):
        weights.read(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for length in [*range(0, 300, 11), *range(300, len(whole), len(whole) // 12), len(whole) - 1]:
            (tmp_path / "cut").write_bytes(whole[:length])
            one_line(tmp_path / "cut", ".")


@pytest.mark.parametrize("name", ["zip.pth", "vit.npz"])
def test_a_flipped_bit_in_a_zip_file_is_noticed(tmp_path, name):
    """Zip files carry checksums. torch.load does not look at them: damaged weights would load without a word."""
    files_of_all_kinds(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    one_line(tmp_path / name, "damaged.*checksum")


class Trap:
    """Unpickled, it creates a file: a harmless stand-in for any program that a checkpoint may carry."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's
@pytest.mark.parametrize("kind", ["torch", "torch before 1.6", "pickle", "new pickle", "npz", "disguised npz"])
def test_code_in_a_file_is_never_run(tmp_path, kind):
    """A pickle is a program, and an array of objects holds a pickle."""
    path, created = tmp_path / "vit.pth", tmp_path / "created"
    content = {"args": Trap(created), "model": filled(small(depth=1).state_dict())}
    if kind.startswith("torch"):
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
    elif "npz" in kind:
        with path.open("wb") as file:
            np.savez(file, cls=np.array([Trap(created)], dtype=object))
        if kind == "disguised npz":  # the archive torch would write, with a bare pickle in it
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
                archive.writestr("archive/version", "3\n")
    else:
        path.write_bytes(pickle.dumps(content, protocol=2 if kind == "pickle" else 4))
    message = one_line(path, ".")
    assert not created.exists(), "the file's code was run"
    assert "no code from a file is ever run" in message or not kind.startswith("torch")
    pickle.loads(pickle.dumps(Trap(created)))
    assert created.exists(), "the trap does not work, so this test proves nothing"


# ---------------------------------------------------------------------------------------------
# Download
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def site(monkeypatch, tmp_path):
    monkeypatch.setenv("VIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve() as site:
        yield site


def page(state, folder):
    put(folder / "page", state)
    return (folder / "page").read_bytes()


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if path.name != ".lock")


def test_a_url_is_downloaded_once_into_the_cache(site, tmp_path):
    """And used again without the network."""
    state, path = filled(small().state_dict()), "/a/vit.pth?download=true"
    site.pages[path] = page(state, tmp_path)
    for _ in range(2):
        same(weights.read(site.url + path), state)
    assert site.asked == [path], "not read from the cache"
    assert [re.sub("^[0-9a-f]{8}", "…", name) for name in kept(tmp_path)] == ["…-vit.pth"]


def test_files_of_the_same_name_at_two_addresses_are_two(site, tmp_path):
    """Half of the public weights are called model.safetensors."""
    states = {name: filled(small(depth=depth).state_dict()) for name, depth in (("small", 1), ("large", 2))}
    for name, state in states.items():
        site.pages[f"/{name}/model.safetensors"] = page(state, tmp_path)
    for name, state in states.items():
        same(weights.read(f"{site.url}/{name}/model.safetensors"), state)


def test_a_hash_in_the_name_is_checked(site, tmp_path):
    """name-0123abcd.pth: at least the first 8 hexadecimal digits of the file's SHA-256, as torch.hub writes it."""
    state = filled(small().state_dict())
    content = page(state, tmp_path)
    right = hashlib.sha256(content).hexdigest()[:8]
    wrong = right[:-1] + ("0" if right[-1] != "0" else "1")
    site.pages = {f"/vit-{digits}.pth": content for digits in (right, wrong)}
    one_line(f"{site.url}/vit-{wrong}.pth", f"checksum sha256:{right}, not sha256:{wrong}")
    assert kept(tmp_path) == []
    same(weights.read(f"{site.url}/vit-{right}.pth"), state)


@pytest.mark.parametrize(
    ("answer", "content", "match"),
    [
        ("missing", b"", "404"),
        ("whole", b"<html>Please log in</html>", "a web page"),
        ("cut", bytes(8) + b"{" + bytes(1000), "more expected"),
    ],
    ids=["missing", "web page", "cut"],
)
def test_a_failed_download_is_one_line_and_not_kept(site, tmp_path, answer, content, match):
    """Kept, a half file or a log-in page would be met again at every run."""
    site.answers, site.pages["/vit.pth"] = [answer], content
    one_line(f"{site.url}/vit.pth", f"can't download .*{match}.*; try again")
    assert kept(tmp_path) == []


def test_a_damaged_file_in_the_cache_is_named(site, tmp_path):
    """So that it can be deleted: it came whole, and was damaged later."""
    site.pages["/vit.pth"] = page(filled(small().state_dict()), tmp_path)
    weights.read(f"{site.url}/vit.pth")
    (path,) = (tmp_path / "cache").glob("*.pth")
    path.write_bytes(path.read_bytes()[:-9])
    assert str(path) in one_line(f"{site.url}/vit.pth", "delete it to download it again")


@pytest.mark.parametrize("read", [weights.read, weights.metadata, weights.digest], ids=["read", "metadata", "digest"])
def test_a_copy_that_was_changed_is_noticed_where_the_name_has_a_checksum(site, tmp_path, read):
    """Whole and readable, but other weights than the name says."""
    content = page(filled(small().state_dict()), tmp_path)
    url = f"{site.url}/vit-{hashlib.sha256(content).hexdigest()[:8]}.safetensors"
    site.pages[url.removeprefix(site.url)] = content
    read(url)
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    path.write_bytes(page({n: v + 1 for n, v in small().state_dict().items()}, tmp_path))
    with pytest.raises(ValueError, match=rf"{re.escape(url)}.*{path.name}.*delete it to download it again"):
        read(url)
    path.unlink()
    read(url)


def test_a_pipe_in_the_place_of_the_copy_is_not_opened(site, tmp_path):
    site.pages["/vit-0123abcd.pt"] = page(filled(small().state_dict()), tmp_path)
    (tmp_path / "cache").mkdir()
    name = hashlib.sha256(f"{site.url}/vit-0123abcd.pt".encode()).hexdigest()[:8]
    os.mkfifo(tmp_path / "cache" / f"{name}-vit-0123abcd.pt")
    with pytest.raises(ValueError, match="the copy of .*, it is no regular file"):
        weights.read(f"{site.url}/vit-0123abcd.pt")


# ---------------------------------------------------------------------------------------------
# What a file says of itself
# ---------------------------------------------------------------------------------------------

NAMES = ["ankle boot", "Mantel", "Übergröße", "鞋", 'a "b", c']


@pytest.mark.parametrize("layout", ["timm", "hugging-face"])
def test_names_of_classes_and_the_grid_are_written_and_given_back(tmp_path, layout):
    """In safetensors' metadata, where values are text: as JSON."""
    model, path = small(img_size=(32, 16)), tmp_path / "vit.safetensors"
    vit.save_weights(model, path, layout, classes=NAMES)
    assert weights.metadata(path) == dict(classes=NAMES, grid=(4, 2), config=None)
    assert weights.metadata(str(path))["classes"] == NAMES
    with safetensors.safe_open(path, "pt") as file:
        assert {n: json.loads(v) for n, v in file.metadata().items() if n != "format"} == dict(
            classes=NAMES, grid=[4, 2]
        )
        assert file.metadata()["format"] == "pt"
    vit.save_weights(model, path, layout)
    assert weights.metadata(path)["classes"] is None
    weights.write(student(), tmp_path / "mae.safetensors")
    assert weights.metadata(tmp_path / "mae.safetensors")["grid"] == (4, 4)
    weights.write(resnet.create("resnet50", depths=(1,), num_classes=5), tmp_path / "resnet", classes=NAMES)
    assert weights.metadata(tmp_path / "resnet") == dict(classes=NAMES, grid=None, config=None)


@pytest.mark.parametrize("options", [dict(), dict(num_classes=0)])
def test_names_that_are_not_one_for_each_class_are_not_written(tmp_path, options):
    with pytest.raises(ValueError, match="4 names of classes do not fit"):
        vit.save_weights(small(**options), tmp_path / "vit.safetensors", classes=NAMES[:4])
    assert not list(tmp_path.iterdir())


def test_a_runs_checkpoint_gives_its_names_grid_and_configuration(save):
    config = {"task": "finetune", "arch": "vit_b16"}
    content = dict(model=small().state_dict(), step=3, classes=NAMES, grid=[4, 4], config=config)
    assert weights.metadata(save(content, "last.pt")) == dict(classes=NAMES, grid=(4, 4), config=config)


@pytest.mark.parametrize(
    ("classes", "grid"),
    [(10, 7), ("abc", "4x4"), ([1, 2], [4.0, 4.0]), ([], [4]), ({"a": 1}, [0, 4]), (torch.ones(2), [True, True])],
)
def test_what_other_code_means_by_these_words_is_nothing(tmp_path, classes, grid, save):
    """And nothing is said by a file that does not have them."""
    nothing = dict(classes=None, grid=None, config=None)
    content = dict(model=small().state_dict(), classes=classes, grid=grid, config=3)
    assert weights.metadata(save(content, "vit.pt")) == nothing
    said = dict(classes=str(classes), grid=str(grid), config="{}")
    safetensors.torch.save_file(small().state_dict(), tmp_path / "vit", metadata=said)
    assert weights.metadata(tmp_path / "vit") == nothing
    for name in files_of_all_kinds(tmp_path):
        assert weights.metadata(tmp_path / name) == nothing
    assert weights.metadata(save(torch.ones(3), "tensor.pt")) == nothing


def test_the_digest_is_that_of_the_file_or_of_the_copy(site, tmp_path):
    content = page(filled(small().state_dict()), tmp_path)
    site.pages["/vit.pt"] = content
    expected = hashlib.sha256(content).hexdigest()
    assert weights.digest(tmp_path / "page") == weights.digest(f"{site.url}/vit.pt") == expected
    (tmp_path / "page").write_bytes(content + b" ")
    assert weights.digest(tmp_path / "page") != expected


def named(tmp_path, classes):
    """A file whose head names its classes: path, its head."""
    model = small()
    model.load_state_dict(filled(model.state_dict()))
    vit.save_weights(model, tmp_path / "vit.safetensors", classes=classes)
    return tmp_path / "vit.safetensors", model.head


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 0, 1, 3]], ids=["same", "other order"])
def test_a_head_follows_the_names_of_its_classes(tmp_path, order):
    """Whatever their order: an image of a class keeps its logit."""
    path, head = named(tmp_path, NAMES)
    model = small()
    notes = vit.load_weights(model, path, classes=[NAMES[i] for i in order])
    assert notes == ["head re-ordered: the file has the same classes in another order"] * (order != sorted(order))
    for i, j in enumerate(order):
        assert torch.equal(model.head.weight[i], head.weight[j])
        assert torch.equal(model.head.bias[i], head.bias[j])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(NAMES, ["other", *NAMES[1:]]), (NAMES, [*NAMES[:4], NAMES[0]]), (["a", "a", "b", "c", "d"], list("abacd"))],
    ids=["renamed", "one twice", "the same twice in both"],
)
def test_a_head_for_classes_of_other_names_keeps_its_initial_value(tmp_path, theirs, ours):
    """As many classes, and yet not the same: a label of the file would be another class here."""
    path, _ = named(tmp_path, theirs)
    model = small()
    (note,) = vit.load_weights(model, path, classes=ours)
    assert re.match("head left at its initial value: its classes are .* here, .* in the file", note)
    assert not model.head.weight.any()
    assert not model.head.bias.any()


@pytest.mark.parametrize(("theirs", "ours"), [(None, NAMES), (NAMES, None), (None, None)])
def test_without_names_on_both_sides_the_number_of_classes_decides(tmp_path, theirs, ours):
    path, head = named(tmp_path, theirs)
    model = small()
    assert vit.load_weights(model, path, classes=ours) == []
    assert torch.equal(model.head.weight, head.weight)
    (note,) = vit.load_weights(small(num_classes=3), path, classes=ours and ours[:3])
    assert note == "head left at its initial value: 3 classes here, 5 in the file"


# ---------------------------------------------------------------------------------------------
# Wrappers, and timm's names
# ---------------------------------------------------------------------------------------------


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


DINO_HEAD = {"module.head.mlp.0.weight": torch.zeros(4, D), "module.head.last_layer.weight_v": torch.zeros(9, 4)}
WRAPS = {
    "plain": lambda s: s,
    "DeiT, MAE fine-tuned": lambda s: {"model": s, "epoch": 7, "args": argparse.Namespace(lr=1e-3, model="vit_base")},
    "DataParallel": lambda s: prefixed(s, "module."),
    "state_dict beside the model's name, as in HPM's scripts": lambda s: {
        "model": "vit_base_patch16",
        "state_dict": prefixed(s, "module."),
        "optimizer": {"state": {0: {"step": 3}}},
    },
    "module, as DeepSpeed saves it": lambda s: {"module": s, "epoch": 3},
    "two wrappers": lambda s: {"state_dict": {"model": s}},
    "DINO's full checkpoint": lambda s: {
        "student": prefixed(s, "module.backbone.") | DINO_HEAD,
        "teacher": prefixed({n: 0 * v for n, v in s.items()}, "backbone."),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small"),
    },
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
def test_a_model_is_taken_out_of_its_wrappers(wrap, save):
    """The names are timm's, as in DeiT, DINO and fine-tuned MAE: nothing is left to do then."""
    state = filled(small().state_dict())
    path = save(wrap(state), "vit.pth")
    same(weights.read(path), state)
    load(small(), path)


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("names", [("student", "teacher"), ("state_dict", "ema_state_dict")], ids=["DINO", "HPM"])
def test_student_or_teacher_is_chosen_where_a_file_holds_both(tmp_path, names, which, save):
    state = filled(small().state_dict())
    both = {"student": {n: v + 1 for n, v in state.items()}, "teacher": {n: v + 2 for n, v in state.items()}}
    path = save(dict(zip(names, both.values(), strict=True)) | {"model": "vit_base"}, "vit.pth")
    same(weights.read(path, which=which), both[which])
    same(weights.read(path), both["student"])


PAIRS = [  # what training scripts call the weights, and their average over the steps
    ("model", "model_ema"),  # timm, DeiT, ConvNeXt
    ("state_dict", "state_dict_ema"),  # timm
    ("model", "ema"),
    ("model_state_dict", "ema_model_state_dict"),
    ("net", "net_ema"),
    ("model", "teacher"),
    ("encoder", "target_encoder"),  # I-JEPA
    ("weights", "averaged_weights"),
    ("model", "Shadow"),
    ("model", "modelEMA"),
    ("schema", "ema0.9999"),
    ("backbone", "swa"),
]


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_weights_or_their_average_are_told_apart_by_name(names, save):
    """In either order, however deep the average stands, and as beginnings of names in one dict, too."""
    raw = filled(square(depth=1).state_dict())
    average = {name: value + 1 for name, value in raw.items()}
    for content in (
        {names[0]: raw, names[1]: average, "epoch": 3},
        {names[0]: raw, names[1]: {"decay": 0.9, "state": {"x": average}}},
        {names[1]: {"module": average}, "optimizer": {"state": {0: {"step": 1}}}, names[0]: raw},
        {"step": 1, "model": prefixed(raw, f"{names[0]}.") | prefixed(average, f"{names[1]}.")},
        prefixed(average, f"module.{names[1]}.") | prefixed(raw, f"module.{names[0]}."),
    ):
        path = save(content, "vit.pth")
        same(weights.read(path), raw)
        same(weights.read(path, which="teacher"), average)


WORDS = "model state_dict model_state_dict net network module ema model_ema state_dict_ema ema_model teacher student"


@pytest.mark.parametrize("name", [*WORDS.split(), "weights", "backbone", "my model"])
def test_a_file_with_one_model_gives_it_to_both(name, save):
    """Whatever it is called: there is no other."""
    state = filled(square(depth=1).state_dict())
    path = save({name: state}, "vit.pth")
    same(weights.read(path, which="student"), state)
    same(weights.read(path, which="teacher"), state)
    with pytest.raises(ValueError, match=r"'ema'.*student and teacher"):
        weights.read(path, which="ema")


def test_a_wrapper_that_holds_something_else_is_passed_over(save):
    """`model` is a dict of options here; the weights stand beside it."""
    state = filled(small().state_dict())
    same(weights.read(save({"model": {"arch": "vit", "depth": 2}, "net": {"weights": state}}, "vit.pth")), state)


def test_of_several_models_that_no_name_tells_apart_none_is_taken(save):
    states = [{n: v + i for n, v in filled(small().state_dict()).items()} for i in (1, 2)]
    path = save({"generator": states[0], "critic": states[1]}, "gan.pth")
    one_line(path, "holds several models, generator and critic; save the one to load")


def test_what_averages_compilers_and_wrappers_write_beside_or_into_names_is_left_out(save):
    """torch.optim.swa_utils.AveragedModel counts; torch.compile, FSDP and checkpointing put a word into names."""
    state = filled(small().state_dict())
    same(weights.read(save({"n_averaged": torch.tensor(5)} | prefixed(state, "module."), "swa.pth")), state)
    for word in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        inside = {re.sub(r"^(blocks\.\d+)\.", rf"\1.{word}.", name): value for name, value in state.items()}
        same(weights.read(save(prefixed(inside, f"{word}."), "wrapped.pth")), state)


def renumbered(state, number):
    """Its blocks under other numbers: number(old) -> new, or None to leave a block out."""
    out = {}
    for name, value in state.items():
        block = re.match(r"(.*blocks\.)(\d+)(\..*)", name)
        new = number(int(block[2])) if block else 0
        if new is not None:
            out[f"{block[1]}{new}{block[3]}" if block else name] = value
    return out


@pytest.mark.parametrize("number", [lambda i: i + 1, lambda i: 2 * i, lambda i: f"0{i}"], ids=["1 2", "0 2", "00 01"])
def test_blocks_that_are_not_numbered_from_0_are_refused(number, save):
    """As many as here: they would land one block further, and the first would stay as it was."""
    for content, model in ((small().state_dict(), small()), (official_file(), student())):
        before = copied(model)
        with pytest.raises(ValueError, match=r"vit\.pth does not fit: its .*number them from 0"):
            weights.load(model, save(renumbered(filled(content), number), "vit.pth"))
        same(model.state_dict(), before)


@pytest.mark.parametrize("part", ["attn.qkv.weight", "attn.qkv.bias", "norm2.bias", "mlp.fc2.weight"])
def test_a_block_without_a_part_that_others_have_is_refused(part, save):
    """A file that is torn, or joined from two: what is missing in one block is no other kind of model."""
    for stack, content, model in (
        ("blocks", small().state_dict(), small()),
        ("decoder_blocks", official_file(), student()),
    ):
        state = filled(content)
        del state[f"{stack}.1.{part}"]
        with pytest.raises(ValueError, match=rf"vit\.pth does not fit: its .*blocks\.1\.{part} is missing"):
            weights.load(model, save(state, "vit.pth"))


@pytest.mark.parametrize("part", ["attn.proj.weight", "norm1.weight", "mlp.fc1.weight"])
def test_blocks_that_all_lack_a_weight_are_refused(part, save):
    """Without biases they are a model of their own kind; without a matrix they are none."""
    state = {name: value for name, value in small().state_dict().items() if not name.endswith(part)}
    with pytest.raises(ValueError, match=rf"its blocks\.0\.{part} is missing"):
        weights.load(small(), save(state, "vit.pth"))


def test_a_stage_without_its_shortcut_is_refused(save):
    """Only the first block of a stage has one."""
    state = resnet.create("resnet50", depths=(1,), num_classes=5).state_dict()
    del state["stages.0.blocks.0.downsample.conv.weight"]
    with pytest.raises(ValueError, match=r"stages\.0\.blocks\.0\.downsample\.conv\.weight is missing"):
        weights.load(resnet.create("resnet50", depths=(1,), num_classes=5), save(state, "resnet.pth"))


def test_one_weight_under_two_names_is_refused(save):
    """Which of them counts, nobody knows."""
    state = filled(small().state_dict())
    old, new = (hugging_face_file(state, kind) for kind in ("files", "inside version 5"))
    one_line(save(old | new, "vit.pth"), "does not fit: it has .* twice, the second time as ")
    old["vit.encoder.layer.1.attn.qkv.weight"] = state["blocks.1.attn.qkv.weight"]
    one_line(save(old, "vit.pth"), r"does not fit: q, k and v of blocks\.1\.attn\.\*")


KIND_OF_TENSOR = {
    "sparse": lambda v: v.to_sparse(),
    "sparse, by rows": lambda v: v.to_sparse_csr(),
    "meta": lambda v: v.to("meta"),
    "quantised": lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8),
    "nested": lambda v: torch.nested.nested_tensor(list(v)),
    "int8": lambda v: v.to(torch.int8),
    "int64": lambda v: v.long(),
    "uint8": lambda v: v.byte(),
    "bool": lambda v: v > 0,
    "complex64": lambda v: v + 0j,
}


@pytest.mark.filterwarnings("ignore")  # torch's, of kinds in beta or on their way out
@pytest.mark.parametrize("kind", KIND_OF_TENSOR)
def test_only_plain_tensors_of_floating_point_numbers_are_taken(kind, save):
    """Others crash somewhere, or are cast: packed integers are not weights without what unpacks them."""
    state = filled(small().state_dict())
    state["head.weight"] = KIND_OF_TENSOR[kind](state["head.weight"])
    word = "sparse" if kind.startswith("sparse") else kind
    one_line(save(state, "vit.pth"), f"its head.weight is .*{word}.*; save plain tensors of floating-point numbers")
    clip = clip_file()
    clip["visual.proj"] = KIND_OF_TENSOR[kind](clip["visual.proj"].float())
    with pytest.raises(ValueError, match=f"its visual.proj is .*{word}"):
        weights.load_frozen("clip", "vit_b16", 32, save(clip, "clip.pth"))


def test_integers_in_a_google_file_are_refused(tmp_path):
    np.savez(tmp_path / "vit.npz", **google_file(small()) | {"cls": np.zeros((1, 1, D), np.int32)})
    one_line(tmp_path / "vit.npz", "its cls is torch.int32; save plain tensors")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_floating_point_numbers_of_all_sizes_are_taken(dtype, save):
    """Cast to the model's, each to the nearest."""
    state = {name: value.to(dtype) for name, value in filled(small().state_dict()).items()}
    model = load(small(), save(state, "vit.pth"))
    same(model.state_dict(), {name: value.to(torch.float32) for name, value in state.items()})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
def test_weights_that_are_no_finite_numbers_are_refused(value, save):
    """Of a run that diverged; 1e39 is too large for float32. In a part that is not loaded they do no harm."""
    state = {name: value.double() for name, value in filled(small().state_dict()).items()}
    state["blocks.1.mlp.fc1.bias"][3] = value
    model = small()
    before = copied(model)
    with pytest.raises(ValueError, match=r"vit\.pth is of no use: its blocks.1.mlp.fc1.bias holds NaN"):
        weights.load(model, save(state, "vit.pth"))
    same(model.state_dict(), before)
    state["blocks.1.mlp.fc1.bias"][3], state["head.bias"][0] = 0, value
    weights.load(small(num_classes=0), save(state, "vit.pth"))


@pytest.mark.parametrize("name", ["head.weight", "cls_token", "patch_embed.proj.weight", "decoder_pred_losspred.bias"])
def test_a_number_in_the_place_of_a_tensor_is_refused(name, save):
    """A tensor without dimensions, as a counter is; also where the model does not have that part."""
    state = filled(small().state_dict()) | {name: torch.tensor(3.0)}
    path = save(state, "vit.pth")
    for model in (small(), student(), small(num_classes=0)):
        with contextlib.suppress(ValueError):  # what is left out does no harm
            weights.load(model, path)
    with pytest.raises(ValueError, match="vit.pth"):
        weights.load(student() if "decoder" in name else small(), path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"fc.weight": torch.zeros(2), "b": 1, "c": 2, "d": 3}, "keys are fc.weight, b, c, …"),
        ({"conv1.weight": torch.zeros(2)}, "keys are conv1.weight$"),
        ({}, "none"),
        ([1, 2], "list"),
        (torch.zeros(2), "a Tensor"),
        ("weights", "a str"),
        ({0: torch.zeros(2)}, "keys are 0"),
        ({"model": [1]}, "keys are model"),
        ({"patch_embed.proj.weight": 3}, "patch_embed.proj.weight is no tensor"),
    ],
    ids=[
        "other net",
        "ResNet",
        "empty",
        "list",
        "tensor",
        "text",
        "numbers as names",
        "list as model",
        "a number as weight",
    ],
)
def test_a_file_without_a_vit_is_refused_by_its_keys(content, match, save):
    one_line(save(content, "vit.pth"), match)


def test_a_dict_that_holds_itself_does_not_hang(save):
    loop = {}
    loop["model"] = loop
    one_line(save(loop, "vit.pth"), "model")


def test_what_is_missing_in_every_block_is_said_once(save):
    """Models without biases of q, k and v: ours stay at zero, which is the same function."""
    state = {name: value for name, value in filled(small().state_dict()).items() if not name.endswith("qkv.bias")}
    model = small()
    assert weights.load(model, save(state, "vit.pth")) == ["left at the initial value: blocks.*.attn.qkv.bias"]
    assert torch.equal(model.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
    assert not model.blocks[1].attn.qkv.bias.any()


@pytest.mark.parametrize("extra", ["blocks.0.ls1.gamma", "dist_token", "blocks.1.attn.relative_position_bias_table"])
def test_a_transformer_of_another_kind_is_refused(extra, save):
    """DeiT III's layer scale, distilled DeiT, BEiT: without that part the rest would be another function."""
    state = filled(small().state_dict()) | {extra: torch.zeros(D)}
    one_line(save(state, "vit.pth"), re.escape(extra))


# ---------------------------------------------------------------------------------------------
# MAE and HPM: their official names, and ours
# ---------------------------------------------------------------------------------------------


def official_file(depth=2, d=32, loss_predictor=True):
    """MAE's pre-training state dict, and HPM's with a loss predictor: names and shapes as in their code."""
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, 17, D), "mask_token": (1, 1, d), "decoder_pos_embed": (1, 17, d)}
    shapes |= {"patch_embed.proj.weight": (D, 3, P, P), "patch_embed.proj.bias": (D,), "decoder_embed.bias": (d,)}
    shapes["decoder_embed.weight"] = (d, D)
    towers = [("blocks", "norm", None, D), ("decoder_blocks", "decoder_norm", "decoder_pred", d)]
    if loss_predictor:
        towers.append(("decoder_blocks_losspred", "decoder_norm_losspred", "decoder_pred_losspred", d))
    for blocks, norm, pred, width in towers:
        linears = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for i in range(depth):
            for name, (rows, columns) in linears.items():
                shapes[f"{blocks}.{i}.{name}.weight"] = (rows * width, columns * width)
                shapes[f"{blocks}.{i}.{name}.bias"] = (rows * width,)
            for name in (f"{blocks}.{i}.norm1", f"{blocks}.{i}.norm2"):
                shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
        if pred:
            shapes |= {f"{pred}.weight": (P * P * 3, width), f"{pred}.bias": (P * P * 3,)}
    state = filled({name: torch.zeros(shape) for name, shape in shapes.items()})
    for name, width in (("pos_embed", D), ("decoder_pos_embed", d)):
        state[name] = vit.sincos_pos_embed(width, (4, 4))
    return state


def student(loss_predictor=True, depth=2, d=32, outputs=P * P * 3, img_size=32):
    return hpm.Autoencoder(
        small(num_classes=0, pos_embed="sincos", img_size=img_size), outputs, d, depth, 4, loss_predictor
    )


def autoencoder(path, loss_predictor=True, **which):
    """An `hpm.Autoencoder` with every weight of a file: nothing left, adapted or unused."""
    model = student(loss_predictor)
    notes = weights.load(model, path, **which)
    assert notes == [], notes
    return model.eval()


def split(noise, visible):
    return noise.argsort(dim=1).split([visible, noise.shape[1] - visible], dim=1)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_the_official_hpm_predictor_becomes_the_mean_of_its_outputs(tmp_path, dtype, rounding, save):
    """P*P*C outputs for each patch, of which it takes the mean: the mean of linear maps is one linear map.

    Here the official predictor is run as it is, with all its outputs, on the tokens that ours starts from.
    """
    file = {name: value.to(dtype) for name, value in official_file().items()}
    content = {"state_dict": prefixed(file, "module."), "model": "mae_vit_base_patch16", "epoch": 200}
    state = weights.read(save(content, "hpm.pth"))
    assert state["loss_predictor.pred.weight"].dtype == dtype
    model = student().to(dtype)
    assert weights.load(model, tmp_path / "hpm.pth") == []
    theirs = hpm.Decoder(32, 2, 4, P * P * 3).to(dtype)
    names = {"blocks": "decoder_blocks_losspred", "norm": "decoder_norm_losspred", "pred": "decoder_pred_losspred"}
    part = {name: name.split(".")[0] for name in theirs.state_dict()}
    theirs.load_state_dict({name: file[name.replace(top, names[top], 1)] for name, top in part.items()})
    visible, hidden = split(random(3, 16), 4)
    with torch.no_grad():
        latent = model.encoder.encode(random(3, 3, 32, 32).to(dtype), visible)
        z = model.decoder_tokens(latent, visible, hidden)
        outputs = theirs(z, 12)
        assert model.loss_predictor.pred.weight.shape == (1, 32)
        assert (outputs.mean(-1) - model.loss_predictor(z, 12)[..., 0]).abs().max() <= rounding
        assert outputs.mean(-1).std() > 0.01


def test_every_weight_of_an_official_file_lands_where_it_belongs(save):
    """Read off their forward pass and ours, part by part."""
    file = official_file()
    model = autoencoder(save({"model": file}, "mae.pth")).state_dict()
    for theirs, ours in (
        ("cls_token", "encoder.cls_token"),
        ("blocks.1.mlp.fc2.weight", "encoder.blocks.1.mlp.fc2.weight"),
        ("norm.bias", "encoder.norm.bias"),
        ("decoder_embed.weight", "decoder_embed.weight"),
        ("mask_token", "mask_token"),
        ("decoder_pos_embed", "decoder_pos_embed"),
        ("decoder_blocks.1.attn.qkv.weight", "decoder.blocks.1.attn.qkv.weight"),
        ("decoder_norm.weight", "decoder.norm.weight"),
        ("decoder_pred.bias", "decoder.pred.bias"),
        ("decoder_blocks_losspred.0.norm2.weight", "loss_predictor.blocks.0.norm2.weight"),
        ("decoder_norm_losspred.bias", "loss_predictor.norm.bias"),
    ):
        assert torch.equal(model[ours], file[theirs]), f"{theirs} is not {ours}"
    assert len(model) == len(file)
    mean = file["decoder_pred_losspred.bias"].double().mean()[None]
    oracles.equal(model["loss_predictor.pred.bias"], mean.numpy(), atol=1e-7)  # rounded to float32


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_the_official_hpm_file_gives_student_or_teacher(which, save):
    """Their names in it: `state_dict` is the student, `ema_state_dict` the teacher, `model` only a name."""
    both = {"state_dict": official_file(), "ema_state_dict": {n: v / 2 for n, v in official_file().items()}}
    for name in ("pos_embed", "decoder_pos_embed"):  # fixed, and the same in both
        both["ema_state_dict"][name] = both["state_dict"][name]
    path = save(both | {"model": "mae_vit_base_patch16", "epoch": 200, "optimizer": {}}, "hpm.pth")
    part = both["state_dict" if which == "student" else "ema_state_dict"]
    assert torch.equal(autoencoder(path, which=which).decoder.norm.bias, part["decoder_norm.bias"])


@pytest.mark.parametrize(
    ("file", "has_predictor", "note"),
    [
        ("mae", True, "left at the initial value: loss_predictor"),
        ("hpm", False, "not used: loss_predictor"),
        ("encoder", True, "left at the initial value: decoder, decoder_embed, loss_predictor, mask_token"),
        ("no decoder_pred", False, "left at the initial value: decoder.pred.bias, decoder.pred.weight"),
    ],
)
def test_parts_that_only_file_or_model_has_are_named(file, has_predictor, note, save):
    """What both have is loaded, what only the model has stays as it was."""
    content = official_file(loss_predictor=file == "hpm")
    if file == "encoder":
        content = {n: value for n, value in content.items() if not n.startswith(("decoder", "mask"))}
    if file == "no decoder_pred":
        content = {n: value for n, value in content.items() if not n.startswith("decoder_pred")}
    model = student(has_predictor)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert weights.load(model, save(content, "vit.pth")) == [note]
    after = model.state_dict()
    assert torch.equal(after["encoder.blocks.1.mlp.fc1.bias"], content["blocks.1.mlp.fc1.bias"])
    if file != "encoder":
        assert torch.equal(after["mask_token"], content["mask_token"])
    for name in note.partition(": ")[2].split(", ") if note.startswith("left") else ():
        kept = [n for n in after if n.startswith(name)]
        assert kept
        assert all(torch.equal(after[n], before[n]) for n in kept)


@pytest.mark.parametrize(
    ("here", "match"),
    [
        (dict(depth=3), "its decoder depth is 2 blocks, this model's 3"),
        (dict(depth=1), "its decoder depth is 2 blocks, this model's 1"),
        (dict(d=64), r"\(1, 1, 32\), this model's \(1, 1, 64\)"),
    ],
)
def test_decoders_of_another_size_leave_the_model_unchanged(here, match, save):
    """The encoder would fit: it may not be loaded before the decoders have been looked at."""
    model, path = student(**here), save(official_file(), "mae.pth")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"mae\.pth does not fit.*{match}"):
        weights.load(model, path)
    same(model.state_dict(), before)


def test_a_decoder_for_another_target_leaves_its_last_layer(save):
    """As a classifier for other classes does with its head: to go on from pixels to features."""
    model, file = student(outputs=27), official_file()
    notes = weights.load(model, save(file, "mae.pth"))
    assert notes == ["decoder.pred left at its initial value: 27 values a patch here, 192 in the file"]
    assert torch.equal(model.decoder.norm.weight, file["decoder_norm.weight"])


def test_an_autoencoder_of_another_image_size_gets_its_positions(save):
    """Of encoder and decoders, by the formula, and it is said once."""
    model = student(img_size=(48, 64))
    notes = weights.load(model, save(official_file(), "mae.pth"))
    assert notes == ["sine-cosine positions computed for the 6x8 grid, in place of 4x4"]
    assert torch.equal(model.encoder.pos_embed, vit.sincos_pos_embed(D, (6, 8)))
    assert torch.equal(model.decoder_pos_embed, vit.sincos_pos_embed(32, (6, 8)))


def test_positions_that_no_formula_gives_are_taken_as_they_are(save):
    """In a model whose own are fixed too: others would make another function of the file. Half precision is no news."""
    file = official_file() | {"pos_embed": random(1, 17, D)}
    model = student()
    assert "positions are the file's" in weights.load(model, save(file, "mae.pth"))[0]
    assert torch.equal(model.encoder.pos_embed, file["pos_embed"])
    half = {name: value.half() for name, value in official_file().items()}
    assert weights.load(student(), save(half, "half.pth")) == []


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_our_own_checkpoint_of_hpm_gives_student_or_teacher(tmp_path, which, save):
    """The names are those of the official files after reading: one way to load both. A teacher has no decoder."""
    model = hpm.HPM(autoencoder(save(official_file(), "hpm.pth")))
    state = filled(model.state_dict())
    state |= {n: v for n, v in model.state_dict().items() if n.endswith("pos_embed")}
    model.load_state_dict(state)
    state = weights.read(save({"model": model.state_dict(), "step": 3}, "last.pt"), which=which)
    part = getattr(model, which).state_dict()
    same(state, {name.removeprefix("encoder."): value for name, value in part.items()})
    put(tmp_path / "mae.safetensors", state)
    same(weights.read(tmp_path / "mae.safetensors"), state)
    second = student()
    notes = weights.load(second, tmp_path / "last.pt", which)
    assert notes == (["left at the initial value: decoder"] if which == "teacher" else [])
    same({name: second.state_dict()[name] for name in part}, part)


# ---------------------------------------------------------------------------------------------
# Load: what did not fit, and positions for another grid
# ---------------------------------------------------------------------------------------------

SQUARE = dict(patch_size=2, dim=8, depth=2, num_heads=2, num_classes=5, img_size=6)  # 3x3 patches


def square(**options):
    return vit.ViT(**(SQUARE | options))


def timm_file(D=8, hidden=32, depth=2, patches=9, classes=5, P=2):
    """A state dict with the names and the shapes of timm's VisionTransformer, written out by hand."""
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, 1 + patches, D)}
    shapes |= {"patch_embed.proj.weight": (D, 3, P, P), "patch_embed.proj.bias": (D,)}
    for i in range(depth):
        layers = {"norm1": (D,), "attn.qkv": (3 * D, D), "attn.proj": (D, D), "norm2": (D,)}
        layers |= {"mlp.fc1": (hidden, D), "mlp.fc2": (D, hidden)}
        for layer, shape in layers.items():
            shapes |= {f"blocks.{i}.{layer}.weight": shape, f"blocks.{i}.{layer}.bias": shape[:1]}
    shapes |= {"norm.weight": (D,), "norm.bias": (D,), "head.weight": (classes, D), "head.bias": (classes,)}
    return {name: oracles.random(*shape, seed=seed) / 2 for seed, (name, shape) in enumerate(shapes.items())}


def test_timms_names_give_the_logits_of_the_equations(save):
    state, images = timm_file(), oracles.random(2, 3, 6, 6)
    model = load(square().double(), save(state, "vit.pt"))
    w = {name: value.numpy() for name, value in state.items()}
    equal(model(images), np.stack([oracles.vit_loops(image, w, 2)[2] for image in images.numpy()]))


def test_learned_positions_are_interpolated_to_the_models_grid(save):
    """ViT, section 3.2: fine-tuning at another resolution. Everything else loads unchanged."""
    state, model = timm_file(), square(img_size=(4, 10)).double()  # 3x3 -> 2x5
    assert weights.load(model, save(state, "vit.pt")) == ["positions interpolated from 3x3 to 2x5"]
    image = state["pos_embed"][:, 1:].reshape(1, 3, 3, 8).permute(0, 3, 1, 2)
    reference = F.interpolate(image, size=(2, 5), mode="bicubic", antialias=True, align_corners=False)
    oracles.equal(model.pos_embed[:, 1:], reference.flatten(2).transpose(1, 2).numpy(), atol=1e-5)
    assert torch.equal(model.pos_embed[:, :1], state["pos_embed"][:, :1]), "the class token's position is kept"
    for name, parameter in model.named_parameters():
        assert name == "pos_embed" or torch.equal(parameter, state[name]), f"{name} was not loaded"


@pytest.mark.parametrize(
    ("there", "here", "class_token"),
    [(8, 4, True), (8, (4, 16), True), ((16, 4), (4, 16), True), (8, 4, False)],
    ids=["fewer patches", "as many, other shape", "turned", "no class token here"],
)
def test_sine_cosine_positions_are_computed_for_the_models_grid(save, there, here, class_token):
    """They are a formula: to interpolate them, or to take those of another grid, would only be wrong."""
    model = square(pool="mean", pos_embed="sincos", img_size=here, class_token=class_token)
    file = square(pool="mean", pos_embed="sincos", img_size=there).state_dict()
    notes = weights.load(model, save(file, "vit.pt"))
    rows, columns = model.grid
    oracle = oracles.sincos_loops(8, rows, columns, prefix=int(class_token))
    oracles.equal(model.pos_embed, oracle, "of the file's grid?", 1e-7)  # the formula's, rounded to float32
    old = "{}x{}".format(*square(img_size=there).grid)
    assert notes[0] == f"sine-cosine positions computed for the {rows}x{columns} grid, in place of {old}"
    assert notes[1:] == [] if class_token else ["not used: cls_token"]


RUN = dict(grid=[4, 4]), dict(config={"task": "mae"})  # what a last.pt says, and what it said before grids were


@pytest.mark.parametrize("said", RUN, ids=["grid", "config"])
def test_the_formula_of_our_own_runs_is_computed_anew_for_a_model_that_learns_positions(save, said):
    """To fine-tune at another size: exact positions, not interpolated ones, to start from."""
    model = square(img_size=(4, 6))
    file = dict(model=square(img_size=8, pos_embed="sincos").state_dict(), **said)  # 4x4 -> 2x3
    notes = ["sine-cosine positions computed for the 2x3 grid, in place of 4x4"]
    assert weights.load(model, save(file, "last.pt")) == notes
    oracles.equal(model.pos_embed, oracles.sincos_loops(8, 2, 3, prefix=1), "interpolated?", 1e-7)
    assert model.pos_embed.requires_grad, "they are the start of learned ones"


def interpolated_by_torch(pos_embed, old, new):
    """util/pos_embed.py of MAE and HPM, lines 72-96, with sizes for height and width: bicubic, no antialias."""
    image = pos_embed[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], image.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


@pytest.mark.parametrize(("there", "here"), [(8, 12), (16, (8, 12)), (8, 6)], ids=["larger", "smaller", "3x3"])
def test_mae_and_hpm_interpolate_their_formula_to_fine_tune(save, there, here):
    """Their positions are learned from there on, and start from torch's bicubic, not from the formula.

    Values differ: by 0.3 and more here. A model whose positions stay fixed still gets those of its own grid.
    """
    file = square(img_size=there, pos_embed="sincos").state_dict()
    model, fixed = square(img_size=here), square(img_size=here, pos_embed="sincos")
    path, old = save({"model": file}, "mae.pth"), (there // 2, there // 2)
    grids = "{}x{} to {}x{}".format(*old, *model.grid)
    assert weights.load(model, path) == [f"positions interpolated from {grids}"]
    theirs = interpolated_by_torch(file["pos_embed"], old, model.grid)
    oracles.equal(model.pos_embed, theirs.double().numpy(), "as MAE's code does", 1e-6)
    assert (theirs - fixed.pos_embed).abs().max() > 0.1, "that the formula differs is what this test is about"
    weights.load(fixed, path)
    oracles.equal(fixed.pos_embed, oracles.sincos_loops(8, *fixed.grid, prefix=1), "the formula", 1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_formula_is_recognised_up_to_the_files_precision(dtype):
    """Half of a unit in the last place near 1: 2^-9 in bfloat16, 2^-12 in float16, both below the 1e-2 allowed."""
    for grid in ((3, 4), (1, 12), (12, 1)):
        pos_embed = vit.sincos_pos_embed(8, grid).to(dtype)
        assert weights.formula_grid(pos_embed, 1) == grid
        pos_embed[0, -1, -1] += 2e-2
        assert weights.formula_grid(pos_embed, 1) is None


def oblong(kind="vit", rows=2, columns=8, seed=0):
    """A model on a grid that is not square, with positions that no formula gives; and the file of such a model."""
    options = dict(img_size=(2 * rows, 2 * columns))
    if kind == "autoencoder":
        encoder = vit.ViT(**(SQUARE | options | dict(num_classes=0, pos_embed="sincos")))
        model = hpm.Autoencoder(encoder, 12, 8, 1, 2)
    else:
        model = square(pos_embed="none" if kind == "relative" else "learned", **options)
        if kind == "relative":
            positions.replace(model, "relative")
    state = filled(model.state_dict())
    model.load_state_dict(state)
    return model.eval()


KINDS = ["vit", "autoencoder", "relative"]
SAYS = ["run", "safetensors", "by hand"]


def written(model, how, tmp_path):
    """The model's file, which says its grid or not: path, and what `load` has to be told."""
    path, grid = tmp_path / "vit.pt", getattr(model, "encoder", model).grid
    if how == "safetensors":
        weights.write(model, path)
    else:
        torch.save({"model": model.state_dict(), "step": 3} | ({"grid": list(grid)} if how == "run" else {}), path)
    return path, dict(grid=grid) if how == "by hand" else {}


@pytest.mark.parametrize("how", SAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_positions_of_an_oblong_grid_come_back_where_the_grid_is_known(tmp_path, kind, how):
    """Because the file says it, as ours do, or because the user does."""
    first, second = oblong(kind), oblong(kind)
    for parameter in second.parameters():
        parameter.data.zero_()
    path, known = written(first, how, tmp_path)
    assert not [note for note in weights.load(second, path, **known) if "interpolated" in note]
    same(second.state_dict(), first.state_dict())


@pytest.mark.parametrize("how", SAYS)
@pytest.mark.parametrize("here", [(4, 4), (8, 2), (3, 5)], ids=["square", "turned", "other"])
@pytest.mark.parametrize("kind", ["vit", "autoencoder"])
def test_a_known_grid_is_interpolated_as_what_it_is(tmp_path, kind, here, how):
    """2 x 8 positions are 16, as 4 x 4 and 8 x 2 are; a note names both grids."""
    first, second = oblong(kind), oblong(kind, *here)
    path, known = written(first, how, tmp_path)
    notes = weights.load(second, path, **known)
    assert "positions interpolated from 2x8 to {}x{}".format(*here) in notes
    for name in ("pos_embed", "decoder_pos_embed") if kind == "autoencoder" else ("pos_embed",):
        ours, theirs = (
            {n.removeprefix("encoder."): v for n, v in m.state_dict().items()}[name] for m in (second, first)
        )
        oracles.equal(ours, oracles.resize_loops(theirs.double().numpy(), (2, 8), here, 1, False), name, 1e-5)


@pytest.mark.parametrize("how", SAYS)
@pytest.mark.parametrize("here", [(4, 4), (8, 2)])
def test_relative_positions_of_another_grid_with_as_many_patches_are_refused(tmp_path, here, how):
    """An offset in the sequence is another offset in the image then."""
    second = oblong("relative", *here)
    path, known = written(oblong("relative"), how, tmp_path)
    with pytest.raises(ValueError, match="relative positions of a grid of 2x8, not those of {}x{}".format(*here)):
        weights.load(second, path, **known)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("there", "here"), [((2, 8), (2, 8)), ((4, 4), (2, 8)), ((2, 3), (2, 3)), ((2, 3), (4, 4))], ids=str
)
def test_a_grid_that_nobody_knows_is_not_guessed(tmp_path, kind, there, here):
    """Unless it is a square number of patches, and the model's own grid no other candidate."""
    first, second = oblong(kind, *there), oblong(kind, *here)
    before = copied(second)
    path, _ = written(first, "unknown", tmp_path)
    if kind == "relative" and math.prod(there) != math.prod(here):
        match = "has the shape"  # their number alone does not fit
    else:
        match = rf"vit\.pt has positions for {math.prod(there)} patches and does not say .*--init-grid ROWSxCOLUMNS"
    with pytest.raises(ValueError, match=match):
        weights.load(second, path)
    same(second.state_dict(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_square_number_is_square_for_a_square_model(tmp_path, kind):
    first, second = oblong(kind, 4, 4), oblong(kind, 4, 4, seed=1)
    path, _ = written(first, "unknown", tmp_path)
    weights.load(second, path)
    same(second.state_dict(), first.state_dict())


def test_a_square_number_is_square_for_an_oblong_model_of_another_number(tmp_path):
    second = oblong("vit", 3, 5)
    path, _ = written(oblong("vit", 4, 4), "unknown", tmp_path)
    assert weights.load(second, path) == ["positions interpolated from 4x4 to 3x5"]


def test_a_grid_given_by_hand_comes_before_the_files(tmp_path):
    first = oblong()
    path, _ = written(first, "run", tmp_path)
    assert weights.load(oblong("vit", 3, 5), path, grid=(8, 2)) == ["positions interpolated from 8x2 to 3x5"]
    with pytest.raises(ValueError, match=r"vit\.pt has positions for 16 patches, which do not fill a grid of 3x5"):
        weights.load(oblong("vit", 3, 5), path, grid=(3, 5))


def test_a_grid_that_the_formula_contradicts_is_refused(save):
    """Sine-cosine positions say themselves which grid is theirs."""
    path = save(square(pos_embed="sincos", img_size=(4, 16)).state_dict(), "vit.pt")
    with pytest.raises(ValueError, match="the sine-cosine positions of a grid of 2x8, not of 4x4"):
        weights.load(square(img_size=8), path, grid=(4, 4))


def test_a_grid_that_rows_and_columns_contradict_is_refused(save):
    first, second = (square(img_size=size, pos_embed="none") for size in ((8, 12), (6, 4)))
    for model in (first, second):
        positions.replace(model, "2d")
    path = save(first.state_dict(), "2d.pt")
    with pytest.raises(ValueError, match="2d.pt has 4 of row_pos_embed, its grid can't be 6x4"):
        weights.load(second, path, grid=(6, 4))
    weights.load(second, path, grid=(4, 6))


def test_two_dimensional_positions_are_interpolated_along_each_axis(save):
    """Columns and rows apart, on a line: as of a picture whose other side is constant."""
    there, here = (square(img_size=size, pos_embed="none") for size in ((8, 12), (6, 4)))
    for model in (there, here):
        positions.replace(model, "2d")
    file = filled(there.state_dict())
    notes = weights.load(here, save(file, "2d.pth"))
    assert notes == ["row_pos_embed interpolated from 4 to 3", "column_pos_embed interpolated from 6 to 2"]
    for name, new in (("row_pos_embed", 3), ("column_pos_embed", 2)):
        values = file[name][0].double().numpy()
        oracle = oracles.interpolation_loops(len(values), new) @ values
        oracles.equal(here.state_dict()[name][0], oracle, atol=1e-6)  # rounded to float32


def test_relative_positions_need_the_grid_of_the_file(save):
    file, other, again = (square(img_size=size, pos_embed="none") for size in ((4, 6), (8, 12), (4, 6)))
    for model in (file, other, again):
        positions.replace(model, "relative")
    path = save({"model": filled(file.state_dict()), "grid": [2, 3]}, "relative.pth")
    with pytest.raises(ValueError, match=r"relative.pos_embed has the shape \(13, 4\), this model's \(49, 4\)"):
        weights.load(other, path)
    load(again, path)


def test_a_class_token_missing_from_the_file_keeps_its_value(save):
    """And so does its position; the patches get theirs. So it is for files whose models take the mean over patches."""
    state, model = timm_file(), oracles.filled(square(pool="mean"))
    x_class, position = model.cls_token.clone(), model.pos_embed[:, :1].clone()
    state["fc_norm.weight"], state["fc_norm.bias"] = state.pop("norm.weight"), state.pop("norm.bias")
    del state["cls_token"]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    assert weights.load(model, save(state, "vit.pt")) == ["left at the initial value: cls_token"]
    assert torch.equal(model.cls_token, x_class)
    assert torch.equal(model.pos_embed, torch.cat([position, state["pos_embed"]], dim=1))


def test_a_class_token_missing_from_the_model_is_left_out(save):
    """The patches keep theirs, untouched: on the same grid nothing is interpolated, and no note may say so."""
    state, model = timm_file(), square(pool="mean", class_token=False).double()
    notes = weights.load(model, save(state, "vit.pt"))
    assert torch.equal(model.pos_embed, state["pos_embed"][:, 1:])
    assert notes == ["left at the initial value: fc_norm", "not used: cls_token, norm"]


def test_a_state_dict_loads_as_its_file_does(save):
    """From model to model, at another size."""
    state, first, second = filled(square().state_dict()), square(img_size=8), square(img_size=8)
    assert weights.load_state(first, state, "the other") == weights.load(second, save(state, "vit.pt"))
    same(first.state_dict(), second.state_dict())


def test_a_head_for_other_classes_keeps_its_initial_value(save):
    state, model = timm_file(classes=1000), square(num_classes=10).double()
    notes = weights.load(model, save(state, "vit.pt"))
    assert notes == ["head left at its initial value: 10 classes here, 1000 in the file"]
    assert not model.head.weight.any()
    assert not model.head.bias.any()
    assert torch.equal(model.blocks[1].mlp.fc2.weight, state["blocks.1.mlp.fc2.weight"])


KINDS_WITH_FILTERS = {
    "patch_embed.proj.weight": lambda in_chans: square(in_chans=in_chans),
    "stem.conv.weight": lambda in_chans: resnet.create("resnet50", depths=(1,), num_classes=5, in_chans=in_chans),
    "patch_embed.backbone.stem.conv.weight": lambda in_chans: resnet.create(
        "r50_vit_b16", 32, num_classes=5, in_chans=in_chans, dim=8, depth=1, num_heads=2, backbone=(1,)
    ),
}


CHANNELS = [("patch_embed.proj.weight", *pair) for pair in [(3, 2), (3, 4), (3, 7), (1, 2)]]


@pytest.mark.parametrize(
    ("name", "there", "here"), [*CHANNELS, *((name, *pair) for name in KINDS_WITH_FILTERS for pair in [(3, 1), (1, 3)])]
)
def test_filters_are_summed_or_repeated_for_another_number_of_channels(save, name, there, here):
    """As timm does it (adapt_input_conv): a grey image as three equal channels, or as one, gives the same."""
    model = KINDS_WITH_FILTERS[name](here)
    state = filled(KINDS_WITH_FILTERS[name](there).state_dict())
    (note,) = weights.load(model, save(state, "vit.pth"))
    old, new = state[name].double().numpy(), model.state_dict()[name]
    expected = np.zeros(new.shape)
    for c in range(max(here, there)):
        if here == 1:
            expected[:, 0] += old[:, c]
        elif c < here:
            expected[:, c] = old[:, c % there] * there / here
    oracles.equal(new, expected, atol=1e-6)
    if here == 1:
        assert note == f"{name} summed over {there} channels, for 1"
    else:
        assert note == f"{name} repeated from {there} to {here} channels, and scaled by {there}/{here}"
    if {there, here} == {1, 3}:
        oracles.equal(new.sum(dim=1), old.sum(axis=1), "what a grey image meets", 1e-5)


@pytest.mark.parametrize(("there", "here"), [(2, 3), (4, 1), (4, 3)])
def test_filters_for_other_channels_than_1_or_3_are_refused(save, there, here):
    with pytest.raises(ValueError, match=rf"patch_embed.proj.weight has the shape \(8, {there}, 2, 2\)"):
        weights.load(square(in_chans=here), save(square(in_chans=there).state_dict(), "vit.pt"))


@pytest.mark.parametrize("img_size", [6, 4], ids=["same grid", "other grid"])
def test_what_is_lacking_and_what_is_unused_is_said(save, img_size):
    """A pre-trained MAE: no head, a norm that a mean-pooling model does not have, and a decoder."""
    state, model = timm_file(), square(img_size=img_size, pool="mean")
    state["decoder_pred.weight"], state["decoder_pred.bias"] = state.pop("head.weight"), state.pop("head.bias")
    notes = weights.load(model, save(state, "vit.pt"))
    assert notes[-2:] == ["left at the initial value: fc_norm, head", "not used: decoder, norm"]
    assert notes[:-2] == ["positions interpolated from 3x3 to 2x2"] * (img_size == 4)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (dict(D=12, hidden=48), r"has the shape \(.*12.*\), this model's"),
        (dict(D=12, hidden=48, patches=16, classes=10), "shape"),
        (dict(hidden=16), r"blocks.\d.mlp.fc\d.(weight|bias) has the shape"),
        (dict(P=4), r"patch_embed.proj.weight has the shape \(8, 3, 4, 4\), this model's \(8, 3, 2, 2\)"),
        (dict(depth=1), "its depth is 1 blocks, this model's 2"),
        (dict(depth=3), "its depth is 3 blocks, this model's 2"),
        (dict(patches=7), "positions for 7 patches and does not say"),
        (dict(patches=0), "positions for 0 patches and does not say"),
    ],
    ids=["width", "width, grid and classes", "MLP width", "patch size", "too shallow", "too deep", "7", "0"],
)
def test_a_file_that_does_not_fit_leaves_the_model_unchanged(save, other, match):
    """Most of its tensors may fit: none of them may be loaded before all have been looked at."""
    model = oracles.filled(square())
    before = copied(model)
    with pytest.raises(ValueError, match=rf"vit\.pt.*{match}"):
        weights.load(model, save(timm_file(**other), "vit.pt"))
    same(model.state_dict(), before)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"pos_embed": torch.zeros(10, 8)}, "pos_embed is not a tensor with 3 dimensions"),
        ({"head.weight": 3}, "head.weight is no tensor but a int"),
    ],
    ids=["an axis less", "int"],
)
def test_values_that_no_vit_has_are_refused(save, wrong, match):
    """The names are right, what they name is not."""
    with pytest.raises(ValueError, match=rf"vit\.pt.*{match}"):
        weights.load(square(), save(timm_file() | wrong, "vit.pt"))


def test_a_resnet_takes_nothing_of_a_vit(save):
    model = resnet.create("resnet50", depths=(1,), num_classes=5)
    before = copied(model)
    with pytest.raises(ValueError, match=r"vit\.pt does not fit: its stages 0 depth is 0 blocks, this model's 1"):
        weights.load(model, save(timm_file(), "vit.pt"))
    with pytest.raises(ValueError, match="does not fit: it has nothing of this model, which starts with stem.conv"):
        weights.load_state(model, {"cls_token": torch.zeros(1, 1, 8)}, "a dict")
    same(model.state_dict(), before)


# ---------------------------------------------------------------------------------------------
# Frozen: DINO and CLIP
# ---------------------------------------------------------------------------------------------


TINY = dict(patch_size=4, dim=24, depth=2, num_heads=2)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(vit.ARCHS, "vit_tiny4", TINY)
    return "vit_tiny4"


def test_a_dino_file_gives_a_frozen_vit_with_its_features(tiny, save):
    """timm's names, no head. The teacher's, where a file holds both."""
    dino = oracles.filled(vit.create(tiny, 12, 0)).float()
    both = {"student": prefixed({n: 0 * v for n, v in dino.state_dict().items()}, "module.backbone.")}
    both["teacher"] = prefixed(dino.state_dict(), "backbone.")
    for content in (dino.state_dict(), both):
        frozen = weights.load_frozen("dino", tiny, 12, save(content, "dino.pt"))
        assert not frozen.training
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
        images = random(2, 3, 12, 12)
        assert torch.equal(frozen.head(frozen.encode(images)), dino.encode(images))


def clip_file(D=24, P=4, out=6):
    """Random weights of CLIP's visual tower with its own names, in half precision, and something of its text tower."""
    state = {
        "visual.conv1.weight": oracles.random(D, 3, P, P),
        "visual.class_embedding": oracles.random(D),
        "visual.proj": oracles.random(D, out),
    }
    state |= {"visual.positional_embedding": oracles.random(10, D), "positional_embedding": oracles.random(77, 8)}
    state |= {"logit_scale": oracles.random(), "transformer.resblocks.0.ln_1.weight": oracles.random(8)}
    layers = {"attn.in_proj_": (3 * D, D), "attn.out_proj.": (D, D), "mlp.c_fc.": (4 * D, D), "mlp.c_proj.": (D, 4 * D)}
    norms = ["ln_pre.", "ln_post."]
    for i in range(2):
        block = f"transformer.resblocks.{i}."
        norms += [block + "ln_1.", block + "ln_2."]
        for layer, shape in layers.items():
            state[f"visual.{block}{layer}weight"] = oracles.random(*shape, seed=len(state))
            state[f"visual.{block}{layer}bias"] = oracles.random(shape[0], seed=len(state))
    for norm in norms:
        state |= {f"visual.{norm}{what}": oracles.random(D, seed=len(state)) for what in ("weight", "bias")}
    return {name: (value / 2).half() for name, value in state.items()}


def clip_numpy(image, w, heads, P):
    """CLIP's visual tower in NumPy: image (C, H, W) -> tokens (1 + N, out). Pre-norm, eps 1e-5, quick GELU."""

    def norm(x, name):
        x = x - x.mean(axis=1, keepdims=True)
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * w[name + ".weight"] + w[name + ".bias"]

    places = [(top, left) for top in range(0, image.shape[1], P) for left in range(0, image.shape[2], P)]
    cuts = [image[:, top : top + P, left : left + P] for top, left in places]
    x = [w["class_embedding"]] + [(w["conv1.weight"] * cut).sum(axis=(1, 2, 3)) for cut in cuts]
    x = norm(np.array(x) + w["positional_embedding"], "ln_pre")
    for i in range(2):
        block = f"transformer.resblocks.{i}."
        qkv = norm(x, block + "ln_1") @ w[block + "attn.in_proj_weight"].T + w[block + "attn.in_proj_bias"]
        heads_out = []
        for q, k, v in zip(*(np.split(part, heads, axis=1) for part in np.split(qkv, 3, axis=1)), strict=True):
            A = np.exp(q @ k.T / np.sqrt(q.shape[1]))
            heads_out.append(A / A.sum(axis=1, keepdims=True) @ v)
        x = x + np.hstack(heads_out) @ w[block + "attn.out_proj.weight"].T + w[block + "attn.out_proj.bias"]
        h = norm(x, block + "ln_2") @ w[block + "mlp.c_fc.weight"].T + w[block + "mlp.c_fc.bias"]
        h = h / (1 + np.exp(-1.702 * h))
        x = x + h @ w[block + "mlp.c_proj.weight"].T + w[block + "mlp.c_proj.bias"]
    return norm(x, "ln_post") @ w["proj"]


def test_a_clip_file_gives_projected_features_of_its_visual_tower(tiny, save):
    """Its own names and its own arithmetic; the text tower is left alone."""
    state, images = clip_file(), oracles.random(2, 3, 12, 12)
    frozen = weights.load_frozen("clip", tiny, 12, save(state, "clip.pt"))
    assert frozen.patch_embed.proj.weight.dtype == torch.float32
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    w = {name.removeprefix("visual."): v.double().numpy() for name, v in state.items() if name.startswith("visual.")}
    frozen = frozen.double()
    equal(frozen.head(frozen.encode(images)), np.stack([clip_numpy(image, w, 2, 4) for image in images.numpy()]))


@pytest.mark.parametrize("missing", ["pos_embed", "cls_token", "norm.weight"])
def test_a_frozen_model_without_one_of_its_parts_is_refused(missing, tiny, save):
    """What is at its initial value gives features of nothing, and nobody would learn of it."""
    state = oracles.filled(vit.create(tiny, 12, 0)).state_dict()
    del state[missing]
    with pytest.raises(ValueError, match=rf"dino.pt does not fit: .*{missing}|dino.pt does not fit: .*no class token"):
        weights.load_frozen("dino", tiny, 12, save(state, "dino.pt"))


def test_a_frozen_model_whose_first_layer_is_a_number_is_refused(tiny, save):
    state = vit.create(tiny, 12, 0).state_dict() | {"patch_embed.proj.weight": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=r"dino.pt does not fit: its patch_embed.proj.weight"):
        weights.load_frozen("dino", tiny, 12, save(state, "dino.pt"))


def test_a_frozen_model_takes_images_of_one_channel_and_says_so(tiny, save, capsys):
    dino = oracles.filled(vit.create(tiny, 12, 0)).float()
    frozen, grey = weights.load_frozen("dino", tiny, 12, save(dino.state_dict(), "dino.pt"), 1), random(2, 1, 12, 12)
    oracles.equal(frozen.encode(grey), dino.encode(grey.expand(-1, 3, -1, -1)).detach().double().numpy(), atol=1e-4)
    assert capsys.readouterr().out.endswith("dino.pt: patch_embed.proj.weight summed over 3 channels, for 1\n")


@pytest.mark.parametrize("target", ["dino", "clip"])
@pytest.mark.parametrize(("what", "size"), [("patch size", dict(P=2)), ("width", dict(D=32))])
def test_frozen_weights_of_another_size_are_refused_with_both_sizes(target, what, size, tiny, save):
    """Patches have to correspond to the student's."""
    if target == "clip":
        state = clip_file(**size)
    else:
        state = vit.ViT(12, size.get("P", 4), num_classes=0, dim=size.get("D", 24), depth=2, num_heads=2).state_dict()
    given, ours = (2, 4) if what == "patch size" else (32, 24)
    with pytest.raises(ValueError, match=rf"other.pt: its {what} is {given}, that of {tiny} is {ours}\b"):
        weights.load_frozen(target, tiny, 12, save(state, "other.pt"))


def test_a_file_without_a_visual_tower_is_refused(tiny, save):
    text = {name: value for name, value in clip_file().items() if not name.startswith("visual.")}
    flat = [clip_file() | {f"visual.{name}": torch.tensor(1.0)} for name in ("proj", "class_embedding", "conv1.weight")]
    for state in (vit.create(tiny, 12, 0).state_dict(), text, {}, *flat):
        with pytest.raises(ValueError, match=r"text.pt holds no visual tower of CLIP"):
            weights.load_frozen("clip", tiny, 12, save(state, "text.pt"))


# ---------------------------------------------------------------------------------------------
# Hugging Face
# ---------------------------------------------------------------------------------------------


# Theirs by ours, as their files have had them since 2021, and as version 5 of transformers has them inside.
HUGGING_FACE = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "head": "classifier",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder.norm": "decoder.decoder_norm",
    "decoder.pred": "decoder.decoder_pred",
}
HUGGING_FACE_BLOCK = {
    "files": {
        "attn.q": "attention.attention.query",
        "attn.k": "attention.attention.key",
        "attn.v": "attention.attention.value",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    "version 5": {
        "attn.q": "attention.q_proj",
        "attn.k": "attention.k_proj",
        "attn.v": "attention.v_proj",
        "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
}
HUGGING_FACE_STACKS = {  # of the encoder and of MAE's decoder
    "files": ("vit.encoder.layer", "decoder.decoder_layers"),
    "files of version 5": ("vit.encoder.layer", "decoder.decoder_encoder.layer"),
    "inside version 5": ("vit.layers", "decoder.decoder_layers"),
}


def hugging_face_file(state, kind):
    """A state dict under our names as one of theirs: q, k and v apart."""
    block = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    block |= HUGGING_FACE_BLOCK["version 5" if kind == "inside version 5" else "files"]
    out = {}
    for name, value in state.items():
        layer, _, what = name.rpartition(".")
        inside = re.fullmatch(r"(decoder\.)?blocks\.(\d+)\.(.*)", layer)
        if not inside:
            out[f"{HUGGING_FACE[layer]}.{what}" if layer in HUGGING_FACE else HUGGING_FACE[name]] = value
            continue
        prefix = f"{HUGGING_FACE_STACKS[kind][inside[1] is not None]}.{inside[2]}"
        names = [f"attn.{letter}" for letter in "qkv"] if inside[3] == "attn.qkv" else [inside[3]]
        for part, values in zip(names, value.chunk(len(names)), strict=True):
            out[f"{prefix}.{block[part]}.{what}"] = values
    return out


@pytest.mark.parametrize("kind", HUGGING_FACE_STACKS)
@pytest.mark.parametrize("model", ["classifier", "encoder alone", "masked autoencoder"])
def test_hugging_faces_names_are_read(save, kind, model):
    """Written out by hand above; that their models run on them is compared below, where transformers is installed."""
    state = filled(small(num_classes=0 if model == "encoder alone" else CLASSES).state_dict())
    if model == "masked autoencoder":
        state = filled({n.removeprefix("encoder."): v for n, v in student(loss_predictor=False).state_dict().items()})
    file = hugging_face_file(state, kind)
    if model == "encoder alone":
        file = {name.removeprefix("vit."): value for name, value in file.items()}
        file |= {"pooler.dense.weight": torch.zeros(D, D), "pooler.dense.bias": torch.zeros(D)}
    same(weights.read(save(file, "vit.pt")), state)


@pytest.mark.parametrize("missing", ["attn.k.bias", "attn.v.weight"])
def test_q_k_and_v_have_to_have_one_shape(save, missing):
    block, what = HUGGING_FACE_BLOCK["files"], missing.rpartition(".")[2]
    file = hugging_face_file(filled(small().state_dict()), "files")
    name = f"vit.encoder.layer.0.{block[missing.rpartition('.')[0]]}.{what}"
    for change in ({}, {name: file.pop(name)[1:]}):
        with pytest.raises(ValueError, match=r"vit\.pt does not fit: q, k and v of blocks\.0\.attn\."):
            weights.read(save(file | change, "vit.pt"))


@pytest.mark.parametrize("here", [(4, 10), (8, 8)])
def test_positions_of_hugging_faces_files_are_interpolated_by_torch(save, here):
    """interpolate_pos_encoding of transformers' ViTEmbeddings: bicubic, without antialias."""
    there, model = oracles.filled(square()), square(img_size=here).double()
    weights.load(model, save(hugging_face_file(there.state_dict(), "files"), "vit.pt"))
    theirs = interpolated_by_torch(there.pos_embed, (3, 3), model.grid)
    oracles.equal(model.pos_embed, theirs.detach().numpy(), "torch's bicubic", 1e-10)


def test_what_is_written_for_hugging_face_has_its_names(tmp_path):
    model = small()
    state = filled(model.state_dict())
    model.load_state_dict(state)
    weights.write(model, tmp_path / "model.safetensors", "hugging-face")
    same(safetensors.torch.load_file(tmp_path / "model.safetensors"), hugging_face_file(state, "files"))


PEER = "the peer of this comparison is an optional package: pip install -r requirements-parity.txt"


def hugging_face(model, path, names):
    """Its weights as files hold them ("file": names since 2021), or under the names inside this version ("inside")."""
    model.load_state_dict(filled(model.state_dict()))
    model.eval().requires_grad_(False)
    if names == "inside":
        torch.save(model.state_dict(), path / "pytorch_model.bin")
        return path / "pytorch_model.bin"
    model.save_pretrained(path)
    assert any("attention.attention.query" in n for n in safetensors.torch.load_file(path / "model.safetensors")), (
        "this version writes other names: the test of the old ones needs them written by hand"
    )
    return path / "model.safetensors"


def vit_config(transformers, **options):
    size = dict(hidden_size=D, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=4 * D)
    return transformers.ViTConfig(**(size | dict(image_size=32, patch_size=P, num_labels=CLASSES) | options))


@pytest.mark.parametrize("names", ["file", "inside"])
def test_hugging_face_classifier_gives_equal_logits(tmp_path, names):
    """Its default eps is 1e-12, which no name in the file says."""
    transformers = pytest.importorskip("transformers", reason=PEER)
    peer = transformers.ViTForImageClassification(vit_config(transformers))
    ours = load(small(eps=1e-12).double(), hugging_face(peer, tmp_path, names))
    images = oracles.random(3, 3, 32, 32)
    equal(ours(images), peer.double()(images).logits)


@pytest.mark.parametrize("img_size", [48, (64, 24)], ids=["larger", "oblong"])
def test_hugging_face_at_another_size_gives_equal_logits(tmp_path, img_size):
    """Theirs interpolate positions whenever they run, ours once, as the file is loaded."""
    transformers = pytest.importorskip("transformers", reason=PEER)
    peer = transformers.ViTForImageClassification(vit_config(transformers))
    ours = small(eps=1e-12, img_size=img_size).double()
    assert len(weights.load(ours, hugging_face(peer, tmp_path, "file"))) == 1
    images = oracles.random(3, 3, *ours.img_size)
    theirs = peer.double()(images, interpolate_pos_encoding=True).logits
    equal(ours.eval()(images), theirs, 1e-5)  # positions rounded to float32, as the file has them


@pytest.mark.parametrize("names", ["file", "inside"])
def test_hugging_face_encoder_alone_gives_equal_tokens(tmp_path, names):
    """ViTModel: no `vit.` before its names, and a pooler, which is left out."""
    transformers = pytest.importorskip("transformers", reason=PEER)
    peer = transformers.ViTModel(vit_config(transformers))
    ours = load(small(eps=1e-12, num_classes=0).double(), hugging_face(peer, tmp_path, names))
    images = oracles.random(3, 3, 32, 32)
    equal(ours.encode(images), peer.double()(images).last_hidden_state)


@pytest.mark.slow
@pytest.mark.parametrize("img_size", [224, 384])
def test_hugging_face_vit_b16_gives_equal_logits(tmp_path, img_size):
    transformers = pytest.importorskip("transformers", reason=PEER)
    size = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
    config = vit_config(transformers, **size, image_size=img_size, patch_size=16, num_labels=1000)
    peer = transformers.ViTForImageClassification(config)
    ours = load(vit.create("vit_b16", img_size, eps=1e-12), hugging_face(peer, tmp_path, "file"))
    images = random(2, 3, img_size, img_size)
    equal(ours(images), peer(images).logits, FLOAT32)


def hugging_face_mae(folder, names, img_size=32, formula=True, **options):
    """A ViTMAEForPreTraining with random weights and the file that it writes: peer, path.

    Some versions start with positions of zeros, so they are given here: those of the formula, or random ones.
    """
    transformers = pytest.importorskip("transformers", reason=PEER)
    size = dict(hidden_size=D, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=4 * D)
    size |= dict(decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=4)
    size |= dict(decoder_intermediate_size=128, patch_size=P, layer_norm_eps=1e-6)
    peer = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**(size | options), image_size=img_size))
    values = filled(peer.state_dict())
    for name in ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"):
        if formula:
            side = img_size // peer.config.patch_size
            values[name] = vit.sincos_pos_embed(values[name].shape[-1], (side, side))
    peer.load_state_dict(values)
    peer.eval().requires_grad_(False)
    if names == "inside":
        torch.save(peer.state_dict(), folder / "pytorch_model.bin")
        return peer, folder / "pytorch_model.bin"
    peer.save_pretrained(folder)
    path = folder / "model.safetensors"
    if names == "file":
        file = safetensors.torch.load_file(path)
        file = {n.replace("decoder_encoder.layer.", "decoder_layers."): value for n, value in file.items()}
        assert "decoder.decoder_layers.1.attention.attention.query.weight" in file
        safetensors.torch.save_file(file, path)
    return peer, path


def equal_reconstructions(ours, peer, img_size, batch=3, atol=1e-10):
    """Reconstruction of the hidden patches and loss, for the same noise: it sorts the same patches out."""
    dtype = torch.float64 if atol < 1e-6 else torch.float32
    ours, peer = ours.to(dtype), peer.to(dtype)
    patch_size = peer.config.patch_size
    N = (img_size // patch_size) ** 2
    images = random(batch, 3, img_size, img_size).to(dtype)
    noise = torch.rand(batch, N, generator=torch.Generator().manual_seed(1))
    out = peer(images, noise=noise)
    visible, hidden = split(noise, N // 4)
    with torch.no_grad():
        prediction, _ = ours(images, visible, hidden)
    equal(prediction, vit.gather(out.logits, hidden), atol)
    target = vit.patchify(images, patch_size)
    target = hpm.normalise_patches(target)[0] if peer.config.norm_pix_loss else target
    loss = hpm.reconstruction_loss(prediction, vit.gather(target, hidden)).mean()
    assert loss.item() == pytest.approx(out.loss.item(), abs=2 * atol)


@pytest.mark.parametrize("norm_pix_loss", [False, True], ids=["pixels", "normalised pixels"])
@pytest.mark.parametrize("names", ["file", "file of this version", "inside"])
def test_hugging_face_mae_gives_equal_reconstructions_and_loss(tmp_path, names, norm_pix_loss):
    """The public files say decoder_layers; version 5 writes another name, and has a third one inside."""
    peer, path = hugging_face_mae(tmp_path, names, norm_pix_loss=norm_pix_loss)
    equal_reconstructions(autoencoder(path, loss_predictor=False), peer, 32)


def test_positions_of_its_own_give_equal_reconstructions(tmp_path):
    """Whatever its positions are, the function of the file is what they make of it."""
    peer, path = hugging_face_mae(tmp_path, "file", formula=False)
    ours = student(loss_predictor=False).eval()
    assert all("positions" in note for note in weights.load(ours, path))
    equal_reconstructions(ours, peer, 32)


@pytest.mark.slow
@pytest.mark.parametrize("img_size", [224, 384])
def test_hugging_face_mae_of_vit_b16_gives_equal_reconstructions(tmp_path, img_size):
    """With the eps of its public files, which is not that of MAE's code."""
    size = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, patch_size=16)
    size |= dict(decoder_hidden_size=512, decoder_num_hidden_layers=8, decoder_num_attention_heads=16)
    size |= dict(decoder_intermediate_size=2048, layer_norm_eps=1e-12, norm_pix_loss=True)
    peer, path = hugging_face_mae(tmp_path, "file", img_size, **size)
    ours = hpm.create("vit_b16", img_size, mask="random", predictor="none").student.eval()
    assert weights.load(ours, path) == []
    equal_reconstructions(ours, peer, img_size, batch=1, atol=FLOAT32)


# ---------------------------------------------------------------------------------------------
# Google
# ---------------------------------------------------------------------------------------------


def google_file(model, prefix="", pre_logits=False):
    """Random weights for Google's Flax model of the same size as one of ours, under its names and in its axes."""
    dim, k, depth = model.pos_embed.shape[-1], model.blocks[0].attn.num_heads, len(model.blocks)
    head_dim, hidden, size = dim // k, model.blocks[0].mlp.fc1.out_features, model.patch_size
    shapes = {"cls": (1, 1, dim), "embedding/kernel": (size, size, 3, dim), "embedding/bias": (dim,)}
    shapes["Transformer/posembed_input/pos_embedding"] = tuple(model.pos_embed.shape)
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}/"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}{norm}/scale": (dim,), f"{block}{norm}/bias": (dim,)}
        attention = f"{block}MultiHeadDotProductAttention_1/"
        for part in ("query", "key", "value"):
            shapes |= {f"{attention}{part}/kernel": (dim, k, head_dim), f"{attention}{part}/bias": (k, head_dim)}
        shapes |= {f"{attention}out/kernel": (k, head_dim, dim), f"{attention}out/bias": (dim,)}
        shapes |= {f"{block}MlpBlock_3/Dense_0/kernel": (dim, hidden), f"{block}MlpBlock_3/Dense_0/bias": (hidden,)}
        shapes |= {f"{block}MlpBlock_3/Dense_1/kernel": (hidden, dim), f"{block}MlpBlock_3/Dense_1/bias": (dim,)}
    shapes |= {"Transformer/encoder_norm/scale": (dim,), "Transformer/encoder_norm/bias": (dim,)}
    if pre_logits:
        shapes |= {"pre_logits/kernel": (dim, dim), "pre_logits/bias": (dim,)}
    shapes |= {"head/kernel": (dim, model.head.out_features), "head/bias": (model.head.out_features,)}
    generator, out = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        inputs = np.prod(shape[:-1]) if "out/" in name or "embedding/" in name else shape[0]
        scale = inputs**-0.5 if name.endswith("kernel") else 0.3
        values = scale * generator.standard_normal(shape) + name.endswith("scale")
        out[prefix + name] = values.astype(np.float32)
    return out


def google_numpy(image, w):
    """Google's forward pass, image (H, W, C) -> logits, with the arrays as its file has them. GELU by tanh."""

    def layer_norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return normed * w[f"{name}/scale"] + w[f"{name}/bias"]

    kernel = w["embedding/kernel"]
    size, dim = kernel.shape[0], kernel.shape[-1]
    rows, columns = image.shape[0] // size, image.shape[1] // size
    patches = image.reshape(rows, size, columns, size, 3)
    x = np.einsum("rhcwi,hwid->rcd", patches, kernel, optimize=True).reshape(-1, dim) + w["embedding/bias"]
    x = np.concatenate([w["cls"][0], x]) + w["Transformer/posembed_input/pos_embedding"][0]
    for i in range(sum(name.endswith("LayerNorm_0/scale") for name in w)):
        block = f"Transformer/encoderblock_{i}/"
        a, y = f"{block}MultiHeadDotProductAttention_1/", layer_norm(x, f"{block}LayerNorm_0")
        q, k, v = (
            np.einsum("td,dhe->hte", y, w[f"{a}{part}/kernel"], optimize=True) + w[f"{a}{part}/bias"][:, None]
            for part in ("query", "key", "value")
        )
        score = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        A = np.exp(score - score.max(-1, keepdims=True))
        A /= A.sum(-1, keepdims=True)
        x = x + np.einsum("hte,hed->td", A @ v, w[f"{a}out/kernel"], optimize=True) + w[f"{a}out/bias"]
        m, y = f"{block}MlpBlock_3/", layer_norm(x, f"{block}LayerNorm_2")
        h = y @ w[f"{m}Dense_0/kernel"] + w[f"{m}Dense_0/bias"]
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + h @ w[f"{m}Dense_1/kernel"] + w[f"{m}Dense_1/bias"]
    y = layer_norm(x, "Transformer/encoder_norm")[0]
    if "pre_logits/kernel" in w:
        y = np.tanh(y @ w["pre_logits/kernel"] + w["pre_logits/bias"])
    return y @ w["head/kernel"] + w["head/bias"]


def google_logits(images, arrays):
    arrays = {name.removeprefix("opt/target/"): value.astype(np.float64) for name, value in arrays.items()}
    return torch.tensor(np.stack([google_numpy(i, arrays) for i in images.double().permute(0, 2, 3, 1).numpy()]))


@pytest.mark.parametrize(
    ("head", "prefix"),
    [("linear", ""), ("mlp", ""), ("mlp", "opt/target/")],
    ids=["AugReg, or fine-tuned", "pre-trained on ImageNet-21k", "beside the optimizer"],
)
def test_google_npz_gives_equal_logits(tmp_path, head, prefix):
    """Kernels have inputs first and heads apart. With the exact GELU in place of tanh the logits differ more."""
    model = small(head=head, gelu="tanh").double()
    arrays = google_file(model, prefix, pre_logits=head == "mlp")
    np.savez(tmp_path / "vit.npz", **arrays)
    images = oracles.random(2, 3, 32, 32)
    equal(load(model, tmp_path / "vit.npz")(images), google_logits(images, arrays))


@pytest.mark.slow
@pytest.mark.parametrize("img_size", [224, 384])
def test_google_npz_of_vit_b16_gives_equal_logits(tmp_path, img_size):
    model = vit.create("vit_b16", img_size, gelu="tanh")
    arrays = google_file(model)
    np.savez(tmp_path / "vit.npz", **arrays)
    images = random(1, 3, img_size, img_size)
    with torch.no_grad():
        equal(load(model, tmp_path / "vit.npz")(images), google_logits(images, arrays), FLOAT32)


@pytest.mark.parametrize("options", [dict(), dict(pool="mean"), dict(pool="mean", class_token=False)], ids=str)
def test_googles_mean_over_patches_is_refused_by_its_name(tmp_path, options, save):
    """-gap-norep (configs/models.py): no class token, and the mean of what the last LayerNorm gives (models_vit.py).

    Ours, as MAE's, is the LayerNorm of the mean: another function. timm's names for such a model say the same.
    """
    arrays = google_file(small())
    del arrays["cls"]
    arrays["Transformer/posembed_input/pos_embedding"] = arrays["Transformer/posembed_input/pos_embedding"][:, 1:]
    np.savez(tmp_path / "gap.npz", **arrays)
    path = save({name: torch.tensor(0.0) + value for name, value in weights.read(tmp_path / "gap.npz").items()}, "gap")
    for file in (tmp_path / "gap.npz", path):
        with pytest.raises(ValueError, match="gap.* no class token, and the mean over patches .*-gap-norep"):
            weights.load(small(**options), file)


@pytest.mark.parametrize(("there", "here"), [("mlp", "linear"), ("linear", "mlp")])
def test_a_head_is_not_taken_without_the_layer_before_it(there, here, save):
    """Google's files of ImageNet-21k have pre_logits: the head alone would read what it has never seen."""
    model = small(head=here)
    notes = weights.load(model, save(filled(small(head=there).state_dict()), "vit.pth"))
    assert notes[0] == "head left at its initial value: the layer before it, pre_logits, is on one side alone"
    assert notes[1:] == ["not used: pre_logits" if there == "mlp" else "left at the initial value: pre_logits"]
    assert not model.head.weight.any()


@pytest.mark.parametrize(("old", "new"), [((8, 8), (12, 12)), ((8, 8), (4, 4)), ((8, 8), (6, 10)), ((4, 16), (8, 12))])
def test_positions_of_a_google_file_are_zoomed_as_its_authors_do(tmp_path, old, new):
    """scipy.ndimage.zoom of order 1, as in vit_jax/checkpoint.py, interpolate_posembed; not timm's bicubic."""
    there, here = (square(img_size=size, gelu="tanh") for size in (old, new))
    arrays = google_file(there)
    np.savez(tmp_path / "vit.npz", **arrays)
    known = dict(grid=there.grid) if old[0] != old[1] else {}
    notes = weights.load(here, tmp_path / "vit.npz", **known)
    assert notes == ["positions interpolated from {}x{} to {}x{}".format(*there.grid, *here.grid)]
    pos_embed = arrays["Transformer/posembed_input/pos_embedding"].astype(np.float64)
    factors = (here.grid[0] / there.grid[0], here.grid[1] / there.grid[1], 1)
    zoomed = scipy.ndimage.zoom(pos_embed[0, 1:].reshape(*there.grid, -1), factors, order=1)
    oracles.equal(here.pos_embed[:, 1:], zoomed.reshape(1, -1, 8), "linear, both ends kept", 1e-6)
    assert np.array_equal(here.pos_embed[:, :1].detach().numpy(), pos_embed[:, :1].astype(np.float32))


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({"MAPHead_0/probe": np.zeros((1, 1, D))}, "MAPHead_0/probe"),
        ({"Transformer/encoderblock_0/MultiHeadDotProductAttention_1/key/bias": None}, "q, k and v"),
        ({"embedding/kernel": np.zeros((3, 3))}, "embedding/kernel"),
        ({"cls": np.array(["a"])}, "."),
    ],
    ids=["attention pooling", "no key bias", "an axis less", "text"],
)
def test_a_google_file_that_does_not_fit_is_refused(tmp_path, extra, match):
    arrays = google_file(small()) | extra
    np.savez(tmp_path / "vit.npz", **{name: value for name, value in arrays.items() if value is not None})
    one_line(tmp_path / "vit.npz", match)


# ---------------------------------------------------------------------------------------------
# Write
# ---------------------------------------------------------------------------------------------


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    """Whatever the layout in memory: parameters that learn, views, half precision, one tensor under two names."""
    model = small()
    model.load_state_dict(filled(model.state_dict()))
    model.blocks[0].attn.proj.weight.data = model.blocks[0].attn.proj.weight.data.T
    model.blocks[1].attn.qkv.bias.data = model.blocks[1].attn.qkv.bias.data.half()
    model.blocks[1].norm1.bias = model.blocks[0].norm1.bias
    weights.write(model, tmp_path / "new" / "vit.safetensors")
    same(weights.read(tmp_path / "new" / "vit.safetensors"), dict(model.state_dict()))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["vit.safetensors"], "a temporary file was left"


def test_a_write_that_fails_leaves_the_file_before_it_whole(tmp_path, monkeypatch):
    model, path = small(), tmp_path / "vit.safetensors"
    weights.write(model, path)
    before = copied(model)

    def full_disk(tensors, name, metadata):
        Path(name).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    model.head.bias.data += 1
    with pytest.raises(OSError, match="no space"):
        weights.write(model, path)
    same(weights.read(path), before)
    assert [file.name for file in tmp_path.iterdir()] == ["vit.safetensors"]


@pytest.mark.parametrize("head", [dict(), dict(num_classes=0)], ids=["classifier", "encoder alone"])
@pytest.mark.parametrize("layout", ["timm", "hugging-face"])
def test_saved_weights_come_back_whatever_the_layout(tmp_path, layout, head):
    first, second = small(**head), small(**head)
    first.load_state_dict(filled(first.state_dict()))
    vit.save_weights(first, tmp_path / "vit.safetensors", layout)
    load(second, tmp_path / "vit.safetensors")
    same(second.state_dict(), first.state_dict())


OPTIONS = [dict(pool="mean"), dict(pool="mean", class_token=False), dict(head="mlp"), dict(pre_norm=True)]


@pytest.mark.parametrize("options", [dict(pos_embed="sincos"), *OPTIONS], ids=str)
def test_every_kind_of_vit_comes_back_from_its_file(tmp_path, options):
    first, second = small(**options), small(**options)
    first.load_state_dict(filled(first.state_dict()))
    first.pos_embed.data = second.pos_embed.data  # what training leaves as it is
    vit.save_weights(first, tmp_path / "vit.safetensors")
    load(second, tmp_path / "vit.safetensors")
    same(second.state_dict(), first.state_dict())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_hugging_faces_vit_lacks_is_not_written_for_it(tmp_path, options):
    with pytest.raises(ValueError, match="Hugging Face's ViT has no .*layout timm"):
        vit.save_weights(small(**options), tmp_path / "vit.safetensors", "hugging-face")
    with pytest.raises(ValueError, match="unknown layout 'jax'; there are timm and hugging-face"):
        vit.save_weights(small(**options), tmp_path / "vit.safetensors", "jax")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("gelu", "name"), [("none", "gelu"), ("tanh", "gelu_pytorch_tanh")])
def test_hugging_face_loads_what_we_write_and_gives_it_back(tmp_path, gelu, name):
    transformers = pytest.importorskip("transformers", reason=PEER)
    ours, again = small(gelu=gelu), small(gelu=gelu)
    ours.load_state_dict(filled(ours.state_dict()))
    vit.save_weights(ours, tmp_path / "model.safetensors", "hugging-face")
    config = vit_config(transformers, layer_norm_eps=1e-6, hidden_act=name)
    peer, found = transformers.ViTForImageClassification.from_pretrained(
        tmp_path, config=config, output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    images = random(3, 3, 32, 32)
    with torch.no_grad():
        equal(ours(images), peer.eval()(images).logits, FLOAT32)
    peer.save_pretrained(tmp_path / "again")
    load(again, tmp_path / "again" / "model.safetensors")
    same(again.state_dict(), ours.state_dict())


NO_TIMM = "timm can't be imported: it needs torchvision, which is no part of the test environment"


def timm_vit(pool, img_size, **size):
    timm = pytest.importorskip("timm", reason=NO_TIMM)
    peer = timm.models.VisionTransformer(
        img_size, **size, global_pool={"cls": "token", "mean": "avg"}[pool], weight_init="skip"
    )
    peer.load_state_dict(filled(peer.state_dict()))
    return peer.eval()


B16 = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, num_classes=1000)
TIMM_SIZES = [
    pytest.param(32, dict(patch_size=P, embed_dim=D, depth=DEPTH, num_heads=HEADS, num_classes=CLASSES), id="small"),
    pytest.param(224, B16, id="B/16, 224", marks=pytest.mark.slow),
    pytest.param(384, B16, id="B/16, 384", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize(("img_size", "size"), TIMM_SIZES)
def test_timm_gives_equal_logits_both_ways(tmp_path, img_size, size, pool, save):
    """Its file into our model; ours into its. With global_pool="avg" its last norm follows the mean, as ours does."""
    peer = timm_vit(pool, img_size, **size)
    here = {name.replace("embed_dim", "dim"): value for name, value in size.items()}
    ours, again = vit.ViT(img_size, pool=pool, **here), vit.ViT(img_size, pool=pool, **here)
    load(ours, save(peer.state_dict(), "timm.pth"))
    images = random(2, 3, img_size, img_size)
    with torch.no_grad():
        equal(ours(images), peer(images), FLOAT32)

    import timm

    ours.load_state_dict({name: value.flip(0) for name, value in ours.state_dict().items()})
    vit.save_weights(ours, tmp_path / "vit.safetensors")
    timm.models.load_checkpoint(peer, str(tmp_path / "vit.safetensors"), strict=True)
    with torch.no_grad():
        equal(ours(images), peer(images), FLOAT32)
    load(again, save({"state_dict": peer.state_dict()}, "again.pth"))
    same(again.state_dict(), ours.state_dict())
