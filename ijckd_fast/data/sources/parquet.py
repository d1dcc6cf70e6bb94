"""Parquet files with a column of image files and a column of labels, as Hugging Face's `datasets` writes them.

Where the images' column is neither compressed nor encoded, each image is a run of bytes of the file, which is read in
any order (parquet_pages.py). Otherwise an image costs its row group: such files are not trained on, but packed once, in
one pass (parquet_rows.py).
"""

from __future__ import annotations

import os
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ijckd_fast.data.sources.listing import Listing, settled, some, stamp_of
from ijckd_fast.data.sources.names import counterparts, did_you_mean, require_distinct
from ijckd_fast.data.sources.parquet_columns import (
    Column,
    Columns,
    columns_of,
    described,
    is_text,
    not_intact,
    open_file,
)
from ijckd_fast.data.sources.parquet_pages import Broken, Chunk, Encoded, find_values
from ijckd_fast.data.sources.parquet_rows import ParquetRow, null_rows, nulls_counted, refuse_nulls
from ijckd_fast.data.sources.passed_over import NO_CLASS, Tally
from ijckd_fast.data.sources.places import Checked, Place
from ijckd_fast.data.sources.shards import class_names
from ijckd_fast.data.sources.source import Content, Fields, InOrder, Listed, Source
from ijckd_fast.errors import UserError

SUFFIX = ".parquet"
_NUMBERED = re.compile(
    r"(.*?)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet", re.IGNORECASE
)  # with a hash, as the hub once had


