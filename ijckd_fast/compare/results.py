"""runs.csv: a line for each finished run of a comparison."""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ijckd_fast import files
from ijckd_fast.compare.runs import Run
from ijckd_fast.train import run_folder

RESULTS = "runs.csv"
COLUMNS = (
    "comparison", "regime", "method", "seed", "top1", "agreement", "teacher_top1", "params", "macs", "seconds", "date",
    "commit", "code", "torch", "dali", "device", "cores",
)  # fmt: skip


def write_results(path: Path, comparison: str, finished: Mapping[Run, Mapping[str, Any]]) -> None:
    """Replaces the file by a line for each of these runs, in their order.

    comparison  its name
    finished    run -> its summary
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_line(comparison, run, summary) for run, summary in finished.items())
    files.write_text(path, text.getvalue())


def append_result(path: Path, comparison: str, run: Run, summary: Mapping[str, Any]) -> None:
    """Adds the line of a run that has just ended."""
    with open(path, "a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(_line(comparison, run, summary))


def _line(comparison: str, run: Run, summary: Mapping[str, Any]) -> list[Any]:
    environment = run_folder.read_environment(run.folder) or {}
    last = summary["last"]
    dirty = "-dirty" if environment.get("git_changed_files") else ""
    values = {
        "comparison": comparison,
        "regime": run.regime,
        "method": run.method,
        "seed": run.seed,
        "top1": f"{last['top1_percent']:.3f}",
        "agreement": _or_empty(last["agreement_percent"], ".3f"),
        "teacher_top1": _or_empty(summary["teacher_top1_percent"], ".3f"),
        "params": summary["params"],
        "macs": summary["macs"],
        "seconds": f"{summary['seconds']:.2f}",
        "date": datetime.date.fromtimestamp((run.folder / run_folder.SUMMARY).stat().st_mtime).isoformat(),
        "commit": (environment.get("git_commit") or "")[:10] + dirty,
        "code": environment.get("code_hash"),
        "torch": environment.get("torch"),
        "dali": environment.get("dali"),
        "device": run.config.device,
        "cores": environment.get("host_cores"),
    }
    return [values[column] for column in COLUMNS]


def _or_empty(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
