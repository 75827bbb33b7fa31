"""What a run that goes on promises: it is the same run. It knows its data, its frozen weights and its own checkpoint,
says in one line what differs, and goes on with what may differ.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import data
import train
import vit
from engine import checkpoint as run_folder
from engine import config as flags
from tests.engine import runs
from tests.engine.runs import (
    MICRO,
    PLAIN,
    coloured,
    different,
    log,
    one_line,
    run,
    settings,
    small_photos,
    write_images,
)

pytestmark = pytest.mark.usefixtures("leave_no_trace")
SAVED = ("last.pt", "previous.pt")


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def rewrite(path, change):
    """Save what change(checkpoint) returns in the place of the checkpoint."""
    torch.save(change(torch.load(path, weights_only=True)), path)


# ---------------------------------------------------------------------------------------------
# The data
# ---------------------------------------------------------------------------------------------

OTHER_CLASSES = {
    "renamed": (["red", "grass", "blue"], ("3 classes", "without 'green'", "with 'grass'")),
    "added": (["red", "green", "blue", "white"], ("4, with 'white'",)),
    "removed": (["red", "green"], ("2, without 'blue'",)),
    "in another order": (["green", "red", "blue"], ("the same ones in another order",)),
}


@pytest.mark.parametrize("kind", OTHER_CLASSES)
def test_a_run_does_not_go_on_with_other_classes(kind, finished, monkeypatch, capsys):
    """Labels are numbers: after a change of names they would mean something else, and training would go on."""
    names, words = OTHER_CLASSES[kind]
    before = contents("run")
    monkeypatch.setattr(data, "photos", lambda size: small_photos()._replace(classes=names))
    assert run("--resume --out run") == 2
    error = one_line(capsys)
    assert all(word in error for word in (*words, "run/last.pt", "--init run/last.pt")), error
    assert contents("run") == before


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("n", [9, 25])
def test_a_run_does_not_go_on_with_more_or_fewer_images(split, n, finished, monkeypatch, capsys):
    """The order of an epoch is a function of their number: it would be another run. And a score over other test images
    is no point of the same curve."""
    before = contents("run")
    other = data.InMemory(*coloured(n, seed=1), *PLAIN)
    monkeypatch.setattr(data, "photos", lambda size: small_photos()._replace(**{split: other}))
    assert run("--resume --out run") == 2
    error = one_line(capsys)
    assert f"{24 if split == 'train' else 10} images in {split}, and the data has {n} now" in error
    assert contents("run") == before


def test_a_folder_of_images_is_known_by_its_classes_and_images(shallow, no_figures, capsys):
    """The names of folders are the names of classes, in alphabetical order; and a folder may move."""
    write_images("pictures", ant=12, bee=12, cat=12)
    assert run(f"{MICRO} --data folder:pictures --workers 0 --out run") == 0
    saved = runs.checkpoint("run")
    assert saved["classes"] == ["ant", "bee", "cat"]
    assert (saved["grid"], saved["images"]) == ([4, 4], {"train": 36, "test": 3})
    assert saved["init_digest"] is saved["target_digest"] is None
    for split in ("train", "val"):  # a renamed class that stays at its place
        Path("pictures", split, "bee").rename(Path("pictures", split, "bumblebee"))
    capsys.readouterr()
    assert run("--resume --out run") == 2
    assert "without 'bee' and with 'bumblebee'" in one_line(capsys)
    for split in ("train", "val"):
        Path("pictures", split, "bumblebee").rename(Path("pictures", split, "bee"))
    Path("pictures/train/ant/0.png").rename("0.png")
    assert run("--resume --out run") == 2
    assert "36 images in train, and the data has 35 now" in one_line(capsys)
    Path("0.png").rename("pictures/train/ant/0.png")
    Path("pictures").rename("moved")
    assert run("--resume --data folder:moved --steps 4 --out run") == 0


# ---------------------------------------------------------------------------------------------
# Frozen weights
# ---------------------------------------------------------------------------------------------


def encoder(seed):
    """Write an encoder to init.pt."""
    torch.manual_seed(seed)
    torch.save(vit.create("vit_micro4", 16, 0).state_dict(), "init.pt")


FROZEN = {
    "--task linear --init init.pt": "--init",
    "--task hpm --target dino --target-weights init.pt": "--target-weights",
}


@pytest.mark.parametrize("command", [list(FROZEN)[0], pytest.param(list(FROZEN)[1], marks=pytest.mark.slow)])
def test_frozen_weights_have_to_be_those_that_a_run_began_with(command, small, shallow, no_figures, capsys):
    """They are in no checkpoint: a probe's head, or a student, would learn from another function half of its time."""
    encoder(seed=0)
    first = Path("init.pt").read_bytes()
    assert run(f"{MICRO} {command} --out run") == 0
    encoder(seed=1)
    capsys.readouterr()
    assert run("--resume --out run") == 2
    error = one_line(capsys)
    assert f"the weights of {FROZEN[command]} are others" in error
    Path("init.pt").write_bytes(first)
    assert run("--resume --out run") == 0


