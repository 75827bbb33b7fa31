"""Every flag does what it says: one table, a row for each flag of the command line.

A run is not compared with another run here, for what never reaches either is not missed. `python train.py` is called
in this process as far as its first steps, whatever the model, the loss and the optimizer got is written down, and the
value of the flag is computed back from that: label smoothing from the loss, a learning rate from how far weights moved.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import data
import train
import vit
from downstream import probes, segmentation
from engine import augment, distributed, image_folder
from engine import config as flags
from tests.engine.runs import BLOCKS, MICRO, PLAIN, Enough, run, settings, small_photos, write_images
from tests.engine.test_coco import write_coco
from tests.engine.test_segmentation import write_pairs

# ---------------------------------------------------------------------------------------------
# What can be found out from the steps of a run: each takes (steps_of, command)
# ---------------------------------------------------------------------------------------------


def first(steps_of, command):
    """The first step; and weights that the files of --init and --target-weights may have."""
    for seed, name in enumerate(("one.pt", "other.pt")):
        if name in command:
            torch.manual_seed(100 + seed)
            torch.save(vit.create("vit_micro4", 16, 0).state_dict(), name)
    return steps_of(command)[0]


def about(value, tolerance=1e-3):
    return pytest.approx(value, abs=tolerance)


def task(steps_of, command):
    """The model's class, whether it has a teacher, and what a step returns; of what is not trained: what is scored."""
    torch.save(vit.create("vit_micro4", 16, 0).state_dict(), "init.pt")
    if "knn" in command:
        assert run(f"{command.replace(' --batch-size 4 --steps 3', '')} --init init.pt --out run") == 0
        result = json.loads(Path("run/result.json").read_text())
        return [name for name in result if name.startswith(("top", "test")) or (name == "steps" and result[name])]
    step = steps_of(f"{command} --init init.pt")[0]
    teacher = getattr(step.model, "teacher", None) is not None
    return type(step.model).__name__, teacher, " ".join(sorted(step.metrics))


def arch(steps_of, command):
    """ViT, table 1: width, depth, heads; and the patch size."""
    with torch.device("meta"):
        encoder = train.build(*settings(command))
    return encoder.dim, len(encoder.blocks), encoder.blocks[0].attn.num_heads, encoder.patch_size


def classes(steps_of, command):
    if not Path("pictures").exists():
        write_images("pictures", ant=2, bee=2)
    return settings(command)[1].classes


def folder_of_data(steps_of, command):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            data, "fashion_mnist", lambda path: seen.append(path) or small_photos()._replace(name="fashion-mnist")
        )
        settings(command)
    return str(seen[0])


def labels_of_each_class(steps_of, command):
    return sorted(first(steps_of, command).dataset.train.labels.bincount().tolist())


def scored_images_of_each_class(steps_of, command):
    """Which test images there are: of each class as many; the same ones with any seed."""
    splits = [settings(f"{command} --seed {seed}")[1].test for seed in (0, 1)]
    assert torch.equal(splits[0].images, splits[1].images)
    return sorted(splits[0].labels.bincount().tolist())


def scored_at(steps_of, command):
    """The steps after which a run was scored, of 12 that are two epochs."""
    assert run(f"{command} --out run --overwrite") == 0
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "top1" in line]


def dropped(steps_of, command):
    """Which of 24 training images are missing, where 3 and 5 are test images of the same data, 1 is one of `other`'s,
    and 7 and 8 are training images of `other`."""
    images = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255
    images = F.interpolate(images, scale_factor=4, mode="bicubic").clamp(0, 255).byte()  # photographs are smooth
    train_images, test_images = images[:24], torch.cat([images[[3, 5]], images[24:30]])
    splits = [data.InMemory(part, torch.arange(len(part)) % 3, *PLAIN) for part in (train_images, test_images)]
    for split, kept in (("train", (7, 8, 30)), ("val", (1, 31, 32))):
        Path("other", split, "ant").mkdir(parents=True, exist_ok=True)
        for i in kept:
            Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(f"other/{split}/ant/{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "photos", lambda size: data.Dataset("photos", ["red", "green", "blue"], *PLAIN, *splits))
        kept = settings(command)[1].train.images
    return [i for i in range(24) if not (kept == train_images[i]).flatten(1).all(dim=1).any()]


def weights_from(steps_of, command):
    """Which file the first matrix of the first step is from."""
    before = first(steps_of, command).before["blocks.0.attn.qkv.weight"]
    return [
        name
        for name in ("one.pt", "other.pt")
        if Path(name).exists() and torch.equal(before, torch.load(name)["blocks.0.attn.qkv.weight"])
    ]


def positions_from(steps_of, command):
    """Whether the positions of the first step are those of a file that does not say its grid, or resized ones."""
    torch.manual_seed(0)
    saved = vit.create("vit_micro4", (16, 64), 0, pos_embed="1d").state_dict()
    torch.save(saved, "no-grid.pt")
    return torch.equal(steps_of(command)[0].before["pos_embed"], saved["pos_embed"])


def predicted_images(steps_of, command):
    """The names in predictions.csv."""
    if not Path("run").exists():
        assert run(f"{MICRO} --out run") == 0
        for name in ("one/ant.png", "other/bee.png"):
            Path(name).parent.mkdir()
            Image.new("RGB", (16, 16), (90, 120, 60)).save(name)
    assert run(command) == 0
    return [name for name in ("ant.png", "bee.png") if name in Path("run/predictions.csv").read_text()]


def decoding_processes(steps_of, command):
    write_images("pictures", ant=2, bee=2) if not Path("pictures").exists() else None
    seen = []

    def loader(*_, num_workers, **__):
        seen.append(num_workers)
        raise Enough

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data, "DataLoader", loader)
        with pytest.raises(Enough):
            run(command)
    return seen


def frozen_weights_from(steps_of, command):
    frozen = first(steps_of, command).model.frozen.patch_embed.proj.weight
    return [
        name
        for name in ("one.pt", "other.pt")
        if Path(name).exists() and torch.equal(frozen, torch.load(name)["patch_embed.proj.weight"])
    ]


