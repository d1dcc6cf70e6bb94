"""What the runs of a comparison say: means, differences seed by seed with intervals, tables, plots, report.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ijckd_fast import files
from ijckd_fast.compare.comparison import RESULTS, Comparison, Outcome, folder_of
from ijckd_fast.plots import figure
from ijckd_fast.train import run_folder

CONFIDENCE = 0.95
COLUMNS = ("method", "top-1 %", "agreement %", "deployed parameters", "deployed MACs", "s per run")
ACCURACY, DIFFERENCES = "accuracy.png", "differences.png"

Summaries = Mapping[int, Mapping[str, Any]]  # seed -> summary.json


def student_t(confidence: float, degrees: int) -> float:
    """The t with P(|T| <= t) = confidence, T of Student's distribution with `degrees` >= 1 degrees of freedom.

    By bisection of the closed form for whole degrees, in the angle atan(t / sqrt(degrees)): Abramowitz and Stegun, Handbook of
    Mathematical Functions, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) tan(angle))"""
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def paired_interval(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float, float] | None:
    """(mean, low, high) of the differences ours - theirs over the seeds that both have; None for fewer than two.

    low, high  ends of the 95 % interval by Student's t with n - 1 degrees of freedom: mean +- t s / sqrt(n), s the sample standard
               deviation of the n differences. It supposes that these come from a normal distribution.
    """
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if len(differences) < 2:
        return None
    mean = statistics.mean(differences)
    half = student_t(CONFIDENCE, len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def top1(summaries: Summaries) -> dict[int, float]:
    """seed -> top-1 of the last epoch, percent"""
    return {seed: summary["last"]["top1_percent"] for seed, summary in summaries.items()}


def row(method: str, summaries: Summaries) -> dict[str, Any]:
    """{"method", "top1_mean", "top1_std", "seeds", "agreement_mean", "params", "macs", "seconds"} of the runs of a method.

    Accuracies and agreement in percent, of the last epoch; top1_std the sample standard deviation, null for one seed; agreement null
    without a teacher; params and macs as deployed; seconds the mean of a run, training and evaluation.
    """
    values = list(top1(summaries).values())
    each = list(summaries.values())
    agreements = [summary["last"]["agreement_percent"] for summary in each]
    return {
        "method": method,
        "top1_mean": statistics.mean(values),
        "top1_std": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
        "agreement_mean": None if None in agreements else statistics.mean(agreements),
        "params": each[0]["params"],
        "macs": each[0]["macs"],
        "seconds": statistics.mean(summary["seconds"] for summary in each),
    }


def comparison_rows(comparison: Comparison, outcome: Outcome) -> list[dict[str, Any]]:
    """`row` of every method in every regime, with "regime", and for each NAME it is compared against the paired difference of top-1 in
    points: "minus_NAME", "minus_NAME_low", "minus_NAME_high" (null for NAME itself). A method without a finished run has no row.
    """
    rows = []
    for regime, methods in outcome.runs.items():
        for method, summaries in methods.items():
            if not summaries:
                continue
            one = {**row(method, summaries), "regime": regime}
            for reference in comparison.against:
                interval = None
                if reference != method:
                    interval = paired_interval(top1(summaries), top1(methods[reference]))
                names = (f"minus_{reference}", f"minus_{reference}_low", f"minus_{reference}_high")
                one.update(zip(names, interval or (None, None, None), strict=True))
            rows.append(one)
    return rows


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


def table(title: str, rows: Sequence[Mapping[str, Any]], against: Sequence[str] = ()) -> Table:
    """The rows of one regime for the terminal."""
    drawn = Table(COLUMNS[0], title=title)
    for column in COLUMNS[1:]:
        drawn.add_column(column, justify="right")
    for name in against:
        drawn.add_column(f"- {name}", justify="right", no_wrap=True)
    for each in rows:
        drawn.add_row(*cells(each), *(difference(each, name) for name in against))
    return drawn


def markdown(rows: Sequence[Mapping[str, Any]], against: Sequence[str] = ()) -> str:
    """The same as Markdown."""
    columns = (*COLUMNS, *(f"- {name}" for name in against))
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    lines += [f"| {' | '.join([*cells(each), *(difference(each, name) for name in against)])} |" for each in rows]
    return "\n".join(lines)


def plot_accuracy(
    path: Path, runs: Mapping[str, Mapping[str, Summaries]], teacher_percent: Mapping[str, float | None]
) -> None:
    """A PNG with an axes for each regime: every seed a dot, the mean a line, the teacher's top-1 where there is one."""
    drawing, grid = _axes({regime: list(methods) for regime, methods in runs.items()})
    for axes, (regime, methods) in zip(grid, runs.items(), strict=True):
        for position, summaries in enumerate(methods.values()):
            values = list(top1(summaries).values())
            axes.plot([position] * len(values), values, "o", color="tab:blue", markersize=4, alpha=0.6)
            axes.plot(position, statistics.mean(values), "_", color="black", markersize=240 / max(10, len(methods)))
        level = teacher_percent[regime]
        if level is not None:
            axes.axhline(level, color="tab:orange", linewidth=1, label=f"teacher {level:.1f} %")
            _legend_above(axes)
        axes.set_ylabel("top-1 %: each seed, mean")
    drawing.savefig(path, dpi=100 if len(runs) > 1 else 150)


