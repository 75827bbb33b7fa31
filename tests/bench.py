"""How fast it is, beside others: `python -m tests.bench`.

Everything that one row compares runs in one process, in turn, again and again; a row gives medians, so that a busy
machine slows all of them alike. Times are also given in units of a matrix product measured among them: the time
that the model's floating-point operations would take at the rate of a 2048 x 2048 product. Peers are used if they are
installed (timm, torchvision, transformers), and named if they are not.
"""

import argparse
import importlib.metadata
import statistics
import time

import torch
from torch.nn import functional as F

import data
import hpm
import vit


def clock(work, device):
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_product(device, dtype):
    """A 2048³ product, and its floating-point operations."""
    a, b = torch.randn(2, 2048, 2048, device=device).to(dtype)
    return lambda: a @ b, 2 * 2048**3


def compare(title, contestants, flops, args):
    """Print a row for each contestant: median seconds, over ours, and over the matrix product's rate."""
    device = torch.device(args.device)
    product, product_flops = matrix_product(device, args.dtype)
    times = {name: [] for name in ("product", *contestants)}
    for repeat in range(args.repeats + 1):
        for name, work in (("product", product), *contestants.items()):
            seconds = min(clock(work, device) for _ in range(3 if name == "product" else 1))
            if repeat:  # the first round warms up
                times[name].append(seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    rate = product_flops / median["product"]
    print(f"\n{title}; the product reaches {rate / 1e9:.0f} GFLOP/s")
    print(f"{'':34}{'seconds':>9}{'over ours':>11}{'over product':>14}")
    for name in contestants:
        over = f"{median[name] * rate / flops:14.2f}" if flops else ""
        print(f"{name:34}{median[name]:9.3f}{median[name] / median['ours']:11.2f}{over}")


def classifier_step(model, images, labels, args):
    def step():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == torch.bfloat16):
            out = model(images)
            loss = F.cross_entropy(getattr(out, "logits", out).float(), labels)
        loss.backward()
        model.zero_grad()

    return step


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
    return models


def pretraining_step(model, images, args):
    """Forward, backward, AdamW and, with a teacher, its update."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == torch.bfloat16):
            loss = model(images, 0.25)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if model.teacher is not None:
            hpm.ema_update(model.teacher, model.student, 0.999)

    return step


def mae_peers(images, args, missing):
    try:
        import transformers

        model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig()).to(args.device)
    except Exception as error:
        missing["transformers"] = error
        return {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == torch.bfloat16):
            loss = model(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"transformers": step}


def encoder_flops(tokens, dim, depth, mlp=4):
    """Floating-point operations of the blocks, forward: 2 per weight and token, and q kᵀ and A v."""
    return depth * (2 * tokens * (4 + 2 * mlp) * dim**2 + 4 * tokens**2 * dim)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    torch.manual_seed(0)
    device, missing, B = torch.device(args.device), {}, args.batch_size
    images = torch.randn(B, 3, 224, 224, device=device)
    labels = torch.randint(1000, (B,), device=device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"PyTorch {torch.__version__}, {name}, batch {B}, {args.dtype}, medians of {args.repeats}")

    models = {"ours": vit.create("vit_b16")} | vit_peers(missing)
    steps = {key: classifier_step(model.to(device).train(), images, labels, args) for key, model in models.items()}
    patches = 2 * 196 * 768 * 768
    compare("ViT-B/16, forward and backward", steps, 3 * B * (encoder_flops(197, 768, 12) + patches), args)
    del models, steps

    # Backward costs twice the forward; the teacher of HPM runs forward alone, on all patches.
    student = encoder_flops(50, 768, 12) + patches / 4 + encoder_flops(197, 512, 8)
    teacher = encoder_flops(197, 768, 12) + patches + encoder_flops(197, 512, 8)
    mae = hpm.create("vit_b16", predictor="none", mask="random").to(device)
    steps = {"ours": pretraining_step(mae, images, args)} | mae_peers(images, args, missing)
    compare("MAE-B/16, one step with AdamW", steps, 3 * B * student, args)
    model = hpm.create("vit_b16").to(device)
    steps = {"ours": pretraining_step(model, images, args), "ours, MAE": pretraining_step(mae, images, args)}
    flops = B * (3 * (student + encoder_flops(197, 512, 8)) + teacher)
    compare("HPM-B/16, one step with AdamW and the teacher's update", steps, flops, args)
    del mae, model, steps

    small = data.InMemory(torch.zeros(10_000, 1, 28, 28, dtype=torch.uint8), torch.zeros(10_000).long(), (0.3,), (0.3,))
    for title, crop in (("padded crop and flip", 2), ("random resized crop and flip", (0.2, 1.0))):
        seconds = clock(lambda c=crop: [0 for _ in small.train_batches((28, 28), 256, range(80), 0, c, device)], device)
        print(f"\n28 px images in memory, {title}: {80 * 256 / seconds:,.0f} images/s")
    for peer, error in missing.items():
        print(f"\nnot compared with {peer}: {str(error).splitlines()[0]}")
    for package in ("timm", "torchvision", "transformers"):
        if package not in missing:
            print(f"{package} {importlib.metadata.version(package)}")


if __name__ == "__main__":
    main()
