"""Text files that say what folders do not: the classes in their order, and the class of each image of a flat folder."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ijckd_fast.data.sources.listing import some
from ijckd_fast.data.sources.names import composed, counterparts, did_you_mean, say_forms
from ijckd_fast.errors import UserError

_EXPECTED = "'name,class', 'name class' or the rows of Kaggle's LOC_val_solution.csv"
_NAMES = frozenset(
    {
        *("id", "name", "image", "imageid", "imagename", "imagepath", "imagefile", "imagefilename"),
        *("img", "imgid", "imgname", "photo", "photoid", "picture", "file", "filename", "path", "filepath"),
    }
)
_CLASSES = frozenset(
    {
        *("class", "classname", "classid", "label", "labels", "labelname", "category", "categoryname"),
        *("target", "species", "breed", "wnid", "synset", "predictionstring"),
    }
)
"""Titles of the column with the image's name, and with its class: lower case, letters alone."""

_SEPARATORS = ("\t", ";", ",")
_BOXES = re.compile(r"(?:\S+(?:\s+\d+){4}\s*)+")  # Kaggle's: class x y x y, again for every object, all of one class


class Label(NamedTuple):
    """What a label file says of one image, and in which line."""

    name: str
    line: int


class _Row(NamedTuple):
    line: int
    fields: list[str]


def read_class_list(path: str | Path) -> tuple[str, ...]:
    """The class folder names in a file, one in a line, in their order; empty lines do not count.

    raises  UserError: no such file, nothing in it, a name twice
    """
    expected = "one class folder name in a line"
    first: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(_text(path, expected).splitlines(), 1):
        name = line.strip()
        if name:
            other, before = first.setdefault(composed(name), (name, number))
            if before != number:
                form = "" if other == name else f", in another Unicode form ({other!a} and {name!a})"
                raise UserError(f"{path}: class {name!r} stands in lines {before} and {number}{form}; keep one of them")
    return tuple(name for name, _ in first.values())


def read_labels(path: str | Path) -> dict[str, Label]:
    """Class names by image name, from a table of two columns: the image's name and its class.

    Columns are separated by commas, semicolons or tabs (CSV with or without quotes) or by spaces. A name may lack the
    file's extension. A first line of column titles ('name,class', Kaggle's 'ImageId,PredictionString', and the like)
    says which columns are meant where there are more.
    raises  UserError: no such file, nothing in it, not UTF-8 but UTF-16, a row of another form, a name twice
    """
    rows, separator = _table(path, _text(path, _EXPECTED))
    name_at, class_at, columns = _columns(path, rows[0].fields)
    titled = columns is not None
    labels: dict[str, Label] = {}
    for line, fields in rows[titled:]:
        if len(fields) != (columns or 2) or not fields[name_at] or not fields[class_at]:
            raise UserError(f"{path}, line {line}: expected {_EXPECTED}, found {(separator or ' ').join(fields)!r}")
        name, label = fields[name_at], fields[class_at]
        if separator is not None and _BOXES.fullmatch(label):
            label = label.split()[0]
        if name in labels:
            raise UserError(f"{path}: {name!r} stands in lines {labels[name].line} and {line}; keep one of them")
        labels[name] = Label(label, line)
    if not labels:
        raise UserError(f"{path}: expected {_EXPECTED}, found only column titles")
    return labels


def _table(path: str | Path, text: str) -> tuple[list[_Row], str | None]:
    """The rows that are not empty, fields stripped, and what separates them; None: spaces.

    It is what splits every row into equally many fields, two at least, and leaves no separator at a name's end. Where
    nothing does, the comma or semicolon in the first line, for the error.
    """
    first = next(line for line in text.splitlines() if line.strip())
    separators = [separator for separator in _SEPARATORS if separator in first]
    for separator in separators:
        try:
            rows = _rows(text, separator)
        except csv.Error:  # a separator within quotes
            continue
        widths = {len(row.fields) for row in rows}
        if len(widths) == 1 and widths != {1} and not any(row.fields[0].endswith(_SEPARATORS) for row in rows):
            return rows, separator
    try:
        if separators in ([], ["\t"]):  # which may stand among spaces
            return _rows("\n".join(line.strip() for line in text.splitlines()).replace("\t", " "), " "), None
        return _rows(text, separators[-1]), separators[-1]
    except csv.Error as error:
        raise UserError(
            f"{path}: expected {_EXPECTED}, found quotes that do not fit, {error}; put names with commas or quotes in "
            "them between quotes, with their own quotes doubled"
        ) from error


