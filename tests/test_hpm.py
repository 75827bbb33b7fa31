"""What masked autoencoders and Hard Patches Mining have to compute: hpm.py, once more and slowly.

The oracles stand in oracles.py: float64 NumPy, one number at a time, from the equation alone. The code under test has
to agree with them to ten digits, so the models are float64 too. Read the tests in order: they follow hpm.py. Those
with an `exercise` mark grade the function of that name; see tests/exercises.py. True means hidden.

Shares of many masks are compared with what the mask's distribution gives, within five standard deviations: seeds are
fixed, so that a test passes always or never, and right code with other random numbers fails once in a million times.
"""

import ast
import copy
import math
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import skimage.feature
import torch

import data
import hpm
import vit
from related import mpp, resnet
from tests import oracles
from tests.oracles import equal, filled, random

FLOAT32 = 1e-5  # losses of one step are taken in float32: a few dozen operations, each exact to 6e-8 of numbers near 1


def uniform(*shape, seed=0, dtype=torch.float64):
    """Noise: uniform numbers from [0, 1), the same for the same seed."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """An arch small enough for loops, with a name that `create` knows."""
    monkeypatch.setitem(vit.ARCHS, "vit_tiny2", dict(patch_size=2, dim=12, depth=2, num_heads=2))
    return "vit_tiny2"


def small(target="pixels", channels=2, **options):
    """HPM for images of 8 x 12 pixels: a grid of 4 x 6, N = 24 patches, 18 hidden, 6 visible.

    Every weight is random, and the teacher's are others than the student's.
    """
    options = dict(decoder=(8, 2, 2)) | options
    model = filled(hpm.create("vit_tiny2", (8, 12), channels, target, **options))
    if model.teacher is not None:
        other = filled(copy.deepcopy(model.student), seed=9)
        model.teacher.load_state_dict(other.state_dict(), strict=False)  # it has no reconstruction decoder
    return model


def images_of(model, batch=3):
    encoder = model.student.encoder
    return random(batch, encoder.patch_embed.proj.in_channels, *encoder.img_size)


def noise_for(model, batch=3, seed=0):
    shape = (batch, math.prod(model.student.encoder.grid), model.noise_columns)
    noise = uniform(*shape, seed=seed)
    return noise[..., 0] if model.noise_columns == 1 else noise


def picture(mask, grid):
    """A mask to look at in a failure: # is hidden, . is visible."""
    return "\n" + "\n".join("".join(".#"[int(hides)] for hides in row) for row in mask.reshape(grid).tolist())


def test_hpm_needs_nothing_but_torch_and_vit():
    """So the two files can be copied together into any project."""
    imports = set()
    for node in ast.walk(ast.parse(Path(hpm.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imports |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imports.add(node.module.split(".")[0])
    assert imports == {"copy", "math", "torch", "vit"}


# ---------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------

RATIOS = [0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9]
GRIDS = [(7, 7), (14, 14), (4, 6), (6, 4)]


@pytest.mark.equation("masks")
@pytest.mark.parametrize("ratio", RATIOS)
def test_as_many_patches_are_hidden_as_in_maes_code(ratio):
    """N - int(N (1 - ratio)): the number of visible patches is rounded down, so 37 of 7 x 7 are hidden at 75 %."""
    for patches in (*range(20, 60), 196, 256):
        assert hpm.count_hidden(patches, ratio) == oracles.count_hidden_loops(patches, ratio), (patches, ratio)
    assert [hpm.count_hidden(patches, 0.75) for patches in (49, 196, 256)] == [37, 147, 192]


@pytest.mark.parametrize("ratio", [-0.5, 0.0, 1.0, 1.5, 75, math.nan])
def test_a_mask_ratio_outside_0_and_1_is_refused(ratio):
    """75 for 75 % is the usual slip."""
    with pytest.raises(ValueError, match=rf"^mask ratio {ratio} .*between 0 and 1, as 0.75$"):
        hpm.count_hidden(196, ratio)


@pytest.mark.parametrize(("patches", "ratio", "hidden"), [(4, 0.9, 4), (196, 0.999, 196), (4, 0.1, 1), (196, 0.005, 1)])
def test_a_mask_must_leave_one_patch_and_hide_two(patches, ratio, hidden):
    """The encoder needs something to see; the relative loss needs a pair."""
    with pytest.raises(ValueError, match=rf"^mask ratio {ratio} hides {hidden} of {patches} patches; .*2 and leave 1"):
        hpm.count_hidden(patches, ratio)


def test_two_hidden_and_one_visible_patch_are_enough():
    assert (hpm.count_hidden(5, 0.3), hpm.count_hidden(3, 0.5)) == (2, 2)


def mask_of(kind, noise, grid, ratio, fraction=0.5, predicted=None):
    """One of the four masks, from noise (B, N, 5); all but blocks take its last column."""
    if kind == "random":
        return hpm.random_mask(noise[..., 4], ratio)
    if kind == "hard":
        predicted = random(*noise.shape[:2], seed=3) if predicted is None else predicted
        return hpm.hard_mask(predicted, noise[..., 4], ratio, fraction)
    if kind == "block":
        return hpm.block_mask(noise, grid, ratio)
    return hpm.grid_mask(noise[..., 4], grid, ratio)


KINDS = ["random", "block", "grid", "hard"]
each_kind = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.exercise(f"{kind}_mask"), pytest.mark.equation(equation)])
        for kind, equation in zip(KINDS, ["masks", "masks", "masks", "HPM easy to hard"], strict=True)
    ],
)


@each_kind
def test_every_row_hides_exactly_the_same_number(kind):
    """So that a batch stays a rectangle of tokens; and True = hidden, which a ratio far from 1/2 tells apart."""
    for grid in GRIDS:
        for ratio in RATIOS:
            for batch in (1, 8):
                mask = mask_of(kind, uniform(batch, math.prod(grid), 5), grid, ratio)
                assert mask.shape == (batch, math.prod(grid)), f"{mask.shape} for {batch} images of a {grid} grid"
                assert mask.dtype == torch.bool, f"a mask of {mask.dtype}"
                hidden = oracles.count_hidden_loops(math.prod(grid), ratio)
                assert mask.sum(dim=1).tolist() == [hidden] * batch, (
                    f"at a ratio of {ratio}, {hidden} of {math.prod(grid)} patches are to be hidden (True) in each row"
                )


@each_kind
def test_a_mask_is_a_function_of_its_own_noise(kind):
    """Equal noise, equal masks; of other images' noise it knows nothing, so that a part of a batch gets its own."""
    noise, predicted = uniform(8, 49, 5), random(8, 49, seed=3)
    before = noise.clone()
    mask = mask_of(kind, noise, (7, 7), 0.6, predicted=predicted)
    assert torch.equal(noise, before), "the noise that the caller gave was changed"
    again = mask_of(kind, noise, (7, 7), 0.6, predicted=predicted)
    assert torch.equal(mask, again), "the same noise gave another mask: is there chance of its own?"
    for rows in (slice(2, 5), slice(6, 7)):
        part = mask_of(kind, noise[rows], (7, 7), 0.6, predicted=predicted[rows])
        assert torch.equal(part, mask[rows]), f"rows {rows.start} to {rows.stop - 1} alone got other masks than in 8"


@each_kind
def test_other_noise_gives_another_mask(kind):
    """Each image has its own, here of the same predicted loss."""
    masks = mask_of(kind, uniform(20, 49, 5), (7, 7), 0.6, predicted=random(1, 49).expand(20, -1))
    for i, mask in enumerate(masks):
        for j in range(i):
            assert not torch.equal(mask, masks[j]), f"images {j} and {i} share the mask{picture(mask, (7, 7))}"


@pytest.mark.equation("masks")
@pytest.mark.parametrize("grid", [(7, 7), (4, 6), (3, 10), (14, 14)])
@pytest.mark.parametrize("ratio", [0.12, 0.4, 0.75, 0.95])
def test_masks_equal_the_loops(grid, ratio):
    """Patch by patch: which numbers of the noise decide what is part of what repeats from run to run."""
    noise, predicted = uniform(4, math.prod(grid), 5, seed=5), random(4, math.prod(grid), seed=6)
    for b in range(4):
        last = noise[b, :, 4].tolist()
        for kind, loops in {
            "random": lambda last=last: oracles.random_mask_loops(last, ratio),
            "block": lambda b=b: oracles.block_mask_loops(noise[b].tolist(), grid, ratio),
            "grid": lambda last=last: oracles.grid_mask_loops(last, grid, ratio),
            "hard": lambda b=b, last=last: oracles.hard_mask_loops(predicted[b].tolist(), last, ratio, 0.3),
        }.items():
            mask = mask_of(kind, noise, grid, ratio, 0.3, predicted)[b]
            assert mask.tolist() == loops(), f"{kind} {picture(mask, grid)}"


@pytest.mark.equation("masks")
def test_what_40_rectangles_leave_is_left_to_noise():
    """40 of them lie in the top left corner, the others at the bottom right: those are too late."""
    draw = uniform(4, 64, 5)
    draw[:, :40, 2:4], draw[:, 40:, 2:4] = 0.0, 0.99
    for row, mask in zip(draw.tolist(), hpm.block_mask(draw, (8, 8), 0.75).tolist(), strict=True):
        assert mask == oracles.block_mask_loops(row, (8, 8), 0.75)


def shares(mask):
    """How often each patch, and each pair of patches, is hidden: (N), (N, N)."""
    mask = mask.double()
    return mask.mean(dim=0), mask.T @ mask / len(mask)


@pytest.mark.equation("masks")
@pytest.mark.exercise("random_mask")
def test_random_masks_hide_all_patches_and_pairs_equally_often():
    """n / N, and n (n - 1) / (N (N - 1)) for pairs; the bounds are about five standard deviations."""
    one, two = shares(hpm.random_mask(uniform(20000, 16), 0.75))
    equal(one, np.full(16, 12 / 16), "some patches are hidden more often than others", atol=0.016)
    equal(two[~torch.eye(16, dtype=torch.bool)], np.full(240, 12 / 16 * 11 / 15), "some pairs are", atol=0.018)


@pytest.mark.equation("masks")
@pytest.mark.exercise("grid_mask")
@pytest.mark.parametrize("grid", [(14, 14), (4, 6), (6, 4)])
def test_a_grid_mask_keeps_the_top_left_of_2_by_2(grid):
    """MAE, figure 6, at a ratio of 75 %; on an even grid nothing is left to chance."""
    keeps = torch.tensor([[row % 2 == 0 and column % 2 == 0 for column in range(grid[1])] for row in range(grid[0])])
    for mask in hpm.grid_mask(uniform(4, math.prod(grid)), grid, 0.75):
        assert torch.equal(mask, ~keeps.flatten()), (
            f"hidden (#) are{picture(mask, grid)}\ninstead of{picture(~keeps, grid)}"
        )


@pytest.mark.equation("masks")
@pytest.mark.exercise("grid_mask")
@pytest.mark.parametrize(("ratio", "among", "share"), [(0.5, "others", 8 / 12), (0.875, "kept", 2 / 4)])
def test_a_grid_mask_leaves_parts_to_chance(ratio, among, share):
    """At 50 % of 4 x 4, 8 of the 12 others are hidden; at 87.5 %, 2 of the 4 on the grid: each as often as any."""
    keeps = torch.zeros(4, 4, dtype=torch.bool)
    keeps[::2, ::2] = True
    mask = hpm.grid_mask(uniform(10000, 16), (4, 4), ratio)
    sure = mask[:, keeps.flatten()] if among == "others" else ~mask[:, ~keeps.flatten()]
    assert not sure.any(), f"the patches of the grid are not the last to be hidden: {picture(mask[0], (4, 4))}"
    one, two = shares(mask[:, keeps.flatten() if among == "kept" else ~keeps.flatten()])
    M, hidden = len(one), round(share * len(one))
    equal(one, np.full(M, share), "how often each of them is hidden", atol=0.025)
    pairs = two[~torch.eye(M, dtype=torch.bool)]
    equal(pairs, np.full(M * (M - 1), share * (hidden - 1) / (M - 1)), "how often each pair of them is", atol=0.025)


def boxes(masks, grid):
    """Top, bottom, left, right of what each mask hides: (B, 4)."""
    found = []
    for mask in masks.reshape(-1, *grid):
        rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
        found.append([rows[0], rows[-1], columns[0], columns[-1]])
    return torch.tensor(found)


@pytest.fixture(scope="module")
def block_noise():
    """For 2,000 block masks of a grid of 14 x 14."""
    return uniform(2000, 196, 5, dtype=torch.float32)


