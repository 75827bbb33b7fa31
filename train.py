"""Train: one loop for every task.

    python train.py --arch vit_b16                              ViT-B/16 on photographs, nothing to download
    python train.py --arch vit_micro4 --data fashion-mnist      a small ViT, to the end, on a laptop
    python train.py --task hpm --arch vit_micro4 --data fashion-mnist
    python train.py --task linear --arch vit_micro4 --data fashion-mnist --init runs/hpm-…/last.pt

Read this file from top to bottom:

    tasks       what each of them builds, minimises and is scored by
    optimizer   its groups, and the learning rate of a step
    one step    from the batch to the optimizer
    the loop    steps, and what is logged, scored and saved after some of them
    main        the program around it

The flags, and the papers' recipes for them, are in engine/config.py; what a run leaves behind is in
engine/checkpoint.py; several GPUs (`torchrun --nproc_per_node=8 train.py …`) in engine/distributed.py.
"""

import copy
import dataclasses
import functools
import json
import math
import os
import signal
import sys
import time
import typing

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as compute_twice
from tqdm import tqdm

import data
import hpm
import vit
from downstream import probes
from engine import checkpoint as run_folder
from engine import config as flags
from engine import distributed, image_folder, plots, weights
from engine.config import AUTOENCODERS, PRETRAINING, SHOTS, TRAINING_FREE
from related import mpp, positions, resnet

MAX_GRAD_NORM = 1.0  # of the whole gradient, in the ViT paper's recipes (appendix B.1); MAE and HPM do not clip
HELD_OUT = 0.1  # of the training images, to choose a learning rate; the paper's share for its small data sets
EVALUATIONS = 10  # of a run that has more epochs than that
SAVE_EVERY = 600  # seconds

# ---------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------


def build_vit(config, in_chans, num_classes):
    """The ViT, hybrid or ResNet of --arch; num_classes 0: without a head."""
    if config.arch in resnet.RESNETS:
        return resnet.create(config.arch, config.img_size, num_classes, in_chans)
    variant = config.pos_embed in positions.KINDS
    options = dict(pool=config.pool, pos_embed="none" if variant else config.pos_embed)
    options |= dict(dropout=config.dropout, drop_path=config.drop_path, gelu=config.gelu)
    create = vit.create if config.arch in vit.ARCHS else resnet.create
    model = create(config.arch, config.img_size, num_classes, in_chans, **options)
    if variant:
        positions.replace(model, config.pos_embed)
    return model


def build_classifier(config, dataset):
    return build_vit(config, len(dataset.mean), len(dataset.classes))


def build_encoder(config, dataset):
    return build_vit(config, len(dataset.mean), 0)


def build_mpp(config, dataset):
    return mpp.MPP(build_encoder(config, dataset), dataset.mean, dataset.std)


def build_autoencoder(config, dataset):
    """HPM's student and teacher; MAE is the same without a loss predictor."""
    options = dict(mask=config.mask, mask_ratio=config.mask_ratio, gelu=config.gelu)
    in_chans = len(dataset.mean)
    if config.target in ("dino", "clip"):
        options["frozen"] = weights.load_frozen(
            config.target, config.arch, config.img_size, config.target_weights, in_chans
        )
    return hpm.create(config.arch, config.img_size, in_chans, config.target, config.predictor_loss, **options)


def classification_losses(model, images, targets, noise, hard_fraction, smoothing):
    """Cross-entropy; targets are labels (b,) or, after mixup and CutMix, probabilities (b, classes)."""
    return {"loss": F.cross_entropy(model(images), targets, label_smoothing=smoothing)}


def autoencoder_losses(model, images, targets, noise, hard_fraction, smoothing):
    out = model(images, noise, hard_fraction)
    return {name: out[name] for name in ("loss", "rec", "pred", "correlation") if name in out}


def mpp_losses(model, images, targets, noise, hard_fraction, smoothing):
    out = model(images, noise)
    return {name: out[name] for name in ("loss", "rec", "accuracy")}


