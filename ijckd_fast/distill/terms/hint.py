"""Hints, Romero et al. 2015 (FitNets): one stage's map, matched through a regressor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ijckd_fast.distill.terms.term import NOTHING, Needs, Nets, Seen, Term, Value, weight
from ijckd_fast.errors import UserError
from ijckd_fast.setting import setting

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Hint(Term):
    """hint mean_{B,C,H,W}(r(map_s) - map_t)^2 of one stage.

    r, the regressor, is one of the connectors: a 1x1 convolution to the teacher's channels, BatchNorm, ReLU. It is
    thrown away after training.
    """

    parts = ("hint",)

    hint: float = weight("the hint, one stage's map matched through a regressor")
    hint_stage: int = setting(
        1,
        "stage of the hint, of those that both nets have, 1 the one of the largest maps",
        least=1,
        finite=True,
        remedy="1 is the stage of the largest maps",
    )

    @property
    def needs(self) -> Needs:
        return Needs.STAGES if self.hint > 0 else NOTHING

    def stages(self, common: int, nets: str) -> Iterable[int]:
        if self.hint_stage > common:
            raise UserError(
                f"hint_stage {self.hint_stage} expected, but {nets} have only {common} stages in common, counted from"
                f" the last: set hint_stage to 1 (the largest maps) to {common}"
            )
        return (self.hint_stage,)

    def build(self, nets: Nets) -> Mapping[str, nn.Module]:
        from ijckd_fast.distill.connectors import build_connector

        stage_s, stage_t = nets.pairs[self.hint_stage]
        return {"regressor": build_connector("conv1x1", stage_s.channels, stage_t.channels)}

    def value(self, seen: Seen) -> Value:
        from ijckd_fast.distill.connectors import Connector

        regressor = seen.modules["regressor"]
        assert isinstance(regressor, Connector)
        map_s, map_t = seen.stages[self.hint_stage]
        _, hint = regressor(map_s, map_t=map_t, head=seen.head)
        return Value(self.hint * hint, {"hint": hint.detach()})
