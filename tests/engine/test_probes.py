"""What evaluate.py promises: scores that count every image once, frozen features, and figures that show what happened.

Each `..._loops` function is an oracle: float64, one image at a time, from the definition alone. Read the tests in
order: they follow evaluate.py, and to rewrite one of its functions until its tests pass is the exercise.
"""

import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import data
import evaluate
import hpm
import vit

PLAIN = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def split_of(n, labels, size=8, seed=1):
    images = torch.randint(256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return data.InMemory(images, torch.as_tensor(labels), *PLAIN)


def config_of(**changes):
    values = dict(device="cpu", dtype="float32", img_size=(8, 8), micro_batch=4, batch_size=4, seed=0, steps=5)
    return SimpleNamespace(**(values | dict(target="pixels") | changes))


def linear(classes, size=8):
    """A classifier with random weights, large enough to be sure of itself now and then."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, classes))
    model[1].weight.data = random(classes, 3 * size * size) / 5
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


@pytest.mark.parametrize("micro_batch", [1, 4, 11, 100])
@pytest.mark.parametrize("unreadable", [[], [0, 5, 10]])
def test_scores_count_every_image_once_whatever_the_batches(unreadable, micro_batch):
    """Eleven images: a last batch that is smaller weighs less. The label -1 marks an image that can't be decoded."""
    split, model = split_of(11, [0] * 11), linear(12)
    pixels = (split.images.double().numpy() / 255 - 0.5) / 0.25
    W, b = (p.detach().double().numpy() for p in model.parameters())
    logits = pixels.reshape(11, -1) @ W.T + b
    places = [0, 1, 4, 5, 0, 7, 2, 11, 4, 0, 3]  # of the true label among the logits
    labels = [int(np.argsort(-row)[place]) for row, place in zip(logits, places, strict=True)]
    split.labels = torch.tensor([-1 if i in unreadable else label for i, label in enumerate(labels)])
    oracle = scores_loops(logits, split.labels.tolist())
    assert 0 < oracle["top1"] < oracle["top5"] < 100, "the example tells top-1, top-5 and all apart"
    scores = evaluate.evaluate(model, split, config_of(micro_batch=micro_batch))
    assert scores == pytest.approx(oracle, rel=1e-5)


@pytest.mark.parametrize(("classes", "names"), [(3, {"top1"}), (10, {"top1"}), (11, {"top1", "top5"})])
def test_top_5_is_told_above_ten_classes(classes, names):
    """Of few classes, five are half: that says little."""
    scores = evaluate.evaluate(linear(classes), split_of(6, [0, 1, 2, 0, 1, 2]), config_of())
    assert scores.keys() == names | {"test_loss"}


def test_evaluation_is_without_dropout_and_training_goes_on_with_it():
    """Else the scores would be of a thinned model, or the rest of the training would be without dropout."""
    model = nn.Sequential(linear(3), nn.Dropout(0.5))
    split = split_of(6, [0, 1, 2, 0, 1, 2])
    scores = [evaluate.evaluate(model, split, config_of()) for _ in range(2)]
    assert scores[0] == scores[1] == evaluate.evaluate(model[0], split, config_of())
    assert model.training
    assert model[1].training


class Counter(nn.Module):
    """Stands in for HPM: its loss is the mean of the first pixel, its correlation the mean of the second."""

    def forward(self, images, generator, batch, here, hard_fraction=0.0):
        assert hard_fraction == 0.0, "all masks are random, so that scores of different times compare"
        assert not self.training
        assert batch == len(range(batch)[here]) == len(images)
        self.drawn.append(torch.rand(1, generator=generator).item())
        return {"rec": images[:, 0, 0, 0].mean(), "correlation": images[:, 0, 0, 1].mean()}


@pytest.mark.parametrize("micro_batch", [4, 100])
def test_the_reconstruction_loss_is_the_mean_over_images_under_the_same_masks(micro_batch):
    """Eleven images: batches of 4, 4 and 3. Masks differ from batch to batch and come again the next time."""
    split, model = split_of(11, [0] * 11), Counter()
    pixels = (split.images.double().numpy() / 255 - 0.5) / 0.25
    drawn = []
    for _ in range(2):
        model.drawn = []
        scores = evaluate.evaluate_pretraining(model, split, config_of(micro_batch=micro_batch))
        drawn.append(model.drawn)
        assert scores["test_rec"] == pytest.approx(pixels[:, 0, 0, 0].mean(), rel=1e-5)
        assert scores["test_correlation"] == pytest.approx(pixels[:, 0, 0, 1].mean(), rel=1e-5)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == math.ceil(11 / micro_batch)


def test_a_masked_autoencoder_has_no_correlation_to_tell():
    """Nothing predicts a loss there."""
    model = hpm.create("vit_micro4", 16, mask="random", predictor="none")
    scores = evaluate.evaluate_pretraining(model, split_of(5, [0] * 5, 16), config_of(img_size=(16, 16)))
    assert scores.keys() == {"test_rec"}
    assert scores["test_rec"] > 0


# ---------------------------------------------------------------------------------------------
# Transfer by frozen features
# ---------------------------------------------------------------------------------------------


def test_features_are_those_of_the_images_that_can_be_read_in_order():
    """With the labels that belong to them."""
    split, model = split_of(7, [4, -1, 2, 1, 0, -1, 3]), linear(6)
    features, labels = evaluate.extract(model, split, config_of(micro_batch=3))
    assert labels.tolist() == [4, 2, 1, 0, 3]
    pixels = data.normalise(split.images[[0, 2, 3, 4, 6]], *PLAIN)
    torch.testing.assert_close(features, model(pixels).detach())


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


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (5, 1.0), (20, 0.07), (1000, 0.1)])
def test_nearest_neighbours_vote_with_their_similarity(k, temperature):
    """DINO, section 4.1: weight exp(cos / temperature). More than 500 queries, more neighbours than images."""
    train, test = random(40, 3), 3 * random(503, 3, seed=2)
    labels, truth = torch.arange(40) * 7 % 4, torch.arange(503) % 4
    arrays = train.double().numpy(), labels.tolist(), test.double().numpy()
    told = neighbours_loops(*arrays, 4, k, temperature)
    share = 100 * sum(a == b for a, b in zip(told, truth.tolist(), strict=True)) / 503
    ours = evaluate.nearest_neighbours((train, labels), (test, truth), 4, k, temperature)
    assert ours == pytest.approx(share, abs=1e-6)
    own = evaluate.nearest_neighbours((train, labels), (test, torch.tensor(told)), 4, k, temperature)
    assert own == 100.0, "not the same images are told the same"


