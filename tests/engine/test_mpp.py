"""What masked patch prediction promises (ViT, appendix B.1.2): the colours, the corruption, the loss, each by loops."""

import math

import numpy as np
import pytest
import torch

import data
import mpp
import vit
from tests.test_vit import equal, filled, linear_loops, random

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
SMALL = dict(patch_size=2, dim=8, depth=2, num_heads=2)


def colour_loops(image, P):
    """One image (C, H, W) of pixels in [0, 1] -> the class of each patch's mean colour."""
    C, H, W = image.shape
    classes = []
    for top in range(0, H, P):
        for left in range(0, W, P):
            number = 0
            for c in range(C):
                step = min(7, int(8 * image[c, top : top + P, left : left + P].mean()))
                number = 8 * number + step
            classes.append(number)
    return classes


@pytest.mark.parametrize("channels", [1, 3])
def test_the_mean_colour_has_3_bits_a_channel(channels):
    """512 colours, 8 greys; white, of mean 1, is the last one."""
    pixels = torch.rand(3, channels, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pixels[1, :, :4, :4], pixels[2, :, :4, :4] = 1.0, 0.0
    mean, std = MEAN[:channels], STD[:channels]
    images = data.normalise(255 * pixels, mean, std)
    ours = mpp.mean_colour(images, 4, mean, std)
    assert ours.tolist() == [colour_loops(image, 4) for image in pixels.numpy()]
    assert (ours[1, 0], ours[2, 0]) == (8**channels - 1, 0)


def test_half_of_the_patches_are_corrupted_in_three_ways():
    """One draw says which patches, one into what, one which other patch; all others stay."""
    tokens, mask_token, draw = random(4, 10, 3), random(1, 1, 3, seed=9), torch.rand(3, 4, 10).double()
    draw[1, 0] = torch.tensor([0.0, 0.79, 0.81, 0.89, 0.91, 0.99, 0.5, 0.85, 0.95, 0.3])
    which = mpp.half(draw[0])
    ours = mpp.corrupt(tokens, which, mask_token, draw[1:])
    for b in range(4):
        oracle = tokens[b].clone()
        chosen = sorted(range(10), key=lambda i: -draw[0, b, i])[:5]
        for i in chosen:
            if draw[1, b, i] < 0.8:
                oracle[i] = mask_token[0, 0]
            elif draw[1, b, i] < 0.9:
                oracle[i] = tokens[b, (i + 1 + int(9 * draw[2, b, i])) % 10]
        assert sorted(which[b].tolist()) == sorted(chosen)
        equal(ours[b], oracle.numpy())


def test_the_shares_are_80_10_and_10_percent_and_the_other_patch_is_another_one():
    tokens = torch.arange(1.0, 201).expand(1000, -1)[..., None]
    draw = torch.rand(3, 1000, 200)
    which = mpp.half(draw[0])
    ours = mpp.corrupt(tokens, which, torch.zeros(1, 1, 1), draw[1:])
    assert which.shape == (1000, 100)
    before, after = (v.squeeze(-1).gather(1, which) for v in (tokens, ours))
    masked, kept = (after == 0).float().mean().item(), (after == before).float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.01)
    assert kept == pytest.approx(0.1, abs=0.01), "a patch that is replaced by itself is kept"
    assert len(after[(after != 0) & (after != before)].unique()) == 200


def test_the_loss_is_the_cross_entropy_of_the_corrupted_patches_colours():
    """From the tokens after the last LayerNorm, without the class token."""
    model = filled(mpp.create("vit_b16", (4, 6), MEAN, STD, **SMALL))
    pixels = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    images = data.normalise(255 * pixels, MEAN, STD).double()
    out = model(images, torch.Generator().manual_seed(3))
    draw = torch.rand(3, 2, 6, generator=torch.Generator().manual_seed(3))
    encoder, losses, hits = model.encoder, [], []
    with torch.no_grad():
        which = mpp.half(draw[0])
        tokens = mpp.corrupt(encoder.patch_embed(vit.patchify(images, 2)), which, model.mask_token, draw[1:])
        tokens = torch.cat([encoder.cls_token.expand(2, -1, -1), tokens], dim=1) + encoder.pos_embed
        z = encoder.norm(encoder.blocks[1](encoder.blocks[0](tokens))).numpy()
    for b in range(2):
        logits = linear_loops(z[b, 1:], model.head.weight.detach().numpy(), model.head.bias.detach().numpy())
        colours = colour_loops(pixels[b].numpy(), 2)
        for i in which[b].tolist():
            losses.append(math.log(sum(math.exp(v) for v in logits[i])) - logits[i][colours[i]])
            hits.append(logits[i].argmax() == colours[i])
    assert out["loss"].item() == pytest.approx(np.mean(losses), abs=1e-5)
    assert out["accuracy"].item() == pytest.approx(np.mean(hits))


def test_a_slice_of_a_batch_is_corrupted_as_in_the_whole_batch():
    """So gradients of micro-batches, and of processes, add up to that of the batch."""
    model, images = filled(mpp.create("vit_b16", (4, 6), MEAN, STD, **SMALL)), random(4, 3, 4, 6)
    whole = model(images, torch.Generator().manual_seed(0))["loss"]
    parts = [
        model(images[here], torch.Generator().manual_seed(0), 4, here)["loss"] for here in (slice(0, 2), slice(2, 4))
    ]
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), abs=1e-6)


def test_convolutions_before_the_patches_are_refused():
    with pytest.raises(ValueError, match="hidden patches"):
        mpp.create("r50_vit_b16", 224, MEAN, STD)


def test_a_real_batch_is_learned():
    """Sixteen photographs at 32 pixels: the loss starts near log 512 and falls, and everything has a gradient."""
    torch.manual_seed(0)
    photos = data.photos((32, 32)).test
    images = data.normalise(photos.images[::4], photos.mean, photos.std)
    model = mpp.create("vit_micro4", 32, photos.mean, photos.std)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        loss = model(images, torch.Generator().manual_seed(step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(512), abs=0.5)
    assert np.mean(losses[-5:]) < 0.85 * losses[0]
    assert [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()] == []
