"""Checksums of the files of a data folder: DIR/train.b2sums and DIR/val.b2sums, as `b2sum -l 128` writes them.

A line is 32 hex digits, two spaces and a path below DIR. `ijckd-fast pack` writes them; (cd DIR && b2sum -c *.b2sums)
compares them with the files, as the index does whenever it reads a shard.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ijckd_fast.data.blocks import REMEDY
from ijckd_fast.files import Damaged, digest, read_bytes

_LINE = re.compile(rb"([0-9a-f]{32})  (.+)")


def sums_path(root: Path, split: str) -> Path:
    """Where the checksums of a split are."""
    return root / f"{split}.b2sums"


def parse_sums(content: bytes) -> tuple[dict[str, str], list[int]]:
    """(checksum by path, numbers of the lines from 1 that are none); of two lines for a path the later counts."""
    sums: dict[str, str] = {}
    others = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if found := _LINE.fullmatch(line):
            sums[os.fsdecode(found[2])] = found[1].decode()
        elif line:
            others.append(number)
    return sums, others


def sum_lines(sums: Mapping[str, str]) -> bytes:
    """The inverse of `parse_sums`, sorted by path."""
    return b"".join(sums[path].encode() + b"  " + os.fsencode(path) + b"\n" for path in sorted(sums))


CLASSES_FILE = "classes.txt"
"""Beside the splits: the class names of numeric labels, one in a line, from 0."""


class Sums:
    """The checksums of a split. Raises Damaged where the file holds anything else, or is `required` and not there."""

    def __init__(self, root: Path, split: str, required: bool = False) -> None:
        self._root, self._path = root, sums_path(root, split)
        try:
            content = read_bytes(self._path)
        except FileNotFoundError as error:
            if required:
                raise Damaged(
                    f"{self._path}, the checksums of what is in {root / split}, is not there: {REMEDY}"
                ) from error
            self._sums: dict[str, str] | None = None  # a data folder without any
            return
        self._sums, others = parse_sums(content)
        if others:
            raise Damaged(
                f"{self._path} is damaged (line {others[0]} is not 32 hex digits, two spaces and a path): {REMEDY}"
            )

    def require_all(self, shards: Iterable[str]) -> None:
        """UserError unless the shards (paths below the root) are those that have a checksum."""
        if self._sums is None:
            return
        named, there = self._sums.keys() - {CLASSES_FILE}, set(shards)
        for path in sorted(named - there):
            raise Damaged(f"{self._path} names {path}, which is not there: {REMEDY}")
        for path in sorted(there - named):
            raise Damaged(
                f"{self._root / path} has no checksum in {self._path}: {REMEDY}; a shard that you have added gets one "
                f"by (cd {self._root} && b2sum -l 128 {path} >> {self._path.name})"
            )

    def require(self, path: str) -> None:
        """Damaged unless the file at `path`, below the root, has its checksum, where it has one."""
        expected = None if self._sums is None else self._sums.get(path)
        if expected is None:
            return
        try:
            found = digest(self._root / path)
        except FileNotFoundError as error:
            raise Damaged(f"{self._path} names {path}, which is not there: {REMEDY}") from error
        if found != expected:
            raise Damaged(
                f"{self._root / path} is damaged or was changed (its checksum is not the one in {self._path}): {REMEDY}"
            )
