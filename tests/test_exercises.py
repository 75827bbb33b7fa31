"""The exercises grade truly: blanks fail, right answers pass whatever their style, and no wrong one does.

The answers are in right_bodies.py and wrong_bodies.py. Each is graded by the tests of its exercise alone, all in one
pytest within this one. The plain tests grade those of two exercises, `pytest -m slow tests/test_exercises.py` of all.
"""

import ast
import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch
from _pytest.runner import runtestprotocol

import hpm
import vit
from tests import exercises
from tests.conftest import exercise_of
from tests.exercises import EQUATIONS, EXERCISES, ROOT, ROWS, TESTS, by_name, collect, definition, in_place, real
from tests.right_bodies import RIGHT_BODIES
from tests.wrong_bodies import WRONG_BODIES

NAMES = [exercise.name for exercise in EXERCISES]
# A pytest within pytest need not look for garbage before it ends: that takes longer than its tests.
WITHIN = ["-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "no:threadexception"]
QUICK = ("patchify", "relative_loss")  # all together take longer than a coffee
each_exercise = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES]
)


# ---------------------------------------------------------------------------------------------
# Grading
# ---------------------------------------------------------------------------------------------


def changed(name, what):
    """The source of a wrong answer: its own, or the sound one with pieces replaced."""
    sound, wrong = WRONG_BODIES[name]
    if isinstance(wrong[what], str):
        return wrong[what]
    text, pieces = sound, wrong[what]
    for old, new in zip(pieces[::2], pieces[1::2], strict=True):
        count = text.count(old)
        assert count == 1, (
            f"tests/wrong_bodies.py, {name}, {what!r}: the sound answer there has {count} pieces {old!r}; write one "
            "that it has once"
        )
        text = text.replace(old, new)
    return text


def tree_of(name, text):
    """The syntax tree of an answer: a method stands in its class, all beside it before that."""
    tree, (*parents, last) = ast.parse(textwrap.dedent(text)), name.split(".")
    for parent in parents:
        method = definition(tree, last)
        tree.body.remove(method)
        tree.body.append(ast.ClassDef(parent, [], [], [method], [], type_params=[]))
    return ast.fix_missing_locations(tree)


def bodies_of(name):
    """All right and wrong answers to an exercise, by what they are: syntax trees."""
    sound, wrong = WRONG_BODIES[name]
    right = {"the sound one of wrong_bodies.py": sound} | RIGHT_BODIES[name]
    trees = {("right", what): tree_of(name, body) for what, body in right.items()}
    return trees | {("wrong", what): tree_of(name, changed(name, what)) for what in wrong}


def answers_to(name):
    """These, and the real one and a blank."""
    exercise = by_name(name)
    text = real(exercise.module)
    blank = exercises.blank(text, [exercise], exercise.path)
    trees = {("real", ""): exercises.parse(text, exercise.path), ("blank", ""): ast.parse(blank)}
    return trees | bodies_of(name)


class Trials:
    """A plugin of a pytest within pytest: runs each exercise's tests with one answer after the other in place."""

    def __init__(self, names):
        self.names = names
        self.tests, self.failed = {}, {}  # by exercise: test names; by answer: name and message of what failed

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if exercise_of(item) and exercise_of(item).name in self.names]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        for name in self.names:
            items = [item for item in session.items if exercise_of(item).name == name]
            self.tests[name] = [item.name for item in items]
            self.failed[name] = {answer: self.grade(name, items, answer, t) for answer, t in answers_to(name).items()}
        return True

    def grade(self, name, items, answer, tree):
        failed = {}
        for item in items:
            with in_place(by_name(name), tree, f"{name}, {' '.join(answer)}".strip()):
                reports = [r for r in runtestprotocol(item, log=False, nextitem=None) if r.failed]
            if reports:
                failed[item.name] = reports[0].longrepr.reprcrash.message
                if answer[0] == "wrong":  # one is enough
                    break
        return failed


@pytest.fixture(scope="module")
def trials(request):
    """The exercises that tests of this run ask for, graded."""
    asked = [item.callspec.params["name"] for item in request.session.items if "trials" in item.fixturenames]
    trials = Trials([name for name in NAMES if name in asked])
    modules = {by_name(name).module for name in trials.names}
    files = [str(ROOT / path) for path in TESTS if path.split("test_")[-1].removesuffix(".py") in modules]
    pytest.main([*WITHIN, "-m", "not slow", "--tb", "native", "-o", "addopts=-q", *files], plugins=[trials])
    return trials


