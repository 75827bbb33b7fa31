"""What the Vision Transformer has to compute: every equation of vit.py, beside the loops of oracles.py.

The models are float64, as the oracles are, so that both agree to about ten digits whatever the processor. Read the
tests in the order of the ledger: patches, eq. 1, attention, block, eq. 4, positions, figures. Those with an `exercise`
mark grade the function of that name; see tests/exercises.py.
"""

import ast
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import nn
from torch.nn import functional as F

import vit
from tests.oracles import (
    arrays,
    attention_distance_loops,
    attention_loops,
    attention_rollout_loops,
    block_loops,
    each,
    embed_loops,
    equal,
    filled,
    interpolation_loops,
    layer_norm_loops,
    mlp_loops,
    patch_embed_loops,
    patchify_loops,
    random,
    refusal,
    resize_loops,
    similarity_loops,
    sincos_loops,
    slopes,
    unpatchify_loops,
    vit_loops,
)

# ---------------------------------------------------------------------------------------------
# Patches
# ---------------------------------------------------------------------------------------------

# B, C, H, W, P: one image, one channel, one patch, patches of one pixel, and grids that are not square.
SHAPES = [(2, 2, 6, 9, 3), (1, 1, 9, 6, 3), (3, 4, 2, 2, 2), (2, 3, 2, 3, 1), (1, 3, 4, 4, 2)]
over_shapes = pytest.mark.parametrize(("B", "C", "H", "W", "P"), SHAPES)


@pytest.mark.equation("ViT 3.1 patches")
@pytest.mark.exercise("patchify")
@over_shapes
def test_patches_run_row_by_row_and_so_do_their_pixels_channel_last(B, C, H, W, P):
    """x -> x_p (ViT, section 3.1), in the order that MAE uses."""
    images = torch.arange(float(B * C * H * W), dtype=torch.float64).reshape(B, C, H, W)
    what = "patches run row by row, in a patch pixels row by row, of a pixel the channels side by side"
    equal(vit.patchify(images, P), each(patchify_loops, images, P), what)


