"""What stands in for images that cannot be read any more."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import numpy as np

from ijckd_fast.data.index import CANNOT_BE_READ, Index
from ijckd_fast.errors import UserError


class TooManyUnreadable(UserError):
    """More files cannot be read any more than may be, or than can be replaced."""


def what_to_do(index: Index, reasons: Iterable[str]) -> str:
    """The end of an error's sentence about images of an index that cannot be used any more, for these reasons."""
    if any(why.startswith(CANNOT_BE_READ) for why in reasons):
        return "see whether the disk is still there"
    command = "" if index.said is None else f" ({index.said.scanning})"
    return f"the files have changed since they were indexed: build the index again{command}"


class StandIns:
    """Images of an index that turned out unreadable while they were used, and those that stand in for them.

    An image's stand-in is the next readable one with its label (any_label: with whatever label), in index order and
    around. Which that is depends on which images are unreadable alone, not on when each was found to be.
    """

    def __init__(self, index: Index, *, any_label: bool = False) -> None:
        self._index = index
        self._any_label = any_label
        self._chosen: dict[int, int] = {}
        self.reasons: dict[int, str] = {}  # by id, in order of discovery

    def add(self, i: int, why: str) -> None:
        """Image i cannot be read. Raises TooManyUnreadable where no image is left that could stand in for it."""
        self.reasons.setdefault(i, why)
        for bad in self.reasons:
            if self._chosen.get(bad, i) == i:  # had none yet, or this one
                self._chosen[bad] = self._next(bad)

    def _next(self, i: int) -> int:
        same = np.flatnonzero(self._any_label | (self._index.labels == self._index.labels[i]))
        at = int(np.searchsorted(same, i))
        for candidate in chain(same[at:], same[:at]):
            if candidate not in self.reasons:
                return int(candidate)
        which = "" if self._any_label else f" of class {self._index.classes[self._index.labels[i]]!r}"
        raise TooManyUnreadable(
            f"no image{which} in {self._index.folder} can be read any more, the last one was "
            f"{self._index.absolute(i)} ({self.reasons[i]}); {what_to_do(self._index, [self.reasons[i]])}"
        )

    def of(self, ids: np.ndarray) -> np.ndarray:
        """ids [B], with each unreadable image's replaced by its stand-in's."""
        if not self._chosen:
            return ids
        return np.array([self._chosen.get(i, i) for i in ids.tolist()], np.int64)
