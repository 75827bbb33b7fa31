"""HPM, part by part: predicting losses helps, hard masks help more, and their order matters.

The paper's tables (ViT-B/16, ImageNet, 200 epochs, fine-tuned): MAE 82.23 %, L_pred beside random masks 82.49 %, with
masks from easy to hard 82.95 %; the relative loss (binary cross-entropy of pairs) is 0.18 points above the absolute one
(mean squared error). Easy to hard is α from 0 to 0.5, hard to easy from 0.5 to 0, always hard 1 to 1.
Fine-tuning takes 200 steps of 64 with 1,000 labels, 500 with all 60,000. Nothing else was tried. Of MAE, L_pred alone
and easy to hard hpm_teacher has five seeds, these three among them.

The paper's differences, 0.2 to 0.7 points, are smaller than the intervals of three seeds here: only large effects, as
that of masks that are always hard, can show.
"""

import sys

from studies import study

HPM = f"--task hpm {study.SCENES}"
RUNS = {
    "MAE": f"--task mae {study.SCENES}",
    "L_pred alone": f"{HPM} --mask random",
    "easy to hard": HPM,
    "easy to hard, absolute": f"{HPM} --predictor-loss absolute",
    "hard to easy": f"{HPM} --alpha 0.5,0",
    "always hard": f"{HPM} --alpha 1,1",
}
ALL = f"--task finetune {study.FROZEN} --batch-size 64 --steps 500 --evaluations 1"
PROBES = study.PROBES | {"labels-all": ALL}
SEEDS = range(3)
TABLE = study.FIGURES | {"fine-tuned, all labels (%)": ("labels-all", "top1")} | study.TEACHERS

PAIRS = (  # text, the paper's number, arm, the other
    ("predicting the loss helps, masks being random", "+0.26", "L_pred alone", "MAE"),
    ("masks from easy to hard help beside it", "+0.46", "easy to hard", "L_pred alone"),
    ("HPM is better than MAE", "+0.72", "easy to hard", "MAE"),
    ("the relative loss is better than the absolute one", "+0.18", "easy to hard", "easy to hard, absolute"),
    ("easy to hard is better than hard to easy", "table 4", "easy to hard", "hard to easy"),
    ("easy to hard is better than always hard", "table 4", "easy to hard", "always hard"),
)


def claims(runs):
    measured = [(title, *where) for title, where in TABLE.items() if where[0] != "train"]
    return [
        study.Claim(f"{text}: {title.removesuffix(' (%)')}", paper, study.differences(runs, a, b, *where), "points")
        for text, paper, a, b in PAIRS
        for title, *where in measured
    ]


def figure(runs):
    return study.dots(runs, TABLE)


if __name__ == "__main__":
    study.main(sys.modules[__name__])
