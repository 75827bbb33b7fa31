"""The tasks, and what a run does where it is not told: the papers' recipes, fitted to the data and to the machine.

RECIPES               what a flag is when it is not given, by task and data
recipe_of             the recipe of a task on some data
side_of               how large the images are
batch_of              how many images a step has, where there are fewer than the recipe wants
fitting_micro_batch   how many of them go through a model at a time, on a CPU
"""

import math
import os

import hpm
import vit
from engine import distributed
from related import resnet

AUTOENCODERS = ("mae", "hpm")
PRETRAINING = ("mpp", *AUTOENCODERS)
TRAINING_FREE = ("knn", "fewshot")  # measured without a step of training
CLASSIFIERS = ("supervised", "finetune")
DENSE = ("segment", "detect")  # what is where in an image
TRAINED = (*CLASSIFIERS, "linear", *PRETRAINING, *DENSE)
TASKS = ("supervised", *PRETRAINING, "finetune", "linear", *TRAINING_FREE, *DENSE, "predict")

# ---------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------

# lr is for 256 images: the peak learning rate is lr * batch size / 256. warmup is a share of the run, warmup_epochs are
# those epochs, at most half of the run.
SMALL = dict(batch_size=128, warmup=0.05, weight_decay=0.05)
RECIPES = {
    # The ViT paper's for ImageNet-1k: table 3, 3e-3 for a batch of 4096, warm-up 10k of about 94k steps.
    ("supervised", "folder"): dict(
        epochs=300, batch_size=4096, lr=3e-3 / 16, warmup=0.107, weight_decay=0.3, dropout=0.1, crop=(0.08, 1.0)
    ),
    ("supervised", "photos"): dict(
        steps={"cpu": 28, "cuda": 600}, batch_size=8, lr=1e-2, warmup=0.2, weight_decay=0.05, crop=(0.08, 1.0)
    ),
    ("supervised", "fashion-mnist"): SMALL | dict(epochs=16, lr=4e-3, crop=0),
    # Every epoch lays the items over other photographs, at other places: a crop would only cut them.
    ("supervised", "scenes"): SMALL | dict(epochs=8, lr=4e-3, crop=None),
    ("supervised", "cifar"): SMALL | dict(epochs=100, lr=2e-3, crop=4),
    # The ViT paper's masked patch prediction (appendix B.1.2): 2e-4 for a batch of 4096, warm-up 10k of 1M steps.
    ("mpp", "folder"): dict(
        epochs=300, batch_size=4096, lr=2e-4 / 16, warmup=0.01, weight_decay=0.1, crop=(0.2, 1.0)
    ),
    # MAE's and HPM's (MAE, table 8; HPM, section 4); HPM's batches are of 2048 or 256 images.
    ("pretrain", "folder"): dict(
        epochs=800, batch_size=4096, lr=1.5e-4, warmup_epochs=40, weight_decay=0.05, crop=(0.2, 1.0)
    ),
    ("pretrain", "photos"): dict(
        steps={"cpu": 24, "cuda": 600}, batch_size=8, lr=4e-3, warmup=0.1, weight_decay=0.05, crop=(0.2, 1.0)
    ),
    ("pretrain", "fashion-mnist"): SMALL | dict(epochs=16, lr=4e-3, crop=(0.5, 1.0)),
    ("pretrain", "scenes"): SMALL | dict(epochs=8, lr=4e-3, crop=None),
    ("pretrain", "cifar"): SMALL | dict(epochs=200, lr=2e-3, crop=(0.2, 1.0)),
    # HPM's finetune_base.sh; what it leaves out is MAE's, table 9.
    ("finetune", "folder"): dict(
        epochs=100, batch_size=1024, lr=5e-4, warmup_epochs=5, weight_decay=0.05, crop=(0.08, 1.0), layer_decay=0.8,
        drop_path=0.1, mixup=0.8, cutmix=1.0, smoothing=0.1, erasing=0.25, randaugment=9.0,
    ),
    ("finetune", "photos"): dict(
        steps={"cpu": 24, "cuda": 600}, batch_size=8, lr=4e-3, warmup=0.2, weight_decay=0.05, crop=(0.08, 1.0),
        layer_decay=0.8,
    ),
    ("finetune", "fashion-mnist"): SMALL | dict(epochs=4, lr=4e-3, crop=0, layer_decay=0.8),
    ("finetune", "scenes"): SMALL | dict(epochs=4, lr=4e-3, crop=None, layer_decay=0.8),
    ("finetune", "cifar"): SMALL | dict(epochs=50, lr=2e-3, crop=4, layer_decay=0.8),
    # MAE's (table 10), and without augmentation: so features are computed once. SGD in place of LARS works as well at a
    # batch of 4096, its caption says.
    ("linear", "folder"): dict(epochs=90, batch_size=4096, lr=0.1, warmup_epochs=10, weight_decay=0.0, crop=None),
    ("linear", "any"): dict(epochs=90, batch_size=1024, lr=0.1, warmup=0.1, weight_decay=0.0, crop=None),
    # ADE20K as MAE (appendix A.4) and HPM: mmsegmentation's configs/mae, 1e-4 for a batch of 16. Its polynomial decay
    # has the power 1. How images are cropped stands in engine/pairs.py.
    ("segment", "any"): dict(
        steps={"cpu": 160_000, "cuda": 160_000}, batch_size=16, lr=1e-4 * 16, warmup_steps=1500, warmup=0.1,
        decay="linear", weight_decay=0.05, crop=None, layer_decay=0.65, drop_path=0.1, dropout=0.1,
    ),
    ("segment", "scenes"): dict(
        steps={"cpu": 4200, "cuda": 4200}, batch_size=16, lr=2e-2 * 16, warmup=0.05, weight_decay=0.05, crop=None,
        layer_decay=0.65,
    ),
    # COCO as MAE and HPM: detectron2's projects/ViTDet, mask_rcnn_vitdet_b_100ep.py: 1e-4 for a batch of 64.
    ("detect", "any"): dict(
        epochs=100, batch_size=64, lr=1e-4 * 4, warmup_steps=250, warmup=0.5, decay="steps", weight_decay=0.1,
        crop=None, layer_decay=0.7, drop_path=0.1, window=14,
    ),
    ("detect", "scenes"): dict(
        steps={"cpu": 1200, "cuda": 1200}, batch_size=16, lr=3e-3 * 16, warmup=0.05, weight_decay=0.05, crop=None,
        layer_decay=0.8,
    ),
} | {
    (task, "any"): dict(steps={"cpu": 0, "cuda": 0}, batch_size=256, lr=0.0, warmup=0.0, weight_decay=0.0, crop=None)
    for task in (*TRAINING_FREE, "predict")
}  # fmt: skip
# Ours, the soonest to 90 % on two CPU cores (docs/RESULTS.md): without the shifts it learns its images by heart.
FIRST_SUCCESS = dict(epochs=24, crop=1)
# Of larger models: HPM's finetune_large.sh, which is that of ViT-B but for its length, and MAE's table 9 for ViT-H, of
# which HPM says nothing.
LARGE_FINETUNE = {"vit_l": dict(epochs=50), "vit_h": dict(epochs=50, lr=1e-3, layer_decay=0.75, drop_path=0.2)}
# ViTDet's for ViT-L and ViT-H (mask_rcnn_vitdet_{l_100ep,h_75ep}.py).
LARGE_DETECT = {"vit_l": dict(layer_decay=0.8, drop_path=0.4), "vit_h": dict(epochs=75, layer_decay=0.9, drop_path=0.5)}
TRANSFER = ("imagenet-real", "oxford-pets", "oxford-flowers", "vtab")  # in files, as those of folder:PATH
OFF = dict(
    dropout=0.0, drop_path=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0, erasing=0.0, randaugment=0.0, layer_decay=1.0
)


