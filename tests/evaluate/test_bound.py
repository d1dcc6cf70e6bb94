"""The bound on a student's error: the chain holds, each figure against a computation by hand, the command, the log."""

from __future__ import annotations

import csv
import functools
import json
import re
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from rich.console import Console
from tiny_run import config, differing, distilled, options, settings as tiny_settings
from torch import nn

from ijckd_fast import cli
from ijckd_fast.distill import PRESETS, Compared, Distiller, get_objective
from ijckd_fast.errors import UserError
from ijckd_fast.evaluate import advise, bound, bound_report, write_bound
from ijckd_fast.evaluate.bound_advice import wilson
from ijckd_fast.nets import CachedTeacher, create_model
from ijckd_fast.parallel import Processes
from ijckd_fast.train import checkpoint, resolve, run_folder, train as loud_train
from ijckd_fast.train.config import OBJECTIVE_FIELDS
from ijckd_fast.train.training import bound_row

train = functools.partial(loud_train, console=Console(quiet=True))
CONNECTED = [name for name, objective in PRESETS.items() if objective.connector is not None]


def classifier(weight, bias=None) -> nn.Linear:
    weight = torch.as_tensor(weight, dtype=torch.float32)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = torch.as_tensor(bias, dtype=torch.float32)
    return layer


def measured(layer, z, pooled_t, labels=None, ids=None, **more) -> bound.Images:
    """Figures of features [B, Ct]."""
    z, pooled_t = (x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float32) for x in (z, pooled_t))
    seen = Compared(torch.empty(0), more.get("own_logits"), z, pooled_t, more.get("map_mse"))
    labels = torch.zeros(len(z), dtype=torch.int64) if labels is None else torch.as_tensor(labels)
    ids = torch.arange(len(z)) if ids is None else torch.as_tensor(ids)
    return bound.measure(bound.geometry(layer), seen, labels, ids)


def some_images(n=40, classes=5, channels=4, seed=0) -> bound.Images:
    draw = torch.Generator().manual_seed(seed)
    layer = classifier(torch.randn(classes, channels, generator=draw), torch.randn(classes, generator=draw))
    pooled_t = torch.randn(n, channels, generator=draw)
    z = pooled_t + torch.randn(n, channels, generator=draw)
    labels = torch.randint(classes, (n,), generator=draw)
    own = torch.randn(n, classes, generator=draw)
    return measured(layer, z, pooled_t, labels, own_logits=own, map_mse=torch.rand(n, generator=draw))


# --- the chain ---

NUMBERS = st.sampled_from([0.0, 1.0, -1.0, 0.5, 3.0]) | st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


@st.composite
def cases(draw):
    """W with repeated classes, pooled_t and a z that is equal to it, very near, or anywhere."""
    classes, channels, images = draw(st.integers(2, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))

    def matrix(rows, numbers=NUMBERS):
        return [[draw(numbers) for _ in range(channels)] for _ in range(rows)]

    different = matrix(draw(st.integers(1, classes)))
    weight = [different[draw(st.integers(0, len(different) - 1))] for _ in range(classes)]
    bias = [draw(NUMBERS) for _ in range(classes)] if draw(st.booleans()) else None
    pooled_t = torch.tensor(matrix(images))
    kind = draw(st.sampled_from(["equal", "near", "free"]))
    z = torch.tensor(matrix(images))
    if kind != "free":
        z = pooled_t * (1 + (2**-23 if kind == "near" else 0.0) * z.sign())
    return weight, bias, z, pooled_t


