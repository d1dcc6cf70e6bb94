"""The folder of an export: the names of its files, who may write there, and that it appears in one step."""

from __future__ import annotations

import contextlib
import glob
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from ijckd_fast import files, signals
from ijckd_fast.errors import UserError

FORMAT = "ijckd-fast export 1"
CONFIG, MODEL, ONNX, STUDENT = "config.json", "model.safetensors", "model.onnx", "student.safetensors"
FILES = (CONFIG, MODEL, ONNX, STUDENT)


def refuse_occupied(folder: Path, overwrite: bool) -> None:
    """UserError when `folder` holds anything that no export wrote, or, without `overwrite`, an earlier export.

    What killed exports left beside it is put in order first.
    """
    _settle(folder)
    _refuse_occupied(folder, overwrite)


def _refuse_occupied(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(
            f"--out must be a folder, but {folder} cannot be listed ({error.strerror}): choose another"
        ) from error
    foreign = sorted(names - set(FILES))
    if foreign:
        shown = ", ".join([*foreign[:3], *(["..."] if len(foreign) > 3 else [])])
        raise UserError(
            f"{folder} holds files that no export wrote ({shown}): choose another --out, a new or empty folder"
        )
    if names and not overwrite:
        raise UserError(f"{folder} holds an earlier export: give --overwrite to replace it, or choose another --out")


def _settle(folder: Path) -> None:
    """Of what killed exports left, a folder that was put aside comes back; nothing of one under way is touched."""
    files.remove_leftovers(folder.parent, folder.name)
    with contextlib.suppress(OSError), files.held(folder.parent):
        for old in sorted(folder.parent.glob(f".{glob.escape(folder.name)}.*.old")):
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(folder)
                warnings.warn(f"{folder} is the earlier export again: a killed one had put it aside", stacklevel=3)


@contextlib.contextmanager
def new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which replaces `folder` in one step when the block ends without an error.

    Whatever goes wrong, `folder` is as it was, and nothing is left beside it. What a kill leaves there, the next export
    to `folder` removes.
    raises  UserError where it cannot be written, or has become occupied meanwhile
    """
    try:
        with files.disk_full_told(f"to write the export {folder}", "free some space, or choose another --out"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with files.claimed(folder, folder=True) as made:
                try:
                    yield made
                    _replace(folder, made, overwrite)
                finally:
                    shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write the export {folder} ({error.strerror}): choose another --out") from error


def _replace(folder: Path, made: Path, overwrite: bool) -> None:
    old = made.with_suffix(".old")
    # never between the two: there would be no export. After a kill there is none until `settle`
    with signals.noted(), files.held(folder.parent):
        _refuse_occupied(folder, overwrite)
        if folder.exists() and any(folder.iterdir()):
            folder.rename(old)
        try:
            made.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    shutil.rmtree(old, ignore_errors=True)
