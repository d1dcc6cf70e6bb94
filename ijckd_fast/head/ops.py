"""Contract of the fused ops: docstring, shapes for the compiler (fake), gradients (autograd). The C++ is in csrc/.

`connector_match`, `classifier_loss` and, of both in one where the connector is linear, `projected_classifier_loss` are what other code
imports; `reference.py` has them in plain PyTorch with the same signatures.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ijckd_fast.head.libraries import REBUILD, load_libraries

_HAS_CUDA_LIBRARY = load_libraries()  # the registrations below need the schemas
_ops = torch.ops.ijckd


def _check_library(x: Tensor, op: str) -> None:
    if x.is_cuda and not _HAS_CUDA_LIBRARY:
        raise RuntimeError(
            f"{op}: tensors on a GPU need _C_cuda.so, which was not built: install nvcc and run {REBUILD}"
        )


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants of matrix products on x's device, or None where autocast is off or x is float64."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def _own_products(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """For calls of ops on x under autocast: a CPU op's own float32 products stay so, whatever autocast would make of them."""
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return torch.autocast("cpu", enabled=False)
    return contextlib.nullcontext()


def _acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# Enters an op below its registered autograd. Not public: where a torch has it no more, the op is entered from above and finds no
# gradient to record.
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)


def _differentiable(
    op: Any, setup: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., tuple[Tensor, ...]]:
    """Registers the gradient of `op`; returns the op to call. What torch.library makes of setup and backward serves the compiler;
    eager calls take an autograd.Function of the same two, of which Python makes less work.
    """
    torch.library.register_autograd(op._schema.name, backward, setup_context=setup)

    def forward(*args):
        with _below_autograd():
            return op(*args)

    methods = {"forward": forward, "setup_context": setup, "backward": backward}
    function: Any = type(op._opname, (torch.autograd.Function,), {k: staticmethod(f) for k, f in methods.items()})

    def call(*args):
        eager = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return function.apply(*args) if eager else op(*args)

    return call


# --------------------------------------------------------------------------------------------------------------------
# connector_match


