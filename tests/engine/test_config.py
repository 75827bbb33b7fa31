"""What engine/config.py promises: one frozen configuration, and for every mistake one line that helps."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import hpm
import train
import vit
from engine import config as flags
from engine import distributed, files, scenes
from tests.engine.runs import MICRO, run, settings, small_photos, write_images


def test_a_configuration_is_frozen_and_complete(small):
    """Nothing changes in the middle of a run: every field has a value that is its own."""
    config, _ = settings(MICRO)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = (0.1,)
    missing = {field.name for field in flags.FIELDS if getattr(config, field.name) is None}
    named = (
        "data_dir labels test_images deduplicate init init_grid images out epochs evaluations target_weights workers"
    )
    assert missing == set(named.split())


def test_what_is_saved_gives_the_same_configuration_back(small):
    """Through JSON, which knows no tuples. Where the run is, and how it was started, is not part of it."""
    config, _ = settings(f"{MICRO} --task hpm --lr 0.01 --alpha 0,0.4 --img-size 16x24 --out here --overwrite")
    saved = json.loads(json.dumps(flags.saved_values(config)))
    assert saved.keys().isdisjoint({"out", "overwrite", "resume"})
    again = flags.resumed(flags.parse(["--resume", "--out", "there"]), saved, Path("there/config.json"))
    assert again == dataclasses.replace(config, out="there", overwrite=False, resume=True)


@pytest.mark.parametrize("flag", ["--device cpu", "--dtype bfloat16", "--compile", "--data-dir x", "--checkpointing"])
def test_what_does_not_change_a_run_may_be_given_anew(flag, small, monkeypatch):
    """The machine may be another one when it goes on."""
    if "--data-dir" in flag:
        monkeypatch.setattr(data, "fashion_mnist", lambda path: small_photos())
    config, _ = settings(f"{MICRO} --data fashion-mnist" if "--data-dir" in flag else MICRO)
    given = flags.parse(["--resume", *flag.split()])
    again = flags.resumed(given, flags.saved_values(config), Path("run/config.json"))
    name, *value = flag[2:].replace("-", "_").split()
    assert getattr(again, name) == (value[0] if value else True)


def test_help_fits_one_screen_and_names_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert run("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 61
    assert max(map(len, lines)) <= 120
    named = {line.split()[0].rstrip(",") for line in lines if line.startswith("  --")}
    assert named == {
        f"--{field.name.replace('_', '-')}" for field in flags.FIELDS if field.metadata["metavar"] is not None
    }


@pytest.mark.parametrize(
    ("command", "size"),
    [
        ("--data fashion-mnist --arch vit_micro4", (28, 28)),
        ("--data fashion-mnist --arch vit_micro7", (28, 28)),
        ("--data fashion-mnist --arch vit_b16", (224, 224)),
        ("--data scenes --arch vit_b8", (64, 64)),
        ("--data scenes --arch vit_b16", (224, 224)),
        ("--data scenes-many --arch vit_b16", (224, 224)),
        ("--data cifar10 --arch vit_micro4", (32, 32)),
        ("--arch vit_micro4", (32, 32)),
        ("--arch vit_b16", (224, 224)),
        ("--arch vit_b8", (224, 224)),
        ("--arch resnet50", (224, 224)),
        ("--arch vit_micro4 --img-size 192x256", (192, 256)),
        ("--arch vit_micro4 --img-size 64", (64, 64)),
    ],
)
def test_the_image_size_is_the_datas_own_or_224_or_what_is_given(command, size, small, monkeypatch):
    """Seven patches a side are enough, six are not; of vit_micro7's, which are made for 28 pixels, four are."""
    monkeypatch.setattr(scenes, "load", lambda path, size, many: small_photos()._replace(name="scenes"))
    monkeypatch.setattr(data, "fashion_mnist", lambda path: small_photos()._replace(name="fashion-mnist"))
    monkeypatch.setattr(data, "cifar", lambda name, path: small_photos()._replace(name=name))
    assert settings(command)[0].img_size == size


