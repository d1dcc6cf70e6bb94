"""The files of a block pack (../blocks), root/split/*.blocks: `ijckd-fast pack --codec blocks` writes them.

Sizes, labels and checksums come from the files' own tables, so that no image is opened to index it.
"""

from __future__ import annotations

import functools
import io
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ijckd_fast.data.blocks import (
    REMEDY,
    SUFFIX,
    Bits,
    bits_per_pixel,
    open_file,
    planes,
    read_blocks,
)
from ijckd_fast.data.sources.listing import ImageTable, Listing, settled, stamp_of
from ijckd_fast.data.sources.places import Place
from ijckd_fast.data.sources.shards import Shards
from ijckd_fast.data.sources.source import Content, Fields
from ijckd_fast.data.sources.sums import Sums
from ijckd_fast.files import Damaged, cannot_read


class BlockPlace(NamedTuple):
    """Where the blocks of one image lie, and what they are of."""

    path: str
    offset: int  # bytes
    length: int
    checksum: int  # blocks.checksum of these bytes
    width: int
    height: int
    bits: Bits

    def open(self) -> BinaryIO:
        """The blocks, read and compared at once."""
        return io.BytesIO(self.read())

    def read(self) -> bytes:
        """The blocks. Raises OSError; one without an errno where they have another checksum, or the file is cut."""
        return self._blocks().tobytes()

    def planes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The image, decoded: Y [h, w], Cb and Cr at half the size, uint8. Raises OSError as `read` does."""
        return planes(self._blocks(), self.height, self.width, self.bits)

    def _blocks(self) -> np.ndarray:
        return read_blocks(self.path, self.offset, self.length, self.checksum)


class BlockFiles(Shards):
    """See the module. Checksums of the files, and class names where they have any, are those of tar shards."""

    title = "files of a block pack"
    labels_from = "the files' tables"
    takes_fields = ()
    holds_many = ()

    @classmethod
    def recognised_by(cls, content: Content) -> Sequence[str]:
        """The block files, whatever lies beside them."""
        return [name for name in content.others if name.lower().endswith(SUFFIX)]

    def __init__(self, content: Content, label_file: str | Path | None, fields: Fields) -> None:
        """Raises Damaged where there are no checksums: a pack has some from its first file on."""
        super().__init__(content, label_file, fields)
        self._sums = Sums(content.root, content.split, required=True)

    @functools.cached_property
    def blocks(self) -> Bits:
        """As the first file has it, which is looked at, its images apart, at every start."""
        path = self.content.folder / self.recognised_by(self.content)[0]
        try:
            return open_file(str(path)).bits
        except OSError as error:
            raise cannot_read(path, error) from error

    def list_group(self, group: str) -> Listing:
        """From the table of one file. Damaged, with the place in the file, where it is not as it was packed."""
        root = str(self.content.root)
        now, stamp = time.time_ns(), stamp_of(root, group)
        found = open_file(os.path.join(root, group))
        try:
            self._sums.require(group)
        except Damaged:
            found.require_images()
            raise  # what is altered is neither header, table nor image
        if found.bits != self.blocks:
            raise Damaged(
                f"{found.path} must have the bits of the other files of its pack, luma {self.blocks.luma} and chroma "
                f"{self.blocks.chroma}, found {found.bits.luma} and {found.bits.chroma} (at byte 12): {REMEDY}"
            )
        table = found.table[found.table["length"] > 0]
        numbers = pc.utf8_lpad(pa.array(table["id"]).cast(pa.string()), 9, "0").cast(pa.large_binary())
        folder, nothing = (pa.scalar(name, pa.large_binary()) for name in (os.fsencode(f"{group}/"), b""))
        there, label = np.unique(table["label"], return_inverse=True)
        names = pa.array(there.astype(str).tolist(), pa.string())
        return Listing(
            pc.binary_join_element_wise(folder, numbers, nothing),
            table["length"].astype(np.int64),
            np.full(len(table), stamp[1], np.int64),
            settled([stamp], now),
            table["offset"].astype(np.int64),
            pa.DictionaryArray.from_arrays(pa.array(label.astype(np.int32)), names),
            ImageTable(
                f"blocks of {bits_per_pixel(found.bits)} bits a pixel",
                np.stack([table["width"], table["height"]], 1).astype(np.int32),
                table["checksum"],
            ),
        )

    def place_in_shard(
        self, shard: str, offset: int, length: int, checksum: int | None, size: tuple[int, int]
    ) -> Place:
        """The checksum is known from the first listing on."""
        assert checksum is not None
        return BlockPlace(shard, offset, length, checksum, *size, self.blocks)
