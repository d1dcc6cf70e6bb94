"""What a listing passes over because of its name: counted by extension, and looked at where it may be an image."""

from __future__ import annotations

import os
import re
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

OTHER_IMAGES = frozenset(
    {
        *(".gif", ".avif", ".avifs", ".heic", ".heif", ".hif", ".jxl", ".jxr", ".wdp", ".hdp", ".qoi"),
        *(".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".svg", ".svgz", ".ico", ".cur", ".icns"),
        *(".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".raf", ".orf", ".rw2", ".pef"),
        *(".psd", ".psb", ".eps", ".tga", ".exr", ".dds", ".pcx", ".dcx", ".sgi", ".ras"),
        *(".xbm", ".xpm", ".pam", ".pfm", ".fits"),
    }
)
"""Extensions of images in formats that are not read."""

NO_EXTENSION, ODD_ENDING = "no extension", "an odd ending"
NO_CLASS = "a negative label"
"""The kind of images in a file of many that are skipped because their label, a negative number, says so."""

_EXTENSION = re.compile(r"\.[a-z][a-z0-9_]{0,11}")
_KINDS = 24  # that one group's tally tells apart: names with numbers after their dots would make thousands
_LOOKED_AT = 8  # files of one kind in one group, until one of them is an image; then at all
_HEAD = 16  # bytes that _MAGIC needs
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|BM.{4}\0{4}|RIFF.{4}WEBP|II[*+]\0|MM\0[*+]|P[1-7][ \t\r\n]+[\d#W]"
    rb"|.{4}ftyp(?:avi[fs]|hei[cfxs]|mif1|msf1|crx )|\0\0\0\x0c(?:jP  |JXL )|\xff\x4f\xff\x51|8BPS\0\x01",
    re.DOTALL,
)


class PassedOver(NamedTuple):
    """Files of one kind that are not read.

    kind     what their names end in, lower case, or words: NO_EXTENSION, ODD_ENDING
    files    how many there are
    images   how many of them are images, by their name or their first bytes
    example  one of them, an image if there is one; relative to the data folder
    """

    kind: str
    files: int
    images: int
    example: str


def kind_of(name: str) -> str:
    """The kind of a file name or path that is not read."""
    extension = os.path.splitext(name)[1].lower()
    return extension if _EXTENSION.fullmatch(extension) else ODD_ENDING if extension else NO_EXTENSION


class Tally:
    """Counts the files that the listing of one group passes over."""

    def __init__(self) -> None:
        self._paths: dict[str, list[str]] = defaultdict(list)

    def add(self, path: str, kind: str | None = None) -> None:
        """One file, relative to the data folder. kind: in words; default: by its name."""
        kind = kind_of(path) if kind is None else kind
        self._paths[kind if kind in self._paths or len(self._paths) < _KINDS else ODD_ENDING].append(path)

    def counts(
        self, head: Callable[[str, int], bytes], images: Sequence[str] = (), others: Sequence[str] = ()
    ) -> tuple[PassedOver, ...]:
        """What was counted, by kind.

        head    (path, n) -> the file's first n bytes, b'' where it cannot be read
        images  kinds that are images without a look, besides OTHER_IMAGES
        others  kinds that are none, without a look
        """
        return tuple(
            self._count(kind, head, True if kind in images else False if kind in others else None)
            for kind in sorted(self._paths)
        )

    def _count(self, kind: str, head: Callable[[str, int], bytes], known: bool | None) -> PassedOver:
        paths = self._paths[kind]
        if known is not None or kind in OTHER_IMAGES:
            return PassedOver(kind, len(paths), 0 if known is False else len(paths), paths[0])
        found = [path for path in paths[:_LOOKED_AT] if _MAGIC.match(head(path, _HEAD))]
        if found:
            found += [path for path in paths[_LOOKED_AT:] if _MAGIC.match(head(path, _HEAD))]
        return PassedOver(kind, len(paths), len(found), (found or paths)[0])


def head_of_file(root: str) -> Callable[[str, int], bytes]:
    """For `Tally.counts`, of files below a folder."""

    def head(path: str, length: int) -> bytes:
        try:
            path = os.path.join(root, path)
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device: reading one may never end
                return b""
            with open(path, "rb", buffering=0) as file:
                return file.read(length)
        except OSError:
            return b""

    return head


def together(parts: Iterable[Sequence[PassedOver]]) -> list[PassedOver]:
    """The sum of several listings, by kind; images first, then the most frequent."""
    sums: dict[str, PassedOver] = {}
    for kind, files, images, example in (row for part in parts for row in part):
        old = sums.get(kind, PassedOver(kind, 0, 0, example))
        better = example if images and not old.images else old.example
        sums[kind] = PassedOver(kind, old.files + files, old.images + images, better)
    return sorted(sums.values(), key=lambda row: (-row.images, -row.files, row.kind))


def of_no_class(passed: Iterable[PassedOver]) -> int:
    """How many images were skipped because of a negative label."""
    return sum(row.files for row in passed if row.kind == NO_CLASS)


def images_warning(folder: object, passed: Sequence[PassedOver], read: Sequence[str]) -> str | None:
    """What to say of images that are passed over; None where there are none. read: the extensions that are."""
    images = [row for row in passed if row.images]
    if not images:
        return None
    kinds = ", ".join(f"{row.images} with {row.kind}, e.g. {row.example}" for row in images[:4])
    more = f", and {len(images) - 4} more kinds" if len(images) > 4 else ""
    return (
        f"{sum(row.images for row in images)} files in {folder} are images or look like them and are not used: "
        f"{kinds}{more}; rename them (read is what ends in {' '.join(read)}), move them into a class, or convert them"
    )


def listed(passed: Sequence[PassedOver]) -> str:
    """The kinds and their numbers, for an error: '8 files with .xyz, 1 with no extension'."""
    counts = [f"{row.files} with {row.kind}" for row in passed[:4]]
    return ", ".join(counts) + (f", and {len(passed) - 4} more kinds" if len(passed) > 4 else "")
