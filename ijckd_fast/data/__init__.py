"""From folders of images to batches: sources/ -> index/ (scan once) -> plan/ (what a batch is) -> load/ (its pixels); prepare/."""

from __future__ import annotations

from ijckd_fast.data.index import Index, Paths, build_index
from ijckd_fast.data.load import (
    BACKENDS,
    Batch,
    DatasetLoader,
    Loader,
    PillowLoader,
    SyntheticLoader,
    deliver,
    index_dataset,
    make_loader,
    parity,
)
from ijckd_fast.data.plan import (
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
)
from ijckd_fast.data.prepare import write_digits
from ijckd_fast.data.sources.listing import IMAGE_EXTENSIONS

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
    "StandIns",
    "SyntheticLoader",
    "TooManyUnreadable",
    "TrainPlan",
    "ViewPlan",
    "build_index",
    "check_views",
    "deliver",
    "index_dataset",
    "make_loader",
    "parity",
    "write_digits",
]
