"""A way round a fault of oneDNN: convolutions of kernel 1 with a stride and few channels write past their memory.

The gradient of such a layer's weight is made by an oneDNN kernel that writes behind its buffer and so destroys the heap
(oneDNN 3.12 in torch 2.14.1; oneDNN issue 6035). It takes a CPU, channels-last images or weights, no padding, and fewer
channels than a vector register holds: 16 with AVX-512, 8 with AVX2; of a convolution its input's, of a transposed one
its output's. Positions that the stride leaves out are therefore left out before the convolution, which then has no
stride: the same function, in any layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_CHANNELS = 16  # of float32 in the widest vector register


def thinned(x: Tensor, stride: Sequence[int]) -> Tensor:
    """x [..., H, W] at every `stride`-th position, from the first on: a view."""
    every: list[Any] = [slice(None, None, step) for step in stride]
    return x[(..., *every)]


def guard_pointwise(net: nn.Module, called: Sequence[nn.Module] = ()) -> int:
    """Makes, in place, the layers of `net` that the fault concerns compute without a stride where gradients are taken.

    called   modules of which `PointwiseCalls` has seen such a convolution that is no layer, but a function
    returns  how many modules. Each becomes an instance of a subclass of its class; parameters, hooks, names and answers
             stay, as does all that runs on a GPU or without gradients (evaluation, export)
    """
    layers = [
        m for m in net.modules() if isinstance(m, nn.modules.conv._ConvNd) and _concerns(m.weight, m.stride, m.padding)
    ]
    modules = [m for m in dict.fromkeys((*layers, *called)) if not isinstance(m, _Guarded)]
    for module in modules:
        module.__class__ = _guarded(type(module))
    return len(modules)


class PointwiseCalls(TorchDispatchMode):
    """Notes, while a net runs, in which of its modules a convolution is computed that the fault concerns.

    modules  the innermost ones, in order
    """

    def __init__(self) -> None:
        super().__init__()
        self.modules: list[nn.Module] = []
        self._running: list[nn.Module] = []

    @contextlib.contextmanager
    def watching(self, net: nn.Module) -> Iterator[None]:
        """Inside, calls of `net` are watched."""
        handles = []
        for module in net.modules():
            handles.append(module.register_forward_pre_hook(lambda module, _: self._running.append(module)))
            handles.append(module.register_forward_hook(lambda *_: self._left(), always_call=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _left(self) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and self._running:
            _, weight, _, stride, padding = args[:5]
            if _concerns(weight, stride, padding) and self._running[-1] not in self.modules:
                self.modules.append(self._running[-1])
        return func(*args, **(kwargs or {}))


def _concerns(weight: Tensor, stride: Any, padding: Any) -> bool:
    """Whether the fault concerns a convolution by weight [Cout, Cin / groups, h, w] ([Cin, Cout / groups, h, w] of a
    transposed one; in one dimension without h), in the layouts that lead to it.
    """
    positions = weight.dim() - 2
    return (
        positions in (1, 2)
        and max(weight.shape[2:]) == 1
        and weight.shape[1] < _CHANNELS
        and max(_each(stride, positions)) > 1
        and (padding == "valid" or (not isinstance(padding, str) and max(_each(padding, positions)) == 0))
    )


def _each(value: Any, positions: int) -> tuple[int, ...]:
    """A convolution's stride or padding along each of its dimensions, however it was given."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values if len(values) == positions else values * positions


class _Guarded(nn.Module):
    """Stands before a module's class; see `guard_pointwise`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            with _WithoutStride():
                return super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # deepcopy and pickle find a class by its name, and this one has none of its own
        reduced: Any = super().__reduce_ex__(protocol)
        return _new, (type(self).__bases__[1],), *reduced[2:]


_CLASSES: dict[Any, Any] = {}  # a class -> its subclass with _Guarded before it


def _guarded(cls: Any) -> Any:
    if cls not in _CLASSES:
        _CLASSES[cls] = type(cls.__name__, (_Guarded, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    return _CLASSES[cls]


def _new(cls: type[nn.Module]) -> nn.Module:
    made = _guarded(cls)
    module: nn.Module = made.__new__(made)
    return module


class _WithoutStride(TorchFunctionMode):
    """Inside, convolutions that the fault concerns are computed without a stride."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.conv1d, torch.conv2d):
            return _convolution(func, *args, **(kwargs or {}))
        if func in (torch.conv_transpose1d, torch.conv_transpose2d):
            return _transposed(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _convolution(
    func: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """func(...), of torch's convolutions."""
    if input.device.type == "cpu" and _concerns(weight, stride, padding):
        input, stride = thinned(input, _each(stride, weight.dim() - 2)), 1
    return func(input, weight, bias, stride, padding, dilation, groups)


def _transposed(
    func: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    """func(...), of torch's transposed convolutions: with kernel 1 the stride puts zeros between what comes out."""
    positions = weight.dim() - 2
    if input.device.type != "cpu" or not _concerns(weight, stride, padding):
        return func(input, weight, bias, stride, padding, output_padding, groups, dilation)
    steps, more = _each(stride, positions), _each(output_padding, positions)
    dense = func(input, weight, groups=groups)
    sides = [(n - 1) * step + 1 + e for n, step, e in zip(dense.shape[-positions:], steps, more, strict=True)]
    output = dense.new_zeros(*dense.shape[:-positions], *sides)
    thinned(output, steps).copy_(dense)
    return output if bias is None else output + bias.view(-1, *[1] * positions)