@given(cases())
@settings(deadline=None, max_examples=150)
@example(([[1.0], [1.0]], None, torch.tensor([[0.0]]), torch.tensor([[3.0]])))  # one class twice: margin 0
def test_chain_holds_for_every_image_in_exact_arithmetic(case):
    weight, bias, z, pooled_t = case
    layer = classifier(weight, bias)
    images = measured(layer, z, pooled_t)
    for label in range(len(weight)):
        bound.check_chain(images._replace(labels=torch.full_like(images.labels, label)))
    rows = [[Fraction(x) for x in row] for row in layer.weight.tolist()]
    shift = [Fraction(0)] * len(rows) if bias is None else [Fraction(x) for x in layer.bias.tolist()]
    for n in range(len(z)):
        s, t = ([Fraction(x) for x in features[n].tolist()] for features in (z, pooled_t))
        logits, logits_t = (
            [sum(a * b for a, b in zip(row, x, strict=True)) + c for row, c in zip(rows, shift, strict=True)]
            for x in (s, t)
        )
        *_, second, first = sorted(logits_t)
        moved = [a - b for a, b in zip(logits, logits_t, strict=True)]
        spread, margin = max(moved) - min(moved), first - second
        size = max(map(abs, [*logits, *logits_t, *shift])) + sum(map(abs, (*s, *t))) * max(
            max(map(abs, r)) for r in rows
        )
        slack = Fraction(1e-12) * size
        if spread >= margin + slack:
            assert images.spread_reaches[n]
        if spread < margin - slack:
            assert not images.spread_reaches[n]
            assert logits.index(max(logits)) == logits_t.index(first)
        assert abs(Fraction(images.spread[n].item()) - spread) <= slack
        assert abs(Fraction(images.margin[n].item()) - margin) <= slack


def test_equal_answers_and_ties():
    """K = 2, ties of the teacher, ties of the student: the first class answers in both."""
    z, pooled_t = [[1, 1], [2, 1], [1, 2], [1, 1]], [[1, 1], [1, 1], [2, 1], [1, 2]]
    images = measured(classifier([[1, 0], [0, 1]]), z, pooled_t)
    assert images.answer.tolist() == [0, 0, 1, 0]
    assert images.answer_t.tolist() == [0, 0, 0, 1]
    assert images.margin.tolist() == [0, 0, 1, 1]
    assert images.spread.tolist() == [0, 1, 2, 1]
    assert images.spread_reaches.tolist() == images.distance_reaches.tolist() == [True] * 4
    assert images.rank.tolist() == [0, 0, 1, 1]
    bound.check_chain(images)


@pytest.mark.parametrize(("channels", "scale"), [(3, 1.0), (40, 1.0), (40, 1e-4)])
def test_chain_holds_where_all_forms_are_equal_but_for_rounding(channels, scale):
    """Two classes that differ in the first channel alone, which the student has lost.

    Margin, spread and widest x distance are equal.
    """
    draw = torch.Generator().manual_seed(channels)
    weight = torch.randn(channels, generator=draw).repeat(2, 1)
    weight[0, 0], weight[1, 0] = 1.1, -3.3
    widest = (weight[0, 0].double() - weight[1, 0].double()).item()
    pooled_t = torch.randn(4000, channels, generator=draw)
    pooled_t[:, 0] *= scale
    z = pooled_t.clone()
    z[:, 0] = 0
    images = measured(classifier(weight), z, pooled_t)
    changed = images.answer != images.answer_t
    assert (
        changed & (widest * images.distance < images.margin)
    ).any()  # so without rounding up the chain is broken, here
    assert scale < 1 or (changed & (images.spread < images.margin)).any()  # and here
    bound.check_chain(images)
    assert (images.spread_reaches & images.distance_reaches).all()
    z[:, 0] = 1e-6 * pooled_t[:, 0]
    assert not measured(
        classifier(weight), z, pooled_t
    ).spread_reaches.any()  # they are not rounded up by more than that


@pytest.mark.parametrize("seed", range(3))
def test_forms_lie_between_nothing_and_everything(seed):
    """On features that differ little, some images are certain by the norm, some by the margin only, some change."""
    draw = torch.Generator().manual_seed(seed)
    layer = classifier(torch.randn(6, 8, generator=draw))
    pooled_t = torch.randn(500, 8, generator=draw)
    images = measured(layer, pooled_t + 0.1 * torch.randn(500, 8, generator=draw), pooled_t)
    changed = int((images.answer != images.answer_t).sum())
    assert 0 < changed < int(images.spread_reaches.sum()) < int(images.distance_reaches.sum()) < 500


def test_a_broken_chain_is_an_internal_error():
    images = some_images()
    bound.check_chain(images)
    none = torch.zeros_like(images.spread_reaches)
    for change in ({"spread_reaches": none}, {"distance_reaches": none}):
        with pytest.raises(
            RuntimeError, match=r"internal error: the chain of the bound does not hold for \d+ of 40 images"
        ):
            bound.check_chain(images._replace(**change))


