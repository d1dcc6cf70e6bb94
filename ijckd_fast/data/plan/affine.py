"""How training's squares are turned, scaled, slanted and shifted: torchvision's RandomAffine, vectorised."""

from __future__ import annotations

import numpy as np

from ijckd_fast.data.counter_rng import uniforms
from ijckd_fast.data.plan.augment import Augment

_AFFINE_SALT = 0xAFF1  # keeps the maps unrelated to crops, order and mixing of the same seed and epoch


def random_affine(seed: int, epoch: int, ids: np.ndarray, augment: Augment) -> np.ndarray:
    """Maps of the square about its centre: torchvision.transforms.RandomAffine's, with a scale for each axis.

    Content at p, (x, y) from the centre with x to the right and y down, comes to lie at
        q = R K D p + t,   R = [[cos a, -sin a], [sin a, cos a]],   K = [[1, -tan s], [0, 1]],   D = diag(d, e)
    Each number is drawn evenly and by itself:
        a     rotation, within affine_rotate degrees of 0; above 0: clockwise
        s     shear, within affine_shear degrees of 0; above 0: the upper part goes to the right
        d, e  scales of x and y, within affine_scale of 1; above 1: larger
        t     shifts along x and y, within affine_shift of 0, in sides of the square; torchvision's are whole pixels
    All six are drawn whatever the settings: to turn one on or off leaves the others as they were.

    ids      [n] int64, or other keys below 2^63, as for random_resized_crop
    returns  [n, 2, 3] float32, the way back: p = M[:, :2] q + M[:, 2], in halves of the side. The square is then
             [-1, 1] along x and y at every size, and pixel k of S has its centre at (2 k + 1) / S - 1: what torch's
             affine_grid takes without align_corners
    A pure function of (seed, epoch, id): neither batch nor position in it matter.
    """
    draws = 2 * uniforms(seed ^ _AFFINE_SALT, epoch, ids, 6) - 1  # in [-1, 1)
    angle, shear = np.radians(augment.affine_rotate * draws[:, 0]), np.radians(augment.affine_shear * draws[:, 1])
    scale = 1 + augment.affine_scale * draws[:, 2:4]  # [n, 2]
    shift = 2 * augment.affine_shift * draws[:, 4:6]  # [n, 2], in halves of the side
    cos, sin, slant = np.cos(angle), np.sin(angle), np.tan(shear)
    rows = np.stack([cos - slant * sin, sin + slant * cos, -sin, cos], 1).reshape(-1, 2, 2)  # inverses of R K
    back = rows / scale[:, :, None]
    # float64 up to here: the last bits of another machine's cosine do not reach the result
    return np.concatenate([back, -back @ shift[:, :, None]], 2).astype(np.float32)
