"""What is kept of a scan between two starts: for each split a Parquet file of verdicts, and a list of the bad files."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ijckd_fast.data.sources.listing import Stamp
from ijckd_fast.data.sources.passed_over import PassedOver
from ijckd_fast.files import replacing

CACHE_VERSION = "4"
CACHE_FOLDER = ".ijckd-index"
_ROWS_PER_GROUP = 1 << 16  # what is held twice while the file is read, and leaves holes in the memory

FACTS = np.dtype(
    [
        ("length", np.int64),  # bytes; -1: the verdict is never to be believed again
        ("mtime_ns", np.int64),
        ("width", np.int32),  # as stored, like height
        ("height", np.int32),
        ("orientation", np.int8),  # EXIF's tag, 1 to 8; 1: upright, or the file says nothing
        ("format", np.uint8),  # a Names number of what Pillow calls it; '' where it could not say
        ("reason", np.int32),  # a Names number; '': good
        ("variant", np.int32),  # a Names number of what variants.variant_of says; '': plain
        ("by", np.uint8),  # a check.By
        ("crc32", np.int64),  # of an image's bytes in a shard, or the checksum its table has; saved with MEMBERS
        ("full", bool),  # whether the verdict is what a full decode says, not only the header's
        ("known", bool),  # whether there is a verdict; not saved
    ]
)
"""One file."""

MEMBERS = np.dtype([("offset", np.int64), ("label", np.int32)])
"""Where one image begins in its shard, and a Names number of what the shard says of it."""

_PLAIN = ("length", "mtime_ns", "width", "height", "orientation", "full", "by")
_NAMED = {"format": "formats", "reason": "reasons", "variant": "variants"}  # columns, and whose numbers they are


class Names:
    """Strings by number, in order of appearance; number 0 is ''."""

    def __init__(self) -> None:
        self._names = [""]
        self._numbers = {"": 0}

    def number(self, name: str) -> int:
        """The number of `name`, a new one if need be."""
        if name not in self._numbers:
            self._numbers[name] = len(self._names)
            self._names.append(name)
        return self._numbers[name]

    def __getitem__(self, number: int) -> str:
        return self._names[number]

    def __len__(self) -> int:
        return len(self._names)

    def numbers(self, column: pa.DictionaryArray) -> np.ndarray:
        """[n] int64, from the numbers of a column's own dictionary."""
        mine = np.array([self.number(name) for name in column.dictionary.to_pylist()] or [0], np.int64)
        return mine[column.indices.to_numpy(zero_copy_only=False)]

    def column(self, numbers: np.ndarray) -> pa.DictionaryArray:
        """The inverse of `numbers`."""
        return pa.DictionaryArray.from_arrays(pa.array(numbers.astype(np.int32)), pa.array(self._names, pa.string()))


@dataclass(frozen=True)
class Group:
    """The files below one folder, consecutive rows of Files."""

    folder: str  # relative to the root; or a shard, whose images are its rows
    rows: int
    stamps: tuple[Stamp, ...]  # of the folders when these rows were listed; () if that can no longer be relied on
    passed_over: tuple[PassedOver, ...] = ()  # what lies there besides
    labels_from: str = ""  # what of a shard says its labels, see Listing


@dataclass(eq=False)
class Files:
    """What is known of the image files of a split, N of them, folder after folder.

    paths    [N] large_binary, relative to the root
    facts    [N] of dtype FACTS
    groups   which rows belong to which folder
    formats, reasons, variants   what facts['format'], facts['reason'] and facts['variant'] number
    members  [N] of dtype MEMBERS where the images lie in shards, else None
    labels   what members['label'] numbers
    compared_with   the versions whose pixels facts['by'] is about; '': none were compared
    labels_asked    where the labels were to be, see Source.labels_asked
    """

    paths: pa.ChunkedArray
    facts: np.ndarray
    groups: list[Group]
    formats: Names
    reasons: Names
    members: np.ndarray | None = None
    labels: Names = dataclasses.field(default_factory=Names)
    variants: Names = dataclasses.field(default_factory=Names)
    compared_with: str = ""
    labels_asked: str = ""

    @classmethod
    def none(cls) -> Files:
        """Nothing is known."""
        return cls(pa.chunked_array([], pa.large_binary()), np.empty(0, FACTS), [], Names(), Names())


def cache_homes(root: Path, cache_dir: str | Path | None) -> list[Path]:
    """Folders to look in and to write to, in order of preference."""
    if cache_dir is not None:
        return [Path(cache_dir)]
    homes = [root / CACHE_FOLDER]
    # os.path's: Path.home() raises where the user has none
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(user_cache):
        homes.append(Path(user_cache, "ijckd-fast", hashlib.sha256(os.fsencode(root)).hexdigest()[:16]))
    return homes


def load_files(homes: Iterable[Path], split: str) -> Files:
    """What was saved last; Files.none() when that is nothing, or damaged (with a warning)."""
    # os.path's: Path.is_file() raises where a home may not be looked into
    paths = [path for home in homes if os.path.isfile(path := home / f"{split}.parquet")]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            return _read(path)
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"the index {path} cannot be read and is built again ({error})", stacklevel=4)
    return Files.none()


