"""What train.py promises: the schedule and the step of the papers, runs that can be repeated and resumed bit for bit,
a run folder that says everything, and for every mistake one line that helps.

Most tests call `train.main` in this process, on 24 coloured images of 16 pixels that stand in for the photographs; the
last ones run the program itself. Read the tests in order: they follow train.py, and to rewrite one of its functions
until its tests pass is the exercise.
"""

import contextlib
import itertools
import json
import math
import os
import re
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
from torch.utils._python_dispatch import TorchDispatchMode

import data
import hpm
import recipes
import resnet
import train
import vit
from tests.test_weights import google_file

ROOT = Path(train.__file__).parent
PLAIN = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)  # mean and deviation of the images below
MICRO = "--arch vit_micro4 --img-size 16 --batch-size 4 --steps 3"


@pytest.fixture(autouse=True)
def leave_no_trace(tmp_path, monkeypatch):
    """Every test works in a folder of its own, and gives the signals back that a run takes."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def coloured(n, seed):
    """n images (n, 3, 16, 16) of three classes: red, green or blue where the others are noise."""
    images = torch.randint(160, (n, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    labels = torch.arange(n) % 3
    images[torch.arange(n), labels] += 90
    return images, labels


def small_photos(size=None):
    """24 training and 10 test images."""
    splits = (data.InMemory(*coloured(n, seed=n), *PLAIN) for n in (24, 10))
    return data.Dataset("photos", ["red", "green", "blue"], *PLAIN, *splits)


@pytest.fixture
def small(monkeypatch):
    """The small images in place of the photographs."""
    monkeypatch.setattr(data, "photos", small_photos)


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(train, "plot_curves", lambda *_: None)
    monkeypatch.setattr(train, "plot_masks", lambda *_: None)


def run(command):
    """`python train.py COMMAND` in this process: the exit code."""
    try:
        return train.main(command.split())
    except SystemExit as stop:  # argparse
        return stop.code


def settings(command):
    """The completed configuration and the data of a command."""
    return train.configure(train.parse(command.split()))


def checkpoint(out):
    return torch.load(Path(out, "last.pt"), weights_only=True)


def different(one, other):
    """Names of the tensors that are not equal bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


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


def watch(monkeypatch, look):
    """Call look(step, model, config) after every step of the optimizer."""
    original = train.train_step

    def train_step(model, optimizer, images, targets, config, step):
        values = original(model, optimizer, images, targets, config, step)
        look(step, model, config)
        return values

    monkeypatch.setattr(train, "train_step", train_step)


# ---------------------------------------------------------------------------------------------
# The model, its optimizer, its learning rate
# ---------------------------------------------------------------------------------------------


def optimizer_by_name(command):
    """For every trainable parameter: weight decay, learning rate over that of the head; and the optimizer."""
    config, dataset = settings(command)
    model = train.build(config, dataset)
    optimizer = train.build_optimizer(model, config)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == sum(len(group["params"]) for group in optimizer.param_groups), "a parameter stands twice"
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert groups.keys() == {id(p) for p in trainable.values()}, "trainable ones, all of them and no others"
    found = {name: (groups[id(p)]["weight_decay"], groups[id(p)]["scale"]) for name, p in trainable.items()}
    return found, optimizer


MATRICES = ("proj.weight", "qkv.weight", "fc1.weight", "fc2.weight", "head.weight", "embed.weight", "pred.weight")


@pytest.mark.parametrize("command", ["--arch vit_ti16", "--task hpm --arch vit_micro4"])
def test_weight_decay_is_on_matrices_alone(command, small):
    """None on biases, norms, tokens and positions (MAE, appendix A; HPM's code)."""
    found, _ = optimizer_by_name(f"{command} --img-size 32 --weight-decay 0.3")
    decayed = {name for name, (decay, _) in found.items() if decay == 0.3}
    assert decayed == {name for name in found if name.endswith(MATRICES)}
    assert {found[name][0] for name in found.keys() - decayed} == {0.0}
    assert any("token" in name for name in found), "the class token or the mask token is trained"


def test_layer_decay_slows_what_is_far_from_the_head(monkeypatch, small):
    """By hand for two blocks: head and last norm 1, block 1 0.5, block 0 0.25, before the blocks 0.125."""
    two = dict(patch_size=4, dim=32, depth=2, num_heads=4)
    monkeypatch.setitem(vit.ARCHS, "vit_micro4", two)
    torch.save(vit.ViT(16, num_classes=3, pool="mean", **two).state_dict(), "init.pt")
    command = "--task finetune --init init.pt --arch vit_micro4 --img-size 16 --layer-decay 0.5"
    found, _ = optimizer_by_name(command)
    by_hand = {"patch_embed": 1 / 8, "cls_token": 1 / 8, "pos_embed": 1 / 8, "fc_norm": 1.0, "head": 1.0}
    by_hand |= {"blocks.0": 1 / 4, "blocks.1": 1 / 2}
    for name, (_, scale) in found.items():
        part = ".".join(name.split(".")[:2]) if name.startswith("blocks") else name.split(".")[0]
        assert scale == by_hand.pop(part, by_hand.get(part, scale)), name
    assert not by_hand, f"not seen: {by_hand}"


def test_the_learning_rate_of_a_layer_follows_the_schedule(small, no_figures, monkeypatch):
    """What AdamW uses at step t is learning_rate(t) times the layer's factor."""
    torch.save(vit.create("vit_micro4", 16, 3, pool="mean").state_dict(), "init.pt")
    original, seen = train.train_step, []

    def train_step(model, optimizer, images, targets, config, step):
        seen.append({group["lr"] for group in optimizer.param_groups})
        return original(model, optimizer, images, targets, config, step)

    monkeypatch.setattr(train, "train_step", train_step)
    command = "--task finetune --init init.pt --lr 0.01 --warmup 2 --layer-decay 0.5 --out run"
    assert run(f"{MICRO} {command}") == 0
    for rates, lr in zip(seen, (0.005, 0.01, 0.01), strict=True):
        assert sorted(rates) == pytest.approx([lr * 0.5**i for i in range(7, -1, -1)])


