"""What a run does where it is not told: every number of every recipe, beside the place that it was taken from.

The tables here were copied from the papers and the authors' scripts, and nothing in them is imported from the code. A
number is written down twice on purpose: whoever changes one has to say where the new one stands.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import hpm
import train
import vit
from engine import coco, distributed, image_folder, recipes, scenes, transfer
from related import resnet
from tests.engine.runs import settings

IMAGENET = 1_281_167  # training images of ImageNet-1k
TRAINING_IMAGES = {"fashion-mnist": 60_000, "cifar10": 50_000, "cifar100": 50_000, "photos": 1024, "folder": IMAGENET,
                   "scenes": 20_000, "scenes-many": 20_000}  # fmt: skip
COCO_IMAGES = 117_266  # of COCO's 118,287 training images, those with an object
TRANSFER_IMAGES = {"imagenet-real": IMAGENET, "oxford-pets": 3680, "oxford-flowers": 2040, "vtab": 1000}

# What a source does not mention is not done.
NOT_DONE = dict(
    dropout=0.0, drop_path=0.0, layer_decay=1.0, mixup=0.0, cutmix=0.0, smoothing=0.0, erasing=0.0, randaugment=0.0,
    polyak=0.0, decay="cosine", clip=None,
)  # fmt: skip
ADAMW = dict(optimizer="adamw", betas=(0.9, 0.999))
MASKED = dict(mask_ratio=0.75, target="pixels")
# ViT, table 4, and appendix B.1.1: SGD with momentum, batch 512, no weight decay, cosine, clipped at norm 1, 20,000
# steps; vit_jax/configs/common.py:64-68: 0.03 of the grid {0.003, 0.01, 0.03, 0.06}, warm-up of 500 steps.
TABLE_4 = dict(
    optimizer="sgd", steps=20_000, epochs=None, batch_size=512, rate=0.03 / 2, warmup=500, weight_decay=0.0,
    crop=(0.08, 1.0), clip=1.0, pool="cls",
)  # fmt: skip
TABLE_9 = dict(mixup=0.8, cutmix=1.0, smoothing=0.1, randaugment=9.0, erasing=0.25, pool="mean")

# (source, command, numbers); rate: for a batch of 256, multiplied by batch / 256; warmup: steps, or a share of the run,
# or (n, "epochs").
PAPERS = [
    (
        "ViT, table 3, row ViT-B/16 ImageNet, columns epochs, base LR, LR decay, weight decay, dropout; its caption: "
        "batch 4096, warm-up of 10k steps, ImageNet clipped at norm 1; appendix B.1: Adam, beta 0.9 and 0.999",
        "--task supervised",
        ADAMW | dict(epochs=300, batch_size=4096, rate=3e-3 / 16, warmup=pytest.approx(10_000, rel=0.01),
                     weight_decay=0.3, dropout=0.1, clip=1.0, crop=(0.08, 1.0), pool="cls", pos_embed="1d"),
    ),
    (
        "the same for the ResNets that the paper compares with; they have neither dropout nor stochastic depth",
        "--task supervised --arch resnet50",
        ADAMW | dict(epochs=300, batch_size=4096, rate=3e-3 / 16, weight_decay=0.3, clip=1.0, crop=(0.08, 1.0),
                     img_size=(224, 224), pool=None, pos_embed=None),
    ),
    (
        "ViT, table 4, for ResNets too",
        "--task finetune --arch resnet50 --optimizer sgd",
        TABLE_4 | dict(pool=None, img_size=(384, 384)),
    ),
    (
        "ours: with AdamW there is one learning rate for all layers of a ResNet",
        "--task finetune --arch resnet50",
        ADAMW | TABLE_9 | dict(epochs=100, batch_size=1024, rate=5e-4, layer_decay=1.0, drop_path=0.0, pool=None),
    ),
    (
        "ViT, appendix B.1.2: base learning rate 2e-4, batch 4096, warm-up of 10k of 1M steps, cosine; weight decay "
        "0.1 from table 3, rows JFT, which it is made for. Epochs and crop are ours",
        "--task mpp",
        ADAMW | dict(epochs=300, batch_size=4096, rate=2e-4 / 16, warmup=938, weight_decay=0.1, crop=(0.2, 1.0),
                     pos_embed="1d"),
    ),
    (
        "MAE, table 8: AdamW (0.9, 0.95), base lr 1.5e-4, weight decay 0.05, batch 4096, cosine, warm-up 40, "
        "RandomResizedCrop; section 4: mask ratio 75 %, 800 epochs; main_pretrain.py: crops of 20 to 100 %",
        "--task mae",
        MASKED | dict(optimizer="adamw", betas=(0.9, 0.95), epochs=800, batch_size=4096, rate=1.5e-4, weight_decay=0.05,
                      warmup=(40, "epochs"), crop=(0.2, 1.0), mask="random", predictor_loss="none"),
    ),
    (
        "HPM, section 4 and pretrain_base.sh: MAE's, with hard masks and the relative loss; alpha from 0 to 0.5; "
        "util/misc.py:256: clipped at norm 5",
        "--task hpm",
        MASKED | dict(optimizer="adamw", betas=(0.9, 0.95), epochs=800, batch_size=4096, rate=1.5e-4, weight_decay=0.05,
                      warmup=(40, "epochs"), crop=(0.2, 1.0), mask="hard", predictor_loss="relative",
                      alpha=(0.0, 0.5), clip=5.0),
    ),
    *(
        (f"HPM, section 4: alpha up to {alpha} for the target {target}", f"--task hpm --target {target} {flags}",
         MASKED | dict(epochs=800, target=target, mask="hard", alpha=(0.0, alpha), clip=5.0))
        for target, flags, alpha in (
            ("norm-pixels", "", 0.5), ("hog", "", 0.5), ("ema", "", 0.2), ("dino", "--target-weights x.pt", 0.2),
            ("clip", "--target-weights x.pt", 0.2),
        )
    ),
    (
        "MAE's and HPM's main_pretrain.py: 40 epochs of warm-up, however long the run is",
        "--task hpm --epochs 200",
        dict(epochs=200, warmup=(40, "epochs"), clip=5.0),
    ),
    ("ours: at most half of a run is warm-up", "--task hpm --epochs 50",
     dict(epochs=50, warmup=(25, "epochs"), clip=5.0)),
    (
        "ours: at most half of a run is warm-up",
        "--task finetune --epochs 4",
        TABLE_9 | dict(epochs=4, warmup=(2, "epochs"), layer_decay=0.8, drop_path=0.1),
    ),
    (
        "HPM, finetune_base.sh: 100 epochs, warm-up 5, blr 5e-4, layer decay 0.8, weight decay 0.05, drop path 0.1, "
        "reprob 0.25, mixup 0.8, cutmix 1.0; the rest is MAE's, table 9: AdamW (0.9, 0.999), batch 1024, RandAug "
        "(9, 0.5), smoothing 0.1; main_finetune.py:110: global_pool",
        "--task finetune --arch vit_b16",
        ADAMW | TABLE_9 | dict(epochs=100, batch_size=1024, rate=5e-4, warmup=(5, "epochs"), weight_decay=0.05,
                               crop=(0.08, 1.0), layer_decay=0.8, drop_path=0.1),
    ),
    (
        "HPM, finetune_large.sh: that of ViT-B but for its length, 50 epochs",
        "--task finetune --arch vit_l16",
        ADAMW | TABLE_9 | dict(epochs=50, batch_size=1024, rate=5e-4, warmup=(5, "epochs"), weight_decay=0.05,
                               crop=(0.08, 1.0), layer_decay=0.8, drop_path=0.1),
    ),
    (
        "MAE, table 9, ViT-H, of which HPM says nothing: base lr 1e-3, layer decay 0.75, 50 epochs, drop path 0.2",
        "--task finetune --arch vit_h14",
        ADAMW | TABLE_9 | dict(epochs=50, batch_size=1024, rate=1e-3, warmup=(5, "epochs"), weight_decay=0.05,
                               crop=(0.08, 1.0), layer_decay=0.75, drop_path=0.2),
    ),
    *(
        (
            "ViT, table 4: the same for all sizes; its caption: 384 pixels if nothing else is said; section 4.1: "
            "518 for ViT-H/14 on ImageNet",
            f"--task finetune --arch {arch} --optimizer sgd",
            TABLE_4 | dict(img_size=(side, side)),
        )
        for arch, side in (("vit_b16", 384), ("vit_l16", 384), ("vit_h14", 518), ("r50_vit_b16", 384))
    ),
    (
        "MAE, table 10: base lr 0.1, no weight decay, 90 epochs, warm-up 10; its caption: SGD works similarly with a "
        "batch of 4096. Ours: no augmentation",
        "--task linear",
        dict(optimizer="sgd", epochs=90, batch_size=4096, rate=0.1, warmup=(10, "epochs"), weight_decay=0.0, crop=None,
             pool="cls"),
    ),
]  # fmt: skip

# Small data: nobody's numbers but ours, found by trying. The rest is that of the task's row above.
SMALL = ADAMW | dict(batch_size=128, warmup=0.05, weight_decay=0.05)
MASKED_SMALL = MASKED | SMALL | dict(betas=(0.9, 0.95))
PHOTOS = ADAMW | dict(batch_size=8, weight_decay=0.05)
MASKED_PHOTOS = MASKED | PHOTOS | dict(steps=24, rate=4e-3, warmup=0.1, crop=(0.2, 1.0), betas=(0.9, 0.95))
LINEAR = dict(optimizer="sgd", epochs=90, batch_size=1024, rate=0.1, warmup=0.1, crop=None)
UNTRAINED = dict(steps=0, batch_size=256, rate=0.0, warmup=0, weight_decay=0.0, crop=None)
OURS = [
    ("photos", "", PHOTOS | dict(steps=28, rate=1e-2, warmup=0.2, crop=(0.08, 1.0), clip=1.0)),
    ("photos", "--task mpp", PHOTOS | dict(steps=24, rate=4e-3, warmup=0.1, crop=(0.2, 1.0))),
    ("photos", "--task mae", MASKED_PHOTOS),
    ("photos", "--task hpm", MASKED_PHOTOS | dict(clip=5.0)),
    ("photos", "--task finetune", PHOTOS | dict(steps=24, rate=4e-3, warmup=0.2, crop=(0.08, 1.0), layer_decay=0.8)),
    ("photos", "--task linear", LINEAR),
    ("fashion-mnist", "", SMALL | dict(epochs=16, rate=4e-3, crop=0, clip=1.0)),
    ("fashion-mnist", "--task supervised --arch vit_micro7", SMALL | dict(epochs=24, rate=4e-3, crop=1, clip=1.0,
                                                                          img_size=(28, 28))),
    ("fashion-mnist", "--task mpp", SMALL | dict(epochs=16, rate=4e-3, crop=(0.5, 1.0))),
    ("fashion-mnist", "--task mae", MASKED_SMALL | dict(epochs=16, rate=4e-3, crop=(0.5, 1.0))),
    ("fashion-mnist", "--task hpm", MASKED_SMALL | dict(epochs=16, rate=4e-3, crop=(0.5, 1.0), clip=5.0)),
    ("fashion-mnist", "--task finetune", SMALL | dict(epochs=4, rate=4e-3, crop=0, layer_decay=0.8, pool="mean")),
    ("fashion-mnist", "--task linear", LINEAR),
    *(
        row
        for cifar in ("cifar10", "cifar100")
        for row in (
            (cifar, "", SMALL | dict(epochs=100, rate=2e-3, crop=4, clip=1.0)),
            (cifar, "--task mpp", SMALL | dict(epochs=200, rate=2e-3, crop=(0.2, 1.0))),
            (cifar, "--task mae", MASKED_SMALL | dict(epochs=200, rate=2e-3, crop=(0.2, 1.0))),
            (cifar, "--task hpm", MASKED_SMALL | dict(epochs=200, rate=2e-3, crop=(0.2, 1.0), clip=5.0)),
            (cifar, "--task finetune", SMALL | dict(epochs=50, rate=2e-3, crop=4, layer_decay=0.8)),
            (cifar, "--task linear", LINEAR),
            (cifar, "--task finetune --optimizer sgd", TABLE_4 | dict(steps=10_000, crop=4, img_size=(384, 384))),
            (cifar, "--task finetune --optimizer sgd --arch vit_micro4", TABLE_4 | dict(steps=10_000, crop=4,
                                                                                       img_size=(32, 32))),
        )
    ),
    *(
        row
        for scenes in ("scenes", "scenes-many")
        for row in (
            (scenes, "", SMALL | dict(epochs=8, rate=4e-3, crop=None, clip=1.0)),
            (scenes, "--task mpp", SMALL | dict(epochs=8, rate=4e-3, crop=None)),
            (scenes, "--task mae", MASKED_SMALL | dict(epochs=8, rate=4e-3, crop=None)),
            (scenes, "--task hpm", MASKED_SMALL | dict(epochs=8, rate=4e-3, crop=None, clip=5.0)),
            (scenes, "--task finetune", SMALL | dict(epochs=4, rate=4e-3, crop=None, layer_decay=0.8)),
            (scenes, "--task linear", LINEAR),
        )
    ),
    *(  # ours: with SGD as long as with AdamW
        (name, "--task finetune --optimizer sgd", dict(optimizer="sgd", rate=0.03 / 2, clip=1.0, pool="cls", **length))
        for name, length in (
            ("photos", dict(steps=24, batch_size=8, weight_decay=0.0)),
            ("fashion-mnist", dict(epochs=4, batch_size=128, weight_decay=0.0)),
        )
    ),
    *((name, f"--task {task}", UNTRAINED) for name in TRAINING_IMAGES for task in ("knn", "fewshot")),
]  # fmt: skip


@pytest.fixture
def data_sets(leave_no_trace, monkeypatch):
    """Every data set with as many training images as it has, and no pixels of its own: one black image many times."""

    def stand_in(name, channels=3):
        statistics = ((0.5,) * channels, (0.25,) * channels)
        splits = [
            data.InMemory(
                torch.zeros(1, channels, 32, 32, dtype=torch.uint8).expand(n, -1, -1, -1),
                torch.arange(n) % 10,
                *statistics,
            )
            for n in ((TRAINING_IMAGES | TRANSFER_IMAGES | dict(coco=COCO_IMAGES))[name], 100)
        ]
        return data.Dataset(name, list("abcdefghij"), *statistics, *splits)

    monkeypatch.setattr(data, "photos", lambda size: stand_in("photos"))
    monkeypatch.setattr(data, "fashion_mnist", lambda folder: stand_in("fashion-mnist", channels=1))
    monkeypatch.setattr(data, "cifar", lambda name, folder: stand_in(name))
    monkeypatch.setattr(scenes, "load", lambda folder, size, many: stand_in("scenes-many" if many else "scenes"))
    monkeypatch.setattr(image_folder, "load", lambda path: stand_in("folder"))
    monkeypatch.setattr(transfer, "load", lambda name, folder: stand_in(name.split(":")[0]))
    monkeypatch.setattr(coco, "load", lambda path: stand_in("coco"))


def compare(config, row, images):
    """Every number of a row, and that nothing is done that it does not mention, with the configuration."""
    expected, task = NOT_DONE | row, train.TASKS[config.task]
    found = dict(betas=task.betas, clip=task.clip.get(config.optimizer), rate=config.lr[0] * 256 / config.batch_size)
    found |= {name: getattr(config, name) for name in expected.keys() - found}
    if "rate" in expected:
        expected["rate"] = pytest.approx(expected["rate"])
    if expected.get("epochs"):
        expected["steps"], found["steps"] = math.ceil(expected["epochs"] * images / config.batch_size), config.steps
    if isinstance(expected.get("warmup"), tuple):  # epochs
        expected["warmup"] = pytest.approx(expected["warmup"][0] * images / config.batch_size, abs=1)
    elif isinstance(expected.get("warmup"), float):  # a share of the run
        expected["warmup"] = round(expected["warmup"] * config.steps)
    assert {name: found[name] for name in expected} == expected


# ViT, table 4: 500 steps for Pets and Flowers, 2,500 and a learning rate of 0.01 for VTAB, all at 384 pixels. Without
# crops for VTAB: Kolesnikov et al. leave them out "when appropriate", and its public loaders always.
SHORT = TABLE_4 | dict(steps=500, warmup=100, img_size=(384, 384))
TRANSFER = [
    ("imagenet-real", "--task finetune --optimizer sgd", TABLE_4 | dict(img_size=(384, 384))),
    ("imagenet-real", "--task finetune", ADAMW | TABLE_9 | dict(epochs=100, batch_size=1024, rate=5e-4, layer_decay=0.8,
                                                                drop_path=0.1, img_size=(224, 224))),
    ("oxford-pets", "--task finetune --optimizer sgd", SHORT),
    ("oxford-flowers", "--task finetune --optimizer sgd", SHORT),
    ("oxford-flowers", "--task finetune --optimizer sgd --arch vit_h14", SHORT | dict(img_size=(518, 518))),
    ("vtab", "--task finetune", TABLE_4 | dict(steps=2500, rate=0.01 / 2, crop=None, img_size=(384, 384))),
    ("vtab", "--task finetune --optimizer adamw", ADAMW | dict(epochs=100, crop=None, layer_decay=0.8, drop_path=0.1,
                                                               smoothing=0.1, pool="mean", batch_size=512)),
    ("vtab", "--task linear", LINEAR | dict(epochs=90, batch_size=512, warmup=(10, "epochs"))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "command", "numbers"), TRANSFER, ids=[f"{row[0]} {row[1]}" for row in TRANSFER])
def test_on_the_data_that_vit_transfers_to_every_default_is_the_papers(name, command, numbers, data_sets):
    where = ":some/path" if name in ("imagenet-real", "vtab") else ""
    config, _ = settings(command_of(command, name + where))
    compare(config, numbers, TRANSFER_IMAGES[name])


# detectron2, projects/ViTDet/configs/COCO/mask_rcnn_vitdet_{b_100ep,l_100ep,h_75ep}.py: 1e-4 for a batch of 64, steps
# at 8/9 and 26/27 of the run; configs/common/models/mask_rcnn_vitdet.py: windows of 14, stochastic depth of 0.1.
VITDET = ADAMW | dict(epochs=100, batch_size=64, rate=4e-4, warmup=250, decay="steps", weight_decay=0.1, crop=None,
                      layer_decay=0.7, drop_path=0.1, window=14, img_size=(1024, 1024))  # fmt: skip
DETECT = [
    ("coco", "--task detect", VITDET),
    ("coco", "--task detect --arch vit_l16", VITDET | dict(layer_decay=0.8, drop_path=0.4)),
    ("coco", "--task detect --arch vit_h14", VITDET | dict(
        epochs=75, layer_decay=0.9, drop_path=0.5, img_size=(1008, 1008))),
    ("scenes-many", "--task detect --arch vit_micro8", ADAMW | dict(
        steps=1200, batch_size=16, rate=3e-3 * 16, warmup=0.05, weight_decay=0.05, crop=None, layer_decay=0.8,
        window=0, img_size=(96, 96))),
    ("scenes-many", "--task segment --arch vit_micro8", ADAMW | dict(
        steps=4200, batch_size=16, rate=2e-2 * 16, warmup=0.05, weight_decay=0.05, crop=None, layer_decay=0.65,
        img_size=(96, 96))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "command", "numbers"), DETECT, ids=[f"{row[0]} {row[1]}" for row in DETECT])
def test_on_coco_every_default_is_vitdets(name, command, numbers, data_sets):
    """And on scenes ours."""
    config, _ = settings(command_of(command, "coco:some/path" if name == "coco" else name))
    compare(config, numbers, COCO_IMAGES if name == "coco" else TRAINING_IMAGES[name])


def command_of(task_and_flags, data_name):
    init = "--init x.pt" if any(task in task_and_flags for task in ("finetune", "linear", "knn", "fewshot")) else ""
    return f"{task_and_flags} --data {data_name} {init} --device cpu"


@pytest.mark.parametrize(("source", "command", "numbers"), PAPERS, ids=[row[1] for row in PAPERS])
def test_on_imagenet_every_default_is_the_papers(source, command, numbers, data_sets):
    """On folder:PATH nothing is scaled down."""
    config, _ = settings(command_of(command, "folder:imagenet"))
    compare(config, numbers, IMAGENET)


@pytest.mark.parametrize(("name", "command", "numbers"), OURS, ids=[f"{row[0]} {row[1]}" for row in OURS])
def test_on_small_data_every_default_is_ours(name, command, numbers, data_sets, monkeypatch):
    monkeypatch.setitem(TRAINING_IMAGES, "folder", 1000)
    config, _ = settings(command_of(command, "folder:x" if name == "folder" else name))
    compare(config, numbers, TRAINING_IMAGES[name])


ON_GPU = {  # steps, warm-up
    "supervised": (600, 120), "mpp": (600, 60), "mae": (600, 60), "hpm": (600, 60), "finetune": (600, 120),
    "knn": (0, 0),
}  # fmt: skip


@pytest.mark.parametrize("task", ON_GPU)
def test_on_a_gpu_photographs_are_trained_for_600_steps(task, data_sets, monkeypatch):
    """Ours. On two CPU cores the same command has to end within minutes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config, _ = settings(command_of(f"--task {task}", "photos").replace("--device cpu", ""))
    assert (config.device, config.dtype, config.compile) == ("cuda", "bfloat16", task != "knn")
    assert (config.steps, config.warmup) == ON_GPU[task]


