"""Masked patch prediction: how the ViT paper pre-trains without labels (section 4.6 and appendix B.1.2).

Half of the embedded patches are corrupted, as BERT corrupts words, and of each of these the model names the mean
colour, out of the 512 that 3 bits a channel can tell apart. The encoder sees all tokens, corrupted ones too. MAE, in
hpm.py, shows it the intact ones alone, and asks for every pixel of the others.

Letters in shapes: B images, N patches, C channels, D the encoder's width.
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


def choose_half(noise):
    """The half of the patches with the largest numbers: (B, N) -> indices (B, N // 2)."""
    return noise.topk(noise.shape[1] // 2, dim=1).indices


def corrupt(tokens, chosen, mask_token, noise):
    """Corrupt the chosen ones of the embedded patches: (B, N, D), indices (B, n) -> (B, N, D).

    80 % become the mask token (1, 1, D), 10 % another patch of the same image, 10 % stay as they are.
    noise (B, N, 2): uniform numbers from [0, 1), the first for what, the second for which other patch.
    """
    N = tokens.shape[1]
    what, place = gather(noise, chosen).unbind(dim=2)  # each (B, n)
    other = (chosen + 1 + (place * (N - 1)).long()) % N  # any but itself
    kept, other, what = gather(tokens, chosen), gather(tokens, other), what[..., None]  # (B, n, D), and (B, n, 1)
    new = torch.where(what < 0.8, mask_token.to(tokens.dtype), torch.where(what < 0.9, other, kept))
    return tokens.scatter(1, chosen[..., None].expand_as(new), new)


class MPP(nn.Module):
    """An encoder (a `vit.ViT` without head), the mask token, and a linear layer from tokens to colours.

    mean, std: those that the images are normalised with. noise_columns: how many numbers of noise each patch needs.
    """

    noise_columns = 3

    def __init__(self, encoder, mean, std):
        super().__init__()
        self.encoder = encoder
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values), persistent=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.dim))
        self.head = nn.Linear(encoder.dim, 2 ** (BITS * len(mean)))
        nn.init.normal_(self.mask_token, std=0.02)
        vit.init_weights(self.head)

    def forward(self, images, noise):
        """One step's values by name: loss (cross-entropy of the corrupted patches' colours), rec (the same), accuracy.

        images (B, C, H, W); noise (B, N, 3): uniform numbers from [0, 1), for which patches, into what, from where.
        Raises ValueError for noise of another shape.
        """
        encoder, wanted = self.encoder, (len(images), math.prod(self.encoder.grid), self.noise_columns)
        if noise.shape != wanted:
            raise ValueError(f"noise has the shape {tuple(noise.shape)}; these images need {wanted}")
        chosen = choose_half(noise[..., 0])  # (B, N // 2)
        z = encoder.encode(images, corrupt=lambda tokens: corrupt(tokens, chosen, self.mask_token, noise[..., 1:]))
        z = z[:, encoder.num_prefix_tokens :]  # (B, N, D)
        logits = self.head(gather(z, chosen)).float()  # (B, N // 2, colours)
        colours = mean_colour(images, encoder.patch_size, self.mean, self.std).gather(1, chosen)
        loss = F.cross_entropy(logits.flatten(0, 1), colours.flatten())
        return dict(loss=loss, rec=loss, accuracy=(logits.argmax(dim=2) == colours).float().mean())


def create(arch, img_size, mean, std, **options):
    """Masked patch prediction with the encoder `arch` of `vit.ARCHS`; options: of `vit.ViT`.

    Raises ValueError for an arch that is no plain ViT (convolutions would look into the corrupted patches), and for an
    image of less than two patches.
    """
    if "_vit_" in arch or arch.startswith("resnet"):
        raise ValueError(f"{arch} has convolutions, which would see corrupted patches; use a plain ViT, as vit_b16")
    encoder = vit.create(arch, img_size, 0, len(mean), **options)
    if math.prod(encoder.grid) < 2:
        raise ValueError("masked patch prediction needs at least two patches; use larger images")
    return MPP(encoder, mean, std)
