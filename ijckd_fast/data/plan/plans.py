"""What every batch consists of, before any image is opened: a pure function of (index, seed, epoch, step, world size).

numpy only, no state that matters: batch k can be asked for at any time, in any order, on any rank, and is the same.
Executors (dali.py, pillow.py, synthetic.py) turn a BatchPlan into pixels and add no randomness of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from ijckd_fast.data.counter_rng import permutation, uniforms
from ijckd_fast.data.index.index import Index
from ijckd_fast.data.sources import Place
from ijckd_fast.errors import UserError

_TRIES = 10  # torchvision.transforms.RandomResizedCrop.get_params
_ORDER_SALT = 0x0DE2  # keeps the epoch's order unrelated to the crops of the same seed and epoch
_MIX_SALT = 0x313D  # and the mixing unrelated to both
_BETA_TRIES = 40  # of which one at least serves but for a chance of 2^-40
_REPEAT_BIT = 48  # ids are below 2^48: the bits above tell the views of one image in one epoch apart


@dataclass(frozen=True)
class Augment:
    """How images become network input.

    image_size   side of the square input, pixels
    scale        training crop's share of the image area, (least, most), in (0, 1]
    ratio        training crop's width / height, (least, most)
    crop_padding above 0: training's padded crop in the place of the random resized crop, and so of scale and ratio. The image is resized
                 so that its shorter side is image_size (not touched where it is), gets a border of so many black pixels on every
                 side, and a square of image_size is cut at a random place: torchvision's RandomCrop(image_size, padding). With
                 sizes the epoch's side takes image_size's place, and the border stays as wide
    hflip        probability of a horizontal flip in training
    eval_resize  shorter side before the evaluation's centre crop, pixels; at least image_size
    mean, std    per RGB channel, in units of [0, 1]
    mixup        alpha of the Beta distribution that two training images are blended by (Zhang et al. 2018), in [0.1, 1]; 0 = off
    cutmix       alpha of the one that a box is cut from the one into the other by (Yun et al. 2019), likewise; with both, each
                 pair of images takes one of the two at even odds
    repeats      views of each image in an epoch, side by side in the batches (repeated augmentation, Hoffer et al. 2020); the
                 epoch keeps its length and sees so many times fewer images
    sizes        progressive resizing: (first epoch, side) pairs, epochs rising from 0, instead of image_size in training
    raises       UserError for values that make no sense
    """

    image_size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_padding: int = 0
    hflip: float = 0.5
    eval_resize: int = 256
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    mixup: float = 0.0
    cutmix: float = 0.0
    repeats: int = 1
    sizes: tuple[tuple[int, int], ...] = ()

    def size_at(self, epoch: int) -> int:
        """Side of the training images in an epoch, pixels."""
        return next((size for first, size in reversed(self.sizes) if first <= epoch), self.image_size)

    def __post_init__(self) -> None:
        for name, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            if alpha != 0 and not 0.1 <= alpha <= 1:
                raise UserError(
                    f"{name} must be an alpha from 0.1 to 1, or 0 for none, found {alpha}; 0.2 and 1 are usual"
                )
        if self.repeats < 1:
            raise UserError(f"repeats (views of an image in an epoch) must be at least 1, found {self.repeats}")
        epochs = [epoch for epoch, _ in self.sizes]
        if self.sizes and (epochs[0] != 0 or epochs != sorted(set(epochs)) or min(size for _, size in self.sizes) < 1):
            raise UserError(
                f"sizes must be (first epoch, side in pixels) pairs with epochs rising from 0, found {self.sizes}; as settings e.g. "
                "128@0,192@30"
            )
        if self.image_size < 1:
            raise UserError(f"image_size must be at least 1 pixel, found {self.image_size}")
        if self.eval_resize < self.image_size:
            raise UserError(
                f"eval_resize (the shorter side before the centre crop) must be at least image_size = "
                f"{self.image_size}, found {self.eval_resize}; set it to {self.image_size} for no margin"
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"scale must be two area fractions with 0 < least <= most <= 1, found {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"ratio must be two aspect ratios with 0 < least <= most, found {self.ratio}")
        side = min([self.image_size, *(size for _, size in self.sizes)])
        if not 0 <= self.crop_padding < side:
            raise UserError(
                f"crop_padding must be from 0 (off) to {side - 1} pixels, so that a crop always holds some of its image of {side}, found "
                f"{self.crop_padding}; 4 is usual for 32"
            )
        if self.crop_padding and (self.scale, self.ratio) != (Augment.scale, Augment.ratio):
            raise UserError(
                f"crop_padding {self.crop_padding} replaces the random resized crop, to which scale and ratio belong: wanted both unset, "
                f"or at their defaults {Augment.scale} and {Augment.ratio}, found {self.scale} and {self.ratio}; leave them out, or "
                "crop_padding"
            )
        if not 0 <= self.hflip <= 1:
            raise UserError(f"hflip must be a probability between 0 and 1, found {self.hflip}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"mean and std must be three numbers each, std above 0, found {self.mean} and {self.std}")


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
            [B, 2] int32, (h, w): the whole image is resized to it, then the crop, of image_size, is cut; what the crop has outside of
            the image is black. Evaluation, and training's padded crop.
    image_size  side of the square result, pixels
    mixing  None: images stay apart
    view    which of a fixed number of views of its images this is; None where every epoch draws new ones
    Resizing is antialiased bilinear throughout.
    """

    ids: np.ndarray
    kept: np.ndarray
    paths: list[str]
    labels: np.ndarray
    size: np.ndarray
    anchor: np.ndarray
    shape: np.ndarray
    flip: np.ndarray
    resize: np.ndarray | None
    image_size: int
    places: list[Place] | None = None
    mixing: Mixing | None = None
    view: int | None = None