def test_every_task_and_every_data_set_has_a_row():
    """And only those: what has no row here has no source."""
    tasks = [(name, command.split()[1] if command else "supervised") for name, command, _ in OURS]
    tasks += [("folder", command.split()[1]) for _, command, _ in PAPERS]
    # What has objects or masks, and what ViT transfers to, have tables of their own.
    names = {name.split(":")[0] for name in data.NAMES} - {*recipes.TRANSFER, "segment", "ade20k", "coco"}
    assert set(tasks) == {(name, task) for name in names for task in train.TASKS.keys() - set(recipes.DENSE)}


@pytest.mark.equation("learning rate")
@pytest.mark.parametrize("batch", [8, 24, 512])
def test_the_learning_rate_grows_with_the_batch_unless_given(batch, data_sets):
    """lr = base * B / 256 (Goyal et al. 2017; MAE, appendix A.1). The base on photographs is 0.01."""
    assert settings(f"--batch-size {batch}")[0].lr == (pytest.approx(0.01 * batch / 256),)
    assert settings(f"--batch-size {batch} --lr 0.007")[0].lr == (0.007,), "a learning rate that is given is not scaled"


@pytest.mark.parametrize(("epochs", "batch", "steps"), [(1, 8, 128), (2, 1000, 3), (0.5, 8, 64), (0.0001, 8, 1)])
def test_epochs_become_steps_rounded_up(epochs, batch, steps, data_sets):
    """Of the 1024 crops that are called an epoch; warm-up is a fifth of them on photographs."""
    config, _ = settings(f"--batch-size {batch} --epochs {epochs}")
    assert (config.steps, config.warmup) == (steps, round(steps / 5))


