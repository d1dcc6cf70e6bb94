"""Typefaces by their names: the committed list of those that a task is made of, and where a machine has them.

The list is typefaces.yaml. A face is found by family and style, as the file itself says them, wherever it lies and
whatever the file is called: distributions have paths of their own.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ijckd_fast import files
from ijckd_fast.data.sources import some
from ijckd_fast.errors import UserError

LIST = Path(__file__).with_name("typefaces.yaml")
SPLITS = ("train", "val")
_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")  # of a design, or a weight: it becomes a part of file names


@dataclass(frozen=True)
class Face:
    """One typeface of the list: a design in one weight.

    design   what faces of one drawing have in common, and the unit in which training and validation are kept apart
    weight   what tells its faces apart
    kind     of design, for people: gothic, mincho, brush, ...
    split    'train' or 'val'
    family, style  as the file names itself
    package  Debian's package that has it
    """

    design: str
    weight: str
    kind: str
    split: str
    family: str
    style: str
    package: str

    @property
    def name(self) -> str:
        """What its images are called: noto-sans_black. The design ends at the only underscore."""
        return f"{self.design}_{self.weight}"

    @property
    def key(self) -> tuple[str, str]:
        """By what it is found."""
        return _plain(self.family), _plain(self.style)


@dataclass(frozen=True)
class Found:
    """A face on this machine: number `index` of the faces in a file.

    version  as the file says it: 'Version 1.05'
    digest   of the whole file, see files.digest
    """

    face: Face
    path: Path
    index: int
    version: str
    digest: str


@dataclass(frozen=True)
class Search:
    """What a search gave: the faces that are there, in the order of the list, those that are not, and what of the font
    files could not be read, "PATH: WHY".
    """

    found: list[Found]
    missing: list[Face]
    unreadable: list[str]


def _plain(name: str) -> str:
    """A family's or style's name, however it is written."""
    return " ".join(name.lower().split())


def read_list(path: Path = LIST) -> list[Face]:
    """The faces of the list, in its order."""
    import yaml

    faces = []
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        design, kind, split = entry["design"], entry["kind"], entry["split"]
        assert split in SPLITS, entry
        for weight, family, style, package in entry["faces"]:
            assert all(map(_NAME.fullmatch, (design, weight))), entry
            faces.append(Face(design, weight, kind, split, family, style, package))
    return faces


def chosen(faces: Sequence[Face], designs: str | None) -> list[Face]:
    """The faces of the designs that are asked for, and all of val.

    designs  None: all; a number: so many, the first of train in the list; else names of train's designs, joined by
             commas
    raises   UserError: a number out of range, a name that is no design of train
    """
    known = list(dict.fromkeys(face.design for face in faces if face.split == "train"))
    if designs is None:
        wanted = known
    elif designs.strip().isdecimal():
        count = int(designs)
        if not 1 <= count <= len(known):
            raise UserError(
                f"--designs must be from 1 to {len(known)}, the designs to train on, or names, found {count}"
            )
        wanted = known[:count]
    else:
        wanted = [name.strip() for name in designs.split(",")]
        of_val = {face.design for face in faces if face.split == "val"}
        for name in wanted:
            if name in of_val:
                raise UserError(
                    f"--designs names those to train on, found {name!r}, which is for validation alone, where all its "
                    "designs always are; leave it out"
                )
            if name not in known:
                raise UserError(
                    f"--designs must be a number or names, joined by commas, of {', '.join(known)}; found {name!r}"
                )
    return [face for face in faces if face.split == "val" or face.design in wanted]


def search(faces: Sequence[Face], folders: Sequence[str | Path] = ()) -> Search:
    """Looks for faces in `folders`, whose faces are preferred, and where the system has its own.

    Of several files with a face, in equally preferred folders, that of the highest revision is taken, then that of the
    smallest digest: the order of folders says nothing.

    raises  UserError for one of `folders` that is none
    """
    for folder in folders:
        if not os.path.isdir(folder):
            raise UserError(f"--fonts must be a folder of typefaces, but {folder} is none; give one that is there")
    wanted = {face.key: face for face in faces}
    unreadable: list[str] = []
    candidates: dict[Face, list[tuple[float, str, Found]]] = {}
    for places in (folders, system_folders()):
        here: dict[Face, list[tuple[float, str, Found]]] = {}
        for path in _font_files(places):
            for face, found, revision in _faces_in(path, wanted, unreadable):
                here.setdefault(face, []).append((-revision, found.digest, found))
        candidates = {**here, **candidates}
    best = {face: min(those, key=lambda one: (*one[:2], one[2].index))[2] for face, those in candidates.items()}
    there = [best[face] for face in faces if face in best]
    return Search(there, [face for face in faces if face not in best], sorted(unreadable))


def system_folders() -> list[Path]:
    """Where fontconfig looks, by its configuration; where it has none, the usual places. Not all of them are there."""
    data = Path(os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share"))
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    usual = [data / "fonts", Path(os.path.expanduser("~/.fonts")), *(Path(one, "fonts") for one in shared.split(":"))]
    config = Path(os.environ.get("FONTCONFIG_FILE") or "/etc/fonts/fonts.conf")
    if not config.is_file():
        return usual
    configured: list[Path] = []
    for path in (config, *sorted(config.parent.glob("conf.d/*.conf"))):
        try:
            named = ElementTree.parse(path).getroot().iter("dir")
        except (OSError, ElementTree.ParseError):  # fontconfig passes over it too
            continue
        for entry in named:
            text = os.path.expanduser((entry.text or "").strip())
            configured.append(data / text if entry.get("prefix") == "xdg" else config.parent / text)
    return configured


def _font_files(folders: Iterable[str | Path]) -> Iterator[Path]:
    """Each font file below the folders once, links followed."""
    seen: set[str] = set()
    for start in folders:
        for place, below, names in os.walk(start, followlinks=True):
            real = os.path.realpath(place)
            if real in seen:
                below.clear()
                continue
            seen.add(real)
            for name in names:
                path = os.path.realpath(os.path.join(place, name))
                if name.lower().endswith(_SUFFIXES) and path not in seen:
                    seen.add(path)
                    yield Path(path)


def _faces_in(
    path: Path, wanted: Mapping[tuple[str, str], Face], unreadable: list[str]
) -> Iterator[tuple[Face, Found, float]]:
    """(face, where it is, revision) of the wanted faces in a file, which is added to `unreadable` where it is none."""
    try:
        faces = list(_described(path))
    except Exception as error:  # fontTools raises nearly anything on damaged input
        if not isinstance(error, FileNotFoundError):  # a link that leads nowhere is no typeface
            unreadable.append(f"{path}: {' '.join(str(error).split()) or type(error).__name__}")
        return
    for index, (family, style, version, revision) in enumerate(faces):
        if face := wanted.get((_plain(family), _plain(style))):
            yield face, Found(face, path, index, version, files.digest(path)), revision


def _described(path: Path) -> Iterator[tuple[str, str, str, float]]:
    """(family, style, version, revision) of each face in a font file."""
    for font in opened(path):
        names = font["name"]
        family, style = names.getBestFamilyName() or "", names.getBestSubFamilyName() or ""
        yield family, style, (names.getDebugName(5) or "").strip(), float(font["head"].fontRevision)


def opened(path: Path) -> Iterator[Any]:
    """Each face in a font file as fontTools' TTFont, to be read before the next one is asked for."""
    from fontTools.ttLib import TTCollection, TTFont

    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it warns of odd dates and the like, by the dozen
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == b"ttcf":
        with TTCollection(path, lazy=True) as collection:
            yield from collection.fonts
    else:
        with TTFont(path, lazy=True) as font:
            yield font


