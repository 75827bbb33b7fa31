"""Hard Patches Mining, and its baseline, the masked autoencoder.

*Hard Patches Mining for Masked Image Modeling* (Wang et al., CVPR 2023, arXiv 2304.05919), called
HPM here; *Masked Autoencoders Are Scalable Vision Learners* (He et al., CVPR 2022, arXiv
2111.06377), called MAE. The numbers of HPM's equations differ between its versions, so they go by name.

A masked autoencoder hides most patches of an image and learns to reconstruct them. HPM also learns
which patches are hard to reconstruct, and hides those: the teacher, a slow copy of the student,
looks at the whole image, predicts a loss for every patch, and sets the student its task.

    masks           which patches to hide: random, block, grid, hard    easy to hard
    targets         what to reconstruct: pixels, HOG, features          𝒯
    losses          reconstruction, and two ways to predict it          L_rec, L_pred
    student         encoder, decoder, loss predictor                    f_θ, d_φ, d_ψ
    teacher         a moving average of the student                     θ_t ← m θ_t + (1 - m) θ_s
    HPM             one step: predict, mask, reconstruct, compare       L = L_rec + L_pred

Letters in shapes: B images, N patches, n hidden patches, v = N - n visible ones, D the encoder's width,
d the decoders' width. In every `mask` (B, N), True means hidden (the paper's M is 1 for visible).
"""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

import vit
import weights
from vit import gather

# ---------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------


def count_hidden(patches, ratio):
    """How many of `patches` are hidden: N - int(N (1 - ratio)), as in MAE's code.

    Raises ValueError unless at least one patch is visible and two are hidden (a pair to compare).
    """
    if not 0 < ratio < 1:
        raise ValueError(f"mask ratio {ratio} is out of range; give a number between 0 and 1, as 0.75")
    hidden = patches - int(patches * (1 - ratio))
    if hidden == patches or hidden < 2:
        raise ValueError(
            f"mask ratio {ratio} hides {hidden} of {patches} patches; at least 1 must stay visible and 2 be hidden"
        )
    return hidden


def hide_largest(score, hidden):
    """Hide the `hidden` patches with the largest score, in every image: (B, N) -> mask (B, N)."""
    index = score.topk(hidden, dim=1).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, index, True)


def random_mask(batch, patches, ratio, generator=None, device=None):
    """Hide patches at random (MAE): (B, N) bool, exactly `count_hidden` True in every row."""
    noise = torch.rand(batch, patches, generator=generator, device=device)
    return hide_largest(noise, count_hidden(patches, ratio))


def block_mask(batch, grid, ratio, generator=None, device=None):
    """Hide rectangles until the ratio is reached (BEiT's masking): (B, N) bool, the count exact.

    A block covers 8 to 25 % of the grid (at least 4 patches), with an aspect ratio from 0.3 to 1 / 0.3.
    """
    rows, columns = grid
    hidden, blocks = count_hidden(rows * columns, ratio), 40
    area, aspect, top, left = torch.rand(4, batch, blocks, 1, generator=generator, device=device)
    area = (rows * columns * (0.08 + 0.17 * area)).clamp(min=4)
    aspect = 0.3 ** (1 - 2 * aspect)  # log-uniform
    height, width = (area * aspect).sqrt().clamp(max=rows), (area / aspect).sqrt().clamp(max=columns)
    top, left = top * (rows - height), left * (columns - width)
    row, column = torch.arange(rows, device=device) + 0.5, torch.arange(columns, device=device) + 0.5
    inside = ((row > top) & (row < top + height))[..., :, None] & ((column > left) & (column < left + width))[
        ..., None, :
    ]
    inside = inside.flatten(2)  # (B, blocks, N)
    # Blocks are laid one after the other; the earlier a patch is covered, the surer it is hidden.
    order = torch.arange(blocks, 0, -1, dtype=torch.uint8, device=device)[:, None]
    score = (inside * order).amax(dim=1)  # (B, N)
    noise = torch.rand(batch, rows * columns, generator=generator, device=device)
    return hide_largest(score + noise, hidden)


