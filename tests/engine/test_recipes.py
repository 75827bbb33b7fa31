"""What recipes.py promises: the papers' hyperparameters, and for every mistake one line that helps."""

import math
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import hpm
import recipes
import vit
from tests.test_train import (  # noqa: F401 (fixtures)
    PLAIN,
    leave_no_trace,
    run,
    settings,
    small,
    small_photos,
    write_images,
)


def imagenet(monkeypatch):
    """folder:imagenet has as many images as ImageNet-1k."""
    split = data.InMemory(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1_281_167).long(), *PLAIN)
    monkeypatch.setattr(data, "folder", lambda path: data.Dataset("folder", ["one"] * 1000, *PLAIN, split, split))


PAPERS = {  # command: batch, peak learning rate, warm-up in epochs or steps, epochs, weight decay
    "supervised": (4096, 3e-3, "10,000 steps", 300, 0.3),  # ViT, table 3 and 4
    "mae": (4096, 1.5e-4 * 16, "40 epochs", 800, 0.05),  # MAE, table 8
    "hpm": (4096, 1.5e-4 * 16, "40 epochs", 800, 0.05),
    "finetune": (1024, 5e-4 * 4, "5 epochs", 100, 0.05),  # MAE, table 9
    "linear": (1024, 0.1 * 4, "9 epochs", 90, 0.0),  # MAE, table 10, with another optimizer
}


@pytest.mark.parametrize("task", PAPERS)
def test_the_defaults_for_imagenet_are_the_papers(task, monkeypatch):
    """On folder:PATH nothing is scaled down. ImageNet-1k has 1,281,167 training images."""
    imagenet(monkeypatch)
    config, _ = settings(f"--task {task} --data folder:imagenet --init x.pt")
    batch, lr, warmup, epochs, decay = PAPERS[task]
    assert (config.batch_size, config.epochs, config.weight_decay) == (batch, epochs, decay)
    assert config.lr == pytest.approx(lr)
    assert config.steps == math.ceil(epochs * 1_281_167 / batch)
    number, unit = warmup.replace(",", "").split()
    assert config.warmup == pytest.approx(int(number) * (1_281_167 / batch if unit == "epochs" else 1), rel=0.01)
    assert config.mask_ratio == 0.75
    assert config.alpha == (0.0, 0.5)


@pytest.mark.parametrize(("epochs", "warmup"), [(800, 40), (200, 40), (50, 25)])
def test_pre_training_warms_up_for_40_epochs_however_long_it_is(epochs, warmup, monkeypatch):
    """MAE's code, and HPM's for 200 and for 800 epochs. Ours: at most half of a run."""
    imagenet(monkeypatch)
    config, _ = settings(f"--task hpm --data folder:imagenet --epochs {epochs}")
    assert config.warmup == pytest.approx(warmup * 1_281_167 / 4096, abs=1)


@pytest.mark.parametrize(
    ("arch", "epochs", "drop_path"), [("vit_b16", 100, 0.1), ("vit_l16", 50, 0.2), ("vit_h14", 50, 0.3)]
)
def test_larger_models_are_fine_tuned_for_fewer_epochs_and_drop_more(arch, epochs, drop_path, monkeypatch):
    """MAE, table 9."""
    imagenet(monkeypatch)
    config, _ = settings(f"--task finetune --arch {arch} --data folder:imagenet --init x.pt")
    assert (config.epochs, config.drop_path) == (epochs, drop_path)
    assert config.layer_decay == (0.8 if arch == "vit_b16" else 0.75)


@pytest.mark.parametrize("batch", [4, 8, 24, 512])
def test_the_learning_rate_grows_with_the_batch_unless_it_is_given(batch, small):  # noqa: F811
    """lr = recipe's * B / 256 (Goyal et al. 2017)."""
    recipe = recipes.RECIPES["supervised", "photos"]["lr"]
    config, _ = settings(f"--arch vit_micro4 --batch-size {batch}")
    assert config.lr == pytest.approx(recipe * batch / 256)
    config, _ = settings(f"--arch vit_micro4 --batch-size {batch} --lr 0.007")
    assert config.lr == 0.007, "a learning rate that is given is not scaled"


