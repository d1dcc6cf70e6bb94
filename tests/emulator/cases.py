"""Every kernel at sizes that hurt, against numpy in float64. A case is a function of the module of launchers; it raises
AssertionError where an output differs from the oracle, and returns its outputs for comparison between schedules.

Outputs go in full of NaN (integers: of -7), so what a kernel leaves out shows; the emulator watches every address
itself. Needs neither torch nor pytest: mutate.py starts it hundreds of times.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Case = Callable[[ModuleType], list[Array]]


@dataclass(frozen=True)
class DType:
    """An element type T of csrc/dtype.h and its accumulator A, with the rounding error a result in each may have."""

    name: str
    storage: type  # numpy's; bfloat16 as its bits
    accumulator: type
    rounding: float  # relative, of one store as T
    smallest: float  # absolute, of one store as T below T's normal numbers
    error: float  # relative to the largest value, of a result summed in A

    def encode(self, x: Array) -> Array:
        if self.name != "bf16":
            return x.astype(self.storage)
        bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even

    def decode(self, x: Array) -> Array:
        if self.name == "bf16":
            return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return x.astype(np.float64)


F32 = DType("f32", np.float32, np.float32, 0, 0, 4e-6)
F64 = DType("f64", np.float64, np.float64, 0, 0, 1e-13)
BF16 = DType("bf16", np.uint16, np.float32, 2**-8, 0, 4e-6)
F16 = DType("f16", np.float16, np.float32, 2**-11, 2**-25, 4e-6)
DTYPES = (F32, F64, BF16, F16)
ACCUMULATORS = (F32, F64)


def strict(t: DType) -> DType:
    """t with little more than the result's own rounding allowed: for sums that a chain of floats would spoil."""
    return dataclasses.replace(t, error=2e-7) if t.accumulator is np.float32 else t


def close(
    what: str,
    got: Array,
    want: Array | float,
    t: DType,
    *,
    stored: bool = False,
    scale: float = 1,
    least: float = 0,
    more: Array | float = 0,
) -> None:
    """got equals want to t's precision; `stored`: got was rounded to T, else it is in A. NaN equals NaN only.

    scale   size of the terms whose difference the result is, where that is beyond 1
    least   the same where the result is stored and may be 0 everywhere
    more    absolute error that each may have beside
    """
    want = np.broadcast_to(np.asarray(want, np.float64), got.shape)
    value = t.decode(got) if stored else got.astype(np.float64)
    finite = want[np.isfinite(want)]
    allowed = t.error * (scale + abs(want)) if not stored else t.error * scale * abs(finite).max(initial=least)
    allowed = allowed + more
    if stored:
        allowed = allowed + t.rounding * abs(want) + t.smallest
    with np.errstate(invalid="ignore"):
        wrong = ~((abs(value - want) <= allowed) | (np.isnan(value) & np.isnan(want)))
    if wrong.any():
        i = tuple(int(v) for v in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}{list(i)} is {value[i]!r}, wanted {want[i]!r}; {wrong.sum()} of {wrong.size} differ"
        )


class Data:
    """Random inputs of one case: T's as stored and as float64."""

    def __init__(self, t: DType, seed: str) -> None:
        self.t = t
        self.random = np.random.default_rng(zlib.crc32(seed.encode()))

    def normal(self, *shape: int, scale: float = 1, shift: float = 0) -> tuple[Array, Array]:
        stored = self.t.encode(self.random.standard_normal(shape) * scale + shift)
        return stored, self.t.decode(stored)

    def normal_acc(self, *shape: int, scale: float = 1, shift: float = 0) -> tuple[Array, Array]:
        stored = (self.random.standard_normal(shape) * scale + shift).astype(self.t.accumulator)
        return stored, stored.astype(np.float64)

    def labels(self, B: int, K: int) -> Array:
        return self.random.integers(0, K, B)

    def out(self, *shape: int) -> Array:
        return np.full(shape, np.nan, self.t.accumulator)

    def out_stored(self, *shape: int) -> Array:
        return self.t.encode(np.full(shape, np.nan))


def at_odd_address(x: Array) -> Array:
    """A copy of x at an address that only one element divides: no two may be loaded together."""
    whole = np.empty(x.size + 2, x.dtype)
    first = 1 if whole.ctypes.data % (2 * x.itemsize) == 0 else 0
    copy = whole[first : first + x.size].reshape(x.shape)
    copy[...] = x
    return copy


# --------------------------------------------------------------------------------------------------------------------
# rows


def feature_diff(kernels: ModuleType, t: DType, B: int, Ct: int) -> list[Array]:
    """B 0: a launch that CUDA refuses, and whose error is the caller's alone."""
    data = Data(t, f"feature_diff {B} {Ct}")
    (z, z64), (pooled_t, pooled64) = data.normal_acc(B, Ct), data.normal_acc(B, Ct)
    d, rows = data.out(B, Ct), data.out(B)
    call = functools.partial(
        kernels.feature_diff, dtype=t.name, z=z, pooled_t=pooled_t, d=d, square_rows=rows, B=B, Ct=Ct
    )
    if B == 0:
        refused = ""
        try:
            call()
        except RuntimeError as error:
            refused = str(error)
        assert "invalid configuration argument" in refused, f"a launch without blocks: {refused or 'no error'}"
        assert kernels.last_error() == 0, f"error {kernels.last_error()} was left behind"
        return []
    call()
    close("d", d, z64 - pooled64, t)
    close("square_rows", rows, np.square(z64 - pooled64).sum(1), t)
    return [d, rows]


