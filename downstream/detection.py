"""ViTDet: Mask R-CNN on a plain Vision Transformer (Li et al. 2022), what MAE and HPM are judged with on COCO.

    Detector        images -> losses, or boxes, classes and masks
    windows         attention within parts of a large image
    pyramid         one feature map becomes several, of other strides
    boxes           overlap, the code that is regressed, anchors, non-maximum suppression
    proposals       the region proposal network: where something may be (Ren et al. 2015)
    samples         which anchors and regions are learned from
    regions         RoIAlign, and the heads for class, box and mask (He et al. 2017)

    b images   S objects of an image, padded   A anchors   P proposals   K regions   C channels
Boxes are left, top, right, bottom in pixels. Every image has as many slots as every other, the empty ones marked, so
there is no loop over images. Each loss is the mean over images of what one image alone would give: the same for any
micro-batch and any number of processes, and what the authors' run of one image on each of 64 GPUs computes.

From their code (detectron2, projects/ViTDet) this differs in three ways: no relative positions; RoIAlign takes 2 x 2
samples a bin, as Mask R-CNN does, not a number that grows with the region; and a mask's target is sampled from the
pixels, 4 x 4 points a bin, not from polygons.
"""

import functools
import math
from collections import namedtuple

import torch
from torch import nn
from torch.nn import functional as F

# Of each image: boxes (b, n, 4), classes (b, n), scores (b, n), the best first and 0 where there is none, and
# masks (b, n, 28, 28), probabilities inside each box.
Detections = namedtuple("Detections", "boxes labels scores masks")

# scales: of the maps, over the last one; samples: anchors and regions to learn from; best: proposals of a map before
# suppression, in training and after it, then of an image. The first row is ViTDet's, the second for widths below 192.
Sizes = namedtuple("Sizes", "scales channels convolutions hidden samples best proposals")
FULL = Sizes((4, 2, 1, 0.5), 256, 4, 1024, (256, 512), (2000, 1000), 1000)
SMALL = Sizes((2, 1, 0.5), 32, 1, 128, (64, 32), (100, 100), 50)

ASPECTS = (0.5, 1.0, 2.0)  # height over width of the anchors
ANCHOR = 8  # strides: the side of an anchor of aspect 1
CANONICAL = 14  # strides: the side of a region on the map that it is looked up in (FPN, eq. 1: 224 pixels at stride 16)
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the box head's code: Fast R-CNN's, so that its numbers have variance 1
BOX_SIDE, MASK_SIDE = 7, 14  # bins of RoIAlign; a mask has twice as many
SCORE, OVERLAP, MOST = 0.05, 0.5, 100  # least score of a detection, largest overlap in a class, how many of 1000