def test_weights_that_a_run_started_from_may_be_rewritten(small, shallow, no_figures):
    """They are all in last.pt, which still says of which file they came: sha256, of hashlib, of the first one."""
    import hashlib

    encoder(seed=0)
    digest = hashlib.sha256(Path("init.pt").read_bytes()).hexdigest()
    assert run(f"{MICRO} --task finetune --init init.pt --out run") == 0
    assert runs.checkpoint("run")["init_digest"] == digest
    encoder(seed=1)
    assert run("--resume --steps 4 --out run") == 0
    assert runs.checkpoint("run")["step"] == 4
    assert runs.checkpoint("run")["init_digest"] == digest


# ---------------------------------------------------------------------------------------------
# The checkpoint
# ---------------------------------------------------------------------------------------------

OTHER_RUNS = {  # what is whole, and of another kind: a change of last.pt, and what the line says
    "a tensor": (lambda saved: torch.zeros(3), "no checkpoint of a run"),
    "the weights alone": (lambda saved: saved["model"], "no checkpoint of a run"),
    "without a step": (lambda saved: {n: v for n, v in saved.items() if n != "step"}, "it has no step"),
    "without a model": (lambda saved: {n: v for n, v in saved.items() if n != "model"}, "its model is not there"),
    "without an optimizer": (lambda saved: saved | {"optimizer": None}, "its optimizer is not there"),
    "without seconds": (lambda saved: saved | {"seconds": "1"}, "its seconds is not there"),
    "a configuration that is none": (lambda saved: saved | {"config": []}, "its config is not there"),
    "classes that are no list": (lambda saved: saved | {"classes": 3}, "its classes is not there"),
    "images that are no dict": (lambda saved: saved | {"images": 24}, "its images is not there"),
    "a model of no tensors": (lambda saved: saved | {"model": dict.fromkeys(saved["model"], 1.0)}, "does not fit"),
    "a model of other names": (
        lambda saved: saved | {"model": {f"student.{n}": v for n, v in saved["model"].items()}}, "does not fit"
    ),
    "a model of other shapes": (
        lambda saved: saved | {"model": saved["model"] | {"head.weight": torch.zeros(4, 64)}}, "see head.weight"
    ),
    "of another task": (lambda saved: saved | {"config": saved["config"] | {"task": "mae"}}, "its task is"),
    "of another size": (lambda saved: saved | {"config": saved["config"] | {"img_size": (32, 32)}}, "its img_size is"),
    "of another seed": (lambda saved: saved | {"config": saved["config"] | {"seed": 1}}, "its seed is 1"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_RUNS)
def test_a_last_pt_of_another_kind_gives_way_to_the_previous_one(kind, finished, capsys):
    """And where there is none, it is one line."""
    change, words = OTHER_RUNS[kind]
    rewrite("run/last.pt", change)
    config, dataset, out = train.prepare(flags.parse(["--resume", "--out", "run"]))
    model = train.build(config, dataset, resume=True)

    def load():
        return train.load_checkpoint(config, model, dataset, out, train.origin_of(config, model, dataset))

    assert load()["step"] == 6
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert warnings[0].startswith("warning: run/last.pt is")
    assert words in warnings[0]
    assert warnings[1] == "warning: going on from run/previous.pt, step 6"
    shutil.copy("run/last.pt", "run/previous.pt")
    with pytest.raises(ValueError, match=r"run/previous.pt is .* start the run anew with --overwrite$"):
        load()


def test_an_optimizer_of_another_model_is_refused(finished):
    """Of another form, with other groups or weights; or with none, which would begin anew without a word."""
    config, dataset = settings(MICRO)
    model = train.build(config, dataset)
    optimizer = train.build_optimizer(model, "adamw", 0.1, 0.1, 1.0, (0.9, 0.999))
    saved = runs.checkpoint("run")["optimizer"]
    train.load_optimizer(optimizer, saved)
    groups, state = saved["param_groups"], saved["state"]
    torn = {0: {name: torch.zeros(2, 3) for name in state[0]}}
    others = [{}, saved | {"param_groups": groups[:1]}, saved | {"param_groups": 3}, saved | {"state": 3}]
    others += [saved | {"state": other} for other in ({}, {99: state[0]}, state | torn, state | {0: {"step": 1}})]
    for other in others:
        with pytest.raises(ValueError, match="the optimizer of another model"):
            train.load_optimizer(optimizer, other)


def test_a_checkpoint_of_an_older_version_goes_on_with_a_warning(finished, capsys):
    """It says nothing of its data; the next checkpoint does."""
    new = ("classes", "grid", "images", "init_digest", "target_digest", "line")
    for name in SAVED:
        rewrite(Path("run", name), lambda saved: {n: v for n, v in saved.items() if n not in new})
    assert run("--resume --steps 13 --out run") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: run/last.pt is of an older version and does not say its classes, images, init_digest, target_digest"
    ]
    assert runs.checkpoint("run")["classes"] == ["red", "green", "blue"]


