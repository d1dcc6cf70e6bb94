"""What the executors have in common: the range of steps, iteration, and delivery to the device."""

from __future__ import annotations

from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from ijckd_fast.data.plan import BatchPlan, Plan
from ijckd_fast.errors import UserError


class Batch(NamedTuple):
    """Everything on the loader's device.

    images  [B, 3, S, S] normalised RGB, the loader's dtype, channels_last
    labels  [B] int64
    ids     [B] int64, positions in the index
    """

    images: Tensor
    labels: Tensor
    ids: Tensor


class Loader:
    """Iterates over the batches of a plan. Every `iter()` begins again at `start`; only one iteration runs at a time.

    plan      TrainPlan or EvalPlan
    threads   decoding threads
    prefetch  batches made ahead of the one asked for
    start     first (global) step
    stop      one after the last step; None = the plan's end (a TrainPlan has none)
    device    where batches are delivered
    dtype     of the images
    raises    UserError for a nonsensical number; while iterating, for a file that cannot be read or is not what was
              indexed, naming it. The iteration then is over; nothing is skipped silently.
    Neither threads nor prefetch, start or stop change the bits of a step's batch. A batch stays valid while it is
    referenced, also after close(). Use as a context manager, or close().
    """

    def __init__(
        self,
        plan: Plan,
        *,
        threads: int = 2,
        prefetch: int = 2,
        start: int = 0,
        stop: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, value, least in (("threads", threads, 1), ("prefetch", prefetch, 1), ("start", start, 0)):
            if value < least:
                raise UserError(f"the data loader's {name} must be at least {least}, found {value}")
        ends = [end for end in (stop, plan.num_steps) if end is not None]
        self.plan = plan
        self.threads = threads
        self.prefetch = prefetch
        self.start = start
        self.stop: int | None = min(ends) if ends else None
        self.device = torch.device(device)
        self.dtype = dtype
        self._step: int | None = None  # of the next batch; None = not iterating

    def __len__(self) -> int:
        """The number of batches of one iteration. Raises TypeError when it has no end."""
        if self.stop is None:
            raise TypeError("this loader has no end")
        return max(0, self.stop - self.start)

    def __iter__(self) -> Loader:
        self.close()
        return self

    def __next__(self) -> Batch:
        step = self.start if self._step is None else self._step
        if self._exhausted(step):
            self._release()
            self._step = step  # asked again, the answer is the same
            raise StopIteration
        try:
            if self._step is None:
                self._open()
            images, plan = self._fetch(step)
        except BaseException:
            self.close()
            raise
        self._step = step + 1
        return Batch(
            images.to(self.device, self.dtype, non_blocking=True),
            torch.from_numpy(plan.labels).to(self.device, non_blocking=True),
            torch.from_numpy(plan.ids).to(self.device, non_blocking=True),
        )

    def close(self) -> None:
        """Ends the iteration, its threads and its memory. The next iteration begins at `start` again."""
        self._step = None
        self._release()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _exhausted(self, step: int) -> bool:
        return self.stop is not None and step >= self.stop

    # --- what an executor defines ---

    def _open(self) -> None:
        """Starts making batches from self.start on."""

    def _fetch(self, step: int) -> tuple[Tensor, BatchPlan]:
        """images [B, 3, S, S] float32 channels_last on the CPU (or already on the device), and the plan they follow."""
        raise NotImplementedError

    def _release(self) -> None:
        """Frees what _open took; called again it does nothing."""
