"""Objects in images: COCO's layout on disk, and its large-scale jitter.

load(path)         PATH/{train,val}2017/*.jpg and PATH/annotations/instances_{train,val}2017.json, a `data.Dataset`
Coco               one of the two splits
WithObjects        `scenes.Scenes` in its place

Both kinds of split have the methods of `data.InMemory`. train_batches yields images (b, 3, H, W) and a list of b
`scenes.Objects`; test_batches yields images, labels (b,), of which -1 is an image that does not count, and a list of b
truths: what COCO's file says of an image, its id, height and width, and its annotations.
"""

import collections
import json
import os

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools import mask as rle
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import data
from engine import distributed, image_folder, scenes
from engine.image_folder import printable
from engine.scenes import Objects

LAYOUT = "coco:PATH needs PATH/{train,val}2017/*.jpg and PATH/annotations/instances_{train,val}2017.json"
JITTER = (0.1, 2.0)  # least and largest scale of large-scale jitter (Ghiasi et al. 2021; ViTDet's)


# ---------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------


def load(path):
    """COCO, or anything in its layout, as a `data.Dataset` of the splits train2017 and val2017.

    Says what it leaves out. Raises ValueError, in one line, where the folder or its annotations are not as they should
    be.
    """
    names, splits = [], []
    for name in ("train2017", "val2017"):
        file = path / "annotations" / f"instances_{name}.json"
        for where, there in ((file, file.is_file()), (path / name, (path / name).is_dir())):
            if not there:
                raise ValueError(f"{printable(where)} is not there; {LAYOUT}")
        classes, images = read_annotations(file, path / name)
        names.append(classes)
        splits.append(images)
    if names[0] != names[1]:
        odd = sorted(set(names[0]) ^ set(names[1]), key=str)
        raise ValueError(
            f"the categories of train2017 and val2017 in {printable(path)} differ: {', '.join(odd[:3]) or 'in order'}"
            "; make them equal"
        )
    train = [image for image in splits[0] if any(not a["iscrowd"] for a in image["annotations"])]
    if empty := len(splits[0]) - len(train):
        distributed.print0(f"{printable(path)}: {empty:,} training images without an object are left out")
    for name, images in (("train2017", train), ("val2017", splits[1])):
        if not any(not a["iscrowd"] for image in images for a in image["annotations"]):
            raise ValueError(f"no image of {name} in {printable(path)} has an object that can be learned; add some")
    folders = (path / "train2017", train), (path / "val2017", splits[1])
    train, test = (Coco(folder, images, names[0]) for folder, images in folders)
    return data.Dataset("coco", names[0], data.IMAGENET_MEAN, data.IMAGENET_STD, train, test)


def read_annotations(file, folder):
    """The names of the categories in a file of COCO's, in the order of their ids; and its images, in its order: dicts
    of id, file_name, height, width and annotations, whose category_id is the place in that order.

    What can't be an object is left out, and said: boxes without an area or outside their image, no outline. Raises
    ValueError for what can't be read, for categories, images and files that are not there.
    """
    try:
        content = json.loads(file.read_bytes())
        ids = {category["id"]: category["name"] for category in sorted(content["categories"], key=lambda c: c["id"])}
        keys = "id", "file_name", "height", "width"
        images = {one["id"]: {key: one[key] for key in keys} | {"annotations": []} for one in content["images"]}
        numbers, left_out = {category: i for i, category in enumerate(ids)}, collections.Counter()
        for one in content["annotations"]:
            what = f"annotation {one['id']} of {printable(file)}"
            if one["category_id"] not in numbers:
                raise Wrong(f"{what} has the category {one['category_id']}, which is none of its {len(ids)}; mend it")
            if one["image_id"] not in images:
                raise Wrong(f"{what} is of the image {one['image_id']}, which it does not have; mend it")
            image = images[one["image_id"]]
            if why := useless(one, image):
                left_out[why] += 1
                continue
            kept = {key: one[key] for key in ("bbox", "area", "segmentation")}
            image["annotations"].append(
                kept | dict(category_id=numbers[one["category_id"]], iscrowd=one.get("iscrowd", 0))
            )
    except Wrong as error:
        raise ValueError(str(error)) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{printable(file)} is damaged, or none of COCO's ({reason}); bring it back") from None
    if not ids:
        raise ValueError(f"{printable(file)} has no categories; bring it back")
    there = set(os.listdir(folder))
    if lacking := [image["file_name"] for image in images.values() if image["file_name"] not in there]:
        raise ValueError(
            f"{len(lacking):,} of the {len(images):,} images in {printable(file)} are not in {printable(folder)}, as "
            f"{lacking[0]}; add them"
        )
    if left_out:
        reasons = ", ".join(f"{n:,} {why}" for why, n in left_out.most_common())
        distributed.print0(f"{printable(file)}: {left_out.total():,} annotations are left out: {reasons}")
    return list(ids.values()), list(images.values())


