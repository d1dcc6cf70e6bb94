"""The log of a run: log.jsonl, TensorBoard's events and Weights & Biases."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ijckd_fast import files
from ijckd_fast.errors import UserError
from ijckd_fast.train.run_folder import DAMAGED_LOG, EVENTS, LOG, examine_log, read_config

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Logged = tuple[int, str]  # how many rows there are, and a digest of their figures: a checkpoint keeps it
_CLOCK = (
    "images_per_s",
    "loader_wait_percent",
    "memory_mb",
    "seconds",
)  # no figures: others each time


class RunLog:
    """Appends rows to log.jsonl (one JSON object per line, units in the key names, with a check value), to
    TensorBoard's event files and, with a project's name in `wandb`, to Weights & Biases, where a resumed run continues
    as the same one. Use as a context manager.

    `start` is the step the run begins at: rows of later steps, which a killed run wrote after its last checkpoint, are
    dropped, because they will be written again. `logged` is what that checkpoint says of the others: `say` is told
    where some of them are damaged or missing; UserError where they are another run's.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        *,
        tensorboard: bool,
        wandb: str | None = None,
        logged: Logged | None = None,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._rows, self._digest = folder, 0, hashlib.blake2b(digest_size=8)
        found = examine_log(folder)
        kept = [row for row in found.rows if row["step"] <= start]
        lines = "".join(self._line(row) for row in kept)
        if found.damaged:
            shutil.copyfile(folder / LOG, folder / DAMAGED_LOG)
            say(
                f"warning: {folder / LOG} is damaged in line {', '.join(map(str, found.damaged))}: it continues"
                f" without; the file as it was is kept as {DAMAGED_LOG}"
            )
        if logged is not None and self.logged != logged:
            self._say_what_differs(logged, start, len(found.damaged), say)
        with self._told(LOG):
            files.write_text(folder / LOG, lines)
        self._file = open(folder / LOG, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._events: SummaryWriter | None = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second to import

            self._events = SummaryWriter(str(folder / EVENTS), purge_step=start + 1 if start else None)
        self._wandb: Any = None
        if wandb is not None:
            import wandb as weights_and_biases

            digest = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
            self._wandb = weights_and_biases.init(
                project=wandb, name=folder.name, id=digest, dir=str(folder), resume="allow", config=read_config(folder)
            )

    def _say_what_differs(self, logged: Logged, start: int, damaged: int, say: Callable[[str], None]) -> None:
        count, path = logged[0], self._folder / LOG
        if self._rows + damaged < count:
            say(
                f"warning: {path} has {self._rows} of the {count} rows that were logged up to step {start}: plots,"
                " speed and memory in the report will be without the others"
            )
        elif not damaged:
            raise UserError(
                f"{path} does not hold the rows that were logged up to step {start} (it has {self._rows}, expected"
                f" {count}): it is another run's or was changed; restore it, or delete it, and the run continues"
                " without them"
            )

    @property
    def logged(self) -> Logged:
        """What a checkpoint keeps of the rows so far."""
        return self._rows, self._digest.hexdigest()

    def _line(self, row: Mapping[str, Any]) -> str:
        self._rows += 1
        self._digest.update(files.check_value({k: v for k, v in row.items() if k not in _CLOCK}).encode())
        return json.dumps({**row, files.CHECK: files.check_value(row)}) + "\n"

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Inside, an error of the disk is a sentence that names the file and says how the run continues."""
        try:
            yield
        except OSError as error:
            path = self._folder / name
            what = f"no space left to write {path}: free some space"
            if not files.is_disk_full(error):
                what = f"cannot write {path} ({error.strerror or error}): make it writable again"
            raise UserError(f"{what}, then continue with ijckd-fast train --resume {self._folder}") from error

    def write(self, kind: str, step: int, row: Mapping[str, Any]) -> None:
        """One line {"kind", "step", **row}; numbers go to TensorBoard as "kind/key". UserError where the disk is full,
        say.
        """
        line = self._line({"kind": kind, "step": step, **row}).encode()
        with self._told(LOG):
            while line:  # a full disk may take a part of it first
                line = line[self._file.write(line) :]
        if self._events is not None:
            with self._told(EVENTS):
                for key, value in row.items():
                    if isinstance(value, (int, float)):
                        self._events.add_scalar(f"{kind}/{key}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{key}": value for key, value in row.items() if value is not None}, step=step)

    def close(self) -> None:
        """Closes log.jsonl, the event file and the run of Weights & Biases; may be called again."""
        self._file.close()
        events, self._events = self._events, None
        if events is not None:
            with self._told(EVENTS):
                events.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(*(() if kind is None else (UserError,))):  # what went wrong first is what is told
            self.close()