class TooManyUnreadable(UserError):
    """More files cannot be read any more than may be, or than can be replaced."""


class StandIns:
    """Images of an index that turned out unreadable while they were used, and those that stand in for them.

    An image's stand-in is the next readable one with its label (any_label: with whatever label), in index order and around. Which
    that is depends on which images are unreadable alone, not on when each was found to be.
    """

    def __init__(self, index: Index, *, any_label: bool = False) -> None:
        self._index = index
        self._any_label = any_label
        self._chosen: dict[int, int] = {}
        self.reasons: dict[int, str] = {}  # by id, in order of discovery

    def add(self, i: int, why: str) -> None:
        """Image i cannot be read. Raises TooManyUnreadable where no image is left that could stand in for it."""
        self.reasons.setdefault(i, why)
        for bad in self.reasons:
            if self._chosen.get(bad, i) == i:  # had none yet, or this one
                self._chosen[bad] = self._next(bad)

    def _next(self, i: int) -> int:
        same = np.flatnonzero(self._any_label | (self._index.labels == self._index.labels[i]))
        at = int(np.searchsorted(same, i))
        for candidate in chain(same[at:], same[:at]):
            if candidate not in self.reasons:
                return int(candidate)
        which = "" if self._any_label else f" of class {self._index.classes[self._index.labels[i]]!r}"
        raise TooManyUnreadable(
            f"no image{which} in {self._index.root}/{self._index.split} can be read any more, the last one was "
            f"{self._index.absolute(i)} ({self.reasons[i]}); is the disk still there?"
        )

    def of(self, ids: np.ndarray) -> np.ndarray:
        """ids [B], with each unreadable image's replaced by its stand-in's."""
        if not self._chosen:
            return ids
        return np.array([self._chosen.get(i, i) for i in ids.tolist()], np.int64)


