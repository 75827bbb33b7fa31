"""Hard Patches Mining, and its baseline, the masked autoencoder.

HPM is *Hard Patches Mining for Masked Image Modeling* (Wang et al., CVPR 2023, arXiv 2304.05919), MAE is *Masked
Autoencoders Are Scalable Vision Learners* (He et al., CVPR 2022, arXiv 2111.06377). The numbers of HPM's equations
differ between its versions, so they go by name.

A masked autoencoder hides most patches of an image and learns to reconstruct them. HPM also learns which patches are
hard to reconstruct, and hides those: the teacher, a slow copy of the student, looks at the whole image, predicts a
loss for every patch, and sets the student its task. This file has HPM's order:

    masks           which patches to hide: random, block, grid      M
    targets         what to reconstruct: pixels, HOG, features      𝒯
    metrics         how far a reconstruction is off                 L_rec = 𝓜(d_φ(f_θ(x ⊙ M)), 𝒯(x ⊙ (1 - M)))
    autoencoder     encoder, decoder, loss predictor                f_θ, d_φ, d_ψ
    predicted loss  absolute, or relative                           L_pred
    easy to hard    it guides the mask, more and more               α_t = α_0 + (t / T)(α_T - α_0)
    teacher         a moving average of the student                 θ_t ← m θ_t + (1 - m) θ_s
    HPM             one step: ask the teacher, hide, reconstruct    L = L_rec + L_pred

Letters in the shapes at the end of a line:
    B images   N patches   n hidden ones   v = N - n visible ones   D the encoder's width   d the decoders' width
In every mask (B, N), True means hidden (the paper's M is 1 for visible). Nothing here draws random numbers: whoever
calls gives `noise`, uniform numbers from [0, 1), so that equal noise gives equal masks, on one machine or on many.
"""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

import vit
from vit import gather

# --- Masks -----------------------------------------------------------------------------------

MASKS = {"random": 1, "block": 5, "grid": 1, "hard": 1}  # by name: how many numbers of noise each patch needs


def count_hidden(patches, ratio):
    """How many of `patches` are hidden: N - int(N (1 - ratio)), as in MAE's code.

    Raises ValueError unless at least one patch is visible and two are hidden (a pair to compare).
    """
    if not 0 < ratio < 1:
        raise ValueError(f"mask ratio {ratio} is out of range; give a number between 0 and 1, as 0.75")
    hidden = patches - int(patches * (1 - ratio))
    if not 2 <= hidden < patches:
        raise ValueError(f"mask ratio {ratio} hides {hidden} of {patches} patches; it must hide 2 and leave 1, or more")
    return hidden


def hide_largest(score, hidden):
    """Hide the `hidden` patches with the largest score, in every image: (B, N) -> mask (B, N) bool.

    A count, not a threshold, so that every image has as many visible tokens and a batch stays a rectangle.
    """
    index = score.topk(hidden, dim=1).indices  # (B, n)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, index, True)


def random_mask(noise, ratio):
    """Hide patches at random (MAE): noise (B, N) -> mask (B, N) bool, exactly `count_hidden` True in every row."""
    return hide_largest(noise, count_hidden(noise.shape[1], ratio))


def block_mask(draw, grid, ratio):
    """Hide rectangles until the ratio is reached (BEiT's masking): draw (B, N, 5) -> mask (B, N) bool, the count exact.

    Each row of `draw` proposes a rectangle of whole patches by its first four numbers: the area, uniform from 8 to 25 %
    of the grid (at least 4 patches); the aspect ratio, height over width, log-uniform from 0.3 to 1 / 0.3; top and
    left, every place equally likely. They are laid one after the other. Of the one that covers too much, the fifth
    number of each patch decides which patches are hidden; so it does where 40 rectangles do not cover enough.
    """
    (rows, columns), device = grid, draw.device
    area, aspect, top, left = draw[:, :40, :4, None].unbind(dim=2)  # each (B, 40, 1)
    area = (rows * columns * (0.08 + 0.17 * area)).clamp(min=4)
    aspect = 0.3 ** (1 - 2 * aspect)
    height = (area * aspect).sqrt().round().clamp(max=rows)
    width = (area / aspect).sqrt().round().clamp(max=columns)
    top, left = (top * (rows - height + 1)).floor(), (left * (columns - width + 1)).floor()
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    in_rows, in_columns = (row >= top) & (row < top + height), (column >= left) & (column < left + width)
    inside = (in_rows[..., :, None] & in_columns[..., None, :]).flatten(2)  # (B, 40, N)
    # The earlier a patch is covered, the larger its score, and the surer it is hidden.
    order = torch.arange(inside.shape[1], 0, -1, dtype=torch.uint8, device=device)[:, None]
    score = (inside * order).amax(dim=1)  # (B, N)
    return hide_largest(score + draw[..., 4], count_hidden(rows * columns, ratio))


