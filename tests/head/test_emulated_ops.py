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

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("least", "sources"),
    [
        (200, ["emulator/gpu_ops.py"]),
        (6, ["emulator/block_ops.py", "block_oracle.py"]),
        (200, [f"head/test_{op}.py" for op in ("connector_match", "classifier_loss", "projected_classifier_loss")]),
        (3, ["head/test_numerics.py"]),
        (100, ["head/test_loss_edges.py"]),
        (80, ["head/test_soft_row.py"]),
        (100, ["head/test_class_map_loss.py"]),
        (80, ["head/test_search.py", "search_cases.py", "search_oracle.py"]),
        (20, ["head/test_long_sums.py"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_ops_on_emulated_kernels_equal_reference(least, sources, tmp_path, request):
    """The comparisons with reference.py in `sources`, at least so many, with the CUDA kernels behind."""
    package = tmp_path / "ijckd_fast"
    shutil.copytree(ROOT / "ijckd_fast", package, ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    shutil.copy(build.built("ops") / "_C.so", package / "head/_C.so")
    tests = tmp_path / "tests"
    tests.mkdir()
    for copied in ("conftest.py", "op_cases.py", "thread_counts.py", *sources):
        shutil.copy(ROOT / "tests" / copied, tests)
    chosen = (
        "equals_reference or channel_tiles or any_shape or any_layout or gradcheck or no_worse or large_logits or tied "
        "or small_differences or dwarfs or float16 or out_of_range or tiles or gram "
        "or one_class or empty_batch or bad_values or hard_cases or linear or of_the_tensors_gpu or edges or search "
        "or asked_once or maps_are or refused_launch or soft_row or class_maps or image_nan"
    )
    names = [pathlib.Path(source).name for source in sources]
    longer = f"--search-for={request.config.getoption('--search-for')}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, longer, *names],
        cwd=tests,
        env=dict(os.environ, PYTHONPATH=str(tmp_path), IJCKD_KERNELS="cuda"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least
