"""The shards of a pack, made in worker processes: each written under another name, read back, and only then named."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import tarfile
import threading
import warnings
import zlib
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from ijckd_fast import files, signals
from ijckd_fast.data.load.loader import Unreadable, blames_file
from ijckd_fast.data.load.pillow import decode
from ijckd_fast.data.prepare.pack_settings import Treatment
from ijckd_fast.data.sources.sums import sum_lines
from ijckd_fast.errors import UserError

_LONGEST = 65500  # pixels: libjpeg's limit


@dataclass(frozen=True, eq=False)
class Shard:
    """What one shard is to hold, n images.

    path       of the finished shard
    name       the same, relative to the folder of the pack
    checksum   of the shard that an earlier run made; None where it made none
    sums       the file of checksums, to which that of a new shard is added before the shard gets its name
    first      id of its first image; the others follow
    sources    [n] absolute paths; labels [n] int64
    stored     [n, 2] int32, (width, height) as indexed; packed [n, 2] int32, as they are to be in the shard
    treatment  [n] int64, of Treatment
    quality    of the JPEGs
    """

    path: str
    name: str
    checksum: str | None
    sums: str
    first: int
    sources: list[str]
    labels: np.ndarray
    stored: np.ndarray
    packed: np.ndarray
    treatment: np.ndarray
    quality: int


@dataclass(frozen=True)
class Done:
    """A shard that is there.

    name      relative to the folder of the pack; checksum: of the archive
    images    how many it holds; bytes: of the archive
    kept      whether an earlier run had made it
    damaged   whether an earlier run had made it, and it is not what that run wrote: it is new
    left_out  (id, path, reason) of images that are not in it
    """

    name: str
    checksum: str
    images: int
    bytes: int
    kept: bool
    damaged: bool
    left_out: list[tuple[int, str, str]]


def make_shards(shards: Iterator[Shard], workers: int) -> Generator[Done, None, None]:
    """Each shard as it is finished, in whatever order."""
    if workers == 1:
        yield from map(_make, shards)
        return
    context = multiprocessing.get_context(
        "forkserver"
    )  # a fork of this process might take a lock along that a thread holds
    context.set_forkserver_preload([__name__])
    signals.start_forkserver()
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        try:
            running = {pool.submit(_make, shard) for shard in islice(shards, 2 * workers)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(_make, shard) for shard in islice(shards, len(done))}
                for future in done:
                    yield future.result()
        except BaseException as error:
            # the pool asks the workers to end, and waits: for whole shards, and for ever for one that is just starting
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            if not isinstance(error, BrokenProcessPool):
                raise
            raise UserError(
                "a worker process was ended from outside, as happens where memory runs out; finished shards stay: run "
                "the same command again, with fewer --workers if it was that"
            ) from error
        finally:  # interrupted: do not wait for what has not begun
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """A worker leaves signals to its parent, and does not outlive it, which may be killed."""
    for number in signals.ENDING:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _make(shard: Shard) -> Done:
    """Writes a shard unless it is there whole. Raises UserError where it does not read back as it should."""
    path = Path(shard.path)
    damaged = path.exists() and not _is_as_made(shard)
    if shard.checksum is not None and not damaged and _has_every_image(shard):
        return Done(shard.name, shard.checksum, len(shard.sources), path.stat().st_size, True, False, [])
    written: list[tuple[int, int]] = []  # row of the image, checksum of its bytes
    left_out = []
    with files.replacing(path, shared=True) as partial:
        with warnings.catch_warnings(), tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            warnings.simplefilter("ignore")  # Pillow's, on odd metadata and large images
            for row, source in enumerate(shard.sources):
                try:
                    data = _packed(shard, row)
                except Unreadable as error:
                    left_out.append((shard.first + row, source, error.why))
                    continue
                add_member(tar, f"{shard.first + row:09d}.jpg", data)
                add_member(tar, f"{shard.first + row:09d}.cls", b"%d" % shard.labels[row])
                written.append((row, zlib.crc32(data)))
        _verify(partial, shard, written)
        size, checksum = partial.stat().st_size, files.digest(partial)
        _add_checksum(Path(shard.sums), shard.name, checksum)
    return Done(shard.name, checksum, len(written), size, False, damaged, left_out)


def _add_checksum(sums: Path, name: str, checksum: str) -> None:
    """Appends a line, which is on the disk when this returns. What a kill leaves of one is dropped by the next run."""
    file = os.open(sums, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(file, sum_lines({name: checksum}))
        os.fsync(file)
    finally:
        os.close(file)


def _packed(shard: Shard, row: int) -> bytes:
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


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Appends one file to a shard."""
    member = tarfile.TarInfo(name)  # time 0, owner 0: equal images make equal shards
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def members_of(tar: tarfile.TarFile) -> Iterator[tuple[int, int, tarfile.TarInfo]]:
    """(id, label, member with the image's bytes) of each image of a shard.

    raises  ValueError or tarfile.TarError where it holds anything else
    """
    pairs = iter(tar)
    for image in pairs:
        label = next(pairs, None)
        if label is None or not image.name.endswith(".jpg") or label.name != image.name[:-4] + ".cls":
            raise ValueError(f"{image.name} has no label behind it")
        yield int(image.name[:-4]), int(bytes_of(tar, label)), image


def bytes_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Of one file in a shard. Raises ValueError where it is no plain file."""
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is no plain file")
    return file.read()


def _is_as_made(shard: Shard) -> bool:
    """Whether the file that is there has the checksum of the shard that was made."""
    try:
        return shard.checksum is not None and files.digest(Path(shard.path)) == shard.checksum
    except UserError:  # the disk does not give it back
        return False


def _has_every_image(shard: Shard) -> bool:
    """Whether it is there with all its images, by their names and labels. It lacks those that could not be read."""
    try:
        with tarfile.open(shard.path, "r:") as tar:
            there = [(i, label) for i, label, _ in members_of(tar)]
    except (FileNotFoundError, tarfile.TarError, ValueError):
        return False
    return there == list(enumerate(shard.labels.tolist(), shard.first))


def _verify(path: Path, shard: Shard, written: list[tuple[int, int]]) -> None:
    """UserError unless the shard at `path` has the images and labels `written`, and each decodes at its size."""
    expected = iter(written)
    try:
        with tarfile.open(path, "r:") as tar:
            for i, label, member in members_of(tar):
                row, checksum = next(expected)
                data = bytes_of(tar, member)
                image = decode(member.name, data)
                got = (i, label, *image.size, zlib.crc32(data))
                if got != (shard.first + row, shard.labels[row], *shard.packed[row], checksum):
                    raise ValueError(
                        f"image {i} of class {label}, {image.width}x{image.height} pixels where "
                        f"{'x'.join(map(str, shard.packed[row]))} were packed"
                    )
        if next(expected, None) is not None:
            raise ValueError("images are missing at its end")
    except (tarfile.TarError, ValueError, Unreadable, StopIteration) as error:
        raise UserError(
            f"{shard.path} does not read back as it was packed ({error}) and was removed: is the disk, or the memory, "
            "whole? Finished shards stay; the same command tries again"
        ) from error