@pytest.mark.parametrize("block", [3, 4, 7, 2048])
def test_widest_pair(block):
    weight = torch.randn(11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    widest = torch.cdist(weight, weight).max().item()
    found = bound.widest_pair(weight, block)
    assert found >= widest
    assert found == pytest.approx(widest, rel=1e-12)
    weight[3] += 100  # in another place of another block
    assert bound.widest_pair(weight, block) == pytest.approx(torch.cdist(weight, weight).max().item(), rel=1e-12)
    assert 0 <= bound.widest_pair(weight[:1].repeat(4, 1), block) < 1e-6


# --- each figure by hand ---


@pytest.mark.parametrize(("classes", "channels", "rank"), [(4, 9, 4), (20, 6, 6), (20, 6, 3), (5, 5, 2)])
def test_share_in_the_null_space(classes, channels, rank):
    """W = A V, V of orthonormal rows: differences are made of what V sees and what it does not, in a known ratio."""
    draw = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64, generator=draw)).Q
    seen, hidden = basis[:rank], basis[rank:]
    weight = torch.randn(classes, rank, dtype=torch.float64, generator=draw) @ seen
    layer = classifier(weight)  # rounded to float32, which must not make it of full rank
    assert bound.geometry(layer).rank == rank
    pooled_t = torch.randn(8, channels, generator=draw)
    ratio = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None]
    difference = (1 - ratio).sqrt() * seen[0] + (ratio.sqrt() * hidden[0] if rank < channels else 0)
    images = measured(layer, pooled_t + difference.float(), pooled_t)
    expected = ratio[:, 0] / channels if rank < channels else torch.zeros(8, dtype=torch.float64)
    torch.testing.assert_close(images.null_mse, expected, atol=1e-6, rtol=0)
    if rank < channels:
        assert bound.overall(images)["null_share_percent"] == pytest.approx(50, abs=1e-3)


def test_calibration_error_by_hand():
    """Four bins of the fifteen.

    0.30 in (4/15, 5/15], 0.60 in (8/15, 9/15], its edge, 0.61 in the next, 0.95 in the last but one's.
    """
    confidence = torch.tensor([0.30, 0.60, 0.58, 0.61, 0.95, 1.0], dtype=torch.float64)
    right = torch.tensor([True, False, True, True, True, False])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    # bins of group 0: |1 - 0.30| and |1 - 1.18|; of group 1: |1 - 0.61| and |1 - 1.95|
    assert bound.calibration_error(confidence, right, group, 3) == pytest.approx(
        [(0.70 + 0.18) / 3, (0.39 + 0.95) / 3, 0]
    )
    everything = [abs(1 - 0.30), abs(1 - 1.18), abs(1 - 0.61), abs(1 - 1.95)]
    assert bound.calibration_error(confidence, right, torch.zeros_like(group)) == pytest.approx([sum(everything) / 6])
    count, _, _ = bound.reliability(torch.tensor([1 / 15, 1e-9, 1.0]), right[:3], torch.zeros(3, dtype=torch.int64))
    assert (count[0, 0], count[0, 14], count.sum()) == (2, 1, 3)


def test_figures_by_hand():
    layer = classifier([[2, 0], [0, 1], [0, 0]], [0, 0, 0.5])
    z, pooled_t = [[1, 0], [0, 1], [0, 2]], [[1, 1], [1, 0], [0, 3]]
    images = measured(layer, z, pooled_t, [0, 0, 1], ids=[2, 0, 1], map_mse=torch.tensor([1.0, 2.0, 3.0]))
    # logits (2, 0, .5) (0, 1, .5) (0, 2, .5); the teacher's (2, 1, .5) (2, 0, .5) (0, 3, .5)
    row = bound.overall(bound.merge([images]))
    assert row["images"] == 3
    for name, percent in {
        "student_error": 100 / 3, "teacher_error": 0, "disagreement": 100 / 3, "student_only_right": 0,
        "margin_form": 200 / 3, "bound_disagreement": 100 / 3, "bound_margin_form": 200 / 3, "agreement_at_1": 200 / 3,
        "agreement_at_5": 100, "null_share": 0,
    }.items():  # fmt: skip
        assert row[f"{name}_percent"] == pytest.approx(percent), name
    assert row["own_head_error_percent"] is None
    assert row["teacher_margin"] == pytest.approx((1 + 1.5 + 2.5) / 3)
    assert row["logit_spread"] == pytest.approx((1 + 3 + 1) / 3)
    assert row["logit_mse"] == pytest.approx((1 + 5 + 1) / 9)
    assert row["pooled_mse"] == pytest.approx((1 + 2 + 1) / 6)
    assert row["feature_distance"] == pytest.approx((1 + 2**0.5 + 1) / 3)
    assert row["map_mse"] == 2
    soft = torch.tensor([[2, 0, 0.5], [0, 1, 0.5], [0, 2, 0.5]]).double().softmax(1).amax(1).mean().item()
    assert row["student_confidence_percent"] == pytest.approx(100 * soft)
    assert bound.chain_line(row) == "33.33 <= 0.00 + 33.33 <= 0.00 + 66.67 <= 0.00 + 66.67"


