"""What train.py promises: the schedule and the step of the papers, runs that repeat and resume bit for bit, a run
folder that says everything, and one line for whatever goes wrong on the way.

Most tests call `train.main` in this process, on 24 small images; the slow ones at the end run the program itself. They
follow train.py from top to bottom. What each flag does is in test_flags.py, what it is by default in test_recipes.py.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
import vit
from downstream import probes
from engine import config as flags
from engine import distributed, report
from related import resnet
from tests.engine.runs import (
    BLOCKS,
    MICRO,
    PLAIN,
    STILL,
    Enough,
    checkpoint,
    coloured,
    different,
    log,
    one_line,
    run,
    settings,
    small_photos,
    watch,
    write_images,
)
from tests.engine.test_weights import google_file

pytestmark = pytest.mark.usefixtures("leave_no_trace")
ROOT = Path(train.__file__).parent


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# ---------------------------------------------------------------------------------------------
# The optimizer, and its learning rate
# ---------------------------------------------------------------------------------------------


def groups_by_name(command):
    """For every trainable parameter: weight decay, learning rate over that of the head."""
    config, dataset = settings(command)
    model, task = train.build(config, dataset), train.TASKS[config.task]
    decays = (config.weight_decay, config.layer_decay)
    optimizer = train.build_optimizer(model, config.optimizer, config.lr[0], *decays, task.betas, task.spared)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == sum(len(group["params"]) for group in optimizer.param_groups), "a parameter stands twice"
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert groups.keys() == {id(p) for p in trainable.values()}, "trainable ones, all of them and no others"
    return {name: (groups[id(p)]["weight_decay"], groups[id(p)]["scale"]) for name, p in trainable.items()}


MATRICES = ("proj.weight", "qkv.weight", "fc1.weight", "fc2.weight", "head.weight", "embed.weight", "pred.weight")


@pytest.mark.parametrize(
    "command",
    ["--arch vit_micro4 --pos-embed 1d", "--task hpm --arch vit_micro4", "--task mae --arch vit_micro4",
     "--task mpp --arch vit_micro4 --pos-embed 2d", "--arch vit_micro4 --pos-embed relative",
     "--task finetune --arch vit_micro4 --init init.pt --pool cls"],
)  # fmt: skip
def test_weight_decay_is_on_matrices_alone(command, small, shallow):
    """None on biases and norms. None on tokens and positions either, in fine-tuning (timm's no_weight_decay, which
    MAE's and HPM's main_finetune.py ask) and where Google's code trains; but pre-training in MAE's and HPM's code
    decays all but vectors and biases (timm's add_weight_decay), the class token and the mask token with them."""
    torch.save(vit.create("vit_micro4", 32, 0).state_dict(), "init.pt")
    found = groups_by_name(f"{command} --img-size 32 --weight-decay 0.3")
    decayed = {name for name, (decay, _) in found.items() if decay == 0.3}
    tokens = {"student.encoder.cls_token", "student.mask_token"} if "hpm" in command or "mae" in command else set()
    assert decayed == {name for name in found if name.endswith(MATRICES)} | tokens
    assert {found[name][0] for name in found.keys() - decayed} == {0.0}
    assert any("token" in name for name in found), "the class token or the mask token is trained"


@pytest.mark.parametrize("positions", ["", "--pos-embed 2d", "--pos-embed relative"])
def test_layer_decay_slows_what_is_far_from_the_head(positions, small, monkeypatch):
    """By hand for two blocks: head and last norm 1, block 1 0.5, block 0 0.25, before the blocks 0.125."""
    monkeypatch.setitem(vit.ARCHS, "vit_micro4", dict(patch_size=4, dim=32, depth=2, num_heads=4))
    found = groups_by_name(f"{MICRO} --layer-decay 0.5 --pool mean {positions}")
    by_hand = {"patch_embed": 1 / 8, "cls_token": 1 / 8, "fc_norm": 1.0, "head": 1.0}
    before = {"": ("pos_embed",), "--pos-embed 2d": ("row_pos_embed", "column_pos_embed")}
    by_hand |= dict.fromkeys(before.get(positions, ()), 1 / 8)
    by_hand |= {"blocks.0": 1 / 4, "blocks.1": 1 / 2}
    parts = {name: ".".join(name.split(".")[: 2 if name.startswith("blocks") else 1]) for name in found}
    assert {name: scale for name, (_, scale) in found.items()} == {name: by_hand[part] for name, part in parts.items()}
    assert set(parts.values()) == by_hand.keys()


def test_layers_are_numbered_from_the_image_to_the_head():
    """Also what only some models have: CLIP's first norm, a hybrid's ResNet, blocks beyond the ninth."""
    names = {
        "patch_embed.backbone.stem.conv.weight": 0, "norm_pre.weight": 0, "cls_token": 0, "row_pos_embed": 0,
        "column_pos_embed": 0, "pos_embed": 0, "blocks.0.norm1.bias": 1, "blocks.11.attn.relative.pos_embed": 12,
        "norm.weight": 13, "fc_norm.bias": 13, "pre_logits.fc.weight": 13, "head.bias": 13,
    }  # fmt: skip
    assert {name: train.layer_number(name, 12) for name in names} == names


def test_the_optimizers_are_the_papers(steps_of):
    """AdamW: ViT β = (0.9, 0.999), MAE and HPM (0.9, 0.95) in pre-training; the ViT paper fine-tunes with SGD."""
    torch.save(vit.create("vit_micro4", 16, 3).state_dict(), "init.pt")
    for task, beta in {"supervised": 0.999, "mpp": 0.999, "mae": 0.95, "hpm": 0.95, "finetune": 0.999}.items():
        optimizer = steps_of(f"{MICRO} --task {task} --init init.pt --lr 0.02")[0].optimizer
        assert type(optimizer) is torch.optim.AdamW
        assert {(*group["betas"], group["eps"]) for group in optimizer.param_groups} == {(0.9, beta, 1e-8)}, task
        assert (optimizer.defaults["lr"], optimizer.defaults["fused"]) == (0.02, True)
    optimizer = steps_of(f"{MICRO} --task finetune --init init.pt --optimizer sgd --lr 0.02")[0].optimizer
    assert type(optimizer) is torch.optim.SGD
    assert {(g["momentum"], g["dampening"], g["nesterov"]) for g in optimizer.param_groups} == {(0.9, 0, False)}
    assert (optimizer.defaults["lr"], optimizer.defaults["fused"]) == (0.02, True), "one kernel for all parameters"
    found = [(group["weight_decay"], group["scale"]) for group in optimizer.param_groups]
    assert found == [(0.0, 1.0)], "ViT, table 4: no weight decay, one learning rate"


def learning_rate_loops(steps, peak, warmup, decay):
    """The learning rate of every step: up in equal parts, then down from the peak."""
    rates = []
    for step in range(steps):
        if step < warmup:
            rates.append(sum(peak / warmup for _ in range(step + 1)))
        elif decay == "linear":
            rates.append(peak - (step - warmup) * peak / (steps - warmup))
        else:
            rates.append(peak * math.cos(math.pi / 2 * (step - warmup) / (steps - warmup)) ** 2)
    return rates


@pytest.mark.equation("learning rate")
@pytest.mark.exercise("learning_rate")
@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize(("steps", "warmup"), [(10, 3), (10, 0), (7, 1), (5, 5), (3, 8), (1, 0), (1, 1)])
def test_the_learning_rate_warms_up_and_decays(steps, warmup, decay):
    """ViT, appendix B.1. (1 + cos x) / 2 = cos²(x / 2)."""
    for step, oracle in enumerate(learning_rate_loops(steps, 0.3, warmup, decay)):
        rate = train.learning_rate(step, steps, 0.3, warmup, decay)
        part = "warm-up" if step < warmup else f"{decay} decay"
        assert rate == pytest.approx(oracle, rel=1e-9, abs=1e-12), (
            f"{part}: step {step} of {steps} has {rate:.6g}, {oracle:.6g} is due, for a peak of 0.3 and warmup={warmup}"
        )


@pytest.mark.equation("learning rate")
@pytest.mark.exercise("learning_rate")
@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_end_points_of_the_schedule(decay):
    """A first step of 0 would be wasted; the peak is reached once warm-up ends; 0 would come at `steps`."""
    rate = [train.learning_rate(step, 100, 2.0, 10, decay) for step in range(101)]
    assert rate[0] == pytest.approx(0.2), "the first step of 10 that warm up to 2.0 has a tenth of that"
    assert rate[9] == pytest.approx(2.0), "the last step of warm-up has the peak"
    assert rate[10] == pytest.approx(2.0), "and so has the first one after it"
    assert rate[55] == pytest.approx(1.0), "half way down"
    assert rate[100] == pytest.approx(0.0, abs=1e-12), "0 would come at `steps`"
    assert all(a > b for a, b in itertools.pairwise(rate[10:])), "it only falls after warm-up"


@pytest.mark.equation("learning rate")
@pytest.mark.exercise("learning_rate")
def test_the_learning_rate_decays_by_cosine_unless_told_otherwise():
    assert train.learning_rate(25, 100, 1.0, 0) == pytest.approx(math.cos(math.pi / 8) ** 2)


@pytest.mark.parametrize("batch", [4, 6])
def test_a_schedule_follows_the_step(batch, small, shallow):
    """By hand at step 6 of 12, with 24 images: α half way, m by the epoch, the learning rate by its formula."""
    config, dataset = settings(
        f"{MICRO} --task hpm --steps 12 --lr 0.3 --warmup 2 --alpha 0.2,0.8 --batch-size {batch}"
    )
    now = train.schedule(config, 6, 24)
    assert now == pytest.approx(
        dict(lr=0.3 * math.cos(math.pi / 2 * 4 / 10) ** 2, alpha=0.5, momentum=0.999 + 0.0009 * (6 * batch / 24) / 100),
        rel=1e-12,
    )


@pytest.mark.parametrize(
    ("command", "last"),
    [("--task finetune", 1e-6), ("--task finetune --optimizer sgd", 0.0), ("--task supervised", 0.0),
     ("--task hpm", 0.0), ("--task mae", 0.0), ("--task mpp", 0.0)],
)  # fmt: skip
def test_fine_tuning_with_adamw_ends_at_a_learning_rate_of_1e_6(command, last, small, shallow):
    """`--min_lr` of MAE's and HPM's main_finetune.py; their pre-training, and ViT's recipes, go to 0. Where no peak is
    below it, and the peak stays what it is."""
    torch.save(vit.create("vit_micro4", 16, 0).state_dict(), "init.pt")
    init = "--init init.pt" if "finetune" in command else ""
    config, _ = settings(f"{STILL} --batch-size 4 --steps 100 --warmup 10 --lr 0.01 {command} {init}")
    rates = [train.schedule(config, step, 24)["lr"] for step in range(101)]
    oracle = [last + rate for rate in learning_rate_loops(100, 0.01 - last, 10, "cosine")]
    assert rates[:100] == pytest.approx(oracle, rel=1e-9)
    assert (rates[9], rates[10]) == pytest.approx((0.01, 0.01), rel=1e-9)
    assert rates[100] == pytest.approx(last, abs=1e-12)
    small_one = dataclasses.replace(config, lr=(1e-9,))
    assert {train.schedule(small_one, step, 24)["lr"] <= 1e-9 for step in range(100)} == {True}


# ---------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------


def prepare_step(command, images_per_batch=8):
    """A step in float64: a function of its number, and the rows of the batch, that returns metrics; and the model."""
    config, dataset = settings(f"{MICRO} --batch-size {images_per_batch} --optimizer sgd --lr 0.1 {command}")
    torch.manual_seed(0)
    model = train.build(config, dataset).double()
    if config.task in ("supervised", "finetune"):
        torch.nn.init.normal_(model.head.weight)  # it starts at 0: no gradient would reach the encoder
    images, targets = coloured(images_per_batch, seed=3)
    images = data.normalise(images, *PLAIN).double()
    decays = (config.weight_decay, config.layer_decay)
    optimizer = train.build_optimizer(model, config.optimizer, 0.1, *decays, train.TASKS[config.task].betas)

    def step(number, rows=slice(None), wrapped_model=model):
        batch = images[rows], targets[rows]
        return train.train_step(config, dataset, model, wrapped_model, None, optimizer, number, *batch)

    return step, model


def gradients_of(command):
    """The gradient that the optimizer gets, by name, and the metrics, of a step in float64."""
    step, model = prepare_step(command)
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.optim.SGD,
            "step",
            lambda _: seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}),
        )
        metrics = step(1)
    return seen, metrics


