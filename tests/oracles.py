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
    """Same shape and same numbers, or a failure that says what has to hold, and gives the first number that differs."""
    __tracebackhide__ = True
    assert isinstance(ours, torch.Tensor), f"{what}\na {type(ours).__name__} in place of a tensor"
    oracle = np.asarray(oracle.detach() if isinstance(oracle, torch.Tensor) else oracle, dtype=float)
    assert tuple(ours.shape) == oracle.shape, f"{what}\nshape {tuple(ours.shape)} instead of {oracle.shape}"
    ours = ours.detach().double().cpu().numpy()
    wrong = ~(np.abs(ours - oracle) <= atol)  # also where there is no number
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        found = (
            f"{ours[at]:.6g} instead of {oracle[at]:.6g} at {list(at)}; {wrong.sum()} of {wrong.size} numbers differ"
        )
        raise AssertionError(f"{what}\n{found}")


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


def refusal(what, call, *args):
    """The message of the ValueError that `call` raises, or a failure that says what it accepted."""
    __tracebackhide__ = True
    try:
        call(*args)
    except ValueError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{what}: a {type(error).__name__} in place of a ValueError, {error}") from error
    raise AssertionError(f"{what}: accepted, where a ValueError is promised")


def slopes(run, x, parameters=()):
    """Compare the gradients of run(x) by x and by each of the parameters with slopes, in one random direction each.

    What does not reach the result has slope 0 and no gradient, or one of zeros. All of it is float64: with steps of
    1e-5 to both sides a slope is exact to about 1e-9 of what is curved, and rounding adds 1e-10.
    """
    x = x.clone().requires_grad_()
    weights = random(*run(x).shape, seed=11)
    assert run(x).requires_grad, "the result is cut off from its gradient"
    (run(x) * weights).sum().backward()
    for name, value in {"its input": x, **dict(parameters)}.items():
        if not value.requires_grad:
            continue
        direction, ends = random(*value.shape, seed=12), []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                value += step * direction
                ends.append((run(x) * weights).sum().item())
            value += 1e-5 * direction
        slope = (ends[0] - ends[1]) / 2e-5
        gradient = 0.0 if value.grad is None else (value.grad * direction).sum().item()
        assert abs(gradient - slope) <= 1e-5 * (1 + abs(slope)), (
            f"the gradient by {name} says {gradient:.6g}, the slope is {slope:.6g}: is it cut off somewhere?"
        )


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


# ---------------------------------------------------------------------------------------------
# HPM: masks, of one image; True is hidden
# ---------------------------------------------------------------------------------------------


def count_hidden_loops(patches, ratio):
    """One patch after the other is kept, as long as no more than N (1 - ratio) are."""
    kept = 0
    while kept + 1 <= patches * (1 - ratio):
        kept += 1
    return patches - kept


def hide_loops(scores, count):
    """The largest of `scores` (N) is hidden, then the largest of the others, until `count` are."""
    scores, mask = list(scores), [False] * len(scores)
    for _ in range(count):
        largest = max(range(len(scores)), key=lambda i: scores[i])
        mask[largest], scores[largest] = True, -math.inf
    return mask


def random_mask_loops(noise, ratio):
    return hide_loops(noise, count_hidden_loops(len(noise), ratio))


def rectangle_loops(numbers, grid):
    """The patches (row, column) of the rectangle that four uniform numbers propose."""
    (rows, columns), (area, aspect, top, left) = grid, numbers
    area = max(4.0, (0.08 + (0.25 - 0.08) * area) * rows * columns)
    aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * aspect)  # log-uniform
    height, width = min(rows, round(math.sqrt(area * aspect))), min(columns, round(math.sqrt(area / aspect)))
    top, left = int(top * (rows - height + 1)), int(left * (columns - width + 1))
    return [(r, c) for r in range(top, top + height) for c in range(left, left + width)]


def block_mask_loops(draw, grid, ratio):
    """Rectangles are laid until they cover enough; of the last one, and of what is missing after 40, noise decides."""
    hidden, mask = count_hidden_loops(math.prod(grid), ratio), [False] * math.prod(grid)
    everywhere = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    for patches in [rectangle_loops(row[:4], grid) for row in draw[:40]] + [everywhere]:
        new = [p for p in (r * grid[1] + c for r, c in patches) if not mask[p]]
        new.sort(key=lambda p: -draw[p][4])
        for p in new[: hidden - sum(mask)]:
            mask[p] = True
    return mask