def connector_match(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    map_t: Tensor | None = None,
    pooled_t: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The connector's last projection, BatchNorm, ReLU, feature matching and global average pool in one op.

    Z = relu(BN(conv1x1(u, weight) + bias)), z = mean over H, W of Z; fm = mean (Z - map_t)^2 over B, Ct, H, W (IJCKD, SimKD) or
    mean (z - pooled_t)^2 over B, Ct (SRRL). Channels-last inputs are read as they lie; others are copied once.

    u             [B, Cs, H, W] or [B, Cs] (then H = W = 1), float64/float32/bfloat16 (float16 on a GPU); gets a gradient
    weight        [Ct, Cs] or [Ct, Cs, 1, 1], dtype of u; gets a gradient
    bias          [Ct] or None, without BatchNorm only; gets a gradient
    bn_weight     [Ct] or None: no BatchNorm; gets a gradient, as does bn_bias [Ct], which goes with it
    running_mean  [Ct], with running_var: updated in place by `momentum` when training (variance unbiased, as torch's); used otherwise
    training      True: BatchNorm over the batch's own B*H*W positions; False: over the running statistics
    eps           added to the variance
    relu          whether the connector ends in a ReLU (the teacher's map is after its ReLU)
    map_t         [B, Ct, H, W] (or [B, Ct] for vectors), dtype of u: match the whole map; or
    pooled_t      [B, Ct], any floating dtype: match the pooled features; neither: fm is 0. The teacher gets no gradient
    process_group BatchNorm statistics over all ranks of the group (SyncBN; ranks may hold different B); None: this process only

    returns       z [B, Ct] and fm [], float32 (float64 for float64 u): sums over positions, kept in the accumulator's precision
    B = 0         as torch: fm is NaN where there is a match (the mean of nothing), gradients are 0, running statistics stay
    autocast      u, weight and map_t are cast to the autocast dtype; statistics, BatchNorm, match and pool stay in float32
    raises        RuntimeError naming argument, wanted and found; also where map_t, pooled_t or a running statistic requires grad,
                  and on double backward
    """
    _check_library(u, "connector_match")
    if u.dim() not in (2, 4):
        raise RuntimeError(f"connector_match: u must be [B, Cs, H, W] or [B, Cs], got {list(u.shape)}")
    if (bn_weight is None) != (bn_bias is None):
        raise RuntimeError("connector_match: bn_weight and bn_bias go together: give both or neither")
    if bn_weight is not None and bias is not None:
        raise RuntimeError(
            "connector_match: bias must be None with BatchNorm, whose mean would cancel it; bn_bias is the shift"
        )
    batch_stats = bn_weight is not None and training
    if bn_weight is not None and not training and (running_mean is None or running_var is None):
        raise RuntimeError("connector_match: running_mean and running_var are needed when training is False")
    if process_group is not None and not batch_stats:
        process_group = None  # only the batch's own statistics are shared

    if (amp := _autocast_dtype(u)) is not None:
        u, weight = u.to(amp), weight.to(amp)
        map_t = map_t.to(amp) if map_t is not None else None
    B, positions = u.shape[0], math.prod(u.shape[2:])
    if batch_stats and process_group is None and B * positions == 1:
        raise RuntimeError(
            f"connector_match: BatchNorm needs more than one position per channel to train, got u {list(u.shape)}"
        )
    if map_t is not None:
        wanted = [B, weight.shape[0], *u.shape[2:]]
        if list(map_t.shape) != wanted:
            raise RuntimeError(
                f"connector_match: map_t must be [B, Ct, H, W] = {wanted} like Z, got {list(map_t.shape)}; "
                "pool the larger map first where the spatial sizes differ"
            )
    u = _rows(u)  # [B, P, Cs]
    map_t = _rows(map_t) if map_t is not None else None  # [B, P, Ct]
    weight = weight.flatten(1)  # [Ct, Cs]
    mean, var = (None, None) if batch_stats or bn_weight is None else (running_mean, running_var)
    args = (u, weight, bias, bn_weight, bn_bias)
    n_stats: Tensor | int = B * positions
    with _own_products(u):
        if process_group is None:
            z, fm, mean, var, *_ = _connector_match(*args, mean, var, map_t, pooled_t, relu, eps)
        else:
            z, fm, mean, var, n_stats = _SyncConnectorMatch.apply(*args, map_t, pooled_t, relu, eps, process_group)
    nothing = process_group is None and B == 0  # the running statistics stay as they are, as torch's
    if batch_stats and running_mean is not None and running_var is not None and not nothing:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (n_stats / (n_stats - 1))).to(running_var.dtype), momentum)
    return z, fm


def _rows(x: Tensor) -> Tensor:
    """[B, C, H, W] or [B, C] -> [B, H*W, C]: a view of a channels-last map, a copy of another."""
    return x.flatten(2).transpose(1, 2) if x.dim() == 4 else x.unsqueeze(1)


@torch.library.register_fake("ijckd::connector_match")
def _(u, weight, bias, bn_weight, bn_bias, mean, var, map_t, pooled_t, relu, eps):
    y, mean_out, var_out = _fake_project(u, weight)
    if bn_weight is None or mean is not None:
        mean_out, var_out = mean_out.new_empty(0), var_out.new_empty(0)
    z, fm, count, yhat, res, res_yhat = _fake_apply(y, map_t)
    if _is_linear(u, bn_weight, map_t, relu):
        y, count, yhat = (x.new_empty(0) for x in (y, count, yhat))
    return z, fm, mean_out, var_out, y, count, yhat, res, res_yhat


def _is_linear(u: Tensor, bn_weight: Tensor | None, map_t: Tensor | None, relu: bool) -> bool:
    """A linear connector on vectors: backward needs no more than z = u weight^T + bias does. csrc/connector_match.cpp has the same."""
    return u.shape[1] == 1 and bn_weight is None and map_t is None and not relu


@torch.library.register_fake("ijckd::connector_project")
def _fake_project(u, weight):
    y = u.new_empty(u.shape[0], u.shape[1], weight.shape[0])
    stat = u.new_empty(weight.shape[0], dtype=_acc_dtype(u.dtype))
    return y, stat, torch.empty_like(stat)


def _fake_apply(y, map_t):
    acc = _acc_dtype(y.dtype)
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
):
    du = u.new_empty(u.shape) if need_du else u.new_empty(0)
    return du, weight.new_empty(weight.shape) if need_dweight else weight.new_empty(0)


@torch.library.register_fake("ijckd::connector_linear_grads")
def _(grad_z, scale, grad_fm, z, pooled_t, u, weight, need_du, need_dweight, need_dbias):
    du = u.new_empty(u.shape) if need_du else u.new_empty(0)
    dweight = weight.new_empty(weight.shape) if need_dweight else weight.new_empty(0)
    return du, dweight, u.new_empty(weight.shape[0] if need_dbias else 0, dtype=_acc_dtype(u.dtype))


_CONNECTOR_ARGS = ("u", "weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var", "map_t", "pooled_t")


def _connector_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # else backward gets zeros for each of the outputs that have no gradient
    u, weight, bias, bn_weight, bn_bias, mean, var, map_t, pooled_t, ctx.relu, ctx.eps = inputs
    for i, why in ((5, "a statistic"), (6, "a statistic"), (7, "the teacher is frozen"), (8, "the teacher is frozen")):
        if ctx.needs_input_grad[i]:
            raise RuntimeError(f"connector_match: {_CONNECTOR_ARGS[i]} must not require grad ({why}); detach it")
    z, _, mean_out, var_out, y, *pooled = output
    ctx.linear = _is_linear(u, bn_weight, map_t, ctx.relu)
    ctx.batch_stats = bn_weight is not None and mean is None
    if ctx.batch_stats:
        mean, var = mean_out, var_out
    if ctx.linear:
        ctx.save_for_backward(u, weight, bias, pooled_t, z if pooled_t is not None else None)
    else:
        ctx.save_for_backward(u, weight, bias, bn_weight, bn_bias, mean, var, map_t, pooled_t, y, z, *pooled)
    ctx.mark_non_differentiable(*output[2:])


def _refuse_double_backward(op: str) -> None:
    # autograd runs a backward with gradients enabled only when asked for create_graph
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: double backward is not supported; call backward without create_graph")


def _connector_backward(ctx, grad_z, grad_fm, *_):
    _refuse_double_backward("connector_match")
    du, dw, d_bias, d_gamma, d_beta = (_linear_grads if ctx.linear else _connector_grads)(ctx, grad_z, grad_fm)
    return du, dw, d_bias, d_gamma, d_beta, None, None, None, None, None, None


def _linear_grads(ctx, grad_z, grad_fm):
    """_connector_grads of a linear connector."""
    u, weight, bias, pooled_t, z = ctx.saved_tensors
    grad_z = u.new_zeros(u.shape[0], weight.shape[0], dtype=_acc_dtype(u.dtype)) if grad_z is None else grad_z
    if pooled_t is None or grad_fm is None:
        grad_fm = z = pooled_t = None
    need_du, need_dw, need_d_bias = ctx.needs_input_grad[:3]
    du, dw, d_bias = _ops.connector_linear_grads(
        grad_z, None, grad_fm, z, pooled_t, u, weight, need_du, need_dw, need_d_bias
    )
    return (
        du if need_du else None,
        dw if need_dw else None,
        d_bias.to(bias.dtype) if need_d_bias else None,
        None,
        None,
    )


def _connector_grads(ctx, grad_z, grad_fm, group=None, n_stats=None):
    """Gradients of u, weight, bias, bn_weight, bn_bias; with a group, BatchNorm's two sums are taken over its ranks."""
    u, weight, bias, bn_weight, bn_bias, mean, var, map_t, pooled_t, y, z, count, yhat, res, res_yhat = (
        ctx.saved_tensors
    )
    positions = y.shape[1]
    grad_z = torch.zeros_like(z) if grad_z is None else grad_z
    if grad_fm is None and (map_t is not None or pooled_t is not None):
        grad_fm = z.new_zeros(())
    grad_z, d_gamma, d_beta = _ops.connector_channel_grads(
        grad_z, grad_fm, z, pooled_t, count, yhat, res, res_yhat, positions, map_t is not None
    )
    need_du, need_dw = ctx.needs_input_grad[:2]
    du = dw = None
    if need_du or need_dw:
        sums = (d_gamma, d_beta) if ctx.batch_stats else (None, None)
        n = float(y.shape[0] * positions)
        if group is not None:
            both = torch.stack((d_gamma, d_beta))
            dist.all_reduce(both, group=group)
            both = both / n_stats  # here, on the device: reading the count of all ranks would make the host wait
            sums, n = (both[0], both[1]), 1.0
        du, dw = _ops.connector_input_grads(
            grad_z,
            grad_fm,
            *sums,
            n,
            u,
            weight,
            y,
            bias,
            bn_weight,
            bn_bias,
            mean,
            var,
            map_t,
            ctx.relu,
            ctx.eps,
            need_du,
            need_dw,
        )

    def like(g, x, i):
        return g.to(x.dtype) if x is not None and ctx.needs_input_grad[i] else None

    return (
        du if need_du else None,
        dw if need_dw else None,
        like(d_beta, bias, 2),
        like(d_gamma, bn_weight, 3),
        like(d_beta, bn_bias, 4),
    )


_connector_match = _differentiable(_ops.connector_match.default, _connector_setup, _connector_backward)


class _SyncConnectorMatch(torch.autograd.Function):
    """connector_match with BatchNorm statistics, and their two sums in backward, over the ranks of a process group."""

    @staticmethod
    def forward(ctx, u, weight, bias, bn_weight, bn_bias, map_t, pooled_t, relu, eps, group):
        y, mean, var = _ops.connector_project(u, weight)  # [B, P, Ct], [Ct], [Ct]
        n = mean.new_full((1,), y.shape[0] * y.shape[1])
        local = torch.cat([mean, var, n])  # [2 Ct + 1]
        ranks = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, local, group=group)
        means, variances, counts = torch.stack(ranks).split([mean.numel(), var.numel(), 1], dim=1)  # [world, .]
        n = counts.sum()
        # Chan: exact where a difference of large sums of squares would cancel
        mean = (means * counts).sum(0) / n
        var = ((variances + (means - mean).square()) * counts).sum(0) / n
        z, fm, *pooled = _ops.connector_apply(y, bias, bn_weight, bn_bias, mean, var, map_t, pooled_t, relu, eps)
        ctx.set_materialize_grads(False)
        ctx.relu, ctx.eps, ctx.group, ctx.batch_stats = relu, eps, group, True
        ctx.save_for_backward(u, weight, bias, bn_weight, bn_bias, mean, var, map_t, pooled_t, y, z, *pooled)
        ctx.n_stats = n
        ctx.mark_non_differentiable(mean, var, n)
        return z, fm, mean, var, n

    @staticmethod
    def backward(ctx, grad_z, grad_fm, *_):
        _refuse_double_backward("connector_match")
        grads = _connector_grads(ctx, grad_z, grad_fm, group=ctx.group, n_stats=ctx.n_stats)
        return (*grads, None, None, None, None, None)


# --------------------------------------------------------------------------------------------------------------------
# classifier_loss


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
    gram: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's frozen classifier on the student's features, and every loss on its logits.

    logits = z weight^T + bias; logits_t = pooled_t weight^T + bias, or as given;
    loss = ce CE(logits, labels) + sr mean (logits - logits_t)^2 over B, K + fm mean (z - pooled_t)^2 over B, Ct
         + kl T^2 KL(softmax(logits_t / T) || softmax(logits / T)), mean over B. All in nats.
    The gradient is made in the forward pass; where pooled_t is given, logits - logits_t is weight (z - pooled_t), with the
    difference formed before any rounding.

    z         [B, Ct], float32/bfloat16 (float16 on a GPU), or float64 with a float64 weight; the only tensor that gets a gradient
    weight    [K, Ct] the teacher's classifier, float64/float32/bfloat16 (float16 on a GPU); frozen: refused if it requires grad
    bias      [K] or None
    labels    [B] int64 in [0, K)
    labels_b  [B] int64, the second labels of mixup or cutmix, with
    mix       [B] in [0, 1], the share of `labels`: CE = mix CE(labels) + (1 - mix) CE(labels_b)
    label_smoothing  in [0, 1], as torch's cross_entropy
    pooled_t  [B, Ct], any floating dtype; needed for fm, and for sr or kl unless logits_t is given
    logits_t  [B, K], any floating dtype
    temperature  > 0, of the KL term only
    gram      `classifier_gram(weight)`, made once: on a GPU the logit match then costs nothing that grows with K. It must belong to
              this weight, which is not looked at. The CPU keeps its own and needs none

    returns   loss []; parts [4] = (CE, SR, FM, KL) before weighting, 0 where the weight is 0, no gradient; top1 [] int64, the number
              of rows whose largest logit (the first, on a tie) is that of `labels`. loss and parts are float32 (float64 for float64)
    B = 0     as torch: the loss and every weighted part are NaN, the mean of nothing, and the gradient is empty
    autocast  z, pooled_t and weight are cast to the autocast dtype for the matrix products; differences and losses stay in float32
    raises    RuntimeError naming argument, wanted and found (a label out of range: on the CPU; on a GPU its row's loss is NaN,
              since looking would make the host wait, and `take_bad_rows` tells of it); where anything but z requires grad; on double
              backward
    """
    _check_library(z, "classifier_loss")
    dtype = _autocast_dtype(z)  # the op casts, because it knows how much of the classifier it needs at a time
    grad = torch.is_grad_enabled() and z.requires_grad
    args = (
        z,
        weight,
        bias,
        labels,
        labels_b,
        mix,
        pooled_t,
        logits_t,
        label_smoothing,
        ce,
        sr,
        fm,
        kl,
        temperature,
        grad,
        dtype,
        gram,
    )
    # the op's own float32 products stay so, whatever autocast would make of them
    with _own_products(z):
        loss, parts, top1, _ = _classifier_loss(*args)
    return loss, parts, top1


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
    gram: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A linear connector on vectors and `classifier_loss` on what it makes, in one op: z = u projection^T + projection_bias.

    On a GPU of sm_80 and newer, in half types (csrc/cuda/tiled_loss.cpp): 3 launches forward and 1 backward in bfloat16 where
    the classes fit one chunk, 4 and 1 with KL, float16 or few classes for their channels. Elsewhere what `connector_match` and
    `classifier_loss` do.

    u                [B, Cs], float64/float32/bfloat16 (float16 on a GPU); gets a gradient
    projection       [Ct, Cs], dtype of u; gets a gradient
    projection_bias  [Ct] or None; gets a gradient
    weight ... gram  as for `classifier_loss`, in u's place of z: float64 goes with float64
    returns          as `classifier_loss`; z is not kept
    autocast         u and projection are cast to the autocast dtype; z is float32, and the rest as for `classifier_loss`
    raises           RuntimeError as `classifier_loss`, for anything of it that requires grad, and for u and projection as
                     `connector_match`
    """
    op = "projected_classifier_loss"
    _check_library(u, op)
    if u.dim() != 2:
        raise RuntimeError(f"{op}: u must be [B, Cs], got {list(u.shape)}")
    dtype = _autocast_dtype(u)
    if dtype is not None:
        u, projection = u.to(dtype), projection.to(dtype)
    grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (u, projection, projection_bias))
    args = (
        _rows(u),
        projection,
        projection_bias,
        weight,
        bias,
        labels,
        labels_b,
        mix,
        pooled_t,
        logits_t,
        label_smoothing,
        ce,
        sr,
        fm,
        kl,
        temperature,
        grad,
        dtype,
        gram,
    )
    with _own_products(u):
        loss, parts, top1, _ = _projected_classifier_loss(*args)
    return loss, parts, top1


@torch.no_grad()
def classifier_gram(weight: Tensor) -> Tensor:
    """G = weight^T weight of a frozen classifier, as `classifier_loss` wants it on a GPU: |W d|^2 = d^T G d.

    weight    [K, Ct], any floating dtype; summed in float64, 4096 classes at a time
    returns   [2, Ct, Ct] bfloat16: G rounded, and what the rounding left out
    """
    g = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in weight.detach().split(4096):  # [<= 4096, Ct]
        g.addmm_(rows.double().T, rows.double())
    high = g.bfloat16()
    return torch.stack([high, (g - high.double()).bfloat16()])


class FrozenClassifier:
    """What `classifier_loss` can use of a frozen classifier on a GPU besides its weight, made once and again whenever that changes."""

    def __init__(self) -> None:
        self._made_from: tuple[object, ...] = ()
        self._prepared: tuple[Tensor, Tensor | None] | None = None
        self._weight: Tensor | None = None  # kept, so that no other classifier can come to lie at its address

    def prepared(self, weight: Tensor, *, match: bool) -> tuple[Tensor, Tensor | None]:
        """(weight in autocast's dtype, its gram or None) for `classifier_loss`.

        Autocast itself would cast a frozen weight anew in every step: it keeps casts of what is trained only.

        weight  [K, Ct], no gradient
        match   whether the loss has a logit match, for which the gram is made where it can be the cheaper way (bfloat16; 3 Ct < K, or
                channels so few that its products take less time than a pass over whole rows of logits)
        """
        device = weight.device.type
        amp = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if amp else weight.dtype
        made_from = (weight.data_ptr(), weight._version, weight.device, weight.shape, dtype, match)
        if self._prepared is None or made_from != self._made_from:
            rounded = weight.detach().to(dtype)
            K, Ct = weight.shape
            wanted = match and dtype == torch.bfloat16 and (3 * Ct < K or Ct <= 1024)
            self._prepared = rounded, classifier_gram(rounded) if wanted else None
            self._made_from = made_from
            self._weight = weight.detach()
        return self._prepared


@torch.library.register_fake("ijckd::classifier_loss")
def _(
    z,
    weight,
    bias,
    labels,
    labels_b,
    mix,
    pooled_t,
    logits_t,
    label_smoothing,
    ce,
    sr,
    fm,
    kl,
    temperature,
    grad,
    dtype,
    gram,
):
    acc = _acc_dtype(z.dtype)
    dz = z.new_empty(z.shape[0] if grad else 0, z.shape[1], dtype=acc)
    return z.new_empty((), dtype=acc), z.new_empty(4, dtype=acc), z.new_empty((), dtype=torch.int64), dz


@torch.library.register_fake("ijckd::projected_classifier_loss")
def _(
    u,
    projection,
    projection_bias,
    weight,
    bias,
    labels,
    labels_b,
    mix,
    pooled_t,
    logits_t,
    label_smoothing,
    ce,
    sr,
    fm,
    kl,
    temperature,
    grad,
    dtype,
    gram,
):
    acc = _acc_dtype(u.dtype)
    dz = u.new_empty(u.shape[0] if grad else 0, projection.shape[0], dtype=acc)
    return u.new_empty((), dtype=acc), u.new_empty(4, dtype=acc), u.new_empty((), dtype=torch.int64), dz


_FROZEN_ARGS = ("weight", "bias", "labels", "labels_b", "mix", "pooled_t", "logits_t")


def _refuse_gradients(op: str, trained: str, needs_input_grad: tuple[bool, ...]) -> None:
    """Of what follows the trained arguments."""
    for name, needs in zip(_FROZEN_ARGS, needs_input_grad, strict=False):
        if needs:
            raise RuntimeError(
                f"{op}: {name} must not require grad: the classifier and the teacher are frozen and only {trained} trained; detach it"
            )


def _loss_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    _refuse_gradients("classifier_loss", "z is", ctx.needs_input_grad[1:])
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[3])
    ctx.mark_non_differentiable(*output[1:])


