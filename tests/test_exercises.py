"""The exercises grade truly: blanks fail, the real code passes, and no wrong answer does."""

import ast

import pytest
from _pytest.runner import runtestprotocol

from tests import exercises
from tests.conftest import exercise_of
from tests.exercises import EXERCISES, in_place, real
from tests.wrong_bodies import WRONG_BODIES

NAMES = [exercise.name for exercise in EXERCISES]
QUICK = ("patchify", "Block.forward", "relative_loss")  # the others take longer than a coffee together
each_exercise = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES]
)


class Trials:
    """A plugin of a pytest within pytest: runs the tests of one exercise with one body after the other in place."""

    def __init__(self, exercise, bodies):
        self.exercise, self.bodies = exercise, bodies
        self.tests, self.failed = [], {}

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
                    if not all_tests:
                        break
        return True


def wrong_text(exercise, old, new):
    """The real file with a piece of one body replaced."""
    lines = real(exercise.module).split("\n")
    function = exercises.definition(ast.parse("\n".join(lines)), exercise.name)
    start = exercises.first_line(function)
    body = "\n".join(lines[start : function.end_lineno])
    assert body.count(old) == 1, f"{exercise.name} has {body.count(old)} pieces {old!r}: adapt tests/wrong_bodies.py"
    lines[start : function.end_lineno] = body.replace(old, new).split("\n")
    return "\n".join(lines)


@each_exercise
def test_a_blank_fails_all_tests_the_real_body_none_and_every_wrong_one_is_caught(name):
    """So that solved means right. The wrong bodies are in tests/wrong_bodies.py."""
    exercise = exercises.by_name(name)
    bodies = {what: (wrong_text(exercise, old, new), False) for what, old, new in WRONG_BODIES[name]}
    text = real(exercise.module)
    bodies |= {"real": (text, True), "blank": (exercises.blank(text, exercise, exercise.path), True)}
    trials = Trials(exercise, bodies)
    file = exercises.ROOT / "tests" / f"test_{exercise.module}.py"
    pytest.main(["-q", "-p", "no:cacheprovider", str(file)], plugins=[trials])
    assert trials.failed["real"] == [], "the real body fails its own tests"
    assert trials.failed["blank"] == trials.tests != [], "a test passes without an answer: it grades nothing"
    survivors = [what for what, failed in trials.failed.items() if not failed and what != "real"]
    assert survivors == [], f"wrong answers to {name} that no test marked with it notices"


def test_each_exercise_has_at_least_three_wrong_bodies():
    assert list(WRONG_BODIES) != []
    assert set(WRONG_BODIES) == set(NAMES)
    for name, bodies in WRONG_BODIES.items():
        assert len({(old, new) for _, old, new in bodies}) == len({what for what, _, _ in bodies}) >= 3, name