class ParquetFiles(Source):
    """See the module."""

    title = "Parquet files"
    in_shards = True
    takes_fields = ("image_column", "label_column")
    holds_many = (SUFFIX,)

    @classmethod
    def recognised_by(cls, content: Content) -> Sequence[str]:
        """The Parquet files, whatever lies beside them."""
        return [name for name in content.others if name.lower().endswith(SUFFIX)]

    def __init__(self, content: Content, label_file: str | Path | None, fields: Fields) -> None:
        """Reads the first file's footer, at every start: the schema, and what the classes are called."""
        super().__init__(content, label_file, fields)
        self._files = self.recognised_by(content)
        _require_all_files(content.folder, self._files)
        self._first = content.folder / self._files[0]
        with open_file(self._first) as file:
            self._columns = columns_of(self._first, file.schema_arrow, fields)
        if self._columns.names is not None:
            require_distinct(self._columns.names, f"the class names in the schema of {self._first}")

    def groups(self, classes: Sequence[str] | None, where: str) -> list[str]:
        """The files, in the order of their names."""
        return [self.content.below(name) for name in self._files]

    def unused(self) -> Sequence[str]:
        """Whatever lies beside the files."""
        files = set(self._files)
        return [*self.content.images, *(n for n in self.content.others if n not in files), *self.content.beside]

    @property
    def labels_asked(self) -> str:
        """The two columns, and the names that labels are given by."""
        return repr((self._columns.image.name, self._columns.label.name, self._columns.names))

    def list_group(self, group: str) -> Listing:
        """The rows of one file in their order; those with a negative label are counted and not listed.

        raises  OSError where it cannot be read; UserError where it is no intact Parquet file, has other columns than
                the first file, an image or a label that is null, or a label that is no class
        """
        root = str(self.content.root)
        now, stamp = time.time_ns(), stamp_of(root, group)
        path = os.path.join(root, group)
        with open_file(path) as file:
            columns = self._columns_of(path, file)
            labels, used = _labels(path, file, columns)
            offsets, lengths = _places(path, file, columns)
        rows = np.flatnonzero(used)
        skipped = Tally()
        for row in np.flatnonzero(~used).tolist():
            skipped.add(f"{group}/{columns.image.name}[{row}]", NO_CLASS)
        folder = f"{group}/{columns.image.name}["
        numbers = pa.array(rows).cast(pa.string())
        paths = pc.binary_join_element_wise(folder, numbers, pa.scalar("]"), pa.scalar(""))
        return Listing(
            paths.cast(pa.large_binary()),
            lengths[rows],
            np.full(len(rows), stamp[1], np.int64),
            settled([stamp], now),
            offsets[rows],
            labels.filter(pa.array(used)),
            labels_from=f"column {columns.label.name}",
            passed_over=skipped.counts(lambda path, length: b"", others=(NO_CLASS,)),
        )

    def _columns_of(self, path: str, file: pq.ParquetFile) -> Columns:
        """Of one file. UserError where they are others than the first file's."""
        first = self._columns
        schema = file.schema_arrow
        try:
            mine = columns_of(path, schema, Fields(image_column=first.image.name, label_column=first.label.name))
            same = all(a.type == b.type for a, b in zip(first[:2], mine[:2], strict=True)) and first.names == mine.names
        except UserError:
            same = False
        if not same:
            with open_file(self._first) as other:
                theirs = other.schema_arrow
            names = "" if described(schema) != described(theirs) else ", with other class names"
            raise UserError(
                f"the Parquet files of a split must have one schema, found {described(theirs)} in {self._first} and "
                f"{described(schema)}{names} in {path}; remove the files of the other data set, or write them anew "
                "with equal columns"
            )
        return mine

    def place_in_shard(
        self, shard: str, offset: int, length: int, checksum: int | None, size: tuple[int, int]
    ) -> Place:
        """offset: of the image's first byte, or -1 - its row where it has none."""
        if offset >= 0:
            return super().place_in_shard(shard, offset, length, checksum, size)
        place = ParquetRow(shard, self._columns.image, -1 - offset)
        return place if checksum is None else Checked(place, checksum)

    def labels(self, listed: Listed, classes: Sequence[str] | None) -> tuple[tuple[str, ...], np.ndarray]:
        """Names from the schema; else those of root/classes.txt for numbers, and sorted as they are for strings."""
        assert listed.numbers is not None
        if not len(listed.numbers) and (skipped := sum(listed.skipped)):
            raise UserError(
                f"{self.content.called} must have labels that name classes, found {skipped} images whose labels in "
                f"{self._columns.label.name} are all negative, as those of a test split are; give another split"
            )
        own = self._columns.names
        if own is None and is_text(self._columns.label.type):
            own = tuple(sorted(listed.labels))
            require_distinct(own, f"the class names in {self.content.folder}")
        if own is None:
            names, positions = class_names(self.content.root, listed.labels, classes, "Parquet files")
        else:
            names = own if classes is None else tuple(classes)
            number = self._positions(own, names)
            positions = np.array([number[label] for label in listed.labels], np.int64)
        return names, positions[listed.numbers]

    def _positions(self, own: Sequence[str], names: Sequence[str]) -> dict[str, int]:
        """The position in `names` of each of the files' own names. UserError for one that is none of them."""
        same = counterparts(own, names, f"classes in {self.content.folder}")
        if not same and self._columns.names is not None and len(own) == len(names):
            warnings.warn(
                f"the classes of {self.content.folder} are called otherwise than those expected ({own[0]!r} and "
                f"{names[0]!r}, and so on) and are taken for them by their numbers, 0 to {len(own) - 1}",
                stacklevel=5,
            )
            return {name: i for i, name in enumerate(own)}
        if others := [name for name in own if name not in same]:
            raise UserError(
                f"{self.content.folder} has the class {others[0]!r}, which is none of the {len(names)} classes "
                f"({some(names)}); name all of them in their order by --class-list, or fix the files"
                f"{did_you_mean(others, names)}"
            )
        position = {name: i for i, name in enumerate(names)}
        return {name: position[other] for name, other in same.items()}

    def only_in_order(self, offsets: np.ndarray) -> InOrder | None:
        """Where some of the images are compressed or encoded."""
        if not (offsets < 0).any():
            return None
        images = size = 0
        why = ""
        for name in self._files:
            with open_file(self.content.folder / name) as file:
                about = file.metadata
                images += about.num_rows
                size += _bytes(about, self._columns.image)
                why = why or _encoding(name, about, self._columns.image)
        return InOrder(images, size, why)


def _require_all_files(folder: Path, files: Sequence[str]) -> None:
    """UserError where files of a split are missing by their numbers, or are there twice."""
    numbers: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for name in files:
        if found := _NUMBERED.fullmatch(name):
            numbers[found[1], found[3]][int(found[2])] = name
    for (_, total), there in numbers.items():
        missing = sorted(set(range(int(total))) - set(there))
        if missing:
            raise UserError(
                f"{folder} must have all {int(total)} files that {next(iter(there.values()))} counts, found "
                f"{len(there)}, without number {', '.join(map(str, missing[:3]))}"
                f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}; fetch them, or rename the others to "
                "do without"
            )
    counted = [next(iter(there.values())) for there in numbers.values()]
    alone = [name for name in files if not _NUMBERED.fullmatch(name)] if counted else []
    if len(counted) + bool(alone) > 1:
        raise UserError(
            f"{folder} must have the files of a split once, found {some([*counted, *alone[:1]])}, of different sets; "
            "remove those of one of them"
        )


