"""Which variant of its format an image file is: plain, or odd, which libraries may read each in its own way.

Plain is what DALI's decoder and Pillow's were never seen to read differently, however much of it was changed at random
(docs/data.md): JPEGs of 8 bits in YCbCr or gray, PNGs of 8 bits in RGB or gray, both with the usual headers only. All
else is odd, and DALI is asked.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from typing import Any, BinaryIO

from PIL import Image

PLAIN = ""

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG's SOF markers; the others are tables
_SCAN, _APP0, _APP2, _ADOBE = 0xDA, 0xE0, 0xE2, 0xEE
_KNOWN = _FRAMES | {0xC4, 0xDB, 0xDD, 0xFE} | set(range(0xE0, 0xF0))  # tables, comment, applications'
_CODING = {0xC0: "", 0xC1: ", extended", 0xC2: ", progressive", 0xC9: ", arithmetic", 0xCA: ", arithmetic"}
_USUAL_SAMPLING = frozenset({0x11, 0x21, 0x12, 0x22})  # of the luma, where each chroma has 0x11

_PNG_COLOURS = {0: "gray", 2: "RGB", 3: "palette", 4: "gray and alpha", 6: "RGBA"}
_PNG_USUAL = frozenset(
    {b"IHDR", b"IDAT", b"IEND", b"pHYs", b"tEXt", b"zTXt", b"iTXt", b"tIME", b"sRGB", b"gAMA", b"cHRM"}
)  # chunks that change no pixel
_PNG_HEADER = struct.Struct(">IIBBBBB")


def variant_of(image: Image.Image, file: BinaryIO) -> str:
    """What kind of image an open file is: PLAIN, or a few words. The file is left where it stood."""
    here = file.tell()
    try:
        if image.format == "JPEG":
            file.seek(2)
            return _jpeg(file)
        if image.format == "PNG":
            file.seek(8)
            return _png(file)
        file.seek(0)
        return _other(image, file.read(34))
    finally:
        file.seek(here)


def _jpeg(file: BinaryIO) -> str:
    """From the segments before the first scan."""
    frame, jfif, adobe, clean = b"", False, None, True
    coding = 0
    while True:
        head = file.read(4)
        if len(head) < 4 or head[0] != 0xFF or (head[1] not in _KNOWN and head[1] != _SCAN):
            clean = False  # fill bytes, or damage
            break
        marker, size = head[1], int.from_bytes(head[2:], "big") - 2
        if marker == _SCAN:
            break
        if marker in _FRAMES:
            clean &= not frame
            coding, frame = marker, file.read(size)
        elif marker in (_APP0, _APP2, _ADOBE):
            data = file.read(size)
            jfif |= marker == _APP0 and data[:5] == b"JFIF\0"
            clean &= data[:4] != b"MPF\0"  # several images in one file
            if marker == _ADOBE and data[:5] == b"Adobe" and size >= 12:
                adobe = data[11]
        else:
            file.seek(size, os.SEEK_CUR)
    count = frame[5] if len(frame) > 5 else 0
    parts = [frame[6 + 3 * k : 9 + 3 * k] for k in range(count)]  # name, sampling, table
    if not frame or len(frame) != 6 + 3 * count:
        return "JPEG, unusual header"
    names, sampling = bytes(part[0] for part in parts), bytes(part[1] for part in parts)
    usual = sampling == b"\x11" if count == 1 else sampling[0] in _USUAL_SAMPLING and sampling[1:] == b"\x11\x11"
    ycbcr = adobe == 1 or (adobe is None and (jfif or names == b"\1\2\3"))
    if (
        clean
        and coding in (0xC0, 0xC2)
        and frame[0] == 8
        and frame[1:3] != b"\0\0"
        and usual
        and (count == 1 or (count == 3 and ycbcr and names in (b"\1\2\3", b"\0\1\2")))
    ):
        return PLAIN
    said = f"JPEG, {count} component{'s' * (count != 1)}{_CODING.get(coding, ', unusual coding')}"
    said += "" if frame[0] == 8 else f", {frame[0]} bit"
    said += "" if usual else ", sampling " + " ".join(f"{s >> 4}x{s & 15}" for s in sampling)
    said += "" if adobe is None else f", Adobe transform {adobe}"
    said += "" if names in (b"\1", b"\1\2\3", b"\1\2\3\4") else f", named {' '.join(map(str, names))}"
    said += "" if jfif or adobe is not None else ", no mark"
    return said if clean else f"{said}, unusual header"


def _png(file: BinaryIO) -> str:
    """From all chunks, and their checksums."""
    header, ended, sound = b"", False, True
    kinds: set[bytes] = set()
    here, end = file.tell(), file.seek(0, os.SEEK_END)
    file.seek(here)
    while not ended:
        head = file.read(8)
        size, kind = int.from_bytes(head[:4], "big"), head[4:]
        if len(head) < 8 or file.tell() + size > end:
            break
        data = file.read(size)
        sound &= zlib.crc32(data, zlib.crc32(kind)).to_bytes(4, "big") == file.read(4)
        kinds.add(kind)
        header = header or data
        ended = kind == b"IEND"
    if len(header) != _PNG_HEADER.size:
        return "PNG, unusual header"
    _, _, bits, colour, _, _, interlaced = _PNG_HEADER.unpack(header)
    whole = ended and sound and not file.read(1)
    if whole and bits == 8 and colour in (0, 2) and not interlaced and kinds <= _PNG_USUAL:
        return PLAIN
    said = f"PNG, {_PNG_COLOURS.get(colour, 'unusual colours')} {bits} bit"
    said += ", interlaced" if interlaced else ""
    said += ", transparency" if b"tRNS" in kinds else ""
    said += ", animated" if b"acTL" in kinds else ""
    said += ", more chunks" if kinds - _PNG_USUAL - {b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT"} else ""
    return said if whole else f"{said}, damaged or cut"


def _other(image: Image.Image, head: bytes) -> str:
    """From what Pillow says; head: the first bytes."""
    said = f"{image.format}, {image.mode}"
    if image.format == "PPM":
        kind = head[:2].decode(errors="replace")
        levels = _maxval(getattr(image, "tile", ()))
        return f"{kind}, {image.mode}" + ("" if levels == 255 else f", up to {levels}")
    if image.format == "BMP" and len(head) >= 34:
        bits, compression = struct.unpack_from("<HI", head, 28)
        return f"{said}, {bits} bit" + (f", compression {compression}" if compression else "")
    if image.format == "TIFF":
        return said + _tiff(dict(getattr(image, "tag_v2", {})))
    return said + (", animated" if getattr(image, "n_frames", 1) > 1 else "")


def _maxval(tiles: Sequence[Any]) -> int:
    """Of a PNM, from Pillow's plan for decoding it: (mode, maxval), or the mode alone where that is 255."""
    args = tiles[0].args if tiles else ()
    return args[1] if isinstance(args, tuple) and len(args) > 1 else 255


def _tiff(tags: dict[int, Any]) -> str:
    bits = tags.get(258, (1,))
    said = f", {max(bits if isinstance(bits, tuple) else (bits,))} bit, photometric {tags.get(262, '?')}"
    said += f", compression {tags.get(259, 1)}"
    said += ", in planes" if tags.get(284, 1) == 2 else ""
    said += ", in tiles" if 322 in tags else ""
    extra = tags.get(338, ())
    return said + (f", extra {' '.join(map(str, extra))}" if extra else "")
