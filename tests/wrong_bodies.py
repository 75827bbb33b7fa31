"""Plausible wrong answers to every exercise, none of which may pass its tests.

For each exercise: a sound answer; and wrong ones: what is wrong, then pieces of the sound answer, each of which is
there once, and what stands in their places, or the whole function. Sound or wrong, nothing here depends on how the real
code is written, only on the interface that it is written for. A method stands without its class.
"""

WRONG_BODIES = {}

WRONG_BODIES["patchify"] = (
    """
    def patchify(images, patch_size):
        B, C, H, W = images.shape
        P = patch_size
        rows, columns = patch_grid(H, W, P)
        x = images.reshape(B, C, rows, P, columns, P)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(B, rows * columns, P * P * C)
    """,
    {
        "rows and columns of patches swapped": ("0, 2, 4, 3, 5, 1", "0, 4, 2, 3, 5, 1"),
        "pixels column by column": ("0, 2, 4, 3, 5, 1", "0, 2, 4, 5, 3, 1"),
        "the channel first": ("0, 2, 4, 3, 5, 1", "0, 2, 4, 1, 3, 5"),
        "not permuted": ("x.permute(0, 2, 4, 3, 5, 1)", "x"),
        "a rest is cut off": (
            "rows, columns = patch_grid(H, W, P)",
            "rows, columns = H // P, W // P; images = images[:, :, : rows * P, : columns * P]",
        ),
        "a rest below is cut off": (
            "rows, columns = patch_grid(H, W, P)",
            "rows, columns = patch_grid(H // P * P, W, P); images = images[:, :, : rows * P]",
        ),
        "a rest on the right is cut off": (
            "rows, columns = patch_grid(H, W, P)",
            "rows, columns = patch_grid(H, W // P * P, P); images = images[..., : columns * P]",
        ),
        "for 3 channels alone": ("P * P * C)", "P * P * 3)"),
        "for square images alone": ("rows, columns = patch_grid(H, W, P)", "rows, columns = patch_grid(H, H, P)"),
        "one image loses its axis": ("P * P * C)", "P * P * C).squeeze(0)"),
        "one patch loses its axis": ("P * P * C)", "P * P * C).squeeze()"),
        "the longer side taken for the columns": (
            "rows, columns = patch_grid(H, W, P)",
            "rows, columns = sorted(patch_grid(H, W, P))",
        ),
    },
)

WRONG_BODIES["unpatchify"] = (
    """
    def unpatchify(patches, patch_size, grid):
        B, N, length = patches.shape
        P = patch_size
        rows, columns = grid
        if N != rows * columns:
            raise ValueError("the patches do not fill the grid")
        x = patches.reshape(B, rows, columns, P, P, length // P**2)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, length // P**2, rows * P, columns * P)
    """,
    {
        "pixels column by column": ("0, 5, 1, 3, 2, 4", "0, 5, 1, 4, 2, 3"),
        "rows and columns of patches swapped": ("0, 5, 1, 3, 2, 4", "0, 5, 2, 3, 1, 4"),
        "the grid turned": ("rows, columns = grid", "columns, rows = grid"),
        "the channel taken for a pixel": ("P, P, length // P**2)", "length // P**2, P, P)"),
        "more patches than the grid has accepted": (
            "if N != rows * columns:",
            "patches, N = patches[:, : rows * columns], min(N, rows * columns)\n        if N != rows * columns:",
        ),
        "the rest of the grid left black": (
            "if N != rows * columns:",
            "if N < rows * columns:\n            patches = F.pad(patches, (0, 0, 0, rows * columns - N))\n"
            "        elif N > rows * columns:",
        ),
        "for 3 channels alone": ("columns, P, P, length // P**2)", "columns, P, P, 3)"),
        "for 3 channels alone, others cut off": (
            "patches.reshape(B, rows, columns, P, P, length // P**2)",
            "patches.reshape(B, rows, columns, P, P, length // P**2)[..., :3]",
            "reshape(B, length // P**2, rows",
            "reshape(B, -1, rows",
        ),
        "one image loses its axis": ("rows * P, columns * P)", "rows * P, columns * P).squeeze(0)"),
        "one channel loses its axis": ("rows * P, columns * P)", "rows * P, columns * P).squeeze(1)"),
        "a square grid assumed": ("rows, columns = grid", "rows, columns = grid; rows = columns = math.isqrt(N)"),
        "the longer side taken for the columns": ("rows, columns = grid", "rows, columns = sorted(grid)"),
        "the longer side taken for the rows": ("rows, columns = grid", "columns, rows = sorted(grid)"),
    },
)

WRONG_BODIES["PatchEmbed.forward"] = (
    """
    def forward(self, patches):
        E = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches, E, self.proj.bias)
    """,
    {
        "the channel first": ("permute(0, 2, 3, 1)", "permute(0, 1, 2, 3)"),
        "pixels column by column": ("permute(0, 2, 3, 1)", "permute(0, 3, 2, 1)"),
        "no bias": (", self.proj.bias)", ")"),
        "the bias twice": (", self.proj.bias)", ", 2 * self.proj.bias)"),
        "one image loses its axis": (", self.proj.bias)", ", self.proj.bias).squeeze(0)"),
        "one patch loses its axis": (", self.proj.bias)", ", self.proj.bias).squeeze(1)"),
        "for 3 channels alone": ("patches, E", "patches[..., : 3 * self.proj.kernel_size[0] ** 2], E"),
        "the weights cut off from their gradient": ("self.proj.weight.permute", "self.proj.weight.detach().permute"),
    },
)

WRONG_BODIES["ViT.embed"] = (
    """
    def embed(self, images, visible=None, corrupt=None):
        if tuple(images.shape[-2:]) != tuple(self.img_size):
            raise ValueError(f"images of {images.shape[-2:]} pixels, the model has {self.img_size}")
        patches = self.patch_embed.cut(images)
        E_pos = self.pos_embed
        positions = E_pos[:, self.num_prefix_tokens :]
        if visible is not None:
            patches = gather(patches, visible)
            positions = gather(positions.expand(len(images), -1, -1), visible)
        z = self.patch_embed(patches)
        if corrupt is not None:
            z = corrupt(z)
        z = z + positions
        if self.cls_token is not None:
            x_class = self.cls_token + E_pos[:, :1]
            z = torch.cat([x_class.expand(len(z), -1, -1).to(z.dtype), z], dim=1)
        return self.norm_pre(self.dropout(z))
    """,
    {
        "the class token has no position": ("self.cls_token + E_pos[:, :1]", "self.cls_token"),
        "the class token at the end": (
            "[x_class.expand(len(z), -1, -1).to(z.dtype), z]",
            "[z, x_class.expand(len(z), -1, -1)]",
        ),
        "no class token where patches are left out": (
            "if self.cls_token is not None:",
            "if self.cls_token is not None and visible is None:",
        ),
        "the class token's position for the first patch": (
            "E_pos[:, self.num_prefix_tokens :]",
            "E_pos[:, : math.prod(self.grid)]",
        ),
        "the first patch's position taken for a class token": ("E_pos[:, self.num_prefix_tokens :]", "E_pos[:, 1:]"),
        "positions in place of those of the visible patches": (
            "gather(positions.expand(len(images), -1, -1), visible)",
            "positions[:, : visible.shape[1]]",
        ),
        "the positions of the first image's patches for all": (
            "gather(positions.expand(len(images), -1, -1), visible)",
            "positions[:, visible[0]]",
        ),
        "the visible patches in the image's order": (
            "if visible is not None:",
            "if visible is not None:\n            visible = visible.sort(dim=1).values",
        ),
        "the hidden patches set to 0 and kept": (
            "patches = gather(patches, visible)",
            "kept = torch.zeros(patches.shape[:2], dtype=torch.bool).scatter(1, visible, True)\n"
            "            patches = patches * kept[..., None]",
            "positions = gather(positions.expand(len(images), -1, -1), visible)",
            "pass",
        ),
        "all patches, whatever is visible": ("if visible is not None:", "if False:"),
        "no positions": ("z = z + positions", "z = z + 0 * positions"),
        "positions added twice": ("z = z + positions", "z = z + 2 * positions"),
        "patches changed after the positions": (
            "if corrupt is not None:\n            z = corrupt(z)\n        z = z + positions",
            "z = z + positions\n        if corrupt is not None:\n            z = corrupt(z)",
        ),
        "the class token changed too": (
            "        if corrupt is not None:\n            z = corrupt(z)\n",
            "",
            "dim=1)\n        return",
            "dim=1)\n        z = corrupt(z) if corrupt else z\n        return",
        ),
        "pixels changed in place of tokens": (
            "z = self.patch_embed(patches)\n        if corrupt is not None:\n            z = corrupt(z)",
            "z = self.patch_embed(corrupt(patches) if corrupt else patches)",
        ),
        "nothing changed": ("if corrupt is not None:", "if False:"),
        "nothing changed where patches are left out": (
            "if corrupt is not None:",
            "if corrupt is not None and visible is None:",
        ),
        "no dropout": ("self.dropout(z)", "z"),
        "dropout before the positions": (
            "z = z + positions",
            "z = self.dropout(z) + positions",
            "self.norm_pre(self.dropout(z))",
            "self.norm_pre(z)",
        ),
        "dropout of the patches alone": (
            "z = z + positions",
            "z = self.dropout(z + positions)",
            "self.norm_pre(self.dropout(z))",
            "self.norm_pre(z)",
        ),
        "no norm_pre": ("self.norm_pre(self.dropout(z))", "self.dropout(z)"),
        "norm_pre before the positions": (
            "z = z + positions",
            "z = self.norm_pre(z) + positions",
            "self.norm_pre(self.dropout(z))",
            "self.dropout(z)",
        ),
        "any size with as many pixels accepted": (
            "if tuple(images.shape[-2:]) != tuple(self.img_size):",
            "if images[0, 0].numel() != math.prod(self.img_size):",
        ),
        "any width accepted": (
            "if tuple(images.shape[-2:]) != tuple(self.img_size):",
            "images = images[..., : self.img_size[1]]\n        if images.shape[-2] != self.img_size[0]:",
        ),
        "one image loses its axis": (
            "return self.norm_pre(self.dropout(z))",
            "return self.norm_pre(self.dropout(z)).squeeze(0)",
        ),
        "positions cut off from their gradient": ("E_pos = self.pos_embed", "E_pos = self.pos_embed.detach()"),
        "the class token cut off from its gradient": (
            "x_class = self.cls_token +",
            "x_class = self.cls_token.detach() +",
        ),
    },
)

