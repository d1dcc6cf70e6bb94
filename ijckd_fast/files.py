"""Files that are whole whenever someone looks, folders that one process holds, and a sentence for a full disk."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ijckd_fast.errors import UserError

LOCK, HOLDER = "lock", "lock.holder"  # what `lock` leaves in a folder


@contextmanager
def replacing(path: Path, *, durable: bool = True, shared: bool = False) -> Iterator[Path]:
    """Gives a temporary path to write to, which replaces `path` in one step when the block ends without an error.

    Whatever interrupts this (kill -9, a full disk), `path` is the old file or the new one, never half of one.

    durable  the bytes and the folder's entry are flushed to the disk (fsync) first, so that this holds for a power cut
             too; False: it may leave less
    shared   several processes may write the same file at a time: each has a temporary path of its own. A kill then
             leaves that behind, where otherwise the next writer takes it over
    """
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f"{path.name}.tmp")
    try:
        yield tmp
        if durable:
            flush(tmp)
        os.replace(tmp, path)
        if durable:
            flush(path.parent)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Returns when what was written to a file, or the entries of a folder, are on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` in UTF-8, as `replacing` does: a power cut leaves the old file or the new one."""
    # names of files that are not UTF-8 keep their bytes
    with replacing(path) as tmp, open(tmp, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def write_bytes(path: Path, data: bytes | memoryview, *, durable: bool = True) -> None:
    """Replaces `path` by `data`, as `replacing` does."""
    with replacing(path, durable=durable) as tmp, open(tmp, "wb") as file:
        file.write(data)


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that the disk is full, or the user's share of it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk_full_told(what: str, remedy: str) -> Iterator[None]:
    """Inside, a full disk is a UserError: "no space left WHAT: REMEDY"; other errors are passed on as they are."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise UserError(f"no space left {what}: {remedy}") from error


def require_writable(folder: Path, option: str) -> None:
    """Makes the folder that `option` named; UserError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_writable(folder, option, error) from error


@contextmanager
def lock(folder: Path, option: str = "--output-dir") -> Iterator[None]:
    """Holds a folder, which `option` named, for this process; UserError when another living process holds it.

    The kernel drops the lock when its process ends, however it ends, so what a dead run left is no hindrance.
    """
    import filelock  # here, since most commands start without a lock

    holder = folder / HOLDER
    held = filelock.FileLock(folder / LOCK, timeout=0, is_singleton=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.acquire()
        holder.write_text(str(os.getpid()))
    except filelock.Timeout as error:
        process = holder.read_text().strip() if holder.is_file() else "unknown"
        raise UserError(
            f"another run (process {process}) is writing to {folder}: wait for it, or choose another {option}"
        ) from error
    except OSError as error:
        held.release()
        raise _not_writable(folder, option, error) from error
    try:
        yield
    finally:
        holder.unlink(missing_ok=True)
        held.release()


def _not_writable(folder: Path, option: str, error: OSError) -> UserError:
    return UserError(
        f"{option} must be a folder that can be written, but {folder} is not ({error.strerror}): choose another"
    )