def test_an_unknown_name_is_answered_with_the_nearest(small, capsys):
    assert run("--arch vit_micr4") == 2
    assert "did you mean vit_micro4?" in capsys.readouterr().err


BAD = {  # the command: words that its error has to have
    "--task supervise": "--task 'supervise' supervised finetune knn",
    "--task HPM": "--task 'HPM' hpm",
    "--arch vit_b15": "--arch 'vit_b15' vit_b16 vit_micro4",
    "--data photo": "'photo' photos fashion-mnist folder:PATH",
    "--task mae --mask blok": "--mask 'blok' block grid random",
    "--task mae --target pixel": "--target 'pixel' pixels norm-pixels hog",
    "--task hpm --predictor-loss relativ": "--predictor-loss 'relativ' relative absolute none",
    "--optimizer adam": "--optimizer 'adam' adamw sgd",
    "--decay cos": "--decay 'cos' cosine linear",
    "--dtype float16": "--dtype 'float16' bfloat16 float32",
    "--model vit_b16": "--model --help",
    "--lr fast": "--lr 'fast' --help",
    "--alpha 0.5": "--alpha '0.5' --help",
    "--img-size 30": "30x30 patch size 4 use 32x32",
    "--img-size 16x18": "16x18 patch size 4 use",
    "--img-size 0": "--img-size '0' --help",
    "--img-size 16x16x16": "--img-size '16x16x16' --help",
    "--batch-size 6 --micro-batch 4": "--micro-batch 4 --batch-size 6 divisor",
    "--epochs 1 --steps 2": "--epochs --steps one of them",
    "--steps 0": "--steps 0 above 0",
    "--epochs -1": "--epochs -1.0 above 0",
    "--epochs inf": "--epochs inf above 0",
    "--lr 0": "--lr 0.0 above 0",
    "--lr nan": "--lr nan above 0",
    "--lr 0.1,0": "--lr 0.1,0.0 above 0",
    "--lr 0.1,": "--lr '0.1,' --help",
    "--task mae --lr 0.1,0.2": "--lr mae give one",
    "--task knn --init init.pt --lr 0.1,0.2": "--lr nothing knn supervised leave it out",
    "--polyak 1": "--polyak 1.0 [0, 1)",
    "--task mae --polyak 0.9": "--polyak --task supervised finetune leave it out",
    "--polyak 0.9 --fsdp": "--polyak --fsdp leave one of them out",
    "--pos-embed 3d": "--pos-embed '3d' 2d none relative",
    "--task mae --pool mean": "--pool nothing mae leave it out",
    "--task mpp --pool mean": "--pool nothing mpp leave it out",
    "--task hpm --drop-path 0.1": "--drop-path nothing hpm leave it out",
    "--task mae --dropout 0.1": "--dropout nothing mae leave it out",
    "--pool max": "--pool 'max' cls mean",
    "--gelu relu": "--gelu 'relu' tanh exact",
    "--pixels raw": "--pixels 'raw' own half",
    "--task hpm --pos-embed sincos": "--pos-embed nothing hpm leave it out",
    "--arch resnet50 --dropout 0.1": "--dropout resnet50 leave it out",
    "--arch resnet50 --pool mean": "--pool resnet50 leave it out",
    "--arch resnet50 --drop-path 0.1": "--drop-path resnet50 leave it out",
    "--arch resnet50 --layer-decay 0.8": "--layer-decay resnet50 leave it out",
    "--arch resnet50 --gelu tanh": "--gelu resnet50 leave it out",
    "--arch resnet50 --init x.pt --init-grid 4x4": "--init-grid resnet50 leave it out",
    "--task hpm --mask random --alpha 0,1": "--alpha nothing --mask random hard leave it out",
    "--task mae --alpha 0,1": "--alpha nothing --mask random hard leave it out",
    "--task hpm --mask block --teacher in-turn": "--teacher nothing --mask block hard leave it out",
    "--task hpm --target-weights x.pt": "--target-weights nothing --target dino clip leave it out",
    "--task hpm --target ema --target-weights x.pt": "--target-weights nothing --target dino clip leave it out",
    "--workers 2": "--workers nothing folder:PATH leave it out",
    "--data-dir here": "--data-dir nothing fashion-mnist leave it out",
    "--data folder:odd --data-dir here": "--data-dir nothing fashion-mnist leave it out",
    "--init-grid 4x4": "--init-grid nothing --init leave it out",
    "--task predict --init x.pt --images x.png --resume": "--resume nothing predict leave it out",
    "--arch resnet50 --pos-embed 1d": "--pos-embed resnet50 leave it out",
    "--arch resnet50 --checkpointing": "--checkpointing resnet50 leave it out",
    "--arch resnet50 --task mae": "resnet50 convolutions masked patches",
    "--arch r50_vit_b16 --img-size 32 --task mpp": "r50_vit_b16 convolutions masked patches",
    "--deduplicate photo": "'photo' photos fashion-mnist",
    "--task fewshot": "--task fewshot --init",
    "--batch-size 0": "--batch-size 0 above 0",
    "--micro-batch 0": "--micro-batch 0 above 0",
    "--labels 0": "--labels 0 above 0",
    "--warmup -1": "--warmup -1 at least 0",
    "--seed -1": "--seed -1 at least 0",
    "--weight-decay -0.1": "--weight-decay -0.1 at least 0",
    "--mixup -1": "--mixup -1.0 at least 0",
    "--cutmix nan": "--cutmix nan at least 0",
    "--dropout 1": "--dropout 1.0 [0, 1)",
    "--drop-path 1": "--drop-path 1.0 [0, 1)",
    "--smoothing 1": "--smoothing 1.0 [0, 1)",
    "--erasing -0.5": "--erasing -0.5 [0, 1)",
    "--crop none": "--crop 'none' 2 0.2,1",
    "--crop 65": "--crop 65 up to 64 (0, 1]",
    "--crop 0.5,0.2": "--crop 0.5,0.2 up to 64 (0, 1]",
    "--crop 2": "--crop 2 pad photos 0.2,1",
    "--data scenes --crop 0.2,1": "--crop nothing scenes leave it out",
    "--task segment --data scenes-many --crop 0.2,1": "--crop nothing segment mae leave it out",
    "--layer-decay 0": "--layer-decay 0.0 (0, 1]",
    "--layer-decay 1.1": "--layer-decay 1.1 (0, 1]",
    "--randaugment 11": "--randaugment 11.0 0 to 10",
    "--randaugment 9": "--randaugment folder:PATH leave it out",
    "--task fewshot --init init.pt --labels 9": "--labels nothing fewshot knn leave it out",
    "--labels 25": "25 24 ask for fewer",
    "--task mae --mask-ratio 0": "mask ratio 0.0 between 0 and 1 0.75",
    "--task mae --mask-ratio 1": "mask ratio 1.0 between 0 and 1 0.75",
    "--task hpm --mask-ratio 0.99": "mask ratio 0.99 hides 16 of 16 leave 1",
    "--task hpm --mask-ratio 0.01": "mask ratio 0.01 hides 1 of 16 hide 2",
    "--task hpm --alpha 0,1.5": "--alpha 0.0,1.5 [0, 1] as 0,0.5",
    "--task hpm --predictor-loss none": "hard masks loss predictor relative another mask",
    "--task hpm --target dino": "--target dino --target-weights",
    "--task hpm --target clip --target-weights none.pt": "none.pt check the path",
    "--task linear": "--task linear --init",
    "--task knn": "--task knn --init",
    "--task finetune": "--task finetune --init",
    "--task finetune --init none.pt": "none.pt check the path",
    "--task finetune --init text.pt": "text.pt torch safetensors .npz",
    "--task finetune --init page.pt": "page.pt a web page",
    "--task mae --init objects.npz": "objects.npz Object arrays",
    "--task hpm --init http://nowhere.invalid/vit.pt": "http://nowhere.invalid/vit.pt closed try again",
    "--task mae --init deep.pt": "deep.pt does not fit decoder depth 3 2",
    "--task linear --init narrow.pt": "narrow.pt does not fit 32 64",
    "--data fashion-mnist --data-dir here": "fashion-mnist here can't be reached --data-dir",
    "--data folder:nowhere": "nowhere/train PATH/train/CLASS",
    "--data folder:empty": "no image empty/train/ant .png remove",
    "--data folder:odd": "odd/train odd/val differ bee only in val",
    "--resume": "nothing to resume run/config.json --out leave --resume out",
    "--fsdp": "--fsdp several processes torchrun",
    "--device cuda": "--device cuda GPU --device cpu",
}