@pytest.mark.equation("masks")
@pytest.mark.exercise("block_mask")
def test_blocks_are_tall_and_wide_alike(block_noise):
    """A ratio of 5 % hides ten patches of the first rectangle; the box around them tells its shape.

    Of the rectangles 46 % are taller than wide, 46 % wider than tall, 24 % twice as tall and 24 % twice as wide; a box
    around ten of their patches is a little smaller at times: 30 patches on average, by three seeds, and by 9 from that.
    Five standard deviations of a share of 2,000 are 5.6 %, of that average 1.
    """
    grid = (14, 14)
    mask = hpm.block_mask(block_noise, grid, 0.05)
    top, bottom, left, right = boxes(mask, grid).T
    height, width = bottom - top + 1, right - left + 1
    example = f"as in{picture(mask[0], grid)}"
    for what, a, b in (("taller than wide", height, width), ("wider than tall", width, height)):
        share, twice = (a > b).double().mean().item(), (a >= 2 * b).double().mean().item()
        assert share == pytest.approx(0.46, abs=0.08), (
            f"{share:.0%} of the blocks are {what}, 46 % should be, {example}"
        )
        assert twice == pytest.approx(0.23, abs=0.08), f"{twice:.0%} are so twice, 24 % should be, {example}"
    area = (height * width).double()
    assert area.max() <= 56, f"a block of {int(area.max())} patches; 25 % of the grid are 49, and a few by rounding"
    assert area.mean().item() == pytest.approx(30, abs=2), f"boxes of {area.mean():.1f} patches on average, not 30"
    assert area.std().item() == pytest.approx(9, abs=2), f"a standard deviation of {area.std():.1f} patches, not 9"


@pytest.mark.equation("masks")
@pytest.mark.exercise("block_mask")
def test_blocks_lie_at_every_place_equally_often(block_noise):
    """A rectangle of height h has 14 - h + 1 places: 12 % touch the border, on each side; its centre is 7 on average.

    Ten patches of it reach a little less far, 9 to 11 % by three seeds; bounds as above.
    """
    grid = (14, 14)
    mask = hpm.block_mask(block_noise, grid, 0.05)
    top, bottom, left, right = boxes(mask, grid).T
    for side, touches in dict(top=top == 0, bottom=bottom == 13, left=left == 0, right=right == 13).items():
        share = touches.double().mean().item()
        assert share == pytest.approx(0.1, abs=0.05), f"{share:.1%} of the blocks touch the {side}, 10 % should"
    for what, first, last in (("row", top, bottom), ("column", left, right)):
        centre = ((first + last + 1) / 2).mean().item()
        assert centre == pytest.approx(7, abs=0.35), f"the blocks' mean {what} is {centre:.1f} of 14"
    together = torch.corrcoef(torch.stack([top + bottom, left + right]).double())[0, 1].item()
    assert abs(together) < 0.12, f"a block's row and its column go together, with a correlation of {together:.2f}"


@pytest.mark.equation("masks")
@pytest.mark.exercise("block_mask")
@pytest.mark.parametrize(
    ("grid", "area", "side"), [((5, 5), 0.0, 2), ((18, 25), 0.0, 6), ((20, 20), 0.5, 8), ((20, 20), 0.999, 10)]
)
def test_the_area_of_a_block_is_the_first_number(grid, area, side):
    """From 8 to 25 % of the grid, and at least 4 patches; squares, by the second number, so that the side tells it.

    Nine tenths of the first rectangle are hidden, so it may look smaller by a row or a column; and by how it is
    rounded, smaller or larger by one.
    """
    N = math.prod(grid)
    draw = uniform(50, N, 5)
    draw[..., 0], draw[..., 1] = area, 0.5
    mask = hpm.block_mask(draw, grid, 0.9 * side**2 / N)
    for image, (top, bottom, left, right) in zip(mask, boxes(mask, grid).tolist(), strict=True):
        sides = bottom - top + 1, right - left + 1
        assert all(side - 2 <= s <= side + 1 for s in sides), (
            f"a rectangle of {sides[0]}x{sides[1]} for an area of {0.08 + 0.17 * area:.0%} (at least 4) of {grid} "
            f"patches, as {side}x{side}: hidden (#) are{picture(image, grid)}"
        )


@pytest.mark.equation("masks")
@pytest.mark.exercise("block_mask")
def test_what_blocks_do_not_cover_is_hidden_by_chance():
    """All rectangles are the same one of 3 x 3, in the middle: of 8 x 8, 23 of the other 55 patches are hidden.

    Rounding may make it one larger or smaller, 16 of 48 or 28 of 60; five standard deviations of 2,000 are 0.055.
    """
    draw = uniform(2000, 64, 5)
    draw[..., :4] = 0.5
    mask = hpm.block_mask(draw, (8, 8), 0.5)
    share = mask.double().mean(dim=0).reshape(8, 8)
    assert (share[3:5, 3:5] == 1).all(), f"the block itself is not hidden first: {picture(mask[0], (8, 8))}"
    for row, column in np.ndindex(8, 8):
        if not (2 <= row < 6 and 2 <= column < 6):
            assert 0.27 < share[row, column] < 0.53, (
                f"the patch in row {row}, column {column}, outside of all blocks, is hidden {share[row, column]:.0%} "
                f"of the time, as often as any other would be 42 %: {picture(mask[0], (8, 8))}"
            )


@pytest.mark.equation("masks")
@pytest.mark.exercise("block_mask")
@pytest.mark.parametrize(("grid", "ratio"), [((14, 14), 0.25), ((14, 14), 0.5), ((4, 36), 0.25), ((36, 4), 0.25)])
def test_a_block_mask_hides_connected_rectangles(grid, ratio):
    """At random, two patches beside each other are hidden with probability ratio²; in blocks 1.4 times as often.

    Beside and above each other, also on wide and tall grids: were rows and columns swapped, patches would scatter.
    """
    noise = uniform(256, math.prod(grid), 5, dtype=torch.float32)
    mask = hpm.block_mask(noise, grid, ratio)
    images = mask.reshape(256, *grid)
    for where, pairs in (("beside", images[:, :, 1:] & images[:, :, :-1]), ("above", images[:, 1:] & images[:, :-1])):
        share = pairs.double().mean().item()
        assert share > 1.4 * ratio**2, (
            f"two patches {where} each other are hidden {share:.1%} of the time, {ratio**2:.1%} would be chance; "
            f"hidden (#) are, for instance,{picture(mask[0], grid)}"
        )


def test_the_index_of_visible_and_hidden_patches_is_in_order():
    mask = torch.tensor([[True, False, True, False, True], [False, True, True, True, False]])
    visible, hidden = hpm.split_mask(mask, 3)
    assert visible.tolist() == [[1, 3], [0, 4]]
    assert hidden.tolist() == [[0, 2, 4], [1, 2, 3]]
    wide = hpm.random_mask(uniform(2, 1000), 0.5)  # long enough for an unstable sort to show
    for row, seen, hid in zip(wide.tolist(), *(index.tolist() for index in hpm.split_mask(wide, 500)), strict=True):
        assert seen == [i for i in range(1000) if not row[i]]
        assert hid == [i for i in range(1000) if row[i]]


# ---------------------------------------------------------------------------------------------
# Targets
# ---------------------------------------------------------------------------------------------


@pytest.mark.equation("HPM targets")
@pytest.mark.exercise("normalise_patches")
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_a_normalised_patch_has_mean_0_and_variance_1(scale):
    """MAE's recommended target, with the unbiased variance.

    The 1e-6 that keeps a flat patch from 0 / 0 may be added to the variance or to its root: at a tenth of the usual
    contrast, either changes a number by a few 1e-4 of itself at most. A biased variance would by 4e-2.
    """
    for shape in ((2, 3, 12), (1, 1, 4)):
        patches = scale * random(*shape) + 5
        normalised, mean, std = hpm.normalise_patches(patches)
        shapes = tuple(tuple(value.shape) for value in (normalised, mean, std))
        assert shapes == (shape, (*shape[:2], 1), (*shape[:2], 1)), f"shapes {shapes} of patches, means, stds"
        for b, i in np.ndindex(shape[:2]):
            values, oracle_mean, oracle_std = oracles.normalise_loops(patches[b, i].tolist())
            equal(mean[b, i, 0], oracle_mean, "the mean of each patch", atol=1e-6)
            equal(std[b, i, 0], oracle_std, "the standard deviation of each patch, unbiased", atol=3e-5)
            equal(normalised[b, i], values, "mean 0 and unbiased variance 1 in each patch", atol=2e-3)
        equal(normalised * std + mean, patches.numpy(), "this is how a reconstruction is shown", atol=1e-5)


@pytest.mark.equation("HPM targets")
@pytest.mark.exercise("normalise_patches")
def test_a_flat_patch_is_no_division_by_zero():
    """In float32 what rounding leaves of 0.7 - 0.7, at most 1e-7, is amplified: by 1e6 at most."""
    normalised, mean, std = hpm.normalise_patches(torch.full((2, 3, 8), 0.7))
    assert normalised.abs().max() < 1, f"a flat patch becomes {normalised[0, 0].tolist()}: 0 / 0?"
    assert (mean - 0.7).abs().max() < 1e-6
    assert std.min() > 0


def test_normalised_patches_equal_the_loops_to_ten_digits():
    patches = random(2, 3, 12) * torch.tensor([1.0, 1e-3, 0.0])[:, None] + 5
    normalised, mean, std = hpm.normalise_patches(patches)
    for b, i in np.ndindex(2, 3):
        values, *oracle = oracles.normalise_loops(patches[b, i].tolist())
        equal(normalised[b, i], values, atol=1e-8)  # numbers near 5 lose 1e-15 in the difference, over 1e-3: 1e-12
        equal(torch.stack([mean[b, i, 0], std[b, i, 0]]), oracle)


def smooth(*shape):
    """Images with slopes in all directions, far above any epsilon."""
    noise = np.random.default_rng(0).normal(size=shape)
    return torch.from_numpy(100 * scipy.ndimage.gaussian_filter(noise, sigma=(0, 0, 2, 2)))


@pytest.mark.equation("HPM targets")
@pytest.mark.exercise("hog")
def test_hog_equals_scikit_images_for_each_channel():
    """MaskFeat's target. A patch of 16 holds 2 x 2 cells row by row, in each the channels, in each the bins.

    skimage divides by √(length² + 1e-10), with lengths above 1 here: 1e-10 at most, and its own float64 rounding.
    """
    images = smooth(2, 3, 32, 48)
    ours = hpm.hog(images, 16)
    assert ours.shape == (2, 6, 4 * 3 * 9), f"{tuple(ours.shape)}: 4 cells, 3 channels, 9 bins for each of 6 patches"
    ours = ours.reshape(2, 2, 3, 2, 2, 3, 9)  # image, patch row, patch column, cell row, cell column, channel, bin
    options = dict(orientations=9, pixels_per_cell=(8, 8), cells_per_block=(1, 1), block_norm="L2")
    for b in range(2):
        for c in range(3):
            cells = skimage.feature.hog(images[b, c].numpy(), **options, feature_vector=False).reshape(4, 6, 9)
            oracle = cells.reshape(2, 2, 3, 2, 9).transpose(0, 2, 1, 3, 4)  # patch row, column, cell row, column, bin
            equal(ours[b, ..., c, :], oracle, "other bins, borders, or order of cells?", atol=1e-6)


@pytest.mark.equation("HPM targets")
@pytest.mark.exercise("hog")
@pytest.mark.parametrize(
    ("shape", "P", "bins"),
    [
        ((2, 2, 8, 12), 4, 9),
        ((1, 1, 16, 8), 8, 9),
        ((1, 2, 24, 24), 12, 6),
        ((1, 1, 24, 48), 24, 9),
        ((1, 3, 6, 4), 2, 12),
    ],
)
def test_hog_equals_the_loops(shape, P, bins):
    """Cells of 8 where 8 divides the patch, else one cell a patch; other bins, one image, one channel, any grid."""
    images = smooth(*shape)
    ours = hpm.hog(images, P) if bins == 9 else hpm.hog(images, P, bins)
    oracle = oracles.each(oracles.hog_loops, images, P, bins)
    equal(ours, oracle, "a histogram for each channel of a cell, of length 1, by magnitude", atol=1e-6)


