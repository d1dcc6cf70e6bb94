"""Distilling a linear teacher into a linear or deep-linear student (Phuong & Lampert, arXiv 2105.13093).

Setting: inputs x in R^d; the teacher w* [d] gives soft labels sigmoid(w*.x). The student, sigmoid(w.x) with w a vector
or a product of matrices, minimises the mean cross-entropy to them by gradient flow; it never sees a true label. What
counts is the transfer risk R(w) = P_x[(w*.x)(w.x) < 0]. A hard-label student sees sign(w*.x) instead.

Arrays are float64 numpy. Inputs are rows, `x [..., n, d]`, in general position (independent where n <= d); leading axes
are independent data sets. Angles are in radians. Where the paper's own wording is not at hand, the statement is proved
here or in docs/theory.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ijckd_fast.errors import UserError

Array = NDArray[np.floating[Any]]
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(400)  # of [-1, 1]


# ---- Students ----


def distilled_student(x: Array, teacher: Array, start: Array | None = None) -> Array:
    """Where gradient flow on the teacher's soft labels ends.

    x        [..., n, d]
    teacher  [d], w*
    start    [..., d], w(0); default 0
    returns  [..., d]: w* where n >= d; else the projection of w* on the span of the inputs, plus what w(0) has outside
             it
    Every gradient lies in the span of the inputs, and there the loss is strictly convex with its minimum where the
    logits are the teacher's. What the start has outside the span is therefore kept for ever: only a start at 0 ends at
    the projection. UserError if n < d and the inputs are linearly dependent.
    """
    n, d = x.shape[-2:]
    if n >= d:
        return np.broadcast_to(teacher, (*x.shape[:-2], d)).copy()
    student = projection(x, teacher)
    return student if start is None else student + start - projection(x, start)


def hard_label_student(x: Array, labels: Array) -> Array:
    """Least squares on hard labels; where the inputs do not determine it (n < d), the solution of least norm.

    x [..., n, d], labels [..., n], -1 or 1; returns [..., d]
    UserError if the inputs are linearly dependent (n <= d) or do not span R^d (n > d).
    """
    n, d = x.shape[-2:]
    if n < d:
        q, r = _qr(np.swapaxes(x, -1, -2))  # x^T = q r, [..., d, n] and [..., n, n]
        return (q @ np.linalg.solve(np.swapaxes(r, -1, -2), labels[..., None]))[..., 0]
    q, r = _qr(x)  # [..., n, d], [..., d, d]
    return np.linalg.solve(r, np.swapaxes(q, -1, -2) @ labels[..., None])[..., 0]


def projection(x: Array, w: Array) -> Array:
    """Orthogonal projection [..., d] of w [..., d] on the span of the inputs x [..., n, d].

    raises  UserError if they are linearly dependent
    """
    if x.shape[-2] >= x.shape[-1]:
        return np.broadcast_to(w, (*x.shape[:-2], x.shape[-1])).copy()
    q, _ = _qr(np.swapaxes(x, -1, -2))  # [..., d, n]
    return (q @ (np.swapaxes(q, -1, -2) @ w[..., None]))[..., 0]


def _qr(a: Array) -> tuple[Array, Array]:
    q, r = np.linalg.qr(a)
    diagonal = np.abs(np.diagonal(r, axis1=-2, axis2=-1))
    if (diagonal.min(axis=-1) <= 1e-13 * diagonal.max(axis=-1)).any():
        raise UserError(
            f"{max(a.shape[-2:])} x {min(a.shape[-2:])} inputs must be linearly independent, found dependent ones: the "
            "student is then not determined; leave out repeated inputs"
        )
    return q, r


class Descent(NamedTuple):
    """Where a descent ended.

    w              [..., d]
    steps          that it took
    gradient_norm  [...] of the loss's gradient in w there; 0: at a minimum
    """

    w: Array
    steps: int
    gradient_norm: Array


def gradient_student(
    x: Array, teacher: Array, *, start: Array | None = None, steps: int = 40_000, tolerance: float = 1e-13
) -> Descent:
    """Gradient descent on the soft labels, step 1/L with L = ||x||^2/(4n), the most the loss curves.

    x [n, d], teacher [d], start [d] (default 0); stops after `steps`, or when the gradient's norm is at most
    `tolerance`.
    raises  UserError for n = d, where it would not end: see below
    """
    n, d = x.shape
    if n == d:
        raise UserError(
            f"gradient descent with n = d = {d} inputs: the least singular value of a square random matrix is about "
            "1/sqrt(d), often far less, the steps needed grow with its inverse square, and the closed form would not "
            "be reached; give n < d or n > d"
        )
    w = np.zeros(d) if start is None else np.array(start, dtype=np.float64)
    labels = _sigmoid(x @ teacher)  # [n]
    rate = 4 * n / np.linalg.norm(x, 2) ** 2
    for step in range(steps):
        gradient = x.T @ (_sigmoid(x @ w) - labels) / n
        norm = np.linalg.norm(gradient)
        if norm <= tolerance:
            return Descent(w, step, np.asarray(norm))
        w -= rate * gradient
    return Descent(w, steps, np.asarray(np.linalg.norm(x.T @ (_sigmoid(x @ w) - labels) / n)))


def distillation_loss(x: Array, teacher: Array, w: Array) -> Array:
    """Mean over the inputs of KL(teacher's label || student's).

    It is the cross-entropy to the soft labels less their own entropy.
    x [..., n, d], teacher [d], w [..., d]; returns [...], 0 at the minimum
    """
    logits_t, logits = x @ teacher, (x @ w[..., None])[..., 0]  # [..., n]
    labels = _sigmoid(logits_t)
    return np.mean(np.logaddexp(0, logits) - np.logaddexp(0, logits_t) - labels * (logits - logits_t), axis=-1)


def _sigmoid(z: Array) -> Array:
    return np.exp(-np.logaddexp(0, -z))


# ---- Deep-linear students ----


def balanced_start(direction: Array, norm: float, layers: int, width: int) -> list[Array]:
    """Balanced factors W_1 [width, d], W_2 ... [width, width], W_layers [1, width], whose product has norm `norm`.

    Balanced: W_i W_i^T = W_(i+1)^T W_(i+1).
    direction  [d], of the product W_layers ... W_1; need not be of unit length
    Each factor has rank one and norm `norm`^(1/layers). With one layer: W_1 = the product itself.
    """
    if layers < 1 or width < 1 or not norm > 0:
        raise UserError(f"layers >= 1, width >= 1 and a norm > 0 are needed, got {layers}, {width} and {norm}")
    unit = direction / np.linalg.norm(direction)
    if layers == 1:
        return [norm * unit[None]]
    size = norm ** (1 / layers)
    e = np.eye(width)[0]
    return [size * np.outer(e, unit), *(size * np.outer(e, e) for _ in range(layers - 2)), size * e[None]]


def descending_direction(x: Array, teacher: Array, direction: Array) -> Array:
    """`direction` [d] or its opposite, whichever makes the loss on x [n, d] less than at 0, as a small start must."""
    slope = direction @ (x.T @ (0.5 - _sigmoid(x @ teacher)))
    return -direction if slope > 0 else direction


def deep_linear_student(
    x: Array, teacher: Array, start: list[Array], *, steps: int = 20_000, tolerance: float = 1e-9
) -> Descent:
    """Gradient flow on the factors of a deep-linear student, by Runge-Kutta steps of order four.

    x [n, d], teacher [d]
    start    factors as `balanced_start` makes them, or several students' stacked: W_1 [..., width, d] ... W_N [..., 1,
             width]
    returns  w = W_N ... W_1 [..., d] and the norms [...] of the loss's gradient in it; stops after `steps`, or when all
             norms are at most `tolerance`
    A step is 1/(N ||w*||^(2 - 2/N) L), L as in `gradient_student`: the time that the flow's fastest direction takes.
    UserError for n = d.
    """
    n, d = x.shape
    if n == d:
        raise UserError(
            f"gradient flow with n = d = {d} inputs is ill-conditioned and would not end: give n < d or n > d"
        )
    layers = len(start)
    labels = _sigmoid(x @ teacher)  # [n]
    curvature = np.linalg.norm(x, 2) ** 2 / (4 * n)
    size = 1 / (layers * np.linalg.norm(teacher) ** (2 - 2 / layers) * curvature)

    def flow(factors: list[Array]) -> tuple[list[Array], Array, Array]:
        """(minus the gradient in each factor, w, the gradient in w)"""
        below = [np.eye(d)]  # W_(i-1) ... W_1, [..., width, d]
        for factor in factors[:-1]:
            below.append(factor @ below[-1])
        w = (factors[-1] @ below[-1])[..., 0, :]  # [..., d]
        gradient = (_sigmoid(w @ x.T) - labels) @ x / n  # [..., d]
        above = np.ones((1, 1))  # W_N ... W_(i+1), [..., 1, width]
        changes: list[Array] = []
        for factor, under in zip(reversed(factors), reversed(below), strict=True):
            changes.append(-np.swapaxes(above, -1, -2) @ (gradient[..., None, :] @ np.swapaxes(under, -1, -2)))
            above = above @ factor
        return changes[::-1], w, gradient

    def moved(factors: Sequence[Array], changes: Sequence[Array], by: float) -> list[Array]:
        return [factor + by * change for factor, change in zip(factors, changes, strict=True)]

    factors = [factor.copy() for factor in start]
    for step in range(steps + 1):
        k1, w, gradient = flow(factors)
        norm = np.linalg.norm(gradient, axis=-1)
        if norm.max() <= tolerance or step == steps:
            break
        k2 = flow(moved(factors, k1, size / 2))[0]
        k3 = flow(moved(factors, k2, size / 2))[0]
        k4 = flow(moved(factors, k3, size))[0]
        mean = [(a + 2 * b + 2 * c + e) / 6 for a, b, c, e in zip(k1, k2, k3, k4, strict=True)]
        factors = moved(factors, mean, size)
    return Descent(w, step, norm)


def conserved_quantity(x: Array, w: Array, layers: int) -> float:
    """||w outside the inputs' span|| / ||w||^((N-1)/N); balanced gradient flow of N layers never changes it.

    Our derivation:
    x [n, d], w [d] != 0
    Balanced factors give dw/dt = -||w||^(2-2/N) (g + (N-1) u u^T g) with u = w/||w|| and a gradient g in the span, so
    that the part outside shrinks or grows at the rate -(N-1) ||w||^(1-2/N) u.g, and log ||w|| at N/(N-1) times that.
    """
    return float(np.linalg.norm(w - projection(x, w)) / np.linalg.norm(w) ** ((layers - 1) / layers))


def deep_distance(conserved: float, projection_norm: float, layers: int) -> float:
    """||w_inf - P w*|| of a deep student that reaches a loss of 0 (our derivation).

    P                the projection on the inputs' span
    conserved        `conserved_quantity` of its start
    projection_norm  ||P w*||
    Then w_inf = P w* + q with q outside the span: the root of ||q|| = conserved * (||P w*||^2 + ||q||^2)^((N-1)/(2N)).
    """
    distance = 0.0
    for _ in range(10_000):  # the right side grows slower than ||q||, so that the iteration rises to the only root
        last, power = distance, (layers - 1) / (2 * layers)
        distance = conserved * (projection_norm**2 + distance**2) ** power
        if abs(distance - last) <= 1e-15 * distance:
            break
    return distance


def start_norm_for(distance: float, teacher_norm: float, layers: int) -> float:
    """Norm of a balanced start with which a deep student of N layers ends within `distance` of the projection of w*.

    Our derivation: eps^N (||w*||^2 + eps^2)^(-(N-1)/2), from `deep_distance` with the greatest values its two arguments
    can take.
    """
    if not distance > 0 or not teacher_norm > 0 or layers < 1:
        raise UserError(
            f"distance and teacher_norm > 0 and layers >= 1 are needed, got {distance}, {teacher_norm} and {layers}"
        )
    return distance**layers * (teacher_norm**2 + distance**2) ** (-(layers - 1) / 2)


# ---- Inputs, angles and risk ----


def angle(w: Array, teacher: Array) -> Array:
    """Angles [...] in [0, pi] between w [..., d] and teacher [d]; accurate for small angles too.

    raises  UserError for w = 0
    """
    unit = teacher / np.linalg.norm(teacher)
    along = w @ unit  # [...]
    across = np.linalg.norm(w - along[..., None] * unit, axis=-1)
    if ((along == 0) & (across == 0)).any():
        raise UserError("an angle needs weights that are not all zero, found a student w = 0")
    return np.arctan2(across, along)


def transfer_risk(w: Array, teacher: Array, points: Array) -> Array:
    """Share of the points [m, d] that students w [..., d] and teacher [d] put on different sides; [...]."""
    return np.mean(
        (points @ np.moveaxis(w, -1, 0).reshape(w.shape[-1], -1)) * (points @ teacher)[:, None] < 0, axis=0
    ).reshape(w.shape[:-1])


@dataclass(frozen=True)
class Isotropic:
    """Standard normal inputs."""

    @property
    def name(self) -> str:
        return "isotropic"

    def sample(self, generator: np.random.Generator, count: tuple[int, ...], dimension: int) -> Array:
        """Inputs [*count, dimension]."""
        return generator.standard_normal((*count, dimension))

    def tail(self, t: Array, dimension: int) -> Array:
        """p(t) = P[acute angle between x and a fixed axis >= t], t [...] in [0, pi/2].

        The density of the angle is proportional to sin^(d-2).
        """

        def beyond(start: Array) -> Array:
            """Integral of the density from start [...] to pi/2, times a constant."""
            nodes = start[..., None] + (math.pi / 2 - start[..., None]) * (_NODES + 1) / 2  # [..., nodes]
            return (np.sin(nodes) ** (dimension - 2) @ _WEIGHTS) * (math.pi / 2 - start)

        return beyond(np.asarray(t, dtype=np.float64)) / beyond(np.zeros(()))

    def risk(self, student_angle: Array, dimension: int) -> Array:
        """Transfer risk of students [...] at this angle: angle/pi, in any dimension."""
        return np.asarray(student_angle) / math.pi


@dataclass(frozen=True)
class AngleLaw:
    """Inputs whose acute angle to the first axis has p(t) = (1 - t/(pi/2 - margin))^k up to pi/2 - margin.

    They are x = (s cos t, sin t v) with s = +-1 and v uniform on the unit sphere of R^(d-1). No input is closer than
    `margin` to the plane x_1 = 0.
    """

    k: float = 1.0
    margin: float = 0.0

    @property
    def name(self) -> str:
        return f"angle:{self.k:g}" + (f":{self.margin:g}" if self.margin else "")

    def sample(self, generator: np.random.Generator, count: tuple[int, ...], dimension: int) -> Array:
        """Inputs [*count, dimension], of unit length."""
        t = (math.pi / 2 - self.margin) * (1 - generator.random((*count, 1)) ** (1 / self.k))
        across = generator.standard_normal((*count, dimension - 1))
        across *= np.sin(t) / np.linalg.norm(across, axis=-1, keepdims=True)
        return np.concatenate([np.cos(t) * generator.choice([-1.0, 1.0], t.shape), across], axis=-1)

    def tail(self, t: Array, dimension: int) -> Array:
        """p(t) = P[acute angle between x and the first axis >= t], t [...]; the same in every dimension."""
        return np.clip(1 - np.asarray(t) / (math.pi / 2 - self.margin), 0, 1) ** self.k

    def risk(self, student_angle: Array, dimension: int) -> Array:
        """Transfer risk of students [...] at this angle to a teacher along the first axis, by `risk_at_angle`."""
        return risk_at_angle(lambda t: self.tail(t, dimension), student_angle, dimension)


Law = Isotropic | AngleLaw


def parse_law(text: str) -> Law:
    """The law that `isotropic`, `angle:K` or `angle:K:MARGIN` (radians) names; UserError if it names none."""
    name, *numbers = text.strip().split(":")
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    if name == "isotropic" and not numbers:
        return Isotropic()
    if name == "angle" and len(values) in (1, 2) and 0 < values[0] < math.inf and 0 <= sum(values[1:]) < math.pi / 2:
        return AngleLaw(*values)
    raise UserError(
        f"unknown law of inputs '{text}': expected isotropic, angle:K with K > 0, or angle:K:MARGIN with 0 <= MARGIN < "
        "1.57 radians"
    )


def risk_at_angle(tail: Callable[[Array], Array], student_angle: Array, dimension: int) -> Array:
    """Transfer risk of students at an angle to the teacher, for inputs that are symmetric around it (our derivation).

    tail           p(t), as `Law.tail`
    student_angle  [...], in [0, pi]
    dimension      d >= 3
    returns        [...], exact but for the quadrature
    With x at the acute angle t, and phi the acute angle, in R^(d-1), between the parts of x and w across the teacher,
    the signs differ for half of the x with cos phi > cot t cot a: R = E_phi p(arctan(cot a / cos phi)) / 2, the density
    of phi going as sin^(d-3).
    """
    if dimension < 3:
        raise UserError(f"risk_at_angle needs d >= 3, got {dimension}")
    a = np.asarray(student_angle, dtype=np.float64)[..., None]
    acute = np.minimum(a, math.pi - a)
    phi = math.pi / 4 * (_NODES + 1)
    weights = _WEIGHTS * np.sin(phi) ** (dimension - 3)
    risk = tail(np.arctan2(np.cos(acute), np.sin(acute) * np.cos(phi))) @ weights / weights.sum() / 2
    return np.where(a[..., 0] > math.pi / 2, 1 - risk, risk)


def isotropic_risk(n: int, dimension: int) -> float:
    """E R of the distilled student on isotropic inputs.

    It is the mean angle of w* to a random n-dimensional subspace, over pi: cos^2 of the angle is Beta(n/2, (d-n)/2), of
    mean n/d, and the density of the angle is proportional to cos^(n-1) sin^(d-n-1).
    """
    if n >= dimension:
        return 0.0
    a = math.pi / 4 * (_NODES + 1)
    log_density = (n - 1) * np.log(np.cos(a)) + (dimension - n - 1) * np.log(np.sin(a))
    weights = _WEIGHTS * np.exp(log_density - log_density.max())
    return float(weights @ a / weights.sum() / math.pi)


def isotropic_hard_label_risk(n: int, dimension: int) -> float:
    """Limit of the hard-label student's risk on isotropic inputs, for n and d growing in proportion: 1/2 at n = d.

    Our derivation.
    The labels are c x_1 + noise of variance 1 - c^2, c^2 = 2/pi. Least norm (m = n/(d-n)): cos^2 = c^2 m / ((1+m)(1 +
    m(1-c^2))); least squares (n > d): cos^2 = c^2 / (c^2 + (1-c^2) d/(n-d)). At n = d the noise is amplified without
    bound.
    """
    c2, d = 2 / math.pi, dimension
    if n == d:
        return 0.5
    if n < d:
        m = n / (d - n)
        cos2 = c2 * m / ((1 + m) * (1 + m * (1 - c2)))
    else:
        cos2 = c2 / (c2 + (1 - c2) * d / (n - d))
    return math.acos(math.sqrt(cos2)) / math.pi


def risk_bound(tail: Callable[[Array], Array], n: int, dimension: int) -> float:
    """Bound on the expected transfer risk of the distilled student: inf over b in [0, pi/2] of p(b) + p(pi/2 - b)^n.

    It is 0 for n >= d.
    tail  p(t) = P[acute angle between teacher and x >= t], [...] -> [...], e.g. of a `Law`, or estimated from data
    The student is no farther from the teacher than the closest input is. If one is closer than pi/2 - b, which fails
    with probability p(pi/2 - b)^n, then only inputs farther than b from the teacher can be told differently.
    """
    if n < 1:
        raise UserError(f"a bound needs n >= 1 inputs, got {n}")
    if n >= dimension:
        return 0.0

    value, low, high = 1.0, 0.0, math.pi / 2
    for _ in range(5):  # each round looks 100 times closer around the least value of the last
        b = np.linspace(low, high, 201)
        values = tail(b) + tail(math.pi / 2 - b) ** n
        least = int(values.argmin())
        value = min(value, float(values[least]))
        low, high = float(b[max(least - 1, 0)]), float(b[min(least + 1, 200)])
    return value


def margin_bound(tail: Callable[[Array], Array], margin: float, n: int) -> float:
    """The bound p(margin)^n, exponential in n.

    No input may be closer than `margin` to the teacher's plane: p(pi/2 - margin) = 0, else UserError.
    """
    near, beyond = tail(np.array([margin, math.pi / 2 - margin]))
    if beyond > 0:
        raise UserError(
            f"a share {beyond:.3g} of the inputs is nearer than {margin:g} radians to the teacher's plane, expected "
            "none: give a smaller one"
        )
    return float(near**n)


def polynomial_bound(k: float, n: int) -> float:
    """The bound (1 + (ln n)^k) / n^k where p(t) <= (1 - 2t/pi)^k: b = (pi/2) n^(-1/n) put into `risk_bound`."""
    return (1 + math.log(n) ** k) / n**k


def null_space_direction(x: Array, teacher: Array, generator: np.random.Generator) -> Array:
    """A random unit vector [..., d] that is orthogonal to all inputs x [..., n, d] and to the teacher [d].

    raises  UserError if n > d - 2
    A student moved along it keeps its logits on the training inputs, and its loss; with cos a its angle's cosine, a
    student moved by delta ||w|| has cos a / sqrt(1 + delta^2), thus a greater risk.
    """
    n, d = x.shape[-2:]
    if n > d - 2:
        raise UserError(
            f"a direction outside the span of {n} inputs and of the teacher needs n <= d - 2 = {d - 2}: give fewer "
            "inputs"
        )
    spanned = np.concatenate([x, np.broadcast_to(teacher, (*x.shape[:-2], 1, d))], axis=-2)  # [..., n + 1, d]
    v = generator.standard_normal((*x.shape[:-2], d))
    v -= projection(spanned, v)
    return v / np.linalg.norm(v, axis=-1, keepdims=True)
