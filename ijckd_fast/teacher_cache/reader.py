"""A folder that stands in for a teacher's backbone: its pooled features of V planned views of every training image.

cache.json              what the features are of: teacher, images, views, settings; complete or not; digests
features.bin            [V, N, Ct] bfloat16, rows in the order of the index; NaN where an image could not be read
progress.jsonl          a line for each finished chunk (up to chunk_images images of one view) with its checksum, flushed after the chunk
classifier.safetensors  the teacher's classifier, weight [K, Ct] and bias [K], float32
val.npz                 the teacher's answers on the validation images
caching.py fills it; training reads it.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from ijckd_fast.data import Augment, Index
from ijckd_fast.data.index_cache import replace_file
from ijckd_fast.errors import UserError
from ijckd_fast.evaluate.accuracy import Evaluation, load_evaluation
from ijckd_fast.files import HOLDER, LOCK, write_text
from ijckd_fast.nets import CachedTeacher

FORMAT = "ijckd-fast teacher cache 1"
ABOUT, FEATURES, PROGRESS, CLASSIFIER, VAL = (
    "cache.json",
    "features.bin",
    "progress.jsonl",
    "classifier.safetensors",
    "val.npz",
)
AGAIN = "the same ijckd-fast cache command"
_NAN = 0x7FC0  # bfloat16
_CHUNKS_LOOKED_AT = 4


@dataclass(frozen=True)
class Layout:
    """Where what lies in features.bin. Chunk c holds up to chunk_images consecutive images of one view, view after view."""

    views: int
    images: int
    channels: int
    chunk_images: int

    @property
    def bytes(self) -> int:
        return self.views * self.images * self.channels * 2

    @property
    def chunks(self) -> int:
        return self.views * -(-self.images // self.chunk_images)

    def part(self, chunk: int) -> tuple[int, range]:
        """The view of a chunk and the ids of its images."""
        view, k = divmod(chunk, -(-self.images // self.chunk_images))
        first = k * self.chunk_images
        return view, range(first, min(first + self.chunk_images, self.images))

    def place(self, chunk: int) -> tuple[int, int]:
        """(offset, length) of a chunk, bytes."""
        view, ids = self.part(chunk)
        row = self.channels * 2
        return (view * self.images + ids.start) * row, len(ids) * row


def plan_settings(index: Index, augment: Augment, seed: int, data_backend: str) -> dict[str, Any]:
    """What the pixels of the views depend on, as it stands in cache.json and is compared at the start of a training."""
    return {
        "index": index.hash,
        "images": len(index),
        "num_classes": index.num_classes,
        "seed": seed,
        "image_size": augment.image_size,
        "scale": list(augment.scale),
        "ratio": list(augment.ratio),
        "crop_padding": augment.crop_padding,
        "hflip": augment.hflip,
        "mean": list(augment.mean),
        "std": list(augment.std),
        "data_backend": data_backend,
    }


def val_key(fingerprint: str, index: Index, augment: Augment, data_backend: str) -> str:
    """What the teacher's answers on the validation images depend on."""
    view = (augment.image_size, augment.eval_resize, augment.mean, augment.std)
    return f"{fingerprint} {index.hash} {view} {data_backend}"


def _differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """'seed 0 where 1 is wanted', for each setting of `wanted` that is another in the cache."""
    found = []
    there = {"crop_padding": 0, **there}  # which older caches do not name
    for name, value in wanted.items():
        if there.get(name) == value:
            continue
        if name == "index":
            found.append("other training images (files, sizes, labels, classes, --train-per-class or --label-noise)")
        else:
            found.append(f"{name} {there.get(name)} where {value} is wanted")
    return found


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _read_about(folder: Path) -> dict[str, Any] | None:
    """What cache.json says; None where there is none. UserError: damaged, or of another version."""
    path = folder / ABOUT
    if not path.is_file():
        return None
    try:
        about = json.loads(path.read_text())
        version, own = about["format"], about.pop("checksum")
        if version == FORMAT and own != _digest(about):
            raise ValueError("its checksum is not that of its content")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): restore it, or make the cache anew (ijckd-fast cache --overwrite)"
        ) from error
    if version != FORMAT:
        raise UserError(f"{folder} holds a {version!r}, wanted {FORMAT!r}: make the cache anew with this version")
    return about


