"""What csrc/blocks.h defines, written again in numpy and Python's integers; and views of decoded planes by Pillow."""

from __future__ import annotations

import numpy as np
from PIL import Image

ROUNDED = 1 << 64


def checksum(data: bytes) -> int:
    padded = data + bytes(-len(data) % 64)
    words = np.frombuffer(padded, "<u4").reshape(-1, 16).astype(object)  # [n, 16]
    a = words.cumsum(0)
    sums, running = (a[-1], a.sum(0)) if len(words) else ([0] * 16, [0] * 16)
    h = len(data)
    for lane in range(16):
        h = (h ^ ((running[lane] + (sums[lane] << 32)) % ROUNDED)) * 0x9E3779B97F4A7C15 % ROUNDED
        h ^= h >> 32
    return h - ROUNDED if h >> 63 else h


def planes_of(rgb: np.ndarray) -> list[np.ndarray]:
    """[h, w, 3] uint8 -> what is encoded: Y [8 n, 8 m], Cb and Cr [4 n, 4 m], int64."""
    h, w = rgb.shape[:2]
    r, g, b = np.moveaxis(np.pad(rgb, ((0, -h % 8), (0, -w % 8), (0, 0)), "edge").astype(np.int64), -1, 0)
    y = (19595 * r + 38470 * g + 7471 * b + 32768) >> 16
    cb = (-11059 * r - 21709 * g + 32768 * b + 128 * 65536 + 32767) >> 16
    cr = (32768 * r - 27439 * g - 5329 * b + 128 * 65536 + 32767) >> 16
    return [y, _halved(cb), _halved(cr)]


