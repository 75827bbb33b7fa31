"""What a trained model says of images: --task predict.

    python train.py --task predict --init runs/finetune-vit_b16-photos --images holiday/

Of a classifier, be it a run's or a public one: the most probable classes of each image, as a table on the screen and
in predictions.csv. Of a masked autoencoder: predictions.png, what it masks and rebuilds. Images are prepared as the
run's test images were, and classes have the run's names.
"""

import csv
import itertools
import math
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

import data
from downstream import probes
from engine import checkpoint as run_folder
from engine import distributed, files, image_folder, plots, weights

CLASSIFIERS, AUTOENCODERS = ("supervised", "finetune", "linear"), ("mae", "hpm")
TOP = 5  # classes that are told of an image
ROWS, PICTURES = 20, 6  # of the table on the screen, and of the picture
STATISTICS = {  # mean and std, as `data.load` gives them; all other data have ImageNet's
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def run(config, out, build):
    """Write what the model of --init says of --images: the exit code, 0.

    config  a `Config`; arch, img_size, pool and all else that makes the model are those of the run
    out     folder for what is written; None: that of the run, or this one for weights from the web
    build   (task, dataset) -> the model of a task, before any weights are loaded
    Raises ValueError if there is no such model, no such image, or if none of them can be read.
    """
    if distributed.WORLD_SIZE > 1:
        raise ValueError("--task predict runs in one process; start it with python in place of torchrun")
    init = source(config.init)
    saved = weights.metadata(init)
    trained = saved["config"] or {"task": "supervised", "data": None}  # else a file of weights alone
    task, name = trained["task"], trained["data"]
    if task not in CLASSIFIERS + AUTOENCODERS:
        allowed = ", ".join(CLASSIFIERS + AUTOENCODERS)
        raise ValueError(f"{init} is of --task {task}, which trains no classifier; give a run of {allowed}")
    mean, std = STATISTICS.get(name, (data.IMAGENET_MEAN, data.IMAGENET_STD))
    if config.pixels == "half":
        mean = std = (0.5,) * len(mean)
    images = Images(find(config.images), mean, std, name, config.workers)
    dataset = data.Dataset(name, saved["classes"], mean, std, None, images)
    if task in AUTOENCODERS:
        model = load_autoencoder(init, build(task, dataset))
    else:
        dataset, model = load_classifier(init, trained, dataset, build)
    model, out = model.to(config.device), folder(out, init)
    size = "x".join(map(str, config.img_size))
    print(f"predict: {config.arch} of {init}, {len(images):,} images brought to {size} pixels, {config.device}")
    if len(mean) == 1:
        print(f"colours become grey: {name} has one channel")
    draw(config, model, dataset, out) if task in AUTOENCODERS else tell(config, model, dataset, out)
    return 0


def source(init):
    """The weights that --init means: of a run's folder its last.pt."""
    return Path(init).expanduser() / "last.pt" if Path(init).expanduser().is_dir() else init


def folder(out, init):
    """Where files go, made if need be: `out`, or if that is None where the weights are. Raises ValueError."""
    if out is None:
        out = "." if is_url(init) else Path(init).expanduser().parent
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"nothing can be written to {out} ({error.strerror}); give another --out") from None
    return Path(out)


def is_url(init):
    return str(init).startswith(("http://", "https://"))


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------


def load_autoencoder(init, model):
    """An `hpm.HPM` with the weights of its run."""
    try:
        model.load_state_dict(read_run(init)["model"])
    except RuntimeError as error:
        raise ValueError(f"{init} does not fit its run's config: {str(error).splitlines()[-1].strip()}") from None
    return model


def load_classifier(init, trained, dataset, build):
    """The data with class names, and images -> logits. trained: the config of the run.

    Raises ValueError for weights without a classifier, or with parts that they do not have.
    """
    probe = read_run(init) if trained["task"] == "linear" else None
    head = (probe["model"] if probe else weights.read(init)).get("head.weight")
    if head is None:
        raise ValueError(f"{init} has no classifier; train one with --task finetune or linear, and give that run")
    if dataset.classes is None:
        print(f"{init} does not name its classes: they are numbers")
        dataset = dataset._replace(classes=[str(i) for i in range(len(head))])
    if len(dataset.classes) != len(head):
        raise ValueError(f"{init} names {len(dataset.classes)} classes, and its head has {len(head)}; it is damaged")
    start = trained["init"] if probe else init
    if probe and not is_url(start) and not Path(start).expanduser().is_file():
        raise ValueError(f"{init} is a linear probe of {start}, which is not there; start where that path leads to it")
    if probe and probe.get("init_digest") not in (None, weights.digest(start)):
        raise ValueError(f"{init} is a linear probe of {start}, which has changed since; bring the old file back")
    model = build("linear" if probe else "supervised", dataset)
    for note in weights.load(model, start):
        if "left at" in note and not probe:  # as the norm of another --pool: it would be another function
            raise ValueError(f"{init}: {note}; check --arch, and --pool cls or mean")
        print(f"{start}: {note}")
    if probe:
        model = probes.LinearProbe(model, model.dim, len(dataset.classes))
        model.load_state_dict(probe["model"])
    return dataset, model


def read_run(init):
    return run_folder.read_checkpoint(weights.cached(init) if is_url(init) else Path(init).expanduser())


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def find(path):
    """The image files at a path: itself, or all in the folder and below. Raises ValueError if there are none."""
    path = Path(path).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"--images {path}: there is no such file or folder; give an image, or a folder of images")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in image_folder.IMAGE_SUFFIXES)
    if not found:
        raise ValueError(f"--images {path}: no image in there; there may be {' '.join(image_folder.IMAGE_SUFFIXES)}")
    return found


