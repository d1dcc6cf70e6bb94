"""How long one block of a launch is on its way through its kernel's compiled code, by what the emulator saw of it.

The code says in which order a thread loads, waits and stores; the record of an emulated block (kernel_record.py) says
which of the code's loads and stores were executed, and how often. Both name the source lines, which joins them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from kernel_record import SOURCES, Site
from sass import Instruction, Kernel, Loop, Scoreboard, rounds_of

TENSOR_CORES = ("HGMMA", "HMMA")

# Cycles until a result may be used, of instructions whose time the compiler does not know. Shared memory, shuffles and
# special functions: Luo et al., arXiv 2402.13499; the others estimates in between.
LATENCY = {"LDS": 30, "LDSM": 33, "SHFL": 25, "MUFU": 23, "S2R": 25, "LDC": 30, "ATOMS": 60, "SYNCS": 25}
OTHER_LATENCY = 20


@dataclass
class Path:
    cycles: float = 0  # of a warp outside the main loop, waits for loads included
    rounds: float = 0  # of loads that wait for others, outside the main loop
    instructions: float = 0  # of a warp, outside the main loop
    main_rounds: float = 0  # in the main loop, all turns together
    multiply_columns: int = 0  # N of the warpgroup instruction m64nNk16, 0: none
    unknown: float = 0  # share of the executed accesses' bytes of which the code has no such line


Place = tuple[bool, tuple[str, ...]]  # whether a load, and its lines
Places = frozenset[Place]  # of one access, where the code has it more than once


class Traffic:
    """The executed accesses of a block, by the places that the compiled code has for them."""

    def __init__(self, kernel: Kernel, sites: Sequence[Site]) -> None:
        self.bytes: dict[Places, float] = {}  # of the busiest thread
        self.unknown = 0.0  # of these, at lines that the code does not name
        self.known: dict[Place, list[Places]] = {}
        named = {self.place(x) for x in kernel.instructions if x.is_load or x.is_store}
        executed = {line for site in sites for line in site.lines}
        for site in sites:
            if site.kind == "copy":
                continue
            places = _places((site.kind != "store", site.lines), named, executed)
            moved = site.times * site.bytes_each
            if places:
                self.bytes[places] = self.bytes.get(places, 0) + moved
            else:
                self.unknown += moved

    @staticmethod
    def place(x: Instruction) -> Place:
        return x.is_load, tuple(line for line in x.lines if line.partition(":")[0] in SOURCES)

    def of(self, x: Instruction) -> list[Places]:
        """The executed accesses that x may be."""
        place = self.place(x)
        if place not in self.known:
            self.known[place] = [places for places in self.bytes if place in places]
        return self.known[place]


def _places(place: Place, named: set[Place], executed: set[str]) -> Places:
    """What the code calls it: its lines, or with fewer or more of the functions around them, as far as those were
    inlined there. Of several callers the one that lies nearest to lines that were executed. If it has none of these,
    the place with most lines in common: nvcc gives instructions that it has merged the lines of one of them. Empty: no
    line in common.
    """
    load, lines = place
    same = [other for other in named if other[0] == load and lines and other[1] and _agree(other[1], lines)]
    if not same:
        alike = {other: len(set(other[1]) & set(lines)) for other in named if other[0] == load}
        best = max(alike.values(), default=0)
        return frozenset([min(other for other, n in alike.items() if n == best)] if best else [])

    def distance(caller: str) -> int:
        file, _, line = caller.partition(":")
        there = [int(e.partition(":")[2]) for e in executed if e.startswith(f"{file}:")]
        return min((abs(int(line) - e) for e in there), default=1 << 20)

    longer = [other for other in same if len(other[1]) > len(lines)]
    nearest = min((distance(other[1][len(lines)]) for other in longer), default=0)
    return frozenset(o for o in same if o not in longer or distance(o[1][len(lines)]) == nearest)


def _agree(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Whether one begins with the other."""
    return all(x == y for x, y in zip(a, b, strict=False))


