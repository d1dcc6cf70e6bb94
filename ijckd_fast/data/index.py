"""The index of one split: every image file looked at once, then only its size and modification time.

`build_index` walks root/split/<class>/, decodes each file once to learn whether it can be trained on, and remembers the
verdicts in a Parquet file. Files that cannot be decoded are set aside with their reason; training goes on without them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ijckd_fast.data.counter_rng import permutation, uniforms
from ijckd_fast.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""Lower case; files with another extension are not looked at. The content decides how a file is read."""

# What Pillow and DALI decode to the same RGB pixels. Pillow also opens GIF and AVIF, which DALI's decoder refuses, and
# float, 32-bit and LAB pixels, which the two convert differently.
_FORMATS = frozenset({"JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM"})
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L"})
_TIFF_ORIENTATION = 274  # Pillow rotates TIFFs by it (and no other format), DALI is told not to

_CACHE_VERSION = "1"
_CACHE_FOLDER = ".ijckd-index"
_FILES_PER_TASK = 64  # one task of the pool: long enough to hide the pool, short enough for a live progress bar
_NAMED = 3  # how many names an error or a warning spells out


@dataclass(frozen=True, eq=False)
class Index:
    """One split's images in a fixed order: sorted class folders, sorted names within. An image's id is its position.

    root         absolute path of the data folder
    split        'train' or 'val'
    classes      class folder names, sorted; a label is a position in it
    paths        relative to root, with forward slashes
    labels       [N] int64
    sizes        [N, 2] int32, (width, height) as stored: an EXIF orientation is ignored, as torchvision does
    quarantined  (relative path, reason) of every file left out
    hash         hex digest of classes, paths, labels, sizes and file lengths; not of root or times, so that a copy of
                 the data on another machine has the same
    """

    root: str
    split: str
    classes: tuple[str, ...]
    paths: list[str]
    labels: np.ndarray
    sizes: np.ndarray
    quarantined: list[tuple[str, str]]
    hash: str

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def absolute(self, i: int) -> str:
        """The path of image i to open."""
        return os.path.join(self.root, self.paths[i])

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
            self, paths=[self.paths[i] for i in keep], labels=labels, sizes=self.sizes[keep], hash=digest
        )


_SUBSET_STREAM = 0x5B5E7
_NOISE_STREAM = 0x2015E


class _Verdict(NamedTuple):
    """What is known of one file, tied to the length and time it had. length -1: never to be believed again."""

    length: int  # bytes
    mtime_ns: int
    width: int
    height: int
    reason: str  # '' = good
    full: bool  # what verify='full' would say, not only what the header says


def build_index(
    root: str | Path,
    split: Literal["train", "val"],
    *,
    classes: Sequence[str] | None = None,
    workers: int = 0,
    verify: Literal["full", "fast"] = "full",
    refresh: bool = False,
    progress: bool = False,
    cache_dir: str | Path | None = None,
) -> Index:
    """Indexes root/split/<class>/**, decoding only what is new or changed since the last time.

    classes    the class folders there must be, e.g. the train index's for val
    workers    threads that decode; 0 = one per core this process may use
    verify     'full' decodes every file to its last pixel; 'fast' reads header and trailer and decodes only what looks
               odd, so that damage inside a file goes unseen
    refresh    forget earlier verdicts
    progress   show a progress bar on stderr while files are decoded
    cache_dir  where to keep the index files; default root/.ijckd-index or, where that cannot be written, a folder below
               the user's cache directory ($XDG_CACHE_HOME, else ~/.cache)
    warns      once with the number of files left out and where their list is; when a cached index is damaged
    raises     UserError: no such folder, no class folder, a class without a readable image, classes unlike `classes`
    """
    root = Path(root).resolve()
    if split not in ("train", "val"):
        raise UserError(f"split must be 'train' or 'val', found {split!r}")
    if verify not in ("full", "fast"):
        raise UserError(f"verify must be 'full' or 'fast', found {verify!r}")
    found = _class_folders(root, split)
    if classes is not None and tuple(classes) != found:
        raise UserError(_other_classes(root / split, tuple(classes), found))

    try:
        listing = [item for name in found for item in _list_images(root, f"{split}/{name}")]
    except OSError as error:
        raise UserError(
            f"the images in {root / split} must be readable, found: {error}; mend it and run again"
        ) from error
    homes = _cache_homes(root, cache_dir)
    known = {} if refresh else _load_verdicts(homes, split)
    current = {
        path: verdict
        for path, length, mtime_ns in listing
        if (verdict := known.get(path)) is not None
        and (verdict.length, verdict.mtime_ns) == (length, mtime_ns)
        and (verdict.full or verify == "fast")
    }
    todo = [item for item in listing if item[0] not in current]
    report: Path | None = None
    try:
        _check_all(root, todo, current, verify == "full", workers, progress, f"checking {split}")
    finally:  # also when interrupted: what was decoded so far need not be decoded again
        if todo or len(current) != len(known):
            report = _save_verdicts(homes, split, current)
    return _assemble(
        root, split, found, [path for path, _, _ in listing], current, report or _existing_report(homes, split)
    )


