"""Train: one loop for every task.

    python train.py --arch vit_b16                              ViT-B/16 on photographs, nothing to download
    python train.py --arch vit_micro4 --data fashion-mnist      a small ViT, to the end, on a laptop
    python train.py --task hpm --arch vit_micro4 --data fashion-mnist
    python train.py --task linear --arch vit_micro4 --data fashion-mnist --init runs/hpm-…/last.pt

Tasks: supervised, from scratch; mpp, mae and hpm, pre-training without labels; finetune, linear, knn and fewshot
measure what pre-training was good for. From top to bottom: the model, its optimizer and its learning rate; one step;
the loop; the program around it. The flags and what they are by default are in recipes.py, what a run leaves behind in
run_folder.py, several GPUs (`torchrun --nproc_per_node=8 train.py …`) in processes.py.
"""

import argparse
import copy
import functools
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as compute_twice
from tqdm import tqdm

import data
import hpm
import mpp
import processes
import vit
from evaluate import (
    autocast,
    evaluate,
    evaluate_pretraining,
    extract,
    few_shot,
    linear_probe,
    nearest_neighbours,
    plot_curves,
    plot_masks,
    share_unreadable,
)
from processes import say
from recipes import AUTOENCODERS, FROZEN, PRETRAINING, SHOTS, check_processes, configure, load_dataset, parse
from run_folder import claim, load, new_run, old_run, read_log, save, start_log, write

BETAS = {"mae": (0.9, 0.95), "hpm": (0.9, 0.95)}  # else (0.9, 0.999)
CLIP = 1.0  # norm of the whole gradient, for the ViT paper's recipes (appendix B.1); MAE and HPM do not clip
HELD_OUT = 0.1  # of the training images, to choose a learning rate; the paper's share for its small data sets
EVALUATIONS = 10  # of a run that has more epochs than that
SAVE_EVERY = 600  # seconds

# ---------------------------------------------------------------------------------------------
# The model, its optimizer, its learning rate
# ---------------------------------------------------------------------------------------------


def build(config, dataset, resume=False):
    """The model of a run, weights loaded. Raises ValueError if they do not fit.

    resume: the weights will come from a checkpoint, --init need not be there; but a frozen encoder is in no checkpoint.
    With --checkpointing a block keeps its input alone, and computes the rest again in the backward pass.
    """
    channels, classes = len(dataset.mean), len(dataset.classes)
    names = ("pool", "pos_embed", "dropout", "drop_path", "gelu") if config.arch in vit.ARCHS else ()
    options = {name: getattr(config, name) for name in names}
    if config.task == "mpp":
        model = mpp.create(config.arch, config.img_size, dataset.mean, dataset.std, **options)
        start = model.encoder
    elif config.task in AUTOENCODERS:
        options = dict(mask=config.mask, mask_ratio=config.mask_ratio, gelu=config.gelu)
        if config.target in ("dino", "clip"):
            options["frozen"] = hpm.load_frozen(
                config.target, config.arch, config.img_size, config.target_weights, channels
            )
        model = hpm.create(config.arch, config.img_size, channels, config.target, config.predictor_loss, **options)
        start = model.student
    else:
        classes = classes if config.task in ("supervised", "finetune") else 0
        model = start = vit.create(config.arch, config.img_size, classes, channels, **options)
    if config.init and not (resume and config.task != "linear"):
        load_weights = hpm.load_weights if config.task in AUTOENCODERS else vit.load_weights
        for note in load_weights(start, config.init):
            say(f"{config.init}: {note}")
    if config.task in AUTOENCODERS and model.teacher is not None:
        hpm.ema_update(model.teacher, model.student, 0.0)  # the teacher starts as the student
    if config.checkpointing:
        for module in model.modules():
            if isinstance(module, vit.Block):
                module.forward = functools.partial(compute_twice, module.forward, use_reentrant=False)
    return model


def build_optimizer(model, config):
    """AdamW or SGD with momentum 0.9, weight decay on matrices alone, a learning rate for each layer."""
    groups = {}
    depth = 1 + max(
        [int(name.split(".")[1]) for name, _ in model.named_parameters() if name.startswith("blocks.")] or [0]
    )
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = config.weight_decay if p.ndim > 1 and not name.endswith(("token", "pos_embed")) else 0.0
            scale = config.layer_decay ** (depth + 1 - layer_number(name, depth))
            groups.setdefault((decay, scale), []).append(p)
    groups = [dict(params=ps, weight_decay=decay, scale=scale) for (decay, scale), ps in groups.items()]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=BETAS.get(config.task, (0.9, 0.999)), fused=True)