@pytest.mark.equation("ViT 3.1 patches")
@pytest.mark.exercise("unpatchify")
@over_shapes
def test_unpatchify_is_the_inverse_of_patchify(B, C, H, W, P):
    images, grid = random(B, C, H, W), (H // P, W // P)
    patches = random(B, grid[0] * grid[1], P * P * C, seed=2)
    equal(vit.unpatchify(patches, P, grid), each(unpatchify_loops, patches, P, grid), "pixels at other places")
    equal(vit.unpatchify(vit.patchify(images, P), P, grid), images, "patchify, then unpatchify, is not the same image")


@pytest.mark.exercise("patchify")
@pytest.mark.parametrize(("height", "width"), [(30, 48), (32, 45), (30, 45), (15, 16), (33, 16)])
def test_a_patch_size_that_does_not_divide_the_image_is_refused(height, width):
    """Cutting the rest off, or padding, would change the image without a word."""
    refusal(f"{height}x{width} pixels in patches of 16", vit.patchify, torch.zeros(1, 3, height, width), 16)


@pytest.mark.parametrize(
    ("height", "width", "near"), [(30, 48, "32x48"), (32, 45, "32x48"), (39, 25, "32x32"), (3, 41, "16x48")]
)
def test_the_nearest_size_that_fits_is_named(height, width, near):
    with pytest.raises(ValueError, match=rf"^image size {height}x{width} is not .* patch size 16; use {near}$"):
        vit.ViT(img_size=(height, width), patch_size=16, dim=8, depth=1, num_heads=2)


@pytest.mark.exercise("unpatchify")
@pytest.mark.parametrize("patches", [1, 6, 9])
def test_patches_that_do_not_fill_the_grid_are_refused(patches):
    refusal(f"{patches} patches for a grid of 2x4", vit.unpatchify, torch.zeros(1, patches, 12), 2, (2, 4))


def test_patches_that_do_not_fill_the_grid_are_counted():
    with pytest.raises(ValueError, match=r"^6 patches do not fill a grid of 2x4; give grid=\(rows, columns\)$"):
        vit.unpatchify(torch.zeros(1, 6, 12), 2, (2, 4))


@pytest.mark.equation("ViT 1")
@pytest.mark.exercise("PatchEmbed.forward")
@over_shapes
def test_patch_embedding_is_a_linear_map_of_each_patch(B, C, H, W, P):
    """x_p E + b of ViT eq. 1. E has to list the pixels in the order of x_p."""
    embed, images = filled(vit.PatchEmbed(P, C, 8)), random(B, C, H, W)
    oracle = each(patch_embed_loops, images, *arrays(embed).values())
    patches = torch.from_numpy(each(patchify_loops, images, P))
    equal(embed(patches), oracle, "E and x_p list the pixels in different orders, or the bias is not added once")
    equal(embed(patches[:, :1]), oracle[:, :1], "of one patch: as much as it gives among all")


@pytest.mark.equation("ViT 1")
@pytest.mark.exercise("PatchEmbed.forward")
def test_patch_embedding_is_a_convolution_with_stride_p():
    """The same numbers, and gradients, as torch's conv2d on the image: a checkpoint's convolution loads as it is."""
    embed, images, above = filled(vit.PatchEmbed(2, 3, 8)), random(2, 3, 4, 6), random(2, 6, 8, seed=3)
    reference = F.conv2d(images, embed.proj.weight, embed.proj.bias, stride=2).flatten(2).transpose(1, 2)
    assert torch.equal(embed.proj(images).flatten(2).transpose(1, 2), reference), "proj is not the convolution itself"
    ours = embed(torch.from_numpy(each(patchify_loops, images, 2)))
    equal(ours, reference.detach(), "which axes of the weights belong to a pixel's place?")
    ours, reference = (
        torch.autograd.grad((z * above).sum(), list(embed.parameters()), allow_unused=True) for z in (ours, reference)
    )
    for name, gradient, expected in zip(("weight", "bias"), ours, reference, strict=True):
        equal(gradient, expected, f"the gradient of the {name}")


# ---------------------------------------------------------------------------------------------
# Eq. 1: z_0
# ---------------------------------------------------------------------------------------------

SMALL = dict(img_size=(4, 6), patch_size=2, num_classes=5, dim=8, depth=2, num_heads=2)  # grid 2x3, T = 7


@pytest.mark.equation("ViT 1")
@pytest.mark.exercise("ViT.embed")
@pytest.mark.parametrize(
    ("B", "options"),
    [
        (2, dict()),
        (1, dict(in_chans=1)),
        (2, dict(img_size=(6, 2))),
        (2, dict(pos_embed="sincos")),
        (2, dict(pos_embed="none")),
        (2, dict(pool="mean", class_token=False)),
        (2, dict(pool="mean", class_token=False, pos_embed="sincos")),
    ],
    ids=str,
)
def test_z0_is_the_class_token_and_the_patches_each_with_its_position(B, options):
    """ViT eq. 1: z_0 = [x_class; x_p E] + E_pos."""
    model = filled(vit.ViT(**(SMALL | options)))
    images = random(B, options.get("in_chans", 3), *model.img_size)
    what = "the class token first, and each token with its own position"
    equal(model.embed(images), each(embed_loops, images, arrays(model)), what)


@pytest.mark.equation("ViT 1")
@pytest.mark.exercise("ViT.embed")
@pytest.mark.parametrize("class_token", [True, False])
def test_visible_patches_keep_their_own_positions(class_token):
    """What MAE's encoder gets: a part of the patches, another one for each image, in the order asked for."""
    model, images = filled(vit.ViT(**SMALL, pool="mean", class_token=class_token)), random(2, 3, 4, 6)
    for visible in ([[4, 0, 3], [1, 5, 2]], [[5], [0]], [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]):
        oracle = [embed_loops(*pair, v) for *pair, v in zip(images.numpy(), [arrays(model)] * 2, visible, strict=True)]
        z0 = model.embed(images, torch.tensor(visible))
        equal(z0, np.stack(oracle), f"patches {visible} have the positions {visible}, not 0, 1, 2, …")
    assert model.encode(images, torch.tensor([[4, 0, 3], [1, 5, 2]])).shape == (2, 3 + class_token, 8)


@pytest.mark.equation("ViT 1")
@pytest.mark.exercise("ViT.embed")
@pytest.mark.parametrize("visible", [None, [[4, 0, 3], [1, 5, 2]]])
def test_corruption_comes_before_the_positions(visible):
    """Masked patch prediction alters what a patch shows, not where it is; and not the class token."""
    model, images, seen = filled(vit.ViT(**SMALL)), random(2, 3, 4, 6), []

    def corrupt(tokens):
        seen.append(tokens.shape)
        return 3 * tokens - 1

    rows = [None, None] if visible is None else visible
    oracle = [embed_loops(i, arrays(model), v, lambda t: 3 * t - 1) for i, v in zip(images.numpy(), rows, strict=True)]
    visible = None if visible is None else torch.tensor(visible)
    equal(model.embed(images, visible, corrupt), np.stack(oracle), "positions, or the class token, altered too")
    assert seen == [(2, 6 if visible is None else 3, 8)]
    z_L = model.norm(model.blocks[1](model.blocks[0](model.embed(images, visible, corrupt))))
    equal(model.encode(images, visible, corrupt=corrupt), z_L.detach(), "encode hands visible and corrupt on")


@pytest.mark.equation("ViT 1")
@pytest.mark.exercise("ViT.embed")
def test_z0_of_clip_goes_through_one_more_layer_norm():
    """pre_norm: a LayerNorm before the first block, after the positions are added."""
    model, images = filled(vit.ViT(**SMALL, pre_norm=True, eps=1e-3)), random(2, 3, 4, 6)
    w = arrays(model)
    oracle = [layer_norm_loops(embed_loops(i, w), *arrays(model, "norm_pre.").values(), 1e-3) for i in images.numpy()]
    equal(model.embed(images), np.stack(oracle), "norm_pre left out, or before the positions")


@pytest.mark.exercise("ViT.embed")
@pytest.mark.parametrize(("height", "width"), [(6, 4), (8, 12), (4, 4), (4, 8), (6, 6)])
def test_images_of_another_size_are_refused_with_both_sizes(height, width):
    """6x4 has as many patches as 4x6: without the check it would run, every position at a wrong place."""
    what = f"images of {height}x{width} pixels for a model of 4x6"
    message = refusal(what, vit.ViT(**SMALL).embed, torch.zeros(1, 3, height, width))
    numbers = re.findall(r"\d+", message)
    assert {str(side) for side in (height, width, 4, 6)} <= set(numbers), f"a size is missing in: {message}"


def test_images_of_another_size_are_refused_height_first():
    with pytest.raises(ValueError, match=r"^images are 8x10 pixels, the model was built for 4x6; resize .* img_size="):
        vit.ViT(**SMALL)(torch.zeros(1, 3, 8, 10))


# ---------------------------------------------------------------------------------------------
# Attention, MLP, block
# ---------------------------------------------------------------------------------------------

USUAL = {
    "q": "eq. 5: z U_qkv holds first all of q, then all of k, then all of v; each of them head by head",
    "k": "eq. 5: k is the second third of z U_qkv",
    "v": "eq. 5: v is the last third of z U_qkv",
    "A": "eq. 6: the softmax over keys of q kᵀ / √D_h, D_h the width of one head",
    "sa": "eq. 7: row t of A weighs the tokens' v",
}


@pytest.mark.equation("ViT 5", "ViT 6", "ViT 7", "ViT 8")
@pytest.mark.exercise("Attention.forward")
@pytest.mark.parametrize(("B", "T", "heads"), [(2, 5, 2), (1, 3, 4), (2, 1, 1)])
@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_equations_5_to_8_for_each_head(B, T, heads, fused):
    """By loops. Asked for what is `inside`, attention gives q, k, v, A and each head's SA, and the same result."""
    attention, z, inside = filled(vit.Attention(8, heads, fused=fused)), random(B, T, 8), {}
    out = attention(z, inside)
    oracle = [attention_loops(tokens, arrays(attention), heads) for tokens in z.numpy()]
    assert inside.keys() >= USUAL.keys(), f"inside has {', '.join(inside)}"
    for name, usual in USUAL.items():
        equal(inside[name], np.stack([values[name] for _, values in oracle]), usual)
    eq8 = "eq. 8: the heads of one token side by side, then U_msa"
    equal(out, np.stack([msa for msa, _ in oracle]), eq8)
    equal(attention(z), np.stack([msa for msa, _ in oracle]), f"{eq8}; not asked for `inside`, fused={fused}")


@pytest.mark.equation("ViT 6")
def test_attention_calls_the_fused_kernel_unless_told_not_to_or_asked_for_A(monkeypatch):
    """The two paths agree, so only this test notices when the slow one is always taken, or the option is lost."""
    images, options = torch.zeros(1, 3, 4, 4), dict(img_size=4, patch_size=2, dim=8, depth=2, num_heads=2)
    fused, plain = vit.ViT(**options), vit.ViT(**options, fused=False)

    def kernel(*args, **kwargs):
        raise InterruptedError("the fused kernel was called")

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    plain(images)
    fused(images, inside={})
    for module, z in ((fused, images), (vit.Block(8, 2), torch.zeros(1, 3, 8)), (vit.Attention(8, 2), z_of(3, 8))):
        with pytest.raises(InterruptedError):
            module(z)


def z_of(*shape):
    return torch.zeros(1, *shape)


def test_a_width_that_does_not_split_into_the_heads_is_refused():
    with pytest.raises(ValueError, match="^width 10 does not split into 4 heads; use a divisor of 10$"):
        vit.Attention(10, 4)


@pytest.mark.parametrize("norm", ["norm1", "norm2"])
def test_layer_norm_is_over_the_width_of_each_token_with_epsilon_1e_6(norm):
    """On tokens as small as sqrt(epsilon) the value of epsilon shows; torch's own default is 1e-5."""
    layer, z = getattr(filled(vit.Block(8, 2)), norm), random(5, 8) * 1e-3
    equal(
        layer(z), layer_norm_loops(z.numpy(), *arrays(layer).values()), "epsilon 1e-6, the variance over D, not D - 1"
    )


@pytest.mark.equation("GELU and MLP")
@pytest.mark.exercise("MLP.forward")
@pytest.mark.parametrize("gelu", ["exact", "none", "tanh", "quick"])
@pytest.mark.parametrize("B", [1, 2])
def test_mlp_is_two_linear_maps_with_a_gelu_between(gelu, B):
    """GELU(x) = x Φ(x), or an approximation: the tanh formula, or x σ(1.702 x)."""
    mlp, z = filled(vit.MLP(8, 12, gelu=gelu)), random(B, 5, 8)
    equal(mlp(z), each(mlp_loops, z, arrays(mlp), gelu), f"the {gelu} GELU, between fc1 and fc2")


def test_drop_path_leaves_out_whole_images_and_keeps_the_expected_value():
    """Stochastic depth: a branch is 0, or 1 / (1 - rate) times itself, for all tokens of an image at once.

    Of 20,000 images a share of 0.3 is left out with a standard deviation of 0.0032, so 0.015 is far beyond chance.
    """
    torch.manual_seed(0)
    drop_path, branch = vit.DropPath(0.3), torch.ones(20000, 2, 3)
    out = drop_path(branch)
    assert torch.all(out == out[:, :1, :1]), "tokens or channels of one image were drawn apart"
    kept = out[:, 0, 0] != 0
    assert 1 - kept.double().mean() == pytest.approx(0.3, abs=0.015), "rate is the probability of leaving out"
    equal(out[kept], np.full((int(kept.sum()), 2, 3), 1 / 0.7), "kept branches are divided by 1 - rate", 1e-6)
    assert out.mean() == pytest.approx(1, abs=0.02), "the expected value"
    assert drop_path(branch.bfloat16()).dtype == torch.bfloat16, "the data type changed"
    assert torch.equal(drop_path.eval()(branch), branch), "in evaluation nothing is left out or scaled"
    assert vit.DropPath(0.0)(branch) is branch, "with the rate 0 no number is drawn"
    elsewhere = torch.zeros(2, 3, 4, device="meta")
    assert vit.DropPath(0.3)(elsewhere).device == elsewhere.device, "numbers are drawn where the branch is"


@pytest.mark.equation("ViT 2", "ViT 3")
@pytest.mark.exercise("Block.forward")
@pytest.mark.parametrize("options", [dict(), dict(mlp_ratio=2.5, gelu="tanh", fused=False), dict(eps=0.1)], ids=str)
@pytest.mark.parametrize("B", [1, 2])
def test_block_is_equations_2_and_3(options, B):
    """LayerNorm before each branch and nothing on the residual path (pre-norm)."""
    block, z = filled(vit.Block(8, 2, **options)), random(B, 5, 8)
    oracle = each(block_loops, z, arrays(block), 2, options.get("gelu", "exact"), options.get("eps", 1e-6))
    equal(block(z), oracle, "LN before each branch, none on the residual path; eq. 3 starts from z', not z")
    assert len(block.mlp.fc1.weight) == int(8 * options.get("mlp_ratio", 4)), "the hidden width is mlp_ratio * D"


@pytest.mark.equation("ViT 2", "ViT 3")
@pytest.mark.exercise("Block.forward")
def test_inside_a_block_are_z_prime_z_and_what_attention_puts_there():
    block, z, inside = filled(vit.Block(8, 2)), random(2, 5, 8), {}
    out, w = block(z, inside), arrays(block)
    assert inside.keys() >= {*USUAL, "z_prime", "z"}, f"inside has {', '.join(inside)}"
    for b, tokens in enumerate(z.numpy()):
        normed = layer_norm_loops(tokens, w["norm1.weight"], w["norm1.bias"])
        msa, values = attention_loops(normed, arrays(block, "attn."), 2)
        equal(inside["A"][b], values["A"], "A of attention on LN(z)")
        equal(inside["z_prime"][b], msa + tokens, "z_prime is z' of eq. 2")
    equal(inside["z"], each(block_loops, z, w, 2), "z is z_ℓ of eq. 3")
    equal(out, each(block_loops, z, w, 2), "asking for `inside` must not change the result")


@pytest.mark.exercise("Block.forward")
def test_block_drops_its_two_branches_independently():
    """Each image of a batch gets one of four results: attention kept or not, MLP kept or not.

    The scale 1 / (1 - rate) is a float32 number, hence 1e-5. One of the four has the chance 1/16: that it never
    happens in 200 images, one in 400,000.
    """
    torch.manual_seed(0)
    block, z = filled(vit.Block(8, 2, drop_path=0.25)).train(), random(1, 3, 8)
    scales = [0, 1 / 0.75]  # left out, kept
    four = {keep: block_loops(z[0].numpy(), arrays(block), 2, keep=keep) for keep in itertools.product(scales, scales)}
    found = []
    for out in block(z.expand(200, -1, -1)).detach().numpy():
        matches = [keep for keep, oracle in four.items() if np.allclose(out, oracle, rtol=0, atol=1e-5)]
        assert len(matches) == 1, "an image's result is none of the four: is the residual path dropped or scaled?"
        found += matches
    assert set(found) == set(four), "some of the four never happen in 200 images: one draw for both branches?"


def dropped(out, plain, share, kept_scale):
    """Every number is 0 or `kept_scale` times what it is without dropout, and `share` of them are 0.

    Of 2,000 numbers the share has a standard deviation of at most 0.011, so 0.05 is beyond chance; dropout's scale is a
    float64 number here.
    """
    zero = out == 0
    equal(out[~zero], (plain[~zero] * kept_scale).detach(), "dropout acts at another place, twice, or not at all")
    assert zero.double().mean() == pytest.approx(share, abs=0.05), "the share of zeros is not the rate of dropout"


@pytest.mark.equation("ViT 8")
@pytest.mark.exercise("Attention.forward")
@pytest.mark.parametrize("fused", [True, False])
def test_attention_has_dropout_after_its_last_map_and_not_after_qkv(fused):
    """Appendix B.1. Dropout on q, k, v or A would leave other numbers than 0 and scaled ones."""
    torch.manual_seed(0)
    attention, z = filled(vit.Attention(8, 2, dropout=0.25, fused=fused)), random(50, 5, 8)
    plain = attention(z)
    dropped(attention.train()(z), plain, share=0.25, kept_scale=1 / 0.75)


@pytest.mark.equation("GELU and MLP")
@pytest.mark.exercise("MLP.forward")
def test_mlp_has_dropout_after_both_maps():
    """With fc2 the identity both act on the same numbers; with fc2 constant only the second can."""
    torch.manual_seed(0)
    mlp, z = filled(vit.MLP(8, 8, dropout=0.25)), random(50, 5, 8)
    mlp.fc2.weight.data, mlp.fc2.bias.data = torch.eye(8).double(), torch.zeros(8).double()
    plain = mlp.eval()(z)
    dropped(mlp.train()(z), plain, share=1 - 0.75**2, kept_scale=1 / 0.75**2)
    mlp.fc2.weight.data, mlp.fc2.bias.data = torch.zeros(8, 8).double(), torch.ones(8).double()
    dropped(mlp(z), torch.ones_like(z), share=0.25, kept_scale=1 / 0.75)


LEARNS = {
    "PatchEmbed.forward": lambda: (module := vit.PatchEmbed(2, 3, 8), module, (2, 5, 12)),
    "ViT.embed": lambda: (module := vit.ViT(**SMALL, pre_norm=True), module.embed, (2, 3, 4, 6)),
    "Attention.forward": lambda: (module := vit.Attention(8, 2), module, (2, 3, 8)),
    "MLP.forward": lambda: (module := vit.MLP(8, 6), module, (2, 3, 8)),
    "Block.forward": lambda: (module := vit.Block(8, 2, mlp_ratio=1, fused=False), module, (2, 3, 8)),
    "ViT.represent": lambda: (module := vit.ViT(**SMALL, pool="mean"), module.represent, (2, 3, 4, 6)),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.exercise(name)) for name in LEARNS])
