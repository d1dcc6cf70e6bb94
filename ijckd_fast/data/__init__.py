"""From folders of images to batches: index.py (scan once) -> plan.py (what a batch is) -> an executor (its pixels)."""

from __future__ import annotations

from typing import Any

from ijckd_fast.data.dataset import DatasetLoader, index_dataset
from ijckd_fast.data.digits import write_digits
from ijckd_fast.data.index import Index, Paths, build_index
from ijckd_fast.data.listing import IMAGE_EXTENSIONS
from ijckd_fast.data.loader import Batch, Loader
from ijckd_fast.data.pillow import PillowLoader
from ijckd_fast.data.plan import Augment, BatchPlan, EvalPlan, Mixing, Plan, TooManyUnreadable, TrainPlan, ViewPlan
from ijckd_fast.data.synthetic import SyntheticLoader
from ijckd_fast.errors import UserError, did_you_mean

__all__ = [
    "BACKENDS",
    "IMAGE_EXTENSIONS",
    "Augment",
    "Batch",
    "BatchPlan",
    "DatasetLoader",
    "EvalPlan",
    "Index",
    "Loader",
    "Mixing",
    "Paths",
    "PillowLoader",
    "Plan",
    "SyntheticLoader",
    "TooManyUnreadable",
    "TrainPlan",
    "ViewPlan",
    "build_index",
    "index_dataset",
    "make_loader",
    "write_digits",
]

BACKENDS = ("dali", "pillow", "synthetic")


def make_loader(backend: str, plan: Plan, **settings: Any) -> Loader:
    """The executor called `backend` on a plan; see Loader for the settings.

    raises UserError for an unknown backend, or when DALI is wanted and not installed: there is no silent fallback
    """
    if backend == "pillow":
        return PillowLoader(plan, **settings)
    if backend == "synthetic":
        return SyntheticLoader(plan, **settings)
    if backend == "dali":
        try:  # only here: importing DALI takes most of a second and 0.5 GB of libraries
            from ijckd_fast.data.dali import DaliLoader
        except ImportError as error:
            raise UserError(
                f"the data backend 'dali' needs NVIDIA DALI, which could not be loaded ({error}); run: pip install "
                "nvidia-dali-cuda130, or choose --data-backend pillow"
            ) from error
        return DaliLoader(plan, **settings)
    raise UserError(
        f"the data backend must be one of {', '.join(BACKENDS)}, found {backend!r}{did_you_mean(backend, BACKENDS)}"
    )
