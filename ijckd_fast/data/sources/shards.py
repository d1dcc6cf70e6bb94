"""Webdataset shards: tar archives of images, read in any order by an index of where in its archive each image lies.

Each image's class is a number or a class name in KEY.cls or in a field of KEY.json (shard_labels.py), where KEY is its
own name (`photo.0.jpg`, `photo.0.cls`) or that up to the first dot of its last part, as webdataset has it. In an
archive without either the label is the folder that the image is in, and its whole name counts. Members have the names
that unpacking would give them; links are followed; other members (.txt) are counted and not read.
"""

from __future__ import annotations

import os
import posixpath
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from ijckd_fast.data.sources.info_file import SplitInfo
from ijckd_fast.data.sources.listing import IMAGE_EXTENSIONS, Listing, is_hidden, settled, some, stamp_of
from ijckd_fast.data.sources.names import counterparts, did_you_mean, require_distinct
from ijckd_fast.data.sources.passed_over import NO_CLASS, Tally
from ijckd_fast.data.sources.places import Extent
from ijckd_fast.data.sources.shard_labels import LabelKey, Member, labels_of_shard, may_hold_label
from ijckd_fast.data.sources.source import Content, Fields, Listed, Source
from ijckd_fast.data.sources.sums import CLASSES_FILE, Sums
from ijckd_fast.errors import UserError

LINKS = "links that lead to no member"
SPARSE = "sparse members"  # whose bytes do not lie together
REPLACED = "later members of the same name"
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # compressed ones are refused by name
_LINKS_IN_A_ROW = 16  # more lead in circles


class Shards(Source):
    """See the module."""

    title = "webdataset shards"
    in_shards = True
    takes_fields: ClassVar[tuple[str, ...]] = ("label_key",)
    holds_many: ClassVar[tuple[str, ...]] = _ARCHIVES

    @classmethod
    def recognised_by(cls, content: Content) -> Sequence[str]:
        """The tar archives, where nothing else makes them what something was unpacked from."""
        return [name for name in content.others if name.lower().endswith(_ARCHIVES)]

    def __init__(self, content: Content, label_file: str | Path | None, fields: Fields) -> None:
        super().__init__(content, label_file, fields)
        alt_label = None if content.info is None else content.info.alt_label
        # an info file's field, and numbers of images that have it, are the maker's; the user knows better
        self._counted = content.info if not (alt_label and fields.label_key) else None
        self._key = LabelKey.parsed(fields.label_key or (alt_label and f"json:{alt_label}"))
        self._sums = Sums(content.root, content.split)

    def groups(self, classes: Sequence[str] | None, where: str) -> list[str]:
        """The archives, in the order of their names; UserError where others have checksums."""
        archives = [self.content.below(name) for name in self.recognised_by(self.content)]
        self._sums.require_all(archives)
        return archives

    def list_group(self, group: str) -> Listing:
        """See list_shard; Damaged where it is not the archive that its checksum is of."""
        self._sums.require(group)
        return list_shard(str(self.content.root), group, self._key)

    @property
    def labels_asked(self) -> str:
        """The key."""
        return str(self._key) or "cls, json or folder"

    def unused(self) -> Sequence[str]:
        """Whatever lies beside the archives."""
        archives = set(self.recognised_by(self.content))
        return [*(name for name in self.content.others if name not in archives), *self.content.beside]

    def labels(self, listed: Listed, classes: Sequence[str] | None) -> tuple[tuple[str, ...], np.ndarray]:
        """See class_names."""
        assert listed.numbers is not None
        if self._counted is not None:
            self._require_counts(self._counted, listed)
        if classes is None:
            self._sums.require(CLASSES_FILE)
        names, positions = class_names(self.content.root, listed.labels, classes)
        return names, positions[listed.numbers]

    def _require_counts(self, info: SplitInfo, listed: Listed) -> None:
        """UserError where the archives hold other numbers of images than an info file says.

        It may count those of no class, or not.
        """
        found = [images + skipped for images, skipped in zip(listed.rows, listed.skipped, strict=True)]
        archives = self.recognised_by(self.content)
        for name, expected, there, images in zip(archives, info.lengths or found, found, listed.rows, strict=True):
            if expected not in (there, images):
                raise UserError(
                    f"{info.path} says that {name} holds {expected} images, but {self.content.root / name} has "
                    f"{there}; fetch the archive again, or remove the info file to do with what is there"
                )
        if info.samples not in (None, sum(found), sum(listed.rows)):
            raise UserError(
                f"{info.path} says that the split {info.key!r} has {info.samples} images, but its {len(found)} "
                f"archives in {self.content.root} have {sum(found)}; fetch them again, or remove the info file to do "
                "with what is there"
            )


def list_shard(root: str, shard: str, key: LabelKey) -> Listing:
    """The images in the archive root/shard, in the order in which they lie there, with the label of each.

    Those of no class, whose label is a negative number, are counted and not listed.

    raises  OSError where it cannot be read; UserError where it is no intact tar archive, or an image has no label
    """
    now, stamp = time.time_ns(), stamp_of(root, shard)
    path = os.path.join(root, shard)
    others = Tally()
    members = _members(path, shard, others)
    images = [name for name in members if name.lower().endswith(IMAGE_EXTENSIONS)]
    labels = labels_of_shard(path, shard, members, images, key, lambda member: _content(path, member), others)

    def head(name: str, length: int) -> bytes:
        member = members[name.removeprefix(f"{shard}/")]
        return _content(path, member._replace(length=min(length, member.length)))

    found = [members[name] for name in labels.found]
    return Listing(
        pa.array([os.fsencode(f"{shard}/{member.name}") for member in found], pa.large_binary()),
        np.array([member.length for member in found], np.int64),
        np.full(len(found), stamp[1], np.int64),
        settled([stamp], now),
        np.array([member.offset for member in found], np.int64),
        list(labels.found.values()),
        labels_from=labels.source,
        passed_over=others.counts(head, images=(LINKS, SPARSE), others=(REPLACED, NO_CLASS)),
    )


