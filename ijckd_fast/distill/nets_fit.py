"""Whether both nets have the maps that an objective needs; if not, which of them lacks one, and what works."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ijckd_fast.distill.connector_spec import takes_map
from ijckd_fast.distill.terms import Needs

if TYPE_CHECKING:
    from ijckd_fast.distill.objectives import Objective
    from ijckd_fast.nets import CachedTeacher, Tapped

_MATCH_ONLY = "--objective kd --fm 1 --match map --connector bottleneck:2"


def require_maps(objective: Objective, student: Tapped, teacher: Tapped | CachedTeacher | None) -> None:
    """UserError where the objective needs a map that a net does not have.

    Where what the connector makes goes through the teacher's classifier, the classifier must see the mean of the
    teacher's map that is matched, and the student must answer from what its own classifier would see. Where it is
    matched and no more, a map that a net `matches_only` will do.
    """
    matches_maps = Needs.MAP_T in objective.needs
    connects_map = objective.connector is not None and takes_map(objective.connector)
    to_match = not objective.needs & (Needs.CLASSIFIER | Needs.ANSWER)
    if matches_maps and teacher is not None:
        pooled = "--objective ijckd-pooled" + ("" if student.has_map else " --connector linear")
        pooled += " (pooled vectors instead of maps)"
        teacher.require_map(to_match=to_match, role="teacher", remedy=_with_match(pooled, teacher, student))
    if connects_map:
        vectors = "--match pooled --connector linear" if matches_maps else "--connector linear"
        vectors += " (or mlp: its pooled vector instead of its map)"
        remedy = _with_match(vectors, student, teacher) if matches_maps else vectors
        student.require_map(to_match=to_match, role="student", remedy=remedy)


def _with_match(remedy: str, at_fault: Tapped | CachedTeacher, other: Tapped | CachedTeacher | None) -> str:
    """A remedy, and a second one where both nets have maps that can be matched."""
    can_match = getattr(at_fault, "matches_only", False) and getattr(other, "match_channels", None) is not None
    return f"{remedy}, or match the map only: {_MATCH_ONLY}" if can_match else remedy