class Images:
    """Image files as a split of `data.Dataset`: each is cut and resized as a test image of the data called `name`.

    mean, std: as of `data.InMemory`; for one channel, colours become grey by Pillow's weights. workers: threads that
    decode. Files that can't be decoded are black, with the label -1 in place of 0; `unreadable` says why.
    """

    def __init__(self, paths, mean, std, name, workers):
        self.paths, self.mean, self.std, self.unreadable = paths, mean, std, {}
        self.side = data.NATIVE_SIZE.get(name)
        # A folder: and a public model see the middle; in other data the whole image is what is to be classified.
        self.whole = name is not None and not name.startswith("folder:")
        self.workers = image_folder.workers() if workers is None else max(1, workers)

    def __len__(self):
        return len(self.paths)

    def read(self, path, size):
        """One file: (C, H, W) uint8."""
        crop_pct = 1.0 if self.whole or max(size) > 224 else 7 / 8
        try:
            image = image_folder.read_image(path, size, None, None, crop_pct=crop_pct)
        except Exception as error:  # whatever a decoder raises for a broken file
            self.unreadable[path] = str(error) or type(error).__name__
            tqdm.write(f"warning: skipped {path}: {self.unreadable[path]}", file=sys.stderr)
            image = torch.zeros(3, *size, dtype=torch.uint8)
        if len(self.mean) == 1:
            red, green, blue = image.int()
            image = ((19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16).byte()[None]
        return image

    def test_batches(self, size, batch_size, device, shard=slice(None)):
        """As of `data.InMemory`. Small images come in the size that the data have, before they are resized."""
        paths, own = self.paths[shard], (self.side, self.side) if self.side else size
        with ThreadPoolExecutor(self.workers) as pool:
            for some in (paths[i : i + batch_size] for i in range(0, len(paths), batch_size)):
                images = torch.stack(list(pool.map(lambda path: self.read(path, own), some)))
                labels = torch.tensor([-1 if path in self.unreadable else 0 for path in some])
                images, labels = (data.to_device(v, device) for v in (images, labels))
                yield data.normalise(data.resize(images, size), self.mean, self.std), labels


# ---------------------------------------------------------------------------------------------
# What it says
# ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def tell(config, model, dataset, out):
    """Write predictions.csv, a row for each image; print the first rows as a table. Raises ValueError if none can be
    read, and for probabilities that are not finite."""
    images, top = dataset.test, []
    bar = tqdm(total=len(images), unit="image", dynamic_ncols=True, disable=None)
    with bar, probes.evaluating(model):
        for batch, _ in images.test_batches(config.img_size, config.micro_batch, torch.device(config.device)):
            with probes.autocast(config.device, config.dtype):
                logits = model(batch).float()  # (b, classes)
            top.append(logits.softmax(dim=1).topk(min(TOP, len(dataset.classes))))  # (b, k) each
            bar.update(len(batch))
    probabilities, labels = (torch.cat(part).tolist() for part in zip(*top, strict=True))  # n lists of k
    if not all(map(math.isfinite, itertools.chain(*probabilities))):
        raise ValueError("the probabilities are not finite: something went wrong in this model's training")
    ranks = range(1, len(labels[0]) + 1)
    path = out / "predictions.csv"
    with files.whole(path) as part, open(part, "w", newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(["file", *(f"{what} {rank}" for rank in ranks for what in ("class", "probability")), "problem"])
        for name, shares, classes in zip(images.paths, probabilities, labels, strict=True):
            told = [cell for c, p in zip(classes, shares, strict=True) for cell in (dataset.classes[c], f"{p:.6g}")]
            problem = images.unreadable.get(name, "")
            table.writerow([name, *("" if problem else cell for cell in told), problem])
    for name, shares, classes in list(zip(images.paths, probabilities, labels, strict=True))[:ROWS]:
        told = " | ".join(f"{p:6.1%} {printable(dataset.classes[c])}" for c, p in zip(classes, shares, strict=True))
        print(f"{printable(name, 40):40}  {'can not be read' if name in images.unreadable else told}")
    if len(images) > ROWS:
        print(f"… and {len(images) - ROWS:,} more")
    if len(images.unreadable) == len(images):
        raise ValueError(f"none of {len(images):,} images can be read; {path} says why")
    unreadable = f", {len(images.unreadable):,} of them can't be read" * bool(images.unreadable)
    print(f"predict: {len(images):,} images{unreadable}; all in {path}")


def printable(text, width=30):
    """A name for the screen: nothing in it moves the cursor, and the middle of a long one is left out."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return text if len(text) <= width else f"{text[: width // 2 - 1]}…{text[-(width // 2) :]}"


def draw(config, model, dataset, out):
    """predictions.png: `plots.plot_masks` of the first images that can be read, with the mask of the end of a run."""
    images = dataset.test
    paths = (p for p in images.paths if images.read(p, config.img_size) is not None and p not in images.unreadable)
    images.paths = list(itertools.islice(paths, PICTURES))
    if not images.paths:
        raise ValueError(f"none of {len(images.unreadable):,} images at {config.images} can be read")
    with tempfile.TemporaryDirectory(dir=out) as folder:  # beside masks.png, which is the run's own
        how = config.img_size, config.alpha[1], config.seed, config.device, config.dtype
        plots.plot_masks(Path(folder), model, dataset, *how)
        Path(folder, "masks.png").replace(out / "predictions.png")
    print(f"predict: {out / 'predictions.png'} shows, from the top, {', '.join(printable(p) for p in images.paths)}")
