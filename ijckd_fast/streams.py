"""Standard output and error that can be written to for as long as the process lives, whatever becomes of them.

A reader goes away, a terminal closes, a disk is full, or there was no console to begin with: what cannot be said is
dropped, and the process does its work.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, TextIO


class _Standard(io.FileIO):
    """A file that takes everything; `error` says why something of it was lost.

    wanted  whether somebody was still there to read what was lost
    """

    error: OSError | None = None

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._terminal = self.isatty()

    def write(self, data: Any, /) -> int:
        """All of the data, or none of the rest after an error."""
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            try:
                written = super().write(left)
            except OSError as error:
                self.error = self.error or error
                return size
            if written is None:  # another process of this console has set it not to wait
                select.select([], [self], [])
            else:
                left = left[written:]
        return size

    @property
    def wanted(self) -> bool:
        """Whether what was lost was lost to a reader: not behind `| head`, nor where the terminal was closed."""
        assert self.error is not None
        gone = self.error.errno in (errno.EPIPE, errno.ECONNRESET)
        return not (gone or (self.error.errno == errno.EIO and self._terminal))


_guarded: dict[str, _Standard] = {}


def guard() -> None:
    """From now on nothing raises where it prints: neither an error of the console nor a character it does not have.

    Descriptors 0 to 2 that are closed become /dev/null: a file that is opened later must not get their numbers, and
    with it what libraries print. Streams that somebody has put in the place of Python's own are left as they are.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            _open_nothing(descriptor)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115 - to the end
    for name in ("stdout", "stderr"):
        stream, own = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is not None and (stream is not own or _is_guarded(name, stream)):
            continue
        if stream is None or stream.closed:
            made = _missing(name)
        elif isinstance(stream, io.TextIOWrapper):
            made = _instead_of(name, stream)
        else:
            continue
        setattr(sys, name, made)
        if stream is own:
            setattr(sys, f"__{name}__", made)


def shows_bars() -> bool:
    """Whether standard error is a terminal, where bars can be watched."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


def is_watched() -> bool:
    """Whether standard output is a terminal, where people read: figures for programs are for pipes and files."""
    return sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()


def complain(text: str) -> None:
    """One line on standard error, or where that is gone on standard output."""
    print(text, file=sys.stderr, flush=True)
    file = _file_of("stderr")
    if file is not None and file.error is not None:
        print(text, flush=True)


def lost_output() -> OSError | None:
    """The error by which something that was printed did not reach a reader; None where nothing was lost, or nobody
    waits for it any more.
    """
    file = _file_of("stdout")
    if file is None:
        return None
    sys.stdout.flush()
    return file.error if file.error is not None and file.wanted else None


def _open_nothing(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # a machine without /dev
        opened = os.open(os.devnull, os.O_RDWR)
        if opened == descriptor:
            os.set_inheritable(opened, True)
        else:
            os.dup2(opened, descriptor)
            os.close(opened)


def _is_guarded(name: str, stream: TextIO | None) -> bool:
    buffer = getattr(stream, "buffer", None)
    return name in _guarded and getattr(buffer, "raw", buffer) is _guarded[name]


def _file_of(name: str) -> _Standard | None:
    """The guarded file of a stream; None where the stream is somebody else's."""
    return _guarded[name] if _is_guarded(name, getattr(sys, name)) else None


def _missing(name: str) -> TextIO:
    """A stream that was not there from the start: nobody waits for it."""
    file = _guarded[name] = _Standard(os.open(os.devnull, os.O_WRONLY))
    file.error = BrokenPipeError(errno.EPIPE, "closed from the start")
    return io.TextIOWrapper(io.BufferedWriter(file), "utf-8", "backslashreplace")


def _instead_of(name: str, stream: io.TextIOWrapper) -> TextIO:
    with contextlib.suppress(OSError):
        stream.flush()
    file = _guarded[name] = _Standard(stream.fileno())
    return io.TextIOWrapper(
        io.BufferedWriter(file) if not stream.write_through else file,
        stream.encoding,
        "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
