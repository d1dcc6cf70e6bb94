"""scripts/benchmark.py model: what it takes from the emulator and from compiled code, and what it makes of that."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import sys

import pytest
from emulator import build

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))  # what they import beside themselves

import benchmark  # noqa: E402
import kernel_model  # noqa: E402
import kernel_path  # noqa: E402
import kernel_record  # noqa: E402
import sass  # noqa: E402

# --------------------------------------------------------------------------------------------------------------------
# compiled code


def instruction(text: str, line: str = "a.cu:1", sets: int | None = None, waits: int = 0) -> str:
    """As nvdisasm prints it, where the address does not matter."""
    file, _, number = line.partition(":")
    upper = 1 << 41 | (7 if sets is None else sets) << 46 | waits << 52
    lines = f'\t//## File "/somewhere/{file}", line {number} inlined at "/somewhere/b.cu", line 9\n'
    lines += '\t//## File "/somewhere/b.cu", line 9\n'
    return lines + f"        /*0000*/                   {text} ;    /* 0x0 */\n    /* 0x{upper:016x} */\n"


def kernel(*parts: str) -> sass.Kernel:
    code = "//--------------------- .text._ZN1a12_GLOBAL__N_11kE --------\n.text._ZN1a12_GLOBAL__N_11kE:\n"
    (found,) = sass.kernels_in(code + "".join(parts))
    return found


def load(line: str = "a.cu:1", sets: int = 0) -> str:
    return instruction("LDG.E.64 R2, [R4.64]", line, sets=sets)


def use(*counters: int) -> str:
    return instruction("FADD R1, R2, R3", waits=sum(1 << c for c in counters))


@pytest.mark.parametrize(
    ("code", "rounds"),
    [
        ([load(sets=0), load(sets=1), use(0), use(1)], 1),
        ([load(sets=0), load(sets=0), use(0)], 1),
        ([load(sets=0), use(0), load(sets=0), use(0), load(sets=0), use(0)], 3),
        ([load(sets=0), use(0), load(sets=1), load(sets=2), use(1, 2)], 2),
        ([load(sets=0), use(1)], 0),
        ([load(sets=0), instruction("LDS R1, [R2]", sets=1), use(1), use(0)], 1),
    ],
    ids=["two together", "one counter", "one after the other", "one, then two", "never used", "shared memory"],
)
def test_rounds_of_loads_that_wait_for_one_another(code, rounds):
    assert kernel(*code).rounds() == rounds


def test_an_instruction_is_read_with_its_lines_and_what_it_waits_for():
    (x,) = kernel(instruction("@!P0 LDG.E.128 R8, [R4.64]", "tile.cuh:7", sets=3, waits=0b100001)).instructions
    assert (x.name, x.operation, x.bytes, x.is_load, x.sets, x.waits, x.stall) == (
        "LDG.E.128",
        "LDG",
        16,
        True,
        3,
        33,
        1,
    )
    assert x.lines == ("tile.cuh:7", "b.cu:9")


def test_an_anonymous_namespace_is_called_the_same_everywhere():
    nvcc = "_ZN5ijckd51_GLOBAL__N__a49c0f61_18_connector_tiles_cu_1b00589e19project_tile_kernelE"
    assert sass.plain_symbol(nvcc) == "_ZN5ijckd12_GLOBAL__N_119project_tile_kernelE"


def test_loops_are_ways_back_that_do_not_leave_the_program():
    inner = kernel(
        ".L_x_1:\n", load(), ".L_x_2:\n", use(0), instruction("@P0 BRA `(.L_x_2)"), instruction("BRA `(.L_x_1)")
    )
    assert inner.loops() == [sass.Loop(0, 3), sass.Loop(1, 2)]
    moved = kernel(".L_x_1:\n", load(), instruction("EXIT"), use(0), instruction("BRA `(.L_x_1)"))
    assert moved.loops() == []


def site(line: str, times: int, kind: str = "load", size: int = 8) -> kernel_record.Site:
    return kernel_record.Site(kind, (line, "b.cu:9"), times, size, times * size, 0, times * size)


@pytest.fixture(autouse=True)
def sources(monkeypatch):
    """Of the files in which this file's code was written."""
    names = {"a.cu", "b.cu"}
    monkeypatch.setattr(kernel_path, "SOURCES", names | kernel_path.SOURCES)


LOOP = [".L_x_1:\n", *[load(sets=0)] * 4, use(0), instruction("@P0 BRA `(.L_x_1)")]  # four at a time
REST = [".L_x_2:\n", load(sets=0), use(0), instruction("@P0 BRA `(.L_x_2)")]
OTHER = [".L_x_3:\n", load("a.cu:5"), use(0), instruction("EXIT")]


