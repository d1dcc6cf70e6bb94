"""Webdataset shards: tar archives of images, read in any order by an index of where in its archive each image lies.

A sample is what shares a key, a member's name up to the first dot of its last part: an image, and `<key>.cls` with its
label, a number or a class name. Without one the label is the folder that the image is in. Other members (.json, .txt)
are not read.
"""

from __future__ import annotations

import os
import re
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ijckd_fast.data.sources.listing import IMAGE_EXTENSIONS, Listing, settled, some, stamp_of
from ijckd_fast.data.sources.source import Content, Listed, Source
from ijckd_fast.errors import UserError

CLASSES_FILE = "classes.txt"
"""Beside train/ and val/: the class names of numeric labels, one in a line, from 0."""


class Shards(Source):
    """See the module."""

    title = "webdataset shards"
    in_shards = True

    @classmethod
    def recognised_by(cls, content: Content) -> Sequence[str]:
        """The tar archives, where nothing else makes them what something was unpacked from."""
        return [name for name in content.others if name.endswith(".tar")]

    def groups(self, classes: Sequence[str] | None, where: str) -> list[str]:
        """The archives, in the order of their names."""
        return [f"{self.content.split}/{name}" for name in self.recognised_by(self.content)]

    def list_group(self, group: str) -> Listing:
        """See list_shard."""
        return list_shard(str(self.content.root), group)

    def labels(self, listed: Listed, classes: Sequence[str] | None) -> tuple[tuple[str, ...], np.ndarray]:
        """See class_names."""
        assert listed.numbers is not None
        names, positions = class_names(self.content.root, listed.labels, classes)
        return names, positions[listed.numbers]


def list_shard(root: str, shard: str) -> Listing:
    """The images in the archive root/shard, in the order in which they lie there, with the label of each.

    raises  OSError where it cannot be read; UserError where it is no intact tar archive, or an image has no label
    """
    now, stamp = time.time_ns(), stamp_of(root, shard)
    images: dict[str, tarfile.TarInfo] = {}
    classes: dict[str, str] = {}
    path = os.path.join(root, shard)
    last = "its beginning"
    try:
        with tarfile.open(path, "r:", errorlevel=1) as archive:
            for member in archive:
                last = repr(member.name)
                folder, _, name = member.name.rpartition("/")
                key, dot, extension = name.partition(".")
                key = f"{folder}/{key}"
                if not member.isfile() or not dot or name.startswith("."):
                    continue
                if extension.lower() == "cls":
                    content = archive.extractfile(member)
                    classes[key] = content.read().decode(errors="replace").strip() if content else ""
                elif f".{extension.lower()}".endswith(IMAGE_EXTENSIONS):
                    if key in images:
                        raise UserError(
                            f"{path} must have one image for each key, found {images[key].name!r} and {member.name!r}; "
                            "pack it again"
                        )
                    images[key] = member
            with open(path, "rb") as file:
                file.seek(archive.offset)
                if file.read(512) != bytes(512):  # cut between two members it would pass for a smaller archive
                    raise tarfile.ReadError("no end-of-archive mark")
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{path} must be an intact tar archive without compression, found: {error}, after {last}; restore it, or "
            "remove it to do without its images"
        ) from error
    labels = [classes.get(key) or os.path.basename(key.rpartition("/")[0]).removeprefix(".") for key in images]
    bare = [member.name for member, label in zip(images.values(), labels, strict=True) if not label]
    if bare:
        raise UserError(
            f"{path} must name the class of each image, in a member KEY.cls beside it or by the folder it is in, but "
            f"{len(bare)} have none ({some(bare)}); pack it again"
        )
    members = list(images.values())
    return Listing(
        pa.array([os.fsencode(f"{shard}/{member.name}") for member in members], pa.large_binary()),
        np.array([member.size for member in members], np.int64),
        np.full(len(members), stamp[1], np.int64),
        settled([stamp], now),
        np.array([member.offset_data for member in members], np.int64),
        labels,
    )


def class_names(root: Path, labels: Sequence[str], known: Sequence[str] | None) -> tuple[tuple[str, ...], np.ndarray]:
    """(class names, the position of each of `labels` among them).

    labels  as the shards have them, each once
    known   the names in their order; None: those in root/classes.txt, else the numbers from 0, else the labels, sorted
    raises  UserError for a label that is none of the names
    """
    numbers = [int(label) if re.fullmatch(r"\d{1,9}", label) else None for label in labels]
    if known is None and (root / CLASSES_FILE).is_file():
        # as it was written: a class's name may hold what a class list's reader would strip
        known = os.fsdecode((root / CLASSES_FILE).read_bytes()).split("\n")
        known = known[:-1] if known[-1] == "" else known
    if known is None:
        if None not in numbers:
            known = tuple(map(str, range(1 + max((n for n in numbers if n is not None), default=-1))))
        else:
            known = tuple(sorted(labels))
    position = {name: i for i, name in enumerate(known)}
    found = []
    for label, number in zip(labels, numbers, strict=True):
        if label in position:
            found.append(position[label])
        elif number is not None and number < len(known):
            found.append(number)
        else:
            raise UserError(
                f"the shards in {root} have the label {label!r}, which is none of the {len(known)} classes "
                f"({some(known)}) and no number of one; name the classes in their order by --class-list, or pack the "
                "shards again"
            )
    return tuple(known), np.array(found, np.int64)