class Wrong(Exception):
    """Of an annotation, in one line."""


def useless(one, image):
    """Why an annotation can't be an object; None if it can."""
    left, top, width, height = one["bbox"]
    if not (width > 0 and height > 0):
        return "with a box without an area"
    if left >= image["width"] or top >= image["height"] or left + width <= 0 or top + height <= 0:
        return "with a box outside the image"
    outline = one["segmentation"]
    if isinstance(outline, dict):
        return None if list(outline["size"]) == [image["height"], image["width"]] else "with a mask of another size"
    if not outline or any(len(part) < 6 or len(part) % 2 for part in outline):
        return "without an outline, which takes three points"
    return None


class Coco(image_folder.Folder):
    """A `image_folder.Folder` of which each image has objects. What can't be read is skipped, with a warning, as there,
    also an image of another size than its annotations say."""

    def __init__(self, folder, images, classes):
        files = [os.path.join(folder, image["file_name"]) for image in images]
        super().__init__(None, data.IMAGENET_MEAN, data.IMAGENET_STD, (files, [0] * len(files), classes, None))
        # One text for all: a million dicts would be copied by each worker, see `Folder`.
        texts = [json.dumps(image).encode() for image in images]
        self.texts, self.ends = np.frombuffer(b"".join(texts), np.uint8), np.cumsum([0, *map(len, texts)])
        self.numbers = np.arange(len(files))

    def part(self, keep):
        part = super().part(keep)
        part.numbers = self.numbers[keep.numpy()]
        return part

    def truth(self, index):
        """What the file says of an image: a dict, see `read_annotations`."""
        number = self.numbers[index]
        return json.loads(self.texts[self.ends[number] : self.ends[number + 1]].tobytes())

    def read(self, index, size, crop, draw):
        """An image (3, H, W) uint8 of size = (H, W), its index, and its `Objects`; without `draw` the whole image, at
        the top left, and None."""
        truth = self.truth(index)
        image, width, height = image_folder.decode(os.fsdecode(self.files[index]))
        if (width, height) != (truth["width"], truth["height"]):
            raise ValueError(f"it has {width}x{height} pixels, its annotations {truth['width']}x{truth['height']}")
        if draw is None:
            return image_folder.to_tensor(framed(image, size)), torch.tensor(index), None
        image, objects = jitter(image, truth["annotations"], size, draw)
        canvas = Image.new("RGB", size[::-1], image_folder.GREY)
        canvas.paste(image)
        return image_folder.to_tensor(canvas), torch.tensor(index), objects

    def blank(self, size):
        return torch.zeros(3, *size, dtype=torch.uint8), torch.tensor(-1), None

    def draw(self, batch_size, seed, step):
        return torch.rand(batch_size, 4, generator=data.generator(seed, data.CROP, step))

    def train_batches(self, size, batch_size, steps, seed, crop, device, shard=slice(None)):
        for images, _, objects in super().train_batches(size, batch_size, steps, seed, crop, device, shard):
            yield images, [Objects(*(v.to(device, non_blocking=True) for v in one)) for one in objects]

    def test_batches(self, *args):
        for images, index, _ in super().test_batches(*args):
            yield images, index, [self.truth(i) if i >= 0 else None for i in index.tolist()]


def framed(image, size):
    """A Pillow image, as large as fits, at the top left of one of size = (H, W) that is grey elsewhere."""
    h, w = fitting(image.height, image.width, size)
    canvas = Image.new("RGB", size[::-1], image_folder.GREY)
    canvas.paste(image.resize((w, h), Image.Resampling.BILINEAR))
    return canvas


def jitter(image, annotations, size, draw):
    """Large-scale jitter: a Pillow image, flipped every other time, at a scale between JITTER, of which 1 fits into
    size = (H, W), and cut to that at random; and what is left of its objects, but for crowds: `Objects`.

    draw (4,) uniform in [0, 1): flip, scale, top, left. Ghiasi et al. 2021; ViTDet's coco_loader_lsj.py.
    """
    (H, W), (width, height), draw = size, image.size, np.float64(draw)
    scale = JITTER[0] + draw[1] * (JITTER[1] - JITTER[0])
    h, w = fitting(height, width, (H * scale, W * scale))
    top, left = int(draw[2] * (max(h - H, 0) + 1)), int(draw[3] * (max(w - W, 0) + 1))
    seen_h, seen_w = min(h, H), min(w, W)
    x, y = w / width, h / height  # how many times larger it becomes
    if draw[0] < 0.5:
        image = ImageOps.mirror(image)
    box = left / x, top / y, min((left + seen_w) / x, width), min((top + seen_h) / y, height)
    image = image.resize((seen_w, seen_h), Image.Resampling.BILINEAR, box)
    labels, masks = [], []
    for one in annotations:
        if not one["iscrowd"]:
            mask = np.zeros((H, W), bool)
            how = (height, width), draw[0] < 0.5, (x, y, left, top), (seen_h, seen_w)
            mask[:seen_h, :seen_w] = cut(one["segmentation"], *how)
            if mask.any():
                labels.append(one["category_id"])
                masks.append(mask)
    masks = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, H, W, dtype=torch.bool)
    return image, Objects(torch.tensor(labels, dtype=torch.int64), masks, scenes.boxes_of(masks))


