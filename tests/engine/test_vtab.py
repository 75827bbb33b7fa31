"""VTAB-1k in a small made-up copy: folders, lists and images as NOAH's get_vtab1k.py writes the public one.

PATH/TASK/{train800,val200,train800val200,test}.txt     a line: images/train800/000000.jpg 3
PATH/TASK/images/LIST/000000.jpg
"""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import vit
from downstream import vtab
from engine import config as flags
from engine import image_folder, transfer
from tests.engine.runs import STILL, one_line, run, watch

# VTAB, section 2 and its table of data sets: the groups, and the classes of each task (VPT, table of VTAB-1k).
GROUPS = {
    "natural": "caltech101 102 cifar 100 dtd 47 oxford_flowers102 102 oxford_iiit_pet 37 sun397 397 svhn 10",
    "specialized": "patch_camelyon 2 eurosat 10 resisc45 45 diabetic_retinopathy 5",
    "structured": (
        "clevr_count 8 clevr_dist 6 dmlab 6 kitti 4 dsprites_loc 16 dsprites_ori 16 smallnorb_azi 18 smallnorb_ele 9"
    ),
}
# task_adaptation/data/*_test.py at commit d7630d3 of google-research/task_adaptation, "test=".
TEST_IMAGES = dict(
    caltech101=6084, cifar=10000, dtd=1880, oxford_flowers102=6149, oxford_iiit_pet=3669, sun397=21750, svhn=26032,
    patch_camelyon=32768, eurosat=5400, resisc45=6300, diabetic_retinopathy=42670, clevr_count=15000, clevr_dist=15000,
    dmlab=22735, kitti=711, dsprites_loc=73728, dsprites_ori=73728, smallnorb_azi=12150, smallnorb_ele=12150,
)  # fmt: skip
SMALL = {"train800": 8, "val200": 4, "test": 6}


def test_there_are_19_tasks_in_three_groups():
    words = {group: text.split() for group, text in GROUPS.items()}
    classes = {task: int(n) for text in words.values() for task, n in zip(text[::2], text[1::2], strict=True)}
    assert {group: list(tasks) for group, tasks in transfer.VTAB.items()} == {
        group: text[::2] for group, text in words.items()
    }
    found = {task: numbers for tasks in transfer.VTAB.values() for task, numbers in tasks.items()}
    assert found == {task: (classes[task], TEST_IMAGES[task]) for task in classes}
    assert len(vtab.TASKS) == 19
    assert transfer.VTAB_TRAINING == {"train800": 800, "val200": 200}


def write_task(path, classes):
    """One of the tasks, with few images: white where the class says, in one column, all else dark."""
    number = 0
    for name, n in SMALL.items():
        (path / "images" / name).mkdir(parents=True)
        lines = []
        for i in range(n):
            pixels = np.full((8, 2 * 8, 3), 20, np.uint8)  # twice as wide as high
            pixels[:, number % 16] = 250
            Image.fromarray(pixels).save(path / "images" / name / f"{i:06d}.jpg", quality=100, subsampling=0)
            lines.append(f"images/{name}/{i:06d}.jpg {number % classes}\n")
            number += 1
        (path / f"{name}.txt").write_text("".join(lines))
    # Beside them, as published: the thousand in one list. It is not needed.
    (path / "train800val200.txt").write_text("images/train800val200/000000.jpg 0\n")


@pytest.fixture(scope="module")
def one_task(tmp_path_factory):
    path = tmp_path_factory.mktemp("vtab") / "task"
    write_task(path, 4)
    return path


