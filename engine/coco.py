"""Objects in images: COCO's layout on disk, its large-scale jitter, and its metric.

load(path)         PATH/{train,val}2017/*.jpg and PATH/annotations/instances_{train,val}2017.json, a `data.Dataset`
Coco               one of the two splits
WithObjects        `scenes.Scenes` in its place
evaluate           AP_box and AP_mask of a detector, computed by pycocotools, the official code

Both kinds of split have the methods of `data.InMemory`. train_batches yields images (b, 3, H, W) and a list of b
`scenes.Objects`; test_batches yields images, labels (b,), of which -1 is an image that does not count, and a list of b
truths: what COCO's file says of an image, its id, height and width, and its annotations.
"""

import contextlib
import copy
import io
import itertools
import json
import math
import sys

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from downstream import detection, probes, segmentation
from engine import distributed, image_folder, scenes
from engine.scenes import Objects

SCORES = ("ap_box", "ap_box_50", "ap_mask", "ap_mask_50")
SHOWN = 6  # test images in predictions.png
JITTER = (0.1, 2.0)  # least and largest scale of large-scale jitter (Ghiasi et al. 2021; ViTDet's)


class WithObjects:
    """A `scenes.Scenes` of which the objects are wanted, not the labels."""

    unreadable = {}

    def __init__(self, split):
        self.scenes = split

    def __len__(self):
        return len(self.scenes)

    def train_batches(self, *args):
        for images, _, objects in self.scenes.train_batches(*args, objects=True):
            yield images, [Objects(*one) for one in zip(*objects, strict=True)]

    def test_batches(self, size, batch_size, device, shard=slice(None)):
        numbers = iter(range(len(self))[shard])
        for images, labels, objects in self.scenes.test_batches(size, batch_size, device, shard, objects=True):
            yield images, labels, [truth_of(Objects(*one), next(numbers)) for one in zip(*objects, strict=True)]


def of_scenes(dataset):
    """The same scenes as a `data.Dataset` of images and objects."""
    return dataset._replace(train=WithObjects(dataset.train), test=WithObjects(dataset.test))


def collate(targets):
    """A list of b `Objects` -> labels (b, S), boxes (b, S, 4), masks (b, S, H, W): padded, with the label -1.

    There is one empty slot at least, so that an image without objects needs no other path.
    """
    labels = pad_sequence([F.pad(t.labels, (0, 1), value=-1) for t in targets], True, -1)
    boxes = pad_sequence([F.pad(t.boxes.float(), (0, 0, 0, 1)) for t in targets], True)
    masks = pad_sequence([F.pad(t.masks, (0, 0, 0, 0, 0, 1)) for t in targets], True)
    return labels, boxes, masks


def one_object(size, device):
    """`Objects` of an image of size = (H, W) of which all is one object of class 0."""
    box = torch.tensor([[0, 0, size[1], size[0]]], device=device)
    return Objects(torch.zeros_like(box[:, 0]), torch.ones(1, *size, dtype=torch.bool, device=device), box)


def truth_of(objects, number):
    """What COCO's file would say of an image with these objects: a dict."""
    there = objects.labels >= 0
    masks, labels = objects.masks[there].cpu(), objects.labels[there].tolist()
    annotations = [
        dict(
            category_id=label, iscrowd=0, segmentation=code, area=float(rle.area(code)), bbox=rle.toBbox(code).tolist()
        )
        for label, code in zip(labels, encode(masks), strict=True)
    ]
    return dict(id=number, height=masks.shape[1], width=masks.shape[2], annotations=annotations)


def run_lengths(segmentation, height, width):
    """A segmentation of COCO's file, polygons or run lengths, as pycocotools' run lengths."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    return (
        segmentation
        if isinstance(segmentation["counts"], bytes | str)
        else rle.frPyObjects(segmentation, height, width)
    )


def encode(masks):
    """Masks (n, H, W) bool as pycocotools' run lengths: n dicts."""
    return rle.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8))) if len(masks) else []


# ---------------------------------------------------------------------------------------------
# The metric
# ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(model, split, classes, img_size, batch_size, device, dtype="float32"):
    """ap_box and ap_mask in [0, 1], COCO's average precision over overlaps of 0.5 to 0.95, and those at 0.5."""
    entries = {}
    for images, labels, truths in probes.test_batches(model, split, img_size, batch_size, device):
        with probes.autocast(device, dtype):
            found = model(images)
        for label, truth, *one in zip(labels.tolist(), truths, *found, strict=True):
            if label >= 0:
                entries[truth["id"]] = truth, results_of(detection.Detections(*one), truth, img_size)
    entries = distributed.gather_dicts(entries)
    return distributed.from_rank0(lambda: average_precision(list(entries.values()), classes))


