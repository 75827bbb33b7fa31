"""What downstream/probes.py promises: scores that count every image once, and what frozen features are worth.

Each `..._loops` function is an oracle: float64, one image at a time, from the definition alone.
"""

import math
import os

import numpy as np
import pytest
import torch
from torch import nn

import data
import hpm
import vit
from downstream import probes
from engine import distributed, scenes
from engine.image_folder import UnreadableImages
from related import mpp
from tests.engine.runs import PLAIN
from tests.oracles import random

HOW = (8, 8), 4, "cpu"  # img_size, batch_size, device


def split_of(n, labels, size=8, seed=1):
    images = torch.randint(256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return data.InMemory(images, torch.as_tensor(labels), *PLAIN)


def normalised(split):
    """Its images in float64 (n, C, H, W)."""
    return (split.images.double() / 255 - 0.5) / 0.25


def linear(classes, size=8):
    """A classifier with random weights, large enough to be sure of itself now and then."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, classes))
    model[1].weight.data, model[1].bias.data = random(classes, 3 * size * size).float() / 5, random(classes).float()
    return model


# ---------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------


def scores_loops(logits, labels):
    """Mean cross-entropy and the shares of images whose label is the largest, or among the five largest logits."""
    loss, first, five, n = 0.0, 0, 0, 0
    for row, label in zip(logits, labels, strict=True):
        if label < 0:
            continue
        n += 1
        loss += math.log(sum(math.exp(value) for value in row)) - row[label]
        larger = sum(value > row[label] for value in row)
        first += larger == 0
        five += larger < 5
    return {"test_loss": loss / n, "top1": 100 * first / n, "top5": 100 * five / n}


@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
@pytest.mark.parametrize("unreadable", [[], [0, 5, 10]])
def test_scores_count_every_image_once_whatever_the_batches(unreadable, batch_size):
    """Eleven images: a last batch that is smaller weighs less. The label -1 marks an image that can't be decoded.

    Logits are sums of 192 products in float32: 1e-5 of the loss is a hundred times their rounding.
    """
    split, model = split_of(11, [0] * 11), linear(12)
    W, b = (p.detach().double().numpy() for p in model.parameters())
    logits = normalised(split).numpy().reshape(11, -1) @ W.T + b
    places = [0, 1, 4, 5, 0, 7, 2, 11, 4, 0, 3]  # of the true label among the logits
    labels = [int(np.argsort(-row)[place]) for row, place in zip(logits, places, strict=True)]
    split.labels = torch.tensor([-1 if i in unreadable else label for i, label in enumerate(labels)])
    oracle = scores_loops(logits, split.labels.tolist())
    assert 0 < oracle["top1"] < oracle["top5"] < 100, "the example tells top-1, top-5 and all apart"
    scores = probes.evaluate(model, split, (8, 8), batch_size, "cpu")
    assert scores == pytest.approx(oracle, rel=1e-5)


@pytest.mark.parametrize(("classes", "names"), [(3, {"top1"}), (10, {"top1"}), (11, {"top1", "top5"})])
def test_top_5_is_told_above_ten_classes(classes, names):
    """Of few classes, five are half: that says little."""
    scores = probes.evaluate(linear(classes), split_of(6, [0, 1, 2, 0, 1, 2]), *HOW)
    assert scores.keys() == names | {"test_loss"}


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_without_dropout_and_leaves_the_mode_as_it_was(training):
    """Else the scores would be of a thinned model, or the rest of the training would be without dropout."""
    model = nn.Sequential(linear(3), nn.Dropout(0.5)).train(training)
    split = split_of(6, [0, 1, 2, 0, 1, 2])
    scores = [probes.evaluate(model, split, *HOW) for _ in range(2)]
    assert scores[0] == scores[1] == probes.evaluate(model[0], split, *HOW)
    assert (model.training, model[1].training) == (training, training)


def test_bfloat16_is_that_of_the_matrix_products():
    """Sums of 192 products, each rounded to 2^-9 of it: the loss differs, and by less than a percent."""
    split = split_of(11, torch.arange(11) % 3)
    exact, half = (probes.evaluate(linear(3), split, *HOW, dtype)["test_loss"] for dtype in ("float32", "bfloat16"))
    assert half != exact
    assert half == pytest.approx(exact, rel=0.01)


def masked(mask="hard", predictor="relative", size=16):
    torch.manual_seed(0)
    return hpm.create("vit_micro4", size, mask=mask, predictor=predictor, decoder=(32, 1, 2))


@pytest.mark.parametrize("mask", ["random", "block", "grid", "hard"])
def test_evaluation_masks_depend_on_seed_and_image_alone(mask):
    """Random ones, whatever the run trains with: its batches and the number of test images play no part.

    The 12 of 16 patches with the largest numbers of `evaluation_noise` are hidden.
    """
    model, seen = masked(mask), []

    def look(module, given, out):
        seen.append(out["mask"])
        assert torch.is_inference_mode_enabled(), "keeps what backward needs"

    model.register_forward_hook(look)
    noise = data.evaluation_noise(11, 16, seed=5).numpy()
    for n, batch_size in ((11, 4), (11, 100), (5, 2)):
        seen.clear()
        probes.evaluate_pretraining(model, split_of(n, [0] * n, 16), (16, 16), batch_size, "cpu", seed=5)
        masks = torch.cat(seen).numpy()
        assert masks.shape == (n, 16)
        for row, numbers in zip(masks, noise[:n], strict=True):
            assert set(row.nonzero()[0]) == set(np.argsort(numbers)[-12:])
    seen.clear()
    probes.evaluate_pretraining(model, split_of(5, [0] * 5, 16), (16, 16), 2, "cpu", seed=6)
    assert not np.array_equal(torch.cat(seen).numpy(), masks), "another seed, other masks"


@pytest.mark.parametrize("batch_size", [4, 100])
def test_the_reconstruction_loss_is_the_mean_over_images(batch_size):
    """Eleven images: batches of 4, 4 and 3; two can't be decoded, and a whole batch of them does not count.

    Oracle: one image at a time, in float64. Losses are means of squares in float32, so 1e-5 is generous; of ranks that
    rounding changes there are none in this example, with a tenth between neighbours.
    """
    model = masked()
    labels = torch.zeros(11).long()
    if batch_size == 4:
        labels[8:] = -1
    split = split_of(11, labels, 16)
    scores = probes.evaluate_pretraining(model, split, (16, 16), batch_size, "cpu", seed=5)
    mask = hpm.random_mask(data.evaluation_noise(11, 16, 5), 0.75)
    exact, images = model.double().eval(), normalised(split)
    with torch.no_grad():
        alone = [exact(images[i : i + 1], None, mask=mask[i : i + 1]) for i in range(11) if labels[i] >= 0]
    assert scores.keys() == {"test_rec", "test_correlation"}
    assert scores["test_rec"] == pytest.approx(np.mean([out["rec"].item() for out in alone]), rel=1e-5)
    assert scores["test_correlation"] == pytest.approx(np.mean([out["correlation"].item() for out in alone]), abs=1e-5)


def test_a_masked_autoencoder_has_no_correlation_to_tell():
    """Nothing predicts a loss there."""
    model = masked("random", "none")
    split = split_of(5, [0] * 5, 16)
    scores = probes.evaluate_pretraining(model, split, (16, 16), 4, "cpu")
    assert scores == probes.evaluate_pretraining(model, split, (16, 16), 4, "cpu", seed=0)
    assert scores.keys() == {"test_rec"}
    assert scores["test_rec"] > 0


def test_masked_patch_prediction_is_evaluated_on_the_same_corruption():
    """Three numbers for each patch; oracle: one image at a time, in float64."""
    torch.manual_seed(0)
    model, split = mpp.create("vit_micro4", 16, *PLAIN), split_of(7, [0] * 7, 16)
    scores = [probes.evaluate_pretraining(model, split, (16, 16), n, "cpu", seed=5) for n in (3, 7)]
    noise = data.evaluation_noise(7, 16, 5, columns=3)
    exact, images = model.double().eval(), normalised(split)
    with torch.no_grad():
        alone = [exact(images[i : i + 1], noise[i : i + 1])["rec"].item() for i in range(7)]
    for score in scores:
        assert score == {"test_rec": pytest.approx(np.mean(alone), rel=1e-5)}


def scenes_of(n, seed=1):
    """n scenes of 24 pixels made of scenes of 64: white items before dim noise, patches of 4 x 4 are 36."""
    items = torch.zeros(n, 28, 28, dtype=torch.uint8)
    items[:, 4:24, 6:22] = 255
    noise = torch.randint(100, (1, 3, 64, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return scenes.Scenes(items, torch.arange(n) % 10, noise, torch.tensor([[64, 64]]), *PLAIN, canvas=64)


def auc_loops(score, positive):
    """Over all pairs of a positive and another: how often the positive has the larger score; a tie counts half."""
    wins = pairs = 0
    for a, is_positive in zip(score, positive, strict=True):
        for b, other in zip(score, positive, strict=True):
            if is_positive and not other:
                pairs += 1
                wins += 1 if a > b else 0.5 if a == b else 0
    return wins / pairs if pairs else math.nan


@pytest.mark.parametrize("values", [3, 1000])
def test_the_area_under_the_roc_curve_counts_pairs(values):
    """Few values: many ties. No patch with the object, or nothing else: there is no pair, and no answer."""
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(values, (9, 20), generator=generator).float()
    covered = torch.rand(9, 20, generator=generator) < torch.linspace(0, 1, 9)[:, None]
    oracle = [auc_loops(a, b) for a, b in zip(score.tolist(), covered.tolist(), strict=True)]
    assert math.isnan(oracle[0])
    assert math.isnan(oracle[-1])
    np.testing.assert_allclose(probes.object_auc(score, covered), oracle, rtol=0, atol=1e-6)
    assert probes.object_auc(covered[4:5].float(), covered[4:5]).item() == 1
    assert probes.object_auc(-covered[4:5].float(), covered[4:5]).item() == 0


def test_a_patch_has_the_object_if_that_covers_a_quarter_of_it():
    """Exactly a quarter is enough; two items that share a patch count together."""
    masks = torch.zeros(1, 2, 8, 12, dtype=torch.bool)  # 2 x 3 patches of 4 x 4
    masks[0, 0, 0, :4] = True  # 4 of 16
    masks[0, 0, 0, 4:7] = True  # 3 of 16
    masks[0, 0, 1, 8:10], masks[0, 1, 2, 8:10] = True, True  # 2 and 2
    masks[0, 1, 4:, :4] = True
    objects = scenes.Objects(None, masks, None)
    assert probes.patches_with_objects(objects, 4).tolist() == [[True, False, True, True, False, False]]


@pytest.mark.parametrize("batch_size", [3, 100])
@pytest.mark.parametrize("teacher", ["whole", "in-turn"])
def test_where_objects_are_known_the_teacher_is_scored_by_them(teacher, batch_size):
    """Oracle: one image at a time, in float64. Its masks have half of the hidden patches from the teacher, and the rest
    by the same noise as the random ones; asked in turn, it splits by numbers of their own."""
    torch.manual_seed(0)
    model = hpm.create("vit_micro4", 24, decoder=(32, 1, 2), teacher=teacher)
    nn.init.normal_(model.teacher.loss_predictor.pred.weight)  # opinions that rounding does not change
    split = scenes_of(7)
    split.items[4] = 0  # nothing to find there: it counts for the losses alone
    scores = probes.evaluate_pretraining(model, split, (24, 24), batch_size, "cpu", seed=5)
    noise = data.evaluation_noise(7, 36, 5, columns=2)
    model, rec, hard, auc, maps, items = model.double().eval(), [], [], [], [], []
    images, _, objects = next(split.test_batches((24, 24), 7, "cpu", objects=True))
    for i, image in enumerate(images.double().split(1)):
        asked, first = noise[i : i + 1] if teacher == "in-turn" else None, noise[i : i + 1, :, 0]
        with torch.no_grad():
            predicted, _ = model.ask_teacher(image, asked)
            easy = hpm.random_mask(first, 0.75)
            rec.append(model(image, None, mask=easy)["rec"].item())
            chosen = sorted(range(36), key=lambda j: -predicted[0, j])[:13]  # half of 27 hidden ones
            others = sorted(set(range(36)) - set(chosen), key=lambda j: -first[0, j])[:14]
            mask = torch.zeros(1, 36, dtype=torch.bool)
            mask[0, chosen + others] = True
            hard.append(model(image, None, mask=mask)["rec"].item())
        covered = objects.masks[i, 0].reshape(6, 4, 6, 4).double().mean(dim=(1, 3)).flatten() >= 0.25
        auc.append(auc_loops(predicted[0].tolist(), covered.tolist()))
        maps.append([(p - predicted[0].mean()).item() for p in predicted[0]])
        items.append(covered.tolist())
    at_place = [auc_loops(*place) for place in zip(zip(*maps, strict=True), zip(*items, strict=True), strict=True)]
    assert scores.keys() == {
        "test_rec", "test_correlation", "test_object_auc", "test_object_auc_at_place", "test_hard_ratio"
    }  # fmt: skip
    assert scores["test_rec"] == pytest.approx(np.mean(rec), rel=1e-5)
    assert scores["test_hard_ratio"] == pytest.approx(np.mean(hard) / np.mean(rec), rel=1e-5)
    assert scores["test_object_auc"] == pytest.approx(np.nanmean(auc), abs=1e-5)
    assert scores["test_object_auc_at_place"] == pytest.approx(np.nanmean(at_place), abs=1e-5)


def test_at_a_place_a_map_that_is_the_same_for_all_scenes_finds_nothing():
    """It has 0.5 there, however much it says of where objects usually are; one that sees the object has 1."""

    class Knows(hpm.HPM):
        def ask_teacher(self, images, noise=None):
            n = len(images)
            place = torch.arange(36.0).expand(n, -1)
            return (self.truth[:n].float() if self.sees else place + torch.arange(n)[:, None] * 0.5), None

    split = scenes_of(7)
    _, _, objects = next(split.test_batches((24, 24), 7, "cpu", objects=True))
    model = hpm.create("vit_micro4", 24, decoder=(32, 1, 2))
    model.__class__, model.truth = Knows, probes.patches_with_objects(objects, 4)
    for model.sees, expected in ((False, 0.5), (True, 1.0)):
        scores = probes.evaluate_pretraining(model, split, (24, 24), 7, "cpu")
        assert scores["test_object_auc_at_place"] == pytest.approx(expected, abs=1e-6)


def test_the_masks_of_all_teachers_are_compared_with_the_same_random_ones():
    """Whole or in turn, and of a masked autoencoder: the column of numbers that splits does not move the others."""
    seen = []
    for options in ({"teacher": "whole"}, {"teacher": "in-turn"}, {"mask": "random", "predictor": "none"}):
        model = hpm.create("vit_micro4", 24, decoder=(32, 1, 2), **options)
        model.register_forward_hook(lambda module, given, out: seen.append(out["mask"]))
        probes.evaluate_pretraining(model, scenes_of(4), (24, 24), 4, "cpu", seed=5)
    assert len(seen) == 5
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[0], seen[4])


@pytest.mark.parametrize(
    ("options", "split"),
    [
        ({"mask": "random", "predictor": "none"}, scenes_of(3)),
        ({"mask": "random", "predictor": "none", "target": "ema"}, scenes_of(3)),
        ({"mask": "random"}, scenes_of(3)),
        ({}, split_of(3, [0, 1, 2], 24)),
        ({"teacher": "in-turn"}, split_of(3, [0, 1, 2], 24)),
    ],
)
def test_nobody_is_asked_for_objects_without_a_teacher_or_the_truth(options, split):
    """A masked autoencoder, a teacher that predicts no loss, a student alone; data that does not know its objects."""
    model = hpm.create("vit_micro4", 24, decoder=(32, 1, 2), **options)
    scores = probes.evaluate_pretraining(model, split, (24, 24), 4, "cpu")
    assert scores.keys() <= {"test_rec", "test_correlation"}
    assert scores["test_rec"] > 0


class Shards(nn.Module):
    """Stands in for a model whose parameters are spread over processes: it counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls, self.model = 0, linear(3)

    def forward(self, images):
        self.calls += 1
        return self.model(images)


@pytest.mark.parametrize("sharded", [True, False])
def test_each_process_calls_a_model_in_shards_as_often(sharded, monkeypatch):
    """Five images on two processes, two at a time: one has two batches, the other makes its only one twice.

    The second time it does not count: the sums of both are those of one process.
    """
    monkeypatch.setattr(distributed, "is_sharded", lambda model: sharded)
    split, sums, calls, parts = split_of(5, [0, 1, 2, 0, 1]), [], [], []
    for rank, n in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(distributed, "RANK", rank)
        monkeypatch.setattr(distributed, "WORLD_SIZE", n)
        monkeypatch.setattr(distributed, "gather_dicts", lambda entries: entries)
        monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: sums.append(tensor.double()) or tensor)
        monkeypatch.setattr(distributed, "all_gather", lambda tensor: parts.append(tensor) or tensor[None])
        model = Shards()
        probes.evaluate(model, split, (8, 8), 2, "cpu")
        calls.append(model.calls)
        probes.extract(model, split, (8, 8), 2, "cpu")
    assert calls == [3, 2, 2 if sharded else 1]
    torch.testing.assert_close(sums[1] + sums[2], sums[0], rtol=1e-5, atol=1e-6)
    assert [part.tolist() for part in parts[1::2]] == [[0, 1, 2, 0, 1], [0, 2, 1], [1, 0, -1]], "as many labels of each"


