"""classifier_loss, alone and with a linear connector before it: contracts, shapes for the compiler (fake), gradients
(autograd).

The C++ is in csrc/classifier_loss.cpp; `reference.py` has the ops in plain PyTorch with the same signatures.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ijckd_fast.head.connector import linear_grads
from ijckd_fast.head.dispatch import (
    UNSCALED,
    Differentiable,
    accumulator,
    autocast_dtype,
    check_library,
    differentiable,
    ops,
    own_products,
    refuse_double_backward,
    refuse_kinds,
)

PARTS = ("ce", "sr", "fm", "kl", "hard", "ttm", "wttm", "nkd")  # the weights of the parts that the ops return


class LossTerms(NamedTuple):
    """The loss as the ops take it, explained by `classifier_loss`: tensors that it reads and never trains, then its
    numbers.

    csrc/loss_terms.h:LossTerms is the same, in the same order, in C++.
    """

    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    labels_b: Tensor | None
    mix: Tensor | None
    pooled_t: Tensor | None
    logits_t: Tensor | None
    gram: Tensor | None
    ce: float
    sr: float
    fm: float
    kl: float
    temperature: float
    label_smoothing: float
    hard: float
    ttm: float
    wttm: float
    nkd: float
    ttm_power: float
    nkd_gamma: float
    standardize: bool

    def packed(self) -> tuple[list[Tensor | None], list[float]]:
        """(tensors, numbers), the ops' two lists. The first ends with the last tensor that is given, the second before
        the terms that only two rows of logits give, where none is on: each costs the call as it is handed on.
        """
        fields: list[Any] = list(self)
        last = _TENSORS
        while fields[last - 1] is None:
            last -= 1
        more = self.hard or self.ttm or self.wttm or self.nkd or (self.standardize and self.kl)
        return fields[:last], fields[_TENSORS : None if more else _SOFT]


_TENSORS = LossTerms._fields.index("ce")  # how many of the fields are tensors
_SOFT = LossTerms._fields.index("hard")


def classifier_loss(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    labels_b: Tensor | None = None,
    mix: Tensor | None = None,
    label_smoothing: float = 0.0,
    pooled_t: Tensor | None = None,
    logits_t: Tensor | None = None,
    ce: float = 1.0,
    sr: float = 0.0,
    fm: float = 0.0,
    kl: float = 0.0,
    temperature: float = 4.0,
    hard: float = 0.0,
    ttm: float = 0.0,
    wttm: float = 0.0,
    nkd: float = 0.0,
    ttm_power: float = 0.2,
    nkd_gamma: float = 1.5,
    standardize: bool = False,
    gram: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's frozen classifier on the student's features, and every loss on its logits.

    logits = z weight^T + bias; logits_t as given, otherwise pooled_t weight^T + bias;
    loss = ce CE(logits, labels) + sr mean (logits - logits_t)^2 over B, K + fm mean (z - pooled_t)^2 over B, Ct
         + kl T^2 KL(softmax(logits_t / T) || softmax(logits / T))
         + hard CE(logits, argmax logits_t) + (ttm + wttm U) KL(p_t^g / U || softmax(logits)) + nkd NKD, mean over B.
    All in nats. p_t = softmax(logits_t), g = ttm_power, U = sum over k of p_t^g of the row (Zheng and Yang 2024);
    NKD = -t[y] log s[y] - nkd_gamma T^2 sum over k != y of t'[k] log s'[k], y the label, t and s the softmaxes, t' and
    s' those at T over the other classes (Yang et al. 2023), of mixed labels in their shares.
    With `standardize` kl, ttm, wttm and nkd see (logits - their row's mean) / (its standard deviation + 1e-7) of both
    (Sun et al. 2024).
    The gradient is made in the forward pass. Where pooled_t gives logits_t, logits - logits_t is weight (z - pooled_t),
    with the difference formed before any rounding, except for the KL of a row whose |z - pooled_t| is more than half of
    |pooled_t|. KL is never below 0, 0 where both rows are equal, and does not change with a constant that is added to
    all logits of a row, as far as these still hold their differences.

    z         [B, Ct], float32/bfloat16 (float16 on a GPU), or float64 with a float64 weight; the only tensor that gets
              a gradient
    weight    [K, Ct] the teacher's classifier, float64/float32/bfloat16 (float16 on a GPU); frozen: refused if it
              requires grad
    bias      [K], any floating dtype, or None
    labels    [B] int64 in [0, K)
    labels_b  [B] int64, the second labels of mixup or cutmix, with
    mix       [B] in [0, 1], any floating dtype, the share of `labels`: CE = mix CE(labels) + (1 - mix) CE(labels_b).
              On a CPU another number is refused; on a GPU, where the host would have to wait, it is taken as it is
    label_smoothing  in [0, 1], as torch's cross_entropy
    pooled_t  [B, Ct], any floating dtype; needed for fm, and for all terms but ce unless logits_t is given
    logits_t  [B, K], any floating dtype, read in float32 (float64 for float64), also under autocast; the teacher's
              logits, also where pooled_t is given, which then serves fm alone
    temperature  T > 0 and finite, of kl and nkd; ttm_power > 0 and finite; the weights and nkd_gamma are finite, too
    gram      `classifier_gram(weight)`, made once: on a GPU the logit match then costs nothing that grows with K. It
              must belong to this weight, which is not looked at; its shape, dtype and layout are. The CPU keeps its own
              and needs none

    returns   loss []; parts [8] = (CE, SR, FM, KL, HARD, TTM, WTTM, NKD) before weighting, WTTM and NKD with U and
              nkd_gamma, 0 where the weight is 0, no gradient; top1 []
              int64, the number of rows whose largest logit (the first, on a tie) is that of `labels`. loss and parts
              are float32 (float64 for float64)
    B = 0     as torch: the loss and every weighted part are NaN, the mean of nothing, and the gradient is empty
    autocast  z, pooled_t and weight are cast to the autocast dtype for the matrix products; differences and losses stay
              in float32
    raises    RuntimeError naming argument, expected and found (a label out of range: on the CPU; on a GPU its row's
              loss is NaN, since looking would make the host wait, and `take_bad_rows` reports it); where anything but z
              requires grad; on double backward
    """
    check_library(z, "classifier_loss")
    terms = LossTerms(
        weight, bias, labels, labels_b, mix, pooled_t, logits_t, gram, ce, sr, fm, kl, temperature, label_smoothing,
        hard, ttm, wttm, nkd, ttm_power, nkd_gamma, standardize,
    )  # fmt: skip
    return _loss("classifier_loss", of_features, (z,), terms, "z is", autocast_dtype(z))


