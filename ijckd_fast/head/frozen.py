"""What `classifier_loss` takes of a frozen classifier on a GPU besides its weight."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ijckd_fast.head.dispatch import autocast_dtype

# Of G scaled to a diagonal of 1: the lower quartile of its eigenvalues from which the two bfloat16 parts of G serve.
# They leave 2^-17 of sum d_i^2 G_ii out, so at most about a thousandth of |W d|^2 where d lies in no smaller ones.
_LEAST_QUARTILE = 2**-7


def classifier_gram(weight: Tensor) -> Tensor:
    """G = weight^T weight of a frozen classifier, as `classifier_loss` takes it on a GPU: |W d|^2 = d^T G d.

    Its rounding errors are of the size of W's largest directions: where a difference d avoids these (one class's row or
    all rows' common vector far larger than the rest, fewer classes than channels), d^T G d keeps fewer digits than W d.
    `FrozenClassifier` looks whether W is such a one and does without G then; whoever calls this has to know.

    weight    [K, Ct], any floating dtype; summed in float64, 4096 classes at a time
    returns   [2, Ct, Ct] bfloat16: G rounded, and what the rounding left out
    """
    return _in_two_parts(_gram(weight))


@torch.no_grad()
def _gram(weight: Tensor) -> Tensor:
    """weight^T weight [Ct, Ct], float64."""
    g = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in weight.detach().split(4096):  # [<= 4096, Ct]
        g.addmm_(rows.double().T, rows.double())
    return g


def _in_two_parts(g: Tensor) -> Tensor:
    high = g.bfloat16()
    return torch.stack([high, (g - high.double()).bfloat16()])


def _keeps_digits(g: Tensor) -> bool:
    """Whether d^T G d does, but for a d in the few directions that W sees least. Waits for the device."""
    if not g.isfinite().all():
        return False
    size = g.diagonal()  # 0 of a channel that no class looks at, which does no harm
    scale = torch.where(size > 0, size, 1).rsqrt()
    scaled = g * scale * scale[:, None]
    scaled.diagonal().copy_(torch.ones_like(size))
    return bool(torch.linalg.eigvalsh(scaled)[len(size) // 4] > _LEAST_QUARTILE)


class _Kept(NamedTuple):
    """A gram, and what tells whether it is still that of a weight."""

    gram: Tensor | None  # None where it would lose digits
    rounded: Tensor  # [K, Ct] the weight that it was made of, a copy
    source: Tensor  # the weight itself; kept, so that no other can come to lie at its address
    place: tuple[object, ...]  # of the weight, with its version
    unchanged: Tensor  # [] bool in host memory: what the device last found


def _place(weight: Tensor) -> tuple[object, ...]:
    version = None if weight.is_inference() else weight._version  # torch counts no versions of inference tensors
    return weight.data_ptr(), weight.device, weight.dtype, weight.shape, weight.stride(), version


def _same_bits(a: Tensor, b: Tensor) -> Tensor:
    """[] bool, on the device; NaN is itself, and 0 is not -0."""
    return (a.view(torch.int16) == b.view(torch.int16)).all()


class FrozenClassifier:
    """A frozen classifier as `classifier_loss` takes it on a GPU under autocast: its weight rounded, and its gram.

    In every call the weight's content is what counts, whatever changed it (an optimizer, `load_state_dict`, `.data`,
    memory that numpy shares, `set_`), wherever it lies and in whatever layout. The rounded weight is made again in
    every call, as autocast itself would. The gram is made once for each content, which is compared with a copy in every
    call: one pass over the rounded weight, 4 small launches on a GPU.

    On a CPU the comparison is exact and at once. On a GPU no call waits for it. A change that torch's version counter
    shows, or that moved the weight, is seen at once. Of any other (`.data`, an inference tensor, another library's
    kernel) the device finds out first: the gram is NaN, and with it the loss, never that of the old weight, until the
    answer has come to the host, by which the next call makes another. The host waits only where a gram is made, to
    decide whether it would keep its digits (`classifier_gram`). A CUDA graph takes the gram that was
    made before its capture, or none; it compares in every replay.

    Copies (`copy.deepcopy`, pickle) begin without a gram. Several threads may share one, whatever their weights and
    autocast dtypes; they then make each other's grams again. Under `torch.compile` there is no gram, which costs time
    alone.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self._captured: list[_Kept] = []  # what CUDA graphs read in every replay

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": None, "_captured": []}

    def prepared(self, weight: Tensor, *, match: bool) -> tuple[Tensor, Tensor | None]:
        """(weight in autocast's dtype, its gram or None) for `classifier_loss`.

        weight  [K, Ct], taken without its gradient
        match   whether the loss has a logit match, for which the gram is made where it can be the cheaper way
                (bfloat16; 3 Ct < K, or channels so few that its products take less time than a pass over whole rows of
                logits) and keeps its digits
        raises  RuntimeError where weight is no matrix
        """
        if weight.dim() != 2:
            raise RuntimeError(f"FrozenClassifier: weight must be [K, Ct], got {list(weight.shape)}")
        weight = weight.detach()
        dtype = autocast_dtype(weight) or weight.dtype
        rounded = weight.to(dtype)
        K, Ct = weight.shape
        gram_pays = match and dtype == torch.bfloat16 and (3 * Ct < K or Ct <= 1024)
        if not gram_pays or torch.compiler.is_compiling() or weight.device.type not in ("cpu", "cuda"):
            return rounded, None
        with torch.inference_mode(False), torch.no_grad():  # what is kept may be used outside inference mode
            return rounded, self._gram_of(weight, rounded)

    def _gram_of(self, weight: Tensor, rounded: Tensor) -> Tensor | None:
        at_once = _host_sees(weight)
        kept = self._kept  # another thread may put its own there
        fits = kept is not None and _still(kept, weight, rounded, at_once)
        capturing = not at_once and torch.cuda.is_current_stream_capturing()
        if not fits:
            if capturing:
                return None
            self._kept = kept = _made_of(weight, rounded)
        assert kept is not None
        if at_once or kept.gram is None:
            return kept.gram
        same = _same_bits(kept.rounded, rounded)
        if capturing:
            self._captured.append(kept)
        else:
            kept.unchanged.copy_(same, non_blocking=True)
        return torch.where(same, kept.gram, float("nan"))


def _host_sees(weight: Tensor) -> bool:
    """Whether the host can look at the weight without waiting."""
    return weight.device.type == "cpu"


def _still(kept: _Kept, weight: Tensor, rounded: Tensor, at_once: bool) -> bool:
    """Whether what is kept is of this weight, as far as the host can know now."""
    if at_once:
        return (
            kept.rounded.shape == rounded.shape
            and kept.rounded.device == rounded.device
            and bool(_same_bits(kept.rounded, rounded))
        )
    return kept.place == _place(weight) and bool(kept.unchanged)


def _made_of(weight: Tensor, rounded: Tensor) -> _Kept:
    g = _gram(rounded)
    gram = _in_two_parts(g) if _keeps_digits(g) else None
    unchanged = torch.ones((), dtype=torch.bool, pin_memory=weight.is_cuda)
    return _Kept(gram, rounded.clone(), weight, _place(weight), unchanged)
