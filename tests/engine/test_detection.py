"""The pieces of ViTDet's Mask R-CNN: each against a loop in float64 from its definition and, where it is installed,
against torchvision on the same inputs."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vit
from downstream import detection, precision
from downstream.detection import decode, encode, match, overlap, roi_align, sample, suppress
from engine import coco
from engine.scenes import Objects


def random_boxes(*shape, seed=0, side=40.0, double=False):
    """Boxes (*shape, 4) in an image of side x side."""
    rng = torch.Generator().manual_seed(seed)
    corners = torch.rand(*shape, 2, 2, generator=rng, dtype=torch.float64) * (side - 1)
    low, high = corners.amin(dim=-2), corners.amax(dim=-2) + 1
    boxes = torch.cat([low, high], dim=-1)
    return boxes if double else boxes.float()


def iou_of(a, b):
    """Intersection over union of two boxes."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


# ---------------------------------------------------------------------------------------------
# Boxes
# ---------------------------------------------------------------------------------------------


def test_overlap_is_the_intersection_over_the_union():
    first, second = random_boxes(2, 5, double=True), random_boxes(2, 7, seed=1, double=True)
    expected = [[[iou_of(a, b) for b in second[i]] for a in first[i]] for i in range(2)]
    torch.testing.assert_close(overlap(first, second), torch.tensor(expected, dtype=torch.float64))
    assert overlap(torch.zeros(1, 4), torch.zeros(1, 4)) == 0  # empty boxes, of padding


def test_the_code_of_a_box_is_that_of_r_cnn():
    """Girshick et al. 2014, appendix C: t_x = (G_x - P_x) / P_w, t_w = log(G_w / P_w), weighted as in Fast R-CNN."""
    boxes, anchors = random_boxes(9, double=True), random_boxes(9, seed=1, double=True)
    for code, b, a in zip(encode(boxes, anchors, (10, 10, 5, 5)), boxes.tolist(), anchors.tolist(), strict=True):
        w, h = a[2] - a[0], a[3] - a[1]
        x, y = 10 * ((b[0] + b[2]) / 2 - (a[0] + a[2]) / 2) / w, 10 * ((b[1] + b[3]) / 2 - (a[1] + a[3]) / 2) / h
        expected = x, y, 5 * math.log((b[2] - b[0]) / w), 5 * math.log((b[3] - b[1]) / h)
        torch.testing.assert_close(code, torch.tensor(expected, dtype=torch.float64))


def test_decoding_undoes_encoding_and_bounds_the_growth():
    boxes, anchors = random_boxes(3, 9), random_boxes(3, 9, seed=1)
    torch.testing.assert_close(decode(encode(boxes, anchors, (10, 10, 5, 5)), anchors, (10, 10, 5, 5)), boxes)
    box = decode(torch.tensor([0.0, 0.0, 50.0, 0.0]), torch.tensor([0.0, 0.0, 16.0, 16.0]))
    torch.testing.assert_close(box, torch.tensor([8 - 500.0, 0.0, 8 + 500.0, 16.0]))


def test_anchors_have_one_area_and_stand_at_the_corners_of_the_places():
    """detectron2's anchor_generator.py with offset 0: width = sqrt(area / aspect), height = aspect * width."""
    expected = []
    for row in range(2):
        for column in range(3):
            for aspect in (0.5, 1, 2):
                w = math.sqrt(32**2 / aspect)
                h = aspect * w
                expected.append([column * 4 - w / 2, row * 4 - h / 2, column * 4 + w / 2, row * 4 + h / 2])
    torch.testing.assert_close(detection.anchors_of((2, 3), 4.0), torch.tensor(expected))


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("labelled", [False, True])
def test_suppression_is_greedy(threshold, labelled):
    """From the best on, each box that stays takes all later ones of its class that overlap it more."""
    boxes, rng = random_boxes(3, 60), torch.Generator().manual_seed(2)
    there = torch.rand(3, 60, generator=rng) < 0.9
    labels = torch.randint(2, (3, 60), generator=rng) if labelled else None
    stays = suppress(boxes, there, threshold, labels)
    for i in range(3):
        kept = []
        table = [[iou_of(a, b) for b in boxes[i].tolist()] for a in boxes[i].tolist()]
        for j in range(60):
            same = [k for k in kept if labels is None or labels[i, k] == labels[i, j]]
            if there[i, j] and all(table[k][j] <= threshold for k in same):
                kept.append(j)
        assert stays[i].nonzero()[:, 0].tolist() == kept


