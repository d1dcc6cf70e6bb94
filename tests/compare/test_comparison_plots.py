"""The plots of a comparison: outliers, references, nothing to compare."""

from __future__ import annotations

import pytest

from ijckd_fast.compare import plots


@pytest.fixture
def axes(monkeypatch, tmp_path):
    """The axes that a plot draws, by a call with the plot and its arguments."""

    def draw(plot, *arguments):
        figures, figure = [], plots.figure

        def kept(*size):
            figures.append(figure(*size))
            return figures[-1]

        with monkeypatch.context() as patch:
            patch.setattr(plots, "figure", kept)
            plot(tmp_path / "plot.png", *arguments)
        return figures[0][0].axes

    return draw


def _summaries(*top1: float) -> dict:
    return {seed: {"last": {"top1_percent": value}} for seed, value in enumerate(top1)}


def test_one_run_far_below_is_named_and_flattens_nothing(axes):
    methods = {name: _summaries(95, 96, 97) for name in ("a", "b", "c", "d")} | {"e": _summaries(95, 96, 10)}
    (drawn,) = axes(plots.plot_accuracy, {"": methods}, {"": 98.0})
    low, high = drawn.get_ylim()
    assert 88 < low < 95
    assert 98 < high < 100
    assert [text.get_text() for text in drawn.texts] == ["mean 67.0\nto 10.0"]
    assert drawn.get_title(loc="right") == "teacher 98.0 %"
    assert [label.get_text() for label in drawn.get_xticklabels()] == list("abcde")


def _row(method: str, **to: tuple[float, float, float]) -> dict:
    row = {"method": method, "regime": "r"}
    row |= {f"minus_{name}{end}": None for name in ("kd", "ce") for end in ("", "_low", "_high")}
    for name, (mean, low, high) in to.items():
        row |= {f"minus_{name}": mean, f"minus_{name}_low": low, f"minus_{name}_high": high}
    return row


def test_a_method_without_a_difference_has_no_place(axes):
    rows = [_row("kd"), *(_row(name, kd=(1.0, 0.5, 1.5)) for name in "abcdef"), _row("far", kd=(0.5, -40.0, 41.0))]
    (drawn,) = axes(plots.plot_differences, rows, ["kd"])
    assert [label.get_text() for label in drawn.get_xticklabels()] == [*"abcdef", "far"]
    assert [text.get_text() for text in drawn.texts] == ["to -40.0", "up to 41.0"]
    (legend,) = drawn.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["minus kd"]


def test_of_two_references_each_is_compared_with_the_other(axes):
    rows = [_row("kd", ce=(1.0, 0.5, 1.5)), _row("ce", kd=(-1.0, -1.5, -0.5)), _row("x", kd=(1, 0, 2), ce=(2, 1, 3))]
    (drawn,) = axes(plots.plot_differences, rows, ["kd", "ce"])
    assert [label.get_text() for label in drawn.get_xticklabels()] == ["kd", "ce", "x"]


def test_no_difference_at_all_is_said(axes):
    (drawn,) = axes(plots.plot_differences, [_row("kd"), _row("a")], ["kd"])
    assert "no two methods have two seeds in common" in drawn.texts[0].get_text()
