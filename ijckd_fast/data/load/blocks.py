"""The executor of block packs on the CPU: views straight from the mapped files, by the op `block_views` on threads.

gpu_blocks.py has the one whose views a GPU makes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ijckd_fast.data.blocks import VIEW_COLUMNS, views
from ijckd_fast.data.index import Index
from ijckd_fast.data.load.loader import Loader, deliver
from ijckd_fast.data.load.pillow import blamed_on
from ijckd_fast.data.plan import BatchPlan, Plan
from ijckd_fast.data.sources import BlockPlace
from ijckd_fast.data.unreadable import Unreadable, blames_file
from ijckd_fast.errors import UserError

_PART = 32  # at most so many images of a batch are made by one thread at a time


def view_rows(index: Index, plan: BatchPlan) -> np.ndarray:
    """[B, 13] int64, the rows of `blocks.VIEW_COLUMNS` for a batch; the file is a position in index.shards."""
    assert index.members is not None
    rows = np.zeros((len(plan.ids), len(VIEW_COLUMNS)), np.int64)
    rows[:, 0:4] = index.members[plan.ids]
    rows[:, 4:6] = plan.size
    rows[:, 6:8] = plan.anchor
    rows[:, 8:10] = plan.shape
    if plan.resize is not None:
        rows[:, 10:12] = plan.resize
    rows[:, 12] = plan.flip
    return rows


class Mapped(NamedTuple):
    """A file of a block pack, mapped; what replaces it under its name is not seen."""

    memory: mmap.mmap
    content: Tensor  # [bytes] uint8

    @classmethod
    def of(cls, path: str) -> Mapped:
        """The pages are the system's own, which a GPU's driver can pin: of a private mapping it would pin copies."""
        with open(path, "rb", buffering=0) as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # torch makes no tensor of read-only memory without a warning; nothing is written to this one
        seen = np.frombuffer(memory, np.uint8)
        content = (ctypes.c_uint8 * len(seen)).from_address(seen.ctypes.data)
        content.mapped = seen  # type: ignore[attr-defined]  # which must live as long as a tensor of it does
        return cls(memory, torch.frombuffer(content, dtype=torch.uint8))

    @property
    def length(self) -> int:
        """Bytes that can be read now: to read behind the end of a file that was cut would end the process."""
        return min(self.memory.size(), len(self.content))

    def read_ahead(self, rows: np.ndarray) -> None:
        """Has the system read these images, if it has to, while others are decoded."""
        for offset, length in rows[rows[:, 1] + rows[:, 2] <= self.length, 1:3].tolist():
            start = offset - offset % mmap.PAGESIZE
            self.memory.madvise(mmap.MADV_WILLNEED, start, offset + length - start)


class Files:
    """The files of an index, each mapped when it is first used."""

    def __init__(self, index: Index) -> None:
        self._paths = [os.path.join(index.root, shard) for shard in index.shards]
        self._mapped: dict[int, Mapped | None] = {}

    def get(self, position: int) -> Mapped | None:
        """None where it cannot be opened: to read its images says why. Threads may ask for the same one at a time.

        raises  OSError that is the machine's, not the file's: too many files are open, no memory
        """
        if position not in self._mapped:
            try:
                self._mapped[position] = Mapped.of(self._paths[position])
            except (OSError, ValueError) as error:  # ValueError: an empty file
                if not blames_file(error):
                    raise
                self._mapped[position] = None
        return self._mapped[position]


class _Memory:
    """Batches' memory, taken again when nobody has the batch any more: the system would clear each new page first."""

    def __init__(self, keep: int) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=keep)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """[*shape] of dtype, with anything in it."""
        length = int(np.prod(shape)) * dtype.itemsize
        while self._free:
            memory = self._free.pop()
            if len(memory) == length:
                break
        else:
            memory = np.empty(length, np.uint8)
        lent = memory[:]  # what the tensor keeps, and whoever has a part of it
        weakref.finalize(lent, self._free.append, memory)
        return torch.from_numpy(lent).view(dtype).view(shape)


@dataclass(eq=False)
class Making:
    """A batch in the making. images: _room's; parts: [first, first + n) -> [n] uint8, 1 where it failed."""

    plan: BatchPlan
    rows: np.ndarray
    images: Any
    parts: dict[int, Future[Tensor]]


