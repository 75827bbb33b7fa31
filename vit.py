"""The Vision Transformer, from the patch to the logits.

*An Image Is Worth 16x16 Words: Transformers for Image Recognition at Scale*
(Dosovitskiy et al., ICLR 2021, arXiv 2010.11929). Equation numbers (1)-(8) are the paper's.

Read this file from top to bottom: it has the paper's order.

    patches         an image becomes a sequence                      eq. 1
    positions       what tells the tokens where they are             eq. 1, section 3.2, D.4
    attention       every token looks at every other                 eq. 5-8
    encoder block   attention and MLP, each beside a residual        eq. 2, 3
    ViT             the whole model, and its heads                   eq. 1-4
    variants        Ti, S, B, L, H as in table 1, and the hybrids
    looking inside  attention distance, rollout, similar positions   figures 6, 7
    weights         loading them, whatever the image size; weights.py reads the files

Letters in the shapes at the end of a line:
    B images   C channels   H, W pixels   P patch size   N patches   D width   k heads   D_h = D / k
T is the number of tokens: N, and one more for the class token.

Parameters carry timm's names, so that most public checkpoints load as they are.
"""

import difflib
import math
import re

import torch
from torch import nn
from torch.nn import functional as F

import resnet
import weights

# ---------------------------------------------------------------------------------------------
# Patches
# ---------------------------------------------------------------------------------------------


def patch_grid(height, width, patch_size):
    """Rows and columns of the patch grid; N = rows * columns = HW / P².

    Raises ValueError if the patch size does not divide the height and the width.
    """
    if height % patch_size or width % patch_size:
        near = [max(1, round(side / patch_size)) * patch_size for side in (height, width)]
        raise ValueError(
            f"image size {height}x{width} is not a multiple of the patch size {patch_size}; "
            f"use {near[0]}x{near[1]}, or another patch size"
        )
    return height // patch_size, width // patch_size


def patchify(images, patch_size):
    """Cut images into the sequence of flattened patches x_p (ViT, section 3.1).

    images (B, C, H, W) -> (B, N, P*P*C). Patches run row by row over the image; inside a patch
    the pixels run row by row, the channel last. This is MAE's order.
    Raises ValueError if P does not divide H and W.
    """
    B, C, H, W = images.shape
    P = patch_size
    rows, columns = patch_grid(H, W, P)
    x = images.reshape(B, C, rows, P, columns, P)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, rows, columns, P, P, C)
    return x.reshape(B, rows * columns, P * P * C)


def unpatchify(patches, patch_size, grid):
    """Put patches back where they came from: the inverse of `patchify`.

    patches (B, N, P*P*C), grid = (rows, columns) -> (B, C, H, W).
    Raises ValueError if N is not rows * columns.
    """
    B, N, length = patches.shape
    P = patch_size
    rows, columns = grid
    if N != rows * columns:
        raise ValueError(f"{N} patches do not fill a grid of {rows}x{columns}; give grid=(rows, columns)")
    x = patches.reshape(B, rows, columns, P, P, length // P**2)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, rows, P, columns, P)
    return x.reshape(B, -1, rows * P, columns * P)


class PatchEmbed(nn.Module):
    """The linear map E of ViT eq. 1: patches (B, n, P*P*C) -> tokens (B, n, D).

    Its weights have the shape of a convolution of size P and stride P, as in all public
    checkpoints, and that is what it computes. Written as a matrix product it also takes a part
    of the patches, which is what a masked autoencoder needs, and small patches cost less
    (28 px, P = 4, 2 cores: 1.1 ms for 256 images, the convolution 5.7 ms).

    In a hybrid, `backbone` is a ResNet with these stages, and patches are cut out of its features. P stays the
    number of image pixels that a patch stands for: with stride 16 and P = 16 it is one pixel of the features.
    """

    def __init__(self, patch_size, in_chans, dim, backbone=None):
        super().__init__()
        self.backbone = nn.Identity()
        if backbone is not None:
            self.backbone = resnet.Backbone(in_chans, backbone)
            if patch_size % self.backbone.stride:
                raise ValueError(
                    f"patches of {patch_size} pixels do not fit features of stride {self.backbone.stride}; "
                    f"use a multiple of {self.backbone.stride}"
                )
            patch_size, in_chans = patch_size // self.backbone.stride, self.backbone.channels
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def cut(self, images):
        """images (B, C, H, W) -> patches (B, N, P*P*C), of the images or of their features."""
        return patchify(self.backbone(images), self.proj.kernel_size[0])

    def forward(self, patches):
        E = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, C, P, P) -> (D, P*P*C)
        return F.linear(patches, E, self.proj.bias)