def failures(trials, name, kind):
    """What failed for the answers of one kind: {answer: {test: message}}."""
    return {what: failed for (k, what), failed in trials.failed[name].items() if k == kind}


@each_exercise
def test_the_real_body_passes_and_a_blank_fails_every_test(name, trials):
    assert failures(trials, name, "real") == {"": {}}, "the real body fails its own tests"
    blank = failures(trials, name, "blank")[""]
    assert list(blank) == trials.tests[name] != [], "a test passes without an answer: it grades nothing"


@each_exercise
def test_right_answers_in_any_style_are_accepted(name, trials):
    """A test asks for what the docstring promises, and nothing else."""
    refused = {what: failed for what, failed in failures(trials, name, "right").items() if failed}
    assert refused == {}, f"right answers to {name} that a test refuses; if its interface changed, change them all"


TYPOS = re.compile("NameError|SyntaxError|UnboundLocalError|ImportError|AttributeError: '[A-Z]")


@each_exercise
def test_wrong_answers_are_caught_and_told_why(name, trials):
    """So that solved means right; and each of them for what is wrong with it."""
    wrong = failures(trials, name, "wrong")
    unnoticed = [what for what, failed in wrong.items() if not failed]
    assert unnoticed == [], f"wrong answers to {name} that no test marked with it notices"
    typos = {what: failed for what, failed in wrong.items() if any(map(TYPOS.match, failed.values()))}
    assert typos == {}, "they fail for another reason than the one they are for"


def test_each_exercise_has_right_and_wrong_answers():
    assert list(WRONG_BODIES) == list(RIGHT_BODIES) == NAMES
    for name in NAMES:
        assert len(WRONG_BODIES[name][1]) >= 3, f"wrong answers to {name}"
        assert len(RIGHT_BODIES[name]) >= 2, f"right answers to {name}"
        trees = [ast.dump(tree) for tree in bodies_of(name).values()]
        assert len(set(trees)) == len(trees), f"two answers to {name} are the same"


def test_a_test_grades_one_exercise_and_each_exercise_is_graded():
    assert {name for test in collect() for name in test.exercises} == set(NAMES)
    files = (
        path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)
    )
    marked = [file for file in files if "pytest.mark.exercise(" in (ROOT / file).read_text(encoding="utf-8")]
    assert set(marked) <= set(TESTS), "tests.exercises.TESTS lists the files that grade"
    for test in collect():
        assert all(len(names) <= 1 for names in test.cases), f"{test.name}, or one of its cases, is marked twice"


def test_an_answer_is_in_place_alone_and_with_its_helpers():
    """The others stay the real ones, whatever the file holds; and afterwards all is as it was."""
    tree = ast.parse("""
import fractions
from torch import nn
half: float = 1 / 2
SIZES: dict = {"ti": "another"}
try:
    import a_module_that_does_not_exist as fast
except ImportError:
    fast = None
table = []
for step in range(2):
    table += [step]

def twice(x):
    return fractions.Fraction(2) * x

def patchify(images, patch_size, doubled=half):
    return twice(patch_size) * doubled + len(SIZES["b"]) + sum(table), fast

def unpatchify(patches):
    raise NotImplementedError

class Block(nn.Module):
    factor: int = 2

    def helper(self):
        return math.pi * self.factor

    def forward(self, z):
        return self.helper()
""")
    before = {module: dict(vars(module)) for module in (vit, vit.Block)}
    with in_place(by_name("patchify"), tree, "answers.py"):
        assert vit.patchify(None, 3) == (3 + 3 + 1, None)
        assert vit.unpatchify is before[vit]["unpatchify"]
        assert vit.SIZES is before[vit]["SIZES"]
        assert vit.Block.forward is before[vit.Block]["forward"]
    with in_place(by_name("Block.forward"), tree, "answers.py"):
        assert vit.Block(8, 2)(None) == 2 * torch.pi
        assert vit.patchify is before[vit]["patchify"]
    assert {module: dict(vars(module)) for module in (vit, vit.Block)} == before


# ---------------------------------------------------------------------------------------------
# The files and the command
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A place of its own for the learner's files; those of the reader of this test are left alone."""
    monkeypatch.setattr(exercises, "FOLDER", tmp_path / "exercises")
    return tmp_path / "exercises"


