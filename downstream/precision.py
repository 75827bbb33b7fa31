"""What a detector is worth: COCO's metric, and a picture to look at.

evaluate    AP_box and AP_mask, computed by pycocotools, the official code
draw        predictions.png: image, true objects, those found
"""

import contextlib
import io
import math

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from pycocotools import mask as rle
from torch.nn import functional as F

from downstream import detection, probes, segmentation
from engine import distributed
from engine.coco import encode, fitting, run_lengths

SCORES = ("ap_box", "ap_box_50", "ap_mask", "ap_mask_50")
SHOWN = 6  # test images in predictions.png

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
    from pycocotools.coco import COCO  # here, for they import all of matplotlib
    from pycocotools.cocoeval import COCOeval

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
                rows.append((images[0], truths[0], truths[0]["annotations"], found))
    picture(out / "predictions.png", rows, dataset, img_size, ("image", "truth", "prediction"))


def picture(path, rows, dataset, img_size, titles):
    """Draw rows of an image (3, *img_size), normalised, its truth or a dict of its height and width, and lists of
    objects; what is found only if its score is above 1/2."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (dataset.mean, dataset.std))
    colors = segmentation.palette(len(dataset.classes))
    figure = Figure(figsize=(2.2 * len(titles), 2.2 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for row, (image, truth, *objects) in zip(axes, rows, strict=True):
        height, width = truth["height"], truth["width"]
        h, w = fitting(height, width, img_size)
        pixels = ((image.float().cpu() * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()[:h, :w]
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height)))
        for panel, title, there in zip(row, titles, ((), *objects), strict=True):
            panel.imshow(pixels)
            panel.axis("off")
            panel.set_title(title if panel in axes[0] else "", fontsize=9)
            for one in (one for one in there if one.get("score", 1) > 0.5):
                color, (left, top, wide, high) = colors[one["category_id"]], one["bbox"]
                inside = rle.decode(run_lengths(one["segmentation"], height, width))[..., None]
                panel.imshow(np.concatenate([np.broadcast_to(color, (height, width, 3)), 0.5 * inside], axis=2))
                panel.add_patch(Rectangle((left, top), wide, high, fill=False, edgecolor=color))
                score = f" {one['score']:.2f}" if "score" in one else ""
                panel.text(left, top, dataset.classes[one["category_id"]] + score, fontsize=5, color="white",
                           backgroundcolor=(*color, 0.7), va="bottom")  # fmt: skip
    figure.savefig(path, dpi=100)
