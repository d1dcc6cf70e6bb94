"""Which columns of a Parquet file hold the images and the labels, and what the classes are called.

By the schema, and by what Hugging Face's `datasets` writes beside it: the features, with the names of the classes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ijckd_fast.data.sources.listing import some
from ijckd_fast.data.sources.source import Fields
from ijckd_fast.errors import UserError

_BYTES, _PATH = "bytes", "path"  # what `datasets` calls the fields of an image
_LABEL = re.compile(r"label|class|categor|target|species|breed|wnid|synset")  # in a column's name, lower case
_INDEX = "__index_level_"  # how pandas calls its own column
_SHOWN = 12  # columns that an error lists


class Column(NamedTuple):
    """A column of one file.

    parts  its name, and those of the fields of structs below it
    leaf   its number among the columns as they are stored, in which structs are not
    """

    parts: tuple[str, ...]
    leaf: int
    type: pa.DataType

    @property
    def name(self) -> str:
        """As options have it."""
        return ".".join(self.parts)

    def of(self, table: pa.Table | pa.RecordBatch) -> pa.Array:
        """What was read of it, structs and chunks resolved; null where a struct above it is."""
        found = table.column(self.parts[0])
        found = found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
        for part in self.parts[1:]:
            found = pc.struct_field(found, part)
        return found


class Columns(NamedTuple):
    """The columns of one file that are read.

    names  of the classes, in the order of their numbers; None: nothing says them
    """

    image: Column
    label: Column
    names: tuple[str, ...] | None


def open_file(path: str | Path) -> pq.ParquetFile:
    """A file, of which the footer alone has been read. Raises UserError where it is none, or encrypted; OSError."""
    try:
        # a buffer: without one a whole row group's column is in the memory before its first value is there
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, thrift_container_size_limit=1 << 30)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise not_intact(path, error) from error
    if _end(path)[0] > file.metadata.serialized_size:
        # A footer that can be read although columns are encrypted is signed: the signature stands behind it. Asked for
        # such a column, pyarrow ends the process.
        file.close()
        raise _encrypted(path, "encrypted columns")
    return file


def _end(path: str | Path) -> tuple[int, bytes]:
    """(bytes of the footer, the file's last 4 bytes)."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 8))
        data = file.read(8)
    return int.from_bytes(data[:4], "little"), data[4:]


def _encrypted(path: str | Path, what: str) -> UserError:
    return UserError(
        f"{path} must be a Parquet file without encryption, found {what}; read it with its keys and write it without"
    )


def not_intact(path: str | Path, why: object) -> UserError:
    """What to say of a file that is cut, or none."""
    text = " ".join(str(why).split())
    if _end(path)[1] == b"PARE":
        return _encrypted(path, "an encrypted footer")
    with open(path, "rb") as file:
        pointer = file.read(24).startswith(b"version https://git-lfs")
    if pointer:
        remedy = "it is Git LFS's pointer to the file: git lfs pull fetches the file itself"
    else:
        remedy = "fetch it again, or remove it to do without its images"
    return UserError(f"{path} must be an intact Parquet file, found: {text}; {remedy}")


def columns_of(path: str | Path, schema: pa.Schema, fields: Fields) -> Columns:
    """The columns of a file. Raises UserError where what is asked for is not there, or nothing says which are meant."""
    there = list(_columns(schema))
    features = _features(schema)
    image = _image(path, there, features, fields.image_column)
    label = _label(path, there, (*image.parts[:-1], _PATH), features, fields.label_column)
    feature = _feature(features, label.parts)
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    return Columns(image, label, tuple(map(str, names)) if isinstance(names, list) else None)


def described(schema: pa.Schema) -> str:
    """The columns and their types, for an error."""
    shown = [f"{field.name}: {_said(field.type)}" for field in list(schema)[:_SHOWN]]
    return ", ".join(shown) + (f", and {len(schema) - _SHOWN} more" if len(schema) > _SHOWN else "")


def _said(kind: pa.DataType) -> str:
    text = str(kind)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _columns(schema: pa.Schema) -> Iterator[Column]:
    """All columns and, after each struct, its fields."""

    def below(parts: tuple[str, ...], kind: pa.DataType, leaf: int) -> Iterator[Column]:
        yield Column(parts, leaf, kind)
        if pa.types.is_struct(kind):
            for field in kind:
                yield from below((*parts, field.name), field.type, leaf)
                leaf += _leaves(field.type)

    leaf = 0
    for field in schema:
        yield from below((field.name,), field.type, leaf)
        leaf += _leaves(field.type)


def _leaves(kind: pa.DataType) -> int:
    """How many columns are stored for one of this type."""
    if isinstance(kind, pa.BaseExtensionType):
        return _leaves(kind.storage_type)
    if pa.types.is_nested(kind) and not pa.types.is_dictionary(kind):
        return sum(_leaves(kind.field(i).type) for i in range(kind.num_fields))
    return 1


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What `datasets` says of the columns; {} where it does not."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _feature(features: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    found: Any = features
    for part in parts:
        found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _image(path: str | Path, there: Sequence[Column], features: dict[str, Any], asked: str | None) -> Column:
    """The column with the images' bytes."""
    holds = "bytes of image files (binary, or a struct with a binary field 'bytes')"
    alike = {column.name: found for column in there if (found := _binary(column, there)) is not None}
    if asked is not None:
        return alike[_named(path, asked, there, alike, "--image-column", holds).name]
    candidates: dict[str, Column] = {}
    for name, column in alike.items():
        if column not in candidates.values():  # the bytes within a struct are the struct's
            candidates[name] = column
    marked = {n: c for n, c in candidates.items() if _feature(features, n.split(".")).get("_type") == "Image"}
    return _only(path, marked or candidates, there, "--image-column", holds)


def _binary(column: Column, there: Sequence[Column]) -> Column | None:
    """The binary column that a column is, or has as its field `bytes`."""
    if _is_binary(column.type):
        return column
    if pa.types.is_struct(column.type):
        inner = (*column.parts, _BYTES)
        return next((other for other in there if other.parts == inner and _is_binary(other.type)), None)
    return None


def _is_binary(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _label(
    path: str | Path, there: Sequence[Column], other: tuple[str, ...], features: dict[str, Any], asked: str | None
) -> Column:
    """The column with the labels. other: the parts of one that is none, the image's path."""
    holds = "labels (integers or strings)"
    alike = {column.name: column for column in there if _is_label(column.type)}
    if asked is not None:
        return _named(path, asked, there, alike, "--label-column", holds)
    marked = {n: c for n, c in alike.items() if _feature(features, c.parts).get("_type") == "ClassLabel"}
    called = {n: c for n, c in alike.items() if _LABEL.search(c.parts[-1].lower())}
    others = {n: c for n, c in alike.items() if not n.startswith(_INDEX) and c.parts != other}
    return _only(path, marked or called or others, there, "--label-column", holds)


def _is_label(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind) or is_text(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether labels of this type are class names."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _named(
    path: str | Path, asked: str, there: Sequence[Column], alike: dict[str, Column], option: str, holds: str
) -> Column:
    found = next((column for column in there if column.name == asked), None)
    if found is None or asked not in alike:
        what = "no such column" if found is None else f"{_said(found.type)}"
        raise UserError(
            f"{option} {asked} must name a column of {path} that holds {holds}, found {what}; its columns are "
            f"{_all(there)}"
        )
    return found


def _only(path: str | Path, candidates: dict[str, Column], there: Sequence[Column], option: str, holds: str) -> Column:
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    if not candidates:
        raise UserError(
            f"{path} must have a column that holds {holds}, found {_all(there)}; name the column by {option}, or write "
            "the file with one"
        )
    raise UserError(
        f"{path} must have one column that holds {holds}, found {len(candidates)} ({some(list(candidates))}) among "
        f"{_all(there)}; name the one that is meant by {option}, e.g. {option} {next(iter(candidates))}"
    )


def _all(there: Sequence[Column]) -> str:
    return described(pa.schema([pa.field(column.name, column.type) for column in there if len(column.parts) == 1]))