@pytest.mark.equation("HPM targets")
@pytest.mark.exercise("hog")
def test_hog_has_a_bin_for_an_angle_that_rounds_to_pi():
    """-1e-10 modulo π is π in float32. It is an edge of the first bin as much as of the last, but of none beyond."""
    images = (torch.arange(8.0) - 1).repeat(1, 1, 8, 1)
    images[..., 1] -= 1e-10 * torch.arange(8)
    histogram = hpm.hog(images, 8)[0, 0]
    assert histogram[1:8].tolist() == [0] * 7, (
        "the image is a ramp from left to right: all its angles are 0, or just below"
    )
    assert histogram.norm().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.equation("HPM targets")
@pytest.mark.exercise("hog")
def test_hog_of_a_flat_image_is_zero():
    equal(hpm.hog(torch.full((1, 3, 16, 16), 0.7), 8), np.zeros((1, 4, 27)), "0 / 0?", atol=1e-6)


def test_hog_does_not_blow_up_the_noise_of_flat_cells():
    """A slope of 1e-8 is rounding; lengths below 1e-5 are not scaled to 1."""
    assert hpm.hog(0.7 + 1e-8 * random(1, 1, 16, 16), 8).abs().max() < 0.01


# ---------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------


IN_WORDS = {
    "l2": "for each patch, the mean of the squared differences",
    "smooth-l1": "for each patch, the mean of ½ d² where a difference d is below 1, of |d| - ½ above",
    "cosine": "for each patch, the squared distance of the unit vectors, 2 - 2 cos",
    "cross-entropy": "for each patch, - Σ softmax(target) log softmax(prediction)",
}


@pytest.mark.equation("HPM L_rec", "HPM metrics")
@pytest.mark.exercise("reconstruction_loss")
@pytest.mark.parametrize("metric", hpm.METRICS)
def test_reconstruction_loss_is_one_number_a_patch(metric):
    """L_rec = 𝓜(prediction, 𝒯): (B, n, d), (B, n, d) -> (B, n), mean over a patch's values (sum for unit vectors)."""
    for B, n, d in ((2, 3, 8), (1, 4, 5), (3, 1, 6)):
        prediction, target = 1.5 * random(B, n, d), random(B, n, d, seed=2)
        assert 0 < ((prediction - target).abs() < 1).sum() < B * n * d, "both branches of smooth l1 are to be seen"
        oracle = [
            [oracles.metric_loops(p.tolist(), t.tolist(), metric) for p, t in zip(*image, strict=True)]
            for image in zip(prediction, target, strict=True)
        ]
        equal(hpm.reconstruction_loss(prediction, target, metric), oracle, f"{metric}: {IN_WORDS[metric]}", atol=1e-6)


@pytest.mark.equation("HPM metrics")
@pytest.mark.exercise("reconstruction_loss")
@pytest.mark.parametrize("metric", hpm.METRICS)
def test_the_gradient_of_a_metric_is_its_slope(metric):
    """Into the prediction; nobody asks for that into the target."""
    target = random(2, 3, 8, seed=2)
    oracles.slopes(lambda prediction: hpm.reconstruction_loss(prediction, target, metric), 1.5 * random(2, 3, 8))


@pytest.mark.equation("HPM metrics")
@pytest.mark.exercise("reconstruction_loss")
def test_the_default_metric_is_l2():
    prediction, target = random(2, 3, 4), random(2, 3, 4, seed=2)
    loss = ((prediction - target) ** 2).mean(dim=2)
    equal(hpm.reconstruction_loss(prediction, target), loss, "without a metric: l2", atol=1e-6)


@pytest.mark.exercise("reconstruction_loss")
def test_an_unknown_metric_is_refused():
    oracles.refusal('the metric "l1"', hpm.reconstruction_loss, random(1, 2, 3), random(1, 2, 3), "l1")


def test_the_message_about_an_unknown_metric_names_all():
    with pytest.raises(ValueError, match="^unknown metric 'l1'; there are l2, smooth-l1, cosine, cross-entropy$"):
        hpm.reconstruction_loss(random(1, 2, 3), random(1, 2, 3), "l1")


def test_cross_entropy_of_extreme_predictions_is_finite():
    """float32; log(softmax(x)) in two steps is -inf from a difference of 104 on."""
    prediction, target = torch.tensor([[[0.0, 1e4]]]), torch.tensor([[[0.0, 0.0]]])
    assert hpm.reconstruction_loss(prediction, target, "cross-entropy").item() == pytest.approx(5e3)


# ---------------------------------------------------------------------------------------------
# The autoencoder
# ---------------------------------------------------------------------------------------------


def split(model, batch=3, seed=0):
    """A random mask, and the indices of its visible and hidden patches in order, by loops."""
    N = math.prod(model.student.encoder.grid)
    rows = [oracles.random_mask_loops(noise, 0.75) for noise in uniform(batch, N, seed=seed).tolist()]
    indices = [[[i for i, hides in enumerate(row) if hides == wanted] for row in rows] for wanted in (False, True)]
    return torch.tensor(rows), torch.tensor(indices[0]), torch.tensor(indices[1])


def turn_sign(predictor):
    """Predicted losses below 0 in place of above: they only rank, so they may be."""
    for parameter in predictor.pred.parameters():
        parameter.data.neg_()


@pytest.mark.equation("HPM L_rec")
@pytest.mark.exercise("Autoencoder.forward")
@pytest.mark.parametrize(("batch", "channels"), [(2, 2), (1, 1)])
def test_the_student_reconstructs_hidden_patches_from_visible_ones(batch, channels):
    """d_φ(f_θ(x ⊙ M)), and its predicted loss d_ψ(f_θ(x ⊙ M)), by loops, each image with its own mask."""
    model = small(channels=channels)
    turn_sign(model.student.loss_predictor)
    images, (_, visible, hidden) = images_of(model, batch), split(model, batch)
    prediction, predicted_loss = model.student(images, visible, hidden)
    shape = batch, 18, 4 * channels
    assert prediction.shape == shape, f"prediction {tuple(prediction.shape)}: {shape}, for the hidden patches, is due"
    assert predicted_loss.shape == (batch, 18), f"predicted loss {tuple(predicted_loss.shape)}, not (B, n)"
    for b in range(batch):
        oracle = oracles.student_loops(model.student, images[b].numpy(), visible[b].tolist(), hidden[b].tolist())
        equal(prediction[b], oracle[0], "the reconstruction of the hidden patches", atol=1e-8)
        equal(predicted_loss[b], oracle[1], "one predicted loss for each hidden patch", atol=1e-8)


@pytest.mark.exercise("Autoencoder.forward")
def test_one_hidden_patch_keeps_its_axis():
    """One image, one hidden patch: (1, 1, outputs) and (1, 1)."""
    model = small()
    prediction, predicted_loss = model.student(images_of(model, 1), torch.arange(23)[None], torch.tensor([[23]]))
    assert prediction.shape == (1, 1, 8), f"prediction {tuple(prediction.shape)}: which axis was squeezed?"
    assert predicted_loss.shape == (1, 1), f"predicted loss {tuple(predicted_loss.shape)}: which axis was squeezed?"


@pytest.mark.exercise("Autoencoder.forward")
@pytest.mark.parametrize("which", ["prediction", "predicted loss"])
def test_the_encoder_learns_from_both_decoders(which):
    """L_rec and L_pred train f_θ together."""
    model = small()
    _, visible, hidden = split(model)
    outputs = model.student(images_of(model), visible, hidden)
    outputs[which == "predicted loss"].square().sum().backward()
    gradient = model.student.encoder.patch_embed.proj.weight.grad
    assert gradient is not None, f"no gradient comes from the {which} to the encoder"
    assert gradient.any(), f"no gradient comes from the {which} to the encoder"


@pytest.mark.exercise("Autoencoder.forward")
def test_a_student_without_a_loss_predictor_predicts_none():
    """MAE's."""
    model = small(mask="random", predictor="none")
    _, visible, hidden = split(model)
    prediction, predicted_loss = model.student(images_of(model), visible, hidden)
    assert prediction.shape == (3, 18, 8)
    assert predicted_loss is None, f"predicted loss {predicted_loss} by a student that has no loss predictor"


@pytest.mark.equation("HPM L_rec")
@pytest.mark.exercise("Autoencoder.forward")
def test_the_student_never_sees_a_hidden_patch():
    """f_θ(x ⊙ M): NaN in all hidden pixels reaches neither the reconstruction nor the predicted loss."""
    model = small()
    images, (mask, visible, hidden) = images_of(model), split(model)
    patches = vit.patchify(images, 2).masked_fill(mask[..., None], math.nan)
    seen = model.student(images, visible, hidden)
    unseen = model.student(vit.unpatchify(patches, 2, (4, 6)), visible, hidden)
    for name, a, b in zip(("prediction", "predicted loss"), seen, unseen, strict=True):
        assert torch.equal(a, b), f"the {name} depends on hidden pixels"


@pytest.mark.parametrize("class_token", [True, False])
def test_decoder_tokens_each_have_their_own_position(class_token):
    """Class token, visible patches, hidden patches; the position is the patch's, not that of the place in line.

    Here positions are random, the class token's too: the formula gives it zeros, a file may have others.
    """
    encoder = vit.ViT((8, 12), 2, 2, 0, 12, 1, 2, class_token=class_token, pool="cls" if class_token else "mean")
    student = filled(hpm.Autoencoder(encoder, 8, 8, 1, 2))
    student.decoder_pos_embed.data = random(1, 24 + class_token, 8)
    _, visible, hidden = split(small())
    latent = random(3, 6 + class_token, 12)
    tokens = student.decoder_tokens(latent, visible, hidden)
    for b in range(3):
        oracle = oracles.decoder_tokens_loops(student, latent[b].numpy(), visible[b].tolist(), hidden[b].tolist())
        equal(tokens[b], oracle)


def test_an_autoencoder_does_without_a_class_token():
    encoder = vit.ViT((8, 12), 2, 2, 0, 12, 1, 2, class_token=False, pool="mean")
    student, (_, visible, hidden) = filled(hpm.Autoencoder(encoder, 8, 8, 1, 2)), split(small(), 1)
    images = random(1, 2, 8, 12)
    prediction, predicted_loss = student(images, visible, hidden)
    oracle = oracles.student_loops(student, images[0].numpy(), visible[0].tolist(), hidden[0].tolist())
    equal(prediction[0], oracle[0], atol=1e-8)
    equal(predicted_loss[0], oracle[1], atol=1e-8)
    predicted_loss, features = student.predict_loss(images)
    equal(predicted_loss[0], oracles.student_loops(student, images[0].numpy(), range(24), [])[1], atol=1e-8)
    assert features.shape == (1, 24, 12)


@pytest.mark.exercise("Autoencoder.forward")
def test_patches_may_be_listed_in_any_order():
    """Each token carries its position through encoder and decoders; but patches that change places do matter."""
    model = small()
    images, (_, visible, hidden) = images_of(model), split(model)
    prediction, predicted_loss = model.student(images, visible, hidden)
    turned, order = visible.flip(1), torch.arange(18).roll(5)
    again, loss_again = model.student(images, turned, hidden[:, order])
    what = "hidden patches listed in another order: the same answers"
    equal(again, prediction[:, order].detach().numpy(), what, atol=1e-8)
    equal(loss_again, predicted_loss[:, order].detach().numpy(), what, atol=1e-8)

    patches = vit.patchify(images, 2)
    patches = patches.scatter(1, turned[..., None].expand(-1, -1, 8), vit.gather(patches, visible))
    moved, _ = model.student(vit.unpatchify(patches, 2, (4, 6)), visible, hidden)
    assert (moved - prediction).abs().max() > 1e-3, "visible patches changed places without effect"


def test_a_decoder_answers_for_the_last_tokens():
    """Blocks on all tokens, LayerNorm, one linear map; the predictor has one output, the reconstruction P·P·C."""
    student, z = small().student, random(2, 25, 8)
    for decoder, outputs in ((student.decoder, 8), (student.loss_predictor, 1)):
        ours = decoder(z, 18)
        assert ours.shape == (2, 18, outputs)
        equal(ours, np.stack([oracles.decoder_loops(decoder, tokens.numpy(), 18) for tokens in z]), atol=1e-8)


