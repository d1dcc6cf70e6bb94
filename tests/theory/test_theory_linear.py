"""Linear distillation: students against gradient descent, closed forms and bounds, and the study's figures."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import math

import numpy as np
import pytest

from ijckd_fast import cli
from ijckd_fast.errors import UserError
from ijckd_fast.theory import COLUMNS, linear

SIZES = (1, 5, 20, 60, 80, 99, 100, 200)
# An independent run of the same draws: d = 100, 60 training sets, one set of 100,000 test inputs for all of them, angle
# laws' p(t) counted on those; the columns are those of SIZES but the last.
GOLDEN = {
    ("isotropic", "E R"): (0.4778, 0.4322, 0.3518, 0.2175, 0.1483, 0.0264, 0),
    ("isotropic", "E R, hard labels"): (0.4778, 0.4440, 0.3859, 0.3306, 0.3563, 0.4472, 0.4691),
    ("angle:1", "E R"): (0.0557, 0.0047, 0.0012, 0.0003, 0.0002, 0.0000, 0),
    ("angle:1", "E R, hard labels"): (0.0557, 0.0262, 0.0592, 0.1332, 0.1914, 0.3674, 0.4068),
}
GOLDEN_BOUNDS = {
    1: (0.995, 0.461, 0.188, 0.081, 0.065, 0.054, 0),
    3: (0.251, 0.0283, 0.0023, 0.0002, 0.0001, 0.0000, 0),
}
LAWS = (linear.Isotropic(), linear.AngleLaw(1), linear.AngleLaw(3), linear.AngleLaw(1, 0.2))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(folder, standard output) of a study of two laws."""
    folder = tmp_path_factory.mktemp("study")
    sizes = ",".join(str(n) for n in SIZES)
    words = ["--laws", "isotropic,angle:1", "--repeats", "60", "--points", "500", "--sizes", sizes]
    small = ["--gradient-dimension", "8", "--gradient-sizes", "3,16"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["study", "linear", "--output", str(folder), *words, *small]) == 0
    return folder, out.getvalue()


@pytest.fixture(scope="module")
def rows(measured):
    return json.loads(measured[1].splitlines()[-1])["rows"]


def _figures(rows, quantity, case="isotropic, d=100", part="risk"):
    return [row for row in rows if (row["part"], row["case"], row["quantity"]) == (part, case, quantity)]


def _problem(n: int, d: int, seed: int = 0):
    generator = np.random.default_rng(seed)
    teacher = generator.standard_normal(d)
    return generator.standard_normal((n, d)), 2 * teacher / np.linalg.norm(teacher), generator


# ---- Students ----


@pytest.mark.parametrize("n", [5, 13, 40])
@pytest.mark.parametrize("from_zero", [True, False])
def test_gradient_descent_ends_at_the_closed_form(n, from_zero):
    x, teacher, generator = _problem(n, 20)
    start = None if from_zero else generator.standard_normal(20)
    run = linear.gradient_student(x, teacher, start=start)
    student = linear.distilled_student(x, teacher, start)
    assert run.gradient_norm <= 1e-13
    assert np.linalg.norm(run.w - student) < 1e-9
    assert np.allclose(x @ student, x @ teacher, atol=1e-12)  # the teacher's logits on what it was shown
    if n < 20:
        expected = x.T @ np.linalg.solve(x @ x.T, x @ teacher)
        if start is not None:
            expected += start - x.T @ np.linalg.solve(x @ x.T, x @ start)
            assert np.linalg.norm(student - teacher) > np.linalg.norm(linear.distilled_student(x, teacher) - teacher)
        assert np.allclose(student, expected, atol=1e-12)
    else:
        assert np.array_equal(student, teacher)


def test_students_of_several_sets_at_once():
    x, teacher, generator = _problem(12, 6)
    stacked = x.reshape(4, 3, 6)
    start = generator.standard_normal(6)
    together = linear.distilled_student(stacked, teacher, start)
    for inputs, student in zip(stacked, together, strict=True):
        assert np.allclose(student, linear.distilled_student(inputs, teacher, start), atol=1e-13)


@pytest.mark.parametrize("n", [3, 7, 8, 20])
def test_hard_label_student_is_the_least_squares_solution_of_least_norm(n):
    x, teacher, _ = _problem(n, 8)
    labels = np.sign(x @ teacher)
    assert np.allclose(linear.hard_label_student(x, labels), np.linalg.pinv(x) @ labels, atol=1e-9)


