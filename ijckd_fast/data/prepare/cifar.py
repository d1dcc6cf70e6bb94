"""Unpacks CIFAR's archives, as they are downloaded, into class folders: OUT/{train,val}/<class>/*.png."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ijckd_fast.console import progress_bar
from ijckd_fast.data.sources import CLASSES_FILE
from ijckd_fast.errors import UserError, out_of_memory
from ijckd_fast.files import write_bytes, write_text

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
"""Where the archives, their checksums and their format are published."""
_SIDE = 32
_FETCH = f"fetch the python version of CIFAR-100 or CIFAR-10 from {PAGE}"
_CLASS_NAME = re.compile(r"[a-z][a-z_]*")  # nothing else becomes part of a path


@dataclass(frozen=True)
class Kind:
    """What an archive holds: `parts` of each split and `meta` are pickles below `folder`.

    names, labels  under which key of meta are the class names, and of a part the labels
    per_class      images of each class, by split
    """

    name: str
    folder: str
    parts: Mapping[str, tuple[str, ...]]
    meta: str
    names: str
    labels: str
    classes: int
    per_class: Mapping[str, int]


KINDS = {
    "eb9058c3a382ffc7106e4002c42a8d85": Kind(
        "CIFAR-100",
        "cifar-100-python",
        {"train": ("train",), "val": ("test",)},
        "meta",
        "fine_label_names",
        "fine_labels",
        100,
        {"train": 500, "val": 100},
    ),
    "c58f30108f718f92721af3b95e74349a": Kind(
        "CIFAR-10",
        "cifar-10-batches-py",
        {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "val": ("test_batch",)},
        "batches.meta",
        "label_names",
        "labels",
        10,
        {"train": 5000, "val": 1000},
    ),
}
"""By the archive's md5."""


def prepare_cifar(out: str | Path, archive: str | Path | None, *, progress: bool = False) -> dict[str, dict[str, int]]:
    """Writes what is not there yet; a second call after an interruption continues where the first one stopped.

    out       gets train/<class>/<number>.png and val/<class>/<number>.png, 32 x 32 RGB without loss; number: position
              in the archive's training or test images, from 0. CIFAR-100's classes are the fine ones. classes.txt has
              the names in the order of the labels, which is also that of the sorted folders: published weights fit
    archive   cifar-100-python.tar.gz or cifar-10-python.tar.gz; which of them, its md5 says
    progress  show a progress bar on stderr
    returns   by split the number of 'images' and 'classes' that are there now, and of images 'written' by this call
    raises    UserError: no archive, another md5, an archive that is damaged or of other content; files in out that are
              not of it
    A file that is there is kept if it has the pixels that it should have.
    """
    out = Path(out)
    archive, kind = _recognised(archive)
    pickles = _read(archive, kind)
    names = _class_names(pickles[kind.meta], kind, archive)
    splits = {
        split: _images([pickles[part] for part in kind.parts[split]], kind, split, archive) for split in kind.parts
    }
    for split, (_, labels) in splits.items():
        _refuse_strangers(out / split, names, labels, archive)
    done = {}
    with progress_bar(progress) as bar:
        for split, (images, labels) in splits.items():
            for name in names:
                (out / split / name).mkdir(parents=True, exist_ok=True)
            written = 0
            for number, label in enumerate(bar.track(labels.tolist(), description=f"{kind.name} {split}")):
                path = out / split / names[label] / _file_name(number)
                if not _holds(path, images[number]):
                    write_bytes(path, _png(images[number]), durable=False)
                    written += 1
            done[split] = {"images": len(labels), "classes": len(names), "written": written}
    write_text(out / CLASSES_FILE, "".join(f"{name}\n" for name in names))
    return done


