"""The convolutional networks beside ViT: the ResNet baseline, and the hybrids, a ViT behind a ResNet.

Both come from *Big Transfer (BiT)* (Kolesnikov et al., ECCV 2020, arXiv 1912.11370): BatchNorm, which mixes the
images of a batch, is replaced by GroupNorm and standardised convolutions, which do not. ViT, section 4.1.

    convolution   its kernels have mean 0 and variance 1
    bottleneck    1x1, 3x3, 1x1 beside a residual; normalised before each convolution, or after
    ResNet        the baseline: R50x1 has 50 layers and the usual width, R152x4 is four times as wide
    Backbone      the hybrid's: its features, a small image with many channels, are what is cut into patches
    HybridEmbed   the hybrid's patch embedding; behind it stands a plain `vit.ViT`
    variants      resnet50, resnet101x2, …, and r50_vit_b16, …; small ones: resnet_micro, r_vit_micro4

Letters in shapes: B images, C channels, H, W pixels. Parameters carry timm's names.
"""

import difflib
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

import vit

GROUPS = 32  # of GroupNorm, whatever the number of channels; of a small network as many as leave two to each
STEM, SMALL_STEM = 64, 16  # channels of the stem, at the usual width


def borders(size, stride, same):
    """Rows of zeros before and after an image whose sides the stride divides, for windows of `size` pixels.

    same: as few as possible, and an odd one after (TensorFlow's and JAX's "SAME"); else size // 2 on either side.
    """
    total = max(0, size - stride) if same else size - 1
    return total // 2, total - total // 2


class StdConv(nn.Conv2d):
    """Convolution with standardised weights (Qiao et al. 2019): (B, C, H, W) -> (B, C', H / stride, W / stride).

    Every output channel's kernel is brought to mean 0 and variance 1 before it is used: its scale and its
    offset then teach nothing, and GroupNorm follows anyway. 1e-8 is timm's epsilon, added to the variance.
    BiT adds 1e-10, the hybrid's authors 1e-5 to the standard deviation: measured on r50_vit_b16 with random weights
    and logits of standard deviation 1.4, this changes a logit by at most 5e-5 and 6e-4.
    """

    def __init__(self, inputs, outputs, size, stride=1, same=False):
        super().__init__(inputs, outputs, size, stride, bias=False)
        self.before, self.after = borders(size, stride, same)

    def forward(self, x):
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        kernel = (self.weight - mean) / (variance + 1e-8).sqrt()  # (C', C, size, size)
        if self.before != self.after:
            x = F.pad(x, (self.before, self.after) * 2)
            return F.conv2d(x, kernel, stride=self.stride)
        return F.conv2d(x, kernel, stride=self.stride, padding=self.before)


