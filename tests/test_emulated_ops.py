"""The whole GPU ops on emulated kernels: host code, kernels, autograd; and the kernels under the compiler's own sanitizers."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from emulator import build, cases, tile_cases

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not())),
]

ROOT = pathlib.Path(__file__).parent.parent

# What happens within a thread: locals, arithmetic.
SANITIZED_CASES = """
import ctypes, re, sys
library, fault = sys.argv[1:]
assert ctypes.CDLL(library).broken_locals(int(fault)) == 0
from emulator import build, cases, tile_cases
kernels = build.load(build.pathlib.Path(library))
everything = cases.CASES | tile_cases.CASES
small = [case for name, case in everything.items() if max(map(int, re.findall(r" (\\d+)", name))) <= 1000]
for case in small:
    case(kernels)
print(len(small), "cases")
"""


def test_kernels_under_address_and_undefined_behaviour_sanitizers():
    library = build.built("sanitized") / "emulated_kernels.so"
    environment = os.environ | build.sanitizer_environment() | {"PYTHONPATH": str(ROOT / "tests")}

    def run(fault):
        command = [sys.executable, "-c", SANITIZED_CASES, str(library), str(fault)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    faults = ("out of bounds", "stack-buffer-overflow", "signed integer overflow", "shift exponent 32 is too large")
    for fault, text in enumerate(faults, 1):
        done = run(fault)
        assert done.returncode != 0, text
        assert text in done.stderr
    done = run(0)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[0]) > 0.9 * len(cases.CASES | tile_cases.CASES)


def test_ops_on_emulated_kernels_equal_reference(tmp_path):
    """test_ops.py's and test_numerics.py's comparisons with reference.py, and emulator/gpu_ops.py's, with the CUDA kernels behind."""
    package = tmp_path / "ijckd_fast"
    shutil.copytree(ROOT / "ijckd_fast", package, ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    shutil.copy(build.built("ops") / "_C.so", package / "_C.so")
    tests = tmp_path / "tests"
    tests.mkdir()
    for source in ("conftest.py", "test_ops.py", "test_numerics.py", "emulator/gpu_ops.py"):
        shutil.copy(ROOT / "tests" / source, tests)
    chosen = (
        "equals_reference or channel_tiles or any_shape or any_layout or gradcheck or no_worse or large_logits or tied "
        "or small_differences or dwarfs or float16 or out_of_range or tiles or gram "
        "or one_class or empty_batch or bad_values or hard_cases or linear"
    )
    files = ("test_ops.py", "test_numerics.py", "gpu_ops.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files],
        cwd=tests,
        env=dict(os.environ, PYTHONPATH=str(tmp_path), IJCKD_KERNELS="cuda"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 400
