"""What a net does to its pooled vector before its classifier: a norm, a layer and an activation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn


class TailLayer(NamedTuple):
    """A layer of a net by its path, and the shape without the batch that it takes vectors in: (C,), (C, 1, 1), ..."""

    path: str
    shape: tuple[int, ...]


class Tail(NamedTuple):
    """The layers t between pooling and classifier, one after the other: pooled = t(mean(map)).

    The mean of t over the positions of the map is not t of the mean, unless t is affine. What is offered as the map is
    therefore t at every position, moved by one vector per image such that its mean is what the classifier sees:
    t(map) - mean(t(map)) + t(mean(map)).
    """

    layers: tuple[TailLayer, ...]

    def of_vectors(self, net: nn.Module, x: Tensor) -> Tensor:
        """[n, C] -> [n, C']"""
        for path, shape in self.layers:
            x = net.get_submodule(path)(x.reshape(len(x), *shape)).flatten(1)
        return x

    def of_map(self, net: nn.Module, map_: Tensor) -> Tensor:
        """[B, C, H, W], as it is before pooling -> [B, C', H, W] whose mean is t(mean(map_)).

        The layers run in eval mode also while the net is trained: a BatchNorm among them takes its running statistics,
        which positions are no samples for, and dropout is off, as it is of any map.
        """
        batch, channels, height, width = map_.shape
        positions = map_.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).view(-1, channels)
        with self._settled(net):
            made = self.of_vectors(net, positions)  # [B H W, C']
            pooled = self.of_vectors(net, map_.mean((2, 3)))  # [B, C']
        made = made.view(batch, height * width, -1)
        made = made + (pooled - made.mean(1)).unsqueeze(1)
        return made.view(batch, height, width, -1).permute(0, 3, 1, 2)

    @contextlib.contextmanager
    def _settled(self, net: nn.Module) -> Iterator[None]:
        training = [m for path, _ in self.layers for m in net.get_submodule(path).modules() if m.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
