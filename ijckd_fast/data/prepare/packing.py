"""Re-encodes a data folder once, for machines whose CPUs cannot feed the GPU: into smaller JPEGs, or into blocks.

OUT/{train,val}/shard-000000.tar (pack_jpeg.py) or .blocks (pack_blocks.py), ... hold the images in the index's order.
OUT/classes.txt names the class of label 0, 1, ... a line each; OUT/{train,val}.b2sums hold checksums of all these;
OUT/pack.json holds settings, the source index's hash, counts and how much was lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ijckd_fast import files
from ijckd_fast.console import progress_bar
from ijckd_fast.data.index import DataFolder, Index, Scan
from ijckd_fast.data.plan import TooManyUnreadable, what_to_do
from ijckd_fast.data.prepare.forecast import Forecast
from ijckd_fast.data.prepare.pack_blocks import BlockPack
from ijckd_fast.data.prepare.pack_format import PackFormat, Shard, Treatment
from ijckd_fast.data.prepare.pack_jpeg import JpegPack
from ijckd_fast.data.prepare.pack_report import fidelity, shard_path
from ijckd_fast.data.prepare.pack_shards import make_shards
from ijckd_fast.data.sources import CLASSES_FILE
from ijckd_fast.data.sources.sums import parse_sums, sum_lines, sums_path
from ijckd_fast.errors import UserError

FORMAT = "ijckd-fast pack 1"
STATE = "pack.json"
SPLITS = ("train", "val")

FORMATS: dict[str, type[PackFormat]] = {kind.codec: kind for kind in (JpegPack, BlockPack)}
"""The kinds of packs by their names."""

_JPEG = ("JPEG", "MPO")  # an MPO is a JPEG with more pictures behind it


def _warn(path: str, why: str) -> None:
    warnings.warn(f"{path} cannot be read any more and is left out ({why})", stacklevel=2)


def pack(
    data: DataFolder | str | Path,
    out: str | Path,
    settings: PackFormat,
    *,
    splits: Sequence[str] = SPLITS,
    workers: int = 0,
    unreadable_limit: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
    on_bad: Callable[[str, str], None] = _warn,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Packs a data folder. Run again after an interruption it continues, and the shards are the same to the byte.

    Images with a shorter side above settings.short are made smaller (Lanczos, that side exactly short, the other
    rounded) and encoded. A JpegPack makes baseline JPEGs, 4:2:0, of training images, copies JPEGs that are small enough
    and encodes other formats at their size; validation images it copies, so that accuracies stay comparable, and with
    short 0 all that come from shards or Parquet files. A BlockPack encodes all, validation images too. Metadata is not
    carried over to what is encoded; an EXIF orientation is ignored, as everywhere. A shard is written under another
    name, read back, each image decoded, its checksum noted, and only then gets its name. A shard that lacks an image,
    or has not its checksum, is made again by the next run.

    data, out         data folder, a path or with what is said of it; folder of the pack
    settings          JpegPack or BlockPack
    splits            of 'train', 'val'
    workers           processes, not threads: Pillow's JPEG encoder holds the interpreter lock; 0 = one per core this
                      process may use. As always with multiprocessing, a script that calls this guards its own code by
                      `if __name__ == "__main__":`
    unreadable_limit  files of a split that were good when they were indexed and may turn out unreadable; None = a
                      thousandth, at least 8
    overwrite         delete the pack that is in `out`, both splits
    progress          show progress bars on stderr
    on_bad            called with path and reason of each file that has become unreadable; default: a warning
    say               called before it starts with what disk space and time it takes, of images that can only be read
                      one after the other
    returns           a row for each split, see pack.json; of this call 'kept' (shards that were there), 'images_per_s'
                      (of those packed now; None for none) and 'seconds'
    warns             of shards and class names that are not what an earlier run wrote, and are made again; of a pack
                      from before there were checksums
    raises            UserError: the data, see build_index; `out` is not empty and no pack, or one of other data or
                      settings, or cannot be written or is full, or another process writes to it; a shard that does not
                      read back. TooManyUnreadable
    """
    data = data if isinstance(data, DataFolder) else DataFolder(data)
    root, out = Path(data.data_dir).resolve(), Path(out).resolve()
    if not splits or not set(splits) <= set(SPLITS):
        raise UserError(f"--splits must be of train and val, found {' '.join(splits) or 'none'}")
    for name, value in (("--workers", workers), ("--unreadable-limit", unreadable_limit or 0)):
        if value < 0:
            raise UserError(f"{name} must be at least 0, found {value}")
    for split in SPLITS:
        if out == root / split or root / split in out.parents:
            raise UserError(
                f"the pack must not lie among the images it is made of, found {out} in {root / split}; give another "
                "folder"
            )
    _require_pack_or_nothing(out)
    scans = _scan(data, splits, workers, progress, Forecast(out, settings, workers, say))
    with _faults_told(out):
        out.mkdir(parents=True, exist_ok=True)
        with files.lock(out, "folder OUT"):
            return _pack(out, scans, settings, workers, unreadable_limit, overwrite, progress, on_bad)


