"""BatchNorm folded into the layer before it: the same function in eval mode, in fewer passes over memory.

Which BatchNorm follows which layer is seen in one forward, not read from the code, so any net can be given.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_Layer = nn.Conv1d | nn.Conv2d | nn.Linear
_Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm
_TOLERANCE = 1e-4  # of the largest value: far above float32's rounding, far below what a wrong formula makes


@torch.no_grad()
def fold_batch_norm(net: nn.Module, example: Tensor) -> int:
    """Folds, in place, every BatchNorm that follows a convolution or linear layer into that layer; for inference only.

    net      any module that takes `example`; of a `Tapped` give its `net`: the map, wherever it is tapped, stays right.
             Fold before `torch.compile`, and on the CPU or without TF32, whose rounding would look like a wrong
             formula.
    example  e.g. [2, 3, S, S] of random pixels; run twice in eval mode
    returns  how many were folded

    A folded layer keeps its parameters' identity, dtype and requires_grad: `weight` is scaled, `bias` is added where
    there was none, computed in float64 and rounded once. The BatchNorm's weight and bias and its running statistics
    vanish from parameters and state_dict; an `nn.Identity` with its forward hooks stands in its place, or, of timm's
    BatchNormAct2d, an `nn.Sequential` of its activation (and drop) under the same names. Back in training mode such a
    net has no batch statistics.

    Left as it is: a BatchNorm after anything else (an activation, a concatenation, a reshape); one without running
    statistics; a layer or BatchNorm that is called more than once, shares its parameters, or has hooks that would see
    other values; a layer whose output something else reads as well; a layer that does not use its weight as it is
    (weight standardisation), which each pair's own output shows. If the net's output then differed by more than
    rounding, nothing would be folded and 0 returned.
    """
    modes = {module: module.training for module in net.modules()}
    net.eval()
    done: list[_Fold] = []
    try:
        before, folds = _run_watched(net, example)
        for fold in folds:
            done.append(fold)
            fold.apply(net)
        if not all(map(_same, _tensors(net(example)), before)):
            while done:
                done.pop().undo(net)
    except BaseException:
        while done:
            done.pop().undo(net)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
    return len(done)


class _Fold(NamedTuple):
    """One pair, and what to put in its place."""

    layer: _Layer
    norm: _Norm
    weight: Tensor  # folded, as layer.weight
    bias: Tensor  # [C]
    old_weight: Tensor
    old_bias: nn.Parameter | None
    replacement: nn.Module

    def apply(self, net: nn.Module) -> None:
        self.layer.weight.copy_(self.weight)
        self.layer.bias = nn.Parameter(self.bias, requires_grad=self.layer.weight.requires_grad)
        _replace(net, self.norm, self.replacement)

    def undo(self, net: nn.Module) -> None:
        self.layer.weight.copy_(self.old_weight)
        self.layer.bias = self.old_bias
        _replace(net, self.replacement, self.norm)


def _replace(net: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(net.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _run_watched(net: nn.Module, example: Tensor) -> tuple[list[Tensor], list[_Fold]]:
    """The net's output, and the pairs that can be folded."""
    owners: Counter[int] = Counter(
        id(parameter) for module in net.modules() for parameter in module._parameters.values() if parameter is not None
    )
    layers = [module for module in net.modules() if isinstance(module, _Layer) and _is_plain(module, owners)]
    norms = [module for module in net.modules() if isinstance(module, _Norm) and _can_go(module) and module is not net]
    watch = _Watch()
    handles = [layer.register_forward_hook(watch.after_layer) for layer in layers]
    for norm in norms:
        handles.append(norm.register_forward_pre_hook(watch.before_norm))
        handles.append(norm.register_forward_hook(watch.after_norm, prepend=True))
    try:
        with watch:
            output = _tensors(net(example))
    finally:
        for handle in handles:
            handle.remove()
    return output, watch.result()


def _is_plain(layer: _Layer, owners: Counter[int]) -> bool:
    """Has parameters of its own, and nobody who looks at its output or changes its weight."""
    own = layer._parameters
    if own.get("weight") is None or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    return all(owners[id(parameter)] == 1 for parameter in own.values() if parameter is not None)


