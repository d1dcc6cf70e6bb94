"""Names that a package offers without importing the modules they are defined in, until they are asked for."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ijckd_fast import extras


def exports(package: str, file: str) -> tuple[list[str], Callable[[str], Any]]:
    """`__all__` and `__getattr__` of the package whose `__init__.py` is `file`.

    The list of names stands once, where type checkers read it too: `from ijckd_fast.room.module import name as name` in
    the `__init__.pyi` beside it. A name is not that of a module of the package, which would hide it once it is
    imported. A package of an extra that is not installed is an error that says which extra it is.
    """
    home_of = {
        alias.name: node.module
        for node in ast.parse(Path(file).with_suffix(".pyi").read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(home_of[name]), name)
        except ModuleNotFoundError as error:
            text = extras.missing(f"{package}.{name}", error)
            if text is None:
                raise
            raise ModuleNotFoundError(text, name=error.name) from error

    return sorted(home_of), get