def _read(path: Path) -> Files:
    with _system_memory(), pq.ParquetFile(path, page_checksum_verification=True) as file:
        about = file.metadata.metadata or {}
        if about.get(b"ijckd_index") != CACHE_VERSION.encode():
            raise ValueError("written by another version")
        folders = about[b"folders"]
        if about[b"folders_crc32"] != _crc32(folders):  # Parquet's own checksums are those of the rows
            raise ValueError("its list of folders is damaged")
        files = Files.none()
        files.compared_with = about[b"compared_with"].decode()
        files.labels_asked = about.get(b"labels_asked", b"").decode()  # not there: from before there was a choice
        files.groups = [
            Group(
                folder,
                rows,
                tuple((name, *state) for name, *state in stamps),
                tuple(map(PassedOver._make, passed)),
                *said,
            )
            for folder, rows, stamps, passed, *said in json.loads(folders)
        ]
        files.facts = np.empty(file.metadata.num_rows, FACTS)
        if "offset" in file.schema_arrow.names:
            files.members = np.empty(file.metadata.num_rows, MEMBERS)
            if "crc32" not in file.schema_arrow.names:
                raise ValueError("it is from before images in shards had checksums")
        paths, done = [], 0
        for i in range(file.num_row_groups):
            table = file.read_row_group(i).combine_chunks()
            if len(table) == 0:  # of a split without files, with no chunk either
                continue
            facts = files.facts[done : done + len(table)]
            for name in _PLAIN:
                facts[name] = table[name].to_numpy()
            for name, names in _NAMED.items():
                facts[name] = getattr(files, names).numbers(table[name].chunk(0))
            facts["known"] = True
            if files.members is not None:
                members = files.members[done : done + len(table)]
                members["offset"], facts["crc32"] = table["offset"].to_numpy(), table["crc32"].to_numpy()
                members["label"] = files.labels.numbers(table["label"].chunk(0))
            paths.append(table["path"].chunk(0))
            done += len(table)
        files.paths = pa.chunked_array(paths, pa.large_binary())
    if sum(group.rows for group in files.groups) != len(files.facts):
        raise ValueError("its list of folders is not that of its files")
    return files


@contextlib.contextmanager
def _system_memory() -> Iterator[None]:
    """Inside, Arrow takes memory from malloc.

    Its own allocator asks for huge pages. Where memory is scarce or scattered, the kernel takes seconds to make them.
    """
    usual = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(usual)


def _crc32(data: bytes) -> bytes:
    return f"{zlib.crc32(data):08x}".encode()


def save_files(homes: Sequence[Path], split: str, files: Files) -> Path | None:
    """Writes split.parquet and split.quarantine.json into the first home that takes them; returns that home.

    Files without a verdict are left out, and their folders are listed again by the next start. Warns and returns None
    where nothing can be written.
    """
    paths, facts, members, groups = files.paths, files.facts, files.members, files.groups
    if not facts["known"].all():
        known = facts["known"]
        ends = np.cumsum([group.rows for group in groups])
        left = [int(known[end - group.rows : end].sum()) for end, group in zip(ends, groups, strict=True)]
        groups = [
            group if rows == group.rows else dataclasses.replace(group, rows=rows, stamps=())
            for group, rows in zip(groups, left, strict=True)
        ]
        paths, facts, members = (
            paths.filter(pa.array(known)),
            facts[known],
            members if members is None else members[known],
        )
    folders = json.dumps([(g.folder, g.rows, g.stamps, g.passed_over, g.labels_from) for g in groups]).encode()
    columns: dict[str, pa.Array | pa.ChunkedArray] = {"path": paths}
    columns |= {name: pa.array(facts[name]) for name in _PLAIN}
    columns |= {name: getattr(files, names).column(facts[name]) for name, names in _NAMED.items()}
    if members is not None:
        columns |= {
            "offset": pa.array(members["offset"]), "label": files.labels.column(members["label"]),
            "crc32": pa.array(facts["crc32"]),
        }  # fmt: skip
    table = pa.table(columns)
    about = {
        "ijckd_index": CACHE_VERSION, "folders": folders, "folders_crc32": _crc32(folders),
        "compared_with": files.compared_with, "labels_asked": files.labels_asked,
    }  # fmt: skip
    bad = [
        {"path": os.fsdecode(paths[int(i)].as_py()), "reason": files.reasons[facts["reason"][i]]}
        for i in np.flatnonzero(facts["reason"])
    ]

    def write_table(path: Path) -> None:
        with pq.ParquetWriter(
            path,
            table.schema,
            use_dictionary=[name for name in (*_NAMED, "label") if name in columns],
            compression="lz4",
            column_encoding={"path": "DELTA_LENGTH_BYTE_ARRAY"},  # read in half of PLAIN's time
            write_page_checksum=True,
        ) as writer:
            writer.write_table(table, _ROWS_PER_GROUP)
            writer.add_key_value_metadata(about)

    failure: OSError | None = None
    for home in homes:
        try:
            home.mkdir(parents=True, exist_ok=True)
            # two processes may have scanned the same folder: shared
            with replacing(report_path(home, split), shared=True) as path:
                path.write_text(json.dumps(bad, indent=1) + "\n")
            with replacing(home / f"{split}.parquet", shared=True) as path:
                write_table(path)
            return home
        except OSError as error:  # read-only data folder: the next home
            failure = error
    warnings.warn(
        f"the index could not be saved, so that every start will check all files again ({failure}): make "
        f"{' or '.join(str(home.parent) for home in homes)} writable, or set XDG_CACHE_HOME to a folder that is",
        stacklevel=4,
    )
    return None


def report_path(home: Path, split: str) -> Path:
    """The list of the files that are left out."""
    return home / f"{split}.quarantine.json"