def recipe_of(task, arch, data_name, optimizer, images):
    """The recipe of a task: what stands in `RECIPES` for it, or for pre-training, or for any data.

    images: in the training set. The ViT paper's fine-tuning, with SGD, has its length in steps.
    """
    name, vtab = kind_of(data_name), data_name.startswith("vtab:")
    kind = "pretrain" if task in PRETRAINING else task
    recipe = OFF | (RECIPES.get((task, name)) or RECIPES.get((kind, name)) or RECIPES[kind, "any"])
    if (task, name, arch) == ("supervised", "fashion-mnist", "vit_micro7"):
        recipe |= FIRST_SUCCESS
    if (task, name) == ("finetune", "folder"):
        recipe |= LARGE_FINETUNE.get(arch[:5], {})
    if task == "detect" and name != "scenes":
        recipe |= LARGE_DETECT.get(arch[:5], {})
    if task == "segment" and name != "scenes" and arch.startswith(("vit_l", "vit_h")):
        recipe |= dict(drop_path=0.2)  # BEiT's upernet_beit_large_24_512_slide_160k_ade20k_pt2ft.py
    if vtab:  # nothing that moves, turns or hides what a task may ask for
        recipe |= dict(crop=None, mixup=0.0, cutmix=0.0, erasing=0.0, randaugment=0.0)
    if (task, optimizer) == ("finetune", "sgd"):
        # Table 4, and 0.03 of its grid, which is the default of the authors' code; for VTAB it has 0.01 alone.
        recipe |= OFF | dict(lr=(0.01 if vtab else 0.03) / 2, weight_decay=0.0)
        if name in ("folder", "cifar"):
            # 20,000 steps for ImageNet's 1.28M images, 10,000 for CIFAR's 50,000, 500 for Pets' and Flowers' 2,000 to
            # 4,000, 2,500 for VTAB's 1,000; of warm-up 500, or 100 of 500 as in the authors' AugReg.
            steps = 20_000 if images >= 500_000 else 10_000 if images >= 20_000 else 2500 if vtab else 500
            recipe = {name: value for name, value in recipe.items() if name != "warmup_epochs"}
            recipe |= dict(batch_size=512, steps=dict(cpu=steps, cuda=steps), warmup=0.2, warmup_steps=500)
    return recipe