def test_the_gradient_is_the_slope_for_every_weight_and_the_input(name):
    """So that all of it learns: what is cut off from its gradient gives right numbers, and stays as it started."""
    module, run, shape = LEARNS[name]()
    filled(module)
    slopes(run, random(*shape), dict(module.named_parameters()))


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------


@pytest.mark.equation("ViT 4")
@pytest.mark.exercise("ViT.represent")
@pytest.mark.parametrize(
    ("B", "options"),
    [
        (2, dict()),
        (1, dict(head="mlp")),
        (2, dict(num_classes=0)),
        (1, dict(pool="mean")),
        (2, dict(pool="mean", class_token=False, head="mlp")),
        (2, dict(pos_embed="sincos", gelu="tanh", mlp_ratio=2, fused=False)),
        (2, dict(pre_norm=True, eps=1e-5, gelu="quick")),
        (2, dict(pool="mean", eps=1e-3, pos_embed="none")),
        (2, dict(eps=1e-3, in_chans=1, img_size=(6, 2))),
    ],
    ids=str,
)
def test_a_complete_forward_equals_the_loops(B, options):
    """ViT eq. 1-4: y = LN(z_L⁰) or, mean-pooled, LN of the mean over patch tokens; then the head."""
    model = filled(vit.ViT(**(SMALL | options)))
    images = random(B, options.get("in_chans", 3), *model.img_size)
    given = {name: options[name] for name in ("pool", "gelu", "eps") if name in options}
    oracle = [vit_loops(image, arrays(model), 2, **given) for image in images.numpy()]
    equal(model.represent(images), np.stack([y for _, y, _ in oracle]), "eq. 4: LN of token 0, or of the patches' mean")
    equal(model(images), np.stack([logits for _, _, logits in oracle]), "the head: a tanh layer before it for 'mlp'")


