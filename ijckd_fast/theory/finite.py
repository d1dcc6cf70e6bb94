"""What a student can learn from a teacher over finite domains (Zhao & Zhu, arXiv 2310.07838).

Setting: S inputs drawn from rho, A labels; the teacher pi*(.|s) is the truth. A student sees n pairs (s, a) ~ rho x
pi*, each with

    level 1, hard labels          (s, a)                 learner CE_sgl
    level 2, partial soft labels  (s, a, pi*(a|s))       learners CE_ptl and SEL_ptl
    level 3, soft labels          (s, a, pi*(.|s))       learner CE_ful

and is judged by sum_s rho(s) TV(pi_hat(.|s), pi*(.|s)), TV = half the L1 distance. Arrays are float64 numpy: rho [S],
pi [S, A], counts [R, S, A] int64, one table of counts for each of R repeats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ijckd_fast.errors import UserError

Array = NDArray[np.floating[Any]]
Counts = NDArray[np.int64]
_BLOCK = 2_000_000  # counts drawn at once: about 100 MB with what is made of them


class Instance(NamedTuple):
    """A problem: rho [S], distribution of the inputs; pi [S, A], the teacher's of the labels of each."""

    rho: Array
    pi: Array


def make_instance(number: int, inputs: int, labels: int, n: int) -> Instance:
    """The paper's Instance 0, 1, 2 or 3 with S = inputs, A = labels; 1 to 3 change with the number n of samples.

    0  pi* = half uniform, half on one label; rho uniform
    1  hard for hard labels: pi* = (1 +- 0.25 sqrt(SA/n)) / A in turns; rho uniform. With odd A the last label has no
       mass, the rest is as with A - 1
    2  hard for SEL_ptl: A odd; pi* = S/(n+1), 0, S/(n+1), 0 ... and the rest on the last label; rho uniform
    3  hard for CE_ful: pi* as in 2; rho = 1/(n+1), the rest on the last input
    UserError where these are no probabilities.
    """
    if number not in (0, 1, 2, 3):
        raise UserError(f"unknown instance {number}: expected 0, 1, 2 or 3")
    if inputs < 1 or labels < 2 or n < 1:
        raise UserError(
            f"an instance needs inputs >= 1, labels >= 2 and n >= 1, got {inputs} inputs, {labels} labels, n = {n}"
        )
    S, A = inputs, labels
    rho = np.full(S, 1 / S)
    pi = np.zeros((S, A))
    if number == 0:
        pi += 0.5 / A
        pi[np.arange(S), np.arange(S) % A] += 0.5
        return Instance(rho, pi)
    if number == 1:
        used = A - A % 2
        if 4 * n < S * used:
            raise UserError(
                f"instance 1 needs n >= SA/4 = {S * used / 4:g} with {S} inputs and {used} labels, got n = {n}: give a "
                "greater size"
            )
        by = 0.25 * math.sqrt(S * used / n)
        pi[:, 0:used:2], pi[:, 1:used:2] = (1 + by) / used, (1 - by) / used
        return Instance(rho, pi)
    if A % 2 == 0 or A < 3:
        raise UserError(f"instance {number} needs an odd number of labels, 3 or more, got {A}: give {max(A + 1, 3)}")
    least = S * (A - 1) / 2 - 1
    if n < least:
        raise UserError(
            f"instance {number} needs n >= S(A-1)/2 - 1 = {least:g} with {S} inputs and {A} labels, got n = {n}: give "
            "a greater size"
        )
    pi[:, 0 : A - 1 : 2] = S / (n + 1)
    pi[:, -1] = 1 - S * (A - 1) / 2 / (n + 1)
    if number == 3:
        if S < 2 or n < S - 1:
            raise UserError(f"instance 3 needs 2 inputs or more and n >= S - 1, got {S} inputs and n = {n}")
        rho[:-1] = 1 / (n + 1)
        rho[-1] = 1 - (S - 1) / (n + 1)
    return Instance(rho, pi)


def draw_counts(instance: Instance, n: int, repeats: int, generator: np.random.Generator) -> Counts:
    """How often each pair was drawn among n; [repeats, S, A], each table's sum is n."""
    of_inputs = generator.multinomial(n, instance.rho, size=repeats)  # [R, S]
    return generator.multinomial(of_inputs, instance.pi)


