"""The folder of a run: what it says, who may write there, and checkpoints that survive whatever happens.

    config.json     the complete configuration         log.jsonl      an object for each logged step
    last.pt         the newest checkpoint               previous.pt    the one before it
    result.json     the scores, once the run is done    *.png          figures

A run may be killed at any moment, between any two lines below, and go on with --resume: a file is written under another
name and renamed when it is whole, and a checkpoint is kept until the next one is there.
"""

import argparse
import json
import os
import sys
import zipfile
from itertools import count, takewhile
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows: nothing there keeps two runs apart
    fcntl = None

MAY_CHANGE = ("device", "dtype", "compile", "data_dir", "fsdp", "checkpointing")  # when a run goes on


def default_folders(given):
    """runs/TASK-ARCH-DATA, then the same with -2, -3, …"""
    name = "-".join([given.task or "supervised", given.arch or "vit_b16", given.data or "photos"])
    name = name.replace(":", "-").replace("/", "_")
    return (Path("runs", f"{name}-{i}" if i > 1 else name) for i in count(1))


def new_run(given):
    """The folder of a new run. Raises ValueError if that would replace another one."""
    if given.out is None:
        return next(folder for folder in default_folders(given) if not folder.exists())
    nearest = next(path for path in (Path(given.out), *Path(given.out).absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"--out {given.out} can't be a folder, for {nearest} is a file; give another one")
    if not given.overwrite and any(
        Path(given.out, name).exists() for name in ("last.pt", "previous.pt", "result.json")
    ):
        raise ValueError(
            f"{given.out} holds a run; --resume continues it, --overwrite replaces it, another --out keeps it"
        )
    return Path(given.out)


def old_run(given):
    """The folder and the configuration of the run to resume.

    Raises ValueError if there is none, or if a flag that was given contradicts it.
    """
    if given.out is None:
        there = list(takewhile(Path.exists, default_folders(given)))
        out = there[-1] if there else next(default_folders(given))
    else:
        out = Path(given.out)
    if not (out / "config.json").exists():
        raise ValueError(f"nothing to resume: no {out / 'config.json'}; check --out, or leave --resume out to start")
    try:
        saved = json.loads((out / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{out / 'config.json'} is damaged ({error}); start anew with --overwrite") from None
    missing = vars(given).keys() - set(saved) - {"out", "overwrite", "resume"}
    if missing:
        raise ValueError(f"{out / 'config.json'} says nothing of {min(missing)}: another version wrote it; start anew")
    saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    for name, value in vars(given).items():
        if name in saved and value not in (None, saved[name]):
            if name not in MAY_CHANGE:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"--resume: the run in {out} has {flag} {saved[name]}, not {value}; leave {flag} out")
            saved[name] = value
    return out, argparse.Namespace(**saved)


held = []  # the locks of this process: files that stay open until it ends


def claim(out, given):
    """Make the folder this run's own, until the process ends, however it ends. Returns it.

    Raises ValueError if another run is writing there, or has written since this one looked.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        held.append((out / ".lock").open("a"))
        if fcntl:
            fcntl.lockf(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: its data workers do not inherit it
    except (BlockingIOError, PermissionError):
        if not os.access(out, os.W_OK):
            raise ValueError(f"nothing can be written to {out}; give another --out") from None
        raise ValueError(f"another run is writing to {out}; wait for its end, or give another --out") from None
    if given.out and not given.resume:
        new_run(given)
    return out


def start_log(out, config, checkpoint):
    """Write config.json, and keep of an older log what the checkpoint knows of."""
    if not checkpoint:  # config.json goes first and comes last: with it, there is a run that can go on
        for name in ("config.json", "last.pt", "previous.pt", "result.json", "curves.png", "masks.png"):
            (out / name).unlink(missing_ok=True)
    elif checkpoint["path"].name != "last.pt":  # put the whole one in the place of the damaged one
        checkpoint["path"].replace(out / "last.pt")
    lines = [line for line in read_log(out) if line["step"] <= checkpoint["step"]] if checkpoint else []
    write(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write(out / "config.json", json.dumps(vars(config), indent=1) + "\n")


def read_log(out):
    """The objects of log.jsonl; a last line without an end was cut off and does not count."""
    if not (out / "log.jsonl").exists():
        return []
    return [
        json.loads(line) for line in (out / "log.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")
    ]


def write(path, text):
    """Write a text file, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def save(path, content):
    """Write a checkpoint and keep the previous one. Raises OSError, and changes nothing, if that fails.

    Under another name first; then last.pt becomes previous.pt, and the new one last.pt. At any moment one of the two
    is whole.
    """
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # PyTorch's writer makes the latter of a full disk
        part.unlink(missing_ok=True)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"{path} can't be written ({reason})") from None
    if path.exists():
        path.replace(path.with_name("previous.pt"))
    part.replace(path)


def read_checkpoint(path):
    """A checkpoint of `save`. Raises ValueError if it is damaged. No code that a file may carry is ever run."""
    try:
        with zipfile.ZipFile(path) as file:  # what torch.save writes is a zip archive: a CRC-32 for each tensor
            damaged = file.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
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
