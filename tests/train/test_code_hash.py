"""The digest of the code: what moves figures changes it, what does not leaves it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ijckd_fast
from ijckd_fast.train import run_folder
from ijckd_fast.train.code_hash import ONLOOKERS, ROOMS, code_hash, digest

PACKAGE = Path(ijckd_fast.__file__).parent
SOURCE = '''"""A module."""

import math
from typing import TYPE_CHECKING

from ijckd_fast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["area", "side"]
SIDES = 4


def area(side: float, scale: float = 1.0) -> float:
    """Of a square."""
    if side < 0:
        raise UserError(f"wanted a side of 0 or more, got {side}")
    return scale * side**2  # not abs(side)


def side(area: float) -> float:
    """Of an area."""
    from ijckd_fast.files import write_text

    return math.sqrt(area)
'''


@pytest.fixture
def of(tmp_path):
    """The digest of files with these texts."""

    def digest_of(*texts: str) -> str:
        for number, text in enumerate(texts):
            (tmp_path / f"{number}.py").write_text(text)
        return digest(tmp_path / f"{number}.py" for number in range(len(texts)))

    return digest_of


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A module."""', '"""Squares.\n\nTheir areas.\n"""'),
        ('    """Of a square."""\n', ""),
        ("  # not abs(side)", ""),
        ("wanted a side", "expected a side"),
        ("ijckd_fast.errors", "ijckd_fast.mistakes"),
        ("ijckd_fast.files", "ijckd_fast.paths"),
        ("    from torch import Tensor", "    import torch"),
        ('"area", "side"', '"area"'),
        ("scale * side**2", "(scale *\n            side ** 2)"),
        ("SIDES = 4\n", ""),  # moved to the end, below
    ],
)
def test_what_leaves_it(of, old, new):
    assert old in SOURCE
    changed = SOURCE.replace(old, new)
    assert of(changed if "SIDES" in changed else changed + "\n\nSIDES = 4\n") == of(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("side**2", "side**3"),
        ("side**2", "area**2"),
        ("scale: float = 1.0", "scale: float = 1"),
        ("SIDES = 4", "SIDES = 5"),
        ("if side < 0", "if side <= 0"),
        ("raise UserError", "raise RuntimeError"),
        ("import math\n", "import cmath as math\n"),
        ("import UserError\n", "import Stopped as UserError\n"),
        ("def side(", "@cache\ndef side("),
        ("    return math", "    print(area)\n    return math"),
        ("\n\ndef side", "\n\nside_ = None\n\ndef side"),
    ],
)
def test_what_changes_it(of, old, new):
    assert old in SOURCE
    assert of(SOURCE.replace(old, new)) != of(SOURCE)


def test_files_may_be_renamed_and_split(of, tmp_path):
    whole = of(SOURCE)
    (tmp_path / "0.py").rename(tmp_path / "room.py")
    assert digest([tmp_path / "room.py"]) == whole
    head, tail = SOURCE.split("\n\ndef side")
    assert of(head, "import math\n\n\ndef side" + tail) == of("import math\n\n\ndef side" + tail, head) == whole


def test_another_library_is_other_code(tmp_path):
    (tmp_path / "_C.so").write_bytes(b"one")
    one = digest([], [tmp_path / "_C.so"])
    (tmp_path / "_C.so").write_bytes(b"two")
    assert digest([], [tmp_path / "_C.so"]) != one


def test_of_the_package(tmp_path):
    """What is named exists, and env.json has the hash."""
    assert all((PACKAGE / room).is_dir() for room in ROOMS)
    assert all((PACKAGE / name).is_file() for name in ONLOOKERS)
    run_folder.write_environment(tmp_path)
    assert json.loads((tmp_path / "env.json").read_text())["code_hash"] == code_hash()
    assert len(code_hash()) == 16