def test_the_momentum_rises_over_100_epochs():
    """HPM, section 4: from 0.999 linearly to 0.9999 in the first 100 epochs."""
    momenta = [hpm.ema_momentum(epoch) for epoch in (0, 25, 100, 500)]
    assert momenta == pytest.approx([0.999, 0.999225, 0.9999, 0.9999], abs=1e-12)


def test_constants_of_the_loop_are_those_of_the_papers():
    """ViT, appendix B.1.1: 10 % of small training sets choose the learning rate; figures 4 and 5: 5-shot. The 10
    shots are of its authors' later code."""
    assert (train.HELD_OUT, train.SHOTS) == (0.1, (5, 10))


def test_a_run_has_at_most_a_thousand_million_steps(data_sets):
    """However few epochs that are of this data, in such batches."""
    assert settings("--data folder:x --epochs 700 --batch-size 1 --micro-batch 1")[0].steps == 700 * IMAGENET
    with pytest.raises(ValueError, match=r"--steps 1281167000 is not possible"):
        settings("--data folder:x --epochs 1000 --batch-size 1")


# ---------------------------------------------------------------------------------------------
# What fits the data and the machine
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "processes", "command", "batch"),
    [
        (600, 1, "", 512), (600, 2, "", 512), (600, 3, "", 384), (600, 7, "", 448), (599, 1, "", 512),
        (1024, 1, "", 1024), (1023, 1, "", 512), (5, 1, "", 4), (1, 1, "", 1), (3, 8, "", 8),
        (600, 1, "--task hpm", 512), (600, 1, "--task mpp", 512), (600, 1, "--task finetune", 512),
        (600, 3, "--task finetune", 384), (600, 1, "--task linear", 512), (600, 1, "--labels 100", 64),
        (600, 1, "--task finetune --optimizer sgd", 512), (400, 1, "--task finetune --optimizer sgd", 256),
        (IMAGENET, 1, "", 4096), (IMAGENET, 3, "", 3072), (IMAGENET, 8, "", 4096), (5000, 1, "", 4096),
        (600, 1, "--batch-size 1000", 1000), (600, 1, "--batch-size 7", 7),
    ],
)  # fmt: skip
def test_a_batch_is_at_most_the_data(images, processes, command, batch, data_sets, monkeypatch):
    """n * 2^k for n processes: they share it, and it has divisors for a micro-batch. The learning rate follows it."""
    monkeypatch.setitem(TRAINING_IMAGES, "folder", images)
    monkeypatch.setattr(distributed, "WORLD_SIZE", processes)
    config, _ = settings(command_of(command or "--task supervised", "folder:x"))
    assert config.batch_size == batch
    rate = {"hpm": 1.5e-4, "mpp": 2e-4 / 16, "linear": 0.1, "finetune": 5e-4}.get(config.task, 3e-3 / 16)
    rate = 0.03 / 2 if "sgd" in command else rate
    assert config.lr == (pytest.approx(rate * batch / 256),)
    assert config.warmup <= config.steps
    assert batch // processes % config.micro_batch == 0