def _layout(about: Mapping[str, Any]) -> Layout:
    settings = about["settings"]
    return Layout(settings["views"], settings["images"], settings["channels"], about["chunk_images"])


@dataclass(frozen=True)
class Done:
    """A finished chunk: crc32 of its bytes, and (id, path, reason) of its images that could not be read."""

    crc32: int
    unreadable: list[tuple[int, str, str]]


def _read_progress(path: Path) -> tuple[dict[int, Done], int]:
    """The finished chunks, and how many bytes of the file say so: a last line that a kill cut off is none."""
    done: dict[int, Done] = {}
    whole = 0
    content = path.read_bytes() if path.is_file() else b""
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line)
            chunk = Done(row["crc32"], [(int(i), where, why) for i, where, why in row["unreadable"]])
            if not line.endswith(b"\n"):
                break
            done[row["chunk"]] = chunk
        except (ValueError, KeyError, TypeError):
            break
        whole += len(line)
    return done, whole


def _crc32(file: int, layout: Layout, chunk: int) -> int:
    """Of the bytes that features.bin holds of a chunk."""
    offset, length = layout.place(chunk)
    return zlib.crc32(os.pread(file, length, offset))


def _identity(about: Mapping[str, Any], done: Mapping[int, Done], chunks: int) -> str:
    """Digest of everything that training sees of a cache: equal ones train to the same bits."""
    return _digest(
        [
            about["teacher"]["fingerprint"],
            about["settings"],
            about["chunk_images"],
            [done[chunk].crc32 for chunk in range(chunks)],
            sorted(_unreadable(done)),
        ]
    )


def _unreadable(done: Mapping[int, Done]) -> dict[int, tuple[str, str]]:
    return {i: (path, why) for chunk in sorted(done) for i, path, why in done[chunk].unreadable}