def _labels(path: str, file: pq.ParquetFile, columns: Columns) -> tuple[pa.DictionaryArray, np.ndarray]:
    """(what each of n rows says of its class, [n] bool: whether it has one: no negative number)."""
    column = columns.label
    try:
        found = column.of(file.read([column.name], use_threads=False))
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise not_intact(path, error) from error
    if pa.types.is_dictionary(found.type):
        found = found.cast(found.type.value_type)
    if found.null_count:
        refuse_nulls(path, column, pc.is_null(found).to_numpy(zero_copy_only=False))
    if not pa.types.is_integer(found.type):  # a class name, or true and false
        found = found.cast(pa.string())
        if empty := pc.sum(pc.equal(pc.utf8_length(found), 0)).as_py():
            row = pc.index(found, "").as_py()
            raise UserError(
                f"{path} must name the class in each row, found '' in row {row} and {empty - 1} others; fix it"
            )
        return found.dictionary_encode(), np.ones(len(found), bool)
    unsigned = pa.types.is_unsigned_integer(found.type)
    numbers = found.cast(pa.uint64() if unsigned else pa.int64()).to_numpy(zero_copy_only=False)
    names = columns.names
    if names is not None and len(numbers) and int(numbers.max()) >= len(names):
        row = int(np.argmax(numbers >= len(names)))
        raise UserError(
            f"{path} must have labels from 0 to {len(names) - 1}, the numbers of the {len(names)} classes that its "
            f"schema names, found {numbers[row]} in row {row} of {column.name}; fix the file, or name the column that "
            "is meant by --label-column"
        )
    there, at = np.unique(numbers, return_inverse=True)
    words = [names[number] if names is not None and number >= 0 else str(number) for number in there.tolist()]
    return pa.DictionaryArray.from_arrays(pa.array(at.astype(np.int32)), pa.array(words, pa.string())), numbers >= 0


def _places(path: str, file: pq.ParquetFile, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, lengths) [n] int64 of the images, -1 - row and 0 where they are no runs of bytes of the file."""
    about, column = file.metadata, columns.image
    offsets, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    leaf = file.schema.column(column.leaf)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for number in range(about.num_row_groups):
            chunk = about.row_group(number).column(column.leaf)
            if chunk.num_values == 0:
                continue
            if chunk.compression != "UNCOMPRESSED" or chunk.physical_type != "BYTE_ARRAY" or leaf.max_repetition_level:
                return _in_order(path, file, column)
            first = min(at for at in (chunk.dictionary_page_offset, chunk.data_page_offset) if at)
            levels = leaf.max_definition_level
            found = find_values(descriptor, Chunk(first, chunk.total_compressed_size, chunk.num_values, levels))
            offsets.append(found.offsets)
            lengths.append(found.lengths)
    except Encoded:
        return _in_order(path, file, column)
    except Broken as error:
        raise not_intact(path, f"row group {number} has {error}") from error
    finally:
        os.close(descriptor)
    at = np.concatenate(offsets)
    if (at < 0).any():
        refuse_nulls(path, column, at < 0)
    return at, np.concatenate(lengths)


def _in_order(path: str, file: pq.ParquetFile, column: Column) -> tuple[np.ndarray, np.ndarray]:
    """`_places` of images that are no runs of bytes.

    UserError where the footer counts images that are null; where it counts nothing they show when they are read.
    """
    about = file.metadata
    if any(nulls_counted(about.row_group(i), column) for i in range(about.num_row_groups)):
        refuse_nulls(path, column, null_rows(file, column))
    return -1 - np.arange(about.num_rows), np.zeros(about.num_rows, np.int64)


def _bytes(about: pq.FileMetaData, column: Column) -> int:
    """Of all images of a file, when they are neither compressed nor encoded; about."""
    return sum(about.row_group(i).column(column.leaf).total_uncompressed_size for i in range(about.num_row_groups))


def _encoding(name: str, about: pq.FileMetaData, column: Column) -> str:
    """How the images of a file are stored, in words; '' where they are stored as they are."""
    for number in range(about.num_row_groups):
        chunk = about.row_group(number).column(column.leaf)
        if chunk.compression != "UNCOMPRESSED":
            return f"column {column.name} of {name} compressed by {chunk.compression}"
        kinds = [kind for kind in chunk.encodings if kind not in ("PLAIN", "RLE", "BIT_PACKED")]
        if kinds or chunk.physical_type != "BYTE_ARRAY":
            return f"column {column.name} of {name} encoded ({', '.join(kinds) or chunk.physical_type})"
    return ""
