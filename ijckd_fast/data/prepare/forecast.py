"""What a pack of images that are read one after the other will take: said before it starts, from its first images."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from ijckd_fast.data.load.pillow import decode
from ijckd_fast.data.prepare.pack_format import PackFormat
from ijckd_fast.data.sources import InOrder, Place
from ijckd_fast.data.unreadable import Unreadable
from ijckd_fast.errors import UserError

_SAMPLE = 64  # images that are timed
_DECODED = 3  # times: for the index, before it is packed, and when it is read back


class Forecast:
    """Disk space and time of a pack.

    out, settings, workers  see packing.pack
    say                     takes the sentence
    """

    def __init__(self, out: Path, settings: PackFormat, workers: int, say: Callable[[str], None]) -> None:
        self._out, self._settings, self._say = out, settings, say
        self._workers = workers or len(os.sched_getaffinity(0))
        self._needed = 0  # bytes, of the splits so far

    def tell(self, found: InOrder, places: Iterator[Place]) -> None:
        """Of one split. Raises UserError where the disk is too small for the splits so far."""
        began, read = time.perf_counter(), 0
        for place in islice(places, _SAMPLE):
            try:
                decode(place.path, place)
                read += 1
            except Unreadable:  # the index says which and why
                continue
        minutes = _DECODED * found.images * (time.perf_counter() - began) / max(1, read) / self._workers / 60
        space = ""
        if self._settings.codec == "jpeg":
            self._needed += found.size
            space = f"at most that on the disk of {self._out}, and "
            self._require_space()
        self._say(
            f"{found.why}: packing these {found.amount} takes {space}about {minutes:,.1f} minutes with {self._workers} "
            f"processes, by the first {read} images"
        )

    def _require_space(self) -> None:
        there = next(folder for folder in (self._out, *self._out.parents) if folder.is_dir())
        made = sum(file.stat().st_size for file in self._out.rglob("shard-*") if file.is_file())
        free = shutil.disk_usage(there).free
        if self._needed - made > free:
            raise UserError(
                f"{self._out} must have room for {self._needed / 1e9:,.1f} GB of images, found "
                f"{(free + made) / 1e9:,.1f} GB; free some, or give a folder on another disk"
            )
