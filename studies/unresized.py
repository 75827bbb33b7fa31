"""Fine-tune at another resolution with positions that are not interpolated.

python -m studies.unresized --task finetune …             train.py, but patch i keeps position i of the sequence,
                                                          wherever that patch is now; what is more starts at random
python -m studies.unresized --random --task finetune …    the positions of all patches start at random
"""

import functools
import math
import sys

import torch

import train
import vit


def leave(pos_embed, old_grid, new_grid, prefix=1, original=False, random=False):
    """In place of vit.resize_pos_embed: (1, prefix + N, D) -> (1, prefix + N_new, D), random ones from N(0, 0.02²)."""
    new = 0.02 * torch.randn(1, prefix + math.prod(new_grid), pos_embed.shape[2]).to(pos_embed)
    kept = prefix if random else min(pos_embed.shape[1], new.shape[1])
    new[:, :kept] = pos_embed[:, :kept]
    return new


if __name__ == "__main__":
    vit.resize_pos_embed = functools.partial(leave, random="--random" in sys.argv)
    sys.exit(train.main([word for word in sys.argv[1:] if word != "--random"]))
