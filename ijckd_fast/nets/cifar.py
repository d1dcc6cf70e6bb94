"""Nets for small images (CIFAR: 32x32 pixels), in the forms that the published distillation tables use.

They are written from their papers. Layer names and shapes are those of the checkpoints that the CRD and SimKD toolboxes
publish, which therefore load. Where a toolbox departs from a paper (an activation more, a stem of another size) the net
follows the toolbox, and says so.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijckd_fast.nets.pointwise import thinned


def init_convs(net: nn.Module) -> None:
    """Draws every convolution's weight from N(0, 2 / fan_out), and sets its bias to 0; He et al. 2015."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _classifier(channels: int, num_classes: int) -> nn.Linear:
    """With the first weights that the toolboxes give VGG and MobileNetV2."""
    linear = nn.Linear(channels, num_classes)
    nn.init.normal_(linear.weight, 0, 0.01)
    nn.init.zeros_(linear.bias)
    return linear


# ----------------------------------------------------------------------------------------------------------------------
# ResNet (He et al. 2016)


class _BasicBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:  # [B, Cin, H, W] -> [B, C, H/stride, W/stride]
        # Positions are left out before the 1x1 convolution, not by its stride: see pointwise.py.
        shortcut = x if self.downsample is None else self.downsample(thinned(x, (self.stride, self.stride)))
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class SmallResNet(nn.Module):
    """ResNet for 32x32 images: depth 6n+2, three stages of n basic blocks, 16/32/64 channels times `width`.

    The stem has 16 channels, and 32 from width 4 on, as the published resnet20, resnet38x2 and resnet8x4 have; below
    width 1 it has 16 sqrt(width).
    """

    def __init__(self, depth: int, width: float, num_classes: int) -> None:
        super().__init__()
        stem = 32 if width >= 4 else min(16, max(1, round(16 * math.sqrt(width))))
        stages = [max(1, round(c * width)) for c in (16, 32, 64)]
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = self._stage(stem, stages[0], blocks, 1)
        self.layer2 = self._stage(stages[0], stages[1], blocks, 2)
        self.layer3 = self._stage(stages[1], stages[2], blocks, 2)
        self.fc = nn.Linear(stages[2], num_classes)
        init_convs(self)

    @staticmethod
    def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = _BasicBlock(channels_in, channels, stride)
        return nn.Sequential(first, *(_BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, K]
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))  # [B, C, S/4, S/4]
        return self.fc(x.mean((2, 3)))


class _Bottleneck(nn.Module):
    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        channels = 4 * width
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:  # [B, Cin, H, W] -> [B, 4 width, H/stride, W/stride]
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x), inplace=True)