@pytest.fixture
def benchmark(one_task, leave_no_trace, shallow, no_figures, monkeypatch):
    """PATH, with all tasks; as many images as here are called official."""
    small = {
        group: {task: (n, SMALL["test"]) for task, (n, _) in tasks.items()} for group, tasks in transfer.VTAB.items()
    }
    for tasks in small.values():
        tasks |= {task: (max(4, n), tests) for task, (n, tests) in tasks.items()}
    monkeypatch.setattr(transfer, "VTAB", small)
    monkeypatch.setattr(transfer, "VTAB_TRAINING", {"train800": 8, "val200": 4})
    for task in vtab.TASKS:
        Path("vtab").mkdir(exist_ok=True)
        Path("vtab", task).symlink_to(one_task)
    return Path("vtab")


def test_a_task_trains_with_both_lists_and_is_tested_with_the_third(benchmark):
    """In their order; an image is its path below the task's folder, and its class a number from 0."""
    kitti = data.load("vtab:vtab/kitti")
    assert kitti.classes == ["kitti 0", "kitti 1", "kitti 2", "kitti 3"]
    assert kitti.train.labels.tolist() == [i % 4 for i in range(12)]
    assert kitti.test.labels.tolist() == [i % 4 for i in range(12, 18)]
    names = [f"vtab/kitti/images/{name}/{i:06d}.jpg".encode() for name in SMALL for i in range(SMALL[name])]
    assert [*kitti.train.files, *kitti.test.files] == names


def test_images_are_seen_whole_in_training_and_in_tests(benchmark):
    """Stretched, as the public loaders' Resize((224, 224)) has it; no crop, no flip: dSprites asks for the place."""
    dsprites = data.load("vtab:vtab/dsprites_loc")
    dsprites.train.workers = dsprites.test.workers = 0
    images, _ = next(dsprites.test.test_batches((8, 16), 6, torch.device("cpu")))
    assert images.mean(dim=(1, 2)).argmax(dim=1).tolist() == [i % 16 for i in range(12, 18)], "the white column"
    images, _ = next(dsprites.test.test_batches((16, 16), 6, torch.device("cpu")))
    assert images.mean(dim=(1, 2)).argmax(dim=1).tolist() == [i % 16 for i in range(12, 18)], "stretched to a square"
    order = data.batch_indices(12, 12, 0, seed=0)
    images, labels = next(dsprites.train.train_batches((16, 16), 12, [0], 0, None, torch.device("cpu")))
    assert images.mean(dim=(1, 2)).argmax(dim=1).tolist() == order.tolist(), "not mirrored"
    assert labels.tolist() == [i % 4 for i in order.tolist()]


def test_predictions_see_images_as_the_task_did(benchmark, monkeypatch):
    """Whole, too: what is cut off may be what a task asks for."""
    command = f"--task supervised {STILL} --data vtab:vtab/kitti --steps 1 --batch-size 4 --workers 0 --out run"
    assert run(command) == 0
    asked, original = [], image_folder.read_image

    def read_image(*args, **options):
        asked.append(options["crop_pct"])
        return original(*args, **options)

    monkeypatch.setattr(image_folder, "read_image", read_image)
    assert run("--task predict --init run --images vtab/kitti/images/test") == 0
    assert asked == [None] * SMALL["test"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("test.txt", None, ["test.txt can't be read"]),
        ("test.txt", "images/test/000000.jpg 0\n", ["lists 1 images", "official one 6"]),
        ("train800.txt", "images/train800/000000.jpg 0\n" * 9, ["lists 9 images", "official one 8"]),
        ("val200.txt", "images/val200/000000.jpg 4\n" * 4, ["val200.txt, line 1", "from 0 to 3"]),
        ("val200.txt", "images/val200/000000.jpg -1\n" * 4, ["line 1", "from 0 to 3"]),
        ("val200.txt", "images/val200/000000.jpg\n" * 4, ["line 1", "is no image and a class"]),
        ("val200.txt", "", ["lists 0 images"]),
        ("val200.txt", b"\xff\xfe 1\n" * 4, ["can't be read"]),
        ("test.txt", "images/test/000009.jpg 0\n" * 6, ["6 of 6 images", "000009.jpg"]),
    ],
)
def test_a_list_that_is_not_the_official_one_is_refused(name, text, words, one_task, benchmark):
    """A short one would give a score of other images; a class above the count would fail far from here."""
    shutil.copytree(one_task, "copy/kitti")
    path = Path("copy", "kitti", name)
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        data.load("vtab:copy/kitti")
    for word in words:
        assert word in str(error.value)


