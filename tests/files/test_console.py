"""Lines and bars for a person."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import TextColumn

from ijckd_fast.console import progress_bar, say


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", "[bold]ü 1.5[/bold] \\udcff"), ("ascii", "[bold]\\xfc 1.5[/bold] \\udcff")]
)
def test_a_line_is_shown_as_it_is_whatever_is_in_it(encoding, shown):
    """Markup is not interpreted, and what the console cannot encode is escaped."""
    stream = io.BytesIO()
    console = Console(file=io.TextIOWrapper(stream, encoding, write_through=True), width=10, force_terminal=True)
    say(console, "[bold]ü 1.5[/bold] \udcff")
    assert stream.getvalue() == f"{shown}\n".encode(encoding)  # neither coloured nor wrapped


@pytest.fixture
def terminal(monkeypatch):
    """rich takes standard error for a terminal of 80 columns."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")


def use(bar) -> None:
    with bar:
        task = bar.add_task("reading", total=8)
        bar.advance(task, 3)
        bar.refresh()


def test_a_bar_counts_on_standard_error(terminal, capsys):
    use(progress_bar(True))
    out, err = capsys.readouterr()
    assert out == ""
    assert "reading" in err
    assert "3/8" in err
    assert err.endswith("\x1b[2K")  # it goes away


def test_a_bar_takes_other_columns(terminal, capsys):
    use(progress_bar(True, TextColumn("{task.completed} of many")))
    err = capsys.readouterr().err
    assert "3 of many" in err
    assert "3/8" not in err


def test_a_bar_that_is_not_shown_prints_nothing(terminal, capsys):
    use(progress_bar(False))
    assert capsys.readouterr() == ("", "")