@pytest.mark.parametrize(("times", "rounds"), [(0, 0), (4, 1), (16, 4), (19, 7)])
def test_a_loop_is_run_as_often_as_the_emulated_block_loaded(times, rounds):
    path = kernel_path.block_path(kernel(*LOOP, *REST, *OTHER), [site("a.cu:1", times)] if times else [], 270)
    assert path.rounds == rounds
    assert path.unknown == 0
    assert 270 * rounds <= path.cycles <= 270 * rounds + 100


def test_accesses_at_lines_that_the_code_does_not_have_are_told():
    path = kernel_path.block_path(
        kernel(*OTHER), [site("a.cu:5", 3), kernel_record.Site("load", ("x.cu:2",), 1, 8, 8, 0, 8)], 270
    )
    assert path.unknown == 0.25


def test_what_nvcc_has_merged_is_found_by_the_lines_around_it():
    """Two functions' loads, of which one line is left."""
    code = kernel(*LOOP, *OTHER)
    path = kernel_path.block_path(code, [site("a.cu:1", 8), site("a.cu:3", 8)], 270)
    assert (path.rounds, path.unknown) == (4, 0)


# --------------------------------------------------------------------------------------------------------------------
# launches


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        (256, 32, 0, 8),  # 2048 threads
        (256, 64, 0, 4),  # 65,536 registers
        (256, 65, 0, 3),  # given out eight to a thread
        (1024, 64, 0, 1),
        (128, 44, 0, 10),  # eight at a time
        (128, 168, 0, 3),
        (96, 255, 0, 2),  # three warps take a place in four quarters
        (32, 16, 0, 32),
        (128, 32, 65_568, 3),
        (256, 128, 98_328, 2),  # and one KiB for each, of 228
        (256, 128, 116_000, 1),
        (128, 32, 232_448, 1),
        (128, 32, 232_449, 0),
    ],
)
def test_resident_blocks_are_those_of_the_occupancy_calculator(threads, registers, shared, blocks):
    assert kernel_model.resident_blocks(threads, registers, shared) == blocks


def test_every_constant_has_a_unit_a_source_and_a_use():
    text = (ROOT / "scripts/kernel_model.py").read_text()
    used = set(re.findall(r"constant\(\s*\"(\w+)\"", text)) | set(re.findall(r"\"(\w+)\" if ", text))
    used |= set(re.findall(r"else \"(\w+)\"\)", text))
    for name, c in kernel_model.CONSTANTS.items():
        assert c.value > 0, name
        assert c.source, name
        assert name in used, name
    assert all(c.unit for name, c in kernel_model.CONSTANTS.items() if name != "multiprocessors")


def launch(**changes) -> kernel_record.Launch:
    """132 blocks of 256 threads that multiply 64 KiB each and load two values per thread."""
    tiles = [kernel_record.TileCopies(1 << 20, 1 << 22, 16384, 1, 65536)]
    block = kernel_record.Block(0, 0, 64, 0, 4, [site("a.cu:1", 8)], tiles, like_it=132)
    return dataclasses.replace(kernel_record.Launch("k", "k", (132, 1, 1), 256, 65536, blocks=[block]), **changes)


def modelled(x: kernel_record.Launch, *more: str) -> kernel_model.Modelled:
    code = kernel(instruction("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24"), *LOOP, *REST, *OTHER, *more)
    code.registers, code.shared = 64, 1024
    return kernel_model.model_launch(x, code, kernel_model.Memory())


def test_a_changed_launch_is_seen():
    before = modelled(launch())
    (block,) = launch().blocks
    more = [dataclasses.replace(block, like_it=264)]
    assert modelled(launch(grid=(264, 1, 1), blocks=more)).l2_mb == 2 * before.l2_mb
    slow = [dataclasses.replace(block, sites=[site("a.cu:1", 80)])]
    assert modelled(launch(blocks=slow)).of["path"] > before.of["path"] + 2
    assert modelled(launch(programmatic=1)).us < before.us
    assert modelled(launch(cooperative=1)).us > before.us
    shared = [dataclasses.replace(block, tiles=[block.tiles[0]._replace(receivers=2)])]
    assert modelled(launch(blocks=shared)).l2_mb < before.l2_mb
    busier = [dataclasses.replace(block, warpgroup_multiplies=6400)]
    assert modelled(launch(blocks=busier)).of["tensor"] > 3 * before.of["tensor"]


def test_what_was_touched_lately_comes_from_the_l2():
    memory = kernel_model.Memory([[0, 100_000_000], [200_000_000, 300_000_000]])
    first, other = (0, 100_000_000), (200_000_000, 300_000_000)
    assert memory.misses(first, 1e6) == 1e6
    assert memory.misses(first, 1e6) == 0
    assert memory.misses(other, 60e6) == 60e6
    assert memory.misses(first, 1e6) == 1e6