@pytest.mark.parametrize(
    "task", ["supervised", "supervised --mixup 0.8 --smoothing 0.1 --erasing 0.5", "mpp", "mae --mask block", "hpm"]
)
@pytest.mark.parametrize("size", [2, 3])
def test_gradients_of_micro_batches_add_up_to_that_of_the_batch(task, size, small, shallow, monkeypatch):
    """The mean over a batch is the weighted mean of the means over its parts, here 2+2+2+2 or 3+3+2 images; clipping
    comes after the sum.

    In float64; HPM's losses are computed in float32, so that gradients of a few hundred terms differ by some 1e-6 of
    the largest one. Relative losses are means over pairs, of which a part has as many as its images have: no two
    patches of these images have the same loss.
    """
    monkeypatch.setattr(flags, "check_processes", lambda *_: None)  # 3 does not divide 8
    whole, metrics = gradients_of(f"--task {task}")
    parts, same_metrics = gradients_of(f"--task {task} --micro-batch {size}")
    scale = max(g.abs().max() for g in whole.values())
    assert scale > 1e-3
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-5 * scale.item(), rtol=0, msg=name)
    assert metrics.keys() == same_metrics.keys()
    for name in metrics.keys() - {"correlation"}:  # ranks jump
        assert same_metrics[name].item() == pytest.approx(metrics[name].item(), rel=1e-5), name


def test_gradients_are_averaged_once_a_step(small, shallow):
    """DistributedDataParallel does so in every backward pass but those inside no_sync: here after the last of four."""
    step, model = prepare_step("--micro-batch 2")
    events = []

    class Wrapped:
        def __call__(self, images):
            events.append("forward")
            return model(images)

        @contextlib.contextmanager
        def no_sync(self):
            events.append("alone")
            yield
            events.append("together")

    step(1, wrapped_model=Wrapped())
    assert events == ["alone", "forward", "together"] * 3 + ["forward"]


CLIPPED = {("supervised", "adamw"): 1.0, ("supervised", "sgd"): 1.0, ("finetune", "sgd"): 1.0}
CLIPPED |= {("hpm", "adamw"): 5.0, ("hpm", "sgd"): 5.0}