class TrainPlan:
    """Shuffled, augmented batches without end. An epoch drops the images that do not fill a last global batch.

    batch_size   images per process; the global batch has batch_size * world
    seed         of order and augmentation
    rank, world  this process and how many there are. The images of global batch k, and their augmentation, depend on
                 batch_size * world only: rank r of world takes the r-th of its equal slices. Mixing pairs images of one
                 slice, neighbours but for repeats, so that it is the same too where batch_size is a multiple of 2 * repeats.
    views        None: new crops and flips in every epoch. V: epoch e has those of epoch e % V, in an order of its own, so that after V
                 epochs every image has been seen in all its V views and they begin again; a stand-in is seen in its own view. What
                 a teacher says to V views of an image can be stored (teacher_cache.py)
    raises       UserError when the data holds less than one global batch; views with mixing, repeats or progressive sizes
    """

    num_steps: int | None = None

    def __init__(
        self,
        index: Index,
        augment: Augment,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        views: int | None = None,
    ) -> None:
        _check_shard(batch_size, rank, world)
        if views is not None:
            check_views(views, augment)
        self.views = views
        self.index, self.augment, self.batch_size, self.seed = index, augment, batch_size, seed
        self.stand_ins = StandIns(index)
        self.rank, self.world = rank, world
        self.steps_per_epoch = len(index) // (batch_size * world)
        if self.steps_per_epoch == 0:
            raise UserError(
                f"one training step needs {batch_size * world} images (batch size {batch_size} x {world} processes), "
                f"but {index.root}/{index.split} has {len(index)}; lower the batch size"
            )
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def batch(self, step: int) -> BatchPlan:
        """The batch of a global step: epoch, k = divmod(step, steps_per_epoch)."""
        epoch, k = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:  # a sort of all ids: once per epoch, not per batch
            self._epoch, self._order = epoch, permutation(self.seed ^ _ORDER_SALT, epoch, len(self.index))
        first = (k * self.world + self.rank) * self.batch_size
        place, view = np.divmod(np.arange(first, first + self.batch_size), self.augment.repeats)
        planned = self._order[place]
        keys = planned + (view << _REPEAT_BIT)
        ids = self.stand_ins.of(planned)
        if self.views is not None:
            return _view(self.index, ids, epoch % self.views, self.seed, self.augment)
        # drawn for the planned image: a stand-in that is in the batch anyway is seen with two crops
        batch = _augmented(self.index, ids, keys, self.seed, epoch, self.augment)
        if self.augment.mixup or self.augment.cutmix:
            batch.mixing = mixing(self.seed, epoch, keys, batch.image_size, self.augment)
        return batch


def check_views(views: int, augment: Augment) -> None:
    """UserError unless a fixed number of views of each image, and nothing beside them, can be what training sees."""
    if views < 1:
        raise UserError(f"the number of views of each image must be at least 1, found {views}")
    more = [f"{name} {value:g}" for name in ("mixup", "cutmix") if (value := getattr(augment, name))]
    more += [f"repeats {augment.repeats}"] if augment.repeats > 1 else []
    more += ["progressive sizes"] if augment.sizes else []
    if more:
        raise UserError(
            f"a fixed number of views (a teacher's cache) means crops and flips of single images of one size, found {' and '.join(more)}, "
            "of which no view is the same as before: leave that out, or train with the teacher itself"
        )


class ViewPlan:
    """Given views of given training images, a batch each: what TrainPlan with `views` shows of them.

    batches     of each batch the view and the ids, at most batch_size of them
    batch_size  images of the largest batch
    seed        of crops and flips, TrainPlan's
    An image that cannot be read has a stand-in in its row, of whatever class: where a batch's ids are not those asked for.
    """

    def __init__(
        self,
        index: Index,
        augment: Augment,
        batches: Sequence[tuple[int, Sequence[int]]],
        batch_size: int,
        seed: int,
    ) -> None:
        _check_shard(batch_size, 0, 1)
        self.index, self.augment, self.batches, self.batch_size, self.seed = index, augment, batches, batch_size, seed
        self.stand_ins = StandIns(index, any_label=True)

    @property
    def num_steps(self) -> int:
        return len(self.batches)

    def batch(self, k: int) -> BatchPlan:
        """Batch k in [0, num_steps)."""
        view, planned = self.batches[k]
        ids = self.stand_ins.of(np.asarray(planned, np.int64))
        return _view(self.index, ids, view, self.seed, self.augment)


