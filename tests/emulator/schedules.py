"""The orders in which the emulator runs a kernel's threads and moves what it copies asynchronously."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

# Enough where there are copies: one warp as far as it gets before the next one starts, from either end, is what a pipeline's
# missing barriers show under, and it is the slow kernels that copy.
WITH_COPIES = [(schedule, when) for when in ("lazy", "eager") for schedule in ("forward", "greedy", "greedy_reverse")]


def set_order(module: ModuleType, schedule: str, when: str = "lazy") -> None:
    module.set_schedule(module.Schedule.__members__[schedule])
    module.set_async(module.Async.__members__[when])


def orders(module: ModuleType) -> Iterator[str]:
    """Sets every order that matters to a case in turn and gives its name; the caller runs the case at each."""
    set_order(module, "forward")
    module.clear_counts()
    yield "forward lazy"
    copies = module.counts().copies > 0
    rest = WITH_COPIES if copies else [(schedule, "lazy") for schedule in module.Schedule.__members__]
    for schedule, when in rest[1:]:
        set_order(module, schedule, when)
        yield f"{schedule} {when}"
