"""The folder of a run: what it says, who may write there, and checkpoints that survive whatever happens.

    config.json     the complete configuration         log.jsonl      an object for each logged step
    last.pt         the newest checkpoint               previous.pt    the one before it
    result.json     the scores, once the run is done    *.png          figures

A run may be killed at any moment, between any two lines below, and go on with --resume: a file gets its name when it
is whole (see files.py), and a checkpoint is kept until the next one is there.
"""

import json
import sys
from itertools import count, takewhile
from pathlib import Path

import torch

from engine import files

KEPT = ("last.pt", "previous.pt", "result.json")  # whatever has one of them is a run that nobody replaces by mistake


def default_folders(name):
    """runs/NAME, then the same with -2, -3, …; name: TASK-ARCH-DATA."""
    name = name.replace(":", "-").replace("/", "_")
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
    if not path.exists():
        raise ValueError(f"nothing to resume: no {path}; check --out, or leave --resume out to start")
    try:
        return Path(out), json.loads(path.read_text())
    except ValueError as error:
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
    except OSError:
        raise ValueError(f"nothing can be written to {out}; give another --out") from None
    if new:
        check_free(out)
    return out


def start_log(out, config, checkpoint):
    """Write config.json, config being a dict, and keep of an older log what the checkpoint (or None) knows of."""
    for path in out.glob("*.part"):  # what a process that was killed was writing
        path.unlink()
    if not checkpoint:  # config.json goes first and comes last: with it, there is a run that can go on
        for name in ("config.json", *KEPT, "curves.png", "masks.png"):
            (out / name).unlink(missing_ok=True)
    elif checkpoint["path"].name != "last.pt":  # put the whole one in the place of the damaged one
        checkpoint["path"].replace(out / "last.pt")
    lines = [line for line in read_log(out) if line["step"] <= checkpoint["step"]] if checkpoint else []
    write(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write(out / "config.json", json.dumps(config, indent=1) + "\n")


def read_log(out):
    """The objects of log.jsonl; a last line without an end was cut off and does not count."""
    if not (out / "log.jsonl").exists():
        return []
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


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
    """A checkpoint of `save`. Raises ValueError if it is damaged. No code that a file may carry is ever run."""
    try:
        files.check_zip(path)  # what torch.save writes is a zip archive: a checksum for each tensor
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever it meets in a damaged file
        reason = (str(error).splitlines() or [""])[0].split(". ")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged ({reason})") from None


def load(out):
    """The newest whole checkpoint of a run, with its "path"; None if none was saved yet.

    Says so if it is not last.pt. Raises ValueError if all are damaged.
    """
    paths = [path for path in (out / "last.pt", out / "previous.pt") if path.exists()]
    for i, path in enumerate(paths):
        try:
            checkpoint = read_checkpoint(path) | {"path": path}
        except ValueError as error:
            if i + 1 == len(paths):
                raise ValueError(f"{error}; start the run anew with --overwrite") from None
            print(f"warning: {error}; trying {paths[i + 1]}", file=sys.stderr)
            continue
        if path.name != "last.pt":
            print(f"warning: going on from {path}, step {checkpoint['step']}", file=sys.stderr)
        return checkpoint
    return None
