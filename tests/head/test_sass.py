"""What nvcc made of the CUDA kernels, read from the built library: no local memory, registers within bounds, tensor
cores where a kernel is meant to use them, loads in flight together where they are meant to be. No GPU needed.
"""

from __future__ import annotations

import functools
import itertools
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

import ijckd_fast

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))

import sass  # noqa: E402

LIBRARY = pathlib.Path(ijckd_fast.__file__).parent / "head/_C_cuda.so"
ARCHITECTURES = {"sm_75", "sm_80", "sm_90a"}
NEWER_GPUS = "sm_100"  # PTX that GPUs without code of their own compile when they load the library

MOST_REGISTERS = 128  # 512 threads on a multiprocessor of 65,536
# what a kernel's symbol holds: bound, where fewer threads are meant, or the stages leave room for no more;
# match_forward's is float64's, and the last that of rows of logits in float64 with terms of soft_row.h
MORE_REGISTERS = {
    "grad_rows_tile_kernel": 168,
    "linear_grad_tile_kernel": 160,
    "linear_tile_kernel": 168,
    "logit_rows_tile_kernel": 192,
    "logits_exp_tile_kernel": 160,
    "times_classifier_tile_kernel": 168,
    "match_forward_kernel": 136,
    "row_loss_kernelIddLb1E": 192,
}
# The instructions of the kernels with tiles, where they are meant to run: stage 1's, and stage 2's, whose tiles are
# HopperTiles.
TILES = {"sm_75": set[str](), "sm_80": {"HMMA"}, "sm_90a": {"HMMA"}}
HOPPER_TILES = {"sm_75": set[str](), "sm_80": set[str](), "sm_90a": {"HGMMA", "UTMALDG"}}


@dataclass
class Kernel:
    symbol: str
    architecture: str
    registers: int = 0
    operations: set[str] = field(default_factory=set)  # the instructions' first words: LDG, HMMA, ...

    @property
    def name(self) -> str:
        return innermost_name(self.symbol)

    def faults(self) -> list[str]:
        found = [f"uses local memory ({op})" for op in ("LDL", "STL") if op in self.operations]
        bound = next((most for of, most in MORE_REGISTERS.items() if of in self.symbol), MOST_REGISTERS)
        if self.registers > bound:
            found.append(f"needs {self.registers} registers, more than {bound}")
        wanted = (HOPPER_TILES if "HopperTile" in self.symbol else TILES)[self.architecture]
        if "tile" in self.name and (missing := wanted - self.operations):
            found.append(f"has no {' and no '.join(sorted(missing))}")
        return found


def innermost_name(symbol: str) -> str:
    """`kernel` of namespaces::kernel<...>(...): the last of a C++ symbol's names, each of which stands after its
    length.
    """
    rest, name = re.sub("^_ZN?", "", symbol), symbol
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        name, rest = rest[length.end() : end], rest[end:]
    return name


def kernels_of(dump: str) -> list[Kernel]:
    """The kernels in cuobjdump's text: per architecture a table of resources, then each kernel's instructions."""
    found: dict[tuple[str, str], Kernel] = {}
    architecture, kernel = "", Kernel("", "")
    for line in dump.splitlines():
        if m := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?(\w+)", line):
            kernel.operations.add(m[1])
        elif m := re.match(r"arch = (\w+)", line):
            architecture = m[1]
        elif m := re.match(r"\s+Function (?:: )?(\w+)", line):
            kernel = found.setdefault((architecture, m[1]), Kernel(m[1], architecture))
        elif m := re.match(r"\s+REG:(\d+) ", line):
            kernel.registers = int(m[1])
    return list(found.values())


def ptx_of(dump: str) -> set[str]:
    return set(re.findall(r"Fatbin ptx code:\n=+\narch = (\w+)", dump))


@functools.cache
def dump() -> str:
    if not ijckd_fast.HAS_CUDA_LIBRARY:
        pytest.skip("no CUDA library on this machine")
    cuobjdump, nvdisasm = sass.found_tool("cuobjdump"), sass.found_tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        pytest.skip(f"no {'nvdisasm' if cuobjdump else 'cuobjdump'} on this machine")
    path = f"{pathlib.Path(nvdisasm).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [cuobjdump, "--dump-resource-usage", "--dump-sass", LIBRARY]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ, PATH=path)).stdout


