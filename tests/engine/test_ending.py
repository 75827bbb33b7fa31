"""How runs end before their time: one line that says what to do, an exit code, nothing lost and nothing left behind."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import train
from downstream import probes
from engine import checkpoint as run_folder
from engine import distributed, ending, memory
from tests.engine import runs
from tests.engine.runs import MICRO, STILL, one_line, run, settings, watch, write_images

pytestmark = pytest.mark.usefixtures("leave_no_trace")
ROOT = Path(train.__file__).parent


def fail(error):
    """A function that raises it."""

    def fail(*_, **__):
        raise error

    return fail


# ---------------------------------------------------------------------------------------------
# Out of memory
# ---------------------------------------------------------------------------------------------

OUT_OF_MEMORY = {  # as Python, NumPy, PyTorch and the system say it
    "the host, Python": MemoryError(),
    "the host, NumPy": MemoryError("Unable to allocate 9.09 TiB for an array with shape (10000000000000,)"),
    "the host, PyTorch": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 3700 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 3700 bytes."),
    "C++": RuntimeError("std::bad_alloc"),
    "the system": OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total of 80 GiB"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 17 GB, max allowed: 18 GB). Tried to allocate 2 GB"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_is_one_line_that_names_a_smaller_micro_batch(kind, small, capsys):
    """On a host or a device. 4 is the batch, 2 its largest smaller divisor."""
    config, _ = settings(MICRO)
    Path("last.pt").touch()
    assert ending.explain(OUT_OF_MEMORY[kind], Path(), config, begun=True) == 1
    error = one_line(capsys)
    assert error.startswith("error: out of memory (")
    assert "enforce fail" not in error, "which says nothing"
    assert "; last.pt has the last good state; " in error
    assert error.endswith("with 4 images at a time; try --micro-batch 2")


def test_a_run_goes_on_after_it_was_out_of_memory(finished, monkeypatch, capsys):
    """With what the line says; nothing that was saved is lost."""
    saved = Path("run/last.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", fail(OUT_OF_MEMORY["CUDA"]))
        assert run("--resume --steps 14 --out run") == 1
    assert one_line(capsys).endswith("try --micro-batch 2")
    assert Path("run/last.pt").read_bytes() == saved
    assert run("--resume --steps 14 --micro-batch 2 --out run") == 0


PLACES = {  # where memory may run out: what is called there
    "loading data": (data, "photos"),
    "building the model": (train, "build_vit"),
    "the optimizer": (train, "build_optimizer"),
    "scores": (probes, "evaluate"),
    "saving": (train, "save_checkpoint"),
    "figures": (train, "draw_figures"),
    "several learning rates": (train, "best_learning_rate"),
}


OFTEN = ("building the model", "scores")  # the others are slow, all in all


@pytest.mark.parametrize("place", [pytest.param(p, marks=() if p in OFTEN else pytest.mark.slow) for p in PLACES])
def test_memory_may_run_out_anywhere(place, small, shallow, no_figures, monkeypatch, capsys):
    monkeypatch.setattr(*PLACES[place], fail(MemoryError()))
    lr = "--optimizer sgd --lr 0.1,0.2" if place == "several learning rates" else ""
    assert run(f"{MICRO} {lr} --steps 1 --out run") == 1
    error = one_line(capsys)
    kept = "run/last.pt has the last good state" if place == "figures" else "nothing was saved before"
    assert error.startswith(f"error: out of memory (MemoryError); {kept}; ")
    assert "--micro-batch" in error


def test_memory_that_runs_out_with_one_image_has_other_advice(small, shallow, no_figures, monkeypatch, capsys):
    monkeypatch.setattr(train, "train_step", fail(MemoryError()))
    assert run(f"{MICRO} --micro-batch 1 --out run") == 1
    error = one_line(capsys)
    assert "--micro-batch" not in error
    assert all(word in error for word in ("--checkpointing", "--img-size", "--arch"))


GONE = [
    "DataLoader worker (pid 7) is killed by signal: Killed. ",
    "DataLoader worker (pid(s) 7) exited unexpectedly",
    "unable to mmap 1024 bytes from file </torch_1>: Cannot allocate memory (12)",
]


@pytest.mark.parametrize("text", GONE)
def test_a_worker_that_is_gone_is_one_line_that_names_workers(text, capsys):
    """The kernel ends whoever takes too much memory, without a word."""
    assert ending.explain(RuntimeError(text), None, None, begun=True) == 1
    assert "try a smaller --workers" in one_line(capsys)


def test_a_fault_of_the_program_is_still_a_traceback(finished, monkeypatch, capsys):
    """Nobody finds it by a line that says to use less memory."""
    for error in (RuntimeError("size mismatch"), TypeError("no number"), IndexError("out of range")):
        assert ending.explain(error, None, None, begun=True) is None
        assert not capsys.readouterr().err
    monkeypatch.setattr(train, "train_step", fail(error))
    with pytest.raises(IndexError, match="out of range"):
        run("--resume --steps 14 --out run")


@pytest.mark.parametrize(
    ("size", "share", "fitting", "wanted"),
    [(64, 64, None, 32), (48, 96, None, 32), (7, 7, None, 1), (64, 64, 20, 16), (64, 64, 64, 32), (16, 64, 64, 8)],
)
def test_the_micro_batch_that_is_named_divides_the_batch(size, share, fitting, wanted, small):
    """The largest smaller divisor, no larger than what was measured."""
    config, _ = settings(f"{STILL} --batch-size {share} --micro-batch {size} --steps 3")
    assert memory.advice(MemoryError(), config, fitting).endswith(f"try --micro-batch {wanted}")


# ---------------------------------------------------------------------------------------------
# What fits into a GPU's memory
# ---------------------------------------------------------------------------------------------


class Gpu:
    """A GPU of `total` bytes, in which a step takes `fixed + each * n`."""

    def __init__(self, monkeypatch, total, fixed, each):
        self.total, self.fixed, self.each, self.peak, self.steps = total, fixed, each, 0, []
        for name, call in dict(
            reset_peak_memory_stats=self.reset, max_memory_allocated=lambda device: self.peak,
            mem_get_info=lambda device: (total - fixed, total), memory_reserved=lambda device: fixed,
        ).items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, call)

    def reset(self, device):
        self.peak = 0

    def step(self, n):
        self.steps.append(n)
        self.peak = max(self.peak, self.fixed + self.each * n)
        if self.peak > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("total", "fixed", "each", "later", "share", "fits"),
    [
        (10_000, 1000, 10, 0, 4096, 512),  # 0.9 * 10,000 - 1000 leaves room for 800; the next divisor is 512
        (10_000, 1000, 10, 3000, 4096, 256),  # for 500
        (10_000, 1000, 10, 0, 600, 600),  # all of it
        (10_000, 1000, 10, 0, 1800, 600),  # 900 does not fit
        (10_000, 1000, 100, 0, 97, 1),  # 80 would fit, but 97 is a prime
        (10_000, 1000, 5000, 0, 64, 1),  # not even the images that it is measured with
        (10_000, 1000, 10, 9000, 64, 1),  # nothing fits
        (10_000, 1000, 0, 0, 64, 64),  # steps that take nothing
    ],
)
def test_what_fits_is_measured_by_two_small_steps(total, fixed, each, later, share, fits, monkeypatch):
    """Memory is a straight line in the number of images; the answer is a divisor of the batch, in 90 % of it."""
    gpu = Gpu(monkeypatch, total, fixed, each)
    assert memory.fit_micro_batch(gpu.step, share, later, "cuda") == fits
    assert max(gpu.steps) <= 12
    assert fits == 1 or fixed + each * fits + later <= 0.9 * total


TASKS = ["supervised --mixup 0.8 --dropout 0.1", "mpp", "mae --mask block", "hpm --teacher in-turn", "linear", "knn"]


@pytest.mark.parametrize("task", TASKS)
def test_a_measured_step_leaves_nothing_behind(task, small, shallow, monkeypatch):
    """No gradient and no other weight; and of an encoder that is only asked for features, no backward pass."""
    torch.save(train.build(*settings(f"{MICRO}")).state_dict(), "init.pt")
    init = "--init init.pt" if task in ("linear", "knn") else ""
    config, dataset = settings(f"{STILL} --task {task} {init}")
    model, seen = train.build(config, dataset), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: seen.append(loss.item()) or backward(loss))
    train.try_step(config, model, dataset, 3)
    assert len(seen) == (task not in ("linear", "knn"))
    assert all(p.grad is None for p in model.parameters())
    assert not runs.different(before, model.state_dict())


def test_a_run_on_cuda_takes_what_fits_and_says_so(small, shallow, no_figures, monkeypatch, capsys):
    """As the first lines and config.json say it; a flag goes before it."""
    monkeypatch.setattr(train, "fitting", lambda *_: 2)
    prepare = train.prepare

    def open_question(given):
        config, dataset, out = prepare(given)
        return train.dataclasses.replace(config, micro_batch=given.micro_batch), dataset, out

    monkeypatch.setattr(train, "prepare", open_question)
    for flag, wanted in (("", 2), ("--micro-batch 4", 4)):
        assert run(f"{MICRO} {flag} --steps 1 --out run{wanted}") == 0
        assert json.loads(Path(f"run{wanted}/config.json").read_text())["micro_batch"] == wanted
        assert f"1 steps of 4 images, {wanted} at a time" in capsys.readouterr().out.splitlines()[1]


# ---------------------------------------------------------------------------------------------
# Places where nothing can be written
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "number"),
    [("", errno.EROFS), ("--out far/below/run", errno.EACCES), ("--out link", errno.ENOSPC)],
)
def test_a_file_system_that_takes_nothing_is_one_line_at_the_start(flag, number, small, shallow, monkeypatch, capsys):
    """Read-only, forbidden or full; before anything is trained: exit code 2."""
    Path("link").symlink_to("elsewhere")
    error = OSError(number, os.strerror(number), "runs")
    monkeypatch.setattr(os, "mkdir", fail(error))
    assert run(f"{MICRO} {flag}") == 2
    assert one_line(capsys)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_folder_of_the_system_takes_no_run(small, shallow, capsys):
    """/proc is a real file system in which nobody, be it root, makes a folder."""
    assert run(f"{MICRO} --out /proc/run") == 2
    assert "nothing can be written to /proc/run" in one_line(capsys)


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 2500])
def test_an_out_that_is_too_long_is_one_line(name, small, shallow, capsys):
    """A name has at most 255 bytes, a path some 4,096."""
    assert run(f"{MICRO} --out {name}") == 2
    assert one_line(capsys)
    assert run(f"--resume --out {name}") == 2
    assert one_line(capsys)


@pytest.mark.parametrize("number", [errno.EROFS, pytest.param(errno.EIO, marks=pytest.mark.slow)])
def test_a_disk_that_fails_later_is_exit_code_1(number, finished, monkeypatch, capsys):
    """What was saved is still there."""
    monkeypatch.setattr(run_folder, "append_log", fail(OSError(number, os.strerror(number))))
    assert run("--resume --steps 14 --out run") == 1
    assert "run/last.pt has the last good state" in one_line(capsys)
    assert runs.checkpoint("run")["step"] == 12


# ---------------------------------------------------------------------------------------------
# What is said on the way, and how to go on
# ---------------------------------------------------------------------------------------------


def test_progress_is_plain_lines_where_the_output_is_no_terminal(small, shallow, no_figures, capsys):
    """One for each line of log.jsonl, for the file of a cluster's job: without a carriage return."""
    assert run(f"{MICRO} --steps 7 --out run") == 0
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    logged = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert "\r" not in err
    assert len(lines) == len(logged) == 7
    for line, values in zip(lines, logged, strict=True):
        assert line.startswith(f"step {values['step']} of 7, epoch {values['epoch']:.1f}: loss {values['loss']:.3f}, ")
        assert f"lr {values['lr']:.1e}" in line
    assert f"top1 {logged[-1]['top1']:.4g}" in lines[-1]


