"""Train HPM with a teacher that knows: for each patch, what the student's loss is when it is hidden.

    python -m studies.oracle --task hpm --teacher in-turn …      train.py, its teacher replaced

The student itself reconstructs the patches in turn, four groups at a mask ratio of 75 %, and its true losses stand
where the teacher's predictions would.
"""

import sys

import torch

import hpm
import train


@torch.no_grad()
def true_losses(self, images, noise=None):
    """In place of hpm.HPM.ask_teacher: the student's losses (B, N), averaged as predictions in turn; no features."""
    if noise is None:
        return None, None
    visible, hidden = hpm.split_in_turn(noise[..., -1], self.hidden)  # (B, G, v), (B, G, n)
    many = images.repeat_interleave(hidden.shape[1], dim=0)  # (B * G, C, H, W)
    prediction, _ = self.student(many, visible.flatten(0, 1), hidden.flatten(0, 1))
    target = hpm.gather(self.targets(many), hidden.flatten(0, 1))
    loss = hpm.reconstruction_loss(prediction.float(), target.float(), self.metric).view_as(hidden)
    return hpm.average_in_turn(loss, hidden, noise.shape[1]), None


if __name__ == "__main__":
    hpm.HPM.ask_teacher = true_losses
    sys.exit(train.main())
