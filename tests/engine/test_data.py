"""What data.py promises: which image comes when, what is done to it, and an error that helps when a file is wrong.

Each `..._loops` function is an oracle: one pixel at a time, from the definition alone. Files are written by hand or by
Pillow, downloads come from a server on this machine. Read the tests in order: they follow data.py, and to rewrite one
of its functions until its tests pass is the exercise.
"""

import contextlib
import gzip
import hashlib
import http.server
import importlib.util
import io
import math
import os
import random
import socket
import statistics
import struct
import tarfile
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.fft
import torch
from PIL import Image

import data

CPU = torch.device("cpu")
PLAIN = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)  # mean and deviation that leave pixels as they are
JUST_BELOW_1 = 1 - 2**-24  # the largest float32 that `torch.rand` can give


def equal(ours, oracle, what="", atol=1e-10):
    """Same shape and same numbers, or a failure that says what differs."""
    assert tuple(ours.shape) == np.shape(oracle), what
    np.testing.assert_allclose(ours.numpy(), oracle, rtol=0, atol=atol, err_msg=what)


def same(ours, theirs):
    """Lists of batches (images, labels), bit for bit."""
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(v, w) for a, b in pairs for v, w in zip(a, b, strict=True))


def uniform(*shape, seed=1, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pixels(*shape, seed=1):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@contextlib.contextmanager
def refusal(*words, error=ValueError):
    """The block raises a ValueError, and its message is one line that has all of the words."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, f"the message does not say {word}: {message}"


# ---------------------------------------------------------------------------------------------
# Order and randomness
# ---------------------------------------------------------------------------------------------


def test_random_numbers_depend_on_every_part_of_the_key_and_on_nothing_else():
    keys = [(seed, purpose, step) for seed in range(3) for purpose in range(4) for step in range(3)]
    torch.manual_seed(1)
    first = [torch.rand(4, generator=data.generator(*key)).tolist() for key in keys]
    torch.manual_seed(2)
    again = [torch.rand(4, generator=data.generator(*key)).tolist() for key in reversed(keys)]
    assert first == again[::-1]
    assert len({tuple(numbers) for numbers in first}) == len(keys), "two keys share their numbers: a sum of the parts?"
    assert len({data.ORDER, data.CROP, data.MIX, data.MASK, data.ERASE, data.SUBSET, data.MODEL}) == 7


@pytest.mark.parametrize(("n", "batch_size"), [(10, 5), (10, 4), (7, 3), (5, 12), (3, 7), (1, 3)])
def test_every_epoch_is_a_permutation_and_the_next_one_follows_without_a_gap(n, batch_size):
    """Batches need not divide the set, and may be larger than it."""
    steps = 4 * n // batch_size + 1
    batches = [data.batch_indices(n, batch_size, step, seed=0) for step in range(steps)]
    assert {batch.shape for batch in batches} == {(batch_size,)}
    seen = torch.cat(batches).tolist()
    for first in range(0, len(seen) - n + 1, n):
        assert sorted(seen[first : first + n]) == list(range(n)), f"epoch {first // n} is no permutation"


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    first = [data.batch_indices(100, 50, step, seed=3) for step in range(6)]
    data.epoch_order.cache_clear()
    torch.manual_seed(0)
    again = [data.batch_indices(100, 50, step, seed=3) for step in reversed(range(6))][::-1]
    assert all(map(torch.equal, first, again)), "the order depends on what was asked before"
    smaller = [data.batch_indices(100, 20, step, seed=3) for step in range(15)]
    assert torch.equal(torch.cat(first), torch.cat(smaller)), "the batch size changes the order"
    other = [data.batch_indices(100, 50, step, seed=4) for step in range(6)]
    epochs = [torch.cat(batches[i : i + 2]).tolist() for batches in (first, other) for i in (0, 2, 4)]
    assert len(set(map(tuple, [*epochs, range(100)]))) == 7, "two epochs or two seeds share an order"


# ---------------------------------------------------------------------------------------------
# Augmentation
# ---------------------------------------------------------------------------------------------


def padded_crop_loops(image, top, left, flip, pad):
    """image (C, H, W), padded by zeros, cut at (top, left) of the padded image, then mirrored."""
    C, H, W = image.shape
    out = np.zeros((C, H, W))
    for c, i, j in np.ndindex(C, H, W):
        row, column = i + top - pad, (W - 1 - j if flip else j) + left - pad
        if 0 <= row < H and 0 <= column < W:
            out[c, i, j] = image[c, row, column]
    return out


@pytest.mark.parametrize("pad", [0, 1, 3])
def test_padded_crop_shifts_by_up_to_pad_with_zeros_outside_and_flips(pad):
    """The images are wider than high, and the padding reaches every border."""
    images, draw = pixels(150, 2, 4, 5), uniform(150, 3, dtype=torch.float32)
    places = [[math.floor(v * (2 * pad + 1)) for v in row] for row in draw[:, :2].tolist()]
    flips = [v < 0.5 for v in draw[:, 2].tolist()]
    everything = [
        padded_crop_loops(image, *place, flip, pad)
        for image, place, flip in zip(images.numpy(), places, flips, strict=True)
    ]
    crops = data.padded_crop(images, draw, pad)
    assert crops.dtype == torch.uint8
    equal(crops, np.stack(everything), "cut first, then mirrored? rows from column 0, columns from column 1?")
    for axis in (0, 1):
        assert {place[axis] for place in places} == set(range(2 * pad + 1)), "the test does not reach every shift"


def test_padded_crop_at_the_ends_of_the_draw():
    """0 is a shift by -pad, the largest number below 1 by +pad; a flip needs less than a half."""
    image = pixels(1, 3, 4, 5)
    for first, top in ((0, 0), (JUST_BELOW_1, 4)):
        for second, left in ((0, 0), (JUST_BELOW_1, 4)):
            for third, flip in ((0, True), (0.5 - 2**-24, True), (0.5, False), (JUST_BELOW_1, False)):
                crop = data.padded_crop(image, torch.tensor([[first, second, third]]), 2)
                equal(crop[0], padded_crop_loops(image[0].numpy(), top, left, flip, 2), f"{first} {second} {third}")


def crop_box_loops(height, width, draw, scale):
    """One box of Szegedy et al. 2015: top, left, h, w."""
    area = height * width * (scale[0] + draw[0] * (scale[1] - scale[0]))
    aspect = math.exp(math.log(3 / 4) + draw[1] * (math.log(4 / 3) - math.log(3 / 4)))  # w / h
    h = min(math.sqrt(area / aspect), height)
    w = min(math.sqrt(area * aspect), width)
    return draw[2] * (height - h), draw[3] * (width - w), h, w


@pytest.mark.parametrize(("height", "width"), [(30, 40), (40, 30), (30, 6), (6, 30)])
def test_crop_box_is_uniform_in_area_and_log_aspect_and_stays_inside(height, width):
    """The narrow images cut one side of most boxes."""
    draw, scale = uniform(4, 200), (0.2, 1.0)
    draw[:, 0], draw[:, 1] = 0, 1  # the ends
    sides = (torch.full((200,), side, dtype=torch.float64) for side in (height, width))
    box = data.crop_box(*sides, draw, scale)
    oracle = np.array([crop_box_loops(height, width, column, scale) for column in draw.T.tolist()])
    for name, ours, column in zip(("top", "left", "h", "w"), box, oracle.T, strict=True):
        equal(ours, column, f"{name}: aspect w / h? height before width? the last two draws are top and left?")
    top, left, h, w = (v.numpy() for v in box)
    assert min(top.min(), left.min()) >= 0
    assert (top + h).max() <= height + 1e-9
    assert (left + w).max() <= width + 1e-9
    whole = (h < height) & (w < width)
    assert ((h * w / (height * width))[whole] > 0.2 - 1e-9).all()
    assert not whole.all(), "the test cuts no side"


def cubic(t, a=-0.75):
    """Keys' kernel, with the constant that torch uses."""
    t = abs(t)
    return (a + 2) * t**3 - (a + 3) * t**2 + 1 if t < 1 else a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def crop_and_resize_loops(image, box, flip, size):
    """image (C, H, W) -> (C, *size): pixel centres of the box, four by four neighbours, the border goes on for ever."""
    (top, left, h, w), (C, H, W) = box, image.shape
    out = np.zeros((C, *size))
    for c, i, j in np.ndindex(out.shape):
        y = top + (i + 0.5) * h / size[0] - 0.5
        x = left + ((size[1] - 1 - j if flip else j) + 0.5) * w / size[1] - 0.5
        for m in range(math.floor(y) - 1, math.floor(y) + 3):
            for n in range(math.floor(x) - 1, math.floor(x) + 3):
                pixel = float(image[c, min(max(m, 0), H - 1), min(max(n, 0), W - 1)])
                out[c, i, j] += cubic(y - m) * cubic(x - n) * pixel
    return out.clip(0, 255)


def test_crop_and_resize_is_bicubic_from_a_box_of_its_own_for_each_image():
    """Black and white pixels: bicubic overshoots, and what leaves 0-255 is cut."""
    images = pixels(4, 2, 5, 6) // 128 * 255
    boxes = [(0, 0, 5, 6), (0, 0, 5, 6), (1.25, 0.5, 3, 4.5), (2, 3.4, 3, 2.6)]
    flips, size = [False, True, False, True], (7, 9)
    pairs = zip(images.numpy(), boxes, flips, strict=True)
    oracle = np.stack([crop_and_resize_loops(image, box, flip, size) for image, box, flip in pairs])
    crops = data.crop_and_resize(images, torch.tensor(boxes).T, torch.tensor(flips), size)
    equal(crops, oracle, "pixel centres at one half? a = -0.75? border repeated? flipped inside the box?", 2e-2)
    assert {0, 255} < set(oracle.flatten().tolist()), "the test cuts nothing"


@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_resize_to_the_boxs_own_size_only_cuts_it_out(flip):
    """The whole image comes back as it is, and a box at whole pixels is a slice."""
    images = pixels(2, 3, 9, 12)
    for top, left, h, w in ((0, 0, 9, 12), (2, 5, 6, 4)):
        box = torch.tensor([[top, left, h, w]] * 2).T
        crops = data.crop_and_resize(images, box, torch.tensor([flip] * 2), (h, w))
        piece = images[:, :, top : top + h, left : left + w].numpy()
        equal(crops, piece[..., ::-1] if flip else piece, atol=2e-2)


def test_mixup_gives_every_pixel_the_weight_of_its_image():
    """mixup (Zhang et al. 2018)."""
    weights = data.mixup_weights(torch.tensor([0.25, 1.0]), (2, 3))
    equal(weights, np.array([[[[0.25] * 3] * 2], [[[1.0] * 3] * 2]]))


@pytest.mark.parametrize(
    ("weight", "centre", "rows", "columns"),
    [
        (0.75, (0.5, 0.5), range(5, 15), range(10, 30)),  # sides of sqrt(1 - 0.75) = a half
        (0.75, (0.0, 0.5), range(0, 5), range(10, 30)),  # the border cuts it
        (0.75, (0.9, 0.95), range(13, 20), range(28, 40)),
        (0.0, (0.5, 0.5), range(20), range(40)),
        (1.0, (0.5, 0.5), range(0), range(0)),
    ],
)
def test_cutmix_is_a_box_of_the_images_shape_that_the_border_cuts(weight, centre, rows, columns):
    """CutMix (Yun et al. 2019), by hand: 20 x 40 pixels, a box of (1 - weight) of them around the centre."""
    oracle = np.ones((1, 1, 20, 40))
    for i in rows:
        for j in columns:
            oracle[0, 0, i, j] = 0
    weights = data.cutmix_weights(torch.tensor([weight]), torch.tensor([centre]), (20, 40))
    equal(weights, oracle, "centre = (row, column)? the box is the neighbour's, so it is 0?")


def test_cutmix_boxes_lie_on_whole_pixels():
    weight, centre, (H, W) = uniform(100), uniform(100, 2, seed=2), (6, 9)
    oracle = np.ones((100, 1, H, W))
    for b, _, i, j in np.ndindex(oracle.shape):
        half = math.sqrt(1 - weight[b]) / 2
        y, x = centre[b].tolist()
        if round((y - half) * H) <= i < round((y + half) * H) and round((x - half) * W) <= j < round((x + half) * W):
            oracle[b, 0, i, j] = 0
    equal(data.cutmix_weights(weight, centre, (H, W)), oracle)


@pytest.mark.parametrize("B", [1, 4, 5])
def test_blend_mixes_neighbours_and_their_targets_by_the_share_of_the_pixels(B):
    """0 with 1, 2 with 3, …; an odd last one stays alone. The weights need not be the same for every pixel."""
    images, targets, weights = uniform(B, 2, 3, 4), uniform(B, 5, seed=2), uniform(B, 1, 3, 4, seed=3).round(decimals=1)
    targets /= targets.sum(dim=1, keepdim=True)
    mixed, labels = np.zeros((B, 2, 3, 4)), np.zeros((B, 5))
    for b in range(B):
        neighbour = b + 1 if b % 2 == 0 else b - 1
        if neighbour == B:
            neighbour = b
        for c, i, j in np.ndindex(2, 3, 4):
            own = float(weights[b, 0, i, j])
            mixed[b, c, i, j] = own * images[b, c, i, j] + (1 - own) * images[neighbour, c, i, j]
            for k in range(5):
                labels[b, k] += (own * targets[b, k] + (1 - own) * targets[neighbour, k]) / (2 * 3 * 4)
    ours = data.blend(images, targets, weights)
    equal(ours[0], mixed, "own weight on the own image?")
    equal(ours[1], labels, "the share is the mean of the weights, not the number that was drawn")
    equal(ours[1].sum(dim=1), np.ones(B), "targets sum to 1")


def flat(B, H=8, W=8):
    """Image b is all b + 1, its label is b: what was mixed can be read off."""
    return torch.arange(1.0, B + 1)[:, None, None, None].expand(B, 1, H, W), torch.arange(B)


def test_mixup_alone_blends_every_pixel_by_the_weight_of_the_label():
    B = 7
    images, targets = data.mix(*flat(B), B, mixup=0.8, cutmix=0, seed=1, step=2, batch_size=B)
    oracle, shares = np.zeros((B, 1, 8, 8)), [float(targets[b, b]) for b in range(B)]
    for b, neighbour in enumerate((1, 0, 3, 2, 5, 4, 6)):
        oracle[b] = shares[b] * (b + 1) + (1 - shares[b]) * (neighbour + 1)
        assert float(targets[b, [b, neighbour]].unique().sum()) == pytest.approx(1)
        assert (targets[b] > 0).sum() == len({b, neighbour})
    equal(images, oracle, atol=1e-5)
    assert len(set(shares)) == B, "every image has a weight of its own"


def test_cutmix_alone_pastes_one_box_and_labels_by_its_actual_area():
    """The border cuts boxes and rounding moves their sides, so the share is counted, not taken from the draw."""
    B = 40
    images, targets = data.mix(*flat(B), B, mixup=0, cutmix=1.0, seed=0, step=0, batch_size=B)
    foreign = 0
    for b in range(B):
        own, other = images[b, 0] == b + 1, images[b, 0] == (b ^ 1) + 1
        assert (own | other).all(), "CutMix mixes no pixels"
        assert float(targets[b, b]) == pytest.approx(float(own.sum()) / 64, abs=1e-6)
        assert float(targets[b, b ^ 1]) == pytest.approx(float(other.sum()) / 64, abs=1e-6)
        assert other.sum() == other.any(dim=0).sum() * other.any(dim=1).sum(), "the pasted pixels are no box"
        foreign += bool(other.any())
    assert foreign > B / 2


def test_with_both_on_each_image_takes_one_of_them_by_a_fair_coin():
    B = 2000
    images = torch.arange(1.0, B + 1)[:, None, None, None].expand(B, 1, 4, 4)
    images, _ = data.mix(images, torch.zeros(B, dtype=torch.int64), 1, 0.8, 1.0, seed=0, step=0, batch_size=B)
    own = torch.arange(1.0, B + 1)[:, None]
    other = (torch.arange(B) ^ 1)[:, None] + 1.0
    cut = ((images.flatten(1) == own) | (images.flatten(1) == other)).all(dim=1)
    even = (images.flatten(1) == images.flatten(1)[:, :1]).all(dim=1)
    assert (cut | even).all(), "an image that took both, or neither"
    assert float(cut.float().mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 2.0])
