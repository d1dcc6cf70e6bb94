"""Loss and gradients in one call, for training loops of one's own that do without autograd in the head.

The same ops, checks and numbers as those of connector.py and classifier.py followed by `loss.backward()`, to the bit,
without autograd's graph and engine, which take most of the host's time for small heads. Nothing is recorded: the
gradients are plain tensors, to be put into `.grad` or into `torch.autograd.backward(u, grad_u)` of the student's trunk.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ijckd_fast.head.classifier import LossTerms, of_features, of_projected, projected_operands, refuse_trained
from ijckd_fast.head.connector import Norm, connector_match, match_by, matched
from ijckd_fast.head.dispatch import UNSCALED, autocast_dtype, check_library, own_products


class LossAndGrad(NamedTuple):
    """What `classifier_loss_and_grad` returns: `classifier_loss`'s three, and the gradient of `loss`."""

    loss: Tensor  # []
    parts: Tensor  # [8]
    top1: Tensor  # [] int64
    grad: Tensor  # [B, Ct], dtype of z


class ProjectedLossAndGrads(NamedTuple):
    """What `projected_classifier_loss_and_grads` returns: `projected_classifier_loss`'s three, and the gradients of
    `loss`, each of the shape and dtype of its argument.
    """

    loss: Tensor  # []
    parts: Tensor  # [8]
    top1: Tensor  # [] int64
    grad_u: Tensor | None  # [B, Cs]
    grad_projection: Tensor  # [Ct, Cs]
    grad_projection_bias: Tensor | None  # [Ct]


class ConnectorLossAndGrads(NamedTuple):
    """What `connector_loss_and_grads` returns; the gradients by the names that `connector_match` gives its arguments,
    each of the shape and dtype of its argument.
    """

    loss: Tensor  # []
    parts: Tensor  # [8]
    top1: Tensor  # [] int64
    z: Tensor  # [B, Ct]
    fm: Tensor  # [], the connector's match
    grads: dict[str, Tensor]  # u, weight, and bias, bn_weight, bn_bias where they are given


def classifier_loss_and_grad(
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
    scale: Tensor | None = None,
) -> LossAndGrad:
    """`classifier_loss` and dloss/dz, which it makes in its forward pass anyway.

    scale     [], floating, or None: what the gradient is multiplied by, as `(loss * scale).backward()` would, for
              loss scaling with float16; the loss that is returned is not
    the rest  as for `classifier_loss`: shapes, dtypes, autocast, empty batches, errors
    """
    op = "classifier_loss"
    check_library(z, op)
    tensors, numbers = LossTerms(
        weight, bias, labels, labels_b, mix, pooled_t, logits_t, gram, ce, sr, fm, kl, temperature, label_smoothing,
        hard, ttm, wttm, nkd, ttm_power, nkd_gamma, standardize,
    ).packed()  # fmt: skip
    refuse_trained(op, tensors, "z is")
    with torch.no_grad():
        with own_products(z):
            (loss, parts, top1, _), backward = of_features.at_once(
                (True,), z, tensors, numbers, True, autocast_dtype(z)
            )
        (grad,) = backward(UNSCALED if scale is None else scale)
        assert grad is not None
        return LossAndGrad(loss, parts, top1, grad)


def projected_classifier_loss_and_grads(
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
    scale: Tensor | None = None,
    need_grad_u: bool = True,
) -> ProjectedLossAndGrads:
    """`projected_classifier_loss` and its gradients with respect to u, projection and projection_bias.

    scale        [], floating, or None: what the gradients are multiplied by, as for `classifier_loss_and_grad`
    need_grad_u  False: grad_u is None, and not computed, as where the trunk is frozen
    the rest     as for `projected_classifier_loss`: shapes, dtypes, autocast, empty batches, errors
    """
    of_u, of_projection = u.dtype, projection.dtype
    with torch.no_grad():
        u, projection, dtype = projected_operands(u, projection)
        tensors, numbers = LossTerms(
            weight, bias, labels, labels_b, mix, pooled_t, logits_t, gram, ce, sr, fm, kl, temperature, label_smoothing,
            hard, ttm, wttm, nkd, ttm_power, nkd_gamma, standardize,
        ).packed()  # fmt: skip
        refuse_trained("projected_classifier_loss", tensors, "u and its projection are")
        needs = (need_grad_u, True, projection_bias is not None)
        with own_products(u):
            (loss, parts, top1, *_), backward = of_projected.at_once(
                needs, u, projection, projection_bias, tensors, numbers, True, dtype
            )
            du, dprojection, dbias = backward(UNSCALED if scale is None else scale)
        assert dprojection is not None
        if du is not None:
            du = _as(du, of_u)
        return ProjectedLossAndGrads(loss, parts, top1, du, _as(dprojection, of_projection), dbias)


