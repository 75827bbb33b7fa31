"""HPM helps whatever is reconstructed: pixels, normalised pixels, HOG, features of the teacher.

The paper's table of targets (ViT-B/16, ImageNet): with each of them, HPM is above the same model with random masks.
Here each target is learned with random masks and no loss predictor (MAE), and by HPM. Nothing else was tried.
"""

import sys

from studies import study

TARGETS = ("pixels", "norm-pixels", "hog", "ema")
RUNS = {
    f"{name}, {target}": f"--task {task} {study.SCENES}" + (f" --target {target}" if target != "pixels" else "")
    for target in TARGETS
    for name, task in (("MAE", "mae"), ("HPM", "hpm"))
}
PROBES = {name: study.PROBES[name] for name in ("linear", "knn")}  # of frozen features
SEEDS = range(3)
TABLE = {title: where for title, where in study.FIGURES.items() if where[0] in ("train", *PROBES)} | study.TEACHERS


def claims(runs):
    return [
        study.Claim(
            f"HPM helps with the target {target}: {title.removesuffix(' (%)')}",
            "table of targets",
            study.differences(runs, f"HPM, {target}", f"MAE, {target}", *where),
            "points",
        )
        for target in TARGETS
        for title, where in TABLE.items()
        if where[0] != "train"
    ]


def figure(runs):
    return study.dots(runs, {title: where for title, where in TABLE.items() if title != "test L_rec"})


if __name__ == "__main__":
    study.main(sys.modules[__name__])