WRONG_BODIES["Attention.forward"] = (
    """
    def forward(self, z, inside=None):
        B, T, D = z.shape
        qkv = self.qkv(z).reshape(B, T, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.fused and inside is None:
            sa = F.scaled_dot_product_attention(q, k, v)
        else:
            A = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
            sa = A @ v
            if inside is not None:
                inside.update(q=q, k=k, v=v, A=A, sa=sa)
        msa = self.proj(sa.transpose(1, 2).reshape(B, T, D))
        return self.dropout(msa)
    """,
    {
        "no scale": (" / math.sqrt(q.shape[-1])", ""),
        "the scale not under a root": ("math.sqrt(q.shape[-1])", "q.shape[-1]"),
        "the scale of D in place of D_h": ("math.sqrt(q.shape[-1])", "math.sqrt(D)"),
        "the scale of the kernel changed": (
            "scaled_dot_product_attention(q, k, v)",
            "scaled_dot_product_attention(q, k, v, scale=1.0)",
        ),
        "the scale twice in the kernel's path": (
            "scaled_dot_product_attention(q, k, v)",
            "scaled_dot_product_attention(q / math.sqrt(q.shape[-1]), k, v)",
        ),
        "only what came before is seen": (
            "scaled_dot_product_attention(q, k, v)",
            "scaled_dot_product_attention(q, k, v, is_causal=True)",
        ),
        "softmax over the queries": ("softmax(dim=-1)", "softmax(dim=-2)"),
        "softmax over the heads": ("softmax(dim=-1)", "softmax(dim=1)"),
        "a sigmoid for each pair": (".softmax(dim=-1)", ".sigmoid()"),
        "queries and keys swapped": ("q @ k.transpose(-2, -1)", "k @ q.transpose(-2, -1)"),
        "keys and values swapped": ("q, k, v = qkv", "q, v, k = qkv"),
        "queries and keys swapped in U_qkv": ("q, k, v = qkv", "k, q, v = qkv"),
        "heads interleaved": ("3, self.num_heads, -1)", "3, -1, self.num_heads).transpose(-2, -1)"),
        "q, k and v of each head side by side": (
            "reshape(B, T, 3, self.num_heads, -1)",
            "reshape(B, T, self.num_heads, 3, -1).transpose(2, 3)",
        ),
        "heads joined before the token's axis is back in front": (
            "sa.transpose(1, 2).reshape(B, T, D)",
            "sa.reshape(B, T, D)",
        ),
        "heads joined, interleaved": ("sa.transpose(1, 2).reshape(B, T, D)", "sa.permute(0, 2, 3, 1).reshape(B, T, D)"),
        "heads averaged": (
            "sa.transpose(1, 2).reshape(B, T, D)",
            "sa.mean(1, keepdim=True).expand_as(sa).transpose(1, 2).reshape(B, T, D)",
        ),
        "A transposed": ("sa = A @ v", "sa = A.transpose(-2, -1) @ v"),
        "no U_msa": ("self.proj(sa.transpose(1, 2).reshape(B, T, D))", "sa.transpose(1, 2).reshape(B, T, D)"),
        "no bias of U_msa": (
            "self.proj(sa.transpose(1, 2).reshape(B, T, D))",
            "F.linear(sa.transpose(1, 2).reshape(B, T, D), self.proj.weight)",
        ),
        "no bias of U_qkv": ("self.qkv(z)", "F.linear(z, self.qkv.weight)"),
        "no bias of U_qkv in the kernel's path": (
            "self.qkv(z)",
            "(F.linear(z, self.qkv.weight) if self.fused and inside is None else self.qkv(z))",
        ),
        "no bias of U_msa in the kernel's path": (
            "return self.dropout(msa)",
            "return self.dropout(msa - self.proj.bias if self.fused and inside is None else msa)",
        ),
        "no dropout": ("self.dropout(msa)", "msa"),
        "no dropout in the kernel's path": (
            "self.dropout(msa)",
            "msa if self.fused and inside is None else self.dropout(msa)",
        ),
        "no dropout in the written path": (
            "self.dropout(msa)",
            "self.dropout(msa) if self.fused and inside is None else msa",
        ),
        "dropout on qkv too": ("self.qkv(z).reshape", "self.dropout(self.qkv(z)).reshape"),
        "dropout of A in the kernel": (
            "scaled_dot_product_attention(q, k, v)",
            "scaled_dot_product_attention(q, k, v, dropout_p=self.dropout.p if self.training else 0.0)",
        ),
        "dropout of A where it is written out": ("sa = A @ v", "sa = self.dropout(A) @ v"),
        "dropout before U_msa": (
            "self.proj(sa.transpose(1, 2).reshape(B, T, D))",
            "self.proj(self.dropout(sa.transpose(1, 2).reshape(B, T, D)))",
            "return self.dropout(msa)",
            "return msa",
        ),
        "dropout in evaluation too": ("self.dropout(msa)", "F.dropout(msa, self.dropout.p)"),
        "a residual inside": ("return self.dropout(msa)", "return self.dropout(msa) + z"),
        "heads not told apart": ("A=A, sa=sa", "A=A.mean(dim=1), sa=sa"),
        "logits in the place of A": ("A=A, sa=sa", "A=q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), sa=sa"),
        "heads joined in the place of each head's SA": ("sa=sa)", "sa=sa.transpose(1, 2).reshape(B, T, D))"),
        "q inside with its scale": ("inside.update(q=q,", "inside.update(q=q / math.sqrt(q.shape[-1]),"),
        "nothing inside where the kernel can run": ("if self.fused and inside is None:", "if self.fused:"),
        "one image loses its axis": ("return self.dropout(msa)", "return self.dropout(msa).squeeze(0)"),
        "one token loses its axis": ("return self.dropout(msa)", "return self.dropout(msa).squeeze(1)"),
        "keys cut off from their gradient": (
            "q, k, v = qkv.permute(2, 0, 3, 1, 4)",
            "q, k, v = qkv.permute(2, 0, 3, 1, 4)\n        k = k.detach()",
        ),
        "two heads whatever is asked for": ("3, self.num_heads, -1)", "3, 2, -1)"),
        "heads of width 4 whatever is asked for": ("3, self.num_heads, -1)", "3, -1, 4)"),
    },
)

WRONG_BODIES["MLP.forward"] = (
    """
    def forward(self, z):
        h = self.fc1(z)
        if self.gelu == "quick":
            h = h * torch.sigmoid(1.702 * h)
        else:
            h = F.gelu(h, approximate="tanh" if self.gelu == "tanh" else "none")
        return self.dropout(self.fc2(self.dropout(h)))
    """,
    {
        "the exact GELU always": ('"tanh" if self.gelu == "tanh" else "none"', '"none"'),
        "the tanh formula always": ('"tanh" if self.gelu == "tanh" else "none"', '"tanh"'),
        "ReLU": ('F.gelu(h, approximate="tanh" if self.gelu == "tanh" else "none")', "F.relu(h)"),
        "SiLU for quick": ("1.702 * h", "h"),
        "quick for tanh": ('self.gelu == "quick"', 'self.gelu in ("quick", "tanh")'),
        "tanh for quick": ("h * torch.sigmoid(1.702 * h)", 'F.gelu(h, approximate="tanh")'),
        "no activation": ('F.gelu(h, approximate="tanh" if self.gelu == "tanh" else "none")', "h"),
        "no dropout after the second map": ("self.dropout(self.fc2(self.dropout(h)))", "self.fc2(self.dropout(h))"),
        "no dropout after the first map": ("self.fc2(self.dropout(h))", "self.fc2(h)"),
        "dropout before the activation": (
            "h = self.fc1(z)",
            "h = self.dropout(self.fc1(z))",
            "self.fc2(self.dropout(h))",
            "self.fc2(h)",
        ),
        "dropout of its input too": ("self.fc1(z)", "self.fc1(self.dropout(z))"),
        "dropout in evaluation too": (
            "self.dropout(self.fc2(self.dropout(h)))",
            "F.dropout(self.fc2(F.dropout(h, self.dropout.p)), self.dropout.p)",
        ),
        "a residual inside": ("self.dropout(self.fc2(self.dropout(h)))", "self.dropout(self.fc2(self.dropout(h))) + z"),
        "fc1 cut off from its gradient": ("h = self.fc1(z)", "h = self.fc1(z).detach()"),
    },
)

WRONG_BODIES["Block.forward"] = (
    """
    def forward(self, z, inside=None):
        z_prime = self.drop_path(self.attn(self.norm1(z), inside)) + z
        out = self.drop_path(self.mlp(self.norm2(z_prime))) + z_prime
        if inside is not None:
            inside.update(z_prime=z_prime, z=out)
        return out
    """,
    {
        "LayerNorm after the branch": ("self.attn(self.norm1(z), inside)", "self.norm1(self.attn(z, inside))"),
        "LayerNorm on the residual path": (
            "self.drop_path(self.attn(self.norm1(z), inside)) + z",
            "self.drop_path(self.attn(self.norm1(z), inside)) + self.norm1(z)",
        ),
        "post-norm, as in Attention Is All You Need": (
            "self.drop_path(self.attn(self.norm1(z), inside)) + z",
            "self.norm1(self.drop_path(self.attn(z, inside)) + z)",
        ),
        "both branches read z": ("self.norm2(z_prime)", "self.norm2(z)"),
        "eq. 3 adds z": ("+ z_prime", "+ z"),
        "no residual in eq. 2": (
            "self.drop_path(self.attn(self.norm1(z), inside)) + z",
            "self.drop_path(self.attn(self.norm1(z), inside))",
        ),
        "no residual in eq. 3": (" + z_prime", ""),
        "norm1 twice": ("self.norm2(", "self.norm1("),
        "the branches in the other order": (
            "self.attn(self.norm1(z), inside)",
            "self.mlp(self.norm1(z))",
            "self.mlp(self.norm2(z_prime))",
            "self.attn(self.norm2(z_prime), inside)",
        ),
        "drop_path of the sum": (
            "self.drop_path(self.attn(self.norm1(z), inside)) + z",
            "self.drop_path(self.attn(self.norm1(z), inside) + z)",
        ),
        "no drop_path in eq. 2": (
            "self.drop_path(self.attn(self.norm1(z), inside))",
            "self.attn(self.norm1(z), inside)",
        ),
        "no drop_path in eq. 3": ("self.drop_path(self.mlp(self.norm2(z_prime)))", "self.mlp(self.norm2(z_prime))"),
        "both branches dropped together": (
            "z_prime = self.drop_path(self.attn(self.norm1(z), inside)) + z",
            "z_prime = self.attn(self.norm1(z), inside) + z",
            "self.drop_path(self.mlp(self.norm2(z_prime))) + z_prime",
            "z + self.drop_path(self.mlp(self.norm2(z_prime)) + z_prime - z)",
        ),
        "inside not passed on": ("self.norm1(z), inside)", "self.norm1(z))"),
        "inside gets z for z'": ("z_prime=z_prime", "z_prime=z"),
        "inside gets z' for z": ("z=out", "z=z_prime"),
        "inside gets the z that came in": ("z=out", "z=z"),
        "inside without the result": ("inside.update(z_prime=z_prime, z=out)", "inside.update(z_prime=z_prime)"),
        "the residual cut off from its gradient": ("+ z_prime", "+ z_prime.detach()"),
    },
)

