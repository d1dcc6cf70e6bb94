"""Which packages beside torch the rooms import, and the extra of pyproject.toml that installs each.

The head needs torch alone, so everything else is an extra: `pip install 'ijckd-fast[train,cu13]'`. What a command or a
public name lacks is said by `missing`; tests/project/test_extras.py holds this table to pyproject.toml and to every
import.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple


class Package(NamedTuple):
    """What an import comes from: the name it is installed by, and the extra that lists it."""

    distribution: str
    extra: str


# By the first word of what is imported.
PACKAGES = {
    "PIL": Package("pillow", "train"),
    "filelock": Package("filelock", "train"),
    "fontTools": Package("fonttools", "train"),
    "huggingface_hub": Package("huggingface_hub", "train"),
    "jsonargparse": Package("jsonargparse", "train"),
    "matplotlib": Package("matplotlib", "train"),
    "numpy": Package("numpy", "train"),
    "nvidia": Package("nvidia-dali-cuda130", "cu13"),  # or cu12, see `extra_of`
    "onnx": Package("onnx", "export"),
    "onnxruntime": Package("onnxruntime", "export"),
    "onnxscript": Package("onnxscript", "export"),
    "pyarrow": Package("pyarrow", "train"),
    "rich": Package("rich", "train"),
    "safetensors": Package("safetensors", "train"),
    "scipy": Package("scipy", "train"),
    "sklearn": Package("scikit-learn", "train"),
    "tensorboard": Package("tensorboard", "train"),
    "timm": Package("timm", "train"),
    "torchvision": Package("torchvision", "train"),
    "typing_extensions": Package("typing_extensions", "train"),
    "wandb": Package("wandb", "wandb"),
    "yaml": Package("PyYAML", "train"),
}


def extra_of(module: str) -> str | None:
    """The extra that brings a module; None for a module that is torch's, Python's or not known here.

    DALI's is that of the CUDA version for which the imported torch is built, cu13 where it is built for none.
    """
    root = module.partition(".")[0]
    if root == "nvidia":
        torch: Any = sys.modules.get("torch")
        cuda = getattr(getattr(torch, "version", None), "cuda", None) or "13"
        return "cu12" if cuda.startswith("12.") else "cu13"
    return PACKAGES[root].extra if root in PACKAGES else None


def install(module: str) -> str:
    """The command that installs a package of PACKAGES: `pip install 'ijckd-fast[train]'`."""
    return f"pip install 'ijckd-fast[{extra_of(module)}]'"


def missing(what: str, error: ImportError) -> str | None:
    """A sentence for `what` (a command, a public name) that could not import a package of an extra, or None.

    Only where it is not installed: what a broken installation says is the better text.
    """
    if not isinstance(error, ModuleNotFoundError) or error.name is None or extra_of(error.name) is None:
        return None
    package = PACKAGES[error.name.partition(".")[0]]
    name = "NVIDIA DALI" if package.distribution.startswith("nvidia") else package.distribution
    return f"{what} needs {name}, which is not installed: {install(error.name)}"