def luma_beside(rgb: np.ndarray, cb: np.ndarray, cr: np.ndarray) -> np.ndarray:
    """The luma that is encoded beside planes [4 n, 4 m] as they are decoded: [8 n, 8 m]."""
    h, w = rgb.shape[:2]
    r, g, b = np.moveaxis(np.pad(rgb, ((0, -h % 8), (0, -w % 8), (0, 0)), "edge").astype(np.int64), -1, 0)
    full_cb = (-11059 * r - 21709 * g + 32768 * b + 128 * 65536 + 32767) >> 16
    full_cr = (32768 * r - 27439 * g - 5329 * b + 128 * 65536 + 32767) >> 16
    u, v = _doubled(cb) - 16 * full_cb, _doubled(cr) - 16 * full_cr
    return np.clip(planes_of(rgb)[0] - (1462 * u + 704 * v + 32768) // 65536, 0, 255)


def _doubled(half: np.ndarray) -> np.ndarray:
    """[n, m] -> [2 n, 2 m], times 16: a triangle filter's."""
    for _ in range(2):
        p = np.pad(half, ((1, 1), (0, 0)), "edge")
        half = np.stack([3 * half + p[:-2], 3 * half + p[2:]], 1).reshape(-1, half.shape[1]).T
    return half


def _halved(full: np.ndarray) -> np.ndarray:
    s = full[::2, ::2] + full[::2, 1::2] + full[1::2, ::2] + full[1::2, 1::2]
    p = np.pad(s, 1, "edge")
    p = p[:-2] + 6 * p[1:-1] + p[2:]
    around = p[:, :-2] + 6 * p[:, 1:-1] + p[:, 2:]
    return np.clip((448 * s - 3 * around + 512) // 1024, 0, 255)


def decoded(data: np.ndarray, high: int, wide: int, bits: int) -> tuple[np.ndarray, int]:
    """The plane of `high` x `wide` blocks that `data` begins with, and how many bytes it has."""
    n, most = high * wide, (1 << bits) - 1
    if bits == 3:
        length = 8 * n
        ends, words = data[:length].reshape(n, 8)[:, :2], data[:length].reshape(n, 8)[:, 2:]
    else:
        skipped = -(-2 * n // 8) * 8
        length = skipped + 8 * n
        ends, words = data[: 2 * n].reshape(n, 2), data[skipped:length].reshape(n, 8)
        assert not data[2 * n : skipped].any()
    bit = np.unpackbits(words, axis=1, bitorder="little").reshape(n, 16, bits)
    index = (bit << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.int64)  # [n, 16]
    a, b = ends[:, :1].astype(np.int64), ends[:, 1:].astype(np.int64)
    samples = (a * (most - index) + b * index + most // 2) // most
    return samples.reshape(high, wide, 4, 4).swapaxes(1, 2).reshape(4 * high, 4 * wide), length


def planes(data: np.ndarray, h: int, w: int, luma_bits: int, chroma_bits: int) -> list[np.ndarray]:
    """Y [h, w], Cb and Cr [ceil(h / 2), ceil(w / 2)], int64."""
    out, high, wide = [], -(-h // 8), -(-w // 8)
    for c in range(3):
        plane, length = decoded(data, high * (1 + (c == 0)), wide * (1 + (c == 0)), chroma_bits if c else luma_bits)
        data = data[length:]
        out.append(plane[: (h + 1) // 2, : (w + 1) // 2] if c else plane[:h, :w])
    assert len(data) == 0
    return out


def matrix(start: int, length: int, outputs: int, wanted: range, chroma: bool, side: int) -> tuple[np.ndarray, bool]:
    """Weights [len(wanted), side] of these of `outputs` outputs, int64; and whether they are of the 16-bit pass."""
    pitch = 2 * outputs if chroma else outputs
    support = 2 * max(pitch, length)
    few = length <= 4 * pitch
    bits = 14 if few else 26
    begin, end = (start // 2, (start + length + 1) // 2) if chroma else (start, start + length)
    weights = np.zeros((len(wanted), side), np.int64)
    for k, i in enumerate(wanted):
        centre = 2 * outputs * start + (2 * i + 1) * length
        near = range(max(begin, (centre - support) // (2 * pitch) - 1), min(end, (centre + support) // (2 * pitch) + 2))
        taps = [max(0, support - abs(pitch * (2 * j + 1) - centre)) for j in near]
        inverse = int(2.0**62 / float(sum(taps)))
        so_far = before = 0
        for j, t in zip(near, taps, strict=True):
            so_far += t
            after = (so_far * inverse + (1 << (61 - bits))) >> (62 - bits)
            weights[k, j] = after - before
            before = after
        assert before == 1 << bits
    return weights, few


def passed(samples: np.ndarray, weights: np.ndarray, few: bool) -> np.ndarray:
    """samples [n, m] with 7 fractional bits, weights [k, n] -> [k, m] with 6."""
    if few:
        return ((weights[:, :, None] * samples[None] + 0x4000) >> 15).sum(1)
    return (weights @ samples + (1 << 26)) >> 27


def geometry(row: dict[str, int], side: int) -> list[tuple[int, int, int, range]]:
    """Of y and of x: start, length, outputs and which outputs the view has, those outside of the image included."""
    axes = []
    for size, at, crop, resized in (("height", "top", "crop_h", "resized_h"), ("width", "left", "crop_w", "resized_w")):
        if row[resized]:
            axes.append((0, row[size], row[resized], range(row[at], row[at] + side)))
        else:
            axes.append((row[at], row[crop], side, range(side)))
    return axes


def view(data: np.ndarray, row: dict[str, int], luma_bits: int, chroma_bits: int, side: int) -> np.ndarray:
    """[S, S, 3] uint8, equal to the ops' to the bit."""
    axes = geometry(row, side)
    kept = [range(max(0, r.start), min(outputs, r.stop)) for *_, outputs, r in axes]
    out = np.zeros((side, side, 3), np.uint8)
    if kept[0] and kept[1]:
        small = []
        for c, plane in enumerate(planes(data, row["height"], row["width"], luma_bits, chroma_bits)):
            weights = [matrix(*axes[k][:3], kept[k], c > 0, plane.shape[k]) for k in (0, 1)]
            along = passed(plane.T << 7, *weights[1])  # [x, y]
            small.append(passed(along.T * 2, *weights[0]))
        y, u, v = small[0], small[1] - 8192, small[2] - 8192

        def times(x: np.ndarray, factor: int) -> np.ndarray:
            return (x * factor + 0x4000) >> 15

        colours = (y + v + times(v, 13173), y - times(u, 11277) - times(v, 23401), y + u + times(u, 25297))
        levels = np.clip((np.stack(colours, -1) + 32) >> 6, 0, 255)
        (t, b), (le, r) = ((k.start - axes[a][3].start, k.stop - axes[a][3].start) for a, k in enumerate(kept))
        out[t:b, le:r] = levels
    return out[:, ::-1] if row["flip"] else out


def pillow_view(planes: list[np.ndarray], row: dict[str, int], side: int) -> np.ndarray:
    """The same crop of decoded planes, resized by Pillow in float32: [S, S, 3] uint8."""
    (y, h, nh, rows), (x, w, nw, columns) = geometry(row, side)
    luma, *chroma = (np.asarray(p, np.float32) for p in planes)
    whole = bool(row["resized_h"])
    out = [_resized(luma[y : y + h, x : x + w], (nw, nh), (0, 0, w, h))]
    for plane in chroma:
        top, left = y // 2, x // 2
        part = plane[top : (y + h + 1) // 2, left : (x + w + 1) // 2]
        corner = (x / 2 - left, y / 2 - top)
        out.append(_resized(part, (nw, nh), (*corner, corner[0] + w / 2, corner[1] + h / 2)) - 128)
    a, u, v = out
    rgb = np.stack([a + 1.402 * v, a - 0.344136 * u - 0.714136 * v, a + 1.772 * u], -1)
    image = Image.fromarray(np.clip(np.rint(rgb), 0, 255).astype(np.uint8))
    if whole:
        image = image.crop((columns.start, rows.start, columns.stop, rows.stop))
    pixels = np.asarray(image)
    return pixels[:, ::-1] if row["flip"] else pixels


def _resized(plane: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    return np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR, box=box))
