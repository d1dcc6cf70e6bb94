"""Odd images, as bytes: what Pillow writes of each format, and what others write, made by hand."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 56
_y, _x = np.mgrid[:HEIGHT, :WIDTH]
RGB = np.stack([_x * 4, _y * 5, _x + _y], -1).astype(np.uint8)  # [48, 56, 3], smooth
GRAY = RGB[..., 0]
ALPHA = (255 - _y * 5).astype(np.uint8)  # from opaque to clear: what hides below it counts as RGB
DEEP = (GRAY.astype(np.uint16) << 8) + RGB[..., 1]  # [48, 56] 16 bits


def picture(mode: str) -> Image.Image:
    """The picture in one of Pillow's modes, with an alpha that hides colours where the mode has one."""
    image = Image.fromarray(RGB)
    if mode in ("RGBA", "LA"):
        image = image.convert(mode[:-1])
        image.putalpha(Image.fromarray(ALPHA))
        return image
    if mode == "I;16":
        return Image.fromarray(DEEP)
    if mode in ("P", "PA"):
        image = image.quantize(16)
        return image.convert("PA") if mode == "PA" else image
    return image.convert(mode)


def saved(format: str, mode: str = "RGB", **options: Any) -> Callable[[], bytes]:
    """What Pillow writes."""

    def make() -> bytes:
        file = io.BytesIO()
        picture(mode).save(file, format, **options)
        return file.getvalue()

    return make


# --- JPEG -------------------------------------------------------------------------------------------------------------


def segments(jpeg: bytes) -> Iterable[tuple[int, int, int]]:
    """(marker, first byte, end) of each segment up to the scan."""
    at = 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + struct.unpack(">H", jpeg[at + 2 : at + 4])[0]
        yield jpeg[at + 1], at, end
        at = end


def without(jpeg: bytes, marker: int) -> bytes:
    """The same without its segments of one kind."""
    for kind, first, end in reversed(list(segments(jpeg))):
        if kind == marker:
            jpeg = jpeg[:first] + jpeg[end:]
    return jpeg


def adobe(jpeg: bytes, transform: int | None) -> bytes:
    """The same with an Adobe segment of this transform, or with none."""
    bare = without(without(jpeg, 0xEE), 0xE0)
    if transform is None:
        return bare
    return bare[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform]) + bare[2:]


def component_ids(jpeg: bytes, ids: bytes) -> bytes:
    """The same with other names of its components, in frame and scan."""
    changed = bytearray(jpeg)
    for kind, first, _ in segments(jpeg):
        if kind in (0xC0, 0xC1, 0xC2):
            for k, name in enumerate(ids):
                changed[first + 10 + 3 * k] = name
    scan = jpeg.index(b"\xff\xda")
    for k, name in enumerate(ids):
        changed[scan + 5 + 2 * k] = name
    return bytes(changed)


def in_frame(jpeg: bytes, at: int, value: int, *, step: int = 0, marker: int | None = None) -> bytes:
    """The same with a byte of its frame's segment changed, or one of each component; marker: of another kind."""
    changed = bytearray(jpeg)
    for kind, first, _ in segments(jpeg):
        if kind in (0xC0, 0xC2):
            changed[first + 1] = kind if marker is None else marker
            for k in range(jpeg[first + 9] if step else 1):
                changed[first + at + k * step] = value
    return bytes(changed)


def jpeg(change: Callable[[bytes], bytes] = bytes, mode: str = "RGB", **options: Any) -> Callable[[], bytes]:
    """What Pillow writes, changed."""
    return lambda: change(saved("JPEG", mode, quality=92, **options)())


