"""What a pack has lost against the images it is made of, and its figures as a table."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table

from ijckd_fast.data.counter_rng import permutation
from ijckd_fast.data.index import Index
from ijckd_fast.data.load.loader import Unreadable
from ijckd_fast.data.load.pillow import arrange, decode
from ijckd_fast.data.plan import Augment, EvalPlan
from ijckd_fast.data.prepare.pack_format import PackFormat
from ijckd_fast.data.prepare.pack_jpeg import encode, view_of_jpeg

SAMPLE = 256  # images the fidelity is measured on
_SAMPLE_STREAM = 0xF1DE
_BY_JPEG = "jpeg_90_mean_abs_difference"
_QUALITY = 90  # of the JPEGs that a pack of another kind is compared with: the JPEG pack's default


def shard_path(folder: Path, number: int, settings: PackFormat) -> Path:
    """Of a shard in the folder of its split."""
    return folder / f"shard-{number:06d}{settings.suffix}"


def fidelity(
    folder: Path,
    index: Index,
    starts: Sequence[int],
    packed: np.ndarray,
    settings: PackFormat,
    missing: np.ndarray,
) -> dict[str, Any]:
    """How far the evaluation's view of packed images is from that of the originals, on a seeded sample.

    starts   the first image of each shard
    packed   [N, 2] (width, height) of all images in the pack; missing [m]: ids of those that are not there

    sample               images compared: those of the sample whose originals can still be read
    view                 (shorter side they are resized to, side of the centre crop), pixels
    mean_abs_difference  mean over pixels and channels, in grey levels, 0 to 255; None where none was compared
    psnr_db              of the mean squared difference; None for no difference
    jpeg_90_mean_abs_difference  the same mean for JPEGs of quality 90 of the size of the packed images; only where the
                         pack has no JPEGs
    """
    shorter = min(256, settings.short or 256)
    view = Augment(image_size=round(224 * shorter / 256), eval_resize=shorter)
    originals = EvalPlan(index, view, 1)
    sample = set(permutation(0, _SAMPLE_STREAM, len(index))[:SAMPLE].tolist()) - set(missing.tolist())
    absolute, squared, by_jpeg = [], [], []
    for number in np.unique(np.searchsorted(starts, sorted(sample), "right") - 1).tolist():
        for stored in settings.read(shard_path(folder, number, settings)):
            if stored.id in sample:
                plan = originals.batch(stored.id)
                try:
                    image = decode(plan.paths[0])
                    was = arrange(image, plan, 0).astype(np.float64)
                except Unreadable as error:
                    warnings.warn(
                        f"{plan.paths[0]} cannot be read any more ({error.why}); its packed image, made before, "
                        "stays, and is not compared with it",
                        stacklevel=2,
                    )
                    continue
                apart = was - stored.view(plan, 0)
                absolute.append(np.abs(apart).mean())
                squared.append(np.square(apart).mean())
                if settings.beside_jpeg:
                    same = image.resize(tuple(packed[stored.id].tolist()), Image.Resampling.LANCZOS)
                    jpeg = view_of_jpeg(plan.paths[0], encode(same, _QUALITY), plan, 0)
                    by_jpeg.append(np.abs(was - jpeg).mean())
    mean_square = float(np.mean(squared)) if squared else 0.0
    found = {
        "sample": len(absolute),
        "view": [shorter, view.image_size],
        "mean_abs_difference": _mean(absolute),
        "psnr_db": round(10 * math.log10(255**2 / mean_square), 2) if mean_square else None,
    }
    return {**found, _BY_JPEG: _mean(by_jpeg)} if settings.beside_jpeg else found


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 4) if values else None


def pack_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
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
        "  mean difference, grey levels": lambda row: f"{row['mean_abs_difference']:.2f}" if row["sample"] else "none",
        "  PSNR, dB": lambda row: _psnr(row) if row["sample"] else "none",
        "  by JPEG, quality 90": lambda row: f"{row[_BY_JPEG]:.2f}" if row["sample"] else "none",
        "images/s": lambda row: "none packed now" if row["images_per_s"] is None else f"{row['images_per_s']:,.0f}",
        "seconds": lambda row: f"{row['seconds']:.1f}",
    }
    if not any(_BY_JPEG in row for row in rows):
        del lines["  by JPEG, quality 90"]
    for name, of in lines.items():
        table.add_row(name, *(of(row) for row in rows))
    return table


def _psnr(row: dict[str, Any]) -> str:
    return "no difference" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