def results_of(found, truth, img_size):
    """`Detections` of one image (n, …), as COCO's results at the size that the image had: a list of dicts."""
    height, width = truth["height"], truth["width"]
    h, w = fitting(height, width, img_size)
    there = found.scores > 0
    scale = found.boxes.new_tensor([width / w, height / h] * 2)
    boxes = detection.clip(found.boxes[there] * scale, (height, width))
    masks = paste(found.masks[there], boxes, (height, width)).cpu() if len(boxes) else ()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    labels, scores = found.labels[there].tolist(), found.scores[there].tolist()
    return [
        dict(image_id=truth["id"], category_id=label, bbox=box, score=score, segmentation=code)
        for label, box, score, code in zip(labels, boxes, scores, encode(masks) if labels else (), strict=True)
    ]


def paste(masks, boxes, size):
    """Masks within their boxes as parts of an image of size = (H, W): (n, 28, 28), (n, 4) -> (n, H, W) bool.

    A pixel is inside if the probability between the mask's values is at least 1/2 at its middle; outside of the box 0.
    """
    (H, W), (left, top, right, bottom) = size, boxes[..., None].unbind(dim=1)  # each (n, 1)
    x = (torch.arange(W, device=boxes.device) + 0.5 - left) / (right - left).clamp(min=1e-6) * 2 - 1  # (n, W)
    y = (torch.arange(H, device=boxes.device) + 0.5 - top) / (bottom - top).clamp(min=1e-6) * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None], y[..., None]), dim=-1)  # (n, H, W, 2)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] >= 0.5


def average_precision(entries, classes):
    """What pycocotools says of pairs of truth and results: four scores. Raises ValueError if there is no object."""
    images = [{name: truth[name] for name in ("id", "height", "width")} for truth, _ in entries]
    annotations = [dict(a, image_id=truth["id"]) for truth, _ in entries for a in truth["annotations"]]
    if not any(not a["iscrowd"] for a in annotations):
        raise ValueError("no test image has an object, so that no precision is defined; give others")
    names = [dict(id=i, name=name) for i, name in enumerate(classes)]
    numbered = [dict(a, id=i) for i, a in enumerate(annotations, 1)]  # 0 would be no annotation
    results = [result for _, found in entries for result in found]
    scores = dict.fromkeys(SCORES, 0.0)
    if not results:
        return scores
    with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
        truth = COCO()
        truth.dataset = dict(images=images, annotations=numbered, categories=names)
        truth.createIndex()
        for name, kind, other in (("box", "bbox", "segmentation"), ("mask", "segm", "bbox")):
            own = [{key: value for key, value in result.items() if key != other} for result in results]
            official = COCOeval(truth, truth.loadRes(own), kind)
            official.evaluate()
            official.accumulate()
            official.summarize()
            scores[f"ap_{name}"], scores[f"ap_{name}_50"] = (max(0.0, float(v)) for v in official.stats[:2])
    return scores


def fitting(height, width, size):
    """Height and width of an image that is made as large as fits into size = (H, W), its shape kept."""
    scale = min(size[0] / height, size[1] / width)
    return max(1, round(height * scale)), max(1, round(width * scale))


# ---------------------------------------------------------------------------------------------
# To look at
# ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def draw(out, model, dataset, img_size, batch_size, device, dtype):
    """Draw predictions.png in the folder `out`: test images, the true objects, those found with a score above 1/2."""
    if distributed.RANK:
        return
    split, rows = dataset.test, []
    some = slice(0, len(split), math.ceil(len(split) / SHOWN))
    with probes.evaluating(model), probes.autocast(device, dtype):
        for images, labels, truths in split.test_batches(img_size, 1, torch.device(device), some):
            if labels[0] >= 0:
                found = results_of(detection.Detections(*(v[0] for v in model(images))), truths[0], img_size)
                rows.append((images[0].float().cpu(), truths[0], [one for one in found if one["score"] > 0.5]))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (dataset.mean, dataset.std))
    colors = segmentation.palette(len(dataset.classes))
    figure = Figure(figsize=(6.6, 2.2 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for row, (image, truth, found) in zip(axes, rows, strict=True):
        height, width = truth["height"], truth["width"]
        h, w = fitting(height, width, img_size)
        pixels = ((image * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()[:h, :w]
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height)))
        for panel, title, objects in zip(
            row, ("image", "truth", "prediction"), ((), truth["annotations"], found), strict=True
        ):
            panel.imshow(pixels)
            panel.axis("off")
            panel.set_title(title if panel in axes[0] else "", fontsize=9)
            for one in objects:
                color, (left, top, wide, high) = colors[one["category_id"]], one["bbox"]
                inside = rle.decode(run_lengths(one["segmentation"], height, width))[..., None]
                panel.imshow(np.concatenate([np.broadcast_to(color, (height, width, 3)), 0.5 * inside], axis=2))
                panel.add_patch(Rectangle((left, top), wide, high, fill=False, edgecolor=color))
                score = f" {one['score']:.2f}" if "score" in one else ""
                panel.text(left, top, dataset.classes[one["category_id"]] + score, fontsize=5, color="white",
                           backgroundcolor=(*color, 0.7), va="bottom")  # fmt: skip
    figure.savefig(out / "predictions.png", dpi=100)
