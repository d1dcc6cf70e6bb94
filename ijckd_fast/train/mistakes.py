"""What can be seen to be wrong in the settings of a run before torch, or a library of nets, is imported.

A mistyped argument is answered at once. `resolve` refuses the rest, which takes the nets' weights or the hardware.
"""

from __future__ import annotations

from pathlib import Path

from ijckd_fast.distill import get_objective
from ijckd_fast.errors import UserError
from ijckd_fast.nets import no_weights, refuse_unknown
from ijckd_fast.train.config import OBJECTIVE_FIELDS, TrainConfig
from ijckd_fast.train.layered import CACHE


def refuse_mistakes(config: TrainConfig) -> None:
    """UserError for a data folder that is not there, an objective that is none, and nets or weights that nobody
    has.
    """
    require_data(config.data_dir)
    get_objective(config.objective, **{name: getattr(config, name) for name in OBJECTIVE_FIELDS})
    for named in (config.teacher, config.student):
        if named is not None:
            require_net(named)
    for path in (config.teacher_checkpoint, config.student_checkpoint):
        if path is not None and not Path(path).exists():
            raise no_weights(path)


def require_data(data_dir: str) -> None:
    """UserError where --data-dir is not given, or is no folder."""
    if not data_dir:
        raise no_data_dir()
    if not Path(data_dir).is_dir():
        from ijckd_fast.data.sources import require_folder  # here: it looks into archives, with libraries for them

        require_folder(Path(data_dir))


def require_net(named: str) -> None:
    """UserError where --teacher or --student is no model's name, no run, no file and no cache."""
    if not named.startswith(CACHE) and not Path(named).exists():
        refuse_unknown(named)


def no_data_dir() -> UserError:
    """The sentence for a run without data."""
    return UserError("no --data-dir given: wanted a folder with train/<class>/* and val/<class>/* image files")