def layer_number(name, depth):
    """0 for what comes before the blocks, i + 1 for block i, depth + 1 for what comes after them."""
    if name.startswith(("patch_embed", "cls_token", "pos_embed", "row_pos_embed", "column_pos_embed", "norm_pre")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def learning_rate(step, steps, peak, warmup, decay="cosine"):
    """Linear warm-up over `warmup` steps, then cosine or linear decay that would reach 0 at `steps`.

    step counts from 0. ViT, appendix B.1.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)  # in [0, 1)
    return peak * (1 - progress if decay == "linear" else (1 + math.cos(math.pi * progress)) / 2)


# ---------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------


def losses_of(model, images, targets, config, step, here):
    """What a task minimises, "loss", and what is logged beside it: scalars by name. here: these rows of the batch."""
    if config.task in PRETRAINING:
        generator = data.generator(config.seed, data.MASK, step, device=config.device)
        options = dict(generator=generator, batch=config.batch_size, here=here)
        if config.task in AUTOENCODERS:
            options["hard_fraction"] = hpm.hard_fraction(step, config.steps, *config.alpha)
        out = model(images, **options)
        return {name: out[name] for name in ("loss", "rec", "pred", "correlation", "accuracy") if name in out}
    # Labels (b,) or, after mixup and CutMix, probabilities (b, classes).
    return {"loss": F.cross_entropy(model(images), targets, label_smoothing=config.smoothing)}


def disturb(images, targets, classes, config, step):
    """Random erasing, mixup and CutMix, where the run wants them."""
    draw = (config.seed, step, config.batch_size, processes.rows(config.batch_size))
    if config.erasing:
        images = data.erase(images, config.erasing, *draw)
    if config.mixup or config.cutmix:
        images, targets = data.mix(images, targets, classes, config.mixup, config.cutmix, *draw)
    return images, targets


def train_step(model, optimizer, images, targets, config, step):
    """One step of the optimizer, on this process's slice of the batch.

    Returns the losses by name and the norm of the gradient before clipping: scalars that nobody has read yet, so
    that the host need not wait for the device. The losses are means over the slice.
    """
    values, first = {}, processes.rows(config.batch_size).start
    # For dropout and stochastic depth, other numbers on each process.
    torch.manual_seed(data.generator(config.seed, data.MODEL, step, processes.RANK).initial_seed())
    # The slice goes through the model in micro-batches. All slices are of one length, and so is what each part of one
    # weighs in the mean: the gradients add up to that of the whole batch.
    for start in range(0, len(images), config.micro_batch):
        part = slice(start, min(start + config.micro_batch, len(images)))
        share = (part.stop - part.start) / len(images)
        # Gradients are averaged over the processes once they are complete.
        complete = part.stop == len(images) or not hasattr(model, "no_sync")
        with nullcontext() if complete else model.no_sync():
            with autocast(config):
                here = slice(first + part.start, first + part.stop)
                losses = losses_of(model, images[part], targets[part], config, step, here)
            (share * losses["loss"]).backward()
        for name, loss in losses.items():
            values[name] = values.get(name, 0) + share * loss.detach()
    clip = CLIP if config.task == "supervised" or (config.task, config.optimizer) == ("finetune", "sgd") else math.inf
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    values["grad_norm"] = norm.full_tensor() if config.fsdp else norm
    optimizer.step()
    optimizer.zero_grad()
    return values


def read(pending, done):
    """The means of what the steps up to `done` returned, over all processes.

    Raises FloatingPointError that names the first bad step.
    """
    names = list(pending[0])
    table = torch.stack([value for values in pending for value in values.values()])
    table = processes.total(table).view(-1, len(names)).cpu()  # here, and only here, the host waits for the device
    table /= processes.COUNT
    bad = (~table.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        found = ", ".join(f"{name} {value}" for name, value in zip(names, table[bad[0]].tolist(), strict=True))
        raise FloatingPointError(f"step {done - len(pending) + bad[0] + 1} is not finite: {found}")
    return dict(zip(names, table.mean(dim=0).tolist(), strict=True))


# ---------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------


def train(config, model, dataset, out, checkpoint):
    """Run to the end, or until a signal. Returns the number of the signal, or 0.

    Raises FloatingPointError if a loss or a gradient is not finite; last.pt is then from before. Raises OSError if
    a file can't be written.
    """
    pretraining, teacher = config.task in PRETRAINING, getattr(model, "teacher", None)
    device, first_process = torch.device(config.device), processes.RANK == 0
    start, seconds = 0, 0.0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        start, seconds = checkpoint["step"], checkpoint["seconds"]
    # With --polyak the average of the weights is what is evaluated and handed on; the raw ones learn.
    evaluated = copy.deepcopy(model).requires_grad_(False) if config.polyak else model
    if checkpoint and config.polyak:
        model.load_state_dict(checkpoint["raw_model"])
    if config.compile:
        (model.student if config.task in AUTOENCODERS else model).compile()
        if teacher is not None:
            teacher.predict_loss = torch.compile(teacher.predict_loss)
    wrapped_model = processes.parallel(model, config.fsdp, config.dtype)
    optimizer = build_optimizer(model, config)
    if checkpoint:
        load_optimizer(optimizer, checkpoint["optimizer"])
        checkpoint.clear()  # its memory is free again
    stop = stop_after_this_step()

    epoch = len(dataset.train) / config.batch_size  # in steps
    log_every = max(1, min(50, config.steps // 100))
    eval_every = max(math.ceil(epoch), config.steps // EVALUATIONS)
    steps, here = range(start, config.steps), processes.rows(config.batch_size)
    batches = dataset.train.train_batches(
        config.img_size, config.batch_size, steps, config.seed, config.crop, device, here
    )
    log = open(out / "log.jsonl" if first_process else os.devnull, "a", buffering=1)
    pending, saved = [], time.monotonic()
    clock = time.monotonic()
    with tqdm(
        total=config.steps, initial=start, unit="step", dynamic_ncols=True, disable=None if first_process else True
    ) as bar:
        for step, (images, targets) in enumerate(batches, start):
            line = dict(step=step + 1, epoch=(step + 1) / epoch)
            line["lr"] = learning_rate(step, config.steps, config.lr, config.warmup, config.decay)
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * line["lr"]
            images, targets = disturb(images, targets, len(dataset.classes), config, step)
            pending.append(train_step(wrapped_model, optimizer, images, targets, config, step))
            if teacher is not None:
                line["alpha"] = hpm.hard_fraction(step, config.steps, *config.alpha)
                line["momentum"] = hpm.ema_momentum(step / epoch)
                hpm.ema_update(teacher, model.student, line["momentum"])
            if config.polyak:  # a short run forgets its start sooner: at step t, m is at most (1 + t) / (10 + t)
                hpm.ema_update(evaluated, model, min(config.polyak, (1 + step) / (10 + step)))
            bar.update()

            done = step + 1
            # A signal may reach one process alone, and clocks differ: all have to do the same at the same step.
            stopping, due = processes.agree(stop["signal"], time.monotonic() - saved > SAVE_EVERY)
            evaluating = done % eval_every == 0 or done == config.steps
            if not (evaluating or stopping or done % log_every == 0):
                continue
            line |= read(pending, done)
            elapsed = time.monotonic() - clock
            seconds += elapsed
            line |= dict(seconds=seconds, images_per_second=len(pending) * config.batch_size / elapsed)
            pending.clear()
            bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{line['lr']:.1e}")
            if evaluating:
                share_unreadable(dataset.train)
                line |= (evaluate_pretraining if pretraining else evaluate)(evaluated, dataset.test, config)
            log.write(json.dumps(line) + "\n")
            if evaluating or stopping or due:
                state = dict(model=evaluated.state_dict(), optimizer=optimizer.state_dict())
                state |= {"raw_model": model.state_dict()} if config.polyak else {}
                state = processes.whole(state) | dict(step=done, seconds=seconds, config=vars(config))
                if first_process:
                    save(out / "last.pt", state)
                    plot_curves(out, config)
                if config.task in AUTOENCODERS:
                    plot_masks(out, config, model, dataset, line.get("alpha", 0.0))
                saved = time.monotonic()
            if stopping and done < config.steps:
                return stopping
            clock = time.monotonic()
    return 0


def stop_after_this_step():
    """Let the step in progress finish, whatever signal asks to stop. Returns {"signal": its number, 0 before}.

    A cluster sends a signal to all processes, and torchrun passes it on again: what comes within five seconds is the
    same wish. After that a second one kills.
    """
    stop = {"signal": 0, "time": 0.0}

    def ask(number, frame):
        if not stop["signal"]:
            stop.update(signal=number, time=time.monotonic())
        elif time.monotonic() - stop["time"] > 5:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    return stop


def best_learning_rate(config, dataset, out):
    """The one of --lr that does best on a part of the training images that is held out (ViT, appendix B.1.1).

    Each makes as many steps, and has a run folder of its own in `out`. The best then trains on all images, anew.
    Raises FloatingPointError if none ends with finite weights.
    """
    held_out = data.balanced(dataset.train.labels, max(1, int(HELD_OUT * len(dataset.train))), config.seed)
    rest = torch.ones(len(dataset.train), dtype=torch.bool).index_fill(0, held_out, False).nonzero()[:, 0]
    dataset, scores = dataset._replace(train=dataset.train.part(rest), test=dataset.train.part(held_out)), {}
    for lr in config.lr:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop_now)
        trial, folder = argparse.Namespace(**vars(config) | {"lr": lr}), out / f"lr-{lr:g}"
        if processes.RANK == 0:
            folder.mkdir(exist_ok=True)
            start_log(folder, trial, None)
        torch.manual_seed(config.seed)
        model = build(trial, dataset).to(config.device)
        probe = linear_probe(model, dataset, trial) if config.task == "linear" else (model, dataset)
        try:
            stopped = train(trial, *probe, folder, None)
        except FloatingPointError as error:
            say(f"learning rate {lr:g}: {error}")
            continue
        if stopped:
            raise Stopped(stopped)
        scores[lr] = processes.decide(lambda folder=folder: read_log(folder)[-1]["top1"])
        say(f"learning rate {lr:g}: {scores[lr]:.2f} % top-1 on {len(held_out):,} training images that were held out")
    if not scores:
        raise FloatingPointError("all learning rates diverge")
    return max(scores, key=scores.get)


def load_optimizer(optimizer, saved):
    """Load the state_dict of an optimizer that may have had other shards, or none."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        i: {name: processes.sharded(v, params[i]) if v.shape == params[i].shape else v for name, v in values.items()}
        for i, values in saved["state"].items()
    }
    optimizer.load_state_dict(saved | {"state": state})


