"""The Vision Transformer, from the patch to the logits.

*An Image Is Worth 16x16 Words: Transformers for Image Recognition at Scale*
(Dosovitskiy et al., ICLR 2021, arXiv 2010.11929). Equation numbers (1)-(8) are the paper's.
Read this file from top to bottom, with the paper beside it: it has the paper's order.

    patches         an image becomes a sequence, each patch a token    section 3.1, eq. 1
    ViT             the whole model, and its heads                     eq. 1-4
    encoder block   attention and MLP, each beside a residual          eq. 2, 3
    attention       every token looks at every other                   appendix A, eq. 5-8
    positions       for another image size; fixed ones                 section 3.2
    variants        Ti, S, B, L, H; their first weights, or trained    table 1
    looking inside  attention distance, rollout, similar positions     figures 6, 7

Letters in the shapes at the end of a line:
    B images   C channels   H, W pixels   P patch size   N patches   D width   k heads   D_h = D / k
T is the number of tokens: N, and one more for the class token.
Parameters carry timm's names, so that most public checkpoints load as they are.
"""

import difflib
import math

import torch
from torch import nn
from torch.nn import functional as F


def patch_grid(height, width, patch_size):
    """Rows and columns of the patch grid; N = rows * columns = HW / P².

    Raises ValueError if the patch size does not divide the height and the width.
    """
    if height % patch_size or width % patch_size:
        near = "x".join(str(max(1, round(side / patch_size)) * patch_size) for side in (height, width))
        raise ValueError(f"image size {height}x{width} is not a multiple of the patch size {patch_size}; use {near}")
    return height // patch_size, width // patch_size


def patchify(images, patch_size):
    """Cut images into the sequence of flattened patches x_p (ViT, section 3.1).

    images (B, C, H, W) -> (B, N, P*P*C). Patches run row by row over the image; inside a patch the pixels run row by
    row, the channel last: MAE's order. Raises ValueError if P does not divide H and W.
    """
    (B, C, H, W), P = images.shape, patch_size
    rows, columns = patch_grid(H, W, P)
    x = images.reshape(B, C, rows, P, columns, P).permute(0, 2, 4, 3, 5, 1)  # (B, rows, columns, P, P, C)
    return x.reshape(B, rows * columns, P * P * C)


