"""What a scan has found, as figures and as a table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from ijckd_fast.data.index.build import Scan
from ijckd_fast.data.index.check import By
from ijckd_fast.data.index.kept import Names
from ijckd_fast.data.sources.passed_over import NO_CLASS

_REASONS, _KINDS = 3, 6  # how many of the reasons, and of the kinds passed over, the table names
_VARIANTS = 5


def summarize(scan: Scan, seconds: float) -> dict[str, Any]:
    """One split's figures, of plain types. seconds: of the whole scan.

    images_per_class, shorter_side, longer_side (pixels, as stored): [least, median, most] of the images in the index
    bytes, formats, rotated: of the same; rotated counts those whose EXIF tag says that they are not upright
    reasons: how many files were left out for what, most frequent first
    layout, folder, labels_from: what kind of data folder it is, where its images lie, what says their labels
    skipped: images of no class, by a negative label
    passed_over: how many files were not read because of their names, by extension; passed_over_images: how many of them
    are images or look like them
    by_pillow: images of odd variants that Pillow decodes where DALI makes the batches
    variants: of the odd variants, most frequent first, how many images DALI decodes, how many Pillow does since DALI
    cannot, how many since DALI makes other pixels, and how many since DALI was not asked
    opened, images_per_s: files that this scan had to open, and how many a second; None where it opened none
    """
    index, facts = scan.index, scan.facts
    good = facts["reason"] == 0
    formats = np.bincount(facts["format"][good], minlength=1)
    # what stands in brackets differs from file to file: how many bytes of one are missing
    reasons = Counter(re.sub(r" \(.*\)$", "", reason) for _, reason in index.quarantined)
    return {
        "split": index.split,
        "layout": scan.layout,
        "folder": index.folder,
        "labels_from": scan.labels_from,
        "images": len(index),
        "classes": index.num_classes,
        "images_per_class": _spread(np.bincount(index.labels, minlength=index.num_classes)),
        "shorter_side": _spread(index.sizes.min(1)),
        "longer_side": _spread(index.sizes.max(1)),
        "bytes": int(facts["length"][good].sum()),
        "formats": {scan.formats[i]: int(formats[i]) for i in np.argsort(-formats) if formats[i]},
        "rotated": int((facts["orientation"][good] != 1).sum()),
        "by_pillow": 0 if index.odd is None else int(index.odd.by_pillow.sum()),
        "variants": _variants(scan.variants, facts[good]),
        "skipped": index.skipped,
        "left_out": len(index.quarantined),
        "reasons": dict(reasons.most_common()),
        "passed_over": {row.kind: row.files for row in scan.passed_over if row.kind != NO_CLASS},
        "passed_over_images": sum(row.images for row in scan.passed_over),
        "opened": scan.opened,
        "images_per_s": round(scan.opened / scan.opening_seconds, 1) if scan.opened else None,
        "seconds": round(seconds, 3),
        "hash": index.hash,
        "files": None if scan.home is None else str(scan.home),
    }


def _variants(names: Names, facts: np.ndarray) -> dict[str, dict[str, int]]:
    """facts: of the good images."""
    counts = np.zeros((len(names), len(By)), np.int64)
    np.add.at(counts, (facts["variant"], facts["by"]), 1)
    counts[0] = 0  # plain
    order = np.argsort(-counts.sum(1), kind="stable")
    return {
        names[number]: {who.name.lower(): int(n) for who, n in zip(By, counts[number], strict=True) if n}
        for number in order
        if counts[number].any()
    }


def _spread(values: np.ndarray) -> list[int]:
    return [int(values.min()), int(np.median(values)), int(values.max())]


def summary_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """The rows of `summarize`, a column for each split."""
    table = Table("", *(row["split"] for row in rows), title=title)
    lines = {
        "layout": lambda row: row["layout"],
        "labels from": lambda row: row["labels_from"],
        "images": lambda row: f"{row['images']:,}",
        "classes": lambda row: f"{row['classes']:,}",
        "images per class, least median most": lambda row: _three(row["images_per_class"]),
        "shorter side, pixels": lambda row: _three(row["shorter_side"]),
        "longer side, pixels": lambda row: _three(row["longer_side"]),
        "size, MB": lambda row: f"{row['bytes'] / 1e6:,.1f}",
        "formats": lambda row: _counts(row["formats"]),
        "not upright by EXIF (not turned)": lambda row: f"{row['rotated']:,}",
        "odd variants": _odd,
        "of these decoded by Pillow, also with DALI": _by_pillow,
        "skipped for a negative label": lambda row: f"{row['skipped']:,}",
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


def _counts(counts: dict[str, int], most: int | None = None) -> str:
    named = [f"{name} {n:,}" for name, n in counts.items()]
    return ", ".join([*named[:most], *(["..."] if len(named[:most]) < len(named) else [])])


def _odd(row: dict[str, Any]) -> str:
    return _counts({name: sum(by.values()) for name, by in row["variants"].items()}, _VARIANTS) or "none"


def _by_pillow(row: dict[str, Any]) -> str:
    said = {"pillow_alone": "DALI cannot", "pillow": "DALI makes other pixels", "unasked": "DALI was not asked"}
    counts = {text: sum(by.get(who, 0) for by in row["variants"].values()) for who, text in said.items()}
    named = _counts({text: n for text, n in counts.items() if n})
    return f"{row['by_pillow']:,}" + (f" ({named})" if named else "")


def _passed_over(row: dict[str, Any]) -> str:
    kinds = row["passed_over"]
    named = _counts(dict(list(kinds.items())[:_KINDS])) + (", ..." if len(kinds) > _KINDS else "")
    images = f"; images among them: {row['passed_over_images']:,}" if row["passed_over_images"] else ""
    return f"{sum(kinds.values()):,}" + (f" ({named}{images})" if kinds else "")


def _left_out(row: dict[str, Any]) -> str:
    named = _counts(row["reasons"], _REASONS)
    return f"{row['left_out']:,}" + (f" ({named})" if named else "")
