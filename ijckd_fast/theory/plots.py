"""The plots of the studies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ijckd_fast.plots import figure
from ijckd_fast.theory import finite
from ijckd_fast.theory.figures import Row, groups


def _series(
    rows: Iterable[Row], part: str, case: str, quantity: str, key: str = "measured"
) -> tuple[list[Any], list[Any]]:
    found = [row for row in rows if (row["part"], row["case"], row["quantity"]) == (part, case, quantity)]
    return [row["at"] for row in found], [row[key] for row in found]


def plot_risks(path: Path, rows: Sequence[Row]) -> None:
    """Transfer risk over n, an axes for each law: distilled, by hard labels, and the bound on the first."""
    cases = [case for part, case in groups(rows) if part == "risk"]
    drawing, axes = figure(2, (len(cases) + 1) // 2)
    for ax, case in zip(axes.flat, cases, strict=False):
        ax.plot(*_series(rows, "risk", case, "E R"), marker=".", label="distilled")
        ax.plot(*_series(rows, "risk", case, "E R, hard labels"), marker=".", label="hard labels")
        ax.plot(
            *_series(rows, "risk", case, "E R against the bound", "expected"), color="gray", label="bound, distilled"
        )
        ax.set(title=case, xlabel="n", ylabel="transfer risk")
        if not case.startswith("isotropic"):
            ax.set_yscale("symlog", linthresh=1e-4)
        ax.set_ylim(bottom=0)
        ax.legend(fontsize="small")
    for ax in axes.flat[len(cases) :]:
        ax.axis("off")
    drawing.savefig(path, dpi=150)


def plot_perturbation(path: Path, rows: Sequence[Row]) -> None:
    """Transfer risk over the step outside the span: points as measured, lines the closed form."""
    drawing, ((ax,),) = figure(1)
    for number, case in enumerate(case for part, case in groups(rows) if part == "perturbation"):
        ax.plot(*_series(rows, "perturbation", case, "risk on test inputs"), "o", markersize=4, color=f"C{number}")
        closed = _series(rows, "perturbation", case, "risk on test inputs", "expected")
        ax.plot(*closed, linewidth=1, color=f"C{number}", label=case)
    ax.set(xlabel="delta: length of the step outside the span over |w|", ylabel="transfer risk", ylim=(0, None))
    ax.set_yscale("symlog", linthresh=1e-6)  # cases lie decades apart, and some risks are 0
    ax.legend(fontsize="small")
    drawing.savefig(path, dpi=150)


def plot_learners(path: Path, rows: Sequence[Row], cases: Sequence[str]) -> None:
    """Risk over n of every learner, an axes for each case; dotted: the exact means, where they are known; dashed: the
    slopes that theory speaks of. A learner without risk has no point on a logarithmic axis, but a line in the legend.
    """
    drawing, axes = figure(len(cases))
    for ax, case in zip(axes.flat, cases, strict=True):
        drawn: list[tuple[float, float]] = []
        for number, name in enumerate(finite.LEARNERS):
            for key, style in (("measured", "o-"), ("expected", ":")):
                at, values = _series(rows, "risk", case, name, key)
                shown = [(n, value) for n, value in zip(at, values, strict=True) if value is not None and value > 1e-14]
                if key == "measured":
                    drawn += shown
                    label = name if len(shown) == len(at) else f"{name}: 0" if not shown else f"{name}: later 0"
                    ax.plot([], [], "o-", markersize=3, linewidth=1, color=f"C{number}", label=label)
                if shown and (key == "measured" or name in ("CE_sgl", "CE_ful")):
                    ax.plot(*zip(*shown, strict=True), style, markersize=3, linewidth=1, color=f"C{number}")
        _draw_slopes(ax, drawn)
        ax.set(title=case, xlabel="n", ylabel="risk", xscale="log", yscale="log")
        ax.legend(fontsize="small")
    drawing.savefig(path, dpi=150)


def _draw_slopes(ax: Any, points: Sequence[tuple[float, float]]) -> None:
    """Lines of n^-1/2 and n^-1 from above the first points on, to compare what is drawn with."""
    if not points:
        return
    first, last = min(n for n, _ in points), max(n for n, _ in points)
    start = 2 * max(value for _, value in points)
    for slope, style in ((-0.5, "--"), (-1, "-.")):
        end = start * (last / first) ** slope
        ax.plot([first, last], [start, end], style, color="gray", linewidth=0.8, label=f"slope {slope:g}")