WRONG_BODIES["ViT.represent"] = (
    """
    def represent(self, images, inside=None):
        z = self.encode(images, inside=inside)
        if self.pool == "cls":
            y = z[:, 0]
        else:
            y = z[:, self.num_prefix_tokens :].mean(dim=1)
        return self.fc_norm(y)
    """,
    {
        "the last token": ("z[:, 0]", "z[:, -1]"),
        "the class token in the mean": ("z[:, self.num_prefix_tokens :]", "z"),
        "the first patch taken for a class token": ("self.num_prefix_tokens :", "1:"),
        "the largest in place of the mean": ("mean(dim=1)", "amax(dim=1)"),
        "the mean over the width": ("mean(dim=1)", "mean(dim=2)"),
        "no LayerNorm of the mean": ("self.fc_norm(y)", "y"),
        "LayerNorm before the mean": (
            "z[:, self.num_prefix_tokens :].mean",
            "self.fc_norm(z)[:, self.num_prefix_tokens :].mean",
            "return self.fc_norm(y)",
            "return y",
        ),
        "LayerNorm twice": ("y = z[:, 0]", "y = self.norm(z[:, 0])"),
        "always the class token": ('if self.pool == "cls"', "if self.num_prefix_tokens"),
        "always the mean": ('if self.pool == "cls"', "if False"),
        "inside not passed on": ("self.encode(images, inside=inside)", "self.encode(images)"),
        "one image loses its axis": ("self.fc_norm(y)", "self.fc_norm(y).squeeze()"),
        "cut off from the gradient": ("return self.fc_norm(y)", "return self.fc_norm(y.detach())"),
    },
)

WRONG_BODIES["interpolation_matrix"] = (
    """
    def interpolation_matrix(old, new, original=False):
        if original:
            centres, stretch = torch.linspace(0, old - 1, new, dtype=torch.float64), 1.0
        else:
            centres = (torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5
            stretch = max(1.0, old / new)
        d = (centres[:, None] - torch.arange(old)).abs() / stretch
        if original:
            weights = (1 - d).clamp(min=0)
        else:
            near, far = (1.5 * d - 2.5) * d**2 + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
            weights = torch.where(d < 1, near, torch.where(d < 2, far, torch.zeros_like(d)))
        return weights / weights.sum(dim=1, keepdim=True)
    """,
    {
        "corners in place of pixel centres": (
            "(torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5",
            "torch.arange(new, dtype=torch.float64) * old / new",
        ),
        "both ends kept in the cubic one too": (
            "(torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5",
            "torch.linspace(0, old - 1, new, dtype=torch.float64)",
        ),
        "not widened to shrink": ("max(1.0, old / new)", "1.0"),
        "narrowed to enlarge": ("max(1.0, old / new)", "old / new"),
        "the linear one widened too": (
            "torch.linspace(0, old - 1, new, dtype=torch.float64), 1.0",
            "torch.linspace(0, old - 1, new, dtype=torch.float64), max(1.0, old / new)",
        ),
        "a = -3/4": (
            "(1.5 * d - 2.5) * d**2 + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2",
            "(1.25 * d - 2.25) * d**2 + 1, ((-0.75 * d + 3.75) * d - 6) * d + 3",
        ),
        "linear in place of cubic": (
            "weights = torch.where(d < 1, near, torch.where(d < 2, far, torch.zeros_like(d)))",
            "weights = (1 - d).clamp(min=0)",
        ),
        "the outer piece missing": ("torch.where(d < 2, far, torch.zeros_like(d))", "torch.zeros_like(d)"),
        "negative weights cut off": ("return weights", "weights = weights.clamp(min=0)\n        return weights"),
        "rows not normalised": (" / weights.sum(dim=1, keepdim=True)", ""),
        "columns normalised": ("weights.sum(dim=1, keepdim=True)", "weights.sum(dim=0, keepdim=True)"),
        "the border's point repeated beyond it": (
            "return weights / weights.sum(dim=1, keepdim=True)",
            "weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=stretch)\n"
            "        weights[:, 0] += 1 - weights.sum(dim=1)\n"
            "        return weights",
        ),
        "the last point not kept": (
            "torch.linspace(0, old - 1, new, dtype=torch.float64)",
            "torch.arange(new, dtype=torch.float64) * old / new",
        ),
        "the nearest in place of linear": ("(1 - d).clamp(min=0)", "(d <= 0.5).double()"),
        "float32": (
            "return weights / weights.sum(dim=1, keepdim=True)",
            "return (weights / weights.sum(dim=1, keepdim=True)).float()",
        ),
        "old and new swapped": (
            "return weights / weights.sum(dim=1, keepdim=True)",
            "return (weights / weights.sum(dim=1, keepdim=True)).T",
        ),
    },
)

WRONG_BODIES["resize_pos_embed"] = (
    """
    def resize_pos_embed(pos_embed, old_grid, new_grid, prefix=1, original=False):
        if pos_embed.shape[1] != prefix + math.prod(old_grid):
            raise ValueError("the positions do not fill the old grid")
        if tuple(old_grid) == tuple(new_grid):
            return pos_embed
        tokens, patches = pos_embed[:, :prefix], pos_embed[:, prefix:]
        image = patches.reshape(*old_grid, -1).double()
        down = interpolation_matrix(old_grid[0], new_grid[0], original).to(image.device)
        along = interpolation_matrix(old_grid[1], new_grid[1], original).to(image.device)
        image = torch.einsum("rs,std,ct->rcd", down, image, along)
        return torch.cat([tokens, image.reshape(1, math.prod(new_grid), -1).to(pos_embed)], dim=1)
    """,
    {
        "the class token interpolated with the grid": (
            "pos_embed[:, :prefix], pos_embed[:, prefix:]",
            "pos_embed[:, pos_embed.shape[1] - prefix :], pos_embed[:, : pos_embed.shape[1] - prefix]",
        ),
        "the class token lost": ("torch.cat([tokens, ", "torch.cat([tokens[:, :0], "),
        "the class token at the end": (
            "[tokens, image.reshape(1, math.prod(new_grid), -1).to(pos_embed)]",
            "[image.reshape(1, math.prod(new_grid), -1).to(pos_embed), tokens]",
        ),
        "one token always": (
            "pos_embed[:, :prefix], pos_embed[:, prefix:]",
            "pos_embed[:, :1], pos_embed[:, 1:]",
        ),
        "rows and columns swapped": ("reshape(*old_grid, -1)", "reshape(*old_grid[::-1], -1).transpose(0, 1)"),
        "one matrix for both axes": ("interpolation_matrix(old_grid[1], new_grid[1], original)", "down"),
        "a grid with as many patches left alone": (
            "tuple(old_grid) == tuple(new_grid)",
            "math.prod(old_grid) == math.prod(new_grid)",
        ),
        "the rows alone": (
            "interpolation_matrix(old_grid[1], new_grid[1], original)",
            "torch.eye(*new_grid[1:2], old_grid[1]).double()",
        ),
        "original not passed on": ("new_grid[0], original)", "new_grid[0])", "new_grid[1], original)", "new_grid[1])"),
        "original not passed on for columns": ("new_grid[1], original)", "new_grid[1])"),
        "always original": (
            "new_grid[0], original)",
            "new_grid[0], True)",
            "new_grid[1], original)",
            "new_grid[1], True)",
        ),
        "another data type": (".to(pos_embed)", ""),
        "too many positions accepted": ("!= prefix + math.prod(old_grid)", "< prefix + math.prod(old_grid)"),
        "too few positions accepted": (
            "if pos_embed.shape[1] != prefix + math.prod(old_grid):",
            "missing = prefix + math.prod(old_grid) - pos_embed.shape[1]\n"
            "        pos_embed = F.pad(pos_embed, (0, 0, 0, max(0, missing)))\n"
            "        if missing < 0:",
        ),
        "the longer side taken for the columns": ("reshape(*old_grid, -1)", "reshape(*sorted(old_grid), -1)"),
        "not widened to shrink": (
            'image = torch.einsum("rs,std,ct->rcd", down, image, along)',
            'image = F.interpolate(image.permute(2, 0, 1)[None], new_grid, mode="bicubic")[0].permute(1, 2, 0)',
        ),
    },
)

WRONG_BODIES["sincos_pos_embed"] = (
    """
    def sincos_pos_embed(dim, grid, prefix=1):
        if dim % 4:
            raise ValueError("the width is no multiple of 4")
        rows, columns = grid
        omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        angles = torch.stack([column, row], dim=-1).reshape(-1, 2, 1) * omega
        embed = torch.cat([angles.sin(), angles.cos()], dim=-1).reshape(1, -1, dim)
        return F.pad(embed, (0, 0, prefix, 0)).float()
    """,
    {
        "rows before columns": ("[column, row]", "[row, column]"),
        "cosines before sines": ("[angles.sin(), angles.cos()]", "[angles.cos(), angles.sin()]"),
        "sines alone": ("[angles.sin(), angles.cos()]", "[angles.sin(), angles.sin()]"),
        "interleaved": ("torch.cat([angles.sin(), angles.cos()]", "torch.stack([angles.sin(), angles.cos()]"),
        "frequencies of the whole width": ("torch.float64) / (dim // 4)", "torch.float64) / (dim // 2)"),
        "the last frequency exactly 1/10000": ("torch.float64) / (dim // 4)", "torch.float64) / max(1, dim // 4 - 1)"),
        "1000 in place of 10000": ("10000.0", "1000.0"),
        "counted from 1": ("torch.arange(rows)", "torch.arange(1, rows + 1)"),
        "from 0 to 1 over the grid": ("reshape(-1, 2, 1) * omega", "reshape(-1, 2, 1) / max(grid) * omega"),
        "patches column by column": ('indexing="ij"', 'indexing="xy"'),
        "one dimension, as of a sequence": ("[column, row]", "[row * columns + column, row]"),
        "the prefix at the end": ("(0, 0, prefix, 0)", "(0, 0, 0, prefix)"),
        "always one token before": ("(0, 0, prefix, 0)", "(0, 0, 1, 0)"),
        "the prefix has the first patch's position": (
            "F.pad(embed, (0, 0, prefix, 0))",
            "torch.cat([embed[:, :1].expand(-1, prefix, -1), embed], dim=1)",
        ),
        "float64": (".float()", ""),
        "any even width accepted": ("if dim % 4:", "if dim % 2:"),
        "the longer side taken for the columns": ("rows, columns = grid", "rows, columns = sorted(grid)"),
        "the longer side taken for the rows": ("rows, columns = grid", "columns, rows = sorted(grid)"),
    },
)