def score_classifier(config, model, dataset):
    return probes.evaluate(model, dataset.test, *how_to_evaluate(config))


def score_pretraining(config, model, dataset):
    return probes.evaluate_pretraining(model, dataset.test, *how_to_evaluate(config), config.seed)


def score_neighbours(config, model, dataset):
    train, test = (probes.extract(model, split, *how_to_evaluate(config)) for split in (dataset.train, dataset.test))
    return {"top1": probes.nearest_neighbours(train, test, len(dataset.classes))}


def score_few_shot(config, model, dataset):
    classes, scores = len(dataset.classes), {}
    train, test = (probes.extract(model, split, *how_to_evaluate(config)) for split in (dataset.train, dataset.test))
    for n in SHOTS:
        few = data.balanced(train[1].cpu(), n * classes, config.seed).to(train[1].device)
        scores[f"top1_{n}shot"] = probes.few_shot((train[0][few], train[1][few]), test, classes)
    return scores


def how_to_evaluate(config):
    return config.img_size, config.micro_batch, config.device, config.dtype


class Task(typing.NamedTuple):
    """What one task is.

    build   (config, dataset) -> the model, before any weights are loaded
    losses  what a step minimises, "loss", and what is logged beside it: scalars by name. None: nothing is trained
    score   (config, model, dataset) -> scores by name
    betas   of AdamW
    clips   the optimizers whose gradient is clipped to MAX_GRAD_NORM
    """

    build: typing.Callable
    losses: typing.Callable | None
    score: typing.Callable
    betas: tuple[float, float] = (0.9, 0.999)
    clips: tuple[str, ...] = ()


TASKS = {
    "supervised": Task(build_classifier, classification_losses, score_classifier, clips=("adamw", "sgd")),
    "mpp": Task(build_mpp, mpp_losses, score_pretraining),
    "mae": Task(build_autoencoder, autoencoder_losses, score_pretraining, betas=(0.9, 0.95)),
    "hpm": Task(build_autoencoder, autoencoder_losses, score_pretraining, betas=(0.9, 0.95)),
    "finetune": Task(build_classifier, classification_losses, score_classifier, clips=("sgd",)),
    "linear": Task(build_encoder, classification_losses, score_classifier),
    "knn": Task(build_encoder, None, score_neighbours),
    "fewshot": Task(build_encoder, None, score_few_shot),
}


def build(config, dataset, resume=False):
    """The model of a run, with the weights of --init. Raises ValueError if they do not fit.

    resume: the weights will come from a checkpoint, --init need not be there; but a frozen encoder is in no checkpoint.
    With --checkpointing a block keeps its input alone, and computes the rest again in the backward pass.
    """
    model = TASKS[config.task].build(config, dataset)
    if config.init and not (resume and config.task != "linear"):
        start = {"mpp": "encoder", "mae": "student", "hpm": "student"}.get(config.task)
        for note in vit.load_weights(getattr(model, start) if start else model, config.init):
            distributed.print0(f"{config.init}: {note}")
    if getattr(model, "teacher", None) is not None:
        hpm.ema_update(model.teacher, model.student, 0.0)  # the teacher starts as the student
    if config.checkpointing:
        for module in model.modules():
            if isinstance(module, vit.Block):
                module.forward = functools.partial(compute_twice, module.forward, use_reentrant=False)
    return model


# ---------------------------------------------------------------------------------------------
# The optimizer, and its learning rate
# ---------------------------------------------------------------------------------------------