class TeacherCache:
    """A finished cache, to train from. Opening it reads what is small; features are read as they are asked for.

    path, name (of the teacher's model), fingerprint (nets.fingerprint of the teacher), published (whether its weights are the
    library's), views (V), images (N), channels (Ct), num_classes (K)
    unreadable  id -> reason of images that could not be read: their rows are NaN
    digest      equal for caches that train to the same bits, wherever they lie

    raises      UserError: `path` holds no cache, an unfinished one, or one whose small files do not fit together
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        about = _read_about(self.path)
        if about is None:
            raise UserError(
                f"no teacher cache in {self.path} (it has no {ABOUT}): give the folder that ijckd-fast cache wrote"
            )
        self._layout = layout = _layout(about)
        self._done, _ = _read_progress(self.path / PROGRESS)
        finished = sum(chunk in self._done for chunk in range(layout.chunks))
        if not about["complete"]:
            state = f"finished ({finished} of {layout.chunks} chunks)" if finished < layout.chunks else "verified"
            raise UserError(
                f"the teacher cache {self.path} is not {state}: run {AGAIN} again, which goes on where it stopped"
            )
        if finished < layout.chunks or about["digest"] != _identity(about, self._done, layout.chunks):
            raise UserError(
                f"{self.path / PROGRESS} is damaged: it does not fit {ABOUT}; run {AGAIN} again, which makes what cannot be trusted anew"
            )
        teacher, self._settings = about["teacher"], about["settings"]
        self.name, self.fingerprint, self._classifier_digest = (
            teacher["name"],
            teacher["fingerprint"],
            teacher["classifier"],
        )
        self.published: bool = teacher["weights"] == "published"
        self.views, self.images, self.channels = layout.views, layout.images, layout.channels
        self.num_classes: int = self._settings["num_classes"]
        self.unreadable = {i: why for i, (_, why) in _unreadable(self._done).items()}
        self.digest: str = about["digest"]

    @functools.cached_property
    def classifier(self) -> nn.Linear:
        """The teacher's own (Ct -> K), float32 on the CPU. UserError where its file is damaged."""
        path = self.path / CLASSIFIER
        try:
            weights = safetensors.torch.load_file(path)
            if _tensors_digest(weights) != self._classifier_digest:
                raise ValueError("its checksum is not the one written")
            classifier = nn.Linear(self.channels, self.num_classes, bias="bias" in weights)
            classifier.load_state_dict(weights)
        except Exception as error:  # safetensors has errors of its own
            raise UserError(
                f"{path} is not the classifier that was written ({error}): run {AGAIN} again, which writes it anew"
            ) from error
        return classifier

    def teacher(self) -> CachedTeacher:
        """The teacher as Distiller takes it, without its backbone."""
        return CachedTeacher(self.classifier, self.name, self.fingerprint)

    def check(self, index: Index, augment: Augment, seed: int, data_backend: str) -> None:
        """UserError unless training by these settings sees the views that are in the cache, and what is looked at of it is whole.

        Looked at are the size of features.bin and the checksums of a few chunks, others each time; `ijckd-fast cache` looks at all.
        """
        differs = _differences(self._settings, plan_settings(index, augment, seed, data_backend))
        if differs:
            raise UserError(
                f"the teacher cache {self.path} has {'; '.join(differs)}: train with the cache's settings and images, or make "
                "another cache with these"
            )
        path = self.path / FEATURES
        size = path.stat().st_size if path.is_file() else 0
        if size != self._layout.bytes:
            raise UserError(
                f"{path} has {size:,} bytes, wanted {self._layout.bytes:,}: it was cut off or not copied whole. Copy it again, or run "
                f"{AGAIN} again, which makes what is missing"
            )
        few = np.random.default_rng().permutation(self._layout.chunks)[:_CHUNKS_LOOKED_AT].tolist()
        file = os.open(path, os.O_RDONLY)
        try:
            bad = [chunk for chunk in few if _crc32(file, self._layout, chunk) != self._done[chunk].crc32]
        finally:
            os.close(file)
        if bad:
            view, ids = self._layout.part(bad[0])
            raise UserError(
                f"{path} is damaged: images {ids.start} to {ids.stop - 1} of view {view} are not what was written. Run {AGAIN} again: it "
                "looks at every chunk and makes damaged ones anew"
            )

    @functools.cached_property
    def _features(self) -> np.ndarray:
        shape = (self.views, self.images, self.channels)
        return np.asarray(np.memmap(self.path / FEATURES, np.uint16, "r", shape=shape))

    def pooled(self, ids: np.ndarray, view: int) -> Tensor:
        """The teacher's pooled features of one view of images.

        ids      [B] int64, positions in the index
        view     in [0, V)
        returns  [B, Ct] float32 on the CPU, each a bfloat16 number; NaN for an image in `unreadable`
        """
        rows = self._features[view].take(ids, axis=0)  # [B, Ct]
        return torch.from_numpy(rows).view(torch.bfloat16).float()

    def on_val(self, index: Index, augment: Augment, data_backend: str) -> Evaluation | None:
        """The teacher's own evaluation; None where what was kept is of other validation images or settings."""
        kept = load_evaluation(self.path / VAL)
        if kept is None or kept[0] != val_key(self.fingerprint, index, augment, data_backend):
            return None
        return kept[1]


def _tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name}{list(tensors[name].shape)}".encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- writing ------------------------------------------------------------------------------------------------------------


def refuse_other_folder(folder: Path) -> None:
    """UserError unless `folder` is new, empty, or a cache."""
    if folder.is_dir() and not (folder / ABOUT).is_file():
        inside = sorted(name for name in os.listdir(folder) if name not in (LOCK, HOLDER, f"{ABOUT}.tmp"))
        if inside:
            raise UserError(
                f"wanted an empty folder, or an earlier cache to go on with, but {folder} holds other things ({inside[0]!r}) and no "
                f"{ABOUT}; give another folder"
            )


