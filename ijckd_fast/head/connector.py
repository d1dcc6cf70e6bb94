"""connector_match: contract, shapes for the compiler (fake), gradients (autograd). The C++ is in
csrc/connector_match.cpp.

`reference.py` has it in plain PyTorch with the same signature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ijckd_fast.head.dispatch import (
    accumulator,
    as_rows,
    autocast_dtype,
    check_library,
    differentiable,
    ops,
    own_products,
    refuse_double_backward,
    refuse_kinds,
)


class Affine(NamedTuple):
    """What comes between the projection and the ReLU, as the ops take it: the bias, or BatchNorm with its statistics.
    [Ct] each.
    """

    bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None


def connector_match(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    map_t: Tensor | None = None,
    pooled_t: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The connector's last projection, BatchNorm, ReLU, feature matching and global average pool in one op.

    Z = relu(BN(conv1x1(u, weight) + bias)), z = mean over H, W of Z; fm = mean (Z - map_t)^2 over B, Ct, H, W (IJCKD,
    SimKD) or mean (z - pooled_t)^2 over B, Ct (SRRL). Channels-last inputs are read as they lie; others are copied
    once.

    u             [B, Cs, H, W] or [B, Cs] (then H = W = 1), float64/float32/bfloat16 (float16 on a GPU); gets a
                  gradient
    weight        [Ct, Cs] or [Ct, Cs, 1, 1], dtype of u; gets a gradient
    bias          [Ct] or None, without BatchNorm only; gets a gradient
    bn_weight     [Ct] or None: no BatchNorm; gets a gradient, as does bn_bias [Ct], which goes with it
    running_mean  [Ct], with running_var: updated in place by `momentum` when training (variance unbiased, as torch's);
                  used otherwise
    num_batches_tracked  [] int64 or None: counts the batches over whose own statistics BatchNorm was taken, in place
    momentum      share of the batch in the running statistics, in [0, 1]; None: of all batches so far they are the
                  plain mean, for which num_batches_tracked must be given
    training      True: BatchNorm over the batch's own B*H*W positions; False: over the running statistics
    eps           added to the variance; finite, not negative
    relu          whether the connector ends in a ReLU (the teacher's map is after its ReLU)
    map_t         [B, Ct, H, W] (or [B, Ct] for vectors), dtype of u: match the whole map; or
    pooled_t      [B, Ct], any floating dtype: match the pooled features; neither: fm is 0. The teacher gets no gradient
    process_group BatchNorm statistics over all ranks of the group (SyncBN; ranks may hold different B); None: this
    process only

    returns       z [B, Ct] and fm [], float32 (float64 for float64 u): sums over positions, kept in the accumulator's
                  precision
    B = 0         as torch: fm is NaN where there is a match (the mean of nothing), gradients are 0, running statistics
                  stay
    autocast      u, weight and map_t are cast to the autocast dtype; statistics, BatchNorm, match and pool stay in
                  float32, as does the gradient of a float32 weight
    raises        RuntimeError naming argument, expected and found; also where map_t, pooled_t or a running statistic
                  requires grad, and on double backward
    """
    norm = Norm(bn_weight, bn_bias, running_mean, running_var, num_batches_tracked, momentum)
    return match_by(matched.call, u, weight, bias, norm, training, eps, relu, map_t, pooled_t, process_group)