def test_the_optimizers_are_the_papers(small):
    """AdamW: ViT β = (0.9, 0.999), MAE and HPM (0.9, 0.95) in pre-training; the ViT paper fine-tunes with SGD."""
    torch.save(vit.create("vit_micro4", 32, 3).state_dict(), "init.pt")
    for task, betas in {"supervised": 0.999, "mae": 0.95, "hpm": 0.95, "finetune": 0.999}.items():
        _, optimizer = optimizer_by_name(f"--arch vit_micro4 --task {task} --init init.pt")
        assert isinstance(optimizer, torch.optim.AdamW)
        assert {group["betas"] for group in optimizer.param_groups} == {(0.9, betas)}, task
    found, optimizer = optimizer_by_name("--arch vit_micro4 --task finetune --init init.pt --optimizer sgd")
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(0.9, False)}
    assert set(found.values()) == {(0.0, 1.0)}, "ViT, table 4: no weight decay, one learning rate"


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


@pytest.mark.exercise("learning_rate")
@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize(("steps", "warmup"), [(10, 3), (10, 0), (7, 1), (5, 5), (3, 8), (1, 0), (1, 1)])
def test_the_learning_rate_warms_up_and_decays(steps, warmup, decay):
    """ViT, appendix B.1. (1 + cos x) / 2 = cos²(x / 2)."""
    rates = [train.learning_rate(step, steps, 0.3, warmup, decay) for step in range(steps)]
    np.testing.assert_allclose(rates, learning_rate_loops(steps, 0.3, warmup, decay), atol=1e-15)


@pytest.mark.exercise("learning_rate")
@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_end_points_of_the_schedule(decay):
    """A first step of 0 would be wasted; the peak is reached once warm-up ends; 0 would come at `steps`."""
    rate = [train.learning_rate(step, 100, 2.0, 10, decay) for step in range(101)]
    assert rate[0] == pytest.approx(0.2)
    assert rate[9] == rate[10] == 2.0
    assert rate[55] == pytest.approx(1.0), "half way down"
    assert rate[100] == pytest.approx(0.0, abs=1e-15)
    assert all(a > b for a, b in itertools.pairwise(rate[10:]))


# ---------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------


def one_step(command, scale=1.0, head=1.0):
    """Weights before, weights after one step of SGD, and what train_step returned; head: deviation of its weights."""
    config, dataset = settings(f"{command} --optimizer sgd --arch vit_micro4 --img-size 16 --batch-size 8 --lr 0.1")
    torch.manual_seed(0)
    model = train.build(config, dataset)
    if config.task in ("supervised", "finetune"):
        torch.nn.init.normal_(model.head.weight, std=head)  # it starts at 0: no gradient would reach the encoder
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    images, targets = coloured(8, seed=3)
    images = scale * data.normalise(images, *PLAIN)
    values = train.train_step(model, train.build_optimizer(model, config), images, targets, config, config.steps // 2)
    return before, {name: p.detach() for name, p in model.named_parameters()}, values


@pytest.mark.parametrize("task", ["supervised", "mpp", "mae", "hpm"])
def test_gradients_of_micro_batches_add_up_to_that_of_the_batch(task, small):
    """The mean over a batch is the mean of the means over equal parts; clipping comes after the sum."""
    _, whole, values = one_step(f"--task {task} --weight-decay 0")
    before, parts, same_values = one_step(f"--task {task} --weight-decay 0 --micro-batch 2")
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-6, rtol=0, msg=name)
    moved = max((whole[name] - before[name]).abs().max().item() for name in whole)
    assert moved > 1e-3, "no step was taken"
    for name in values:
        assert same_values[name].item() == pytest.approx(values[name].item(), abs=1e-4), name


@pytest.mark.parametrize(("task", "clipped"), [("supervised", True), ("mae", False), ("hpm", False)])
def test_the_gradient_is_clipped_to_norm_1_where_the_vit_paper_does(task, clipped, small):
    """ViT, appendix B.1; MAE and HPM do not clip. SGD's first step is lr times the gradient. grad_norm is from before.

    The images are blown up, so that the gradient is large.
    """
    before, after, values = one_step(f"--task {task} --weight-decay 0", scale=30.0)
    norm = math.sqrt(sum(((before[n] - after[n]).double() / 0.1).square().sum().item() for n in before))
    assert values["grad_norm"] > 2
    assert norm == pytest.approx(1.0 if clipped else values["grad_norm"].item(), rel=1e-3)


def test_a_small_gradient_is_not_stretched_to_norm_1(small):
    """Near the optimum the gradient is small, and so are the steps. Here all images are the same, the head is 0."""
    before, after, values = one_step("--weight-decay 0", scale=0.0, head=0.0)
    norm = math.sqrt(sum(((before[n] - after[n]).double() / 0.1).square().sum().item() for n in before))
    assert values["grad_norm"] < 1
    assert norm == pytest.approx(values["grad_norm"].item(), rel=1e-3)


class Copies(TorchDispatchMode):
    """Notes the copies between devices for which the host waits."""

    def __init__(self):
        super().__init__()
        self.awaited = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        devices = {value.device.type for value in (*args, out) if isinstance(value, torch.Tensor) and value.ndim}
        if len(devices) > 1 and not (kwargs or {}).get("non_blocking"):
            self.awaited.append(f"{operation}: {devices}")
        return out


STEPS = [
    "--mixup 0.8 --cutmix 1 --erasing 0.5 --smoothing 0.1 --dropout 0.1 --drop-path 0.1",
    "--task mpp",
    "--task mae --mask block --target norm-pixels",
    "--task mae --mask grid --target hog",
    "--task hpm --alpha 0.5,1",
    "--task hpm --target ema --predictor-loss absolute",
]


