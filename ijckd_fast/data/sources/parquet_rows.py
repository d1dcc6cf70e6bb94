"""Images of a Parquet file that are compressed or encoded: read one after the other, row group by row group.

What `ijckd-fast pack` reads. Training does not: an image by itself costs all of its row group that lies before it.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ijckd_fast.data.sources.parquet_columns import Column, open_file
from ijckd_fast.errors import UserError

_AT_ONCE = 1 << 24  # bytes of images that a reader holds, about
_MOST_ROWS = 1024
_NULLS_AT_ONCE = 64  # rows


class ParquetRow(NamedTuple):
    """The bytes in one row of a column."""

    path: str
    column: Column
    row: int

    def open(self) -> BinaryIO:
        """The bytes, read at once."""
        return io.BytesIO(self.read())

    def read(self) -> bytes:
        """The bytes: at once where the same thread has just read the row before.

        raises  OSError; UserError where they are null, which is no fault of one image: nobody says what it was
        """
        status = os.stat(self.path)
        wanted = self.path, self.column, status.st_ino, status.st_mtime_ns, status.st_ctime_ns
        if getattr(_reading, "wanted", None) != wanted:
            _reading.wanted = _reading.reader = None  # which closes its file
            _reading.reader = _Reader(self.path, self.column)
            _reading.wanted = wanted
        return _reading.reader.read(self.row)


_reading = threading.local()


class _Reader:
    """Reads the rows of a file in ascending order; of another order each may cost a row group."""

    def __init__(self, path: str, column: Column) -> None:
        self.path, self.column = path, column
        try:
            self._file = open_file(path)
        except UserError as error:
            raise OSError(str(error)) from error
        about = self._file.metadata
        groups = [about.row_group(i) for i in range(about.num_row_groups)]
        self._ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
        self._sizes = [group.column(column.leaf).total_uncompressed_size for group in groups]
        self._group, self._first, self._images = -1, 0, pa.array([], pa.binary())
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._broken: dict[int, str] = {}  # by group, so that each is read to where it breaks once

    def read(self, row: int) -> bytes:
        """Raises OSError, one without an errno where the content is wrong; UserError where it is null."""
        group = int(np.searchsorted(self._ends, row, "right"))
        if group == len(self._ends):
            raise OSError(f"{self.path} has {self._ends[-1] if group else 0} rows, fewer than when it was indexed")
        if group in self._broken:
            raise OSError(self._broken[group])
        try:
            if group != self._group or row < self._first:
                self._begin(group)
            while row >= self._first + len(self._images):
                self._first += len(self._images)
                self._images = self.column.of(next(self._batches))
        except (pa.ArrowException, OSError, StopIteration) as error:
            self._group = -1
            if isinstance(error, OSError) and error.errno is not None:
                raise
            self._broken[group] = f"{self.path}, row group {group}: {str(error) or 'it ends too early'}"
            raise OSError(self._broken[group]) from error
        image = self._images[row - self._first].as_py()
        if image is None:
            with open_file(self.path) as file:
                refuse_nulls(self.path, self.column, null_rows(file, self.column))
        return image

    def _begin(self, group: int) -> None:
        rows = int(self._ends[group] - (self._ends[group - 1] if group else 0))
        size = max(1, min(_MOST_ROWS, _AT_ONCE * rows // max(1, self._sizes[group])))
        self._group, self._first, self._images = group, int(self._ends[group]) - rows, pa.array([], pa.binary())
        self._batches = self._file.iter_batches(size, [group], [self.column.name], use_threads=False)


def nulls_counted(group: pq.RowGroupMetaData, column: Column) -> int | None:
    """How many values of a column are null in a row group, by the footer; None where it does not say."""
    said = group.column(column.leaf).statistics
    return said.null_count if said is not None and said.has_null_count else None


def null_rows(file: pq.ParquetFile, column: Column) -> np.ndarray:
    """[n] bool, of every row: whether its value is null. Row groups that may have one are read, as far as it goes."""
    null, end = np.zeros(file.metadata.num_rows, bool), 0
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        at, end = end, end + group.num_rows
        if nulls_counted(group, column) == 0:
            continue
        try:
            for batch in file.iter_batches(_NULLS_AT_ONCE, [number], [column.name], use_threads=False):
                null[at : at + len(batch)] = pc.is_null(column.of(batch)).to_numpy(zero_copy_only=False)
                at += len(batch)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
    return null


def refuse_nulls(path: str, column: Column, null: np.ndarray) -> NoReturn:
    """UserError. null: [n] bool, of every row."""
    row, others = int(np.argmax(null)), int(null.sum()) - 1
    more = f" and {others} others" if others else ""
    remedy = (
        "write the file with the images' bytes in it, not only their paths"
        if null.all()
        else "remove these rows, or fix the file"
    )
    raise UserError(f"{path} must have a value of {column.name} in each row, found null in row {row}{more}; {remedy}")
