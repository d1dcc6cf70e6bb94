"""Maps and logits made comparable: of the same size, and at least in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def full(x: Tensor) -> Tensor:
    """x in at least float32: losses are not formed in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def smaller(size: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    """The smaller height and the smaller width of two sizes (H, W)."""
    return min(size[0], other[0]), min(size[1], other[1])


def pool_to(map_: Tensor, size: tuple[int, int]) -> Tensor:
    """map_ [B, C, H, W] average-pooled to [B, C, *size]; as it is where it has that size."""
    return map_ if tuple(map_.shape[2:]) == size else F.adaptive_avg_pool2d(map_, size)


def equal_sizes(map_: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps [B, C, H, W] at the smaller of their sizes: SimKD's rule for maps of unequal size."""
    size = smaller(map_.shape[2:], other.shape[2:])
    return pool_to(map_, size), pool_to(other, size)
