"""The moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving average of a module's parameters and floating-point buffers, in their dtypes on their device.

    After update number n (from 1) the decay is min(decay, (1 + n) / (10 + n)), so that a short run is not dominated by
    its first weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._live = {k: v for k, v in module.state_dict(keep_vars=True).items() if v.is_floating_point()}
        self._average = {k: v.detach().clone() for k, v in self._live.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Takes in the module's present weights; `updates` counts from 1."""
        decay = min(self._decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self._average.values()), [v.detach() for v in self._live.values()], 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the module computes with the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for key, live in self._live.items():
            kept = live.detach().clone()
            live.copy_(self._average[key])
            self._average[key].copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names of the module's own state_dict."""
        return self._average

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state_dict` returned."""
        for key, average in self._average.items():
            average.copy_(state[key])
