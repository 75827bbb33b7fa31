"""Two more masks, from HPM's code, which has them from UM-MAE (Li et al. 2022, arXiv 2205.10063).

Both were made for encoders that work on windows of an image. MAE's block and grid, in hpm.py, are others. To use one,
hand it to the step: `model(images, None, mask=masks.uniform_mask(noise, grid, 0.75))`.
"""

import math

import torch
from torch.nn import functional as F

from hpm import count_hidden, hide_largest


def uniform_mask(noise, grid, ratio):
    """Keep one patch of each 2 x 2, in each another: noise (B, N) -> mask (B, N) bool, `count_hidden` True in a row.

    MAE's `hpm.grid_mask` keeps the top left one of each. Here it is the one with the least noise. They are hidden last;
    where the ratio asks for a part of either, by their noise. At an odd border a part of a 2 x 2 keeps one, too.
    """
    least = -F.max_pool2d(-noise.unflatten(1, grid), 2, ceil_mode=True)  # (B, ⌈rows / 2⌉, ⌈columns / 2⌉)
    least = least.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)[:, : grid[0], : grid[1]]  # (B, rows, columns)
    return hide_largest((noise > least.flatten(1)) + noise, count_hidden(noise.shape[1], ratio))


def square_mask(draw, grid, ratio):
    """Hide all but one square: draw (B, N, 3) -> mask (B, N) bool, `count_hidden` True in every row.

    MAE's `hpm.block_mask` hides rectangles. The visible patches are those of a square, or of the rectangle next to one
    that has room for them on this grid. The first two numbers of the first patch place it, every place equally likely;
    of more patches than are visible, the third number of each decides which are hidden.
    """
    (rows, columns), hidden = grid, count_hidden(math.prod(grid), ratio)
    visible = rows * columns - hidden
    height = min(rows, math.ceil(max(math.sqrt(visible), visible / columns)))
    width = math.ceil(visible / height)
    top = (draw[:, 0, :1] * (rows - height + 1)).floor()  # (B, 1)
    left = (draw[:, 0, 1:2] * (columns - width + 1)).floor()  # (B, 1)
    row, column = (torch.arange(n, device=draw.device) for n in grid)
    in_rows, in_columns = (row >= top) & (row < top + height), (column >= left) & (column < left + width)
    outside = ~(in_rows[:, :, None] & in_columns[:, None]).flatten(1)  # (B, N)
    return hide_largest(outside + draw[..., 2], hidden)