def folder_of_run(steps_of, command):
    before = set(Path().glob("**/config.json"))
    steps_of(command)
    return [str(path.parent) for path in set(Path().glob("**/config.json")) - before]


def replaced(steps_of, command):
    """A folder that holds a run with seed 5: the exit code, and the seed that config.json has afterwards."""
    if not Path("run").exists():
        assert run(f"{MICRO} --seed 5 --out run") == 0
    outcome = steps_of(f"{command} --out run")
    return outcome == "refused", '"seed": 5' in Path("run/config.json").read_text()


def step_that_follows(steps_of, command):
    """After a run that got as far as its first evaluation, at step 6 of 9: the number of the next step."""
    if not Path("run").exists():
        assert len(steps_of(f"{MICRO} --steps 9 --out run", n=7)) == 7
    outcome = steps_of(f"{command} --out run")
    return outcome if outcome == "refused" else outcome[0].step


def size(steps_of, command):
    """Of the model's grid, of the images that it sees, and that which photographs are shrunk for."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "photos", lambda size: seen.append(size) or small_photos())
        step = first(steps_of, command)
    return step.model.grid, tuple(step.images.shape[-2:]), *seen


def count_steps(steps_of, command):
    return len(steps_of(command, n=99))


def images_a_step(steps_of, command):
    step = first(steps_of, command)
    return len(step.images), sum(len(args[0]) for args, _ in step.calls)


def images_at_a_time(steps_of, command):
    """And the loss: that of the whole batch, for the mean of the parts' means is it."""
    step = first(steps_of, command)
    logits, labels = (torch.cat(part).double() for part in zip(*step.compared, strict=True))
    loss = -logits.log_softmax(dim=1)[range(8), labels.long()].mean().item()
    assert step.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    return [len(args[0]) for args, _ in step.calls]


def kind_of_step(steps_of, command):
    """How far weights move: SGD lr * gradient; the first step of AdamW lr * its sign, whatever its size."""
    step = first(steps_of, command)
    name = "blocks.0.mlp.fc1.weight"
    moved, gradient = (step.before[name] - step.after[name]) / 0.1, step.gradients[name]
    large = gradient.abs() > gradient.abs().median()  # next to AdamW's epsilon of 1e-8
    found = {"gradient": gradient[large], "sign": gradient[large].sign()}
    return [kind for kind, wanted in found.items() if torch.allclose(moved[large], wanted, atol=1e-4, rtol=1e-2)]


def learning_rates(steps_of, command):
    """Of the head, in three steps: how far it moved over its gradient (SGD; the first step has no momentum yet)."""
    steps = steps_of(command, n=3)
    moved = (steps[0].before["head.weight"] - steps[0].after["head.weight"]).norm() / steps[0].gradients[
        "head.weight"
    ].norm()
    assert moved.item() == pytest.approx(steps[0].rates["head.weight"], rel=1e-3)
    return pytest.approx([step.rates["head.weight"] for step in steps], rel=1e-5)


def rate_of_each_layer(steps_of, command):
    """SGD: how far each layer moved over its gradient."""
    step, rates = first(steps_of, command), {}
    for layer in ("patch_embed.proj", "blocks.0.mlp.fc1", "blocks.1.mlp.fc1", "blocks.2.mlp.fc1", "head"):
        name = f"{layer}.weight"
        rates[layer] = (step.before[name] - step.after[name]).norm().item() / step.gradients[name].norm().item()
    return pytest.approx(list(rates.values()), rel=1e-2)


def momentum_of_average(steps_of, command):
    """θ̄ = m θ_0 + (1 - m) θ_1 after the first step, solved for m."""
    step = first(steps_of, command)
    if step.average is None:
        return None
    average = dict(step.average.named_parameters())["head.weight"]
    before = torch.zeros_like(average)  # the head starts at 0, and the average with it
    after = step.after["head.weight"]
    return about(((after - average).norm() / (after - before).norm()).item())


def decay_of_weights(steps_of, command):
    """AdamW: θ_1 = θ_0 (1 - lr w) - lr g / (|g| + ε) after the first step, solved for w; two matrices, two others."""
    step, found = first(steps_of, command), []
    for names in (["blocks.0.mlp.fc1.weight", "head.weight"], ["blocks.0.norm1.weight", "pos_embed"]):
        for name in names:
            before, after, g = (part[name].double() for part in (step.before, step.after, step.gradients))
            w = (1 - (after + 0.01 * g / (g.abs() + 1e-8)) / before) / 0.01
            found.append(about(w[before.abs() >= before.abs().median()].median().item(), 2e-3))
    return found


def rates_of_dropout(steps_of, command):
    """The share of zeros among what a block's MLP returns, and the rate of every layer of its kind."""
    step, zeros = None, []

    def look(module, args, out):
        zeros.append((out == 0).float().mean().item())

    handle = nn.modules.module.register_module_forward_hook(
        lambda m, a, o: look(m, a, o) if isinstance(m, vit.MLP) and m.training else None
    )
    try:
        step = first(steps_of, command)
    finally:
        handle.remove()
    return about(np.mean(zeros), 0.02), {m.p for m in step.model.modules() if isinstance(m, nn.Dropout)}


def rates_of_drop_path(steps_of, command):
    return [about(block.drop_path.rate) for block in first(steps_of, command).model.blocks]


def smoothing(steps_of, command):
    """The loss is (1 - p) * cross-entropy + p * the mean of -log over the classes, solved for p."""
    step = first(steps_of, command)
    ((logits, labels),) = step.compared
    minus_log = -logits.double().log_softmax(dim=1)
    hard, even = minus_log[range(len(labels)), labels].mean().item(), minus_log.mean().item()
    return about((step.metrics["loss"] - hard) / (even - hard))


