"""TrainConfig, all settings of a training run: the command line, the presets and config.yaml are made of it."""

import dataclasses
import functools
import os
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from ijckd_fast.distill import PRESETS, Objective
from ijckd_fast.errors import UserError, did_you_mean
from ijckd_fast.files import read_bytes
from ijckd_fast.setting import Setting, Trait, fault, settings_of
from ijckd_fast.train.image_settings import Images
from ijckd_fast.train.settings import Computation, DataAndModels, Goal, Optimisation, Writing

PRESET_FOLDER = Path(__file__).parents[1] / "configs"
COMPARISONS = Path(__file__).parents[1] / "comparisons"  # what `ijckd-fast compare --config` takes by name
BY_OBJECTIVE = "objectives"  # key of a preset: what it sets for single objectives
_PREFIXES = ("imagenet_", "cifar100_")  # of presets' names, which may be left out

CACHE_CHUNK_IMAGES = 4096  # of a teacher cache: images in a chunk, the unit that is written, checked and computed again
CACHE_VERIFY = 64  # and how many of its views are computed again when it is finished


@dataclass(frozen=True)
class TrainConfig(Writing, Computation, Optimisation, Images, Goal, DataAndModels):
    """Settings of `train`. `help_of(name)` gives the description of one; None means 'chosen as the description says'.

    The order of the settings is that of the groups from the last base to the first: as dataclasses take their fields.
    """

    def __post_init__(self) -> None:
        for name, about in SETTINGS.items():
            wrong = None if name in OBJECTIVE_FIELDS else fault(about, TYPES[name], getattr(self, name))
            if wrong is not None:
                raise UserError(f"--{name.replace('_', '-')} {wrong}")
        if self.nesterov and not self.momentum:
            raise UserError("--nesterov needs a --momentum above 0, got 0: set one, or leave --nesterov out")
        if self.optimizer != "sgd" and self.nesterov:
            raise UserError(f"--nesterov is SGD's, got --optimizer {self.optimizer}: leave it out")
        if self.decode != "cpu" and self.data_backend not in ("auto", "dali"):
            raise UserError(
                f"--decode {self.decode} is DALI's, got --data-backend {self.data_backend}: take dali, or --decode cpu"
            )
        if self.blocks_on != "pinned" and self.data_backend not in ("auto", "blocks"):
            raise UserError(
                f"--blocks-on {self.blocks_on} is for block packs, got --data-backend {self.data_backend}: take "
                "blocks, or leave --blocks-on out"
            )


FIELDS: dict[str, dataclasses.Field] = {f.name: f for f in dataclasses.fields(TrainConfig)}
TYPES: dict[str, Any] = typing.get_type_hints(TrainConfig)
SETTINGS: dict[str, Setting] = settings_of(TrainConfig)

GROUPS = {name: about.group for name, about in SETTINGS.items()}  # headings of the help


def _those(trait: Trait) -> tuple[str, ...]:
    return tuple(name for name, about in SETTINGS.items() if trait in about.traits)


# Settings by their traits, see Trait. batch_size is free because global_batch is not: a run continues with any number
# of processes that divides its global batch. Of data, teacher and cache, which are free too, the contents are compared.
FREE_ON_RESUME = frozenset(_those(Trait.FREE_ON_RESUME))
REUSED_WITH_ANY = frozenset(_those(Trait.REUSED))
PLAN_FIELDS = _those(Trait.PLAN)
CACHE_FIELDS = _those(Trait.CACHED)
UNCACHED_FIELDS = _those(Trait.UNCACHED)
INDEX_FIELDS = _those(Trait.INDEXES)
FOLDER_FIELDS = _those(Trait.OF_FOLDER)
TEACHER_FIELDS = _those(Trait.TEACHER)
TEACHER_WEIGHTS = _those(Trait.WEIGHTS)
PER_PROCESS = frozenset(_those(Trait.PATH) + _those(Trait.PER_PROCESS))
OBJECTIVE_FIELDS = tuple(settings_of(Objective))  # settings that replace a field of the objective
MADE_BY_COMPARISON = {name: about.of_comparison for name, about in SETTINGS.items() if about.of_comparison}


def help_of(name: str) -> str:
    """The description of one setting, with its unit."""
    return SETTINGS[name].help


def default_eval_resize(image_size: int, crop_padding: int) -> int:
    """--eval-resize where it is not given, pixels: no margin around the crop where training has none either."""
    return image_size if crop_padding else round(image_size * 256 / 224)


def make_config(values: Mapping[str, Any]) -> TrainConfig:
    """TrainConfig from a mapping such as a YAML file's; UserError for a name that is no setting."""
    check_names(values, "the settings")
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    return TrainConfig(**settings)


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's recorded settings; of an older version's run with those that it had no name for.

    Its teacher saw the student's images.
    """
    older: dict[str, Any] = {}
    if values.get("teacher") is not None:
        older = {f"teacher_{name}": values[name] for name in ("mean", "std") if name in values}
    return {**older, **values}


def for_evaluation(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings without those that only mean something in training, which are back at their defaults."""
    return {**values, **{name: FIELDS[name].default for name in _those(Trait.TRAINING)}}


