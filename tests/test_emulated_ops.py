"""The whole GPU ops on emulated kernels: host code, kernels, autograd."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from emulator import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not())),
]

ROOT = pathlib.Path(__file__).parent.parent


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