@pytest.mark.parametrize("task", ["supervised", "finetune", "mpp", "mae", "hpm", "linear"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_gradient_is_clipped_where_the_authors_clip(task, optimizer, steps_of, monkeypatch):
    """ViT, table 3 and 4: to norm 1, in training from scratch and in its own fine-tuning. HPM's code: to norm 5
    (util/misc.py, the default that its engine_pretrain.py leaves as it is), in pre-training alone; MAE's does not.
    Images are blown up, so that gradients are large."""
    loud = small_photos()
    for split in loud.train, loud.test:
        split.std = (0.001,) * 3
    monkeypatch.setattr(data, "photos", lambda size: loud)
    torch.save(vit.create("vit_micro4", 16, 0).state_dict(), "init.pt")
    init = {"finetune": "--init init.pt --mixup 0 --cutmix 0", "linear": "--init init.pt"}.get(task, "")
    step = steps_of(f"{MICRO} --task {task} --optimizer {optimizer} {init}")[0]
    norm = math.sqrt(sum(g.double().square().sum().item() for g in step.gradients.values()))
    largest = CLIPPED.get((task, optimizer))
    assert step.metrics["grad_norm"] > 1.1 * (largest or 1.0)
    assert norm == pytest.approx(largest or step.metrics["grad_norm"], rel=1e-4)


def test_a_small_gradient_is_not_stretched_to_norm_1(small, shallow):
    """Near the optimum gradients are small, and so are steps: with smoothing 0.9 a head of zeros is nearly right."""
    step, model = prepare_step("--smoothing 0.9 --weight-decay 0")
    torch.nn.init.zeros_(model.head.weight)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    metrics = step(1)
    moved = math.sqrt(sum((p - before[name]).square().sum().item() for name, p in model.named_parameters()))
    assert metrics["grad_norm"] < 0.9
    assert moved == pytest.approx(0.1 * metrics["grad_norm"].item(), rel=1e-6), "after one step of warm-up"


def test_gradients_do_not_linger(small, shallow):
    """A second step starts from none."""
    step, model = prepare_step("")
    step(0)
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_metrics_carry_no_graph(small, shallow):
    """They are kept until they are read, many steps later."""
    assert not any(value.requires_grad for value in prepare_step("--task hpm")[0](1).values())


def zeros_of_dropout(step, number):
    """Which outputs of the MLPs dropout puts to zero in a step."""
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(out == 0) if isinstance(module, vit.MLP) else None
    )
    step(number)
    hook.remove()
    return torch.stack(seen)


def test_dropout_differs_between_steps_and_processes_and_repeats(small, shallow, monkeypatch):
    """Its numbers depend on the seed, the step and the process: a step that is made again drops the same."""
    step, _ = prepare_step("--dropout 0.5")
    again, _ = prepare_step("--dropout 0.5")
    other_seed, _ = prepare_step("--dropout 0.5 --seed 1")
    first, second = zeros_of_dropout(step, 0), zeros_of_dropout(step, 1)
    assert 0.4 < first.double().mean() < 0.6
    torch.rand(3)  # whatever else happens meanwhile
    assert torch.equal(zeros_of_dropout(again, 1), second)
    monkeypatch.setattr(distributed, "RANK", 1)
    monkeypatch.setattr(distributed, "shard", lambda batch_size: slice(0, batch_size))
    other_process = zeros_of_dropout(again, 1)
    monkeypatch.undo()
    for other in (second, zeros_of_dropout(other_seed, 0), other_process):
        assert (first != other).double().mean() > 0.4, "independent: they agree on half of the places"
    assert (second != other_process).double().mean() > 0.4


def test_dropout_has_random_numbers_of_its_own(small, shallow):
    """Not those that order, crops, blends or masks of any step are made of."""
    step, _ = prepare_step("")
    for number in range(8):
        step(number)
        others = [data.generator(0, purpose, *key) for purpose in range(6) for key in ((0,), (1,), (number,))]
        assert torch.initial_seed() not in {generator.initial_seed() for generator in others}


@pytest.mark.parametrize(
    "command", ["--mixup 0.8 --cutmix 1 --erasing 0.5", "--task hpm", "--task mpp", "--task mae --mask block"]
)
def test_two_processes_see_the_rows_of_the_batch_that_one_sees(command, small, shallow, monkeypatch):
    """Also the same masks and blends: numbers are drawn for the whole batch."""

    def inputs(rank, processes):
        monkeypatch.setattr(distributed, "RANK", rank)
        monkeypatch.setattr(distributed, "WORLD_SIZE", processes)
        seen = []
        step, model = prepare_step(f"{command} --micro-batch 2")
        model.register_forward_pre_hook(lambda module, args: seen.append([v for v in args if torch.is_tensor(v)]))
        step(1, distributed.shard(8))
        return [torch.cat(parts) for parts in zip(*seen, strict=True)]

    whole, parts = inputs(0, 1), [inputs(rank, 2) for rank in (0, 1)]
    for one, halves in zip(whole, zip(*parts, strict=True), strict=True):
        assert len(one) == 8
        assert torch.equal(one, torch.cat(halves))


def test_the_loop_asks_for_its_rows_of_every_batch(steps_of, monkeypatch):
    """The second of two processes gets the second half, with the same order and the same crops."""
    whole = steps_of(f"{MICRO} --erasing 0.5", n=2)
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(distributed, "RANK", 1)
    monkeypatch.setattr(distributed, "start", lambda device: None)
    monkeypatch.setattr(distributed, "from_rank0", lambda call: call())
    monkeypatch.setattr(distributed, "wrap_model", lambda model, *_: model)
    monkeypatch.setattr(distributed, "all_reduce_max", lambda *flags: flags)
    half = steps_of(f"{MICRO} --erasing 0.5 --micro-batch 2 --out half", n=1)
    assert torch.equal(half[0].images, whole[0].images[2:])
    assert torch.equal(half[0].calls[0][0][0], whole[0].calls[0][0][0][2:]), "what the model saw"


def test_crops_of_the_recipe_reach_the_batches(steps_of, monkeypatch):
    """Boxes of photographs, resized; mirrored images of Fashion-MNIST; shifts by up to 4 pixels of CIFAR's, mirrored or
    not. Every image is looked for among all that could be made so of all training images."""

    def images_of(name):
        monkeypatch.setattr(data, "fashion_mnist", lambda *_: small_photos()._replace(name=name))
        monkeypatch.setattr(data, "cifar", lambda *_: small_photos()._replace(name=name))
        return steps_of(f"{MICRO} --data {name} --batch-size 12 --out {name}")[0].images

    own = data.normalise(small_photos().train.images, *PLAIN)
    black = -2.0  # of 0, with these statistics
    shifts = torch.nn.functional.pad(own, (4, 4, 4, 4), value=black).unfold(2, 16, 1).unfold(3, 16, 1)
    shifts = shifts.permute(2, 3, 0, 1, 4, 5)  # (9, 9, 24, 3, 16, 16)

    def found(images, shifts):
        return [
            [bool((kind == image).flatten(3).all(dim=3).any()) for kind in (shifts, shifts.flip(-1))]
            for image in images
        ]

    still, mirrored = zip(*found(images_of("fashion-mnist"), shifts[4:5, 4:5]), strict=True)
    assert all(a != b for a, b in zip(still, mirrored, strict=True))
    assert any(still)
    assert any(mirrored)
    images = images_of("cifar10")
    assert all(any(pair) for pair in found(images, shifts))
    assert not all(any(pair) for pair in found(images, shifts[4:5, 4:5])), "some are shifted"
    assert not any(any(pair) for pair in found(steps_of(f"{MICRO} --out photos")[0].images, shifts)), "resized"


STEPS = [
    "--mixup 0.8 --cutmix 1 --erasing 0.5 --smoothing 0.1 --dropout 0.1 --drop-path 0.1 --polyak 0.9",
    "--task mpp",
    "--task mae --mask block --target norm-pixels",
    "--task mae --mask grid --target hog",
    "--task hpm --alpha 0.5,1",
    "--task hpm --target ema --predictor-loss absolute",
]


@pytest.mark.parametrize("command", STEPS)
def test_the_host_does_not_wait_for_the_device_in_a_step(command, small, waits, monkeypatch):
    """From the batch to the teacher's update, two micro-batches. Else a GPU stands still while the host catches up.

    The device "meta" computes shapes alone: there are no values to wait for, so whatever reads one fails. And a copy
    from the host has to be one that it need not wait for, out of pinned memory. That of `torch.tensor` is not.
    """
    meta, generator, tensor = torch.device("meta"), data.generator, torch.tensor
    monkeypatch.setitem(vit.ARCHS, "vit_micro4", vit.ARCHS["vit_micro4"] | {"depth": 1})

    def tensor_on_host(values, device="cpu", **options):
        assert torch.device(device).type == "cpu"
        return tensor(values, **options)

    monkeypatch.setattr(data, "generator", lambda *key, device="cpu": generator(*key))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(probes, "autocast", lambda device, dtype: contextlib.nullcontext())
    config, dataset = settings(f"{MICRO} {command} --batch-size 8 --micro-batch 4")
    model = train.build(config, dataset).to(meta)
    average = train.build(config, dataset).to(meta) if config.polyak else None
    config = dataclasses.replace(config, device="meta")
    optimizer = SimpleNamespace(param_groups=[], step=lambda: None, zero_grad=model.zero_grad)  # no kernels on meta
    batches = dataset.train.train_batches(config.img_size, 8, range(2), config.seed, config.crop, meta)
    next(batches)  # moves the images and what else stays on the device
    monkeypatch.setattr(torch, "tensor", tensor_on_host)
    with waits() as seen:
        metrics = train.train_step(config, dataset, model, model, average, optimizer, 1, *next(batches))
    assert seen.reads == seen.copies == []
    assert {value.device for value in metrics.values()} == {meta}, "read already"


@pytest.mark.parametrize("batch", [24, 12])
def test_the_teacher_is_the_moving_average_of_the_students_steps(batch, steps_of):
    """HPM, momentum update: θ_t ← m θ_t + (1 - m) θ_s after every step, from θ_t = θ_s, m = 0.999 + 0.0009 e / 100.

    In float32 like the code: three steps, each rounded once or twice, of weights below 2.
    """
    steps = steps_of(f"{MICRO} --task hpm --batch-size {batch} --optimizer sgd --lr 0.5 --warmup 0", n=3)
    start = steps[0].before
    names = [name.removeprefix("teacher.") for name in start if name.startswith("teacher.")]
    assert any(name.startswith("encoder") for name in names)
    assert any(name.startswith("loss_predictor") for name in names)
    assert not any(name.startswith("decoder.") for name in names), "the teacher reconstructs nothing"
    moved = 0.0
    for name in names:
        teacher = first = start[f"student.{name}"].numpy()
        assert np.array_equal(start[f"teacher.{name}"], first), "the teacher starts as the student"
        for t, step in enumerate(steps):
            m = 0.999 + 0.0009 * (t * batch / 24) / 100
            teacher = teacher + np.float32(1 - m) * (step.after[f"student.{name}"].numpy() - teacher)
        np.testing.assert_allclose(steps[-1].after[f"teacher.{name}"], teacher, rtol=0, atol=5e-7, err_msg=name)
        moved = max(moved, np.abs(teacher - first).max())
    assert moved > 1e-4, "the teacher did not move"


def test_polyak_averages_the_weights_of_all_steps(small, shallow, no_figures, monkeypatch):
    """θ̄ ← m θ̄ + (1 - m) θ, m no larger than (1 + t) / (10 + t); θ̄ is tested and saved, θ trains on.

    Each of 6 steps rounds weights below 1 by 6e-8.
    """
    weights, tested = [], []
    watch(monkeypatch, lambda step, model, config: weights.append(model.head.weight.detach().double().clone()))
    evaluate = lambda model, *_: tested.append(model.head.weight.clone()) or {"top1": 0.0}  # noqa: E731
    monkeypatch.setattr(probes, "evaluate", evaluate)
    assert run(f"{MICRO} --steps 6 --polyak 0.2 --lr 0.1 --out run") == 0
    average = torch.zeros_like(weights[0])  # the head starts at zero
    for t, theta in enumerate(weights):
        m = min(0.2, (1 + t) / (10 + t))
        average = m * average + (1 - m) * theta
    torch.testing.assert_close(tested[-1].double(), average, atol=1e-6, rtol=0)
    torch.testing.assert_close(checkpoint("run")["model"]["head.weight"].double(), average, atol=1e-6, rtol=0)
    assert torch.equal(checkpoint("run")["raw_model"]["head.weight"].double(), weights[-1])


def test_a_linear_probe_trains_the_head_alone(pretrained, steps_of):
    """D * classes weights and as many biases as classes."""
    step = steps_of(f"{MICRO} --task linear --init {pretrained['hpm']}")[0]
    assert step.gradients.keys() == {"head.weight", "head.bias"}


def test_the_means_of_many_steps_are_read_at_once():
    """Over steps and processes; the order of the names stays."""
    pending = [{"loss": torch.tensor(float(step)), "grad_norm": torch.tensor(1.0)} for step in range(11, 16)]
    assert list(train.average_metrics(pending, 15).items()) == [("loss", 13.0), ("grad_norm", 1.0)]


@pytest.mark.parametrize("bad", [11, 13, 15])
def test_the_first_bad_step_of_many_is_named(bad):
    """Losses are read every so many steps, so that the device need not wait; here those of the steps 11 to 15."""
    pending = [{"loss": torch.tensor(float(step)), "grad_norm": torch.tensor(1.0)} for step in range(11, 16)]
    for values in pending[bad - 11 :]:
        values["grad_norm"] = torch.tensor(math.inf)
    with pytest.raises(FloatingPointError, match=rf"^step {bad} is not finite: loss {bad}\.0, grad_norm inf$"):
        train.average_metrics(pending, 15)


def test_means_are_over_all_processes(monkeypatch):
    """The sum over two processes, halved."""
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda table: table.add_(10))
    assert train.average_metrics([{"loss": torch.tensor(2.0)}, {"loss": torch.tensor(4.0)}], 2) == {"loss": 6.5}