@pytest.mark.equation("HPM predicted loss")
@pytest.mark.exercise("Autoencoder.predict_loss")
@pytest.mark.parametrize("batch", [2, 1])
def test_the_predicted_loss_of_the_whole_image_equals_the_loops(batch):
    """L̂ = d_ψ(f_θ(x)): all patches in their order, no mask token; the features are the encoder's, no class token."""
    student = small().student
    turn_sign(student.loss_predictor)
    images = random(batch, 2, 8, 12)
    predicted_loss, features = student.predict_loss(images)
    assert predicted_loss.shape == (batch, 24), f"predicted loss {tuple(predicted_loss.shape)}, not (B, N)"
    for b in range(batch):
        _, oracle = oracles.student_loops(student, images[b].numpy(), range(24), [])
        what = "d_ψ of all patches: positions added once, the class token not among them"
        equal(predicted_loss[b], oracle, what, atol=1e-8)
        latent = oracles.encoder_loops(student.encoder, images[b].numpy())
        equal(features[b], latent[1:], "the features are f_θ(x), before decoder_embed", atol=1e-8)


@pytest.mark.equation("HPM predicted loss")
@pytest.mark.exercise("Autoencoder.predict_loss")
def test_features_need_neither_decoder():
    """The teacher has no reconstruction decoder; one without a loss predictor gives its features alone."""
    student = small(mask="random", predictor="none").student
    student.decoder = None
    predicted_loss, features = student.predict_loss(random(2, 2, 8, 12))
    assert predicted_loss is None
    assert features.shape == (2, 24, 12)


def test_positions_are_fixed_sine_cosine_in_encoder_and_decoders():
    student = hpm.create("vit_tiny2", (8, 12), decoder=(8, 1, 2)).student
    for positions, dim in ((student.encoder.pos_embed, 12), (student.decoder_pos_embed, 8)):
        assert not positions.requires_grad
        equal(positions, oracles.sincos_loops(dim, 4, 6, 1), atol=1e-6)


def test_decoders_start_from_xavier_matrices_and_a_small_mask_token():
    """MAE's initialisation: uniform up to √(6 / (fan in + fan out)), biases 0; mask token N(0, 0.02)."""
    torch.manual_seed(0)
    student = hpm.create("vit_micro4", 28, 1).student
    assert student.mask_token.std().item() == pytest.approx(0.02, rel=0.5)  # of 64 numbers: 5 standard deviations
    for part in (student.decoder_embed, student.decoder, student.loss_predictor):
        for name, parameter in part.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any(), name
            elif parameter.ndim == 2 and len(parameter) > 1:  # the predictor's last layer: see the next test
                rows = len(parameter) // 3 if "qkv" in name else len(parameter)
                bound = math.sqrt(6 / (rows + parameter.shape[1]))
                assert 0.9 * bound < parameter.abs().max().item() <= bound, name


@pytest.mark.parametrize(("P", "channels", "dim"), [(16, 3, 512), (4, 1, 64), (2, 2, 12)])
def test_the_predictors_last_layer_starts_as_the_mean_of_many_outputs(P, channels, dim):
    """HPM's code has P·P·C outputs, each a Xavier-uniform row, and takes their mean: one output starts as the mean row.

    For ViT-B/16 its deviation is 0.00147; one Xavier row would have 0.0624, and its gradient in the encoder would be
    as much larger. Beside it, rows drawn and averaged by NumPy; of 512 numbers or more, 5 standard deviations.
    """
    torch.manual_seed(0)
    encoder, starts = vit.ViT(2 * P, P, channels, 0, 12, 1, 2), []
    for _ in range(math.ceil(512 / dim)):
        predictor = hpm.Autoencoder(encoder, 8, dim, 1, 2).loss_predictor.pred
        assert predictor.weight.requires_grad
        assert not predictor.bias.any()
        starts.append(predictor.weight.detach().flatten())
    outputs = P * P * channels
    bound = math.sqrt(6 / (dim + outputs))
    rows = np.random.default_rng(0).uniform(-bound, bound, (20, outputs, dim)).mean(axis=1)
    start = torch.cat(starts)
    assert start.std().item() == pytest.approx(rows.std(), rel=0.2)
    assert abs(start.mean().item()) < 5 * rows.std() / math.sqrt(len(start))
    if dim == 512:
        assert start.std().item() == pytest.approx(0.00147, rel=0.16)


# ---------------------------------------------------------------------------------------------
# Predicted loss
# ---------------------------------------------------------------------------------------------

LOOPS = {"absolute": oracles.absolute_loops, "relative": oracles.relative_loops}
each_loss = pytest.mark.parametrize(
    "predictor",
    [
        pytest.param(name, marks=[pytest.mark.exercise(f"{name}_loss"), pytest.mark.equation(f"HPM {name}")])
        for name in LOOPS
    ],
)


PREDICTOR_IN_WORDS = {
    "absolute": "the mean of (predicted - standard)², the true losses with mean 0 and variance 1 in each image",
    "relative": "the mean of -log σ(L̂_i - L̂_j) over the pairs of an image in which i is the harder one",
}


def loss_of(predictor):
    return getattr(hpm, f"{predictor}_loss")


@each_loss
@pytest.mark.parametrize(("batch", "n"), [(4, 7), (1, 5), (3, 2), (1, 2)])
def test_the_predictors_loss_and_gradient_equal_the_loops(predictor, batch, n):
    """Of several images, of one, and of one pair. 1e-5: nobody promised where the epsilon of the variance stands."""
    predicted, true = random(batch, n).requires_grad_(), random(batch, n, seed=2).exp()
    loss = loss_of(predictor)(predicted, true)
    oracle, gradient = LOOPS[predictor](predicted.detach().numpy(), true.numpy())
    equal(loss, oracle, PREDICTOR_IN_WORDS[predictor], atol=1e-5)
    assert loss.requires_grad, "the loss is cut off from the predictor's gradient"
    loss.backward()
    equal(predicted.grad, gradient, "the gradient of the loss", atol=1e-5)


@each_loss
def test_equal_true_losses_are_handled_as_in_the_loops(predictor):
    """They are no pair, and each image has another number of them; in the last one all are equal: no 0 / 0."""
    predicted = random(4, 7).requires_grad_()
    true = (random(4, 7, seed=2).abs() * torch.tensor([[1.0], [2.0], [4.0], [0.0]])).round()
    loss = loss_of(predictor)(predicted, true)
    oracle, gradient = LOOPS[predictor](predicted.detach().numpy(), true.numpy())
    equal(loss, oracle, f"{PREDICTOR_IN_WORDS[predictor]}; these are {true.tolist()}", atol=1e-5)
    loss.backward()
    equal(predicted.grad, gradient, "the gradient of the loss", atol=1e-5)


@pytest.mark.equation("HPM absolute")
def test_the_absolute_loss_has_the_epsilon_of_normalised_patches():
    """Losses that are nearly equal, to a thousandth: √(variance + 1e-6)."""
    predicted, true = random(2, 5), 1e-3 * random(2, 5, seed=2)
    equal(hpm.absolute_loss(predicted, true), oracles.absolute_loops(predicted.numpy(), true.numpy())[0])


@pytest.mark.equation("HPM relative")
@pytest.mark.exercise("relative_loss")
def test_the_relative_loss_without_any_pair_is_zero():
    """All true losses equal, as for blank images: nothing to compare, and no 0 / 0."""
    for shape in ((2, 5), (1, 1)):
        predicted = random(*shape).requires_grad_()
        loss = hpm.relative_loss(predicted, torch.ones(shape, dtype=torch.float64))
        assert loss.item() == 0, f"the loss is {loss.item()}, not 0; 0 / 0?"
        if loss.requires_grad:
            loss.backward()
            equal(predicted.grad, np.zeros(shape), "without a pair nothing is learned")


@each_loss
def test_extreme_predictions_give_a_finite_loss_and_gradient(predictor):
    """float32; log σ(x) in two steps is -inf from x = -104 on, and its gradient NaN."""
    predicted, true = torch.tensor([[1e4, -1e4, 0.0, 1e4]], requires_grad=True), torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    loss = loss_of(predictor)(predicted, true)
    loss.backward()
    oracle, gradient = LOOPS[predictor](predicted.detach().double().numpy(), true.double().numpy())
    assert loss.item() == pytest.approx(oracle, rel=1e-4), f"{loss.item()} for predictions of up to 1e4"
    np.testing.assert_allclose(predicted.grad.numpy(), gradient, rtol=1e-4, atol=1e-6)


@each_loss
def test_the_true_losses_get_no_gradient(predictor):
    """They are a target: the decoder must not learn to make patches as hard as they were predicted to be."""
    true = random(2, 5).requires_grad_()
    loss_of(predictor)(random(2, 5, seed=2).requires_grad_(), true).backward()
    assert true.grad is None or not true.grad.any(), "a gradient reaches the true losses"


def allocated_peak(run):
    """Most bytes that `run` had allocated at one time: the profiler sees what kernels allocate for themselves, too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.slow
def test_the_relative_loss_needs_memory_for_three_tensors_of_pairs():
    """Forward and backward, for ViT-B/16: (B, n, n) float32 are 22 MB with a batch of 256 and n = 147."""
    predicted, true = torch.randn(64, 147, requires_grad=True), torch.rand(64, 147)
    peak = allocated_peak(lambda: hpm.relative_loss(predicted, true).backward())
    one = 64 * 147 * 147 * 4
    assert one < peak, "the measurement misses the pairs themselves"
    assert peak <= 3 * one, f"{peak / one:.2f} tensors of (B, n, n) float32; is a bool cast to int64 to be summed?"


def test_rank_correlation_is_spearmans_averaged_over_images():
    """Ranks are whole numbers, exact in float32; three dozen operations on them are within 1e-5."""
    predicted, true = random(6, 20), random(6, 20, seed=2)
    true[:3] = true[:3] * 0.3 + predicted[:3].exp()
    oracle = [scipy.stats.spearmanr(*row).statistic for row in zip(predicted.numpy(), true.numpy(), strict=True)]
    equal(hpm.rank_correlation(predicted, true), sum(oracle) / 6, atol=1e-5)
    equal(hpm.rank_correlation(true, true.exp()), 1.0, atol=1e-5)
    equal(hpm.rank_correlation(true, -true), -1.0, atol=1e-5)
    assert not hpm.rank_correlation(predicted.requires_grad_(), true).requires_grad


def test_ranks_of_equal_numbers_are_those_of_their_places():
    flat, rising = torch.zeros(1, 500), torch.arange(500.0)[None]  # long enough for an unstable sort to show
    assert hpm.rank_correlation(flat, rising).item() == pytest.approx(1, abs=1e-5)
    assert hpm.rank_correlation(rising, flat).item() == pytest.approx(1, abs=1e-5)


# ---------------------------------------------------------------------------------------------
# Easy to hard
# ---------------------------------------------------------------------------------------------


@pytest.mark.equation("HPM easy to hard")
@pytest.mark.exercise("hard_fraction")
@pytest.mark.parametrize(
    ("t", "T", "share"), [(0, 100, 0.0), (25, 100, 0.125), (99, 100, 0.495), (300, 300, 0.5), (7, 9, 7 / 18)]
)
def test_the_guided_share_rises_in_a_straight_line(t, T, share):
    """Easy to hard: α_t = α_0 + (t / T)(α_T - α_0), by default from 0 to 0.5."""
    assert hpm.hard_fraction(t, T) == pytest.approx(share, abs=1e-9), f"at step {t} of {T}"


@pytest.mark.equation("HPM easy to hard")
@pytest.mark.exercise("hard_fraction")
@pytest.mark.parametrize(("t", "share"), [(0, 0.8), (1, 0.794), (50, 0.5), (75, 0.35), (100, 0.2)])
def test_the_guided_share_may_fall(t, share):
    """Hard to easy, which the paper compares with."""
    assert hpm.hard_fraction(t, 100, 0.8, 0.2) == pytest.approx(share, abs=1e-9), f"at step {t} of 100"


@pytest.mark.equation("HPM easy to hard")
@pytest.mark.exercise("hard_mask")
@pytest.mark.parametrize("fraction", [0, 0.1, 0.37, 0.5, 0.74, 1])
@pytest.mark.parametrize("ratio", [0.4, 0.75, 0.9])
def test_a_hard_mask_hides_the_largest_predicted_losses(fraction, ratio):
    """int(n α_t) of them, found by looking for the largest again and again; the count of all stays exact."""
    for batch in (1, 8):
        predicted = random(batch, 49)
        mask = hpm.hard_mask(predicted, uniform(batch, 49), ratio, fraction)
        n = oracles.count_hidden_loops(49, ratio)
        for losses, row in zip(predicted.tolist(), mask.tolist(), strict=True):
            assert sum(row) == n, f"{sum(row)} patches are hidden, {n} are to be"
            guided = oracles.hide_loops(losses, int(n * fraction))
            missed = [i for i in range(49) if guided[i] and not row[i]]
            assert not missed, f"{int(n * fraction)} of {n} are the hardest ones; patches {missed} stayed visible"


@pytest.mark.equation("HPM easy to hard")
@pytest.mark.exercise("hard_mask")
@pytest.mark.parametrize(("fraction", "guided"), [(0, 0), (0.5, 6), (0.65, 7), (0.7, 8), (0.99, 11)])
def test_the_rest_of_a_hard_mask_is_uniform(fraction, guided):
    """Not only over the easy half, and never less than the rest: of N - g others, n - g are hidden (n = 12, N = 16)."""
    predicted = random(1, 16)
    easy = predicted[0].argsort()[: 16 - guided]
    one, two = shares(hpm.hard_mask(predicted.expand(20000, -1), uniform(20000, 16), 0.75, fraction))
    m, M = 12 - guided, 16 - guided
    equal(one[easy], np.full(M, m / M), "how often each of the others is hidden", atol=0.02)
    pairs = two[easy][:, easy][~torch.eye(M, dtype=torch.bool)]
    equal(pairs, np.full(M * (M - 1), m / M * (m - 1) / (M - 1)), "how often each pair of them is", atol=0.02)


@pytest.mark.equation("HPM easy to hard")
@pytest.mark.exercise("hard_mask")
def test_a_hard_mask_without_guidance_ignores_the_prediction():
    noise = uniform(8, 49)
    masks = [hpm.hard_mask(loss, noise, 0.75, 0.0) for loss in (random(8, 49), -random(8, 49), torch.zeros(8, 49))]
    for mask in masks[1:]:
        assert torch.equal(masks[0], mask), "with a share of 0 the mask depends on the noise alone"


@pytest.mark.equation("HPM easy to hard")
@pytest.mark.exercise("hard_mask")
@pytest.mark.parametrize("fraction", [0, 0.1, 0.5, 1])
def test_equal_predictions_do_not_change_the_count(fraction):
    """A threshold in place of a count would hide all patches that share the value."""
    predicted = random(16, 49).round()  # about five values
    for loss in (predicted, torch.zeros(16, 49)):
        mask = hpm.hard_mask(loss, uniform(16, 49), 0.75, fraction)
        assert mask.sum(dim=1).tolist() == [37] * 16, "37 are to be hidden, however many predictions are equal"
        guided = int(37 * fraction)
        if guided:  # whatever is above the smallest of the guided values is hidden
            threshold = loss.sort(dim=1, descending=True).values[:, guided - 1 : guided]
            assert mask[loss > threshold].all(), "one of the hardest patches stayed visible"


@pytest.mark.equation("HPM easy to hard")
@pytest.mark.exercise("hard_mask")
def test_the_size_of_predicted_losses_does_not_matter():
    """Their order does: any number of any sign, the noise's range or not."""
    predicted, noise = random(8, 49), uniform(8, 49)
    masks = [
        hpm.hard_mask(1000**power * predicted + shift, noise, 0.75, 0.4) for power, shift in ((0, 0), (1, -9), (-1, 3))
    ]
    for mask in masks[1:]:
        assert torch.equal(masks[0], mask), "larger or smaller losses in the same order gave another mask"


