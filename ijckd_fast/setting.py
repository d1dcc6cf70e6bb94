"""A setting is declared once: a field of a dataclass, made by `setting`, that carries everything that belongs to it.

The command-line options and their help, the keys of config.yaml, the checks of values and every list of settings (which
may change when a run is resumed, which a teacher cache is made with, ...) are computed from these declarations.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

_KEY = "setting"  # of a field's metadata
_COUNTS = {2: "two", 3: "three"}


class Trait(enum.Flag):
    """What holds for a setting beside its values.

    FREE_ON_RESUME  a run may be continued with another value: its weights do not depend on it
    REUSED          a comparison uses a finished run again whatever its value was
    PLAN            decides which images a step sees, so that a comparison's method may not set it
    CACHED          a teacher cache is made with it
    UNCACHED        must be off in a training from a cache
    INDEXES         decides which images and labels there are
    OF_FOLDER       says of the data folder what means nothing of another one
    TEACHER         decides what the teacher's net is
    WEIGHTS         says where the teacher's weights come from
    TRAINING        means nothing once the weights are there: an evaluation of the run takes its default
    PATH            a path, which a run keeps in absolute form
    PER_PROCESS     may differ between the processes of a run, as a PATH may: it says where something lies on a machine,
                    or how fast it is read there
    """

    FREE_ON_RESUME = enum.auto()
    REUSED = enum.auto()
    PLAN = enum.auto()
    CACHED = enum.auto()
    UNCACHED = enum.auto()
    INDEXES = enum.auto()
    OF_FOLDER = enum.auto()
    TEACHER = enum.auto()
    WEIGHTS = enum.auto()
    TRAINING = enum.auto()
    PATH = enum.auto()
    PER_PROCESS = enum.auto()
    FREE = FREE_ON_RESUME | REUSED


NO_TRAIT = Trait(0)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What belongs to a setting besides its name, type and default, which are the field's own.

    help           description, with its unit
    traits         what holds for it, see Trait
    group          heading of the help that it stands under
    least          bounds: the value must be >= least, > above and < below; of a tuple, every value. None, a value that
                   is
    above          left to be chosen, is within any bounds
    below
    finite         must be a finite number
    remedy         what to do instead, or what the value means: ends the error about a value out of bounds
    of_comparison  not to be set in a comparison, which makes it itself: what to write instead
    """

    help: str
    traits: Trait = NO_TRAIT
    group: str = ""
    least: float | None = None
    above: float | None = None
    below: float | None = None
    finite: bool = False
    remedy: str = ""
    of_comparison: str = ""


def setting(default: Any, help: str, traits: Trait = NO_TRAIT, **about: Any) -> Any:
    """A field of a dataclass that is a setting; `about`: other fields of Setting."""
    return dataclasses.field(default=default, metadata={_KEY: Setting(help=help, traits=traits, **about)})


def settings_of(cls: type) -> dict[str, Setting]:
    """What is declared of the settings among the fields of a dataclass, by name, in the fields' order."""
    return {f.name: f.metadata[_KEY] for f in dataclasses.fields(cls) if _KEY in f.metadata}


def joined(name: str, classes: Iterable[type], *, without: type | None = None) -> type:
    """A frozen dataclass with the settings of all `classes`, each once and by keyword, but for those of `without`.

    raises   TypeError where two classes declare a setting of the same name: they should inherit it from one class
    """
    found: dict[str, dataclasses.Field] = {}
    types: dict[str, Any] = {}
    for cls in classes:
        types |= typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if found.setdefault(f.name, f) is not f:
                raise TypeError(
                    f"{cls.__name__} declares {f.name} again: inherit it from the class that has it already"
                )
    skipped = settings_of(without) if without is not None else ()
    declared = [
        (f.name, types[f.name], dataclasses.field(default=f.default, metadata=f.metadata))
        for f in found.values()
        if f.name not in skipped
    ]
    return dataclasses.make_dataclass(name, declared, frozen=True, kw_only=True)


def fault(about: Setting, hint: Any, value: Any) -> str | None:
    """What is wrong with a value, e.g. "must be at least 1, got 0"; None if nothing is. hint: the setting's type."""
    if value is None:
        return None
    choices = choices_of(hint)
    if choices:
        return None if value in choices else f"must be one of {', '.join(choices)}, got {value!r}"
    bounds = _bounds(about, hint, value)
    values = value if isinstance(value, tuple) else (value,)
    if not bounds or all(_within(about, x) for x in values):
        return None
    return f"must {bounds}, got {value}{f': {about.remedy}' if about.remedy else ''}"


def choices_of(hint: Any) -> tuple[str, ...]:
    """The values of a Literal, or of one among the alternatives of a type; () for any other type."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return next((choices for part in typing.get_args(hint) if (choices := choices_of(part))), ())


def _within(about: Setting, x: float) -> bool:
    return (
        (math.isfinite(x) or not about.finite)
        and (about.least is None or x >= about.least)
        and (about.above is None or x > about.above)
        and (about.below is None or x < about.below)
    )


def _bounds(about: Setting, hint: Any, value: Any) -> str:
    if about.finite:
        kind = "whole" if hint is int else "finite"
        return f"be a {kind} number {f'> {about.above}' if about.above is not None else f'>= {about.least}'}"
    if about.least is not None and about.below is not None:
        interval = f"[{about.least}, {about.below})"
        if isinstance(value, tuple):
            return f"be {_COUNTS.get(len(value), len(value))} numbers in {interval}"
        return f"lie in {interval}"
    if about.above is not None:
        return f"be above {about.above}"
    return "" if about.least is None else f"be at least {about.least}"
