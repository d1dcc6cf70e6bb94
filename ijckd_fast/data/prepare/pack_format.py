"""What the kinds of packs differ in: settings, how an image becomes bytes, and the files that hold many of them.

A kind is a class in a file beside this one (pack_jpeg.py, pack_blocks.py); all else of packing is the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL
from PIL import Image, features

from ijckd_fast.data.plan import BatchPlan
from ijckd_fast.data.sources import Place
from ijckd_fast.errors import UserError


class Treatment(IntEnum):
    """What happens to an image."""

    COPY = 0  # its bytes stay
    ENCODE = 1  # encoded, at its size
    RESIZE = 2  # and encoded


def packed_sizes(sizes: np.ndarray, short: int) -> np.ndarray:
    """[N, 2] int32 (width, height) -> the same of images whose shorter side is `short` pixels at most; 0 keeps all."""
    least = sizes.min(1, keepdims=True)
    if short == 0:
        return sizes.copy()
    smaller = np.where(sizes == least, short, np.rint(sizes * (short / least)))
    return np.where(least > short, smaller, sizes).astype(np.int32)


class Stored(ABC):
    """One image of a shard, read when it is asked for, before the next one is. Raises Unreadable where it cannot be.

    id     in the index of the images that are packed
    label  as the shard has it
    """

    id: int
    label: int

    @abstractmethod
    def data(self) -> bytes:
        """What PackFormat.encoded or a copied file gave."""

    @abstractmethod
    def size(self) -> tuple[int, int]:
        """(width, height), after decoding all of it."""

    @abstractmethod
    def view(self, plan: BatchPlan, i: int) -> np.ndarray:
        """The pixels [S, S, 3] uint8 that image i of a batch has where this one is its image, whatever size it has."""


@dataclass(frozen=True)
class PackFormat(ABC):
    """A kind of pack with its settings: what its bytes depend on, beside the images.

    short   pixels of the shorter side above which images are made smaller; 0 keeps all sizes
    raises  UserError for a value out of range
    """

    short: int = 256

    codec: ClassVar[str]  # its name on the command line
    suffix: ClassVar[str]  # of its files
    longest: ClassVar[int]  # pixels that a side may have
    beside_jpeg: ClassVar[bool] = False  # whether its loss is stated beside a JPEG's

    def __post_init__(self) -> None:
        if self.short != 0 and self.short < 32:
            raise UserError(
                "--short (shorter side of the packed images) must be at least 32 pixels, or 0 to keep sizes, found "
                f"{self.short}; 256 is fast, 400 to 500 keeps more"
            )

    def recorded(self) -> dict[str, Any]:
        """As they stand in pack.json, with the versions of the libraries that make the bytes."""
        return {
            "codec": self.codec,
            "short": self.short,
            **self._settings(),
            "subsampling": "4:2:0",
            "resampling": "lanczos",
            "pillow": PIL.__version__,
            "libjpeg_turbo": features.version_feature("libjpeg_turbo"),
        }

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Those of this kind alone."""

    @abstractmethod
    def treatments(self, split: str, sizes: np.ndarray, is_jpeg: np.ndarray) -> np.ndarray:
        """[N] int64 of Treatment, for the images of a split of `sizes` [N, 2]. is_jpeg: [N] bool, of their files."""

    @abstractmethod
    def sizes(self, split: str, sizes: np.ndarray) -> np.ndarray:
        """[N, 2] int32 (width, height) -> as they are to be in the pack."""

    @abstractmethod
    def starts(self, sizes: np.ndarray) -> Sequence[int]:
        """The first image of each shard. sizes: [N, 2], as they are to be in the pack; nothing else is considered."""

    @abstractmethod
    def encoded(self, image: Image.Image, path: str) -> bytes:
        """An RGB image of its final size. path: of its original, for an error."""

    @abstractmethod
    def write(self, path: Path, shard: Shard, images: Iterable[tuple[int, bytes]]) -> None:
        """Writes a shard. images: (row of the shard, its bytes), rows ascending; rows that do not come are left out."""

    @abstractmethod
    def read(self, path: Path) -> Iterator[Stored]:
        """The images of a shard. Raises tarfile.TarError or ValueError where it is none."""

    @abstractmethod
    def is_complete(self, shard: Shard) -> bool:
        """Whether the shard's file is there with all its images, by their ids and labels."""


@dataclass(frozen=True, eq=False)
class Shard:
    """What one shard is to hold, n images.

    path       of the finished shard
    name       the same, relative to the folder of the pack
    checksum   of the shard that an earlier run made; None where it made none
    sums       the file of checksums, to which that of a new shard is added before the shard gets its name
    first      id of its first image; the others follow
    sources    [n] what its images are called in errors; places [n]: where their bytes lie
    labels     [n] int64
    stored     [n, 2] int32, (width, height) as indexed; packed [n, 2] int32, as they are to be in the shard
    treatment  [n] int64, of Treatment
    format     the kind of pack
    """

    path: str
    name: str
    checksum: str | None
    sums: str
    first: int
    sources: list[str]
    places: list[Place]
    labels: np.ndarray
    stored: np.ndarray
    packed: np.ndarray
    treatment: np.ndarray
    format: PackFormat

    @property
    def ids(self) -> np.ndarray:
        """[n] int64."""
        return np.arange(self.first, self.first + len(self.sources))
