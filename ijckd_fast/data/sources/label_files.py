"""Text files that say what folders do not: the classes in their order, and the class of each image of a flat folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ijckd_fast.data.sources.listing import some
from ijckd_fast.errors import UserError

_HEADERS = frozenset({"imageid,predictionstring", "name,class"})
_BOXES = re.compile(r"(?:\S+(?:\s+\d+){4}\s*)+")  # Kaggle's: class x y x y, again for every object, all of one class


class Label(NamedTuple):
    """What a label file says of one image, and in which line."""

    name: str
    line: int


def read_class_list(path: str | Path) -> tuple[str, ...]:
    """The class folder names in a file, one in a line, in their order; empty lines do not count.

    raises  UserError: no such file, nothing in it, a name twice
    """
    first: dict[str, int] = {}
    for number, name in _lines(path, "one class folder name in a line"):
        if name in first:
            raise UserError(f"{path}: class {name!r} stands in lines {first[name]} and {number}; keep one of them")
        first[name] = number
    return tuple(first)


def read_labels(path: str | Path) -> dict[str, Label]:
    """Class names by image name, from lines 'name,class', 'name class' or Kaggle's 'ImageId,PredictionString'.

    A name may lack the file's extension. A first line with Kaggle's column titles, or 'name,class', is skipped.
    raises  UserError: no such file, nothing in it, a line of another form, a name twice
    """
    expected = "'name,class', 'name class' or the rows of Kaggle's LOC_val_solution.csv"
    labels: dict[str, Label] = {}
    for number, line in _lines(path, expected):
        if number == 1 and line.lower() in _HEADERS:
            continue
        name, comma, rest = (part.strip() for part in line.partition(","))
        if not comma:
            name, rest = (*line.split(None, 1), "")[:2]
        elif _BOXES.fullmatch(rest):
            rest = rest.split()[0]
        if not name or not rest or (not comma and len(rest.split()) > 1):
            raise UserError(f"{path}, line {number}: expected {expected}, found {line!r}")
        if name in labels:
            raise UserError(f"{path}: {name!r} stands in lines {labels[name].line} and {number}; keep one of them")
        labels[name] = Label(rest, number)
    if not labels:
        raise UserError(f"{path}: expected {expected}, found only column titles")
    return labels


def _lines(path: str | Path, expected: str) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line that is not empty."""
    try:
        text = os.fsdecode(
            Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
        )  # the mark that Windows programs write
    except OSError as error:
        raise UserError(
            f"{path}: expected a text file, {expected}, found: {error.strerror}; give the path of one"
        ) from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path}: expected {expected}, found an empty file")
    yield from lines


def labels_of(
    files: Iterable[str], labels: Mapping[str, Label], classes: tuple[str, ...], path: str | Path, folder: Path
) -> np.ndarray:
    """[n] int64 positions in `classes` of image files, given by name.

    path, folder  where labels and files come from, for an error

    raises  UserError: a file without a label, a label without a file, a class that is not in `classes`
    """
    position = {name: i for i, name in enumerate(classes)}
    for name, label in labels.items():
        if label.name not in position:
            raise UserError(
                f"{path}, line {label.line}: {name!r} has the class {label.name!r}, which is none of the "
                f"{len(classes)} classes of the training data ({some(classes)}); fix the line"
            )
    found: list[int] = []
    bare: list[str] = []
    used: set[str] = set()
    for file in files:
        name = file if file in labels else os.path.splitext(file)[0]
        if name in labels:
            used.add(name)
            found.append(position[labels[name].name])
        else:
            bare.append(file)
    if bare:
        raise UserError(
            f"{path} must name the class of each of the {len(found) + len(bare)} images in {folder}, but {len(bare)} "
            f"are not in it ({some(bare)}); add lines for them, or remove them"
        )
    if len(used) < len(labels):
        gone = [name for name in labels if name not in used]
        raise UserError(
            f"{folder} must hold each of the {len(labels)} images that {path} names, but {len(gone)} are not there "
            f"({some(gone)}); complete the folder, or remove their lines"
        )
    return np.array(found, np.int64)
