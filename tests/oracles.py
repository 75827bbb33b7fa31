"""The equations of both papers once more, slowly: float64 NumPy, one number at a time, from the equation alone.

Each `..._loops` function is an oracle. It shares no code with the module that it checks: no broadcasting over a batch,
no matrix product, no torch. Code and oracle add the same float64 numbers in another order, so they may differ by
rounding alone: a few hundred operations on numbers near 1, each exact to 2^-53, are within 1e-12 on any processor.
`equal` allows 1e-10; where float32 comes in, the test says what it allows and why.
"""

import math

import numpy as np
import torch

# ---------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------


def equal(ours, oracle, what="", atol=1e-10):
    """Same shape and same numbers, or a failure that says what differs."""
    __tracebackhide__ = True
    assert tuple(ours.shape) == np.shape(oracle), f"shape {tuple(ours.shape)} instead of {np.shape(oracle)}. {what}"
    ours = ours.detach().double().cpu().numpy()
    np.testing.assert_allclose(ours, np.asarray(oracle, dtype=float), rtol=0, atol=atol, err_msg=what)


def random(*shape, seed=1):
    """Normal random numbers in float64, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(module, seed=0):
    """The module in float64 with random trainable numbers: fresh ones and zeros would hide a forgotten term."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
    return module.eval()


def arrays(module, prefix=""):
    """Its parameters as NumPy arrays by name; only those below `prefix`, without it."""
    named = module.named_parameters()
    return {name.removeprefix(prefix): p.detach().numpy() for name, p in named if name.startswith(prefix)}


def each(loops, batch, *args, **kwargs):
    """An oracle of one image for a batch of them: the results stacked."""
    return np.stack([loops(image, *args, **kwargs) for image in batch.detach().numpy()])


# ---------------------------------------------------------------------------------------------
# ViT: patches (section 3.1, eq. 1)
# ---------------------------------------------------------------------------------------------


def patchify_loops(image, P):
    """image (C, H, W) -> x_p (N, P*P*C)."""
    C, H, W = image.shape
    patches = []
    for top in range(0, H, P):
        for left in range(0, W, P):
            patches.append([image[c, top + i, left + j] for i in range(P) for j in range(P) for c in range(C)])
    return np.array(patches)


