"""Hard Patches Mining, and its baseline, the masked autoencoder.

HPM is *Hard Patches Mining for Masked Image Modeling* (Wang et al., CVPR 2023, arXiv 2304.05919), MAE is *Masked
Autoencoders Are Scalable Vision Learners* (He et al., CVPR 2022, arXiv 2111.06377). The numbers of HPM's equations
differ between its versions, so they go by name.

A masked autoencoder hides most patches of an image and learns to reconstruct them. HPM also learns which patches are
hard to reconstruct, and hides those: the teacher, a slow copy of the student, looks at the image, predicts a loss for
every patch, and sets the student its task. This file has HPM's order:

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
    """How many are hidden: N - int(N (1 - ratio)), MAE's. Raises ValueError unless 2, a pair, are, and 1 is visible."""
    if not 0 < ratio < 1:
        raise ValueError(f"mask ratio {ratio} is out of range; give a number between 0 and 1, as 0.75")
    hidden = patches - int(patches * (1 - ratio))
    if not 2 <= hidden < patches:
        raise ValueError(f"mask ratio {ratio} hides {hidden} of {patches} patches; it must hide 2 and leave 1, or more")
    return hidden


def hide_largest(score, hidden):
    """Hide the `hidden` largest of every image, a count, so that a batch stays a rectangle: (B, N) -> (B, N) bool."""
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(hidden, dim=1).indices, True)


def random_mask(noise, ratio):
    """Hide patches at random (MAE): noise (B, N) -> mask (B, N) bool, `count_hidden` True in every row."""
    return hide_largest(noise, count_hidden(noise.shape[1], ratio))


def block_mask(draw, grid, ratio):
    """Hide rectangles until the ratio is reached (BEiT's masking, MAE's "block"): draw (B, N, 5) -> mask (B, N) bool.

    Each row of `draw` proposes a rectangle of whole patches by its first four numbers: the area, uniform from 8 to 25 %
    of the grid (at least 4 patches); the aspect ratio, height over width, log-uniform from 0.3 to 1 / 0.3; top and
    left, every place equally likely. They are laid in order. Of the one that covers too much, and of what 40 leave
    uncovered, the fifth number of each patch decides which patches are hidden.
    """
    (rows, columns), (area, aspect, top, left) = grid, draw[:, :40, :4, None].unbind(dim=2)  # each (B, 40, 1)
    area, aspect = (rows * columns * (0.08 + 0.17 * area)).clamp(min=4), 0.3 ** (1 - 2 * aspect)
    height = (area * aspect).sqrt().round().clamp(max=rows)
    width = (area / aspect).sqrt().round().clamp(max=columns)
    top, left = (top * (rows - height + 1)).floor(), (left * (columns - width + 1)).floor()
    row, column = (torch.arange(n, device=draw.device) for n in grid)
    in_rows, in_columns = (row >= top) & (row < top + height), (column >= left) & (column < left + width)
    inside = (in_rows[..., :, None] & in_columns[..., None, :]).flatten(2)  # (B, 40, N)
    # The earlier a patch is covered, the larger its score, and the surer it is hidden.
    order = torch.arange(inside.shape[1], 0, -1, dtype=torch.uint8, device=draw.device)[:, None]
    return hide_largest((inside * order).amax(dim=1) + draw[..., 4], count_hidden(rows * columns, ratio))


def grid_mask(noise, grid, ratio):
    """Keep patches on a regular grid (MAE, figure 6): at a ratio of 75 %, the top left one of each 2 x 2.

    noise (B, N) -> mask (B, N) bool. Those are hidden last; where the ratio asks for a part of either, at random.
    """
    odd_row, odd_column = (torch.arange(n, device=noise.device) % 2 == 1 for n in grid)
    first = (odd_row[:, None] | odd_column).flatten()  # (N,): hidden before the others
    return hide_largest(first + noise, count_hidden(noise.shape[1], ratio))