def column_sum(kernels: ModuleType, t: DType, rows: int, cols: int, scale: float, shift: float = 0) -> list[Array]:
    data = Data(t, f"column_sum {rows} {cols}")
    (x, x64), out = data.normal_acc(rows, cols, shift=shift), data.out(cols)
    kernels.column_sum(dtype=t.name, x=x, out=out, rows=rows, cols=cols, scale=scale)
    close("out", out, scale * x64.sum(0), strict(t) if shift else t)
    return [out]


# --------------------------------------------------------------------------------------------------------------------
# connector_match


STAT_ROWS = 128  # connector_match.h:kStatRows


def parts_of(y: Array, rows_per_part: int) -> tuple[Array, Array]:
    """Mean and sum of squared deviations of y [N, Ct] in parts of rows: [parts, Ct] each."""
    parts = [y[first : first + rows_per_part] for first in range(0, len(y), rows_per_part)]
    return np.stack([p.mean(0) for p in parts]), np.stack([np.square(p - p.mean(0)).sum(0) for p in parts])


def channel_stats(kernels: ModuleType, t: DType, N: int, Ct: int, shift: float, odd: bool) -> list[Array]:
    """odd: y lies at an address that only one element divides."""
    data = Data(t, f"channel_stats {N} {Ct}")
    y, y64 = data.normal(N, Ct, shift=shift)
    part_mean64, part_m264 = parts_of(y64, STAT_ROWS)
    part_mean, part_m2 = data.out(*part_mean64.shape), data.out(*part_m264.shape)
    y = at_odd_address(y) if odd else y
    kernels.channel_stats(dtype=t.name, y=y, part_mean=part_mean, part_m2=part_m2, N=N, Ct=Ct)
    close("part_mean", part_mean, part_mean64, strict(t), scale=3)
    close("part_m2", part_m2, part_m264, t)
    return [part_mean, part_m2]


def combine_stats(kernels: ModuleType, t: DType, N: int, Ct: int, rows_per_part: int, shift: float) -> list[Array]:
    data = Data(t, f"combine_stats {N} {Ct}")
    y = data.random.standard_normal((N, Ct)) + shift + np.arange(N)[:, None] / N  # parts' means differ
    part_mean, part_m2 = (np.ascontiguousarray(p, t.accumulator) for p in parts_of(y, rows_per_part))
    part_mean64, part_m264 = part_mean.astype(np.float64), part_m2.astype(np.float64)
    rows = np.minimum(rows_per_part, N - rows_per_part * np.arange(len(part_mean)))[:, None]
    mean64 = (rows * part_mean64).sum(0) / N
    var64 = (part_m264 + rows * np.square(part_mean64 - mean64)).sum(0) / N
    mean, var = data.out(Ct), data.out(Ct)
    kernels.combine_stats(
        dtype=t.name, part_mean=part_mean, part_m2=part_m2, mean=mean, var=var, N=N, Ct=Ct, rows_per_part=rows_per_part
    )
    close("mean", mean, mean64, strict(t))
    close("var", var, var64, strict(t))
    return [mean, var]


def follow_stats(kernels: ModuleType, t: DType, Ct: int, share: float, counted: bool = True) -> list[Array]:
    data = Data(t, f"follow_stats {Ct}")
    (mean, mean64), (var, var64), (running_mean, before_mean), (running_var, before_var) = (
        data.normal_acc(Ct) for _ in range(4)
    )
    batches = np.full((), 2**40)
    kernels.follow_stats(
        dtype=t.name, mean=mean, var=var, running_mean=running_mean, running_var=running_var,
        batches=batches if counted else None, Ct=Ct, unbiased=1.25, share=share,
    )  # fmt: skip
    close("running_mean", running_mean, before_mean + share * (mean64 - before_mean), t)
    close("running_var", running_var, before_var + share * (1.25 * var64 - before_var), t)
    assert batches == 2**40 + counted
    return [running_mean, running_var]


AFFINES = ("none", "bias", "norm")


def affine(data: Data, Ct: int, kind: str) -> tuple[dict[str, Any], Array, Array, Array, Array]:
    """Keywords of csrc's Affine, and mean, 1 / standard deviation, gamma, beta in float64."""
    arrays: dict[str, Any] = {"mean": None, "var": None, "gamma": None, "beta": None, "eps": 1e-3}
    mean, inv_std, gamma, beta = np.zeros(Ct), np.ones(Ct), np.ones(Ct), np.zeros(Ct)
    if kind != "none":
        arrays["beta"], beta = data.normal_acc(Ct, scale=0.3)
    if kind == "norm":
        arrays["mean"], mean = data.normal_acc(Ct, scale=0.3)
        arrays["gamma"], gamma = data.normal_acc(Ct)
        arrays["var"] = (data.random.random(Ct) + 0.5).astype(data.t.accumulator)
        inv_std = 1 / np.sqrt(arrays["var"].astype(np.float64) + 1e-3)
    return arrays, mean, inv_std, gamma, beta


