"""What a GPU has to be asked: `python -m tests.engine.on_gpu`, started by test_cuda.py, in two minutes.

Each `check_…` is one claim, and fails by an assertion; what it prints last is JSON, with a traceback for each that did.
Models have two blocks and images 16 pixels, so that most of the time is the compiler's. `cpu` as an argument rehearses
all of it without a GPU, uncompiled.
"""

import contextlib
import copy
import functools
import json
import math
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

import data
import hpm
import train
import vit
from downstream import probes
from engine import memory
from related import mpp
from tests.engine.launch import SHALLOW
from tests.engine.runs import PLAIN, STILL, coloured, log, run, settings, write_images

DEVICE = "cpu" if sys.argv[1:] == ["cpu"] else "cuda"
MICRO = "--arch vit_micro4 --img-size 16 --batch-size 8 --lr 0.003"
# On a GPU no flag is needed for this.
DEFAULTS = "" if DEVICE == "cuda" else "--dtype bfloat16"
EVERYTHING = "--mixup 0.8 --cutmix 1 --erasing 0.5 --smoothing 0.1 --dropout 0.1 --drop-path 0.1"
# 16 bits of bfloat16, of which 8 are digits: a value is rounded to 2^-9 of it, a sum of many to less.
BFLOAT16 = 2**-6


def photos(size=None):
    """32 training and 16 test images: all batches are of eight, for the compiler begins anew with another size."""
    splits = (data.InMemory(*coloured(n, seed=n), *PLAIN) for n in (32, 16))
    return data.Dataset("photos", ["red", "green", "blue"], *PLAIN, *splits)


# ---------------------------------------------------------------------------------------------
# The same numbers as on the CPU
# ---------------------------------------------------------------------------------------------


def outcome(model, images, noise, device):
    """Losses and masks of one step, and the gradients: on the CPU again."""
    model = copy.deepcopy(model).to(device)
    options = {"hard_fraction": 0.5} if isinstance(model, hpm.HPM) else {}
    out = model(images.to(device), noise.to(device), **options)
    out["loss"].backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().cpu() for name, value in out.items() if value is not None}, gradients


def close(ours, theirs, what, rel):
    """Every number within `rel` of the largest."""
    difference, largest = (ours.double() - theirs.double()).abs().max().item(), theirs.abs().max().item()
    assert difference <= rel * largest, f"{what}: {difference} beside {largest}"


def check_hpm_and_mpp_give_the_losses_masks_and_gradients_of_the_cpu():
    """In full float32: sums of at most 10^3 terms, rounded to 6e-8 in another order, and attention's exponentials,
    for which GPUs have formulas of their own: 1e-4 of a loss, 1e-3 of the largest gradient."""
    torch.set_float32_matmul_precision("highest")
    images = data.normalise(coloured(8, seed=3)[0], *PLAIN)
    noise = torch.rand(8, 16, 5, generator=torch.Generator().manual_seed(0))
    models = {}
    for target in ("pixels", "norm-pixels", "hog", "ema"):
        models[target] = hpm.create("vit_micro4", 16, target=target, decoder=(32, 1, 2))
    for mask in ("random", "block", "grid"):
        models[mask] = hpm.create("vit_micro4", 16, mask=mask, predictor="absolute", decoder=(32, 1, 2))
    models["mpp"] = mpp.create("vit_micro4", 16, *PLAIN)
    for name, model in models.items():
        numbers = noise[..., 0] if model.noise_columns == 1 else noise[..., : model.noise_columns]
        (cpu, wanted), (gpu, gradients) = (outcome(model, images, numbers, device) for device in ("cpu", DEVICE))
        for key in ("loss", "rec", "pred", "patch_loss", "teacher_loss"):
            if key in cpu:
                close(gpu[key], cpu[key], f"{name} {key}", 1e-4)
        if "mask" in cpu:
            assert torch.equal(gpu["mask"], cpu["mask"]), name
        assert gradients.keys() == wanted.keys()
        largest = max(gradient.abs().max() for gradient in wanted.values())
        for key, gradient in wanted.items():
            assert (gradients[key] - gradient).abs().max() <= 1e-3 * largest, f"{name} {key}"


