"""A net's classifier: the layers that together are one linear layer on the pooled vector, however they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

_Norm = nn.BatchNorm1d | nn.BatchNorm2d
_NOTHING = (nn.Identity, nn.Dropout, nn.Flatten)  # in eval mode, of what a head is made of


class Classifier(NamedTuple):
    """Where a net's classifier stands, and how it is one `nn.Linear`.

    paths   names of its layers in the net: one, or several that see the same vector and whose answers are averaged
    layers  the modules there: a Linear, a 1x1 convolution, or a BatchNorm and a Linear in one module

    The mean of linear layers on one vector is a linear layer with the mean of their weights; a BatchNorm in eval mode
    is an affine step that the layer behind it takes up. In the files of the net (`native`) every one of several layers
    is that mean, and a BatchNorm is the identity.
    """

    paths: tuple[str, ...]
    layers: tuple[nn.Module, ...]

    @property
    def is_plain(self) -> bool:
        """Whether it is one `nn.Linear` as it stands."""
        return len(self.layers) == 1 and isinstance(self.layers[0], nn.Linear)

    def linear(self) -> nn.Linear:
        """The layer itself if it is plain, else a new one that computes the same in eval mode."""
        first = self.layers[0]
        if self.is_plain:
            assert isinstance(first, nn.Linear)
            return first
        state = self._merged([layer.state_dict() for layer in self.layers])
        like = next(first.parameters())
        classes, channels = state["weight"].shape
        made = nn.Linear(channels, classes, "bias" in state, device=like.device, dtype=like.dtype)
        made.load_state_dict(state)
        return made.requires_grad_(like.requires_grad).train(first.training)

    def merged(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state of the one linear layer, of the net's weights by its own names."""
        return self._merged([_below(path, weights) for path in self.paths])

    @torch.no_grad()
    def _merged(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Of the layers' states; formed in float64 and rounded once."""
        if self.is_plain:
            return dict(states[0])
        pairs = [_affine(layer, state) for layer, state in zip(self.layers, states, strict=True)]
        like = next(self.layers[0].parameters())
        made = {"weight": torch.stack([weight for weight, _ in pairs]).mean(0).to(like.dtype)}
        if any(has_bias(layer) for layer in self.layers):
            made["bias"] = torch.stack([bias for _, bias in pairs]).mean(0).to(like.dtype)
        return made

    def native(self, others: Mapping[str, Tensor], linear: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The net's weights by its own names, of those of its other layers and the state of the one linear layer."""
        state = dict(others)
        for path, layer in zip(self.paths, self.layers, strict=True):
            own = linear if self.is_plain or not linear else _spread(layer, linear)
            state |= {f"{path}.{name}": value for name, value in own.items()}
        return state

    def has(self, name: str) -> bool:
        """Whether a name of the net's state is one of a layer of it."""
        return name.startswith(tuple(f"{path}." for path in self.paths))

    def cut(self, net: nn.Module) -> None:
        """Puts the identity in its place."""
        for path in self.paths:
            _set(net, path, nn.Identity())

    def put_back(self, net: nn.Module, linear: nn.Linear) -> None:
        """Puts it in its place again, with the weights of `linear`."""
        for path, layer in zip(self.paths, self.layers, strict=True):
            if not self.is_plain:
                layer.load_state_dict(_spread(layer, linear.state_dict()))
            _set(net, path, linear if self.is_plain else layer)


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is linear by its type: a Linear, a 1x1 convolution, or BatchNorm and Linear in one module."""
    if isinstance(layer, nn.Conv2d):
        one, none = {*layer.kernel_size, *layer.stride, layer.groups}, {*layer.padding}
        return one == {1} and none == {0}
    if isinstance(layer, nn.Linear):
        return True
    parts = _parts(layer)
    linears = [part for _, part in parts if isinstance(part, nn.Linear)]
    return len(parts) > 1 and len(linears) == 1 and has_bias(linears[0])  # which takes up the norm's shift


def has_bias(layer: nn.Module) -> bool:
    """Whether a layer that is linear adds a vector to its product."""
    return any(isinstance(part, _Norm) or getattr(part, "bias", None) is not None for _, part in _parts(layer))


def _parts(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """(its name and a dot, the part) of the norms and linear layers that a head is made of, in their order; none where
    it has others.
    """
    if isinstance(layer, nn.Linear | nn.Conv2d):
        return [("", layer)]
    parts = [(f"{name}.", part) for name, part in layer.named_children() if not isinstance(part, _NOTHING)]
    own = any(True for _ in layer.parameters(recurse=False))
    return [] if own or not all(isinstance(part, nn.Linear | _Norm) for _, part in parts) else parts


def _below(path: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(path) + 1 :]: value for name, value in weights.items() if name.startswith(f"{path}.")}


def _affine(layer: nn.Module, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(weight [K, C], bias [K]) in float64 of a layer that is linear, in eval mode, with this state."""
    scale: Tensor | None = None  # of what comes before the linear layer: x -> scale x + shift
    shift: Tensor | None = None
    for prefix, part in _parts(layer):
        if isinstance(part, _Norm):
            step = (state[f"{prefix}running_var"].double() + part.eps).rsqrt()  # [C]
            if part.affine:
                step = step * state[f"{prefix}weight"].double()
            start = -state[f"{prefix}running_mean"].double() * step
            if part.affine:
                start = start + state[f"{prefix}bias"].double()
            scale = step if scale is None else scale * step
            shift = start if shift is None else shift * step + start
            continue
        weight = state[f"{prefix}weight"].double().flatten(1)  # [K, C]
        bias = state.get(f"{prefix}bias")
        added = weight.new_zeros(len(weight)) if bias is None else bias.double()
        if shift is not None:
            added = added + weight @ shift
        return weight if scale is None else weight * scale, added
    raise AssertionError("no linear layer")


def _spread(layer: nn.Module, linear: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a layer that is to compute what a linear layer with the state `linear` does; its norms are then the
    identity.
    """
    state, weight = layer.state_dict(), linear["weight"]
    made: dict[str, Tensor] = {}
    for prefix, part in _parts(layer):
        if isinstance(part, _Norm):
            for name in ("running_mean", "running_var", "weight", "bias"):
                if f"{prefix}{name}" in state:
                    made[prefix + name] = torch.full_like(
                        state[prefix + name], float(name in ("running_var", "weight"))
                    )
            # (x - 0) / sqrt(var + eps) is x
            made[f"{prefix}running_var"] -= part.eps
        else:
            assert isinstance(part.weight, Tensor)
            made[f"{prefix}weight"] = weight.reshape(len(weight), *part.weight.shape[1:])
            if f"{prefix}bias" in state:
                made[f"{prefix}bias"] = linear["bias"]
    return {name: made.get(name, value) for name, value in state.items()}


def _set(net: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(net.get_submodule(parent), leaf, module)