WRONG_BODIES["learning_rate"] = (
    """
    def learning_rate(step, steps, peak, warmup, decay="cosine"):
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return peak * (1 - progress if decay == "linear" else (1 + math.cos(math.pi * progress)) / 2)
    """,
    {
        "a first step of 0": ("(step + 1) / warmup", "step / warmup"),
        "a peak that is not reached": ("(step + 1) / warmup", "(step + 1) / (warmup + 1)"),
        "a warm-up that starts at half the peak": ("(step + 1) / warmup", "(1 + (step + 1) / warmup) / 2"),
        "decay from step 0": ("(step - warmup) / max(1, steps - warmup)", "step / steps"),
        "decay over all steps": ("max(1, steps - warmup)", "steps"),
        "0 at the last step": ("max(1, steps - warmup)", "max(1, steps - warmup - 1)"),
        "a quarter of a cosine": ("(1 + math.cos(math.pi * progress)) / 2", "math.cos(math.pi / 2 * progress)"),
        "twice the amplitude": ("(1 + math.cos(math.pi * progress)) / 2", "(1 + math.cos(math.pi * progress))"),
        "a cubic that meets the cosine at both ends and half way": (
            "(1 + math.cos(math.pi * progress)) / 2",
            "1 - progress**2 * (3 - 2 * progress)",
        ),
        "always a cosine": ('1 - progress if decay == "linear" else ', ""),
        "always linear": ('decay == "linear"', "decay"),
        "a floor of a hundredth": (
            "return peak * (1 - progress",
            "return peak * max(0.01, 1 - progress",
        ),
        "no warm-up": ("if step < warmup:", "if step < 0:"),
        "the peak taken for 1 in warm-up": ("peak * (step + 1)", "(step + 1)"),
        "linear by default": ('decay="cosine"', 'decay="linear"'),
        "a warm-up of one step more": ("if step < warmup:", "if step <= warmup and warmup:"),
    },
)

WRONG_BODIES["attention_distance"] = (
    """
    def attention_distance(A, grid, patch_size, prefix=1):
        row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
        centres = patch_size * torch.stack([row, column], dim=-1).reshape(-1, 2).to(A)
        distance = (centres[:, None] - centres).norm(dim=-1)
        weights = A[:, :, prefix:, prefix:]
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return (weights * distance).sum(dim=-1).mean(dim=(0, 2))
    """,
    {
        "weights not normalised again": ("weights / weights.sum(dim=-1, keepdim=True)", "weights"),
        "weights normalised over queries": ("weights.sum(dim=-1, keepdim=True)", "weights.sum(dim=-2, keepdim=True)"),
        "in patches": ("patch_size * torch.stack", "torch.stack"),
        "along the grid's lines": (".norm(dim=-1)", ".abs().sum(dim=-1)"),
        "the larger of the two directions": (".norm(dim=-1)", ".abs().amax(dim=-1)"),
        "squared": (".norm(dim=-1)", ".square().sum(dim=-1)"),
        "the class token in place of the last patch": (
            "A[:, :, prefix:, prefix:]",
            "A[:, :, : len(centres), : len(centres)]",
        ),
        "always one token before": ("A[:, :, prefix:, prefix:]", "A[:, :, -len(centres) + 1 - prefix :, 1:]"),
        "a number for each image": ("mean(dim=(0, 2))", "mean(dim=(1, 2))"),
        "the first image alone": ("mean(dim=(0, 2))", "mean(dim=2)[0]"),
        "one number for all heads": ("mean(dim=(0, 2))", "mean().expand(A.shape[1])"),
        "one head loses its axis": ("mean(dim=(0, 2))", "mean(dim=(0, 2)).squeeze()"),
        "rows and columns swapped": ('indexing="ij"', 'indexing="xy"'),
        "a square grid assumed": (
            "torch.arange(grid[0]), torch.arange(grid[1])",
            "torch.arange(grid[0]), torch.arange(grid[0])",
        ),
        "a sum over the patches": (".mean(dim=(0, 2))", ".mean(dim=0).sum(dim=-1)"),
        "the farthest in place of the mean": ("(weights * distance).sum(dim=-1)", "(weights * distance).amax(dim=-1)"),
        "the longer side taken for the columns": (
            "torch.arange(grid[0]), torch.arange(grid[1])",
            "*(torch.arange(n) for n in sorted(grid))",
        ),
        "the longer side taken for the rows": (
            "torch.arange(grid[0]), torch.arange(grid[1])",
            "*(torch.arange(n) for n in sorted(grid)[::-1])",
        ),
    },
)

WRONG_BODIES["attention_rollout"] = (
    """
    def attention_rollout(attentions):
        identity = torch.eye(attentions[0].shape[-1]).to(attentions[0])
        rollout = identity.expand(len(attentions[0]), -1, -1)
        for A in attentions:
            rollout = (A.mean(dim=1) + identity) / 2 @ rollout
        return rollout
    """,
    {
        "layers in the other order": (
            "(A.mean(dim=1) + identity) / 2 @ rollout",
            "rollout @ ((A.mean(dim=1) + identity) / 2)",
        ),
        "no residual": ("(A.mean(dim=1) + identity) / 2", "A.mean(dim=1)"),
        "a residual without its weight": ("(A.mean(dim=1) + identity) / 2", "(A.mean(dim=1) + identity)"),
        "the largest head": ("A.mean(dim=1)", "A.amax(dim=1)"),
        "the first head": ("A.mean(dim=1)", "A[:, 0]"),
        "layers added": (" / 2 @ rollout", " / 2 + rollout"),
        "layers multiplied number by number": (" / 2 @ rollout", " / 2 * rollout"),
        "attention transposed": ("A.mean(dim=1)", "A.mean(dim=1).transpose(1, 2)"),
        "the last layer alone": ("for A in attentions:", "for A in attentions[-1:]:"),
        "the first layer left out": ("for A in attentions:", "for A in attentions[1:]:"),
        "one map for all images": ("return rollout", "return rollout.mean(dim=0, keepdim=True).expand(len(A), -1, -1)"),
        "one image loses its axis": ("return rollout", "return rollout.squeeze(0)"),
    },
)

WRONG_BODIES["pos_embed_similarity"] = (
    """
    def pos_embed_similarity(pos_embed, grid, prefix=1):
        unit = F.normalize(pos_embed[0, prefix:], dim=-1)
        return (unit @ unit.T).reshape(*grid, *grid)
    """,
    {
        "a dot product": ("F.normalize(pos_embed[0, prefix:], dim=-1)", "pos_embed[0, prefix:]"),
        "normalised over positions": ("dim=-1", "dim=0"),
        "unit vectors in the sense of l1": ("dim=-1", "p=1, dim=-1"),
        "a correlation": ("pos_embed[0, prefix:]", "(pos_embed - pos_embed.mean(dim=-1, keepdim=True))[0, prefix:]"),
        "no negative similarity": ("(unit @ unit.T)", "(unit @ unit.T).clamp(min=0)"),
        "the prefix in place of the last position": ("pos_embed[0, prefix:]", "pos_embed[0, : math.prod(grid)]"),
        "always one token before": ("pos_embed[0, prefix:]", "F.pad(pos_embed[0, 1:], (0, 0, 0, 1 - prefix))"),
        "the grid turned": ("reshape(*grid, *grid)", "reshape(*grid[::-1], *grid[::-1])"),
        "columns before rows in the map": ("reshape(*grid, *grid)", "reshape(*grid, *grid).transpose(2, 3)"),
        "the longer side taken for the columns": ("reshape(*grid, *grid)", "reshape(*sorted(grid), *sorted(grid))"),
        "the longer side taken for the rows": (
            "reshape(*grid, *grid)",
            "reshape(*sorted(grid)[::-1], *sorted(grid)[::-1])",
        ),
    },
)

WRONG_BODIES["reconstruction_loss"] = (
    """
    def reconstruction_loss(prediction, target, metric="l2"):
        if metric == "l2":
            return (prediction - target).square().mean(dim=-1)
        if metric == "smooth-l1":
            return F.smooth_l1_loss(prediction, target, reduction="none").mean(dim=-1)
        if metric == "cosine":
            return 2 - 2 * F.cosine_similarity(prediction, target, dim=-1)
        if metric == "cross-entropy":
            return -(target.softmax(dim=-1) * prediction.log_softmax(dim=-1)).sum(dim=-1)
        raise ValueError("unknown metric")
    """,
    {
        "a sum over the values": ("square().mean(dim=-1)", "square().sum(dim=-1)"),
        "one number for all": ("square().mean(dim=-1)", "square().mean()"),
        "the mean over patches": ("square().mean(dim=-1)", "square().mean(dim=1)"),
        "the root of the mean": ("square().mean(dim=-1)", "square().mean(dim=-1).sqrt()"),
        "half of the square": ("square().mean(dim=-1)", "square().mean(dim=-1) / 2"),
        "one patch loses its axis": ("square().mean(dim=-1)", "square().mean(dim=-1).squeeze()"),
        "absolute differences": ("F.smooth_l1_loss(", "F.l1_loss("),
        "smooth l1 around 1/2": ('reduction="none"', 'reduction="none", beta=0.5'),
        "squares also far away": (
            "F.smooth_l1_loss(prediction, target, reduction",
            "0.5 * F.mse_loss(prediction, target, reduction",
        ),
        "smooth l1 summed": ('reduction="none").mean(dim=-1)', 'reduction="none").sum(dim=-1)'),
        "1 - cos": ("2 - 2 * F.cos", "1 - F.cos"),
        "the cosine of all patches as one vector": (
            "F.cosine_similarity(prediction, target, dim=-1)",
            "F.cosine_similarity(prediction.flatten(1), target.flatten(1), dim=-1)[:, None]"
            ".expand(prediction.shape[:2])",
        ),
        "the cosine over patches": (
            "F.cosine_similarity(prediction, target, dim=-1)",
            "F.cosine_similarity(prediction, target, dim=1).mean(dim=-1, keepdim=True).expand(prediction.shape[:2])",
        ),
        "only the prediction scaled to length 1": (
            "2 - 2 * F.cosine_similarity(prediction, target, dim=-1)",
            "(F.normalize(prediction, dim=-1) - target).square().sum(dim=-1)",
        ),
        "entropy of the target in the prediction's place": (
            "target.softmax(dim=-1) * prediction.log_softmax(dim=-1)",
            "prediction.softmax(dim=-1) * target.log_softmax(dim=-1)",
        ),
        "a divergence: the target's entropy subtracted": (
            "prediction.log_softmax(dim=-1))",
            "(prediction.log_softmax(dim=-1) - target.log_softmax(dim=-1)))",
        ),
        "the target taken for probabilities": ("target.softmax(dim=-1)", "target"),
        "the largest value of the target taken for a label": (
            "target.softmax(dim=-1)",
            "F.one_hot(target.argmax(dim=-1), target.shape[-1])",
        ),
        "a mean over the classes": (".sum(dim=-1)", ".mean(dim=-1)"),
        "the sign": ("return -(", "return ("),
        "an unknown metric taken for l2": (
            'raise ValueError("unknown metric")',
            "return (prediction - target).square().mean(dim=-1)",
        ),
        "the default taken for smooth l1": ('metric="l2"', 'metric="smooth-l1"'),
        "no gradient into the prediction": ("return (prediction - target)", "return (prediction.detach() - target)"),
        "the same gradient for far and near": (
            "F.smooth_l1_loss(prediction, target",
            "F.smooth_l1_loss(target + (prediction - target).sign() * (prediction - target).detach().abs(), target",
        ),
    },
)

