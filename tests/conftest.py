"""Tests run on the CPU, where everything repeats bit for bit; those of test_cuda.py ask for the GPU themselves.

`pytest --exercises`: the tests grade the learner's files in exercises/ in place of the real code.
"""

import os

import pytest

from tests import exercises

WITH_GPU = dict(os.environ)
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_addoption(parser):
    parser.addoption("--exercises", action="store_true", help="grade the files in exercises/ and show the progress")


def pytest_configure(config):
    if config.getoption("--exercises"):
        config.pluginmanager.register(Grading(), "exercises")


def exercise_of(item):
    """The exercise that a test is marked with, or None. The mark of a single case goes before that of the function."""
    mark = item.get_closest_marker("exercise")
    return exercises.by_name(mark.args[0]) if mark else None


class Grading:
    """Runs the marked tests alone, each with one answer of the learner in place."""

    def __init__(self):
        self.outcomes = {exercise.name: set() for exercise in exercises.EXERCISES}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config, items):
        try:
            if not any(exercise.path.exists() for exercise in exercises.EXERCISES):
                raise ValueError("there are no exercises yet; `python -m tests.exercises start` writes them")
            for exercise in exercises.EXERCISES:
                exercises.answers(exercise)
            marked = [item for item in items if exercise_of(item)]
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
        config.hook.pytest_deselected(items=[item for item in items if item not in marked])
        items[:] = sorted(marked, key=lambda item: exercise_of(item).number)
        for item in items:
            item.extra_keyword_matches.add(exercise_of(item).name)  # for -k

    @pytest.fixture(autouse=True)
    def answer(self, request):
        exercise = exercise_of(request.node)
        if not exercises.written(exercise):
            pytest.skip(f"{exercise.name} is not started")
        if "failed" in self.outcomes[exercise.name]:
            pytest.skip(f"{exercise.name} failed a test already: one at a time")
        with exercises.in_place(exercise, exercises.answers(exercise), exercise.path):
            yield

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item):
        report = yield
        exercise = exercise_of(item)
        if report.failed or report.when == "call":
            self.outcomes[exercise.name].add(report.outcome)
        if report.failed:
            reasons = "\n".join(f"- {reason}" for reason in exercise.usual.split("; "))
            report.sections.append((f"exercise {exercise.number}, {exercise.name}: the usual reasons", reasons))
        return report

    def state(self, exercise):
        outcomes = self.outcomes[exercise.name]
        if not exercises.written(exercise):
            return "not started"
        return "failing" if "failed" in outcomes else "solved" if "passed" in outcomes else "not graded"

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # after all that pytest itself has to say
    def pytest_terminal_summary(self, terminalreporter):
        yield
        states = {exercise.name: self.state(exercise) for exercise in exercises.EXERCISES}
        terminalreporter.section("exercises")
        for line in [*exercises.progress(states), "", exercises.following(states)]:
            terminalreporter.write_line(line)