@pytest.mark.parametrize(("epochs", "batch", "steps"), [(1, 4, 6), (2, 5, 10), (0.5, 4, 3), (0.01, 4, 1), (3, 48, 2)])
def test_epochs_become_steps_rounded_up_and_warm_up_is_a_share_of_them(epochs, batch, steps, small):  # noqa: F811
    """24 images an epoch."""
    config, _ = settings(f"--arch vit_micro4 --batch-size {batch} --epochs {epochs}")
    assert config.steps == steps
    assert config.warmup == round(recipes.RECIPES["supervised", "photos"]["warmup"] * steps)
    assert settings(f"--arch vit_micro4 --epochs {epochs} --warmup 0")[0].warmup == 0, "0 is a choice, not a gap"


def test_the_image_size_is_the_datas_own_or_224_or_what_is_given(small, monkeypatch):  # noqa: F811
    monkeypatch.setattr(data, "fashion_mnist", lambda path: small_photos()._replace(name="fashion-mnist"))
    for command, size in (
        ("--data fashion-mnist --arch vit_micro4", (28, 28)),
        ("--data fashion-mnist --arch vit_b16", (224, 224)),
        ("--arch vit_b16", (224, 224)),
        ("--arch vit_micro4 --img-size 192x256", (192, 256)),
    ):
        assert settings(command)[0].img_size == size, command


def test_labels_keeps_as_many_images_of_each_class(small):  # noqa: F811
    _, dataset = settings("--arch vit_micro4 --labels 9")
    assert dataset.train.labels.bincount().tolist() == [3, 3, 3]
    assert len(dataset.test) == 10


