"""The kernels of class_map_loss at sizes that hurt, against numpy in float64; what a case is stands in cases.py."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np

from .cases import ACCUMULATORS, BF16, DTYPES, F16, F32, Array, Case, Data, DType, close, excess_kl, log_softmax

WEIGHTS = {"kl": 0.9, "dkd_alpha": 1.5, "dkd_beta": 0.7, "cam": 30.0, "temperature": 4.0}
ROWS = {"kl", "dkd_alpha", "dkd_beta"}
LEAST_NORM = 1e-12  # csrc/class_map.h:kLeastNorm


def dkd(x: Array, x_t: Array, labels: Array, alpha: float, beta: float, T: float) -> tuple[Array, Array]:
    """T^2 (alpha TCKD + beta NCKD) of rows [N, K] with labels [N], and its gradient."""
    N, K = x.shape
    if K == 1:
        return np.zeros(N), np.zeros((N, 1))
    own = np.eye(K, dtype=bool)[labels]
    others, others_t = (log_softmax(np.where(own, -np.inf, row / T)) for row in (x, x_t))

    def lead(row: Array) -> Array:  # the label's logit over log-sum-exp of the others'
        rest = np.where(own, -np.inf, row / T)
        top = rest.max(1)
        return (row / T)[own] - top - np.log(np.exp(rest - top[:, None]).sum(1))

    two = np.stack([lead(x), 0 * x[:, 0]], 1)
    two_t = np.stack([lead(x_t), 0 * x[:, 0]], 1)
    target = kl_of(log_softmax(two), log_softmax(two_t), two - two_t)
    q, q_t = np.exp(others), np.exp(others_t)
    rest = (q_t * np.where(own, 0, others_t - others)).sum(1)
    pull = binary_difference(two[:, 0], two_t[:, 0])
    g = alpha * T * pull[:, None] * np.where(own, 1, -q) + beta * T * (q - q_t)
    return T * T * (alpha * target + beta * rest), g


def kl_of(log_p: Array, log_p_t: Array, apart: Array) -> Array:
    """KL of rows whose logits are `apart`."""
    rough = (np.exp(log_p_t) * (log_p_t - log_p)).sum(1)
    near = rough < 0.5
    rough[near] = excess_kl(log_p_t[near], apart[near])
    return rough


def binary_difference(lead: Array, lead_t: Array) -> Array:
    """sigmoid(lead) - sigmoid(lead_t), with its digits."""
    sign = np.where(lead > 0, -1, 1)
    u, v = sign * lead, sign * lead_t
    return sign * (np.exp(-np.logaddexp(0, -u)) - np.exp(-np.logaddexp(0, -v)))


def maps_apart(c: Array, c_t: Array, diff: Array) -> tuple[Array, Array, Array]:
    """[B, map, K] class maps: squared distance of the normalised ones [B, K], half its gradient [B, map, K], and the
    size of the terms whose difference that is.
    """
    size, size_t = np.sqrt(np.square(c).sum(1, keepdims=True)), np.sqrt(np.square(c_t).sum(1, keepdims=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        stretch = (diff * (c + c_t)).sum(1, keepdims=True) / (size + size_t)  # |c| - |c_t|
        close_by = (diff - c_t / size_t * stretch) / size
    norm, norm_t = np.maximum(size, LEAST_NORM), np.maximum(size_t, LEAST_NORM)
    plain = ~((size > LEAST_NORM) & (size_t > LEAST_NORM))
    e = np.where(plain, c / norm - c_t / norm_t, close_by)
    along = np.where(size > LEAST_NORM, (e * c / norm).sum(1, keepdims=True), 0)
    return np.square(e).sum(1), (e - c / norm * along) / norm, (1 + abs(diff).max(1, keepdims=True) / norm) / norm


def class_map_rows(
    kernels: ModuleType,
    t: DType,
    B: int,
    P: int,
    K: int,
    map_: int,
    *,
    into: DType | None = None,
    teacher: str = "either",
    bias: bool = True,
    share: bool = True,
    grad: bool = True,
    edit: str = "",
    **changed: float,
) -> list[Array]:
    """into: the gradient's type, where it is not t. teacher: which rows are far: "either", "near", or by "squares"."""
    data, w, g_type = Data(t, f"class_map_rows {B} {P} {K} {map_}"), WEIGHTS | changed, into or t
    of_rows, maps = any(w[name] for name in ROWS), slice(P - map_, P)
    T, stride = w["temperature"], -(-K // 8) * 8 if into else K
    labels = data.labels(B, K)
    x64 = data.random.standard_normal((B, P, K)) * 2
    t64 = x64 + data.random.standard_normal((B, P, K))
    # the teacher's answer is the label's at some positions, and to some whole maps
    right = (np.arange(B)[:, None] // 2 + np.arange(P) * (1 + np.arange(B)[:, None] % 2)) % 3 != 0
    t64[np.arange(B)[:, None], np.arange(P), labels[:, None]] += np.where(right, 12, -6)
    if edit == "large":
        x64, t64 = 400 * x64, 400 * t64
    elif edit == "sure":  # of the label, or of another class
        way = np.where(np.arange(B * P).reshape(B, P) % 2, 24, -24)
        for row in (x64, t64):
            row[np.arange(B)[:, None], np.arange(P), labels[:, None]] = way
        t64[np.arange(B)[:, None], np.arange(P), labels[:, None]] += 0.25
    elif edit == "empty maps":  # of the student, of the teacher, of both
        for b, (own, other) in enumerate(((0, 1), (1, 0), (0, 0))):
            x64[b, :, 0] *= own
            t64[b, :, 0] *= other
    far = (np.arange(B * P) % 3 == 0).reshape(B, P) & (teacher != "near") & (edit != "alike")
    logits = t.encode(x64)
    x64 = t.decode(logits)
    delta64 = np.where(far[..., None], t64, x64 - t64)
    if edit == "alike":  # to digits that no logit has; the first rows equal
        delta64 = data.random.standard_normal((B, P, K)) * 8.0 ** -np.arange(B)[:, None, None]
        delta64[0] = 0
    delta = t.encode(delta64)
    delta64 = t.decode(delta)
    if edit == "nan":
        logits64 = x64.copy()
        logits64[0, P - 1, K // 2] = np.nan
        logits, x64 = t.encode(logits64), logits64
    diff64 = np.where(far[..., None], x64 - delta64, delta64)
    t64 = np.where(far[..., None], delta64, x64 - delta64)
    given = labels.copy()
    if edit == "labels":
        given[:4] = [K, -1, np.iinfo(np.int64).max, np.iinfo(np.int64).min]
    valid = (given >= 0) & (given < K)
    b, b64 = data.normal_acc(K)
    shares = data.random.random(B).astype(t.accumulator)
    factor = shares.astype(np.float64) if share else np.ones(B)
    squares = {
        "far": far.astype(np.uint8) if teacher != "squares" else None,
        "square": np.full((B, P), 0.5, np.float32) if teacher == "squares" else None,
        "square_t": np.where(far, 1.96, 2.04).astype(np.float32) if teacher == "squares" else None,
    }
    parts, cam = data.out(B, P, 2), data.out(B, kernels.cam_parts(K))
    counts, gradient = np.array([3, 5]), g_type.encode(np.full((B, P, stride), np.nan))
    kernels.class_map_rows(
        dtype=t.name, gradient_dtype=g_type.name, logits=logits, delta=delta, **squares, bias=b if bias else None,
        labels=given if of_rows else None, share=shares if share else None, part_rows=parts, cam_rows=cam,
        counts=counts, gradient=gradient if grad else None, stride=stride, B=B, P=P, K=K, map=map_, **w,
    )  # fmt: skip

    want, kl, dkd_rows = np.zeros((B, P, K)), np.zeros((B, P)), np.zeros((B, P))
    size = max(1, np.nanmax(abs(x64)), np.nanmax(abs(t64)))
    if of_rows:
        own, own_t = x64 + (b64 if bias else 0), t64 + (b64 if bias else 0)
        answers = own_t.argmax(2) == given[:, None]
        if K > 1 and P > 2 and B > 1 and not edit:
            assert answers.any()
            assert not answers.all()
        row_factor = factor[:, None] * np.where(answers == answers[:, :1], 1, 2)
        row_factor[~valid] = np.nan
        with np.errstate(invalid="ignore"):
            rows, rows_t = own.reshape(-1, K), own_t.reshape(-1, K)
            p, p_t = log_softmax(rows / T), log_softmax(rows_t / T)
            if w["kl"]:
                kl = row_factor * (T * T * kl_of(p, p_t, (rows - rows_t) / T)).reshape(B, P)
                want += w["kl"] * T * (np.exp(p) - np.exp(p_t)).reshape(B, P, K)
            value, g = dkd(rows, rows_t, np.repeat(np.where(valid, given, 0), P), w["dkd_alpha"], w["dkd_beta"], T)
            if w["dkd_alpha"] or w["dkd_beta"]:
                dkd_rows = row_factor * value.reshape(B, P)
                want += g.reshape(B, P, K)
            want *= row_factor[..., None]
    scale = T * size
    close("kl", parts[..., 0], kl if of_rows else np.nan, t, scale=scale)
    close("dkd", parts[..., 1], dkd_rows if of_rows else np.nan, t, scale=scale * (1 + 60 * (edit == "sure")))
    if edit == "alike":
        np.testing.assert_array_equal(parts[0] if of_rows else 0, 0)
        np.testing.assert_array_equal(g_type.decode(gradient)[0] if grad else 0, 0)
    apart, half, terms = maps_apart(x64[:, maps], t64[:, maps], diff64[:, maps])
    more = np.zeros((B, P, K))
    if w["cam"]:
        distance = np.stack([part.sum(1) for part in np.array_split(apart, range(256, K, 256), 1)], 1)
        close("cam", cam, factor[:, None] * distance, t, scale=0 if edit == "alike" else 1)
        c = factor[:, None, None] * 2 * w["cam"] * P / (map_ * K)
        want[:, maps] += c * half
        more[:, maps] = t.error * c * terms + g_type.rounding * abs(c * half) * of_rows  # rounded twice
    else:
        close("cam", cam, np.nan, t)
    np.testing.assert_array_equal(counts, [3 + ((~valid).sum() if of_rows else 0), 5])
    if grad:
        kept, padding = np.split(gradient, [K], 2)
        np.testing.assert_array_equal(g_type.decode(padding), 0)
        for image in range(B) if edit in ("alike", "empty maps") else [slice(None)]:  # of very different sizes
            close(
                "gradient", kept[image], want[image], g_type, stored=True, scale=max(2, size / 4), least=0.3,
                more=more[image],
            )  # fmt: skip
    else:
        assert np.isnan(g_type.decode(gradient)).all()
    return [parts, cam, gradient, counts]


def class_map_sum(kernels: ModuleType, t: DType, B: int, P: int, K: int, map_: int, **changed: float) -> list[Array]:
    data, w = Data(t, f"class_map_sum {B} {P} {K}"), WEIGHTS | changed
    (rows, rows64), (cam, cam64) = data.normal_acc(B, P, 2), data.normal_acc(B, kernels.cam_parts(K))
    weights = np.array([w["kl"], float(any(w[name] for name in ROWS)), w["cam"]])
    if not weights[1]:
        rows[:] = np.nan  # nobody wrote them
    elif not weights[0]:
        rows[..., 0] = np.nan
    if not w["cam"]:
        cam[:] = np.nan
    loss, parts = data.out(), data.out(3)
    kernels.class_map_sum(
        dtype=t.name, part_rows=rows, cam_rows=cam, loss=loss, parts=parts, B=B, P=P, K=K, map=map_, **w
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        of_rows = rows64.sum((0, 1)) / np.float64(B * P)
        want = np.where(weights != 0, [*of_rows, cam64.sum() / np.float64(B * K * map_)], 0)
    close("parts", parts, want, t)
    close("loss", loss, want @ weights, t, scale=max(1.0, *weights))
    return [loss, parts]


def all_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}

    def add(kernel: Any, t: DType, *sizes: int, **options: Any) -> None:
        named = [f"{k}={v.name if isinstance(v, DType) else v}" for k, v in options.items() if k != "edit" or v]
        label = " ".join([kernel.__name__, t.name, *map(str, sizes), *named])
        assert label not in cases, label
        cases[label] = functools.partial(kernel, **dict(zip(SIZES, sizes, strict=True)), t=t, **options)

    nothing = dict.fromkeys(("kl", "dkd_alpha", "dkd_beta", "cam"), 0.0)
    alone = {"kl": 0, "dkd_alpha": 0, "dkd_beta": 0}
    types: list[tuple[DType, dict[str, Any]]] = [(t, {}) for t in DTYPES]
    types += [(F32, {"into": into, "teacher": "squares"}) for into in (BF16, F16)]
    for t, given in types:
        for B, P, K, map_ in ((1, 1, 1, 1), (2, 5, 3, 4), (1, 21, 16, 16), (2, 5, 257, 4), (4, 1, 300, 1)):
            add(class_map_rows, t, B, P, K, map_, **given)
        add(class_map_rows, t, 2, 5, 9, 4, cam=0, **given)
        add(class_map_rows, t, 2, 5, 9, 4, **alone, **given)
        add(class_map_rows, t, 2, 3, 9, 2, grad=False, **given)
        add(class_map_rows, t, 2, 3, 9, 2, grad=False, **alone, **given)
    for t in ACCUMULATORS:
        for name in alone:
            add(class_map_rows, t, 2, 3, 9, 2, **(nothing | {name: 1.3}))
        for options in ({"bias": False}, {"share": False}, {"temperature": 1.0}):
            add(class_map_rows, t, 2, 3, 37, 2, **options)
        add(class_map_rows, t, 6, 3, 19, 2, edit="labels")
        add(class_map_rows, t, 2, 2, 19, 1, edit="nan")
        add(class_map_rows, t, 2, 2, 19, 1, edit="nan", cam=0)
        add(class_map_rows, t, 4, 2, 30, 1, edit="sure", cam=0, kl=0, dkd_beta=0, temperature=1.0)
        add(class_map_rows, t, 2, 3, 40, 2, edit="large", cam=0)
        add(class_map_rows, t, 5, 3, 40, 2, edit="alike")
        add(class_map_rows, t, 4, 1, 300, 1, **alone)
    for t in (*ACCUMULATORS, BF16):
        add(class_map_rows, t, 3, 5, 10, 4, edit="empty maps", **alone)
    for t in ACCUMULATORS:
        for B, P, K, map_ in ((0, 5, 3, 4), (1, 1, 1, 1), (7, 21, 257, 16), (70, 5, 600, 4)):
            add(class_map_sum, t, B, P, K, map_)
        for options in (nothing, nothing | {"cam": 2.0}, {"cam": 0.0}, {"kl": 0.0}):
            add(class_map_sum, t, 5, 5, 7, 4, **options)
    return cases


SIZES = ("B", "P", "K", "map_")
CASES = all_cases()