def test_the_weights_of_mixup_are_drawn_from_beta(alpha):
    """Beta(a, a) has the mean 1/2 and the variance 1 / (4 (2a + 1))."""
    B = 20_000
    labels = torch.arange(B) % 2
    _, targets = data.mix(torch.zeros(B, 1, 1, 1), labels, 2, alpha, 0, seed=0, step=0, batch_size=B)
    shares = targets[torch.arange(B), labels].double()
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(shares.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_boxes_of_cutmix_have_beta_areas_and_uniform_centres(alpha):
    """A box of side r around a uniform centre keeps r - r^2/4 of a side on average; r^2 is from Beta(a, a)."""
    B = 2000
    labels = torch.arange(B) % 2
    _, targets = data.mix(torch.zeros(B, 1, 64, 64), labels, 2, 0, alpha, seed=0, step=0, batch_size=B)
    box = 1 - float(targets[torch.arange(B), labels].mean())

    def moment(k):  # of Beta(alpha, alpha)
        return math.gamma(alpha + k) * math.gamma(2 * alpha) / math.gamma(alpha) / math.gamma(2 * alpha + k)

    assert box == pytest.approx(moment(1) - moment(1.5) / 2 + moment(2) / 16, abs=0.02)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_mixing_is_a_function_of_seed_and_step_and_even_slices_equal_the_whole(mixup, cutmix):
    """Two processes that hold half the batch each see what one process sees."""

    def mixed(seed, step, here=slice(None)):
        np.random.seed(step)  # noqa: NPY002 - global random numbers must not matter
        images, labels = flat(8)
        return data.mix(images[here], labels[here], 8, mixup, cutmix, seed, step, 8, here)

    whole = mixed(0, 5)
    torch.manual_seed(0)
    assert same([whole], [mixed(0, 5)])
    for cut in (2, 4, 6):
        parts = [mixed(0, 5, slice(0, cut)), mixed(0, 5, slice(cut, None))]
        assert same([whole], [[torch.cat(v) for v in zip(*parts, strict=True)]]), "weights of the wrong rows"
    assert not torch.equal(whole[1], mixed(0, 6)[1])
    assert not torch.equal(whole[1], mixed(1, 5)[1])


def test_erasing_fills_a_box_of_2_to_33_percent_with_noise():
    """Random erasing (Zhong et al. 2020): half of 1000 images, w / h from 0.3 to 1 / 0.3, N(0, 1) for each pixel."""
    B, H, W = 1000, 40, 60
    images = torch.full((B, 2, H, W), 100.0)
    erased = data.erase(images, 0.5, seed=0, step=0, batch_size=B)
    changed = erased != images
    assert torch.equal(changed[:, 0], changed[:, 1]), "the box is the same for each channel"
    boxes = changed[:, 0][changed.flatten(1).any(dim=1)]
    assert len(boxes) / B == pytest.approx(0.5, abs=0.05)
    h, w = boxes.any(dim=2).sum(dim=1), boxes.any(dim=1).sum(dim=1)
    assert torch.equal(boxes.sum(dim=(1, 2)), h * w), "what was erased is no box"
    uncut = (h < H) & (w < W)
    share, aspect = (h * w / (H * W))[uncut], (w / h)[uncut]
    for name, values, low, high in (("share", share, 0.02, 1 / 3), ("w / h", aspect, 0.3, 1 / 0.3)):
        assert low * 0.8 < values.min() < low * 1.4, f"{name} starts at {values.min():.3f}, not {low}"  # whole pixels
        assert high * 0.8 < values.max() < high * 1.2, f"{name} ends at {values.max():.3f}, not {high}"
    assert boxes.any(dim=0)[3:-3, 3:-3].all(), "some place is never erased"  # at the very corner few boxes begin
    noise = erased[changed]
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    assert len(noise.unique()) > 0.9 * len(noise), "pixels share their noise"


def test_erasing_is_a_function_of_seed_and_step_and_slices_equal_the_whole():
    images = uniform(12, 3, 20, 20, dtype=torch.float32)

    def erased(seed, step, probability=1.0, here=slice(None)):
        return data.erase(images[here], probability, seed, step, 12, here)

    whole = erased(0, 5)
    torch.manual_seed(0)
    for here in (slice(None), slice(0, 5), slice(5, 12), slice(1, None, 3)):
        assert torch.equal(erased(0, 5, here=here), whole[here])
    assert (whole != images).flatten(1).any(dim=1).all(), "a probability of 1 erases every image"
    assert torch.equal(erased(0, 5, probability=0.0), images)
    assert not torch.equal(erased(0, 6), whole)
    assert not torch.equal(erased(1, 5), whole)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalised_pixels_are_brought_to_0_1_then_mean_0_and_deviation_1(dtype):
    images, mean, std = pixels(2, 3, 2, 4).to(dtype), (0.5, 0.25, 0.1), (0.2, 0.3, 0.4)
    oracle = np.zeros((2, 3, 2, 4))
    for b, c, i, j in np.ndindex(oracle.shape):
        oracle[b, c, i, j] = (float(images[b, c, i, j]) / 255 - mean[c]) / std[c]
    ours = data.normalise(images, mean, std)
    assert ours.dtype == torch.float32
    equal(ours, oracle, "a mean and a deviation for each channel?", 1e-5)


# ---------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "counts"), [(3, [1, 1, 1]), (12, [4, 4, 4]), (14, [4, 5, 5]), (28, [5, 11, 12]), (85, [5, 30, 50])]
)
def test_a_balanced_subset_has_as_many_of_each_class_or_one_more(n, counts):
    """Of 50, 5, and 30: once a class is used up, the others go on."""
    labels = torch.tensor([0] * 50 + [1] * 5 + [2] * 30)[torch.randperm(85, generator=torch.Generator().manual_seed(0))]
    keep = data.balanced(labels, n, seed=0)
    assert keep.tolist() == sorted(set(keep.tolist())), "each once, in order"
    assert sorted(torch.bincount(labels[keep]).tolist()) == counts
    torch.manual_seed(0)
    assert torch.equal(data.balanced(labels, n, seed=0), keep)
    others = {tuple(data.balanced(labels, n, seed).tolist()) for seed in range(5)}
    assert len(others) == (5 if n < 85 else 1), "the choice is not random"