# ---------------------------------------------------------------------------------------------
# The teacher
# ---------------------------------------------------------------------------------------------


@pytest.mark.equation("EMA")
@pytest.mark.exercise("ema_update")
def test_the_teacher_is_a_moving_average_of_the_student():
    """θ_t ← m θ_t + (1 - m) θ_s, one number at a time over three updates; fixed positions are left alone."""
    model = small()
    teacher, student = (dict(part.named_parameters()) for part in (model.teacher, model.student))
    oracle = {name: value.detach().clone().numpy() for name, value in teacher.items()}
    model.student.encoder.pos_embed.data += 1
    for update, momentum in enumerate((0.9, 0.3, 0.99)):
        for parameter in student.values():
            parameter.data += 0.1 * (update + 1)
        expected = {name: value.detach().clone() for name, value in student.items()}
        hpm.ema_update(model.teacher, model.student, momentum)
        for name, value in oracle.items():
            if not name.endswith("pos_embed"):
                for place in np.ndindex(value.shape):
                    value[place] = momentum * value[place] + (1 - momentum) * expected[name][place].item()
        assert all(torch.equal(student[name], value) for name, value in expected.items()), "the student was changed"
    for name, value in oracle.items():
        equal(teacher[name], value, f"{name}: the momentum is the teacher's share; positions stay", atol=1e-8)
        assert teacher[name] is dict(model.teacher.named_parameters())[name], f"{name} is another tensor now"
        assert not teacher[name].requires_grad, f"the teacher's {name} asks for a gradient now"


@pytest.mark.equation("EMA")
@pytest.mark.exercise("ema_update")
@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_0_copies_and_momentum_1_changes_nothing(momentum):
    """float32: m θ_t + (1 - m) θ_s has one rounding for each of three operations on numbers below 3."""
    model = small().float()
    teacher, student = (dict(part.named_parameters()) for part in (model.teacher, model.student))
    oracle = {name: (teacher if momentum else student)[name].detach().clone() for name in teacher}
    hpm.ema_update(model.teacher, model.student, momentum)
    for name, value in oracle.items():
        equal(teacher[name], value.numpy(), f"{name} with momentum {momentum}", atol=2e-6)


def test_a_teacher_starts_as_its_student_bit_for_bit():
    """A run loads the student's weights, then copies them with momentum 0."""
    model = small().float()
    hpm.ema_update(model.teacher, model.student, 0.0)
    student = dict(model.student.named_parameters())
    for name, value in model.teacher.named_parameters():
        assert torch.equal(value, student[name]), name


@pytest.mark.equation("EMA")
@pytest.mark.exercise("ema_momentum")
@pytest.mark.parametrize(
    ("epoch", "momentum"), [(0, 0.999), (0.5, 0.9990045), (33, 0.999297), (50, 0.99945), (100, 0.9999), (200, 0.9999)]
)
def test_momentum_rises_over_the_first_100_epochs(epoch, momentum):
    """HPM: from 0.999 in a straight line to 0.9999, and stays there."""
    assert hpm.ema_momentum(epoch) == pytest.approx(momentum, abs=1e-9), f"at epoch {epoch}"


@pytest.mark.equation("EMA")
@pytest.mark.exercise("ema_momentum")
@pytest.mark.parametrize(("epoch", "momentum"), [(0, 0.9), (1, 0.91), (3, 0.93), (5, 0.95), (8, 0.95)])
def test_the_schedule_of_momentum_has_a_start_an_end_and_a_ramp(epoch, momentum):
    assert hpm.ema_momentum(epoch, 0.9, 0.95, 5) == pytest.approx(momentum, abs=1e-9), f"at epoch {epoch}"


def test_the_teacher_is_the_student_without_reconstruction_and_gradient():
    model = hpm.create("vit_tiny2", (8, 12), 2, decoder=(8, 1, 2))
    student = {n: p for n, p in model.student.named_parameters() if not n.startswith("decoder.")}
    teacher = dict(model.teacher.named_parameters())
    assert teacher.keys() == student.keys()
    assert all(torch.equal(teacher[name], student[name]) for name in student)
    assert all(teacher[name] is not student[name] for name in student)
    assert model.teacher.decoder is None
    model(random(2, 2, 8, 12).float(), uniform(2, 24), 0.5)["loss"].backward()
    assert all(not p.requires_grad and p.grad is None for p in teacher.values())


# ---------------------------------------------------------------------------------------------
# The teacher asked in turn
# ---------------------------------------------------------------------------------------------


@pytest.mark.equation("HPM in turn")
@pytest.mark.parametrize("ratio", RATIOS)
def test_what_is_hidden_in_turn_equals_the_loops(ratio):
    """As many in each turn as of a student, so that the teacher is asked what the student is taught."""
    for N in (*range(11, 50), 196):
        n, noise = oracles.count_hidden_loops(N, ratio), uniform(3, N)
        mask = hpm.hide_in_turn(noise, n)
        assert (mask.sum(dim=2) == n).all()
        for row, turns in zip(noise.tolist(), mask, strict=True):
            shown = [set(patches) for patches in oracles.shown_in_turn_loops(row, n)]
            assert [{i for i in range(N) if not turn[i]} for turn in turns.tolist()] == shown, f"{n} of {N} hidden"
            assert turns.any(dim=0).all(), "a patch is never hidden, so nobody predicts it"
            assert (~turns).any(dim=0).all(), "a patch is never shown"


@pytest.mark.equation("HPM in turn")
@pytest.mark.parametrize(
    ("N", "ratio", "turns"), [(196, 0.75, 4), (196, 0.5, 2), (196, 0.25, 4), (49, 0.75, 5), (256, 0.9, 11)]
)
def test_there_are_as_few_turns_as_can_be(N, ratio, turns):
    """At 75 % of 196 four, and none of them shows a patch again: the encoder sees each once."""
    mask = hpm.hide_in_turn(uniform(2, N), hpm.count_hidden(N, ratio))
    assert mask.shape == (2, turns, N)
    times = (~mask).sum(dim=1)
    assert times.max() - times.min() <= 1, "some patches are shown more often than others by more than one"


def test_turns_are_random():
    """Each patch, and each pair of patches, is shown in a turn as often as any other, by five standard deviations."""
    one, two = shares(~hpm.hide_in_turn(uniform(20000, 16), 12)[:, 1])
    equal(one, np.full(16, 4 / 16), atol=0.016)
    equal(two[~torch.eye(16, dtype=torch.bool)], np.full(240, 4 / 16 * 3 / 15), atol=0.01)


def turns_of(batch, N, n):
    """Predictions (B, G, n) of the hidden patches of each turn, each with an offset of its own; and which these are."""
    mask = hpm.hide_in_turn(uniform(batch, N), n)
    return random(*mask.shape[:2], n) + 10 * random(*mask.shape[:2], 1, seed=2), mask


IN_TURN = "for each patch the mean, over the turns in which it is hidden, of its prediction less the turn's mean"


@pytest.mark.equation("HPM in turn")
@pytest.mark.exercise("average_in_turn")
@pytest.mark.parametrize(("batch", "N", "n"), [(3, 24, 18), (1, 49, 37), (2, 16, 8), (2, 20, 7), (1, 5, 2)])
def test_the_average_in_turn_equals_the_loops(batch, N, n):
    """At several ratios; at some, one patch is hidden more often than another."""
    predicted, mask = turns_of(batch, N, n)
    before = predicted.clone(), mask.clone()
    ours = hpm.average_in_turn(predicted, mask)
    assert ours.shape == (batch, N), f"{tuple(ours.shape)}, not (B, N)"
    for b in range(batch):
        answers = []
        for row, values in zip(mask[b].tolist(), predicted[b].tolist(), strict=True):
            answers.append(dict(zip([i for i in range(N) if row[i]], values, strict=True)))
        equal(ours[b], oracles.average_in_turn_loops(answers, N), IN_TURN)
    assert torch.equal(predicted, before[0]), "the predictions that were given are changed"
    assert torch.equal(mask, before[1]), "the mask that was given is changed"


@pytest.mark.equation("HPM in turn")
@pytest.mark.exercise("average_in_turn")
def test_the_offset_of_a_turn_says_nothing():
    """Losses are compared within a turn: a number added to all predictions of one changes nothing."""
    predicted, mask = turns_of(2, 24, 18)
    moved = hpm.average_in_turn(predicted + 5 * random(2, 4, 1, seed=3), mask)
    equal(moved, hpm.average_in_turn(predicted, mask), "another offset for each turn gave another answer")


@pytest.mark.equation("HPM in turn")
@pytest.mark.exercise("average_in_turn")
def test_turns_may_come_in_any_order_and_number():
    """They need not be those of `hide_in_turn`: here a patch is hidden in one of them, others in all."""
    predicted, mask = turns_of(2, 24, 18)
    ours = hpm.average_in_turn(predicted, mask)
    equal(hpm.average_in_turn(predicted.flip(1), mask.flip(1)), ours, "the turns in another order")
    mask = torch.tensor([[[True, True, False, True], [True, False, True, True]]])
    predicted = torch.tensor([[[0.0, 3.0, 6.0], [5.0, 2.0, 2.0]]], dtype=torch.float64)
    equal(hpm.average_in_turn(predicted, mask), [[(-3 + 2) / 2, 0.0, -1.0, (3 - 1) / 2]], IN_TURN)


