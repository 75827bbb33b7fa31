"""What a trained model says of images: --task predict.

    python train.py --task predict --init runs/finetune-vit_b16-photos --images holiday/

Of a classifier, a run's or a public one: the most probable classes of each image, as a table on the screen and in
predictions.csv. Of a masked autoencoder: predictions.png, what it masks and rebuilds. Of a segmentation: for each image
predictions/NAME.png, of its size, in which every pixel is a class number with a colour, as in the masks that it learned
from. Of a detector: predictions.json, a list of COCO's results with the names of file and category. Of both also
predicted.png, to look at. Images are prepared as the run's test images were, and classes have the run's names.
"""

import csv
import itertools
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import data
from downstream import detection, precision, probes, segmentation
from engine import coco, distributed, files, image_folder, pairs, weights
from engine.recipes import AUTOENCODERS, CLASSIFIERS, DENSE

TASKS = (*CLASSIFIERS, "linear", *AUTOENCODERS, *DENSE)  # whose models have something to say
TOP, ROWS, PICTURES = 5, 20, 6  # classes of an image; images on the screen, and in the picture


def run(config, out, build):
    """Write what the model of --init says of --images: the exit code, 0.

    config  a `Config`: its init, images, micro_batch, workers, seed, device and dtype are the user's, all that makes
            the model and its input, as arch, img_size, pool and pixels, is that of the run
    out     the folder for what is written; None: that of the weights, or this one for weights from the web
    build   (task, dataset) -> the model of a task, before any weights are loaded
    Raises ValueError if there is no such model or image, if they do not fit, or if no image can be read.
    """
    if distributed.WORLD_SIZE > 1:
        raise ValueError("--task predict runs in one process; start it with python in place of torchrun")
    init = source(config.init)
    saved = weights.metadata(init)
    trained, ours = saved["config"] or {}, {"task", "init", "arch", "data", "img_size"}
    is_run = ours <= trained.keys()  # else a file of weights alone, or another program's
    task, name = trained["task"] if is_run else "supervised", config.data
    if task not in TASKS:
        raise ValueError(f"{init} is of --task {task}, which trains no classifier; give a run of {', '.join(TASKS)}")
    mean, std = data.STATISTICS.get(name, (data.IMAGENET_MEAN, data.IMAGENET_STD))
    if config.pixels == "half":
        mean = std = (0.5,) * len(mean)
    whole = name in data.NATIVE_SIZE or (name == "photos" and is_run)  # else the middle, as with ImageNet
    workers = image_folder.workers() if config.workers is None else max(1, config.workers)
    images = Images(find(config.images), mean, std, data.NATIVE_SIZE.get(name), whole, workers)
    images.stretched = name.startswith("vtab:")  # as in training
    dataset = data.Dataset(name, saved["classes"], mean, std, None, images)
    if task in (*AUTOENCODERS, *DENSE):
        model = with_state(build(task, dataset), weights.content_of(init)[0], init)
    else:
        dataset, model = load_classifier(config, init, task == "linear" and trained, dataset, build)
    torch.set_float32_matmul_precision("high")  # as in training
    out = writable(out or (init.parent if Path(config.init).exists() else "."))
    how = "x".join(map(str, config.img_size)), config.device, config.dtype
    print(f"predict: {config.arch} of {init}, {many(images)} brought to {', '.join(how)}")
    if len(mean) == 1:
        print(f"colours become grey: {name} has one channel")
    say = {"segment": segment, "detect": detect} | dict.fromkeys(AUTOENCODERS, draw)
    say.get(task, tell)(config, model.to(config.device), dataset, out)
    return 0


def writable(out):
    """The folder `out`, made if need be. Raises ValueError if nothing can be written there."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"nothing can be written to {out} ({error.strerror}); give another --out") from None
    return Path(out)


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------


def source(init):
    """The file that --init means: of a run's folder its last.pt, of a URL the kept copy. Raises ValueError."""
    init = os.path.expanduser(init)
    return weights.local(os.path.join(init, "last.pt") if os.path.isdir(init) else init)