def test_dependent_inputs_are_refused():
    x, teacher, _ = _problem(3, 8)
    twice = np.concatenate([x, x[:1]])
    with pytest.raises(UserError, match="must be linearly independent, found dependent ones"):
        linear.distilled_student(twice, teacher)
    with pytest.raises(UserError, match="leave out repeated inputs"):
        linear.hard_label_student(twice, np.ones(4))


def test_n_equal_to_d_is_refused_where_it_would_not_end():
    x, teacher, _ = _problem(8, 8)
    with pytest.raises(UserError, match=r"n = d = 8 inputs: the least singular value .* give n < d or n > d"):
        linear.gradient_student(x, teacher)
    with pytest.raises(UserError, match="n = d = 8 inputs is ill-conditioned"):
        linear.deep_linear_student(x, teacher, linear.balanced_start(teacher, 0.1, 2, 4))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_deep_linear_students_keep_the_quantity_and_end_where_it_says(layers):
    x, teacher, generator = _problem(2, 8)
    away = generator.standard_normal(8)
    direction = linear.descending_direction(x, teacher, away)
    assert np.array_equal(np.abs(direction), np.abs(away))
    assert np.array_equal(direction, linear.descending_direction(x, teacher, -away))
    small = 1e-3 * direction / np.linalg.norm(direction)
    zero = np.zeros(8)
    assert linear.distillation_loss(x, teacher, small) < linear.distillation_loss(x, teacher, zero)

    aim = 0.1
    norms = [0.03, linear.start_norm_for(aim, 2, layers)]
    starts = [linear.balanced_start(direction, norm, layers, width=4) for norm in norms]
    for factors, norm in zip(starts, norms, strict=True):
        product = np.eye(8)
        for factor in factors:
            product = factor @ product
        assert np.allclose(product[0], norm * direction / np.linalg.norm(direction))
        for lower, upper in itertools.pairwise(factors):
            assert np.allclose(lower @ lower.T, upper.T @ upper)
    run = linear.deep_linear_student(x, teacher, [np.stack(factors) for factors in zip(*starts, strict=True)])
    assert run.gradient_norm.max() <= 1e-9
    projected = linear.projection(x, teacher)
    for norm, w in zip(norms, run.w, strict=True):
        before = linear.conserved_quantity(x, norm * direction / np.linalg.norm(direction), layers)
        assert linear.conserved_quantity(x, w, layers) == pytest.approx(before, rel=1e-5)
        distance = np.linalg.norm(w - projected)
        assert distance == pytest.approx(linear.deep_distance(before, np.linalg.norm(projected), layers), rel=1e-5)
        assert distance <= norm ** (1 / layers) * np.linalg.norm(w) ** ((layers - 1) / layers) * (1 + 1e-6)
    assert distance <= aim


def test_start_norm_is_the_largest_that_guarantees_the_distance():
    """The guarantee is met exactly by the worst case: a start outside the span, a teacher in it."""
    for layers in (1, 2, 3, 5):
        norm = linear.start_norm_for(0.3, 2, layers)
        outside = norm ** (1 / layers)  # the conserved quantity of a start that is all outside
        assert linear.deep_distance(outside, 2, layers) == pytest.approx(0.3)
    with pytest.raises(UserError, match="distance and teacher_norm > 0"):
        linear.start_norm_for(0, 2, 2)
    with pytest.raises(UserError, match="a norm > 0"):
        linear.balanced_start(np.ones(3), 0.0, 2, 2)


def test_perturbation_leaves_the_loss_and_raises_the_risk():
    x, teacher, generator = _problem(5, 20)
    student = linear.distilled_student(x, teacher)
    v = linear.null_space_direction(x, teacher, generator)
    assert np.linalg.norm(v) == pytest.approx(1)
    assert np.abs(x @ v).max() < 1e-13
    assert abs(teacher @ v) < 1e-13
    points = generator.standard_normal((20_000, 20))
    risks = []
    for delta in (0, 0.5, 1, 2):
        moved = student + delta * np.linalg.norm(student) * v
        assert abs(linear.distillation_loss(x, teacher, moved)) < 1e-15
        cos = math.cos(linear.angle(student, teacher)) / math.sqrt(1 + delta**2)
        assert math.cos(linear.angle(moved, teacher)) == pytest.approx(cos)
        risks.append(float(linear.transfer_risk(moved, teacher, points)))
    assert np.all(np.diff(risks) > 0.005)
    assert linear.distillation_loss(x, teacher, student + x[0]) > 1e-3  # a step inside the span does change it
    with pytest.raises(UserError, match="needs n <= d - 2 = 18"):
        linear.null_space_direction(generator.standard_normal((19, 20)), teacher, generator)


