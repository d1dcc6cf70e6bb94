"""What one batch consists of, made from an index, the images' ids and the drawn geometry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, overload

import numpy as np

from ijckd_fast.data.index import Index
from ijckd_fast.data.plan.affine import random_affine
from ijckd_fast.data.plan.augment import Augment
from ijckd_fast.data.plan.crops import padded_crop, random_resized_crop, resize_and_center_crop
from ijckd_fast.data.plan.mixup import Mixing
from ijckd_fast.data.sources import Place

_T = TypeVar("_T")


class OnDemand(Sequence[_T], Generic[_T]):
    """What a function says of each of some ids, asked when it is looked at: not all executors look."""

    def __init__(self, function: Callable[[int], _T], ids: np.ndarray) -> None:
        self._function, self._ids = function, ids

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, i: int) -> _T: ...
    @overload
    def __getitem__(self, i: slice) -> list[_T]: ...
    def __getitem__(self, i: int | slice) -> _T | list[_T]:
        if isinstance(i, slice):
            return [self._function(k) for k in self._ids[i].tolist()]
        return self._function(int(self._ids[i]))


@dataclass(eq=False)
class BatchPlan:
    """One process's share of one batch. B = its number of images; y before x, height before width.

    ids     [B] int64, positions in the index: of the stand-in where there is one
    kept    [B] bool, False where evaluation leaves the row out because its own image cannot be read
    paths   [B] absolute paths; of images in shards, the names they are reported by
    places  [B] where the bytes lie; None: each is all of the file at its path
    labels  [B] int64
    size    [B, 2] int32, (h, w) the stored image must have, as it was indexed
    anchor  [B, 2] int32, (y, x) of the crop's upper left pixel; with a padded crop it may lie outside of the image
    shape   [B, 2] int32, (h, w) of the crop
    flip    [B] int32, 1 = mirror left to right
    resize  None: the crop is cut from the stored image, then resized to image_size. Training's random resized crop.
            [B, 2] int32, (h, w): the whole image is resized to it, then the crop, of image_size, is cut; what the crop
            has outside of the image is black. Evaluation, and training's padded crop.
    image_size  side of the square result, pixels
    affine  None: the square is shown as it is. [B, 2, 3] float32, where in the flipped square each place of the result
            is seen: see random_affine
    mixing  None: images stay apart
    view    which of a fixed number of views of its images this is; None where every epoch draws new ones
    Resizing is antialiased bilinear throughout.
    """

    ids: np.ndarray
    kept: np.ndarray
    paths: Sequence[str]
    labels: np.ndarray
    size: np.ndarray
    anchor: np.ndarray
    shape: np.ndarray
    flip: np.ndarray
    resize: np.ndarray | None
    image_size: int
    places: Sequence[Place] | None = None
    mixing: Mixing | None = None
    view: int | None = None
    affine: np.ndarray | None = None


def view_batch(index: Index, ids: np.ndarray, view: int, seed: int, augment: Augment) -> BatchPlan:
    """One view of images: drawn for the ids seen, so that it is a function of image and view alone."""
    batch = augmented_batch(index, ids, ids, seed, view, augment)
    batch.view = view
    return batch


def augmented_batch(
    index: Index, ids: np.ndarray, keys: np.ndarray, seed: int, epoch: int, augment: Augment
) -> BatchPlan:
    """Training images, with the crops, flips and warps that are drawn for `keys` [B] int64 in an epoch."""
    size = index.sizes[ids][:, ::-1]  # [B, 2] (h, w)
    side = augment.size_at(epoch)
    resize = None
    if augment.crop_padding:
        resize, anchor, flip = padded_crop(seed, epoch, keys, size, side, augment)
        shape = np.full_like(size, side)
    else:
        anchor, shape, flip = random_resized_crop(seed, epoch, keys, size, augment)
    batch = _batch(index, ids, np.ones(len(ids), bool), size, anchor, shape, flip, resize, side)
    if augment.warps:
        batch.affine = random_affine(seed, epoch, keys, augment)
    return batch


def evaluation_batch(index: Index, ids: np.ndarray, kept: np.ndarray, augment: Augment) -> BatchPlan:
    """Images resized and cut at their centre, without chance. ids [B] int64, kept [B] bool: see BatchPlan."""
    size = index.sizes[ids][:, ::-1]  # [B, 2] (h, w)
    resize, anchor = resize_and_center_crop(size, augment.eval_resize, augment.image_size)
    shape = np.full_like(size, augment.image_size)
    flip = np.zeros(len(ids), np.int32)
    return _batch(index, ids, kept, size, anchor, shape, flip, resize, augment.image_size)


def _batch(
    index: Index,
    ids: np.ndarray,
    kept: np.ndarray,
    size: np.ndarray,
    anchor: np.ndarray,
    shape: np.ndarray,
    flip: np.ndarray,
    resize: np.ndarray | None,
    image_size: int,
) -> BatchPlan:
    ids = ids.copy()
    paths, places = OnDemand(index.absolute, ids), OnDemand(index.place, ids) if index.shards else None
    size = np.ascontiguousarray(size)
    return BatchPlan(ids, kept, paths, index.labels[ids], size, anchor, shape, flip, resize, image_size, places)