def match_forward(
    kernels: ModuleType, t: DType, B: int, P: int, Ct: int, kind: str, match: bool, relu: bool, odd: str = ""
) -> list[Array]:
    """odd: the array that lies at an odd address."""
    data = Data(t, f"match_forward {B} {P} {Ct}")
    (y, y64), (map_t, map64) = data.normal(B, P, Ct), data.normal(B, P, Ct)
    y[..., ::5] = y64[..., ::5] = 0  # where there is no BatchNorm, on the ReLU's edge: closed
    arrays, mean, inv_std, gamma, beta = affine(data, Ct, kind)
    outs = {k: data.out(B, Ct) for k in ("z", "count", "yhat", "square", "res", "res_yhat")}
    if not match:
        outs |= dict.fromkeys(("square", "res", "res_yhat"))
    maps = {"y": y, "map_t": map_t if match else None}
    for some in (maps, outs):
        if odd in some:
            some[odd] = at_odd_address(some[odd])
    arrived = np.full((), 7, np.int32)
    kernels.match_forward(
        dtype=t.name, **maps, **arrays, **outs, arrived=arrived if match else None, B=B, P=P, Ct=Ct, relu=relu
    )
    assert arrived == (0 if match else 7)
    h = (y64 - mean) * inv_std
    pre = gamma * h + beta
    on = (pre > 0) | (not relu)
    Z = np.where(on, pre, 0)
    wanted = {"z": Z.mean(1), "count": on.sum(1), "yhat": (h * on).sum(1)}
    if match:
        r = Z - map64
        wanted |= {"square": np.square(r).sum(1), "res": (r * on).sum(1), "res_yhat": (r * h * on).sum(1)}
    long = P > 5000
    for name, want in wanted.items():
        close(name, outs[name], want, strict(t) if long else t, scale=P**0.5 if long and name != "z" else 1)
    return [outs[name] for name in wanted]


def match_sums(kernels: ModuleType, t: DType, B: int, Ct: int) -> list[Array]:
    data = Data(t, f"match_sums {B} {Ct}")
    names = ("square", "res", "res_yhat")
    stored, wide = zip(*(data.normal_acc(B, Ct) for _ in names), strict=True)
    outs = {f"{name}_sum": data.out(Ct) for name in names[1:]}
    fm = data.out()
    kernels.match_sums(
        dtype=t.name, **dict(zip(names, stored, strict=True)), **outs, fm=fm, scale=0.125,
        shares=np.full(Ct, np.nan), arrived=np.zeros((), np.int32), B=B, Ct=Ct,
    )  # fmt: skip
    for (name, out), want in zip(outs.items(), wide[1:], strict=True):
        close(name, out, want.sum(0), t, scale=B**0.5)
    close("fm", fm, wide[0].sum() / 8, t, scale=(B * Ct) ** 0.5)
    return [*outs.values(), fm]


def channel_grads(
    kernels: ModuleType,
    t: DType,
    B: int,
    P: int,
    Ct: int,
    match: str | None,
    linear: bool = False,
    shift: float = 0,
) -> list[Array]:
    """linear: without what is 1 and what is not wanted where there is neither ReLU nor BatchNorm, and with a factor of
    grad_z.
    """
    data = Data(t, f"channel_grads {B} {P} {Ct}")
    names = ("grad_z", "z", "pooled_t", "count", "yhat")
    stored, wide = zip(*(data.normal_acc(B, Ct, shift=shift) for _ in names), strict=True)
    arrays: dict[str, Any] = dict(zip(names, stored, strict=True))
    grad_z, z, pooled_t, count, yhat = wide
    (arrays["grad_fm"], grad_fm), (res, res64), (res_yhat, res_yhat64) = (
        data.normal_acc(),
        data.normal_acc(Ct),
        data.normal_acc(Ct),
    )
    arrays["grad_fm"] = np.asarray(arrays["grad_fm"])
    arrays |= {"res": res, "res_yhat": res_yhat} if match == "map" else {"res": None, "res_yhat": None}
    if match != "pooled":
        arrays["pooled_t"] = None
    if match is None:
        arrays["grad_fm"] = None
    arrays["scale"] = np.full((), 0.375, t.accumulator) if linear else None
    if linear:
        arrays |= {"count": None, "yhat": None}
        count = np.full_like(count, P)
        grad_z = 0.375 * grad_z
    outs = {"grad_out": data.out(B, Ct), "d_gamma": data.out(Ct), "d_beta": data.out(Ct)}
    kernels.channel_grads(dtype=t.name, **arrays, **outs, B=B, P=P, Ct=Ct)
    g = grad_z + (2 * grad_fm / (B * Ct) * (z - pooled_t) if match == "pooled" else 0)
    c = 2 * grad_fm / (B * P * Ct) if match == "map" else 0
    close("grad_out", outs["grad_out"], g, t)
    t = strict(t) if shift else t
    close("d_beta", outs["d_beta"], (g * count).sum(0) / P + c * res64, t)
    if linear:
        assert np.isnan(outs["d_gamma"]).all()
    else:
        close("d_gamma", outs["d_gamma"], (g * yhat).sum(0) / P + c * res_yhat64, t)
    return list(outs.values())