def cut_short(jpeg: bytes) -> bytes:
    """The last third of the scan is missing, the end mark is not."""
    scan = jpeg.index(b"\xff\xda")
    return jpeg[: scan + (len(jpeg) - scan) * 2 // 3] + b"\xff\xd9"


JPEGS: dict[str, Callable[[], bytes]] = {
    "JPEG, 4:2:0": jpeg(),
    "JPEG, 4:4:4": jpeg(subsampling=0),
    "JPEG, 4:2:2": jpeg(subsampling=1),
    "JPEG, 4:1:1": jpeg(lambda b: in_frame(b, 11, 0x41)),
    "JPEG, 4:4:0": jpeg(lambda b: in_frame(b, 11, 0x12)),
    "JPEG, all components 2x2": jpeg(lambda b: in_frame(b, 11, 0x22, step=3), subsampling=0),
    "JPEG, gray 2x2": jpeg(lambda b: in_frame(b, 11, 0x22), "L"),
    "JPEG, extended": jpeg(lambda b: in_frame(b, 4, 8, marker=0xC1)),
    "JPEG, 12 bit": jpeg(lambda b: in_frame(b, 4, 12, marker=0xC1)),
    "JPEG, arithmetic coding": jpeg(lambda b: in_frame(b, 4, 8, marker=0xC9)),
    "JPEG, lossless": jpeg(lambda b: in_frame(b, 4, 8, marker=0xC3)),
    "JPEG, height 0": jpeg(lambda b: in_frame(b, 6, 0)),
    "JPEG, progressive": jpeg(progressive=True),
    "JPEG, restart marks": jpeg(restart_marker_blocks=2),
    "JPEG, optimised": jpeg(optimize=True),
    "JPEG, coarse quantisation": jpeg(qtables=[[99] * 64, [99] * 64]),
    "JPEG, gray": jpeg(mode="L"),
    "JPEG, gray with an Adobe mark": jpeg(lambda b: adobe(b, 0), "L"),
    "JPEG, no JFIF mark": jpeg(lambda b: without(b, 0xE0)),
    "JPEG, Adobe mark, YCbCr": jpeg(lambda b: adobe(b, 1)),
    "JPEG, Adobe mark, RGB": jpeg(keep_rgb=True),
    "JPEG, Adobe mark that says RGB of YCbCr": jpeg(lambda b: adobe(b, 0)),
    "JPEG, JFIF and an Adobe mark that says RGB": jpeg(lambda b: b[:20] + adobe(b, 0)[2:18] + b[20:]),
    "JPEG, Adobe mark of no meaning": jpeg(lambda b: adobe(b, 2)),
    "JPEG, components named R G B": jpeg(lambda b: component_ids(adobe(b, None), b"RGB")),
    "JPEG, components named 0 1 2": jpeg(lambda b: component_ids(adobe(b, None), b"\0\1\2")),
    "JPEG, components named R G B, JFIF": jpeg(lambda b: component_ids(b, b"RGB")),
    "JPEG, CMYK": jpeg(mode="CMYK"),
    "JPEG, CMYK without its Adobe mark": jpeg(lambda b: without(b, 0xEE), "CMYK"),
    "JPEG, YCCK": jpeg(lambda b: adobe(b, 2), "CMYK"),
    "JPEG, four components, Adobe transform 1": jpeg(lambda b: adobe(b, 1), "CMYK"),
    "JPEG, CMYK 4:2:0": jpeg(lambda b: in_frame(in_frame(b, 11, 0x22), 20, 0x22), "CMYK"),
    "JPEG, CMYK, progressive": jpeg(mode="CMYK", progressive=True),
    "JPEG, ICC profile": jpeg(icc_profile=b"no profile at all"),
    "JPEG, EXIF rotation": jpeg(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
    "JPEG, a comment": jpeg(comment="x" * 300),
    "JPEG, scan cut short": jpeg(cut_short),
    "MPO, two frames": saved("MPO", save_all=True, append_images=[picture("L").convert("RGB")]),
}

# --- PNG --------------------------------------------------------------------------------------------------------------

SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by colour type


def chunk(kind: bytes, data: bytes, spoil: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ spoil)


def scanlines(rows: np.ndarray, bits: int) -> bytes:
    """rows [h, n] of samples, as lines without filter."""
    if bits == 16:
        return b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    if bits == 8:
        return b"".join(b"\0" + row.astype(np.uint8).tobytes() for row in rows)
    spread = (rows[..., None] >> np.arange(bits)[::-1]) & 1  # [h, n, bits]
    return b"".join(
        b"\0" + row.tobytes() for row in np.packbits(spread.reshape(len(rows), -1).astype(np.uint8), axis=1)
    )


def png(
    bits: int,
    colour: int,
    samples: np.ndarray,
    before: bytes = b"",
    *,
    interlaced: bool = False,
    after: bytes | None = None,
    spoil: int = 0,
    level: int = 6,
) -> Callable[[], bytes]:
    """samples [h, w] or [h, w, c]; before: chunks between header and pixels; after: chunks at the end."""
    samples = samples.reshape(HEIGHT, WIDTH, -1)

    def make() -> bytes:
        passes = [(0, 0, 1, 1)]
        if interlaced:
            passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
        parts = [samples[y::dy, x::dx] for y, x, dy, dx in passes]
        data = b"".join(scanlines(part.reshape(len(part), -1), bits) for part in parts)
        header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, colour, 0, 0, int(interlaced))
        end = chunk(b"IEND", b"") if after is None else after
        body = zlib.compress(data, level)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", body, spoil) + end

    return make


WIDE = RGB.astype(np.uint16) * 257
PALETTE = chunk(b"PLTE", bytes(range(0, 240, 5)))  # 16 colours
_LA = np.stack([GRAY, ALPHA], -1)
_RGBA = np.concatenate([RGB, ALPHA[..., None]], -1)
PNGS: dict[str, Callable[[], bytes]] = {
    "PNG, gray 1 bit": png(1, 0, GRAY >> 7),
    "PNG, gray 2 bit": png(2, 0, GRAY >> 6),
    "PNG, gray 4 bit": png(4, 0, GRAY >> 4),
    "PNG, gray 8 bit": png(8, 0, GRAY),
    "PNG, gray 16 bit": png(16, 0, DEEP),
    "PNG, gray and alpha": png(8, 4, _LA),
    "PNG, gray and alpha 16 bit": png(16, 4, _LA.astype(np.uint16) * 257 - 99),
    "PNG, RGB": png(8, 2, RGB),
    "PNG, RGB 16 bit": png(16, 2, WIDE - 99),
    "PNG, RGBA": png(8, 6, _RGBA),
    "PNG, RGBA 16 bit": png(16, 6, _RGBA.astype(np.uint16) * 257 - 99),
    "PNG, palette 1 bit": png(1, 3, GRAY >> 7, PALETTE),
    "PNG, palette 4 bit": png(4, 3, GRAY >> 4, PALETTE),
    "PNG, palette 8 bit": png(8, 3, GRAY >> 4, PALETTE),
    "PNG, palette with transparency": png(8, 3, GRAY >> 4, PALETTE + chunk(b"tRNS", bytes(range(0, 160, 10)))),
    "PNG, palette index beyond the palette": png(8, 3, GRAY >> 3, PALETTE),
    "PNG, gray with a transparent value": png(8, 0, GRAY, chunk(b"tRNS", b"\0\x50")),
    "PNG, gray 1 bit with a transparent value": png(1, 0, GRAY >> 7, chunk(b"tRNS", b"\0\0")),
    "PNG, gray 16 bit with a transparent value": png(16, 0, DEEP, chunk(b"tRNS", b"\x50\x50")),
    "PNG, RGB with a transparent colour": png(8, 2, RGB, chunk(b"tRNS", b"\0\0\0\0\0\0")),
    "PNG, interlaced": png(8, 2, RGB, interlaced=True),
    "PNG, interlaced gray 4 bit": png(4, 0, GRAY >> 4, interlaced=True),
    "PNG, gamma": png(8, 2, RGB, chunk(b"gAMA", struct.pack(">I", 100000))),
    "PNG, background": png(8, 6, _RGBA, chunk(b"bKGD", b"\0\xff\0\xff\0\xff")),
    "PNG, significant bits": png(8, 2, RGB & 0xF8, chunk(b"sBIT", b"\5\5\5")),
    "PNG, EXIF rotation": png(8, 2, RGB, chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")),
    "PNG, animated": saved("PNG", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT), "red")]),
    "PNG, no end chunk": png(8, 2, RGB, after=b""),
    "PNG, wrong checksum of the pixels": png(8, 2, RGB, spoil=1),
    "PNG, wrong checksum of the end chunk": png(8, 2, RGB, after=chunk(b"IEND", b"", 1)),
    "PNG, text after the pixels": png(8, 2, RGB, after=chunk(b"tEXt", b"a\0b") + chunk(b"IEND", b"")),
    "PNG, not compressed": png(8, 2, RGB, level=0),
}

