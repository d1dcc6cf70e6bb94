"""Student and teacher on the same images: what the bound on the student's error is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ijckd_fast.distill.comparable import full, pool_to, smaller
from ijckd_fast.distill.terms import Needs
from ijckd_fast.errors import UserError
from ijckd_fast.nets import Tapped

if TYPE_CHECKING:
    from ijckd_fast.distill.distiller import Distiller


class Compared(NamedTuple):
    """What student and teacher make of the same images.

    logits      [B, K] of the objective's inference head, bit for bit what `Distiller.predict` returns
    own_logits  [B, K] of the student's own classifier; None where the objective does not train it
    z           [B, Ct] the student's connected and pooled features
    pooled_t    [B, Ct] the teacher's
    map_mse     [B] mean square difference of the maps behind them; None where connector or teacher has no map
    """

    logits: Tensor
    own_logits: Tensor | None
    z: Tensor
    pooled_t: Tensor
    map_mse: Tensor | None


@torch.no_grad()
def compare(distiller: Distiller, images: Tensor) -> Compared:
    """Contract: `Distiller.compare`.

    Maps of unequal size are compared by SimKD's rule, the larger one average-pooled to the smaller: where the objective
    matches maps the student's before the connector, as in training, else what the connector makes of it.
    """
    connector, student, objective = distiller.connector, distiller.student, distiller.objective
    teacher = None if distiller.teacher is None else distiller.frozen_teacher()
    if connector is None or not isinstance(teacher, Tapped):
        lacks = "connector" if connector is None else "teacher's backbone, only a cache of its features"
        raise UserError(
            f"objective {objective.name!r} has no {lacks}: wanted both, to compare features with the teacher's"
        )
    if Needs.MAP_T in objective.needs and teacher.matches_only:
        raise UserError(
            f"objective {objective.name!r} matches a map of teacher {teacher.name!r} whose mean is not what its"
            " classifier sees, expected one whose mean it is, to compare features with: train with pooled matching"
            " (--match pooled), or with another teacher"
        )
    if distiller.training:
        raise RuntimeError("Distiller.compare: the distiller is in training mode, call eval() first")
    map_t, pooled_t = teacher.features(images, connector.takes_map and teacher.has_map)  # [B, Ct, Ht, Wt], [B, Ct]
    map_s, pooled_s = student.features(images, connector.takes_map)  # [B, Cs, Hs, Ws], [B, Cs]
    x = pooled_s if map_s is None else map_s
    if map_s is not None and map_t is not None and Needs.MAP_T in objective.needs:
        x = pool_to(map_s, smaller(map_s.shape[2:], map_t.shape[2:]))
    z, _ = connector(x, head=distiller.head)  # [B, Ct]
    map_mse = None
    if map_t is not None:
        connected = connector.connected_map(x)  # [B, Ct, H, W]
        size = smaller(connected.shape[2:], map_t.shape[2:])
        map_mse = (pool_to(connected, size) - pool_to(map_t, size)).square().mean((1, 2, 3))
    own_logits = None if student.classifier is None else full(student.classifier(pooled_s))
    if objective.infer_head == "student":
        assert own_logits is not None
        return Compared(own_logits, own_logits, z, pooled_t, map_mse)
    return Compared(full(distiller.classifier_t(z)), own_logits, z, pooled_t, map_mse)
