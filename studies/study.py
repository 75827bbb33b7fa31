"""What the studies share: make the runs that are missing, compare them seed by seed, judge, and draw.

A study is one file of this folder, for one claim of the papers. It says

    RUNS            {arm: what train.py is told}; arms differ in what is compared
    PROBES          {name: what train.py is told}: what is measured on the weights {init} of each run
    SEEDS           of the runs that are reported
    claims(runs)    a list of `Claim`, from the scores of all runs
    figure(runs)    a matplotlib figure

    python -m studies.NAME                  make what is missing, then write results/NAME.json and NAME.png
    python -m studies.NAME --jobs 12 --device cuda
    python -m studies                       write docs/STUDIES.md from all results

A run that was killed goes on where it was. Runs are told apart by their flags and seed alone, so studies share them.
"""

import argparse
import collections
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from matplotlib.figure import Figure

HERE = Path(__file__).parent
RESULTS, FOLDERS = HERE / "results", HERE.parent / "runs" / "studies"

# What most studies pre-train on, and what they measure.
SCENES = "--data scenes --arch vit_micro8 --batch-size 64 --steps 2000 --evaluations 6 --test-images 1000"
FROZEN = "--data scenes --arch vit_micro8 --pool mean --init {init}"
PROBES = {
    "linear": f"--task linear {FROZEN} --labels 10000 --epochs 20 --evaluations 1",
    "knn": f"--task knn {FROZEN} --labels 10000",
    "labels-1000": f"--task finetune {FROZEN} --labels 1000 --batch-size 64 --steps 200 --evaluations 1",
}
FIGURES = {  # title: (stage, score)
    "test L_rec": ("train", "test_rec"),
    "linear (%)": ("linear", "top1"),
    "kNN (%)": ("knn", "top1"),
    "fine-tuned, 1,000 labels (%)": ("labels-1000", "top1"),
}
TEACHERS = {  # what hpm_teacher explains
    "object, at a place": ("train", "test_object_auc_at_place"),
    "harder": ("train", "test_hard_ratio"),
}

# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


def read(name):
    """The runs of a study that are done: a list of dicts.

    arm, seed, flags   what was run;  machine: on what
    scores             {stage: the run's result.json}, "train" and the name of each probe
    log                the scored lines of the run's log.jsonl
    """
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def complete(study, name, device=None, jobs=1):
    """Make the runs of a study that are missing; every one that ends is written to results/NAME.json at once."""
    known = {}  # of all studies: two of them may have measured other things of one run
    for run in (run for path in sorted(RESULTS.glob("*.json")) for run in read(path.stem)):
        known.setdefault((run["flags"], run["seed"]), run)["scores"].update(run["scores"])
    wanted = [(arm, flags, seed) for seed in study.SEEDS for arm, flags in study.RUNS.items()]  # the first seed first
    found, missing = {}, []
    for arm, flags, seed in wanted:
        run = known.get((flags, seed), dict(scores={}))
        scores = {stage: run["scores"][stage] for stage in ("train", *study.PROBES) if stage in run["scores"]}
        found[arm, seed] = run | dict(arm=arm, scores=scores)
        if len(scores) < 1 + len(study.PROBES):
            missing.append((arm, flags, seed))
    measured = set(study.PROBES) or {"train"}

    def write():
        runs = [found[arm, seed] for arm, _, seed in wanted if measured & set(found[arm, seed]["scores"])]
        RESULTS.mkdir(exist_ok=True)
        part = RESULTS / f"{name}.json.part"
        part.write_text("[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]\n")
        part.replace(RESULTS / f"{name}.json")

    failed = False
    with futures.ThreadPoolExecutor(jobs) as pool:
        work = {pool.submit(make, *run, study.PROBES, device, jobs): run for run in missing}
        for future in futures.as_completed(work):
            arm, _, seed = work[future]
            try:
                found[arm, seed] = future.result()
            except RuntimeError as error:  # others go on
                failed = True
                print(f"{name}: {arm}, seed {seed}: {error}", file=sys.stderr, flush=True)
                continue
            write()
            print(f"{name}: {arm}, seed {seed} is done", flush=True)
    write()
    if failed:
        sys.exit(1)
    return read(name)


def make(arm, flags, seed, probes, device=None, jobs=1):
    """Train one arm with one seed, and measure it: a dict as `read` has it."""
    folder = folder_of(flags, seed)
    gpu = ["--device", device, "--dtype", "float32"] if device else []
    more = ["--seed", str(seed), *gpu]
    scores = {"train": train([*shlex.split(flags), *more], folder, jobs)}
    for name, probe in probes.items():
        told = shlex.split(probe.format(init=folder / "last.pt"))
        scores[name] = train([*told, *more], folder / name.replace(" ", "-"), jobs)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    log = [line for line in lines if any(key.startswith(("test", "top")) for key in line)]
    return dict(arm=arm, seed=seed, flags=flags, machine=machine(device), scores=scores, log=log)


def folder_of(flags, seed):
    """The run folder of what train.py is told, and its seed."""
    return FOLDERS / hashlib.sha256(f"{flags} {seed}".encode()).hexdigest()[:12]


