"""Semantic segmentation: each piece of UperNet and of its scores against loops in float64 from the definition, and
runs of train.py on a few small pictures with masks."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import train
import vit
from downstream import predict, segmentation
from engine import checkpoint as run_folder
from engine import weights
from tests.engine.runs import checkpoint, different, log, one_line, run, watch

K, TINY = 3, dict(dim=8, depth=3, num_heads=2, mlp_ratio=2)


def upernet(img_size=32, patch_size=4, classes=K, seed=0, **options):
    """A small one in which no weight, bias or statistic is 0 or 1."""
    torch.manual_seed(seed)
    encoder = vit.ViT(img_size, patch_size, num_classes=0, **(TINY | options))
    model = segmentation.UperNet(encoder, classes)
    for p in model.parameters():
        if p.ndim == 1:
            nn.init.uniform_(p, 0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    for layer in (model.head, model.auxiliary):
        nn.init.normal_(layer[-1][-1].weight if layer is model.auxiliary else layer[-1].weight)
    return model.eval()


def picture(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "blocks"), [(12, [3, 5, 7, 11]), (24, [7, 11, 15, 23])])
def test_features_come_from_the_blocks_of_beits_configs(depth, blocks):
    """out_indices of upernet_beit_{base_12,large_24}_512_slide_160k_ade20k*.py."""
    with torch.device("meta"):
        assert upernet_of_depth(depth).depths == blocks


def upernet_of_depth(depth):
    return segmentation.UperNet(vit.ViT(32, 16, num_classes=0, **(TINY | dict(depth=depth))), K)


@pytest.mark.parametrize(
    ("patch_size", "side", "sides"),
    [
        (16, 64, [16, 8, 4, 2]),  # strides 4, 8, 16, 32
        (8, 64, [16, 8, 4, 2]),
        (4, 32, [8, 4, 2, 1]),
        (32, 64, [16, 8, 4, 2]),
        (14, 56, [16, 8, 4, 2]),  # as with patches of 16, four times, twice, … the grid
        (4, 28, [7, 4, 2, 1]),  # a grid of 7, rounded up
    ],
)
def test_four_maps_have_strides_of_4_8_16_and_32_pixels(patch_size, side, sides):
    model = upernet(side, patch_size)
    maps = model.features(picture(2, 3, side, side))
    assert [tuple(m.shape) for m in maps] == [(2, 8, s, s) for s in sides]
    assert model(picture(2, 3, side, side)).shape == (2, K, side, side)
    first, second = model.train()(picture(2, 3, side, side))
    assert first.shape == second.shape == (2, K, side, side), "in training the auxiliary head answers, too"


def test_features_are_the_patches_after_each_block_in_their_places():
    """Without the last LayerNorm; the class token is left out. Two of the maps of patches of 8 are as they are, and the
    largest of 2 x 2."""
    model = upernet((32, 48), 8)
    images, inside = picture(2, 3, 32, 48), {}
    model.encoder.encode(images, inside=inside)
    maps = model.features(images)
    assert model.depths == [0, 0, 1, 2]
    for level, depth, side in ((1, 0, 1), (2, 1, 2), (3, 2, 4)):
        z = inside["blocks"][depth]["z"]  # (2, 1 + 24, 8)
        for row in range(4 // side):
            for column in range(math.ceil(6 / side)):
                places = [
                    1 + 6 * r + c
                    for r in range(side * row, side * (row + 1))
                    for c in range(side * column, min(6, side * (column + 1)))
                ]
                expected = z[:, places].amax(dim=1)
                torch.testing.assert_close(maps[level][:, :, row, column], expected, rtol=1e-4, atol=1e-4)


def convolve(x, layers):
    """Convolution with padding, BatchNorm in evaluation, ReLU: (C, h, w) float64, from the sums."""
    conv, norm = layers[0], layers[1]
    W = conv.weight.detach().double().numpy()  # (D, C, k, k)
    pad = W.shape[2] // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    out = np.zeros((len(W), *x.shape[1:]))
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            out[:, i, j] = np.tensordot(W, padded[:, i : i + W.shape[2], j : j + W.shape[2]], axes=3)
    gamma, beta, mean, var = (
        v.detach().double().numpy()[:, None, None]
        for v in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    return np.maximum((out - mean) / np.sqrt(var + 1e-5) * gamma + beta, 0)


def bilinear(x, size):
    """Linear interpolation between pixel centres, (C, h, w) -> (C, *size); what lies outside is the nearest."""
    out = np.zeros((len(x), *size))
    for i in range(size[0]):
        for j in range(size[1]):
            weights = []
            for place, new, old in ((i, size[0], x.shape[1]), (j, size[1], x.shape[2])):
                centre = min(max((place + 0.5) * old / new - 0.5, 0), old - 1)
                low = min(int(centre), old - 1)
                weights.append({low: 1 - (centre - low)})
                if centre > low:
                    weights[-1][low + 1] = centre - low
            for a, u in weights[0].items():
                for b, v in weights[1].items():
                    out[:, i, j] += u * v * x[:, a, b]
    return out


def average(x, n):
    """The means of n x n parts, which overlap where n does not divide: part i is from floor(i h / n) to
    ceil((i + 1) h / n)."""
    (h, w), out = x.shape[1:], np.zeros((len(x), n, n))
    for i in range(n):
        for j in range(n):
            part = x[:, i * h // n : -(-(i + 1) * h // n), j * w // n : -(-(j + 1) * w // n)]
            out[:, i, j] = part.mean(axis=(1, 2))
    return out


def test_upernet_is_the_network_of_the_paper():
    """Xiao et al. 2018, figure 4: pyramid pooling of the coarsest map, laterals and a top-down sum, a 3 x 3 convolution
    of each but the coarsest, all resized to the finest, fused, and classified."""
    model, sides = upernet(32, 4), [(8, 6), (4, 3), (2, 2), (2, 1)]
    maps = [picture(1, 8, *side, seed=i) for i, side in enumerate(sides)]
    finest, *_, top = (m[0].double().numpy() for m in maps)
    pooled = [bilinear(convolve(average(top, n), model.pools[i]), top.shape[1:]) for i, n in enumerate((1, 2, 3, 6))]
    levels = [convolve(np.concatenate([top, *pooled]), model.pyramid)]
    for i in (2, 1, 0):
        lateral = convolve(maps[i][0].double().numpy(), model.laterals[i])
        levels.insert(0, lateral + bilinear(levels[0], lateral.shape[1:]))
    levels[:3] = [convolve(level, model.smooth[i]) for i, level in enumerate(levels[:3])]
    fused = convolve(np.concatenate([bilinear(level, finest.shape[1:]) for level in levels]), model.fuse)
    last = model.head[-1]
    expected = np.tensordot(last.weight.detach().double().numpy()[:, :, 0, 0], fused, axes=1)
    expected += last.bias.detach().double().numpy()[:, None, None]
    with torch.no_grad():
        ours = model.decode(maps)[0].double().numpy()
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("arch", "channels"), [("vit_micro4", 32), ("vit_micro8", 32), ("vit_ti16", 192)])
def test_small_encoders_have_narrow_heads(arch, channels):
    """Of 32 channels below a width of 192, as a laptop can train them; as wide as the encoder from ViT-Ti on."""
    with torch.device("meta"):
        model = segmentation.UperNet(vit.create(arch, 64, 0), 11)
    assert model.head[-1].weight.shape[:2] == (11, channels)
    assert model.fuse[0].weight.shape[:2] == (channels, 4 * channels)


def test_upernet_on_vit_b16_has_the_layers_of_the_official_setting():
    """Counted from mmsegmentation's modules (UPerHead, FCNHead, Feature2Pyramid) and configs/mae for ADE20K: 768
    channels, 256 in the auxiliary head, 150 classes; a ViT-B/16 at 512 pixels without its last norm."""

    def conv(inputs, outputs, k):  # no bias, but BatchNorm's two
        return inputs * outputs * k * k + 2 * outputs

    D, encoder = 768, 12 * (4 * 768 + 3 * 768 * 769 + 768 * 769 + 768 * 3072 * 2 + 3072 + 768)
    encoder += 768 * (3 * 16 * 16 + 1) + 768 + 768 * (1 + 32 * 32)
    neck = 3 * (4 * D * D + D) + 2 * D
    head = 4 * conv(D, D, 1) + conv(5 * D, D, 3) + 3 * conv(D, D, 1) + 3 * conv(D, D, 3) + conv(4 * D, D, 3)
    head += 150 * (D + 1)
    auxiliary = conv(D, 256, 3) + 150 * 257
    with torch.device("meta"):
        model = segmentation.UperNet(vit.create("vit_b16", 512, 0), 150)
    assert sum(p.numel() for p in model.parameters()) == encoder + neck + head + auxiliary == 163_286_828


def test_the_decoder_equals_that_of_hugging_face():
    """transformers' BeitUperHead, with the same weights."""
    beit = pytest.importorskip("transformers.models.beit.modeling_beit")
    from transformers import BeitConfig

    model = upernet(32, 4, dim=192)  # its heads are as wide as the encoder, those of narrower ones have 32 channels
    config = BeitConfig(hidden_size=192, pool_scales=[1, 2, 3, 6], num_labels=K, out_indices=[1, 2, 3, 4])
    theirs = beit.BeitUperHead(config).eval()
    pairs = [
        (model.pools, "psp_modules.blocks.{}.conv"),
        (model.laterals, "lateral_convs.{}"),
        (model.smooth, "fpn_convs.{}"),
    ]
    named = [(one, name.format(i)) for many, name in pairs for i, one in enumerate(many)]
    named += [(model.pyramid, "psp_bottleneck"), (model.fuse, "fpn_bottleneck")]
    state = {"classifier.weight": model.head[-1].weight, "classifier.bias": model.head[-1].bias}
    for ours, name in named:
        state |= {f"{name}.convolution.weight": ours[0].weight}
        state |= {f"{name}.normalization.{key}": value for key, value in ours[1].state_dict().items()}
    theirs.load_state_dict(state)
    maps = [picture(2, 192, s, s, seed=s) for s in (16, 8, 4, 2)]
    with torch.no_grad():
        torch.testing.assert_close(model.decode(maps), theirs(maps), rtol=1e-4, atol=1e-4)