@pytest.mark.equation("ViT 4")
@pytest.mark.exercise("ViT.represent")
def test_the_class_token_head_reads_token_0_after_the_last_layer_norm():
    """encode() gives LN(z_L) for all tokens; eq. 4 keeps the first."""
    model, images = filled(vit.ViT(**SMALL)), random(1, 3, 4, 6)
    z = vit_loops(images[0].numpy(), arrays(model), 2)[0]
    equal(model.encode(images)[0], layer_norm_loops(z[-1], *arrays(model, "norm.").values()))
    equal(model.represent(images), model.encode(images)[:, 0].detach(), "y is token 0 of what encode gives")


@pytest.mark.exercise("ViT.represent")
def test_inside_names_every_value_on_the_way():
    """The names and shapes that figures are drawn from; and to look changes nothing."""
    model, images, inside = filled(vit.ViT(**SMALL)), random(2, 3, 4, 6), {}
    logits = model(images, inside)
    assert inside.keys() == {"z0", "blocks", "y", "logits"}
    assert len(inside["blocks"]) == 2
    for block in inside["blocks"]:
        heads = dict.fromkeys(("q", "k", "v", "sa"), (2, 2, 7, 4))
        shapes = heads | {"A": (2, 2, 7, 7)} | dict.fromkeys(("z_prime", "z"), (2, 7, 8))
        assert {name: tuple(block[name].shape) for name in shapes} == shapes
    for b, image in enumerate(images.numpy()):
        z, y, _ = vit_loops(image, arrays(model), 2)
        equal(inside["z0"][b], z[0], "z0 is z_0 of eq. 1")
        equal(inside["y"][b], y, "y is that of eq. 4")
        for i, block in enumerate(inside["blocks"]):
            equal(block["z"][b], z[i + 1], f"blocks[{i}]['z'] is z after block {i}")
    equal(logits, model(images).detach(), "asking for `inside` must not change the result")
    assert torch.equal(inside["logits"], logits)


