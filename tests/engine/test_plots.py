"""What engine/plots.py and probes.plot_masks promise: what is in the log, and what the model saw and said."""

import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import data
import hpm
import vit
from downstream import probes
from engine import distributed, plots
from tests.engine.runs import PLAIN


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, and where; nothing is drawn, for that takes most of the time."""
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: kept.append((figure, path)))
    return kept


def write_log(folder, log):
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


def drawn(figure):
    """Of each of its axes: the title, and the name and the points of each line."""
    lines = [[(line.get_label(), line.get_xydata().tolist()) for line in axes.lines] for axes in figure.axes]
    return list(zip([axes.get_ylabel() for axes in figure.axes], lines, strict=True))


def test_curves_show_what_the_log_says(tmp_path, figures):
    """Every logged value at its step, training and test apart; test values are rarer. Half a line does not count."""
    log = [{"step": 10 * i, "loss": 2.0 / i} for i in range(1, 7)]
    log[2] |= {"test_loss": 1.5, "top1": 40.0, "top5": 80.0}
    log[5] |= {"test_loss": 1.0, "top1": 60.0, "top5": 90.0}
    write_log(tmp_path, log)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 70, "lo')
    plots.plot_curves(tmp_path)
    [(figure, path)] = figures
    loss = [[10.0 * i, 2.0 / i] for i in range(1, 7)]
    assert drawn(figure) == [
        ("cross-entropy (nats)", [("training", loss), ("test", [[30.0, 1.5], [60.0, 1.0]])]),
        ("accuracy (%)", [("top-1", [[30.0, 40.0], [60.0, 60.0]]), ("top-5", [[30.0, 80.0], [60.0, 90.0]])]),
    ]
    assert {axes.get_xlabel() for axes in figure.axes} == {"step"}
    assert all(axes.get_legend() for axes in figure.axes), "what is what"
    assert path == tmp_path / "curves.png"


def test_curves_of_pre_training_show_what_it_logs(tmp_path, figures):
    """Reconstruction loss and, with a loss predictor, its rank correlation; not their sum, not the test's top-1."""
    write_log(
        tmp_path, [{"step": 1, "loss": 3.0, "rec": 1.0, "correlation": 0.2, "test_rec": 2, "test_correlation": 0}]
    )
    plots.plot_curves(tmp_path)
    assert drawn(figures[0][0]) == [
        ("reconstruction loss", [("training", [[1, 1.0]]), ("test, random masks", [[1, 2]])]),
        (
            "rank correlation of predicted and true loss",
            [("training", [[1, 0.2]]), ("test, random masks", [[1, 0]])],
        ),
    ]


def test_curves_show_what_the_teacher_knows_of_objects(tmp_path, figures):
    """Two more panels, where the data knows its objects."""
    line = {"rec": 1.0, "correlation": 0.2, "test_rec": 2.0, "test_correlation": 0.0}
    scored = line | {"test_object_auc": 0.8, "test_object_auc_at_place": 0.7, "test_hard_ratio": 1.2}
    write_log(tmp_path, [{"step": 1} | scored, {"step": 2} | scored, {"step": 3} | line])
    plots.plot_curves(tmp_path)
    shown = drawn(figures[0][0])
    assert [lines for _, lines in shown][2:] == [
        [
            ("in an image: place alone has 0.85 on scenes", [[1, 0.8], [2, 0.8]]),
            ("at a place: place alone has 0.5", [[1, 0.7], [2, 0.7]]),
        ],
        [("test", [[1, 1.2], [2, 1.2]])],
    ]
    assert [title.split()[0] for title, _ in shown] == ["reconstruction", "rank", "object", "loss"]
    assert len(figures[0][0].axes) == 4


def as_drawn(images):
    """Normalised images -> pixels in [0, 1], channel last, in float64."""
    mean, std = (np.array(v).reshape(3, 1, 1) for v in PLAIN)
    return (images.double().numpy() * std + mean).clip(0, 1).transpose(0, 2, 3, 1)


