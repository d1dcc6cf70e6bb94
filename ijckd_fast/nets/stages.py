"""A net's stages: where its maps of each size are taken, found in one run or named."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijckd_fast.errors import UserError, did_you_mean


class Stage(NamedTuple):
    """Where a net's map of one size is taken: the output of layer `path`.

    channels, side  of the map [B, channels, side, side], for the images of the probe
    """

    path: str
    channels: int
    side: int


class Tap(NamedTuple):
    """Which tensor a map is.

    path, item  the layer that puts it out, and its number among the tensors of that output (a tuple's, a dict's)
    nhwc        whether it is [B, H, W, C], else [B, C, H, W]
    relu        whether a ReLU by a function follows, which belongs to the map
    copied      whether it must be kept apart, since a later layer writes into it
    prefix      of tokens [B, prefix + H*W, C], a square grid row by row, how many come before it; None: no tokens
    """

    path: str
    item: int = 0
    nhwc: bool = False
    relu: bool = False
    copied: bool = False
    prefix: int | None = None

    def tensor_of(self, output: Any) -> Tensor:
        """The tensor, of what the layer put out."""
        made = tensor_at(output, self.item)
        return made.clone() if self.copied else made

    def map_of(self, made: Tensor) -> Tensor:
        """The map [B, C, H, W], of the tensor."""
        if self.prefix is not None:
            side = math.isqrt(made.shape[1] - self.prefix)
            made = made[:, self.prefix :].unflatten(1, (side, side))  # [B, H, W, C]
        if self.nhwc:
            made = made.permute(0, 3, 1, 2)
        return F.relu(made) if self.relu else made


class Call(NamedTuple):
    """A layer that put out a map: the tensor number `item` of its output, of shape `made`.

    given   shape of the first map among its inputs, or None
    prefix  where the maps are grids of tokens, as [B, H, W, C]: how many tokens come before; else None
    """

    path: str
    module: nn.Module
    given: torch.Size | None
    made: torch.Size
    item: int
    prefix: int | None = None


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in tensors, tuples, lists and dicts, however nested, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [x for part in value for x in tensors_in(part)] if isinstance(value, (tuple, list)) else []


def tensor_at(value: Any, item: int) -> Tensor:
    """The tensor of that number in `tensors_in(value)`."""
    return value if isinstance(value, Tensor) else tensors_in(value)[item]


def first_map(value: Any, batch: int) -> tuple[int, Tensor] | None:
    """(number, tensor) of the first of the tensors in `value` that has four dimensions and the batch's size."""
    found = ((i, x) for i, x in enumerate(tensors_in(value)) if x.dim() == 4 and x.shape[0] == batch)
    return next(found, None)


class _Square(NamedTuple):
    """The size of a square map, and its layout."""

    side: int
    nhwc: bool


def _square(shape: torch.Size | None, nhwc: bool) -> _Square | None:
    """Of a tensor with four dimensions; where both layouts fit, nhwc says which. None for one that is not square."""
    if shape is None:
        return None
    layouts = [_Square(shape[1], True)] * (shape[1] == shape[2]) + [_Square(shape[2], False)] * (shape[2] == shape[3])
    return next((square for square in layouts if square.nhwc == nhwc), layouts[0] if layouts else None)


class Found(NamedTuple):
    """A stage, and which tensor its map is."""

    stage: Stage
    tap: Tap


def find_stages(calls: Sequence[Call], map_: Found) -> tuple[Found, ...]:
    """The stages of a net, as `Tapped` describes them, of which `map_` is the last.

    calls  of its layers, in the order in which they ended
    """
    nhwc = map_.tap.nhwc
    squares = [(call, square) for call in calls if (square := _square(call.made, nhwc)) is not None]
    last = {call.path: i for i, (call, _) in enumerate(squares)}
    if map_.tap.path not in last:  # tokens of a net that has no map of any other layer to tell their grid by
        return (map_,)
    end = last[map_.tap.path]
    sides = _falling([square.side for _, square in squares[: end + 1]])
    stages = [map_]
    for smaller, size in itertools.pairwise(reversed(sides)):
        passages = tuple(
            f"{call.path}."
            for call, square in squares
            if type(call.module) is not nn.Sequential and square.side == smaller and _side(call.given, nhwc) == size
        )
        own = [
            i
            for i, (call, square) in enumerate(squares[:end])
            if square.side == size and last[call.path] == i and not call.path.startswith(passages)
        ]
        layers = {m for i in own for m in squares[i][0].module.modules() if _has_matrix(m)}
        is_stem = size == sides[0] and len(layers) == 1
        if own and not is_stem:
            stages.append(_found(*squares[own[-1]]))
            end = own[-1]  # what comes before has larger maps
    return tuple(reversed(stages))