def _rows(text: str, separator: str) -> list[_Row]:
    """raises  csv.Error, with the line"""
    # strict: a quote that is never closed would swallow the rest of the file
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        rows = [_Row(reader.line_num, [field.strip() for field in fields]) for fields in reader]
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}: {error}") from error
    return [row for row in rows if any(row.fields)]


def _columns(path: str | Path, first: Sequence[str]) -> tuple[int, int, int | None]:
    """(column of the name, column of the class, how many there are if `first` is their titles, else None)."""
    titles = [re.sub(r"[\W_]+", "", title.lower()) for title in first]
    named = [i for i, title in enumerate(titles) if title in _NAMES]
    named = [i for i in named if titles[i] != "id"] or named  # a row's number beside the image's name
    classed = [i for i, title in enumerate(titles) if title in _CLASSES]
    if len(named) == len(classed) == 1:
        return named[0], classed[0], len(first)
    if named and classed:
        meant = [first[i] for i in (named if len(named) > 1 else classed)]
        raise UserError(
            f"{path}: expected one column with the image's name and one with its class, found {some(meant)} for one of "
            "them; leave out the others"
        )
    if len(first) > 2:
        raise UserError(
            f"{path}: expected {_EXPECTED}, found {len(first)} columns in the first row, {' '.join(first)!r}; leave "
            "two, or write titles above them: name for the image's, class for its class's"
        )
    return 0, 1, None


def _text(path: str | Path, expected: str) -> str:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: expected a text file, {expected}, found: {error.strerror}; give the path of one"
        ) from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        raise UserError(
            f"{path}: expected {expected} in UTF-8, found UTF-16 text or no text at all; save it as UTF-8 "
            f"(iconv -f UTF-16 -t UTF-8 {path})"
        )
    text = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf"))  # the mark that Windows programs write
    if not text.strip():
        raise UserError(f"{path}: expected {expected}, found an empty file")
    return text


def labels_of(
    files: Iterable[str], labels: Mapping[str, Label], classes: tuple[str, ...], path: str | Path, folder: Path
) -> np.ndarray:
    """[n] int64 positions in `classes` of image files, given by name.

    path, folder  where labels and files come from, for an error
    warns   where names of files or classes are equal but for their Unicode form
    raises  UserError: a file without a label, a label without a file, a class that is not in `classes`
    """
    number = {name: i for i, name in enumerate(classes)}
    same = counterparts(dict.fromkeys(label.name for label in labels.values()), classes, f"classes in {path}")
    for name, label in labels.items():
        if label.name not in same:
            titles = "; if that line is column titles, write name,class" if label.line == 1 else ""
            raise UserError(
                f"{path}, line {label.line}: {name!r} has the class {label.name!r}, which is none of the "
                f"{len(classes)} classes of the training data ({some(classes)}); fix the line{titles}"
                f"{did_you_mean([label.name], classes)}"
            )
    position = {name: number[other] for name, other in same.items()}
    found: list[int] = []
    bare: list[str] = []
    used: set[str] = set()
    other_form: list[str] = []
    by_form = {composed(name): name for name in labels if not name.isascii()}
    for file in files:
        named = next(_spellings(file, labels, by_form), None)
        if named is None:
            bare.append(file)
            continue
        used.add(named)
        found.append(position[labels[named].name])
        if not file.startswith(named):
            other_form.append(file)
    say_forms(other_form, f"images in {folder}")
    gone = [name for name in labels if name not in used]
    if bare:
        raise UserError(
            f"{path} must name the class of each of the {len(found) + len(bare)} images in {folder}, but {len(bare)} "
            f"are not in it ({some(bare)}); add lines for them, or remove them{did_you_mean(gone, bare)}"
        )
    if gone:
        raise UserError(
            f"{folder} must hold each of the {len(labels)} images that {path} names, but {len(gone)} are not there "
            f"({some(gone)}); complete the folder, or remove their lines"
        )
    return np.array(found, np.int64)


def _spellings(file: str, labels: Mapping[str, Label], by_form: Mapping[str, str]) -> Iterator[str]:
    """The names in `labels` that a file may go by, the likeliest first. by_form: the others by their composed form."""
    for name in (file, os.path.splitext(file)[0]):
        if name in labels:
            yield name
    for name in (file, os.path.splitext(file)[0]):
        if composed(name) in by_form:
            yield by_form[composed(name)]
