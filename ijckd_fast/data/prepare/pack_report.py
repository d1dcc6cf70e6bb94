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
from ijckd_fast.data.load.pillow import arrange, stored_image
from ijckd_fast.data.plan import Augment, EvalPlan
from ijckd_fast.data.prepare.pack_format import PackFormat
from ijckd_fast.data.prepare.pack_jpeg import encode, view_of_image, view_of_jpeg
from ijckd_fast.data.unreadable import Unreadable

SAMPLE = 256  # images the fidelity is measured on
_SAMPLE_STREAM = 0xF1DE
_ENCODING, _JPEG = "encoding_", "jpeg_90_"
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
    Only where the pack has no JPEGs, besides:
    encoding_mean_abs_difference, encoding_psnr_db  the same against the images made smaller, not the originals: what
                         encoding them alone has lost
    jpeg_90_...          all four for JPEGs of quality 90 of the size of the packed images
    """
    shorter = min(256, settings.short or 256)
    view = Augment(image_size=round(224 * shorter / 256), eval_resize=shorter)
    originals = EvalPlan(index, view, 1)
    sample = set(permutation(0, _SAMPLE_STREAM, len(index))[:SAMPLE].tolist()) - set(missing.tolist())
    apart: dict[str, list[np.ndarray]] = {"": []}  # what against what -> of each image (mean, mean square)
    if settings.beside_jpeg:
        apart |= {_ENCODING: [], _JPEG: [], _JPEG + _ENCODING: []}
    for number in np.unique(np.searchsorted(starts, sorted(sample), "right") - 1).tolist():
        for stored in settings.read(shard_path(folder, number, settings)):
            if stored.id in sample:
                plan = originals.batch(stored.id)
                try:
                    image = stored_image(plan, 0)
                    was = arrange(image, plan, 0)
                except Unreadable as error:
                    warnings.warn(
                        f"{plan.paths[0]} cannot be read any more ({error.why}); its packed image, made before, "
                        "stays, and is not compared with it",
                        stacklevel=2,
                    )
                    continue
                now = stored.view(plan, 0)
                apart[""].append(_apart(was, now))
                if settings.beside_jpeg:
                    small = image.resize(tuple(packed[stored.id].tolist()), Image.Resampling.LANCZOS)
                    smaller = view_of_image(small, plan, 0)
                    jpeg = view_of_jpeg(plan.paths[0], encode(small, _QUALITY), plan, 0)
                    apart[_ENCODING].append(_apart(smaller, now))
                    apart[_JPEG].append(_apart(was, jpeg))
                    apart[_JPEG + _ENCODING].append(_apart(smaller, jpeg))
    found: dict[str, Any] = {"sample": len(apart[""]), "view": [shorter, view.image_size]}
    for name, values in apart.items():
        absolute, squared = np.mean(values, 0).tolist() if values else (None, 0)
        found[f"{name}mean_abs_difference"] = None if absolute is None else round(absolute, 4)
        found[f"{name}psnr_db"] = round(10 * math.log10(255**2 / squared), 2) if squared else None
    return found


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[2] of two views [S, S, 3] uint8: the mean difference, and that of its squares."""
    difference = a.astype(np.float64) - b
    return np.array([np.abs(difference).mean(), np.square(difference).mean()])


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
        "  mean difference, grey levels": lambda row: _mean(row),
        "  PSNR, dB": lambda row: _psnr(row),
        "  both of the encoding alone": lambda row: f"{_mean(row, _ENCODING)}  {_psnr(row, _ENCODING)}",
        "JPEGs of quality 90 instead": lambda row: f"{_mean(row, _JPEG)}  {_psnr(row, _JPEG)}",
        "  of the encoding alone": lambda row: f"{_mean(row, _JPEG + _ENCODING)}  {_psnr(row, _JPEG + _ENCODING)}",
        "images/s": lambda row: "none packed now" if row["images_per_s"] is None else f"{row['images_per_s']:,.0f}",
        "seconds": lambda row: f"{row['seconds']:.1f}",
    }
    if not any(f"{_JPEG}psnr_db" in row for row in rows):
        lines = {name: of for name, of in lines.items() if "JPEGs" not in name and "encoding" not in name}
    for name, of in lines.items():
        table.add_row(name, *(of(row) for row in rows))
    return table


def _mean(row: dict[str, Any], what: str = "") -> str:
    return f"{row[f'{what}mean_abs_difference']:.2f}" if row["sample"] else "none"


def _psnr(row: dict[str, Any], what: str = "") -> str:
    value = row[f"{what}psnr_db"]
    return "none" if not row["sample"] else "no difference" if value is None else f"{value:.1f}"