def match_by(
    enter: Callable[..., tuple[Tensor, ...]],
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm,
    training: bool,
    eps: float,
    relu: bool,
    map_t: Tensor | None,
    pooled_t: Tensor | None,
    process_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """`connector_match`, whose op is called as `enter` where one process makes the statistics."""
    check_library(u, "connector_match")
    bn_weight, bn_bias, running_mean, running_var, num_batches_tracked, _ = norm
    batch_stats = bn_weight is not None and training
    _check(u, weight, bias, map_t, norm, training)
    if process_group is not None and not batch_stats:
        process_group = None  # only the batch's own statistics are shared

    if (amp := autocast_dtype(u)) is not None:
        u = u.to(amp)
        if weight.dtype != torch.float32 or process_group is not None:
            weight = weight.to(amp)  # the op casts one in float32, whose gradient then is float32 without a cast
        map_t = map_t.to(amp) if map_t is not None else None
    elif weight.dtype == torch.float32 and u.dtype in (torch.bfloat16, torch.float16):  # not on the quiet
        got = str(u.dtype).removeprefix("torch.")
        raise RuntimeError(f"connector_match: weight must have u's dtype {got}, got float32")
    B, positions = u.shape[0], math.prod(u.shape[2:])
    if batch_stats and process_group is None and B * positions == 1:
        _count(num_batches_tracked)  # as torch's, which refuses a batch that it has counted
        raise RuntimeError(
            f"connector_match: BatchNorm needs more than one position per channel to train, got u {list(u.shape)}"
        )
    if map_t is not None:
        expected = [B, weight.shape[0], *u.shape[2:]]
        if list(map_t.shape) != expected:
            raise RuntimeError(
                f"connector_match: map_t must be [B, Ct, H, W] = {expected} like Z, got {list(map_t.shape)}; "
                "pool the larger map first where the spatial sizes differ"
            )
    u = as_rows(u)  # [B, P, Cs]
    map_t = as_rows(map_t) if map_t is not None else None  # [B, P, Ct]
    weight = weight if weight.dim() == 2 else weight.flatten(1)  # [Ct, Cs]
    mean, var = (None, None) if batch_stats or bn_weight is None else (running_mean, running_var)
    affine = Affine(bias, bn_weight, bn_bias, mean, var)
    n_stats: Tensor | int = B * positions
    with own_products(u):
        if process_group is None:
            z, fm, mean, var, *_ = enter(u, weight, *affine, map_t, pooled_t, relu, eps)
        else:
            z, fm, mean, var, n_stats = _SyncConnectorMatch.apply(
                u, weight, bias, bn_weight, bn_bias, map_t, pooled_t, relu, eps, process_group
            )
    if batch_stats:
        nothing = process_group is None and B == 0  # the running statistics stay as they are, as torch's
        _follow(norm, mean, var, None if nothing else n_stats)
    return z, fm


class Norm(NamedTuple):
    """BatchNorm as `connector_match` is given it."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batches: Tensor | None
    momentum: float | None


def _check(u: Tensor, weight: Tensor, bias: Tensor | None, map_t: Tensor | None, norm: Norm, training: bool) -> None:
    """Raises RuntimeError where the arguments do not go together, as far as the op itself does not see it."""
    op = "connector_match"
    if u.dim() not in (2, 4):
        raise RuntimeError(f"{op}: u must be [B, Cs, H, W] or [B, Cs], got {list(u.shape)}")
    for name, x in (("weight", weight), ("map_t", map_t)):  # which are reshaped before torch looks for a kernel
        if x is not None and (not isinstance(x, Tensor) or x.layout is not torch.strided):
            refuse_kinds(op, [("u", u), (name, x)])
    if weight.dim() != 2 and (weight.dim() != 4 or weight.shape[2:] != (1, 1)):
        raise RuntimeError(f"{op}: weight must be [Ct, Cs] or [Ct, Cs, 1, 1], got {list(weight.shape)}")
    if (norm.weight is None) != (norm.bias is None):
        raise RuntimeError(f"{op}: bn_weight and bn_bias go together: give both or neither")
    if norm.weight is None:
        return
    if bias is not None:
        raise RuntimeError(f"{op}: bias must be None with BatchNorm, whose mean would cancel it; bn_bias is the shift")
    if not training:
        if norm.running_mean is None or norm.running_var is None:
            raise RuntimeError(f"{op}: running_mean and running_var are needed when training is False")
        return
    if (norm.running_mean is None) != (norm.running_var is None):
        raise RuntimeError(f"{op}: running_mean and running_var go together: give both or neither")
    batches = norm.batches
    if batches is not None and (batches.dtype != torch.int64 or batches.dim() != 0):
        got = f"{str(batches.dtype).removeprefix('torch.')} {list(batches.shape)}"
        raise RuntimeError(f"{op}: num_batches_tracked must be int64 [], got {got}")
    if norm.running_mean is None:
        return
    if norm.momentum is None:
        if batches is None:
            raise RuntimeError(
                f"{op}: momentum None takes the mean over all batches and needs num_batches_tracked, got None: give "
                "it, or a number as momentum"
            )
    elif not 0 <= norm.momentum <= 1:
        raise RuntimeError(f"{op}: momentum must lie in [0, 1], or be None, got {norm.momentum}")
    for name, running in (("running_mean", norm.running_mean), ("running_var", norm.running_var)):
        if not isinstance(running, Tensor) or running.layout is not torch.strided or running.device != u.device:
            refuse_kinds(op, [("u", u), (name, running)])
        assert running is not None
        if running.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{op}: {name} must not require grad (a statistic); detach it")
        if not running.is_floating_point():
            got = str(running.dtype).removeprefix("torch.")
            raise RuntimeError(f"{op}: {name} must be a floating-point tensor, got {got}")
        if list(running.shape) != [weight.shape[0]]:
            raise RuntimeError(f"{op}: {name} must be [Ct] = [{weight.shape[0]}], got {list(running.shape)}")


def _follow(norm: Norm, mean: Tensor, var: Tensor, n_stats: Tensor | int | None) -> None:
    """Counts the batch and, of n_stats positions, lets the running statistics follow its mean and biased variance."""
    running_mean, running_var, batches, share = norm.running_mean, norm.running_var, norm.batches, norm.momentum
    if n_stats is None or running_mean is None or running_var is None:
        return _count(batches)
    changed = [x for x in (running_mean, running_var, batches) if x is not None]
    if (
        not torch.compiler.is_compiling()  # which fuses torch's own
        and isinstance(n_stats, int)
        and share is not None
        and running_mean.dtype == running_var.dtype == mean.dtype
        and all(x.is_contiguous() and x.device == mean.device and not x.is_inference() for x in changed)
    ):
        ops.follow_statistics.default(running_mean, running_var, batches, mean, var, n_stats / (n_stats - 1), share)
        for x in changed:
            torch.autograd.graph.increment_version(x)
        return None
    _count(batches)
    with torch.no_grad():
        for running, new in ((running_mean, mean), (running_var, var * (n_stats / (n_stats - 1)))):
            of_batch: float | Tensor | None = share
            if of_batch is None:
                assert batches is not None
                of_batch = batches.to(running.dtype).reciprocal()  # the host does not wait for the count
            running.lerp_(new.to(running.dtype), of_batch)


def _count(batches: Tensor | None) -> None:
    if batches is not None:
        with torch.no_grad():
            batches.add_(1)


@torch.library.register_fake("ijckd::connector_match")
def _(u, weight, bias, bn_weight, bn_bias, mean, var, map_t, pooled_t, relu, eps):
    # torch takes this for a mixture of real tensors and tensors without memory, too
    affine = {"bias": bias, "bn_weight": bn_weight, "bn_bias": bn_bias, "running_mean": mean, "running_var": var}
    given = {"u": u, "weight": weight, **affine, "map_t": map_t, "pooled_t": pooled_t}
    refuse_kinds("connector_match", given.items())
    y, mean_out, var_out = _fake_project(u, weight)
    if bn_weight is None or mean is not None:
        mean_out, var_out = mean_out.new_empty(0), var_out.new_empty(0)
    z, fm, count, yhat, res, res_yhat = _fake_apply(y, map_t)
    if _is_linear(u, bn_weight, map_t, relu):
        y, count, yhat = (x.new_empty(0) for x in (y, count, yhat))
    weight_t = u.new_empty(weight.shape if weight.dtype != u.dtype else 0)
    return z, fm, mean_out, var_out, y, count, yhat, res, res_yhat, weight_t


@torch.library.register_fake("ijckd::follow_statistics")
def _(running_mean, running_var, batches, mean, var, unbiased, share):
    return None


def _is_linear(u: Tensor, bn_weight: Tensor | None, map_t: Tensor | None, relu: bool) -> bool:
    """A linear connector on vectors: backward needs no more than z = u weight^T + bias does. csrc/connector_match.cpp
    has the same.
    """
    return u.shape[1] == 1 and bn_weight is None and map_t is None and not relu


@torch.library.register_fake("ijckd::connector_project")
def _fake_project(u, weight):
    y = u.new_empty(u.shape[0], u.shape[1], weight.shape[0])
    stat = u.new_empty(weight.shape[0], dtype=accumulator(u.dtype))
    return y, stat, torch.empty_like(stat)


def _fake_apply(y, map_t):
    acc = accumulator(y.dtype)
    z = y.new_empty(y.shape[0], y.shape[2], dtype=acc)
    res = y.new_empty(y.shape[2] if map_t is not None else 0, dtype=acc)
    return z, y.new_empty((), dtype=acc), torch.empty_like(z), torch.empty_like(z), res, torch.empty_like(res)


@torch.library.register_fake("ijckd::connector_apply")
def _(y, bias, bn_weight, bn_bias, mean, var, map_t, pooled_t, relu, eps):
    return _fake_apply(y, map_t)


@torch.library.register_fake("ijckd::connector_channel_grads")
def _(grad_z, grad_fm, z, pooled_t, count, yhat, res, res_yhat, positions, match_map):
    d_gamma = z.new_empty(z.shape[1])
    return torch.empty_like(z), d_gamma, torch.empty_like(d_gamma)


@torch.library.register_fake("ijckd::connector_input_grads")
def _(
    grad_z,
    grad_fm,
    d_gamma,
    d_beta,
    n_stats,
    u,
    weight,
    y,
    bias,
    bn_weight,
    bn_bias,
    mean,
    var,
    map_t,
    relu,
    eps,
    need_du,
    need_dweight,
    wide=False,
):
    return _fake_input_grads(u, weight, need_du, need_dweight, wide)


def _fake_input_grads(u, weight, need_du, need_dweight, wide):
    du = u.new_empty(u.shape) if need_du else u.new_empty(0)
    dtype = accumulator(u.dtype) if wide else u.dtype
    return du, weight.new_empty(weight.shape if need_dweight else 0, dtype=dtype)


@torch.library.register_fake("ijckd::connector_map_grads")
def _(grad_z, grad_fm, z, pooled_t, count, yhat, res, res_yhat, u, weight, *rest):
    d_gamma = z.new_empty(z.shape[1])
    return *_fake_input_grads(u, weight, *rest[-3:]), d_gamma, torch.empty_like(d_gamma)


@torch.library.register_fake("ijckd::connector_linear_grads")
def _(grad_z, scale, grad_fm, z, pooled_t, u, weight, need_du, need_dweight, need_dbias, rounded=None, wide=False):
    du, dweight = _fake_input_grads(u, weight, need_du, need_dweight, wide)
    return du, dweight, u.new_empty(weight.shape[0] if need_dbias else 0, dtype=accumulator(u.dtype))


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # else backward gets zeros for each of the outputs that have no gradient
    u, weight, *_ = inputs
    affine = Affine(*inputs[2:7])
    map_t, pooled_t, ctx.relu, ctx.eps = inputs[7:]
    for i, name, why in (
        (5, "running_mean", "a statistic"),
        (6, "running_var", "a statistic"),
        (7, "map_t", "the teacher is frozen"),
        (8, "pooled_t", "the teacher is frozen"),
    ):
        if ctx.needs_input_grad[i]:
            raise RuntimeError(f"connector_match: {name} must not require grad ({why}); detach it")
    z, _, mean, var, y, *pooled, weight_t = output
    ctx.wide = weight.dtype != u.dtype
    weight = weight_t if ctx.wide else weight
    ctx.linear = _is_linear(u, affine.bn_weight, map_t, ctx.relu)
    ctx.batch_stats = affine.bn_weight is not None and affine.mean is None
    if ctx.batch_stats:
        affine = affine._replace(mean=mean, var=var)
    if ctx.linear:
        ctx.save_for_backward(u, weight, affine.bias, pooled_t, z if pooled_t is not None else None)
    else:
        ctx.save_for_backward(u, weight, *affine, map_t, pooled_t, y, z, *pooled)
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx, grad_z, grad_fm, *_):
    refuse_double_backward("connector_match")
    if not ctx.linear:
        return _gradients(ctx, grad_z, grad_fm)
    u, weight, bias, pooled_t, z = ctx.saved_tensors
    if grad_z is None:
        grad_z = u.new_zeros(u.shape[0], weight.shape[0], dtype=accumulator(u.dtype))
    match = (None, None, None) if pooled_t is None or grad_fm is None else (grad_fm, z, pooled_t)
    return *linear_grads(ctx.needs_input_grad, grad_z, None, match, u, weight, bias, wide=ctx.wide), None, None


def linear_grads(needs_input_grad, grad_z, scale, match, u, weight, bias, rounded=None, wide=False):
    """Gradients of u, weight, bias of a linear connector on vectors, None where `needs_input_grad` says so.

    grad_z   [B, Ct]
    scale    [], what grad_z is multiplied by, or None: 1
    match    (grad_fm [], z [B, Ct], pooled_t [B, Ct]) of the match of z with pooled_t, or (None, None, None)
    rounded  [B, Ct], grad_z in bfloat16 without a match, or None
    wide     the gradient of weight in float32, whatever the dtype of weight
    """
    needs = needs_input_grad[:3]
    grads = ops.connector_linear_grads.default(grad_z, scale, *match, u, weight, *needs, rounded, wide)
    du, dw, d_bias = grads
    if needs[2] and d_bias.dtype != bias.dtype:
        d_bias = d_bias.to(bias.dtype)
    return du if needs[0] else None, dw if needs[1] else None, d_bias if needs[2] else None


def _gradients(ctx, grad_z, grad_fm, group=None, n_stats=None):
    """Gradients of u, weight, bias, bn_weight, bn_bias; with a group, BatchNorm's two sums are taken over its ranks."""
    u, weight, *rest = ctx.saved_tensors
    affine = Affine(*rest[:5])
    map_t, pooled_t, y, z, *pooled = rest[5:]
    grad_z = torch.zeros_like(z) if grad_z is None else grad_z
    if grad_fm is None and (map_t is not None or pooled_t is not None):
        grad_fm = z.new_zeros(())
    needs = ctx.needs_input_grad[:2]
    outputs = (z, pooled_t, *pooled)
    if group is None:
        inputs = (u, weight, y, *affine, map_t, ctx.batch_stats, ctx.relu, ctx.eps)
        du, dw, d_gamma, d_beta = ops.connector_map_grads.default(grad_z, grad_fm, *outputs, *inputs, *needs, ctx.wide)
    else:
        grad_z, d_gamma, d_beta = ops.connector_channel_grads.default(
            grad_z, grad_fm, *outputs, y.shape[1], map_t is not None
        )
        du = dw = None
        if any(needs):
            both = torch.stack((d_gamma, d_beta))
            dist.all_reduce(both, group=group)
            both = both / n_stats  # here, on the device: reading the count of all ranks would make the host wait
            du, dw = ops.connector_input_grads.default(
                grad_z,
                grad_fm,
                both[0],
                both[1],
                1.0,
                u,
                weight,
                y,
                *affine,
                map_t,
                ctx.relu,
                ctx.eps,
                *needs,
                ctx.wide,
            )

    def like(g, x, i):
        if x is None or not ctx.needs_input_grad[i]:
            return None
        return g if g.dtype == x.dtype else g.to(x.dtype)

    return (
        du if needs[0] else None,
        dw if needs[1] else None,
        like(d_beta, affine.bias, 2),
        like(d_gamma, affine.bn_weight, 3),
        like(d_beta, affine.bn_bias, 4),
    )


matched = differentiable(ops.connector_match.default, _setup, _backward, trained=5, results=4)


class _SyncConnectorMatch(torch.autograd.Function):
    """connector_match with BatchNorm statistics, and their two sums in backward, over the ranks of a process group."""

    @staticmethod
    def forward(ctx, u, weight, bias, bn_weight, bn_bias, map_t, pooled_t, relu, eps, group):
        y, mean, var = ops.connector_project(u, weight)  # [B, P, Ct], [Ct], [Ct]
        n = mean.new_full((1,), y.shape[0] * y.shape[1])
        local = torch.cat([mean, var, n])  # [2 Ct + 1]
        ranks = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, local, group=group)
        every = torch.stack(ranks).double()  # [world, 2 Ct + 1]; so that a large mean keeps its digits
        means, variances, counts = every.split([mean.numel(), var.numel(), 1], dim=1)
        n = counts.sum()
        # Chan: exact where a difference of large sums of squares would cancel
        mean = (means * counts).sum(0) / n
        var = ((variances + (means - mean).square()) * counts).sum(0) / n
        mean, var = mean.to(local.dtype), var.to(local.dtype)
        affine = Affine(bias, bn_weight, bn_bias, mean, var)
        z, fm, *pooled = ops.connector_apply(y, *affine, map_t, pooled_t, relu, eps)
        ctx.set_materialize_grads(False)
        ctx.relu, ctx.eps, ctx.group, ctx.batch_stats, ctx.wide = relu, eps, group, True, False
        ctx.save_for_backward(u, weight, *affine, map_t, pooled_t, y, z, *pooled)
        ctx.n_stats = n
        ctx.mark_non_differentiable(mean, var, n)
        return z, fm, mean, var, n

    @staticmethod
    def backward(ctx, grad_z, grad_fm, *_):
        refuse_double_backward("connector_match")
        grads = _gradients(ctx, grad_z, grad_fm, group=ctx.group, n_stats=ctx.n_stats)
        return (*grads, None, None, None, None, None)
