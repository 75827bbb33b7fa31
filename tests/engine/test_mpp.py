"""What masked patch prediction promises (ViT, appendix B.1.2): the colours, the corruption, the loss, each by loops."""

import math

import numpy as np
import pytest
import torch

import data
from related import mpp
from tests import oracles
from tests.oracles import equal, filled, random

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
SMALL = dict(patch_size=2, dim=8, depth=2, num_heads=2)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


def corrupt_loops(tokens, chosen, mask_token, noise):
    """tokens (N, D) of one image: below 0.8 the mask token, below 0.9 the patch that is this many places on."""
    out, N = tokens.copy(), len(tokens)
    for i in chosen:
        if noise[i][0] < 0.8:
            out[i] = mask_token
        elif noise[i][0] < 0.9:
            out[i] = tokens[(i + 1 + int((N - 1) * noise[i][1])) % N]
    return out


def normalised(pixels, mean, std):
    """Pixels in [0, 1] (B, C, H, W) as a model sees them."""
    return (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_the_mean_colour_has_3_bits_a_channel(channels):
    """512 colours, 8 greys; white, of mean 1, is the last one. None is at a step."""
    pixels = uniform(3, channels, 8, 12) * torch.tensor([0.3, 0.7, 1.0]).view(-1, 1, 1, 1)
    pixels[1, :, :4, :4], pixels[2, :, :4, :4] = 1.0, 0.0
    mean, std = MEAN[:channels], STD[:channels]
    images = normalised(pixels, mean, std)
    ours = mpp.mean_colour(images, 4, mean, std)
    assert ours.tolist() == [colour_loops(image, 4) for image in pixels.numpy()]
    assert (ours[1, 0], ours[2, 0]) == (8**channels - 1, 0)


def test_colours_stay_in_range_beyond_white_and_black():
    """Rounding, and resizing with overshoots, leave [0, 1]."""
    images = torch.cat([torch.full((1, 3, 2, 2), -9.0), torch.full((1, 3, 2, 2), 9.0)])
    assert mpp.mean_colour(images, 2, MEAN, STD).tolist() == [[0], [511]]


def test_colours_are_named_on_the_device():
    """(meta: a device without numbers.)"""
    images = torch.empty(2, 3, 4, 4, device="meta")
    assert mpp.mean_colour(images, 2, MEAN, STD).device.type == "meta"


def test_half_of_the_patches_are_chosen_by_the_noise():
    """The half with the largest numbers; of an odd count the smaller half."""
    for N in (2, 9, 10):
        noise = uniform(4, N)
        chosen = mpp.choose_half(noise)
        assert chosen.shape == (4, N // 2)
        for row, places in zip(noise.tolist(), chosen.tolist(), strict=True):
            assert sorted(places) == sorted(sorted(range(N), key=lambda i: -row[i])[: N // 2])


@pytest.mark.parametrize("N", [2, 10])
def test_chosen_patches_are_corrupted_in_three_ways(N):
    """One number says into what, one which other patch; all others stay."""
    tokens, mask_token, noise = random(4, N, 3), random(1, 1, 3, seed=9), uniform(4, N, 2)
    edges = torch.tensor([0.0, 0.79, 0.8, 0.81, 0.89, 0.9, 0.91, 0.99, 0.85, 0.95], dtype=torch.float64)
    noise[0, :, 0] = edges[:N]
    noise[1, :, 0] = 0.85
    for chosen in (torch.arange(N).expand(4, -1), mpp.choose_half(uniform(4, N, seed=1))):
        ours = mpp.corrupt(tokens, chosen, mask_token, noise)
        for b in range(4):
            oracle = corrupt_loops(tokens[b].numpy(), chosen[b].tolist(), mask_token[0, 0].numpy(), noise[b].tolist())
            equal(ours[b], oracle)


def test_80_10_and_10_percent_and_another_patch_is_another_one():
    tokens = torch.arange(1.0, 201).expand(1000, -1)[..., None]
    chosen = mpp.choose_half(uniform(1000, 200))
    ours = mpp.corrupt(tokens, chosen, torch.zeros(1, 1, 1), uniform(1000, 200, 2, seed=1))
    before, after = (v.squeeze(-1).gather(1, chosen) for v in (tokens, ours))
    masked, kept = (after == 0).float().mean().item(), (after == before).float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.01)
    assert kept == pytest.approx(0.1, abs=0.01), "a patch that is replaced by itself is kept"
    assert len(after[(after != 0) & (after != before)].unique()) == 200


def test_the_loss_is_the_cross_entropy_of_corrupted_patches_colours():
    """From the tokens after the last LayerNorm, without the class token. The loss is float32: about 7 digits."""
    model = filled(mpp.create("vit_b16", (4, 6), MEAN, STD, **SMALL))
    model.head.bias.data = random(512, seed=4)
    pixels, noise = uniform(2, 3, 4, 6, seed=1), uniform(2, 6, 3, seed=3)
    images = normalised(pixels, MEAN, STD).double()
    w, encoder, losses, hits = oracles.arrays(model), model.encoder, [], []
    with torch.no_grad():  # the answers of half of the patches become right ones
        z = encoder.encode(images)[0, 1:]
        model.head.bias[colour_loops(pixels[0].numpy(), 2)[2]] += 2 * model.head(z).abs().max()
    out = model(images, noise)
    for b in range(2):
        chosen = sorted(range(6), key=lambda i: -noise[b, i, 0])[:3]
        tokens = oracles.patch_embed_loops(
            images[b].numpy(), w["encoder.patch_embed.proj.weight"], w["encoder.patch_embed.proj.bias"]
        )
        tokens = corrupt_loops(tokens, chosen, w["mask_token"][0, 0], noise[b, :, 1:].tolist())
        z = np.concatenate([w["encoder.cls_token"][0], tokens]) + w["encoder.pos_embed"][0]
        for block in range(2):
            z = oracles.block_loops(z, oracles.arrays(encoder, f"blocks.{block}."), 2)
        z = oracles.layer_norm_loops(z, w["encoder.norm.weight"], w["encoder.norm.bias"])
        logits = oracles.linear_loops(z[1:], w["head.weight"], model.head.bias.detach().numpy())
        colours = colour_loops(pixels[b].numpy(), 2)
        for i in chosen:
            top = max(logits[i])
            losses.append(top + math.log(sum(math.exp(v - top) for v in logits[i])) - logits[i][colours[i]])
            hits.append(logits[i].argmax() == colours[i])
    assert 0 < sum(hits) < 6, "some answers are to be right, some wrong"
    assert out["loss"].item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert out["rec"] is out["loss"]
    assert out["accuracy"].item() == pytest.approx(np.mean(hits))


def test_a_part_of_a_batch_is_corrupted_as_in_the_whole():
    """So gradients of micro-batches, and of processes, add up to that of the batch."""
    model, images = filled(mpp.create("vit_b16", (4, 6), MEAN, STD, **SMALL)), random(4, 3, 4, 6)
    noise = data.draw_noise(4, 6, model.noise_columns, 0, 0, "cpu")
    whole = model(images, noise)["loss"].item()
    parts = [model(images[rows], noise[rows])["loss"].item() for rows in (slice(0, 2), slice(2, 4))]
    assert sum(parts) / 2 == pytest.approx(whole, rel=1e-5)


def test_noise_of_another_shape_is_refused():
    model = mpp.create("vit_b16", (4, 6), MEAN, STD, **SMALL)
    for shape in ((2, 6), (2, 6, 2), (2, 5, 3), (1, 6, 3)):
        with pytest.raises(ValueError, match=r"noise has the shape .*need \(2, 6, 3\)"):
            model(random(2, 3, 4, 6).float(), torch.rand(shape))


def test_a_step_never_waits_for_the_device(waits):
    model = mpp.create("vit_b16", (4, 6), MEAN, STD, **SMALL)
    images, noise = random(2, 3, 4, 6).float(), torch.rand(2, 6, 3)
    with waits() as seen:
        model(images, noise)["loss"].backward()
    assert seen.reads == seen.copies == []


@pytest.mark.parametrize("arch", ["r50_vit_b16", "resnet50", "vit_b17"])
def test_an_arch_that_is_no_plain_vit_is_refused(arch):
    """Convolutions before the patches would look into the corrupted ones."""
    with pytest.raises(ValueError, match=arch):
        mpp.create(arch, 224, MEAN, STD)


def test_two_patches_are_enough_one_is_not():
    assert mpp.create("vit_b16", (2, 4), MEAN, STD, **SMALL).encoder.grid == (1, 2)
    with pytest.raises(ValueError, match="^masked patch prediction needs at least two patches; use larger images$"):
        mpp.create("vit_b16", 2, MEAN, STD, **SMALL)


def test_a_fresh_model_has_small_mask_tokens_and_a_xavier_head():
    """8 greys; N(0, 0.02) for the mask token, Xavier for the head, zeros for its bias; colours are in no checkpoint."""
    torch.manual_seed(0)
    model = mpp.create("vit_micro4", 28, MEAN[:1], STD[:1])
    assert model.head.out_features == 8
    assert model.encoder.patch_embed.proj.in_channels == 1
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.5)
    assert not model.head.bias.any()
    bound = math.sqrt(6 / (64 + 8))
    assert 0.9 * bound < model.head.weight.abs().max().item() <= bound
    assert {"mean", "std"}.isdisjoint(model.state_dict())


def test_a_real_batch_is_learned():
    """Eight photographs at 32 pixels: the loss starts near log 512 and falls, and everything has a gradient."""
    torch.manual_seed(0)
    photos = data.photos((32, 32)).test
    images = data.normalise(photos.images[::8], photos.mean, photos.std)
    model = mpp.create("vit_micro4", 32, photos.mean, photos.std)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(25):
        loss = model(images, uniform(len(images), 64, 3, seed=step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(512), abs=0.5)
    assert np.mean(losses[-5:]) < 0.85 * losses[0]
    assert [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()] == []