@pytest.mark.parametrize("arch", [*vit.ARCHS, *resnet.ARCHS])
@pytest.mark.parametrize("task", ["supervised", "hpm", "finetune", "linear", "knn"])
def test_a_laptop_trains_what_it_is_told(arch, task, data_sets, monkeypatch):
    """16 GiB, 600 images: some micro-batch is found for all; a quarter of the memory is not exceeded, unless by one."""
    if task == "hpm" and arch in resnet.ARCHS:
        return
    monkeypatch.setitem(TRAINING_IMAGES, "folder", 600)
    monkeypatch.setattr(recipes, "memory", lambda: 16 * 2**30)
    config, _ = settings(f"{command_of(f'--task {task}', 'folder:x')} --arch {arch} --img-size 224")
    share = 256 if task == "knn" else 512
    assert share % config.micro_batch == 0
    each = recipes.bytes_an_image(config)
    assert config.micro_batch == 1 or config.micro_batch * each <= 4 * 2**30
    assert config.micro_batch == share or 2 * config.micro_batch * each > 4 * 2**30, "nor is less taken than fits"


def test_a_small_vit_on_a_laptop_takes_32_images_at_a_time(data_sets, monkeypatch):
    """By hand: 32 floats * 4 bytes * 197 tokens * 384 * 12 blocks = 116 MB, of 4 GiB: 36, so 32. With two processes
    half of the memory is there for each, and with half of the patches hidden a decoder is most of it."""
    monkeypatch.setitem(TRAINING_IMAGES, "folder", 600)
    monkeypatch.setattr(recipes, "memory", lambda: 16 * 2**30)
    command = command_of("--task supervised --arch vit_s16", "folder:x")
    assert settings(command)[0].micro_batch == 32
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(distributed, "LOCAL_WORLD_SIZE", 2)
    assert settings(command)[0].micro_batch == 16
    monkeypatch.setattr(recipes, "memory", lambda: 2**20)
    assert settings(command)[0].micro_batch == 1, "one is always tried"


