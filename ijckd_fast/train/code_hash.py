"""A digest of the code that can move a run's weights or figures: runs of the same code can be known as such."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# What a run's weights and figures come from. Not here: what trains or shows several runs (compare, export, commands),
# and theory.
ROOMS = ("parallel", "head", "nets", "distill", "data", "evaluate", "teacher_cache", "train")
# Files of these rooms that only look at a run, or say what happened in it.
ONLOOKERS = (
    "evaluate/bound.py", "evaluate/bound_advice.py", "evaluate/bound_report.py", "parallel/agreement.py",
    "parallel/watch.py", "train/code_hash.py", "train/loaded_run.py", "train/pairs.py", "train/progress.py",
    "train/report.py", "train/same_run.py",
)  # fmt: skip


@functools.cache
def code_hash() -> str:
    """16 hex digits for this installation: `digest` of ROOMS without ONLOOKERS, and of the compiled libraries.

    Two installations with equal hashes train the same weights and find the same figures, on one machine with the same
    versions of the libraries beneath (env.json names those).
    """
    package = Path(__file__).parents[1]
    onlookers = {package / name for name in ONLOOKERS}
    sources = (path for room in ROOMS for path in (package / room).rglob("*.py") if path not in onlookers)
    # The bytes of the libraries, not their sources: another compiler, or other flags, may round otherwise.
    return digest(sources, (package / "head").glob("_C*.so"))


def digest(sources: Iterable[Path], libraries: Iterable[Path] = ()) -> str:
    """16 hex digits of what Python files say, and of the bytes of compiled libraries.

    The files count as one heap of top-level statements. The digest stays the same when a file is renamed or split, and
    when statements move within a file or to another one. It also leaves out what no figure depends on: comments,
    docstrings, layout, `__all__`, imports for type checkers, and the arguments of what is raised (the texts of errors).
    Every other change changes it, for example that of a default value, or of the library that a function is imported
    from.
    """
    statements = {_text(statement) for path in sources for statement in ast.parse(path.read_bytes()).body}
    built = [hashlib.blake2b(path.read_bytes()).hexdigest() for path in libraries]
    lines = [*sorted(statements), *sorted(built)]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def _text(statement: ast.stmt) -> str:
    """What a statement says, in one line; nothing where it does nothing that a figure depends on."""
    said: list[str] = []
    _say(statement, said)
    return " ".join(said)


def _say(node: object, said: list[str]) -> None:
    """Appends what a part of a syntax tree says, without empty fields: Python's versions differ in which there are."""
    kind = type(node)
    if isinstance(node, list):
        said.append("[")
        for each in node:
            _say(each, said)
        said.append("]")
    elif not isinstance(node, ast.AST):
        said.append(repr(node))
    elif kind in _SHORTENED and (short := _SHORTENED[kind](node)) is not None:
        said += short
    else:
        said.append(kind.__name__)
        for name in node._fields:
            value = getattr(node, name, None)
            if value is not None and value != []:
                said.append(name)
                _say(value, said)


def _bare(node: ast.Expr) -> list[str] | None:
    return [] if isinstance(node.value, ast.Constant) else None  # a docstring


def _assigned(node: ast.Assign) -> list[str] | None:
    target = node.targets[0]
    return [] if isinstance(target, ast.Name) and target.id == "__all__" else None


def _chosen(node: ast.If) -> list[str] | None:
    return [] if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" else None


def _raised(node: ast.Raise) -> list[str] | None:
    return ["Raise", ast.unparse(node.exc.func)] if isinstance(node.exc, ast.Call) else None


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """From another library everything; from our own modules, which move, only names that are changed on the way."""
    said = []
    module = getattr(node, "module", None) or ""
    for alias in node.names:
        ours = (module or alias.name).partition(".")[0] == "ijckd_fast"
        if not ours:
            said.append(f"import {module}.{alias.name} as {alias.asname}")
        elif alias.asname is not None:
            said.append(f"import {alias.name.rpartition('.')[2]} as {alias.asname}")
    return said


# How a node of each type is put more shortly than by its fields; None: it is not.
_SHORTENED: dict[type, Callable[[Any], list[str] | None]] = {
    ast.Expr: _bare,
    ast.Assign: _assigned,
    ast.If: _chosen,
    ast.Raise: _raised,
    ast.Import: _imported,
    ast.ImportFrom: _imported,
}
