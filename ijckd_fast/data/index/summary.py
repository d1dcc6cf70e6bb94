"""What a scan has found, as figures and as a table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from ijckd_fast.data.index.build import Scan

_REASONS, _KINDS = 3, 6  # how many of the reasons, and of the kinds passed over, the table names


def summarize(scan: Scan, seconds: float) -> dict[str, Any]:
    """One split's figures, of plain types. seconds: of the whole scan.

    images_per_class, shorter_side, longer_side (pixels, as stored): [least, median, most] of the images in the index
    bytes, formats, rotated: of the same; rotated counts those whose EXIF tag says that they are not upright
    reasons: how many files were left out for what, most frequent first
    passed_over: how many files were not read because of their names, by extension; passed_over_images: how many of them
    are images or look like them
    opened, images_per_s: files that this scan had to open, and how many a second; None where it opened none
    """
    index, facts = scan.index, scan.files.facts
    good = facts["reason"] == 0
    formats = np.bincount(facts["format"][good], minlength=1)
    # what stands in brackets differs from file to file: how many bytes of one are missing
    reasons = Counter(re.sub(r" \(.*\)$", "", reason) for _, reason in index.quarantined)
    return {
        "split": index.split,
        "images": len(index),
        "classes": index.num_classes,
        "images_per_class": _spread(np.bincount(index.labels, minlength=index.num_classes)),
        "shorter_side": _spread(index.sizes.min(1)),
        "longer_side": _spread(index.sizes.max(1)),
        "bytes": int(facts["length"][good].sum()),
        "formats": {scan.files.formats[i]: int(formats[i]) for i in np.argsort(-formats) if formats[i]},
        "rotated": int((facts["orientation"][good] != 1).sum()),
        "left_out": len(index.quarantined),
        "reasons": dict(reasons.most_common()),
        "passed_over": {row.kind: row.files for row in scan.passed_over},
        "passed_over_images": sum(row.images for row in scan.passed_over),
        "opened": scan.opened,
        "images_per_s": round(scan.opened / scan.opening_seconds, 1) if scan.opened else None,
        "seconds": round(seconds, 3),
        "hash": index.hash,
        "files": None if scan.home is None else str(scan.home),
    }


def _spread(values: np.ndarray) -> list[int]:
    return [int(values.min()), int(np.median(values)), int(values.max())]


def summary_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """The rows of `summarize`, a column for each split."""
    table = Table("", *(row["split"] for row in rows), title=title)
    lines = {
        "images": lambda row: f"{row['images']:,}",
        "classes": lambda row: f"{row['classes']:,}",
        "images per class, least median most": lambda row: _three(row["images_per_class"]),
        "shorter side, pixels": lambda row: _three(row["shorter_side"]),
        "longer side, pixels": lambda row: _three(row["longer_side"]),
        "size, MB": lambda row: f"{row['bytes'] / 1e6:,.1f}",
        "formats": lambda row: _counts(row["formats"]),
        "not upright by EXIF (not turned)": lambda row: f"{row['rotated']:,}",
        "left out": _left_out,
        "passed over by their names": _passed_over,
        "opened now": lambda row: (
            f"{row['opened']:,} at {row['images_per_s']:,.0f}/s" if row["opened"] else "none: nothing new"
        ),
        "seconds": lambda row: f"{row['seconds']:.1f}",
    }
    for name, of in lines.items():
        table.add_row(name, *(of(row) for row in rows))
    return table


def _three(values: list[int]) -> str:
    return "  ".join(f"{value:,}" for value in values)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counts.items())


def _passed_over(row: dict[str, Any]) -> str:
    kinds = row["passed_over"]
    named = _counts(dict(list(kinds.items())[:_KINDS])) + (", ..." if len(kinds) > _KINDS else "")
    images = f"; images among them: {row['passed_over_images']:,}" if row["passed_over_images"] else ""
    return f"{sum(kinds.values()):,}" + (f" ({named}{images})" if kinds else "")


def _left_out(row: dict[str, Any]) -> str:
    named = dict(list(row["reasons"].items())[:_REASONS])
    more = ", ..." if len(row["reasons"]) > _REASONS else ""
    return f"{row['left_out']:,}" + (f" ({_counts(named)}{more})" if named else "")