def test_what_others_could_not_decode_is_known_to_all(monkeypatch):
    """And counts in the 5 % that are too many."""
    monkeypatch.setattr(distributed, "gather_dicts", lambda entries: entries | {"b.png": "broken"})

    class Split:
        unreadable = {"a.png": "empty"}

        def skip(self, unreadable):
            self.unreadable = unreadable
            raise UnreadableImages("too many")

        def test_batches(self, *how):
            return split_of(4, [0, 1, 2, -1]).test_batches(*how)

    for share in (probes.share_unreadable, lambda split: probes.evaluate(linear(3), split, *HOW)):
        split = Split()
        with pytest.raises(UnreadableImages):
            share(split)
        assert split.unreadable == {"a.png": "empty", "b.png": "broken"}


# ---------------------------------------------------------------------------------------------
# Frozen features
# ---------------------------------------------------------------------------------------------


def test_features_are_those_of_the_images_that_can_be_read_in_order():
    """With the labels that belong to them."""
    split, model = split_of(7, [4, -1, 2, 1, 0, -1, 3]), nn.Sequential(linear(6), nn.Dropout(0.5))
    features, labels = probes.extract(model, split, (8, 8), 3, "cpu")
    assert labels.tolist() == [4, 2, 1, 0, 3]
    exact = model.double().eval()(normalised(split)[[0, 2, 3, 4, 6]]).detach()
    torch.testing.assert_close(features.double(), exact, rtol=1e-5, atol=1e-5)
    assert features.dtype == torch.float32
    assert not features.requires_grad


