"""Where the bytes of one image lie."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol


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
