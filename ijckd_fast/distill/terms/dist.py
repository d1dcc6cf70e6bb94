"""Correlations instead of equal answers (DIST), Huang et al. 2022."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ijckd_fast.distill.terms.term import NOTHING, Classifier, Needs, Seen, Temperature, Term, Value, logits_of, weight
from ijckd_fast.errors import UserError
from ijckd_fast.setting import setting

if TYPE_CHECKING:
    from torch import Tensor, distributed as dist


@dataclass(frozen=True, kw_only=True)
class Dist(Temperature, Term):
    """dist_inter T^2 (1 - mean_B r_rows) + dist_intra T^2 (1 - mean_K r_columns).

    r are Pearson's correlations of the probabilities at temperature T of student and teacher: of an image's over the
    classes (relations between classes), and of a class's over the images of the batch, those of all processes.
    """

    parts = ("dist_inter", "dist_intra")

    dist_inter: float = weight("DIST's correlation over the classes of an image")
    dist_intra: float = weight(
        "DIST's correlation over the images of a batch, in all processes, for each class; not with --accumulate"
    )
    dist_head: Classifier = setting("student", "classifier the DIST terms go through")

    @property
    def needs(self) -> Needs:
        if self.dist_inter == 0 and self.dist_intra == 0:
            return NOTHING
        return logits_of(self.dist_head) | (Needs.WHOLE_BATCH if self.dist_intra > 0 else NOTHING)

    def value(self, seen: Seen) -> Value:
        import torch.nn.functional as F

        logits, logits_t = seen.pair(self.dist_head)
        p, p_t = F.softmax(logits / self.temperature, 1), F.softmax(logits_t / self.temperature, 1)
        loss, on = p.new_zeros(()), {}
        if self.dist_inter > 0:
            inter = self.temperature**2 * (1 - row_correlations(p, p_t).mean())
            loss, on["dist_inter"] = loss + self.dist_inter * inter, inter.detach()
        if self.dist_intra > 0:
            if len(p) == 1 and seen.group is None:
                raise UserError(
                    "dist_intra correlates the images of a batch, expected 2 or more of them, got 1: use a larger batch"
                    " (--batch-size), or set dist_intra to 0"
                )
            intra = self.temperature**2 * (1 - column_correlations(p, p_t, seen.group).mean())
            loss, on["dist_intra"] = loss + self.dist_intra * intra, intra.detach()
        return Value(loss, on)


def row_correlations(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation of every row: [B, K], [B, K] -> [B]; 0, without a gradient, of a row that is constant."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return _correlations((x * y).sum(1), x.square().sum(1), y.square().sum(1))


def column_correlations(x: Tensor, y: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Pearson's correlation of every column over the rows of all processes of `group`: [B, K], [B, K] -> [K].

    Processes may hold different B. Each has the same result, with a gradient that counts once per process, as
    DistributedDataParallel's mean over them expects it.
    """
    import torch

    from ijckd_fast.parallel import sum_over

    K = x.shape[1]
    totals = sum_over(torch.cat([x.sum(0), y.sum(0), x.new_full((1,), len(x))]), group)  # [2 K + 1]
    x, y = x - totals[:K] / totals[-1], y - totals[K:-1] / totals[-1]
    # the means first: sums of squares would lose the variance of columns far from 0
    products = sum_over(torch.stack([(x * y).sum(0), x.square().sum(0), y.square().sum(0)]), group)  # [3, K]
    return _correlations(*products)


def _correlations(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """xy / sqrt(xx yy), of sums of products of what is centred; 0 where one of them does not vary (by 1e-8 or more)."""
    import torch

    varies = (xx > 1e-16) & (yy > 1e-16)
    scale = torch.where(varies, xx, 1.0).rsqrt() * torch.where(varies, yy, 1.0).rsqrt()
    return torch.where(varies, xy * scale, 0.0)
