"""COCO's layout, its jitter and its metric; and what runs of --task detect promise."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

import hpm
import train
import vit
from downstream import detection, precision
from downstream.detection import Detections
from engine import coco
from engine.scenes import Objects, boxes_of
from tests.engine.runs import checkpoint, different, log, one_line, run, settings
from tests.engine.test_distributed import launch, wait

pytestmark = pytest.mark.usefixtures("leave_no_trace")
WHOLE = (0.9, 0.9 / 1.9, 0.0, 0.0)  # numbers of the jitter that change nothing: no flip, scale 1


def square(number, left, top, side, category=7, **more):
    """An annotation: a square, its outline a polygon."""
    right, bottom = left + side, top + side
    outline = [[left, top, right, top, right, bottom, left, bottom]]
    known = dict(id=number, category_id=category, bbox=[left, top, side, side], area=side**2, iscrowd=0)
    return known | dict(segmentation=outline) | more


CROWD = dict(iscrowd=1, segmentation=dict(size=[30, 40], counts=[0, 300, 900]))  # the left quarter
ANNOTATIONS = {  # by image: of two categories, whose ids are 7 and 3
    1: [square(1, 4, 6, 12), square(2, 20, 10, 16, category=3)],
    2: [square(3, 8, 8, 14), square(4, 0, 0, 10, **CROWD)],
    3: [square(5, 2, 2, 20, category=3)],
    4: [],
    5: [square(6, 0, 0, 10, **CROWD)],
    6: [square(7, 12, 4, 18)],
}


def write_coco(path, change=lambda content: None):
    """Six images of 40 x 30 pixels for training, the same for tests; change(content) alters both files."""
    rng = np.random.default_rng(0)
    for split in ("train2017", "val2017"):
        (path / split).mkdir(parents=True)
        (path / "annotations").mkdir(exist_ok=True)
        images = []
        for number, objects in ANNOTATIONS.items():
            pixels = rng.integers(0, 60, (30, 40, 3), dtype=np.uint8)
            for one in objects:
                left, top, side, _ = one["bbox"]
                pixels[top : top + side, left : left + side, one["category_id"] % 3] += 150
            Image.fromarray(pixels).save(path / split / f"{number}.png")
            images.append(dict(id=number, file_name=f"{number}.png", width=40, height=30))
        annotations = [dict(one, image_id=number) for number, objects in ANNOTATIONS.items() for one in objects]
        categories = [dict(id=7, name="ball"), dict(id=3, name="cat")]
        content = dict(images=images, annotations=annotations, categories=categories)
        change(content)
        (path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return path


# ---------------------------------------------------------------------------------------------
# The data
# ---------------------------------------------------------------------------------------------


def test_categories_are_numbered_by_their_ids_and_empty_images_left_out(tmp_path, capsys):
    """In training an image without an object teaches nothing (detectron2 leaves it out, too), in tests it counts."""
    dataset = coco.load(write_coco(tmp_path / "coco"))
    assert dataset.classes == ["cat", "ball"]
    assert (len(dataset.train), len(dataset.test)) == (4, 6)
    assert "2 training images without an object are left out" in capsys.readouterr().out
    assert [dataset.train.truth(i)["id"] for i in range(4)] == [1, 2, 3, 6]
    assert [one["category_id"] for one in dataset.train.truth(0)["annotations"]] == [1, 0]
    part = dataset.train.part(torch.tensor([3, 1]))
    assert [part.truth(i)["id"] for i in range(2)] == [6, 2]
    assert part.files[0].endswith(b"6.png")


def test_annotations_that_can_not_be_objects_are_counted(tmp_path, capsys):
    def change(content):
        content["annotations"] += [
            square(20, 50, 3, 5, image_id=1),
            square(21, 3, -9, 5, image_id=1),
            square(22, 3, 3, 5, image_id=1, bbox=[3, 3, 0, 5]),
            square(23, 3, 3, 5, image_id=1, segmentation=[[1, 2, 3, 4]]),
            square(24, 3, 3, 5, image_id=1, segmentation=dict(size=[40, 30], counts=[1200])),
        ]

    dataset = coco.load(write_coco(tmp_path / "coco", change))
    said = capsys.readouterr().out.splitlines()[0]
    assert "5 annotations are left out" in said
    for words in ("2 with a box outside the image", "1 with a box without an area", "1 without an outline",
                  "1 with a mask of another size"):  # fmt: skip
        assert words in said
    assert len(dataset.train.truth(0)["annotations"]) == 2


def unknown_category(content):
    content["annotations"][0]["category_id"] = 99


def unknown_image(content):
    content["annotations"][0]["image_id"] = 99


def no_objects(content):
    content["annotations"].clear()


def no_categories(content):
    content["categories"].clear()
    content["annotations"].clear()


def no_box(content):
    del content["annotations"][0]["bbox"]


MISTAKES = {
    "category": (unknown_category, None, ("annotation 1", "the category 99", "none of its 2")),
    "image": (unknown_image, None, ("annotation 1", "the image 99")),
    "objects": (no_objects, None, ("train2017", "no image", "object")),
    "categories": (no_categories, None, ("no categories",)),
    "box": (no_box, None, ("instances_train2017.json is damaged", "bbox")),
    "file": (None, "train2017/3.png", ("1 of the 6 images", "as 3.png")),
    "annotations": (None, "annotations/instances_val2017.json", ("is not there", "coco:PATH needs")),
    "folder": (None, "val2017", ("is not there", "coco:PATH needs")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_in_one_line(name, tmp_path, capsys):
    change, gone, words = MISTAKES[name]
    write_coco(tmp_path / "coco", *[change] if change else [])
    if gone:
        path = tmp_path / "coco" / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run(f"--task detect --arch vit_micro4 --data coco:{tmp_path / 'coco'}") == 2
    error = one_line(capsys)
    assert all(word in error for word in words), error


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b'{"images": 3}', b"\xff\xfe\x00"])
def test_damaged_annotations_are_answered_in_one_line(content, tmp_path, capsys):
    Path(write_coco(tmp_path / "coco"), "annotations", "instances_val2017.json").write_bytes(content)
    assert run(f"--task detect --arch vit_micro4 --data coco:{tmp_path / 'coco'}") == 2
    assert "instances_val2017.json is damaged" in one_line(capsys)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--data photos", "needs the boxes of objects"),
        ("--arch resnet50", "is built on a Transformer"),
        ("--lr 0.1,0.2", "several --lr"),
        ("--pool mean", "--pool does nothing in --task detect"),
        ("--mixup 0.8", "--mixup does nothing in --task detect"),
        ("--task finetune --init x.pt --data coco:x", "it is for --task detect"),
        ("--task supervised --window 7", "--window does nothing in --task supervised, but in detect"),
    ],
)
def test_flags_that_can_not_be_are_refused(command, words, capsys):
    assert run(f"--task detect {command}") == 2
    assert words in one_line(capsys)


# ---------------------------------------------------------------------------------------------
# Large-scale jitter
# ---------------------------------------------------------------------------------------------


def jittered(draw, size=(30, 40), annotations=ANNOTATIONS[1]):
    image = Image.fromarray(np.arange(30 * 40 * 3, dtype=np.uint32).astype(np.uint8).reshape(30, 40, 3))
    numbered = [dict(one, category_id=one["category_id"] % 5) for one in annotations]
    return np.asarray(image), *coco.jitter(image, numbered, size, draw)


def test_jitter_at_scale_1_changes_nothing():
    before, image, objects = jittered(WHOLE)
    np.testing.assert_array_equal(np.asarray(image), before)
    assert objects.labels.tolist() == [2, 3]
    assert objects.boxes.tolist() == [[4, 6, 16, 18], [20, 10, 36, 26]]
    assert objects.masks.sum(dim=(1, 2)).tolist() == [144, 256]


def test_jitter_flips_image_masks_and_boxes_together():
    before, image, objects = jittered((0.1, *WHOLE[1:]))
    np.testing.assert_array_equal(np.asarray(image), before[:, ::-1])
    assert objects.boxes.tolist() == [[24, 6, 36, 18], [4, 10, 20, 26]]


@pytest.mark.parametrize("draw", [(0.9, 0.0, 0.0, 0.0), (0.1, 0.3, 0.0, 0.0), (0.9, 1.0, 0.5, 0.5), (0.1, 0.9, 1, 0.2)])
@pytest.mark.parametrize("kind", ["polygon", "run lengths"])
def test_jitter_moves_a_mask_as_it_moves_the_image(draw, kind):
    """An image that is white where the object is: its pixels and the mask belong together at any scale and place."""
    inside = np.zeros((30, 40), np.uint8)
    inside[6:18, 4:20] = 1
    outline = [[4, 6, 20, 6, 20, 18, 4, 18]]
    if kind == "run lengths":
        code = coco.encode(torch.from_numpy(inside)[None])[0]
        outline = code | dict(counts=code["counts"].decode())
    one = dict(category_id=0, iscrowd=0, segmentation=outline)
    white = Image.fromarray(np.repeat(255 * inside[..., None], 3, axis=2))
    image, objects = coco.jitter(white, [one], (32, 32), draw)
    seen = np.zeros((32, 32))
    seen[: image.height, : image.width] = np.asarray(image)[..., 0]
    assert image.width <= 32
    assert image.height <= 32
    if not len(objects.labels):
        assert (seen > 127).sum() <= 2
        return
    mask = objects.masks[0].numpy()
    edge = 2 * (mask.any(axis=0).sum() + mask.any(axis=1).sum())
    assert ((seen > 127) != mask).sum() <= edge / 2
    assert torch.equal(objects.boxes, boxes_of(objects.masks))


def test_jitter_leaves_crowds_out_and_objects_that_are_cut_away():
    _, _, objects = jittered(WHOLE, annotations=ANNOTATIONS[2])
    assert objects.boxes.tolist() == [[8, 8, 22, 22]]
    _, _, nothing = jittered((0.9, 1.0, 1.0, 1.0), annotations=[square(1, 0, 0, 5)])
    assert nothing.masks.shape == (0, 30, 40)
    assert nothing.boxes.shape == (0, 4)
    labels, boxes, masks = coco.collate([objects, nothing])
    assert labels.tolist() == [[2, -1], [-1, -1]]
    assert boxes.shape == (2, 2, 4)
    assert masks.shape == (2, 2, 30, 40)


def test_a_batch_is_a_function_of_the_seed_and_the_step_alone(tmp_path):
    train_split = coco.load(write_coco(tmp_path / "coco")).train
    train_split.workers = 0
    how = (32, 32), 4, range(3), 0, None, torch.device("cpu")
    batches = list(train_split.train_batches(*how))
    for step, shard in ((2, slice(0, 2)), (2, slice(2, 4))):
        images, objects = next(train_split.train_batches(*how[:2], range(step, 3), *how[3:], shard))
        assert torch.equal(images, batches[step][0][shard])
        for one, other in zip(objects, batches[step][1][shard], strict=True):
            assert all(map(torch.equal, one, other))
    assert images.shape == (2, 3, 32, 32)


def test_what_can_not_be_read_is_skipped_and_does_not_count(tmp_path, monkeypatch, capsys):
    """Another image stands in for it in training; in tests it gets no truth. One of another size than its annotations
    say is of that kind: its boxes would lie elsewhere."""
    dataset = coco.load(write_coco(tmp_path / "coco"))
    monkeypatch.setattr(
        coco.Coco, "skip", lambda self, unreadable: self.unreadable.update(unreadable)
    )  # of so few, 5 %
    for split in (dataset.train, dataset.test):
        split.workers = 0
    (tmp_path / "coco" / "train2017" / "3.png").write_text("no image")
    Image.new("RGB", (30, 40)).save(tmp_path / "coco" / "val2017" / "1.png")
    size, device = (32, 32), torch.device("cpu")
    images, objects = next(dataset.train.train_batches(size, 4, range(1), 0, None, device))
    assert all(len(one.labels) == len(one.boxes) for one in objects)
    assert len(dataset.train.unreadable) == 1
    index, truths = [], []
    for _, some, more in dataset.test.test_batches(size, 4, device):
        index += some.tolist()
        truths += more
    assert index == [-1, 1, 2, 3, 4, 5]
    assert truths[0] is None
    assert "it has 30x40 pixels, its annotations 40x30" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# The metric
# ---------------------------------------------------------------------------------------------


def perfect(truth, size, shift=0.0, score=0.9):
    """`Detections` that are the truth of an image, as a model sees it that gets the image within size."""
    h, w = coco.fitting(truth["height"], truth["width"], size)
    objects = [one for one in truth["annotations"] if not one["iscrowd"]]
    boxes = torch.tensor([one["bbox"] for one in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = (boxes + shift) * torch.tensor([w / truth["width"], h / truth["height"]] * 2)
    labels = torch.tensor([one["category_id"] for one in objects], dtype=torch.int64)
    return Detections(boxes, labels, torch.full((len(objects),), score), torch.ones(len(objects), 28, 28))


class Oracle(torch.nn.Module):
    """Answers a batch with the truth of its images, in order."""

    def __init__(self, split, size, **options):
        super().__init__()
        self.answers = [perfect(split.truth(i), size, **options) for i in range(len(split))]

    def forward(self, images):
        some, self.answers = self.answers[: len(images)], self.answers[len(images) :]
        return Detections(*(torch.nn.utils.rnn.pad_sequence(values, True) for values in zip(*some, strict=True)))


def test_the_truth_has_a_precision_of_1(tmp_path):
    """In images that are no square and are seen at another size; beside a crowd, and with images without an object."""
    dataset = coco.load(write_coco(tmp_path / "coco"))
    dataset.test.workers = 0
    for size in ((64, 64), (24, 48)):
        scores = precision.evaluate(Oracle(dataset.test, size), dataset.test, dataset.classes, size, 4, "cpu")
        assert scores == dict(ap_box=1.0, ap_box_50=1.0, ap_mask=1.0, ap_mask_50=1.0)


def test_boxes_beside_the_truth_have_the_precision_of_their_overlap():
    """A square of 20 that is 2 pixels off both ways overlaps by 324 / 476 = 0.68: right for 4 of COCO's 10 thresholds,
    0.5 to 0.65. A wrong class, or nothing found, is worth nothing; of two guesses, the worse one first costs half."""
    truth = dict(id=0, height=40, width=40, annotations=[
        dict(category_id=0, iscrowd=0, bbox=[10, 10, 20, 20], area=400, segmentation=[[10, 10, 30, 10, 30, 30, 10, 30]])
    ])  # fmt: skip
    size = (40, 40)

    def scores_of(*found):
        results = [one for some in found for one in precision.results_of(some, truth, size)]
        return precision.average_precision([(truth, results)], ["a", "b"])

    off = perfect(truth, size, shift=2.0)
    assert scores_of(off)["ap_box"] == pytest.approx(0.4)
    assert scores_of(off)["ap_mask"] == pytest.approx(0.4)
    assert scores_of(off)["ap_box_50"] == pytest.approx(1.0)
    right = perfect(truth, size)
    assert scores_of(right._replace(labels=right.labels + 1))["ap_box"] == 0
    assert scores_of(right._replace(scores=right.scores * 0))["ap_box"] == 0
    assert scores_of()["ap_mask"] == 0
    wrong = perfect(truth, size, shift=9.0, score=0.95)
    assert scores_of(right, wrong)["ap_box"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no test image has an object"):
        precision.average_precision([(truth | dict(annotations=[]), [])], ["a"])


def test_the_truth_of_a_scene_is_its_masks_and_boxes():
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, 2:5, 1:7], masks[2, 6:, :2] = True, True
    truth = coco.truth_of(Objects(torch.tensor([4, -1, 2]), masks, boxes_of(masks)), 5)
    assert (truth["id"], truth["height"], truth["width"]) == (5, 8, 8)
    assert [one["category_id"] for one in truth["annotations"]] == [4, 2]
    assert [one["bbox"] for one in truth["annotations"]] == [[1, 2, 6, 3], [0, 6, 2, 2]]
    assert [one["area"] for one in truth["annotations"]] == [18, 4]


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The flags of a run of 4 steps on four images."""
    monkeypatch.setitem(vit.ARCHS, "vit_micro4", vit.ARCHS["vit_micro4"] | {"depth": 2})
    path = write_coco(tmp_path / "coco")
    return (
        f"--task detect --data coco:{path} --arch vit_micro4 --img-size 32 --batch-size 4 --steps 4 --warmup 1 "
        "--workers 0 --drop-path 0 --window 0 --lr 0.001"
    )


