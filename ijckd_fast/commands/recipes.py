"""`ijckd-fast recipes`: the packaged pairs of teacher and student, and what each deploys."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from ijckd_fast.commands import Arguments, Outcome

SUMMARY = "The packaged teacher-student pairs and what each deploys."
DESCRIPTION = (
    "A table (Markdown) of the presets with a teacher: parameters, and multiply-accumulates per image in convolutions "
    "and linear layers, of the student with a classifier of its own and of what the preset deploys (backbone, "
    "connector, teacher's classifier). The nets are built with random weights: no data, nothing is downloaded. Where "
    "standard output is no terminal, its last line is one JSON object."
)

_COLUMNS = {
    "preset": "preset",
    "student_params": "student alone: parameters",
    "student_macs": "MACs",
    "connector": "connector",
    "connector_params": "its parameters",
    "deployed_params": "deployed: parameters",
    "deployed_macs": "MACs",
}


def add_arguments(parser: ArgumentParser) -> None:
    """Which presets, and what to change of them."""
    parser.add_argument("presets", type=str, nargs="*", help="names of presets; default: all")
    parser.add_argument("--objective", type=str, help="instead of the presets'")
    parser.add_argument("--connector", type=str, help="instead of the presets'")


def run(args: Arguments) -> Outcome:
    """Builds one pair after the other; a row for each."""
    from ijckd_fast.train.config import pair_names, preset_of_pair

    names = [preset_of_pair(name) for name in args.presets or pair_names()]

    from ijckd_fast.train import pairs

    changes = {name: getattr(args, name) for name in ("objective", "connector") if getattr(args, name) is not None}
    rows = []
    for name in names:
        rows.append({"preset": name, **pairs.cost_row(*pairs.build_pair(name, **changes))})
        if len(rows) == 1:
            print(table_head())
        print(table_line(rows[-1]), flush=True)
    return Outcome(rows)


def table_head() -> str:
    """Two lines of a Markdown table, to print before those of `table_line`."""
    align = ("---" if column in ("preset", "connector") else "---:" for column in _COLUMNS)
    return f"| {' | '.join(_COLUMNS.values())} |\n|{'|'.join(align)}|"


def table_line(row: dict[str, Any]) -> str:
    """A row of `pairs.cost_row`, with its `preset`, as a line of a Markdown table."""
    cells = (f"{row[c]:,}" if isinstance(row[c], int) else f"`{row[c]}`" for c in _COLUMNS)
    return f"| {' | '.join(cells)} |"
