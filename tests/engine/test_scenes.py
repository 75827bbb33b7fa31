"""What engine/scenes.py promises: scenes that are a function of (seed, index, epoch), and what is known of them.

Each `..._loops` function is an oracle: float64, one item and one of its values at a time, from the definition alone.
"""

import numpy as np
import pytest
import torch
from PIL import Image

import data
from engine import scenes
from tests.engine.runs import PLAIN

QUARTERS = pytest.mark.parametrize("quarters", [1, 2])


def rings(n, seed=0):
    """n items (n, 28, 28) uint8: a bright ring around a dark middle, of any size and place; labels (n,)."""
    rng = np.random.default_rng(seed)
    images = np.zeros((n, 28, 28), np.uint8)
    for image in images:
        (top, left), (h, w) = rng.integers(0, 10, 2), rng.integers(8, 19, 2)
        image[top : top + h, left : left + w] = rng.integers(9, 256, (h, w))
        image[top + 2 : top + h - 2, left + 2 : left + w - 2] = 0
    return torch.from_numpy(images), torch.arange(n) % 10


def photographs(value=None):
    """Two photographs of 120 x 110 and 120 x 100 pixels: noise, or of one value."""
    noise = torch.randint(256, (2, 3, 120, 110), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return noise if value is None else torch.full_like(noise, value)


def world(n=23, quarters=1, items=None, value=None):
    """A split of n scenes, of rings before noise unless told otherwise."""
    side = data.NATIVE_SIZE["scenes" if quarters == 1 else "scenes-many"]
    items, labels = rings(n) if items is None else (items, torch.arange(n) % 10)
    return scenes.Scenes(
        items, labels, photographs(value), torch.tensor([[120, 110], [120, 100]]), *PLAIN, side, quarters
    )


def together(batches):
    """images, labels, and of the objects labels, masks, boxes, of all batches."""
    columns = zip(*([*batch, *objects] for *batch, objects in batches), strict=True)
    return [torch.cat(column) for column in columns]


def train(split, batch_size, steps, seed=0, shard=slice(None), size=None):
    how = size or (split.canvas,) * 2, batch_size, steps, seed, None, "cpu", shard
    return together(split.train_batches(*how, objects=True))


def fixed(split, batch_size=100, shard=slice(None), size=None):
    return together(split.test_batches(size or (split.canvas,) * 2, batch_size, "cpu", shard, objects=True))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def pixels(images):
    """Normalised images -> what they were, 0 to 255."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in PLAIN)
    return 255 * (images * std + mean)


# ---------------------------------------------------------------------------------------------
# What a scene is
# ---------------------------------------------------------------------------------------------


def inside_loops(item):
    """Which pixels belong to an item: bright ones, above 8, and those with bright ones to all four sides."""
    inside = np.zeros((28, 28))
    for y in range(28):
        for x in range(28):
            sides = item[: y + 1, x], item[y:, x], item[y, : x + 1], item[y, x:]
            inside[y, x] = all((side > 8).any() for side in sides)
    return inside


def test_an_item_is_what_is_bright_and_what_lies_between():
    """Bright is above 8. A hole is inside; a gap that is open to one side is not, as that between two legs."""
    rng = np.random.default_rng(0)
    items = np.where(rng.random((8, 28, 28)) < 0.06, rng.integers(0, 256, (8, 28, 28)), rng.integers(0, 9, (8, 28, 28)))
    np.testing.assert_array_equal(
        scenes.silhouette(torch.from_numpy(items).float()), [inside_loops(item) for item in items]
    )
    legs = torch.zeros(28, 28)
    legs[4:24, 8:20] = 9
    legs[8:24, 12:16] = 0
    for turns in range(4):
        inside = scenes.silhouette(legs.rot90(turns)).rot90(-turns)
        assert torch.equal(inside, (legs > 0).float())
    legs[23] = 9  # a skirt with a hole
    assert scenes.silhouette(legs)[8:24, 12:16].all()


def scene_loops(split, index, draw):
    """The scene that these numbers give: image (3, side, side) in [0, 255], coverage (S, side, side), items (S,)."""
    side, quarters = split.canvas, split.quarters
    photo = int(draw[0] * 2)
    height, width = (120, 110) if photo == 0 else (120, 100)
    top, left = int(draw[1] * (height - side + 1)), int(draw[2] * (width - side + 1))
    image = split.photographs[photo, :, top : top + side, left : left + side].double().numpy()
    numbers = draw[4:].reshape(-1, 7)
    places = [sorted(numbers[:, 1]).index(number) for number in numbers[:, 1]]  # of each quarter's number in the order
    places = [places.index(k) for k in range(len(numbers))]  # item k gets the quarter with the k-th smallest number
    covered, which = np.zeros((len(numbers), side, side)), []
    for k, (other, _, top, left, scale, mirrored, contrast) in enumerate(numbers):
        which.append(index if k == 0 else int(other * len(split)))
        if k > int(draw[3] * len(numbers)):
            continue
        item, cell = split.items[which[k]].double().numpy(), side / quarters
        item = item[:, ::-1] if mirrored < 0.5 else item
        scale, contrast = 1 + 0.5 * scale, 0.6 + 0.4 * contrast
        room = cell - 29 * scale
        top = places[k] // quarters * cell + scale / 2 + top * room
        left = places[k] % quarters * cell + scale / 2 + left * room
        grey, inside, centres = np.zeros((side, side)), inside_loops(item), np.arange(side) + 0.5
        for y in range(28):
            for x in range(28):
                down = np.maximum(0, 1 - abs(centres - (top + (y + 0.5) * scale)) / scale)
                across = np.maximum(0, 1 - abs(centres - (left + (x + 0.5) * scale)) / scale)
                covered[k] += inside[y, x] * np.outer(down, across)
                grey += inside[y, x] * (127.5 + contrast * (item[y, x] - 127.5)) * np.outer(down, across)
        image = (1 - covered[k]) * image + grey
    return image, covered, which


@QUARTERS
def test_a_scene_is_what_its_numbers_say(quarters):
    """Against loops. Sums of four products in float32 of values up to 255: 1e-2 is hundreds of roundings of them."""
    split = world(7, quarters)
    draw = torch.rand(4, 4 + 7 * quarters**2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draw[:, 3] = torch.tensor([0.1, 0.3, 0.6, 0.9])  # each count
    index = torch.tensor([6, 0, 3, 3])
    images, covered, which = split.compose(index, draw.float())
    for i in range(4):
        image, share, items = scene_loops(split, int(index[i]), draw[i].float().double().numpy())
        np.testing.assert_allclose(images[i], image, rtol=0, atol=1e-2)
        np.testing.assert_allclose(covered[i], share, rtol=0, atol=1e-4)
        assert which[i].tolist() == items
    assert set(covered.flatten(2).any(dim=2).sum(dim=1).tolist()) == ({1} if quarters == 1 else {1, 2, 3, 4})


@QUARTERS
def test_masks_are_where_the_background_is_hidden(quarters):
    """Measured from outside: a pixel that an item covers by c is the darker by 255 (1 - c) before a black wall than
    before a white one. A mask is where c is a half and more; where c is 0 the photograph is as it was."""
    black, white, noise = (fixed(world(23, quarters, value=value)) for value in (0, 255, None))
    covered = 1 - (pixels(white[0]) - pixels(black[0]))[:, 0] / 255  # (n, side, side)
    sure = (covered - 0.5).abs() > 1e-4  # but for rounding
    assert sure.float().mean() > 0.999
    assert torch.equal(black[3].any(dim=1)[sure], (covered >= 0.5)[sure])
    split = world(23, quarters)
    draw = split.draw(torch.arange(23), 0)
    for i, (photo, top, left) in enumerate(draw[:, :3].tolist()):
        top, left = int(top * (121 - split.canvas)), int(left * ((111, 101)[int(photo * 2)] - split.canvas))
        window = split.photographs[int(photo * 2), :, top : top + split.canvas, left : left + split.canvas]
        untouched = ((pixels(noise[0][i]) - window).abs() < 1e-3).all(dim=0)
        assert untouched[covered[i] < 1e-6].all(), "what no item covers"
        assert not untouched[covered[i] > 0.1].any(), "a ring is not the noise behind it"


@QUARTERS
def test_boxes_are_the_bounds_of_masks(quarters):
    """Left, top, right, bottom; the pixel at the right and at the bottom is the first outside."""
    _, labels, classes, masks, boxes = fixed(world(23, quarters))
    for known, mask, box in zip(classes.flatten(), masks.flatten(0, 1), boxes.flatten(0, 1), strict=True):
        y, x = mask.numpy().nonzero()
        assert box.tolist() == ([x.min(), y.min(), x.max() + 1, y.max() + 1] if known >= 0 else [0, 0, 0, 0])
    assert torch.equal(classes[:, 0], labels), "the first item is the scene's own"
    assert (classes[:, 1:] == -1).any() == (quarters == 2), "where there is no item, there is no class"


def test_edges_are_soft_and_have_no_fringe(monkeypatch):
    """From 0 to 1 within three pixels, the items being up to 1.5 times as large. A white item before a white wall is
    not to be seen: its black surroundings do not leak into the edge."""
    monkeypatch.setattr(scenes, "CONTRAST", (1.0, 1.0))
    square = torch.zeros(1, 28, 28, dtype=torch.uint8)
    square[:, 6:22, 6:22] = 255
    square = square.expand(50, -1, -1)
    torch.testing.assert_close(pixels(fixed(world(50, items=square, value=255))[0]), torch.full((50, 3, 64, 64), 255.0))
    images, _, _, masks, _ = fixed(world(50, items=square, value=0))
    for image, mask in zip(pixels(images)[:, 0] / 255, masks[:, 0], strict=True):
        row = image[int(mask.any(dim=1).nonzero().float().mean())]  # through the middle
        between = ((row > 1e-3) & (row < 1 - 1e-3)).sum()
        assert 2 <= between <= 6
        assert row.max() == pytest.approx(1, abs=1e-4)


def test_sizes_and_places_are_evenly_spread():
    """1 to 1.5 times 28 pixels, anywhere in the image, mirrored half of the time. 800 scenes: bounds are five
    standard errors, of uniform numbers or of a coin."""
    items = torch.full((1, 28, 28), 200, dtype=torch.uint8)
    items[:, :, :14] = 100
    split = world(800, items=items.expand(800, -1, -1), value=0)
    images, _, _, _, boxes = train(split, 800, [0])
    left, top, right, bottom = boxes[:, 0].double().T
    assert ((right - left) - (bottom - top)).abs().max() <= 1, "not stretched"
    side = right - left
    assert 27 <= side.min() <= 29
    assert 41 <= side.max() <= 43
    assert side.mean() == pytest.approx(35, abs=5 * 14 / 12**0.5 / 800**0.5)
    for low, high in ((left, right), (top, bottom)):
        assert low.min() <= 1
        assert high.max() >= 63
        share = low / (64 - side)  # of the room that is left
        assert share.mean() == pytest.approx(0.5, abs=0.01 + 5 / 12**0.5 / 800**0.5)
        assert share.std() == pytest.approx(1 / 12**0.5, rel=0.1)
    halves = [pixels(images[i, 0])[:, int(left[i]) : int(right[i])] for i in range(200)]
    mirrored = [part[:, : part.shape[1] // 2].sum() > part[:, part.shape[1] // 2 :].sum() for part in halves]
    assert sum(mirrored) == pytest.approx(100, abs=5 * 50**0.5)


def test_one_to_four_items_each_have_a_quarter():
    """Every count and every quarter as often as any other, by five standard errors; no two items touch one pixel."""
    split, index = world(400, 2), torch.arange(60)
    split.labels = torch.arange(400)  # each item has a class of its own
    _, covered, which = split.compose(index, split.draw(index, 0))
    assert ((covered > 0).sum(dim=1) <= 1).all()
    _, _, classes, masks, boxes = fixed(split)
    there = (covered >= 0.5).flatten(2).any(dim=2)
    assert torch.equal(classes[:60], torch.where(there, which, -1)), "classes are those of the items that are seen"
    counts = (classes >= 0).sum(dim=1)
    assert counts.bincount(minlength=5).tolist() == pytest.approx([0] + [100] * 4, abs=5 * 75**0.5)
    assert ((classes >= 0).int().diff(dim=1) <= 0).all(), "those that are there come first"
    centre = (boxes[..., :2] + boxes[..., 2:])[classes >= 0] / 2
    quarter = 2 * (centre[:, 1] > 48) + (centre[:, 0] > 48)
    assert quarter.bincount().tolist() == pytest.approx([250] * 4, abs=5 * 187**0.5)
    assert masks.any(dim=1).sum() == masks.sum(), "each pixel has one item"


@pytest.mark.parametrize("side", [32, 96])
def test_scenes_of_another_size_are_resized_with_their_truth(side):
    """As other small images are, by bicubic interpolation. Boxes and masks are of that size."""
    native, (images, *truth) = fixed(world()), fixed(world(), size=(side, side))
    torch.testing.assert_close(pixels(images), data.resize(pixels(native[0]), (side, side)), rtol=0, atol=1e-2)
    assert same(native[1:3], truth[:2])
    assert truth[2].shape == (23, 1, side, side)
    assert (truth[3] - native[4] * side / 64).abs().max() <= 2


@pytest.mark.parametrize("name", ["scenes", "scenes-many"])
def test_sizes_that_are_not_square_are_refused(name, clothes):
    """The middle of a scene may be without its item."""
    with pytest.raises(ValueError, match=r"^scenes are square, 64x96 would cut their items; give one size, as 64$"):
        data.load(name, (64, 96))


# ---------------------------------------------------------------------------------------------
# A function of (seed, index, epoch)
# ---------------------------------------------------------------------------------------------


@QUARTERS
def test_processes_share_the_batch_that_one_would_see(quarters):
    """R of them with B / R images each; a batch of 16 of 23 images belongs to two epochs, one of 64 to four."""
    split = world(quarters=quarters)
    for batch_size in (16, 64):
        whole = train(split, batch_size, [1])
        shards = [slice(i, i + batch_size // 4) for i in range(0, batch_size, batch_size // 4)]
        parts = [train(split, batch_size, [1], shard=shard) for shard in shards]
        assert same(whole, [torch.cat(column) for column in zip(*parts, strict=True)])


@QUARTERS
def test_a_run_that_goes_on_sees_what_it_would_have_seen(quarters):
    """Whatever was asked for before; and the size of a batch plays no part."""
    whole = train(world(quarters=quarters), 8, range(9))
    assert same([column[40:] for column in whole], train(world(quarters=quarters), 8, range(5, 9)))
    assert same(whole, train(world(quarters=quarters), 12, range(6)))


def test_training_scenes_depend_on_the_seed_and_the_epoch_and_nothing_else():
    """An item has another place before another background in the next epoch."""
    split = world()
    seen = [train(split, 23, [epoch], seed) for seed in (0, 1) for epoch in (0, 1)]
    for images, labels, *_ in seen:
        assert labels.sort().values.tolist() == split.labels.sort().values.tolist(), "every item once an epoch"
        assert images.flatten(1).unique(dim=0).shape[0] == 23
    everything = torch.cat([images for images, *_ in seen]).flatten(1)
    assert everything.unique(dim=0).shape[0] == 4 * 23
    tested = fixed(split)[0].flatten(1)
    assert torch.cat([everything, tested]).unique(dim=0).shape[0] == 5 * 23, "test scenes are none of those"


@QUARTERS
def test_test_scenes_are_the_same_in_every_run(quarters):
    """They depend on the index alone: not on batches, processes, nor on what was trained before."""
    split = world(quarters=quarters)
    whole = fixed(split)
    train(split, 4, [7], seed=3)
    assert same(whole, fixed(split, 5))
    parts = [fixed(split, 4, slice(rank, None, 3)) for rank in range(3)]
    for rank, part in enumerate(parts):
        assert same([column[rank::3] for column in whole], part)


def test_a_part_has_the_same_scenes():
    """--labels, and what is held out to choose a learning rate: numbers go with the item, not with its place."""
    split, keep = world(), torch.tensor([20, 3, 4])
    assert same([column[keep] for column in fixed(split)], fixed(split.part(keep)))
    assert same(fixed(split.part(keep).part(torch.tensor([1]))), fixed(split.part(torch.tensor([3]))))
    few = split.subset(10, seed=0)
    assert sorted(few.labels.tolist()) == list(range(10))
    assert len(split) == 23, "as it was"


def test_a_part_of_a_world_of_several_items_shows_none_of_the_others():
    """Else labels that were left out would be seen."""
    split = world(40, 2)
    split.labels = (torch.arange(40) >= 20).long()
    assert set(fixed(split.part(torch.arange(20)))[2].flatten().tolist()) == {0, -1}


def test_numbers_do_not_depend_on_how_many_are_drawn():
    """So parts are cut from what the whole split has."""
    assert torch.equal(scenes.numbers(50, 4, 3, 8)[:7], scenes.numbers(7, 4, 3, 8))
    draw = scenes.numbers(1000, 1, 0, 8)
    assert draw.shape == (1000, 11)
    assert draw.min() >= 0
    assert draw.max() < 1
    assert np.abs(np.corrcoef(draw.T.numpy()) - np.eye(11)).max() < 5 / 1000**0.5, "no two columns go together"


# ---------------------------------------------------------------------------------------------
# The data
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def clothes(monkeypatch):
    """20 training and 10 test items in place of Fashion-MNIST's 70,000."""
    splits = []
    for n, seed in ((20, 1), (10, 2)):
        images, labels = rings(n, seed)
        splits.append(data.InMemory(images[:, None], labels, (0.0,), (1.0,)))
    dataset = data.Dataset("fashion-mnist", data.FASHION_MNIST, (0.0,), (1.0,), *splits)
    monkeypatch.setattr(data, "fashion_mnist", lambda folder: dataset)
    return dataset


@pytest.mark.parametrize(("name", "side", "items"), [("scenes", 64, 1), ("scenes-many", 96, 4)])
def test_scenes_are_data_like_any_other(name, side, items, clothes):
    """By name; test scenes have test items; the clothes' classes; at their native size unless told otherwise."""
    dataset = data.load(name)
    assert (dataset.name, dataset.classes, data.NATIVE_SIZE[name]) == (name, data.FASHION_MNIST, side)
    assert name in data.NAMES
    for split, source in ((dataset.train, clothes.train), (dataset.test, clothes.test)):
        assert torch.equal(split.items, source.images[:, 0])
        assert torch.equal(split.labels, source.labels)
        assert (split.mean, split.std, split.unreadable) == (dataset.mean, dataset.std, {})
    images, labels, objects = next(dataset.train.train_batches((side, side), 8, [0], 0, None, "cpu", objects=True))
    assert images.shape == (8, 3, side, side)
    assert objects.masks.shape == (8, items, side, side)
    assert torch.equal(next(dataset.train.train_batches((side, side), 8, [0], 0, (0.2, 1.0), "cpu"))[0], images)
    half = data.to_plus_minus_1(dataset)
    images, _ = next(half.test.test_batches((side, side), 10, "cpu"))
    assert images.min() >= -1
    assert images.max() <= 1


def test_pixels_have_mean_0_and_deviation_1(clothes):
    """Over training scenes, of each channel; the constants were measured with the real items, so a fifth is allowed."""
    split = data.load("scenes").train
    images = torch.cat([images for images, _ in split.train_batches((64, 64), 100, range(4), 0, None, "cpu")])
    assert images.mean(dim=(0, 2, 3)).abs().max() < 0.2
    assert (images.std(dim=(0, 2, 3)) - 1).abs().max() < 0.2


def test_tests_show_no_part_of_a_photograph_that_training_sees(monkeypatch):
    """Each photograph here is as bright at a column as that is far to the right: 0 to 255, of any size."""
    sizes = iter([(256, 200), (700, 350), (301, 400)] * 3)

    def ramp(path):
        width, height = next(sizes)
        columns = np.linspace(0, 255, width).round().astype(np.uint8)
        return Image.fromarray(np.tile(columns, (height, 1)))

    monkeypatch.setattr(scenes, "PHOTOS", ["a.png", "b.png", "c.png"])
    monkeypatch.setattr(scenes.Image, "open", ramp)
    (train_images, train_sizes), (test_images, test_sizes) = scenes.photographs.__wrapped__()
    for k in range(3):
        (h, w), (test_h, test_w) = train_sizes[k].tolist(), test_sizes[k].tolist()
        assert h == test_h == scenes.HEIGHT
        seen, tested = train_images[k, :, :h, :w], test_images[k, :, :h, :test_w]
        assert 168 <= seen.max() <= 170 <= tested.min() <= 172
        assert (seen.min(), tested.max()) == (0, 255)


def test_the_photographs_are_large_enough_for_every_scene():
    """And training has the left two thirds of each, tests the right third."""
    for images, sizes in scenes.photographs():
        assert len(images) == len(sizes) == len(scenes.PHOTOS)
        assert sizes.min() >= data.NATIVE_SIZE["scenes-many"]
        assert images.shape == (len(sizes), 3, *sizes.amax(dim=0).tolist())
    widths = [sizes[:, 1].double() for _, sizes in scenes.photographs()]
    torch.testing.assert_close(
        widths[0] / widths[1], torch.full((len(scenes.PHOTOS),), 2.0).double(), rtol=0.02, atol=0
    )
