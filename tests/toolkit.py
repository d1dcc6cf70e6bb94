"""Where NVIDIA's compiler is."""

import os
import pathlib
import shutil


def nvcc() -> str | None:
    """Its path, or None; found as CMakeLists.txt finds it."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return next((f"{h}/bin/nvcc" for h in homes if h and pathlib.Path(h, "bin/nvcc").exists()), shutil.which("nvcc"))
