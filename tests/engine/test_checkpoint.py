"""What run_folder.py promises: whatever happens to a run, nothing that was saved is lost.

The tests here hurt a run on purpose: they kill it, fill its disk, flip bits of its checkpoint, start it twice.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import run_folder
import train
import vit
from tests.test_train import (  # noqa: F401 (fixtures)
    MICRO,
    checkpoint,
    different,
    leave_no_trace,
    log,
    no_figures,
    run,
    small,
    watch,
)

ROOT = Path(train.__file__).parent
LAST, PREVIOUS = Path("last.pt"), Path("previous.pt")


class Killed(BaseException):
    """Stands in for kill -9: nothing after it is run."""


MOMENTS = {  # while the second of two checkpoints is saved: what can be loaded then
    "writing": 1,
    "before last.pt is renamed": 1,
    "before the new one is renamed": 1,
    "afterwards": 2,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_at_every_moment_of_a_save_there_is_a_whole_checkpoint(moment, monkeypatch):
    """Two renames, and three places between them where a run can be killed."""
    run_folder.save(LAST, {"step": 1})
    renames, original = [], Path.replace

    def replace(path, target):
        if len(renames) == list(MOMENTS).index(moment) - 1:
            raise Killed
        renames.append(target)
        return original(path, target)

    def write(content, file):
        file.write(b"half")
        raise Killed

    if moment == "writing":
        monkeypatch.setattr(torch, "save", write)
    monkeypatch.setattr(Path, "replace", replace)
    try:
        run_folder.save(LAST, {"step": 2})
        assert moment == "afterwards"
    except Killed:
        pass
    assert run_folder.load(Path())["step"] == MOMENTS[moment]


def test_the_previous_checkpoint_is_kept():
    for step in (1, 2, 3):
        run_folder.save(LAST, {"step": step})
    assert [torch.load(path, weights_only=True)["step"] for path in (LAST, PREVIOUS)] == [3, 2]


@pytest.mark.parametrize("damage", ["bit", "truncated", "zeros", "empty"])
def test_a_damaged_checkpoint_is_noticed_and_the_previous_one_used(damage, capsys):
    """A record of torch.save carries a CRC-32, which finds every single flipped bit: here 40 of them, in the values."""
    values = torch.arange(5000.0)
    for step in (1, 2):
        run_folder.save(LAST, {"step": step, "values": values})
    whole = LAST.read_bytes()
    first = whole.index(values.numpy().tobytes())
    rng = random.Random(0)
    for _ in range(40 if damage == "bit" else 1):
        broken, place = bytearray(whole), first + rng.randrange(4 * len(values))
        if damage == "bit":
            broken[place] ^= 1 << rng.randrange(8)
        elif damage == "zeros":
            broken[first + 4000 : first + 8000] = bytes(4000)
        LAST.write_bytes({"truncated": broken[: len(broken) // 2], "empty": b""}.get(damage, broken))
        assert run_folder.load(Path())["step"] == 1
        err = capsys.readouterr().err
        assert "warning: last.pt is damaged" in err
        assert "previous.pt, step 1" in err


def test_a_flipped_bit_anywhere_changes_nothing_or_is_noticed(capsys):
    """Also in names, sizes and places of the archive: 300 of them."""
    values = torch.arange(50.0)
    for step in (1, 2):
        run_folder.save(LAST, {"step": step, "values": values})
    whole, rng = LAST.read_bytes(), random.Random(0)
    noticed = 0
    for _ in range(300):
        broken = bytearray(whole)
        broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        LAST.write_bytes(broken)
        loaded = run_folder.load(Path())
        assert torch.equal(loaded["values"], values)
        assert loaded["step"] in (1, 2)
        noticed += loaded["step"] == 1
    assert noticed > 20


def test_a_run_goes_on_from_the_previous_checkpoint_to_the_same_weights(small, no_figures, capsys):  # noqa: F811
    """And the damaged one does not become the previous one, for then nothing whole would be left."""
    command = "--arch vit_micro4 --img-size 16 --batch-size 4 --steps 12"
    for out in ("whole", "run"):
        assert run(f"{command} --out {out}") == 0
    damaged = bytearray(Path("run/last.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    Path("run/last.pt").write_bytes(damaged)
    capsys.readouterr()
    assert run("--resume --out run") == 0
    assert "run/previous.pt, step 6" in capsys.readouterr().err
    assert not different(checkpoint("run")["model"], checkpoint("whole")["model"])
    assert log("run") == log("whole")
    assert torch.load("run/previous.pt", weights_only=True)["step"] == 6


def test_a_full_disk_leaves_the_previous_checkpoint_whole_and_says_so(  # noqa: F811
    small,  # noqa: F811
    no_figures,  # noqa: F811
    monkeypatch,
    capsys,
):
    """Files can't grow beyond 1 MB from step 7 on; the system says so as it says that a disk is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(step, *_):
        if step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))

    try:
        with monkeypatch.context() as patch:
            watch(patch, fill)
            code = run("--arch vit_micro4 --img-size 16 --batch-size 4 --steps 12 --out run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 1
    assert len(errors) == 1
    assert "run/last.pt can't be written" in errors[0]
    assert "has the last good state" in errors[0]
    assert checkpoint("run")["step"] == 6
    assert not list(Path("run").glob("*.part"))
    assert run("--resume --out run") == 0


@pytest.mark.parametrize("flags", ["", "--overwrite", "--resume"])
def test_two_runs_do_not_write_into_one_folder(flags, small, no_figures, capsys):  # noqa: F811
    """The lock is the process's: kill -9 leaves none behind."""
    assert run(f"{MICRO} --out run") == 0
    run_folder.held.clear()  # as if that process had ended
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, time; f = open('run/.lock', 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
         "print('held', flush=True); time.sleep(60)"], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    if not flags:  # a run that has saved nothing yet is protected too
        for path in Path("run").glob("*.pt"):
            path.unlink()
        Path("run/result.json").unlink()
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    capsys.readouterr()
    command = flags if flags == "--resume" else f"{MICRO} {flags}"
    assert run(f"{command} --out run") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "another run is writing to run" in err
    assert before == {path.name: path.read_bytes() for path in Path("run").iterdir()}
    holder.kill()
    holder.wait()
    assert run(f"{command} --out run") == 0


def test_a_run_goes_on_without_the_weights_that_it_started_from(small, no_figures, monkeypatch):  # noqa: F811
    """last.pt has everything; the file of --init may be gone."""
    torch.save(vit.create("vit_micro4", 16, 3).state_dict(), "init.pt")
    watch(monkeypatch, lambda step, *_: os.kill(os.getpid(), signal.SIGINT) if step == 0 else None)
    assert run(f"{MICRO} --init init.pt --out run") == 130
    Path("init.pt").unlink()
    assert run("--resume --out run") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_features_are_extracted_is_one_line(number, small, no_figures, monkeypatch, capsys):  # noqa: F811
    torch.save(vit.create("vit_micro4", 16, 3).state_dict(), "init.pt")
    monkeypatch.setattr(train, "extract", lambda *_: os.kill(os.getpid(), number) or time.sleep(5))
    assert run(f"{MICRO} --task knn --init init.pt --out run") == 128 + number
    assert "start again with the same command" in capsys.readouterr().out


KILLER = f"""
import os, random, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
import data, train
from tests.test_train import small_photos

torch.set_num_threads(1)
data.photos, train.SAVE_EVERY, train.EVALUATIONS = small_photos, 0, 1000  # a checkpoint after every step
train.plot_curves = train.plot_masks = lambda *_: None
rng, command, kills, seconds = random.Random(0), sys.argv[1], 0, 1.0

def start(arguments):
    child = os.fork()
    if child == 0:
        os._exit(train.main(arguments.split()))
    return child

begin = time.monotonic()
assert os.waitpid(start(command + " --out whole"), 0)[1] == 0
seconds = time.monotonic() - begin
arguments = command + " --out run"
while kills < 20:
    child = start(arguments)
    time.sleep(rng.uniform(0, seconds / 4))
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] == signal.SIGKILL:
        kills += 1
    if os.path.exists("run/config.json"):
        arguments = "--resume --out run"
print(kills, "kills")
sys.exit(os.waitpid(start(arguments), 0)[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("task", ["supervised --dropout 0.1", "hpm"])
def test_a_run_that_is_killed_20_times_ends_with_the_weights_of_one_that_is_not(task):
    """kill -9 at random moments, many of them while it saves: it does so after each step. Bit for bit, on the CPU."""
    Path("killer.py").write_text(KILLER)
    command = f"{MICRO} --steps 30 --task {task}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "killer.py", command], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "20 kills" in done.stdout
    whole, killed = checkpoint("whole"), checkpoint("run")
    assert not different(whole["model"], killed["model"])
    for one, other in zip(whole["optimizer"]["state"].values(), killed["optimizer"]["state"].values(), strict=True):
        assert not different(one, other)
    assert log("run") == log("whole")