def grid_mask_loops(noise, grid, ratio):
    """In MAE's figure 6 the top left patch of each 2 x 2 stays: those are hidden last."""
    last = [r % 2 == 0 and c % 2 == 0 for r in range(grid[0]) for c in range(grid[1])]
    scores = [value - 1 if is_last else value for value, is_last in zip(noise, last, strict=True)]
    return hide_loops(scores, count_hidden_loops(len(noise), ratio))


def hard_mask_loops(predicted, noise, ratio, fraction):
    """int(n α_t) patches with the largest predicted loss, the rest by the noise of the others."""
    hidden = count_hidden_loops(len(noise), ratio)
    guided = hide_loops(predicted, int(hidden * fraction))
    return hide_loops([2.0 if is_guided else value for value, is_guided in zip(noise, guided, strict=True)], hidden)


# ---------------------------------------------------------------------------------------------
# HPM: targets 𝒯, of one patch or image, and metrics 𝓜, of one patch
# ---------------------------------------------------------------------------------------------


def normalise_loops(patch):
    """Mean 0 and variance 1, the unbiased variance (divided by d - 1): the values, the mean, the standard deviation."""
    mean = sum(patch) / len(patch)
    variance = sum((x - mean) ** 2 for x in patch) / (len(patch) - 1)
    std = math.sqrt(variance + 1e-6)
    return [(x - mean) / std for x in patch], mean, std


def hog_loops(image, P, bins=9):
    """image (C, H, W) -> (N, cells * C * bins): cells of 8 x 8 pixels, or the whole patch if 8 does not divide it."""
    C, H, W = image.shape
    cell, features = (P if P % 8 else 8), []
    for top in range(0, H, P):
        for left in range(0, W, P):
            feature = []
            for cell_top in range(top, top + P, cell):
                for cell_left in range(left, left + P, cell):
                    for c in range(C):
                        votes = [0.0] * bins
                        for y in range(cell_top, cell_top + cell):
                            for x in range(cell_left, cell_left + cell):
                                down = image[c, y + 1, x] - image[c, y - 1, x] if 0 < y < H - 1 else 0.0
                                along = image[c, y, x + 1] - image[c, y, x - 1] if 0 < x < W - 1 else 0.0
                                degrees = math.degrees(math.atan2(down, along)) % 180
                                votes[int(degrees / 180 * bins)] += math.hypot(down, along)
                        length = math.sqrt(sum(v**2 for v in votes))
                        feature += [v / length for v in votes]
            features.append(feature)
    return np.array(features)


def softmax_loops(x):
    return [math.exp(v) / sum(math.exp(w) for w in x) for v in x]


def unit_loops(x):
    return [v / math.sqrt(sum(w * w for w in x)) for v in x]


def metric_loops(p, t, metric):
    """𝓜 of one patch: prediction p (d), target t (d) -> a number."""
    pairs = list(zip(p, t, strict=True))
    if metric == "l2":
        return sum((a - b) ** 2 for a, b in pairs) / len(p)
    if metric == "smooth-l1":
        return sum((a - b) ** 2 / 2 if abs(a - b) < 1 else abs(a - b) - 0.5 for a, b in pairs) / len(p)
    if metric == "cosine":
        return sum((a - b) ** 2 for a, b in zip(unit_loops(p), unit_loops(t), strict=True))
    if metric == "cross-entropy":
        return -sum(a * math.log(b) for a, b in zip(softmax_loops(t), softmax_loops(p), strict=True))
    raise KeyError(metric)


# ---------------------------------------------------------------------------------------------
# HPM: the student, f_θ, d_φ and d_ψ, on one image
# ---------------------------------------------------------------------------------------------


def encoder_loops(encoder, image, visible=None):
    """f_θ of one image (C, H, W), or of its visible patches: (1 + v, D)."""
    z = embed_loops(image, arrays(encoder), visible)
    for i, block in enumerate(encoder.blocks):
        z = block_loops(z, arrays(encoder, f"blocks.{i}."), block.attn.num_heads)
    return layer_norm_loops(z, *arrays(encoder, "norm.").values()) if arrays(encoder, "norm.") else z