class Detector(nn.Module):
    """images (b, C, H, W) -> `Detections`; with targets -> the losses by name.

    encoder  a ViT without class token, created with pool="mean": no norm follows its last block, as in ViTDet
    window   patches: all but four blocks see windows of this side alone; 0: every block sees all
    targets  labels (b, S), boxes (b, S, 4), masks (b, S, H, W), S at least 1; the label -1 is an empty slot
    noise    (b, A) uniform in [0, 1): from it the samples are drawn
    """

    def __init__(self, encoder, num_classes, window=0):
        super().__init__()
        sizes = SMALL if encoder.dim < 192 else FULL
        encoder.fc_norm = nn.Identity()  # of a mean that nobody asks for
        if window:
            use_windows(encoder, window)
        self.encoder, self.sizes, self.num_classes = encoder, sizes, num_classes
        self.pyramid = Pyramid(encoder.dim, sizes.channels, sizes.scales)
        self.rpn = ProposalHead(sizes.channels, min(2, sizes.convolutions))
        self.box_head = BoxHead(sizes, num_classes)
        self.mask_head = MaskHead(sizes, num_classes)
        with torch.no_grad():  # the maps' sizes, of one empty image
            maps = self.pyramid(torch.zeros(1, encoder.dim, *encoder.grid))
        stride = encoder.img_size[1] / encoder.grid[1]
        self.strides = [stride / scale for scale in sizes.scales] + [2 * stride / sizes.scales[-1]]
        anchors = [anchors_of(level.shape[-2:], s) for level, s in zip(maps, self.strides, strict=True)]
        self.of_level = [len(level) for level in anchors]  # anchors of each map
        self.register_buffer("anchors", torch.cat(anchors), persistent=False)  # (A, 4)

    def forward(self, images, targets=None, noise=None):
        tokens = self.encoder.encode(images)  # (b, N, D)
        maps = self.pyramid(tokens.mT.unflatten(2, self.encoder.grid))
        logits, deltas = (v.float() for v in self.rpn(maps))  # (b, A), (b, A, 4)
        with torch.no_grad():  # proposals are where the heads look, no gradient passes
            proposals, there = self.propose(logits, deltas)  # (b, P, 4), (b, P)
        maps = [level.float() for level in maps[:-1]]
        if targets is None:
            return self.detect(maps, proposals, there)
        labels, boxes, masks = targets
        objectness, rpn_box = rpn_losses(logits, deltas, self.anchors, labels, boxes, noise, self.sizes.samples[0])
        how = self.sizes.samples[1], self.num_classes
        regions, classes, matched, taken = sample_regions(proposals, there, labels, boxes, noise, *how)
        scores, deltas = self.box_head(roi_align(maps, self.strides, regions, BOX_SIDE))
        cls, box = box_losses(scores, deltas, regions, classes, boxes, matched, taken)
        found = taken & (classes < self.num_classes)
        most = max(1, found.sum(dim=1).max().item())  # regions with an object come first
        regions, classes, matched, found = (v[:, :most] for v in (regions, classes, matched, found))
        logits = self.mask_head(roi_align(maps, self.strides, regions, MASK_SIDE), classes)
        mask = mask_loss(logits, mask_targets(masks, matched, regions, 2 * MASK_SIDE), found)
        losses = dict(objectness=objectness, rpn_box=rpn_box, cls=cls, box=box, mask=mask)
        return dict(loss=sum(losses.values())) | losses

    def propose(self, logits, deltas):
        """The best boxes that the network proposes, suppressed on each map: (b, P, 4), and whether they are there."""
        best, scores, sizes = [], [], self.of_level
        levels = logits.split(sizes, dim=1), deltas.split(sizes, dim=1), self.anchors.split(sizes)
        for score, delta, anchors in zip(*levels, strict=True):
            score, index = score.topk(min(self.sizes.best[not self.training], score.shape[1]), dim=1)
            boxes = clip(decode(gather(delta, index), anchors[index]), self.encoder.img_size)
            keep = suppress(boxes, area(boxes) > 0, 0.7)
            best.append(boxes)
            scores.append(score.where(keep, -math.inf))
        scores = torch.cat(scores, dim=1)
        scores, index = scores.topk(min(self.sizes.proposals, scores.shape[1]), dim=1)
        return gather(torch.cat(best, dim=1), index), scores.isfinite()

    def detect(self, maps, proposals, there):
        """What the heads make of the proposals: `Detections`."""
        (b, P), K = there.shape, self.num_classes
        scores, deltas = self.box_head(roi_align(maps, self.strides, proposals, BOX_SIDE))
        scores = scores.view(b, P, K + 1).softmax(dim=2)[..., :K] * there[..., None]
        boxes = decode(deltas.view(b, P, K, 4), proposals[:, :, None], BOX_WEIGHTS)
        scores, index = scores.flatten(1).topk(min(1000, P * K), dim=1)  # of all boxes, in all classes
        boxes, labels = gather(clip(boxes, self.encoder.img_size).flatten(1, 2), index), index % K
        scores = scores * suppress(boxes, (scores > SCORE) & (area(boxes) > 0), OVERLAP, labels)
        scores, index = scores.topk(min(MOST, scores.shape[1]), dim=1)
        most = max(1, (scores > 0).sum(dim=1).max().item())
        scores, index = scores[:, :most], index[:, :most]
        boxes, labels = gather(boxes, index), labels.gather(1, index)
        masks = self.mask_head(roi_align(maps, self.strides, boxes, MASK_SIDE), labels).sigmoid()
        return Detections(boxes, labels, scores, masks)


