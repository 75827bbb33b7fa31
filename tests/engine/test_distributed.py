"""What engine/distributed.py promises: two processes with half of each batch do what one does with all of it, and one
that dies takes the others with it.

Two processes run all of COMMANDS, see launch.py, and one process runs them here, with the same weights, images and
masks. Only sums are rounded in another order, which SGD hands on as it is: Adam would make whole steps of a gradient
that is nothing but rounding.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import train
import vit
from engine import distributed, image_folder
from tests.engine.launch import SHALLOW, uneven
from tests.engine.runs import MICRO, STILL, checkpoint, log, run, settings, write_images
from tests.engine.test_segmentation import write_pairs

ROOT = Path(train.__file__).parent
pytestmark = pytest.mark.usefixtures("leave_no_trace")


def launch(folder, *commands, n=2, torchrun=False):
    """The commands of train.py, on n processes, in a folder."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={n}", "--standalone"] if torchrun else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "tests.engine.launch", str(0 if torchrun else n), *commands],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, text=True,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait(process, seconds=180):
    """What it printed, and its errors. Whatever happens, none of its processes is left."""
    try:
        return process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


SGD = "--optimizer sgd --batch-size 8 --micro-batch 2"
SUPERVISED = f"{SGD} --lr 0.1 --mixup 0.8 --cutmix 1 --erasing 0.5 --smoothing 0.1"
HPM = f"{SGD} --task hpm --lr 0.1 --alpha 0.5,1 --target ema"
FINETUNE = f"{SGD} --task finetune --init init.pt --lr 0.01,0.03 --polyak 0.9"
BFLOAT16 = f"{SGD} --task mae --lr 0.1 --dtype bfloat16"
COMMANDS = {
    "supervised": SUPERVISED,
    "supervised-fsdp": f"{SUPERVISED} --fsdp",
    "hpm": HPM,
    "hpm-fsdp": f"{HPM} --fsdp --checkpointing",
    "mae": f"{SGD} --task mae --lr 0.1 --mask block",
    "mpp": f"{SGD} --task mpp --lr 0.1",
    "finetune": FINETUNE,
    "linear": "--task linear --init init.pt --lr 0.5",
    # Its norms take what goes through all processes at a time: here the batch.
    "segment": "--task segment --data segment:masks --workers 0 --optimizer sgd --batch-size 8 --lr 0.1 --dropout 0 "
    "--drop-path 0",
    "bfloat16": BFLOAT16,
    "bfloat16-fsdp": f"{BFLOAT16} --fsdp",
    "adamw": "--task mae --steps 1",
    "adamw-fsdp": "--task mae --steps 1 --fsdp",
    "knn": "--task knn --init init.pt",
    "fewshot": "--task fewshot --init init.pt",
}
# In one process there is nothing to shard.
ONE = {name: name.removesuffix("-fsdp") for name in COMMANDS}
TRAINED = ("supervised", "supervised-fsdp", "hpm", "hpm-fsdp", "mae", "mpp", "finetune", "linear", "segment")
# Jump from one value to another when rounding decides between two classes or ranks.
JUMPS = ("correlation", "test_correlation", "accuracy", "top1", "miou", "pixel_accuracy")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with the runs of every command, on one process and (`-2`) on two; what the two printed."""
    folder = tmp_path_factory.mktemp("runs")
    before, handlers = os.getcwd(), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    os.chdir(folder)
    torch.manual_seed(0)
    torch.save(vit.ViT(16, num_classes=0, **SHALLOW).state_dict(), "init.pt")
    write_images("pictures", ant=20, cat=20)
    write_pairs("masks", train=12, val=5)
    order = data.batch_indices(40, 40, 0, seed=0).tolist()  # batches of 4: two images for each process
    files = image_folder.load(Path("pictures")).train.files
    for i in (order[0], order[2], order[6]):
        Path(os.fsdecode(files[i])).write_text("no image")

    start = {name: STILL if name in ("knn", "fewshot") else MICRO for name in COMMANDS}
    two = [f"{start[name]} {command} --out {name}-2" for name, command in COMMANDS.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "photos", uneven)
        patch.setitem(vit.ARCHS, "vit_micro4", SHALLOW)
        patch.setattr(train, "draw_figures", lambda *_: None)
        patch.setattr(train, "SAVE_EVERY", -1)  # after each step: previous.pt is that of step 2
        assert run(f"{MICRO} {HPM} --out begun") == 0
        shutil.copytree("begun", "resumed-2", ignore=shutil.ignore_patterns(".lock", "last.pt"))
        patch.setattr(train, "SAVE_EVERY", 600)
        broken = f"{MICRO} --steps 10 --data folder:pictures --out broken"
        process = launch(folder, *two, "--resume --fsdp --out resumed-2", broken)
        for name, command in COMMANDS.items():
            if ONE[name] == name:
                assert run(f"{start[name]} {command} --out {name}") == 0
    out, err = wait(process)
    os.chdir(before)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for rank in (0, 1):
        path = folder / f"codes-{rank}.json"
        assert path.exists(), err[-3000:]
        said = json.loads(path.read_text())
        assert said["codes"] == [0] * (len(COMMANDS) + 1) + [2], err[-3000:]
        assert said["largest"] == [1, 5, 2], "of the processes' flags, told to both"
    return folder, out, err


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_log_what_one_logs(name, runs):
    """Losses, gradient norms, learning rates: of masks that the teacher guides, blended pairs, micro-batches, shards.

    A loss is a mean of at most 10^4 products in float32 (u = 6e-8), which are added in another order: it differs by
    less than 1e-5 of it; so does a gradient's norm, a sum of more, times ten. Half a batch, or one with other masks,
    has a loss that differs by a percent and more.
    """
    folder, *_ = runs
    one, two = log(folder / ONE[name]), log(folder / f"{name}-2")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        expected = {key: pytest.approx(value, rel=1e-4, abs=1e-6) for key, value in a.items() if key not in JUMPS}
        assert {key: b[key] for key in expected} == expected


def check_weights(one, two, start):
    """Names and shapes are the same, and two weights differ by a thousandth, at most, of what training has changed.

    SGD's steps are sums of gradients: rounded in another order these differ by 1e-5 of the largest. Three steps, each
    of which starts from weights that differ as much, leave a factor of ten and more to the bound. Without the average
    over processes, or with other masks, the difference is as large as the change.
    """
    assert one.keys() == two.keys()
    change = max((one[key] - start[key]).abs().max().item() for key in one if one[key].is_floating_point())
    assert change > 1e-3, "nothing was learned"
    for key in one:
        assert one[key].shape == two[key].shape
        assert (one[key] - two[key]).abs().max() <= 1e-3 * change, key


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_end_with_the_weights_of_one(name, runs, monkeypatch):
    """And the teacher's, the average of all steps, what was sharded, and the optimizer's momentum."""
    folder, *_ = runs
    monkeypatch.chdir(folder)
    monkeypatch.setattr(data, "photos", uneven)
    monkeypatch.setitem(vit.ARCHS, "vit_micro4", SHALLOW)
    one, two = checkpoint(ONE[name]), checkpoint(f"{name}-2")
    config, dataset = settings(f"{MICRO} {COMMANDS[ONE[name]]}")
    torch.manual_seed(config.seed)
    start = train.with_probe(config, train.build(config, dataset), dataset)[0].state_dict()
    if name == "finetune":  # what learned: the trials of learning rates drew random numbers before it was built anew
        start = {key: torch.load("init.pt").get(key, torch.zeros_like(value)) for key, value in start.items()}
    check_weights(one["model"], two["model"], start)
    if name == "finetune":
        check_weights(one["raw_model"], two["raw_model"], start)
    check_states(one["optimizer"]["state"], two["optimizer"]["state"], "momentum_buffer")


def check_states(one, two, name):
    """Running sums of gradients: they agree to a thousandth of the largest."""
    assert one.keys() == two.keys()
    largest = max(state[name].abs().max().item() for state in one.values())
    assert largest > 0
    for i, state in one.items():
        assert state.keys() == two[i].keys()
        assert state[name].shape == two[i][name].shape
        assert (state[name] - two[i][name]).abs().max() <= 1e-3 * largest, i


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adamw-fsdp"])
def test_the_first_gradient_of_adam_is_that_of_one_process(name, runs):
    """Its running mean after one step is a tenth of the gradient. Weights are no measure: Adam divides by it."""
    folder, *_ = runs
    one, two = (checkpoint(folder / out)["optimizer"]["state"] for out in ("adamw", f"{name}-2"))
    check_states(one, two, "exp_avg")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bfloat16", "bfloat16-fsdp"])
def test_in_bfloat16_the_first_loss_is_about_the_same(name, runs):
    """It has eight bits, 2^-9 of each value; FSDP rounds the parameters of norms too. The errors of 10^4 values average
    out, so 2^-7 is generous. The weights that are saved are float32."""
    folder, *_ = runs
    one, two = (log(folder / out)[0] for out in ("bfloat16", f"{name}-2"))
    exact = log(folder / "adamw")[0]
    assert one["loss"] != exact["loss"], "that was float32"
    assert two["loss"] == pytest.approx(one["loss"], rel=2**-7)
    assert {value.dtype for value in checkpoint(folder / f"{name}-2")["model"].values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["knn", "fewshot"])
def test_frozen_features_are_those_of_one_process(task, runs):
    """They come together in the order of the images: accuracies are the same."""
    folder, *_ = runs
    one, two = (json.loads((folder / out / "result.json").read_text()) for out in (task, f"{task}-2"))
    scores = [name for name in one if name.startswith("top1")]
    assert scores
    assert [one[name] for name in scores] == [two[name] for name in scores]


@pytest.mark.slow
def test_two_processes_shard_and_finish_what_one_began(runs):
    """Resumed with --fsdp after step 2: weights and momentum are spread over the shards, and come together again."""
    folder, *_ = runs
    one, two = checkpoint(folder / "hpm"), checkpoint(folder / "resumed-2")
    before = torch.load(folder / "resumed-2" / "previous.pt", weights_only=True)
    assert (before["step"], two["step"]) == (2, 3)
    check_weights(one["model"], two["model"], before["model"])
    check_states(one["optimizer"]["state"], two["optimizer"]["state"], "momentum_buffer")
    assert [line["step"] for line in log(folder / "resumed-2")] == [1, 2, 3]


@pytest.mark.slow
def test_the_first_process_speaks_and_writes_for_all(runs):
    """One description and one result of each command; the folder holds what that of one process holds."""
    folder, out, _ = runs
    assert out.count("reached") == len(COMMANDS) + 1
    assert out.count("on 2 processes") == out.count("parameters, on ") == len(COMMANDS) + 2
    for name in COMMANDS:
        one, two = ({path.name for path in (folder / where).iterdir()} for where in (ONE[name], f"{name}-2"))
        assert one == two


@pytest.mark.slow
def test_images_that_cannot_be_decoded_are_counted_over_all_processes(runs):
    """3 of 40 are more than 5 %, though no process met more than two of them."""
    _, _, err = runs
    assert "error: 3 of 40 images can't be decoded, more than 5 %" in err


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_saved_in_shards(runs, no_figures, monkeypatch):
    """The files have no shards."""
    folder, *_ = runs
    monkeypatch.setattr(data, "photos", uneven)
    monkeypatch.setitem(vit.ARCHS, "vit_micro4", SHALLOW)
    monkeypatch.chdir(folder)
    config = json.loads(Path("adamw-fsdp-2/config.json").read_text())
    Path("adamw-fsdp-2/config.json").write_text(json.dumps(config | {"fsdp": False, "steps": 2}))
    assert run("--resume --out adamw-fsdp-2") == 0
    assert [line["step"] for line in log("adamw-fsdp-2")] == [1, 2]


# ---------------------------------------------------------------------------------------------
# In one process
# ---------------------------------------------------------------------------------------------


def test_torchrun_says_who_is_who(monkeypatch):
    """In four environment variables; without them there is one process."""
    spec = importlib.util.spec_from_file_location("fresh", distributed.__file__)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    for values in ((0, 0, 1, 1), (13, 5, 16, 8)):
        for name, value in zip(names, values, strict=True):
            monkeypatch.delenv(name, raising=False) if values[2] == 1 else monkeypatch.setenv(name, str(value))
        fresh = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(fresh)
        assert tuple(getattr(fresh, name) for name in names) == values


@pytest.mark.parametrize(("device", "rank", "gpu"), [
    ("cuda", 0, 0), ("cuda", 3, 3), ("cuda:2", 0, 2), ("mps", 0, None), ("cpu", 0, None),
])  # fmt: skip
def test_a_process_takes_the_gpu_that_is_named_or_the_one_of_its_number(device, rank, gpu, monkeypatch):
    """What asks for no GPU in particular, as for its free memory, then means that one."""
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(distributed, "LOCAL_RANK", rank)
    distributed.start(device)
    assert taken == ([] if gpu is None else [gpu])


def test_a_pytorch_that_knows_one_process_alone_is_enough(monkeypatch):
    """Some builds, as those for small computers, have no torch.distributed."""
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    for name in ("torch.distributed.fsdp", "torch.distributed.tensor"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    spec = importlib.util.spec_from_file_location("fresh", distributed.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    fresh.start("cpu")
    model = torch.nn.Linear(2, 2)
    assert fresh.wrap_model(model) is model
    assert not fresh.is_sharded(model)
    assert torch.equal(fresh.full_state_dict(model.state_dict())["weight"], model.weight)
    fresh.end()


def be(monkeypatch, rank, n):
    monkeypatch.setattr(distributed, "RANK", rank)
    monkeypatch.setattr(distributed, "WORLD_SIZE", n)


@pytest.mark.parametrize(("n", "length"), [(2, 5), (2, 6), (3, 7), (3, 2)])
def test_each_image_is_evaluated_by_one_process(n, length, monkeypatch):
    """Sizes that do not divide: the shares differ by one image at most."""
    shares = []
    for rank in range(n):
        be(monkeypatch, rank, n)
        shares.append(list(range(length)[distributed.test_shard()]))
    assert sorted(sum(shares, [])) == list(range(length))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shards_of_a_batch_follow_each_other(monkeypatch):
    """12 images on 3 processes."""
    shares = []
    for rank in range(3):
        be(monkeypatch, rank, 3)
        shares.append(list(range(12)[distributed.shard(12)]))
    assert shares == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_alone_everything_returns_what_it_was_given():
    """And nobody is waited for: there is no process group."""
    tensor = torch.arange(3.0)
    assert distributed.all_reduce_sum(tensor) is tensor
    assert list(distributed.all_reduce_max(True, 7)) == [True, 7]
    assert torch.equal(distributed.all_gather(tensor), tensor[None])
    assert distributed.gather_dicts({"a": 1}) == {"a": 1}
    assert distributed.from_rank0(lambda: 5) == 5
    with pytest.raises(ValueError, match="told"):
        distributed.from_rank0(lambda: (_ for _ in ()).throw(ValueError("told")))
    model = torch.nn.Linear(2, 2)
    assert distributed.wrap_model(model, fsdp=True) is model
    assert not distributed.is_peer_lost(RuntimeError("Connection closed by peer"))


@pytest.mark.parametrize(("words", "lost"), [
    ("[gloo/pair.cc:523] Connection closed by peer [127.0.0.1]:4321", True),
    ("[gloo/pair.cc:553] Read error [127.0.0.1]:4321: Connection reset by peer", True),
    ("[gloo/unbound_buffer.cc:78] Timed out waiting 600000ms for recv operation to complete", True),
    ("NCCL communicator was aborted on rank 1.", True),
    ("mat1 and mat2 shapes cannot be multiplied", False),
])  # fmt: skip
def test_the_death_of_a_process_is_told_from_other_errors(words, lost, monkeypatch):
    """By the words of gloo and NCCL: another error is a fault of the program, and shows where."""
    be(monkeypatch, 0, 2)
    assert distributed.is_peer_lost(RuntimeError(words)) == lost


def test_one_process_prints(monkeypatch, capsys):
    for rank in (0, 1):
        be(monkeypatch, rank, 2)
        distributed.print0(f"process {rank}")
    assert capsys.readouterr().out == "process 0\n"


BAD = {
    "--batch-size 9": "--batch-size 9 2 processes multiple of 2",
    "--batch-size 6 --mixup 0.8": "--batch-size 6 even multiple of 4",
    "--batch-size 8 --micro-batch 8": "--micro-batch 8 --batch-size 8 2 processes divisor",
}


@pytest.mark.parametrize("command", BAD)
def test_a_batch_that_processes_cannot_share_is_refused(command, small, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    assert run(f"--arch vit_micro4 --img-size 16 {command} --out run") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(word in err for word in BAD[command].split()), err
    assert not Path("run").exists()


def test_blocks_that_are_computed_twice_have_the_same_gradients(small, monkeypatch):
    """--checkpointing, in float64; dropout draws the same numbers both times. Each block runs once more.

    The second time is the same arithmetic as the first: only the order in which gradients are summed may differ.
    """
    calls, forward = [], vit.Attention.forward
    monkeypatch.setattr(vit.Attention, "forward", lambda *args: calls.append(1) or forward(*args))
    counts, gradients = [], []
    for flag in ("", "--checkpointing"):
        config, dataset = settings(f"{MICRO} --dropout 0.3 --drop-path 0.2 {flag}")
        torch.manual_seed(0)
        model = train.build(config, dataset).double()
        torch.nn.init.normal_(model.head.weight)  # it starts at 0: no gradient would reach the encoder
        images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
        calls.clear()
        model(images).square().sum().backward()
        counts.append(len(calls))
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert counts == [6, 12]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


# ---------------------------------------------------------------------------------------------
# With torchrun
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_starts_what_forks_start(runs, tmp_path):
    """The same two processes, as users start them: the same numbers, and figures of a model in shards."""
    folder, *_ = runs
    process = launch(tmp_path, f"{MICRO} {COMMANDS['hpm-fsdp']} --out run", torchrun=True)
    _, err = wait(process)
    assert process.returncode == 0, err[-3000:]
    assert log(tmp_path / "run") == log(folder / "hpm-fsdp-2")
    assert {"curves.png", "masks.png"} <= {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_within_a_minute(tmp_path):
    """With a message and an exit code, never a hang. Its checkpoint stays."""
    process = launch(tmp_path, f"{MICRO} --steps 2000 --seed 13 --out run", torchrun=True)
    start = time.monotonic()
    _, err = wait(process)
    assert process.returncode != 0
    assert "error: another process is gone" in err, err
    assert "exitcode  : 9" in err
    assert time.monotonic() - start < 90, "a minute, and the time to start"
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody is left


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_processes_at_the_same_step(number, tmp_path, monkeypatch):
    """A cluster sends SIGTERM to torchrun alone, a terminal SIGINT to all of them. The run can go on."""
    process = launch(tmp_path, f"{MICRO} --steps 20000 --out run", torchrun=True)
    deadline = time.monotonic() + 120
    while not ((tmp_path / "run/log.jsonl").exists() and log(tmp_path / "run")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number) if number == signal.SIGTERM else os.killpg(process.pid, number)
    out, err = wait(process)
    assert process.returncode != 0
    assert "another process is gone" not in err
    assert "go on with: torchrun --nproc_per_node=2 train.py --resume --out run" in out
    monkeypatch.chdir(tmp_path)
    step = checkpoint("run")["step"]
    config = json.loads(Path("run/config.json").read_text())
    Path("run/config.json").write_text(json.dumps(config | {"steps": step + 1, "warmup": 0}))
    monkeypatch.setattr(data, "photos", uneven)
    monkeypatch.setitem(vit.ARCHS, "vit_micro4", SHALLOW)
    assert run("--resume --out run") == 0
    assert log("run")[-1]["step"] == step + 1