def _loss_backward(ctx, grad_loss, *_):
    _refuse_double_backward("classifier_loss")
    if grad_loss is None:
        return (None,) * 17
    (dz,) = ctx.saved_tensors
    # scaled on the device: asking whether grad_loss is 1 would make the host wait
    return ((dz * grad_loss).to(ctx.dtype), *[None] * 16)


_classifier_loss = _differentiable(_ops.classifier_loss.default, _loss_setup, _loss_backward)


def _projected_loss_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    _refuse_gradients("projected_classifier_loss", "u and its projection are", ctx.needs_input_grad[3:])
    u, projection, projection_bias = inputs[:3]
    ctx.save_for_backward(u, projection, projection_bias, output[3])
    ctx.mark_non_differentiable(*output[1:])


def _projected_loss_backward(ctx, grad_loss, *_):
    _refuse_double_backward("projected_classifier_loss")
    if grad_loss is None:
        return (None,) * 19
    u, projection, projection_bias, dz = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = _ops.connector_linear_grads(dz, grad_loss, None, None, None, u, projection, *needs)
    du, dw, d_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return du, dw, d_bias if d_bias is None else d_bias.to(projection_bias.dtype), *[None] * 16


_projected_classifier_loss = _differentiable(
    _ops.projected_classifier_loss.default, _projected_loss_setup, _projected_loss_backward
)


class BadRows(NamedTuple):
    """How many rows `classifier_loss` could not serve as asked.

    labels     with a label outside [0, K): their loss is NaN
    saturated  with a logit so far above the label's that the softmax left the range of its format: their loss and gradient are finite,
               but too small
    """

    labels: int
    saturated: int


def take_bad_rows(device: torch.device | str | int) -> BadRows:
    """Rows that `classifier_loss` could not serve on `device` since the last call; the count begins anew.

    Waits for the device: call it where the program waits anyway, such as where it logs. On a CPU all are 0: there a label out of
    range is an error at once, and no softmax saturates.
    """
    like = torch.empty(0, device=device)
    _check_library(like, "take_bad_rows")
    return BadRows(*_ops.take_counts(like).tolist())


@torch.library.register_fake("ijckd::take_counts")
def _(like):
    return like.new_empty(len(BadRows._fields), dtype=torch.int64)
