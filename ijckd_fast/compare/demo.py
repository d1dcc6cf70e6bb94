"""`ijckd-fast demo`: a comparison with one regime, a teacher and a small student by several methods, on real JPEGs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ijckd_fast import files
from ijckd_fast.compare.comparison import DIGITS, Comparison
from ijckd_fast.compare.figures import Summaries, method_row
from ijckd_fast.compare.plots import ACCURACY, plot_accuracy
from ijckd_fast.compare.tables import comparison_table, markdown_table
from ijckd_fast.console import say
from ijckd_fast.distill import PRESETS
from ijckd_fast.errors import UserError, did_you_mean
from ijckd_fast.plots import figure
from ijckd_fast.train import run_folder
from ijckd_fast.train.config import load_preset

METHODS = ("ce", "kd", "srrl", "simkd", "ijckd")

# The task was fixed from the accuracies of plain training (ce) alone, before any other method had been run: of two
# student widths (0.25 and 0.5) and five schedules, the one at which ce is well trained (120 epochs; 90.9 % over three
# seeds) and still far from the teacher's 98.9 %.
TASK = (
    "Handwritten digits (scikit-learn's 1,797), JPEG files of 32 x 32 pixels read at 16 x 16, random crops, no flip. "
    "The teacher trains on all 1,000 training images, each student on 10 images per class: seed s draws its own 100 "
    "images, the same for every method. Top-1 is that of the last epoch on the 797 held-out images. The task was fixed "
    "from the results of ce alone, and every method has the same schedule, which was not tuned for any of them."
)


def run_demo(output: Path, *, seeds: int, methods: Sequence[str], console: Console) -> list[dict[str, Any]]:
    """Trains everything into `output` and writes report.md, accuracy.png and curves.png there.

    seeds    runs per method, seeds 0 ... seeds - 1
    methods  names of objectives
    console  shows each figure as it falls
    returns  one `method_row` per method
    raises   UserError for an unknown method, and where a run failed

    Runs that are in `output` already, with the same settings and the same code, are used again; one that was
    interrupted is resumed.
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
    comparison = Comparison(
        name="demo",
        methods={method: {"objective": method} for method in methods},
        base={**load_preset("digits_student"), "tensorboard": False},
        teacher={**load_preset("digits_teacher"), "tensorboard": False},
        seeds=seeds,
        data_dir=DIGITS,
    )
    from ijckd_fast.compare.training import train_all  # here: what could be mistyped is known without torch

    outcome = train_all(comparison, output, console=console)
    if outcome.failed:
        raise UserError(f"{len(outcome.failed)} runs failed, see above: {', '.join(outcome.failed)}")
    assert outcome.teacher is not None
    runs = outcome.runs[""]
    rows = [method_row(method, summaries) for method, summaries in runs.items()]
    console.print(comparison_table(f"the same student by {len(rows)} methods, {rows[0]['seeds']} seeds each", rows))
    plot_accuracy(output / ACCURACY, outcome.runs, {"": outcome.teacher["last"]["top1_percent"]})
    _plot_curves(output / "curves.png", runs, output, console)
    _write_report(output, rows, outcome.teacher)
    console.print(f"{time.perf_counter() - start:.0f} s in all; report: {output / run_folder.REPORT}", highlight=False)
    return rows


def _plot_curves(path: Path, runs: Mapping[str, Summaries], output: Path, console: Console) -> None:
    """Validation top-1 over the epochs: thin lines the seeds, thick their mean. Says which logs are damaged."""
    from ijckd_fast.compare.runs import folder_of

    drawing, ((axes,),) = figure(1)
    for number, (method, summaries) in enumerate(runs.items()):
        seen: dict[float, list[float]] = {}  # top-1 of the seeds at each epoch; a damaged log has fewer
        for seed in summaries:
            folder = folder_of(output, "", method, seed)
            log = run_folder.examine_log(folder)
            if log.damaged:
                say(console, f"warning: {folder / run_folder.LOG} is damaged: curves.png is without its damaged lines")
            rows = [row for row in log.rows if row["kind"] == "eval"]
            for row in rows:
                seen.setdefault(row["epoch"], []).append(row["top1_percent"])
            points = [(row["epoch"], row["top1_percent"]) for row in rows]
            axes.plot(*zip(*points, strict=True), color=f"C{number}", linewidth=0.5, alpha=0.6)
        mean = [(epoch, statistics.mean(values)) for epoch, values in sorted(seen.items())]
        axes.plot(*zip(*mean, strict=True), color=f"C{number}", linewidth=2, label=method)
    axes.set(xlabel="epoch", ylabel="validation top-1 %")
    axes.legend(fontsize="small", loc="lower right")
    drawing.savefig(path, dpi=150)


def _write_report(output: Path, rows: Sequence[Mapping[str, Any]], teacher: Mapping[str, Any]) -> None:
    student = load_preset("digits_student")
    config = teacher["config"]
    environment = run_folder.read_environment(output / "teacher")
    assert environment is not None
    files.write_text(
        output / run_folder.REPORT,
        f"""# Demo: one student, {len(rows)} ways to train it

{TASK}

Teacher: {config["student"]}, {teacher["params"]:,} parameters, top-1 {teacher["last"]["top1_percent"]:.2f} %.
Student: {student["student"]}, {student["epochs"]} epochs of {student["train_per_class"] * 10} images.

{markdown_table(rows)}

Mean ± sample standard deviation over {rows[0]["seeds"]} seeds. Agreement: share of the held-out images on which
student and teacher give the same class. Deployed: backbone, connector and classifier, whatever answers after training;
methods that answer through the teacher's classifier (simkd, ijckd) deploy more than the others. With so few seeds and
images, differences of about a standard deviation mean nothing.

![accuracy](accuracy.png) ![curves](curves.png)

Measured with torch {environment["torch"]}, {environment["torch_threads"]} thread for the nets and \
{config["workers"]} for the images, on a machine with {environment["host_cores"]} CPU cores ({environment["host"]}).
Each run has its own folder with a report: teacher/, <method>-seed<n>/.
""",
    )
