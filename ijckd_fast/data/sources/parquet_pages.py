"""Where in a Parquet file the values of a binary column lie, found from its page headers.

A value that is neither compressed nor encoded is a run of bytes of the file, which can be read like a member of a tar
archive: without decoding the row group it is in. pyarrow does not say where; the format's own description does
(https://parquet.apache.org/docs/file-format/).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

_DATA, _INDEX, _DICTIONARY, _DATA_V2 = range(4)  # kinds of pages
_PLAIN, _RLE, _BY_DICTIONARY = 0, 3, (2, 8)  # encodings
_HEADER, _LONGEST_HEADER = 1 << 9, 1 << 24  # bytes read at first, and at most: statistics may stand in it


class Chunk(NamedTuple):
    """The pages of a column in one row group.

    offset, size  bytes of the file
    values        how many there are, nulls among them
    levels        the highest definition level: what a value has that is not null
    """

    offset: int
    size: int
    values: int
    levels: int


@dataclass(frozen=True, eq=False)
class Values:
    """Where the n values of a chunk lie.

    offsets, lengths  [n] int64, bytes; offsets are -1 where a value is null
    """

    offsets: np.ndarray
    lengths: np.ndarray


class Encoded(Exception):
    """The values are no runs of bytes of the file."""


class Broken(Exception):
    """The pages are not as the format has them, or the file is cut; says where."""


def find_values(file: int, chunk: Chunk) -> Values:
    """The values of a chunk that is not compressed; file: its descriptor.

    raises  Encoded, Broken
    """
    at, end = chunk.offset, chunk.offset + chunk.size
    found: list[tuple[np.ndarray, np.ndarray]] = []
    dictionary: tuple[np.ndarray, np.ndarray] | None = None
    count = 0
    while count < chunk.values:
        if at >= end:
            raise Broken(f"{count} of {chunk.values} values at byte {at}")
        page, at = _page(file, at, end)
        if page.kind == _DICTIONARY:
            if page.encoding not in (_PLAIN, *_BY_DICTIONARY):
                raise Encoded
            dictionary = _plain(file, page.start, page.end, page.values)
        elif page.kind in (_DATA, _DATA_V2):
            found.append(_values(file, page, chunk.levels, dictionary))
            count += page.values
    if count != chunk.values:
        raise Broken(f"{count} values where {chunk.values} are expected at byte {at}")
    offsets, lengths = (np.concatenate([np.empty(0, np.int64), *arrays]) for arrays in zip(*found, strict=True))
    return Values(offsets, lengths)


class _Page(NamedTuple):
    kind: int
    start: int  # bytes of the file: behind the header
    end: int
    values: int
    encoding: int
    levels: int | None  # bytes of the definition levels; None: they say it themselves


def _page(file: int, at: int, end: int) -> tuple[_Page, int]:
    """(the page whose header begins at a byte, where the next one begins)."""
    size = _HEADER
    while True:
        data = os.pread(file, min(size, end - at), at)
        try:
            header, used = _Compact(data).struct()
            break
        except IndexError:
            if len(data) < size or size >= _LONGEST_HEADER:
                raise Broken(f"no page header at byte {at}") from None
            size *= 8
        except ValueError:
            raise Broken(f"no page header at byte {at}") from None
    start = at + used
    try:
        kind, stored = header[1], header[3]
        if kind == _INDEX:
            return _Page(kind, start, start + stored, 0, _PLAIN, None), start + stored
        about = header[{_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}[kind]]
        levels = None
        if kind == _DATA_V2:
            encoding, levels = about[4], about[5]
            if about[6]:
                raise Encoded  # repeated values
        else:
            encoding = about[2]
            if kind == _DATA and about[3] != _RLE:
                raise Encoded
        page = _Page(kind, start, start + stored, about[1], encoding, levels)
    except (KeyError, TypeError):
        raise Broken(f"no page header at byte {at}") from None
    if stored < 0 or page.values < 0 or page.end > end:
        raise Broken(f"a page of {stored} bytes at byte {start}, beyond its column's end")
    return page, page.end


def _values(
    file: int, page: _Page, highest: int, dictionary: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, lengths) of the values of a data page, nulls among them."""
    start, there = page.start, np.ones(page.values, bool)
    if highest:
        size = page.levels
        if size is None:
            (size,) = struct.unpack("<I", _read(file, start, 4, page.end))
            start += 4
        levels = _hybrid(_read(file, start, size, page.end), highest.bit_length(), page.values)
        there = levels == highest
        start += size
    n = int(there.sum())
    if page.encoding == _PLAIN:
        mine = _plain(file, start, page.end, n)
    elif page.encoding in _BY_DICTIONARY and dictionary is not None:
        mine = _by_dictionary(_read(file, start, page.end - start, page.end), n, dictionary, start)
    else:
        raise Encoded
    offsets, lengths = np.full(page.values, -1, np.int64), np.zeros(page.values, np.int64)
    offsets[there], lengths[there] = mine
    return offsets, lengths


