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
    mask = hpm.hide_in_turn(noise[..., -1], self.hidden)  # (B, G, N)
    visible, hidden = hpm.split_mask(mask.flatten(0, 1), self.hidden)  # (B * G, v), (B * G, n)
    images = images.repeat_interleave(mask.shape[1], dim=0)  # (B * G, C, H, W)
    prediction, _ = self.student(images, visible, hidden)
    target = hpm.gather(self.targets(images), hidden)
    loss = hpm.reconstruction_loss(prediction.float(), target.float(), self.metric)  # (B * G, n)
    return hpm.average_in_turn(loss.view(len(mask), -1, self.hidden), mask), None


if __name__ == "__main__":
    hpm.HPM.ask_teacher = true_losses
    sys.exit(train.main())
