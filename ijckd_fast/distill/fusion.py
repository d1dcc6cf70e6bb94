"""Maps of several stages fused from the deepest up: the modules that ReviewKD trains beside the student."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fusion(nn.Module):
    """One level: a 1x1 convolution to `width` channels, what comes from the deeper level mixed in, a 3x3 convolution.

    Both convolutions without bias, each with BatchNorm; the mixture weighs both maps position by position, by a 1x1
    convolution of the two and a sigmoid. First weights of the convolutions as ReviewKD has them.

    channels, channels_t  of the student's map and of the teacher's
    """

    def __init__(self, channels: int, channels_t: int, width: int, *, deepest: bool) -> None:
        super().__init__()
        narrow = nn.Conv2d(channels, width, 1, bias=False)
        wide = nn.Conv2d(width, channels_t, 3, padding=1, bias=False)
        for convolution in (narrow, wide):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.squeeze = nn.Sequential(narrow, nn.BatchNorm2d(width))
        self.expand = nn.Sequential(wide, nn.BatchNorm2d(channels_t))
        self.shares = None if deepest else nn.Conv2d(2 * width, 2, 1)

    def forward(self, x: Tensor, deeper: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Student's map x [B, C, H, W], deeper level's fused map [B, width, h, w] -> (made [B, Ct, H, W], fused)."""
        fused = self.squeeze(x)  # [B, width, H, W]
        if self.shares is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, fused.shape[2:], mode="nearest")
            shares = self.shares(torch.cat([fused, deeper], 1)).sigmoid()  # [B, 2, H, W]
            fused = fused * shares[:, :1] + deeper * shares[:, 1:]
        return self.expand(fused), fused


class Fusions(nn.ModuleList):
    """A Fusion for each level, the deepest first.

    channels  (the student's, the teacher's) of each
    """

    def __init__(self, channels: Sequence[tuple[int, int]], width: int) -> None:
        super().__init__(Fusion(*each, width, deepest=i == 0) for i, each in enumerate(channels))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The student's maps [B, C, H, W], the deepest first -> those to compare with the teacher's, in that order."""
        made, fused = [], None
        for fusion, x in zip(self, maps, strict=True):
            out, fused = fusion(x, fused)
            made.append(out)
        return made
