"""Images with a mask each, for semantic segmentation: the class of every pixel.

SceneMasks   engine/scenes.py, of which all masks are known
"""


class SceneMasks:
    """Scenes with masks in place of labels: class 0 is the background, 1 + c an item of class c.

    scenes: a `scenes.Scenes`; items of one scene never overlap.
    """

    unreadable = {}

    def __init__(self, split):
        self.scenes = split

    def __len__(self):
        return len(self.scenes)

    def train_batches(self, *args):
        """As of `scenes.Scenes`: images (b, 3, H, W), masks (b, H, W) int64."""
        for images, _, objects in self.scenes.train_batches(*args, objects=True):
            yield images, mask_of(objects)

    def test_batches(self, *args):
        """As of `scenes.Scenes`: images (b, 3, H, W), masks (b, H, W) int64."""
        for images, _, objects in self.scenes.test_batches(*args, objects=True):
            yield images, mask_of(objects)


def mask_of(objects):
    """The class of each pixel: `scenes.Objects` -> (b, H, W) int64."""
    return ((1 + objects.labels)[..., None, None] * objects.masks).amax(dim=1)


def of_scenes(dataset):
    """The same scenes as a `data.Dataset` of images and masks."""
    train, test = SceneMasks(dataset.train), SceneMasks(dataset.test)
    return dataset._replace(classes=["background", *dataset.classes], train=train, test=test)
