"""Simple recipe distillation (SRD), Miles & Mikolajczyk 2024: the logarithm of a distance of normalised features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ijckd_fast.distill.terms.term import NOTHING, Needs, Nets, Seen, Term, Value, weight
from ijckd_fast.setting import setting

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Srd(Term):
    """srd 2 log sum_{B,Ct} |BN(z) - BN(pooled_t)|^srd_power, z what the connector (the authors': linear) makes.

    BN: BatchNorm over the batch without parameters, eps 1e-4, of each side its own; over the batches of all processes
    with --sync-bn. The sum is over the images of all processes in any case.
    """

    parts = ("srd",)

    srd: float = weight("SRD, the log of the distance of features normalised over the batch; not with --accumulate")
    srd_power: float = setting(4.0, "power of SRD's differences", least=1, finite=True)

    @property
    def needs(self) -> Needs:
        return Needs.CONNECTED | Needs.POOLED_T | Needs.WHOLE_BATCH if self.srd > 0 else NOTHING

    def build(self, nets: Nets) -> Mapping[str, nn.Module]:
        from torch import nn

        assert nets.teacher is not None
        # modules, so that --sync-bn finds them; they have neither parameters nor buffers
        norms = [nn.BatchNorm1d(nets.teacher.channels, 1e-4, affine=False, track_running_stats=False) for _ in range(2)]
        return {"srd_norms": nn.ModuleList(norms)}

    def value(self, seen: Seen) -> Value:
        import torch

        from ijckd_fast.parallel import sum_over

        norms = seen.modules["srd_norms"]
        assert isinstance(norms, torch.nn.ModuleList)
        assert seen.z is not None
        assert seen.pooled_t is not None
        difference = norms[0](seen.z) - norms[1](seen.pooled_t.to(seen.z.dtype))  # [B, Ct]
        total = sum_over(difference.abs().pow(self.srd_power).sum(), seen.group)
        srd = 2 * total.clamp_min(torch.finfo(total.dtype).tiny).log()  # no gradient, not NaN, where nothing is left
        return Value(self.srd * srd, {"srd": srd.detach()})
