"""Loads the compiled libraries, which hold the ops; never falls back to Python."""

from __future__ import annotations

import functools
import pathlib

import torch

HERE = pathlib.Path(__file__).parent
REBUILD = "`pip install -e .` in the repository"


@functools.cache
def load_libraries() -> bool:
    """Loads _C.so and, where it was built, _C_cuda.so, once; returns whether the latter is there.

    raises  ImportError, one sentence that says what to do, if _C.so is missing or torch cannot load one of them
    """
    cpu, cuda = HERE / "_C.so", HERE / "_C_cuda.so"
    if not cpu.exists():
        raise ImportError(
            f"ijckd_fast: the compiled library {cpu.name} is not in {HERE}: run {REBUILD}, with torch >= 2.10 and a "
            "C++20 compiler installed"
        )
    for library in (cpu, cuda):
        if library.exists():
            try:
                torch.ops.load_library(library)
            except OSError as error:
                raise ImportError(
                    f"ijckd_fast: {library.name} is there but torch {torch.__version__} cannot load it ({error}): "
                    f"build it again with {REBUILD}, with torch >= 2.10"
                ) from None
    return cuda.exists()


def kernels_for(capability: tuple[int, int]) -> str:
    """Which kernels of _C_cuda.so serve a GPU of this compute capability, as CMakeLists.txt builds it."""
    name = f"sm_{capability[0]}{capability[1]}"
    if capability < (7, 5):
        return f"{name}: none of our kernels, which need sm_75 or newer; train with --head reference or --device cpu"
    if capability < (8, 0):
        return f"{name}: library GEMMs and plain kernels (stage 0); the tensor-core kernels need sm_80 or newer"
    tiles = "Hopper's tensor-core kernels (stage 2)" if capability == (9, 0) else "tensor-core kernels (stage 1)"
    if capability >= (10, 0):
        tiles += " of PTX, which the driver compiles once"
    return f"{name}: {tiles}; library GEMMs and plain kernels (stage 0) for what those do not cover"


# What the kernels do without the launches that csrc/cuda/launches.h names by these bits.
WITHOUT = {
    1: "launches that overlap, so each waits for the end of the one before",
    2: "clusters, so blocks share no memory",
    4: "cooperative launches, so whole rows of logits take one launch more",
    8: "cooperative launches that overlap, so the one of whole rows of logits waits for the one before",
}


def refused_launches(device: str) -> str:
    """What the driver of this GPU refuses, and what the kernels do instead; empty if nothing."""
    refused = torch.ops.ijckd.refused_launches(torch.empty(0, device=device))
    if refused & 1:  # which then refuses these, too
        refused &= ~8
    what = " and ".join(text for bit, text in WITHOUT.items() if refused & bit)
    return what and f"the driver refuses {what}"