@pytest.mark.parametrize("command", STEPS)
def test_the_host_does_not_wait_for_the_device_in_a_step(command, small, monkeypatch):
    """From the batch to the teacher's update, two micro-batches. Else a GPU stands still while the host catches up.

    The device "meta" computes shapes alone: there are no values to wait for, so whatever reads one fails. And a copy
    from the host has to be one that it need not wait for, out of pinned memory. That of `torch.tensor` is not.
    """
    meta, generator, tensor = torch.device("meta"), data.generator, torch.tensor

    def tensor_on_host(values, device="cpu", **options):
        assert torch.device(device).type == "cpu"
        return tensor(values, **options)

    monkeypatch.setattr(data, "generator", lambda *key, device="cpu": generator(*key))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(train, "autocast", lambda config: contextlib.nullcontext())
    config, dataset = settings(f"{command} --arch vit_micro4 --img-size 16 --batch-size 8 --micro-batch 4")
    model = train.build(config, dataset).to(meta)
    config.device = "meta"
    optimizer = SimpleNamespace(step=lambda: None, zero_grad=lambda: None)  # PyTorch's own has no meta kernel
    batches = dataset.train.train_batches(config.img_size, 8, range(2), config.seed, config.crop, meta)
    next(batches)  # moves the images and what else stays on the device
    monkeypatch.setattr(torch, "tensor", tensor_on_host)
    with Copies() as copies:
        images, targets = next(batches)
        images, targets = train.disturb(images, targets, len(dataset.classes), config, 1)
        values = train.train_step(model, optimizer, images, targets, config, 1)
        if config.task == "hpm":
            hpm.ema_update(model.teacher, model.student, 0.999)
    assert not copies.awaited
    assert {value.device for value in values.values()} == {meta}, "read already"


# ---------------------------------------------------------------------------------------------
# The same run again, and the same run in two parts
# ---------------------------------------------------------------------------------------------

EVERYTHING = "--dropout 0.1 --drop-path 0.2 --mixup 0.8 --cutmix 1 --erasing 0.5 --smoothing 0.1 --micro-batch 2"
HPM = "--task hpm --micro-batch 2 --alpha 0.2,0.9"


@pytest.mark.parametrize("command", [EVERYTHING, HPM])
def test_the_same_command_gives_the_same_weights_bit_for_bit(command, small, no_figures):
    """And another seed gives others, from the first weight on."""
    for out, seed in (("one", 5), ("two", 5), ("other", 6)):
        assert run(f"{MICRO} {command} --lr 0.01 --seed {seed} --out {out}") == 0
    assert not different(checkpoint("one")["model"], checkpoint("two")["model"])
    assert different(checkpoint("one")["model"], checkpoint("other")["model"])


def log(out):
    """The log without the times."""
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", [EVERYTHING, HPM, "--optimizer sgd", "--task mae --target ema", "--polyak 0.9"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(command, number, small, no_figures, monkeypatch, capsys):
    """The step in progress is finished and saved. Resumed, the run ends with the same weights, bit for bit."""
    command, kept = f"--arch vit_micro4 --img-size 16 --batch-size 4 --steps 15 --lr 0.01 {command}", {}

    def keep(step, model, config):
        kept[step] = {name: p.detach().clone() for name, p in model.named_parameters() if "teacher" not in name}

    with monkeypatch.context() as patch:
        watch(patch, keep)
        assert run(f"{command} --out whole") == 0
    with monkeypatch.context() as patch:
        watch(patch, lambda step, *_: os.kill(os.getpid(), number) if step == 7 else None)
        capsys.readouterr()
        assert run(f"{command} --out parts") == 128 + number
    last_line = capsys.readouterr().out.splitlines()[-1]
    resume = "--resume --out parts"
    assert last_line.endswith(f"python train.py {resume}"), "how to go on"

    saved = checkpoint("parts")
    assert saved["step"] == 8, "the step in progress is finished, and none after it begins"
    weights = saved.get("raw_model", saved["model"])
    assert not different({name: weights[name] for name in kept[7]}, kept[7])
    assert log("parts")[-1]["step"] == 8
    assert not Path("parts/result.json").exists()

    assert run(resume) == 0
    whole, parts = checkpoint("whole"), checkpoint("parts")
    assert parts["step"] == whole["step"] == 15
    assert not different(whole["model"], parts["model"])
    for one, other in zip(whole["optimizer"]["state"].values(), parts["optimizer"]["state"].values(), strict=True):
        assert not different(one, other)
    assert [line["step"] for line in log("parts")] == list(range(1, 16))
    assert log("parts")[8:] == log("whole")[8:]


def test_what_was_logged_after_the_last_checkpoint_is_logged_again_not_twice(small, no_figures, monkeypatch):
    """A run that was killed has a log that is ahead of last.pt."""

    class Killed(BaseException):
        pass

    def kill(step, *_):
        if step == 8:
            raise Killed

    command = "--arch vit_micro4 --img-size 16 --batch-size 4 --steps 12 --out run"
    with monkeypatch.context() as patch:
        watch(patch, kill)
        with pytest.raises(Killed):
            run(command)
    assert checkpoint("run")["step"] == 6, "saved after each evaluation, one an epoch"
    assert log("run")[-1]["step"] == 8
    assert run("--resume --out run") == 0
    assert [line["step"] for line in log("run")] == list(range(1, 13))


def test_half_a_line_at_the_end_of_the_log_is_dropped(small, no_figures):
    """What a full disk or a power cut leaves behind; the checkpoint is whole, so the run can go on."""
    assert run(f"{MICRO} --out run") == 0
    with Path("run/log.jsonl").open("a") as file:
        file.write('{"step": 3, "ep')
    assert run("--resume --out run") == 0
    assert [line["step"] for line in log("run")] == [1, 2, 3]


