"""Right answers to every exercise in other styles than the repository's: all of them must pass its tests.

What is beside a function, a helper, a constant, an import, comes with it; a method stands without its class.
"""

RIGHT_BODIES = {}

RIGHT_BODIES["patchify"] = {
    "loops over the grid": """
        def patchify(images, patch_size):
            height, width = images.shape[-2:]
            if height % patch_size != 0 or width % patch_size != 0:
                raise ValueError("no")
            tokens = []
            for top in range(0, height, patch_size):
                for left in range(0, width, patch_size):
                    patch = images[:, :, top : top + patch_size, left : left + patch_size]
                    tokens.append(patch.permute(0, 2, 3, 1).flatten(1))
            return torch.stack(tokens, dim=1)
        """,
    "torch's unfold": """
        def patchify(images, patch_size):
            C, (rows, columns) = images.shape[1], patch_grid(*images.shape[2:], patch_size)
            x = F.unfold(images, patch_size, stride=patch_size)
            return x.unflatten(1, (C, patch_size**2)).permute(0, 3, 2, 1).flatten(2).contiguous()
        """,
    "einsum": """
        def patchify(images, patch_size):
            B, C, H, W = images.shape
            P: int = patch_size
            rows, columns = patch_grid(H, W, P)
            x = torch.einsum("bcrpsq->brspqc", images.reshape(B, C, rows, P, columns, P))
            return x.reshape(B, rows * columns, C * P**2)
        """,
    "torch's pixel_unshuffle": """
        def patchify(images, patch_size):
            C = images.shape[1]
            if any(side % patch_size for side in images.shape[2:]):
                raise ValueError("these patches leave a rest")
            x = F.pixel_unshuffle(images, patch_size).unflatten(1, (C, -1))
            return x.permute(0, 3, 4, 2, 1).flatten(3).flatten(1, 2)
        """,
}

RIGHT_BODIES["unpatchify"] = {
    "loops over the grid": """
        def unpatchify(patches, patch_size, grid):
            rows, columns = grid
            if patches.shape[1] != rows * columns:
                raise ValueError("wrong number")
            P, C = patch_size, patches.shape[2] // patch_size**2
            images = patches.new_empty(len(patches), C, rows * P, columns * P)
            for i in range(patches.shape[1]):
                r, c = divmod(i, columns)
                patch = patches[:, i].reshape(-1, P, P, C).movedim(3, 1)
                images[:, :, r * P : (r + 1) * P, c * P : (c + 1) * P] = patch
            return images
        """,
    "torch's fold": """
        def unpatchify(patches, patch_size, grid):
            if grid[0] * grid[1] - patches.shape[1]:
                raise ValueError(f"{grid} has another number of patches than {patches.shape[1]}")
            P = patch_size
            x = patches.unflatten(2, (P * P, -1)).permute(0, 3, 2, 1).flatten(1, 2)
            return F.fold(x, (grid[0] * P, grid[1] * P), P, stride=P)
        """,
    "rows joined, then images": """
        def unpatchify(patches, patch_size, grid):
            if patches.shape[1] != math.prod(grid):
                raise ValueError
            tiles = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, tuple(grid))
            rows = [torch.cat(row.unbind(1), dim=2) for row in tiles.unbind(1)]
            return torch.cat(rows, dim=1).permute(0, 3, 1, 2)
        """,
    "torch's pixel_shuffle": """
        def unpatchify(patches, patch_size, grid):
            B, N, length = patches.shape
            if N != math.prod(grid):
                raise ValueError("not this grid")
            x = patches.unflatten(2, (patch_size**2, -1)).transpose(2, 3).flatten(2)
            return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, tuple(grid)), patch_size)
        """,
}

RIGHT_BODIES["PatchEmbed.forward"] = {
    "a convolution of one patch at a time": """
        def forward(self, patches):
            P = self.proj.kernel_size[0]
            tiles = patches.unflatten(-1, (P, P, -1)).movedim(-1, -3).flatten(0, 1)
            return self.proj(tiles).flatten(1).unflatten(0, patches.shape[:2])
        """,
    "einsum over the pixels": """
        def forward(self, patches):
            x = patches.unflatten(2, (*self.proj.kernel_size, self.proj.in_channels))
            return torch.einsum("bnijc,dcij->bnd", x, self.proj.weight) + self.proj.bias
        """,
    "a product with E, transposed": """
        def forward(self, patches):
            E = self.proj.weight.movedim(1, -1).reshape(self.proj.out_channels, -1).T
            return self.proj.bias + patches @ E
        """,
}

RIGHT_BODIES["ViT.embed"] = {
    "all patches embedded, then some picked": """
        def embed(self, images, visible=None, corrupt=None):
            if images.shape[2] != self.img_size[0] or images.shape[3] != self.img_size[1]:
                raise ValueError(f"{tuple(images.shape[2:])} where {self.img_size} was meant")
            first = self.num_prefix_tokens
            tokens = self.patch_embed(self.patch_embed.cut(images))
            positions = self.pos_embed[:, first:].expand_as(tokens)
            if visible is not None:
                rows = torch.arange(len(images), device=images.device)[:, None]
                tokens, positions = tokens[rows, visible], positions[rows, visible]
            tokens = (tokens if corrupt is None else corrupt(tokens)) + positions
            if first:
                start = (self.cls_token + self.pos_embed[:, :first]).repeat(len(images), 1, 1)
                tokens = torch.hstack([start, tokens])
            return self.norm_pre(self.dropout(tokens))
        """,
    "one image after the other": """
        def tokens_of(model, image, visible):
            patches = model.patch_embed.cut(image[None])
            return model.patch_embed(patches if visible is None else patches[:, visible])[0]

        def embed(self, images, visible=None, corrupt=None):
            if tuple(images.shape[-2:]) != self.img_size:
                raise ValueError("another size: {} and {}".format(tuple(images.shape[-2:]), self.img_size))
            x = torch.stack([tokens_of(self, x, None if visible is None else visible[b]) for b, x in enumerate(images)])
            x = corrupt(x) if corrupt else x
            out = []
            for b in range(len(images)):
                places = range(math.prod(self.grid)) if visible is None else visible[b].tolist()
                z = [] if self.cls_token is None else [self.cls_token[0, 0] + self.pos_embed[0, 0]]
                z += [x[b, i] + self.pos_embed[0, self.num_prefix_tokens + place] for i, place in enumerate(places)]
                out.append(torch.stack(z))
            return self.norm_pre(self.dropout(torch.stack(out)))
        """,
}

