"""Lists image files without opening them, and knows whether a folder or shard has changed since it was listed."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ijckd_fast.data.sources.passed_over import PassedOver, Tally, head_of_file

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo"),
    *(".png", ".apng", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Lower case; files with another extension are passed over and counted. The content decides how a file is read."""

SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"})
"""What file systems and archivers put beside images, thumbnails among it; skipped like hidden names."""

Stamp = tuple[str, int, int, int]
"""A folder or a shard relative to the root, its mtime_ns, ctime_ns and inode.

The ctime is there because tar and rsync set a folder's mtime back after they have put files into it; the inode because
another folder may be moved to its place."""

SETTLED_NS = 2_000_000_000  # two changes closer than a filesystem's clock ticks (FAT: 2 s) leave one time
_THREADS = 16  # they wait for the filesystem, a network's above all, rather than compute
_GROUPS_PER_TASK = 32
_NAMED = 3  # how many names an error spells out


@dataclass(frozen=True, eq=False)
class ImageTable:
    """What a shard says of its images, n of them, and is believed: the source has compared it with a checksum.

    format     a word for how they are stored
    sizes      [n, 2] int32 (width, height)
    checksums  [n] int64, of the bytes of each
    """

    format: str
    sizes: np.ndarray
    checksums: np.ndarray


@dataclass(frozen=True, eq=False)
class Listing:
    """The images of one group, n of them, in the order in which they stand in the index.

    paths    [n] relative to the root, as the bytes the filesystem has, with forward slashes
    lengths  [n] int64, bytes; -1 for a link to nothing; 0 with a negative offset: known when it has been read
    mtimes   [n] int64, ns; -1 likewise
    stamps   what shows that the group has changed: of the shard, or of the folder and every one below it; () where
             nothing does, also when it changed so shortly before that its next change may not show
    offsets  [n] int64, where each image is in its shard, as the source's place_in_shard takes it (a tar archive's: its
             first byte; negative: it is read in the order of the listing only); None for images in files of their own
    labels   [n] with offsets: what the shard says of each, a sequence or a dictionary array of strings
    table    with offsets: what the shard's own table says of each; None: every image is opened once, to learn it
    passed_over  files, or members of the shard, that are not read because of their names, or of their labels
    labels_from  with labels: what of the shard they were read from, in a few words
    """

    paths: pa.LargeBinaryArray
    lengths: np.ndarray
    mtimes: np.ndarray
    stamps: tuple[Stamp, ...]
    offsets: np.ndarray | None = None
    labels: Sequence[str] | pa.DictionaryArray = ()
    table: ImageTable | None = None
    passed_over: tuple[PassedOver, ...] = ()
    labels_from: str = ""


def list_groups(
    root: str,
    groups: Sequence[str],
    trusted: Callable[[str], tuple[Stamp, ...]],
    advance: Callable[[int], None],
    list_one: Callable[[str], Listing],
) -> list[Listing | None]:
    """What is in each of `groups`, folders or shards relative to root; None for one that is as `trusted(group)` says.

    trusted   the stamps to believe, () to list the group whatever they are
    advance   called with the number of groups that are done, now and then
    list_one  a source's list_group
    raises    OSError where a group cannot be read; what list_one raises
    """

    def look(part: Sequence[str]) -> list[Listing | None]:
        return [None if _as_before(root, trusted(group)) else list_one(group) for group in part]

    size = min(_GROUPS_PER_TASK, -(-len(groups) // _THREADS)) or 1  # a few large shards are read at the same time
    tasks = [groups[i : i + size] for i in range(0, len(groups), size)]
    found: list[Listing | None] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for part in pool.map(look, tasks):
                found += part
                advance(len(part))
        finally:  # interrupted: do not wait for what has not begun
            pool.shutdown(cancel_futures=True)
    return found


def _as_before(root: str, stamps: tuple[Stamp, ...]) -> bool:
    try:
        return bool(stamps) and all(stamp_of(root, stamp[0]) == stamp for stamp in stamps)
    except OSError:
        return False


def stamp_of(root: str, path: str) -> Stamp:
    """As it is now. Raises OSError."""
    status = os.stat(os.path.join(root, path))
    return path, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def settled(stamps: Sequence[Stamp], now_ns: int) -> tuple[Stamp, ...]:
    """The stamps, if a change since now_ns, before they were taken, would show in them; else ()."""
    return tuple(stamps) if all(max(mtime, ctime) < now_ns - SETTLED_NS for _, mtime, ctime, _ in stamps) else ()


def list_images(root: str, folder: str) -> Listing:
    """The image files at any depth below root/folder, by name; a subfolder's stand where its name does.

    Hidden names are skipped, other files counted.

    raises  OSError where a folder cannot be read
    """
    now = time.time_ns()
    stamps: list[Stamp] = []
    others = Tally()
    files = list(_walk(root, folder, stamps, others, frozenset()))
    paths, lengths, mtimes = zip(*files, strict=True) if files else ((), (), ())
    return Listing(
        pa.array(paths, pa.large_binary()),
        np.array(lengths, np.int64),
        np.array(mtimes, np.int64),
        settled(stamps, now),
        passed_over=others.counts(head_of_file(root)),
    )


def _walk(
    root: str, folder: str, stamps: list[Stamp], others: Tally, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[bytes, int, int]]:
    """(path, bytes, mtime_ns) of each image file. above: the folders on the way here, so that no link leads in circles.

    others  takes the other files
    """
    status = os.stat(os.path.join(root, folder))
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    # taken before the names are read: what comes or goes meanwhile makes it a stamp of the past
    stamps.append((folder, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
    for entry in sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name):
        if is_hidden(entry.name):
            continue
        path = f"{folder}/{entry.name}"
        if is_folder(entry):
            yield from _walk(root, path, stamps, others, above | {here})
        elif not entry.name.lower().endswith(IMAGE_EXTENSIONS):
            others.add(path)
        elif not _is_pipe(entry):
            yield os.fsencode(path), *file_state(entry)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is skipped, whatever it holds."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, which is nothing
        return False


def _is_pipe(entry: os.DirEntry[str]) -> bool:
    """Or a device: reading one may never end."""
    try:
        return not stat.S_ISREG(entry.stat().st_mode)
    except OSError:  # nothing is there to wait for
        return False


def file_state(file: os.DirEntry[str] | Path) -> tuple[int, int]:
    """(bytes, mtime_ns); (-1, -1) for a link to nothing, which is reported with the other unreadable files."""
    try:
        status = file.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def some(names: Sequence[str]) -> str:
    """The first few names, for an error's text."""
    shown = ", ".join(repr(name) for name in names[:_NAMED])
    return f"{shown}, and {len(names) - _NAMED} more" if len(names) > _NAMED else shown
