"""What every batch consists of, before an image is opened: a pure function of index, seed, epoch, step and world size.

augment.py (settings), crops.py, affine.py and mixup.py (what is drawn), stand_ins.py (for images that cannot be read
any more), batch.py (one batch), plans.py (TrainPlan, ViewPlan, EvalPlan).
"""

from __future__ import annotations

from ijckd_fast.data.plan.affine import random_affine
from ijckd_fast.data.plan.augment import AFFINE_OFF, Augment, check_views
from ijckd_fast.data.plan.batch import BatchPlan
from ijckd_fast.data.plan.crops import padded_crop, random_resized_crop, resize_and_center_crop
from ijckd_fast.data.plan.mixup import Mixing, mixing
from ijckd_fast.data.plan.plans import EvalPlan, Plan, TrainPlan, ViewPlan
from ijckd_fast.data.plan.stand_ins import StandIns, TooManyUnreadable, what_to_do

__all__ = [
    "AFFINE_OFF",
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
    "random_affine",
    "random_resized_crop",
    "resize_and_center_crop",
    "what_to_do",
]
