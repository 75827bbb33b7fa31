"""Write docs/STUDIES.md from all results: `python -m studies`."""

import collections
import importlib
import re

from studies import study

PAGE = study.HERE.parent / "docs" / "STUDIES.md"
START = """# The papers' claims, put to the test on a laptop

Written by `python -m studies` from `studies/results`; do not edit. Each study is one file
of [`studies/`](../studies); `python -m studies.NAME` makes its runs. The models have up to a million parameters, the
papers' have 86 and more: what is not shown here may well hold there, and the other way round.

Differences are paired by seed; ± is the half width of a 95 % interval (Student's t). **Shown**: the interval lies on
the claim's side of zero, or, of things that are said to be alike, inside the margin. **The opposite**: on the other
side. **Not shown**: neither, with these seeds.
"""


def names():
    """The studies that have results, in order."""
    return sorted(path.stem for path in study.RESULTS.glob("*.json") if (study.HERE / f"{path.stem}.py").exists())


def section(name):
    """The page's part for one study: a string of Markdown."""
    module, runs = importlib.import_module(f"studies.{name}"), study.read(name)
    title, _, text = module.__doc__.partition("\n")
    lines = [f"## {title.rstrip('.')}", "", f"[`studies/{name}.py`](../studies/{name}.py)", text.strip(), ""]
    planned = len(module.RUNS) * len(module.SEEDS)
    if len(runs) < planned:
        lines += [f"So far {len(runs)} of {planned} runs are done; `python -m studies.{name}` goes on.", ""]
    lines += ["| claim | the paper | here: difference | seeds | verdict |", "| --- | --- | --- | --- | --- |"]
    for claim in module.claims(runs):
        found = f"{difference(claim.differences)} {claim.unit}" if len(claim.differences) else "none yet"
        found += "" if claim.margin is None else f" (alike: within {claim.margin})"
        lines.append(f"| {claim.text} | {claim.paper} | {found} | {len(claim.differences)} | {study.verdict(claim)} |")
    lines += [
        "",
        f"![{title}](../studies/results/{name}.png)",
        "",
        *table(runs, module.TABLE),
        "",
        time_taken(runs),
        "",
    ]
    return "\n".join(lines)


def overview():
    """How many claims of each study have which verdict: lines of Markdown."""
    verdicts = "shown", "not shown", "the opposite"
    lines = [f"| claims | {' | '.join(verdicts)} |", "| --- | --- | --- | --- |"]
    for name in names():
        module = importlib.import_module(f"studies.{name}")
        title = module.__doc__.partition("\n")[0].rstrip(".")
        anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")  # as GitHub makes it
        counts = collections.Counter(map(study.verdict, module.claims(study.read(name))))
        lines.append(f"| [{title}](#{anchor}) | {' | '.join(str(counts[verdict]) for verdict in verdicts)} |")
    return "\n".join(lines) + "\n"


def difference(values):
    """Mean and half width of the interval, in words; of a single value there is none."""
    if len(values) < 2:
        return f"{values[0]:+.2f}"
    return "{:+.2f} ± {:.2f}".format(*study.interval(values))


def table(runs, columns):
    """Means and intervals of every arm: lines of Markdown. columns: {title: (stage, score)}."""
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        cells = []
        for stage, name in columns.values():
            values = list(study.score(runs, arm, stage, name).values())
            mean, half = study.interval(values)
            digits = 3 if abs(mean) < 2 else 1
            spread = f" ± {half:.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{mean:.{digits}f}{spread}" if values else "")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def time_taken(runs):
    """How long all runs of a study took, on what: a sentence."""
    machines = {}
    for run in runs:
        seconds = sum(scores["seconds"] for scores in run["scores"].values())
        machines.setdefault(run["machine"], []).append(seconds)
    each = [f"{sum(s) / 3600:.1f} h on {machine} ({len(s)} runs)" for machine, s in machines.items()]
    return "Time, added up over runs: " + ", ".join(each) + "."


def waiting():
    """The studies that can be run, and have no results."""
    written = {path.stem for path in study.HERE.glob("*.py") if "\nRUNS = {" in path.read_text()}
    return sorted(written - set(names()))


def page():
    more = [f"[`{name}`](../studies/{name}.py)" for name in waiting()]
    without = [f"Without results yet: {', '.join(more)}.\n"] * bool(more)
    return "\n".join([START, overview(), *without, *map(section, names())])


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(study.HERE.parent)}")
