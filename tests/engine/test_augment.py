"""What engine/augment.py promises: each augmentation as its paper defines it, at the numbers that it is handed.

Each `..._loops` function is an oracle: one pixel at a time, from the definition alone. To rewrite a function until its
tests pass is an exercise. Where float64 goes in, code and oracle may differ by rounding, far below the 1e-10 allowed;
where float32 does, the test says what that allows.
"""

import math
import random

import numpy as np
import pytest
import scipy.stats
import torch

import data
from engine import augment
from tests.engine.pictures import JUST_BELOW_1, pixels, uniform
from tests.oracles import equal

# ---------------------------------------------------------------------------------------------
# Crops and flips
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
def test_padded_crop_shifts_with_zeros_outside_and_flips(pad):
    """By up to `pad` each way. The images are wider than high, and the padding reaches every border."""
    images, draw = pixels(150, 2, 4, 5), uniform(150, 5, dtype=torch.float32)
    places = [[math.floor(v * (2 * pad + 1)) for v in row] for row in draw[:, 1:3].tolist()]
    flips = [v < 0.5 for v in draw[:, 0].tolist()]
    everything = [
        padded_crop_loops(image, *place, flip, pad)
        for image, place, flip in zip(images.numpy(), places, flips, strict=True)
    ]
    crops = augment.padded_crop(images, draw, pad)
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
                crop = augment.padded_crop(image, torch.tensor([[third, first, second]]), 2)
                equal(crop[0], padded_crop_loops(image[0].numpy(), top, left, flip, 2), f"{first} {second} {third}")


