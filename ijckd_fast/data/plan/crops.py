"""Where crops lie and which way images are flipped: torchvision's rules, vectorised."""

from __future__ import annotations

import numpy as np

from ijckd_fast.data.counter_rng import uniforms
from ijckd_fast.data.plan.augment import Augment

_TRIES = 10  # torchvision.transforms.RandomResizedCrop.get_params


def random_resized_crop(
    seed: int, epoch: int, ids: np.ndarray, size: np.ndarray, augment: Augment
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """torchvision.transforms.RandomResizedCrop.get_params, vectorised: ten tries, then the central fallback.

    ids      [n] int64, or other keys below 2^63; size [n, 2] int (h, w) of the stored images
    returns  anchor [n, 2] int32 (y, x), shape [n, 2] int32 (h, w), flip [n] int32 in {0, 1}
    A pure function of (seed, epoch, id, size): neither batch nor position in it matter.
    """
    n = len(ids)
    draws = uniforms(seed, epoch, ids, 4 * _TRIES + 1)  # per try: area, ratio, y, x; then the flip
    height, width = size[:, :1].astype(np.float64), size[:, 1:].astype(np.float64)  # [n, 1]
    area = height * width * (augment.scale[0] + (augment.scale[1] - augment.scale[0]) * draws[:, 0 : 4 * _TRIES : 4])
    low, high = np.log(augment.ratio)
    ratio = np.exp(low + (high - low) * draws[:, 1 : 4 * _TRIES : 4])
    crop_w = np.rint(np.sqrt(area * ratio))  # [n, tries]; rint rounds halves to even, as Python's round
    crop_h = np.rint(np.sqrt(area / ratio))
    fits = (crop_w > 0) & (crop_w <= width) & (crop_h > 0) & (crop_h <= height)
    found = fits.any(1)
    row, taken = np.arange(n), fits.argmax(1)  # the first try that fits

    height, width = height[:, 0], width[:, 0]
    in_ratio = width / height
    fallback_w = np.where(in_ratio > augment.ratio[1], np.rint(height * augment.ratio[1]), width)
    fallback_h = np.where(in_ratio < augment.ratio[0], np.rint(width / augment.ratio[0]), height)
    h = np.where(found, crop_h[row, taken], fallback_h)
    w = np.where(found, crop_w[row, taken], fallback_w)
    y = np.where(found, np.floor(draws[row, 4 * taken + 2] * (height - h + 1)), (height - h) // 2)
    x = np.where(found, np.floor(draws[row, 4 * taken + 3] * (width - w + 1)), (width - w) // 2)
    flip = draws[:, 4 * _TRIES] < augment.hflip
    return np.stack([y, x], 1).astype(np.int32), np.stack([h, w], 1).astype(np.int32), flip.astype(np.int32)


def padded_crop(
    seed: int, epoch: int, ids: np.ndarray, size: np.ndarray, side: int, augment: Augment
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """torchvision's Resize(side), then RandomCrop(side, padding=augment.crop_padding).

    An image whose shorter side is `side` is not resized.

    ids      [n] int64, or other keys below 2^63; size [n, 2] int (h, w) of the stored images
    returns  resize [n, 2] int32 (h, w) of the resized image, anchor [n, 2] int32 (y, x) of the crop in it, from
             -padding on, every place equally likely, flip [n] int32 in {0, 1}
    A pure function of (seed, epoch, id, size): neither batch nor position in it matter.
    """
    draws = uniforms(seed, epoch, ids, 3)  # y, x, flip
    resized = _resized(size, side)  # [n, 2]
    places = resized + 2 * augment.crop_padding - side + 1  # [n, 2]
    anchor = np.floor(draws[:, :2] * places).astype(np.int32) - augment.crop_padding
    return resized.astype(np.int32), anchor, (draws[:, 2] < augment.hflip).astype(np.int32)


def resize_and_center_crop(size: np.ndarray, shorter: int, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's Resize(shorter) then CenterCrop(crop), crop <= shorter.

    size     [n, 2] int (h, w) of the stored images
    returns  resize [n, 2] int32 (h, w) of the resized image, anchor [n, 2] int32 (y, x) of the crop in it
    """
    resized = _resized(size, shorter)
    anchor = np.rint((resized - crop) / 2)  # halves to even, as Python's round
    return resized.astype(np.int32), anchor.astype(np.int32)


def _resized(size: np.ndarray, shorter: int) -> np.ndarray:
    """[n, 2] int64 (h, w) of images of `size` [n, 2] after torchvision's Resize(shorter)."""
    wide = size.astype(np.int64)
    short = wide.min(1, keepdims=True)
    return np.where(wide == short, shorter, (shorter * wide / short).astype(np.int64))  # the longer side is truncated
