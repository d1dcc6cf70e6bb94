"""Finished runs, and those under way: a checkpoint with its nets, its data and its settings, to evaluate, export or
learn from.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ijckd_fast.data import Index, Loader, holds_blocks, refuse_backend
from ijckd_fast.distill import Distiller, get_objective
from ijckd_fast.errors import UserError
from ijckd_fast.teacher_cache import TeacherCache
from ijckd_fast.train import checkpoint, run_folder
from ijckd_fast.train.begun import refuse_foreign_checkpoint
from ijckd_fast.train.build import build_distiller, build_val_loader, index_of
from ijckd_fast.train.config import (
    FIELDS,
    FOLDER_FIELDS,
    OBJECTIVE_FIELDS,
    TrainConfig,
    for_evaluation,
    make_config,
)
from ijckd_fast.train.resolving import amp_dtype_of, resolve
from ijckd_fast.train.state import Saved
from ijckd_fast.train.teacher_checks import teacher_fingerprint


def load_run(run: str | Path, *, best: bool = False, **changes: Any) -> LoadedRun:
    """A run to look at: nothing is trained, no image is read, nets are built when they are asked for.

    run      folder of a run, or a last.pt, best.pt or checkpoint-STEP.pt
    best     of a folder take best.pt; else last.pt, as in published results
    changes  settings instead of the run's, such as data_dir, device, batch_size or teacher_checkpoint; None changes
             nothing
    returns  LoadedRun. Where the student answers alone and its teacher's weights (or cache) are not there any more, it
             is a run without a teacher; `notes` says so
    raises   UserError for a damaged checkpoint, settings that do not fit, and a teacher that the student needs and is
             not there
    """
    path = run_folder.checkpoint_of(run, best)
    saved = Saved.read(path)
    refuse_foreign_checkpoint(path, saved)
    given = {name: value for name, value in changes.items() if value is not None}
    config = dataclasses.replace(_for_evaluation(saved, given), **given)
    notes: list[str] = []
    config = _with_teacher_cache(config, given, notes)
    has_teacher = (
        config.teacher_cache is not None
        or config.teacher_pretrained
        or (config.teacher_checkpoint is not None and Path(config.teacher_checkpoint).is_file())
    )
    if config.infer_head == "student" and not has_teacher:
        # The student answers alone; without its teacher only the agreement is missing.
        if config.teacher_checkpoint is not None:
            notes.append(
                f"the teacher's weights {config.teacher_checkpoint} are not there: no agreement; --teacher-checkpoint "
                "names them"
            )
        alone = get_objective("ce")
        weights = {name: getattr(alone, name) for name in OBJECTIVE_FIELDS}
        no_teacher: dict[str, Any] = dict.fromkeys(("teacher", "teacher_checkpoint", "teacher_mean", "teacher_std"))
        config = dataclasses.replace(config, objective="ce", teacher_weights="auto", **no_teacher, **weights)
        student = {name: tensor for name, tensor in saved.learner.items() if name.startswith("student.")}
        saved = dataclasses.replace(saved, learner=student)
    config = resolve(config)
    root = Path(config.data_dir or "")
    if "data_backend" in given and (root / "val").is_dir():
        refuse_backend(config.data_backend, f"{root}/val", holds_blocks(root, "val"))
    return LoadedRun(path, saved, config, tuple(notes))


def _for_evaluation(saved: Saved, given: dict[str, Any]) -> TrainConfig:
    """The run's settings without those that are of training only."""
    values = for_evaluation(saved.config)
    if values["amp_dtype"] == "float16" and given.get("device") != "cuda":
        values["amp_dtype"] = None  # what the device has
    if "data_dir" in given:
        values.update(dict.fromkeys(FOLDER_FIELDS))
    if "val_dir" in given or "val_fraction" in given:  # one says where validation images are, instead of the other
        values.update(dict.fromkeys(("val_labels", "val_dir", "val_fraction", "val_seed")))
    if "data_backend" in given:  # of which the run's may know nothing
        values.update({name: FIELDS[name].default for name in ("decode", "blocks_on")})
    return make_config(values)


def _with_teacher_cache(config: TrainConfig, given: dict[str, Any], notes: list[str]) -> TrainConfig:
    cache = config.teacher_cache
    if "teacher_checkpoint" in given and "teacher_cache" not in given:
        cache = None  # the teacher itself
    elif cache is not None and not Path(cache).is_dir():
        if config.infer_head == "teacher":
            raise UserError(
                f"the teacher cache {cache}, whose classifier the student answers through, is not there: give "
                "--teacher-cache with its folder, or --teacher-checkpoint with the teacher's weights"
            )
        notes.append(f"the teacher cache {cache} is not there: no agreement; --teacher-cache names it")
        cache = None
    return dataclasses.replace(config, teacher_cache=cache)


@dataclass(frozen=True)
class LoadedRun:
    """A run as `load_run` gives it.

    path    of its checkpoint
    saved   what the checkpoint holds
    config  the run's settings, changed as asked for, resolved, without those of training only
    notes   sentences on what is missing, for people
    """

    path: Path
    saved: Saved
    config: TrainConfig
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        return torch.device(self.config.device)

    @property
    def amp_dtype(self) -> torch.dtype | None:
        return amp_dtype_of(self.config)

    @functools.cached_property
    def distiller(self) -> Distiller:
        """Its nets with the checkpoint's weights, on `device`, in eval mode. UserError where the teacher is another
        one.
        """
        distiller = build_distiller(self.config, len(self.saved.classes), self.device)
        if distiller.teacher is not None and teacher_fingerprint(distiller.teacher) != self.saved.inputs["teacher"]:
            raise UserError(
                f"the teacher {self.config.teacher} is not the one {self.path} was trained with (its weights differ): "
                "give that one as --teacher-checkpoint"
            )
        checkpoint.load_into(distiller, self.saved.learner, self.path)
        return distiller.eval()

    @functools.cached_property
    def teacher_cache(self) -> TeacherCache | None:
        """The cache that the run was trained from; None where its teacher itself is asked, or there is none."""
        return None if self.config.teacher_cache is None else TeacherCache(self.config.teacher_cache)

    def index(self, split: Literal["train", "val"] = "val") -> Index:
        """All images of a split, with the classes that the run was trained on."""
        return index_of(self.config, split, self.saved.classes)

    def loader(self, index: Index, ids: np.ndarray | None = None) -> Loader:
        """The images of `index`, or of those of `ids` [n] int64, once and in order, in the evaluation's view; close it
        after use.
        """
        return build_val_loader(self.config, index, self.device, ids=ids)
