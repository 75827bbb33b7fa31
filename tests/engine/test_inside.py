"""What the studies of ViT's figures 3 to 7 count and measure: beside loops, and on networks whose answer is known."""

import json
import math
import sys

import numpy as np
import pytest
import torch

import data
import vit
from engine import scenes
from studies import inside, unresized, vit_compute, vit_data_size
from tests.oracles import random


def tiny(**options):
    """A ViT of 4 x 4 patches of 2 x 2 pixels, and one batch: images, labels, the item in the top left quarter."""
    torch.manual_seed(0)
    model = vit.ViT(8, 2, 3, num_classes=5, dim=8, depth=3, num_heads=2, **options).double().eval()
    masks = torch.zeros(6, 1, 8, 8, dtype=torch.bool)
    masks[:, :, :4, :4] = True
    labels = torch.zeros(6, dtype=torch.int64)
    objects = scenes.Objects(labels[:, None], masks, scenes.boxes_of(masks))
    return model, [(random(6, 3, 8, 8), labels, objects)]


def test_heads_that_look_everywhere_measure_as_such():
    """Without queries A is uniform: every distance is that of all pairs, and no depth differs."""
    model, batches = tiny()
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
    found = inside.measure(model, batches)
    places = [(2 * row, 2 * column) for row in range(4) for column in range(4)]
    mean = np.mean([math.dist(a, b) for a in places for b in places])
    assert found["uniform"] == pytest.approx(mean)
    np.testing.assert_allclose(found["distances"], np.full((3, 2), mean))
    assert found["growth"] == pytest.approx(0, abs=1e-9)
    assert (found["first_farthest"], found["first_nearest"]) == (pytest.approx(1), pytest.approx(1))


def test_rollout_finds_what_the_class_token_looks_at():
    """The first block's class token looks at bright patches, and these are the item's: AUC 1. At dark ones: 0."""
    for sign, auc in ((1, 1.0), (-1, 0.0)):
        model, [(images, labels, objects)] = tiny(pos_embed="none")
        images = torch.where(objects.masks, 1.0, -1.0).double().expand(-1, 3, -1, -1)
        for block in model.blocks:
            torch.nn.init.zeros_(block.attn.qkv.weight)
        torch.nn.init.constant_(model.patch_embed.proj.weight, 0.0)
        model.patch_embed.proj.weight.data[0] = 1.0  # channel 0 of a token is its brightness
        model.cls_token.data[..., 1] = 1.0  # and channel 1 says: class token
        qkv = model.blocks[0].attn.qkv.weight.data
        qkv[:8:4, 1] = 1.0  # its query is asked of the keys,
        qkv[8:16:4, 0] = 5.0 * sign  # which say how bright their patch is
        found = inside.measure(model, [(images, labels, objects)])
        assert found["rollout_auc"] == pytest.approx(auc)


def test_growth_is_of_the_last_block_over_the_first():
    """The mean distance of its heads, and that of each head where `measure` says it is."""
    model, batches = tiny(pos_embed="sincos")
    seen = {}
    model(batches[0][0], seen)
    blocks = [vit.attention_distance(block["A"], model.grid, 2).tolist() for block in seen["blocks"]]
    found = inside.measure(model, batches)
    np.testing.assert_allclose(found["distances"], blocks)
    assert found["growth"] == pytest.approx(np.mean(blocks[2]) / np.mean(blocks[0]) - 1)
    assert found["first_farthest"] * found["uniform"] == pytest.approx(max(blocks[0]))
    assert found["first_nearest"] * found["uniform"] == pytest.approx(min(blocks[0]))


def test_positions_are_compared_pair_by_pair():
    """falls, line and similarity from loops over pairs of places, with random positions on 4 x 4 patches."""
    model, _ = tiny()
    model.pos_embed.data = random(1, 17, 8)
    e = model.pos_embed.detach().numpy()[0, 1:].reshape(4, 4, 8)
    places = [(r, c) for r in range(4) for c in range(4)]
    cosines, distances, rings = [], [], {}
    for a in places:
        for b in places:
            if a != b:
                cosines.append(e[a] @ e[b] / np.linalg.norm(e[a]) / np.linalg.norm(e[b]))
                distances.append(math.dist(a, b))
                on_line = a[0] == b[0] or a[1] == b[1]
                rings.setdefault(round(distances[-1]), {True: [], False: []})[on_line].append(cosines[-1])
    with torch.no_grad():
        found = inside.alike_positions(model)
    assert found["falls"] == pytest.approx(-np.corrcoef(cosines, distances)[0, 1])
    assert found["line"] == pytest.approx(
        np.mean([np.mean(rings[r][True]) - np.mean(rings[r][False]) for r in (1, 2, 3)])
    )
    assert found["similarity"] == pytest.approx([np.mean(rings[r][True] + rings[r][False]) for r in (1, 2, 3)])


