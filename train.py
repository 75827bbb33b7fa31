"""Train: one loop for every task.

    python train.py --arch vit_b16                              ViT-B/16 on photographs, nothing to download
    python train.py --arch vit_micro7 --data fashion-mnist      a small ViT, to the end, on a laptop
    python train.py --task hpm --arch vit_micro4 --data fashion-mnist
    python train.py --task linear --arch vit_micro4 --data fashion-mnist --init runs/hpm-…/last.pt
    python train.py --task predict --init runs/finetune-… --images holiday/

Read this file from top to bottom:

    tasks       what each of them builds, minimises and is scored by
    optimizer   its groups, and the learning rate of a step
    one step    from the batch to the optimizer
    the loop    steps, and what is logged, scored and saved after some of them
    main        the program around it

The flags are in engine/config.py, the papers' recipes for them in engine/recipes.py; what a run leaves behind is in
engine/checkpoint.py; signals and errors in engine/ending.py; several GPUs (`torchrun --nproc_per_node=8 train.py …`) in
engine/distributed.py.
"""

import contextlib
import copy
import dataclasses
import functools
import math
import sys
import time
import typing

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as compute_twice

import data
import hpm
import vit
from downstream import detection, precision, predict, probes, segmentation, vtab
from engine import checkpoint as run_folder
from engine import coco, distributed, ending, memory, plots, report, weights
from engine import config as flags
from engine.config import AUTOENCODERS, PRETRAINING, SHOTS, TRAINING_FREE
from related import mpp, positions, resnet

TOKENS = ("token", "pos_embed")  # the ends of the names of parameters that are added to tokens or stand among them
MIN_LR = 1e-6  # where fine-tuning with AdamW ends (MAE's code)
HELD_OUT = 0.1  # of the training images, to choose a learning rate; the paper's share for its small data sets
EVALUATIONS = 10  # of a run that has more epochs than that, unless --evaluations says otherwise
SAVE_EVERY = 600  # seconds

# ---------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------


def build_vit(config, in_chans, num_classes, **more):
    """The ViT, hybrid or ResNet of --arch; num_classes 0: without a head."""
    if config.arch in resnet.RESNETS:
        return resnet.create(config.arch, config.img_size, num_classes, in_chans)
    variant = config.pos_embed in positions.KINDS
    options = dict(pool=config.pool, pos_embed="none" if variant else config.pos_embed)
    options |= dict(dropout=config.dropout, drop_path=config.drop_path, gelu=config.gelu, head=config.head)
    options |= more
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
    options["teacher"] = config.teacher
    return hpm.create(config.arch, config.img_size, in_chans, config.target, config.predictor_loss, **options)


def build_segmenter(config, dataset):
    encoder = build_encoder(dataclasses.replace(config, dropout=0.0), dataset)  # which is that of the heads
    model = segmentation.UperNet(encoder, len(dataset.classes), config.dropout)
    shared = distributed.WORLD_SIZE > 1 and flags.device_type(config) == "cuda"
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) if shared else model


def build_detector(config, dataset):
    pooled = dataclasses.replace(config, pool="mean")  # without a norm after the last block, nor the class token
    encoder = build_vit(pooled, len(dataset.mean), 0, class_token=False)
    return detection.Detector(encoder, len(dataset.classes), config.window)


def classification_losses(model, images, targets, noise, hard_fraction, smoothing):
    """Cross-entropy; targets are labels (b,) or, after mixup and CutMix, probabilities (b, classes)."""
    return {"loss": F.cross_entropy(model(images), targets, label_smoothing=smoothing)}


def autoencoder_losses(model, images, targets, noise, hard_fraction, smoothing):
    out = model(images, noise, hard_fraction)
    return {name: out[name] for name in ("loss", "rec", "pred", "correlation") if name in out}


def mpp_losses(model, images, targets, noise, hard_fraction, smoothing):
    out = model(images, noise)
    return {name: out[name] for name in ("loss", "rec", "accuracy")}


def segmentation_losses(model, images, targets, noise, hard_fraction, smoothing):
    return segmentation.losses(model, images, targets)


def detection_losses(model, images, targets, noise, hard_fraction, smoothing):
    return model(images, coco.collate(targets), noise)


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


def score_segmenter(config, model, dataset):
    return segmentation.evaluate(model, dataset.test, *how_to_evaluate(config), len(dataset.classes), config.inference)


def score_detector(config, model, dataset):
    return precision.evaluate(model, dataset.test, dataset.classes, *how_to_evaluate(config))


