"""A classification task of thousands of classes: the ideographs of many typefaces, OUT/{train,val}/<class>/*.png.

A class is a character, u4e00; an image is one typeface's, noto-sans_bold.png. Training and validation have no design in
common. OUT/glyphs.json says all that it was made of, OUT/characters.txt which character a class is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, features

from ijckd_fast import files
from ijckd_fast.console import progress_bar
from ijckd_fast.data.index import DataFolder
from ijckd_fast.data.prepare.glyph_images import JIS1, pictures_of, pixels_digest
from ijckd_fast.data.prepare.pack_format import PackFormat
from ijckd_fast.data.prepare.typefaces import SPLITS, Face, Found, Search, chosen, read_list, require, search
from ijckd_fast.data.prepare.workers import in_processes
from ijckd_fast.errors import UserError

RECORD, CHARACTERS = "glyphs.json", "characters.txt"
SETS: dict[str, tuple[int, ...]] = {"jis1": tuple(sorted(JIS1)), "cjk": tuple(range(0x4E00, 0x9FA6))}
"""The code points of each set of classes: JIS X 0208's first level, 2,965; CJK Unified Ideographs of Unicode 1, 20,902.
"""

_DRAWING = 1  # to be raised when other pixels are made of the same typefaces
_SHOWN = 20  # characters that a line spells out
_SIZES = (8, 512)  # pixels of the images' sides, least and most


@dataclass(frozen=True)
class _Task:
    """One face to be drawn: the characters `points`, to folder/<class>/<name>.png."""

    found: Found
    size: int
    points: tuple[int, ...]
    folder: Path


@dataclass(frozen=True)
class _Drawn:
    """A face that was drawn.

    has      [n] bool, which of the characters
    digests  [n, 16] uint8, of their pixels; 0 of those that it lacks
    """

    found: Found
    has: np.ndarray
    digests: np.ndarray


def prepare_glyphs(
    out: str | Path,
    *,
    classes: str = "jis1",
    designs: str | None = None,
    image_size: int = 32,
    packed: PackFormat | None = None,
    fonts: Sequence[str | Path] = (),
    allow_missing: bool = False,
    workers: int = 0,
    progress: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Writes a data folder, with its index, unless the same is there already.

    out            a new or empty folder. It is made beside it and renamed into place: there is all of it or nothing
    classes        'jis1' or 'cjk', see SETS
    designs        which to train on, see typefaces.chosen; None: all
    image_size     side in pixels
    packed         the kind of pack to write (JpegPack, BlockPack; short 0); None: class folders of PNG files
    fonts          folders in which to look for typefaces, before those of the system
    allow_missing  do with the typefaces that are there
    workers        processes; 0 = one per core this process may use. The pixels do not depend on it
    progress       show progress bars on stderr
    say            called with what there is to say of what is missing
    returns        a row for each split: 'images', 'classes', 'faces', 'designs', of those the 'missing_faces',
                   'lacking' (images that faces lack), 'written' by this call, 'bytes', 'pixels_digest'
    raises         UserError: a value out of range, missing typefaces (see typefaces.require), less than two characters
                   that both splits have, another content of `out`
    """
    out = Path(out)
    if classes not in SETS:
        raise UserError(f"--classes must be one of {', '.join(SETS)}, found {classes!r}")
    if not _SIZES[0] <= image_size <= _SIZES[1]:
        raise UserError(f"--image-size must be from {_SIZES[0]} to {_SIZES[1]} pixels, found {image_size}; 32 is usual")
    if workers < 0:
        raise UserError(f"--workers must be at least 0, found {workers}")
    seen = search(chosen(read_list(), designs), fonts)
    if note := require(seen, allow_missing):
        say(note)
    made_with = _made_with(seen, classes, image_size, packed)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        return _those_there(out, made_with)
    workers = workers or len(os.sched_getaffinity(0))
    with files.disk_full_told(f"for {out}", "free some and run the same command again; nothing was left there"):
        files.require_writable(out.parent, "the folder of OUT")
        files.remove_leftovers(out.parent, out.name)
        with files.claimed(out, folder=True) as partial:
            try:
                rows = _make(partial / "glyphs", partial / "pngs", seen, made_with, packed, workers, progress, say)
                try:
                    os.rename(partial / "glyphs", out)  # replaces an empty folder, never a full one
                except OSError:
                    if not out.exists():
                        raise
                    return _those_there(out, made_with)  # another process was first
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return rows


