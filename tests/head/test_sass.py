"""What nvcc made of the CUDA kernels, read from the built library: no local memory, registers within bounds, tensor
cores where a kernel is meant to use them. No GPU needed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
from dataclasses import dataclass, field

import pytest

import ijckd_fast

LIBRARY = pathlib.Path(ijckd_fast.__file__).parent / "head/_C_cuda.so"
ARCHITECTURES = {"sm_75", "sm_80", "sm_90a"}
NEWER_GPUS = "sm_100"  # PTX that GPUs without code of their own compile when they load the library

MOST_REGISTERS = 128  # 512 threads on a multiprocessor of 65,536
# kernel: bound, where fewer threads are meant, or the stages leave room for no more; match_forward's is float64's
MORE_REGISTERS = {
    "grad_rows_tile_kernel": 168,
    "linear_grad_tile_kernel": 160,
    "linear_tile_kernel": 168,
    "logit_rows_tile_kernel": 192,
    "logits_exp_tile_kernel": 160,
    "times_classifier_tile_kernel": 168,
    "match_forward_kernel": 136,
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
        bound = MORE_REGISTERS.get(self.name, MOST_REGISTERS)
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


def found_tool(name: str) -> str | None:
    """cuobjdump comes with requirements-dev.txt, nvdisasm with torch's Triton; the CUDA toolkit has both."""
    folders = [pathlib.Path(home, "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    for package, below in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        folders += [pathlib.Path(p, below) for p in (spec and spec.submodule_search_locations) or ()]
    return shutil.which(name) or next((str(f / name) for f in folders if (f / name).exists()), None)


@functools.cache
def dump() -> str:
    if not ijckd_fast.HAS_CUDA_LIBRARY:
        pytest.skip("no CUDA library on this machine")
    cuobjdump, nvdisasm = found_tool("cuobjdump"), found_tool("nvdisasm")
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
    sources = "".join(p.read_text() for p in (pathlib.Path(__file__).parents[2] / "csrc/cuda").glob("*.cu*"))
    kernel = r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\("
    assert set(re.findall(kernel, sources)) == set(names["sm_80"])


def test_kernels():
    kernels = kernels_of(dump())
    # a kernel with tiles stops at once where there are none of its instructions
    assert all(k.registers and {"EXIT", "BPT"} & k.operations for k in kernels)
    if faults := report(kernels):  # an assertion would cut the list
        pytest.fail(faults)


def test_bounds_are_of_kernels_that_exist():
    assert set(MORE_REGISTERS) <= {k.name for k in kernels_of(dump())}


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
