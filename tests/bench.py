"""How fast it is, beside others: `python -m tests.bench`.

Everything that one table compares runs in one process, interleaved; a row gives medians of several rounds, so that a
busy machine slows all of them alike. Times are also given over the time that the model's floating-point operations
would take at the rate of a matrix product measured among them. Peers are used if they are installed (timm,
torchvision, transformers, vit-pytorch), and named if they are not, or do not run. On CUDA: bfloat16, compiled too.

    python -m tests.bench             beside others
    python -m tests.bench --quick     the same with three repeats, and of compiled models ours alone, only in training
    python -m tests.bench --growth    how time and memory grow with image size, depth, width and batch
"""

import argparse
import copy
import ctypes
import importlib.metadata
import importlib.util
import math
import re
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F

import data
import hpm
import vit
from engine import image_folder


def clock(work, device):
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(work, device):
    """MiB that a call needs at its peak beyond what was taken before it; on a CPU Linux alone says."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    except (OSError, AttributeError):
        return math.nan

    def resident(name):
        return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    before = resident("VmRSS")
    work()
    return (resident("VmHWM") - before) / 2**10


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def matrix_product(device, dtype):
    """Large products that take longer than to start them, and their floating-point operations."""
    n, several = (8192, 20) if device.type == "cuda" else (2048, 4)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return lambda: [a @ b for _ in range(several)], several * 2 * n**3


def in_turn(contestants, repeats, device):
    """Median seconds of each, all called again and again; each time another one is the first."""
    names, times = list(contestants), {name: [] for name in contestants}
    for repeat in range(-1, repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            seconds = clock(contestants[name], device)
            if repeat >= 0:  # the first round warms up
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(title, contestants, flops, args):
    """Print a row for each contestant: median seconds, over ours, over the matrix product's rate, and memory.

    contestants: name -> a call; flops: its floating-point operations, of all or name -> of each. A peer that does not
    run is named and left out.
    """
    device = torch.device(args.device)
    for name in [name for name in contestants if not name.startswith("ours")]:
        try:
            contestants[name]()
        except Exception as error:
            print(f"\n{name} does not run here: {first_line(error)}")
            contestants = {other: call for other, call in contestants.items() if other != name}
    product, product_flops = matrix_product(device, args.dtype)
    median = in_turn({"product": product} | contestants, args.repeats, device)
    rate = product_flops / median.pop("product")
    print(f"\n{title}; the product reaches {rate / 1e9:.0f} GFLOP/s")
    print(f"{'':24}{'seconds':>9}{'images/s':>10}{'over ours':>11}{'over product':>14}{'MFU':>13}{'peak MiB':>10}")
    for name, seconds in median.items():
        over = seconds * rate / (flops[name] if isinstance(flops, dict) else flops)
        memory = peak_memory(contestants[name], device)
        speed = f"{args.batch_size / seconds:10.1f}{seconds / median['ours']:11.2f}"
        print(f"{name:24}{seconds:9.3f}{speed}{over:14.2f}{100 / over:8.0f} %{memory:10.0f}")
    return median["ours"]


def classifier_step(model, images, labels, args):
    def step():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == torch.bfloat16):
            out = model(images)
            loss = F.cross_entropy(getattr(out, "logits", out).float(), labels)
        loss.backward()
        model.zero_grad()

    return step


def classifier_forward(model, images, args):
    @torch.inference_mode()
    def forward():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == torch.bfloat16):
            model(images)

    return forward


def vit_peers(missing):
    """ViT-B/16 for 1000 classes at 224 pixels, as others write it."""
    models = {}
    try:
        import timm

        models["timm"] = timm.create_model("vit_base_patch16_224")
    except Exception as error:
        missing["timm"] = error
    try:
        import torchvision

        models["torchvision"] = torchvision.models.vit_b_16()
    except Exception as error:
        missing["torchvision"] = error
    try:
        import transformers

        config = transformers.ViTConfig(num_labels=1000)
        models["transformers"] = transformers.ViTForImageClassification(config)
    except Exception as error:
        missing["transformers"] = error
    try:
        models["vit-pytorch"] = vit_pytorch_vit()
    except Exception as error:
        missing["vit-pytorch"] = error
    return models


def vit_pytorch_vit(pool="cls"):
    import vit_pytorch

    return vit_pytorch.ViT(
        image_size=224, patch_size=16, num_classes=1000, dim=768, depth=12, heads=12, mlp_dim=3072, pool=pool
    )


def compiled(models):
    """The same models once more, each compiled; HPM as train.py does it, the student and the teacher's prediction."""
    models = {f"{name}, compiled": copy.deepcopy(model) for name, model in models.items()}
    for model in models.values():
        getattr(model, "student", model).compile()
        if getattr(model, "in_turn", False):
            model.teacher.compile()
        elif getattr(model, "teacher", None) is not None:
            model.teacher.predict_loss = torch.compile(model.teacher.predict_loss)
    return models