def build_optimizer(model, name, lr, weight_decay, layer_decay, betas):
    """AdamW, or SGD with momentum 0.9; weight decay on matrices alone, a learning rate for each layer.

    layer_decay: the learning rate of a layer over that of the next one, in (0, 1]; the head's is `lr`.
    """
    groups = {}
    depth = 1 + max([int(n.split(".")[1]) for n, _ in model.named_parameters() if n.startswith("blocks.")] or [0])
    for n, p in model.named_parameters():
        if p.requires_grad:
            decay = weight_decay if p.ndim > 1 and not n.endswith(("token", "pos_embed")) else 0.0
            scale = layer_decay ** (depth + 1 - layer_number(n, depth))
            groups.setdefault((decay, scale), []).append(p)
    groups = [dict(params=ps, weight_decay=decay, scale=scale) for (decay, scale), ps in groups.items()]
    if name == "sgd":
        fused = not distributed.is_sharded(model)  # PyTorch has no fused SGD for shards
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=fused)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def layer_number(name, depth):
    """0 for what comes before the blocks, i + 1 for block i, depth + 1 for what comes after them."""
    if name.startswith(("patch_embed", "cls_token", "pos_embed", "row_pos_embed", "column_pos_embed", "norm_pre")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def load_optimizer(optimizer, saved):
    """Load the state_dict of an optimizer that may have had other shards, or none."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        i: {name: distributed.sharded(v, params[i]) if v.shape == params[i].shape else v for name, v in values.items()}
        for i, values in saved["state"].items()
    }
    fused = {"fused": optimizer.param_groups[0]["fused"]}  # a matter of shards, not of the run
    groups = [group | fused for group in saved["param_groups"]]
    optimizer.load_state_dict(dict(state=state, param_groups=groups))


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


def schedule(config, step, images_per_epoch):
    """What changes from step to step: the learning rate and, for HPM, the share of hard patches α_t, the momentum m."""
    return dict(
        lr=learning_rate(step, config.steps, config.lr[0], config.warmup, config.decay),
        alpha=hpm.hard_fraction(step, config.steps, *config.alpha),
        momentum=hpm.ema_momentum(step * config.batch_size / images_per_epoch),
    )


def train_step(config, dataset, model, wrapped_model, average, optimizer, step, images, targets):
    """One step, from this process's shard of the batch to the optimizer.

    model: its parameters; wrapped_model: what is called; average: of the weights of all steps, or None. Returns the
    losses by name, means over the shard, and the norm of the gradient before clipping: scalars that nobody has read
    yet, so that the host need not wait for the device.
    """
    task, now, n = TASKS[config.task], schedule(config, step, len(dataset.train)), len(images)
    for group in optimizer.param_groups:
        group["lr"] = group["scale"] * now["lr"]

    # Random numbers are drawn for the whole batch, and each process takes its rows.
    shard = distributed.shard(config.batch_size)
    blend = (config.erasing, config.mixup, config.cutmix, config.seed, step, config.batch_size, shard)
    images, targets = data.augment_batch(images, targets, len(dataset.classes), *blend)
    noise = [None] * n  # nothing is masked
    if config.task in PRETRAINING:
        patches = math.prod(getattr(model, "student", model).encoder.grid)
        shape = (config.batch_size, patches, model.noise_columns)
        noise = data.draw_noise(*shape, config.seed, step, config.device)[shard]
    # For dropout and stochastic depth: other numbers in each step, and on each process.
    torch.manual_seed(data.generator(config.seed, data.MODEL, step, distributed.RANK).initial_seed())

    metrics = {}
    for start in range(0, n, config.micro_batch):  # their gradients add up to that of the shard
        part = slice(start, min(start + config.micro_batch, n))
        share, last = (part.stop - part.start) / n, part.stop == n
        with distributed.averaged_gradients(wrapped_model, last):
            with probes.autocast(config.device, config.dtype):
                some = images[part], targets[part], noise[part]
                losses = task.losses(wrapped_model, *some, now["alpha"], config.smoothing)
            (share * losses["loss"]).backward()
        for name, loss in losses.items():
            metrics[name] = metrics.get(name, 0) + share * loss.detach()

    max_norm = MAX_GRAD_NORM if config.optimizer in task.clips else math.inf
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
    if getattr(model, "teacher", None) is not None:
        hpm.ema_update(model.teacher, model.student, now["momentum"])
    if average is not None:  # a short run forgets its start sooner: at step t, m is at most (1 + t) / (10 + t)
        hpm.ema_update(average, model, min(config.polyak, (1 + step) / (10 + step)))
    return metrics | dict(grad_norm=norm.full_tensor() if config.fsdp else norm)


def average_metrics(pending, done):
    """The means of what the steps up to `done` returned, over all processes.

    Raises FloatingPointError that names the first bad step.
    """
    names = list(pending[0])
    table = torch.stack([value for metrics in pending for value in metrics.values()])
    table = distributed.all_reduce_sum(table).view(-1, len(names)).cpu()  # only here the host waits for the device
    table /= distributed.WORLD_SIZE
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
    task, device, first_process = TASKS[config.task], torch.device(config.device), distributed.RANK == 0
    start, seconds = 0, 0.0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        start, seconds = checkpoint["step"], checkpoint["seconds"]
    # With --polyak the average of the weights is what is evaluated and handed on; the raw ones learn.
    average = copy.deepcopy(model).requires_grad_(False) if config.polyak else None
    evaluated = model if average is None else average
    if checkpoint and config.polyak:
        model.load_state_dict(checkpoint["raw_model"])
    if config.compile:
        compile_model(model)
    wrapped_model = distributed.wrap_model(model, config.fsdp, config.dtype)
    decays = (config.weight_decay, config.layer_decay)
    optimizer = build_optimizer(model, config.optimizer, config.lr[0], *decays, task.betas)
    if checkpoint:
        load_optimizer(optimizer, checkpoint["optimizer"])
        checkpoint.clear()  # its memory is free again
    stop = stop_after_this_step()

    epoch = len(dataset.train) / config.batch_size  # in steps
    log_every = max(1, min(50, config.steps // 100))
    eval_every = max(math.ceil(epoch), config.steps // EVALUATIONS)
    batches = dataset.train.train_batches(
        config.img_size, config.batch_size, range(start, config.steps), config.seed, config.crop, device,
        distributed.shard(config.batch_size),
    )  # fmt: skip
    log = open(out / "log.jsonl" if first_process else os.devnull, "a", buffering=1)
    pending, saved = [], time.monotonic()
    clock = time.monotonic()
    bar = tqdm(
        total=config.steps, initial=start, unit="step", dynamic_ncols=True, disable=None if first_process else True
    )
    with log, bar:
        for step, (images, targets) in enumerate(batches, start):
            pending.append(train_step(config, dataset, model, wrapped_model, average, optimizer, step, images, targets))
            bar.update()
            done = step + 1
            # A signal may reach one process alone, and clocks differ: all have to do the same at the same step.
            stopping, due = distributed.all_reduce_max(stop["signal"], time.monotonic() - saved > SAVE_EVERY)
            evaluating = done % eval_every == 0 or done == config.steps
            if not (evaluating or stopping or due or done % log_every == 0):
                continue
            now = schedule(config, step, len(dataset.train))
            line = dict(step=done, epoch=done / epoch, lr=now["lr"])
            if getattr(model, "teacher", None) is not None:
                line |= dict(alpha=now["alpha"], momentum=now["momentum"])
            line |= average_metrics(pending, done)
            elapsed = time.monotonic() - clock
            seconds += elapsed
            line |= dict(seconds=seconds, images_per_second=len(pending) * config.batch_size / elapsed)
            pending.clear()
            bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{line['lr']:.1e}")
            if evaluating:
                probes.share_unreadable(dataset.train)
                line |= task.score(config, evaluated, dataset)
            log.write(json.dumps(line) + "\n")
            if evaluating or stopping or due:
                save_checkpoint(config, out, model, average, optimizer, done, seconds)
                draw_figures(config, out, model, dataset, now["alpha"])
                saved = time.monotonic()
            if stopping and done < config.steps:
                return stopping
            clock = time.monotonic()
    return 0


def compile_model(model):
    """torch.compile what runs in a step: a classifier, or the student and the teacher's prediction."""
    getattr(model, "student", model).compile()
    if getattr(model, "teacher", None) is not None:
        model.teacher.predict_loss = torch.compile(model.teacher.predict_loss)


def save_checkpoint(config, out, model, average, optimizer, done, seconds):
    """Write last.pt: all that a run needs to go on. Every process has to call it, for each may hold shards."""
    state = dict(model=(model if average is None else average).state_dict(), optimizer=optimizer.state_dict())
    state |= {} if average is None else {"raw_model": model.state_dict()}
    state = distributed.full_state_dict(state) | dict(step=done, seconds=seconds, config=flags.saved_values(config))
    if distributed.RANK == 0:
        run_folder.save(out / "last.pt", state)


def draw_figures(config, out, model, dataset, alpha):
    """curves.png and, for autoencoders, masks.png: people look before they read."""
    if distributed.RANK == 0:
        plots.plot_curves(out)
    if config.task in AUTOENCODERS:
        plots.plot_masks(out, model, dataset, config.img_size, alpha, config.seed, config.device, config.dtype)


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
        trial, folder = dataclasses.replace(config, lr=(lr,)), out / f"lr-{lr:g}"
        if distributed.RANK == 0:
            folder.mkdir(exist_ok=True)
            run_folder.start_log(folder, flags.saved_values(trial), None)
        torch.manual_seed(config.seed)
        model = build(trial, dataset).to(config.device)
        probe = with_probe(trial, model, dataset)
        try:
            stopped = train(trial, *probe, folder, None)
        except FloatingPointError as error:
            distributed.print0(f"learning rate {lr:g}: {error}")
            continue
        if stopped:
            raise Stopped(stopped)
        scores[lr] = distributed.from_rank0(lambda folder=folder: run_folder.read_log(folder)[-1]["top1"])
        held = f"on {len(held_out):,} training images that were held out"
        distributed.print0(f"learning rate {lr:g}: {scores[lr]:.2f} % top-1 {held}")
    if not scores:
        raise FloatingPointError("all learning rates diverge")
    return max(scores, key=scores.get)


def with_probe(config, model, dataset):
    """The model and the data that are trained: for --task linear the probe, and the features if they fit in memory."""
    if config.task == "linear":
        return probes.linear_probe(model, dataset, *how_to_evaluate(config))
    return model, dataset


# ---------------------------------------------------------------------------------------------
# The program around it
# ---------------------------------------------------------------------------------------------


def main(argv=None):
    """Returns the exit code: 0 done, 1 something broke on the way, 2 bad input, 128 + the number of a signal."""
    given = flags.parse(argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_now)
    out = None
    try:
        config, dataset, out, checkpoint = prepare(given)
        dataset.train.randaugment = config.randaugment
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")  # on CUDA: TF32 for what autocast leaves in float32
        distributed.start(config.device)
        model = build(config, dataset, resume=checkpoint is not None).to(config.device)
        out = distributed.from_rank0(lambda: run_folder.claim(out, new=not (config.resume or config.overwrite)))
        if len(config.lr) > 1:
            config = dataclasses.replace(config, lr=(best_learning_rate(config, dataset, out),))
        params = sum(p.numel() for p in model.parameters())
        distributed.print0(describe(config, dataset, params))
        if distributed.RANK == 0:
            run_folder.start_log(out, flags.saved_values(config), checkpoint)
        return run(config, dataset, model, out, checkpoint, params)
    except (ValueError, image_folder.UnreadableImages) as error:
        complain(error, everywhere=isinstance(error, image_folder.UnreadableImages))
        return 2
    except FloatingPointError as error:
        complain(f"{error}; {kept(out)}; try a lower --lr")
        return 1
    except OSError as error:  # a full disk, above all
        complain(f"{error}; {kept(out)}", everywhere=True)
        return 1
    except RuntimeError as error:
        if not distributed.is_peer_lost(error):
            raise
        reason = str(error).splitlines()[0].split(". ")[0]
        complain(f"another process is gone, see its message ({reason}); {kept(out)}", everywhere=True)
        return 1
    except Stopped as stopped:
        distributed.print0(how_to_go_on(out))
        return 128 + stopped.args[0]


def prepare(given):
    """What is to be run: Config, data.Dataset, the folder, and the checkpoint to go on from or None."""
    name = "-".join([given.task or "supervised", given.arch or "vit_b16", given.data or "photos"])
    if not given.resume:
        config, dataset = flags.configure(given)
        return config, dataset, run_folder.new_run(given.out, name, given.overwrite), None
    out, saved = run_folder.old_run(given.out, name)
    config = flags.resumed(given, saved, out / "config.json")
    dataset = flags.load_dataset(config)
    flags.check_processes(config, dataset)
    return config, dataset, out, run_folder.load(out)


def run(config, dataset, model, out, checkpoint, params):
    """What follows once everything fits: the exit code."""
    if config.task in TRAINING_FREE:
        clock = time.monotonic()
        scores = TASKS[config.task].score(config, model, dataset)
        seconds = time.monotonic() - clock
    else:
        stopped = train(config, *with_probe(config, model, dataset), out, checkpoint)
        if stopped:
            distributed.print0(how_to_go_on(out))
            return 128 + stopped
        last = run_folder.read_log(out)[-1] if distributed.RANK == 0 else {}
        scores = {name: last[name] for name in ("top1", "top5", "test_rec", "test_correlation") if name in last}
        seconds = last.get("seconds")
    if distributed.RANK == 0:
        finish(config, dataset, out, scores, seconds, params)
    return 0


def describe(config, dataset, params):
    """What is about to happen, in two lines."""
    size = "x".join(map(str, config.img_size))
    shared = f" on {distributed.WORLD_SIZE} processes" if distributed.WORLD_SIZE > 1 else ""
    return (
        f"{config.task}: {config.arch}, {params / 1e6:.1f}M parameters, on {config.data}: {len(dataset.classes)} "
        f"classes, {len(dataset.train):,} training and {len(dataset.test):,} test images of {size} pixels\n"
        f"{config.steps:,} steps of {config.batch_size} images, peak learning rate {config.lr[0]:.2g}, "
        f"{config.device}, {config.dtype}{shared}"
    )


def finish(config, dataset, out, scores, seconds, params):
    """Write result.json, and print the same in words."""
    images = config.steps * config.batch_size
    result = dict(task=config.task, arch=config.arch, data=config.data, **scores, steps=config.steps)
    result |= dict(seconds=seconds, images_per_second=images / seconds, params=params)
    run_folder.write(out / "result.json", json.dumps(result, indent=1) + "\n")
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


def complain(text, everywhere=False):
    """Print an error, once on each machine: all processes there meet the same one. everywhere: one process met it."""
    if everywhere or distributed.LOCAL_RANK == 0:
        print(f"error: {text}", file=sys.stderr)


class Stopped(KeyboardInterrupt):
    """A signal came where there is no step to finish: before training, or while features are computed."""


def stop_now(number, frame):
    raise Stopped(number)


def kept(out):
    """What is left after an error."""
    if out is None or not (out / "last.pt").exists():
        return "nothing was saved before"
    return f"{out / 'last.pt'} has the last good state"


def how_to_go_on(out):
    if out is None or not (out / "last.pt").exists():
        return "stopped before anything was saved; start again with the same command"
    several = f"torchrun --nproc_per_node={distributed.LOCAL_WORLD_SIZE}" if distributed.WORLD_SIZE > 1 else "python"
    return f"stopped; go on with: {several} train.py --resume --out {out}"


if __name__ == "__main__":
    code = main()
    distributed.end()
    sys.exit(code)