def projected_classifier_loss(
    u: Tensor,
    projection: Tensor,
    projection_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    labels_b: Tensor | None = None,
    mix: Tensor | None = None,
    label_smoothing: float = 0.0,
    pooled_t: Tensor | None = None,
    logits_t: Tensor | None = None,
    ce: float = 1.0,
    sr: float = 0.0,
    fm: float = 0.0,
    kl: float = 0.0,
    temperature: float = 4.0,
    hard: float = 0.0,
    ttm: float = 0.0,
    wttm: float = 0.0,
    nkd: float = 0.0,
    ttm_power: float = 0.2,
    nkd_gamma: float = 1.5,
    standardize: bool = False,
    gram: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A linear connector on vectors and `classifier_loss` on what it makes, in one op.

    z = u projection^T + projection_bias. On a GPU of sm_80 and newer, in half types (csrc/cuda/tiled_loss.cpp):
    3 launches forward and 1 backward in bfloat16 where the classes fit one chunk, 4 and 1 with KL, float16 or few
    classes for their channels. Elsewhere what `connector_match` and `classifier_loss` do.

    u                [B, Cs], float64/float32/bfloat16 (float16 on a GPU); gets a gradient
    projection       [Ct, Cs], dtype of u; gets a gradient
    projection_bias  [Ct] or None; gets a gradient
    weight ... gram  as for `classifier_loss`, with u instead of z: float64 goes with float64
    returns          as `classifier_loss`; z is not kept
    autocast         u and projection are cast to the autocast dtype; z is float32, as is the gradient of a float32
                     projection, and the rest as for `classifier_loss`
    raises           RuntimeError as `classifier_loss`, for anything of it that requires grad, and for u and projection
                     as `connector_match`
    """
    u, projection, dtype = projected_operands(u, projection)
    terms = LossTerms(
        weight, bias, labels, labels_b, mix, pooled_t, logits_t, gram, ce, sr, fm, kl, temperature, label_smoothing,
        hard, ttm, wttm, nkd, ttm_power, nkd_gamma, standardize,
    )  # fmt: skip
    inputs = (u, projection, projection_bias)
    return _loss("projected_classifier_loss", of_projected, inputs, terms, "u and its projection are", dtype)


def projected_operands(u: Tensor, projection: Tensor) -> tuple[Tensor, Tensor, torch.dtype | None]:
    """u and projection as `projected_classifier_loss`'s op takes them, and the dtype of its products if autocast has
    one.
    """
    op = "projected_classifier_loss"
    check_library(u, op)
    if u.dim() != 2:
        raise RuntimeError(f"{op}: u must be [B, Cs], got {list(u.shape)}")
    dtype = autocast_dtype(u)
    if dtype is not None:
        u = u.to(dtype)
        if projection.dtype != torch.float32:  # which the op casts, whose gradient then is float32 without a cast
            projection = projection.to(dtype)
    return u, projection, dtype


def _loss(
    name: str,
    op: Differentiable,
    inputs: tuple[Any, ...],
    terms: LossTerms,
    trained: str,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, parts, top1) of `op`, whose matrix products are taken in `dtype`; the op itself casts, because it knows
    how much of the classifier it needs at a time.
    """
    tensors, numbers = terms.packed()
    grad = torch.is_grad_enabled()
    if grad:
        refuse_trained(name, tensors, trained)
        grad = any(getattr(x, "requires_grad", False) for x in inputs)
    with own_products(inputs[0]):
        loss, parts, top1, *_ = op.call(*inputs, tensors, numbers, grad, dtype)
    return loss, parts, top1


def refuse_trained(name: str, tensors: list[Tensor | None], trained: str) -> None:
    """Raises RuntimeError where one of LossTerms' tensors requires grad: the op would make no gradient of it."""
    for i, x in enumerate(tensors):
        if x is not None and getattr(x, "requires_grad", False):
            raise RuntimeError(
                f"{name}: {LossTerms._fields[i]} must not require grad: the classifier and the teacher are frozen "
                f"and only {trained} trained; detach it"
            )


def _fake_loss(op, inputs, tensors, Ct, grad):
    # torch takes this for a mixture of real tensors and tensors without memory, too
    refuse_kinds(op, [*inputs.items(), *zip(LossTerms._fields, tensors, strict=False)])
    like = next(iter(inputs.values()))
    acc = accumulator(like.dtype)
    dz = like.new_empty(like.shape[0] if grad else 0, Ct, dtype=acc)
    return (
        like.new_empty((), dtype=acc),
        like.new_empty(len(PARTS), dtype=acc),
        like.new_empty((), dtype=torch.int64),
        dz,
    )


@torch.library.register_fake("ijckd::classifier_loss")
def _(z, tensors, numbers, grad, dtype):
    return _fake_loss("classifier_loss", {"z": z}, tensors, z.shape[1], grad)


@torch.library.register_fake("ijckd::projected_classifier_loss")
def _(u, projection, projection_bias, tensors, numbers, grad, dtype):
    inputs = {"u": u, "projection": projection, "projection_bias": projection_bias}
    loss, parts, top1, dz = _fake_loss("projected_classifier_loss", inputs, tensors, projection.shape[0], grad)
    dz_t = dz.shape if grad and u.is_cuda and u.dtype == torch.bfloat16 else 0
    cast = projection.shape if grad and projection.dtype != u.dtype else 0
    return loss, parts, top1, dz, u.new_empty(dz_t), u.new_empty(cast)


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[3])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_loss, *_):
    refuse_double_backward("classifier_loss")
    if grad_loss is None:
        return (None,)
    (dz,) = ctx.saved_tensors
    # scaled on the device: asking whether grad_loss is 1 would make the host wait
    scaled = dz if grad_loss is UNSCALED else dz * grad_loss
    return (scaled if scaled.dtype == ctx.dtype else scaled.to(ctx.dtype),)