def neighbours_loops(train, train_labels, test, classes, k, temperature):
    """The class with the most votes of the k most similar training images, for every test image."""
    told = []
    for query in test:
        similar = [float(query @ x) / np.linalg.norm(query) / np.linalg.norm(x) for x in train]
        nearest = sorted(range(len(train)), key=lambda i: -similar[i])[:k]
        votes = [0.0] * classes
        for i in nearest:
            votes[train_labels[i]] += math.exp(similar[i] / temperature)
        told.append(max(range(classes), key=lambda c: votes[c]))
    return told


@pytest.mark.parametrize("options", [{}, {"k": 1}, {"k": 5, "temperature": 1.0}, {"k": 1000, "temperature": 0.1}])
def test_nearest_neighbours_vote_with_their_similarity(options):
    """DINO, section 4.1: weight exp(cos / temperature); 20 neighbours and 0.07 are the values of its eval_knn.py.

    More than 500 queries, more neighbours than images. In float64: no vote is that close.
    """
    train, test = random(40, 3, seed=1), 3 * random(503, 3, seed=2)
    labels, truth = torch.arange(40) * 7 % 4, torch.arange(503) % 4
    oracle = {"k": 20, "temperature": 0.07} | options
    told = neighbours_loops(train.numpy(), labels.tolist(), test.numpy(), 4, **oracle)
    share = 100 * sum(a == b for a, b in zip(told, truth.tolist(), strict=True)) / 503
    ours = probes.nearest_neighbours((train, labels), (test, truth), 4, **options)
    assert ours == pytest.approx(share, abs=1e-9)
    own = probes.nearest_neighbours((train, labels), (test, torch.tensor(told)), 4, **options)
    assert own == 100.0, "not the same images are told the same"