def crop_box_loops(height, width, draw, scale, aspect=1.0):
    """The published algorithm (torchvision's `RandomResizedCrop.get_params`), one try after the other.

    aspect, w / h of the result, is 1 there: what is allowed lies around it, so that nothing is squeezed more.
    draw = top, left, ten areas, ten aspects -> top, left, h, w.
    """
    low, high = 3 / 4 * aspect, 4 / 3 * aspect
    for area, ratio in zip(draw[2:12], draw[12:22], strict=True):
        area = height * width * (scale[0] + area * (scale[1] - scale[0]))
        ratio = math.exp(math.log(low) + ratio * (math.log(high) - math.log(low)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(draw[0] * (height - h + 1)), math.floor(draw[1] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < low:
        h = max(1, round(width / low))
    elif width / height > high:
        w = max(1, round(height * high))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("aspect", [1.0, 2.0, 0.4])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (28, 28), (30, 6), (6, 30), (1, 300), (2, 1)])
def test_crop_box_is_drawn_again_until_it_fits(height, width, aspect):
    """Ten times; then it is the middle. And it stays inside. Sides: numbers, or one for each image."""
    draw, scale = uniform(200, 22), (0.2, 1.0)
    draw[0], draw[1], draw[2] = 0, 1 - 2**-53, 0.5  # the ends
    oracle = np.array([crop_box_loops(height, width, row, scale, aspect) for row in draw.tolist()])
    for sides in ((height, width), [torch.full((200,), side) for side in (height, width)]):
        box = augment.crop_box(*sides, draw, scale, aspect)
        for name, ours, column in zip(("top", "left", "h", "w"), box, oracle.T, strict=True):
            equal(ours, column, f"{name}: aspect w / h? height before width? the first two numbers are top and left?")
    top, left, h, w = oracle.T
    assert min(top.min(), left.min()) >= 0
    assert ((top + h).max() <= height) & ((left + w).max() <= width)


@pytest.mark.parametrize(
    ("height", "width", "aspect", "mean"), [(375, 500, 1.0, 0.494), (375, 500, 2.0, None), (90, 200, 1.0, None)]
)
def test_crops_are_distributed_as_the_published_ones(height, width, aspect, mean):
    """Area, aspect, top and left of 20,000 boxes, against as many of the algorithm with numbers of its own.

    Kolmogorov and Smirnov: of two samples of one distribution the steps differ by more than 0.0195 once in a thousand.
    Sides that are cut where they do not fit have a mean area of 0.576 in place of 0.494.
    """
    n, scale, rng = 20_000, (0.2, 1.0), random.Random(0)
    draw = data.draw_crops(n, seed=0, step=0)[:, 1:]
    ours = np.stack([side.numpy() for side in augment.crop_box(height, width, draw, scale, aspect)], axis=1)
    theirs = [crop_box_loops(height, width, [rng.random() for _ in range(22)], scale, aspect) for _ in range(n)]
    areas = ours[:, 2] * ours[:, 3] / (height * width)
    if mean:
        assert areas.mean() == pytest.approx(mean, abs=0.005)  # one standard error is 0.0014
    for name, a, b in zip(("top", "left", "h", "w"), ours.T, np.array(theirs).T, strict=True):
        assert scipy.stats.ks_2samp(a, b).statistic < 0.0195, name


def test_crop_box_takes_one_image_or_many():
    """A data worker decodes one at a time: 22 numbers, no batch."""
    draw = uniform(5, 22)
    many = torch.stack(augment.crop_box(30, 40, draw, (0.2, 1.0)), dim=1)
    for row, box in zip(draw, many, strict=True):
        equal(torch.stack(augment.crop_box(30, 40, row, (0.2, 1.0))), box.numpy())


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


# A place in [-1, 1] is rounded to 2^-24 a few times, that is 1e-6 of a side of 10 pixels; bicubic interpolation of
# neighbours that differ by 255 has slopes below 1000 a pixel. So 2e-2 is ten times what float32 can be off.
FLOAT32_PIXELS = 2e-2


def test_crop_and_resize_is_bicubic_from_a_box_each():
    """Black and white pixels: bicubic overshoots, and what leaves 0-255 is cut."""
    images = pixels(4, 2, 5, 6) // 128 * 255
    boxes = [(0, 0, 5, 6), (0, 0, 5, 6), (1.25, 0.5, 3, 4.5), (2, 3.4, 3, 2.6)]
    flips, size = [False, True, False, True], (7, 9)
    pairs = zip(images.numpy(), boxes, flips, strict=True)
    oracle = np.stack([crop_and_resize_loops(image, box, flip, size) for image, box, flip in pairs])
    crops = augment.crop_and_resize(images, torch.tensor(boxes).T, torch.tensor(flips), size)
    equal(crops, oracle, "pixel centres at one half? border repeated? flipped inside the box?", FLOAT32_PIXELS)
    assert (crops.min(), crops.max()) == (0, 255)
    assert {0, 255} < set(oracle.flatten().tolist()), "the test cuts nothing"


@pytest.mark.parametrize("flip", [False, True])
def test_a_box_of_whole_pixels_is_only_cut_out(flip):
    """The whole image comes back as it is, and a box of the size that is asked for is a slice."""
    images = pixels(2, 3, 9, 12)
    for top, left, h, w in ((0, 0, 9, 12), (2, 5, 6, 4)):
        box = torch.tensor([[top, left, h, w]] * 2).T
        crops = augment.crop_and_resize(images, box, torch.tensor([flip] * 2), (h, w))
        piece = images[:, :, top : top + h, left : left + w].numpy()
        equal(crops, piece[..., ::-1] if flip else piece, atol=FLOAT32_PIXELS)


@pytest.mark.parametrize("each", [False, True])
def test_random_resized_crop_flips_by_the_first_number_below_half(each):
    """The others are the box. With sides of its own for each image, which may be less than the frame."""
    images, draw, scale, size = pixels(6, 3, 10, 14), uniform(6, 23, dtype=torch.float32), (0.3, 0.6), (5, 6)
    draw[:2, 0] = torch.tensor([0.5, 0.5 - 2**-24])
    sides = [(8 + i % 3, 14 - i) if each else (10, 14) for i in range(6)]
    oracle = [
        crop_and_resize_loops(image, crop_box_loops(*side, row[1:], scale, 6 / 5), row[0] < 0.5, size)
        for image, side, row in zip(images.numpy(), sides, draw.tolist(), strict=True)
    ]
    crops = augment.random_resized_crop(images, torch.tensor(sides).T if each else (10, 14), draw, scale, size)
    equal(crops, np.stack(oracle), "which number is the flip, which the box?", FLOAT32_PIXELS)


def test_resize_takes_the_middle_of_the_part_that_an_image_fills():
    """The largest box of the new shape: nothing is squeezed. What lies around an image in its frame, here noise, only
    counts as a neighbour of its border."""
    images, sides, size = pixels(4, 2, 9, 9), [(9, 9), (6, 9), (5, 4), (9, 3)], (6, 4)
    boxes = [(0, 1.5, 9, 6), (0, 2.5, 6, 4), (0, 1 / 3, 5, 10 / 3), (2.25, 0, 4.5, 3)]  # by hand: h / w = 3 / 2
    oracle = [crop_and_resize_loops(image, box, False, size) for image, box in zip(images.numpy(), boxes, strict=True)]
    equal(augment.resize(images, torch.tensor(sides).T, size), np.stack(oracle), atol=FLOAT32_PIXELS)
    equal(augment.resize(images[:1], (9, 9), size), oracle[0][None], "two numbers for all images", FLOAT32_PIXELS)


# ---------------------------------------------------------------------------------------------
# Erasing, mixup and CutMix
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("H", "W"), [(9, 12), (3, 40), (40, 4), (1, 7)])
def test_erase_fills_a_box_with_the_noise_that_is_drawn_again_until_it_fits(H, W):
    """As timm does it: 2 to 33 % of the area, h / w from 0.3 to 1 / 0.3, both sides shorter than the image's.

    The first number decides. In images of one row nothing fits, and nothing is erased.
    """
    images, noise, draw = uniform(300, 2, H, W), uniform(300, 2, H, W, seed=2), uniform(300, 23, seed=3)
    draw[:2] = draw[2]
    draw[0, 0], draw[1, 0] = 0.5, 0.5 - 2**-24
    oracle, again = images.numpy().copy(), 0
    for b, row in enumerate(draw.tolist()):
        for k, (area, ratio) in enumerate(zip(row[3:13], row[13:23], strict=True)):
            area, ratio = H * W * (0.02 + area * (1 / 3 - 0.02)), 0.3 * (1 / 0.3 / 0.3) ** ratio
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h < H and 0 < w < W:
                top, left = math.floor(row[1] * (H - h + 1)), math.floor(row[2] * (W - w + 1))
                if row[0] < 0.5:
                    oracle[b, :, top : top + h, left : left + w] = noise[b, :, top : top + h, left : left + w]
                again += k > 0
                break
    equal(augment.erase(images, draw, noise, 0.5), oracle, "exactly 0.5 is no longer below a probability of 0.5")
    assert (oracle[0] == images[0].numpy()).all()
    assert (oracle[1] != images[1].numpy()).any() == (H > 1)
    assert again > 0 or H == 1, "the test draws no box again"


