"""Typefaces of a few characters each, for tests that draw glyphs: blocks of ink that tell characters apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTCollection, TTFont

from ijckd_fast.data.prepare.typefaces import Face, read_list

EM = 1000
Box = tuple[float, float, float, float]  # left, bottom, right, top, in parts of a character's square

WHOLE = ((0, 0, 1, 0.2), (0, 0.8, 1, 1))  # so that every character fills its square
NO_INK: Sequence[Box] = ()
BOX: Sequence[Box] = ((0, 0, 1, 1),)


def strokes(point: int) -> list[Box]:
    """Ink of a code point: its bits as bars between a beam at the foot and one at the head."""
    bars = [(i / 16, 0.2, (i + 0.7) / 16, 0.8) for i in range(16) if point >> i & 1]
    return [*WHOLE, *bars]


def make_face(
    family: str,
    style: str,
    points: Iterable[int],
    *,
    square: Box = (0.05, -0.1, 0.95, 0.8),
    odd: dict[int, Sequence[Box]] | None = None,
    revision: float = 1.0,
    weight: float = 1.0,
) -> TTFont:
    """A typeface with these code points.

    square    of an em (left, bottom, right, top), in which ink lies; the advance is an em
    odd       ink of some code points instead of `strokes`; of 0 that of a missing character
    weight    share of each bar's width that has ink
    """
    odd, points = odd or {}, sorted(points)
    names = {point: f"u{point:04X}" for point in points}
    left, bottom, right, top = (EM * side for side in square)

    def drawn(boxes: Iterable[Box]):
        pen = TTGlyphPen(None)
        for x0, y0, x1, y1 in boxes:
            x1 = x0 + (x1 - x0) * (weight if (x0, x1) != (0, 1) else 1)
            corners = [(x0, y0), (x0, y1), (x1, y1), (x1, y0)]
            places = [(round(left + x * (right - left)), round(bottom + y * (top - bottom))) for x, y in corners]
            pen.moveTo(places[0])
            for place in places[1:]:
                pen.lineTo(place)
            pen.closePath()
        return pen.glyph()

    glyphs = {".notdef": drawn(odd.get(0, BOX))}
    glyphs |= {name: drawn(odd.get(point, strokes(point))) for point, name in names.items()}
    builder = FontBuilder(EM, isTTF=True)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap(names)
    builder.setupGlyf(glyphs)
    # FreeType moves a glyph to where the metrics say that it begins
    builder.setupHorizontalMetrics({name: (EM, getattr(glyph, "xMin", 0)) for name, glyph in glyphs.items()})
    builder.setupHorizontalHeader(ascent=880, descent=-120)
    builder.setupNameTable({"familyName": family, "styleName": style, "version": f"Version {revision:.3f}"})
    builder.setupOS2()
    builder.setupPost()
    builder.font["head"].fontRevision = revision
    return builder.font


def save(font: TTFont, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    font.save(path)
    return path


def save_collection(fonts: Sequence[TTFont], path: Path) -> Path:
    """All in one file, a .ttc."""
    collection = TTCollection()
    collection.fonts = list(fonts)
    collection.save(path)
    return path


def write_all(folder: Path, points: Sequence[int], faces: Sequence[Face] | None = None) -> Path:
    """Typefaces of the names of `faces`, default: all of the list, in files that are named by numbers.

    Each has ink of another width; the weights of a design are alike otherwise.
    """
    for number, face in enumerate(faces or read_list()):
        font = make_face(face.family, face.style, points, weight=0.4 + 0.01 * number)
        save(font, folder / f"{number:03d}.ttf")
    return folder
