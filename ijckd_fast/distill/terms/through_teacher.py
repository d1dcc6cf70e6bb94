"""What the student's connected features give through the teacher's frozen classifier: one fused op for four losses."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ijckd_fast.distill.heads import ops_of
from ijckd_fast.distill.terms.cross_entropy import HardLabels
from ijckd_fast.distill.terms.feature_match import FeatureMatching
from ijckd_fast.distill.terms.hard import HardAnswers
from ijckd_fast.distill.terms.kl import SoftLabels
from ijckd_fast.distill.terms.nkd import Normalised
from ijckd_fast.distill.terms.term import NOTHING, InferenceHead, Needs, Seen, Term, Value, weight
from ijckd_fast.distill.terms.ttm import TransformedTeacher


@dataclass(frozen=True, kw_only=True)
class LogitMatching:
    """Settings of SRRL's and IJCKD's logit matching."""

    sr: float = weight("the logit matching, mean over batch and classes")


@dataclass(frozen=True, kw_only=True)
class ThroughTeacher(
    InferenceHead,
    HardAnswers,
    TransformedTeacher,
    Normalised,
    SoftLabels,
    FeatureMatching,
    LogitMatching,
    HardLabels,
    Term,
):
    """ce CE(l, labels) + sr mean_{B,K}(l - l_t)^2 + kl T^2 KL(p_t || p), and what of `Hard`, `Ttm` and `Nkd` goes
    through the teacher's classifier.

    l are the logits of z through the teacher's classifier. Where the connector works on vectors, the op has its
    projection too, and with it fm mean_{B,Ct}(z - pooled_t)^2. Where the trained student answers through the teacher's
    classifier, the op counts its right answers, with no loss if need be.
    """

    parts = ("ce", "sr", "fm", "kl", "hard", "ttm", "wttm", "nkd")

    @property
    def takes_unprojected(self) -> bool:
        return True

    @property
    def soft(self) -> dict[str, float]:
        """The weights of what compares two rows of logits, by the fused op's names."""
        ttm, wttm = self.ttm_through("teacher")
        kl, hard, nkd = self.kl_through("teacher"), self.hard_through("teacher"), self.nkd_through("teacher")
        return {"kl": kl, "hard": hard, "ttm": ttm, "wttm": wttm, "nkd": nkd}

    @property
    def takes_standardized(self) -> bool:
        return any(weight > 0 for name, weight in self.soft.items() if name != "hard")

    @property
    def needs(self) -> Needs:
        with_teacher = self.sr > 0 or any(self.soft.values())
        if with_teacher or self.ce_through("teacher") > 0:
            return Needs.CONNECTED | Needs.CLASSIFIER | (Needs.POOLED_T if with_teacher else NOTHING)
        return Needs.ANSWER if self.infer_head == "teacher" else NOTHING

    def value(self, seen: Seen) -> Value:
        assert seen.classifier is not None
        ce, soft = self.ce_through("teacher"), self.soft
        classifier_weight, gram = seen.prepared_classifier(match=self.sr > 0 and not any(soft.values()))
        fm = 0.0
        ops = ops_of(seen.head)
        if seen.unprojected is not None:
            assert seen.connector is not None
            fm, projection = self.fm_fused, (seen.connector.weight, seen.connector.bias)
            op = functools.partial(ops.projected_classifier_loss, seen.unprojected, *projection)
        else:
            assert seen.z is not None
            # without a loss, only the count is asked for
            op = functools.partial(ops.classifier_loss, seen.z.detach() if self.needs == Needs.ANSWER else seen.z)
        loss, parts, correct = op(
            classifier_weight,
            seen.classifier.bias,
            seen.labels,
            labels_b=seen.labels_b,
            mix=seen.mix,
            label_smoothing=seen.label_smoothing,
            pooled_t=seen.pooled_t if self.sr > 0 or any(soft.values()) or fm > 0 else None,
            temperature=self.temperature,
            ce=ce,
            sr=self.sr,
            fm=fm,
            **soft,
            ttm_power=self.ttm_power,
            nkd_gamma=self.nkd_gamma,
            standardize=self.standardize_logits,
            gram=gram,
        )
        weights = (ce, self.sr, fm, *soft.values())
        named = {name: parts[i] for i, (name, w) in enumerate(zip(self.parts, weights, strict=True)) if w > 0}
        return Value(loss, named, correct)
