"""What engine/checkpoint.py promises: whatever happens to a run, nothing that was saved is lost.

The tests here hurt a run on purpose: they kill it, fill its disk, flip bits of its checkpoint, start it twice.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
import vit
from downstream import probes
from engine import checkpoint
from tests.engine import runs
from tests.engine.runs import MICRO, STILL, different, log, run, watch

ROOT = Path(train.__file__).parent
LAST, PREVIOUS = Path("last.pt"), Path("previous.pt")
LONGER = "--arch vit_micro4 --img-size 16 --batch-size 4 --steps 12"  # two epochs: two checkpoints
pytestmark = pytest.mark.usefixtures("leave_no_trace")


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------


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
    checkpoint.save(LAST, {"step": 1})
    renames, original = [], Path.replace

    def replace(path, target):
        if len(renames) == list(MOMENTS).index(moment) - 1:
            raise Killed
        renames.append(target)
        return original(path, target)

    def write(content, file):
        Path(file).write_bytes(b"half")
        raise Killed

    if moment == "writing":
        monkeypatch.setattr(torch, "save", write)
    monkeypatch.setattr(Path, "replace", replace)
    try:
        checkpoint.save(LAST, {"step": 2})
        assert moment == "afterwards"
    except Killed:
        pass
    assert checkpoint.load(Path())["step"] == MOMENTS[moment]


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(monkeypatch):
    """Else a power cut could leave the new name with nothing behind it, and the old file gone."""
    checkpoint.save(LAST, {"step": 1})
    events, fsync, replace = [], os.fsync, Path.replace

    def watched_fsync(descriptor):
        [part] = Path().glob("*.part")
        events.append(f"fsync of step {torch.load(part)['step']}")
        fsync(descriptor)

    def watched_replace(path, target):
        events.append(f"{path.suffix} -> {target}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    checkpoint.save(LAST, {"step": 2})
    assert events == ["fsync of step 2", ".pt -> previous.pt", ".part -> last.pt"]


def test_the_previous_checkpoint_is_kept():
    for step in (1, 2, 3):
        checkpoint.save(LAST, {"step": step})
    assert [torch.load(path)["step"] for path in (LAST, PREVIOUS)] == [3, 2]


def test_what_was_saved_is_loaded_with_its_path():
    """None where nothing was saved."""
    assert checkpoint.load(Path()) is None
    checkpoint.save(LAST, {"step": 5, "model": {"w": torch.arange(3.0)}})
    loaded = checkpoint.load(Path())
    assert loaded["step"] == 5
    assert torch.equal(loaded["model"]["w"], torch.arange(3.0))
    assert loaded["path"] == LAST


@pytest.mark.parametrize("damage", ["bit", "truncated", "zeros", "empty"])
def test_a_damaged_checkpoint_is_noticed_and_the_previous_one_used(damage, capsys):
    """A record of torch.save carries a CRC-32, which finds every single flipped bit: here 40 of them, in the values."""
    values = torch.arange(5000.0)
    for step in (1, 2):
        checkpoint.save(LAST, {"step": step, "values": values})
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
        assert checkpoint.load(Path())["step"] == 1
        err = capsys.readouterr().err
        assert "warning: last.pt is damaged" in err
        assert "previous.pt, step 1" in err


def test_a_flipped_bit_anywhere_changes_nothing_or_is_noticed(capsys):
    """Also in names, sizes and places of the archive: 100 of them."""
    values = torch.arange(50.0)
    for step in (1, 2):
        checkpoint.save(LAST, {"step": step, "values": values})
    whole, rng = LAST.read_bytes(), random.Random(0)
    noticed = 0
    for _ in range(100):
        broken = bytearray(whole)
        broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        LAST.write_bytes(broken)
        loaded = checkpoint.load(Path())
        assert torch.equal(loaded["values"], values)
        assert loaded["step"] in (1, 2)
        noticed += loaded["step"] == 1
    assert noticed > 5


def test_if_no_checkpoint_is_whole_the_error_says_what_to_do():
    for path in (LAST, PREVIOUS):
        path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"previous\.pt is damaged.*--overwrite"):
        checkpoint.load(Path())


class Code:
    """When it is unpickled, it leaves a file."""

    def __reduce__(self):
        return Path.touch, (Path("run.txt"),)


def test_no_code_in_a_checkpoint_is_ever_run():
    """A pickle may name any function to be called. torch.load(weights_only=False) would call it."""
    torch.save({"step": 1, "model": Code()}, LAST)
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(Path())
    assert not Path("run.txt").exists()


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("PytorchStreamWriter failed\nat …")])
def test_a_save_that_fails_says_so_and_changes_nothing(error, monkeypatch):
    checkpoint.save(LAST, {"step": 1})
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(OSError, match="last.pt can't be written") as caught:
        checkpoint.save(LAST, {"step": 2})
    assert str(error).splitlines()[0] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in Path().iterdir()] == ["last.pt"]
    assert checkpoint.load(Path())["step"] == 1


NO_CHECKPOINT = {  # what torch.save may have written, and is no checkpoint of a run
    "a tensor": torch.zeros(3),
    "a list": [1, 2],
    "nothing": None,
    "weights alone": {"head.weight": torch.zeros(3)},
    "a step that is a word": {"step": "2"},
    "a step that is a flag": {"step": True},
    "a step that is a fraction": {"step": 2.5},
    "a step that is a tensor": {"step": torch.tensor(2)},
    "a step before the first": {"step": -1},
}


@pytest.mark.parametrize("kind", NO_CHECKPOINT)
def test_a_whole_file_of_another_kind_is_as_good_as_a_damaged_one(kind, capsys):
    """torch.load takes it; the previous checkpoint is used, and without one there is one line."""
    checkpoint.save(LAST, {"step": 1})
    checkpoint.save(LAST, NO_CHECKPOINT[kind])
    assert checkpoint.load(Path())["step"] == 1
    assert "warning: last.pt is damaged (no checkpoint of a run" in capsys.readouterr().err
    PREVIOUS.unlink()
    with pytest.raises(ValueError, match=r"^last\.pt is damaged .* --overwrite$"):
        checkpoint.load(Path())


def pipe(path):
    getattr(os, "mkfifo", lambda _: pytest.skip("no named pipes here"))(path)


NO_FILE = {
    "a pipe": pipe,
    "a folder": Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to a device that never ends": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", NO_FILE)
@pytest.mark.parametrize("name", ["last.pt", "config.json", "log.jsonl"])
def test_only_regular_files_are_read(kind, name, capsys):
    """To open a pipe waits for a writer, for ever."""
    PREVIOUS.write_bytes(b"")
    checkpoint.save(PREVIOUS, {"step": 1})
    NO_FILE[kind](Path(name))
    if name == "last.pt":
        assert checkpoint.load(Path())["step"] == 1
        assert "last.pt is damaged (no regular file)" in capsys.readouterr().err
    elif name == "config.json":
        with pytest.raises(ValueError, match="nothing to resume"):
            checkpoint.old_run(".", "name")
    else:
        assert checkpoint.read_log(Path()) == []


class FullDisk:
    """`with FullDisk():` files can't grow beyond 1 MB; the system says so as it says that a disk is full."""

    def __enter__(self):
        resource = pytest.importorskip("resource")
        self.limits, self.set = resource.getrlimit(resource.RLIMIT_FSIZE), resource.setrlimit
        self.kind, self.handler = resource.RLIMIT_FSIZE, signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        return self

    def fill(self):
        self.set(self.kind, (1 << 20, self.limits[1]))

    def __exit__(self, *_):
        self.set(self.kind, self.limits)
        signal.signal(signal.SIGXFSZ, self.handler)