def _scan(
    data: DataFolder,
    splits: Sequence[str],
    workers: int,
    progress: bool,
    forecast: Forecast,
) -> dict[str, Scan]:
    """Of each split, train first, whose classes val has."""
    scans: dict[str, Scan] = {}
    for found in data.scans(splits, workers=workers, progress=progress, least_classes=2, in_order=forecast.tell):
        if (Path(found.index.root) / STATE).is_file():
            raise UserError(
                f"pack encodes images once, found shards already that pack has made in {found.index.folder}; give the "
                "folder that they were made of"
            )
        scans[found.index.split] = found
    return scans


def _pack(
    out: Path,
    scans: dict[str, Scan],
    settings: PackFormat,
    workers: int,
    unreadable_limit: int | None,
    overwrite: bool,
    progress: bool,
    on_bad: Callable[[str, str], None],
) -> list[dict[str, Any]]:
    """Packs what was scanned into a folder that this process holds."""
    files.remove_leftovers(out)
    if overwrite:
        _delete(out)
    (first, *_) = scans.values()
    hashes = {split: found.index.hash for split, found in scans.items()}
    state = _begin(out, settings, first.index.classes, hashes)
    rows = []
    for split, found in scans.items():
        row = _pack_split(out / split, found, settings, workers, unreadable_limit, progress, on_bad)
        state["splits"][split] = row
        files.write_json(out / STATE, state)
        rows.append(row)
    return rows


@contextlib.contextmanager
def _faults_told(out: Path) -> Iterator[None]:
    """Inside, what the disk refuses is a UserError, where there is something to do about it."""
    try:
        yield
    except OSError as error:
        wants = {
            errno.ENOSPC: "there is no space left: free some",
            errno.EDQUOT: "your quota is used up: free some space",
            errno.EACCES: "it may not be written: change its permissions, or give another folder",
            errno.EROFS: "it is read-only: give another folder",
            errno.ENOTDIR: "a part of it is a file: give another folder",
        }
        if error.errno not in wants:
            raise
        raise UserError(
            f"{out} cannot be packed into, {wants[error.errno]}. Finished shards stay: the same command continues from "
            "there"
        ) from error


def _require_pack_or_nothing(out: Path) -> None:
    if out.is_dir() and not (out / STATE).is_file():
        ours = (files.LOCK, files.HOLDER, f"{STATE}.tmp")  # what a kill leaves before there is a pack
        inside = sorted(name for name in os.listdir(out) if name not in ours and not name.startswith(f".{STATE}."))
        if inside:
            raise UserError(
                f"expected an empty folder, or an earlier pack to continue, but {out} holds other things "
                f"({inside[0]!r}) and no pack.json; give another folder"
            )


def _delete(out: Path) -> None:
    """Nothing but what a pack consists of."""
    for split in SPLITS:
        for kind in FORMATS.values():
            for shard in (out / split).glob(f"shard-*{kind.suffix}"):
                shard.unlink()
        sums_path(out, split).unlink(missing_ok=True)
    for name in (CLASSES_FILE, STATE):  # this last: without it, what a kill leaves is no pack
        (out / name).unlink(missing_ok=True)


