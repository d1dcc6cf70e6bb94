"""ijckd-fast: knowledge distillation through the teacher's own classifier (IJCKD, arXiv 2304.11004), with a fused C++/CUDA head."""

from __future__ import annotations

import pathlib

import torch

__version__ = "0.1.0"


def _load_libraries() -> bool:
    """Loads _C.so and, where it was built, _C_cuda.so; returns whether the latter is there. Never falls back to Python."""
    here = pathlib.Path(__file__).parent
    cpu, cuda = here / "_C.so", here / "_C_cuda.so"
    if not cpu.exists():
        raise ImportError(
            f"ijckd_fast: the compiled library {cpu.name} is not in {here}: run `pip install --no-build-isolation -e .` in the "
            "repository, with torch >= 2.10 and a C++20 compiler installed"
        )
    for library in (cpu, cuda):
        if library.exists():
            try:
                torch.ops.load_library(library)
            except OSError as error:
                raise ImportError(
                    f"ijckd_fast: {library.name} is there but torch {torch.__version__} cannot load it ({error}): rebuild it with "
                    "`pip install --no-build-isolation --force-reinstall --no-deps -e .`, and use torch >= 2.10"
                ) from None
    return cuda.exists()


HAS_CUDA_LIBRARY = _load_libraries()

# only now: the ops exist once the libraries are loaded
from ijckd_fast.ops import classifier_loss, connector_match  # noqa: E402

__all__ = ["HAS_CUDA_LIBRARY", "classifier_loss", "connector_match"]
