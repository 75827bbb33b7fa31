"""Masked patch prediction: how the ViT paper pre-trains without labels (section 4.6 and appendix B.1.2).

Half of the embedded patches are corrupted, as BERT corrupts words, and of each of these the model names the mean
colour, out of the 512 that 3 bits a channel can tell apart. The encoder sees all tokens, corrupted ones too. MAE, in
hpm.py, shows it the intact ones alone, and asks for every pixel of the others.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

import vit
from vit import gather

BITS = 3  # of each channel of a colour


def mean_colour(images, patch_size, mean, std):
    """The class of every patch's mean colour: (B, C, H, W) -> (B, N) int64 in [0, 8^C).

    images: normalised with mean and std, a number a channel, of pixels in [0, 1]. Each channel's mean falls into one of
    8 equal steps; the first channel is the highest digit.
    """
    colours = vit.patchify(images.float(), patch_size).unflatten(2, (-1, images.shape[1])).mean(dim=2)  # (B, N, C)
    colours = colours * torch.as_tensor(std).to(colours) + torch.as_tensor(mean).to(colours)
    steps = (colours * 2**BITS).long().clamp(0, 2**BITS - 1)
    digits = 2 ** (BITS * torch.arange(images.shape[1] - 1, -1, -1, device=images.device))  # 64, 8, 1
    return (steps * digits).sum(dim=2)


def half(draw):
    """The half of the patches with the largest numbers: (B, N) -> indices (B, N // 2)."""
    return draw.topk(draw.shape[1] // 2, dim=1).indices


def corrupt(tokens, which, mask_token, draw):
    """Corrupt these embedded patches: (B, N, D), (B, n) -> (B, N, D).

    80 % become the mask token (1, 1, D), 10 % another patch of the same image, 10 % stay as they are.
    draw (2, B, N): uniform numbers from [0, 1) for what, and for which other patch.
    """
    N = tokens.shape[1]
    into = draw[0].gather(1, which)[..., None]  # (B, n, 1)
    other = (which + 1 + (draw[1].gather(1, which) * (N - 1)).long()) % N  # any but itself
    kept, other = gather(tokens, which), gather(tokens, other)  # (B, n, D)
    new = torch.where(into < 0.8, mask_token.to(tokens.dtype), torch.where(into < 0.9, other, kept))
    return tokens.scatter(1, which[..., None].expand_as(new), new)


class MPP(nn.Module):
    """An encoder (a `vit.ViT` without head), the mask token, and a linear layer from tokens to colours.

    mean, std: those that the images are normalised with.
    """

    def __init__(self, encoder, mean, std):
        super().__init__()
        self.encoder = encoder
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values), persistent=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.dim))
        self.head = nn.Linear(encoder.dim, 2 ** (BITS * len(mean)))
        nn.init.normal_(self.mask_token, std=0.02)
        vit.init_weights(self.head)

    def forward(self, images, generator=None, batch=None, here=slice(None)):
        """One step's values by name: loss (cross-entropy of the corrupted patches' colours), rec (the same), accuracy.

        As in `hpm.HPM.forward`, numbers are drawn for `batch` images, of which these are the slice `here`.
        """
        encoder, N = self.encoder, math.prod(self.encoder.grid)
        draw = torch.rand(3, batch or len(images), N, generator=generator, device=images.device)[:, here]
        which = half(draw[0])
        z = encoder.encode(images, change=lambda tokens: corrupt(tokens, which, self.mask_token, draw[1:]))
        z = z[:, encoder.prefix :]  # (B, N, D)
        logits = self.head(gather(z, which)).float()  # (B, N // 2, colours)
        colours = mean_colour(images, encoder.patch_size, self.mean, self.std).gather(1, which)
        loss = F.cross_entropy(logits.flatten(0, 1), colours.flatten())
        return dict(loss=loss, rec=loss, accuracy=(logits.argmax(dim=2) == colours).float().mean())


def create(arch, img_size, mean, std, **options):
    """Masked patch prediction with the encoder `arch` of `vit.ARCHS`; options: of `vit.ViT`.

    Raises ValueError for an arch that is no plain ViT, and for an image of less than two patches.
    """
    vit.check_plain(arch)
    encoder = vit.create(arch, img_size, 0, len(mean), **options)
    if math.prod(encoder.grid) < 2:
        raise ValueError("masked patch prediction needs at least two patches; use larger images")
    return MPP(encoder, mean, std)
