"""Which runs of a comparison are there already: finished, begun, or new."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from ijckd_fast.compare.runs import Run
from ijckd_fast.train import (
    Saved,
    TrainConfig,
    build_indexes,
    build_teacher,
    digests,
    finished_summary,
    open_cache,
    run_folder,
    settings_of,
    teacher_fingerprint,
)
from ijckd_fast.train.code_hash import code_hash
from ijckd_fast.train.config import FIELDS, INDEX_FIELDS, REUSED_WITH_ANY, TEACHER_FIELDS


class InputDigests:
    """The digests of data and teacher that a run would begin with now.

    Indexes and teachers serve more than one run, and are built once.
    """

    def __init__(self) -> None:
        self._indexes: dict[tuple, Any] = {}
        self._teachers: dict[tuple, str | None] = {}

    def of(self, config: TrainConfig) -> dict[str, str | None]:
        """As in summary.json and in checkpoints, under "inputs"."""
        key = tuple(getattr(config, name) for name in INDEX_FIELDS)
        if key not in self._indexes:
            self._indexes[key] = build_indexes(config)
        train_index, val_index = self._indexes[key]
        cache = open_cache(config, train_index)
        key = tuple(getattr(config, name) for name in TEACHER_FIELDS)
        if key not in self._teachers:
            teacher = build_teacher(config, train_index.num_classes)
            self._teachers[key] = None if teacher is None else teacher_fingerprint(teacher)
        return digests(train_index, val_index, self._teachers[key], cache)


def state_of(
    run: Run, inputs: Mapping[str, str | None], any_code: bool, say: Callable[[str], None]
) -> Literal["finished", "begun", "new"]:
    """What the run's folder holds of it: 'new' also where what is there has other settings, code or inputs.

    inputs    `InputDigests.of` its settings
    any_code  accept what other code of ijckd_fast trained, even where it lacked some of the settings
    say       told where a file is damaged that is written again
    raises    UserError where what is there is damaged, and whether it is this run cannot be told
    """
    last = run.folder / run_folder.LAST
    if not last.exists() and not (run.folder / run_folder.CONFIG).exists():
        return "new"  # a kill may have left the rest, while an earlier run was being deleted
    environment = run_folder.read_environment(run.folder)
    if environment is None or not (any_code or environment.get("code_hash") == code_hash()):
        return "new"
    found = settings_of(run.folder, say=say)
    compared = [name for name in FIELDS if name not in REUSED_WITH_ANY and (name in found or not any_code)]
    if any(found.get(name) != getattr(run.config, name) for name in compared):
        return "new"
    summary = finished_summary(run.folder, run.config, say)
    if summary is not None:
        return "finished" if summary.get("inputs") == inputs else "new"
    return "begun" if last.exists() and Saved.read(last).inputs == inputs else "new"