def _can_go(norm: _Norm) -> bool:
    """Is the same function of every batch, and nobody looks at its input."""
    return norm.running_mean is not None and not norm._forward_pre_hooks


class _Watch(TorchDispatchMode):
    """Watches one forward: which layer's output does a BatchNorm read, and which other operation reads it?"""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[nn.Module] = Counter()
        self.outputs: dict[int, tuple[_Layer, Tensor, Tensor]] = {}  # by id, kept alive: layer, its input and output
        self.read_elsewhere: set[int] = set()
        self.found: dict[int, _Fold] = {}
        self.within = 0  # in a BatchNorm, or in our own arithmetic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.within:
            self.read_elsewhere.update(id(x) for x in tree_leaves((args, kwargs)) if id(x) in self.outputs)
        return func(*args, **(kwargs or {}))

    def after_layer(self, layer: _Layer, args: Any, output: Tensor) -> None:
        self.calls[layer] += 1
        if len(args) == 1 and isinstance(output, Tensor):
            self.outputs[id(output)] = layer, args[0], output

    def before_norm(self, norm: _Norm, args: Any) -> None:
        self.within += 1

    def after_norm(self, norm: _Norm, args: Any, output: Tensor) -> None:
        self.calls[norm] += 1
        known = self.outputs.get(id(args[0])) if args else None
        if known is not None:
            fold = _fold_of(known[0], norm)
            if fold is None or id(args[0]) in self.found or not _computes(fold, known[1], output):
                self.read_elsewhere.add(id(args[0]))  # also by a second BatchNorm
            else:
                self.found[id(args[0])] = fold
        self.within -= 1

    def result(self) -> list[_Fold]:
        alone = [fold for key, fold in self.found.items() if key not in self.read_elsewhere]
        return [fold for fold in alone if self.calls[fold.layer] == self.calls[fold.norm] == 1]


def _fold_of(layer: _Layer, norm: _Norm) -> _Fold | None:
    """y = W x + b, then g (y - m) / sqrt(v + eps) + h, as one layer.

    Its weight is W s and its bias (b - m) s + h, with s = g / sqrt(v + eps).
    """
    weight, bias = layer.weight, layer.bias
    mean, var, gain, shift = norm.running_mean, norm.running_var, norm.weight, norm.bias
    assert mean is not None
    assert var is not None
    if len(weight) != len(mean):
        return None
    scale = (var.double() + norm.eps).rsqrt()  # [C]
    if gain is not None:
        scale = scale * gain.double()
    offset = ((0 if bias is None else bias.double()) - mean.double()) * scale
    if shift is not None:
        offset = offset + shift.double()
    folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    inner = OrderedDict(norm.named_children())
    replacement = nn.Sequential(inner) if inner else nn.Identity()
    # The dicts themselves, so that the handles which remove these hooks still work.
    for name in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        setattr(replacement, name, getattr(norm, name))
    replacement.eval()
    folded, offset = folded.to(weight.dtype), offset.to(weight.dtype)
    return _Fold(layer, norm, folded, offset, weight.clone(), layer.bias, replacement)  # type: ignore[arg-type]


def _computes(fold: _Fold, x: Tensor, output: Tensor) -> bool:
    """Whether the layer with the folded weights, and then the activation, makes of x what the BatchNorm made."""
    own = fold.layer._parameters
    kept = dict(own)
    own["weight"], own["bias"] = nn.Parameter(fold.weight), nn.Parameter(fold.bias)
    try:
        y = fold.layer.forward(x)
        for child in fold.replacement.children():
            y = child(y)
    finally:
        own.clear()
        own.update(kept)
    return y.shape == output.shape and _same(y, output, scale=fold.bias)


def _same(a: Tensor, b: Tensor, scale: Tensor | None = None) -> bool:
    size = b.abs().max() if scale is None else torch.maximum(b.abs().max(), scale.abs().max())
    return bool((a - b).abs().max() <= _TOLERANCE * size)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