def pretraining_step(model, images, args):
    """Forward, backward, AdamW and, with a teacher, its update."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step():
        inputs = [images]
        if isinstance(model, hpm.HPM):  # noise, and the share of hard patches
            noise = torch.rand(len(images), 196, model.noise_columns, device=images.device)
            inputs += [noise.squeeze(2), 0.25]
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == torch.bfloat16):
            out = model(*inputs)
            loss = out["loss"] if isinstance(out, dict) else out
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if getattr(model, "teacher", None) is not None:
            hpm.ema_update(model.teacher, model.student, 0.999)

    return step


def mae_peers(missing):
    """MAE with ViT-B/16, as others write it."""
    models = {}
    try:
        import transformers

        models["transformers"] = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig())
    except Exception as error:
        missing["transformers"] = error
    try:
        import vit_pytorch

        encoder = vit_pytorch_vit(pool="mean")  # with a class token its MAE (1.26.11) does not run
        models["vit-pytorch"] = vit_pytorch.MAE(
            encoder=encoder, decoder_dim=512, decoder_depth=8, decoder_heads=16, decoder_dim_head=32
        )
    except Exception as error:
        missing["vit-pytorch"] = error
    return models


def extras(model, args, step_seconds):
    """What HPM adds to a step besides models: masks, the relative loss, the teacher's update."""
    device, B, N, n = torch.device(args.device), args.batch_size, 196, model.hidden
    (scores, noise), true = torch.rand(2, B, N, device=device), torch.rand(B, n, device=device)
    predicted = torch.rand(B, n, device=device, requires_grad=True)
    work = {
        "hard masks": lambda: hpm.hard_mask(scores, noise, 0.75, 0.5),
        "relative loss, forward and backward": lambda: hpm.relative_loss(predicted, true).backward(),
        "the teacher's update": lambda: hpm.ema_update(model.teacher, model.student, 0.999),
    }
    print(f"\n{'of an HPM step':40}{'milliseconds':>13}{'share':>8}")
    for name, call in work.items():
        call()
        seconds = statistics.median(clock(call, device) for _ in range(2 * args.repeats + 1))
        print(f"{name:40}{1000 * seconds:13.2f}{100 * seconds / step_seconds:6.2f} %")


def host_waits(step):
    """Calls in a step that make the host wait for the GPU, as PyTorch's profiler sees them."""
    step()
    counts = []
    for work in (step, lambda: None):  # the profiler itself waits, too
        with torch.profiler.profile() as trace:
            work()
        counts.append(sum("Synchronize" in event.name for event in trace.events()))
    return counts[0] - counts[1]


def photograph():
    """Of 500 x 375 pixels, from scikit-image if it is there; else a smooth random picture."""
    if found := importlib.util.find_spec("skimage"):
        with Image.open(Path(found.submodule_search_locations[0], "data/coffee.png")) as image:
            return image.convert("RGB").resize((500, 375))
    small = (255 * torch.rand(24, 32, 3)).byte().numpy()
    return Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC)


