"""On a GPU, if there is one: the CPU's numbers; bfloat16, compiled, as it runs by default; a host that never waits.

All in one process, see on_gpu.py: `pytest -m slow tests/engine/test_cuda.py` takes two minutes.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import WITH_GPU

ROOT = Path(__file__).parents[2]
CHECKS = re.findall(r"^def (check_\w+)", Path(__file__).with_name("on_gpu.py").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def results():
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.on_gpu"],
        env=WITH_GPU | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    if said == "no GPU":
        pytest.skip("no GPU")
    print(done.stderr[-4000:])  # shown with a failure
    return said


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name, results):
    """Why, is said in on_gpu.py."""
    assert results[name] == "", results[name]