@pytest.mark.parametrize("command", BAD)
def test_a_mistake_is_answered_in_one_line_that_helps_and_nothing_is_written(command, small, monkeypatch, capsys):
    """What was given, what is allowed, what to do; exit code 2."""
    if "folder:" in command:
        write_images("empty", ant=2, cat=1)
        for file in Path("empty/train/ant").iterdir():
            file.unlink()
        write_images("odd", ant=1)
        Path("odd/val/bee").mkdir()
        Image.new("RGB", (8, 8)).save("odd/val/bee/1.png")
    Path("text.pt").write_text("no weights")
    Path("page.pt").write_text("<html>Please log in</html>")
    if "objects.npz" in command:
        np.savez("objects.npz", cls=np.array([{}], dtype=object))
    if "deep.pt" in command:
        deep = hpm.create("vit_micro4", 16, 3, mask="random", predictor="none", decoder=(64, 3, 4))
        torch.save({"model": deep.state_dict()}, "deep.pt")
    if "narrow.pt" in command:
        torch.save(vit.ViT(16, 4, num_classes=0, dim=32, depth=6, num_heads=4).state_dict(), "narrow.pt")

    def closed(*_, **__):
        raise OSError("the network is closed")

    monkeypatch.setattr(files, "receive", closed)
    monkeypatch.setenv("VIT_CACHE", "cache")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = command.split()
    rest = [pair for pair in ("--arch vit_micro4", "--img-size 16", "--out run") if pair.split()[0] not in given]
    assert run(" ".join([command, *rest])) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1, f"not one line: {err}"
    missing = [word for word in BAD[command].split() if word not in err]
    assert not missing, f"{missing} are not in: {err}"
    assert not out, "nothing has begun"
    assert not Path("run").exists(), "a mistake leaves no folder behind"