WRONG_BODIES["Autoencoder.forward"] = (
    """
    def forward(self, images, visible, hidden):
        latent = self.encoder.encode(images, visible)
        z, n = self.decoder_tokens(latent, visible, hidden), hidden.shape[1]
        predicted_loss = self.loss_predictor(z, n).squeeze(-1) if self.loss_predictor is not None else None
        return self.decoder(z, n), predicted_loss
    """,
    {
        "mask convention inverted": ("encode(images, visible)", "encode(images, hidden)"),
        "visible and hidden swapped everywhere": (
            "(self, images, visible, hidden)",
            "(self, images, hidden, visible)",
        ),
        "the encoder sees the whole image": (
            "self.encoder.encode(images, visible)",
            "(z := self.encoder.encode(images)); latent = torch.cat([z[:, :1], vit.gather(z[:, 1:], visible)], dim=1)",
        ),
        "as many answers as visible patches": ("hidden.shape[1]", "visible.shape[1]"),
        "answers for the visible patches": (
            "self.decoder_tokens(latent, visible, hidden), hidden.shape[1]",
            "self.decoder_tokens(latent, visible, hidden).roll(hidden.shape[1], dims=1), hidden.shape[1]",
        ),
        "an axis too many": (".squeeze(-1)", ""),
        "one image loses its axis": (".squeeze(-1)", ".squeeze()"),
        "the decoders swapped": (
            "return self.decoder(z, n), predicted_loss",
            "return predicted_loss, self.decoder(z, n)",
        ),
        "the predictor does not train the encoder": ("self.loss_predictor(z, n)", "self.loss_predictor(z.detach(), n)"),
        "the decoder does not train the encoder": ("return self.decoder(z, n)", "return self.decoder(z.detach(), n)"),
        "zeros without a predictor": ("else None", "else torch.zeros(hidden.shape)"),
        "the predicted loss cut off at 0": (".squeeze(-1) if", ".squeeze(-1).relu() if"),
        "hidden patches answered for in the image's order": (
            "latent = self.encoder.encode(images, visible)",
            "latent, hidden = self.encoder.encode(images, visible), hidden.sort(dim=1).values",
        ),
        "the first image's mask for all": (
            "latent = self.encoder.encode(images, visible)",
            "visible, hidden = visible[:1].expand_as(visible), hidden[:1].expand_as(hidden)\n"
            "        latent = self.encoder.encode(images, visible)",
        ),
    },
)

WRONG_BODIES["normalise_patches"] = (
    """
    def normalise_patches(patches):
        mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
        std = (variance + 1e-6).sqrt()
        return (patches - mean) / std, mean, std
    """,
    {
        "the biased variance": ("patches.var(dim=-1, keepdim=True)", "patches.var(dim=-1, keepdim=True, correction=0)"),
        "the mean over patches": ("patches.mean(dim=-1, keepdim=True)", "patches.mean(dim=1, keepdim=True)"),
        "the mean of the image": ("patches.mean(dim=-1, keepdim=True)", "patches.mean(dim=(1, 2), keepdim=True)"),
        "the variance of the image": ("patches.var(dim=-1, keepdim=True)", "patches.var(dim=(1, 2), keepdim=True)"),
        "the mean left in": ("(patches - mean) / std", "patches / std"),
        "divided by the variance": ("(patches - mean) / std", "(patches - mean) / (variance + 1e-6)"),
        "0 / 0 for a flat patch": ("(variance + 1e-6).sqrt()", "variance.sqrt()"),
        "an epsilon that greys a dim patch": ("1e-6", "1e-2"),
        "the variance returned": ("mean, std", "mean, variance"),
        "mean and std in the other order": ("mean, std", "std, mean"),
        "an axis lost": ("mean, std", "mean.squeeze(-1), std.squeeze(-1)"),
        "one patch loses its axis": ("mean, std", "mean.squeeze(1), std.squeeze(1)"),
        "from -1 to 1": (
            "(patches - mean) / std",
            "2 * (patches - patches.amin(-1, True)) / (patches.amax(-1, True) - patches.amin(-1, True)) - 1",
        ),
    },
)

WRONG_BODIES["hog"] = (
    """
    def hog(images, patch_size, bins=9):
        B, C, H, W = images.shape
        cell = 8 if patch_size % 8 == 0 else patch_size
        down, along = torch.zeros_like(images), torch.zeros_like(images)
        down[:, :, 1:-1] = images[:, :, 2:] - images[:, :, :-2]
        along[..., 1:-1] = images[..., 2:] - images[..., :-2]
        magnitude = (down**2 + along**2).sqrt()
        angle = torch.atan2(down, along) % math.pi
        which = (angle * (bins / math.pi)).long().clamp(max=bins - 1)
        votes = torch.zeros(B, C, bins, H, W, device=images.device, dtype=images.dtype)
        votes.scatter_(2, which[:, :, None], magnitude[:, :, None])
        cells = F.avg_pool2d(votes.flatten(1, 2), cell)
        cells = F.normalize(cells.unflatten(1, (C, bins)), dim=2, eps=1e-5).flatten(1, 2)
        return vit.patchify(cells, patch_size // cell)
    """,
    {
        "orientation with sign": ("% math.pi", "% (2 * math.pi) / 2"),
        "the differences swapped": ("torch.atan2(down, along)", "torch.atan2(along, down)"),
        "one-sided differences": (
            "down[:, :, 1:-1] = images[:, :, 2:] - images[:, :, :-2]",
            "down[:, :, :-1] = images[:, :, 1:] - images[:, :, :-1]",
        ),
        "differences at the border": (
            "along[..., 1:-1] = images[..., 2:] - images[..., :-2]",
            "along = torch.gradient(images, dim=3)[0] * 2",
        ),
        "votes not weighted": ("magnitude[:, :, None]", "torch.ones_like(magnitude[:, :, None])"),
        "squared magnitude": ("(down**2 + along**2).sqrt()", "down**2 + along**2"),
        "the magnitude along the grid's lines": ("(down**2 + along**2).sqrt()", "down.abs() + along.abs()"),
        "scaled over the channels": ("dim=2, eps=1e-5", "dim=1, eps=1e-5"),
        "all channels scaled together": (
            "F.normalize(cells.unflatten(1, (C, bins)), dim=2, eps=1e-5).flatten(1, 2)",
            "F.normalize(cells, dim=1, eps=1e-5)",
        ),
        "scaled to a sum of 1": ("dim=2, eps=1e-5", "p=1, dim=2, eps=1e-5"),
        "not scaled": (
            "F.normalize(cells.unflatten(1, (C, bins)), dim=2, eps=1e-5).flatten(1, 2)",
            "cells",
        ),
        "one cell a patch": ("8 if patch_size % 8 == 0 else patch_size", "patch_size"),
        "cells of 4 where 8 does not divide": ("else patch_size", "else math.gcd(patch_size, 4)"),
        "nine bins whatever is asked for": ("B, C, H, W = images.shape", "B, C, H, W = images.shape; bins = 9"),
        "the bins before the channels": (
            ".flatten(1, 2)\n        return",
            ".transpose(1, 2).flatten(1, 2)\n        return",
        ),
        "the nearest bin's centre": ("(angle * (bins / math.pi)).long()", "(angle * (bins / math.pi)).round().long()"),
        "the cells of a patch column by column": (
            "return vit.patchify(cells, patch_size // cell)",
            "return vit.patchify(cells.transpose(2, 3), patch_size // cell).unflatten(1, (W // patch_size, -1))"
            ".transpose(1, 2).flatten(1, 2)",
        ),
        "0 / 0": ("eps=1e-5", "eps=0.0"),
        "an angle of π falls out of the last bin": (".clamp(max=bins - 1)", ""),
    },
)

WRONG_BODIES["HPM.targets"] = (
    """
    @torch.no_grad()
    def targets(self, images, features=None):
        patch_size = self.student.encoder.patch_size
        if self.target == "hog":
            return hog(images, patch_size)
        if self.target == "ema":
            return features
        if self.target in ("dino", "clip"):
            return self.frozen.head(self.frozen.encode(images))[:, self.frozen.num_prefix_tokens :]
        patches = vit.patchify(images, patch_size)
        return normalise_patches(patches)[0] if self.target == "norm-pixels" else patches
    """,
    {
        "the class token left in": ("[:, self.frozen.num_prefix_tokens :]", ""),
        "the last patch left out": ("[:, self.frozen.num_prefix_tokens :]", "[:, : -self.frozen.num_prefix_tokens]"),
        "no head": ("self.frozen.head(self.frozen.encode(images))", "self.frozen.encode(images)"),
        "all that normalise_patches gives": ("normalise_patches(patches)[0]", "normalise_patches(patches)"),
        "the means in place of the normalised": ("normalise_patches(patches)[0]", "normalise_patches(patches)[1]"),
        "pixels for norm-pixels": (
            'if self.target == "norm-pixels" else patches',
            'if self.target == "norm_pixels" else patches',
        ),
        "always normalised": (' if self.target == "norm-pixels" else patches', ""),
        "the image normalised in place of each patch": (
            "normalise_patches(patches)[0]",
            "normalise_patches(patches.flatten(1)[:, None])[0].reshape(patches.shape)",
        ),
        "the student's features": ("return features", "return self.student.encoder.encode(images)[:, 1:]"),
        "features of unit length": ("return features", "return F.normalize(features, dim=-1)"),
        "HOG of the grey image": ("hog(images, patch_size)", "hog(images.mean(dim=1, keepdim=True), patch_size)"),
        "HOG with patches of 16": ("hog(images, patch_size)", "hog(images, 16)"),
    },
)