def load_classifier(config, init, probed, dataset, build):
    """The data with the names of its classes, and a model images -> logits. probed: the config of a linear probe.

    Raises ValueError for weights without a classifier, or without a part of the model: it would be another function.
    """
    probe = weights.content_of(init)[0] if probed else None
    head = (probe["model"] if probe else weights.read(init)).get("head.weight")
    if head is None:
        raise ValueError(f"{init} has no classifier; train one with --task finetune or linear, and give that run")
    if dataset.classes is None:
        print(f"{init} does not name its classes: they are numbers")
        dataset = dataset._replace(classes=[str(i) for i in range(len(head))])
    if len(dataset.classes) != len(head):
        raise ValueError(f"{init} names {len(dataset.classes)} classes, and its head has {len(head)}; it is damaged")
    if probed:  # its encoder is in the file that it was trained on
        encoder = build("linear", dataset)
        try:
            start = source(probed["init"])
            if probe.get("init_digest") not in (None, weights.digest(start)):
                raise ValueError("it has changed since")
            weights.load(encoder, start, grid=probed.get("init_grid"))
        except ValueError as error:
            raise ValueError(f"{init} is a linear probe of {probed['init']}: {error}") from None
        return dataset, with_state(probes.LinearProbe(encoder, encoder.dim, len(head)), probe, init)
    model = build("supervised", dataset)
    for note in weights.load(model, init, grid=config.init_grid):
        if "left at" in note:
            raise ValueError(f"{init}: {note}; check --arch, and --pool cls or mean")
        print(f"{init}: {note}")
    return dataset, model


def with_state(model, checkpoint, init):
    """A model with the weights of a checkpoint. Raises ValueError if they do not fit."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise ValueError(f"{init} does not fit its own config: {str(error).splitlines()[-1].strip()}") from None
    return model


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def find(path):
    """The image file at a path, or all in the folder and below. Raises ValueError if there is none."""
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise ValueError(f"--images {path} is no file and no folder; give an image, or a folder of images")
    try:
        found, ignored = image_folder.find_images(path)
    except OSError as error:
        raise ValueError(f"--images {path}: {error.filename} can't be read ({error.strerror})") from None
    left_out = ", ".join(f"{n:,} {reason}" for reason, n in ignored.most_common(6))
    if not found:
        raise ValueError(f"--images {path}: no image in there, only {left_out or 'nothing'}; give another folder")
    if ignored:
        print(f"{path}: {ignored.total():,} files are left out: {left_out}")
    return found


class Images:
    """Image files as a split of a `data.Dataset`, prepared as test images are.

    mean, std: as of `data.InMemory`; for one channel, colours become grey. side: of images that come in one size,
    before they are resized, or None. whole: not the middle alone. workers: threads, which start at once; Pillow lets go
    of Python's lock. A file that can't be decoded is black, has the label -1 in place of 0, and `unreadable` says why.
    """

    def __init__(self, paths, mean, std, side=None, whole=False, workers=1):
        self.paths, self.mean, self.std, self.side, self.whole = paths, mean, std, side, whole
        self.workers, self.unreadable, self.stretched = workers, {}, False

    def __len__(self):
        return len(self.paths)

    def read(self, path, size):
        """One file: (C, H, W) uint8."""
        try:
            crop_pct = None if self.stretched else 1.0 if self.whole or max(size) > 224 else 7 / 8
            image = image_folder.read_image(path, size, None, None, crop_pct=crop_pct)
        except Exception as error:  # whatever a decoder raises for a broken file
            self.skip(path, error)
            image = torch.zeros(3, *size, dtype=torch.uint8)
        if len(self.mean) == 1:  # by Pillow's integers: grey stays as it is
            image = (image.int() * torch.tensor([19595, 38470, 7471]).view(3, 1, 1)).sum(dim=0, keepdim=True)
            image = ((image + 2**15) >> 16).byte()
        return image

    def skip(self, path, error):
        """Say and note that a file can't be read."""
        self.unreadable[path] = (str(error) or type(error).__name__).splitlines()[0]
        tqdm.write(f"warning: skipped {on_screen(path)}: {self.unreadable[path]}", file=sys.stderr)

    def test_batches(self, size, batch_size, device, shard=slice(None)):
        """As of `data.InMemory`."""
        paths, own = self.paths[shard], (self.side, self.side) if self.side else size
        with ThreadPoolExecutor(self.workers) as pool:
            for some in (paths[i : i + batch_size] for i in range(0, len(paths), batch_size)):
                images = torch.stack(list(pool.map(lambda path: self.read(path, own), some)))
                labels = torch.tensor([-1 if path in self.unreadable else 0 for path in some])
                images, labels = (data.to_device(v, device) for v in (images, labels))
                yield data.normalise(data.resize(images, size), self.mean, self.std), labels