def match_backward(
    kernels: ModuleType,
    t: DType,
    B: int,
    P: int,
    Ct: int,
    kind: str,
    match: bool,
    relu: bool,
    stats: bool,
    odd: str = "",
) -> list[Array]:
    """odd: the array that lies at an odd address."""
    data = Data(t, f"match_backward {B} {P} {Ct}")
    (y, y64), (map_t, map64) = data.normal(B, P, Ct), data.normal(B, P, Ct)
    y[..., ::5] = y64[..., ::5] = 0  # where there is no BatchNorm, on the ReLU's edge: closed
    arrays, mean, inv_std, gamma, beta = affine(data, Ct, kind)
    (grad_z, grad_z64), (grad_fm, grad_fm64) = data.normal_acc(B, Ct), data.normal_acc()
    (d_gamma, d_gamma64), (d_beta, d_beta64) = data.normal_acc(Ct), data.normal_acc(Ct)
    n_stats = 1.5 * B * P + 1
    maps = {"y": y, "map_t": map_t if match else None, "dy": data.out_stored(B, P, Ct)}
    if odd:
        maps[odd] = at_odd_address(maps[odd])
    kernels.match_backward(
        dtype=t.name, **maps, **arrays, grad_z=grad_z, grad_fm=np.asarray(grad_fm),
        d_gamma=d_gamma if stats else None, d_beta=d_beta if stats else None, B=B, P=P, Ct=Ct, n_stats=n_stats,
        relu=relu,
    )  # fmt: skip
    h = (y64 - mean) * inv_std
    pre = gamma * h + beta
    d_pre = grad_z64[:, None] / P + (2 * grad_fm64 / (B * P * Ct) * (pre - map64) if match else 0)
    d_pre = np.where((pre > 0) | (not relu), d_pre, 0)
    if stats:
        d_pre = d_pre - (d_beta64 + h * d_gamma64) / n_stats
    close("dy", maps["dy"], gamma * inv_std * d_pre, t, stored=True)
    return [maps["dy"]]


# --------------------------------------------------------------------------------------------------------------------
# classifier_loss

PARTS = ("ce", "sr", "fm", "kl", "hard", "ttm", "wttm", "nkd")  # as classifier_loss.h has them
NO_SOFT = dict.fromkeys(PARTS[4:], 0.0) | {"ttm_power": 0.3, "nkd_gamma": 1.5, "standardize": 0.0}
WEIGHTS = {"ce": 0.7, "sr": 0.5, "fm": 0.3, "kl": 0.9, "temperature": 3.0, "label_smoothing": 0.1} | NO_SOFT
SOFT = {"hard": 0.4, "ttm": 0.6, "wttm": 0.8, "nkd": 0.7}
ONLY = {"ce": 0, "sr": 0, "kl": 0, "teacher": "logits_t"}
# Weights and inputs where they are other than: everything of row_math.h on, with bias, delta and two labels.
ROW_LOSSES: dict[str, dict[str, Any]] = {
    "all": {},
    "weights of one": {"ce": 1, "sr": 1, "kl": 1},
    "either": {"teacher": "either"},
    "either, no bias": {"teacher": "either", "bias": False, "ce": 0},
    "teacher's logits": {"teacher": "logits_t"},
    "teacher's logits, no bias": {"teacher": "logits_t", "bias": False},
    "plain": {"ce": 1, "sr": 0, "kl": 0, "label_smoothing": 0, "teacher": None, "two_labels": False, "bias": False},
    "smoothing": {"sr": 0, "kl": 0, "label_smoothing": 0.3, "teacher": None, "two_labels": False},
    "smoothing only": {"sr": 0, "kl": 0, "label_smoothing": 1, "teacher": None},
    "mixup": {"sr": 0, "kl": 0, "label_smoothing": 0, "teacher": None},
    "sr": {"ce": 0, "kl": 0, "two_labels": False},
    "kl": {"ce": 0, "sr": 0, "kl": 1, "temperature": 0.5, "two_labels": False},
    "nothing": {"ce": 0, "sr": 0, "kl": 0, "teacher": None},
    "forward only": {"kl": 1, "grad": False},
    "two rows": SOFT,
    "two rows, near": SOFT | {"two_labels": False, "ce": 0, "sr": 0, "temperature": 2.0},
    "two rows, either": SOFT | {"teacher": "either", "standardize": 1, "kl": 0.4},
    "two rows, forward only": SOFT | {"grad": False, "kl": 0},
    **{name: ONLY | {name: 0.8} for name in PARTS[4:]},
    **{f"standardised {name}": ONLY | {name: 0.8, "standardize": 1} for name in PARTS[3:]},
    "nkd, T 1": ONLY | {"nkd": 1, "nkd_gamma": 0.5, "temperature": 1, "two_labels": False},
    "wttm, power 1": ONLY | {"wttm": 1, "ttm_power": 1},
}


def of_two_rows(options: dict[str, Any]) -> bool:
    """Whether something of soft_row.h is on."""
    return any(options.get(name) for name in (*PARTS[4:], "standardize"))


def log_softmax(x: Array) -> Array:
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def excess_kl(log_p_t: Array, v: Array) -> Array:
    """KL of rows that differ by v over the temperature, with the digits of a small one."""
    p_t = np.exp(log_p_t)
    v = v - (p_t * v).sum(1, keepdims=True)
    taylor = v * v * (1 / 2 + v * (1 / 6 + v * (1 / 24 + v * (1 / 120 + v / 720))))
    terms = p_t * np.where(abs(v) < 1e-3, taylor, np.expm1(np.minimum(v, 50)) - v)
    far = v > 50  # whose exponential may be infinite, and p_t 0
    terms[far] = np.exp((log_p_t + v)[far]) - (p_t * (1 + v))[far]
    return np.log1p(terms.sum(1))