class EvalPlan:
    """Every image exactly once over all ranks, in index order, none doubled, none left out.

    An image that cannot be read any more has a stand-in in its row, so that batches keep their size, but the row is not kept.

    batch_size  images per process; the last batch may be smaller, none is empty
    ids         [n] int64, show only these images, in this order; None = all
    Rank r takes images r, r + world, ...; ranks may differ by one batch (and have none when there are fewer images than
    ranks), so that results must be gathered after the loop, not in it.
    """

    def __init__(
        self,
        index: Index,
        augment: Augment,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        ids: np.ndarray | None = None,
    ) -> None:
        _check_shard(batch_size, rank, world)
        self.index, self.augment, self.batch_size = index, augment, batch_size
        self.stand_ins = StandIns(index, any_label=True)  # of rows that are not kept
        self.rank, self.world = rank, world
        self._ids = (np.arange(len(index)) if ids is None else ids)[rank::world]
        self.num_batches = -(-len(self._ids) // batch_size)

    @property
    def num_steps(self) -> int:
        return self.num_batches

    def batch(self, k: int) -> BatchPlan:
        """Batch k in [0, num_batches)."""
        if not 0 <= k < self.num_batches:
            raise IndexError(f"batch {k} of {self.num_batches}")
        planned = self._ids[k * self.batch_size : (k + 1) * self.batch_size]
        ids = self.stand_ins.of(planned)
        size = self.index.sizes[ids][:, ::-1]  # [B, 2] (h, w)
        resize, anchor = resize_and_center_crop(size, self.augment.eval_resize, self.augment.image_size)
        shape = np.full_like(size, self.augment.image_size)
        flip = np.zeros(len(ids), np.int32)
        return _batch(self.index, ids, ids == planned, size, anchor, shape, flip, resize, self.augment.image_size)


Plan = TrainPlan | ViewPlan | EvalPlan


def _check_shard(batch_size: int, rank: int, world: int) -> None:
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, found {batch_size}")
    if not 0 <= rank < world:
        raise UserError(f"rank must be from 0 to world size - 1, found rank {rank} of {world}")


def _view(index: Index, ids: np.ndarray, view: int, seed: int, augment: Augment) -> BatchPlan:
    """One view of images: drawn for the ids seen, so that it is a function of image and view alone."""
    batch = _augmented(index, ids, ids, seed, view, augment)
    batch.view = view
    return batch


def _augmented(index: Index, ids: np.ndarray, keys: np.ndarray, seed: int, epoch: int, augment: Augment) -> BatchPlan:
    """Training images, with the crops and flips that are drawn for `keys` [B] int64 in an epoch."""
    size = index.sizes[ids][:, ::-1]  # [B, 2] (h, w)
    side = augment.size_at(epoch)
    resize = None
    if augment.crop_padding:
        resize, anchor, flip = padded_crop(seed, epoch, keys, size, side, augment)
        shape = np.full_like(size, side)
    else:
        anchor, shape, flip = random_resized_crop(seed, epoch, keys, size, augment)
    return _batch(index, ids, np.ones(len(ids), bool), size, anchor, shape, flip, resize, side)


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
    paths = [index.absolute(i) for i in ids]
    size = np.ascontiguousarray(size)
    places = [index.place(i) for i in ids] if index.shards else None
    return BatchPlan(ids.copy(), kept, paths, index.labels[ids], size, anchor, shape, flip, resize, image_size, places)


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
    """torchvision's Resize(side), which leaves a shorter side of `side` as it is, then RandomCrop(side, padding=augment.crop_padding).

    ids      [n] int64, or other keys below 2^63; size [n, 2] int (h, w) of the stored images
    returns  resize [n, 2] int32 (h, w) of the resized image, anchor [n, 2] int32 (y, x) of the crop in it, from -padding on, every
             place equally likely, flip [n] int32 in {0, 1}
    A pure function of (seed, epoch, id, size): neither batch nor position in it matter.
    """
    draws = uniforms(seed, epoch, ids, 3)  # y, x, flip
    resized = _resized(size, side)  # [n, 2]
    places = resized + 2 * augment.crop_padding - side + 1  # [n, 2]
    anchor = np.floor(draws[:, :2] * places).astype(np.int32) - augment.crop_padding
    return resized.astype(np.int32), anchor, (draws[:, 2] < augment.hflip).astype(np.int32)


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
    """Beta(alpha, alpha) by Johnk's method: the first pair u^(1/alpha), v^(1/alpha) whose sum is at most 1 gives u / (u + v).

    alpha [B] in [0.1, 1] (0 where the result is not used), draws [B, 2 tries] in [0, 1); returns [B] in [0, 1]
    """
    power = 1 / np.maximum(alpha, 0.1)
    x, y = (draws[:, i::2] ** power[:, None] for i in (0, 1))  # [B, tries]
    serves = (x + y <= 1) & (x + y > 0)
    taken = serves.argmax(1)
    x, y = x[np.arange(len(x)), taken], y[np.arange(len(y)), taken]
    return x / np.maximum(x + y, np.finfo(np.float64).tiny)


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