def test_a_full_disk_leaves_the_previous_checkpoint_whole():
    """A real one: the system refuses to write on."""
    checkpoint.save(LAST, {"step": 1})
    with FullDisk() as disk:
        disk.fill()
        with pytest.raises(OSError, match="last.pt can't be written"):
            checkpoint.save(LAST, {"step": 2, "values": torch.zeros(2**19)})
    assert [path.name for path in Path().iterdir()] == ["last.pt"]
    assert checkpoint.load(Path())["step"] == 1


# ---------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------


def test_a_run_without_a_name_gets_one_that_is_free():
    """runs/TASK-ARCH-DATA, then -2, -3, …; a path in the data's name makes no folders of its own."""
    name = "mae-vit_b16-folder:/data/x"
    folders = [Path("runs", f"mae-vit_b16-folder-_data_x{end}") for end in ("", "-2", "-3")]
    for folder in folders:
        assert checkpoint.new_run(None, name) == folder
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"of": folder.name}))
        assert checkpoint.old_run(None, name) == (folder, {"of": folder.name}), "the last one"


def test_a_default_name_fits_into_a_folder_and_differs_for_other_data():
    """File systems take names of 255 bytes, also of letters that need several, and runs add -2, -3, … The same data has
    the same name, or --resume would not find it."""
    paths = [f"mae-vit_b16-folder:/{letter * n}/{end}" for letter in "aä写" for n in (240, 1000) for end in "xy"]
    found = [next(checkpoint.default_folders(path)) for path in paths]
    assert len(set(found)) == len(paths)
    assert found == [next(checkpoint.default_folders(path)) for path in paths]
    for folder, path in zip(found, paths, strict=True):
        assert len(os.fsencode(folder.name)) <= 240
        assert folder.name.startswith(f"mae-vit_b16-folder-_{path[20:40]}")
        folder.mkdir(parents=True)
    short = f"mae-vit_b16-folder:{'a' * 150}"
    assert next(checkpoint.default_folders(short)) == Path("runs", short.replace(":", "-"))


