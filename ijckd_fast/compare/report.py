"""report.md of a comparison: tables, plots, what the figures mean, and what failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ijckd_fast import files
from ijckd_fast.compare.comparison import Comparison
from ijckd_fast.compare.figures import CONFIDENCE, Summaries, comparison_rows
from ijckd_fast.compare.plots import ACCURACY, DIFFERENCES, plot_accuracy, plot_differences
from ijckd_fast.compare.results import RESULTS
from ijckd_fast.compare.runs import folder_of
from ijckd_fast.compare.tables import markdown_table
from ijckd_fast.compare.training import Outcome
from ijckd_fast.train import run_folder

_MEANING = f"""Mean ± sample standard deviation over the seeds of the last epoch's top-1. Agreement: share of the
validation images on which student and teacher give the same class. Deployed: backbone, connector and classifier,
whatever answers after training; methods that answer through the teacher's classifier deploy its connector too. Seconds:
training and evaluation, with as many runs side by side as `--jobs` says. Every run: `{RESULTS}`, and a folder each."""


def write_comparison_report(output: Path, comparison: Comparison, outcome: Outcome) -> list[dict[str, Any]]:
    """Writes report.md, accuracy.png and, where methods are compared, differences.png to `output`.

    returns  `comparison_rows`
    """
    rows = comparison_rows(comparison, outcome)
    finished = {
        regime: {method: summaries for method, summaries in methods.items() if summaries}
        for regime, methods in outcome.runs.items()
    }
    finished = {regime: methods for regime, methods in finished.items() if methods}
    if not finished:
        return rows
    teacher = {regime: _teacher_percent(methods) for regime, methods in finished.items()}
    plot_accuracy(output / ACCURACY, finished, teacher)
    parts = [
        f"# {comparison.name}: {len(comparison.methods)} methods, {comparison.seeds} seeds each",
        comparison.about.strip(),
    ]
    levels = sorted({level for level in teacher.values() if level is not None})
    if levels:
        parts.append("The teacher's top-1: " + ", ".join(f"{level:.2f} %" for level in levels) + ".")
    for regime, methods in finished.items():
        if regime:
            parts.append(f"## {regime}")
        parts.append(_schedule(methods))
        parts.append(markdown_table([each for each in rows if each["regime"] == regime], comparison.against))
    parts += [f"![accuracy]({ACCURACY})", _MEANING]
    if comparison.against:
        plot_differences(output / DIFFERENCES, rows, comparison.against)
        parts += [f"![differences]({DIFFERENCES})", _about_intervals(rows, comparison.against)]
    if outcome.failed:
        parts.append(
            "Failed, and left out above:\n\n" + "\n".join(f"- {name}: {why}" for name, why in outcome.failed.items())
        )
    parts.append(_measured_with(output, finished))
    files.write_text(output / run_folder.REPORT, "\n\n".join(part for part in parts if part) + "\n")
    return rows


def _schedule(methods: Mapping[str, Summaries]) -> str:
    """Student, images and epochs of a regime."""
    config = next(iter(next(iter(methods.values())).values()))["config"]
    images = (
        "all training images"
        if config["train_per_class"] is None
        else f"{config['train_per_class']} training images per class"
    )
    if config.get("train_only") is not None:
        images += f" whose paths match `{config['train_only']}`"
    noise = f", {100 * config['label_noise']:g} % of their labels wrong" if config["label_noise"] else ""
    return (
        f"Student {config['student']}, {images}{noise}, {config['epochs']} epochs in batches of "
        f"{config['global_batch']}."
    )


def _about_intervals(rows: Sequence[Mapping[str, Any]], against: Sequence[str]) -> str:
    pairs = {  # two methods of `against` stand in two cells, as one interval
        (each["regime"], frozenset((each["method"], name)))
        for each in rows
        for name in against
        if each[f"minus_{name}"] is not None
    }
    chance = len(pairs) * (1 - CONFIDENCE)
    intervals = "interval" if len(pairs) == 1 else "intervals"
    return f"""A difference, in points of top-1, is the mean of the differences seed by seed, in brackets its 95 %
interval: Student's t over the n differences, n - 1 degrees of freedom, mean ± t s / √n, which supposes that they are
normally distributed. Were the comparison made again and again with other seeds, 95 % of such intervals would hold the
mean over all seeds. A star: the interval excludes 0. The intervals are not corrected for their number: of {len(pairs)}
{intervals} about {chance:.2g} would exclude 0 if no method differed from another. A seed draws subset, wrong labels,
order, crops and first weights; the teacher and the validation images are the same in all runs, so the intervals say
nothing about other teachers or other images."""


def _teacher_percent(methods: Mapping[str, Summaries]) -> float | None:
    levels = [summary["teacher_top1_percent"] for summaries in methods.values() for summary in summaries.values()]
    return next((level for level in levels if level is not None), None)


def _measured_with(output: Path, finished: Mapping[str, Mapping[str, Summaries]]) -> str:
    """Of the first run; runs.csv has it of each."""
    regime, methods = next(iter(finished.items()))
    method, summaries = next(iter(methods.items()))
    seed, summary = next(iter(summaries.items()))
    environment = run_folder.read_environment(folder_of(output, regime, method, seed))
    assert environment is not None
    return (
        f"Measured with torch {environment['torch']}, {environment['torch_threads']} thread for the nets of a run and "
        f"{summary['config']['workers']} for its images, on a machine with {environment['host_cores']} CPU cores "
        f"({environment['host']})."
    )