def split_mask(mask, hidden):
    """Indices of the visible and of the hidden patches, in order: mask (B, N), n in each row -> (B, v), (B, n).

    Raises ValueError for a row with another number, on the CPU; elsewhere the host would have to wait to see it.
    """
    if mask.device.type == "cpu" and (counts := {sum(row) for row in mask.tolist()}) != {hidden}:
        raise ValueError(f"the mask hides {sorted(counts)} patches in a row; hide {hidden} (True) in each")
    order = mask.int().argsort(dim=1, stable=True)  # False comes first
    return order.split([mask.shape[1] - hidden, hidden], dim=1)


# --- Targets, what the decoder has to say about a hidden patch, and metrics ------------------

FROZEN_TARGETS = ("dino", "clip")  # features of a model that others have trained
FEATURE_TARGETS = ("ema", *FROZEN_TARGETS)
TARGETS = ("pixels", "norm-pixels", "hog", *FEATURE_TARGETS)
METRICS = ("l2", "smooth-l1", "cosine", "cross-entropy")


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
    does not divide it) is scaled to length 1. A patch: its cells row by row, in each the channels, in each the bins.
    """
    (B, C, H, W), cell = images.shape, 8 if patch_size % 8 == 0 else patch_size
    down = F.pad(images[:, :, 2:] - images[:, :, :-2], (0, 0, 1, 1))
    along = F.pad(images[..., 2:] - images[..., :-2], (1, 1))
    angle = torch.atan2(down, along) % math.pi  # [0, π)
    which = (angle * (bins / math.pi)).long().clamp(max=bins - 1)  # in float32 an angle just below 0 becomes π
    votes = images.new_zeros(B, C, bins, H, W).scatter_(2, which[:, :, None], (down**2 + along**2).sqrt()[:, :, None])
    cells = F.avg_pool2d(votes.flatten(1, 2), cell)  # (B, C * bins, rows of cells, columns of cells)
    cells = F.normalize(cells.unflatten(1, (C, bins)), dim=2, eps=1e-5).flatten(1, 2)
    return vit.patchify(cells, patch_size // cell)  # the cells of a patch, side by side


def reconstruction_loss(prediction, target, metric="l2"):
    """L_rec, patch by patch: 𝓜(prediction, target), (B, n, d), (B, n, d) -> (B, n). Raises ValueError for other names.

    "l2": mean of squared differences; "smooth-l1": of ½ d² for a difference d below 1, |d| - ½ above; "cosine": squared
    distance of the unit vectors, 2 - 2 cos; "cross-entropy": distillation, of softmax(prediction) with softmax(target).
    Called with the hidden patches alone: a visible one has nothing to reconstruct.
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
    """Blocks on all tokens, then one linear map for the last of them: d_φ and d_ψ, (B, T, d) -> (B, last, outputs)."""

    def __init__(self, dim, depth, num_heads, outputs):
        super().__init__()
        self.blocks = nn.ModuleList(vit.Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, outputs)

    def forward(self, z, last):
        for block in self.blocks:
            z = block(z)
        z = self.norm(z[:, -last:])
        if self.pred.out_features > 1:
            return self.pred(z)
        # A loss. Autocast leaves a product and a sum in float32; in bfloat16 many of 196 predictions would be equal.
        return (z * self.pred.weight).sum(dim=-1, keepdim=True) + self.pred.bias