def test_the_teacher_is_the_moving_average_of_the_students_steps(small, no_figures, monkeypatch):
    """HPM, momentum update: θ_t ← m θ_t + (1 - m) θ_s after every step, from θ_t = θ_s, m = 0.999 + 0.0009 e / 100.

    In float32 like the code, so that the two differ by roundings at most.
    """
    command = f"{MICRO} --task hpm --batch-size 24 --lr 0.1 --warmup 0 --out run"

    def weights(model):
        return {name: p.detach().numpy().copy() for name, p in model.student.named_parameters()}

    config, dataset = settings(command)
    torch.manual_seed(config.seed)
    start, students = weights(train.build(config, dataset)), []
    watch(monkeypatch, lambda step, model, config: students.append(weights(model)))
    assert run(command) == 0

    saved = checkpoint("run")["model"]
    names = [name for name in start if f"teacher.{name}" in saved]
    assert any(n.startswith("encoder") for n in names)
    assert any(n.startswith("loss_predictor") for n in names)
    assert not any(n.startswith("decoder.") for n in names), "the teacher reconstructs nothing"
    moved = 0.0
    for name in names:
        teacher = start[name]
        for epoch, student in enumerate(students):  # 24 of 24 images a step: an epoch each
            m = 0.999 + 0.0009 * epoch / 100
            teacher = teacher + np.float32(1 - m) * (student[name] - teacher)
        np.testing.assert_allclose(saved[f"teacher.{name}"].numpy(), teacher, rtol=0, atol=1e-7, err_msg=name)
        moved = max(moved, np.abs(teacher - start[name]).max())
    assert moved > 1e-4, "the teacher did not move"


def test_a_pretrained_student_hands_its_weights_to_the_teacher(small):
    """With --init the teacher starts as the student too, not as what the student was before it was loaded."""
    torch.save(vit.create("vit_micro4", 16, 0).state_dict(), "init.pt")
    model = train.build(*settings(f"{MICRO} --task hpm --init init.pt"))
    own, teacher = dict(model.student.named_parameters()), dict(model.teacher.named_parameters())
    assert not different({name: own[name] for name in teacher}, teacher)
    E = "patch_embed.proj.weight"
    assert torch.equal(own[f"encoder.{E}"], torch.load("init.pt", weights_only=True)[E])


def test_googles_weights_run_with_the_gelu_and_the_pixels_that_they_were_trained_with(small, no_figures):
    """Its JAX code approximates GELU by tanh and brings pixels to [-1, 1]; no file says so, but only its are .npz.

    And so does a run that starts from what such a run saved.
    """
    torch.manual_seed(0)
    np.savez("google.npz", **google_file(vit.create("vit_micro4", 16, 16, pos_embed="1d")))
    torch.save(vit.create("vit_micro4", 16, 16).state_dict(), "init.pt")
    images = torch.randn(2, 3, 16, 16)
    command = f"{MICRO} --task finetune --pool cls --pos-embed 1d --init"
    ours = train.build(*settings(f"{command} google.npz")).eval()
    for gelu, equal in (("tanh", True), ("none", False)):
        model = vit.create("vit_micro4", 16, 16, pos_embed="1d", gelu=gelu).eval()
        vit.load_weights(model, "google.npz")
        assert torch.equal(ours.represent(images), model.represent(images)) == equal
    assert all(block.mlp.gelu == "none" for block in train.build(*settings(f"{command} init.pt")).blocks)
    assert settings(f"{command} init.pt")[1].train.mean == PLAIN[0]
    assert run(f"{command} google.npz --out first") == 0
    for weights in ("google.npz", "first/last.pt"):
        config, dataset = settings(f"{MICRO} --task knn --init {weights}")
        assert config.gelu == "tanh"
        batch, _ = next(dataset.test.test_batches((16, 16), 10, torch.device("cpu")))
        assert torch.allclose(batch, dataset.test.images / 127.5 - 1, atol=1e-6)


def test_pre_training_goes_on_from_all_that_a_file_has(pretrained, small, capsys):
    """Encoder, decoder, mask token and loss predictor; MAE from HPM's file leaves the predictor out, and says so."""
    saved = torch.load(pretrained["hpm"], weights_only=True)["model"]
    model = train.build(*settings(f"{MICRO} --task hpm --init {pretrained['hpm']}"))
    assert not different(model.student.state_dict(), {n: saved[f"student.{n}"] for n in model.student.state_dict()})
    assert not different(model.teacher.state_dict(), {n: saved[f"student.{n}"] for n in model.teacher.state_dict()})
    assert not capsys.readouterr().out, "nothing was adapted, left or not used"
    model = train.build(*settings(f"{MICRO} --task mae --init {pretrained['hpm']}"))
    assert not different(model.student.state_dict(), {n: saved[f"student.{n}"] for n in model.student.state_dict()})
    assert capsys.readouterr().out == f"{pretrained['hpm']}: not used: loss_predictor\n"


def test_every_step_has_masks_of_its_own_and_the_alpha_of_its_time(small, no_figures, monkeypatch):
    """HPM, easy to hard: α_t = α_0 + t/T (α_T - α_0). Masks depend on seed and step, random ones on nothing else."""
    original, alphas, masks = hpm.HPM.forward, [], []

    def forward(self, images, hard_fraction=0.0, **rest):
        out = original(self, images, hard_fraction, **rest)
        if self.training:
            alphas.append(hard_fraction)
            masks.append(out["mask"])
        return out

    monkeypatch.setattr(hpm.HPM, "forward", forward)
    for out, seed in (("one", 0), ("other", 1)):
        assert run(f"{MICRO} --task hpm --mask random --alpha 0.2,0.8 --seed {seed} --out {out}") == 0
    assert alphas == pytest.approx([0.2, 0.4, 0.6] * 2)
    for one, other in itertools.combinations(masks, 2):
        assert not torch.equal(one, other)