def test_suppression_follows_a_chain():
    """Each box overlaps the next one alone: the first goes on, the second goes, the third stays, and so on."""
    left = torch.arange(9.0) * 4
    boxes = torch.stack([left, left * 0, left + 10, left * 0 + 10], dim=1)[None]
    assert suppress(boxes, torch.ones(1, 9, dtype=torch.bool), 0.3).tolist() == [[True, False] * 4 + [True]]


# ---------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high", "rescue"), [(0.3, 0.7, True), (0.3, 0.7, False), (0.5, 0.5, False)])
def test_matching_follows_its_thresholds(low, high, rescue):
    """Faster R-CNN, section 3.1.2: (i) the anchors with the highest overlap with an object, (ii) any above 0.7."""
    boxes, others = random_boxes(3, 4), random_boxes(80, seed=1)
    there = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]) > 0
    kind, matched = match(boxes, there, others, low, high, rescue)
    for i in range(3):
        objects = there[i].nonzero()[:, 0].tolist()
        table = [[iou_of(boxes[i, s].tolist(), other) for other in others.tolist()] for s in objects]
        table = np.array(table).reshape(-1, 80)
        for j in range(80):
            most = table[:, j].max(initial=0)
            expected = 1 if most >= high else 0 if most < low else -1
            if rescue and any(row[j] == row.max() for row in table):
                expected = 1
            assert kind[i, j] == expected
            if most:
                assert matched[i, j] == objects[table[:, j].argmax()]


def test_samples_are_a_share_of_objects_and_background_for_the_rest():
    rng = torch.Generator().manual_seed(0)
    kind = torch.randint(-1, 2, (4, 200), generator=rng)
    kind[1, 3:] = kind[1, 3:].clamp(max=0)  # few with an object
    kind[2] = kind[2].clamp(min=-1, max=0)  # none
    kind[3, 5:] = -1  # hardly anything
    noise = torch.rand(4, 200, generator=rng)
    index, taken = sample(kind, noise, 40, 0.25)
    for i in range(4):
        positive = sorted((kind[i] == 1).nonzero()[:, 0].tolist(), key=lambda j: noise[i, j])[:10]
        negative = sorted((kind[i] == 0).nonzero()[:, 0].tolist(), key=lambda j: noise[i, j])[: 40 - len(positive)]
        assert index[i, taken[i]].tolist() == positive + negative  # those with an object first
        assert taken[i].tolist() == [True] * len(positive + negative) + [False] * (40 - len(positive + negative))


def test_regions_are_proposals_and_the_boxes_of_the_objects():
    """An object that no proposal finds is learned from all the same; background has the class after the last."""
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0], [0.0, 0.0, 0.0, 0.0]]])
    labels = torch.tensor([[3, 1, -1]])
    proposals = torch.tensor([[[21.0, 20.0, 30.0, 30.0], [12.0, 0.0, 18.0, 8.0], [0.0, 0.0, 10.0, 5.1]]])
    there = torch.tensor([[True, True, False]])
    regions, classes, matched, taken = detection.sample_regions(
        proposals, there, labels, boxes, torch.rand(1, 9), 16, 5
    )
    found = {
        tuple(box): (label, n)
        for box, label, n in zip(*(v[taken].tolist() for v in (regions, classes, matched)), strict=True)
    }
    assert taken.sum() == 4
    assert found[0.0, 0.0, 10.0, 10.0] == (3, 0)
    assert found[20.0, 20.0, 30.0, 30.0] == found[21.0, 20.0, 30.0, 30.0] == (1, 1)
    assert found[12.0, 0.0, 18.0, 8.0][0] == 5


# ---------------------------------------------------------------------------------------------
# Regions
# ---------------------------------------------------------------------------------------------


