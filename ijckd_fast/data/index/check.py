"""Whether one image can be trained on: what Pillow and DALI decode to the same pixels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image

from ijckd_fast.data.sources import Place

# What Pillow and DALI decode to the same RGB pixels. Pillow also opens GIF and AVIF, which DALI's decoder refuses, and
# float, 32-bit and LAB pixels, which the two convert differently.
_FORMATS = frozenset({"JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM"})
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L"})
_ORIENTATION = 274  # EXIF's tag. Pillow rotates TIFFs by it (and no other format), DALI is asked not to


class Verdict(NamedTuple):
    """What a look at one image says; see kept.FACTS."""

    width: int
    height: int
    format: str  # '' where Pillow cannot say
    orientation: int
    reason: str  # '' = good
    full: bool  # what verify='full' would say, not only what the header says


def check_image(place: Place, full: bool) -> Verdict:
    """Whether one image can be trained on.

    full     decode every pixel; otherwise only when header and trailer are not those of an intact JPEG
    raises   OSError with an errno when it could not be read at all (missing, no permission, I/O error)
    """
    empty = False
    try:
        with place.open() as file:
            empty = file.seek(0, os.SEEK_END) == 0
            file.seek(0)
            return _check_open_image(file, full)
    except OSError as error:
        if error.errno is not None:
            raise
        return Verdict(0, 0, "", 1, _reason(place.path, error, empty), True)
    except Exception as error:  # Pillow's parsers raise nearly anything on damaged input, and that is the verdict
        return Verdict(0, 0, "", 1, _reason(place.path, error, empty), True)


def _check_open_image(file: BinaryIO, full: bool) -> Verdict:
    with Image.open(file) as image:
        kind = image.format or ""
        orientation = _orientation(image)
        seen = Verdict(*image.size, kind, orientation, "", True)
        if kind not in _FORMATS:
            return seen._replace(reason=f"a {kind} image, which DALI cannot decode")
        if image.mode not in _MODES:
            return seen._replace(reason=f"pixels of Pillow mode {image.mode}, not 8 or 16 bits per channel")
        if kind == "TIFF" and orientation != 1:
            return seen._replace(reason="a TIFF with an orientation tag, which libraries read differently")
        decode = full or not (kind == "JPEG" and _ends_like_jpeg(file))
        if decode:
            image.load()
        return seen._replace(full=decode)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8, as far as the header holds it; 1 where there is none, or none that means anything."""
    if image.format != "TIFF" and "exif" not in image.info:
        return 1
    try:
        tag = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata around an intact image, which is as good as any
        return 1
    return tag if tag in range(1, 9) else 1


def _ends_like_jpeg(file: BinaryIO) -> bool:
    file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
    return b"\xff\xd9" in file.read()


def _reason(path: str, error: Exception, empty: bool) -> str:
    if empty:
        return "empty file (0 bytes)"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image (its content is of no known image format)"
    return f"{type(error).__name__}: {error}".replace(path, Path(path).name)
