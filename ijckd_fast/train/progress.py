"""What a run measures of itself as it goes, and what a person sees of it: a bar in a terminal, lines anywhere else."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ijckd_fast.console import say
from ijckd_fast.parallel.processes import Processes


class TrainingProgress:
    """Shows steps done, images/s, loss and the share of time spent waiting for the loader.

    console  a terminal gets a bar, anything else one line per row of the log, a quiet console nothing
    rank     of this process; others than 0 say little, and that on standard error
    Use as a context manager.
    """

    def __init__(self, console: Console, name: str, start: int, total: int, rank: int = 0) -> None:
        self._console, self._name, self._total, self._rank = console, name, total, rank
        self._bar: Progress | None = None
        if console.is_terminal and not console.quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=12),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(name, total=total, completed=start, figures="")

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int) -> None:
        """Moves the bar; costs microseconds and asks the device nothing."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def row(self, step: int, row: dict[str, Any]) -> None:
        """Shows a row of the log."""
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        wait = row["loader_wait_percent"]
        figures = f"loss {loss}  {row['images_per_s']:,.0f} images/s  {bottleneck(wait)} ({wait:.0f} % loader wait)"
        if self._bar is not None:
            self._bar.update(self._task, figures=figures)
        else:
            self.say(
                f"{self._name}: step {step}/{self._total}, epoch {row['epoch']:.2f}, lr {row['lr']:.4g}, {figures}"
            )

    def say(self, text: str, *, everyone: bool = False) -> None:
        """One line above the bar; of a process other than the first only where everyone may speak."""
        if self._rank and everyone:
            say(Console(stderr=True), f"[process {self._rank}] {text}")
        else:
            say(self._console, text)


# Share of a step's time that is spent waiting for the next batch. Beyond it the loader is what to mend first.
LOADER_BOUND_PERCENT = 20


def bottleneck(loader_wait_percent: float) -> str:
    """What bounds the speed, in words: the share of a step's time in which the loop waits for the next batch tells."""
    return "the loader bounds" if loader_wait_percent > LOADER_BOUND_PERCENT else "the nets bound"


def memory_mb(device: torch.device) -> float:
    """Most memory used so far, megabytes: torch's on the GPU, or this process's on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    kilo = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 1e6


class Meter:
    """Means of per-step figures since the last log, summed on the device. Skipped steps count for nothing but themselves."""

    def __init__(self, device: torch.device, processes: Processes = Processes()) -> None:  # noqa: B008 - frozen
        self._device, self._processes = device, processes
        self._names: list[str] = []
        self._sums = torch.zeros(
            0, device=device
        )  # [figures + 2] float32; the last are the numbers of good steps and of overflows
        self._steps = 0

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """figures: name -> [], the same names at every step, 'ok' and 'overflow' [] bool among them. The host waits for nothing."""
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
        """Means over the good steps and over processes (None if there was none), skipped steps, overflows of float16's loss scale.

        Waits for the device, and for the other processes; starts anew. The three are the same in all processes.
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
        """Figures since the last call, of all processes (the longest of their waits); to be called when the device has finished."""
        now = time.perf_counter()
        seconds = now - self._start - self._paused
        each = self._processes.gather((self._images / seconds, 100 * self._waited / seconds))
        speeds, waits = zip(*each, strict=True)
        row = {"images_per_s": sum(speeds), "loader_wait_percent": max(waits)}
        self._images, self._waited, self._paused, self._start = 0, 0.0, 0.0, now
        return row