def _begin(out: Path, settings: PackFormat, classes: tuple[str, ...], hashes: dict[str, str]) -> dict[str, Any]:
    """What pack.json says, made here or by an earlier run; UserError if that run's settings or data were others."""
    odd = [name for name in classes if name != name.strip() or name.splitlines() != [name]]
    if odd:
        raise UserError(f"classes.txt has one class in a line, which {odd[0]!r} does not fit; rename the class folder")
    names = os.fsencode("".join(f"{name}\n" for name in classes))
    state: dict[str, Any] = {"format": FORMAT, "settings": settings.recorded(), "splits": {}}
    path = out / STATE
    there = files.read_checked(path, "restore it from a copy, or give --overwrite, which begins again")
    if there is not None:
        earlier, has_checksums = there
        _require_same(out, earlier, state["settings"], hashes, names)
        if not has_checksums:
            _adopt(out, settings)
        state = earlier
    for split, value in hashes.items():
        state["splits"][split] = {"source_hash": value, "complete": False}  # until this run has seen every shard
    files.write_json(path, state)
    files.write_bytes(out / CLASSES_FILE, names)
    return state


def _require_same(
    out: Path, there: dict[str, Any], settings: dict[str, Any], hashes: dict[str, str], class_names: bytes
) -> None:
    """UserError unless the pack that is there was made by the same settings of the same images.

    class_names  what classes.txt is to hold; a warning where it holds something else
    """
    try:
        differs = [] if there["format"] == FORMAT else [f"format {there['format']!r} where {FORMAT!r} is expected"]
        was = {"codec": JpegPack.codec, **there["settings"]}  # the only one once, and not written down
        names = ["codec"] if was["codec"] != settings["codec"] else list(settings)
        for name in names:
            if was.get(name) != settings[name]:
                differs.append(f"{name.replace('_', '-')} {was.get(name)} where {settings[name]} is expected")
        known = {split: there["splits"].get(split, {}).get("source_hash") for split in hashes}
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{out / STATE} is damaged ({type(error).__name__}: {error}); --overwrite begins again"
        ) from error
    others = [split for split, value in hashes.items() if known[split] not in (None, value)]
    differs += [
        f"the {split} images of then (other files, sizes or classes) where those of now are expected"
        for split in others
    ]
    classes = out / CLASSES_FILE
    if classes.is_file() and classes.read_bytes() != class_names:
        if others or not any(known.values()):
            differs.append("other classes")
        else:  # the hash of the images is also that of the classes
            warnings.warn(f"{classes} is not what was packed, and is written again", stacklevel=2)
    if differs:
        raise UserError(
            f"{out} holds a pack with {'; '.join(differs)}. To continue it give what it was begun with, or "
            "another folder; --overwrite deletes it and begins again"
        )


def _adopt(out: Path, settings: PackFormat) -> None:
    """Notes the checksums of the shards of a pack from before there were any, as they are now."""
    for split in SPLITS:
        shards = sorted((out / split).glob(f"shard-*{settings.suffix}"))
        if shards and not sums_path(out, split).exists():
            warnings.warn(
                f"{out / split} was packed before shards had checksums: the {len(shards)} that are there are taken as "
                "they are (--overwrite makes them again), and have checksums from now on",
                stacklevel=2,
            )
            sums = {f"{split}/{shard.name}": files.digest(shard) for shard in shards}
            files.write_bytes(sums_path(out, split), sum_lines(sums))


def _is_jpeg(found: Scan) -> np.ndarray:
    """[N] bool."""
    facts = found.facts
    formats = facts["format"][facts["reason"] == 0]
    return np.isin(formats, [found.formats.number(name) for name in _JPEG])


