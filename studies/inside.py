"""Look inside a trained ViT: what the study vit_inside measures.

    python -m studies.inside --init runs/…/last.pt --out FOLDER        writes FOLDER/result.json

`measure` says what each number is. The scenes are test scenes, which are the same for every seed.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import data
import vit
from downstream import probes

SCENES = 2000


@torch.no_grad()
def measure(model, batches):
    """What ViT's figures 6 and 7 show, in numbers. batches: of images, labels, `scenes.Objects`.

    rollout_auc     the class token's row of attention rollout as a detector of the item's patches; chance is 0.5
    distances       attention distance of each head of each block, in pixels; uniform: of a head that looks everywhere
    growth          mean distance of the last block's heads over that of the first block's, less 1
    first_farthest  largest distance of a head of the first block, over uniform; first_nearest: the smallest
    falls           correlation between the similarity of two positions and their distance, with the sign turned
    line            how much more alike two positions are in one row or column than two others as far apart
    similarity      mean similarity of positions 1, 2, … patches apart, rounded
    smooth          correlation of a filter's weights with those one pixel to the right or below
    """
    aucs, distances, count = [], 0, 0
    where = model.grid, model.patch_size, model.num_prefix_tokens
    for images, _, objects in batches:
        inside = {}
        model(images, inside)
        A = [block["A"] for block in inside["blocks"]]
        toward = vit.attention_rollout(A)[:, 0, model.num_prefix_tokens :]  # (b, N)
        aucs.append(probes.object_auc(toward, probes.patches_with_objects(objects, model.patch_size)))
        distances += len(images) * torch.stack([vit.attention_distance(a, *where) for a in A])  # (blocks, k)
        count += len(images)
    aucs, distances = torch.cat(aucs), distances / count
    tokens = model.num_prefix_tokens + model.grid[0] * model.grid[1]
    uniform = vit.attention_distance(torch.ones(1, 1, tokens, tokens), *where).item()
    first, last = distances[0], distances[-1]
    said = dict(rollout_auc=aucs.nanmean().item(), distances=distances.tolist(), uniform=uniform)
    said |= dict(growth=(last.mean() / first.mean() - 1).item())
    said |= dict(first_farthest=first.max().item() / uniform, first_nearest=first.min().item() / uniform)
    return said | alike_positions(model) | dict(smooth=smoothness(model.patch_embed.proj.weight))


def alike_positions(model):
    """falls, line and similarity of `measure`, of learned positions."""
    rows, columns = model.grid
    similar = vit.pos_embed_similarity(model.pos_embed.cpu(), model.grid, model.num_prefix_tokens)
    similar = similar.reshape(rows * columns, -1)  # (N, N)
    row, column = (i.flatten() for i in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    down, right = ((i[:, None] - i).abs() for i in (row, column))  # (N, N)
    apart = torch.hypot(down.float(), right.float())
    pair, line = apart > 0, (down == 0) | (right == 0)
    falls = -torch.corrcoef(torch.stack([similar[pair], apart[pair]]))[0, 1].item()
    rings = [apart.round() == r for r in range(1, max(rows, columns))]
    more = torch.stack([similar[ring & line].mean() - similar[ring & ~line].mean() for ring in rings])
    return dict(falls=falls, line=more.mean().item(), similarity=[similar[ring].mean().item() for ring in rings])


def smoothness(filters):
    """smooth of `measure`: filters (D, C, P, P) -> between -1 and 1; 0 is noise."""
    right, below = filters[..., 1:] * filters[..., :-1], filters[..., 1:, :] * filters[..., :-1, :]
    return (torch.cat([right.flatten(), below.flatten()]).mean() / filters.square().mean()).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--init", required=True, help="weights of a run; its config.json lies beside them")
    parser.add_argument("--out", required=True, help="folder of result.json, written anew")
    parser.add_argument("--overwrite", action="store_true", help="goes without saying")
    parser.add_argument("--seed", help="of the run, which decides nothing here")
    parser.add_argument("--device", default="cpu")
    told = parser.parse_args()
    begun = time.monotonic()
    config = json.loads(Path(told.init).with_name("config.json").read_text())
    size = tuple(config["img_size"])
    dataset = data.load(config["data"], size)
    options = dict(num_classes=len(dataset.classes), in_chans=len(dataset.mean), pos_embed=config["pos_embed"])
    model = vit.create(config["arch"], size, **options).to(told.device).eval()
    vit.load_weights(model, told.init)
    batches = dataset.test.subset(SCENES, 0).test_batches(size, 100, told.device, objects=True)
    result = measure(model, batches) | dict(seconds=time.monotonic() - begun)
    Path(told.out).mkdir(parents=True, exist_ok=True)
    Path(told.out, "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
