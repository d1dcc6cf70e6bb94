"""What a comparison is: methods in regimes on one dataset, several seeds each, as a YAML file says it.

Within a regime every method has the same loop, schedule and plan: seed s gives all of them the same training images,
labels, crops and order, and the same first weights of the student. So the difference of two methods is taken seed by
seed, see figures.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ijckd_fast.distill import PRESETS
from ijckd_fast.errors import UserError, did_you_mean
from ijckd_fast.train.config import (
    COMPARISONS,
    MADE_BY_COMPARISON,
    PLAN_FIELDS,
    TEACHER_WEIGHTS,
    load_preset,
    preset_names,
    preset_path,
    read_preset,
    read_yaml,
    typed,
)
from ijckd_fast.train.layered import TEACHERS_OWN, below, layered
from ijckd_fast.train.mistakes import require_data

DIGITS = "digits"  # as data_dir: the embedded images, written to the output folder

_NAME = re.compile(r"[A-Za-z0-9][\w.+=-]*")  # of a method or regime: part of a folder's name and of a table


@dataclass(frozen=True)
class Comparison:
    """What is compared. `load_comparison` makes one of a YAML file, whose keys are these fields but for `name`."""

    name: str
    methods: Mapping[str, Mapping[str, Any]]  # settings of each on top of base and regime, with its objective
    base: Mapping[str, Any]  # settings of every run
    regimes: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})  # settings on top of base
    # settings of a teacher to train first; or what train's --teacher takes
    teacher: Mapping[str, Any] | str | None = None
    against: tuple[str, ...] = ()  # methods that the others are compared with
    seeds: int = 5
    data_dir: str | None = None  # DIGITS or a folder
    about: str = ""  # a paragraph for the report

    def __post_init__(self) -> None:
        self._check_names()
        self._check_seeds()
        self._check_settings()
        self._check_teacher()

    def _check_names(self) -> None:
        if not self.methods:
            raise UserError(f"{self.name} names no method: expected methods, each a name with its settings")
        if not self.regimes:
            raise UserError(f"{self.name} names no regime: leave regimes out for a single one, that of base")
        for what, names in (("method", self.methods), ("regime", [name for name in self.regimes if name])):
            for name in names:
                if not _NAME.fullmatch(name):
                    raise UserError(
                        f"{what} {name!r} of {self.name}: expected letters, digits and ._+=-, as in a folder's name; "
                        "rename it"
                    )
        for name in ("teacher", DIGITS):
            if name in self.regimes:
                raise UserError(f"a regime of {self.name} is called {name!r}, as a folder of ours: rename it")
        for name in self.against:
            if name not in self.methods:
                raise UserError(
                    f"{self.name} compares against {name!r}, which is none of its methods ({', '.join(self.methods)})"
                    f"{did_you_mean(name, self.methods)}; add it to methods, or leave it out of against"
                )

    def _check_seeds(self) -> None:
        least = 2 if self.against else 1
        if self.seeds < least:
            remedy = "; an interval needs two differences: raise seeds, or set against: [] for none"
            raise UserError(
                f"{self.name}: seeds must be at least {least}, got {self.seeds}{remedy if self.against else ''}"
            )

    def _check_settings(self) -> None:
        for where, values in (
            ("base", self.base),
            *((f"regime {name}", values) for name, values in self.regimes.items()),
            *((f"method {name}", values) for name, values in self.methods.items()),
        ):
            for name, instead in MADE_BY_COMPARISON.items():
                if name in values:
                    raise UserError(f"{where} of {self.name} sets {name}, which every run has its own: give {instead}")
            if not where.startswith("method"):
                continue
            for name in PLAN_FIELDS:
                if name in values:
                    raise UserError(
                        f"{where} of {self.name} sets {name}, which decides what the net sees: set it in base or in a "
                        "regime, so that all methods see the same"
                    )

    def _check_teacher(self) -> None:
        if not self.trains_teacher:
            return
        for where, values in (("base", self.base), *self.regimes.items(), *self.methods.items()):
            for name in TEACHER_WEIGHTS:
                if values.get(name):
                    raise UserError(f"{self.name} trains a teacher and {where} sets {name} too: leave out one of them")

    @property
    def trains_teacher(self) -> bool:
        """Whether the teacher is trained as part of the comparison."""
        return isinstance(self.teacher, Mapping)


def refuse_mistakes(comparison: Comparison, jobs: int) -> None:
    """UserError for what can be seen to be wrong before anything is built."""
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    if data_dir_of(comparison) != DIGITS:
        require_data(data_dir_of(comparison))


def data_dir_of(comparison: Comparison) -> str:
    """DIGITS or a folder; UserError where it names neither."""
    if comparison.data_dir is None:
        raise UserError(
            f"{comparison.name} has no data_dir: give --data-dir with train/<class>/* and val/<class>/*, or {DIGITS}"
        )
    return comparison.data_dir


def load_comparison(
    name_or_path: str, *, seeds: int | None = None, data_dir: str | None = None, teacher: str | None = None
) -> Comparison:
    """The comparison in a YAML file or a packaged one; seeds, data_dir and teacher replace the file's.

    The keys:
    methods   name -> settings; `name:` alone is the objective of that name
    base      settings, or a preset's name; `config` among settings names a preset they change. What the preset sets for
              single objectives the methods of these objectives have, unless base or a regime sets it for all
    teacher   the same: it is trained first; or what `ijckd-fast train --teacher` takes
    regimes   name -> settings
    against   methods to compare the others with
    seeds     how many
    data_dir  a folder, or `digits`
    about     text

    raises    UserError for unknown keys and settings, values of a wrong type, and what cannot be compared
    """
    path = preset_path(name_or_path, COMPARISONS)
    values = read_yaml(path)
    _check_keys(values, path)
    preset, settings = _preset(values.get("base"), f"base of {path}")
    under, of_objectives = ({}, {}) if preset is None else read_preset(preset)
    if teacher is not None and any(settings.get(name) is not None for name in ("teacher", *TEACHER_WEIGHTS)):
        raise UserError(f"base of {path} names a teacher of its own: leave out --teacher {teacher}, or that")
    of_runs = _teacher(values.get("teacher") if teacher is None else teacher, f"teacher of {path}")
    base = layered(_with_teacher(typed(under, str(preset)), of_runs), settings)
    if "seed" not in settings:
        base.pop("seed", None)  # that of a preset, which was for a run alone
    methods = {str(name): _method(str(name), values, path) for name, values in (values.get("methods") or {}).items()}
    more: dict[str, Any] = {key: values[key] for key in ("seeds", "data_dir", "about") if key in values}
    if "regimes" in values:
        more["regimes"] = {
            str(name): _settings(settings, f"regime {name} of {path}") for name, settings in values["regimes"].items()
        }
    if seeds is not None:
        more["seeds"] = seeds
    if data_dir is not None:
        more["data_dir"] = data_dir
    for name, method in methods.items():
        of_objective = typed(of_objectives.get(method["objective"], {}), str(preset))
        said = {*settings, *(key for regime in more.get("regimes", {}).values() for key in regime)}  # for every method
        methods[name] = {**{key: value for key, value in of_objective.items() if key not in said}, **method}
    return Comparison(
        name=path.stem,
        methods=methods,
        base=base,
        teacher=of_runs,
        against=tuple(str(name) for name in values.get("against", ())),
        **more,
    )


def _check_keys(values: Mapping[Any, Any], path: Path) -> None:
    known = [f.name for f in dataclasses.fields(Comparison) if f.name != "name"]
    for key in values:
        if key not in known:
            raise UserError(
                f"unknown key {str(key)!r} in {path}: expected some of {', '.join(known)}"
                f"{did_you_mean(str(key), known)}"
            )
    for key, kind, expected in (
        ("methods", dict, "name: settings lines"),
        ("regimes", dict, "name: settings lines"),
        ("against", list, "a list of methods"),
        ("seeds", int, "a whole number"),
        ("data_dir", str, "a folder, or digits"),
        ("about", str, "text"),
    ):
        if key in values and (not isinstance(values[key], kind) or isinstance(values[key], bool)):
            raise UserError(f"{key} of {path}: expected {expected}, got {values[key]!r}")


def _settings(values: Any, where: str) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected settings in braces or on indented lines, got {values!r}")
    return typed(values, where)


def _preset(values: Any, where: str) -> tuple[str | None, dict[str, Any]]:
    """(preset, the settings that change it) of a preset's name, or of settings with that name in `config`."""
    if isinstance(values, str):
        return values, {}
    if not isinstance(values, dict):
        return None, _settings(values, where)
    preset = values.get("config")
    settings = _settings({key: value for key, value in values.items() if key != "config"}, where)
    return None if preset is None else str(preset), settings


def _teacher(values: Any, where: str) -> dict[str, Any] | str | None:
    if isinstance(values, str) and values not in preset_names() and Path(values).suffix not in (".yaml", ".yml"):
        return values
    if values is None:
        return None
    preset, settings = _preset(values, where)
    return layered({} if preset is None else typed(load_preset(preset), preset), settings)


def _with_teacher(preset: dict[str, Any], teacher: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """What counts of the preset of `base`: a teacher beside the methods stands instead of the preset's."""
    if isinstance(teacher, str):
        return below(preset, {"teacher": teacher})
    gone = () if teacher is None else ("teacher", "teacher_weights", *TEACHER_WEIGHTS, *TEACHERS_OWN)
    return {name: value for name, value in preset.items() if name not in gone}


def _method(name: str, values: Any, path: Path) -> dict[str, Any]:
    settings = _settings(values, f"method {name} of {path}")
    if "objective" not in settings and name not in PRESETS:
        raise UserError(
            f"method {name!r} of {path} is no objective and names none: expected objective, one of {', '.join(PRESETS)}"
            f"{did_you_mean(name, PRESETS)}"
        )
    return {"objective": name, **settings}
