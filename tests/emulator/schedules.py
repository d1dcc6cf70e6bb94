"""The orders in which the emulator runs a kernel's threads and moves what it copies asynchronously."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

Order = tuple[str, str]  # of emulator.h's Schedule and Async

FIRST: Order = ("forward", "lazy")
# Enough where there are copies: one warp as far as it gets before the next one starts, from either end, is what a
# pipeline's missing barriers show under, and it is the slow kernels that copy.
WITH_COPIES: list[Order] = [
    (schedule, when) for when in ("lazy", "eager") for schedule in ("forward", "greedy", "greedy_reverse")
]


def set_order(module: ModuleType, order: Order) -> None:
    """Starts counting anew, too."""
    schedule, when = order
    module.set_schedule(module.Schedule.__members__[schedule])
    module.set_async(module.Async.__members__[when])
    module.clear_counts()


def others(module: ModuleType) -> list[Order]:
    """All but the first that matter to what has run since set_order."""
    if module.counts().copies or module.counts().tile_copies:
        return WITH_COPIES[1:]
    return [(schedule, "lazy") for schedule in module.Schedule.__members__][1:]


def orders(module: ModuleType) -> Iterator[Order]:
    """Sets every order that matters to a case in turn; the caller runs the case at each."""
    set_order(module, FIRST)
    yield FIRST
    for order in others(module):
        set_order(module, order)
        yield order
