"""Files that are rewritten while they are used: each is named once."""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from concurrent.futures import Executor, Future

import numpy as np

from ijckd_fast.data.index import Index, stamps_of
from ijckd_fast.data.plan import BatchPlan

_NAMED = 8  # of more it is only said that there are some


class ChangedFiles:
    """Compares length and time of the file of each image that is read with those that it had when it was indexed.

    One request to the filesystem for each image, made by a thread while others decode. Images in shards have checksums
    instead, and those of a dataset no files.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._asked: deque[Future[dict[str, str]]] = deque()  # of a batch each
        self._due = 0  # of these, batches that were handed over
        self._warned = 0
        self._named: set[str] = set()

    def ask(self, plan: BatchPlan, threads: Executor) -> None:
        """Has the files of a batch looked at that is being made."""
        if self._index.stamps is not None:
            self._asked.append(threads.submit(self._look, plan))

    def tell(self) -> None:
        """Another batch is handed over: warns of the changed ones in it, or later where they are still looked at."""
        self._due = min(self._due + 1, len(self._asked))
        while self._due and self._asked[0].done():
            self._warn_of_first()

    def tell_rest(self) -> None:
        """Warns of the changed ones in all batches that were handed over."""
        while self._due:
            self._warn_of_first()

    def named(self, path: str) -> None:
        """Something else is said of this file, which is enough."""
        self._named.add(path)

    def forget(self) -> None:
        """What is being made will not be handed over."""
        while len(self._asked) > self._due:
            self._asked.pop()

    def _warn_of_first(self) -> None:
        self._due -= 1
        asked = self._asked.popleft()
        if asked.cancelled():  # with its threads
            return
        scanning = "" if self._index.said is None else f"run {self._index.said.scanning}, or "
        remedy = f"{scanning}start with --check-files, to have it looked at"
        for path, now in asked.result().items():
            if path in self._named or self._warned > _NAMED:
                continue
            self._named.add(path)
            self._warned += 1
            if self._warned > _NAMED:
                warnings.warn(f"more files have changed since they were indexed: {remedy}", stacklevel=4)
            else:
                warnings.warn(f"{path} has changed since it was indexed ({now}): {remedy}", stacklevel=4)

    def _look(self, plan: BatchPlan) -> dict[str, str]:
        """path -> how it is now, of the changed ones. What is not there is not this one's to say."""
        assert self._index.stamps is not None
        states = []
        for path in plan.paths:
            try:
                state = os.stat(path)
            except OSError:
                states.append((-1, -1))
            else:
                states.append((state.st_size, state.st_mtime_ns))
        lengths, mtimes = np.array(states, np.int64).reshape(-1, 2).T
        changed = (lengths >= 0) & (stamps_of(lengths, mtimes) != self._index.stamps[plan.ids])
        return {
            plan.paths[i]: f"now {lengths[i]:,} bytes, written {time.ctime(mtimes[i] / 1e9)}"
            for i in np.flatnonzero(changed).tolist()
        }