class SmallResNet50(nn.Module):
    """ResNet-50 for 32x32 images: a 3x3 stem of stride 1 and no max-pooling in front of ImageNet's four stages."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = self._stage(64, 64, 3, 1)
        self.layer2 = self._stage(256, 128, 4, 2)
        self.layer3 = self._stage(512, 256, 6, 2)
        self.layer4 = self._stage(1024, 512, 3, 2)
        self.linear = nn.Linear(2048, num_classes)
        init_convs(self)

    @staticmethod
    def _stage(channels_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        first = _Bottleneck(channels_in, width, stride)
        return nn.Sequential(first, *(_Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, K]
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [B, 2048, S/8, S/8]
        return self.linear(x.mean((2, 3)))


# ----------------------------------------------------------------------------------------------------------------------
# Wide ResNet (Zagoruyko and Komodakis 2016)


class _PreActivationBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.convShortcut = None if channels_in == channels else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, Cin, H, W] -> [B, C, H/stride, W/stride]
        y = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        y = F.relu(self.bn2(self.conv1(y)), inplace=True)
        return self.conv2(y) + shortcut


class WideResNet(nn.Module):
    """WRN-depth-width: a stem of 16 channels, three stages of n pre-activation blocks, 16/32/64 channels times `width`.

    depth  6n + 4
    """

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = self._stage(16, 16 * width, blocks, 1)
        self.block2 = self._stage(16 * width, 32 * width, blocks, 2)
        self.block3 = self._stage(32 * width, 64 * width, blocks, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU(inplace=True)  # a layer, so that the map after it can be tapped
        self.fc = nn.Linear(64 * width, num_classes)
        init_convs(self)
        nn.init.zeros_(self.fc.bias)

    @staticmethod
    def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = _PreActivationBlock(channels_in, channels, stride)
        rest = (_PreActivationBlock(channels, channels, 1) for _ in range(blocks - 1))
        return nn.Sequential(OrderedDict(layer=nn.Sequential(first, *rest)))

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, K]
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        x = self.relu(self.bn1(x))  # [B, C, S/4, S/4]
        return self.fc(x.mean((2, 3)))


# ----------------------------------------------------------------------------------------------------------------------
# VGG (Simonyan and Zisserman 2015) with BatchNorm

VGG_CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class SmallVGG(nn.Module):
    """VGG with BatchNorm for 32x32 images: five stages, max-pooling after the first three, the mean, one linear layer.

    depth  8, 11, 13, 16 or 19; 8 is the toolboxes' own, with one convolution in each stage
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        convolutions = VGG_CONVOLUTIONS[depth]
        self.block0 = self._stage(3, 64, convolutions[0])
        self.block1 = self._stage(64, 128, convolutions[1])
        self.block2 = self._stage(128, 256, convolutions[2])
        self.block3 = self._stage(256, 512, convolutions[3])
        self.block4 = self._stage(512, 512, convolutions[4])
        init_convs(self)
        self.classifier = _classifier(512, num_classes)

    @staticmethod
    def _stage(channels_in: int, channels: int, convolutions: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for _ in range(convolutions):
            layers += [
                nn.Conv2d(channels_in, channels, 3, padding=1),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
            channels_in = channels
        return nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, K]
        x = images
        for stage in (self.block0, self.block1, self.block2):
            x = F.max_pool2d(stage(x), 2)
        x = self.block4(self.block3(x))  # [B, 512, S/8, S/8]
        return self.classifier(x.mean((2, 3)))


# ----------------------------------------------------------------------------------------------------------------------
# MobileNetV2 (Sandler et al. 2018)


class _InvertedResidual(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = channels_in * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(channels_in, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.adds = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:  # [B, Cin, H, W] -> [B, C, H/stride, W/stride]
        return x + self.conv(x) if self.adds else self.conv(x)


class SmallMobileNetV2(nn.Module):
    """MobileNetV2 for 32x32 images: stride 16 instead of 32, since the second stage keeps the map's size.

    width  every number of channels is multiplied by it and rounded down; the last convolution's 1280 only grows

    As in the toolboxes and not in the paper: ReLU instead of ReLU6, and an expanding convolution also where the
    factor is 1.
    """

    def __init__(self, width: float, num_classes: int) -> None:
        super().__init__()
        channels = max(1, int(32 * width))
        last = int(1280 * max(1.0, width))
        self.conv1 = self._conv(3, channels, 3, 2)
        self.blocks = nn.Sequential()
        stages = (
            (1, 16, 1, 1),
            (6, 24, 2, 1),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        for expansion, width_1, repeats, first_stride in stages:
            stage = nn.Sequential()
            for i in range(repeats):
                out = max(1, int(width_1 * width))
                stage.append(_InvertedResidual(channels, out, first_stride if i == 0 else 1, expansion))
                channels = out
            self.blocks.append(stage)
        self.conv2 = self._conv(channels, last, 1, 1)
        init_convs(self)
        self.classifier = nn.Sequential(_classifier(last, num_classes))

    @staticmethod
    def _conv(channels_in: int, channels: int, kernel: int, stride: int) -> nn.Sequential:
        conv = nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, K]
        x = self.conv2(self.blocks(self.conv1(images)))  # [B, C, S/16, S/16]
        return self.classifier(x.mean((2, 3)))


# ----------------------------------------------------------------------------------------------------------------------
# ShuffleNet (Zhang et al. 2018) and ShuffleNetV2 (Ma et al. 2018)


class _ShuffleUnit(nn.Module):
    """ShuffleNet's unit. `channels` counts what comes out; of stride 2 the input, pooled, is part of it."""

    def __init__(self, channels_in: int, channels: int, stride: int, groups_in: int, groups: int) -> None:
        super().__init__()
        made = channels - channels_in if stride == 2 else channels
        width = made // 4
        self.stride = stride
        self.groups_in = groups_in
        self.conv1 = nn.Conv2d(channels_in, width, 1, groups=groups_in, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, made, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(made)

    def forward(self, x: Tensor) -> Tensor:  # [B, Cin, H, W] -> [B, C, H/stride, W/stride]
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.channel_shuffle(y, self.groups_in)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        if self.stride == 2:
            return F.relu(torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1), inplace=True)
        return F.relu(x + y, inplace=True)


class SmallShuffleNetV1(nn.Module):
    """ShuffleNet of 3 groups and width 1 for 32x32 images: a 1x1 stem of stride 1, no max-pooling.

    As in the toolboxes and not in the paper: a ReLU after the depthwise convolution too, and in the units of stride 2 a
    quarter of the channels that they make themselves between the convolutions, not of all that come out.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = self._stage(24, 240, 4, groups_in=1)
        self.layer2 = self._stage(240, 480, 8, groups_in=3)
        self.layer3 = self._stage(480, 960, 4, groups_in=3)
        self.linear = nn.Linear(960, num_classes)

    @staticmethod
    def _stage(channels_in: int, channels: int, units: int, groups_in: int) -> nn.Sequential:
        first = _ShuffleUnit(channels_in, channels, 2, groups_in, 3)
        return nn.Sequential(first, *(_ShuffleUnit(channels, channels, 1, 3, 3) for _ in range(units - 1)))

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, K]
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))  # [B, 960, S/8, S/8]
        return self.linear(x.mean((2, 3)))


class _ShuffleUnitV2(nn.Module):
    """Half of the channels pass, the others go through three convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> the same
        passed, y = x.chunk(2, 1)
        y = F.relu(self.bn1(self.conv1(y)), inplace=True)
        y = self.bn2(self.conv2(y))
        y = F.relu(self.bn3(self.conv3(y)), inplace=True)
        return F.channel_shuffle(torch.cat([passed, y], 1), 2)


class _ShuffleDownV2(nn.Module):
    """Two branches of stride 2, each of which makes half of the channels."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(channels_in, channels_in, 3, 2, 1, groups=channels_in, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv2 = nn.Conv2d(channels_in, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(channels_in, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:  # [B, Cin, H, W] -> [B, C, H/2, W/2]
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)), inplace=True)
        return F.channel_shuffle(torch.cat([left, right], 1), 2)


SHUFFLE_V2_CHANNELS = {0.5: (48, 96, 192), 1.0: (116, 232, 464), 1.5: (176, 352, 704)}


class SmallShuffleNetV2(nn.Module):
    """ShuffleNetV2 for 32x32 images: a 1x1 stem of stride 1, no max-pooling.

    width  0.5, 1 or 1.5, of the paper's table
    """

    def __init__(self, width: float, num_classes: int) -> None:
        super().__init__()
        channels = SHUFFLE_V2_CHANNELS[width]
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = self._stage(24, channels[0], 4)
        self.layer2 = self._stage(channels[0], channels[1], 8)
        self.layer3 = self._stage(channels[1], channels[2], 4)
        self.conv2 = nn.Conv2d(channels[2], 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.relu = nn.ReLU(inplace=True)  # a layer, so that the map after it can be tapped
        self.linear = nn.Linear(1024, num_classes)

    @staticmethod
    def _stage(channels_in: int, channels: int, units: int) -> nn.Sequential:
        return nn.Sequential(
            _ShuffleDownV2(channels_in, channels), *(_ShuffleUnitV2(channels) for _ in range(units - 1))
        )

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, K]
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))  # [B, C, S/8, S/8]
        x = self.relu(self.bn2(self.conv2(x)))  # [B, 1024, S/8, S/8]
        return self.linear(x.mean((2, 3)))
