"""A typeface's characters as small pictures: white ink on black, as large as the square takes, without anything cut.

How large, and where: typefaces fill their em square differently (a handwriting takes two thirds of what a gothic does),
and their ascents say nothing of ideographs. So a face is measured by its ink: one scale and one centre for all of its
characters, by which nearly all of them lie within the square and keep their sizes beside each other. The few that reach
beyond (a brush's long stroke) are made smaller, each for itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ijckd_fast.data.prepare.typefaces import Found, opened

JIS1 = tuple(
    ord(bytes((row, cell)).decode("euc_jp"))
    for row in range(0xB0, 0xD0)
    for cell in range(0xA1, 0xFF if row < 0xCF else 0xD4)
)
"""JIS X 0208's first level, 2,965 kanji, in the order of the standard."""

_MEASURED = 300  # characters, or up to twice as many, by which a face's frame is found
_MEASURED_AT = 128  # pixels per em
_WITHIN = 0.95  # share of a face's characters that lie within its frame
_MARGIN = 1 / 16  # of the side, on every side of the frame
_LEAST_DRAWN = 128  # pixels: smaller, typefaces have bitmaps of their own, and hinting bends their strokes
_FINEST = 4  # the drawn pixels that become one, along a side, at least
_NO_CHARACTER = chr(0x10FFFF)  # which no face has: drawn, it is what a face has for missing ones


@dataclass(frozen=True)
class Frame:
    """How a face's ink becomes a square: its centre, from a character's origin on the baseline to the right and down,
    and half the side of the square in which it lies, margin apart; in ems.
    """

    x: float
    y: float
    half: float


def frame_of(font: ImageFont.FreeTypeFont, scale: float, characters: Iterable[str]) -> Frame | None:
    """The frame of a face by the ink of these characters; None where there is none. scale: of `font`, pixels per em."""
    side = round(4 * scale)
    inks = (_on_black(font, side, (side / 2, side / 2), char).getbbox() for char in characters)
    boxes = [box for box in inks if box is not None]
    if not boxes:
        return None
    left, top, right, bottom = (np.array(boxes, np.float64).T - side / 2) / scale
    x, y = float(np.median(left + right)) / 2, float(np.median(top + bottom)) / 2
    reach = np.max([x - left, right - x, y - top, bottom - y], axis=0)
    return Frame(x, y, float(np.quantile(reach, _WITHIN)))


def _on_black(font: ImageFont.FreeTypeFont, side: int, origin: tuple[float, float], char: str) -> Image.Image:
    """A character drawn on a black square of `side` pixels, its origin at whole pixels. What reaches beyond is cut."""
    drawn = Image.new("L", (side, side))
    try:
        ImageDraw.Draw(drawn).text((round(origin[0]), round(origin[1])), char, fill=255, font=font, anchor="ls")
    except OSError as error:
        if error.errno is not None:
            raise
        return Image.new("L", (side, side))  # FreeType's: a damaged glyph, which has no ink then
    return drawn


class Pictures:
    """The characters of one face as square pictures.

    size  side in pixels
    A character's picture is the same in every set of characters that are asked for.
    """

    def __init__(self, found: Found, size: int) -> None:
        self._path, self._index, self._size = str(found.path), found.index, size
        self._fine = max(_FINEST, -(-_LEAST_DRAWN // size))
        self._has = _characters(found.path, found.index)
        own = [point for point in JIS1 if point in self._has] or sorted(self._has)
        measured = map(chr, own[:: max(1, len(own) // _MEASURED)])
        self._frame = frame_of(self._font(_MEASURED_AT), _MEASURED_AT, measured)
        self._missing: np.ndarray | None = None
        if self._frame is not None:
            self._scale = self._side * (0.5 - _MARGIN) / self._frame.half  # pixels per em
            self._usual = self._font(self._scale)
            self._missing = self._drawn(_NO_CHARACTER)

    @property
    def _side(self) -> int:
        """Of what is drawn, before it is made smaller."""
        return self._size * self._fine

    def _font(self, pixels: float) -> ImageFont.FreeTypeFont:
        # the basic layout: shaping would depend on another library, and ideographs need none
        return ImageFont.truetype(self._path, pixels, index=self._index, layout_engine=ImageFont.Layout.BASIC)

    def __getitem__(self, point: int) -> np.ndarray | None:
        """The picture [S, S] uint8 of a code point.

        None where the face has no such character: not in its table, without ink, or drawn as it draws missing ones.
        """
        if self._frame is None or point not in self._has:
            return None
        picture = self._drawn(chr(point))
        if picture is None or (self._missing is not None and np.array_equal(picture, self._missing)):
            return None
        return picture

    def _drawn(self, char: str) -> np.ndarray | None:
        """[S, S] uint8; None without ink."""
        frame, font, scale, side = self._frame, self._usual, self._scale, self._side
        assert frame is not None
        while True:
            # twice the side, so that ink beyond the square is seen
            drawn = _on_black(font, 2 * side, (side - frame.x * scale, side - frame.y * scale), char)
            ink = drawn.getbbox()
            if ink is None:
                return None
            reach = max(side - ink[0], side - ink[1], ink[2] - side, ink[3] - side)
            if 2 * reach <= side:
                break
            scale *= side / 2 / (reach + 1)  # the pixel more is for the rounding of the origin
            font = self._font(scale)
        square = drawn.crop((side // 2, side // 2, side // 2 + side, side // 2 + side))
        picture = np.asarray(square.reduce(self._fine))
        return picture if picture.any() else None


def _characters(path: Path, index: int) -> frozenset[int]:
    """The code points that a face has a glyph for."""
    for number, font in enumerate(opened(path)):
        if number == index:
            return frozenset(font.getBestCmap() or ())
    raise IndexError(f"{path} has no face {index}")


def pixels_digest(picture: np.ndarray) -> bytes:
    """16 bytes that depend on a picture's pixels [S, S] uint8, and on nothing else."""
    return hashlib.blake2b(picture.tobytes(), digest_size=16).digest()


def pictures_of(found: Found, size: int, points: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(code point, picture [S, S] uint8) of those that the face has."""
    pictures = Pictures(found, size)
    for point in points:
        picture = pictures[point]
        if picture is not None:
            yield point, picture
