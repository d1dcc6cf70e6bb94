"""The CUDA kernels on the CPU (tests/emulator): each against numpy in float64 under every schedule, then the whole ops against
reference.py; kernels with one fault each, to show that the emulator sees it.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from emulator import build, cases

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def kernels():
    return build.load(build.built("kernels") / "emulated_kernels.so")


@pytest.fixture(scope="module")
def broken():
    return build.load(build.built("broken") / "emulated_broken.so")


@pytest.mark.parametrize(("kernel", "dtype"), sorted({tuple(name.split()[:2]) for name in cases.CASES}))
def test_kernel_equals_numpy(kernels, kernel, dtype):
    """Right under every schedule, and the same bits."""
    for name, case in cases.CASES.items():
        if name.split()[:2] != [kernel, dtype]:
            continue
        first = None
        for schedule in kernels.Schedule.__members__.values():
            kernels.set_schedule(schedule)
            try:
                outputs = [out.tobytes() for out in case(kernels)]
            except (AssertionError, RuntimeError) as error:
                pytest.fail(f"{name}, {schedule.name}: {error}")
            assert first is None or outputs == first, f"{name}: {schedule.name} gives other bits"
            first = outputs
    kernels.set_schedule(kernels.Schedule.forward)


def test_more_images_than_a_grid_has_rows(kernels):
    for case in cases.LARGE_GRIDS.values():
        case(kernels)


def test_every_launcher_has_cases():
    headers = "".join(
        (ROOT / "csrc" / name).read_text() for name in ("rows.h", "connector_match.h", "classifier_loss.h")
    )
    launchers = set(re.findall(r"^int (\w+)\(", headers, re.M))
    assert launchers == {name.split()[0] for name in cases.CASES}


def test_a_refused_launch_is_an_error(kernels):
    x = np.zeros((0, 4), np.float32)
    rows = np.zeros(0, np.float32)
    with pytest.raises(RuntimeError, match="invalid configuration argument"):
        kernels.feature_diff(dtype="f32", z=x, pooled_t=x, d=x.copy(), square_rows=rows, B=0, Ct=4)


# --------------------------------------------------------------------------------------------------------------------
# the emulator itself

FAULTS = {
    "no_barrier": r"(racecheck: .* loads|initcheck: .* loads) element \d+ of shared array 0.* in broken.cu:\d+",
    "no_barrier_before_store": r"racecheck: .* element \d+ of shared array 0, which thread \(\d+, 0, 0\) (loaded|stored to) with no",
    "same_output_twice": r"racecheck: .* stores to element \d+ of out, which thread \(\d+, 0, 0\) stored to with no barrier",
    "blocks_share_an_output": "racecheck: .* stores to element .* of out, which another block stored to",
    "load_past_shared": "memcheck: .* loads 4 bytes outside every array, at byte 256 of the 256 of shared array 0, in broken.cu:",
    "load_past_input": "memcheck: .* loads 4 bytes outside every array, .*at byte 512 of the 512 of in",
    "store_past_output": "memcheck: .* stores 4 bytes outside every array, .*at byte 512 of the 512 of out",
    "store_to_input": "memcheck: .* stores to the input in",
    "misaligned": r"memcheck: .* loads 8 bytes at an address that they do not divide, in broken.cu:\d+",
    "null_pointer": r"memcheck: .* stores 4 bytes outside every array, in broken.cu:\d+",
    "load_unwritten_shared": "initcheck: thread .0, 0, 0. .* loads element 0 of shared array 0, which nobody has stored to",
    "load_unwritten_output": "initcheck: .* loads element .* of out, which nobody has stored to",
    "two_barriers": r"synccheck: .* is at the barrier in broken.cu:\d+, others are at that in broken.cu:\d+",
    "return_before_barrier": r"synccheck: .* (returned while others wait|threads of the block have returned)",
    "too_much_shared": "memcheck: .* more than 48 KiB of static shared memory",
    "too_many_threads": "launch failed: 9",
    "too_many_rows": "launch failed: 9",
    "no_blocks": "launch failed: 9",
}


@pytest.mark.parametrize("schedule", range(5))
def test_the_emulator_finds_every_fault(broken, schedule):
    assert set(broken.names()) == {"sound", *FAULTS}
    broken.set_schedule(schedule)
    x = np.arange(128, dtype=np.float32)
    for name, text in FAULTS.items():
        with pytest.raises(RuntimeError, match=text):
            broken.run(name, x, np.full(128, np.nan, np.float32))
    out = np.full(128, np.nan, np.float32)
    broken.run("sound", x, out)
    np.testing.assert_array_equal(out, x.reshape(2, 64)[:, ::-1].ravel())


def test_half_types_round_as_the_oracles_expect():
    for t in cases.DTYPES:
        x = np.array([0, 1, -1.5, 3.0e-5, 65504, np.nan, np.inf])
        got = t.decode(t.encode(x))
        np.testing.assert_allclose(got, x, rtol=t.rounding + 1e-7, atol=t.smallest)


# --------------------------------------------------------------------------------------------------------------------
# whole ops: host code, kernels, autograd


@pytest.mark.slow
def test_ops_on_emulated_kernels_equal_reference(tmp_path):
    """test_ops.py's comparisons with reference.py, and emulator/gpu_ops.py's, with the CUDA kernels behind both ops."""
    package = tmp_path / "ijckd_fast"
    shutil.copytree(ROOT / "ijckd_fast", package, ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    shutil.copy(build.built("ops") / "_C.so", package / "_C.so")
    tests = tmp_path / "tests"
    tests.mkdir()
    for source in ("conftest.py", "test_ops.py", "emulator/gpu_ops.py"):
        shutil.copy(ROOT / "tests" / source, tests)
    chosen = (
        "equals_reference or channel_tiles or any_shape or any_layout or gradcheck or no_worse or large_logits or tied "
        "or small_differences or dwarfs or float16 or out_of_range"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, "test_ops.py", "gpu_ops.py"],
        cwd=tests,
        env=dict(os.environ, PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 180
