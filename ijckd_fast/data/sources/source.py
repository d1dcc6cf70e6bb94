"""What a source is: one way in which a split can hold images. Each kind is a class in a file beside this one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from ijckd_fast.data.blocks import Bits
from ijckd_fast.data.sources.info_file import SplitInfo
from ijckd_fast.data.sources.listing import Listing, list_images
from ijckd_fast.data.sources.passed_over import PassedOver, Tally, head_of_file, kind_of
from ijckd_fast.data.sources.places import Place, extent

SPLITS: dict[str, tuple[str, ...]] = {"train": ("train",), "val": ("val", "validation")}
"""The splits, and what their folders may be called."""


@dataclass(frozen=True)
class Fields:
    """Where a sample's image and label stand, as users say; None: as the source finds them by itself.

    image_column, label_column  of Parquet files; A.B is the field B of a struct A
    label_key                   of webdataset shards, see shard_labels.LabelKey
    """

    image_column: str | None = None
    label_column: str | None = None
    label_key: str | None = None


@dataclass(frozen=True)
class Content:
    """What there is of a split, seen without going deeper. Hidden names do not count, see listing.is_hidden.

    where    the folder that it lies in, below the root; '': the root itself
    folders  names in there, sorted as torchvision sorts them
    images   names of image files, sorted; a file's name says that it is one
    others   names of all other files, sorted; where the folder is that of several splits, those of this one
    beside   what else lies in a folder of several splits and is of none
    info     what an info file says of `others`; None where there is none
    """

    root: Path
    split: str
    where: str
    folders: tuple[str, ...]
    images: tuple[str, ...]
    others: tuple[str, ...]
    beside: tuple[str, ...] = ()
    info: SplitInfo | None = None

    @property
    def folder(self) -> Path:
        """root/where."""
        return self.root / self.where

    @property
    def called(self) -> str:
        """The folder, as messages name it; where it is that of several splits, with this one."""
        shared = self.info is not None or (self.where not in SPLITS[self.split] and not (self.folders or self.images))
        return f"{self.folder} ({self.split})" if shared else str(self.folder)

    def below(self, name: str) -> str:
        """The path of what is called `name` in the folder, relative to the root."""
        return f"{self.where}/{name}" if self.where else name

    def passed_over(self, names: Sequence[str]) -> tuple[PassedOver, ...]:
        """Those of `images`, `others` and `beside` that a source makes no use of."""
        unused, images = Tally(), set(self.images)
        outside = f"in {self.where}/ itself" if self.where else "outside of the folders"
        for name in names:
            unused.add(self.below(name), f"{kind_of(name)} {outside}" if name in images else None)
        kinds = {f"{kind_of(name)} {outside}" for name in images}
        return unused.counts(head_of_file(str(self.root)), images=tuple(kinds))


class InOrder(NamedTuple):
    """Images of a split that can only be read one after the other, which training does not.

    images  how many there are; size: bytes of their files, about
    why     a clause: what keeps them from being read in any order
    """

    images: int
    size: int
    why: str

    @property
    def amount(self) -> str:
        """How much it is, for people."""
        size = f"{self.size / 1e9:,.1f} GB" if self.size >= 1e9 else f"{self.size / 1e6:,.1f} MB"
        return f"{self.images:,} images, {size}"


@dataclass(frozen=True, eq=False)
class Listed:
    """What the listings of all groups of a source say together, of N images.

    paths    [N] relative to the root
    rows     of each group, how many images it holds
    skipped  of each group, how many more it holds whose labels say that they are of no class
    labels   the different labels that the listings gave, in no special order; () where they gave none
    numbers  [N] int64, positions in `labels`; None where the listings gave none
    """

    paths: Iterable[str]
    rows: Sequence[int]
    skipped: Sequence[int]
    labels: Sequence[str]
    numbers: np.ndarray | None


class Source(ABC):
    """The images of one split. Made by `recognise.open_source`, for a content that `recognised_by` said yes to.

    A source is listed in groups: what is listed at one go, and again only where it has changed. A group is a folder,
    whose images are files of their own, or a shard, one file that holds many images.
    """

    title: ClassVar[str]
    """What an error calls it, in the plural: 'class folders'."""

    labels_from: ClassVar[str] = ""
    """What says the labels, in a few words; '' where each listing has its own."""

    takes_label_file: ClassVar[bool] = False
    """Whether a text file (--val-labels) says the class of each image."""

    takes_fields: ClassVar[tuple[str, ...]] = ()
    """Which of Fields mean something."""

    holds_many: ClassVar[tuple[str, ...]] = ()
    """What the files end in, lower case, that may lie in one folder for all splits; see splits.py."""

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
        """The names in the split's folder that are neither a group nor in one: counted as passed over."""
        return self.content.beside

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
    def labels_asked(self) -> str:
        """What the labels in a listing depend on beside the group's content: other ones must be listed again."""
        return ""

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

    def only_in_order(self, offsets: np.ndarray) -> InOrder | None:
        """What there is to say where images can only be read one after the other; else None. offsets: [N], as listed"""
        return None

    @abstractmethod
    def labels(self, listed: Listed, classes: Sequence[str] | None) -> tuple[tuple[str, ...], np.ndarray]:
        """(class names in the order of their labels, label of each image [N] int64). Raises UserError.

        classes  as for `groups`
        """