WRONG_BODIES["random_mask"] = (
    """
    def random_mask(noise, ratio):
        hidden = count_hidden(noise.shape[1], ratio)
        return hide_largest(noise, hidden)
    """,
    {
        "mask convention inverted": ("return hide_largest", "return ~hide_largest"),
        "a threshold": ("hide_largest(noise, hidden)", "noise < ratio"),
        "one mask for all images": ("hide_largest(noise, hidden)", "hide_largest(noise[:1].expand_as(noise), hidden)"),
        "other chance than the noise": ("hide_largest(noise, hidden)", "hide_largest(torch.rand_like(noise), hidden)"),
        "no chance": (
            "hide_largest(noise, hidden)",
            "hide_largest(torch.arange(noise.shape[1]).expand_as(noise), hidden)",
        ),
        "rounded the other way": ("count_hidden(noise.shape[1], ratio)", "int(noise.shape[1] * ratio)"),
        "rounded to the nearest": ("count_hidden(noise.shape[1], ratio)", "round(noise.shape[1] * ratio)"),
        "a count of the batch": (
            "hide_largest(noise, hidden)",
            "hide_largest(noise.flatten()[None], hidden * len(noise)).reshape(noise.shape)",
        ),
        "neighbours in order": (
            "hide_largest(noise, hidden)",
            "(torch.arange(noise.shape[1]) + (noise[:, :1] * noise.shape[1]).long()) % noise.shape[1] < hidden",
        ),
        "every second patch first": (
            "hide_largest(noise, hidden)",
            "hide_largest(noise + torch.arange(noise.shape[1]) % 2, hidden)",
        ),
        "0 and 1": ("hide_largest(noise, hidden)", "hide_largest(noise, hidden).to(noise)"),
        "one image loses its axis": ("hide_largest(noise, hidden)", "hide_largest(noise, hidden).squeeze(0)"),
        "the noise changed in place": (
            "return hide_largest(noise, hidden)",
            "return hide_largest(noise.neg_(), hidden)",
        ),
    },
)

WRONG_BODIES["block_mask"] = (
    """
    def block_mask(draw, grid, ratio):
        rows, columns = grid
        area, aspect, top, left = draw[:, :40, :4, None].unbind(dim=2)
        area = (rows * columns * (0.08 + 0.17 * area)).clamp(min=4)
        aspect = 0.3 ** (1 - 2 * aspect)
        height = (area * aspect).sqrt().round().clamp(max=rows)
        width = (area / aspect).sqrt().round().clamp(max=columns)
        top, left = (top * (rows - height + 1)).floor(), (left * (columns - width + 1)).floor()
        row, column = torch.arange(rows), torch.arange(columns)
        in_rows, in_columns = (row >= top) & (row < top + height), (column >= left) & (column < left + width)
        inside = (in_rows[..., :, None] & in_columns[..., None, :]).flatten(2)
        order = torch.arange(inside.shape[1], 0, -1)[:, None]
        score = (inside * order).amax(dim=1)
        return hide_largest(score + draw[..., 4], count_hidden(rows * columns, ratio))
    """,
    {
        "mask convention inverted": ("return hide_largest", "return ~hide_largest"),
        "single patches": ("score + draw", "draw"),
        "rows and columns swapped": ("rows, columns = grid", "columns, rows = grid"),
        "a square grid assumed": (
            "rows, columns = grid",
            "rows = columns = int((grid[0] * grid[1]) ** 0.5); grid_size = grid[0] * grid[1]",
            "score + draw[..., 4]",
            "F.pad(score, (0, grid_size - score.shape[1])) + draw[..., 4]",
            "count_hidden(rows * columns, ratio)",
            "count_hidden(grid_size, ratio)",
        ),
        "the count not exact": (
            "hide_largest(score + draw[..., 4], count_hidden(rows * columns, ratio))",
            "score > score.topk(count_hidden(rows * columns, ratio), dim=1).values[:, -1:]",
        ),
        "all that the rectangles cover": (
            "hide_largest(score + draw[..., 4], count_hidden(rows * columns, ratio))",
            "score > 0",
        ),
        "blocks of two patches": ("(rows * columns * (0.08 + 0.17 * area)).clamp(min=4)", "2 + 0 * area"),
        "blocks of half the size": ("(0.08 + 0.17 * area)", "(0.04 + 0.085 * area)"),
        "blocks of twice the size": ("(0.08 + 0.17 * area)", "(0.16 + 0.34 * area)"),
        "all blocks of one size": ("(0.08 + 0.17 * area)", "(0.165 + 0 * area)"),
        "on a small grid blocks of one patch": (".clamp(min=4)", ".clamp(min=1)"),
        "tall blocks alone": ("0.3 ** (1 - 2 * aspect)", "0.3 ** (-aspect)"),
        "wide blocks alone": ("0.3 ** (1 - 2 * aspect)", "0.3 ** aspect"),
        "squares alone": ("0.3 ** (1 - 2 * aspect)", "aspect**0"),
        "aspects up to 10": ("0.3 ** (1 - 2 * aspect)", "0.1 ** (1 - 2 * aspect)"),
        "aspects uniform in place of log-uniform": ("0.3 ** (1 - 2 * aspect)", "0.3 + (1 / 0.3 - 0.3) * aspect"),
        "blocks that never reach bottom and right": (
            "(top * (rows - height + 1)).floor(), (left * (columns - width + 1)).floor()",
            "(top * (rows - height)).floor(), (left * (columns - width)).floor()",
        ),
        "blocks that never reach the bottom": (
            "(top * (rows - height + 1)).floor()",
            "(top * (rows - height)).floor()",
        ),
        "blocks that never reach the right": (
            "(left * (columns - width + 1)).floor()",
            "(left * (columns - width)).floor()",
        ),
        "blocks that never start at the top": (
            "(top * (rows - height + 1)).floor()",
            "(1 + top * (rows - height)).floor().minimum(rows - height)",
        ),
        "blocks cut off at the border": (
            "(top * (rows - height + 1)).floor(), (left * (columns - width + 1)).floor()",
            "(top * rows).floor(), (left * columns).floor()",
        ),
        "all blocks in the middle": (
            "(top * (rows - height + 1)).floor(), (left * (columns - width + 1)).floor()",
            "((rows - height) / 2).floor(), ((columns - width) / 2).floor()",
        ),
        "blocks on the diagonal": ("(left * (columns - width + 1))", "(draw[:, :40, 2, None] * (columns - width + 1))"),
        "one block alone": ("draw[:, :40, :4, None]", "draw[:, :1, :4, None]"),
        "the last patches of a block in order": ("score + draw[..., 4]", "score - torch.arange(rows * columns) / 1e4"),
        "the same blocks for all images": (
            "draw[:, :40, :4, None]",
            "draw[:1, :40, :4, None].expand(len(draw), -1, -1, -1)",
        ),
        "other chance than the draw": ("draw[:, :40, :4, None]", "torch.rand_like(draw)[:, :40, :4, None]"),
        "one image loses its axis": (
            "return hide_largest(",
            "return torch.squeeze(hide_largest(",
            "ratio))",
            "ratio)), 0)",
        ),
        "the longer side taken for the columns": ("rows, columns = grid", "rows, columns = sorted(grid)"),
        "the longer side taken for the rows": ("rows, columns = grid", "columns, rows = sorted(grid)"),
        "what no block covers hidden in the image's order": (
            "score + draw[..., 4]",
            "score + draw[..., 4] - (score == 0) * (1 + torch.arange(rows * columns))",
        ),
        "what no block covers never hidden": (
            "count_hidden(rows * columns, ratio)",
            "min(count_hidden(rows * columns, ratio), int((score > 0).sum(1).min()))",
        ),
    },
)

WRONG_BODIES["grid_mask"] = (
    """
    def grid_mask(noise, grid, ratio):
        odd_row, odd_column = (torch.arange(n) % 2 == 1 for n in grid)
        score = (odd_row[:, None] | odd_column).flatten()
        return hide_largest(score + noise, count_hidden(noise.shape[1], ratio))
    """,
    {
        "mask convention inverted": ("return hide_largest", "return ~hide_largest"),
        "the bottom right patch kept": ("% 2 == 1", "% 2 == 0"),
        "the top right patch kept": ("odd_row[:, None] | odd_column", "odd_row[:, None] | ~odd_column"),
        "one of 2 x 2 hidden": ("odd_row[:, None] | odd_column", "odd_row[:, None] & odd_column"),
        "a chessboard": ("odd_row[:, None] | odd_column", "odd_row[:, None] ^ odd_column"),
        "every second row": ("odd_row[:, None] | odd_column", "odd_row[:, None] | (odd_column & ~odd_column)"),
        "rows and columns swapped": ("for n in grid", "for n in grid[::-1]"),
        "no chance": ("score + noise", "score + torch.zeros_like(noise)"),
        "one chance for all images": ("score + noise", "score + noise[:1].expand_as(noise)"),
        "other chance than the noise": ("score + noise", "score + torch.rand_like(noise)"),
        "the grid does not matter": ("score + noise", "noise"),
        "the grid matters half the time": ("score + noise", "score / 2 + noise"),
        "always 75 %": ("count_hidden(noise.shape[1], ratio)", "count_hidden(noise.shape[1], 0.75)"),
        "no more than the grid leaves": (
            "return hide_largest(score + noise, count_hidden(noise.shape[1], ratio))",
            "return hide_largest(score + noise, min(score.sum().item(), count_hidden(noise.shape[1], ratio)))",
        ),
        "the noise changed in place": ("score + noise", "noise.add_(score)"),
        "the longer side taken for the columns": ("for n in grid", "for n in sorted(grid)"),
        "the longer side taken for the rows": ("for n in grid", "for n in sorted(grid)[::-1]"),
    },
)

WRONG_BODIES["Autoencoder.predict_loss"] = (
    """
    def predict_loss(self, images):
        latent = self.encoder.encode(images)
        N = latent.shape[1] - self.encoder.num_prefix_tokens
        z = self.decoder_embed(latent) + self.decoder_pos_embed
        predicted_loss = self.loss_predictor(z, N).squeeze(-1) if self.loss_predictor is not None else None
        return predicted_loss, latent[:, -N:]
    """,
    {
        "no positions": (" + self.decoder_pos_embed", ""),
        "positions twice": (" + self.decoder_pos_embed", " + 2 * self.decoder_pos_embed"),
        "the class token among the answers": ("latent.shape[1] - self.encoder.num_prefix_tokens", "latent.shape[1]"),
        "the class token among the features": ("latent[:, -N:]", "latent"),
        "the last patch left out of the features": ("latent[:, -N:]", "latent[:, :N]"),
        "features after decoder_embed": ("latent[:, -N:]", "z[:, -N:]"),
        "the reconstruction decoder": ("self.loss_predictor(z, N)", "self.decoder(z, N)"),
        "an axis too many": (".squeeze(-1)", ""),
        "one image loses its axis": (".squeeze(-1)", ".squeeze()"),
        "no class token for the predictor": ("self.loss_predictor(z, N)", "self.loss_predictor(z[:, -N:], N)"),
        "mask tokens in place of the patches": (
            "self.loss_predictor(z, N)",
            "self.loss_predictor(torch.cat("
            "[z[:, :-N], (self.mask_token + self.decoder_pos_embed[:, -N:]).expand(len(z), -1, -1)], 1), N)",
        ),
        "only with a loss predictor": (" if self.loss_predictor is not None else None", ""),
        "only with a reconstruction decoder": (
            "latent = self.encoder.encode(images)",
            "latent = self.encoder.encode(images)\n        self.decoder(self.decoder_embed(latent), 1)",
        ),
        "the predicted loss cut off at 0": (".squeeze(-1) if", ".squeeze(-1).relu() if"),
    },
)

