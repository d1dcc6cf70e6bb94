"""The tensor-core kernels at sizes that hurt, against numpy in float64; what a case is stands in cases.py."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from . import cases
from .cases import BF16, F16, F32, WEIGHTS, Array, Case, Data, DType, close, log_softmax, strict

SATURATION = 76.0  # csrc/cuda/classifier_tiles.h:kSaturation


def _split(x: Array) -> tuple[Array, Array]:
    """bfloat16 bits [2, ...] of x: rounded, and what the rounding left out; and the sum of both in float64."""
    high = BF16.encode(x)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        low = BF16.encode(x - BF16.decode(high))
    return np.stack([high, low]), BF16.decode(high) + BF16.decode(low)


def _anchored(
    data: Data, z: Array, weight64: Array, labels: Array, labels_b: Array | None, b64: Array | None, edit: str
) -> tuple[Array, Array, Array]:
    """anchor [B] of the rounded z, logit_b [B], which rows are valid [B]; edits labels, and z, in place."""
    t, B, K = data.t, len(labels), len(weight64)
    if edit == "labels":
        labels[:4] = [K, -1, np.iinfo(np.int64).max, np.iinfo(np.int64).min]
        if labels_b is not None:
            labels_b[4:6] = [K, -1]
    valid = (labels >= 0) & (labels < K)
    if labels_b is not None:
        valid &= (labels_b >= 0) & (labels_b < K)
    with np.errstate(invalid="ignore"):
        logits = t.decode(t.encode(z)) @ weight64.T + (0 if b64 is None else b64)
    anchor, logit_b = np.full(B, np.nan), np.full(B, np.nan)
    rows = np.flatnonzero(valid)
    anchor[rows] = logits[rows, labels[rows]]
    logit_b[rows] = logits[rows, (labels if labels_b is None else labels_b)[rows]]
    return anchor, logit_b, valid


def _refused(call: Callable[[], None]) -> list[Array]:
    """A call whose operand lies at an odd address, of which the driver makes no tensor map: the launcher's own error,
    and no launch.
    """
    text = ""
    try:
        call()
    except RuntimeError as error:
        text = str(error)
    assert "invalid argument" in text, f"an operand that cannot be described: {text or 'no error'}"
    return []


def anchor_rows(
    kernels: ModuleType,
    t: DType,
    B: int,
    K: int,
    Ct: int,
    *,
    teacher: str | None = "split",
    two_labels: bool = True,
    bias: bool = True,
    anchors: bool = True,
    labelled: bool = True,
    edit: str = "",
) -> list[Array]:
    data = Data(t, f"anchor_rows {B} {K} {Ct}")
    (z, z64), (pooled_t, pooled64) = data.normal_acc(B, Ct), data.normal_acc(B, Ct)
    weight, weight64 = data.normal(K, Ct)
    b, b64 = data.normal_acc(K)
    labels, labels_b = data.labels(B, K), data.labels(B, K)
    if edit == "infinite":
        z[0, 0] = np.inf
        z[1, 0] = np.nan
        z64[:2, 0] = z[:2, 0]
    wanted, wanted_b, valid = _anchored(
        data, z, weight64, labels, labels_b if two_labels else None, b64 if bias else None, edit
    )
    z_t, d_t, d_split = data.out_stored(B, Ct), data.out_stored(B, Ct), BF16.encode(np.full((2, B, Ct), np.nan))
    anchor, logit_b, fm_rows, counts = data.out(B), data.out(B), data.out(B), np.array([3, 5])
    pooled, pooled_rows = data.out_stored(B, Ct), data.out(B)
    kernels.anchor_rows(
        dtype=t.name, z=z, pooled_t=pooled_t if teacher else None, classifier=weight,
        classifier_bias=b if bias else None, labels=labels if labelled else None,
        labels_b=labels_b if two_labels else None, z_t=z_t, d_t=d_t if teacher == "rounded" else None,
        pooled=pooled if teacher == "rounded" else None, d_split=d_split if teacher == "split" else None,
        anchor=anchor if anchors else None, logit_b=logit_b if anchors else None, fm_rows=fm_rows if teacher else None,
        pooled_rows=pooled_rows if teacher == "rounded" else None, row_parts=1, counts=counts if anchors else None,
        B=B, K=K, Ct=Ct,
    )  # fmt: skip
    np.testing.assert_array_equal(t.decode(z_t), t.decode(t.encode(z)))
    if anchors:
        finite = np.isfinite(wanted)
        close("anchor", anchor[finite], wanted[finite], t, scale=Ct**0.5)
        np.testing.assert_array_equal(anchor[~finite], wanted[~finite])
        np.testing.assert_array_equal(counts, [3 + (~valid).sum(), 5])
        valid &= np.isfinite(wanted_b)
        close("logit_b", logit_b[valid], wanted_b[valid], t, scale=Ct**0.5)
    if teacher:
        d = (z - pooled_t).astype(np.float32)
        finite = np.isfinite(z64).all(1)
        close("fm_rows", fm_rows[finite], np.square(z64 - pooled64).sum(1)[finite], t)
        assert not np.isfinite(fm_rows[~finite]).any()
        if teacher == "rounded":
            np.testing.assert_array_equal(d_t, t.encode(d))
            np.testing.assert_array_equal(pooled, t.encode(pooled_t))
            close("pooled_rows", pooled_rows, np.square(pooled64).sum(1), t)
        else:
            np.testing.assert_array_equal(d_split[:, finite], _split(d)[0][:, finite])
    return [z_t, d_t, pooled, d_split, anchor, fm_rows, pooled_rows]


def _in_parts(data: Data, x: Array, parts: int) -> tuple[Array, Array]:
    """x [B] of float32 as a sum of parts [parts, B], and what their sum in order is."""
    shares = data.random.standard_normal((parts, len(x))).astype(np.float32)
    with np.errstate(invalid="ignore"):
        shares[-1] = x - (shares[:-1].sum(0) if parts > 1 else 0)
        total = np.zeros(len(x), np.float32)
        for share in shares:
            total += share
    return shares, total


def logits_exp(
    kernels: ModuleType,
    t: DType,
    B: int,
    classes: int,
    Ct: int,
    *,
    first_class: int = 0,
    gram: bool = False,
    smoothing: bool = True,
    bias: bool = True,
    store: bool = True,
    parts: int = 1,
    two_labels: bool = False,
    stage: int = 1,
    odd: str = "",
    edit: str = "",
) -> list[Array]:
    data = Data(t, f"logits_exp {B} {classes} {Ct}")
    K, first_tile = first_class + classes + (3 if first_class else 0), first_class // 100  # a middle chunk, or the last
    (z, _), (pooled_t, _) = data.normal_acc(B, Ct), data.normal_acc(B, Ct)
    if edit == "broken":
        z[0, 0] = np.nan
    z_t = t.encode(z)
    weight, weight64 = data.normal(K, Ct, scale=2 / Ct**0.5)
    if (
        edit == "ties"
    ):  # the largest logit several times in a row, in one tile and across tiles: each tile's first one counts
        weight64[first_class :: max(1, classes // 4)] = weight64[first_class]
        weight = t.encode(weight64)
    b, b64 = data.normal_acc(K)
    if edit == "ties":
        b[:] = b64[:] = 1
    logits = t.decode(z_t) @ weight64.T + (b64 if bias else 0)  # [B, K]
    labels = data.labels(B, K)
    anchor = logits[np.arange(B), labels].astype(np.float32)
    if edit == "far":  # every class above the label by more than float's exponent
        anchor -= 1000
    if edit == "nan":  # also where it is only infinite
        anchor[:3] = [np.nan, np.inf, -np.inf]
    in_parts, anchor = _in_parts(data, anchor, parts)
    labels_b = data.labels(B, K)
    b_in_parts, logit_b = _in_parts(data, logits[np.arange(B), labels_b].astype(np.float32), parts)
    if two_labels:  # the one with the larger logit anchors
        labels_of, second = labels, logit_b > anchor
        labels, anchor = np.where(second, labels_b, labels), np.where(second, logit_b, anchor)
    else:
        labels_of = labels
    anchor[~np.isfinite(anchor)] = np.nan
    stride_e = -(-classes // 8) * 8
    tile = kernels.class_tile(stage, B, classes)
    tiles, gram_tiles = -(-classes // tile), -(-Ct // tile) if gram else 0
    every = first_tile + tiles + 1
    e = t.encode(np.full((B, stride_e), np.nan))
    others, sums, best = data.out(every, B), data.out(every, B), data.out(every, B)
    best_class = np.full((every, B), -7, np.int32)
    square, gram_d = data.out(max(1, gram_tiles), B), data.out(B, Ct)
    arrived = np.full((), -7, np.int32)
    d = (z - pooled_t).astype(np.float32)
    d_split, d64 = _split(d)
    g = weight64.T @ weight64
    g_split, g64 = _split(g)
    call = functools.partial(
        kernels.logits_exp,
        stage=stage, z_t=cases.at_odd_address(z_t) if odd == "z_t" else z_t, 
        weight=cases.at_odd_address(weight) if odd == "weight" else weight, bias=b if bias else None, anchor=in_parts,
        logit_b=b_in_parts if two_labels else None, fm_rows=None, pooled_rows=None, row_parts=parts, labels=labels_of,
        labels_b=labels_b if two_labels else None, e=e if store else None,
        stride_e=stride_e, others=others, logits=sums if smoothing else None, best=best, best_class=best_class,
        square=square if gram else None, class_tiles=every, gram_tiles=gram_tiles, first_tile=first_tile,
        gram=g_split if gram else None, d_split=d_split if gram else None, z=z if gram else None,
        pooled_t=pooled_t if gram else None, gram_d=gram_d if gram else None, B=B, Ct=Ct, first_class=first_class,
        classes=classes, arrived=arrived,
    )  # fmt: skip
    if odd:
        return _refused(call)
    call()
    assert arrived == 0
    own = logits[:, first_class : first_class + classes]
    above = np.minimum(own - anchor.astype(np.float64)[:, None], SATURATION)
    exponentials = np.exp(above)
    for row, label in enumerate(labels - first_class):
        if 0 <= label < classes:
            exponentials[row, label] = 0
    t_sum = DType(
        t.name, t.storage, t.accumulator, t.rounding, t.smallest, 2e-5
    )  # of sums of exponentials of float logits
    if store:
        padded = np.zeros((B, stride_e))
        padded[:, :classes] = exponentials
        wide = t.decode(e)
        with np.errstate(invalid="ignore"):
            wrong = ~((abs(wide - padded) <= (t.rounding + 2e-5) * padded) | (np.isnan(wide) & np.isnan(padded)))
        assert not wrong.any(), f"e{list(np.argwhere(wrong)[0])}: {wrong.sum()} differ"
    edges = [*range(0, classes, tile), classes]
    for i, (a, z_) in enumerate(itertools.pairwise(edges)):
        at = first_tile + i
        part = exponentials[:, a:z_]
        total = part.sum(1)
        close(f"others of tile {i}", others[at] / np.where(total > 0, total, 1), np.sign(total), t_sum)
        if smoothing:
            close(f"logits of tile {i}", sums[at], (own - anchor[:, None])[:, a:z_].sum(1), t, scale=10)
        sound = ~np.isnan(own).any(1)  # a row of nothing but NaN has no largest logit
        assert np.isneginf(best[at][~sound]).all()
        assert (best_class[at][~sound] == -1).all()
        top, top_class, part_own = best[at][sound], best_class[at][sound], own[sound]
        close(f"best of tile {i}", top, part_own[:, a:z_].max(1), t, scale=4)
        if edit == "ties":
            np.testing.assert_array_equal(top_class, first_class + a + part_own[:, a:z_].argmax(1))
        else:
            assert ((top_class >= first_class + a) & (top_class < first_class + z_)).all()
            near = np.take_along_axis(part_own, (top_class - first_class)[:, None], 1)[:, 0]
            close(f"logit of the best class of tile {i}", near, part_own[:, a:z_].max(1), F32, scale=4)
    untouched = [i for i in range(every) if not first_tile <= i < first_tile + tiles]
    assert np.isnan(others[untouched]).all()
    if gram:
        gd = d64 @ g64
        rough = DType("f32", np.float32, np.float32, 0, 0, 3e-5)  # low times low is left out
        size = abs(gd).max()
        close("gram_d", gram_d / size, gd / size, rough)
        close("square", square.sum(0) / np.square(d64).sum(1), (d64 * gd).sum(1) / np.square(d64).sum(1), rough)
    return [e, others, best, best_class, square, gram_d]


def _shares() -> dict[str, Array]:
    """Where the blocks that take the losses meet: csrc/cuda/classifier_tiles.h:Losses."""
    return {"shares": np.full((4, len(cases.PARTS) + 1), np.nan), "arrived": np.zeros((), np.int32)}


def _check_rounded(t: DType, dz_t: Array, dz: Array) -> None:
    np.testing.assert_array_equal(t.decode(dz_t), t.decode(t.encode(dz)), "dz_t is not dz rounded")


def grad_rows(
    kernels: ModuleType,
    t: DType,
    B: int,
    K: int,
    Ct: int,
    *,
    chunk: str = "only",
    gram: bool = True,
    pooled: bool = True,
    two_labels: bool = True,
    grad: bool = True,
    bias: bool = True,
    row_parts: int = 1,
    rounded: bool = True,
    stage: int = 1,
    edit: str = "",
    **changed: float,
) -> list[Array]:
    """chunk: which of the launches over the classes: "only" one, "first", "middle" or "last"."""
    data = Data(t, f"grad_rows {B} {K} {Ct}")
    w = WEIGHTS | {"kl": 0} | changed
    first, last = chunk in ("only", "first"), chunk in ("only", "last")
    first_class = 0 if first else 8
    classes = K - first_class - (0 if last else 3)
    stride_e = -(-classes // 8) * 8
    e64 = np.zeros((B, stride_e))
    e64[:, :classes] = np.exp(data.random.standard_normal((B, classes)))
    e = t.encode(e64)
    e64 = t.decode(e)[:, :classes]
    weight, weight64 = data.normal(K, Ct)
    (z, z64), (pooled_t, pooled64), (gram_d, gram_d64) = (data.normal_acc(B, Ct) for _ in range(3))
    dz_before, before64 = data.normal_acc(B, Ct)
    dz = data.out(B, Ct) if first else dz_before.copy()
    dz_t = data.out_stored(B, Ct)
    sums_in, sums_in64 = data.normal_acc(Ct)
    sums_out = data.out(Ct)
    class_tiles, gram_tiles = 3, 2
    others = np.exp(data.random.standard_normal((class_tiles, B))).astype(np.float32)
    logits, logits64 = data.normal_acc(class_tiles, B)
    best, _ = data.normal_acc(class_tiles, B)
    best_class = np.stack([data.random.integers(i * 100, i * 100 + 100, B) for i in range(class_tiles)]).astype(
        np.int32
    )
    square, square64 = data.normal_acc(gram_tiles, B)
    (anchor, _), (logit_b, _), (fm_rows, _) = (data.normal_acc(B) for _ in range(3))
    labels, labels_b = data.labels(B, K), data.labels(B, K)
    mix = data.random.random(B).astype(np.float32)
    top = best_class[best.argmax(0), np.arange(B)]
    saturated = np.zeros(B, bool)
    if edit == "hits":
        best[1, :] = best[0, :]  # a tie between tiles: the lower class
        best[0, 0], best_class[0, 0] = 9, 0
        best[0, 1], best_class[0, 1] = -np.inf, -1  # a tile of NaN
        top = best_class[best.argmax(0), np.arange(B)]
        labels = np.where(np.arange(B) % 3 < 2, top, labels)
    elif edit.startswith("saturated"):
        saturated[[0, B - 1]] = True
        anchor[saturated] -= 500
        logit_b[saturated] -= 500
    elif edit == "nan":
        anchor[B // 2] = np.nan
        labels[B // 2] = -1
        # its logits are NaN too: no class is the best, not even -1
        best[:, B // 2], best_class[:, B // 2] = -np.inf, -1
        top[B // 2] = K
        anchor[B - 1] = np.inf
        labels[B - 1] = K
    if edit == "saturated":
        # logits so far apart that exponentials relative to another row's, or warp's, largest would not do
        z *= 16
        z64 *= 16
    z_t, (biases, biases64) = t.encode(z), data.normal_acc(K)
    if edit == "saturated":  # and all below 0, where leftovers in memory, taken for logits, would be the largest
        biases -= 640
        biases[:9] = -np.inf  # masked classes, the first that every warp meets
    elif edit == "saturated, flat":  # no class has all of a row's probability; a masked one among others
        biases[K // 2] = -np.inf
    biases64 = biases.astype(np.float64)
    loss, parts, top1, counts = data.out(), data.out(len(cases.PARTS)), np.full((), -7), np.array([3, 5])
    (anchor, in_all), (logit_b, b_in_all), (fm_rows, fm_in_all) = (
        _in_parts(data, x, row_parts) for x in (anchor, logit_b, fm_rows)
    )
    anchor64, other64, fm_rows64 = (x.astype(np.float64) for x in (in_all, b_in_all, fm_in_all))
    second = (other64 > anchor64) & two_labels  # of two labels the one with the larger logit anchors
    anchor64, other64 = np.where(second, other64, anchor64), np.where(second, anchor64, other64)
    anchor64[~np.isfinite(anchor64)] = np.nan
    smoothing = bool(w["ce"] and w["label_smoothing"])
    kernels.grad_rows(
        stage=stage, e=e if grad else None, weight=weight, stride_e=stride_e, first_class=first_class, classes=classes,
        first=first, last=last, grad=grad, dz=dz if grad else None,
        dz_t=dz_t if grad and rounded else None, weight_sums_in=sums_in if smoothing and not first else None,
        weight_sums_out=sums_out if smoothing and grad and not last else None, others=others,
        logits=logits if smoothing else None, best=best, best_class=best_class, square=square if gram else None,
        class_tiles=class_tiles, gram_tiles=gram_tiles if gram else 0, z_t=z_t, bias=biases if bias else None,
        anchor=anchor, logit_b=logit_b, fm_rows=fm_rows if pooled else None, pooled_rows=None, row_parts=row_parts,
        labels=labels, labels_b=labels_b if two_labels else None, mix=mix if two_labels else None, z=z,
        pooled_t=pooled_t if pooled else None, gram_d=gram_d if gram else None, loss=loss, parts=parts, top1=top1,
        **_shares(), counts=counts, B=B, K=K, Ct=Ct,
        **(w | {"fm": w["fm"] if pooled else 0, "sr": w["sr"] if gram else 0}),
    )  # fmt: skip
    fm_weight, sr_weight = w["fm"] if pooled else 0, w["sr"] if gram else 0
    product = e64 @ weight64[first_class : first_class + classes] if w["ce"] else np.zeros((B, Ct))
    raw = product + (0 if first else before64)
    column_sums = weight64[first_class : first_class + classes].sum(0) + (0 if first else sums_in64)
    if not last:
        if grad:
            close("dz", dz, raw, t, scale=np.abs(raw).max())
            if smoothing:
                close("weight_sums_out", sums_out, column_sums, t, scale=K**0.5)
        assert np.isnan(t.decode(dz_t)).all(), "dz_t is written before the last classes"
        return [dz, sums_out]
    eps, share = w["label_smoothing"], mix.astype(np.float64) if two_labels else np.ones(B)
    share = np.where(second, 1 - share, share)  # of the label that anchors
    s = others.astype(np.float64).sum(0)
    s = np.where(np.isnan(anchor64), np.nan, s)
    best64 = best.astype(np.float64)
    with np.errstate(divide="ignore"):
        ce_rows = np.where(saturated, np.log(np.exp(best64).sum(0)) - anchor64, np.log1p(s))
    if two_labels:
        ce_rows = ce_rows + (1 - eps) * (1 - share) * (anchor64 - other64)
    ce_rows = ce_rows - eps * logits64.sum(0) / K
    ce = ce_rows.mean() if w["ce"] else 0
    sr = np.maximum(square64.sum(0), 0).mean() / K if sr_weight else 0
    fm = fm_rows64.mean() / Ct if fm_weight else 0
    scale = 100 if saturated.any() else 4
    close("parts", parts, np.array([ce, sr, fm] + [0] * (len(cases.PARTS) - 3)), t, scale=scale)
    close(
        "loss",
        loss,
        sum(np.array([w["ce"], sr_weight, fm_weight]) * np.array([ce, sr, fm])) if edit != "nan" else np.nan,
        t,
        scale=scale,
    )
    assert top1 == (top == labels).sum(), f"top1 is {top1}, wanted {(top == labels).sum()}"
    np.testing.assert_array_equal(counts, [3, 5 + saturated.sum()])
    if not grad:
        return [loss, parts]
    c, total = w["ce"] / B, 1 + s
    want = np.zeros((B, Ct))
    if w["ce"]:
        a, b = weight64[np.clip(labels, 0, K - 1)], weight64[labels_b]
        a, b = np.where(second[:, None], b, a), np.where(second[:, None], a, b)
        want = (c / total)[:, None] * raw + (c * ((1 - (1 - eps) * share) - s / total))[:, None] * a
        exact = np.exp(log_softmax(t.decode(z_t) @ weight64.T + (biases64 if bias else 0))) @ weight64
        want[saturated] = c * (exact - ((1 - eps) * share)[:, None] * a)[saturated]
        if two_labels:
            want = want - (c * (1 - eps) * (1 - share))[:, None] * b
        want = want - c * eps / K * column_sums
    if sr_weight:
        want = want + 2 * sr_weight / (B * K) * gram_d64
    if fm_weight:
        want = want + 2 * fm_weight / (B * Ct) * (z64 - pooled64)
    size = np.nanmax(abs(want))
    close("dz", dz / size, want / size, t, scale=scale)
    if rounded:
        _check_rounded(t, dz_t, dz)
    return [loss, parts, dz, dz_t]


def logit_rows(kernels: ModuleType, t: DType, B: int, K: int, stage: int = 1, **options: Any) -> list[Array]:
    """cases.py:row_loss, whose logits and differences are products with a matrix of ones and zeros."""
    stride = Ct = -(-K // 8) * 8
    gradient, bits = t.encode(np.full((B, stride), np.nan)), []
    weight = t.encode(np.eye(K, Ct))

    class Product:
        @staticmethod
        def row_loss(
            dtype: str,
            logits: Array,
            delta: Array | None,
            far: Array | None,
            logits_t: Array | None,
            grad: bool,
            **rest: Any,
        ) -> None:
            rows, squares = [logits] if delta is None else [logits, delta], {"fm_rows": None, "pooled_rows": None}
            if far is not None:  # what does not serve is other than what does
                assert delta is not None
                other = t.encode(np.full((B, K), np.nan))
                rows = [logits, np.where(far[:, None], other, delta), np.where(far[:, None], delta, other)]
                pooled = np.where(far, 3.96, 4.04) * np.array([[0.25], [0.75]])
                squares = {"fm_rows": np.full((2, B), 0.5, np.float32), "pooled_rows": pooled.astype(np.float32)}
            stack = t.encode(np.zeros((len(rows) * B, Ct)))
            stack[:, :K] = np.concatenate(rows)
            served = [logits] if delta is None else [logits, delta]
            wanted = t.decode(np.concatenate(served))
            product, arrived = np.full((len(served) * B, K), np.nan, np.float32), np.full((), -7, np.int32)
            kernels.logit_rows(
                stage=stage, dtype=t.name, stack=stack, weight=weight, logits=product, features=delta is not None,
                logits_t=logits_t, grad=grad, gradient=gradient if grad else None, anchor=None, logit_b=None,
                **squares, row_parts=2, arrived=arrived, Ct=Ct, stride=stride, **rest,
            )  # fmt: skip
            assert arrived == 0
            np.testing.assert_array_equal(product, wanted)
            bits.append(product)
            if grad:
                np.testing.assert_array_equal(t.decode(gradient[:, K:]), 0)
                logits[:] = gradient[:, :K]

    return [*cases.row_loss(Product, t, B, K, **options), *bits, gradient]


def logit_rows_of(
    kernels: ModuleType, t: DType, B: int, K: int, Ct: int, stage: int = 1, cooperative: bool = True, odd: str = ""
) -> list[Array]:
    """Products of any operands, and what the rows make of them; in two launches where none is `cooperative`."""
    data = Data(t, f"logit_rows {B} {K} {Ct}")
    operands, wide = {}, {}
    for name, rows in (("stack", 2 * B), ("weight", K)):
        operands[name], wide[name] = data.normal(rows, Ct, scale=Ct**-0.25)
    if odd:
        operands[odd] = cases.at_odd_address(operands[odd])
    stride = -(-K // 8) * 8
    logits, gradient, labels = data.out(2 * B, K), t.encode(np.full((B, stride), np.nan)), data.labels(B, K)
    parts, top1, counts = data.out(len(cases.PARTS), B), np.full(B, -7), np.zeros(2, np.int64)
    call = functools.partial(
        kernels.logit_rows, stage=stage, dtype=t.name, **operands, logits=logits, features=True, logits_t=None,
        anchor=None, logit_b=None, fm_rows=None, pooled_rows=None, row_parts=1, bias=None, labels=labels, labels_b=None,
        mix=None, part_rows=parts, top1_rows=top1, counts=counts, grad=True, gradient=gradient, B=B, K=K, Ct=Ct,
        arrived=np.full((), -7, np.int32), stride=stride, **(cases.WEIGHTS | {"ce": 0, "kl": 0, "sr": 0.5}),
    )  # fmt: skip
    if odd:
        return _refused(call)
    kernels.refuse(0 if cooperative else COOPERATIVE, False)
    call()
    assert (kernels.refused() == 0) == cooperative
    kernels.refuse(0, False)
    product = wide["stack"] @ wide["weight"].T
    close("logits", logits, product, F32, scale=8)
    difference = product[B:]
    close("sr", parts[1], np.square(difference).sum(1), F32, scale=8)
    close("gradient", gradient[:, :K], difference / K, t, stored=True, scale=8)
    return [logits, parts, gradient, top1]


def logit_products(
    kernels: ModuleType, t: DType, B: int, K: int, Ct: int, stage: int = 1, far: str = "some", odd: str = ""
) -> list[Array]:
    """far: of which rows the teacher's are wanted."""
    data = Data(t, f"logit_products {B} {K} {Ct}")
    operands, wide = {}, {}
    for name, rows in (("stack", 3 * B), ("weight", K)):
        operands[name], wide[name] = data.normal(rows, Ct, scale=Ct**-0.25)
    if odd:
        operands[odd] = cases.at_odd_address(operands[odd])
    of_pooled = {"some": np.arange(B) % 3 == 0, "32nd": np.arange(B) % 32 == 31}.get(far, np.full(B, far == "all"))
    logits, square_t = data.out(2, B, K), np.where(of_pooled, 1.96, 2.04).astype(np.float32)
    call = functools.partial(
        kernels.logit_products, stage=stage, dtype=t.name, **operands, logits=logits, anchor=None, logit_b=None,
        fm_rows=np.full(B, 0.5, np.float32), pooled_rows=square_t, row_parts=1, B=B, K=K, Ct=Ct,
    )  # fmt: skip
    if odd:
        return _refused(call)
    call()
    own, near, teachers = (wide["stack"] @ wide["weight"].T).reshape(3, B, K)
    close("logits", logits[0], own, F32, scale=8)
    close("W d or W pooled_t", logits[1], np.where(of_pooled[:, None], teachers, near), F32, scale=8)
    return [logits]


