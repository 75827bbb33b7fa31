"""Train: one loop for every task.

    python train.py --arch vit_b16                              ViT-B/16 on photographs, nothing to download
    python train.py --arch vit_micro4 --data fashion-mnist      a small ViT, to the end, on a laptop
    python train.py --task hpm --arch vit_micro4 --data fashion-mnist
    python train.py --task linear --arch vit_micro4 --data fashion-mnist --init runs/hpm-…/last.pt

Tasks: supervised, from scratch; mpp, mae and hpm, pre-training without labels; finetune, linear, knn and fewshot
measure what pre-training was good for. From top to bottom: recipes, command line, models and their optimizer, the
loop. On several GPUs, `torchrun --nproc_per_node=8 train.py …`, see processes.py; what a run leaves behind, see
run_folder.py.
"""

import argparse
import copy
import difflib
import functools
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as compute_twice
from tqdm import tqdm

import data
import hpm
import mpp
import processes
import resnet
import vit
from evaluate import (
    autocast,
    evaluate,
    evaluate_pretraining,
    extract,
    few_shot,
    linear_probe,
    nearest_neighbours,
    plot_curves,
    plot_masks,
)
from run_folder import claim, load, new_run, old_run, read_log, save, start_log, write

# ---------------------------------------------------------------------------------------------
# Recipes: what a flag is when it is not given
# ---------------------------------------------------------------------------------------------

# lr is for 256 images: the peak learning rate is lr * batch size / 256. warmup is a share of the run.
# crop: the pad of a padded crop, or the scale of a random resized crop, or None.
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
    ("supervised", "cifar"): SMALL | dict(epochs=100, lr=2e-3, crop=4),
    # The ViT paper's masked patch prediction (appendix B.1.2): 2e-4 for a batch of 4096, warm-up 10k of 1M steps.
    ("mpp", "folder"): dict(
        epochs=300, batch_size=4096, lr=2e-4 / 16, warmup=0.01, weight_decay=0.1, crop=(0.2, 1.0)
    ),
    # MAE's and HPM's (MAE, table 8; HPM, section 4).
    ("pretrain", "folder"): dict(
        epochs=800, batch_size=4096, lr=1.5e-4, warmup=0.05, weight_decay=0.05, crop=(0.2, 1.0)
    ),
    ("pretrain", "photos"): dict(
        steps={"cpu": 24, "cuda": 600}, batch_size=8, lr=4e-3, warmup=0.1, weight_decay=0.05, crop=(0.2, 1.0)
    ),
    ("pretrain", "fashion-mnist"): SMALL | dict(epochs=16, lr=4e-3, crop=(0.5, 1.0)),
    ("pretrain", "cifar"): SMALL | dict(epochs=200, lr=2e-3, crop=(0.2, 1.0)),
    # MAE's for ViT-B (table 9), with HPM's layer decay.
    ("finetune", "folder"): dict(
        epochs=100, batch_size=1024, lr=5e-4, warmup=0.05, weight_decay=0.05, crop=(0.08, 1.0), layer_decay=0.8,
        drop_path=0.1, mixup=0.8, cutmix=1.0, smoothing=0.1, erasing=0.25, randaugment=9.0,
    ),
    ("finetune", "photos"): dict(
        steps={"cpu": 24, "cuda": 600}, batch_size=8, lr=4e-3, warmup=0.2, weight_decay=0.05, crop=(0.08, 1.0),
        layer_decay=0.8,
    ),
    ("finetune", "fashion-mnist"): SMALL | dict(epochs=4, lr=4e-3, crop=0, layer_decay=0.8),
    ("finetune", "cifar"): SMALL | dict(epochs=50, lr=2e-3, crop=4, layer_decay=0.8),
    # MAE's (table 10), with SGD in place of LARS.
    ("linear", "any"): dict(epochs=90, batch_size=1024, lr=0.1, warmup=0.1, weight_decay=0.0, crop=None),
} | {
    (task, "any"): dict(steps={"cpu": 0, "cuda": 0}, batch_size=256, lr=0.0, warmup=0.0, weight_decay=0.0, crop=None)
    for task in ("knn", "fewshot")
}  # fmt: skip
# The ViT paper's fine-tuning (table 4), with --optimizer sgd: these replace what stands above.
SGD_FINETUNE = dict(
    batch_size=512, lr=0.003 / 2, weight_decay=0.0, layer_decay=1.0, drop_path=0.0, mixup=0.0, cutmix=0.0,
    smoothing=0.0, erasing=0.0, randaugment=0.0,
)  # fmt: skip
OFF = dict(
    dropout=0.0, drop_path=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0, erasing=0.0, randaugment=0.0, layer_decay=1.0
)
BETAS = {"mae": (0.9, 0.95), "hpm": (0.9, 0.95)}  # else (0.9, 0.999)
CLIP = 1.0  # norm of the whole gradient, for the ViT paper's recipes (appendix B.1); MAE and HPM do not clip
SHOTS = (5, 10)  # examples a class, for few-shot evaluation
HELD_OUT = 0.1  # of the training images, to choose a learning rate; the paper's share for its small data sets
EVALUATIONS = 10  # of a run that has more epochs than that
SAVE_EVERY = 600  # seconds

# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------

AUTOENCODERS = ("mae", "hpm")
PRETRAINING = ("mpp", *AUTOENCODERS)
FROZEN = ("knn", "fewshot")  # measured without a step of training
CHOICES = {
    "task": ("supervised", *PRETRAINING, "finetune", "linear", *FROZEN),
    "arch": (*vit.ARCHS, *resnet.ARCHS),
    "device": ("cuda", "cpu"),
    "dtype": ("float32", "bfloat16"),
    "decay": ("cosine", "linear"),
    "pool": ("cls", "mean"),
    "pos_embed": tuple(vit.POS_EMBEDS.split()),
    "optimizer": ("adamw", "sgd"),
    "mask": ("random", "block", "grid", "hard"),
    "predictor_loss": ("relative", "absolute", "none"),
    "target": hpm.TARGETS,
}


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line instead of the usage
        self.exit(2, f"error: {message}; see python train.py --help\n")


def parse(argv):
    """The command line; flags that were not given are None."""
    parser = Parser(description="Train Vision Transformers.", allow_abbrev=False, usage="train.py [--FLAG VALUE …]")
    add = parser.add_argument
    add("--task", metavar="T", help=" | ".join(CHOICES["task"]))
    add(
        "--arch",
        metavar="A",
        help="vit_{ti,s,b,l,h}{8,14,16,32} | vit_micro4 | r50_vit_b16 … | resnet50 …; default vit_b16",
    )
    add("--data", metavar="D", help=f"{' | '.join(data.NAMES)}; default photos")
    add("--data-dir", metavar="DIR", help="where data files are and go; default $VIT_DATA, else data/")
    add("--labels", metavar="N", type=int, help="use N training images alone, the same number of each class")
    add("--deduplicate", metavar="D", help="drop training images that occur in the test set of this data")
    add("--init", metavar="PATH|URL", help="weights to start from: ours, timm, MAE, HPM, Hugging Face, Google")
    add("--out", metavar="DIR", help="run folder; default runs/TASK-ARCH-DATA")
    add("--overwrite", action="store_true", help="replace the run that is in --out")
    add("--resume", action="store_true", help="go on with the run that is in --out")
    add(
        "--img-size",
        metavar="PX",
        type=image_size,
        help="224, or HxW: 192x256; default 224, vit_micro4: the data's own",
    )
    add("--epochs", metavar="N", type=float, help="length of the run in epochs …")
    add("--steps", metavar="N", type=int, help="… or in steps")
    add("--batch-size", metavar="B", type=int, help="images a step")
    add("--micro-batch", metavar="M", type=int, help="images at a time, of a process; their gradients are added up")
    add("--optimizer", metavar="O", help="adamw | sgd (the ViT paper's fine-tuning); default adamw, linear: sgd")
    add(
        "--lr",
        type=numbers,
        help="peak learning rate, or several: 0.003,0.01; default the recipe's for 256 images * B/256",
    )
    add("--warmup", metavar="STEPS", type=int, help="steps of linear warm-up")
    add("--decay", metavar="D", help="cosine | linear; default cosine")
    add("--polyak", metavar="M", type=float, help="momentum of an average of the weights, as 0.9999; default 0, off")
    add("--layer-decay", metavar="F", type=float, help="learning rate of a layer over that of the next one, in (0, 1]")
    add("--weight-decay", metavar="W", type=float, help="decoupled; none on biases, norms, tokens and positions")
    add("--dropout", metavar="P", type=float, help="this and the next three in [0, 1); default the recipe's")
    add("--drop-path", metavar="P", type=float, help="stochastic depth")
    add("--smoothing", metavar="P", type=float, help="label smoothing")
    add("--erasing", metavar="P", type=float, help="random erasing")
    add("--mixup", metavar="A", type=float, help="parameter of its Beta distribution, 0 is off")
    add("--cutmix", metavar="A", type=float, help="the same for CutMix")
    add("--randaugment", metavar="M", type=float, help="magnitude of RandAugment, up to 10, 0 is off; folder: only")
    add("--pool", metavar="P", help="cls | mean; default cls, finetune: mean")
    add("--pos-embed", metavar="E", help=f"{vit.POS_EMBEDS.replace(' ', ' | ')}; default 1d, the arch's own")
    add("--mask-ratio", metavar="R", type=float, help="mae, hpm: hidden share of the patches; default 0.75")
    add("--mask", metavar="M", help="random | block | grid | hard; default hard for hpm, random for mae")
    add("--alpha", metavar="A0,AT", type=pair, help="share of hard patches at start and end; default 0,0.5")
    add("--predictor-loss", metavar="L", help="relative | absolute | none; default relative for hpm, none for mae")
    add("--target", metavar="T", help=f"{' | '.join(hpm.TARGETS)}; default pixels")
    add("--target-weights", metavar="PATH|URL", help="of the frozen ViT for the targets dino and clip")
    add("--seed", type=int, help="default 0")
    add("--device", metavar="D", help="cuda | cpu; default cuda where there is one")
    add("--dtype", metavar="T", help="float32 | bfloat16; default bfloat16 on cuda")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default on cuda")
    add("--checkpointing", action="store_true", default=None, help="less memory, more time: compute blocks twice")
    add("--fsdp", action="store_true", default=None, help="with torchrun: shard the parameters, for vit_l and vit_h")
    return parser.parse_args(argv)