# ---- Angles, laws, bounds ----


def test_angle():
    teacher = np.array([2.0, 0, 0])
    w = np.array([[3.0, 0, 0], [0, 1, 0], [-1, 0, 0], [1, 1e-9, 0]])
    assert linear.angle(w, teacher) == pytest.approx([0, math.pi / 2, math.pi, 1e-9], rel=1e-12)
    with pytest.raises(UserError, match="not all zero"):
        linear.angle(np.zeros(3), teacher)


def test_transfer_risk_counts_disagreements():
    points = np.array([[1.0, 1], [1, -1], [-1, 3], [2, 1]])
    w = np.array([[[1.0, 0], [0, 1]], [[-1, 0], [1, 1]]])  # [2, 2, d]
    assert linear.transfer_risk(w, np.array([1.0, 0]), points).tolist() == [[0, 0.5], [1, 0.25]]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_samples_follow_the_tail(law):
    d, count = 6, 40_000
    x = law.sample(np.random.default_rng(3), (count,), d)
    assert x.shape == (count, d)
    angles = np.arccos(np.abs(x[:, 0]) / np.linalg.norm(x, axis=1))
    t = np.linspace(0.05, 1.5, 12)
    p = law.tail(t, d)
    found = (angles[:, None] >= t).mean(axis=0)
    assert np.all(np.abs(found - p) <= 4.5 * np.sqrt(p * (1 - p) / count) + 1e-12)
    assert abs(np.sign(x[:, 0]).mean()) < 4.5 / math.sqrt(count)
    assert linear.parse_law(law.name) == law


def test_isotropic_tail_in_low_dimensions():
    t = np.linspace(0, math.pi / 2, 7)
    assert linear.Isotropic().tail(t, 3) == pytest.approx(np.cos(t), abs=1e-14)
    assert linear.Isotropic().tail(t, 2) == pytest.approx(1 - 2 * t / math.pi, abs=1e-14)


def test_risk_at_an_angle():
    angles = np.array([0, 0.1, 1.0, math.pi / 2, 2.5, math.pi])
    isotropic = linear.risk_at_angle(lambda t: linear.Isotropic().tail(t, 20), angles, 20)
    assert isotropic == pytest.approx(angles / math.pi, abs=1e-12)
    generator = np.random.default_rng(4)
    for law in LAWS[1:]:
        points = law.sample(generator, (100_000,), 5)
        for a in (0.5, 1.3, 2.0):
            w = np.array([math.cos(a), 0, math.sin(a), 0, 0])
            risk = float(law.risk(np.array(a), 5))
            error = math.sqrt(risk * (1 - risk) / len(points))
            assert float(linear.transfer_risk(w, np.eye(5)[0], points)) == pytest.approx(risk, abs=4 * error + 2e-5)
    with pytest.raises(UserError, match="d >= 3"):
        linear.risk_at_angle(np.cos, angles, 2)


def test_isotropic_closed_forms():
    """Beta(n/2, (d-n)/2): in d = 3 the angle to a random line has density sin, to a random plane cos."""
    assert linear.isotropic_risk(1, 3) == pytest.approx(1 / math.pi)
    assert linear.isotropic_risk(2, 3) == pytest.approx((math.pi / 2 - 1) / math.pi)
    assert linear.isotropic_risk(3, 3) == 0
    assert linear.isotropic_risk(2500, 5000) == pytest.approx(0.25, abs=1e-6)  # a density below the least float
    assert linear.isotropic_hard_label_risk(100, 100) == 0.5
    for n in (99, 101):
        assert 0.4 < linear.isotropic_hard_label_risk(n, 100) < 0.5
    assert linear.isotropic_hard_label_risk(10**6, 100) < 0.01
    x = np.random.default_rng(6).standard_normal((16, 600, 300))
    for n in (60, 180, 600):
        students = linear.hard_label_student(x[:, :n], np.sign(x[:, :n, 0]))
        found = linear.angle(students, np.eye(300)[0]) / math.pi
        error = found.std() / math.sqrt(16)
        assert error < 0.005
        assert found.mean() == pytest.approx(linear.isotropic_hard_label_risk(n, 300), abs=4 * error + 0.002)


