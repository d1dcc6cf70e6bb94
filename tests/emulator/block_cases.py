"""Views of images in blocks at sizes that hurt, to the bit, against block_oracle.py; cases as in cases.py.

Any bytes are an image in blocks: they are drawn at random.
"""

from __future__ import annotations

import functools
import zlib
from types import ModuleType
from typing import Any

import block_oracle as oracle
import numpy as np
from emulator.cases import BF16, F16, F32, Array, Case, DType

COLUMNS = (
    "file", "offset", "length", "checksum", "height", "width", "top", "left", "crop_h", "crop_w", "resized_h",
    "resized_w", "flip",
)  # fmt: skip
U8 = DType("u8", np.uint8, np.uint8, 0, 0, 0)
TYPES = ("u8", "f32", "bf16", "f16")  # in the order of Pixels
SHIFT, SCALE = (123.675, 116.28, 103.53), (0.0171, 0.0175, -0.0174)
PLACE = (1, 0, 8)  # which of the files has the image, its address modulo 8, and where the image lies in it
BIG = 1 << 62

Row = dict[str, int]


def image_of(h: int, w: int, bits: tuple[int, int]) -> Array:
    """The bytes of an image: any end points and indices, in any order."""
    random = np.random.default_rng(zlib.crc32(f"{h} {w} {bits}".encode()))
    chroma, data = -(-h // 8) * -(-w // 8), []
    for blocks, of_plane in ((4 * chroma, bits[0]), (chroma, bits[1]), (chroma, bits[1])):
        if of_plane == 4:
            ends = random.integers(0, 256, 2 * blocks, np.uint8)
            data += [ends, np.zeros(-len(ends) % 8, np.uint8)]
        data.append(random.integers(0, 256, 8 * blocks, np.uint8))
    return np.concatenate(data)


def crop(h: int, w: int, at: tuple[int, int, int, int], flip: int = 0, **changed: int) -> Row:
    row = dict.fromkeys(COLUMNS, 0) | {"height": h, "width": w, "flip": flip}
    return row | dict(zip(("top", "left", "crop_h", "crop_w"), at, strict=True)) | changed


def cut(h: int, w: int, side: int, resized: tuple[int, int], at: tuple[int, int], flip: int = 0) -> Row:
    return crop(h, w, (*at, side, side), flip, resized_h=resized[0], resized_w=resized[1])


def expected(levels: Array, t: DType) -> Array:
    if t is U8:
        return levels
    value = (levels.astype(np.float32) - np.float32(SHIFT)) * np.float32(SCALE)
    return t.encode(value) if t is BF16 else value.astype(t.storage)


def block_views(
    kernels: ModuleType,
    t: DType,
    h: int,
    w: int,
    side: int,
    bits: tuple[int, int],
    rows: list[Row],
    wrong: list[Row],
    place: tuple[int, int, int],
) -> list[Array]:
    """rows: of one image; wrong: what is changed in each of further rows, which do not fit."""
    data = image_of(h, w, bits)
    which, remainder, offset = place
    space = np.zeros(len(data) // 8 + 8, np.uint64).view(np.uint8)  # begins at a multiple of 8
    file = space[remainder : remainder + offset + len(data)]
    file[offset:] = data
    files = [np.zeros(3, np.uint64), file] if which == 1 else [file, np.zeros(3, np.uint64)]
    rows = [row | {"file": which, "offset": offset, "length": len(data)} for row in rows]
    every = [*rows, *(rows[0] | row for row in wrong)]
    B = len(every)
    out = np.full((B, side, side, 3), 77, t.storage)
    status = np.full(B, 9, np.uint8)
    kernels.block_views(
        files=files,
        rows=np.array([[row[name] for name in COLUMNS] for row in every], np.int64),
        luma_bits=bits[0],
        chroma_bits=bits[1],
        type=TYPES.index(t.name),
        **{f"{name}{k}": values[k] for name, values in (("shift", SHIFT), ("scale", SCALE)) for k in range(3)},
        out=out,
        status=status,
        B=B,
        S=side,
    )
    assert status.tolist() == [0] * len(rows) + [1] * len(wrong), f"status is {status.tolist()}"
    for row, got in zip(rows, out, strict=False):
        want = expected(oracle.view(data, row, *bits, side), t)
        if not np.array_equal(got, want):
            i = tuple(int(k) for k in np.argwhere(got != want)[0])
            count = int((got != want).sum())
            raise AssertionError(f"{row}: view{list(i)} is {got[i]}, wanted {want[i]}; {count} of {got.size} differ")
    assert not out[len(rows) :].any(), "a view of a row that does not fit is not all zeros"
    return [out, status]


def wrong_rows(h: int, w: int, side: int, bits: tuple[int, int]) -> list[Row]:
    """What makes a row of all of the image, at byte 8 of the second file, which it fills, one that does not fit."""
    cropped = {"crop_h": side, "crop_w": side, "resized_h": side, "resized_w": side}
    far = 1 << 28
    return [
        {"file": 2}, {"file": -1}, {"file": BIG}, {"offset": 16}, {"offset": 0, "file": 0}, {"offset": -8},
        {"offset": 4}, {"offset": BIG}, {"length": len(image_of(h, w, bits)) - 8}, {"height": 0}, {"width": 0},
        {"height": 65536}, {"width": 65536}, {"width": BIG}, {"top": -1}, {"left": -1}, {"top": 1}, {"left": 1},
        {"left": BIG}, {"crop_h": 0}, {"crop_w": 0}, {"crop_h": h + 1}, {"crop_w": w + 1}, {"crop_h": BIG},
        {"crop_h": 0, "height": 0, "length": 0}, {"crop_w": 0, "width": 0, "length": 0},
        {"flip": 2}, {"flip": -1}, {"resized_h": side}, {"resized_w": side},
        cropped | {"resized_h": 0}, cropped | {"resized_w": 0}, cropped | {"resized_w": -1},
        cropped | {"resized_h": far + 1}, cropped | {"resized_w": far + 1}, cropped | {"crop_h": side + 1},
        cropped | {"crop_w": side - 1}, cropped | {"top": far + 1}, cropped | {"top": -far - 1},
        cropped | {"left": far + 1}, cropped | {"left": -far - 1}, cropped | {"left": BIG},
    ]  # fmt: skip


def all_cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    three, four = (3, 3), (4, 4)

    def add(
        t: DType, h: int, w: int, side: int, bits: tuple[int, int], *rows: Row, wrong: Any = (), place=PLACE, what: str
    ) -> None:
        label = f"block_views {t.name} {h} {w} {side} bits={bits[0]},{bits[1]} {what}"
        assert label not in found
        found[label] = functools.partial(
            block_views, t=t, h=h, w=w, side=side, bits=bits, rows=list(rows), wrong=list(wrong), place=place
        )

    far = 1 << 28
    for bits in (three, four, (4, 3), (3, 4)):
        add(U8, 1, 1, 1, bits, crop(1, 1, (0, 0, 1, 1)), what="one pixel")
        h, w = 19, 13
        add(U8, h, w, 7, bits, crop(h, w, (3, 2, 9, 11)), crop(h, w, (0, 0, h, w), 1), crop(h, w, (18, 12, 1, 1)),
            crop(h, w, (5, 1, 1, 12), 1), crop(h, w, (3, 7, 15, 1)), crop(h, w, (17, 11, 2, 2), 1),
            what="crops")  # fmt: skip
    add(U8, 2, 3, 5, four, cut(2, 3, 5, (1, 2), (-2, -1)), cut(2, 3, 5, (2, 1), (-1, -2)),
        cut(2, 3, 5, (9, 20), (-3, 16), 1), cut(2, 3, 5, (9, 20), (-5, 0)), cut(2, 3, 5, (9, 20), (9, 0)),
        cut(2, 3, 5, (9, 20), (0, -5)),
        cut(2, 3, 5, (9, 20), (0, 20), 1), cut(2, 3, 5, (9, 20), (5, 15)), cut(2, 3, 5, (far, far), (-far, far), 1),
        cut(2, 3, 5, (far, far), (far, -far)), cut(2, 3, 5, (far, far), (far - 3, far - 2), 1),
        what="outside")  # fmt: skip
    # more tiles than one: taps of every number, none of the image in some
    add(U8, 40, 61, 35, three, crop(40, 61, (1, 3, 37, 50), 1), cut(40, 61, 35, (39, 33), (3, -1)), what="tiles")
    add(U8, 16, 9, 67, four, cut(16, 9, 67, (30, 60), (-33, 20), 1), what="black tiles")
    for side in (32, 33):  # the most samples that a tile can have, and one more
        for h, w in ((4 * side, 4 * side), (4 * side + 1, side), (side, 4 * side + 1)):
            row = crop(h, w, (0, 0, h, w), side % 2)
            if max(h, w) <= 4 * side or side == 32:
                add(U8, h, w, side, three if side == 32 else four, row, what="most")
    add(U8, 139, 139, 33, four, crop(139, 139, (7, 7, 132, 132)), what="most at an odd place")
    add(U8, 1, 300, 7, three, crop(1, 300, (0, 0, 1, 300), 1), what="many")
    add(U8, 61, 70, 3, four, crop(61, 70, (1, 3, 59, 66), 1), cut(61, 70, 3, (5, 6), (-1, 4)),
        cut(61, 70, 3, (5, 6), (3, -2), 1), what="many")  # fmt: skip
    for t in (F32, BF16, F16):
        add(t, 20, 30, 9, (4, 3), crop(20, 30, (2, 3, 9, 11)), cut(20, 30, 9, (10, 15), (3, -4), 1), what="crops")
        add(t, 20, 70, 3, three, crop(20, 70, (0, 0, 20, 70)), wrong=[{"file": 7}], what="many")
    for place in ((0, 0, 0), (0, 2, 6), (1, 4, 4)):
        add(U8, 9, 17, 3, four, crop(9, 17, (1, 2, 5, 6)), place=place, what=f"place={place}")
    for h, w in ((65535, 1), (1, 65535)):
        add(U8, h, w, 2, three, crop(h, w, (h - 1, w - 1, 1, 1)), crop(h, w, (h // 2, w // 2, 1, 1)), what="longest")
    h = w = side = 5
    add(U8, h, w, side, three, crop(h, w, (0, 0, h, w)), wrong=wrong_rows(h, w, side, three), what="wrong")
    return found


CASES = all_cases()