def check_a_float32_run_logs_the_losses_of_the_cpu():
    """Three steps of SGD on blended images. TF32 rounds factors to 11 bits, 2^-11: losses agree to a percent."""
    flags = f"{MICRO} --steps 3 --optimizer sgd --mixup 0.8 --cutmix 1 --smoothing 0.1 --dtype float32 --no-compile"
    for device in ("cpu", DEVICE):
        assert run(f"{flags} --device {device} --out float32-{device} --overwrite") == 0
    for cpu, gpu in zip(log("float32-cpu"), log(f"float32-{DEVICE}"), strict=True):
        for name in ("loss", "test_loss", "grad_norm"):
            if name in cpu:
                assert math.isclose(gpu[name], cpu[name], rel_tol=0.01 if name != "grad_norm" else 0.03), (cpu, gpu)


# ---------------------------------------------------------------------------------------------
# As it runs there by default: bfloat16, compiled
# ---------------------------------------------------------------------------------------------


def learns(out, steps):
    """The log; that the first steps were worse than the last."""
    losses = [line["loss"] for line in log(out)]
    assert len(losses) == steps
    assert sum(losses[-4:]) < sum(losses[:4]), losses
    return losses


def begin(command, out, steps=16):
    assert run(f"{MICRO} --steps {steps} --device {DEVICE} {command} --out {out}") == 0
    return learns(out, steps)


def go_on(out, steps=20):
    """Resume a run that is done, with more steps to make."""
    config = json.loads(Path(out, "config.json").read_text())
    Path(out, "config.json").write_text(json.dumps(config | {"steps": steps}))
    assert run(f"--resume --out {out}") == 0
    return learns(out, steps)


def check_the_defaults_are_bfloat16_and_compiled_and_weights_are_float32():
    """HPM, with both its compiled parts, learns and goes on. Compiled or not, the first loss is about the same."""
    losses = begin(f"--task hpm {DEFAULTS}", "hpm")
    config = json.loads(Path("hpm/config.json").read_text())
    compiled = DEVICE == "cuda"
    assert (config["device"], config["dtype"], config["compile"]) == (DEVICE, "bfloat16", compiled)
    saved = torch.load("hpm/last.pt", weights_only=True)
    assert {value.dtype for value in saved["model"].values()} == {torch.float32}
    assert {state["exp_avg"].dtype for state in saved["optimizer"]["state"].values()} == {torch.float32}
    assert go_on("hpm")[:16] == losses
    first = {}
    for dtype in ("bfloat16", "float32"):
        assert run(f"{MICRO} --steps 1 --device {DEVICE} --task hpm --dtype {dtype} --no-compile --out {dtype}") == 0
        first[dtype] = log(dtype)[0]["rec"]
    assert first["bfloat16"] != first["float32"]
    assert math.isclose(first["bfloat16"], first["float32"], rel_tol=BFLOAT16), first
    assert math.isclose(log("hpm")[0]["rec"], first["bfloat16"], rel_tol=BFLOAT16), "compiled"


def check_a_compiled_classifier_learns_with_all_augmentation_and_goes_on():
    begin(f"{EVERYTHING} {DEFAULTS}", "supervised", steps=40)
    go_on("supervised", steps=44)


def check_other_tasks_run_on_the_device():
    """Uncompiled, for time: MAE, masked patch prediction, fine-tuning from them, probes of frozen features."""
    plain = f"{DEFAULTS} --no-compile"
    begin(f"--task mae --mask block --target norm-pixels {plain}", "mae")
    begin(f"--task mpp {plain}", "mpp")
    assert Path("mae/masks.png").exists()
    init = f"{STILL} --device {DEVICE} {DEFAULTS} --init mae/last.pt"
    assert run(f"{init} --no-compile --task finetune --steps 2 --batch-size 8 --polyak 0.9 --out finetune") == 0
    assert run(f"{init} --no-compile --task linear --steps 2 --batch-size 8 --out linear") == 0
    for task in ("knn", "fewshot"):
        assert run(f"{init} --task {task} --out {task}") == 0