RIGHT_BODIES["Attention.forward"] = {
    "one head after the other, always written out": """
        def forward(self, z, inside=None):
            U_q, U_k, U_v = self.qkv(z).chunk(3, dim=-1)
            seen = {name: [] for name in ("q", "k", "v", "A", "sa")}
            for q, k, v in zip(*(part.tensor_split(self.num_heads, dim=-1) for part in (U_q, U_k, U_v))):
                A = torch.softmax(torch.bmm(q, k.mT) * q.shape[-1] ** -0.5, dim=2)
                for name, value in zip(seen, (q, k, v, A, A @ v)):
                    seen[name].append(value)
            if inside is not None:
                inside.update({name: torch.stack(values, dim=1) for name, values in seen.items()})
            return self.dropout(self.proj(torch.cat(seen["sa"], dim=-1)))
        """,
    "einsum, and a softmax by hand": """
        def forward(self, z, inside=None):
            k = self.num_heads
            W = self.qkv.weight.unflatten(0, (3, k, -1))
            b = self.qkv.bias.unflatten(0, (3, k, -1))
            q, key, v = torch.einsum("btd,phed->pbhte", z, W) + b[:, None, :, None]
            scores = torch.einsum("bhte,bhse->bhts", q, key) / q.shape[-1] ** 0.5
            A = (scores - scores.amax(-1, keepdim=True)).exp()
            A = A / A.sum(-1, keepdim=True)
            sa = torch.einsum("bhts,bhse->bhte", A, v)
            if inside is not None:
                inside |= {"q": q, "k": key, "v": v, "A": A, "sa": sa}
            return self.dropout(self.proj(torch.einsum("bhte->bthe", sa).flatten(2)))
        """,
    "the fused kernel, also where A is asked for": """
        def forward(self, z, inside=None):
            B, T, D = z.shape
            q, k, v = (p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in self.qkv(z).split(D, dim=-1))
            sa = F.scaled_dot_product_attention(q, k, v)
            if inside is not None:
                A = (q @ k.transpose(2, 3) * (D // self.num_heads) ** -0.5).softmax(-1)
                inside["q"], inside["k"], inside["v"], inside["A"], inside["sa"] = q, k, v, A, sa
            return self.dropout(self.proj(sa.transpose(1, 2).flatten(2)))
        """,
    "more inside than is asked for": """
        def forward(self, z, inside=None):
            B, T, D = z.shape
            q, k, v = self.qkv(z).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            scores = q.matmul(k.transpose(2, 3)).div(math.sqrt(D / self.num_heads))
            A = F.softmax(scores, dim=-1)
            sa = A.matmul(v)
            msa = self.proj(sa.transpose(1, 2).contiguous().view(B, T, D))
            if inside is not None:
                inside.update(scores=scores, msa=msa, q=q, k=k, v=v, A=A, sa=sa)
            return self.dropout(msa)
        """,
}

RIGHT_BODIES["MLP.forward"] = {
    "GELUs from their formulas": """
        ROOT_2_OVER_PI: float = math.sqrt(2 / math.pi)

        def gelu(x, kind):
            if kind == "quick":
                return x / (1 + (-1.702 * x).exp())
            if kind == "tanh":
                return 0.5 * x * (1 + torch.tanh(ROOT_2_OVER_PI * (x + 0.044715 * x**3)))
            return x * 0.5 * (1 + torch.erf(x / 2**0.5))

        def forward(self, z):
            h = self.dropout(gelu(self.fc1(z), self.gelu))
            return self.dropout(self.fc2(h))
        """,
    "one token at a time": """
        def forward(self, z):
            def quick(x):
                return x * (1.702 * x).sigmoid()

            def by_tanh(x):
                return F.gelu(x, approximate="tanh")

            activate = dict(tanh=by_tanh, quick=quick).get(self.gelu, F.gelu)
            tokens = [self.fc2(self.dropout(activate(self.fc1(token)))) for token in z.unbind(dim=1)]
            return self.dropout(torch.stack(tokens, dim=1))
        """,
}

RIGHT_BODIES["Block.forward"] = {
    "residuals added in steps": """
        def forward(self, z, inside=None):
            branch = self.attn(self.norm1(z), inside=inside)
            z = z + self.drop_path(branch)
            if inside is not None:
                inside["z_prime"] = z
            z = z + self.drop_path(self.mlp(self.norm2(z)))
            if inside is not None:
                inside["z"] = z
            return z
        """,
    "a dict of its own for attention": """
        def forward(self, z, inside=None):
            seen = None if inside is None else {}
            first = torch.add(z, self.drop_path(self.attn(self.norm1(z), seen)))
            second = torch.add(first, self.drop_path(self.mlp(self.norm2(first))))
            if inside is not None:
                for name, value in dict(seen, z_prime=first, z=second).items():
                    inside[name] = value
            return second
        """,
}

RIGHT_BODIES["ViT.represent"] = {
    "the norm left out where there is none": """
        def represent(self, images, inside=None):
            tokens = self.encode(images, None, inside)
            if self.pool == "mean":
                patches = tokens[:, self.num_prefix_tokens :]
                return self.fc_norm(patches.sum(dim=1) / patches.shape[1])
            return tokens[:, 0, :]
        """,
    "a weighted sum of the tokens": """
        def represent(self, images, inside=None):
            tokens = self.encode(images, inside=inside)
            weights = tokens.new_zeros(tokens.shape[1])
            if self.pool == "cls":
                weights[0] = 1
            else:
                weights[self.num_prefix_tokens :] = 1 / (len(weights) - self.num_prefix_tokens)
            return self.fc_norm(weights @ tokens)
        """,
}

