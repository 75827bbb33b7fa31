"""The studies: intervals and verdicts, runs that go on where they were, and a page that says what the results say."""

import json
import math
import shutil
import types

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import hpm
from engine import config
from studies import __main__ as page
from studies import mae_masks, oracle, study


def claim(differences, margin=None):
    return study.Claim("a claim", "a paper", np.array(differences), "points", margin)


def test_the_interval_is_students():
    """Mean ± t s / √n; the quantiles of Student's t are from any table of it: 4.303 for 2 degrees, 2.776 for 4."""
    mean, half = study.interval([1.0, 2.0, 6.0])
    assert mean == pytest.approx(3.0)
    assert half == pytest.approx(4.303 * math.sqrt(7.0 / 3), rel=1e-3)  # the variance of 1, 2, 6 is 7
    mean, half = study.interval([0.0, 1.0, 2.0, 3.0, 4.0])
    assert half == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-3)
    assert study.interval([5.0]) == (5.0, math.inf)  # one seed says nothing of the spread


@pytest.mark.parametrize(
    ("differences", "margin", "expected"),
    [
        ([1.0, 1.1, 0.9], None, "shown"),
        ([-1.0, -1.1, -0.9], None, "the opposite"),
        ([1.0, -1.0, 0.5], None, "not shown"),
        ([1.0], None, "not shown"),
        ([1.0, 1.1, 0.9], 2.0, "shown"),  # alike
        ([-1.0, -1.1, -0.9], 2.0, "shown"),
        ([3.0, 3.1, 2.9], 2.0, "the opposite"),
        ([-3.0, -3.1, -2.9], 2.0, "the opposite"),
        ([2.0, 2.1, 1.9], 2.0, "not shown"),  # across the edge of the margin
        ([5.0, -5.0, 0.0], 2.0, "not shown"),
    ],
)
def test_a_verdict_is_where_the_interval_lies(differences, margin, expected):
    assert study.verdict(claim(differences, margin)) == expected


def test_differences_are_paired_by_seed():
    """Seeds that only one arm has do not count, whatever the order of the runs."""
    runs = [
        dict(arm=arm, seed=seed, scores=dict(linear=dict(top1=top1)))
        for arm, seed, top1 in [("a", 2, 10.0), ("b", 1, 1.0), ("a", 1, 5.0), ("b", 2, 2.0), ("a", 3, 99.0)]
    ]
    assert study.differences(runs, "a", "b", "linear", "top1").tolist() == [4.0, 8.0]


def test_an_arm_has_one_colour_in_all_panels():
    """Also where another arm, without a teacher, has nothing to show in one of them."""
    logs = {"MAE": dict(rec=1.0), "HPM": dict(rec=2.0, auc=0.8), "in turn": dict(rec=3.0, auc=0.9)}
    runs = [dict(arm=arm, seed=0, log=[dict(step=step) | log for step in (1, 2)]) for arm, log in logs.items()]
    figure = Figure()
    study.curves(runs, {"loss": "rec", "object": "auc"}, figure)
    first, second = ({line.get_label(): line.get_color() for line in axes.lines} for axes in figure.axes)
    assert len(set(first.values())) == len(first) == 3
    assert second == {arm: first[arm] for arm in ("HPM", "in turn")}