def test_one_near_neighbour_outvotes_two_far_ones():
    """At DINO's temperature of 0.07; at 10 the majority decides. Lengths do not count, only directions."""
    train = torch.tensor([[1.0, 0.0], [50.0, 50.0], [50.0, 50.0]]), torch.tensor([0, 1, 1])
    test = torch.tensor([[0.1, 0.01]]), torch.tensor([0])
    assert probes.nearest_neighbours(train, test, 2) == 100.0
    assert probes.nearest_neighbours(train, test, 2, temperature=10.0) == 0.0


def test_exactly_twenty_neighbours_vote():
    """DINO's eval_knn.py. The nearest one votes as much as 18.5 of the next: 19 of these outvote it, 18 do not, and
    whoever comes after them is on its side."""
    cosines = torch.tensor([1.0] + [1 - 0.07 * math.log(18.5)] * 19 + [0.79] * 5, dtype=torch.float64)
    features = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    labels = torch.tensor([0] + [1] * 19 + [0] * 5)
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([1])
    assert probes.nearest_neighbours((features, labels), query, 2) == 100.0
    for k in (19, 21):
        assert probes.nearest_neighbours((features, labels), query, 2, k=k) == 0.0


def few_shot_oracle(x, labels, queries, ridge=2**10, constant=100.0):
    """The class that is told for every query: the minimum of ||Z W - Y||² + ridge ||W||², as one least-squares problem.

    sqrt(ridge) I below Z, and zeros below Y, turn the penalty into more equations.
    """
    mean, std = x.mean(0), x.std(0) + 1e-5
    Z, Q = (np.hstack([(v - mean) / std, np.full((len(v), 1), constant)]) for v in (x, queries))
    Y = np.array([[1.0 if label == k else -1.0 for k in range(3)] for label in labels])
    padded = np.vstack([Z, math.sqrt(ridge) * np.eye(Z.shape[1])]), np.vstack([Y, np.zeros((Z.shape[1], 3))])
    return (Q @ np.linalg.lstsq(*padded)[0]).argmax(axis=1)


