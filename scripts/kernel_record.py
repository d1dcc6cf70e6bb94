"""What a step of a workload launches on a GPU, from the GPU's host code on emulated kernels: tests/emulator/record.py
in a process of its own, read into Launches.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = {p.name for p in (ROOT / "csrc").rglob("*.*") if p.suffix in (".cuh", ".cu", ".h")}
KINDS = ("load", "store", "atomic", "copy")


class Site(NamedTuple):
    """A place of the source at which a block touched global memory. copy: asynchronously, to shared memory."""

    kind: str
    lines: tuple[str, ...]  # "file:line", innermost first, then where that is inlined
    times: int  # of the thread that came there most often
    bytes_each: int  # of one access
    bytes: int  # of the block's threads together
    lowest: int  # address
    end: int


class TileCopies(NamedTuple):
    """What the tensor memory accelerator copied from one array."""

    array: int  # address
    array_bytes: int
    box_bytes: int
    receivers: int  # blocks of the cluster that each copy was for
    bytes: int  # that came to this block


@dataclass
class Block:
    """One that was run, and how many of the grid do the same work, nearly enough. Of a cluster's each has its share."""

    index: int
    multiplies: int = 0  # mma.sync instructions of warps
    warpgroup_multiplies: int = 0
    copies: int = 0  # asynchronous, of 16 bytes
    tile_copies: int = 0
    sites: list[Site] = field(default_factory=list)
    tiles: list[TileCopies] = field(default_factory=list)
    like_it: float = 1.0

    @property
    def work(self) -> tuple[int, ...]:
        """What tells blocks of different work apart."""
        return self.multiplies, self.warpgroup_multiplies, self.copies, self.tile_copies


@dataclass
class Launch:
    symbol: str  # the kernel's, mangled
    name: str  # without namespaces, with template arguments
    grid: tuple[int, int, int]
    threads: int
    dynamic_shared: int
    cooperative: int = 0  # 1: its blocks wait for one another
    cluster: int = 1  # blocks
    programmatic: int = 0  # 1: starts before the one before it has ended
    blocks: list[Block] = field(default_factory=list)

    @property
    def grid_blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


class Product(NamedTuple):
    """A GEMM of the library."""

    rows: int
    columns: int
    depth: int


class TorchKernel(NamedTuple):
    """An elementwise operation of torch."""

    name: str
    elements: int


@dataclass
class Step:
    workload: str
    launches: list[Launch | Product | TorchKernel]
    inputs: dict[str, tuple[int, int]]  # address and bytes


def record(workloads: Sequence[str], library: pathlib.Path | None = None) -> list[Step]:
    """What the workloads' steps launch. library: another than the one for real sizes, which is built where it is not.

    raises  RuntimeError, one sentence, where the emulator cannot be built or a step fails
    """
    if library is None:
        sys.path.append(str(ROOT / "tests"))
        from emulator import build

        if reason := build.why_not():
            raise RuntimeError(reason)
        library = build.built("recorded") / "_C.so"
    with tempfile.TemporaryDirectory() as folder:
        package = pathlib.Path(folder) / "ijckd_fast"
        shutil.copytree(ROOT / "ijckd_fast", package, ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
        (package / "head/_C.so").symlink_to(library)
        # memory that nobody has written to is 0, so that blocks that read what was not run find no saturated rows
        environment = dict(os.environ, PYTHONPATH=folder, MALLOC_PERTURB_="255", OMP_NUM_THREADS="1")
        command = [sys.executable, str(ROOT / "tests/emulator/record.py"), *workloads]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"recording {' '.join(workloads)} failed: {done.stderr[-2000:]}")
    steps = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return _read(steps, library)


def _read(steps: list[dict[str, Any]], library: pathlib.Path) -> list[Step]:
    rows = [[line.split() for line in step["launches"].splitlines()] for step in steps]
    codes = sorted({int(row[2]) - 1 for step in rows for row in step if row[0] == "access"})
    kernels = sorted({int(row[1]) for step in rows for row in step if row[0] == "launch"})
    lines, symbols = _source_lines(library, codes), _symbols(library, kernels)
    found = []
    for step, of_step in zip(steps, rows, strict=True):
        launches: list[Launch | Product | TorchKernel] = []
        for row in of_step:
            if row[0] == "product":
                launches.append(Product(*map(int, row[1:])))
                continue
            if row[0] == "launch":
                symbol, name = symbols[int(row[1])]
                x, y, z, a, b, c, *rest = map(int, row[2:])
                launches.append(Launch(symbol, name, (x, y, z), a * b * c, *rest))
                continue
            launch = launches[-1]
            assert isinstance(launch, Launch)
            _add(launch, row, lines)
        for launch in launches:
            if isinstance(launch, Launch):
                _share_out(launch)
        launches += [TorchKernel(k["name"], k["elements"]) for k in step["torch"]]
        inputs = {name: (address, size) for name, (address, size) in step["inputs"].items()}
        found.append(Step(step["workload"], launches, inputs))
    return found


def _add(launch: Launch, row: list[str], lines: dict[int, tuple[str, ...]]) -> None:
    """One line of the record after its launch's."""
    kind, numbers = row[0], list(map(int, row[1:]))
    if kind == "block":
        launch.blocks.append(Block(*numbers))
    elif kind == "access":
        which, code, most, times, size, lowest, end = numbers
        launch.blocks[-1].sites.append(Site(KINDS[which], lines[code - 1], most, size // times, size, lowest, end))
    else:
        launch.blocks[-1].tiles.append(TileCopies(*numbers))


def _share_out(launch: Launch) -> None:
    """How many of the grid's blocks each of those that were run stands for: up to halfway to its neighbours."""
    launch.blocks.sort(key=lambda block: block.index)
    last = launch.grid_blocks - 1
    for i, block in enumerate(launch.blocks):
        first = -0.5 if i == 0 else (launch.blocks[i - 1].index + block.index) / 2
        end = last + 0.5 if i == len(launch.blocks) - 1 else (launch.blocks[i + 1].index + block.index) / 2
        block.like_it = end - first


def _source_lines(library: pathlib.Path, codes: list[int]) -> dict[int, tuple[str, ...]]:
    """Of each address the lines of csrc that it comes from, innermost first."""
    text = "\n".join(map(hex, codes))
    command = ["addr2line", "-a", "-i", "-e", str(library)]
    output = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    found: dict[int, tuple[str, ...]] = {}
    at = 0
    for line in output.splitlines():
        if line.startswith("0x"):
            at = int(line, 16)
            found[at] = ()
        else:
            place = line.split()[0].rpartition("/")[2]
            if place.partition(":")[0] in SOURCES:
                found[at] += (place,)
    return found


def _symbols(library: pathlib.Path, kernels: list[int]) -> dict[int, tuple[str, str]]:
    """Of each kernel's address its mangled name and one to read."""
    listed = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True).stdout
    mangled = {int(row[0], 16): row[2] for row in map(str.split, listed.splitlines()) if len(row) == 3}
    symbols = [mangled[k] for k in kernels]
    readable = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    names = [short_name(line) for line in readable.splitlines()]
    return {k: (symbol, name) for k, symbol, name in zip(kernels, symbols, names, strict=True)}


def short_name(name: str) -> str:
    """`kernel<...>` of void namespaces::kernel<...>(...)."""
    name = name.replace("(anonymous namespace)::", "").replace("ijckd::", "").removeprefix("void ")
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name
