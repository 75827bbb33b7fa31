"""The exercises grade truly: blanks fail, the real code passes, and no wrong answer does."""

import ast
import inspect
import re

import pytest
import torch
from _pytest.runner import runtestprotocol

import vit
from tests import exercises, test_hpm, test_train, test_vit
from tests.conftest import exercise_of
from tests.exercises import EXERCISES, ROOT, ROWS, by_name, definition, in_place, real
from tests.wrong_bodies import WRONG_BODIES

NAMES = [exercise.name for exercise in EXERCISES]
TESTS = {name: test for module in (test_vit, test_hpm, test_train) for name, test in vars(module).items()}
QUICK = ("patchify", "relative_loss")  # all together take longer than a coffee
each_exercise = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES]
)


# ---------------------------------------------------------------------------------------------
# Grading
# ---------------------------------------------------------------------------------------------


class Trials:
    """A plugin of a pytest within pytest: runs the tests of one exercise with one body after the other in place."""

    def __init__(self, exercise, bodies):
        self.exercise, self.bodies = exercise, bodies
        self.tests, self.failed, self.messages = [], {}, []

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if exercise_of(item) == self.exercise]
        self.tests = [item.name for item in items]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        for what, (text, all_tests) in self.bodies.items():
            failed = self.failed[what] = []
            for item in session.items:
                with in_place(self.exercise, ast.parse(text), self.exercise.path):
                    reports = runtestprotocol(item, log=False, nextitem=None)
                if any(report.failed for report in reports):
                    failed.append(item.name)
                    self.messages += [report.longrepr.reprcrash.message for report in reports if report.failed]
                    if not all_tests:
                        break
        return True


def wrong_text(exercise, old, new):
    """The real file with a piece of one body replaced."""
    lines = real(exercise.module).split("\n")
    function = definition(ast.parse("\n".join(lines)), exercise.name)
    start = exercises.first_line(function)
    body = "\n".join(lines[start : function.end_lineno])
    assert body.count(old) == 1, f"{exercise.name} has {body.count(old)} pieces {old!r}: adapt tests/wrong_bodies.py"
    lines[start : function.end_lineno] = body.replace(old, new).split("\n")
    return "\n".join(lines)


@each_exercise
def test_a_blank_fails_all_tests_the_real_body_none_and_every_wrong_one_is_caught(name):
    """So that solved means right. The wrong bodies are in tests/wrong_bodies.py."""
    exercise = by_name(name)
    bodies = {what: (wrong_text(exercise, old, new), False) for what, old, new in WRONG_BODIES[name]}
    text = real(exercise.module)
    bodies |= {"real": (text, True), "blank": (exercises.blank(text, exercise, exercise.path), True)}
    trials = Trials(exercise, bodies)
    file = ROOT / "tests" / f"test_{exercise.module}.py"
    pytest.main(["-q", "-p", "no:cacheprovider", str(file)], plugins=[trials])
    assert trials.failed["real"] == [], "the real body fails its own tests"
    assert trials.failed["blank"] == trials.tests != [], "a test passes without an answer: it grades nothing"
    typos = [message for message in trials.messages if message.startswith(("NameError", "SyntaxError", "Unbound"))]
    assert typos == [], "a wrong body fails for another reason than the one it is for"
    survivors = [what for what, failed in trials.failed.items() if not failed and what != "real"]
    assert survivors == [], f"wrong answers to {name} that no test marked with it notices"


def test_each_exercise_has_at_least_three_wrong_bodies():
    assert list(WRONG_BODIES) == NAMES
    for name, bodies in WRONG_BODIES.items():
        assert len({(old, new) for _, old, new in bodies}) == len({what for what, _, _ in bodies}) >= 3, name


def exercises_of(test):
    """The names in the marks of a test function, and of its single cases."""
    for mark in getattr(test, "pytestmark", []):
        cases = mark.args[1] if mark.name == "parametrize" else []
        for m in [mark, *(m for case in cases for m in getattr(case, "marks", []))]:
            if m.name == "exercise":
                yield m.args[0]