def gather(values, index):
    """Of each image the rows with these indices: (b, n, 4), (b, m) -> (b, m, 4)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


# --- Windows, and the pyramid -----------------------------------------------------------------


def use_windows(encoder, side):
    """Let all but four blocks, evenly spread, attend within windows of side x side patches alone; in place.

    1024 pixels have 4096 patches, of which each would look at all. The last block of each quarter still does. Zeros
    fill up windows that reach beyond the grid.
    """
    (rows, columns), quarter = encoder.grid, max(1, len(encoder.blocks) // 4)

    def within_windows(attend, z, inside=None):
        z = F.pad(z.unflatten(1, encoder.grid), (0, 0, 0, -columns % side, 0, -rows % side))
        z = z.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)  # (B, n, m, side, side, D)
        seen = attend(z.flatten(3, 4).flatten(0, 2), inside).view(z.shape)
        return seen.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :rows, :columns].flatten(1, 2)

    for i, block in enumerate(encoder.blocks, 1):
        if i % quarter:
            block.attn.forward = functools.partial(within_windows, block.attn.forward)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each place: (b, C, h, w) -> (b, C, h, w)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convolution(inputs, outputs, side):
    """A convolution of side x side, and the norm in the place of its bias."""
    layer = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)
    return nn.Sequential(layer, ChannelNorm(outputs, eps=1e-6))


class Pyramid(nn.Module):
    """ViTDet's simple feature pyramid: the last feature map (b, D, h, w) -> maps (b, C, scale * h, scale * w).

    They all come from that one map: a plain ViT has no others. One more takes every second value of the last one.
    """

    def __init__(self, dim, channels, scales):
        super().__init__()
        half, quarter = dim // 2, dim // 4
        up = {  # how a map of this scale begins, and the channels that it has then
            4: ((nn.ConvTranspose2d(dim, half, 2, 2), ChannelNorm(half, eps=1e-6), nn.GELU(),
                 nn.ConvTranspose2d(half, quarter, 2, 2)), quarter),
            2: ((nn.ConvTranspose2d(dim, half, 2, 2),), half),
            1: ((), dim),
            0.5: ((nn.MaxPool2d(2, 2),), dim),
        }  # fmt: skip
        self.levels = nn.ModuleList(
            nn.Sequential(*up[s][0], convolution(up[s][1], channels, 1), convolution(channels, channels, 3))
            for s in scales
        )

    def forward(self, x):
        maps = [level(x) for level in self.levels]
        return [*maps, maps[-1][:, :, ::2, ::2]]


# --- Boxes ------------------------------------------------------------------------------------


def area(boxes):
    """(…, 4) -> (…); 0 for a box that is inside out."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)


def clip(boxes, size):
    """The part of boxes (…, 4) inside an image of size = (H, W)."""
    return boxes.clamp(min=0).minimum(boxes.new_tensor([size[1], size[0]] * 2))


def overlap(first, second):
    """Intersection over union of each pair: (…, n, 4), (…, m, 4) -> (…, n, m)."""
    first, second = first[..., :, None, :], second[..., None, :, :]
    low, high = first[..., :2].maximum(second[..., :2]), first[..., 2:].minimum(second[..., 2:])
    shared = (high - low).clamp(min=0).prod(dim=-1)
    return shared / (area(first) + area(second) - shared).clamp(min=1e-9)


def encode(boxes, anchors, weights=(1.0, 1.0, 1.0, 1.0)):
    """Boxes as seen from anchors, both (…, 4): shift of the centre in sides, log of the ratio of sides (R-CNN)."""
    sides, wanted = anchors[..., 2:] - anchors[..., :2], (boxes[..., 2:] - boxes[..., :2])
    shift = (boxes[..., :2] + wanted / 2 - anchors[..., :2] - sides / 2) / sides
    return torch.cat([shift, (wanted / sides).log()], dim=-1) * boxes.new_tensor(weights)


def decode(deltas, anchors, weights=(1.0, 1.0, 1.0, 1.0)):
    """The inverse of `encode`; a side grows at most 62.5 times, from 16 to 1000 pixels."""
    shift, scale = (deltas.float() / deltas.new_tensor(weights).float()).split(2, dim=-1)
    sides = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + sides / 2 + shift * sides
    sides = sides * scale.clamp(max=math.log(1000 / 16)).exp()
    return torch.cat([centre - sides / 2, centre + sides / 2], dim=-1)


