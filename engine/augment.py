"""Augmentation as arithmetic: a batch of images and random numbers go in, a batch of images comes out.

Nothing here draws a number. `data.py` draws, for the whole batch and as a function of (seed, step), so that each of
several processes can hand in its share. All run on the device that the images are on, for all images at once.
"""

import math

import torch
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------
# Crops and flips
# ---------------------------------------------------------------------------------------------


def padded_crop(images, draw, pad):
    """Shift each image by up to `pad` pixels each way, zeros outside; flip half of them.

    images (B, C, H, W) uint8, draw (B, 3 or more) uniform in [0, 1): flip, top, left -> (B, C, H, W) uint8.
    """
    B, C, H, W = images.shape
    top, left = (draw[:, 1:3] * (2 * pad + 1)).long().T  # (B) each
    rows = top[:, None] + torch.arange(H, device=images.device)  # (B, H)
    columns = left[:, None] + torch.arange(W, device=images.device)  # (B, W)
    columns = torch.where(draw[:, :1] < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (pad, pad, pad, pad))
    which = torch.arange(B, device=images.device)[:, None, None]
    channels = [padded[:, c][which, rows[:, :, None], columns[:, None, :]] for c in range(C)]  # (B, H, W) each
    return torch.stack(channels, dim=1)


TRIES = 10  # at a box that fits, as torchvision and timm make them
BOX = 2 + 2 * TRIES  # random numbers that a box takes: top, left, the areas of all tries, and their aspects


def first_fit(draw, area, ratio, height, width):
    """The first of ten random boxes that is no larger than height x width: h, w, and whether there is one.

    draw (..., BOX) uniform in [0, 1). Areas are uniform in area = (low, high), log(w / h) in log `ratio`; sides are
    rounded to whole pixels. Numbers or (..., 1) -> (...) each.
    """
    areas, aspects = draw[..., 2:].chunk(2, dim=-1)  # (..., TRIES)
    areas = area[0] + areas * (area[1] - area[0])
    low, high = map(math.log, ratio)
    aspects = (low + aspects * (high - low)).exp()  # w / h
    h, w = (areas / aspects).sqrt().round(), (areas * aspects).sqrt().round()
    fits = (h >= 1) & (h <= height) & (w >= 1) & (w <= width)
    first = fits.int().argmax(dim=-1, keepdim=True)  # (..., 1), 0 if none does
    return (values.gather(-1, first)[..., 0] for values in (h, w, fits))


def crop_box(height, width, draw, scale, aspect=1.0):
    """The box of the random resized crop (Szegedy et al. 2015): top, left, h, w, in whole pixels.

    height, width: of the image, numbers or (B,); draw (..., BOX) uniform in [0, 1) -> (...) each. The share of the
    area is uniform in `scale`, log(w / h) in log(3/4 to 4/3) around that of `aspect`, w / h of what the box is resized
    to; the place is uniform. A box that does not fit is drawn again, ten times; then it is the largest in the middle
    with such an aspect.
    """
    height, width = (torch.zeros_like(draw[..., 0]) + side for side in (height, width))  # (...)
    area, ratio = (height * width)[..., None], (3 / 4 * aspect, 4 / 3 * aspect)
    h, w, fits = first_fit(draw, (scale[0] * area, scale[1] * area), ratio, height[..., None], width[..., None])
    h = torch.where(fits, h, torch.minimum(height, width / ratio[0]).round().clamp(min=1))
    w = torch.where(fits, w, torch.minimum(width, height * ratio[1]).round().clamp(min=1))
    top = torch.where(fits, draw[..., 0] * (height - h + 1), (height - h) / 2).floor()
    left = torch.where(fits, draw[..., 1] * (width - w + 1), (width - w) / 2).floor()
    return top, left, h, w


def middle_box(height, width, aspect):
    """The largest box in the middle of an image with w / h = aspect, so that nothing is squeezed: top, left, h, w.

    height, width (B,) -> (B,) each, in pixels and their fractions.
    """
    h, w = torch.minimum(height, width / aspect), torch.minimum(width, height * aspect)
    return (height - h) / 2, (width - w) / 2, h, w


