"""The executors by name."""

from __future__ import annotations

from typing import Any, Literal

from ijckd_fast.data.index import Index
from ijckd_fast.data.load.blocks import BlockLoader
from ijckd_fast.data.load.loader import Loader
from ijckd_fast.data.load.pillow import PillowLoader
from ijckd_fast.data.load.synthetic import SyntheticLoader
from ijckd_fast.data.plan import Plan
from ijckd_fast.errors import UserError, did_you_mean

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
    """
    index: Index = plan.index
    if backend == AUTO:
        backend = backend_of(index.blocks is not None)
    refuse_backend(backend, f"{index.root}/{index.split}", index.blocks is not None)
    if backend == "pillow":
        return PillowLoader(plan, **settings)
    if backend == "blocks":
        return BlockLoader(plan, **settings)
    if backend == "synthetic":
        return SyntheticLoader(plan, **settings)
    if backend == "dali":
        try:  # only here: importing DALI takes most of a second and 0.5 GB of libraries
            from ijckd_fast.data.load.dali import DaliLoader
        except ImportError as error:
            raise UserError(
                f"the data backend 'dali' needs NVIDIA DALI, which could not be loaded ({error}); run: pip install "
                "nvidia-dali-cuda130, or choose --data-backend pillow"
            ) from error
        return DaliLoader(plan, **settings)
    raise UserError(
        f"the data backend must be one of {', '.join(BACKENDS)}, found {backend!r}{did_you_mean(backend, BACKENDS)}"
    )