def is_box(inside):
    """Whether the True of a (H, W) picture are one whole rectangle."""
    rows, columns = inside.any(dim=1), inside.any(dim=0)
    return (
        bool(inside.any())
        and inside.sum() == rows.sum() * columns.sum()
        and torch.equal(inside, rows[:, None] & columns)
    )


def cropped(steps_of, command):
    """Which crop is made of the images that are trained on: its pad, or its scale."""
    seen, (shift, resize) = [], (augment.padded_crop, augment.random_resized_crop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "fashion_mnist", lambda path: small_photos()._replace(name="fashion-mnist"))
        patch.setattr(augment, "padded_crop", lambda *args: seen.append(args[2]) or shift(*args))
        patch.setattr(augment, "random_resized_crop", lambda *args: seen.append(args[3]) or resize(*args))
        first(steps_of, command)
    return seen


def erased(steps_of, command):
    """The share of images in which a box of another content lies; labels are as they were."""
    step = first(steps_of, command)
    (images, *_), _ = step.calls[0]
    changed = (images != step.images).any(dim=1)  # (B, H, W)
    boxes = [picture for picture in changed if picture.any()]
    assert all(is_box(picture) and picture.float().mean() < 0.4 for picture in boxes)
    assert torch.equal(step.compared[0][1], step.targets)
    return about(len(boxes) / len(images), 0.1)


def blended(steps_of, command):
    """How each image was made: own pixels, a blend with its neighbour, or a box of the neighbour; and the standard
    deviation of the own image's share. The target has to have the same share."""
    step = first(steps_of, command)
    (images, *_), _ = step.calls[0]
    targets, own = step.compared[0][1], step.images
    if targets.ndim == 1:
        assert torch.equal(images, own)
        return {"own"}, about(0.0)
    other = own.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    onehot = F.one_hot(step.targets, 3).float()
    onehot_other = onehot.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    kinds, shares = set(), []
    for x, a, b, target, y, z in zip(images, own, other, targets, onehot, onehot_other, strict=True):
        theirs = (x == b).all(dim=0) & (x != a).any(dim=0)
        if torch.equal(x, a):
            kind, share = "own", 1.0
        elif torch.equal(torch.where(theirs, b, a), x):
            kind, share = "box", 1 - theirs.float().mean().item()
            assert is_box(theirs)
        else:
            share = ((x - b) * (a - b)).sum().item() / (a - b).square().sum().item()  # least squares
            torch.testing.assert_close(x, share * a + (1 - share) * b, atol=1e-5, rtol=1e-4)
            kind = "blend"
        torch.testing.assert_close(target, share * y + (1 - share) * z, atol=1e-4, rtol=0)
        kinds.add(kind)
        shares.append(share)
    return kinds, about(np.std(shares), 0.03)


def colours(steps_of, command):
    """Whether crops of a picture in one colour are other than that: its class may have changed, its crop has not."""
    for split in ("train", "val"):
        Path("grey", split, "ant").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (90, 120, 60)).save(f"grey/{split}/ant/0.png")
    seen = []

    def stop(config, model, dataset, *_):
        seen.append(dataset.train)
        raise Enough

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train", stop)
        with pytest.raises(Enough):
            run(command)
    crops, _ = next(seen[0].train_batches((16, 16), 20, range(1), 0, (0.08, 1.0), torch.device("cpu")))
    crops = (crops * torch.tensor(seen[0].std)[:, None, None] + torch.tensor(seen[0].mean)[:, None, None]) * 255
    return bool((crops.round() != torch.tensor([90, 120, 60])[:, None, None]).any())


def layers_of_head(steps_of, command):
    """Linear layers from the representation to the logits, and the function between them."""
    (step,) = steps_of(command)
    y, logits = torch.randn(2, 64), {}
    step.model.represent = lambda images, inside: y
    step.model(None, logits)
    ours = [module for module in (*step.model.pre_logits.modules(), step.model.head) if isinstance(module, nn.Linear)]
    h = y
    for layer in ours[:-1]:
        h = (h @ layer.weight.T + layer.bias).tanh()
    assert torch.allclose(logits["logits"], h @ ours[-1].weight.T + ours[-1].bias, atol=1e-6), "tanh (ViT, section 3.1)"
    return [tuple(layer.weight.shape) for layer in ours]


def pooled(steps_of, command):
    """What the image representation is the LayerNorm of, with weight 1 and bias 0 as at the start."""
    step, inside = first(steps_of, command), {}
    step.model.eval()(step.images, inside)
    z = inside["blocks"][-1]["z"].detach().double()
    found = {}
    for name, y in (("class token", z[:, 0]), ("mean of patches", z[:, 1:].mean(dim=1))):
        norm = step.model.norm if isinstance(step.model.norm, nn.LayerNorm) else step.model.fc_norm
        y = (y - y.mean(dim=1, keepdim=True)) / (y.var(dim=1, correction=0, keepdim=True) + 1e-6).sqrt()
        found[name] = y * norm.weight.double() + norm.bias.double()
    return [name for name, y in found.items() if torch.allclose(inside["y"].double(), y, atol=1e-4)]


def positions_of(steps_of, command):
    """The names of the positions, and whether they learn."""
    step = first(steps_of, command)
    names = {name.replace("blocks.0.", ""): name in step.gradients for name in step.before if "pos_embed" in name}
    return {name: learns for name, learns in names.items() if not name.startswith("blocks")}


def gelu_by_formula(steps_of, command):
    """x Φ(x), or its approximation by tanh (Hendrycks and Gimpel 2016, section 2), of the first block's MLP."""
    model = first(steps_of, command).model
    mlp = (model if hasattr(model, "blocks") else model.student.encoder).blocks[0].mlp
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in mlp.parameters())
    x = np.linspace(-3, 3, 64)
    h = w1 @ x + b1
    tanh = h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))) / 2
    exact = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
    ours = mlp.eval()(torch.from_numpy(x).float()).detach().double().numpy()
    return [name for name, g in (("exact", exact), ("tanh", tanh)) if np.abs(w2 @ g + b2 - ours).max() < 1e-5]


