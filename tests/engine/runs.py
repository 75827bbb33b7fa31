"""Small runs for the tests of the engine: train.py in this process, on 24 coloured images of 16 pixels.

They stand in for the photographs: fixture `small` of conftest.py.
"""

import contextlib
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import data
import train
import vit
from engine import config as flags

PLAIN = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)  # mean and standard deviation of the images below
STILL = "--arch vit_micro4 --img-size 16"  # for tasks that make no steps
MICRO = f"{STILL} --batch-size 4 --steps 3"
BLOCKS = 3  # of vit_micro4 in place of 6, where fixture `steps_of` or `shallow` is asked for
TIMES = ("seconds", "images_per_second")  # what no two runs have in common


def coloured(n, seed):
    """n images (n, 3, 16, 16) of three classes: red, green or blue where the others are noise; and labels (n,)."""
    images = torch.randint(160, (n, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    labels = torch.arange(n) % 3
    images[torch.arange(n), labels] += 90
    return images, labels


def small_photos(size=None):
    """24 training and 10 test images."""
    splits = (data.InMemory(*coloured(n, seed=n), *PLAIN) for n in (24, 10))
    return data.Dataset("photos", ["red", "green", "blue"], *PLAIN, *splits)


def run(command):
    """`python train.py COMMAND` in this process: the exit code."""
    try:
        return train.main(command.split())
    except SystemExit as stop:  # argparse
        return stop.code


def settings(command):
    """The completed configuration and the data of a command."""
    return flags.configure(flags.parse(command.split()))


def log(out):
    """The lines of log.jsonl, without the times."""
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def checkpoint(out):
    return torch.load(Path(out, "last.pt"), weights_only=True)


def different(one, other):
    """Names of the tensors that are not equal bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def watch(monkeypatch, look):
    """Call look(step, model, config) after every step."""
    original = train.train_step

    def train_step(config, dataset, model, wrapped_model, average, optimizer, step, images, targets):
        metrics = original(config, dataset, model, wrapped_model, average, optimizer, step, images, targets)
        look(step, model, config)
        return metrics

    monkeypatch.setattr(train, "train_step", train_step)


def write_images(path, broken=0, **classes):
    """folder: data with `classes` = images of each class in train, one in val; the first `broken` are no images."""
    for split in ("train", "val"):
        for name, n in classes.items():
            Path(path, split, name).mkdir(parents=True)
            pictures = coloured(n if split == "train" else 1, seed=len(name))[0].permute(0, 2, 3, 1).numpy()
            for i, picture in enumerate(pictures):
                Image.fromarray(picture).save(Path(path, split, name, f"{i}.png"))
    for i in range(broken):
        Path(path, "train", next(iter(classes)), f"{i}.png").write_text("no image")


@contextlib.contextmanager
def stand_in():
    """What the fixtures `small`, `shallow` and `no_figures` do, for fixtures of a whole session."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "photos", small_photos)
        patch.setitem(vit.ARCHS, "vit_micro4", vit.ARCHS["vit_micro4"] | {"depth": BLOCKS})
        patch.setattr(train, "draw_figures", lambda *_: None)
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def one_line(capsys):
    """The error that was printed, which is one line."""
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    return errors[0]


class Enough(BaseException):
    """All that a test wants has happened."""


def record_steps(monkeypatch, command, n=1):
    """What happened in the first n steps of a run, which ends then: a list; "refused" if it did not begin.

    Of each step: step, config, dataset, model, optimizer, average; images, targets: as they came from the data; calls:
    (args, output) of the model; compared: (logits, targets) of the cross-entropy; before, after: the weights by name;
    gradients: what the optimizer got; rates: the learning rate of each weight; metrics: floats. A classifier's head is
    filled before the first step: at zero, its logits would say nothing.
    """
    steps, now = [], SimpleNamespace(compared=[])
    original, cross_entropy = train.train_step, F.cross_entropy

    def compare(logits, targets, **options):
        now.compared.append((logits.detach(), targets))
        return cross_entropy(logits, targets, **options)

    def train_step(config, dataset, model, wrapped_model, average, optimizer, step, images, targets):
        if step == 0 and isinstance(getattr(model, "head", None), nn.Linear):
            nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(7))
        names = {id(p): name for name, p in model.named_parameters()}
        vars(now).update(step=step, config=config, dataset=dataset, model=model, optimizer=optimizer, average=average)
        vars(now).update(images=images.clone(), targets=targets.clone(), calls=[], compared=[], gradients={}, rates={})

        def look(optimizer, *_):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    now.gradients[names[id(p)]], now.rates[names[id(p)]] = p.grad.clone(), group["lr"]

        hooks = [
            model.register_forward_hook(lambda module, args, out: now.calls.append((args, out))),
            optimizer.register_step_pre_hook(look),
        ]
        now.before = {name: p.detach().clone() for name, p in model.named_parameters()}
        metrics = original(config, dataset, model, wrapped_model, average, optimizer, step, images, targets)
        now.after = {name: p.detach().clone() for name, p in model.named_parameters()}
        now.metrics = {name: float(value) for name, value in metrics.items()}
        for hook in hooks:
            hook.remove()
        steps.append(SimpleNamespace(**vars(now)))
        if len(steps) == n:
            raise Enough
        return metrics

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", train_step)
        patch.setattr(F, "cross_entropy", compare)
        try:
            code = run(command)
        except Enough:
            return steps
    return "refused" if code == 2 else steps
