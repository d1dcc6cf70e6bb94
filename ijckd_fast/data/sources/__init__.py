"""Where images come from: the kinds of data folders, a file each (class_folders.py, flat_folder.py, shards.py,
blocks.py).

A kind says what it is recognised by, how its images are listed without opening them, where the bytes of each lie, and
of which class it is. Nothing above this room asks which kind a folder is. A new kind is a new file here and a row of
recognise.SOURCES.
"""

from __future__ import annotations

from ijckd_fast.data.sources.blocks import BlockFiles, BlockPlace
from ijckd_fast.data.sources.class_folders import ClassFolders
from ijckd_fast.data.sources.flat_folder import FlatFolder
from ijckd_fast.data.sources.label_files import read_class_list, read_labels
from ijckd_fast.data.sources.listing import IMAGE_EXTENSIONS, ImageTable, Listing, some
from ijckd_fast.data.sources.parquet import ParquetFiles
from ijckd_fast.data.sources.passed_over import PassedOver
from ijckd_fast.data.sources.places import Checked, Extent, Place, WholeFile, extent
from ijckd_fast.data.sources.recognise import SOURCES, holds_blocks, open_source
from ijckd_fast.data.sources.shards import Shards
from ijckd_fast.data.sources.source import Content, Fields, InOrder, Listed, Source
from ijckd_fast.data.sources.splits import require_folder
from ijckd_fast.data.sources.sums import CLASSES_FILE

__all__ = [
    "CLASSES_FILE",
    "IMAGE_EXTENSIONS",
    "SOURCES",
    "BlockFiles",
    "BlockPlace",
    "Checked",
    "ClassFolders",
    "Content",
    "Extent",
    "Fields",
    "FlatFolder",
    "ImageTable",
    "InOrder",
    "Listed",
    "Listing",
    "ParquetFiles",
    "PassedOver",
    "Place",
    "Shards",
    "Source",
    "WholeFile",
    "extent",
    "holds_blocks",
    "open_source",
    "read_class_list",
    "read_labels",
    "require_folder",
    "some",
]