def anchors_of(grid, stride):
    """Three boxes of one area about the top left of each place of a map, as in detectron2: (3 * rows * columns, 4)."""
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    centre = stride * torch.stack([column, row], dim=-1).reshape(-1, 1, 2)  # (n, 1, 2)
    aspects = torch.tensor(ASPECTS)
    sides = ANCHOR * stride * torch.stack([aspects**-0.5, aspects**0.5], dim=-1)  # (3, 2) width, height
    return torch.cat([centre - sides / 2, centre + sides / 2], dim=-1).flatten(0, 1)


def suppress(boxes, there, threshold, labels=None):
    """Non-maximum suppression: boxes (b, n, 4), the best first; there (b, n), which count -> (b, n), which stay.

    A box goes if one before it that stays, with the same of labels (b, n), overlaps it by more than the threshold. That
    is an equation for "stays". What it gives is put into it again: after k times the first k boxes have their answer,
    for they depend on those before alone; in practice all have it after a few (Cluster-NMS, Zheng et al. 2020).
    """
    hides = (overlap(boxes, boxes) > threshold).triu(1)  # [j, i]: j comes before i, and hides it
    if labels is not None:
        hides &= labels[:, :, None] == labels[:, None]
    stays = there
    while True:
        before, stays = stays, there & ~(hides & stays[..., None]).any(dim=1)
        if torch.equal(before, stays):
            return stays


# --- Proposals, and what is learned from ------------------------------------------------------


class ProposalHead(nn.Module):
    """Of each anchor whether there is an object, and the box as seen from it: maps -> (b, A), (b, A, 4)."""

    def __init__(self, channels, convolutions):
        super().__init__()
        layers = [(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()) for _ in range(convolutions)]
        self.shared = nn.Sequential(*(layer for pair in layers for layer in pair))
        self.objectness = nn.Conv2d(channels, len(ASPECTS), 1)
        self.deltas = nn.Conv2d(channels, 4 * len(ASPECTS), 1)
        for layer in (*self.shared[::2], self.objectness, self.deltas):
            start(layer, std=0.01)

    def forward(self, maps):
        maps = [self.shared(level) for level in maps]
        logits = [self.objectness(level).permute(0, 2, 3, 1).flatten(1) for level in maps]
        deltas = [self.deltas(level).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)) for level in maps]
        return torch.cat(logits, dim=1), torch.cat(deltas, dim=1)


def start(layer, std):
    """A layer's first weights: N(0, std²), biases are zero."""
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def rpn_losses(logits, deltas, anchors, labels, boxes, noise, number):
    """Cross-entropy of sampled anchors, and L1 of the code of those with an object, both over `number`.

    logits (b, A), deltas (b, A, 4), anchors (A, 4), labels (b, S), boxes (b, S, 4), noise (b, A).
    """
    kind, matched = match(boxes, labels >= 0, anchors, low=0.3, high=0.7, rescue=True)
    index, taken = sample(kind, noise, number, 0.5)
    kind, matched = kind.gather(1, index), matched.gather(1, index)  # (b, number)
    target, found = kind.float(), taken & (kind == 1)
    objectness = F.binary_cross_entropy_with_logits(logits.gather(1, index), target.clamp(min=0), reduction="none")
    wanted = encode(gather(boxes, matched).where(found[..., None], anchors[index]), anchors[index])
    box = (gather(deltas, index) - wanted).abs().sum(dim=2)
    n = number * len(logits)
    return (objectness * taken).sum() / n, (box * found).sum() / n


def match(boxes, there, others, low, high, rescue=False):
    """Which object each of other boxes is about: kind (b, n) 1, 0 or -1, and the object's index (b, n).

    boxes (b, S, 4), there (b, S); others (n, 4) or (b, n, 4). 1: their overlap is at least `high`; 0, background: below
    `low`; -1: between, to be left out. rescue: also the others that overlap an object most of all are 1.
    """
    overlaps = overlap(boxes, others).where(there[..., None], 0.0)  # (b, S, n)
    most, matched = overlaps.max(dim=1)
    kind = (most >= high).long() - ((most >= low) & (most < high)).long()
    if rescue:
        best = overlaps.amax(dim=2, keepdim=True)
        kind[((overlaps == best) & (best > 0)).any(dim=1)] = 1
    return kind, matched


