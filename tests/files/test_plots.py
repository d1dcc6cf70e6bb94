"""What the reports' plots share: few points, outliers, nothing to show."""

from __future__ import annotations

import pytest

from ijckd_fast import plots


@pytest.fixture
def axes():
    _, ((one,),) = plots.figure(1)
    return one


def shown_ticks(axes) -> list[str]:
    """Labels of the ticks that lie within the axes."""
    axes.figure.draw_without_rendering()
    low, high = axes.get_ylim()
    ticks = axes.yaxis.get_ticklocs(), axes.yaxis.get_ticklabels()
    return [label.get_text() for at, label in zip(*ticks, strict=True) if low <= at <= high]


def test_few_points_have_marks_and_those_without_a_value_are_left_out(axes):
    plots.curve(axes, [(1.0, 2.0)])
    plots.curve(axes, [(i, float(i)) for i in range(100)])
    plots.curve(axes, [(1.0, None)])
    plots.curve(axes, [(1.0, None), (2.0, 5.0)], label="some")
    one, many, some = axes.lines
    assert (one.get_marker(), many.get_marker(), some.get_marker()) == (".", "None", ".")
    assert list(some.get_xdata()) == [2.0]


@pytest.mark.parametrize(
    ("values", "scale", "ticks"),
    [
        ((2.25, 2.35), "linear", None),
        ((1.0, 2.9), "linear", None),
        ((0.3, 3.0), "log", ["0.5", "1", "2"]),
        ((1e-3, 0.06), "log", ["0.001", "0.002", "0.005", "0.01", "0.02", "0.05"]),
        ((1e-5, 2.0), "log", ["1e-05", "0.0001", "0.001", "0.01", "0.1", "1"]),
        ((0.0, 0.0), "linear", None),
        ((0.0, 4.0), "linear", None),
    ],
)
def test_a_logarithmic_axis_has_plain_numbers_or_is_none(axes, values, scale, ticks):
    axes.plot([0, 1], values)
    plots.log_scale(axes)
    assert axes.get_yscale() == scale
    assert len(shown_ticks(axes)) >= 2
    assert ticks is None or shown_ticks(axes) == ticks


@pytest.mark.parametrize(
    ("values", "always", "seen", "cut"),
    [
        ([90.0, 91, 92, 93, 94, 95, 96, 97, 20], [], [90, 97], [20]),
        ([90.0, 91, 92, 93, 94, 95, 96, 97, 20], [99], [90, 97, 99], [20]),
        ([90.0, 91, 92, 93, 94, 95, 96, 97, 500], [0], [0, 90, 97], [500]),
        ([90.0, 91, 97], [], [90, 97], []),
        ([5.0], [], [5], []),
        ([5.0, 5, 5, 5, 9], [], [5, 9], []),
        ([1.0, 2, 30, 31, 60, 61], [], [1, 61], []),
    ],
    ids=str,
)
def test_one_outlier_does_not_flatten_the_others(values, always, seen, cut):
    low, high = plots.limits_without_outliers(values, always)
    assert all(low < value < high for value in seen)
    assert not any(low <= value <= high for value in cut)
    assert high - low < 1.3 * (max(seen) - min(seen)) + 1.1


def test_a_legend_above_hides_nothing(axes):
    for number in range(4):
        axes.plot([0, 1], [0, 10], label=f"curve {number}")
    plots.legend_above(axes)
    axes.figure.draw_without_rendering()
    bottom = axes.get_legend().get_window_extent().y0
    assert axes.transData.transform((0, 10))[1] < bottom


def test_nothing_to_show_is_said(axes):
    plots.legend(axes)
    plots.say_nothing_to_show(axes, "nothing logged")
    assert axes.get_legend() is None
    assert [text.get_text() for text in axes.texts] == ["nothing logged"]
    assert len(axes.get_xticks()) == 0
