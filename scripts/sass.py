"""Reads what nvcc made of the CUDA kernels from the built library: instructions with the source lines that they come
from, what they wait for, registers, shared memory. Needs cuobjdump and nvdisasm; no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

# Of the 128 bits of an instruction those that steer its issue (Volta and newer), as bits of the upper half.
_STALL = 41  # 4 bits: cycles until the next
_SETS = 46  # 3 bits: the counter that its result ends
_WAITS = 52  # 6 bits: the counters that it waits for
_NO_COUNTER = 7

LOADS = ("LDG", "LD", "ATOMG", "ATOM")  # from global memory to registers
STORES = ("STG", "ST", "RED")


@dataclass
class Instruction:
    address: int
    name: str  # with its modifiers: LDG.E.64
    text: str
    lines: tuple[str, ...]  # "file:line" in the source, innermost first, then where that is inlined
    stall: int = 1  # cycles before the warp's next instruction
    waits: int = 0  # mask of the counters that must have come to 0
    sets: int | None = None  # the counter that ends with its result
    target: str | None = None  # label that it may go to

    @property
    def operation(self) -> str:
        return self.name.partition(".")[0]

    @property
    def is_load(self) -> bool:
        return self.operation in LOADS

    @property
    def is_store(self) -> bool:
        return self.operation in STORES

    @property
    def bytes(self) -> int:
        """What a thread loads or stores."""
        for modifier, size in ((".128", 16), (".64", 8), ("16", 2), (".U8", 1), (".S8", 1)):
            if modifier in self.name:
                return size
        return 4


@dataclass
class Loop:
    """Instructions [first, last] by index, of which the last goes back to the first."""

    first: int
    last: int


@dataclass
class Kernel:
    symbol: str  # mangled, as `plain_symbol` makes it
    registers: int = 0
    shared: int = 0  # static, with what the driver keeps
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index of the instruction after it

    def loops(self) -> list[Loop]:
        """Inner ones after those around them. A way back over the end of the program is no loop, but from code that was
        moved behind it, and a branch to itself is where the code ends.
        """
        found: dict[int, int] = {}
        ends = [i for i, x in enumerate(self.instructions) if x.text == "EXIT"]
        for i, x in enumerate(self.instructions):
            to = self.labels.get(x.target or "", len(self.instructions))
            if to < i and not any(to <= end < i for end in ends):
                found[to] = max(found.get(to, 0), i)
        return [Loop(first, last) for first, last in sorted(found.items(), key=lambda loop: (loop[0], -loop[1]))]

    def rounds(self) -> float:
        """How often the code waits for loads one after the other, each instruction once."""
        return Scoreboard(rounds_of).run(self.instructions)


def rounds_of(x: Instruction) -> float:
    """Of a load one, of all else none: what needs no result of it takes no time, and loads issued before the first is
    used come together.
    """
    return float(x.is_load)


class Scoreboard:
    """Time as one warp spends it: an instruction waits for the counters that it names, each of which ends when the last
    that sets it has come, `latency` after its issue.
    """

    def __init__(self, latency: Callable[[Instruction], float], stalls: bool = False) -> None:
        self.latency, self.stalls = latency, stalls
        self.now = 0.0
        self.ready: dict[int, float] = {}  # by counter

    def run(self, instructions: Iterable[Instruction]) -> float:
        """The time that these take, after what has run before; what nobody has waited for is not counted."""
        start = self.now
        for x in instructions:
            for counter, ready in self.ready.items():
                if x.waits >> counter & 1 and ready > self.now:
                    self.now = ready
            if x.sets is not None:
                self.ready[x.sets] = max(self.ready.get(x.sets, 0.0), self.now + self.latency(x))
            if self.stalls:
                self.now += x.stall
        return self.now - start


def plain_symbol(symbol: str) -> str:
    """A mangled name in which an anonymous namespace is called the same in every translation unit."""
    while found := re.search(r"(\d+)_GLOBAL__N__", symbol):
        length = found.end(1) + int(found[1])
        symbol = f"{symbol[: found.start()]}12_GLOBAL__N_1{symbol[length:]}"
    return symbol


def found_tool(name: str) -> str | None:
    """cuobjdump comes with requirements-dev.txt, nvdisasm with torch's Triton; the CUDA toolkit has both."""
    folders = [pathlib.Path(home, "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    for package, below in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        folders += [pathlib.Path(p, below) for p in (spec and spec.submodule_search_locations) or ()]
    return shutil.which(name) or next((str(f / name) for f in folders if (f / name).exists()), None)


def kernels_in(code: str, wanted: Collection[str] | None = None) -> Iterator[Kernel]:
    """The kernels in what `nvdisasm -c -gi -hex` prints; with `wanted` those of these symbols."""
    for section in re.split(r"^//-{8,} ", code, flags=re.MULTILINE):
        symbol = re.match(r"\.text\.(\w+)", section)
        if symbol and (wanted is None or plain_symbol(symbol[1]) in wanted):
            yield _kernel(plain_symbol(symbol[1]), section)


def _kernel(symbol: str, code: str) -> Kernel:
    kernel = Kernel(symbol)
    lines: list[str] = []  # of the comments before the next instruction
    fresh = False  # whether they are still being read
    for line in code.splitlines():
        if found := re.match(r'\s+//## File "([^"]*)", line (\d+)', line):
            if not fresh:
                lines, fresh = [], True
            lines.append(f"{found[1].rpartition('/')[2]}:{found[2]}")
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+((?:@!?\w+ )?([A-Z][\w.]*)[^;]*);\s+/\* 0x", line):
            fresh = False
            target = re.search(r"`\((\.L\w+)\)", found[2]) if found[3].startswith("BRA") else None
            x = Instruction(int(found[1], 16), found[3], found[2].strip(), tuple(lines))
            x.target = target[1] if target else None
            kernel.instructions.append(x)
        elif (found := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", line)) and kernel.instructions:
            x, bits = kernel.instructions[-1], int(found[1], 16)
            x.stall, x.waits = max(1, bits >> _STALL & 15), bits >> _WAITS & 0x3F
            counter = bits >> _SETS & 7
            x.sets = None if counter == _NO_COUNTER else counter
        elif found := re.match(r"(\.L\w+):", line):
            kernel.labels[found[1]] = len(kernel.instructions)
    return kernel


def read(
    library: pathlib.Path, architecture: str = "sm_90a", wanted: Collection[str] | None = None
) -> dict[str, Kernel]:
    """The library's kernels for that architecture, by symbol; with `wanted` those of these symbols.

    raises  RuntimeError, one sentence, where a tool or the code is missing
    """
    cuobjdump, nvdisasm = found_tool("cuobjdump"), found_tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        raise RuntimeError(
            f"{'nvdisasm' if cuobjdump else 'cuobjdump'} is not on this machine: "
            "pip install -r requirements-dev.txt, or set CUDA_HOME to a CUDA toolkit's folder"
        )

    def output(*command: str | pathlib.Path) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    kernels: dict[str, Kernel] = {}
    with tempfile.TemporaryDirectory() as folder:
        extract = [cuobjdump, "-xelf", architecture, library.resolve()]
        subprocess.run(extract, cwd=folder, capture_output=True, check=True)
        for part in sorted(pathlib.Path(folder).iterdir()):
            usage = re.findall(r"Function (\w+):\s+REG:(\d+) .*?SHARED:(\d+)", output(cuobjdump, "-res-usage", part))
            if wanted is not None and set(wanted).isdisjoint(plain_symbol(symbol) for symbol, _, _ in usage):
                continue
            code = output(nvdisasm, "-c", "-gi", "-hex", part)
            kernels |= {kernel.symbol: kernel for kernel in kernels_in(code, wanted)}
            for symbol, registers, shared in usage:
                if kernel := kernels.get(plain_symbol(symbol)):
                    kernel.registers, kernel.shared = int(registers), int(shared)
    if not kernels:
        raise RuntimeError(f"{library} has no code for {architecture}: build it again with nvcc for that architecture")
    return kernels