def test_classes_add_up_to_all_images():
    images = some_images(200)
    images = images._replace(labels=images.labels % 4)  # the fifth class has no image
    row, rows = bound.overall(images), bound.per_class(images, 5)
    assert sum(r["images"] for r in rows) == row["images"] == 200
    assert all(value is None for key, value in rows[4].items() if key != "images")
    for key, value in row.items():
        if key in ("images", "null_share_percent", "student_ece_percent", "teacher_ece_percent"):
            continue  # shares of a sum, and the calibration error, are not means over images
        assert sum(r[key] * r["images"] for r in rows[:4]) / 200 == pytest.approx(value), key
    hidden = sum(r["null_share_percent"] * r["pooled_mse"] * r["images"] for r in rows[:4])
    assert hidden / row["pooled_mse"] / 200 == pytest.approx(row["null_share_percent"])
    label = torch.nonzero(images.labels == 2)[:, 0]
    only = bound.Images._make(None if column is None else column[label] for column in images)
    assert bound.overall(only) == rows[2]


def test_one_class_is_refused():
    with pytest.raises(UserError, match="classifier has 1: expected at least 2"):
        bound.geometry(classifier([[1.0, 2.0]]))


def test_many_classes_go_in_chunks(monkeypatch):
    whole = some_images()
    monkeypatch.setattr(bound, "_LOGITS_AT_ONCE", 5 * 7)
    assert differing(some_images()._asdict(), whole._asdict()) == []


# --- several processes ---


def test_merge_is_the_same_however_images_were_shared_out():
    whole = some_images()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    for cuts in ([40], [20, 20], [1, 30, 9]):
        parts = [bound.Images._make(column[part] for column in whole) for part in order.split(cuts)]
        merged = bound.merge(parts)
        assert differing(merged._asdict(), whole._asdict()) == []
        assert bound.overall(merged) == bound.overall(whole)
    with pytest.raises(UserError, match="no image to measure the bound on"):
        bound.merge([])


def _nets(objective: str, **overrides) -> Distiller:
    torch.manual_seed(0)
    student, teacher = create_model("resnet8x0.25", 4, image_size=32), create_model("resnet8x0.5", 4, image_size=32)
    distiller = Distiller(student, teacher, get_objective(objective, **overrides))
    for module in distiller.modules():  # statistics and weights that are not those of the start
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return distiller.eval()


class _Gathering(Processes):
    """This process and others, that give `theirs`; what this one gives is kept in `sent`."""

    def __init__(self, *theirs):
        super().__init__()
        object.__setattr__(self, "theirs", theirs)  # Processes is frozen
        object.__setattr__(self, "sent", [])

    def gather(self, mine):
        self.sent.append(mine)
        return [mine, *self.theirs]


def test_two_meters_together_say_what_one_says():
    distiller = _nets("ijckd")
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 4

    def noted(which):
        meter = bound.BoundMeter(distiller)
        for n in which:
            meter.predict(images[n : n + 1])
            meter.note(labels[n : n + 1], torch.tensor([n]))
        return meter

    one = noted(range(6)).take()
    other = _Gathering()
    noted([1, 3, 5]).take(other)
    both = noted([0, 2, 4]).take(_Gathering(other.sent[0]))
    assert differing(one._asdict(), both._asdict()) == []
    assert differing(noted(range(6)).take(_Gathering([]))._asdict(), one._asdict()) == []  # one that had no image
    assert bound.overall(one) == bound.overall(both)


