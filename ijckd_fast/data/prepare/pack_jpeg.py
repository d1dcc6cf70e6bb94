"""Packs of JPEGs in tar shards, webdataset's layout: <id, 9 digits>.jpg and <id>.cls, its label in ASCII digits.

The content and not the extension says what a .jpg is.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ijckd_fast.data.plan import BatchPlan
from ijckd_fast.data.prepare.pack_format import PackFormat, Shard, Stored, Treatment, packed_sizes
from ijckd_fast.errors import UserError


@dataclass(frozen=True)
class JpegPack(PackFormat):
    """See PackFormat. Training images are made smaller; JPEGs that are small already, and all validation images, stay.

    quality       of the JPEGs, libjpeg's scale
    shard_images  images in a shard; the last one has what is left
    """

    quality: int = 90
    shard_images: int = 1000

    codec: ClassVar[str] = "jpeg"
    suffix: ClassVar[str] = ".tar"
    longest: ClassVar[int] = 65500  # libjpeg's limit

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.quality <= 95:
            raise UserError(f"--quality must be from 1 to 95, found {self.quality}; 90 is usual")
        if self.shard_images < 1:
            raise UserError(f"--shard-images must be at least 1, found {self.shard_images}; 1000 is usual")

    def _settings(self) -> dict[str, Any]:
        return {"quality": self.quality, "shard_images": self.shard_images}

    def treatments(self, split: str, sizes: np.ndarray, is_jpeg: np.ndarray) -> np.ndarray:
        """Validation images are copied, so that accuracies stay comparable."""
        if split == "val":
            return np.full(len(sizes), Treatment.COPY)
        same = (packed_sizes(sizes, self.short) == sizes).all(1)
        return np.where(~same, Treatment.RESIZE, np.where(is_jpeg, Treatment.COPY, Treatment.ENCODE))

    def sizes(self, split: str, sizes: np.ndarray) -> np.ndarray:
        """Validation images keep theirs."""
        return packed_sizes(sizes, 0 if split == "val" else self.short)

    def starts(self, sizes: np.ndarray) -> Sequence[int]:
        """Of equal numbers of images."""
        return range(0, len(sizes), self.shard_images)

    def encoded(self, image: Image.Image, path: str) -> bytes:
        """See encode."""
        return encode(image, self.quality)

    def write(self, path: Path, shard: Shard, images: Iterable[tuple[int, bytes]]) -> None:
        """The label follows its image."""
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, data in images:
                add_member(tar, f"{shard.first + row:09d}.jpg", data)
                add_member(tar, f"{shard.first + row:09d}.cls", b"%d" % shard.labels[row])

    def read(self, path: Path) -> Iterator[Stored]:
        """In their order."""
        with tarfile.open(path, "r:") as tar:
            for number, label, member in members_of(tar):
                yield _StoredJpeg(number, label, tar, member)

    def is_complete(self, shard: Shard) -> bool:
        """By the names of its members, and the labels."""
        try:
            with tarfile.open(shard.path, "r:") as tar:
                there = [(number, label) for number, label, _ in members_of(tar)]
        except (FileNotFoundError, tarfile.TarError, ValueError):
            return False
        return there == list(enumerate(shard.labels.tolist(), shard.first))


class _StoredJpeg(Stored):
    def __init__(self, number: int, label: int, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        self.id, self.label, self._tar, self._member = number, label, tar, member

    def data(self) -> bytes:
        return bytes_of(self._tar, self._member)

    def size(self) -> tuple[int, int]:
        from ijckd_fast.data.load.pillow import decode

        return decode(self._member.name, self.data()).size

    def view(self, plan: BatchPlan, i: int) -> np.ndarray:
        return view_of_jpeg(self._member.name, self.data(), plan, i)


def view_of_jpeg(path: str, data: bytes, plan: BatchPlan, i: int) -> np.ndarray:
    """The pixels [S, S, 3] uint8 that image i of a batch has where `data` is its image. Raises Unreadable."""
    from ijckd_fast.data.load.pillow import decode

    return view_of_image(decode(path, data), plan, i)


def view_of_image(image: Image.Image, plan: BatchPlan, i: int) -> np.ndarray:
    """The same of an image, decoded."""
    # to the same size: the packed image's rounded ratio would move its pixels against the original's
    size = plan.size.copy()
    size[i] = image.height, image.width
    from ijckd_fast.data.load.pillow import arrange

    return arrange(image, replace(plan, size=size), i)


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