def test_where_the_system_does_not_tell_its_memory_8_gib_are_assumed(monkeypatch):
    """Windows has no os.sysconf; elsewhere it may not know."""
    monkeypatch.delattr(os, "sysconf")
    assert recipes.memory() == 8 * 2**30
    for error in (ValueError, OSError):

        def unknown(name, error=error):
            raise error

        monkeypatch.setattr(os, "sysconf", unknown, raising=False)
        assert recipes.memory() == 8 * 2**30


MEASURE = """
import re, sys, torch, train
from tests.engine.runs import settings
from engine import recipes
from torch.nn import functional as F
config, dataset = settings(sys.argv[1])
torch.manual_seed(0)
model = train.build(config, dataset)
def peak(n):
    images, noise = torch.zeros(n, 3, *config.img_size), None
    if config.task == "hpm":
        model(images, torch.rand(n, 196), 0.5)["loss"].backward()
    else:
        F.cross_entropy(model(images), torch.zeros(n).long()).backward()
    # Not ru_maxrss: that of a process that was forked starts with its parent's.
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
first = peak(1)
print((peak(9) - first) / 8 / recipes.bytes_an_image(config))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has /proc/self/status")
@pytest.mark.parametrize("command", ["--arch vit_ti16", "--arch vit_ti16 --dropout 0.1", "--arch vit_ti16 --task hpm",
                                     "--arch vit_s32", "--arch resnet50", "--arch r26_vit_s32"])  # fmt: skip
def test_the_estimate_of_memory_is_of_the_right_size(command):
    """The peak of a process, with nine images over that with one: never more than the estimate by much, nor a third."""
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, f"{command} --micro-batch 1 --batch-size 8 --steps 1 --device cpu"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert 1 / 3 < float(out.stdout.splitlines()[-1]) < 1.25, out.stdout


@pytest.mark.parametrize(
    ("images", "steps", "warmup"),
    [(IMAGENET, 20_000, 500), (50_000, 10_000, 500), (20_000, 10_000, 500), (3_680, 500, 100), (600, 500, 100)],
)
def test_fine_tuning_with_sgd_is_as_long_as_the_paper_says(images, steps, warmup, data_sets, monkeypatch):
    """ViT, table 4: 20,000 steps for ImageNet, 10,000 for CIFAR, 500 for Oxford's Pets (3,680 images) and Flowers;
    vit_jax/configs: 500 of them warm-up, of 500 steps 100 (augreg.py). --epochs and --steps win."""
    monkeypatch.setitem(TRAINING_IMAGES, "folder", images)
    command = command_of("--task finetune --optimizer sgd", "folder:x")
    config, _ = settings(command)
    assert (config.steps, config.warmup, config.epochs) == (steps, warmup, None)
    assert settings(f"{command} --steps 50")[0].warmup == 10
    assert settings(f"{command} --epochs 2")[0].steps == math.ceil(2 * images / config.batch_size)
