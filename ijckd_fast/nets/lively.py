"""A net as it will be once it is trained, as far as a look at it can know."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_TINY = 1e-3  # weights that are all smaller are as good as 0: LayerScale begins with 1e-5 or 1e-6
_LOOKED_AT = 1024  # values of a tensor


@contextlib.contextmanager
def lively(net: nn.Module) -> Iterator[None]:
    """Inside, nothing in `net` is the identity, or 0, only because it has not been trained.

    Many layers begin as the identity: norms (statistics 0 and 1, gain 1, shift 0), residual branches whose last gain is
    0, LayerScale, GRN, ReZero, a linear layer that begins as the unit matrix. Whether what the classifier sees is the
    mean of a map cannot be told from such a net. Inside, every floating-point parameter and buffer whose values repeat,
    or are all as good as 0, has random ones; and a norm's untrained statistics are about those of what it is first
    given, so that signals neither grow nor fade in a deep net. What was trained stays as it is: its values do not
    repeat. The net is in eval mode.

    Afterwards every parameter and buffer has its own memory again, to the bit, and every module its mode. torch's
    generator of the CPU is as it was.
    """
    modes = {module: module.training for module in net.modules()}
    draw = torch.Generator().manual_seed(0)
    own: list[tuple[Tensor, Tensor]] = []  # of each tensor that was changed: itself, and its memory
    handles: list[RemovableHandle] = []

    def set_to(tensor: Tensor, values: Tensor) -> None:
        own.append((tensor, tensor.data))
        tensor.data = values.to(tensor.device, tensor.dtype)

    for module in net.modules():
        handles.extend(_settle_when_called(module, set_to, draw))
    for tensor in _untrained(net):
        set_to(tensor, _drawn(tensor.data, draw))
    try:
        with torch.random.fork_rng(devices=[]):
            net.eval()
            yield
    finally:
        modes = dict.fromkeys(net.modules(), modes[net]) | modes  # some may be new, some no longer in the net
        for module, mode in modes.items():
            module.training = mode
        for handle in handles:
            handle.remove()
        for tensor, memory in reversed(own):
            tensor.data = memory


def _untrained(net: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers that are to be drawn, each once."""
    biases = set()  # of layers that are not the identity without them
    for module in net.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, Tensor) and isinstance(bias, Tensor) and weight.dim() > 1:
            biases.add(id(bias))
    for parameter in net.parameters():
        if id(parameter) not in biases and (_repeats(parameter) or _is_tiny(parameter)):
            yield parameter
    for buffer in net.buffers():
        if buffer.numel() > 1 and _repeats(buffer):  # a single number counts something, or is a switch
            yield buffer


def _a_few(tensor: Tensor) -> Tensor:
    """[n], some of its values."""
    values = tensor.detach().flatten()
    return values[:: max(1, len(values) // _LOOKED_AT)]


def _repeats(tensor: Tensor) -> bool:
    """Whether most of its values, of a few of them, are the same as others."""
    if not tensor.is_floating_point() or torch.nn.parameter.is_lazy(tensor) or tensor.numel() == 0:
        return False
    values = _a_few(tensor)
    return len(values.unique()) <= max(1, len(values) // 2)


def _is_tiny(parameter: nn.Parameter) -> bool:
    """Whether all its values, of a few of them, are as good as 0."""
    if torch.nn.parameter.is_lazy(parameter) or parameter.numel() == 0:
        return False
    return bool(_a_few(parameter).abs().max() < _TINY)


def _drawn(values: Tensor, draw: torch.Generator) -> Tensor:
    """What stands for untrained `values`: if all are one number but 0, numbers of its size and sign; else noise about
    what they are. Of values that are not negative, such as variances, none becomes negative.
    """
    first = values.flatten()[0]
    if first.abs() >= _TINY and bool((values == first).all()):
        return values * _uniform(values.shape, draw).to(values)
    fan_in = values[0].numel() if values.dim() > 1 else 1
    noise = torch.randn(values.shape, generator=draw) * min(0.2, fan_in**-0.5)
    drawn = values + noise.to(values)
    return drawn.abs() if bool((values >= 0).all()) else drawn


def _uniform(shape: torch.Size, draw: torch.Generator) -> Tensor:
    """[...] in [0.5, 1.5]"""
    return 0.5 + torch.rand(shape, generator=draw)


def _settle_when_called(
    norm: nn.Module, set_to: Callable[[Tensor, Tensor], None], draw: torch.Generator
) -> Iterator[RemovableHandle]:
    """A hook, if `norm` is a norm with untrained running statistics: its first call sets them to about its input's."""
    mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor) or mean.shape != var.shape or mean.dim() != 1:
        return
    if not (_repeats(mean) and _repeats(var)):
        return

    def settle(norm: nn.Module, args: Any) -> None:
        handle.remove()
        x = args[0] if args else None  # [B, C, ...]
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[1] != len(mean):
            return
        var_x, mean_x = torch.var_mean(x.float(), [d for d in range(x.dim()) if d != 1], correction=0)
        shift = 0.3 * torch.randn(mean.shape, generator=draw).to(mean_x)
        set_to(mean, mean_x + shift * var_x.sqrt())
        set_to(var, var_x * _uniform(var.shape, draw).to(var_x))

    handle = norm.register_forward_pre_hook(settle)
    yield handle
