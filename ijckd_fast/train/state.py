"""What a run is: the state that a checkpoint holds, that a resumed run puts back, and that every command on a finished
run reads.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ijckd_fast.errors import UserError
from ijckd_fast.parallel import Processes
from ijckd_fast.train import checkpoint, run_folder
from ijckd_fast.train.code_hash import code_hash
from ijckd_fast.train.config import FIELDS, TrainConfig, completed
from ijckd_fast.train.meters import Meter
from ijckd_fast.train.step import TrainStep

Row = dict[str, Any]  # of log.jsonl


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds; its tensors are on the CPU.

    learner        weights that are evaluated and deployed: the averages where there are any, else those in training
    live           the weights in training where there are averages; else None
    ema            the averages alone, by name; None without
    optimizer, scaler  their state_dicts; the scaler's is empty but for float16
    random         `random_state` of every process of the run, in order of rank
    meter          sums since the last row of the log, of every process
    step           updates done
    skipped_steps  of those, how many changed nothing because loss or gradient was not finite
    seconds        of training and evaluation so far
    best, evaluated  rows of the best and of the last evaluation; None before the first
    config         every setting, resolved
    classes        names of the classes, in the order of the labels
    inputs         digests of images, teacher and cache, see `teacher_checks.digests`
    threads        torch's on the CPU: the order of a sum depends on it
    code           `code_hash` of the package that wrote it
    logged         how many rows log.jsonl had, and a digest of them, see `RunLog.logged`; None of earlier versions
    """

    learner: dict[str, Tensor]
    live: dict[str, Tensor] | None
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    random: list[dict[str, Any]]
    meter: list[dict[str, Any]]
    step: int
    skipped_steps: int
    seconds: float
    best: Row | None
    evaluated: Row | None
    config: dict[str, Any]
    classes: list[str]
    inputs: dict[str, str | None]
    threads: int
    code: str
    logged: tuple[int, str] | None = None

    @classmethod
    def read(cls, path: str | Path) -> Saved:
        """The checkpoint in a file. UserError as `checkpoint.load`, and for parts or settings of another version."""
        values = checkpoint.load(path)
        parts = [part.name for part in dataclasses.fields(cls) if part.name in values]
        missing = [
            part.name
            for part in dataclasses.fields(cls)
            if part.name not in values and part.default is dataclasses.MISSING
        ]
        if missing:
            raise UserError(
                f"{path} lacks {', '.join(map(repr, missing))}, expected every part of a checkpoint of this version: "
                f"continue with {run_folder.version_that_wrote(Path(path).parent)}, or train again"
            )
        unknown = [name for name in values["config"] if name not in FIELDS]
        if unknown:
            raise UserError(
                f"{path} has settings that this version of ijckd-fast does not know ({', '.join(unknown)}): "
                f"continue with {run_folder.version_that_wrote(Path(path).parent)}"
            )
        return cls(**{name: values[name] for name in parts} | {"config": completed(values["config"])})

    def as_dict(self) -> dict[str, Any]:
        """What `checkpoint.save` writes; the tensors are not copied."""
        return {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}