# ---------------------------------------------------------------------------------------------
# The loop: what happens after which step
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def loop(small, shallow, no_figures, monkeypatch):
    """loop(command, seconds=1, until=None): the loop with steps that do nothing but take `seconds`, to the end or
    `until` as many are done: which of them were logged, scored, saved."""

    def loop(command, seconds=1.0, until=None):
        clock, scored, saved = [0.0], [], []

        def train_batches(split, size, batch_size, steps, *rest):
            yield from ((torch.zeros(batch_size, 1), torch.zeros(batch_size)) for _ in steps[:until])

        def train_step(*given):
            clock[0] += seconds
            return {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(1.0)}

        monkeypatch.setattr(data.InMemory, "train_batches", train_batches)
        monkeypatch.setattr(train, "train_step", train_step)
        monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
        monkeypatch.setattr(probes, "evaluate", lambda *_: scored.append(round(clock[0] / seconds)) or {"top1": 0.0})
        monkeypatch.setattr(train, "save_checkpoint", lambda *given: saved.append(given[-1]["step"]))
        Path("out").mkdir(exist_ok=True)
        Path("out/log.jsonl").unlink(missing_ok=True)
        config, dataset = settings(command)
        assert train.train(config, train.build(config, dataset), dataset, Path("out"), None, {}) == 0
        return [line["step"] for line in log("out")], scored, saved

    return loop


def test_a_short_run_is_scored_once_an_epoch(loop):
    """24 images in batches of 4: an epoch has 6 steps. The last step counts too."""
    logged, scored, saved = loop(f"{MICRO} --steps 15")
    assert (logged, scored, saved) == (list(range(1, 16)), [6, 12, 15], [6, 12, 15])


def test_an_epoch_that_is_no_whole_number_of_steps_is_rounded_up(loop):
    _, scored, _ = loop(f"{MICRO} --steps 11 --batch-size 5")
    assert scored == [5, 10, 11]


def test_a_long_run_is_scored_ten_times_and_logged_a_hundred_times(loop):
    logged, scored, _ = loop(f"{MICRO} --steps 300")
    assert scored == list(range(30, 301, 30))
    assert logged == list(range(3, 301, 3))


def test_a_very_long_run_is_logged_every_50_steps(loop):
    assert loop(f"{MICRO} --steps 6000", until=180)[0] == [50, 100, 150]


def test_a_run_is_saved_every_ten_minutes_between_evaluations(loop):
    """Whatever is logged: steps of 61 s, of which every third is."""
    logged, _, saved = loop(f"{MICRO} --steps 300", seconds=61, until=50)
    assert saved == [10, 20, 30, 40, 50]
    assert logged == sorted({*range(3, 50, 3), *saved})
    assert loop(f"{MICRO} --steps 300", until=100)[2] == [30, 60, 90], "else after evaluations alone"


def test_the_log_tells_seconds_and_images_per_second_without_evaluation(loop):
    """Steps of 2 s with 4 images."""
    loop(f"{MICRO} --steps 12", seconds=2)
    lines = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in lines] == [2.0 * step for step in range(1, 13)]
    assert {line["images_per_second"] for line in lines} == {2.0}
    assert [line["epoch"] for line in lines] == pytest.approx([step / 6 for step in range(1, 13)])


# ---------------------------------------------------------------------------------------------
# The same run again, and the same run in two parts
# ---------------------------------------------------------------------------------------------

EVERYTHING = "--dropout 0.1 --drop-path 0.2 --mixup 0.8 --cutmix 1 --erasing 0.5 --smoothing 0.1 --micro-batch 2"
HPM = "--task hpm --micro-batch 2 --alpha 0.2,0.9"