def between(map, y, x):
    """The value of a map (C, h, w) between its values, of which the first lies at 0.5; beyond the border it goes on."""
    y, x = min(max(y - 0.5, 0), map.shape[1] - 1), min(max(x - 0.5, 0), map.shape[2] - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, map.shape[1] - 1), min(left + 1, map.shape[2] - 1)
    v, u = y - top, x - left
    above = (1 - u) * map[:, top, left] + u * map[:, top, right]
    return (1 - v) * above + v * ((1 - u) * map[:, bottom, left] + u * map[:, bottom, right])


def test_roi_align_is_the_mean_of_four_samples_a_bin():
    """He et al. 2017, section 3; the map by FPN's eq. 1, k = floor(4 + log2(side / 224)), stride 2^k."""
    rng = torch.Generator().manual_seed(0)
    sides, strides = ((40, 36), (20, 18), (10, 9)), [4.0, 8.0, 16.0, 32.0]
    maps = [torch.randn(2, 3, *side, generator=rng) for side in sides]
    regions = random_boxes(2, 6, side=140)
    regions[0, 0], regions[1, 0] = torch.tensor([0.0, 0.0, 144.0, 160.0]), torch.tensor([140.0, 3.0, 144.0, 5.0])
    out = roi_align(maps, strides, regions, 5).view(2, 6, 3, 5, 5)
    used = set()
    for b in range(2):
        for k in range(6):
            left, top, right, bottom = regions[b, k].double().tolist()
            level = math.floor(4 + math.log2(math.sqrt((right - left) * (bottom - top)) / 224)) - 2
            level = min(max(level, 0), 2)
            used.add(level)
            map, stride = maps[level][b].double().numpy(), strides[level]
            for i in range(5):
                for j in range(5):
                    value = 0
                    for v in (0.25, 0.75):
                        for u in (0.25, 0.75):
                            y, x = top + (i + v) * (bottom - top) / 5, left + (j + u) * (right - left) / 5
                            value = value + between(map, y / stride, x / stride) / 4
                    np.testing.assert_allclose(out[b, k, :, i, j].numpy(), value, rtol=1e-4, atol=2e-4)
    assert used == {0, 1}
    large = torch.tensor([[[0.0, 0.0, 1000.0, 1000.0]]])  # the coarsest map, which is not the last stride
    constant = [torch.full((1, 1, 4, 4), float(n)) for n in range(3)]
    assert roi_align(constant, strides, large, 2).flatten().tolist() == [2.0] * 4


def test_mask_targets_are_the_pixels_under_the_bins():
    masks = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    masks[:, :, 5:15, 5:15] = True
    regions, matched = random_boxes(2, 4, side=20), torch.tensor([[0, 2, 1, 0], [1, 1, 2, 0]])
    out = detection.mask_targets(masks, matched, regions, 3)
    for b in range(2):
        for k in range(4):
            left, top, right, bottom = regions[b, k].tolist()
            for i in range(3):
                for j in range(3):
                    ys = [int(top + (bottom - top) * (4 * i + n + 0.5) / 12) for n in range(4)]
                    xs = [int(left + (right - left) * (4 * j + n + 0.5) / 12) for n in range(4)]
                    inside = sum(masks[b, matched[b, k], y, x].item() for y in ys for x in xs)
                    assert out[b, k, i, j] == (inside >= 8)


def test_a_pasted_mask_fills_its_box():
    masks = torch.zeros(2, 28, 28)
    masks[0], masks[1, :, :14] = 1.0, 1.0  # all, and the left half
    boxes = torch.tensor([[2.0, 3.0, 12.0, 9.0], [0.0, 0.0, 28.0, 28.0]])
    whole, half = precision.paste(masks, boxes, (30, 32))
    expected = torch.zeros(30, 32, dtype=torch.bool)
    expected[3:9, 2:12] = True
    assert torch.equal(whole, expected)
    assert half.sum() == 14 * 28
    assert half[:28, :14].all()


# ---------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------


