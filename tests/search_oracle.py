"""The head's formulas in float64, in forms that do not cancel, with their gradients by hand: the search's oracle.

Independent of `ijckd_fast.head.reference`, which is what eager PyTorch makes of the same arguments. All arguments are
float64, results too; shapes as in the docstrings of `ijckd_fast.head`.
"""

import torch
from torch import Tensor


def softmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """(p, log p) of rows [B, K]; the largest entry's own exponential, 1, stays out of log1p."""
    top, best = x.max(1, keepdim=True)
    e = (x - top).exp()
    log_sum = e.scatter(1, best, 0.0).sum(1, keepdim=True).log1p()
    log_p = x - top - log_sum
    return log_p.exp(), log_p


def exponential_rest(e: Tensor) -> Tensor:
    """exp(e) - 1 - e, by its series where that cancels."""
    series = e**2 / 2 * (1 + e / 3 * (1 + e / 4 * (1 + e / 5 * (1 + e / 6 * (1 + e / 7)))))
    return torch.where(e.abs() < 0.03, series, torch.expm1(e) - e)


def kl_rows(logits: Tensor, l_t: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(softmax(l_t) || softmax(logits)) [B], softmax(logits) - softmax(l_t) [B, K]).

    difference: logits - l_t up to a constant for each row, more exactly than by subtraction. With r = difference and
    means over p_t: KL = log mean exp(r - mean r), in which nothing cancels.
    """
    p, log_p = softmax(logits)
    p_t, log_p_t = softmax(l_t)
    r = difference - (p_t * difference).sum(1, keepdim=True)
    r = r - (p_t * r).sum(1, keepdim=True)
    kl = (p_t * exponential_rest(r)).sum(1, keepdim=True).log1p()  # [B, 1]
    ratio = r - kl  # log p - log p_t
    near = (p_t * r.abs()).amax(1, keepdim=True) < 1
    near &= r.amax(1, keepdim=True) < 50
    plain = torch.where(p_t > 0, p_t * (log_p_t - log_p), 0).sum(1, keepdim=True)
    gap = torch.where(near & (ratio.abs() < 1), p_t * torch.expm1(ratio), p - p_t)
    return torch.where(near, kl, plain).squeeze(1), gap


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, parts [4] = (CE, SR, FM, KL), 0 where the weight is 0, dloss/dz [B, Ct])"""
    B, K = z.shape[0], weight.shape[0]
    assert B > 0
    shift = 0.0 if bias is None else bias - bias.max()  # of float32 biases, exact
    logits = z @ weight.T + shift  # [B, K], up to one constant, which no loss but the logit match sees
    p, log_p = softmax(logits)
    dlogits = torch.zeros_like(logits)
    parts = z.new_zeros(4)
    dz = torch.zeros_like(z)
    if ce != 0:
        q = torch.zeros_like(logits)
        for chosen, share in ((labels, 1 if mix is None else mix), (labels_b, None if mix is None else 1 - mix)):
            if chosen is not None:
                q[torch.arange(B), chosen] += (1 - label_smoothing) * share
        q += label_smoothing / K
        parts[0] = torch.where(q > 0, -q * log_p, 0).sum() / B
        dlogits += ce / B * (p - q)
    if sr != 0 or kl != 0:
        if logits_t is not None:  # the bias first: what is left of it is exact
            difference = z @ weight.T - (logits_t if bias is None else logits_t - bias)
            l_t = logits_t - logits_t.amax(1, keepdim=True)
        else:
            assert pooled_t is not None
            difference = (z - pooled_t) @ weight.T
            l_t = pooled_t @ weight.T + shift
    if sr != 0:
        parts[1] = difference.square().mean()
        dlogits += 2 * sr / (B * K) * difference
    if fm != 0:
        assert pooled_t is not None
        parts[2] = (z - pooled_t).square().mean()
        dz += 2 * fm / z.numel() * (z - pooled_t)
    if kl != 0:
        T = temperature
        rows, gap = kl_rows(logits / T, l_t / T, difference / T)
        parts[3] = T**2 * rows.sum() / B
        dlogits += kl * T / B * gap
    loss = sum(w * part for w, part in zip((ce, sr, fm, kl), parts, strict=True) if w != 0)
    return torch.as_tensor(loss, dtype=z.dtype), parts, dz + dlogits @ weight