def group_norm(channels):
    """GroupNorm; BiT's narrowest, of 64 channels, has two in a group, and no group here has fewer."""
    return nn.GroupNorm(min(GROUPS, channels // 2), channels)


class PreBottleneck(nn.Module):
    """The bottleneck of ResNet-v2 (He et al. 2016): GroupNorm and ReLU before each convolution.

    (B, inputs, H, W) -> (B, outputs, H / stride, W / stride). Nothing stands on the residual path, as in ViT's
    blocks; where the shape changes, a 1x1 convolution does. The stride is that of the 3x3 convolution.
    """

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        inner = outputs // 4
        self.norm1 = group_norm(inputs)
        self.conv1 = StdConv(inputs, inner, 1)
        self.norm2 = group_norm(inner)
        self.conv2 = StdConv(inner, inner, 3, stride)
        self.norm3 = group_norm(inner)
        self.conv3 = StdConv(inner, outputs, 1)
        if inputs != outputs:
            self.downsample = nn.Sequential(OrderedDict(conv=StdConv(inputs, outputs, 1, stride)))

    def forward(self, x):
        h = F.relu(self.norm1(x))
        residual = self.downsample(h) if hasattr(self, "downsample") else x
        h = F.relu(self.norm2(self.conv1(h)))
        h = F.relu(self.norm3(self.conv2(h)))
        return self.conv3(h) + residual


class PostBottleneck(nn.Module):
    """The bottleneck of the hybrid: GroupNorm after each convolution, ReLU after the sum too; else as the other.

    The branch starts at zero, for so does the scale of its last GroupNorm.
    """

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        inner = outputs // 4
        self.conv1 = StdConv(inputs, inner, 1)
        self.norm1 = group_norm(inner)
        self.conv2 = StdConv(inner, inner, 3, stride, same=True)
        self.norm2 = group_norm(inner)
        self.conv3 = StdConv(inner, outputs, 1)
        self.norm3 = group_norm(outputs)
        nn.init.zeros_(self.norm3.weight)
        if inputs != outputs:
            projection = OrderedDict(conv=StdConv(inputs, outputs, 1, stride), norm=group_norm(outputs))
            self.downsample = nn.Sequential(projection)

    def forward(self, x):
        residual = self.downsample(x) if hasattr(self, "downsample") else x
        h = F.relu(self.norm1(self.conv1(x)))
        h = F.relu(self.norm2(self.conv2(h)))
        return F.relu(self.norm3(self.conv3(h)) + residual)


def make_stem(in_chans, channels, same, norm, small):
    """A 7x7 convolution and max pooling, each of stride 2: (B, C, H, W) -> (B, channels, H / 4, W / 4).

    small: a 3x3 convolution of stride 2 alone, to (B, channels, H / 2, W / 2).
    """
    parts = OrderedDict(conv=StdConv(in_chans, channels, 3 if small else 7, 2, same))
    if norm:
        parts |= dict(norm=group_norm(channels), act=nn.ReLU())
    if not small:
        parts |= dict(pad=nn.ZeroPad2d(borders(3, 2, same) * 2), pool=nn.MaxPool2d(3, 2))
    return nn.Sequential(parts)


def make_stages(bottleneck, depths, inputs):
    """Stages of bottlenecks: 4 * inputs channels, and from stage to stage half the sides and twice the channels."""
    stages, first = nn.Sequential(), 4 * inputs
    for i, depth in enumerate(depths):
        outputs, blocks = first * 2**i, nn.Sequential()
        for j in range(depth):
            blocks.append(bottleneck(inputs, outputs, 2 if i and not j else 1))
            inputs = outputs
        stages.append(nn.Sequential(OrderedDict(blocks=blocks)))
    return stages


class Backbone(nn.Module):
    """The hybrid's ResNet: images (B, C, H, W) -> features (B, channels, H / stride, W / stride).

    depths: bottlenecks of each stage. The ViT paper moves the blocks of R50's fourth stage to the third, (3, 4, 9):
    stride 16, and as many patches of one feature pixel as ViT-B/16 has. With () the stem is all there is, stride 4.
    small: half the stride and a quarter of the channels, see `ResNet`.
    """

    def __init__(self, in_chans, depths, small=False):
        super().__init__()
        channels = SMALL_STEM if small else STEM
        self.stem = make_stem(in_chans, channels, same=True, norm=True, small=small)
        self.stages = make_stages(PostBottleneck, depths, channels)
        self.stride = (2 if small else 4) * 2 ** max(0, len(depths) - 1)
        self.channels = 4 * channels * 2 ** (len(depths) - 1) if depths else channels

    def forward(self, images):
        return self.stages(self.stem(images))


class HybridEmbed(vit.PatchEmbed):
    """The hybrid's patch embedding: images -> features -> patches of the features -> tokens (B, N, D).

    patch_size  stays the number of image pixels that a patch stands for: with stride 16 and 16 pixels, as in
                R50+ViT-B/16, it is one pixel of the features
    depths      bottlenecks of each stage, see `Backbone`, and small

    Raises ValueError if the stride of the features does not divide the patch size.
    """

    def __init__(self, patch_size, in_chans, dim, depths, small=False):
        nn.Module.__init__(self)  # PatchEmbed's would list, and draw, E before the ResNet
        self.backbone = Backbone(in_chans, depths, small)
        side, rest = divmod(patch_size, self.backbone.stride)
        if rest:
            wrong = f"patches of {patch_size} pixels do not fit features of stride {self.backbone.stride}"
            raise ValueError(f"{wrong}; use a multiple of {self.backbone.stride}")
        self.proj = nn.Conv2d(self.backbone.channels, dim, kernel_size=side, stride=side)

    def cut(self, images):
        """images (B, C, H, W) -> patches of their features (B, N, side * side * channels)."""
        return super().cut(self.backbone(images))


class ResNet(nn.Module):
    """BiT's ResNet-v2, the baseline of ViT's figures 3 to 5: images (B, C, H, W) -> logits (B, classes).

    depths, width   bottlenecks of each stage; a factor on all channels
    num_classes     0 leaves the head out: the output is then the representation y (B, 2048 * width)
    small           ours, for images of 28 to 64 pixels: a quarter of the channels, a stem that halves the sides once

    Images may have any size. The head starts at zero.
    """

    def __init__(self, in_chans=3, num_classes=1000, depths=(3, 4, 6, 3), width=1, small=False):
        super().__init__()
        channels = (SMALL_STEM if small else STEM) * width
        self.dim = 4 * channels * 2 ** (len(depths) - 1)
        self.stem = make_stem(in_chans, channels, same=False, norm=False, small=small)
        self.stages = make_stages(PreBottleneck, depths, channels)
        self.norm = group_norm(self.dim)
        self.head = nn.Linear(self.dim, num_classes) if num_classes else nn.Identity()
        if num_classes:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def represent(self, images):
        """The image representation y (B, D): the mean over the places of the last features."""
        return F.relu(self.norm(self.stages(self.stem(images)))).mean(dim=(2, 3))

    def forward(self, images):
        return self.head(self.represent(images))


# resnet50, resnet50x2, …: the number of layers, and the width unless it is 1.
DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}
RESNETS = {
    f"resnet{layers}" + f"x{width}" * (width > 1): dict(depths=depths, width=width)
    for layers, depths in DEPTHS.items()
    for width in (1, 2, 3, 4)
}
# The hybrids: R50 as in the paper, with its fourth stage or, for patches of 16, with its blocks in the third;
# R26 and the stem alone as in the authors' code (theirs is called R+ViT-Ti/16, with patches of 32 pixels nonetheless).
HYBRIDS = {
    f"{name}_vit_{size}{patch}": vit.ARCHS[f"vit_{size}{patch}"] | dict(backbone=depths)
    for size in vit.SIZES
    for name, patch, depths in (("r50", 16, (3, 4, 9)), ("r50", 32, (3, 4, 6, 3)), ("r26", 32, (2, 2, 2, 2)))
}
HYBRIDS["r_vit_ti16"] = vit.ARCHS["vit_ti32"] | dict(backbone=())
# Ours, to be compared with vit_micro4: about as many parameters and operations for images of 28 pixels.
RESNETS["resnet_micro"] = dict(depths=(3, 6, 2), small=True)
HYBRIDS["r_vit_micro4"] = vit.ARCHS["vit_micro4"] | dict(depth=5, backbone=(1, 1), small=True)
ARCHS = RESNETS | HYBRIDS


def create(arch, img_size=224, num_classes=1000, in_chans=3, **options):
    """Build a model by its name in `ARCHS`: `resnet50` is R50x1, `r50_vit_b16` is R50+ViT-B/16.

    options: any argument of `ResNet`, which takes images of any size; or, of a hybrid, any argument of `vit.ViT` and
    backbone, the bottlenecks of each stage. They win over the variant's own. Raises ValueError for an unknown name.
    """
    if arch not in ARCHS:
        near = difflib.get_close_matches(arch, ARCHS, n=1, cutoff=0)[0]
        raise ValueError(f"unknown arch {arch!r}; did you mean {near}? There are {', '.join(ARCHS)}")
    options = ARCHS[arch] | options
    if arch in RESNETS:
        return ResNet(in_chans, num_classes, **options)
    backbone = options.pop("backbone"), options.pop("small", False)
    embed = HybridEmbed(options["patch_size"], in_chans, options["dim"], *backbone)
    return vit.ViT(img_size, num_classes=num_classes, patch_embed=embed, **options)
