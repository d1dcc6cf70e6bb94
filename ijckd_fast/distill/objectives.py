"""Objectives as data: settings of the loss terms, the connector, and which classifier answers after training.

The loss is the sum of the terms (`ijckd_fast.distill.terms`, a file each) whose weights are above 0. A preset is a row
of `PRESETS`, not a class; to add one takes one row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ijckd_fast.distill.connector_spec import ConnectorInit, parse_spec, takes_map
from ijckd_fast.distill.terms import TERMS, Needs, Term
from ijckd_fast.distill.terms.term import NOTHING, TEACHER_FEATURES, InferenceHead, StandardizedLogits
from ijckd_fast.distill.terms.through_teacher import ThroughTeacher
from ijckd_fast.errors import UserError, did_you_mean, one_of
from ijckd_fast.setting import fault, joined, setting, settings_of

if TYPE_CHECKING:

    class _OfTerms:  # for mypy: the settings of terms that other code reads by name
        sr: float
        standardize_logits: bool

else:
    _OfTerms = joined("_OfTerms", TERMS, without=InferenceHead)


@dataclass(frozen=True)
class Objective(InferenceHead, _OfTerms):
    """A row of the presets' table: every setting of every term, as an attribute (e.g. `temperature`), and three more.

    connector       spec of connectors.build_connector; None: no loss term has the student's features in the teacher's
                    space
    connector_init  how its first weights are drawn
    infer_head      which classifier answers after training
    """

    name: str
    connector: str | None = setting(None, "bottleneck:FACTOR, conv1x1, linear, mlp or none")
    connector_init: ConnectorInit = setting(
        "torch", "first weights of the connector: PyTorch's own (torch), or N(0, 2 / (k k Cout)), SRRL's (he)"
    )

    @functools.cached_property
    def terms(self) -> tuple[Term, ...]:
        """The terms that are on, in the order of their addition to the loss."""
        return tuple(term for term in self._every if term.needs)

    @functools.cached_property
    def _every(self) -> tuple[Term, ...]:
        """Every term with its settings, those that are off too."""
        return tuple(cls.of(self) for cls in TERMS)

    @functools.cached_property
    def needs(self) -> Needs:
        """What the terms that are on need, together."""
        return functools.reduce(operator.or_, (term.needs for term in self.terms), NOTHING)

    @property
    def needs_teacher(self) -> bool:
        """Whether there must be a teacher at all (its features, or its classifier alone)."""
        return bool(self.needs & TEACHER_FEATURES) or self.connector is not None

    def parts_with(self, needs: Needs) -> str:
        """The log's names of what the terms give that need any of these."""
        return ", ".join(part for term in self.terms if term.needs & needs for part in term.parts)

    @property
    def warm_ups(self) -> tuple[str, ...]:
        """The settings of the warm-ups for which a step needs to know the epochs done so far."""
        rising = (settings_of(type(term)) for term in self.terms if Needs.PROGRESS in term.needs)
        return tuple(name for settings in rising for name in settings if name.endswith("_warmup"))

    def refuse_cache(self, folder: str) -> None:
        """UserError, with what to do, where a step needs more of the teacher than the cache in `folder` holds."""
        terms = [term for term in self.terms if term.needs & _MAPS_T]
        if not terms:
            return
        preset = PRESETS[self.name]
        own = [
            name for term in terms for name in settings_of(type(term)) if getattr(self, name) != getattr(preset, name)
        ]
        parts = self.parts_with(_MAPS_T)
        remedies = [f"leave out {' and '.join('--' + name.replace('_', '-') for name in own)}"] if own else []
        remedies.append(f"take --objective {one_of(FROM_CACHE)}")
        raise UserError(
            f"objective {self.name!r} compares the teacher's maps ({parts}), but the cache {folder} holds pooled"
            f" features only: {', '.join(remedies)}, or the teacher itself (--teacher NAME or RUN)"
        )

    def refuse_parts(self, parts: int) -> None:
        """UserError, with what to do, where a batch goes through in several parts (`--accumulate`) and must not."""
        if parts > 1 and Needs.WHOLE_BATCH in self.needs:
            names = self.parts_with(Needs.WHOLE_BATCH)
            raise UserError(
                f"objective {self.name!r} has statistics over all images of a batch ({names}), expected it in one"
                f" piece, got --accumulate {parts}: leave that out and take a smaller --batch-size, or more processes,"
                " whose images count together"
            )

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Inside, a UserError of one of the terms begins with the objective's name."""
        try:
            yield
        except UserError as error:
            raise UserError(f"objective {self.name!r}: {error}") from error

    def check(self) -> None:
        """UserError for a value out of range, a term that cannot be computed, or parameters that get no gradient."""
        with self.named():
            for name, about in settings_of(Objective).items():
                wrong = fault(about, _TYPES[name], getattr(self, name))
                if wrong is not None:
                    raise UserError(f"{name} {wrong}")
            for term in self._every:
                wrong = term.fault()
                if wrong is not None:
                    raise UserError(wrong)
            self._check_standardized_logits()
            self._check_connector_and_heads()

    def _check_standardized_logits(self) -> None:
        if self.standardize_logits and not any(
            isinstance(term, StandardizedLogits) and term.takes_standardized for term in self.terms
        ):
            takers = (cls for cls in TERMS if issubclass(cls, StandardizedLogits) and cls is not ThroughTeacher)
            names = one_of(part for cls in takers for part in cls.parts)
            raise UserError(
                f"standardize_logits is for terms that compare logits, expected {names}, got none of them: set the"
                " weight of one above 0, or leave standardize_logits out"
            )

    def _check_connector_and_heads(self) -> None:
        if Needs.CLASS_MAPS_S in self.needs and Needs.OWN_LOGITS not in self.needs:
            raise UserError(
                "class maps have no bias, so cat alone does not train that of the student's own classifier: set ce or"
                " another weight of it above 0, or cat_head 'teacher'"
            )
        if not self.needs & (Needs.OWN_LOGITS | Needs.CONNECTED):
            raise UserError(
                "no loss term trains a classifier or a connector, so there is nothing to learn: set ce or another "
                "weight above 0"
            )
        if self.connector is None:
            if self.needs & (Needs.CONNECTED | Needs.ANSWER):
                raise UserError(
                    "feature matching and the teacher's classifier need a connector from the student's features, and"
                    " there is none: set connector, e.g. 'conv1x1'"
                )
        else:
            parse_spec(self.connector)
            if Needs.CONNECTED not in self.needs:
                raise UserError(
                    f"no loss term goes through connector {self.connector!r}, so it would not be trained: set sr, fm or"
                    " srd above 0, or leave the connector out"
                )
            if Needs.MAP_T not in self.needs and Needs.MAP_Z in self.needs and not takes_map(self.connector):
                raise UserError(
                    f"connector {self.connector!r} works on pooled vectors and makes no map for the teacher's"
                    f" classifier at positions ({self.parts_with(Needs.MAP_Z)}): set a connector on maps"
                    " (bottleneck:FACTOR, conv1x1), or the head 'student'"
                )
            if Needs.MAP_T in self.needs and not takes_map(self.connector):
                raise UserError(
                    f"connector {self.connector!r} works on pooled vectors and cannot match maps: set match 'pooled',"
                    " or a connector on maps (bottleneck:FACTOR, conv1x1)"
                )
        if self.infer_head == "student" and Needs.OWN_LOGITS not in self.needs:
            raise UserError(
                "the student's own classifier gets no loss term, so it cannot answer: set infer_head 'teacher'"
            )


