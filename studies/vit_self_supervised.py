"""Learning without labels helps: ViT, section 4.6, beside MAE and HPM.

The paper (ViT-B/16): masked patch prediction (MPP), then fine-tuning on ImageNet, reaches 79.9 %, 2 points above
training from scratch. Here all pre-train on the same scenes without labels, then learn from 1,000 labels.
"From scratch" is the same fine-tuning of a model that has made one step at a learning rate of 1e-9.
"""

import sys

from studies import study

RUNS = {
    "from scratch": "--task mae --data scenes --arch vit_micro8 --batch-size 32 --steps 1 --lr 1e-9 --test-images 1000",
    "MPP": f"--task mpp {study.SCENES}",
    "MAE": f"--task mae {study.SCENES}",
    "HPM": f"--task hpm {study.SCENES}",
}
PROBES = study.PROBES
SEEDS = range(3)
TABLE = {title: where for title, where in study.FIGURES.items() if where[0] != "train"}


def claims(runs):
    return [
        study.Claim(
            f"{arm} is better than from scratch: {title.removesuffix(' (%)')}",
            "+2, all labels" if arm == "MPP" else "",
            study.differences(runs, arm, "from scratch", *where),
            "points",
        )
        for arm in ("MPP", "MAE", "HPM")
        for title, where in TABLE.items()
        if "tuned" in title
    ]


def figure(runs):
    return study.dots(runs, TABLE)


if __name__ == "__main__":
    study.main(sys.modules[__name__])