def few_shot_example(n):
    """Features (n, 20) and labels (n,), and 1001 queries, of three classes that are not of one size."""
    labels = [torch.tensor([0, 1, 1, 2, 2])[torch.arange(m) % 5] for m in (n, 1001)]
    features = [
        5 * random(len(own), 20, seed=len(own)) + 10 * torch.eye(20, dtype=torch.float64)[own] + 7 for own in labels
    ]
    return list(zip(features, labels, strict=True))


@pytest.mark.parametrize("n", [12, 24])
@pytest.mark.parametrize("options", [{}, {"ridge": 1e-2}])
def test_few_shot_is_regularised_least_squares_in_closed_form(n, options):
    """ViT, section 4.1: from frozen features to {-1, 1}^K. Fewer images than features, and more.

    The ridge is 2^10 and the constant 100: l2_reg of configs/common_fewshot.py and BIAS_CONSTANT of
    evaluators/fewshot_lsr.py, in the authors' big_vision. In float64: no query is that close to the border.
    """
    (x, labels), (queries, truth) = few_shot_example(n)
    told = few_shot_oracle(x.numpy(), labels.tolist(), queries.numpy(), **options)
    ours = probes.few_shot((x, labels), (queries, truth), 3, **options)
    assert ours == pytest.approx(100 * (told == truth.numpy()).mean())
    assert probes.few_shot((x, labels), (queries, torch.tensor(told)), 3, **options) == 100.0