# ---------------------------------------------------------------------------------------------
# The program around it
# ---------------------------------------------------------------------------------------------


def finish(config, dataset, out, scores, seconds, params):
    """Write result.json, and print the same in words."""
    images = config.steps * config.batch_size
    result = dict(task=config.task, arch=config.arch, data=config.data, **scores, steps=config.steps)
    result |= dict(seconds=seconds, images_per_second=images / seconds, params=params)
    write(out / "result.json", json.dumps(result, indent=1) + "\n")
    for name, split in (("training", dataset.train), ("test", dataset.test)):
        if split.unreadable:
            print(f"skipped {len(split.unreadable)} of {len(split):,} {name} images that can't be decoded")
    words = {
        "top1": f"{{:.2f}} % top-1 on the test set (chance is {100 / len(dataset.classes):.1f} %)",
        "top5": "{:.2f} % top-5",
        **{f"top1_{n}shot": f"{{:.2f}} % top-1 from {n} images a class" for n in SHOTS},
        "test_rec": "a reconstruction loss of {:.4f} on test images",
        "test_correlation": "a rank correlation of {:.2f} between predicted and true loss",
    }
    reached = ", ".join(text.format(scores[name]) for name, text in words.items() if name in scores)
    effort = f"{config.steps:,} steps in {seconds:.0f} s, {images / seconds:.1f} images/s"
    effort = effort if config.steps else f"{seconds:.0f} s"  # nearest neighbours take no steps
    print(f"{config.task}: {config.arch} on {config.data} reached {reached}; {effort}; all in {out}")