class CacheWriter:
    """Puts features into the folder of a cache, chunk after chunk. What an earlier run finished is kept, where its checksum fits.

    folder      of the cache; whoever writes holds its lock
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
        if overwrite:
            for each in (
                FEATURES,
                PROGRESS,
                CLASSIFIER,
                VAL,
                ABOUT,
            ):  # this last: without it, what a kill leaves is no cache
                (folder / each).unlink(missing_ok=True)
        tensors = {key: value.detach().cpu().float().contiguous() for key, value in classifier.state_dict().items()}
        teacher = {
            "name": name, "fingerprint": fingerprint, "weights": weights, "classifier": _tensors_digest(tensors)
        }  # fmt: skip
        wanted = {**settings, "views": views, "channels": classifier.in_features}
        self._done, whole = _read_progress(folder / PROGRESS)
        about = _read_about(folder) if self._done else None  # what has no chunk is nothing to be kept
        if about is None:
            about = {
                "format": FORMAT,
                "complete": False,
                "teacher": teacher,
                "settings": wanted,
                "chunk_images": chunk_images,
                "classes": list(classes),
            }
        differs = _differences(about["settings"], wanted)
        for what in ("name", "fingerprint"):
            if about["teacher"][what] != teacher[what]:
                differs.append(f"a teacher of {what} {about['teacher'][what]} where {teacher[what]} is wanted")
        if differs:
            raise UserError(
                f"{folder} holds a teacher cache with {'; '.join(differs)}. To go on with it give what it was begun with, or another "
                "folder; --overwrite deletes it and begins anew"
            )
        self.about: dict[str, Any] = about
        self.layout = _layout(about)
        self._refuse_small_disk()
        with self._full_disk_told():
            if not about["complete"]:
                about["made_with"] = dict(made_with)
                self._write_about()
            self._file = os.open(folder / FEATURES, os.O_RDWR | os.O_CREAT, 0o666)
            if os.fstat(self._file).st_size != self.layout.bytes:
                os.ftruncate(self._file, self.layout.bytes)
            self._progress = open(folder / PROGRESS, "ab")  # noqa: SIM115 - closed by close()
            if self._progress.tell() != whole:
                self._progress.truncate(whole)
        self.damaged = [c for c, done in self._done.items() if _crc32(self._file, self.layout, c) != done.crc32]
        for chunk in self.damaged:
            del self._done[chunk]
        self.pending = [chunk for chunk in range(self.layout.chunks) if chunk not in self._done]
        if self.pending and about["complete"]:
            about["complete"] = False
            self._write_about()
        with self._full_disk_told():
            replace_file(folder / CLASSIFIER, lambda path: path.write_bytes(safetensors.torch.save(tensors)))

    @property
    def unreadable(self) -> dict[int, tuple[str, str]]:
        return _unreadable(self._done)

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
        """Says in cache.json what the whole cache is known by, and that it is complete unless it is not `sound`: not to be used."""
        assert not self.pending
        unreadable = [[i, *which] for i, which in sorted(self.unreadable.items())]
        self.about |= {
            "complete": sound,
            "unreadable": unreadable,
            "digest": _identity(self.about, self._done, self.layout.chunks),
        }
        with self._full_disk_told():
            self._write_about()

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

    def _write_about(self) -> None:
        write_text(self.folder / ABOUT, json.dumps({**self.about, "checksum": _digest(self.about)}, indent=1) + "\n")

    def _refuse_small_disk(self) -> None:
        path = self.folder / FEATURES
        there = min(path.stat().st_blocks * 512, self.layout.bytes) if path.is_file() else 0
        wanted, free = self.layout.bytes - there, shutil.disk_usage(self.folder).free
        if wanted > free:
            size = (
                f"{self.layout.views} views x {self.layout.images:,} images x {self.layout.channels} channels x 2 bytes"
            )
            raise UserError(
                f"the cache takes {self.layout.bytes / 1e9:.3g} GB ({size}), {wanted / 1e9:.3g} GB of it are still to be written, and "
                f"the disk of {self.folder} has {free / 1e9:.3g} GB free: free some space, give another folder, or take fewer --views"
            )

    @contextmanager
    def _full_disk_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"no space left for the cache in {self.folder}: free some. Finished chunks stay: {AGAIN} goes on from there"
            ) from error
