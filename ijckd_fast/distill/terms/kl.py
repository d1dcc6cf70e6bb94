"""Hinton's distillation: the teacher's softened answers as labels."""

from __future__ import annotations

from dataclasses import dataclass

from ijckd_fast.distill.terms.term import (
    NOTHING,
    Classifier,
    Needs,
    Seen,
    StandardizedLogits,
    Temperature,
    Term,
    Value,
    kl_rows,
    logits_of,
    weight,
)
from ijckd_fast.setting import setting


@dataclass(frozen=True, kw_only=True)
class SoftLabels(Temperature, StandardizedLogits):
    """Settings of the KL term, whichever classifier it goes through."""

    kl: float = weight("T^2 KL(teacher || student)")
    kl_head: Classifier = setting("student", "classifier the KL term goes through")

    def kl_through(self, classifier: Classifier) -> float:
        """The weight of the KL term through that classifier."""
        return self.kl if self.kl_head == classifier else 0.0


@dataclass(frozen=True, kw_only=True)
class Kl(SoftLabels, Term):
    """kl T^2 KL(softmax(logits_t / T) || softmax(logits / T)), nats, mean over B, of the student's own classifier."""

    parts = ("kl",)

    @property
    def needs(self) -> Needs:
        return logits_of("student") if self.kl_through("student") > 0 else NOTHING

    def value(self, seen: Seen) -> Value:
        logits, logits_t = self.scaled(*seen.pair("student"))
        kl = self.temperature**2 * kl_rows(logits, logits_t, self.temperature).mean()
        return Value(self.kl * kl, {"kl": kl.detach()})
