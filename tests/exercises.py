"""The exercises: write the papers' equations yourself, graded by the tests. The repository's code is the answer key.

    python -m tests.exercises                     the list, and which ones are written
    python -m tests.exercises start               write exercises/: the real files, every exercise blank
    python -m tests.exercises start Block.forward blank this one alone
    pytest --exercises                            grade what is written, and show the progress
    python -m tests.exercises ledger              write tests/ledger.md: where each equation is found

An exercise is one function or method of vit.py, hpm.py or train.py. To grade it, the learner's definition takes the
place of the real one, and of that one alone, while the tests run that are marked `@pytest.mark.exercise(name)`. So an
exercise can be solved by itself, in any order. What the file defines beyond the real one, such as helper functions or
imports, is there too; changes to anything else have no effect.
"""

import argparse
import ast
import contextlib
import difflib
import importlib
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "exercises"


# The tests that grade, in the order of the exercises.
TESTS = ("tests/test_vit.py", "tests/test_hpm.py", "tests/engine/test_train.py")


class Row(NamedTuple):
    """A row of the ledger of equations, and where it is found besides its exercises."""

    what: str
    equations: tuple  # their names, for `pytest --equation NAME` and the marks of the tests
    notebook: str  # has a heading that ends in "(row N)"
    cites: str  # in the source or docstring of a function of this row


ROWS = [
    Row("an image is a sequence of patches, and back", ("ViT 3.1 patches",), "01_image_to_tokens", "section 3.1"),
    Row("ViT (1): z_0, patches through E, and positions", ("ViT 1",), "01_image_to_tokens", "eq. 1"),
    Row("ViT (5): q, k, v", ("ViT 5",), "02_attention", "eq. 5"),
    Row("ViT (6): attention weights A", ("ViT 6",), "02_attention", "eq. 6"),
    Row("ViT (7), (8): SA and MSA", ("ViT 7", "ViT 8"), "02_attention", "eq. 8"),
    Row("GELU and MLP", ("GELU and MLP",), "03_encoder", "GELU"),
    Row("ViT (2), (3): the encoder block", ("ViT 2", "ViT 3"), "03_encoder", "eq. 2"),
    Row("ViT (4): the image representation y", ("ViT 4",), "03_encoder", "eq. 4"),
    Row("positions for another grid", ("positions grid",), "04_higher_resolution", "section 3.2"),
    Row("2-D sine-cosine positions", ("sine-cosine",), "01_image_to_tokens", "section 3.5"),
    Row("warm-up and decay of the learning rate", ("learning rate",), "03_encoder", "appendix B.1"),
    Row("attention distance, rollout, similar positions",
        ("attention distance", "attention rollout", "similar positions"), "05_looking_inside", "figure 7"),
    Row("L_rec, on hidden patches", ("HPM L_rec",), "06_masked_autoencoder", "L_rec"),
    Row("targets 𝒯", ("HPM targets",), "06_masked_autoencoder", "𝒯"),
    Row("metrics 𝓜", ("HPM metrics",), "06_masked_autoencoder", "𝓜"),
    Row("random, block and grid masks", ("masks",), "06_masked_autoencoder", "MAE"),
    Row("the teacher's prediction L̂ of the whole image", ("HPM predicted loss",), "08_easy_to_hard", "d_ψ(f_θ(x))"),
    Row("L_pred, absolute", ("HPM absolute",), "07_loss_predictor", "L_pred, absolute"),
    Row("L_pred, relative", ("HPM relative",), "07_loss_predictor", "L_pred, relative"),
    Row("easy to hard: α_t", ("HPM easy to hard",), "08_easy_to_hard", "α_t = α_0"),
    Row("the teacher's update, and its momentum m", ("EMA",), "08_easy_to_hard", "θ_t ← m θ_t"),
    Row("L = L_rec + L_pred, one step", ("HPM total",), "09_hpm_end_to_end", "L = L_rec + L_pred"),
    Row("ours: the teacher asked in turn, L̂ of hidden patches", ("HPM in turn",), "08_easy_to_hard", "L̂_i = mean over"),
]  # fmt: skip
EQUATIONS = [name for row in ROWS for name in row.equations]


