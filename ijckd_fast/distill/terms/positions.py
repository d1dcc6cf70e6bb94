"""What terms at the pooled positions of both nets' last maps share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ijckd_fast.distill.terms.term import Classifier, Needs, Seen

if TYPE_CHECKING:
    from torch import Tensor, nn


def positions_of(classifier: Classifier) -> Needs:
    """What a term at positions needs: a map of the student's that `classifier` takes, and the teacher's own map.

    Through the teacher's classifier the connected map Z; through the student's own its own map, and a loss that trains
    that classifier, which the term has to say (OWN_LOGITS, or CLASS_MAPS_S for one that leaves the bias alone).
    """
    student = Needs.MAP_S if classifier == "student" else Needs.CONNECTED | Needs.MAP_Z
    return student | Needs.FULL_MAP_T


def pooled_to_teacher(seen: Seen, scales: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(Z, the teacher's map) at the positions of `pooled_positions`: [B, P, Ct] each; Z takes a gradient."""
    assert seen.map_z is not None
    assert seen.map_t is not None
    return _pooled(seen, seen.map_z, scales), _pooled(seen, seen.map_t, scales)


def answers_at_positions(seen: Seen, scales: Sequence[int], *, with_bias: bool = True) -> tuple[Tensor, Tensor]:
    """Each net's own classifier at the positions of its own map: [B, P, K] each, float32 (float64).

    The student's gets a gradient, in its map and in its classifier. with_bias: False for class maps.
    """
    assert seen.map_s is not None
    assert seen.map_t is not None
    assert seen.classifier_s is not None
    assert seen.classifier is not None
    answers_s = _answers(_pooled(seen, seen.map_s, scales), seen.classifier_s, with_bias)
    return answers_s, _answers(_pooled(seen, seen.map_t, scales), seen.classifier, with_bias)


def _pooled(seen: Seen, map_: Tensor, scales: Sequence[int]) -> Tensor:
    from ijckd_fast.distill.heads import ops_of

    pooled: Tensor = ops_of(seen.head).pooled_positions(map_, scales)  # [B, P, C]
    return pooled


def _answers(x: Tensor, classifier: nn.Linear, with_bias: bool) -> Tensor:
    """[B, P, C] -> [B, P, K]"""
    import torch.nn.functional as F

    from ijckd_fast.distill.comparable import full

    bias = classifier.bias if with_bias else None
    return full(F.linear(x.to(classifier.weight.dtype), classifier.weight, bias))
