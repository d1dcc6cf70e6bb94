"""The executors by name."""

from __future__ import annotations

from typing import Any

from ijckd_fast.data.load.loader import Loader
from ijckd_fast.data.load.pillow import PillowLoader
from ijckd_fast.data.load.synthetic import SyntheticLoader
from ijckd_fast.data.plan import Plan
from ijckd_fast.errors import UserError, did_you_mean

BACKENDS = ("dali", "pillow", "synthetic")


def make_loader(backend: str, plan: Plan, **settings: Any) -> Loader:
    """The executor called `backend` on a plan; see Loader for the settings.

    raises UserError for an unknown backend, when DALI is asked for and not installed, or for a block pack, which it
           cannot read: there is no silent fallback
    """
    if backend == "pillow":
        return PillowLoader(plan, **settings)
    if backend == "synthetic":
        return SyntheticLoader(plan, **settings)
    if backend == "dali":
        if plan.index.blocks is not None:
            raise UserError(
                f"the data backend 'dali' reads image files, but {plan.index.root}/{plan.index.split} holds a block "
                "pack; choose --data-backend pillow"
            )
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
