"""What data.py promises: which image comes when, what is done to it, and an error that helps when a file is wrong.

Read the tests in order: they follow data.py, and to rewrite one of its functions until its tests pass is the exercise.
What is done to a batch is checked in test_augment.py; here it is whether it is done, at which numbers, for whom.
"""

import gzip
import importlib.util
import io
import math
import os
import statistics
import struct
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from engine import augment, image_folder
from tests.engine.pictures import (
    CPU,
    PLAIN,
    flat,
    photograph,
    pixels,
    refusal,
    same,
    save_image,
    skimage_folder,
    uniform,
)
from tests.engine.test_augment import FLOAT32_PIXELS, padded_crop_loops
from tests.oracles import equal

# ---------------------------------------------------------------------------------------------
# Order and randomness
# ---------------------------------------------------------------------------------------------


def test_random_numbers_depend_on_every_part_of_the_key():
    """And on nothing else, so that each purpose has its own."""
    keys = [(seed, purpose, step) for seed in range(3) for purpose in range(4) for step in range(3)]
    torch.manual_seed(1)
    first = [torch.rand(4, generator=data.generator(*key)).tolist() for key in keys]
    torch.manual_seed(2)
    again = [torch.rand(4, generator=data.generator(*key)).tolist() for key in reversed(keys)]
    assert first == again[::-1]
    assert len({tuple(numbers) for numbers in first}) == len(keys), "two keys share their numbers: a sum of the parts?"


def test_random_numbers_of_a_device_come_from_its_own_generator(monkeypatch):
    """So that masks and noise need not be copied there."""
    asked, cpu = [], torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: (asked.append(device), cpu())[1])
    assert data.generator(0, 0, device="cuda").initial_seed() == data.generator(0, 0).initial_seed()
    assert asked == ["cuda", "cpu"]


def test_a_seed_means_what_it_always_has():
    """Else an old run could not be resumed or repeated. NumPy and PyTorch keep the numbers of a seed, too."""
    purposes = (data.ORDER, data.CROP, data.MIX, data.MASK, data.ERASE, data.SUBSET, data.MODEL, data.EVALUATION)
    assert purposes == (0, 1, 2, 3, 4, 5, 6, 7)
    seeds = {(0, 0, 0): 6569863346532939966, (5, 3, 7): 7613775242813147114, (2**40, 6, 1, 1): 7772694001743059774}
    for key, seed in seeds.items():
        assert data.generator(*key).initial_seed() == seed, key
    assert data.batch_indices(10, 10, step=0, seed=0).tolist() == [6, 3, 1, 5, 8, 7, 0, 2, 9, 4]


@pytest.mark.parametrize(("n", "batch_size"), [(10, 5), (10, 4), (7, 3), (5, 12), (3, 7), (1, 3)])
def test_epochs_are_permutations_that_follow_without_a_gap(n, batch_size):
    """Batches need not divide the set, and may be larger than it."""
    steps = 4 * n // batch_size + 1
    batches = [data.batch_indices(n, batch_size, step, seed=0) for step in range(steps)]
    assert {batch.shape for batch in batches} == {(batch_size,)}
    seen = torch.cat(batches).tolist()
    for first in range(0, len(seen) - n + 1, n):
        assert sorted(seen[first : first + n]) == list(range(n)), f"epoch {first // n} is no permutation"


@pytest.mark.parametrize(("n", "batch_size"), [(10, 5), (7, 3), (5, 12)])
def test_more_of_the_order_is_what_comes_next(n, batch_size):
    """In it is found what stands in for an image that can't be decoded."""
    batches = torch.cat([data.batch_indices(n, batch_size, step, seed=0) for step in range(20)])
    for step in range(4):
        first = step * batch_size
        ours = data.batch_indices(n, batch_size, step, seed=0, more=9)
        assert torch.equal(ours, batches[first : first + batch_size + 9])


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


def test_crops_are_drawn_for_the_whole_batch_at_once():
    """A process takes its rows of them. Uniform, another draw for each step and seed."""
    draws = [data.draw_crops(2000, seed, step) for seed, step in ((0, 0), (0, 1), (1, 0))]
    for draw in draws:
        assert draw.shape == (2000, 23)  # flip, top, left, ten areas, ten aspects
        assert 0 <= draw.min() < 0.01
        assert 0.99 < draw.max() < 1
        related = np.corrcoef(draw.T) - np.eye(23)  # of 2000 pairs: about 1 / sqrt(2000) = 0.02
        assert np.abs(related).max() < 0.1, "two columns share their numbers"
    assert len(torch.cat(draws).unique()) > 0.99 * 3 * 2000 * 23
    assert torch.equal(draws[2], torch.rand(2000, 23, generator=data.generator(1, 1, 0))), "of the purpose of crops"


def test_noise_of_masks_has_a_column_for_each_use():
    """One column is an array of its own; of several each is drawn for the whole batch before the next."""
    for columns, shape in ((1, (4, 6)), (3, (4, 6, 3))):
        numbers = torch.rand(columns * 4 * 6, generator=data.generator(2, 3, 9)).tolist()
        noise = data.draw_noise(4, 6, columns, 2, 9, CPU)
        assert noise.shape == shape
        for k, b, i in np.ndindex(columns, 4, 6):
            assert noise.reshape(4, 6, columns)[b, i, k] == numbers[k * 24 + b * 6 + i]
    assert not torch.equal(data.draw_noise(4, 6, 1, 2, 9, CPU), data.draw_noise(4, 6, 1, 2, 8, CPU))


