"""Whether one image can be trained on, and whose decoder makes its pixels."""

from __future__ import annotations

import os
import zlib
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from ijckd_fast.data.index.ask import AskDali
from ijckd_fast.data.index.rgb import to_rgb
from ijckd_fast.data.index.variants import PLAIN, variant_of
from ijckd_fast.data.sources import Place
from ijckd_fast.errors import UserError, out_of_memory

# Pillow also opens GIF and AVIF, which DALI does not, and float, 32-bit and LAB pixels, which libraries turn into RGB
# in ways of their own.
_FORMATS = frozenset({"JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM"})
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L"})
_NAMES = "JPEG, PNG, BMP, WebP, TIFF and PNM"
_ORIENTATION = 274  # EXIF's tag. Pillow rotates TIFFs by it (and no other format), DALI is asked not to
_BITS = 258  # TIFF's tag


CANNOT_BE_READ = "cannot be read"
"""How a reason begins that is not the file's content: the file is gone, or the disk."""


class By(IntEnum):
    """Who decodes an image where DALI makes the batches."""

    DALI = 0  # it is plain, or DALI's pixels were compared with Pillow's and are the same
    PILLOW_ALONE = 1  # DALI cannot decode it
    PILLOW = 2  # DALI makes other pixels
    UNASKED = 3  # Pillow, until DALI is asked


class Verdict(NamedTuple):
    """What a look at one image says; see kept.FACTS."""

    width: int
    height: int
    format: str  # '' where Pillow cannot say
    orientation: int
    reason: str  # '' = good
    full: bool  # what verify='full' would say, not only what the header says
    variant: str = PLAIN
    by: By = By.DALI
    crc32: int = 0  # of its bytes; 0 where nobody asked
    length: int = 0  # bytes; likewise


def check_image(place: Place, full: bool, dali: AskDali | None = None, checksum: bool = False) -> Verdict:
    """Whether one image can be trained on.

    full     decode every pixel; otherwise only where header and trailer are not those of an intact plain JPEG
    dali     asked about an image of an odd variant; None: nobody is
    checksum whether the CRC-32 of its bytes is asked for, and how many they are
    raises   OSError with an errno when it could not be read at all (missing, no permission, I/O error); UserError of
             its place: it is not this image alone that is at fault
    """
    empty = False
    try:
        with place.open() as file:
            empty = file.seek(0, os.SEEK_END) == 0
            file.seek(0)
            verdict = _check_open_image(file, full, dali)
            if checksum:
                file.seek(0)
                data = file.read()
                verdict = verdict._replace(crc32=zlib.crc32(data), length=len(data))
            return verdict
    except OSError as error:
        if error.errno is not None or out_of_memory(error):
            raise
        return Verdict(0, 0, "", 1, _reason(place.path, error, empty), True)
    except Exception as error:  # Pillow's parsers raise nearly anything on damaged input, and that is the verdict
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        return Verdict(0, 0, "", 1, _reason(place.path, error, empty), True)


def _check_open_image(file: BinaryIO, full: bool, dali: AskDali | None) -> Verdict:
    with Image.open(file) as image:
        kind = image.format or ""
        orientation = _orientation(image)
        seen = Verdict(*image.size, kind, orientation, "", True)
        if kind not in _FORMATS:
            article = "an" if kind[:1] in "AEIO" else "a"
            return seen._replace(reason=f"{article} {kind} image, which is none of {_NAMES}")
        if image.mode not in _MODES:
            return seen._replace(reason=f"pixels of Pillow mode {image.mode}, whose RGB is not settled")
        if kind == "TIFF" and orientation != 1:
            return seen._replace(reason="a TIFF with an orientation tag, which libraries read differently")
        if image.mode.startswith("I;16") and (bits := _bits(image)) != 16:
            return seen._replace(reason=f"a TIFF of {bits} bits per channel, which Pillow takes for 16: nearly black")
        variant = variant_of(image, file)
        seen = seen._replace(variant=variant)
        if variant == PLAIN:
            decode = full or not (kind == "JPEG" and _ends_like_jpeg(file))
            if decode:
                image.load()
            return seen._replace(full=decode)
        rgb = np.asarray(to_rgb(image))  # [h, w, 3]
        if dali is None:
            return seen._replace(by=By.UNASKED)
        file.seek(0)
        return seen._replace(by=_by(dali, file.read(), rgb))


def _by(dali: AskDali, encoded: bytes, rgb: np.ndarray) -> By:
    if not dali.can_be_asked():
        return By.UNASKED
    same = dali.same(encoded, rgb)
    return By.PILLOW_ALONE if same is None else By.DALI if same else By.PILLOW


def _bits(image: Image.Image) -> int:
    """Of a channel of 16-bit gray, as the file has them."""
    if image.format != "TIFF":
        return 16
    bits = getattr(image, "tag_v2", {}).get(_BITS, 16)
    return int(bits[0] if isinstance(bits, tuple) else bits)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8, as far as the header holds it; 1 where there is none, or none that means anything."""
    if image.format != "TIFF" and "exif" not in image.info:
        return 1
    try:
        tag = image.getexif().get(_ORIENTATION, 1)
    except Exception as error:  # damaged metadata around an intact image, which is as good as any
        if out_of_memory(error):
            raise
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