def describe(config, dataset, params):
    """What is about to happen, in two lines."""
    size = "x".join(map(str, config.img_size))
    shared = f" on {processes.COUNT} processes" if processes.COUNT > 1 else ""
    return (
        f"{config.task}: {config.arch}, {params / 1e6:.1f}M parameters, on {config.data}: {len(dataset.classes)} "
        f"classes, {len(dataset.train):,} training and {len(dataset.test):,} test images of {size} pixels\n"
        f"{config.steps:,} steps of {config.batch_size} images, peak learning rate {config.lr:.2g}, "
        f"{config.device}, {config.dtype}{shared}"
    )


def complain(text, everywhere=False):
    """Print an error, once on each machine: all processes there meet the same one. everywhere: one process met it."""
    if everywhere or processes.LOCAL_RANK == 0:
        print(f"error: {text}", file=sys.stderr)


class Stopped(KeyboardInterrupt):
    """A signal came where there is no step to finish: before training, or while features are computed."""


def stop_now(number, frame):
    raise Stopped(number)


def main(argv=None):
    """Returns the exit code: 0 done, 1 something broke on the way, 2 bad input, 128 + the number of a signal."""
    given = parse(argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_now)
    out = None
    try:
        if given.resume:
            out, config = old_run(given)
            dataset = load_dataset(config)
            check_processes(config, dataset)
            checkpoint = load(out)
        else:
            config, dataset = configure(given)
            out, checkpoint = new_run(given), None
        dataset.train.randaugment = config.randaugment
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")  # on CUDA: TF32 for what autocast leaves in float32
        processes.start(config.device)
        model = build(config, dataset, resume=checkpoint is not None).to(config.device)
        out = processes.decide(lambda: claim(out, given))
        if isinstance(config.lr, tuple):
            config.lr = best_learning_rate(config, dataset, out)
        params = sum(p.numel() for p in model.parameters())
        say(describe(config, dataset, params))
        if processes.RANK == 0:
            start_log(out, config, checkpoint)
        return run(config, dataset, model, out, checkpoint, params)
    except (ValueError, data.UnreadableImages) as error:
        complain(error, everywhere=isinstance(error, data.UnreadableImages))
        return 2
    except FloatingPointError as error:
        complain(f"{error}; {kept(out)}; try a lower --lr")
        return 1
    except OSError as error:  # a full disk, above all
        complain(f"{error}; {kept(out)}", everywhere=True)
        return 1
    except RuntimeError as error:
        if not processes.is_alone(error):
            raise
        reason = str(error).splitlines()[0].split(". ")[0]
        complain(f"another process is gone, see its message ({reason}); {kept(out)}", everywhere=True)
        return 1
    except Stopped as stopped:
        say(how_to_go_on(out))
        return 128 + stopped.args[0]


