"""The trained models that the notebooks load, of studies/checkpoints.py: they are what checkpoints.json says."""

import os
import shlex
from pathlib import Path

import pytest
import torch

import train
import vit
from engine import config as flags
from studies import checkpoints

ENTRIES = checkpoints.entries()
FOLDER = Path(os.environ.get("VIT_DATA") or "data")


def test_every_model_is_stored_and_small():
    """At most 1.5 MB a file; what train.py was told, the seed, the time and the scores beside it."""
    assert ENTRIES.keys() == checkpoints.MODELS.keys()
    for name, (told, _) in checkpoints.MODELS.items():
        assert (ENTRIES[name]["told"], ENTRIES[name]["seed"]) == (told, checkpoints.SEED)
        assert ENTRIES[name]["scores"]["seconds"] > 0
    sizes = {path.name: path.stat().st_size for path in checkpoints.HERE.glob("*.safetensors")}
    assert sizes.keys() >= {f"{name}.safetensors" for name in checkpoints.MODELS}
    assert max(sizes.values()) <= 1.5e6


@pytest.mark.slow
@pytest.mark.parametrize("name", checkpoints.MODELS)
def test_a_stored_model_reaches_its_score(name):
    """On the same 1,000 test images as at the end of its training: within a point, or a hundredth of a share."""
    if not (FOLDER / "fashion-mnist").exists():
        pytest.skip("Fashion-MNIST is not here; VIT_DATA can name the folder that has it")
    told = shlex.split(ENTRIES[name]["told"])
    config, dataset = flags.configure(flags.parse([*told, "--data-dir", str(FOLDER), "--device", "cpu"]))
    assert len(dataset.test) == 1000
    scores = train.TASKS[config.task].score(config, checkpoints.load(name), dataset)
    expected = {key: ENTRIES[name]["scores"][key] for key in scores if key in ENTRIES[name]["scores"]}
    assert expected.keys() & {"top1", "test_rec"}
    for key, value in expected.items():
        assert scores[key] == pytest.approx(value, abs=1.0 if key.startswith("top") else 0.01), key


@pytest.mark.parametrize("name", checkpoints.MODELS)
def test_a_stored_model_is_one_to_start_from(name):
    """--init reads the file: the encoder has its weights, to the precision of float16."""
    stored, fresh = (
        getattr(getattr(model, "student", model), "encoder", model)
        for model in (checkpoints.load(name), checkpoints.MODELS[name][1]())
    )
    vit.load_weights(fresh, checkpoints.path(name))
    for key, value in stored.blocks.state_dict().items():
        assert torch.equal(value, fresh.blocks.state_dict()[key]), key