# ---------------------------------------------------------------------------------------------
# What may differ
# ---------------------------------------------------------------------------------------------


def test_a_run_that_was_done_goes_on_with_more_steps(finished):
    """From its last step, on the new schedule, to a result of its own."""
    before = json.loads(Path("run/result.json").read_text())
    assert run("--resume --steps 18 --out run") == 0
    assert [line["step"] for line in log("run")] == list(range(1, 19))
    result = json.loads(Path("run/result.json").read_text())
    assert (before["steps"], result["steps"]) == (12, 18)
    assert result["top1"] == log("run")[-1]["top1"]
    assert runs.checkpoint("run")["step"] == 18
    assert json.loads(Path("run/config.json").read_text())["steps"] == 18


def test_a_run_has_not_fewer_steps_than_it_made(finished, capsys):
    before = contents("run")
    config = json.loads(before["config.json"])
    Path("run/config.json").write_text(json.dumps(config | {"steps": 11}))
    assert run("--resume --out run") == 2
    assert "12 steps behind it, more than the 11" in one_line(capsys)
    assert contents("run")["last.pt"] == before["last.pt"]


DAMAGE = {
    "gone": lambda path: path.unlink(),
    "binary in the middle": lambda path: path.write_bytes(b"\n\xff\xfe\n".join(path.read_bytes().split(b"\n", 1))),
}


@pytest.mark.parametrize("kind", [pytest.param("gone", marks=pytest.mark.slow), "binary in the middle"])
def test_a_log_that_is_lost_or_torn_does_not_break_a_good_run(kind, finished, monkeypatch, capsys):
    """Weights and result are those of the run; one warning says what curves.png lacks."""
    whole = contents("run")
    model = runs.checkpoint("run")["model"]
    shutil.copy("run/previous.pt", "previous.pt")
    DAMAGE[kind](Path("run/log.jsonl"))  # of a run that is done
    assert run("--resume --out run") == 0
    assert capsys.readouterr().err.count("warning: ") == 1
    score = json.loads(whole["result.json"])["top1"]
    assert json.loads(Path("run/result.json").read_text())["top1"] == score
    shutil.copy("previous.pt", "run/last.pt")  # and of one that goes on, from step 6
    with monkeypatch.context() as patch:
        runs.watch(patch, lambda step, *_: DAMAGE[kind](Path("run/log.jsonl")) if step == 9 else None)
        capsys.readouterr()
        assert run("--resume --out run") == 0
    assert capsys.readouterr().err.count("warning: ") == 1
    assert json.loads(Path("run/result.json").read_text())["top1"] == score
    assert not different(runs.checkpoint("run")["model"], model)
    assert run_folder.read_log(Path("run"))[-1]["step"] == 12
