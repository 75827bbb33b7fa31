"""How much to hide, and in what shape: MAE's figures 5 and 6, and its table 1 (f).

The paper (ViT-L/16, ImageNet, 800 epochs): linear evaluation rises with the mask ratio up to 75 % and falls after it,
fine-tuning is as good from 40 to 80 %; random masks beat block and grid masks (linear 73.5 % random 75 %, 72.3 % block
50 %, 63.9 % block 75 %, 66.0 % grid 75 %). Here MAE learns at five ratios with random masks, and with the others.

That the encoder sees visible patches alone saves, at 75 %, 3.2 times the operations of a forward pass of ViT-L/16 (the
paper's table 1 (c): 3.3), 2.4 times of ViT-B/16 and 3.5 times of vit_micro8, counted by `operations`.
"""

import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

import hpm
from studies import study

MAE = f"--task mae {study.SCENES}"
RUNS = {
    **{f"random, {int(100 * ratio)} %": f"{MAE} --mask-ratio {ratio}" for ratio in (0.25, 0.5, 0.6)},
    "random, 75 %": MAE,
    "random, 90 %": f"{MAE} --mask-ratio 0.9",
    "block, 75 %": f"{MAE} --mask block",
    "block, 50 %": f"{MAE} --mask block --mask-ratio 0.5",
    "grid, 75 %": f"{MAE} --mask grid",
}
PROBES = study.PROBES
SEEDS = range(3)
TABLE = {title: where for title, where in study.FIGURES.items() if where[0] in ("train", *PROBES)}

PAIRS = (  # the ratio or shape that should be worse than random masks of 75 %, and the paper's difference
    ("random, 25 %", "figure 5"),
    ("random, 50 %", "figure 5"),
    ("random, 90 %", "figure 5"),
    ("block, 50 %", "+1.2"),
    ("block, 75 %", "+9.6"),
    ("grid, 75 %", "+7.5"),
)


def operations(arch, img_size, mask_ratio=0.75):
    """Floating-point operations of a forward pass of MAE for an image: as it is, and if its encoder saw all tokens."""
    with torch.device("meta"):
        student = hpm.create(arch, img_size, predictor="none", mask="random").student
        N = len(student.encoder.pos_embed[0]) - 1
        order, images = torch.arange(N)[None], torch.zeros(1, 3, img_size, img_size)
        visible, hidden = order[:, : N - int(N * mask_ratio)], order[:, N - int(N * mask_ratio) :]

    def count(function, *inputs):
        with FlopCounterMode(display=False) as counter:
            function(*inputs)
        return counter.get_total_flops()

    whole = count(student, images, visible, hidden)
    return whole, whole - count(student.encoder.encode, images, visible) + count(student.encoder.encode, images)


def claims(runs):
    return [
        study.Claim(
            f"random masks of 75 % are better than {other}: {title.removesuffix(' (%)')}",
            paper,
            study.differences(runs, "random, 75 %", other, *where),
            "points",
        )
        for other, paper in PAIRS
        for title, where in TABLE.items()
        if where[0] in ("linear", "labels-1000")
    ]


def figure(runs):
    return study.dots(runs, {title: where for title, where in TABLE.items() if where[0] != "train"})


if __name__ == "__main__":
    study.main(sys.modules[__name__])