def test_a_subset_larger_than_the_set_is_refused():
    with refusal("11", "10", "fewer"):
        data.balanced(torch.arange(10), 11, seed=0)


def save(image, path, **options):
    """Write an image, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def photograph(image):
    """(3, H, W) uint8 -> a Pillow image."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def split_of(kind, images, path):
    """The same colour images as either kind of split; image i has the label i."""
    if kind == "memory":
        return data.InMemory(images, torch.arange(len(images)), *PLAIN)
    for i, image in enumerate(images):
        save(photograph(image), path / f"{i:02}" / "image.png")
    return data.Folder(path, *PLAIN)


KINDS_AND_CROPS = [("memory", 2), ("memory", None), ("memory", (0.2, 1.0)), ("folder", (0.2, 1.0))]


@pytest.mark.parametrize(("kind", "crop"), KINDS_AND_CROPS)
def test_slices_of_a_batch_together_equal_the_batch(kind, crop, tmp_path):
    """R processes that see B / R images each train as one that sees B. Seven images: batches run across epochs."""
    split, B = split_of(kind, pixels(7, 3, 12, 10), tmp_path), 6

    def batches(here=slice(None)):
        return list(split.train_batches((8, 6), B, range(3), 0, crop, CPU, here))

    whole = batches()
    assert [images.shape for images, _ in whole] == [(B, 3, 8, 6)] * 3
    for R in (2, 3):
        contiguous = [slice(r * B // R, (r + 1) * B // R) for r in range(R)]
        for slices in (contiguous, [slice(r, None, R) for r in range(R)]):
            for here in slices:
                expected = [(images[here], labels[here]) for images, labels in whole]
                assert same(batches(here), expected), f"{here} of the batch differs from the whole batch's"


@pytest.mark.parametrize(("kind", "crop"), KINDS_AND_CROPS)
def test_a_run_that_starts_at_step_s_sees_what_it_would_have_seen(kind, crop, tmp_path):
    """What a resumed run relies on; another seed sees something else."""
    split = split_of(kind, pixels(7, 3, 12, 10), tmp_path)

    def batches(steps, seed=0):
        return list(split.train_batches((12, 10), 6, steps, seed, crop, CPU))

    torch.manual_seed(0)
    through = batches(range(5))
    torch.manual_seed(1)
    assert same(batches(range(3, 5)), through[3:])
    labels = [labels.tolist() for _, labels in through]
    assert labels == [data.batch_indices(7, 6, step, 0).tolist() for step in range(5)]
    assert not same(batches(range(2), seed=1), through[:2])


def test_padded_training_images_are_shifts_of_their_own_image():
    """Every shift and both directions come up; the label belongs to the image."""
    split, found = data.InMemory(pixels(6, 3, 5, 4), torch.arange(6), *PLAIN), set()
    shifts = [(top, left, flip) for top in range(3) for left in range(3) for flip in (False, True)]
    oracle = [[padded_crop_loops(image, *shift, 1) for shift in shifts] for image in split.images.numpy()]
    for images, labels in split.train_batches((5, 4), 40, range(5), 0, 1, CPU):
        for image, label in zip(images.round().numpy(), labels.tolist(), strict=True):
            matches = [shift for shift, crop in zip(shifts, oracle[label], strict=True) if (crop == image).all()]
            assert matches, "not a shift of the image that its label names"
            found.add(matches[0])
    assert found == set(shifts)


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_random_resized_crops_have_the_area_the_aspect_and_the_place_that_they_should(kind, tmp_path):
    """Colours tell the place: red grows by the row, green by the column. A resized ramp is a ramp."""
    ramp = torch.zeros(1, 3, 100, 120, dtype=torch.uint8)
    ramp[:, 0], ramp[:, 1] = torch.arange(100)[:, None] * 2, torch.arange(120) * 2
    split, boxes = split_of(kind, ramp, tmp_path), []
    for images, _ in split.train_batches((16, 20), 150, range(1), 0, (0.3, 0.6), CPU):
        for red, green, _ in images.numpy() / 2:
            y, x = red.mean(axis=1), green.mean(axis=0)
            h, w = (y[12] - y[3]) / 9 * 16, (x[16] - x[3]) / 13 * 20  # far from the borders, where the ramp ends
            boxes.append((h * abs(w) / 12_000, abs(w) / h, y[7:9].mean() - h / 2, x[9:11].mean() - abs(w) / 2, w < 0))
    area, aspect, top, left, flipped = np.array(boxes).T
    h = np.sqrt(area * 12_000 / aspect)
    for name, values, low, high in (
        ("area", area, 0.3, 0.6),
        ("aspect w / h", aspect, 3 / 4, 4 / 3),
        ("top", (top + 0.5) / (100 - h), 0, 1),
        ("left", (left + 0.5) / (120 - h * aspect), 0, 1),
    ):
        margin = 0.1 * (high - low)
        assert low - margin / 2 < values.min() < low + margin, f"{name} starts at {values.min():.3f}, not {low}"
        assert high - margin < values.max() < high + margin / 2, f"{name} ends at {values.max():.3f}, not {high}"
    assert flipped.mean() == pytest.approx(0.5, abs=0.12)
    related = np.corrcoef([area, aspect, (top + 0.5) / (100 - h), (left + 0.5) / (120 - h * aspect), flipped])
    assert np.abs(related - np.eye(5)).max() < 0.3, "two of area, aspect, top, left, and flip share a random number"


def test_samples_of_a_small_set_wrap_around_its_images():
    """Sample i is image i % n: one photograph stands for many crops, each with the label of its own."""
    images, labels = pixels(3, 3, 4, 4), torch.arange(7) * 10
    split = data.InMemory(images, labels, *PLAIN)
    assert len(split) == 7
    tested = list(split.test_batches((4, 4), 3, CPU))
    assert [labels.tolist() for _, labels in tested] == [[0, 10, 20], [30, 40, 50], [60]]
    equal(torch.cat([images for images, _ in tested]), images[[0, 1, 2, 0, 1, 2, 0]].numpy(), atol=1e-3)
    (trained, labels), *_ = split.train_batches((4, 4), 7, range(1), 0, None, CPU)
    equal(trained, images[(labels // 10) % 3].numpy(), atol=1e-3)


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_a_subset_of_a_split_keeps_images_and_labels_together(kind, tmp_path):
    """And leaves the split as it was."""
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 8, 8) * 20
    split = split_of(kind, images, tmp_path)
    part = split.subset(6, seed=0)
    assert (len(part), len(split)) == (6, 10)
    (seen, labels), *_ = part.test_batches((8, 8), 10, CPU)
    assert labels.tolist() == data.balanced(torch.arange(10), 6, seed=0).tolist()
    assert (seen.round() == 20 * labels[:, None, None, None]).all(), "another image's label"


def test_a_subset_of_a_set_that_wraps_around_keeps_images_sizes_and_labels_together():
    """Twelve samples of 3 images, of which each has every label."""
    images, labels = (
        torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 9, 9) * 20,
        torch.arange(12) % 4,
    )
    split = data.InMemory(images, labels, *PLAIN, sizes=torch.tensor([[4, 4], [5, 5], [6, 6]]))
    part, keep = split.subset(7, seed=0), data.balanced(labels, 7, seed=0)
    (seen, given), *_ = part.test_batches((8, 8), 10, CPU)
    assert given.tolist() == labels[keep].tolist()
    assert (seen.round() == 20 * (keep % 3)[:, None, None, None]).all(), "another sample's image"
    assert part.sizes[:, 0].tolist() == (4 + keep % 3).tolist(), "another sample's size"


@pytest.mark.parametrize("size", [(6, 6), (5, 7), (8, 9)])
@pytest.mark.parametrize("crop", [None, (0.2, 1.0)])
def test_images_in_a_frame_give_what_they_give_without_it(crop, size):
    """`sizes` says how much of the frame is the image; the last size here is the frame's own."""
    images, labels = pixels(2, 3, 5, 7), torch.arange(2)
    frames = torch.from_numpy(np.pad(images.numpy(), ((0, 0), (0, 0), (0, 3), (0, 2)), mode="edge"))
    bare = data.InMemory(images, labels, *PLAIN)
    framed = data.InMemory(frames, labels, *PLAIN, sizes=torch.tensor([[5, 7]] * 2))
    for (a, _), (b, _) in zip(bare.test_batches(size, 2, CPU), framed.test_batches(size, 2, CPU), strict=True):
        equal(b, a.numpy(), "test: the frame is taken for the image", 2e-2)
    batches = (split.train_batches(size, 4, range(2), 0, crop, CPU) for split in (bare, framed))
    for (a, _), (b, _) in zip(*batches, strict=True):
        equal(b, a.numpy(), "train: the frame is taken for the image", 2e-2)


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_the_test_split_gives_every_image_once_and_in_order(kind, tmp_path):
    """Also for a batch size that does not divide the set, and shared among processes."""
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 8, 8) * 20
    split = split_of(kind, images, tmp_path)

    def seen(batch_size, here=slice(None)):
        batches = list(split.test_batches((6, 6), batch_size, CPU, here))
        for batch, labels in batches:
            assert (batch.round() == 20 * labels[:, None, None, None]).all(), "another image's label"
        return [labels.tolist() for _, labels in batches]

    assert seen(4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert seen(64) == [list(range(10))]
    assert [seen(3, slice(r, None, 3)) for r in range(3)] == [[[0, 3, 6], [9]], [[1, 4, 7]], [[2, 5, 8]]]


def test_features_come_in_the_order_of_the_images_that_they_stand_for():
    """A linear probe sees the batches that it would see if it ran the encoder each time."""
    split = data.Features(uniform(7, 4), torch.arange(7))
    assert len(split) == 7
    batches = list(split.train_batches(None, 6, range(2, 5), 0, None, CPU, slice(1, None, 2)))
    for step, (features, labels) in zip(range(2, 5), batches, strict=True):
        assert labels.tolist() == data.batch_indices(7, 6, step, 0)[1::2].tolist()
        assert torch.equal(features, split.features[labels])
    tested = list(split.test_batches(None, 2, CPU, slice(0, None, 2)))
    assert [labels.tolist() for _, labels in tested] == [[0, 2], [4, 6]]
    assert all(torch.equal(features, split.features[labels]) for features, labels in tested)


def test_classes_of_a_folder_are_its_folders_sorted_and_files_come_sorted(tmp_path):
    """Images of any size and suffix share a batch; what is no image by its name is left out."""
    for i, name in enumerate(("wolf/b.JPG", "cat/1.png", "wolf/a.jpeg", "ape/x.tiff", "ape/x.bmp", "cat/0.webp")):
        image = Image.new("RGB", (20 + 9 * i, 50 - 7 * i), (40 * i, 0, 0))
        save(image, tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "notes.txt").write_text("no class")
    split = data.Folder(tmp_path, *PLAIN)
    assert split.classes == ["ape", "cat", "wolf"]
    (images, labels), *_ = split.test_batches((8, 8), 9, CPU)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    equal(images[:, 0].mean(dim=(1, 2)), [160, 120, 200, 40, 80, 0], atol=2)  # x.bmp x.tiff 0.webp 1.png a.jpeg b.JPG


# ---------------------------------------------------------------------------------------------
# From a file to an image
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "size", "rows", "columns"),
    [
        (48, 32, (28, 28), slice(2, 30), slice(10, 38)),
        (32, 48, (28, 28), slice(10, 38), slice(2, 30)),
        (48, 16, (14, 28), slice(1, 15), slice(10, 38)),
        (20, 32, (28, 14), slice(2, 30), slice(3, 17)),
    ],
)
def test_the_test_crop_is_the_middle_seven_eighths(width, height, size, rows, columns, tmp_path):
    """224 of 256, as for ImageNet. Sizes for which no pixel needs to be resized: the crop is a slice."""
    image = pixels(3, height, width)
    file = save(photograph(image), tmp_path / "image.png")
    ours = data.read_image(file, size, None, None)
    assert ours.dtype == torch.uint8
    equal(ours, image[:, rows, columns].numpy(), "7/8 of the side that fits less often? centred?")


def test_shrinking_averages_what_a_pixel_covers(tmp_path):
    """A ramp stays a ramp; stripes one pixel wide become grey instead of a pattern that was not there."""
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[0], image[1] = torch.arange(64) * 4, torch.arange(64) % 2 * 255
    ours = data.read_image(save(photograph(image), tmp_path / "image.png"), (14, 14), None, None).numpy()  # by 4
    ramp = [4 * (4 + (j + 0.5) * 4 - 0.5) for j in range(14)]
    np.testing.assert_allclose(ours[0], [ramp] * 14, atol=1)
    np.testing.assert_allclose(ours[1], np.full((14, 14), 127.5), atol=12)


@pytest.mark.parametrize("flip", [False, True])
def test_a_training_crop_takes_its_box_from_the_draw(flip, tmp_path):
    """A quarter of the area, aspect 1, at a quarter and a half of the room: a slice. Below a half it is mirrored."""
    image = pixels(3, 32, 32)
    file, draw = save(photograph(image), tmp_path / "image.png"), [0.49 if flip else 0.5, 0.3, 0.5, 0.25, 0.5]
    piece = image[:, 4:20, 8:24].numpy()
    ours = data.read_image(file, (16, 16), (0.25, 0.25), draw)
    equal(ours, piece[..., ::-1] if flip else piece, atol=1)


COLOURS = {
    "grey": ("L", 77, (77, 77, 77), {}),
    "grey with alpha": ("LA", (77, 0), (77, 77, 77), {}),
    "1 bit, white": ("1", 1, (255, 255, 255), {}),
    "1 bit, black": ("1", 0, (0, 0, 0), {}),
    "16-bit grey, white": ("I;16", 65535, (255, 255, 255), {}),
    "16-bit grey, middle": ("I;16", 32768, (128, 128, 128), {}),
    "16-bit grey, darkest": ("I;16", 255, (0, 0, 0), {}),
    "RGB": ("RGB", (10, 20, 30), (10, 20, 30), {}),
    "transparent": ("RGBA", (10, 20, 30, 0), (10, 20, 30), {}),
    "palette": ("P", 2, (70, 80, 90), {}),
    "palette, transparent entry": ("P", 2, (70, 80, 90), {"transparency": 2}),
    "palette, alpha for each entry": ("P", 2, (70, 80, 90), {"transparency": bytes([255, 9, 128])}),
    "CMYK": ("CMYK", (51, 102, 0, 85), (136, 102, 170), {}),  # (255 - C) (255 - K) / 255
}


@pytest.mark.parametrize("kind", COLOURS)
def test_every_kind_of_colour_becomes_8_bit_rgb(kind, tmp_path):
    """Of 16 bits the upper 8 are kept, transparency is dropped."""
    mode, colour, rgb, options = COLOURS[kind]
    image = Image.new(mode, (9, 9), colour)
    if mode == "P":
        image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    suffix = "tiff" if mode == "CMYK" else "png"
    file = save(image, tmp_path / f"image.{suffix}", **options)
    with Image.open(file) as stored:
        assert stored.mode[0] == mode[0], "the file is of another kind than the test needs"
    ours = data.read_image(file, (8, 8), None, None)
    assert ours.dtype == torch.uint8
    equal(ours, np.broadcast_to(np.array(rgb)[:, None, None], (3, 8, 8)), atol=1 if mode == "CMYK" else 0)


# EXIF 2.3, tag 274: where the first row and the first column of the stored image are in the picture.
ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored_loops(picture, orientation):
    """picture (H, W, 3) as a camera stores it that was held this way."""
    row_0, column_0 = ORIENTATIONS[orientation]
    H, W, _ = picture.shape
    turned = row_0 in ("left", "right")  # a stored row is a column of the picture
    stored = np.zeros((W, H, 3) if turned else (H, W, 3), np.uint8)
    for r, c, k in np.ndindex(stored.shape):
        down, across = (c, r) if turned else (r, c)
        y = H - 1 - down if "bottom" in (row_0, column_0) else down
        x = W - 1 - across if "right" in (row_0, column_0) else across
        stored[r, c, k] = picture[y, x, k]
    return stored


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_an_image_is_turned_as_its_exif_orientation_says(orientation, suffix, tmp_path):
    """A wide picture of 4 x 6 colours, each 40 x 40 pixels; the test crop and a training crop, whole and partial."""
    picture = pixels(4, 6, 3).numpy()
    exif = Image.Exif()
    exif[274] = orientation
    stored = stored_loops(picture, orientation).repeat(40, axis=0).repeat(40, axis=1)
    file = save(Image.fromarray(stored), tmp_path / f"turned.{suffix}", exif=exif, quality=95)
    upright = Image.fromarray(picture.repeat(40, axis=0).repeat(40, axis=1))  # 240 x 160
    for crop, draw, box in (
        (None, None, (15, 10, 225, 150)),
        ((1.0, 1.0), [0.9, 0.5, 0.5, 0.5, 0.5], (22.02, 0, 217.98, 160)),  # 196 x 196 is too high
        ((0.25, 0.25), [0.9, 0.5, 0.5, 0.0, 1.0], (142.02, 0, 240, 97.98)),
    ):
        oracle = np.asarray(upright.resize((30, 20), Image.Resampling.BICUBIC, box)).transpose(2, 0, 1)
        ours = data.read_image(file, (20, 30), crop, draw).numpy()
        difference = np.abs(ours - oracle.astype(float)).mean()
        assert difference < (3 if suffix == "jpg" else 0.1), f"turned or squeezed, box {box}"


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_exif_orientation_that_does_not_exist_changes_nothing(orientation, tmp_path):
    exif, image = Image.Exif(), photograph(pixels(3, 16, 32))
    exif[274] = orientation
    odd, plain = save(image, tmp_path / "odd.png", exif=exif), save(image, tmp_path / "plain.png")
    assert torch.equal(data.read_image(odd, (8, 8), None, None), data.read_image(plain, (8, 8), None, None))


def skimage_folder():
    return Path(importlib.util.find_spec("skimage").submodule_search_locations[0], "data")


@pytest.mark.parametrize("side", [32, 100, 220, 400])
@pytest.mark.parametrize("crop", [None, (0.1, 0.1)])
def test_a_jpeg_decoded_at_a_fraction_of_its_size_looks_as_if_decoded_in_full(side, crop, tmp_path):
    """Decoding at 1/2, 1/4 or 1/8 is only right as long as the crop has more pixels than the result."""
    with Image.open(skimage_folder() / "astronaut.png") as image:  # 512 x 512
        file = save(image.convert("RGB"), tmp_path / "image.jpg", quality=95)
    box = (32, 32, 480, 480)
    if crop:
        room = 512 - 512 * math.sqrt(0.1)
        box = (0.3 * room, 0.1 * room, 512 - 0.7 * room, 512 - 0.9 * room)
    with Image.open(file) as image:
        oracle = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box)).transpose(2, 0, 1)
    ours = data.read_image(file, (side, side), crop, [0.9, 0.5, 0.5, 0.1, 0.3]).numpy()
    assert np.abs(ours - oracle.astype(float)).mean() < 3


