"""What lies in the folder of a teacher cache, and how it is read and checked.

cache.json              what the features are of: teacher, images, views, settings; complete or not; digests
features.bin            [V, N, Ct] bfloat16, rows in the order of the index; NaN where an image could not be read
progress.jsonl          a line for each finished chunk (up to chunk_images images of one view) with its checksum,
                        flushed after the chunk
classifier.safetensors  the teacher's classifier, weight [K, Ct] and bias [K], float32
val.npz                 the teacher's answers on the validation images
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ijckd_fast.data import AFFINE_OFF, Augment, Index
from ijckd_fast.errors import UserError
from ijckd_fast.files import Damaged, read_bytes, write_text

FORMAT = "ijckd-fast teacher cache 1"
ABOUT, FEATURES, PROGRESS = "cache.json", "features.bin", "progress.jsonl"
CLASSIFIER, VAL = "classifier.safetensors", "val.npz"
_AT_ONCE = 1 << 22  # bytes: a read of 2 GiB and more gives less than was asked for
AGAIN = "the same ijckd-fast cache command"  # what an error tells to run


@dataclass(frozen=True)
class Layout:
    """Where things lie in features.bin.

    Chunk c holds up to chunk_images consecutive images of one view, view after view.
    """

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

    def chunk_of(self, view: int, ids: np.ndarray) -> np.ndarray:
        """[n] int64, the chunks that hold these images [n] int64 of a view."""
        return view * -(-self.images // self.chunk_images) + ids // self.chunk_images

    def place(self, chunk: int) -> tuple[int, int]:
        """(offset, length) of a chunk, bytes."""
        view, ids = self.part(chunk)
        row = self.channels * 2
        return (view * self.images + ids.start) * row, len(ids) * row


def plan_settings(index: Index, augment: Augment, seed: int, data_backend: str) -> dict[str, Any]:
    """What the pixels of the views depend on, as it stands in cache.json and is compared at the start of a training.

    augment  as the teacher sees the images, whatever the student's are normalised by
    """
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
        **{name: getattr(augment, name) for name in AFFINE_OFF},
        "mean": list(augment.mean),
        "std": list(augment.std),
        "data_backend": data_backend,
    }


def val_key(fingerprint: str, index: Index, augment: Augment, data_backend: str) -> str:
    """What the teacher's answers on the validation images depend on."""
    view = (augment.image_size, augment.eval_resize, augment.mean, augment.std)
    return f"{fingerprint} {index.hash} {view} {data_backend}"


def differences(there: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """'seed 0 where 1 is expected', for each setting of `expected` that is another in the cache."""
    found = []
    there = {"crop_padding": 0, **AFFINE_OFF, **there}  # which older caches do not name
    for name, value in expected.items():
        if there.get(name) == value:
            continue
        if name == "index":
            found.append("other training images (files, sizes, labels, classes, --train-per-class or --label-noise)")
        else:
            setting = f"teacher_{name}" if name in ("mean", "std") else name
            found.append(f"{setting} {there.get(name)} where {value} is expected")
    return found


def digest(content: Any) -> str:
    """Hex digest of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_about(folder: Path) -> dict[str, Any] | None:
    """What cache.json says; None where there is none. UserError: damaged, or of another version."""
    path = folder / ABOUT
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        return None
    try:
        about = json.loads(content)
        version, own = about["format"], about.pop("checksum")
        if version == FORMAT and own != digest(about):
            raise ValueError("its checksum is not that of its content")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(
            f"{path} is damaged ({error}): restore it, or make the cache again (ijckd-fast cache --overwrite)"
        ) from error
    if version != FORMAT:
        raise UserError(
            f"{path} is of a {version!r}, expected {FORMAT!r}: restore it where it is damaged, or make the cache again"
            " with this version"
        )
    return about


def write_about(folder: Path, about: Mapping[str, Any]) -> None:
    """Writes cache.json, with the checksum that `read_about` asks for."""
    write_text(folder / ABOUT, json.dumps({**about, "checksum": digest(about)}, indent=1) + "\n")


def layout_of(about: Mapping[str, Any]) -> Layout:
    """The layout of the cache that cache.json describes."""
    settings = about["settings"]
    return Layout(settings["views"], settings["images"], settings["channels"], about["chunk_images"])


@dataclass(frozen=True)
class Done:
    """A finished chunk: crc32 of its bytes, and (id, path, reason) of its images that could not be read."""

    crc32: int
    unreadable: list[tuple[int, str, str]]


def read_progress(path: Path) -> tuple[dict[int, Done], int]:
    """The finished chunks, and how many bytes of the file say so: a last line that a kill cut off is none."""
    done: dict[int, Done] = {}
    whole = 0
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        content = b""
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line)
            chunk = Done(row["crc32"], [(int(i), where, why) for i, where, why in row["unreadable"]])
            if not line.endswith(b"\n"):
                break
            done[row["chunk"]] = chunk
        except (ValueError, KeyError, TypeError, RecursionError):
            break
        whole += len(line)
    return done, whole


def crc32(file: int, layout: Layout, chunk: int) -> int:
    """Of the bytes that features.bin holds of a chunk."""
    offset, length = layout.place(chunk)
    found = 0
    for start in range(offset, offset + length, _AT_ONCE):
        found = zlib.crc32(os.pread(file, min(_AT_ONCE, offset + length - start), start), found)
    return found


def identity(about: Mapping[str, Any], done: Mapping[int, Done], chunks: int) -> str:
    """Digest of everything that training sees of a cache: equal ones train to the same bits."""
    return digest(
        [
            about["teacher"]["fingerprint"],
            about["settings"],
            about["chunk_images"],
            [done[chunk].crc32 for chunk in range(chunks)],
            sorted(unreadable_of(done)),
        ]
    )


def unreadable_of(done: Mapping[int, Done]) -> dict[int, tuple[str, str]]:
    """id -> (path, reason) of the images that could not be read, of all chunks."""
    return {i: (path, why) for chunk in sorted(done) for i, path, why in done[chunk].unreadable}


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hex digest of tensors on the CPU: their names, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name}{list(tensors[name].shape)}".encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
