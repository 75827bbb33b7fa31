"""What processes.py promises: two processes with half of each batch do what one does with all of it, and one that dies
takes the others with it.

`torchrun` starts programs, so these tests do: DRIVER runs commands of train.py one after the other on the images below.
Only sums are rounded in another order: losses agree to about seven digits.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import processes
import train
import vit
from tests.test_train import (  # noqa: F401 (fixtures)
    MICRO,
    PLAIN,
    coloured,
    leave_no_trace,
    one_step,
    small,
    write_images,
)

ROOT = Path(train.__file__).parent
DRIVER = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import data, processes, train
from tests.test_distributed import uneven

data.photos, codes, step = uneven, [], train.train_step
def die(model, optimizer, images, targets, config, now):
    if (processes.RANK, now) == (1, 2):
        os._exit(9)  # as the kernel ends a process that takes too much memory: without a word
    return step(model, optimizer, images, targets, config, now)
for command in sys.argv[1:]:
    train.train_step = die if "--seed 13" in command else step
    codes.append(train.main(command.split()))
processes.end()
sys.exit(max(codes))
"""


def uneven(size=None):
    """30 training and 13 test images: two processes get 7 and 6 of these, in batches of 2 that is 4 and 3."""
    splits = (data.InMemory(*coloured(n, seed=n), *PLAIN) for n in (30, 13))
    return data.Dataset("photos", ["red", "green", "blue"], *PLAIN, *splits)


def torchrun(folder, *commands, n=2):
    """The commands of train.py, on n processes, in a folder."""
    (folder / "driver.py").write_text(DRIVER)
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", "--standalone", "driver.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launch, *commands], cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err[-3000:]
    return out


