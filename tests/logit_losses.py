"""Losses between two nets' logits by their published formulas, image by image: nothing of the package takes part.

Of one image [K] each, y its label; `dist_inter` and `dist_intra` of a batch [B, K].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def z_score(row: Tensor) -> Tensor:
    deviations = row - sum(row) / len(row)
    return deviations / ((deviations**2).sum() / (len(row) - 1)).sqrt().add(1e-7)


def kl(row: Tensor, row_t: Tensor, T: float) -> Tensor:
    p, p_t = (row / T).softmax(0), (row_t / T).softmax(0)
    return T**2 * (p_t * (p_t / p).log()).sum()


def hard(row: Tensor, row_t: Tensor) -> Tensor:
    return -row.softmax(0)[row_t.tolist().index(max(row_t.tolist()))].log()


def ttm(row: Tensor, row_t: Tensor, power: float) -> Tensor:
    p, transformed = row.softmax(0), row_t.softmax(0) ** power
    q = transformed / transformed.sum()
    return (q * (q / p).log()).sum()


def wttm(row: Tensor, row_t: Tensor, power: float) -> Tensor:
    return (row_t.softmax(0) ** power).sum() * ttm(row, row_t, power)


def others(row: Tensor, y: int) -> Tensor:
    """Without its column y."""
    return torch.cat([row[:y], row[y + 1 :]])


def nkd(row: Tensor, row_t: Tensor, y: int, gamma: float, T: float) -> Tensor:
    target = row_t.softmax(0)[y] * row.softmax(0)[y].log()
    rest = ((others(row_t, y) / T).softmax(0) * (others(row, y) / T).softmax(0).log()).sum()
    return -target - gamma * T**2 * rest


def dkd(row: Tensor, row_t: Tensor, y: int, alpha: float, beta: float, T: float) -> Tensor:
    """Probabilities of target and rest; the rest's own distribution after taking the target's column out."""
    p, p_t = (row / T).softmax(0)[y], (row_t / T).softmax(0)[y]
    tckd = F.kl_div(torch.stack([p, 1 - p]).log(), torch.stack([p_t, 1 - p_t]), reduction="sum")
    nckd = F.kl_div((others(row, y) / T).log_softmax(0), (others(row_t, y) / T).softmax(0), reduction="sum")
    return T**2 * (alpha * tckd + beta * nckd)


def pearson(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - sum(a) / len(a), b - sum(b) / len(b)
    return a.dot(b) / (a.dot(a) * b.dot(b)).sqrt()


def dist_inter(logits: Tensor, logits_t: Tensor, T: float) -> Tensor:
    pairs = zip((logits / T).softmax(1), (logits_t / T).softmax(1), strict=True)
    return T**2 * (1 - torch.stack([pearson(a, b) for a, b in pairs]).mean())


def dist_intra(logits: Tensor, logits_t: Tensor, T: float) -> Tensor:
    pairs = zip((logits / T).softmax(1).T, (logits_t / T).softmax(1).T, strict=True)
    return T**2 * (1 - torch.stack([pearson(a, b) for a, b in pairs]).mean())