def test_one_near_neighbour_outvotes_two_far_ones():
    """At DINO's temperature of 0.07; at 10 the majority decides. Lengths do not count, only directions."""
    train = torch.tensor([[1.0, 0.0], [50.0, 50.0], [50.0, 50.0]]), torch.tensor([0, 1, 1])
    test = torch.tensor([[0.1, 0.01]]), torch.tensor([0])
    assert evaluate.nearest_neighbours(train, test, 2) == 100.0
    assert evaluate.nearest_neighbours(train, test, 2, temperature=10.0) == 0.0


def few_shot_oracle(x, labels, queries, classes, ridge):
    """The class that is told for every query: the minimum of ||Z W - Y||² + ridge ||W||², as one least-squares problem.

    sqrt(ridge) I below Z, and zeros below Y, turn the penalty into more equations.
    """
    mean, deviation = x.mean(0), x.std(0) + 1e-5
    Z, Q = (np.hstack([(v - mean) / deviation, np.full((len(v), 1), 100.0)]) for v in (x, queries))
    Y = np.array([[1.0 if label == k else -1.0 for k in range(classes)] for label in labels])
    padded = np.vstack([Z, math.sqrt(ridge) * np.eye(Z.shape[1])]), np.vstack([Y, np.zeros((Z.shape[1], classes))])
    return (Q @ np.linalg.lstsq(*padded)[0]).argmax(axis=1)


@pytest.mark.parametrize(("n", "ridge"), [(12, 1024.0), (12, 1e-2), (60, 1024.0), (60, 1.0)])
def test_few_shot_is_regularised_least_squares_in_closed_form(n, ridge):
    """ViT, section 4.1: from frozen features to {-1, 1}^K. Fewer images than features, and more."""
    labels, truth = torch.arange(n) % 3, torch.arange(101) % 3
    x = 5 * random(n, 20) + torch.eye(20)[labels] * 4 + 7
    queries = 5 * random(101, 20, seed=2) + torch.eye(20)[truth] * 4 + 7
    told = few_shot_oracle(x.double().numpy(), labels.tolist(), queries.double().numpy(), 3, ridge)
    ours = evaluate.few_shot((x, labels), (queries, truth), 3, ridge)
    assert ours == pytest.approx(100 * (told == truth.numpy()).mean())
    assert evaluate.few_shot((x, labels), (queries, torch.tensor(told)), 3, ridge) == 100.0