@pytest.mark.parametrize("k", [1, 3])
def test_risk_bound(k):
    law = linear.AngleLaw(k)
    exact = [linear.risk_bound(lambda t: law.tail(t, 100), n, 100) for n in SIZES[:-1]]
    for n, bound in zip(SIZES[1:-2], exact[1:], strict=False):
        u = n ** (-1 / (n - 1))  # of 1 - u + u^n, where k = 1
        if k == 1:
            assert bound == pytest.approx(1 - u * (1 - 1 / n), abs=1e-9)
        assert bound <= linear.polynomial_bound(k, n)
    assert exact[0] == pytest.approx(1 if k == 1 else 0.25)
    assert exact[-1] == 0

    # Estimated from 100,000 inputs, p(t) lets the infimum find where chance made it small: 0.995 instead of 1.
    angles = np.arccos(np.abs(law.sample(np.random.default_rng(7), (100_000,), 3)[:, 0]))
    angles.sort()
    estimated = [
        linear.risk_bound(lambda t: 1 - np.searchsorted(angles, t, side="left") / len(angles), n, 100)
        for n in SIZES[:-1]
    ]
    for values in (exact, estimated):
        assert values == pytest.approx(GOLDEN_BOUNDS[k], abs=0.0055 if k == 1 else 0.0035)
    assert 0.98 < estimated[0] / exact[0] < 1


def test_risk_bound_with_a_margin_and_without_content():
    law = linear.AngleLaw(1, 0.2)

    def tail(t):
        return law.tail(t, 100)

    for n in (1, 2, 5, 20, 60, 80, 99):
        assert linear.risk_bound(tail, n, 100) <= linear.margin_bound(tail, 0.2, n) * (1 + 1e-6)
    assert linear.margin_bound(tail, 0.2, 20) == pytest.approx((1 - 0.2 / (math.pi / 2 - 0.2)) ** 20)
    with pytest.raises(UserError, match=r"a share 0\.073 of the inputs is nearer than 0\.3 radians"):
        linear.margin_bound(tail, 0.3, 20)
    isotropic = linear.risk_bound(lambda t: linear.Isotropic().tail(t, 100), 99, 100)
    assert 0.999 < isotropic <= 1
    with pytest.raises(UserError, match="n >= 1"):
        linear.risk_bound(tail, 0, 100)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_the_angle_falls_with_every_input(law):
    d = 30
    x = law.sample(np.random.default_rng(5), (20, d), d)
    angles = np.stack(
        [linear.angle(linear.distilled_student(x[:, :n], np.eye(d)[0]), np.eye(d)[0]) for n in range(1, d + 1)]
    )
    assert np.diff(angles, axis=0).max() <= 1e-12
    assert np.diff(angles, axis=0).min() < -1e-3
    assert np.all(angles[-1] == 0)
    risks = law.risk(angles, d)
    assert np.diff(risks, axis=0).max() <= 1e-12


@pytest.mark.parametrize(
    "text",
    ["gauss", "angle", "angle:0", "angle:x", "angle:1:2", "angle:1:-1", "angle:1:0.1:2", "isotropic:1", "angle:nan"],
)
def test_unknown_laws(text):
    with pytest.raises(UserError, match=f"unknown law of inputs '{text}': expected isotropic, angle:K"):
        linear.parse_law(text)


# ---- The study ----


def test_study_holds_all_its_figures(rows):
    judged = [row for row in rows if row["holds"] is not None]
    assert [row for row in judged if not row["holds"]] == []
    assert len(judged) > 100
    parts = {row["part"] for row in rows}
    assert parts == {"gradient descent", "deep-linear students", "risk", "monotone", "perturbation"}
    for row in judged:
        allowed = row["allowed"]
        assert allowed < 0.02 or allowed < 0.5 * row["expected"], row  # nothing holds because all is allowed


@pytest.mark.parametrize(("law", "quantity"), GOLDEN)
def test_study_gives_the_golden_table(rows, law, quantity):
    found = _figures(rows, quantity, f"{law}, d=100")
    assert [row["at"] for row in found] == list(SIZES)
    for row, golden in zip(found, GOLDEN[law, quantity], strict=False):
        of_test_inputs = math.sqrt(golden * (1 - golden) / 100_000)
        error = math.hypot(row["standard_error"] * math.sqrt(2), of_test_inputs)
        assert abs(row["measured"] - golden) <= 4 * error + 6e-5, row


