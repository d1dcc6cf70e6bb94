"""The plots of a comparison: an axes for each regime."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ijckd_fast.compare.figures import Summaries, top1
from ijckd_fast.plots import figure

ACCURACY, DIFFERENCES = "accuracy.png", "differences.png"


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