def absolute_paths(config: TrainConfig) -> TrainConfig:
    """config with absolute paths, so that the run may be resumed from another working directory."""
    given = {name: getattr(config, name) for name in _those(Trait.PATH)}
    return dataclasses.replace(config, **{name: os.path.abspath(path) for name, path in given.items() if path})


def check_names(names: Iterable[str], where: str) -> None:
    """UserError, with the nearest names, for the first of `names` that is no setting."""
    for name in names:
        if name not in FIELDS:
            raise UserError(f"unknown setting '{name}' in {where}{did_you_mean(name, FIELDS)}")


def typed(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values`, settings as a YAML file has them, with the types of TrainConfig; `where` names them in errors.

    raises   UserError for a name that is no setting, and for a value of another type
    """
    check_names(values, where)
    try:
        return _types().parse_object(dict(values), defaults=False).as_dict()
    except ArgumentError as error:
        name = re.match(r'Parser key "(\w+)"', error.message)
        if name is None:
            raise UserError(f"{where}: {' '.join(error.message.split())}") from error
        wanted = re.findall(r"Expected an? ([^\n]+?)(?:\.|$)", error.message, re.MULTILINE)
        kinds = [re.sub(r"<class '(\w+)'>", r"\1", kind.replace("typing.", "")) for kind in wanted]
        raise UserError(
            f"{name[1]} in {where}: wanted {' or '.join(kinds) or TYPES[name[1]]}, got {values[name[1]]!r}:"
            f" {help_of(name[1])}"
        ) from error


@functools.cache
def _types() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    for name in FIELDS:
        parser.add_argument(f"--{name}", type=TYPES[name])
    return parser


def preset_names(folder: Path = PRESET_FOLDER) -> list[str]:
    """Names of the packaged presets, as --config takes them."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def pair_names() -> list[str]:
    """Names of the packaged presets that have a teacher."""
    return [name for name in preset_names() if load_preset(name).get("teacher") is not None]


def preset_of_pair(name: str) -> str:
    """One of `pair_names`, whose prefix may be left out; UserError for another name."""
    name = preset_path(name).stem
    if name not in pair_names():
        raise UserError(
            f"preset '{name}' is no packaged pair of teacher and student: expected one of {', '.join(pair_names())}"
        )
    return name


def preset_path(name_or_path: str, folder: Path = PRESET_FOLDER) -> Path:
    """The YAML file that --config names: a path, or a name in `folder`; 'imagenet_', 'cifar100_' may be left out."""
    path, names = Path(name_or_path), preset_names(folder)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise UserError(f"no configuration file {path}: give a YAML file, or one of {', '.join(names)}")
        return path
    for prefix in ("", *_PREFIXES):
        if prefix + name_or_path in names:
            return folder / f"{prefix}{name_or_path}.yaml"
    short = (name.removeprefix(prefix) for name in names for prefix in _PREFIXES)
    raise UserError(
        f"no preset '{name_or_path}': give a YAML file, or one of {', '.join(names)}"
        f"{did_you_mean(name_or_path, {*names, *short})}"
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """What a YAML file of 'name: value' lines holds; UserError for anything else."""
    data = read_bytes(path)
    try:
        values = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that there is not
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold 'setting: value' lines, found {type(values).__name__}")
    return values


def load_preset(name_or_path: str, objective: str | None = None) -> dict[str, Any]:
    """The settings in a YAML file or packaged preset for a training by `objective`; None: by the one it names itself.

    What it sets for that objective alone stands over its other settings.
    """
    values, of_objectives = read_preset(name_or_path)
    objective = objective or values.get("objective", FIELDS["objective"].default)
    return {**values, **of_objectives.get(objective, {})}


def read_preset(name_or_path: str) -> tuple[dict[str, Any], Mapping[str, Mapping[str, Any]]]:
    """(settings in a YAML file or packaged preset, what it sets for single objectives, by their names)"""
    path = preset_path(name_or_path)
    values = read_yaml(path)
    of_objectives = _checked(values.pop(BY_OBJECTIVE, {}), f"{BY_OBJECTIVE} of {path}")
    check_names(values, str(path))
    return values, of_objectives


def _checked(of_objectives: Any, where: str) -> Mapping[str, Mapping[str, Any]]:
    if not isinstance(of_objectives, dict) or not all(isinstance(each, dict) for each in of_objectives.values()):
        raise UserError(
            f"{where}: expected settings by the names of objectives, got {of_objectives!r}: write e.g. dkd: "
            "{temperature: 1}"
        )
    for objective, settings in of_objectives.items():
        if objective not in PRESETS:
            raise UserError(
                f"unknown objective {objective!r} in {where}: expected some of {', '.join(PRESETS)}"
                f"{did_you_mean(str(objective), PRESETS)}"
            )
        check_names(settings, f"{objective} in {where}")
        if "objective" in settings:
            raise UserError(f"{objective} in {where} names an objective too: leave that out, the key is its name")
    return of_objectives
