"""Several processes of one run on this machine: forked from a server that has imported everything, so that each starts
in no time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["ijckd_fast.cli", "ijckd_fast.train.loop", "ijckd_fast.data.load.pillow", "recorded_run"]
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(function: Callable[..., Any], arguments: tuple, environment: dict[str, str], output: str) -> None:
    os.environ.update(environment)
    with open(output, "w", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        sys.exit(function(*arguments))


class Run:
    """`function(*arguments)` in `world` processes that find one another as torchrun's do; what each prints goes to a
    file.
    """

    def __init__(
        self, folder: Path, world: int, function: Callable[..., Any], *arguments: Any, port: int | None = None
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._outputs = [folder / f"output{rank}.txt" for rank in range(world)]
        self.processes = []
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port()), "WORLD_SIZE": str(world)}
        for rank in range(world):
            environment = {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            process = _CONTEXT.Process(target=_run, args=(function, arguments, environment, str(self._outputs[rank])))
            process.start()
            self.processes.append(process)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Until something that the processes do has come true, while the first of them is alive."""
        while not ready():
            assert self.processes[0].exitcode is None, self.output()
            time.sleep(0.002)

    def signal(self, number: int, rank: int = 0) -> None:
        os.kill(self.processes[rank].pid, number)

    def has_begun(self, rank: int = 0) -> bool:
        """Whether there is an output of this process yet."""
        return self._outputs[rank].exists()

    def output(self, rank: int = 0) -> str:
        return self._outputs[rank].read_text()

    def ends(self, seconds: float = 120) -> list[int]:
        """Exit codes, in order of rank."""
        for rank, process in enumerate(self.processes):
            process.join(seconds)
            assert process.exitcode is not None, f"process {rank} still runs: {self.output(rank)}"
        return [process.exitcode for process in self.processes]