# ---------------------------------------------------------------------------------------------
# All tasks by one command
# ---------------------------------------------------------------------------------------------


ALL = "--task finetune --arch vit_micro4 --data vtab:vtab --out all"


@pytest.fixture
def command(benchmark):
    """command(words): the exit code. Instead of training, a run leaves its files behind, and its top-1 is known.

    command.asked: what each run was told; command.stops: {task: the exit code with which it ends, once}.
    """

    def main(argv):
        parsed = flags.parse(argv)
        out = Path(parsed.out)
        command.asked.append(argv)
        assert parsed.resume == (True if (out / "config.json").exists() else None), "begun or new"
        assert parsed.data == f"vtab:{command.where}/{out.name}"
        out.mkdir(exist_ok=True)
        (out / "config.json").write_text("{}")
        if out.name in command.stops:
            return command.stops.pop(out.name)
        scores = dict(task="finetune", arch="vit_micro4", top1=top1(out.name), seconds=1.0)
        (out / "result.json").write_text(json.dumps(scores))
        return 0

    def command(words):
        command.asked.clear()
        argv = words.split()
        assert vtab.is_whole(flags.parse(argv))
        return vtab.run(flags.parse(argv), argv, main)

    command.asked, command.stops, command.where = [], {}, "vtab"
    return command


def top1(task):
    """A number that no other task has, nor a sum of others."""
    return 100 / 2.0 ** (1 + vtab.TASKS.index(task))


def tasks_of(asked):
    return [Path(flags.parse(argv).out).name for argv in asked]


def test_one_command_makes_all_runs_and_their_means(command, capsys):
    """ViT, figure 2: the mean of each group, and of all 19 tasks, not of the groups."""
    assert command(f"{ALL} --lr 0.003 --seed 4") == 0
    assert tasks_of(command.asked) == vtab.TASKS
    assert {flags.parse(argv).lr for argv in command.asked} == {(0.003,)}
    result = json.loads(Path("all/result.json").read_text())
    sums = {group: [0.0, 0] for group in [*GROUPS, "all"]}
    for group, text in GROUPS.items():
        for task in text.split()[::2]:
            assert result["tasks"].pop(task) == top1(task)
            for name in (group, "all"):
                sums[name][0] += top1(task)
                sums[name][1] += 1
    assert {name: result.pop(name) for name in ("task", "arch", "data", "tasks")} == dict(
        task="finetune", arch="vit_micro4", data="vtab", tasks={}
    )
    means = {name: total / n for name, (total, n) in sums.items()}
    assert result == pytest.approx(dict(seconds=19.0, top1=means.pop("all")) | means)
    assert f"reached {sums['all'][0] / 19:.2f} % top-1, the mean of 19 tasks" in capsys.readouterr().out