def grid_mask(noise, grid, ratio):
    """Keep patches on a regular grid (MAE, figure 6): at a ratio of 75 %, the top left one of each 2 x 2.

    noise (B, N) -> mask (B, N) bool. Those are hidden last; where the ratio asks for a part of either, at random.
    """
    odd_row, odd_column = (torch.arange(n, device=noise.device) % 2 == 1 for n in grid)
    first = (odd_row[:, None] | odd_column).flatten()  # (N,): hidden before the others
    return hide_largest(first + noise, count_hidden(noise.shape[1], ratio))


def split_mask(mask, hidden):
    """Indices of the visible and of the hidden patches, in order: mask (B, N), n in each row -> (B, v), (B, n)."""
    order = mask.int().argsort(dim=1, stable=True)  # False comes first
    return order.split([mask.shape[1] - hidden, hidden], dim=1)


# --- Targets, what the decoder has to say about a hidden patch, and metrics ------------------

FROZEN_TARGETS = ("dino", "clip")  # features of a model that others have trained
FEATURE_TARGETS = ("ema", *FROZEN_TARGETS)
TARGETS = ("pixels", "norm-pixels", "hog", *FEATURE_TARGETS)


def normalise_patches(patches):
    """𝒯, MAE's recommended target: every patch less its mean, over its std √(variance + 1e-6). Returns it, mean, std.

    patches (B, N, P*P*C) -> the same, (B, N, 1), (B, N, 1). The variance is unbiased. Flat patches become loud noise.
    """
    mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    std = (variance + 1e-6).sqrt()
    return (patches - mean) / std, mean, std


