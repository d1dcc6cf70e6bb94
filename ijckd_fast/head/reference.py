"""The oracle: the fused ops in plain PyTorch, same names and signatures as `ijckd_fast.head`, never tuned.

Selected by a test or by `--head reference`; never a silent fallback. Imports nothing of ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor


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
    """Contract: `ijckd_fast.head.connector_match`. Method: Z = g(F_s), z = GAP(Z), D(Z or z, F_t or h_t)."""
    acc = torch.float64 if u.dtype == torch.float64 else torch.float32
    x = u[:, :, None, None] if u.dim() == 2 else u  # [B, Cs, H, W]
    y = F.conv2d(x, weight.reshape(weight.shape[0], weight.shape[1], 1, 1)).to(acc)  # [B, Ct, H, W]
    if bias is not None:
        y = y + bias.to(acc)[:, None, None]
    if bn_weight is not None:
        if training and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if momentum is None:  # the mean over all batches, as torch's BatchNorm takes it; 0 where nothing is averaged
            if training and num_batches_tracked is None and running_mean is not None:
                raise RuntimeError(
                    "connector_match: momentum None takes the mean over all batches and needs num_batches_tracked, got "
                    "None: give it, or a number as momentum"
                )
            momentum = 1 / float(num_batches_tracked) if training and num_batches_tracked is not None else 0.0
        if training and process_group is not None:
            y = _sync_batch_norm(y, running_mean, running_var, bn_weight, bn_bias, momentum, eps, process_group)
        else:
            y = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    Z = F.relu(y) if relu else y  # [B, Ct, H, W]
    z = Z.mean((2, 3))  # [B, Ct]
    if map_t is not None:
        fm = (Z - map_t.to(acc).reshape(Z.shape)).square().mean()
    elif pooled_t is not None:
        fm = (z - pooled_t.to(acc)).square().mean()
    else:
        fm = z.new_zeros(())
    return z, fm


def _sync_batch_norm(y, running_mean, running_var, bn_weight, bn_bias, momentum, eps, group):
    """BatchNorm whose mean and variance are taken over the maps of every rank in `group` (ranks may differ in B)."""
    local = torch.cat([y.sum((0, 2, 3)), y.square().sum((0, 2, 3)), y.new_tensor([y.numel() / y.shape[1]])])
    total = dist_nn.all_reduce(local, group=group)
    Ct = y.shape[1]
    n = total[-1]
    mean = total[:Ct] / n
    var = total[Ct : 2 * Ct] / n - mean.square()
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * n / (n - 1)).to(running_var.dtype), momentum)
    yhat = (y - mean[:, None, None]) * torch.rsqrt(var + eps)[:, None, None]
    return yhat * bn_weight[:, None, None] + bn_bias[:, None, None]


def _needed(x: Tensor | None, arg: str, op: str = "classifier_loss") -> Tensor:
    if x is None:
        raise RuntimeError(f"{op}: these weights need {arg}")
    return x


def _check_gram(gram: Tensor | None, Ct: int) -> None:
    if gram is None:
        return
    contiguous = gram.layout == torch.strided and gram.is_contiguous()
    if gram.dtype != torch.bfloat16 or list(gram.shape) != [2, Ct, Ct] or not contiguous:
        raise RuntimeError(
            "classifier_loss: gram must be what classifier_gram makes of this weight, contiguous bfloat16 [2, Ct, Ct] ="
            f" {[2, Ct, Ct]}, got {'' if contiguous else 'non-contiguous '}{str(gram.dtype).removeprefix('torch.')} "
            f"{list(gram.shape)}: give classifier_gram(weight), or None"
        )


def _check_numbers(op: str, weights: dict[str, float], temperature: float) -> None:
    for name, value in weights.items():
        if not math.isfinite(value):
            raise RuntimeError(f"{op}: the weight {name} must be a finite number, got {value:g}")
    if not temperature > 0:
        raise RuntimeError(f"{op}: temperature must be > 0, got {temperature:g}")
    if temperature == math.inf:
        raise RuntimeError(f"{op}: temperature must be finite, got {temperature:g}")


def _check_labels(label_smoothing: float, mix: Tensor | None) -> None:
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"classifier_loss: label_smoothing must lie in [0, 1], got {label_smoothing:g}")
    if mix is not None and mix.is_cpu:  # elsewhere the host would have to wait
        for position, share in enumerate(mix.tolist()):
            if math.isfinite(share) and not 0 <= share <= 1:
                raise RuntimeError(f"classifier_loss: mix must lie in [0, 1], got {share:g} at position {position}")


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
    """Contract: `ijckd_fast.head.classifier_loss`.

    Method: L = ce CE + sr ||l - l_t||^2/(B K) + fm ||z - h_t||^2/(B Ct) + kl T^2 KL. l_t is logits_t where that is
    given, also beside pooled_t. `gram` is a short cut, not taken here.
    """
    acc = torch.float64 if z.dtype == torch.float64 else torch.float32
    _check_gram(gram, weight.shape[1])
    weights = {"ce": ce, "sr": sr, "fm": fm, "kl": kl, "hard": hard, "ttm": ttm, "wttm": wttm, "nkd": nkd}
    _check_numbers("classifier_loss", weights, temperature)
    _check_labels(label_smoothing, mix)
    logits = F.linear(z.to(weight.dtype), weight, bias).to(acc)  # [B, K]
    if logits_t is None and pooled_t is not None:
        logits_t = F.linear(pooled_t.to(weight.dtype), weight, bias)
    zero = logits.new_zeros(())

    ce_part = zero
    if ce != 0:
        rows = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)  # [B]
        if labels_b is not None:
            rows_b = F.cross_entropy(logits, labels_b, reduction="none", label_smoothing=label_smoothing)
            share = _needed(mix, "mix").to(acc)
            rows = share * rows + (1 - share) * rows_b
        ce_part = rows.mean()
    sr_part = (logits - _needed(logits_t, "pooled_t or logits_t").to(acc)).square().mean() if sr != 0 else zero
    fm_part = (z.to(acc) - _needed(pooled_t, "pooled_t").to(acc)).square().mean() if fm != 0 else zero
    kl_part = hard_part = ttm_part = wttm_part = nkd_part = zero
    if kl != 0 or hard != 0 or ttm != 0 or wttm != 0 or nkd != 0:
        given = logits_t = _needed(logits_t, "pooled_t or logits_t").to(acc)
        soft = logits
        if standardize:
            soft, logits_t = _standardised(logits), _standardised(logits_t)
        log_p_t = F.log_softmax(logits_t / temperature, dim=1)
        if kl != 0:
            kl_part = temperature**2 * _kl_rows(F.log_softmax(soft / temperature, dim=1), log_p_t).mean()
        if hard != 0:
            hard_part = F.cross_entropy(logits, given.argmax(1))
        if ttm != 0 or wttm != 0:
            softened = F.log_softmax(ttm_power * logits_t, dim=1)
            rows = _kl_rows(F.log_softmax(soft, dim=1), softened)  # [B]
            mass = F.softmax(logits_t, 1).pow(ttm_power).sum(1)  # [B]
            ttm_part, wttm_part = rows.mean() if ttm != 0 else zero, (mass * rows).mean() if wttm != 0 else zero
        if nkd != 0:
            rows = _nkd_rows(soft, logits_t, labels, temperature, nkd_gamma)
            if labels_b is not None:
                share = _needed(mix, "mix").to(acc)
                rows = share * rows + (1 - share) * _nkd_rows(soft, logits_t, labels_b, temperature, nkd_gamma)
            nkd_part = rows.mean()

    parts = torch.stack([ce_part, sr_part, fm_part, kl_part, hard_part, ttm_part, wttm_part, nkd_part])
    loss = sum((w * part for w, part in zip(weights.values(), parts, strict=True) if w != 0), start=zero)
    parts = parts.detach()
    top1 = (logits.detach().argmax(1) == labels).sum()
    return loss, parts, top1


def _kl_rows(log_p: Tensor, log_p_t: Tensor) -> Tensor:
    """[B, K], [B, K] -> [B]"""
    return F.kl_div(log_p, log_p_t, reduction="none", log_target=True).sum(1)


def _standardised(logits: Tensor) -> Tensor:
    from_mean = logits - logits.mean(1, keepdim=True)
    return from_mean / (logits.std(1, keepdim=True) + 1e-7) if logits.shape[1] > 1 else from_mean


def _nkd_rows(logits: Tensor, logits_t: Tensor, labels: Tensor, temperature: float, gamma: float) -> Tensor:
    """[B, K], [B, K], [B] -> [B]"""
    label = labels[:, None]
    own = -F.softmax(logits_t, 1).gather(1, label) * F.log_softmax(logits, 1).gather(1, label)
    others = torch.arange(logits.shape[1], device=logits.device) != label  # [B, K]
    log_s, log_t = (
        F.log_softmax(x[others].view(len(x), x.shape[1] - 1) / temperature, 1) for x in (logits, logits_t)
    )  # [B, K - 1]
    return own[:, 0] - gamma * temperature**2 * (log_t.exp() * log_s).sum(1)


def projected_classifier_loss(
    u: Tensor,
    projection: Tensor,
    projection_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    **terms: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contract: `ijckd_fast.head.projected_classifier_loss`; terms: classifier_loss's keywords."""
    z, _ = connector_match(u, projection, projection_bias, relu=False)  # [B, Ct]
    return classifier_loss(z, weight, bias, labels, **terms)