def example(b=3, S=4, A=50, K=12, classes=5):
    """Outputs, truth and samples of b images, the last of which has no object."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (b, S), generator=rng)
    labels[1:2, 2:], labels[-1] = -1, -1
    e = SimpleNamespace(labels=labels, boxes=random_boxes(b, S), anchors=random_boxes(A, seed=1), classes=classes)
    e.logits, e.deltas = torch.randn(b, A, generator=rng), torch.randn(b, A, 4, generator=rng)
    e.noise = torch.rand(b, A, generator=rng)
    e.regions, e.matched = random_boxes(b, K, seed=2), torch.randint(2, (b, K), generator=rng)
    e.kinds = torch.randint(classes + 1, (b, K), generator=rng)
    e.kinds[-1], e.taken = classes, torch.rand(b, K, generator=rng) < 0.8
    e.scores = torch.randn(b, K, classes + 1, generator=rng)
    e.codes = torch.randn(b, K, classes, 4, generator=rng)
    return e


def test_rpn_losses_are_sums_over_the_samples_by_their_number():
    e = example()
    objectness, box = detection.rpn_losses(e.logits, e.deltas, e.anchors, e.labels, e.boxes, e.noise, 16)
    kind, matched = match(e.boxes, e.labels >= 0, e.anchors, 0.3, 0.7, rescue=True)
    index, taken = sample(kind, e.noise, 16, 0.5)
    expected = np.zeros(2)
    for b in range(3):
        for a in index[b, taken[b]].tolist():
            p = 1 / (1 + math.exp(-e.logits[b, a].item()))
            expected[0] -= math.log(p if kind[b, a] == 1 else 1 - p)
            if kind[b, a] == 1:
                code = encode(e.boxes[b, matched[b, a]].double(), e.anchors[a].double())
                expected[1] += (e.deltas[b, a].double() - code).abs().sum().item()
    np.testing.assert_allclose([objectness.item(), box.item()], expected / (16 * 3), rtol=1e-4)


def box_losses(e, images):
    scores, codes = e.scores[images].flatten(0, 1), e.codes[images].flatten(0, 1)
    rest = (v[images] for v in (e.regions, e.kinds, e.boxes, e.matched, e.taken))
    return detection.box_losses(scores, codes, *rest)


def test_box_losses_are_means_over_the_regions_of_an_image():
    e = example()
    expected = np.zeros(2)
    for b in range(3):
        n = e.taken[b].sum().item()
        for k in e.taken[b].nonzero()[:, 0].tolist():
            scores, label = e.scores[b, k].double().numpy(), e.kinds[b, k].item()
            expected[0] += (np.log(np.exp(scores).sum()) - scores[label]) / n / 3
            if label < e.classes:
                code = encode(e.boxes[b, e.matched[b, k]].double(), e.regions[b, k].double(), (10, 10, 5, 5))
                expected[1] += (e.codes[b, k, label].double() - code).abs().sum().item() / n / 3
    np.testing.assert_allclose([v.item() for v in box_losses(e, slice(None))], expected, rtol=1e-4)


def test_mask_loss_is_a_mean_over_the_objects_of_an_image():
    rng = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(3, 4, 6, 6, generator=rng), (torch.rand(3, 4, 6, 6, generator=rng) < 0.5).float()
    found = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]) > 0
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    each = -np.log(np.where(targets.numpy() > 0, p, 1 - p)).mean(axis=(2, 3))
    expected = ((each[0, 0] + each[0, 1]) / 2 + each[1, 0]) / 3  # an image without an object adds nothing
    np.testing.assert_allclose(detection.mask_loss(logits, targets, found).item(), expected, rtol=1e-5)


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------


def small_encoder(side=32, **options):
    torch.manual_seed(0)
    known = dict(depth=2, pool="mean", class_token=False) | options
    return vit.create("vit_micro4", side, 0, **known)


def small_targets(*numbers, side=32):
    """`Objects` of images with so many objects each: squares."""
    targets, rng = [], torch.Generator().manual_seed(5)
    for n in numbers:
        low = torch.randint(0, side - 12, (n, 2), generator=rng)
        boxes, masks = torch.cat([low, low + 12], dim=1), torch.zeros(n, side, side, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.tolist(), strict=True):
            mask[top:bottom, left:right] = True
        targets.append(Objects(torch.arange(n) % 3, masks, boxes))
    return targets


def test_the_losses_of_a_batch_are_the_mean_of_those_of_its_images():
    """So micro-batches and processes may share a batch in any way; also with an image that has no object."""
    model = detection.Detector(small_encoder(), 3)
    images, targets = torch.randn(4, 3, 32, 32), small_targets(2, 0, 1, 3)
    noise = torch.rand(4, len(model.anchors))
    together = model(images, coco.collate(targets), noise)
    alone = [model(images[i : i + 1], coco.collate(targets[i : i + 1]), noise[i : i + 1]) for i in range(4)]
    assert set(together) == {"loss", "objectness", "rpn_box", "cls", "box", "mask"}
    for name, value in together.items():
        torch.testing.assert_close(value, sum(one[name] for one in alone) / 4, rtol=1e-4, atol=1e-5)


def test_every_weight_gets_a_gradient_even_if_no_image_has_an_object():
    """Else DistributedDataParallel waits for the others."""
    model = detection.Detector(small_encoder(), 3)
    losses = model(torch.randn(2, 3, 32, 32), coco.collate(small_targets(0, 0)), torch.rand(2, len(model.anchors)))
    losses["loss"].backward()
    assert losses["mask"] == losses["box"] == 0
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_pyramid_has_the_strides_of_its_scales():
    """ViTDet's 4 to 32 pixels, and one more by pooling, for a patch of 16; ours, for small models, start at half."""
    pyramid = detection.Pyramid(32, 8, detection.FULL.scales)
    assert [level.shape[1:] for level in pyramid(torch.zeros(1, 32, 4, 6))] == [
        (8, 16, 24), (8, 8, 12), (8, 4, 6), (8, 2, 3), (8, 1, 2)
    ]  # fmt: skip
    model = detection.Detector(small_encoder(), 3)
    assert model.strides == [2, 4, 8, 16]
    assert model.of_level == [3 * 16**2, 3 * 8**2, 3 * 4**2, 3 * 2**2]
    assert "anchors" not in model.state_dict()


