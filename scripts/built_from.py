"""Which sources a compiled library was built from: a hash of csrc/ and CMakeLists.txt that the build puts into it.
Needs Python alone.
"""

from __future__ import annotations

import hashlib
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBRARIES = ("_C.so", "_C_cuda.so")  # in ijckd_fast/head


def sources_hash(root: pathlib.Path = ROOT) -> str:
    """Of the sources that lie here, as CMakeLists.txt makes it: of every file's path and content, by path."""
    paths = [path for path in (root / "csrc").rglob("*") if path.is_file()]
    listed = sorted(path.relative_to(root).as_posix() for path in paths)
    lines = [
        f"{hashlib.sha256((root / name).read_bytes()).hexdigest()} {name}\n" for name in ["CMakeLists.txt", *listed]
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def built_from(library: pathlib.Path) -> str | None:
    """The hash in the library's file; None in one that was built before it was put there."""
    found = re.search(rb"ijckd sources ([0-9a-f]{16})", library.read_bytes())
    return found[1].decode() if found else None


def fault(library: pathlib.Path, root: pathlib.Path = ROOT) -> str | None:
    """Why this library is not one of the sources that lie here, or None: it is."""
    if not library.exists():
        return f"{library} is missing"
    found, wanted = built_from(library), sources_hash(root)
    if found == wanted:
        return None
    return f"{library} was built from other sources ({found or 'of unknown hash'}; csrc/ here is {wanted})"