def _recognised(archive: str | Path | None) -> tuple[Path, Kind]:
    if archive is None:
        raise UserError(f"nothing to unpack: {_FETCH} and give the file as --archive FILE")
    archive = Path(archive)
    if not archive.is_file():
        raise UserError(
            f"expected CIFAR's archive, but there is no file {archive}; give its path. If you have none, {_FETCH}"
        )
    digest = hashlib.md5(usedforsecurity=False)
    with open(archive, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    found = digest.hexdigest()
    if found not in KINDS:
        expected = " or ".join(f"{md5} ({kind.name})" for md5, kind in KINDS.items())
        raise UserError(
            f"{archive} should have the md5 {expected}, found {found} ({archive.stat().st_size:,} bytes): it is "
            f"incomplete, damaged or another file, such as the Matlab or binary version; {_FETCH}"
        )
    return archive, KINDS[found]


def _read(archive: Path, kind: Kind) -> dict[str, dict[str, Any]]:
    """The content of every pickle of an archive, by its name below the archive's folder."""
    expected = {kind.meta, *(part for parts in kind.parts.values() for part in parts)}
    found = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                if folder == kind.folder and name in expected:
                    file = tar.extractfile(member)
                    if file is not None:  # is a file, not a folder
                        found[name] = unpickled(file.read(), f"{archive}, {member.name}")
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise UserError(f"{archive} cannot be read as a tar.gz archive ({error}); {_FETCH} again") from error
    missing = sorted(expected - found.keys())
    if missing:
        raise UserError(f"{archive} should hold {kind.folder}/{missing[0]}, which is not in it; {_FETCH} again")
    return found


_ARRAY_PARTS: dict[tuple[str, str], Callable] = {
    # named so in pickles of any numpy before 2
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # type: ignore[dict-item]
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists, dicts and numpy arrays.

    A pickle may name any function to be called: all others are refused.
    """

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ARRAY_PARTS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it would call {module}.{name}") from None


def unpickled(data: bytes, where: str) -> dict[str, Any]:
    """The dict in a pickle, of which nothing is called that it names. where: what an error calls it."""
    try:
        found = _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()  # Python 2's strings, and an array's bytes
    except Exception as error:  # pickle raises nearly anything on damaged input
        if out_of_memory(error):
            raise
        raise UserError(
            f"{where}: expected a pickle of names, numbers and numpy arrays alone, found another "
            f"({type(error).__name__}: {error}); nothing of it was used; {_FETCH}"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected a pickled dict, found {type(found).__name__}; {_FETCH}")
    return found


def _class_names(meta: Mapping[str, Any], kind: Kind, archive: Path) -> list[str]:
    names = meta.get(kind.names)
    if not isinstance(names, list) or len(set(map(str, names))) != kind.classes:
        raise UserError(
            f"{archive}: expected {kind.classes} class names as {kind.names!r}, found {names!r:.100}; {_FETCH}"
        )
    for name in names:
        if not isinstance(name, str) or not _CLASS_NAME.fullmatch(name):
            raise UserError(f"{archive}: expected class names of small letters, found {name!r}; {_FETCH}")
    return names


def _images(parts: list[dict[str, Any]], kind: Kind, split: str, archive: Path) -> tuple[np.ndarray, np.ndarray]:
    """images [N, 32, 32, 3] uint8 RGB and labels [N] int64 of a split."""
    each, channels = kind.per_class[split], 3 * _SIDE**2
    try:
        rows = np.concatenate([part["data"] for part in parts])  # [N, 3072], a channel after the other
        labels = np.array([label for part in parts for label in part[kind.labels]], np.int64)
        counts = np.bincount(labels, minlength=kind.classes)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{archive}: expected the arrays 'data' and the lists {kind.labels!r} of the {split} images, found others "
            f"({type(error).__name__}: {error}); {_FETCH}"
        ) from error
    if rows.dtype != np.uint8 or rows.shape != (len(labels), channels):
        raise UserError(
            f"{archive}: expected [{len(labels)}, {channels}] uint8 pixels of the {split} images, found "
            f"{list(rows.shape)} {rows.dtype}; {_FETCH}"
        )
    wrong = np.flatnonzero(counts != (np.arange(len(counts)) < kind.classes) * each)
    if len(wrong):
        raise UserError(
            f"{archive} should hold {each} {split} images of each of {kind.classes} classes, found {counts[wrong[0]]} "
            f"with label {wrong[0]}; {_FETCH}"
        )
    return rows.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1), labels


def _file_name(number: int) -> str:
    return f"{number:05d}.png"


def _refuse_strangers(folder: Path, names: list[str], labels: np.ndarray, archive: Path) -> None:
    """UserError if a split's folder holds anything that is not of the archive. Hidden files do not count."""
    expected = {f"{names[label]}/{_file_name(number)}" for number, label in enumerate(labels.tolist())}.union(names)
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*folders, *files):
            path = Path(place, name)
            # X.tmp is what a killed run leaves of X: it is written again
            if not name.startswith(".") and path.relative_to(folder).as_posix().removesuffix(".tmp") not in expected:
                raise UserError(
                    f"{folder} should hold the images of {archive} alone, found {path}; remove it, or give another "
                    "folder"
                )


def _holds(path: Path, image: np.ndarray) -> bool:
    """Whether the file has these pixels [32, 32, 3] uint8. One that a power cut has cut off has not."""
    try:
        with Image.open(path) as there:
            return np.array_equal(np.asarray(there), image)
    except Exception:  # not there, or damaged: Pillow's parsers raise nearly anything then
        return False


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()