def block_path(kernel: Kernel, sites: Sequence[Site], load_cycles: float) -> Path:
    """Of a block that made these accesses, where a load takes `load_cycles`."""
    code, traffic = kernel.instructions, Traffic(kernel, sites)
    loops = kernel.loops()
    inner = _innermost(loops, len(code))
    main = [n for n, loop in enumerate(loops) if _multiplies(code, loop, inner, n)]
    trips, executed = _trips(code, loops, inner, traffic)
    live = _live(kernel, executed)

    def latency(x: Instruction) -> float:
        return load_cycles if x.is_load else LATENCY.get(x.operation, OTHER_LATENCY)

    path = Path(unknown=traffic.unknown / max(1.0, traffic.unknown + sum(traffic.bytes.values())))
    wide = [x.name for x in code if x.operation == "HGMMA"]
    path.multiply_columns = int(wide[0].split("x")[1]) if wide else 0
    once = [x for x, of, lives in zip(code, inner, live, strict=True) if of is None and lives]
    path.cycles = Scoreboard(latency, stalls=True).run(once)
    path.rounds = Scoreboard(rounds_of).run(once)
    path.instructions = len(once)
    for n, loop in enumerate(loops):
        own = [code[i] for i in range(loop.first, loop.last + 1) if inner[i] == n and live[i]]
        if not own or not trips[n]:
            continue
        if n in main:
            path.main_rounds += trips[n] * _steady(own, rounds_of, stalls=False)
            continue
        path.cycles += trips[n] * _steady(own, latency, stalls=True)
        path.rounds += trips[n] * _steady(own, rounds_of, stalls=False)
        path.instructions += trips[n] * len(own)
    return path


def _innermost(loops: list[Loop], n: int) -> list[int | None]:
    """Of each instruction the loop it belongs to."""
    found: list[int | None] = [None] * n
    for i, loop in enumerate(loops):  # outer ones first
        found[loop.first : loop.last + 1] = [i] * (loop.last + 1 - loop.first)
    return found


def _multiplies(code: list[Instruction], loop: Loop, inner: list[int | None], n: int) -> bool:
    return any(inner[i] == n and code[i].operation in TENSOR_CORES for i in range(loop.first, loop.last + 1))


def _live(kernel: Kernel, executed: list[bool]) -> list[bool]:
    """Which instructions the block came to: stretches without a jump that touch memory did if one of their accesses was
    executed, the others as the stretch before them.
    """
    code = kernel.instructions
    starts = {0, *kernel.labels.values()}
    starts |= {i + 1 for i, x in enumerate(code) if x.operation in ("BRA", "EXIT", "BRX")}
    live = [True] * len(code)
    bounds = [*sorted(s for s in starts if s < len(code)), len(code)]
    lives = True
    for first, end in itertools.pairwise(bounds):
        accesses = [i for i in range(first, end) if code[i].is_load or code[i].is_store]
        if accesses:
            lives = any(executed[i] for i in accesses)
        live[first:end] = [lives] * (end - first)
    return live


def _trips(
    code: list[Instruction], loops: list[Loop], inner: list[int | None], traffic: Traffic
) -> tuple[list[int], list[bool]]:
    """How often each loop was run, by the bytes that its own accesses moved, and which accesses were executed. Inner
    loops come first, of several for the same lines, as unrolling makes them, the one that takes most at a time; what
    they leave was moved by the code around them.
    """
    left = dict(traffic.bytes)
    executed = [False] * len(code)
    trips = [0] * len(loops)
    own = [[i for i in range(x.first, x.last + 1) if inner[i] == n] for n, x in enumerate(loops)]
    accesses = [[i for i in of if code[i].is_load or code[i].is_store] for of in own]
    depth = [sum(y.first <= x.first and x.last <= y.last for y in loops) for x in loops]
    size = [sum(code[i].bytes for i in of) for of in accesses]

    def run(instructions: list[int]) -> dict[Places, float]:
        """The bytes of one turn, by place; of those that were executed, as far as is known so far."""
        moved: dict[Places, float] = {}
        for i in instructions:
            sites = [site for site in traffic.of(code[i]) if left[site] > 0]
            executed[i] = bool(sites)
            for site in sites:
                moved[site] = moved.get(site, 0) + code[i].bytes
        return moved

    for n in sorted(range(len(loops)), key=lambda n: (-depth[n], -size[n])):
        if not accesses[n]:
            trips[n] = 1
            continue
        moved = run(accesses[n])
        trips[n] = max((int(left[site] / of_turn) for site, of_turn in moved.items()), default=0)
        for site, of_turn in moved.items():
            left[site] = max(0.0, left[site] - trips[n] * of_turn)
    run([i for i, of in enumerate(inner) if of is None and (code[i].is_load or code[i].is_store)])
    return trips, executed


def _steady(own: list[Instruction], latency, stalls: bool) -> float:
    """One turn of a loop that goes on."""
    scoreboard = Scoreboard(latency, stalls)
    scoreboard.run(own)
    return scoreboard.run(own)
