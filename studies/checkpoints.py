"""The trained models of the notebooks: `python -m studies.checkpoints` trains those that are missing, and stores them.

    from studies import checkpoints
    model = checkpoints.load("scenes-hpm")              a vit.ViT, or an hpm.HPM with its student and its teacher
    python train.py --task linear --init notebooks/checkpoints/scenes-hpm.safetensors …

notebooks/checkpoints/ has for each model its weights in float16 (an HPM's teacher in a file of its own), and
checkpoints.json, which says of each what train.py was told, its seed, how long it took on what, and its scores on
1,000 test images.
"""

import json
import shlex

import torch
from safetensors.torch import load_file, save_file

import hpm
import vit
from studies import study

HERE = study.HERE.parent / "notebooks" / "checkpoints"
SEED = 0
MODELS = {  # what train.py is told, and the same model without its weights
    "scenes-supervised": (
        "--data scenes --arch vit_micro8 --pos-embed 1d --batch-size 64 --steps 3000 --test-images 1000",
        lambda: vit.create("vit_micro8", 64, 10, pos_embed="1d"),
    ),
    "fashion-mnist-supervised": (
        "--data fashion-mnist --arch vit_micro4 --epochs 4 --test-images 1000",
        lambda: vit.create("vit_micro4", 28, 10, in_chans=1),
    ),
    "fashion-mnist-hpm": (
        "--task hpm --data fashion-mnist --arch vit_micro4 --batch-size 32 --steps 4000 --test-images 1000",
        lambda: hpm.create("vit_micro4", 28, in_chans=1),
    ),
    "scenes-hpm-in-turn": (
        f"--task hpm {study.SCENES} --teacher in-turn",
        lambda: hpm.create("vit_micro8", 64, teacher="in-turn"),
    ),
    "scenes-mae": (
        f"--task mae {study.SCENES}",
        lambda: hpm.create("vit_micro8", 64, predictor="none", mask="random"),
    ),
    "scenes-hpm": (f"--task hpm {study.SCENES}", lambda: hpm.create("vit_micro8", 64)),
}


def path(name):
    """The weights of a model of `MODELS`: a safetensors file, which is also one for --init."""
    return HERE / f"{name}.safetensors"


def load(name):
    """A model of `MODELS` with its weights, in evaluation mode and float32.

    Images are normalised with the mean and the standard deviation of its data, `data.STATISTICS`.
    """
    model = MODELS[name][1]()
    parts = [load_file(part) for part in (path(name), path(f"{name}-teacher")) if part.exists()]
    model.load_state_dict({key: value.float() for part in parts for key, value in part.items()})
    return model.eval()


def store(name):
    """Train a model, if its run is not done, and write its files; returns its entry of checkpoints.json."""
    told = MODELS[name][0]
    folder = study.folder_of(told, SEED)
    scores = study.train([*shlex.split(told), "--seed", str(SEED)], folder)
    weights = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)["model"]
    weights = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    teacher = {key: value for key, value in weights.items() if key.startswith("teacher.")}
    HERE.mkdir(exist_ok=True)
    save_file({key: value for key, value in weights.items() if key not in teacher}, path(name))
    if teacher:
        save_file(teacher, path(f"{name}-teacher"))
    return dict(told=told, seed=SEED, machine=study.machine(None), scores=scores)


def entries():
    """What checkpoints.json says: {name: dict(told, seed, machine, scores)}."""
    file = HERE / "checkpoints.json"
    return json.loads(file.read_text()) if file.exists() else {}


if __name__ == "__main__":
    for name in MODELS:
        if entries().get(name, {}).get("told") != MODELS[name][0]:
            found = entries() | {name: store(name)}
            (HERE / "checkpoints.json").write_text(json.dumps(found, indent=1) + "\n")
            print(f"{path(name)}: {found[name]['scores']}", flush=True)
