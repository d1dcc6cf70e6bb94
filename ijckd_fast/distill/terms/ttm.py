"""Transformed teacher matching, plain (TTM) and weighted (WTTM), Zheng & Yang 2024."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ijckd_fast.distill.terms.term import (
    NOTHING,
    Classifier,
    Needs,
    Seen,
    StandardizedLogits,
    Term,
    Value,
    logits_of,
    weight,
)
from ijckd_fast.setting import setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TransformedTeacher(StandardizedLogits):
    """Settings of TTM and WTTM, whichever classifier they go through."""

    ttm: float = weight("transformed teacher matching")
    wttm: float = weight("weighted transformed teacher matching, in which soft answers of the teacher count more")
    ttm_power: float = setting(
        0.2,
        "power g of the teacher's probabilities in both, 1 / T of a temperature that the student has not; 1: none",
        above=0,
        finite=True,
    )
    ttm_head: Classifier = setting("student", "classifier both go through")

    def ttm_through(self, classifier: Classifier) -> tuple[float, float]:
        """The weights of TTM and WTTM through that classifier."""
        return (self.ttm, self.wttm) if self.ttm_head == classifier else (0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Ttm(TransformedTeacher, Term):
    """ttm TTM + wttm WTTM, see `transformed_rows`, nats, mean over B, of the student's own classifier.

    Only the teacher is softened, by a power.
    """

    parts = ("ttm", "wttm")

    @property
    def needs(self) -> Needs:
        return logits_of("student") if any(self.ttm_through("student")) else NOTHING

    def value(self, seen: Seen) -> Value:
        rows, mass = transformed_rows(*self.scaled(*seen.pair("student")), self.ttm_power)
        ttm, wttm = rows.mean(), (mass * rows).mean()
        on = {"ttm": ttm.detach()} if self.ttm > 0 else {}
        on |= {"wttm": wttm.detach()} if self.wttm > 0 else {}
        return Value(self.ttm * ttm + self.wttm * wttm, on)


def transformed_rows(logits: Tensor, logits_t: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """(KL(p_t^g / U || p), U) of every row, [B] each: TTM's, and WTTM's weight, the sum U of p_t^g over the classes.

    logits, logits_t  [B, K]; only logits gets a gradient. p and p_t: softmax, both at temperature 1
    returns           nats. U is 1 for a one-hot p_t and K^(1 - g) for a uniform one, where g is below 1
    """
    import torch.nn.functional as F

    log_power = power * F.log_softmax(logits_t, 1)  # [B, K]
    log_mass = log_power.logsumexp(1, keepdim=True)  # [B, 1]
    rows = F.kl_div(F.log_softmax(logits, 1), log_power - log_mass, reduction="none", log_target=True).sum(1)
    return rows, log_mass.exp().squeeze(1)