def how_to_evaluate(config):
    return config.img_size, config.micro_batch, config.device, config.dtype


class Task(typing.NamedTuple):
    """What one task is.

    build   (config, dataset) -> the model, before any weights are loaded
    losses  what a step minimises, "loss", and what is logged beside it: scalars by name. None: nothing is trained
    score   (config, model, dataset) -> scores by name
    betas   of AdamW
    clip    the largest norm of the whole gradient, by optimizer; where there is none, it is not clipped
    spared  the ends of the names of matrices without weight decay
    """

    build: typing.Callable
    losses: typing.Callable | None
    score: typing.Callable
    betas: tuple[float, float] = (0.9, 0.999)
    clip: typing.Mapping[str, float] = {}
    spared: tuple[str, ...] = TOKENS


# Clipping: ViT, appendix B.1; HPM's code. Weight decay of tokens: MAE's and HPM's code in pre-training.
MASKED = Task(build_autoencoder, autoencoder_losses, score_pretraining, betas=(0.9, 0.95), spared=())
TASKS = {
    "supervised": Task(build_classifier, classification_losses, score_classifier, clip=dict(adamw=1.0, sgd=1.0)),
    "mpp": Task(build_mpp, mpp_losses, score_pretraining),
    "mae": MASKED,
    "hpm": MASKED._replace(clip=dict(adamw=5.0, sgd=5.0)),
    "finetune": Task(build_classifier, classification_losses, score_classifier, clip=dict(sgd=1.0)),
    "linear": Task(build_encoder, classification_losses, score_classifier),
    "knn": Task(build_encoder, None, score_neighbours),
    "fewshot": Task(build_encoder, None, score_few_shot),
    "segment": Task(build_segmenter, segmentation_losses, score_segmenter),
    "detect": Task(build_detector, detection_losses, score_detector),
}


def build(config, dataset, resume=False):
    """The model of a run, with the weights of --init. Raises ValueError if they do not fit.

    resume: the weights will come from a checkpoint, --init need not be there; but a frozen encoder is in no checkpoint.
    With --checkpointing a block keeps its input alone, and computes the rest again in the backward pass.
    """
    model = TASKS[config.task].build(config, dataset)
    if config.init and not (resume and config.task != "linear"):
        start = dict(mpp="encoder", mae="student", hpm="student", segment="encoder", detect="encoder").get(config.task)
        how = dict(grid=config.init_grid, classes=list(dataset.classes))
        for note in weights.load(getattr(model, start) if start else model, config.init, **how):
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


def build_optimizer(model, name, lr, weight_decay, layer_decay, betas, spared=TOKENS):
    """AdamW, or SGD with momentum 0.9; weight decay on matrices alone, a learning rate for each layer.

    layer_decay: the learning rate of a layer over that of the next one, in (0, 1]; the head's is `lr`. spared: the ends
    of the names of matrices without weight decay.
    """
    groups, named = {}, [(n.removeprefix("encoder."), p) for n, p in model.named_parameters()]
    depth = 1 + max([int(n.split(".")[1]) for n, _ in named if n.startswith("blocks.")] or [0])
    for n, p in named:
        if p.requires_grad:
            decay = weight_decay if p.ndim > 1 and not n.endswith(spared) else 0.0
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
    """Load the state_dict of an optimizer that may have had other shards, or none. Raises ValueError if it has another
    form."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    fused = {"fused": optimizer.param_groups[0]["fused"]}  # a matter of shards, not of the run

    def fitting(value, param):
        if value.shape not in (param.shape, ()):
            raise ValueError
        return distributed.sharded(value, param) if value.shape == param.shape else value

    try:
        state = {i: {name: fitting(v, params[i]) for name, v in vs.items()} for i, vs in saved["state"].items()}
        if not state:
            raise ValueError  # no step was made with it
        groups = [group | fused for group in saved["param_groups"]]
        optimizer.load_state_dict(dict(state=state, param_groups=groups))
    except (LookupError, TypeError, ValueError, AttributeError):
        raise ValueError("last.pt has the optimizer of another model; start anew with --overwrite") from None


def learning_rate(step, steps, peak, warmup, decay="cosine"):
    """Linear warm-up over `warmup` steps, then cosine or linear decay that would reach 0 at `steps`; decay "steps": a
    tenth from 8/9 of them on, a hundredth from 26/27.

    step counts from 0. ViT, appendix B.1; ViTDet.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if decay == "steps":
        return peak * 0.1 ** ((step >= steps * 8 / 9) + (step >= steps * 26 / 27))
    progress = (step - warmup) / max(1, steps - warmup)  # in [0, 1)
    return peak * (1 - progress if decay == "linear" else (1 + math.cos(math.pi * progress)) / 2)