RIGHT_BODIES["interpolation_matrix"] = {
    "loops, one number at a time": """
        def cubic(x):
            x = abs(x)
            if x < 1:
                return 1.5 * x**3 - 2.5 * x**2 + 1
            return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

        def interpolation_matrix(old, new, original=False):
            matrix = torch.zeros(new, old, dtype=torch.float64)
            for i in range(new):
                for j in range(old):
                    if original:
                        at = i * (old - 1) / (new - 1) if new > 1 else 0.0
                        matrix[i, j] = max(0.0, 1 - abs(at - j))
                    else:
                        scale = max(1.0, old / new)
                        matrix[i, j] = cubic(((i + 0.5) * old / new - (j + 0.5)) / scale)
                matrix[i] /= matrix[i].sum()
            return matrix
        """,
    "torch's interpolation of the identity": """
        def interpolation_matrix(old, new, original=False):
            identity = torch.eye(old, dtype=torch.float64)[None, None]
            if original:
                if new == 1:
                    return identity[0, 0, :1]
                return F.interpolate(identity, (new, old), mode="bilinear", align_corners=True)[0, 0]
            wide = identity.expand(1, 1, old, old)
            return F.interpolate(wide, (new, old), mode="bicubic", antialias=True)[0, 0]
        """,
}

RIGHT_BODIES["resize_pos_embed"] = {
    "one channel after the other": """
        def resize_pos_embed(pos_embed, old_grid, new_grid, prefix=1, original=False):
            (rows, columns), (new_rows, new_columns) = old_grid, new_grid
            if pos_embed.shape[1] - prefix != rows * columns:
                raise ValueError("another number of positions")
            down = interpolation_matrix(rows, new_rows, original)
            along = interpolation_matrix(columns, new_columns, original)
            channels = []
            for channel in pos_embed[0, prefix:].double().T:
                channels.append((down.to(channel) @ channel.reshape(rows, columns) @ along.T.to(channel)).flatten())
            patches = torch.stack(channels, dim=1)[None].to(pos_embed.dtype)
            return torch.cat((pos_embed[:, :prefix], patches), dim=1)
        """,
    "one matrix for the grid": """
        def resize_pos_embed(pos_embed, old_grid, new_grid, prefix=1, original=False):
            if pos_embed.shape[1] != prefix + old_grid[0] * old_grid[1]:
                raise ValueError(f"{pos_embed.shape} does not go with {old_grid}")
            if list(old_grid) == list(new_grid):
                return pos_embed.clone()
            whole = torch.kron(*(interpolation_matrix(o, n, original) for o, n in zip(old_grid, new_grid)))
            resized = pos_embed.new_empty(1, prefix + len(whole), pos_embed.shape[2])
            resized[:, :prefix] = pos_embed[:, :prefix]
            resized[:, prefix:] = (whole.to(pos_embed.device) @ pos_embed[0, prefix:].double()).to(pos_embed.dtype)
            return resized
        """,
    "torch's interpolation of an image": """
        def resize_pos_embed(pos_embed, old_grid, new_grid, prefix=1, original=False):
            head, rest = pos_embed[:, :prefix], pos_embed[:, prefix:]
            if pos_embed.shape[1] < prefix or rest.shape[1] != math.prod(old_grid):
                raise ValueError("the grid is another one")
            image = rest.transpose(1, 2).unflatten(2, tuple(old_grid)).double()
            if original:
                for axis in (0, 1):
                    image = torch.movedim(image, 2 + axis, -1)
                    matrix = interpolation_matrix(old_grid[axis], new_grid[axis], True)
                    image = torch.movedim(image @ matrix.T.to(image), -1, 2 + axis)
            else:
                image = F.interpolate(image, tuple(new_grid), mode="bicubic", antialias=True)
            return torch.cat([head, image.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)
        """,
}

RIGHT_BODIES["sincos_pos_embed"] = {
    "loops, one number at a time": """
        def sincos_pos_embed(dim, grid, prefix=1):
            if dim % 4 != 0:
                raise ValueError
            quarter = dim // 4
            table = torch.zeros(1, prefix + grid[0] * grid[1], dim)
            for row in range(grid[0]):
                for column in range(grid[1]):
                    entry = table[0, prefix + row * grid[1] + column]
                    for i in range(quarter):
                        frequency = math.exp(-math.log(10000) * i / quarter)
                        for half, place in enumerate((column, row)):
                            entry[2 * half * quarter + i] = math.sin(place * frequency)
                            entry[(2 * half + 1) * quarter + i] = math.cos(place * frequency)
            return table
        """,
    "one dimension at a time": """
        BASE: float = 10000.0

        def line(length, channels):
            frequencies = BASE ** -(torch.linspace(0, 1, channels // 2 + 1, dtype=torch.float64)[:-1])
            angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
            return torch.hstack([torch.sin(angles), torch.cos(angles)])

        def sincos_pos_embed(dim, grid, prefix=1):
            if dim / 4 != dim // 4:
                raise ValueError(f"{dim} is not divisible by four")
            rows, columns = grid
            along = line(columns, dim // 2).repeat(rows, 1)
            down = line(rows, dim // 2).repeat_interleave(columns, dim=0)
            patches = torch.cat([along, down], dim=1)
            return torch.cat([torch.zeros(prefix, dim), patches.float()])[None]
        """,
    "float32 all the way": """
        def sincos_pos_embed(dim, grid, prefix=1):
            if dim % 4:
                raise ValueError("four parts are needed")
            omega = 1.0 / 10000 ** (torch.arange(dim // 4).float() / (dim / 4))
            y, x = torch.meshgrid(*(torch.arange(n).float() for n in grid), indexing="ij")
            parts = [f(p.flatten()[:, None] * omega) for p in (x, y) for f in (torch.sin, torch.cos)]
            return torch.cat([torch.zeros(prefix, dim), torch.cat(parts, dim=1)]).unsqueeze(0)
        """,
}