def test_hard_labels_peak_at_n_equal_to_d_and_soft_ones_do_not(rows):
    hard = {row["at"]: row for row in _figures(rows, "E R, hard labels")}
    assert hard[100]["measured"] > hard[99]["measured"] > hard[60]["measured"] + 0.05
    assert hard[100]["measured"] > hard[200]["measured"] + 0.2
    for row in hard.values():
        assert row["relation"] == "about"
        assert abs(row["measured"] - row["expected"]) < 0.05
    soft = [row["measured"] for row in _figures(rows, "E R")]
    assert np.all(np.diff(soft) <= 0)
    assert soft[SIZES.index(100)] == soft[SIZES.index(200)] == 0
    cos2 = _figures(rows, "E cos^2")
    assert [row["expected"] for row in cos2] == [min(n / 100, 1) for n in SIZES]


def test_study_writes_what_it_says(measured, rows):
    folder, out = measured
    assert [list(row) for row in rows] == [list(COLUMNS)] * len(rows)
    with open(folder / "study.csv", newline="") as file:
        saved = list(csv.DictReader(file))
    assert len(saved) == len(rows)
    for row, line in zip(rows, saved, strict=True):
        assert float(line["measured"]) == pytest.approx(row["measured"], rel=1e-5)
        assert line["quantity"] == row["quantity"]
    report = (folder / "report.md").read_text()
    for plot in ("risk.png", "perturbation.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
        assert f"]({plot})" in report
    row = next(row for row in _figures(rows, "E R") if row["at"] == 20)
    cell = f"{row['measured']:.4g} ± {row['standard_error']:.1g} = {linear.isotropic_risk(20, 100):.4g}"
    assert f"| 20 | {cell} | ≤ 1 |" in report
    judged = sum(row["holds"] is not None for row in rows)
    verdict = f"{judged} of {judged} figures that have something to be held to are within what is allowed"
    assert verdict in " ".join(out.split())
    assert verdict in report
    assert " ! |" not in report
    assert "transfer risk, isotropic, d=100" in out


def test_a_figure_that_does_not_hold_is_named(tmp_path, monkeypatch, capsys):
    right = linear.isotropic_risk
    monkeypatch.setattr(linear, "isotropic_risk", lambda n, d: right(n, d) + (0.2 if n == 5 else 0))
    words = ["--dimension", "10", "--sizes", "2,5", "--laws", "isotropic", "--repeats", "40", "--points", "10"]
    small = ["--gradient-dimension", "8", "--gradient-sizes", "[2]"]
    assert cli.main(["study", "linear", "--output", str(tmp_path), *words, *small]) == 0
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [(row["at"], row["quantity"]) for row in rows if row["holds"] is False] == [(5, "E R")]
    assert "- not: risk, isotropic, d=10, n = 5: E R 0." in out
    assert (tmp_path / "report.md").read_text().count(" ! |") == 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--gradient-sizes", "5,20"], "gradient descent with n = d = 20 inputs"),
        (["--gradient-sizes", "0,5"], "--gradient-sizes must be numbers of 1 or more, got [0, 5]"),
        (["--gradient-dimension", "4"], "--gradient-dimension must be at least 8, got 4"),
        (["--sizes", "0,5"], "--sizes must be numbers of 1 or more, got [0, 5]"),
        (["--sizes", "[]"], "--sizes must be numbers of 1 or more, got []"),
        (["--repeats", "9"], "--repeats must be at least 10 for a standard error to hold the figures to, got 9"),
        (["--points", "0"], "--points must be at least 1, got 0"),
        (["--dimension", "3"], "--dimension must be at least 4, got 3"),
        (["--seed=-1"], "--seed must be 0 or more, got -1"),
        (["--laws", "angle:1,gauss"], "unknown law of inputs 'gauss'"),
        (["--laws", ","], "--laws names no law of inputs"),
        (["--size", "3"], "unknown option --size of ijckd-fast study linear; did you mean '--sizes'"),
    ],
)
def test_mistakes_are_told(tmp_path, capsys, words, text):
    assert cli.main(["study", "linear", "--output", str(tmp_path / "out"), *words]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["lniear"],
            "unknown command 'lniear' of ijckd-fast study: expected one of finite, linear; did you mean 'linear'?",
        ),
        ([], "ijckd-fast study needs the name of a command, one of finite, linear; ijckd-fast study --help says more"),
        (["--repeats", "20"], "unknown command '--repeats' of ijckd-fast study"),
    ],
)
def test_study_needs_a_name(capsys, words, text):
    assert cli.main(["study", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ijckd-fast: ")
    assert err.count("\n") == 1
    assert text in err