@pytest.mark.parametrize("size", [(1, 1), (300, 1), (1, 300)])
def test_a_very_narrow_image_can_be_cropped(size, tmp_path):
    file = save(Image.new("RGB", size, (10, 20, 30)), tmp_path / "image.png")
    for crop, draw in ((None, None), ((0.08, 1.0), [0.9, 0.0, JUST_BELOW_1, JUST_BELOW_1, 0.0])):
        ours = data.read_image(file, (4, 6), crop, draw)
        equal(ours, np.broadcast_to([[[10]], [[20]], [[30]]], (3, 4, 6)))


def test_randaugment_applies_two_of_its_operations_each_with_probability_one_half(monkeypatch):
    """RandAugment (Cubuk et al. 2020) with the strength N(9, 1/2) of 10, cut to 0-10; both signs alike."""
    calls = []
    spies = [lambda image, s, sign, k=k: calls.append((k, s, sign)) or image for k in range(len(data.OPERATIONS))]
    monkeypatch.setattr(data, "OPERATIONS", spies)
    rng, image, counts = random.Random(0), Image.new("RGB", (4, 4)), []
    for _ in range(4000):
        before = len(calls)
        assert data.randaugment(image, 9.0, rng) is image
        counts.append(len(calls) - before)
    for count, share in ((0, 1 / 4), (1, 1 / 2), (2, 1 / 4)):
        assert counts.count(count) / 4000 == pytest.approx(share, abs=0.03)
    which, strength, sign = np.array(calls).T
    assert np.bincount(which.astype(int), minlength=len(spies)) == pytest.approx(len(calls) / len(spies), rel=0.25)
    assert strength.max() == 1
    assert np.median(strength) == pytest.approx(0.9, abs=0.005)
    assert np.percentile(strength, 16) == pytest.approx(0.85, abs=0.005)  # one deviation below
    assert set(sign) == {-1, 1}
    assert sign.mean() == pytest.approx(0, abs=0.05)