def pipelines(args):
    """Print images a second, from memory and from JPEGs, beside torchvision's transforms of one image at a time."""
    device, (titles, crops) = torch.device(args.device), zip(*CROPS.items(), strict=True)
    pixels = torch.randint(256, (2048, 1, 28, 28), dtype=torch.uint8)
    small = data.InMemory(pixels, torch.zeros(2048).long(), (0.3,), (0.3,))
    with tempfile.TemporaryDirectory() as folder:
        files, image = [Path(folder, f"{i}.jpg") for i in range(64)], photograph()
        for i, file in enumerate(files):
            image.rotate(i).save(file, quality=90)
        draws = data.draw_crops(64, 0, 0).tolist()

        def batches(crop):
            return lambda: [0 for _ in small.train_batches((28, 28), 256, range(8), 0, crop, device)]

        def decode():
            return [image_folder.read_image(f, (224, 224), crops[2], d) for f, d in zip(files, draws, strict=True)]

        works = [{"ours": batches(crops[0])}, {"ours": batches(crops[1])}, {"ours": decode}]
        try:
            from torchvision.transforms import v2

            flip = v2.RandomHorizontalFlip()
            last = [flip, v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.3], [0.3])]
            padded = v2.Compose([v2.RandomCrop(28, crops[0]), *last])
            resized = v2.Compose([v2.RandomResizedCrop(28, crops[1], interpolation=3), *last])
            photo = v2.Compose([v2.RandomResizedCrop(224, crops[2], interpolation=3), flip, v2.PILToTensor()])
            works[0]["torchvision"] = lambda: [padded(image) for image in pixels]
            works[1]["torchvision"] = lambda: [resized(image) for image in pixels]
            works[2]["torchvision"] = lambda: [photo(Image.open(file).convert("RGB")) for file in files]
        except Exception:  # not installed, or for another PyTorch
            pass  # it is named among the missing ones
        print(f"\n{'images/s, one process':48}{'ours':>10}{'torchvision':>13}")
        for title, images, work in zip(titles, (2048, 2048, 64), works, strict=True):
            rates = {name: images / seconds for name, seconds in in_turn(work, args.repeats, device).items()}
            print(f"{title:48}{rates['ours']:10,.0f}{rates.get('torchvision', math.nan):13,.0f}")


CROPS = {
    "28 px, in memory, padded crop": 2,
    "28 px, in memory, random resized crop": (0.2, 1.0),
    "JPEG of 500 x 375 px, random resized crop": (0.2, 1.0),
}