def test_erase_keeps_the_images_data_type():
    images = uniform(4, 1, 6, 6).bfloat16()
    erased = augment.erase(images, uniform(4, 23), uniform(4, 1, 6, 6, seed=2), 1.0)
    assert erased.dtype == torch.bfloat16
    assert (erased != images).flatten(1).any(dim=1).all(), "a probability of 1 erases every image"


def test_mixup_gives_every_pixel_the_weight_of_its_image():
    """mixup (Zhang et al. 2018)."""
    weights = augment.mixup_weights(torch.tensor([0.25, 1.0]), (2, 3))
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
def test_cutmix_is_a_box_that_the_border_cuts(weight, centre, rows, columns):
    """CutMix (Yun et al. 2019), by hand: 20 x 40 pixels, a box of (1 - weight) of them around the centre."""
    oracle = np.ones((1, 1, 20, 40))
    for i in rows:
        for j in columns:
            oracle[0, 0, i, j] = 0
    weights = augment.cutmix_weights(torch.tensor([weight]), torch.tensor([centre]), (20, 40))
    equal(weights, oracle, "centre = (row, column)? the box is the neighbour's, so it is 0?")


def test_cutmix_boxes_lie_on_whole_pixels():
    weight, centre, (H, W) = uniform(100), uniform(100, 2, seed=2), (6, 9)
    oracle = np.ones((100, 1, H, W))
    for b, _, i, j in np.ndindex(oracle.shape):
        half = math.sqrt(1 - weight[b]) / 2
        y, x = centre[b].tolist()
        if round((y - half) * H) <= i < round((y + half) * H) and round((x - half) * W) <= j < round((x + half) * W):
            oracle[b, 0, i, j] = 0
    weights = augment.cutmix_weights(weight, centre, (H, W))
    assert weights.dtype == weight.dtype
    equal(weights, oracle)


@pytest.mark.parametrize("B", [1, 4, 5])
def test_blend_mixes_neighbours_and_targets_by_the_pixels_share(B):
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
    ours = augment.blend(images, targets, weights)
    equal(ours[0], mixed, "own weight on the own image?")
    equal(ours[1], labels, "the share is the mean of the weights, not the number that was drawn")
    equal(ours[1].sum(dim=1), np.ones(B), "targets sum to 1")


def test_everything_is_done_on_the_device_of_the_images(waits):
    """And nothing is copied there or read from it. "meta" is a device without numbers."""
    images, draw = torch.ones(3, 2, 6, 7, device="meta"), torch.rand(3, 23, device="meta")
    targets = torch.ones(3, 4, device="meta")
    with waits() as seen:
        outs = (
            (augment.padded_crop(images, draw, 2), (3, 2, 6, 7)),
            (augment.random_resized_crop(images, (6, 7), draw, (0.2, 1.0), (4, 5)), (3, 2, 4, 5)),
            (augment.resize(images, (6, 7), (4, 5)), (3, 2, 4, 5)),
            (augment.erase(images, draw, images, 0.5), (3, 2, 6, 7)),
            (augment.mixup_weights(draw[:, 0], (6, 7)), (3, 1, 6, 7)),
            (augment.cutmix_weights(draw[:, 0], draw[:, :2], (6, 7)), (3, 1, 6, 7)),
            (augment.blend(images, targets, images[:, :1])[0], (3, 2, 6, 7)),
        )
    assert seen.reads == seen.copies == []
    for out, shape in outs:
        assert (out.device.type, tuple(out.shape)) == ("meta", shape)