class _Link(NamedTuple):
    name: str  # as the archive has it
    target: str  # the name of what it leads to, as unpacking would make it


def _members(path: str, shard: str, others: Tally) -> dict[str, Member]:
    """The files in an archive that are not hidden, by their names after unpacking, links as what they lead to.

    As unpacking does, the last member of a name has it. others: takes links that lead nowhere, sparse members, and
    those that a later one of the same name replaces.
    """
    entries: dict[str, Member | _Link | None] = {}
    for member, label in _read_archive(path):
        name = _unpacked(member.name)
        entry: Member | _Link | None = None
        if member.islnk():  # to a member as it is now, which a later one may replace
            target = _unpacked(member.linkname)
            if target == name:
                continue
            now = entries.get(target)
            entry = now._replace(name=member.name) if isinstance(now, Member) else _Link(member.name, target)
        elif member.issym():
            entry = _Link(member.name, posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname)))
        elif member.isfile() and not member.issparse():
            entry = Member(member.name, member.offset_data, member.size, label)
        elif not member.issparse():  # a folder, a pipe
            continue
        if name in entries:
            del entries[name]  # so that the new one stands where it lies
            if not _is_hidden(name):
                others.add(f"{shard}/{name}", REPLACED)
        entries[name] = entry
    files: dict[str, Member] = {}
    for name, entry in entries.items():
        if _is_hidden(name):
            continue
        found = entry
        for _ in range(_LINKS_IN_A_ROW):
            if not isinstance(found, _Link):
                break
            found = entries.get(found.target)
        if entry is not None and isinstance(found, Member):
            files[name] = found._replace(name=entry.name)
        else:
            others.add(f"{shard}/{name}", SPARSE if entry is None else LINKS)
    return files


def _unpacked(name: str) -> str:
    """A member's name as unpacking would make it: relative, without './'."""
    return re.sub(r"^/*(\.\./)*", "", posixpath.normpath(name))


def _is_hidden(name: str) -> bool:
    return any(map(is_hidden, name.split("/")))


def _read_archive(path: str) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Each member, with its content if it may hold a label: read in passing, where the disk is already."""
    last = "its beginning"
    try:
        with tarfile.open(path, "r:", errorlevel=1) as archive:
            for member in archive:
                last = repr(member.name)
                content = archive.extractfile(member) if member.isfile() and may_hold_label(member.name) else None
                yield member, None if content is None else content.read()
            with open(path, "rb") as file:
                file.seek(archive.offset)
                if file.read(512) != bytes(512):  # cut between two members it would pass for a smaller archive
                    raise tarfile.ReadError("no end-of-archive mark")
                while block := file.read(512):
                    if block != bytes(512):
                        _refuse_second_archive(path, block)
                        break
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{path} must be an intact tar archive without compression, found: {error}, after {last}; restore it, or "
            "remove it to do without its images"
        ) from error


def _refuse_second_archive(path: str, block: bytes) -> None:
    """UserError where a block behind an archive's end begins another one, which nothing that reads tar would show."""
    try:
        member = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.TarError:  # what else may stand there is no member
        return
    raise UserError(
        f"{path} must be one tar archive, found another one behind its end, which begins with {member.name!r}; unpack "
        "it with tar --ignore-zeros and pack it again"
    )


def _content(path: str, member: Member) -> bytes:
    return Extent(path, member.offset, member.length).read()


def class_names(
    root: Path, labels: Sequence[str], known: Sequence[str] | None, what: str = "shards"
) -> tuple[tuple[str, ...], np.ndarray]:
    """(class names, the position of each of `labels` among them).

    labels  as the shards have them, each once; what: they are, for an error
    known   the names in their order; None: those in root/classes.txt, else the numbers from 0, else the labels, sorted
    raises  UserError for a label that is none of the names
    """
    numbers = [int(label) if re.fullmatch(r"\d{1,9}", label) else None for label in labels]
    if known is None and (root / CLASSES_FILE).is_file():
        # as it was written: a class's name may hold what a class list's reader would strip
        known = os.fsdecode((root / CLASSES_FILE).read_bytes().removeprefix(b"\xef\xbb\xbf")).split("\n")
        known = known[:-1] if known[-1] == "" else known
        if known and all(name.endswith("\r") for name in known):  # lines as Windows ends them
            known = [name[:-1] for name in known]
    if known is None:
        if None not in numbers:
            known = tuple(map(str, range(1 + max((n for n in numbers if n is not None), default=-1))))
        else:
            known = tuple(sorted(labels))
            require_distinct(known, f"the class names in the {what} in {root}")
    position = {name: i for i, name in enumerate(known)}
    same = counterparts(labels, known, f"classes in the {what} in {root}")
    found = []
    for label, number in zip(labels, numbers, strict=True):
        if label in same:
            found.append(position[same[label]])
        elif number is not None and number < len(known):
            found.append(number)
        else:
            raise UserError(
                f"the {what} in {root} have the label {label!r}, which is none of the {len(known)} classes "
                f"({some(known)}) and no number of one; name the classes in their order by --class-list, or pack the "
                f"shards again{did_you_mean([label], known)}"
            )
    return tuple(known), np.array(found, np.int64)