def test_detections_are_sorted_inside_the_image_and_not_doubled():
    model = detection.Detector(small_encoder(), 3).eval()
    with torch.no_grad():
        model.box_head.scores.bias[1] = 3.0  # of a head that starts near zero: all are of class 1
        found = model(torch.randn(2, 3, 32, 32))
    assert found.boxes.shape[:2] == found.scores.shape == found.labels.shape == found.masks.shape[:2]
    assert found.masks.shape[2:] == (28, 28)
    for boxes, labels, scores in zip(found.boxes, found.labels, found.scores, strict=True):
        there = scores > 0
        assert there.any()
        assert (scores[there] > 0.05).all()
        assert scores.tolist() == sorted(scores.tolist(), reverse=True)
        assert (labels[there] == 1).all()
        assert boxes.min() >= 0
        assert boxes.max() <= 32
        table = overlap(boxes[there], boxes[there]).triu(1)
        assert (table <= 0.5).all()


def test_windows_attend_within_themselves_and_four_blocks_to_all():
    """A loop over windows; the last block of each quarter is global, in ViTDet's ViT-B blocks 2, 5, 8 and 11."""
    encoder = small_encoder((20, 28), depth=8)  # 5 x 7 patches
    whole = [block.attn.forward for block in encoder.blocks]
    detection.use_windows(encoder, 3)
    assert [block.attn.forward == before for block, before in zip(encoder.blocks, whole, strict=True)] == [
        False,
        True,
    ] * 4
    z = torch.randn(2, 35, 64)
    padded = torch.zeros(2, 6, 9, 64)
    padded[:, :5, :7] = z.view(2, 5, 7, 64)
    expected = torch.zeros_like(padded)
    for top in (0, 3):
        for left in (0, 3, 6):
            window = padded[:, top : top + 3, left : left + 3].reshape(2, 9, 64)
            expected[:, top : top + 3, left : left + 3] = whole[0](window).view(2, 3, 3, 64)
    torch.testing.assert_close(encoder.blocks[0].attn(z), expected[:, :5, :7].reshape(2, 35, 64))
    twelve = small_encoder(depth=12)
    before = [block.attn.forward for block in twelve.blocks]
    detection.use_windows(twelve, 4)
    same = [i for i, (block, old) in enumerate(zip(twelve.blocks, before, strict=True)) if block.attn.forward == old]
    assert same == [2, 5, 8, 11]


