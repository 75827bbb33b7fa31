"""What the Vision Transformer has to compute: every equation of vit.py, once more and slowly.

Each `..._loops` function is an oracle: float64 NumPy, one number at a time, from the equation alone. The code under
test has to agree with it to about ten digits, so the models are float64 too. Read the tests in order: they follow
vit.py. Those with an `exercise` mark grade the function of that name; see tests/exercises.py.
"""

import itertools
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import nn
from torch.nn import functional as F

import vit


def equal(ours, oracle, what="", atol=1e-10):
    """Same shape and same numbers, or a failure that says what differs."""
    __tracebackhide__ = True
    assert tuple(ours.shape) == np.shape(oracle), f"shape {tuple(ours.shape)} instead of {np.shape(oracle)}. {what}"
    np.testing.assert_allclose(ours.detach().double().numpy(), oracle, rtol=0, atol=atol, err_msg=what)


def filled(module):
    """The module in float64 with random trainable numbers: fresh ones and zeros would hide a forgotten term."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.double().parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
    return module.eval()


def arrays(module, prefix=""):
    """Its parameters as NumPy arrays by name; only those below `prefix`, without it."""
    named = module.named_parameters()
    return {name.removeprefix(prefix): p.detach().numpy() for name, p in named if name.startswith(prefix)}


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------
# Patches
# ---------------------------------------------------------------------------------------------


def patchify_loops(image, P):
    """image (C, H, W) -> x_p (N, P*P*C)."""
    C, H, W = image.shape
    patches = []
    for top in range(0, H, P):
        for left in range(0, W, P):
            patches.append([image[c, top + i, left + j] for i in range(P) for j in range(P) for c in range(C)])
    return np.array(patches)


@pytest.mark.exercise("patchify")
@pytest.mark.parametrize(("height", "width"), [(6, 9), (9, 6), (3, 3)])
def test_patches_run_row_by_row_and_so_do_their_pixels_channel_last(height, width):
    """x -> x_p (ViT, section 3.1), in the order that MAE uses."""
    images = torch.arange(2.0 * 2 * height * width, dtype=torch.float64).reshape(2, 2, height, width)
    oracle = np.stack([patchify_loops(image, 3) for image in images.numpy()])
    equal(vit.patchify(images, 3), oracle, "patches, or pixels in a patch, in another order; is the channel last?")


@pytest.mark.exercise("unpatchify")
def test_unpatchify_is_the_inverse_of_patchify():
    images, patches = random(2, 3, 4, 6), random(2, 6, 12)
    equal(vit.unpatchify(vit.patchify(images, 2), 2, (2, 3)), images.numpy(), "pixels at other places of the image")
    equal(vit.patchify(vit.unpatchify(patches, 2, (2, 3)), 2), patches.numpy(), "patches in another order")


@pytest.mark.exercise("patchify")
@pytest.mark.parametrize(("height", "width"), [(30, 48), (32, 45), (30, 45)])
def test_a_patch_size_that_does_not_divide_the_image_is_refused(height, width):
    """Cutting the rest off, or padding, would change the image without a word."""
    with pytest.raises(ValueError, match=rf"{height}x{width} .*\b16\b.*32x48"):
        vit.patchify(torch.zeros(1, 3, height, width), 16)
    with pytest.raises(ValueError, match=rf"{height}x{width} .*\b16\b"):
        vit.ViT(img_size=(height, width), patch_size=16, dim=8, depth=1, num_heads=2)


@pytest.mark.exercise("unpatchify")
def test_patches_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(ValueError, match=r"\b6 patches .*2x4"):
        vit.unpatchify(torch.zeros(1, 6, 12), 2, (2, 4))


def linear_loops(x, weight, bias):
    """x (T, D_in), weight (D_out, D_in), bias (D_out) -> (T, D_out)."""
    out = np.zeros((len(x), len(weight)))
    for t in range(len(x)):
        for o in range(len(weight)):
            out[t, o] = bias[o] + sum(x[t, i] * weight[o, i] for i in range(len(x[t])))
    return out


def patch_embed_loops(image, weight, bias):
    """x_p E + b for one image; weight (D, C, P, P), as a convolution stores it."""
    D, C, P, _ = weight.shape
    E = [[weight[d, c, i, j] for i in range(P) for j in range(P) for c in range(C)] for d in range(D)]
    return linear_loops(patchify_loops(image, P), np.array(E), bias)


@pytest.mark.exercise("PatchEmbed.forward")
def test_patch_embedding_is_a_linear_map_of_each_patch():
    """x_p E + b of ViT eq. 1. E has to list the pixels in the order of x_p."""
    embed, images = filled(vit.PatchEmbed(2, 3, 8)), random(2, 3, 4, 6)
    weight, bias = arrays(embed).values()
    oracle = np.stack([patch_embed_loops(image, weight, bias) for image in images.numpy()])
    equal(embed(vit.patchify(images, 2)), oracle, "E and x_p list the pixels in different orders?")


@pytest.mark.exercise("PatchEmbed.forward")
def test_patch_embedding_is_a_convolution_with_stride_p():
    """The same numbers from torch's conv2d on the image: so a checkpoint's convolution loads as it is."""
    embed, images = filled(vit.PatchEmbed(2, 3, 8)), random(2, 3, 4, 6)
    reference = F.conv2d(images, embed.proj.weight, embed.proj.bias, stride=2)  # (B, D, rows, columns)
    reference = reference.flatten(2).transpose(1, 2).detach().numpy()
    equal(embed(vit.patchify(images, 2)), reference, "which axes of the weights belong to a pixel's place?")


# ---------------------------------------------------------------------------------------------
# Positions
# ---------------------------------------------------------------------------------------------


def sincos_loops(dim, rows, columns, prefix):
    """Two one-dimensional encodings side by side: the column's, then the row's."""
    embed = [[0.0] * dim for _ in range(prefix)]
    for row in range(rows):
        for column in range(columns):
            entry = []
            for position in (column, row):
                angles = [position / 10000 ** (i / (dim // 4)) for i in range(dim // 4)]
                entry += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            embed.append(entry)
    return np.array([embed])


@pytest.mark.exercise("sincos_pos_embed")
@pytest.mark.parametrize(("dim", "grid", "prefix"), [(8, (2, 3), 1), (16, (5, 2), 0), (12, (3, 3), 2), (4, (1, 4), 1)])
def test_sine_cosine_positions_encode_the_column_then_the_row(dim, grid, prefix):
    """MAE's order. A square grid would not tell rows from columns: its transpose has the same shape."""
    embed = vit.sincos_pos_embed(dim, grid, prefix)
    equal(embed, sincos_loops(dim, *grid, prefix), "column first? sines before cosines? zeros for the prefix?", 1e-7)
    assert embed.dtype == torch.float32


@pytest.mark.exercise("sincos_pos_embed")
def test_sine_cosine_positions_need_a_width_that_is_a_multiple_of_four():
    with pytest.raises(ValueError, match=r"\b10\b"):
        vit.sincos_pos_embed(10, (2, 2))


