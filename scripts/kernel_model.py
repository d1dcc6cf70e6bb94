"""Models how long the head's kernels take on an H200, launch by launch: `scripts/benchmark.py model --help`.

Nothing runs on a GPU. What is launched is recorded from the GPU's host code on emulated kernels at the true sizes
(kernel_record.py), what a block does on its way is read from the compiled library (sass.py, kernel_path.py), and the
constants below say what that takes. docs/kernels.md has the formulas in words.
"""

from __future__ import annotations

import argparse
import csv
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import built_from
import kernel_path
import kernel_record
import records
import sass
from kernel_record import Block, Launch, Product, Site, Step, TorchKernel

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "ijckd_fast/head/_C_cuda.so"
DEFAULT = ["W1", "W2", "W3", "W3b", "W1-kl", "W2-kl", "W3-kl", "W1-wttm", "W1-nkd", "W1-standardised-kl"]
DEFAULT += ["I1", "I2"]


class Constant(NamedTuple):
    value: float
    unit: str
    source: str


LUO = "Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture, arXiv 2402.13499"
WHITEPAPER = "NVIDIA H100 Tensor Core GPU Architecture, whitepaper"
A100 = "NVIDIA A100 Tensor Core GPU Architecture, whitepaper; Hopper's taken as the same"
GUIDE = "CUDA C++ Programming Guide, compute capability 9.0"

CONSTANTS = {
    "multiprocessors": Constant(132, "", f"{WHITEPAPER}: SXM5; the H200 has the same chip"),
    "clock": Constant(1850, "MHz", "estimate: the whitepaper's peak is at 1830, an idle H200 reads 1980"),
    "wgmma": Constant(4096, "operations a cycle on each", f"{WHITEPAPER}: 989 TFLOP/s, dense, of 132 at 1830 MHz"),
    "mma_sync": Constant(0.62, "of wgmma's rate", LUO),
    "sustained": Constant(
        790, "TFLOP/s", "torch.matmul of 8192 x 8192 random values on an H200: power bounds the clock"
    ),
    "library_gemm": Constant(0.9, "of the sustained rate", "estimate"),
    "library_start": Constant(2, "us", "estimate: prologue, epilogue and tail of a library GEMM"),
    "l2": Constant(5120, "bytes a cycle", A100),
    "l2_port": Constant(64, "bytes a cycle on each", A100),
    "l2_keeps": Constant(45, "MB", "estimate: of the H200's 60, both halves keeping some of each other's"),
    "dram": Constant(4.3, "TB/s", "torch's copy on an H200, bytes read and written; the data sheet says 4.8"),
    "l2_latency": Constant(270, "cycles", f"{LUO}: 262 for a hit; the far half is farther"),
    "dram_latency": Constant(830, "cycles", "estimate: 0.45 us"),
    "tile_latency": Constant(170, "cycles more than a load", f"{LUO}: the tensor memory accelerator's"),
    "block_start": Constant(600, "cycles", "estimate: a block's start, parameters, first instructions, tensor maps"),
    "boundary": Constant(1.1, "us", "estimate: from a launch's last block to the next one's first, in a CUDA graph"),
    "programmatic": Constant(0.4, "us", "estimate: what programmatic dependent launch leaves of that"),
    "grid_barrier": Constant(1.2, "us", "estimate: a barrier of all blocks"),
    "elementwise": Constant(0.8, "us", "estimate: the least that an elementwise kernel of torch takes"),
    "registers": Constant(65536, "on each", GUIDE),
    "shared": Constant(233472, "bytes on each", GUIDE),
    "shared_kept": Constant(1024, "bytes of each block", GUIDE),
    "threads": Constant(2048, "on each", GUIDE),
    "blocks": Constant(32, "on each", GUIDE),
}


def constant(name: str) -> float:
    return CONSTANTS[name].value


def us(cycles: float) -> float:
    return cycles / constant("clock")


