"""A data folder re-encoded once into tar shards of smaller JPEGs, for machines whose CPUs decode too slowly to feed the GPU.

OUT/{train,val}/shard-000000.tar, ... hold for each image, in the index's order, <id, 9 digits>.jpg and <id>.cls (its label in ASCII
digits): webdataset's layout. The content and not the extension says what a .jpg is. OUT/classes.txt names the class of label 0, 1, ...
a line each; OUT/pack.json holds settings, the source index's hash, counts and how much was lost.
"""

from __future__ import annotations

import errno
import io
import json
import math
import multiprocessing
import os
import signal
import tarfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, features
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ijckd_fast.data.counter_rng import permutation
from ijckd_fast.data.index import Index, Scan, scan
from ijckd_fast.data.index.kept import replace_file
from ijckd_fast.data.load.loader import Unreadable, blames_file
from ijckd_fast.data.load.pillow import arrange, decode
from ijckd_fast.data.plan import Augment, EvalPlan, TooManyUnreadable
from ijckd_fast.errors import UserError

FORMAT = "ijckd-fast pack 1"
SPLITS = ("train", "val")
SAMPLE = 256  # images the fidelity is measured on

_SAMPLE_STREAM = 0xF1DE
_LONGEST = 65500  # pixels: libjpeg's limit
_JPEG = ("JPEG", "MPO")  # an MPO is a JPEG with more pictures behind it


class Treatment(IntEnum):
    """What happens to an image."""

    COPY = 0  # its bytes stay
    ENCODE = 1  # as JPEG, at its size
    RESIZE = 2  # and encoded


@dataclass(frozen=True)
class Settings:
    """What the bytes of a pack depend on, beside the images.

    short         pixels of the shorter side above which training images are made smaller; 0 keeps all sizes
    quality       of the JPEGs, libjpeg's scale
    shard_images  images in a shard; the last one has what is left
    raises        UserError for a value out of range
    """

    short: int = 256
    quality: int = 90
    shard_images: int = 1000

    def __post_init__(self) -> None:
        if self.short != 0 and self.short < 32:
            raise UserError(
                f"--short (shorter side of the packed images) must be at least 32 pixels, or 0 to keep sizes, found {self.short}; "
                "256 is fast, 400 to 500 keeps more"
            )
        if not 1 <= self.quality <= 95:
            raise UserError(f"--quality must be from 1 to 95, found {self.quality}; 90 is usual")
        if self.shard_images < 1:
            raise UserError(f"--shard-images must be at least 1, found {self.shard_images}; 1000 is usual")

    def recorded(self) -> dict[str, Any]:
        """As they stand in pack.json, with the versions of the libraries that make the bytes."""
        return {
            "short": self.short,
            "quality": self.quality,
            "shard_images": self.shard_images,
            "subsampling": "4:2:0",
            "resampling": "lanczos",
            "pillow": PIL.__version__,
            "libjpeg_turbo": features.version_feature("libjpeg_turbo"),
        }


@dataclass(frozen=True, eq=False)
class _Shard:
    """What one shard is to hold, n images.

    path       of the finished shard
    first      id of its first image; the others follow
    sources    [n] absolute paths; labels [n] int64
    stored     [n, 2] int32, (width, height) as indexed; packed [n, 2] int32, as they are to be in the shard
    treatment  [n] int64, of Treatment
    quality    of the JPEGs
    """

    path: str
    first: int
    sources: list[str]
    labels: np.ndarray
    stored: np.ndarray
    packed: np.ndarray
    treatment: np.ndarray
    quality: int


@dataclass(frozen=True)
class _Done:
    """A shard that is there: its bytes, whether an earlier run had made it, (id, path, reason) of images that are not in it."""

    images: int
    bytes: int
    kept: bool
    left_out: list[tuple[int, str, str]]


def _warn(path: str, why: str) -> None:
    warnings.warn(f"{path} cannot be read any more and is left out ({why})", stacklevel=2)