class Autoencoder(nn.Module):
    """MAE's asymmetric autoencoder: the encoder sees visible patches alone, the decoders see mask tokens too.

    Both decoders start from the same tokens: latent ones for visible patches, a learned mask token for hidden ones,
    each with its position. MAE has no loss predictor (None), HPM's teacher no decoder.
    """

    def __init__(self, encoder, outputs, dim, depth, num_heads, loss_predictor=True):
        super().__init__()
        self.encoder = encoder
        self.decoder_embed = nn.Linear(encoder.dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(vit.sincos_pos_embed(dim, encoder.grid, encoder.num_prefix_tokens), False)
        self.decoder = Decoder(dim, depth, num_heads, outputs)
        self.loss_predictor = Decoder(dim, depth, num_heads, 1) if loss_predictor else None
        for part in (self.decoder_embed, self.decoder, *([self.loss_predictor] if loss_predictor else [])):
            vit.init_weights(part)
        nn.init.normal_(self.mask_token, std=0.02)
        if loss_predictor:  # the mean of P*P*C outputs in HPM's code: the same function as one, if it starts as theirs
            rows = nn.init.xavier_uniform_(torch.empty(encoder.patch_embed.proj.weight[0].numel(), dim))
            self.loss_predictor.pred.weight.data = rows.mean(dim=0, keepdim=True)

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

        images (B, C, H, W), indices (B, v), (B, n) -> prediction (B, n, outputs), predicted loss (B, n), or None.
        """
        latent = self.encoder.encode(images, visible)  # f_θ(x ⊙ M), (B, 1 + v, D)
        z, n = self.decoder_tokens(latent, visible, hidden), hidden.shape[1]
        predicted_loss = self.loss_predictor(z, n).squeeze(-1) if self.loss_predictor else None
        return self.decoder(z, n) if self.decoder else None, predicted_loss

    def predict_loss(self, images):
        """L̂ = d_ψ(f_θ(x)): the predicted loss of every patch of the whole image (B, N), and the features (B, N, D).

        The predictor is trained on mask tokens, and asked here about visible patches: a mismatch that the authors
        acknowledge. In short runs the answer is close to chance. Without a loss predictor the loss is None.
        """
        latent = self.encoder.encode(images)  # (B, 1 + N, D)
        z, N = self.decoder_embed(latent) + self.decoder_pos_embed, math.prod(self.encoder.grid)
        predicted_loss = self.loss_predictor(z, N).squeeze(-1) if self.loss_predictor else None
        return predicted_loss, latent[:, -N:]


# --- Predicted loss: how it is learned, and how it guides the mask, from easy to hard --------


def absolute_loss(predicted, true):
    """L_pred, absolute: squared error against the true losses, standardised within each image.

    predicted, true (B, n), hidden patches alone -> a scalar. `true` is a target: no gradient flows into it.
    """
    return (predicted - normalise_patches(true.detach())[0]).square().mean()


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
    """Spearman's, averaged over images: (B, n), (B, n) -> a scalar in [-1, 1]. Ties are ranked in order of place."""
    ranks = [v.argsort(dim=1, stable=True).argsort(dim=1).float() for v in (predicted, true)]
    a, b = (r - r.mean(dim=1, keepdim=True) for r in ranks)
    return F.cosine_similarity(a, b, dim=1).mean()


def hard_fraction(t, T, alpha_0=0.0, alpha_T=0.5):
    """Easy to hard: α_t = α_0 + (t / T)(α_T - α_0), the share of hidden patches that the teacher picks."""
    return alpha_0 + t / T * (alpha_T - alpha_0)


def hard_mask(predicted_loss, noise, ratio, hard_fraction):
    """Hide the patches that are predicted to be the hardest, and others at random: both (B, N) -> mask (B, N) bool.

    `count_hidden` in each row; int(hidden * hard_fraction) have the largest predicted loss, the rest are any others.
    """
    hidden = count_hidden(predicted_loss.shape[1], ratio)
    hardest = predicted_loss.topk(int(hidden * hard_fraction), dim=1).indices
    return hide_largest(noise.scatter(1, hardest, 2.0), hidden)  # noise is below 1: 2 comes first


# --- HPM: the teacher, and one step ----------------------------------------------------------

PREDICTORS = ("relative", "absolute", "none")  # how the student's loss predictor learns
TEACHERS = ("whole", "in-turn")  # what it is shown: the image (HPM's), or one part of it after another (ours)


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """θ_t ← m θ_t + (1 - m) θ_s, for every parameter that the teacher has; all in one call."""
    source = dict(student.named_parameters())
    pairs = [(p, source[name]) for name, p in teacher.named_parameters() if source[name].requires_grad]
    torch._foreach_lerp_(*zip(*pairs, strict=True), 1 - momentum)


def ema_momentum(epoch, start=0.999, end=0.9999, ramp=100):
    """m at an epoch (a float counted from 0): from `start` to `end` in a straight line over `ramp` epochs."""
    return start + min(1.0, epoch / ramp) * (end - start)


def hide_in_turn(noise, hidden):
    """In turn (ours), each patch is shown once, beside as many others as a student sees: noise (B, N), n -> (B, G, N).

    In each of the G turns n are hidden (True), and v are shown, those from the turn's place on in a ring, the order of
    the noise. G = max(⌈N / v⌉, ⌈N / n⌉), so that each is hidden, too; where v * G > N, some are shown more than once.
    """
    N = noise.shape[1]
    turns = max(math.ceil(N / hidden), math.ceil(N / (N - hidden)))  # G
    place = torch.arange(turns, device=noise.device)[:, None] * N // turns  # (G, 1)
    rank = noise.argsort(dim=1, stable=True).argsort(dim=1)  # (B, N)
    return (rank[:, None] - place) % N >= N - hidden


def average_in_turn(predicted, mask):
    """L̂_i = mean over the turns g in which i is hidden of [L̂_i(g) - mean over j of L̂_j(g)] (ours).

    predicted (B, G, n): L̂(g) of the patches j that are hidden in turn g, in order; mask (B, G, N): True for these, each
    patch at least once -> (B, N). The relative loss compares within a turn, so it leaves each an offset of its own:
    hence less its mean. That is the mean of other patches in each turn, but of random ones, and of most of them.
    """
    predicted = predicted - predicted.mean(dim=2, keepdim=True)
    place = (mask.cumsum(dim=2) - 1).clamp(min=0)  # (B, G, N): which of its turn's n predictions is the patch's
    return predicted.gather(2, place).masked_fill(~mask, 0).sum(dim=1) / mask.sum(dim=1)


class HPM(nn.Module):
    """Student, teacher, and what happens between them in one step.

    student    an `Autoencoder`; without a loss predictor and with a mask other than "hard" this is MAE
    predictor  one of `PREDICTORS`, "none" if it has none;  mask, target, metric: of `MASKS`, `TARGETS`, `METRICS`
    frozen     the ViT whose features are the target, for `FROZEN_TARGETS`;  teacher: of `TEACHERS`, how it is asked

    There is a teacher if something asks for it: hard masks, or its features as the target. `noise_columns`: how many
    numbers of noise a step needs for each patch. Raises ValueError for parts that do not fit.
    """

    def __init__(self, student, mask_ratio=0.75, mask="hard", target="pixels", metric="l2", predictor="relative",
                 frozen=None, teacher="whole"):  # fmt: skip
        super().__init__()
        if mask == "hard" and predictor == "none":
            raise ValueError("hard masks need a loss predictor: use predictor relative or absolute, or another mask")
        if mask != "hard" and teacher == "in-turn":
            raise ValueError(f"{mask} masks ask no teacher: use teacher whole, or mask hard to have it asked in turn")
        self.student, self.frozen, self.mask, self.mask_ratio = student, frozen, mask, mask_ratio
        self.target, self.metric, self.predictor, self.in_turn = target, metric, predictor, teacher == "in-turn"
        self.noise_columns = MASKS[mask] + self.in_turn  # the last one splits
        self.hidden = count_hidden(math.prod(student.encoder.grid), mask_ratio)  # n
        self.teacher = copy.deepcopy(student).requires_grad_(False) if mask == "hard" or target == "ema" else None
        if self.teacher:
            self.teacher.decoder = None  # nobody would run it

    @torch.no_grad()
    def ask_teacher(self, images, noise=None):
        """L̂ᵗ (B, N), and the features f_θt(x) (B, N, D); None for what there is not.

        Whole: L̂ᵗ = d_ψt(f_θt(x)). In turn: `average_in_turn` of d_ψt(f_θt(x_g)), x_g what is shown in turn g, as the
        student is taught; one batch of B * G. noise: the step's; without it nobody is asked in turn. The features are
        those of the whole x, in turn for "ema" alone. Raises ValueError for noise of another shape.
        """
        N, columns = math.prod(self.student.encoder.grid), self.noise_columns
        wanted = (len(images), N, columns) if columns > 1 else (len(images), N)
        if noise is not None and noise.shape != wanted:
            raise ValueError(f"noise has the shape {tuple(noise.shape)}; {self.mask} masks need {wanted} here")
        if not self.in_turn:
            return self.teacher.predict_loss(images) if self.teacher else (None, None)
        features = self.teacher.encoder.encode(images)[:, -N:] if self.target == "ema" else None
        if noise is None:
            return None, features
        mask = hide_in_turn(noise[..., -1], self.hidden)  # (B, G, N)
        images = images.repeat_interleave(mask.shape[1], dim=0)  # (B * G, C, H, W)
        _, predicted = self.teacher(images, *split_mask(mask.flatten(0, 1), self.hidden))  # (B * G, n)
        return average_in_turn(predicted.view(len(mask), -1, self.hidden), mask), features

    def draw_mask(self, noise, predicted_loss, hard_fraction):
        """The mask of each image that this noise gives: (B, N) bool."""
        grid, noise = self.student.encoder.grid, noise[..., 0] if self.in_turn else noise
        if self.mask == "hard":
            return hard_mask(predicted_loss, noise, self.mask_ratio, hard_fraction)
        if self.mask == "random":
            return random_mask(noise, self.mask_ratio)
        return (block_mask if self.mask == "block" else grid_mask)(noise, grid, self.mask_ratio)

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
        mask (B, N): hide these in place of drawing a mask, n in each row; noise may be None.

        loss, rec, pred  L = L_rec + L_pred, to be minimised, and its two parts; rec is the mean of patch_loss
        correlation      Spearman's, between predicted_loss and patch_loss; neither it nor pred without a loss predictor
        mask             (B, N) bool; hidden (B, n), visible (B, v): the indices, in order
        prediction       (B, n, outputs);  patch_loss (B, n), predicted_loss (B, n): the student's, for hidden patches
        teacher_loss     (B, N): what the teacher predicted, for all patches
        """
        teacher_loss, features = self.ask_teacher(images, noise)  # L̂ᵗ = d_ψt(f_θt(x)), (B, N)
        if mask is None:
            mask = self.draw_mask(noise, teacher_loss, hard_fraction)  # (B, N)
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


DECODERS = {64: (64, 2, 4), 96: (48, 1, 4), 192: (128, 4, 4), 384: (256, 4, 8)}  # ours; the papers': 512, 8, 16


def create(arch, img_size=224, in_chans=3, target="pixels", predictor="relative", teacher="whole", **options):
    """Build HPM on the encoder `arch` of `vit.ARCHS`; with predictor="none" and mask="random" it is MAE.

    options: mask, mask_ratio, metric, frozen as in `HPM` (metric: by default "cosine" for features, else "l2");
    gelu of the encoder; decoder = (dim, depth, heads). Raises ValueError for unknown names and parts that do not fit.
    """
    options.setdefault("metric", "cosine" if target in FEATURE_TARGETS else "l2")
    words = dict(target=(target, TARGETS), predictor=(predictor, PREDICTORS), teacher=(teacher, TEACHERS))
    words |= dict(mask=(options.get("mask", "hard"), MASKS), metric=(options["metric"], METRICS))
    for name, (value, allowed) in words.items():
        if value not in allowed:
            raise ValueError(f"unknown {name} {value!r}; there are {', '.join(allowed)}")
    if "_vit_" in arch or arch.startswith("resnet"):
        raise ValueError(f"{arch} has convolutions, which would see hidden patches; use a plain ViT, as vit_b16")
    encoder = vit.create(arch, img_size, 0, in_chans, pos_embed="sincos", gelu=options.pop("gelu", "exact"))
    P, D, frozen = encoder.patch_size, encoder.dim, options.get("frozen")
    outputs = D if target == "ema" else P * P * in_chans
    if target in FROZEN_TARGETS:
        if frozen is None:
            raise ValueError(f"the target {target} needs a frozen model: give its weights")
        if frozen.grid != encoder.grid:
            raise ValueError(f"the frozen model's grid is {frozen.grid}, the student's {encoder.grid}; make them equal")
        outputs = frozen.head.out_features if isinstance(frozen.head, nn.Linear) else frozen.dim
    elif target == "hog":
        outputs = hog(torch.zeros(1, in_chans, P, P), P).shape[-1]
    size = options.pop("decoder", None) or DECODERS.get(D, (512, 8, 16))
    student = Autoencoder(encoder, outputs, *size, loss_predictor=predictor != "none")
    return HPM(student, target=target, predictor=predictor, teacher=teacher, **options)