def test_help_fits_one_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert run("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120


BAD = {  # the command: words that its error has to have
    "--task supervise": "--task 'supervise' supervised finetune knn",
    "--task HPM": "--task 'HPM' hpm",
    "--arch vit_b15": "--arch 'vit_b15' vit_b16 vit_micro4",
    "--data photo": "'photo' photos fashion-mnist folder:PATH",
    "--task mae --mask blok": "--mask 'blok' block grid random",
    "--task mae --target pixel": "--target 'pixel' pixels norm-pixels hog",
    "--task hpm --predictor-loss relativ": "--predictor-loss 'relativ' relative absolute none",
    "--optimizer adam": "--optimizer 'adam' adamw sgd",
    "--decay cos": "--decay 'cos' cosine linear",
    "--dtype float16": "--dtype 'float16' bfloat16 float32",
    "--model vit_b16": "--model --help",
    "--lr fast": "--lr 'fast' --help",
    "--alpha 0.5": "--alpha '0.5' --help",
    "--img-size 30": "30x30 patch size 4 use 32x32",
    "--img-size 16x18": "16x18 patch size 4 use",
    "--img-size 0": "--img-size '0' --help",
    "--batch-size 6 --micro-batch 4": "--micro-batch 4 --batch-size 6 divisor",
    "--epochs 1 --steps 2": "--epochs --steps one of them",
    "--steps 0": "--steps 0 above 0",
    "--epochs -1": "--epochs -1.0 above 0",
    "--epochs inf": "--epochs inf above 0",
    "--lr 0": "--lr 0.0 above 0",
    "--lr nan": "--lr nan above 0",
    "--lr 0.1,0": "--lr (0.1, 0.0) above 0",
    "--lr 0.1,": "--lr '0.1,' --help",
    "--task mae --lr 0.1,0.2": "--lr mae give one",
    "--polyak 1": "--polyak 1.0 [0, 1)",
    "--task mae --polyak 0.9": "--polyak --task supervised finetune leave it out",
    "--pos-embed 3d": "--pos-embed '3d' 2d none relative",
    "--task mae --pool mean": "--pool nothing mae leave it out",
    "--task mpp --pool mean": "--pool nothing mpp leave it out",
    "--task hpm --drop-path 0.1": "--drop-path nothing hpm leave it out",
    "--gelu relu": "--gelu 'relu' tanh none",
    "--pixels raw": "--pixels 'raw' own half",
    "--task hpm --pos-embed 2d": "hpm sine-cosine --pos-embed leave",
    "--arch resnet50 --dropout 0.1": "--dropout resnet50 leave it out",
    "--arch resnet50 --checkpointing": "--checkpointing resnet50 leave it out",
    "--arch resnet50 --task mae": "resnet50 convolutions hidden patches",
    "--arch r50_vit_b16 --img-size 32 --task mpp": "r50_vit_b16 convolutions hidden patches",
    "--deduplicate photo": "'photo' photos fashion-mnist",
    "--task fewshot": "--task fewshot --init",
    "--batch-size 0": "--batch-size 0 above 0",
    "--micro-batch 0": "--micro-batch 0 above 0",
    "--labels 0": "--labels 0 above 0",
    "--seed -1": "--seed -1 at least 0",
    "--weight-decay -0.1": "--weight-decay -0.1 at least 0",
    "--mixup -1": "--mixup -1.0 at least 0",
    "--dropout 1": "--dropout 1.0 [0, 1)",
    "--drop-path 1": "--drop-path 1.0 [0, 1)",
    "--smoothing 1": "--smoothing 1.0 [0, 1)",
    "--erasing -0.5": "--erasing -0.5 [0, 1)",
    "--layer-decay 0": "--layer-decay 0.0 (0, 1]",
    "--randaugment 11": "--randaugment 11.0 0 to 10",
    "--randaugment 9": "--randaugment folder:PATH leave it out",
    "--task fewshot --init init.pt --labels 9": "fewshot 5 10 --labels",
    "--labels 25": "25 24 ask for fewer",
    "--task mae --mask-ratio 0": "mask ratio 0.0 between 0 and 1 0.75",
    "--task mae --mask-ratio 1": "mask ratio 1.0 between 0 and 1 0.75",
    "--task hpm --mask-ratio 0.99": "mask ratio 0.99 hides 16 of 16 at least 1",
    "--task hpm --mask-ratio 0.01": "mask ratio 0.01 hides 1 of 16 2 be hidden",
    "--task hpm --alpha 0,1.5": "--alpha 1.5 [0, 1] as 0,0.5",
    "--task hpm --predictor-loss none": "hard masks loss predictor relative another mask",
    "--task hpm --target dino": "--target dino --target-weights",
    "--task hpm --target clip --target-weights none.pt": "none.pt check the path",
    "--task linear": "--task linear --init",
    "--task knn": "--task knn --init",
    "--task finetune": "--task finetune --init",
    "--task finetune --init none.pt": "none.pt check the path",
    "--task finetune --init text.pt": "text.pt torch safetensors .npz",
    "--task finetune --init page.pt": "page.pt a web page",
    "--task mae --init objects.npz": "objects.npz Object arrays",
    "--task hpm --init http://nowhere.invalid/vit.pt": "http://nowhere.invalid/vit.pt closed try again",
    "--task mae --init deep.pt": "deep.pt does not fit decoder depth 3 2",
    "--task linear --init narrow.pt": "narrow.pt does not fit 32 64",
    "--data fashion-mnist --data-dir here": "fashion-mnist here can't be reached --data-dir",
    "--data folder:nowhere": "nowhere/train PATH/train/CLASS",
    "--data folder:empty": "no image empty/train/ant .png remove",
    "--data folder:odd": "odd/train odd/val differ bee only in val",
    "--resume": "nothing to resume run/config.json --out leave --resume out",
    "--fsdp": "--fsdp several processes torchrun",
    "--device cuda": "--device cuda GPU --device cpu",
}


@pytest.mark.parametrize("command", BAD)
def test_a_mistake_is_answered_in_one_line_that_helps_and_nothing_is_written(command, small, monkeypatch, capsys):  # noqa: F811
    """What was given, what is allowed, what to do; exit code 2."""
    write_images("empty", ant=2, cat=1)
    for file in Path("empty/train/ant").iterdir():
        file.unlink()
    write_images("odd", ant=1)
    Path("odd/val/bee").mkdir()
    Image.new("RGB", (8, 8)).save("odd/val/bee/1.png")
    Path("text.pt").write_text("no weights")
    Path("page.pt").write_text("<html>Please log in</html>")
    np.savez("objects.npz", cls=np.array([{}], dtype=object))
    if "deep.pt" in command:
        deep = hpm.create("vit_micro4", 16, 3, mask="random", predictor="none", decoder=(64, 3, 4))
        torch.save({"model": deep.state_dict()}, "deep.pt")
    if "narrow.pt" in command:
        torch.save(vit.ViT(16, 4, num_classes=0, dim=32, depth=6, num_heads=4).state_dict(), "narrow.pt")

    def closed(*_, **__):
        raise OSError("the network is closed")

    monkeypatch.setattr(urllib.request, "urlopen", closed)
    monkeypatch.setenv("VIT_CACHE", "cache")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = command.split()
    rest = [pair for pair in ("--arch vit_micro4", "--img-size 16", "--out run") if pair.split()[0] not in given]
    assert run(" ".join([command, *rest])) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1, f"not one line: {err}"
    missing = [word for word in BAD[command].split() if word not in err]
    assert not missing, f"{missing} are not in: {err}"
    assert not out, "nothing has begun"
    assert not Path("run").exists(), "a mistake leaves no folder behind"
