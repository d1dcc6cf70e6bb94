"""Weights: compared with what a module takes, and known by a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ijckd_fast.errors import UserError


class Misfit(NamedTuple):
    """The names by which weights differ from what a module takes. As a string: a few of each, for an error."""

    missing: list[str]
    unexpected: list[str]
    misshapen: dict[str, str]  # name -> "'NAME' is [3, 2], expected [2, 2]"

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        faults = [_a_few("missing", map(repr, self.missing)), _a_few("unexpected", map(repr, self.unexpected))]
        faults.append(_a_few("of another shape", self.misshapen.values()))
        return "; ".join(fault for fault in faults if fault)


def misfit(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Misfit:
    """Compares the names and shapes of `weights` with those of a module's state, `own`."""
    misshapen = {
        name: f"{name!r} is {list(weights[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in weights and own[name].shape != weights[name].shape
    }
    return Misfit([name for name in own if name not in weights], [n for n in weights if n not in own], misshapen)


def require_fit(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], origin: str, fault: str, remedy: str) -> None:
    """UserError unless `weights` have the names and shapes of a module's state, `own`, and finite values.

    origin, fault, remedy  of the error: "ORIGIN FAULT: missing 'a'; unexpected 'b'. REMEDY"
    """
    differing = misfit(weights, own)
    if differing:
        raise UserError(f"{origin} {fault}: {differing}. {remedy}")
    for name, value in weights.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(
                f"{origin}: tensor {name!r} holds NaN or infinite values, expected finite weights:"
                " the run that wrote it diverged, take an earlier checkpoint"
            )


def _a_few(what: str, items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return f"{what} {', '.join(items[:3])}{more}" if items else ""


def fingerprint(module: nn.Module) -> str:
    """Hex digest of the names, shapes and bytes of a module's state: modules with equal digests compute the same."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in module.state_dict().items():
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{list(value.shape)}{value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
