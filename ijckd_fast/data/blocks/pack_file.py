"""One file of a block pack: a header, a table of its images, then their blocks. docs/pack.md has it byte by byte.

All numbers are little-endian. Where each image lies follows from the sizes of all and the bits alone, so that it is
known before anything is encoded. An image that could not be packed keeps its place, filled with zeros, and its length
in the table is 0.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ijckd_fast.data.blocks.codec import BITS, Bits, blocks_length, checksum
from ijckd_fast.errors import UserError
from ijckd_fast.files import Damaged

MAGIC = b"ijblocks"
VERSION = 1
SUFFIX = ".blocks"
ALIGNMENT = 64  # bytes, of an image in the file: a cache line
REMEDY = (
    "run the same ijckd-fast pack command again, which makes again what is damaged, or restore it from a copy of the "
    "pack"
)

RECORD = np.dtype(
    [
        ("offset", "<u8"),  # of the image's first byte in the file
        ("checksum", "<i8"),  # codec.checksum of its bytes; 0 where it was left out
        ("length", "<u4"),  # bytes; 0: the image was left out
        ("id", "<u4"),  # in the index of the images that were packed
        ("label", "<u4"),
        ("width", "<u4"),  # pixels, of the packed image, like height
        ("height", "<u4"),
        ("zero", "<u4"),
    ]
)
"""What the table says of one image."""

# magic, version, bits of luma and of chroma, 2 zeros, images in the table, where it begins, where the first image does,
# bytes of the file, 8 zeros; then the check value of all this and of the table
_HEADER = struct.Struct("<8sIBB2xQQQQ8x8s")
_ALL = (1 << 64) - 1
_UNCHECKED = _HEADER.size - 8


def bits_per_pixel(bits: Bits) -> str:
    """Their name in BITS."""
    return next(name for name, known in BITS.items() if known == bits)


class Layout(NamedTuple):
    """Where n images lie in a file.

    offsets, lengths  [n] int64, bytes
    data              where the first one begins
    end               bytes of the file
    """

    offsets: np.ndarray
    lengths: np.ndarray
    data: int
    end: int


def layout(sizes: np.ndarray, bits: Bits) -> Layout:
    """Of images of `sizes` [n, 2] (width, height), in their order."""
    lengths = blocks_length(sizes[:, 1].astype(np.int64), sizes[:, 0].astype(np.int64), bits)
    data = _aligned(_HEADER.size + RECORD.itemsize * len(sizes))
    ends = data + np.cumsum(room(lengths))
    return Layout(
        np.concatenate([[data], ends])[:-1].astype(np.int64), lengths, data, int(ends[-1]) if len(ends) else data
    )


def room(lengths: np.ndarray) -> np.ndarray:
    """[n] int64, the bytes that images of `lengths` [n] int64 take in a file."""
    return -(-lengths // ALIGNMENT) * ALIGNMENT


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, eq=False)
class BlockFile:
    """A file whose header and table are as they were written, see open_file.

    path   as it was given
    bits   of all its images
    table  [n] of dtype RECORD, those left out too, whose length is 0
    """

    path: str
    bits: Bits
    table: np.ndarray

    def require_images(self) -> None:
        """Reads all images; Damaged, which names the first whose bytes are not those that its checksum is of."""
        for record in self.table[self.table["length"] > 0]:
            try:
                read_blocks(self.path, int(record["offset"]), int(record["length"]), int(record["checksum"]))
            except OSError as error:
                if error.errno is not None:
                    raise
                raise _damaged(self.path, int(record["offset"]), f"image {record['id']}: {error}") from error

    def blocks(self, row: int) -> np.ndarray:
        """[length] uint8 of the image in a row of the table; raises as read_blocks."""
        record = self.table[row]
        return read_blocks(self.path, int(record["offset"]), int(record["length"]), int(record["checksum"]))


def read_blocks(path: str, offset: int, length: int, expected: int) -> np.ndarray:
    """[length] uint8, the bytes of one image.

    expected  its checksum
    raises    OSError; one without an errno, which names file and offset, where the file ends before the image does or
              the bytes have another checksum
    """
    found = np.empty(length, np.uint8)
    with open(path, "rb", buffering=0) as file:
        count = os.preadv(file.fileno(), [found.data], offset)
        end = os.fstat(file.fileno()).st_size
    if count < length:
        raise OSError(f"{path} ends at byte {end}, before the image at bytes {offset} to {offset + length} does")
    value = checksum(found)
    if value != expected:
        raise OSError(
            f"{path} has changed since it was packed, or is damaged (the image at bytes {offset} to {offset + length} "
            f"has the checksum {value & _ALL:016x} where {expected & _ALL:016x} is expected)"
        )
    return found


def write_file(
    path: str | Path,
    bits: Bits,
    ids: np.ndarray,
    labels: np.ndarray,
    sizes: np.ndarray,
    images: Iterable[tuple[int, np.ndarray]],
) -> np.ndarray:
    """Writes a file, one image after the other; the header comes last.

    ids, labels  [n] int64, ids ascending; sizes [n, 2] (width, height)
    images       (row, its blocks [length] uint8), rows ascending; rows that do not come are left out
    returns      the table, [n] of dtype RECORD
    raises       OSError; ValueError for blocks of another length than size and bits say
    """
    place = layout(sizes, bits)
    table = np.zeros(len(ids), RECORD)
    table["offset"], table["id"], table["label"] = place.offsets, ids, labels
    table["width"], table["height"] = sizes[:, 0], sizes[:, 1]
    with open(path, "wb") as file:
        for row, blocks in images:
            if len(blocks) != place.lengths[row]:
                raise ValueError(f"{len(blocks)} bytes of image {ids[row]} where its size says {place.lengths[row]}")
            file.seek(place.offsets[row])
            file.write(blocks.data)
            table["length"][row], table["checksum"][row] = len(blocks), checksum(blocks)
        file.truncate(place.end)
        numbers = (MAGIC, VERSION, *bits, len(table), _HEADER.size, place.data, place.end)
        file.seek(0)
        file.write(_HEADER.pack(*numbers, _check_value(_HEADER.pack(*numbers, bytes(8)), table.tobytes())))
        file.write(table.data)
    return table


def _check_value(header: bytes, table: bytes) -> bytes:
    """BLAKE2b (64 bits) of the header up to its check value, and of the table."""
    value = hashlib.blake2b(header[:_UNCHECKED], digest_size=8)
    value.update(table)
    return value.digest()


class _Header(NamedTuple):
    magic: bytes
    version: int
    luma: int
    chroma: int
    images: int
    table: int
    data: int
    length: int
    check: bytes


def _header(path: str, head: bytes) -> _Header:
    """Of a file that begins with `head`."""
    if len(head) < _HEADER.size:
        raise _damaged(path, len(head), f"it ends there, inside its header of {_HEADER.size} bytes")
    header = _Header._make(_HEADER.unpack(head))
    if header.magic != MAGIC:
        raise _damaged(path, 0, f"it begins with {header.magic!r} where {MAGIC!r} is expected")
    if header.version != VERSION:
        raise UserError(
            f"{path} must be of version {VERSION} of the block format, found version {header.version} (at byte 8): "
            "read it with the version of ijckd-fast that packed it, or pack the images again with this one "
            "(ijckd-fast pack --overwrite)"
        )
    return header


def _known_bits(path: str, header: _Header) -> Bits:
    bits = Bits(header.luma, header.chroma)
    if bits not in BITS.values():
        known = ", ".join(f"{luma} and {chroma}" for luma, chroma in BITS.values())
        raise _damaged(path, 12, f"{bits.luma} bits of luma and {bits.chroma} of chroma where {known} are known")
    return bits


def open_file(path: str) -> BlockFile:
    """Reads header and table, and compares them with their check value and with the file's length.

    The images are not read: each has a checksum of its own in the table.

    raises  OSError where it cannot be read; Damaged, which names file and offset; UserError for another version
    """
    with open(path, "rb", buffering=0) as file:
        head = file.read(_HEADER.size)
        header = _header(path, head)
        size = os.fstat(file.fileno()).st_size
        end = header.table + RECORD.itemsize * header.images
        if header.table != _HEADER.size or end > size:
            raise _damaged(
                path, min(header.table, size),
                f"its header says that its table fills bytes {header.table} to {end}, and the file has {size}",
            )  # fmt: skip
        content = bytearray(end - header.table)
        got = os.preadv(file.fileno(), [content], header.table)
    if got < len(content):
        raise _damaged(path, header.table + got, "it ends there, inside its table")
    value = _check_value(head, bytes(content))
    if value != header.check:
        raise _damaged(
            path, _UNCHECKED,
            f"the check value of header and table, bytes 0 to {end}, is {header.check.hex()} where theirs is "
            f"{value.hex()}",
        )  # fmt: skip
    found = BlockFile(path, _known_bits(path, header), np.frombuffer(content, RECORD))
    _require_consistent(found, header, size)
    return found


def _require_consistent(found: BlockFile, header: _Header, size: int) -> None:
    """Damaged unless the table is that of a file of its length, which a sound check value alone does not say."""
    table, path = found.table, found.path
    expected = layout(np.stack([table["width"], table["height"]], 1), found.bits)

    def at(wrong: np.ndarray) -> int:
        return header.table + RECORD.itemsize * int(wrong.argmax())

    for wrong, what in (
        ((table["width"] == 0) | (table["height"] == 0), "an image without pixels"),
        (table["offset"] != expected.offsets, "an image that does not begin where the one before it ends"),
        ((table["length"] != 0) & (table["length"] != expected.lengths), "a length that is not its size's"),
        (np.concatenate([[False], table["id"][1:] <= table["id"][:-1]])[: len(table)], "an id out of order"),
    ):
        if wrong.any():
            raise _damaged(path, at(wrong), f"row {int(wrong.argmax())} of the table has {what}")
    if (header.data, header.length) != (expected.data, expected.end):
        raise _damaged(path, 24, f"its header says {header.length} bytes where its table says {expected.end}")
    if size != expected.end:
        cut = np.flatnonzero(expected.offsets + expected.lengths > size)
        inside = (
            f", inside or before image {table['id'][cut[0]]} at byte {expected.offsets[cut[0]]}" if len(cut) else ""
        )
        raise _damaged(path, min(size, expected.end), f"it has {size} bytes where {expected.end} were packed{inside}")


def _damaged(path: str, offset: int, what: str) -> Damaged:
    return Damaged(f"{path} is damaged at byte {offset} ({what}): {REMEDY}")