def test_a_default_name_is_one_on_every_system():
    r"""Windows allows none of : * ? " < > | in a name, and \ separates folders there."""
    folder = next(checkpoint.default_folders('mae-vit_b16-folder:C:\\my "data"/a*b?<c>|d'))
    assert folder == Path("runs", "mae-vit_b16-folder-C-_my -data-_a-b--c--d")


@pytest.mark.parametrize("kept", ["last.pt", "previous.pt", "result.json"])
def test_a_folder_that_holds_a_run_is_not_replaced_by_mistake(kept):
    """previous.pt alone is left by a kill between two renames; result.json alone by a run without training."""
    assert checkpoint.new_run("out/run", "name") == Path("out/run"), "nothing is there"
    Path("out/run").mkdir(parents=True)
    Path("out/run/other.txt").touch()
    assert checkpoint.new_run("out/run", "name") == Path("out/run"), "nothing of a run is there"
    Path("out/run", kept).touch()
    for look in (lambda: checkpoint.new_run("out/run", "name"), lambda: checkpoint.claim(Path("out/run"), new=True)):
        with pytest.raises(ValueError, match=r"out/run holds a run; --resume .*--overwrite .*--out"):
            look()
    assert checkpoint.new_run("out/run", "name", overwrite=True) == Path("out/run")
    assert checkpoint.claim(Path("out/run")) == Path("out/run")


@pytest.mark.parametrize("out", ["file", "file/below", "file/far/below"])
def test_an_out_that_can_be_no_folder_is_refused(out):
    Path("file").touch()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=f"--out {out} can't be a folder.*another"):
            checkpoint.new_run(out, "name", overwrite)


def test_there_must_be_something_to_resume():
    """And it must say what it is."""
    for out, path in ((None, "runs/name/config.json"), ("run", "run/config.json")):
        with pytest.raises(ValueError, match=f"nothing to resume: no {path}"):
            checkpoint.old_run(out, "name")
    Path("run").mkdir()
    Path("run/config.json").write_text('{"seed": 1, "al')
    with pytest.raises(ValueError, match=r"run/config.json is damaged.*--overwrite"):
        checkpoint.old_run("run", "name")
    Path("run/config.json").write_text('{"seed": 1, "alpha": [0, 0.5]}')
    assert checkpoint.old_run("run", "name") == (Path("run"), {"seed": 1, "alpha": [0, 0.5]})


