"""Feature matching: the student's connected features against the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ijckd_fast.distill.terms.term import NOTHING, Needs, Seen, Term, Value, weight
from ijckd_fast.setting import setting


@dataclass(frozen=True, kw_only=True)
class FeatureMatching:
    """Settings of the feature matching."""

    fm: float = weight("the feature matching, mean over all elements")
    match: Literal["map", "pooled", "none"] = setting("none", "features to match")


@dataclass(frozen=True, kw_only=True)
class FeatureMatch(FeatureMatching, Term):
    """fm mean_{B,Ct,H,W}(Z - map_t)^2 (match 'map') or fm mean_{B,Ct}(z - pooled_t)^2 (match 'pooled').

    The connector's op computes it with z; or the loss's op, where that has the connector's projection.
    """

    parts = ("fm",)
    takes_unprojected = True  # ThroughTeacher's op has it then

    @property
    def needs(self) -> Needs:
        if self.fm == 0:
            return NOTHING
        return Needs.CONNECTED | (Needs.MAP_T if self.match == "map" else Needs.POOLED_T | Needs.MATCH_POOLED)

    def fault(self) -> str | None:
        if self.fm > 0 and self.match == "none":
            return f"feature matching (fm = {self.fm}) needs match 'map' or 'pooled'; set match, or fm to 0"
        return None

    def value(self, seen: Seen) -> Value | None:
        return None if seen.fm is None else Value(self.fm * seen.fm, {"fm": seen.fm.detach()})