def test_a_test_grades_one_exercise_and_each_exercise_is_graded():
    marked = {name: list(exercises_of(test)) for name, test in TESTS.items()}
    assert {name for names in marked.values() for name in names} == set(NAMES)
    for test, names in marked.items():
        assert len(set(names)) == len(names), f"{test} is marked twice"
        direct = [mark for mark in getattr(TESTS[test], "pytestmark", []) if mark.name == "exercise"]
        assert len(names) == 1 or not direct, f"{test} is marked, and so are its cases"


def test_an_answer_is_in_place_alone_and_with_its_helpers():
    """The others stay the real ones, whatever the file holds; and afterwards all is as it was."""
    tree = ast.parse("""
import fractions
from torch import nn
half = 1 / 2

def twice(x):
    return fractions.Fraction(2) * x

def patchify(images, patch_size, doubled=half):
    return twice(patch_size) * doubled

def unpatchify(patches):
    raise NotImplementedError

class Block(nn.Module):
    def helper(self):
        return math.pi

    def forward(self, z):
        return self.helper()
""")
    before = {module: dict(vars(module)) for module in (vit, vit.Block)}
    with in_place(by_name("patchify"), tree, "answers.py"):
        assert vit.patchify(None, 3) == 3
        assert vit.unpatchify is before[vit]["unpatchify"]
        assert vit.Block.forward is before[vit.Block]["forward"]
    with in_place(by_name("Block.forward"), tree, "answers.py"):
        assert vit.Block(8, 2)(None) == torch.pi
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


def test_pytest_with_exercises_grades_and_shows_the_progress(folder, capsys):
    """One right answer, one wrong one, the rest not started; then what the wrong one is told, and what comes next."""
    run("start", capsys)
    wrong = wrong_text(by_name("unpatchify"), "0, 5, 1, 3, 2, 4", "0, 5, 1, 4, 2, 3")
    for name, source in (("patchify", real("vit")), ("unpatchify", wrong)):
        text = (folder / "vit.py").read_text(encoding="utf-8")
        here, there = (ast.get_source_segment(t, definition(ast.parse(t), name)) for t in (text, source))
        (folder / "vit.py").write_text(text.replace(here, there), encoding="utf-8")
    command = ["--exercises", "-p", "no:cacheprovider", "-k", "patch", str(ROOT / "tests" / "test_vit.py")]
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


def test_without_exercises_pytest_says_how_to_start(folder, capfd):
    assert pytest.main(["--exercises", str(ROOT / "tests" / "test_vit.py")]) == pytest.ExitCode.USAGE_ERROR
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
    for test in row.tests.split():
        assert names & set(exercises_of(TESTS[test])), f"{test} grades no exercise of row {number}"
        assert re.search("loops|oracle|reference", inspect.getsource(TESTS[test])), f"{test} has no oracle"


def test_the_exercises_follow_the_ledger():
    first = [exercise.rows[0] for exercise in EXERCISES]
    assert first == sorted(first)
    assert len(EXERCISES) >= 24
    assert {row for exercise in EXERCISES for row in exercise.rows} == set(range(1, len(ROWS) + 1))


def test_the_notebook_of_an_exercise_names_it():
    for exercise in EXERCISES:
        text = (ROOT / exercise.notebook).read_text(encoding="utf-8")
        assert f"`{exercise.name}`" in text, f"{exercise.notebook} does not send the reader to {exercise.name}"


def test_the_table_of_the_ledger_is_that_of_the_code():
    text = (ROOT / "tests" / "ledger.md").read_text(encoding="utf-8")
    assert text == exercises.ledger(), "write it anew: python -m tests.exercises ledger"


def test_the_readme_shows_the_exercises_as_they_are():
    """The columns of its progress table, but for the line numbers and the states."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ours = exercises.progress(dict.fromkeys(NAMES, "solved"))[1:]
    shown = [line for line in text.splitlines() if re.match(r" ?\d+  \d+[ ,]", line)]
    assert len(shown) == len(NAMES)
    assert [line.split(" exercises/")[0] for line in shown] == [line.split(" exercises/")[0] for line in ours]
