"""Decoupled knowledge distillation (DKD), Zhao et al. 2022."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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

WarmUpBy = Literal["epoch", "step"]


@dataclass(frozen=True, kw_only=True)
class Dkd(Temperature, StandardizedLogits, Term):
    """warm-up (alpha TCKD + beta NCKD), see `dkd_rows`, nats, mean over B.

    The warm-up's factor is min(1, e / dkd_warmup), e the epoch, counted from 1, as in the authors' code; or, by step,
    the epochs done so far, fractions included. The term's part in the log is without it.
    """

    parts = ("dkd",)

    dkd_alpha: float = weight("DKD's target-class term")
    dkd_beta: float = weight("DKD's other-classes term")
    dkd_warmup: float = setting(20.0, "epochs in which both DKD weights rise to their full size", least=0, finite=True)
    dkd_warmup_by: WarmUpBy = setting(
        "epoch",
        "how they rise: with every epoch, from 1 / dkd_warmup in the first (epoch), or with every step from 0",
    )

    dkd_head: Classifier = setting("student", "classifier the DKD term goes through")

    @property
    def needs(self) -> Needs:
        if self.dkd_alpha == 0 and self.dkd_beta == 0:
            return NOTHING
        return logits_of(self.dkd_head) | (Needs.PROGRESS if self.dkd_warmup > 0 else NOTHING)

    def factor(self, progress: float | Tensor | None) -> float | Tensor:
        """The warm-up's, from `progress`, the epochs done so far, fractions included (a tensor [] gives one)."""
        return warm_up(progress, self.dkd_warmup, self.dkd_warmup_by)

    def value(self, seen: Seen) -> Value:
        logits, logits_t = self.scaled(*seen.pair(self.dkd_head))
        weights = self.dkd_alpha, self.dkd_beta, self.temperature
        dkd = seen.mixed(lambda y: dkd_rows(logits, logits_t, y, *weights))
        return Value(scaled_by(self.factor(seen.progress), dkd), {"dkd": dkd.detach()})


def warm_up(progress: float | Tensor | None, epochs: float, by: WarmUpBy) -> float | Tensor:
    """The factor with which a weight rises to its full size, in [0, 1].

    progress  the epochs done so far, fractions included, a number or a tensor [], which gives one
    epochs    in which it rises; 0: it has its full size from the first step
    by        'epoch': e / epochs in epoch e, counted from 1; 'step': progress / epochs
    """
    import torch

    if epochs == 0:
        return 1.0
    assert progress is not None
    if by == "epoch":  # its number, from 1
        progress = (progress.floor() if isinstance(progress, torch.Tensor) else math.floor(progress)) + 1
    done = progress / epochs
    return done.clamp(max=1.0) if isinstance(done, torch.Tensor) else min(done, 1.0)


def scaled_by(factor: float | Tensor, loss: Tensor) -> Tensor:
    """factor loss, in the loss's dtype: the clock's own, of a tensor, must not widen it."""
    import torch

    return (factor.to(loss.dtype) if isinstance(factor, torch.Tensor) else factor) * loss


def dkd_rows(logits: Tensor, logits_t: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD) of every row.

    logits, logits_t  [B, K]; only logits gets a gradient
    labels            [B] int64
    returns           [B] nats. TCKD is the KL between (p_y, 1 - p_y) of teacher and student, NCKD the KL between their
                      distributions over the K - 1 other classes, all at temperature T.
    """
    import torch
    import torch.nn.functional as F

    column = labels[:, None]

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(x / temperature, 1)  # [B, K]
        others = without_class(x / temperature, labels)  # [B, K]
        # log(1 - p_y) as a sum over the other classes: 1 - p_y itself is lost to rounding for a confident row.
        log_rest = others.logsumexp(1, keepdim=True) - (x / temperature).logsumexp(1, keepdim=True)
        return torch.cat([log_p.gather(1, column), log_rest], 1), F.log_softmax(others, 1)  # [B, 2], [B, K]

    target_s, others_s = split(logits)
    target_t, others_t = split(logits_t)
    tckd = F.kl_div(target_s, target_t, reduction="none", log_target=True).sum(1)
    nckd = F.kl_div(others_s, others_t, reduction="none", log_target=True).sum(1)
    return temperature**2 * (alpha * tckd + beta * nckd)
