"""Hard distillation: the teacher's first class as the label (DeiT, Touvron et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from ijckd_fast.distill.terms.term import NOTHING, Classifier, Needs, Seen, Term, Value, logits_of, weight
from ijckd_fast.setting import setting


@dataclass(frozen=True, kw_only=True)
class Hard(Term):
    """hard CE(logits, argmax logits_t), nats, mean over B.

    Without label smoothing. Of a mixed image the label is the teacher's answer to the mixture, so there is one.
    """

    parts = ("hard",)

    hard: float = weight("the cross-entropy with the teacher's first class as the label")
    hard_head: Classifier = setting("student", "classifier the hard term goes through")

    @property
    def needs(self) -> Needs:
        return logits_of(self.hard_head) if self.hard > 0 else NOTHING

    def value(self, seen: Seen) -> Value:
        import torch.nn.functional as F

        logits, logits_t = seen.pair(self.hard_head)
        hard = F.cross_entropy(logits, logits_t.argmax(1))
        return Value(self.hard * hard, {"hard": hard.detach()})
