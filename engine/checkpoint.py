"""The folder of a run: what it says, who may write there, and checkpoints that survive whatever happens.

    config.json     the complete configuration         log.jsonl      an object for each logged step
    last.pt         the newest checkpoint               previous.pt    the one before it
    result.json     the scores, once the run is done    *.png          figures

A run may be killed at any moment, between any two lines below, and go on with --resume: a file gets its name when it
is whole (see files.py), and a checkpoint is kept until the next one is there.
"""

import hashlib
import json
import os
import re
import sys
from itertools import count, takewhile
from pathlib import Path

import torch

from engine import files

KEPT = ("last.pt", "previous.pt", "result.json")  # whatever has one of them is a run that nobody replaces by mistake


LONGEST = 200  # bytes of a default name; file systems take 255, of which "-2" and others need some


def default_folders(name):
    """runs/NAME, then the same with -2, -3, …; name: TASK-ARCH-DATA.

    A path in it makes no folders of its own; of one that is too long for a name, the end gives way to a checksum.
    """
    name, whole = re.sub(r"[\\/]", "_", re.sub(r'[:*?"<>|]', "-", name)), os.fsencode(name)
    if len(os.fsencode(name)) > LONGEST:
        start = os.fsencode(name)[: LONGEST - 9].decode(errors="ignore")
        name = f"{start}-{hashlib.sha256(whole).hexdigest()[:8]}"
    return (Path("runs", f"{name}-{i}" if i > 1 else name) for i in count(1))


def new_run(out, name, overwrite=False):
    """The folder of a new run: `out`, or if that is None the first of runs/NAME, runs/NAME-2, … that is not there.

    Raises ValueError if it would replace another run, unless overwrite says so.
    """
    if out is None:
        return next(folder for folder in default_folders(name) if not folder.exists())
    nearest = next(path for path in (Path(out), *Path(out).absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"--out {out} can't be a folder, for {nearest} is a file; give another one")
    if not overwrite:
        check_free(Path(out))
    return Path(out)


def check_free(out):
    """Raise ValueError if a folder holds a run."""
    if any((out / name).exists() for name in KEPT):
        raise ValueError(f"{out} holds a run; --resume continues it, --overwrite replaces it, another --out keeps it")


def old_run(out, name):
    """The folder of the run to resume, and what its config.json says: Path, dict.

    out None: the last of runs/NAME, runs/NAME-2, …. Raises ValueError if there is no run, or a damaged config.json.
    """
    if out is None:
        there = list(takewhile(Path.exists, default_folders(name)))
        out = there[-1] if there else next(default_folders(name))
    path = Path(out, "config.json")
    if not path.is_file():
        raise ValueError(f"nothing to resume: no {path}; check --out, or leave --resume out to start")
    try:
        return Path(out), json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); start anew with --overwrite") from None


held = []  # the locks of this process, which has them until it ends


def claim(out, new=False):
    """Make the folder this run's own, until the process ends, however it ends. Returns it.

    new: it must not hold a run. Raises ValueError if it does, for another one may have come since `new_run` looked; if
    another run is writing there; and if nothing can be written there.
    """
    try:
        held.append(files.lock(out, wait=False))
    except TimeoutError:
        raise ValueError(f"another run is writing to {out}; wait for its end, or give another --out") from None
    except OSError as error:
        raise ValueError(f"nothing can be written to {out} ({error.strerror}); give another --out") from None
    if new:
        check_free(out)
    return out


def start_log(out, config, checkpoint):
    """Write config.json, config being a dict, and keep of an older log what the checkpoint (or None) knows of.

    What is no line of a log is left out, with a warning: curves begin later then, and nothing else depends on it.
    """
    for path in out.glob("*.part"):  # what a process that was killed was writing
        path.unlink()
    if not checkpoint:
        # config.json goes before another run's checkpoints, and comes last: with it, there is a run that can go on. So
        # a run that was killed before it saved keeps its own, however often that happens.
        another = ["config.json"] if any((out / name).exists() for name in KEPT) else []
        for name in (*another, *KEPT, "curves.png", "masks.png", "predictions.png"):
            (out / name).unlink(missing_ok=True)
    elif checkpoint["path"].name != "last.pt":  # put the whole one in the place of the damaged one
        checkpoint["path"].replace(out / "last.pt")
    if checkpoint and checkpoint["step"] < config["steps"]:
        (out / "result.json").unlink(missing_ok=True)  # of a run that was done, and goes on
    lines = [line for line in read_log(out, warn=True) if line["step"] <= checkpoint["step"]] if checkpoint else []
    if checkpoint and "line" in checkpoint and checkpoint["step"] not in [line["step"] for line in lines]:
        lines.append(checkpoint["line"])
    write(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write(out / "config.json", json.dumps(config, indent=1) + "\n")


def read_log(out, warn=False):
    """The objects of log.jsonl, each with its "step"; what is none is left out.

    warn: say so, unless it is a last line without an end, which a run that was killed was writing.
    """
    path, log, torn = out / "log.jsonl", [], 0
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else []
    for i, text in enumerate(lines):
        try:
            line = json.loads(text) if text.endswith("\n") else None
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            log.append(line)
        else:
            torn += i + 1 < len(lines) or text.endswith("\n")
    if warn and (torn or not lines):
        what = f"{torn} of the lines of {path} can't be read" if lines else f"{path} is not there, or empty"
        print(f"warning: {what}; {out / 'curves.png'} lacks these steps", file=sys.stderr)
    return log


def last_line(out):
    """The last object of log.jsonl, with the scores of a run that is done. Warns as `read_log`."""
    if log := read_log(out, warn=True):
        return log[-1]
    raise ValueError(f"{out / 'log.jsonl'} says nothing of the last step, and {out / 'last.pt'} is too old to say it")


def append_log(out, line):
    """Add an object to log.jsonl, on a line of its own whatever was done to the file in the meantime."""
    if not (out / "log.jsonl").exists():  # `start_log` wrote one
        print(f"warning: {out / 'log.jsonl'} is gone; {out / 'curves.png'} lacks what it said", file=sys.stderr)
    with open(out / "log.jsonl", "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
        begin = "" if file.read(1) in (b"", b"\n") else "\n"
        file.write(f"{begin}{json.dumps(line)}\n".encode())


def write(path, text):
    """Write a text file, whole or not at all."""
    with files.whole(path) as part:
        part.write_text(text)


def save(path, content):
    """Write a checkpoint and keep the one before it as previous.pt. Raises OSError, and changes nothing, if that fails.

    At any moment one of the two is whole.
    """
    try:
        with files.whole(path, previous=path.with_name("previous.pt")) as part:
            torch.save(content, part)
    except (OSError, RuntimeError) as error:  # PyTorch's writer makes the latter of a full disk
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"{path} can't be written ({reason})") from None


def read_checkpoint(path):
    """A checkpoint of `save`. Raises Damaged if it is none, or not whole. No code that a file may carry is ever run."""
    try:
        if not path.is_file():
            raise ValueError("no regular file")
        files.check_zip(path)  # what torch.save writes is a zip archive: a checksum for each tensor
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or type(checkpoint.get("step")) is not int or checkpoint["step"] < 0:
            raise ValueError("no checkpoint of a run: it has no step")
    except Exception as error:  # whatever it meets in a damaged file
        reason = (str(error).splitlines() or [""])[0].split(". ")[0] or type(error).__name__
        raise Damaged(f"{path} is damaged ({reason})") from None
    return checkpoint | {"path": path}


class Damaged(ValueError):
    """A checkpoint that no run can go on from."""


def saved(out):
    """The paths of a run's checkpoints, the newest one first."""
    return [path for path in (out / "last.pt", out / "previous.pt") if os.path.lexists(path)]


def load(out, check=None):
    """The newest whole checkpoint of a run, with its "path"; None if none was saved yet.

    Says so if it is not last.pt. check: called with a checkpoint, raises Damaged for one that is not of this run.
    Raises ValueError if all are damaged.
    """
    paths = saved(out)
    for i, path in enumerate(paths):
        try:
            checkpoint = read_checkpoint(path)
            if check:
                check(checkpoint)
        except Damaged as error:
            if i + 1 == len(paths):
                raise ValueError(f"{error}; start the run anew with --overwrite") from None
            print(f"warning: {error}; trying {paths[i + 1]}", file=sys.stderr)
            continue
        if path.name != "last.pt":
            print(f"warning: going on from {path}, step {checkpoint['step']}", file=sys.stderr)
        return checkpoint
    return None


# ---------------------------------------------------------------------------------------------
# Is it this run's, and is the data still the same?
# ---------------------------------------------------------------------------------------------

SAME = ("task", "arch", "img_size", "optimizer", "batch_size", "seed")  # flags that no run changes on its way
ORIGIN = dict(classes=list, images=dict, init_digest=str | None, target_digest=str | None)
MEND = "bring the data back as it was, or start another run with --init"


def check_checkpoint(checkpoint, config, origin, weights):
    """Raise Damaged for a checkpoint of another run, and ValueError if the data is not the same any more.

    config: the run's, a dict; origin: see `check_origin`; weights: name -> tensor, what the run's model has.
    """
    path, kinds = checkpoint["path"], dict(model=dict, optimizer=dict, seconds=float, config=dict)
    kinds |= dict(raw_model=dict) if config["polyak"] else {}
    kinds |= {name: kind for name, kind in ORIGIN.items() if name in checkpoint}
    for name, kind in kinds.items():
        if not isinstance(checkpoint.get(name), kind):
            raise Damaged(f"{path} is damaged (no checkpoint of a run: its {name} is not there, or of another kind)")
    for name in SAME:
        here, there = (json.dumps(values.get(name), default=str) for values in (config, checkpoint["config"]))
        if here != there:
            raise Damaged(f"{path} is of another run (its {name} is {there}, that of config.json is {here})")
    if checkpoint["step"] > config["steps"]:
        raise ValueError(
            f"{path} has {checkpoint['step']:,} steps behind it, more than the {config['steps']:,} that are asked for; "
            "give more"
        )
    check_origin(path, checkpoint, origin)
    for name in ("model", "raw_model") if config["polyak"] else ("model",):
        shapes = {n: getattr(value, "shape", None) for n, value in checkpoint[name].items()}
        wanted = {n: value.shape for n, value in weights.items()}
        if shapes != wanted:
            odd = sorted(n for n in shapes.keys() | wanted.keys() if shapes.get(n) != wanted.get(n))[0]
            raise Damaged(f"{path} is damaged (its {name} does not fit, see {odd})")


def check_origin(path, saved, now):
    """Raise ValueError, in one line that says what differs, if a run would not go on with what it began with.

    saved, now: classes, a list of names, which labels count; images, {"train": n, "test": n}, which the order of an
    epoch depends on; init_digest and target_digest, sha256 of frozen weights, which are in no checkpoint, or None.
    A checkpoint of an older version says nothing of them: a warning.
    """
    if missing := [name for name in ORIGIN if name not in saved]:
        print(f"warning: {path} is of an older version and does not say its {', '.join(missing)}", file=sys.stderr)
    classes, names = saved.get("classes", now["classes"]), now["classes"]
    if classes != names:
        gone, new = ([c for c in some if c not in others] for some, others in ((classes, names), (names, classes)))
        parts = [
            f"{what} {', '.join(map(repr, some[:3]))}" for what, some in (("without", gone), ("with", new)) if some
        ]
        raise ValueError(
            f"{path} has learned {len(classes)} classes, and the data has {len(names)}, "
            f"{' and '.join(parts) or 'the same ones in another order'}: labels would mean something else; "
            f"{MEND} {path}"
        )
    for split, n in now["images"].items():
        if (before := saved.get("images", now["images"]).get(split)) != n:
            raise ValueError(
                f"{path} began with {before:,} images in {split}, and the data has {n:,} now: it would not be the same "
                f"run; {MEND} {path}"
            )
    for name, flag in (("init_digest", "--init"), ("target_digest", "--target-weights")):
        if now[name] and saved.get(name, now[name]) != now[name]:
            raise ValueError(
                f"the weights of {flag} are others than {path} began with (sha256 {now[name][:8]}…, it was "
                f"{str(saved[name])[:8]}…), and the run needs them as they were; bring them back, or start another run"
            )