def resident_blocks(threads: int, registers: int, shared: int) -> int:
    """How many blocks stand on a multiprocessor at a time; shared: bytes of each, static and dynamic."""
    warps = math.ceil(threads / 32)
    of_warp = math.ceil(registers * 32 / 256) * 256  # given out to warps, whose share lies in one of four quarters
    in_quarter = int(constant("registers") / 4 // max(1, of_warp))
    by_registers = 4 * in_quarter // (math.ceil(warps / 4) * 4) if warps > 1 else 4 * in_quarter
    by_shared = constant("shared") // (math.ceil((shared + constant("shared_kept")) / 128) * 128)
    return int(min(constant("blocks"), constant("threads") // (warps * 32), by_registers, by_shared))


@dataclass
class Memory:
    """What of the step's arrays lies in the L2, by how much was touched since each was."""

    arrays: list[list[int]] = field(default_factory=list)  # [address, end], found or merged as accesses show them
    touched: dict[int, float] = field(default_factory=dict)  # by address: bytes touched up to its last use
    so_far: float = 0

    def array(self, lowest: int, end: int) -> tuple[int, int]:
        """The array that an access lies in."""
        for a in self.arrays:
            if a[0] <= lowest and end <= a[1]:
                return a[0], a[1]
        self.arrays.append([lowest, end])
        return lowest, end

    def misses(self, array: tuple[int, int], size: float) -> float:
        """Of `size` bytes touched in it those that come from memory; from now on it was used."""
        last = self.touched.get(array[0])
        gone = last is None or self.so_far - last > constant("l2_keeps") * 1e6
        self.so_far += size
        self.touched[array[0]] = self.so_far
        return size if gone else 0.0


@dataclass
class Modelled:
    kernel: str
    launch: str  # grid x threads
    us: float
    of: dict[str, float] = field(default_factory=dict)  # the terms, in microseconds; the largest with `start` make `us`
    registers: int = 0
    resident: int = 0
    waves: float = 0
    rounds: float = 0  # the most of any block outside the main loop
    dram_mb: float = 0
    l2_mb: float = 0


def model_launch(launch: Launch, kernel: sass.Kernel, memory: Memory) -> Modelled:
    """One launch of ours. Terms: `path`, the longest way of blocks that follow one another; `tensor`, `issue`: what the
    busiest multiprocessor does; `l2`, `dram`: what the chip moves; `start`: before the first block.
    """
    chip, blocks = constant("multiprocessors"), launch.grid_blocks
    resident = resident_blocks(launch.threads, kernel.registers, kernel.shared + launch.dynamic_shared)
    if resident == 0:
        raise RuntimeError(
            f"{launch.name} fits no multiprocessor: {launch.threads} threads of {kernel.registers} registers, "
            f"{kernel.shared + launch.dynamic_shared} bytes of shared memory"
        )
    from_memory = _from_memory(launch, memory)
    first = constant("dram_latency" if from_memory else "l2_latency")
    ways = [_block_way(launch, block, kernel, first) for block in launch.blocks]

    def total(of: Callable[[Way], float]) -> float:
        return sum(block.like_it * of(way) for block, way in zip(launch.blocks, ways, strict=True))

    waves = math.ceil(blocks / (chip * resident))
    busiest = math.ceil(blocks / chip) / blocks  # the share of the work that falls to one multiprocessor
    longest = max(way.alone for way in ways)
    ends = max((way.alone - way.main for way in ways if way.main), default=first)  # before and after the main loop
    power = total(lambda way: way.operations) / constant("sustained") / 1e6
    moved, copied = total(lambda way: way.bytes), total(lambda way: way.copied)
    of = {
        "start": constant("programmatic" if launch.programmatic else "boundary"),
        "path": us(max(longest, waves * total(lambda way: way.alone) / blocks)),
        "tensor": max(us(busiest * total(lambda way: way.tensor)), power) + us(ends) if power else 0.0,
        "issue": us(busiest * total(lambda way: way.issue) + first),
        "l2": us(max(moved / constant("l2") + first, copied / constant("l2") + ends)),
        "dram": from_memory / constant("dram") / 1e6 + us(first),
    }
    if launch.cooperative:
        of["start"] += constant("grid_barrier")
    return Modelled(
        kernel=launch.name,
        launch=f"{'x'.join(str(n) for n in launch.grid if n > 1) or 1} x {launch.threads}",
        us=of["start"] + max(time for term, time in of.items() if term != "start"),
        of=of,
        registers=kernel.registers,
        resident=resident,
        waves=blocks / (chip * resident),
        rounds=max(way.rounds for way in ways),
        dram_mb=from_memory / 1e6,
        l2_mb=moved / 1e6,
    )


class Way(NamedTuple):
    """One block, in cycles; bytes that it moves through the L2."""

    alone: float
    main: float
    tensor: float
    issue: float
    bytes: float
    copied: float
    operations: float
    rounds: float


def _block_way(launch: Launch, block: Block, kernel: sass.Kernel, first: float) -> Way:
    path = kernel_path.block_path(kernel, block.sites, constant("l2_latency"))
    if path.unknown > 0.3:
        raise RuntimeError(
            f"{LIBRARY.name} was built of other sources than csrc/: {path.unknown:.0%} of what {launch.name} moves are "
            f"at lines that its code does not have; run python setup.py build_ext --inplace"
        )
    operations = block.warpgroup_multiplies * 64 * path.multiply_columns * 16 * 2 + block.multiplies * 4096
    tensor = block.warpgroup_multiplies * 64 * path.multiply_columns * 16 * 2 / constant("wgmma")
    tensor += block.multiplies * 4096 / (constant("wgmma") * constant("mma_sync"))
    loads = sum(site.bytes for site in block.sites if site.kind in ("load", "atomic"))
    stores = sum(site.bytes for site in block.sites if site.kind == "store")
    asynchronous = 16 * block.copies
    landed = sum(tile.bytes for tile in block.tiles) + asynchronous
    read = sum(tile.bytes / tile.receivers for tile in block.tiles) + asynchronous
    of_main = loads if path.main_rounds else 0
    main = 0.0
    if landed:
        latency = constant("l2_latency") + (constant("tile_latency") if block.tiles else 0)
        landing = latency * landed / _in_flight(launch, block)
        port = (landed + of_main) / constant("l2_port")
        main = max(tensor, port, landing, path.main_rounds * constant("l2_latency"))
    fill = first + (constant("tile_latency") if block.tiles else 0)
    alone = constant("block_start") + fill + main + path.cycles
    issue = path.instructions * math.ceil(launch.threads / 32) / 4
    return Way(alone, main, tensor, issue, read + loads + stores, read + of_main, operations, path.rounds)


def _in_flight(launch: Launch, block: Block) -> float:
    """Bytes of copies under way: all stages but the one that is multiplied."""
    if not block.tiles:
        return launch.dynamic_shared * 2 / 3
    steps = min(tile.bytes / tile.box_bytes for tile in block.tiles)
    stage = sum(tile.bytes for tile in block.tiles) / steps
    return max(stage, (launch.dynamic_shared // stage - 1) * stage)


def _from_memory(launch: Launch, memory: Memory) -> float:
    """Bytes that the launch reads from memory, or writes there, being more than the L2 keeps beside others."""
    touched: dict[tuple[int, int], float] = {}

    def touch(lowest: int, end: int, size: float) -> None:
        array = memory.array(lowest, end)
        touched[array] = min(array[1] - array[0], touched.get(array, 0) + size)

    sites: dict[tuple[str, tuple[str, ...]], list[tuple[Block, Site]]] = {}
    for block in launch.blocks:
        for tile in block.tiles:
            touch(tile.array, tile.array + tile.array_bytes, block.like_it * tile.bytes / tile.receivers)
        for site in block.sites:
            sites.setdefault((site.kind, site.lines), []).append((block, site))
    written = 0.0
    for (kind, _), found in sites.items():
        lowest, end = min(site.lowest for _, site in found), max(site.end for _, site in found)
        size = min(end - lowest, sum(block.like_it * site.bytes for block, site in found))
        if kind != "store":
            touch(lowest, end, size)
            continue
        memory.misses(memory.array(lowest, end), size)
        written += size if size > constant("l2_keeps") * 1e6 / 2 else 0
    return written + sum(memory.misses(array, size) for array, size in touched.items())


def _of_others(kernel: str, of: dict[str, float]) -> Modelled:
    return Modelled(kernel, "", of["start"] + max(time for term, time in of.items() if term != "start"), of)


def model_product(p: Product) -> Modelled:
    operations = 2 * p.rows * p.columns * p.depth
    size = 2 * (p.rows * p.columns + p.rows * p.depth + p.columns * p.depth)
    of = {
        "start": constant("boundary") + constant("library_start"),
        "tensor": operations / (constant("sustained") * constant("library_gemm")) / 1e6,
        "dram": size / constant("dram") / 1e6,
    }
    return _of_others(f"library GEMM {p.rows} x {p.columns} x {p.depth}", of)


def model_torch(k: TorchKernel) -> Modelled:
    """An operation that reads 4 bytes of each element and writes 2, or the other way round, as casts do."""
    of = {
        "start": constant("boundary"),
        "path": constant("elementwise"),
        "dram": 6 * k.elements / constant("dram") / 1e6,
    }
    return _of_others(f"torch {k.name} of {k.elements}", of)


def model_step(step: Step, kernels: dict[str, sass.Kernel]) -> list[Modelled]:
    memory = Memory([[address, address + size] for address, size in step.inputs.values()])
    found = []
    for launch in step.launches:
        if isinstance(launch, Product):
            found.append(model_product(launch))
        elif isinstance(launch, TorchKernel):
            found.append(model_torch(launch))
        elif launch.symbol not in kernels:
            raise RuntimeError(f"{LIBRARY.name} has no {launch.name}: it was built of other sources; build it again")
        else:
            found.append(model_launch(launch, kernels[launch.symbol], memory))
    return found


def floor_us(w: Any) -> float:
    """The least that any implementation takes: the step's products at the sustained rate, or every input and gradient
    through memory once. w: benchmark.Workload
    """
    rows = w.B * max(1, w.side**2)
    operations, size = 0.0, 0.0
    if w.Cs is not None:  # z or the map, and both gradients
        operations += 3 * 2 * rows * w.Cs * w.Ct
        size += 2 * rows * w.Cs * 2 + 4 * w.Ct * w.Cs * 2
    if w.side:
        size += 2 * rows * w.Ct  # the teacher's map
    if w.K is not None:
        operations += 2 * 2 * w.B * w.Ct * w.K
        size += 2 * w.K * w.Ct + 4 * w.B * w.Ct
        if not w.ce_only:  # the teacher's logits, or d^T G d
            operations += 2 * w.B * w.Ct * (min(w.K, w.Ct) if w.match == "sr" else w.K)
    return max(operations / constant("sustained"), size / constant("dram")) / 1e6


# --------------------------------------------------------------------------------------------------------------------
# the command

TERMS = ("start", "path", "tensor", "issue", "l2", "dram")
COLUMNS = ("note", "workload", "position", "kernel", "launch", "us", "bound", *(f"{term}_us" for term in TERMS))
COLUMNS += ("registers", "resident", "waves", "rounds", "dram_mb", "l2_mb", "floor_us", "measured_us", "commit", "date")


def measured_kernels(path: pathlib.Path | None) -> dict[str, list[tuple[str, float]]]:
    """(kernel's name, microseconds of a launch) by workload, one for every launch of ours, from rows of
    `op --kernels`.
    """
    from ijckd_fast.errors import UserError

    found: dict[str, list[tuple[str, float]]] = {}
    if path is None:
        return found
    if not path.exists():
        raise UserError(f"--measured: there is no file {path}")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if missing := {"workload", "kernel", "us"} - set(reader.fieldnames or ()):
            raise UserError(
                f"--measured: {path} has no column {', '.join(sorted(missing))}: op --kernels makes such files"
            )
        for row in reader:
            if row.get("contender", "ours") == "ours":  # ours-graph runs the same kernels
                launches = [(row["kernel"], float(row["us"]))] * int(row.get("count") or 1)
                found.setdefault(row["workload"], []).extend(launches)
    return found


def _plain(name: str) -> str:
    """A kernel's name without what profilers and c++filt write differently."""
    return kernel_record.short_name(name).replace(" ", "").replace("(int)", "").replace("(bool)", "")


def rows_of(
    step: Step, modelled: Sequence[Modelled], floor: float, measured: Sequence[tuple[str, float]]
) -> list[dict[str, Any]]:
    """A row for each launch, then their sum."""
    times = {_plain(name): time for name, time in measured}
    rows: list[dict[str, Any]] = []
    for position, x in enumerate(modelled):
        bound = max((term for term in x.of if term != "start"), key=lambda term: x.of[term])
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row |= {"workload": step.workload, "position": position, "kernel": x.kernel, "launch": x.launch}
        row |= {"us": round(x.us, 2), "bound": bound, "measured_us": times.get(_plain(x.kernel), "")}
        row |= {f"{term}_us": round(x.of[term], 2) for term in TERMS if term in x.of}
        if x.registers:
            row |= {"registers": x.registers, "resident": x.resident, "waves": round(x.waves, 2)}
            row |= {"rounds": round(x.rounds, 1), "dram_mb": round(x.dram_mb, 2), "l2_mb": round(x.l2_mb, 2)}
        rows.append(row)
    total = dict.fromkeys(COLUMNS, "")
    total |= {"workload": step.workload, "kernel": "sum", "launch": f"{len(rows)} launches"}
    total |= {"us": round(sum(x.us for x in modelled), 2), "floor_us": round(floor, 2)}
    if measured:
        total["measured_us"] = round(sum(time for _, time in measured), 2)
    return [*rows, total]


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        if row["kernel"] == "sum":
            seen = f", measured {row['measured_us']}" if row["measured_us"] != "" else ""
            print(
                f"{row['workload']}: {row['us']:.1f} us modelled, floor {row['floor_us']:.1f}{seen}, {row['launch']}\n"
            )
            continue
        terms = "  ".join(f"{term} {row[f'{term}_us']:.1f}" for term in TERMS if row[f"{term}_us"] != "")
        of = f"{row['resident']} on each, {row['waves']} waves, {row['rounds']} rounds" if row["registers"] else ""
        seen = f" measured {row['measured_us']}" if row["measured_us"] != "" else ""
        print(f"{row['us']:8.1f}{seen}  {row['kernel']:76} {row['launch']:14} {terms}  {of}")


def add_parser(commands: Any) -> None:
    model = commands.add_parser(
        "model",
        help="how long the head's kernels should take on an H200, launch by launch; no GPU needed",
        description="Models the head's kernels on an H200, launch by launch: microseconds in a CUDA graph with a cold "
        "L2. Nothing runs on a GPU: launches are recorded from emulated kernels at the true sizes, the compiled "
        "library says what a block waits for, and a table of constants (--constants) what that takes. Needs what the "
        "emulator needs (g++, the CUDA toolkit's headers), the built _C_cuda.so, cuobjdump and nvdisasm.",
    )
    model.add_argument("--workloads", nargs="+", metavar="NAME", help=f"default: {' '.join(DEFAULT)}")
    model.add_argument("--note", default="", metavar="NAME", help="what the rows say of the state of the kernels")
    model.add_argument(
        "--measured", type=pathlib.Path, metavar="CSV", help="rows of `op --kernels` from a GPU, to stand beside"
    )
    model.add_argument("--constants", action="store_true", help="print the constants and where they come from")
    records.add_save(model, "model.csv")


def run(args: argparse.Namespace, workloads: dict[str, Any], environment: dict[str, Any]) -> int:
    from ijckd_fast.errors import UserError

    if args.constants:
        for name, c in CONSTANTS.items():
            print(f"{name:16} {c.value:>8g} {c.unit:40} {c.source}")
        return 0
    names = args.workloads or DEFAULT
    if unknown := [name for name in names if name not in workloads]:
        raise UserError(f"--workloads: there is no {unknown[0]!r}; choose from {', '.join(workloads)}")
    records.check(args.save, COLUMNS)
    measured = measured_kernels(args.measured)
    if fault := built_from.fault(LIBRARY):
        raise UserError(f"{fault}: run python setup.py build_ext --inplace, with nvcc")
    rows = []
    try:
        steps = kernel_record.record(names)
        wanted = {x.symbol for step in steps for x in step.launches if isinstance(x, Launch)}
        kernels = sass.read(LIBRARY, wanted=wanted)
        for step in steps:
            modelled = model_step(step, kernels)
            rows += rows_of(step, modelled, floor_us(workloads[step.workload]), measured.get(step.workload, []))
    except RuntimeError as error:
        raise UserError(str(error)) from None
    for row in rows:
        row |= {"note": args.note, "commit": environment["commit"], "date": environment["date"]}
    print_rows(rows)
    records.append(args.save, COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit("a part of benchmark.py: run scripts/benchmark.py model")