WRONG_BODIES["absolute_loss"] = (
    """
    def absolute_loss(predicted, true):
        true = true.detach()
        mean, variance = true.mean(dim=1, keepdim=True), true.var(dim=1, keepdim=True)
        return (predicted - (true - mean) / (variance + 1e-6).sqrt()).square().mean()
    """,
    {
        "the mean of the batch": ("true.mean(dim=1, keepdim=True)", "true.mean()"),
        "the variance of the batch": ("true.var(dim=1, keepdim=True)", "true.var()"),
        "standardised over images": (
            "true.mean(dim=1, keepdim=True), true.var(dim=1, keepdim=True)",
            "true.mean(dim=0, keepdim=True), true.var(dim=0, keepdim=True)",
        ),
        "the biased variance": ("true.var(dim=1, keepdim=True)", "true.var(dim=1, keepdim=True, correction=0)"),
        "not standardised": ("(predicted - (true - mean) / (variance + 1e-6).sqrt())", "(predicted - true)"),
        "the mean left in": ("(true - mean)", "true"),
        "the scale left in": ("(true - mean) / (variance + 1e-6).sqrt()", "(true - mean)"),
        "a gradient into the true losses": ("true = true.detach()", "true = true * 1"),
        "no gradient into the predicted ones": ("(predicted - (true", "(predicted.detach() - (true"),
        "absolute differences": (".square().mean()", ".abs().mean()"),
        "a sum": (".square().mean()", ".square().sum()"),
        "a sum over patches, the mean over images": (".square().mean()", ".square().sum(dim=1).mean()"),
        "one number for each image": (".square().mean()", ".square().mean(dim=1)"),
        "half of the square": (".square().mean()", ".square().mean() / 2"),
        "0 / 0 where all losses are equal": ("(variance + 1e-6).sqrt()", "variance.sqrt()"),
        "the prediction standardised too": (
            "(predicted - (",
            "((predicted - predicted.mean(dim=1, keepdim=True)) / predicted.std(dim=1, keepdim=True) - (",
        ),
    },
)

WRONG_BODIES["relative_loss"] = (
    """
    def relative_loss(predicted, true):
        harder = true[:, :, None] > true[:, None, :]
        margin = predicted[:, None, :] - predicted[:, :, None]
        margin = margin.masked_fill(~harder, -math.inf)
        return F.softplus(margin).sum() / harder.sum().clamp(min=1)
    """,
    {
        "the sign": ("predicted[:, None, :] - predicted[:, :, None]", "predicted[:, :, None] - predicted[:, None, :]"),
        "ties are pairs": ("true[:, :, None] > true[:, None, :]", "true[:, :, None] >= true[:, None, :]"),
        "neighbours in the list alone": (
            "margin = margin.masked",
            "harder = harder & (torch.eye(true.shape[1]).roll(1, 1) > 0)\n        margin = margin.masked",
        ),
        "the sum over n² pairs": ("harder.sum().clamp(min=1)", "harder.numel()"),
        "a sum over n (n - 1) pairs, with the ties": (
            "harder.sum().clamp(min=1)",
            "(len(true) * true.shape[1] * (true.shape[1] - 1) / 2)",
        ),
        "half of the mean": ("harder.sum().clamp(min=1)", "(2 * harder.sum().clamp(min=1))"),
        "both sums over half the pairs": ("F.softplus(margin).sum()", "2 * F.softplus(margin).sum()"),
        "0 / 0 without a pair": (".clamp(min=1)", ""),
        "a log of 0": ("F.softplus(margin).sum()", "-torch.sigmoid(-margin).log().sum()"),
        "a log of almost 0": ("F.softplus(margin).sum()", "-(torch.sigmoid(-margin) + 1e-8).log().sum()"),
        "pairs that do not count": ("margin = margin.masked_fill(~harder, -math.inf)", "margin = margin * 1"),
        "log 2 for each pair that does not count": ("-math.inf", "0.0"),
        "the mean of each image first": (
            "F.softplus(margin).sum() / harder.sum().clamp(min=1)",
            "(F.softplus(margin).sum(dim=(1, 2)) / harder.sum(dim=(1, 2)).clamp(min=1)).mean()",
        ),
        "pairs across images": (
            "harder = true[:, :, None]",
            "true, predicted = true.flatten()[None], predicted.flatten()[None]\n        harder = true[:, :, None]",
        ),
        "a hinge": ("F.softplus(margin)", "F.relu(1 + margin)"),
        "a pair weighs as much as its losses differ": (
            "F.softplus(margin).sum()",
            "(F.softplus(margin) * (true[:, :, None] - true[:, None, :]).abs()).sum()",
        ),
        "a temperature": ("F.softplus(margin)", "F.softplus(margin / 2)"),
        "a gradient into the true losses": (
            "/ harder.sum().clamp(min=1)",
            "/ harder.sum().clamp(min=1) + 1e-3 * (true - true.detach()).sum()",
        ),
    },
)

WRONG_BODIES["hard_fraction"] = (
    """
    def hard_fraction(t, T, alpha_0=0.0, alpha_T=0.5):
        return alpha_0 + t / T * (alpha_T - alpha_0)
    """,
    {
        "ends swapped": ("alpha_0 + t / T * (alpha_T - alpha_0)", "alpha_T + t / T * (alpha_0 - alpha_T)"),
        "α_0 not subtracted": ("(alpha_T - alpha_0)", "alpha_T"),
        "no α_0": ("return alpha_0 + ", "return "),
        "whole numbers": ("t / T", "t // T"),
        "there one step early": ("t / T", "t / max(1, T - 1)"),
        "a cosine through the ends and the middle": ("t / T", "(1 - math.cos(math.pi * t / T)) / 2"),
        "never falling": ("return alpha_0", "return max(alpha_0, alpha_T) if alpha_T < alpha_0 else alpha_0"),
        "other defaults": ("alpha_T=0.5", "alpha_T=1.0"),
        "rounded to a hundredth": (
            "return alpha_0 + t / T * (alpha_T - alpha_0)",
            "return round(alpha_0 + t / T * (alpha_T - alpha_0), 2)",
        ),
    },
)

WRONG_BODIES["hard_mask"] = (
    """
    def hard_mask(predicted_loss, noise, ratio, hard_fraction):
        hidden = count_hidden(predicted_loss.shape[1], ratio)
        guided = int(hidden * hard_fraction)
        score = noise.scatter(1, predicted_loss.topk(guided, dim=1).indices, 2.0)
        return hide_largest(score, hidden)
    """,
    {
        "mask convention inverted": ("return hide_largest", "return ~hide_largest"),
        "the easiest hidden": ("predicted_loss.topk(guided, dim=1)", "(-predicted_loss).topk(guided, dim=1)"),
        "those farthest from 0": ("predicted_loss.topk(guided, dim=1)", "predicted_loss.abs().topk(guided, dim=1)"),
        "the hardest of the batch": (
            "noise.scatter(1, predicted_loss.topk(guided, dim=1).indices, 2.0)",
            "noise.flatten().scatter(0, predicted_loss.flatten().topk(guided * len(noise)).indices, 2.0)"
            ".reshape(noise.shape)",
        ),
        "a share of all patches": (
            "int(hidden * hard_fraction)",
            "min(hidden, int(predicted_loss.shape[1] * hard_fraction))",
        ),
        "a share of the visible ones": (
            "int(hidden * hard_fraction)",
            "int((predicted_loss.shape[1] - hidden) * hard_fraction)",
        ),
        "rounded to the nearest": ("int(hidden * hard_fraction)", "round(hidden * hard_fraction)"),
        "rounded up": ("int(hidden * hard_fraction)", "math.ceil(hidden * hard_fraction)"),
        "nothing at random": ("noise.scatter(1, predicted_loss.topk(guided, dim=1).indices, 2.0)", "predicted_loss"),
        "all at random": ("noise.scatter(1, predicted_loss.topk(guided, dim=1).indices, 2.0)", "noise"),
        "the rest from the easy half alone": (
            "hide_largest(score, hidden)",
            "hide_largest(score + (predicted_loss < predicted_loss.median(dim=1, keepdim=True).values), hidden)",
        ),
        "the guided not sure to be hidden": (".indices, 2.0)", ".indices, 0.5)"),
        "guided by chance, not by count": (
            "noise.scatter(1, predicted_loss.topk(guided, dim=1).indices, 2.0)",
            "noise + hard_fraction * predicted_loss",
        ),
        "a threshold that hides ties": (
            "noise.scatter(1, predicted_loss.topk(guided, dim=1).indices, 2.0)",
            "torch.where(predicted_loss >= predicted_loss.sort(dim=1, descending=True)"
            ".values[:, guided - 1 : guided], 2.0, noise) if guided else noise",
            "hide_largest(score, hidden)",
            "(score >= 2) | hide_largest(score, hidden)",
        ),
        "the same mask for all images": (
            "return hide_largest(score, hidden)",
            "return hide_largest(score, hidden)[:1].expand_as(noise)",
        ),
        "the same chance for all images": ("noise.scatter(", "noise[:1].repeat(len(noise), 1).scatter("),
        "other chance than the noise": ("noise.scatter(", "torch.rand_like(noise).scatter("),
        "the noise changed in place": ("noise.scatter(", "noise.scatter_("),
        "one image loses its axis": (
            "return hide_largest(score, hidden)",
            "return hide_largest(score, hidden).squeeze(0)",
        ),
        "the predicted loss changed in place": (
            "predicted_loss.topk(guided",
            "predicted_loss.neg_().neg().topk(guided",
        ),
        "a share of N times the ratio": (
            "int(hidden * hard_fraction)",
            "int(predicted_loss.shape[1] * ratio * hard_fraction)",
        ),
    },
)

WRONG_BODIES["ema_update"] = (
    """
    @torch.no_grad()
    def ema_update(teacher, student, momentum):
        source = dict(student.named_parameters())
        for name, mine in teacher.named_parameters():
            if source[name].requires_grad:
                mine.copy_(momentum * mine + (1 - momentum) * source[name])
    """,
    {
        "the wrong way round": (
            "momentum * mine + (1 - momentum) * source[name]",
            "(1 - momentum) * mine + momentum * source[name]",
        ),
        "the student updated": ("mine.copy_(", "source[name].copy_("),
        "a copy changed": ("mine.copy_(", "mine.clone().copy_("),
        "the student's values without the teacher's": (
            "momentum * mine + (1 - momentum) * source[name]",
            "source[name]",
        ),
        "the student's share not taken off": ("(1 - momentum) * source[name]", "source[name]"),
        "fixed positions too": ("if source[name].requires_grad:", "if True:"),
        "the encoder alone": (
            "if source[name].requires_grad:",
            'if name.startswith("encoder") and source[name].requires_grad:',
        ),
        "matrices alone": ("if source[name].requires_grad:", "if source[name].requires_grad and mine.ndim > 1:"),
        "every parameter of the student": (
            "for name, mine in teacher.named_parameters():",
            "for name in source:\n            mine = dict(teacher.named_parameters())[name]",
        ),
        "the first half alone": (
            "teacher.named_parameters():",
            "list(teacher.named_parameters())[: len(source) // 2]:",
        ),
        "the teacher's parameters replaced by the student's": (
            "mine.copy_(momentum * mine + (1 - momentum) * source[name])",
            "mine.data = source[name].data.mul_(1 - momentum).add_(momentum * mine)",
        ),
        "the student's graph kept by the teacher": ("    @torch.no_grad()\n", ""),
        "the student no longer trained": (
            "mine.copy_(",
            "source[name].requires_grad_(False)\n                mine.copy_(",
        ),
    },
)

