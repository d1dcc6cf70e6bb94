"""What the executors have in common: the range of steps, iteration, and delivery to the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ijckd_fast.data.load.changed import ChangedFiles
from ijckd_fast.data.plan import Augment, BatchPlan, EvalPlan, Mixing, Plan, TooManyUnreadable, what_to_do
from ijckd_fast.errors import UserError


class Batch(NamedTuple):
    """Everything on the loader's device.

    images    [B, 3, S, S] normalised RGB, the loader's dtype and layout
    labels    [B] int64
    ids       [B] int64, positions in the index
    labels_b  [B] int64, of the image that was mixed in; None where the plan mixes nothing
    mix       [B] float32 in [0, 1], share of `labels`; with labels_b
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    labels_b: Tensor | None = None
    mix: Tensor | None = None


def deliver(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`. A GPU copies it from pinned memory: from any other the host would wait."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def warped(images: Tensor, affine: np.ndarray, augment: Augment) -> Tensor:
    """Training's squares as the plan's affine maps show them, made where they lie by one bilinear sampling.

    images   [B, 3, S, S], normalised
    affine   [B, 2, 3], see random_affine
    augment  its affine_fill is what lies outside; along the square's edge a pixel blends into it
    returns  [B, 3, S, S] float32; an image's bits do not depend on the batch that it is in
    """
    side, device = images.shape[-1], images.device
    to_x, to_y, offset = deliver(torch.from_numpy(affine), device)[:, None].unbind(3)  # [B, 1, 2] each
    centre = ((2 * torch.arange(side, device=device) + 1) / side - 1)[:, None]  # [S, 1]
    # Sums of elements: a matrix product, as in affine_grid, may round an image's numbers as the batch's size has it.
    grid = (to_x * centre)[:, None] + (to_y * centre + offset)[:, :, None]  # [B, S, S, 2], (x, y) of each pixel
    levels, means, deviations = (torch.tensor(x) for x in (augment.affine_fill, augment.mean, augment.std))
    fill = deliver((levels / 255 - means) / deviations, device)[:, None, None]  # [3, 1, 1]
    # grid_sample has zeros outside: those of the images' differences from it
    apart = functional.grid_sample(images.float() - fill, grid, "bilinear", "zeros", align_corners=False)
    return apart.add_(fill)


def mixed(batch: Batch, mixing: Mixing) -> Batch:
    """The batch with its images blended and cut into one another as the plan says, where the images lie."""
    device = batch.images.device
    arrays = (mixing.partner, mixing.box, mixing.share, mixing.blend)
    partner, box, share, blend = (deliver(torch.from_numpy(x), device) for x in arrays)
    blend = blend.to(batch.images.dtype)[:, None, None, None]
    other = batch.images[partner]
    pixel = torch.arange(batch.images.shape[2], device=device)
    y0, x0, y1, x1 = box[:, :, None].unbind(1)  # [B, 1] each
    inside = ((pixel >= y0) & (pixel < y1))[:, None, :, None] & ((pixel >= x0) & (pixel < x1))[:, None, None, :]
    # lerp gives the image itself, to the bit, where blend is 1
    images = torch.where(inside, other, torch.lerp(other, batch.images, blend))
    images = images.contiguous(memory_format=torch.channels_last)
    return batch._replace(images=images, labels_b=batch.labels[partner], mix=share)


def _warn(path: str, why: str) -> None:
    warnings.warn(
        f"{path} cannot be read any more ({why}): in training another image of its class stands in for it", stacklevel=2
    )


class Loader:
    """Iterates over the batches of a plan. Every `iter()` begins again at `start`; only one iteration runs at a time.

    plan      TrainPlan, ViewPlan or EvalPlan
    threads   decoding threads
    prefetch  batches made ahead of the one asked for
    start     first (global) step
    stop      one after the last step; None = the plan's end (a TrainPlan has none)
    device    where batches are delivered
    dtype     of the images; warped ones are made in float32 and rounded once
    channels_last  whether the images are laid out [B, S, S, 3], as nets on GPUs and CPUs are fastest with, else
              [B, 3, S, S]
    bad_limit files that may turn out unreadable before the loader gives up; None = a thousandth of the index, at least
    8
    on_bad    called with path and reason of each of them, once; default: a warning
    raises    UserError for a nonsensical number; TooManyUnreadable while iterating
    A file that cannot be read any more, or is not what was indexed, does not end the iteration. In training an image
    with the same label stands in for it, always the same one (plan.py:StandIns); evaluation leaves it out, and no other
    in its place. A warning names a file whose length or time is another than when it was indexed. Neither threads nor
    prefetch, start or stop change the bits of a step's batch. A batch stays valid while it is referenced, also after
    close(). Use as a context manager, or close().

    followed  the plan of the batch handed over last, stand-ins and all: what is in it, for the host to know without
              asking the device
    """

    followed: BatchPlan | None = None

    def __init__(
        self,
        plan: Plan,
        *,
        threads: int = 2,
        prefetch: int = 2,
        start: int = 0,
        stop: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        bad_limit: int | None = None,
        on_bad: Callable[[str, str], None] = _warn,
    ) -> None:
        for name, value, least in (("threads", threads, 1), ("prefetch", prefetch, 1), ("start", start, 0)):
            if value < least:
                raise UserError(f"the data loader's {name} must be at least {least}, found {value}")
        ends = [end for end in (stop, plan.num_steps) if end is not None]
        self.plan = plan
        self.threads = threads
        self.prefetch = prefetch
        self.start = start
        self.stop: int | None = min(ends) if ends else None
        self.device = torch.device(device)
        self.dtype = dtype
        # of what an executor makes: rounded once, after the warp
        self._made_in = torch.float32 if plan.augment.warps and not isinstance(plan, EvalPlan) else dtype
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self.bad_limit = max(8, len(plan.index) // 1000) if bad_limit is None else bad_limit
        self.on_bad = on_bad
        self._changed = ChangedFiles(plan.index)
        self._step: int | None = None  # of the next batch; None = not iterating

    def __len__(self) -> int:
        """The number of batches of one iteration. Raises TypeError when it has no end."""
        if self.stop is None:
            raise TypeError("this loader has no end")
        return max(0, self.stop - self.start)

    def __iter__(self) -> Loader:
        self.close()
        return self

    @property
    def bad_files(self) -> list[tuple[str, str]]:
        """(path, reason) of every file of this plan that turned out unreadable."""
        return [(self.plan.index.absolute(i), why) for i, why in self.plan.stand_ins.reasons.items()]

    def __next__(self) -> Batch:
        while True:
            step = self.start if self._step is None else self._step
            if self._exhausted(step):
                self._changed.tell_rest()
                self._release()
                self._step = step  # asked again, the answer is the same
                raise StopIteration
            try:
                if self._step is None:
                    self._open()
                images, plan = self._fetch(step)
            except BaseException:
                self.close()
                raise
            self._step = step + 1
            self._changed.tell()
            labels, ids = torch.from_numpy(plan.labels), torch.from_numpy(plan.ids)
            if not plan.kept.all():
                kept = torch.from_numpy(np.flatnonzero(plan.kept))
                images, labels, ids = images[kept.to(images.device)], labels[kept], ids[kept]
            if len(ids) > 0:
                self.followed = plan
                images = deliver(images, self.device)
                images = images if plan.affine is None else warped(images, plan.affine, self.plan.augment)
                batch = Batch(images.to(self.dtype), deliver(labels, self.device), deliver(ids, self.device))
                batch = batch if plan.mixing is None else mixed(batch, plan.mixing)
                return batch._replace(images=batch.images.contiguous(memory_format=self._layout))

    def _set_aside(self, plan: BatchPlan, i: int, why: str) -> None:
        """Image i of a batch cannot be read: from here on another one stands in for it."""
        reasons = self.plan.stand_ins.reasons
        if int(plan.ids[i]) in reasons:
            return
        self.plan.stand_ins.add(int(plan.ids[i]), why)
        self._changed.named(plan.paths[i])
        self.on_bad(plan.paths[i], why)
        if len(reasons) > self.bad_limit:
            files = "1 file" if len(reasons) == 1 else f"{len(reasons)} files"
            raise TooManyUnreadable(
                f"{files} of {self.plan.index.folder} cannot be read any more, more than the "
                f"{self.bad_limit} allowed; the last was {plan.paths[i]} ({why}); "
                f"{what_to_do(self.plan.index, reasons.values())}"
            )

    def close(self) -> None:
        """Ends the iteration, its threads and its memory. The next iteration begins at `start` again."""
        self._step = None
        self._release()
        self._changed.forget()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _exhausted(self, step: int) -> bool:
        return self.stop is not None and step >= self.stop

    # --- what an executor defines ---

    def _open(self) -> None:
        """Starts making batches from self.start on."""

    def _fetch(self, step: int) -> tuple[Tensor, BatchPlan]:
        """images [B, 3, S, S] channels_last on the CPU (or already on the device), and the plan they follow.

        Of float32 or _made_in; neither warped nor mixed.
        """
        raise NotImplementedError

    def _release(self) -> None:
        """Frees what _open took; called again it does nothing."""
