"""When two tensors count as equal."""

from __future__ import annotations

from torch import Tensor


def same(a: Tensor, b: Tensor) -> bool:
    """Equal up to the order of a float32 sum."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-4 * b.abs().max())