def report(kernels: list[Kernel]) -> str:
    return "\n".join(f"{k.name} on {k.architecture} {fault} ({k.symbol})" for k in kernels for fault in k.faults())


def test_every_architecture_has_every_kernel():
    kernels = kernels_of(dump())
    names = {a: sorted(k.name for k in kernels if k.architecture == a) for a in {k.architecture for k in kernels}}
    assert set(names) == ARCHITECTURES
    assert len({tuple(n) for n in names.values()}) == 1, names
    assert ptx_of(dump()) == {NEWER_GPUS}
    sources = "".join(p.read_text() for p in (ROOT / "csrc/cuda").glob("*.cu*"))
    kernel = r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\("
    assert set(re.findall(kernel, sources)) == set(names["sm_80"])


def test_kernels():
    kernels = kernels_of(dump())
    # a kernel with tiles stops at once where there are none of its instructions
    assert all(k.registers and {"EXIT", "BPT"} & k.operations for k in kernels)
    if faults := report(kernels):  # an assertion would cut the list
        pytest.fail(faults)


def test_bounds_are_of_kernels_that_exist():
    assert all(any(of in k.symbol for k in kernels_of(dump())) for of in MORE_REGISTERS)


# Cut from dumps: the table of resources, then the code.
SAMPLE = """
Fatbin elf code:
================
arch = {architecture}
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN5ijckd39_GLOBAL__N__8ad331c5_7_tile_cu_7b5060fa{mangled}:
  REG:{registers} STACK:0 SHARED:8192 LOCAL:0 CONSTANT[0]:392 TEXTURE:0 SURFACE:0 SAMPLER:0

	code for {architecture}
		Function : _ZN5ijckd39_GLOBAL__N__8ad331c5_7_tile_cu_7b5060fa{mangled}
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;               /* 0x00000a00ff017624 */
                                                                                         /* 0x000fe400078e00ff */
        /*00b0*/              @!P0 {instruction} ;                                       /* 0x0000060000000947 */
                                                                                         /* 0x000fea0003800000 */
        /*10c0*/                   EXIT ;                                                /* 0x000000000000794d */

Fatbin ptx code:
================
arch = sm_100
"""
SUM, TILE = "17column_sum_kernelIdEEvPKT_PS2_llS2_", "13a_tile_kernelI6__halfEEvPKT_"
HOPPER = "13a_tile_kernelIN5ijckd10HopperTileILi64ELi64ELi4EEEEEvPKT_"


@pytest.mark.parametrize(
    ("mangled", "architecture", "registers", "instruction", "wanted"),
    [
        (SUM, "sm_80", 128, "LDG.E R2, [R4.64]", ""),
        (SUM, "sm_80", 129, "LDG.E R2, [R4.64]", "column_sum_kernel on sm_80 needs 129 registers, more than 128"),
        (SUM, "sm_90a", 32, "LDL.64 R2, [R1]", "column_sum_kernel on sm_90a uses local memory (LDL)"),
        (SUM, "sm_90a", 32, "STL [R1+0x4], R9", "column_sum_kernel on sm_90a uses local memory (STL)"),
        (TILE, "sm_80", 128, "HMMA.16816.F32.BF16 R4, R8, R12, R4", ""),
        (TILE, "sm_90a", 128, "HMMA.16816.F32 R4, R8, R12, R4", ""),
        (HOPPER, "sm_80", 128, "FFMA R4, R8, R12, R4", ""),
        (
            HOPPER,
            "sm_90a",
            128,
            "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24",
            "a_tile_kernel on sm_90a has no UTMALDG",
        ),
        (
            HOPPER,
            "sm_90a",
            128,
            "HMMA.16816.F32 R4, R8, R12, R4",
            "a_tile_kernel on sm_90a has no HGMMA and no UTMALDG",
        ),
        (TILE, "sm_80", 128, "FFMA R4, R8, R12, R4", "a_tile_kernel on sm_80 has no HMMA"),
        (TILE, "sm_90a", 128, "FFMA R4, R8, R12, R4", "a_tile_kernel on sm_90a has no HMMA"),
    ],
)
def test_the_rules_themselves(mangled, architecture, registers, instruction, wanted):
    text = SAMPLE.format(mangled=mangled, architecture=architecture, registers=registers, instruction=instruction)
    (kernel,) = kernels_of(text)
    assert kernel.registers == registers
    assert kernel.operations == {"IMAD", instruction.split(".")[0].split()[0], "EXIT"}
    assert report([kernel]).rpartition(" (")[0] == wanted
    assert ptx_of(text) == {"sm_100"}


# --------------------------------------------------------------------------------------------------------------------
# loads in flight


def lines_of(place: str) -> set[str]:
    """The lines "file:line" of a function or struct of csrc/cuda, by "file:name"."""
    file, _, name = place.partition(":")
    source = (ROOT / "csrc/cuda" / file).read_text().splitlines()
    (first,) = [n for n, line in enumerate(source) if re.search(rf"\b(?:void|struct|auto) {name}\b(?!.*;)", line)]
    end = re.match(" *", source[first])[0] + "}"
    last = next(n for n in range(first, len(source)) if source[n].startswith(end))
    return {f"{file}:{n + 1}" for n in range(first, last + 1)}


@dataclass
class InFlight:
    """How a thread waits for loads in some of a kernel's code, each instruction once, in the order of the program."""

    batches: list[int]  # loads from one store to global memory to the next
    rounds: int  # waits for loads one after the other

    @staticmethod
    def of(kernel: sass.Kernel, lines: set[str]) -> InFlight:
        """Of what comes from these lines, functions inlined there included."""

        def own(x: sass.Instruction) -> bool:
            return not lines.isdisjoint(x.lines)

        accesses = (x for x in kernel.instructions if own(x) and (x.is_load or x.is_store))
        batches = [len(list(run)) for loads, run in itertools.groupby(accesses, lambda x: x.is_load) if loads]
        # what waits may have other lines
        waits = sass.Scoreboard(lambda x: sass.rounds_of(x) if own(x) else 0)
        return InFlight(batches, int(waits.run(kernel.instructions)))


@dataclass
class Batches:
    """What nvcc makes of one piece of a kernel's code, by tile, as in TILE_SIZES. From one build to another it may part
    a batch or move a load: so much is no fault, batches of half the size are.
    """

    kernel: str
    code: str  # functions of csrc/cuda, "file:name", that load and store
    most: tuple[int, int, int, int]  # rounds, and batches; 0: nothing is loaded
    fewest: tuple[int, int, int, int]  # loads of a batch
    variant: str = ""  # pattern in the symbol

    def faults(self, kernel: sass.Kernel) -> list[str]:
        found = InFlight.of(kernel, set().union(*map(lines_of, self.code.split())))
        tile = next(n for n, size in enumerate(TILE_SIZES) if size in kernel.symbol)
        most, fewest = self.most[tile], self.fewest[tile]
        faults = []
        if most and not found.batches:
            faults.append("loads nothing")
        if (waits := max(found.rounds, len(found.batches))) > 1.5 * most:
            faults.append(f"waits for loads {waits} times instead of {most}")
        if (least := min(found.batches, default=fewest)) < 0.75 * fewest:
            faults.append(f"has {least} loads in flight before it stores instead of {fewest}")
        return [f"{self.kernel}: {self.code} {fault} ({kernel.symbol})" for fault in faults]


TILE_SIZES = ("4TileILi64E", "4TileILi128E", "HopperTileILi64E", "HopperTileILi128E")

# A thread has 16 pairs of a tile of 64 x 64, 32 of one of 128 x 128, in 2 rows of each 16 x 8 block. A load must not
# pass a store that may be to the same address, so a batch is what the source loads before it stores: of fewer pairs
# where registers are few. A batch is one round, or two where the compiler takes its first loads before its last go out.
BATCHES = [
    # all columns of a row of blocks, or 4: a bias, and pooled_t of both rows
    Batches(
        "linear_tile_kernel",
        "linear_tiles.cu:for_some_pairs linear_tiles.cu:BiasPairs",
        (2, 4, 1, 4),
        (12, 12, 24, 12),
        "FollowsE[01]",
    ),
    # with two rows of W to each of both rows; 2 columns of a large tile, 1 before Hopper
    Batches(
        "linear_tile_kernel",
        "linear_tiles.cu:for_some_pairs linear_tiles.cu:BiasPairs",
        (2, 22, 1, 8),
        (28, 7, 56, 14),
        "FollowsE2",
    ),
    # the cluster's eight sums of a row's four, three times: of du, dweight and a float dweight
    Batches("product_grad_tile_kernel", "product_grads.cu:store_sums", (0, 0, 3, 3), (0, 0, 8, 8)),
    Batches("product_grad_tile_kernel", "bias_columns.cuh:bias_columns", (1, 1, 1, 1), (8, 8, 8, 8)),  # eight rows
    # gram_tile: z and pooled_t of kPairsAtOnce
    Batches("logits_exp_tile_kernel", "tile.cuh:for_row tile.cuh:load_two", (4, 8, 3, 12), (8, 8, 16, 8)),
    # eight parts of both anchors, the labels, a bias, all before the first store
    Batches("logits_exp_tile_kernel", "logits_exp.cu:exp_tile", (4, 4, 4, 4), (18, 18, 18, 18)),
    # six arrays of kPairsAtOnce, which a cluster's blocks have fewer of
    Batches("grad_rows_tile_kernel", "tile.cuh:for_row", (4, 8, 2, 8), (24, 24, 48, 24), "ClusterE[02]"),
    Batches("grad_rows_tile_kernel", "tile.cuh:for_row", (0, 0, 2, 0), (0, 0, 12, 0), "ClusterE1"),
    # thirteen arrays' eight parts, of which class_sums reads three at a time
    Batches("grad_rows_tile_kernel", "classifier_rows.cuh:share", (10, 10, 10, 10), (104, 104, 104, 104)),
    # z and pooled_t of kPairsAtOnce
    Batches(
        "times_classifier_tile_kernel",
        "tile.cuh:for_row tile.cuh:load_two",
        (4, 8, 2, 8),
        (8, 8, 16, 8),
        "ClusterE0",
    ),
    Batches(
        "times_classifier_tile_kernel", "tile.cuh:for_row tile.cuh:load_two", (0, 0, 2, 0), (0, 0, 4, 0), "ClusterE1"
    ),
    Batches("times_classifier_tile_kernel", "classifier_rows.cuh:share", (1, 1, 1, 1), (8, 8, 8, 8)),
    # eight logits of a row, and of its delta
    Batches("logit_rows_tile_kernel", "logit_rows.cu:keep_row", (2, 2, 2, 2), (16, 16, 16, 16)),
]


def batches_of(kernel: sass.Kernel) -> list[Batches]:
    name = innermost_name(kernel.symbol)
    return [b for b in BATCHES if b.kernel == name and re.search(b.variant, kernel.symbol)]


def load_faults(kernels: Iterable[sass.Kernel]) -> list[str]:
    return [fault for kernel in kernels for b in batches_of(kernel) for fault in b.faults(kernel)]


def test_loads_are_in_flight_together():
    names = {b.kernel for b in BATCHES}
    wanted = {sass.plain_symbol(k.symbol) for k in kernels_of(dump()) if k.name in names}
    kernels = sass.read(LIBRARY, wanted=wanted).values()
    for k in kernels:  # of whatever variant
        wanted_code = {b.code for b in BATCHES if b.kernel == innermost_name(k.symbol)}
        assert {b.code for b in batches_of(k)} == wanted_code, k.symbol
    assert [b for b in BATCHES if not any(b in batches_of(k) for k in kernels)] == []
    if faults := load_faults(kernels):
        pytest.fail("\n".join(faults))


# Cut from nvdisasm's text of linear_tile_kernel: a load, what waits for it, which may have lines of elsewhere, a store.
LOAD = """
	//## File "/csrc/cuda/device.cuh", line 57 inlined at "/csrc/cuda/tile.cuh", line {line}
	//## File "/csrc/cuda/tile.cuh", line {line}
        /*18e0*/                   LDG.E.64 R4, desc[UR6][R4.64] ;   /* 0x0000000604047981 */
                                                                     /* 0x000f66000c1e1b00 */
"""
USE = """
	//## File "/csrc/cuda/linear_tiles.cu", line 127
        /*1c10*/                   FADD R24, R24, R4 ;               /* 0x0000000418187221 */
                                                                     /* 0x020fe20000000000 */
"""
STORE = """
	//## File "/csrc/cuda/tile.cuh", line {line}
        /*1ca0*/                   STG.E.64 desc[UR6][R18.64], R24 ; /* 0x0000001812007986 */
                                                                     /* 0x0001e2000c101b06 */
"""
HEAD = "//--------------------- .text._ZN5ijckd12_GLOBAL__N_1{name} --------\n"


@pytest.mark.parametrize(
    ("code", "batches", "rounds"),
    [
        (4 * (LOAD + USE + STORE), [1, 1, 1, 1], 4),
        (4 * LOAD + 4 * (USE + STORE), [4], 1),
        (2 * (2 * LOAD + 2 * (USE + STORE)), [2, 2], 2),
        (4 * (LOAD + USE) + 4 * STORE, [4], 4),
        (LOAD + 3 * (LOAD + STORE) + USE, [2, 1, 1], 1),
        (4 * (USE + STORE), [], 0),
    ],
    ids=["serial", "batched", "two batches", "one wait each", "loads behind stores", "no loads"],
)
def test_loads_in_flight(code, batches, rounds):
    (kernel,) = sass.kernels_in(HEAD.format(name="1kE") + code.format(line=240) + (LOAD + USE).format(line=1))
    assert InFlight.of(kernel, {"tile.cuh:240"}) == InFlight(batches, rounds)


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        (2 * (16 * LOAD + 8 * (USE + STORE)), []),
        (
            16 * (2 * LOAD + USE + STORE),
            ["waits for loads 16 times instead of 2", "has 2 loads in flight before it stores instead of 16"],
        ),
        (16 * (LOAD + USE + STORE) + 16 * LOAD, ["waits for loads 17 times instead of 2", "has 1 loads"]),
        (4 * (16 * LOAD + USE + STORE), ["waits for loads 4 times instead of 2"]),
        (4 * (8 * LOAD + USE + STORE), ["waits for loads 4 times instead of 2", "has 8 loads"]),
        (15 * LOAD + USE + LOAD + USE + STORE + 15 * LOAD + USE + STORE, []),
        (32 * LOAD + STORE, []),
        (STORE, ["loads nothing"]),
    ],
    ids=[
        "as it is",
        "a pair at a time",
        "one",
        "twice",
        "half a batch",
        "one wait more, a load fewer",
        "one batch",
        "no loads",
    ],
)
def test_the_bounds_of_loads_themselves(code, wanted):
    name = "28times_classifier_tile_kernelI6__halfNS_10HopperTileILi64ELi64ELi6EEELNS_7ClusterE0EEEvv"
    line = min(int(at.partition(":")[2]) for at in lines_of("tile.cuh:for_row"))
    (kernel,) = sass.kernels_in(HEAD.format(name=name) + code.format(line=line))
    found = [f for f in load_faults([kernel]) if "tile.cuh:for_row" in f]
    assert len(found) == len(wanted)
    assert all(part in fault for part, fault in zip(wanted, found, strict=True)), found


def test_a_function_s_lines():
    source = (ROOT / "csrc/cuda/classifier_rows.cuh").read_text().splitlines()
    lines = sorted(int(at.removeprefix("classifier_rows.cuh:")) for at in lines_of("classifier_rows.cuh:share"))
    assert lines == list(range(lines[0], lines[-1] + 1))
    assert "void share(" in source[lines[0] - 1]
    assert source[lines[-1] - 1] == "  }"
    assert any("kAtOnce" in source[n - 1] for n in lines)