HOLD = """
import sys, time, filelock
lock = filelock.FileLock(sys.argv[1] + "/.lock")
lock.acquire(timeout=0)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder():
    """A function that lets another process hold a folder, until it is killed."""
    processes = []

    def hold(folder):
        process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.wait()


def test_a_folder_belongs_to_one_run_until_it_ends(holder):
    """However it ends: the lock is the process's, and kill -9 leaves none behind."""
    Path("run").mkdir()
    process = holder("run")
    for new in (True, False):
        with pytest.raises(ValueError, match="another run is writing to run.*--out"):
            checkpoint.claim(Path("run"), new=new)
    process.kill()
    process.wait()
    assert checkpoint.claim(Path("run"), new=True) == Path("run")
    other = subprocess.run([sys.executable, "-c", HOLD, "run"], capture_output=True, text=True)
    assert "Timeout" in other.stderr, "this process has it now, and keeps it"


def test_a_folder_where_nothing_can_be_written_is_refused():
    Path("run/.lock").mkdir(parents=True)
    with pytest.raises(ValueError, match="nothing can be written to run.*--out"):
        checkpoint.claim(Path("run"))


# ---------------------------------------------------------------------------------------------
# What a folder says
# ---------------------------------------------------------------------------------------------


def old_folder():
    """A folder with all that a run leaves, and half a file of one that was killed."""
    out = Path("run")
    out.mkdir()
    for name in (*checkpoint.KEPT, "config.json", "curves.png", "masks.png", "last.pt.123.part", "notes.txt"):
        (out / name).write_text(name)
    lines = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    return out, lines


def names(out):
    return {path.name for path in out.iterdir()}


def test_a_new_run_starts_with_an_empty_log_and_nothing_of_an_older_one():
    """What is not a run's is left alone."""
    out, _ = old_folder()
    checkpoint.start_log(out, {"seed": 3}, None)
    assert names(out) == {"config.json", "log.jsonl", "notes.txt"}
    assert checkpoint.old_run(out, "") == (out, {"seed": 3})
    assert checkpoint.read_log(out) == []


def test_a_resumed_run_keeps_of_the_log_what_its_checkpoint_knows():
    """Steps after it come again; a last line that was cut off does not count."""
    out, lines = old_folder()
    assert checkpoint.read_log(out) == lines
    before = names(out)
    checkpoint.start_log(out, {"seed": 3, "steps": 2}, {"step": 2, "path": out / "last.pt"})
    assert checkpoint.read_log(out) == lines[:2]
    assert names(out) == before - {"last.pt.123.part"}
    assert (out / "last.pt").read_text() == "last.pt"
    assert json.loads((out / "config.json").read_text()) == {"seed": 3, "steps": 2}


def test_a_whole_previous_checkpoint_takes_the_place_of_a_damaged_last_one():
    """Else the next save would put the damaged one in its place."""
    out, _ = old_folder()
    checkpoint.start_log(out, {"steps": 2}, {"step": 2, "path": out / "previous.pt"})
    assert (out / "last.pt").read_text() == "previous.pt"
    assert not (out / "previous.pt").exists()


@pytest.mark.parametrize("moment", ["last.pt", "masks.png", "log.jsonl", "config.json"])
def test_a_run_killed_while_it_starts_is_none_that_can_go_on(moment, monkeypatch):
    """config.json is removed first and written last: it never stands beside what belongs to another run."""
    out, _ = old_folder()
    unlink, replace = Path.unlink, Path.replace

    def kill(path):
        if path.name == moment:
            raise Killed

    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: (kill(path), unlink(path, missing_ok)))
    monkeypatch.setattr(Path, "replace", lambda path, target: (kill(target), replace(path, target)))
    try:
        checkpoint.start_log(out, {"seed": 3}, None)
        assert moment == "config.json", "it is unlinked first: see below"
    except Killed:
        pass
    said = (out / "config.json").read_text() if (out / "config.json").exists() else None
    assert said == ("config.json" if moment == "config.json" else None)