def test_dropout_and_drop_path_do_nothing_in_evaluation():
    """Both models get the same weights; the first also has rates."""
    images = random(2, 3, 4, 6)
    oracle = np.stack([vit_loops(image, arrays(filled(vit.ViT(**SMALL))), 2)[2] for image in images.numpy()])
    equal(filled(vit.ViT(**SMALL, dropout=0.5, drop_path=0.5))(images), oracle)


@pytest.mark.exercise("ViT.embed")
def test_dropout_acts_after_the_positions():
    """Appendix B.1. Before the positions are added, dropout would leave the positions alone."""
    torch.manual_seed(0)
    model, images = filled(vit.ViT(**SMALL, dropout=0.25)), random(50, 3, 4, 6)
    plain = model.embed(images)
    dropped(model.train().embed(images), plain, share=0.25, kept_scale=1 / 0.75)


@pytest.mark.parametrize("part", [vit.Block, vit.Attention, vit.MLP])
def test_nothing_is_dropped_unless_asked_for(part):
    """Also in training, by the parts that others build on."""
    module, z = filled(part(8, 2)), random(20, 3, 8)
    assert torch.equal(module.train()(z), module.eval()(z))


def test_every_block_gets_the_models_dropout_and_its_rate_of_drop_path():
    """Drop path rises linearly from 0 at the first block to the given rate at the last (Huang et al. 2016)."""
    model = vit.ViT(**(SMALL | dict(depth=4)), drop_path=0.3, dropout=0.2)
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.2}
    assert sum(isinstance(m, nn.Dropout) for m in model.modules()) == 1 + 4 * 2, (
        "after positions, MSA and the MLP's maps"
    )
    assert vit.ViT(**(SMALL | dict(depth=1)), drop_path=0.3).blocks[0].drop_path.rate == 0
    assert vit.ViT(**(SMALL | dict(depth=2)), drop_path=0.3).blocks[1].drop_path.rate == 0.3


@pytest.mark.parametrize(
    "options",
    [dict(), dict(head="mlp"), dict(pool="mean"), dict(pos_embed="sincos"), dict(pos_embed="none"), dict(fused=False)],
    ids=str,
)
def test_gradients_reach_everything_that_is_trained(options):
    """And nothing else: sine-cosine positions are fixed. The head is made non-zero, or it would let nothing through."""
    torch.manual_seed(0)
    model = vit.ViT(**SMALL, **options)
    nn.init.normal_(model.head.weight)
    F.cross_entropy(model(random(2, 3, 4, 6).float()), torch.tensor([1, 4])).backward()
    assert model.pos_embed.requires_grad == ("pos_embed" not in options)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert name == "pos_embed"
            continue
        parts = parameter.grad.chunk(3) if name.endswith("qkv.weight") else [parameter.grad]  # U_q, U_k, U_v
        parts = parameter.grad[0] if name == "pos_embed" else parts  # each position
        assert all(part.abs().max() > 0 for part in parts), f"no gradient reaches (a part of) {name}"


def test_a_class_token_head_without_class_token_is_refused():
    with pytest.raises(ValueError, match='^pool="cls" needs the class token; use pool="mean" or class_token=True$'):
        vit.ViT(**SMALL, class_token=False)


@pytest.mark.parametrize(
    ("option", "there_are"),
    [
        ("pool", "cls, mean"),
        ("head", "linear, mlp"),
        ("pos_embed", "learned, sincos, none, 1d"),
        ("gelu", "exact, tanh, quick, none"),
    ],
)
def test_an_unknown_word_is_refused_with_those_that_there_are(option, there_are):
    with pytest.raises(ValueError, match=f"^unknown {option} 'max'; there are {there_are}$"):
        vit.ViT(**SMALL, **{option: "max"})


def test_positions_are_learned_fixed_or_none():
    """Learned ones, "1d" for short, and fixed ones are in a checkpoint; where there are none, nothing is."""
    for name, trained, stored in (("learned", True, True), ("1d", True, True), ("sincos", False, True)):
        model = vit.ViT(**SMALL, pos_embed=name)
        assert (model.pos_embed.requires_grad, "pos_embed" in model.state_dict()) == (trained, stored)
    none = vit.ViT(**SMALL, pos_embed="none")
    assert "pos_embed" not in none.state_dict()
    assert torch.equal(none.pos_embed, torch.zeros(1, 7, 8))


def test_what_the_outside_may_ask_a_model():
    model = vit.ViT(**(SMALL | dict(img_size=8)))
    assert (model.img_size, model.grid, model.patch_size) == ((8, 8), (4, 4), 2)
    assert (model.num_prefix_tokens, model.dim, model.pool) == (1, 8, "cls")
    other = vit.ViT(**(SMALL | dict(img_size=[4, 6])), pool="mean", class_token=False)
    assert (other.img_size, other.grid) == ((4, 6), (2, 3))
    assert (other.num_prefix_tokens, other.pool, other.cls_token) == (0, "mean", None)


# ---------------------------------------------------------------------------------------------
# First weights
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_the_head_starts_at_zero(head):
    """So fine-tuning starts from equal logits, and the first steps do not disturb the trained layers."""
    model = vit.ViT(**SMALL, head=head)
    assert torch.equal(model(random(2, 3, 4, 6).float()), torch.zeros(2, 5))
    assert model.represent(random(2, 3, 4, 6).float()).abs().min() > 0, "only the head may be zero"


def test_weights_start_xavier_uniform():
    """U(-a, a) with a = sqrt(6 / (in + out)). U_q, U_k and U_v are three D x D matrices: as one 3D x D matrix
    they would start sqrt(2) times too small, and E, as a convolution, with P² times too many outputs."""
    torch.manual_seed(0)
    D, P = 64, 4
    model = vit.ViT(img_size=32, patch_size=P, num_classes=5, dim=D, depth=2, num_heads=2, head="mlp")
    matrices = {"E": (model.patch_embed.proj.weight, 3 * P * P, D), "pre_logits": (model.pre_logits.fc.weight, D, D)}
    for i, block in enumerate(model.blocks):
        for name, U in zip(("U_q", "U_k", "U_v"), block.attn.qkv.weight.chunk(3), strict=True):
            matrices[f"{name} of block {i}"] = (U, D, D)
        matrices[f"U_msa of block {i}"] = (block.attn.proj.weight, D, D)
        matrices[f"fc1 of block {i}"] = (block.mlp.fc1.weight, D, 4 * D)
        matrices[f"fc2 of block {i}"] = (block.mlp.fc2.weight, 4 * D, D)
    for name, (weight, inputs, outputs) in matrices.items():
        bound = math.sqrt(6 / (inputs + outputs))
        assert 0.98 * bound < weight.abs().max() <= bound * 1.000001, f"{name}: bound is not {bound:.4f}"
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.04), f"{name} is not uniform"


