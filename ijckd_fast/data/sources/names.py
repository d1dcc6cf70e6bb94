"""Names that mean the same, and names that only look it: of class folders, class lists, label files and shards.

Unicode writes some letters in two ways: é is one character (NFC, as Linux and Windows type it) or e and an accent (NFD,
as macOS's older filesystem stores it). Names that differ in that alone are one name.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence

from ijckd_fast.data.sources.listing import some
from ijckd_fast.errors import UserError


def composed(name: str) -> str:
    """The name in one Unicode form (NFC): equal for names that mean the same."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def appearance(name: str) -> str:
    """What a reader sees of a name: `composed`, without invisible characters and spaces at the ends."""
    return " ".join("".join(c for c in composed(name) if c.isspace() or unicodedata.category(c) != "Cf").split())


def counterparts(expected: Iterable[str], found: Iterable[str], what: str) -> dict[str, str]:
    """The name in `found` for each of `expected` that is there, as it is or in the other Unicode form.

    what   whose names they are, for the warning: 'class folders of DIR/val'
    warns  once where some are in the other form
    """
    there = set(found)
    by_form = {composed(name): name for name in there if not name.isascii()}
    pairs = {name: name if name in there else by_form.get(composed(name)) for name in expected}
    same = {name: other for name, other in pairs.items() if other is not None}
    say_forms([name for name, other in same.items() if name != other], what)
    return same


def say_forms(names: Sequence[str], what: str) -> None:
    """Warns that these names were found in the other Unicode form, where there are any."""
    if names:
        warnings.warn(
            f"{len(names)} {what} have the names expected in another Unicode form (NFC or NFD) and are taken for the "
            f"same ({some(names)})",
            stacklevel=6,
        )


def require_distinct(names: Sequence[str], what: str) -> None:
    """UserError where two names look the same: equal but for their Unicode form, spaces or invisible characters."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(appearance(name), name)
        if other != name:
            raise UserError(
                f"{what} must differ in what can be seen, found {other!a} and {name!a}, which look the same; "
                "put them together, or rename one"
            )


def did_you_mean(found: Iterable[str], expected: Iterable[str]) -> str:
    """'; did you mean 'cat' by 'Cat'?' for names found that differ from an expected one only in case, spaces, signs or
    invisible characters; else ''.
    """
    by_letters = {_letters(name): name for name in expected}
    pairs = [(by_letters[_letters(name)], name) for name in found if _letters(name) in by_letters]
    if not pairs:
        return ""
    spelled = ", ".join(f"{name!a} by {other!a}" for name, other in pairs[:3])
    return f"; did you mean {spelled}{f', and {len(pairs) - 3} more' if len(pairs) > 3 else ''}?"


def _letters(name: str) -> str:
    text = unicodedata.normalize("NFKC", appearance(name)).casefold()
    return re.sub(r"[\W_]+", "", text) or text
