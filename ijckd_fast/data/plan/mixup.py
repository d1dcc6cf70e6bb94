"""mixup and cutmix: which two images of a batch are mixed, and how."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ijckd_fast.data.counter_rng import uniforms
from ijckd_fast.data.plan.augment import Augment

_MIX_SALT = 0x313D  # keeps the mixing unrelated to crops and order of the same seed and epoch
_BETA_TRIES = 40  # of which one at least serves but for a chance of 2^-40


@dataclass(eq=False)
class Mixing:
    """How the images of a training batch are mixed in pairs, after augmentation. S = side of the images.

    partner  [B] int64, row of the batch whose image is mixed in; the row itself for one without a partner
    blend    [B] float32, weight of the row's own image in the blend, 1 - blend is the partner's
    box      [B, 4] int32 (y0, x0, y1, x1) in [0, S], pixels [y0, y1) x [x0, x1) that are the partner's alone
    share    [B] float32, weight of the row's own label: mix of ops.classifier_loss
    """

    partner: np.ndarray
    blend: np.ndarray
    box: np.ndarray
    share: np.ndarray


def mixing(seed: int, epoch: int, keys: np.ndarray, side: int, augment: Augment) -> Mixing:
    """mixup's and cutmix's draws, one for both images of a pair.

    keys     [B] int64, of the images as random_resized_crop takes them
    side     of the images, pixels
    A pure function of (seed, epoch, keys): image i goes with image i + repeats, or i - repeats, so that no view meets
    another of its own image.
    """
    row, apart = np.arange(len(keys)), augment.repeats
    lower = row % (2 * apart) < apart
    partner = np.where(lower, row + apart, row - apart)
    partner = np.where(partner < len(keys), partner, row)
    leader = np.minimum(row, partner)  # whose draws serve the pair
    draws = uniforms(seed ^ _MIX_SALT, epoch, keys[leader], 3 + 2 * _BETA_TRIES)
    cut = draws[:, 0] < 0.5 if augment.mixup and augment.cutmix else np.full(len(keys), augment.cutmix > 0)
    alpha = np.where(cut, augment.cutmix, augment.mixup)
    share = np.where(partner == row, 1.0, _beta(alpha, draws[:, 3:]))

    half = np.floor(side * np.sqrt(1 - share) / 2 * cut)  # [B], of a box around a point anywhere in the image
    y, x = np.floor(draws[:, 1] * side), np.floor(draws[:, 2] * side)
    box = np.stack([y - half, x - half, y + half, x + half], 1).clip(0, side).astype(np.int32)
    area = (box[:, 2] - box[:, 0]).astype(np.float64) * (box[:, 3] - box[:, 1])
    blend = np.where(cut, 1.0, share)
    share = np.where(cut, 1 - area / side**2, share)  # what the border has cut off is not the partner's
    return Mixing(partner, blend.astype(np.float32), box, share.astype(np.float32))


def _beta(alpha: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Beta(alpha, alpha) by Johnk's method: x / (x + y) of the first x = u^(1/alpha), y = v^(1/alpha) with x + y <= 1.

    alpha [B] in [0.1, 1] (0 where the result is not used), draws [B, 2 tries] in [0, 1); returns [B] in [0, 1]
    """
    power = 1 / np.maximum(alpha, 0.1)
    x, y = (draws[:, i::2] ** power[:, None] for i in (0, 1))  # [B, tries]
    serves = (x + y <= 1) & (x + y > 0)
    taken = serves.argmax(1)
    x, y = x[np.arange(len(x)), taken], y[np.arange(len(y)), taken]
    return x / np.maximum(x + y, np.finfo(np.float64).tiny)
