"""`ijckd-fast` with a record of its training batches: a line for each as it is handed to the loop: step, ids, digest of
every tensor.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ijckd_fast import cli
from ijckd_fast.data import Batch, Loader, Plan, TrainPlan
from ijckd_fast.train import build


class Seen(NamedTuple):
    """One line of a record."""

    step: int
    ids: str
    digest: str


def read(record: Path) -> list[Seen]:
    """The lines of a record, all but one that a kill has cut off."""
    lines = record.read_text().split("\n")[:-1]
    return [Seen(int(step), ids, digest) for step, ids, digest in (line.split() for line in lines)]


def line_of(step: int, batch: Batch) -> str:
    digest = hashlib.sha256()
    for tensor in batch:
        if tensor is not None:
            digest.update(tensor.contiguous().numpy().tobytes())
    return f"{step} {','.join(map(str, batch.ids.tolist()))} {digest.hexdigest()}\n"


@contextlib.contextmanager
def recording(record: Path) -> Iterator[None]:
    """Inside, runs of this process append their training batches to `record`."""
    make_loader = build.make_loader
    file = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def make_recorded(backend: str, plan: Plan, **settings: Any) -> Loader:
        loader = make_loader(backend, plan, **settings)
        if not isinstance(plan, TrainPlan):
            return loader

        class Recorded(type(loader)):  # type: ignore[misc]
            def __next__(self) -> Batch:
                step = self.start if self._step is None else self._step
                batch = super().__next__()
                os.write(file, line_of(step, batch).encode())  # at once, or a kill would lose it
                return batch

        loader.__class__ = Recorded
        return loader

    build.make_loader = make_recorded
    try:
        yield
    finally:
        build.make_loader = make_loader
        os.close(file)


def recorded(record: str, command: list[str]) -> int:
    """`ijckd-fast COMMAND` with a record of this process's batches."""
    with recording(Path(record)):
        return cli.main(command)