# --- PNM --------------------------------------------------------------------------------------------------------------


def pnm(kind: int, maxval: int | None, samples: np.ndarray, ascii_end: str = "\n") -> Callable[[], bytes]:
    """P<kind>: 1 to 3 in text, 4 to 6 in bytes. samples [h, w] or [h, w, 3]."""
    header = f"P{kind}\n{WIDTH} {HEIGHT}\n" + ("" if maxval is None else f"{maxval}\n")
    if kind <= 3:
        return lambda: (header + " ".join(map(str, samples.ravel())) + ascii_end).encode()
    if kind == 4:
        return lambda: header.encode() + np.packbits(samples, axis=1).tobytes()
    assert maxval is not None
    return lambda: header.encode() + samples.astype(">u2" if maxval > 255 else "u1").tobytes()


PNMS: dict[str, Callable[[], bytes]] = {
    "PPM": pnm(6, 255, RGB),
    "PPM, 100 levels": pnm(6, 100, RGB // 3),
    "PPM, 15 levels": pnm(6, 15, RGB // 16),
    "PPM, 16 bit": pnm(6, 65535, WIDE - 99),
    "PPM, 1023 levels": pnm(6, 1023, WIDE >> 6),
    "PPM in text": pnm(3, 255, RGB),
    "PPM in text, no newline at the end": pnm(3, 255, RGB, ""),
    "PPM in text, 100 levels": pnm(3, 100, RGB // 3),
    "PPM, a comment in its header": lambda: pnm(6, 255, RGB)().replace(b"P6\n", b"P6\n# by hand\n"),
    "PGM": pnm(5, 255, GRAY),
    "PGM, 15 levels": pnm(5, 15, GRAY // 16),
    "PGM, 16 bit": pnm(5, 65535, DEEP),
    "PGM in text": pnm(2, 255, GRAY),
    "PBM": pnm(4, None, GRAY >> 7),
    "PBM in text": pnm(1, None, GRAY >> 7),
}

# --- BMP --------------------------------------------------------------------------------------------------------------


def bmp(
    bits: int,
    rows: np.ndarray,
    *,
    palette: bytes = b"",
    masks: bytes = b"",
    compression: int = 0,
    header: int = 40,
    top_down: bool = False,
    data: bytes | None = None,
) -> Callable[[], bytes]:
    """rows: the lines from the top, each the bytes of one, not yet padded to four; data: compressed instead."""

    def make() -> bytes:
        lines = [row.tobytes() + bytes(-len(row.tobytes()) % 4) for row in rows]
        pixels = b"".join(lines if top_down else lines[::-1]) if data is None else data
        used = len(palette) // 4
        height = -HEIGHT if top_down else HEIGHT
        info = struct.pack("<IiiHHIIiiII", header, WIDTH, height, 1, bits, compression, len(pixels), 0, 0, used, 0)
        info += (masks + bytes(header))[: header - 40] if header > 40 else masks
        start = 14 + len(info) + len(palette)
        return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + info + palette + pixels

    return make


def runs(bits: int, rows: np.ndarray) -> bytes:
    """Run lengths of one pixel pair or pixel each, from the bottom."""
    lines = [b"".join(bytes([2 if bits == 4 else 1, value]) for value in row.tolist()) for row in rows[::-1]]
    return b"\0\0".join(lines) + b"\0\1"


_p = RGB.astype(np.uint16)
_555 = ((_p[..., 0] >> 3 << 10) | (_p[..., 1] >> 3 << 5) | (_p[..., 2] >> 3)).astype("<u2")
_565 = ((_p[..., 0] >> 3 << 11) | (_p[..., 1] >> 2 << 5) | (_p[..., 2] >> 3)).astype("<u2")
_BGRA = np.concatenate([RGB[..., ::-1], ALPHA[..., None]], -1)
_RGBX = np.concatenate([RGB, ALPHA[..., None]], -1)
_COLOURS = b"".join(bytes([5 * k, 9 * k, 15 * k, 0]) for k in range(16))
_GRAYS = b"".join(bytes([k, k, k, 0]) for k in range(256))
_nibbles = ((GRAY >> 4)[:, ::2] << 4) | (GRAY >> 4)[:, 1::2]
BMPS: dict[str, Callable[[], bytes]] = {
    "BMP, 24 bit": bmp(24, RGB[..., ::-1]),
    "BMP, 24 bit, top line first": bmp(24, RGB[..., ::-1], top_down=True),
    "BMP, 1 bit": bmp(1, np.packbits(GRAY >> 7, axis=1), palette=_COLOURS[:8]),
    "BMP, 4 bit": bmp(4, _nibbles, palette=_COLOURS),
    "BMP, 8 bit colours": bmp(8, GRAY >> 4, palette=_COLOURS),
    "BMP, 8 bit grays": bmp(8, GRAY, palette=_GRAYS),
    "BMP, 8 bit runs": bmp(8, RGB, palette=_COLOURS, compression=1, data=runs(8, GRAY >> 4)),
    "BMP, 4 bit runs": bmp(4, RGB, palette=_COLOURS, compression=2, data=runs(4, _nibbles)),
    "BMP, 16 bit 555": bmp(16, _555),
    "BMP, 16 bit 555 by masks": bmp(16, _555, masks=struct.pack("<III", 0x7C00, 0x3E0, 0x1F), compression=3),
    "BMP, 16 bit 565 by masks": bmp(16, _565, masks=struct.pack("<III", 0xF800, 0x7E0, 0x1F), compression=3),
    "BMP, 32 bit": bmp(32, _BGRA),
    "BMP, 32 bit by masks": bmp(32, _RGBX, masks=struct.pack("<III", 0xFF, 0xFF00, 0xFF0000), compression=3),
    "BMP, 32 bit with alpha": bmp(
        32, _BGRA, masks=struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000), compression=3, header=108
    ),
    "BMP, saved by Pillow from RGBA": saved("BMP", "RGBA"),
    "BMP, saved by Pillow in gray": saved("BMP", "L"),
    "BMP, saved by Pillow in 1 bit": saved("BMP", "1"),
}

# --- WebP -------------------------------------------------------------------------------------------------------------

WEBPS: dict[str, Callable[[], bytes]] = {
    "WebP": saved("WEBP"),
    "WebP, lossless": saved("WEBP", lossless=True),
    "WebP, alpha": saved("WEBP", "RGBA"),
    "WebP, alpha lossless": saved("WEBP", "RGBA", lossless=True, exact=True),
    "WebP, animated": saved("WEBP", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT), "red")]),
    "WebP, EXIF rotation": saved("WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
}

# --- TIFF -------------------------------------------------------------------------------------------------------------


def tiff(
    data: bytes,
    bits: tuple[int, ...],
    photometric: int,
    *,
    more: dict[int, list[int]] | None = None,
    order: str = "<",
    planes: int = 1,
) -> Callable[[], bytes]:
    """One strip (a strip for each plane) of `data`; more: other tags, values of 16 bits."""

    def make() -> bytes:
        strip = len(data) // planes
        tags = {
            256: (3, [WIDTH]), 257: (3, [HEIGHT]), 258: (3, list(bits)), 259: (3, [1]), 262: (3, [photometric]),
            273: (4, [8 + strip * k for k in range(planes)]), 277: (3, [len(bits)]), 278: (3, [HEIGHT]),
            279: (4, [strip] * planes), 284: (3, [2 if planes > 1 else 1]),
        }  # fmt: skip
        tags |= {tag: (3, values) for tag, values in (more or {}).items()}
        start = 8 + len(data) + len(data) % 2
        outside = start + 2 + 12 * len(tags) + 4
        entries, tail = b"", b""
        for tag, (kind, values) in sorted(tags.items()):
            packed = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
            if len(packed) > 4:
                tail, packed = tail + packed, struct.pack(f"{order}I", outside + len(tail))
            entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
        head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start)
        directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
        return head + data + bytes(len(data) % 2) + directory + tail

    return make


