"""What a finished pack says of its own loss, for whoever reads it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ijckd_fast.data.prepare.packing import STATE
from ijckd_fast.files import read_json


class PackLoss(NamedTuple):
    """The evaluation's view of one split's packed images against that of the originals, as `pack` measured it.

    images           of the sample
    mean_levels      mean absolute difference, grey levels of 0..255
    psnr_db          None: no difference
    jpeg_mean_levels, jpeg_psnr_db  of JPEGs of quality 90 of the packed size instead; None in a pack of JPEGs
    """

    split: str
    images: int
    mean_levels: float
    psnr_db: float | None
    jpeg_mean_levels: float | None
    jpeg_psnr_db: float | None

    def __str__(self) -> str:
        """As a sentence has it."""
        beside = ""
        if self.jpeg_mean_levels is not None:
            beside = f" (JPEGs of quality 90: {_levels(self.jpeg_mean_levels, self.jpeg_psnr_db)})"
        return f"{_levels(self.mean_levels, self.psnr_db)} on {self.images} {self.split} images{beside}"


def _levels(mean: float, psnr: float | None) -> str:
    return f"{mean:.2f} grey levels" + ("" if psnr is None else f" and {psnr:.1f} dB")


def pack_loss(root: str | Path, split: str) -> PackLoss | None:
    """Of a split of the pack in `root`; None where it is no pack, or was not finished.

    raises  UserError where pack.json is damaged or cannot be read
    """
    there = read_json(Path(root) / STATE, "restore it from a copy, or run the same ijckd-fast pack command again")
    row = {} if there is None else there.get("splits", {}).get(split, {})
    mean = row.get("mean_abs_difference")
    if mean is None:
        return None
    jpeg = row.get("jpeg_90_mean_abs_difference"), row.get("jpeg_90_psnr_db")
    return PackLoss(split, row["sample"], mean, row["psnr_db"], *jpeg)
