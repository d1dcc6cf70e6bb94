"""Whether a weights file still holds the bytes that were written, by whatever it brings along to tell: our digest, the
checksums of a zip, a digest beside it, the one in a published file's name.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from ijckd_fast.errors import out_of_memory
from ijckd_fast.files import Damaged, cannot_read

_MARK = b"ijckd-fast BLAKE2b "  # the comment of a zip of ours: this, then 32 hex digits
_SEAL = len(_MARK) + 32
_NO_COMMENT, _CHUNK = b"\x00\x00", 1 << 20
_SHA256 = re.compile("[0-9a-f]{64}")
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8})\.pth$")  # as torch.hub writes it


def seal(archive: io.BytesIO) -> None:
    """Adds to what torch.save wrote a digest of all of it, as the comment of the zip: everything reads it as before."""
    with archive.getbuffer() as data:
        assert data[-2:] == _NO_COMMENT
        data[-2:] = _SEAL.to_bytes(2, "little")
    archive.seek(0, io.SEEK_END)
    archive.write(_MARK)
    with archive.getbuffer() as data:
        found = hashlib.blake2b(data, digest_size=16).hexdigest()
    archive.write(found.encode())


def fault_in(file: BinaryIO) -> str | None:
    """What shows that an open file is damaged; None where nothing does. Reads it to the end, and leaves it at its
    beginning.

    A file that `seal` has sealed is compared with its digest, any other zip with the CRC-32 of each record (torch reads
    on without looking at them). Of other formats nothing is known: safetensors and torch's before 1.6 have no checksum.
    raises   OSError where it cannot be read
    """
    try:
        return _fault_in(file)
    finally:
        file.seek(0)


def _fault_in(file: BinaryIO) -> str | None:
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _SEAL))
    end = file.read()
    if end.startswith(_MARK):
        found, left = hashlib.blake2b(digest_size=16), size - 32
        file.seek(0)
        while left:
            chunk = file.read(min(_CHUNK, left))
            found.update(chunk)
            left -= len(chunk)
        return None if found.hexdigest().encode() == end[len(_MARK) :] else "its bytes are not those of its digest"
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            cut, bad = archive.comment.startswith(_MARK), archive.testzip()
    except OSError as error:
        if error.errno is not None and not isinstance(error, io.UnsupportedOperation):
            raise
        return "it is no whole zip archive"
    except Exception as error:  # what a damaged entry gives depends on the place of the damage
        if out_of_memory(error):
            raise
        return f"it is no whole zip archive: {' '.join(str(error).split()) or type(error).__name__}"
    if cut:
        return "its digest is cut off"
    return None if bad is None else f"the CRC-32 of its record {bad} is another"


def fault_by_neighbours(path: Path, file: BinaryIO) -> str | None:
    """The same by a SHA-256 that is not in the file: that of an export's config.json beside it, the name that Hugging
    Face's cache gives a file, or the first digits in the name of one that torchvision publishes.
    """
    expected, whose = _beside(path), "config.json beside it"
    if expected is None:
        blob = path.resolve()
        expected = blob.name if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else None
        whose = "its name in Hugging Face's cache"
    if expected is None:
        expected, whose = _of_torchvision(path.name), "the name that torchvision publishes it under"
    if expected is None:
        return None
    found = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(_CHUNK):
        found.update(chunk)
    file.seek(0)
    if found.hexdigest().startswith(expected):
        return None
    return f"its SHA-256 is {found.hexdigest()[:8]}..., expected {expected[:8]}... by {whose}"


def _beside(path: Path) -> str | None:
    """What an export's config.json says of a file in its folder."""
    if path.suffix != ".safetensors":
        return None
    try:
        about: Any = json.loads((path.parent / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    digests = about.get("sha256") if isinstance(about, dict) else None
    digest = digests.get(path.name) if isinstance(digests, dict) else None
    return digest if isinstance(digest, str) and _SHA256.fullmatch(digest) else None


def _of_torchvision(name: str) -> str | None:
    """The digits in the name, where torchvision has a file of this name: anyone may write digits into other names."""
    digits = _HASH_IN_NAME.search(name)
    if digits is None:
        return None
    from torchvision import models

    published = {each.url.rpartition("/")[2] for net in models.list_models() for each in models.get_model_weights(net)}
    return digits[1] if name in published else None


def refuse_damaged_download(path: Path | None) -> None:
    """Damaged where a library has a file of published weights from an earlier download, and it is not whole: the
    libraries compare a file when it comes, and never again. None: it has none.
    """
    if path is None or not path.is_file():
        return
    try:
        with open(path, "rb") as file:
            fault = fault_in(file) or fault_by_neighbours(path, file)
    except OSError as error:
        raise cannot_read(path, error) from error
    if fault is not None:
        raise Damaged(f"{path}, downloaded before, is damaged ({fault}): delete it, and it is downloaded again")