@pytest.mark.parametrize("other", [{"ridge": 2**9}, {"ridge": 2**11}, {"constant": 10.0}, {"constant": 30.0}])
def test_the_example_tells_another_ridge_and_constant(other):
    """Else the test above would say nothing of them."""
    (x, labels), (queries, _) = few_shot_example(24)
    given = x.numpy(), labels.tolist(), queries.numpy()
    assert (few_shot_oracle(*given) != few_shot_oracle(*given, **other)).any()


def test_few_shot_copes_with_a_feature_that_never_changes():
    x, labels = torch.tensor([[1.0, 3.0], [-1.0, 3.0], [1.5, 3.0], [-1.5, 3.0]]), torch.tensor([0, 1, 0, 1])
    assert probes.few_shot((x, labels), (2 * x, labels), 2) == 100.0


def test_a_linear_probe_normalises_without_parameters_and_learns_a_head_alone():
    """y -> (y - mean) / sqrt(var + 1e-6) over the batch -> linear (MAE, appendix A.1)."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Dropout(0.5))
    nn.init.constant_(encoder[1].weight[2], 1e-4)  # a variance that is not large beside 1e-6
    probe = probes.LinearProbe(encoder, 3, 5)
    assert [name for name, p in probe.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert not probe.head.weight.any(), "starts at zero"
    assert list(probe.state_dict()) == [
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "head.weight", "head.bias",
    ], "the encoder is not saved"  # fmt: skip
    probe.head.weight.data = random(5, 3).float()
    for mode in (False, True):
        probe.train(mode)
        assert not any(module.training for module in encoder.modules()), "frozen: no dropout, in training neither"
    assert probe.norm.training

    images = random(6, 3, 2, 2).float()
    y = encoder(images).double().detach().numpy()
    unit = np.empty_like(y)
    for channel in range(3):
        values = y[:, channel]
        mean = sum(values) / 6
        unit[:, channel] = (values - mean) / math.sqrt(sum((values - mean) ** 2) / 6 + 1e-6)
    W, b = (p.detach().double().numpy() for p in probe.head.parameters())
    # Values of about 1 from sums of six in float32; the variance of 1e-8 loses two digits to the mean.
    np.testing.assert_allclose(probe(images).double().detach().numpy(), unit @ W.T + b, rtol=0, atol=1e-4)
    probe(images).square().mean().backward()
    assert all(p.grad is None for p in encoder.parameters())
    probe.eval()
    assert not torch.equal(probe(images), probe(images[:3].repeat(2, 1, 1, 1))), "the running mean, not the batch's"
    torch.testing.assert_close(probe(images)[:2], probe(images[:2]))


def test_a_probe_normalises_with_what_all_processes_see(monkeypatch):
    """Two processes with three images each give what one gives for six: the second one's rows."""
    probe, images = probes.LinearProbe(nn.Identity(), 4, 2), random(6, 4).float()
    nn.init.normal_(probe.head.weight)
    whole = probe.train()(images)
    monkeypatch.setattr(distributed, "RANK", 1)
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(distributed, "all_gather", lambda y: images.view(2, 3, 4))
    torch.testing.assert_close(probe(images[3:]), whole[3:])