def test_biases_start_at_zero_positions_small_and_layer_norm_as_the_identity():
    """Positions and class token are drawn from N(0, 0.02²); fixed positions stay as they are."""
    torch.manual_seed(0)
    model = vit.ViT(img_size=32, patch_size=4, dim=256, depth=1, num_heads=2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), f"{name} is not zero"
        elif "norm" in name:
            assert (parameter == 1).all(), f"{name} is not one"
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.pos_embed.mean().item() == pytest.approx(0, abs=0.001)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    fixed = vit.ViT(**SMALL, pos_embed="sincos").pos_embed
    equal(fixed, sincos_loops(8, 2, 3, prefix=1), "fixed positions must not be drawn anew", 1e-7)


def test_a_seed_decides_weights_and_output():
    """num_classes=0, as the head of zeros would make all logits equal."""
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(vit.ViT(**(SMALL | dict(num_classes=0))))
    first, same, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    images = random(2, 3, 4, 6).float()
    assert torch.equal(models[0](images), models[1](images))
    assert not torch.equal(models[0](images), models[2](images))


# ---------------------------------------------------------------------------------------------
# Positions
# ---------------------------------------------------------------------------------------------


@pytest.mark.equation("positions grid")
@pytest.mark.exercise("interpolation_matrix")
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize(("old", "new"), [(3, 6), (5, 7), (9, 4), (5, 2), (14, 24), (4, 4), (1, 3), (4, 1), (16, 15)])
def test_interpolation_is_a_matrix_for_each_axis(old, new, original):
    """Cubic convolution about pixel centres, widened to shrink; or linear between points that keep both ends."""
    matrix, oracle = vit.interpolation_matrix(old, new, original), interpolation_loops(old, new, original)
    equal(matrix, oracle, "linear, both ends kept" if original else "a = -1/2, centres at 1/2, widened to shrink alone")
    equal(matrix.sum(dim=1), np.ones(new), "the weights of a new point sum to 1, also at the border")
    assert matrix.dtype == torch.float64, f"{matrix.dtype} in place of float64"


def test_interpolation_is_cubic_unless_asked_for_the_original():
    equal(vit.interpolation_matrix(3, 5), interpolation_loops(3, 5, original=False))


GRIDS = [((3, 5), (6, 7)), ((6, 9), (4, 2)), ((2, 5), (5, 2)), ((1, 1), (3, 2)), ((4, 3), (1, 1)), ((2, 3), (2, 4))]


@pytest.mark.equation("positions grid")
@pytest.mark.exercise("resize_pos_embed")
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize(("old", "new"), GRIDS)
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_resized_positions_are_weighted_sums_of_the_old_ones(old, new, prefix, original):
    """Rows and columns each by their own weights; the class token is not in the image, and copied."""
    pos_embed = random(1, prefix + math.prod(old), 4)
    resized = vit.resize_pos_embed(pos_embed, old, new, prefix, original)
    assert resized.shape == (1, prefix + math.prod(new), 4), f"{tuple(resized.shape)} for {prefix} tokens and {new}"
    equal(resized[:, :prefix], pos_embed[:, :prefix], "tokens are copied, and still in front", atol=0)
    equal(resized, resize_loops(pos_embed.numpy(), old, new, prefix, original), "rows by rows, columns by columns")


@pytest.mark.equation("positions grid")
@pytest.mark.exercise("resize_pos_embed")
@pytest.mark.parametrize(("old", "new"), [*GRIDS, ((14, 14), (24, 24))])
def test_resized_positions_equal_torchs_bicubic_and_the_authors_zoom(old, new):
    """ViT, section 3.2, as it is done today; and what its authors ran: scipy's zoom of order 1."""
    pos_embed = random(1, 1 + old[0] * old[1], 8)
    image = pos_embed[:, 1:].reshape(1, *old, 8).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    bicubic = F.interpolate(image, size=new, mode="bicubic", antialias=True, align_corners=False)
    resized = vit.resize_pos_embed(pos_embed, old, new)
    equal(resized[:, 1:], bicubic.flatten(2).transpose(1, 2), "a = -1/2, widened to shrink")
    zoom = (new[0] / old[0], new[1] / old[1], 1)
    zoomed = scipy.ndimage.zoom(pos_embed[0, 1:].reshape(*old, 8).numpy(), zoom, order=1)
    resized = vit.resize_pos_embed(pos_embed, old, new, original=True)
    equal(resized[:, 1:], zoomed.reshape(1, -1, 8), "original: linear, the first and the last point kept")


@pytest.mark.exercise("resize_pos_embed")
@pytest.mark.parametrize("original", [False, True])
def test_resizing_to_the_same_grid_changes_nothing(original):
    """Not a bit of it, whatever the data type, which stays."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        pos_embed = random(1, 7, 8).to(dtype)
        same = vit.resize_pos_embed(pos_embed, (2, 3), [2, 3], original=original)
        assert torch.equal(same, pos_embed), "the same grid, other numbers"
        assert vit.resize_pos_embed(pos_embed, (2, 3), (3, 2), original=original).dtype == dtype, "another data type"


@pytest.mark.exercise("resize_pos_embed")
@pytest.mark.parametrize(("entries", "prefix"), [(6, 1), (8, 1), (7, 0)])
@pytest.mark.parametrize("new", [(4, 4), (2, 3)])
def test_resizing_refuses_positions_that_do_not_fill_the_old_grid(entries, prefix, new):
    what = f"{entries} positions for {prefix} + 2x3"
    refusal(what, vit.resize_pos_embed, torch.zeros(1, entries, 8), (2, 3), new, prefix)


def test_resizing_says_what_does_not_fill_the_old_grid():
    with pytest.raises(ValueError, match=r"^8 position embeddings are not 1 \+ 2x3; check old_grid and prefix$"):
        vit.resize_pos_embed(torch.zeros(1, 8, 4), (2, 3), (4, 4))


def test_positions_are_resized_where_they_are(waits):
    """On any device, as a checkpoint's may be: no operation but a copy takes tensors of two devices."""
    with waits() as seen:
        assert vit.resize_pos_embed(torch.zeros(1, 7, 4, device="meta"), (2, 3), (4, 5)).shape == (1, 21, 4)
    assert set(seen.copies) == {"_to_copy"}


