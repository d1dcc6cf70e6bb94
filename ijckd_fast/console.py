"""What a person sees while something runs: one line at a time, whatever is in it, and a bar on standard error."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn


def say(console: Console, text: str) -> None:
    """Prints one line, whatever is in it.

    What the console cannot encode, such as a file name that is not UTF-8, is shown escaped.
    """
    text = text.encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def progress_bar(shown: bool, *count: ProgressColumn) -> Progress:
    """A bar on standard error, which goes away at its end. Use it as a context manager.

    shown  False: nothing is shown, and calls do nothing
    count  columns between the bar and the time that is left; by default one: how many of how many
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), *(count or (MofNCompleteColumn(),)), TimeRemainingColumn()
    )  # fmt: skip
    return Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True)
