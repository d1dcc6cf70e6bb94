"""The index of one split: every image file looked at once, then only its size and modification time, or only its folder's.

`build_index` lists root/split/<class>/, decodes each file once to learn whether it can be trained on, and remembers the
verdicts in a Parquet file. Files that cannot be decoded are set aside with their reason; training goes on without them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ijckd_fast.data.counter_rng import permutation, uniforms
from ijckd_fast.data.index.kept import FACTS, MEMBERS, Files, Group, cache_homes, load_files, report_path, save_files
from ijckd_fast.data.sources.label_files import labels_of, read_class_list, read_labels
from ijckd_fast.data.sources.listing import Listing, file_state, layout, list_folders, list_images, some
from ijckd_fast.data.sources.shards import Extent, class_names, list_shard, read_extent
from ijckd_fast.errors import UserError

# What Pillow and DALI decode to the same RGB pixels. Pillow also opens GIF and AVIF, which DALI's decoder refuses, and
# float, 32-bit and LAB pixels, which the two convert differently.
_FORMATS = frozenset({"JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM"})
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L"})
_ORIENTATION = 274  # EXIF's tag. Pillow rotates TIFFs by it (and no other format), DALI is told not to

_FILES_PER_TASK = 64  # one task of the pool: long enough to hide the pool, short enough for a live progress bar
_HASHED_AT_ONCE = 1 << 16  # files: what fits the processor's cache
_SAVE_EVERY = 300.0  # seconds of decoding that a killed scan loses at most


class Paths(Sequence[str]):
    """File names, relative to the data folder, in one run of bytes: a str each would take twice the memory, and minutes to make."""

    def __init__(self, encoded: pa.ChunkedArray) -> None:
        """encoded: [N] large_binary, file names as the filesystem has them, which need not be UTF-8."""
        self._encoded = encoded

    @classmethod
    def of(cls, paths: Iterable[str]) -> Paths:
        """The same of strings."""
        return cls(pa.chunked_array([pa.array(map(os.fsencode, paths), pa.large_binary())]))

    def __len__(self) -> int:
        return len(self._encoded)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> Paths: ...
    def __getitem__(self, i: int | slice) -> str | Paths:
        if isinstance(i, slice):
            return self.take(np.arange(*i.indices(len(self))))
        return os.fsdecode(self._encoded[int(i)].as_py())

    def take(self, ids: np.ndarray) -> Paths:
        """The paths at `ids` [n] int64, in their order."""
        return Paths(self._encoded.take(pa.array(ids)))

    def joined(self) -> Iterator[pa.Buffer]:
        """The bytes of the paths with a NUL between each two, in pieces; a NUL belongs between the pieces too."""
        nul = pa.scalar(b"\0", pa.large_binary())
        for chunk in self._encoded.chunks:
            for first in range(0, len(chunk), _HASHED_AT_ONCE):
                part = chunk.slice(first, _HASHED_AT_ONCE)
                yield pc.binary_join(pa.LargeListArray.from_arrays([0, len(part)], part), nul)[0].as_buffer()

    @property
    def joined_length(self) -> int:
        """Bytes of all paths, with a NUL between each two."""
        return pc.sum(pc.binary_length(self._encoded)).as_py() + len(self) - 1


@dataclass(frozen=True, eq=False)
class Index:
    """One split's images in a fixed order: class folders in label order, names within sorted; or shard by shard, as they lie there.
    An image's id is its position.

    root         absolute path of the data folder
    split        'train' or 'val'
    classes      class folder names, sorted unless another order was asked for; a label is a position in it
    paths        [N] relative to root, with forward slashes; in a shard, the shard's and the member's name
    labels       [N] int64
    sizes        [N, 2] int32, (width, height) as stored: an EXIF orientation is ignored, as torchvision does
    quarantined  (relative path, reason) of every file left out
    hash         hex digest of classes, paths, labels, sizes and file lengths; not of root or times, so that a copy of
                 the data on another machine has the same
    shards       relative paths of the archives that hold the images; () for images in files of their own
    members      [N, 3] int64 (position in shards, first byte, bytes); with shards
    """

    root: str
    split: str
    classes: tuple[str, ...]
    paths: Paths
    labels: np.ndarray
    sizes: np.ndarray
    quarantined: list[tuple[str, str]]
    hash: str
    shards: tuple[str, ...] = ()
    members: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def absolute(self, i: int) -> str:
        """The path of image i to open; of one in a shard, its name."""
        return os.path.join(self.root, self.paths[i])

    def extent(self, i: int) -> Extent:
        """Where image i lies in its shard."""
        assert self.members is not None, "images in files of their own"
        shard, offset, length = self.members[i].tolist()
        return Extent(os.path.join(self.root, self.shards[shard]), offset, length)

    def subset(self, per_class: int | None = None, label_noise: float = 0.0, seed: int = 0) -> Index:
        """A smaller or noisier index, a pure function of (this index, arguments).

        per_class    keep this many images of each class, the first in a seeded order; None keeps all
        label_noise  in [0, 1]: this fraction of all kept images (rounded to a whole number) gets another label, drawn
                     uniformly from the other classes
        raises       UserError for a value out of range or a class with fewer images than per_class
        The kept images stay in their order and are renumbered from 0. `hash` changes with the arguments.
        """
        if per_class is None and label_noise == 0:
            return self
        if not 0 <= label_noise <= 1:
            raise UserError(
                f"label noise must be a fraction between 0 and 1, found {label_noise}; set it to 0 for clean labels"
            )
        keep = np.arange(len(self))
        if per_class is not None:
            counts = np.bincount(self.labels, minlength=self.num_classes)
            smallest = int(counts.argmin())
            if not 1 <= per_class <= counts[smallest]:
                raise UserError(
                    f"{per_class} images per class wanted, but the {self.split} class {self.classes[smallest]!r} has "
                    f"{counts[smallest]}; choose a number from 1 to {counts[smallest]}"
                )
            order = permutation(seed, _SUBSET_STREAM, len(self))
            by_class = order[np.argsort(self.labels[order], kind="stable")]  # classes in turn, each in its seeded order
            first = np.concatenate([[0], np.cumsum(counts)[:-1]])
            keep = np.sort((by_class[first[:, None] + np.arange(per_class)]).ravel())
        labels = self.labels[keep]
        if label_noise > 0:
            if self.num_classes < 2:
                raise UserError("label noise needs at least two classes, found one; set label noise to 0")
            chosen = permutation(seed, _NOISE_STREAM, len(keep))[: round(label_noise * len(keep))]
            shift = 1 + np.floor(uniforms(seed, _NOISE_STREAM, chosen, 1)[:, 0] * (self.num_classes - 1)).astype(
                np.int64
            )
            labels[chosen] = (labels[chosen] + shift) % self.num_classes
        digest = hashlib.sha256(f"{self.hash} subset {per_class} {label_noise!r} {seed}".encode()).hexdigest()
        return dataclasses.replace(
            self,
            paths=self.paths.take(keep),
            labels=labels,
            sizes=self.sizes[keep],
            hash=digest,
            members=None if self.members is None else self.members[keep],
        )


_SUBSET_STREAM = 0x5B5E7
_NOISE_STREAM = 0x2015E


@dataclass(frozen=True, eq=False)
class Scan:
    """An index and what was seen on the way to it.

    files    every file, those left out too
    home     where the verdicts and the list of the bad files are kept; None where nothing could be written
    opened   files that were opened, and the seconds that took
    """

    index: Index
    files: Files
    home: Path | None
    opened: int
    opening_seconds: float


def build_index(
    root: str | Path,
    split: Literal["train", "val"],
    *,
    classes: Sequence[str] | None = None,
    class_list: str | Path | None = None,
    labels: str | Path | None = None,
    workers: int = 0,
    verify: Literal["full", "fast"] = "full",
    refresh: bool = False,
    trust_folders: bool = False,
    progress: bool = False,
    cache_dir: str | Path | None = None,
) -> Index:
    """Indexes root/split/<class>/**, or the webdataset shards root/split/*.tar, decoding only what is new or changed since the last
    time.

    classes    the class folders there must be, in the order of their labels, e.g. the train index's for val; default: sorted
    class_list a file that names them, one in a line, where there are no `classes`
    labels     a file that names the class of every image, see label_files.read_labels; for images that lie in root/split itself
    workers    threads that decode; 0 = one per core this process may use
    verify     'full' decodes every file to its last pixel; 'fast' reads header and trailer and decodes only what looks
               odd, so that damage inside a file goes unseen
    refresh    forget earlier verdicts
    trust_folders  take it that a folder holds what it held as long as its own times are the same, instead of asking for the
               length and time of every file: seconds for millions of files, but one rewritten in place goes unseen. Files
               left out before are looked at all the same
    progress   show a progress bar on stderr while folders are listed and files are decoded
    cache_dir  where to keep the index files; default root/.ijckd-index or, where that cannot be written, a folder below
               the user's cache directory ($XDG_CACHE_HOME, else ~/.cache)
    warns      once with the number of files left out and where their list is; when a cached index is damaged
    raises     UserError: no such folder, no class folder, a class without a readable image, classes unlike `classes` or the
               class list, labels unlike the images, a damaged shard
    """
    return scan(
        root,
        split,
        classes=classes,
        class_list=class_list,
        labels=labels,
        workers=workers,
        verify=verify,
        refresh=refresh,
        trust_folders=trust_folders,
        progress=progress,
        cache_dir=cache_dir,
    ).index


def scan(
    root: str | Path,
    split: Literal["train", "val"],
    *,
    classes: Sequence[str] | None = None,
    class_list: str | Path | None = None,
    labels: str | Path | None = None,
    workers: int = 0,
    verify: Literal["full", "fast"] = "full",
    refresh: bool = False,
    trust_folders: bool = False,
    progress: bool = False,
    cache_dir: str | Path | None = None,
) -> Scan:
    """build_index, with what a summary needs besides."""
    root = Path(root).resolve()
    if split not in ("train", "val"):
        raise UserError(f"split must be 'train' or 'val', found {split!r}")
    if verify not in ("full", "fast"):
        raise UserError(f"verify must be 'full' or 'fast', found {verify!r}")
    folders, shards, loose = layout(root, split)
    named = None
    if labels is not None:
        if folders or shards:
            kind = "class folders" if folders else "webdataset shards"
            raise UserError(
                f"the label file {labels} is for images that lie in {root / split} itself, but there are {kind} "
                f"({some(folders or shards)}), which say the class of what is in them; leave the label file out"
            )
        named = read_labels(labels)
        folders = tuple(sorted({label.name for label in named.values()}))
    elif not folders and not shards:
        raise UserError(
            f"wanted class folders of images, {root / split}/<class>/*.jpg, but {root / split} holds {loose} image files and no "
            "class folder; sort them into one folder per class, or give a file that names the class of each as --val-labels "
            "(for ImageNet's validation set, Kaggle's LOC_val_solution.csv)"
        )
    where = "the training data has"
    if classes is None and class_list is not None:
        classes, where = read_class_list(class_list), f"{class_list} lists"
    if classes is not None and set(classes) != set(folders) and named is None and not shards:
        raise UserError(_other_classes(root / split, tuple(classes), folders, where))
    names = folders if classes is None else tuple(classes)

    homes = cache_homes(root, cache_dir)
    known = Files.none() if refresh else load_files(homes, split)
    groups = [f"{split}/{name}" for name in shards or names] if named is None else [split]
    # a shard's own times tell of every image in it
    files = _list(
        root, split, groups, known, trust_folders or bool(shards), list_shard if shards else list_images, progress
    )
    if files.members is not None:
        there = np.unique(files.members["label"])
        names, positions = class_names(root, [files.labels[i] for i in there], classes)
        label_of = positions[np.searchsorted(there, files.members["label"])]
    elif named is None or labels is None:
        label_of = np.repeat(np.arange(len(names)), [group.rows for group in files.groups])
    else:
        files_there = (os.path.basename(path) for path in Paths(files.paths))
        label_of = labels_of(files_there, named, names, labels, root / split)
    todo = np.flatnonzero(~files.facts["known"] | (~files.facts["full"] & (verify == "full")))
    # os.path's: Path.is_file() raises where a home may not be looked into
    home = next((home for home in homes if os.path.isfile(report_path(home, split))), None)
    before = files.facts[todo]
    began = time.perf_counter()
    try:
        if len(todo):
            files.facts["known"][todo] = False
            _check_all(root, files, todo, verify == "full", workers, progress, lambda: save_files(homes, split, files))
    finally:  # also when interrupted: what was decoded so far need not be decoded again
        seconds = time.perf_counter() - began
        if files.groups != known.groups or (files.facts[todo] != before).any():
            home = save_files(homes, split, files)
    index = _assemble(root, split, names, files, label_of, home)
    return Scan(index, files, home, len(todo), seconds)


def _other_classes(folder: Path, wanted: tuple[str, ...], found: tuple[str, ...], where: str) -> str:
    missing = sorted(set(wanted) - set(found))
    extra = sorted(set(found) - set(wanted))
    parts = [f"{len(missing)} missing ({some(missing)})"] if missing else []
    parts += [f"{len(extra)} unexpected ({some(extra)})"] if extra else []
    return (
        f"{folder} must have the {len(wanted)} class folders that {where}, found {len(found)}: {', '.join(parts)}; make the "
        "names equal"
    )


def _list(
    root: Path,
    split: str,
    folders: Sequence[str],
    known: Files,
    trust: bool,
    list_one: Callable[[str, str], Listing],
    progress: bool,
) -> Files:
    """The files that are in `folders` now, with the verdicts that still hold. May reuse and change the arrays of `known`."""
    stamps = {group.folder: group.stamps for group in known.groups} if trust else {}
    try:
        with _progress(progress) as bar:
            line = bar.add_task(f"listing {split}", total=len(folders))
            listed = list_folders(
                str(root), folders, lambda folder: stamps.get(folder, ()), lambda n: bar.advance(line, n), list_one
            )
    except OSError as error:
        raise UserError(
            f"the images in {root / split} must be readable, found: {error}; mend it and run again"
        ) from error
    merged = _merge(known, folders, listed)
    first = 0
    for group, listing in zip(merged.groups, listed, strict=True):
        rows = slice(first, first := first + group.rows)
        # a file left out may have been mended where it lies, or a link's target come back
        if listing is None and merged.members is None:
            _look_again(root, merged, rows.start + np.flatnonzero(merged.facts["reason"][rows]))
    return merged


def _merge(known: Files, folders: Sequence[str], listed: Sequence[Listing | None]) -> Files:
    if [group.folder for group in known.groups] == list(folders) and not any(listed):
        return known
    ends = np.cumsum([group.rows for group in known.groups], dtype=np.int64).tolist()
    before = {group.folder: (end - group.rows, group) for end, group in zip(ends, known.groups, strict=True)}
    paths: list[pa.LargeBinaryArray] = []
    facts: list[np.ndarray] = []
    members: list[np.ndarray] = []
    groups = []
    for folder, listing in zip(folders, listed, strict=True):
        first, group = before.get(folder, (0, Group(folder, 0, ())))
        old_paths, old_facts = known.paths.slice(first, group.rows), known.facts[first : first + group.rows]
        if listing is None:
            paths += old_paths.chunks
            facts.append(old_facts)
            if known.members is not None:
                members.append(known.members[first : first + group.rows])
        else:
            paths.append(listing.paths)
            facts.append(_remembered(listing, old_paths, old_facts))
            group = Group(folder, len(listing.paths), listing.stamps)
            if listing.offsets is not None:
                numbers = [known.labels.number(label) for label in listing.labels]
                members.append(np.rec.fromarrays([listing.offsets, np.array(numbers, np.int32)], MEMBERS))
        groups.append(group)
    merged = pa.chunked_array([pa.concat_arrays(paths)] if paths else [], pa.large_binary())
    return Files(
        merged,
        np.concatenate([np.empty(0, FACTS), *facts]),
        groups,
        known.formats,
        known.reasons,
        np.concatenate(members).astype(MEMBERS) if members else None,
        known.labels,
    )


def _remembered(listing: Listing, old_paths: pa.ChunkedArray, old_facts: np.ndarray) -> np.ndarray:
    """[n] of FACTS for the files of a listing, known where a file has the length and time that it had."""
    facts = np.zeros(len(listing.paths), FACTS)
    facts["length"], facts["mtime_ns"] = listing.lengths, listing.mtimes
    at = pc.fill_null(pc.index_in(listing.paths, value_set=old_paths), -1).to_numpy()
    rows = np.flatnonzero(at >= 0)
    old = old_facts[at[rows]]
    same = (old["length"] == listing.lengths[rows]) & (old["mtime_ns"] == listing.mtimes[rows])
    facts[rows[same]] = old[same]
    return facts


def _look_again(root: Path, files: Files, rows: np.ndarray) -> None:
    """The verdicts of these rows hold if the files have the lengths and times they had."""
    for i in rows:
        state = file_state(root / os.fsdecode(files.paths[int(i)].as_py()))
        if state != (files.facts["length"][i], files.facts["mtime_ns"][i]):
            files.facts[i] = np.zeros((), FACTS)
            files.facts["length"][i], files.facts["mtime_ns"][i] = state


class Verdict(NamedTuple):
    """What a look at one file says; see index_cache.FACTS."""

    width: int
    height: int
    format: str  # '' where Pillow cannot say
    orientation: int
    reason: str  # '' = good
    full: bool  # what verify='full' would say, not only what the header says


def check_image(path: str, full: bool) -> Verdict:
    """Whether one file can be trained on.

    full     decode every pixel; otherwise only when header and trailer are not those of an intact JPEG
    raises   OSError with an errno when the file could not be read at all (missing, no permission, I/O error)
    """
    return _verdict(path, lambda: open(path, "rb"), full)


def check_member(extent: Extent, full: bool) -> Verdict:
    """check_image of one image in a shard."""
    return _verdict(extent.path, lambda: io.BytesIO(read_extent(extent)), full)


def _verdict(path: str, opened: Callable[[], BinaryIO], full: bool) -> Verdict:
    empty = False
    try:
        with opened() as file:
            empty = file.seek(0, os.SEEK_END) == 0
            file.seek(0)
            return _check_open_image(file, full)
    except OSError as error:
        if error.errno is not None:
            raise
        return Verdict(0, 0, "", 1, _reason(path, error, empty), True)
    except Exception as error:  # Pillow's parsers raise nearly anything on damaged input, and that is the verdict
        return Verdict(0, 0, "", 1, _reason(path, error, empty), True)


def _check_open_image(file: BinaryIO, full: bool) -> Verdict:
    with Image.open(file) as image:
        kind = image.format or ""
        orientation = _orientation(image)
        seen = Verdict(*image.size, kind, orientation, "", True)
        if kind not in _FORMATS:
            return seen._replace(reason=f"a {kind} image, which DALI cannot decode")
        if image.mode not in _MODES:
            return seen._replace(reason=f"pixels of Pillow mode {image.mode}, not 8 or 16 bits per channel")
        if kind == "TIFF" and orientation != 1:
            return seen._replace(reason="a TIFF with an orientation tag, which libraries read differently")
        decode = full or not (kind == "JPEG" and _ends_like_jpeg(file))
        if decode:
            image.load()
        return seen._replace(full=decode)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8, as far as the header holds it; 1 where there is none, or none that means anything."""
    if image.format != "TIFF" and "exif" not in image.info:
        return 1
    try:
        tag = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata around an intact image, which is as good as any
        return 1
    return tag if tag in range(1, 9) else 1


def _ends_like_jpeg(file: BinaryIO) -> bool:
    file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
    return b"\xff\xd9" in file.read()


def _reason(path: str, error: Exception, empty: bool) -> str:
    if empty:
        return "empty file (0 bytes)"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image (its content is of no known image format)"
    return f"{type(error).__name__}: {error}".replace(path, Path(path).name)


def _progress(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True)


def _check_all(
    root: Path,
    files: Files,
    todo: np.ndarray,
    full: bool,
    workers: int,
    progress: bool,
    save: Callable[[], object],
) -> None:
    """Fills in the facts of rows `todo` [n]. Threads suffice: Pillow decodes outside the interpreter lock."""

    ends = np.cumsum([group.rows for group in files.groups])

    def look(row: int, path: bytes) -> Verdict:
        if files.members is None:
            return check_image(os.path.join(root, os.fsdecode(path)), full)
        shard = files.groups[int(np.searchsorted(ends, row, side="right"))].folder
        offset, length = int(files.members["offset"][row]), int(files.facts["length"][row])
        return check_member(Extent(os.path.join(root, shard), offset, length), full)

    def check(rows: np.ndarray, paths: list[bytes]) -> tuple[np.ndarray, list[Verdict | OSError]]:
        checked: list[Verdict | OSError] = []
        for row, path in zip(rows.tolist(), paths, strict=True):
            try:
                checked.append(look(row, path))
            except OSError as error:
                checked.append(error)
        return rows, checked

    def tasks() -> Iterator[tuple[np.ndarray, list[bytes]]]:
        for first in range(0, len(todo), _FILES_PER_TASK):
            rows = todo[first : first + _FILES_PER_TASK]
            yield rows, [files.paths[int(i)].as_py() for i in rows]

    def note(row: int, verdict: Verdict | OSError) -> None:
        if isinstance(
            verdict, OSError
        ):  # may be mended without the file changing (chmod, a mount): not to be remembered
            reason = files.reasons.number(f"cannot be read: {verdict.strerror}")
            files.facts[row] = (-1, -1, 0, 0, 1, 0, reason, False, True)
            return
        width, height, kind, orientation, why, whole = verdict
        length, mtime_ns = files.facts[["length", "mtime_ns"]][row]
        numbers = files.formats.number(kind), files.reasons.number(why)
        files.facts[row] = (length, mtime_ns, width, height, orientation, *numbers, whole, True)

    threads = workers or len(os.sched_getaffinity(0))
    waiting = tasks()
    with (
        _progress(progress) as bar,
        ThreadPoolExecutor(threads) as pool,
        warnings.catch_warnings(),  # here and not in the threads, which share the filters
    ):
        warnings.simplefilter("ignore")  # Pillow's, on odd metadata and large images; huge ones are an error
        line = bar.add_task("checking files", total=len(todo))
        saved = time.monotonic()
        try:
            running = {pool.submit(check, *task) for task in islice(waiting, 4 * threads)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(check, *task) for task in islice(waiting, len(done))}
                for future in done:
                    rows, checked = future.result()
                    for row, verdict in zip(rows.tolist(), checked, strict=True):
                        note(row, verdict)
                    bar.advance(line, len(rows))
                if time.monotonic() - saved > _SAVE_EVERY:
                    save()
                    saved = time.monotonic()
        finally:  # interrupted: do not wait for what has not begun
            pool.shutdown(cancel_futures=True)


def _assemble(
    root: Path, split: str, classes: tuple[str, ...], files: Files, labels: np.ndarray, home: Path | None
) -> Index:
    """labels: [N] int64 of every file, good or bad."""
    bad = np.flatnonzero(files.facts["reason"])
    quarantined = [(os.fsdecode(files.paths[int(i)].as_py()), files.reasons[files.facts["reason"][i]]) for i in bad]
    _require_images_in_every_class(root / split, classes, labels, bad, quarantined)
    if quarantined:
        listed = f"; all are listed in {report_path(home, split)}" if home else ""
        warnings.warn(
            f"{len(bad)} of {len(labels)} files in {root / split} cannot be used and are left out, e.g. "
            f"{quarantined[0][0]}: {quarantined[0][1]}{listed}",
            stacklevel=4,
        )
    paths, facts, members = files.paths, files.facts, None
    if files.members is not None:
        shard = np.repeat(np.arange(len(files.groups)), [group.rows for group in files.groups])
        members = np.stack([shard, files.members["offset"], facts["length"]], 1)
    if len(bad):
        good = facts["reason"] == 0
        paths, facts, labels = paths.filter(pa.array(good)), facts[good], labels[good]
        members = None if members is None else members[good]
    sizes = np.stack([facts["width"], facts["height"]], 1)
    digest = _digest(split, classes, Paths(paths), labels, sizes, facts["length"])
    shards = () if members is None else tuple(group.folder for group in files.groups)
    return Index(str(root), split, classes, Paths(paths), labels, sizes, quarantined, digest, shards, members)


def _digest(
    split: str, classes: tuple[str, ...], paths: Paths, labels: np.ndarray, sizes: np.ndarray, lengths: np.ndarray
) -> str:
    """Of five parts, each after its length: the names as JSON, the paths with a NUL between each two, the arrays' bytes."""
    digest = hashlib.sha256()
    names = json.dumps([split, classes]).encode()
    digest.update(len(names).to_bytes(8, "little") + names)
    digest.update(paths.joined_length.to_bytes(8, "little"))
    for i, piece in enumerate(paths.joined()):
        digest.update(b"\0" if i else b"")
        digest.update(piece)
    for array in (labels, sizes, lengths):
        digest.update(array.nbytes.to_bytes(8, "little"))
        for first in range(0, len(array), _HASHED_AT_ONCE):
            digest.update(np.ascontiguousarray(array[first : first + _HASHED_AT_ONCE]).data)
    return digest.hexdigest()


def _require_images_in_every_class(
    folder: Path, classes: tuple[str, ...], labels: np.ndarray, bad: np.ndarray, quarantined: list[tuple[str, str]]
) -> None:
    """labels [N] of every file; bad: the rows of those left out, which are `quarantined`."""
    left = np.bincount(labels, minlength=len(classes)) - np.bincount(labels[bad], minlength=len(classes))
    empty = np.flatnonzero(left == 0)
    if not len(empty):
        return
    name = classes[empty[0]]
    unreadable = [quarantined[i] for i in np.flatnonzero(labels[bad] == empty[0])]
    why = (
        f"its {len(unreadable)} image files are unreadable ({unreadable[0][0]}: {unreadable[0][1]})"
        if unreadable
        else "it has no image file"
    )
    others = f" and {len(empty) - 1} other classes" if len(empty) > 1 else ""
    raise UserError(
        f"every class of {folder} needs at least one readable image, but {name!r}{others} has none: {why}; "
        "add images or remove the class from both splits"
    )
