"""Feature matching: the student's connected features against the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ijckd_fast.distill.terms.term import NOTHING, Needs, Seen, Term, Value, weight
from ijckd_fast.setting import setting

if TYPE_CHECKING:
    from torch import Tensor

Distance = Literal["mse", "cosine", "smooth-l1"]


@dataclass(frozen=True, kw_only=True)
class FeatureMatching:
    """Settings of the feature matching."""

    fm: float = weight("the feature matching, mean over all elements")
    match: Literal["map", "pooled", "none"] = setting("none", "features to match")
    match_distance: Distance = setting(
        "mse",
        "distance of the matched features: mean square (in the fused op), 1 - cosine of an image's vectors (of every"
        " position, of maps), or Huber's with threshold 1; the last two in plain PyTorch",
    )

    @property
    def fm_fused(self) -> float:
        """The weight of the feature matching where the connector's op, or the loss's, has it."""
        return self.fm if self.match_distance == "mse" else 0.0


@dataclass(frozen=True, kw_only=True)
class FeatureMatch(FeatureMatching, Term):
    """fm times the distance of Z and map_t (match 'map') or of z and pooled_t (match 'pooled'), see `distance`.

    The connector's op computes a mean square with z; or the loss's op, where that has the connector's projection. Where
    another term needs Z, the connector is plain PyTorch, and so is the distance.
    """

    parts = ("fm",)

    @property
    def takes_unprojected(self) -> bool:
        return self.match_distance == "mse"  # ThroughTeacher's op has it then

    @property
    def needs(self) -> Needs:
        if self.fm == 0:
            return NOTHING
        fused = self.fm_fused > 0
        if self.match == "map":
            return Needs.CONNECTED | Needs.MAP_T | (NOTHING if fused else Needs.MAP_Z)
        return Needs.CONNECTED | Needs.POOLED_T | (Needs.MATCH_POOLED if fused else NOTHING)

    def fault(self) -> str | None:
        if self.fm > 0 and self.match == "none":
            return f"feature matching (fm = {self.fm}) needs match 'map' or 'pooled'; set match, or fm to 0"
        if self.fm == 0 and self.match_distance != "mse":
            return (
                f"match_distance {self.match_distance!r} is of the feature matching, expected fm above 0, got 0: set"
                " fm, or leave match_distance out"
            )
        return None

    def value(self, seen: Seen) -> Value | None:
        from ijckd_fast.distill.comparable import equal_sizes, full

        fm: Tensor | None
        if self.fm_fused > 0 and seen.map_z is None:
            fm = seen.fm
        elif self.match == "map":
            assert seen.map_z is not None
            assert seen.map_t is not None
            fm = distance(*equal_sizes(seen.map_z, full(seen.map_t)), self.match_distance)
        else:
            assert seen.z is not None
            assert seen.pooled_t is not None
            fm = distance(seen.z, seen.pooled_t.to(seen.z.dtype), self.match_distance)
        return None if fm is None else Value(self.fm * fm, {"fm": fm.detach()})


def distance(features: Tensor, features_t: Tensor, kind: Distance) -> Tensor:
    """Of features [B, C] or [B, C, H, W] to the teacher's: []; only the former get a gradient.

    'mse'        mean of (f - f_t)^2 over all elements
    'cosine'     mean of 1 - cos(f, f_t) over images and positions, of their vectors [C]; 1 where one of them is 0
    'smooth-l1'  mean over all elements of d^2 / 2 below |d| = 1 and |d| - 1/2 above, d = f - f_t
    """
    import torch.nn.functional as F

    if kind == "cosine":
        return (1 - F.cosine_similarity(features, features_t, 1)).mean()
    return F.smooth_l1_loss(features, features_t) if kind == "smooth-l1" else F.mse_loss(features, features_t)
