"""What a net costs: its parameters and its multiply-accumulates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ijckd_fast.nets.tapped import Tapped


def count_parameters(module: nn.Module) -> int:
    """Number of parameters (BatchNorm's affine ones included, running statistics not)."""
    return sum(p.numel() for p in module.parameters())


def macs(module: nn.Module, image_size: int) -> int:
    """Multiply-accumulates of one image [1, 3, image_size, image_size] in convolutions and linear layers."""
    parameter = next(module.parameters())
    return count_macs(module, parameter.new_zeros(1, 3, image_size, image_size))


@torch.no_grad()
def count_macs(module: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of `module(x)` in convolutions and linear layers, by one eval-mode forward.

    Products that are no layer of their own (attention scores, element-wise scaling) are not counted. torch's
    FlopCounterMode counts attention too, but only where the device's kernel for it is in its table, so its figure of a
    transformer depends on the device.
    """
    total = 0

    def count(layer: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += output.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            total += output.numel() * layer.in_features

    modes = {m: m.training for m in module.modules()}
    layers = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [m.register_forward_hook(count) for m in layers]
    try:
        module.eval()(x)
    finally:
        for m, mode in modes.items():
            m.training = mode
        for handle in handles:
            handle.remove()
    return total


class Backbone(nn.Module):
    """A net without its classifier, as what is counted: images [B, 3, S, S] -> its pooled vector and, where asked for,
    its map, which costs layers of its own if there are some between pooling and classifier.
    """

    def __init__(self, model: Tapped, need_map: bool) -> None:
        super().__init__()
        self.net = model.net
        self._features = model.features
        self._need_map = need_map

    def forward(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        return self._features(images, self._need_map)