def unpatchify(patches, patch_size, grid):
    """Put patches back where they came from: the inverse of `patchify` (ViT, section 3.1).

    patches (B, N, P*P*C), grid = (rows, columns) -> (B, C, H, W). Raises ValueError if N is not rows * columns.
    """
    (B, N, length), P, (rows, columns) = patches.shape, patch_size, grid
    if N != rows * columns:
        raise ValueError(f"{N} patches do not fill a grid of {rows}x{columns}; give grid=(rows, columns)")
    x = patches.reshape(B, rows, columns, P, P, length // P**2).permute(0, 5, 1, 3, 2, 4)  # (B, C, rows, P, columns, P)
    return x.reshape(B, -1, rows * P, columns * P)


class PatchEmbed(nn.Module):
    """The linear map E of ViT eq. 1: patches x_p (B, n, P*P*C) -> tokens x_p E (B, n, D).

    Its weights have the shape of a convolution of size P and stride P, as in all public checkpoints, and that is what
    it computes. Written as a matrix product it also takes a part of the patches, which is what a masked autoencoder
    needs, and small patches cost less (28 px, P = 4, 2 cores: 1.1 ms for 256 images, the convolution 5.7 ms).
    """

    def __init__(self, patch_size, in_chans, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def cut(self, images):
        """images (B, C, H, W) -> x_p (B, N, P*P*C), the patches that E maps."""
        return patchify(images, self.proj.kernel_size[0])

    def forward(self, patches):
        E = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, C, P, P) -> (D, P*P*C)
        return F.linear(patches, E, self.proj.bias)


# --- The model -------------------------------------------------------------------------------


class ViT(nn.Module):
    """The Vision Transformer, ViT eq. 1-4: images (B, C, H, W) -> logits (B, classes).

    img_size     pixels, one number or (H, W); the patch size must divide both
    num_classes  0 leaves the head out: the output is then the image representation y (B, D)
    pool         "cls": y = LN(z_L⁰), eq. 4; "mean": LayerNorm of the mean over patch tokens (MAE's, appendix D.3)
    head         "linear": one layer that starts at zero (fine-tuning); "mlp": a tanh layer before it (pre-training)
    pos_embed    "learned" (or "1d"): one for each place, as in the paper; "sincos": fixed, as in MAE and HPM; "none"
    class_token  False leaves it out; only with pool="mean"
    dropout      after every dense layer but qkv, and after adding positions (appendix B.1)
    drop_path    stochastic depth, rising linearly from 0 at the first block to this at the last
    gelu         "exact", "tanh" or "quick", see `MLP`
    pre_norm     one more LayerNorm, before the first block (CLIP)
    eps          of all LayerNorms: 1e-6 in ViT, MAE and HPM, 1e-5 in CLIP
    fused        False writes attention out as eq. 6 and 7 instead of calling the fused kernel
    patch_embed  a module in place of `PatchEmbed`, with its two methods: what makes a hybrid

    Raises ValueError for a word that is none of these, and for sizes that do not fit each other.
    """

    def __init__(
        self, img_size=224, patch_size=16, in_chans=3, num_classes=1000, dim=768, depth=12, num_heads=12,
        mlp_ratio=4, pool="cls", head="linear", pos_embed="learned", class_token=True, dropout=0.0,
        drop_path=0.0, gelu="exact", pre_norm=False, eps=1e-6, fused=True, patch_embed=None,
    ):  # fmt: skip
        super().__init__()
        words = dict(pool=(pool, "cls mean"), head=(head, "linear mlp"), gelu=(gelu, "exact tanh quick none"))
        for option, (given, allowed) in (words | dict(pos_embed=(pos_embed, "learned sincos none 1d"))).items():
            if given not in allowed.split():
                raise ValueError(f"unknown {option} {given!r}; there are {', '.join(allowed.split())}")
        if pool == "cls" and not class_token:
            raise ValueError('pool="cls" needs the class token; use pool="mean" or class_token=True')
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.grid = patch_grid(*self.img_size, patch_size)  # (rows, columns)
        self.num_prefix_tokens = int(class_token)  # tokens before the patches
        self.patch_size, self.pool, self.dim = patch_size, pool, dim

        self.patch_embed = patch_embed or PatchEmbed(patch_size, in_chans, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        E_pos = torch.zeros(1, self.num_prefix_tokens + math.prod(self.grid), dim)
        if pos_embed == "sincos":
            E_pos = sincos_pos_embed(dim, self.grid, self.num_prefix_tokens)
        if pos_embed == "none":
            self.register_buffer("pos_embed", E_pos, persistent=False)  # zeros, in no checkpoint
        else:
            self.pos_embed = nn.Parameter(E_pos, requires_grad=pos_embed != "sincos")
        self.dropout = nn.Dropout(dropout)
        self.norm_pre = nn.LayerNorm(dim, eps) if pre_norm else nn.Identity()
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, dropout, r, gelu, fused, eps) for r in rates)
        self.norm = nn.LayerNorm(dim, eps) if pool == "cls" else nn.Identity()
        self.fc_norm = nn.LayerNorm(dim, eps) if pool == "mean" else nn.Identity()
        self.pre_logits = nn.Sequential()  # stays empty (the identity) for the linear head
        if head == "mlp":
            self.pre_logits.add_module("fc", nn.Linear(dim, dim))
            self.pre_logits.add_module("tanh", nn.Tanh())
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        init_weights(self)

    def embed(self, images, visible=None, corrupt=None):
        """ViT eq. 1: z_0 = [x_class; x_p¹E; …; x_p^N E] + E_pos, (B, C, H, W) -> (B, T, D).

        visible: indices (B, n) of the patches to embed; the others are left out (MAE's encoder). corrupt: a function
        that alters the patch tokens (B, n, D) before they get their positions (masked patch prediction).
        Raises ValueError, with both sizes, if the images do not have the size that the model was built for.
        """
        if images.shape[-2:] != self.img_size:
            sizes = "images are {}x{} pixels, the model was built for {}x{}".format(*images.shape[-2:], *self.img_size)
            raise ValueError(f"{sizes}; resize the images, or create the model with img_size=(height, width)")
        patches = self.patch_embed.cut(images)  # x_p, (B, N, P*P*C)
        positions = self.pos_embed[:, self.num_prefix_tokens :]  # (1, N, D)
        if visible is not None:
            patches = gather(patches, visible)  # (B, n, P*P*C)
            positions = gather(positions.expand(images.shape[0], -1, -1), visible)  # (B, n, D)
        z = self.patch_embed(patches)  # x_p E, (B, n, D)
        if corrupt is not None:
            z = corrupt(z)
        z = z + positions
        if self.cls_token is not None:
            x_class = self.cls_token + self.pos_embed[:, :1]  # (1, 1, D)
            z = torch.cat([x_class.expand(z.shape[0], -1, -1), z], dim=1)  # (B, 1 + n, D)
        return self.norm_pre(self.dropout(z))

    def encode(self, images, visible=None, inside=None, corrupt=None):
        """All tokens after the last block, z_L (B, T, D), through LN when pool="cls": eq. 1, then L times eq. 2, 3."""
        z = self.embed(images, visible, corrupt)
        if inside is not None:
            inside.update(z0=z, blocks=[{} for _ in self.blocks])
        for i, block in enumerate(self.blocks):
            z = block(z, None if inside is None else inside["blocks"][i])
        return self.norm(z)

    def represent(self, images, inside=None):
        """The image representation y (B, D), ViT eq. 4: y = LN(z_L⁰); with pool="mean", LN of the patches' mean."""
        z = self.encode(images, inside=inside)
        y = z[:, 0] if self.pool == "cls" else z[:, self.num_prefix_tokens :].mean(dim=1)
        return self.fc_norm(y)

    def forward(self, images, inside=None):
        """images (B, C, H, W) -> logits (B, classes).

        inside: an empty dict to fill with values on the way: z0, y, logits; in blocks[i] q, k, v, A, sa, z_prime, z.
        """
        y = self.represent(images, inside)
        logits = self.head(self.pre_logits(y))
        if inside is not None:
            inside.update(y=y, logits=logits)
        return logits