def cut(outline, sides, flipped, place, seen):
    """The mask of an outline in the part of its image that is seen: polygons are moved, then drawn, run lengths moved
    as pixels. sides = (height, width) of the image; place: how much wider, higher it is now, left and top of the part;
    seen = (height, width) of the part."""
    (height, width), (x, y, left, top) = sides, place
    if isinstance(outline, list):
        moved = []
        for part in outline:
            points = np.array(part, np.float64).reshape(-1, 2)
            points[:, 0] = width - points[:, 0] if flipped else points[:, 0]
            moved.append((points * (x, y) - (left, top)).flatten().tolist())
        return rle.decode(run_lengths(moved, *seen)).astype(bool)
    mask = rle.decode(run_lengths(outline, height, width))
    mask = Image.fromarray(mask[:, ::-1] if flipped else mask)
    box = left / x, top / y, min((left + seen[1]) / x, width), min((top + seen[0]) / y, height)
    return np.asarray(mask.resize(seen[::-1], Image.Resampling.NEAREST, box)).astype(bool)


class WithObjects:
    """A `scenes.Scenes` of which the objects are wanted, not the labels."""

    unreadable = {}

    def __init__(self, split):
        self.scenes = split

    def __len__(self):
        return len(self.scenes)

    def train_batches(self, *args):
        for images, _, objects in self.scenes.train_batches(*args, objects=True):
            yield images, [Objects(*one) for one in zip(*objects, strict=True)]

    def test_batches(self, size, batch_size, device, shard=slice(None)):
        numbers = iter(range(len(self))[shard])
        for images, labels, objects in self.scenes.test_batches(size, batch_size, device, shard, objects=True):
            yield images, labels, [truth_of(Objects(*one), next(numbers)) for one in zip(*objects, strict=True)]


def of_scenes(dataset):
    """The same scenes as a `data.Dataset` of images and objects."""
    return dataset._replace(train=WithObjects(dataset.train), test=WithObjects(dataset.test))


def collate(targets):
    """A list of b `Objects` -> labels (b, S), boxes (b, S, 4), masks (b, S, H, W): padded, with the label -1.

    There is one empty slot at least, so that an image without objects needs no other path.
    """
    labels = pad_sequence([F.pad(t.labels, (0, 1), value=-1) for t in targets], True, -1)
    boxes = pad_sequence([F.pad(t.boxes.float(), (0, 0, 0, 1)) for t in targets], True)
    masks = pad_sequence([F.pad(t.masks, (0, 0, 0, 0, 0, 1)) for t in targets], True)
    return labels, boxes, masks


def whole(n, size, device):
    """n `Objects` of class 0, each of which is all of an image of size = (H, W): as much work as there can be."""
    boxes = torch.tensor(n * [[0, 0, size[1], size[0]]], device=device)
    return Objects(torch.zeros_like(boxes[:, 0]), torch.ones(n, *size, dtype=torch.bool, device=device), boxes)


def truth_of(objects, number):
    """What COCO's file would say of an image with these objects: a dict."""
    there = objects.labels >= 0
    masks, labels = objects.masks[there].cpu(), objects.labels[there].tolist()
    annotations = [
        dict(
            category_id=label, iscrowd=0, segmentation=code, area=float(rle.area(code)), bbox=rle.toBbox(code).tolist()
        )
        for label, code in zip(labels, encode(masks), strict=True)
    ]
    return dict(id=number, height=masks.shape[1], width=masks.shape[2], annotations=annotations)


def run_lengths(segmentation, height, width):
    """A segmentation of COCO's file, polygons or run lengths, as pycocotools' run lengths."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    return (
        segmentation
        if isinstance(segmentation["counts"], bytes | str)
        else rle.frPyObjects(segmentation, height, width)
    )


def encode(masks):
    """Masks (n, H, W) bool as pycocotools' run lengths: n dicts."""
    return rle.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8))) if len(masks) else []


def fitting(height, width, size):
    """Height and width of an image that is made as large as fits into size = (H, W), its shape kept."""
    scale = min(size[0] / height, size[1] / width)
    return max(1, round(height * scale)), max(1, round(width * scale))