class Exercise(NamedTuple):
    module: str
    name: str  # "patchify", or "Block.forward" for a method
    rows: tuple  # of the ledger
    equation: str
    minutes: int
    usual: str  # the usual reasons why its tests fail

    @property
    def number(self):
        return EXERCISES.index(self) + 1

    @property
    def notebook(self):
        return f"notebooks/{ROWS[self.rows[0] - 1].notebook}.ipynb"

    @property
    def path(self):
        return FOLDER / f"{self.module}.py"


EXERCISES = [
    Exercise("vit", "patchify", (1,), "ViT, section 3.1", 10,
        "wrong axis: reshape only splits and joins neighbouring axes, so they have to be in order first; rows and "
        "columns of patches swapped; the channel before the pixels"),
    Exercise("vit", "unpatchify", (1,), "ViT, section 3.1", 10,
        "wrong axis: the axes not in patchify's order when they are split, or not in the image's when they are "
        "joined; rows and columns swapped, which a square grid would hide"),
    Exercise("vit", "PatchEmbed.forward", (2,), "ViT eq. 1, x_p E", 15,
        "wrong axis: the weights, stored as a convolution's, list the channel first and x_p lists it last; the bias "
        "forgotten"),
    Exercise("vit", "ViT.embed", (2,), "ViT eq. 1", 25,
        "the class token without its position, or at the end; with `visible`, positions 0, 1, 2, … in place of those "
        "of the patches; dropout before the positions are added, or no norm_pre"),
    Exercise("vit", "Attention.forward", (3, 4, 5), "ViT eq. 5-8", 45,
        "wrong axis: the softmax over queries, or q, k, v and the heads split in another order than U_qkv's; missing "
        "or wrong scale; heads joined before the token's axis is back in front of theirs; dropout in another place"),
    Exercise("vit", "MLP.forward", (6,), "GELU and MLP", 15,
        "the wrong one of the three GELUs; no GELU; dropout after one of the two maps only"),
    Exercise("vit", "Block.forward", (7,), "ViT eq. 2 and 3", 15,
        "LayerNorm after the branch, or on the residual path; a residual missing; eq. 3 starting from z in place of "
        "z'; drop_path around the sum in place of the branch; `inside` not passed on or not filled"),
    Exercise("vit", "ViT.represent", (8,), "ViT eq. 4", 15,
        "wrong axis or token: the class token is the first, and no part of the mean; a LayerNorm applied twice or "
        "not at all; `inside` not passed on"),
    Exercise("vit", "interpolation_matrix", (9,), "cubic convolution, a = -1/2, and linear", 45,
        "pixel centres half a pixel off; the kernel not widened to shrink, or widened to enlarge; the outer piece of "
        "the kernel missing; rows that do not sum to 1 at the border; old and new swapped"),
    Exercise("vit", "resize_pos_embed", (9,), "ViT, section 3.2", 30,
        "the class token interpolated with the grid, or lost; rows and columns swapped; `original` not passed on; "
        "the data type changed"),
    Exercise("vit", "sincos_pos_embed", (10,), "2-D sine-cosine positions", 25,
        "rows before columns; sine and cosine interleaved; wrong scale of the frequencies; no zeros for the prefix"),
    Exercise("train", "learning_rate", (11,), "ViT, appendix B.1", 15,
        "a first step of 0, or a peak never reached; decay counted from step 0 in place of the end of warm-up; half "
        "the cosine's amplitude"),
    Exercise("vit", "attention_distance", (12,), "ViT, figure 7", 30,
        "the class token left in, or taken out without normalising the weights again; distances in patches in place "
        "of pixels; the mean over a wrong axis"),
    Exercise("vit", "attention_rollout", (12,), "ViT, figure 6", 20,
        "layers multiplied in the other order; the residual path forgotten, or without its weight; the mean over a "
        "wrong axis"),
    Exercise("vit", "pos_embed_similarity", (12,), "ViT, figure 7", 10,
        "a dot product in place of a cosine; the prefix left in; rows and columns swapped"),
    Exercise("hpm", "reconstruction_loss", (13, 15), "L_rec = 𝓜(prediction, 𝒯)", 20,
        "wrong axis: the mean over patches or images too; a sum where there should be a mean, or the other way round; "
        "the wrong scale of smooth l1 or of the cosine; prediction and target swapped in the cross-entropy"),
    Exercise("hpm", "Autoencoder.forward", (13,), "d_φ(f_θ(x ⊙ M))", 30,
        "visible and hidden swapped, the mask's convention inverted; the encoder given the whole image; the decoder "
        "and the loss predictor swapped; one axis too many in the predicted loss"),
    Exercise("hpm", "normalise_patches", (14,), "𝒯, normalised pixels", 10,
        "wrong axis: statistics over patches or images; the variance divided by d in place of d - 1; the 1e-6 "
        "outside the root, or missing"),
    Exercise("hpm", "hog", (14,), "𝒯, HOG", 60,
        "the orientation with its sign, or the two differences swapped; one-sided differences at the border; the vote "
        "not weighted by the magnitude; the histogram not scaled to length 1, or over the wrong axis"),
    Exercise("hpm", "HPM.targets", (14,), "𝒯", 25,
        "one target returned for another; the class token of a frozen model left in; its head left out; the three "
        "results of normalise_patches returned in place of the first"),
    Exercise("hpm", "random_mask", (16,), "random mask, MAE", 15,
        "mask convention inverted: True is hidden; a count that varies from row to row, as of a threshold; the same "
        "mask for all images; the noise not used"),
    Exercise("hpm", "block_mask", (16,), "block mask, BEiT", 45,
        "mask convention inverted: True is hidden; the count not exact; single patches in place of rectangles; rows "
        "and columns swapped; the same mask for all images; the noise not used"),
    Exercise("hpm", "grid_mask", (16,), "grid mask, MAE, figure 6", 20,
        "mask convention inverted: True is hidden; rows and columns swapped; the wrong patch of each 2 x 2 kept; no "
        "noise where the ratio asks for a part"),
    Exercise("hpm", "Autoencoder.predict_loss", (17,), "L̂ = d_ψ(f_θ(x))", 20,
        "positions not added, or the decoder's given to the encoder; the class token among the answers; the "
        "reconstruction decoder run in place of the predictor; features taken after decoder_embed"),
    Exercise("hpm", "absolute_loss", (18,), "L_pred, absolute", 15,
        "standardised over the whole batch, or the prediction standardised too; the variance divided by n in place "
        "of n - 1; a gradient into the true losses"),
    Exercise("hpm", "relative_loss", (19,), "L_pred, relative", 40,
        "sign: the harder one has to be predicted higher; ties counted as pairs; divided by all n² or n (n - 1) in "
        "place of the pairs that count, as if visible patches were among them; a log of 0; 0 / 0 without any pair"),
    Exercise("hpm", "hard_fraction", (20,), "α_t", 5,
        "α_0 and α_T swapped; α_0 added without being subtracted"),
    Exercise("hpm", "hard_mask", (20,), "easy to hard", 25,
        "mask convention inverted: True is hidden; the easiest patches hidden; a share of all patches in place of the "
        "hidden ones; the rest drawn from the easy half, or again from the guided ones; a threshold that hides ties"),
    Exercise("hpm", "ema_update", (21,), "θ_t ← m θ_t + (1 - m) θ_s", 20,
        "EMA the wrong way round: the momentum is the teacher's share; the student updated; a copy in place of a "
        "change; fixed positions updated; parameters that the teacher lacks"),
    Exercise("hpm", "ema_momentum", (21,), "the schedule of m", 5,
        "m rising on after the ramp; start and end swapped"),
    Exercise("hpm", "HPM.forward", (22,), "L = L_rec + L_pred", 60,
        "mask convention inverted: True is hidden; pairs counted over visible patches; the target of all patches, or "
        "of the visible ones; L_pred's gradient let into its target; the teacher's prediction in place of the "
        "student's; indices not in order"),
    Exercise("hpm", "average_in_turn", (23,), "L̂ in turn, ours", 20,
        "wrong axis: the mean over turns, patches or images; divided by the number of turns in place of those in "
        "which the patch is hidden; a turn's mean not subtracted, or taken over shown patches too; predictions put "
        "where they stand in line, not where their patch is"),
]  # fmt: skip


