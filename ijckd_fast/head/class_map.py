"""class_map_loss, the teacher's classifier at positions of maps: contract, shapes for the compiler (fake), gradients.

The C++ is in csrc/class_map_loss.cpp; `reference.py` has the op in plain PyTorch with the same signature.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ijckd_fast.head.dispatch import (
    UNSCALED,
    accumulator,
    autocast_dtype,
    check_library,
    differentiable,
    ops,
    refuse_double_backward,
    refuse_kinds,
)

_OP = "class_map_loss"


def class_map_loss(
    maps: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    maps_t: Tensor,
    labels: Tensor | None = None,
    *,
    scales: Sequence[int] = (1, 2, 4),
    share: Tensor | None = None,
    kl: float = 0.0,
    dkd_alpha: float = 0.0,
    dkd_beta: float = 0.0,
    cam: float = 0.0,
    temperature: float = 4.0,
) -> tuple[Tensor, Tensor]:
    """The teacher's frozen classifier at every position of the student's maps and of the teacher's, and losses on it.

    x = pooled_positions(maps, scales) [B, P, Ct], x_t likewise; logits = x weight^T + bias, logits_t likewise, at
    every position p; T the temperature; means over B and P:
    loss = kl mean share w T^2 KL(softmax(logits_t / T) || softmax(logits / T))
         + mean share w T^2 (dkd_alpha TCKD + dkd_beta NCKD)
         + cam mean over B, K, R*R of share (c / |c| - c_t / |c_t|)^2.
    TCKD and NCKD are DKD's (Zhao et al. 2022) of the label. w is 2 where the teacher's largest logit at p is the
    label's and at scale 1 is not, or the other way round, and 1 elsewhere: what complements the whole map counts twice,
    scale decoupled distillation, SDD (Wei et al. 2024). c = x weight^T without bias at the R*R positions of the last
    scale, R, is a class map (CAM) of each class, |c| its norm over these positions, at least 1e-12: CAT-KD (Guo et al.
    2023), normalised. Its other form, without norms, is `classifier_loss`'s logit match of x's rows.
    The gradient of x is made in the forward pass. Pooled positions and logits of some images exist at a time. Where x
    and x_t are close, logits - logits_t is weight (x - x_t), with the difference formed before any rounding.

    maps      [B, Ct, H, W], or [B, P, Ct] pooled already; float32/bfloat16 (float16 on a GPU), or float64 with a
              float64 weight; the only tensor that gets a gradient
    weight    [K, Ct] the teacher's classifier, any floating dtype (float16 on a GPU alone); bias [K] or None; frozen
    maps_t    [B, Ct, Ht, Wt], whose size may be another than maps', or [B, P, Ct]; any floating dtype
    labels    [B] int64 in [0, K); needed for kl and DKD. Of mixed images: a call with each of the two labels, and their
              shares
    scales    positions along each side, rising, each a divisor of the last; the first is 1 where kl or DKD are on
    share     [B] any floating dtype, or None: a factor of each image's loss
    kl ... temperature  finite numbers, temperature > 0
    returns   loss [], parts [3] = (KL, DKD, CAM) before weighting (DKD with its alpha and beta), 0 where the weight is
              0, no gradient. float32 (float64 for float64)
    B = 0     the loss and every weighted part are NaN, the mean of nothing, and the gradient is empty
    autocast  the products with weight are taken in the autocast dtype; pooling, differences and losses in float32
    raises    RuntimeError naming argument, expected and found (a label out of range: on the CPU; on a GPU its image's
              loss is NaN and `take_bad_rows` reports it); where anything but maps requires grad; on double backward
    """
    given = {"maps": maps, "weight": weight, "bias": bias, "maps_t": maps_t, "labels": labels, "share": share}
    refuse_kinds(_OP, given.items())
    check_library(maps, _OP)
    scales = [int(s) for s in scales]
    for name, x in given.items():
        if name != "maps" and x is not None and x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{_OP}: {name} must not require grad: the classifier and the teacher are frozen and only maps are "
                "trained; detach it"
            )
    dtype = autocast_dtype(maps)
    numbers = [kl, dkd_alpha, dkd_beta, cam, temperature]
    if torch.compiler.is_compiling():  # it would trace how the means are made, and make them in each step
        means = means_t = None
        maps = _pooled(maps, "maps", scales)
        with torch.no_grad():
            maps_t = _pooled(maps_t, "maps_t", scales)
    else:
        means, means_t = (_means_of(x, name, scales, maps) for x, name in ((maps, "maps"), (maps_t, "maps_t")))
    grad = torch.is_grad_enabled() and maps.requires_grad
    with torch.autocast(maps.device.type, enabled=False):
        loss, parts = _of_maps.call(
            maps, weight, bias, maps_t, labels, share, means, means_t, scales, numbers, grad, dtype
        )[:2]
    return loss, parts


def pooled_positions(maps: Tensor, scales: Sequence[int] = (1, 2, 4)) -> Tensor:
    """Means of maps over cells of s x s positions for each scale s: [B, C, H, W] -> [B, P, C], P the sum of s^2.

    The last scale, R, pools as torch's adaptive_avg_pool2d(maps, R), also where H or W is smaller than R; a coarser one
    takes the means of those R x R cells, as SDD's authors do. Positions stand scale after scale, row by row. float32
    (float64 for float64), also under autocast; one product with a constant [P, H*W], forward and backward.
    raises  RuntimeError for scales that do not rise or do not divide the last
    """
    scales = [int(s) for s in scales]
    _check_scales(scales)
    maps = maps.to(accumulator(maps.dtype))
    if torch.compiler.is_compiling():
        finest = F.adaptive_avg_pool2d(maps, scales[-1])  # [B, C, R, R]
        return torch.cat([F.adaptive_avg_pool2d(finest, s).flatten(2) for s in scales], 2).transpose(1, 2)
    means = _position_means(tuple(scales), maps.shape[2], maps.shape[3], maps.dtype, maps.device)  # [P, H*W]
    with torch.autocast(maps.device.type, enabled=False):
        return means @ maps.flatten(2).transpose(1, 2)  # [B, P, C]


@functools.lru_cache(maxsize=32)
def _position_means(scales: tuple[int, ...], H: int, W: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[P, H*W] whose product with a map's positions is `pooled_positions`."""
    R = scales[-1]

    def along(side: int) -> Tensor:  # [R, side], the cells of adaptive_avg_pool2d
        bounds = [(i * side // R, -(-(i + 1) * side // R)) for i in range(R)]
        at = torch.arange(side)
        return torch.stack([((at >= first) & (at < last)).double() / (last - first) for first, last in bounds])

    with torch.inference_mode(False):  # kept for training too, which saves it for backward
        cells = torch.einsum("ih,jw->ijhw", along(H), along(W))  # [R, R, H, W]
        rows = [cells.reshape(s, R // s, s, R // s, H * W).mean((1, 3)).reshape(s * s, H * W) for s in scales]
        return torch.cat(rows).to(device, dtype)


def _check_scales(scales: Sequence[int]) -> None:
    nested = bool(scales) and all(a < b for a, b in zip([0, *scales], scales, strict=False))
    if not nested or any(scales[-1] % s for s in scales):
        raise RuntimeError(f"{_OP}: scales must rise, from 1 or more, and each divide the last, got {scales}")


def _has_positions(maps: Tensor, name: str) -> bool:
    """Whether they are maps [B, Ct, H, W], which are to be pooled; raises RuntimeError for such without a position."""
    if maps.dim() == 4 and 0 in maps.shape[2:]:
        raise RuntimeError(f"{_OP}: {name} must have positions, got {list(maps.shape)}")
    return maps.dim() == 4


def _means_of(maps: Tensor, name: str, scales: Sequence[int], like: Tensor) -> Tensor | None:
    """Of what shall be pooled: [P, H*W] in the dtype in which like is summed."""
    if not _has_positions(maps, name):
        return None
    _check_scales(scales)
    return _position_means(tuple(scales), maps.shape[2], maps.shape[3], accumulator(like.dtype), like.device)


def _pooled(maps: Tensor, name: str, scales: Sequence[int]) -> Tensor:
    return pooled_positions(maps, scales) if maps.is_floating_point() and _has_positions(maps, name) else maps


@torch.library.register_fake("ijckd::class_map_loss")
def _(maps, weight, bias, maps_t, labels, share, means, means_t, scales, numbers, grad, dtype):
    given = {"maps": maps, "weight": weight, "bias": bias, "maps_t": maps_t, "labels": labels, "share": share}
    refuse_kinds(_OP, given.items())
    acc = accumulator(maps.dtype)
    P, Ct = (maps.shape[1], maps.shape[2]) if means is None else (means.shape[0], maps.shape[1])
    dx = maps.new_empty(maps.shape[0] if grad else 0, P, Ct, dtype=acc)
    return maps.new_empty((), dtype=acc), maps.new_empty(3, dtype=acc), dx


def _setup(ctx, inputs, output):
    maps, means = inputs[0], inputs[6]
    ctx.set_materialize_grads(False)
    ctx.dtype = maps.dtype
    ctx.size = maps.shape
    ctx.by_channel = means is not None and maps.is_contiguous()  # its gradient is then in the same memory format
    ctx.save_for_backward(output[2], means)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_loss, *_):
    refuse_double_backward(_OP)
    if grad_loss is None:
        return (None,)
    dx, means = ctx.saved_tensors  # [B, P, Ct], [P, H*W] or None
    scaled = dx if means is None else means  # the smaller one
    if grad_loss is not UNSCALED:
        scaled = scaled * grad_loss
    if means is None:
        grad = scaled
    else:
        with torch.autocast(dx.device.type, enabled=False):  # [B, Ct, H*W]
            grad = dx.transpose(1, 2) @ scaled if ctx.by_channel else (scaled.t() @ dx).transpose(1, 2)
        grad = grad.reshape(ctx.size)
    return (grad if grad.dtype == ctx.dtype else grad.to(ctx.dtype),)


_of_maps = differentiable(ops.class_map_loss.default, _setup, _backward, trained=1, results=2)
