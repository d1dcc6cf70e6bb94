"""The rows of a comparison as a table, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

COLUMNS = ("method", "top-1 %", "agreement %", "deployed parameters", "deployed MACs", "s per run")


def cells(row: Mapping[str, Any]) -> list[str]:
    """What stands under COLUMNS."""
    spread = "" if row["top1_std"] is None else f" ± {row['top1_std']:.2f}"
    return [
        row["method"],
        f"{row['top1_mean']:.2f}{spread}",
        "-" if row["agreement_mean"] is None else f"{row['agreement_mean']:.2f}",
        f"{row['params']:,}",
        f"{row['macs']:,}",
        f"{row['seconds']:.1f}",
    ]


def difference(row: Mapping[str, Any], reference: str) -> str:
    """'+1.20 [+0.30, +2.10] *', the star where the interval excludes 0; '' where there is none."""
    mean, low, high = (row[f"minus_{reference}{end}"] for end in ("", "_low", "_high"))
    if mean is None:
        return ""
    shown = [f"{round(value, 2) + 0.0:+.2f}" for value in (mean, low, high)]  # + 0.0: no -0.00
    return f"{shown[0]} [{shown[1]}, {shown[2]}]" + (" *" if low > 0 or high < 0 else "")


def comparison_table(title: str, rows: Sequence[Mapping[str, Any]], against: Sequence[str] = ()) -> Table:
    """The rows of one regime for the terminal."""
    drawn = Table(COLUMNS[0], title=title)
    for column in COLUMNS[1:]:
        drawn.add_column(column, justify="right")
    for name in against:
        drawn.add_column(f"- {name}", justify="right", no_wrap=True)
    for each in rows:
        drawn.add_row(*cells(each), *(difference(each, name) for name in against))
    return drawn


def markdown_table(rows: Sequence[Mapping[str, Any]], against: Sequence[str] = ()) -> str:
    """The same as Markdown."""
    columns = (*COLUMNS, *(f"- {name}" for name in against))
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    lines += [f"| {' | '.join([*cells(each), *(difference(each, name) for name in against)])} |" for each in rows]
    return "\n".join(lines)
