"""Each function of csrc/cuda/instructions.cuh on a GPU, against torch on the CPU. nvcc compiles instructions.cu when the tests start;
without a GPU they only show that it compiles.
"""

import ctypes
import pathlib
import subprocess

import pytest
import torch
from test_build import nvcc

HERE = pathlib.Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
LANES = 32
pytestmark = pytest.mark.skipif(nvcc() is None, reason="needs nvcc")
gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    built = tmp_path_factory.mktemp("instructions") / "instructions.so"
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)
    command = [nvcc(), "-shared", "-Xcompiler", "-fPIC", "-std=c++17", f"-arch=sm_{major}{minor}"]
    command += [f"-I{CSRC}", f"-I{CSRC / 'cuda'}", HERE / "instructions.cu", "-o", built]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(built))


def run(library, name, *tensors):
    """The launcher on copies on the GPU; the last tensor as the kernel left it."""
    moved = [t.cuda() for t in tensors]
    torch.cuda.synchronize()
    error = getattr(library, name)(*(ctypes.c_void_p(t.data_ptr()) for t in moved))
    assert error == 0, f"{name}: CUDA error {error}"
    return moved[-1].cpu()


def test_it_compiles(library):
    assert library.shuffle_xor_float


@gpu_only
@pytest.mark.parametrize(("name", "dtype"), [("shuffle_xor_float", torch.float32), ("shuffle_xor_int", torch.int32)])
def test_shuffle_xor(library, name, dtype):
    x = torch.randint(-(2**20), 2**20, (LANES,)).to(dtype)
    lanes = torch.arange(LANES)
    got = run(library, name, x, torch.zeros(LANES, LANES, dtype=dtype))
    assert torch.equal(got, x[lanes ^ lanes[:, None]])


@gpu_only
def test_copy_async(library):
    x = torch.randint(1, 256, (2, LANES, 16), dtype=torch.uint8)
    wanted_bytes = torch.stack([torch.arange(LANES), torch.arange(LANES).flip(0)]) % 17
    got = run(library, "copy_async", x, wanted_bytes.int(), torch.full_like(x, 7))
    assert torch.equal(got, torch.where(torch.arange(16) < wanted_bytes[..., None], x, 0))


@gpu_only
@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrix(library, transposed):
    rows = torch.randint(-(2**15), 2**15, (LANES, 8), dtype=torch.int16)
    order = torch.randperm(LANES)
    name = "load_matrix_transposed" if transposed else "load_matrix"
    got = run(library, name, rows, order.int(), torch.zeros(LANES, 4, 2, dtype=torch.int16))
    matrices = rows[order].view(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(1, 2)
    # matrix i's row lane / 4, its columns 2 (lane % 4) and the next
    assert torch.equal(got, matrices.reshape(4, LANES, 2).transpose(0, 1))


@gpu_only
@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_multiply_add(library, name, dtype):
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    got = run(library, f"multiply_add_{name}", a, b, d)
    torch.testing.assert_close(got.double(), a.double() @ b.double() + d.double(), rtol=1e-5, atol=1e-5)