def by_name(name):
    """The exercise with this name. Raises ValueError, with the nearest one, if there is none."""
    names = [exercise.name for exercise in EXERCISES]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
        raise ValueError(f"no exercise {name!r}; did you mean {near}? `python -m tests.exercises` lists them all")
    return EXERCISES[names.index(name)]


def check_equation(name):
    """The name itself. Raises ValueError, with all that there are, if no row of the ledger has it."""
    if name not in EQUATIONS:
        raise ValueError(f"no equation {name!r}; there are {', '.join(EQUATIONS)}")
    return name


# ---------------------------------------------------------------------------------------------
# Blanks
# ---------------------------------------------------------------------------------------------


@cache
def parse(text, path):
    try:
        return ast.parse(text)
    except SyntaxError as error:
        raise ValueError(f"{shown(path)}, line {error.lineno}: {error.msg}") from None


def shown(path):
    """A path as it is typed at the root of the repository."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def real(module):
    """The real file: its text."""
    return (ROOT / f"{module}.py").read_text(encoding="utf-8")


def definition(tree, name):
    """The definition of `patchify`, or of `forward` in the class `Block`; None if there is none."""
    for part in name.split("."):
        found = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == part]
        if not found:
            return None
        tree = found[-1]  # the last one counts, as in Python
    return tree


def is_blank(function):
    """Whether nothing but the raise, and the docstring, is in its body."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return ast.unparse(body).startswith("raise NotImplementedError('exercise ") if len(body) == 1 else not body


def first_line(function):
    """The index of the line where its body starts, after the docstring."""
    first = function.body[0]
    return first.end_lineno if ast.get_docstring(function) is not None else first.lineno - 1


def blank(text, chosen, path):
    """The text with these functions' bodies replaced; their signatures, their docstrings and everything else stay."""
    functions = [(definition(parse(text, path), exercise.name), exercise) for exercise in chosen]
    lines = text.split("\n")
    for function, exercise in sorted(functions, key=lambda pair: -pair[0].lineno):  # lines before stay where they are
        message = f"exercise {exercise.number}: {exercise.equation}"
        indent = " " * function.body[0].col_offset
        lines[first_line(function) : function.end_lineno] = [f'{indent}raise NotImplementedError("{message}")']
    return "\n".join(lines)


def start(names=(), force=False):
    """Write the files of the exercises: all blank, or these alone. Returns the paths.

    Raises ValueError, and writes nothing, if work would be overwritten without `force`.
    """
    chosen, texts = [by_name(name) for name in names] or EXERCISES, {}
    for path in dict.fromkeys(exercise.path for exercise in chosen):
        here = [exercise for exercise in chosen if exercise.path == path]
        if path.exists() and not names and not force:
            raise ValueError(
                f"{shown(path)} is there already; name an exercise to blank it alone, or give --force to start over"
            )
        key = real(here[0].module)
        text = path.read_text(encoding="utf-8") if path.exists() and names else key
        for exercise in here:
            function = definition(parse(text, path), exercise.name)
            if function is None:
                raise ValueError(
                    f"{shown(path)} has no {exercise.name} any more; put its first line back, then try again"
                )
            untouched = ast.dump(function) == ast.dump(definition(parse(key, path), exercise.name))
            if not (force or untouched or is_blank(function)):
                raise ValueError(f"{shown(path)} has an answer to {exercise.name}; give --force to blank it")
        texts[path] = blank(text, here, path)
    FOLDER.mkdir(exist_ok=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return list(texts)


# ---------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------


def answers(exercise):
    """The syntax tree of the learner's file, or None if it or the exercise's function is not there.

    Raises ValueError, with the line, if it is no Python.
    """
    if not exercise.path.exists():
        return None
    tree = parse(exercise.path.read_text(encoding="utf-8"), exercise.path)
    return tree if definition(tree, exercise.name) else None


def written(exercise):
    """Whether there is something to grade."""
    tree = answers(exercise)
    return tree is not None and not is_blank(definition(tree, exercise.name))


def bound(node):
    """The names that a statement of a module or a class gives a value."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    parts = list(ast.walk(node))
    names = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    imports = [alias for part in parts if isinstance(part, (ast.Import, ast.ImportFrom)) for alias in part.names]
    return names | {alias.asname or alias.name.split(".")[0] for alias in imports}


@cache
def dumps(tree):
    return {ast.dump(node) for node in tree.body}


@contextlib.contextmanager
def in_place(exercise, tree, path):
    """While this lasts, the definition in `tree` is that of the real module.

    Beside it, the module and the class get what `tree` gives a name and they do not: helpers, imports, constants.
    """
    module = importlib.import_module(exercise.module)
    owner, theirs, ours = module, tree, parse(real(exercise.module), path)
    *parents, name = exercise.name.split(".")
    with pytest.MonkeyPatch.context() as patch:

        def run(node):
            values = {}
            exec(compile(ast.Module([node], []), str(path), "exec"), vars(module), values)
            return values

        for parent in [None, *parents]:
            if parent:
                owner, theirs, ours = getattr(owner, parent), definition(theirs, parent), definition(ours, parent)
            for node in theirs.body:
                new = bound(node) - vars(owner).keys()
                for what, value in run(node).items() if new and ast.dump(node) not in dumps(ours) else ():
                    if what in new:
                        patch.setattr(owner, what, value, raising=False)
        patch.setattr(owner, name, run(definition(theirs, name))[name])
        yield


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def progress(states):
    """The exercises in reading order with their states, and what comes next: lines of text."""
    lines = [f"{'#':>2}  {'row':<7} {'exercise':<26} {'minutes':>7}  {'where':<24} state"]
    for exercise in EXERCISES:
        tree = answers(exercise)
        where = shown(exercise.path) + (f":{definition(tree, exercise.name).lineno}" if tree else "")
        rows = ", ".join(map(str, exercise.rows))
        head = f"{exercise.number:>2}  {rows:<7} {exercise.name:<26} {exercise.minutes:>7}"
        lines.append(f"{head}  {where:<24} {states[exercise.name]}")
    return lines


def following(states):
    """How many are solved, and the first that is not: one line of text."""
    solved, ungraded = (list(states.values()).count(state) for state in ("solved", "not graded"))
    left = [exercise for exercise in EXERCISES if states[exercise.name] not in ("solved", "not graded")]
    line = f"{solved} of {len(EXERCISES)} solved" + (f", {ungraded} not graded this time." if ungraded else ".")
    if not left:
        return line if ungraded else f"{line} You have written both papers."
    return f"{line} Next: exercise {left[0].number}, {left[0].name}; read {left[0].notebook}."


def section(row):
    """The heading of the notebook section that walks through a row of the ledger, or None."""
    path = ROOT / "notebooks" / f"{ROWS[row - 1].notebook}.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else []
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    headings = [line for line in text.split("\n") if line.startswith("#") and line.rstrip().endswith(f"(row {row})")]
    return headings[0].lstrip("# ").rstrip() if headings else None


def citing(row):
    """The functions of a row's exercises that cite its equation, in their source or their class's docstring.

    Each by its file and its name, with the line of its definition.
    """
    found = {}
    for exercise in (e for e in EXERCISES if row in e.rows):
        text = real(exercise.module)
        tree, (*parents, _) = parse(text, exercise.path), exercise.name.split(".")
        function = definition(tree, exercise.name)
        source = ast.get_source_segment(text, function)
        source += "".join(ast.get_docstring(definition(tree, parent)) or "" for parent in parents)
        if ROWS[row - 1].cites in source:
            found[exercise.module, exercise.name] = function.lineno
    return found


class Collected(NamedTuple):
    """A test function, with the marks of all its cases."""

    path: str  # from the root
    name: str
    line: int
    function: Callable
    equations: set
    exercises: set
    cases: list  # of each, the names in its exercise marks


@cache
def collect():
    """The test functions of `TESTS`, as pytest finds them."""
    found = {}

    class Plugin:
        def pytest_collection_finish(self, session):
            for item in session.items:
                path, line, _ = item.location
                test = Collected(path, item.originalname, line + 1, item.function, set(), set(), [])
                test = found.setdefault((path, item.originalname), test)
                marks = [mark.args[0] for mark in item.iter_markers("exercise")]
                test.cases.append(marks)
                test.exercises.update(marks)
                test.equations.update(name for mark in item.iter_markers("equation") for name in mark.args)

    quiet = ["-o", "addopts=", "--collect-only"]
    quiet += [
        o
        for name in ("terminal", "cacheprovider", "unraisableexception", "threadexception")
        for o in ("-p", f"no:{name}")
    ]
    code = pytest.main([*quiet, "--rootdir", str(ROOT), *(str(ROOT / path) for path in TESTS)], plugins=[Plugin()])
    if code:
        raise ValueError(f"pytest does not collect {', '.join(TESTS)}; run it to see why")
    return list(found.values())


def ledger():
    """The ledger of equations: for each, where it is cited, taught, tested and to be written. A Markdown table."""
    lines = [
        "# The ledger of equations",
        "",
        "Written by `python -m tests.exercises ledger`. Each equation has a function that cites it, a section of a",
        "notebook that walks through it, tests, at least one of them against an independent oracle, and an exercise.",
        '`pytest --equation "ViT 6"` runs the tests of one.',
        "",
        "| row | equation | names | function | notebook | tests | exercise |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for number, row in enumerate(ROWS, 1):
        names = ", ".join(f"`{name}`" for name in row.equations)
        functions = ", ".join(f"[`{m}.{name}`](../{m}.py#L{line})" for (m, name), line in citing(number).items())
        notebook = f"[{section(number)}](../notebooks/{row.notebook}.ipynb)" if section(number) else ""
        tests = [test for test in collect() if test.equations & set(row.equations)]
        links = ", ".join(f"[`{t.name}`]({t.path.removeprefix('tests/')}#L{t.line})" for t in tests)
        own = ", ".join(f"{exercise.number} `{exercise.name}`" for exercise in EXERCISES if number in exercise.rows)
        lines.append(f"| {number} | {row.what} | {names} | {functions} | {notebook} | {links} | {own} |")
    return "\n".join(lines) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.exercises", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command")
    command = commands.add_parser("start", help="write exercises/, or blank one exercise")
    command.add_argument("names", nargs="*", metavar="NAME", help="blank these alone")
    command.add_argument("--force", action="store_true", help="also where an answer would be lost")
    commands.add_parser("ledger", help="write tests/ledger.md: where each equation is found")
    args = parser.parse_args(arguments)
    try:
        if args.command == "start":
            for path in start(args.names, args.force):
                print(f"wrote {shown(path)}")
            print(
                f"Read {EXERCISES[0].notebook if not args.names else by_name(args.names[0]).notebook}, write, and run"
            )
            print("    pytest --exercises")
        elif args.command == "ledger":
            (ROOT / "tests" / "ledger.md").write_text(ledger(), encoding="utf-8")
            print("wrote tests/ledger.md")
        else:
            states = {e.name: "written" if written(e) else "not started" for e in EXERCISES}
            print("\n".join(progress(states)))
            print("`pytest --exercises` grades them.")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