@pytest.mark.parametrize("command", [EVERYTHING, HPM])
def test_the_same_command_gives_the_same_weights_bit_for_bit(command, steps_of):
    """And another seed gives others: first weights, order, crops, blends or masks."""
    one, again, other = (steps_of(f"{MICRO} {command} --lr 0.01 --seed {seed}", n=2) for seed in (5, 5, 6))
    assert not different(one[-1].after, again[-1].after)
    assert different(one[0].before, other[0].before)
    assert not torch.equal(one[0].images, other[0].images)
    assert not torch.equal(one[0].calls[0][0][0], other[0].calls[0][0][0]), "what the model saw"
    if command == HPM:
        noise = [step.calls[0][0][1] for steps in (one, other) for step in steps]
        for some, others in itertools.combinations(noise, 2):
            assert not torch.equal(some, others), "each step of each run has masks of its own"


INTERRUPTED = [
    pytest.param(f"{EVERYTHING} --polyak 0.9", signal.SIGINT),
    pytest.param(HPM, signal.SIGTERM),
    pytest.param("--optimizer sgd", signal.SIGTERM, marks=pytest.mark.slow),
    pytest.param("--task mae --target ema", signal.SIGINT, marks=pytest.mark.slow),
    pytest.param("--task mpp", signal.SIGINT, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("command", "number"), INTERRUPTED)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    command, number, small, shallow, no_figures, monkeypatch, capsys
):
    """The step in progress is finished and saved. Resumed, the run ends with the same weights, bit for bit."""
    command, kept = f"{MICRO} --steps 9 --lr 0.01 {command}", {}

    def keep(step, model, config):
        kept[step] = {name: p.detach().clone() for name, p in model.named_parameters()}

    with monkeypatch.context() as patch:
        watch(patch, keep)
        assert run(f"{command} --out whole") == 0
    with monkeypatch.context() as patch:
        watch(patch, lambda step, *_: os.kill(os.getpid(), number) if step == 3 else None)
        capsys.readouterr()
        assert run(f"{command} --out parts") == 128 + number
    resume = "--resume --out parts"
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"python train.py {resume}"), "how to go on"

    saved = checkpoint("parts")
    assert saved["step"] == 4, "the step in progress is finished, and none after it begins"
    weights = saved.get("raw_model", saved["model"])
    assert not different({name: weights[name] for name in kept[3]}, kept[3])
    assert log("parts")[-1]["step"] == 4
    assert not Path("parts/result.json").exists()

    assert run(resume) == 0
    whole, parts = checkpoint("whole"), checkpoint("parts")
    assert parts["step"] == whole["step"] == 9
    assert not different(whole["model"], parts["model"])
    for one, other in zip(whole["optimizer"]["state"].values(), parts["optimizer"]["state"].values(), strict=True):
        assert not different(one, other)
    assert [line["step"] for line in log("parts")] == list(range(1, 10))
    assert log("parts")[4:] == log("whole")[4:]
    seconds = [json.loads(line)["seconds"] for line in Path("parts/log.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds), "the clock goes on too"


def test_what_was_logged_after_the_last_checkpoint_is_logged_again(small, shallow, no_figures, monkeypatch):
    """A run that was killed has a log that is ahead of last.pt, and half a line at its end; no line comes twice."""

    def kill(step, *_):
        if step == 8:
            raise Enough

    with monkeypatch.context() as patch:
        watch(patch, kill)
        with pytest.raises(Enough):
            run(f"{MICRO} --steps 12 --out run")
    assert checkpoint("run")["step"] == 6, "saved after each evaluation, one an epoch"
    assert log("run")[-1]["step"] == 8
    with Path("run/log.jsonl").open("a") as file:
        file.write('{"step": 9, "ep')
    assert run("--resume --out run") == 0
    assert [line["step"] for line in log("run")] == list(range(1, 13))


# What config.json said when gelu and lr had other types: of `--arch vit_micro4 --img-size 16 --steps 3 --batch-size 4`.
OLD_CONFIG = dict(
    task="supervised", arch="vit_micro4", data="photos", data_dir=None, labels=None, deduplicate=None, init=None,
    out="run", overwrite=False, resume=False, img_size=[16, 16], epochs=None, steps=3, batch_size=4, micro_batch=4,
    optimizer="adamw", lr=0.004, warmup=1, decay="cosine", polyak=0.0, layer_decay=1.0, weight_decay=0.05, dropout=0.0,
    drop_path=0.0, smoothing=0.0, erasing=0.0, mixup=0.0, cutmix=0.0, randaugment=0.0, pool="cls", pos_embed="1d",
    gelu="none", pixels="own", mask_ratio=0.75, mask="random", alpha=[0.0, 0.5], predictor_loss="none", target="pixels",
    target_weights=None, seed=0, device="cpu", dtype="float32", compile=False, checkpointing=False, fsdp=False,
    crop=[0.08, 1.0],
)  # fmt: skip


@pytest.mark.parametrize("flags_given", ["", "--lr 0.004", "--gelu none", "--gelu exact", "--dtype bfloat16"])
def test_a_run_of_an_older_version_goes_on(flags_given, steps_of):
    """Its config.json has "lr": 0.004 and "gelu": "none", where there are now [0.004] and "exact"."""
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps(OLD_CONFIG))
    step = steps_of(f"--resume --out run {flags_given}")[0]
    assert step.config.lr == (0.004,)
    assert step.config.gelu == "exact"
    assert step.config.alpha == (0.0, 0.5)
    assert step.config.crop == (0.08, 1.0)
    assert step.model.blocks[0].mlp.gelu not in ("tanh", "quick")
    assert step.rates["head.weight"] == pytest.approx(0.004), "one step of warm-up"
    assert step.config.dtype == ("bfloat16" if "bfloat16" in flags_given else "float32"), "what may change"


# ---------------------------------------------------------------------------------------------
# Models and the weights that they start from
# ---------------------------------------------------------------------------------------------


def test_fine_tuning_starts_from_the_students_encoder(pretrained, small, shallow):
    """Not from the teacher's, and the positions with it."""
    model = train.build(*settings(f"{MICRO} --task finetune --init {pretrained['hpm']}"))
    saved = torch.load(pretrained["hpm"], weights_only=True)["model"]
    own = dict(model.named_parameters())
    taken = [name for name in own if name.startswith(("patch_embed", "cls_token", "pos_embed", "blocks"))]
    assert len(taken) == 4 + 12 * BLOCKS
    assert not different({n: own[n] for n in taken}, {n: saved[f"student.encoder.{n}"] for n in taken})
    assert different({n: own[n] for n in taken[:3]}, {n: saved[f"teacher.encoder.{n}"] for n in taken[:3]})
    assert not own["head.weight"].any(), "the head starts at zero (ViT, section 3.2)"


@pytest.mark.parametrize(
    ("task", "command", "notes"),
    [
        ("hpm", MICRO, ["left at the initial value: fc_norm, head", "not used"]),
        ("hpm", "--arch vit_micro4 --img-size 32", ["sine-cosine positions computed for the 8x8 grid"]),
        ("supervised", "--arch vit_ti8 --img-size 32", ["positions interpolated from 2x2 to 4x4"]),
    ],
)
def test_fine_tuning_says_what_was_loaded_and_what_was_not(task, command, notes, pretrained, small, shallow, capsys):
    """The class token's norm is not used by a mean-pool head, which has a norm of its own. ViT, section 3.2: learned
    positions are interpolated; fixed ones are a formula."""
    train.build(*settings(f"--task finetune --init {pretrained[task]} {command}"))
    printed = capsys.readouterr().out
    assert all(note in printed for note in notes), printed
    assert ("positions" in printed) == ("32" in command), "the size is the same, or it is not"


def test_a_pretrained_student_hands_its_weights_to_the_teacher(small, shallow):
    """With --init the teacher starts as the student too, not as what the student was before it was loaded."""
    torch.save(vit.create("vit_micro4", 16, 0).state_dict(), "init.pt")
    model = train.build(*settings(f"{MICRO} --task hpm --init init.pt"))
    own, teacher = dict(model.student.named_parameters()), dict(model.teacher.named_parameters())
    assert not different({name: own[name] for name in teacher}, teacher)
    E = "patch_embed.proj.weight"
    assert torch.equal(own[f"encoder.{E}"], torch.load("init.pt", weights_only=True)[E])


def test_pre_training_goes_on_from_all_that_a_file_has(pretrained, small, shallow, capsys):
    """Encoder, decoder, mask token and loss predictor; MAE from HPM's file leaves the predictor out, and says so."""
    saved = torch.load(pretrained["hpm"], weights_only=True)["model"]
    model = train.build(*settings(f"{MICRO} --task hpm --init {pretrained['hpm']}"))
    assert not different(model.student.state_dict(), {n: saved[f"student.{n}"] for n in model.student.state_dict()})
    assert not different(model.teacher.state_dict(), {n: saved[f"student.{n}"] for n in model.teacher.state_dict()})
    assert not capsys.readouterr().out, "nothing was adapted, left or not used"
    model = train.build(*settings(f"{MICRO} --task mae --init {pretrained['hpm']}"))
    assert not different(model.student.state_dict(), {n: saved[f"student.{n}"] for n in model.student.state_dict()})
    assert capsys.readouterr().out == f"{pretrained['hpm']}: not used: loss_predictor\n"


def test_googles_weights_run_with_the_gelu_and_the_pixels_that_they_were_trained_with(small, shallow, no_figures):
    """Its JAX code approximates GELU by tanh and brings pixels to [-1, 1]; no file says so, but only its are .npz.

    And so does a run that starts from what such a run saved.
    """
    torch.manual_seed(0)
    np.savez("google.npz", **google_file(vit.create("vit_micro4", 16, 16, pos_embed="learned")))
    torch.save(vit.create("vit_micro4", 16, 16).state_dict(), "init.pt")
    images = torch.randn(2, 3, 16, 16)
    command = f"{MICRO} --task finetune --pool cls --pos-embed 1d --init"
    ours = train.build(*settings(f"{command} google.npz")).eval()
    for gelu, equal in (("tanh", True), ("exact", False)):
        model = vit.create("vit_micro4", 16, 16, pos_embed="learned", gelu=gelu).eval()
        vit.load_weights(model, "google.npz")
        assert torch.equal(ours.represent(images), model.represent(images)) == equal
    assert all(block.mlp.gelu not in ("tanh", "quick") for block in train.build(*settings(f"{command} init.pt")).blocks)
    assert settings(f"{command} init.pt")[1].train.mean == PLAIN[0]
    assert run(f"{command} google.npz --out first") == 0
    for weights in ("google.npz", "first/last.pt"):
        config, dataset = settings(f"{STILL} --task knn --init {weights}")
        assert (config.gelu, config.pixels) == ("tanh", "half")
        batch, _ = next(dataset.test.test_batches((16, 16), 10, torch.device("cpu")))
        assert torch.allclose(batch, dataset.test.images / 127.5 - 1, atol=1e-6)


def test_the_exact_gelu_of_an_older_run_is_still_that(small, shallow):
    """Beside the weights lies a config.json that calls it "none"."""
    Path("run").mkdir()
    torch.save(vit.create("vit_micro4", 16, 0).state_dict(), "run/last.pt")
    for said, gelu in (("none", "exact"), ("tanh", "tanh"), ("exact", "exact")):
        Path("run/config.json").write_text(json.dumps(OLD_CONFIG | dict(gelu=said, pixels="half")))
        config, _ = settings(f"{STILL} --task knn --init run/last.pt")
        assert (config.gelu, config.pixels) == (gelu, "half")
        assert settings(f"{STILL} --task knn --init run/last.pt --gelu tanh --pixels own")[0].gelu == "tanh"
    Path("run/config.json").write_text('{"gelu": "tanh"}')
    assert settings(f"{STILL} --task knn --init run/last.pt")[0].gelu == "exact", "no config.json of a run"


@pytest.mark.parametrize("arch", ["resnet50", "r26_vit_s32"])
def test_convolutional_archs_are_built_and_make_a_step(arch, small, no_figures, monkeypatch):
    """The baseline and the hybrid, here with a bottleneck in each of two stages; other tasks are slow, below."""
    tiny(arch, monkeypatch)
    assert run(f"--arch {arch} --img-size 32 --batch-size 2 --steps 1 --labels 3 --out first") == 0
    assert "top1" in json.loads(Path("first/result.json").read_text())


def tiny(arch, monkeypatch):
    key = "depths" if arch == "resnet50" else "backbone"
    small = {key: (1, 1)} | ({} if key == "depths" else {"depth": 1})
    monkeypatch.setitem(resnet.ARCHS, arch, resnet.ARCHS[arch] | small)
    if arch in resnet.RESNETS:
        monkeypatch.setitem(resnet.RESNETS, arch, resnet.RESNETS[arch] | small)


# ---------------------------------------------------------------------------------------------
# Tasks without a loop of their own
# ---------------------------------------------------------------------------------------------


def test_few_examples_are_as_many_of_each_class(pretrained, small, shallow, no_figures, monkeypatch, capsys):
    """The larger number is taken from the training images, and the smaller one from these."""
    for module in (flags, train, report):
        monkeypatch.setattr(module, "SHOTS", (2, 7))
    seen, few_shot = [], probes.few_shot
    monkeypatch.setattr(probes, "few_shot", lambda *given: (seen.append(given[0][1]), few_shot(*given))[1])
    assert run(f"{STILL} --task fewshot --init {pretrained['hpm']} --out run") == 0
    assert [labels.bincount().tolist() for labels in seen] == [[2, 2, 2], [7, 7, 7]]
    result = json.loads(Path("run/result.json").read_text())
    assert result.keys() >= {"top1_2shot", "top1_7shot"}
    assert f"{result['top1_2shot']:.2f} % top-1 from 2 images a class" in capsys.readouterr().out.splitlines()[-1]


def test_nearest_neighbours_compare_test_images_with_training_images(small, shallow, no_figures, monkeypatch):
    """Not the one with itself: features here are the labels, and of the test images wrong ones."""
    torch.save(vit.create("vit_micro4", 16, 0).state_dict(), "init.pt")

    def extract(model, split, *how):
        shift = 0 if len(split) == 24 else 1
        return torch.eye(3)[(split.labels + shift) % 3], split.labels

    monkeypatch.setattr(probes, "extract", extract)
    assert run(f"{STILL} --task knn --init init.pt --out run") == 0
    assert json.loads(Path("run/result.json").read_text())["top1"] == 0.0


def test_a_linear_probe_learns_colours(pretrained, small, shallow, no_figures, capsys):
    """Classes are colours, which a linear layer reads off even random features: chance is 33 %, and seeds 0 to 4 give
    100 %."""
    command = f"--arch vit_micro4 --img-size 16 --lr 0.5 --epochs 30 --batch-size 24 --init {pretrained['hpm']}"
    assert run(f"--task linear {command} --out run") == 0
    result = json.loads(Path("run/result.json").read_text())
    assert result["top1"] >= 70
    assert f"{result['top1']:.2f} %" in capsys.readouterr().out.splitlines()[-1]


def test_several_learning_rates_are_compared_on_held_out_training_images(
    small, shallow, no_figures, monkeypatch, capsys
):
    """ViT, appendix B.1.1: each trains on the rest, the best then on all; one that diverges has lost."""
    seen, top1, original = [], {0.1: 40.0, 0.2: 60.0, 0.3: 50.0}, train.train

    def loop(config, model, dataset, out, *rest):
        images = [split.images.flatten(1) for split in (dataset.train, dataset.test)]
        monkeypatch.setattr(
            probes, "evaluate", lambda *_: seen.append((config.lr, *images)) or {"top1": top1[config.lr[0]]}
        )
        return original(config, model, dataset, out, *rest)

    monkeypatch.setattr(train, "train", loop)
    monkeypatch.setattr(train, "HELD_OUT", 0.25)
    assert run(f"{MICRO} --optimizer sgd --lr 0.1,0.2,1e30,0.3 --out run") == 0
    assert [(lr, len(rest), len(held_out)) for lr, rest, held_out in seen] == [
        ((0.1,), 18, 6), ((0.2,), 18, 6), ((0.3,), 18, 6), ((0.2,), 24, 10),
    ]  # fmt: skip
    every = sorted(small_photos().train.images.flatten(1).tolist())
    assert sorted(torch.cat(seen[0][1:]).tolist()) == every, "held-out images are in no trial"
    assert json.loads(Path("run/config.json").read_text())["lr"] == [0.2]
    told = capsys.readouterr().out
    assert "learning rate 0.2: 60.00 % top-1 on 6 training images that were held out" in told
    assert re.search(r"learning rate 1e\+30: step \d is not finite", told)


def test_learning_rates_that_all_diverge_end_the_run(small, shallow, no_figures, capsys):
    assert run(f"{MICRO} --optimizer sgd --lr 1e30,1e31 --out run") == 1
    assert "all learning rates diverge" in one_line(capsys)


# ---------------------------------------------------------------------------------------------
# The run folder
# ---------------------------------------------------------------------------------------------

LOGGED = {"step", "epoch", "lr", "loss", "grad_norm", "seconds", "images_per_second"}
RUN_FOLDER = {  # command: what is logged besides, scores, panels in a row of masks.png
    "--task supervised": (set(), {"top1", "test_loss"}, 0),
    "--task hpm": ({"rec", "pred", "correlation", "alpha", "momentum"}, {"test_rec", "test_correlation"}, 4),
}
RARER = {
    "--task supervised --pos-embed relative --polyak 0.9": (set(), {"top1", "test_loss"}, 0),
    "--task mpp --pos-embed 2d": ({"rec", "accuracy"}, {"test_rec"}, 0),
    "--task mae": ({"rec"}, {"test_rec"}, 3),
    "--task mae --mask block --target norm-pixels": ({"rec"}, {"test_rec"}, 3),
    "--task hpm --target hog --predictor-loss absolute": (
        {"rec", "pred", "correlation", "alpha", "momentum"}, {"test_rec", "test_correlation"}, 3
    ),
    "--task hpm --target ema --mask grid": (
        {"rec", "pred", "correlation", "alpha", "momentum"}, {"test_rec", "test_correlation"}, 3
    ),
    "--task hpm --target dino --target-weights dino.pt": (
        {"rec", "pred", "correlation", "alpha", "momentum"}, {"test_rec", "test_correlation"}, 3
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", [*RUN_FOLDER, *(pytest.param(c, marks=pytest.mark.slow) for c in RARER)])
def test_a_run_folder_says_what_was_run_how_it_went_and_what_came_out(command, small, shallow, capsys):
    """config.json, log.jsonl, last.pt, curves.png, result.json; masks.png where patches are masked."""
    torch.save(vit.create("vit_micro4", 16, 0).state_dict(), "dino.pt")
    logged, scores, panels = (RUN_FOLDER | RARER)[command]
    assert run(f"{MICRO} {command} --out run") == 0
    five = {"config.json", "log.jsonl", "last.pt", "curves.png", "result.json"}
    masks = {"masks.png"} if panels else set()
    assert {path.name for path in Path("run").iterdir()} == five | masks | {".lock"}

    config = json.loads(Path("run/config.json").read_text())
    assert (config["arch"], config["img_size"], config["steps"], config["seed"]) == ("vit_micro4", [16, 16], 3, 0)
    newer = {"init_grid", "images", "workers", "teacher", "test_images", "evaluations", "head", "window", "inference"}
    assert config.keys() == (OLD_CONFIG.keys() | newer) - {"out", "overwrite", "resume"}
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["epoch"] for line in lines] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert [line.keys() - scores for line in lines] == [LOGGED | logged] * 3
    rate = config["lr"][0]
    assert [line["lr"] for line in lines] == pytest.approx(learning_rate_loops(3, rate, config["warmup"], "cosine"))
    if "alpha" in logged:
        T = 0.2 if "ema" in command or "dino" in command else 0.5
        assert [line["alpha"] for line in lines] == pytest.approx([0, T / 3, 2 * T / 3]), "α_t = α_0 + t/T (α_T - α_0)"
        assert [line["momentum"] for line in lines] == pytest.approx([0.999 + 9e-6 * t / 6 for t in range(3)], abs=1e-9)
        assert all(line["loss"] == pytest.approx(line["rec"] + line["pred"], rel=1e-5) for line in lines)
    assert lines[-1].keys() >= scores

    saved = checkpoint("run")  # weights_only=True: no code is run
    origin = {"classes", "grid", "images", "init_digest", "target_digest"}
    assert saved.keys() - {"raw_model"} == {"model", "optimizer", "step", "seconds", "line", "config"} | origin
    assert ("raw_model" in saved) == ("polyak" in command)
    assert saved["step"] == 3
    assert json.loads(json.dumps(saved["config"])) == config
    with Image.open("run/curves.png") as image:
        assert image.size == (1200, 432)
    if panels:
        with Image.open("run/masks.png") as image:
            assert image.size == (200 * panels, 200 * 5), "every other one of the ten test images"

    result = json.loads(Path("run/result.json").read_text())
    names = ["task", "arch", "data", *(scores - {"test_loss"}), "steps", "seconds", "images_per_second", "params"]
    assert set(names) == result.keys()
    assert result["task"] == command.split()[1]
    assert (result["arch"], result["data"], result["steps"]) == ("vit_micro4", "photos", 3)
    assert all(result[name] == lines[-1][name] for name in scores - {"test_loss"})
    assert result["images_per_second"] == pytest.approx(12 / result["seconds"])
    if command == "--task supervised":
        D, P = 64, 48
        block = 4 * D + (3 * D * D + 3 * D) + (D * D + D) + (2 * D * D + 2 * D) + (2 * D * D + D)
        assert result["params"] == (P * D + D) + D + 17 * D + BLOCKS * block + 2 * D + (3 * D + 3)
    told = capsys.readouterr().out.splitlines()
    assert any(line.startswith("3 steps of 4 images") for line in told)
    words = [f"{result['task']}: vit_micro4 on photos", "3 steps", "images/s", "run"]
    form = {"top1": "{:.2f} %", "test_rec": "{:.4f}", "test_correlation": "{:.2f}"}
    words += [form[name].format(result[name]) for name in scores - {"test_loss"}]
    assert all(word in told[-1] for word in words), f"{words} are not all in: {told[-1]}"


def test_runs_do_not_replace_each_other(loop, capsys):
    """Without --out the second run gets a folder of its own, and --resume means the last one."""
    name = "supervised-vit_micro4-photos"
    for folder in (name, f"{name}-2"):
        Path("runs", folder).mkdir(parents=True)
    loop(MICRO)  # steps that do nothing
    assert run(MICRO) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"{name}-3")
    assert sorted(path.name for path in Path("runs").iterdir()) == [name, f"{name}-2", f"{name}-3"]
    assert run("--arch vit_micro4 --resume") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"{name}-3")
    assert not list(Path("runs", name).iterdir())


