"""What the bytes of a pack depend on, beside the images."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import PIL
from PIL import features

from ijckd_fast.errors import UserError


class Treatment(IntEnum):
    """What happens to an image."""

    COPY = 0  # its bytes stay
    ENCODE = 1  # as JPEG, at its size
    RESIZE = 2  # and encoded


@dataclass(frozen=True)
class PackSettings:
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
                "--short (shorter side of the packed images) must be at least 32 pixels, or 0 to keep sizes, found "
                f"{self.short}; 256 is fast, 400 to 500 keeps more"
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


def packed_sizes(sizes: np.ndarray, short: int) -> np.ndarray:
    """[N, 2] int32 (width, height) -> the same of images whose shorter side is `short` pixels at most; 0 keeps all."""
    least = sizes.min(1, keepdims=True)
    if short == 0:
        return sizes.copy()
    smaller = np.where(sizes == least, short, np.rint(sizes * (short / least)))
    return np.where(least > short, smaller, sizes).astype(np.int32)
