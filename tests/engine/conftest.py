"""Fixtures of the tests that start runs. What they import is imported when they are asked for: most tests need none."""

import functools
import signal

import pytest


@pytest.fixture
def leave_no_trace(tmp_path, monkeypatch):
    """The test works in a folder of its own, and gives the signals back that a run takes."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def small(leave_no_trace, monkeypatch):
    """24 small coloured images in place of the photographs, see runs.py."""
    import data
    from tests.engine.runs import small_photos

    monkeypatch.setattr(data, "photos", small_photos)


@pytest.fixture
def no_figures(monkeypatch):
    """Runs draw nothing: that is most of the time of a short one."""
    import train

    monkeypatch.setattr(train, "draw_figures", lambda *_: None)


@pytest.fixture
def shallow(monkeypatch):
    """vit_micro4 with three blocks in place of six, for what does not depend on its depth."""
    import vit
    from tests.engine.runs import BLOCKS

    monkeypatch.setitem(vit.ARCHS, "vit_micro4", vit.ARCHS["vit_micro4"] | {"depth": BLOCKS})


@pytest.fixture
def steps_of(small, shallow, no_figures, monkeypatch):
    """steps_of(command, n=1): what happened in the first n steps of a run, see `record_steps` in runs.py."""
    from tests.engine.runs import record_steps

    return functools.partial(record_steps, monkeypatch)
