"""Tokens that form a grid: [B, P + H*W, C], P tokens of another kind (class, registers) before H*W positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ijckd_fast.nets.stages import Call, tensors_in

_MOST_BEFORE = 16  # tokens before the grid: a class token, a distillation token, registers


class Grids:
    """Tells, while a net runs, which of its tokens form a grid: as many as a map had positions that it made before."""

    def __init__(self) -> None:
        self._sides: set[int] = set()

    def saw(self, map_: Tensor) -> None:
        """map_: [B, C, H, W] or [B, H, W, C]"""
        self._sides |= {a for a, b in (map_.shape[1:3], map_.shape[2:4]) if a == b > 1}

    def before(self, tokens: int) -> int | None:
        """How many of so many tokens come before the grid; None where they form none. Where no such map was seen, all
        of them are a grid, or all but the first.
        """
        sides = [side for side in self._sides if 0 <= tokens - side**2 <= _MOST_BEFORE]
        if sides:
            return tokens - max(sides) ** 2
        return next((before for before in possible_before(tokens) if before <= 1), None)

    def call_of(self, path: str, layer: nn.Module, given: Any, made: Any, batch: int) -> Call | None:
        """The call of a layer that puts out such tokens; its shapes are those of maps [B, H, W, C]."""
        found = first_tokens(made, batch)
        if found is None or self.before(found[1].shape[1]) is None:
            return None
        tokens = first_tokens(given, batch)
        shape = None if tokens is None else self._map_shape(tokens[1].shape)
        return Call(path, layer, shape, self._map_shape(found[1].shape), found[0], self.before(found[1].shape[1]))

    def _map_shape(self, tokens: torch.Size) -> torch.Size:
        before = self.before(tokens[1])
        side = 0 if before is None else side_of(tokens[1] - before)
        return torch.Size((tokens[0], side, side, tokens[2]))


def possible_before(tokens: int) -> list[int]:
    """Every number of tokens before a grid that may be, of so many."""
    return [n for n in range(min(_MOST_BEFORE, tokens) + 1) if side_of(tokens - n) > 1 and _is_square(tokens - n)]


def _is_square(positions: int) -> bool:
    return side_of(positions) ** 2 == positions


def side_of(positions: int) -> int:
    """Of a square grid with so many positions."""
    return math.isqrt(positions)


def first_tokens(value: Any, batch: int) -> tuple[int, Tensor] | None:
    """(number, tensor) of the first of the tensors in `value` that is [B, N, C] with the batch's size."""
    found = ((i, x) for i, x in enumerate(tensors_in(value)) if x.dim() == 3 and x.shape[0] == batch)
    return next(found, None)
