"""Hard distillation: the teacher's first class as the label (DeiT, Touvron et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from ijckd_fast.distill.terms.term import NOTHING, Classifier, Needs, Seen, Term, Value, logits_of, weight
from ijckd_fast.setting import setting


@dataclass(frozen=True, kw_only=True)
class HardAnswers:
    """Settings of the hard term, whichever classifier it goes through."""

    hard: float = weight("the cross-entropy with the teacher's first class as the label")
    hard_head: Classifier = setting("student", "classifier the hard term goes through")

    def hard_through(self, classifier: Classifier) -> float:
        """The weight of the hard term through that classifier."""
        return self.hard if self.hard_head == classifier else 0.0


@dataclass(frozen=True, kw_only=True)
class Hard(HardAnswers, Term):
    """hard CE(logits, argmax logits_t), nats, mean over B, of the student's own classifier.

    Without label smoothing. Of a mixed image the label is the teacher's answer to the mixture, so there is one.
    """

    parts = ("hard",)

    @property
    def needs(self) -> Needs:
        return logits_of("student") if self.hard_through("student") > 0 else NOTHING

    def value(self, seen: Seen) -> Value:
        import torch.nn.functional as F

        logits, logits_t = seen.pair("student")
        hard = F.cross_entropy(logits, logits_t.argmax(1))
        return Value(self.hard * hard, {"hard": hard.detach()})
