"""What a run measures of itself as it goes: means of its figures, images per second, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ijckd_fast.parallel import Processes


def memory_mb(device: torch.device) -> float:
    """Most memory used so far, megabytes: torch's on the GPU, or this process's on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    kilo = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 1e6


class Meter:
    """Means of per-step figures since the last log, summed on the device. Skipped steps count for nothing but
    themselves.
    """

    def __init__(self, device: torch.device, processes: Processes = Processes()) -> None:  # noqa: B008 - frozen
        self._device, self._processes = device, processes
        self._names: list[str] = []
        self._sums = torch.zeros(
            0, device=device
        )  # [figures + 2] float32; the last are the numbers of good steps and of overflows
        self._steps = 0

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """figures: name -> [], the same names at every step, 'ok' and 'overflow' [] bool among them. The host waits for
        nothing.
        """
        ok, overflow = figures["ok"], figures["overflow"]
        counted = {name: figure for name, figure in figures.items() if figure.dtype != torch.bool}
        if not self._names:
            self._names = list(counted)
            self._sums = torch.zeros(len(counted) + 2, device=self._device)
        row = torch.stack([*(figure.float() for figure in counted.values()), ok.float()])
        self._sums[:-1] += torch.where(ok, row, 0)
        self._sums[-1] += overflow
        self._steps += 1

    def take(self) -> tuple[dict[str, float | None], int, int]:
        """Means over the good steps and over processes (None if there was none), skipped steps, overflows of float16's
        loss scale.

        Waits for the device, and for the other processes; starts again from 0. The three are the same in all processes.
        """
        *sums, good, overflows = (self._processes.sum(self._sums.clone()) / self._processes.world).tolist()
        means = {name: total / good if good else None for name, total in zip(self._names, sums, strict=True)}
        skipped = self._steps - round(good) - round(overflows)
        self._sums.zero_()
        self._steps = 0
        return means, skipped, round(overflows)

    def state_dict(self) -> dict[str, Any]:
        """This process's sums since the last `take`."""
        return {"names": self._names, "sums": self._sums, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        self._names, self._steps = state["names"], state["steps"]
        self._sums = state["sums"].to(self._device)


class Stopwatch:
    """Images per second by wall clock, the loader's share included, evaluation and checkpoints left out."""

    def __init__(self, device: torch.device, processes: Processes = Processes()) -> None:  # noqa: B008 - frozen
        self._device, self._processes = device, processes
        self._images, self._waited, self._paused = 0, 0.0, 0.0
        self._start = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the request for the next batch."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training. The device first finishes the steps it was given, which are training."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def count(self, images: int) -> None:
        """Adds images that a step has taken in."""
        self._images += images

    def take(self) -> dict[str, float]:
        """Figures since the last call, of all processes (the longest of their waits); to be called when the device has
        finished.
        """
        now = time.perf_counter()
        seconds = now - self._start - self._paused
        each = self._processes.gather((self._images / seconds, 100 * self._waited / seconds))
        speeds, waits = zip(*each, strict=True)
        row = {"images_per_s": sum(speeds), "loader_wait_percent": max(waits)}
        self._images, self._waited, self._paused, self._start = 0, 0.0, 0.0, now
        return row