def crop_and_resize(images, box, flip, size):
    """Cut a box of its own out of each image and resize it, by bicubic interpolation.

    images (B, C, H, W), box = top, left, h, w in pixels, (B,) each, flip (B,) bool, size = (H', W')
    -> (B, C, H', W') float. Made for enlarging and mild shrinking: there is no low-pass filter.
    """
    (top, left, h, w), (H, W) = box, images.shape[-2:]
    y = (torch.arange(size[0], device=images.device) + 0.5) / size[0]  # pixel centres, in (0, 1)
    x = ((torch.arange(size[1], device=images.device) + 0.5) / size[1]).expand(len(images), -1)
    x = torch.where(flip[:, None], x.flip(1), x)
    y = 2 * (top[:, None] + y * h[:, None]) / H - 1  # (B, H'), the image spans [-1, 1]
    x = 2 * (left[:, None] + x * w[:, None]) / W - 1  # (B, W')
    places = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)  # (B, H', W', 2)
    crops = F.grid_sample(images.float(), places, mode="bicubic", padding_mode="border", align_corners=False)
    return crops.clamp(0, 255)


def random_resized_crop(images, sides, draw, scale, size):
    """The crop of most recipes for ImageNet: a random box, resized, and flipped half of the time.

    images (B, C, H, W), sides = height, width of what may be cut, numbers or (B,), draw (B, 1 + BOX) uniform in
    [0, 1): flip and `crop_box` -> (B, C, *size) float.
    """
    box = crop_box(*sides, draw[:, 1:], scale, aspect=size[1] / size[0])
    return crop_and_resize(images, box, draw[:, 0] < 0.5, size)


def resize(images, sides, size):
    """Resize images (B, C, H, W), of which each fills sides = height, width, to size: (B, C, *size) float.

    Of an image of another shape the largest middle part is taken.
    """
    zero = torch.zeros(len(images), device=images.device)
    box = middle_box(*(zero + side for side in sides), size[1] / size[0])
    return crop_and_resize(images, box, zero > 0, size)


# ---------------------------------------------------------------------------------------------
# Erasing, mixup and CutMix
# ---------------------------------------------------------------------------------------------


def erase(images, draw, noise, probability):
    """Random erasing (Zhong et al. 2020), pixel by pixel: noise in a box of 2 to 33 % of an image.

    images (B, C, H, W), normalised; draw (B, 1 + BOX) uniform in [0, 1): whether, with the given probability, and
    where; noise (B, C, H, W) from N(0, 1) -> (B, C, H, W). As in timm the box is drawn again, up to ten times, until
    both of its sides are shorter than the image's; where all are longer nothing is erased.
    """
    H, W = images.shape[-2:]
    h, w, fits = first_fit(draw[:, 1:], (0.02 * H * W, H * W / 3), (0.3, 1 / 0.3), H - 1, W - 1)
    fits &= draw[:, 0] < probability
    top, left = (draw[:, 1] * (H - h + 1)).floor(), (draw[:, 2] * (W - w + 1)).floor()
    sides = []
    for n, first, length in ((H, top, h), (W, left, w)):
        place = torch.arange(n, device=images.device)
        sides.append((place >= first[:, None]) & (place < (first + length)[:, None]))  # (B, n)
    inside = fits[:, None, None] & sides[0][:, :, None] & sides[1][:, None, :]  # (B, H, W)
    return torch.where(inside[:, None], noise.to(images), images)


def mixup_weights(weight, size):
    """mixup (Zhang et al. 2018): the whole image counts with its weight. (B,), (H, W) -> (B, 1, H, W)."""
    return weight[:, None, None, None].expand(-1, 1, *size)


def cutmix_weights(weight, centre, size):
    """CutMix (Yun et al. 2019): 0 in a box that covers 1 - weight of the image, 1 around it.

    weight (B,), centre (B, 2) in [0, 1), size = (H, W) -> (B, 1, H, W). The image's border cuts the box.
    """
    half = (1 - weight).sqrt()[:, None] / 2
    inside = []
    for axis, n in enumerate(size):
        low, high = ((centre[:, axis, None] + sign * half) * n for sign in (-1, 1))  # (B, 1)
        place = torch.arange(n, device=weight.device)
        inside.append((place >= low.round()) & (place < high.round()))  # (B, n)
    box = inside[0][:, :, None] & inside[1][:, None, :]  # (B, H, W)
    return (~box)[:, None].to(weight.dtype)


def blend(images, targets, weights):
    """Mix every image with its neighbour in the batch, and their targets by the same share.

    images (B, C, H, W), targets (B, classes) of probabilities, weights (B, 1, H, W) of the own image
    -> images, targets. Neighbours are 0 and 1, 2 and 3, …; an odd last one stays alone. The order is random already.
    """
    B = len(images)
    neighbour = (torch.arange(B, device=images.device) ^ 1).clamp(max=B - 1)
    share = weights.mean(dim=(1, 2, 3))[:, None]  # (B, 1)
    images = weights * images + (1 - weights) * images[neighbour]
    return images, share * targets + (1 - share) * targets[neighbour]