def connector_loss_and_grads(
    u: Tensor,
    projection: Tensor,
    connector: Mapping[str, Any],
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    match: float = 1.0,
    scale: Tensor | None = None,
    need_grad_u: bool = True,
    **terms: Any,
) -> ConnectorLossAndGrads:
    """`connector_match` with `classifier_loss` on its z, and the gradients of both:

    z, fm = connector_match(u, projection, **connector)
    loss = classifier_loss(z, weight, bias, labels, **terms) + match fm

    u, projection  as u and weight of `connector_match`; running statistics are updated as there
    connector      `connector_match`'s keywords: bias, BatchNorm's, relu, map_t or pooled_t; not process_group
    match          weight of fm in the loss, where there is a match
    scale          [], floating, or None: what the gradients are multiplied by, as for `classifier_loss_and_grad`
    need_grad_u    False: there is no gradient of u, and it is not computed
    weight, bias, labels, terms  as for `classifier_loss`
    raises         RuntimeError as the two ops; TypeError for a keyword that they do not have
    """
    given = _connector_arguments(connector)
    norm, map_t, pooled_t = given["norm"], given["map_t"], given["pooled_t"]
    trained = {"u": u, "weight": projection, "bias": given["bias"], "bn_weight": norm.weight, "bn_bias": norm.bias}
    for name, x in {"map_t": map_t, "pooled_t": pooled_t}.items():
        if isinstance(x, Tensor) and x.requires_grad:
            raise RuntimeError(f"connector_match: {name} must not require grad (the teacher is frozen); detach it")
    needs = (need_grad_u, *(x is not None for x in list(trained.values())[1:]))
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None

    def enter(*args: Any) -> tuple[Tensor, ...]:
        nonlocal backward
        output, backward = matched.at_once(needs, *args)
        return output

    with torch.no_grad():
        z, fm = match_by(enter, u, projection, process_group=None, **given)
        assert backward is not None
        loss, parts, top1, grad_z = classifier_loss_and_grad(z, weight, bias, labels, scale=scale, **terms)
        grad_fm = None
        if map_t is not None or pooled_t is not None:
            loss = loss + (fm if match == 1 else match * fm)
            grad_fm = torch.full_like(fm, match) if scale is None else (match * scale).to(fm.dtype)
        grads = {}
        for (name, x), grad in zip(trained.items(), backward(grad_z, grad_fm), strict=False):
            if grad is None or x is None:
                continue
            if name == "u" and u.dim() == 4:  # from rows [B, P, Cs]
                grad = grad.transpose(1, 2)
            grads[name] = _as(grad.reshape(x.shape), x.dtype)
        return ConnectorLossAndGrads(loss, parts, top1, z, fm, grads)


# connector_match's keywords and what they are where they are not given
_KEYWORDS = {
    name: parameter.default
    for name, parameter in inspect.signature(connector_match).parameters.items()
    if name not in ("u", "weight", "process_group")
}


def _connector_arguments(connector: Mapping[str, Any]) -> dict[str, Any]:
    """`match_by`'s, of some of `connector_match`'s keywords."""
    if unknown := sorted(connector.keys() - _KEYWORDS.keys()):
        raise TypeError(
            f"connector_loss_and_grads: connector must hold keywords of connector_match ({', '.join(_KEYWORDS)}), "
            f"got {', '.join(unknown)}"
        )
    given = {**_KEYWORDS, **connector}
    norm = Norm(
        *(given.pop(f"bn_{name}") for name in ("weight", "bias")),
        *(given.pop(name) for name in ("running_mean", "running_var", "num_batches_tracked", "momentum")),
    )
    return {"norm": norm, **given}


def _as(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad if grad.dtype == dtype else grad.to(dtype)