def test_randaugment_is_a_function_of_the_draw_and_for_training_only(tmp_path):
    """So that a resumed run, and a process that holds part of a batch, see the same."""
    file, draws = save(photograph(pixels(3, 20, 24)), tmp_path / "image.png"), uniform(20, 5).tolist()
    first = [data.read_image(file, (16, 16), (0.2, 1.0), draw, 9.0) for draw in draws]
    random.seed(0)
    again = [data.read_image(file, (16, 16), (0.2, 1.0), draw, 9.0) for draw in draws]
    plain = [data.read_image(file, (16, 16), (0.2, 1.0), draw) for draw in draws]
    assert all(map(torch.equal, first, again))
    assert {(image.dtype, image.shape) for image in first} == {(torch.uint8, (3, 16, 16))}
    assert 10 <= sum(not torch.equal(a, b) for a, b in zip(first, plain, strict=True)) < 20
    tested = [data.read_image(file, (16, 16), None, None, magnitude) for magnitude in (0.0, 9.0)]
    assert torch.equal(*tested)


def luma(pixel):
    return (0.299 * pixel[..., 0] + 0.587 * pixel[..., 1] + 0.114 * pixel[..., 2])[..., None]


def sharper(i, factor):
    """Away from an image smoothed by [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13; the border stays."""
    smooth = i.copy()
    for y, x in np.ndindex(i.shape[0] - 2, i.shape[1] - 2):
        smooth[y + 1, x + 1] = (i[y : y + 3, x : x + 3].sum(axis=(0, 1)) + 4 * i[y + 1, x + 1]) / 13
    return smooth + factor * (i - smooth)