# ---------------------------------------------------------------------------------------------
# Positions
# ---------------------------------------------------------------------------------------------


def sincos_pos_embed(dim, grid, prefix=1):
    """Fixed 2-D sine-cosine positions, used by MAE and HPM in place of learned ones.

    Half of the channels encode the column, half the row; each half is [sin(p·ω), cos(p·ω)]
    with ω_i = 10000^(-i / (D/4)), i = 0 … D/4 - 1 (Attention Is All You Need, section 3.5, in 2-D).

    dim D, grid = (rows, columns) -> (1, prefix + N, D) float32; zeros for the prefix.
    Raises ValueError if D is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, not {dim}")
    rows, columns = grid
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (D/4)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = torch.stack([column, row], dim=-1).reshape(-1, 2, 1) * omega  # (N, 2, D/4)
    embed = torch.cat([angles.sin(), angles.cos()], dim=-1).reshape(1, -1, dim)
    return F.pad(embed, (0, 0, prefix, 0)).float()


def interpolation_matrix(old, new, original=False):
    """The linear map that resamples `old` points on a line to `new` points: (new, old) float64.

    original=False  cubic convolution (Keys 1981, a = -1/2) about pixel centres, widened when
                    shrinking so that nothing is aliased. What timm runs today. (The official code of
                    DeiT and MAE calls torch's bicubic without antialias: a = -3/4, never widened.)
    original=True   linear, first and last points kept in place. What the ViT authors ran (scipy's
                    zoom, order 1).
    """
    if original:
        centres, stretch = torch.linspace(0, old - 1, new, dtype=torch.float64), 1.0
    else:
        centres, stretch = (torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5, max(1.0, old / new)
    d = (centres[:, None] - torch.arange(old)).abs() / stretch  # (new, old)
    if original:
        weights = (1 - d).clamp(min=0)
    else:
        near, far = (1.5 * d - 2.5) * d**2 + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
        weights = torch.where(d < 1, near, torch.where(d < 2, far, torch.zeros_like(d)))
    return weights / weights.sum(dim=1, keepdim=True)


def resize_pos_embed(pos_embed, old_grid, new_grid, prefix=1, original=False):
    """Carry position embeddings to another grid by 2-D interpolation (ViT, section 3.2).

    A grid of positions is a small image with D channels, so it is resized like one: first along
    the rows, then along the columns. The class token has no place in the image: it is kept.

    pos_embed (1, prefix + N, D), grids = (rows, columns) -> (1, prefix + N_new, D).
    `original` picks the ViT authors' bilinear mode, see `interpolation_matrix`.
    Raises ValueError if pos_embed does not have prefix + rows * columns entries.
    """
    if pos_embed.shape[1] != prefix + math.prod(old_grid):
        raise ValueError(
            f"{pos_embed.shape[1]} position embeddings are not {prefix} + {old_grid[0]}x{old_grid[1]}; "
            "check old_grid and prefix"
        )
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    tokens, patches = pos_embed[:, :prefix], pos_embed[:, prefix:]
    image = patches.reshape(*old_grid, -1).double()  # (rows, columns, D)
    down = interpolation_matrix(old_grid[0], new_grid[0], original).to(image.device)
    along = interpolation_matrix(old_grid[1], new_grid[1], original).to(image.device)
    image = torch.einsum("rs,std,ct->rcd", down, image, along)  # (new rows, new columns, D)
    return torch.cat([tokens, image.reshape(1, math.prod(new_grid), -1).to(pos_embed)], dim=1)


# ---------------------------------------------------------------------------------------------
# Attention, MLP, block
# ---------------------------------------------------------------------------------------------


class RelativePositions(nn.Module):
    """Positions inside attention (ViT, appendix D.4): q (B, k, T, D_h) -> (B, k, T, T), to add to the logits.

    Every offset i - j in the sequence, 2T - 1 of them, has a learned embedding r: query i meets key j as
    q_i · (k_j + r_{i-j}). All heads of a block share r. The class token is the start of the sequence.
    """

    def __init__(self, tokens, head_dim):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(2 * tokens - 1, head_dim))
        places = torch.arange(tokens)
        self.register_buffer("offset", places[:, None] - places + tokens - 1, persistent=False)  # (T, T)

    def forward(self, q):
        r = self.pos_embed[self.offset]  # (T, T, D_h)
        return torch.einsum("bhid,ijd->bhij", q, r.to(q)) / math.sqrt(q.shape[-1])


class Attention(nn.Module):
    """Multi-head self-attention, MSA(z), ViT eq. 5-8: (B, T, D) -> (B, T, D).

    `inside`: a dict to fill with q, k, v (B, k, T, D_h), A (B, k, T, T) and each head's SA.
    The fused kernel computes the same without ever storing A, so asking for A takes the plain path.
    tokens: T, to have `RelativePositions` too. Raises ValueError if the number of heads does not divide the width.
    """

    def __init__(self, dim, num_heads, dropout=0.0, fused=True, tokens=None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} does not split into {num_heads} heads; use a divisor of {dim}")
        self.num_heads = num_heads
        self.fused = fused
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.relative = RelativePositions(tokens, dim // num_heads) if tokens else None

    def forward(self, z, inside=None):
        B, T, D = z.shape
        qkv = self.qkv(z).reshape(B, T, 3, self.num_heads, -1)  # eq. 5: [q, k, v] = z U_qkv
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, k, T, D_h)
        bias = self.relative(q) if self.relative else None  # as a rule positions are in z_0 alone
        if self.fused and inside is None:
            sa = F.scaled_dot_product_attention(q, k, v, bias)
        else:
            logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # eq. 6: A = softmax(q kᵀ / √D_h)
            A = (logits if bias is None else logits + bias).softmax(dim=-1)  # eq. 6, (B, k, T, T)
            sa = A @ v  # eq. 7: SA(z) = A v, (B, k, T, D_h)
            if inside is not None:
                inside.update(q=q, k=k, v=v, A=A, sa=sa)
        msa = self.proj(sa.transpose(1, 2).reshape(B, T, D))  # eq. 8: [SA_1; …; SA_k] U_msa
        return self.dropout(msa)


class MLP(nn.Module):
    """Two linear maps with a GELU between them, on every token alone: (B, T, D) -> (B, T, D).

    gelu: "none" is the exact GELU x·Φ(x) (timm, MAE, HPM). With weights that were trained so, equal
    outputs need their approximation: "tanh" (Google's JAX code) or "quick", x·σ(1.702 x) (CLIP).
    """

    def __init__(self, dim, hidden, dropout=0.0, gelu="none"):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.gelu = gelu
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, z):
        h = self.fc1(z)  # (B, T, mlp_ratio * D)
        h = h * torch.sigmoid(1.702 * h) if self.gelu == "quick" else F.gelu(h, approximate=self.gelu)
        return self.dropout(self.fc2(self.dropout(h)))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, leave a whole branch out for an image.

    rate: probability of leaving it out, in [0, 1). Kept branches are scaled by 1 / (1 - rate), so
    that the expected value stays.
    """

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, branch):
        if self.rate == 0.0 or not self.training:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.rate
        return branch * (keep / (1 - self.rate)).to(branch.dtype)


class Block(nn.Module):
    """One encoder layer, ViT eq. 2 and 3: (B, T, D) -> (B, T, D).

    LayerNorm comes before each branch (pre-norm); the residual path itself is never normalised.
    """

    def __init__(
        self, dim, num_heads, mlp_ratio=4, dropout=0.0, drop_path=0.0, gelu="none", fused=True, eps=1e-6, tokens=None
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads, dropout, fused, tokens)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio), dropout, gelu)
        self.drop_path = DropPath(drop_path)

    def forward(self, z, inside=None):
        z_prime = self.drop_path(self.attn(self.norm1(z), inside)) + z  # eq. 2
        z = self.drop_path(self.mlp(self.norm2(z_prime))) + z_prime  # eq. 3
        if inside is not None:
            inside.update(z_prime=z_prime, z=z)
        return z


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------


