"""The position variants of ViT's appendix D.4, beside the loops of oracles.py."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vit
from related import positions
from tests.oracles import arrays, attention_loops, embed_loops, equal, filled, random, vit_loops

SMALL = dict(img_size=(4, 6), patch_size=2, num_classes=5, dim=8, depth=2, num_heads=2)  # grid 2x3, T = 7
NO_TOKEN = dict(pool="mean", class_token=False)


def with_positions(kind, **options):
    model = vit.ViT(**(SMALL | options), pos_embed="none")
    if kind != "none":
        positions.replace(model, kind)
    return model


each_kind = pytest.mark.parametrize("kind", positions.KINDS)


@each_kind
@pytest.mark.parametrize("options", [dict(), NO_TOKEN, dict(fused=False, num_heads=1)], ids=str)
def test_a_complete_forward_equals_the_loops(kind, options):
    """2d: D/2 channels for the column, D/2 for the row, none for the class token. relative: q_i · (k_j + r_{i-j})."""
    model, images = filled(with_positions(kind, **options)), random(2, 3, 4, 6)
    heads, pool = options.get("num_heads", 2), options.get("pool", "cls")
    oracle = [vit_loops(image, arrays(model), heads, pool)[2] for image in images.numpy()]
    equal(model(images), np.stack(oracle), kind)
    equal(model(images, inside={}), np.stack(oracle), "asking for `inside` must not change the result")


def test_positions_in_two_dimensions_are_those_of_the_patches():
    """Also where a part of them is embedded; and their table is there to be looked at, as learned ones are."""
    model, images, visible = filled(with_positions("2d")), random(2, 3, 4, 6), [[4, 0, 3], [1, 5, 2]]
    oracle = [embed_loops(image, arrays(model), v) for image, v in zip(images.numpy(), visible, strict=True)]
    equal(model.embed(images, torch.tensor(visible)), np.stack(oracle))
    column, row = model.column_pos_embed, model.row_pos_embed
    assert model.pos_embed.shape == (1, 7, 8)
    assert torch.equal(model.pos_embed[0, 1 + 1 * 3 + 2], torch.cat([column[0, 2], row[0, 1]]))
    assert not model.pos_embed[:, 0].any()


@pytest.mark.parametrize("fused", [True, False])
def test_inside_relative_attention_are_the_values_that_its_names_say(fused):
    attention = filled(with_positions("relative", fused=fused)).blocks[0].attn
    z, inside = random(2, 7, 8), {}
    attention(z, inside)
    oracle = [attention_loops(tokens, arrays(attention), 2)[1] for tokens in z.numpy()]
    assert inside.keys() == {"q", "k", "v", "A", "sa"}
    for name, value in inside.items():
        equal(value, np.stack([values[name] for values in oracle]), name)


def test_relative_attention_calls_the_fused_kernel_unless_told_not_to(monkeypatch):
    def kernel(*args, **kwargs):
        raise InterruptedError("the fused kernel was called")

    fused, plain = with_positions("relative"), with_positions("relative", fused=False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    plain(torch.zeros(1, 3, 4, 6))
    fused(torch.zeros(1, 3, 4, 6), inside={})
    with pytest.raises(InterruptedError):
        fused(torch.zeros(1, 3, 4, 6))


def test_relative_positions_have_the_data_type_of_q():
    """In half precision the offsets' embeddings stay float32, and are rounded where they are used."""
    q = random(1, 2, 3, 4).bfloat16()
    assert positions.RelativePositions(3, 4)(q).dtype == torch.bfloat16


def test_relative_attention_has_dropout_after_its_last_map():
    torch.manual_seed(0)
    attention, z = filled(with_positions("relative", dropout=0.5)).blocks[0].attn, random(20, 7, 8)
    plain, out = attention(z), attention.train()(z)
    equal(out[out != 0], (2 * plain[out != 0]).detach())
    assert (out == 0).double().mean() == pytest.approx(0.5, abs=0.1)  # of 1,120 numbers


