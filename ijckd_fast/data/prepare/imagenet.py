"""Unpacks ImageNet's archives, as they are downloaded, into class folders: OUT/{train,val}/<wnid>/*.JPEG."""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from rich.progress import DownloadColumn, TransferSpeedColumn

from ijckd_fast.console import progress_bar
from ijckd_fast.data.sources import read_labels, some
from ijckd_fast.errors import UserError
from ijckd_fast.files import write_bytes

COMPLETE = {"ILSVRC2012_img_train.tar": 1_281_167, "ILSVRC2012_img_val.tar": 50_000}
"""Images in the archives of these names."""

# Nothing of a member's name but what these match becomes part of a path: no archive writes outside of OUT.
_CLASS_ARCHIVE = re.compile(r"(?:\./)?(?:[\w-]+/)?(n\d{8})\.tar")
_IMAGE = re.compile(r"(?:\./)?(?:[\w-]+/)?(\w[\w-]*\.(?:JPEG|jpeg|jpg))")


def prepare_imagenet(
    out: str | Path,
    *,
    train_tar: str | Path | None = None,
    val_tar: str | Path | None = None,
    val_labels: str | Path | None = None,
    progress: bool = False,
) -> dict[str, dict[str, int]]:
    """Unpacks what is not there yet; a second call after an interruption continues where the first one stopped.

    train_tar   of one archive per class, n01440764.tar..., as ILSVRC2012_img_train.tar and ImageNet-21k's are
    val_tar     of images, as ILSVRC2012_img_val.tar is; needs val_labels
    val_labels  file that names the class (wnid) of every validation image, see label_files.read_labels
    progress    show progress bars on stderr
    returns     by split the number of 'images' and 'classes' that are there now, and of images 'written' by this call
    raises      UserError: an archive that is not one, is damaged or of another layout; labels unlike the images; files
                in OUT that are not in the archive; fewer images than an archive of that name has
    """
    out = Path(out)
    if train_tar is None and val_tar is None:
        raise UserError(
            "nothing to unpack: give --train-tar FILE, or --val-tar FILE with --val-labels FILE, or all three"
        )
    if (val_tar is None) != (val_labels is None):
        raise UserError(
            "the validation archive says nothing of its images' classes: --val-tar and --val-labels (Kaggle's "
            "LOC_val_solution.csv, or lines 'name,class') go together; give both"
        )
    done = {}
    if train_tar is not None:
        done["train"] = _unpack(Path(train_tar), out / "train", _train_images, progress)
    if val_tar is not None and val_labels is not None:
        classes = {
            label.name: label.line for label in reversed(read_labels(val_labels).values())
        }  # the first line of each
        for name, line in classes.items():
            if (out / "train").is_dir() and not (out / "train" / name).is_dir():
                raise UserError(
                    f"{val_labels}, line {line}: class {name!r} is no folder of {out / 'train'}; expected the wnids of "
                    "the training data, e.g. n01440764: fix the line, or unpack the training archive whole"
                )
        done["val"] = _unpack(Path(val_tar), out / "val", _val_images(Path(val_labels)), progress)
    return done


Images = Iterator[tuple[str, str, int, int, Callable[[], IO[bytes]]]]
"""(class, file name, bytes, place in the archive, opener) of every image of an archive, in its order."""


def _unpack(
    archive: Path, folder: Path, images: Callable[[tarfile.TarFile, Path], Images], progress: bool
) -> dict[str, int]:
    """Writes the images to folder/<class>/<name>, those that are there with their whole length excepted."""
    counts: Counter[str] = Counter()
    written = 0
    try:
        with (
            tarfile.open(archive, "r:") as tar,
            progress_bar(progress, DownloadColumn(), TransferSpeedColumn()) as bar,
        ):
            line = bar.add_task(archive.name, total=archive.stat().st_size)
            for class_name, name, length, place, open_image in images(tar, archive):
                path = folder / class_name / name
                if not counts[class_name]:
                    path.parent.mkdir(parents=True, exist_ok=True)
                counts[class_name] += 1
                if not _is_there(path, length):
                    _write(path, open_image().read(length), length, archive)
                    written += 1
                bar.update(line, completed=place)
    except FileNotFoundError as error:
        raise UserError(
            f"expected an ImageNet archive, but there is no file {error.filename}; give its path"
        ) from error
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{archive} cannot be read as a tar archive ({error}); it may be incomplete: compare its length with the "
            "source's and fetch it again. What was unpacked stays and need not be unpacked again"
        ) from error
    _check_counts(archive, folder, counts)
    return {"images": counts.total(), "classes": len(counts), "written": written}