def check_memory_is_a_straight_line_in_the_number_of_images():
    """That is what the micro-batch is found from: what 64 images take, within a tenth. All of them fit here."""
    for task in ("supervised", "hpm"):
        command = f"--task {task} --arch vit_ti16 --img-size 224 --batch-size 64 --device {DEVICE}"
        config, dataset = settings(f"{command} {DEFAULTS} --no-compile")
        model = train.build(config, dataset).to(DEVICE)
        step = functools.partial(train.try_step, config, model, dataset)
        step(memory.FEW)
        if DEVICE == "cuda":
            few, more, many = (memory.peak_memory(step, n, DEVICE) for n in (memory.FEW, memory.MORE, 64))
            expected = few + (64 - memory.FEW) * (more - few) / (memory.MORE - memory.FEW)
            assert abs(many - expected) < 0.1 * many, (few, more, many)
            assert config.micro_batch is None
        assert train.fitting(config, model, dataset) == 64


# ---------------------------------------------------------------------------------------------
# Nothing stands between the device and the arithmetic
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_waiting():
    """An error for whatever makes the host wait for the device, in PyTorch's own words."""
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def without_waiting(command):
    """A run of which no batch and no step but the first waits; the number of steps that were watched."""
    step, batches, watched = train.train_step, data.InMemory.train_batches, []

    def quiet_step(*args):
        if args[6] == 0:
            return step(*args)
        watched.append(args[6])
        with no_waiting():
            return step(*args)

    def quiet_batches(*args, **kwargs):
        iterator = batches(*args, **kwargs)
        yield next(iterator)  # moves all images to the device
        while True:
            with no_waiting():
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    train.train_step, data.InMemory.train_batches = quiet_step, quiet_batches
    try:
        assert run(f"{MICRO} --steps 4 --micro-batch 4 --device {DEVICE} --no-compile {command}") == 0
    finally:
        train.train_step, data.InMemory.train_batches = step, batches
    assert len(watched) == 3


def check_the_host_does_not_wait_in_a_step():
    """From the batch, copied out of pinned memory, to the optimizer and the teacher."""
    commands = (
        f"{EVERYTHING} --polyak 0.9",
        "--optimizer sgd --checkpointing",
        "--task hpm --alpha 0.5,1",
        "--task hpm --target ema --predictor-loss absolute",
        "--task mae --mask grid --target hog",
        "--task mae --mask block --target norm-pixels",
        "--task mpp",
    )
    for i, command in enumerate(commands):
        without_waiting(f"{command} {DEFAULTS} --out quiet-{i}")


def check_the_check_of_waiting_notices_a_wait():
    """Else the one above would say nothing: a value that is read, a mask that picks, a copy from ordinary memory."""
    if DEVICE == "cpu":
        return
    there, here = torch.arange(4.0, device=DEVICE), torch.arange(4.0)
    for wait in (lambda: there.sum().item(), lambda: there[there > 1], lambda: here.to(DEVICE)):
        try:
            with no_waiting():
                wait()
        except RuntimeError:
            continue
        raise AssertionError("not noticed")
    with no_waiting():
        copied = data.to_device(here, DEVICE)
    assert torch.equal(copied.cpu(), here)


def check_a_folder_is_decoded_by_workers_and_copied_out_of_pinned_memory():
    write_images("pictures", ant=12, cat=12)
    assert run(f"{MICRO} --steps 4 --device {DEVICE} {DEFAULTS} --no-compile --data folder:pictures --out folder") == 0


def check_features_may_fill_a_quarter_of_the_free_memory():
    free = probes.free_memory(DEVICE)
    assert 0 < free <= (torch.cuda.mem_get_info()[1] if DEVICE == "cuda" else math.inf)


def main():
    """Print {name of the claim: "" or a traceback, …} as the last line."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print(json.dumps("no GPU"))
        return
    torch.set_num_threads(min(4, os.cpu_count()))
    data.photos, vit.ARCHS["vit_micro4"] = photos, SHALLOW
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, check in list(globals().items()):
            if name.startswith("check_"):
                draw, start = train.draw_figures, time.monotonic()
                if "other_tasks" not in name:  # they take time
                    train.draw_figures = lambda *_: None
                try:
                    check()
                    results[name] = ""
                except BaseException:
                    results[name] = traceback.format_exc()
                train.draw_figures = draw
                print(f"{time.monotonic() - start:5.1f} s {name}", file=sys.stderr)
        os.chdir("/")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
