"""Each function of csrc/cuda/instructions.cuh and hopper_instructions.cuh on a GPU, against torch on the CPU. nvcc
compiles instructions.cu and hopper_instructions.cu when the tests start; without a GPU they only show that those
compile. With IJCKD_INSTRUCTIONS_IN=DIR they are taken from there, as scripts/gpu_pack compiled them for sm_90a.
"""

import ctypes
import os
import pathlib
import subprocess

import pytest
import torch
from toolkit import nvcc

HERE = pathlib.Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
LANES = 32
BUILT_IN = os.environ.get("IJCKD_INSTRUCTIONS_IN")
pytestmark = pytest.mark.skipif(nvcc() is None and not BUILT_IN, reason="needs nvcc")
gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper_only = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")


def compiled(source, architecture, folder):
    if BUILT_IN:
        return ctypes.CDLL(str(pathlib.Path(BUILT_IN, f"{source}.so").resolve()))
    built = folder / f"{source}.so"
    command = [nvcc(), "-shared", "-Xcompiler", "-fPIC", "-std=c++17", f"-arch={architecture}"]
    command += [f"-I{CSRC}", f"-I{CSRC / 'cuda'}", HERE / f"{source}.cu", "-o", built]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(built))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)
    return compiled("instructions", f"sm_{major}{minor}", tmp_path_factory.mktemp("instructions"))


@pytest.fixture(scope="module")
def hopper_library(tmp_path_factory):
    return compiled("hopper_instructions", "sm_90a", tmp_path_factory.mktemp("instructions"))


def run(library, name, *arguments):
    """The launcher on copies of the tensors on the GPU; the last one as the kernel left it."""
    moved = [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]
    tensors = [x for x in moved if isinstance(x, torch.Tensor)]
    torch.cuda.synchronize()
    error = getattr(library, name)(
        *(ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else x for x in moved)
    )
    assert error == 0, f"{name}: CUDA error {error}"
    return tensors[-1].cpu()


def test_they_compile(library, hopper_library):
    assert library.shuffle_xor_float
    assert hopper_library.load_box


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


@hopper_only
@pytest.mark.parametrize(("row", "column"), [(0, 0), (24, 40), (-3, -8)])
def test_load_tile(hopper_library, row, column):
    rows, columns = 37, 72
    x = torch.randint(-(2**15), 2**15, (rows, columns), dtype=torch.int16)
    out = torch.full((2, 16, 64), 7, dtype=torch.int16)
    got = run(hopper_library, "load_box", x, rows, columns, row, column, out)
    around = torch.zeros(rows + 32, columns + 256, dtype=torch.int16)
    around[8 : 8 + rows, 64 : 64 + columns] = x
    chunks = torch.arange(8)
    for phase in range(2):
        box = around[8 + row : 24 + row, 64 + column + phase : 128 + column + phase].reshape(16, 8, 8)
        swizzled = torch.stack([box[r, chunks ^ (r % 8)] for r in range(16)])
        assert torch.equal(got[phase], swizzled.reshape(16, 64))


@hopper_only
@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("by_depth", [False, True])
@pytest.mark.parametrize("a_by_depth", [False, True])
@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_warpgroup_multiply(hopper_library, name, dtype, a_by_depth, by_depth, columns):
    a, b, d = torch.randn(64, 64).to(dtype), torch.randn(64, columns).to(dtype), torch.randn(64, columns)
    given_a, given_b = a.T.contiguous() if a_by_depth else a, b if by_depth else b.T.contiguous()
    layouts = int(a_by_depth), int(by_depth)
    got = run(hopper_library, f"warpgroup_multiply_{name}", given_a, given_b, d, *layouts, columns)
    torch.testing.assert_close(got.double(), a.double() @ b.double() + d.double(), rtol=1e-5, atol=1e-4)


@hopper_only
def test_exchange_in_a_cluster(hopper_library):
    x = torch.randn(4, 128)
    got = run(hopper_library, "exchange", x, torch.zeros(4, 4, 128))
    next_, before = x.roll(-1, 0), x.roll(2, 0)  # block r stores to r + 2 what it has, and reversed fours of r + 1's
    fours = x.roll(1, 0).reshape(4, 32, 4).flip(2).reshape(4, 128)
    assert torch.equal(got, torch.stack([next_, next_, before, fours], 1))


@hopper_only
def test_load_tile_to_blocks(hopper_library):
    x = torch.randint(-(2**15), 2**15, (32, 64), dtype=torch.int16)
    got = run(hopper_library, "load_box_to_blocks", x, torch.full((2, 2, 32, 64), 7, dtype=torch.int16))
    chunks = torch.arange(8)
    swizzled = torch.stack([x.reshape(32, 8, 8)[r, chunks ^ (r % 8)] for r in range(32)]).reshape(32, 64)
    assert torch.equal(got, swizzled.expand(2, 2, 32, 64))


@hopper_only
def test_dependent_launches_wait(hopper_library):
    n, launches = 132 * 128, 20
    rows = torch.zeros(launches + 1, n)
    rows[0] = torch.arange(n) % 7
    got = run(hopper_library, "in_turn", n, launches, rows)
    for i in range(launches):
        assert torch.equal(got[i + 1], 2 * got[i] + 1), i
