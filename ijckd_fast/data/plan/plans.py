"""Which images and views each batch of a run holds: in training, of a teacher's cache, in evaluation.

numpy only, no state that matters: batch k can be asked for at any time, in any order, on any rank, and is the same.
Executors (../load) turn a BatchPlan into pixels and add no randomness of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ijckd_fast.data.counter_rng import permutation
from ijckd_fast.data.index import Index
from ijckd_fast.data.plan.augment import Augment, check_views
from ijckd_fast.data.plan.batch import BatchPlan, augmented_batch, evaluation_batch, view_batch
from ijckd_fast.data.plan.mixup import mixing
from ijckd_fast.data.plan.stand_ins import StandIns
from ijckd_fast.errors import UserError

_ORDER_SALT = 0x0DE2  # keeps the epoch's order unrelated to the crops of the same seed and epoch
_REPEAT_BIT = 48  # ids are below 2^48: the bits above tell the views of one image in one epoch apart


class TrainPlan:
    """Shuffled, augmented batches without end. An epoch drops the images that do not fill a last global batch.

    batch_size   images per process; the global batch has batch_size * world
    seed         of order and augmentation
    rank, world  this process and how many there are. The images of global batch k, and their augmentation, depend on
                 batch_size * world only: rank r of world takes the r-th of its equal slices. Mixing pairs images of one
                 slice, neighbours but for repeats, so that it is the same too where batch_size is a multiple of 2 *
                 repeats.
    views        None: new crops and flips in every epoch. V: epoch e has those of epoch e % V, in an order of its own,
                 so that after V epochs every image has been seen in all its V views and they begin again; a stand-in is
                 seen in its own view. What a teacher says to V views of an image can be stored (teacher_cache.py)
    raises       UserError when the data holds less than one global batch; views with mixing, repeats or progressive
                 sizes
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
                f"but {index.folder} has {len(index)}; lower the batch size"
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
            return view_batch(self.index, ids, epoch % self.views, self.seed, self.augment)
        # drawn for the planned image: a stand-in that is in the batch anyway is seen with two crops
        batch = augmented_batch(self.index, ids, keys, self.seed, epoch, self.augment)
        if self.augment.mixup or self.augment.cutmix:
            batch.mixing = mixing(self.seed, epoch, keys, batch.image_size, self.augment)
        return batch


class ViewPlan:
    """Given views of given training images, a batch each: what TrainPlan with `views` shows of them.

    batches     of each batch the view and the ids, at most batch_size of them
    batch_size  images of the largest batch
    seed        of crops and flips, TrainPlan's
    An image that cannot be read has a stand-in in its row, of whatever class: where a batch's ids are not those asked
    for.
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
        return view_batch(self.index, ids, view, self.seed, self.augment)


class EvalPlan:
    """Every image exactly once over all ranks, in index order, none doubled, none left out.

    An image that cannot be read any more has a stand-in in its row, so that batches keep their size, but the row is not
    kept.

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
        return evaluation_batch(self.index, ids, ids == planned, self.augment)


Plan = TrainPlan | ViewPlan | EvalPlan


def _check_shard(batch_size: int, rank: int, world: int) -> None:
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, found {batch_size}")
    if not 0 <= rank < world:
        raise UserError(f"rank must be from 0 to world size - 1, found rank {rank} of {world}")