logit_rows_of.__name__ = "logit_rows"
COOPERATIVE = 1 << 2  # cudaLaunchAttributeCooperative, as emulator.h:refuse takes it


def times_classifier(
    kernels: ModuleType,
    t: DType,
    B: int,
    K: int,
    Ct: int,
    pooled: bool = True,
    grad: bool = True,
    row_parts: int = 1,
    rounded: bool = True,
    stage: int = 1,
    odd: str = "",
    losses: bool = True,
    batch: int | None = None,
    **changed: float,
) -> list[Array]:
    """batch: rows over which the gradient is a mean, where B are some of them."""
    data = Data(t, f"times_classifier {B} {K} {Ct}")
    w = cases.WEIGHTS | changed | ({} if pooled else {"fm": 0})
    stride = -(-K // 8) * 8
    wide = np.zeros((B, stride))
    wide[:, :K] = data.random.standard_normal((B, K))
    gradient = t.encode(wide)
    weight, weight64 = data.normal(K, Ct)
    (z, z64), (pooled_t, pooled64), dz = data.normal_acc(B, Ct), data.normal_acc(B, Ct), data.out(B, Ct)
    (rows, rows64), (fm_rows, fm64) = data.normal_acc(len(cases.PARTS), B), data.normal_acc(row_parts, B)
    for i, name in enumerate(cases.PARTS):
        if name == "fm" or not w[name]:
            rows[i], rows64[i] = np.nan, 0  # of another array, or nobody's
    top1_rows = data.random.integers(0, 2, B)
    loss, parts, top1, dz_t = data.out(), data.out(len(cases.PARTS)), np.full((), -7), data.out_stored(B, Ct)
    operands = {"gradient": gradient if grad else None, "weight": weight}
    if odd:
        operands[odd] = cases.at_odd_address(operands[odd])
    call = functools.partial(
        kernels.times_classifier, stage=stage, dtype=t.name, grad=grad, **operands, z=z,
        pooled_t=pooled_t if pooled else None, dz=dz if grad else None,
        dz_t=dz_t if grad and rounded else None, anchor=None, logit_b=None, fm_rows=fm_rows if pooled else None,
        pooled_rows=None, row_parts=row_parts, B=B, K=K, Ct=Ct, stride=stride, batch=batch or B, **w,
        **({"part_rows": rows, "top1_rows": top1_rows, "loss": loss, "parts": parts, "top1": top1, **_shares()}
           if losses else dict.fromkeys(("part_rows", "top1_rows", "loss", "parts", "top1", "shares", "arrived"))),
    )  # fmt: skip
    if odd:
        return _refused(call)
    call()
    if not losses:
        close("dz", dz, t.decode(gradient)[:, :K] @ weight64 / (batch or B), t, scale=K**0.5)
        return [dz]
    rows64[2] = fm64.sum(0) if w["fm"] else 0
    wanted = rows64.mean(1) / [1, K, Ct, *[1] * (len(cases.PARTS) - 3)]
    close("parts", parts, wanted, F32)
    close("loss", loss, wanted @ [w[name] for name in cases.PARTS], F32)
    assert top1 == top1_rows.sum(), f"top1 is {top1}, wanted {top1_rows.sum()}"
    if grad:
        want = t.decode(gradient)[:, :K] @ weight64 / B
        close("dz", dz, want + 2 * w["fm"] / (B * Ct) * (z64 - pooled64), t, scale=K**0.5)
        if rounded:
            _check_rounded(t, dz_t, dz)
    return [dz, dz_t, loss, parts]


def project_tiles(
    kernels: ModuleType,
    t: DType,
    N: int,
    Cs: int,
    Ct: int,
    stats: bool,
    shift: float = 0,
    stage: int = 1,
) -> list[Array]:
    data = Data(t, f"project_tiles {N} {Cs} {Ct}")
    (u, u64), (weight, weight64) = (
        data.normal(N, Cs, shift=shift),
        data.normal(Ct, Cs, scale=1 / Cs**0.5, shift=shift / Cs),
    )
    rows = kernels.project_rows(stage, N, Ct)
    parts = -(-N // rows)
    y, mean, m2 = data.out_stored(N, Ct), data.out(parts, Ct), data.out(parts, Ct)
    kernels.project_tiles(
        stage=stage,
        dtype=t.name,
        u=u,
        weight=weight,
        y=y,
        mean=mean if stats else None,
        m2=m2 if stats else None,
        N=N,
        Cs=Cs,
        Ct=Ct,
    )
    close("y", y, u64 @ weight64.T, t, stored=True, scale=4)
    if stats:
        y64 = t.decode(y)
        for i in range(parts):
            part = y64[i * rows : (i + 1) * rows]
            close(f"mean of part {i}", mean[i], part.mean(0), t, scale=1 + abs(shift))
            close(f"m2 of part {i}", m2[i], len(part) * part.var(0), t, scale=1 + abs(shift))
    return [y, mean, m2]


def linear_tiles(
    kernels: ModuleType,
    t: DType,
    B: int,
    Cs: int,
    Ct: int,
    bias: bool = True,
    pooled: bool = False,
    anchored: bool = False,
    anchors: bool = True,
    two_labels: bool = True,
    stage: int = 1,
    edit: str = "",
) -> list[Array]:
    """anchored: with what anchor_rows makes, of a classifier of 40 classes; of that without anchors the rounding
    alone.
    """
    data = Data(t, f"linear_tiles {B} {Cs} {Ct}")
    (u, u64), (weight, weight64) = data.normal(B, Cs), data.normal(Ct, Cs, scale=1 / Cs**0.5)
    (b, b64), (pooled_t, pooled64) = data.normal_acc(Ct), data.normal_acc(B, Ct)
    z, squares, fm = data.out(B, Ct), data.out(kernels.linear_blocks(stage, B, Ct)), data.out()
    options: dict[str, Any] = {}
    parts, K = kernels.linear_parts(stage, B, Ct), 40
    (classifier, classifier64), (c, c64) = data.normal(K, Ct), data.normal_acc(K)
    z_t, d_t, d_split = data.out_stored(B, Ct), data.out_stored(B, Ct), BF16.encode(np.full((2, B, Ct), np.nan))
    anchor, logit_b, fm_rows, pooled_rows = (data.out(parts, B) for _ in range(4))
    rounded_t, either = data.out_stored(B, Ct), pooled and not anchors  # as logit_rows takes it
    labels, labels_b, counts = data.labels(B, K), data.labels(B, K) if two_labels else None, np.array([3, 5])
    want = u64 @ weight64.T + (b64 if bias else 0)
    if anchored:
        _, _, valid = _anchored(data, want, classifier64, labels, labels_b, None, edit)
        options = {
            "classifier": classifier, "classifier_bias": c if bias else None, "labels": labels, "labels_b": labels_b,
            "z_t": z_t, "d_t": None if anchors else d_t, "pooled": rounded_t if either else None,
            "d_split": d_split if pooled and anchors else None,
            "anchor": anchor if anchors else None, "logit_b": logit_b if anchors else None,
            "fm_rows": fm_rows if pooled else None, "pooled_rows": pooled_rows if either else None, "row_parts": parts,
            "counts": counts, "K": K,
        }  # fmt: skip
    kernels.linear_tiles(
        stage=stage, dtype=t.name, u=u, weight=weight, bias=b if bias else None, pooled_t=pooled_t if pooled else None,
        z=z, squares=squares if pooled and not anchored else None, fm=None if pooled or anchored else fm,
        anchored=anchored, **options, B=B, Cs=Cs, Ct=Ct,
    )  # fmt: skip
    close("z", z, want, t, scale=4)
    if anchored:
        np.testing.assert_array_equal(z_t, t.encode(z))
        rounded, biases = t.decode(z_t), c64 if bias else np.zeros(K)
        rows, second = np.flatnonzero(valid), labels if labels_b is None else labels_b
        for name, got, of in (("anchor", anchor, labels), ("logit_b", logit_b, second)) if anchors else ():
            ours = (rounded[rows] * classifier64[of[rows]]).sum(1) + biases[of[rows]]
            close(name, got.astype(np.float64).sum(0)[rows], ours, t, scale=Ct**0.5)
        assert np.isnan(anchor.sum(0)[~valid]).all()
        np.testing.assert_array_equal(counts, [3 + (~valid).sum() * anchors, 5])
        if pooled:
            d = z - pooled_t
            np.testing.assert_array_equal(*((d_split, _split(d)[0]) if anchors else (d_t, t.encode(d))))
            close("fm_rows", fm_rows.astype(np.float64).sum(0) / np.square(d.astype(np.float64)).sum(1), np.ones(B), t)
        if either:
            np.testing.assert_array_equal(rounded_t, t.encode(pooled_t))
            close("pooled_rows", pooled_rows.astype(np.float64).sum(0) / np.square(pooled64).sum(1), np.ones(B), t)
    elif pooled:
        distance = np.square(want - pooled64).sum()
        close("squares' share", squares.astype(np.float64).sum() / distance * np.ones(1), 1, t)
    else:
        assert fm == 0
    return [z, squares, fm, z_t, d_t, d_split, anchor, logit_b, fm_rows, pooled_rows, rounded_t]


def linear_grad_tiles(
    kernels: ModuleType,
    t: DType,
    B: int,
    Cs: int,
    Ct: int,
    pooled: bool = False,
    scaled: bool = False,
    float_dweight: bool = False,
    wanted: str = "du dweight dbias",
    shift: float = 0,
) -> list[Array]:
    data = Data(t, f"linear_grad_tiles {B} {Cs} {Ct}")
    (u, u64), (weight, weight64) = data.normal(B, Cs), data.normal(Ct, Cs, scale=1 / Cs**0.5)
    (grad_z, _), (z, _), (pooled_t, _) = (data.normal_acc(B, Ct, shift=shift) for _ in range(3))
    scale = np.full((), 0.37, np.float32)
    grad_fm = np.full((), 3 * B * Ct, np.float32)  # so that the match weighs as much as grad_z
    outs = {"du": data.out_stored(B, Cs), "dweight": data.out_stored(Ct, Cs), "dbias": data.out(Ct)}
    if float_dweight:
        outs["dweight"] = data.out(Ct, Cs)
    match = {"grad_fm": grad_fm, "z": z, "pooled_t": pooled_t}
    kernels.linear_grad_tiles(
        dtype=t.name, grad_z=grad_z, scale=scale if scaled else None,
        **{k: v if pooled else None for k, v in match.items()}, u=u, weight=weight, float_dweight=float_dweight,
        **{k: v if k in wanted.split() else None for k, v in outs.items()}, B=B, Cs=Cs, Ct=Ct,
    )  # fmt: skip
    dz = scale * grad_z if scaled else grad_z  # in float, as the kernel rounds it
    dz = dz + np.float32(6) * (z - pooled_t) if pooled else dz
    rounded = t.decode(t.encode(dz))
    want = {"du": rounded @ weight64, "dweight": rounded.T @ u64, "dbias": dz.astype(np.float64).sum(0)}
    for name, out in outs.items():
        if name in wanted.split():
            close(
                name,
                out,
                want[name],
                strict(t) if shift else t,
                stored=out.dtype == t.storage,
                scale=4 if name != "dbias" else 1 if shift else 10 * max(B, Ct) ** 0.5,
            )
        else:
            assert np.isnan(t.decode(out) if out.dtype == t.storage else out).all()
    return list(outs.values())


def product_grads(
    kernels: ModuleType,
    t: DType,
    N: int,
    Cs: int,
    Ct: int,
    scaled: bool = True,
    float_dweight: bool = False,
    wanted: str = "du dweight dbias",
    stage: int = 1,
) -> list[Array]:
    data = Data(t, f"product_grads {N} {Cs} {Ct}")
    (u, u64), (weight, weight64) = data.normal(N, Cs), data.normal(Ct, Cs, scale=1 / Cs**0.5)
    float_dy, float64_dy = data.normal_acc(N, Ct)
    dy, factor = t.encode(float_dy), 0.375 if scaled else 1
    outs = {"du": data.out_stored(N, Cs), "dweight": data.out_stored(Ct, Cs), "dbias": data.out(Ct)}
    if float_dweight:
        outs["dweight"] = data.out(Ct, Cs)
    kernels.product_grads(
        stage=stage, dtype=t.name, dy=dy, scale=np.full((), factor, np.float32) if scaled else None,
        float_dy=float_dy if "dbias" in wanted else None, u=u, weight=weight,
        **{k: v if k in wanted.split() else None for k, v in outs.items()}, float_dweight=float_dweight,
        N=N, Cs=Cs, Ct=Ct,
    )  # fmt: skip
    dy64 = factor * t.decode(dy)
    want = {"du": dy64 @ weight64, "dweight": dy64.T @ u64, "dbias": factor * float64_dy.sum(0)}
    for name, out in outs.items():
        if name in wanted.split():
            scale = 4 if name == "du" else N**0.5
            close(name, out, want[name], t, stored=out.dtype == t.storage, scale=scale)
        else:
            assert np.isnan(t.decode(out) if out.dtype == t.storage else out).all()
    return list(outs.values())


def all_cases() -> dict[str, Case]:
    found: dict[str, Case] = {}

    def add(kernel: Any, t: DType, *sizes: Any, **options: Any) -> None:
        named = " ".join(f"{k}={v}" for k, v in options.items() if k != "edit" or v)
        label = " ".join(filter(None, [kernel.__name__, t.name, *map(str, sizes), named]))
        found[label] = functools.partial(kernel, t=t, **cases._named(kernel, sizes), **options)

    for t in (BF16, F16):
        for B, K, Ct in ((1, 1, 8), (3, 9, 264), (7, 40, 256)):
            add(anchor_rows, t, B, K, Ct)
        add(anchor_rows, t, 2, 5, 136, teacher="rounded", two_labels=False)
        add(anchor_rows, t, 2, 5, 136, teacher=None, bias=False)
        add(anchor_rows, t, 2, 5, 136, teacher="rounded", anchors=False)
        add(anchor_rows, t, 3, 5, 72, teacher="rounded", anchors=False, two_labels=False, labelled=False)
        for B, Cs, Ct in ((1, 8, 8), (70, 24, 72), (64, 136, 200), (257, 64, 328)):
            for pooled in (False, True):
                add(linear_grad_tiles, t, B, Cs, Ct, pooled=pooled)
        for pooled in (False, True):
            add(linear_grad_tiles, t, 67, 72, 136, pooled=pooled, scaled=True)
        for wanted in ("du", "dweight", "dbias", "du dbias", "dweight dbias"):
            add(linear_grad_tiles, t, 67, 72, 136, wanted=wanted)
        add(linear_grad_tiles, t, 67, 72, 136, wanted="dweight", float_dweight=True)
        add(linear_grad_tiles, t, 200000, 8, 8, wanted="dbias", shift=3)
        for edit in ("labels", "infinite"):
            add(anchor_rows, t, 7, 40, 24, edit=edit)
        add(anchor_rows, t, 7, 1, 24, edit="labels")
    for t, stage in itertools.product((BF16, F16), (1, 2)):
        for B, K, Ct in ((1, 1, 8), (3, 70, 24), (65, 63, 200), (64, 203, 136)):
            add(times_classifier, t, B, K, Ct, stage=stage)
        add(times_classifier, t, 5, 90, 72, pooled=False, stage=stage)
        add(times_classifier, t, 5, 90, 72, row_parts=3, rounded=False, stage=stage)
        add(times_classifier, t, 5, 90, 72, ce=1, sr=1, fm=1, kl=1, stage=stage)
        add(times_classifier, t, 300, 9, 8, grad=False, stage=stage)
        add(times_classifier, t, 65, 90, 72, pooled=False, rounded=False, losses=False, batch=100, stage=stage)
        for part in cases.PARTS:
            add(times_classifier, t, 5, 90, 72, **(cases.SOFT | {part: 0}), grad=False, stage=stage)
        for B, K, options in ((1, 1, {}), (3, 2, {}), *((4, 90, options) for options in cases.ROW_LOSSES.values())):
            add(logit_rows, t, B, K, stage=stage, **options)
        for edit in ("large", "ties", "labels"):
            add(logit_rows, t, 7, 300, edit=edit, stage=stage)  # more tiles than blocks
        add(logit_rows, t, 7, 40, edit="labels", stage=stage, **cases.ROW_LOSSES["two rows"])
        add(logit_rows, t, 67, 70, teacher="either", stage=stage)
        add(logit_rows, t, 1, 9, teacher="logits_t", stage=stage)  # one row in all
        add(logit_rows, t, 32, 9, teacher="32nd far", stage=stage)  # one row in all of the last tile
        for B, K, Ct in ((1, 1, 8), (35, 71, 24), (5, 72, 24), (33, 203, 264)):
            add(logit_rows_of, t, B, K, Ct, stage=stage)
            add(logit_products, t, B, K, Ct, stage=stage)
        for far in ("all", "none", "32nd"):
            add(logit_products, t, 67, 9, 8, far=far, stage=stage)
        for B, Cs, Ct in ((1, 8, 8), (70, 24, 72), (64, 264, 200)):
            for bias, pooled in ((True, False), (False, True)):
                add(linear_tiles, t, B, Cs, Ct, bias=bias, pooled=pooled, stage=stage)
                add(linear_tiles, t, B, Cs, Ct, bias=bias, pooled=pooled, anchored=True, anchors=False, stage=stage)
        for N, Cs, Ct in ((1, 8, 8), (70, 24, 72), (64, 264, 64), (49, 128, 200)):
            add(project_tiles, t, N, Cs, Ct, True, stage=stage)
        add(project_tiles, t, 65, 72, 24, False, stage=stage)
        add(project_tiles, t, 130, 64, 16, True, shift=30.0, stage=stage)
    for stage in (1, 2):
        for N, Cs, Ct in ((1, 8, 8), (70, 24, 72), (64, 136, 200), (257, 64, 328)):
            add(product_grads, BF16, N, Cs, Ct, float_dweight=N != 64, stage=stage)
        for wanted in ("du", "dweight", "dbias", "du dbias", "dweight dbias"):
            add(product_grads, BF16, 67, 72, 136, wanted=wanted, stage=stage)
        for N, Cs, Ct in ((600, 8, 16), (9, 40, 520), (260, 264, 72), (100, 136, 776)):  # tiles split over clusters
            add(product_grads, BF16, N, Cs, Ct, float_dweight=N > 100, stage=stage)
        add(product_grads, F16, 70, 24, 264, scaled=False, stage=stage)
        add(logit_rows_of, BF16, 129, 128 + 3, 72, stage=stage)  # large tiles
        add(logit_products, BF16, 129, 128 + 3, 72, stage=stage)
        add(logit_rows_of, BF16, 35, 71, 24, cooperative=False, stage=stage)
        for N, Cs in ((128 * 2 + 3, 72), (128 * 2 + 3, 328), (128 * 3, 72), (128 * 4, 136)):
            add(project_tiles, BF16, N, Cs, 264, True, stage=stage)  # large tiles, in pairs
        for anchored in (False, True):
            for B in (128 * 2 + 2, 128 * 2 - 3):  # likewise; in pairs where the rows' tiles are even in number
                add(linear_tiles, BF16, B, 24, 264, pooled=True, anchored=anchored, stage=stage)
            add(linear_tiles, BF16, 128 * 2, 136 + 64, 264, anchored=anchored, anchors=False, stage=stage)
        for B, Cs, Ct in ((1, 8, 8), (70, 24, 72), (64, 264, 200)):
            add(linear_tiles, BF16, B, Cs, Ct, anchored=True, pooled=True, stage=stage)
            add(linear_tiles, BF16, B, Cs, Ct, anchored=True, two_labels=False, bias=False, stage=stage)
        add(linear_tiles, BF16, 7, 24, 72, anchored=True, edit="labels", stage=stage)
        for B, classes, Ct in ((1, 1, 8), (3, 70, 24), (65, 63, 200), (64, 129, 328)):
            add(logits_exp, BF16, B, classes, Ct, stage=stage)
            add(logits_exp, BF16, B, classes, Ct, gram=True, smoothing=False, bias=False, stage=stage)
        add(logits_exp, BF16, 5, 150, 72, first_class=256, stage=stage)
        add(logits_exp, BF16, 5, 150, 72, store=False, stage=stage)
        add(logits_exp, BF16, 66, 150, 72, parts=3, stage=stage)
        add(logits_exp, BF16, 66, 150, 72, parts=2, two_labels=True, stage=stage)
        for edit in ("ties", "far", "nan", "broken"):
            add(logits_exp, BF16, 5, 150, 72, edit=edit, stage=stage)
        add(logits_exp, BF16, 5, 70, 136, gram=True, stage=stage)  # its last stage is the first in memory
        add(logits_exp, BF16, 2, 21841, 8, stage=stage)
        add(logits_exp, BF16, 130, 128 * 2 + 5, 72, gram=True, stage=stage)  # large tiles
        smoothing = {"label_smoothing": 0} if stage == 2 else {}  # which stage 1 serves
        for B, K, Ct in ((1, 9, 8), (3, 70, 24), (65, 63, 200), (64, 203, 136)):
            add(grad_rows, BF16, B, K, Ct, stage=stage, **smoothing)
            add(grad_rows, BF16, B, K, Ct, label_smoothing=0, two_labels=False, gram=False, pooled=False, stage=stage)
            for chunk in ("first", "middle", "last"):
                add(grad_rows, BF16, B, K + 8, Ct, chunk=chunk, stage=stage, **smoothing)
        add(grad_rows, BF16, 5, 90, 72, ce=0, stage=stage)
        add(grad_rows, BF16, 5, 90, 72, row_parts=3, rounded=False, stage=stage, **smoothing)
        add(grad_rows, BF16, 5, 90, 72, ce=1, sr=1, fm=1, stage=stage, **smoothing)
        add(grad_rows, BF16, 5, 90, 72, grad=False, stage=stage, **smoothing)
        for edit in ("hits", "saturated", "saturated, flat", "nan"):
            add(grad_rows, BF16, 5, 300, 72, edit=edit, stage=stage, **smoothing)
        add(grad_rows, BF16, 67, 75, 136, edit="saturated", chunk="last", stage=stage, **smoothing)
        add(grad_rows, BF16, 5, 90, 72, edit="saturated", bias=False, rounded=False, stage=stage, **smoothing)
        add(grad_rows, BF16, 3, 1, 24, edit="nan", two_labels=False, stage=stage, **smoothing)
        for B in (128 * 2 + 2, 128 + 2):  # large tiles, in the second case in pairs on Hopper
            add(grad_rows, BF16, B, 72, 264, stage=stage, **smoothing)
        add(grad_rows, BF16, 66, 72, 128 * 5 + 8, label_smoothing=0, stage=stage)  # large tiles, of one row
        for without in ({"ce": 0}, {"grad": False}):  # which have no product of large tiles to pair
            add(grad_rows, BF16, 128 + 2, 72, 264, label_smoothing=0, stage=stage, **without)
        add(times_classifier, BF16, 128 * 2 + 2, 137, 264, stage=stage)  # large tiles
        add(logits_exp, BF16, 128 * 2 + 2, 133, 136, stage=stage)  # large tiles of an odd number of rows' tiles
        add(grad_rows, BF16, 5, 300, 264, label_smoothing=0, edit="saturated", stage=stage)  # more tiles than are split
        add(logit_rows_of, BF16, 1, 12500, 8, stage=stage)  # a row that shared memory does not hold
    for odd in ("stack", "weight"):
        add(logit_rows_of, BF16, 5, 90, 72, stage=2, odd=odd)
        add(logit_products, BF16, 5, 90, 72, stage=2, odd=odd)
    for odd in ("gradient", "weight"):
        add(times_classifier, BF16, 5, 90, 72, stage=2, odd=odd)
    for odd in ("z_t", "weight"):
        add(logits_exp, BF16, 5, 90, 72, gram=True, stage=2, odd=odd)
        add(logits_exp, BF16, 130, 128 * 2 + 5, 72, stage=2, odd=odd)  # in pairs
    add(logits_exp, BF16, 130, 128 * 2 + 5, 64 * 11 + 8, stage=2)  # so deep that a pair's ring goes round four times
    for chunk in ("first", "last"):
        add(grad_rows, BF16, 5, 90, 72, chunk=chunk, label_smoothing=0)
    add(grad_rows, BF16, 5, 90, 72, stage=2)  # by stage 1
    return found


CASES = all_cases()