@dataclass
class RunState:
    """A run at a step.

    config     resolved
    classes, inputs  as in `Saved`
    learner, optimizer  what is trained, and by what
    update     one training step of them, with its loss scale and averages
    meter      figures since the last row of the log
    step, skipped_steps, best, evaluated, logged  as in `Saved`
    """

    config: TrainConfig
    classes: Sequence[str]
    inputs: Mapping[str, str | None]
    learner: nn.Module
    optimizer: torch.optim.Optimizer
    update: TrainStep
    meter: Meter
    processes: Processes
    step: int = 0
    skipped_steps: int = 0
    best: Row | None = None
    evaluated: Row | None = None
    logged: tuple[int, str] | None = None
    _seconds_before: float = 0.0  # of the parts of the run before this one
    _started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Of training and evaluation, all parts of the run."""
        return self._seconds_before + time.perf_counter() - self._started

    def start_clock(self) -> None:
        """From here on time counts as the run's."""
        self._started = time.perf_counter()

    def saved(self) -> Saved | None:
        """What a checkpoint of this moment holds, with the tensors themselves. Called by all processes; None but for
        rank 0.
        """
        self.processes.share_buffers(self.learner)
        each = self.processes.gather((random_state(), checkpoint.copied(self.meter.state_dict())))
        if not self.processes.is_main:
            return None
        live, ema = self.learner.state_dict(), self.update.ema
        return Saved(
            learner=live if ema is None else {**live, **ema.state_dict()},
            live=None if ema is None else live,
            ema=None if ema is None else ema.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.update.scaler.state_dict(),
            random=[random for random, _ in each],
            meter=[sums for _, sums in each],
            step=self.step,
            skipped_steps=self.skipped_steps,
            seconds=self.seconds,
            best=self.best,
            evaluated=self.evaluated,
            config=dataclasses.asdict(self.config),
            classes=list(self.classes),
            inputs=dict(self.inputs),
            threads=torch.get_num_threads(),
            code=code_hash(),
            logged=self.logged,
        )

    def restore(self, saved: Saved, path: Path, say: Callable[[str], None]) -> None:
        """Puts back what the checkpoint `path` holds; on a CPU the run then ends with the bits it would have had.

        saved   read from it
        say     told of what may make the bits differ
        raises  UserError where it is of other images, another teacher or another cache
        """
        rank = self.processes.rank
        for what, digest in self.inputs.items():
            if saved.inputs.get(what) != digest:
                again = " (ijckd-fast index looks at every file again)" if "images" in what else ""
                raise UserError(
                    f"{path.parent} cannot be resumed: the {what} differ from those the run began with; put the old "
                    f"ones back{again} or start a new run"
                )
        checkpoint.load_into(self.learner, saved.live or saved.learner, path)
        self.optimizer.load_state_dict(saved.optimizer)
        self.update.scaler.load_state_dict(saved.scaler)
        if self.update.ema is not None:
            assert saved.ema is not None  # --ema-decay is not free on resume
            self.update.ema.load_state_dict(saved.ema)
        self.step, self.skipped_steps, self._seconds_before = saved.step, saved.skipped_steps, saved.seconds
        self.best, self.evaluated, self.logged = saved.best, saved.evaluated, saved.logged
        if len(saved.random) == self.processes.world:
            self.meter.load_state_dict(saved.meter[rank])
            set_random_state(saved.random[rank])
        else:
            say(
                f"begun with {len(saved.random)} processes, continuing with {self.processes.world}: the same images in "
                "every step, but sums in another order and other random numbers in dropout, so not the same bits"
            )
            seed_all(self.config.seed + self.step, rank)
        if self.config.device == "cpu" and saved.threads != torch.get_num_threads():
            # the order of a sum, and so its last bits, depends on the number of threads
            say(f"computing with {saved.threads} threads, as the run began, to get the same bits")
            torch.set_num_threads(saved.threads)
        if saved.code != code_hash():
            say(f"{path.parent} was begun with other code of ijckd_fast: the bits of the result may differ")


def seed_all(seed: int, rank: int) -> None:
    """Seeds Python's, numpy's and torch's generators with numbers of their own for each rank."""
    mixed = int(np.random.SeedSequence((seed, rank)).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)  # noqa: NPY002 - for third-party nets that draw from it
    torch.manual_seed(mixed)


def random_state() -> dict[str, Any]:
    """State of torch's generators (CPU and, if used, every GPU), numpy's and Python's, in types weights_only loads."""
    numpys = np.random.get_state(legacy=True)  # noqa: NPY002 - the state of others' code
    kind, keys, position, has_gauss, cached = numpys
    version, ints, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
        "python": [version, list(ints), gauss],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, ints, gauss = state["python"]
    random.setstate((version, tuple(ints), gauss))
