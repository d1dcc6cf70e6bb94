"""The folder of an export: the names of its files, who may write there, and that it appears in one step."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ijckd_fast import files, signals
from ijckd_fast.errors import UserError

FORMAT = "ijckd-fast export 1"
CONFIG, MODEL, ONNX, STUDENT = "config.json", "model.safetensors", "model.onnx", "student.safetensors"
FILES = (CONFIG, MODEL, ONNX, STUDENT)


def refuse_occupied(folder: Path, overwrite: bool) -> None:
    """UserError when `folder` holds anything that no export wrote, or, without `overwrite`, an earlier export."""
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


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which replaces `folder` in one step when the block ends without an error.

    Whatever goes wrong, `folder` is as it was, and nothing is left beside it.
    raises  UserError where it cannot be written
    """
    made = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = made.with_suffix(".old")
    try:
        with files.disk_full_told(f"to write the export {folder}", "free some space, or choose another --out"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            made.mkdir()
            yield made
            with signals.noted():  # never between the two: there would be no export
                if folder.exists() and any(folder.iterdir()):
                    folder.rename(old)
                try:
                    made.rename(folder)
                except OSError:
                    if old.exists():
                        old.rename(folder)
                    raise
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write the export {folder} ({error.strerror}): choose another --out") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
