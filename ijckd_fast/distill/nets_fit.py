"""Whether both nets have the maps that an objective needs; if not, which of them lacks one, and what works."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ijckd_fast.distill.connector_spec import takes_map
from ijckd_fast.distill.terms import Needs

if TYPE_CHECKING:
    from ijckd_fast.distill.objectives import Objective
    from ijckd_fast.nets import CachedTeacher, Tapped


def require_maps(objective: Objective, student: Tapped, teacher: Tapped | CachedTeacher | None) -> None:
    """UserError where the objective needs a map that a net does not have.

    Where what the connector makes goes through the teacher's classifier, the classifier must see the mean of the
    teacher's map that is matched, and the student must answer from what its own classifier would see. Where it is
    matched and no more, a map that a net `matches_only` will do.
    """
    matches_maps = Needs.MAP_T in objective.needs
    to_match = not objective.needs & (Needs.CLASSIFIER | Needs.LOGITS_Z | Needs.ANSWER | Needs.FULL_MAP_T)
    if Needs.FULL_MAP_T in objective.needs and teacher is not None:
        use = f"the losses at its positions ({objective.parts_with(Needs.FULL_MAP_T)})"
        remedy = "--objective kd (logits of the pooled vector alone)"
        teacher.require_map(role="teacher", use=use, remedy=remedy)
        if Needs.MAP_S in objective.needs:
            student.require_map(role="student", use=use, remedy=remedy)
    if matches_maps and Needs.POOLED_T in objective.needs:  # its mean is compared with what the classifier sees
        to_match = False
    if matches_maps and teacher is not None:
        with_vectors = "" if student.has_map else " --connector linear"
        remedy = f"--objective ijckd-pooled{with_vectors} (pooled vectors instead of maps)"
        teacher.require_map(to_match=to_match, role="teacher", remedy=remedy)
    if objective.connector is not None and takes_map(objective.connector):
        match = "--match pooled " if matches_maps else ""
        remedy = f"{match}--connector linear (its pooled vector instead of its map)"
        student.require_map(to_match=to_match, role="student", remedy=remedy)
