"""Images with masks: what is read from which file, how both are cropped, resized and flipped together, and what is
refused or skipped. Masks are checked pixel by pixel against loops."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from engine import image_folder, pairs
from tests.engine.test_segmentation import write_pairs

CPU = torch.device("cpu")


def numbered(h, w):
    """An image in which each pixel says where it is, and the mask that says the same: red + 16 green, to 255."""
    rows, columns = np.mgrid[:h, :w]
    image = np.stack([columns * 7, rows * 7, np.full((h, w), 50)], axis=2).astype(np.uint8)
    return image, (rows // 3 + 10 * (columns // 4)).astype(np.int64)


def draw(scale=1 / 3, flip=0.9, colours=1.0, **windows):
    """Numbers for `pairs.augment`: scale 1/3 is a zoom of 1; without windows all are the middle; colours stay."""
    out = np.full(pairs.NUMBERS, 0.5)
    out[0], out[1] = scale, flip
    out[2 + 2 * pairs.CROPS :] = colours
    for name, (top, left) in windows.items():
        i = int(name.removeprefix("window"))
        out[2 + 2 * i : 4 + 2 * i] = top, left
    return out


def augment(image, mask, size, numbers):
    out, truth = pairs.augment(Image.fromarray(image), mask, size, numbers)
    return np.asarray(out), truth


# ---------------------------------------------------------------------------------------------
# An image and its mask
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [0.1, 0.9])
@pytest.mark.parametrize("scale", [0.0, 1 / 3, 0.5, 1.0])
@pytest.mark.parametrize("sides", [(24, 36), (36, 24), (17, 64)])
def test_every_pixel_of_a_mask_is_one_that_was_there(sides, scale, flip):
    """The nearest to the centre of the new pixel, in the same window as the image; from a loop over new pixels."""
    (h, w), (H, W) = sides, (16, 20)
    image, mask = numbered(h, w)
    numbers = draw(scale, flip, window0=(0.25, 0.75))
    zoom = max(H / h, W / w) * (0.5 + 1.5 * scale)
    seen = min(h, H / zoom), min(w, W / zoom)
    top, left = 0.25 * (h - seen[0]), 0.75 * (w - seen[1])
    sides = min(H, round(h * zoom)), min(W, round(w * zoom))
    expected, clear = np.full((H, W), 255), np.zeros((H, W), bool)  # clear: not between two pixels, as rounding decides
    for i in range(sides[0]):
        for j in range(sides[1]):
            y, x = top + (i + 0.5) * seen[0] / sides[0], left + (j + 0.5) * seen[1] / sides[1]
            place = (i, j) if flip > 0.5 else (i, sides[1] - 1 - j)
            expected[place] = mask[math.floor(y), math.floor(x)]
            clear[place] = all(0.01 < v % 1 < 0.99 for v in (y, x))
    _, ours = augment(image, mask, (H, W), numbers)
    assert ours.dtype == np.uint8
    assert set(np.unique(ours)) <= set(np.unique(mask)) | {255}
    inside = expected != 255
    assert (ours[~inside] == 255).all()
    assert (ours == expected)[clear].all()
    assert clear.sum() > 0.3 * inside.sum()


@pytest.mark.parametrize("flip", [0.1, 0.9])
@pytest.mark.parametrize("scale", [0.2, 1 / 3, 0.6])
def test_image_and_mask_stay_in_register(scale, flip):
    """A bright square keeps its class: where the mask says 1 the image is bright, where it says 0 it is dark."""
    mask = np.zeros((40, 50), np.int64)
    mask[10:24, 20:38] = 1
    image = np.repeat((200 * mask).astype(np.uint8)[..., None], 3, axis=2)
    out, truth = augment(image, mask, (32, 32), draw(scale, flip, window0=(0.4, 0.6)))
    grey = out[..., 0].astype(float)
    assert (grey[truth == 1] >= 80).all()
    assert (grey[truth == 0] <= 120).all()
    assert (truth == 1).sum() > 20


def test_where_the_image_ends_both_are_filled():
    """With the mean colour, which is 0 after normalisation, and with what is ignored: on the right and below."""
    image, mask = numbered(20, 30)
    out, truth = augment(image, mask, (24, 24), draw(scale=0.0))  # zoom 0.6: 12 x 18 pixels
    assert (truth[12:] == 255).all()
    assert (truth[:, 18:] == 255).all()
    assert (truth[:12, :18] != 255).all()
    assert (out[12:] == image_folder.GREY).all()
    normalised = data.normalise(
        torch.tensor(out[None, 13:14, :1]).permute(0, 3, 1, 2), data.IMAGENET_MEAN, data.IMAGENET_STD
    )
    assert normalised.abs().max() < 0.01


def test_a_window_of_one_class_is_passed_over():
    """The first of ten of which no class has more than 3/4 of the labelled pixels; the last one if there is none."""
    mask = np.zeros((32, 64), np.int64)
    mask[:, 48:] = 1
    image = np.zeros((32, 64, 3), np.uint8)
    numbers = draw(window0=(0, 0), window1=(0, 0.2), window2=(0, 0.9), window3=(0, 0.4))
    _, truth = augment(image, mask, (32, 32), numbers)
    assert set(np.unique(truth)) == {0, 1}
    assert (truth == 1).sum() == 32 * round(32 * 0.9 - 16), "of window 2"
    for i in range(pairs.CROPS):
        numbers = draw(**{f"window{j}": (0, 0) for j in range(i)} | {f"window{j}": (0, 0.9) for j in range(i, 10)})
        assert 1 in np.unique(augment(image, mask, (32, 32), numbers)[1])
    alone = np.where(np.arange(64) < 40, 255, 1)[None].repeat(32, axis=0)
    assert (augment(image, alone, (32, 32), draw(window9=(0, 0)))[1] == 255).all(), "the last one, nothing labelled"


def hsv(pixel):
    import colorsys

    return np.array(colorsys.rgb_to_hsv(*(v / 255 for v in pixel)))


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colours_change_one_at_a_time(name):
    """Brightness by up to 32 of 255, contrast and saturation by up to half, hue by up to a tenth of a turn."""
    image = Image.new("RGB", (2, 2), (150, 100, 60))
    order = ["brightness", "contrast", "saturation", "hue"]
    numbers = np.ones(9)
    assert pairs.colour(image, numbers).getpixel((0, 0)) == (150, 100, 60)
    numbers[order.index(name)] = 0.4
    numbers[4:8] = 0.75  # half of the way up
    changed = pairs.colour(image, numbers).getpixel((0, 0))
    expected = {
        "brightness": (166, 116, 76),
        "contrast": (187.5, 125, 75),
        "saturation": [g + 1.25 * (v - g) for g in [0.299 * 150 + 0.587 * 100 + 0.114 * 60] for v in (150, 100, 60)],
    }
    if name == "hue":
        turned = hsv(changed) - hsv((150, 100, 60))
        assert turned == pytest.approx([0.05, 0, 0], abs=0.02)
    else:
        assert changed == pytest.approx(expected[name], abs=1.5)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("P", "png"), ("1", "png"), ("I;16", "png"), ("L", "tif"), ("L", "bmp")]
)
def test_masks_of_these_kinds_hold_class_numbers(tmp_path, mode, suffix):
    """Grey values, the numbers of a palette, whatever its colours, and 16 bits."""
    values = np.arange(12).reshape(3, 4) % (2 if mode == "1" else 12)
    if mode == "I;16":
        mask = Image.fromarray(values.astype(np.uint16))
    elif mode == "1":
        mask = Image.fromarray(values.astype(bool))
    else:
        mask = Image.fromarray(values.astype(np.uint8))
    if mode == "P":
        mask = mask.convert("P") if mask.mode != "L" else mask.point(lambda p: p)
        mask.putpalette([v for i in range(256) for v in (255 - i, i * 3 % 256, 7)])
    mask.save(tmp_path / f"mask.{suffix}")
    assert Image.open(tmp_path / f"mask.{suffix}").mode == mode
    assert np.array_equal(pairs.read_mask(tmp_path / f"mask.{suffix}"), values)


@pytest.mark.parametrize(
    ("mode", "suffix", "words"), [("RGB", "png", "RGB"), ("L", "jpg", "JPEG"), ("LA", "png", "LA")]
)
def test_masks_that_hold_no_class_numbers_are_refused(tmp_path, mode, suffix, words):
    Image.new(mode, (4, 4)).save(tmp_path / f"mask.{suffix}")
    with pytest.raises(ValueError, match=words):
        pairs.read_mask(tmp_path / f"mask.{suffix}")


def write_ade20k(path, n=3):
    """ADE20K's official layout; masks of 0 (none of the classes), 1 (wall) and 150 (flag)."""
    for split, name in (("training", "train"), ("validation", "val")):
        for kind in ("images", "annotations"):
            Path(path, kind, split).mkdir(parents=True)
        for i in range(n):
            mask = np.repeat(np.array([0, 1, 150], np.uint8), 8)[None].repeat(20, axis=0)
            image = np.repeat(mask[..., None], 3, axis=2)
            Image.fromarray(image).save(Path(path, "images", split, f"ADE_{name}_{i:08}.jpg"))
            Image.fromarray(mask).save(Path(path, "annotations", split, f"ADE_{name}_{i:08}.png"))
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"] + [f"{i}\t0.1\t1\t1\t0\tname{i}, other {i}" for i in range(1, 151)]
    Path(path, "objectInfo150.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("inside", [False, True])
def test_ade20k_has_150_classes_and_ignores_0(tmp_path, inside):
    """As mmsegmentation's reduce_zero_label: c becomes c - 1, and 0 becomes 255."""
    write_ade20k(tmp_path / "ADEChallengeData2016")
    dataset = data.load(f"ade20k:{tmp_path / 'ADEChallengeData2016' if inside else tmp_path}")
    assert dataset.classes == [f"name{i}" for i in range(1, 151)]
    dataset.test.workers = 0
    (image, mask), *rest = dataset.test.test_batches((32, 32), 8, CPU)
    assert len(rest) == 2, "an image at a time"
    assert image.shape == (1, 3, 32, 38)
    assert mask.dtype == torch.int64
    assert mask[0].tolist() == [[255] * 8 + [0] * 8 + [149] * 8] * 20, "as it was"
    assert not dataset.test.unreadable


def test_images_cover_the_window_and_keep_their_shape(tmp_path):
    """A test image is as large as needed, no larger: by its short side."""
    write_pairs(tmp_path, train=2, val=3, side=18)
    dataset = data.load(f"segment:{tmp_path}")
    dataset.test.workers = 0
    shapes = [(i.shape[2:], m.shape[1:]) for i, m in dataset.test.test_batches((36, 30), 2, CPU)]
    assert shapes == [((36, 36), (18, 18)), ((36, 38), (18, 19)), ((36, 40), (18, 20))]


def test_class_names_are_lines_of_a_file_or_numbers(tmp_path, capsys):
    write_pairs(tmp_path)
    assert data.load(f"segment:{tmp_path}").classes == ["0", "1", "2"]
    assert "classes are numbers, 0 to 2" in capsys.readouterr().out
    (tmp_path / "classes.txt").write_text("ground\n\nant \nbee\n")
    assert data.load(f"segment:{tmp_path}").classes == ["ground", "ant", "bee"]
    (tmp_path / "classes.txt").write_text("\n")
    with pytest.raises(ValueError, match="names 0 classes"):
        data.load(f"segment:{tmp_path}")


def batches(split, steps, batch_size=4, shard=slice(None), seed=0):
    return list(split.train_batches((16, 16), batch_size, steps, seed, None, CPU, shard))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_are_a_function_of_seed_and_step(tmp_path, workers):
    """A run that resumes sees what it would have seen, and two processes what one sees; another seed, other windows."""
    write_pairs(tmp_path)
    split = data.load(f"segment:{tmp_path}").train
    split.workers = workers
    whole = batches(split, range(4))
    for (images, masks), (a, b) in zip(batches(split, range(2, 4)), whole[2:], strict=True):
        assert torch.equal(images, a)
        assert torch.equal(masks, b)
    halves = [batches(split, range(4), shard=shard) for shard in (slice(0, 2), slice(2, 4))]
    for (images, masks), one, two in zip(whole, *halves, strict=True):
        assert torch.equal(images, torch.cat([one[0], two[0]]))
        assert torch.equal(masks, torch.cat([one[1], two[1]]))
    assert masks.dtype == torch.int64
    assert not torch.equal(whole[0][0], batches(split, range(1), seed=1)[0][0])
    assert not torch.equal(whole[0][0], whole[2][0]), "in the next epoch"


def test_an_image_in_the_batch_is_augmented_by_its_own_numbers(tmp_path):
    """Row i of the step's numbers, for the image that the order of the epoch puts there; mirrored if it says so."""
    write_pairs(tmp_path)
    split = data.load(f"segment:{tmp_path}").train
    split.workers = 0
    ((images, masks),) = batches(split, [1])
    order, numbers = data.batch_indices(8, 4, 1, 0), split.draw(4, 0, 1).numpy()
    names = sorted(path.name for path in (tmp_path / "train" / "images").iterdir())
    for row, index in enumerate(order.tolist()):
        image = np.array(Image.open(tmp_path / "train" / "images" / names[index]))
        mask = np.array(Image.open(tmp_path / "train" / "masks" / names[index])).astype(np.int64)
        out, truth = augment(image, mask, (16, 16), numbers[row])
        assert torch.equal(masks[row], torch.tensor(truth.astype(np.int64)))
        expected = (out / 255 - data.IMAGENET_MEAN) / data.IMAGENET_STD
        np.testing.assert_allclose(images[row].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_a_part_keeps_images_and_masks_together(tmp_path):
    write_pairs(tmp_path)
    split = data.load(f"segment:{tmp_path}").train
    part = split.subset(3, seed=0)
    assert len(part) == 3
    stems = [[Path(str(f, "utf8")).name for f in files] for files in (part.files, part.masks)]
    assert stems[0] == stems[1]


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


def without_mask(path):
    (path / "train" / "masks" / "3.png").unlink()


def without_masks(path):
    for file in (path / "val" / "masks").iterdir():
        file.unlink()
    (path / "val" / "masks").rmdir()


def without_images(path):
    for file in (path / "val" / "images").iterdir():
        file.unlink()


def two_of_a_name(path):
    Image.new("RGB", (18, 18)).save(path / "train" / "images" / "3.jpg")


def all_ignored(path):
    for file in (path / "train" / "masks").iterdir():
        Image.new("L", Image.open(file).size, 255).save(file)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_mask, ("1 of the 8 images", "no mask", "as 3", "masks/3.png")),
        (without_masks, ("no folder", "masks/NAME.png")),
        (without_images, ("no image in",)),
        (two_of_a_name, ("3.jpg", "3.png", "one name")),
        (all_ignored, ("has a class",)),
    ],
)
def test_a_folder_that_is_not_as_it_should_be_is_refused_in_one_line(tmp_path, spoil, words):
    write_pairs(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=";") as error:
        data.load(f"segment:{tmp_path}")
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_a_mask_without_an_image_is_left_out_and_said(tmp_path, capsys):
    write_pairs(tmp_path)
    Image.new("L", (18, 18)).save(tmp_path / "train" / "masks" / "alone.png")
    assert len(data.load(f"segment:{tmp_path}").train) == 8
    assert "1 masks without an image are left out" in capsys.readouterr().out