def kind_of(data_name):
    """Under which name `RECIPES` has data: cifar100 is cifar, what is in files is a folder."""
    name = data_name.partition(":")[0].rstrip("01").removesuffix("-many")
    return "folder" if name in TRANSFER else name


def side_of(task, arch, data_name, optimizer):
    """Pixels a side, where the data have no size that the architecture can do with.

    The ViT paper's fine-tuning: 384 (its table 4); for patches of 14, which do not divide that, the 518 of its table 2.
    """
    if task == "detect":
        return 1008 if arch.endswith("14") else 1024
    if task == "segment" and kind_of(data_name) != "scenes":
        return 518 if arch.endswith("14") else 512
    if (task, optimizer) != ("finetune", "sgd") or kind_of(data_name) not in ("folder", "cifar"):
        return 224
    return 518 if arch.endswith("14") else 384


def batch_of(most, images):
    """Images a step: `most`, as a recipe says; with fewer of them, or for processes that can't share it, the largest
    n * 2^k that there are, n being the number of processes. So a micro-batch is never far from what fits."""
    n = distributed.WORLD_SIZE
    if most <= images and most % (2 * n if n > 1 else 1) == 0:
        return most
    return n * 2 ** max(0, int(math.log2(max(1, min(most, images) / n))))


# ---------------------------------------------------------------------------------------------
# What fits in memory
# ---------------------------------------------------------------------------------------------

FLOATS = 32  # of each token, in each block, for each number of its width: 21 measured, 31 with dropout
UPERNET = 12  # of each pixel at stride 4, for each number of the width: 8 to 11 measured, with heads as wide
LOGITS_BYTES = 16 * 150  # of each pixel, of two heads, before and after the softmax, for ADE20K's classes
CONV_BYTES = 250  # of each pixel, in each bottleneck of the usual width: 185 measured at 224 pixels


def fitting_micro_batch(config):
    """How many images go through a model at a time where nothing can be measured: on a CPU.

    The largest divisor of a process's batch whose activations take a quarter of its share of the memory, at least 1.
    """
    share = max(1, config.batch_size // distributed.WORLD_SIZE)
    fits = memory() / 4 / distributed.LOCAL_WORLD_SIZE / bytes_an_image(config)
    return max(n for n in range(1, share + 1) if share % n == 0 and (n == 1 or n <= fits))


def memory():
    """Of the whole machine, in bytes; 8 GiB where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no os.sysconf
        return 8 * 2**30


def bytes_an_image(config):
    """What the activations of an image take until the backward pass, in float32; of a frozen encoder: of one block."""
    H, W = config.img_size
    known = (resnet.RESNETS | resnet.HYBRIDS | vit.ARCHS)[config.arch]
    bottlenecks = sum(known.get("depths", ())) * known.get("width", 1) + sum(known.get("backbone", ()))
    total = CONV_BYTES * bottlenecks * H * W
    if "patch_size" in known:
        tokens, D, depth = 1 + math.prod(vit.patch_grid(H, W, known["patch_size"])), known["dim"], known["depth"]
        depth = depth if config.task in TRAINED and config.task != "linear" else 1
        numbers = tokens * D * depth
        if config.task in AUTOENCODERS:  # the encoder sees what is visible, decoders see all
            d, blocks, _ = hpm.DECODERS.get(D, (512, 8, 16))
            numbers *= 1 - config.mask_ratio
            numbers += tokens * d * blocks * (1 if config.predictor_loss == "none" else 2)
        total += 4 * FLOATS * numbers
        if config.task == "segment":
            total += 4 * UPERNET * D * H * W / 16 + LOGITS_BYTES * H * W
    return total