def train(told, folder, jobs=1):
    """One run of train.py, or of the module named after a leading -m, to its end: what its result.json says.

    Raises RuntimeError with the last lines of what it printed if it fails.
    """
    result = folder / "result.json"
    if not result.exists():
        if "--device" in told and not {"knn", "detect"} & set(told):  # those are never compiled
            told = [*told, "--no-compile"]  # for these small models it takes longer than their training
        program, told = (told[:2], told[2:]) if told[0] == "-m" else (["train.py"], told)
        told = ["--resume"] if (folder / "last.pt").exists() else [*told, "--overwrite"]
        command = [sys.executable, *program, *told, "--out", str(folder)]
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})
        ended = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, env=environment)
        if ended.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{ended.stderr[-2000:]}")
    return json.loads(result.read_text())


def machine(device):
    """What a run was made on, in words."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------

# text, paper: the claim and its source; unit: of the differences, one for each seed, that would be above 0 if it held.
# margin: None, or what "alike" means: then the claim is that the difference is smaller than that, either way.
Claim = collections.namedtuple("Claim", "text paper differences unit margin", defaults=[None])


def score(runs, arm, stage, name):
    """{seed: the score} of an arm."""
    mine = {run["seed"]: run["scores"].get(stage, {}) for run in runs if run["arm"] == arm}
    return {seed: scores[name] for seed, scores in mine.items() if name in scores}


def differences(runs, arm, other, stage, name):
    """The score of one arm less that of another, seed by seed: an array, of the seeds that both have."""
    a, b = score(runs, arm, stage, name), score(runs, other, stage, name)
    return np.array([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def interval(values):
    """Mean, and the half width of its 95 % interval by Student's t; the width of fewer than two values is infinite."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)) if n else float("nan"), float("inf")
    return float(np.mean(values)), float(scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)


def verdict(claim):
    """ "shown", "not shown" or "the opposite": whether the interval lies above 0, across it, or below.

    Of a claim that two things are alike: inside the margin, across its edge, or outside.
    """
    mean, half = interval(claim.differences)
    low, high = mean - half, mean + half
    if claim.margin is not None:
        low, high = claim.margin - max(abs(low), abs(high)), claim.margin - max(low, -high, 0)
    return "shown" if low > 0 else "the opposite" if high < 0 else "not shown"


# ---------------------------------------------------------------------------------------------
# The program of every study
# ---------------------------------------------------------------------------------------------


def main(study):
    """study: the module, run by `python -m studies.NAME`."""
    parser = argparse.ArgumentParser(description=study.__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", help="of the runs, as cuda; default that of train.py")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    told = parser.parse_args()
    if hasattr(os, "nice"):
        os.nice(19)
    name = Path(study.__file__).stem
    runs = complete(study, name, told.device, told.jobs)
    study.figure(runs).savefig(RESULTS / f"{name}.png", dpi=100)
    for claim in study.claims(runs):
        print(
            "{}: {} ({:+.2f} ± {:.2f} {})".format(claim.text, verdict(claim), *interval(claim.differences), claim.unit)
        )


def dots(runs, shown, figure=None):
    """A panel for each of shown = {title: (stage, score)}: a dot for each seed, a bar for the mean.

    figure: a matplotlib figure or subfigure to draw on; default a new one, which is returned.
    """
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = figure or Figure(figsize=(3.4 * columns, rows * (0.7 + 0.3 * len(arms))), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes, (title, (stage, name)) in zip(panels, shown.items(), strict=False):
        for row, arm in enumerate(arms):
            values = list(score(runs, arm, stage, name).values())
            axes.plot(values, [row] * len(values), "o", color="#0072B2", alpha=0.6, markersize=4)
            if values:
                axes.plot([np.mean(values)] * 2, [row - 0.3, row + 0.3], color="#D55E00", linewidth=2)
        axes.set_yticks(range(len(arms)), arms)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
    for axes in panels[len(shown) :]:
        axes.remove()
    return figure


def line(axes, places, scores, colour, label):
    """A line through the means of scores, a list for each of the places, and a dot for each seed."""
    for place, values in zip(places, scores, strict=True):
        axes.plot([place] * len(values), values, "o", color=colour, alpha=0.5, markersize=4)
    axes.plot(places, [np.mean(values) for values in scores], color=colour, label=label)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def curves(runs, shown, figure):
    """A panel for each of shown = {title: name in log.jsonl} on a figure: of each arm that has it, the mean over the
    seeds against the step, and their range as a band; an arm has the same colour in all panels."""
    colours = {arm: f"C{i}" for i, arm in enumerate(dict.fromkeys(run["arm"] for run in runs))}
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (title, name) in zip(panels, shown.items(), strict=True):
        for arm, colour in colours.items():
            logs = [
                [(line["step"], line[name]) for line in run["log"] if name in line] for run in runs if run["arm"] == arm
            ]
            if not any(logs):
                continue
            steps = [step for step, _ in logs[0]]
            values = np.array([[value for _, value in log] for log in logs])  # (seeds, steps)
            axes.plot(steps, values.mean(axis=0), color=colour, label=arm)
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