def kept_for_backward(model, images):
    """Bytes of activations that a forward pass keeps for the backward one; a storage counts once."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(images)  # held until all is counted: no storage is used twice
    return sum(kept.values()), out


def growth(args):
    """Forward and backward of ViT-S/16 at 224 pixels and batch 4, and with one thing changed at a time."""
    device = torch.device(args.device)
    base = dict(img_size=224, depth=12, dim=384, batch=4)
    changes = dict(img_size=(112, 224, 336, 448), depth=(6, 12, 24), dim=(192, 384, 768), batch=(2, 4, 8, 16))
    print(f"{'':16}{'tokens':>8}{'seconds':>9}{'GFLOP/s':>9}{'MiB kept':>10}")
    for what, values in changes.items():
        for value in values:
            now = base | {what: value}
            model = vit.create("vit_s16", now["img_size"], dim=now["dim"], depth=now["depth"]).to(device)
            images = torch.randn(now["batch"], 3, now["img_size"], now["img_size"], device=device)
            labels, tokens = (
                torch.zeros(now["batch"], dtype=torch.long, device=device),
                1 + (now["img_size"] // 16) ** 2,
            )
            step = classifier_step(model, images, labels, args)
            step()
            seconds = statistics.median(clock(step, device) for _ in range(args.repeats))
            flops = 3 * now["batch"] * encoder_flops(tokens, now["dim"], now["depth"])
            kept, _ = kept_for_backward(model, images)
            print(f"{what:10}{value:>6}{tokens:8}{seconds:9.3f}{flops / seconds / 1e9:9.0f}{kept / 2**20:10.0f}")


def encoder_flops(tokens, dim, depth, mlp=4):
    """Floating-point operations of the blocks, forward: 2 per weight and token, and q kᵀ and A v."""
    return depth * (2 * tokens * (4 + 2 * mlp) * dim**2 + 4 * tokens**2 * dim)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, help="default 8, on cuda 128")
    parser.add_argument("--repeats", type=int, help="default 5, with --quick 3")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compiled too; default on cuda")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, no peer compiled")
    parser.add_argument("--growth", action="store_true", help="how time and memory grow")
    args = parser.parse_args()
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    args.batch_size = args.batch_size or (128 if args.device == "cuda" else 8)
    args.repeats = args.repeats or (3 if args.quick else 5)
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    torch.manual_seed(0)
    device, missing, B = torch.device(args.device), {}, args.batch_size
    images = torch.randn(B, 3, 224, 224, device=device)
    labels = torch.randint(1000, (B,), device=device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"PyTorch {torch.__version__}, {name}, batch {B}, {args.dtype}, medians of {args.repeats}")

    if args.growth:
        return growth(args)

    def with_compiled(models):
        """And each of them compiled, or ours alone."""
        chosen = {key: model for key, model in models.items() if key == "ours" or not args.quick}
        return models | (compiled(chosen) if args.compile else {})

    plain = {"ours": vit.create("vit_b16")} | vit_peers(missing)
    models = with_compiled(plain)
    steps = {key: classifier_step(model.to(device).train(), images, labels, args) for key, model in models.items()}
    patches = 2 * 196 * 768 * 768
    compare("ViT-B/16, forward and backward", steps, 3 * B * (encoder_flops(197, 768, 12) + patches), args)
    models = plain if args.quick else models
    steps = {key: classifier_forward(model.eval(), images, args) for key, model in models.items()}
    compare("ViT-B/16, forward", steps, B * (encoder_flops(197, 768, 12) + patches), args)
    del plain, models, steps

    # Backward costs twice the forward; the teacher of HPM runs forward alone, on all patches.
    student = encoder_flops(50, 768, 12) + patches / 4 + encoder_flops(197, 512, 8)
    teacher = encoder_flops(197, 768, 12) + patches + encoder_flops(197, 512, 8)
    models = with_compiled({"ours": hpm.create("vit_b16", predictor="none", mask="random")} | mae_peers(missing))
    steps = {key: pretraining_step(model.to(device), images, args) for key, model in models.items()}
    compare("MAE-B/16, one step with AdamW", steps, 3 * B * student, args)
    steps = {f"{key}, MAE": step for key, step in steps.items() if key.startswith("ours")}
    in_turn = 4 * encoder_flops(50, 768, 12) + patches + 4 * encoder_flops(197, 512, 8)
    asked = {"ours": ("whole", teacher), "ours, in turn": ("in-turn", in_turn)}
    models = {key: hpm.create("vit_b16", teacher=name) for key, (name, _) in asked.items()}
    models |= compiled(models) if args.compile else {}
    steps |= {key: pretraining_step(model.to(device), images, args) for key, model in models.items()}
    flops = {key: B * 3 * student for key in steps}
    for key in models:
        flops[key] = B * (3 * (student + encoder_flops(197, 512, 8)) + asked[key.removesuffix(", compiled")][1])
    seconds = compare("HPM-B/16, one step with AdamW and the teacher's update", steps, flops, args)
    extras(models["ours"], args, seconds)
    if device.type == "cuda":
        try:
            print(f"the host waits {host_waits(steps['ours'])} times in a step of HPM")
        except Exception as error:
            print(f"PyTorch's profiler does not run here: {first_line(error)}")
    del models, steps

    pipelines(args)
    for peer, error in missing.items():
        print(f"\nnot compared with {peer}: {first_line(error)}")
    for package in ("timm", "torchvision", "transformers", "vit-pytorch"):
        if package not in missing:
            print(f"{package} {importlib.metadata.version(package)}")


if __name__ == "__main__":
    main()
