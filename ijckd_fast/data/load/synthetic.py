"""The synthetic executor: the plan's labels with one fixed batch of noise. The ceiling any real loader can reach."""

from __future__ import annotations

import torch
from torch import Tensor

from ijckd_fast.data.load.loader import Loader
from ijckd_fast.data.plan import BatchPlan


class SyntheticLoader(Loader):
    """See Loader. No file is opened: every batch is (a slice of) the same normal noise, already on the device.

    A consumer that writes into the images changes those of all batches.
    """

    _noise: dict[int, Tensor]

    def _open(self) -> None:
        self._noise = {}  # by side

    def _fetch(self, step: int) -> tuple[Tensor, BatchPlan]:
        plan = self.plan.batch(step)
        size = plan.image_size
        if size not in self._noise:
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(self.plan.batch_size, size, size, 3, generator=generator)
            self._noise[size] = noise.to(self.device, self._made_in).permute(0, 3, 1, 2)
        return self._noise[size][: len(plan.ids)], plan

    def _release(self) -> None:
        self._noise = {}
