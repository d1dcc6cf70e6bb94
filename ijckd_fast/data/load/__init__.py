"""Executors turn a plan's batches into pixels. They add no randomness of their own.

loader.py is what they share, warps and mixing too: dali.py (the fast one of image files), blocks.py and gpu_blocks.py
(of block packs), pillow.py (the oracle of both), synthetic.py (noise), dataset.py (items of a torch dataset).
backends.py has them by name. parity.py measures how far DALI's pixels, or the block executor's, are from Pillow's.
"""

from __future__ import annotations

from ijckd_fast.data.load import parity
from ijckd_fast.data.load.backends import AUTO, BACKENDS, backend_of, make_loader, refuse_backend
from ijckd_fast.data.load.dataset import DatasetLoader, index_dataset
from ijckd_fast.data.load.loader import Batch, Loader, deliver, mixed, warped
from ijckd_fast.data.load.pillow import PillowLoader
from ijckd_fast.data.load.synthetic import SyntheticLoader

__all__ = [
    "AUTO",
    "BACKENDS",
    "Batch",
    "DatasetLoader",
    "Loader",
    "PillowLoader",
    "SyntheticLoader",
    "backend_of",
    "deliver",
    "index_dataset",
    "make_loader",
    "mixed",
    "parity",
    "refuse_backend",
    "warped",
]
