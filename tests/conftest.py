"""Tests run on the CPU, where everything repeats bit for bit; those of test_cuda.py ask for the GPU themselves.

pytest --equation "ViT 6"   the tests of this equation alone; tests/ledger.md lists the names
pytest --exercises          the marked tests grade the learner's files in exercises/ in place of the real code
"""

import contextlib
import os
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import exercises

WITH_GPU = dict(os.environ)
os.environ["CUDA_VISIBLE_DEVICES"] = ""


# ---------------------------------------------------------------------------------------------
# Fixtures
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def save(tmp_path):
    """A function that writes anything as `torch.save` does, and returns the path: save(content, "vit.pt")."""

    def save(content, name):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


class Waits(TorchDispatchMode):
    """Lists what makes the host wait for a device: `reads`, a value or a size that depends on one; and `copies`.

    A copy that is asked for with non_blocking=True, out of pinned memory, is none that it waits for.
    """

    READ = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.reads, self.copies = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out, name = function(*args, **kwargs), function.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        picks = name in ("index", "index_put", "index_put_") and any(t.dtype == torch.bool for t in tensors[1:])
        if picks or name in self.READ:
            self.reads.append(name)
        # A single number of the host's goes to the device with the call of the kernel: no copy, unless it is all.
        there = [t.device for t in tensors if t.ndim or name in ("copy_", "_to_copy")]
        moves = isinstance(out, torch.Tensor) and any(device != out.device for device in there)
        if moves and not (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))):
            self.copies.append(name)
        return out


@pytest.fixture
def waits():
    """The class `Waits`: `with waits() as seen: …`, then `assert seen.reads == seen.copies == []`."""
    return Waits


# ---------------------------------------------------------------------------------------------
# Equations and exercises
# ---------------------------------------------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption("--equation", action="append", metavar="NAME", help='run the tests of this equation: "ViT 6"')
    parser.addoption("--exercises", action="store_true", help="grade the files in exercises/ and show the progress")


def pytest_configure(config):
    if config.getoption("--exercises"):
        config.pluginmanager.register(Grading(), "exercises")


def exercise_of(item):
    """The exercise that a test is marked with, or None. The mark of a single case goes before that of the function."""
    mark = item.get_closest_marker("exercise")
    return exercises.by_name(mark.args[0]) if mark else None


def equations_of(item):
    """The names in a test's equation marks, of the function and of the single case."""
    return {exercises.check_equation(name) for mark in item.iter_markers("equation") for name in mark.args}


def keep(config, items, chosen):
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def pytest_collection_modifyitems(config, items):
    """Refuse marks with unknown names; keep the tests of the equations that are asked for."""
    try:
        wanted = {exercises.check_equation(name) for name in config.getoption("--equation") or ()}
        equations = {item: (exercise_of(item), equations_of(item))[1] for item in items}
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    if wanted:
        keep(config, items, [item for item in items if wanted & equations[item]])


class Grading:
    """Runs the marked tests alone, each with one answer of the learner in place, by hooks.

    Not by a fixture: a test that had a parameter of the same name would take its place, and grade nothing.
    """

    def __init__(self):
        self.outcomes = {exercise.name: set() for exercise in exercises.EXERCISES}
        self.during_a_test = contextlib.ExitStack()

    def pytest_ignore_collect(self, collection_path):
        """Leave out the files of this folder that do not grade: to look into all takes longer than to grade."""
        ours = collection_path.suffix == ".py" and Path(__file__).parent in collection_path.parents
        return True if ours and collection_path not in [exercises.ROOT / path for path in exercises.TESTS] else None

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
        keep(config, items, sorted(marked, key=lambda item: exercise_of(item).number))
        for item in items:
            item.extra_keyword_matches.add(exercise_of(item).name)  # for -k

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        exercise = exercise_of(item)
        if not exercises.written(exercise):
            pytest.skip(f"{exercise.name} is not started")
        if "failed" in self.outcomes[exercise.name]:
            pytest.skip(f"{exercise.name} failed a test already: one at a time")
        answer = exercises.in_place(exercise, exercises.answers(exercise), exercise.path)
        self.during_a_test.enter_context(answer)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self):
        with self.during_a_test:
            return (yield)

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
