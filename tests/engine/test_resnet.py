"""What the convolutional networks beside ViT have to compute: resnet.py once more and slowly, and beside timm.

Each `..._loops` function is an oracle: float64 NumPy, one output at a time, from the definition alone.
"""

import math
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import vit
from related import resnet
from tests.oracles import arrays, equal, filled, random, vit_loops

# ---------------------------------------------------------------------------------------------
# Convolution, normalisation
# ---------------------------------------------------------------------------------------------


def convolution_loops(image, weight, stride, before, after):
    """image (C, H, W), weight (C', C, k, k) -> (C', H', W'), every kernel first brought to mean 0 and variance 1."""
    k = weight.shape[-1]
    kernels = [(kernel - kernel.mean()) / math.sqrt(((kernel - kernel.mean()) ** 2).mean() + 1e-8) for kernel in weight]
    image = np.pad(image, ((0, 0), (before, after), (before, after)))
    tops, lefts = (range(0, side - k + 1, stride) for side in image.shape[1:])
    windows = [[image[:, top : top + k, left : left + k] for left in lefts] for top in tops]
    return np.array([[[(window * kernel).sum() for window in row] for row in windows] for kernel in kernels])


def group_norm_loops(image, weight, bias, eps=1e-5):
    """image (C, H, W): each C / 32 channels, at least two, at all places to mean 0, variance 1 (Wu & He 2018)."""
    out, size = np.empty_like(image), max(2, len(image) // 32)
    for channel in range(len(image)):
        group = image[channel // size * size : (channel // size + 1) * size]
        out[channel] = (image[channel] - group.mean()) / math.sqrt(group.var() + eps) * weight[channel] + bias[channel]
    return out


# size, stride, SAME padding or not: rows of zeros before and after.
BORDERS = {
    (7, 2, False): (3, 3),
    (7, 2, True): (2, 3),
    (3, 2, False): (1, 1),
    (3, 2, True): (0, 1),
    (3, 1, True): (1, 1),
}


@pytest.mark.parametrize(("size", "stride", "same"), [*BORDERS, (1, 2, True), (1, 1, False)])
def test_a_standardised_convolution_equals_the_loops(size, stride, same):
    """BiT, section 3.1; JAX's SAME puts the odd row of zeros after the image, PyTorch can't."""
    conv = filled(resnet.StdConv(3, 4, size, stride, same))
    images = random(2, 3, 8, 6)
    before, after = BORDERS.get((size, stride, same), (0, 0))
    oracle = [convolution_loops(image, conv.weight.detach().numpy(), stride, before, after) for image in images.numpy()]
    equal(conv(images), np.stack(oracle), "is the kernel standardised over all its inputs, with the biased variance?")
    assert conv(images).shape[-2:] == (8 // stride, 6 // stride)


def test_scale_and_offset_of_a_kernel_do_not_matter():
    """So gradients are at right angles to the kernel: they turn it, and weight decay alone shrinks it.

    But for the epsilon of 1e-8 beside a variance of 1/4: a relative change of 2e-8 at most.
    """
    conv = filled(resnet.StdConv(3, 4, 3))
    images = random(1, 3, 5, 5)
    out = conv(images)
    out.square().sum().backward()
    assert (conv.weight.grad * conv.weight).sum(dim=(1, 2, 3)).abs().max() < 1e-6 * conv.weight.grad.norm()
    conv.weight.data = 3 * conv.weight.data + 7
    assert torch.allclose(conv(images), out, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------
# Bottlenecks
# ---------------------------------------------------------------------------------------------


def max_pool_loops(image, before, after):
    """image (C, H, W) -> the largest number of every 3x3 window, two apart, beyond a border of zeros."""
    image = np.pad(image, ((0, 0), (before, after), (before, after)))
    tops, lefts = (range(0, side - 2, 2) for side in image.shape[1:])
    return np.array([[[plane[t : t + 3, u : u + 3].max() for u in lefts] for t in tops] for plane in image])


def bottleneck_loops(image, p, stride, pre):
    """One image (C, H, W) through a bottleneck with the parameters p: ResNet-v2's, or the hybrid's."""

    def norm(x, i):
        return group_norm_loops(x, p[f"norm{i}.weight"], p[f"norm{i}.bias"])

    def relu(x):
        return np.maximum(x, 0)

    borders = ((0, 0), (1, 1), (0, 0)) if pre or stride == 1 else ((0, 0), (0, 1), (0, 0))
    shortcut, h = image, image
    if pre:
        h = relu(norm(image, 1))
    if "downsample.conv.weight" in p:
        shortcut = convolution_loops(h, p["downsample.conv.weight"], stride, 0, 0)
        if not pre:
            shortcut = group_norm_loops(shortcut, p["downsample.norm.weight"], p["downsample.norm.bias"])
    for i in (1, 2, 3):
        if pre and i > 1:
            h = relu(norm(h, i))
        h = convolution_loops(h, p[f"conv{i}.weight"], stride if i == 2 else 1, *borders[i - 1])
        if not pre:
            h = norm(h, i)
            h = relu(h if i < 3 else h + shortcut)
    return h + shortcut if pre else h


@pytest.mark.parametrize("kind", [resnet.PreBottleneck, resnet.PostBottleneck])
@pytest.mark.parametrize(("inputs", "stride"), [(128, 1), (64, 1), (64, 2)])
def test_a_bottleneck_equals_the_loops(kind, inputs, stride):
    """He et al. 2016, figure 4: pre-activation. The hybrid's is the older one, with the stride in the 3x3."""
    block = filled(kind(inputs, 128, stride))
    image = random(1, inputs, 4, 6)
    oracle = bottleneck_loops(image[0].numpy(), arrays(block), stride, kind is resnet.PreBottleneck)
    equal(block(image)[0], oracle, "order of normalisation, ReLU and convolution, or the residual", atol=1e-9)


def test_a_branch_of_the_hybrid_starts_at_zero():
    """As the authors' code starts the scale of the last GroupNorm: a block is then ReLU(x)."""
    block, x = resnet.PostBottleneck(128, 128, 1), random(1, 128, 4, 4).float()
    assert torch.equal(block(x), F.relu(x))


# ---------------------------------------------------------------------------------------------
# Whole networks
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (lambda: resnet.create("resnet50"), 25_549_352),
        (lambda: resnet.create("resnet101"), 44_541_480),
        (lambda: resnet.create("resnet152x2"), 236_335_208),
        (lambda: resnet.create("r50_vit_b16"), 98_659_112),
        (lambda: resnet.Backbone(3, (3, 4, 9)), 98_659_112 - 86_567_656 - (1024 - 768) * 768),
    ],
)
def test_sizes_are_the_published_ones(build, parameters):
    """Those of timm's resnetv2_50x1_bit, 101x1 and 152x2, and what its vit_base_r50_s16_224 has more than ViT-B/16."""
    with torch.device("meta"):
        model = build()
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_every_arch_has_a_name():
    """ResNets of BiT's depths and widths; hybrids of every size, with the stages of the authors' configs."""
    depths = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}
    for layers, stages in depths.items():
        assert layers == 2 + 3 * sum(stages), "the stem, the head, and three convolutions a bottleneck"
        for width in (1, 2, 3, 4):
            name = f"resnet{layers}x{width}" if width > 1 else f"resnet{layers}"
            assert resnet.ARCHS[name] == dict(depths=stages, width=width)
    hybrids = {"r50_vit_{}16": (3, 4, 9), "r50_vit_{}32": (3, 4, 6, 3), "r26_vit_{}32": (2, 2, 2, 2)}
    for size, (dim, depth, heads) in vit.SIZES.items():
        for name, stages in hybrids.items():
            options = dict(patch_size=int(name[-2:]), dim=dim, depth=depth, num_heads=heads, backbone=stages)
            assert resnet.ARCHS[name.format(size)] == options
    assert resnet.ARCHS["r_vit_ti16"] == dict(patch_size=32, dim=192, depth=12, num_heads=3, backbone=())
    assert len(resnet.ARCHS) == 4 * 4 + 5 * 3 + 1 + 2


def test_the_small_ones_are_as_large_as_vit_micro4():
    """At 28 x 28 grey pixels, counted by PyTorch: parameters 1.02 and 1.44 times, operations 1.07 and 0.96 times."""
    counts = {}
    for arch in ("vit_micro4", "r_vit_micro4", "resnet_micro"):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            create = vit.create if arch in vit.ARCHS else resnet.create
            model = create(arch, 28, 10, 1)
            model(torch.zeros(1, 1, 28, 28))
        counts[arch] = sum(p.numel() for p in model.parameters()), counter.get_total_flops()
    assert counts["vit_micro4"] == (205_962, 2 * 11_801_216)
    assert counts["r_vit_micro4"] == (208_954, 2 * 12_580_544)
    assert counts["resnet_micro"] == (294_906, 2 * 11_251_776)


@pytest.mark.parametrize(
    ("arch", "grid", "side", "channels"),
    [
        ("r50_vit_b16", (14, 21), 1, 1024),
        ("r26_vit_s32", (7, 10), 1, 2048),
        ("r_vit_ti16", (7, 10), 8, 64),
        ("r_vit_micro4", (56, 80), 1, 128),
    ],
)
def test_a_hybrid_cuts_its_patches_from_features(arch, grid, side, channels):
    """R50 with its fourth stage in the third: features of 14 x 14, each of them a patch (ViT, section 4.1).

    On the meta device: sizes alone, at no cost.
    """
    size = (224, 336) if grid[1] == 21 else (224, 320)
    with torch.device("meta"):
        model, images = resnet.create(arch, size, num_classes=7), torch.zeros(2, 3, *size)
        features, patches = model.patch_embed.backbone(images), model.patch_embed.cut(images)
        assert model(images).shape == (2, 7)
    assert model.grid == grid
    assert features.shape == (2, channels, side * grid[0], side * grid[1])
    assert patches.shape == (2, math.prod(grid), side * side * channels)
    assert isinstance(model, vit.ViT)


@pytest.mark.parametrize(("backbone", "patch_size"), [((1, 1), 8), ((1, 1), 16), ((), 8)])
def test_behind_its_features_a_hybrid_is_a_vit(backbone, patch_size):
    """Its eq. 1 starts from the features: a plain ViT of the loops, given them in place of an image."""
    options = dict(backbone=backbone, patch_size=patch_size, dim=16, depth=1, num_heads=2, pool="mean")
    model = resnet.create("r26_vit_s32", (16, 32), 5, 1, **options)
    model, images = filled(model), random(2, 1, 16, 32)
    features = model.patch_embed.backbone(images).detach()
    w = {name: value for name, value in arrays(model).items() if "backbone" not in name}
    for given, logits in zip(features.numpy(), model(images), strict=True):
        oracle = vit_loops(given, w, 2, "mean")[2]
        equal(logits, oracle, "patches of the features through E, then a ViT", atol=1e-9)
    tokens = model.patch_embed(model.patch_embed.cut(images))
    equal(model.patch_embed.proj(features).flatten(2).transpose(1, 2), tokens, "E is a convolution with stride")


def test_patches_that_do_not_fit_the_features_are_refused():
    with pytest.raises(
        ValueError, match="^patches of 24 pixels do not fit features of stride 16; use a multiple of 16$"
    ):
        resnet.create("r50_vit_b16", 96, patch_size=24)


@pytest.mark.parametrize(("arch", "nearest"), [("resnet-50", "resnet50"), ("?", "resnet_micro")])
def test_an_unknown_arch_is_refused_with_the_nearest_name(arch, nearest):
    message = rf"^unknown arch '{re.escape(arch)}'; did you mean {nearest}\? There are resnet50, resnet50x2, "
    with pytest.raises(ValueError, match=message):
        resnet.create(arch)


def test_a_resnet_is_r50x1_for_imagenet_unless_told_otherwise():
    with torch.device("meta"):
        models = resnet.ResNet(), resnet.create("resnet50")
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1]
    assert shapes[0]["stem.conv.weight"] == (64, 3, 7, 7)
    assert shapes[0]["head.weight"] == (1000, 2048)