def grid_mask(batch, grid, ratio, generator=None, device=None):
    """Keep patches on a regular grid (MAE, figure 6): at a ratio of 75 %, the top left one of each 2 x 2.

    Those are hidden last, after all others; where the ratio asks for a part of either, at random.
    """
    rows, columns = grid
    odd_row, odd_column = (torch.arange(n, device=device) % 2 == 1 for n in (rows, columns))
    score = (odd_row[:, None] | odd_column).flatten()  # (N), 1: hidden first
    noise = torch.rand(batch, rows * columns, generator=generator, device=device)
    return hide_largest(score + noise, count_hidden(rows * columns, ratio))


def hard_fraction(t, T, alpha_0=0.0, alpha_T=0.5):
    """Easy to hard: α_t = α_0 + (t / T)(α_T - α_0), the share of hidden patches that the teacher picks."""
    return alpha_0 + t / T * (alpha_T - alpha_0)


def hard_mask(predicted_loss, ratio, hard_fraction, generator=None):
    """Hide the patches that are predicted to be the hardest, and others at random.

    predicted_loss (B, N) -> mask (B, N) with `count_hidden` True in each row: int(hidden * hard_fraction)
    of them have the largest predicted loss, the rest are drawn from all the others.
    """
    hidden = count_hidden(predicted_loss.shape[1], ratio)
    guided = int(hidden * hard_fraction)
    score = torch.rand(predicted_loss.shape, generator=generator, device=predicted_loss.device)
    score.scatter_(1, predicted_loss.topk(guided, dim=1).indices, 2.0)  # noise is below 1: these come first
    return hide_largest(score, hidden)


# ---------------------------------------------------------------------------------------------
# Targets: what the decoder has to say about a hidden patch
# ---------------------------------------------------------------------------------------------

TARGETS = ("pixels", "norm-pixels", "hog", "ema", "dino", "clip")


def normalise_patches(patches):
    """MAE's recommended target: every patch with mean 0 and variance 1. Returns that, mean, deviation.

    patches (B, N, P*P*C) -> the same, (B, N, 1), (B, N, 1). A flat patch becomes amplified noise.
    """
    mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    deviation = (variance + 1e-6).sqrt()
    return (patches - mean) / deviation, mean, deviation


