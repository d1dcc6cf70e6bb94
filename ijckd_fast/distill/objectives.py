"""Objectives as data: which loss terms, with which weights, through which classifier, with which connector.

    L = ce CE(logits of ce_head, labels) + sr mean_{B,K}(logits - logits_t)^2 + fm D + kl T^2 KL(p_t || p) + DKD + at A + hint H
    D = mean(Z - map_t)^2 (match 'map') or mean(z - pooled_t)^2 (match 'pooled')
    A = sum over the stages of mean_{B,HW}(a_s - a_t)^2, a = the map's mean of squares over the channels, of L2 norm 1 for each image
    H = mean_{B,C,H,W}(r(map_s) - map_t)^2 of one stage, r a 1x1 convolution to the teacher's channels, BatchNorm, ReLU

`logits` of sr are those of z through the teacher's frozen classifier. A preset is a row of `PRESETS`, not a class.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ijckd_fast.distill import connectors
from ijckd_fast.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Objective:
    """A row of the presets' table. Every weight multiplies a mean, so batch and map size do not change its meaning."""

    name: str
    ce: float = 0.0  # hard-label cross-entropy, nats
    ce_head: str = "student"  # 'teacher': through the teacher's classifier; 'student': through the student's own
    sr: float = 0.0  # squared difference of raw logits, both through the teacher's classifier, mean over B and K
    fm: float = 0.0  # feature matching, mean over all elements
    match: str = "none"  # what fm compares: 'map', 'pooled' or 'none'
    kl: float = 0.0  # T^2 KL(teacher || student), mean over B, nats
    kl_head: str = "student"
    temperature: float = 4.0  # T of kl and DKD
    dkd_alpha: float = 0.0  # DKD's target-class term, through the student's own classifier
    dkd_beta: float = 0.0  # DKD's non-target-class term
    dkd_warmup: float = 20.0  # epochs over which both rise linearly from 0
    at: float = 0.0  # attention transfer, Zagoruyko & Komodakis 2017: over all stages that both nets have, counted from the last
    hint: float = 0.0  # hints, Romero et al. 2015
    hint_stage: int = 1  # at which of those stages, 1 the one of the largest maps
    connector: str | None = None  # spec of connectors.build_connector
    infer_head: str = "student"  # which classifier answers after training

    @property
    def uses_student_head(self) -> bool:
        """Whether the student's own classifier takes part (else it is not built: no gradient would reach it)."""
        return (
            (self.ce > 0 and self.ce_head == "student")
            or (self.kl > 0 and self.kl_head == "student")
            or self.dkd_alpha > 0
            or self.dkd_beta > 0
        )

    @property
    def uses_teacher_head(self) -> bool:
        """Whether a loss goes through the teacher's classifier from the student's side."""
        return self.sr > 0 or (self.ce > 0 and self.ce_head == "teacher") or (self.kl > 0 and self.kl_head == "teacher")

    @property
    def needs_student_map(self) -> bool:
        return self.connector is not None and connectors.takes_map(self.connector)

    @property
    def needs_teacher_map(self) -> bool:
        return self.fm > 0 and self.match == "map"

    @property
    def needs_stages(self) -> bool:
        """Whether maps of the stages of both nets are compared."""
        return self.at > 0 or self.hint > 0

    @property
    def needs_teacher_features(self) -> bool:
        """Whether a training step runs the teacher's backbone."""
        needs_pooled = self.sr > 0 or self.fm > 0 or self.kl > 0 or self.dkd_alpha > 0 or self.dkd_beta > 0
        return needs_pooled or self.needs_stages

    @property
    def needs_teacher(self) -> bool:
        """Whether there must be a teacher at all (its features, or its classifier alone)."""
        return self.needs_teacher_features or self.connector is not None

    def dkd_factor(self, progress: float | Tensor) -> float | Tensor:
        """DKD's warm-up: 0 at the start, 1 from dkd_warmup epochs on; progress in epochs, fractions included (a tensor [] gives one)."""
        if self.dkd_warmup == 0:
            return 1.0
        done = progress / self.dkd_warmup
        return done.clamp(max=1.0) if isinstance(done, Tensor) else min(done, 1.0)


