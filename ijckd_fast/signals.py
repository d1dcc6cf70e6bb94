"""What a signal means to a command: SIGINT, SIGTERM and SIGHUP end it and keep what it has done, SIGUSR1 saves.

Python runs handlers in the main thread, between two of its own instructions. There an ending signal is raised as
`Stopped` (`handled`), or, where that would cut in two what belongs together, only noted (`noted`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import forkserver, resource_tracker
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_HEARD = (*ENDING, signal.SIGUSR1)
# `timeout`, a terminal that closes, and launchers that pass on what the terminal has sent already, send a signal twice.
_ONE_REQUEST = 1.0  # seconds in which signals are taken for one


class Stopped(KeyboardInterrupt):
    """A signal (`signum`) ended what was running; not an error, so no Exception.

    what  said after "stopped by SIGTERM": what was kept, and how to continue
    """

    def __init__(self, signum: int, what: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}{what}")
        self.signum, self.what = signum, what


class Asked:
    """What signals have asked for so far."""

    signum = 0  # that of ENDING which came first: keep what was done, and end
    save = False  # SIGUSR1: save and continue


_asked: list[Asked] = []  # of the blocks that are open, the outermost first
_before: dict[int, Any] = {}  # the handlers that `handled` has replaced
_again: dict[int, Any] = {}  # the handlers for a second signal
_first_came = 0.0  # time.monotonic
_overheard = False


@contextlib.contextmanager
def handled(*, program: bool = False) -> Iterator[Asked]:
    """Inside, the first ending signal is raised as Stopped; SIGUSR1 is remembered for `noted`. Gives what was asked.

    A SIGHUP that is ignored when the block begins, as nohup has it, stays ignored. While what was done is being saved,
    a second ending signal ends the process at once; but not a SIGHUP, nor one that comes within a second of the first.

    program  the process is one of our commands and nothing else. Otherwise a second signal does what it did before

    Nothing changes within another `handled`, and in other threads than the main one, which alone may set handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Asked()
        return
    if _asked:
        yield _asked[0]
        return
    _asked.append(Asked())
    now = {number: signal.getsignal(number) for number in _HEARD}
    # None: set by a library in C, which alone can set it again
    _before.update(
        {n: handler for n, handler in now.items() if handler is not None and not _ignored_hangup(n, handler)}
    )
    _again.update({number: signal.SIG_DFL if program else handler for number, handler in _before.items()})
    try:
        with _replaced(_note, list(_before)):
            yield _asked[0]
    finally:
        for each in (_asked, _before, _again):
            each.clear()


@contextlib.contextmanager
def noted() -> Iterator[Asked]:
    """Inside, nothing is cut short: signals are noted in what this gives, to be looked at where it is convenient.

    raises  Stopped at the end of the block for an ending signal that came meanwhile, unless the block raises itself
    """
    if threading.current_thread() is not threading.main_thread():
        yield Asked()
        return
    with handled():
        asked = Asked()
        asked.signum, asked.save = _asked[-1].signum, _asked[-1].save
        _asked.append(asked)
        try:
            with _replaced(_note, list(_before)):
                yield asked
        finally:
            _asked.remove(asked)
        if asked.signum and len(_asked) == 1:
            raise Stopped(asked.signum)


def saved() -> None:
    """What SIGUSR1 has asked for so far is done."""
    for each in _asked:
        each.save = False


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Inside, but not in `noted`, an ending signal ends the process at once, even where it waits in C code: for one of
    several processes that has nothing to keep.
    """
    mine = threading.current_thread() is threading.main_thread()
    with _replaced(signal.SIG_DFL, [number for number in _before if number in ENDING and mine]):
        yield


@contextlib.contextmanager
def overheard(end: socket.socket) -> Iterator[None]:
    """Inside, the numbers of signals, a byte each, are also sent to `end`, as soon as they come: where the main thread
    is in C code, its handlers are called late, or never. `end` must not block. In another thread nothing happens.
    """
    global _overheard
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.set_wakeup_fd(end.fileno(), warn_on_full_buffer=False)
    _overheard = True
    try:
        yield
    finally:
        _overheard = False
        signal.set_wakeup_fd(before)


def start_forkserver() -> None:
    """Starts the server that multiprocessing's "forkserver" processes are forked from; once it runs, does nothing.

    Neither it nor what it forks hears the signals that a terminal, or `timeout`, sends to all processes of a command:
    the command decides what becomes of them. A process that calls `hear` does hear them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)  # the tracker, as it starts, unblocks some of them
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hear() -> None:
    """Hears signals in a process that was forked from `start_forkserver`'s."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)


def _ignored_hangup(number: int, handler: Any) -> bool:
    return number == signal.SIGHUP and handler == signal.SIG_IGN


def _note(number: int, _frame: object) -> None:
    global _first_came
    if not _asked:
        return
    if number == signal.SIGUSR1:
        for each in _asked:
            each.save = True
    elif _asked[0].signum:
        if number != signal.SIGHUP and time.monotonic() - _first_came >= _ONE_REQUEST:
            signal.signal(number, _again[number])
            os.kill(os.getpid(), number)
    else:
        _first_came = time.monotonic()
        for each in _asked:
            each.signum = number
        if len(_asked) == 1:
            raise Stopped(number)


@contextlib.contextmanager
def _replaced(handler: Callable[[int, Any], None] | signal.Handlers, numbers: Iterable[int]) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in numbers}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)


def _forget() -> None:
    """A process that was forked is not the command, and what its parent was asked is none of its business."""
    global _overheard
    for number, handler in _before.items():
        signal.signal(number, handler)
    if _overheard:
        _overheard = False
        signal.set_wakeup_fd(-1)
    for each in (_asked, _before, _again):
        each.clear()


os.register_at_fork(after_in_child=_forget)