def pack(
    root: str | Path,
    out: str | Path,
    settings: Settings,
    *,
    splits: Sequence[str] = SPLITS,
    workers: int = 0,
    class_list: str | Path | None = None,
    val_labels: str | Path | None = None,
    unreadable_limit: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
    on_bad: Callable[[str, str], None] = _warn,
) -> list[dict[str, Any]]:
    """Packs a data folder. Run again after an interruption it goes on, and the shards are the same to the byte.

    Training images with a shorter side above settings.short are made smaller (Lanczos, that side exactly short, the other rounded) and
    encoded as baseline JPEG, 4:2:0; smaller JPEGs are copied; other formats are encoded at their size. Validation images are copied, so
    that accuracies stay comparable. Metadata is not carried over to what is encoded; an EXIF orientation is ignored, as everywhere.
    A shard is written under another name, read back, each image decoded, and only then gets its name. A shard that lacks an image is
    made anew by the next run.

    root, out         data folder, see build_index; folder of the pack
    splits            of 'train', 'val'
    workers           processes, not threads: Pillow's JPEG encoder holds the interpreter lock; 0 = one per core this process may use. As
                      always with multiprocessing, a script that calls this guards its own code by `if __name__ == "__main__":`
    class_list, val_labels  see build_index
    unreadable_limit  files of a split that were good when they were indexed and may turn out unreadable; None = a thousandth, at least 8
    overwrite         delete the pack that is in `out`, both splits
    progress          show progress bars on stderr
    on_bad            called with path and reason of each file that has become unreadable; default: a warning
    returns           a row for each split, see pack.json; of this call 'kept' (shards that were there), 'images_per_s' (of those
                      packed now; None for none) and 'seconds'
    raises            UserError: the data, see build_index; `out` is not empty and no pack, or one of other data or settings, or cannot be
                      written or is full; a shard that does not read back. TooManyUnreadable
    """
    root, out = Path(root).resolve(), Path(out).resolve()
    if not splits or not set(splits) <= set(SPLITS):
        raise UserError(f"--splits must be of train and val, found {' '.join(splits) or 'none'}")
    for name, value in (("--workers", workers), ("--unreadable-limit", unreadable_limit or 0)):
        if value < 0:
            raise UserError(f"{name} must be at least 0, found {value}")
    for split in SPLITS:
        if out == root / split or root / split in out.parents:
            raise UserError(
                f"the pack must not lie among the images it is made of, found {out} in {root / split}; give another folder"
            )
    _require_pack_or_nothing(out)
    scans: dict[str, Scan] = {}
    classes: tuple[str, ...] | None = None
    for split in (name for name in SPLITS if name in splits):
        scans[split] = scan(
            root,
            split,  # type: ignore[arg-type]
            classes=classes,
            class_list=class_list,
            labels=val_labels if split == "val" else None,
            workers=workers,
            progress=progress,
        )
        if scans[split].index.shards:
            raise UserError(
                f"pack makes shards of images in files of their own, found shards already in {root / split}; give the folder that they "
                "were made of"
            )
        classes = scans[split].index.classes
    assert classes is not None
    try:
        if overwrite:
            _delete(out)
        state = _begin(out, settings, classes, {split: found.index.hash for split, found in scans.items()})
        rows = []
        for split, found in scans.items():
            row = _pack_split(out / split, found, settings, workers, unreadable_limit, progress, on_bad)
            state["splits"][split] = row
            _write_state(out, state)
            rows.append(row)
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
            f"{out} cannot be packed into, {wants[error.errno]}. Finished shards stay: the same command goes on from there"
        ) from error
    return rows


def _require_pack_or_nothing(out: Path) -> None:
    if out.is_dir() and not (out / "pack.json").is_file():
        inside = sorted(name for name in os.listdir(out) if not name.startswith(".pack.json."))
        if inside:
            raise UserError(
                f"wanted an empty folder, or an earlier pack to go on with, but {out} holds other things ({inside[0]!r}) and no pack.json; "
                "give another folder"
            )


