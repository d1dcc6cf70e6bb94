"""Losses between two nets' logits by their published formulas, image by image: nothing of the package takes part.

Of one image [K] each, y its label; `dist_inter` and `dist_intra` of a batch [B, K]; `sdd` and `cat` of one image's
logits or class maps at positions [P, K].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def cells(map_: Tensor, scales: Sequence[int]) -> Tensor:
    """Means of a map [C, H, W] over R x R windows, R the last scale, and for each scale over what it covers of them.

    [P, C], a scale after the other, row by row. Windows overlap where R divides no side: i H / R rounded down to
    (i + 1) H / R rounded up.
    """
    R, made = scales[-1], []
    rows, columns = ([range(i * n // R, -(-(i + 1) * n // R)) for i in range(R)] for n in map_.shape[1:])
    finest = [[torch.stack([map_[:, h, w] for h in hs for w in ws]).mean(0) for ws in columns] for hs in rows]
    for s in scales:
        side = R // s
        for i, j in ((i, j) for i in range(s) for j in range(s)):
            covered = [finest[i * side + a][j * side + b] for a in range(side) for b in range(side)]
            made.append(sum(covered) / len(covered))
    return torch.stack(made)


def sdd(at: Tensor, at_t: Tensor, y: int, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean over positions, the first of them the whole map; those where only one of the two is right count twice."""
    right = [row_t.tolist().index(max(row_t.tolist())) == y for row_t in at_t]
    terms = [loss(a, b) * (2 if here != right[0] else 1) for a, b, here in zip(at, at_t, right, strict=True)]
    return sum(terms) / len(terms)


def cat(at: Tensor, at_t: Tensor, normalised: bool) -> Tensor:
    """Mean square difference of the classes' maps, the columns."""
    total = torch.zeros((), dtype=at.dtype)
    for c, c_t in zip(at.T, at_t.T, strict=True):
        if normalised:
            c, c_t = c / c.dot(c).sqrt(), c_t / c_t.dot(c_t).sqrt()
        total = total + ((c - c_t) ** 2).sum()
    return total / at.numel()
