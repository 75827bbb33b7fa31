"""Random numbers, images and files for the tests of data.py, engine/augment.py and engine/image_folder.py."""

import contextlib
import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image

CPU = torch.device("cpu")
PLAIN = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)  # mean and standard deviation that leave pixels as they are
JUST_BELOW_1 = 1 - 2**-24  # the largest float32 that `torch.rand` can give


def uniform(*shape, seed=1, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pixels(*shape, seed=1):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def crop_draw(flip, area, aspect, top, left):
    """The numbers of a random resized crop, all tries alike: see `augment.crop_box`."""
    return [flip, top, left] + [area] * 10 + [aspect] * 10


def flat(n, C=3, H=8, W=8, step=20):
    """n images, image i is all step * i: another image is seen at once."""
    return (torch.arange(n) * step).to(torch.uint8)[:, None, None, None].expand(n, C, H, W).contiguous()


def same(ours, theirs):
    """Lists of batches (images, labels), bit for bit."""
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(v, w) for a, b in pairs for v, w in zip(a, b, strict=True))


def photograph(image):
    """(3, H, W) uint8 -> a Pillow image."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def save_image(image, path, **options):
    """Write a Pillow image, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def skimage_folder():
    return Path(importlib.util.find_spec("skimage").submodule_search_locations[0], "data")


@contextlib.contextmanager
def refusal(*words, error=ValueError):
    """The block raises a ValueError, and its message is one line that has all of the words."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, f"the message does not say {word}: {message}"
