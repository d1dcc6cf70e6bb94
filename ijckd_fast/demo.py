"""`ijckd-fast demo`: a teacher, then one small student distilled by several methods, on real JPEG files."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ijckd_fast import run_folder
from ijckd_fast.config import load_preset, make_config
from ijckd_fast.data import write_digits
from ijckd_fast.errors import UserError, did_you_mean
from ijckd_fast.objectives import PRESETS
from ijckd_fast.report import figure
from ijckd_fast.train import TrainConfig, resolve, train

METHODS = ("ce", "kd", "srrl", "simkd", "ijckd")

# The task was fixed from the accuracies of plain training (ce) alone, before any other method had been run: of two student
# widths (0.25 and 0.5) and five schedules, the one at which ce is well trained (120 epochs; 90.9 % over three seeds) and
# still far from the teacher's 98.9 %.
TASK = (
    "Handwritten digits (scikit-learn's 1,797), JPEG files of 32 x 32 pixels read at 16 x 16, random crops, no flip. The teacher "
    "trains on all 1,000 training images, each student on 10 images per class: seed s draws its own 100 images, the same for "
    "every method. Top-1 is that of the last epoch on the 797 held-out images. The task was fixed from the results of ce alone, "
    "and every method has the same schedule, which was not tuned for any of them."
)


def run_demo(output: Path, *, seeds: int, methods: Sequence[str], console: Console) -> list[dict[str, Any]]:
    """Trains everything into `output` and writes report.md, accuracy.png and curves.png there.

    seeds    runs per method, seeds 0 ... seeds - 1
    methods  names of objectives
    console  shows each figure as it falls
    returns  one row per method: {"method", "top1_mean", "top1_std", "seeds", "agreement_mean", "params", "macs", "seconds"};
             accuracies and agreement in percent, top1_std the sample standard deviation (null for one seed), params and macs
             as deployed, seconds the mean of a run (training and evaluation)
    Runs that are in `output` already, with the same settings and the same code, are used again; one that was interrupted is
    resumed.
    """
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {seeds}")
    if not methods:
        raise UserError(f"--methods names no method: wanted some of {', '.join(PRESETS)}, separated by commas")
    for method in methods:
        if method not in PRESETS:
            raise UserError(
                f"unknown method '{method}': wanted some of {', '.join(PRESETS)}{did_you_mean(method, PRESETS)}"
            )
    start = time.perf_counter()
    console.print(TASK + "\n", highlight=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nets this small gain nothing from more, and the figures then do not depend on the cores
    try:
        rows = _train_and_report(output, seeds, methods, console)
    finally:
        torch.set_num_threads(threads)
    console.print(f"{time.perf_counter() - start:.0f} s in all; report: {output / run_folder.REPORT}", highlight=False)
    return rows


def _train_and_report(output: Path, seeds: int, methods: Sequence[str], console: Console) -> list[dict[str, Any]]:
    data = write_digits(output / "digits")

    settings = {"data_dir": str(data), "tensorboard": False}
    teacher_folder = output / "teacher"
    teacher_config = make_config({**load_preset("digits_teacher"), **settings, "output_dir": str(teacher_folder)})
    teacher, reused = _run(teacher_config, console, reuse=True)
    _tell(console, "teacher", teacher, reused)

    student = {
        **load_preset("digits_student"),
        **settings,
        "teacher_checkpoint": str(teacher_folder / run_folder.LAST),
    }
    runs: dict[str, list[dict[str, Any]]] = {}
    for method in methods:
        runs[method] = []
        for seed in range(seeds):
            folder = output / f"{method}-seed{seed}"
            config = make_config({**student, "objective": method, "seed": seed, "output_dir": str(folder)})
            summary, used_again = _run(config, console, reuse=reused)  # a new teacher makes old students worthless
            _tell(console, f"{method} seed {seed}", summary, used_again)
            runs[method].append(summary)

    rows = [_row(method, summaries) for method, summaries in runs.items()]
    table = _table(rows)
    console.print(table)
    _plot_accuracy(output / "accuracy.png", runs, teacher)
    _plot_curves(output / "curves.png", runs, output)
    _write_report(output, rows, teacher)
    return rows


def _run(config: TrainConfig, console: Console, *, reuse: bool) -> tuple[dict[str, Any], bool]:
    """(summary, whether it was there already). A run of other settings or other code in its folder is replaced."""
    config = resolve(config)
    assert config.output_dir is not None
    folder = Path(config.output_dir)
    environment = run_folder.read_json(folder / run_folder.ENVIRONMENT)
    same = (
        reuse
        and environment is not None
        and environment["code_hash"] == run_folder.code_hash()
        and run_folder.read_config(folder) == dataclasses.asdict(config)
    )
    summary = run_folder.read_json(folder / run_folder.SUMMARY)
    if same and summary is not None:
        return summary, True
    return train(config, resume=same, overwrite=not same, console=Console(quiet=True)), False


def _tell(console: Console, name: str, summary: dict[str, Any], reused: bool) -> None:
    last = summary["last"]
    agreement = "" if last["agreement_percent"] is None else f", agreement {last['agreement_percent']:6.2f} %"
    again = " (finished earlier, used again)" if reused else ""
    console.print(
        f"{name:14}  top-1 {last['top1_percent']:6.2f} %{agreement}, {summary['seconds']:5.1f} s{again}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _row(method: str, summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    top1 = [summary["last"]["top1_percent"] for summary in summaries]
    return {
        "method": method,
        "top1_mean": statistics.mean(top1),
        "top1_std": statistics.stdev(top1) if len(top1) > 1 else None,
        "seeds": len(top1),
        "agreement_mean": statistics.mean(summary["last"]["agreement_percent"] for summary in summaries),
        "params": summaries[0]["params"],
        "macs": summaries[0]["macs"],
        "seconds": statistics.mean(summary["seconds"] for summary in summaries),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    spread = "" if row["top1_std"] is None else f" ± {row['top1_std']:.2f}"
    return [
        row["method"],
        f"{row['top1_mean']:.2f}{spread}",
        f"{row['agreement_mean']:.2f}",
        f"{row['params']:,}",
        f"{row['macs']:,}",
        f"{row['seconds']:.1f}",
    ]


_COLUMNS = ("method", "top-1 %", "agreement %", "deployed parameters", "deployed MACs", "s per run")


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(*_COLUMNS[:1], title=f"the same student by {len(rows)} methods, {rows[0]['seeds']} seeds each")
    for column in _COLUMNS[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _plot_accuracy(path: Path, runs: dict[str, list[dict[str, Any]]], teacher: dict[str, Any]) -> None:
    drawing, ((axes,),) = figure(1)
    for position, summaries in enumerate(runs.values()):
        top1 = [summary["last"]["top1_percent"] for summary in summaries]
        axes.plot([position] * len(top1), top1, "o", color="tab:blue", markersize=4, alpha=0.6)
        axes.plot(position, statistics.mean(top1), "_", color="black", markersize=24)
    level = teacher["last"]["top1_percent"]
    axes.axhline(level, color="tab:orange", linewidth=1, label=f"teacher {level:.1f} %")
    axes.set(ylabel="top-1 %: each seed, mean", xlim=(-0.6, len(runs) - 0.4))
    axes.set_xticks(range(len(runs)), list(runs))
    axes.legend(fontsize="small")
    drawing.savefig(path, dpi=150)


def _plot_curves(path: Path, runs: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """Validation top-1 over the epochs: thin lines the seeds, thick their mean."""
    drawing, ((axes,),) = figure(1)
    for number, (method, summaries) in enumerate(runs.items()):
        curves = []
        for seed in range(len(summaries)):
            rows = [row for row in run_folder.read_log(output / f"{method}-seed{seed}") if row["kind"] == "eval"]
            curves.append([row["top1_percent"] for row in rows])
            axes.plot([row["epoch"] for row in rows], curves[-1], color=f"C{number}", linewidth=0.5, alpha=0.6)
        mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
        axes.plot([row["epoch"] for row in rows], mean, color=f"C{number}", linewidth=2, label=method)
    axes.set(xlabel="epoch", ylabel="validation top-1 %")
    axes.legend(fontsize="small", loc="lower right")
    drawing.savefig(path, dpi=150)


def _write_report(output: Path, rows: Sequence[dict[str, Any]], teacher: dict[str, Any]) -> None:
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---|" + "---:|" * (len(_COLUMNS) - 1)]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    table = "\n".join(lines)
    student = load_preset("digits_student")
    config = teacher["config"]
    environment = json.loads((output / "teacher" / run_folder.ENVIRONMENT).read_text())
    run_folder.write_text(
        output / run_folder.REPORT,
        f"""# Demo: one student, {len(rows)} ways to train it

{TASK}

Teacher: {config["student"]}, {teacher["params"]:,} parameters, top-1 {teacher["last"]["top1_percent"]:.2f} %.
Student: {student["student"]}, {student["epochs"]} epochs of {student["train_per_class"] * 10} images.

{table}

Mean ± sample standard deviation over {rows[0]["seeds"]} seeds. Agreement: share of the held-out images on which student and
teacher give the same class. Deployed: backbone, connector and classifier, whatever answers after training; methods that answer
through the teacher's classifier (simkd, ijckd) deploy more than the others. With so few seeds and images, differences of about a
standard deviation mean nothing.

![accuracy](accuracy.png) ![curves](curves.png)

Measured with torch {environment["torch"]}, {environment["torch_threads"]} thread for the nets and {config["workers"]} for the images, \
on a machine with {environment["host_cores"]} CPU cores ({environment["host"]}).
Each run has its own folder with a report: teacher/, <method>-seed<n>/.
""",
    )