def test_noise_of_a_test_image_depends_on_seed_and_index_alone():
    """Runs of different length and kind, and with more images, hide the same patches of an image."""
    noise = data.evaluation_noise(30, 49, seed=4)
    assert torch.equal(noise, torch.rand(30, 49, generator=data.generator(4, 7))), "of a purpose of its own"
    for n in (1, 7, 29):
        assert torch.equal(data.evaluation_noise(n, 49, seed=4), noise[:n])
    assert len(noise.unique()) > 0.99 * 30 * 49, "images share their noise"
    assert (0 <= noise.min()) & (noise.max() < 1)
    assert not torch.equal(data.evaluation_noise(30, 49, seed=5), noise)
    trained = [data.draw_noise(30, 49, 1, 4, step, CPU) for step in range(3)]
    assert not any(torch.equal(noise, numbers) for numbers in trained), "these masks were trained with"


@pytest.mark.parametrize(
    ("n", "counts"), [(3, [1, 1, 1]), (12, [4, 4, 4]), (14, [4, 5, 5]), (28, [5, 11, 12]), (85, [5, 30, 50])]
)
def test_a_balanced_subset_has_as_many_of_each_class(n, counts):
    """Of 50, 5, and 30: once a class is used up, the others go on."""
    labels = torch.tensor([0] * 50 + [1] * 5 + [2] * 30)[torch.randperm(85, generator=torch.Generator().manual_seed(0))]
    keep = data.balanced(labels, n, seed=0)
    assert keep.tolist() == sorted(set(keep.tolist())), "each once, in order"
    assert sorted(torch.bincount(labels[keep]).tolist()) == counts
    torch.manual_seed(0)
    assert torch.equal(data.balanced(labels, n, seed=0), keep)
    others = {tuple(data.balanced(labels, n, seed).tolist()) for seed in range(5)}
    assert len(others) == (5 if n < 85 else 1), "the choice is not random"


def test_a_balanced_subset_is_a_seeds_own():
    """With one class it is the first n of a random order that belongs to subsets alone."""
    order = torch.randperm(20, generator=data.generator(3, 5)).tolist()
    assert data.balanced(torch.zeros(20).long(), 6, seed=3).tolist() == sorted(order[:6])


def test_a_subset_larger_than_the_set_is_refused():
    with refusal("11", "10", "fewer"):
        data.balanced(torch.arange(10), 11, seed=0)


# ---------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------