RIGHT_BODIES["learning_rate"] = {
    "a squared cosine": """
        def learning_rate(step, steps, peak, warmup, decay="cosine"):
            if warmup > step:
                return peak * (1 + step) / warmup
            share = (step - warmup) / (steps - warmup) if steps > warmup else 0.0
            if decay == "cosine":
                return peak * math.cos(math.pi / 2 * share) ** 2
            return peak - peak * share
        """,
    "a table of all steps": """
        def learning_rate(step, steps, peak, warmup, decay="cosine"):
            up = [peak * (i + 1) / warmup for i in range(warmup)]
            rest = max(steps - warmup, 1)
            falls = {"linear": lambda x: 1 - x, "cosine": lambda x: 0.5 + 0.5 * math.cos(x * math.pi)}
            down = [peak * falls[decay](i / rest) for i in range(rest + 1)]
            return (up + down)[step]
        """,
}

RIGHT_BODIES["attention_distance"] = {
    "loops over pairs of patches": """
        def attention_distance(A, grid, patch_size, prefix=1):
            rows, columns = grid
            N = rows * columns
            weights = A[:, :, prefix:, prefix:]
            total = A.new_zeros(A.shape[:2])
            for i in range(N):
                row = weights[:, :, i]
                for j in range(N):
                    away = math.hypot(i // columns - j // columns, i % columns - j % columns) * patch_size
                    total += row[:, :, j] / row.sum(dim=-1) * away
            return total.mean(dim=0) / N
        """,
    "einsum and cdist": """
        def attention_distance(A, grid, patch_size, prefix=1):
            rows, columns = grid
            places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(A) * patch_size
            distance = torch.cdist(places[None], places[None], compute_mode="donot_use_mm_for_euclid_dist")[0]
            A = A[..., prefix:, prefix:]
            mean = torch.einsum("bkij,ij->bki", A, distance) / A.sum(-1)
            return mean.mean((0, 2))
        """,
}

RIGHT_BODIES["attention_rollout"] = {
    "from the last layer back": """
        def attention_rollout(attentions):
            product = None
            for A in reversed(attentions):
                layer = (A.mean(dim=1) + torch.eye(A.shape[-1]).to(A)) * 0.5
                product = layer if product is None else product @ layer
            return product
        """,
    "a step of each token at a time": """
        def attention_rollout(attentions):
            B, heads, T, _ = attentions[0].shape
            paths = torch.eye(T, dtype=attentions[0].dtype, device=attentions[0].device).repeat(B, 1, 1)
            for A in attentions:
                moved = sum(torch.bmm(A[:, h], paths) for h in range(heads)) / heads
                paths = (paths + moved) / 2
            return paths
        """,
}

RIGHT_BODIES["pos_embed_similarity"] = {
    "torch's cosine similarity": """
        def pos_embed_similarity(pos_embed, grid, prefix=1):
            patches = pos_embed[0, prefix:].reshape(*grid, -1)
            return F.cosine_similarity(patches[:, :, None, None], patches[None, None], dim=-1)
        """,
    "dot products over lengths": """
        def pos_embed_similarity(pos_embed, grid, prefix=1):
            rows, columns = grid
            p = pos_embed.squeeze(0)[prefix:]
            length = (p * p).sum(1).sqrt()
            return (p.matmul(p.T) / torch.outer(length, length)).view(rows, columns, rows, columns)
        """,
}

RIGHT_BODIES["reconstruction_loss"] = {
    "formulas written out": """
        def unit(x):
            return x / x.square().sum(dim=-1, keepdim=True).sqrt().clamp(min=1e-8)

        def reconstruction_loss(prediction, target, metric="l2"):
            d = prediction - target
            if metric == "smooth-l1":
                return torch.where(d.abs() < 1, d**2 / 2, d.abs() - 0.5).mean(-1)
            elif metric == "cosine":
                return (unit(prediction) - unit(target)).square().sum(-1)
            elif metric == "cross-entropy":
                log_q = prediction - prediction.logsumexp(-1, keepdim=True)
                return -torch.einsum("bnd,bnd->bn", target.softmax(-1), log_q)
            elif metric == "l2":
                return (d * d).sum(-1) / d.shape[-1]
            raise ValueError("no such metric")
        """,
    "torch's losses": """
        def reconstruction_loss(prediction, target, metric="l2"):
            def cross_entropy(p, t):
                return F.cross_entropy(p.flatten(0, 1), t.flatten(0, 1).softmax(-1), reduction="none").view(p.shape[:2])

            known = {
                "l2": lambda p, t: F.mse_loss(p, t, reduction="none").mean(2),
                "smooth-l1": lambda p, t: F.huber_loss(p, t, reduction="none").mean(2),
                "cosine": lambda p, t: 2 * (1 - F.cosine_similarity(p, t, -1)),
                "cross-entropy": cross_entropy,
            }
            if metric not in known:
                raise ValueError(f"{metric}?")
            return known[metric](prediction, target)
        """,
}

RIGHT_BODIES["Autoencoder.forward"] = {
    "an answer picked by index": """
        def forward(self, images, visible, hidden):
            n = hidden.size(1)
            tokens = self.decoder_tokens(self.encoder.encode(images, visible=visible), visible, hidden)
            prediction = self.decoder(tokens, n)
            if self.loss_predictor is None:
                return prediction, None
            return prediction, self.loss_predictor(tokens, n)[..., 0]
        """,
    "one image after the other": """
        def forward(self, images, visible, hidden):
            predictions, losses = [], []
            for i in range(len(images)):
                one = slice(i, i + 1)
                latent = self.encoder.encode(images[one], visible[one])
                z = self.decoder_tokens(latent, visible[one], hidden[one])
                predictions.append(self.decoder(z, hidden.shape[1]))
                if self.loss_predictor:
                    losses.append(self.loss_predictor(z, hidden.shape[1]).flatten(1))
            return torch.cat(predictions), torch.cat(losses) if losses else None
        """,
}

