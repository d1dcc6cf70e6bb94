"""The shards of a pack, made in worker processes: each written under another name, read back, and only then named."""

from __future__ import annotations

import os
import tarfile
import warnings
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ijckd_fast import files
from ijckd_fast.data.load.pillow import decode
from ijckd_fast.data.prepare.pack_format import Shard, Treatment
from ijckd_fast.data.prepare.workers import in_processes
from ijckd_fast.data.sources.sums import sum_lines
from ijckd_fast.data.unreadable import Unreadable, blames_file
from ijckd_fast.errors import UserError


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
    kept = "finished shards stay: run the same command again, with fewer --workers if it was that"
    return in_processes(_make, shards, workers, kept)


def _make(shard: Shard) -> Done:
    """Writes a shard unless it is there whole. Raises UserError where it does not read back as it should."""
    path = Path(shard.path)
    damaged = path.exists() and not _is_as_made(shard)
    if shard.checksum is not None and not damaged and shard.format.is_complete(shard):
        return Done(shard.name, shard.checksum, len(shard.sources), path.stat().st_size, True, False, [])
    written: list[tuple[int, int]] = []  # row of the image, CRC-32 of its bytes
    left_out = []

    def images() -> Iterator[tuple[int, bytes]]:
        for row, source in enumerate(shard.sources):
            try:
                data = _packed(shard, row)
            except Unreadable as error:
                left_out.append((shard.first + row, source, error.why))
                continue
            yield row, data
            written.append((row, zlib.crc32(data)))

    with files.replacing(path, shared=True) as partial:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on odd metadata and large images
            shard.format.write(partial, shard, images())
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
        data = shard.places[row].read()
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
    if max(width, height) > shard.format.longest:
        raise Unreadable(
            path,
            f"{width}x{height} pixels in the pack, whose images have {shard.format.longest} at most on each side "
            f"(--codec {shard.format.codec})",
        )
    if how == Treatment.RESIZE:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return shard.format.encoded(image, path)


def _is_as_made(shard: Shard) -> bool:
    """Whether the file that is there has the checksum of the shard that was made."""
    try:
        return shard.checksum is not None and files.digest(Path(shard.path)) == shard.checksum
    except UserError:  # the disk does not give it back
        return False


def _verify(path: Path, shard: Shard, written: list[tuple[int, int]]) -> None:
    """UserError unless the shard at `path` has the images and labels `written`, and each decodes at its size."""
    expected = iter(written)
    try:
        for image in shard.format.read(path):
            row, checksum = next(expected)
            width, height = image.size()
            got = (image.id, image.label, width, height, zlib.crc32(image.data()))
            if got != (shard.first + row, shard.labels[row], *shard.packed[row], checksum):
                raise ValueError(
                    f"image {image.id} of class {image.label}, {width}x{height} pixels where "
                    f"{'x'.join(map(str, shard.packed[row]))} were packed"
                )
        if next(expected, None) is not None:
            raise ValueError("images are missing at its end")
    except (tarfile.TarError, ValueError, Unreadable, StopIteration) as error:
        raise UserError(
            f"{shard.path} does not read back as it was packed ({error}) and was removed: is the disk, or the memory, "
            "whole? Finished shards stay; the same command tries again"
        ) from error