def test_a_mean_of_its_own_for_each_turn_is_as_good_as_solving_for_all_offsets():
    """True losses, with noise and an offset in each turn, at 75 %: the best guess without bias is least squares.

    Solving would gain 0.003 of rank correlation with 24 patches and 0.0005 with 196; at ratios below 50 % it loses,
    for turns share few hidden patches there.
    """
    true = random(500, 24).exp()
    mask = hpm.hide_in_turn(uniform(1, 24), 18)  # the same turns for all
    G, of_patch = mask.shape[1], np.eye(24)[mask[0].nonzero()[:, 1]]  # (G, 24), (G * n, 24)
    noise = random(500, G, 1, seed=2) + random(500, G, 18, seed=3) / 2
    predicted = torch.from_numpy(true.numpy() @ of_patch.T).unflatten(1, (G, 18)) + noise
    equations = np.hstack([of_patch, np.repeat(np.eye(G), 18, axis=0)])
    best = torch.from_numpy(np.linalg.lstsq(equations, predicted.flatten(1).T.numpy(), rcond=None)[0][:24].T)
    ours = hpm.average_in_turn(predicted, mask.expand(500, -1, -1))
    ours, best = (hpm.rank_correlation(answer, true).item() for answer in (ours, best))
    assert best > 0.9
    assert ours > best - 0.01, f"{ours:.4f}, where {best:.4f} is possible"


# ---------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------


def targets_of(model, images, target):
    """𝒯 of every patch, by loops: (B, N, outputs), as lists."""
    patches = [oracles.patchify_loops(image, 2) for image in images.numpy()]
    if target == "hog":
        return [oracles.hog_loops(image, 2) for image in images.numpy()]
    if target == "norm-pixels":
        return [[oracles.normalise_loops(list(patch))[0] for patch in image] for image in patches]
    return patches


@pytest.mark.equation("HPM total")
@pytest.mark.exercise("HPM.forward")
@pytest.mark.parametrize(
    ("target", "metric", "predictor", "batch", "channels"),
    [
        ("pixels", "l2", "relative", 3, 2),
        ("norm-pixels", "smooth-l1", "absolute", 2, 1),
        ("pixels", "cosine", "relative", 1, 1),
        ("hog", "cross-entropy", "absolute", 1, 2),
    ],
)
def test_a_step_is_the_equations_put_together(target, metric, predictor, batch, channels):
    """L̂ᵗ by the teacher on the whole image; the mask from it; L_rec on hidden patches; L_pred; L = L_rec + L_pred."""
    model = small(target, channels, metric=metric, predictor=predictor)
    images, noise, teacher = images_of(model, batch), uniform(batch, 24, seed=3), model.teacher
    out = model(images, noise, 0.5)
    for b in range(batch):
        _, oracle = oracles.student_loops(teacher, images[b].numpy(), range(24), [])
        equal(out["teacher_loss"][b], oracle, "what the teacher predicts for whole images", atol=1e-8)
        mask = oracles.hard_mask_loops(out["teacher_loss"][b].tolist(), noise[b].tolist(), 0.75, 0.5)
        assert out["mask"][b].tolist() == mask, "not the hard mask of what the teacher predicted, and of this noise"
    assert not out["teacher_loss"].requires_grad, "the teacher learns nothing from this"

    losses, targets = np.zeros((batch, 18)), targets_of(model, images, target)
    for b, row in enumerate(out["mask"].tolist()):
        hidden, visible = [i for i in range(24) if row[i]], [i for i in range(24) if not row[i]]
        assert out["hidden"][b].tolist() == hidden, "True in the mask is hidden; the indices in order"
        assert out["visible"][b].tolist() == visible, "False is visible"
        prediction, predicted_loss = oracles.student_loops(model.student, images[b].numpy(), visible, hidden)
        equal(out["prediction"][b], prediction, "the student's, of the hidden patches", atol=1e-8)
        equal(out["predicted_loss"][b], predicted_loss, "the student's, of the hidden patches", atol=1e-8)
        for k, i in enumerate(hidden):
            losses[b, k] = oracles.metric_loops(list(prediction[k]), list(targets[b][i]), metric)
    assert out["patch_loss"].detach().numpy() == pytest.approx(losses, rel=FLOAT32), f"{metric} of hidden {target}"
    rec = losses.mean()
    assert out["rec"].item() == pytest.approx(rec, rel=FLOAT32), "L_rec: the mean over hidden patches"
    pred, _ = LOOPS[predictor](out["predicted_loss"].detach().numpy(), losses)
    assert out["pred"].item() == pytest.approx(pred, rel=FLOAT32), f"L_pred, {predictor}: of the student's own losses"
    assert out["loss"].item() == pytest.approx(rec + pred, rel=FLOAT32), "L = L_rec + L_pred"
    oracle = [scipy.stats.spearmanr(*v).statistic for v in zip(out["predicted_loss"].tolist(), losses, strict=True)]
    assert out["correlation"].item() == pytest.approx(sum(oracle) / batch, abs=FLOAT32)


@pytest.mark.equation("HPM total")
@pytest.mark.exercise("HPM.forward")
def test_a_step_answers_with_everything_by_name():
    model = small()
    out = model(images_of(model), uniform(3, 24))  # without guidance, unless asked for
    scalars, names = (
        dict.fromkeys(("loss", "rec", "pred", "correlation"), ()),
        ("patch_loss", "predicted_loss", "hidden"),
    )
    shapes = scalars | dict.fromkeys(names, (3, 18)) | dict(visible=(3, 6), prediction=(3, 18, 8))
    shapes |= dict(mask=(3, 24), teacher_loss=(3, 24))
    assert {name: tuple(out[name].shape) for name in shapes} == shapes
    assert out["mask"].tolist() == [oracles.random_mask_loops(row, 0.75) for row in uniform(3, 24).tolist()], (
        "hard_fraction is 0 by default: a random mask"
    )


@pytest.mark.equation("HPM total")
@pytest.mark.exercise("HPM.forward")
def test_only_hidden_patches_have_a_loss():
    """A million in the target of every visible patch changes nothing, nor the gradient."""
    model = small()
    images, noise, results, targets = images_of(model), uniform(3, 24), [], model.targets
    for garbage in (0.0, 1e6):
        mask = model(images, noise, 0.5)["mask"]
        model.targets = lambda *args, m=mask, g=garbage: torch.where(m[..., None], targets(*args), g)
        out = model(images, noise, 0.5)
        assert out["prediction"].shape == (3, 18, 8), "the decoder answers for hidden patches alone"
        gradient = torch.autograd.grad(out["loss"], model.student.decoder.pred.weight)[0]
        results.append((out["loss"], out["pred"], gradient))
    for what, a, b in zip(("loss", "pred", "gradient"), *results, strict=True):
        assert torch.equal(a, b), f"the {what} depends on the target of visible patches"


@pytest.mark.equation("HPM total")
@pytest.mark.exercise("HPM.forward")
@pytest.mark.parametrize("predictor", ["relative", "absolute"])
def test_the_predictors_loss_does_not_train_the_reconstruction(predictor):
    """L_rec is L_pred's target; the encoder learns from both."""
    model = small(predictor=predictor)
    pred, student = model(images_of(model), uniform(3, 24), 0.5)["pred"], model.student
    assert pred.requires_grad, "L_pred is cut off from the loss predictor's gradient"
    pred.backward()
    assert all(p.grad is None or not p.grad.any() for p in student.decoder.parameters()), "L_pred changes the decoder"
    for part in (student.loss_predictor, student.encoder, student.decoder_embed):
        parameters = [p for p in part.parameters() if p.requires_grad and p.numel() > 1]
        assert all(p.grad is not None and p.grad.any() for p in parameters), "L_pred trains predictor and encoder"


@pytest.mark.equation("HPM total")
@pytest.mark.exercise("HPM.forward")
def test_a_masked_autoencoder_is_hpm_without_its_predictor():
    """No loss predictor, no teacher, and from the same weights and noise the same reconstruction."""
    full, mae = small(mask="random"), small(mask="random", predictor="none")
    assert mae.teacher is None
    assert mae.student.loss_predictor is None
    mae.student.load_state_dict({n: v for n, v in full.student.state_dict().items() if "loss_predictor" not in n})
    images = images_of(full)
    ours, theirs = (model(images, uniform(3, 24), 0.0) for model in (mae, full))
    assert torch.equal(ours["mask"], theirs["mask"])
    assert ours["rec"].item() == pytest.approx(theirs["rec"].item(), rel=FLOAT32)
    assert torch.equal(ours["loss"], ours["rec"])
    assert "pred" not in ours
    assert "correlation" not in ours
    assert ours.get("predicted_loss") is None
    assert ours.get("teacher_loss") is None
    assert theirs["loss"] > theirs["rec"]


@pytest.mark.equation("HPM total")
@pytest.mark.exercise("HPM.forward")
@pytest.mark.parametrize("mask", KINDS)
@pytest.mark.parametrize("ratio", [0.75, 0.4])
def test_the_mask_option_picks_its_mask(mask, ratio):
    """From the noise, at the ratio of the model: blocks need five numbers a patch, all others one."""
    model = small(mask=mask, mask_ratio=ratio)
    assert model.noise_columns == (5 if mask == "block" else 1)
    noise = noise_for(model, seed=7)
    out = model(images_of(model), noise, 1.0)
    for b, row in enumerate(noise.tolist()):
        oracle = {
            "random": lambda row=row: oracles.random_mask_loops(row, ratio),
            "block": lambda row=row: oracles.block_mask_loops(row, (4, 6), ratio),
            "grid": lambda row=row: oracles.grid_mask_loops(row, (4, 6), ratio),
            "hard": lambda row=row, b=b: oracles.hard_mask_loops(out["teacher_loss"][b].tolist(), row, ratio, 1.0),
        }[mask]()
        assert out["mask"][b].tolist() == oracle, (
            f"not the {mask} mask of this noise: {picture(out['mask'][b], (4, 6))}"
        )
    hidden = oracles.count_hidden_loops(24, ratio)
    assert (out["hidden"].shape, out["visible"].shape) == ((3, hidden), (3, 24 - hidden))


@pytest.mark.equation("HPM total")
@pytest.mark.exercise("HPM.forward")
@pytest.mark.parametrize("kind", ["hard", "random"])
def test_a_given_mask_is_used_in_place_of_a_drawn_one(kind):
    """For evaluation: the same random masks for every run. No noise is needed then."""
    model, mask = small(mask=kind), split(small())[0]
    images = images_of(model)
    for noise in (noise_for(model), None):
        out = model(images, noise, 0.5, mask=mask)
        assert torch.equal(out["mask"], mask), "the mask that was given is not the one that was used"
    assert out["hidden"].tolist() == split(small())[2].tolist(), "the hidden patches are not those of the given mask"
    assert (out.get("teacher_loss") is not None) == (kind == "hard")


@pytest.mark.equation("HPM total")
@pytest.mark.exercise("HPM.forward")
def test_a_step_hands_the_teachers_features_to_its_target():
    """Not the student's, which are others."""
    model = small("ema")
    images = images_of(model)
    out = model(images, uniform(3, 24), 0.5)
    for b in range(3):
        features = oracles.encoder_loops(model.teacher.encoder, images[b].numpy())[1:]
        for k, i in enumerate(out["hidden"][b].tolist()):
            loss = oracles.metric_loops(out["prediction"][b, k].tolist(), list(features[i]), "cosine")
            what = "the target ema is f_θt(x), the teacher's features of the patch"
            assert out["patch_loss"][b, k].item() == pytest.approx(loss, rel=FLOAT32), what


@pytest.mark.parametrize("more", [-1, 1, 6])
def test_a_given_mask_that_hides_another_number_is_refused(more):
    """In one row is enough: a patch too many would be taken for visible, one too few for hidden, in silence."""
    model, mask = small(), split(small())[0]
    mask[1] = hpm.hide_largest(uniform(1, 24), 18 + more)
    with pytest.raises(ValueError, match=rf"^the mask hides \[.*{18 + more}.*\] patches in a row; hide 18 \(True\) in"):
        model(images_of(model), None, mask=mask)


@pytest.mark.parametrize(
    ("mask", "shape", "wanted"),
    [
        ("hard", (2, 24), r"\(3, 24\)"),
        ("random", (3, 23), r"\(3, 24\)"),
        ("grid", (3, 24, 1), r"\(3, 24\)"),
        ("random", (3, 24, 5), r"\(3, 24\)"),
        ("block", (3, 24), r"\(3, 24, 5\)"),
        ("block", (3, 24, 4), r"\(3, 24, 5\)"),
    ],
)
def test_noise_of_another_shape_is_refused(mask, shape, wanted):
    """Noise for fewer images would leave the others out in silence."""
    model = small(mask=mask)
    with pytest.raises(
        ValueError, match=rf"noise has the shape \({', '.join(map(str, shape))}\); {mask} masks .*{wanted}"
    ):
        model(images_of(model), uniform(*shape))


