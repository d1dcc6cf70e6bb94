"""Attention transfer, Zagoruyko & Komodakis 2017."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ijckd_fast.distill.terms.term import NOTHING, Needs, Seen, Term, Value, weight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Attention(Term):
    """at times the sum of `attention_distance` over all stages that both nets have, counted from the last."""

    parts = ("at",)

    at: float = weight("the attention transfer, summed over the stages that both nets have")

    @property
    def needs(self) -> Needs:
        return Needs.STAGES if self.at > 0 else NOTHING

    def stages(self, common: int, nets: str) -> Iterable[int]:
        return range(1, common + 1)

    def value(self, seen: Seen) -> Value:
        import torch

        at = torch.stack([attention_distance(map_s, map_t) for map_s, map_t in seen.stages.values()]).sum()
        return Value(self.at * at, {"at": at.detach()})


def attention_distance(map_s: Tensor, map_t: Tensor) -> Tensor:
    """Attention transfer of one stage, as CRD's and SimKD's toolboxes compute it: mean_{B,HW}(a_s - a_t)^2.

    map_s    [B, Cs, H, W]
    map_t    [B, Ct, H, W]; gets no gradient where it requires none
    returns  [], float32 or, for float64 input, float64. a = v / ||v||_2 for each image, v [B, HW] the mean over the
             channels of the squares; of a map that is 0 everywhere a is 0.
    """

    import torch.nn.functional as F

    from ijckd_fast.distill.comparable import full

    def attention(map_: Tensor) -> Tensor:
        return F.normalize(full(map_).square().mean(1).flatten(1))  # [B, HW]

    return (attention(map_s) - attention(map_t)).square().mean()