def _delete(out: Path) -> None:
    """Nothing but what a pack consists of."""
    for split in SPLITS:
        for shard in (out / split).glob("shard-*.tar"):
            shard.unlink()
    for name in ("classes.txt", "pack.json"):  # this last: without it, what a kill leaves is no pack
        (out / name).unlink(missing_ok=True)


def _begin(out: Path, settings: Settings, classes: tuple[str, ...], hashes: dict[str, str]) -> dict[str, Any]:
    """What pack.json says, made here or by an earlier run; UserError if that run's settings or data were others."""
    odd = [name for name in classes if name != name.strip() or name.splitlines() != [name]]
    if odd:
        raise UserError(f"classes.txt has one class in a line, which {odd[0]!r} does not fit; rename the class folder")
    names = "".join(f"{name}\n" for name in classes).encode("utf-8", "surrogateescape")
    path = out / "pack.json"
    state: dict[str, Any] = {"format": FORMAT, "settings": settings.recorded(), "splits": {}}
    if path.is_file():
        try:
            there = json.loads(path.read_bytes())
            differs = [] if there["format"] == FORMAT else [f"format {there['format']!r} where {FORMAT!r} is wanted"]
            for name, value in state["settings"].items():
                was = there["settings"].get(name)
                if was != value:
                    differs.append(f"{name.replace('_', '-')} {was} where {value} is wanted")
            for split, value in hashes.items():
                if there["splits"].get(split, {}).get("source_hash", value) != value:
                    differs.append(
                        f"the {split} images of then (other files, sizes or classes) where those of now are wanted"
                    )
            if (out / "classes.txt").is_file() and (out / "classes.txt").read_bytes() != names:
                differs.append("other classes")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); --overwrite begins anew") from error
        if differs:
            raise UserError(
                f"{out} holds a pack with {'; '.join(differs)}. To go on with it give what it was begun with, or another folder; "
                "--overwrite deletes it and begins anew"
            )
        state = there
    out.mkdir(parents=True, exist_ok=True)
    for split, value in hashes.items():
        state["splits"][split] = {"source_hash": value, "complete": False}  # until this run has seen every shard
    _write_state(out, state)
    replace_file(out / "classes.txt", lambda path: path.write_bytes(names))
    return state


def _write_state(out: Path, state: dict[str, Any]) -> None:
    replace_file(out / "pack.json", lambda path: path.write_text(json.dumps(state, indent=1)))


def packed_sizes(sizes: np.ndarray, short: int) -> np.ndarray:
    """[N, 2] int32 (width, height) -> the same of images whose shorter side is `short` pixels at most; 0 keeps all."""
    least = sizes.min(1, keepdims=True)
    if short == 0:
        return sizes.copy()
    smaller = np.where(sizes == least, short, np.rint(sizes * (short / least)))
    return np.where(least > short, smaller, sizes).astype(np.int32)


def _treatments(found: Scan, short: int) -> np.ndarray:
    """[N] int64 of Treatment."""
    index, facts = found.index, found.files.facts
    if index.split == "val":
        return np.full(len(index), Treatment.COPY)
    formats = facts["format"][facts["reason"] == 0]
    jpeg = np.isin(formats, [found.files.formats.number(name) for name in _JPEG])
    same = (packed_sizes(index.sizes, short) == index.sizes).all(1)
    return np.where(~same, Treatment.RESIZE, np.where(jpeg, Treatment.COPY, Treatment.ENCODE))


