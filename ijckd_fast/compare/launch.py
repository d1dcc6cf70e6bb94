"""Trains runs one by one in this process, or side by side in others. What a signal stops is saved first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import connection
from typing import Any

import torch
from rich.console import Console

from ijckd_fast import signals, streams
from ijckd_fast.compare.runs import Run
from ijckd_fast.errors import UserError
from ijckd_fast.signals import Stopped
from ijckd_fast.train import TrainConfig, train

# What a run imports, some of it only on its way: a second or more each. DALI is not among it: nothing says that it may
# be forked once it is loaded.
_IMPORTED = [
    "ijckd_fast.compare.launch", "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg"
]  # fmt: skip


def train_here(config: TrainConfig, *, resume: bool) -> None:
    """Trains one net in this process without a word.

    resume  from its last checkpoint; False: whatever is in its folder is replaced
    raises  what `train` raises; Stopped says how to continue the comparison
    """
    try:
        train(config, resume=resume, overwrite=not resume, console=Console(quiet=True))
    except Stopped as stop:
        raise _stopped(stop.signum) from stop


def _stopped(signum: int) -> Stopped:
    return Stopped(signum, ", every run is saved: the same command continues where it stopped")


def one_by_one(missing: Iterable[tuple[Run, bool]], ended: Callable[[Run, str | None], None]) -> None:
    """Trains runs in this process, in order.

    missing  runs, and whether each is resumed
    ended    called as each ends, with the error of one that failed; that does not end the others
    raises   Stopped, after the run was saved
    """
    for run, resume in missing:
        try:
            train_here(run.config, resume=resume)
        except Exception as error:
            ended(run, reason(error))
        else:
            ended(run, None)


def reason(error: BaseException) -> str:
    """Why a run failed, in a sentence; the traceback of what is no user's mistake goes to standard error."""
    if isinstance(error, UserError):
        return str(error)
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {error}"


def side_by_side(missing: Sequence[tuple[Run, bool]], jobs: int, ended: Callable[[Run, str | None], None]) -> None:
    """As `one_by_one`, up to `jobs` runs at a time.

    Each is a process forked from a server that has imported everything.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    signals.start_forkserver()
    waiting = list(reversed(missing))
    running: dict[int, tuple[Run, Any, Any]] = {}
    passed_on = False  # the signal, to the runs
    with signals.noted() as asked:
        try:
            while running or (waiting and not asked.signum):
                while waiting and len(running) < jobs and not asked.signum:
                    run, resume = waiting.pop()
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(target=_in_a_process, args=(sender, run.config, resume), name=run.name)
                    process.start()
                    sender.close()  # so that the end of the process ends the pipe
                    running[process.sentinel] = run, process, receiver
                ready = connection.wait(list(running), timeout=0.5)
                if asked.signum and not passed_on:
                    passed_on = True
                    for _, process, _ in running.values():
                        process.terminate()  # SIGTERM: it saves first
                for sentinel in ready:
                    run, process, receiver = running.pop(int(sentinel))  # type: ignore[arg-type]
                    process.join()
                    try:
                        error = receiver.recv()
                    except EOFError:
                        error = f"its process ended with code {process.exitcode} (-9: killed, often for lack of memory)"
                    if error is None or not passed_on:
                        ended(run, error)
        finally:
            for _, process, _ in running.values():
                process.terminate()
        if asked.signum:
            raise _stopped(asked.signum)


def _in_a_process(sender: Any, config: TrainConfig, resume: bool) -> None:
    os.setsid()  # Ctrl-C is for the process that started this one, which passes it on once
    streams.guard()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    error = None
    try:
        with signals.handled(program=True):
            signals.hear()
            train(config, resume=resume, overwrite=not resume, console=Console(quiet=True))
    except BaseException as raised:
        error = str(raised) if isinstance(raised, Stopped) else reason(raised)
    sender.send(error)


def _end_with_parent() -> None:
    """A run that nobody waits for any more saves and ends, whatever ended the process that started it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
