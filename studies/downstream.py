"""What an encoder is worth: segmentation, detection and instance masks after HPM, MAE and nothing."""

import sys

from studies import study

RUNS = {
    "from scratch": "--task mae --data scenes --arch vit_micro8 --batch-size 32 --steps 1 --lr 1e-9 --test-images 1000",
    "MAE": f"--task mae {study.SCENES}",
    "HPM": f"--task hpm {study.SCENES}",
}
MANY = "--data scenes-many --arch vit_micro8 --init {init} --evaluations 1 --test-images 1000"
PROBES = {"segment": f"--task segment {MANY}", "detect": f"--task detect {MANY}"}
SEEDS = range(3)
TABLE = {
    "mean IoU": ("segment", "miou"),
    "pixel accuracy": ("segment", "pixel_accuracy"),
    "AP of boxes": ("detect", "ap_box"),
    "AP of boxes at 0.5": ("detect", "ap_box_50"),
    "AP of masks": ("detect", "ap_mask"),
}
# The score, and how much more HPM has than MAE in the paper, in points: on ADE20K, and on COCO.
PAPER = {"mean IoU": "+1.60", "AP of boxes": "+1.58", "AP of masks": "+1.14"}


def claims(runs):
    return [
        study.Claim(
            f"HPM is better than {other}: {title}",
            paper if other == "MAE" else "",
            100 * study.differences(runs, "HPM", other, *TABLE[title]),
            "points",
        )
        for other in ("MAE", "from scratch")
        for title, paper in PAPER.items()
    ]


def figure(runs):
    return study.dots(runs, TABLE)


if __name__ == "__main__":
    study.main(sys.modules[__name__])