def _class_folders(root: Path, split: str) -> tuple[str, ...]:
    folder = root / split
    wanted = f"wanted class folders of images, {folder}/<class>/*.jpg"
    if not root.is_dir():
        raise UserError(f"{wanted}, but {root} is not a folder; give the folder that holds train/ and val/")
    if not folder.is_dir():
        inside = sorted(entry.name for entry in os.scandir(root) if not entry.name.startswith("."))
        raise UserError(
            f"{wanted}, but {root} has no folder {split!r} ({_some(inside) or 'it is empty'}); give the folder that "
            "holds train/ and val/"
        )
    names, loose = [], 0
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            names.append(entry.name)
        elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
            loose += 1
    if not names and loose:
        raise UserError(
            f"{wanted}, but {folder} holds {loose} image files and no class folder; sort them into one folder per "
            "class (for ImageNet's validation set, valprep.sh does it)"
        )
    if not names:
        raise UserError(f"{wanted}, but {folder} is empty; put one folder of images per class into it")
    return tuple(sorted(names))


def _other_classes(folder: Path, wanted: tuple[str, ...], found: tuple[str, ...]) -> str:
    missing = sorted(set(wanted) - set(found))
    extra = sorted(set(found) - set(wanted))
    parts = [f"{len(missing)} missing ({_some(missing)})"] if missing else []
    parts += [f"{len(extra)} unexpected ({_some(extra)})"] if extra else []
    if not parts:
        parts = ["the same names in another order"]
    return (
        f"{folder} must have the {len(wanted)} class folders of the training data, found {len(found)}: "
        f"{', '.join(parts)}; make the folder names of both splits equal"
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_NAMED])
    return f"{shown}, and {len(names) - _NAMED} more" if len(names) > _NAMED else shown


