"""What a person sees of a run: a bar in a terminal, lines anywhere else."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ijckd_fast.console import say

_BAR, _TIME = 12, len("0:00:00")  # columns of the bar, and of the time that is left


class TrainingProgress:
    """Shows steps done, time left, loss, images/s and the share of time spent waiting for the loader.

    console  a terminal gets a bar, in which the figures have what room the others leave; anything else one line per row
             of the log, a quiet console nothing
    rank     of this process; others than 0 say little, and that on standard error
    Use as a context manager.
    """

    def __init__(self, console: Console, name: str, rank: int = 0) -> None:
        self._console, self._name, self._total, self._rank = console, name, 0, rank
        self._begun, self._began = 0, time.monotonic()  # the step that this process began at, and when
        self._bar: Progress | None = None
        if console.is_terminal and not console.quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=_BAR),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            self._bar = Progress(*columns, console=console, transient=True)

    def begin(self, step: int, total: int) -> None:
        """Says where the run stands, and how many steps it has in all."""
        self._total, self._begun = total, step
        if self._bar is not None:
            self._task = self._bar.add_task(self._short_name(), total=total, completed=step, figures="")

    def __enter__(self) -> TrainingProgress:
        self._began = time.monotonic()
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
        wait, speed = row["loader_wait_percent"], f"{row['images_per_s']:,.0f}"
        figures = f"loss {loss}  {speed} images/s  {bottleneck(wait)}"
        if self._bar is None:
            self.say(
                f"{self._name}: step {step}/{self._total}, epoch {row['epoch']:.2f}, lr {row['lr']:.4g}, {figures}"
                f"{self._left(step)}"
            )
            return
        shorter = (f"loss {loss}  {speed} img/s  {wait:.0f} % wait", f"loss {loss}  {speed} img/s", f"loss {loss}", "")
        room = self._room()
        self._bar.update(
            self._task,
            description=self._short_name(),
            figures=next(text for text in (figures, *shorter) if len(text) <= room or not text),
        )

    def _left(self, step: int) -> str:
        """How long the rest takes at the speed so far, evaluations included; nothing where that is not known."""
        done = step - self._begun
        if done <= 0 or step >= self._total:
            return ""
        seconds = (time.monotonic() - self._began) / done * (self._total - step)
        return f", {datetime.timedelta(seconds=round(seconds))} left"

    def _short_name(self) -> str:
        """The name, cut where it would take more than a quarter of the line."""
        most = self._console.width // 4
        return self._name if len(self._name) <= most else f"{self._name[: most - 1]}…"

    def _room(self) -> int:
        """Columns of the line that name, bar, count and time leave to the figures; one is left free between all."""
        count = 2 * len(str(self._total)) + 1
        return self._console.width - len(self._short_name()) - _BAR - count - _TIME - 4

    def say(self, text: str, *, everyone: bool = False) -> None:
        """One line above the bar; of a process other than the first only where everyone may speak."""
        if self._rank and everyone:
            say(Console(stderr=True), f"[process {self._rank}] {text}")
        else:
            say(self._console, text)

    def bad_file(self, what: str) -> Callable[[str, str], None]:
        """What a loader calls with a file that it cannot read any more, and why; `what` is done about it."""
        return lambda path, why: self.say(f"warning: {path} cannot be read any more ({why}): {what}", everyone=True)


# Share of a step's time that is spent waiting for the next batch. Beyond it the loader is what to improve first.
DATA_BOUND_PERCENT = 20


def bottleneck(loader_wait_percent: float) -> str:
    """What bounds the speed, by the share of the time in which the loop waits for the next batch; with that share."""
    bound = "data-bound" if loader_wait_percent > DATA_BOUND_PERCENT else "compute-bound"
    return f"{bound} ({loader_wait_percent:.0f} % waiting for data)"
