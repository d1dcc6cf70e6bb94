"""The figures of a study, each with its verdict: what was measured beside what it is held to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ijckd_fast.errors import UserError

Row = dict[str, Any]
COLUMNS = (
    "study", "part", "case", "axis", "at", "quantity", "measured", "standard_error", "relation", "expected", "allowed",
    "holds", "source", "repeats", "seed",
)  # fmt: skip
MIN_REPEATS = 10
# Of about 200 figures at once some are 3 standard errors off; one of 4 is off in 16,000.
ERRORS_ALLOWED = 4


def check_sizes(sizes: Sequence[int], repeats: int, seed: int, option: str = "--repeats") -> list[int]:
    """The sizes in order, each once; UserError for sizes, repeats (`option` named them) or a seed no study has."""
    if not sizes or min(sizes) < 1:
        raise UserError(f"--sizes must be numbers of 1 or more, got {list(sizes)}")
    if repeats < MIN_REPEATS:
        raise UserError(
            f"{option} must be at least {MIN_REPEATS} for a standard error to hold the figures to, got {repeats}"
        )
    if seed < 0:
        raise UserError(f"--seed must be 0 or more, got {seed}")
    return sorted(set(sizes))


def _error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def figure_row(
    base: Row,
    at: Any,
    quantity: str,
    measured: Any,
    *,
    relation: str = "",
    expected: float | None = None,
    error: float = 0.0,
    slack: float = 1e-12,
    source: str = "",
) -> Row:
    """One figure_row, with its verdict where it has a relation to something expected.

    measured  a number, or one per repeat, whose mean and standard error are taken
    error     standard error of measured - expected; the greater of this and of that taken counts
    slack     may be added to the errors allowed: how far off the expected value is known to be, by default a rounding
    """
    values = np.asarray(measured, dtype=np.float64)
    if values.ndim:
        error = max(error, _error(values))
    mean = float(values.mean())
    allowed = holds = None
    if relation in ("=", "<="):
        allowed = ERRORS_ALLOWED * error + slack
        off = mean - float(expected or 0)
        holds = bool((off if relation == "<=" else abs(off)) <= allowed)
    row = {
        **base,
        "at": at,
        "quantity": quantity,
        "measured": mean,
        "standard_error": error if values.ndim or error else None,
        "relation": relation,
        "expected": expected,
        "allowed": allowed,
        "holds": holds,
        "source": source,
    }
    return {column: row[column] for column in COLUMNS}


def groups(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """(part, case) -> their rows"""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["part"], row["case"]), []).append(row)
    return groups
