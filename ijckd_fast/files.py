"""Files that are whole whenever someone looks, that tell when they were damaged, folders that one process holds, and a
sentence for what a disk refuses.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ijckd_fast.errors import UserError

LOCK, HOLDER = "lock", "lock.holder"  # what `lock` leaves in a folder
CHECK = "check"  # key of a JSON file's own check value
_CHUNK = 1 << 20
_REMEDIES = {
    errno.EACCES: "give this user the right to read it",
    errno.EPERM: "give this user the right to read it",
    errno.EISDIR: "it is a folder, expected a file",
    errno.ENOTDIR: "a part of its path is a file, expected a folder",
    errno.ELOOP: "its symbolic links lead in a circle, expected one that ends at a file",
    errno.EIO: "the disk or the network fails, try again or take a copy of the file",
}


class Damaged(UserError):
    """A file of ours does not hold what was written: cut, changed, or of another kind."""


class Unreadable(UserError):
    """The system does not let us read a file: nothing is known of what is in it."""


@contextmanager
def replacing(path: Path, *, durable: bool = True, shared: bool = False) -> Iterator[Path]:
    """Gives a temporary path to write to, which replaces `path` in one step when the block ends without an error.

    Whatever interrupts this (kill -9, a full disk), `path` is the old file or the new one, never half of one.

    durable  the bytes and the folder's entry are flushed to the disk (fsync) first, so that this holds for a power cut
             too; False: it may leave less
    shared   several processes may write the same file at a time: each has a temporary path of its own, see `claimed`.
             Otherwise the next writer takes over what a kill leaves
    """
    with claimed(path) if shared else contextlib.nullcontext(path.with_name(f"{path.name}.tmp")) as tmp:
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


@contextmanager
def claimed(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Gives a new, empty file beside `path`, or a folder, which no other process has and which the block is to rename
    or remove. What a kill leaves of it goes by `remove_leftovers`.
    """
    while True:
        # in two containers two processes may have the same number
        tmp = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        tmp.mkdir() if folder else tmp.touch(exist_ok=False)
        with held(tmp):
            if tmp.exists():  # not taken for a leftover before it was held
                yield tmp
                return


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds a file or folder for this process, which waits while another one does; nothing where the file system has no
    locks.
    """
    descriptor = -1
    try:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes left of `claimed` files and folders in `folder`.

    Nothing that a living one still writes, on whatever machine: the kernel drops a process's lock when it ends.

    name  of the file or folder that was to be written; None: whatever it was
    """
    leftover = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.\d+(-[0-9a-f]{{8}})?\.tmp")
    with contextlib.suppress(OSError):  # what cannot be listed, or removed, is no hindrance to anything
        for entry in list(os.scandir(folder)):
            if leftover.fullmatch(entry.name) and not entry.is_symlink():
                with contextlib.suppress(OSError):
                    _remove_unless_held(entry)


def _remove_unless_held(entry: os.DirEntry[str]) -> None:
    descriptor = os.open(entry.path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)
    finally:
        os.close(descriptor)


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


def read_bytes(path: Path) -> bytes:
    """What a file holds.

    raises   FileNotFoundError where there is none; UserError, with the system's reason, where it cannot be read
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise cannot_read(path, error) from error


def cannot_read(path: Path, error: OSError) -> Unreadable:
    """The sentence for a file that the system does not let us read."""
    remedy = _REMEDIES.get(error.errno or 0, "try again")
    return Unreadable(f"{path} cannot be read ({error.strerror or error}): {remedy}")


def cannot_use(error: OSError) -> UserError:
    """The sentence for a file that nobody has put into better words: which, and what the system says."""
    remedy = _REMEDIES.get(error.errno or 0, "try again").replace("read it", "use it")
    return UserError(f"{os.fsdecode(error.filename)} cannot be used ({error.strerror or error}): {remedy}")


def digest(path: Path) -> str:
    """BLAKE2b of a file's bytes, 32 hex digits; raises as `read_bytes`."""
    found = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                found.update(chunk)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise cannot_read(path, error) from error
    return found.hexdigest()


def check_value(values: Any) -> str:
    """16 hex digits that depend on all that JSON keeps of `values`, but not on the order of keys or on layout."""
    text = json.dumps(json.loads(json.dumps(values)), sort_keys=True)  # keys are strings from here on
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def write_json(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces `path` by `values` with their check value, which `read_json` compares; returns all that it holds."""
    whole = {**values, CHECK: check_value(values)}
    write_text(path, json.dumps(whole, indent=2) + "\n")
    return whole


def read_json(path: Path, remedy: str) -> dict[str, Any] | None:
    """What `write_json` wrote, or an older version's file without a check value; None where there is no file.

    raises  Damaged, "PATH is damaged (WHAT): REMEDY"; UserError where the file cannot be read
    """
    found = read_checked(path, remedy)
    return None if found is None else found[0]


def read_checked(path: Path, remedy: str) -> tuple[dict[str, Any], bool] | None:
    """As `read_json`: (the values, whether a check value stands for them)."""
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        return None
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8 as well
        raise Damaged(f"{path} is damaged (not JSON: {' '.join(str(error).split())}): {remedy}") from error
    if not isinstance(values, dict):
        raise Damaged(f"{path} is damaged (expected an object, found {type(values).__name__}): {remedy}")
    value = values.pop(CHECK, None)
    if value is not None and value != check_value(values):
        raise Damaged(f"{path} is damaged or was changed (its check value is another): {remedy}")
    return values, value is not None


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

    The kernel drops the lock when its process ends, however it ends, so what a dead run left is no hindrance. A folder
    that was made here, and into which nothing was written, is removed again: who mistyped something finds no trace.
    """
    import filelock  # here, since most commands start without a lock

    holder = folder / HOLDER
    held = filelock.FileLock(folder / LOCK, timeout=0, is_singleton=False)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
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
        if made:
            _remove_unused(made)
        held.release()


def _remove_unused(folders: list[Path]) -> None:
    """Removes folders, the innermost first, as long as they hold nothing; the first may hold a lock."""
    with contextlib.suppress(OSError):  # one that holds something, or is gone
        if [path.name for path in folders[0].iterdir()] == [LOCK]:
            (folders[0] / LOCK).unlink()
        for each in folders:
            each.rmdir()


def _not_writable(folder: Path, option: str, error: OSError) -> UserError:
    return UserError(
        f"{option} must be a folder that can be written, but {folder} is not ({error.strerror}): choose another"
    )