@pytest.mark.parametrize("height", [64, 50])
def test_a_resnet_takes_images_of_any_size_and_pools_them(height):
    model = filled(resnet.create("resnet50", num_classes=0, depths=(1, 1)))
    images = random(2, 3, height, 48)
    features = model.stages(model.stem(images)).detach()
    assert features.shape == (2, 512, -(-height // 8), 6)
    w = arrays(model, "norm.")
    oracle = [np.maximum(group_norm_loops(f, w["weight"], w["bias"]), 0).mean(axis=(1, 2)) for f in features.numpy()]
    equal(model(images), np.stack(oracle), "y = the mean over places of ReLU(GroupNorm(features))")


def test_a_resnets_head_starts_at_zero_and_reads_y():
    model, images = resnet.create("resnet50", num_classes=5, in_chans=1, depths=(1,)), random(2, 1, 16, 16).float()
    assert torch.equal(model(images), torch.zeros(2, 5))
    model = filled(model)
    equal(model(images.double()), model.head(model.represent(images.double())).detach())
    assert model.dim == 256


def test_a_whole_small_resnet_equals_the_loops():
    """Stem, two stages of which the second halves the sides, and no normalisation before the first bottleneck."""
    model, image = filled(resnet.create("resnet50", num_classes=0, depths=(1, 1))), random(1, 3, 16, 24)
    x = convolution_loops(image[0].numpy(), model.stem.conv.weight.detach().numpy(), 2, 3, 3)
    equal(model.stem(image)[0], max_pool_loops(x, 1, 1), "a 7x7 convolution, 1 row of zeros, the largest of 3x3")
    x = max_pool_loops(x, 1, 1)
    for stage, stride in ((0, 1), (1, 2)):
        x = bottleneck_loops(x, arrays(model, f"stages.{stage}.blocks.0."), stride, pre=True)
    equal(model.stages(model.stem(image))[0], x, "the stride is the second stage's", atol=1e-8)


def test_a_whole_resnet_for_small_images_equals_the_loops():
    """The stem is a 3x3 convolution of stride 2; 16 channels, in groups of two, then 64 and 128. Odd sides are fine."""
    model = filled(resnet.create("resnet_micro", num_classes=0, in_chans=1, depths=(1, 1)))
    image = random(1, 1, 10, 14)
    x = convolution_loops(image[0].numpy(), model.stem.conv.weight.detach().numpy(), 2, 1, 1)
    assert x.shape == (16, 5, 7)
    for stage, stride in ((0, 1), (1, 2)):
        x = bottleneck_loops(x, arrays(model, f"stages.{stage}.blocks.0."), stride, pre=True)
    assert x.shape == (128, 3, 4)
    equal(model.stages(model.stem(image))[0], x, "a 3x3 convolution of stride 2, no pooling, two stages", atol=1e-8)


def test_a_whole_backbone_for_small_images_equals_the_loops():
    """The hybrid's: SAME borders, GroupNorm and ReLU in the stem, as of the large ones."""
    model, image = filled(resnet.Backbone(1, (1, 1), small=True)), random(1, 1, 12, 8)
    w = arrays(model, "stem.")
    x = convolution_loops(image[0].numpy(), w["conv.weight"], 2, 0, 1)
    x = np.maximum(group_norm_loops(x, w["norm.weight"], w["norm.bias"]), 0)
    for block, stride in (("0.blocks.0", 1), ("1.blocks.0", 2)):
        x = bottleneck_loops(x, arrays(model, f"stages.{block}."), stride, pre=False)
    equal(model(image)[0], x, "the stem, the stages", atol=1e-8)
    assert (model.stride, model.channels) == (4, 128)


def test_a_whole_small_backbone_equals_the_loops():
    """The hybrid's: SAME borders, GroupNorm and ReLU in the stem; only the first bottleneck of a stage has a stride."""
    model, image = filled(resnet.Backbone(3, (1, 2))), random(1, 3, 16, 24)
    w = arrays(model, "stem.")
    x = convolution_loops(image[0].numpy(), w["conv.weight"], 2, 2, 3)
    x = max_pool_loops(np.maximum(group_norm_loops(x, w["norm.weight"], w["norm.bias"]), 0), 0, 1)
    equal(model.stem(image)[0], x, "the stem")
    for block, stride in (("0.blocks.0", 1), ("1.blocks.0", 2), ("1.blocks.1", 1)):
        x = bottleneck_loops(x, arrays(model, f"stages.{block}."), stride, pre=False)
    equal(model(image)[0], x, "the stages", atol=1e-8)
    assert (model.stride, model.channels) == (8, 512)


SHORT = dict(
    resnet50=dict(depths=(1, 1)), r26_vit_s32=dict(backbone=(1, 1), patch_size=8, depth=1, dim=64, num_heads=2)
)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*SHORT, "resnet_micro", "r_vit_micro4", "resnet101", "r50_vit_b32"])
def test_a_real_batch_is_learned(arch):
    """Eight photographs, eight classes: the loss falls, and every parameter has a gradient. Whole where it is slow."""
    torch.manual_seed(0)
    size = 32 if arch in SHORT or "micro" in arch else 64
    photos = data.photos((size, size)).test
    images = data.normalise(photos.images[:32:4], photos.mean, photos.std)
    model = resnet.create(arch, size, num_classes=8, **SHORT.get(arch, {}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(images), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(8), abs=1e-5), "the head starts at zero: all classes are equal"
    assert losses[-1] < 0.8 * losses[0]
    assert [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()] == []


TIMM = {  # ours: timm's
    "resnet50": "resnetv2_50x1_bit",
    "r26_vit_s32": "vit_small_r26_s32_224",
    "r_vit_ti16": "vit_tiny_r_s16_p8_224",
}


@pytest.mark.parametrize("arch", TIMM)
def test_logits_equal_timms(arch, tmp_path):
    """timm's own file, read as it is."""
    timm = pytest.importorskip("timm", reason="timm is not installed; see requirements-parity.txt")
    options = {} if arch == "resnet50" else dict(img_size=64)
    theirs = timm.create_model(TIMM[arch], num_classes=10, **options).eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in theirs.named_parameters():
        scale = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        p.data = scale + 0.1 * torch.randn(p.shape, generator=generator)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    ours = resnet.create(arch, 64, num_classes=10).eval()
    assert vit.load_weights(ours, tmp_path / "timm.pth") == []
    images = random(2, 3, 64, 64).float()
    with torch.no_grad():
        difference = (ours(images) - theirs(images)).abs().max() / theirs(images).std()
    assert difference < 1e-4


# ---------------------------------------------------------------------------------------------
# The authors' files
# ---------------------------------------------------------------------------------------------

SMALL_HYBRID = dict(img_size=64, num_classes=5, backbone=(1, 2), depth=1, dim=48, num_heads=2)


def kernel(weight):
    """(C', C, k, k) -> JAX's and TensorFlow's (k, k, C, C')."""
    return weight.transpose(2, 3, 1, 0)


def hybrid_file(w, norm_shape):
    """Our weights under the names, and in the axes, of the hybrids' .npz files (models_resnet.py, models_vit.py)."""
    out = {"conv_root/kernel": kernel(w["patch_embed.backbone.stem.conv.weight"])}
    norms = {"gn_root": "patch_embed.backbone.stem.norm"}
    for stage, units in enumerate(SMALL_HYBRID["backbone"], 1):
        for unit in range(1, units + 1):
            ours, theirs = f"patch_embed.backbone.stages.{stage - 1}.blocks.{unit - 1}", f"block{stage}/unit{unit}"
            for i in (1, 2, 3):
                out[f"{theirs}/conv{i}/kernel"] = kernel(w[f"{ours}.conv{i}.weight"])
                norms[f"{theirs}/gn{i}"] = f"{ours}.norm{i}"
            if unit == 1:
                out[f"{theirs}/conv_proj/kernel"] = kernel(w[f"{ours}.downsample.conv.weight"])
                norms[f"{theirs}/gn_proj"] = f"{ours}.downsample.norm"
    for theirs, ours in norms.items():
        for part, name in (("scale", "weight"), ("bias", "bias")):
            out[f"{theirs}/{part}"] = w[f"{ours}.{name}"].reshape(*norm_shape, -1)
    out |= {"embedding/kernel": kernel(w["patch_embed.proj.weight"]), "embedding/bias": w["patch_embed.proj.bias"]}
    out |= {"cls": w["cls_token"], "Transformer/posembed_input/pos_embedding": w["pos_embed"]}
    out |= {"head/kernel": w["head.weight"].T, "head/bias": w["head.bias"]}
    out |= {"Transformer/encoder_norm/scale": w["norm.weight"], "Transformer/encoder_norm/bias": w["norm.bias"]}
    block = "Transformer/encoderblock_0"
    for theirs, ours in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
        out[f"{block}/{theirs}/scale"] = w[f"blocks.0.{ours}.weight"]
        out[f"{block}/{theirs}/bias"] = w[f"blocks.0.{ours}.bias"]
    for theirs, ours in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
        out[f"{block}/MlpBlock_3/{theirs}/kernel"] = w[f"blocks.0.mlp.{ours}.weight"].T
        out[f"{block}/MlpBlock_3/{theirs}/bias"] = w[f"blocks.0.mlp.{ours}.bias"]
    attention = f"{block}/MultiHeadDotProductAttention_1"
    parts = (np.split(w[f"blocks.0.attn.qkv.{name}"], 3) for name in ("weight", "bias"))
    for theirs, weight, bias in zip(("query", "key", "value"), *parts, strict=True):
        out[f"{attention}/{theirs}/kernel"] = weight.T.reshape(48, 2, 24)
        out[f"{attention}/{theirs}/bias"] = bias.reshape(2, 24)
    out[f"{attention}/out/kernel"] = w["blocks.0.attn.proj.weight"].T.reshape(2, 24, 48)
    out[f"{attention}/out/bias"] = w["blocks.0.attn.proj.bias"]
    return out


def bit_file(w):
    """Our weights under the names of BiT's .npz files (big_transfer's models)."""
    conv, norm = "standardized_conv2d/kernel", {"gamma": "weight", "beta": "bias"}
    out = {f"resnet/root_block/{conv}": kernel(w["stem.conv.weight"])}
    for stage, units in enumerate((1, 2), 1):
        for unit in range(1, units + 1):
            ours, theirs = f"stages.{stage - 1}.blocks.{unit - 1}", f"resnet/block{stage}/unit{unit:02}"
            for i, letter in enumerate("abc", 1):
                out[f"{theirs}/{letter}/{conv}"] = kernel(w[f"{ours}.conv{i}.weight"])
                for part, name in norm.items():
                    out[f"{theirs}/{letter}/group_norm/{part}"] = w[f"{ours}.norm{i}.{name}"]
            if unit == 1:
                out[f"{theirs}/a/proj/{conv}"] = kernel(w[f"{ours}.downsample.conv.weight"])
    for part, name in norm.items():
        out[f"resnet/group_norm/{part}"] = w[f"norm.{name}"]
    return out | {
        "resnet/head/conv2d/kernel": kernel(w["head.weight"][..., None, None]),
        "resnet/head/conv2d/bias": w["head.bias"],
    }


@pytest.mark.parametrize("kind", ["hybrid", "hybrid, older", "BiT"])
def test_the_authors_npz_files_are_read(kind, tmp_path):
    """Every weight comes to its place. Older files keep GroupNorm's numbers as (1, 1, 1, C)."""

    def build():
        if kind == "BiT":
            return resnet.create("resnet50", num_classes=5, depths=(1, 2))
        return resnet.create("r26_vit_s32", **SMALL_HYBRID)

    model = filled(build()).float()
    w = arrays(model)
    np.savez(tmp_path / "x.npz", **(bit_file(w) if kind == "BiT" else hybrid_file(w, (1, 1, 1) * ("older" in kind))))
    other = build()
    assert vit.load_weights(other, tmp_path / "x.npz") == []
    mine, theirs = model.state_dict(), other.state_dict()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (dict(depths=(1, 2)), dict(depths=(1, 3))),
        (dict(depths=(1, 2)), dict(depths=(1,))),
        (dict(depths=(1,)), dict(depths=(1,), width=2)),
        (dict(depths=(1,)), None),
    ],
)
def test_weights_of_another_resnet_are_refused(here, there, tmp_path):
    """Of another depth or width, or no ResNet at all; and nothing has been loaded."""
    other = vit.create("vit_micro4", 28) if there is None else resnet.create("resnet50", **there)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    model = resnet.create("resnet50", **here)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"other\.pth does not fit"):
        vit.load_weights(model, tmp_path / "other.pth")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_head_for_other_classes_is_left_at_its_initial_value(tmp_path):
    torch.save(resnet.create("resnet50", num_classes=5, depths=(1,)).state_dict(), tmp_path / "five.pth")
    (note,) = vit.load_weights(resnet.create("resnet50", num_classes=7, depths=(1,)), tmp_path / "five.pth")
    assert note == "head left at its initial value: 7 classes here, 5 in the file"
