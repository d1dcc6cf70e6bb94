"""Scale decoupled distillation (SDD), Wei et al. 2024: KD and DKD at the pooled positions of the last map."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ijckd_fast.distill.heads import ops_of
from ijckd_fast.distill.terms.dkd import WarmUpBy, dkd_rows, scaled_by, warm_up
from ijckd_fast.distill.terms.positions import answers_at_positions, pooled_to_teacher, positions_of
from ijckd_fast.distill.terms.term import (
    NOTHING,
    Classifier,
    Needs,
    Seen,
    Temperature,
    Term,
    Value,
    kl_rows,
    weight,
)
from ijckd_fast.setting import setting

if TYPE_CHECKING:
    from torch import Tensor

    # of the weights kl, dkd_alpha and dkd_beta, as `class_map_loss` has them: the weighted mean over images and
    # positions, []
    Distance = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Sdd(Temperature, Term):
    """sdd KL + warm-up DKD(sdd_dkd_alpha, sdd_dkd_beta), nats, means over B and the P = sum of s s positions.

    Both compare the logits that a classifier gives at each position of the last map, pooled to s x s for each scale s.
    A position at which the teacher's first class is the label counts twice where over the whole map (scale 1) it is
    not, and the other way round. The warm-up is DKD's; the terms' parts in the log are without it.
    """

    parts = ("sdd", "sdd_dkd")

    sdd: float = weight("SDD's T^2 KL(teacher || student) at pooled positions of the last maps")
    sdd_dkd_alpha: float = weight("SDD's target-class term of DKD at these positions")
    sdd_dkd_beta: float = weight("SDD's other-classes term of DKD there")
    sdd_warmup: float = setting(20.0, "epochs in which SDD's DKD weights rise, as dkd_warmup", least=0, finite=True)
    sdd_warmup_by: WarmUpBy = setting("epoch", "how SDD's DKD weights rise, as dkd_warmup_by")
    sdd_scales: tuple[int, ...] = setting(
        (1, 2, 4),
        "sides s of SDD's pools, the map pooled to s x s for each: ascending from 1, divisors of the last (1,2,4:"
        " 21 positions)",
        least=1,
    )
    sdd_head: Classifier = setting("student", "classifier SDD goes through; the teacher's sees the connector's map")

    @property
    def with_dkd(self) -> bool:
        return self.sdd_dkd_alpha > 0 or self.sdd_dkd_beta > 0

    @property
    def needs(self) -> Needs:
        if self.sdd == 0 and not self.with_dkd:
            return NOTHING
        own = Needs.OWN_LOGITS if self.sdd_head == "student" else NOTHING
        warms_up = self.with_dkd and self.sdd_warmup > 0
        return positions_of(self.sdd_head) | own | (Needs.PROGRESS if warms_up else NOTHING)

    def fault(self) -> str | None:
        s = self.sdd_scales
        if s[:1] == (1,) and list(s) == sorted(set(s)) and not any(s[-1] % each for each in s):
            return None
        return (
            "sdd_scales must begin with 1 and ascend, and each must divide the last, got"
            f" {','.join(map(str, s)) or 'none'}: write e.g. 1,2,4"
        )

    def value(self, seen: Seen) -> Value:
        distance = self._through_student(seen) if self.sdd_head == "student" else self._through_teacher(seen)
        losses, on = [], {}
        if self.sdd > 0:
            kl = distance(kl=1.0)
            losses.append(self.sdd * kl)
            on["sdd"] = kl.detach()
        if self.with_dkd:
            dkd = distance(dkd_alpha=self.sdd_dkd_alpha, dkd_beta=self.sdd_dkd_beta)
            losses.append(scaled_by(warm_up(seen.progress, self.sdd_warmup, self.sdd_warmup_by), dkd))
            on["sdd_dkd"] = dkd.detach()
        return Value(sum(losses[1:], losses[0]), on)

    def _through_teacher(self, seen: Seen) -> Distance:
        """By the head's op."""
        assert seen.classifier is not None
        z, z_t = pooled_to_teacher(seen, self.sdd_scales)  # [B, P, Ct]
        op = functools.partial(
            ops_of(seen.head).class_map_loss,
            *(z, seen.classifier.weight, seen.classifier.bias, z_t),
            scales=self.sdd_scales,
            temperature=self.temperature,
        )

        def distance(**weights: float) -> Tensor:
            if seen.labels_b is None or seen.mix is None:
                loss: Tensor = op(seen.labels, **weights)[0]
                return loss
            loss_a, _ = op(seen.labels, share=seen.mix, **weights)
            loss_b, _ = op(seen.labels_b, share=1 - seen.mix, **weights)
            return loss_a + loss_b

        return distance

    def _through_student(self, seen: Seen) -> Distance:
        """In plain PyTorch: the student's classifier is trained."""
        answers, answers_t = answers_at_positions(seen, self.sdd_scales)  # [B, P, K]
        B, P = answers.shape[:2]
        logits, logits_t = answers.flatten(0, 1), answers_t.flatten(0, 1)  # [B P, K]
        first_t = answers_t.argmax(2)  # [B, P]

        def distance(kl: float = 0.0, dkd_alpha: float = 0.0, dkd_beta: float = 0.0) -> Tensor:
            T, rows = self.temperature, None  # [B P]
            if kl > 0:  # the same for both labels of a mixed image
                rows = kl * T**2 * kl_rows(logits, logits_t, T)

            def per_image(labels: Tensor) -> Tensor:
                right = first_t == labels[:, None]  # [B, P]
                counts = 1 + (right != right[:, :1]).to(logits.dtype)
                found = rows
                if found is None:
                    found = dkd_rows(logits, logits_t, labels.repeat_interleave(P), dkd_alpha, dkd_beta, T)
                return (counts * found.view(B, P)).mean(1)

            return seen.mixed(per_image)

        return distance
