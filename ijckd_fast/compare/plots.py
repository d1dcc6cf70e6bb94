"""The plots of a comparison: an axes for each regime."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ijckd_fast.compare.figures import Summaries, top1
from ijckd_fast.plots import figure, limits_without_outliers, say_nothing_to_show

ACCURACY, DIFFERENCES = "accuracy.png", "differences.png"


def plot_accuracy(
    path: Path, runs: Mapping[str, Mapping[str, Summaries]], teacher_percent: Mapping[str, float | None]
) -> None:
    """A PNG with an axes for each regime: every seed a dot, the mean a line, the teacher's top-1 where there is one.

    Runs that lie far from all others stand at the edge as triangles with their numbers, so that they flatten no axes.
    """
    drawing, grid = _axes({regime: list(methods) for regime, methods in runs.items()})
    for axes, (regime, methods) in zip(grid, runs.items(), strict=True):
        level = teacher_percent[regime]
        each = [value for summaries in methods.values() for value in top1(summaries).values()]
        means = [statistics.mean(top1(summaries).values()) for summaries in methods.values()]
        limits = limits_without_outliers(each, [] if level is None else [level])
        for position, summaries in enumerate(methods.values()):
            values = list(top1(summaries).values())
            axes.plot([position] * len(values), values, "o", color="tab:blue", markersize=4, alpha=0.6)
            far = {"mean ": means[position], "to ": min(values), "up to ": max(values)}
            _mark_outside(axes, position, far, limits, "tab:blue")
            axes.plot(position, means[position], "_", color="black", markersize=240 / max(10, len(methods)))
        if level is not None:
            axes.axhline(level, color="tab:orange", linewidth=1)
            axes.set_title(f"teacher {level:.1f} %", loc="right", color="tab:orange", fontsize="small")
        axes.set(ylim=limits, ylabel="top-1 %: each seed, mean")
    drawing.savefig(path, dpi=100 if len(runs) > 1 else 150)


def plot_differences(path: Path, rows: Sequence[Mapping[str, Any]], against: Sequence[str]) -> None:
    """A PNG with an axes for each regime: the paired differences and their intervals, a colour for each reference.

    A method that is compared with nothing else has no place. Ends of intervals far from all others are cut.
    """
    regimes: dict[str, list[Mapping[str, Any]]] = {}
    for each in rows:
        if any(each[f"minus_{reference}"] is not None for reference in against):
            regimes.setdefault(each["regime"], []).append(each)
    if not regimes:
        drawing, ((axes,),) = figure(1)
        say_nothing_to_show(axes, "no two methods have two seeds in common: no difference has an interval")
        drawing.savefig(path, dpi=150)
        return
    drawing, grid = _axes({regime: [each["method"] for each in shown] for regime, shown in regimes.items()})
    for axes, shown in zip(grid, regimes.values(), strict=True):
        ends = [
            each[f"minus_{reference}{end}"]
            for reference in against
            for each in shown
            for end in ("_low", "_high")
            if each[f"minus_{reference}"] is not None
        ]
        limits = limits_without_outliers(ends, [0])
        for number, reference in enumerate(against):
            offset = (number - (len(against) - 1) / 2) * 0.25
            for position, each in enumerate(shown):
                mean, low, high = (each[f"minus_{reference}{end}"] for end in ("", "_low", "_high"))
                if mean is None:
                    continue
                x, color = position + offset, f"C{number}"
                axes.vlines(x, low, high, color=color)
                axes.plot(x, mean, "o", color=color, markersize=4)
                _mark_outside(
                    axes, x, {"mean ": mean, "to ": low, "up to ": high}, limits, color, left=offset < 0 < position
                )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(ylim=limits, ylabel="difference of top-1, points")
    for number, reference in enumerate(against):
        grid[0].plot([], [], "o-", color=f"C{number}", markersize=4, label=f"minus {reference}")
    drawing.legend(loc="outside upper right", ncols=4, fontsize="small", frameon=False)
    drawing.savefig(path, dpi=100 if len(regimes) > 1 else 150)


def _mark_outside(
    axes: Any, x: float, shown: Mapping[str, float], limits: tuple[float, float], color: str, left: bool = False
) -> None:
    """A triangle at the edge that values lie beyond, and what they are; left: of it.

    shown  what is written before a value -> the value
    """
    for edge, marker, where in ((limits[0], "v", "bottom"), (limits[1], "^", "top")):
        outside = operator.lt if marker == "v" else operator.gt
        beyond = [f"{what}{value:.1f}" for what, value in shown.items() if outside(value, edge)]
        if beyond:
            axes.plot(x, edge, marker, color=color, markersize=5, clip_on=False, zorder=3)
            axes.annotate(
                "\n".join(beyond), (x, edge), xytext=(-3 if left else 3, 4 if where == "bottom" else -4),
                textcoords="offset points", ha="right" if left else "left", va=where, fontsize="x-small", color=color,
            )  # fmt: skip


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