def _made_with(seen: Search, classes: str, image_size: int, packed: PackFormat | None) -> dict[str, Any]:
    """All that the pixels depend on, as it stands in glyphs.json."""
    return {
        "drawing": _DRAWING,
        "classes": classes,
        "image_size": image_size,
        "codec": "png" if packed is None else packed.recorded(),
        "pillow": PIL.__version__,
        "freetype": features.version("freetype2"),
        "typefaces": [
            {
                "name": one.face.name, "split": one.face.split, "kind": one.face.kind, "family": one.face.family,
                "style": one.face.style, "version": one.version, "file": one.path.name, "index": one.index,
                "file_digest": one.digest,
            }
            for one in seen.found
        ],
        "missing": [
            {"name": one.name, "split": one.split, "family": one.family, "style": one.style, "package": one.package}
            for one in seen.missing
        ],
    }  # fmt: skip


def _those_there(out: Path, made_with: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the glyphs that are there, nothing written; UserError unless they are these, and whole."""
    other = "give another folder, or delete this one"
    there = files.read_json(out / RECORD, other) if out.is_dir() else None
    if there is None:
        raise UserError(f"expected a new or empty folder for the glyphs, but {out} holds something else; {other}")
    differs = [name for name, value in made_with.items() if there.get(name) != value]
    if differs:
        raise UserError(f"{out} holds glyphs that were made with other {', '.join(differs)} (see {RECORD}); {other}")
    for found, row in zip(DataFolder(out).scans(), there["rows"], strict=True):
        if len(found.index) != row["images"]:
            raise UserError(
                f"{found.index.folder} should hold {row['images']:,} images, found {len(found.index):,}; delete {out}, "
                "it will be written again"
            )
    return [{**row, "written": 0} for row in there["rows"]]


def _make(
    out: Path,
    pngs: Path,
    seen: Search,
    made_with: dict[str, Any],
    packed: PackFormat | None,
    workers: int,
    progress: bool,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Writes the data folder `out`, by way of the class folders `pngs`; the row of each split."""
    points = SETS[made_with["classes"]]
    for split in SPLITS:
        (pngs / split).mkdir(parents=True)
    tasks = (_Task(one, made_with["image_size"], points, pngs / one.face.split) for one in seen.found)
    ended = "nothing was left: run the same command again, with fewer --workers if it was that"
    drawn: dict[Face, _Drawn] = {}
    with (
        progress_bar(progress) as bar,
        contextlib.closing(in_processes(_draw, tasks, min(workers, len(seen.found)), ended)) as finished,
    ):
        line = bar.add_task("drawing typefaces", total=len(seen.found))
        for one in finished:
            drawn[one.found.face] = one
            bar.advance(line)
    faces = [drawn[one.face] for one in seen.found]
    kept = _in_both_splits(faces, points)
    for point in (point for point, keep in zip(points, kept, strict=True) if not keep):
        for split in SPLITS:
            shutil.rmtree(pngs / split / class_of(point), ignore_errors=True)  # one of them may not be there
    left_out = _characters(points, ~kept)
    if left_out:
        say(f"left out, since no typeface of train, or none of val, has them: {_some(left_out)}")
    for one in faces:
        if lacks := _characters(points, kept & ~one.has):
            say(f"{one.found.face.name} lacks {_some(lacks)}")
    if packed is None:
        os.rename(pngs, out)
    else:
        from ijckd_fast.data.prepare.packing import pack  # here: it stands on torch

        pack(pngs, out, packed, workers=workers, progress=progress)
        shutil.rmtree(pngs)
    rows = _rows(out, faces, seen.missing, points, kept, workers, progress)
    of_faces = [_figures(one, points, kept) for one in faces]
    names = [f"{class_of(point)} {chr(point)}\n" for point, keep in zip(points, kept, strict=True) if keep]
    files.write_text(out / CHARACTERS, "".join(names))
    files.write_json(out / RECORD, {**made_with, "faces": of_faces, "left_out": left_out, "rows": rows})
    return rows


def class_of(point: int) -> str:
    """The class of a code point: u4e00. Sorted, classes are in the order of their code points."""
    return f"u{point:04x}"


def _draw(task: _Task) -> _Drawn:
    """Draws one face, in a process of its own."""
    has, digests = np.zeros(len(task.points), bool), np.zeros((len(task.points), 16), np.uint8)
    number = {point: i for i, point in enumerate(task.points)}
    name = f"{task.found.face.name}.png"
    for point, picture in pictures_of(task.found, task.size, task.points):
        folder = task.folder / class_of(point)
        folder.mkdir(exist_ok=True)  # another face's process may have made it
        Image.fromarray(picture).save(folder / name)
        has[number[point]] = True
        digests[number[point]] = np.frombuffer(pixels_digest(picture), np.uint8)
    return _Drawn(task.found, has, digests)


def _in_both_splits(faces: Sequence[_Drawn], points: Sequence[int]) -> np.ndarray:
    """[n] bool: the characters that a face of train and one of val has. UserError for less than two."""
    there = [np.any([one.has for one in faces if one.found.face.split == split], 0) for split in SPLITS]
    kept = there[0] & there[1]
    if kept.sum() < 2:
        raise UserError(
            f"a task needs two characters that typefaces of train and of val have, found {kept.sum()} of the "
            f"{len(points):,}: the typefaces that are there have train {there[0].sum():,} and val {there[1].sum():,}; "
            "install the missing ones, or give more --designs"
        )
    return kept


def _figures(one: _Drawn, points: Sequence[int], kept: np.ndarray) -> dict[str, Any]:
    """Of one face: how many of the task's characters it has, those it lacks, and the digest of the pixels."""
    return {
        "name": one.found.face.name,
        "images": int((one.has & kept).sum()),
        "lacks": _characters(points, kept & ~one.has),
        "pixels_digest": _pixels_digest(one, points, kept),
    }


def _characters(points: Sequence[int], which: np.ndarray) -> str:
    """Those of the code points where `which` [n] bool is true."""
    return "".join(chr(point) for point, one in zip(points, which.tolist(), strict=True) if one)


def _some(characters: str) -> str:
    """How many, and the first few, for people."""
    shown = f"{characters[:_SHOWN]}..." if len(characters) > _SHOWN else characters
    return f"{len(characters):,} character{'s' if len(characters) > 1 else ''} ({shown})"


def _pixels_digest(one: _Drawn, points: Sequence[int], kept: np.ndarray) -> str:
    """Of the task's characters and their pixels in one face; 32 hex digits."""
    there = one.has & kept
    digest = hashlib.blake2b(np.array(points, "<u4")[there].tobytes(), digest_size=16)
    digest.update(one.digests[there].tobytes())
    return digest.hexdigest()


def _rows(
    out: Path,
    faces: Sequence[_Drawn],
    missing: Sequence[Face],
    points: Sequence[int],
    kept: np.ndarray,
    workers: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """Makes the index, and a row for each split; its digest is of the faces' names and pixels, in their order."""
    rows = []
    for found in DataFolder(out).scans(workers=workers, progress=progress, least_classes=2):
        split = found.index.split
        mine = [one for one in faces if one.found.face.split == split]
        count = sum(int((one.has & kept).sum()) for one in mine)
        assert len(found.index) == count, (len(found.index), count)
        pixels = "".join(f"{one.found.face.name} {_pixels_digest(one, points, kept)}\n" for one in mine)
        rows.append(
            {
                "split": split,
                "images": count,
                "classes": int(kept.sum()),
                "faces": len(mine),
                "designs": len({one.found.face.design for one in mine}),
                "missing_faces": sum(face.split == split for face in missing),
                "lacking": int(kept.sum()) * len(mine) - count,
                "written": count,
                "bytes": sum(path.stat().st_size for path in _files_below(out / split)),
                "pixels_digest": hashlib.blake2b(pixels.encode(), digest_size=16).hexdigest(),
            }
        )
    return rows


def _files_below(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in names)
