"""The view of an image that is stored as planes, by Pillow: what every executor of block packs is held to.

Each plane is resized by itself, in floating point; the colours are made of what comes out, and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ijckd_fast.data.plan import BatchPlan

_Box = tuple[float, float, float, float]  # left, top, right, bottom


def arrange_planes(planes: Sequence[np.ndarray], plan: BatchPlan, i: int) -> np.ndarray:
    """Image i of a batch as it is stored -> cropped, resized, flipped and converted to RGB: [S, S, 3] uint8.

    planes  Y [h, w], Cb and Cr [ceil(h / 2), ceil(w / 2)], uint8
    """
    (top, left), (high, wide) = plan.anchor[i].tolist(), plan.shape[i].tolist()
    if plan.resize is None:  # no sample outside the crop enters
        side = plan.image_size
        crop = (left, top, left + wide, top + high)
        pixels = _rgb([_resized(plane, crop, crop, step, (side, side)) for plane, step in _with_steps(planes)])
    else:  # of the resized image, only what the crop has of it
        height, width = planes[0].shape
        tall, broad = plan.resize[i].tolist()
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + wide, broad), min(top + high, tall)
        pixels = np.zeros((high, wide, 3), np.uint8)  # black where the crop lies outside
        if x0 < x1 and y0 < y1:
            box = (x0 * width / broad, y0 * height / tall, x1 * width / broad, y1 * height / tall)
            whole = (0, 0, width, height)
            size = (x1 - x0, y1 - y0)
            inside = _rgb([_resized(plane, box, whole, step, size) for plane, step in _with_steps(planes)])
            pixels[y0 - top : y1 - top, x0 - left : x1 - left] = inside
    return pixels[:, ::-1] if plan.flip[i] else pixels


def _with_steps(planes: Sequence[np.ndarray]) -> list[tuple[np.ndarray, int]]:
    """Each plane with the pixels of the image that one of its samples spans."""
    return list(zip(planes, (1, 2, 2), strict=True))


def _resized(plane: np.ndarray, box: _Box, limits: _Box, step: int, size: tuple[int, int]) -> np.ndarray:
    """[h, w] float32 of `size` (w, h): what a box of the image, in pixels, is in a plane, resized.

    limits  of what may enter, in pixels of the image; a sample that it touches may
    """
    x0, y0 = math.floor(limits[0] / step), math.floor(limits[1] / step)
    x1, y1 = math.ceil(limits[2] / step), math.ceil(limits[3] / step)
    part = Image.fromarray(plane[y0:y1, x0:x1].astype(np.float32))
    left, top, right, bottom = (edge / step for edge in box)
    return np.asarray(part.resize(size, Image.Resampling.BILINEAR, (left - x0, top - y0, right - x0, bottom - y0)))


def _rgb(planes: Sequence[np.ndarray]) -> np.ndarray:
    """[h, w, 3] uint8 of Y, Cb, Cr [h, w], JFIF's colours."""
    y, u, v = planes[0], planes[1] - 128, planes[2] - 128
    rgb = np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], 2)
    return np.rint(rgb).clip(0, 255).astype(np.uint8)