_G, _R = GRAY.tobytes(), RGB.tobytes()
_pairs = (DEEP >> 4).reshape(-1, 2)  # two pixels of 12 bits in three bytes
_low = (_pairs[:, 0] & 15) << 4 | _pairs[:, 1] >> 8
_twelve = np.stack([_pairs[:, 0] >> 4, _low, _pairs[:, 1] & 255], -1).astype(np.uint8)
_PLANES = RGB.transpose(2, 0, 1).tobytes()
_RAMP = [257 * ((k * s) % 256) for s in (3, 5, 7) for k in range(256)]
_PREMULTIPLIED = np.concatenate([(RGB * (ALPHA[..., None] / 255)).astype(np.uint8), ALPHA[..., None]], -1).tobytes()
TIFFS: dict[str, Callable[[], bytes]] = {
    **{
        f"TIFF, {mode}": saved("TIFF", mode)
        for mode in ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "LAB", "I", "F"]
    },
    **{
        f"TIFF, RGB, {c}": saved("TIFF", compression=c)
        for c in ["tiff_lzw", "tiff_deflate", "packbits", "jpeg", "zstd", "lzma"]
    },
    **{f"TIFF, 1, {c}": saved("TIFF", "1", compression=c) for c in ["group3", "group4", "tiff_ccitt", "packbits"]},
    **{f"TIFF, L, {c}": saved("TIFF", "L", compression=c) for c in ["tiff_lzw", "jpeg", "packbits"]},
    **{
        f"TIFF, {mode}, tiff_lzw": saved("TIFF", mode, compression="tiff_lzw")
        for mode in ["RGBA", "LA", "CMYK", "P", "I;16", "YCbCr"]
    },
    "TIFF, LZW with a predictor": saved("TIFF", compression="tiff_lzw", tiffinfo={317: 2}),
    "TIFF, two frames": saved("TIFF", save_all=True, append_images=[picture("L")]),
    "TIFF, gray, white is 0": tiff(_G, (8,), 0),
    "TIFF, gray": tiff(_G, (8,), 1),
    "TIFF, gray 1 bit, white is 0": tiff(np.packbits(GRAY >> 7, axis=1).tobytes(), (1,), 0),
    "TIFF, gray 2 bit": tiff(
        np.packbits(np.stack([GRAY >> 7, GRAY >> 6 & 1], -1).reshape(HEIGHT, -1)).tobytes(), (2,), 1
    ),
    "TIFF, gray 4 bit": tiff(_nibbles.tobytes(), (4,), 1),
    "TIFF, gray 12 bit": tiff(_twelve.tobytes(), (12,), 1),
    "TIFF, gray 16 bit": tiff(DEEP.astype("<u2").tobytes(), (16,), 1),
    "TIFF, gray 16 bit, big-endian": tiff(DEEP.astype(">u2").tobytes(), (16,), 1, order=">"),
    "TIFF, gray 16 bit, white is 0": tiff(DEEP.astype("<u2").tobytes(), (16,), 0),
    "TIFF, gray 16 bit, signed": tiff(DEEP.astype("<u2").tobytes(), (16,), 1, more={339: [2]}),
    "TIFF, gray and alpha": tiff(_LA.tobytes(), (8, 8), 1, more={338: [2]}),
    "TIFF, gray and unspecified": tiff(_LA.tobytes(), (8, 8), 1, more={338: [0]}),
    "TIFF, gray and alpha, premultiplied": tiff(_LA.tobytes(), (8, 8), 1, more={338: [1]}),
    "TIFF by hand, RGB": tiff(_R, (8, 8, 8), 2),
    "TIFF, RGB, big-endian": tiff(_R, (8, 8, 8), 2, order=">"),
    "TIFF, RGB in planes": tiff(_PLANES, (8, 8, 8), 2, planes=3),
    "TIFF, RGB 16 bit": tiff((WIDE - 99).astype("<u2").tobytes(), (16,) * 3, 2),
    "TIFF, RGB and unspecified": tiff(_RGBA.tobytes(), (8,) * 4, 2, more={338: [0]}),
    "TIFF, RGB and alpha": tiff(_RGBA.tobytes(), (8,) * 4, 2, more={338: [2]}),
    "TIFF, RGB and alpha, premultiplied": tiff(_PREMULTIPLIED, (8,) * 4, 2, more={338: [1]}),
    "TIFF, RGB and a fourth without a tag": tiff(_RGBA.tobytes(), (8,) * 4, 2),
    "TIFF, RGB and two more": tiff(np.dstack([_RGBA, ALPHA]).tobytes(), (8,) * 5, 2, more={338: [0, 0]}),
    "TIFF, RGBA 16 bit": tiff((_RGBA.astype(np.uint16) * 257).astype("<u2").tobytes(), (16,) * 4, 2, more={338: [2]}),
    "TIFF, palette": tiff((GRAY >> 2).tobytes(), (8,), 3, more={320: _RAMP}),
    "TIFF, palette of 8 bits": tiff((GRAY >> 2).tobytes(), (8,), 3, more={320: [v >> 8 for v in _RAMP]}),
    "TIFF, palette 4 bit": tiff(
        _nibbles.tobytes(), (4,), 3, more={320: [v for k in range(3) for v in _RAMP[256 * k : 256 * k + 16]]}
    ),
    "TIFF by hand, CMYK": tiff(_RGBA.tobytes(), (8,) * 4, 5),
    "TIFF, CMYK in planes": tiff(np.concatenate([_RGBA.transpose(2, 0, 1)]).tobytes(), (8,) * 4, 5, planes=4),
    "TIFF, CMYK and alpha": tiff(np.dstack([_RGBA, ALPHA]).tobytes(), (8,) * 5, 5, more={338: [0]}),
    "TIFF by hand, YCbCr": tiff(_R, (8, 8, 8), 6, more={530: [1, 1]}),
    "TIFF, Lab": tiff(_R, (8, 8, 8), 8),
    "TIFF, bits in reverse": tiff(
        np.packbits(GRAY >> 7, axis=1, bitorder="little").tobytes(), (1,), 1, more={266: [2]}
    ),
}

# --- others -----------------------------------------------------------------------------------------------------------

OTHERS: dict[str, Callable[[], bytes]] = {
    "GIF": saved("GIF", "P"),
    "AVIF": saved("AVIF"),
    "JPEG 2000": saved("JPEG2000"),
    "TGA": saved("TGA"),
    "ICO": saved("ICO", sizes=[(32, 32)]),
    "QOI": saved("QOI"),
}

VARIANTS: dict[str, Callable[[], bytes]] = {**JPEGS, **PNGS, **PNMS, **BMPS, **WEBPS, **TIFFS, **OTHERS}
"""Each under the name that docs/data.md's table has for it."""
