"""The executors by name."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch

from ijckd_fast import extras
from ijckd_fast.data.index import Index
from ijckd_fast.data.load.blocks import BlockLoader
from ijckd_fast.data.load.gpu_blocks import GpuBlockLoader
from ijckd_fast.data.load.gpu_memory import BlocksOn
from ijckd_fast.data.load.loader import Loader
from ijckd_fast.data.load.pillow import PillowLoader
from ijckd_fast.data.load.synthetic import SyntheticLoader
from ijckd_fast.data.plan import Plan
from ijckd_fast.errors import UserError, did_you_mean
from ijckd_fast.head import load_libraries

AUTO = "auto"
BACKENDS = (AUTO, "dali", "blocks", "pillow", "synthetic")


def backend_of(blocks: bool) -> Literal["dali", "blocks"]:
    """What `auto` is. blocks: the images are in a block pack."""
    return "blocks" if blocks else "dali"


def refuse_backend(backend: str, folder: str, blocks: bool) -> None:
    """UserError where `backend` cannot read the images of `folder`; blocks: they are in a block pack."""
    if backend == "dali" and blocks:
        raise UserError(
            f"the data backend 'dali' reads image files, but {folder} holds a block pack; leave --data-backend out, or "
            "choose blocks or pillow"
        )
    if backend == "blocks" and not blocks:
        raise UserError(
            f"the data backend 'blocks' reads block packs, but {folder} holds image files; leave --data-backend out, "
            "or make a block pack of them: ijckd-fast pack --codec blocks"
        )


def make_loader(backend: str, plan: Plan, **settings: Any) -> Loader:
    """The executor called `backend` on a plan; see Loader for the settings.

    backend  auto: blocks for a block pack, else dali
    raises   UserError for an unknown backend, when DALI is asked for and not installed, or for images that the backend
             cannot read (dali: block packs; blocks: all others): there is no silent fallback
    blocks_on, of blocks, means nothing without a GPU, see GpuBlockLoader
    """
    index: Index = plan.index
    if backend == AUTO:
        backend = backend_of(index.blocks is not None)
    refuse_backend(backend, f"{index.folder}", index.blocks is not None)
    if backend == "pillow":
        return PillowLoader(plan, **settings)
    if backend == "blocks":
        return _block_loader(plan, **settings)
    if backend == "synthetic":
        return SyntheticLoader(plan, **settings)
    if backend == "dali":
        try:  # only here: importing DALI takes most of a second and 0.5 GB of libraries
            from ijckd_fast.data.load.dali import DaliLoader
        except ImportError as error:
            raise UserError(
                f"the data backend 'dali' needs NVIDIA DALI, which could not be loaded ({error}): "
                f"{extras.install('nvidia.dali')}, or choose --data-backend pillow"
            ) from error
        return DaliLoader(plan, **settings)
    raise UserError(
        f"the data backend must be one of {', '.join(BACKENDS)}, found {backend!r}{did_you_mean(backend, BACKENDS)}"
    )


def _block_loader(plan: Plan, blocks_on: BlocksOn = "pinned", **settings: Any) -> BlockLoader:
    """On a GPU its kernels make the views, where this installation has them."""
    if torch.device(settings.get("device", "cpu")).type != "cuda":
        return BlockLoader(plan, **settings)
    if load_libraries():
        return GpuBlockLoader(plan, blocks_on=blocks_on, **settings)
    warnings.warn(
        "views of a block pack are made on the CPU for want of the CUDA library (_C_cuda.so): build it where nvcc is, "
        "with pip install -e .",
        stacklevel=3,
    )
    return BlockLoader(plan, **settings)
