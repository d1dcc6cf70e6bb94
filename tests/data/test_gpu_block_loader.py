"""The executor of block packs on a GPU, without one: the CPU's op stands in for the kernel, and a list of what is
enqueued for the stream. tests/gpu has both on a GPU.
"""

import ctypes
import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from image_tree import photo, write_split
from loading import AUGMENT, batches, identical

from ijckd_fast.data import EvalPlan, Index, TrainPlan, build_index, make_loader
from ijckd_fast.data.blocks import views
from ijckd_fast.data.load import backends, gpu_blocks, gpu_memory
from ijckd_fast.data.load.gpu_blocks import GpuBlockLoader
from ijckd_fast.data.load.gpu_memory import Room, choose
from ijckd_fast.data.prepare import BlockPack
from ijckd_fast.errors import UserError

SMALL = BlockPack(short=40, shard_gb=9000 / 2**30, bits=7.5)
GIB = 1 << 30
ROOMY = Room(100 * GIB, 100 * GIB, 100 * GIB, 100 * GIB)
MODES = ["pinned", "gpu", "copies"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_split(root, "train", {"cat": 9, "dog": 9})
    write_split(root, "val", {"cat": 2, "dog": 2})
    photo(3, 2, 2).save(root / "train" / "cat" / "tiny.png")
    photo(300, 5, 4).save(root / "train" / "dog" / "wide-5.png")
    return root


@pytest.fixture
def index(out) -> Index:
    return build_index(out, "train")


class Lane:
    """A stream that does nothing before somebody waits for it, and then only what was enqueued until then."""

    def __init__(self, device) -> None:
        self.enqueued: list = []

    def run(self, work):
        self.enqueued.append(work)
        return len(self.enqueued)

    def join(self, done) -> None:
        for k in range(done):
            work, self.enqueued[k] = self.enqueued[k], lambda: None
            work()


def views_at(files, rows, bits, shift, scale, out):
    """By the CPU's op, which compares checksums, too."""
    contents = [
        torch.frombuffer((ctypes.c_uint8 * length).from_address(address), dtype=torch.uint8)
        if length
        else torch.empty(0, dtype=torch.uint8)
        for address, length in files.tolist()
    ]
    made = out if out.dtype != torch.float16 else out.float()
    assert not views(contents, rows, bits, shift, scale, made).any()
    out.copy_(made)


@pytest.fixture(autouse=True)
def gpu(monkeypatch) -> dict:
    """What the GPU and its driver say; to be changed."""
    said = {"room": ROOMY, "refused": None, "pinned": []}

    def pin(contents, device):
        said["pinned"].append(len(contents))
        return said["refused"]

    monkeypatch.setattr(gpu_blocks, "Lane", Lane)
    monkeypatch.setattr(gpu_blocks, "views_at", views_at)
    monkeypatch.setattr(gpu_memory, "pin", pin)
    monkeypatch.setattr(gpu_memory, "_STORES", {})
    monkeypatch.setattr(Room, "measured", classmethod(lambda cls, device: said["room"]))
    return said


def made(index: Index, mode: str, **settings):
    """Of 8 training steps the batches; and what was said of bad images."""
    said: list[tuple[str, str]] = []
    plan = TrainPlan(index, AUGMENT, 6, seed=0)
    with GpuBlockLoader(
        plan, blocks_on=mode, stop=8, bad_limit=20, on_bad=lambda *bad: said.append(bad), **settings
    ) as loader:
        return list(loader), said, loader


def on_the_cpu(index: Index, **settings):
    said: list[tuple[str, str]] = []
    plan = TrainPlan(index, AUGMENT, 6, seed=0)
    return batches("blocks", plan, stop=8, bad_limit=20, on_bad=lambda *bad: said.append(bad), **settings), said


@pytest.mark.parametrize("mode", MODES)
def test_the_bits_are_the_cpu_executors(index, mode):
    assert len(index.shards) > 2
    want, _ = on_the_cpu(index)
    for settings in ({}, {"prefetch": 1, "threads": 1}, {"prefetch": 5, "threads": 3}):
        got, said, loader = made(index, mode, **settings)
        assert identical(got, want)
        assert not said
        assert loader._store.on == mode
    half, *_ = made(index, mode, dtype=torch.float16)
    assert all(torch.equal(x.images, y.images.half()) for x, y in zip(half, want, strict=True))
    plan = TrainPlan(index, dataclasses.replace(AUGMENT, affine_rotate=30), 6, seed=0)
    for dtype in (torch.float32, torch.bfloat16):
        warps = list(GpuBlockLoader(plan, blocks_on=mode, stop=4, dtype=dtype))
        assert identical(warps, batches("blocks", plan, stop=4, dtype=dtype))
    whole = list(GpuBlockLoader(EvalPlan(index, AUGMENT, 7), blocks_on=mode))
    assert identical(whole, batches("blocks", EvalPlan(index, AUGMENT, 7)))


def test_a_batch_is_launched_ahead_and_made_when_it_is_waited_for(index):
    plan = TrainPlan(index, AUGMENT, 6, seed=0)
    with GpuBlockLoader(plan, blocks_on="gpu", prefetch=3, stop=8) as loader:
        iterator = iter(loader)
        next(iterator)
        for ahead in loader._ahead:
            for part in ahead.parts.values():
                part.result()
        next(iterator)
        assert len(loader._launched) in (2, 3)  # what was ahead, and perhaps what has begun since
        loader.close()
        assert not loader._launched


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("damage", ["altered", "gone"])
def test_damage_is_stood_in_for_as_on_the_cpu(index, mode, damage):
    shard = 1
    last = int(np.flatnonzero(index.members[:, 0] == shard)[-1])
    path = Path(index.root) / index.shards[shard]
    if damage == "gone":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[int(index.members[last, 1]) + 9] ^= 4
        path.write_bytes(content)
    want, said_there = on_the_cpu(index)
    got, said, _ = made(index, mode)
    assert identical(got, want)
    assert sorted(said) == sorted(said_there)
    assert len(said) >= 1


def test_what_is_on_the_gpu_is_read_once(index, gpu):
    """Files that change later are not seen; another loader of the same files finds them there."""
    want, *_ = made(index, "gpu")
    again, *_ = made(index, "gpu")
    assert identical(again, want)
    assert len(gpu_memory._STORES) == 1
    with GpuBlockLoader(TrainPlan(index, AUGMENT, 6, seed=0), blocks_on="gpu", stop=8, prefetch=1) as loader:
        next(iter(loader))
        for shard in index.shards:
            path = Path(index.root) / shard
            path.write_bytes(bytes(path.stat().st_size))
        rest = list(map(next, [loader] * 7))
    assert identical(rest, want[1:])
    assert gpu["pinned"] == []


def test_where_the_blocks_go():
    tight = ROOMY._replace(gpu_free=30 * GIB)
    for wanted, size, room, on, why in (
        ("gpu", 75 * GIB, ROOMY, "gpu", ""),
        ("gpu", 75 * GIB + 1, ROOMY, "pinned", "100.0 GiB free of 100.0 GiB: its blocks are read from pinned host"),
        ("gpu", 6 * GIB, tight, "pinned", r"P \(6.0 GiB\) must fit into the GPU's memory .* 30.0 GiB free of 100.0"),
        ("gpu", 90 * GIB, ROOMY, "copies", "--blocks-on pinned says; and P .* must fit into the host's memory"),
        ("pinned", 87 * GIB, ROOMY, "pinned", ""),
        ("pinned", 88 * GIB, ROOMY, "copies", "with an eighth of that left, found 100.0 GiB free of 100.0 GiB"),
        ("pinned", 1, Room(9, 9, 0, 0), "copies", "0.0 GiB free"),
        ("copies", 900 * GIB, ROOMY, "copies", ""),
    ):
        got, said = choose(wanted, size, room, "P")
        assert got == on
        assert bool(said) == bool(why)
        if why:
            with pytest.warns(UserWarning, match=why):
                warnings.warn(said, stacklevel=1)


def test_what_does_not_fit_or_is_refused_is_said_once_and_served(index, gpu):
    want, _ = on_the_cpu(index)
    gpu["room"] = ROOMY._replace(gpu_free=25 * GIB)
    with pytest.warns(UserWarning, match=r"the block pack .*/train \(0\.0 GiB\) must fit into the GPU's memory"):
        got, _, loader = made(index, "gpu")
    assert loader._store.on == "pinned"
    assert identical(got, want)
    gpu["room"], gpu["refused"] = ROOMY, "cudaHostRegister gave error 2"
    with pytest.warns(UserWarning, match=r"which the system refused \(cudaHostRegister gave error 2\).*ulimit -l"):
        got, _, loader = made(index, "pinned")
    assert loader._store.on == "copies"
    assert identical(got, want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(index, "pinned")


def test_all_files_are_pinned_or_none(monkeypatch):
    monkeypatch.undo()  # pin itself
    contents = [torch.zeros(n, dtype=torch.uint8) for n in (3, 4, 5)]
    calls = []

    class Runtime:
        def cudaHostRegister(self, address, length, flags):
            calls.append(("pin", address, length))
            return 2 if length == 5 and self.tight else 0

        def cudaHostUnregister(self, address):
            calls.append(("free", address))

    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    addresses = [content.data_ptr() for content in contents]
    runtime.tight = False
    assert gpu_memory.pin(contents, torch.device("cpu")) is None
    assert calls == [("pin", a, n) for a, n in zip(addresses, (3, 4, 5), strict=True)]
    runtime.tight = True
    assert "error 2 for 0.0 GiB, after 2 files" in gpu_memory.pin(contents, torch.device("cpu"))
    assert calls[6:] == [("free", addresses[0]), ("free", addresses[1])]


def test_memory_of_the_host(tmp_path):
    root = str(tmp_path)
    assert gpu_memory._host_memory(root) == (0, 0)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  100 kB\nMemFree:  10 kB\nMemAvailable:  60 kB\nHugePages: 0\n")
    assert gpu_memory._host_memory(root) == (60 * 1024, 100 * 1024)
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.stat").write_text("anon 10240\nfile 99\n")
    assert gpu_memory._host_memory(root) == (60 * 1024, 100 * 1024)
    (cgroup / "memory.max").write_text("40960\n")
    assert gpu_memory._host_memory(root) == (30 * 1024, 40 * 1024)
    assert all(0 < n < 1 << 50 for n in gpu_memory._host_memory())


def test_a_gpu_gets_the_gpus_executor(index, monkeypatch):
    plan, device = EvalPlan(index, AUGMENT, 8), torch.device("cuda")
    monkeypatch.setattr(backends, "load_libraries", lambda: True)  # whether they were built here or not
    loader = make_loader("auto", plan, device=device, blocks_on="gpu", dtype=torch.float16)
    assert type(loader) is GpuBlockLoader
    assert loader._blocks_on == "gpu"
    assert type(make_loader("auto", plan, blocks_on="gpu")) is gpu_blocks.BlockLoader
    with pytest.raises(UserError, match=r"makes float32 or bfloat16 or float16, found torch\.float64"):
        make_loader("blocks", plan, device=device, dtype=torch.float64)
    monkeypatch.setattr(backends, "load_libraries", lambda: False)
    with pytest.warns(UserWarning, match=r"are made on the CPU for want of the CUDA library"):
        assert type(make_loader("blocks", plan, device=device)) is gpu_blocks.BlockLoader