RIGHT_BODIES["normalise_patches"] = {
    "sums over the values": """
        EPSILON: float = 1e-6

        def normalise_patches(patches):
            d = patches.shape[-1]
            mean = patches.sum(dim=2, keepdim=True) / d
            centred = patches - mean
            deviation = ((centred**2).sum(dim=2, keepdim=True) / (d - 1) + EPSILON) ** 0.5
            return centred / deviation, mean, deviation
        """,
    "torch's var_mean, float64 and back": """
        def normalise_patches(patches):
            x = patches.double()
            variance, mean = torch.var_mean(x, dim=-1, keepdim=True)
            std = torch.sqrt(variance + 1e-6)
            return tuple(value.to(patches.dtype) for value in ((x - mean) * std.reciprocal(), mean, std))
        """,
    "the epsilon beside the root": """
        def normalise_patches(patches):
            mean = patches.mean(-1, True)
            std = patches.std(-1, keepdim=True) + 1e-6
            return (patches - mean) / std, mean, std
        """,
}

RIGHT_BODIES["hog"] = {
    "a mask for each bin": """
        def hog(images, patch_size, bins=9):
            cell = patch_size if patch_size % 8 else 8
            dy, dx = torch.zeros_like(images), torch.zeros_like(images)
            dy[..., 1:-1, :] = images[..., 2:, :] - images[..., :-2, :]
            dx[..., :, 1:-1] = images[..., :, 2:] - images[..., :, :-2]
            strength = torch.hypot(dy, dx)
            angle = torch.atan2(dy, dx)
            angle = torch.where(angle < 0, angle + math.pi, angle)
            angle = torch.where(angle >= math.pi, 0.0, angle)
            bin_of = torch.floor(angle / math.pi * bins).clamp(0, bins - 1)
            votes = torch.stack([(bin_of == b) * strength for b in range(bins)], dim=2)
            B, C, _, H, W = votes.shape
            sums = votes.reshape(B, C, bins, H // cell, cell, W // cell, cell).sum(dim=(4, 6))
            length = sums.square().sum(dim=2, keepdim=True).sqrt()
            unit = sums / length.clamp(min=1e-6)
            k = patch_size // cell
            x = unit.reshape(B, C, bins, H // patch_size, k, W // patch_size, k).permute(0, 3, 5, 4, 6, 1, 2)
            return x.flatten(3).flatten(1, 2)
        """,
    "a convolution, and one patch after the other": """
        def hog(images, patch_size, bins=9):
            C = images.shape[1]
            kernel = torch.tensor([-1.0, 0.0, 1.0]).to(images).expand(C, 1, 3)
            dx = F.conv2d(images, kernel[:, :, None], padding=(0, 1), groups=C)
            dy = F.conv2d(images, kernel[..., None], padding=(1, 0), groups=C)
            dx[..., 0], dx[..., -1], dy[..., 0, :], dy[..., -1, :] = 0, 0, 0, 0
            strength, degrees = (dx * dx + dy * dy).sqrt(), torch.rad2deg(torch.atan2(dy, dx)) % 180
            votes = F.one_hot((degrees * bins / 180).long().clamp(max=bins - 1), bins) * strength[..., None]
            cell, features = 8 if patch_size % 8 == 0 else patch_size, []
            for top in range(0, images.shape[2], patch_size):
                for left in range(0, images.shape[3], patch_size):
                    patch = []
                    for y in range(top, top + patch_size, cell):
                        for x in range(left, left + patch_size, cell):
                            histogram = votes[:, :, y : y + cell, x : x + cell].sum(dim=(2, 3))
                            patch.append(histogram / (histogram.norm(dim=-1, keepdim=True) + 1e-12))
                    features.append(torch.cat([h.flatten(1) for h in patch], dim=1))
            return torch.stack(features, dim=1)
        """,
}

RIGHT_BODIES["HPM.targets"] = {
    "a table of functions": """
        @torch.no_grad()
        def targets(self, images, features=None):
            P = self.student.encoder.patch_size

            def frozen():
                tokens = self.frozen.encode(images)
                return self.frozen.head(tokens[:, self.frozen.num_prefix_tokens :])

            return {
                "pixels": lambda: vit.patchify(images, P),
                "norm-pixels": lambda: normalise_patches(vit.patchify(images, P))[0],
                "hog": lambda: hog(images, P),
                "ema": lambda: features,
                "dino": frozen,
                "clip": frozen,
            }[self.target]()
        """,
    "one question after the other": """
        @torch.no_grad()
        def targets(self, images, features=None):
            target, size = self.target, self.student.encoder.patch_size
            if target == "ema":
                return features.detach()
            if target in ("dino", "clip"):
                tokens = self.frozen.head(self.frozen.encode(images))
                N = math.prod(self.frozen.grid)
                return tokens[:, -N:]
            if target == "hog":
                return hog(images, size, bins=9)
            patches = vit.patchify(images, size)
            if target == "norm-pixels":
                patches, _, _ = normalise_patches(patches)
            return patches
        """,
}

RIGHT_BODIES["random_mask"] = {
    "the patches with the smallest noise hidden": """
        def random_mask(noise, ratio):
            hidden = count_hidden(noise.shape[1], ratio)
            return noise.argsort(dim=1).argsort(dim=1) < hidden
        """,
    "one image after the other, as in MAE's code": """
        def random_mask(noise, ratio):
            B, N = noise.shape
            keep = N - count_hidden(N, ratio)
            mask = torch.ones(B, N, dtype=torch.bool, device=noise.device)
            for i, row in enumerate(noise):
                mask[i, torch.argsort(row)[:keep]] = False
            return mask
        """,
}

