"""Hard-label cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass

from ijckd_fast.distill.terms.term import NOTHING, Classifier, Needs, Seen, Term, Value, weight
from ijckd_fast.setting import setting


@dataclass(frozen=True, kw_only=True)
class HardLabels:
    """Settings of the cross-entropy, whichever classifier it goes through."""

    ce: float = weight("the hard-label cross-entropy")
    ce_head: Classifier = setting("student", "classifier the cross-entropy goes through")

    def ce_through(self, classifier: Classifier) -> float:
        """The weight of the cross-entropy through that classifier."""
        return self.ce if self.ce_head == classifier else 0.0


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(HardLabels, Term):
    """ce CE(logits, labels), nats, mean over B, of the student's own classifier."""

    parts = ("ce",)

    @property
    def needs(self) -> Needs:
        return Needs.OWN_LOGITS if self.ce_through("student") > 0 else NOTHING

    def value(self, seen: Seen) -> Value:
        import torch.nn.functional as F

        logits, smoothing = seen.logits, seen.label_smoothing
        assert logits is not None
        ce = seen.mixed(lambda y: F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing))
        return Value(self.ce * ce, {"ce": ce.detach()})
