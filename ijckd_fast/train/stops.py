"""Why a run ends before its last step: every signal, every reason, and the sentence that says what to do."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from ijckd_fast.distill import Needs
from ijckd_fast.errors import OutOfMemory, UserError, memory_told
from ijckd_fast.parallel import Processes
from ijckd_fast.signals import Stopped
from ijckd_fast.train import checkpoint, run_folder
from ijckd_fast.train.config import TrainConfig
from ijckd_fast.train.resolving import data_folder_of, objective_of


@contextlib.contextmanager
def told_in(folder: Path, processes: Processes) -> Iterator[None]:
    """Inside, what ends the run before its last step is also written to stopped.txt in its folder, which is there when
    the console is gone; of a process other than that with rank 0 to stopped-RANK.txt. An earlier one is deleted.
    """
    path = folder / (run_folder.STOPPED if processes.is_main else f"stopped-{processes.rank}.txt")
    path.unlink(missing_ok=True)

    def tell(text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk: the error itself is what matters
            path.write_text(text, encoding="utf-8", errors="backslashreplace")

    with processes.telling(lambda text: tell(f"{text}\n")):
        try:
            yield
        except BaseException as error:
            in_words = isinstance(error, (UserError, ImportError, Stopped))
            tell(f"{error}\n" if in_words else "".join(traceback.format_exception(error)))
            raise


def how_to_resume(folder: Path, step: int | None = None) -> str:
    """Said by each of several processes that cannot continue without another one; step: that of last.pt, where this
    process has written it.
    """
    there = "" if step is None else f"; {folder / run_folder.LAST} is of step {step}"
    return f"Continue all of them with ijckd-fast train --resume {folder}{there}"


def stopped_by(signum: int, step: int, total_steps: int, folder: Path) -> Stopped:
    """A signal came, and last.pt is of the step before it."""
    return Stopped(
        signum,
        f" at step {step} of {total_steps}, everything is saved: continue with ijckd-fast train --resume {folder}",
    )


def nothing_to_resume(folder: Path, checkpoint: str) -> str:
    """Said of a finished run; UserError where it was to continue from a checkpoint on its way."""
    if checkpoint == run_folder.LAST:
        return f"{folder}: this run is finished, nothing to resume"
    raise UserError(
        f"the run in {folder} is finished, and {checkpoint} is of a step on its way: delete {run_folder.SUMMARY} there"
        " to train it again from that step"
    )


def stopped_at_the_end(signum: int, folder: Path) -> Stopped:
    """A signal came with the last step."""
    return Stopped(signum, f" after the last step: the run in {folder} is finished")


def too_many_unreadable(error: Exception, step: int, folder: Path, saved: bool) -> UserError:
    """More images turned out unreadable than --unreadable-limit allows; saved: last.pt is of this step."""
    kept = "everything is saved" if saved else "the last checkpoint is kept"
    return UserError(
        f"{error}. Stopped at step {step}, {kept}: fix the data and continue with ijckd-fast train --resume {folder}, "
        "or allow more with --unreadable-limit"
    )


def cache_damaged(error: Exception, step: int, folder: Path, saved: bool) -> UserError:
    """The teacher's cached features are not what was written; saved: last.pt is of this step."""
    kept = "everything is saved" if saved else "the last checkpoint is kept"
    return UserError(f"{error}. Stopped at step {step}, {kept}: then continue with ijckd-fast train --resume {folder}")


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
    try:
        step = checkpoint.load(last)["step"]
    except UserError as error:  # why the run stops is still what matters
        return f"there is no good checkpoint: {error}"
    return f"the last good checkpoint is {last} (step {step})"


def memory_told_of(config: TrainConfig) -> contextlib.AbstractContextManager[None]:
    """Inside, memory that runs out between the steps, or before them, is a sentence with what takes most of it."""
    return memory_told(
        f"in a run with batches of {config.batch_size} images of {config.image_size} pixels on {config.device}, before "
        "or after a step",
        "give a smaller --batch-size or --image-size, a smaller net, fewer --workers or a smaller --prefetch, or free "
        "memory; what was saved continues with --resume",
    )


def memory_ran_out(config: TrainConfig, step: int, folder: Path, fits: int | None) -> OutOfMemory:
    """fits: images that went through when tried; None where that was not tried."""
    whole = config.batch_size // config.accumulate
    what = (
        f"out of memory at step {step} with {whole} images going through the nets at once on {config.device}; "
        f"{_last_good(folder)}. "
    )
    if fits == 0:
        return OutOfMemory(
            f"{what}Not even one image fits: choose a smaller student, a smaller --image-size, or a machine with more "
            "memory"
        )
    if fits is None:
        tried, parts = "Half of them may fit", 2
    else:
        tried, parts = f"{fits} fit", next(n for n in range(1, whole + 1) if whole % n == 0 and whole // n <= fits)
    objective = objective_of(config)
    if Needs.WHOLE_BATCH in objective.needs:
        return OutOfMemory(
            f"{what}{tried}: start again with --batch-size {whole // parts}, in more processes if the batch shall stay"
            f" as it is (objective {objective.name!r} takes it in one piece, so --accumulate is not for it), or resume"
            " where more memory is free"
        )
    return OutOfMemory(
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
        f"Scan it again ({data_folder_of(config).scanning}), and give a teacher with weights for these {num_classes} "
        "classes"
    )
