"""What engine/config.py promises: one frozen configuration, and for every mistake one line that helps."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import hpm
import vit
from engine import config as flags
from engine import distributed, files
from tests.engine.runs import MICRO, run, settings, small_photos, write_images


def test_a_configuration_is_frozen_and_complete(small):
    """Nothing changes in the middle of a run: every field has a value that is its own."""
    config, _ = settings(MICRO)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = (0.1,)
    missing = {field.name for field in flags.FIELDS if getattr(config, field.name) is None}
    named = "data_dir labels deduplicate init init_grid images out epochs target_weights workers"
    assert missing == set(named.split())


def test_what_is_saved_gives_the_same_configuration_back(small):
    """Through JSON, which knows no tuples. Where the run is, and how it was started, is not part of it."""
    config, _ = settings(f"{MICRO} --task hpm --lr 0.01 --alpha 0,0.4 --img-size 16x24 --out here --overwrite")
    saved = json.loads(json.dumps(flags.saved_values(config)))
    assert saved.keys().isdisjoint({"out", "overwrite", "resume"})
    again = flags.resumed(flags.parse(["--resume", "--out", "there"]), saved, Path("there/config.json"))
    assert again == dataclasses.replace(config, out="there", overwrite=False, resume=True)


@pytest.mark.parametrize("flag", ["--device cpu", "--dtype bfloat16", "--compile", "--data-dir x", "--checkpointing"])
def test_what_does_not_change_a_run_may_be_given_anew(flag, small, monkeypatch):
    """The machine may be another one when it goes on."""
    if "--data-dir" in flag:
        monkeypatch.setattr(data, "fashion_mnist", lambda path: small_photos())
    config, _ = settings(f"{MICRO} --data fashion-mnist" if "--data-dir" in flag else MICRO)
    given = flags.parse(["--resume", *flag.split()])
    again = flags.resumed(given, flags.saved_values(config), Path("run/config.json"))
    name, *value = flag[2:].replace("-", "_").split()
    assert getattr(again, name) == (value[0] if value else True)


def test_help_fits_one_screen_and_names_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert run("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120
    named = {line.split()[0].rstrip(",") for line in lines if line.startswith("  --")}
    assert named == {
        f"--{field.name.replace('_', '-')}" for field in flags.FIELDS if field.metadata["metavar"] is not None
    }


@pytest.mark.parametrize(
    ("command", "size"),
    [
        ("--data fashion-mnist --arch vit_micro4", (28, 28)),
        ("--data fashion-mnist --arch vit_b16", (224, 224)),
        ("--data cifar10 --arch vit_micro4", (32, 32)),
        ("--arch vit_micro4", (32, 32)),
        ("--arch vit_b16", (224, 224)),
        ("--arch vit_b8", (224, 224)),
        ("--arch resnet50", (224, 224)),
        ("--arch vit_micro4 --img-size 192x256", (192, 256)),
        ("--arch vit_micro4 --img-size 64", (64, 64)),
    ],
)
def test_the_image_size_is_the_datas_own_or_224_or_what_is_given(command, size, small, monkeypatch):
    """A vit_micro4 takes small images as they are; of 28 pixels larger patches would be too few."""
    monkeypatch.setattr(data, "fashion_mnist", lambda path: small_photos()._replace(name="fashion-mnist"))
    monkeypatch.setattr(data, "cifar", lambda name, path: small_photos()._replace(name=name))
    assert settings(command)[0].img_size == size


def test_an_unknown_name_is_answered_with_the_nearest(small, capsys):
    assert run("--arch vit_micr4") == 2
    assert "did you mean vit_micro4?" in capsys.readouterr().err


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
    "--img-size 16x16x16": "--img-size '16x16x16' --help",
    "--batch-size 6 --micro-batch 4": "--micro-batch 4 --batch-size 6 divisor",
    "--epochs 1 --steps 2": "--epochs --steps one of them",
    "--steps 0": "--steps 0 above 0",
    "--epochs -1": "--epochs -1.0 above 0",
    "--epochs inf": "--epochs inf above 0",
    "--lr 0": "--lr 0.0 above 0",
    "--lr nan": "--lr nan above 0",
    "--lr 0.1,0": "--lr 0.1,0.0 above 0",
    "--lr 0.1,": "--lr '0.1,' --help",
    "--task mae --lr 0.1,0.2": "--lr mae give one",
    "--task knn --init init.pt --lr 0.1,0.2": "--lr nothing knn supervised leave it out",
    "--polyak 1": "--polyak 1.0 [0, 1)",
    "--task mae --polyak 0.9": "--polyak --task supervised finetune leave it out",
    "--polyak 0.9 --fsdp": "--polyak --fsdp leave one of them out",
    "--pos-embed 3d": "--pos-embed '3d' 2d none relative",
    "--task mae --pool mean": "--pool nothing mae leave it out",
    "--task mpp --pool mean": "--pool nothing mpp leave it out",
    "--task hpm --drop-path 0.1": "--drop-path nothing hpm leave it out",
    "--task mae --dropout 0.1": "--dropout nothing mae leave it out",
    "--pool max": "--pool 'max' cls mean",
    "--gelu relu": "--gelu 'relu' tanh exact",
    "--pixels raw": "--pixels 'raw' own half",
    "--task hpm --pos-embed sincos": "--pos-embed nothing hpm leave it out",
    "--arch resnet50 --dropout 0.1": "--dropout resnet50 leave it out",
    "--arch resnet50 --pos-embed 1d": "--pos-embed resnet50 leave it out",
    "--arch resnet50 --checkpointing": "--checkpointing resnet50 leave it out",
    "--arch resnet50 --task mae": "resnet50 convolutions masked patches",
    "--arch r50_vit_b16 --img-size 32 --task mpp": "r50_vit_b16 convolutions masked patches",
    "--deduplicate photo": "'photo' photos fashion-mnist",
    "--task fewshot": "--task fewshot --init",
    "--batch-size 0": "--batch-size 0 above 0",
    "--micro-batch 0": "--micro-batch 0 above 0",
    "--labels 0": "--labels 0 above 0",
    "--warmup -1": "--warmup -1 at least 0",
    "--seed -1": "--seed -1 at least 0",
    "--weight-decay -0.1": "--weight-decay -0.1 at least 0",
    "--mixup -1": "--mixup -1.0 at least 0",
    "--cutmix nan": "--cutmix nan at least 0",
    "--dropout 1": "--dropout 1.0 [0, 1)",
    "--drop-path 1": "--drop-path 1.0 [0, 1)",
    "--smoothing 1": "--smoothing 1.0 [0, 1)",
    "--erasing -0.5": "--erasing -0.5 [0, 1)",
    "--layer-decay 0": "--layer-decay 0.0 (0, 1]",
    "--layer-decay 1.1": "--layer-decay 1.1 (0, 1]",
    "--randaugment 11": "--randaugment 11.0 0 to 10",
    "--randaugment 9": "--randaugment folder:PATH leave it out",
    "--task fewshot --init init.pt --labels 9": "--labels nothing fewshot knn leave it out",
    "--labels 25": "25 24 ask for fewer",
    "--task mae --mask-ratio 0": "mask ratio 0.0 between 0 and 1 0.75",
    "--task mae --mask-ratio 1": "mask ratio 1.0 between 0 and 1 0.75",
    "--task hpm --mask-ratio 0.99": "mask ratio 0.99 hides 16 of 16 leave 1",
    "--task hpm --mask-ratio 0.01": "mask ratio 0.01 hides 1 of 16 hide 2",
    "--task hpm --alpha 0,1.5": "--alpha 0.0,1.5 [0, 1] as 0,0.5",
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
def test_a_mistake_is_answered_in_one_line_that_helps_and_nothing_is_written(command, small, monkeypatch, capsys):
    """What was given, what is allowed, what to do; exit code 2."""
    if "folder:" in command:
        write_images("empty", ant=2, cat=1)
        for file in Path("empty/train/ant").iterdir():
            file.unlink()
        write_images("odd", ant=1)
        Path("odd/val/bee").mkdir()
        Image.new("RGB", (8, 8)).save("odd/val/bee/1.png")
    Path("text.pt").write_text("no weights")
    Path("page.pt").write_text("<html>Please log in</html>")
    if "objects.npz" in command:
        np.savez("objects.npz", cls=np.array([{}], dtype=object))
    if "deep.pt" in command:
        deep = hpm.create("vit_micro4", 16, 3, mask="random", predictor="none", decoder=(64, 3, 4))
        torch.save({"model": deep.state_dict()}, "deep.pt")
    if "narrow.pt" in command:
        torch.save(vit.ViT(16, 4, num_classes=0, dim=32, depth=6, num_heads=4).state_dict(), "narrow.pt")

    def closed(*_, **__):
        raise OSError("the network is closed")

    monkeypatch.setattr(files, "receive", closed)
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


def test_there_are_as_many_test_images_as_processes(small, monkeypatch, capsys):
    """Else one would have nothing to evaluate. What else they cannot share is in test_distributed.py."""
    few = small_photos()
    monkeypatch.setattr(data, "photos", lambda size: few._replace(test=few.test.part(torch.tensor([0]))))
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    assert run(f"{MICRO} --out run") == 2
    assert "2 processes, but 1 test images; use fewer processes" in capsys.readouterr().err


def test_there_are_as_many_gpus_as_processes_of_a_machine(small, monkeypatch, capsys):
    """However many machines there are."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(distributed, "WORLD_SIZE", 4)
    monkeypatch.setattr(distributed, "LOCAL_WORLD_SIZE", 2)
    settings(f"{MICRO} --batch-size 8 --device cuda")
    monkeypatch.setattr(distributed, "LOCAL_WORLD_SIZE", 4)
    assert run(f"{MICRO} --batch-size 8 --device cuda --out run") == 2
    assert "4 processes, but 2 GPUs" in capsys.readouterr().err


def test_a_process_gets_its_share_of_the_batch_at_once(small, monkeypatch):
    """The default micro-batch."""
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    assert settings(f"{MICRO} --batch-size 8")[0].micro_batch == 4