def _falling(sides: Sequence[int]) -> list[int]:
    """The sizes that maps have on their way through a net, from the largest to the smallest, of all that layers put
    out, in order: those of the longest run from the first to the last that never grows. What is made of the maps aside
    is left out, be it smaller (pooled for a gate) or larger (scores of attention).
    """
    longest: dict[int, tuple[int, int]] = {}  # of the runs that end with a size: how many there are, the last one
    before: list[int | None] = []
    for i, side in enumerate(sides):
        length, previous = max((run for larger, run in longest.items() if larger >= side), default=(0, None))
        before.append(previous)
        if i == 0 or previous is not None:  # else larger than the first
            longest[side] = (length + 1, i)
    run = []
    at: int | None = len(sides) - 1
    while at is not None:
        run.append(sides[at])
        at = before[at]
    return list(dict.fromkeys(reversed(run)))


def _has_matrix(module: nn.Module) -> bool:
    """Whether it is a convolution, a linear layer or the like."""
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def _side(shape: torch.Size | None, nhwc: bool) -> int | None:
    square = _square(shape, nhwc)
    return None if square is None else square.side


def _found(call: Call, square: _Square) -> Found:
    channels = call.made[3 if square.nhwc else 1]
    tap = Tap(call.path, call.item, square.nhwc, prefix=call.prefix)
    return Found(Stage(call.path, channels, square.side), tap)


def named_stages(
    names: Sequence[str], calls: Sequence[Call], overwritten: Collection[str], net: nn.Module, model: str
) -> tuple[Found, ...]:
    """The stages at the outputs of these layers of `net`, which is `model`; calls as for `find_stages`.

    overwritten  of the layers, those into whose output a later one writes (a ReLU in place)
    raises  UserError for a name that is no layer's, or is given twice; for a layer that is not called or puts out no
            square map; for another order than that of the net; for a map that is larger than the one before
    """
    layers = dict(net.named_modules())
    last = {call.path: i for i, call in enumerate(calls)}
    stages = []
    for name in names:
        if name not in layers or not name:
            raise UserError(
                f"model {model!r} has no layer {name!r}, expected names of its layers as stages"
                f"{did_you_mean(name, [known for known in layers if known])}"
            )
        call = calls[last[name]] if name in last else None
        square = None if call is None else _square(call.made, nhwc=call.prefix is not None)
        if call is None or square is None:
            raise UserError(
                f"layer {name!r} of model {model!r} puts out no map [B, C, H, H] (or [B, H, H, C], or tokens of a"
                f" grid) when it sees images, expected one of each stage: name another layer, such as"
                f" {_examples(calls)}"
            )
        stage, tap = _found(call, square)
        stages.append(Found(stage, tap._replace(copied=name in overwritten)))
    if len(set(names)) < len(names):
        raise UserError(f"stages {','.join(names)} of model {model!r}: a layer is named twice, expected each once")
    in_order = sorted(names, key=lambda name: last[name])
    if in_order != list(names):
        raise UserError(
            f"stages {','.join(names)} of model {model!r} are in another order than the net computes them, expected"
            f" {','.join(in_order)}"
        )
    for (larger, _), (smaller, _) in itertools.pairwise(stages):
        if smaller.side > larger.side:
            raise UserError(
                f"stages {','.join(names)} of model {model!r}: the map of {smaller.path!r} is {smaller.side} pixels"
                f" wide, that of {larger.path!r} before it {larger.side}, expected maps that never grow: leave one out"
            )
    return tuple(stages)


def _examples(calls: Sequence[Call]) -> str:
    """A few layers with maps, the outermost ones."""
    paths = [call.path for call in calls if call.path and _square(call.made, nhwc=False) is not None]
    depth = min(path.count(".") for path in paths) if paths else 0
    return ", ".join(map(repr, [path for path in dict.fromkeys(paths) if path.count(".") == depth][:4]))