def test_features_that_are_not_finite():
    meter = bound.BoundMeter(_nets("ijckd"))
    images = torch.randn(2, 3, 32, 32)
    images[1, 2, 5, 5] = float("nan")
    meter.predict(images)
    meter.note(torch.tensor([0, 1]), torch.tensor([0, 1]))
    said = []
    assert bound_row(meter, Processes(), said.append) is None
    assert said[0].startswith("warning: no bound is logged: student's or teacher's features of 1 of 2 images are NaN")


# --- what the nets hand over ---


@pytest.mark.parametrize("objective", CONNECTED)
@pytest.mark.parametrize("head", ["fused", "reference"])
def test_compare_is_predict_and_what_training_matches(objective, head):
    distiller = _nets(objective)
    distiller.head = head
    images = torch.randn(5, 3, 32, 32)
    seen = distiller.compare(images)
    assert torch.equal(seen.logits, distiller.predict(images))
    map_t, pooled_t = distiller.teacher.features(images, True)
    assert torch.equal(seen.pooled_t, pooled_t)
    by_map = distiller.objective.match == "map"
    targets = {"map_t": map_t} if by_map else {"pooled_t": pooled_t}
    z, _, fm, own, *_ = distiller.student_side(images, **targets)
    assert torch.equal(seen.z, z)
    assert (seen.own_logits is None) == (own is None) == (objective not in ("srrl", "srd"))
    if by_map:
        torch.testing.assert_close(seen.map_mse.mean(), fm)
    else:
        torch.testing.assert_close((seen.z - pooled_t).square().mean(), fm)
    if seen.map_mse is None:
        return  # of a connector on vectors
    assert (seen.map_mse.double() >= (seen.z - pooled_t).double().square().mean(1) - 1e-6).all()  # Jensen


@pytest.mark.parametrize(("student_side", "teacher_side"), [(4, 8), (8, 4)])
def test_maps_of_unequal_size_are_compared_by_simkd_s_rule(student_side, teacher_side, monkeypatch):
    distiller = _nets("simkd")
    images = torch.randn(3, 3, 32, 32)

    def resized(tapped, side):
        original = tapped.staged_features

        def features(images, need_map=False):
            map_, pooled, stages = original(images, True)
            return nn.functional.adaptive_avg_pool2d(map_, side) if need_map else None, pooled, stages

        monkeypatch.setattr(tapped, "staged_features", features)

    resized(distiller.student, student_side)
    resized(distiller.teacher, teacher_side)
    map_t, _ = distiller.teacher.features(images, True)
    fm = distiller.student_side(images, map_t=map_t).fm
    torch.testing.assert_close(distiller.compare(images).map_mse.mean(), fm)
    pooled = _nets("srrl")  # not trained on maps: the student's goes in as it is, what comes out is pooled
    resized(pooled.student, student_side)
    resized(pooled.teacher, teacher_side)
    map_s, _ = pooled.student.features(images, True)
    z, t = pooled.connector.connected_map(map_s), pooled.teacher.features(images, True)[0]
    z, t = (nn.functional.adaptive_avg_pool2d(x, 4) for x in (z, t))
    torch.testing.assert_close(pooled.compare(images).map_mse, (z - t).square().mean((1, 2, 3)))


def test_connectors_on_vectors_have_no_map():
    distiller = _nets("ijckd-pooled", connector="mlp")
    images = torch.randn(2, 3, 32, 32)
    seen = distiller.compare(images)
    assert seen.map_mse is None
    assert torch.equal(seen.logits, distiller.predict(images))
    with pytest.raises(RuntimeError, match="a connector on maps"):
        distiller.connector.connected_map(torch.randn(2, 16))


def test_compare_refuses():
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(UserError, match="'kd' has no connector"):
        _nets("kd").compare(images)
    with pytest.raises(RuntimeError, match="training mode"):
        _nets("srrl").train().compare(images)
    distiller = _nets("ijckd-pooled")
    distiller.teacher = CachedTeacher(distiller.teacher.classifier, "resnet8x0.5", "")
    with pytest.raises(UserError, match="has no teacher's backbone, only a cache"):
        distiller.compare(images)


# --- advice ---