@pytest.fixture
def made(monkeypatch, tmp_path):
    """The list of commands that a study in an empty folder runs; each of them leaves what train.py leaves."""
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "FOLDERS", tmp_path / "runs")
    commands = []

    def run(command, **options):
        commands.append(command)
        out = study.Path(command[command.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.jsonl").write_text(json.dumps(dict(step=1, loss=1.0)) + "\n" + json.dumps(dict(step=2, top1=50.0)))
        (out / "last.pt").touch()
        (out / "result.json").write_text(json.dumps(dict(top1=50.0, seconds=3.0)))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(study.subprocess, "run", run)
    return commands


def small_study(**changes):
    values = dict(RUNS={"a": "--steps 1", "b": "--steps 2"}, PROBES={"linear": "--init {init}"}, SEEDS=(0, 1))
    return types.SimpleNamespace(**values | changes)


def test_what_is_there_is_not_made_again(made):
    """Every run and probe once; a second call makes nothing; a new seed, arm or probe makes what is missing of it."""
    runs = study.complete(small_study(), "small")
    assert len(made) == 8  # two arms, two seeds, each with a probe
    assert len(runs) == 4
    assert runs[0]["scores"] == dict(train=dict(top1=50.0, seconds=3.0), linear=dict(top1=50.0, seconds=3.0))
    assert runs[0]["log"] == [dict(step=2, top1=50.0)]
    study.complete(small_study(), "small")
    assert len(made) == 8
    study.complete(small_study(SEEDS=(0, 1, 2)), "small")
    assert len(made) == 12
    study.complete(small_study(PROBES={"linear": "--init {init}", "knn": "--task knn --init {init}"}), "small")
    assert len(made) == 16
    study.complete(small_study(RUNS={"other name": "--steps 2"}), "another")  # studies share runs
    assert len(made) == 16
    dense = small_study(PROBES={"segment": "--task segment --init {init}"})
    shared = study.complete(dense, "dense")  # and may measure other things
    assert len(made) == 20
    assert [set(run["scores"]) for run in shared] == 4 * [{"train", "segment"}]
    shutil.rmtree(study.FOLDERS)  # as in a clone, which has the results alone
    study.complete(small_study(), "small")
    study.complete(dense, "dense")
    assert len(made) == 20


def test_a_run_that_fails_stops_no_other(made, monkeypatch, capsys):
    """The others are made and written; the program says which it was and why, and ends with 1."""
    run = study.subprocess.run

    def fail(command, **options):
        done = run(command, **options)
        broken = "--steps 1 " in f"{' '.join(command)} "
        return types.SimpleNamespace(returncode=int(broken), stderr="no space left") if broken else done

    monkeypatch.setattr(study.subprocess, "run", fail)
    with pytest.raises(SystemExit, match="1"):
        study.complete(small_study(), "small")
    assert [(run["arm"], run["seed"]) for run in study.read("small")] == [("b", 0), ("b", 1)]
    err = capsys.readouterr().err
    assert "small: a, seed 0:" in err
    assert "no space left" in err


def test_the_oracle_says_the_students_own_losses():
    """Each patch's true loss, less the mean of its turn, averaged over the turns that hide it: one turn at a time."""
    torch.manual_seed(0)
    model = hpm.create("vit_micro8", 32, 3, teacher="in-turn", decoder=(16, 1, 2)).eval()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16, 2)
    torch.nn.init.normal_(model.teacher.decoder_embed.weight)  # the teacher is another one, and is not asked
    total, times = torch.zeros(2, 16), torch.zeros(2, 16)
    for mask in hpm.hide_in_turn(noise[..., 1], 12).unbind(dim=1):
        with torch.no_grad():
            losses = model(images, None, mask=mask)["patch_loss"]  # (2, 12)
        for b in range(2):
            for i, loss in zip(mask[b].nonzero()[:, 0].tolist(), losses[b] - losses[b].mean(), strict=True):
                total[b, i] += loss
                times[b, i] += 1
    found, features = oracle.true_losses(model, images, noise)
    torch.testing.assert_close(found, total / times, rtol=1e-4, atol=1e-5)
    assert features is None
    assert oracle.true_losses(model, images) == (None, None)


def test_a_run_that_was_killed_goes_on(made):
    """With a checkpoint and no result it is resumed; without a checkpoint it starts anew."""
    flags, seed = "--steps 1", 0
    study.make("a", flags, seed, {})
    assert "--overwrite" in made[0]
    assert "--resume" not in made[0]
    next(study.FOLDERS.iterdir()).joinpath("result.json").unlink()
    study.make("a", flags, seed, {})
    assert "--resume" in made[1]


@pytest.mark.parametrize("name", page.names())
def test_what_a_study_tells_train_py_is_for_the_task(name, made):
    """Also with a device: a flag that does nothing in a task, as --no-compile for neighbours, ends the run."""
    module = page.importlib.import_module(f"studies.{name}")
    study.complete(types.SimpleNamespace(RUNS=module.RUNS, PROBES=module.PROBES, SEEDS=[0]), name, device="cpu")
    told = [command[2:] for command in made if command[1] == "train.py"]
    assert len(made) == len(module.RUNS) * (1 + len(module.PROBES))
    for given in map(config.parse, told):
        config.check_values(given)
        config.check_tasks(given, given.task or "supervised")
        assert given.device == "cpu"


@pytest.mark.parametrize("name", page.names())
def test_a_study_says_all_that_the_page_needs(name):
    """Its source first, then runs, probes and seeds; of claims one difference for each seed, at least three in the end.

    Before that, the page says how many of the runs are done.
    """
    module = page.importlib.import_module(f"studies.{name}")
    assert module.__doc__
    runs = study.read(name)
    done = {(run["arm"], run["seed"]) for run in runs}
    planned = {(arm, seed) for arm in module.RUNS for seed in module.SEEDS}
    assert done <= planned
    assert (f"{len(done)} of {len(planned)} runs" in page.section(name)) == (done < planned)
    assert all(run["flags"] == module.RUNS[run["arm"]] for run in runs), "results of other flags; run the study again"
    for told in module.claims(runs):
        assert done < planned or len(told.differences) >= 3, told.text
    assert (study.RESULTS / f"{name}.png").exists()


def test_the_page_names_every_study():
    """With results, or as one that waits for them."""
    studies = (
        "hpm_ablation hpm_targets hpm_teacher downstream mae_masks vit_compute vit_data_size vit_inside vit_pooling"
    )
    studies += " vit_positions vit_resolution vit_self_supervised"
    assert sorted([*page.names(), *page.waiting()]) == sorted(studies.split())


def test_the_page_says_what_the_results_say():
    """docs/STUDIES.md is `python -m studies` of the stored results, word by word."""
    assert page.PAGE.read_text() == page.page(), "run python -m studies"


@pytest.mark.slow
def test_what_the_asymmetric_encoder_saves_is_what_the_studys_text_says():
    """Products of matrices alone, 2 operations a multiplication: of 1 + 196 tokens the encoder sees 1 + 49."""

    def blocks(tokens, D, depth):
        return depth * (2 * tokens * 12 * D * D + 4 * tokens * tokens * D)  # qkv, proj, MLP; q kᵀ and A v

    for arch, D, depth, times in (("vit_l16", 1024, 24, "3.2"), ("vit_b16", 768, 12, "2.4")):
        decoder = 2 * 50 * D * 512 + blocks(197, 512, 8) + 2 * 147 * 512 * 768
        asymmetric = 2 * 49 * 768 * D + blocks(50, D, depth) + decoder
        symmetric = 2 * 196 * 768 * D + blocks(197, D, depth) + decoder
        counted = mae_masks.operations(arch, 224)
        assert counted == pytest.approx((asymmetric, symmetric), rel=0.02)
        assert f"{counted[1] / counted[0]:.1f}" == times
        assert f"{times} times" in mae_masks.__doc__
