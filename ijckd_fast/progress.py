"""What a run measures of itself as it goes, and what a person sees of it: a bar in a terminal, lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor


def say(console: Console, text: str) -> None:
    """Prints one line, whatever is in it: what the console cannot encode (a file name that is not UTF-8) is shown escaped."""
    text = text.encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class TrainingProgress:
    """Shows steps done, images/s, loss and the share of time spent waiting for the loader.

    console  a terminal gets a bar, anything else one line per row of the log, a quiet console nothing
    Use as a context manager.
    """

    def __init__(self, console: Console, name: str, start: int, total: int) -> None:
        self._console, self._name, self._total = console, name, total
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
        figures = f"loss {loss}  {row['images_per_s']:,.0f} images/s  {row['loader_wait_percent']:.0f} % loader wait"
        if self._bar is not None:
            self._bar.update(self._task, figures=figures)
        else:
            self.say(
                f"{self._name}: step {step}/{self._total}, epoch {row['epoch']:.2f}, lr {row['lr']:.4g}, {figures}"
            )

    def say(self, text: str) -> None:
        """One line above the bar."""
        say(self._console, text)


class Meter:
    """Means of per-step figures since the last log, summed on the device. Skipped steps count for nothing but themselves."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._sums = torch.zeros(0, device=device)  # [figures + 1] float32; the last is the number of good steps
        self._steps = 0

    def add(self, ok: Tensor, figures: Mapping[str, Tensor]) -> None:
        """ok [] bool; figures: name -> [], the same names at every step. Asks the device nothing."""
        if not self._names:
            self._names = list(figures)
            self._sums = torch.zeros(len(figures) + 1, device=self._device)
        row = torch.stack([*(figure.float() for figure in figures.values()), ok.float()])
        self._sums += torch.where(ok, row, 0)
        self._steps += 1

    def take(self) -> tuple[dict[str, float | None], int]:
        """Means over the good steps (None if there was none) and the number of skipped ones; waits for the device; starts anew."""
        *sums, good = self._sums.tolist()
        means = {name: total / good if good else None for name, total in zip(self._names, sums, strict=True)}
        skipped = self._steps - round(good)
        self._sums.zero_()
        self._steps = 0
        return means, skipped

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last `take`."""
        return {"names": self._names, "sums": self._sums, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        self._names, self._steps = state["names"], state["steps"]
        self._sums = state["sums"].to(self._device)


class Stopwatch:
    """Images per second by wall clock, the loader's share included, evaluation and checkpoints left out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
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
        """Figures since the last call; to be called when the device has finished."""
        now = time.perf_counter()
        seconds = now - self._start - self._paused
        row = {"images_per_s": self._images / seconds, "loader_wait_percent": 100 * self._waited / seconds}
        self._images, self._waited, self._paused, self._start = 0, 0.0, 0.0, now
        return row