def _by_dictionary(
    data: bytes, n: int, dictionary: tuple[np.ndarray, np.ndarray], at: int
) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, lengths) of n values that are positions in a dictionary. at: where the data lie, for an error."""
    if not n:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    positions = _hybrid(data[1:], data[0], n) if data else np.empty(0, np.int64)
    if len(positions) != n or positions.max() >= len(dictionary[0]):
        raise Broken(f"positions beyond the dictionary at byte {at}")
    return dictionary[0][positions], dictionary[1][positions]


def _plain(file: int, start: int, end: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, lengths), [n] int64 each, of values that stand one after the other, each behind its length."""
    offsets, lengths = np.empty(n, np.int64), np.empty(n, np.int64)
    at = start
    for i in range(n):  # of the values the lengths alone are read
        length = int.from_bytes(_read(file, at, 4, end), "little")
        offsets[i], lengths[i] = at + 4, length
        at += 4 + length
    if at != end:
        raise Broken(f"{n} values that end at byte {at} where their page ends at byte {end}")
    return offsets, lengths


def _read(file: int, at: int, size: int, end: int) -> bytes:
    data = os.pread(file, size, at) if at + size <= end else b""
    if len(data) < size:
        raise Broken(f"a page that ends at byte {min(at + size, end)}, inside a value")
    return data


def _hybrid(data: bytes, width: int, n: int) -> np.ndarray:
    """[n] int64, numbers of `width` bits in runs of equal ones and packed groups of 8."""
    runs: list[np.ndarray] = []
    count, reader = 0, _Compact(data)
    weights = 1 << np.arange(width, dtype=np.int64)
    try:
        while count < n:
            head = reader.varint()
            if head & 1:
                packed = np.frombuffer(reader.take(min((head >> 1) * width, len(data) - reader.at)), np.uint8)
                bits = np.unpackbits(packed, bitorder="little")
                run = (
                    bits[: len(bits) // width * width].reshape(-1, width) @ weights if width else np.zeros(n, np.int64)
                )
            else:
                run = np.full(min(head >> 1, n - count), int.from_bytes(reader.take(-(-width // 8)), "little"))
            if not len(run):
                raise Broken("levels or positions that are none")
            runs.append(run)
            count += len(run)
    except IndexError:
        raise Broken(f"{count} of {n} levels or positions") from None
    return np.concatenate([np.empty(0, np.int64), *runs])[:n]


class _Compact:
    """Reads Thrift's compact protocol, in which page headers are written. IndexError where the bytes end."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def take(self, n: int) -> bytes:
        if self.at + n > len(self._data):
            raise IndexError
        self.at += n
        return self._data[self.at - n : self.at]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._data[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("no varint")

    def _integer(self) -> int:
        value = self.varint()
        return value >> 1 ^ -(value & 1)

    def struct(self) -> tuple[dict[int, Any], int]:
        """(values by field number, bytes read)."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self.take(1)[0]:
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = self._value(head & 15)
        return fields, self.at

    def _value(self, kind: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self.take(1)[0]
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:
            return self.take(8)
        if kind == 8:
            return self.take(self.varint())
        if kind in (9, 10):
            return self._list()
        if kind == 12:
            return self.struct()[0]
        raise ValueError(f"no type {kind}")

    def _list(self) -> list[Any]:
        head = self.take(1)[0]
        count = self.varint() if head >> 4 == 15 else head >> 4
        kind = head & 15
        return [self.take(1)[0] == 1 if kind in (1, 2) else self._value(kind) for _ in range(count)]