def photographs(images, n):
    """A split of n crops of these photographs, each half as high as its frame."""
    sizes = torch.tensor([[image.shape[1] // 2, image.shape[2]] for image in images])
    return data.Photographs(images, sizes, torch.arange(n) % len(images), *PLAIN)


def split_of(kind, images, n=None):
    """Image i has the label i."""
    return (
        photographs(images, n or len(images))
        if kind == "photographs"
        else data.InMemory(images, torch.arange(len(images)), *PLAIN)
    )


KINDS_AND_CROPS = [("memory", 2), ("memory", None), ("memory", (0.2, 1.0)), ("photographs", (0.2, 1.0))]
KINDS_AND_CROPS += [("photographs", None)]


@pytest.mark.parametrize(("kind", "crop"), KINDS_AND_CROPS)
def test_shards_of_a_batch_together_equal_the_batch(kind, crop):
    """R processes that see B / R images each train as one that sees B. Seven images: batches run across epochs."""
    split, B = split_of(kind, pixels(7, 3, 12, 10)), 6

    def batches(shard=slice(None)):
        return list(split.train_batches((8, 6), B, range(3), 0, crop, CPU, shard))

    whole = batches()
    assert [images.shape for images, _ in whole] == [(B, 3, 8, 6)] * 3
    for R in (2, 3):
        contiguous = [slice(r * B // R, (r + 1) * B // R) for r in range(R)]
        for shard in (*contiguous, *(slice(r, None, R) for r in range(R))):
            expected = [(images[shard], labels[shard]) for images, labels in whole]
            assert same(batches(shard), expected), f"{shard} of the batch differs from the whole batch's"


@pytest.mark.parametrize(("kind", "crop"), KINDS_AND_CROPS)
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(kind, crop):
    """Another seed sees something else."""
    split = split_of(kind, pixels(7, 3, 12, 10))

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


def test_padded_training_images_may_be_resized():
    """As for 28-pixel images and a model of 32: the crop comes first, at the images' own resolution."""
    images = pixels(6, 3, 5, 4)
    split = data.InMemory(images, torch.arange(6), *PLAIN)
    [(ours, labels)] = split.train_batches((7, 8), 6, range(1), 3, 1, CPU)
    crops = augment.padded_crop(images[labels], data.draw_crops(6, 3, 0), 1)
    equal(ours, augment.resize(crops, (5, 4), (7, 8)).numpy(), atol=FLOAT32_PIXELS)


@pytest.mark.parametrize("kind", ["memory", "photographs"])
def test_random_resized_crops_have_their_area_aspect_place_and_flip(kind):
    """Colours tell the place: red grows by the row, green by the column. A resized ramp is a ramp.

    Of 300 crops; the ends of a uniform distribution are reached up to some percent. A photograph fills half its frame.
    """
    ramp = torch.zeros(1, 3, 100 if kind == "memory" else 200, 120, dtype=torch.uint8)
    ramp[:, 0], ramp[:, 1] = torch.arange(ramp.shape[2])[:, None] * 2 % 256, torch.arange(120) * 2
    split, boxes = split_of(kind, ramp), []
    for images, _ in split.train_batches((16, 20), 150, range(2), 0, (0.3, 0.6), CPU):
        for red, green, _ in images.numpy() / 2:
            y, x = red.mean(axis=1), green.mean(axis=0)
            h, w = (y[12] - y[3]) / 9 * 16, (x[16] - x[3]) / 13 * 20  # far from the borders, where the ramp ends
            boxes.append((h * abs(w) / 12_000, abs(w) / h, y[7:9].mean() - h / 2, x[9:11].mean() - abs(w) / 2, w < 0))
    area, aspect, top, left, flipped = np.array(boxes).T
    h = np.sqrt(area * 12_000 / aspect)
    for name, values, low, high in (
        ("area", area, 0.3, 0.6),
        ("aspect w / h", aspect, 3 / 4 * 20 / 16, 4 / 3 * 20 / 16),  # around that of what a crop becomes
        ("top", (top + 0.5) / (100 - h), 0, 1),
        ("left", (left + 0.5) / (120 - h * aspect), 0, 1),
    ):
        margin = 0.1 * (high - low)
        assert low - margin / 2 < values.min() < low + margin, f"{name} starts at {values.min():.3f}, not {low}"
        assert high - margin < values.max() < high + margin / 2, f"{name} ends at {values.max():.3f}, not {high}"
    assert flipped.mean() == pytest.approx(0.5, abs=0.12)
    related = np.corrcoef([area, aspect, (top + 0.5) / (100 - h), (left + 0.5) / (120 - h * aspect), flipped])
    assert np.abs(related - np.eye(5)).max() < 0.3, "two of area, aspect, top, left, and flip share a random number"


def test_without_a_crop_training_images_come_as_they_are():
    """As a linear probe sees them: no shift, no flip."""
    images = pixels(6, 3, 27, 23)
    [(ours, labels)] = data.InMemory(images, torch.arange(6), *PLAIN).train_batches((27, 23), 6, range(1), 0, None, CPU)
    assert torch.equal(ours, data.normalise(images[labels], *PLAIN)), "resized to its own size: not bit for bit"


@pytest.mark.parametrize("kind", ["memory", "photographs"])
def test_a_part_of_a_split_keeps_images_and_labels_together(kind):
    """And leaves the split as it was."""
    split = split_of(kind, flat(10))
    part = split.subset(6, seed=0)
    assert (len(part), len(split)) == (6, 10)
    (seen, labels), *_ = part.test_batches((8, 8), 10, CPU)
    assert labels.tolist() == data.balanced(torch.arange(10), 6, seed=0).tolist()
    assert (seen.round() == 20 * labels[:, None, None, None]).all(), "another image's label"
    part = split.part(torch.tensor([4, 1]))
    assert [labels.tolist() for _, labels in part.test_batches((8, 8), 10, CPU)] == [[4, 1]]
    assert part.unreadable == {}


@pytest.mark.parametrize("kind", ["memory", "photographs"])
def test_a_test_gives_every_image_once_and_in_order(kind):
    """Also for a batch size that does not divide the set, and shared among processes."""
    split = split_of(kind, flat(10))

    def seen(batch_size, shard=slice(None)):
        batches = list(split.test_batches((6, 6), batch_size, CPU, shard))
        for batch, labels in batches:
            assert batch.shape[1:] == (3, 6, 6)
            assert (batch.round() == 20 * labels[:, None, None, None]).all(), "another image's label"
        return [labels.tolist() for _, labels in batches]

    assert seen(4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert seen(64) == [list(range(10))]
    assert [seen(3, slice(r, None, 3)) for r in range(3)] == [[[0, 3, 6], [9]], [[1, 4, 7]], [[2, 5, 8]]]


@pytest.mark.parametrize("size", [(6, 6), (5, 7), (8, 9)])
@pytest.mark.parametrize("crop", [None, (0.2, 1.0)])
def test_photographs_in_a_frame_give_what_bare_images_give(crop, size):
    """Sizes say how much of the frame is the photograph; the last size here is the frame's own."""
    images, labels = pixels(2, 3, 5, 7), torch.arange(2)
    frames = torch.from_numpy(np.pad(images.numpy(), ((0, 0), (0, 0), (0, 3), (0, 2)), mode="edge"))
    bare = data.InMemory(images, labels, *PLAIN)
    framed = data.Photographs(frames, torch.tensor([[5, 7]] * 2), labels, *PLAIN)
    for (a, _), (b, _) in zip(bare.test_batches(size, 2, CPU), framed.test_batches(size, 2, CPU), strict=True):
        equal(b, a.numpy(), "test: the frame is taken for the image", FLOAT32_PIXELS)
    batches = (split.train_batches(size, 4, range(2), 0, crop, CPU) for split in (bare, framed))
    for (a, _), (b, _) in zip(*batches, strict=True):
        equal(b, a.numpy(), "train: the frame is taken for the image", FLOAT32_PIXELS)


@pytest.mark.parametrize("kind", ["memory", "photographs"])
@pytest.mark.parametrize("crop", [None, 0, (0.2, 0.2), "test"])
@pytest.mark.parametrize("size", [(20, 40), (40, 20), (30, 30)])
def test_nothing_is_squeezed_whatever_the_shape(kind, crop, size):
    """What is trained on and what is tested has the same aspect, but for the 3/4 to 4/3 of random resized crops.

    Red grows by the row, green by the column, both by one level a pixel: their ratio tells how much is squeezed.
    """
    if kind == "photographs" and crop == 0:
        pytest.skip("photographs are not padded")
    ramp = torch.zeros(1, 3, 100 if kind == "memory" else 200, 120, dtype=torch.uint8)
    ramp[:, 0], ramp[:, 1] = torch.arange(ramp.shape[2])[:, None], torch.arange(120)
    split = split_of(kind, ramp, 50)
    batches = (
        split.test_batches(size, 1, CPU) if crop == "test" else split.train_batches(size, 20, range(1), 0, crop, CPU)
    )
    images, _ = next(batches)
    height = images[:, 0, -6].mean(dim=1) - images[:, 0, 5].mean(dim=1)  # of all rows but eleven, in pixels
    width = (images[:, 1, :, -6].mean(dim=1) - images[:, 1, :, 5].mean(dim=1)).abs()
    squeezed = height / (size[0] - 11) / width * (size[1] - 11)
    if isinstance(crop, tuple):
        assert (3 / 4 - 0.05 < squeezed.min()) & (squeezed.max() < 4 / 3 + 0.05)
        assert float(squeezed.log().mean()) == pytest.approx(0, abs=0.15)
    else:
        equal(squeezed, np.ones(len(squeezed)), "squeezed", 0.02)


def test_many_crops_come_from_one_photograph():
    """Twelve samples of three photographs: each image has the colour of its label's, and a part keeps that."""
    split = photographs(flat(3, H=12), 12)
    assert len(split) == 12
    [(images, labels)] = split.train_batches((5, 5), 12, range(1), 0, (0.2, 1.0), CPU)
    assert torch.bincount(labels).tolist() == [4, 4, 4]
    equal(images, (20.0 * labels[:, None, None, None]).expand(12, 3, 5, 5).numpy(), atol=1e-3)
    (images, labels), *_ = split.part(torch.tensor([11, 3, 4])).test_batches((5, 5), 9, CPU)
    assert labels.tolist() == [2, 0, 1]
    equal(images[:, 0, 0, 0], [40, 0, 20], atol=1e-3)


def test_features_come_in_the_order_of_their_images():
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


def test_a_split_moves_to_the_device_with_all_it_has(monkeypatch):
    """With the first batch; from then on images are gathered and cropped there. "meta" is a device without numbers."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for kind, crop in KINDS_AND_CROPS:
        for training in (True, False):
            split = split_of(kind, pixels(3, 3, 4, 4))
            batches = (
                split.train_batches((6, 6), 2, range(2), 0, crop, "meta")
                if training
                else split.test_batches((6, 6), 2, "meta")
            )
            for images, labels in batches:
                assert (images.device.type, images.shape[1:], labels.device.type) == ("meta", (3, 6, 6), "meta")
            tensors = [value for value in vars(split).values() if isinstance(value, torch.Tensor)]
            assert len(tensors) >= 2
            assert all(tensor.device.type == "meta" for tensor in tensors)


def test_nobody_waits_for_a_copy_to_the_device(monkeypatch):
    """It comes out of pinned memory. On the CPU there is none."""
    pinned, asked, to = [], [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (pinned.append(tensor), tensor)[1])
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, *args, **kwargs: (asked.append(kwargs), to(tensor, *args))[1]
    )
    ones = torch.ones(2)
    assert data.to_device(ones, "meta").device.type == "meta"
    assert pinned[0] is ones
    assert asked == [{"non_blocking": True}]
    assert data.to_device(ones, CPU) is ones
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **kwargs: tensor)
    data.to_device(ones, "mps")  # Apple's GPUs share the host's memory, and PyTorch pins none for them
    assert len(pinned) == 1


# ---------------------------------------------------------------------------------------------
# Mixing and normalising
# ---------------------------------------------------------------------------------------------


def levels(B, H=8, W=8):
    """Image b is all b + 1, its label is b: what was mixed can be read off."""
    return torch.arange(1.0, B + 1)[:, None, None, None].expand(B, 1, H, W), torch.arange(B)


def augmented(images, labels, classes, erasing=0.0, mixup=0.0, cutmix=0.0, seed=0, step=0, shard=slice(None), B=None):
    """`augment_batch` of the rows `shard` of these images, which are a batch."""
    np.random.seed(step)  # noqa: NPY002 - global random numbers must not matter
    torch.manual_seed(step)
    B = B or len(images)
    return data.augment_batch(images[shard], labels[shard], classes, erasing, mixup, cutmix, seed, step, B, shard)


def test_a_batch_stays_as_it_is_when_nothing_is_on():
    images, labels = levels(4)
    ours = data.augment_batch(images, labels, 4, 0.0, 0.0, 0.0, 0, 0, 4)
    assert ours[0] is images
    assert ours[1] is labels


def test_mixup_alone_blends_all_pixels_by_the_labels_weight():
    B = 7
    images, targets = augmented(*levels(B), B, mixup=0.8, seed=1, step=2)
    oracle, shares = np.zeros((B, 1, 8, 8)), [float(targets[b, b]) for b in range(B)]
    for b, neighbour in enumerate((1, 0, 3, 2, 5, 4, 6)):
        oracle[b] = shares[b] * (b + 1) + (1 - shares[b]) * (neighbour + 1)
        assert float(targets[b, [b, neighbour]].unique().sum()) == pytest.approx(1)
        assert (targets[b] > 0).sum() == len({b, neighbour})
    equal(images, oracle, atol=1e-5)
    assert len(set(shares)) == B, "every image has a weight of its own"


def test_cutmix_alone_pastes_a_box_and_labels_by_its_area():
    """The border cuts boxes and rounding moves their sides, so the share is counted, not taken from the draw."""
    B = 40
    images, targets = augmented(*levels(B), B, cutmix=1.0)
    foreign = 0
    for b in range(B):
        own, other = images[b, 0] == b + 1, images[b, 0] == (b ^ 1) + 1
        assert (own | other).all(), "CutMix mixes no pixels"
        assert float(targets[b, b]) == pytest.approx(float(own.sum()) / 64, abs=1e-6)
        assert float(targets[b, b ^ 1]) == pytest.approx(float(other.sum()) / 64, abs=1e-6)
        assert other.sum() == other.any(dim=0).sum() * other.any(dim=1).sum(), "the pasted pixels are no box"
        foreign += bool(other.any())
    assert foreign > B / 2


def test_with_both_each_image_takes_one_by_a_fair_coin():
    """And its weight from that one's own distribution: Beta(a, a) has the variance 1 / (4 (2a + 1))."""
    B = 8000
    labels = torch.arange(B) % 2
    mixed, targets = augmented(1.0 + labels[:, None, None, None].expand(B, 1, 4, 4), labels, 2, mixup=1.0, cutmix=30.0)
    mixed = mixed.flatten(1)
    cut = ((mixed == 1) | (mixed == 2)).all(dim=1)
    even = (mixed == mixed[:, :1]).all(dim=1)
    assert (cut | even).all(), "an image that took both, or neither"
    assert float(cut.float().mean()) == pytest.approx(0.5, abs=0.03)  # of 8000: 0.0056 is one standard deviation
    share = targets[torch.arange(B), labels].double()
    assert float(share[~cut].var()) == pytest.approx(1 / 12, rel=0.05), "mixup with another's parameter"
    area = (1 - share[cut]) * 16  # boxes of about half of 16 pixels, less what the border cuts: none covers all
    assert area.max() <= 12, "CutMix with another's parameter"


@pytest.mark.parametrize("alpha", [0.2, 0.8, 2.0])
def test_the_weights_of_mixup_are_drawn_from_beta(alpha):
    """Beta(a, a) has the mean 1/2 and the variance 1 / (4 (2a + 1))."""
    B = 20_000
    labels = torch.arange(B) % 2
    _, targets = augmented(torch.zeros(B, 1, 1, 1), labels, 2, mixup=alpha)
    shares = targets[torch.arange(B), labels].double()
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(shares.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_boxes_of_cutmix_have_beta_areas_and_uniform_centres(alpha):
    """A box of side r around a uniform centre keeps r - r^2/4 of a side on average; r^2 is from Beta(a, a)."""
    B = 2000
    labels = torch.arange(B) % 2
    _, targets = augmented(torch.zeros(B, 1, 32, 32), labels, 2, cutmix=alpha)
    box = 1 - float(targets[torch.arange(B), labels].mean())

    def moment(k):  # of Beta(alpha, alpha)
        return math.gamma(alpha + k) * math.gamma(2 * alpha) / math.gamma(alpha) / math.gamma(2 * alpha + k)

    assert box == pytest.approx(moment(1) - moment(1.5) / 2 + moment(2) / 16, abs=0.02)


ALONE_AND_TOGETHER = [dict(mixup=0.8), dict(cutmix=1.0), dict(erasing=0.7), dict(erasing=0.7, mixup=0.8, cutmix=1.0)]


@pytest.mark.parametrize("on", ALONE_AND_TOGETHER)
def test_augmentation_of_shards_equals_that_of_the_batch(on):
    """Two processes that hold half the batch each see what one process sees. Shards are even: neighbours are mixed."""
    images, labels = uniform(8, 3, 20, 20, dtype=torch.float32), torch.arange(8)
    whole = augmented(images, labels, 8, step=5, **on)
    for cut in (2, 4, 6):
        parts = [augmented(images, labels, 8, step=5, shard=s, B=8, **on) for s in (slice(0, cut), slice(cut, None))]
        assert same([whole], [[torch.cat(v) for v in zip(*parts, strict=True)]]), "numbers of the wrong rows"


@pytest.mark.parametrize("on", ALONE_AND_TOGETHER)
def test_augmentation_is_a_function_of_seed_and_step(on):
    images, labels = uniform(8, 3, 20, 20, dtype=torch.float32), torch.arange(8)
    whole = augmented(images, labels, 8, step=5, **on)
    assert same([whole], [augmented(images, labels, 8, step=5, **on)])
    assert not torch.equal(whole[0], augmented(images, labels, 8, step=6, **on)[0])
    assert not torch.equal(whole[0], augmented(images, labels, 8, seed=1, step=5, **on)[0])
    assert not torch.equal(whole[0], images)


def test_images_are_erased_before_they_are_mixed():
    """As in timm, whose loader erases and whose loop mixes: noise is mixed, too."""
    images, labels = uniform(8, 3, 20, 20, dtype=torch.float32), torch.arange(8)
    erased, unchanged = augmented(images, labels, 8, erasing=1.0)
    assert unchanged.tolist() == list(range(8))
    in_turn = augmented(erased, labels, 8, mixup=0.8, cutmix=1.0)
    assert same([augmented(images, labels, 8, erasing=1.0, mixup=0.8, cutmix=1.0)], [in_turn])


def test_erasing_has_numbers_of_its_own():
    """23 for each image of the whole batch, then its noise."""
    images = uniform(6, 3, 9, 8, dtype=torch.float32)
    numbers = data.generator(2, 4, 7)
    draw = torch.rand(23, 6, generator=numbers).T
    oracle = augment.erase(images, draw, torch.randn(6, 3, 9, 8, generator=numbers), 0.6)
    erased, _ = augmented(images, torch.arange(6), 6, erasing=0.6, seed=2, step=7)
    assert torch.equal(erased, oracle)
    assert not torch.equal(erased, images)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 0.5), (0.8, 0.5)])
def test_mixing_has_numbers_of_its_own(mixup, cutmix):
    """NumPy's, for PyTorch has no Beta distribution with a generator; drawn, too, where one is off: Beta(1, 1)."""
    images, labels = uniform(6, 3, 9, 8, dtype=torch.float32), torch.arange(6)
    numbers = np.random.default_rng(np.random.SeedSequence((2, 2, 7)))
    coin, *weights = (
        numbers.random(6),
        numbers.beta(mixup or 1, mixup or 1, 6),
        numbers.beta(cutmix or 1, cutmix or 1, 6),
    )
    centre = torch.as_tensor(numbers.random((6, 2))).float()
    chance, oracle = {(0.8, 0.0): 1, (0.0, 0.5): 0, (0.8, 0.5): 0.5}[mixup, cutmix], []
    for b in range(6):
        by_mixup = coin[b] < chance
        weight = torch.tensor([weights[0 if by_mixup else 1][b]]).float()
        boxes = augment.cutmix_weights(weight, centre[b : b + 1], (9, 8))
        oracle.append(augment.mixup_weights(weight, (9, 8)) if by_mixup else boxes)
    oracle = augment.blend(images, torch.eye(6), torch.cat(oracle))
    assert same([augmented(images, labels, 6, mixup=mixup, cutmix=cutmix, seed=2, step=7)], [oracle])


def test_a_batch_is_augmented_on_its_device(monkeypatch):
    """With the device's own random numbers where there are many; "meta" is a device without numbers."""
    asked = []
    monkeypatch.setattr(data, "generator", lambda *key, device="cpu": asked.append((key, str(device))))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    images, labels = torch.ones(4, 3, 6, 6, device="meta"), torch.zeros(4, device="meta").long()
    ours = data.augment_batch(images, labels, 5, 0.5, 0.8, 1.0, 0, 3, 8, slice(4, 8))
    assert [(v.device.type, v.shape) for v in ours] == [("meta", (4, 3, 6, 6)), ("meta", (4, 5))]
    noises = [data.draw_noise(4, 9, columns, 0, 3, "meta") for columns in (1, 2)]
    assert [(v.device.type, v.shape) for v in noises] == [("meta", (4, 9)), ("meta", (4, 9, 2))]
    assert asked == [((0, data.ERASE, 3), "meta"), *[((0, data.MASK, 3), "meta")] * 2]


def test_erasing_fills_2_to_33_percent_with_noise():
    """Half of 1000 images, w / h from 0.3 to 1 / 0.3, N(0, 1) for each pixel and channel."""
    B, H, W = 1000, 40, 60
    images = torch.full((B, 2, H, W), 100.0)
    erased, _ = augmented(images, torch.zeros(B), 1, erasing=0.5)
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
    assert abs(np.corrcoef(erased[:, 0][changed[:, 0]], erased[:, 1][changed[:, 1]])[0, 1]) < 0.02, "so do channels"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalised_pixels_have_mean_0_and_standard_deviation_1(dtype):
    images, mean, std = pixels(2, 3, 2, 4).to(dtype), (0.5, 0.25, 0.1), (0.2, 0.3, 0.4)
    oracle = np.zeros((2, 3, 2, 4))
    for b, c, i, j in np.ndindex(oracle.shape):
        oracle[b, c, i, j] = (float(images[b, c, i, j]) / 255 - mean[c]) / std[c]
    ours = data.normalise(images, mean, std)
    assert ours.dtype == torch.float32
    equal(ours, oracle, "a mean and a standard deviation for each channel?", 1e-5)


def test_what_a_test_normalised_with_can_be_trained_with():
    """The constants are kept, as they were made: in inference mode, whose tensors can't be saved for a gradient."""
    mean, std = (0.123,), (0.456,)
    with torch.inference_mode():
        data.normalise(torch.ones(1, 1, 2, 2), mean, std)
    images = torch.ones(1, 1, 2, 2, requires_grad=True)
    data.normalise(images, mean, std).sum().backward()
    equal(images.grad, np.full((1, 1, 2, 2), 1 / (255 * 0.456)), atol=1e-6)


def test_pixels_can_be_brought_to_plus_minus_1():
    """As Google's models want them: 0 becomes -1 and 255 becomes 1, in training and in the test."""
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 2, 1, 1)
    splits = (data.InMemory(images, torch.arange(2), (0.1, 0.2), (0.3, 0.4)) for _ in range(2))
    dataset = data.to_plus_minus_1(data.Dataset("two", ["a", "b"], (0.1, 0.2), (0.3, 0.4), *splits))
    assert (dataset.name, dataset.mean, dataset.std) == ("two", (0.5, 0.5), (0.5, 0.5))
    for split in (dataset.train, dataset.test):
        [(images, labels)] = split.test_batches((1, 1), 2, CPU)
        equal(images[:, :, 0, 0], np.array([[-1, -1], [1, 1]]), atol=1e-6)


# ---------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("photo", "photos"), ("fashion_mnist", "fashion-mnist"), ("cifar-10", "cifar10"), ("CIFAR100", "cifar100")]
    + [("folder", "folder:PATH"), ("", "")],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(name, nearest):
    with refusal(repr(name), f"did you mean {nearest}", ", ".join(data.NAMES)):
        data.load(name)


def test_a_folder_is_loaded_by_its_path(monkeypatch):
    """Which may start with ~."""
    monkeypatch.setattr(image_folder, "load", lambda path: path)
    assert data.load("folder:/some/where") == Path("/some/where")
    assert data.load("folder:~/pets") == Path.home() / "pets"


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_photographs_are_learned_left_and_tested_right(size, tmp_path, monkeypatch):
    """Sixteen files of about 90 x 60 pixels: blue tells which one, green the row, and only the right third is red.

    Training never sees a trace of red: not at the cut, not by interpolation across it.
    """
    for i, name in enumerate(data.PHOTOS):
        image = torch.zeros(3, 60 + 6 * (i % 4), 90 + i % 3, dtype=torch.uint8)
        image[0, :, 60 + (i % 3 > 1) :] = 255  # two thirds, rounded down
        image[1] = torch.arange(image.shape[1])[:, None] * 3
        image[2] = 16 * i
        save_image(photograph(image), tmp_path / "data" / name, format="PNG")  # no loss, whatever its suffix
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=[tmp_path]))
    photos = data.load("photos", size)

    assert photos.name == "photos"
    assert photos.classes == [Path(name).stem for name in data.PHOTOS]
    for split in (photos, photos.train, photos.test):
        assert (split.mean, split.std) == STATISTICS["photos"]
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

    sides = [(60 + 6 * (i % 4), 60 + (i % 3 > 1)) for i in range(16)]  # what is left of each
    # To one and a half times the size, of the largest middle part of its shape: the smallest crops are small.
    shrink = [max(1, min(height / size[0], width / size[1]) / 1.5) for height, width in sides]
    assert photos.train.sizes.tolist() == [
        [round(v / by) for v in side] for side, by in zip(sides, shrink, strict=True)
    ]
    assert photos.train.images.shape[-2:] == tuple(photos.train.sizes.amax(dim=0)), "the frame is larger than needed"

    assert photos.test.images.shape[-2:] == size, "test crops are resized twice"
    images, labels = colours(photos.test.test_batches(size, 20, CPU))
    assert images.shape == (64, 3, *size)
    assert images[:, 0, :, 2:].min() > 230, "a test crop shows what training has seen"
    assert torch.bincount(labels).tolist() == [4] * 16
    equal(images[:, 2].mean(dim=(1, 2)), 16 * labels.numpy(), "a label that names another photograph", 0.1)
    for i in range(16):  # of the third's width and the shape of `size`, from the top to the bottom
        rows = images[labels == i, 1].mean(dim=(1, 2)) / 3
        height, side = 60 + 6 * (i % 4), (30 + (i % 3 > 0)) * size[0] / size[1]
        places = [(side - 1) / 2 + step / 3 * (height - side) for step in range(4)]
        equal(rows, places, "places of the test crops", 0.4)  # a level is a third of a row


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


IDX = [f"{split}-{what}-ubyte.gz" for split in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]


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


# Where the numbers are from: of Fashion-MNIST its README (github.com/zalandoresearch/fashion-mnist) has names and
# checksums, mean and standard deviation are computed below. CIFAR's checksums stand on cs.toronto.edu/~kriz/cifar.html;
# mean and standard deviation of CIFAR-10 in the UvA Deep Learning tutorials (tutorials 5 and 15), of CIFAR-100 in
# weiaicunzai/pytorch-cifar100, conf/global_settings.py; of ImageNet in the documentation of torchvision.models.
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CHECKSUMS = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
}
STATISTICS = {
    "cifar10": ((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)),
    "cifar100": ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
    "photos": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def test_the_real_fashion_mnist_is_as_it_is_written_down():
    """Its classes, and its mean and standard deviation, computed here from the training images."""
    folder = Path(os.environ.get("VIT_DATA") or "data")
    if not all((folder / "fashion-mnist" / name).is_file() for name in IDX):
        pytest.skip("Fashion-MNIST is not here; VIT_DATA can name the folder that has it")
    mnist = data.load("fashion-mnist", data_dir=folder)
    assert torch.bincount(mnist.train.labels).tolist() == [6000] * 10
    assert torch.bincount(mnist.test.labels).tolist() == [1000] * 10
    assert tuple(mnist.classes) == CLASSES
    assert [mnist.classes[i] for i in mnist.train.labels[:4]] == ["Ankle boot", "T-shirt/top", "T-shirt/top", "Dress"]
    counts = torch.bincount(mnist.train.images.flatten(), minlength=256).double()  # of each level: exact
    level = torch.arange(256).double() / 255
    mean = (counts * level).sum() / counts.sum()
    std = ((counts * (level - mean) ** 2).sum() / counts.sum()).sqrt()
    for split in (mnist, mnist.train, mnist.test):
        assert split.mean == pytest.approx([float(mean)], abs=5e-5), "four digits"
        assert split.std == pytest.approx([float(std)], abs=5e-5), "four digits"


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
def test_cifar_is_read_from_its_archive_without_unpacking_it(name, tmp_path, monkeypatch):
    """A record: the label (CIFAR-100: coarse, then fine), then red, green and blue, each row by row."""
    monkeypatch.chdir(tmp_path)
    members, records = cifar_members(name)
    (tmp_path / CIFAR[name]).write_bytes(archive(members))
    cifar = data.load(name, data_dir=tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == [CIFAR[name]], "something was unpacked"
    assert cifar.classes == [f"class{i}" for i in range(10 if name == "cifar10" else 100)]
    assert (cifar.name, data.NATIVE_SIZE[name]) == (name, 32)
    for split in (cifar, cifar.train, cifar.test):
        assert split.mean == pytest.approx(STATISTICS[name][0], abs=6e-5), "four digits"
        assert split.std == pytest.approx(STATISTICS[name][1], abs=6e-5), "four digits"
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
    with refusal(file, "damaged", "3920016 bytes, not to 47040016" if damage == "too short" else "", "delete"):
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


@pytest.mark.parametrize("label", [10, 200])
def test_a_label_outside_the_classes_of_fashion_mnist_is_refused(label, tmp_path, monkeypatch):
    """It would fail far from the cause, on a GPU without a word that helps."""
    sizes = {"images": (60_000, 28, 28), "labels": (60_000,)}
    for name in IDX[:2]:
        values = np.zeros(sizes["images" if "images" in name else "labels"], np.uint8)
        if "labels" in name:
            values[77] = label
        write_idx(tmp_path / "fashion-mnist" / name, values)
    with refusal(tmp_path / "fashion-mnist" / IDX[1], f"the label {label}", "0 to 9", "delete"):
        data.load("fashion-mnist", data_dir=tmp_path)


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("damage", ["label", "names", "text", "empty"])
def test_labels_and_names_of_cifar_that_do_not_fit_are_refused(name, damage, tmp_path):
    """A label without a class; another number of names; names that are no text; no image."""
    members, _ = cifar_members(name)
    names, *_, last = members
    n, position = (10, 0) if name == "cifar10" else (100, 1)
    words = {"label": (f"the label {n}", f"0 to {n - 1}"), "names": (f"{n - 1} classes, not {n}",), "text": ("utf-8",)}
    if damage == "label":
        content = bytearray(members[last])
        content[position] = n
        members[last] = bytes(content)
    elif damage == "empty":
        members[last] = b""
    else:
        members[names] = b"\xff\xfe" if damage == "text" else b"\n".join(members[names].split()[1:])
    (tmp_path / CIFAR[name]).write_bytes(archive(members))
    with refusal(tmp_path / CIFAR[name], "damaged", *words.get(damage, ("no image",)), "delete"):
        data.load(name, data_dir=tmp_path)


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path):
    """A decompression bomb: 200 MB of zeros in 200 kB. What comes after the data set's size is not even looked at."""
    (tmp_path / "fashion-mnist").mkdir()
    file = tmp_path / "fashion-mnist" / IDX[0]
    file.write_bytes(gzip.compress(bytes(1_000_000), 1) * 200 + b"no gzip")
    with refusal(file, "damaged", "more bytes", "delete"):
        data.load("fashion-mnist", data_dir=tmp_path)


def test_a_member_of_an_archive_that_is_too_large_is_not_read(tmp_path):
    """200 MB of zeros in 200 kB; the largest file of CIFAR-100 has 153,700,000 bytes."""
    names = ["data_batch_1.bin", *(f"data_batch_{i}.bin" for i in range(2, 6)), "test_batch.bin", "batches.meta.txt"]
    content = archive({f"cifar-10-batches-bin/{name}": b"" for name in names[1:]})
    large = tarfile.TarInfo(f"cifar-10-batches-bin/{names[0]}")
    large.size = 512 * 400_000
    blocks = gzip.compress(large.tobuf()) + gzip.compress(bytes(512 * 4000), 1) * 100  # a .gz file may have many parts
    (tmp_path / CIFAR["cifar10"]).write_bytes(blocks + content)
    with refusal(tmp_path / CIFAR["cifar10"], "damaged", "data_batch_1.bin", "204,800,000 bytes", "delete"):
        data.load("cifar10", data_dir=tmp_path)


# ---------------------------------------------------------------------------------------------
# Downloads: how a file comes is checked in test_files.py, here which one, and what is said if it does not
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """What is asked for, instead of the download: a small CIFAR-10 comes, anything else fails."""
    asked, content = [], archive(cifar_members("cifar10")[0])

    def download(url, path, checksum=None, check=None):
        asked.append((url, path, checksum))
        if path.name != CIFAR["cifar10"]:
            raise OSError("the cable is cut")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    monkeypatch.setattr(data.files, "download", download)
    monkeypatch.delenv("VIT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return asked


def test_files_are_looked_for_in_data_dir_then_vit_data_then_data(downloads, tmp_path, monkeypatch):
    data.load("cifar10")
    monkeypatch.setenv("VIT_DATA", str(tmp_path / "mine"))
    data.load("cifar10")
    data.load("cifar10", data_dir=tmp_path / "other" / "one")
    found = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob(CIFAR["cifar10"]))
    assert found == ["data", "mine", "other/one"]


@pytest.mark.parametrize(
    ("data_set", "folder", "site"),
    [
        ("fashion-mnist", "fashion-mnist", "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"),
        ("cifar10", "", "https://www.cs.toronto.edu/~kriz/"),
        ("cifar100", "", "https://www.cs.toronto.edu/~kriz/"),
    ],
)
def test_each_file_comes_from_its_official_site_with_its_checksum(
    data_set, folder, site, downloads, tmp_path, monkeypatch
):
    names = [CIFAR[data_set]] if data_set in CIFAR else IDX

    def download(url, path, checksum):
        downloads.append((url, path, checksum))
        shape = (60_000 if "train" in path.name else 10_000, *((28, 28) if "images" in path.name else ()))
        if data_set in CIFAR:
            path.write_bytes(archive(cifar_members(data_set)[0]))
        else:
            write_idx(path, np.zeros(shape))
        return path

    monkeypatch.setattr(data.files, "download", download)
    dataset = data.load(data_set, data_dir=tmp_path)
    assert downloads == [(site + name, tmp_path / folder / name, f"md5:{CHECKSUMS[name]}") for name in names]
    assert dataset.name == data_set


@pytest.mark.parametrize("name", ["cifar100", "fashion-mnist"])
def test_without_a_network_the_error_says_where_to_put_the_file(name, downloads, tmp_path):
    folder, file = (tmp_path, CIFAR[name]) if name in CIFAR else (tmp_path / name, IDX[0])
    with refusal(
        file,
        f"not in {folder}",
        "http",
        "the cable is cut",
        "put it there, or name the folder that has it with --data-dir",
    ):
        data.load(name, data_dir=tmp_path)


def test_a_wrong_checksum_is_reported_with_the_address(downloads, tmp_path, monkeypatch):
    def download(*_):
        raise ValueError("it came with the checksum md5:1, not md5:2; not kept")

    monkeypatch.setattr(data.files, "download", download)
    with refusal("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "checksum md5:1", "not kept", "try again"):
        data.load("cifar10", data_dir=tmp_path)


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_data_dir_that_is_a_file_is_refused(folder, tmp_path):
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