@pytest.mark.parametrize("kept", ["run", "last.pt", "previous.pt", "result.json"])
def test_a_folder_that_holds_a_run_is_kept_unless_overwrite_says_so(kept, finished, capsys):
    """A whole one, or what is left of one: each of these files alone is worth keeping."""
    if kept != "run":
        Path(kept).write_bytes(b"kept")
        shutil.rmtree("run")
        Path("run").mkdir()
        shutil.move(kept, Path("run", kept))
    before = contents("run")
    assert run(f"{MICRO} --seed 1 --out run") == 2
    error = one_line(capsys)
    assert all(word in error for word in ("run", "--resume", "--overwrite", "--out"))
    assert {name: content for name, content in contents("run").items() if name != ".lock"} == {
        name: content for name, content in before.items() if name != ".lock"
    }
    assert run(f"{MICRO} --seed 1 --out run --overwrite") == 0
    assert json.loads(Path("run/config.json").read_text())["seed"] == 1
    assert len(log("run")) == 3


def test_overwriting_leaves_no_result_of_the_old_run(finished, monkeypatch):
    """If the new run is interrupted, the folder must not hold the new weights beside the old score."""
    watch(monkeypatch, lambda step, *_: os.kill(os.getpid(), signal.SIGINT) if step == 0 else None)
    assert run(f"{MICRO} --seed 1 --out run --overwrite") == 130
    assert not Path("run/result.json").exists()