def noise_in_turn(batch=3):
    """The noise of a step in turn: its first column is the mask's, its last splits the patches."""
    return uniform(batch, 24, 2, seed=3)


@pytest.mark.equation("HPM in turn")
@pytest.mark.exercise("HPM.forward")
@pytest.mark.parametrize("ratio", [0.75, 0.4])
def test_in_turn_the_teacher_predicts_hidden_patches_alone(ratio):
    """By loops, turn after turn, each patch the mean of its turns; and the hard mask of that, from the noise."""
    model, noise = small(teacher="in-turn", mask_ratio=ratio), noise_in_turn(2)
    assert model.noise_columns == 2
    images = images_of(model, 2)
    out = model(images, noise, 0.5)
    for b, (of_mask, of_split) in enumerate(zip(noise[..., 0].tolist(), noise[..., 1].tolist(), strict=True)):
        turns = []
        for visible in oracles.shown_in_turn_loops(of_split, model.hidden):
            hidden = [i for i in range(24) if i not in visible]
            _, predicted = oracles.student_loops(model.teacher, images[b].numpy(), visible, hidden)
            turns.append(dict(zip(hidden, predicted, strict=True)))
        oracle = oracles.average_in_turn_loops(turns, 24)
        equal(out["teacher_loss"][b], oracle, "each patch predicted while it is hidden", atol=1e-8)
        mask = oracles.hard_mask_loops(out["teacher_loss"][b].tolist(), of_mask, ratio, 0.5)
        assert out["mask"][b].tolist() == mask, "not the hard mask of this prediction, and of the noise's first column"
    assert not out["teacher_loss"].requires_grad


@pytest.mark.equation("HPM in turn")
def test_in_turn_no_patch_has_a_say_in_its_own_prediction():
    """NaN in its pixels reaches the predictions of others, never its own; whole, it would reach all."""
    model = small(teacher="in-turn")
    images, noise = images_of(model, 1), noise_in_turn(1)
    before, _ = model.ask_teacher(images, noise)
    for patch in (0, 7, 23):
        patches = vit.patchify(images, 2)
        patches[:, patch] = math.nan
        after, _ = model.ask_teacher(vit.unpatchify(patches, 2, (4, 6)), noise)
        assert after[0, patch] == before[0, patch]
        assert after.isnan().any()
        assert small().teacher.predict_loss(vit.unpatchify(patches, 2, (4, 6)))[0].isnan().all()


@pytest.mark.equation("HPM in turn")
def test_in_turn_the_features_are_those_of_the_whole_image():
    """The target ema is f_θt(x) however the teacher is asked; where it is not the target, nobody computes it."""
    model = small("ema", teacher="in-turn")
    images = images_of(model)
    features = model.teacher.predict_loss(images)[1]
    assert torch.equal(model.ask_teacher(images, noise_in_turn())[1], features)
    out = model(images, noise_in_turn(), 0.5)
    target = vit.gather(features, out["hidden"])
    equal(out["patch_loss"], hpm.reconstruction_loss(out["prediction"], target, "cosine"), atol=FLOAT32)
    assert small(teacher="in-turn").ask_teacher(images, noise_in_turn())[1] is None


def test_in_turn_every_image_has_a_split_of_its_own():
    """So a part of a batch, as a process or a micro-batch has it, gets what it would get in all of it."""
    model, noise = small(teacher="in-turn"), noise_in_turn()
    images = images_of(model)
    all_of_it, _ = model.ask_teacher(images, noise)
    for b in range(3):
        equal(model.ask_teacher(images[b : b + 1], noise[b : b + 1])[0], all_of_it[b : b + 1])
    other = noise.clone()
    other[..., 0] = uniform(3, 24, seed=8)
    assert torch.equal(model.ask_teacher(images, other)[0], all_of_it), "the mask's noise splits nothing"


def test_in_turn_a_given_mask_needs_no_noise():
    """For evaluation; then nobody asks, but for the target's features."""
    for target in ("pixels", "ema"):
        model, mask = small(target, teacher="in-turn"), split(small())[0]
        whole = small(target)(images_of(model), None, mask=mask)
        out = model(images_of(model), None, mask=mask)
        assert out["teacher_loss"] is None
        assert torch.equal(out["loss"], whole["loss"])
        with_noise = model(images_of(model), noise_in_turn(), mask=mask)
        assert torch.equal(with_noise["mask"], mask)
        assert with_noise["teacher_loss"].shape == (3, 24)


@pytest.mark.parametrize("shape", [(3, 24), (3, 24, 1), (3, 24, 3), (2, 24, 2), (3, 23, 2)])
def test_in_turn_noise_of_another_shape_is_refused(shape):
    model, mask = small(teacher="in-turn"), split(small())[0]
    for given in (None, mask):
        with pytest.raises(ValueError, match=r"^noise has the shape .*; hard masks need \(3, 24, 2\) here$"):
            model(images_of(model), uniform(*shape), mask=given)


@pytest.mark.parametrize("mask", ["random", "block", "grid"])
def test_a_teacher_that_nobody_asks_is_not_asked_in_turn(mask):
    """The option would do nothing; for its features (ema) a teacher is shown the whole image."""
    for target in ("pixels", "ema"):
        with pytest.raises(ValueError, match=rf"^{mask} masks ask no teacher: use teacher whole, or mask hard"):
            small(target, mask=mask, teacher="in-turn")


def frozen_for(target, channels=2):
    """A ViT to take features from: without a head as DINO, with a projection to 10 numbers as CLIP."""
    if target not in ("dino", "clip"):
        return None
    model = vit.create("vit_tiny2", (8, 12), 10 if target == "clip" else 0, channels)
    return filled(model, seed=5).requires_grad_(False)


WIDTHS = {"pixels": 8, "norm-pixels": 8, "hog": 18, "ema": 12, "dino": 12, "clip": 10}


@pytest.mark.equation("HPM targets")
@pytest.mark.exercise("HPM.targets")
@pytest.mark.parametrize("batch", [3, 1])
@pytest.mark.parametrize("target", WIDTHS)
def test_each_target_is_what_its_name_says(target, batch):
    """P·P·C pixels, C·9 bins, the encoder's or the frozen model's width; the class token is no patch."""
    model = small(target, frozen=frozen_for(target))
    images = images_of(model, batch)
    _, features = model.teacher.predict_loss(images)
    targets = model.targets(images, features)
    assert isinstance(targets, torch.Tensor), f"the target {target} is a {type(targets).__name__}, not a tensor"
    shape = batch, 24, WIDTHS[target]
    assert targets.shape == shape, f"the target {target} is {tuple(targets.shape)}: {shape}, all patches, is due"
    assert not targets.requires_grad, "nothing learns from the target"
    if target in ("pixels", "norm-pixels", "hog"):
        oracle = np.array(targets_of(model, images, target))
    else:
        source = model.teacher.encoder if target == "ema" else model.frozen
        oracle = oracles.each(lambda image: oracles.encoder_loops(source, image)[1:], images)
    if target == "clip":
        head = [p.numpy() for p in model.frozen.head.parameters()]
        oracle = np.stack([oracles.linear_loops(image, *head) for image in oracle])
    equal(targets, oracle, f"the target {target}", atol=1e-6)


@pytest.mark.equation("HPM targets", "HPM metrics")
@pytest.mark.parametrize("target", WIDTHS)
def test_features_are_compared_as_unit_vectors_all_else_by_squares(target):
    """The default metric; and a step hands the teacher's features on to the targets."""
    model = small(target, frozen=frozen_for(target))
    out, images = model(images_of(model), uniform(3, 24), 0.5), images_of(model)
    assert out["prediction"].shape == (3, 18, WIDTHS[target])
    targets = model.targets(images, model.teacher.predict_loss(images)[1])
    metric = "cosine" if target in ("ema", "dino", "clip") else "l2"
    for b, k in np.ndindex(3, 18):
        pair = out["prediction"][b, k].tolist(), targets[b, out["hidden"][b, k]].tolist()
        assert out["patch_loss"][b, k].item() == pytest.approx(oracles.metric_loops(*pair, metric), rel=FLOAT32)


def test_a_frozen_model_may_have_no_class_token():
    """It is the frozen model's own that is left out, not the student's."""
    frozen = vit.ViT((8, 12), 2, 2, 0, 12, 1, 2, class_token=False, pool="mean")
    model = small("dino", frozen=filled(frozen).requires_grad_(False))
    images = images_of(model)
    equal(model.targets(images), model.frozen.encode(images).numpy())


@pytest.mark.parametrize("target", WIDTHS)
def test_nothing_learns_from_the_teachers_answer_or_the_target(target):
    """Even if someone asks for the gradient of the images."""
    model = small(target, frozen=frozen_for(target))
    images = images_of(model).requires_grad_()
    predicted_loss, features = model.ask_teacher(images)
    assert not predicted_loss.requires_grad
    assert not model.targets(images, features).requires_grad


def test_the_names_stand_once():
    """Each list is what a command line offers and what `create` accepts."""
    assert hpm.MASKS == {"random": 1, "block": 5, "grid": 1, "hard": 1}
    assert hpm.TARGETS == ("pixels", "norm-pixels", "hog", "ema", "dino", "clip")
    assert (hpm.FEATURE_TARGETS, hpm.FROZEN_TARGETS) == (("ema", "dino", "clip"), ("dino", "clip"))
    assert hpm.METRICS == ("l2", "smooth-l1", "cosine", "cross-entropy")
    assert hpm.PREDICTORS == ("relative", "absolute", "none")
    assert hpm.TEACHERS == ("whole", "in-turn")


@pytest.mark.parametrize(("target", "metric"), [("pixels", "l2"), ("ema", "cosine"), ("clip", "cross-entropy")])
def test_losses_are_taken_in_float32_under_autocast(target, metric):
    """The decoders, and the head of a frozen model, answer in bfloat16, which has two or three digits."""
    model = small(target, metric=metric, frozen=frozen_for(target)).float()
    images, noise = images_of(model).float(), uniform(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, noise, 0.5)
        features = model.teacher.predict_loss(images)[1]
        targets = vit.gather(model.targets(images, features), out["hidden"])
    assert out["prediction"].dtype == torch.bfloat16
    assert {out[name].dtype for name in ("patch_loss", "rec", "pred", "loss")} == {torch.float32}
    loss = hpm.reconstruction_loss(out["prediction"].double(), targets.double(), model.metric)
    equal(out["patch_loss"], loss.detach().numpy(), atol=FLOAT32 * loss.max().item())
    pred, _ = oracles.relative_loops(
        out["predicted_loss"].detach().double().numpy(), out["patch_loss"].detach().numpy()
    )
    assert out["pred"].item() == pytest.approx(pred, rel=FLOAT32)


@pytest.mark.parametrize("teacher", hpm.TEACHERS)
def test_predicted_losses_are_told_apart_under_autocast(teacher):
    """They only rank, and bfloat16 has 256 numbers between 1 and 2: of 196 predictions, more than half were ties.

    So the last layer is computed in float32; here of an untrained model, with an offset as training gives it.
    """
    torch.manual_seed(0)
    model = hpm.create("vit_micro4", 56, 1, teacher=teacher)
    for part in (model.student, model.teacher):
        part.loss_predictor.pred.bias.data.fill_(1.0)
    images = random(1, 1, 56, 56).float()
    noise = uniform(1, 196, 2)[..., : model.noise_columns].squeeze(-1)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, noise, 0.5)
    for name, count in (("teacher_loss", 196), ("predicted_loss", 147)):
        assert out[name].dtype == torch.float32, f"{name} is {out[name].dtype}"
        distinct = [len(set(row)) for row in out[name].tolist()]
        assert min(distinct) >= count - 2, f"{name}: {distinct} distinct values of {count}"
    assert out["correlation"].dtype == torch.float32


CASES = [("hard", target, "relative", "whole") for target in WIDTHS] + [("hard", "pixels", "absolute", "whole")]
CASES += [("hard", target, "relative", "in-turn") for target in ("pixels", "ema")]


