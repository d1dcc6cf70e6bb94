"""Where the files of a block pack lie while a GPU makes views of them, and what is done where they do not fit there."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ijckd_fast.data.blocks import VIEW_COLUMNS
from ijckd_fast.data.index import Index
from ijckd_fast.data.load.blocks import Files
from ijckd_fast.data.load.loader import deliver

BlocksOn = Literal["pinned", "gpu", "copies"]
_CHUNK = 64 << 20  # bytes that are sent to the GPU at a time
_PINNED = 1 | 2 | 8  # cudaHostRegister's flags: portable, mapped, read-only


class Room(NamedTuple):
    """Bytes that are free, and all, on the GPU and on the host."""

    gpu_free: int
    gpu: int
    host_free: int
    host: int

    @classmethod
    def measured(cls, device: torch.device) -> Room:
        return cls(*torch.cuda.mem_get_info(device), *_host_memory())


def _host_memory(root: str = "/") -> tuple[int, int]:
    """(free, all) bytes: what the page cache has is free, and what a container may not have is not there.

    (0, 0) where the system does not say.
    """
    try:
        with open(os.path.join(root, "proc/meminfo")) as file:
            lines = (line.replace(":", "").split()[:2] for line in file)
            told = {name: 1024 * int(value) for name, value in lines}
        free, whole = told["MemAvailable"], told["MemTotal"]
    except (OSError, KeyError, ValueError):
        return 0, 0
    folder = os.path.join(root, "sys/fs/cgroup")
    with suppress(OSError, KeyError, ValueError):  # "max": no limit
        with open(os.path.join(folder, "memory.max")) as file:
            limit = int(file.read())
        with open(os.path.join(folder, "memory.stat")) as file:
            used = {name: int(value) for name, value in (line.split() for line in file)}["anon"]
        free, whole = min(free, max(0, limit - used)), min(whole, limit)
    return free, whole


def choose(wanted: BlocksOn, size: int, room: Room, what: str) -> tuple[BlocksOn, str]:
    """Where `size` bytes of files, called `what`, go, and if it is not where they are wanted, a sentence that says why.

    A quarter of the GPU's memory stays free for the nets, an eighth of the host's for its processes.
    """
    on, why = wanted, ""
    if on == "gpu" and size > room.gpu_free - room.gpu // 4:
        on = "pinned"
        why = (
            f"{what} ({_gib(size)}) must fit into the GPU's memory with a quarter of that left for training, found "
            f"{_gib(room.gpu_free)} free of {_gib(room.gpu)}: its blocks are read from pinned host memory instead, as "
            "--blocks-on pinned says"
        )
    if on == "pinned" and size > room.host_free - room.host // 8:
        on = "copies"
        why = f"{why}; and " * bool(why) + (
            f"{what} ({_gib(size)}) must fit into the host's memory to be pinned, with an eighth of that left, found "
            f"{_gib(room.host_free)} free of {_gib(room.host)}: the blocks of each batch are copied instead, as "
            "--blocks-on copies says"
        )
    return on, why


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def pin(contents: Sequence[Tensor], device: torch.device) -> str | None:
    """Pins the memory of mapped files, [bytes] uint8 each, where it lies: all, to the end of the process, or none.

    returns  why it cannot be pinned, or None
    """
    runtime = torch.cuda.cudart()
    for k, content in enumerate(contents):
        code = int(runtime.cudaHostRegister(content.data_ptr(), len(content), _PINNED))
        if code:
            with suppress(RuntimeError):  # the next launch finds what is left of the error, and raises it
                torch.zeros(1, device=device)
            for pinned in contents[:k]:
                runtime.cudaHostUnregister(pinned.data_ptr())
            return f"cudaHostRegister gave error {code} for {_gib(len(content))}, after {k} files"
    return None


def upload(content: Tensor, device: torch.device) -> Tensor:
    """A copy of [bytes] uint8 on the device. The host does not wait for it."""
    out = torch.empty(len(content), dtype=torch.uint8, device=device)
    for first in range(0, len(content), _CHUNK):
        out[first : first + _CHUNK].copy_(deliver(content[first : first + _CHUNK], device))
    return out


class Store:
    """The files of an index where a GPU finds them.

    on     where that is
    files  mapped
    table  [files, 2] int64 on the device: address and bytes of each file; not of copies
    """

    def __init__(
        self, index: Index, device: torch.device, wanted: BlocksOn, check: Callable[[Files, np.ndarray], np.ndarray]
    ) -> None:
        self.files = Files(index)
        positions = range(len(index.shards))
        contents = {k: mapped.content for k in positions if (mapped := self.files.get(k)) is not None}
        what = f"the block pack {index.folder}"
        self.on, why = choose(wanted, sum(map(len, contents.values())), Room.measured(device), what)
        if self.on == "pinned" and (refused := pin(list(contents.values()), device)) is not None:
            self.on = "copies"
            why = f"{why}; and " * bool(why) + (
                f"{what} must be pinned in the host's memory, which the system refused ({refused}): the blocks of each "
                "batch are copied instead, as --blocks-on copies says; see the limits on locked memory (ulimit -l, the "
                "container's own)"
            )
        if why:
            warnings.warn(why, stacklevel=2)
        self._bad = np.zeros(0, np.int64)
        if self.on == "gpu":
            rows = whole_images(index)
            self._bad = self._names(rows[check(self.files, rows)])
            contents = {k: upload(content, device) for k, content in contents.items()}
        self._contents = contents
        table = [[contents[k].data_ptr(), len(contents[k])] if k in contents else [0, 0] for k in positions]
        self.table = deliver(torch.tensor(table, dtype=torch.int64).reshape(-1, 2), device)

    def is_bad(self, rows: np.ndarray) -> np.ndarray:
        """[n] bool, of rows [n, 13]: whose bytes had another checksum, or were not there, when they went to the GPU."""
        return np.isin(self._names(rows), self._bad)

    @staticmethod
    def _names(rows: np.ndarray) -> np.ndarray:
        """[n] int64, a number for each image: no file has more than 2^44 bytes."""
        return rows[:, 0] << 44 | rows[:, 1]


def whole_images(index: Index) -> np.ndarray:
    """[images, 13] int64, rows of `blocks.VIEW_COLUMNS` of all images of an index, uncropped."""
    assert index.members is not None
    rows = np.zeros((len(index), len(VIEW_COLUMNS)), np.int64)
    rows[:, 0:4] = index.members
    rows[:, 4:6] = rows[:, 8:10] = index.sizes[:, ::-1]
    return rows


_STORES: dict[tuple[object, ...], Store] = {}


def open_store(
    index: Index, device: torch.device, wanted: BlocksOn, check: Callable[[Files, np.ndarray], np.ndarray]
) -> Store:
    """The Store of an index; the same one as long as its files are the same, to the end of the process.

    wanted  where the files shall lie; where they do, is said once if it is elsewhere
    check   of files and rows [n, 13]: [n] bool, of which the bytes are not what they were
    raises  OutOfMemory's errors, where the GPU has less memory than it says
    """
    key = (str(device), wanted, *_identity(index))
    if key not in _STORES:
        _STORES[key] = Store(index, device, wanted, check)
    return _STORES[key]


def _identity(index: Index) -> tuple[object, ...]:
    """What tells the files and images of an index from those of another, and from themselves once they have changed."""
    assert index.members is not None
    found: list[object] = [zlib.crc32(index.members.tobytes())]
    for shard in index.shards:
        path = os.path.join(index.root, shard)
        try:
            state = os.stat(path)
        except OSError:
            found.append(path)
        else:
            found.append((path, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns))
    return tuple(found)
