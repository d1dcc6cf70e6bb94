"""Random numbers that are a function of their coordinates: no state, any order, any subset, the same on every machine.

A counter-based generator on splitmix64's finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014). numpy's own generators are not used because their streams may change between numpy releases,
and a resumed run must see the batches it would have seen.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: splitmix64's increment
_DRAW_STRIDE = 0xD1342543DE82EF95  # odd, unrelated to _GOLDEN: separates the draws of one sample
_MASK = (1 << 64) - 1
_KEYS_AT_ONCE = 1 << 16  # whose temporaries fit the processor's cache


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, a bijection of the 64-bit integers. x: uint64, any shape."""
    x = x + np.uint64(_GOLDEN)  # array arithmetic wraps silently, as splitmix64 needs it
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(seed: int, stream: int, ids: np.ndarray) -> np.ndarray:
    """One key per id, distinct for distinct ids. ids: [n] int64 >= 0; returns [n] uint64."""
    base = _mix(np.array([seed & _MASK], np.uint64))
    base = _mix(base ^ np.uint64(stream & _MASK))
    return _mix(base ^ ids.astype(np.uint64))


def uniforms(seed: int, stream: int, ids: np.ndarray, draws: int) -> np.ndarray:
    """Uniform numbers in [0, 1), a pure function of (seed, stream, id, draw).

    seed, stream  any integers, taken modulo 2^64
    ids           [n] int64 >= 0
    returns       [n, draws] float64, multiples of 2^-53
    """
    offsets = np.arange(draws, dtype=np.uint64) * np.uint64(_DRAW_STRIDE)
    bits = _mix(_keys(seed, stream, ids)[:, None] + offsets[None])  # [n, draws]
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, stream: int, n: int) -> np.ndarray:
    """A permutation of 0..n-1 as [n] int64, a pure function of its arguments: the order of n distinct 64-bit keys."""
    keys = np.empty(n, np.uint64)
    for first in range(0, n, _KEYS_AT_ONCE):
        part = keys[first : first + _KEYS_AT_ONCE]
        part[:] = _keys(seed, stream, np.arange(first, first + len(part)))
    return np.argsort(keys)  # as no two keys are equal, every way to sort them gives this order
