"""Whether weights that a run begins with were trained on the images that validate it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ijckd_fast.errors import UserError
from ijckd_fast.teacher_cache import TeacherCache
from ijckd_fast.train.config import TrainConfig
from ijckd_fast.train.resolving import data_folder_of
from ijckd_fast.train.state import Saved


def warnings_of_seen_images(config: TrainConfig, cache: TeacherCache | None = None) -> list[str]:
    """A sentence for the teacher, and for what the student starts from, where it is an earlier run on the same data
    folder that was trained on images held out here. config is resolved; cache: where the teacher is one.

    Where validation images are not held out by --val-fraction no run is trained on them.
    """
    teacher = config.teacher_checkpoint if cache is None else cache.weights
    roles = {"teacher": teacher, "student's start": config.student_checkpoint}
    return [
        f"warning: {said}" for role, path in roles.items() if path is not None and (said := _seen(config, role, path))
    ]


def _seen(config: TrainConfig, role: str, checkpoint: str) -> str | None:
    """About one of them; None where there is nothing to say, or nobody knows what it was trained on."""
    mine = data_folder_of(config)
    if mine.val_fraction is None:
        return None
    try:
        theirs = Saved.read(checkpoint).config
    except UserError:  # weights from elsewhere
        return None
    if os.path.realpath(theirs["data_dir"]) != os.path.realpath(mine.data_dir):
        return None
    fraction, seed = theirs.get("val_fraction"), theirs.get("val_seed")
    if fraction is not None and seed == mine.val_seed and fraction >= mine.val_fraction:
        return None  # a larger fraction holds out these images and more
    here = f"--val-fraction {mine.val_fraction} --val-seed {mine.val_seed}"
    remedy = f"train it with {here}"
    if fraction is not None:
        remedy += f", or give --val-fraction {fraction} --val-seed {seed} here"
    return (
        f"the {role}, {checkpoint}, was trained on images that validate this run: it held out {_held_out(theirs)}, "
        f"here they are those of {here}; accuracies on them come out too high: {remedy}"
    )


def _held_out(theirs: Mapping[str, Any]) -> str:
    if theirs.get("val_fraction") is not None:
        return f"those of --val-fraction {theirs['val_fraction']} --val-seed {theirs['val_seed']}"
    return "none" + (f" (--val-dir {theirs['val_dir']})" if theirs.get("val_dir") is not None else "")