def run(command, capsys):
    """Exit code, standard output, standard error."""
    return exercises.main(command.split()), *capsys.readouterr()


def without_bodies(text, module):
    """The text of a file without the lines of its exercises' bodies; and these."""
    lines, bodies, tree = text.split("\n"), {}, ast.parse(text)
    functions = [(e.name, definition(tree, e.name)) for e in EXERCISES if e.module == module]
    for name, function in sorted(functions, key=lambda pair: -pair[1].lineno):
        body = slice(exercises.first_line(function), function.end_lineno)
        bodies[name], lines[body] = "\n".join(lines[body]), []
    return "\n".join(lines), bodies


def test_start_writes_the_real_files_with_blank_bodies(folder, capsys):
    """Signatures, docstrings and everything else stay, to the letter."""
    assert run("start", capsys)[0] == 0
    assert sorted(path.name for path in folder.iterdir()) == ["hpm.py", "train.py", "vit.py"]
    for path in folder.iterdir():
        rest, bodies = without_bodies(path.read_text(encoding="utf-8"), path.stem)
        assert rest == without_bodies(real(path.stem), path.stem)[0]
        for name, body in bodies.items():
            exercise = by_name(name)
            expected = f'raise NotImplementedError("exercise {exercise.number}: {exercise.equation}")'
            assert body.strip() == expected
    states = [line.split()[-2:] for line in run("", capsys)[1].splitlines()[1:-1]]
    assert states == [["not", "started"]] * len(EXERCISES)


def test_work_is_not_overwritten_without_force(folder, capsys):
    """Neither all of it nor one answer; and a refusal changes no file."""
    run("start", capsys)
    path = folder / "vit.py"
    blanks = path.read_text(encoding="utf-8")
    path.write_text(blanks.replace(blanks[blanks.index("raise N") :].split("\n")[0], "return images  # mine"), "utf-8")
    work = path.read_text(encoding="utf-8")
    assert "# mine" in work
    for command in ("start", "start patchify", "start unpatchify patchify hard_mask"):
        code, out, error = run(command, capsys)
        assert (code, out, path.read_text(encoding="utf-8")) == (2, "", work), command
        assert re.fullmatch(r"error: .*vit\.py .*--force.*\n", error), error
    assert run("start unpatchify", capsys)[0] == 0
    assert path.read_text(encoding="utf-8") == work, "it was blank already"
    assert run("start patchify --force", capsys)[0] == 0
    assert path.read_text(encoding="utf-8") == blanks, "this one alone"
    path.write_text(work, encoding="utf-8")
    assert run("start --force", capsys)[0] == 0
    assert path.read_text(encoding="utf-8") == blanks


def test_start_with_a_name_blanks_this_one_alone(folder, capsys):
    """In a new folder all else is the real code; what is not touched needs no force."""
    assert run("start Attention.forward", capsys)[0] == 0
    assert [path.name for path in folder.iterdir()] == ["vit.py"]
    path = folder / "vit.py"
    before, after = (without_bodies(text, "vit")[1] for text in (real("vit"), path.read_text(encoding="utf-8")))
    assert [name for name in before if before[name] != after[name]] == ["Attention.forward"]
    assert run("start patchify", capsys)[0] == 0
    after = without_bodies(path.read_text(encoding="utf-8"), "vit")[1]
    assert {name for name in before if before[name] != after[name]} == {"Attention.forward", "patchify"}


@pytest.mark.parametrize(("name", "nearest"), [("patchfy", "patchify"), ("Block.forwards", "Block.forward")])
def test_an_unknown_name_is_refused_with_the_nearest(name, nearest, folder, capsys):
    code, out, error = run(f"start {name}", capsys)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"error: .*{name}.*did you mean {nearest}\?.*\n", error)
    assert not folder.exists()


def test_a_file_that_is_no_python_is_named_with_the_line(folder, capsys):
    run("start", capsys)
    with (folder / "vit.py").open("a", encoding="utf-8") as file:
        file.write("\ndef broken(:\n")
    line = len((folder / "vit.py").read_text(encoding="utf-8").split("\n")) - 1
    for command in ("", "start patchify"):
        code, _, error = run(command, capsys)
        assert code == 2
        assert re.fullmatch(rf"error: .*vit\.py, line {line}: .*\n", error)