def _pack_split(
    folder: Path,
    found: Scan,
    settings: PackFormat,
    workers: int,
    unreadable_limit: int | None,
    progress: bool,
    on_bad: Callable[[str, str], None],
) -> dict[str, Any]:
    start = time.perf_counter()
    index = found.index
    folder.mkdir(exist_ok=True)
    # of files that hold many images nothing is to change where no size does, whatever formats they have
    as_they_are = settings.short == 0 and index.members is not None
    treatment = settings.treatments(index.split, index.sizes, _is_jpeg(found) | as_they_are)
    packed = settings.sizes(index.split, index.sizes)
    limit = max(8, len(index) // 1000) if unreadable_limit is None else unreadable_limit
    starts = settings.starts(packed)
    out, sums = folder.parent, sums_path(folder.parent, index.split)
    before = parse_sums(sums.read_bytes() if sums.is_file() else b"")[0]
    files.write_bytes(sums, sum_lines(before))  # without what a kill left of a line

    def shards() -> Iterator[Shard]:
        for number, (first, end) in enumerate(pairwise([*starts, len(index)])):
            part = slice(first, end)
            sources = [os.path.join(index.root, path) for path in index.paths[part]]
            places = [index.place(i) for i in range(first, end)]
            path = shard_path(folder, number, settings)
            name = path.relative_to(out).as_posix()
            columns = (index.labels[part], index.sizes[part], packed[part], treatment[part])
            yield Shard(str(path), name, before.get(name), str(sums), first, sources, places, *columns, settings)

    after = {CLASSES_FILE: files.digest(out / CLASSES_FILE)}
    images = size = kept = packed_now = 0
    left_out: list[tuple[int, str, str]] = []
    workers = min(workers or len(os.sched_getaffinity(0)), len(starts))
    with (
        progress_bar(progress) as bar,
        _cleared_of_partial_shards(folder),
        contextlib.closing(make_shards(shards(), workers)) as made,
    ):
        line = bar.add_task(f"packing {index.split}", total=len(index))
        for done in made:
            images, size, kept = images + done.images, size + done.bytes, kept + done.kept
            packed_now += 0 if done.kept else done.images
            left_out += done.left_out
            after[done.name] = done.checksum
            if done.damaged:
                what = "was not what its checksum is of" if done.name in before else "had no checksum"
                warnings.warn(f"{out / done.name} {what} (in {sums}), and has been made again", stacklevel=2)
            bar.advance(line, done.images + len(done.left_out))
            for _, path, why in done.left_out:
                on_bad(path, why)
            if len(left_out) > limit:
                raise TooManyUnreadable(
                    f"{len(left_out)} files of {index.folder} cannot be read any more, more than the "
                    f"{limit} allowed; the last was {left_out[-1][1]} ({left_out[-1][2]}); "
                    f"{what_to_do(index, (why for _, _, why in left_out))}. Finished shards stay and the same command "
                    "continues; --unreadable-limit allows more"
                )
    files.write_bytes(sums, sum_lines(after))
    left_out.sort()
    missing = np.array([i for i, _, _ in left_out], np.int64)
    _require_every_class(index, missing)
    seconds = time.perf_counter() - start
    lengths = found.facts["length"][found.facts["reason"] == 0]
    counts = np.bincount(treatment, minlength=3)
    return {
        "split": index.split,
        "codec": settings.codec,
        "complete": True,
        "source_hash": index.hash,
        "images": images,
        "classes": index.num_classes,
        "shards": len(starts),
        "kept": kept,
        "quarantined": len(index.quarantined),
        "left_out": [[path, why] for _, path, why in left_out],
        **{f"{how.name.lower()}_images": int(counts[how]) for how in Treatment},
        "bytes": size,
        "source_bytes": int(lengths.sum()),
        "bytes_ratio": size / int(lengths.sum()),
        "pixels_ratio": float(packed.prod(1, dtype=np.int64).sum() / index.sizes.prod(1, dtype=np.int64).sum()),
        **fidelity(folder, index, starts, packed, settings, missing),
        "images_per_s": round(packed_now / seconds, 1) if packed_now else None,
        "seconds": round(seconds, 3),
    }


@contextlib.contextmanager
def _cleared_of_partial_shards(folder: Path) -> Iterator[None]:
    """Of those that an earlier run left, which was killed, and in the end of its own."""

    def clear() -> None:
        for partial in folder.glob(".shard-*"):
            partial.unlink(missing_ok=True)

    clear()
    try:
        yield
    finally:
        clear()


def _require_every_class(index: Index, missing: np.ndarray) -> None:
    """UserError where a class has no image left. missing: ids [m] of those left out.

    Every shard holds the labels it should: a class can have lost nothing else.
    """
    left = np.bincount(index.labels, minlength=index.num_classes)
    left -= np.bincount(index.labels[missing], minlength=index.num_classes)
    if not left.all():
        raise UserError(
            f"no image of class {index.classes[left.argmin()]!r} in {index.folder} can be read any more, "
            "which leaves the class empty; restore the files and run the same command again"
        )
