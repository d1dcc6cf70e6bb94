"""The executor of block packs whose views a GPU makes, by the op `block_views_at`.

Threads of the host check the images, and copy them where that is asked for. Nothing waits for the GPU. A batch is made
on the loader's own stream, into memory of the stream on which it is used: the one waits for the other by events.
Batches are launched as soon as their images are checked, up to `prefetch` of them ahead of the one that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijckd_fast.data.blocks import check_rows, views_at
from ijckd_fast.data.load.blocks import BlockLoader, Files, Making
from ijckd_fast.data.load.gpu_memory import BlocksOn, Store, open_store
from ijckd_fast.data.load.loader import deliver
from ijckd_fast.data.plan import BatchPlan, Plan

_ALIGNMENT = 64  # bytes, of an image in a batch's copies
_CHECKED = 4096  # images that one thread checks at a time before they go to the GPU


@dataclass(frozen=True)
class Staging:
    """What a batch's threads need, and fill; a slice of it is that of these images.

    side    of the views
    starts  [n] int64, where each image's copy begins
    memory  [bytes] uint8, pinned: the copies; None where nothing is copied
    """

    side: int
    starts: np.ndarray
    memory: Tensor | None

    @classmethod
    def of(cls, rows: np.ndarray, side: int, copied: bool, pinned: bool) -> Staging:
        """For rows [n, 13]."""
        ends = np.cumsum(-(-rows[:, 2] // _ALIGNMENT) * _ALIGNMENT)
        size = int(ends[-1]) if copied else 0
        # torch's own pinned memory, which it lends again when the GPU has read it
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned) if copied else None
        return cls(side, np.concatenate([[0], ends[:-1]]), memory)

    def __getitem__(self, part: slice) -> Staging:
        return Staging(self.side, self.starts[part], self.memory)

    def copy(self, files: list[Tensor], rows: Tensor) -> None:
        """The images of rows [n, 13]."""
        assert self.memory is not None
        for start, (file, offset, length) in zip(self.starts.tolist(), rows[:, :3].tolist(), strict=True):
            self.memory[start : start + length] = files[file][offset : offset + length]


class Lane:
    """A GPU's stream beside the one on which batches are used."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[], Any]) -> torch.cuda.Event:
        """Enqueues work, after all that is enqueued on the current stream; what says that it is done."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            work()
            done.record(self._stream)
        return done

    def join(self, done: torch.cuda.Event) -> None:
        """What is enqueued on the current stream from here on comes after `done`."""
        torch.cuda.current_stream(self._device).wait_event(done)


class GpuBlockLoader(BlockLoader):
    """See Loader and BlockLoader: the same bits. Of block packs, on a GPU.

    blocks_on  where the GPU reads the blocks. gpu: in its own memory, to which all files go at the start. pinned: in
               the host's, where the mapped files are pinned; the blocks of each crop come over PCIe. copies: in its
               own, to which the images of each batch are copied. Where they do not fit, or are refused, the next of
               these serves, and a warning says so
    dtype      float32, bfloat16 or float16
    Checksums are compared by the host: of each image whenever its view is made, on the GPU at the start instead.
    """

    DTYPES = (torch.float32, torch.bfloat16, torch.float16)
    _store: Store | None = None
    _lane: Lane | None = None

    def __init__(self, plan: Plan, *, blocks_on: BlocksOn = "pinned", **settings: object) -> None:
        super().__init__(plan, **settings)
        self._blocks_on = blocks_on

    def _open(self) -> None:
        super()._open()
        if self._store is None:
            self._store = open_store(self.plan.index, self.device, self._blocks_on, self._faulty)
            self._files = self._store.files
        self._lane = Lane(self.device)
        self._launched: dict[Making, tuple[Tensor, torch.cuda.Event]] = {}

    def _faulty(self, files: Files, rows: np.ndarray) -> np.ndarray:
        """[n] bool, of rows [n, 13]: whose images cannot be read."""
        self._files = files
        parts = [rows[first : first + _CHECKED] for first in range(0, len(rows), _CHECKED)]
        with ThreadPoolExecutor(self.threads, thread_name_prefix="block-check") as pool:
            nothing = (Staging.of(part, 1, copied=False, pinned=False) for part in parts)
            return np.concatenate([status.numpy() for status in pool.map(super()._make, parts, nothing)]) > 0

    def _room(self, rows: np.ndarray, side: int) -> Staging:
        assert self._store is not None
        return Staging.of(rows, side, copied=self._store.on == "copies", pinned=self.device.type == "cuda")

    def _read_ahead(self, rows: np.ndarray) -> None:
        assert self._store is not None
        if self._store.on == "copies":
            super()._read_ahead(rows)

    def _make(self, rows: np.ndarray, out: Staging) -> Tensor:
        assert self._store is not None
        if self._store.on == "gpu":
            return torch.from_numpy(self._store.is_bad(rows).astype(np.uint8))
        return super()._make(rows, out)

    def _views(self, files: list[Tensor], rows: Tensor, out: Staging) -> Tensor:
        status = check_rows(files, rows, self._bits, out.side)
        if out.memory is not None:
            out.copy(files, rows)
        return status

    def _mend(self, making: Making, again: BatchPlan) -> None:
        """All of it anew: what stands in for an image may be longer."""
        fresh = self._begun(again)
        making.plan, making.rows, making.images, making.parts = fresh.plan, fresh.rows, fresh.images, fresh.parts

    def _delivered(self, making: Making) -> Tensor:
        assert self._lane is not None
        self._launch(making)
        for ahead in self._ahead:
            if not all(part.done() and not part.result().any() for part in ahead.parts.values()):
                break
            self._launch(ahead)
        images, done = self._launched.pop(making)
        self._lane.join(done)
        return images

    def _launch(self, making: Making) -> None:
        """Has the GPU make a batch whose images are good."""
        assert self._lane is not None
        if making in self._launched:
            return
        side, dtype = making.plan.image_size, self._made_in
        # of the current stream: given back there, it is not written to before what was enqueued until then is done
        images = torch.empty(len(making.rows), side, side, 3, dtype=dtype, device=self.device)
        self._launched[making] = images, self._lane.run(lambda: self._enqueue(making, images))

    def _enqueue(self, making: Making, images: Tensor) -> None:
        assert self._store is not None
        rows, table = making.rows, self._store.table
        copies = making.images.memory
        if copies is not None:
            rows = rows.copy()
            rows[:, 0], rows[:, 1] = 0, making.images.starts
            copies = deliver(copies, self.device)  # freed on this stream, after which its next user comes
            table = deliver(torch.tensor([[copies.data_ptr(), len(copies)]]), self.device)
        # the status is that of rows which do not fit, and the host has looked at these
        views_at(table, deliver(torch.from_numpy(rows), self.device), self._bits, self._shift, self._scale, images)

    def _release(self) -> None:
        if self._pool is not None and self._lane is not None:
            for _, done in self._launched.values():
                self._lane.join(done)  # before their memory is another's
            self._launched.clear()
        super()._release()
