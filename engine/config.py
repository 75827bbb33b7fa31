"""What a run is told, and what it does where it is not told: every flag once, and the papers' recipes.

    Config      a field for each flag: its type, its help, what it may be
    RECIPES     what a flag is when it is not given, by task and data
    parse       the command line
    configure   the command line completed by a recipe, and the data
    resumed     the same from the config.json of a run that goes on

Each mistake is answered by a ValueError of one line: what was given, what is allowed, what to do.
"""

import argparse
import dataclasses
import difflib
import json
import math
import typing
from pathlib import Path

import torch

import data
import hpm
import vit
from engine import distributed, duplicates
from related import positions, resnet

AUTOENCODERS = ("mae", "hpm")
PRETRAINING = ("mpp", *AUTOENCODERS)
TRAINING_FREE = ("knn", "fewshot")  # measured without a step of training
TASKS = ("supervised", *PRETRAINING, "finetune", "linear", *TRAINING_FREE, "predict")
ARCHS = (*vit.ARCHS, *resnet.ARCHS)
POS_EMBEDS = ("none", "1d", "sincos", *positions.KINDS)
SHOTS = (5, 10)  # examples of each class, for few-shot evaluation

# ---------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------


def image_size(text):
    """224 or 192x256 -> (H, W)."""
    sides = [int(side) for side in text.split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError
    return sides[0], sides[-1]


def numbers(text):
    """0.01 -> (0.01,), and 0.003,0.01 -> (0.003, 0.01)."""
    return tuple(float(number) for number in text.split(","))


def pair(text):
    """0,0.5 -> (0.0, 0.5)."""
    try:
        first, second = numbers(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a pair of numbers; give two, as 0,0.5") from None
    return first, second


def gelu(text):
    """PyTorch calls the exact GELU "none", and so did older runs."""
    return "exact" if text == "none" else text


class Range(typing.NamedTuple):
    contains: typing.Callable
    words: str


POSITIVE = Range(lambda v: 0 < v < math.inf, "a number above 0")
NOT_NEGATIVE = Range(lambda v: 0 <= v < math.inf, "a number of at least 0")
PROBABILITY = Range(lambda v: 0 <= v < 1, "a probability in [0, 1)")


def flag(metavar, text, read=str, allowed=None, saved=True):
    """A field of `Config`. metavar, text: as --help shows it; without a metavar there is no flag.

    read: from the command line's text to the value; allowed: names or a `Range`; saved: whether config.json says it.
    """
    return dataclasses.field(metadata=dict(metavar=metavar, text=text, read=read, allowed=allowed, saved=saved))


@dataclasses.dataclass(frozen=True)
class Config:
    """All that a run is told. `main`, the building of models and the loop read it; what they call takes values."""

    task: str = flag("T", " | ".join(TASKS), allowed=TASKS)
    arch: str = flag(
        "A", "vit_{ti,s,b,l,h}{8,14,16,32} | vit_micro4 | r50_vit_b16 … | resnet50 …; default vit_b16", allowed=ARCHS
    )
    data: str = flag("D", f"{' | '.join(data.NAMES)}; default photos")
    data_dir: str | None = flag("DIR", "where data files are and go; default $VIT_DATA, else data/")
    labels: int | None = flag("N", "use N training images alone, the same number of each class", int, POSITIVE)
    deduplicate: str | None = flag("D", "drop training images that occur in the test set of this data")
    init: str | None = flag("PATH|URL", "weights to start from: ours, timm, MAE, HPM, Hugging Face, Google")
    init_grid: tuple[int, int] | None = flag(
        "RxC", "rows x columns of patches that the positions of --init are of, where its file does not say", image_size
    )
    images: str | None = flag("PATH", "predict: an image, or a folder of images")
    out: str | None = flag("DIR", "run folder; default runs/TASK-ARCH-DATA", saved=False)
    overwrite: bool = flag("", "replace the run that is in --out", bool, saved=False)
    resume: bool = flag("", "go on with the run that is in --out", bool, saved=False)
    img_size: tuple[int, int] = flag(
        "PX", "224, or HxW: 192x256; default 224, vit_micro4: the data's own", image_size,
        Range(lambda v: len(v) == 2 and min(v) >= 1, "one size in pixels, or two, as 192x256"),
    )  # fmt: skip
    epochs: float | None = flag("N", "length of the run in epochs …", float, POSITIVE)
    steps: int = flag("N", "… or in steps", int, POSITIVE)
    batch_size: int = flag("B", "images a step", int, POSITIVE)
    micro_batch: int = flag("M", "images at a time, of a process; their gradients are added up", int, POSITIVE)
    optimizer: str = flag(
        "O", "adamw | sgd (the ViT paper's fine-tuning); default adamw, linear: sgd", allowed=("adamw", "sgd")
    )
    lr: tuple[float, ...] = flag(
        "LR", "peak learning rate, or several: 0.003,0.01; default the recipe's for 256 images * B/256", numbers,
        Range(lambda v: all(0 < rate < math.inf for rate in v), "a number above 0"),
    )  # fmt: skip
    warmup: int = flag("STEPS", "steps of linear warm-up", int, NOT_NEGATIVE)
    decay: str = flag("D", "cosine | linear; default cosine", allowed=("cosine", "linear"))
    polyak: float = flag("M", "momentum of an average of the weights, as 0.9999; default 0, off", float, PROBABILITY)
    layer_decay: float = flag(
        "F", "learning rate of a layer over that of the next one, in (0, 1]", float,
        Range(lambda v: 0 < v <= 1, "a factor in (0, 1]"),
    )  # fmt: skip
    weight_decay: float = flag("W", "decoupled; none on biases, norms, tokens and positions", float, NOT_NEGATIVE)
    dropout: float = flag("P", "this and the next three in [0, 1); default the recipe's", float, PROBABILITY)
    drop_path: float = flag("P", "stochastic depth", float, PROBABILITY)
    smoothing: float = flag("P", "label smoothing", float, PROBABILITY)
    erasing: float = flag("P", "random erasing", float, PROBABILITY)
    mixup: float = flag("A", "parameter of its Beta distribution, 0 is off", float, NOT_NEGATIVE)
    cutmix: float = flag("A", "the same for CutMix", float, NOT_NEGATIVE)
    randaugment: float = flag(
        "M", "magnitude of RandAugment, up to 10, 0 is off; folder: only", float,
        Range(lambda v: 0 <= v <= 10, "a magnitude from 0 to 10"),
    )  # fmt: skip
    pool: str | None = flag("P", "cls | mean; default cls, finetune: mean", allowed=("cls", "mean"))
    pos_embed: str | None = flag("E", f"{' | '.join(POS_EMBEDS)}; default 1d, the arch's own", allowed=POS_EMBEDS)
    gelu: str = flag("G", "exact | tanh; default tanh with weights of Google's, .npz", gelu, ("exact", "tanh"))
    pixels: str = flag(
        "P", "own (the data's mean and std) | half (to [-1, 1]); default half with Google's", allowed=("own", "half")
    )
    mask_ratio: float = flag("R", "mae, hpm: masked share of the patches; default 0.75", float)
    mask: str = flag("M", f"{' | '.join(hpm.MASKS)}; default hard for hpm, random for mae", allowed=hpm.MASKS)
    alpha: tuple[float, float] = flag(
        "A0,AT", "share of hard patches at start and end; default 0,0.5", pair,
        Range(lambda v: len(v) == 2 and all(0 <= a <= 1 for a in v), "two shares in [0, 1], as 0,0.5"),
    )  # fmt: skip
    teacher: str = flag("T", "whole | in-turn: what the teacher sees; default whole", allowed=("whole", "in-turn"))
    predictor_loss: str = flag(
        "L", f"{' | '.join(hpm.PREDICTORS)}; default relative for hpm, none for mae", allowed=hpm.PREDICTORS
    )
    target: str = flag("T", f"{' | '.join(hpm.TARGETS)}; default pixels", allowed=hpm.TARGETS)
    target_weights: str | None = flag("PATH|URL", "of the frozen ViT for the targets dino and clip")
    seed: int = flag("SEED", "default 0", int, NOT_NEGATIVE)
    workers: int | None = flag(
        "N", "processes that decode images of folder:, 0 for none; default one a core", int, NOT_NEGATIVE
    )
    device: str = flag("D", "cuda | cuda:N | mps | cpu; default cuda where there is one")
    dtype: str = flag("T", "float32 | bfloat16; default bfloat16 on cuda", allowed=("float32", "bfloat16"))
    compile: bool = flag("", "torch.compile; default on cuda", bool)
    checkpointing: bool = flag("", "less memory, more time: compute blocks twice", bool)
    fsdp: bool = flag("", "with torchrun: shard the parameters, for vit_l and vit_h", bool)
    # The pad of a padded crop, the scale of a random resized crop, or None; each recipe has its own.
    crop: int | tuple[float, float] | None = flag(None, "of training images")


FIELDS = dataclasses.fields(Config)
MAY_CHANGE = ("device", "dtype", "compile", "data_dir", "fsdp", "checkpointing")  # when a run goes on


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line instead of the usage
        self.exit(2, f"error: {message}; see python train.py --help\n")


def parse(argv):
    """The command line as a namespace with a value for each flag; None where it was not given."""
    parser = Parser(description="Train Vision Transformers.", allow_abbrev=False, usage="train.py [--FLAG VALUE …]")
    for field in FIELDS:
        how, name = field.metadata, f"--{field.name.replace('_', '-')}"
        if how["read"] is bool:
            action = argparse.BooleanOptionalAction if field.name == "compile" else "store_true"
            parser.add_argument(name, action=action, default=None, help=how["text"])
        elif how["metavar"]:
            parser.add_argument(name, metavar=how["metavar"], type=how["read"], help=how["text"])
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------
# Recipes: what a flag is when it is not given
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
    ("finetune", "scenes"): SMALL | dict(epochs=4, lr=4e-3, crop=None, layer_decay=0.8),
    ("finetune", "cifar"): SMALL | dict(epochs=50, lr=2e-3, crop=4, layer_decay=0.8),
    # MAE's (table 10), with SGD in place of LARS, and without augmentation: so features are computed once.
    ("linear", "any"): dict(epochs=90, batch_size=1024, lr=0.1, warmup=0.1, weight_decay=0.0, crop=None),
} | {
    (task, "any"): dict(steps={"cpu": 0, "cuda": 0}, batch_size=256, lr=0.0, warmup=0.0, weight_decay=0.0, crop=None)
    for task in TRAINING_FREE
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


def recipe_of(task, arch, data_name, optimizer):
    """The recipe of a task: what stands in `RECIPES` for it, or for pre-training, or for any data."""
    name = data_name.rstrip("01")  # cifar10, cifar100: cifar
    kind = "pretrain" if task in PRETRAINING else task
    recipe = OFF | (RECIPES.get((task, name)) or RECIPES.get((kind, name)) or RECIPES[kind, "any"])
    if (task, name) == ("finetune", "folder"):
        recipe |= LARGE_FINETUNE.get(arch[:5], {})
    if (task, optimizer) == ("finetune", "sgd"):
        recipe |= SGD_FINETUNE
    return recipe


# ---------------------------------------------------------------------------------------------
# A complete configuration
# ---------------------------------------------------------------------------------------------


def configure(given):
    """Complete what `parse` returns from the recipe, and load the data: Config, data.Dataset.

    Raises ValueError for what does not fit, before anything is written.
    """
    values = argparse.Namespace(**vars(given))

    def default(**defaults):
        for name, value in defaults.items():
            if getattr(values, name) is None:
                setattr(values, name, value)

    default(task="supervised", arch="vit_b16", data="photos", seed=0, decay="cosine", overwrite=False, resume=False)
    default(device="cuda" if torch.cuda.is_available() else "cpu")
    default(dtype="bfloat16" if values.device.startswith("cuda") else "float32", checkpointing=False, fsdp=False)
    default(compile=values.device.startswith("cuda") and not values.fsdp)
    hard, features = values.task == "hpm", values.target in hpm.FEATURE_TARGETS
    default(mask="hard" if hard else "random", predictor_loss="relative" if hard else "none", mask_ratio=0.75)
    default(target="pixels", teacher="whole", alpha=(0.0, 0.2 if features else 0.5))
    default(optimizer="sgd" if values.task == "linear" else "adamw")
    default(**(dict(gelu="exact", pixels="own") | trained_with(values.init)))
    check(values)

    if values.arch in resnet.RESNETS:
        default(dropout=0.0, drop_path=0.0, layer_decay=1.0)
    else:
        arch = (vit.ARCHS | resnet.HYBRIDS)[values.arch]
        default(pool="mean" if (values.task, values.optimizer) == ("finetune", "adamw") else "cls")
        default(pos_embed=arch.get("pos_embed", "1d"))
        # Patches of 8 pixels and more: too few of them at 32.
        side = data.NATIVE_SIZE.get(values.data, 32) if arch["patch_size"] < 8 else 224
        default(img_size=(side, side))
        grid = vit.patch_grid(*values.img_size, arch["patch_size"])
        if values.task in AUTOENCODERS:
            hpm.count_hidden(math.prod(grid), values.mask_ratio)
    default(img_size=(224, 224), polyak=0.0)
    dataset = load_dataset(values)

    recipe = recipe_of(values.task, values.arch, dataset.name, values.optimizer)
    default(**{name: recipe[name] for name in ("batch_size", "weight_decay", *OFF)})
    default(micro_batch=values.batch_size // distributed.WORLD_SIZE, lr=(recipe["lr"] * values.batch_size / 256,))
    check_processes(values, dataset)
    if values.task in TRAINING_FREE or (values.steps is None and values.epochs is None and "steps" in recipe):
        values.steps = recipe["steps"]["cpu" if values.device == "cpu" else "cuda"]
    if values.steps is None:
        default(epochs=recipe.get("epochs"))
        values.steps = math.ceil(values.epochs * len(dataset.train) / values.batch_size)
    if "warmup_epochs" in recipe:
        steps = recipe["warmup_epochs"] * len(dataset.train) / values.batch_size
        default(warmup=round(min(steps, values.steps / 2)))
    default(warmup=round(recipe.get("warmup", 0) * values.steps))
    return Config(**vars(values), crop=recipe["crop"]), dataset


def trained_with(init):
    """What the weights of --init were trained with, as far as their file says: gelu and pixels.

    Google's .npz files do not say it, but all of them are alike; of a run's last.pt, config.json beside it says it.
    """
    if str(init).partition("?")[0].endswith(".npz"):
        return dict(gelu="tanh", pixels="half")
    try:
        said = json.loads(Path(str(init)).with_name("config.json").read_text())
        fitting = [field for field in FIELDS if field.name in ("gelu", "pixels")]
        said = {field.name: field.metadata["read"](said[field.name]) for field in fitting}
        return {field.name: said[field.name] for field in fitting if said[field.name] in field.metadata["allowed"]}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):  # no run's folder
        return {}


def load_dataset(config):
    """The data of a run; with --deduplicate, --labels and for few-shot evaluation a part of its training images."""
    dataset = data.load(config.data, config.img_size, config.data_dir)
    for split in (dataset.train, dataset.test):
        split.workers = config.workers
    if config.pixels == "half":
        dataset = data.to_plus_minus_1(dataset)
    if config.deduplicate:
        tested = data.load(config.deduplicate, config.img_size, config.data_dir).test
        found = duplicates.occurring(dataset.train, tested)
        where = f"the test set of {config.deduplicate}"
        distributed.print0(f"dropped {found.sum():,} of {len(found):,} training images: they occur in {where}")
        dataset = dataset._replace(train=dataset.train.part((~found).nonzero()[:, 0]))
    labels = SHOTS[-1] * len(dataset.classes) if config.task == "fewshot" else config.labels
    if labels:
        dataset = dataset._replace(train=dataset.train.subset(labels, config.seed))
    return dataset


def resumed(given, saved, path):
    """The Config of a run that goes on: what its config.json at `path` says, and what may be given anew.

    saved: the content of the file, a dict. Raises ValueError for a file of another version, for values that are not
    allowed, and for a flag that contradicts it.
    """
    folder, read = path.parent, {}
    for field in FIELDS:
        name, value = field.name, getattr(given, field.name, None)
        shown = f"--{name.replace('_', '-')}"
        if not field.metadata["saved"]:
            read[name] = value
            continue
        if name not in saved:
            raise ValueError(f"{path} says nothing of {name}: another version wrote it; start anew")
        old = saved[name]
        old = tuple(old) if isinstance(old, list) else (old,) if name == "lr" and isinstance(old, int | float) else old
        old = gelu(old) if name == "gelu" else old
        if value not in (None, old) and name not in MAY_CHANGE:
            raise ValueError(
                f"--resume: the run in {folder} has {shown} {show(old)}, not {show(value)}; leave {shown} out"
            )
        read[name] = old if value is None else value
    config = Config(**read | dict(resume=True, overwrite=False))
    check(config)
    return config


def show(value):
    """A value as it would be typed: (0.0, 0.5) is 0.0,0.5."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def saved_values(config):
    """What config.json says: a dict."""
    return {field.name: getattr(config, field.name) for field in FIELDS if field.metadata["saved"]}


# ---------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------


def check(config):
    """Raise ValueError for a flag with an unknown name or a number out of its range, and for flags at odds."""
    for field in FIELDS:
        value, allowed = getattr(config, field.name, None), field.metadata["allowed"]
        if value is None or allowed is None or (field.name in ("steps", "lr") and config.task in TRAINING_FREE):
            continue
        name = f"--{field.name.replace('_', '-')}"
        if isinstance(allowed, Range):
            if not allowed.contains(value):
                raise ValueError(f"{name} {show(value)} is out of range; give {allowed.words}")
        elif value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0)[0]
            raise ValueError(f"unknown {name} {value!r}; did you mean {near}? There are {', '.join(allowed)}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch finds no GPU; use --device cpu")
    if config.epochs and config.steps and not config.resume:
        raise ValueError("--epochs and --steps both set the length of the run; give one of them")
    if config.task in ("linear", *TRAINING_FREE, "finetune") and not config.init:
        raise ValueError(f"--task {config.task} measures weights: give some with --init, as runs/hpm-…/last.pt")
    if config.task in PRETRAINING and config.arch in resnet.ARCHS:
        raise ValueError(
            f"{config.arch} starts with convolutions, which would look into the masked patches; use a vit_ arch"
        )
    check_use(config)
    if config.task in PRETRAINING + TRAINING_FREE and config.lr and len(config.lr) > 1:
        raise ValueError(f"several --lr are compared by accuracy, and --task {config.task} trains for none; give one")
    if config.polyak and config.fsdp:
        raise ValueError("--polyak keeps a whole copy of the weights, and --fsdp shards them; leave one of them out")
    if config.task in AUTOENCODERS and config.target in ("dino", "clip") and not config.target_weights:
        raise ValueError(f"--target {config.target} needs the weights of that model: give them with --target-weights")


def check_use(config):
    """Raise ValueError for a flag that would do nothing."""
    for name in ("pool", "pos_embed", "dropout", "drop_path", "checkpointing"):
        if getattr(config, name) not in (None, False, 0.0) and config.arch in resnet.RESNETS:
            shown = name.replace("_", "-")
            raise ValueError(f"--{shown} is of Transformers, and {config.arch} is none; leave it out")
    unused = {"pool": PRETRAINING, "dropout": AUTOENCODERS, "drop_path": AUTOENCODERS}
    for name, tasks in unused.items():
        if config.task in tasks and getattr(config, name) and not config.resume:
            raise ValueError(f"--{name.replace('_', '-')} does nothing in --task {config.task}; leave it out")
    if config.task in AUTOENCODERS and config.pos_embed not in (None, "sincos") and not config.resume:
        raise ValueError(f"--task {config.task} has fixed sine-cosine positions; leave --pos-embed out")
    if config.task == "fewshot" and config.labels:
        raise ValueError(f"--task fewshot takes {SHOTS[0]} and {SHOTS[1]} images of each class; leave --labels out")
    if config.polyak and config.task not in ("supervised", "finetune"):
        raise ValueError("--polyak averages the weights of a classifier: --task supervised or finetune; leave it out")
    if config.randaugment and not config.data.startswith("folder:"):
        raise ValueError("--randaugment works on folder:PATH data alone; leave it out")


def check_processes(config, dataset):
    """Raise ValueError for what can't be shared among as many processes as there are, or split into micro-batches."""
    n = distributed.WORLD_SIZE
    if config.fsdp and n == 1:
        raise ValueError("--fsdp shards a model over several processes; start them with torchrun --nproc_per_node=…")
    if config.device == "cuda" and torch.cuda.device_count() < distributed.LOCAL_WORLD_SIZE:
        raise ValueError(
            f"{distributed.LOCAL_WORLD_SIZE} processes, but {torch.cuda.device_count()} GPUs; start as many as there "
            "are GPUs"
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
    if not config.resume and config.batch_size // n % config.micro_batch:
        of = f" / {n} processes" if n > 1 else ""
        raise ValueError(
            f"--micro-batch {config.micro_batch} does not divide --batch-size {config.batch_size}{of}; use a divisor"
        )