@pytest.mark.parametrize(
    "flag", ["--arch vit_ti16", "--lr 0.5", "--task mae", "--seed 3", "--img-size 32", "--decay linear"]
)
def test_a_run_is_not_resumed_as_another_one(flag, finished, capsys):
    """One line names the flag, what the run has, and what was given."""
    before = contents("run")
    assert run(f"--resume --out run {flag}") == 2
    name, value = flag.split()
    error = one_line(capsys)
    assert f"leave {name} out" in error
    assert f"not {value}" in error.replace("32,32", "32").replace("32x32", "32")
    assert before == contents("run")


def test_a_run_of_another_version_is_not_resumed(finished, capsys):
    """Its config.json lacks a flag: nobody knows what that run would have done."""
    config = json.loads(Path("run/config.json").read_text())
    del config["pixels"]
    Path("run/config.json").write_text(json.dumps(config))
    assert run("--resume --out run") == 2
    assert "says nothing of pixels" in one_line(capsys)


def test_a_run_that_is_done_can_be_resumed_and_changes_nothing(finished):
    before = contents("run")
    assert run("--resume --out run") == 0
    assert contents("run")["last.pt"] == before["last.pt"]
    assert json.loads(before["result.json"])["top1"] == json.loads(contents("run")["result.json"])["top1"]