def test_there_are_as_many_test_images_as_processes(small, monkeypatch, capsys):
    """Else one would have nothing to evaluate. What else they cannot share is in test_distributed.py."""
    few = small_photos()
    monkeypatch.setattr(data, "photos", lambda size: few._replace(test=few.test.part(torch.tensor([0]))))
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    assert run(f"{MICRO} --out run") == 2
    assert "2 processes, but 1 test images; use fewer processes" in capsys.readouterr().err


def test_there_are_as_many_gpus_as_processes_of_a_machine(small, monkeypatch, capsys):
    """However many machines there are."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(distributed, "WORLD_SIZE", 4)
    monkeypatch.setattr(distributed, "LOCAL_WORLD_SIZE", 2)
    settings(f"{MICRO} --batch-size 8 --device cuda")
    monkeypatch.setattr(distributed, "LOCAL_WORLD_SIZE", 4)
    assert run(f"{MICRO} --batch-size 8 --device cuda --out run") == 2
    assert "4 processes, but 2 GPUs" in capsys.readouterr().err


def test_a_process_gets_its_share_of_the_batch_at_once(small, monkeypatch):
    """The default micro-batch."""
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    assert settings(f"{MICRO} --batch-size 8")[0].micro_batch == 4


# ---------------------------------------------------------------------------------------------
# Values, whoever gives them
# ---------------------------------------------------------------------------------------------

# What somebody may write into a field of config.json, or a program that is not ours.
EDITS = (
    None, True, False, 0, 1, -1, 3, 0.0, 0.5, 1.0, -0.5, 2.5, 1e-320, 1e308, math.nan, math.inf, -math.inf, 2**31,
    2**63, 10**9 + 1, 10**400, "", " ", "0", "1", "0.5", "nan", "cpu", "cls", "none", "photos", "x" * 300, "a\nb",
    "a\0b", "\ud800",
    "~nouser/x", "folder:", "folder:~nouser", "../" * 2000, [], [0], [1], [0, 1], [1, 1], [0.5, 0.5], [1, 0], [1, 2, 3],
    [-1, 4], [None], [None, None], ["a", "b"], [[1, 1], [1, 1]], [True, True], [math.nan, 1], [10**400, 1], [0.2, 0.1],
    {}, {"a": 1}, [{}],
)  # fmt: skip


@pytest.mark.parametrize("field", [field for field in flags.FIELDS if field.metadata["saved"]], ids=lambda f: f.name)
@pytest.mark.parametrize("command", ["", "--task hpm", "--arch resnet50 --img-size 32"])
def test_an_edit_of_config_json_is_refused_in_one_line_or_gives_a_possible_configuration(field, command, small):
    """For each field, each edit, through JSON. What is refused names the file; what is accepted has the right type."""
    config, _ = settings(f"{MICRO} {command}")
    saved = flags.saved_values(config)
    kinds = {int | None: int, float | None: (int, float), float: (int, float), str | None: str}
    kind = kinds.get(field.type, field.type if field.type in (int, str, bool) else tuple | int)
    accepted, refused = [], []
    for edit in EDITS:
        edited = json.loads(json.dumps(saved | {field.name: edit}))
        try:
            accepted.append(flags.resumed(flags.parse(["--resume"]), edited, Path("run/config.json")))
        except ValueError as error:
            refused.append(str(error))
    assert all(message.startswith("run/config.json") for message in refused)
    assert all("\n" not in message and len(message) < 2000 for message in refused)
    assert len(accepted) < len(EDITS) / 2, "most of them are nonsense"
    for again in accepted:
        value = getattr(again, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        assert isinstance(value, kind) or (value is None and "None" in str(field.type)), value
        assert isinstance(value, bool) <= (kind is bool)
        assert all(abs(number) < 1e39 for number in numbers if isinstance(number, int | float)), value
        json.dumps(flags.saved_values(again), allow_nan=False)


# A value of a field and one that is not possible: either way it is given, what is said about it is the same.
IMPOSSIBLE = {
    "dtype": "float16", "device": "banana", "task": "train", "arch": "vit_x", "img_size": (10**9, 8), "seed": 2**63,
    "steps": 10**10, "batch_size": 10**9, "micro_batch": 0, "epochs": 1e308, "lr": (1e39,), "warmup": -1,
    "weight_decay": math.inf, "mixup": 1e4, "dropout": 1.0, "alpha": (0.0, 2.0), "mask_ratio": 1.0, "init": "",
    "data": "", "workers": -1, "labels": 10**12, "init_grid": (10**6, 1), "layer_decay": 0.0, "pool": "max",
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_the_command_line_and_config_json_are_checked_by_one_rule(name, small):
    """Given to a new run, given with --resume, or written in the file of a run."""
    value = IMPOSSIBLE[name]
    config, _ = settings(MICRO)
    shown = f"--{name.replace('_', '-')}"
    said = []
    for given, saved in (({name: value}, {}), ({}, {name: value})):
        space = flags.parse(["--resume"])
        vars(space).update(given)
        with pytest.raises(ValueError, match=shown) as error:
            flags.resumed(space, flags.saved_values(config) | saved, Path("run/config.json"))
        said.append(str(error.value).removeprefix("run/config.json: "))
    space = flags.parse([])
    vars(space)[name] = value
    with pytest.raises(ValueError, match=shown) as error:
        flags.configure(space)
    assert {*said, str(error.value)} == {said[0]}


HUGE = "9" * 400
TOO_MUCH = [
    f"--seed {HUGE}", f"--steps {HUGE}", f"--batch-size {HUGE}", f"--micro-batch {HUGE}", f"--labels {HUGE}",
    f"--warmup {HUGE}", f"--workers {HUGE}", f"--img-size {HUGE}", f"--img-size 16x{HUGE}", f"--lr {HUGE}",
    f"--epochs {HUGE}", f"--weight-decay {HUGE}", f"--mixup {HUGE}", f"--cutmix {HUGE}",
    f"--init x.pt --init-grid {HUGE}",
    f"--task hpm --alpha 0,{HUGE}", f"--task mae --mask-ratio {HUGE}", f"--device cuda:{HUGE}", f"--dropout 0.{HUGE}",
    "--epochs 1e308", "--epochs 1e7", "--steps 1000000001",
    "--img-size 1000000000", "--img-size 4100", "--batch-size 1000000000", "--seed -1", f"--seed {2**63}",
    "--labels 1000000001", "--workers 1001", "--lr nan", "--lr 1e39", "--mixup 1e308", "--randaugment 1e308",
    "--steps 3 --warmup 4", "--lr 0.1,0.1", "--lr 0.1,0.10000000001", f"--seed {'9' * 5000}",
    "--data folder:~nouser", "--data folder:", "--data-dir ~nouser --data fashion-mnist", "--init ~nouser/x.pt",
    "--out ~nouser/run", "--out=", "--init=", "--data=", "--data-dir=", "--deduplicate=",
    "--target-weights= --task hpm",
    f"--out {'x' * 256}", f"--init {'y/' * 3000}", "--out a\nb", "--init a\x01b", "--data folder:a\tb",
]  # fmt: skip


@pytest.mark.parametrize("command", TOO_MUCH, ids=[command[:40] for command in TOO_MUCH])
def test_impossible_values_are_refused_before_anything_is_loaded(command, small, monkeypatch, capsys):
    """Numbers have an upper end, too; a path can be one on any system, and a user be there."""

    def load(*_, **__):
        raise AssertionError("the data is loaded already")

    monkeypatch.setattr(data, "load", load)
    rest = (
        "--arch vit_micro4" + " --img-size 16" * ("--img-size" not in command) + " --out run" * ("--out" not in command)
    )
    arguments = f"{command} {rest}".split(" ")
    assert_refused(arguments, capsys)
    assert not any(Path().iterdir()), "nothing is written"


def assert_refused(arguments, capsys):
    """Exit code 2 and one line, not a long one."""
    try:
        code = train.main(arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert len(err) < 700


def test_a_home_folder_is_found_also_where_the_shell_leaves_its_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    given = flags.parse(["--out=~/runs/a", "--init", "~/w.pt", "--data-dir=~/d", "--images", "~"])
    assert (given.out, given.init) == ("/home/ann/runs/a", "/home/ann/w.pt")
    assert (given.data_dir, given.images) == ("/home/ann/d", "/home/ann")


# ---------------------------------------------------------------------------------------------
# Devices
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def machine(small, monkeypatch):
    """machine(gpus, mps=False, processes=1): what PyTorch and torchrun say."""

    def build(gpus=0, mps=False, processes=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(distributed, "WORLD_SIZE", processes)
        monkeypatch.setattr(distributed, "LOCAL_WORLD_SIZE", processes)

    return build


@pytest.mark.parametrize(
    ("device", "there", "words"),
    [
        ("cuda", dict(gpus=0), "finds no GPU; use --device cpu"),
        ("cuda:0", dict(gpus=0), "finds no GPU; use --device cpu"),
        ("cuda:2", dict(gpus=2), "--device cuda:2, but the GPUs are numbered up to 1"),
        ("cuda:9999", dict(gpus=8), "numbered up to 7"),
        ("cuda:0", dict(gpus=2, processes=2), "torchrun gives each process its own; use cuda or cpu"),
        ("mps", dict(), "no GPU of Apple's; use --device cpu"),
        ("mps", dict(mps=True, processes=2), "torchrun"),
        ("cuda", dict(gpus=1, processes=2), "2 processes, but 1 GPUs"),
        *((name, dict(gpus=2), "give cuda, cuda:N, mps or cpu")
          for name in ("banana", "CUDA", "cuda:", "cuda:-1", "cuda:01", "cuda: 1", "cuda:1.0", "gpu", "cpu:0", "meta")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("resume", [False, True])
def test_a_device_is_one_that_is_there(device, there, words, resume, machine):
    """Of a new run, and of one that goes on elsewhere."""
    config, _ = settings(f"{MICRO} --device cpu")
    machine(**there)
    given = flags.parse([*f"{MICRO} --device".split(), device])
    start = lambda: (  # noqa: E731
        flags.resumed(given, flags.saved_values(config), Path("run/config.json")) if resume else flags.configure(given)
    )
    with pytest.raises(ValueError, match=words):
        start()


@pytest.mark.parametrize(
    ("device", "there", "dtype", "compiles"),
    [
        ("cuda", dict(gpus=1), "bfloat16", True),
        ("cuda:1", dict(gpus=2), "bfloat16", True),
        ("mps", dict(mps=True), "float32", False),
        ("cpu", dict(gpus=2, mps=True), "float32", False),
    ],
)
def test_defaults_follow_the_kind_of_device(device, there, dtype, compiles, machine):
    machine(**there)
    config, _ = settings(f"{MICRO} --device {device}")
    assert (config.device, config.dtype, config.compile) == (device, dtype, compiles)
    assert (config.micro_batch is None) == device.startswith("cuda"), "there, what fits is measured"
    assert settings(f"{MICRO} --micro-batch 2 --device {device}")[0].micro_batch == 2


# ---------------------------------------------------------------------------------------------
# A run that goes on
# ---------------------------------------------------------------------------------------------


def resume(saved, command):
    return flags.resumed(flags.parse(["--resume", *command.split()]), saved, Path("run/config.json"))


def test_a_run_may_become_longer(small, capsys):
    """By steps or by epochs, of 24 images in batches of 4; nothing else of it changes, and it says so."""
    config, _ = settings(f"{MICRO} --task hpm")
    for given, steps, epochs in (("--steps 9", 9, None), ("--epochs 2", 12, 2.0), ("--epochs 0.9", 6, 0.9)):
        again = resume(flags.saved_values(config), given)
        longer = flags.longer(again, flags.parse(given.split()), 24)
        assert longer == dataclasses.replace(again, steps=steps, epochs=epochs)
        assert f"{steps} steps in place of 3: the schedule is that of the new length" in capsys.readouterr().out
    same = resume(flags.saved_values(config), "")
    assert flags.longer(same, flags.parse([]), 24) == same
    assert capsys.readouterr().out == ""
    for given in ("--epochs 1e6 --batch-size 4", "--steps 1000000001"):
        with pytest.raises(ValueError, match="is not possible"):
            flags.longer(resume(flags.saved_values(config), given), flags.parse(given.split()), 10**9)
    with pytest.raises(ValueError, match="one of them"):
        resume(flags.saved_values(config), "--steps 9 --epochs 2")


@pytest.mark.parametrize(
    ("flag", "old", "new", "allowed"),
    [
        ("data", "folder:here", "folder:there", True),
        ("deduplicate", "folder:here", "folder:there", True),
        ("data", "folder:here", "photos", False),
        ("data", "photos", "folder:there", False),
        ("deduplicate", None, "folder:there", False),
        ("deduplicate", "photos", "fashion-mnist", False),
        ("micro_batch", 4, "2", True),
        ("workers", None, "0", True),
        ("lr", [0.1], "0.2", False),
        ("init", "a.pt", "b.pt", False),
        ("labels", 9, "12", False),
    ],
)
def test_data_may_have_moved_and_the_machine_be_another(flag, old, new, allowed, small):
    """Another folder of images, with the same images in it; but not other data."""
    saved = flags.saved_values(settings(MICRO)[0]) | {flag: old}
    saved |= {"data": "folder:x", "crop": [0.08, 1.0]} if flag == "workers" else {}
    command = f"--{flag.replace('_', '-')} {new}"
    if allowed:
        assert str(getattr(resume(saved, command), flag)) == new
    else:
        with pytest.raises(ValueError, match="leave"):
            resume(saved, command)


@pytest.mark.parametrize("name", ["init_grid", "images", "workers", "teacher"])
def test_a_run_from_before_a_flag_goes_on_as_it_did(name, small):
    saved = flags.saved_values(settings(f"{MICRO} --task hpm")[0])
    config = resume({key: value for key, value in saved.items() if key != name}, "")
    assert getattr(config, name) == ("whole" if name == "teacher" else None)


def test_resume_and_overwrite_contradict_each_other(small, no_figures, capsys):
    assert run(f"{MICRO} --out run") == 0
    before = Path("run/config.json").read_text()
    assert run("--resume --overwrite --out run") == 2
    assert "--overwrite does nothing with --resume" in capsys.readouterr().err
    assert Path("run/config.json").read_text() == before


@pytest.mark.parametrize("content", ["[]", "3", "null", '"run"', "[[1]]"])
def test_a_file_that_is_no_configuration_is_refused(content, small):
    with pytest.raises(ValueError, match=r"config\.json holds no configuration"):
        resume(json.loads(content), "")


# ---------------------------------------------------------------------------------------------
# Prediction: a configuration without data
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["run", "run/last.pt", "moved.pt"])
def test_prediction_is_told_by_the_run_how_it_sees_images(source, small, no_figures):
    """The arch, the size, …; from the folder of a run, its checkpoint, or that alone. No data is loaded."""
    assert run(f"{MICRO} --img-size 16x24 --pool mean --gelu tanh --pixels half --pos-embed 2d --seed 3 --out run") == 0
    Path("moved.pt").write_bytes(Path("run/last.pt").read_bytes())
    config, dataset = settings(f"--task predict --init {source} --images x.png")
    assert dataset is None
    assert (config.arch, config.img_size, config.pool, config.data) == ("vit_micro4", (16, 24), "mean", "photos")
    assert (config.gelu, config.pixels, config.pos_embed) == ("tanh", "half", "2d")
    assert (config.images, config.seed, config.steps) == ("x.png", 0, 0), "the user's own"
    assert settings(f"--task predict --init {source} --images x.png --img-size 32")[0].img_size == (32, 32)


def test_prediction_of_a_masked_autoencoder_keeps_what_it_masks(small, no_figures):
    assert run(f"{MICRO} --task hpm --mask-ratio 0.5 --target norm-pixels --teacher in-turn --alpha 0,1 --out run") == 0
    config, _ = settings("--task predict --init run --images x.png")
    assert (config.mask, config.mask_ratio, config.alpha) == ("hard", 0.5, (0.0, 1.0))
    assert (config.target, config.teacher, config.predictor_loss) == ("norm-pixels", "in-turn", "relative")


def test_prediction_needs_weights_and_images(small, capsys):
    for command, word in (("--images x.png", "--init"), ("--init run.pt", "--images"), ("", "--init")):
        assert run(f"--task predict {command}") == 2
        assert word in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Commands that the pages give
# ---------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "train.py", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text):
    """What stands behind `train.py` on a page, on two lines behind a backslash; and code that is flags alone."""
    found = re.findall(r"train\.py((?: +(?:--)?[^\s`|]+)+)", text.replace("\\\n", " "))
    found += re.findall(r"`(--task [^`\n]+)`", text)
    return [command.strip().split("  ")[0] for command in found if " --" in f" {command}"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_the_pages_are_accepted(page):
    """Every flag in them does something in their task, and every value is possible."""
    for command in commands(page.read_text(encoding="utf-8")):
        words = [word for word in command.split() if word not in ("…", "...")]
        if "--FLAG" in command or "--help" in command:
            continue
        given = flags.parse(words)
        flags.check_values(given)
        flags.check_tasks(given, given.task or "supervised")