def keys_kernel(x):
    """Cubic convolution with a = -1/2 (Keys 1981, equation 15)."""
    x = abs(x)
    if x < 1:
        return 3 / 2 * x**3 - 5 / 2 * x**2 + 1
    return -1 / 2 * x**3 + 5 / 2 * x**2 - 4 * x + 2 if x < 2 else 0.0


def interpolation_loops(old, new, original):
    """How much of each of `old` points goes into each of `new` points: (new, old)."""
    weights = np.zeros((new, old))
    for i, j in np.ndindex(new, old):
        if original:  # first on first, last on last
            centre = i * (old - 1) / (new - 1) if new > 1 else 0
            weights[i, j] = max(0, 1 - abs(centre - j))
        else:  # pixels are [i, i + 1], so the first centre is at 1/2
            centre, stretch = (i + 0.5) * old / new, max(1, old / new)
            weights[i, j] = keys_kernel((centre - (j + 0.5)) / stretch)
    return [row / sum(row) for row in weights]


@pytest.mark.exercise("interpolation_matrix")
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize(("old", "new"), [(3, 6), (5, 7), (9, 4), (5, 2), (14, 24), (4, 4), (1, 3), (4, 1)])
def test_interpolation_is_a_matrix_for_each_axis(old, new, original):
    """Cubic convolution about pixel centres, widened to shrink; or linear between points that keep both ends."""
    matrix, oracle = vit.interpolation_matrix(old, new, original), interpolation_loops(old, new, original)
    equal(matrix, np.array(oracle), "linear, both ends kept?" if original else "centres at 1/2? widened to shrink?")
    equal(matrix.sum(dim=1), np.ones(new), "the weights of a new point sum to 1, also at the border")
    assert matrix.dtype == torch.float64


GRIDS = [((3, 5), (6, 7)), ((6, 9), (4, 2)), ((2, 5), (5, 2)), ((1, 1), (3, 2)), ((4, 3), (1, 1)), ((14, 14), (24, 24))]


@pytest.mark.exercise("resize_pos_embed")
@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_resized_positions_equal_torchs_antialiased_bicubic(old, new):
    """ViT, section 3.2, as it is done today: rows and columns each on their own, whatever the grids."""
    pos_embed = random(1, 1 + old[0] * old[1], 8)
    image = pos_embed[:, 1:].reshape(1, *old, 8).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    reference = F.interpolate(image, size=new, mode="bicubic", antialias=True, align_corners=False)
    resized = vit.resize_pos_embed(pos_embed, old, new)
    equal(resized[:, 1:], reference.flatten(2).transpose(1, 2).numpy(), "a = -1/2? widened to shrink?", 1e-5)


@pytest.mark.exercise("resize_pos_embed")
@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_resized_positions_equal_the_authors_zoom(old, new):
    """What the ViT authors ran: scipy's zoom of order 1, which keeps the corners in place."""
    pos_embed = random(1, 1 + old[0] * old[1], 8)
    zoom = (new[0] / old[0], new[1] / old[1], 1)
    reference = scipy.ndimage.zoom(pos_embed[0, 1:].reshape(*old, 8).numpy(), zoom, order=1)
    resized = vit.resize_pos_embed(pos_embed, old, new, original=True)
    equal(resized[:, 1:], reference.reshape(1, -1, 8), "linear, with the first and the last point kept?", 1e-5)


@pytest.mark.exercise("resize_pos_embed")
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_resizing_keeps_tokens_that_have_no_place(prefix, original):
    """The class token is not in the image: it is copied, and no patch position sees it."""
    pos_embed = random(1, prefix + 6, 8).float()
    resized = vit.resize_pos_embed(pos_embed, (2, 3), (4, 5), prefix, original)
    patches_alone = vit.resize_pos_embed(pos_embed[:, prefix:], (2, 3), (4, 5), 0, original)
    assert resized.dtype == torch.float32, "the data type changed"
    equal(resized[:, :prefix], pos_embed[:, :prefix].numpy(), "copied, and still in front?", atol=0)
    equal(resized[:, prefix:], patches_alone.numpy(), "a token got into the grid of patches", atol=0)


@pytest.mark.exercise("resize_pos_embed")
@pytest.mark.parametrize("original", [False, True])
def test_resizing_to_the_same_grid_changes_nothing(original):
    pos_embed = random(1, 7, 8)
    assert torch.equal(vit.resize_pos_embed(pos_embed, (2, 3), (2, 3), original=original), pos_embed)


@pytest.mark.exercise("resize_pos_embed")
@pytest.mark.parametrize(("entries", "prefix"), [(6, 1), (8, 1), (7, 0)])
def test_resizing_refuses_positions_that_do_not_fill_the_old_grid(entries, prefix):
    with pytest.raises(ValueError, match=rf"\b{entries} .*\b{prefix} \+ 2x3"):
        vit.resize_pos_embed(torch.zeros(1, entries, 8), (2, 3), (4, 4), prefix)


# ---------------------------------------------------------------------------------------------
# Attention, MLP, block
# ---------------------------------------------------------------------------------------------


def attention_loops(z, w, heads):
    """MSA of one image's tokens z (T, D), and q, k, v, A, SA of each head."""
    T, D = z.shape
    D_h = D // heads
    qkv = linear_loops(z, w["qkv.weight"], w["qkv.bias"])  # (T, 3D): all of q, then all of k, then all of v
    q, k, v, sa = np.zeros((4, heads, T, D_h))
    A = np.zeros((heads, T, T))
    for h in range(heads):
        for t in range(T):
            for d in range(D_h):
                q[h, t, d], k[h, t, d], v[h, t, d] = (qkv[t, part * D + h * D_h + d] for part in range(3))  # eq. 5
        for t in range(T):
            keys = list(k[h])
            if "relative.pos_embed" in w:  # appendix D.4: content meets the embedding of the offset too
                keys = [key + w["relative.pos_embed"][t - s + T - 1] for s, key in enumerate(keys)]
            scores = [sum(q[h, t, d] * keys[s][d] for d in range(D_h)) / math.sqrt(D_h) for s in range(T)]
            total = sum(math.exp(score) for score in scores)
            for s in range(T):
                A[h, t, s] = math.exp(scores[s]) / total  # eq. 6
            for d in range(D_h):
                sa[h, t, d] = sum(A[h, t, s] * v[h, s, d] for s in range(T))  # eq. 7
    joined = np.array([[sa[h, t, d] for h in range(heads) for d in range(D_h)] for t in range(T)])
    return linear_loops(joined, w["proj.weight"], w["proj.bias"]), dict(q=q, k=k, v=v, A=A, sa=sa)  # eq. 8


