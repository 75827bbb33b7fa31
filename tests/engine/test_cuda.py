"""On a GPU, if there is one: the same program, in bfloat16 and compiled, as it runs there by default."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import WITH_GPU

ROOT = Path(__file__).parents[1]
MICRO = "--arch vit_micro4 --img-size 32 --batch-size 16 --steps 20"


def run(*arguments):
    """A Python program that may see the GPU."""
    return subprocess.run([sys.executable, *arguments], env=WITH_GPU, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module", autouse=True)
def gpu():
    if run("-c", "import torch; assert torch.cuda.is_available()").returncode:
        pytest.skip("no GPU")


def losses(command, out):
    done = run(str(ROOT / "train.py"), *command.split(), "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_in_float32_the_gpu_learns_what_the_cpu_learns(tmp_path):
    """The same images in the same order, from the same weights; TF32 has ten bits."""
    plain = f"{MICRO} --dtype float32 --no-compile"
    cpu, cuda = (losses(f"{plain} --device {device}", tmp_path / device) for device in ("cpu", "cuda"))
    assert cuda == pytest.approx(cpu, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["supervised --mixup 0.8 --erasing 0.5 --drop-path 0.1", "mpp", "mae", "hpm"])
def test_the_defaults_on_a_gpu_learn_and_can_be_resumed(task, tmp_path):
    """bfloat16, compiled: the loss falls, and what was saved is read again."""
    values = losses(f"{MICRO} --task {task}", tmp_path / "run")
    assert values[-1] < values[0]
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["device"], config["dtype"], config["compile"]) == ("cuda", "bfloat16", True)
    (tmp_path / "run/config.json").write_text(json.dumps(config | {"steps": 24}))
    assert len(losses("--resume", tmp_path / "run")) == 24