# ---- Learners: minimisers of the losses in closed form, from counts [R, S, A] and what their level shows of pi [S, A]
# ---- An input never drawn gets the uniform distribution from all of them.


def ce_sgl(counts: Counts, pi: Array) -> Array:
    """Minimises -sum log pi(a|s) over hard labels: shares of the counts. [R, S, A]; never looks at pi."""
    total = counts.sum(axis=-1, keepdims=True)
    return _or_uniform(counts / np.maximum(total, 1), total)


def ce_ptl(counts: Counts, pi: Array) -> Array:
    """Minimises -sum pi*(a|s) log pi(a|s) over the labels drawn: in proportion to count x pi*. [R, S, A]

    Tends to pi*^2 / sum pi*^2, not to pi*: see `ce_ptl_bias`.
    """
    weighted = counts * pi
    total = weighted.sum(axis=-1, keepdims=True)
    return _or_uniform(weighted / np.where(total > 0, total, 1), counts.sum(axis=-1, keepdims=True))


def sel_ptl(counts: Counts, pi: Array) -> Array:
    """Minimises sum (log pi(a|s) - log pi*(a|s))^2 / 2 over the labels drawn: pi* on each of them. [R, S, A]

    The loss leaves open where the rest of the mass goes; it is spread evenly over the labels not yet seen with this
    input.
    """
    seen = counts > 0
    known = np.where(seen, pi, 0)
    unseen = (~seen).sum(axis=-1, keepdims=True)
    rest = np.maximum(1 - known.sum(axis=-1, keepdims=True), 0) / np.maximum(unseen, 1)
    return _or_uniform(np.where(seen, pi, rest), counts.sum(axis=-1, keepdims=True))


def ce_ful(counts: Counts, pi: Array) -> Array:
    """Minimises -sum_a pi*(a|s) log pi(a|s) over the inputs drawn: pi* itself. [R, S, A]"""
    return _or_uniform(np.broadcast_to(pi, counts.shape), counts.sum(axis=-1, keepdims=True))


def _or_uniform(estimate: Array, drawn: Counts) -> Array:
    return np.where(drawn > 0, estimate, 1 / estimate.shape[-1])


LEARNERS: dict[str, Callable[[Counts, Array], Array]] = {
    "CE_sgl": ce_sgl,
    "CE_ptl": ce_ptl,
    "SEL_ptl": sel_ptl,
    "CE_ful": ce_ful,
}


def risk(estimate: Array, instance: Instance) -> Array:
    """sum_s rho(s) TV(estimate(.|s), pi*(.|s)) for estimates [R, S, A]; [R]"""
    return 0.5 * np.abs(estimate - instance.pi).sum(axis=-1) @ instance.rho