def plot_differences(path: Path, rows: Sequence[Mapping[str, Any]], against: Sequence[str]) -> None:
    """A PNG with an axes for each regime: the paired differences and their intervals, a colour for each reference."""
    regimes: dict[str, list[Mapping[str, Any]]] = {}
    for each in rows:
        regimes.setdefault(each["regime"], []).append(each)
    drawing, grid = _axes({regime: [each["method"] for each in shown] for regime, shown in regimes.items()})
    for axes, shown in zip(grid, regimes.values(), strict=True):
        for number, reference in enumerate(against):
            offset = (number - (len(against) - 1) / 2) * 0.25
            points = [
                (position + offset, *(each[f"minus_{reference}{end}"] for end in ("", "_low", "_high")))
                for position, each in enumerate(shown)
                if each[f"minus_{reference}"] is not None
            ]
            if points:
                x, mean, low, high = zip(*points, strict=True)
                axes.vlines(x, low, high, color=f"C{number}")
                axes.plot(x, mean, "o", color=f"C{number}", markersize=4, label=f"minus {reference}")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylabel("difference of top-1, points")
        if axes.get_legend_handles_labels()[0]:
            _legend_above(axes)
    drawing.savefig(path, dpi=100 if len(regimes) > 1 else 150)


def _legend_above(axes: Any) -> None:
    """Beside the title, where it hides no point."""
    axes.legend(fontsize="small", loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0)


def _axes(regimes: Mapping[str, Sequence[str]]) -> tuple[Any, list[Any]]:
    """(figure, an axes for each regime, three in a row), with the names of its methods below and room for them."""
    columns = min(len(regimes), 3)
    drawing, grid = figure(columns, math.ceil(len(regimes) / columns))
    most = max(regimes.values(), key=len)
    slanted = len(most) > 5
    below = 0.05 * max(len(name) for names in regimes.values() for name in names) if slanted else 0.0
    drawing.set_size_inches(columns * max(4.5, 0.4 * len(most)), len(grid) * (3.2 + below))
    flat = list(grid.flat)
    for axes in flat[len(regimes) :]:
        axes.remove()
    for axes, (regime, names) in zip(flat, regimes.items(), strict=False):
        axes.set_title(regime, loc="left")
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_xticks(range(len(names)), names, rotation=45 if slanted else 0, ha="right" if slanted else "center")
    return drawing, flat[: len(regimes)]


def write_comparison_report(output: Path, comparison: Comparison, outcome: Outcome) -> list[dict[str, Any]]:
    """Writes report.md, accuracy.png and, where methods are compared, differences.png to `output`; returns `comparison_rows`."""
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
        config = next(iter(next(iter(methods.values())).values()))["config"]
        images = (
            "all training images"
            if config["train_per_class"] is None
            else f"{config['train_per_class']} training images per class"
        )
        noise = f", {100 * config['label_noise']:g} % of their labels wrong" if config["label_noise"] else ""
        parts.append(
            f"Student {config['student']}, {images}{noise}, {config['epochs']} epochs in batches of {config['global_batch']}."
        )
        parts.append(markdown([each for each in rows if each["regime"] == regime], comparison.against))
    parts.append(f"![accuracy]({ACCURACY})")
    parts.append(
        f"""Mean ± sample standard deviation over the seeds of the last epoch's top-1. Agreement: share of the validation images on which
student and teacher give the same class. Deployed: backbone, connector and classifier, whatever answers after training; methods that
answer through the teacher's classifier deploy its connector too. Seconds: training and evaluation, with as many runs side by side as
`--jobs` says. Every run: `{RESULTS}`, and a folder each."""
    )
    if comparison.against:
        plot_differences(output / DIFFERENCES, rows, comparison.against)
        pairs = {
            (
                each["regime"],
                frozenset((each["method"], name)),
            )  # two methods of `against` stand in two cells, as one interval
            for each in rows
            for name in comparison.against
            if each[f"minus_{name}"] is not None
        }
        chance = len(pairs) * (1 - CONFIDENCE)
        parts.append(f"![differences]({DIFFERENCES})")
        parts.append(
            f"""A difference, in points of top-1, is the mean of the differences seed by seed, in brackets its 95 % interval:
Student's t over the n differences, n - 1 degrees of freedom, mean ± t s / √n, which supposes that they are normally distributed. Were
the comparison made again and again with other seeds, 95 % of such intervals would hold the mean over all seeds. A star: the interval
excludes 0. The intervals are not corrected for their number: of {len(pairs)} intervals about {chance:.1f} would exclude 0 if no method
differed from another. A seed draws subset, wrong labels, order, crops and first weights; the teacher and the validation images are the
same in all runs, so the intervals say nothing about other teachers or other images."""
        )
    if outcome.failed:
        parts.append(
            "Failed, and left out above:\n\n" + "\n".join(f"- {name}: {why}" for name, why in outcome.failed.items())
        )
    parts.append(_measured_with(output, finished))
    files.write_text(output / run_folder.REPORT, "\n\n".join(part for part in parts if part) + "\n")
    return rows


def _teacher_percent(methods: Mapping[str, Summaries]) -> float | None:
    levels = [summary["teacher_top1_percent"] for summaries in methods.values() for summary in summaries.values()]
    return next((level for level in levels if level is not None), None)


def _measured_with(output: Path, finished: Mapping[str, Mapping[str, Summaries]]) -> str:
    """Of the first run; runs.csv has it of each."""
    regime, methods = next(iter(finished.items()))
    method, summaries = next(iter(methods.items()))
    seed, summary = next(iter(summaries.items()))
    environment = run_folder.read_json(folder_of(output, regime, method, seed) / run_folder.ENVIRONMENT)
    assert environment is not None
    return (
        f"Measured with torch {environment['torch']}, {environment['torch_threads']} thread for the nets of a run and "
        f"{summary['config']['workers']} for its images, on a machine with {environment['host_cores']} CPU cores ({environment['host']})."
    )