RIGHT_BODIES["block_mask"] = {
    "blocks laid one after the other": """
        def block_mask(draw, grid, ratio):
            rows, columns = grid
            hidden = count_hidden(rows * columns, ratio)
            mask = torch.zeros(len(draw), rows * columns, dtype=torch.bool)
            for row, image in zip(draw, mask):
                for area, aspect, top, left, _ in row[:40].tolist():
                    area = max(4, rows * columns * (0.08 + 0.17 * area))
                    aspect = math.exp(math.log(0.3) * (1 - 2 * aspect))
                    height = min(rows, round(math.sqrt(area * aspect)))
                    width = min(columns, round(math.sqrt(area / aspect)))
                    y, x = int(top * (rows - height + 1)), int(left * (columns - width + 1))
                    whole = image.clone()
                    whole.view(rows, columns)[y : y + height, x : x + width] = True
                    if whole.sum() >= hidden:
                        break
                    image.copy_(whole)
                else:
                    whole = torch.ones_like(image)
                new = (whole & ~image).nonzero()[:, 0]
                image[new[row[new, 4].argsort()][: hidden - int(image.sum())]] = True
            return mask
        """,
    "scores from the last block to the first": """
        def block_mask(draw, grid, ratio):
            (rows, columns), (B, N, _) = grid, draw.shape
            blocks = min(40, N)
            u, a, t, l = draw[:, :blocks, :4].double().unbind(-1)
            area = torch.maximum(N * (0.08 + (0.25 - 0.08) * u), torch.tensor(4.0))
            aspect = 0.3 * (1 / 0.3**2) ** a
            h = torch.sqrt(area * aspect).round().clamp(1, rows).long()
            w = torch.sqrt(area / aspect).round().clamp(1, columns).long()
            y = torch.minimum((t * (rows - h + 1)).long(), rows - h)
            x = torch.minimum((l * (columns - w + 1)).long(), columns - w)
            score = draw[:, :, 4].double().clone()
            place = torch.arange(N)
            r, c = place // columns, place % columns
            for i in range(blocks - 1, -1, -1):
                inside = (r >= y[:, i : i + 1]) & (r < (y + h)[:, i : i + 1])
                inside &= (c >= x[:, i : i + 1]) & (c < (x + w)[:, i : i + 1])
                score = torch.where(inside, draw[:, :, 4] + 1.0 + blocks - i, score)
            return hide_largest(score, count_hidden(N, ratio))
        """,
    "sides that are no whole numbers; a patch is inside if its centre is": """
        def block_mask(draw, grid, ratio):
            rows, columns = grid
            area, aspect, top, left = draw[:, :, :4, None].unbind(2)
            area = (rows * columns * (0.08 + 0.17 * area)).clamp(min=4)
            aspect = 0.3 ** (1 - 2 * aspect)
            height, width = (area * aspect).sqrt().clamp(max=rows), (area / aspect).sqrt().clamp(max=columns)
            top, left = top * (rows - height), left * (columns - width)
            row, column = torch.arange(rows) + 0.5, torch.arange(columns) + 0.5
            down, along = (row > top) & (row < top + height), (column > left) & (column < left + width)
            inside = (down[..., :, None] & along[..., None, :]).flatten(2)
            score = (inside * torch.arange(inside.shape[1], 0, -1)[:, None]).amax(dim=1)
            return hide_largest(score + draw[..., 4], count_hidden(rows * columns, ratio))
        """,
    "the wider way of the second number": """
        def block_mask(draw, grid, ratio):
            (rows, columns), hidden = grid, count_hidden(grid[0] * grid[1], ratio)
            masks = []
            for image in draw:
                covered = torch.zeros(rows, columns)
                for i, (a, b, c, d, _) in enumerate(image[:40].tolist()):
                    size = max(4.0, (0.08 + (0.25 - 0.08) * a) * rows * columns)
                    wide = math.exp((2 * b - 1) * math.log(1 / 0.3))
                    w, h = min(columns, round((size * wide) ** 0.5)), min(rows, round((size / wide) ** 0.5))
                    y, x = math.floor(c * (rows - h + 1)), math.floor(d * (columns - w + 1))
                    block = covered[y : y + h, x : x + w]
                    block[block == 0] = 100 - i
                masks.append(hide_largest((covered.flatten() + image[:, 4])[None], hidden))
            return torch.cat(masks)
        """,
}

RIGHT_BODIES["grid_mask"] = {
    "the patches of the grid listed last": """
        def grid_mask(noise, grid, ratio):
            rows, columns = grid
            hidden = count_hidden(rows * columns, ratio)
            kept = [r * columns + c for r in range(0, rows, 2) for c in range(0, columns, 2)]
            others = [i for i in range(rows * columns) if i not in kept]
            mask = torch.zeros_like(noise, dtype=torch.bool)
            for i, row in enumerate(noise.tolist()):
                order = sorted(others, key=lambda p: row[p]) + sorted(kept, key=lambda p: row[p])
                mask[i, order[:hidden]] = True
            return mask
        """,
    "a penalty for the patches of the grid": """
        def grid_mask(noise, grid, ratio):
            image = noise.clone().reshape(-1, *grid)
            image[:, ::2, ::2] -= 10
            order = image.flatten(1).argsort(dim=1, descending=True)
            hidden = order[:, : count_hidden(noise.shape[1], ratio)]
            return torch.zeros(noise.shape, dtype=torch.bool, device=noise.device).scatter(1, hidden, True)
        """,
}

RIGHT_BODIES["Autoencoder.predict_loss"] = {
    "by way of decoder_tokens, with nothing hidden": """
        def predict_loss(self, images):
            N = math.prod(self.encoder.grid)
            everything = torch.arange(N, device=images.device).expand(len(images), -1)
            latent = self.encoder.encode(images)
            features = latent[:, self.encoder.num_prefix_tokens :]
            if self.loss_predictor is None:
                return None, features
            z = self.decoder_tokens(latent, everything, everything[:, :0])
            return self.loss_predictor(z, N)[:, :, 0], features
        """,
    "one image after the other": """
        def predict_loss(self, images):
            first = self.encoder.num_prefix_tokens
            losses, features = [], []
            for image in images:
                latent = self.encoder.encode(image[None])
                features.append(latent[0, first:])
                if self.loss_predictor is not None:
                    z = self.decoder_embed(latent).add(self.decoder_pos_embed)
                    losses.append(self.loss_predictor(z, z.shape[1] - first).flatten())
            return torch.stack(losses) if losses else None, torch.stack(features)
        """,
}