def test_a_terminal_shows_a_bar(small, shallow, no_figures, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run(f"{MICRO} --out run") == 0
    err = capsys.readouterr().err
    assert "\r" in err
    assert "3/3" in err
    assert not [line for line in err.splitlines() if line.startswith("step ")]


def test_other_processes_than_the_first_say_nothing(small, monkeypatch, capsys):
    from engine import report

    monkeypatch.setattr(distributed, "RANK", 1)
    with report.progress_bar(0, 3) as bar:
        report.tell(bar, dict(step=1, epoch=0.1, loss=1.0, lr=0.1, seconds=1.0, images_per_second=4.0))
    assert capsys.readouterr() == ("", "")


FOLDERS = ["run", "my run", "it's", 'a "b"', "$HOME", "-run", "a;b", "grün", "tab\there", "*"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_printed_to_go_on_can_be_typed_as_it_is(folder, monkeypatch):
    """A shell takes it apart into the words that were meant; train.py finds the folder."""
    out = Path(folder)
    out.mkdir()
    (out / "last.pt").touch()
    said = ending.how_to_go_on(out).removeprefix("stopped; go on with: ")
    words = shlex.split(said)
    assert words[:-1] == ["python", "train.py", "--resume", "--out"]
    given = train.flags.parse(words[2:])
    assert given.resume
    assert Path(given.out) == out
    if os.name == "posix":  # a shell itself
        echo = f"{sys.executable} -c 'import sys; print(ascii(sys.argv[1:]))' {said}"
        assert subprocess.run(["sh", "-c", echo], capture_output=True, text=True).stdout.strip() == ascii(words)
    monkeypatch.setattr(distributed, "WORLD_SIZE", 4)
    monkeypatch.setattr(distributed, "LOCAL_WORLD_SIZE", 2)
    assert "go on with: torchrun --nproc_per_node=2 train.py --resume" in ending.how_to_go_on(out)


def test_windows_quotes_in_its_own_way(monkeypatch):
    """Its shells know no single quotes."""
    Path("my run").mkdir()
    Path("my run/last.pt").touch()
    with monkeypatch.context() as patch:
        patch.setattr(ending, "os", type("os", (), {"name": "nt"}))
        said = ending.how_to_go_on(Path("my run"))
    assert said == 'stopped; go on with: python train.py --resume --out "my run"'


def test_a_run_needs_nothing_that_windows_or_macos_lack(small, shallow, no_figures, monkeypatch):
    """No fork, fcntl, sysconf, CPU sets, or signals of POSIX; the run is stopped, goes on, and is measured by a probe,
    which asks for the free memory."""
    for name in ("fork", "sysconf", "sched_getaffinity", "mkfifo", "getuid", "killpg", "WNOHANG"):
        monkeypatch.delattr(os, name, raising=False)
    for name in ("SIGCHLD", "SIGHUP", "SIGKILL", "SIGALRM", "SIGUSR1"):
        monkeypatch.delattr(signal, name, raising=False)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "resource", None)
    with monkeypatch.context() as patch:
        watch(patch, lambda step, *_: os.kill(os.getpid(), signal.SIGTERM) if step == 0 else None)
        assert run(f"{MICRO} --out run") == 143
    assert run("--resume --out run") == 0
    assert run(f"{MICRO} --task linear --init run/last.pt --out probe") == 0
    write_images("pictures", ant=4, cat=4)
    assert run(f"{MICRO} --data folder:pictures --workers 0 --steps 1 --out folder") == 0


# ---------------------------------------------------------------------------------------------
# Nothing is left behind
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["error", "signal", "end"])
def test_the_batches_are_closed_however_the_loop_ends(way, small, shallow, no_figures, monkeypatch):
    """They may have processes that decode images, and wait for more."""
    closed, original = [], data.InMemory.train_batches

    def train_batches(*given):
        try:
            yield from original(*given)
        finally:
            closed.append(way)

    monkeypatch.setattr(data.InMemory, "train_batches", train_batches)
    kept = []
    if way == "error":
        watch(monkeypatch, fail(TypeError("a fault")))
        try:
            run(f"{MICRO} --out run")
        except TypeError as error:
            kept.append(error)  # whose traceback holds all that the loop had
    elif way == "signal":
        watch(monkeypatch, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert run(f"{MICRO} --out run") == 130
    else:
        assert run(f"{MICRO} --out run") == 0
    assert closed == [way]


FAULT = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from torch import nn
torch.set_num_threads(1)
place, sys.argv = sys.argv[1], ["train.py", *sys.argv[2:]]

def fault(*_, **__):
    raise {{"memory": MemoryError("out of memory"), "fault": TypeError("a fault of the program")}}[place]

if place == "memory":
    torch.optim.AdamW.step = fault
else:
    from downstream import probes
    batches = lambda split, size: split.test_batches(size, 1, torch.device("cpu"))
    probes.evaluate = lambda model, split, size, *how: [fault() for _ in batches(split, size)]
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["memory", "fault"])
def test_a_program_ends_with_its_workers_whatever_happens(place):
    """Workers ignore SIGTERM, with which Python ends them: it would wait for them for ever, holding all its memory."""
    write_images("pictures", ant=40, cat=40)
    Path("fault.py").write_text(FAULT)
    command = f"{place} {MICRO} --data folder:pictures --workers 2 --out run"
    process = subprocess.run(
        [sys.executable, "fault.py", *command.split()], capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 1, process.stderr
    last = process.stderr.splitlines()[-1]
    if place == "memory":
        assert last.startswith("error: out of memory")
        assert "Traceback" not in process.stderr
    else:
        assert last == "TypeError: a fault of the program"
