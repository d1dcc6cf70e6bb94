"""The CUDA kernels on the CPU (tests/emulator), each against numpy in float64 under every schedule.
test_emulated_ops.py has the whole ops on them, test_emulator_faults.py the emulator itself.
"""

import itertools
import pathlib
import re

import numpy as np
import pytest
from emulator import block_cases, build, cases, class_map_cases, schedules, tile_cases

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

ROOT = pathlib.Path(__file__).parents[2]
CASES = cases.CASES | class_map_cases.CASES | tile_cases.CASES | block_cases.CASES
LARGE = 5000  # a case of a size above that runs in one order only: there are small ones of its kind


@pytest.fixture(scope="module")
def kernels():
    return build.load(build.built("kernels") / "emulated_kernels.so")


@pytest.mark.parametrize(("kernel", "dtype"), sorted({tuple(name.split()[:2]) for name in CASES}))
def test_kernel_equals_numpy(kernels, kernel, dtype):
    """Right in every order of threads and copies, and the same bits; matrices are loaded without bank conflicts."""
    for name, case in CASES.items():
        if name.split()[:2] != [kernel, dtype]:
            continue
        first = None
        large = max(map(int, re.findall(r" (\d+)\b", name)), default=0) > LARGE
        for order in itertools.islice(schedules.orders(kernels), 1 if large else None):
            try:
                outputs = [out.tobytes() for out in case(kernels)]
            except (AssertionError, RuntimeError) as error:
                pytest.fail(f"{name}, {order}: {error}")
            assert first is None or outputs == first, f"{name}: {order} gives other bits"
            first = outputs
            assert kernels.counts().bank_conflicts == 0, name
            assert kernels.refused() == 0, name
    schedules.set_order(kernels, schedules.FIRST)


def test_more_images_than_a_grid_has_rows(kernels):
    for case in cases.LARGE_GRIDS.values():
        case(kernels)


HEADERS = (
    "rows.h",
    "class_map_loss.h",
    "connector_match.h",
    "classifier_loss.h",
    "counts.h",
    "cuda/block_views.h",
    "cuda/classifier_tiles.h",
    "cuda/connector_tiles.h",
    "cuda/linear_tiles.h",
    "cuda/product_grads.h",
    "cuda/stage.h",
)


def test_every_launcher_has_cases():
    headers = "".join((ROOT / "csrc" / name).read_text() for name in HEADERS)
    launchers = set(re.findall(r"^int (\w+)\(", headers, re.M))
    assert launchers - {"class_tile", "stage"} == {name.split()[0] for name in CASES}


def test_half_types_round_as_the_oracles_expect():
    for t in cases.DTYPES:
        x = np.array([0, 1, -1.5, 3.0e-5, 65504, np.nan, np.inf])
        got = t.decode(t.encode(x))
        np.testing.assert_allclose(got, x, rtol=t.rounding + 1e-7, atol=t.smallest)