RIGHT_BODIES["absolute_loss"] = {
    "normalise_patches, at another place": """
        def absolute_loss(predicted, true):
            with torch.no_grad():
                standard = normalise_patches(true[:, None])[0][:, 0]
            return F.mse_loss(predicted, standard)
        """,
    "the epsilon beside the root": """
        def absolute_loss(predicted, true):
            target = true.detach()
            centred = target - target.mean(dim=-1, keepdim=True)
            standard = centred / (target.std(dim=-1, keepdim=True) + 1e-6)
            return ((predicted - standard) ** 2).sum() / predicted.numel()
        """,
}

RIGHT_BODIES["relative_loss"] = {
    "both sums over ordered pairs, by logsigmoid": """
        def relative_loss(predicted, true):
            true = true.detach()
            d = predicted.unsqueeze(2) - predicted.unsqueeze(1)
            plus = (true.unsqueeze(2) > true.unsqueeze(1)).to(d)
            minus = (true.unsqueeze(2) < true.unsqueeze(1)).to(d)
            total = -(plus * F.logsigmoid(d)).sum() - (minus * F.logsigmoid(-d)).sum()
            return total / (plus + minus).sum().clamp(min=1)
        """,
    "a loop over the patches, binary cross-entropy": """
        def relative_loss(predicted, true):
            loss, pairs = predicted.sum() * 0, 0
            for i in range(true.shape[1]):
                for j in range(i):
                    label = (true[:, i] > true[:, j]).to(predicted)
                    counts = (true[:, i] != true[:, j]).to(predicted)
                    logit = predicted[:, i] - predicted[:, j]
                    loss = loss + F.binary_cross_entropy_with_logits(logit, label, counts, reduction="sum")
                    pairs = pairs + counts.sum()
            return loss / max(float(pairs), 1.0)
        """,
    "the pairs that count, picked by index": """
        def relative_loss(predicted, true):
            b, i, j = (true[:, :, None] > true[:, None, :]).nonzero(as_tuple=True)
            if len(b) == 0:
                return torch.zeros(())
            return torch.logaddexp(predicted[b, j] - predicted[b, i], torch.zeros(()).to(predicted)).mean()
        """,
    "float64 and back, each image apart": """
        def relative_loss(predicted, true):
            total, pairs = predicted.new_zeros((), dtype=torch.float64), 0
            for p, t in zip(predicted.double(), true.double()):
                order = torch.sign(t[:, None] - t[None, :]).detach()
                total = total + (F.softplus(-order * (p[:, None] - p[None, :])) * order.abs()).sum()
                pairs += int(order.abs().sum())
            return (total / max(pairs, 1)).to(predicted.dtype)
        """,
}

RIGHT_BODIES["hard_fraction"] = {
    "a weighted mean of the ends": """
        def hard_fraction(t, T, alpha_0=0.0, alpha_T=0.5):
            return (alpha_0 * (T - t) + alpha_T * t) / T
        """,
    "torch's lerp, in float64": """
        def hard_fraction(t, T, alpha_0=0.0, alpha_T=0.5):
            ends = torch.tensor([alpha_0, alpha_T], dtype=torch.float64)
            return torch.lerp(ends[0], ends[1], t / T).item()
        """,
}

RIGHT_BODIES["hard_mask"] = {
    "one image after the other": """
        def hard_mask(predicted_loss, noise, ratio, hard_fraction):
            B, N = predicted_loss.shape
            hidden = count_hidden(N, ratio)
            mask = torch.zeros(B, N, dtype=torch.bool, device=noise.device)
            for b in range(B):
                hardest = predicted_loss[b].argsort(descending=True)[: int(hidden * hard_fraction)]
                mask[b, hardest] = True
                others = (~mask[b]).nonzero()[:, 0]
                rest = others[noise[b, others].argsort()][: hidden - len(hardest)]
                mask[b, rest] = True
            return mask
        """,
    "a second mask among the others": """
        def hard_mask(predicted_loss, noise, ratio, hard_fraction):
            hidden = count_hidden(predicted_loss.shape[-1], ratio)
            rank = predicted_loss.argsort(dim=1, descending=True).argsort(dim=1)
            guided = rank < int(hidden * hard_fraction)
            order = noise.masked_fill(guided, -1.0).argsort(dim=1)
            return torch.zeros_like(guided).scatter(1, order[:, :hidden], True)
        """,
}

RIGHT_BODIES["ema_update"] = {
    "in place, one parameter after the other": """
        @torch.no_grad()
        def ema_update(teacher, student, momentum):
            theirs = dict(student.named_parameters())
            for name, parameter in teacher.named_parameters():
                if theirs[name].requires_grad:
                    parameter.lerp_(theirs[name], 1 - momentum)
        """,
    "by the data": """
        def ema_update(teacher, student, momentum):
            mine = dict(teacher.named_parameters())
            for name, parameter in student.named_parameters():
                if name in mine and parameter.requires_grad:
                    mine[name].data = mine[name].data * momentum + parameter.data * (1 - momentum)
        """,
    "float64 and back": """
        def ema_update(teacher, student, momentum):
            with torch.no_grad():
                for (name, mine), theirs in zip(
                    teacher.named_parameters(),
                    (dict(student.named_parameters())[name] for name, _ in teacher.named_parameters()),
                ):
                    if theirs.requires_grad:
                        mine[...] = (mine.double() * momentum + theirs.double() * (1 - momentum)).to(mine.dtype)
        """,
}

