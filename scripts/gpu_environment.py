#!/usr/bin/env python
"""The first step of gpu_check.sh: what this machine has, printed and as DIR/environment.json for the later steps:
`scripts/gpu_environment.py DIR`. The exit status is 1 where our libraries cannot work.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
from importlib import metadata

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

PACKAGES = {  # name to import: of the distribution
    "triton": "triton", "torchvision": "torchvision", "timm": "timm", "jsonargparse": "jsonargparse", "rich": "rich",
    "pyarrow": "pyarrow", "yaml": "PyYAML", "safetensors": "safetensors", "pytest": "pytest",
    "pytest_timeout": "pytest-timeout", "hypothesis": "hypothesis", "scipy": "scipy", "matplotlib": "matplotlib",
    "liger_kernel": "liger-kernel", "cut_cross_entropy": "cut-cross-entropy", "nvidia.dali": "nvidia-dali-cuda130",
}  # fmt: skip
TOOLS = ("ncu", "compute-sanitizer", "nvcc", "cuobjdump")


def package_version(module: str, distribution: str) -> str | None:
    """None where it is not installed. Nothing is imported: that would take half a minute."""
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except ModuleNotFoundError:  # of the package that it would be in
        return None
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def tool_path(name: str) -> str | None:
    """On the PATH or in the CUDA toolkit's folder."""
    found = shutil.which(name)
    there = pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", name)
    return found or (str(there) if there.exists() else None)


def main(out: pathlib.Path) -> int:
    """Writes what is known before anything that may fail."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {
        "gpu": gpu,
        "capability": torch.cuda.get_device_capability() if gpu else None,
        "packages": {module: package_version(module, name) for module, name in PACKAGES.items()},
        "tools": {name: tool_path(name) for name in TOOLS},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "boot": pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
    }
    (out / "environment.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"Python {found['python']}, torch {found['torch']}, CUDA {torch.version.cuda}, {found['cores']} cores")
    for kind in ("packages", "tools"):
        print(f"{kind}: " + ", ".join(f"{name} {value or 'ABSENT'}" for name, value in found[kind].items()))
    from ijckd_fast.head import kernels_for, load_libraries

    cuda = load_libraries()
    if gpu is None:
        print(f"no GPU; the CUDA library {'loads' if cuda else 'is not built'}")
        return 0
    query = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,temperature.gpu"
    subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"])
    print(f"{gpu}: {kernels_for(torch.cuda.get_device_capability())}")
    if not cuda:
        print("ijckd_fast/head/_C_cuda.so is missing: make a pack with scripts/gpu_pack and name it with --pack")
        return 1
    ones = torch.ones(3, device="cuda").sum().item()
    print(f"{gpu}; the sum of three ones is {ones:g}")
    return int(ones != 3)


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