@pytest.mark.slow
def test_a_run_is_scored_drawn_and_told(tiny, monkeypatch, capsys):
    monkeypatch.setattr(precision, "SHOWN", 2)  # of the test images: the rest takes its time
    assert run(f"{tiny} --evaluations 1 --micro-batch 2 --out run") == 0
    result, config = (json.loads(Path("run", f"{name}.json").read_text()) for name in ("result", "config"))
    assert set(precision.SCORES) <= result.keys()
    assert config["decay"] == "steps"
    assert {"loss", "objectness", "rpn_box", "cls", "box", "mask"} <= log("run")[-1].keys()
    with Image.open("run/predictions.png") as picture:
        assert picture.width > 300
    assert "AP_box" in capsys.readouterr().out


def test_a_test_image_is_whole_at_the_top_left_of_grey():
    """As the large-scale jitter at scale 1 would have it: 40 x 30 pixels in a square of 32."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    framed = np.asarray(coco.framed(image, (32, 32)))
    np.testing.assert_array_equal(framed[:24], np.asarray(image.resize((32, 24), Image.Resampling.BILINEAR)))
    assert (framed[24:] == [124, 116, 104]).all(), "ImageNet's mean colour, which becomes 0"
    assert coco.framed(image, (20, 80)).size == (80, 20)


def test_the_picture_shows_what_has_a_score_above_a_half(tmp_path):
    dataset, sides = coco.load(write_coco(tmp_path / "coco")), (32, 32)
    truth, pictures = dataset.test.truth(0), {}
    for score in (None, 0.4, 0.6):
        found = [] if score is None else precision.results_of(perfect(truth, sides, score=score), truth, sides)
        row = torch.zeros(3, *sides), truth, found
        precision.picture(tmp_path / "p.png", [row], dataset, sides, ("image", "prediction"))
        pictures[score] = np.asarray(Image.open(tmp_path / "p.png"))
    assert (pictures[0.4] == pictures[None]).all()
    assert (pictures[0.6] != pictures[None]).any(axis=-1).mean() > 0.02


def test_predicted_objects_are_where_the_image_has_them(tiny, no_figures, monkeypatch, capsys):
    """--task predict, of a model that knows the truth: boxes and masks in pixels of the file, names of categories."""
    windows = []
    monkeypatch.setattr(detection, "use_windows", lambda encoder, side: windows.append(side))
    assert run(f"{tiny} --steps 1 --window 2 --test-images 1 --out run") == 0
    split = coco.load(Path("coco")).test
    oracle = Oracle(split, (32, 32))
    monkeypatch.setattr(detection.Detector, "forward", lambda self, images: oracle(images))
    assert run("--task predict --init run --images coco/val2017") == 0
    told = iter(json.loads(Path("run/predictions.json").read_text()))
    for i in range(len(split)):
        truth = split.truth(i)
        for known in truth["annotations"]:
            if not known["iscrowd"]:
                one = next(told)
                assert (one["file"], one["category"]) == (
                    f"coco/val2017/{truth['file_name']}",
                    split.classes[known["category_id"]],
                )
                assert one["bbox"] == pytest.approx(known["bbox"], abs=1e-4)
                assert one["score"] == pytest.approx(0.9)
                assert rle.area(one["segmentation"]) == known["area"]
                assert rle.toBbox(one["segmentation"]).tolist() == known["bbox"]
    assert next(told, None) is None
    assert windows == [2, 2], "of the run, and of its model when it predicts"
    said = capsys.readouterr().out
    assert re.search(r"^1\.png +0\.90 ball \| 0\.90 cat$", said, re.M)
    assert re.search(r"^4\.png +nothing$", said, re.M)
    assert Image.open("run/predicted.png").width > 300


def test_a_run_goes_on_bit_for_bit(tiny, no_figures, monkeypatch):
    monkeypatch.setitem(train.TASKS, "detect", train.TASKS["detect"]._replace(score=lambda *_: {"ap_box": 0.0}))
    assert run(f"{tiny} --evaluations 2 --out whole") == 0
    shutil.copytree("whole", "half")
    shutil.copy("half/previous.pt", "half/last.pt")  # of step 2
    Path("half/previous.pt").unlink()
    assert checkpoint("half")["step"] == 2
    assert run("--task detect --resume --out half") == 0
    assert different(checkpoint("whole")["model"], checkpoint("half")["model"]) == []
    assert log("whole") == log("half")


@pytest.mark.parametrize("layout", ["timm", "hugging-face", "hpm", "mae", "supervised"])
def test_a_detector_starts_from_weights_of_any_layout(layout, tiny, no_figures, tmp_path, capsys):
    """All but the class token, which a detector has not, and the norm after the last block, which ViTDet leaves out."""
    torch.manual_seed(3)
    init = tmp_path / "weights"
    if layout in ("hpm", "mae"):  # a run's checkpoint: of two encoders, the student's
        how = {} if layout == "hpm" else dict(predictor="none", mask="random")
        model = hpm.create("vit_micro4", 32, **how)
        torch.save(dict(model=model.state_dict()), init)
        encoder = model.student.encoder.state_dict()
    else:
        model = vit.create("vit_micro4", 32, 5)
        encoder = model.state_dict()
        if layout == "supervised":
            torch.save(dict(model=encoder), init)
        else:
            vit.save_weights(model, init, layout)
    seen = {}

    def look(config, dataset, model, *rest):
        seen.update({name: p.clone() for name, p in model.encoder.state_dict().items()})
        raise ValueError("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", look)
        assert run(f"{tiny} --init {init} --out run") == 2
    assert [name for name in seen if name.startswith("blocks.")]
    for name, value in seen.items():
        if name != "pos_embed":
            assert torch.equal(value, encoder[name]), name
    assert "left at the initial value" not in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tiny, no_figures, tmp_path):
    """And the same scores: the results of all are brought together. Sums of gradients in another order differ by
    rounding, which a few steps make larger."""
    assert run(f"{tiny} --evaluations 1 --out one") == 0
    process = launch(tmp_path, f"{tiny} --evaluations 1 --out two")
    assert wait(process)[0] is not None
    assert process.returncode == 0
    one, two = log("one"), log("two")
    assert len(one) == len(two) == 4
    for line, other in zip(one, two, strict=True):
        for name in ("loss", "objectness", "rpn_box", "cls", "box", "mask", "grad_norm"):
            assert other[name] == pytest.approx(line[name], rel=1e-3), (line["step"], name)
    for name in precision.SCORES:
        assert two[-1][name] == pytest.approx(one[-1][name], abs=0.02)


def test_the_step_that_memory_is_measured_with_has_work_for_every_region(tiny):
    """On a GPU the micro-batch is what fits: an image with fewer objects than usual would promise too much."""
    config, dataset = settings(tiny)
    model, seen = train.build(config, dataset), []
    model.mask_head.register_forward_hook(lambda module, args, out: seen.append(args[1].shape))
    train.try_step(config, model, dataset, 2)
    assert seen == [(2, model.sizes.samples[1] // 4)]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("step", "rate"), [(124, 0.5), (250, 1), (163_888, 1), (163_889, 0.1), (177_546, 0.1), (177_547, 0.01)]
)
def test_the_learning_rate_falls_in_vitdets_two_steps(step, rate):
    """Of its 184,375 steps at 163,889 and 177,546, warm-up over 250 (mask_rcnn_vitdet_b_100ep.py)."""
    assert train.learning_rate(step, 184_375, 1.0, 250, "steps") == pytest.approx(rate)