def write_answer(path, name, text):
    """Put the definition in `text` in the place of the one in the learner's file."""
    there = path.read_text(encoding="utf-8")
    old, new = (ast.get_source_segment(t, definition(ast.parse(t), name)) for t in (there, text))
    path.write_text(there.replace(old, new), encoding="utf-8")


def test_pytest_with_exercises_grades_and_shows_the_progress(folder, capsys):
    """One right answer, one wrong one, the rest not started; then what the wrong one is told, and what comes next."""
    run("start", capsys)
    write_answer(folder / "vit.py", "patchify", real("vit"))
    write_answer(folder / "vit.py", "unpatchify", textwrap.dedent(changed("unpatchify", "the grid turned")))
    command = [*WITHIN, "--exercises", "-k", "patch", str(ROOT / "tests" / "test_vit.py")]
    code, out = pytest.main(command), capsys.readouterr().out
    assert code == pytest.ExitCode.TESTS_FAILED
    lines = [line for line in out.splitlines() if re.match(r" ?\d+  \d+[ ,]", line)]
    states = {name: line for name, line in zip(NAMES, lines, strict=True) if f" {name} " in line}
    assert list(states) == NAMES, "in reading order"
    assert states["patchify"].endswith(" solved")
    assert states["unpatchify"].endswith(" failing")
    assert states["PatchEmbed.forward"].endswith(" not started")
    assert all(f"- {reason}" in out for reason in by_name("unpatchify").usual.split("; "))
    assert out.count("usual reasons") == 1, "one failure an exercise"
    assert f"1 of {len(NAMES)} solved. Next: exercise 2, unpatchify; read notebooks/01_image_to_tokens.ipynb." in out


def pytest_on(path, *options):
    """A pytest on a file of tests elsewhere, with the project's conftest: its exit code."""
    config = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(path.parent), "--import-mode", "importlib"]
    return pytest.main([*WITHIN, *config, "-p", "tests.conftest", *options, str(path)])


def write_tests(folder, text):
    """A file of tests with a name that no other has; the path."""
    path = folder / f"{folder.name}.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_no_parameter_of_a_test_keeps_an_answer_from_being_graded(folder, tmp_path, capsys):
    """A fixture once put answers in place: a test with a parameter of that name graded the real code, unseen."""
    names = ["answer", "answers", "grading", "exercise", "exercises", "in_place", "item", "request_"]
    path = write_tests(
        tmp_path,
        f"""
import pytest, hpm

@pytest.fixture(autouse=True)
def answer():
    pass

@pytest.mark.exercise("hard_fraction")
@pytest.mark.parametrize({names}, [range({len(names)})])
def test_with_parameters({", ".join(names)}):
    assert hpm.hard_fraction(1, 2, 0.5, 1.0) == 0.75
""",
    )
    run("start", capsys)
    for body, state in (("alpha_0 + t / T * (alpha_T - alpha_0)", "solved"), ("alpha_0 + t / T * alpha_T", "failing")):
        answer = f"def hard_fraction(t, T, alpha_0=0.0, alpha_T=0.5):\n    return {body}"
        write_answer(folder / "hpm.py", "hard_fraction", answer)
        code, out = pytest_on(path, "--exercises"), capsys.readouterr().out
        assert code == (pytest.ExitCode.OK if state == "solved" else pytest.ExitCode.TESTS_FAILED)
        assert re.search(rf" hard_fraction .* {state}$", out, re.MULTILINE), out
    assert hpm.hard_fraction(1, 2, 0.5, 1.0) == 0.75, "the answer is still in place"


@pytest.mark.parametrize(
    ("line", "told"), [("half = 1 / 0", "ZeroDivisionError"), ("from hpm import a_name", "ImportError")]
)
def test_what_goes_wrong_beside_an_answer_is_told(line, told, folder, tmp_path, capsys):
    """An error of the learner's file is a failing exercise, not one of pytest; and the next test is in order again."""
    tests = write_tests(
        tmp_path,
        """
import pytest, hpm

@pytest.mark.exercise("hard_fraction")
def test_one():
    assert hpm.hard_fraction(1, 2) == 0.25
""",
    )
    run("start", capsys)
    write_answer(folder / "hpm.py", "hard_fraction", "def hard_fraction(t, T):\n    return 0.5 * t / T")
    path = folder / "hpm.py"
    path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    code, out = pytest_on(tests, "--exercises"), capsys.readouterr().out
    assert code == pytest.ExitCode.TESTS_FAILED
    assert told in out
    assert re.search(r" hard_fraction .* failing$", out, re.MULTILINE), out