def sample(kind, noise, number, share):
    """At random at most `share` of `number` of kind 1, and of kind 0 what is missing: their indices (b, number), and
    whether they are there (b, number). Those of kind 1 come first. noise (b, n) uniform in [0, 1): the smallest win."""
    chance = 1 - noise  # in (0, 1]
    positive = chance.where(kind == 1, 0.0).topk(min(int(share * number), kind.shape[1]), dim=1)
    order = chance.where(kind == 0, 0.0)
    order.scatter_reduce_(1, positive.indices, positive.values + (positive.values > 0), "amax")
    value, index = order.topk(min(number, kind.shape[1]), dim=1)
    return index, value > 0


def sample_regions(proposals, there, labels, boxes, noise, number, num_classes):
    """Regions to learn from, of the proposals and the objects' own boxes, at most a quarter with an object: (b, K, 4),
    their classes (b, K), num_classes for background, the object's index (b, K), whether they are there (b, K)."""
    regions, there = torch.cat([proposals, boxes], dim=1), torch.cat([there, labels >= 0], dim=1)
    kind, matched = match(boxes, labels >= 0, regions, low=0.5, high=0.5)
    columns = torch.arange(regions.shape[1], device=noise.device) % noise.shape[1]  # anchors and regions share numbers
    index, taken = sample(kind.where(there, -1), noise[:, columns], number, 0.25)
    kind, matched = kind.gather(1, index), matched.gather(1, index)
    classes = labels.gather(1, matched).where(kind == 1, num_classes)
    return gather(regions, index), classes, matched, taken


# --- Regions ----------------------------------------------------------------------------------


def roi_align(maps, strides, regions, side):
    """RoIAlign (He et al. 2017): maps of b images, regions (b, K, 4) -> (b * K, C, side, side).

    Each region is cut into side x side bins, of which each is the mean of 2 x 2 samples between the values of the map
    that suits the region's size (FPN, eq. 1). The maps are laid out one below the other, so that one call of
    grid_sample serves all. A value lies in the middle of its stride, and at the border the last one goes on.
    """
    K, W = regions.shape[1], maps[0].shape[3]
    atlas = torch.cat([F.pad(level, (0, W - level.shape[-1])) for level in maps], dim=2)  # (b, C, all rows, W)
    rows = torch.tensor([level.shape[-2] for level in maps], device=regions.device)
    columns = torch.tensor([level.shape[-1] for level in maps], device=regions.device)
    wanted = area(regions).sqrt().clamp(min=1e-6) / (CANONICAL * strides[0])
    level = wanted.log2().floor().clamp(0, len(maps) - 1).long()  # (b, K)
    stride = regions.new_tensor(strides)[level][..., None]
    x, y = points(regions, 2 * side)  # (b, K, 2 * side)
    x = (x / stride - 0.5).clamp(min=0).minimum(columns[level][..., None] - 1)
    y = (y / stride - 0.5).clamp(min=0).minimum(rows[level][..., None] - 1)
    y = y + (rows.cumsum(0) - rows)[level][..., None]
    x, y = 2 * x / max(1, W - 1) - 1, 2 * y / max(1, atlas.shape[2] - 1) - 1  # as grid_sample wants them
    grid = torch.stack(torch.broadcast_tensors(x[..., None, :], y[..., :, None]), dim=-1)  # (b, K, 2s, 2s, 2)
    seen = F.grid_sample(atlas, grid.flatten(1, 2), align_corners=True)  # (b, C, K * 2s, 2s)
    return F.avg_pool2d(seen, 2).unflatten(2, (K, side)).transpose(1, 2).flatten(0, 1)


def points(regions, number):
    """The middles of `number` equal parts of each side: regions (…, 4) -> x (…, number), y (…, number)."""
    part = (torch.arange(number, device=regions.device) + 0.5) / number
    low, sides = regions[..., :2, None], (regions[..., 2:] - regions[..., :2])[..., None]
    return (low + part * sides).unbind(dim=-2)