def standardised(x: Array) -> tuple[Array, Array]:
    """[B, K] as soft_row.h:Standardised has it, and what it is divided by."""
    K = x.shape[1]
    x = x - x.mean(1, keepdims=True)
    wider = x.std(1, ddof=1, keepdims=True) + 1e-7 if K > 1 else np.ones((len(x), 1))
    return x / wider, wider


def soft_terms(
    w: dict[str, float], x: Array, x_t: Array, targets: list[tuple[Array, Array]]
) -> tuple[dict[str, Array], Array]:
    """soft_row.h in NumPy: [B] of each part, and the gradient [B, K] of their weighted sum. targets: labels, shares."""
    (B, K), T, values = x.shape, w["temperature"], {}
    every, g, h = np.arange(B), np.zeros_like(x), np.zeros_like(x)
    if w["hard"]:
        y = x_t.argmax(1)
        values["hard"] = -log_softmax(x)[every, y]
        g += w["hard"] * (np.exp(log_softmax(x)) - np.eye(K)[y])
    s, wider = standardised(x) if w["standardize"] else (x, np.ones((B, 1)))
    s_t = standardised(x_t)[0] if w["standardize"] else x_t
    cold_t = log_softmax(s_t / T)
    if w["kl"] and w["standardize"]:
        cold = log_softmax(s / T)
        values["kl"] = T * T * (np.exp(cold_t) * (cold_t - cold)).sum(1)
        h += w["kl"] * T * (np.exp(cold) - np.exp(cold_t))
    if w["ttm"] or w["wttm"]:
        g_t = w["ttm_power"]
        p, softened, mass = log_softmax(s), log_softmax(g_t * s_t), np.exp(g_t * log_softmax(s_t)).sum(1)
        values["ttm"] = (np.exp(softened) * (softened - p)).sum(1)
        values["wttm"] = mass * values["ttm"]
        h += (w["ttm"] + w["wttm"] * mass)[:, None] * (np.exp(p) - np.exp(softened))
    if w["nkd"]:
        values["nkd"] = np.zeros(B)
        for labels, share in targets:
            t_y, own = np.exp(log_softmax(s_t))[every, labels], log_softmax(s)
            value = -t_y * own[every, labels]
            of_label = t_y[:, None] * (np.exp(own) - np.eye(K)[labels])
            if K > 1:
                others = np.where(np.eye(K)[labels] > 0, -np.inf, 0)
                q, q_t = log_softmax(s / T + others), log_softmax(s_t / T + others)
                value -= w["nkd_gamma"] * T * T * (np.exp(q_t) * np.where(others < 0, 0, q)).sum(1)
                of_label += w["nkd_gamma"] * T * (np.exp(q) - np.exp(q_t))
            values["nkd"] += share * value
            h += w["nkd"] * share[:, None] * of_label
    if w["standardize"] and K > 1:
        h = (h - s * (h * s).sum(1, keepdims=True) * wider / ((wider - 1e-7) * (K - 1))) / wider
    return values, g + h


