"""What the build must leave behind: both libraries where nvcc is, one wheel for every Python. test_sass.py looks into
the kernels.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from toolkit import nvcc

import ijckd_fast

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))
import built_from  # noqa: E402


def test_cuda_library_is_built_where_nvcc_is():
    if nvcc() is None:
        pytest.skip("no nvcc on this machine: only the CPU library is built")
    assert ijckd_fast.HAS_CUDA_LIBRARY


def test_libraries_are_of_these_sources():
    """Red: build again (`pip install -e .`), what the other tests say is of other sources."""
    there = [ROOT / "ijckd_fast/head" / name for name in built_from.LIBRARIES]
    faults = [built_from.fault(library) for library in there if library.exists()]
    assert faults
    assert faults == [None] * len(faults)


def test_a_library_of_other_sources_is_told(tmp_path):
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    for name in ("CMakeLists.txt", "csrc/a.cpp", "csrc/cuda/b.cu"):
        (tmp_path / name).write_text(f"// {name}\n")
    library = tmp_path / "_C.so"
    assert built_from.fault(library, tmp_path) == f"{library} is missing"
    library.write_bytes(b"\x7fELF, built before libraries said so")
    assert "built from other sources (of unknown hash; csrc/ here is" in built_from.fault(library, tmp_path)
    library.write_bytes(b"\0ijckd sources " + built_from.sources_hash(tmp_path).encode() + b"\0")
    assert built_from.fault(library, tmp_path) is None
    for change in (
        lambda: (tmp_path / "csrc/cuda/b.cu").write_text("// another\n"),
        lambda: (tmp_path / "csrc/cuda/b.cu").rename(tmp_path / "csrc/c.cu"),
        lambda: (tmp_path / "CMakeLists.txt").write_text("// other flags\n"),
    ):
        before = built_from.sources_hash(tmp_path)
        change()
        assert f"({before}; csrc/ here is" in built_from.fault(library, tmp_path)
        library.write_bytes(b"ijckd sources " + built_from.sources_hash(tmp_path).encode())


@pytest.mark.slow
def test_wheel_serves_every_python(tmp_path):
    checkout = tmp_path / "checkout"  # a copy: a build in the checkout would disturb the installed libraries
    ignored = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "_C*.so", "__pycache__")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        tmp_path,
        checkout,
    ]
    quick = tmp_path / "c++"  # the library is not run here
    quick.write_text(f'#!/bin/sh\nexec {shutil.which(os.environ.get("CXX", "c++"))} "$@" -O0\n')
    quick.chmod(0o755)
    subprocess.run(command, check=True, env=dict(os.environ, IJCKD_CUDA="off", CXX=str(quick)))
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "ijckd_fast/head/_C.so" in names
    assert "ijckd_fast/py.typed" in names
    assert "ijckd_fast/head/__init__.pyi" in names
    assert any(n.startswith("ijckd_fast/configs/") and n.endswith(".yaml") for n in names)