def image_size(text):
    """224 or 192x256 -> (H, W)."""
    sides = [int(side) for side in text.split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError
    return sides[0], sides[-1]


def numbers(text):
    """0.01 -> 0.01, and 0.003,0.01 -> (0.003, 0.01)."""
    several = tuple(float(number) for number in text.split(","))
    return several if len(several) > 1 else several[0]


def pair(text):
    """0,0.5 -> (0.0, 0.5)."""
    try:
        first, second = (float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a pair of numbers; give two, as 0,0.5") from None
    return first, second


def configure(given):
    """Complete the command line from the recipe, and load the data: config, dataset.

    Raises ValueError for what does not fit, before anything is written.
    """
    config = argparse.Namespace(**{k: v for k, v in vars(given).items() if k not in ("out", "overwrite", "resume")})

    def default(**values):
        for name, value in values.items():
            if getattr(config, name, None) is None:
                setattr(config, name, value)

    default(task="supervised", arch="vit_b16", data="photos", seed=0, decay="cosine")
    default(device="cuda" if torch.cuda.is_available() else "cpu")
    default(dtype="bfloat16" if config.device == "cuda" else "float32", checkpointing=False, fsdp=False)
    default(compile=config.device == "cuda" and not config.fsdp)
    hard, features = config.task == "hpm", config.target in ("ema", "dino", "clip")
    default(mask="hard" if hard else "random", predictor_loss="relative" if hard else "none", mask_ratio=0.75)
    default(target="pixels", alpha=(0.0, 0.2 if features else 0.5))
    default(optimizer="sgd" if config.task == "linear" else "adamw")
    check(config)

    if config.arch in vit.ARCHS:
        arch = vit.ARCHS[config.arch]
        default(pool="mean" if (config.task, config.optimizer) == ("finetune", "adamw") else "cls")
        default(pos_embed=arch.get("pos_embed", "1d"))
        # Patches of 8 pixels and more: too few of them at 32.
        side = data.NATIVE_SIZE.get(config.data, 32) if arch["patch_size"] < 8 else 224
        default(img_size=(side, side))
        grid = vit.patch_grid(*config.img_size, arch["patch_size"])
        if config.task in AUTOENCODERS:
            hpm.count_hidden(math.prod(grid), config.mask_ratio)
    default(img_size=(224, 224), polyak=0.0)
    if config.arch in resnet.ARCHS:
        default(dropout=0.0, drop_path=0.0, layer_decay=1.0)
    dataset = load_dataset(config)

    task = "pretrain" if config.task in PRETRAINING else config.task
    name = dataset.name.rstrip("01")  # cifar10, cifar100: cifar
    recipe = RECIPES.get((config.task, name)) or RECIPES.get((task, name)) or RECIPES[task, "any"]
    recipe = OFF | recipe | (SGD_FINETUNE if (task, config.optimizer) == ("finetune", "sgd") else {})
    default(**{name: recipe[name] for name in ("batch_size", "weight_decay", "crop", *OFF)})
    default(micro_batch=config.batch_size // processes.COUNT, lr=recipe["lr"] * config.batch_size / 256)
    check_processes(config, dataset)
    if config.batch_size // processes.COUNT % config.micro_batch:
        of = f" / {processes.COUNT} processes" if processes.COUNT > 1 else ""
        raise ValueError(
            f"--micro-batch {config.micro_batch} does not divide --batch-size {config.batch_size}{of}; use a divisor"
        )
    if config.task in FROZEN or (config.steps is None and config.epochs is None and "steps" in recipe):
        config.steps = recipe["steps"][config.device]
    if config.steps is None:
        default(epochs=recipe.get("epochs"))
        config.steps = math.ceil(config.epochs * len(dataset.train) / config.batch_size)
    default(warmup=round(recipe["warmup"] * config.steps))
    return config, dataset


def load_dataset(config):
    """The data of a run; with --deduplicate, --labels and for few-shot evaluation a part of its training images."""
    dataset = data.load(config.data, config.img_size, config.data_dir)
    if config.deduplicate:
        tested = data.load(config.deduplicate, config.img_size, config.data_dir).test
        found = data.occurring(dataset.train, tested)
        where = f"the test set of {config.deduplicate}"
        say(f"dropped {found.sum():,} of {len(found):,} training images: they occur in {where}")
        dataset = dataset._replace(train=dataset.train.part((~found).nonzero()[:, 0]))
    labels = SHOTS[-1] * len(dataset.classes) if config.task == "fewshot" else config.labels
    if labels:
        dataset = dataset._replace(train=dataset.train.subset(labels, config.seed))
    return dataset


RANGES = (
    ("epochs steps batch_size micro_batch labels", lambda v: 0 < v < math.inf, "a number above 0"),
    ("lr", lambda v: all(0 < rate < math.inf for rate in (v if isinstance(v, tuple) else [v])), "a number above 0"),
    ("warmup weight_decay mixup cutmix seed", lambda v: 0 <= v < math.inf, "a number of at least 0"),
    ("dropout drop_path smoothing erasing polyak", lambda v: 0 <= v < 1, "a probability in [0, 1)"),
    ("randaugment", lambda v: 0 <= v <= 10, "a magnitude from 0 to 10"),
    ("layer_decay", lambda v: 0 < v <= 1, "a factor in (0, 1]"),
    ("alpha", lambda v: all(0 <= a <= 1 for a in v), "two shares in [0, 1], as 0,0.5"),
)


def check(config):
    """Raise ValueError for a flag with an unknown name or a number out of its range, and for flags at odds."""
    for flag, allowed in CHOICES.items():
        value = getattr(config, flag)
        if value is not None and value not in allowed:
            near = difflib.get_close_matches(value, allowed, n=1, cutoff=0)[0]
            flag = flag.replace("_", "-")
            raise ValueError(f"unknown --{flag} {value!r}; did you mean {near}? There are {', '.join(allowed)}")
    for names, allowed, what in RANGES:
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not allowed(value):
                raise ValueError(f"--{name.replace('_', '-')} {value} is out of range; give {what}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch finds no GPU; use --device cpu")
    if config.epochs and config.steps:
        raise ValueError("--epochs and --steps both set the length of the run; give one of them")
    if config.task in ("linear", *FROZEN, "finetune") and not config.init:
        raise ValueError(f"--task {config.task} measures weights: give some with --init, as runs/hpm-…/last.pt")
    for flag in ("pool", "pos_embed", "dropout", "drop_path"):
        if getattr(config, flag) is not None and config.arch in resnet.ARCHS:
            flag = flag.replace("_", "-")
            raise ValueError(f"--{flag} is of Transformers, and {config.arch} is none; leave it out")
    if config.task in AUTOENCODERS and config.pos_embed not in (None, "sincos"):
        raise ValueError(f"--task {config.task} has fixed sine-cosine positions; leave --pos-embed out")
    if config.task == "fewshot" and config.labels:
        raise ValueError(f"--task fewshot takes {SHOTS[0]} and {SHOTS[1]} images of each class; leave --labels out")
    if config.task in (*PRETRAINING, *FROZEN) and isinstance(config.lr, tuple):
        raise ValueError(f"several --lr are compared by accuracy, and --task {config.task} trains for none; give one")
    if config.polyak and config.task not in ("supervised", "finetune"):
        raise ValueError("--polyak averages the weights of a classifier: --task supervised or finetune; leave it out")
    if config.polyak and config.fsdp:
        raise ValueError("--polyak keeps a whole copy of the weights, and --fsdp shards them; leave one of them out")
    if config.task in AUTOENCODERS and config.target in ("dino", "clip") and not config.target_weights:
        raise ValueError(f"--target {config.target} needs the weights of that model: give them with --target-weights")
    if config.randaugment and not config.data.startswith("folder:"):
        raise ValueError("--randaugment works on folder:PATH data alone; leave it out")


def check_processes(config, dataset):
    """Raise ValueError for what can't be shared among as many processes as there are."""
    n = processes.COUNT
    if config.fsdp and n == 1:
        raise ValueError("--fsdp shards a model over several processes; start them with torchrun --nproc_per_node=…")
    if config.device == "cuda" and torch.cuda.device_count() < processes.LOCAL_COUNT:
        raise ValueError(
            f"{processes.LOCAL_COUNT} processes, but {torch.cuda.device_count()} GPUs; start as many as there are GPUs"
        )
    if config.batch_size % n:
        raise ValueError(f"--batch-size {config.batch_size} can't be shared by {n} processes; use a multiple of {n}")
    if n > 1 and config.batch_size // n % 2 and (config.mixup or config.cutmix):  # which blend neighbours
        raise ValueError(
            f"--batch-size {config.batch_size} gives {n} processes {config.batch_size // n} images each, and mixup and "
            f"cutmix need an even number; use a multiple of {2 * n}"
        )
    if len(dataset.test) < n:
        raise ValueError(f"{n} processes, but {len(dataset.test)} test images; use fewer processes")


# ---------------------------------------------------------------------------------------------
# Models, their optimizer, their schedule
# ---------------------------------------------------------------------------------------------


def build(config, dataset, resume=False):
    """The model of a run, weights loaded. Raises ValueError if they do not fit.

    resume: the weights will come from a checkpoint, --init need not be there; but a frozen encoder is in no checkpoint.
    With --checkpointing a block keeps its input alone, and computes the rest again in the backward pass.
    """
    channels, classes = len(dataset.mean), len(dataset.classes)
    names = ("pool", "pos_embed", "dropout", "drop_path") if config.arch in vit.ARCHS else ()
    options = {name: getattr(config, name) for name in names}
    if config.arch in vit.ARCHS and str(config.init).partition("?")[0].endswith(".npz"):
        options["gelu"] = "tanh"  # what Google's weights were trained with
    if config.task == "mpp":
        model = mpp.create(config.arch, config.img_size, dataset.mean, dataset.std, **options)
        start = model.encoder
    elif config.task in AUTOENCODERS:
        options = dict(mask=config.mask, mask_ratio=config.mask_ratio)
        if config.target in ("dino", "clip"):
            options["frozen"] = hpm.load_frozen(
                config.target, config.arch, config.img_size, config.target_weights, channels
            )
        model = hpm.create(config.arch, config.img_size, channels, config.target, config.predictor_loss, **options)
        start = model.student
    else:
        classes = classes if config.task in ("supervised", "finetune") else 0
        model = start = vit.create(config.arch, config.img_size, classes, channels, **options)
    if config.init and not (resume and config.task != "linear"):
        load_weights = hpm.load_weights if config.task in AUTOENCODERS else vit.load_weights
        for note in load_weights(start, config.init):
            say(f"{config.init}: {note}")
    if config.task in AUTOENCODERS and model.teacher is not None:
        hpm.ema_update(model.teacher, model.student, 0.0)  # the teacher starts as the student
    if config.checkpointing:
        for module in model.modules():
            if isinstance(module, vit.Block):
                module.forward = functools.partial(compute_twice, module.forward, use_reentrant=False)
    return model


def build_optimizer(model, config):
    """AdamW or SGD with momentum 0.9, weight decay on matrices alone, a learning rate for each layer."""
    groups = {}
    depth = 1 + max(
        [int(name.split(".")[1]) for name, _ in model.named_parameters() if name.startswith("blocks.")] or [0]
    )
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = config.weight_decay if p.ndim > 1 and not name.endswith(("token", "pos_embed")) else 0.0
            scale = config.layer_decay ** (depth + 1 - layer_number(name, depth))
            groups.setdefault((decay, scale), []).append(p)
    groups = [dict(params=ps, weight_decay=decay, scale=scale) for (decay, scale), ps in groups.items()]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=BETAS.get(config.task, (0.9, 0.999)), fused=True)


def layer_number(name, depth):
    """0 for what comes before the blocks, i + 1 for block i, depth + 1 for what comes after them."""
    if name.startswith(("patch_embed", "cls_token", "pos_embed", "row_pos_embed", "column_pos_embed", "norm_pre")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def learning_rate(step, steps, peak, warmup, decay="cosine"):
    """Linear warm-up over `warmup` steps, then cosine or linear decay that would reach 0 at `steps`.

    step counts from 0. ViT, appendix B.1.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)  # in [0, 1)
    return peak * (1 - progress if decay == "linear" else (1 + math.cos(math.pi * progress)) / 2)


def losses_of(model, images, targets, config, step, here):
    """What a task minimises, "loss", and what is logged beside it: scalars by name. here: these rows of the batch."""
    if config.task in PRETRAINING:
        noise = data.generator(config.seed, data.MASK, step, device=config.device)
        options = dict(generator=noise, batch=config.batch_size, here=here)
        if config.task in AUTOENCODERS:
            options["hard_fraction"] = hpm.hard_fraction(step, config.steps, *config.alpha)
        out = model(images, **options)
        return {name: out[name] for name in ("loss", "rec", "pred", "correlation", "accuracy") if name in out}
    # Labels (b,) or, after mixup and CutMix, probabilities (b, classes).
    return {"loss": F.cross_entropy(model(images), targets, label_smoothing=config.smoothing)}


# ---------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------


def disturb(images, targets, classes, config, step):
    """Random erasing, mixup and CutMix, where the run wants them."""
    draw = (config.seed, step, config.batch_size, processes.rows(config.batch_size))
    if config.erasing:
        images = data.erase(images, config.erasing, *draw)
    if config.mixup or config.cutmix:
        images, targets = data.mix(images, targets, classes, config.mixup, config.cutmix, *draw)
    return images, targets


def train_step(model, optimizer, images, targets, config, step):
    """One step of the optimizer, on this process's slice of the batch.

    Returns the losses by name and the norm of the gradient before clipping: scalars that nobody has read yet, so
    that the host need not wait for the device. The losses are means over the slice.
    """
    values, first = {}, processes.rows(config.batch_size).start
    # For dropout and stochastic depth, other numbers on each process.
    torch.manual_seed(data.generator(config.seed, data.MODEL, step, processes.RANK).initial_seed())
    # The slice goes through the model in micro-batches. All slices are of one length, and so is what each part of one
    # weighs in the mean: the gradients add up to that of the whole batch.
    for start in range(0, len(images), config.micro_batch):
        part = slice(start, min(start + config.micro_batch, len(images)))
        share = (part.stop - part.start) / len(images)
        # Gradients are averaged over the processes once they are complete.
        complete = part.stop == len(images) or not hasattr(model, "no_sync")
        with nullcontext() if complete else model.no_sync():
            with autocast(config):
                here = slice(first + part.start, first + part.stop)
                losses = losses_of(model, images[part], targets[part], config, step, here)
            (share * losses["loss"]).backward()
        for name, loss in losses.items():
            values[name] = values.get(name, 0) + share * loss.detach()
    clip = CLIP if config.task == "supervised" or (config.task, config.optimizer) == ("finetune", "sgd") else math.inf
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    values["grad_norm"] = norm.full_tensor() if config.fsdp else norm
    optimizer.step()
    optimizer.zero_grad()
    return values


def read(pending, done):
    """The means of what the steps up to `done` returned, over all processes.

    Raises FloatingPointError that names the first bad step.
    """
    names = list(pending[0])
    table = torch.stack([value for values in pending for value in values.values()])
    table = processes.total(table).view(-1, len(names)).cpu()  # here, and only here, the host waits for the device
    table /= processes.COUNT
    bad = (~table.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        found = ", ".join(f"{name} {value}" for name, value in zip(names, table[bad[0]].tolist(), strict=True))
        raise FloatingPointError(f"step {done - len(pending) + bad[0] + 1} is not finite: {found}")
    return dict(zip(names, table.mean(dim=0).tolist(), strict=True))


def train(config, model, dataset, out, checkpoint):
    """Run to the end, or until a signal. Returns the number of the signal, or 0.

    Raises FloatingPointError if a loss or a gradient is not finite; last.pt is then from before. Raises OSError if
    a file can't be written.
    """
    pretraining, teacher = config.task in PRETRAINING, getattr(model, "teacher", None)
    device, first_process = torch.device(config.device), processes.RANK == 0
    start, seconds = 0, 0.0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        start, seconds = checkpoint["step"], checkpoint["seconds"]
    # With --polyak the running average of the weights is what is tested and handed on.
    tested = copy.deepcopy(model).requires_grad_(False) if config.polyak else model
    if checkpoint and config.polyak:
        model.load_state_dict(checkpoint["running"])
    if config.compile:
        (model.student if config.task in AUTOENCODERS else model).compile()
        if teacher is not None:
            teacher.predict_loss = torch.compile(teacher.predict_loss)
    learner = processes.parallel(model, config.fsdp)
    optimizer = build_optimizer(model, config)
    if checkpoint:
        load_optimizer(optimizer, checkpoint["optimizer"])

    stop = [0]  # the signal that asks to stop: the step in progress is finished; a second signal kills
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: (stop.append(number), signal.signal(number, signal.SIG_DFL)))

    epoch = len(dataset.train) / config.batch_size  # in steps
    log_every = max(1, min(50, config.steps // 100))
    eval_every = max(math.ceil(epoch), config.steps // EVALUATIONS)
    steps, here = range(start, config.steps), processes.rows(config.batch_size)
    batches = dataset.train.train_batches(
        config.img_size, config.batch_size, steps, config.seed, config.crop, device, here
    )
    log = open(out / "log.jsonl" if first_process else os.devnull, "a", buffering=1)
    pending, saved = [], time.monotonic()
    clock = time.monotonic()
    with tqdm(
        total=config.steps, initial=start, unit="step", dynamic_ncols=True, disable=None if first_process else True
    ) as bar:
        for step, (images, targets) in enumerate(batches, start):
            line = dict(step=step + 1, epoch=(step + 1) / epoch)
            line["lr"] = learning_rate(step, config.steps, config.lr, config.warmup, config.decay)
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * line["lr"]
            images, targets = disturb(images, targets, len(dataset.classes), config, step)
            pending.append(train_step(learner, optimizer, images, targets, config, step))
            if teacher is not None:
                line["alpha"] = hpm.hard_fraction(step, config.steps, *config.alpha)
                line["momentum"] = hpm.ema_momentum(step / epoch)
                hpm.ema_update(teacher, model.student, line["momentum"])
            if config.polyak:  # a short run forgets its start sooner: at step t, m is at most (1 + t) / (10 + t)
                hpm.ema_update(tested, model, min(config.polyak, (1 + step) / (10 + step)))
            bar.update()

            done = step + 1
            # A signal may reach one process alone, and clocks differ: all have to do the same at the same step.
            stopping, due = processes.agree(stop[-1], time.monotonic() - saved > SAVE_EVERY)
            evaluating = done % eval_every == 0 or done == config.steps
            if not (evaluating or stopping or done % log_every == 0):
                continue
            line |= read(pending, done)
            elapsed = time.monotonic() - clock
            seconds += elapsed
            line |= dict(seconds=seconds, images_per_second=len(pending) * config.batch_size / elapsed)
            pending.clear()
            bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{line['lr']:.1e}")
            if evaluating:
                line |= (evaluate_pretraining if pretraining else evaluate)(tested, dataset.test, config)
            log.write(json.dumps(line) + "\n")
            if evaluating or stopping or due:
                state = dict(model=tested.state_dict(), optimizer=optimizer.state_dict())
                state |= {"running": model.state_dict()} if config.polyak else {}
                state = processes.whole(state) | dict(step=done, seconds=seconds, config=vars(config))
                if first_process:
                    save(out / "last.pt", state)
                    plot_curves(out, config)
                if config.task in AUTOENCODERS:
                    plot_masks(out, config, model, dataset, line.get("alpha", 0.0))
                saved = time.monotonic()
            if stopping and done < config.steps:
                return stopping
            clock = time.monotonic()
    return 0


def best_learning_rate(config, dataset, out):
    """The one of --lr that does best on a part of the training images that is held out (ViT, appendix B.1.1).

    Each makes as many steps, and has a run folder of its own in `out`. The best then trains on all images, anew.
    Raises FloatingPointError if none ends with finite weights.
    """
    held_out = data.balanced(dataset.train.labels, max(1, int(HELD_OUT * len(dataset.train))), config.seed)
    rest = torch.ones(len(dataset.train), dtype=torch.bool).index_fill(0, held_out, False).nonzero()[:, 0]
    dataset, scores = dataset._replace(train=dataset.train.part(rest), test=dataset.train.part(held_out)), {}
    for lr in config.lr:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop_now)
        trial, folder = argparse.Namespace(**vars(config) | {"lr": lr}), out / f"lr-{lr:g}"
        if processes.RANK == 0:
            folder.mkdir(exist_ok=True)
            start_log(folder, trial, None)
        torch.manual_seed(config.seed)
        model = build(trial, dataset).to(config.device)
        probe = linear_probe(model, dataset, trial) if config.task == "linear" else (model, dataset)
        try:
            stopped = train(trial, *probe, folder, None)
        except FloatingPointError as error:
            say(f"learning rate {lr:g}: {error}")
            continue
        if stopped:
            raise Stopped(stopped)
        scores[lr] = processes.decide(lambda folder=folder: read_log(folder)[-1]["top1"])
        say(f"learning rate {lr:g}: {scores[lr]:.2f} % top-1 on {len(held_out):,} training images that were held out")
    if not scores:
        raise FloatingPointError("all learning rates diverge")
    return max(scores, key=scores.get)


def load_optimizer(optimizer, saved):
    """Load the state_dict of an optimizer that may have had other shards, or none."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        i: {name: processes.sharded(v, params[i]) if v.shape == params[i].shape else v for name, v in values.items()}
        for i, values in saved["state"].items()
    }
    optimizer.load_state_dict(saved | {"state": state})


def finish(config, dataset, out, scores, seconds, params):
    """Write result.json, and print the same in words."""
    images = config.steps * config.batch_size
    result = dict(task=config.task, arch=config.arch, data=config.data, **scores, steps=config.steps)
    result |= dict(seconds=seconds, images_per_second=images / seconds, params=params)
    write(out / "result.json", json.dumps(result, indent=1) + "\n")
    for name, split in (("training", dataset.train), ("test", dataset.test)):
        if split.unreadable:
            print(f"skipped {len(split.unreadable)} of {len(split):,} {name} images that can't be decoded")
    words = {
        "top1": f"{{:.2f}} % top-1 on the test set (chance is {100 / len(dataset.classes):.1f} %)",
        "top5": "{:.2f} % top-5",
        **{f"top1_{n}shot": f"{{:.2f}} % top-1 from {n} images a class" for n in SHOTS},
        "test_rec": "a reconstruction loss of {:.4f} on test images",
        "test_correlation": "a rank correlation of {:.2f} between predicted and true loss",
    }
    reached = ", ".join(text.format(scores[name]) for name, text in words.items() if name in scores)
    effort = f"{config.steps:,} steps in {seconds:.0f} s, {images / seconds:.1f} images/s"
    effort = effort if config.steps else f"{seconds:.0f} s"  # nearest neighbours take no steps
    print(f"{config.task}: {config.arch} on {config.data} reached {reached}; {effort}; all in {out}")


def describe(config, dataset, params):
    """What is about to happen, in two lines."""
    size = "x".join(map(str, config.img_size))
    shared = f" on {processes.COUNT} processes" if processes.COUNT > 1 else ""
    return (
        f"{config.task}: {config.arch}, {params / 1e6:.1f}M parameters, on {config.data}: {len(dataset.classes)} "
        f"classes, {len(dataset.train):,} training and {len(dataset.test):,} test images of {size} pixels\n"
        f"{config.steps:,} steps of {config.batch_size} images, peak learning rate {config.lr:.2g}, "
        f"{config.device}, {config.dtype}{shared}"
    )


def say(text):
    """Print once, whatever the number of processes."""
    if processes.RANK == 0:
        print(text)


def complain(text, everywhere=False):
    """Print an error, once on each machine: all processes there meet the same one. everywhere: one process met it."""
    if everywhere or processes.LOCAL_RANK == 0:
        print(f"error: {text}", file=sys.stderr)


class Stopped(KeyboardInterrupt):
    """A signal came where there is no step to finish: before training, or while features are computed."""


def stop_now(number, frame):
    raise Stopped(number)


def main(argv=None):
    """Returns the exit code: 0 done, 1 something broke on the way, 2 bad input, 128 + the number of a signal."""
    given = parse(argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_now)
    out = None
    try:
        if given.resume:
            out, config = old_run(given)
            dataset = load_dataset(config)
            check_processes(config, dataset)
            checkpoint = load(out)
        else:
            config, dataset = configure(given)
            out, checkpoint = new_run(given), None
        dataset.train.randaugment = config.randaugment
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")  # on CUDA: TF32 for what autocast leaves in float32
        processes.start(config.device)
        model = build(config, dataset, resume=checkpoint is not None).to(config.device)
        out = processes.decide(lambda: claim(out, given))
        if isinstance(config.lr, tuple):
            config.lr = best_learning_rate(config, dataset, out)
        params = sum(p.numel() for p in model.parameters())
        say(describe(config, dataset, params))
        if processes.RANK == 0:
            start_log(out, config, checkpoint)
        return run(config, dataset, model, out, checkpoint, params)
    except (ValueError, data.UnreadableImages) as error:
        complain(error, everywhere=isinstance(error, data.UnreadableImages))
        return 2
    except FloatingPointError as error:
        complain(f"{error}; {kept(out)}; try a lower --lr")
        return 1
    except OSError as error:  # a full disk, above all
        complain(f"{error}; {kept(out)}", everywhere=True)
        return 1
    except RuntimeError as error:
        if not processes.is_alone(error):
            raise
        complain(f"another process is gone, see its message; {kept(out)}", everywhere=True)
        return 1
    except Stopped as stopped:
        say(how_to_go_on(out))
        return 128 + stopped.args[0]


def run(config, dataset, model, out, checkpoint, params):
    """What follows once everything fits: the exit code."""
    if config.task in FROZEN:
        clock, classes = time.monotonic(), len(dataset.classes)
        (features, labels), test = (extract(model, split, config) for split in (dataset.train, dataset.test))
        if config.task == "knn":
            scores = {"top1": nearest_neighbours((features, labels), test, classes)}
        else:
            few = {n: data.balanced(labels.cpu(), n * classes, config.seed).to(labels.device) for n in SHOTS}
            scores = {f"top1_{n}shot": few_shot((features[i], labels[i]), test, classes) for n, i in few.items()}
        seconds = time.monotonic() - clock
    else:
        probe = linear_probe(model, dataset, config) if config.task == "linear" else (model, dataset)
        stopped = train(config, *probe, out, checkpoint)
        if stopped:
            say(how_to_go_on(out))
            return 128 + stopped
        if processes.RANK == 0:
            last = read_log(out)[-1]
            scores = {name: last[name] for name in ("top1", "top5", "test_rec", "test_correlation") if name in last}
            seconds = last["seconds"]
    if processes.RANK == 0:
        finish(config, dataset, out, scores, seconds, params)
    return 0


def kept(out):
    """What is left after an error."""
    there = (out / "last.pt").exists()
    return f"{out / 'last.pt'} has the last good state" if there else "nothing was saved before"


def how_to_go_on(out):
    if out is None or not (out / "last.pt").exists():
        return "stopped before anything was saved; start again with the same command"
    several = f"torchrun --nproc_per_node={processes.LOCAL_COUNT}" if processes.COUNT > 1 else "python"
    return f"stopped; go on with: {several} train.py --resume --out {out}"


if __name__ == "__main__":
    code = main()
    processes.end()
    sys.exit(code)
