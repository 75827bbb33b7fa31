"""All of VTAB-1k: a run for each of its 19 tasks, and the means that the ViT paper's figure 2 shows.

    python train.py --task finetune --arch vit_b16 --data vtab:PATH --init … --out runs/vtab
    python train.py --resume --out runs/vtab

PATH holds a folder for each task, see engine/transfer.py. OUT/TASK is the run of a task, with the same flags for all;
OUT/vtab.json is the command; OUT/result.json, once all are done, has the scores. A command that goes on with --resume
leaves alone what is done, goes on with the run that was stopped, and starts those that were not.
"""

import json
import statistics
import sys
from pathlib import Path

import torch

from engine import checkpoint, distributed, transfer
from engine import config as flags

TASKS = [task for group in transfer.VTAB.values() for task in group]
SCORED = ("finetune", "supervised", "linear", "knn")  # by top-1


def is_whole(given):
    """Whether a command line is about all tasks: not vtab:PATH/TASK, but vtab:PATH, or --out of such a run."""
    if given.data is None:
        return bool(given.resume and given.out and Path(given.out, "vtab.json").is_file())
    return given.data.startswith("vtab:") and Path(given.data).name not in TASKS


def run(given, argv, main):
    """Make all runs, each by `main`, and write their scores. Returns the exit code, of the first that is not 0.

    given: argv as `flags.parse` understands it. Raises ValueError for bad input, before anything is written.
    """
    if distributed.WORLD_SIZE > 1:
        distributed.start(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    argv = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
    out, path, argv, state = distributed.from_rank0(lambda: begin(given, argv))
    for task in TASKS:
        if state[task] == "done":
            continue
        distributed.print0(f"VTAB, {1 + TASKS.index(task)} of {len(TASKS)}: {task}")
        where = ["--data", f"vtab:{path / task}", "--out", str(out / task)]
        code = main([*argv, *where, *(["--resume"] if state[task] == "begun" else [])])
        if code:
            distributed.print0(f"all of VTAB goes on with: train.py --resume --out {out}")
            return code
    if distributed.RANK == 0:
        finish(out)
    return 0


def begin(given, argv):
    """The folder, where VTAB is, the flags of every run, and the state of each: "done", "begun" or "new"."""
    out, path = given.out and Path(given.out), Path((given.data or "").removeprefix("vtab:")).expanduser()
    if given.overwrite:
        raise ValueError(
            f"--overwrite would replace the runs of {len(TASKS)} tasks; remove them, or give another --out"
        )
    if given.resume:
        if not out or not (out / "vtab.json").is_file():
            raise ValueError("--resume goes on with all of VTAB where its vtab.json is: give that folder with --out")
        began = read(out / "vtab.json", dict(path=str, argv=list))
        path = path if given.data else Path(began["path"])
        same_flags(given, flags.parse(began["argv"]), out)
        argv = began["argv"] + argv
    elif (given.task or "supervised") not in SCORED:
        raise ValueError(f"all of VTAB is for --task {', '.join(SCORED)}; with {given.task} give one, as vtab:PATH/dtd")
    missing = [task for task in TASKS if not (path / task).is_dir()]
    if missing:
        raise ValueError(f"{path} has no folder {missing[0]}; VTAB's tasks are {', '.join(TASKS)}")
    for task in TASKS:  # all lists, before the first run
        transfer.read_lists(path / task)
    if not given.resume:
        name = f"{given.task or 'supervised'}-{given.arch or 'vit_b16'}-vtab"
        out = out or next(folder for folder in checkpoint.default_folders(name) if not folder.exists())
        if (out / "vtab.json").exists():
            raise ValueError(f"{out} holds the runs of VTAB; --resume goes on with them, another --out keeps them")
    checkpoint.claim(out, new=not given.resume)
    if not given.resume:
        checkpoint.write(out / "vtab.json", json.dumps(dict(path=str(path), argv=argv), indent=1) + "\n")
    done = {task: (out / task / "result.json").exists() for task in TASKS}
    begun = {task: (out / task / "config.json").exists() for task in TASKS}
    return out, path, argv, {task: "done" if done[task] else "begun" if begun[task] else "new" for task in TASKS}


def same_flags(given, began, out):
    """Raise ValueError if runs would go on with another flag than they began with; a machine may be another one."""
    for name, value in vars(given).items():
        was = getattr(began, name)
        if value not in (None, was) and name not in (*flags.MAY_CHANGE, "data", "out", "resume"):
            flag = flags.shown(name)
            raise ValueError(
                f"--resume: the runs in {out} have {flag} {flags.show(was)}, not {flags.show(value)}; leave {flag} out"
            )


def read(path, kinds):
    """A JSON object that has these names, with values of these kinds. Raises ValueError for anything else."""
    try:
        content = json.loads(path.read_text())
        if not all(isinstance(content[name], kind) for name, kind in kinds.items()):
            raise TypeError
        return content
    except (ValueError, TypeError, LookupError, OSError):
        raise ValueError(f"{path} is damaged; remove it and run again") from None


def finish(out):
    """Write result.json, and print the same in words: top-1 of each task, the means of the groups and of all tasks."""
    results = {task: read(out / task / "result.json", dict(task=str, arch=str, top1=float)) for task in TASKS}
    top1 = {task: result["top1"] for task, result in results.items()}
    means = {"top1": statistics.fmean(top1.values())}
    means |= {group: statistics.fmean(top1[task] for task in tasks) for group, tasks in transfer.VTAB.items()}
    what = {name: results[TASKS[0]][name] for name in ("task", "arch")}
    seconds = sum(result["seconds"] for result in results.values())
    result = what | dict(data="vtab") | means | dict(tasks=top1, seconds=seconds)
    checkpoint.write(out / "result.json", json.dumps(result, indent=1) + "\n")
    groups = ", ".join(f"{group} {means[group]:.2f}" for group in transfer.VTAB)
    print(f"{what['task']}: {what['arch']} on VTAB reached {means['top1']:.2f} % top-1, the mean of {len(TASKS)} tasks")
    print(f"({groups}); {seconds:.0f} s; all in {out}")
