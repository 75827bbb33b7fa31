"""Class token and mean are alike, if each has its own learning rate: ViT, appendix D.3, figure 9.

The paper: the mean of the patch tokens was worse than the class token at the class token's learning rate (8e-4), and
as good at one of its own (3e-4). Here vit_micro4 learns Fashion-MNIST with labels, in 500 steps of 32 images; each way
of pooling takes the best of three learning rates on a tenth of the training images, then trains on all. Nothing else
was tried.
"""

import sys

from studies import study

RATES = "1e-3,2e-3,4e-3"
SHORT = "--data fashion-mnist --arch vit_micro4 --batch-size 32 --steps 500 --evaluations 1"
RUNS = {pool: f"{SHORT} --pool {pool} --lr {RATES}" for pool in ("cls", "mean")}
PROBES = {}
SEEDS = range(3)
TABLE = {"top-1 (%)": ("train", "top1")}
ALIKE = 1.0  # points


def claims(runs):
    both = study.differences(runs, "mean", "cls", "train", "top1")
    return [study.Claim("mean and class token are alike", "figure 9", both, "points", ALIKE)]


def figure(runs):
    return study.dots(runs, TABLE)


if __name__ == "__main__":
    study.main(sys.modules[__name__])
