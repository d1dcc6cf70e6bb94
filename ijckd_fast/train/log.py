"""The log of a run: log.jsonl, TensorBoard's events and Weights & Biases."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ijckd_fast import files
from ijckd_fast.train.run_folder import EVENTS, LOG, read_config, read_log

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Appends rows to log.jsonl (one JSON object per line, units in the key names), to TensorBoard's event files and,
    with a project's name in `wandb`, to Weights & Biases, where a resumed run continues as the same one.

    `start` is the step the run begins at: rows of later steps, which a killed run wrote after its last checkpoint, are
    dropped, because they will be written again.
    """

    def __init__(self, folder: Path, start: int, *, tensorboard: bool, wandb: str | None = None) -> None:
        kept = [row for row in read_log(folder) if row["step"] <= start]
        files.write_text(folder / LOG, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(folder / LOG, "a")  # noqa: SIM115 - closed by close()
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

    def write(self, kind: str, step: int, row: Mapping[str, Any]) -> None:
        """One line {"kind", "step", **row}; numbers go to TensorBoard as "kind/key"."""
        self._file.write(json.dumps({"kind": kind, "step": step, **row}) + "\n")
        self._file.flush()
        if self._events is not None:
            for key, value in row.items():
                if isinstance(value, (int, float)):
                    self._events.add_scalar(f"{kind}/{key}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{key}": value for key, value in row.items() if value is not None}, step=step)

    def close(self) -> None:
        """Closes log.jsonl, the event file and the run of Weights & Biases; may be called again."""
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