@pytest.mark.parametrize(("kind", "told"), [("none", False), ("relative", True), ("2d", True)])
def test_positions_tell_orders_apart_and_none_can_not(kind, told):
    """Without positions the mean of the patch tokens is the same in any order (D.4)."""
    images = random(1, 3, 4, 6)
    shuffled = vit.unpatchify(vit.patchify(images, 2)[:, [3, 1, 4, 0, 5, 2]], 2, (2, 3))
    model = filled(with_positions(kind, pool="mean"))
    assert (not torch.allclose(model(images), model(shuffled), rtol=0, atol=1e-8)) == told


@each_kind
def test_replacing_positions_changes_nothing_else(kind):
    """Names and numbers of all other weights stay, and their order; new ones stand where a checkpoint has them."""
    model = vit.ViT(**SMALL, pos_embed="none")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    positions.replace(model, kind)
    after = model.state_dict()
    assert [name for name in after if name in before] == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    new = {name: tuple(value.shape) for name, value in after.items() if name not in before}
    if kind == "2d":
        assert new == {"column_pos_embed": (1, 3, 4), "row_pos_embed": (1, 2, 4)}
    else:
        assert new == {f"blocks.{i}.attn.relative.pos_embed": (2 * 7 - 1, 4) for i in range(2)}
    assert isinstance(model, vit.ViT)
    images = random(1, 3, 4, 6).float()
    torch.nn.init.normal_(model.head.weight)
    assert torch.equal(copy.deepcopy(model)(images), model(images)), "a copy holds its own positions"


@each_kind
def test_sizes_are_known_without_memory_for_numbers(kind):
    with torch.device("meta"):
        assert with_positions(kind)(torch.zeros(1, 3, 4, 6)).shape == (1, 5)


@each_kind
def test_new_positions_are_drawn_small(kind):
    """N(0, 0.02²): of 4,000 numbers and more, the standard deviation is right to 3 %."""
    torch.manual_seed(0)
    options = dict(img_size=(40, 60), dim=160) if kind == "2d" else dict(img_size=(16, 16), dim=64)
    model = with_positions(kind, **options)
    drawn = [p.flatten() for name, p in model.named_parameters() if name.endswith("pos_embed")]
    assert len(drawn) == 2
    assert all(p.std().item() == pytest.approx(0.02, rel=0.05) for p in drawn)
    assert all(p.mean().item() == pytest.approx(0, abs=0.002) for p in drawn)


@each_kind
def test_gradients_reach_every_position(kind):
    """The head reads token 0 of the last block, which meets half of the offsets; the first block meets all."""
    torch.manual_seed(0)
    model = with_positions(kind)
    nn.init.normal_(model.head.weight)
    F.cross_entropy(model(random(2, 3, 4, 6).float()), torch.tensor([1, 4])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        if name.endswith("pos_embed"):
            places = parameter.grad.flatten(0, -2)
            places = places if kind == "2d" or name.startswith("blocks.0") else places[:7]
            assert (places.abs().amax(dim=-1) > 0).all(), name


def test_what_can_not_be_replaced_is_refused():
    with pytest.raises(ValueError, match="^unknown positions '3d'; there are 2d, relative$"):
        positions.replace(vit.ViT(**SMALL, pos_embed="none"), "3d")
    with pytest.raises(ValueError, match="^2-D positions need a width that splits in two halves, not 9$"):
        positions.replace(vit.ViT(**(SMALL | dict(dim=9, num_heads=3)), pos_embed="none"), "2d")
    for given in ("learned", "sincos"):
        for kind in positions.KINDS:
            with pytest.raises(ValueError, match='^the model has positions already; create it with pos_embed="none"$'):
                positions.replace(vit.ViT(**SMALL, pos_embed=given), kind)
    for first, second in itertools.product(positions.KINDS, repeat=2):
        with pytest.raises(ValueError, match="positions already"):
            positions.replace(with_positions(first), second)