# ---------------------------------------------------------------------------------------------
# The run folder
# ---------------------------------------------------------------------------------------------

LOGGED = {"step", "epoch", "lr", "loss", "seconds", "images_per_second"}
RUN_FOLDER = {  # command: files beside the five that all have, what is logged, scores, panels in a row of masks.png
    "--task supervised": (set(), set(), {"top1"}, 0),
    "--task supervised --pos-embed relative --polyak 0.9": (set(), set(), {"top1"}, 0),
    "--task mpp --pos-embed 2d": (set(), {"rec", "accuracy"}, {"test_rec"}, 0),
    "--task mae": ({"masks.png"}, {"rec"}, {"test_rec"}, 3),
    "--task mae --mask block --target norm-pixels": ({"masks.png"}, {"rec"}, {"test_rec"}, 3),
    "--task hpm": ({"masks.png"}, {"rec", "pred", "correlation"}, {"test_rec", "test_correlation"}, 4),
    "--task hpm --target norm-pixels": ({"masks.png"}, {"pred"}, {"test_correlation"}, 4),
    "--task hpm --target hog --predictor-loss absolute": ({"masks.png"}, {"pred"}, {"test_correlation"}, 3),
    "--task hpm --target ema --mask grid": ({"masks.png"}, {"pred"}, {"test_correlation"}, 3),
    "--task hpm --target dino --target-weights dino.pt": ({"masks.png"}, {"pred"}, {"test_correlation"}, 3),
}


@pytest.mark.parametrize("command", RUN_FOLDER)
def test_a_run_folder_says_what_was_run_how_it_went_and_what_came_out(command, small, capsys):
    """config.json, log.jsonl, last.pt, curves.png, result.json; masks.png where patches are hidden."""
    torch.save(vit.create("vit_micro4", 16, 0).state_dict(), "dino.pt")
    files, logged, scores, panels = RUN_FOLDER[command]
    assert run(f"{MICRO} {command} --out run") == 0
    five = {"config.json", "log.jsonl", "last.pt", "curves.png", "result.json"}
    assert {path.name for path in Path("run").iterdir()} == five | files | {".lock"}

    config = json.loads(Path("run/config.json").read_text())
    assert (config["arch"], config["img_size"], config["steps"], config["seed"]) == ("vit_micro4", [16, 16], 3, 0)
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["epoch"] for line in lines] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert all(line.keys() >= LOGGED | logged for line in lines)
    if "hpm" in command:
        T = 0.2 if "ema" in command or "dino" in command else 0.5
        assert [line["alpha"] for line in lines] == pytest.approx([0, T / 3, 2 * T / 3]), "α_t = α_0 + t/T (α_T - α_0)"
        assert [line["momentum"] for line in lines] == pytest.approx([0.999 + 9e-6 * t / 6 for t in range(3)], abs=1e-9)
        assert all(line["loss"] == pytest.approx(line["rec"] + line["pred"], rel=1e-5) for line in lines)
    assert lines[-1].keys() >= scores

    saved = checkpoint("run")  # weights_only=True: no code is run
    assert saved.keys() - {"raw_model"} == {"model", "optimizer", "step", "seconds", "config"}
    assert saved["step"] == 3
    with Image.open("run/curves.png") as image:
        assert image.size == (1200, 432)
    if panels:
        with Image.open("run/masks.png") as image:
            assert image.size == (200 * panels, 200 * 5), "every other one of the ten test images"

    result = json.loads(Path("run/result.json").read_text())
    names = ["task", "arch", "data", *scores, "steps", "seconds", "images_per_second", "params"]
    assert set(names) <= result.keys()
    assert result["task"] == command.split()[1]
    assert (result["arch"], result["data"], result["steps"]) == ("vit_micro4", "photos", 3)
    assert all(result[name] == lines[-1][name] for name in scores)
    assert result["images_per_second"] == pytest.approx(12 / result["seconds"])
    if command == "--task supervised":
        D, P = 64, 48
        block = 4 * D + (3 * D * D + 3 * D) + (D * D + D) + (2 * D * D + 2 * D) + (2 * D * D + D)
        assert result["params"] == (P * D + D) + D + 17 * D + 6 * block + 2 * D + (3 * D + 3)
    last = capsys.readouterr().out.splitlines()[-1]
    words = [f"{result['task']}: vit_micro4 on photos", "3 steps", "images/s", "run"]
    form = {"top1": "{:.2f} %", "test_rec": "{:.4f}", "test_correlation": "{:.2f}"}
    words += [form[name].format(result[name]) for name in scores]
    assert all(word in last for word in words), f"{words} are not all in: {last}"


def test_runs_do_not_replace_each_other(small, no_figures, capsys):
    """Without --out the second run gets a folder of its own, and --resume means the last one."""
    for _ in range(3):
        assert run(f"{MICRO}") == 0
    name = "supervised-vit_micro4-photos"
    assert sorted(path.name for path in Path("runs").iterdir()) == [name, f"{name}-2", f"{name}-3"]
    before = [Path("runs", folder, "log.jsonl").stat().st_mtime_ns for folder in (name, f"{name}-2")]
    assert run("--arch vit_micro4 --resume") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"{name}-3")
    assert before == [Path("runs", folder, "log.jsonl").stat().st_mtime_ns for folder in (name, f"{name}-2")]


def test_a_folder_that_holds_a_run_is_kept_unless_overwrite_says_so(small, no_figures, capsys):
    assert run(f"{MICRO} --out run") == 0
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    capsys.readouterr()
    assert run(f"{MICRO} --seed 1 --out run") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in ("run", "--resume", "--overwrite", "--out"))
    assert before == {path.name: path.read_bytes() for path in Path("run").iterdir()}
    assert run(f"{MICRO} --seed 1 --out run --overwrite") == 0
    assert json.loads(Path("run/config.json").read_text())["seed"] == 1
    assert len(log("run")) == 3


