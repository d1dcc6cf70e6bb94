"""Work shared out to processes, for what holds the interpreter lock: encoding images, drawing glyphs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from ijckd_fast import signals
from ijckd_fast.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Task], Result], tasks: Iterator[Task], workers: int, kept: str
) -> Generator[Result, None, None]:
    """What `work` makes of each task, as it is finished, in whatever order.

    work     a function of a module
    workers  processes; 1: this one
    kept     said where a worker was ended from outside: what is there then, and what to do
    """
    if workers == 1:
        yield from map(work, tasks)
        return
    context = multiprocessing.get_context(
        "forkserver"
    )  # a fork of this process might take a lock along that a thread holds
    context.set_forkserver_preload([work.__module__])
    signals.start_forkserver()
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        try:
            running = {pool.submit(work, task) for task in islice(tasks, 2 * workers)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(work, task) for task in islice(tasks, len(done))}
                for future in done:
                    yield future.result()
        except BaseException as error:
            # the pool asks the workers to end, and waits: for whole tasks, and for ever for one that is just starting
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            if not isinstance(error, BrokenProcessPool):
                raise
            raise UserError(
                f"a worker process was ended from outside, as happens where memory runs out; {kept}"
            ) from error
        finally:  # interrupted: do not wait for what has not begun
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """A worker leaves signals to its parent, and does not outlive it, which may be killed."""
    for number in signals.ENDING:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