def gather(tokens, index):
    """Pick tokens by index, each image its own: (B, N, D), (B, n) -> (B, n, D)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


class Block(nn.Module):
    """One encoder layer, ViT eq. 2 and 3: z_{ℓ-1} (B, T, D) -> z_ℓ (B, T, D).

    LayerNorm comes before each branch (pre-norm); the residual path itself is never normalised.
    """

    def __init__(self, dim, num_heads, mlp_ratio=4, dropout=0.0, drop_path=0.0, gelu="exact", fused=True, eps=1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads, dropout, fused)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio), dropout, gelu)
        self.drop_path = DropPath(drop_path)

    def forward(self, z, inside=None):
        z_prime = self.drop_path(self.attn(self.norm1(z), inside)) + z  # eq. 2: z'_ℓ = MSA(LN(z_{ℓ-1})) + z_{ℓ-1}
        z = self.drop_path(self.mlp(self.norm2(z_prime))) + z_prime  # eq. 3: z_ℓ = MLP(LN(z'_ℓ)) + z'_ℓ
        if inside is not None:
            inside.update(z_prime=z_prime, z=z)
        return z


class MLP(nn.Module):
    """Two linear maps with a GELU between them, on every token alone: (B, T, D) -> (B, T, D).

    gelu: "exact" is x·Φ(x) (timm, MAE, HPM; "none" means the same). With weights that were trained so,
    equal outputs need their approximation: "tanh" (Google's JAX code) or "quick", x·σ(1.702 x) (CLIP).
    """

    def __init__(self, dim, hidden, dropout=0.0, gelu="exact"):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.gelu = "none" if gelu == "exact" else gelu  # torch's word: approximate="none"
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, z):
        h = self.fc1(z)  # (B, T, mlp_ratio * D)
        h = h * torch.sigmoid(1.702 * h) if self.gelu == "quick" else F.gelu(h, approximate=self.gelu)
        return self.dropout(self.fc2(self.dropout(h)))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, leave a whole branch out for an image.

    rate: probability of leaving it out, in [0, 1). Kept branches are scaled by 1 / (1 - rate), to the expected value.
    """

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, branch):
        if self.rate == 0.0 or not self.training:
            return branch
        keep = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.rate
        return branch * (keep / (1 - self.rate)).to(branch.dtype)


class Attention(nn.Module):
    """Multi-head self-attention, MSA(z), ViT eq. 5-8 (appendix A): (B, T, D) -> (B, T, D).

    `inside`: a dict to fill with q, k, v (B, k, T, D_h), A (B, k, T, T) and each head's SA.
    The fused kernel computes the same without ever storing A, so asking for A takes the plain path.
    Raises ValueError if the number of heads does not divide the width.
    """

    def __init__(self, dim, num_heads, dropout=0.0, fused=True):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} does not split into {num_heads} heads; use a divisor of {dim}")
        self.num_heads, self.fused = num_heads, fused
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, z, inside=None):
        B, T, D = z.shape
        qkv = self.qkv(z).reshape(B, T, 3, self.num_heads, -1)  # eq. 5: [q, k, v] = z U_qkv
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, k, T, D_h)
        if self.fused and inside is None:
            sa = F.scaled_dot_product_attention(q, k, v)  # eq. 6 and 7 at once
        else:
            A = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)  # eq. 6: A = softmax(q kᵀ / √D_h)
            sa = A @ v  # eq. 7: SA(z) = A v, (B, k, T, D_h)
            if inside is not None:
                inside.update(q=q, k=k, v=v, A=A, sa=sa)
        msa = self.proj(sa.transpose(1, 2).reshape(B, T, D))  # eq. 8: MSA(z) = [SA_1; …; SA_k] U_msa
        return self.dropout(msa)


# --- Positions -------------------------------------------------------------------------------


def resize_pos_embed(pos_embed, old_grid, new_grid, prefix=1, original=False):
    """Carry position embeddings to another grid by 2-D interpolation (ViT, section 3.2).

    A grid of positions is a small image with D channels, so it is resized like one. The class token has no place in
    the image: it is kept. `original` picks the ViT authors' bilinear mode, see `interpolation_matrix`.

    pos_embed (1, prefix + N, D), grids = (rows, columns) -> (1, prefix + N_new, D).
    Raises ValueError if pos_embed does not have prefix + rows * columns entries.
    """
    if pos_embed.shape[1] != prefix + math.prod(old_grid):
        wrong = f"{pos_embed.shape[1]} position embeddings are not {prefix} + {old_grid[0]}x{old_grid[1]}"
        raise ValueError(f"{wrong}; check old_grid and prefix")
    tokens, patches = pos_embed[:, :prefix], pos_embed[:, prefix:]
    image = patches.reshape(*old_grid, -1).double()  # (rows, columns, D)
    down = interpolation_matrix(old_grid[0], new_grid[0], original).to(image.device)
    along = interpolation_matrix(old_grid[1], new_grid[1], original).to(image.device)
    image = torch.einsum("rs,std,ct->rcd", down, image, along)  # (new rows, new columns, D)
    return torch.cat([tokens, image.reshape(1, math.prod(new_grid), -1).to(pos_embed)], dim=1)


def interpolation_matrix(old, new, original=False):
    """The linear map that resamples `old` points on a line to `new` points: (new, old) float64 (ViT, section 3.2).

    original=False  cubic convolution (Keys 1981, a = -1/2) about pixel centres, widened when shrinking so that
                    nothing is aliased. What timm runs today. (The official code of DeiT and MAE calls torch's
                    bicubic without antialias: a = -3/4, never widened.)
    original=True   linear, first and last points kept in place. What the ViT authors ran (scipy's zoom, order 1).
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


def sincos_pos_embed(dim, grid, prefix=1):
    """Fixed 2-D sine-cosine positions, used by MAE and HPM in place of learned ones.

    Half of the channels encode the column, half the row; each half is [sin(p·ω), cos(p·ω)]
    with ω_i = 10000^(-i / (D/4)), i = 0 … D/4 - 1 (Attention Is All You Need, section 3.5, in 2-D).

    dim D, grid (rows, columns) -> (1, prefix + N, D) float32, zeros for the prefix. Raises ValueError if D % 4 > 0.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, not {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (D/4)
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = torch.stack([column, row], dim=-1).reshape(-1, 2, 1) * omega  # (N, 2, D/4)
    embed = torch.cat([angles.sin(), angles.cos()], dim=-1).reshape(1, -1, dim)
    return F.pad(embed, (0, 0, prefix, 0)).float()


# --- Variants --------------------------------------------------------------------------------

# Table 1 (B, L, H) and, smaller, DeiT's Ti and S:  width, depth, heads.
SIZES = {"ti": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16)}
ARCHS = {
    f"vit_{size}{patch}": dict(patch_size=patch, dim=dim, depth=depth, num_heads=heads)
    for size, (dim, depth, heads) in SIZES.items()
    for patch in (8, 14, 16, 32)
}
MICRO = dict(depth=6, num_heads=4, mlp_ratio=2, pos_embed="sincos")  # ours: what learned most per minute of a laptop
ARCHS |= {"vit_micro4": dict(patch_size=4, dim=64, **MICRO), "vit_micro8": dict(patch_size=8, dim=96, **MICRO)}
ARCHS |= {"vit_micro7": dict(patch_size=7, dim=64, fused=False, **MICRO)}  # 17 tokens: a CPU is 1.4 times as fast so


def create(arch, img_size=224, num_classes=1000, in_chans=3, **options):
    """Build a model by its name in `ARCHS`: `vit_b16` is ViT-B/16.

    options: any argument of `ViT`; they win over the variant's own. Raises ValueError for an unknown name.
    """
    if arch not in ARCHS:
        near = difflib.get_close_matches(arch, ARCHS, n=1, cutoff=0)[0]
        raise ValueError(f"unknown arch {arch!r}; did you mean {near}? There are {', '.join(ARCHS)}")
    return ViT(img_size=img_size, num_classes=num_classes, in_chans=in_chans, **(ARCHS[arch] | options))


def init_weights(module):
    """How training starts: Xavier-uniform matrices, zero biases, N(0, 0.02²) positions and tokens, a head of zeros.

    U_qkv holds three D x D matrices; each is drawn for its own size, as in the ViT authors' code (MAE's and HPM's draw
    the three as one matrix, by √2 smaller). Their convolution and MLP biases start otherwise, from JAX's defaults.
    """
    for name, parameter in module.named_parameters():
        if name.endswith(("head.weight", "bias")):
            nn.init.zeros_(parameter)
        elif name.endswith("qkv.weight"):
            for matrix in parameter.chunk(3):
                nn.init.xavier_uniform_(matrix)
        elif name.endswith("weight") and parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter.flatten(1))  # a view, also of the convolution's weight
        elif name.endswith(("token", "pos_embed")) and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)


def load_weights(model, source, which="student", grid=None, classes=None):
    """Load a checkpoint, a file or a URL, into a model; returns sentences on what was adapted, left or not used.

    which "student" or "teacher", where the file holds both; grid (rows, columns) of its positions, if it does not say;
    classes: names, to keep the head that it has for them. Another image size or number of channels is no obstacle.
    Raises ValueError, and changes nothing, for a file that can't be read or does not fit. No code in it is ever run.
    """
    from engine import weights

    return weights.load(model, source, which, grid, classes)


def save_weights(model, path, layout="timm", classes=None):
    """Write a ViT's weights, the grid of its positions and the names of its classes as a .safetensors file.

    layout "timm": our own names too; timm.models.load_checkpoint takes it, with global_pool="token" for pool="cls" and
    "avg" for pool="mean" (its models have no "mlp" head any more). "hugging-face": for ViTForImageClassification of
    transformers with layer_norm_eps=1e-6, see `eps`, and hidden_act="gelu", or "gelu_pytorch_tanh" for gelu="tanh".
    Raises ValueError for a part that Hugging Face's model does not have, as the norm of pool="mean".
    """
    from engine import weights

    weights.write(model, path, layout, classes)


# --- Looking inside --------------------------------------------------------------------------


def attention_distance(A, grid, patch_size, prefix=1):
    """How far a head looks: the mean distance between a patch and what it attends to (figure 7).

    A (B, k, T, T), grid = (rows, columns), patch size in pixels -> (k,) in pixels: the distance between patch centres
    weighted by attention, averaged over query patches and images. The class token has no place in the image, so it is
    left out and the weights on the patches are normalised again.
    """
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    centres = patch_size * torch.stack([row, column], dim=-1).reshape(-1, 2).to(A)  # (N, 2) pixels
    distance = (centres[:, None] - centres).norm(dim=-1)  # (N, N)
    weights = A[:, :, prefix:, prefix:]
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return (weights * distance).sum(dim=-1).mean(dim=(0, 2))


def attention_rollout(attentions):
    """How much of each input token reaches each output token (figure 6; Abnar & Zuidema 2020).

    attentions: A of every block in order, each (B, k, T, T) -> (B, T, T); rows are outputs and sum to 1. Heads are
    averaged; the residual path, which carries a token past attention unchanged, counts as attention to itself:
    (A + I) / 2. The layers then multiply.
    """
    identity = rollout = torch.eye(attentions[0].shape[-1]).to(attentions[0])  # (T, T)
    for A in attentions:
        rollout = (A.mean(dim=1) + identity) / 2 @ rollout
    return rollout


def pos_embed_similarity(pos_embed, grid, prefix=1):
    """Cosine similarity of every position embedding with every other (figure 7, centre).

    pos_embed (1, prefix + N, D) -> (rows, columns, rows, columns); [r, c] is the map of position (r, c).
    """
    unit = F.normalize(pos_embed[0, prefix:], dim=-1)  # (N, D)
    return (unit @ unit.T).reshape(*grid, *grid)