@pytest.mark.parametrize(
    ("mask", "target", "predictor", "teacher"), CASES + [(m, "pixels", "none", "whole") for m in KINDS[:3]]
)
def test_a_step_never_waits_for_the_device(mask, target, predictor, teacher, waits):
    """No value is read on the way: the host runs ahead, and the accelerator is never idle."""
    model = small(target, mask=mask, predictor=predictor, teacher=teacher, frozen=frozen_for(target))
    images, noise, given = images_of(model), noise_for(model), split(model)[0]
    with waits() as seen:
        model(images, noise, 0.5)["loss"].backward()
        model(images, None, mask=given)
        if model.teacher is not None:
            hpm.ema_update(model.teacher, model.student, 0.9)
    assert seen.reads == seen.copies == []


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_made_on_the_device(kind, waits):
    """A copy from the host's memory would make the host wait. (meta: a device without numbers.)"""
    with waits() as seen, torch.device("meta"):
        noise = torch.empty(2, 24, 5)
    with seen:
        assert mask_of(kind, noise, (4, 6), 0.75, predicted=noise[..., 0]).device.type == "meta"
    assert seen.reads == seen.copies == []


@pytest.mark.parametrize("ratio", [0.75, 0.4])
def test_turns_are_made_on_the_device(ratio, waits):
    with waits() as seen, torch.device("meta"):
        noise = torch.empty(2, 24)
    with seen:
        mask = hpm.hide_in_turn(noise, hpm.count_hidden(24, ratio))
        average = hpm.average_in_turn(mask[..., : hpm.count_hidden(24, ratio)].float(), mask)
    assert {mask.device.type, average.device.type} == {"meta"}
    assert seen.reads == seen.copies == []


def test_hog_is_made_on_the_device():
    assert hpm.hog(torch.empty(1, 2, 8, 8, device="meta"), 4).device.type == "meta"


# ---------------------------------------------------------------------------------------------
# create
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(target="pixel"), "^unknown target 'pixel'; there are pixels, norm-pixels, hog, ema, dino, clip$"),
        (dict(predictor="rank"), "^unknown predictor 'rank'; there are relative, absolute, none$"),
        (dict(mask="hardest"), "^unknown mask 'hardest'; there are random, block, grid, hard$"),
        (dict(metric="l1"), "^unknown metric 'l1'; there are l2, smooth-l1, cosine, cross-entropy$"),
        (dict(teacher="in turn"), "^unknown teacher 'in turn'; there are whole, in-turn$"),
        (dict(predictor="none"), "^hard masks need a loss predictor: use .*, or another mask$"),
        (dict(predictor="none", mask="hard"), "hard masks need a loss predictor"),
        (dict(target="dino"), "^the target dino needs a frozen model: give its weights$"),
        (dict(target="clip"), "^the target clip needs a frozen model: give its weights$"),
        (dict(mask_ratio=0.99), "hides 24 of 24"),
        (dict(arch="r50_vit_b16"), "^r50_vit_b16 has convolutions, .*hidden patches; use a plain ViT, as vit_b16$"),
        (dict(arch="vit_tini2"), "^unknown arch 'vit_tini2'; did you mean vit_tiny2"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hpm.create(**dict(arch="vit_tiny2", img_size=(8, 12), in_chans=1, decoder=(8, 1, 2)) | options)


@pytest.mark.parametrize("arch", ["r50_vit_b16", "r_vit_ti16", "resnet50", "resnet101x2"])
def test_convolutions_are_refused_for_what_they_see(arch):
    """Their windows reach into patches that are hidden, or corrupted in masked patch prediction; no misspelt name."""
    assert arch in resnet.ARCHS
    with pytest.raises(ValueError, match=f"^{arch} has convolutions, which would see hidden patches; use a plain ViT"):
        hpm.create(arch)
    with pytest.raises(ValueError, match=f"^{arch} has convolutions, which would see corrupted patches; use a plain"):
        mpp.create(arch, 224, (0.5,), (0.5,))


def test_a_frozen_model_with_another_grid_is_refused():
    """Its patches are other patches. 8 x 8 of them, picked by the indices of a 4 x 4 grid, would raise nothing."""
    finer = vit.ViT(img_size=8, patch_size=1, dim=12, depth=1, num_heads=2, num_classes=0)
    with pytest.raises(
        ValueError, match=r"^the frozen model's grid is \(8, 8\), the student's \(4, 4\); make them equal$"
    ):
        hpm.create("vit_tiny2", 8, 3, target="dino", frozen=finer)


def test_a_frozen_model_that_is_not_the_target_changes_nothing():
    model = small(frozen=frozen_for("dino"))
    assert model(images_of(model), uniform(3, 24), 0.5)["prediction"].shape == (3, 18, 8)


def test_options_of_create_reach_the_model():
    options = dict(mask="block", mask_ratio=0.4, metric="smooth-l1", decoder=(8, 1, 2))
    model = hpm.create("vit_tiny2", (8, 12), 1, "hog", "absolute", **options)
    assert (model.mask, model.mask_ratio, model.target, model.metric, model.predictor) == (
        "block", 0.4, "hog", "smooth-l1", "absolute",
    )  # fmt: skip
    assert (model.hidden, model.noise_columns, model.teacher) == (10, 5, None)
    assert model.student.encoder.patch_embed.proj.in_channels == 1
    assert isinstance(model.student.encoder.head, torch.nn.Identity)
    exact = {block.mlp.gelu for block in vit.create("vit_tiny2", 8).blocks}
    assert {block.mlp.gelu for block in model.student.encoder.blocks} == exact
    tanh = hpm.create("vit_tiny2", 8, gelu="tanh", decoder=(8, 1, 2)).student
    assert {block.mlp.gelu for block in tanh.encoder.blocks} == {"tanh"}
    assert {block.mlp.gelu for block in tanh.decoder.blocks} == exact


def test_the_defaults_are_the_papers():
    """75 % of the pixels of 224 x 224 RGB images, hard masks, the relative loss."""
    with torch.device("meta"):
        model = hpm.create("vit_ti16")
    assert (model.mask, model.mask_ratio, model.target, model.metric, model.predictor) == (
        "hard", 0.75, "pixels", "l2", "relative",
    )  # fmt: skip
    assert (model.student.encoder.img_size, model.hidden) == ((224, 224), 147)
    assert (model.student.decoder.pred.out_features, model.student.loss_predictor.pred.out_features) == (768, 1)


def test_a_student_alone_makes_the_papers_hpm():
    """`HPM(student)` has the same defaults as `create`."""
    model = small()
    alone, images = hpm.HPM(model.student), images_of(model)
    alone.teacher.load_state_dict(model.teacher.state_dict())
    ours, theirs = (m(images, uniform(3, 24), 0.5) for m in (alone, model))
    assert torch.equal(ours["mask"], theirs["mask"])
    assert torch.equal(ours["loss"], theirs["loss"])
    assert not any(p.requires_grad for p in alone.teacher.parameters())


@pytest.mark.parametrize(
    ("mask", "target", "exists"),
    [("hard", "pixels", True), ("random", "ema", True), ("random", "pixels", False), ("random", "dino", False)],
)
def test_there_is_a_teacher_if_something_asks_for_it(mask, target, exists):
    assert (small(target, mask=mask, frozen=frozen_for(target)).teacher is not None) == exists


def test_features_of_a_teacher_need_no_loss_predictor():
    """MAE with the EMA teacher's features as its target."""
    model = small("ema", mask="random", predictor="none")
    out = model(images_of(model), uniform(3, 24))
    assert out["teacher_loss"] is None
    assert torch.equal(out["loss"], out["rec"])


@pytest.mark.parametrize(
    ("arch", "size"),
    [
        ("vit_micro4", (64, 2, 4)),
        ("vit_ti16", (128, 4, 4)),
        ("vit_s16", (256, 4, 8)),
        ("vit_b16", (512, 8, 16)),
        ("vit_h14", (512, 8, 16)),
    ],
)
def test_decoders_have_the_papers_size(arch, size):
    """MAE's and both of HPM's: width 512, 8 blocks, 16 heads from ViT-B on; ours are smaller for smaller encoders.

    (meta: shapes without numbers.)
    """
    with torch.device("meta"):
        student = hpm.create(arch, 28 if arch == "vit_micro4" else 224).student
    for decoder in (student.decoder, student.loss_predictor):
        blocks = {
            (block.attn.qkv.in_features, block.attn.num_heads, block.mlp.fc1.out_features) for block in decoder.blocks
        }
        assert (len(decoder.blocks), blocks) == (size[1], {(size[0], size[2], 4 * size[0])})
    P = student.encoder.patch_size
    assert (student.decoder.pred.out_features, student.loss_predictor.pred.out_features) == (3 * P * P, 1)


# ---------------------------------------------------------------------------------------------
# All of it, trained
# ---------------------------------------------------------------------------------------------


def squares(n, *key):
    """Images of 28 x 28 pixels: a rectangle of noise, which nobody can reconstruct, somewhere on an even grey."""
    numbers = data.generator(*key)
    noise, grey = torch.randn(n, 1, 28, 28, generator=numbers), torch.rand(n, 1, 1, 1, generator=numbers) - 0.5
    centre, half = 6 + 16 * torch.rand(n, 2, 1, generator=numbers), 6 + 6 * torch.rand(n, 2, 1, generator=numbers)
    inside = (torch.arange(28) - centre).abs() < half  # (n, 2, 28): by row, by column
    return torch.where((inside[:, 0, :, None] & inside[:, 1, None, :])[:, None], noise, grey)


def images_by_name(name, steps):
    """Training batches of 8 images, and 128 held-out images."""
    if name == "squares":
        return (squares(8, 0, step) for step in range(steps)), squares(128, 1)
    folder = Path(os.environ.get("VIT_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / "fashion-mnist").is_dir():
        pytest.skip("Fashion-MNIST is not here; VIT_DATA can name the folder that has it")
    dataset = data.load(name, data_dir=folder)
    batches = dataset.train.train_batches((28, 28), 8, range(steps), 0, None, "cpu")
    return (images for images, _ in batches), next(dataset.test.test_batches((28, 28), 128, "cpu"))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["squares", "fashion-mnist"])
def test_hpm_learns_to_reconstruct_and_which_patches_are_hard(name):
    """500 steps from easy to hard; then, on held-out images, the true loss of a patch is its mean over 20 masks.

    Measured with three seeds. Squares: loss 0.9 -> 0.44, rank correlation of student 0.58 to 0.60, teacher 0.55 to
    0.61, hard masks (α = 0.5) 11 to 12 % above random ones, true losses in place of predicted ones would give 24 %.
    Fashion-MNIST: 1.5 -> 0.5, student 0.57 to 0.61; the teacher's is -0.15 to 0.34 after so few steps, because
    it is trained on masked images and used on whole ones, so nothing is asked of it there.
    """
    steps, losses = 500, []
    batches, held_out = images_by_name(name, steps)
    torch.manual_seed(0)
    model = hpm.create("vit_micro4", 28, 1)
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=2e-3, betas=(0.9, 0.95))
    for step, images in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20)
        noise = torch.rand(8, 49, generator=data.generator(0, data.MASK, step))
        out = model(images, noise, hpm.hard_fraction(step, steps))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        hpm.ema_update(model.teacher, model.student, 0.99)
        losses.append(out["rec"].item())
    first, last = sum(losses[:10]) / 10, sum(losses[-50:]) / 50
    assert last < 0.7 * first, f"the reconstruction loss fell from {first:.3f} to {last:.3f} only"

    total, count, correlations = torch.zeros(128, 49), torch.zeros(128, 49), []
    for i in range(20):
        with torch.no_grad():
            out = model(held_out, uniform(128, 49, seed=i))  # a share of 0: random masks
        total.scatter_add_(1, out["hidden"], out["patch_loss"])
        count.scatter_add_(1, out["hidden"], torch.ones_like(out["patch_loss"]))
        correlations.append(out["correlation"].item())
    student = sum(correlations) / 20
    assert student > 0.35, f"held-out rank correlation {student:.2f} of predicted and true loss"
    if name == "squares":
        true, predicted = total / count, out["teacher_loss"]
        teacher = hpm.rank_correlation(predicted, true).item()
        assert teacher > 0.3, f"held-out rank correlation {teacher:.2f} of the teacher's prediction for whole images"
        loss = [true[hpm.hard_mask(predicted, uniform(128, 49), 0.75, share)].mean().item() for share in (0.0, 0.5)]
        assert loss[1] > 1.05 * loss[0], f"hard masks hide a loss of {loss[1]:.3f}, random ones of {loss[0]:.3f}"
