"""What the student's connected features give through the teacher's frozen classifier: one fused op for four losses."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ijckd_fast.distill.heads import ops_of
from ijckd_fast.distill.terms.cross_entropy import HardLabels
from ijckd_fast.distill.terms.feature_match import FeatureMatching
from ijckd_fast.distill.terms.kl import SoftLabels
from ijckd_fast.distill.terms.term import NOTHING, InferenceHead, Needs, Seen, Term, Value, weight


@dataclass(frozen=True, kw_only=True)
class LogitMatching:
    """Settings of SRRL's and IJCKD's logit matching."""

    sr: float = weight("the logit matching, mean over batch and classes")


@dataclass(frozen=True, kw_only=True)
class ThroughTeacher(InferenceHead, SoftLabels, FeatureMatching, LogitMatching, HardLabels, Term):
    """ce CE(l, labels) + sr mean_{B,K}(l - l_t)^2 + kl T^2 KL(p_t || p).

    l are the logits of z through the teacher's classifier. Where the connector works on vectors, the op has its
    projection too, and with it fm mean_{B,Ct}(z - pooled_t)^2. Where the trained student answers through the teacher's
    classifier, the op counts its right answers, with no loss if need be.
    """

    parts = ("ce", "sr", "fm", "kl")

    @property
    def takes_unprojected(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        with_teacher = self.sr > 0 or self.kl_fused > 0
        if with_teacher or self.ce_through("teacher") > 0:
            return Needs.CONNECTED | Needs.CLASSIFIER | (Needs.POOLED_T if with_teacher else NOTHING)
        return Needs.ANSWER if self.infer_head == "teacher" else NOTHING

    def value(self, seen: Seen) -> Value:
        assert seen.classifier is not None
        ce, kl = self.ce_through("teacher"), self.kl_fused
        classifier_weight, gram = seen.classifier.weight, None
        if seen.head == "fused" and classifier_weight.is_cuda:  # on a CPU the op rounds it and keeps its gram itself
            classifier_weight, gram = seen.frozen.prepared(classifier_weight, match=self.sr > 0 and kl == 0)
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
            pooled_t=seen.pooled_t if self.sr > 0 or kl > 0 or fm > 0 else None,
            temperature=self.temperature,
            ce=ce,
            sr=self.sr,
            fm=fm,
            kl=kl,
            gram=gram,
        )
        weights = (ce, self.sr, fm, kl)
        named = {name: parts[i] for i, (name, w) in enumerate(zip(self.parts, weights, strict=True)) if w > 0}
        return Value(loss, named, correct)