def save_mask(value, size=(18, 18)):
    return lambda path: Image.new("L", size, value).save(path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (save_mask(1, (9, 18)), "mask is 9x18 pixels, the image 18x18"),
        (save_mask(3), "has the class 3, and they go from 0 to 2"),
        (lambda path: path.write_bytes(b"no image"), "cannot identify"),
        (lambda path: Image.new("RGB", (18, 18)).save(path), "its mask is RGB"),
    ],
)
def test_a_pair_that_can_not_be_used_is_skipped_counted_and_never_scored(tmp_path, capsys, spoil, words):
    """Its test mask is -1 everywhere; in training the next pair stands in. More than 5 % of them end the run."""
    write_pairs(tmp_path, train=24, val=24)
    (tmp_path / "classes.txt").write_text("0\n1\n2\n")
    for split in ("train", "val"):
        spoil(tmp_path / split / "masks" / "0.png")
    dataset = data.load(f"segment:{tmp_path}")
    for split in dataset.train, dataset.test:
        split.workers = 0
    tested = [mask for _, mask in dataset.test.test_batches((16, 16), 4, CPU)]
    assert [bool((mask == -1).all()) for mask in tested] == [True] + [False] * 23
    assert list(dataset.test.unreadable) == [str(tmp_path / "val" / "images" / "0.png")]
    assert words in capsys.readouterr().err
    seen = torch.cat([masks for _, masks in batches(dataset.train, range(6))])
    assert seen.min() >= 0
    assert len(dataset.train.unreadable) == 1
    spoil(tmp_path / "val" / "masks" / "1.png")
    with pytest.raises(image_folder.UnreadableImages, match="more than 5 %"):
        list(data.load(f"segment:{tmp_path}").test.test_batches((16, 16), 4, CPU))


def test_of_ade20k_151_is_no_class(tmp_path):
    write_ade20k(tmp_path, n=1)
    split = data.load(f"ade20k:{tmp_path}").test
    Image.new("L", (24, 20), 151).save(tmp_path / "annotations" / "validation" / "ADE_val_00000000.png")
    with pytest.raises(ValueError, match="class 151, and they go from 1 to 150"):
        split.read(0, (16, 16), None, None)
    Path(tmp_path, "objectInfo150.txt").write_text("Idx\tName\n1\twall\n")
    with pytest.raises(ValueError, match="is damaged"):
        data.load(f"ade20k:{tmp_path}")
    Path(tmp_path, "objectInfo150.txt").unlink()
    assert data.load(f"ade20k:{tmp_path}").classes == [str(i) for i in range(1, 151)]
