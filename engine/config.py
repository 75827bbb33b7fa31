"""What a run is told, and what it does when it is not told: the papers' recipes, and the command line over them.

First the recipes: what each flag is when it is not given, by task and data. Then the flags, what they may be, and one
line for each mistake.
"""

import argparse
import difflib
import json
import math
from pathlib import Path

import torch

import data
import hpm
import processes
import resnet
import vit

# ---------------------------------------------------------------------------------------------
# Recipes: what a flag is when it is not given
# ---------------------------------------------------------------------------------------------

# lr is for 256 images: the peak learning rate is lr * batch size / 256. warmup is a share of the run, warmup_epochs are
# those epochs, at most half of the run. crop: the pad of a padded crop, or the scale of a random resized crop, or None.
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
    # MAE's and HPM's (MAE, table 8; HPM, section 4); HPM's batches are of 2048 or 256 images.
    ("pretrain", "folder"): dict(
        epochs=800, batch_size=4096, lr=1.5e-4, warmup_epochs=40, weight_decay=0.05, crop=(0.2, 1.0)
    ),
    ("pretrain", "photos"): dict(
        steps={"cpu": 24, "cuda": 600}, batch_size=8, lr=4e-3, warmup=0.1, weight_decay=0.05, crop=(0.2, 1.0)
    ),
    ("pretrain", "fashion-mnist"): SMALL | dict(epochs=16, lr=4e-3, crop=(0.5, 1.0)),
    ("pretrain", "cifar"): SMALL | dict(epochs=200, lr=2e-3, crop=(0.2, 1.0)),
    # MAE's for ViT-B (table 9), with HPM's layer decay.
    ("finetune", "folder"): dict(
        epochs=100, batch_size=1024, lr=5e-4, warmup_epochs=5, weight_decay=0.05, crop=(0.08, 1.0), layer_decay=0.8,
        drop_path=0.1, mixup=0.8, cutmix=1.0, smoothing=0.1, erasing=0.25, randaugment=9.0,
    ),
    ("finetune", "photos"): dict(
        steps={"cpu": 24, "cuda": 600}, batch_size=8, lr=4e-3, warmup=0.2, weight_decay=0.05, crop=(0.08, 1.0),
        layer_decay=0.8,
    ),
    ("finetune", "fashion-mnist"): SMALL | dict(epochs=4, lr=4e-3, crop=0, layer_decay=0.8),
    ("finetune", "cifar"): SMALL | dict(epochs=50, lr=2e-3, crop=4, layer_decay=0.8),
    # MAE's (table 10), with SGD in place of LARS, and without augmentation: so features are computed once.
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
# MAE's fine-tuning of L and H (table 9).
LARGE_FINETUNE = {
    "vit_l": dict(epochs=50, drop_path=0.2, layer_decay=0.75),
    "vit_h": dict(epochs=50, drop_path=0.3, layer_decay=0.75),
}
OFF = dict(
    dropout=0.0, drop_path=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0, erasing=0.0, randaugment=0.0, layer_decay=1.0
)
SHOTS = (5, 10)  # examples a class, for few-shot evaluation

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
    "gelu": ("none", "tanh"),
    "pixels": ("own", "half"),
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
    add("--gelu", metavar="G", help="none (exact) | tanh; default tanh with weights of Google's, .npz")
    add(
        "--pixels", metavar="P", help="own (the data's mean, deviation) | half (to [-1, 1]); default half with Google's"
    )
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
    default(**(dict(gelu="none", pixels="own") | origin(config.init)))
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
    if (task, name) == ("finetune", "folder"):
        recipe = recipe | LARGE_FINETUNE.get(config.arch[:5], {})
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
    if "warmup_epochs" in recipe:
        steps = recipe["warmup_epochs"] * len(dataset.train) / config.batch_size
        default(warmup=round(min(steps, config.steps / 2)))
    default(warmup=round(recipe.get("warmup", 0) * config.steps))
    return config, dataset


def origin(init):
    """What the weights of --init were trained with, as far as their file says: gelu and pixels.

    Google's .npz files do not say it, but all of them are alike; of a run's last.pt, config.json beside it says it.
    """
    if str(init).partition("?")[0].endswith(".npz"):
        return dict(gelu="tanh", pixels="half")
    try:
        said = json.loads(Path(str(init)).with_name("config.json").read_text())
        return {name: said[name] for name in ("gelu", "pixels") if said.get(name) in CHOICES[name]}
    except (OSError, ValueError, AttributeError):  # no run's folder
        return {}


def load_dataset(config):
    """The data of a run; with --deduplicate, --labels and for few-shot evaluation a part of its training images."""
    dataset = data.load(config.data, config.img_size, config.data_dir)
    if config.pixels == "half":
        dataset = data.to_plus_minus_1(dataset)
    if config.deduplicate:
        tested = data.load(config.deduplicate, config.img_size, config.data_dir).test
        found = data.occurring(dataset.train, tested)
        where = f"the test set of {config.deduplicate}"
        processes.say(f"dropped {found.sum():,} of {len(found):,} training images: they occur in {where}")
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
    for flag in ("pool", "pos_embed", "dropout", "drop_path", "checkpointing"):
        if getattr(config, flag) not in (None, False) and config.arch in resnet.ARCHS:
            flag = flag.replace("_", "-")
            raise ValueError(f"--{flag} is of Transformers, and {config.arch} is none; leave it out")
    unused = {"pool": PRETRAINING, "dropout": AUTOENCODERS, "drop_path": AUTOENCODERS}
    for flag, tasks in unused.items():
        if config.task in tasks and getattr(config, flag):
            raise ValueError(f"--{flag.replace('_', '-')} does nothing in --task {config.task}; leave it out")
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