@pytest.mark.equation("sine-cosine")
@pytest.mark.exercise("sincos_pos_embed")
@pytest.mark.parametrize(("dim", "grid", "prefix"), [(8, (2, 3), 1), (16, (50, 2), 0), (12, (3, 3), 2), (4, (1, 9), 1)])
def test_sine_cosine_positions_encode_the_column_then_the_row(dim, grid, prefix):
    """MAE's order. A square grid would not tell rows from columns: its transpose has the same shape.

    Angles up to 50 may be float32, off by 2e-6, and by as much again after a power in float32.
    """
    embed = vit.sincos_pos_embed(dim, grid, prefix)
    equal(embed, sincos_loops(dim, *grid, prefix), "zeros, then column before row, sines before cosines", 1e-5)
    assert embed.dtype == torch.float32, f"{embed.dtype} in place of float32"


@pytest.mark.equation("sine-cosine")
def test_angles_of_sine_cosine_positions_are_float64():
    """Numbers up to 1 are rounded to float32, by at most 6e-8; angles that were float32 would be off by 1e-6."""
    equal(vit.sincos_pos_embed(16, (50, 2), 0), sincos_loops(16, 50, 2, 0), atol=1e-7)


@pytest.mark.equation("sine-cosine")
def test_sine_cosine_positions_have_one_prefix_token_unless_told():
    assert torch.equal(vit.sincos_pos_embed(8, (2, 3)), vit.sincos_pos_embed(8, (2, 3), prefix=1))


@pytest.mark.exercise("sincos_pos_embed")
@pytest.mark.parametrize("dim", [10, 9, 11, 2])
def test_sine_cosine_positions_need_a_width_that_is_a_multiple_of_four(dim):
    refusal(f"a width of {dim}", vit.sincos_pos_embed, dim, (2, 2))


def test_a_width_for_no_sine_cosine_positions_is_named():
    with pytest.raises(ValueError, match="^sine-cosine positions need a width that is a multiple of 4, not 10$"):
        vit.sincos_pos_embed(10, (2, 2))


# ---------------------------------------------------------------------------------------------
# Variants
# ---------------------------------------------------------------------------------------------

TABLE_1 = {"ti": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16)}


def meta(arch, img_size=224, **options):
    """The model without memory for its numbers: 632M parameters in a moment."""
    with torch.device("meta"):
        return vit.create(arch, img_size, **options)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("arch", "paper"), [("vit_b16", 86e6), ("vit_l16", 307e6), ("vit_h14", 632e6)])
def test_b_l_and_h_have_the_papers_parameter_counts(arch, paper):
    """Table 1, and exactly what its width D, depth L, and patch size P give by hand."""
    (D, L, _), P, N = TABLE_1[arch[4]], int(arch[5:]), (224 // int(arch[5:])) ** 2
    embedding = P * P * 3 * D + D
    tokens = D + (1 + N) * D  # class token, positions
    attention = D * 3 * D + 3 * D + D * D + D  # U_qkv, U_msa
    mlp = D * 4 * D + 4 * D + 4 * D * D + D
    layer_norm = 2 * D
    head = D * 1000 + 1000
    count = parameters(meta(arch))
    assert count == embedding + tokens + L * (2 * layer_norm + attention + mlp) + layer_norm + head
    assert count == pytest.approx(paper, rel=0.01)


def test_every_arch_has_a_name_and_the_width_depth_and_heads_of_its_size():
    names = {f"vit_{size}{patch}": (size, patch) for size in TABLE_1 for patch in (8, 14, 16, 32)}
    assert vit.ARCHS.keys() == names.keys() | {"vit_micro4", "vit_micro7", "vit_micro8"}
    for arch, (size, patch) in names.items():
        D, L, k = TABLE_1[size]
        assert vit.ARCHS[arch] == dict(patch_size=patch, dim=D, depth=L, num_heads=k), arch


def test_a_vit_is_vit_b_16_unless_told_otherwise():
    """The paper's at 224 pixels, for ImageNet's 1000 classes and 3 channels; nothing dropped, epsilon 1e-6."""
    with torch.device("meta"):
        models = [vit.ViT(), vit.create("vit_b16")]
    for model in models:
        assert (model.img_size, model.grid, model.pool) == ((224, 224), (14, 14), "cls")
        assert model.patch_embed.proj.weight.shape == (768, 3, 16, 16)
        assert model.pos_embed.shape == (1, 1 + 14 * 14, 768)
        assert model.pos_embed.requires_grad
        blocks = [(b.attn.num_heads, b.attn.fused, len(b.mlp.fc1.weight), b.mlp.gelu) for b in model.blocks]
        assert blocks == [(12, True, 4 * 768, "none")] * 12
        assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.0}
        assert {block.drop_path.rate for block in model.blocks} == {0.0}
        assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
        assert model.head.weight.shape == (1000, 768)
        assert list(model.pre_logits) == []
        assert isinstance(model.norm_pre, nn.Identity)


