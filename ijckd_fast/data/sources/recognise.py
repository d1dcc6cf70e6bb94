"""Which kind of source a data folder is: the one table of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ijckd_fast.data.sources.blocks import BlockFiles
from ijckd_fast.data.sources.class_folders import ClassFolders
from ijckd_fast.data.sources.flat_folder import FlatFolder
from ijckd_fast.data.sources.listing import some
from ijckd_fast.data.sources.parquet import ParquetFiles
from ijckd_fast.data.sources.passed_over import listed
from ijckd_fast.data.sources.shards import Shards
from ijckd_fast.data.sources.source import Content, Fields, Source
from ijckd_fast.data.sources.splits import look_into
from ijckd_fast.errors import UserError

SOURCES: tuple[type[Source], ...] = (ClassFolders, FlatFolder, BlockFiles, Shards, ParquetFiles)
"""The first that recognises a folder's content has it."""


_SUFFIXES = tuple(dict.fromkeys(suffix for kind in SOURCES for suffix in kind.holds_many))


def open_source(
    root: Path,
    split: str,
    label_file: str | Path | None = None,
    fields: Fields | None = None,
    itself: bool = False,
) -> Source:
    """The source that a split of a data folder is.

    label_file  names the class of each image, for a source that takes one
    fields      where image and label of a sample stand, for a source that takes such; of val they are the training
                images', which may lie otherwise
    itself      where root has no such split, root holds its images
    raises      UserError: no such folder, nothing in it, a label file that is missing, not needed or wrong, fields
                that mean nothing
    """
    content = look_into(root, split, _SUFFIXES, itself)
    kind = _recognised(content)
    if kind is not None:
        names = kind.recognised_by(content)
        if label_file is not None and not kind.takes_label_file:
            raise UserError(
                f"the label file {label_file} is for images that lie in {content.folder} itself, but there are "
                f"{kind.title} ({some(names)}), which say the class of what is in them; leave the label file out"
            )
        given = {} if fields is None else dataclasses.asdict(fields)
        given = {name: value for name, value in given.items() if value is not None}
        unused = [f"--{name.replace('_', '-')}" for name in given if name not in kind.takes_fields]
        if unused and split == "train":
            raise UserError(
                f"{' and '.join(unused)} would say where a sample's image or label stands, but {content.folder} has "
                f"{kind.title} ({some(names)}), which need no such; leave the option out"
            )
        taken = Fields(**{name: value for name, value in given.items() if name in kind.takes_fields})
        return kind(content, label_file, taken)
    others = content.passed_over(content.others)
    found = f"holds nothing that is read, only {listed(others)} (e.g. {others[0].example})" if others else "is empty"
    raise UserError(
        f"expected class folders of images, {content.folder}/<class>/*.jpg, but {content.folder} {found}; put one "
        "folder of images per class into it, or webdataset shards or Parquet files"
    )


def holds_blocks(root: Path, split: str) -> bool:
    """Whether root/split is a block pack; False where there is nothing to be read."""
    return (root / split).is_dir() and _recognised(look_into(root, split, _SUFFIXES)) is BlockFiles


def _recognised(content: Content) -> type[Source] | None:
    return next((kind for kind in SOURCES if kind.recognised_by(content)), None)