SUPERVISED = "--lr 0.01 --mixup 0.8 --cutmix 1 --erasing 0.5 --smoothing 0.1 --batch-size 8 --micro-batch 2"
HPM = "--task hpm --lr 0.01 --batch-size 8 --micro-batch 2 --alpha 0.5,1 --target ema"
COMMANDS = {
    "supervised": SUPERVISED,
    "supervised-fsdp": f"{SUPERVISED} --fsdp",
    "hpm": HPM,
    "hpm-fsdp": f"{HPM} --fsdp --checkpointing",
    "mae": "--task mae --lr 0.01 --mask block",
    "mae-fsdp": "--task mae --lr 0.01 --mask block --fsdp",
    "mpp": "--task mpp --lr 0.01",
    "finetune": "--task finetune --init init.pt --optimizer sgd --lr 0.01,0.03 --polyak 0.9",
    "linear": "--task linear --init init.pt --lr 0.5",
    "knn": "--task knn --init init.pt",
    "fewshot": "--task fewshot --init init.pt",
    "bfloat16": "--lr 0.01 --dtype bfloat16",
    "bfloat16-fsdp": "--lr 0.01 --dtype bfloat16 --fsdp",
}
# In one process there is nothing to shard.
SAME = {f"{name}-fsdp": name for name in ("supervised", "hpm", "mae", "bfloat16")}
FROZEN = ("knn", "fewshot")
TRAINED = [name for name in COMMANDS if name not in FROZEN and not name.startswith("bfloat16")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run folders of every command: on one process and on two, and what the two printed."""
    folder = tmp_path_factory.mktemp("runs")
    before, handlers = os.getcwd(), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    os.chdir(folder)
    torch.manual_seed(0)
    torch.save(vit.create("vit_micro4", 16, 0).state_dict(), "init.pt")
    micro = "--arch vit_micro4 --img-size 16 --batch-size 4 --steps 3"
    process = torchrun(folder, *(f"{micro} {command} --out {name}-2" for name, command in COMMANDS.items()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "photos", uneven)
        for name, command in COMMANDS.items():
            if name not in SAME:
                assert train.main(f"{micro} {command} --out {name}".split()) == 0
    out = finish(process)
    os.chdir(before)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return folder, out


def log(out):
    """What was logged, without times."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_with_half_of_each_batch_log_what_one_logs(name, runs):
    """Losses, gradient norms and scores: of masks that the teacher guides, blended pairs, micro-batches, shards."""
    folder, _ = runs
    one, two = log(folder / SAME.get(name, name)), log(folder / f"{name}-2")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_checkpoints_of_two_processes_are_those_of_one(name, runs):
    """The same names, shapes and values: of the teacher, of the optimizer, and of what was sharded."""
    folder, _ = runs
    one, two = (torch.load(folder / out / "last.pt", weights_only=True) for out in (SAME.get(name, name), f"{name}-2"))
    assert one["model"].keys() == two["model"].keys()
    for key, value in one["model"].items():
        assert two["model"][key].shape == value.shape
        # Attention does not mind a shift of the keys, nor the relative loss one of the predictions: these biases have a
        # gradient of 0, and Adam makes steps of its roundings.
        if not key.endswith(("qkv.bias", "loss_predictor.pred.bias")):
            assert (two["model"][key] - value).float().abs().mean() < 1e-3, key  # a step is 1e-2
    states = [c["optimizer"]["state"] for c in (one, two)]
    assert states[0].keys() == states[1].keys()
    for i in states[0]:
        assert states[0][i].keys() == states[1][i].keys()
        for key in states[0][i].keys() & {"exp_avg", "momentum_buffer"}:  # running means of gradients
            torch.testing.assert_close(states[1][i][key], states[0][i][key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16-fsdp"])
def test_in_bfloat16_two_processes_do_about_the_same(name, runs):
    """It has eight bits: sums in another order differ in the third digit. The weights that are saved are float32."""
    folder, _ = runs
    one, two = log(folder / "bfloat16"), log(folder / f"{name}-2")
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=0.02)
    saved = torch.load(folder / f"{name}-2" / "last.pt", weights_only=True)["model"]
    assert {value.dtype for value in saved.values()} == {torch.float32}


@pytest.mark.parametrize("task", FROZEN)
def test_frozen_features_are_those_of_one_process(task, runs):
    """They come together in the order of the images."""
    folder, _ = runs
    one, two = (json.loads((folder / out / "result.json").read_text()) for out in (task, f"{task}-2"))
    scores = [name for name in one if name.startswith("top1")]
    assert scores
    assert [one[name] for name in scores] == [two[name] for name in scores]


def test_the_first_process_speaks_and_writes_for_all(runs):
    """One description and one result of each command; the folder holds what that of one process holds."""
    folder, out = runs
    assert out.count("reached") == out.count("parameters, on photos") == len(COMMANDS)
    assert out.count("on 2 processes") == len(COMMANDS)
    for name in COMMANDS:
        files = [{path.name for path in (folder / o).iterdir()} for o in (SAME.get(name, name), f"{name}-2")]
        assert files[0] == files[1]


def test_a_run_may_go_on_with_another_number_of_processes(runs, monkeypatch):
    """What two processes saved in shards, one goes on with."""
    folder, _ = runs
    monkeypatch.setattr(data, "photos", uneven)
    monkeypatch.chdir(folder)
    config = json.loads(Path("hpm-fsdp-2/config.json").read_text())
    Path("hpm-fsdp-2/config.json").write_text(json.dumps(config | {"fsdp": False, "steps": 4}))
    assert train.main("--resume --out hpm-fsdp-2".split()) == 0
    assert [line["step"] for line in log(folder / "hpm-fsdp-2")] == [1, 2, 3, 4]


@pytest.mark.parametrize(("n", "length"), [(2, 5), (2, 6), (3, 7), (3, 2)])
def test_each_image_is_evaluated_by_one_process(n, length, monkeypatch):
    """Sizes that do not divide: the shares differ by one image at most."""
    monkeypatch.setattr(processes, "COUNT", n)
    shares = []
    for rank in range(n):
        monkeypatch.setattr(processes, "RANK", rank)
        shares.append(list(range(length)[processes.every()]))
    assert sorted(sum(shares, [])) == list(range(length))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_processes_draw_other_dropout_and_the_same_the_next_time(small, monkeypatch):  # noqa: F811
    """Else two halves of a batch would be thinned alike."""
    seeds = []
    for rank in (0, 1, 1):
        monkeypatch.setattr(processes, "RANK", rank)
        one_step("--dropout 0.5")
        seeds.append(torch.initial_seed())
    assert seeds[0] != seeds[1] == seeds[2]


BAD = {
    "--batch-size 9": "--batch-size 9 2 processes multiple of 2",
    "--batch-size 6 --mixup 0.8": "--batch-size 6 even multiple of 4",
    "--batch-size 8 --micro-batch 8": "--micro-batch 8 --batch-size 8 2 processes divisor",
}


@pytest.mark.parametrize("command", BAD)
def test_a_batch_that_processes_cannot_share_is_refused(command, small, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(processes, "COUNT", 2)
    assert train.main(f"--arch vit_micro4 --img-size 16 {command} --out run".split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(word in err for word in BAD[command].split()), err
    assert not Path("run").exists()


@pytest.mark.parametrize("task", ["supervised", "hpm"])
def test_blocks_that_are_computed_twice_have_the_same_gradients(task, small, monkeypatch):  # noqa: F811
    """--checkpointing; dropout draws the same numbers both times. Each block runs once more."""
    calls, original = [], vit.Attention.forward
    monkeypatch.setattr(vit.Attention, "forward", lambda *args: calls.append(1) or original(*args))
    command = f"--task {task} --dropout 0.3 --drop-path 0.2" if task == "supervised" else f"--task {task}"
    _, plain, values = one_step(command)
    once = len(calls)
    _, twice, again = one_step(f"{command} --checkpointing")
    student = 6 if task == "supervised" else 6 + 2 + 2  # the teacher's blocks have no gradient to be computed for
    assert len(calls) - once == once + student
    for name in plain:
        torch.testing.assert_close(twice[name], plain[name], rtol=0, atol=1e-6, msg=name)
    assert again["grad_norm"].item() == pytest.approx(values["grad_norm"].item(), rel=1e-5)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_within_a_minute(tmp_path):
    """With a message and an exit code, never a hang. Its checkpoint stays."""
    process = torchrun(tmp_path, f"{MICRO} --steps 2000 --seed 13 --out run")
    start = time.monotonic()
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: another process is gone" in err, err
    assert "exitcode  : 9" in err
    assert time.monotonic() - start < 90, "a minute, and the time to start"
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody is left


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_processes_at_the_same_step_and_the_run_can_go_on(number, tmp_path, monkeypatch):
    """A cluster sends SIGTERM to torchrun alone, a terminal SIGINT to all of them."""
    process = torchrun(tmp_path, f"{MICRO} --steps 20000 --out run")
    deadline = time.monotonic() + 120
    while not ((tmp_path / "run/log.jsonl").exists() and log(tmp_path / "run")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number) if number == signal.SIGTERM else os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "another process is gone" not in err
    assert "go on with: torchrun --nproc_per_node=2 train.py --resume --out run" in out
    step = torch.load(tmp_path / "run/last.pt", weights_only=True)["step"]
    config = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps(config | {"steps": step + 1}))
    monkeypatch.setattr(data, "photos", uneven)
    assert train.main("--resume --out run".split()) == 0
    assert log(tmp_path / "run")[-1]["step"] == step + 1


@pytest.mark.slow
def test_images_that_cannot_be_decoded_are_counted_over_all_processes(tmp_path):
    """3 of 40 are more than 5 %, though no process met more than two of them."""
    write_images(tmp_path / "pictures", ant=20, cat=20)
    order = data.batch_indices(40, 40, 0, seed=0).tolist()  # batches of 4: two images for each process
    files = data.folder(tmp_path / "pictures").train.files
    for i in (order[0], order[2], order[6]):
        Path(os.fsdecode(files[i])).write_text("no image")
    process = torchrun(tmp_path, f"{MICRO} --steps 10 --data folder:pictures --out run")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: 3 of 40 images can't be decoded, more than 5 %" in err, err
