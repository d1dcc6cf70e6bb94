"""Parquet files with images, laid out as Hugging Face's `datasets` writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ijckd_fast.data import Index

AS_STORED: dict[str, Any] = {"compression": "none", "use_dictionary": False}
"""How a column is written whose values are runs of bytes of the file."""


def features(names: Sequence[str] | None, **more: Any) -> dict[bytes, bytes]:
    """The schema's metadata of columns image and label."""
    label = {"names": list(names), "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    about = {"info": {"features": {"image": {"_type": "Image"}, "label": label, **more}}}
    return {b"huggingface": json.dumps(about).encode()}


def images_column(images: Sequence[bytes | None], binary: pa.DataType | None = None) -> pa.Array:
    """A struct of the bytes and a path."""
    rows = [None if image is None else {"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(images)]
    return pa.array(rows, pa.struct([("bytes", binary or pa.binary()), ("path", pa.string())]))


def write_table(path: Path, columns: dict[str, Any], about: dict[bytes, bytes] | None = None, **how: Any) -> None:
    """columns: arrays by name; about: the schema's metadata; how: arguments of the writer, default AS_STORED."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(about), path, **{**AS_STORED, **how})


def write_rows(
    path: Path, images: Sequence[bytes], labels: Sequence[int], names: Sequence[str] | None = None, **how: Any
) -> None:
    """One file with the columns image and label."""
    write_table(path, {"image": images_column(images), "label": pa.array(labels, pa.int64())}, features(names), **how)


def files_of(
    root: Path,
    folders: Index,
    layout: str = "data/{split}-{i:05d}-of-{n:05d}.parquet",
    per_file: int = 9,
    names: bool = True,
    **how: Any,
) -> None:
    """The images of an index of class folders as Parquet files below root, in its order."""
    starts = range(0, len(folders), per_file)
    split = {"val": "validation"}.get(folders.split, folders.split)
    for i, first in enumerate(starts):
        ids = range(first, min(first + per_file, len(folders)))
        write_rows(
            root / layout.format(split=split, i=i, n=len(starts)),
            [Path(folders.absolute(k)).read_bytes() for k in ids],
            [int(folders.labels[k]) for k in ids],
            folders.classes if names else None,
            **how,
        )
