"""Fixtures of the tests that start runs. What they import is imported when they are asked for: most tests need none."""

import functools
import shutil
import signal
from pathlib import Path

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


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a run of 12 steps, two epochs, that ended well; nobody may write there."""
    from tests.engine.runs import MICRO, run, stand_in

    folder = tmp_path_factory.mktemp("finished")
    with stand_in():
        assert run(f"{MICRO} --steps 12 --out {folder / 'run'}") == 0
    return folder / "run"


@pytest.fixture
def finished(finished_run, small, shallow, no_figures):
    """A copy of it as `run` in the folder of the test."""
    shutil.copytree(finished_run, "run")
    return Path("run")


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """The checkpoints of a short HPM pre-training and a short supervised training at 16 pixels, a dict."""
    from tests.engine.runs import MICRO, run, stand_in

    folder = tmp_path_factory.mktemp("pretrained")
    with stand_in():
        for task, arch in (("hpm", "micro4"), ("supervised", "ti8")):
            assert run(f"{MICRO} --arch vit_{arch} --task {task} --lr 0.003 --out {folder / task}") == 0
    return {task: folder / task / "last.pt" for task in ("hpm", "supervised")}
