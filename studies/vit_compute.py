"""Accuracy against floating-point operations, for the three families: ViT, section 4.4, figure 5.

The paper: ViTs need 2 to 4 times less compute than ResNets for the same accuracy (pre-trained on JFT, mean of five data
sets); hybrids are slightly better than ViTs at small budgets, and the difference vanishes for larger ones. Here each
family learns Fashion-MNIST, at 20 x 20 pixels, from all its labels in 100, 200 or 400 steps of 32 images, and the
operations of all steps, forward and backward, are counted by PyTorch. Families are compared at the operations of the
ViT's runs: between two runs of a family accuracy is taken to be linear in the logarithm of operations, beyond its last
run it stays. Settings, and what was tried before: those of vit_data_size.
"""

import functools
import sys

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import vit
from related import resnet
from studies import study, vit_data_size

FAMILIES, STEPS = vit_data_size.FAMILIES, (100, 200, 400)
RUNS = {f"{family}, {steps} steps": vit_data_size.flags(family, steps) for family in FAMILIES for steps in STEPS}
PROBES = {}
SEEDS = range(3)
TABLE = {"top-1 (%)": ("train", "top1")}


@functools.cache
def operations(arch, size):
    """Of a step with one image of size x size grey pixels, forward and backward: multiplications and additions."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = (vit if arch in vit.ARCHS else resnet).create(arch, size, 10, 1)
        model(torch.zeros(1, 1, size, size)).sum().backward()
    return counter.get_total_flops()


def budget(family, steps):
    return vit_data_size.BATCH * steps * operations(FAMILIES[family], vit_data_size.SIZE)


def claims(runs):
    def top1(family, seed, at):  # accuracy with that many operations
        scores = [study.score(runs, f"{family}, {steps} steps", "train", "top1")[seed] for steps in STEPS]
        return np.interp(np.log(at), np.log([budget(family, steps) for steps in STEPS]), scores)

    def lead(arm, other, steps):  # points by which a family is ahead of another, at the ViT's operations
        done = [study.score(runs, f"{family}, {s} steps", "train", "top1") for family in (arm, other) for s in STEPS]
        seeds = sorted(set.intersection(*map(set, done)))
        at = budget("ViT", steps)
        return np.array([top1(arm, seed, at) - top1(other, seed, at) for seed in seeds])

    small, large = STEPS[0], STEPS[-1]
    found = {
        "at the smallest budget the ViT is better than the ResNet": lead("ViT", "ResNet", small),
        "at the largest budget, too": lead("ViT", "ResNet", large),
        "at the smallest budget the hybrid is better than the ViT": lead("hybrid", "ViT", small),
        "with the budget that difference shrinks": lead("hybrid", "ViT", small) - lead("hybrid", "ViT", large),
    }
    return [study.Claim(text, "figure 5", values, "points") for text, values in found.items()]


def figure(runs):
    figure = study.Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for family, colour in zip(FAMILIES, ("#0072B2", "#009E73", "#D55E00"), strict=True):
        scores = [list(study.score(runs, f"{family}, {steps} steps", "train", "top1").values()) for steps in STEPS]
        study.line(axes, [budget(family, steps) for steps in STEPS], scores, colour, family)
    axes.set(xscale="log", xlabel="operations of the training steps", ylabel="top-1 (%)")
    return figure


if __name__ == "__main__":
    study.main(sys.modules[__name__])