@pytest.mark.slow
def test_a_detector_learns_two_images_by_heart():
    model, targets = detection.Detector(small_encoder(), 3), small_targets(2, 2)
    images = torch.randn(2, 3, 32, 32) * 0.2
    for image, objects in zip(images, targets, strict=True):
        for label, mask in zip(objects.labels, objects.masks, strict=True):
            image[label, mask] += 2.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(150):
        noise = torch.rand(2, len(model.anchors), generator=torch.Generator().manual_seed(step))
        model(images, coco.collate(targets), noise)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found = model.eval()(images)
    entries = [
        (
            coco.truth_of(objects, i),
            precision.results_of(
                detection.Detections(*(v[i] for v in found)), dict(id=i, height=32, width=32), (32, 32)
            ),
        )
        for i, objects in enumerate(targets)
    ]
    scores = precision.average_precision(entries, ["a", "b", "c"])
    assert scores["ap_box"] > 0.8
    assert scores["ap_mask"] > 0.8


# ---------------------------------------------------------------------------------------------
# torchvision, where it is installed
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def torchvision():
    return pytest.importorskip("torchvision", exc_type=ImportError)


def test_roi_align_suppression_and_code_are_torchvisions(torchvision):
    from torchvision.models.detection._utils import BoxCoder

    maps, regions = [torch.randn(2, 3, 12, 14)], random_boxes(2, 5, side=48)
    theirs = torchvision.ops.roi_align(maps[0], list(regions), 7, 1 / 4, sampling_ratio=2, aligned=True)
    torch.testing.assert_close(roi_align(maps, [4.0], regions, 7), theirs, rtol=1e-4, atol=1e-4)
    boxes = random_boxes(200)
    scores = torch.rand(200).sort(descending=True).values
    stays = suppress(boxes[None], torch.ones(1, 200, dtype=torch.bool), 0.5)[0]
    assert stays.nonzero()[:, 0].tolist() == torchvision.ops.nms(boxes, scores, 0.5).tolist()
    labels = torch.randint(3, (200,))
    stays = suppress(boxes[None], torch.ones(1, 200, dtype=torch.bool), 0.3, labels[None])[0]
    theirs = torchvision.ops.batched_nms(boxes, scores, labels, 0.3)
    assert stays.nonzero()[:, 0].tolist() == theirs.sort().values.tolist()
    coder, anchors = BoxCoder((10.0, 10.0, 5.0, 5.0)), random_boxes(200, seed=1)
    torch.testing.assert_close(encode(boxes, anchors, (10, 10, 5, 5)), coder.encode_single(boxes, anchors))
    codes = torch.randn(200, 4) * 4
    torch.testing.assert_close(decode(codes, anchors, (10, 10, 5, 5)), coder.decode_single(codes, anchors))
    torch.testing.assert_close(overlap(boxes, anchors), torchvision.ops.box_iou(boxes, anchors))


def test_anchors_and_matches_are_torchvisions(torchvision):
    """torchvision rounds the sides of its anchors to whole pixels, so that halves of them differ by up to 1/2."""
    from torchvision.models.detection._utils import Matcher
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.image_list import ImageList

    generate = AnchorGenerator(((32,),), (detection.ASPECTS,))
    theirs = generate(ImageList(torch.zeros(1, 3, 32, 40), [(32, 40)]), [torch.zeros(1, 1, 8, 10)])[0]
    ours = detection.anchors_of((8, 10), 4.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.5)
    torch.testing.assert_close(ours[1::3], theirs[1::3])
    boxes, others = random_boxes(4), random_boxes(90, seed=1)
    for low, high, rescue in ((0.3, 0.7, True), (0.5, 0.5, False)):
        found = Matcher(high, low, rescue)(torchvision.ops.box_iou(boxes, others))
        kind, matched = match(boxes[None], torch.ones(1, 4, dtype=torch.bool), others, low, high, rescue)
        expected = torch.where(found >= 0, 1, torch.where(found == -1, 0, -1))
        assert torch.equal(kind[0], expected)
        assert torch.equal(matched[0, found >= 0], found[found >= 0])