def test_a_norm_of_one_value_is_that_of_evaluation():
    """One image at a time leaves one value of what is pooled to 1 x 1: it has no variance."""
    norm = segmentation.BatchNorm(4)
    nn.init.uniform_(norm.running_mean)
    x = picture(1, 4, 1, 1)
    assert torch.equal(norm(x), norm.eval()(x))
    assert not torch.equal(norm.train()(picture(2, 4, 1, 1)), norm.eval()(picture(2, 4, 1, 1)))


def test_blocks_learn_at_the_rates_of_their_depth():
    """BeiT's layer_decay_optimizer_constructor.py: decay^(depth + 1 - layer), 1 for the heads; none on biases,
    norms, class token and positions."""
    model = upernet()
    groups = train.build_optimizer(model, "adamw", 1.0, 0.05, 0.5, (0.9, 0.999)).param_groups
    found = {id(p): (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        if name.startswith("encoder.blocks."):
            scale = 0.5 ** (3 - int(name.split(".")[2]))
        else:
            scale = 0.5**4 if name.startswith("encoder.") else 1.0
        decay = 0.05 if p.ndim > 1 and not name.endswith(("cls_token", "pos_embed")) else 0.0
        assert found[id(p)] == (scale, decay), name


# ---------------------------------------------------------------------------------------------
# Losses and scores
# ---------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Logits that are given."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits


def test_the_loss_is_the_sum_over_labelled_pixels_by_the_number_of_all():
    main, auxiliary = (picture(2, K, 4, 5, seed=i) for i in (1, 2))
    masks = torch.tensor([0, 1, 2, 255]).repeat(10).view(2, 4, 5)
    total = {}
    for name, logits in (("main", main), ("auxiliary", auxiliary)):
        total[name] = 0.0
        for b in range(2):
            for i in range(4):
                for j in range(5):
                    if masks[b, i, j] != 255:
                        z = logits[b, :, i, j].double()
                        total[name] -= (z - z.exp().sum().log())[masks[b, i, j]].item() / 40
    out = segmentation.losses(Fixed(main, auxiliary), None, masks)
    assert out["cross_entropy"].item() == pytest.approx(total["main"], rel=1e-5)
    assert out["loss"].item() == pytest.approx(total["main"] + 0.4 * total["auxiliary"], rel=1e-5)
    parts = [segmentation.losses(Fixed(main[i : i + 1], auxiliary[i : i + 1]), None, masks[i : i + 1]) for i in (0, 1)]
    assert (parts[0]["loss"] + parts[1]["loss"]).item() / 2 == pytest.approx(out["loss"].item(), rel=1e-5)


def loop_scores(truths, predictions, classes):
    """mIoU over classes that occur, and pixel accuracy, from sets of pixels."""
    ious, right, labelled = [], 0, 0
    truth, prediction = np.concatenate([t.ravel() for t in truths]), np.concatenate([p.ravel() for p in predictions])
    counts = [i for i in range(len(truth)) if 0 <= truth[i] < classes]
    for c in range(classes):
        a, b = {i for i in counts if truth[i] == c}, {i for i in counts if prediction[i] == c}
        if a | b:
            ious.append(len(a & b) / len(a | b))
    right, labelled = sum(truth[i] == prediction[i] for i in counts), len(counts)
    return dict(miou=sum(ious) / len(ious), pixel_accuracy=right / labelled)


def test_scores_are_those_of_sets_of_pixels():
    """Class 3 occurs in neither and is left out of the mean; class 4 is predicted alone and counts as 0; pixels of 255,
    and of an image that could not be read, -1, do not count."""
    rng = np.random.default_rng(0)
    truth, prediction = rng.choice([0, 1, 2, 255, -1], (2, 6, 7)), rng.choice([0, 1, 2, 4], (2, 6, 7))
    table = sum(
        segmentation.confusion(torch.tensor(t), torch.tensor(p), 5) for t, p in zip(truth, prediction, strict=True)
    )
    for i in range(5):
        for j in range(5):
            assert table[i, j] == ((truth == i) & (prediction == j)).sum()
    assert segmentation.scores_of(table) == pytest.approx(loop_scores(truth, prediction, 5))
    assert segmentation.scores_of(torch.eye(3)) == dict(miou=1.0, pixel_accuracy=1.0)
    with pytest.raises(ValueError, match="all are ignored"):
        segmentation.scores_of(torch.zeros(3, 3))


@pytest.mark.parametrize(("side", "window"), [(12, 12), (13, 12), (20, 12), (21, 12), (683, 512), (1, 1), (5, 1)])
def test_windows_begin_where_those_of_mmsegmentation_do(side, window):
    """max(h_img - h_crop + h_stride - 1, 0) // h_stride + 1 of them, the last one moved back into the image; its stride
    for 512 is 341."""
    stride = max(1, int(window * 2 / 3))
    assert stride == 341 or window != 512
    expected = []
    for i in range(max(side - window + stride - 1, 0) // stride + 1):
        end = min(i * stride + window, side)
        expected.append(max(end - window, 0))
    assert segmentation.starts(side, window) == expected


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_pixel_has_the_mean_logits_of_the_windows_that_see_it(batch_size):
    """A model whose answer depends on the place in the window: the pixel times its row, and its column."""
    rows, columns = torch.meshgrid(torch.arange(1.0, 7), torch.arange(1.0, 5), indexing="ij")
    sizes = []

    def model(crops):
        sizes.append(len(crops))
        return torch.stack([crops[:, 0] * rows, crops[:, 0] * columns], dim=1)

    images = picture(2, 1, 11, 9)
    ours = segmentation.slide(model, images, (6, 4), batch_size)
    places = [(top, left) for top in (0, 4, 5) for left in (0, 2, 4, 5)]
    assert sizes == [batch_size] * (24 // batch_size)
    for b in range(2):
        for i in range(11):
            for j in range(9):
                seen = [(i - top, j - left) for top, left in places if 0 <= i - top < 6 and 0 <= j - left < 4]
                for k, mean in enumerate(np.mean([(a + 1, c + 1) for a, c in seen], axis=0)):
                    assert ours[b, k, i, j].item() == pytest.approx(images[b, 0, i, j].item() * mean, rel=1e-5)


class Split:
    """Two images of different shapes, as engine/pairs.py gives them, and one that could not be read."""

    unreadable = {}

    def __init__(self):
        self.images = [picture(1, 3, 32, 40, seed=1), picture(1, 3, 48, 32, seed=2), picture(1, 3, 32, 32, seed=3)]
        rng = np.random.default_rng(0)
        self.masks = [torch.tensor(rng.choice([0, 1, 2, 255], (1, *side))) for side in ((20, 25), (60, 40))]
        self.masks.append(torch.full((1, 32, 32), -1))

    def __len__(self):
        return 3

    def test_batches(self, size, batch_size, device, shard=slice(None)):
        yield from zip(self.images[shard], self.masks[shard], strict=True)


@pytest.mark.parametrize("inference", ["slide", "whole"])
def test_images_are_scored_at_the_size_of_their_masks(inference):
    """In windows, or squeezed into the model's size: logits are resized, and only then a class is chosen."""
    model, split = upernet(), Split()
    scores = segmentation.evaluate(model, split, (32, 32), 2, "cpu", "float32", K, inference)
    truths, predictions, losses = [], [], []
    with torch.no_grad():
        for image, mask in zip(split.images[:2], split.masks[:2], strict=True):
            if inference == "whole":
                logits = model(F.interpolate(image, size=(32, 32), mode="bilinear"))
            else:
                logits, seen = torch.zeros(1, K, *image.shape[2:]), torch.zeros(image.shape[2:])
                extra = image.shape[2] - 32, image.shape[3] - 32
                for top, left in {(0, 0), extra}:
                    logits[:, :, top : top + 32, left : left + 32] += model(
                        image[:, :, top : top + 32, left : left + 32]
                    )
                    seen[top : top + 32, left : left + 32] += 1
                logits /= seen
            logits = F.interpolate(logits, size=mask.shape[1:], mode="bilinear")
            losses.append(F.cross_entropy(logits, mask, ignore_index=255).item())
            truths.append(mask.numpy())
            predictions.append(logits.argmax(dim=1).numpy())
    assert scores.pop("test_loss") == pytest.approx(np.mean(losses), rel=1e-4)
    assert scores == pytest.approx(loop_scores(truths, predictions, K))
    assert not model.training


def test_colours_of_classes_differ():
    colors = segmentation.palette(150)
    assert colors.shape == (151, 3)
    assert (colors[150] == 1).all()
    assert colors.min() >= 0
    assert colors.max() <= 1
    assert len({tuple(color.round(3)) for color in colors}) == 151


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------

SEGMENT = "--task segment --arch vit_micro4 --img-size 16 --workers 0"
SHORT = f"{SEGMENT} --data segment:pairs --batch-size 4 --steps 4 --lr 0.01 --warmup 1 --evaluations 1"


def write_pairs(path, train=8, val=3, side=18):
    """segment: data; in each image a bright square of class 1 or 2 on dark ground; some pixels are ignored."""
    rng = np.random.default_rng(train)
    for split, n in (("train", train), ("val", val)):
        for kind in ("images", "masks"):
            Path(path, split, kind).mkdir(parents=True)
        for i in range(n):
            mask = np.zeros((side, side + i % 3), np.uint8)
            top, left = rng.integers(0, side // 2, 2)
            mask[top : top + 8, left : left + 8] = 1 + i % 2
            image = rng.integers(0, 60, (*mask.shape, 3)) + 90 * mask[..., None]
            mask[0] = 255
            Image.fromarray(image.astype(np.uint8)).save(Path(path, split, "images", f"{i}.png"))
            Image.fromarray(mask).save(Path(path, split, "masks", f"{i}.png"))


@pytest.fixture
def pairs(leave_no_trace, shallow):
    write_pairs("pairs")


def test_a_run_learns_scores_draws_and_says_so(pairs, capsys):
    """And its log has what curves.png shows."""
    assert run(f"{SHORT} --out run") == 0
    result = json.loads(Path("run/result.json").read_text())
    last = log("run")[-1]
    assert {name: last[name] for name in ("miou", "pixel_accuracy")} == {
        name: result[name] for name in ("miou", "pixel_accuracy")
    }
    assert last.keys() >= {"loss", "cross_entropy", "test_loss", "grad_norm", "lr"}
    assert f"a mean intersection over union of {result['miou']:.3f} on the test set" in capsys.readouterr().out
    assert Image.open("run/predictions.png").width > 300
    assert Path("run/curves.png").exists()
    assert checkpoint("run")["classes"] == ["0", "1", "2"]
    assert checkpoint("run")["config"]["decay"] == "linear"


@pytest.mark.parametrize("inference", ["slide", "whole"])
def test_masks_of_predicted_images_have_the_runs_own_score(inference, pairs, no_figures, monkeypatch, capsys):
    """--task predict writes class numbers, of the size of each image: against the true masks, by loops, their
    intersection over union is what the run's test says. Those of ADE20K's classes begin with 1, as its own masks."""
    # Few steps call everything background, unless the last layer starts with more than nearly 0.
    monkeypatch.setattr(segmentation, "last", lambda inputs, classes, _: nn.Conv2d(inputs, classes, 1))
    for kind in ("images", "masks"):  # a wide one
        with Image.open(f"pairs/val/{kind}/1.png") as wide:
            wide.resize((50, 18), Image.Resampling.NEAREST).save(f"pairs/val/{kind}/1.png")
    assert run(f"{SHORT} --steps 2 --lr 0.0001 --inference {inference} --out run") == 0
    Path("pairs/val/images/broken.png").write_bytes(b"nothing")
    assert run("--task predict --init run --images pairs/val/images") == 0
    truths, masks = [], []
    for i in range(3):
        truths.append(np.asarray(Image.open(f"pairs/val/masks/{i}.png")))
        masks.append(np.asarray(Image.open(f"run/predictions/{i}.png.png")))
        assert masks[-1].shape == truths[-1].shape
    true, guess = (np.concatenate([one.ravel() for one in ones]) for ones in (truths, masks))
    pairs_of = [pair for pair in zip(true.tolist(), guess.tolist(), strict=True) if pair[0] != 255]
    assert len({m for _, m in pairs_of}) > 1, "one class everywhere would be right by chance"
    overlaps = []
    for k in range(3):
        union = sum(k in pair for pair in pairs_of)
        overlaps += [sum(pair == (k, k) for pair in pairs_of) / union] if union else []
    result = json.loads(Path("run/result.json").read_text())
    assert result["miou"] == pytest.approx(np.mean(overlaps))
    assert result["pixel_accuracy"] == pytest.approx(np.mean([t == m for t, m in pairs_of]))
    said = capsys.readouterr().out
    assert "4 images, 1 of which can't be read" in said
    share = max(np.mean(masks[0] == k) for k in range(3))
    assert f"{share:6.1%}" in next(line for line in said.splitlines() if line.startswith("0.png"))
    assert Image.open("run/predicted.png").width > 200

    saved = checkpoint("run")
    torch.save(saved | {"config": saved["config"] | {"data": "ade20k:pairs"}}, "ade.pt")
    assert run("--task predict --init ade.pt --images pairs/val/images/0.png --out ade") == 0
    np.testing.assert_array_equal(np.asarray(Image.open("ade/predictions/0.png.png")), masks[0] + 1)


def test_what_can_not_be_segmented_is_refused_in_one_line(pairs, no_figures, capsys):
    """No readable image; weights that are no numbers. Nothing is written."""
    assert run(f"{SHORT} --steps 1 --warmup 0 --out run") == 0
    Path("broken").mkdir()
    Path("broken/a.png").write_bytes(b"nothing")
    saved = checkpoint("run")
    saved["model"]["head.1.bias"].fill_(math.nan)
    torch.save(saved, "nan.pt")
    before = set(Path().rglob("*"))
    for init, images, words in (("run", "broken", "none can be read"), ("nan.pt", "pairs/val/images", "not finite")):
        capsys.readouterr()
        assert run(f"--task predict --init {init} --images {images}") == 2
        [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert words in error
    assert set(Path().rglob("*")) == before


def test_the_largest_of_many_logits_is_found_class_by_class():
    logits = picture(1, 7, 5, 6)
    for size in ((5, 6), (11, 7)):
        whole = F.interpolate(logits, size, mode="bilinear")[0].argmax(dim=0)
        assert len(whole.unique()) == 7
        torch.testing.assert_close(predict.largest(logits, size), whole)


def test_an_interrupted_run_goes_on_bit_for_bit(pairs, no_figures, monkeypatch):
    """With dropout and stochastic depth: weights, running statistics, moments, and what is logged."""
    command = f"{SHORT} --dropout 0.2 --drop-path 0.2"
    assert run(f"{command} --out whole") == 0
    with monkeypatch.context() as patch:
        watch(patch, lambda step, *_: os.kill(os.getpid(), signal.SIGTERM) if step == 1 else None)
        assert run(f"{command} --out parts") == 128 + signal.SIGTERM
    assert checkpoint("parts")["step"] == 2
    assert run(f"{SEGMENT.split(' --workers')[0]} --resume --out parts") == 0
    one, two = checkpoint("whole"), checkpoint("parts")
    assert different(one["model"], two["model"]) == []
    for i, state in one["optimizer"]["state"].items():
        assert different(state, two["optimizer"]["state"][i]) == []
    assert log("whole")[2:] == log("parts")[2:]


def test_scenes_have_a_background_and_items(leave_no_trace, no_figures, shallow, monkeypatch):
    """Class 0, and 1 + c for an item of class c; their masks are those of engine/scenes.py."""
    import data
    from engine import config as flags
    from engine import pairs, scenes

    monkeypatch.setattr(data, "fashion_mnist", items)
    config, dataset = flags.configure(
        flags.parse("--task segment --arch vit_micro8 --data scenes-many --batch-size 4 --steps 2 --labels 12".split())
    )
    assert dataset.classes == ["background", "ant", "bee"]
    assert isinstance(dataset.train, pairs.SceneMasks)
    assert len(dataset.train) == 12
    assert config.img_size == (96, 96)
    world = scenes.load(Path("data"), (96, 96), many=True)
    whole = dataset._replace(train=pairs.SceneMasks(world.train), test=pairs.SceneMasks(world.test))
    for ours, theirs in (
        (whole.train.train_batches((96, 96), 4, range(2), 0, None, torch.device("cpu")),
         world.train.train_batches((96, 96), 4, range(2), 0, None, torch.device("cpu"), objects=True)),
        (whole.test.test_batches((96, 96), 4, torch.device("cpu")),
         world.test.test_batches((96, 96), 4, torch.device("cpu"), objects=True)),
    ):  # fmt: skip
        for (images, masks), (same, _, objects) in zip(ours, theirs, strict=True):
            assert torch.equal(images, same)
            expected = torch.zeros_like(masks)
            for b in range(len(masks)):
                for label, where in zip(objects.labels[b].tolist(), objects.masks[b], strict=True):
                    expected[b][where] = 1 + label
            assert torch.equal(masks, expected)
            assert masks.dtype == torch.int64


def items(folder):
    """Fashion-MNIST's place: 16 and 4 grey squares of two classes."""
    import data

    splits = []
    for n in (16, 4):
        images = torch.zeros(n, 1, 28, 28, dtype=torch.uint8)
        images[:, :, 6:22, 8:20] = 200
        splits.append(data.InMemory(images, torch.arange(n) % 2, *data.STATISTICS["fashion-mnist"]))
    return data.Dataset("fashion-mnist", ["ant", "bee"], *data.STATISTICS["fashion-mnist"], *splits)


# ---------------------------------------------------------------------------------------------
# Weights to start from
# ---------------------------------------------------------------------------------------------


def google(model):
    """Names and arrangement of the ViT authors' .npz files."""
    out, D, k = {}, model.dim, model.blocks[0].attn.num_heads
    out["embedding/kernel"] = model.patch_embed.proj.weight.permute(2, 3, 1, 0)
    out["embedding/bias"] = model.patch_embed.proj.bias
    out |= {"cls": model.cls_token, "Transformer/posembed_input/pos_embedding": model.pos_embed}
    out |= {"Transformer/encoder_norm/scale": model.norm.weight, "Transformer/encoder_norm/bias": model.norm.bias}
    for i, block in enumerate(model.blocks):
        at = f"Transformer/encoderblock_{i}"
        for name, norm in (("LayerNorm_0", block.norm1), ("LayerNorm_2", block.norm2)):
            out |= {f"{at}/{name}/scale": norm.weight, f"{at}/{name}/bias": norm.bias}
        weights, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        for name, W, b in zip(("query", "key", "value"), weights, biases, strict=True):
            out[f"{at}/MultiHeadDotProductAttention_1/{name}/kernel"] = W.T.reshape(D, k, D // k)
            out[f"{at}/MultiHeadDotProductAttention_1/{name}/bias"] = b.reshape(k, D // k)
        out[f"{at}/MultiHeadDotProductAttention_1/out/kernel"] = block.attn.proj.weight.T.reshape(k, D // k, D)
        out[f"{at}/MultiHeadDotProductAttention_1/out/bias"] = block.attn.proj.bias
        for j, layer in enumerate((block.mlp.fc1, block.mlp.fc2)):
            out |= {f"{at}/MlpBlock_3/Dense_{j}/kernel": layer.weight.T, f"{at}/MlpBlock_3/Dense_{j}/bias": layer.bias}
    return {name: value.detach().numpy() for name, value in out.items()}


def layouts(model):
    """The same encoder in a file of every layout: name -> a function that writes it."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    decoder = {"decoder_embed.weight": torch.zeros(8, model.dim), "mask_token": torch.zeros(1, 1, 8)}
    return {
        "timm.safetensors": lambda path: weights.write(model, path),
        "hugging-face.safetensors": lambda path: weights.write(model, path, layout="hugging-face"),
        "google.npz": lambda path: np.savez(path, **google(model)),
        "mae.pth": lambda path: torch.save({"model": state}, path),  # as MAE's and HPM's encoders are published
        "hpm.pth": lambda path: torch.save({"model": state | decoder}, path),
        "ours.pt": lambda path: torch.save(
            {"model": {f"student.encoder.{n}": v for n, v in state.items()} | {
                f"student.{n}": v for n, v in decoder.items()}}, path),
        "segment.pt": lambda path: torch.save({"model": {f"encoder.{n}": v for n, v in state.items()}}, path),
    }  # fmt: skip


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(1)
    model = vit.ViT(16, 4, num_classes=0, dim=64, depth=3, num_heads=4, mlp_ratio=2)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("name", layouts(vit.ViT(16, 4, num_classes=0, **TINY)))
def test_every_layout_gives_the_same_encoder(name, pairs, no_figures, encoder, monkeypatch):
    """Its features are those of the model that was written, up to the order of sums; heads keep their own start."""
    layouts(encoder)[name](Path(name))
    config = train.flags.configure(train.flags.parse(f"{SHORT} --pos-embed 1d --init {name}".split()))
    model = train.build(*config).eval()
    images, z = picture(2, 3, 16, 16), encoder.embed(picture(2, 3, 16, 16))
    for block, ours in zip(encoder.blocks, model.encoder.blocks, strict=True):
        z = block(z)
        gelu = "tanh" if name == "google.npz" else "none"
        assert ours.mlp.gelu == gelu
        ours.mlp.gelu = "none"
    maps = model.features(images)
    assert maps[1].shape == (2, 64, 2, 2)
    expected = z[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    expected = F.adaptive_max_pool2d(expected, 1)
    torch.testing.assert_close(maps[3].amax(dim=(2, 3), keepdim=True), expected, rtol=1e-4, atol=1e-4)


def test_positions_of_another_size_are_interpolated(pairs, encoder, capsys):
    weights.write(encoder, Path("init.safetensors"))
    config = train.flags.configure(
        train.flags.parse(f"{SHORT} --pos-embed 1d --init init.safetensors".replace("size 16", "size 24x32").split())
    )
    model = train.build(*config)
    assert "positions interpolated from 4x4 to 6x8" in capsys.readouterr().out
    assert torch.equal(model.encoder.pos_embed, vit.resize_pos_embed(encoder.pos_embed, (4, 4), (6, 8)))


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--task segment --arch vit_micro4 --data photos", ("class of every pixel", "ade20k:PATH")),
        ("--task segment --arch resnet50 --data segment:pairs", ("resnet50", "vit_ arch")),
        ("--task supervised --arch vit_micro4 --data segment:pairs", ("--task segment", "not supervised")),
        ("--task hpm --arch vit_micro4 --data ade20k:pairs", ("--task segment", "not hpm")),
        ("--task segment --arch vit_micro4 --data segment:", ("empty",)),
        ("--task segment --arch vit_micro4 --data segment:nowhere", ("no folder", "masks/NAME.png")),
        ("--task segment --arch vit_micro4 --data ade20k:pairs", ("no folder", "ADEChallengeData2016")),
        (f"{SHORT} --lr 0.1,0.2", ("several --lr",)),
        (f"{SHORT} --fsdp", ("--fsdp does nothing in --task segment",)),
        (f"{SHORT} --pool mean", ("--pool does nothing in --task segment",)),
        (f"{SHORT} --inference wide", ("slide, whole",)),
        (f"{SHORT} --img-size 18", ("not a multiple",)),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(command, words, pairs, capsys):
    assert run(command) == 2
    message = one_line(capsys)
    assert all(word in message for word in words), message


def test_a_class_number_above_the_count_never_scores(pairs, no_figures, capsys):
    """A pair is skipped, and counted; too many of them end the run."""
    Path("pairs/classes.txt").write_text("ground\none\n")
    assert run(f"{SHORT} --out run") == 2
    message = one_line(capsys)
    assert "its mask has the class 2, and they go from 0 to 1" in message
    assert "repair" in message
    assert not list(run_folder.read_log(Path("run")))