def test_it_goes_on_where_it_was_stopped(command, capsys):
    """What is done stays, the run that was stopped goes on, the others begin; with the flags of the first command."""
    command.stops = {"dtd": 143}
    assert command(f"{ALL} --lr 0.003") == 143
    assert tasks_of(command.asked) == vtab.TASKS[:3]
    assert "train.py --resume --out all" in capsys.readouterr().out
    assert not Path("all/result.json").exists()
    command.stops = {"svhn": 1}
    assert command("--resume --out all") == 1
    assert tasks_of(command.asked) == vtab.TASKS[2:7]
    Path("vtab").rename("moved")
    command.where = "moved"
    assert command(f"--resume {ALL.replace('vtab:vtab', 'vtab:moved')} --device cpu") == 0
    assert tasks_of(command.asked) == vtab.TASKS[6:]
    assert {flags.parse(argv).lr for argv in command.asked} == {(0.003,)}
    assert {flags.parse(argv).device for argv in command.asked} == {"cpu"}
    assert json.loads(Path("all/result.json").read_text())["top1"] == pytest.approx(
        sum(map(top1, vtab.TASKS)) / len(vtab.TASKS)
    )
    assert command("--resume --out all --data vtab:moved") == 0
    assert command.asked == [], "nothing is left to do"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--resume --out all --lr 0.1", ["--lr 0.003, not 0.1", "leave --lr out"]),
        ("--resume --out other --data vtab:vtab", ["--resume", "--out"]),
        ("--resume --data vtab:vtab", ["--resume", "--out"]),
        (ALL, ["all holds the runs of VTAB", "--resume"]),
        (ALL + " --overwrite", ["--overwrite", "19 tasks"]),
        ("--task hpm --data vtab:vtab", ["finetune", "vtab:PATH/dtd"]),
        ("--task finetune --data vtab:nowhere", ["nowhere has no folder caltech101"]),
        ("--task finetune --data vtab:", ["no folder caltech101"]),
    ],
)
def test_bad_input_is_refused_before_the_first_run(words, said, command):
    command.stops = {"caltech101": 143}
    command(f"{ALL} --lr 0.003")
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        command(words)
    for word in said:
        assert word in str(error.value)
    assert command.asked == []


def test_a_damaged_list_of_the_last_task_is_found_before_the_first_run(command, one_task):
    Path("vtab/smallnorb_ele").unlink()
    shutil.copytree(one_task, "vtab/smallnorb_ele")
    Path("vtab/smallnorb_ele/test.txt").write_text("")
    with pytest.raises(ValueError, match="smallnorb_ele/test.txt lists 0 images"):
        command(ALL)
    assert not Path("all").exists()


def test_a_damaged_file_of_the_whole_is_named(command):
    command.stops = {"caltech101": 143}
    command(ALL)
    Path("all/vtab.json").write_text('{"path": 3}')
    with pytest.raises(ValueError, match="all/vtab.json is damaged"):
        command("--resume --out all")


def test_train_py_runs_all_of_vtab(benchmark, capsys):
    """By nearest neighbours, which take no steps: 19 real runs, and the mean of what each of them says."""
    torch.manual_seed(0)
    vit.save_weights(vit.create("vit_micro4", img_size=16, num_classes=3), "init.safetensors")
    whole = f"--task knn {STILL} --init init.safetensors --data vtab:vtab --workers 0 --device cpu"
    assert run(f"{whole} --out all") == 0
    scores = [json.loads(Path("all", task, "result.json").read_text())["top1"] for task in vtab.TASKS]
    assert json.loads(Path("all/result.json").read_text())["top1"] == pytest.approx(sum(scores) / 19)
    assert run(f"{whole} --out all") == 2
    assert "holds the runs of VTAB" in one_line(capsys)


@pytest.mark.slow
def test_a_real_run_that_is_stopped_goes_on(benchmark, monkeypatch):
    """Fine-tuning with a signal in the second task: the same scores as without."""
    torch.manual_seed(0)
    vit.save_weights(vit.create("vit_micro4", img_size=16, num_classes=3), "init.safetensors")
    whole = f"--task finetune {STILL} --init init.safetensors --data vtab:vtab --workers 0 --steps 3 --lr 0.1"
    assert run(f"{whole} --out one") == 0
    steps = []

    def stop(step, *_):
        steps.append(step)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        watch(patch, stop)
        assert run(f"{whole} --out two") == 128 + signal.SIGTERM
    assert run("--resume --out two") == 0
    one, two = (json.loads(Path(out, "result.json").read_text()) for out in ("one", "two"))
    assert one["tasks"] == two["tasks"]
    assert len(set(one["tasks"].values())) > 1