def require(found: Search, allow_missing: bool) -> str | None:
    """What there is to say of faces that are missing, for people; None where none are.

    raises  UserError: faces are missing and that is not allowed; none is left of train or of val
    """
    if not found.missing:
        return None
    packages = sorted({face.package for face in found.missing})
    designs = list(dict.fromkeys(face.design for face in found.missing))
    styles: dict[str, list[str]] = {}
    for face in found.missing:
        styles.setdefault(face.family, []).append(face.style)
    names = [f"{family} {'/'.join(those)}" for family, those in styles.items()]
    total = len(found.found) + len(found.missing)
    what = (
        f"{len(found.missing)} of {total} typefaces, of {len(designs)} designs, are not on this machine "
        f"({', '.join(names)})"
    )
    if found.unreadable:
        what += f"; {len(found.unreadable)} font files could not be read ({some(found.unreadable)})"
    install = (
        f"on Debian or Ubuntu: apt-get install --no-install-recommends {' '.join(packages)}; elsewhere put the files "
        "into ~/.fonts, or name their folder by --fonts DIR"
    )
    empty = [split for split in SPLITS if not any(one.face.split == split for one in found.found)]
    if empty:
        raise UserError(f"{what}, which leaves none for {' and '.join(empty)}; {install}")
    if not allow_missing:
        raise UserError(
            f"the glyphs are the same task for everyone only with all typefaces, but {what}; {install}, or do with "
            "fewer by --allow-missing"
        )
    return f"another task than with all typefaces: {what}; {install}"