def run(config, dataset, model, out, checkpoint, params):
    """What follows once everything fits: the exit code."""
    if config.task in FROZEN:
        clock, classes = time.monotonic(), len(dataset.classes)
        (features, labels), test = (extract(model, split, config) for split in (dataset.train, dataset.test))
        if config.task == "knn":
            scores = {"top1": nearest_neighbours((features, labels), test, classes)}
        else:
            few = {n: data.balanced(labels.cpu(), n * classes, config.seed).to(labels.device) for n in SHOTS}
            scores = {f"top1_{n}shot": few_shot((features[i], labels[i]), test, classes) for n, i in few.items()}
        seconds = time.monotonic() - clock
    else:
        probe = linear_probe(model, dataset, config) if config.task == "linear" else (model, dataset)
        stopped = train(config, *probe, out, checkpoint)
        if stopped:
            say(how_to_go_on(out))
            return 128 + stopped
        if processes.RANK == 0:
            last = read_log(out)[-1]
            scores = {name: last[name] for name in ("top1", "top5", "test_rec", "test_correlation") if name in last}
            seconds = last["seconds"]
    if processes.RANK == 0:
        finish(config, dataset, out, scores, seconds, params)
    return 0


def kept(out):
    """What is left after an error."""
    if out is None or not (out / "last.pt").exists():
        return "nothing was saved before"
    return f"{out / 'last.pt'} has the last good state"


def how_to_go_on(out):
    if out is None or not (out / "last.pt").exists():
        return "stopped before anything was saved; start again with the same command"
    several = f"torchrun --nproc_per_node={processes.LOCAL_COUNT}" if processes.COUNT > 1 else "python"
    return f"stopped; go on with: {several} train.py --resume --out {out}"


if __name__ == "__main__":
    code = main()
    processes.end()
    sys.exit(code)
