"""Positions matter, which kind hardly does: ViT, appendix D.4, table 8.

The paper (ViT-B/16, 5-shot linear on ImageNet, %): none 61.4, 1-D 64.2, 2-D 64.0, relative 64.0. Here vit_micro4 learns
Fashion-MNIST with labels, in 1,000 steps of 32 images, with each of them, and with the sine-cosine positions that MAE
uses. Nothing else was tried.
"""

import sys

from studies import study

KINDS = ("none", "1d", "2d", "relative", "sincos")
SHORT = "--data fashion-mnist --arch vit_micro4 --batch-size 32 --steps 1000 --lr 2e-3 --evaluations 1"
RUNS = {kind: f"{SHORT} --pos-embed {kind}" for kind in KINDS}
PROBES = {}
SEEDS = range(3)
TABLE = {"top-1 (%)": ("train", "top1")}
ALIKE = 1.0  # points


def claims(runs):
    def more(arm, other):
        return study.differences(runs, arm, other, "train", "top1")

    return [
        study.Claim("1-D positions are better than none", "+2.8", more("1d", "none"), "points"),
        study.Claim("2-D and 1-D positions are alike", "-0.2", more("2d", "1d"), "points", ALIKE),
        study.Claim("relative and 1-D positions are alike", "-0.2", more("relative", "1d"), "points", ALIKE),
        study.Claim("sine-cosine and 1-D positions are alike", "MAE's choice", more("sincos", "1d"), "points", ALIKE),
    ]


def figure(runs):
    return study.dots(runs, TABLE)


if __name__ == "__main__":
    study.main(sys.modules[__name__])
