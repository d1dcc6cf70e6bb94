"""What a study leaves behind: study.csv, report.md, and tables for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ijckd_fast import files
from ijckd_fast.console import say
from ijckd_fast.theory.figures import COLUMNS, ERRORS_ALLOWED, Row, groups

if TYPE_CHECKING:
    from rich.console import Console

REPORT = "report.md"


def _pivot(rows: Sequence[Row], separator: str) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of a table of one group: a line for each `at`, a column for each quantity."""
    quantities = list(dict.fromkeys(row["quantity"] for row in rows))
    lines: dict[Any, dict[str, str]] = {}
    for i, row in enumerate(rows):
        again = any((row["at"], row["measured"]) == (other["at"], other["measured"]) for other in rows[:i])
        lines.setdefault(row["at"], {})[row["quantity"]] = _cell(row, separator, bare=again and row["relation"] == "<=")
    return [rows[0]["axis"], *quantities], [
        [str(at), *(cells.get(q, "") for q in quantities)] for at, cells in lines.items()
    ]


def _cell(row: Row, separator: str, bare: bool = False) -> str:
    """Figure, error and what it is held to; bare: the last alone, where a column on the left shows the others."""
    text = "" if bare else f"{row['measured']:.4g}"
    if row["standard_error"] is not None and not bare:
        text += f" ± {row['standard_error']:.1g}"
    if row["relation"]:
        sign = {"=": "=", "<=": "≤", "about": "~"}[row["relation"]]
        text += f"{'' if bare else separator}{sign} {row['expected']:.4g}"
    return text + (" !" if row["holds"] is False else "")


def print_table(console: Console, title: str, rows: Sequence[Row]) -> None:
    """Shows the rows of one group: a line for each `at`, a column for each quantity."""
    from rich.table import Table

    heads, lines = _pivot(rows, "\n")
    table = Table(*heads, title=title)
    for line in lines:
        table.add_row(*line)
    console.print(table)


def _verdict(rows: Iterable[Row]) -> str:
    judged = [row for row in rows if row["holds"] is not None]
    missed = [row for row in judged if not row["holds"]]
    text = (
        f"{len(judged) - len(missed)} of {len(judged)} figures that have something to be held to are within what is "
        "allowed"
    )
    for row in missed:
        text += (
            f"\n- not: {row['part']}, {row['case']}, {row['axis']} = {row['at']}: {row['quantity']} {_cell(row, ' ')}"
        )
    return text


def write_csv(output: Path, rows: Iterable[Row]) -> None:
    """Writes study.csv to `output`: every figure, floats with 6 digits."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    files.write_text(output / "study.csv", text.getvalue())


def write_study(
    output: Path, rows: Sequence[Row], console: Console, title: str, text: str, plots: Iterable[str]
) -> None:
    """Writes report.md to `output`, and shows the verdict.

    text   what was measured
    plots  names of their files in `output`
    """
    parts = [f"# {title}", text, "".join(f"![{Path(name).stem}]({name}) " for name in plots).rstrip()]
    parts.append(
        f"""A figure is followed by its standard error (±), where chance is involved, and by what it is held to: `=`,
`≤`, or `~` where that is only near; one that stands in a column on the left is not repeated. It is allowed
{ERRORS_ALLOWED} standard errors of the difference, and what the expected value itself is known to be off (`allowed` in
study.csv); `!` marks one that is farther off. {_verdict(rows)}."""
    )
    for (part, case), group in groups(rows).items():
        heads, lines = _pivot(group, " ")
        table = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in (heads, *lines)]
        table.insert(1, "|---" * len(heads) + "|")
        sources = dict.fromkeys((row["quantity"], row["source"]) for row in group if row["source"])
        notes = "; ".join(f"{quantity}: {source}" for quantity, source in sources)
        parts += [f"## {part[0].upper()}{part[1:]}: {case}", "\n".join(table)] + (
            [f"Held to: {notes}."] if notes else []
        )
    parts.append("Every figure, with what it is held to and why: `study.csv`.")
    files.write_text(output / REPORT, "\n\n".join(parts) + "\n")
    for line in _verdict(rows).splitlines():
        say(console, line)
    say(console, f"report: {output / REPORT}")