def test_overwriting_leaves_no_result_of_the_old_run(small, no_figures, monkeypatch):
    """If the new run is interrupted, the folder must not hold the new weights beside the old score."""
    assert run(f"{MICRO} --out run") == 0
    watch(monkeypatch, lambda step, *_: os.kill(os.getpid(), signal.SIGINT) if step == 0 else None)
    assert run(f"{MICRO} --seed 1 --out run --overwrite") == 130
    assert not Path("run/result.json").exists()


@pytest.mark.parametrize("flag", ["--arch vit_ti16", "--lr 0.5", "--task mae", "--seed 3", "--img-size 32"])
def test_a_run_is_not_resumed_as_another_one(flag, small, no_figures, capsys):
    """One line names the flag, what the run has, and what was given."""
    assert run(f"{MICRO} --out run") == 0
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    capsys.readouterr()
    assert run(f"--resume --out run {flag}") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    name = flag.split()[0]
    assert name in err
    assert f"leave {name} out" in err
    assert before == {path.name: path.read_bytes() for path in Path("run").iterdir()}


def test_a_run_of_another_version_is_not_resumed(small, no_figures, capsys):
    """Its config.json lacks a flag: nobody knows what that run would have done."""
    assert run(f"{MICRO} --out run") == 0
    config = json.loads(Path("run/config.json").read_text())
    del config["pixels"]
    Path("run/config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert run("--resume --out run") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "says nothing of pixels" in err


def test_a_damaged_checkpoint_is_one_line_and_not_a_traceback(small, no_figures, capsys):
    assert run(f"{MICRO} --out run") == 0
    Path("run/last.pt").write_bytes(Path("run/last.pt").read_bytes()[:1000])
    capsys.readouterr()
    assert run("--resume --out run") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: run/last.pt is damaged")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_an_out_that_can_be_no_folder_is_refused(name, small, no_figures, capsys):
    Path("file").write_text("mine")
    assert run(f"{MICRO} --out {name}") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "--out" in err


def test_the_last_checkpoint_stays_until_the_next_one_is_whole(monkeypatch):
    """A run that dies while it saves must not lose what it had."""
    train.save(Path("last.pt"), {"step": 1})

    def dies(content, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="no space left"):
        train.save(Path("last.pt"), {"step": 2})
    assert torch.load("last.pt", weights_only=True) == {"step": 1}


# ---------------------------------------------------------------------------------------------
# When something goes wrong on the way
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("step", [0, 8])
def test_a_loss_that_is_not_finite_ends_the_run_and_last_pt_is_from_before(
    step, bad, small, no_figures, monkeypatch, capsys
):
    """Exit code 1; the message names the step, counted from 1 as in the log."""
    original = train.losses_of

    def losses_of(model, images, targets, config, now, generator):
        losses = original(model, images, targets, config, now, generator)
        return losses if now != step else {name: loss * bad for name, loss in losses.items()}

    monkeypatch.setattr(train, "losses_of", losses_of)
    assert run("--arch vit_micro4 --img-size 16 --batch-size 4 --steps 12 --out run") == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"step {step + 1} is not finite: loss {bad}" in errors[0]
    assert "--lr" in errors[0]
    if step == 0:
        assert not Path("run/last.pt").exists()
    else:
        saved = checkpoint("run")
        assert saved["step"] == 6
        assert all(value.isfinite().all() for value in saved["model"].values())


@pytest.mark.parametrize("bad", [11, 13, 15])
def test_the_first_bad_step_of_many_is_named(bad):
    """Losses are read every so many steps, so that the device need not wait; here those of the steps 11 to 15."""
    pending = [{"loss": torch.tensor(float(step)), "grad_norm": torch.tensor(1.0)} for step in range(11, 16)]
    assert train.read(pending, 15) == {"loss": 13.0, "grad_norm": 1.0}, "if all is well, the means"
    for values in pending[bad - 11 :]:
        values["grad_norm"] = torch.tensor(math.inf)
    with pytest.raises(FloatingPointError, match=f"step {bad} is not finite.*grad_norm inf"):
        train.read(pending, 15)


@pytest.mark.parametrize("task", ["supervised", "knn", "linear"])
def test_a_few_unreadable_images_are_skipped_named_and_counted(task, no_figures, capsys):
    """One of 24 is 4 %."""
    write_images("pictures", broken=1, ant=12, cat=12)
    torch.save(vit.create("vit_micro4", 16, 2).state_dict(), "init.pt")
    assert run(f"{MICRO} --steps 6 --task {task} --init init.pt --data folder:pictures --out run") == 0
    out, err = capsys.readouterr()
    warnings = [line for line in err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert str(Path("pictures/train/ant/0.png")) in warnings[0]
    assert "skipped 1 of 24 training images" in out


def test_more_than_5_percent_of_unreadable_images_end_the_run(no_figures, capsys):
    """Two of 24 are 8 %: too many to go on without a word."""
    write_images("pictures", broken=2, ant=12, cat=12)
    assert run(f"{MICRO} --steps 12 --data folder:pictures --out run") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert all(word in errors[0] for word in ("2 of 24", "5 %", "pictures/train/ant", "repair or remove"))


def test_randaugment_of_the_recipe_reaches_the_images(monkeypatch):
    """MAE fine-tunes on ImageNet with RandAugment(9, 0.5); so does a run that goes on."""
    write_images("pictures", ant=2, cat=2)
    torch.save(vit.create("vit_micro4", 16, 2).state_dict(), "init.pt")
    seen = []
    monkeypatch.setattr(train, "train", lambda config, model, dataset, *_: seen.append(dataset.train) or signal.SIGINT)
    command = "--task finetune --init init.pt --arch vit_micro4 --img-size 16 --data folder:pictures"
    assert run(f"{command} --out run") == run("--resume --out run") == 130
    assert [split.randaugment for split in seen] == [9.0, 9.0]


# ---------------------------------------------------------------------------------------------
# Every task, from end to end
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The run folders of a short HPM pre-training and a short supervised training at 16 pixels, a dict."""
    folder = tmp_path_factory.mktemp("pretrained")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "photos", small_photos)
        for task, arch in (("hpm", "micro4"), ("supervised", "ti8")):
            assert run(f"{MICRO} --arch vit_{arch} --task {task} --lr 0.003 --out {folder / task}") == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return {task: folder / task / "last.pt" for task in ("hpm", "supervised")}


def test_fine_tuning_starts_from_the_students_encoder(pretrained, small):
    """Not from the teacher's, and the positions with it."""
    model = train.build(*settings(f"{MICRO} --task finetune --init {pretrained['hpm']}"))
    saved = torch.load(pretrained["hpm"], weights_only=True)["model"]
    own = dict(model.named_parameters())
    taken = [name for name in own if name.startswith(("patch_embed", "cls_token", "pos_embed", "blocks"))]
    assert len(taken) > 70
    assert not different({n: own[n] for n in taken}, {n: saved[f"student.encoder.{n}"] for n in taken})
    assert different({n: own[n] for n in taken[:3]}, {n: saved[f"teacher.encoder.{n}"] for n in taken[:3]})
    assert not own["head.weight"].any(), "the head starts at zero (ViT, section 3.2)"


def test_fine_tuning_says_what_was_loaded_and_what_was_not(pretrained, small, no_figures, capsys):
    """The class token's norm is not used by a mean-pool head, which has a norm of its own."""
    assert run(f"{MICRO} --task finetune --init {pretrained['hpm']} --out run") == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "last.pt: " in line]
    assert any("left at the initial value: fc_norm, head" in note for note in notes)
    assert any("not used" in note and "norm" in note for note in notes)
    assert not any("positions" in note for note in notes), "the size is the same"


@pytest.mark.parametrize(
    ("task", "command", "note"),
    [
        ("hpm", "--arch vit_micro4 --img-size 32", "sine-cosine positions computed for the 8x8 grid"),
        ("supervised", "--arch vit_ti8 --img-size 32", "positions interpolated from 2x2 to 4x4"),
        ("hpm", "--arch vit_micro4 --img-size 32 --optimizer sgd", "sine-cosine positions computed for the 8x8 grid"),
    ],
)
def test_fine_tuning_at_a_higher_resolution_says_what_became_of_the_positions(
    task, command, note, pretrained, small, no_figures, capsys
):
    """ViT, section 3.2: learned positions are interpolated; fixed ones are a formula."""
    assert run(f"--task finetune --init {pretrained[task]} {command} --batch-size 4 --steps 2 --out run") == 0
    assert note in capsys.readouterr().out


def test_few_examples_are_as_many_of_each_class(pretrained, small, no_figures, monkeypatch, capsys):
    """The larger number is taken from the training images, and the smaller one from these."""
    for module in (recipes, train):
        monkeypatch.setattr(module, "SHOTS", (2, 7))
    seen = []
    few_shot = train.few_shot
    monkeypatch.setattr(train, "few_shot", lambda *given: (seen.append(given[0][1]), few_shot(*given))[1])
    init = f"--arch vit_micro4 --img-size 16 --init {pretrained['hpm']}"
    assert run(f"--task fewshot {init} --out run") == 0
    assert [labels.bincount().tolist() for labels in seen] == [[2, 2, 2], [7, 7, 7]]
    result = json.loads(Path("run/result.json").read_text())
    assert result["top1_7shot"] >= 80
    assert f"{result['top1_2shot']:.2f} % top-1 from 2 images a class" in capsys.readouterr().out.splitlines()[-1]


def test_several_learning_rates_are_compared_on_held_out_training_images(small, no_figures, monkeypatch, capsys):
    """ViT, appendix B.1.1: each trains on the rest, the best then on all; one that diverges has lost."""
    runs, top1 = [], {0.1: 40.0, 0.2: 60.0, 0.3: 50.0}

    def evaluate(model, split, config):
        runs.append((config.lr, len(split)))
        return {"top1": top1[config.lr]}

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "HELD_OUT", 0.25)
    assert run(f"{MICRO} --optimizer sgd --lr 0.1,0.2,1e30,0.3 --out run") == 0
    assert runs == [(0.1, 6), (0.2, 6), (0.3, 6), (0.2, 10)]
    assert json.loads(Path("run/config.json").read_text())["lr"] == 0.2
    told = capsys.readouterr().out
    assert "learning rate 0.2: 60.00 % top-1 on 6 training images that were held out" in told
    assert re.search(r"learning rate 1e\+30: step \d is not finite", told)