def unpatchify_loops(patches, P, grid):
    """x_p (N, P*P*C) -> image (C, H, W)."""
    rows, columns = grid
    C = patches.shape[1] // P**2
    image = np.zeros((C, rows * P, columns * P))
    for c, y, x in np.ndindex(image.shape):
        image[c, y, x] = patches[y // P * columns + x // P, (y % P * P + x % P) * C + c]
    return image


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


# ---------------------------------------------------------------------------------------------
# ViT: positions (section 3.2)
# ---------------------------------------------------------------------------------------------


def sincos_loops(dim, rows, columns, prefix):
    """Two one-dimensional encodings side by side, the column's, then the row's: (1, prefix + N, D)."""
    embed = [[0.0] * dim for _ in range(prefix)]
    for row in range(rows):
        for column in range(columns):
            entry = []
            for position in (column, row):
                angles = [position / 10000 ** (i / (dim // 4)) for i in range(dim // 4)]
                entry += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            embed.append(entry)
    return np.array([embed])


def keys_kernel(x):
    """Cubic convolution with a = -1/2 (Keys 1981, equation 15)."""
    x = abs(x)
    if x < 1:
        return 3 / 2 * x**3 - 5 / 2 * x**2 + 1
    return -1 / 2 * x**3 + 5 / 2 * x**2 - 4 * x + 2 if x < 2 else 0.0


def interpolation_loops(old, new, original=False):
    """How much of each of `old` points goes into each of `new` points: (new, old)."""
    weights = np.zeros((new, old))
    for i, j in np.ndindex(new, old):
        if original:  # first on first, last on last
            centre = i * (old - 1) / (new - 1) if new > 1 else 0
            weights[i, j] = max(0, 1 - abs(centre - j))
        else:  # pixels are [i, i + 1], so the first centre is at 1/2
            centre, stretch = (i + 0.5) * old / new, max(1, old / new)
            weights[i, j] = keys_kernel((centre - (j + 0.5)) / stretch)
    return np.array([row / sum(row) for row in weights])


def resize_loops(pos_embed, old_grid, new_grid, prefix=1, original=False):
    """Positions (1, prefix + N, D) for another grid: every new one is a weighted sum of all old ones."""
    (rows, columns), (new_rows, new_columns) = old_grid, new_grid
    down = interpolation_loops(rows, new_rows, original)
    along = interpolation_loops(columns, new_columns, original)
    out = list(pos_embed[0, :prefix])
    for r, c in np.ndindex(new_rows, new_columns):
        entry = np.zeros(pos_embed.shape[2])
        for s, d in np.ndindex(rows, columns):
            entry += down[r, s] * along[c, d] * pos_embed[0, prefix + s * columns + d]
        out.append(entry)
    return np.array([out])


# ---------------------------------------------------------------------------------------------
# ViT: attention (eq. 5-8), MLP, encoder block (eq. 2, 3)
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


def layer_norm_loops(z, weight, bias, eps=1e-6):
    """Each token of z (T, D) to mean 0 and variance 1 over its width."""
    out = np.zeros_like(z)
    for t in range(len(z)):
        D = len(z[t])
        mean = sum(z[t]) / D
        variance = sum((value - mean) ** 2 for value in z[t]) / D
        for d in range(D):
            out[t, d] = (z[t, d] - mean) / math.sqrt(variance + eps) * weight[d] + bias[d]
    return out


def gelu_loops(x, gelu="exact"):
    """GELU of one number: x Φ(x), or an approximation of it."""
    if gelu == "tanh":
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if gelu == "quick":
        return x / (1 + math.exp(-1.702 * x))
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def mlp_loops(z, w, gelu="exact"):
    hidden = linear_loops(z, w["fc1.weight"], w["fc1.bias"])
    for t, h in np.ndindex(hidden.shape):
        hidden[t, h] = gelu_loops(hidden[t, h], gelu)
    return linear_loops(hidden, w["fc2.weight"], w["fc2.bias"])


def block_loops(z, w, heads, gelu="exact", eps=1e-6, keep=(1, 1)):
    """One encoder layer on z (T, D); `keep` scales the two branches."""
    attn = {name.removeprefix("attn."): value for name, value in w.items()}
    mlp = {name.removeprefix("mlp."): value for name, value in w.items()}
    msa = attention_loops(layer_norm_loops(z, w["norm1.weight"], w["norm1.bias"], eps), attn, heads)[0]
    z_prime = keep[0] * msa + z  # eq. 2
    normed = layer_norm_loops(z_prime, w["norm2.weight"], w["norm2.bias"], eps)
    return keep[1] * mlp_loops(normed, mlp, gelu) + z_prime  # eq. 3


# ---------------------------------------------------------------------------------------------
# ViT: the model (eq. 1-4)
# ---------------------------------------------------------------------------------------------


def embed_loops(image, w, visible=None, corrupt=None):
    """z_0 for one image (C, H, W): (T, D)."""
    tokens = patch_embed_loops(image, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"])
    N, D = tokens.shape
    prefix = 1 if "cls_token" in w else 0
    positions = np.zeros((prefix + N, D))
    if "pos_embed" in w:
        positions = w["pos_embed"][0]
    if "row_pos_embed" in w:  # appendix D.4, 2-D: one half says the column, the other the row
        columns = w["column_pos_embed"].shape[1]
        for p in range(N):
            positions[prefix + p, : D // 2] = w["column_pos_embed"][0, p % columns]
            positions[prefix + p, D // 2 :] = w["row_pos_embed"][0, p // columns]
    z0 = [w["cls_token"][0, 0] + positions[0]] if prefix else []
    for p in range(N) if visible is None else visible:
        token = tokens[p] if corrupt is None else corrupt(tokens[p])
        z0.append(token + positions[prefix + p])
    return np.array(z0)


def vit_loops(image, w, heads, pool="cls", gelu="exact", eps=1e-6):
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


# ---------------------------------------------------------------------------------------------
# ViT: looking inside (figures 6, 7)
# ---------------------------------------------------------------------------------------------


def attention_distance_loops(A, grid, P, prefix=1):
    """A (B, k, T, T) -> (k,) pixels: from patch centre to patch centre, weighted by attention."""
    (rows, columns), (B, heads) = grid, A.shape[:2]
    N = rows * columns
    out = np.zeros(heads)
    for h, b, i in np.ndindex(heads, B, N):
        weights = [A[b, h, prefix + i, prefix + j] for j in range(N)]
        for j in range(N):
            rise, run = i // columns - j // columns, i % columns - j % columns
            out[h] += weights[j] / sum(weights) * P * math.sqrt(rise**2 + run**2) / (N * B)
    return out


def attention_rollout_loops(attentions):
    """A of every block, each (B, k, T, T) -> (B, T, T): the last layer stands leftmost, each is (mean A + I) / 2."""
    B, heads, T, _ = attentions[0].shape
    out = np.zeros((B, T, T))
    for b in range(B):
        product = np.eye(T)
        for A in attentions:
            layer = np.zeros((T, T))
            for i, j in np.ndindex(T, T):
                layer[i, j] = (sum(A[b, h, i, j] for h in range(heads)) / heads + (i == j)) / 2
            product = np.array(
                [[sum(layer[i, s] * product[s, j] for s in range(T)) for j in range(T)] for i in range(T)]
            )
        out[b] = product
    return out


def similarity_loops(pos_embed, grid, prefix=1):
    """pos_embed (1, prefix + N, D) -> (rows, columns, rows, columns): the cosine of every pair."""
    rows, columns = grid
    out = np.zeros((rows, columns, rows, columns))
    for r, c, s, d in np.ndindex(out.shape):
        a, b = pos_embed[0, prefix + r * columns + c], pos_embed[0, prefix + s * columns + d]
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        out[r, c, s, d] = dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))
    return out
