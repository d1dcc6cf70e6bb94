"""The runs of a comparison: one net each, with its settings and its folder, settled before anything is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ijckd_fast.compare.comparison import DIGITS, Comparison, data_dir_of
from ijckd_fast.errors import UserError
from ijckd_fast.train import TrainConfig, finished_summary, make_config, objective_of, resolve, run_folder
from ijckd_fast.train.layered import layered, teachers_run, with_pixels


@dataclass(frozen=True)
class Run:
    """One net to train. config is resolved."""

    regime: str
    method: str
    seed: int
    config: TrainConfig

    @property
    def folder(self) -> Path:
        assert self.config.output_dir is not None
        return Path(self.config.output_dir)

    @property
    def name(self) -> str:
        return f"{self.regime} {self.method} seed {self.seed}".strip()

    def summary(self) -> dict[str, Any]:
        """What summary.json says once the run has finished. UserError where it is damaged."""
        said: list[str] = []
        summary = finished_summary(self.folder, self.config, said.append)
        if summary is None:
            raise UserError(said[0] if said else f"{self.folder / run_folder.SUMMARY} is gone: give the command again")
        return summary


def folder_of(output: Path, regime: str, method: str, seed: int) -> Path:
    """Where a run of the comparison in `output` lies."""
    return output / regime / f"{method}-seed{seed}"


def plan(comparison: Comparison, output: Path) -> tuple[TrainConfig | None, list[Run]]:
    """(settings of the teacher to train first, every run in order), settled before anything is trained or written.

    raises   UserError where a run could not be trained as it is described, naming method and regime
    """
    data_dir = data_dir_of(comparison)
    if data_dir == DIGITS:
        data_dir = str(output / DIGITS)
    teacher, given = _teacher(comparison, data_dir, output / "teacher")
    pixels = teachers_run({**comparison.base, **given}) if teacher is None else dataclasses.asdict(teacher)
    runs = []
    for regime, changes in comparison.regimes.items():
        for method, settings in comparison.methods.items():
            for seed in range(comparison.seeds):
                folder = str(folder_of(output, regime, method, seed))
                own = {"data_dir": data_dir, "seed": seed, "output_dir": folder}
                try:
                    values = layered({**comparison.base, **given}, changes, settings, own)
                    config = _checked(_one_split(with_pixels(values, pixels)))
                except UserError as error:
                    where = f"method {method}" + (f" in regime {regime}" if regime else "")
                    raise UserError(f"{where} of {comparison.name}: {error}") from error
                runs.append(Run(regime, method, seed, config))
    return teacher, runs


def _teacher(comparison: Comparison, data_dir: str, folder: Path) -> tuple[TrainConfig | None, dict[str, Any]]:
    """(settings of the teacher to train in `folder`, None if there is none to train; what they mean to every run)"""
    if comparison.teacher is None:
        return None, {}
    if not isinstance(comparison.teacher, Mapping):
        return None, {"teacher": comparison.teacher}
    settings = {**comparison.teacher, "data_dir": data_dir, "output_dir": str(folder)}
    teacher = resolve(make_config(_one_split(settings)))
    named = comparison.base.get("teacher")
    if named not in (None, teacher.student):
        raise UserError(
            f"{comparison.name} trains {teacher.student} as the teacher, but base says teacher: {named}; leave that out"
        )
    return teacher, {"teacher": teacher.student, "teacher_checkpoint": str(folder / run_folder.LAST)}


def _one_split(values: dict[str, Any]) -> dict[str, Any]:
    """With one draw of held out images for all runs, their teacher among them, whatever their seeds are.

    Otherwise the teacher would have been trained on what some of them are evaluated on.
    """
    return values if values.get("val_fraction") is None else {"val_seed": 0, **values}


def _checked(values: Mapping[str, Any]) -> TrainConfig:
    config = make_config(values)
    if config.teacher is None and config.teacher_cache is None and objective_of(config).needs_teacher:
        raise UserError(
            "its objective needs a teacher, and there is none: give teacher beside methods, a preset to train first, a "
            "run's folder or checkpoint, or a name with teacher_checkpoint or teacher_pretrained in base"
        )
    return resolve(config)
