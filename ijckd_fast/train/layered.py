"""Settings in layers: a preset, over it a file or options. What an upper layer says replaces what contradicts it below.

Within one layer nothing is replaced: who says two things that do not go together is told so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ijckd_fast.distill import get_objective
from ijckd_fast.errors import UserError
from ijckd_fast.train import run_folder
from ijckd_fast.train.config import OBJECTIVE_FIELDS

CACHE = "cache:"  # what --teacher begins with where it is the folder of a teacher cache
PIXELS = ("image_size", "eval_resize")  # which pixels a net's weights were made for

_WEIGHTS = {  # where a net's weights come from: one of each row counts
    "teacher": ("teacher_checkpoint", "teacher_pretrained", "teacher_cache"),
    "student": ("student_checkpoint", "student_pretrained"),
}
# What is said of one net, and means nothing of another one.
TEACHERS_OWN = ("teacher_mean", "teacher_std", "teacher_stages")
_OF_NET = {
    "teacher": TEACHERS_OWN,
    "student": ("student_stages",),
}
_CONNECTED = ("connector", "connector_init", "infer_head")  # what only an objective with a connector has


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """One mapping of several, the uppermost last.

    A layer does not only replace settings of the same names: `--teacher RUN` brings weights, so a preset's
    teacher_pretrained does not count; `--batch-size` replaces its global_batch, `--optimizer adamw` its nesterov.
    """
    found: dict[str, Any] = {}
    for layer in layers:
        found = {**below(found, layer), **layer}
    return found


def below(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """What still counts of a lower layer: without what the upper one contradicts."""
    gone = set(_contradicted(lower, upper)) - set(upper)
    return {name: value for name, value in lower.items() if name not in gone}


def _contradicted(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> Iterator[str]:
    for role in ("teacher", "student"):
        yield from _of_another_net(role, lower.get(role), upper)
    if upper.get("objective") is not None:
        yield from _unfit_for(upper["objective"], {**lower, **upper})
    if upper.get("batch_size") is not None:
        yield "global_batch"
    if upper.get("val_dir") is not None:
        yield from ("val_labels", "val_fraction", "val_seed")
    if upper.get("val_fraction") is not None:
        yield from ("val_labels", "val_dir")
    if upper.get("val_labels") is not None:
        yield from ("val_fraction", "val_seed")
    if upper.get("optimizer", "sgd") != "sgd" or upper.get("momentum", 1) == 0:
        yield "nesterov"
    for name, off, backend in (("decode", "cpu", "dali"), ("blocks_on", "pinned", "blocks")):
        if upper.get("data_backend", "auto") not in ("auto", backend):
            yield name
        if upper.get(name, off) != off and lower.get("data_backend") != backend:
            yield "data_backend"


def _of_another_net(role: str, below_it: Any, upper: Mapping[str, Any]) -> Iterator[str]:
    """Of the teacher's or the student's settings below those that are of other weights, or of another net."""
    sources, named = _WEIGHTS[role], upper.get(role)
    from_cache = role == "teacher" and named is not None and named.startswith(CACHE)
    brings = named is not None and not from_cache and weights_at(named) is not None
    if brings or any(upper.get(name) for name in sources):
        yield from (*sources, f"{role}_weights")
    if from_cache or (named is not None and role == "teacher"):
        yield "teacher_cache"
    if named not in (None, below_it):
        yield from _OF_NET[role]


def _unfit_for(objective: str, both: Mapping[str, Any]) -> tuple[str, ...]:
    """What goes with a connector, where the objective that an upper layer names has none."""
    of_it = {name: both[name] for name in OBJECTIVE_FIELDS if name in both}
    try:
        return ("log_bound",) if get_objective(objective, **of_it).connector is None else ()
    except UserError:  # if it is for another reason, it is raised again where the objective is made
        return (*_CONNECTED, "log_bound")


def weights_at(given: str) -> Path | None:
    """The file with weights where --teacher or --student is a run's folder or a checkpoint; None for anything else.

    A model's name is never taken for a path, whatever lies in the working directory: write ./resnet8 for the folder.
    """
    path = Path(given) / run_folder.LAST if Path(given).is_dir() else Path(given)
    if not path.is_file():
        return None
    from ijckd_fast.nets import is_model_name  # here: the libraries that have names take seconds to import

    return None if is_model_name(given) else path


def with_pixels(values: Mapping[str, Any], of_teacher: Mapping[str, Any]) -> dict[str, Any]:
    """values, where they do not say how large images are, with what the settings of the teacher's run say."""
    if values.get("image_size") is not None:
        return dict(values)
    return {**{name: of_teacher[name] for name in PIXELS if name in of_teacher}, **values}


def teachers_run(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run that trained the teacher; {} where its weights are no run's."""
    teacher, checkpoint = values.get("teacher") or "", values.get("teacher_checkpoint")
    path = weights_at(teacher) if teacher and not teacher.startswith(CACHE) else None
    if checkpoint is not None and Path(checkpoint).is_file():
        path = Path(checkpoint)
    if path is None or values.get("teacher_cache") is not None:
        return {}
    from ijckd_fast.train.state import Saved

    try:
        return Saved.read(path).config
    except UserError:  # weights from elsewhere; what cannot be read at all is refused where the net is built
        return {}