_MAPS_T = Needs.MAP_T | Needs.FULL_MAP_T | Needs.STAGES
_TYPES = typing.get_type_hints(Objective)

# Sources: ijckd, srrl and simkd are what their authors' released training scripts compute (ijckd's and srrl's the
# ImageNet ones), first weights of the connector included; the weights of kd (1 and 1 at T = 4), fitnet (at hint layer
# 1) and at are those of SimKD's toolbox; dkd's alpha, beta, T and warm-up are its authors' defaults, for CIFAR-100
# (mdistiller; presets have those of their pairs). hard is DeiT's hard distillation, on one classifier instead of two
# tokens. ttm's and wttm's weights and powers are those of their authors' example commands, for CIFAR-100 (README of
# zkxufo/TTM); nkd's (yzd-v/cls_KD), dist's (as torchdistill and mmrazor have them) and srd's are for ImageNet,
# as is reviewkd's for ResNet-34 -> ResNet-18 (mdistiller; presets have that of their pair). sdd's weights are those of
# its authors' KD form for both data sets, sdd-dkd's their DKD form's for CIFAR-100 (shicaiwei123/SDD-CVPR2024), catkd's
# are its authors' defaults (GzyAftermath/CAT-KD); presets have those of their pairs.
# ijckd-pooled is ours: ijckd's terms, but of the teacher it needs only the pooled vector, which can be cached.
_ANSWERS_BY_TEACHER = {"ce_head": "teacher", "kl_head": "teacher", "infer_head": "teacher"}
_ROWS: dict[str, dict[str, Any]] = {
    "ijckd": {"ce": 1, "sr": 1, "fm": 1, "match": "map", "connector": "bottleneck:2", **_ANSWERS_BY_TEACHER},
    "ijckd-pooled": {"ce": 1, "sr": 1, "fm": 1, "match": "pooled", "connector": "conv1x1", **_ANSWERS_BY_TEACHER},
    "srrl": {"ce": 1, "sr": 1, "fm": 1, "match": "pooled", "connector": "conv1x1", "connector_init": "he"},
    "simkd": {"fm": 1, "match": "map", "connector": "bottleneck:2", **_ANSWERS_BY_TEACHER},
    "kd": {"ce": 1, "kl": 1},
    "dkd": {"ce": 1, "dkd_alpha": 1, "dkd_beta": 8},
    "hard": {"ce": 0.5, "hard": 0.5},
    "ttm": {"ce": 1, "ttm": 45, "ttm_power": 0.1},
    "wttm": {"ce": 1, "wttm": 4, "ttm_power": 0.2},
    "nkd": {"ce": 1, "nkd": 1, "temperature": 1},
    "dist": {"ce": 1, "dist_inter": 2, "dist_intra": 2, "temperature": 1},
    "sdd": {"ce": 0.1, "sdd": 0.9},
    "sdd-dkd": {"ce": 1, "sdd_dkd_alpha": 1, "sdd_dkd_beta": 8},
    "catkd": {"ce": 1, "cat": 400},
    "srd": {"ce": 1, "srd": 1, "kl": 1, "temperature": 1, "connector": "linear"},
    "fitnet": {"ce": 1, "kl": 1, "hint": 100},
    "at": {"ce": 1, "kl": 1, "at": 1000},
    "reviewkd": {"ce": 1, "review": 1},
    "ce": {"ce": 1},
}  # fmt: skip
PRESETS: dict[str, Objective] = {name: Objective(name, **row) for name, row in _ROWS.items()}

# Presets that need no more of the teacher than a cache holds: its pooled features and its classifier.
FROM_CACHE = tuple(
    name for name, objective in PRESETS.items() if objective.needs_teacher and not objective.needs & _MAPS_T
)


def get_objective(name: str, **overrides: float | str | Sequence[int] | None) -> Objective:
    """A preset with some of its fields set differently.

    name       a key of PRESETS
    overrides  fields of Objective; None keeps the preset's value. connector='none' takes the connector away.
    raises     UserError for an unknown preset (nearest given), a value out of range, or a combination in which a term
               cannot be computed or some parameter would get no gradient
    """
    if name not in PRESETS:
        raise UserError(f"unknown objective {name!r}: wanted one of {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}")
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in overrides.items() if value is not None
    }
    if given.get("connector") == "none":
        given["connector"] = None
    objective = dataclasses.replace(PRESETS[name], **given)
    objective.check()
    return objective