CALM = {
    "images": 5000, "teacher_error_percent": 10.0, "student_error_percent": 14.0, "disagreement_percent": 9.0,
    "student_only_right_percent": 1.0, "margin_form_percent": 9.5, "norm_form_percent": 10.0, "logit_spread": 1.0,
    "teacher_margin": 2.0, "null_share_percent": 10.0, "student_ece_percent": 3.0, "teacher_ece_percent": 2.0,
    "student_confidence_percent": 88.0, "own_head_error_percent": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "objective", "sentences"),
    [
        ({}, "ijckd", ["Both terms count"]),
        ({"teacher_error_percent": 0, "disagreement_percent": 0, "student_error_percent": 0, "margin_form_percent": 0,
          "student_only_right_percent": 0, "norm_form_percent": 0.5}, "ijckd", ["Neither term"]),
        ({"teacher_error_percent": 18.0, "student_error_percent": 20.0}, "ijckd", ["The teacher dominates"]),
        ({"teacher_error_percent": 4.5}, "ijckd", ["The disagreement dominates", "90.0 % .* raise --sr.* \\(now 1\\)"]),
        ({"teacher_error_percent": 4.5}, "simkd", ["The disagreement dominates", "no logit match.* try --sr 1"]),
        ({"teacher_error_percent": 4.5, "null_share_percent": 50.0}, "ijckd",
         ["The disagreement dominates", r"50.0 % .* null\(W\) \(6 of 16 dimensions\).* raise --fm rather than --sr"]),
        ({"student_only_right_percent": 2.25}, "ijckd", ["Both terms", "On 2.25 % .* the teacher wrong"]),
        ({"student_error_percent": 9.99}, "ijckd", ["Both terms", r"error \(9.99 %\) is below its teacher's"]),
        ({"margin_form_percent": 18.0, "norm_form_percent": 20.0}, "ijckd",
         ["Both terms", "margin form is loose: on 18.00 % .* on 9.00 % .* 1.00, mean margin 2.00.* certain, 82.00 %"]),
        ({"norm_form_percent": 19.0}, "ijckd", ["Both terms", "norm form is loose \\(19.00 % against 9.50 %\\)"]),
        ({"norm_form_percent": 99.0}, "ijckd", ["Both terms", "norm form is vacuous \\(99.00 %\\)"]),
        ({"student_ece_percent": 5.0, "student_confidence_percent": 91.0}, "ijckd",
         ["Both terms", "overconfident: it claims 91.00 % and is right on 86.00 %"]),
        ({"student_ece_percent": 5.0, "student_confidence_percent": 81.0}, "ijckd", ["Both terms", "underconfident"]),
        ({"student_ece_percent": 5.0, "teacher_ece_percent": 2.6}, "ijckd", ["Both terms"]),
        ({"student_ece_percent": 4.9}, "ijckd", ["Both terms"]),
        ({"own_head_error_percent": 14.5}, "srrl",
         ["Both terms", r"14.00 % .* 14.50 % .* the teacher's classifier is the better, .* \(--infer-head teacher\)"]),
        ({"own_head_error_percent": 13.5}, "srrl", ["Both terms", "its own classifier is the better\\.$"]),
        ({"own_head_error_percent": 13.8}, "srrl", ["Both terms"]),
        ({"images": 200}, "ijckd", ["Both terms", "200 images only: one image is 0.50 %.* 9.87 and 19.49 %"]),
    ],
)  # fmt: skip
def test_advice_follows_its_rules(changes, objective, sentences):
    said = advise({**CALM, **changes}, get_objective(objective), rank=10, channels=16)
    assert len(said) == len(sentences), said
    for sentence, pattern in zip(said, sentences, strict=True):
        assert re.search(pattern, sentence), sentence


def test_wilson_s_interval():
    assert wilson(0, 100) == pytest.approx((0, 0.0370), abs=1e-4)
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


# --- the command, and the log of a training ---


def _settings(teacher) -> dict:
    changes = {"epochs": 3, "eval_every": 2, "fold_teacher": False, "train_per_class": 10}
    return {**distilled(teacher), **changes, "checkpoint_steps": 3, "keep_checkpoints": 9}


@pytest.fixture(scope="module")
def run(data, teacher, tmp_path_factory):
    """Folder of a finished ijckd run with --log-bound: 9 steps, evaluated after 6 and 9."""
    folder = tmp_path_factory.mktemp("run") / "run"
    values = tiny_settings(data, folder, **_settings(teacher), tensorboard=True)
    assert cli.main(["train", "--log-bound", *options(values)]) == 0
    return folder