COLOUR_OPERATIONS = {  # place in OPERATIONS, strength, sign, and the operation by hand
    "autocontrast": (0, 0.5, 1, lambda i: (i - i.min((0, 1))) * 255 / (i.max((0, 1)) - i.min((0, 1)))),
    "invert": (2, 0.5, 1, lambda i: 255 - i),
    "posterize to 4 bits": (3, 0.0, 1, lambda i: i // 16 * 16),
    "posterize to 2 bits": (3, 0.5, 1, lambda i: i // 64 * 64),
    "posterize to 1 bit": (3, 1.0, 1, lambda i: i // 128 * 128),
    "solarize the upper half": (4, 0.5, 1, lambda i: np.where(i >= 128, 255 - i, i)),
    "more colour": (5, 0.5, 1, lambda i: luma(i) + 1.45 * (i - luma(i))),
    "less colour": (5, 1.0, -1, lambda i: luma(i) + 0.1 * (i - luma(i))),
    "more contrast": (6, 0.5, 1, lambda i: luma(i).mean() + 1.45 * (i - luma(i).mean())),
    "less contrast": (6, 1.0, -1, lambda i: luma(i).mean() + 0.1 * (i - luma(i).mean())),
    "brighter": (7, 0.5, 1, lambda i: 1.45 * i),
    "darker": (7, 1.0, -1, lambda i: 0.1 * i),
    "solarize add": (14, 0.5, 1, lambda i: np.where(i < 128, i + 55, i)),
    "sharper": (8, 0.5, 1, lambda i: sharper(i, 1.45)),
    "smoother": (8, 1.0, -1, lambda i: sharper(i, 0.1)),
}


@pytest.mark.parametrize("name", COLOUR_OPERATIONS)
def test_colour_operations_of_randaugment_are_what_they_are_by_hand(name):
    k, strength, sign, by_hand = COLOUR_OPERATIONS[name]
    image = pixels(10, 20, 3) // 2 + 40
    ours = data.OPERATIONS[k](Image.fromarray(image.numpy()), strength, sign)
    equal(torch.from_numpy(np.array(ours)), by_hand(image.numpy().astype(float)).clip(0, 255), atol=2)


def test_equalize_of_randaugment_makes_every_level_as_frequent_as_the_others():
    dark = Image.fromarray((uniform(64, 64, 3).numpy() ** 2 * 200).astype(np.uint8))
    for level in np.asarray(data.OPERATIONS[1](dark, 0.5, 1)).reshape(-1, 3).T:
        np.testing.assert_allclose(np.sort(level), np.linspace(0, 255, 64 * 64), atol=20)


def turned(x, y, angle, W=24, H=16):
    """Where a picture that is turned around its middle, against the clock, has the point (x, y) from."""
    x, y, a = x - W / 2, y - H / 2, math.radians(angle)
    return math.cos(a) * x - math.sin(a) * y + W / 2, math.sin(a) * x + math.cos(a) * y + H / 2


MOVES = {  # place in OPERATIONS, and where the point (x, y) of 24 x 16 pixels comes from; t: the strength with its sign
    "rotate by up to 30 degrees": (9, lambda x, y, t: turned(x, y, 30 * t)),
    "shear rows by up to 0.3": (10, lambda x, y, t: (x + 0.3 * t * y, y)),
    "shear columns by up to 0.3": (11, lambda x, y, t: (x, y + 0.3 * t * x)),
    "shift by up to 0.45 of the width": (12, lambda x, y, t: (x + 0.45 * t * 24, y)),
    "shift by up to 0.45 of the height": (13, lambda x, y, t: (x, y + 0.45 * t * 16)),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize(("strength", "sign"), [(1.0, 1), (1.0, -1), (0.5, 1)])
def test_moves_of_randaugment_take_pixels_from_where_they_should(name, strength, sign):
    """Red grows by the column, green by the row, so that colours tell the place. What comes from outside is grey."""
    k, source = MOVES[name]
    image, outside = np.zeros((16, 24, 3), np.uint8), 0
    image[..., 0], image[..., 1] = np.arange(24) * 10, np.arange(16)[:, None] * 10
    ours = np.asarray(data.OPERATIONS[k](Image.fromarray(image), strength, sign)).astype(float)
    for i, j in np.ndindex(16, 24):
        x, y = source(j + 0.5, i + 0.5, strength * sign)  # pixel centres
        if 2 < x < 22 and 2 < y < 14:
            assert ours[i, j] == pytest.approx([10 * (x - 0.5), 10 * (y - 0.5), 0], abs=2.5), (i, j)
        elif not (-0.1 < x < 24.1 and -0.1 < y < 16.1):
            assert tuple(ours[i, j]) == data.GREY, (i, j)
            outside += 1
    assert outside > 0, "the test leaves no border"


@pytest.mark.parametrize("k", range(4, 14))
def test_operations_of_randaugment_at_strength_0_change_nothing(k):
    image = Image.fromarray(pixels(10, 20, 3).numpy())
    for sign in (-1, 1):
        assert (np.asarray(data.OPERATIONS[k](image, 0.0, sign)) == np.asarray(image)).all()


# ---------------------------------------------------------------------------------------------
# Images that can't be decoded
# ---------------------------------------------------------------------------------------------


def broken(kind, path):
    """Write a file that has the name of an image but can't be decoded."""
    if kind == "truncated":
        file = save(photograph(pixels(3, 64, 64)), path.with_suffix(".jpg"))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif kind == "corrupt":
        file = save(photograph(pixels(3, 64, 64)), path.with_suffix(".png"))
        content = bytearray(file.read_bytes())
        content[100:200] = bytes(100)
        file.write_bytes(content)
    else:
        file = path.with_suffix(".png" if kind == "empty" else ".jpg")
        file.write_bytes(b"" if kind == "empty" else b"This is a text.\n")
    return file


def coloured_folder(path, n):
    """n images in four classes; class c has the colour 50 (c + 1)."""
    for i in range(n):
        save(Image.new("RGB", (8, 8), (50 * (i % 4 + 1),) * 3), path / "abcd"[i % 4] / f"{i:03}.png")


@pytest.mark.parametrize("kind", ["truncated", "corrupt", "empty", "text"])
def test_an_image_that_cannot_be_decoded_is_skipped_with_one_warning(kind, tmp_path, capfd):
    """In training another of its batch stands in, with its label; in a test its label is -1, so that nobody counts it.

    One of twenty, exactly 5 %, is not yet too many, however often it is met.
    """
    coloured_folder(tmp_path, 20)
    (tmp_path / "b" / "005.png").unlink()
    bad = str(broken(kind, tmp_path / "b" / "005"))
    split = data.Folder(tmp_path, *PLAIN)
    place = split.files.tolist().index(os.fsencode(bad))
    expected = [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5

    batches = list(split.test_batches((4, 4), 8, CPU))
    images, labels = (torch.cat(values) for values in zip(*batches, strict=True))
    assert labels.tolist() == expected[:place] + [-1] + expected[place + 1 :]
    equal(images[:, 0, 0, 0], [0 if i == place else 50 * (label + 1) for i, label in enumerate(expected)], atol=1e-3)

    for step, (images, labels) in enumerate(split.train_batches((4, 4), 10, range(6), 0, (0.2, 1.0), CPU)):
        equal(images, (50 * (labels[:, None, None, None] + 1)).expand(-1, 3, 4, 4).numpy(), "another's label", 1e-3)
        order = data.batch_indices(20, 10, step, 0).tolist()
        for index, label in zip(order, labels.tolist(), strict=True):
            assert label in [expected[i] for i in order] if index == place else label == expected[index]

    assert list(split.unreadable) == [bad]
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(warnings) == 1, warnings
    assert bad in warnings[0]
    assert split.unreadable[bad] in warnings[0]


def test_more_than_five_percent_of_unreadable_images_end_the_run(tmp_path, capfd):
    """40 images: 2 are let pass, 3 are not."""
    coloured_folder(tmp_path, 38)
    bad = [str(broken("empty", tmp_path / "a" / f"bad{i}")) for i in range(2)]
    split = data.Folder(tmp_path, *PLAIN)
    assert len(list(split.test_batches((4, 4), 8, CPU))) == 5
    assert sorted(split.unreadable) == bad
    (tmp_path / "a" / "000.png").write_bytes(b"")
    for run in ("test", "train"):
        split = data.Folder(tmp_path, *PLAIN)
        with refusal("3 of 40", "5 %", tmp_path, error=data.UnreadableImages):
            if run == "test":
                list(split.test_batches((4, 4), 8, CPU))
            else:
                list(split.train_batches((4, 4), 8, range(10), 0, (0.2, 1.0), CPU))
        assert len(split.unreadable) == 3
    assert issubclass(data.UnreadableImages, ValueError)
    capfd.readouterr()


@pytest.mark.parametrize(("side", "share"), [(32, 7 / 8), (224, 7 / 8), (256, 1.0)])
def test_a_test_sees_all_of_the_short_side_above_224_pixels(side, share, tmp_path):
    """As in MAE's code for fine-tuning at a higher resolution."""
    file = save(photograph(pixels(3, 40, 30)), tmp_path / "ant" / "1.png")
    split = data.Folder(tmp_path, *PLAIN)
    [(image, _)] = split.test_batches((side, side), 1, CPU)
    assert torch.equal(image[0].byte(), data.read_image(file, (side, side), None, None, crop_pct=share))


def test_a_large_batch_is_decoded_in_parts_by_several_workers(tmp_path, monkeypatch):
    """And is the same batch: 11 of its 12 images in requests of 4, 4 and 3."""
    for i, picture in enumerate(pixels(12, 3, 24, 20)):
        save(photograph(picture), tmp_path / "ant" / f"{i}.png")
    batches = []
    for request in (64, 4):
        monkeypatch.setattr(data, "REQUEST", request)
        split = data.Folder(tmp_path, *PLAIN)
        batches.append(list(split.train_batches((16, 16), 12, range(3), 0, (0.2, 1.0), CPU, slice(1, None))))
    assert [len(labels) for _, labels in batches[1]] == [11, 11, 11]
    assert same(*batches)


def test_a_training_batch_never_has_the_label_that_marks_unreadable_images(tmp_path, capfd):
    """A batch of one, as a process among many may hold: nothing can stand in, and -1 would fail far from the cause."""
    coloured_folder(tmp_path, 20)
    (tmp_path / "b" / "005.png").write_bytes(b"")
    split = data.Folder(tmp_path, *PLAIN)
    with contextlib.suppress(ValueError):  # an error that names the image would be as good
        for _, labels in split.train_batches((4, 4), 1, range(20), 0, (0.2, 1.0), CPU):
            assert labels.min() >= 0
    capfd.readouterr()


# ---------------------------------------------------------------------------------------------
# Images that occur twice
# ---------------------------------------------------------------------------------------------


def test_a_perceptual_hash_compares_the_lowest_frequencies_with_their_median():
    """With scipy's cosine transform of a picture of 64 x 64, its pixels averaged 2 by 2 and over channels."""
    images = uniform(3, 3, 64, 64)
    oracle = []
    for image in images.mean(dim=1).numpy():
        small = image.reshape(32, 2, 32, 2).mean(axis=(1, 3))
        low = scipy.fft.dctn(small, type=2)[:16, :16].flatten()[1:]
        oracle.append(low > np.median(low))
    ours = data.perceptual_hash(images)
    equal(ours, np.stack(oracle), "hashes differ")
    assert ours.sum(dim=1).tolist() == [127] * 3, "half of 255 are above the median"
    assert torch.equal(data.perceptual_hash(0.3 * images + 50), ours), "brightness and contrast do not matter"


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_an_image_that_occurs_in_another_split_is_found_however_it_was_compressed(kind, tmp_path):
    """The test crops of the photographs: smaller and as JPEG they are the same pictures, their neighbours are not."""
    crops = data.photos((112, 112)).test.images  # (64, 3, 112, 112)
    here = split_of(kind, crops[1::4], tmp_path / "here")
    there = []
    for crop in crops[1::8]:  # every second one of them
        file = save(photograph(crop).resize((96, 96)), tmp_path / "there.jpg", quality=92)
        with Image.open(file) as image:
            there.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    strangers = crops[2::8, :, ::2, ::2][:, :, :48, :48].repeat(1, 1, 2, 2)  # and pictures that are not there
    there = data.InMemory(torch.cat([torch.stack(there), strangers]), torch.arange(16), *PLAIN)
    assert data.occurring(here, there).tolist() == [True, False] * 8
    kept = here.part((~data.occurring(here, there)).nonzero()[:, 0])
    assert not data.occurring(kept, there).any()
    assert [labels.tolist() for _, labels in kept.test_batches((8, 8), 16, CPU)] == [list(range(1, 16, 2))]


def test_images_that_can_not_be_decoded_occur_nowhere(tmp_path):
    """They are black, both of them: that does not make them one picture."""
    for name in ("a", "b"):
        for i in range(30):  # below 5 %
            save(photograph(pixels(3, 8, 8, seed=i + 100 * (name == "b"))), tmp_path / name / "x" / f"{i}.png")
        (tmp_path / name / "x" / "broken.png").write_bytes(b"no image")
    splits = [data.Folder(tmp_path / name, *PLAIN) for name in ("a", "b")]
    assert not data.occurring(*splits).any()


# ---------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("photo", "photos"), ("fashion_mnist", "fashion-mnist"), ("cifar-10", "cifar10"), ("CIFAR100", "cifar100")]
    + [("folder", "folder:PATH"), ("", "")],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(name, nearest):
    with refusal(repr(name), f"did you mean {nearest}", *data.NAMES):
        data.load(name)


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_photographs_are_learned_from_the_left_and_tested_on_the_right(size, tmp_path, monkeypatch):
    """Sixteen files of 90 x 60 pixels: blue tells which one, green the row, and only the right third is red.

    Training never sees a trace of red: not at the cut, not by interpolation across it.
    """
    for i, name in enumerate(data.PHOTOS):
        image = torch.zeros(3, 60 + 6 * (i % 4), 90, dtype=torch.uint8)
        image[0, :, 60:] = 255
        image[1] = torch.arange(image.shape[1])[:, None] * 3
        image[2] = 16 * i
        save(photograph(image), tmp_path / "data" / name, format="PNG")  # no loss, whatever its suffix
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=[tmp_path]))
    photos = data.load("photos", size)

    assert photos.classes == [Path(name).stem for name in data.PHOTOS]
    assert len(photos.classes) == 16
    assert (len(photos.train), len(photos.test)) == (1024, 64)

    def colours(batches):  # 0-255, undone by hand
        images, labels = (torch.cat(values) for values in zip(*batches, strict=True))
        mean, std = torch.tensor(photos.mean)[:, None, None], torch.tensor(photos.std)[:, None, None]
        return (images * std + mean) * 255, labels

    images, labels = colours(photos.train.train_batches(size, 256, range(4), 0, (0.2, 1.0), CPU))
    assert images.shape == (1024, 3, *size)
    assert images[:, 0].max() < 0.1, "training sees the test region"
    assert images[:, 1, 8:-8].diff(dim=1).min() > 0.5, "a crop goes beyond its photograph: rows repeat"
    assert torch.bincount(labels).tolist() == [64] * 16, "an epoch is 64 crops of each photograph"
    equal(images[:, 2].amax(dim=(1, 2)), 16 * labels.numpy(), "a label that names another photograph", 0.1)
    equal(images[:, 2].amin(dim=(1, 2)), 16 * labels.numpy(), "part of the crop is no photograph", 0.1)

    assert photos.test.images.shape[-2:] == size, "test crops are resized twice"
    images, labels = colours(photos.test.test_batches(size, 20, CPU))
    assert images.shape == (64, 3, *size)
    assert images[:, 0, :, 2:].min() > 230, "a test crop shows what training has seen"
    assert torch.bincount(labels).tolist() == [4] * 16
    equal(images[:, 2].mean(dim=(1, 2)), 16 * labels.numpy(), "a label that names another photograph", 0.1)
    for i in range(16):  # squares of the third's width, from the top to the bottom
        rows = images[labels == i, 1].mean(dim=(1, 2)) / 3
        height = 60 + 6 * (i % 4)
        equal(rows, [14.5 + step / 3 * (height - 30) for step in range(4)], "places of the test crops", 1)


def test_the_photographs_are_there_and_wide_enough():
    """`photos` says that all are at least as wide as high, and cuts squares as wide as the right third."""
    for name in data.PHOTOS:
        with Image.open(skimage_folder() / name) as image:
            assert image.width >= image.height >= image.width / 3, name
    photos = data.load("photos", (224, 224))
    assert photos.test.images.shape == (64, 3, 224, 224)
    images, labels = next(photos.train.train_batches((224, 224), 4, range(1), 0, (0.2, 1.0), CPU))
    assert images.shape == (4, 3, 224, 224)
    assert images.flatten(1).std(dim=1).min() > 0.05, "an empty crop"


IDX = ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz"]
IDX += ["t10k-labels-idx1-ubyte.gz"]


def write_idx(path, values):
    """The format of MNIST: 0, 0, type 8 (unsigned byte), number of sides; the sides, big-endian; the values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes(), 1))


def test_fashion_mnist_is_read_from_idx_files(tmp_path):
    """Image i has its pixels row by row, label i belongs to it."""
    for split, n in (("train", 60_000), ("t10k", 10_000)):
        images = np.zeros((n, 28, 28), np.uint8)
        images[:, 3, 20] = np.arange(n) % 251
        images[:, 0, 0], images[:, 27, 27], images[:, 27, 0] = 1, 2, 3
        write_idx(tmp_path / "fashion-mnist" / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / "fashion-mnist" / f"{split}-labels-idx1-ubyte.gz", np.arange(n) % 251 % 10)
    mnist = data.load("fashion-mnist", data_dir=tmp_path)
    assert (mnist.name, data.NATIVE_SIZE[mnist.name], len(mnist.classes)) == ("fashion-mnist", 28, 10)
    for split, n in ((mnist.train, 60_000), (mnist.test, 10_000)):
        assert split.images.shape == (n, 1, 28, 28)
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        marks = split.images[:, 0, [0, 27, 27], [0, 27, 0]]
        assert (marks == torch.tensor([1, 2, 3])).all(), "the header is 16 bytes; rows before columns"
        assert (split.images[:, 0, 3, 20] == torch.arange(n) % 251).all()
        assert (split.labels == torch.arange(n) % 251 % 10).all(), "the header of labels is 8 bytes"


def test_the_real_fashion_mnist_has_the_classes_and_the_statistics_that_are_written_down():
    folder = Path(os.environ.get("VIT_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not all((folder / "fashion-mnist" / name).is_file() for name in IDX):
        pytest.skip("Fashion-MNIST is not here; VIT_DATA can name the folder that has it")
    mnist = data.load("fashion-mnist", data_dir=folder)
    assert torch.bincount(mnist.train.labels).tolist() == [6000] * 10
    assert torch.bincount(mnist.test.labels).tolist() == [1000] * 10
    assert [mnist.classes[i] for i in mnist.train.labels[:4]] == ["Ankle boot", "T-shirt/top", "T-shirt/top", "Dress"]
    values = mnist.train.images.numpy()
    assert mnist.mean == pytest.approx([values.mean() / 255], abs=1e-4)
    assert mnist.std == pytest.approx([values.std(dtype=np.float32) / 255], abs=1e-4)


def cifar_members(name, n=3):
    """The official binary files, with n records each: {path in the archive: bytes}, and the images and labels."""
    fine_bytes, base = (1, "cifar-10-batches-bin") if name == "cifar10" else (2, "cifar-100-binary")
    train = [f"data_batch_{i}.bin" for i in range(1, 6)] if name == "cifar10" else ["train.bin"]
    test = ["test_batch.bin"] if name == "cifar10" else ["test.bin"]
    classes = 10 if name == "cifar10" else 100
    names = "\n".join(f"class{i}" for i in range(classes)).encode() + b"\n\n"
    members = {f"{base}/{'batches.meta.txt' if name == 'cifar10' else 'fine_label_names.txt'}": names}
    if name == "cifar100":
        members[f"{base}/coarse_label_names.txt"] = b"wrong\n" * 20
    records = pixels(n * len(train + test), fine_bytes + 3072).numpy()
    records[:, fine_bytes - 1] %= classes
    for i, file in enumerate(train + test):
        members[f"{base}/{file}"] = records[n * i : n * (i + 1)].tobytes()
    return members, records


def archive(members):
    """A .tar.gz in memory."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, value in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(value)
            tar.addfile(member, io.BytesIO(value))
    return content.getvalue()


CIFAR = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_is_read_from_its_binary_archive_without_unpacking_it(name, tmp_path, monkeypatch):
    """A record: the label (CIFAR-100: coarse, then fine), then red, green and blue, each row by row."""
    monkeypatch.chdir(tmp_path)
    members, records = cifar_members(name)
    (tmp_path / CIFAR[name]).write_bytes(archive(members))
    cifar = data.load(name, data_dir=tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == [CIFAR[name]], "something was unpacked"
    assert cifar.classes == [f"class{i}" for i in range(10 if name == "cifar10" else 100)]
    assert (cifar.name, data.NATIVE_SIZE[name], len(cifar.mean), len(cifar.std)) == (name, 32, 3, 3)
    fine_bytes = 1 if name == "cifar10" else 2
    assert len(cifar.test) == 3
    images = torch.cat([cifar.train.images, cifar.test.images])
    labels = torch.cat([cifar.train.labels, cifar.test.labels])
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert labels.tolist() == [int(record[fine_bytes - 1]) for record in records], "in order; the fine label"
    oracle = np.zeros((len(records), 3, 32, 32), np.uint8)
    for i, c, row, column in np.ndindex(oracle.shape):
        oracle[i, c, row, column] = records[i, fine_bytes + c * 1024 + row * 32 + column]
    equal(images, oracle)


@pytest.mark.parametrize("damage", ["cut", "overwritten", "empty", "too short"])
def test_a_damaged_idx_file_is_refused_by_its_name(damage, tmp_path):
    for name in IDX:
        write_idx(tmp_path / "fashion-mnist" / name, np.zeros((5000, 28, 28) if "images" in name else 5000))
    file = tmp_path / "fashion-mnist" / IDX[0]
    content = file.read_bytes()
    if damage != "too short":  # as it is: 5000 of 60,000 images
        changed = {"cut": content[: len(content) // 2], "overwritten": b"x" * len(content), "empty": b""}
        file.write_bytes(changed[damage])
    with refusal(file, "damaged", "delete"):
        data.load("fashion-mnist", data_dir=tmp_path)


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("damage", ["cut", "overwritten", "empty", "file missing", "file too short"])
def test_a_damaged_cifar_archive_is_refused_by_its_name(name, damage, tmp_path):
    members, _ = cifar_members(name)
    last = list(members)[-1]
    if damage == "file missing":
        del members[last]
    if damage == "file too short":
        members[last] = members[last][:-1]
    content = archive(members)
    changed = {"cut": content[: len(content) // 2], "overwritten": b"x" * len(content), "empty": b""}
    (tmp_path / CIFAR[name]).write_bytes(changed.get(damage, content))
    with refusal(tmp_path / CIFAR[name], "damaged", "delete"):
        data.load(name, data_dir=tmp_path)


def test_a_file_that_unpacks_to_more_than_it_should_is_refused(tmp_path):
    """A decompression bomb: 200 MB of zeros in 200 kB. No more than the data set's size is ever unpacked."""
    (tmp_path / "fashion-mnist").mkdir()
    file = tmp_path / "fashion-mnist" / IDX[0]
    file.write_bytes(gzip.compress(bytes(200_000_000), 1))
    with refusal(file, "damaged", "more bytes", "delete"):
        data.load("fashion-mnist", data_dir=tmp_path)


def test_a_member_of_an_archive_that_is_too_large_is_not_read(tmp_path):
    """200 MB of zeros in 200 kB; the largest file of CIFAR-100 has 153,700,000 bytes."""
    names = ["data_batch_1.bin", *(f"data_batch_{i}.bin" for i in range(2, 6)), "test_batch.bin", "batches.meta.txt"]
    members = {f"cifar-10-batches-bin/{name}": bytes(200_000_000 if "1" in name else 0) for name in names}
    (tmp_path / CIFAR["cifar10"]).write_bytes(archive(members))
    with refusal(tmp_path / CIFAR["cifar10"], "damaged", "data_batch_1.bin", "200,000,000 bytes", "delete"):
        data.load("cifar10", data_dir=tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_an_image_that_claims_an_absurd_size_is_refused_by_its_name(side, tmp_path):
    """A PNG of 100 bytes whose header says 100 million pixels, or 3.6 billion."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    png = bytearray(content.getvalue())
    png[16:24] = struct.pack(">II", side, side)  # width and height in the first chunk, IHDR, and its CRC
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    file = tmp_path / "big.png"
    file.write_bytes(png)
    with pytest.raises((ValueError, Image.DecompressionBombError), match=f"{side}x{side}|{side**2} pixels"):
        data.read_image(file, (8, 8), None, None)
    folder_with(tmp_path / "data", *(f"ant/{i}.png" for i in range(19)))
    file.rename(tmp_path / "data" / "ant" / "big.png")
    split = data.Folder(tmp_path / "data", *PLAIN)
    list(split.test_batches((8, 8), 8, CPU))
    assert [Path(name).name for name in split.unreadable] == ["big.png"]
    assert "pixels" in split.unreadable[str(tmp_path / "data" / "ant" / "big.png")]


def test_reading_a_folder_leaves_the_global_random_numbers_alone(tmp_path):
    folder_with(tmp_path, "ant/1.png")
    before = torch.get_rng_state()
    list(data.Folder(tmp_path, *PLAIN).test_batches((8, 8), 8, CPU))
    assert torch.equal(torch.get_rng_state(), before)


def folder_with(path, *images):
    for image in images:
        save(Image.new("RGB", (8, 8)), path / image)


def test_a_folder_is_a_data_set_with_the_classes_of_its_train_folder(tmp_path, monkeypatch):
    """PATH may start with ~."""
    folder_with(tmp_path / "pets", "train/dog/1.png", "train/cat/1.png", "train/cat/2.png", "val/cat/3.png")
    folder_with(tmp_path / "pets", "val/dog/3.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (f"folder:{tmp_path}/pets", "folder:~/pets"):
        pets = data.load(name)
        assert pets.classes == ["cat", "dog"]
        assert (len(pets.train), len(pets.test)) == (3, 2)
        assert pets.train.labels.tolist() == [0, 0, 1]
        assert (pets.mean, pets.std) == (data.IMAGENET_MEAN, data.IMAGENET_STD)


def test_a_folder_without_train_or_val_is_refused(tmp_path):
    with refusal(tmp_path / "train", "PATH/train/CLASS", "PATH/val/CLASS"):
        data.load(f"folder:{tmp_path}")
    folder_with(tmp_path, "train/cat/1.png")
    with refusal(tmp_path / "val", "PATH/val/CLASS"):
        data.load(f"folder:{tmp_path}")


def test_a_folder_without_classes_is_refused(tmp_path):
    folder_with(tmp_path, "train/1.png", "val/1.png")
    with refusal(tmp_path / "train", "class"):
        data.load(f"folder:{tmp_path}")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_without_an_image_is_refused(split, tmp_path):
    folder_with(tmp_path, "train/cat/1.png", "val/cat/1.png")
    dog = tmp_path / split / "dog"
    dog.mkdir()
    (dog / "dog.txt").write_text("no image")
    with refusal("no image", dog, ".png"):
        data.load(f"folder:{tmp_path}")


@pytest.mark.parametrize(("train", "val", "odd"), [("cat dog", "cat dgo", "dgo"), ("ant cat", "cat", "ant")])
def test_classes_that_differ_between_train_and_val_are_refused(train, val, odd, tmp_path):
    """By name: else a label would mean one class in training and another in the test."""
    folder_with(tmp_path, *(f"train/{name}/1.png" for name in train.split()))
    folder_with(tmp_path, *(f"val/{name}/1.png" for name in val.split()))
    with refusal(tmp_path, f"{odd} is only in {'val' if odd in val.split() else 'train'}"):
        data.load(f"folder:{tmp_path}")


# ---------------------------------------------------------------------------------------------
# Downloads
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(content, cut=None, chunked=False, status=200):
    """The address of a server that answers with `content`; `cut`: it hangs up after that many bytes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.protocol_version = "HTTP/1.1"
            self.send_response(status)
            if chunked:
                self.send_header("Transfer-Encoding", "chunked")
            else:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if chunked:
                self.wfile.write(b"%x\r\n" % len(content))
            self.wfile.write(content[:cut])
            self.close_connection = True

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}/"
        finally:
            httpd.shutdown()
            thread.join()


def nobody():
    """The address of a port where no one listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/"


@pytest.fixture
def cifar10(monkeypatch):
    """A small CIFAR-10 archive with the right checksum, and no way around the local server."""
    content = archive(cifar_members("cifar10")[0])
    monkeypatch.setattr(data, "CIFAR_MD5", {CIFAR["cifar10"]: hashlib.md5(content).hexdigest()})
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("VIT_DATA", raising=False)
    return content


def test_a_missing_file_is_downloaded_once_and_kept(cifar10, tmp_path, monkeypatch, capfd):
    """With its progress on stderr. A part that was left by a killed run does no harm."""
    folder = tmp_path / "not" / "yet"
    folder.mkdir(parents=True)
    (folder / f"{CIFAR['cifar10']}.part").write_bytes(cifar10[:100])
    with server(cifar10) as address:
        monkeypatch.setattr(data, "CIFAR_URL", address)
        assert len(data.load("cifar10", data_dir=folder).train) == 15
    assert [path.name for path in folder.iterdir()] == [CIFAR["cifar10"]]
    assert (folder / CIFAR["cifar10"]).read_bytes() == cifar10
    output = capfd.readouterr()
    assert CIFAR["cifar10"] in output.err
    assert output.out == ""
    monkeypatch.setattr(data, "CIFAR_URL", nobody())
    assert len(data.load("cifar10", data_dir=folder).train) == 15


def test_files_are_looked_for_in_data_dir_then_vit_data_then_data(cifar10, tmp_path, monkeypatch):
    """The folder is made by the download."""
    monkeypatch.chdir(tmp_path)
    with server(cifar10) as address:
        monkeypatch.setattr(data, "CIFAR_URL", address)
        data.load("cifar10")
        monkeypatch.setenv("VIT_DATA", str(tmp_path / "mine"))
        data.load("cifar10")
        data.load("cifar10", data_dir=tmp_path / "other" / "one")
    found = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob(CIFAR["cifar10"]))
    assert found == ["data", "mine", "other/one"]


def test_a_download_with_another_checksum_is_not_kept(cifar10, tmp_path, monkeypatch):
    with server(cifar10[:-1] + b"x") as address, refusal(address, CIFAR["cifar10"], "checksum", "not kept"):
        monkeypatch.setattr(data, "CIFAR_URL", address)
        data.load("cifar10", data_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("chunked", [False, True])
def test_a_download_that_breaks_off_is_no_data_set(chunked, cifar10, tmp_path, monkeypatch):
    """Whether the server has said how much will come, or not. The next try completes it."""
    with server(cifar10, len(cifar10) // 2, chunked) as address, refusal(CIFAR["cifar10"], address):
        monkeypatch.setattr(data, "CIFAR_URL", address)
        data.load("cifar10", data_dir=tmp_path)
    assert not (tmp_path / CIFAR["cifar10"]).exists()
    with server(cifar10) as address:
        monkeypatch.setattr(data, "CIFAR_URL", address)
        assert len(data.load("cifar10", data_dir=tmp_path).train) == 15


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist"])
def test_without_a_network_the_error_says_where_to_put_the_file(name, cifar10, tmp_path, monkeypatch):
    folder, file = (tmp_path, CIFAR[name]) if name in CIFAR else (tmp_path / name, IDX[0])
    address = nobody()
    monkeypatch.setattr(data, "CIFAR_URL", address)
    monkeypatch.setattr(data, "FASHION_MNIST_URL", address)
    with refusal(file, f"not in {folder}", address, "put it there", "--data-dir"):
        data.load(name, data_dir=tmp_path)
    with server(b"", status=404) as address, refusal(file, f"not in {folder}", address, "404", "--data-dir"):
        monkeypatch.setattr(data, "CIFAR_URL", address)
        monkeypatch.setattr(data, "FASHION_MNIST_URL", address)
        data.load(name, data_dir=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_data_dir_that_is_a_file_is_refused(folder, cifar10, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CIFAR_URL", nobody())
    (tmp_path / "file").write_text("")
    with refusal(tmp_path / folder, "--data-dir"):
        data.load("cifar10", data_dir=tmp_path / folder)


# ---------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------


def seconds(work):
    """Processor time: another program on this machine does not count."""
    start = time.process_time()
    work()
    return time.process_time() - start


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("crop", [2, (0.2, 1.0)])
def test_speed_of_a_small_set_is_20000_images_a_second_and_more(crop, one_thread):
    """Sixty thousand images of 28 x 28 in batches of 256, on one core already."""
    split = data.InMemory(pixels(60_000, 1, 28, 28), torch.arange(60_000) % 10, (0.286,), (0.353,))
    rates = []
    for first in range(0, 400, 40):
        batches = split.train_batches((28, 28), 256, range(first, first + 40), 0, crop, CPU)
        rates.append(40 * 256 / seconds(lambda batches=batches: list(batches)))
    assert statistics.median(rates) > 20_000, f"{statistics.median(rates):.0f} images/s"


@pytest.mark.slow
@pytest.mark.parametrize("crop", [None, (0.2, 1.0)])
def test_speed_of_decoding_is_that_of_pillow_or_better(crop, one_thread, tmp_path):
    """JPEGs of 500 x 375 to 224 x 224, against Pillow's open, convert and resize of the whole image."""
    with Image.open(skimage_folder() / "coffee.png") as image:
        image = image.convert("RGB").resize((500, 375))
    files = [save(image.rotate(i), tmp_path / f"{i}.jpg", quality=90) for i in range(20)]
    draws = uniform(20, 5).tolist()

    def pillow():
        for file in files:
            with Image.open(file) as image:
                image.convert("RGB").resize((224, 224))

    def ours():
        for file, draw in zip(files, draws, strict=True):
            data.read_image(file, (224, 224), crop, draw)

    times = [(seconds(pillow), seconds(ours)) for _ in range(21)]  # one after the other: both meet the same noise
    theirs, mine = (statistics.median(column) for column in zip(*times, strict=True))
    assert theirs / mine >= 0.9, f"{mine / 20 * 1e3:.2f} ms an image, Pillow {theirs / 20 * 1e3:.2f} ms"
