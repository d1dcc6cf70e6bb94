"""What every batch consists of, before an image is opened: a pure function of index, seed, epoch, step and world size."""

from __future__ import annotations

from ijckd_fast.data.plan.plans import (
    Augment,
    BatchPlan,
    EvalPlan,
    Mixing,
    Plan,
    StandIns,
    TooManyUnreadable,
    TrainPlan,
    ViewPlan,
    check_views,
    mixing,
    padded_crop,
    random_resized_crop,
    resize_and_center_crop,
)

__all__ = [
    "Augment",
    "BatchPlan",
    "EvalPlan",
    "Mixing",
    "Plan",
    "StandIns",
    "TooManyUnreadable",
    "TrainPlan",
    "ViewPlan",
    "check_views",
    "mixing",
    "padded_crop",
    "random_resized_crop",
    "resize_and_center_crop",
]