def decoder_loops(decoder, z, last):
    """d_φ or d_ψ of tokens z (T, d): the outputs (last, outputs) of the last tokens."""
    for i, block in enumerate(decoder.blocks):
        z = block_loops(z, arrays(decoder, f"blocks.{i}."), block.attn.num_heads)
    z = layer_norm_loops(z[len(z) - last :], *arrays(decoder, "norm.").values())
    return linear_loops(z, *arrays(decoder, "pred.").values())


def decoder_tokens_loops(student, latent, visible, hidden):
    """Class token, visible patches, mask tokens, each with its position: latent (1 + v, D) -> (1 + v + n, d)."""
    embedded = linear_loops(latent, *arrays(student, "decoder_embed.").values())
    positions, mask_token = student.decoder_pos_embed[0].numpy(), student.mask_token.detach().numpy()[0, 0]
    prefix = len(positions) - math.prod(student.encoder.grid)
    tokens = [embedded[i] + positions[i] for i in range(prefix)]
    tokens += [embedded[prefix + i] + positions[prefix + place] for i, place in enumerate(visible)]
    return np.array(tokens + [mask_token + positions[prefix + place] for place in hidden])


def student_loops(student, image, visible, hidden):
    """Prediction (n, outputs) and predicted loss (n) of the hidden patches of one image, from its visible ones.

    Without hidden patches both are answered for all others: the teacher's question about the whole image.
    """
    latent = encoder_loops(student.encoder, image, visible)
    z, last = decoder_tokens_loops(student, latent, visible, hidden), len(hidden or visible)
    prediction = None if student.decoder is None else decoder_loops(student.decoder, z, last)
    return prediction, decoder_loops(student.loss_predictor, z, last)[:, 0]


# ---------------------------------------------------------------------------------------------
# The teacher asked in turn (ours), of one image
# ---------------------------------------------------------------------------------------------


def shown_in_turn_loops(noise, hidden):
    """What each turn shows, lists of patches: turns as few as show and hide each, at equal distances on the ring."""
    N = len(noise)
    ring, turns = sorted(range(N), key=lambda i: noise[i]), 1
    while turns * (N - hidden) < N or turns * hidden < N:
        turns += 1
    return [[ring[(g * N // turns + k) % N] for k in range(N - hidden)] for g in range(turns)]


def average_in_turn_loops(turns, patches):
    """turns: of each, {hidden patch: its predicted loss} -> of each patch the mean of what it has above its turns'."""
    answers = []
    for i in range(patches):
        above = [answer[i] - sum(answer.values()) / len(answer) for answer in turns if i in answer]
        answers.append(sum(above) / len(above))
    return answers


# ---------------------------------------------------------------------------------------------
# HPM: L_pred, and its gradient, of a batch: predicted, true (B, n)
# ---------------------------------------------------------------------------------------------


def absolute_loops(predicted, true):
    """Mean squared error against true losses with mean 0 and variance 1 within each image."""
    loss, gradient, (B, n) = 0.0, np.zeros(predicted.shape), predicted.shape
    for b in range(B):
        standardised, _, _ = normalise_loops(list(true[b]))
        for i in range(n):
            loss += (predicted[b, i] - standardised[i]) ** 2 / (B * n)
            gradient[b, i] = 2 * (predicted[b, i] - standardised[i]) / (B * n)
    return loss, gradient


def log_sigmoid(x):
    return min(x, 0) - math.log1p(math.exp(-abs(x)))


def relative_loops(predicted, true):
    """Both sums over ordered pairs i ≠ j, over the number of pairs with 1⁺ or 1⁻.

    d/dx log σ(x) = 1 - σ(x) and d/dx log(1 - σ(x)) = -σ(x), with x = L̂_i - L̂_j.
    """
    loss, pairs, gradient, (B, n) = 0.0, 0, np.zeros(predicted.shape), predicted.shape
    for b in range(B):
        for i in range(n):
            for j in range(n):
                x = predicted[b, i] - predicted[b, j]
                plus, minus = int(true[b, i] > true[b, j]), int(true[b, i] < true[b, j])
                loss -= plus * log_sigmoid(x) + minus * log_sigmoid(-x)  # 1 - σ(x) = σ(-x)
                slope = -plus * math.exp(log_sigmoid(-x)) + minus * math.exp(log_sigmoid(x))
                gradient[b, i] += slope
                gradient[b, j] -= slope
                pairs += plus + minus
    return loss / max(pairs, 1), gradient / max(pairs, 1)