def _is_there(path: Path, length: int) -> bool:
    try:
        return path.stat().st_size == length
    except FileNotFoundError:
        return False


def _write(path: Path, data: bytes, length: int, archive: Path) -> None:
    """Not forced to the disk: what a power cut leaves is too short, and is written again."""
    if len(data) != length:
        raise UserError(f"{archive} ends within {path.name}; fetch it again. What was unpacked stays")
    write_bytes(path, data, durable=False)


def _members(
    tar: tarfile.TarFile, pattern: re.Pattern[str], where: str, expected: str
) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """(member, what the pattern's group matched) of every file. UserError for anything else than files and folders."""
    for member in tar:
        if member.isdir():
            continue
        match = pattern.fullmatch(member.name)
        if not match or not member.isreg():
            kind = "" if member.isreg() else ", which is no plain file"
            raise UserError(
                f"{where}: expected {expected} only, found {member.name!r}{kind}; is it ImageNet's archive as it was "
                "downloaded?"
            )
        yield member, match[1]
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(
        tarfile.BLOCKSIZE
    ):  # tarfile takes any end between two members for the end
        raise tarfile.ReadError("it ends without an end mark")


def _opener(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[], IO[bytes]]:
    def open_image() -> IO[bytes]:
        file = tar.extractfile(member)
        assert file is not None  # a plain file, by _members
        return file

    return open_image


def _train_images(tar: tarfile.TarFile, archive: Path) -> Images:
    for outer, class_name in _members(tar, _CLASS_ARCHIVE, str(archive), "one archive per class, n01440764.tar,"):
        with tarfile.open(fileobj=_opener(tar, outer)(), mode="r:") as inner:
            where = f"{archive}, {outer.name}"
            for member, name in _members(inner, _IMAGE, where, f"images {class_name}_10026.JPEG"):
                yield (
                    class_name,
                    name,
                    member.size,
                    outer.offset_data + member.offset_data + member.size,
                    _opener(inner, member),
                )


def _val_images(labels_path: Path) -> Callable[[tarfile.TarFile, Path], Images]:
    def images(tar: tarfile.TarFile, archive: Path) -> Images:
        labels = read_labels(labels_path)
        for member, name in _members(tar, _IMAGE, str(archive), "images ILSVRC2012_val_00000001.JPEG"):
            label = labels.pop(name, None) or labels.pop(Path(name).stem, None)
            if label is None:
                raise UserError(
                    f"{labels_path} must name the class of every image in {archive}, but {name!r} is not in it; add "
                    "its line"
                )
            yield label.name, name, member.size, member.offset_data + member.size, _opener(tar, member)
        if labels:
            raise UserError(
                f"{archive} must hold every image that {labels_path} names, but {len(labels)} are not there "
                f"({some(list(labels))}); fetch the archive again, or remove their lines"
            )

    return images


def _check_counts(archive: Path, folder: Path, counts: Counter[str]) -> None:
    """UserError unless the folder holds what the archive did, and the archive what its name promises."""
    if COMPLETE.get(archive.name, counts.total()) != counts.total():
        raise UserError(
            f"{archive} should hold {COMPLETE[archive.name]:,} images, found {counts.total():,}; fetch it again. What "
            "was unpacked stays"
        )
    for entry in os.scandir(folder):
        if entry.is_dir() and not entry.name.startswith("."):
            there = sum(not name.startswith(".") for name in os.listdir(entry.path))
            if there != counts[entry.name]:
                raise UserError(
                    f"{entry.path} should hold the {counts[entry.name]} images that {archive} has of this class, found "
                    f"{there} files; remove what does not belong there"
                )