def test_few_shot_copes_with_a_feature_that_never_changes():
    x, labels = torch.tensor([[1.0, 3.0], [-1.0, 3.0], [1.5, 3.0], [-1.5, 3.0]]), torch.tensor([0, 1, 0, 1])
    assert evaluate.few_shot((x, labels), (2 * x, labels), 2) == 100.0


def test_a_linear_probe_normalises_without_parameters_and_learns_a_head_alone():
    """y -> (y - mean) / sqrt(var + 1e-6) over the batch -> linear (MAE, appendix A.1)."""
    torch.manual_seed(0)
    encoder = vit.create("vit_micro4", 16, 0, dropout=0.5)
    probe = evaluate.LinearProbe(encoder, 64, 5)
    assert [name for name, p in probe.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert not probe.head.weight.any(), "starts at zero"
    probe.head.weight.data = random(5, 64)
    images = random(6, 3, 16, 16)
    for mode in (False, True):
        probe.train(mode)
        assert not any(module.training for module in encoder.modules()), "frozen: no dropout, in training neither"
    assert probe.norm.training

    y = encoder(images).double().detach().numpy()
    unit = np.empty_like(y)
    for channel in range(64):
        values = y[:, channel]
        mean = sum(values) / 6
        unit[:, channel] = (values - mean) / math.sqrt(sum((values - mean) ** 2) / 6 + 1e-6)
    W, b = (p.detach().double().numpy() for p in probe.head.parameters())
    np.testing.assert_allclose(probe(images).double().detach().numpy(), unit @ W.T + b, atol=1e-3)
    probe(images).square().mean().backward()
    assert all(p.grad is None for p in encoder.parameters())


def test_a_linear_probe_gives_the_same_from_images_and_from_features_in_memory(monkeypatch):
    """Features are computed once if they fit in half of the free memory, else with every batch: same losses."""
    torch.manual_seed(0)
    encoder = vit.create("vit_micro4", 16, 0)
    splits = (split_of(n, torch.arange(n) % 3, 16, seed=n) for n in (24, 7))
    dataset = data.Dataset("photos", ["a", "b", "c"], *PLAIN, *splits)
    config = config_of(img_size=(16, 16), micro_batch=5)
    losses = {}
    for where, pages in {"features": 1e9, "images": 0}.items():
        monkeypatch.setattr(os, "sysconf", lambda name, pages=pages: pages if name == "SC_AVPHYS_PAGES" else 4096)
        torch.manual_seed(1)
        probe, part = evaluate.linear_probe(encoder, dataset, config)
        assert isinstance(part.train, data.Features) == isinstance(part.test, data.Features) == (where == "features")
        optimizer = torch.optim.SGD(probe.head.parameters(), lr=0.1)
        losses[where] = []
        batches = part.train.train_batches((16, 16), 8, range(6), 3, None, torch.device("cpu"))
        for images, labels in batches:
            loss = nn.functional.cross_entropy(probe(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[where].append(loss.item())
        losses[where] += evaluate.evaluate(probe, part.test, config).values()
    assert losses["features"] == pytest.approx(losses["images"], abs=1e-4)
    assert losses["features"][5] < losses["features"][0] - 0.01, "nothing was learned"


def test_the_limit_is_a_quarter_of_the_free_memory(monkeypatch):
    """24 images of 64 float32 numbers are 6144 bytes: they fit in a quarter of 24576, and not in less."""
    encoder = vit.create("vit_micro4", 16, 0)
    split = split_of(24, torch.arange(24) % 3, 16)
    dataset = data.Dataset("photos", ["a", "b", "c"], *PLAIN, split, split)
    for free, cached in ((24576, True), (24575, False)):
        monkeypatch.setattr(os, "sysconf", lambda name, free=free: free if name == "SC_AVPHYS_PAGES" else 1)
        _, part = evaluate.linear_probe(encoder, dataset, config_of(img_size=(16, 16)))
        assert isinstance(part.train, data.Features) == cached


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    kept, save = [], Figure.savefig

    def keep(figure, *where, **how):
        kept.append(figure)
        save(figure, *where, **how)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def test_curves_show_what_the_log_says(tmp_path, figures):
    """Every logged value at its step, training and test apart; test values are rarer."""
    log = [{"step": 10 * i, "loss": 2.0 / i} for i in range(1, 7)]
    log[2] |= {"test_loss": 1.5, "top1": 40.0, "top5": 80.0}
    log[5] |= {"test_loss": 1.0, "top1": 60.0, "top5": 90.0}
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    evaluate.plot_curves(tmp_path, config_of())
    drawn = [[(line.get_label(), line.get_xydata().tolist()) for line in axes.lines] for axes in figures[0].axes]
    loss = [[10.0 * i, 2.0 / i] for i in range(1, 7)]
    assert drawn[0] == [("training", loss), ("test", [[30.0, 1.5], [60.0, 1.0]])]
    assert drawn[1] == [("top-1", [[30.0, 40.0], [60.0, 60.0]]), ("top-5", [[30.0, 80.0], [60.0, 90.0]])]
    assert [axes.get_ylabel() for axes in figures[0].axes] == ["cross-entropy (nats)", "accuracy (%)"]
    assert (tmp_path / "curves.png").stat().st_size > 1000


def as_drawn(images):
    """Normalised images -> pixels in [0, 1], channel last."""
    mean, std = (np.array(v).reshape(3, 1, 1) for v in PLAIN)
    return (images.numpy() * std + mean).clip(0, 1).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("target", ["pixels", "norm-pixels", "hog"])
def test_masks_show_image_predicted_loss_mask_and_reconstruction(target, tmp_path, figures):
    """Visible patches stay as they are; hidden ones are grey in the mask, predicted in the reconstruction.

    Predictions of normalised pixels get the true mean and deviation of their patch back. What is no picture (HOG,
    features) is not drawn.
    """
    torch.manual_seed(0)
    model = hpm.create("vit_micro4", 16, target=target, decoder=(32, 1, 2))
    split = split_of(8, [0] * 8, 16)
    config, said = config_of(img_size=(16, 16), target=target), []
    dataset = data.Dataset("photos", ["a"], *PLAIN, split, split)
    model.register_forward_hook(lambda module, given, out: said.append((given[0], out)))
    evaluate.plot_masks(tmp_path, config, model, dataset, 0.5)
    assert model.training
    images, out = said[0]
    assert torch.equal(images, data.normalise(split.images[::2], *PLAIN)), "every other one, at most six of them"

    axes = np.array(figures[0].axes).reshape(4, -1)
    titles = [panel.get_title().split(",")[0] for panel in axes[0]]
    assert titles == ["image", "predicted loss", "mask"] + ["reconstruction"] * (target != "hog")
    patches = vit.patchify(images, 4)
    masked, rebuilt = patches.clone(), patches.clone()
    for image in range(4):
        for place, index in enumerate(out["hidden"][image].tolist()):
            true = patches[image, index]
            masked[image, index] = 0.0
            if target == "hog":
                continue
            rebuilt[image, index] = out["prediction"][image, place]
            if target == "norm-pixels":
                rebuilt[image, index] = rebuilt[image, index] * (true.var() + 1e-6).sqrt() + true.mean()
    for row in range(4):
        np.testing.assert_allclose(axes[row, 0].images[0].get_array(), as_drawn(images)[row], atol=1e-6)
        heat = axes[row, 1].images[1].get_array()
        np.testing.assert_allclose(heat, out["teacher_loss"][row].reshape(4, 4).numpy(), atol=1e-6)
        drawn = as_drawn(vit.unpatchify(masked, 4, (4, 4)))[row]
        np.testing.assert_allclose(axes[row, 2].images[0].get_array(), drawn, atol=1e-6)
        if target != "hog":
            drawn = as_drawn(vit.unpatchify(rebuilt, 4, (4, 4)))[row]
            np.testing.assert_allclose(axes[row, 3].images[0].get_array(), drawn, atol=1e-5)


def test_masks_of_grey_images_that_are_not_square(tmp_path, figures):
    """One channel, four rows of six patches, no loss predictor."""
    model = hpm.create("vit_micro4", (16, 24), 1, predictor="none", mask="random", decoder=(32, 1, 2))
    split = data.InMemory(torch.full((3, 1, 16, 24), 255, dtype=torch.uint8), torch.zeros(3).long(), (0.0,), (1.0,))
    dataset = data.Dataset("photos", ["a"], (0.0,), (1.0,), split, split)
    evaluate.plot_masks(tmp_path, config_of(img_size=(16, 24)), model, dataset, 0.0)
    axes = np.array(figures[0].axes).reshape(3, 3)
    assert [panel.get_title() for panel in axes[0]] == ["image", "mask", "reconstruction"]
    for row in range(3):
        mask = np.asarray(axes[row, 1].images[0].get_array())
        assert mask.shape == (16, 24)
        blocks = mask.reshape(4, 4, 6, 4).transpose(0, 2, 1, 3).reshape(24, 16)
        assert sorted(blocks.mean(axis=1).tolist()) == [0.0] * 18 + [1.0] * 6, "18 of 24 patches are hidden, whole ones"