def pooled_positions(maps: Tensor, scales: Sequence[int] = (1, 2, 4)) -> Tensor:
    """Contract: `ijckd_fast.head.pooled_positions`."""
    finest = F.adaptive_avg_pool2d(maps if maps.dtype == torch.float64 else maps.float(), scales[-1])  # [B, C, R, R]
    return torch.cat([F.adaptive_avg_pool2d(finest, s).flatten(2) for s in scales], 2).transpose(1, 2)  # [B, P, C]


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
    """Contract: `ijckd_fast.head.class_map_loss`.

    Method: x, x_t the pooled positions; L = kl mean(w T^2 KL) + mean(w DKD) + cam mean(|c / |c| - c_t / |c_t||^2), of
    l = W x + b at every position and c = W x at those of the last scale.
    """
    weights = {"kl": kl, "dkd_alpha": dkd_alpha, "dkd_beta": dkd_beta, "cam": cam}
    _check_numbers("class_map_loss", weights, temperature)
    x, x_t = (each if each.dim() == 3 else pooled_positions(each, scales) for each in (maps, maps_t))  # [B, P, Ct]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    B, P = x.shape[:2]
    shares = x.new_ones(B, dtype=acc) if share is None else share.to(acc)

    def through(features: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(features.to(weight.dtype), weight, bias).to(acc)  # [B, ., K]

    kl_part = dkd_part = cam_part = shares.new_zeros(())
    if kl != 0 or dkd_alpha != 0 or dkd_beta != 0:
        labels = _needed(labels, "labels", "class_map_loss")
        logits, logits_t = through(x, bias).flatten(0, 1), through(x_t.detach(), bias).flatten(0, 1)  # [B P, K]
        right = logits_t.view(B, P, -1).argmax(2) == labels[:, None]  # [B, P]
        counts = (shares[:, None] * torch.where(right == right[:, :1], 1.0, 2.0).to(acc)).flatten()
        if kl != 0:
            log_p, log_p_t = (F.log_softmax(each / temperature, 1) for each in (logits, logits_t))
            kl_part = temperature**2 * (counts * _kl_rows(log_p, log_p_t)).mean()
        if dkd_alpha != 0 or dkd_beta != 0:
            tckd, nckd = _dkd_rows(logits, logits_t, labels.repeat_interleave(P), temperature)
            dkd_part = temperature**2 * (counts * (dkd_alpha * tckd + dkd_beta * nckd)).mean()
    if cam != 0:
        last = scales[-1] ** 2
        c, c_t = (F.normalize(through(each[:, -last:], None), dim=1) for each in (x, x_t.detach()))  # [B, R R, K]
        cam_part = (shares[:, None, None] * (c - c_t).square()).mean()

    terms = ((kl, kl_part), (1.0, dkd_part), (cam, cam_part))
    loss = sum((w * part for w, part in terms if w != 0), start=shares.new_zeros(()))
    return loss, torch.stack([kl_part, dkd_part, cam_part]).detach()


def _dkd_rows(logits: Tensor, logits_t: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(TCKD, NCKD) of every row: [N, K], [N, K], [N] -> [N] each"""
    if logits.shape[1] == 1:  # there are no others
        return 0 * logits[:, 0], 0 * logits[:, 0]
    label = labels[:, None]
    others = torch.arange(logits.shape[1], device=logits.device) != label  # [N, K]

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x / temperature
        rest = x[others].view(len(x), x.shape[1] - 1)
        # log p_y and log (1 - p_y)
        target = torch.cat([x.gather(1, label), rest.logsumexp(1, keepdim=True)], 1) - x.logsumexp(1, keepdim=True)
        return target, F.log_softmax(rest, 1)

    (target, rest), (target_t, rest_t) = split(logits), split(logits_t)
    return _kl_rows(target, target_t), _kl_rows(rest, rest_t)