def hog(images, patch_size, bins=9):
    """𝒯, histograms of oriented gradients, MaskFeat's target (Wei et al. 2022): (B, C, H, W) -> (B, N, features).

    Central differences, zero at the image's border; the orientation, without sign, falls into one of `bins` bins and is
    weighted by its magnitude; a histogram for each channel and each cell of 8 x 8 pixels (or of the whole patch, if 8
    does not divide it) is scaled to length 1. features = cells in a patch * C * bins: cells row by row, in each
    the channels, in each the bins.
    """
    B, C, H, W = images.shape
    cell = 8 if patch_size % 8 == 0 else patch_size
    down = F.pad(images[:, :, 2:] - images[:, :, :-2], (0, 0, 1, 1))
    along = F.pad(images[..., 2:] - images[..., :-2], (1, 1))
    magnitude = (down**2 + along**2).sqrt()
    angle = torch.atan2(down, along) % math.pi  # [0, π)
    which = (angle * (bins / math.pi)).long().clamp(max=bins - 1)  # in float32 an angle just below 0 becomes π
    votes = torch.zeros(B, C, bins, H, W, device=images.device, dtype=images.dtype)
    votes.scatter_(2, which[:, :, None], magnitude[:, :, None])
    cells = F.avg_pool2d(votes.flatten(1, 2), cell)  # (B, C * bins, rows of cells, columns of cells)
    cells = F.normalize(cells.unflatten(1, (C, bins)), dim=2, eps=1e-5).flatten(1, 2)
    return vit.patchify(cells, patch_size // cell)  # the cells of a patch, side by side


METRICS = ("l2", "smooth-l1", "cosine", "cross-entropy")


def reconstruction_loss(prediction, target, metric="l2"):
    """L_rec, patch by patch: 𝓜(prediction, target), (B, n, d), (B, n, d) -> (B, n).

    metric  "l2"             mean of squared differences
            "smooth-l1"      mean of ½ d² for a difference d below 1, |d| - ½ above
            "cosine"         squared distance of the unit vectors, 2 - 2 cos
            "cross-entropy"  distillation: of softmax(prediction) with softmax(target)

    Called with the hidden patches alone: a visible one has nothing to reconstruct. Raises ValueError for other names.
    """
    if metric == "l2":
        return (prediction - target).square().mean(dim=-1)
    if metric == "smooth-l1":
        return F.smooth_l1_loss(prediction, target, reduction="none").mean(dim=-1)
    if metric == "cosine":
        return 2 - 2 * F.cosine_similarity(prediction, target, dim=-1)
    if metric == "cross-entropy":
        return -(target.softmax(dim=-1) * prediction.log_softmax(dim=-1)).sum(dim=-1)
    raise ValueError(f"unknown metric {metric!r}; there are {', '.join(METRICS)}")


# --- The autoencoder: an encoder and two decoders --------------------------------------------


class Decoder(nn.Module):
    """Blocks on all tokens, then one linear map for the last of them: d_φ and d_ψ, (B, T, d) -> (B, last, outputs).

    With P*P*C outputs it reconstructs, with one it predicts the loss. (The official code averages 768 outputs of the
    predictor to one number; one linear output is the same function.)
    """

    def __init__(self, dim, depth, num_heads, outputs):
        super().__init__()
        self.blocks = nn.ModuleList(vit.Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, outputs)

    def forward(self, z, last):
        for block in self.blocks:
            z = block(z)
        return self.pred(self.norm(z[:, -last:]))


class Autoencoder(nn.Module):
    """MAE's asymmetric autoencoder: the encoder sees visible patches alone, the decoders see mask tokens too.

    Both decoders start from the same tokens: latent ones for visible patches, a learned mask token for hidden ones,
    each with its position. MAE has no loss predictor (None).
    """

    def __init__(self, encoder, outputs, dim, depth, num_heads, loss_predictor=True):
        super().__init__()
        self.encoder = encoder
        self.decoder_embed = nn.Linear(encoder.dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = vit.sincos_pos_embed(dim, encoder.grid, encoder.num_prefix_tokens)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder = Decoder(dim, depth, num_heads, outputs)
        self.loss_predictor = Decoder(dim, depth, num_heads, 1) if loss_predictor else None
        for part in (self.decoder_embed, self.decoder, self.loss_predictor):
            if part is not None:
                vit.init_weights(part)
        nn.init.normal_(self.mask_token, std=0.02)

    def decoder_tokens(self, latent, visible, hidden):
        """What the decoders start from: (B, 1 + v, D) and indices (B, v), (B, n) -> (B, 1 + v + n, d).

        Visible patches come first, then hidden ones. Attention does not mind: each token carries its position.
        """
        z = self.decoder_embed(latent)  # (B, 1 + v, d)
        masked = self.mask_token.to(z.dtype).expand(len(z), hidden.shape[1], -1)  # (B, n, d)
        positions = self.decoder_pos_embed.expand(len(z), -1, -1)  # (B, 1 + N, d)
        x_class, patches = positions.tensor_split([self.encoder.num_prefix_tokens], dim=1)
        patches = gather(patches, torch.cat([visible, hidden], dim=1))  # (B, v + n, d)
        return torch.cat([z, masked], dim=1) + torch.cat([x_class, patches], dim=1)

    def forward(self, images, visible, hidden):
        """Reconstruct the hidden patches, and predict how well that goes, from the visible ones.

        images (B, C, H, W), indices (B, v), (B, n) -> prediction (B, n, outputs), predicted loss (B, n) or None.
        """
        latent = self.encoder.encode(images, visible)  # f_θ(x ⊙ M), (B, 1 + v, D)
        z, n = self.decoder_tokens(latent, visible, hidden), hidden.shape[1]
        predicted_loss = self.loss_predictor(z, n).squeeze(-1) if self.loss_predictor else None
        return self.decoder(z, n) if self.decoder else None, predicted_loss

    def predict_loss(self, images):
        """L̂ = d_ψ(f_θ(x)): the predicted loss of every patch of the whole image (B, N), and the features (B, N, D).

        The predictor is trained on mask tokens, and asked here about visible patches: a mismatch that the authors
        acknowledge. It takes training to bridge: in short runs this prediction is close to chance, while the student's,
        of hidden patches, is good already. No reconstruction; without a loss predictor the loss is None.
        """
        latent = self.encoder.encode(images)  # (B, 1 + N, D)
        z, N = self.decoder_embed(latent) + self.decoder_pos_embed, math.prod(self.encoder.grid)
        predicted_loss = self.loss_predictor(z, N).squeeze(-1) if self.loss_predictor else None
        return predicted_loss, latent[:, -N:]


# --- Predicted loss: how it is learned, and how it guides the mask, from easy to hard --------

PREDICTORS = ("relative", "absolute", "none")


def absolute_loss(predicted, true):
    """L_pred, absolute: squared error against the true losses, standardised within each image.

    predicted, true (B, n), hidden patches alone -> a scalar, the mean over patches. Standardised as in
    `normalise_patches`. `true` is a target: no gradient flows into it.
    """
    true = true.detach()
    mean, variance = true.mean(dim=1, keepdim=True), true.var(dim=1, keepdim=True)
    return (predicted - (true - mean) / (variance + 1e-6).sqrt()).square().mean()


def relative_loss(predicted, true):
    """L_pred, relative: for each pair of hidden patches, which of them is the harder one?

    - Σ_i Σ_{j≠i} 1⁺_ij log σ(L̂_i - L̂_j) - Σ_i Σ_{j≠i} 1⁻_ij log(1 - σ(L̂_i - L̂_j)), over the number of pairs with 1⁺
    or 1⁻; 1⁺_ij is 1 where the true loss of i is larger than that of j, 1⁻_ij where it is smaller; equal ones are no
    pair. predicted, true (B, n), hidden patches alone -> a scalar, 0 without any pair. No gradient flows into `true`.

    As 1 - σ(x) = σ(-x), a pair adds the same to both sums, once as (i, j) and once as (j, i): the mean over all pairs
    is the mean over those with 1⁺. And -log σ(x) = softplus(-x), without a log to overflow.
    """
    harder = true[:, :, None] > true[:, None, :]  # 1⁺, (B, n, n)
    pairs = harder.sum().clamp(min=1)  # before there are floats: to sum them, bools become integers of 8 bytes
    margin = predicted[:, None, :] - predicted[:, :, None]  # L̂_j - L̂_i
    # In place, and softplus(-inf) = 0 with gradient 0: one (B, n, n) of floats is all that backward keeps.
    margin.masked_fill_(~harder, -math.inf)
    return F.softplus(margin).sum() / pairs


@torch.no_grad()
def rank_correlation(predicted, true):
    """Spearman's rank correlation, averaged over images: (B, n), (B, n) -> a scalar in [-1, 1].

    Says whether the loss predictor knows which patches are hard. Ties are ranked in order of place.
    """
    ranks = [v.argsort(dim=1, stable=True).argsort(dim=1).float() for v in (predicted, true)]
    a, b = (r - r.mean(dim=1, keepdim=True) for r in ranks)
    return F.cosine_similarity(a, b, dim=1).mean()


def hard_fraction(t, T, alpha_0=0.0, alpha_T=0.5):
    """Easy to hard: α_t = α_0 + (t / T)(α_T - α_0), the share of hidden patches that the teacher picks."""
    return alpha_0 + t / T * (alpha_T - alpha_0)


def hard_mask(predicted_loss, noise, ratio, hard_fraction):
    """Hide the patches that are predicted to be the hardest, and others at random.

    predicted_loss, noise (B, N) -> mask (B, N) bool with `count_hidden` True in each row: int(hidden * hard_fraction)
    of them have the largest predicted loss, the rest are drawn from all the others.
    """
    hidden = count_hidden(predicted_loss.shape[1], ratio)
    hardest = predicted_loss.topk(int(hidden * hard_fraction), dim=1).indices
    return hide_largest(noise.scatter(1, hardest, 2.0), hidden)  # noise is below 1: 2 comes first


# --- HPM: the teacher, and one step ----------------------------------------------------------


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """θ_t ← m θ_t + (1 - m) θ_s, for every parameter that the teacher has; all in one call."""
    source = dict(student.named_parameters())
    pairs = [(p, source[name]) for name, p in teacher.named_parameters() if source[name].requires_grad]
    mine, theirs = zip(*pairs, strict=True)
    torch._foreach_lerp_(mine, theirs, 1 - momentum)


def ema_momentum(epoch, start=0.999, end=0.9999, ramp=100):
    """m at an epoch (a float counted from 0): from `start` to `end` in a straight line over `ramp` epochs."""
    return start + min(1.0, epoch / ramp) * (end - start)


TEACHERS = ("whole", "in-turn")  # what it is shown: the image (HPM), or one group of its patches after another (ours)


def split_in_turn(noise, hidden):
    """Split the patches of each image at random into groups as large as a student's visible part (ours).

    noise (B, N), n -> indices: G groups (B, G, v), and for each all other patches, hidden in its turn, (B, G, n).
    G = max(⌈N / v⌉, ⌈N / n⌉), the fewest that show and hide every patch at least once: 4 at a ratio of 75 %. Patches
    in the noise's order are a ring, and groups begin at equal distances on it; where v * G > N, neighbours overlap.
    """
    N, device = noise.shape[1], noise.device
    groups = max(math.ceil(N / hidden), math.ceil(N / (N - hidden)))  # G
    begin = torch.arange(groups, device=device) * N // groups  # (G,)
    ring = (begin[:, None] + torch.arange(N, device=device)) % N  # (G, N)
    order = noise.argsort(dim=1, stable=True)[:, ring]  # (B, G, N)
    return order.split([N - hidden, hidden], dim=2)


def average_in_turn(predicted, hidden, patches):
    """L̂_i = mean over the groups V without i of [L̂_i(V) - mean over j ∉ V of L̂_j(V)] (ours).

    predicted, hidden (B, G, n): L̂(V) of the patches that were hidden while V was shown, and their indices; N = patches,
    each hidden at least once -> (B, N).

    Patches are compared within a pass, so the relative loss leaves every pass an offset of its own, which says nothing:
    hence less its mean. That is a mean of other patches in each pass, but the groups are random, so their true means
    are alike, and each patch is compared with n of N - 1 others. Solving for the offsets (least squares) would be exact
    without noise; with it, Spearman's gains 0.002 at 75 %, and loses at 25 %, where passes share few hidden patches.
    """
    empty = predicted.new_zeros(*hidden.shape[:2], patches)  # (B, G, N)
    centred = empty.scatter(2, hidden, predicted - predicted.mean(dim=2, keepdim=True))  # 0 for patches of V
    times = empty.scatter(2, hidden, 1.0).sum(dim=1)  # in how many passes each was hidden
    return centred.sum(dim=1) / times


class HPM(nn.Module):
    """Student, teacher, and what happens between them in one step.

    student     an `Autoencoder`; without a loss predictor and with a mask other than "hard" this is MAE
    mask        one of `MASKS`;  target: one of `TARGETS`;  metric: one of `METRICS`
    predictor   one of `PREDICTORS`, how the student's loss predictor learns; "none" if it has none
    frozen      the ViT whose features are the target, for `FROZEN_TARGETS`
    teacher     one of `TEACHERS`, how it is asked for hard masks

    The teacher exists only if something asks for it: hard masks, or its features as the target. It has no
    reconstruction decoder, for nobody would run it. `noise_columns`: how many numbers of noise a step needs for
    each patch; if the teacher is asked in turn, the last one splits. Raises ValueError for parts that do not fit.
    """

    def __init__(
        self, student, mask_ratio=0.75, mask="hard", target="pixels", metric="l2", predictor="relative", frozen=None,
        teacher="whole",
    ):  # fmt: skip
        super().__init__()
        if mask == "hard" and predictor == "none":
            raise ValueError("hard masks need a loss predictor: use predictor relative or absolute, or another mask")
        if mask != "hard" and teacher == "in-turn":
            raise ValueError(f"{mask} masks ask no teacher: use teacher whole, or mask hard to have it asked in turn")
        self.student, self.frozen = student, frozen
        self.mask_ratio, self.mask, self.in_turn = mask_ratio, mask, teacher == "in-turn"
        self.target, self.metric, self.predictor = target, metric, predictor
        self.noise_columns = MASKS[mask] + self.in_turn
        self.hidden = count_hidden(math.prod(student.encoder.grid), mask_ratio)  # n
        self.teacher = None
        if mask == "hard" or target == "ema":
            self.teacher = copy.deepcopy(student).requires_grad_(False)
            self.teacher.decoder = None

    def check_noise(self, images, noise):
        """Raise ValueError for noise that is not (B, N), or (B, N, noise_columns) if that is more than one."""
        wanted = (len(images), math.prod(self.student.encoder.grid), self.noise_columns)
        wanted = wanted[:2] if self.noise_columns == 1 else wanted
        if noise.shape != wanted:
            raise ValueError(f"noise has the shape {tuple(noise.shape)}; {self.mask} masks need {wanted} here")

    @torch.no_grad()
    def ask_teacher(self, images, noise=None):
        """L̂ᵗ (B, N), and the features f_θt(x) (B, N, D); None for what there is not.

        whole    L̂ᵗ = d_ψt(f_θt(x))
        in-turn  `average_in_turn` of d_ψt(f_θt(x_V)), x_V one group of the patches: asked as the student is taught. All
                 groups are one batch of G * B. noise: the step's; without it L̂ᵗ is None. Features only for "ema".
        """
        if self.teacher is None:
            return None, None
        if not self.in_turn:
            return self.teacher.predict_loss(images)
        N = math.prod(self.student.encoder.grid)
        features = self.teacher.encoder.encode(images)[:, -N:] if self.target == "ema" else None
        if noise is None:
            return None, features
        self.check_noise(images, noise)
        visible, hidden = split_in_turn(noise[..., -1], self.hidden)  # (B, G, v), (B, G, n)
        images = images.repeat_interleave(hidden.shape[1], dim=0)  # (B * G, C, H, W)
        _, predicted = self.teacher(images, visible.flatten(0, 1), hidden.flatten(0, 1))  # (B * G, n)
        return average_in_turn(predicted.view_as(hidden), hidden, N), features

    def draw_mask(self, images, noise, predicted_loss, hard_fraction):
        """The mask of each image that this noise gives: (B, N) bool. Raises ValueError for noise of another shape."""
        self.check_noise(images, noise)
        grid, noise = self.student.encoder.grid, noise[..., 0] if self.in_turn else noise
        if self.mask == "hard":
            return hard_mask(predicted_loss, noise, self.mask_ratio, hard_fraction)
        if self.mask == "block":
            return block_mask(noise, grid, self.mask_ratio)
        if self.mask == "grid":
            return grid_mask(noise, grid, self.mask_ratio)
        return random_mask(noise, self.mask_ratio)

    @torch.no_grad()
    def targets(self, images, features=None):
        """𝒯: what is to be reconstructed, of every patch: (B, N, outputs). features: the teacher's, for "ema"."""
        patch_size = self.student.encoder.patch_size
        if self.target == "hog":
            return hog(images, patch_size)
        if self.target == "ema":
            return features
        if self.target in FROZEN_TARGETS:
            return self.frozen.head(self.frozen.encode(images))[:, self.frozen.num_prefix_tokens :]
        patches = vit.patchify(images, patch_size)
        return normalise_patches(patches)[0] if self.target == "norm-pixels" else patches

    def forward(self, images, noise, hard_fraction=0.0, mask=None):
        """One step: its losses, and all that led to them, by name.

        images (B, C, H, W); noise (B, N), or (B, N, noise_columns) if that is more than one; hard_fraction: α_t;
        mask (B, N): hide these in place of drawing a mask, as many in each row as mask_ratio says; noise may be None.

        loss             L = L_rec + L_pred, to be minimised
        rec, pred        its two parts; rec is the mean of patch_loss
        correlation      Spearman's, between predicted_loss and patch_loss
        mask             (B, N) bool; hidden (B, n), visible (B, v): the indices, in order
        prediction       (B, n, outputs);  patch_loss (B, n), predicted_loss (B, n): the student's, for hidden patches
        teacher_loss     (B, N): what the teacher predicted, for all patches

        Without a loss predictor there is no pred and no correlation, and loss is rec.
        """
        teacher_loss, features = self.ask_teacher(images, noise)  # L̂ᵗ = d_ψt(f_θt(x)), (B, N)
        if mask is None:
            mask = self.draw_mask(images, noise, teacher_loss, hard_fraction)  # (B, N)
        visible, hidden = split_mask(mask, self.hidden)  # (B, v), (B, n)
        prediction, predicted_loss = self.student(images, visible, hidden)  # d_φ(f_θ(x ⊙ M)), d_ψ(f_θ(x ⊙ M))
        target = gather(self.targets(images, features), hidden)  # 𝒯(x ⊙ (1 - M)), (B, n, outputs)
        patch_loss = reconstruction_loss(prediction.float(), target.float(), self.metric)  # 𝓜, (B, n)
        rec = patch_loss.mean()  # L_rec
        out = dict(mask=mask, visible=visible, hidden=hidden, teacher_loss=teacher_loss, prediction=prediction)
        out |= dict(patch_loss=patch_loss, predicted_loss=predicted_loss, rec=rec, loss=rec)
        if self.predictor != "none":
            compare = {"relative": relative_loss, "absolute": absolute_loss}[self.predictor]
            pred = compare(predicted_loss.float(), patch_loss.detach())  # L_pred: its target learns nothing from it
            out |= dict(pred=pred, correlation=rank_correlation(predicted_loss, patch_loss))
            out["loss"] = rec + pred  # L = L_rec + L_pred
        return out


# Decoders by the encoder's width: dim, depth, heads. 512/8/16 is the papers', the smaller ones are ours.
DECODERS = {64: (64, 2, 4), 192: (128, 4, 4), 384: (256, 4, 8)}


def create(arch, img_size=224, in_chans=3, target="pixels", predictor="relative", teacher="whole", **options):
    """Build HPM on the encoder `arch` of `vit.ARCHS`; with predictor="none" and mask="random" it is MAE.

    options: mask, mask_ratio, metric, frozen as in `HPM` (metric: by default "cosine" for features, else "l2");
    gelu of the encoder; decoder = (dim, depth, heads). Raises ValueError for unknown names and parts that do not fit.
    """
    options.setdefault("metric", "cosine" if target in FEATURE_TARGETS else "l2")
    given = dict(target=target, predictor=predictor, teacher=teacher, metric=options["metric"])
    given["mask"] = options.get("mask", "hard")
    for (name, value), allowed in zip(given.items(), (TARGETS, PREDICTORS, TEACHERS, METRICS, MASKS), strict=True):
        if value not in allowed:
            raise ValueError(f"unknown {name} {value!r}; there are {', '.join(allowed)}")
    encoder = vit.create(arch, img_size, 0, in_chans, pos_embed="sincos", gelu=options.pop("gelu", "exact"))
    P, D, frozen = encoder.patch_size, encoder.dim, options.get("frozen")
    if target in FROZEN_TARGETS:
        if frozen is None:
            raise ValueError(f"the target {target} needs a frozen model: give its weights")
        if frozen.grid != encoder.grid:
            raise ValueError(f"the frozen model's grid is {frozen.grid}, the student's {encoder.grid}; make them equal")
        outputs = frozen.head.out_features if isinstance(frozen.head, nn.Linear) else frozen.dim
    elif target == "hog":
        outputs = hog(torch.zeros(1, in_chans, P, P), P).shape[-1]
    else:
        outputs = D if target == "ema" else P * P * in_chans
    size = options.pop("decoder", None) or DECODERS.get(D, (512, 8, 16))
    student = Autoencoder(encoder, outputs, *size, loss_predictor=predictor != "none")
    return HPM(student, target=target, predictor=predictor, teacher=teacher, **options)