# ---------------------------------------------------------------------------------------------
# What the model says
# ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def tell(config, model, dataset, out):
    """Write predictions.csv, a row for each image; print the first rows as a table. Raises ValueError if none can be
    read, and for probabilities that are not finite."""
    images, top, done = dataset.test, [], 0
    bar = tqdm(total=len(images), unit="image", dynamic_ncols=True, disable=None)
    with bar, probes.evaluating(model):
        for batch, _ in images.test_batches(config.img_size, config.micro_batch, torch.device(config.device)):
            with probes.autocast(config.device, config.dtype):
                logits = model(batch).float()  # (b, classes)
            top.append(logits.softmax(dim=1).topk(min(TOP, len(dataset.classes))))  # (b, k) each
            bar.update(len(batch))
            done += len(batch)
            if bar.disable and 10 * done // len(images) > 10 * (done - len(batch)) // len(images):
                print(f"{done:,} of {len(images):,} images", file=sys.stderr)
    shares, labels = (torch.cat(part).cpu() for part in zip(*top, strict=True))  # (n, k) each
    if not shares.isfinite().all():
        raise ValueError("the probabilities are not finite: something went wrong in this model's training")
    rows = [
        (path, [] if path in images.unreadable else [(dataset.classes[c], p) for c, p in zip(*pair, strict=True)])
        for path, *pair in zip(images.paths, labels.tolist(), shares.tolist(), strict=True)
    ]
    k, path = labels.shape[1], out / "predictions.csv"
    # Spreadsheets take UTF-8 for what it is by the mark that utf-8-sig begins with.
    with files.whole(path) as part, open(part, "w", newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        table = csv.writer(file)
        header = [f"{what} {rank}" for rank in range(1, k + 1) for what in ("class", "probability")]
        table.writerow(["file", *header, "problem"])
        for name, told in rows:
            cells = [cell for c, p in told for cell in (c, f"{p:.6g}")] or [""] * 2 * k
            table.writerow([name, *cells, images.unreadable.get(name, "")])
    for name, told in rows[:ROWS]:
        told = " | ".join(f"{p:6.1%} {on_screen(c, 30)}" for c, p in told) or "  can't be read"
        print(f"{on_screen(name.removeprefix(os.path.join(config.images, ''))):40}  {told}")
    if len(rows) > ROWS:
        print(f"… and {len(rows) - ROWS:,} more")
    if len(images.unreadable) == len(rows):
        raise ValueError(f"of {many(images)} none can be read; {path} says why")
    print(f"predict: {what_came_of(images)}; all in {path}")


def draw(config, model, dataset, out):
    """Write predictions.png: `probes.plot_masks` of the first images that can be read, as at a run's end."""
    images, given = dataset.test, many(dataset.test)
    readable = (p for p in images.paths if images.read(p, config.img_size) is not None and p not in images.unreadable)
    images.paths = list(itertools.islice(readable, PICTURES))
    if not images.paths:
        raise ValueError(f"of {given} none can be read")
    with tempfile.TemporaryDirectory(dir=out) as folder:  # masks.png in `out` is the run's own
        how = config.img_size, config.alpha[1], config.seed, config.device, config.dtype
        probes.plot_masks(Path(folder), model, dataset, *how)
        Path(folder, "masks.png").replace(out / "predictions.png")
    print(f"predict: {out / 'predictions.png'} shows, from the top, {', '.join(map(on_screen, images.paths))}")


@torch.inference_mode()
def segment(config, model, dataset, out):
    """Write predictions/NAME.png for each image, and predicted.png; print how much of the first images is what."""
    images, device, rows, shown = dataset.test, torch.device(config.device), [], 0
    from_one = config.data.startswith("ade20k:")  # its files say 0 for none of its classes
    colors = (255 * segmentation.palette(len(dataset.classes))[:-1]).astype("uint8")
    colors = colors.tobytes() if not from_one else bytes(3) + colors.tobytes()
    above = config.images if os.path.isdir(config.images) else os.path.dirname(config.images)
    with probes.evaluating(model):
        for path, image, size in one_by_one(images, device, lambda image: pairs.covering(image, config.img_size)):
            sides = image.shape[-2:] if config.inference == "slide" else config.img_size
            how = config.img_size, config.micro_batch, config.inference
            with probes.autocast(config.device, config.dtype):
                logits = segmentation.predict(model, image, sides, *how)  # (1, K, *sides)
            if not logits.isfinite().all():
                raise ValueError("the logits are not finite: something went wrong in this model's training")
            predicted = largest(logits.float(), size).byte().cpu().numpy()
            mask = Image.fromarray(predicted + from_one)
            mask.putpalette(colors)
            to = Path(out, "predictions", os.path.relpath(path, above) + ".png")
            to.parent.mkdir(parents=True, exist_ok=True)
            with files.whole(to) as part:
                mask.save(part, format="png")
            if len(rows) < PICTURES:
                rows.append((image[0].cpu(), predicted))
            if shown < ROWS:
                counts = torch.from_numpy(predicted).flatten().long().bincount(minlength=len(dataset.classes))
                shares, labels = (counts / counts.sum()).topk(min(TOP, len(counts)))
                told = [
                    f"{p:6.1%} {on_screen(dataset.classes[c], 30)}" for p, c in zip(shares, labels, strict=True) if p
                ]
                tqdm.write(f"{on_screen(os.path.relpath(path, above)):40}  {' | '.join(told)}")
            shown += 1
    ended(images, shown, out / "predictions", rows)
    segmentation.picture(out / "predicted.png", rows, dataset, ("image", "prediction"))


def largest(logits, size):
    """The class with the largest logit, at another size: (1, K, h, w) -> (H, W). Class by class: those of 12 million
    pixels and 150 classes would take 7 GB."""
    best = logits.new_full(size, -torch.inf)
    classes = torch.zeros_like(best, dtype=torch.int64)
    for k, one in enumerate(logits.unbind(dim=1)):  # (1, h, w)
        one = segmentation.resize(one[None], size)[0, 0]
        better = one > best
        best, classes = torch.where(better, one, best), classes.masked_fill(better, k)
    return classes


@torch.inference_mode()
def detect(config, model, dataset, out):
    """Write predictions.json and predicted.png; print the objects of the first images."""
    images, device, rows, results, shown = dataset.test, torch.device(config.device), [], [], 0
    with probes.evaluating(model):
        for path, image, (height, width) in one_by_one(
            images, device, lambda image: coco.framed(image, config.img_size)
        ):
            with probes.autocast(config.device, config.dtype):
                found = detection.Detections(*(v[0] for v in model(image)))
            sides = dict(id=path, height=height, width=width)
            objects = precision.results_of(found, sides, config.img_size)
            for one in objects:
                code = one["segmentation"] | dict(counts=one["segmentation"]["counts"].decode())
                named = dict(file=one["image_id"], category=dataset.classes[one["category_id"]])
                results.append(named | dict(bbox=one["bbox"], score=one["score"], segmentation=code))
            if len(rows) < PICTURES:
                rows.append((image[0].cpu(), sides, objects))
            if shown < ROWS:
                best = sorted(objects, key=lambda one: -one["score"])[:TOP]
                told = [f"{one['score']:.2f} {on_screen(dataset.classes[one['category_id']], 30)}" for one in best]
                name = on_screen(path.removeprefix(os.path.join(config.images, "")))
                tqdm.write(f"{name:40}  {' | '.join(told) or 'nothing'}")
            shown += 1
    ended(images, shown, out / "predictions.json", rows)
    with files.whole(out / "predictions.json") as part:
        part.write_text(json.dumps(results))
    precision.picture(out / "predicted.png", rows, dataset, config.img_size, ("image", "prediction"))


def one_by_one(images, device, prepare):
    """Of each file that can be read its path, `prepare` of the Pillow image as a batch of one (1, C, H, W), normalised,
    and its own height and width. What can't be read is said, and noted in `images.unreadable`."""
    for path in tqdm(images.paths, unit="image", dynamic_ncols=True, disable=None):
        try:
            image, width, height = image_folder.decode(path)
            image = image_folder.to_tensor(prepare(image))[None]
        except Exception as error:  # whatever a decoder raises for a broken file
            images.skip(path, error)
            continue
        yield path, data.normalise(data.to_device(image, device), images.mean, images.std), (height, width)


def ended(images, shown, where, rows):
    """Say what was written. Raises ValueError if no image could be read."""
    if not rows:
        raise ValueError(f"of {many(images)} none can be read")
    if shown > ROWS:
        print(f"… and {shown - ROWS:,} more")
    print(f"predict: {what_came_of(images)}; all in {where}, the first in {where.with_name('predicted.png')}")


def many(images):
    return f"{len(images):,} image{'s' * (len(images) != 1)}"


def what_came_of(images):
    return many(images) + f", {len(images.unreadable):,} of which can't be read" * bool(images.unreadable)


def on_screen(text, width=40):
    """A name for the screen: nothing in it moves the cursor, and the middle of a long one is left out."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return text if len(text) <= width else f"{text[: width // 2 - 1]}…{text[-(width // 2) :]}"