def test_tensor_core_time_is_the_whitepapers():
    """989 TFLOP/s of 132 multiprocessors at 1830 MHz, m64n128k16 in 64 cycles."""
    assert 132 * 1830e6 * kernel_model.constant("wgmma") == pytest.approx(989e12, rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
def test_the_record_is_what_the_sizes_say():
    """L100: B 128, Cs 256, Ct 640, K 100, as the emulated ops take it, in tiles of 128 x 128 from six tiles on."""
    (step,) = kernel_record.record(["L100"], build.built("ops") / "_C.so")
    w = benchmark.WORKLOADS["L100"]
    ours = [x for x in step.launches if isinstance(x, kernel_record.Launch)]
    first = ours[0]
    assert first.name.startswith("linear_tile_kernel<__nv_bfloat16, HopperTile<64, 64,")
    tiles_m, tiles_n = w.B // 64, w.Ct // 64
    assert first.grid_blocks == tiles_m * tiles_n
    assert sum(block.like_it for block in first.blocks) == first.grid_blocks
    for block in first.blocks:
        assert block.warpgroup_multiplies == w.Cs // 16
        assert sum(tile.bytes for tile in block.tiles) == w.Cs * (64 + 64) * 2
        z = [s for s in block.sites if s.kind == "store" and s.bytes_each * s.times * 128 >= 64 * 64 * 2]
        assert sum(s.bytes for s in z) >= 64 * 64 * 4
    assert len(ours) == 4
    assert {k.name for k in step.launches if isinstance(k, kernel_record.TorchKernel)} >= {"copy_"}
    assert set(step.inputs) >= {"u", "projection", "weight", "labels", "gram"}


# --------------------------------------------------------------------------------------------------------------------
# the command


def refused(capsys, *arguments: str) -> str:
    assert benchmark.main(["model", *arguments]) == 2
    return capsys.readouterr().err


def test_bad_input_is_refused_before_anything_is_built(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_record, "record", lambda *_: pytest.fail("recorded"))
    assert "--workloads: there is no 'W9'; choose from W1, " in refused(capsys, "--workloads", "W9")
    assert f"there is no file {tmp_path / 'none.csv'}" in refused(capsys, "--measured", str(tmp_path / "none.csv"))
    (tmp_path / "rows.csv").write_text("workload,us\n")
    assert "has no column kernel" in refused(capsys, "--measured", str(tmp_path / "rows.csv"))
    assert "has other columns" in refused(capsys, "--save", str(tmp_path / "rows.csv"))
    monkeypatch.setattr(kernel_model, "LIBRARY", tmp_path / "_C_cuda.so")
    assert "_C_cuda.so is missing: run python setup.py build_ext --inplace" in refused(capsys)
    (tmp_path / "_C_cuda.so").write_bytes(b"ijckd sources 0123456789abcdef")
    assert "was built from other sources (0123456789abcdef; csrc/ here is" in refused(capsys)


def test_a_kernel_that_the_library_lacks_is_told():
    step = kernel_record.Step("W1", [launch()], {})
    with pytest.raises(RuntimeError, match=r"_C_cuda.so has no k: it was built of other sources; build it again"):
        kernel_model.model_step(step, {})


def test_rows_say_what_bounds_each_launch_and_their_sum(tmp_path):
    (tmp_path / "kernels.csv").write_text(
        "workload,kernel,us,count,contender\n"
        "W1,void ijckd::(anonymous namespace)::k<ijckd::HopperTile<(int)64>>(ijckd::P),5.5,1,ours\n"
        "W1,void other(),1.25,2,ours\nW1,void other(),1.5,2,ours-graph\nW1,void eager(),9,1,eager\n"
    )
    measured = kernel_model.measured_kernels(tmp_path / "kernels.csv")["W1"]
    x = dataclasses.replace(modelled(launch()), kernel="k<HopperTile<64> >")
    gemm = kernel_model.model_product(kernel_record.Product(12544, 1024, 2048))
    first, second, total = kernel_model.rows_of(kernel_record.Step("W1", [], {}), [x, gemm], 1.25, measured)
    assert (first["measured_us"], second["measured_us"], total["measured_us"]) == (5.5, "", 8.0)
    assert second["bound"] == "tensor"
    assert total["us"] == pytest.approx(x.us + gemm.us, abs=0.01)
    assert total["floor_us"] == 1.25
    assert tuple(first) == tuple(second) == tuple(total) == kernel_model.COLUMNS


@pytest.mark.parametrize(("name", "floor"), [("W1", 1.34), ("W2", 8.1), ("W3", 259), ("W3b", 1089), ("I2", 205)])
def test_floors_are_those_of_the_arithmetic(name, floor):
    assert kernel_model.floor_us(benchmark.WORKLOADS[name]) == pytest.approx(floor, rel=0.02)
