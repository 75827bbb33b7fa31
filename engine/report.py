"""What a run says on the screen: before it, on its way, and at its end, as result.json does."""

import json
import sys

from tqdm import tqdm

from engine import checkpoint, distributed
from engine.config import SHOTS


def describe(config, dataset, params):
    """What is about to happen, in two lines."""
    size = "x".join(map(str, config.img_size))
    shared = f" on {distributed.WORLD_SIZE} processes" if distributed.WORLD_SIZE > 1 else ""
    return (
        f"{config.task}: {config.arch}, {params / 1e6:.1f}M parameters, on {config.data}: {len(dataset.classes)} "
        f"classes, {len(dataset.train):,} training and {len(dataset.test):,} test images of {size} pixels\n"
        f"{config.steps:,} steps of {config.batch_size} images, {config.micro_batch} at a time, peak learning rate "
        f"{config.lr[0]:.2g}, {config.device}, {config.dtype}{shared}"
    )


def progress_bar(start, steps):
    """A bar with the time that is left, on the terminal of the first process; elsewhere it is silent, see `tell`."""
    silent = None if distributed.RANK == 0 else True  # None: unless it is a terminal
    return tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, disable=silent)


def tell(bar, line):
    """Show what was logged: on the bar or, where the output is no terminal, as a line of its own."""
    if not bar.disable:
        bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{line['lr']:.1e}")
    elif distributed.RANK == 0:
        left = (bar.total - line["step"]) * line["seconds"] / line["step"]  # seconds
        scores = "".join(
            f", {name} {line[name]:.4g}" for name in ("top1", "test_rec", "miou", "ap_box", "ap_mask") if name in line
        )
        print(
            f"step {line['step']:,} of {bar.total:,}, epoch {line['epoch']:.1f}: loss {line['loss']:.3f}{scores}, "
            f"lr {line['lr']:.1e}, {line['images_per_second']:.1f} images/s, {left / 60:.0f} min to go",
            file=sys.stderr,
        )


def finish(config, dataset, out, scores, seconds, params):
    """Write result.json, and print the same in words."""
    images = config.steps * config.batch_size
    result = dict(task=config.task, arch=config.arch, data=config.data, **scores, steps=config.steps)
    result |= dict(seconds=seconds, images_per_second=images / seconds, params=params)
    checkpoint.write(out / "result.json", json.dumps(result, indent=1) + "\n")
    for name, split in (("training", dataset.train), ("test", dataset.test)):
        if split.unreadable:
            print(f"skipped {len(split.unreadable)} of {len(split):,} {name} images that can't be decoded")
    words = {
        "top1": f"{{:.2f}} % top-1 on the test set (chance is {100 / len(dataset.classes):.1f} %)",
        "top5": "{:.2f} % top-5",
        "real_top1": "{:.2f} % of the images with ReaL's labels among those",
        **{f"top1_{n}shot": f"{{:.2f}} % top-1 from {n} images a class" for n in SHOTS},
        "miou": "a mean intersection over union of {:.3f} on the test set",
        "pixel_accuracy": "{:.3f} of the pixels",
        "ap_box": "AP_box {:.3f}",
        "ap_mask": "AP_mask {:.3f} on the test set",
        "test_rec": "a reconstruction loss of {:.4f} on test images",
        "test_correlation": "a rank correlation of {:.2f} between predicted and true loss",
        "test_object_auc": "an area of {:.2f} under the ROC curve of the teacher's map for the item's patches",
        "test_object_auc_at_place": "{:.2f} of its maps of different scenes at the same place",
        "test_hard_ratio": "{:.2f} times the loss under the teacher's masks",
    }
    reached = ", ".join(text.format(scores[name]) for name, text in words.items() if name in scores)
    effort = f"{config.steps:,} steps in {seconds:.0f} s, {images / seconds:.1f} images/s"
    effort = effort if config.steps else f"{seconds:.0f} s"  # nearest neighbours take no steps
    print(f"{config.task}: {config.arch} on {config.data} reached {reached}; {effort}; all in {out}")
