"""The images of one split in a fixed order, each looked at once; and what is remembered of them between two starts."""

from __future__ import annotations

from ijckd_fast.data.index.build import Scan, build_index, scan
from ijckd_fast.data.index.check import CANNOT_BE_READ
from ijckd_fast.data.index.folder import DataFolder
from ijckd_fast.data.index.index import Index, Paths, stamps_of
from ijckd_fast.data.index.summary import summarize, summary_table

__all__ = [
    "CANNOT_BE_READ",
    "DataFolder",
    "Index",
    "Paths",
    "Scan",
    "build_index",
    "scan",
    "stamps_of",
    "summarize",
    "summary_table",
]