def test_held_out_images_are_in_no_trial(small, no_figures, monkeypatch):
    seen = []
    monkeypatch.setattr(
        train, "train", lambda c, m, d, *rest: seen.append([part.images for part in (d.train, d.test)]) or 0
    )
    monkeypatch.setattr(train, "read_log", lambda folder: [{"top1": 1.0}])
    config, dataset = settings(f"{MICRO} --lr 0.1,0.2")
    assert train.best_learning_rate(config, dataset, Path(".")) == 0.1
    train_images, held_out = seen[0]
    together = torch.cat([train_images, held_out]).flatten(1).tolist()
    assert sorted(together) == sorted(small_photos().train.images.flatten(1).tolist())


def test_polyak_averages_the_weights_of_all_steps(small, no_figures, monkeypatch):
    """θ̄ ← m θ̄ + (1 - m) θ, m no larger than (1 + t) / (10 + t); θ̄ is tested and saved, θ trains on."""
    weights, tested = [], []
    watch(monkeypatch, lambda step, model, config: weights.append(model.head.weight.detach().double().clone()))
    monkeypatch.setattr(train, "evaluate", lambda model, *_: tested.append(model.head.weight.clone()) or {"top1": 0.0})
    assert run(f"{MICRO} --steps 6 --polyak 0.2 --lr 0.1 --out run") == 0
    average = torch.zeros_like(weights[0])  # the head starts at zero
    for t, theta in enumerate(weights):
        m = min(0.2, (1 + t) / (10 + t))
        average = m * average + (1 - m) * theta
    torch.testing.assert_close(tested[-1].double(), average, atol=1e-6, rtol=0)
    torch.testing.assert_close(checkpoint("run")["model"]["head.weight"].double(), average, atol=1e-6, rtol=0)
    assert torch.equal(checkpoint("run")["raw_model"]["head.weight"].double(), weights[-1])