def connector_match(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grad_z: Tensor,
    grad_fm: float,
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
) -> dict[str, Tensor]:
    """z, fm, the running statistics, and the gradients of (z grad_z).sum() + grad_fm fm."""
    if u.dim() == 2:
        u, map_t = u[:, :, None, None], None if map_t is None else map_t[:, :, None, None]
        flat = True
    else:
        flat = False
    B, Ct, P = u.shape[0], weight.shape[0], u.shape[2] * u.shape[3]
    x = u.permute(0, 2, 3, 1).reshape(B * P, -1)  # [B P, Cs]
    center = x.mean(0)
    y = (x - center) @ weight.flatten(1).T  # [B P, Ct], without the part that all positions share
    shared = weight.flatten(1) @ center  # [Ct]
    found = {}
    if bn_weight is not None:
        N = B * P
        if training:
            mean, var = y.mean(0), y.var(0, unbiased=False)
            if running_mean is not None:
                found["running_mean"] = running_mean + momentum * (shared + mean - running_mean)
                found["running_var"] = running_var + momentum * (var * N / (N - 1) - running_var)
        else:
            mean, var = running_mean - shared, running_var
        scale = (var + eps).rsqrt()
        yhat = (y - mean) * scale
        pre = bn_weight * yhat + bn_bias
    else:
        pre = y + shared + (0 if bias is None else bias)
    Z = pre.clamp(min=0) if relu else pre
    z = Z.reshape(B, P, Ct).mean(1)
    found |= {"z": z, "fm": z.new_zeros(())}
    dz, dZ = grad_z, torch.zeros_like(Z)
    if map_t is not None:
        gap = Z - map_t.permute(0, 2, 3, 1).reshape(B * P, Ct)
        found["fm"] = gap.square().mean()
        dZ = 2 * grad_fm / Z.numel() * gap
    elif pooled_t is not None:
        found["fm"] = (z - pooled_t).square().mean()
        dz = dz + 2 * grad_fm / z.numel() * (z - pooled_t)
    dZ = dZ + (dz / P).repeat_interleave(P, 0)
    d_pre = torch.where(pre > 0, dZ, 0) if relu else dZ
    if bn_weight is not None:
        found |= {"d_bn_weight": (d_pre * yhat).sum(0), "d_bn_bias": d_pre.sum(0)}
        d_pre = d_pre * bn_weight * scale
        if training:
            d_pre = d_pre - d_pre.mean(0) - yhat * (d_pre * yhat).mean(0)
    elif bias is not None:
        found["d_bias"] = d_pre.sum(0)
    du = (d_pre @ weight.flatten(1)).reshape(B, u.shape[2], u.shape[3], -1).permute(0, 3, 1, 2)
    found["d_u"] = du[:, :, 0, 0] if flat else du
    # the shared part of x times what d_pre sums to, which is 0 after BatchNorm's own statistics
    total = torch.zeros_like(shared) if bn_weight is not None and training else d_pre.sum(0)
    found["d_weight"] = (d_pre.T @ (x - center) + total[:, None] * center).reshape(weight.shape)
    return found


def projected_classifier_loss(
    u: Tensor, projection: Tensor, projection_bias: Tensor | None, *rest: Tensor | None, **terms
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, parts, gradients of u, projection and projection_bias)"""
    z = u @ projection.T + (0 if projection_bias is None else projection_bias)
    loss, parts, dz = classifier_loss(z, *rest, **terms)
    return loss, parts, dz @ projection, dz.T @ u, dz.sum(0)
