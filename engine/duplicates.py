"""Images of one split that occur in another: pre-training must not have seen what is tested (ViT, section 4.1)."""

import copy
import math

import torch
from torch.nn import functional as F


def perceptual_hash(images, side=32, low=16):
    """What a picture looks like, in 255 bits: (B, C, H, W) -> (B, 255) bool.

    The mean over channels, shrunk to 32 x 32; of its cosine transform the 16 x 16 lowest frequencies but the constant;
    a bit says which are above their median (Zauner 2010, with 8 x 8). Brightness and contrast do not matter, and
    another size or compression turns few bits: two unrelated pictures differ in about half of them.
    """
    grey = F.interpolate(images.double().mean(dim=1, keepdim=True), (side, side), mode="area")[:, 0]
    places = torch.arange(side, dtype=torch.float64, device=images.device)
    cosines = torch.cos(math.pi / side * torch.outer(places[:low], places + 0.5))  # (low, side)
    frequencies = (cosines @ grey @ cosines.T).flatten(1)[:, 1:]  # (B, 255)
    return frequencies > frequencies.median(dim=1, keepdim=True).values


def hash_split(split, device):
    """The hash of the middle square of every image, (n, 255) of -1 and 1; and which images could be decoded (n,)."""
    split = copy.copy(split)
    split.crop_pct = 1.0  # of a folder's: all of the short side
    side = min(split.images.shape[-2:]) if hasattr(split, "images") else 64
    size = (side, side)
    std = torch.tensor(split.std, device=device).view(-1, 1, 1)
    batches = split.test_batches(size, 64, torch.device(device))
    codes, read = zip(*((perceptual_hash(images * std), labels >= 0) for images, labels in batches), strict=True)
    return 2.0 * torch.cat(codes) - 1, torch.cat(read)


def occurring(split, others, device="cpu", bits=20):
    """Which images of a split occur in another one too, by their hashes: (n,) bool.

    Hashes that differ in at most `bits` of 255 count as the same picture. On the photographs of `photos`, a JPEG of
    another size differs in 2 to 6 bits (median), the nearest other picture in 94. An image that can't be decoded
    occurs nowhere.
    """
    (codes, read), (known, decoded) = (hash_split(each, device) for each in (split, others))
    known = known[decoded]
    agreement = torch.cat([(part @ known.T).amax(dim=1) for part in codes.split(1000)])  # 255 - 2 * bits that differ
    return ((agreement >= 255 - 2 * bits) & read).cpu()