def test_losses_are_those_of_torchvisions_mask_r_cnn(torchvision, monkeypatch):
    """On the same features and samples, of one image. torchvision smooths L1 below 1/9, where ViTDet does not: its
    loss is taken without. Its masks' targets are sampled in another way, so both get the same ones."""
    from torchvision.models.detection import roi_heads, rpn

    def plain_l1(a, b, beta=None, reduction="sum"):
        return F.l1_loss(a, b, reduction=reduction)

    functional = SimpleNamespace(**{**vars(F), "smooth_l1_loss": plain_l1})
    monkeypatch.setattr(roi_heads, "F", functional)
    monkeypatch.setattr(rpn, "F", functional)
    e = example(b=1)
    e.labels[:], e.kinds[0, :3], e.taken[:] = torch.arange(4), torch.arange(3), True

    index, taken = sample(match(e.boxes, e.labels >= 0, e.anchors, 0.3, 0.7, rescue=True)[0], e.noise, 16, 0.5)
    assert taken.all()
    network = rpn.RegionProposalNetwork(None, nn.Identity(), 0.7, 0.3, 16, 0.5, {}, {}, 0.7)
    sampler_kind = match(e.boxes, e.labels >= 0, e.anchors, 0.3, 0.7, rescue=True)
    chosen = torch.zeros(50, dtype=torch.bool).index_fill(0, index[0], True)
    positive = [chosen & (sampler_kind[0][0] == 1)]
    network.fg_bg_sampler = lambda labels: (positive, [chosen & ~positive[0]])
    labels, matched = network.assign_targets_to_anchors([e.anchors], [dict(boxes=e.boxes[0])])
    codes = network.box_coder.encode(matched, [e.anchors])
    theirs = network.compute_loss(e.logits.flatten()[:, None], e.deltas[0], labels, codes)
    ours = detection.rpn_losses(e.logits, e.deltas, e.anchors, e.labels, e.boxes, e.noise, 16)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs))

    # torchvision counts classes from 1, and background is 0.
    scores = torch.cat([e.scores[0][:, -1:], e.scores[0][:, :-1]], dim=1)
    labels = (e.kinds[0] + 1) % (e.classes + 1)
    codes = torch.cat([torch.zeros(12, 1, 4), e.codes[0]], dim=1).flatten(1)
    wanted = encode(e.boxes[0, e.matched[0]], e.regions[0], (10, 10, 5, 5))
    theirs = roi_heads.fastrcnn_loss(scores, codes, [labels], [wanted])
    torch.testing.assert_close(torch.stack(box_losses(e, slice(None))), torch.stack(theirs))

    logits, targets = torch.randn(3, e.classes + 1, 28, 28), (torch.rand(3, 28, 28) < 0.5).float()
    monkeypatch.setattr(roi_heads, "project_masks_on_boxes", lambda *_: targets)
    own = torch.tensor([1, 4, 2])
    theirs = roi_heads.maskrcnn_loss(logits, [None], [None], [own], [torch.arange(3)])
    monkeypatch.undo()
    ours = detection.mask_loss(logits[torch.arange(3), own][None], targets[None], torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(ours, theirs)


def test_mask_targets_are_close_to_torchvisions(torchvision):
    """It takes the mean of the mask between pixels, ours counts the pixels under 16 points: on a disc they differ in
    few bins, along its edge."""
    y, x = torch.meshgrid(torch.arange(100), torch.arange(100), indexing="ij")
    mask = ((y - 50) ** 2 + (x - 45) ** 2 < 30**2)[None]
    regions = torch.tensor([[[14.0, 19.0, 77.0, 82.0], [40.0, 40.0, 90.0, 70.0]]])
    ours = detection.mask_targets(mask[None], torch.zeros(1, 2, dtype=torch.int64), regions, 28)[0]
    boxes = torch.cat([torch.zeros(2, 1), regions[0]], dim=1)
    theirs = torchvision.ops.roi_align(mask[None].float(), boxes, 28, 1.0, aligned=True)[:, 0]
    assert ((theirs >= 0.5) != (ours > 0)).float().mean() < 0.01