def row_loss(
    kernels: ModuleType,
    t: DType,
    B: int,
    K: int,
    *,
    teacher: str | None = "delta",
    two_labels: bool = True,
    bias: bool = True,
    grad: bool = True,
    edit: str = "",
    **changed: float,
) -> list[Array]:
    data = Data(t, f"row_loss {B} {K} {edit}")
    w = WEIGHTS | changed
    logits, logits64 = data.normal(B, K, scale=2)
    labels, labels_b = data.labels(B, K), data.labels(B, K)
    if edit == "large":  # +-1e3: an exponential without its maximum subtracted would overflow
        logits, logits64 = data.normal(B, K, scale=400)
    elif edit == "ties":  # the largest logit three times in a row; the first one counts, whichever thread finds it
        logits64[:, [0, 3, K - 1]] = 60
        logits64[1::2, 0] = 0
        logits = t.encode(logits64)
        labels[:] = np.where(np.arange(B) % 2, 3, 0)
        labels[-1] = K - 1
    elif edit == "nan":
        logits64[0, K // 2] = np.nan
        logits = t.encode(logits64)
    elif edit == "inf":  # whose own exponential is left out: it must not hide itself
        logits64[0, K // 2] = np.inf
        logits = t.encode(logits64)
    elif edit == "ahead":  # labels_b's logit far above all others, and its share nearly all of the target
        logits = t.encode(logits64 + 40 * (np.arange(K) == labels_b[:, None]))
        logits64 = t.decode(logits)
    elif edit == "labels":  # what no check on the host can catch without waiting for the GPU
        labels[:4] = [K, -1, np.iinfo(np.int64).max, np.iinfo(np.int64).min]
        labels_b[4:6] = [K, -1]
    b, b64 = data.normal_acc(K)
    bias = bias and edit not in ("ties", "alike")
    x = logits64 + (b64 if bias else 0)
    apart = 2000 if edit == "large" else 0.5  # the teacher's largest logit is another class's, far above
    delta, delta64 = data.normal(B, K, scale=apart)
    logits_t, logits_t64 = data.normal_acc(B, K, scale=2)
    if (
        edit == "alike"
    ):  # to digits that no logit has; the last three equal, equal but for a constant, and not at all alike
        delta64 *= 8 ** -np.arange(B, dtype=np.float64)[:, None]
        delta64[-3], delta64[-2] = 0, 1.5
        delta64[-1] *= 4 * 8 ** (B - 1)
        delta = t.encode(delta64)
        delta64 = t.decode(delta)
        logits_t = (x - delta64).astype(t.accumulator)
        logits_t64 = logits_t.astype(np.float64)
    mix = data.random.random(B).astype(t.accumulator)
    if edit == "ahead":
        mix = mix * t.accumulator(1e-3) + t.accumulator(1e-6)
    far = {"either": np.arange(B) % 3 == 0, "32nd far": np.arange(B) % 32 == 31}.get(str(teacher), np.zeros(B, bool))
    stacked = teacher in ("delta", "either", "32nd far")
    raw_t64 = delta64 + (b64 if bias else 0)  # where far
    d = np.where(far[:, None], x - raw_t64, delta64) if stacked else np.zeros((B, K))
    if teacher == "logits_t":
        d = x - logits_t64
    parts, top1, counts = data.out(len(PARTS), B), np.full(B, -7), np.array([3, 5])
    arrays = {
        "bias": b if bias else None,
        "delta": delta if stacked else None,
        "far": far.astype(np.uint8) if stacked and teacher != "delta" else None,
        "logits_t": logits_t if teacher is not None else None,  # not read where there is a delta
        "labels": labels,
        "labels_b": labels_b if two_labels else None,
        "mix": mix if two_labels else None,
    }
    outs = {"part_rows": parts, "top1_rows": top1, "counts": counts}
    kernels.row_loss(dtype=t.name, logits=logits, **arrays, **outs, B=B, K=K, grad=grad, **w)

    T, smoothing = w["temperature"], w["label_smoothing"]
    valid = (labels >= 0) & (labels < K)
    if two_labels:
        valid &= (labels_b >= 0) & (labels_b < K)
    share = mix.astype(np.float64) if two_labels else np.ones(B)
    q = np.full((B, K), smoothing / K)
    rows = np.flatnonzero(valid)
    q[rows, labels[rows]] += (1 - smoothing) * share[rows]
    q[rows, labels_b[rows]] += (1 - smoothing) * (1 - share[rows])
    q[~valid] = np.nan
    with np.errstate(invalid="ignore"):
        p, p_s, p_t = log_softmax(x), log_softmax(x / T), log_softmax((x - d) / T)
        ce = -(q * p).sum(1)
        kl = T * T * (np.exp(p_t) * (p_t - p_s)).sum(1)
        g = np.zeros((B, K))
        if w["ce"]:
            g += w["ce"] * (np.exp(p) - q)
        if w["sr"]:
            g += 2 * w["sr"] / K * d
        if w["kl"] and not w["standardize"]:
            g += w["kl"] * T * (np.exp(p_s) - np.exp(p_t))
        hits = np.where(np.isnan(x), -np.inf, x).argmax(1) == labels
        soft, soft_g = {}, 0
        if of_two_rows(w):
            targets = [(np.where(valid, labels, 0), share)]
            targets += [(np.where(valid, labels_b, 0), 1 - share)] if two_labels else []
            soft, soft_g = soft_terms(w, x, x - d, targets)
            if w["nkd"]:
                soft["nkd"][~valid] = soft_g[~valid] = np.nan
            kl = soft.get("kl", kl)
        g += soft_g
    size = max(1, abs(x[np.isfinite(x)]).max())
    close("ce", parts[0], ce if w["ce"] else 0, t)
    close("sr", parts[1], np.square(d).sum(1) if w["sr"] else 0, t)
    close("the pooled match's rows", parts[2], np.nan, t)  # another kernel's
    close("kl", parts[3], kl if w["kl"] else 0, t, scale=T * size)
    for i, name in enumerate(PARTS[4:], 4):
        if w[name]:
            close(name, parts[i], soft[name], t, scale=T * size)
    if edit == "alike":
        np.testing.assert_array_equal(parts[3, -3:-1], 0 if teacher == "delta" else [0, parts[3, -2]])
        if teacher == "delta":
            close("kl's digits", parts[3, :-3], excess_kl(p_t, d / T)[:-3] * T * T, t, scale=0)
    if edit == "ahead":
        close("cross-entropy's digits", parts[0], ce, t, scale=0)
    assert not (parts[3] < 0).any()
    if grad:
        close(
            "gradient",
            logits,
            g,
            t,
            stored=True,
            scale=max(1, size / 8),
            least=float(K == 1 or (K == 2 and bool(w["standardize"]))),
        )  # +-0.7 whatever the logits
    else:
        close("logits", logits, logits64, t, stored=True)
    if edit != "nan":
        np.testing.assert_array_equal(top1, hits)
    np.testing.assert_array_equal(counts, [3 + (~valid).sum(), 5])
    return [parts, top1, logits, counts]


def stack_rows(kernels: ModuleType, t: DType, B: int, Ct: int, pooled: bool) -> list[Array]:
    """Rows near and far in turn, the first and the last just so."""
    data = Data(t, f"stack_rows {B} {Ct}")
    (z, _), (d, d64), (pooled_t, pooled64) = data.normal_acc(B, Ct), data.normal_acc(B, Ct), data.normal_acc(B, Ct)
    far = np.arange(B) % 2 == 0
    sizes = np.linalg.norm(pooled64, axis=1) / np.linalg.norm(d64, axis=1) * np.where(far, 0.502, 0.498)
    d = (d64 * sizes[:, None]).astype(t.accumulator)
    stack, flags = data.out_stored(2, B, Ct), np.full(B, 7, np.uint8)
    kernels.stack_rows(
        dtype=t.name, z=z, d=d, pooled_t=pooled_t if pooled else None, stack=stack, far=flags if pooled else None, B=B,
        Ct=Ct,
    )  # fmt: skip
    np.testing.assert_array_equal(flags, far if pooled else 7)
    want = np.stack([z, np.where(far[:, None] & pooled, pooled_t, d)])
    np.testing.assert_array_equal(stack, t.encode(want))
    return [stack, flags]


def take_counts(kernels: ModuleType, t: DType, first: int) -> list[Array]:
    counts, out = np.array([first, 2**40]), np.full(2, -7)
    kernels.take_counts(counts=counts, out=out)
    np.testing.assert_array_equal(out, [first, 2**40])
    np.testing.assert_array_equal(counts, [0, 0])
    return [counts, out]


def device_counts(kernels: ModuleType, t: DType, device: int) -> list[Array]:
    """Whether or not the device has them, the thread's capture mode is the one from before and no error stays."""
    before = kernels.capture_mode()
    kernels.set_device(device)
    try:
        error, found = kernels.device_counts()
    finally:
        kernels.set_device(0)
    assert found == (error == 0) == (device == 0), f"error {error}, found {found}"
    assert kernels.capture_mode() == before, f"capture mode {before} became {kernels.capture_mode()}"
    assert kernels.last_error() == 0, f"error {kernels.last_error()} was left behind"
    return []


def compute_capability(kernels: ModuleType, t: DType, device: int) -> list[Array]:
    kernels.set_device(device)
    try:
        got = kernels.compute_capability()
    finally:
        kernels.set_device(0)
    wanted = {0: 90, 1: 86}.get(device, 0)
    assert got == wanted, f"device {device} has {got}, wanted {wanted}"
    return []


def loss_sum(kernels: ModuleType, t: DType, B: int, **changed: float) -> list[Array]:
    data = Data(t, f"loss_sum {B}")
    w, K, Ct = WEIGHTS | changed, 21, 5
    rows, rows64 = data.normal_acc(len(PARTS), B)
    for i, name in enumerate(PARTS):
        if not w[name]:
            rows[i], rows64[i] = np.nan, 0  # a part without weight has rows that nobody wrote
    top1_rows = data.random.integers(0, 2, B)
    loss, parts, top1 = data.out(), data.out(len(PARTS)), np.full((), -7)
    kernels.loss_sum(
        dtype=t.name, part_rows=rows, top1_rows=top1_rows, loss=loss, parts=parts, top1=top1, B=B, K=K, Ct=Ct, **w
    )
    weights, terms = np.array([w[name] for name in PARTS]), [1, K, Ct, *[1] * (len(PARTS) - 3)]
    wanted = np.where(weights != 0, rows64.sum(1) / (B or np.nan) / terms, 0)
    close("parts", parts, wanted, t)
    close("loss", loss, wanted @ weights, t)
    assert top1 == top1_rows.sum(), f"top1 is {top1}, wanted {top1_rows.sum()}"
    return [loss, parts, top1]


def feature_grad(kernels: ModuleType, t: DType, B: int, Ct: int, pooled: bool) -> list[Array]:
    data = Data(t, f"feature_grad {B} {Ct}")
    (dz_w, dz_w64), (d, d64), dz = data.normal(B, Ct), data.normal_acc(B, Ct), data.out(B, Ct)
    kernels.feature_grad(dtype=t.name, dz_w=dz_w, d=d if pooled else None, dz=dz, B=B, Ct=Ct, batch=B + 2, fm=0.3)
    close("dz", dz, (dz_w64 + (2 * 0.3 / Ct * d64 if pooled else 0)) / (B + 2), t)
    return [dz]


# --------------------------------------------------------------------------------------------------------------------


def all_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}

    def add(kernel: Callable[..., list[Array]], t: DType, *sizes: Any, **options: Any) -> None:
        named = " ".join(f"{k}={v}" for k, v in options.items() if k != "edit" or v)
        label = " ".join(filter(None, [kernel.__name__, t.name, *map(str, sizes), named]))
        cases[label] = functools.partial(kernel, t=t, **_named(kernel, sizes), **options)

    for t in ACCUMULATORS:
        for B, Ct in ((1, 1), (3, 255), (2, 256), (1, 257), (2, 700)):
            add(feature_diff, t, B, Ct)
        for rows, cols in ((1, 1), (5, 1), (1024, 1), (2100, 1), (1, 32), (3, 31), (32, 33), (300, 40), (71, 2)):
            add(column_sum, t, rows, cols, 0.25)
        for cols in (1, 2):
            add(column_sum, t, 200000, cols, 0.25, shift=3)
        for N, Ct, rows_per_part in (
            (1, 1, 128),
            (7, 33, 2),
            (128, 31, 128),
            (129, 32, 128),
            (500, 40, 7),
            (290, 3, 2),
        ):
            for shift in (0, 300):
                add(combine_stats, t, N, Ct, rows_per_part, shift)
        add(combine_stats, t, 12000, 2, 2, 100000)
        for Ct, share in ((1, 0.1), (300, 0.1), (129, 0.75), (5, 1)):
            add(follow_stats, t, Ct, share, counted=Ct != 129)
        for B, Ct in ((1, 1), (31, 33), (33, 64), (70, 40), (2, 1100)):
            add(match_sums, t, B, Ct)
        for B, P, Ct in ((1, 1, 1), (3, 49, 31), (33, 64, 32), (70, 1, 41), (140, 2, 3)):
            for match in ("map", "pooled", None):
                add(channel_grads, t, B, P, Ct, match)
        for match in ("pooled", None):
            add(channel_grads, t, 37, 1, 70, match, linear=True)
        add(channel_grads, t, 200000, 1, 2, None, shift=3)
        add(channel_grads, t, 200000, 1, 2, None, linear=True, shift=3)
        for B in (0, 1, 255, 256, 300):
            add(loss_sum, t, B)
        add(loss_sum, t, 0, sr=0, kl=0)
        add(take_counts, t, 7)
        add(feature_diff, t, 0, 4)
        for part in PARTS:
            add(loss_sum, t, 5, **(SOFT | {part: 0}))
        add(loss_sum, t, 5, ce=1, sr=1, fm=1, kl=1)
    for device in (0, 1, -1):
        add(compute_capability, F32, device)
        add(device_counts, F32, device)
    for t in DTYPES:
        for N, Ct in ((1, 1), (2, 66), (7, 31), (9, 64), (127, 34), (128, 8), (129, 33), (300, 72)):
            add(channel_stats, t, N, Ct, 0, False)
        for shift in (300, 60000):
            add(channel_stats, t, 133, 4, shift, False)
        add(channel_stats, t, 130, 6, 0, True)
        for odd in ("y", "map_t", "z", "count", "yhat", "square", "res", "res_yhat"):
            add(match_forward, t, 2, 8, 6, "norm", True, True, odd=odd)
        for odd in ("y", "map_t", "dy"):
            add(match_backward, t, 2, 8, 6, "norm", True, True, True, odd=odd)
        for B, P, Ct in ((1, 1, 1), (2, 49, 136), (3, 64, 43), (1, 13, 2), (5, 14, 66), (1, 7, 10), (2, 1, 129)):
            for kind in AFFINES:
                add(match_forward, t, B, P, Ct, kind, True, True)
                add(match_backward, t, B, P, Ct, kind, True, True, kind == "norm")
            for match, relu in ((False, True), (True, False), (False, False)):
                add(match_forward, t, B, P, Ct, "norm", match, relu)
                add(match_backward, t, B, P, Ct, "norm", match, relu, True)
            add(match_forward, t, B, P, Ct, "none", False, True)
        for P in (65, 128, 150):
            for match in (True, False):
                add(match_forward, t, 2, P, 6, "norm", match, True)
        add(match_forward, t, 1, 12544, 2, "norm", True, True)
        for B, K in ((1, 1), (3, 2), (2, 255), (2, 256), (3, 257), (2, 1000)):
            for options in ROW_LOSSES.values():
                if K in (1, 2, 257) or not of_two_rows(options):
                    add(row_loss, t, B, K, **options)
        add(row_loss, t, 2, 21841)
        add(row_loss, t, 1, 21841, teacher="logits_t")
        add(row_loss, t, 4, 300, edit="large")
        add(row_loss, t, 5, 600, edit="ties")
        for teacher in ("delta", "logits_t"):
            for B, K in ((8, 1), (8, 5), (10, 300)):
                add(row_loss, t, B, K, edit="alike", teacher=teacher)
        for options in (ROW_LOSSES["mixup"], ROW_LOSSES["mixup"] | {"label_smoothing": 0.01}):
            add(row_loss, t, 5, 300, edit="ahead", **options)
        for B, Ct in ((1, 1), (2, 255), (3, 256), (4, 257)):
            for pooled in (True, False):
                add(stack_rows, t, B, Ct, pooled)
        add(row_loss, t, 3, 300, edit="nan")
        add(row_loss, t, 3, 1, edit="nan", **ROW_LOSSES["two rows"])  # the teacher's first class is none
        add(row_loss, t, 3, 300, edit="inf", **ROW_LOSSES["plain"])
        add(row_loss, t, 7, 40, edit="labels")
        for K in (1, 40):
            add(row_loss, t, 7, K, edit="labels", **ROW_LOSSES["two rows"])
        add(row_loss, t, 4, 300, edit="large", **(ONLY | SOFT))
        for B, Ct in ((1, 1), (3, 85), (2, 128), (1, 257)):
            for pooled in (True, False):
                add(feature_grad, t, B, Ct, pooled)
    return cases


def _named(kernel: Callable[..., list[Array]], sizes: tuple[Any, ...]) -> dict[str, Any]:
    names = kernel.__code__.co_varnames[2 : 2 + len(sizes)]
    return dict(zip(names, sizes, strict=True))


CASES = all_cases()
LARGE_GRIDS: dict[str, Case] = {  # more images than a grid's second dimension holds
    "match_forward": functools.partial(match_forward, t=F32, B=65536, P=1, Ct=1, kind="norm", match=True, relu=True),
    "match_backward": functools.partial(
        match_backward, t=F32, B=65536, P=1, Ct=1, kind="norm", match=True, relu=True, stats=True
    ),
}
