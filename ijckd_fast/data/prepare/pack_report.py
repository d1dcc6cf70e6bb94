"""What a pack has lost against the images it is made of, and its figures as a table."""

from __future__ import annotations

import math
import tarfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ijckd_fast.data.counter_rng import permutation
from ijckd_fast.data.index import Index
from ijckd_fast.data.load.loader import Unreadable
from ijckd_fast.data.load.pillow import arrange, decode
from ijckd_fast.data.plan import Augment, EvalPlan
from ijckd_fast.data.prepare.pack_settings import PackSettings
from ijckd_fast.data.prepare.pack_shards import bytes_of, members_of

SAMPLE = 256  # images the fidelity is measured on
_SAMPLE_STREAM = 0xF1DE


def fidelity(
    folder: Path, index: Index, packed: np.ndarray, settings: PackSettings, missing: np.ndarray
) -> dict[str, Any]:
    """How far the evaluation's view of packed images is from that of the originals, on a seeded sample.

    sample               images compared: those of the sample whose originals can still be read
    view                 (shorter side they are resized to, side of the centre crop), pixels
    mean_abs_difference  mean over pixels and channels, in grey levels, 0 to 255; None where none was compared
    psnr_db              of the mean squared difference; None for no difference
    """
    shorter = min(256, settings.short or 256)
    view = Augment(image_size=round(224 * shorter / 256), eval_resize=shorter)
    originals = EvalPlan(index, view, 1)
    sample = set(permutation(0, _SAMPLE_STREAM, len(index))[:SAMPLE].tolist()) - set(missing.tolist())
    differences = []
    for number in sorted({i // settings.shard_images for i in sample}):
        with tarfile.open(folder / f"shard-{number:06d}.tar", "r:") as tar:
            for i, _, member in members_of(tar):
                if i in sample:
                    plan = originals.batch(i)
                    try:
                        was = arrange(decode(plan.paths[0]), plan, 0).astype(np.float64)
                    except Unreadable as error:
                        warnings.warn(
                            f"{plan.paths[0]} cannot be read any more ({error.why}); its packed image, made before, "
                            "stays, and is not compared with it",
                            stacklevel=2,
                        )
                        continue
                    # to the same size: the packed image's rounded ratio would move its pixels against the original's
                    now = arrange(decode(member.name, bytes_of(tar, member)), replace(plan, size=packed[[i], ::-1]), 0)
                    differences.append(was - now)
    if not differences:
        return {"sample": 0, "view": [shorter, view.image_size], "mean_abs_difference": None, "psnr_db": None}
    absolute = float(np.mean([np.abs(difference).mean() for difference in differences]))
    squared = float(np.mean([np.square(difference).mean() for difference in differences]))
    return {
        "sample": len(differences),
        "view": [shorter, view.image_size],
        "mean_abs_difference": round(absolute, 4),
        "psnr_db": round(10 * math.log10(255**2 / squared), 2) if squared else None,
    }


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
        "images/s": lambda row: "none packed now" if row["images_per_s"] is None else f"{row['images_per_s']:,.0f}",
        "seconds": lambda row: f"{row['seconds']:.1f}",
    }
    for name, of in lines.items():
        table.add_row(name, *(of(row) for row in rows))
    return table


def _psnr(row: dict[str, Any]) -> str:
    return "no difference" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