class BlockLoader(Loader):
    """See Loader. Of block packs alone, whose index has `blocks`.

    dtype  float32 or bfloat16, made by the threads; rounded once, so that bfloat16 is what float32 rounds to
    A GPU gets the levels as uint8, a quarter of the bytes, and normalises there: the same bits.
    An image whose bytes have another checksum than when it was packed, or whose file is shorter or gone, is unreadable.
    """

    DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    _pool: ThreadPoolExecutor | None = None
    _reader: ThreadPoolExecutor  # one that waits for the disk, so that the others need not

    def __init__(self, plan: Plan, **settings: object) -> None:
        super().__init__(plan, **settings)  # type: ignore[arg-type]
        assert plan.index.blocks is not None
        if self.dtype not in self.DTYPES:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.DTYPES)
            raise UserError(f"the data backend 'blocks' makes {names}, found {self.dtype}; take one")
        self._bits = plan.index.blocks
        self._memory = _Memory(self.prefetch + 2)
        self._files = Files(plan.index)

    def _open(self) -> None:
        augment = self.plan.augment
        shift = np.array(augment.mean, np.float32) * np.float32(255)
        scale = 1 / (np.array(augment.std, np.float32) * np.float32(255))
        self._shift, self._scale = shift.tolist(), scale.tolist()
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="block-loader")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="block-reader")
        self._ahead: deque[Making] = deque()
        self._planned = self.start

    def _fetch(self, step: int) -> tuple[Tensor, BatchPlan]:
        while len(self._ahead) <= self.prefetch and not self._exhausted(self._planned):
            self._ahead.append(self._begun(self.plan.batch(self._planned)))
            self._planned += 1
        making = self._ahead.popleft()
        while not self._all_made(making):
            self._mend(making, self.plan.batch(step))
        return self._delivered(making).permute(0, 3, 1, 2), making.plan

    def _begun(self, plan: BatchPlan) -> Making:
        assert self._pool is not None
        self._changed.ask(plan, self._pool)
        rows = view_rows(self.plan.index, plan)
        images = self._room(rows, plan.image_size)
        self._reader.submit(self._read_ahead, rows)
        size = min(_PART, -(-len(rows) // self.threads))
        parts = {
            first: self._pool.submit(self._make, rows[first : first + size], images[first : first + size])
            for first in range(0, len(rows), size)
        }
        return Making(plan, rows, images, parts)

    def _room(self, rows: np.ndarray, side: int) -> Any:
        """What the parts of a batch of rows [B, 13] are made to, taken apart by slices: [B, S, S, 3]."""
        shape = (len(rows), side, side, 3)
        if self.device.type == "cuda":
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)  # torch's own, kept until it is copied
        return self._memory.take(shape, self._made_in)

    def _read_ahead(self, rows: np.ndarray) -> None:
        for position in np.unique(rows[:, 0]).tolist():
            file = self._files.get(position)
            if file is not None:
                file.read_ahead(rows[rows[:, 0] == position])

    def _make(self, rows: np.ndarray, out: Any) -> Tensor:
        """What _room has for rows [n, 13]; returns [n] uint8, 1 where an image cannot be read."""
        own, numbers = rows.copy(), dict[int, int]()  # of the files that these rows need
        own[:, 0] = [numbers.setdefault(position, len(numbers)) for position in rows[:, 0].tolist()]
        mapped = [self._files.get(position) for position in numbers]
        there = [torch.empty(0, dtype=torch.uint8) if file is None else file.content for file in mapped]
        lengths = np.array([0 if file is None else file.length for file in mapped])
        good = own[:, 1] + own[:, 2] <= lengths[own[:, 0]]
        if good.all():
            return self._views(there, torch.from_numpy(own), out)
        status = torch.ones(len(rows), dtype=torch.uint8)
        for i in np.flatnonzero(good).tolist():  # one by one, into their places: this is rare
            row = torch.from_numpy(own[i : i + 1])
            status[i : i + 1] = self._views(there, row, out[i : i + 1])
        return status

    def _views(self, files: list[Tensor], rows: Tensor, out: Any) -> Tensor:
        """Of rows that lie within their files: [n] uint8, as `blocks.views`."""
        return views(files, rows, self._bits, self._shift, self._scale, out)

    def _all_made(self, making: Making) -> bool:
        """Waits for the whole batch; what cannot be read is set aside."""
        done = True
        for first, part in making.parts.items():
            for i in np.flatnonzero(part.result().numpy()).tolist():
                self._set_aside(making.plan, first + i, self._why(making.plan, first + i))
                done = False
        return done

    def _why(self, plan: BatchPlan, i: int) -> str:
        """What the matter is with image i of a batch, whose view could not be made."""
        assert plan.places is not None
        place = plan.places[i]
        assert isinstance(place, BlockPlace)
        try:
            with blamed_on(plan.paths[i]):
                place.read()
        except Unreadable as error:
            return error.why
        return f"{place.path} was replaced or written to while it was read"

    def _mend(self, making: Making, again: BatchPlan) -> None:
        """Makes what is another image in the plan's newer version of a batch."""
        assert self._pool is not None
        rows = view_rows(self.plan.index, again)
        making.parts = {
            i: self._pool.submit(self._make, rows[i : i + 1], making.images[i : i + 1])
            for i in np.flatnonzero(again.ids != making.plan.ids).tolist()
        }
        making.plan, making.rows = again, rows

    def _delivered(self, making: Making) -> Tensor:
        """[B, S, S, 3] of _made_in where the loader delivers them."""
        images = deliver(making.images, self.device)
        return images if images.dtype != torch.uint8 else normalised(images, self._shift, self._scale).to(self._made_in)

    def _release(self) -> None:
        if self._pool is not None:
            self._reader.shutdown(cancel_futures=True)
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            self._ahead.clear()
            self._memory = _Memory(self.prefetch + 2)


def normalised(levels: Tensor, shift: list[float], scale: list[float]) -> Tensor:
    """Levels [B, S, S, 3] uint8 -> (level - shift) * scale of each colour, float32, the bits of `blocks.views`."""
    shifts, scales = (deliver(torch.tensor(values), levels.device) for values in (shift, scale))  # [3] float32
    return levels.to(torch.float32).sub_(shifts).mul_(scales)