USUAL = {
    "q": "eq. 5: in which order does z U_qkv hold q, k and v, and each of them its heads?",
    "k": "eq. 5: is k taken from its own third of z U_qkv?",
    "v": "eq. 5: is v taken from its own third of z U_qkv?",
    "A": "eq. 6: is the scale there, and the width under its root that of a head? Over which axis is the softmax?",
    "sa": "eq. 7: which axis of A weighs the tokens' v?",
}


@pytest.mark.exercise("Attention.forward")
def test_attention_is_equations_5_to_8_for_each_head():
    """Asked for what is `inside`, attention gives q, k, v, A and each head's SA; all of them by loops."""
    attention, z, inside = filled(vit.Attention(8, 2)), random(2, 5, 8), {}
    out = attention(z, inside)
    oracle = [attention_loops(tokens, arrays(attention), 2) for tokens in z.numpy()]
    assert inside.keys() == USUAL.keys()
    for name, usual in USUAL.items():
        equal(inside[name], np.stack([values[name] for _, values in oracle]), usual)
    equal(out, np.stack([msa for msa, _ in oracle]), "eq. 8: the heads of one token side by side, then U_msa")
    equal(inside["A"].sum(-1), np.ones((2, 2, 5)), "rows of A sum to 1")


@pytest.mark.exercise("Attention.forward")
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("fused", [True, False])
def test_the_fused_kernel_and_the_written_out_path_both_equal_the_loops(heads, fused):
    attention, z = filled(vit.Attention(8, heads, fused=fused)), random(2, 5, 8)
    oracle = [attention_loops(tokens, arrays(attention), heads)[0] for tokens in z.numpy()]
    equal(
        attention(z), np.stack(oracle), f"{heads} heads, {'the fused kernel' if fused else 'eq. 6 and 7 written out'}"
    )


def test_attention_calls_the_fused_kernel_unless_told_not_to_or_asked_for_A(monkeypatch):
    """The two paths agree, so only this test notices when the slow one is always taken, or the option is lost."""
    images, options = torch.zeros(1, 3, 4, 4), dict(img_size=4, patch_size=2, dim=8, depth=2, num_heads=2)
    fused, plain = vit.ViT(**options), vit.ViT(**options, fused=False)

    def kernel(*args, **kwargs):
        raise InterruptedError("the fused kernel was called")

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    plain(images)
    fused(images, inside={})
    with pytest.raises(InterruptedError):
        fused(images)


def test_a_width_that_does_not_split_into_the_heads_is_refused():
    with pytest.raises(ValueError, match=r"\b10\b.*\b4\b"):
        vit.Attention(10, 4)


def layer_norm_loops(z, weight, bias, eps=1e-6):
    out = np.zeros_like(z)
    for t in range(len(z)):
        D = len(z[t])
        mean = sum(z[t]) / D
        variance = sum((value - mean) ** 2 for value in z[t]) / D
        for d in range(D):
            out[t, d] = (z[t, d] - mean) / math.sqrt(variance + eps) * weight[d] + bias[d]
    return out


def gelu_loops(x, gelu):
    if gelu == "tanh":
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if gelu == "quick":
        return x / (1 + math.exp(-1.702 * x))
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def mlp_loops(z, w, gelu="none"):
    hidden = linear_loops(z, w["fc1.weight"], w["fc1.bias"])
    for t, h in np.ndindex(hidden.shape):
        hidden[t, h] = gelu_loops(hidden[t, h], gelu)
    return linear_loops(hidden, w["fc2.weight"], w["fc2.bias"])


@pytest.mark.parametrize("norm", ["norm1", "norm2"])
def test_layer_norm_is_over_the_width_of_each_token_with_epsilon_1e_6(norm):
    """On tokens as small as sqrt(epsilon) the value of epsilon shows; torch's own default is 1e-5."""
    layer, z = getattr(filled(vit.Block(8, 2)), norm), random(5, 8) * 1e-3
    equal(layer(z), layer_norm_loops(z.numpy(), *arrays(layer).values()), "epsilon 1e-6? variance over D, not D - 1?")


@pytest.mark.exercise("MLP.forward")
@pytest.mark.parametrize("gelu", ["none", "tanh", "quick"])
def test_mlp_is_two_linear_maps_with_a_gelu_between(gelu):
    """GELU(x) = x Φ(x), or an approximation: the tanh formula, or x σ(1.702 x)."""
    mlp, z = filled(vit.MLP(8, 12, gelu=gelu)), random(2, 5, 8)
    equal(mlp(z), np.stack([mlp_loops(tokens, arrays(mlp), gelu) for tokens in z.numpy()]), "the other GELU?")


def test_drop_path_leaves_out_whole_images_and_keeps_the_expected_value():
    """Stochastic depth: a branch is 0, or 1 / (1 - rate) times itself, for all tokens of an image at once."""
    torch.manual_seed(0)
    drop_path, branch = vit.DropPath(0.3), torch.ones(20000, 2, 3)
    out = drop_path(branch)
    assert torch.all(out == out[:, :1, :1]), "tokens or channels of one image were drawn apart"
    kept = out[:, 0, 0] != 0
    assert 1 - kept.double().mean() == pytest.approx(0.3, abs=0.015), "rate is the probability of leaving out"
    equal(out[kept], np.full((int(kept.sum()), 2, 3), 1 / 0.7), "kept branches are divided by 1 - rate", 1e-6)
    assert out.mean() == pytest.approx(1, abs=0.02), "the expected value"
    assert torch.equal(drop_path.eval()(branch), branch), "in evaluation nothing is left out or scaled"


def block_loops(z, w, heads, gelu="none", eps=1e-6, keep=(1, 1)):
    """One encoder layer on z (T, D); `keep` scales the two branches."""
    attn = {name.removeprefix("attn."): value for name, value in w.items()}
    mlp = {name.removeprefix("mlp."): value for name, value in w.items()}
    msa = attention_loops(layer_norm_loops(z, w["norm1.weight"], w["norm1.bias"], eps), attn, heads)[0]
    z_prime = keep[0] * msa + z  # eq. 2
    normed = layer_norm_loops(z_prime, w["norm2.weight"], w["norm2.bias"], eps)
    return keep[1] * mlp_loops(normed, mlp, gelu) + z_prime  # eq. 3


@pytest.mark.exercise("Block.forward")
@pytest.mark.parametrize("options", [dict(), dict(mlp_ratio=2, gelu="tanh")])
def test_block_is_equations_2_and_3(options):
    """LayerNorm before each branch and nothing on the residual path (pre-norm)."""
    block, z = filled(vit.Block(8, 2, **options)), random(2, 5, 8)
    oracle = [block_loops(tokens, arrays(block), 2, options.get("gelu", "none")) for tokens in z.numpy()]
    equal(block(z), np.stack(oracle), "LN before the branch, not after? both residuals? eq. 3 starts from z', not z")
    assert len(block.mlp.fc1.weight) == 8 * options.get("mlp_ratio", 4), "the hidden width is mlp_ratio * D"


