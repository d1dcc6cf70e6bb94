"""What `ijckd-fast` says, as tests read it."""

from __future__ import annotations

import json
from typing import Any

from ijckd_fast import cli


def complaint(capsys, *arguments: str) -> str:
    """The one line that a mistaken command prints."""
    assert cli.main(list(arguments)) == 2
    err = capsys.readouterr().err
    assert err.startswith("ijckd-fast: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def rows_of(out: str) -> list[dict[str, Any]]:
    """The figures on the last line of standard output."""
    last = json.loads(out.strip().splitlines()[-1])
    assert list(last) == ["rows"]
    return last["rows"]


def row_of(out: str) -> dict[str, Any]:
    """The figures of a command that reports one row."""
    (row,) = rows_of(out)
    return row