def hog(images, patch_size, bins=9):
    """Histograms of oriented gradients, MaskFeat's target (Wei et al. 2022): (B, C, H, W) -> (B, N, features).

    Central differences, zero at the image's border; the orientation, without sign, falls into one of
    `bins` bins and is weighted by its magnitude; a histogram for each channel and each cell of 8 x 8
    pixels (or of the whole patch, if 8 does not divide it) is scaled to length 1.
    features = cells in a patch * C * bins.
    """
    B, C, H, W = images.shape
    cell = 8 if patch_size % 8 == 0 else patch_size
    down, along = torch.zeros_like(images), torch.zeros_like(images)
    down[:, :, 1:-1] = images[:, :, 2:] - images[:, :, :-2]
    along[..., 1:-1] = images[..., 2:] - images[..., :-2]
    magnitude = (down**2 + along**2).sqrt()
    angle = torch.atan2(down, along) % math.pi  # [0, π)
    which = (angle * (bins / math.pi)).long().clamp(max=bins - 1)
    votes = torch.zeros(B, C, bins, H, W, device=images.device, dtype=images.dtype)
    votes.scatter_(2, which[:, :, None], magnitude[:, :, None])
    cells = F.avg_pool2d(votes.flatten(1, 2), cell)  # (B, C * bins, rows of cells, columns of cells)
    cells = F.normalize(cells.unflatten(1, (C, bins)), dim=2, eps=1e-5).flatten(1, 2)
    return vit.patchify(cells, patch_size // cell)  # the cells of a patch, side by side


# ---------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------


def reconstruction_loss(prediction, target, metric="l2"):
    """L_rec, patch by patch: 𝓜(prediction, target), (B, n, d), (B, n, d) -> (B, n).

    metric  "l2"             mean of squared differences
            "smooth-l1"      ½ d² for a difference d below 1, |d| - ½ above
            "cosine"         squared distance of the unit vectors, 2 - 2 cos
            "cross-entropy"  distillation: of softmax(prediction) with softmax(target)

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
    raise ValueError(f"unknown metric {metric!r}; there are l2, smooth-l1, cosine, cross-entropy")


def absolute_loss(predicted, true):
    """L_pred, absolute: squared error against the true losses, standardised within each image.

    predicted, true (B, n), hidden patches alone -> a scalar, the mean over patches. `true` is a target:
    no gradient flows into it.
    """
    true = true.detach()
    mean, variance = true.mean(dim=1, keepdim=True), true.var(dim=1, keepdim=True)
    return (predicted - (true - mean) / (variance + 1e-6).sqrt()).square().mean()


def relative_loss(predicted, true):
    """L_pred, relative: for each pair of hidden patches, which of them is the harder one?

    - Σ_i Σ_{j≠i} 1⁺_ij log σ(L̂_i - L̂_j) - Σ_i Σ_{j≠i} 1⁻_ij log(1 - σ(L̂_i - L̂_j)), over the number of
    pairs with 1⁺ or 1⁻; 1⁺_ij is 1 where the true loss of i is larger than that of j, 1⁻_ij where it is
    smaller; equal ones are no pair. predicted, true (B, n), hidden patches alone -> a scalar, 0 without any pair.

    As 1 - σ(x) = σ(-x), a pair adds the same to both sums, once as (i, j) and once as (j, i): the mean over
    all pairs is the mean over those with 1⁺. And -log σ(x) = softplus(-x), without a log to overflow.
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


# ---------------------------------------------------------------------------------------------
# The student: an encoder and two decoders
# ---------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Blocks on all tokens, then one output per patch: (B, T, d) -> (B, T, outputs).

    With P*P*C outputs it reconstructs (d_φ), with one it predicts the loss (d_ψ). The official code averages
    768 outputs of the predictor to one number; one linear output is the same function.
    """

    def __init__(self, dim, depth, num_heads, outputs):
        super().__init__()
        self.blocks = nn.ModuleList(vit.Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, outputs)

    def forward(self, z, last):
        """Outputs for the last `last` tokens: (B, last, outputs)."""
        for block in self.blocks:
            z = block(z)
        return self.pred(self.norm(z[:, -last:]))


class Autoencoder(nn.Module):
    """The asymmetric autoencoder: the encoder sees the visible patches alone, the decoders see mask tokens too.

    loss_predictor False makes it MAE's. Both decoders start from the same tokens: latent ones for
    visible patches, a learned mask token for hidden ones, each with its position.
    """

    def __init__(self, encoder, outputs, dim, depth, num_heads, loss_predictor=True):
        super().__init__()
        self.encoder = encoder
        self.decoder_embed = nn.Linear(encoder.dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = vit.sincos_pos_embed(dim, encoder.grid, encoder.prefix)
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
        z = self.decoder_embed(latent)
        prefix = self.encoder.prefix
        masked = self.mask_token.to(z.dtype).expand(len(z), hidden.shape[1], -1)  # (B, n, d)
        x_class = z[:, :prefix] + self.decoder_pos_embed[:, :prefix]  # the formula's are zeros; a file may have others
        positions = self.decoder_pos_embed[:, prefix:].expand(len(z), -1, -1)  # (B, N, d)
        positions = gather(positions, torch.cat([visible, hidden], dim=1))  # (B, v + n, d)
        return torch.cat([x_class, torch.cat([z[:, prefix:], masked], dim=1) + positions], dim=1)

    def forward(self, images, visible, hidden):
        """Reconstruct the hidden patches, and predict how well that goes, from the visible ones.

        images (B, C, H, W), indices (B, v), (B, n) -> prediction (B, n, outputs), predicted loss (B, n) or None.
        """
        latent = self.encoder.encode(images, visible)  # f_θ(x ⊙ M), (B, 1 + v, D)
        z, n = self.decoder_tokens(latent, visible, hidden), hidden.shape[1]
        predicted_loss = self.loss_predictor(z, n).squeeze(-1) if self.loss_predictor else None
        return self.decoder(z, n), predicted_loss

    def predict_loss(self, images):
        """L̂ = d_ψ(f_θ(x)): the predicted loss of every patch of the whole image (B, N), and the features (B, N, D).

        The predictor is trained on visible patches beside mask tokens, and used here on whole images: a mismatch
        that the authors acknowledge. It takes training to bridge: in short runs this prediction is close to
        chance, while the student's, of hidden patches, is good already. The reconstruction decoder is not run.
        """
        latent = self.encoder.encode(images)
        z, N = self.decoder_embed(latent) + self.decoder_pos_embed, latent.shape[1] - self.encoder.prefix
        predicted_loss = self.loss_predictor(z, N).squeeze(-1) if self.loss_predictor else None
        return predicted_loss, latent[:, -N:]


# ---------------------------------------------------------------------------------------------
# The teacher
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------


class HPM(nn.Module):
    """Student, teacher, and what happens between them in one step.

    student     an `Autoencoder`; without a loss predictor and with a mask other than "hard" this is MAE
    mask        "random", "block", "grid" or "hard"
    target      one of `TARGETS`;  metric: see `reconstruction_loss`
    predictor   "relative", "absolute" or "none"
    frozen      the ViT whose features are the target, for "dino" and "clip"

    The teacher exists only if something asks for it: hard masks, or its features as the target. It has
    no reconstruction decoder, for nobody would run it. Raises ValueError for parts that do not fit.
    """

    def __init__(
        self, student, mask_ratio=0.75, mask="hard", target="pixels", metric="l2", predictor="relative", frozen=None
    ):
        super().__init__()
        if mask == "hard" and predictor == "none":
            raise ValueError("hard masks need a loss predictor: use predictor relative or absolute, or another mask")
        if (student.loss_predictor is None) != (predictor == "none"):
            raise ValueError(
                f"predictor {predictor!r} does not go with this student, which has a loss predictor or none"
            )
        self.student, self.frozen = student, frozen
        self.mask_ratio, self.mask = mask_ratio, mask
        self.target, self.metric, self.predictor = target, metric, predictor
        self.hidden = count_hidden(math.prod(student.encoder.grid), mask_ratio)
        self.teacher = None
        if mask == "hard" or target == "ema":
            self.teacher = copy.deepcopy(student).requires_grad_(False).eval()
            self.teacher.decoder = None

    def train(self, mode=True):
        """As of every module; but teacher and frozen model never drop anything out."""
        super().train(mode)
        for part in (self.teacher, self.frozen):
            if part is not None:
                part.eval()
        return self

    def draw_mask(self, predicted_loss, hard_fraction, generator, device, batch, here):
        """One mask for each image of the slice `here` of a batch: (B, N) bool, True = hidden."""
        grid = self.student.encoder.grid
        if self.mask == "hard":
            everyone = predicted_loss.new_zeros(batch, predicted_loss.shape[1])
            everyone[here] = predicted_loss  # the others' rows stay empty: each mask depends on its own row
            mask = hard_mask(everyone, self.mask_ratio, hard_fraction, generator)
        elif self.mask == "random":
            mask = random_mask(batch, math.prod(grid), self.mask_ratio, generator, device)
        else:
            draw = {"block": block_mask, "grid": grid_mask}[self.mask]
            mask = draw(batch, grid, self.mask_ratio, generator, device)
        return mask[here]

    @torch.no_grad()
    def targets(self, images, features=None):
        """𝒯: what is to be reconstructed, of every patch: (B, N, outputs). features: the teacher's, for "ema"."""
        patch_size = self.student.encoder.patch_size
        if self.target == "hog":
            return hog(images, patch_size)
        if self.target == "ema":
            return features
        if self.target in ("dino", "clip"):
            return self.frozen.head(self.frozen.encode(images))[:, self.frozen.prefix :]
        patches = vit.patchify(images, patch_size)
        return normalise_patches(patches)[0] if self.target == "norm-pixels" else patches

    def forward(self, images, hard_fraction=0.0, generator=None, batch=None, here=slice(None)):
        """One step's losses, and all that led to them, by name.

        Masks are drawn for a batch of `batch` images (default: these), of which `images` are the slice `here`: so its
        parts get the masks that the whole gets, one after the other or on many processes.

        loss             L = L_rec + L_pred, to be minimised
        rec, pred        its two parts; rec is the mean of patch_loss
        correlation      Spearman's, between predicted_loss and patch_loss
        mask             (B, N) bool; hidden (B, n), visible (B, v): the indices, in order
        prediction       (B, n, outputs);  patch_loss (B, n), predicted_loss (B, n): the student's, for hidden patches
        teacher_loss     (B, N): what the teacher predicted, for all patches
        """
        teacher_loss = features = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_loss, features = self.teacher.predict_loss(images)  # L̂ᵗ = d_ψt(f_θt(x))
        batch = batch or len(images)
        mask = self.draw_mask(teacher_loss, hard_fraction, generator, images.device, batch, here)
        order = mask.int().argsort(dim=1, stable=True)  # False comes first
        visible, hidden = order.split([mask.shape[1] - self.hidden, self.hidden], dim=1)

        prediction, predicted_loss = self.student(images, visible, hidden)
        target = gather(self.targets(images, features), hidden)  # 𝒯(x ⊙ (1 - M)), (B, n, outputs)
        patch_loss = reconstruction_loss(prediction.float(), target.float(), self.metric)  # (B, n)
        out = dict(mask=mask, visible=visible, hidden=hidden, prediction=prediction, teacher_loss=teacher_loss)
        out |= dict(patch_loss=patch_loss, predicted_loss=predicted_loss, rec=patch_loss.mean())
        out["loss"] = out["rec"]
        if predicted_loss is not None:
            compare = relative_loss if self.predictor == "relative" else absolute_loss
            out["pred"] = compare(predicted_loss.float(), patch_loss.detach())  # no gradient into the target
            out["correlation"] = rank_correlation(predicted_loss, patch_loss)
            out["loss"] = out["rec"] + out["pred"]
        return out


# Decoders by the encoder's width: dim, depth, heads. 512/8/16 is the papers', the smaller ones are ours.
DECODERS = {64: (64, 2, 4), 192: (128, 4, 4), 384: (256, 4, 8)}


def create(arch, img_size=224, in_chans=3, target="pixels", predictor="relative", **options):
    """Build HPM on the encoder `arch` of `vit.ARCHS`; with predictor="none" and mask="random" it is MAE.

    options: mask, mask_ratio, metric, frozen as in `HPM` (metric: by default "cosine" for features, else "l2");
    gelu of the encoder; decoder = (dim, depth, heads). Raises ValueError for unknown names and parts that do not fit.
    """
    for name, value, allowed in (
        ("target", target, TARGETS),
        ("predictor", predictor, ("relative", "absolute", "none")),
        ("mask", options.get("mask", "hard"), ("random", "block", "grid", "hard")),
    ):
        if value not in allowed:
            raise ValueError(f"unknown {name} {value!r}; there are {', '.join(allowed)}")
    frozen = options.get("frozen")
    if target in ("dino", "clip") and frozen is None:
        raise ValueError(f"the target {target} needs a frozen model: give its weights")
    vit.check_plain(arch)
    encoder = vit.create(arch, img_size, 0, in_chans, pos_embed="sincos", gelu=options.pop("gelu", "none"))
    P, D = encoder.patch_size, encoder.dim
    outputs = {"pixels": P * P * in_chans, "norm-pixels": P * P * in_chans, "ema": D}
    outputs["hog"] = hog(torch.zeros(1, in_chans, P, P), P).shape[-1]
    if target in ("dino", "clip"):
        if frozen.grid != encoder.grid:
            grids = ["x".join(map(str, model.grid)) for model in (frozen, encoder)]
            raise ValueError(
                f"the frozen model has {grids[0]} patches, the student {grids[1]}; they must be the same ones"
            )
        outputs[target] = frozen.head.out_features if isinstance(frozen.head, nn.Linear) else D
    size = options.pop("decoder", None) or DECODERS.get(D, (512, 8, 16))
    options.setdefault("metric", "cosine" if target in ("ema", "dino", "clip") else "l2")
    student = Autoencoder(encoder, outputs[target], *size, loss_predictor=predictor != "none")
    return HPM(student, target=target, predictor=predictor, **options)


def load_weights(student, source, which="student"):
    """Load a checkpoint, a file or a URL, into an `Autoencoder`: the encoder, and the decoders where the file has any.

    Any layout that weights.py knows; with decoders: MAE's, HPM's own and ours, Hugging Face's ViTMAE. which: "student"
    or "teacher", where the file holds both. Returns sentences that say what was adapted, left or not used, as
    `vit.load_weights` does; raises ValueError, and changes nothing, for another width or depth of any part.
    """
    return vit.load_state(student, weights.read(source, which), source)


# CLIP's visual tower in timm's names: its name, ours.
CLIP_NAMES = (
    ("visual.", ""),
    ("conv1.weight", "patch_embed.proj.weight"),
    ("class_embedding", "cls_token"),
    ("positional_embedding", "pos_embed"),
    ("ln_pre", "norm_pre"),
    ("ln_post", "norm"),
    ("transformer.resblocks", "blocks"),
    ("ln_1", "norm1"),
    ("ln_2", "norm2"),
    ("attn.in_proj_", "attn.qkv."),
    ("attn.out_proj", "attn.proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)


def load_frozen(target, arch, img_size, source, in_chans=3):
    """The frozen ViT whose features are the target "dino" or "clip", from its weights.

    DINO's have timm's names. CLIP's visual tower has its own, one more LayerNorm, no bias in E, the quick GELU and a
    projection at the end, which becomes our head. The model has the student's architecture, so that patches
    correspond; raises ValueError, with both sizes, for weights of another patch size or width.
    """
    state = weights.tensors(source) if target == "clip" else weights.read(source, which="teacher")
    options = {}
    if target == "clip":
        state = {name: value.float() for name, value in state.items() if name.startswith("visual.")}
        for theirs, ours in CLIP_NAMES:
            state = {name.replace(theirs, ours): value for name, value in state.items()}
        if not {"proj", "cls_token", "pos_embed", "patch_embed.proj.weight"} <= state.keys():
            raise ValueError(
                f"{source} holds no visual tower of CLIP: no visual.conv1.weight, visual.proj and so on in it"
            )
        state["cls_token"], state["pos_embed"] = state["cls_token"][None, None], state["pos_embed"][None]
        state["head.weight"] = state.pop("proj").T
        state["patch_embed.proj.bias"] = torch.zeros(state["cls_token"].shape[-1])
        state["head.bias"] = torch.zeros(len(state["head.weight"]))
        options = dict(num_classes=len(state["head.weight"]), pre_norm=True, gelu="quick", eps=1e-5)
    frozen = vit.create(arch, img_size, in_chans=in_chans, **{"num_classes": 0, **options})
    own = frozen.patch_embed.proj.weight
    for theirs in (value for name, value in state.items() if name.endswith("patch_embed.proj.weight")):
        for what, axis in (("width", 0), ("patch size", -1)):
            if theirs.shape[axis] != own.shape[axis]:
                raise ValueError(f"{source}: its {what} is {theirs.shape[axis]}, that of {arch} is {own.shape[axis]}")
    vit.load_state(frozen, state, source)
    return frozen.requires_grad_(False).eval()