@pytest.mark.exercise("Block.forward")
def test_block_drops_its_two_branches_independently():
    """Each image of a batch gets one of four results: attention kept or not, MLP kept or not."""
    torch.manual_seed(0)
    block, z = filled(vit.Block(8, 2, drop_path=0.25)).train(), random(1, 3, 8)
    scales = [0, 1 / 0.75]  # left out, kept
    four = {keep: block_loops(z[0].numpy(), arrays(block), 2, keep=keep) for keep in itertools.product(scales, scales)}
    found = []
    for out in block(z.expand(100, -1, -1)).detach().numpy():
        matches = [keep for keep, oracle in four.items() if np.allclose(out, oracle, rtol=0, atol=1e-5)]
        assert len(matches) == 1, "an image's result is none of the four: is the residual path dropped or scaled?"
        found += matches
    assert set(found) == set(four), "some of the four never happen in 100 images: one draw for both branches?"


def dropped(out, plain, share, kept_scale):
    """Every number is 0 or `kept_scale` times what it is without dropout, and `share` of them are 0."""
    zero = out == 0
    equal(
        out[~zero], (plain[~zero] * kept_scale).detach().numpy(), "dropout acts at another place, twice, or not at all"
    )
    assert zero.double().mean() == pytest.approx(share, abs=0.05)


@pytest.mark.exercise("Attention.forward")
@pytest.mark.parametrize("fused", [True, False])
def test_attention_has_dropout_after_its_last_map_and_not_after_qkv(fused):
    """Appendix B.1. Dropout on q, k, v or A would leave other numbers than 0 and scaled ones."""
    torch.manual_seed(0)
    attention, z = filled(vit.Attention(8, 2, dropout=0.25, fused=fused)), random(50, 5, 8)
    plain = attention(z)
    dropped(attention.train()(z), plain, share=0.25, kept_scale=1 / 0.75)


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


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------

SMALL = dict(img_size=(4, 6), patch_size=2, num_classes=5, dim=8, depth=2, num_heads=2)  # grid 2x3, T = 7


