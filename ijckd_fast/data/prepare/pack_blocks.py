"""Packs of images in blocks (../blocks), which cost far less to decode than JPEGs: OUT/SPLIT/shard-000000.blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ijckd_fast.data.blocks import (
    BITS,
    SUFFIX,
    VERSION,
    Bits,
    BlockFile,
    blocks_length,
    encode,
    open_file,
    planes,
    room,
    write_file,
)
from ijckd_fast.data.plan import BatchPlan
from ijckd_fast.data.prepare.pack_format import PackFormat, Shard, Stored, Treatment, packed_sizes
from ijckd_fast.data.unreadable import Unreadable
from ijckd_fast.errors import UserError

ENCODER = 2
"""To be raised when blocks.encode makes other bytes: a pack is continued by the encoder that began it."""

_FARTHEST = 20.0  # grey levels: eight values spread over all 256 are 18 apart at most, in the mean of squares


@dataclass(frozen=True)
class BlockPack(PackFormat):
    """See PackFormat. All images are encoded, those for validation too, which are made smaller as the others.

    bits      that a pixel takes: 6 (8 values in each block), 7 (16 of luma), 7.5 (16 of chroma too)
    shard_gb  GiB of images in a file
    """

    bits: float = 6
    shard_gb: float = 1.0

    codec: ClassVar[str] = "blocks"
    suffix: ClassVar[str] = SUFFIX
    longest: ClassVar[int] = 65535
    beside_jpeg: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if f"{self.bits:g}" not in BITS:
            raise UserError(
                f"--bits (bits that a pixel takes) must be one of {', '.join(BITS)}, found {self.bits:g}; 6 is usual"
            )
        if not self.shard_gb > 0:
            raise UserError(f"--shard-gb (GiB in a file) must be above 0, found {self.shard_gb}; 1 is usual")

    @property
    def _bits(self) -> Bits:
        return BITS[f"{self.bits:g}"]

    def _settings(self) -> dict[str, Any]:
        return {"bits": float(self.bits), "shard_gb": float(self.shard_gb), "version": VERSION, "encoder": ENCODER}

    def treatments(self, split: str, sizes: np.ndarray, is_jpeg: np.ndarray) -> np.ndarray:
        """None is copied."""
        same = (packed_sizes(sizes, self.short) == sizes).all(1)
        return np.where(same, Treatment.ENCODE, Treatment.RESIZE)

    def sizes(self, split: str, sizes: np.ndarray) -> np.ndarray:
        """The same for both splits."""
        return packed_sizes(sizes, self.short)

    def starts(self, sizes: np.ndarray) -> Sequence[int]:
        """A file has as many images as fit into shard_gb, and at least one."""
        wide, high = sizes.astype(np.int64).T
        ends = np.cumsum(room(blocks_length(high, wide, self._bits)))
        starts, before = [0], 0
        while True:
            following = int(np.searchsorted(ends, before + self.shard_gb * 2**30, "right"))
            following = max(following, starts[-1] + 1)
            if following >= len(sizes):
                return starts
            starts.append(following)
            before = int(ends[following - 1])

    def encoded(self, image: Image.Image, path: str) -> bytes:
        """Raises UserError where it does not decode to nearly what it was: the machine is not sound."""
        data = encode(np.asarray(image), self._bits)
        full = image.convert("YCbCr")
        was = (full.getchannel(0), *(full.getchannel(c).reduce(2) for c in (1, 2)))
        for before, now in zip(was, planes(data, image.height, image.width, self._bits), strict=True):
            apart = float(np.abs(np.asarray(before, np.float32) - now).mean())
            if not apart <= _FARTHEST:
                raise UserError(
                    f"{path} must decode to nearly what was encoded, found {apart:.0f} grey levels in the mean: is the "
                    "memory whole? Finished shards stay; the same command tries again"
                )
        return data.tobytes()

    def write(self, path: Path, shard: Shard, images: Iterable[tuple[int, bytes]]) -> None:
        """See blocks.write_file."""
        blocks = ((row, np.frombuffer(data, np.uint8)) for row, data in images)
        write_file(path, self._bits, shard.ids, shard.labels, shard.packed, blocks)

    def read(self, path: Path) -> Iterator[Stored]:
        """Those that are not left out. Raises ValueError where header or table are not as they were written."""
        file = open_file(str(path))
        for row in np.flatnonzero(file.table["length"]).tolist():
            yield _StoredBlocks(file, row)

    def is_complete(self, shard: Shard) -> bool:
        """By its table."""
        try:
            table = open_file(shard.path).table
        except (FileNotFoundError, UserError):
            return False
        whole = bool(table["length"].all())
        return whole and np.array_equal(table["id"], shard.ids) and np.array_equal(table["label"], shard.labels)


class _StoredBlocks(Stored):
    def __init__(self, file: BlockFile, row: int) -> None:
        self._file, self._row = file, row
        self.id, self.label = int(file.table["id"][row]), int(file.table["label"][row])

    def _blocks(self) -> np.ndarray:
        try:
            return self._file.blocks(self._row)
        except OSError as error:
            if error.errno is not None:
                raise
            raise Unreadable(self._file.path, str(error)) from error

    def _planes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        record = self._file.table[self._row]
        return planes(self._blocks(), int(record["height"]), int(record["width"]), self._file.bits)

    def data(self) -> bytes:
        return self._blocks().tobytes()

    def size(self) -> tuple[int, int]:
        high, wide = self._planes()[0].shape
        return wide, high

    def view(self, plan: BatchPlan, i: int) -> np.ndarray:
        from ijckd_fast.data.load.planes import arrange_planes  # here: its room stands on torch

        return arrange_planes(self._planes(), plan, i)
