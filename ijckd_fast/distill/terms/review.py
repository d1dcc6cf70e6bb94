"""Knowledge review (ReviewKD), Chen et al. 2021: the student's stages, fused from the deepest up, and the teacher's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ijckd_fast.distill.terms.term import NOTHING, Needs, Nets, Seen, Term, Value, weight
from ijckd_fast.setting import setting

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Review(Term):
    """review times the sum over levels of `pyramid_distance` of a fused map to the teacher's.

    Levels: what the classifiers see, as a map of one position, then the stages that both nets have, the last first.
    The fusions (`ijckd_fast.distill.fusion`) are thrown away after training.
    """

    parts = ("review",)

    review: float = weight("the knowledge review, fused maps of all stages that both nets have; plain PyTorch")
    review_width: int = setting(
        512,
        "channels of the review's fused maps, at most those that the student's classifier sees",
        least=1,
        finite=True,
    )

    @property
    def needs(self) -> Needs:
        return Needs.STAGES | Needs.POOLED_S | Needs.POOLED_T if self.review > 0 else NOTHING

    def stages(self, common: int, nets: str) -> Iterable[int]:
        return range(1, common + 1)

    def build(self, nets: Nets) -> Mapping[str, nn.Module]:
        from ijckd_fast.distill.fusion import Fusions

        assert nets.teacher is not None
        stages = [(student.channels, teacher.channels) for student, teacher in nets.pairs.values()]
        width = min(self.review_width, nets.student.channels)
        return {"fusions": Fusions([(nets.student.channels, nets.teacher.channels), *stages[::-1]], width)}

    def value(self, seen: Seen) -> Value:
        import torch

        from ijckd_fast.distill.comparable import full

        assert seen.pooled_s is not None
        assert seen.pooled_t is not None
        fusions = seen.modules["fusions"]
        assert fusions is not None
        pairs = [(seen.pooled_s[:, :, None, None], seen.pooled_t[:, :, None, None])]  # [B, C, 1, 1]
        pairs += [seen.stages[number] for number in sorted(seen.stages, reverse=True)]
        made = fusions([map_s for map_s, _ in pairs])
        distances = [pyramid_distance(full(m), full(map_t)) for m, (_, map_t) in zip(made, pairs, strict=True)]
        review = torch.stack(distances).sum()
        return Value(self.review * review, {"review": review.detach()})


def pyramid_distance(map_: Tensor, map_t: Tensor) -> Tensor:
    """Weighted mean of mean squares of maps [B, C, H, W]: whole (1), and pooled to 4 x 4, 2 x 2 and 1 x 1 (halving).

    Only the sizes below the map's own count: 1, 1/2, 1/4, 1/8 where it is larger than 4.
    """
    import torch.nn.functional as F

    share, total, shares = 1.0, F.mse_loss(map_, map_t), 1.0
    for side in (4, 2, 1):
        if side < min(map_.shape[2:]):
            share /= 2
            total = total + share * F.mse_loss(F.adaptive_avg_pool2d(map_, side), F.adaptive_avg_pool2d(map_t, side))
            shares += share
    return total / shares