def _list_images(
    root: Path, folder: str, above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple[str, int, int]]:
    """(path relative to root, bytes, mtime_ns) of every image file at any depth, sorted. Hidden names are skipped.

    `above` holds the folders on the way here, so that a link back to one of them is not followed for ever.
    """
    status = os.stat(root / folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in sorted(os.scandir(root / folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        path = f"{folder}/{entry.name}"
        if _is_folder(entry):
            yield from _list_images(root, path, above | {here})
        elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
            try:
                status = entry.stat()
            except OSError:  # a link to nothing: listed, so that it is reported with the other unreadable files
                yield path, -1, -1
                continue
            if stat.S_ISREG(status.st_mode):  # reading a pipe would wait for a writer for ever
                yield path, status.st_size, status.st_mtime_ns


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, which is nothing
        return False


def check_image(path: str, full: bool) -> tuple[int, int, str, bool]:
    """Whether one file can be trained on.

    full     decode every pixel; otherwise only when header and trailer are not those of an intact JPEG
    returns  (width, height as stored, reason or '' when good, whether a full decode could not say otherwise)
    raises   OSError with an errno when the file could not be read at all (missing, no permission, I/O error)
    """
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            width, height = image.size
            if image.format not in _FORMATS:
                return width, height, f"a {image.format} image, which DALI cannot decode", True
            if image.mode not in _MODES:
                return width, height, f"pixels of Pillow mode {image.mode}, not 8 or 16 bits per channel", True
            if image.format == "TIFF" and image.getexif().get(_TIFF_ORIENTATION, 1) != 1:
                return width, height, "a TIFF with an orientation tag, which libraries read differently", True
            decode = full or not (image.format == "JPEG" and _ends_like_jpeg(path))
            if decode:
                image.load()
            return width, height, "", decode
    except OSError as error:
        if error.errno is not None:
            raise
        return 0, 0, _reason(path, error), True
    except Exception as error:  # Pillow's parsers raise nearly anything on damaged input, and that is the verdict
        return 0, 0, _reason(path, error), True


def _ends_like_jpeg(path: str) -> bool:
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        return b"\xff\xd9" in file.read()


def _reason(path: str, error: Exception) -> str:
    if os.path.getsize(path) == 0:
        return "empty file (0 bytes)"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image (its content is of no known image format)"
    return f"{type(error).__name__}: {error}".replace(path, Path(path).name)


def _check_all(
    root: Path,
    todo: Sequence[tuple[str, int, int]],
    verdicts: dict[str, _Verdict],
    full: bool,
    workers: int,
    progress: bool,
    title: str,
) -> None:
    """Adds the verdict of every file of `todo`. Threads suffice: Pillow decodes outside the interpreter lock."""
    if not todo:
        return

    def check(items: Sequence[tuple[str, int, int]]) -> list[tuple[str, _Verdict]]:
        checked = []
        for path, length, mtime_ns in items:
            try:
                verdict = _Verdict(length, mtime_ns, *check_image(os.path.join(root, path), full))
            except OSError as error:  # may be mended without the file changing (chmod, a mount): not to be remembered
                verdict = _Verdict(-1, -1, 0, 0, f"cannot be read: {error.strerror}", False)
            checked.append((path, verdict))
        return checked

    threads = workers or len(os.sched_getaffinity(0))
    tasks = iter([todo[i : i + _FILES_PER_TASK] for i in range(0, len(todo), _FILES_PER_TASK)])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=Console(stderr=True), disable=not progress, transient=True) as bar,
        ThreadPoolExecutor(threads) as pool,
        warnings.catch_warnings(),  # here and not in the threads, which share the filters
    ):
        warnings.simplefilter("ignore")  # Pillow's, on odd metadata and large images; huge ones are an error
        line = bar.add_task(title, total=len(todo))
        try:
            running = {pool.submit(check, task) for task in islice(tasks, 4 * threads)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(check, task) for task in islice(tasks, len(done))}
                for future in done:
                    verdicts.update(future.result())
                    bar.advance(line, len(future.result()))
        finally:  # interrupted: do not wait for what has not begun
            pool.shutdown(cancel_futures=True)


def _assemble(
    root: Path,
    split: str,
    classes: tuple[str, ...],
    paths: Iterable[str],
    verdicts: dict[str, _Verdict],
    report: Path | None,
) -> Index:
    position = {name: label for label, name in enumerate(classes)}
    good: list[str] = []
    labels, sizes, lengths = [], [], []
    quarantined: list[tuple[str, str]] = []
    for path in paths:
        verdict = verdicts[path]
        if verdict.reason:
            quarantined.append((path, verdict.reason))
            continue
        good.append(path)
        labels.append(position[path.split("/", 2)[1]])
        sizes.append((verdict.width, verdict.height))
        lengths.append(verdict.length)
    label_array = np.array(labels, np.int64)
    size_array = np.array(sizes, np.int32).reshape(-1, 2)
    _require_images_in_every_class(root / split, classes, label_array, quarantined)
    if quarantined:
        listed = f"; all are listed in {report}" if report else ""
        warnings.warn(
            f"{len(quarantined)} of {len(good) + len(quarantined)} files in {root / split} cannot be used and are left "
            f"out, e.g. {quarantined[0][0]}: {quarantined[0][1]}{listed}",
            stacklevel=3,
        )
    digest = hashlib.sha256()
    for part in (
        json.dumps([split, classes]).encode(),
        b"\0".join(map(os.fsencode, good)),
        label_array.tobytes(),
        size_array.tobytes(),
        np.array(lengths, np.int64).tobytes(),
    ):
        digest.update(len(part).to_bytes(8, "little") + part)
    return Index(str(root), split, classes, good, label_array, size_array, quarantined, digest.hexdigest())


def _require_images_in_every_class(
    folder: Path, classes: tuple[str, ...], labels: np.ndarray, quarantined: list[tuple[str, str]]
) -> None:
    empty = [classes[i] for i in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)]
    if not empty:
        return
    bad = defaultdict(list)
    for path, reason in quarantined:
        bad[path.split("/", 2)[1]].append((path, reason))
    name = empty[0]
    why = (
        f"its {len(bad[name])} image files are unreadable ({bad[name][0][0]}: {bad[name][0][1]})"
        if bad[name]
        else "it has no image file"
    )
    others = f" and {len(empty) - 1} other class folders" if len(empty) > 1 else ""
    raise UserError(
        f"every class folder of {folder} needs at least one readable image, but {name!r}{others} has none: {why}; "
        "add images or remove the folder from both splits"
    )


