"""Where the bytes of one image lie."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol


class Place(Protocol):
    """Where the bytes of one image lie: what a source says of each of its images, and all that is needed to read it."""

    @property
    def path(self) -> str:
        """The file to open: the image's own, or one that holds many."""

    def open(self) -> BinaryIO:
        """The image's bytes as a file that can be searched. Raises OSError as `read` does."""

    def read(self) -> bytes:
        """All bytes of the image.

        raises  OSError; one without an errno where the file is there and its content is wrong
        """


class WholeFile(NamedTuple):
    """All of one file."""

    path: str

    def open(self) -> BinaryIO:
        """The file itself, so that a header can be read without the rest."""
        return open(self.path, "rb")

    def read(self) -> bytes:
        """The file's bytes. Raises OSError."""
        return Path(self.path).read_bytes()


class Extent(NamedTuple):
    """A run of bytes in a file."""

    path: str
    offset: int  # bytes
    length: int

    def open(self) -> BinaryIO:
        """The bytes, read at once."""
        return io.BytesIO(self.read())

    def read(self) -> bytes:
        """The bytes. Raises OSError; one without an errno where the file ends before the image does."""
        with open(self.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), self.length, self.offset)
        if len(data) < self.length:
            raise OSError(f"{self.path} ends at byte {self.offset + len(data)}, inside the image")
        return data


def extent(shard: str, offset: int, length: int, checksum: int | None, size: tuple[int, int]) -> Place:
    """A run of bytes whose CRC-32 is compared where it is known. The arguments are those of Source.place_in_shard."""
    place = Extent(shard, offset, length)
    return place if checksum is None else Checked(place, checksum)


class Checked(NamedTuple):
    """A place whose bytes have a known checksum; what else the place says of itself it says too."""

    place: Place
    crc32: int

    @property
    def path(self) -> str:
        return self.place.path

    def __getattr__(self, name: str) -> Any:
        return getattr(self.place, name)

    def open(self) -> BinaryIO:
        """The bytes, read and compared at once."""
        return io.BytesIO(self.read())

    def read(self) -> bytes:
        """The bytes. Raises OSError; one without an errno where they have another checksum."""
        data = self.place.read()
        if zlib.crc32(data) != self.crc32:
            raise OSError(f"{self.path} has changed since it was indexed, or is damaged (other CRC-32)")
        return data
