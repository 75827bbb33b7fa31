"""What engine/scenes.py promises: scenes that are a function of (seed, index, epoch), and what is known of them."""

import numpy as np
import pytest
import torch

import data
from engine import scenes

GREY = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def items(n, seed=0):
    """n items (n, 28, 28) uint8: a bright ring around a dark middle, of any size and place; labels (n,)."""
    rng = np.random.default_rng(seed)
    images = np.zeros((n, 28, 28), np.uint8)
    for image in images:
        (top, left), (h, w) = rng.integers(0, 10, 2), rng.integers(8, 19, 2)
        image[top : top + h, left : left + w] = rng.integers(9, 256, (h, w))
        image[top + 2 : top + h - 2, left + 2 : left + w - 2] = 0
    return torch.from_numpy(images), torch.arange(n) % 10


def world(n=23, quarters=1, photographs=None, seed=0):
    """A split of n scenes; its photographs are noise, of two sizes."""
    sizes = torch.tensor([[120, 110], [120, 100]])
    if photographs is None:
        photographs = torch.randint(256, (2, 3, 120, 110), generator=torch.Generator().manual_seed(3))
        photographs = photographs.to(torch.uint8)
    side = data.NATIVE_SIZE["scenes" if quarters == 1 else "scenes-many"]
    return scenes.Scenes(*items(n, seed), photographs, sizes, *GREY, side, quarters)


def train(split, batch_size, steps, seed=0, shard=slice(None)):
    how = (split.canvas,) * 2, batch_size, steps, seed, None, "cpu", shard
    batches = [(*batch, *objects) for *batch, objects in split.train_batches(*how, objects=True)]
    return [torch.cat(column) for column in zip(*batches, strict=True)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("quarters", [1, 2])
def test_processes_share_the_batch_that_one_would_see(quarters):
    """R of them with B / R images each; a batch of 16 of 23 images belongs to two epochs, one of 64 to four."""
    split = world(quarters=quarters)
    for batch_size in (16, 64):
        whole = train(split, batch_size, [1])
        parts = [
            train(split, batch_size, [1], shard=slice(i, i + batch_size // 4))
            for i in range(0, batch_size, batch_size // 4)
        ]
        assert same(whole, [torch.cat(column) for column in zip(*parts, strict=True)])