# ---------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------


def schedule(config, step, images_per_epoch):
    """What changes from step to step: the learning rate and, for HPM, the share of hard patches α_t, the momentum m."""
    last = min(MIN_LR, config.lr[0]) if (config.task, config.optimizer) == ("finetune", "adamw") else 0.0
    return dict(
        lr=last + learning_rate(step, config.steps, config.lr[0] - last, config.warmup, config.decay),
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
    noise = draw_noise(config, model, config.batch_size, step)[shard]
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

    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), task.clip.get(config.optimizer, math.inf))
    optimizer.step()
    optimizer.zero_grad()
    if getattr(model, "teacher", None) is not None:
        hpm.ema_update(model.teacher, model.student, now["momentum"])
    if average is not None:  # a short run forgets its start sooner: at step t, m is at most (1 + t) / (10 + t)
        hpm.ema_update(average, model, min(config.polyak, (1 + step) / (10 + step)))
    return metrics | dict(grad_norm=norm.full_tensor() if config.fsdp else norm)


def draw_noise(config, model, n, step):
    """The numbers that the masks of n images are made from, see `data.draw_noise`, or of which objects and places are
    learned; elsewhere n None."""
    if config.task == "detect":
        return data.draw_noise(n, len(model.anchors), 1, config.seed, step, config.device)
    if config.task not in PRETRAINING:
        return [None] * n
    patches = math.prod(getattr(model, "student", model).encoder.grid)
    return data.draw_noise(n, patches, model.noise_columns, config.seed, step, config.device)


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