def _rows(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(["bound", *map(str, arguments)]) == 0
    out = capsys.readouterr().out
    return json.loads(out.strip().splitlines()[-1])["rows"], out


def _complaint(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(list(map(str, arguments))) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_command(run, data, tmp_path, capsys):
    rows, out = _rows(capsys, run)
    everything, *classes = rows
    summary = json.loads((run / "summary.json").read_text())
    assert everything["student_error_percent"] == pytest.approx(100 - summary["last"]["top1_percent"])
    assert everything["evaluated_error_percent"] == 100 - summary["last"]["top1_percent"]
    assert everything["teacher_error_percent"] == pytest.approx(100 - summary["teacher_top1_percent"])
    assert everything["agreement_at_1_percent"] == pytest.approx(summary["last"]["agreement_percent"])
    assert (everything["images"], everything["step"], everything["split"]) == (18, summary["steps"], "val")
    assert (everything["classes"], everything["channels"], everything["rank"]) == (3, 32, 3)
    assert [(row["label"], row["class"], row["images"]) for row in classes] == [
        (0, "ant", 6),
        (1, "bee", 6),
        (2, "cat", 6),
    ]
    with open(run / "bound.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["margin_form_percent"]) for row in table] == [row["margin_form_percent"] for row in rows]
    kept = json.loads((run / "bound.json").read_text())
    assert kept["rows"] == rows
    page = (run / "bound.md").read_text()
    assert bound.chain_line(everything) in page
    assert bound.chain_line(everything) in out
    for sentence in kept["advice"]:
        assert f"- {sentence}" in page
        assert f"- {sentence}" in out
    assert "not the\ntheorem of the IJCKD paper" in page
    assert "answers through its own" not in page
    assert (run / "bound.png").stat().st_size > 20_000

    words = ("--split", "train", "--best", "--output", tmp_path / "new" / "out", "--batch-size", 7, "--data-dir", data)
    rows, _ = _rows(capsys, run, *words)
    assert (rows[0]["split"], rows[0]["images"], rows[1]["images"]) == (
        "train",
        30,
        10,
    )  # 10 of each, as it was trained
    assert rows[0]["checkpoint"].endswith("best.pt")
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {
        f"bound-train.{kind}" for kind in ("md", "json", "csv", "png")
    }


def test_command_for_a_student_that_answers_alone(data, teacher, tmp_path, capsys):
    weights = Path(shutil.copy(teacher, tmp_path / "weights.pt"))
    changes = {**distilled(weights), "objective": "srrl", "epochs": 1, "log_bound": True}
    summary = train(config(data, tmp_path / "run", **changes))
    rows, out = _rows(capsys, tmp_path / "run")
    assert rows[0]["own_head_error_percent"] == pytest.approx(100 - summary["last"]["top1_percent"])
    own, through = rows[0]["own_head_error_percent"], rows[0]["student_error_percent"]
    text = f"{through:.2f} % wrong, against {own:.2f} % by its own"
    assert text in " ".join((tmp_path / "run" / "bound.md").read_text().split())
    assert f"answers through its own classifier ({own:.2f} % wrong)" in out
    weights.unlink()
    assert "weights are not there: give --teacher-checkpoint" in _complaint(capsys, "bound", tmp_path / "run")
    assert (
        cli.main(["evaluate", str(tmp_path / "run")]) == 0
    )  # it needs no teacher, though the training logged the bound

    # as if it had been trained from a cache
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    (tmp_path / "cached").mkdir()
    cached = {**state["config"], "teacher_cache": str(tmp_path / "cached"), "teacher_checkpoint": None}
    checkpoint.save(tmp_path / "cached" / "last.pt", {**state, "config": cached})
    err = _complaint(capsys, "bound", tmp_path / "cached")
    assert f"was trained from the teacher cache {tmp_path / 'cached'}, which has the teacher's features of views" in err
    assert "give --teacher-checkpoint with the weights of resnet8x0.5" in err
    again, _ = _rows(capsys, tmp_path / "cached", "--teacher-checkpoint", teacher)
    assert [row["student_error_percent"] for row in again] == [row["student_error_percent"] for row in rows]


@pytest.mark.parametrize("objective", ["ce", "kd"])
def test_runs_without_a_connector_are_refused(objective, run, tmp_path, capsys):
    state = checkpoint.load(run / "last.pt")
    preset = get_objective(objective)
    changes = {
        "objective": objective,
        **{name: getattr(preset, name) for name in OBJECTIVE_FIELDS},
        "connector": "none",
    }
    changes |= {"teacher": None, "teacher_checkpoint": None} if objective == "ce" else {}
    checkpoint.save(tmp_path / "last.pt", {**state, "config": {**state["config"], **changes}})
    err = _complaint(capsys, "bound", tmp_path)
    assert f"last.pt was trained by {objective} without a connector: expected a run with one (ijckd" in err


def test_output_that_cannot_be_written(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "--output must be a folder that can be written" in _complaint(
        capsys, "bound", run, "--output", tmp_path / "file"
    )


def test_logged_at_every_evaluation(run, tmp_path, capsys):
    log = run_folder.read_log(run)
    rows = [row for row in log if row["kind"] == "bound"]
    steps = [row["step"] for row in log if row["kind"] == "eval"]
    assert [row["step"] for row in rows] == steps
    assert steps == [6, 9]
    everything = _rows(capsys, run, "--output", tmp_path / "out")[0][0]
    for key, value in rows[-1].items():
        if key not in ("kind", "step", "epoch"):
            assert everything[key] == value, key
    report = (run / "report.md").read_text()
    assert "![bound](bound_epochs.png)" in report
    terms = ("student_error", "teacher_error", "disagreement", "margin_form", "norm_form")
    assert "| " + " | ".join(f"{rows[-1][f'{name}_percent']:.2f}" for name in terms) + " |" in report
    assert (run / "bound_epochs.png").stat().st_size > 10_000
    events = b"".join(path.read_bytes() for path in (run / "tensorboard").iterdir())
    assert events.count(b"bound/disagreement_percent") == len(steps)


def test_it_changes_nothing_and_may_be_turned_on_when_a_run_goes_on(run, data, teacher, tmp_path):
    def rows(folder, kind):
        return [row for row in run_folder.read_log(folder) if row["kind"] == kind]

    train(config(data, tmp_path, **_settings(teacher)))
    assert rows(tmp_path, "bound") == []
    assert "![bound]" not in (tmp_path / "report.md").read_text()
    ours, theirs = (checkpoint.load(folder / "last.pt") for folder in (run, tmp_path))
    assert differing(ours["learner"], theirs["learner"]) == []
    for key in ("top1_percent", "top5_percent", "agreement_percent"):
        assert [row[key] for row in rows(run, "eval")] == [row[key] for row in rows(tmp_path, "eval")]

    (tmp_path / "summary.json").unlink()
    train(config(data, tmp_path, **_settings(teacher), log_bound=True), resume=True, resume_from="checkpoint-6.pt")
    assert rows(tmp_path, "bound") == rows(run, "bound")[1:]
    assert run_folder.read_config(tmp_path)["log_bound"] is True


@pytest.mark.parametrize("objective", ["ce", "kd", "dkd"])
def test_log_bound_needs_a_connector(objective, data, teacher, tmp_path):
    changes = {**distilled(teacher), "objective": objective} if objective != "ce" else {}
    with pytest.raises(
        UserError, match=f"--log-bound compares .* found objective '{objective}', which has no connector"
    ):
        resolve(config(data, tmp_path, **changes, log_bound=True))


def test_log_bound_needs_the_teacher_itself(data, tmp_path):
    changes = {"objective": "ijckd-pooled", "teacher": "resnet8x0.5", "teacher_cache": "cache", "log_bound": True}
    with pytest.raises(UserError, match="found the cache cache, which has no features of the val images: leave it out"):
        resolve(config(data, tmp_path, **changes))


def test_an_overwritten_run_leaves_no_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(bound_report, "plot_chain", lambda path, *_: path.write_text(""))
    about = dict.fromkeys(
        ("checkpoint", "step", "data", "student", "teacher", "objective", "connector", "answers_through"), ""
    )
    about |= {"classes": 5, "channels": 4, "rank": 4, "widest_class_distance": 1.0}
    for split in ("val", "train"):
        write_bound(tmp_path, some_images(), "abcde", {**about, "split": split}, get_objective("ijckd"))
    (tmp_path / run_folder.BOUND_PLOT).write_text("")
    assert len(list(tmp_path.iterdir())) == 9
    run_folder.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []
