"""The position variants of ViT's appendix D.4, beside those of vit.py: learned in 2-D, and relative ones.

    2d        z_0 gets D/2 channels for a patch's column and D/2 for its row, each learned
    relative  nothing is added to z_0; in every attention, the offset between two tokens has a learned embedding

`replace(model, kind)` gives a `vit.ViT` other positions in place, and changes nothing else of it.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

import vit

KINDS = ("2d", "relative")


def replace(model, kind):
    """Give a ViT built with pos_embed="none" positions of this kind, drawn from N(0, 0.02²); in place.

    The model's class, or that of its attentions, becomes the variant's: what else it holds stays as it is.
    Raises ValueError for an unknown kind, for a model that has positions already, and in 2-D for an odd width.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown positions {kind!r}; there are {', '.join(KINDS)}")
    none = "pos_embed" in dict(model.named_buffers())  # learned and fixed ones are parameters
    if not none or isinstance(model.blocks[0].attn, RelativeAttention):
        raise ValueError('the model has positions already; create it with pos_embed="none"')
    if kind == "relative":
        for block in model.blocks:
            block.attn.relative = RelativePositions(model.pos_embed.shape[1], model.dim // block.attn.num_heads)
            block.attn.__class__ = RelativeAttention
            vit.init_weights(block.attn.relative)
        return
    if model.dim % 2:
        raise ValueError(f"2-D positions need a width that splits in two halves, not {model.dim}")
    rows, columns = model.grid
    del model.pos_embed
    model.column_pos_embed = nn.Parameter(torch.randn(1, columns, model.dim // 2) * 0.02)
    model.row_pos_embed = nn.Parameter(torch.randn(1, rows, model.dim // 2) * 0.02)
    model.__class__ = ViT2D


class ViT2D(vit.ViT):
    """A ViT whose E_pos is put together from a table of columns and one of rows (appendix D.4, 2-D)."""

    @property
    def pos_embed(self):
        """E_pos (1, prefix + N, D): half of the channels say the column, half the row; zeros for the class token."""
        rows, columns = self.grid
        column = self.column_pos_embed[:, None].expand(-1, rows, -1, -1)  # (1, rows, columns, D/2)
        row = self.row_pos_embed[:, :, None].expand(-1, -1, columns, -1)
        return F.pad(torch.cat([column, row], dim=-1).flatten(1, 2), (0, 0, self.num_prefix_tokens, 0))


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


class RelativeAttention(vit.Attention):
    """ViT eq. 5-8 with the embeddings of offsets in eq. 6: A = softmax(q (k + r)ᵀ / √D_h)."""

    def forward(self, z, inside=None):
        B, T, D = z.shape
        q, k, v = self.qkv(z).reshape(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, k, T, D_h)
        bias = self.relative(q)  # (B, k, T, T)
        if self.fused and inside is None:
            sa = F.scaled_dot_product_attention(q, k, v, bias)
        else:
            A = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias).softmax(dim=-1)  # (B, k, T, T)
            sa = A @ v  # (B, k, T, D_h)
            if inside is not None:
                inside.update(q=q, k=k, v=v, A=A, sa=sa)
        return self.dropout(self.proj(sa.transpose(1, 2).reshape(B, T, D)))