def pictured(target="pixels", n=8):
    """A small HPM with that target, and data: n test images."""
    torch.manual_seed(0)
    model = hpm.create("vit_micro4", 16, target=target, decoder=(32, 1, 2))
    images = torch.randint(256, (n, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    split = data.InMemory(images, torch.zeros(n).long(), *PLAIN)
    return model, data.Dataset("photos", ["a"], *PLAIN, None, split)


@pytest.mark.parametrize("target", ["pixels", "norm-pixels", "hog"])
def test_masks_show_image_predicted_loss_mask_and_reconstruction(target, tmp_path, figures):
    """Visible patches stay as they are; hidden ones are grey in the mask, predicted in the reconstruction.

    Predictions of normalised pixels get the true mean and standard deviation of their patch back. What is no picture
    (HOG, features) is not drawn. Pixels in [0, 1] are computed in float32, from few products: 1e-5 is 80 units.
    """
    model, dataset = pictured(target)
    said = []
    model.register_forward_hook(lambda module, given, out: said.append((*given, out, module.training)))
    probes.plot_masks(tmp_path, model, dataset, (16, 16), 0.5, 3, "cpu")
    assert model.training
    images, noise, hard_fraction, out, training = said[0]
    assert not training, "no dropout"
    assert hard_fraction == 0.5
    assert torch.equal(noise, data.draw_noise(4, 16, 1, 3, 0, "cpu")), "the same masks after each evaluation"
    assert torch.equal(images, data.normalise(dataset.test.images[::2], *PLAIN)), "every other one, at most six"

    [(figure, path)] = figures
    assert path == tmp_path / "masks.png"
    axes = np.array(figure.axes).reshape(4, -1)
    titles = [panel.get_title().split(",")[0] for panel in axes[0]]
    assert titles == ["image", "predicted loss", "mask"] + ["reconstruction"] * (target != "hog")
    assert ("true mean" in axes[0, -1].get_title()) == (target == "norm-pixels"), "what was put into it"
    patches = vit.patchify(images, 4).double()
    masked, rebuilt = patches.clone(), patches.clone()
    for image in range(4):
        for place, index in enumerate(out["hidden"][image].tolist()):
            true = patches[image, index]
            masked[image, index] = 0.0
            if target == "hog":
                continue
            rebuilt[image, index] = out["prediction"][image, place].double()
            if target == "norm-pixels":
                rebuilt[image, index] = rebuilt[image, index] * (true.var() + 1e-6).sqrt() + true.mean()
    for row in range(4):
        pictures = [as_drawn(images)[row], None, as_drawn(vit.unpatchify(masked, 4, (4, 4)))[row]]
        pictures += [as_drawn(vit.unpatchify(rebuilt, 4, (4, 4)))[row]] * (target != "hog")
        for panel, picture in zip(axes[row], pictures, strict=True):
            if picture is not None:
                np.testing.assert_allclose(panel.images[0].get_array(), picture, rtol=0, atol=1e-5)
        grey, heat = (image.get_array() for image in axes[row, 1].images)
        np.testing.assert_allclose(grey, pictures[0].mean(axis=-1), rtol=0, atol=1e-5)
        np.testing.assert_array_equal(heat, out["teacher_loss"][row].reshape(4, 4).numpy())


def test_masks_of_grey_images_that_are_not_square(tmp_path, figures):
    """One channel, four rows of six patches, no loss predictor, blocks."""
    model = hpm.create("vit_micro4", (16, 24), 1, predictor="none", mask="block", decoder=(32, 1, 2))
    images, labels = torch.full((3, 1, 16, 24), 255, dtype=torch.uint8), torch.zeros(3).long()
    dataset = data.Dataset("photos", ["a"], (0.0,), (1.0,), None, data.InMemory(images, labels, (0.0,), (1.0,)))
    model.eval()
    probes.plot_masks(tmp_path, model, dataset, (16, 24), 0.0, 0, "cpu")
    assert not model.training, "as it was"
    axes = np.array(figures[0][0].axes).reshape(3, 3)
    assert [panel.get_title() for panel in axes[0]] == ["image", "mask", "reconstruction"]
    for row in range(3):
        mask = np.asarray(axes[row, 1].images[0].get_array())
        assert mask.shape == (16, 24)
        blocks = mask.reshape(4, 4, 6, 4).transpose(0, 2, 1, 3).reshape(24, 16)
        assert sorted(blocks.mean(axis=1).tolist()) == [0.0] * 18 + [1.0] * 6, "18 of 24 patches are hidden, whole ones"


def test_of_several_processes_the_first_draws(tmp_path, figures, monkeypatch):
    """All of them run the model, for each may hold a part of it."""
    monkeypatch.setattr(distributed, "RANK", 1)
    model, dataset = pictured()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    probes.plot_masks(tmp_path, model, dataset, (16, 16), 0.5, 0, "cpu")
    assert calls == [1]
    assert figures == []


def test_figures_are_png_files(tmp_path):
    write_log(tmp_path, [{"step": 1, "loss": 3.0}])
    plots.plot_curves(tmp_path)
    probes.plot_masks(tmp_path, *pictured(n=1), (16, 16), 0.5, 0, "cpu")
    for name in ("curves.png", "masks.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
