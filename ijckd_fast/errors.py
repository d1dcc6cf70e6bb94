"""Mistakes that a user can fix: one sentence that says what was expected, what was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the user's data, settings or files; the command line prints its text without a traceback."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "" or "; did you mean 'a' or 'b'?" with up to three names of `known` close to `name`."""
    near = difflib.get_close_matches(name.lower(), sorted(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def one_of(names: Iterable[str]) -> str:
    """'a, b or c', for a sentence."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def reason_of(error: BaseException) -> str:
    """What an error says, in one line; the name of its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