def train(config, model, dataset, out, checkpoint, origin):
    """Run to the end, or until a signal. Returns the number of the signal, or 0.

    checkpoint: of `engine.checkpoint.load`, or None; origin: see `origin_of`. Raises FloatingPointError if a loss or a
    gradient is not finite; last.pt is then from before. Raises OSError if a file can't be written.
    """
    task, device = TASKS[config.task], torch.device(config.device)
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
    optimizer = build_optimizer(model, config.optimizer, config.lr[0], *decays, task.betas, task.spared)
    if checkpoint:
        load_optimizer(optimizer, checkpoint["optimizer"])
        checkpoint.clear()  # its memory is free again
    stop = ending.stop_after_this_step()

    epoch = len(dataset.train) / config.batch_size  # in steps
    log_every = max(1, min(50, config.steps // 100))
    often = max(math.ceil(epoch), config.steps // EVALUATIONS)
    eval_every = math.ceil(config.steps / config.evaluations) if config.evaluations else often
    batches = dataset.train.train_batches(
        config.img_size, config.batch_size, range(start, config.steps), config.seed, config.crop, device,
        distributed.shard(config.batch_size),
    )  # fmt: skip
    pending, saved = [], time.monotonic()
    clock = time.monotonic()
    with contextlib.closing(batches), report.progress_bar(start, config.steps) as bar:
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
            if evaluating:
                probes.share_unreadable(dataset.train)
                line |= task.score(config, evaluated, dataset)
            report.tell(bar, line)
            if distributed.RANK == 0:
                run_folder.append_log(out, line)
            if evaluating or stopping or due:
                save_checkpoint(config, origin, out, model, average, optimizer, line)
                draw_figures(config, out, model, dataset, now["alpha"])
                saved = time.monotonic()
            if stopping and done < config.steps:
                return stopping
            clock = time.monotonic()
    return 0


def compile_model(model):
    """torch.compile what runs in a step: a classifier, or the student and the teacher's prediction."""
    getattr(model, "student", model).compile()
    if getattr(model, "in_turn", False):
        model.teacher.compile()
    elif getattr(model, "teacher", None) is not None:
        model.teacher.predict_loss = torch.compile(model.teacher.predict_loss)


def origin_of(config, model, dataset):
    """What a run begins with, for its checkpoints: the names of its classes, the grid of the positions, the numbers of
    images, the digests of the weights that it starts from (None if it goes on without them) or that stay frozen."""
    student = getattr(model, "student", model)
    grid = getattr(getattr(student, "encoder", student), "grid", None)  # ResNets have none
    images = dict(train=len(dataset.train), test=len(dataset.test))
    init = config.init if config.task == "linear" or not config.resume else None
    frozen = config.target_weights if config.target in hpm.FROZEN_TARGETS else None
    digests = dict(init_digest=init and weights.digest(init), target_digest=frozen and weights.digest(frozen))
    return dict(classes=list(dataset.classes), grid=grid and list(grid), images=images) | digests


def save_checkpoint(config, origin, out, model, average, optimizer, line):
    """Write last.pt: all that a run needs to go on. Every process has to call it, for each may hold shards.

    origin: of `origin_of`; line: what was logged of the last step.
    """
    state = dict(model=(model if average is None else average).state_dict(), optimizer=optimizer.state_dict())
    state |= {} if average is None else {"raw_model": model.state_dict()}
    state = distributed.full_state_dict(state)
    state |= dict(step=line["step"], seconds=line["seconds"], line=line, config=flags.saved_values(config)) | origin
    if distributed.RANK == 0:
        run_folder.save(out / "last.pt", state)


def draw_figures(config, out, model, dataset, alpha):
    """curves.png; for autoencoders masks.png, of what is where predictions.png: people look before they read."""
    if distributed.RANK == 0:
        plots.plot_curves(out)
    if config.task in AUTOENCODERS:
        probes.plot_masks(out, model, dataset, config.img_size, alpha, config.seed, config.device, config.dtype)
    if config.task == "segment" and distributed.RANK == 0:
        segmentation.draw(out, model, dataset, *how_to_evaluate(config), config.inference)
    if config.task == "detect":
        precision.draw(out, model, dataset, *how_to_evaluate(config))


def best_learning_rate(config, dataset, out, origin):
    """The one of --lr that does best on a part of the training images that is held out (ViT, appendix B.1.1).

    Each makes as many steps, and has a run folder of its own in `out`. The best then trains on all images, anew.
    Raises FloatingPointError if none ends with finite weights.
    """
    held_out = data.balanced(dataset.train.labels, max(1, int(HELD_OUT * len(dataset.train))), config.seed)
    rest = torch.ones(len(dataset.train), dtype=torch.bool).index_fill(0, held_out, False).nonzero()[:, 0]
    dataset, scores = dataset._replace(train=dataset.train.part(rest), test=dataset.train.part(held_out)), {}
    for lr in config.lr:
        ending.stop_at_once()
        trial, folder = dataclasses.replace(config, lr=(lr,)), out / f"lr-{lr:g}"
        if distributed.RANK == 0:
            folder.mkdir(exist_ok=True)
            run_folder.start_log(folder, flags.saved_values(trial), None)
        torch.manual_seed(config.seed)
        model = build(trial, dataset).to(config.device)
        probe = with_probe(trial, model, dataset)
        try:
            stopped = train(trial, *probe, folder, None, origin)
        except FloatingPointError as error:
            distributed.print0(f"learning rate {lr:g}: {error}")
            continue
        if stopped:
            raise ending.Stopped(stopped)
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
    ending.stop_at_once()
    config = out = fits = None
    begun = False
    try:
        if given.task == "predict":
            config = flags.configure(given)[0]
            distributed.start(config.device)
            return predict.run(config, given.out, lambda task, dataset: TASKS[task].build(config, dataset))
        if vtab.is_whole(given):
            return vtab.run(given, argv, main)
        config, dataset, out = prepare(given)
        dataset.train.randaugment = config.randaugment
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")  # on CUDA: TF32 for what autocast leaves in float32
        distributed.start(config.device)
        model = build(config, dataset, resume=config.resume and bool(run_folder.saved(out))).to(config.device)
        out = distributed.from_rank0(lambda: run_folder.claim(out, new=not (config.resume or config.overwrite)))
        origin = distributed.from_rank0(lambda: origin_of(config, model, dataset))
        checkpoint = load_checkpoint(config, model, dataset, out, origin) if config.resume else None
        fits = -distributed.all_reduce_max(-fitting(config, model, dataset))[0]  # the least of all processes
        config = dataclasses.replace(config, micro_batch=config.micro_batch or fits)
        begun = True
        if len(config.lr) > 1:
            config = dataclasses.replace(config, lr=(best_learning_rate(config, dataset, out, origin),))
        params = sum(p.numel() for p in model.parameters())
        distributed.print0(report.describe(config, dataset, params))
        if distributed.RANK == 0:
            run_folder.start_log(out, flags.saved_values(config), checkpoint)
        return run(config, dataset, model, out, checkpoint, origin, params)
    except ending.Stopped as stopped:
        distributed.print0(ending.how_to_go_on(out))
        return 128 + stopped.args[0]
    except Exception as error:
        code = ending.explain(error, out, config, begun, fits)
        if code is None:
            raise
        return code


def prepare(given):
    """What is to be run: Config, data.Dataset, and the folder, which nobody has written to yet."""
    name = "-".join([given.task or "supervised", given.arch or "vit_b16", given.data or "photos"])
    if not given.resume:
        return *flags.configure(given), run_folder.new_run(given.out, name, given.overwrite)
    out, saved = run_folder.old_run(given.out, name)
    config = flags.resumed(given, saved, out / "config.json")
    dataset = flags.load_dataset(config)
    config = flags.longer(config, given, len(dataset.train))
    flags.check_processes(config, dataset)
    return config, dataset, out


def load_checkpoint(config, model, dataset, out, origin):
    """The checkpoint to go on from, None if nothing was saved yet; what it began with is put into `origin`.

    Raises ValueError if there is none of this run that is whole, or if the data or frozen weights are others now.
    """
    if config.task == "linear":
        with torch.device("meta"):  # for the names and shapes alone
            model = probes.LinearProbe(torch.nn.Identity(), model.dim, len(dataset.classes))
    has = dict(config=flags.saved_values(config), origin=origin, weights=model.state_dict())
    checkpoint = run_folder.load(out, functools.partial(run_folder.check_checkpoint, **has))
    origin |= {name: value for name, value in (checkpoint or {}).items() if name in origin}
    return checkpoint


def fitting(config, model, dataset):
    """How many images at a time fit into the memory of this process's GPU, measured; elsewhere its whole share."""
    device, share = torch.device(config.device), config.batch_size // distributed.WORLD_SIZE
    if device.type != "cuda":
        return share
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if learns(config) else 0
    later = 4 * trained * ((2 if config.optimizer == "adamw" else 1) + bool(config.polyak))  # moments, and an average
    copies = 4 if config.mixup or config.cutmix or config.erasing else 1  # of the batch
    later += copies * share * 4 * len(dataset.mean) * math.prod(config.img_size)
    return memory.fit_micro_batch(functools.partial(try_step, config, model, dataset), share, later, device)


def try_step(config, model, dataset, n):
    """Forward and backward pass of n black images, of which nothing stays."""
    images = torch.zeros(n, len(dataset.mean), *config.img_size, device=config.device)
    of_pixels = config.img_size if config.task == "segment" else ()
    labels = torch.zeros(n, *of_pixels, dtype=torch.int64, device=config.device)
    if config.task == "detect":
        labels = n * [coco.whole(model.sizes.samples[1] // 4, config.img_size, config.device)]
    norms = [
        module for module in model.modules() if isinstance(module, segmentation.BatchNorm | torch.nn.SyncBatchNorm)
    ]
    for norm in norms:  # it would wait for other processes, which try other numbers, and remember black images
        norm.eval()
    with probes.autocast(config.device, config.dtype), torch.set_grad_enabled(learns(config)):
        if learns(config):
            noise = draw_noise(config, model, n, 0)
            TASKS[config.task].losses(model, images, labels, noise, 0.5, config.smoothing)["loss"].backward()
        else:
            model(images)
    model.zero_grad()
    for norm in norms:
        norm.train()


def learns(config):
    """Whether the model itself is trained, and not only asked for features."""
    return config.task not in ("linear", *TRAINING_FREE)


def run(config, dataset, model, out, checkpoint, origin, params):
    """What follows once everything fits: the exit code."""
    if config.task in TRAINING_FREE:
        clock = time.monotonic()
        scores = TASKS[config.task].score(config, model, dataset)
        seconds = time.monotonic() - clock
    else:
        probe, trained = with_probe(config, model, dataset)
        stopped = train(config, probe, trained, out, checkpoint, origin)
        if stopped:
            distributed.print0(ending.how_to_go_on(out))
            return 128 + stopped
        last = distributed.from_rank0(lambda: run_folder.last_line(out))
        names = "top1", "top5", "real_top1", "test_rec", "test_correlation", "test_object_auc"
        names += "test_object_auc_at_place", "test_hard_ratio", "miou", "pixel_accuracy", *precision.SCORES
        scores = {name: last[name] for name in names if name in last}
        seconds = last["seconds"]
    if distributed.RANK == 0:
        report.finish(config, dataset, out, scores, seconds, params)
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are no text
    code = main()
    distributed.end()
    sys.exit(code)