def black_and_white(steps_of, command):
    """What 0 and 255 become, from a straight line through a test image; training images lie between."""
    step = first(steps_of, command)
    images, _ = next(step.dataset.test.test_batches((16, 16), 10, torch.device("cpu")))
    slope, black = np.polyfit(step.dataset.test.images.flatten().numpy(), images.flatten().numpy(), 1)
    white = black + 255 * slope
    assert black - 0.01 <= step.images.min() < 0.8 * black
    assert step.images.max() <= white + 0.01
    return about(black), about(white)


def out_of(step):
    """What HPM.forward returned, and the images that it saw, float64 NumPy arrays."""
    ((args, out),) = step.calls
    arrays = {name: value.detach().double().numpy() for name, value in out.items() if isinstance(value, torch.Tensor)}
    return SimpleNamespace(images=args[0].double().numpy(), noise=args[1].double().numpy(), fraction=args[2], **arrays)


def masked_share(steps_of, command):
    masks = out_of(first(steps_of, command)).mask
    assert len({row.sum() for row in masks}) == 1, "as many in every image"
    return masks.mean()


def kind_of_mask(steps_of, command):
    """Which description fits the masks of the first step: 8 x 8 patches, half of them masked."""
    out, found = out_of(first(steps_of, command)), []
    hidden = out.mask.astype(bool)
    if out.noise.ndim == 2 and all(
        (noise[m].min() > noise[~m].max()) for noise, m in zip(out.noise, hidden, strict=True)
    ):
        found.append("the largest noise")
    if hasattr(out, "teacher_loss"):
        if all(loss[m].min() > loss[~m].max() for loss, m in zip(out.teacher_loss, hidden, strict=True)):
            found.append("the largest predicted loss")
    pictures = hidden.reshape(-1, 8, 8)
    if not pictures[:, ::2, ::2].any():
        found.append("never the top left one of 2 x 2")
    # Of two neighbours, both or none is masked: half of the pairs at random, more in blocks.
    alike = [(pictures[:, 1:] == pictures[:, :-1]).mean(), (pictures[:, :, 1:] == pictures[:, :, :-1]).mean()]
    if np.mean(alike) > 0.7 and not found:  # what is hard may lie together, too
        found.append("neighbours together")
    return found


def hard_fractions(steps_of, command):
    """The share of hard patches in three steps of three, and how many of the hardest are hidden at least."""
    steps = [out_of(step) for step in steps_of(command, n=3)]
    for out in steps:
        guided = int(12 * out.fraction)
        hardest = np.argsort(-out.teacher_loss, axis=1)[:, :guided]
        assert np.take_along_axis(out.mask, hardest, axis=1).all(), "the hardest are hidden"
    return pytest.approx([out.fraction for out in steps])


def tokens_of_teacher(steps_of, command):
    """How many tokens the attention of the teacher, which learns nothing, sees at a time: in encoder and predictor."""
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: (
            seen.add(args[0].shape[1]) if isinstance(module, vit.Attention) and not torch.is_grad_enabled() else None
        )
    )
    try:
        first(steps_of, command)
    finally:
        handle.remove()
    return seen


def kind_of_predictor(steps_of, command):
    """L_pred by its two formulas, pair by pair and patch by patch."""
    step = first(steps_of, command)
    out = out_of(step)
    if not hasattr(out, "predicted_loss"):
        assert "pred" not in step.metrics
        return []
    pairs, squares = [], []
    for p, true in zip(out.predicted_loss, out.patch_loss, strict=True):
        pairs += [np.log1p(np.exp(p[j] - p[i])) for i in range(12) for j in range(12) if true[i] > true[j]]
        squares += list((p - (true - true.mean()) / np.sqrt(true.var(ddof=1) + 1e-6)) ** 2)
    found = {"relative": np.mean(pairs), "absolute": np.mean(squares)}
    assert step.metrics["loss"] == pytest.approx(step.metrics["rec"] + step.metrics["pred"], rel=1e-5)
    return [name for name, loss in found.items() if step.metrics["pred"] == pytest.approx(loss, rel=1e-4)]


def kind_of_target(steps_of, command):
    """How many values are predicted of a patch, and which of two formulas for the loss fits, patch by patch."""
    out = out_of(first(steps_of, command))
    (B, _, outputs), losses = out.prediction.shape, {"pixels": [], "norm-pixels": []}
    for b in range(B):
        for i, where in enumerate(out.hidden[b].astype(int)):
            row, column = 4 * (where // 4), 4 * (where % 4)
            patch = out.images[b, :, row : row + 4, column : column + 4].transpose(1, 2, 0).flatten()
            normed = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
            for name, target in (("pixels", patch), ("norm-pixels", normed)):
                if outputs == 48:
                    losses[name].append(np.mean((out.prediction[b, i] - target) ** 2))
    fits = [
        name for name, values in losses.items() if values and np.allclose(values, out.patch_loss.flatten(), rtol=1e-3)
    ]
    return outputs, fits


def seed_of_weights(steps_of, command):
    """The seed that gives the weights of the first step."""
    before, found = first(steps_of, command).before, []
    for seed in range(3):
        torch.manual_seed(seed)
        E = vit.create("vit_micro4", 16, 3).patch_embed.proj.weight
        found += [seed] * torch.equal(E, before["patch_embed.proj.weight"])
    return found


def device(steps_of, command):
    steps = steps_of(command)
    return steps if steps == "refused" else {p.device.type for p in steps[0].model.parameters()}


def precision(steps_of, command):
    """Of the product with U_qkv; weights stay in float32."""
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: (
            seen.add(out.dtype) if isinstance(module, nn.Linear) and module.out_features == 192 else None
        )
    )
    try:
        step = first(steps_of, command)
    finally:
        handle.remove()
    assert {p.dtype for p in step.model.parameters()} == {torch.float32}
    return seen