@pytest.mark.parametrize("moment", ["log.jsonl", "config.json"])
def test_a_run_killed_before_it_saved_and_again_while_it_resumes_can_still_go_on(moment, monkeypatch):
    """Only config.json says what it was; nothing else could bring that back."""
    out = Path("run")
    out.mkdir()
    checkpoint.start_log(out, {"seed": 3}, None)
    replace = Path.replace

    def kill(path, target):
        if target.name == moment:
            raise Killed
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", kill)
        with pytest.raises(Killed):
            checkpoint.start_log(out, {"seed": 3}, None)
    assert checkpoint.old_run(out, "") == (out, {"seed": 3})


def test_there_is_no_log_before_the_first_step():
    assert checkpoint.read_log(Path()) == []


TORN = {  # in the middle of a log
    "half a line": b'{"step": 2, "lo\n',
    "zeros": bytes(50) + b"\n",
    "bytes that are no text": b"\xff\xfe\x80\n",
    "no object": b"3\n",
    "no step": b'{"loss": 1.0}\n',
    "a step that is a word": b'{"step": "2"}\n',
    "an empty line": b"\n",
    "brackets without end": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("kind", TORN)
def test_what_is_no_line_of_a_log_is_left_out(kind, capsys):
    """It is what a disk that was full or lost its power leaves. One warning, where it is asked for."""
    good = [b'{"step": 1}\n', b'{"step": 3}\n']
    Path("log.jsonl").write_bytes(good[0] + TORN[kind] + good[1])
    assert checkpoint.read_log(Path()) == [{"step": 1}, {"step": 3}]
    assert not capsys.readouterr().err
    checkpoint.read_log(Path(), warn=True)
    said = "1 of the lines of log.jsonl can't be read; curves.png lacks these steps"
    assert capsys.readouterr().err == f"warning: {said}\n"


@pytest.mark.parametrize("there", [None, b"", b'{"step": 1}\n', b'{"step": 1}\n{"st', b"\xff"])
def test_a_line_is_added_to_a_log_whatever_was_done_to_it(there):
    """It may be gone, or cut off in a line: the next one begins on a line of its own."""
    if there is not None:
        Path("log.jsonl").write_bytes(there)
    before = checkpoint.read_log(Path())
    for step in (7, 8):
        checkpoint.append_log(Path(), {"step": step})
    assert checkpoint.read_log(Path()) == [*before, {"step": 7}, {"step": 8}]


def test_a_checkpoint_knows_the_last_line_of_a_log_that_is_lost():
    """So that a run that is done can tell its scores again."""
    out, lines = old_folder()
    (out / "log.jsonl").unlink()
    saved = {"step": 3, "path": out / "last.pt", "line": lines[2]}
    for _ in range(2):
        checkpoint.start_log(out, {"steps": 3}, saved)
        assert checkpoint.read_log(out) == [lines[2]]
        assert checkpoint.last_line(out) == lines[2]


def test_the_result_of_a_run_that_goes_on_is_no_result():
    """With more --epochs a run that was done is done no more."""
    out, _ = old_folder()
    for steps, there in ((3, True), (4, False)):
        checkpoint.start_log(out, {"steps": steps}, {"step": 3, "path": out / "last.pt"})
        assert (out / "result.json").exists() == there


def test_a_text_is_written_whole_or_not_at_all(monkeypatch):
    checkpoint.write(Path("result.json"), "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            checkpoint.write(Path("result.json"), "new")
    assert Path("result.json").read_text() == "old"
    checkpoint.write(Path("result.json"), "new")
    assert [path.read_text() for path in Path().iterdir()] == ["new"]


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_the_previous_checkpoint_to_the_same_weights(small, shallow, no_figures, capsys):
    """And the damaged one does not become the previous one, for then nothing whole would be left."""
    for out in ("whole", "run"):
        assert run(f"{LONGER} --out {out}") == 0
    damaged = bytearray(Path("run/last.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    Path("run/last.pt").write_bytes(damaged)
    capsys.readouterr()
    assert run("--resume --out run") == 0
    assert "run/previous.pt, step 6" in capsys.readouterr().err
    assert not different(runs.checkpoint("run")["model"], runs.checkpoint("whole")["model"])
    assert log("run") == log("whole")
    assert torch.load("run/previous.pt")["step"] == 6


def test_a_disk_that_fills_up_ends_the_run_in_one_line(small, shallow, no_figures, monkeypatch, capsys):
    """The checkpoint before it stays, and the run can go on from there."""
    with FullDisk() as disk, monkeypatch.context() as patch:
        watch(patch, lambda step, *_: disk.fill() if step == 7 else None)
        code = run(f"{LONGER} --out run")
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 1
    assert len(errors) == 1
    assert "run/last.pt can't be written" in errors[0]
    assert "has the last good state" in errors[0]
    assert runs.checkpoint("run")["step"] == 6
    assert not list(Path("run").glob("*.part"))
    assert run("--resume --out run") == 0


def test_a_run_goes_on_without_the_weights_that_it_started_from(small, shallow, no_figures, monkeypatch):
    """last.pt has everything; the file of --init may be gone."""
    torch.save(vit.create("vit_micro4", 16, 3).state_dict(), "init.pt")
    watch(monkeypatch, lambda step, *_: os.kill(os.getpid(), signal.SIGINT) if step == 0 else None)
    assert run(f"{MICRO} --init init.pt --out run") == 130
    Path("init.pt").unlink()
    assert run("--resume --out run") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_features_are_extracted_is_one_line(number, small, shallow, no_figures, monkeypatch, capsys):
    torch.save(vit.create("vit_micro4", 16, 3).state_dict(), "init.pt")
    monkeypatch.setattr(probes, "extract", lambda *_: os.kill(os.getpid(), number) or time.sleep(5))
    assert run(f"{STILL} --task knn --init init.pt --out run") == 128 + number
    assert "start again with the same command" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--overwrite", "--resume"])
def test_two_runs_do_not_write_into_one_folder(flags, small, shallow, no_figures, holder, capsys):
    """Nothing in it changes; once the other run has ended, this one may have it."""
    begin = MICRO + " --optimizer sgd --out run"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.engine.launch import main; main([{begin!r}], 0)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0  # another process: its lock goes with it
    if not flags:  # a run that has saved nothing yet is protected too
        for name in checkpoint.KEPT:
            Path("run", name).unlink(missing_ok=True)
    process = holder("run")
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    capsys.readouterr()
    command = "--resume --out run" if flags == "--resume" else f"{begin} {flags}"
    assert run(command) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "another run is writing to run" in err
    assert before == {path.name: path.read_bytes() for path in Path("run").iterdir()}
    process.kill()
    process.wait()
    if flags != "--resume":  # that of launch.py has two blocks
        assert run(command) == 0


KILLER = f"""
import os, random, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
import data, train, vit
from tests.engine.launch import SHALLOW
from tests.engine.runs import small_photos

torch.set_num_threads(1)
data.photos, train.SAVE_EVERY, train.EVALUATIONS = small_photos, 0, 1000  # a checkpoint after every step
vit.ARCHS["vit_micro4"], train.draw_figures = SHALLOW, lambda *_: None
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
sys.exit(os.waitstatus_to_exitcode(os.waitpid(start(arguments), 0)[1]))
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
    whole, killed = runs.checkpoint("whole"), runs.checkpoint("run")
    assert not different(whole["model"], killed["model"])
    for one, other in zip(whole["optimizer"]["state"].values(), killed["optimizer"]["state"].values(), strict=True):
        assert not different(one, other)
    assert log("run") == log("whole")