def test_training_images_that_occur_in_a_test_set_are_dropped_and_counted(monkeypatch, capsys):
    """The ViT paper cleans what it pre-trains on of the test images of all that it transfers to."""
    crops = data.photos((16, 16)).test.images
    splits = [data.InMemory(part, torch.arange(len(part)) % 3, *PLAIN) for part in (crops[:20], crops[17:30])]
    twice = data.Dataset("photos", ["red", "green", "blue"], *PLAIN, *splits)
    monkeypatch.setattr(data, "photos", lambda size: twice)
    monkeypatch.setattr(data, "occurring", lambda split, others: torch.arange(20) >= 17)
    _, dataset = settings(f"{MICRO} --deduplicate photos")
    assert len(dataset.train) == 17
    assert torch.equal(dataset.train.images, crops[:17])
    assert "dropped 3 of 20 training images" in capsys.readouterr().out


@pytest.mark.parametrize("arch", ["resnet50", "r26_vit_s32"])
def test_convolutional_archs_train_fine_tune_and_are_probed(arch, small, no_figures, monkeypatch):
    """`supervised`, `finetune` and `linear` of the baseline and the hybrid, here with two stages of one bottleneck."""
    table, key = (resnet.ARCHS, "depths") if arch == "resnet50" else (vit.ARCHS, "backbone")
    monkeypatch.setitem(table, arch, table[arch] | {key: (1, 1)} | ({} if key == "depths" else {"depth": 1}))
    common = f"--arch {arch} --img-size 32 --batch-size 4 --steps 3"
    assert run(f"{common} --out first") == 0
    for task in ("finetune", "linear"):
        assert run(f"{common} --task {task} --init first/last.pt --out {task}") == 0
        assert "top1" in json.loads(Path(task, "result.json").read_text())


@pytest.mark.parametrize("task", ["linear", "knn"])
def test_frozen_features_tell_colours_apart(task, pretrained, small, no_figures, capsys):
    """Classes are colours, which even a short pre-training keeps: most test images are told right (chance is 33 %)."""
    command = "--lr 0.5 --epochs 60 --batch-size 24" if task == "linear" else ""
    init = f"--arch vit_micro4 --img-size 16 --init {pretrained['hpm']}"
    assert run(f"--task {task} {init} {command} --out run") == 0
    result = json.loads(Path("run/result.json").read_text())
    assert result["task"] == task
    assert result["top1"] >= 80
    assert f"{result['top1']:.2f} %" in capsys.readouterr().out.splitlines()[-1]


def test_a_linear_probe_trains_the_head_alone(pretrained, small, no_figures, monkeypatch):
    """D * classes weights and as many biases as classes."""
    learned = []
    original = train.build_optimizer

    def build_optimizer(model, config):
        learned.extend(name for name, p in model.named_parameters() if p.requires_grad)
        return original(model, config)

    monkeypatch.setattr(train, "build_optimizer", build_optimizer)
    assert run(f"{MICRO} --task linear --init {pretrained['hpm']} --out run") == 0
    assert learned == ["head.weight", "head.bias"]


def test_a_linear_probe_can_be_resumed_with_less_free_memory(pretrained, small, no_figures, monkeypatch):
    """Whether features are kept in memory is a matter of the machine at that time, not of the run."""
    assert run(f"{MICRO} --task linear --init {pretrained['hpm']} --out run") == 0
    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    assert run("--resume --out run") == 0


@pytest.mark.parametrize("task", ["supervised", "hpm"])
def test_bfloat16_changes_the_arithmetic_and_keeps_the_weights_in_float32(task, small, no_figures):
    """Autocast: matrix products in bfloat16; weights and the optimizer's state stay as they are."""
    for dtype in ("float32", "bfloat16"):
        assert run(f"{MICRO} --task {task} --dtype {dtype} --out {dtype}") == 0
    one, other = (checkpoint(dtype)["model"] for dtype in ("float32", "bfloat16"))
    assert {value.dtype for value in other.values()} == {torch.float32}
    assert different(one, other)
    assert log("bfloat16")[0]["loss"] == pytest.approx(log("float32")[0]["loss"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["supervised", "hpm"])
def test_a_compiled_model_learns_the_same(task, small, no_figures, monkeypatch):
    """And its checkpoint has the same names, so that either can go on with the other's. Two blocks compile sooner."""
    monkeypatch.setitem(vit.ARCHS, "vit_micro4", vit.ARCHS["vit_micro4"] | {"depth": 2})
    for flag in ("no-compile", "compile"):
        assert run(f"{MICRO} --task {task} --{flag} --out {flag}") == 0
    one, other = (checkpoint(flag)["model"] for flag in ("no-compile", "compile"))
    assert one.keys() == other.keys()
    for eager, compiled in zip(log("no-compile"), log("compile"), strict=True):
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-3)


def python_train(command, **options):
    """The program itself, as a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *command.split()],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def test_supervised_training_learns_the_photographs():
    """Sixteen photographs, test crops from a part of each that training never sees; chance is 6.25 %."""
    process = python_train("--arch vit_micro4 --steps 60 --batch-size 16 --lr 0.002 --out run")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(Path("run/result.json").read_text())["top1"] >= 25
    assert "top-1" in out.splitlines()[-1]


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
