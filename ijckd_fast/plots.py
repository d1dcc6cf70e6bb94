"""Figures for the reports."""

from __future__ import annotations

from typing import Any


def figure(columns: int, rows: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure with a grid of axes, drawn without a display and without touching pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import, and only needed at the end
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(4.5 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, drawing.subplots(rows, columns, squeeze=False)