POS_EMBEDS = "none 1d 2d relative sincos"


class ViT(nn.Module):
    """The Vision Transformer: images (B, C, H, W) -> logits (B, classes).

    img_size     pixels, one number or (H, W); the patch size must divide both
    backbone     a hybrid's ResNet: the number of bottlenecks in each of its stages, see `resnet.Backbone`
    num_classes  0 leaves the head out: the output is then the image representation y (B, D)
    pool         "cls": y = LN(z_L⁰), eq. 4; "mean": LayerNorm of the mean over patch tokens (MAE's
                 fine-tuning head; the paper's appendix D.3 compares the two)
    head         "linear": one layer that starts at zero (the paper's fine-tuning head);
                 "mlp": one tanh hidden layer before it (its pre-training head)
    pos_embed    "1d": learned, one for each place in the sequence, as in the paper; "sincos": fixed, as in MAE and
                 HPM; and the variants of appendix D.4: "none"; "2d": learned, D/2 channels for the column and D/2
                 for the row; "relative": in every attention, see there, and nothing is added to z_0
    class_token  False leaves it out; only with pool="mean"
    dropout      after every dense layer but qkv, and after adding positions (appendix B.1)
    drop_path    stochastic depth, rising linearly from 0 at the first block to this at the last
    gelu         "none", "tanh" or "quick", see `MLP`
    pre_norm     one more LayerNorm, before the first block (CLIP)
    eps          of all LayerNorms: 1e-6 in ViT, MAE and HPM, 1e-5 in CLIP
    fused        False writes attention out as eq. 6 and 7 instead of calling the fused kernel

    Raises ValueError for sizes that do not fit each other.
    """

    def __init__(
        self, img_size=224, patch_size=16, in_chans=3, num_classes=1000, dim=768, depth=12, num_heads=12,
        mlp_ratio=4, pool="cls", head="linear", pos_embed="1d", class_token=True,
        dropout=0.0, drop_path=0.0, gelu="none", pre_norm=False, eps=1e-6, fused=True, backbone=None,
    ):  # fmt: skip
        super().__init__()
        names = dict(pool=(pool, "cls mean"), head=(head, "linear mlp"), pos_embed=(pos_embed, POS_EMBEDS))
        for option, (given, allowed) in names.items():
            if given not in allowed.split():
                raise ValueError(f"unknown {option} {given!r}; there are {', '.join(allowed.split())}")
        if not class_token and pool == "cls":
            raise ValueError('pool="cls" needs the class token; use pool="mean" or class_token=True')
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.patch_size = patch_size
        self.grid = patch_grid(*self.img_size, patch_size)  # (rows, columns)
        self.prefix = int(class_token)  # tokens before the patches
        self.pool, self.dim = pool, dim

        self.patch_embed = PatchEmbed(patch_size, in_chans, dim, backbone)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        tokens, (rows, columns) = self.prefix + math.prod(self.grid), self.grid
        self.pos_embed = None
        if pos_embed == "sincos":
            self.pos_embed = nn.Parameter(sincos_pos_embed(dim, self.grid, self.prefix), requires_grad=False)
        elif pos_embed == "1d":
            self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
        elif pos_embed == "2d":
            if dim % 2:
                raise ValueError(f"2-D positions need a width that splits in two halves, not {dim}")
            self.column_pos_embed = nn.Parameter(torch.zeros(1, columns, dim // 2))
            self.row_pos_embed = nn.Parameter(torch.zeros(1, rows, dim // 2))
        self.dropout = nn.Dropout(dropout)
        self.norm_pre = nn.LayerNorm(dim, eps) if pre_norm else nn.Identity()
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        relative = tokens if pos_embed == "relative" else None
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, dropout, rate, gelu, fused, eps, relative) for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps) if pool == "cls" else nn.Identity()
        self.fc_norm = nn.LayerNorm(dim, eps) if pool == "mean" else nn.Identity()
        self.pre_logits = nn.Sequential()  # stays empty (the identity) for the linear head
        if head == "mlp":
            self.pre_logits.add_module("fc", nn.Linear(dim, dim))
            self.pre_logits.add_module("tanh", nn.Tanh())
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        init_weights(self)

    def positions(self):
        """E_pos (1, prefix + N, D); zeros where nothing is added to the tokens."""
        if self.pos_embed is not None:
            return self.pos_embed
        rows, columns = self.grid
        if not hasattr(self, "row_pos_embed"):
            return self.patch_embed.proj.weight.new_zeros(1, self.prefix + rows * columns, 1)
        column = self.column_pos_embed[:, None].expand(-1, rows, -1, -1)  # (1, rows, columns, D/2)
        row = self.row_pos_embed[:, :, None].expand(-1, -1, columns, -1)
        return F.pad(torch.cat([column, row], dim=-1).flatten(1, 2), (0, 0, self.prefix, 0))

    def embed(self, images, visible=None, change=None):
        """ViT eq. 1: z_0 = [x_class; x_p¹E; …; x_p^N E] + E_pos, (B, C, H, W) -> (B, T, D).

        visible: indices (B, n) of the patches to embed; the others are left out (MAE's encoder). change: a function
        that alters the embedded patches (B, n, D) before they get their positions (masked patch prediction).
        Raises ValueError if the images do not have the size that the model was built for.
        """
        if images.shape[-2:] != self.img_size:
            given, built = ("x".join(map(str, size)) for size in (images.shape[-2:], self.img_size))
            raise ValueError(
                f"images are {given} pixels, the model was built for {built}; resize the images, "
                f"or create the model with img_size={tuple(images.shape[-2:])}"
            )
        patches = self.patch_embed.cut(images)  # (B, N, P*P*C)
        E_pos = self.positions()  # (1, prefix + N, D)
        positions = E_pos[:, self.prefix :]  # (1, N, D)
        if visible is not None:
            patches = gather(patches, visible)  # (B, n, P*P*C)
            positions = gather(positions.expand(len(images), -1, -1), visible)  # (B, n, D)
        z = self.patch_embed(patches)  # (B, n, D)
        if change is not None:
            z = change(z)
        z = z + positions
        if self.cls_token is not None:
            x_class = self.cls_token + E_pos[:, :1]  # (1, 1, D)
            z = torch.cat([x_class.expand(len(z), -1, -1).to(z.dtype), z], dim=1)
        return self.norm_pre(self.dropout(z))

    def encode(self, images, visible=None, inside=None, change=None):
        """All tokens after the last block: z_L (B, T, D), through LN when pool="cls"."""
        z = self.embed(images, visible, change)
        if inside is not None:
            inside.update(z0=z, blocks=[{} for _ in self.blocks])
        for i, block in enumerate(self.blocks):
            z = block(z, None if inside is None else inside["blocks"][i])
        return self.norm(z)

    def represent(self, images, inside=None):
        """The image representation y (B, D): ViT eq. 4, or its mean-pool variant."""
        z = self.encode(images, inside=inside)
        y = z[:, 0] if self.pool == "cls" else z[:, self.prefix :].mean(dim=1)
        return self.fc_norm(y)

    def forward(self, images, inside=None):
        """images (B, C, H, W) -> logits (B, classes).

        inside: an empty dict, filled with the values on the way by name: z0, y, logits, and in
        blocks[i] q, k, v, A, sa, z_prime, z.
        """
        y = self.represent(images, inside)
        logits = self.head(self.pre_logits(y))
        if inside is not None:
            inside.update(y=y, logits=logits)
        return logits


def gather(tokens, index):
    """Pick tokens by index, each image its own: (B, N, D), (B, n) -> (B, n, D)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def init_weights(module):
    """How training starts: Xavier-uniform matrices, zero biases, N(0, 0.02²) positions and tokens, a head of zeros.

    U_qkv holds three D x D matrices; each is drawn for its own size, as in the ViT authors' code (MAE's and HPM's draw
    the three as one matrix, by √2 smaller). Their convolution and MLP biases start otherwise, from JAX's defaults.
    """
    for name, parameter in module.named_parameters():
        if name.endswith("head.weight"):
            nn.init.zeros_(parameter)
        elif name.endswith("qkv.weight"):
            for matrix in parameter.chunk(3):
                nn.init.xavier_uniform_(matrix)
        elif name.endswith("weight") and parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter.flatten(1))  # a view, also of the convolution's weight
        elif name.endswith(("token", "pos_embed")) and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


# ---------------------------------------------------------------------------------------------
# Variants
# ---------------------------------------------------------------------------------------------

# Table 1 (B, L, H) and, smaller, DeiT's Ti and S:  width, depth, heads.
SIZES = {"ti": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16)}
ARCHS = {
    f"vit_{size}{patch}": dict(patch_size=patch, dim=dim, depth=depth, num_heads=heads)
    for size, (dim, depth, heads) in SIZES.items()
    for patch in (8, 14, 16, 32)
}
# The hybrids: R50 as in the paper, with its fourth stage or, for patches of 16, with its blocks in the third;
# R26 and the stem alone as in the authors' code (theirs is called R+ViT-Ti/16, with patches of 32 pixels nonetheless).
for size, (dim, depth, heads) in SIZES.items():
    for name, patch, stages in (("r50", 16, (3, 4, 9)), ("r50", 32, (3, 4, 6, 3)), ("r26", 32, (2, 2, 2, 2))):
        ARCHS[f"{name}_vit_{size}{patch}"] = dict(
            patch_size=patch, dim=dim, depth=depth, num_heads=heads, backbone=stages
        )
ARCHS["r_vit_ti16"] = ARCHS["vit_ti32"] | dict(backbone=())
# Ours, for images of 28 to 32 pixels: the narrow and deep one, with fixed positions, learned the most per minute.
ARCHS["vit_micro4"] = dict(patch_size=4, dim=64, depth=6, num_heads=4, mlp_ratio=2, pos_embed="sincos")


def create(arch, img_size=224, num_classes=1000, in_chans=3, **options):
    """Build a model by its name: `vit_b16` is ViT-B/16, `r50_vit_b16` the hybrid, `resnet50` the baseline.

    All names are in `ARCHS` and `resnet.ARCHS`. options: any argument of `ViT`, which wins over the variant's own,
    or of `resnet.ResNet`, which takes images of any size. Raises ValueError for an unknown name.
    """
    if arch in resnet.ARCHS:
        return resnet.ResNet(in_chans, num_classes, **(resnet.ARCHS[arch] | options))
    if arch not in ARCHS:
        names = [*ARCHS, *resnet.ARCHS]
        near = difflib.get_close_matches(arch, names, n=1, cutoff=0)[0]
        raise ValueError(f"unknown arch {arch!r}; did you mean {near}? There are {', '.join(names)}")
    return ViT(img_size=img_size, num_classes=num_classes, in_chans=in_chans, **(ARCHS[arch] | options))


def check_plain(arch):
    """Raise ValueError for an arch that hides nothing from itself: convolutions would look into hidden patches."""
    if arch in resnet.ARCHS or "backbone" in ARCHS.get(arch, {}):
        raise ValueError(f"{arch} starts with convolutions, which would look into the hidden patches; use a vit_ arch")


# ---------------------------------------------------------------------------------------------
# Looking inside
# ---------------------------------------------------------------------------------------------


def attention_distance(A, grid, patch_size, prefix=1):
    """How far a head looks: the mean distance between a patch and what it attends to (figure 7).

    A (B, k, T, T), grid = (rows, columns), patch size in pixels -> (k,) in pixels: the distance
    between patch centres weighted by attention, averaged over query patches and images. The class
    token has no place, so it is left out and the weights on the patches are normalised again.
    """
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    centres = patch_size * torch.stack([row, column], dim=-1).reshape(-1, 2).to(A)  # (N, 2) pixels
    distance = (centres[:, None] - centres).norm(dim=-1)  # (N, N)
    weights = A[:, :, prefix:, prefix:]
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return (weights * distance).sum(dim=-1).mean(dim=(0, 2))


def attention_rollout(attentions):
    """How much of each input token reaches each output token (figure 6; Abnar & Zuidema 2020).

    attentions: A of every block in order, each (B, k, T, T) -> (B, T, T); rows are outputs and sum
    to 1. Heads are averaged; the residual path, which carries a token past attention unchanged,
    counts as attention to itself: (A + I) / 2. The layers then multiply.
    """
    identity = torch.eye(attentions[0].shape[-1]).to(attentions[0])
    rollout = identity
    for A in attentions:
        rollout = (A.mean(dim=1) + identity) / 2 @ rollout
    return rollout


def pos_embed_similarity(pos_embed, grid, prefix=1):
    """Cosine similarity of every position embedding with every other (figure 7, centre).

    pos_embed (1, prefix + N, D) -> (rows, columns, rows, columns); [r, c] is the map of position (r, c).
    """
    unit = F.normalize(pos_embed[0, prefix:], dim=-1)  # (N, D)
    return (unit @ unit.T).reshape(*grid, *grid)


# ---------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------


def load_weights(model, source, which="student"):
    """Load a checkpoint, a file or a URL, into a ViT: any layout that weights.py knows.

    which: "student" or "teacher", where the file holds both. Another image size is no obstacle: learned positions are
    interpolated, sine-cosine ones computed for the model's own grid. A head for other classes is left at its
    initial value. Returns sentences that say what was adapted, left or not used. Raises ValueError, and changes
    nothing, if the file can't be read or does not fit. No code that a file may carry is ever run.
    """
    return load_state(model, weights.read(source, which), source)


def save_weights(model, path, layout="timm"):
    """Write a ViT's weights as a .safetensors file.

    layout  "timm"          our own names too: timm.models.load_checkpoint takes it, with global_pool="token" for
                            pool="cls" and "avg" for pool="mean"; its models have no "mlp" head any more
            "hugging-face"  for transformers' ViTForImageClassification with layer_norm_eps=1e-6 (see `eps`) and
                            hidden_act="gelu", or "gelu_pytorch_tanh" for gelu="tanh"
    Raises ValueError for a part that Hugging Face's model does not have, as the norm of pool="mean".
    """
    weights.write(path, model.state_dict(), layout)


def load_state(model, state, source):
    """`load_weights` from tensors by name, as `weights.read` gives them; `source` is what messages call them.

    The model is a ViT or a ResNet, or has a ViT as its `encoder` and decoders beside it (`hpm.Autoencoder`).
    """
    encoder = getattr(model, "encoder", model)
    own = {name.removeprefix("encoder."): value for name, value in model.state_dict(keep_vars=True).items()}
    notes = []
    for name in own.keys() & state.keys():
        if getattr(state[name], "ndim", None) != own[name].ndim:
            raise ValueError(f"{source} does not fit: its {name} is not a tensor with {own[name].ndim} dimensions")
    if not own.keys() & state.keys():
        raise ValueError(f"{source} does not fit: it has nothing of this model, which starts with {next(iter(own))}")
    stages = [f"{part}stages.{i}.blocks." for part in ("", "patch_embed.backbone.") for i in range(4)]
    for stack in ("blocks.", "decoder.blocks.", "loss_predictor.blocks.", *stages):
        here, there = (len({n[len(stack) :].split(".")[0] for n in s if n.startswith(stack)}) for s in (own, state))
        optional = stack.startswith(("decoder", "loss_predictor"))  # a file may lack these
        if here and here != there and (there or not optional):
            part = stack.removesuffix("blocks.").replace(".", " ")
            raise ValueError(f"{source} does not fit: its {part}depth is {there} blocks, this model's {here}")

    fitted, told = dict(state), set()
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in own and name in state:
            fitted[name], note = fit_positions(own[name], encoder.grid, state[name], int("cls_token" in state), source)
            notes += [note] if note and note not in notes else []
    for name in ("row_pos_embed", "column_pos_embed"):
        if name in own and name in state and own[name].shape[1] != state[name].shape[1]:
            old, new = state[name].shape[1], own[name].shape[1]
            fitted[name] = (interpolation_matrix(old, new) @ state[name].double().cpu()).to(own[name])
            notes.append(f"{name} interpolated from {old} to {new}")
    for layer, what in (("head", "classes"), ("decoder.pred", "values a patch")):
        sizes = [len(s[f"{layer}.weight"]) for s in (own, state) if f"{layer}.weight" in s]
        if len(set(sizes)) == 2:
            notes.append(f"{layer} left at its initial value: {sizes[0]} {what} here, {sizes[1]} in the file")
            told |= {f"{layer}.weight", f"{layer}.bias"}
    fitted = {name: value for name, value in fitted.items() if name in own and name not in told}
    for name, value in fitted.items():
        if value.shape != own[name].shape:
            given, wanted = tuple(value.shape), tuple(own[name].shape)
            raise ValueError(f"{source} does not fit: its {name} has the shape {given}, this model's {wanted}")
    loaded = {name.split(".")[0] for name in fitted}
    left = own.keys() - state.keys() - {"decoder_pos_embed"}  # without a file they are those of the formula
    for what, names in (("left at the initial value", left), ("not used", state.keys() - own.keys())):
        # A part by its name if nothing of it was loaded, else what is meant in it, for all blocks at once.
        parts = {re.sub(r"\.\d+\.", ".*.", n) if n.split(".")[0] in loaded else n.split(".")[0] for n in names - told}
        if parts:
            notes.append(f"{what}: {', '.join(sorted(parts))}")
    model.load_state_dict({n: fitted.get(n.removeprefix("encoder."), v) for n, v in model.state_dict().items()})
    return notes


def fit_positions(own, grid, positions, prefix, source):
    """A checkpoint's positions for the grid and the prefix of a model; and a sentence on what was done, or None.

    own (1, prefix here + N here, D), the model's, of grid = (rows, columns); positions (1, prefix + N, D), the file's.
    Those that follow the sine-cosine formula are computed anew, others interpolated.
    """
    N, D, (rows, columns) = positions.shape[1] - prefix, positions.shape[2], grid
    mine, side = own.shape[1] - rows * columns, math.isqrt(N)
    if follow_formula(positions, [(n, N // n) for n in range(1, N + 1) if N % n == 0], prefix):
        if mine == prefix and follow_formula(positions, [grid], prefix):
            return positions, None
        return sincos_pos_embed(D, grid, mine), f"sine-cosine positions computed for the {rows}x{columns} grid"
    note = None
    if follow_formula(own.detach(), [grid], mine):
        note = "positions are the file's, which do not follow the sine-cosine formula"
    if N != rows * columns:
        if side**2 != N:
            raise ValueError(
                f"{source} has positions for {N} patches, no square grid; use the image size that it was trained with"
            )
        positions = resize_pos_embed(positions, (side, side), grid, prefix)
        note = f"positions interpolated from {side}x{side} to {rows}x{columns}"
    tokens = positions[:, :prefix] if prefix else own.detach()[:, :1].to(positions)
    return torch.cat([tokens[:, :mine], positions[:, prefix:]], dim=1), note


def follow_formula(positions, grids, prefix):
    """Whether positions (1, prefix + N, D) are the sine-cosine ones of one of the grids, up to their own precision."""
    N, D = positions.shape[1] - prefix, positions.shape[2]
    precision = 1e-5 if positions.dtype in (torch.float32, torch.float64) else 1e-2

    def equal(some, formula):
        return torch.allclose(some.float().cpu(), formula, rtol=0, atol=precision)

    if D % 4 or N < 1 or not equal(positions[:, prefix : prefix + 1], sincos_pos_embed(D, (1, 1), 0)):
        return False  # the first patch is the same in all grids, so this spares most files the loop
    return any(equal(positions, sincos_pos_embed(D, g, prefix)) for g in grids if math.prod(g) == N)