def probed(n=24):
    """An encoder, and data for its probe: n training and 7 test images of three classes."""
    torch.manual_seed(0)
    splits = (split_of(m, torch.arange(m) % 3, 16, seed=m) for m in (n, 7))
    return vit.create("vit_micro4", 16, 0), data.Dataset("photos", ["a", "b", "c"], *PLAIN, *splits)


def free_memory(monkeypatch, free):
    monkeypatch.setattr(os, "sysconf", lambda name: free if name == "SC_AVPHYS_PAGES" else 1)


def test_a_linear_probe_gives_the_same_from_images_and_from_features_in_memory(monkeypatch):
    """Features are computed once if they fit in a quarter of the free memory, else with every batch: same losses.

    They differ by the rounding of other batch sizes, 1e-6; six steps of SGD hand it on.
    """
    encoder, dataset = probed()
    losses = {}
    for where, free in {"features": 1e9, "images": 0}.items():
        free_memory(monkeypatch, free)
        torch.manual_seed(1)
        probe, part = probes.linear_probe(encoder, dataset, (16, 16), 5, "cpu")
        assert isinstance(part.train, data.Features) == isinstance(part.test, data.Features) == (where == "features")
        optimizer = torch.optim.SGD(probe.head.parameters(), lr=0.1)
        losses[where] = []
        for images, labels in part.train.train_batches((16, 16), 8, range(6), 3, None, torch.device("cpu")):
            loss = nn.functional.cross_entropy(probe(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[where].append(loss.item())
        losses[where].append(probes.evaluate(probe, part.test, (16, 16), 5, "cpu")["test_loss"])
    assert losses["features"] == pytest.approx(losses["images"], rel=1e-4)
    assert losses["features"][5] < losses["features"][0] - 0.01, "nothing was learned"


@pytest.mark.parametrize("processes", [1, 2])
def test_the_limit_is_a_quarter_of_a_processs_free_memory(processes, monkeypatch):
    """24 images of 64 float32 numbers are 6144 bytes: they fit in a quarter of 24576, and not in less."""
    encoder, dataset = probed()
    monkeypatch.setattr(distributed, "LOCAL_WORLD_SIZE", processes)
    for free, cached in ((processes * 24576, True), (processes * 24576 - 1, False)):
        free_memory(monkeypatch, free)
        _, part = probes.linear_probe(encoder, dataset, (16, 16), 4, "cpu")
        assert isinstance(part.train, data.Features) == cached
        assert isinstance(part.test, data.Features) == cached


def test_a_system_that_does_not_say_its_free_memory_has_four_gigabytes(monkeypatch):
    """Windows has no sysconf, macOS not this name."""

    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown)
    assert probes.free_memory("cpu") == 4 * 2**30
    monkeypatch.delattr(os, "sysconf")
    assert probes.free_memory(torch.device("cpu")) == 4 * 2**30


def test_one_process_that_has_no_room_decides_for_all(monkeypatch):
    """Else some would train on features and wait for others that train on images."""
    encoder, dataset = probed()
    monkeypatch.setattr(distributed, "all_reduce_max", lambda *flags: [1])
    free_memory(monkeypatch, 1e9)
    _, part = probes.linear_probe(encoder, dataset, (16, 16), 4, "cpu")
    assert part is dataset
