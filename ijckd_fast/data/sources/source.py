"""What a source is: one way in which root/split can hold images. Each kind is a class in a file beside this one."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ijckd_fast.data.blocks import Bits
from ijckd_fast.data.sources.levels import meant_by_missing_split
from ijckd_fast.data.sources.listing import IMAGE_EXTENSIONS, Listing, is_folder, is_hidden, list_images, some
from ijckd_fast.data.sources.passed_over import PassedOver, Tally, head_of_file, kind_of
from ijckd_fast.data.sources.places import Place, extent
from ijckd_fast.errors import UserError


@dataclass(frozen=True)
class Content:
    """What root/split holds, seen without going deeper. Hidden names do not count, see listing.is_hidden.

    folders  names, sorted as torchvision sorts them
    images   names of image files, sorted; a file's name says that it is one
    others   names of all other files, sorted
    """

    root: Path
    split: str
    folders: tuple[str, ...]
    images: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """root/split."""
        return self.root / self.split

    def passed_over(self, names: Sequence[str]) -> tuple[PassedOver, ...]:
        """Those of `images` and `others` that a source makes no use of."""
        unused, images = Tally(), set(self.images)
        for name in names:
            unused.add(f"{self.split}/{name}", f"{kind_of(name)} in {self.split}/ itself" if name in images else None)
        outside = {f"{kind_of(name)} in {self.split}/ itself" for name in images}
        return unused.counts(head_of_file(str(self.root)), images=tuple(outside))


def look_into(root: Path, split: str) -> Content:
    """The content of root/split. Raises UserError where there is no such folder."""
    folder = root / split
    expected = f"expected class folders of images, {folder}/<class>/*.jpg"
    if not root.is_dir():
        raise UserError(f"{expected}, but {root} is not a folder; give the folder that holds train/ and val/")
    if not folder.is_dir():
        inside = sorted(entry.name for entry in os.scandir(root) if not entry.name.startswith("."))
        raise UserError(
            f"{expected}, but {root} has no folder {split!r} ({some(inside) or 'it is empty'}); give the folder that "
            f"holds train/ and val/{meant_by_missing_split(root, split)}"
        )
    folders, images, others = [], [], []
    for entry in os.scandir(folder):
        if is_hidden(entry.name):
            continue
        if is_folder(entry):
            folders.append(entry.name)
        elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
            images.append(entry.name)
        else:
            others.append(entry.name)
    return Content(root, split, tuple(sorted(folders)), tuple(sorted(images)), tuple(sorted(others)))


@dataclass(frozen=True, eq=False)
class Listed:
    """What the listings of all groups of a source say together, of N images.

    paths    [N] relative to the root
    rows     of each group, how many images it holds
    labels   the different labels that the listings gave, in no special order; () where they gave none
    numbers  [N] int64, positions in `labels`; None where the listings gave none
    """

    paths: Iterable[str]
    rows: Sequence[int]
    labels: Sequence[str]
    numbers: np.ndarray | None


@dataclass(frozen=True)
class Fields:
    """Where a sample's image and label stand, as users say; None: as the source finds them by itself.

    image_column, label_column  of Parquet files; A.B is the field B of a struct A
    """

    image_column: str | None = None
    label_column: str | None = None


class Source(ABC):
    """The images of one split. Made by `recognise.open_source`, for a content that `recognised_by` said yes to.

    A source is listed in groups: what is listed at one go, and again only where it has changed. A group is a folder,
    whose images are files of their own, or a shard, one file that holds many images.
    """

    title: ClassVar[str]
    """What an error calls it, in the plural: 'class folders'."""

    takes_label_file: ClassVar[bool] = False
    """Whether a text file (--val-labels) says the class of each image."""

    takes_fields: ClassVar[tuple[str, ...]] = ()
    """Which of Fields mean something."""

    class_is_group: ClassVar[bool] = False
    """Whether each group is a class, and stands where its label says."""

    in_shards: ClassVar[bool] = False
    """Whether the groups are shards. The times of a shard speak for every image in it, those of a folder do not."""

    def __init__(self, content: Content, label_file: str | Path | None, fields: Fields) -> None:
        """label_file, fields: given by the user; None, or for a source that takes them. Raises UserError."""
        self.content = content

    @classmethod
    @abstractmethod
    def recognised_by(cls, content: Content) -> Sequence[str]:
        """The names in `content` that make it a source of this kind; none where it is of another."""

    def unused(self) -> Sequence[str]:
        """The names in root/split itself that are neither a group nor in one: counted as passed over."""
        return ()

    @abstractmethod
    def groups(self, classes: Sequence[str] | None, where: str) -> list[str]:
        """What is listed, relative to the root, in the order in which the images of the index stand.

        classes  names in the order of their labels that are asked for; None: the source's own
        where    where they are from, for an error: 'the training data has'
        raises   UserError where the source shows already that its classes are others
        """

    def list_group(self, group: str) -> Listing:
        """The images of one group; called from several threads. Raises OSError where it cannot be read, UserError."""
        return list_images(str(self.content.root), group)

    @property
    def blocks(self) -> Bits | None:
        """Where the images are blocks (../blocks), of how many bits; None: they are image files as others write them.

        raises  UserError where that cannot be read
        """
        return None

    def place_in_shard(
        self, shard: str, offset: int, length: int, checksum: int | None, size: tuple[int, int]
    ) -> Place:
        """Where an image lies.

        shard     absolute path
        offset    as the listing has it; length: bytes
        checksum  that the image's bytes must have, as the listing's table or the first look at it says; None: unknown
        size      (width, height), as indexed
        """
        return extent(shard, offset, length, checksum, size)

    @abstractmethod
    def labels(self, listed: Listed, classes: Sequence[str] | None) -> tuple[tuple[str, ...], np.ndarray]:
        """(class names in the order of their labels, label of each image [N] int64). Raises UserError.

        classes  as for `groups`
        """