def risks(instance: Instance, n: int, repeats: int, generator: np.random.Generator) -> dict[str, Array]:
    """Risk of every learner in each repeat, all on the same draws: name -> [repeats].

    Drawn in blocks, so that the memory has a bound.
    """
    block = max(1, _BLOCK // instance.pi.size)
    found: dict[str, list[Array]] = {name: [] for name in LEARNERS}
    for first in range(0, repeats, block):
        counts = draw_counts(instance, n, min(block, repeats - first), generator)
        for name, learner in LEARNERS.items():
            found[name].append(risk(learner(counts, instance.pi), instance))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def slope(sizes: Array, means: Array, errors: Array) -> tuple[float, float]:
    """Slope of log(mean risk) over log(n) by least squares, and its standard error by the delta method.

    sizes, means, errors  [m], m >= 2: numbers of samples, mean risks > 0, their standard errors
    """
    x = np.log(sizes)
    if len(x) < 2 or np.ptp(x) == 0:
        raise UserError(f"a slope needs two different sizes, got {', '.join(f'{size:g}' for size in sizes)}")
    weights = (x - x.mean()) / np.sum((x - x.mean()) ** 2)  # slope = weights . log(means)
    return float(weights @ np.log(means)), float(np.linalg.norm(weights * errors / means))


# ---- What the learners' expected risks are ----


def ce_sgl_risk(instance: Instance, n: int) -> float:
    """E risk of CE_sgl, exactly.

    De Moivre's mean absolute deviation of a binomial, summed over how often an input is drawn:
    E|X - mp| = 2 v C(m, v) p^v (1-p)^(m-v+1) for X ~ Bin(m, p), v = floor(mp) + 1 (our derivation of the sum).
    """
    total, A = 0.0, instance.pi.shape[1]
    rows = np.concatenate([instance.rho[:, None], instance.pi], axis=1)
    for row, times in zip(*np.unique(rows, axis=0, return_counts=True), strict=True):
        rho, of_labels = row[0], row[1:]
        spread = 12 * math.sqrt(n * rho * (1 - rho)) + 40  # what lies beyond has less than a rounding's probability
        m = np.arange(max(0, math.floor(n * rho - spread)), min(n, math.ceil(n * rho + spread)) + 1)
        probability = np.exp(_log_binomial(n, m, rho))  # [m], of m draws of this input
        for p, labels in zip(*np.unique(of_labels, return_counts=True), strict=True):
            v = np.floor(m * p) + 1
            with np.errstate(divide="ignore"):
                deviation = 2 * v * (1 - p) * np.exp(_log_binomial(m, v, p)) / np.maximum(m, 1)
            deviation = np.where(m == 0, abs(1 / A - p), deviation)
            total += 0.5 * times * labels * rho * float(probability @ deviation)
    return total


def _log_binomial(m: NDArray[Any] | int, k: NDArray[Any], p: float) -> Array:
    """log P[Bin(m, p) = k]; -inf where k > m or the probability is 0."""
    m, k = np.broadcast_arrays(np.asarray(m, dtype=np.float64), np.asarray(k, dtype=np.float64))
    inside = k <= m
    left = np.where(inside, m - k, 0)
    hits = k * math.log(p) if p > 0 else np.where(k > 0, -np.inf, 0.0)
    misses = left * math.log1p(-p) if p < 1 else np.where(left > 0, -np.inf, 0.0)
    log_factorial = np.vectorize(math.lgamma, otypes=[np.float64])
    return np.where(
        inside, log_factorial(m + 1) - log_factorial(k + 1) - log_factorial(left + 1) + hits + misses, -np.inf
    )


def ce_ful_risk(instance: Instance, n: int) -> float:
    """E risk of CE_ful, exactly: sum_s rho(s) (1 - rho(s))^n TV(uniform, pi*(.|s)), from the inputs never drawn."""
    unseen, rho, away = _unseen(instance, n)
    return float(unseen @ (rho * away))


def ce_ful_error(instance: Instance, n: int, repeats: int) -> float:
    """Standard error, at most, of CE_ful's mean risk over the repeats; counts events too rare to be seen in them."""
    unseen, rho, away = _unseen(instance, n)
    return math.sqrt(float((unseen * (1 - unseen)) @ (rho * away) ** 2) / repeats)


def _unseen(instance: Instance, n: int) -> tuple[Array, Array, Array]:
    away = 0.5 * np.abs(1 / instance.pi.shape[1] - instance.pi).sum(axis=-1)  # [S], TV(uniform, pi*(.|s))
    return (1 - instance.rho) ** n, instance.rho, away


def missing_mass(instance: Instance, n: int) -> float:
    """E of the probability of all pairs (s, a) never drawn: sum rho pi* (1 - rho pi*)^n.

    It is at least the risk of SEL_ptl and of CE_ful.
    """
    joint = instance.rho[:, None] * instance.pi
    return float((joint * (1 - joint) ** n).sum())


def ce_ptl_bias(instance: Instance) -> float:
    """Risk that CE_ptl tends to with n: that of pi*^2 / sum pi*^2.

    It is 0 only where each pi*(.|s) is uniform on its labels.
    """
    squared = instance.pi**2
    return float(risk((squared / squared.sum(axis=-1, keepdims=True))[None], instance)[0])


def sel_ptl_risk_on_instance_2(inputs: int, labels: int, n: int) -> float:
    """E risk of SEL_ptl on Instance 2 but for a share of order A/n (our derivation).

    Of the m = (A-1)/2 labels of probability S/(n+1), k ~ Bin(m, (1 - 1/(n+1))^n) are unseen, with m labels of
    probability 0. Their mass is spread over all k + m: TV = S/(n+1) k m / (k + m). n times this tends to S E[k m / (k +
    m)], k ~ Bin(m, 1/e).
    """
    m = (labels - 1) // 2
    k = np.arange(m + 1)
    probability = np.exp(_log_binomial(m, k, (1 - 1 / (n + 1)) ** n))
    return float(probability @ (k * m / (k + m))) * inputs / (n + 1)
