"""What engine/duplicates.py promises: the same picture is found again, however it was compressed, and no other one."""

import numpy as np
import pytest
import scipy.fft
import torch
from PIL import Image

import data
from engine import duplicates, image_folder
from tests.engine.pictures import PLAIN, photograph, pixels, save_image, uniform
from tests.oracles import equal


def test_a_hash_compares_the_lowest_frequencies_with_their_median():
    """With scipy's cosine transform of a picture of 64 x 64, its pixels averaged 2 by 2 and over channels."""
    images = uniform(3, 3, 64, 64)
    oracle = []
    for image in images.mean(dim=1).numpy():
        small = image.reshape(32, 2, 32, 2).mean(axis=(1, 3))
        low = scipy.fft.dctn(small, type=2)[:16, :16].flatten()[1:]
        oracle.append(low > np.median(low))
    ours = duplicates.perceptual_hash(images)
    equal(ours, np.stack(oracle), "hashes differ")
    assert ours.sum(dim=1).tolist() == [127] * 3, "half of 255 are above the median"
    assert torch.equal(duplicates.perceptual_hash(0.3 * images + 50), ours), "brightness and contrast do not matter"


def test_a_splits_hashes_are_those_of_the_middle_squares(tmp_path):
    """Of their own size in memory, of 64 x 64 in a folder. Each channel counts as it does in the picture."""
    images, statistics = pixels(70, 3, 40, 48), ((0.1, 0.5, 0.9), (0.05, 0.3, 1.0))  # more than one batch
    split = data.InMemory(images, torch.arange(70), *statistics)
    codes, read = duplicates.hash_split(split, "cpu")
    # Undoing the normalisation rounds in float32: a frequency at the median itself may change its side.
    assert ((codes > 0) != duplicates.perceptual_hash(images[..., 4:44])).sum(dim=1).max() <= 2
    assert (codes.abs() == 1).all()
    assert read.all()

    sizes = [(80, 64), (64, 64)]
    for i, size in enumerate(sizes):
        save_image(photograph(images[i]).resize(size), tmp_path / "x" / f"{i}.png")
    codes, _ = duplicates.hash_split(image_folder.Folder(tmp_path, *statistics), "cpu")
    for i, (width, height) in enumerate(sizes):
        box = ((width - 64) / 2, 0, (width + 64) / 2, height)  # the middle, all of the short side
        whole = np.array(photograph(images[i]).resize((width, height)).resize((64, 64), box=box))
        oracle = duplicates.perceptual_hash(torch.from_numpy(whole).permute(2, 0, 1)[None])[0]
        assert ((codes[i] > 0) != oracle).sum() <= 2


@pytest.mark.parametrize("kind", ["memory", pytest.param("folder", marks=pytest.mark.slow)])
def test_a_picture_is_found_again_however_it_was_compressed(kind, tmp_path):
    """The test crops of the photographs: smaller and as JPEG they are the same pictures, their neighbours are not."""
    crops = data.photos((112, 112)).test.images[1::4]  # (16, 3, 112, 112): one of each photograph
    ours, others = data.InMemory(crops, torch.arange(16), *PLAIN), []
    if kind == "folder":
        for i, crop in enumerate(crops):
            save_image(photograph(crop), tmp_path / "ours" / f"{i:02}" / "image.png")
        ours = image_folder.Folder(tmp_path / "ours", *PLAIN)
    for crop in crops[::2]:
        file = save_image(photograph(crop).resize((96, 96)), tmp_path / "other.jpg", quality=92)
        with Image.open(file) as image:
            others.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    strangers = crops[1::2, :, ::2, ::2][:, :, :48, :48].repeat(1, 1, 2, 2)  # and pictures that are not there
    others = data.InMemory(torch.cat([torch.stack(others), strangers]), torch.arange(16), *PLAIN)
    found = duplicates.occurring(ours, others)
    assert found.tolist() == [True, False] * 8
    kept = ours.part((~found).nonzero()[:, 0])
    assert not duplicates.occurring(kept, others).any()
    assert [labels.tolist() for _, labels in kept.test_batches((8, 8), 16, torch.device("cpu"))] == [
        list(range(1, 16, 2))
    ]


def test_hashes_up_to_20_bits_apart_are_one_picture(monkeypatch):
    """Of 255. Codes are -1 and 1; an image that can't be decoded occurs nowhere, whatever its code."""
    known = torch.where(uniform(1, 255) < 0.5, -1.0, 1.0)
    codes = known.repeat(4, 1)
    codes[0, :20] *= -1
    codes[1, :21] *= -1
    read = torch.tensor([True, True, False, True])
    splits = {"ours": (codes, read), "others": (torch.cat([codes[2:3], known]), torch.tensor([True, True]))}
    monkeypatch.setattr(duplicates, "hash_split", lambda split, device: splits[split])
    assert duplicates.occurring("ours", "others").tolist() == [True, False, False, True]
    splits["others"] = (known, torch.tensor([True]))
    assert duplicates.occurring("ours", "others", bits=21).tolist() == [True, True, False, True]


def test_images_that_can_not_be_decoded_occur_nowhere(tmp_path):
    """They are black, both of them: that does not make them one picture."""
    for name in ("a", "b"):
        for i in range(30):  # below 5 %
            save_image(photograph(pixels(3, 8, 8, seed=i + 100 * (name == "b"))), tmp_path / name / "x" / f"{i}.png")
        (tmp_path / name / "x" / "broken.png").write_bytes(b"no image")
    splits = [image_folder.Folder(tmp_path / name, *PLAIN) for name in ("a", "b")]
    assert not duplicates.occurring(*splits).any()
