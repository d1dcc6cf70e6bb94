"""A cache while it is made: features are put into its folder chunk after chunk, so that a kill costs one chunk."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from ijckd_fast.errors import UserError
from ijckd_fast.files import HOLDER, LOCK, disk_full_told, write_bytes
from ijckd_fast.teacher_cache.format import (
    ABOUT,
    AGAIN,
    CLASSIFIER,
    FEATURES,
    FORMAT,
    PROGRESS,
    VAL,
    Done,
    crc32,
    differences,
    identity,
    layout_of,
    read_about,
    read_progress,
    tensors_digest,
    unreadable_of,
    write_about,
)

_NAN = 0x7FC0  # bfloat16


def refuse_other_folder(folder: Path) -> None:
    """UserError unless `folder` is new, empty, or a cache."""
    if folder.is_dir() and not (folder / ABOUT).is_file():
        inside = sorted(name for name in os.listdir(folder) if name not in (LOCK, HOLDER, f"{ABOUT}.tmp"))
        if inside:
            raise UserError(
                f"expected an empty folder, or an earlier cache to continue, but {folder} holds other things"
                f" ({inside[0]!r}) and no {ABOUT}; give another folder"
            )


class CacheWriter:
    """Puts features into the folder of a cache, chunk after chunk. What an earlier run finished is kept if its checksum
    fits.

    folder      of the cache; the caller holds its lock
    name, fingerprint, weights  of the teacher; weights: the file they came from, or 'published'
    classifier  the teacher's
    classes     their names, in the order of the labels, for people to read
    settings    plan_settings, and the teacher's 'amp_dtype'
    views       V
    chunk_images  images in a chunk; a cache that is there keeps its own
    made_with   versions, for people to read
    overwrite   delete the cache that is in `folder`

    about       what cache.json says
    layout      Layout
    pending     chunks that are not there yet
    damaged     those of them that an earlier run had finished, and that are not what it wrote
    unreadable  id -> (path, reason)
    raises      UserError: the folder holds a cache of something else, or the disk is too small
    Use as a context manager, or close().
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        fingerprint: str,
        weights: str,
        classifier: nn.Linear,
        classes: Sequence[str],
        settings: Mapping[str, Any],
        views: int,
        chunk_images: int,
        made_with: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        self.folder = folder
        for each in (ABOUT, CLASSIFIER, VAL):
            (folder / f"{each}.tmp").unlink(missing_ok=True)  # of a killed process
        if overwrite:
            # cache.json last: without it, what a kill leaves is no cache.
            for each in (FEATURES, PROGRESS, CLASSIFIER, VAL, ABOUT):
                (folder / each).unlink(missing_ok=True)
        tensors = {key: value.detach().cpu().float().contiguous() for key, value in classifier.state_dict().items()}
        teacher = {
            "name": name, "fingerprint": fingerprint, "weights": weights, "classifier": tensors_digest(tensors)
        }  # fmt: skip
        expected = {**settings, "views": views, "channels": classifier.in_features}
        self._done, whole = read_progress(folder / PROGRESS)
        about = read_about(folder) if self._done else None  # what has no chunk is nothing to be kept
        if about is None:
            about = {
                "format": FORMAT,
                "complete": False,
                "teacher": teacher,
                "settings": expected,
                "chunk_images": chunk_images,
                "classes": list(classes),
            }
        differs = differences(about["settings"], expected)
        for what in ("name", "fingerprint"):
            if about["teacher"][what] != teacher[what]:
                differs.append(f"a teacher of {what} {about['teacher'][what]} where {teacher[what]} is expected")
        if differs:
            raise UserError(
                f"{folder} holds a teacher cache with {'; '.join(differs)}. To continue it give what it was begun with,"
                " or another folder; --overwrite deletes it and begins again"
            )
        self.about: dict[str, Any] = about
        self.layout = layout_of(about)
        self._refuse_small_disk()
        with self._full_disk_told():
            if not about["complete"]:
                about["made_with"] = dict(made_with)
                write_about(self.folder, self.about)
            self._file = os.open(folder / FEATURES, os.O_RDWR | os.O_CREAT, 0o666)
            if os.fstat(self._file).st_size != self.layout.bytes:
                os.ftruncate(self._file, self.layout.bytes)
            self._progress = open(folder / PROGRESS, "ab")  # noqa: SIM115 - closed by close()
            if self._progress.tell() != whole:
                self._progress.truncate(whole)
        self.damaged = [chunk for chunk in self._done if not self._is_whole(chunk)]
        for chunk in self.damaged:
            del self._done[chunk]
        self.pending = [chunk for chunk in range(self.layout.chunks) if chunk not in self._done]
        if self.pending and about["complete"]:
            about["complete"] = False
            write_about(self.folder, self.about)
        with self._full_disk_told():
            write_bytes(folder / CLASSIFIER, safetensors.torch.save(tensors))

    def _is_whole(self, chunk: int) -> bool:
        try:
            return crc32(self._file, self.layout, chunk) == self._done[chunk].crc32
        except OSError:  # the disk does not give it back
            return False

    @property
    def unreadable(self) -> dict[int, tuple[str, str]]:
        return unreadable_of(self._done)

    def write(self, chunk: int, features: np.ndarray, unreadable: Sequence[tuple[int, str, str]]) -> None:
        """Makes a chunk last: its bytes are on the disk before progress.jsonl says so.

        features    [n, Ct] uint16, the bits of bfloat16; it is changed: NaN for the unreadable
        unreadable  (id, path, reason) of images that could not be read
        raises      UserError for a full disk
        """
        offset, length = self.layout.place(chunk)
        _, ids = self.layout.part(chunk)
        assert features.shape == (len(ids), self.layout.channels)
        assert features.dtype == np.uint16
        features[[i - ids.start for i, _, _ in unreadable]] = _NAN
        data = features.tobytes()
        done = Done(zlib.crc32(data), list(unreadable))
        with self._full_disk_told():
            written = 0
            while written < length:
                written += os.pwrite(self._file, data[written:], offset + written)
            os.fsync(self._file)
            row = {"chunk": chunk, "crc32": done.crc32, "unreadable": done.unreadable}
            self._progress.write(json.dumps(row).encode() + b"\n")
            self._progress.flush()
            os.fsync(self._progress.fileno())
        self._done[chunk] = done
        self.pending.remove(chunk)

    def read(self, rows: np.ndarray) -> Tensor:
        """Rows view * N + id of what is written: [n] int64 -> [n, Ct] float32."""
        size = self.layout.channels * 2
        data = b"".join(os.pread(self._file, size, int(row) * size) for row in rows)
        found = np.frombuffer(bytearray(data), np.uint16).reshape(len(rows), self.layout.channels)
        return torch.from_numpy(found).view(torch.bfloat16).float()

    def finish(self, *, sound: bool) -> None:
        """Says in cache.json what the whole cache is known by, and that it is complete.

        sound  False: it is not to be used, and not called complete
        """
        assert not self.pending
        unreadable = [[i, *which] for i, which in sorted(self.unreadable.items())]
        self.about |= {
            "complete": sound,
            "unreadable": unreadable,
            "digest": identity(self.about, self._done, self.layout.chunks),
        }
        with self._full_disk_told():
            write_about(self.folder, self.about)

    def close(self) -> None:
        """Closes the files; may be called again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._progress.close()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refuse_small_disk(self) -> None:
        path = self.folder / FEATURES
        there = min(path.stat().st_blocks * 512, self.layout.bytes) if path.is_file() else 0
        missing, free = self.layout.bytes - there, shutil.disk_usage(self.folder).free
        if missing > free:
            layout = self.layout
            size = f"{layout.views} views x {layout.images:,} images x {layout.channels} channels x 2 bytes"
            raise UserError(
                f"the cache takes {layout.bytes / 1e9:.3g} GB ({size}), {missing / 1e9:.3g} GB of it are still to be"
                f" written, and the disk of {self.folder} has {free / 1e9:.3g} GB free: free some space, give another"
                " folder, or take fewer --views"
            )

    def _full_disk_told(self) -> AbstractContextManager[None]:
        remedy = f"free some. Finished chunks stay: {AGAIN} continues from there"
        return disk_full_told(f"for the cache in {self.folder}", remedy)
