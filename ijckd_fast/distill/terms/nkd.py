"""Normalised knowledge distillation (NKD), Yang et al. 2023."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ijckd_fast.distill.terms.term import (
    NOTHING,
    Classifier,
    Needs,
    Seen,
    StandardizedLogits,
    Temperature,
    Term,
    Value,
    logits_of,
    weight,
    without_class,
)
from ijckd_fast.setting import setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Normalised(Temperature, StandardizedLogits):
    """Settings of NKD, whichever classifier it goes through."""

    nkd: float = weight("NKD")
    nkd_gamma: float = setting(
        1.5, "share of NKD's other-classes part, beside 1 for the target's", least=0, finite=True
    )
    nkd_head: Classifier = setting("student", "classifier the NKD term goes through")

    def nkd_through(self, classifier: Classifier) -> float:
        """The weight of NKD through that classifier."""
        return self.nkd if self.nkd_head == classifier else 0.0


@dataclass(frozen=True, kw_only=True)
class Nkd(Normalised, Term):
    """nkd NKD, see `nkd_rows`, nats, mean over B, of the student's own classifier."""

    parts = ("nkd",)

    @property
    def needs(self) -> Needs:
        return logits_of("student") if self.nkd_through("student") > 0 else NOTHING

    def value(self, seen: Seen) -> Value:
        logits, logits_t = self.scaled(*seen.pair("student"))
        nkd = seen.mixed(lambda y: nkd_rows(logits, logits_t, y, self.nkd_gamma, self.temperature))
        return Value(self.nkd * nkd, {"nkd": nkd.detach()})


def nkd_rows(logits: Tensor, logits_t: Tensor, labels: Tensor, gamma: float, temperature: float) -> Tensor:
    """-p_t[y] log p[y] - gamma T^2 sum_{k != y} q_t[k] log q[k] of every row.

    logits, logits_t  [B, K]; only logits gets a gradient
    labels            [B] int64
    returns           [B] nats. p are probabilities at temperature 1, q those of the K - 1 other classes at temperature
                      T, which sum to 1. Cross-entropies, not divergences: not 0 where both nets agree
    """
    import torch.nn.functional as F

    column = labels[:, None]
    target = F.softmax(logits_t, 1).gather(1, column) * F.log_softmax(logits, 1).gather(1, column)  # [B, 1]
    q_t = F.softmax(without_class(logits_t / temperature, labels), 1)  # [B, K], 0 for the label's class
    others = q_t * F.log_softmax(without_class(logits / temperature, labels), 1)
    return -target.squeeze(1) - gamma * temperature**2 * others.sum(1)
