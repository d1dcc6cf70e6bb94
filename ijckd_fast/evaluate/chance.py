"""Whether answers hit the labels more often than chance does."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LEVEL = 1e-3  # of the test: how often answers that know nothing of the images pass at most
MANY_CLASSES = 50  # from here on the hits of a few classes do not count
# Of classes in a random order about one keeps its place, however many there are; more than five do in 0.06 % of orders.
KEPT_BY_CHANCE = 5


class AgainstChance(NamedTuple):
    """Hits of a net's answers, beside those of the same answers dealt out without a look at the images.

    images       N
    hits         of them answered with their label
    counted      hits that the test is about: without those of the KEPT_BY_CHANCE best classes where there are
                 MANY_CLASSES, else all
    expected     hits by chance
    probability  of `counted` hits or more by chance
    needed       hits that chance reaches with a probability below LEVEL; None where it never is
    enough       N images can tell: right answers to all of them would pass
    """

    images: int
    hits: int
    counted: int
    expected: float
    probability: float
    needed: int | None
    enough: bool

    @property
    def passed(self) -> bool:
        return self.probability < LEVEL

    @property
    def weak(self) -> bool:
        """Below twice chance, and below a quarter of the way from chance to no error."""
        return self.hits < min(2 * self.expected, self.expected + 0.25 * (self.images - self.expected))


def against_chance(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> AgainstChance:
    """The exact one-sided test of the number of hits, at LEVEL.

    By chance, an image that is answered with class k is one of class k with the probability n_k / N, the share of this
    class among the labels, whatever the other images are. For equal classes the number of hits then is binomial, with
    1 / K; an answer that is always the largest class has as many hits as chance.

    predictions  [N] int64, classes answered
    labels       [N] int64 in [0, num_classes)
    num_classes  K
    """
    counted = _counted(predictions, labels, num_classes)
    tail = _tail(predictions, labels, num_classes)  # [N + 2]
    passing = np.flatnonzero(tail[:-1] < LEVEL)
    perfect = _tail(labels, labels, num_classes)[_counted(labels, labels, num_classes)]
    of_class = np.bincount(labels, minlength=num_classes)
    return AgainstChance(
        images=len(labels),
        hits=int((predictions == labels).sum()),
        counted=counted,
        expected=float(of_class[predictions].sum() / len(labels)),
        probability=float(tail[counted]),
        needed=int(passing[0]) if len(passing) else None,
        enough=bool(perfect < LEVEL),
    )


def _counted(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> int:
    hits = np.bincount(labels[predictions == labels], minlength=num_classes)  # [K]
    best = np.sort(hits)[-KEPT_BY_CHANCE:] if num_classes >= MANY_CLASSES else hits[:0]
    return int(hits.sum() - best.sum())


def _tail(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """[N + 2]: the probability of h hits or more by chance, for h from 0 to N + 1."""
    from scipy import special

    answers = np.bincount(predictions, minlength=num_classes)  # [K]
    of_class = np.bincount(labels, minlength=num_classes)  # [K]
    sums = len(labels) + 1
    padded = 1 << len(labels).bit_length()  # a power of two, at least `sums`: transforms of others are slow
    density, spectrum = np.zeros(sums), np.ones(padded // 2 + 1, complex)
    sizes = [size for size in np.unique(of_class) if answers[of_class == size].any()]
    for size in sizes:  # classes of one size have one probability, their hits together are binomial
        tries = int(answers[of_class == size].sum())
        below = special.bdtr(np.arange(tries + 1), tries, size / len(labels))
        density[: tries + 1] = np.diff(below, prepend=0)
        density[tries + 1 :] = 0
        if len(sizes) > 1:  # the sum of independent numbers: a product of transforms
            spectrum = spectrum * np.fft.rfft(density, padded)
    if len(sizes) > 1:
        density = np.fft.irfft(spectrum, padded)[:sums]
    return np.append(np.clip(np.cumsum(density[::-1])[::-1], 0, 1), 0)