def test_smooth_filters_are_told_from_noise():
    """The correlation with the pixel to the right or below: 1 for a constant, -1 for a chequerboard, 0 for noise."""
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(3, 1, 2, 2)
    assert inside.smoothness(torch.ones(3, 1, 4, 4)) == 1
    assert inside.smoothness(board) == -1
    assert abs(inside.smoothness(random(64, 3, 4, 4))) < 0.05
    ramp = random(2, 1, 3, 3)
    pairs = [ramp[d, 0, i, j] * ramp[d, 0, i + y, j + x] for d in range(2) for i in range(3) for j in range(3)
             for y, x in ((0, 1), (1, 0)) if i + y < 3 and j + x < 3]  # fmt: skip
    assert inside.smoothness(ramp) == pytest.approx((sum(pairs) / len(pairs) / ramp.square().mean()).item())


def test_the_program_reads_a_run_and_writes_what_it_measured(tmp_path, monkeypatch):
    """config.json beside the weights says which model and data; result.json has the time, as that of every run."""
    items = data.InMemory(torch.randint(256, (30, 1, 28, 28), dtype=torch.uint8), torch.arange(30) % 10, (0.0,), (1.0,))
    clothes = data.Dataset("fashion-mnist", data.FASHION_MNIST, (0.0,), (1.0,), items, items)
    monkeypatch.setattr(data, "fashion_mnist", lambda folder: clothes)
    monkeypatch.setattr(inside, "SCENES", 20)
    vit.save_weights(vit.create("vit_micro4", 32, 10, 3, pos_embed="1d"), tmp_path / "run.safetensors")
    config = dict(arch="vit_micro4", img_size=[32, 32], data="scenes", pos_embed="1d")
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = f"inside --init {tmp_path}/run.safetensors --out {tmp_path}/out --overwrite --seed 0"
    monkeypatch.setattr(sys, "argv", command.split())
    inside.main()
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert np.shape(found["distances"]) == (6, 4)
    assert found["seconds"] > 0
    assert 0 < found["rollout_auc"] < 1


def test_positions_that_are_not_interpolated_keep_their_place_in_the_sequence():
    """On a larger grid patch i has the old position i, the others N(0, 0.02²); if random, all but the token's."""
    old = random(1, 1 + 6, 400)
    torch.manual_seed(0)
    new = unresized.leave(old, (2, 3), (3, 4))
    assert new.shape == (1, 1 + 12, 400)
    assert torch.equal(new[:, :7], old)
    assert new[:, 7:].std().item() == pytest.approx(0.02, rel=0.1)
    new = unresized.leave(old, (2, 3), (3, 4), random=True)
    assert torch.equal(new[:, :1], old[:, :1])
    assert new[:, 1:].std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(unresized.leave(old, (2, 3), (1, 2)), old[:, :3])


def test_operations_of_a_step_are_those_of_every_matrix_product():
    """By hand for vit_micro4: 50 tokens, width 64, six blocks, an MLP of twice the width, 49 patches of 16 pixels.

    The backward pass of a product is two more; only the input needs no gradient. Two operations a multiplication.
    """
    tokens, D = 50, 64
    block = tokens * D * (3 * D + D + 2 * 2 * D) + 2 * tokens**2 * D
    embed = 49 * 16 * D
    forward = 6 * block + embed + D * 10
    assert vit_compute.operations("vit_micro4", 28) == 2 * (3 * forward - embed)


def test_the_families_are_compared_at_equal_operations():
    """Accuracy is linear in the logarithm of operations: with lines that are known, so is every difference."""
    lines = {"ViT": (60, 4), "hybrid": (63, 3), "ResNet": (50, 6)}
    runs = []
    for seed in range(3):
        for family, (start, slope) in lines.items():
            for steps in vit_compute.STEPS:
                x = math.log(vit_compute.budget(family, steps) / 1e11)
                score = dict(train=dict(top1=start + slope * x + seed))
                runs.append(dict(arm=f"{family}, {steps} steps", seed=seed, scores=score))
    claims = {claim.text: claim.differences for claim in vit_compute.claims(runs)}
    at = vit_compute.budget("ViT", vit_compute.STEPS[-1])
    nearest = min(at, vit_compute.budget("ResNet", vit_compute.STEPS[-1]))  # its longest run stands for what is beyond
    best = 60 + 4 * math.log(at / 1e11) - 50 - 6 * math.log(nearest / 1e11)
    np.testing.assert_allclose(claims["at the largest budget, too"], [best] * 3)
    assert len(claims["with the budget that difference shrinks"]) == 3


def test_both_studies_of_the_families_share_their_longest_runs():
    longest = {vit_compute.RUNS[f"{family}, {vit_compute.STEPS[-1]} steps"] for family in ("ViT", "ResNet")}
    assert longest <= set(vit_data_size.RUNS.values())
