"""MobileNetV1 for images of ImageNet's size, which torchvision does not have."""

from __future__ import annotations

from torch import Tensor, nn


class MobileNetV1(nn.Module):
    """MobileNetV1 (Howard et al. 2017) at width 1: the student of the published ResNet-50 pair.

    Its first weights are PyTorch's own, as in the published recipes (SRRL, DKD, IJCKD): He's by the fan-out would give
    the depthwise layers 0.41 to 0.08 of that deviation.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers = self._conv(3, 32, 3, 2)
        channels_in = 32
        steps = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
        for channels, stride in steps:
            layers += self._conv(channels_in, channels_in, 3, stride, groups=channels_in)
            layers += self._conv(channels_in, channels, 1, 1)
            channels_in = channels
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(1024, num_classes)

    @staticmethod
    def _conv(channels_in: int, channels: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, K]
        return self.fc(self.features(images).mean((2, 3)))