def _pack_split(
    folder: Path,
    found: Scan,
    settings: Settings,
    workers: int,
    unreadable_limit: int | None,
    progress: bool,
    on_bad: Callable[[str, str], None],
) -> dict[str, Any]:
    start = time.perf_counter()
    index = found.index
    folder.mkdir(exist_ok=True)
    for partial in folder.glob(".shard-*"):  # a killed run's
        partial.unlink()
    treatment = _treatments(found, settings.short)
    packed = packed_sizes(index.sizes, 0 if index.split == "val" else settings.short)
    limit = max(8, len(index) // 1000) if unreadable_limit is None else unreadable_limit
    starts = range(0, len(index), settings.shard_images)

    def shards() -> Iterator[_Shard]:
        for number, first in enumerate(starts):
            part = slice(first, first + settings.shard_images)
            sources = [os.path.join(index.root, path) for path in index.paths[part]]
            path = str(folder / f"shard-{number:06d}.tar")
            columns = (index.labels[part], index.sizes[part], packed[part], treatment[part])
            yield _Shard(path, first, sources, *columns, settings.quality)

    images = size = kept = packed_now = 0
    left_out: list[tuple[int, str, str]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress, transient=True) as bar:
        line = bar.add_task(f"packing {index.split}", total=len(index))
        for done in _made(shards(), min(workers or len(os.sched_getaffinity(0)), len(starts))):
            images, size, kept = images + done.images, size + done.bytes, kept + done.kept
            packed_now += 0 if done.kept else done.images
            left_out += done.left_out
            bar.advance(line, done.images + len(done.left_out))
            for _, path, why in done.left_out:
                on_bad(path, why)
            if len(left_out) > limit:
                raise TooManyUnreadable(
                    f"{len(left_out)} files of {index.root}/{index.split} cannot be read any more, more than the {limit} allowed; the "
                    f"last was {left_out[-1][1]} ({left_out[-1][2]}). Is the disk whole and mounted? Finished shards stay and the same "
                    "command goes on; --unreadable-limit allows more"
                )
    left_out.sort()
    missing = np.array([i for i, _, _ in left_out], np.int64)
    _require_every_class(index, missing)
    seconds = time.perf_counter() - start
    lengths = found.files.facts["length"][found.files.facts["reason"] == 0]
    counts = np.bincount(treatment, minlength=3)
    return {
        "split": index.split,
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
        **_fidelity(folder, index, packed, settings, missing),
        "images_per_s": round(packed_now / seconds, 1) if packed_now else None,
        "seconds": round(seconds, 3),
    }


def _require_every_class(index: Index, missing: np.ndarray) -> None:
    """Every shard holds the labels it should, so that a class can only have lost what was left out: `missing`, ids [m]."""
    left = np.bincount(index.labels, minlength=index.num_classes)
    left -= np.bincount(index.labels[missing], minlength=index.num_classes)
    if not left.all():
        raise UserError(
            f"no image of class {index.classes[left.argmin()]!r} in {index.root}/{index.split} can be read any more, which leaves the "
            "class empty; restore the files and run the same command again"
        )


# --- the shards, in worker processes -----------------------------------------------------------------------------------


def _made(shards: Iterator[_Shard], workers: int) -> Iterator[_Done]:
    """Each shard as it is finished, in whatever order."""
    if workers == 1:
        yield from map(_make, shards)
        return
    context = multiprocessing.get_context(
        "forkserver"
    )  # a fork of this process might take a lock along that a thread holds
    context.set_forkserver_preload([__name__])
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        try:
            running = {pool.submit(_make, shard) for shard in islice(shards, 2 * workers)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(_make, shard) for shard in islice(shards, len(done))}
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            # the pool asks the others to end, and waits; one that is just starting does not always hear it
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise UserError(
                "a worker process was ended from outside, as happens where memory runs out; finished shards stay: run the same command "
                "again, with fewer --workers if it was that"
            ) from error
        finally:  # interrupted: do not wait for what has not begun
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Nothing of a worker outlives its parent, which may be killed, or its Ctrl-C."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _make(shard: _Shard) -> _Done:
    """Writes a shard unless it is there whole. Raises UserError where it does not read back as it should."""
    if _is_whole(shard):
        return _Done(len(shard.sources), os.path.getsize(shard.path), True, [])
    path = Path(shard.path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    written: list[tuple[int, int]] = []  # row of the image, checksum of its bytes
    left_out = []
    try:
        with warnings.catch_warnings(), open(partial, "wb") as file:
            warnings.simplefilter("ignore")  # Pillow's, on odd metadata and large images
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for row, source in enumerate(shard.sources):
                    try:
                        data = _packed(shard, row)
                    except Unreadable as error:
                        left_out.append((shard.first + row, source, error.why))
                        continue
                    _add(tar, f"{shard.first + row:09d}.jpg", data)
                    _add(tar, f"{shard.first + row:09d}.cls", b"%d" % shard.labels[row])
                    written.append((row, zlib.crc32(data)))
            file.flush()
            os.fsync(file.fileno())
        _verify(partial, shard, written)
        size = partial.stat().st_size
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        partial.unlink(missing_ok=True)
    return _Done(len(written), size, False, left_out)


def _packed(shard: _Shard, row: int) -> bytes:
    """The bytes of an image in the pack. Raises Unreadable."""
    path, how = shard.sources[row], shard.treatment[row]
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        if not blames_file(error):
            raise
        raise Unreadable(path, f"{type(error).__name__}: {error}") from error
    image = decode(path, data)
    width, height = shard.stored[row].tolist()
    if image.size != (width, height):
        raise Unreadable(path, f"an image of {image.width}x{image.height} pixels where {width}x{height} were indexed")
    if how == Treatment.COPY:
        return data
    width, height = shard.packed[row].tolist()
    if max(width, height) > _LONGEST:
        raise Unreadable(path, f"{width}x{height} pixels in the pack, and a JPEG has {_LONGEST} at most on each side")
    if how == Treatment.RESIZE:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return encode(image, shard.quality)


def encode(image: Image.Image, quality: int) -> bytes:
    """A baseline JPEG, 4:2:0, Huffman tables made for it, without metadata."""
    file = io.BytesIO()
    bare = image.copy()
    bare.info = {}  # Pillow would write a comment found there
    bare.save(file, "JPEG", quality=quality, subsampling="4:2:0", optimize=True)
    return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # time 0, owner 0: equal images make equal shards
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _members(tar: tarfile.TarFile) -> Iterator[tuple[int, int, tarfile.TarInfo]]:
    """(id, label, member with the image's bytes) of each image. Raises ValueError or tarfile.TarError for anything else."""
    pairs = iter(tar)
    for image in pairs:
        label = next(pairs, None)
        if label is None or not image.name.endswith(".jpg") or label.name != image.name[:-4] + ".cls":
            raise ValueError(f"{image.name} has no label behind it")
        yield int(image.name[:-4]), int(_bytes(tar, label)), image


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is no plain file")
    return file.read()


def _is_whole(shard: _Shard) -> bool:
    """Whether it is there with all its images, by their names and labels: it has been verified when it got its name."""
    try:
        with tarfile.open(shard.path, "r:") as tar:
            there = [(i, label) for i, label, _ in _members(tar)]
    except (FileNotFoundError, tarfile.TarError, ValueError):
        return False
    return there == list(enumerate(shard.labels.tolist(), shard.first))


def _verify(path: Path, shard: _Shard, written: list[tuple[int, int]]) -> None:
    """UserError unless the shard at `path` has the images and labels that were `written`, and each decodes at its size."""
    wanted = iter(written)
    try:
        with tarfile.open(path, "r:") as tar:
            for i, label, member in _members(tar):
                row, checksum = next(wanted)
                data = _bytes(tar, member)
                image = decode(member.name, data)
                got = (i, label, *image.size, zlib.crc32(data))
                if got != (shard.first + row, shard.labels[row], *shard.packed[row], checksum):
                    raise ValueError(
                        f"image {i} of class {label}, {image.width}x{image.height} pixels where {'x'.join(map(str, shard.packed[row]))} "
                        "were packed"
                    )
        if next(wanted, None) is not None:
            raise ValueError("images are missing at its end")
    except (tarfile.TarError, ValueError, Unreadable, StopIteration) as error:
        raise UserError(
            f"{shard.path} does not read back as it was packed ({error}) and was removed: is the disk, or the memory, whole? Finished "
            "shards stay; the same command tries again"
        ) from error


# --- what was lost -----------------------------------------------------------------------------------------------------


def _fidelity(
    folder: Path, index: Index, packed: np.ndarray, settings: Settings, missing: np.ndarray
) -> dict[str, Any]:
    """How far the evaluation's view of packed images is from that of the originals, on a seeded sample.

    sample               images compared
    view                 (shorter side they are resized to, side of the centre crop), pixels
    mean_abs_difference  mean over pixels and channels, in grey levels, 0 to 255
    psnr_db              of the mean squared difference; None for no difference
    """
    shorter = min(256, settings.short or 256)
    view = Augment(image_size=round(224 * shorter / 256), eval_resize=shorter)
    originals = EvalPlan(index, view, 1)
    sample = set(permutation(0, _SAMPLE_STREAM, len(index))[:SAMPLE].tolist()) - set(missing.tolist())
    differences = []
    for number in sorted({i // settings.shard_images for i in sample}):
        with tarfile.open(folder / f"shard-{number:06d}.tar", "r:") as tar:
            for i, _, member in _members(tar):
                if i in sample:
                    plan = originals.batch(i)
                    was = arrange(decode(plan.paths[0]), plan, 0).astype(np.float64)
                    # to the same size: the packed image's rounded ratio would move its pixels against the original's
                    now = arrange(decode(member.name, _bytes(tar, member)), replace(plan, size=packed[[i], ::-1]), 0)
                    differences.append(was - now)
    absolute = float(np.mean([np.abs(difference).mean() for difference in differences]))
    squared = float(np.mean([np.square(difference).mean() for difference in differences]))
    return {
        "sample": len(differences),
        "view": [shorter, view.image_size],
        "mean_abs_difference": round(absolute, 4),
        "psnr_db": round(10 * math.log10(255**2 / squared), 2) if squared else None,
    }


def summary_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """The rows of `pack`, a column for each split."""
    table = Table("", *(row["split"] for row in rows), title=title)
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "images": lambda row: f"{row['images']:,}",
        "classes": lambda row: f"{row['classes']:,}",
        "shards, of them kept from an earlier run": lambda row: f"{row['shards']:,}  {row['kept']:,}",
        "made smaller, encoded, copied": lambda row: "  ".join(
            f"{row[f'{how}_images']:,}" for how in ("resize", "encode", "copy")
        ),
        "left out: by the index, unreadable since": lambda row: f"{row['quarantined']:,}  {len(row['left_out']):,}",
        "size, MB": lambda row: f"{row['bytes'] / 1e6:,.1f} of {row['source_bytes'] / 1e6:,.1f}",
        "bytes, pixels, of the originals'": lambda row: (
            f"{100 * row['bytes_ratio']:.1f} %  {100 * row['pixels_ratio']:.1f} %"
        ),
        "evaluation's view against the originals'": lambda row: f"{row['view'][1]} pixels, {row['sample']} images",
        "  mean difference, grey levels": lambda row: f"{row['mean_abs_difference']:.2f}",
        "  PSNR, dB": lambda row: "no difference" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}",
        "images/s": lambda row: "none packed now" if row["images_per_s"] is None else f"{row['images_per_s']:,.0f}",
        "seconds": lambda row: f"{row['seconds']:.1f}",
    }
    for name, of in lines.items():
        table.add_row(name, *(of(row) for row in rows))
    return table
