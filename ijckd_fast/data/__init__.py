"""From folders of images to batches.

blocks/    images in blocks of samples: their bytes, their views
sources/   the kinds of data folders: how each is recognised, listed and read
index/     the images of a split, each looked at once
plan/      what every batch is, before an image is opened
load/      executors, which make its pixels
prepare/   what makes data folders: downloaded archives, the digits, packs
Each stands on those above it alone; all draw from counter_rng.py. imagenet_names.py: what people call the classes.
"""

from __future__ import annotations

from ijckd_fast.data.imagenet_names import class_names
from ijckd_fast.data.index import DataFolder, Index, Paths, build_index
from ijckd_fast.data.load import (
    AUTO,
    BACKENDS,
    Batch,
    DatasetLoader,
    Loader,
    PillowLoader,
    SyntheticLoader,
    backend_of,
    deliver,
    index_dataset,
    make_loader,
    parity,
    refuse_backend,
)
from ijckd_fast.data.plan import (
    AFFINE_OFF,
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
from ijckd_fast.data.sources import IMAGE_EXTENSIONS, Fields, holds_blocks

__all__ = [
    "AFFINE_OFF",
    "AUTO",
    "BACKENDS",
    "IMAGE_EXTENSIONS",
    "Augment",
    "Batch",
    "BatchPlan",
    "DataFolder",
    "DatasetLoader",
    "EvalPlan",
    "Fields",
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
    "backend_of",
    "build_index",
    "check_views",
    "class_names",
    "deliver",
    "holds_blocks",
    "index_dataset",
    "make_loader",
    "parity",
    "refuse_backend",
    "write_digits",
]