def test_a_damaged_checkpoint_is_one_line_and_not_a_traceback(finished, capsys):
    Path("run/previous.pt").unlink()
    Path("run/last.pt").write_bytes(Path("run/last.pt").read_bytes()[:1000])
    assert run("--resume --out run") == 2
    assert one_line(capsys).startswith("error: run/last.pt is damaged")


class Evil:
    """Unpickled, it writes a file."""

    def __reduce__(self):
        return Path.touch, (Path("was-here"),)


def test_a_checkpoint_runs_no_code(finished, capsys):
    """Runs are passed on: a file that carries code is refused as damaged, and the code stays what it is."""
    Path("run/previous.pt").unlink()
    torch.save(checkpoint("run") | {"evil": Evil()}, "run/last.pt")
    assert run("--resume --out run") == 2
    assert one_line(capsys).startswith("error: run/last.pt is damaged")
    assert not Path("was-here").exists()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_an_out_that_can_be_no_folder_is_refused(name, small, capsys):
    Path("file").write_text("mine")
    assert run(f"{MICRO} --out {name}") == 2
    assert "--out" in one_line(capsys)


# ---------------------------------------------------------------------------------------------
# When something goes wrong on the way
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "bad"), [(0, math.nan), (8, math.inf)])
def test_a_loss_that_is_not_finite_ends_the_run_and_last_pt_is_from_before(
    step, bad, small, shallow, no_figures, monkeypatch, capsys
):
    """Exit code 1; the message names the step, counted from 1 as in the log."""
    task, calls = train.TASKS["supervised"], itertools.count()

    def losses(*given):
        return {name: loss * (bad if next(calls) == step else 1) for name, loss in task.losses(*given).items()}

    monkeypatch.setitem(train.TASKS, "supervised", task._replace(losses=losses))
    assert run(f"{MICRO} --steps 12 --out run") == 1
    error = one_line(capsys)
    assert f"step {step + 1} is not finite: loss {bad}" in error
    assert "--lr" in error
    if step == 0:
        assert "nothing was saved before" in error
        assert not Path("run/last.pt").exists()
    else:
        assert "run/last.pt has the last good state" in error
        assert checkpoint("run")["step"] == 6
        assert all(value.isfinite().all() for value in checkpoint("run")["model"].values())


@pytest.mark.parametrize(
    "task", ["knn", pytest.param("supervised", marks=pytest.mark.slow), pytest.param("linear", marks=pytest.mark.slow)]
)
def test_a_few_unreadable_images_are_skipped_named_and_counted(task, shallow, no_figures, capsys):
    """One of 24 is 4 %."""
    write_images("pictures", broken=1, ant=12, cat=12)
    torch.save(vit.create("vit_micro4", 16, 2).state_dict(), "init.pt")
    steps = "" if task == "knn" else "--steps 6 --batch-size 4"
    assert run(f"{STILL} {steps} --task {task} --init init.pt --data folder:pictures --out run") == 0
    out, err = capsys.readouterr()
    warnings = [line for line in err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert str(Path("pictures/train/ant/0.png")) in warnings[0]
    assert "skipped 1 of 24 training images" in out


def test_more_than_5_percent_of_unreadable_images_end_the_run(shallow, no_figures, capsys):
    """Two of 24 are 8 %: too many to go on without a word."""
    write_images("pictures", broken=2, ant=12, cat=12)
    assert run(f"{MICRO} --steps 12 --data folder:pictures --out run") == 2
    error = one_line(capsys)
    assert all(word in error for word in ("2 of 24", "5 %", "pictures/train/ant", "repair or remove"))


def test_randaugment_of_the_recipe_reaches_the_images_of_a_run_that_goes_on(shallow, monkeypatch):
    """MAE fine-tunes on ImageNet with RandAugment(9, 0.5); what it does is in test_flags.py."""
    write_images("pictures", ant=2, cat=2)
    torch.save(vit.create("vit_micro4", 16, 2).state_dict(), "init.pt")
    seen = []
    monkeypatch.setattr(train, "train", lambda config, model, dataset, *_: seen.append(dataset.train) or signal.SIGINT)
    command = "--task finetune --init init.pt --arch vit_micro4 --img-size 16 --data folder:pictures"
    assert run(f"{command} --out run") == run("--resume --out run") == 130
    assert [split.randaugment for split in seen] == [9.0, 9.0]


# ---------------------------------------------------------------------------------------------
# Slow: whole programs, and what only some runs need
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet50", "r26_vit_s32"])
def test_convolutional_archs_are_fine_tuned_and_probed(arch, small, no_figures, monkeypatch):
    tiny(arch, monkeypatch)
    common = f"--arch {arch} --img-size 32 --batch-size 4 --steps 3"
    assert run(f"{common} --out first") == 0
    for task in ("finetune", "linear"):
        assert run(f"{common} --task {task} --init first/last.pt --out {task}") == 0
        assert "top1" in json.loads(Path(task, "result.json").read_text())


@pytest.mark.slow
def test_a_linear_probe_can_be_resumed_with_less_free_memory(pretrained, small, shallow, no_figures, monkeypatch):
    """Whether features are kept in memory is a matter of the machine at that time, not of the run."""
    assert run(f"{MICRO} --task linear --init {pretrained['hpm']} --out run") == 0
    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    assert run("--resume --out run") == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["supervised", "hpm"])
def test_a_compiled_model_learns_the_same(task, small, no_figures, monkeypatch):
    """And its checkpoint has the same names, so that either can go on with the other's. Two blocks compile sooner.

    Compiled kernels round otherwise, some 1e-6 of a loss; SGD's steps are in proportion to that, and three of them
    hardly enlarge it.
    """
    monkeypatch.setitem(vit.ARCHS, "vit_micro4", vit.ARCHS["vit_micro4"] | {"depth": 2})
    for flag in ("no-compile", "compile"):
        assert run(f"{MICRO} --task {task} --optimizer sgd --lr 0.01 --{flag} --out {flag}") == 0
    one, other = (checkpoint(flag)["model"] for flag in ("no-compile", "compile"))
    assert one.keys() == other.keys()
    for eager, compiled in zip(log("no-compile"), log("compile"), strict=True):
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-4)


def python_train(command, **options):
    """The program itself, as a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *command.split()],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_supervised_training_learns_the_photographs():
    """Sixteen photographs, test crops from a part of each that training never sees; chance is 6.25 %."""
    process = python_train("--arch vit_micro4 --steps 60 --batch-size 16 --lr 0.002 --out run")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(Path("run/result.json").read_text())["top1"] >= 15
    assert "top-1" in out.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_workers_too_and_the_run_can_go_on(number, no_figures):
    """A terminal or a cluster sends it to the whole group, data workers included: they must last for the step.

    And again: torchrun passes on what its processes have got themselves.
    """
    write_images("pictures", ant=20, cat=20)
    command = "--arch vit_micro4 --img-size 16 --batch-size 4 --steps 30 --data folder:pictures --dropout 0.1"
    process = python_train(f"{command} --out parts", start_new_session=True)
    deadline = time.monotonic() + 120
    while not (Path("parts/log.jsonl").exists() and Path("parts/log.jsonl").read_text().count("\n") >= 1):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for _ in range(3):
        os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert 1 <= checkpoint("parts")["step"] < 30
    resume = out.splitlines()[-1].split("python train.py ")[1]
    assert run(resume) == 0
    assert run(f"{command} --out whole") == 0
    assert not different(checkpoint("whole")["model"], checkpoint("parts")["model"])