# --- the cache files ------------------------------------------------------------------------------------------------


def _cache_homes(root: Path, cache_dir: str | Path | None) -> list[Path]:
    """Folders to look in and to write to, in order of preference."""
    if cache_dir is not None:
        return [Path(cache_dir)]
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [root / _CACHE_FOLDER, user_cache / "ijckd-fast" / hashlib.sha256(os.fsencode(root)).hexdigest()[:16]]


def cache_folders(index: Index) -> list[Path]:
    """Where to look for and to keep what is known of an index's files, in order of preference; they need not exist."""
    return _cache_homes(Path(index.root), None)


def _load_verdicts(homes: Iterable[Path], split: str) -> dict[str, _Verdict]:
    """The remembered verdicts by path; {} when there are none or they are damaged (with a warning)."""
    # os.path's: Path.is_file() raises where a home may not be looked into
    paths = [path for home in homes if os.path.isfile(path := home / f"{split}.parquet")]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True):  # the latest
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            if (table.schema.metadata or {}).get(b"ijckd_index") != _CACHE_VERSION.encode():
                raise ValueError("written by another version")
            columns = [table.column(name).to_pylist() for name in ("path", *_Verdict._fields)]
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            warnings.warn(f"the index {path} cannot be read and is built anew ({error})", stacklevel=3)
            continue
        return {os.fsdecode(row[0]): _Verdict(*row[1:]) for row in zip(*columns, strict=True)}
    return {}


def _save_verdicts(homes: Iterable[Path], split: str, verdicts: dict[str, _Verdict]) -> Path | None:
    """Writes split.parquet and split.quarantine.json where that is possible; returns the path of the latter."""
    rows = sorted(verdicts.items())
    types = {
        "length": pa.int64(),
        "mtime_ns": pa.int64(),
        "width": pa.int32(),
        "height": pa.int32(),
        "reason": pa.string(),
        "full": pa.bool_(),
    }
    arrays = {"path": pa.array([os.fsencode(path) for path, _ in rows], pa.binary())}  # file names need not be UTF-8
    for i, name in enumerate(_Verdict._fields):
        arrays[name] = pa.array([verdict[i] for _, verdict in rows], types[name])
    table = pa.table(arrays).replace_schema_metadata({"ijckd_index": _CACHE_VERSION})
    bad = [{"path": path, "reason": verdict.reason} for path, verdict in rows if verdict.reason]
    failure: OSError | None = None
    for home in homes:
        try:
            home.mkdir(parents=True, exist_ok=True)
            report = home / f"{split}.quarantine.json"
            _replace(report, lambda path: path.write_text(json.dumps(bad, indent=1) + "\n"))
            _replace(home / f"{split}.parquet", lambda path: pq.write_table(table, path, write_page_checksum=True))
            return report
        except OSError as error:  # read-only data folder: the next home
            failure = error
    warnings.warn(
        f"the index could not be saved, so that every start will check all files again ({failure})", stacklevel=3
    )
    return None


def _replace(path: Path, write) -> None:
    """Writes a file so that a reader finds the old or the new one whole, whenever the process dies."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _existing_report(homes: Iterable[Path], split: str) -> Path | None:
    return next((report for home in homes if os.path.isfile(report := home / f"{split}.quarantine.json")), None)