@pytest.mark.parametrize(
    ("img_size", "patch_size", "dim", "fused"),
    [(28, 4, 64, {}), (32, 4, 64, {}), (28, 7, 64, {"fused": False}), (64, 8, 96, {})],
)
def test_micro_is_small_and_made_for_small_images(img_size, patch_size, dim, fused):
    """At most 0.9M parameters without a head. The sizes are ours: depth 6, 4 heads, MLP twice as wide."""
    arch = f"vit_micro{patch_size}"
    model = meta(arch, img_size)
    assert model.grid == (img_size // patch_size, img_size // patch_size)
    assert parameters(model) - parameters(model.head) <= 900_000
    assert model(torch.zeros(2, 3, img_size, img_size, device="meta")).shape == (2, 1000)
    assert vit.ARCHS[arch] == dict(
        patch_size=patch_size, dim=dim, depth=6, num_heads=4, mlp_ratio=2, pos_embed="sincos", **fused
    ), "checkpoints of all users of this arch would not fit any more"


def test_create_passes_sizes_on_and_lets_options_win():
    model = meta("vit_b16", img_size=(32, 48), num_classes=7, in_chans=1, depth=3, num_heads=4, mlp_ratio=2)
    assert model.grid == (2, 3)
    assert model.head.weight.shape == (7, 768)
    assert model.patch_embed.proj.weight.shape == (768, 1, 16, 16)
    assert [(block.attn.num_heads, len(block.mlp.fc1.weight)) for block in model.blocks] == [(4, 2 * 768)] * 3
    assert vit.ARCHS["vit_b16"] == dict(patch_size=16, dim=768, depth=12, num_heads=12), "options changed the variant"


@pytest.mark.parametrize(
    ("arch", "nearest"), [("vitb16", "vit_b16"), ("vit_micr4", "vit_micro4"), ("vit-l32", "vit_l32"), ("?", "vit_ti8")]
)
def test_an_unknown_arch_is_refused_with_the_nearest_name(arch, nearest):
    message = rf"^unknown arch '{re.escape(arch)}'; did you mean {nearest}\? There are vit_ti8, vit_ti14, vit_ti16, "
    with pytest.raises(ValueError, match=message):
        vit.create(arch)


# ---------------------------------------------------------------------------------------------
# Looking inside
# ---------------------------------------------------------------------------------------------


@pytest.mark.equation("attention distance")
@pytest.mark.exercise("attention_distance")
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(("B", "heads", "grid", "P"), [(2, 2, (2, 3), 4), (1, 1, (3, 2), 5), (1, 2, (4, 1), 3)])
def test_attention_distance_is_the_mean_distance_in_pixels(B, heads, grid, P, prefix):
    """Figure 7: centre to centre, weighted by attention. The class token has no place: it is left out."""
    T = prefix + grid[0] * grid[1]
    A = random(B, heads, T, T).softmax(-1)
    what = "in pixels, the weights on the patches normalised again, the mean over queries and images"
    equal(vit.attention_distance(A, grid, P, prefix), attention_distance_loops(A.numpy(), grid, P, prefix), what)
    if prefix:
        equal(vit.attention_distance(A, grid, P), attention_distance_loops(A.numpy(), grid, P), what)


def test_attention_distance_has_the_data_type_of_A():
    assert vit.attention_distance(random(1, 1, 7, 7).softmax(-1).float(), (2, 3), 4).dtype == torch.float32


@pytest.mark.equation("attention rollout")
@pytest.mark.exercise("attention_rollout")
@pytest.mark.parametrize(("B", "heads", "layers"), [(2, 2, 3), (1, 3, 1), (1, 1, 2)])
def test_attention_rollout_multiplies_the_layers_with_their_residuals(B, heads, layers):
    """Figure 6 (Abnar & Zuidema 2020): the last layer stands leftmost, each is (mean over heads of A + I) / 2."""
    attentions = [random(B, heads, 4, 4, seed=seed).softmax(-1) for seed in range(layers)]
    rollout = vit.attention_rollout(attentions)
    oracle = attention_rollout_loops([A.numpy() for A in attentions])
    equal(rollout, oracle, "the last layer leftmost, each (mean of A + I) / 2")
    equal(rollout.sum(-1), np.ones((B, 4)), "rows sum to 1")


@pytest.mark.equation("similar positions")
@pytest.mark.exercise("pos_embed_similarity")
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("grid", [(2, 3), (3, 1)])
def test_position_similarity_is_the_cosine_of_every_pair(prefix, grid):
    """Figure 7, centre: [r, c] is the map of the position in row r and column c."""
    pos_embed = random(1, prefix + math.prod(grid), 8)
    oracle = similarity_loops(pos_embed.numpy(), grid, prefix)
    equal(vit.pos_embed_similarity(pos_embed, grid, prefix), oracle, "a cosine of patches' positions")
    if prefix == 1:
        equal(vit.pos_embed_similarity(pos_embed, grid), oracle, "one prefix token unless told otherwise")


# ---------------------------------------------------------------------------------------------
# Weights, and the file alone
# ---------------------------------------------------------------------------------------------


def test_weights_are_loaded_and_saved_by_the_engine(tmp_path, monkeypatch):
    """vit.py hands everything on; what the engine makes of it is tested in tests/engine/test_weights.py."""
    from engine import weights

    first, second = (filled(vit.ViT(**SMALL), seed) for seed in (0, 1))
    vit.save_weights(first, tmp_path / "vit.safetensors")
    assert vit.load_weights(second, tmp_path / "vit.safetensors") == []
    images = random(2, 3, 4, 6)
    assert torch.equal(second(images), first(images))
    for name in ("load", "write"):
        monkeypatch.setattr(weights, name, lambda *given: calls.append(given) or given)
    calls = []
    assert vit.load_weights(first, "x.pt") == (first, "x.pt", "student", None, None)
    everything = (first, "x.pt", "teacher", (2, 3), ["a", "b"])
    assert vit.load_weights(*everything) == everything
    vit.save_weights(first, "x.safetensors", "hugging-face", ["a", "b"])
    vit.save_weights(first, "x.safetensors")
    expected = [(first, "x.safetensors", "hugging-face", ["a", "b"]), (first, "x.safetensors", "timm", None)]
    assert calls[2:] == expected


@pytest.mark.parametrize(
    "options",
    [dict(), dict(pool="mean", class_token=False)],
    ids=["class token", "mean over patches"],
)
def test_the_exported_model_takes_any_number_of_images(options):
    """torch.export, and ONNX after it, keep what is a number in Python as a constant: len(z) would be one."""
    model = filled(vit.create("vit_micro4", 8, num_classes=3, depth=1, **options)).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (random(2, 3, 8, 8),), dynamic_shapes=({0: batch},)).module()
    for B in (1, 5):
        images = random(B, 3, 8, 8, seed=B)
        equal(program(images), model(images).detach().numpy(), f"{B} images, exported with 2")


ALONE = """
import torch, vit
model = vit.create("vit_b16", num_classes=10).eval()
inside = {}
with torch.no_grad():
    logits = model(torch.zeros(1, 3, 224, 224), inside)
A = [block["A"] for block in inside["blocks"]]
assert logits.shape == (1, 10) and len(A) == 12 and A[0].shape == (1, 12, 197, 197)
positions = vit.resize_pos_embed(model.pos_embed, (14, 14), (24, 24))
assert positions.shape == (1, 577, 768)
assert vit.attention_distance(A[0], (14, 14), 16).shape == (12,)
assert vit.attention_rollout(A).shape == (1, 197, 197)
"""


def test_the_file_needs_torch_alone(tmp_path):
    """Copied into an empty folder it builds ViT-B/16, runs it, and gives what is inside."""
    text = Path(vit.__file__).read_text(encoding="utf-8")
    imports = [node for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert {name.split(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}
    assert len(text.splitlines()) <= 460
    (tmp_path / "vit.py").write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
