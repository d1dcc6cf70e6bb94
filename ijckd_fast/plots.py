"""Figures for the reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_FEW = 40  # points of a curve that are marked, each


def figure(columns: int, rows: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure with a grid of axes, drawn without a display and without touching pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import, and only needed at the end
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(4.5 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, drawing.subplots(rows, columns, squeeze=False)


def curve(axes: Any, points: Sequence[tuple[float, float | None]], **style: Any) -> None:
    """A line through points (x, y), those without a y left out; few points have marks, since one alone has no line."""
    shown = [(x, y) for x, y in points if y is not None]
    if shown:
        marker = "." if len(shown) <= _FEW else None
        axes.plot(*zip(*shown, strict=True), **{"marker": marker, **style})


def log_scale(axes: Any, which: str = "y") -> None:
    """A logarithmic axis with numbers as people write them, where what is on it spans more than a factor of 3."""
    values = [value for line in axes.lines for value in getattr(line, f"get_{which}data")() if value > 0]
    if not values or max(values) < 3 * min(values):
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 1000 * min(values) else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def say_nothing_to_show(axes: Any, why: str) -> None:
    """Words instead of an empty frame."""
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", wrap=True, color="gray")


def legend(axes: Any, **where: Any) -> None:
    """The labels of what is drawn; nothing where none of it has one."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", **where)


def legend_above(axes: Any, columns: int = 2) -> None:
    """The labels in room of their own above what is drawn, on an axis that is not logarithmic."""
    low, high = axes.get_ylim()
    rows = -(-len(axes.get_legend_handles_labels()[0]) // columns)
    axes.set_ylim(low, high + (0.1 + 0.1 * rows) * (high - low))
    legend(axes, loc="upper left", ncols=columns)


def limits_without_outliers(values: Iterable[float], always: Iterable[float] = ()) -> tuple[float, float]:
    """(low, high) of an axis on which most values can be told apart, though a few lie far away.

    Far: by more than four times the middle half's width from that half. always: values to be seen wherever they lie.
    """
    ordered, must = sorted(values), list(always)
    quarter, three = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    reach = 4 * (three - quarter)
    seen = [*(value for value in ordered if quarter - reach <= value <= three + reach), *must]
    if reach == 0:
        seen = [*ordered, *must]
    low, high = min(seen), max(seen)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin
