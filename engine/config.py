"""What a run is told: every flag once, and one line for each mistake.

    Config      a field for each flag: its type, its help, what it may be, and in which tasks it does something
    parse       the command line
    configure   the command line completed by a recipe of engine/recipes.py, and the data
    resumed     the same from the config.json of a run that goes on
    checks      of values, whoever gave them, and of flags that would do nothing

Each mistake is answered by a ValueError of one line: what was given, what is allowed, what to do.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import types
import typing
from pathlib import Path

import torch

import data
import hpm
import vit
from engine import coco, distributed, duplicates, pairs, recipes, weights
from engine.recipes import AUTOENCODERS, CLASSIFIERS, DENSE, PRETRAINING, TASKS, TRAINED, TRAINING_FREE
from related import positions, resnet

NOT_TRAINED = (*TRAINING_FREE, "predict")
NOT_PRETRAINING = (*CLASSIFIERS, "linear", *NOT_TRAINED)
WITH_DATA = (*TRAINED, *TRAINING_FREE)
LABELLED = tuple(task for task in WITH_DATA if task not in DENSE)  # an image has one class, if it has any
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


def crop(text):
    """A pad, 2, or two shares, 0.2,1."""
    try:
        return pair(text) if "," in text else int(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is no crop; give a pad, as 2, or two shares, as 0.2,1") from None


def gelu(text):
    """PyTorch calls the exact GELU "none", and so did older runs."""
    return "exact" if text == "none" else text


def path(text):
    """~/runs -> /home/me/runs, also in --out=~/runs, which the shell leaves as it is."""
    return os.path.expanduser(text)


class Range(typing.NamedTuple):
    contains: typing.Callable
    words: str


COUNT = Range(lambda v: 1 <= v <= 10**9, "a whole number above 0, at most 10^9")
IMAGES = Range(lambda v: 1 <= v <= 10**6, "a whole number above 0, at most 10^6")
PROBABILITY = Range(lambda v: 0 <= v < 1, "a probability in [0, 1)")
UP_TO_1000 = Range(lambda v: 0 <= v <= 1000, "a number of at least 0, at most 1000")
NOTHING = Range(lambda v: v in (0, (0,)), "0, for nothing is trained")
CROPS = Range(
    lambda v: 0 <= v <= 64 if isinstance(v, int) else 0 < v[0] <= v[1] <= 1, "a pad up to 64, or two shares in (0, 1]"
)


def flag(metavar, text, read=str, allowed=None, tasks=TASKS, saved=True):
    """A field of `Config`. metavar, text: as --help shows it; metavar None: there is no flag.

    read: from the command line's text to the value; allowed: names or a `Range`; tasks: those in which it does
    something; saved: whether config.json says it.
    """
    of = dict(metavar=metavar, text=text, read=read, allowed=allowed, tasks=tasks, saved=saved)
    return dataclasses.field(metadata=of)


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config:
    """All that a run is told. `main`, the building of models and the loop read it; what they call takes values."""

    task: str = flag("T", " | ".join(TASKS), str, TASKS)
    arch: str = flag("A", "vit_{ti,s,b,l,h}{8,14,16,32} | vit_micro{4,7,8} | r50_vit_b16 … | resnet50 …; default "
                     "vit_b16", str, ARCHS)
    data: str = flag("D", f"photos (default), {', '.join(data.NAMES[1:])}")
    data_dir: str | None = flag("DIR", "where data files are and go; default $VIT_DATA, else data/", path, None,
                                WITH_DATA)
    labels: int | None = flag("N", "use N training images alone, the same number of each class", int, COUNT,
                              ("knn", *TRAINED))
    test_images: int | None = flag("N", "score on N test images alone, the same number of each class", int, COUNT,
                                   WITH_DATA)
    deduplicate: str | None = flag("D", "drop training images that occur in the test set of this data", str, None,
                                   LABELLED)
    init: str | None = flag("PATH|URL", "weights to start from: ours, timm, MAE, HPM, Hugging Face, Google", path)
    init_grid: tuple[int, int] | None = flag(
        "RxC", "rows x columns of patches that the positions of --init are of, where its file does not say",
        image_size, Range(lambda v: 1 <= min(v) <= max(v) <= 1000, "rows and columns up to 1000, as 14x14"))
    images: str | None = flag("PATH", "predict: an image, or a folder of images", path, None, ("predict",))
    out: str | None = flag("DIR", "run folder; default runs/TASK-ARCH-DATA", path, saved=False)
    overwrite: bool = flag("", "replace the run that is in --out", bool, None, WITH_DATA, saved=False)
    resume: bool = flag("", "go on with the run that is in --out", bool, None, WITH_DATA, saved=False)
    img_size: tuple[int, int] = flag(
        "PX", "224, or HxW: 192x256; default the data's own if it has patches enough, else 224", image_size,
        Range(lambda v: 1 <= min(v) <= max(v) <= 4096, "one size up to 4096 pixels, or two, as 192x256"))
    epochs: float | None = flag("N", "length of the run in epochs …", float,
                                Range(lambda v: 0 < v <= 10**6, "a number above 0, at most 10^6"), TRAINED)
    steps: int = flag("N", "… or in steps; with --resume another length", int, COUNT, TRAINED)
    batch_size: int = flag("B", "images a step; default the recipe's, at most what there are", int, IMAGES, TRAINED)
    micro_batch: int | None = flag("M", "images at a time, of a process; gradients add up; default what fits", int,
                                   IMAGES)
    evaluations: int | None = flag("N", "score the run N times; default after each epoch, 10 times at most", int, COUNT,
                                   TRAINED)
    optimizer: str = flag("O", "adamw | sgd (the ViT paper's fine-tuning); default adamw, linear: sgd", str,
                          ("adamw", "sgd"), TRAINED)
    lr: tuple[float, ...] = flag(
        "LR", "peak learning rate, or several: 0.003,0.01; default the recipe's for 256 images * B/256", numbers,
        Range(lambda v: v and all(0 < lr <= 1e38 for lr in v), "a number above 0, at most 1e38"), TRAINED)
    warmup: int = flag("STEPS", "steps of linear warm-up", int,
                       Range(lambda v: 0 <= v <= 10**9, "a whole number of at least 0, at most 10^9"), TRAINED)
    decay: str = flag("D", "cosine | linear | steps; default cosine, segment linear, detect steps", str,
                      ("cosine", "linear", "steps"), TRAINED)
    polyak: float = flag("M", "momentum of an average of the weights, as 0.9999; default 0, off", float, PROBABILITY,
                         CLASSIFIERS)
    layer_decay: float = flag("F", "learning rate of a layer over that of the next one, in (0, 1]", float,
                              Range(lambda v: 0 < v <= 1, "a factor in (0, 1]"), (*CLASSIFIERS, *DENSE))
    weight_decay: float = flag("W", "decoupled; none on biases, norms, positions; on tokens in mae, hpm",
                               float, UP_TO_1000, TRAINED)
    crop: int | tuple[float, float] | None = flag(
        "C", "in training: 2, shift by up to 2 pixels; 0.2,1, resize a part of 20 to 100 %% of the area", crop, CROPS,
        (*CLASSIFIERS, *PRETRAINING))
    dropout: float = flag("P", "this and the next three in [0, 1); default the recipe's", float, PROBABILITY,
                          (*CLASSIFIERS, "mpp", "segment"))
    drop_path: float = flag("P", "stochastic depth", float, PROBABILITY, (*CLASSIFIERS, "mpp", *DENSE))
    smoothing: float = flag("P", "label smoothing", float, PROBABILITY, (*CLASSIFIERS, "linear"))
    erasing: float = flag("P", "random erasing", float, PROBABILITY, CLASSIFIERS)
    mixup: float = flag("A", "parameter of its Beta distribution, 0 is off", float, UP_TO_1000, CLASSIFIERS)
    cutmix: float = flag("A", "the same for CutMix", float, UP_TO_1000, CLASSIFIERS)
    randaugment: float = flag("M", "magnitude of RandAugment, up to 10, 0 is off; images in files", float,
                              Range(lambda v: 0 <= v <= 10, "a magnitude from 0 to 10"), CLASSIFIERS)
    head: str = flag("H", "linear | mlp, the ViT paper's in pre-training: a hidden layer; default linear", str,
                     ("linear", "mlp"), ("supervised",))
    pool: str | None = flag("P", "cls | mean; default cls, finetune: mean", str, ("cls", "mean"), NOT_PRETRAINING)
    pos_embed: str | None = flag("E", f"{' | '.join(POS_EMBEDS)}; default 1d, the arch's own", str, POS_EMBEDS,
                                 ("mpp", *NOT_PRETRAINING, *DENSE))
    gelu: str = flag("G", "exact | tanh; default tanh with weights of Google's, .npz", gelu, ("exact", "tanh"))
    pixels: str = flag("P", "own (the data's mean and std) | half (to [-1, 1]); default half with Google's", str,
                       ("own", "half"))
    mask_ratio: float = flag("R", "masked share of the patches; default 0.75", float,
                             Range(lambda v: 0 < v < 1, "a number between 0 and 1, as 0.75"), AUTOENCODERS)
    mask: str = flag("M", f"{' | '.join(hpm.MASKS)}; default hard for hpm, random for mae", str, tuple(hpm.MASKS),
                     AUTOENCODERS)
    alpha: tuple[float, float] = flag(
        "A0,AT", "share of hard patches at start and end; default 0,0.5, of feature targets 0,0.2", pair,
        Range(lambda v: all(0 <= a <= 1 for a in v), "two shares in [0, 1], as 0,0.5"), AUTOENCODERS)
    teacher: str = flag("T", f"{' | '.join(hpm.TEACHERS)}: how the teacher sees an image; default whole", str,
                        hpm.TEACHERS, ("hpm",))
    predictor_loss: str = flag("L", f"{' | '.join(hpm.PREDICTORS)}; default relative for hpm, none for mae", str,
                               hpm.PREDICTORS, AUTOENCODERS)
    target: str = flag("T", f"{' | '.join(hpm.TARGETS)}; default pixels", str, hpm.TARGETS, AUTOENCODERS)
    target_weights: str | None = flag("F", "of the frozen ViT for the targets dino and clip", path, None,
                                      AUTOENCODERS)
    seed: int = flag("SEED", "default 0", int,
                     Range(lambda v: 0 <= v < 2**63, "a whole number of at least 0, below 2^63"))
    workers: int | None = flag("N", "processes that decode images in files, 0 for none; default one a core", int,
                               Range(lambda v: 0 <= v <= 1000, "a whole number of at least 0, at most 1000"))
    device: str = flag("D", "cuda | cuda:N | mps | cpu; default cuda where there is one", str,
                       Range(lambda v: re.fullmatch(r"cpu|mps|cuda(:(0|[1-9]\d{0,3}))?", v),
                             "cuda, cuda:N, mps or cpu"))
    dtype: str = flag("T", "float32 | bfloat16; default bfloat16 on cuda", str, ("float32", "bfloat16"))
    compile: bool = flag("", "torch.compile; default on cuda", bool, None,
                         tuple(task for task in TRAINED if task != "detect"))  # where every step has other shapes
    checkpointing: bool = flag("", "less memory, more time: compute blocks twice", bool, None,
                               (*CLASSIFIERS, *PRETRAINING, *DENSE))
    fsdp: bool = flag("", "with torchrun: shard the parameters, for vit_l and vit_h", bool, None,
                      (*CLASSIFIERS, "linear", *PRETRAINING))
    inference: str = flag("I", "slide | whole: test images in windows, or squeezed; default slide", str,
                          ("slide", "whole"), ("segment",))
    window: int = flag("N", "all but four blocks attend within N x N patches, 0: none does; default for coco: 14", int,
                       Range(lambda v: 0 <= v <= 1000, "a whole number of at least 0, at most 1000"), ("detect",))
# fmt: on


FIELDS = dataclasses.fields(Config)
# When a run goes on; also --steps or --epochs, see `longer`, and another folder: with the same images.
MAY_CHANGE = ("device", "dtype", "compile", "data_dir", "fsdp", "checkpointing", "workers", "micro_batch")
ADDED = dict(
    init_grid=None,
    images=None,
    workers=None,
    teacher="whole",
    test_images=None,
    evaluations=None,
    head="linear",
    inference="slide",
    window=0,
)  # what older runs do not say, and did
# Of a run, what --task predict needs to do with images as it did.
OF_THE_MODEL = (
    "arch data img_size pool pos_embed gelu pixels mask_ratio mask alpha teacher predictor_loss target target_weights "
    "head inference window"
).split()


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line instead of the usage
        self.exit(2, f"error: {' '.join(message.split())[:300]}; see python train.py --help\n")


def parse(argv):
    """The command line as a namespace with a value for each flag; None where it was not given."""
    parser = Parser(allow_abbrev=False, usage="train.py [--FLAG VALUE …]")
    for field in FIELDS:
        how, name = field.metadata, shown(field.name)
        if how["read"] is bool:
            action = argparse.BooleanOptionalAction if field.name == "compile" else "store_true"
            parser.add_argument(name, action=action, default=None, help=how["text"])
        elif how["metavar"]:
            parser.add_argument(name, metavar=how["metavar"], type=how["read"], help=how["text"])
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------
# A complete configuration
# ---------------------------------------------------------------------------------------------


def configure(given):
    """Complete what `parse` returns from the recipe, and load the data: Config, data.Dataset.

    For --task predict there is no data set, and what makes the model is that of the run which --init is of. On CUDA
    micro_batch may stay None: what fits is measured there. Raises ValueError for what does not fit, before anything is
    allocated, downloaded or written.
    """
    values = argparse.Namespace(**vars(given))

    def default(**defaults):
        for name, value in defaults.items():
            if getattr(values, name) is None:
                setattr(values, name, value)

    check_values(given)
    default(task="supervised")
    check_tasks(given, values.task)
    check_needed(values)
    if values.init and Path(values.init).is_dir():  # a run's folder
        values.init = str(Path(values.init, "last.pt"))
    default(**trained_with(values.init, values.task))
    default(arch="vit_b16", data="scenes-many" if values.task in DENSE else "photos", seed=0)
    default(overwrite=False, resume=False, inference="slide")
    default(device="cuda" if torch.cuda.is_available() else "cpu")
    on_cuda, hard = device_type(values) == "cuda", values.task == "hpm"
    default(dtype="bfloat16" if on_cuda else "float32", checkpointing=False, fsdp=False)
    default(compile=on_cuda and not values.fsdp and values.task in TRAINED and values.task != "detect")
    default(mask="hard" if hard else "random", predictor_loss="relative" if hard else "none", mask_ratio=0.75)
    features = values.target in hpm.FEATURE_TARGETS
    default(target="pixels", teacher="whole", alpha=(0.0, 0.2 if features else 0.5))
    vtab = values.task == "finetune" and values.data.startswith("vtab:")
    default(optimizer="sgd" if values.task == "linear" or vtab else "adamw", gelu="exact", pixels="own", head="linear")
    check_use(given, values)

    if values.arch in resnet.RESNETS:
        default(dropout=0.0, drop_path=0.0, layer_decay=1.0)
        native = data.NATIVE_SIZE.get(values.data)
        default(img_size=(native, native) if native and "small" in resnet.RESNETS[values.arch] else None)
    else:
        arch = (vit.ARCHS | resnet.HYBRIDS)[values.arch]
        default(pool="mean" if (values.task, values.optimizer) == ("finetune", "adamw") else "cls")
        default(pos_embed=arch.get("pos_embed", "1d"))
        native = data.NATIVE_SIZE.get(values.data, 32)
        rows = native / arch["patch_size"]
        if rows >= 7 or (values.arch, rows) == ("vit_micro7", 4):  # elsewhere fewer patches are too few
            default(img_size=(native, native))
    side = recipes.side_of(values.task, values.arch, values.data, values.optimizer)
    default(img_size=(side, side), polyak=0.0)
    check_together(values)
    check_device(values)
    dataset = None if values.task == "predict" else load_dataset(values)

    images = len(dataset.train) if dataset else 0
    recipe = recipes.recipe_of(values.task, values.arch, values.data, values.optimizer, images)
    default(**{name: recipe[name] for name in ("weight_decay", *recipes.OFF)}, decay=recipe.get("decay", "cosine"))
    default(window=recipe.get("window", 0), crop=recipe["crop"])
    most = recipe["batch_size"]
    default(batch_size=most if values.task in NOT_TRAINED else recipes.batch_of(most, images))
    default(lr=(recipe["lr"] * values.batch_size / 256,))
    if not on_cuda or values.task in NOT_TRAINED:
        default(micro_batch=recipes.fitting_micro_batch(values))
    if dataset:
        check_processes(values, dataset)
    if values.steps is None and values.epochs is None and "steps" in recipe:
        values.steps = recipe["steps"]["cuda" if device_type(values) == "mps" else device_type(values)]
    if values.steps is None:
        default(epochs=recipe.get("epochs"))
        values.steps = math.ceil(values.epochs * images / values.batch_size)
    if "warmup_epochs" in recipe:
        steps = recipe["warmup_epochs"] * images / values.batch_size
        default(warmup=round(min(steps, values.steps / 2)))
    default(warmup=round(min(recipe.get("warmup", 0) * values.steps, recipe.get("warmup_steps", math.inf))))
    config = Config(**vars(values))
    check(config)
    return config, dataset


def trained_with(init, task):
    """What the weights of --init were trained with, as far as is known: gelu and pixels; for predict `OF_THE_MODEL`.

    Google's .npz files do not say it, but all of them are alike; a run's last.pt says it, or config.json beside it.
    """
    if init is None:
        return {}
    if init.partition("?")[0].endswith(".npz"):
        return dict(gelu="tanh", pixels="half")
    said = weights.metadata(init)["config"] if task == "predict" or Path(init).is_file() else None
    try:
        said = said or json.loads(Path(init).with_name("config.json").read_text())
        if not {"task", *OF_THE_MODEL[:7]} <= said.keys():  # of a program other than this
            return {}
    except (OSError, ValueError, AttributeError):
        return {}
    names = OF_THE_MODEL if task == "predict" else ("gelu", "pixels")
    found = {name: from_json(name, said[name]) for name in names if name in said}
    try:
        check_values(argparse.Namespace(**found))
    except ValueError as error:
        raise ValueError(f"the configuration of {init}: {error}") from None
    return found


def load_dataset(config):
    """The data of a run; with --deduplicate, --labels, --test-images and for few-shot evaluation a part of it."""

    def load(name):
        loaded = data.load(name, config.img_size, config.data_dir)
        if name.startswith(data.IN_FILES):
            loaded.train.workers = loaded.test.workers = config.workers
        return loaded

    dataset = load(config.data)
    if config.pixels == "half":
        dataset = data.to_plus_minus_1(dataset)
    if config.deduplicate:
        found = duplicates.occurring(dataset.train, load(config.deduplicate).test)
        where = f"the test set of {config.deduplicate}"
        distributed.print0(f"dropped {found.sum():,} of {len(found):,} training images: they occur in {where}")
        dataset = dataset._replace(train=dataset.train.part((~found).nonzero()[:, 0]))
    labels = SHOTS[-1] * len(dataset.classes) if config.task == "fewshot" else config.labels
    if labels:
        dataset = dataset._replace(train=dataset.train.subset(labels, config.seed))
    if config.test_images:  # the same ones whatever the seed: runs are compared on them
        dataset = dataset._replace(test=dataset.test.subset(config.test_images, 0))
    if config.task == "segment" and config.data.startswith("scenes"):
        dataset = pairs.of_scenes(dataset)
    if config.task == "detect" and config.data.startswith("scenes"):
        dataset = coco.of_scenes(dataset)
    return dataset


# ---------------------------------------------------------------------------------------------
# A run that goes on
# ---------------------------------------------------------------------------------------------


def resumed(given, saved, path):
    """The Config of a run that goes on: what its config.json at `path` says, and what may be given anew.

    saved: the content of the file. Raises ValueError for a file of another version, for values that are not allowed,
    and for a flag that contradicts it. --steps and --epochs wait for `longer`.
    """
    check_values(given)
    if not isinstance(saved, dict):
        raise ValueError(f"{path} holds no configuration; start anew with --overwrite")
    told = {}
    for field in FIELDS:
        if field.metadata["saved"]:
            if field.name not in ADDED | saved:
                raise ValueError(f"{path} says nothing of {field.name}: another version wrote it; start anew")
            told[field.name] = from_json(field.name, (ADDED | saved)[field.name])
    config = Config(**told, out=given.out, overwrite=False, resume=True)
    try:
        check(config)
        if len(config.lr) > 1:
            raise ValueError(f"--lr {show(config.lr)} is not possible; a run that goes on has one")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

    check_tasks(given, config.task)
    check_use(given, config)
    changed = {}
    for name, old in told.items():
        value = getattr(given, name, None)
        if value in (None, old) or name in ("steps", "epochs"):
            continue
        kinds = [str(v).partition(":")[:2] for v in (value, old)]  # of folder:PATH and the like
        moved = name in ("data", "deduplicate") and kinds[0] == kinds[1] and kinds[0][1]
        if name not in MAY_CHANGE and not moved:
            flag, folder = shown(name), path.parent
            raise ValueError(
                f"--resume: the run in {folder} has {flag} {show(old)}, not {show(value)}; leave {flag} out"
            )
        changed[name] = value
    config = dataclasses.replace(config, **changed)
    check_together(config)
    check_device(config)
    if config.micro_batch is None and device_type(config) != "cuda":
        config = dataclasses.replace(config, micro_batch=recipes.fitting_micro_batch(config))
    return config


def longer(config, given, images):
    """The Config of a run that goes on, with the length that --steps or --epochs give, if any; images: of an epoch.

    From there on its learning rate, and HPM's α_t, are those of a run that was as long from the start.
    """
    if given.steps is None and given.epochs is None:
        return config
    steps = given.steps or math.ceil(given.epochs * images / config.batch_size)
    longer = dataclasses.replace(config, steps=steps, epochs=given.epochs)
    check(longer)
    if steps != config.steps:
        distributed.print0(f"{steps:,} steps in place of {config.steps:,}: the schedule is that of the new length")
    return longer


def from_json(name, value):
    """The value of a field that JSON, which knows no tuples, has written; or an older run, in its words."""
    if isinstance(value, list):
        return tuple(value)
    if name == "lr" and isinstance(value, int | float):
        return (value,)
    return gelu(value) if name == "gelu" else value


def saved_values(config):
    """What config.json says: a dict."""
    return {field.name: getattr(config, field.name) for field in FIELDS if field.metadata["saved"]}


# ---------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------


def shown(name):
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def show(value):
    """A value as it would be typed, in one line: (0.0, 0.5) is 0.0,0.5. Of a number with 400 digits, some."""
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 300 else f"{text[:40]}…"


def device_type(config):
    """cuda, mps or cpu."""
    return config.device.partition(":")[0]


def check(config):
    """Raise ValueError unless a Config is complete, each value of it is possible, and they go together."""
    check_values(config, complete=True)
    check_needed(config)
    check_together(config)


def check_values(config, complete=False):
    """Raise ValueError for a value of another type, an unknown name, a number out of its range, an impossible path."""
    for field in FIELDS:
        value, allowed, name = getattr(config, field.name, None), field.metadata["allowed"], shown(field.name)
        if value is None and not complete:
            continue
        if complete and field.name in ("steps", "lr") and config.task in NOT_TRAINED:
            allowed = NOTHING
        words = allowed.words if isinstance(allowed, Range) else ", ".join(allowed or ("a text",))
        if not is_a(value, field.type):
            raise ValueError(
                f"{name} {show(value)} is not possible; give {'true or false' if field.type is bool else words}"
            )
        if value is None or field.type is bool:
            continue
        if isinstance(allowed, Range):
            if not allowed.contains(value):
                raise ValueError(f"{name} {show(value)} is not possible; give {words}")
        elif allowed and value not in allowed:
            near = difflib.get_close_matches(value, allowed, n=1, cutoff=0)[0]
            raise ValueError(f"unknown {name} {show(value)!r}; did you mean {near}? There are {words}")
        elif not allowed:
            check_text(name, value)


def is_a(value, kind):
    """Whether a value is of an annotated type, as `tuple[int, int] | None`. A float may be an int, no bool is."""
    if isinstance(kind, types.UnionType):
        return any(is_a(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, tuple):
            return False
        kinds = kinds[:1] * len(value) if Ellipsis in kinds else kinds
        return len(value) == len(kinds) and all(map(is_a, value, kinds))
    return type(value) in ((int, float) if kind is float else (kind,))


def check_text(name, text):
    """Raise ValueError for what is no path, URL or name of data on any system."""
    where = re.sub("^(folder|imagenet-real|vtab|segment|ade20k|coco):", "", text)
    if not where:
        raise ValueError(f"{name} is empty; give something, or leave it out")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in where):
        raise ValueError(f"{name} {show(text)} has control characters; rename it")
    if len(where) > 4000 or ("://" not in where and any(len(os.fsencode(part)) > 255 for part in where.split("/"))):
        raise ValueError(f"{name} {where[:40]}… is too long for a path; give a shorter one")
    if where.startswith("~") and os.path.expanduser(where) == where:
        raise ValueError(f"{name} {text}: there is no user {where.partition('/')[0][1:]} here; give the whole path")


def check_tasks(given, task):
    """Raise ValueError for a flag that does nothing in this task."""
    for field in FIELDS:
        tasks = field.metadata["tasks"]
        if getattr(given, field.name, None) is not None and task not in tasks:
            flag = f"--no-{field.name}" if getattr(given, field.name) is False else shown(field.name)
            others = ", ".join(other for other in TASKS if other in tasks)
            raise ValueError(f"{flag} does nothing in --task {task}, but in {others}; leave it out")


def check_use(given, config):
    """Raise ValueError for a flag that does nothing beside what else is chosen."""
    if given.epochs and given.steps:
        raise ValueError("--epochs and --steps both set the length of the run; give one of them")
    in_files = any(str(name).startswith(data.IN_FILES) for name in (config.data, config.deduplicate))
    sites = ("fashion", "cifar", "scenes", "oxford", "imagenet-real")
    downloaded = any(str(name).startswith(sites) for name in (config.data, config.deduplicate))
    nothing = (
        ("pool pos_embed dropout drop_path layer_decay gelu checkpointing init_grid", config.arch in resnet.RESNETS,
         f"for {config.arch}, which is no Transformer"),
        ("alpha teacher", config.mask != "hard", f"with --mask {config.mask}: it guides hard masks"),
        ("target_weights", config.target not in hpm.FROZEN_TARGETS, "without --target dino or clip"),
        ("randaugment", not str(config.data).startswith(data.IN_FILES) or str(config.data).startswith("vtab:"),
         "but with images that are decoded and cropped, as of folder:PATH"),
        ("crop", str(config.data).startswith("scenes"), "with scenes, which are others in every epoch"),
        ("head", config.arch in resnet.RESNETS, f"for {config.arch}, which has one layer"),
        ("workers", not in_files and config.task != "predict", "but with images of files, as of folder:PATH"),
        ("data_dir", not downloaded, "but with data that are downloaded, as fashion-mnist"),
        ("init_grid", not config.init, "without --init"),
        ("overwrite", config.resume, "with --resume: one goes on with the run, the other replaces it"),
    )  # fmt: skip
    for names, useless, where in nothing:
        for name in names.split() if useless else ():
            if getattr(given, name) is not None:
                raise ValueError(f"{shown(name)} does nothing {where}; leave it out")


def check_needed(config):
    """Raise ValueError if the weights or images are missing that a task is about."""
    if config.task in ("linear", *NOT_TRAINED, "finetune") and not config.init:
        raise ValueError(f"--task {config.task} takes weights: give some with --init, as runs/hpm-…/last.pt")
    if config.task == "predict" and not config.images:
        raise ValueError("--task predict needs images: give an image or a folder of them with --images")


def check_together(config):
    """Raise ValueError for values at odds. What is not known yet may be None."""
    if config.task in DENSE and config.arch in resnet.RESNETS:
        raise ValueError(f"--task {config.task} is built on a Transformer, and {config.arch} is none; use a vit_ arch")
    if config.task == "segment" and not config.data.startswith(("scenes", *data.WITH_MASKS)):
        raise ValueError(
            f"--task segment needs the class of every pixel, which {config.data} does not have; use scenes-many, "
            "segment:PATH or ade20k:PATH"
        )
    if config.task == "detect" and not config.data.startswith(("scenes", "coco:")):
        raise ValueError(
            f"--task detect needs the boxes of objects, which {config.data} does not have; use scenes-many, coco:PATH"
        )
    if config.task not in ("detect", "predict") and config.data.startswith("coco:"):
        raise ValueError(f"--data {config.data} has objects, and no class for an image; it is for --task detect")
    if config.task not in ("segment", "predict") and config.data.startswith(data.WITH_MASKS):
        raise ValueError(
            f"--data {config.data} has masks, and no class for an image; it is for --task segment, not {config.task}"
        )
    if config.task in PRETRAINING and config.arch in resnet.ARCHS:
        raise ValueError(
            f"{config.arch} starts with convolutions, which would look into the masked patches; use a vit_ arch"
        )
    if str(config.data).startswith("imagenet-real:") and config.task not in (*CLASSIFIERS, "predict"):
        raise ValueError(f"--task {config.task} has no score with ReaL's labels; give --data folder:PATH")
    if config.task in (*PRETRAINING, *DENSE) and config.lr and len(config.lr) > 1:
        raise ValueError(f"several --lr are compared by accuracy, and --task {config.task} trains for none; give one")
    if config.lr and len({f"{lr:g}" for lr in config.lr}) < len(config.lr):  # which names their folders
        raise ValueError(f"--lr {show(config.lr)} has the same learning rate twice; give it once")
    if config.polyak and config.fsdp:
        raise ValueError("--polyak keeps a whole copy of the weights, and --fsdp shards them; leave one of them out")
    if config.task in AUTOENCODERS and config.target in hpm.FROZEN_TARGETS and not config.target_weights:
        raise ValueError(f"--target {config.target} needs the weights of that model: give them with --target-weights")
    if config.warmup and config.steps and config.warmup > config.steps:
        raise ValueError(f"--warmup {config.warmup} is longer than the run of {config.steps} steps; give less")
    if config.arch not in resnet.RESNETS:
        if not config.pool or not config.pos_embed:
            raise ValueError(f"{config.arch} needs --pool and --pos-embed; leave them out for the default")
        grid = vit.patch_grid(*config.img_size, (vit.ARCHS | resnet.HYBRIDS)[config.arch]["patch_size"])
        if config.task in AUTOENCODERS:
            hpm.count_hidden(math.prod(grid), config.mask_ratio)
    if isinstance(getattr(config, "crop", None), int) and config.data.startswith(("photos", "scenes", *data.IN_FILES)):
        raise ValueError(f"--crop {config.crop} is a pad, for small images; {config.data} takes two shares, as 0.2,1")


def check_device(config):
    """Raise ValueError for a device that is not there, or that several processes can't share."""
    kind, index = device_type(config), config.device.partition(":")[2]
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {config.device}, but PyTorch finds no GPU; use --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps, but PyTorch finds no GPU of Apple's; use --device cpu")
    if distributed.WORLD_SIZE > 1 and (index or kind == "mps"):
        raise ValueError(
            f"--device {config.device} is one device, and torchrun gives each process its own; use cuda or cpu"
        )
    if index and int(index) >= torch.cuda.device_count():
        raise ValueError(f"--device {config.device}, but the GPUs are numbered up to {torch.cuda.device_count() - 1}")
    if kind == "cuda" and torch.cuda.device_count() < distributed.LOCAL_WORLD_SIZE:
        raise ValueError(
            f"{distributed.LOCAL_WORLD_SIZE} processes, but {torch.cuda.device_count()} GPUs; start as many as there "
            "are GPUs"
        )


def check_processes(config, dataset):
    """Raise ValueError for what can't be shared among as many processes as there are, or split into micro-batches."""
    n = distributed.WORLD_SIZE
    if config.fsdp and n == 1:
        raise ValueError("--fsdp shards a model over several processes; start them with torchrun --nproc_per_node=…")
    if config.batch_size % n:
        raise ValueError(f"--batch-size {config.batch_size} can't be shared by {n} processes; use a multiple of {n}")
    if n > 1 and config.batch_size // n % 2 and (config.mixup or config.cutmix):  # which blend neighbours
        raise ValueError(
            f"--batch-size {config.batch_size} gives {n} processes {config.batch_size // n} images each, and mixup and "
            f"cutmix need an even number; use a multiple of {2 * n}"
        )
    if len(dataset.test) < n:
        raise ValueError(f"{n} processes, but {len(dataset.test)} test images; use fewer processes")
    if not config.resume and config.micro_batch and config.batch_size // n % config.micro_batch:
        of = f" / {n} processes" if n > 1 else ""
        raise ValueError(
            f"--micro-batch {config.micro_batch} does not divide --batch-size {config.batch_size}{of}; use a divisor"
        )