def compiled(steps_of, command):
    """What is handed to torch.compile: names of classes and functions."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda module: seen.append(type(module).__name__))
        patch.setattr(torch, "compile", lambda function: seen.append(function.__name__) or function)
        first(steps_of, command)
    return seen


def runs_of_a_block(steps_of, command):
    """How often each block is computed in a step."""
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(1) if isinstance(module, vit.Attention) else None
    )
    try:
        first(steps_of, command)
    finally:
        handle.remove()
    return len(seen) / BLOCKS


def shapes_in_windows(steps_of, command):
    """Height and width of what is cut into windows."""
    if not Path("pairs").exists():
        write_pairs("pairs")
    seen, slide = set(), segmentation.slide
    config, dataset = settings(command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "slide", lambda *args: seen.add(tuple(args[1].shape[2:])) or slide(*args))
        train.score_segmenter(config, train.build(config, dataset), dataset)
    return seen


def tokens_that_see_each_other(steps_of, command):
    """Of a detector with 12 blocks on 8 x 8 patches: how many there are in an attention."""
    if not Path("coco").exists():
        write_coco(Path("coco"))
    seen, attend = set(), F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.ARCHS, "vit_micro4", vit.ARCHS["vit_micro4"] | {"depth": 12})
        encoder = train.build(*settings(command)).encoder
        patch.setattr(F, "scaled_dot_product_attention", lambda q, *args: seen.add(q.shape[-2]) or attend(q, *args))
        encoder.encode(torch.zeros(1, 3, 32, 32))
    return seen


def sharded(steps_of, command):
    """Whether parameters are asked to be sharded. With one process it is refused: that is among the mistakes."""
    seen = []

    def wrap_model(model, fsdp, dtype):
        seen.append(fsdp)
        raise Enough

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "check_processes", lambda *_: None)
        patch.setattr(distributed, "wrap_model", wrap_model)
        with pytest.raises(Enough):
            run(command)
    return seen


BIG = "--arch vit_micro4 --img-size 16 --batch-size 240 --steps 1"  # many images, for what is left to chance
SGD = "--optimizer sgd --lr 0.1 --warmup 0 --weight-decay 0 --steps 10"
HPM = f"{MICRO} --task hpm"
LONG = "--arch vit_micro4 --img-size 16 --batch-size 4"
COSINE = [0.1 * math.cos(math.pi / 2 * t / 10) ** 2 for t in range(3)]

# The rest of the command; what is added to it, and what is then found; how.
TABLE = {
    "--task": (MICRO, {
        "": ("ViT", False, "grad_norm loss"),
        "--task finetune": ("ViT", False, "grad_norm loss"),
        "--task linear": ("LinearProbe", False, "grad_norm loss"),
        "--task mpp": ("MPP", False, "accuracy grad_norm loss rec"),
        "--task mae": ("HPM", False, "grad_norm loss rec"),
        "--task hpm": ("HPM", True, "correlation grad_norm loss pred rec"),
        "--task knn": ["top1"],
    }, task),
    "--arch": ("--img-size 32", {
        "--arch vit_ti16": (192, 12, 3, 16),
        "--arch vit_s32": (384, 12, 6, 32),
        "--arch vit_micro4": (64, BLOCKS, 4, 4),
        "": (768, 12, 12, 16),
    }, arch),
    "--data": (MICRO, {"": ["red", "green", "blue"], "--data folder:pictures": ["ant", "bee"]}, classes),
    "--data-dir": (f"{MICRO} --data fashion-mnist", {
        "--data-dir here": "here/fashion-mnist", "--data-dir there": "there/fashion-mnist",
    }, folder_of_data),
    "--labels": (MICRO, {"": [8, 8, 8], "--labels 9": [3, 3, 3], "--labels 4": [1, 1, 2]}, labels_of_each_class),
    "--test-images": (MICRO, {"": [3, 3, 4], "--test-images 3": [1, 1, 1]}, scored_images_of_each_class),
    "--deduplicate": (MICRO, {
        "": [], "--deduplicate photos": [3, 5], "--deduplicate folder:other": [1],
    }, dropped),
    "--init": (MICRO, {"": [], "--init one.pt": ["one.pt"], "--init other.pt": ["other.pt"]}, weights_from),
    "--init-grid": (f"{MICRO} --img-size 16x64 --pos-embed 1d --init no-grid.pt", {
        "--init-grid 4x16": True, "--init-grid 16x4": False,
    }, positions_from),
    "--images": ("--task predict --init run", {
        "--images one": ["ant.png"], "--images other/bee.png": ["bee.png"],
    }, predicted_images),
    "--out": (MICRO, {"--out here": ["here"], "--out there": ["there"]}, folder_of_run),
    "--overwrite": (MICRO, {"": (True, True), "--overwrite": (False, False)}, replaced),
    "--resume": (LONG, {"--steps 9": "refused", "--resume": 6}, step_that_follows),
    "--img-size": (MICRO, {
        "--img-size 16": ((4, 4), (16, 16), (16, 16)), "--img-size 24x16": ((6, 4), (24, 16), (24, 16)),
    }, size),
    "--evaluations": (f"{LONG} --steps 12", {
        "": [6, 12], "--evaluations 1": [12], "--evaluations 4": [3, 6, 9, 12], "--evaluations 5": [3, 6, 9, 12],
    }, scored_at),
    "--epochs": (LONG, {"--epochs 1": 6, "--epochs 0.4": 3}, count_steps),
    "--steps": (LONG, {"--steps 2": 2, "--steps 5": 5}, count_steps),
    "--batch-size": (MICRO, {"--batch-size 4": (4, 4), "--batch-size 30": (30, 30)}, images_a_step),
    "--micro-batch": (f"{MICRO} --batch-size 8", {
        "": [8], "--micro-batch 2": [2, 2, 2, 2], "--micro-batch 4": [4, 4],
    }, images_at_a_time),
    "--optimizer": (f"{MICRO} --lr 0.1 --warmup 0 --weight-decay 0", {
        "--optimizer sgd": ["gradient"], "--optimizer adamw": ["sign"],
    }, kind_of_step),
    "--lr": (f"{MICRO} {SGD}", {"": COSINE, "--lr 0.001": [rate / 100 for rate in COSINE]}, learning_rates),
    "--warmup": (f"{MICRO} {SGD}", {"": COSINE, "--warmup 4": [0.025, 0.05, 0.075]}, learning_rates),
    "--decay": (f"{MICRO} {SGD}", {"": COSINE, "--decay linear": [0.1, 0.09, 0.08]}, learning_rates),
    "--polyak": (MICRO, {"": None, "--polyak 0.05": 0.05, "--polyak 0.9": 0.1}, momentum_of_average),
    "--layer-decay": (f"{MICRO} {SGD}", {
        "": [0.1] * 5, "--layer-decay 0.5": [0.1 / 16, 0.1 / 8, 0.1 / 4, 0.1 / 2, 0.1],
    }, rate_of_each_layer),
    "--weight-decay": (f"{MICRO} --lr 0.01 --warmup 0 --pos-embed 1d", {
        "--weight-decay 0": [0, 0, 0, 0], "--weight-decay 0.8": [0.8, 0.8, 0, 0],
    }, decay_of_weights),
    "--dropout": (MICRO, {"": (0.0, {0.0}), "--dropout 0.3": (0.3, {0.3})}, rates_of_dropout),
    "--drop-path": (MICRO, {"": [0, 0, 0], "--drop-path 0.4": [0, 0.2, 0.4]}, rates_of_drop_path),
    "--smoothing": (MICRO, {"": 0.0, "--smoothing 0.3": 0.3}, smoothing),
    "--crop": (f"{MICRO} --data fashion-mnist", {
        "": [0], "--crop 2": [2], "--crop 0.3,0.5": [(0.3, 0.5)],
        "--task mae": [(0.5, 1.0)], "--task mae --crop 1": [1],
    }, cropped),
    "--erasing": (BIG, {"": 0.0, "--erasing 0.25": 0.25, "--erasing 0.75": 0.75}, erased),
    "--mixup": (BIG, {  # the standard deviation of Beta(a, a) is 1 / 2√(2a + 1)
        "": ({"own"}, 0.0), "--mixup 0.8": ({"blend"}, 0.310), "--mixup 8": ({"blend"}, 0.121),
    }, blended),
    "--cutmix": (BIG, {  # of 400,000 boxes that the border cuts, drawn apart from this
        "": ({"own"}, 0.0), "--cutmix 0.3": ({"own", "box"}, 0.246), "--cutmix 20": ({"box"}, 0.108),
    }, blended),
    "--randaugment": (f"{MICRO} --data folder:grey", {"": False, "--randaugment 9": True}, colours),
    "--head": (MICRO, {
        "": [(3, 64)], "--head linear": [(3, 64)], "--head mlp": [(64, 64), (3, 64)],
    }, layers_of_head),
    "--pool": (MICRO, {"": ["class token"], "--pool cls": ["class token"], "--pool mean": ["mean of patches"]}, pooled),
    "--pos-embed": (MICRO, {
        "--pos-embed none": {},
        "--pos-embed 1d": {"pos_embed": True},
        "--pos-embed sincos": {"pos_embed": False},
        "--pos-embed 2d": {"row_pos_embed": True, "column_pos_embed": True},
        "--pos-embed relative": {"attn.relative.pos_embed": True},
    }, positions_of),
    "--gelu": (MICRO, {
        "": ["exact"], "--gelu exact": ["exact"], "--gelu none": ["exact"], "--gelu tanh": ["tanh"],
        "--task mae": ["exact"], "--task mae --gelu tanh": ["tanh"],
    }, gelu_by_formula),
    "--pixels": (MICRO, {"": (-2, 2), "--pixels own": (-2, 2), "--pixels half": (-1, 1)}, black_and_white),
    "--mask-ratio": (HPM, {"": 12 / 16, "--mask-ratio 0.5": 8 / 16, "--mask-ratio 0.3": 5 / 16}, masked_share),
    "--mask": (f"{HPM} --img-size 32 --mask-ratio 0.5", {
        "--alpha 1,1": ["the largest predicted loss"],
        "--mask hard --alpha 1,1": ["the largest predicted loss"],
        "--mask random": ["the largest noise"],
        "--mask grid": ["never the top left one of 2 x 2"],
        "--mask block": ["neighbours together"],
    }, kind_of_mask),
    "--alpha": (HPM, {
        "": [0, 0.5 / 3, 1 / 3], "--alpha 0.2,0.8": [0.2, 0.4, 0.6], "--alpha 1,0.4": [1, 0.8, 0.6],
    }, hard_fractions),
    "--teacher": (f"{HPM} --alpha 1,1", {
        "": {17}, "--teacher whole": {17}, "--teacher in-turn": {5, 17},
    }, tokens_of_teacher),
    "--predictor-loss": (f"{HPM} --mask random", {
        "": ["relative"], "--predictor-loss relative": ["relative"], "--predictor-loss absolute": ["absolute"],
        "--predictor-loss none": [],
    }, kind_of_predictor),
    "--target": (f"{MICRO} --task mae", {
        "": (48, ["pixels"]), "--target pixels": (48, ["pixels"]), "--target norm-pixels": (48, ["norm-pixels"]),
        "--target hog": (27, []), "--target ema": (64, []),
        "--target dino --target-weights one.pt": (64, []),
    }, kind_of_target),
    "--target-weights": (f"{HPM} --target dino", {
        "--target-weights one.pt": ["one.pt"], "--target-weights other.pt": ["other.pt"],
    }, frozen_weights_from),
    "--seed": (MICRO, {"": [0], "--seed 1": [1], "--seed 2": [2]}, seed_of_weights),
    "--workers": (f"{MICRO} --data folder:pictures", {
        "--workers 0": [0], "--workers 3": [3],
    }, decoding_processes),
    "--device": (MICRO, {"--device cpu": {"cpu"}, "--device cuda": "refused"}, device),
    "--dtype": (MICRO, {
        "": {torch.float32}, "--dtype float32": {torch.float32}, "--dtype bfloat16": {torch.bfloat16},
    }, precision),
    "--compile": (MICRO, {
        "": [], "--no-compile": [], "--compile": ["ViT"], "--task hpm --compile": ["Autoencoder", "predict_loss"],
        "--task hpm --teacher in-turn --compile": ["Autoencoder", "Autoencoder"],
    }, compiled),
    "--checkpointing": (MICRO, {"": 1, "--checkpointing": 2}, runs_of_a_block),
    "--fsdp": (MICRO, {"": [False], "--fsdp": [True]}, sharded),
    "--window": ("--arch vit_micro4 --img-size 32 --task detect --data coco:coco --workers 0", {
        "--window 0": {64}, "--window 4": {16, 64}, "": {14 * 14, 64},
    }, tokens_that_see_each_other),
    "--inference": (f"{MICRO} --task segment --data segment:pairs --workers 0", {
        "": {(16, 16), (16, 17), (16, 18)}, "--inference slide": {(16, 16), (16, 17), (16, 18)},
        "--inference whole": {(16, 16)},
    }, shapes_in_windows),
}  # fmt: skip


@pytest.mark.parametrize("flag", TABLE)
def test_a_flag_does_what_it_says(flag, steps_of):
    """Each value of a row, in a run of its own."""
    rest, values, look = TABLE[flag]
    for value, expected in values.items():
        assert look(steps_of, f"{rest} {value}") == expected, value
    assert len({repr(expected) for expected in values.values()}) > 1, "two values that do the same say nothing"


def test_every_flag_has_a_row():
    """A flag without one may do nothing, and nobody would know."""
    with_flag = {f"--{field.name.replace('_', '-')}" for field in flags.FIELDS if field.metadata["metavar"] is not None}
    assert with_flag == TABLE.keys()


# ---------------------------------------------------------------------------------------------
# In which task a flag does something
# ---------------------------------------------------------------------------------------------

TASKS = "supervised mpp mae hpm finetune linear knn fewshot segment detect predict".split()
WHOLE = "supervised mpp mae hpm finetune linear"  # an image has one class, or none
DENSE = "segment detect"
TRAINED = f"{WHOLE} {DENSE}"
DATA = f"{TRAINED} knn fewshot"
CLASSIFY = "supervised finetune"
# The flag and a value that is not its default; the tasks in which it does something, from the papers' and the tasks'
# descriptions: L_pred's teacher is HPM's, labels are smoothed where there are labels, …
USES = {
    "--arch vit_ti32": f"{DATA} predict", "--data photos": f"{DATA} predict", "--data-dir here": DATA,
    "--labels 9": f"{TRAINED} knn", "--test-images 3": DATA, "--evaluations 2": TRAINED,
    "--deduplicate photos": f"{WHOLE} knn fewshot", "--init one.pt": f"{DATA} predict",
    "--init-grid 4x4": f"{DATA} predict", "--images here": "predict", "--out here": f"{DATA} predict",
    "--overwrite": DATA, "--resume": DATA, "--img-size 24": f"{DATA} predict", "--epochs 0.2": TRAINED,
    "--steps 2": TRAINED, "--batch-size 6": TRAINED, "--micro-batch 2": f"{DATA} predict",
    "--optimizer": TRAINED, "--lr 0.05": TRAINED, "--warmup 3": TRAINED, "--decay linear": TRAINED,
    "--polyak 0.5": CLASSIFY, "--layer-decay 0.3": f"{CLASSIFY} {DENSE}", "--weight-decay 0.4": TRAINED,
    "--dropout 0.3": f"{CLASSIFY} mpp segment", "--drop-path 0.3": f"{CLASSIFY} mpp {DENSE}",
    "--smoothing 0.3": f"{CLASSIFY} linear",
    "--crop 0.1,0.2": f"{CLASSIFY} mpp mae hpm",
    "--erasing 0.9": CLASSIFY, "--mixup 0.5": CLASSIFY, "--cutmix 0.5": CLASSIFY, "--randaugment 5": CLASSIFY,
    "--head mlp": "supervised", "--pool": f"{CLASSIFY} linear knn fewshot predict",
    "--pos-embed none": f"{CLASSIFY} mpp linear knn fewshot predict {DENSE}",
    "--gelu tanh": f"{DATA} predict", "--pixels half": f"{DATA} predict", "--mask-ratio 0.5": "mae hpm",
    "--mask grid": "mae hpm", "--alpha 1,1": "mae hpm", "--teacher in-turn": "hpm",
    "--predictor-loss absolute": "mae hpm", "--target norm-pixels": "mae hpm", "--target-weights other.pt": "mae hpm",
    "--seed 1": f"{DATA} predict", "--workers 1": f"{DATA} predict", "--device cpu": f"{DATA} predict",
    "--dtype bfloat16": f"{DATA} predict", "--compile": f"{WHOLE} segment", "--no-compile": f"{WHOLE} segment",
    "--checkpointing": f"supervised finetune mpp mae hpm {DENSE}", "--fsdp": WHOLE,
    "--inference whole": "segment", "--window 2": "detect",
}  # fmt: skip
# What a flag needs beside it, or its value in that task.
BESIDE = {
    ("--alpha", "mae"): "--mask hard --predictor-loss relative",
    ("--target-weights", "mae"): "--target dino",
    ("--target-weights", "hpm"): "--target dino",
    ("--data-dir", "any"): "--data fashion-mnist",
    ("--randaugment", "any"): "--data folder:pictures",
    ("--workers", "any"): "--data folder:pictures",
    ("--init-grid", "any"): "--init one.pt",
    ("--optimizer", "any"): "sgd",
    ("--optimizer", "linear"): "adamw",
    ("--pool", "any"): "mean",
    ("--pool", "finetune"): "cls",
}
# What changes nothing that a step shows, and why it is there.
SHOWN_ELSEWHERE = {
    "--out": "where the run is", "--overwrite": "what was there", "--resume": "where it starts",
    "--device": "there is one here", "--fsdp": "there is one process", "--data-dir": "where the files are",
    "--workers": "which process decodes", "--init-grid": "for files that do not say it", "--no-compile": "the default",
    "--test-images": "what is scored",
    "--evaluations": "when it is scored", "--data": "its own row", "--arch": "its own row",
    "--deduplicate": "there are none",
}  # fmt: skip


def command_for(flag, task):
    """The command of a run of `task` with this flag, and the same without."""
    name = flag.split()[0]
    beside = BESIDE.get((name, task)) or BESIDE.get((name, "any")) or ""
    rest = f"--task {task} --img-size 16" + " --arch vit_micro4" * (name != "--arch")
    rest += " --init one.pt" * (task in "finetune linear knn fewshot predict".split() and "--init" not in beside)
    rest += " --images here" * (task == "predict" and name != "--images")
    rest = " ".join([rest, *(option for option in ("--batch-size 4", "--steps 5") if task in TRAINED.split())])
    rest += " --data folder:pictures" * (task == "fewshot" and "--data" not in beside)  # 30 images at least
    if name in ("--init", "--target-weights"):  # which can't be left out
        return f"{rest} {beside} {flag}", f"{rest} {beside} {name} {'other.pt' if 'one' in flag else 'one.pt'}"
    if name in ("--img-size", "--batch-size", "--steps", "--init", "--epochs"):
        shown = {"--epochs": "--steps"}.get(name, name)
        rest = " ".join(part for part in rest.replace(" --", "\n--").splitlines() if not part.startswith(f"{shown} "))
    return (f"{rest} {flag} {beside}", rest) if name in ("--optimizer", "--pool") else (
        f"{rest} {beside} {flag}", f"{rest} {beside}")  # fmt: skip


def test_every_flag_is_in_the_table_of_tasks():
    """And --no-compile."""
    assert {flag.split()[0] for flag in USES} == TABLE.keys() - {"--task"} | {"--no-compile"}


@pytest.mark.parametrize(
    ("task", "resume"), [*((task, False) for task in TASKS), *((task, True) for task in TASKS[:-1])]
)
def test_a_flag_that_does_nothing_in_a_task_is_refused(task, resume, small, capsys):
    """In one line, which says where it does something; also of a run that goes on. Others are not."""
    saved = flags.saved_values(settings(f"{MICRO} --task hpm")[0]) | dict(task=task, init="one.pt")
    saved |= {} if task in TRAINED.split() else dict(lr=(0.0,), steps=0, warmup=0)
    saved |= dict(data="scenes-many") if task in DENSE.split() else {}
    for flag, tasks in USES.items():
        given = flags.parse(
            f"--task {task} {flag} {BESIDE.get((flag, task)) or BESIDE.get((flag, 'any')) or ''}".split()
        )
        if task in tasks.split():
            flags.check_tasks(given, task)
            continue
        with pytest.raises(ValueError, match="does nothing") as error:
            flags.resumed(given, saved, Path("run/config.json")) if resume else flags.configure(given)
        message = str(error.value)
        assert "\n" not in message
        named, _, where = message.partition(f" does nothing in --task {task}, but in ")
        assert named == flag.split()[0]
        assert where == ", ".join(other for other in TASKS if other in tasks.split()) + "; leave it out"


def trace(steps_of, command, monkeypatch):
    """All that a run does in three steps, or in its evaluation, that the steps themselves show: comparable."""
    seen, blocks = [], []

    def digest(tensor):
        return tensor.detach().double().numpy().tobytes()

    def extract(model, split, *how):
        images, labels = next(split.test_batches(how[0], 99, torch.device("cpu")))
        features, labels = original(model, split, *how)
        seen.append((len(split), digest(images), digest(features), labels.tolist(), how[1]))
        return features, labels

    original = probes.extract
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: blocks.append(len(args[0])) if isinstance(module, vit.Attention) else None
    )
    with monkeypatch.context() as patch:
        patch.setattr(probes, "extract", extract)
        patch.setattr(nn.Module, "compile", lambda module: seen.append("compiled"))
        patch.setattr(torch, "compile", lambda function: seen.append("compiled") or function)
        patch.setattr(image_folder, "workers", lambda: 0)
        steps = steps_of(f"{command} --overwrite --out trace", n=6)
    handle.remove()
    assert steps != "refused", command
    for step in steps if isinstance(steps, list) else ():
        seen += [type(step.optimizer).__name__, sorted(step.rates.items()), len(step.images), digest(step.images)]
        seen += [sorted(step.metrics.items()), [(name, digest(p)) for name, p in step.after.items()]]
        seen += [(name, digest(p)) for name, p in (step.average.named_parameters() if step.average else ())]
    return blocks, seen


@pytest.mark.slow  # some 300 short runs
@pytest.mark.parametrize("task", [task for task in TASKS[:-1] if task not in DENSE.split()])  # their own tests do
def test_a_flag_that_is_accepted_in_a_task_changes_what_it_does(task, steps_of, monkeypatch):
    """What came in, what was computed from it, how it was scored: something is other than without the flag."""
    torch.manual_seed(0)
    for name in ("one.pt", "other.pt"):
        torch.save(vit.create("vit_micro4", 16, 0, pos_embed="1d").state_dict(), name)
    write_images("pictures", ant=12, bee=12, cat=12)
    idle = []
    for flag, tasks in USES.items():
        if task not in tasks.split() or flag.split()[0] in SHOWN_ELSEWHERE:
            continue
        with_flag, without = command_for(flag, task)
        if trace(steps_of, with_flag, monkeypatch) == trace(steps_of, without, monkeypatch):
            idle.append(flag)
    assert idle == (["--seed 1"] if task == "knn" else []), "nearest neighbours draw nothing"
