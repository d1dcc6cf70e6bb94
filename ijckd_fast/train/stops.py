"""Why a run ends before its last step: every signal, every reason, and the sentence that says what to do."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from ijckd_fast.errors import UserError
from ijckd_fast.train import checkpoint, run_folder
from ijckd_fast.train.config import TrainConfig


class Stopped(KeyboardInterrupt):
    """The run was ended by SIGINT or SIGTERM (`signum`), after saving last.pt; not an error, so no Exception."""

    def __init__(self, signum: int, text: str) -> None:
        super().__init__(text)
        self.signum = signum


class StopSignal:
    """What the signals asked for so far; the loop looks at it after every step."""

    signum = 0  # SIGINT or SIGTERM: save and stop
    save = False  # SIGUSR1: save and continue


@contextlib.contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Inside, the first SIGINT or SIGTERM only sets `signum`, so that the loop can save; a second one acts at once.

    SIGUSR1, which batch systems send some time before they end a job, sets `save`, as often as it comes.
    """
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def note(number: int, _frame: object) -> None:
        if number == signal.SIGUSR1:
            stop.save = True
            return
        stop.signum = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, before[each])

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped_by(signum: int, step: int, total_steps: int, folder: Path) -> Stopped:
    """A signal came, and last.pt is of the step before it."""
    return Stopped(
        signum,
        f"stopped by {signal.Signals(signum).name} at step {step} of {total_steps}, everything is saved: "
        f"continue with ijckd-fast train --resume {folder}",
    )


def too_many_unreadable(error: Exception, step: int, folder: Path, saved: bool) -> UserError:
    """More images turned out unreadable than --unreadable-limit allows; saved: last.pt is of this step."""
    kept = "everything is saved" if saved else "the last checkpoint is kept"
    return UserError(
        f"{error}. Stopped at step {step}, {kept}: fix the data and continue with ijckd-fast train --resume {folder}, "
        "or allow more with --unreadable-limit"
    )


def too_many_skipped(skipped: int, step: int, folder: Path) -> UserError:
    """More steps were not finite than --nonfinite-limit allows."""
    what = (
        f"{skipped} steps had a NaN or infinite loss or gradient and were skipped, more than --nonfinite-limit allows"
    )
    return _not_finite(what, step, folder)


def loss_scale_gone(step: int, folder: Path) -> UserError:
    """float16's loss scale was halved until nothing of it was left."""
    return _not_finite("float16's loss scale fell below 1, the gradient is infinite at any", step, folder)


def _not_finite(what: str, step: int, folder: Path) -> UserError:
    return UserError(
        f"stopped at step {step}: {what}; {_last_good(folder)}. A smaller --lr, a longer --warmup-epochs or "
        "--amp-dtype float32 usually helps"
    )


def _last_good(folder: Path) -> str:
    last = folder / run_folder.LAST
    if not last.exists():
        return "no checkpoint had been written yet"
    return f"the last good checkpoint is {last} (step {checkpoint.load(last)['step']})"


def memory_ran_out(config: TrainConfig, step: int, folder: Path, fits: int | None) -> UserError:
    """fits: images that went through when tried; None where that was not tried."""
    whole = config.batch_size // config.accumulate
    what = (
        f"out of memory at step {step} with {whole} images going through the nets at once on {config.device}; "
        f"{_last_good(folder)}. "
    )
    if fits == 0:
        return UserError(
            f"{what}Not even one image fits: choose a smaller student, a smaller --image-size, or a machine with more "
            "memory"
        )
    if fits is None:
        tried, parts = "Half of them may fit", 2
    else:
        tried, parts = f"{fits} fit", next(n for n in range(1, whole + 1) if whole % n == 0 and whole // n <= fits)
    return UserError(
        f"{what}{tried}: start again with --accumulate {parts * config.accumulate} (the same update "
        f"but for BatchNorm's "
        "statistics) or a smaller --batch-size, or resume where more memory is free"
    )


def one_value_per_channel() -> UserError:
    """A batch of one image, or parts of one image each, left BatchNorm nothing to take a variance of."""
    return UserError(
        "BatchNorm cannot learn from a single value per channel, which one image with a 1x1 map or a "
        "pooled vector gives: use --batch-size 2 or more, and --accumulate for less than all of it"
    )


def bad_labels(config: TrainConfig, count: int, step: int, num_classes: int) -> UserError:
    """A GPU met labels outside [0, K): `count` since the last row of the log."""
    return UserError(
        f"stopped at step {step}: {count} images of the last steps had a label outside [0, K) = [0, "
        f"{num_classes}), the "
        f"classes of teacher {config.teacher}, and no loss: the index or its class list does not fit the teacher's K. "
        f"Scan {config.data_dir} again with ijckd-fast index, and give a teacher with weights for these {num_classes} "
        "classes"
    )