def test_without_exercises_pytest_says_how_to_start(folder, capfd):
    assert pytest.main([*WITHIN, "--exercises", str(ROOT / "tests" / "test_vit.py")]) == pytest.ExitCode.USAGE_ERROR
    assert "`python -m tests.exercises start`" in "".join(capfd.readouterr())


# ---------------------------------------------------------------------------------------------
# The ledger
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(1, len(ROWS) + 1))
def test_each_equation_is_cited_taught_tested_and_an_exercise(number):
    """The four places of a row of the ledger."""
    row = ROWS[number - 1]
    assert exercises.citing(number), f"no function of row {number} cites {row.cites!r}"
    assert exercises.section(number), f"no heading in notebooks/{row.notebook}.ipynb ends in (row {number})"
    names = {exercise.name for exercise in EXERCISES if number in exercise.rows}
    assert names, f"no exercise belongs to row {number}"
    for equation in row.equations:
        tests = [test for test in collect() if equation in test.equations]
        assert tests, f'no test is marked equation("{equation}")'
        assert any(names & test.exercises for test in tests), (
            f"no test of {equation} grades an exercise of row {number}"
        )
        sources = [inspect.getsource(test.function) for test in tests]
        assert any(re.search("loops|oracle|reference", source) for source in sources), f"{equation} has no oracle"


def test_pytest_finds_the_tests_of_an_equation(tmp_path, capsys):
    """Those with its mark, on the function or on a single case, and no others."""
    path = write_tests(
        tmp_path,
        """
import pytest

@pytest.mark.equation("ViT 6")
def test_one(): pass

@pytest.mark.equation("ViT 5", "ViT 6")
def test_two(): pass

@pytest.mark.parametrize("x", [0, pytest.param(1, marks=pytest.mark.equation("ViT 6"))])
@pytest.mark.equation("ViT 7")
def test_three(x): pass

def test_four(): pass
""",
    )
    for asked, expected in (
        (["ViT 6"], ["one", "two", "three[1]"]),
        (["ViT 7", "ViT 5"], ["two", "three[0]", "three[1]"]),
    ):
        options = [option for name in asked for option in ("--equation", name)]
        assert pytest_on(path, *options, "-vv") == 0
        assert re.findall(r"::test_(\w+\S*) PASSED", capsys.readouterr().out) == expected


@pytest.mark.parametrize(("mark", "option"), [("ViT 99", None), ("ViT 6", "ViT 99")])
def test_an_unknown_equation_is_refused_with_all_that_there_are(mark, option, tmp_path, capfd):
    path = write_tests(tmp_path, f'import pytest\n\n@pytest.mark.equation("{mark}")\ndef test_one(): pass\n')
    options = ["--equation", option] if option else []
    assert pytest_on(path, *options) == pytest.ExitCode.USAGE_ERROR
    assert f"no equation 'ViT 99'; there are {', '.join(EQUATIONS)}" in "".join(capfd.readouterr())


def test_the_exercises_follow_the_ledger():
    first = [exercise.rows[0] for exercise in EXERCISES]
    assert first == sorted(first)
    assert {row for exercise in EXERCISES for row in exercise.rows} == set(range(1, len(ROWS) + 1))
    assert len(set(EQUATIONS)) == len(EQUATIONS)


def test_the_notebook_of_an_exercise_names_it():
    for exercise in EXERCISES:
        text = (ROOT / exercise.notebook).read_text(encoding="utf-8")
        assert f"`{exercise.name}`" in text, f"{exercise.notebook} does not send the reader to {exercise.name}"


def test_the_table_of_the_ledger_is_that_of_the_code():
    text = (ROOT / "tests" / "ledger.md").read_text(encoding="utf-8")
    assert text == exercises.ledger(), "write it anew: python -m tests.exercises ledger"


def test_the_readme_says_how_to_start_and_how_many_there_are():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("python -m tests.exercises start", "pytest --exercises"):
        assert command in text
    numbers = re.findall(r"\b(\d+) (?:functions are )?exercises\b", text)
    assert set(numbers) == {str(len(EXERCISES))}
