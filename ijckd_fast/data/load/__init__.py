"""Executors, which turn a plan's batches into pixels and add no randomness of their own; and how far apart two of them are."""

from __future__ import annotations

from ijckd_fast.data.load import parity
from ijckd_fast.data.load.backends import BACKENDS, make_loader
from ijckd_fast.data.load.dataset import DatasetLoader, index_dataset
from ijckd_fast.data.load.loader import Batch, Loader, deliver, mixed
from ijckd_fast.data.load.pillow import PillowLoader
from ijckd_fast.data.load.synthetic import SyntheticLoader

__all__ = [
    "BACKENDS",
    "Batch",
    "DatasetLoader",
    "Loader",
    "PillowLoader",
    "SyntheticLoader",
    "deliver",
    "index_dataset",
    "make_loader",
    "mixed",
    "parity",
]
