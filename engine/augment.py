"""Augmentation as arithmetic: a batch of images and random numbers go in, a batch of images comes out.

Nothing here draws a number. `data.py` draws, for the whole batch and as a function of (seed, step), so that each of
several processes can hand in its share. All run on the device that the images are on, for all images at once.
"""

import torch
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------
# Crops and flips
# ---------------------------------------------------------------------------------------------


def padded_crop(images, draw, pad):
    """Shift each image by up to `pad` pixels each way, zeros outside; flip half of them.

    images (B, C, H, W) uint8, draw (B, 3 or more) uniform in [0, 1): top, left, flip -> (B, C, H, W) uint8.
    """
    B, C, H, W = images.shape
    top, left = (draw[:, :2] * (2 * pad + 1)).long().T  # (B) each
    rows = top[:, None] + torch.arange(H, device=images.device)  # (B, H)
    columns = left[:, None] + torch.arange(W, device=images.device)  # (B, W)
    columns = torch.where(draw[:, 2:3] < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (pad, pad, pad, pad))
    which = torch.arange(B, device=images.device)[:, None, None]
    channels = [padded[:, c][which, rows[:, :, None], columns[:, None, :]] for c in range(C)]  # (B, H, W) each
    return torch.stack(channels, dim=1)


def crop_box(height, width, draw, scale, ratio=(3 / 4, 4 / 3)):
    """The box of the random resized crop (Szegedy et al. 2015): top, left, h, w, in pixels and their fractions.

    height, width: of the image, numbers or (B,); draw (..., 4) uniform in [0, 1) -> (...) each. The share of the area
    is uniform in `scale`, log(w / h) uniform in log `ratio`, the place uniform; a side that does not fit is cut to
    the image's.
    """
    area, aspect, top, left = draw.unbind(-1)
    area = height * width * (scale[0] + area * (scale[1] - scale[0]))
    aspect = ratio[0] ** (1 - aspect) * ratio[1] ** aspect  # w / h
    h = (area / aspect).sqrt().clamp(max=height)
    w = (area * aspect).sqrt().clamp(max=width)
    return top * (height - h), left * (width - w), h, w


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

    images (B, C, H, W), sides = height, width of what may be cut, numbers or (B,), draw (B, 5) uniform in [0, 1): flip
    and `crop_box` -> (B, C, *size) float.
    """
    return crop_and_resize(images, crop_box(*sides, draw[:, 1:], scale), draw[:, 0] < 0.5, size)


def resize(images, sides, size):
    """Resize images (B, C, H, W), of which each fills sides = height, width, to size: (B, C, *size) float."""
    zero = torch.zeros(len(images), device=images.device)
    return crop_and_resize(images, (zero, zero, *(zero + side for side in sides)), zero > 0, size)


# ---------------------------------------------------------------------------------------------
# Erasing, mixup and CutMix
# ---------------------------------------------------------------------------------------------


def erase(images, draw, noise, probability):
    """Random erasing (Zhong et al. 2020), pixel by pixel: noise in a box of 2 to 33 % of an image.

    images (B, C, H, W), normalised; draw (B, 5) uniform in [0, 1): `crop_box` and whether, with the given probability;
    noise (B, C, H, W) from N(0, 1) -> (B, C, H, W).
    """
    box = crop_box(*images.shape[-2:], draw[:, :4], scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))
    top, left, h, w = (side[:, None].round() for side in box)  # (B, 1) each
    y, x = (torch.arange(n, device=images.device) for n in images.shape[-2:])
    inside = ((y >= top) & (y < top + h))[:, :, None] & ((x >= left) & (x < left + w))[:, None, :]  # (B, H, W)
    inside &= (draw[:, 4] < probability)[:, None, None]
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