def tower(sizes):
    """What both heads begin with: 3 x 3 convolutions, LayerNorm and ReLU after each."""
    layers = []
    for _ in range(sizes.convolutions):
        layers += [convolution(sizes.channels, sizes.channels, 3), nn.ReLU()]
        start(layers[-2][0], std=(2 / (9 * sizes.channels)) ** 0.5)  # He et al. 2015, as in detectron2
    return nn.Sequential(*layers)


class BoxHead(nn.Module):
    """Regions (R, C, 7, 7) -> scores of the classes and background (R, classes + 1), boxes in code (R, classes, 4)."""

    def __init__(self, sizes, num_classes):
        super().__init__()
        self.shared = tower(sizes)
        self.hidden = nn.Linear(sizes.channels * BOX_SIDE**2, sizes.hidden)
        self.scores, self.deltas = nn.Linear(sizes.hidden, num_classes + 1), nn.Linear(sizes.hidden, 4 * num_classes)
        start(self.hidden, std=self.hidden.in_features**-0.5)
        start(self.scores, std=0.01)
        start(self.deltas, std=0.001)

    def forward(self, x):
        x = self.hidden(self.shared(x).flatten(1)).relu()
        return self.scores(x).float(), self.deltas(x).float().unflatten(1, (-1, 4))


def of_class(values, classes):
    """What each region has for its class: (b * K, classes, …), (b, K) -> (b, K, …); of background something else."""
    own = classes.flatten().clamp(max=values.shape[1] - 1)
    return values[torch.arange(len(own), device=own.device), own].unflatten(0, classes.shape)


def box_losses(scores, deltas, regions, classes, boxes, matched, taken):
    """Cross-entropy of the regions, and L1 of the code of those with an object, over the regions of the image.

    scores (b * K, classes + 1), deltas (b * K, classes, 4), regions (b, K, 4), boxes (b, S, 4), the rest (b, K).
    """
    n, found = taken.sum(dim=1).clamp(min=1), taken & (classes < deltas.shape[1])
    cls = F.cross_entropy(scores, classes.flatten(), reduction="none").view(classes.shape)
    safe = regions.new_tensor([0.0, 0.0, 1.0, 1.0])  # where nothing is found, numbers that are no NaN
    wanted = encode(*(v.where(found[..., None], safe) for v in (gather(boxes, matched), regions)), BOX_WEIGHTS)
    box = (of_class(deltas, classes) - wanted).abs().sum(dim=2)
    return ((cls * taken).sum(dim=1) / n).mean(), ((box * found).sum(dim=1) / n).mean()


class MaskHead(nn.Module):
    """The mask of each region for its class: (R, C, 14, 14), classes (b, K) -> logits (b, K, 28, 28)."""

    def __init__(self, sizes, num_classes):
        super().__init__()
        C, self.shared = sizes.channels, tower(sizes)
        self.up, self.logits = nn.ConvTranspose2d(C, C, 2, 2), nn.Conv2d(C, num_classes, 1)
        start(self.up, std=(2 / (4 * C)) ** 0.5)
        start(self.logits, std=0.001)

    def forward(self, x, classes):
        x = self.logits(self.up(self.shared(x)).relu()).float()  # (R, classes, 28, 28)
        return of_class(x, classes)


def mask_targets(masks, matched, regions, side):
    """Which bins of a region are inside its object, at half of 4 x 4 points or more: masks (b, S, H, W), matched (b, K)
    -> (b, K, side, side), 0 or 1."""
    H, W = masks.shape[-2:]
    x, y = points(regions, 4 * side)
    x, y = x.long().clamp(0, W - 1), y.long().clamp(0, H - 1)  # the pixel that holds the point
    image = torch.arange(len(masks), device=masks.device)[:, None, None, None]
    inside = masks[image, matched[..., None, None], y[..., None], x[..., None, :]]  # (b, K, 4 * side, 4 * side)
    return (F.avg_pool2d(inside.float(), 4) >= 0.5).float()


def mask_loss(logits, targets, found):
    """Cross-entropy of each pixel, the mean over the regions with an object: (b, K, 28, 28) twice, found (b, K)."""
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=(2, 3))
    return ((loss * found).sum(dim=1) / found.sum(dim=1).clamp(min=1)).mean()