# Sources: ijckd, srrl and simkd are what their authors' released training scripts compute (ijckd's and srrl's the ImageNet
# ones); the weights of kd (1 and 1 at T = 4), fitnet (at hint layer 1) and at are those of SimKD's toolbox; dkd's alpha, beta, T
# and warm-up stand in IJCKD's released settings. ijckd-pooled is ours: the same terms as ijckd, but of the teacher it needs only
# the pooled vector, which can be cached.
PRESETS: dict[str, Objective] = {
    o.name: o
    for o in (
        Objective(
            "ijckd", ce=1, ce_head="teacher", sr=1, fm=1, match="map", kl_head="teacher", connector="bottleneck:2",
            infer_head="teacher",
        ),
        Objective(
            "ijckd-pooled", ce=1, ce_head="teacher", sr=1, fm=1, match="pooled", kl_head="teacher", connector="conv1x1",
            infer_head="teacher",
        ),
        Objective("srrl", ce=1, sr=1, fm=1, match="pooled", connector="conv1x1"),
        Objective(
            "simkd", ce_head="teacher", fm=1, match="map", kl_head="teacher", connector="bottleneck:2",
            infer_head="teacher",
        ),
        Objective("kd", ce=1, kl=1),
        Objective("dkd", ce=1, dkd_alpha=1, dkd_beta=8),
        Objective("fitnet", ce=1, kl=1, hint=100),
        Objective("at", ce=1, kl=1, at=1000),
        Objective("ce", ce=1),
    )
}  # fmt: skip


def get_objective(name: str, **overrides: float | str | None) -> Objective:
    """A preset with some of its fields set anew.

    name       a key of PRESETS
    overrides  fields of Objective; None keeps the preset's value. connector='none' takes the connector away.
    raises     UserError for an unknown preset (nearest given), a value out of range, or a combination in which a term
               cannot be computed or some parameter would get no gradient
    """
    if name not in PRESETS:
        raise UserError(f"unknown objective {name!r}: wanted one of {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}")
    given: dict[str, Any] = {k: v for k, v in overrides.items() if v is not None}
    if given.get("connector") == "none":
        given["connector"] = None
    objective = dataclasses.replace(PRESETS[name], **given)
    _check(objective)
    return objective


def _check(o: Objective) -> None:
    what = f"objective {o.name!r}"
    for field in ("ce", "sr", "fm", "kl", "dkd_alpha", "dkd_beta", "dkd_warmup", "at", "hint"):
        value = getattr(o, field)
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{what}: {field} must be a finite number >= 0, got {value}")
    if not (math.isfinite(o.temperature) and o.temperature > 0):
        raise UserError(f"{what}: temperature must be a finite number > 0, got {o.temperature}")
    if o.hint_stage < 1:
        raise UserError(f"{what}: hint_stage must be a whole number >= 1 (the largest maps), got {o.hint_stage}")
    for field, allowed in (
        ("ce_head", ("teacher", "student")),
        ("kl_head", ("teacher", "student")),
        ("infer_head", ("teacher", "student")),
        ("match", ("map", "pooled", "none")),
    ):
        value = getattr(o, field)
        if value not in allowed:
            raise UserError(f"{what}: {field} must be one of {', '.join(allowed)}, got {value!r}")

    if not (o.uses_student_head or o.uses_teacher_head or o.fm > 0):
        raise UserError(f"{what}: every weight is 0, so there is nothing to learn: set ce, sr, fm or kl above 0")
    if o.fm > 0 and o.match == "none":
        raise UserError(f"{what}: feature matching (fm = {o.fm}) needs match 'map' or 'pooled'; set match, or fm to 0")
    if o.connector is None:
        if o.uses_teacher_head or o.fm > 0 or o.infer_head == "teacher":
            raise UserError(
                f"{what}: feature matching and the teacher's classifier need a connector from the student's features,"
                " and there is none: set connector, e.g. 'conv1x1'"
            )
    else:
        connectors.parse_spec(o.connector)
        if not (o.uses_teacher_head or o.fm > 0):
            raise UserError(
                f"{what}: no loss term goes through connector {o.connector!r}, so it would not be trained: set sr or fm"
                " above 0, or leave the connector out"
            )
        if o.needs_teacher_map and not connectors.takes_map(o.connector):
            raise UserError(
                f"{what}: connector {o.connector!r} works on pooled vectors and cannot match maps: set match 'pooled',"
                " or a connector on maps (bottleneck:FACTOR, conv1x1)"
            )
    if o.infer_head == "student" and not o.uses_student_head:
        raise UserError(
            f"{what}: the student's own classifier gets no loss term, so it cannot answer: set infer_head 'teacher'"
        )