of_features = differentiable(
    ops.classifier_loss.default, _setup, _backward, trained=1, results=3, listed=LossTerms._fields[:_TENSORS]
)


def _projected_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    u, projection, projection_bias, *_ = inputs
    *_, dz, dz_t, projection_t = output
    ctx.wide = projection.dtype != u.dtype
    ctx.save_for_backward(u, projection_t if ctx.wide else projection, projection_bias, dz, dz_t)
    ctx.mark_non_differentiable(*output[1:])


def _projected_backward(ctx, grad_loss, *_):
    refuse_double_backward("projected_classifier_loss")
    if grad_loss is None:
        return None, None, None
    if grad_loss is UNSCALED:
        grad_loss = None
    u, projection, projection_bias, dz, dz_t = ctx.saved_tensors
    rounded = dz_t if dz_t.numel() else None
    match = (None, None, None)
    return linear_grads(
        ctx.needs_input_grad, dz, grad_loss, match, u, projection, projection_bias, rounded, wide=ctx.wide
    )


of_projected = differentiable(
    ops.projected_classifier_loss.default,
    _projected_setup,
    _projected_backward,
    trained=3,
    results=3,
    listed=LossTerms._fields[:_TENSORS],
)


class BadRows(NamedTuple):
    """How many rows `classifier_loss` could not serve as asked.

    labels     with a label outside [0, K): their loss is NaN
    saturated  with a logit so far above the label's that the softmax left the range of its format: their loss and
               gradient are finite, but too small
    """

    labels: int
    saturated: int


def take_bad_rows(device: torch.device | str | int) -> BadRows:
    """Rows that `classifier_loss` could not serve on `device` since the last call; the count begins again.

    Waits for the device: call it where the program waits anyway, such as where it logs. On a CPU all are 0: there a
    label out of range is an error at once, and no softmax saturates.
    """
    like = torch.empty(0, device=device)
    check_library(like, "take_bad_rows")
    return BadRows(*ops.take_counts(like).tolist())


@torch.library.register_fake("ijckd::take_counts")
def _(like):
    return like.new_empty(len(BadRows._fields), dtype=torch.int64)