WRONG_BODIES["ema_momentum"] = (
    """
    def ema_momentum(epoch, start=0.999, end=0.9999, ramp=100):
        return start + min(1.0, epoch / ramp) * (end - start)
    """,
    {
        "rising on": ("min(1.0, epoch / ramp)", "epoch / ramp"),
        "start and end swapped": (
            "start + min(1.0, epoch / ramp) * (end - start)",
            "end + min(1.0, epoch / ramp) * (start - end)",
        ),
        "whole epochs of the ramp": ("epoch / ramp", "epoch // ramp"),
        "whole epochs": ("epoch / ramp", "int(epoch) / ramp"),
        "a cosine through the ends and the middle": (
            "min(1.0, epoch / ramp)",
            "(1 - math.cos(math.pi * min(1.0, epoch / ramp))) / 2",
        ),
        "no start": ("start + min(1.0, epoch / ramp) * (end - start)", "min(1.0, epoch / ramp) * end"),
        "a ramp of 100 whatever is asked for": ("epoch / ramp", "epoch / 100"),
        "an end of 0.9999 whatever is asked for": ("(end - start)", "(0.9999 - start)"),
        "other defaults": ("end=0.9999", "end=1.0"),
    },
)

WRONG_BODIES["HPM.forward"] = (
    """
    def forward(self, images, noise, hard_fraction=0.0, mask=None):
        teacher_loss, features = self.ask_teacher(images, noise)
        if mask is None:
            mask = self.draw_mask(noise, teacher_loss, hard_fraction)
        visible, hidden = split_mask(mask, self.hidden)
        prediction, predicted_loss = self.student(images, visible, hidden)
        target = gather(self.targets(images, features), hidden)
        patch_loss = reconstruction_loss(prediction.float(), target.float(), self.metric)
        rec = patch_loss.mean()
        out = dict(mask=mask, visible=visible, hidden=hidden, teacher_loss=teacher_loss, prediction=prediction)
        out |= dict(patch_loss=patch_loss, predicted_loss=predicted_loss, rec=rec, loss=rec)
        if predicted_loss is not None:
            compare = relative_loss if self.predictor == "relative" else absolute_loss
            pred = compare(predicted_loss.float(), patch_loss.detach())
            out |= dict(pred=pred, correlation=rank_correlation(predicted_loss, patch_loss), loss=rec + pred)
        return out
    """,
    {
        "mask convention inverted": (
            "split_mask(mask, self.hidden)",
            "split_mask(~mask, mask.shape[1] - self.hidden)[::-1]",
            "visible, hidden = ",
            "hidden, visible = ",
        ),
        "the mask returned inverted": ("dict(mask=mask,", "dict(mask=~mask,"),
        "indices not in order": ("split_mask(mask, self.hidden)", "(i.flip(1) for i in split_mask(mask, self.hidden))"),
        "the given mask ignored": ("if mask is None:", "if noise is not None:"),
        "a mask drawn although one is given": ("if mask is None:", "if True:"),
        "targets of other patches": (
            "self.targets(images, features), hidden)",
            "self.targets(images, features), hidden.flip(1))",
        ),
        "the target of the visible patches": (
            "self.targets(images, features), hidden)",
            "self.targets(images, features), visible.repeat(1, 3))",
        ),
        "pixels, whatever the target": (
            "self.targets(images, features)",
            "vit.patchify(images, self.student.encoder.patch_size)",
        ),
        "the metric ignored": (", self.metric)", ")"),
        "the student predicts for the mask": (
            "teacher_loss, features = self.ask_teacher(images, noise)",
            "teacher_loss, features = self.ask_teacher(images, noise)\n"
            "        if self.mask == 'hard':\n"
            "            teacher_loss = self.student.predict_loss(images)[0].detach()",
        ),
        "the mask's noise for the teacher's turns": (
            "self.ask_teacher(images, noise)",
            "self.ask_teacher(images, noise.flip(2) if noise is not None and self.in_turn else noise)",
        ),
        "the student's features for the target": (
            "teacher_loss, features = self.ask_teacher(images, noise)",
            "teacher_loss, features = self.ask_teacher(images, noise)\n"
            "        features = self.student.predict_loss(images)[1].detach()",
        ),
        "the loss predictor gets no gradient": (
            "compare(predicted_loss.float()",
            "compare(predicted_loss.detach().float()",
        ),
        "L_pred changes the reconstruction": (
            "compare(predicted_loss.float(), patch_loss.detach())",
            "compare(predicted_loss.float(), patch_loss) + 1e-3 * (patch_loss - patch_loss.detach()).sum()",
        ),
        "prediction and truth swapped": (
            "compare(predicted_loss.float(), patch_loss.detach())",
            "compare(patch_loss, predicted_loss.detach().float())",
        ),
        "the teacher's prediction compared": (
            "compare(predicted_loss.float()",
            "compare(teacher_loss.gather(1, hidden) + 0 * predicted_loss",
        ),
        "pairs over visible patches too": (
            "compare(predicted_loss.float(), patch_loss.detach())",
            "compare(*(torch.zeros(mask.shape).scatter(1, hidden, v.float()) for v in (predicted_loss, patch_loss)))",
        ),
        "L_pred left out": ("loss=rec + pred", "loss=rec + 0 * pred"),
        "L_pred subtracted": ("rec + pred", "rec - pred"),
        "L_pred at half the weight": ("rec + pred", "rec + pred / 2"),
        "the two losses of the predictor swapped": (
            'if self.predictor == "relative"',
            'if self.predictor != "relative"',
        ),
        "the relative loss always": (
            'relative_loss if self.predictor == "relative" else absolute_loss',
            "relative_loss",
        ),
        "always random": ("teacher_loss, hard_fraction)", "teacher_loss, 0.0)"),
        "always half guided": ("teacher_loss, hard_fraction)", "teacher_loss, 0.5)"),
        "other chance than the noise": ("noise, teacher_loss", "torch.rand_like(noise), teacher_loss"),
        "the mean over all patches": ("patch_loss.mean()", "patch_loss.sum() / mask.numel()"),
        "a sum over patches": ("patch_loss.mean()", "patch_loss.sum(dim=1).mean()"),
        "the correlation with the teacher's": (
            "rank_correlation(predicted_loss, patch_loss)",
            "rank_correlation(teacher_loss.gather(1, hidden), patch_loss)",
        ),
        "the correlation of predicted with predicted": (
            "rank_correlation(predicted_loss, patch_loss)",
            "rank_correlation(predicted_loss, predicted_loss)",
        ),
        "the teacher's loss of the hidden patches alone": (
            "teacher_loss=teacher_loss",
            "teacher_loss=None if teacher_loss is None else teacher_loss.gather(1, hidden)",
        ),
        "losses in half precision": ("prediction.float(), target.float()", "prediction.bfloat16(), target.bfloat16()"),
        "the loss of each patch of the mean image": (
            "patch_loss=patch_loss",
            "patch_loss=patch_loss.mean(dim=0, keepdim=True)",
        ),
    },
)

WRONG_BODIES["average_in_turn"] = (
    """
    def average_in_turn(predicted, mask):
        total = predicted.new_zeros(len(mask), mask.shape[2])
        times = torch.zeros_like(total)
        for g in range(mask.shape[1]):
            answer = predicted[:, g] - predicted[:, g].mean(dim=1, keepdim=True)
            hidden = split_mask(mask[:, g], answer.shape[1])[1]
            total = total.scatter_add(1, hidden, answer)
            times = times.scatter_add(1, hidden, torch.ones_like(answer))
        return total / times
    """,
    {
        "a turn's mean not subtracted": (" - predicted[:, g].mean(dim=1, keepdim=True)", ""),
        "the mean of all turns": ("[:, g].mean(dim=1, keepdim=True)", ".mean(dim=(1, 2))[:, None]"),
        "the mean over images": ("mean(dim=1, keepdim=True)", "mean(dim=0, keepdim=True)"),
        "the mean over all patches": ("mean(dim=1, keepdim=True)", "sum(dim=1, keepdim=True) / mask.shape[2]"),
        "the median": ("mean(dim=1, keepdim=True)", "median(dim=1, keepdim=True).values"),
        "the mean of the average": (
            " - predicted[:, g].mean(dim=1, keepdim=True)",
            "",
            "return total / times",
            "return total / times - (total / times).mean(dim=1, keepdim=True)",
        ),
        "standardised": (
            "hidden = split",
            "answer = answer / answer.std(dim=1, keepdim=True)\n            hidden = split",
        ),
        "a sum": ("return total / times", "return total"),
        "over all turns": ("return total / times", "return total / mask.shape[1]"),
        "over all turns but one": ("return total / times", "return total / max(1, mask.shape[1] - 1)"),
        "the last turn alone": (
            "total = total.scatter_add(1, hidden, answer)",
            "total = total.scatter(1, hidden, answer)",
            "times = times.scatter_add(1, hidden, torch.ones_like(answer))",
            "times = times.scatter(1, hidden, torch.ones_like(answer))",
        ),
        "the first turn left out": ("range(mask.shape[1])", "range(1, mask.shape[1])"),
        "where they stand in line": (
            "split_mask(mask[:, g], answer.shape[1])[1]",
            "torch.arange(answer.shape[1]).expand_as(answer)",
        ),
        "the patches in reverse": (
            "split_mask(mask[:, g], answer.shape[1])[1]",
            "split_mask(mask[:, g], answer.shape[1])[1].flip(1)",
        ),
        "the turns of the first image": ("mask[:, g], ", "mask[:1, g].expand(len(mask), -1), "),
        "the sign turned": ("return total / times", "return -total / times"),
        "the mean image's": (
            "return total / times",
            "return (total / times).mean(dim=0, keepdim=True).expand_as(total)",
        ),
        "one image loses its axis": ("return total / times", "return (total / times).squeeze(0)"),
        "the predictions changed in place": (
            "predicted[:, g] - predicted[:, g].mean(dim=1, keepdim=True)",
            "predicted[:, g].sub_(predicted[:, g].mean(dim=1, keepdim=True))",
        ),
    },
)