def embed_loops(image, w, visible=None):
    """z_0 for one image (C, H, W): (T, D)."""
    tokens = patch_embed_loops(image, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"])
    prefix, width = 1 if "cls_token" in w else 0, tokens.shape[1]
    positions = np.zeros((prefix + len(tokens), width))
    if "pos_embed" in w:
        positions = w["pos_embed"][0]
    if "row_pos_embed" in w:  # appendix D.4, 2-D: one half says the column, the other the row
        columns = w["column_pos_embed"].shape[1]
        for p in range(len(tokens)):
            positions[prefix + p, : width // 2] = w["column_pos_embed"][0, p % columns]
            positions[prefix + p, width // 2 :] = w["row_pos_embed"][0, p // columns]
    z0 = [w["cls_token"][0, 0] + positions[0]] if prefix else []
    for p in range(len(tokens)) if visible is None else visible:
        z0.append(tokens[p] + positions[prefix + p])
    return np.array(z0)


def vit_loops(image, w, heads, pool="cls", gelu="none", eps=1e-6):
    """The whole model on one image (C, H, W), from parameters by timm's names: z_0 … z_L, y, logits."""
    z = [embed_loops(image, w)]
    if "norm_pre.weight" in w:
        z = [layer_norm_loops(z[0], w["norm_pre.weight"], w["norm_pre.bias"], eps)]
    for i in range(sum(name.endswith("norm1.bias") for name in w)):
        block = {name.removeprefix(f"blocks.{i}."): value for name, value in w.items() if f"blocks.{i}." in name}
        z.append(block_loops(z[-1], block, heads, gelu, eps))
    if pool == "cls":
        y = layer_norm_loops(z[-1], w["norm.weight"], w["norm.bias"], eps)[:1]
    else:
        patches = z[-1][1:] if "cls_token" in w else z[-1]
        y = layer_norm_loops(sum(patches)[None] / len(patches), w["fc_norm.weight"], w["fc_norm.bias"], eps)
    logits = y
    if "pre_logits.fc.weight" in w:
        logits = np.tanh(linear_loops(logits, w["pre_logits.fc.weight"], w["pre_logits.fc.bias"]))
    if "head.weight" in w:
        logits = linear_loops(logits, w["head.weight"], w["head.bias"])
    return z, y[0], logits[0]


@pytest.mark.exercise("ViT.embed")
def test_z0_is_the_class_token_and_the_patches_each_with_its_position():
    """ViT eq. 1: z_0 = [x_class; x_p E] + E_pos, on a grid that is not square."""
    model, images = filled(vit.ViT(**SMALL)), random(2, 3, 4, 6)
    oracle = np.stack([embed_loops(image, arrays(model)) for image in images.numpy()])
    equal(model.embed(images), oracle, "the class token first? each token with its own position?")


@pytest.mark.exercise("ViT.embed")
@pytest.mark.parametrize("class_token", [True, False])
def test_z0_of_visible_patches_keeps_their_own_positions(class_token):
    """What MAE's encoder gets: a part of the patches, another one for each image, in the order asked for."""
    model, images = filled(vit.ViT(**SMALL, pool="mean", class_token=class_token)), random(2, 3, 4, 6)
    visible = torch.tensor([[4, 0, 3], [1, 5, 2]])
    oracle = [embed_loops(*pair) for pair in zip(images.numpy(), [arrays(model)] * 2, visible.tolist(), strict=True)]
    equal(model.embed(images, visible), np.stack(oracle), "positions are those of the patches, not 0, 1, 2")
    assert model.encode(images, visible).shape == (2, 3 + class_token, 8)


@pytest.mark.exercise("ViT.embed")
def test_z0_of_clip_goes_through_one_more_layer_norm():
    """pre_norm: a LayerNorm before the first block, after the positions are added."""
    model, images = filled(vit.ViT(**SMALL, pre_norm=True, eps=1e-5)), random(2, 3, 4, 6)
    w = arrays(model)
    oracle = [layer_norm_loops(embed_loops(i, w), *arrays(model, "norm_pre.").values(), 1e-5) for i in images.numpy()]
    equal(model.embed(images), np.stack(oracle), "norm_pre left out, or before the positions?")


@pytest.mark.exercise("ViT.represent")
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(head="mlp"),
        dict(num_classes=0),
        dict(pool="mean"),
        dict(pool="mean", class_token=False, head="mlp"),
        dict(pos_embed="sincos", gelu="tanh", mlp_ratio=2, fused=False),
        dict(pre_norm=True, eps=1e-5, gelu="quick"),
        dict(pool="mean", eps=1e-3),
        dict(pos_embed="none"),
        dict(pos_embed="2d"),
        dict(pos_embed="2d", pool="mean", class_token=False),
        dict(pos_embed="relative"),
        dict(pos_embed="relative", fused=False, pool="mean", class_token=False),
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()) or "paper",
)
def test_a_complete_forward_equals_the_loops(options):
    """ViT eq. 1-4: y = LN(z_L⁰) or, mean-pooled, LN of the mean over patch tokens; then the head."""
    model, images = filled(vit.ViT(**(SMALL | options))), random(2, 3, 4, 6)
    given = {name: options[name] for name in ("pool", "gelu", "eps") if name in options}
    oracle = [vit_loops(image, arrays(model), 2, **given) for image in images.numpy()]
    equal(model.represent(images), np.stack([y for _, y, _ in oracle]), "eq. 4: LN of token 0, or of the patches' mean")
    equal(model(images), np.stack([logits for _, _, logits in oracle]), "the head: tanh layer first for 'mlp'")


@pytest.mark.exercise("ViT.represent")
def test_the_class_token_head_reads_token_0_after_the_last_layer_norm():
    """encode() gives LN(z_L) for all tokens; eq. 4 keeps the first."""
    model, images = filled(vit.ViT(**SMALL)), random(1, 3, 4, 6)
    z = vit_loops(images[0].numpy(), arrays(model), 2)[0]
    equal(model.encode(images)[0], layer_norm_loops(z[-1], *arrays(model, "norm.").values()))
    equal(model.represent(images), model.encode(images)[:, 0].detach().numpy())


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_the_head_starts_at_zero(head):
    """So fine-tuning starts from equal logits, and the first steps do not disturb the trained layers."""
    model = vit.ViT(**SMALL, head=head)
    assert torch.equal(model(random(2, 3, 4, 6).float()), torch.zeros(2, 5))
    assert model.represent(random(2, 3, 4, 6).float()).abs().min() > 0, "only the head may be zero"


@pytest.mark.exercise("ViT.represent")
def test_inside_names_every_value_on_the_way():
    """The names and shapes that figures are drawn from; and to look changes nothing."""
    model, images, inside = filled(vit.ViT(**SMALL)), random(2, 3, 4, 6), {}
    logits = model(images, inside)
    assert inside.keys() == {"z0", "blocks", "y", "logits"}
    assert inside["z0"].shape == (2, 7, 8)
    assert inside["y"].shape == (2, 8)
    assert len(inside["blocks"]) == 2
    for block in inside["blocks"]:
        heads = dict.fromkeys(("q", "k", "v", "sa"), (2, 2, 7, 4))
        shapes = heads | {"A": (2, 2, 7, 7)} | dict.fromkeys(("z_prime", "z"), (2, 7, 8))
        assert {name: tuple(value.shape) for name, value in block.items()} == shapes
    equal(logits, model(images).detach().numpy(), "asking for `inside` must not change the result")
    assert torch.equal(inside["logits"], logits)


@pytest.mark.exercise("Block.forward")
def test_inside_holds_the_values_that_its_names_say():
    model, images, inside = filled(vit.ViT(**SMALL)), random(1, 3, 4, 6), {}
    model(images, inside)
    z, y, _ = vit_loops(images[0].numpy(), arrays(model), 2)
    equal(inside["z0"][0], z[0])
    equal(inside["y"][0], y)
    for i, block in enumerate(inside["blocks"]):
        equal(block["z"][0], z[i + 1], f"z after block {i}")
        w = arrays(model, f"blocks.{i}.")
        normed = layer_norm_loops(z[i], w["norm1.weight"], w["norm1.bias"])
        msa, values = attention_loops(normed, arrays(model, f"blocks.{i}.attn."), 2)
        equal(block["A"][0], values["A"], f"A of block {i}")
        equal(block["z_prime"][0], msa + z[i], f"eq. 2 in block {i}")


def test_dropout_and_drop_path_do_nothing_in_evaluation():
    """Both models get the same weights; the first also has rates."""
    images = random(2, 3, 4, 6)
    oracle = np.stack([vit_loops(image, arrays(filled(vit.ViT(**SMALL))), 2)[2] for image in images.numpy()])
    equal(filled(vit.ViT(**SMALL, dropout=0.5, drop_path=0.5))(images), oracle)


@pytest.mark.exercise("ViT.embed")
def test_dropout_acts_after_the_positions_and_in_every_block():
    """Appendix B.1. Before the positions are added, dropout would leave the positions alone."""
    torch.manual_seed(0)
    model, images = filled(vit.ViT(**SMALL, dropout=0.25)), random(50, 3, 4, 6)
    z0 = model.embed(images)
    dropped(model.train().embed(images), z0, share=0.25, kept_scale=1 / 0.75)
    for i, block in enumerate(model.blocks):
        for branch in (block.attn, block.mlp):
            share = (branch(z0) == 0).double().mean()
            assert share == pytest.approx(0.25, abs=0.05), f"block {i} does not get the model's dropout"


def test_drop_path_rises_linearly_over_depth():
    """0 at the first block, the given rate at the last (Huang et al. 2016)."""
    rates = [block.drop_path.rate for block in vit.ViT(**(SMALL | dict(depth=4)), drop_path=0.3).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert vit.ViT(**(SMALL | dict(depth=1)), drop_path=0.3).blocks[0].drop_path.rate == 0


@pytest.mark.parametrize(
    "options",
    [dict(), dict(head="mlp"), dict(pool="mean"), *(dict(pos_embed=e) for e in ("sincos", "none", "2d", "relative"))],
    ids=lambda o: str(o),
)
def test_gradients_reach_everything_that_is_trained(options):
    """And nothing else: sine-cosine positions are fixed. The head is made non-zero, or it would let nothing through."""
    torch.manual_seed(0)
    model = vit.ViT(**SMALL, **options)
    nn.init.normal_(model.head.weight)
    F.cross_entropy(model(random(2, 3, 4, 6).float()), torch.tensor([1, 4])).backward()
    for name, parameter in model.named_parameters():
        if name == "pos_embed" and options.get("pos_embed") == "sincos":
            assert not parameter.requires_grad
            assert parameter.grad is None
            continue
        parts = parameter.grad.chunk(3) if name.endswith("qkv.weight") else [parameter.grad]  # U_q, U_k, U_v
        parts = parameter.grad.flatten(0, -2) if name.endswith("pos_embed") else parts  # each position, each offset
        if "relative" in name and not name.startswith("blocks.0"):  # the head reads token 0, which meets half of them
            parts = parts[: len(parts) // 2 + 1]
        assert all(part.abs().max() > 0 for part in parts), f"no gradient reaches (a part of) {name}"


def test_two_dimensional_positions_need_an_even_width():
    with pytest.raises(ValueError, match="halves, not 9"):
        vit.ViT(**(SMALL | dict(dim=9, num_heads=3)), pos_embed="2d")


def test_relative_attention_can_tell_orders_apart_and_no_positions_can_not():
    """Without positions the mean of the patch tokens is the same in any order; with offsets it is not (D.4)."""
    images = random(1, 3, 4, 6)
    patches = vit.patchify(images, 2)
    shuffled = vit.unpatchify(patches[:, [3, 1, 4, 0, 5, 2]], 2, (2, 3))
    for pos_embed, told in (("none", False), ("relative", True), ("2d", True)):
        model = filled(vit.ViT(**SMALL, pos_embed=pos_embed, pool="mean"))
        assert (not torch.allclose(model(images), model(shuffled), atol=1e-8)) == told


@pytest.mark.exercise("ViT.embed")
@pytest.mark.parametrize(("height", "width"), [(6, 4), (8, 12), (4, 4)])
def test_images_of_another_size_are_refused_with_both_sizes(height, width):
    """6x4 has as many patches as 4x6: without the check it would run, every position at a wrong place."""
    with pytest.raises(ValueError, match=rf"{height}x{width}.*4x6"):
        vit.ViT(**SMALL)(torch.zeros(1, 3, height, width))


def test_a_class_token_head_without_class_token_is_refused():
    with pytest.raises(ValueError, match="class token"):
        vit.ViT(**SMALL, class_token=False)


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
    """Positions and class token are drawn from N(0, 0.02²)."""
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


def test_every_arch_has_a_name():
    sized = {f"vit_{size}{patch}" for size in TABLE_1 for patch in (8, 14, 16, 32)}
    hybrids = {f"{name}_{size}{patch}" for size in TABLE_1 for name, patch in HYBRIDS}
    assert set(vit.ARCHS) == sized | hybrids | {"r_vit_ti16", "vit_micro4"}


HYBRIDS = ("r50_vit", 16), ("r50_vit", 32), ("r26_vit", 32)


@pytest.mark.parametrize("arch", [arch for arch in vit.ARCHS if arch.startswith("vit_") and arch != "vit_micro4"])
def test_every_arch_is_the_width_depth_and_heads_of_its_size(arch):
    size, patch = re.fullmatch(r"vit_([a-z]+)(\d+)", arch).groups()
    model = meta(arch)
    D, L, k = TABLE_1[size]
    assert model.patch_embed.proj.weight.shape == (D, 3, int(patch), int(patch))
    assert model.pos_embed.shape == (1, 1 + (224 // int(patch)) ** 2, D)
    assert [(block.attn.num_heads, len(block.mlp.fc1.weight)) for block in model.blocks] == [(k, 4 * D)] * L
    assert model.head.weight.shape == (1000, D)


@pytest.mark.parametrize("img_size", [28, 32])
def test_micro_is_small_and_made_for_small_images(img_size):
    model = meta("vit_micro4", img_size)
    assert model.grid == (img_size // 4, img_size // 4)
    assert parameters(model) <= 900_000
    assert model(torch.zeros(2, 3, img_size, img_size, device="meta")).shape == (2, 1000)


def test_create_passes_sizes_on_and_lets_options_win():
    model = meta("vit_b16", img_size=(32, 48), num_classes=7, in_chans=1, depth=3, num_heads=4, mlp_ratio=2)
    assert model.grid == (2, 3)
    assert model.head.weight.shape == (7, 768)
    assert model.patch_embed.proj.weight.shape == (768, 1, 16, 16)
    assert [(block.attn.num_heads, len(block.mlp.fc1.weight)) for block in model.blocks] == [(4, 2 * 768)] * 3
    assert vit.ARCHS["vit_b16"] == dict(patch_size=16, dim=768, depth=12, num_heads=12), "options changed the variant"


@pytest.mark.parametrize(
    ("arch", "nearest"), [("vitb16", "vit_b16"), ("vit_micro", "vit_micro4"), ("vit-l32", "vit_l32")]
)
def test_an_unknown_arch_is_refused_with_the_nearest_name(arch, nearest):
    with pytest.raises(ValueError, match=rf"{arch}.*did you mean {nearest}\b"):
        vit.create(arch)


# ---------------------------------------------------------------------------------------------
# Looking inside
# ---------------------------------------------------------------------------------------------


@pytest.mark.exercise("attention_distance")
@pytest.mark.parametrize("prefix", [0, 1])
def test_attention_distance_is_the_mean_distance_in_pixels(prefix):
    """Figure 7: centre to centre, weighted by attention. The class token has no place: it is left out."""
    rows, columns, P, B, heads = 2, 3, 4, 2, 2
    N = rows * columns
    A = random(B, heads, prefix + N, prefix + N).softmax(-1)
    oracle = np.zeros(heads)
    for h in range(heads):
        for b in range(B):
            for i in range(N):
                weights = [float(A[b, h, prefix + i, prefix + j]) for j in range(N)]
                for j in range(N):
                    rise, run = i // columns - j // columns, i % columns - j % columns
                    distance = P * math.sqrt(rise**2 + run**2)
                    oracle[h] += weights[j] / sum(weights) * distance / (N * B)
    equal(vit.attention_distance(A, (rows, columns), P, prefix), oracle, "in pixels? weights normalised again?")


@pytest.mark.exercise("attention_rollout")
def test_attention_rollout_multiplies_the_layers_with_their_residuals():
    """Figure 6 (Abnar & Zuidema 2020): the last layer stands leftmost, each is (mean over heads of A + I) / 2."""
    B, heads, T = 2, 2, 4
    attentions = [random(B, heads, T, T, seed=seed).softmax(-1) for seed in range(3)]
    oracle = np.zeros((B, T, T))
    for b in range(B):
        layers = []
        for A in attentions:
            mean = [[sum(float(A[b, h, i, j]) for h in range(heads)) / heads for j in range(T)] for i in range(T)]
            layers.append([[(mean[i][j] + (i == j)) / 2 for j in range(T)] for i in range(T)])
        for i, j in itertools.product(range(T), range(T)):  # every path from token j up to token i
            for s, t in itertools.product(range(T), range(T)):
                oracle[b, i, j] += layers[2][i][t] * layers[1][t][s] * layers[0][s][j]
    rollout = vit.attention_rollout(attentions)
    equal(rollout, oracle, "layers multiplied in the other order, or the residual forgotten?")
    equal(rollout.sum(-1), np.ones((B, T)), "rows sum to 1")


@pytest.mark.exercise("pos_embed_similarity")
@pytest.mark.parametrize("prefix", [0, 1])
def test_position_similarity_is_the_cosine_of_every_pair(prefix):
    """Figure 7, centre: [r, c] is the map of the position in row r and column c."""
    rows, columns, D = 2, 3, 8
    pos_embed = random(1, prefix + rows * columns, D)
    oracle = np.zeros((rows, columns, rows, columns))
    for r, c, s, d in np.ndindex(oracle.shape):
        a, b = pos_embed[0, prefix + r * columns + c].tolist(), pos_embed[0, prefix + s * columns + d].tolist()
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        oracle[r, c, s, d] = dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))
    equal(vit.pos_embed_similarity(pos_embed, (rows, columns), prefix), oracle, "a cosine of patches' positions?")


# ---------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------

SQUARE = SMALL | dict(img_size=6)  # grid 3x3


def timm_file(D=8, hidden=32, depth=2, patches=9, classes=5, P=2):
    """A state dict with the names and the shapes of timm's VisionTransformer, written out by hand."""
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, 1 + patches, D)}
    shapes |= {"patch_embed.proj.weight": (D, 3, P, P), "patch_embed.proj.bias": (D,)}
    for i in range(depth):
        layers = {"norm1": (D,), "attn.qkv": (3 * D, D), "attn.proj": (D, D), "norm2": (D,)}
        layers |= {"mlp.fc1": (hidden, D), "mlp.fc2": (D, hidden)}
        for layer, shape in layers.items():
            shapes |= {f"blocks.{i}.{layer}.weight": shape, f"blocks.{i}.{layer}.bias": shape[:1]}
    shapes |= {"norm.weight": (D,), "norm.bias": (D,), "head.weight": (classes, D), "head.bias": (classes,)}
    return {name: random(*shape, seed=seed) / 2 for seed, (name, shape) in enumerate(shapes.items())}


def save(content, path):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("wrap", ["plain", "model", "state_dict", "module.", "model and module."])
def test_a_checkpoint_with_timms_names_gives_equal_logits(tmp_path, wrap):
    """As it is; in a training script's wrapper; and with the prefix that DataParallel puts before every name."""
    state = timm_file()
    content = {f"module.{name}": value for name, value in state.items()} if "module." in wrap else state
    if wrap.startswith(("model", "state_dict")) and wrap != "module.":
        content = {"epoch": 7, wrap.split()[0]: content, "optimizer": {"state": {}}}
    model, images = vit.ViT(**SQUARE).double(), random(2, 3, 6, 6)
    assert vit.load_weights(model, save(content, tmp_path / "vit.pt")) == [], "nothing was adapted, left or ignored"
    state = {name: value.numpy() for name, value in state.items()}
    equal(model(images), np.stack([vit_loops(image, state, 2)[2] for image in images.numpy()]))


def test_our_own_state_dict_loads_into_another_model(tmp_path):
    """Every option's parameters go to the file and come back."""
    options = SMALL | dict(pool="mean", head="mlp", pos_embed="sincos", class_token=False)
    first, second, images = filled(vit.ViT(**options)), vit.ViT(**options).double(), random(2, 3, 4, 6)
    assert vit.load_weights(second, save(first.state_dict(), tmp_path / "vit.pt")) == []
    assert torch.equal(second(images), first(images))


def test_two_dimensional_positions_are_interpolated_along_each_axis_and_it_says_so(tmp_path):
    """Columns and rows apart, on a line: as of a picture whose other side is constant."""
    there, here = (vit.ViT(**(SMALL | dict(img_size=size)), pos_embed="2d") for size in ((8, 12), (6, 4)))
    torch.save(there.state_dict(), tmp_path / "2d.pth")
    notes = vit.load_weights(here, tmp_path / "2d.pth")
    assert notes == ["row_pos_embed interpolated from 4 to 3", "column_pos_embed interpolated from 6 to 2"]
    for name, old, new in (("row_pos_embed", (4, 1), (3, 1)), ("column_pos_embed", (1, 6), (1, 2))):
        oracle = vit.resize_pos_embed(getattr(there, name).detach(), old, new, prefix=0)
        equal(getattr(here, name), oracle.numpy(), atol=1e-6)


def test_relative_positions_need_the_grid_that_they_were_trained_on(tmp_path):
    torch.save(vit.ViT(**SMALL, pos_embed="relative").state_dict(), tmp_path / "relative.pth")
    other = vit.ViT(**(SMALL | dict(img_size=(8, 12))), pos_embed="relative")
    with pytest.raises(ValueError, match=r"relative.pos_embed has the shape \(13, 4\), this model's \(49, 4\)"):
        vit.load_weights(other, tmp_path / "relative.pth")
    assert vit.load_weights(vit.ViT(**SMALL, pos_embed="relative"), tmp_path / "relative.pth") == []


def test_learned_positions_are_interpolated_to_the_models_grid_and_it_says_so(tmp_path):
    """ViT, section 3.2: fine-tuning at another resolution. Everything else loads unchanged."""
    state, model = timm_file(), vit.ViT(**(SMALL | dict(img_size=(4, 10)))).double()  # 3x3 -> 2x5
    notes = vit.load_weights(model, save(state, tmp_path / "vit.pt"))
    assert len(notes) == 1
    assert re.search("interpolated.*3x3.*2x5", notes[0])
    image = state["pos_embed"][:, 1:].reshape(1, 3, 3, 8).permute(0, 3, 1, 2)
    reference = F.interpolate(image, size=(2, 5), mode="bicubic", antialias=True, align_corners=False)
    equal(model.pos_embed[:, 1:], reference.flatten(2).transpose(1, 2).numpy(), atol=1e-5)
    equal(model.pos_embed[:, :1], state["pos_embed"][:, :1].numpy(), "the class token's position is kept")
    for name, parameter in model.named_parameters():
        assert name == "pos_embed" or torch.equal(parameter, state[name]), f"{name} was not loaded"


@pytest.mark.parametrize(
    ("there", "here", "class_token"),
    [(8, 4, True), (8, (4, 16), True), ((16, 4), (4, 16), True), (8, 4, False)],
    ids=["fewer patches", "as many, other shape", "turned", "no class token here"],
)
def test_sine_cosine_positions_are_computed_for_the_models_grid_and_it_says_so(tmp_path, there, here, class_token):
    """They are a formula: to interpolate them, or to take those of another grid, would only be wrong."""
    options = SMALL | dict(pool="mean", pos_embed="sincos")
    model = vit.ViT(**(options | dict(img_size=here, class_token=class_token)))
    file = vit.ViT(**(options | dict(img_size=there))).state_dict()
    notes = vit.load_weights(model, save(file, tmp_path / "vit.pt"))
    rows, columns = model.grid
    equal(model.pos_embed, sincos_loops(8, rows, columns, prefix=int(class_token)), "of the file's grid?", 1e-7)
    assert [bool(re.search(f"sine-cosine.*{rows}x{columns}", note)) for note in notes if "position" in note] == [True]


def test_positions_that_follow_the_formula_are_recognised_in_a_model_that_learns_its_own(tmp_path):
    """To fine-tune a pre-trained MAE at another size: exact positions, not interpolated ones, to start from."""
    model = vit.ViT(**SMALL)
    file = vit.ViT(**(SMALL | dict(img_size=8)), pos_embed="sincos").state_dict()  # 4x4 -> 2x3
    notes = vit.load_weights(model, save(file, tmp_path / "vit.pt"))
    equal(model.pos_embed, sincos_loops(8, 2, 3, prefix=1), "interpolated?", 1e-7)
    assert model.pos_embed.requires_grad, "they are the start of learned ones"
    assert len(notes) == 1
    assert re.search("sine-cosine.*2x3", notes[0])


def test_learned_positions_of_a_grid_that_is_not_square_need_the_same_grid(tmp_path):
    """A file does not say which grid its positions fill. On the model's own they load; else only a square is sure."""
    first, same = filled(vit.ViT(**SMALL)), vit.ViT(**SMALL).double()  # 2x3
    path = save(first.state_dict(), tmp_path / "vit.pt")
    assert vit.load_weights(same, path) == []
    assert torch.equal(same.pos_embed, first.pos_embed)
    with pytest.raises(ValueError, match=r"vit\.pt.*\b6 patches"):
        vit.load_weights(vit.ViT(**SQUARE), path)


def test_a_class_token_that_the_file_lacks_is_left_at_its_initial_value(tmp_path):
    """And so is its position; the patches get theirs."""
    state, model = timm_file(), filled(vit.ViT(**SQUARE))
    x_class, position = model.cls_token.clone(), model.pos_embed[:, :1].clone()
    del state["cls_token"]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    notes = vit.load_weights(model, save(state, tmp_path / "vit.pt"))
    assert torch.equal(model.cls_token, x_class)
    assert torch.equal(model.pos_embed, torch.cat([position, state["pos_embed"]], dim=1))
    assert len(notes) == 1
    assert re.search("left at.*cls_token", notes[0])


def test_a_class_token_that_the_model_lacks_is_left_out_with_its_position(tmp_path):
    """The patches keep theirs, untouched: on the same grid nothing is interpolated, and no note may say so."""
    state, model = timm_file(), vit.ViT(**SQUARE, pool="mean", class_token=False).double()
    notes = " ".join(vit.load_weights(model, save(state, tmp_path / "vit.pt")))
    assert torch.equal(model.pos_embed, state["pos_embed"][:, 1:])
    assert "cls_token" in notes
    assert "interpolated" not in notes


def test_a_head_for_other_classes_is_left_at_its_initial_value_and_it_says_so(tmp_path):
    state, model = timm_file(classes=1000), vit.ViT(**(SQUARE | dict(num_classes=10))).double()
    notes = vit.load_weights(model, save(state, tmp_path / "vit.pt"))
    assert len(notes) == 1
    assert re.search("head.*10 classes here, 1000 in the file", notes[0])
    assert not model.head.weight.any()
    assert not model.head.bias.any()
    assert torch.equal(model.blocks[1].mlp.fc2.weight, state["blocks.1.mlp.fc2.weight"])


@pytest.mark.parametrize("img_size", [6, 4], ids=["same grid", "other grid"])
def test_what_a_file_lacks_and_what_is_not_used_is_said(tmp_path, img_size):
    """A pre-trained MAE: no head, a norm that a mean-pooling model does not have, and a decoder."""
    state, model = timm_file(), vit.ViT(**(SQUARE | dict(img_size=img_size)), pool="mean")
    state["decoder_pred.weight"] = state.pop("head.weight")
    state["decoder_pred.bias"] = state.pop("head.bias")
    notes = vit.load_weights(model, save(state, tmp_path / "vit.pt"))
    left, unused = (" ".join(note for note in notes if what in note) for what in ("left at", "not used"))
    assert re.search(r"\bfc_norm\b", left)
    assert re.search(r"\bhead\b", left), "the file has no head, so the model's is untrained: say so at any image size"
    assert re.search(r"\bnorm\b", unused)
    assert re.search(r"\bdecoder\b", unused)


@pytest.mark.parametrize(
    "other",
    [
        dict(D=12, hidden=48),
        dict(D=12, hidden=48, patches=16, classes=10),
        dict(hidden=16),
        dict(P=4),
        dict(depth=1),
        dict(depth=3),
    ],
    ids=["width", "width, grid and classes", "MLP width", "patch size", "too shallow", "too deep"],
)
def test_a_file_that_does_not_fit_is_refused_and_the_model_unchanged(tmp_path, other):
    """Most of its tensors may fit: none of them may be loaded before all have been looked at."""
    model = filled(vit.ViT(**SQUARE))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"vit\.pt"):
        vit.load_weights(model, save(timm_file(**other), tmp_path / "vit.pt"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model was changed"


@pytest.mark.parametrize(
    "content",
    [
        {"fc.weight": torch.zeros(2)},
        {},
        [1, 2],
        {0: torch.zeros(2)},
        {"model": [1]},
        {"state_dict": [1]},
    ],
    ids=["other net", "empty", "list", "numbers as names", "list as model", "list as state_dict"],
)
def test_a_file_without_a_vit_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"vit\.pt"):
        vit.load_weights(vit.ViT(**SQUARE), save(content, tmp_path / "vit.pt"))


@pytest.mark.parametrize("wrong", [{"pos_embed": torch.zeros(10, 8)}, {"head.weight": 3}], ids=["an axis less", "int"])
def test_values_that_no_vit_has_are_refused(tmp_path, wrong):
    """The names are right, what they name is not."""
    with pytest.raises(ValueError, match=r"vit\.pt"):
        vit.load_weights(vit.ViT(**SQUARE), save(timm_file() | wrong, tmp_path / "vit.pt"))


class Trap:
    """Unpickled, it creates a file: a harmless stand-in for any program that a checkpoint may carry."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("torch_format", [True, False], ids=["torch.save", "pickle"])
def test_code_in_a_file_is_never_run(tmp_path, torch_format):
    """A pickle is a program. Beside good weights lies one that creates a file; the file must not appear."""
    path, created = tmp_path / "vit.pt", tmp_path / "created"
    content = {"args": Trap(created), "model": timm_file()}
    if torch_format:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=r"vit\.pt"):
        vit.load_weights(vit.ViT(**SQUARE), path)
    assert not created.exists(), "the file's code was run"
    pickle.loads(pickle.dumps(Trap(created)))
    assert created.exists(), "the trap does not work, so this test proves nothing"


@pytest.mark.parametrize(
    "content",
    [b"<!DOCTYPE html>\n<html><body>404: Not Found</body></html>", b"Not Found", b"Rate limited", b""],
    ids=["a web page", "a text", "another text", "nothing"],
)
def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path, content):
    """What a failed download leaves behind. torch takes some texts for a pickle and stumbles in its own way."""
    (tmp_path / "vit.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"vit\.pt"):
        vit.load_weights(vit.ViT(**SQUARE), tmp_path / "vit.pt")


@pytest.mark.parametrize("zipped", [True, False], ids=["format since torch 1.6", "format before"])
def test_a_cut_file_is_refused_by_name_wherever_it_was_cut(tmp_path, zipped):
    """What an interrupted download leaves behind. torch reads its two formats in different ways, so both are cut."""
    path, model = tmp_path / "vit.pt", vit.ViT(**SQUARE)
    torch.save(timm_file(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for length in [*range(1, 300), *range(300, len(content), 500)]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"vit\.pt"):
            vit.load_weights(model, path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.pt"):
        vit.load_weights(vit.ViT(**SQUARE), tmp_path / "missing.pt")