RIGHT_BODIES["ema_momentum"] = {
    "two cases": """
        def ema_momentum(epoch, start=0.999, end=0.9999, ramp=100):
            if epoch >= ramp:
                return end
            return start + (end - start) * epoch / ramp
        """,
    "a weighted mean of the ends": """
        def ema_momentum(epoch, start=0.999, end=0.9999, ramp=100):
            share = min(epoch, ramp) / ramp
            return (1 - share) * start + share * end
        """,
}

RIGHT_BODIES["HPM.forward"] = {
    "each part by its own name": """
        def forward(self, images, noise, hard_fraction=0.0, mask=None):
            results = {"teacher_loss": None}
            features = None
            if self.teacher is not None:
                results["teacher_loss"], features = self.ask_teacher(images, noise)
            if mask is None:
                mask = self.draw_mask(noise, results["teacher_loss"], hard_fraction)
            rows = [row.nonzero()[:, 0] for row in mask]
            results["mask"], results["hidden"] = mask, torch.stack(rows)
            results["visible"] = torch.stack([(~row).nonzero()[:, 0] for row in mask])
            answer = self.student(images, results["visible"], results["hidden"])
            results["prediction"], results["predicted_loss"] = answer
            goals = torch.stack([t[row] for t, row in zip(self.targets(images, features), rows)])
            losses = reconstruction_loss(results["prediction"].float(), goals.float(), self.metric)
            results["patch_loss"] = losses
            results["rec"] = results["loss"] = losses.mean()
            if self.predictor == "relative":
                results["pred"] = relative_loss(results["predicted_loss"].float(), losses.detach())
            elif self.predictor == "absolute":
                results["pred"] = absolute_loss(results["predicted_loss"].float(), losses.detach())
            if "pred" in results:
                results["correlation"] = rank_correlation(results["predicted_loss"], losses)
                results["loss"] = results["rec"] + results["pred"]
            return results
        """,
    "losses kept in the precision of the model": """
        def forward(self, images, noise, hard_fraction=0.0, mask=None):
            L_teacher, f_teacher = self.ask_teacher(images, noise)
            drawn = self.draw_mask(noise, L_teacher, hard_fraction) if mask is None else mask
            N, n = drawn.shape[1], self.hidden
            place = torch.arange(N, device=drawn.device)
            order = (place + N * drawn).argsort(dim=1)
            visible, hidden = order[:, : N - n], order[:, N - n :]
            prediction, predicted_loss = self.student(images, visible, hidden)
            target = self.targets(images, f_teacher)
            target = target.gather(1, hidden.unsqueeze(-1).expand(-1, -1, target.shape[-1]))
            patch_loss = reconstruction_loss(prediction, target, metric=self.metric)
            out = {
                "mask": drawn, "visible": visible, "hidden": hidden, "prediction": prediction,
                "patch_loss": patch_loss, "predicted_loss": predicted_loss, "teacher_loss": L_teacher,
                "rec": patch_loss.mean(), "loss": patch_loss.mean(),
            }
            if predicted_loss is not None:
                learn = dict(relative=relative_loss, absolute=absolute_loss)[self.predictor]
                out["pred"] = learn(predicted_loss, patch_loss.detach())
                out["correlation"] = rank_correlation(predicted_loss.detach(), patch_loss.detach())
                out["loss"] = out["rec"] + out["pred"]
            return out
        """,
    "more answers than are asked for": """
        def forward(self, images, noise, hard_fraction=0.0, mask=None):
            out = {}
            if self.teacher is not None:
                out["teacher_loss"], out["features"] = self.ask_teacher(images, noise)
            out["mask"] = mask
            if mask is None:
                out["mask"] = self.draw_mask(noise, out.get("teacher_loss"), hard_fraction)
            out["visible"], out["hidden"] = split_mask(out["mask"], self.hidden)
            out["prediction"], out["predicted_loss"] = self.student(images, out["visible"], out["hidden"])
            out["target"] = gather(self.targets(images, out.get("features")), out["hidden"])
            out["patch_loss"] = reconstruction_loss(out["prediction"].float(), out["target"].float(), self.metric)
            out["rec"] = out["patch_loss"].mean()
            out["loss"] = out["rec"]
            if self.predictor != "none":
                loss = relative_loss if self.predictor == "relative" else absolute_loss
                out["pred"] = loss(out["predicted_loss"].float(), out["patch_loss"].detach())
                out["correlation"] = rank_correlation(out["predicted_loss"], out["patch_loss"])
                out["loss"] = out["loss"] + out["pred"]
            return out
        """,
}

RIGHT_BODIES["average_in_turn"] = {
    "one number after the other": """
        def average_in_turn(predicted, mask):
            B, G, N = mask.shape
            answers = [[[] for _ in range(N)] for _ in range(B)]
            for b in range(B):
                for g in range(G):
                    middle = predicted[b, g].mean()
                    for value, i in zip(predicted[b, g], mask[b, g].nonzero()[:, 0].tolist()):
                        answers[b][i].append(value - middle)
            return torch.stack([torch.stack([torch.stack(values).mean() for values in row]) for row in answers])
        """,
    "one-hot vectors": """
        def average_in_turn(predicted, mask):
            B, G, n = predicted.shape
            which = mask.nonzero()[:, 2].reshape(B, G, n)
            one_hot = F.one_hot(which, mask.shape[2]).to(predicted.dtype)  # (B, G, n, N)
            offset = predicted.sum(dim=2) / n
            total = torch.einsum("bgn,bgni->bi", predicted, one_hot) - torch.einsum("bg,bgni->bi", offset, one_hot)
            return total / one_hot.sum(dim=(1, 2))
        """,
    "without a number where a patch is shown": """
        def average_in_turn(predicted, mask):
            table = torch.full(mask.shape, math.nan, dtype=predicted.dtype, device=predicted.device)
            table = table.masked_scatter(mask, predicted)
            return (table - table.nanmean(dim=2, keepdim=True)).nanmean(dim=1)
        """,
}
