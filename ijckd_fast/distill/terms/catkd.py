"""Class attention transfer (CAT-KD), Guo et al. 2023: where on the map each class is seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ijckd_fast.distill.heads import ops_of
from ijckd_fast.distill.terms.positions import answers_at_positions, pooled_to_teacher, positions_of
from ijckd_fast.distill.terms.term import NOTHING, Classifier, Needs, Seen, Term, Value, weight
from ijckd_fast.setting import setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Catkd(Term):
    """cat mean_{B,K,RR}(c - c_t)^2, c the class maps: a classifier without its bias on the last map pooled to R x R.

    Normalised: each class's map of an image, a vector of R R positions, is divided by its length, max(|c|, 1e-12).
    """

    parts = ("cat",)

    cat: float = weight("the class attention transfer, mean over batch, classes and positions")
    cat_resolution: int = setting(2, "side R of the class maps: R x R positions", least=1, finite=True)
    cat_normalize: bool = setting(
        True, "give each class's map the length 1, so that where it is high counts and not how high"
    )
    cat_head: Classifier = setting(
        "student", "classifier that makes the student's class maps; the teacher's sees the connector's map"
    )

    @property
    def needs(self) -> Needs:
        if self.cat == 0:
            return NOTHING
        return positions_of(self.cat_head) | (Needs.CLASS_MAPS_S if self.cat_head == "student" else NOTHING)

    def value(self, seen: Seen) -> Value:
        if self.cat_head == "student":
            cat = self._through_student(seen)
        elif self.cat_normalize:
            cat = self._through_teacher(seen)
        else:
            cat = self._as_logit_match(seen)
        return Value(self.cat * cat, {"cat": cat.detach()})

    def _through_student(self, seen: Seen) -> Tensor:
        """In plain PyTorch: the student's classifier is trained."""
        import torch.nn.functional as F

        c, c_t = answers_at_positions(seen, (self.cat_resolution,), with_bias=False)  # [B, RR, K]
        if self.cat_normalize:
            c, c_t = F.normalize(c, dim=1), F.normalize(c_t, dim=1)
        return F.mse_loss(c, c_t)

    def _through_teacher(self, seen: Seen) -> Tensor:
        assert seen.classifier is not None
        scales = (self.cat_resolution,)
        z, z_t = pooled_to_teacher(seen, scales)  # [B, RR, Ct]
        classifier = seen.classifier.weight, seen.classifier.bias
        cat: Tensor
        cat, _ = ops_of(seen.head).class_map_loss(z, *classifier, z_t, scales=scales, cam=1.0)
        return cat

    def _as_logit_match(self, seen: Seen) -> Tensor:
        """The op of the logit match, with positions for images: the bias is the same on both sides."""
        assert seen.classifier is not None
        z, z_t = (each.flatten(0, 1) for each in pooled_to_teacher(seen, (self.cat_resolution,)))  # [B RR, Ct]
        weight, gram = seen.prepared_classifier(match=True)
        no_labels = seen.labels.new_zeros(len(z))
        cat: Tensor
        cat, _, _ = ops_of(seen.head).classifier_loss(
            z, weight, seen.classifier.bias, no_labels, pooled_t=z_t, ce=0.0, sr=1.0, gram=gram
        )
        return cat
