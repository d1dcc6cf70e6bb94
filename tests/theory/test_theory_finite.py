"""Finite domains: learners against brute force, exact risks against enumeration, slopes and plateaus of the study."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math

import numpy as np
import pytest

from ijckd_fast import cli
from ijckd_fast.errors import UserError
from ijckd_fast.theory import finite

UNEVEN = finite.Instance(np.array([0.7, 0.3]), np.array([[0.5, 0.3, 0.2], [0.1, 0.0, 0.9]]))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Of a study of all instances, with the shapes and the range of n of the default."""
    folder = tmp_path_factory.mktemp("study")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        words = ["--repeats", "1000", "--curve-repeats", "20", "--sizes", "1000,3162,10000,31623,100000"]
        assert cli.main(["study", "finite", "--output", str(folder), *words]) == 0
    for plot in ("curves.png", "slopes.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
        assert f"]({plot})" in (folder / "report.md").read_text()
    assert (folder / "study.csv").read_text().startswith("study,part,case,axis,at,")
    return json.loads(out.getvalue().splitlines()[-1])["rows"]


def _figures(rows, case, quantity, part="risk"):
    return {row["at"]: row for row in rows if (row["part"], row["case"], row["quantity"]) == (part, case, quantity)}


# ---- Learners ----


def _losses(name: str, counts: np.ndarray, pi: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """The loss that a learner minimises, for one input: counts [A], pi [A], log_q [m, A] candidates; [m]"""
    seen = counts > 0
    if name == "CE_sgl":
        return -(log_q[:, seen] @ counts[seen])
    if name == "CE_ptl":
        return -(log_q[:, seen] @ (counts * pi)[seen])
    if name == "SEL_ptl":
        return 0.5 * (log_q[:, seen] - np.log(pi[seen])) ** 2 @ counts[seen]
    return -(log_q[:, pi > 0] @ pi[pi > 0]) * counts.sum()


@pytest.mark.parametrize("name", finite.LEARNERS)
@pytest.mark.parametrize("counts", [[5, 2, 1], [1, 4, 0], [0, 3, 0], [0, 0, 2]])
def test_learners_minimise_their_losses(name, counts):
    """No point of a grid of the simplex has a smaller loss, and the best of them is near."""
    counts, pi = np.array(counts), np.array([0.5, 0.3, 0.2])
    steps = 200
    grid = np.array([(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)]) / steps
    with np.errstate(divide="ignore"):
        losses = _losses(name, counts, pi, np.log(grid))
        (found,) = finite.LEARNERS[name](counts[None, None], pi[None])[0]
        loss = _losses(name, counts, pi, np.log(found[None]))[0]
    assert found.sum() == pytest.approx(1)
    assert found.min() >= 0
    assert loss <= losses.min() + 1e-12
    if name != "SEL_ptl" or (counts > 0).sum() > 1:  # else the loss does not determine it
        assert np.abs(grid[losses.argmin()] - found).max() <= 1.5 / steps


def test_mass_that_sel_leaves_open_goes_evenly_to_the_labels_not_seen():
    pi = np.array([[0.5, 0.3, 0.1, 0.1]])
    found = finite.sel_ptl(np.array([[[3, 0, 0, 1]]]), pi)
    assert found[0, 0] == pytest.approx([0.5, 0.2, 0.2, 0.1])
    found = finite.sel_ptl(np.array([[[1, 1, 1, 1]]]), pi)
    assert found[0] == pytest.approx(pi)


@pytest.mark.parametrize("name", finite.LEARNERS)
def test_an_input_never_drawn_gets_the_uniform_distribution(name):
    found = finite.LEARNERS[name](np.array([[[0, 0, 0], [0, 0, 4]], [[2, 1, 1], [0, 0, 0]]]), UNEVEN.pi)
    assert found.shape == (2, 2, 3)
    assert found[0, 0].tolist() == found[1, 1].tolist() == [1 / 3] * 3
    assert found[1, 0].tolist() != [1 / 3] * 3


def test_draws_and_risk():
    generator = np.random.default_rng(0)
    counts = finite.draw_counts(UNEVEN, 50, 20_000, generator)
    assert counts.shape == (20_000, 2, 3)
    assert np.all(counts.sum(axis=(1, 2)) == 50)
    joint = UNEVEN.rho[:, None] * UNEVEN.pi
    error = np.sqrt(joint * (1 - joint) / (50 * 20_000))
    assert np.all(np.abs(counts.mean(axis=0) / 50 - joint) <= 4.5 * error)
    estimate = np.array([[[0.5, 0.5, 0], [0, 0, 1]]])
    assert finite.risk(estimate, UNEVEN) == pytest.approx([0.7 * 0.2 + 0.3 * 0.1])


def test_draws_in_blocks(monkeypatch):
    monkeypatch.setattr(finite, "_BLOCK", 60)  # ten tables at a time
    found = finite.risks(UNEVEN, 20, 2001, np.random.default_rng(1))
    assert {name: values.shape for name, values in found.items()} == dict.fromkeys(finite.LEARNERS, (2001,))
    error = found["CE_sgl"].std() / math.sqrt(2001)
    assert found["CE_sgl"].mean() == pytest.approx(finite.ce_sgl_risk(UNEVEN, 20), abs=4.5 * error)
    assert len(np.unique(found["CE_sgl"])) > 50  # the blocks differ


# ---- Exact risks ----


@pytest.mark.parametrize("n", [1, 2, 4])
def test_exact_risks_by_enumeration(n):
    joint = (UNEVEN.rho[:, None] * UNEVEN.pi).ravel()
    expected = dict.fromkeys([*finite.LEARNERS, "missing"], 0.0)
    for draws in itertools.product(range(6), repeat=n):
        probability = np.prod(joint[list(draws)])
        counts = np.bincount(draws, minlength=6).reshape(1, 2, 3)
        for name, learner in finite.LEARNERS.items():
            expected[name] += probability * finite.risk(learner(counts, UNEVEN.pi), UNEVEN)[0]
        expected["missing"] += probability * joint[counts.ravel() == 0].sum()
    assert finite.ce_sgl_risk(UNEVEN, n) == pytest.approx(expected["CE_sgl"], rel=1e-12)
    assert finite.ce_ful_risk(UNEVEN, n) == pytest.approx(expected["CE_ful"], rel=1e-12)
    assert finite.missing_mass(UNEVEN, n) == pytest.approx(expected["missing"], rel=1e-12)
    assert expected["CE_ful"] < expected["SEL_ptl"] <= expected["missing"]


def test_golden_values():
    """Leading terms and limits, by hand."""
    n = 100_000
    instance = finite.make_instance(1, 10, 10, n)
    assert finite.ce_sgl_risk(instance, n) == pytest.approx(math.sqrt(9 * 10 / (2 * math.pi * n)), rel=2e-3)
    third = finite.make_instance(3, 10, 11, n)
    assert finite.ce_ful_risk(third, n) == pytest.approx(3.008e-5, rel=2e-4)
    assert finite.ce_ful_risk(third, n) == pytest.approx(9 * (1 - 1 / 11) / (math.e * n), rel=1e-3)
    k = np.arange(6)
    binomial = np.array([math.comb(5, i) for i in k]) * math.exp(-1) ** k * (1 - math.exp(-1)) ** (5 - k)
    leading = 10 * float(binomial @ (k * 5 / (k + 5)))
    assert n * finite.sel_ptl_risk_on_instance_2(10, 11, n) == pytest.approx(leading, rel=1e-4)
    for S, A, bias in ((100, 25, 0.44571), (1, 100, 0.48539)):
        p, r = 0.5 + 0.5 / A, 0.5 / A
        found = finite.ce_ptl_bias(finite.make_instance(0, S, A, 1))
        assert found == pytest.approx(p**2 / (p**2 + (A - 1) * r**2) - p, rel=1e-12)
        assert found == pytest.approx(bias, abs=5e-6)
    even = finite.Instance(np.array([0.5, 0.5]), np.array([[0.25] * 4, [0, 0, 1, 0]]))
    assert finite.ce_ptl_bias(even) == 0


def test_error_of_ce_ful_knows_of_events_too_rare_to_be_seen():
    instance = finite.make_instance(0, 100, 25, 1000)
    found = finite.risks(instance, 1000, 10, np.random.default_rng(0))["CE_ful"]
    assert found.std() == 0
    assert finite.ce_ful_error(instance, 1000, 10) > finite.ce_ful_risk(instance, 1000)
    third = finite.make_instance(3, 10, 11, 1000)
    found = finite.risks(third, 1000, 4000, np.random.default_rng(0))["CE_ful"]
    assert finite.ce_ful_error(third, 1000, 4000) == pytest.approx(found.std() / math.sqrt(4000), rel=0.1)


def test_slope():
    sizes = np.array([1e3, 3e3, 1e4, 1e5])
    fitted, error = finite.slope(sizes, 7 * sizes**-0.75, np.zeros(4))
    assert fitted == pytest.approx(-0.75)
    assert error == 0
    generator = np.random.default_rng(2)
    errors = np.array([0.01, 0.02, 0.01, 0.03]) * sizes**-1
    drawn = [finite.slope(sizes, sizes**-1 + errors * generator.standard_normal(4), errors) for _ in range(2000)]
    assert np.std([slope for slope, _ in drawn]) == pytest.approx(drawn[0][1], rel=0.1)
    with pytest.raises(UserError, match="two different sizes, got 1000"):
        finite.slope(sizes[:1], sizes[:1], sizes[:1])


# ---- Instances ----


@pytest.mark.parametrize(("number", "S", "A"), [(0, 7, 3), (1, 5, 4), (1, 5, 5), (2, 4, 5), (3, 4, 5)])
def test_instances_are_distributions(number, S, A):
    instance = finite.make_instance(number, S, A, 400)
    assert instance.pi.shape == (S, A)
    assert instance.rho.sum() == pytest.approx(1)
    assert instance.pi.sum(axis=1) == pytest.approx(np.ones(S))
    assert instance.pi.min() >= 0
    assert instance.rho.min() > 0


def test_instances_by_hand():
    assert finite.make_instance(0, 2, 2, 1).pi.tolist() == [[0.75, 0.25], [0.25, 0.75]]
    assert finite.make_instance(1, 4, 3, 8).pi[0].tolist() == [0.625, 0.375, 0]  # as with two labels
    second, third = finite.make_instance(2, 2, 5, 9), finite.make_instance(3, 2, 5, 9)
    assert second.pi[1] == pytest.approx([0.2, 0, 0.2, 0, 0.6])
    assert second.rho.tolist() == [0.5, 0.5]
    assert third.rho == pytest.approx([0.1, 0.9])
    assert np.array_equal(second.pi, third.pi)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--instances", "1,4"], "unknown instance 4: expected 0, 1, 2 or 3"),
        (["--instances", "[]"], "--instances names none"),
        (
            ["--instances", "[2]", "--labels", "10"],
            "instance 2 needs an odd number of labels, 3 or more, got 10: give 11",
        ),
        (["--instances", "[3]", "--labels", "2"], "instance 3 needs an odd number of labels, 3 or more, got 2: give 3"),
        (["--instances", "[3]", "--inputs", "1"], "instance 3 needs 2 inputs or more"),
        (
            ["--instances", "[1]", "--sizes", "24,1000"],
            "instance 1 needs n >= SA/4 = 25 with 10 inputs and 10 labels, got n = 24",
        ),
        (["--instances", "[2]", "--sizes", "48,1000"], "instance 2 needs n >= S(A-1)/2 - 1 = 49 with 10 inputs"),
        (["--labels", "1"], "labels >= 2 and n >= 1, got 100 inputs, 1 labels"),
        (["--inputs", "0"], "an instance needs inputs >= 1"),
        (["--sizes", "0,10"], "--sizes must be numbers of 1 or more, got [0, 10]"),
        (["--sizes", "[]"], "--sizes must be numbers of 1 or more, got []"),
        (["--repeats", "1"], "--repeats must be at least 10 for a standard error to hold the figures to, got 1"),
        (["--curve-repeats", "2"], "--curve-repeats must be at least 10"),
        (["--seed=-2"], "--seed must be 0 or more"),
    ],
)
def test_mistakes_are_told_before_anything_is_drawn(tmp_path, capsys, words, text):
    assert cli.main(["study", "finite", "--output", str(tmp_path / "out"), *words]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- The study ----


def test_study_holds_all_its_figures(rows):
    judged = [row for row in rows if row["holds"] is not None]
    assert [row for row in judged if not row["holds"]] == []
    assert len(judged) > 60


@pytest.mark.parametrize(
    ("case", "name", "exponent"),
    [
        ("instance 1, S=10, A=10", "CE_sgl", -0.5),
        ("instance 2, S=10, A=11", "SEL_ptl", -1),
        ("instance 3, S=10, A=11", "CE_ful", -1),
    ],
)
def test_slopes(rows, case, name, exponent):
    (row,) = _figures(rows, case, name, "slope").values()
    assert abs(row["measured"] - exponent) <= 0.03
    assert row["expected"] == exponent
    assert row["standard_error"] < 0.01


def test_slope_of_ce_ful_on_instance_3_is_that_of_its_exact_risk(rows):
    (row,) = _figures(rows, "instance 3, S=10, A=11", "CE_ful, exact", "slope").values()
    assert row["expected"] == pytest.approx(-0.990, abs=2e-3)
    assert abs(row["measured"] - row["expected"]) <= 4 * row["standard_error"]
    for n, found in _figures(rows, "instance 3, S=10, A=11", "CE_ful").items():
        assert found["expected"] == finite.ce_ful_risk(finite.make_instance(3, 10, 11, n), n)
        assert abs(found["measured"] - found["expected"]) <= 4 * found["standard_error"]


@pytest.mark.parametrize(
    ("case", "plateau"), [("instance 0, S=100, A=25", 0.44571), ("instance 0, S=1, A=100", 0.48539)]
)
def test_plateau_of_ce_ptl(rows, case, plateau):
    found = {name: _figures(rows, case, name)[100_000]["measured"] for name in finite.LEARNERS}
    assert found["CE_ptl"] == pytest.approx(plateau, abs=1e-3)
    assert found["SEL_ptl"] < 1e-15
    assert found["CE_ful"] == 0
    assert 0 < found["CE_sgl"] < 0.06
    small = _figures(rows, case, "CE_ptl")[1000]
    assert small["relation"] == ("about" if "S=100" in case else "=")


def test_risks_at_the_largest_size(rows):
    """Means of an independent run of 4,000 repeats, to three or four digits."""
    golden = {
        (1, 10): {"CE_sgl": 1.200e-2, "CE_ptl": 1.241e-2},
        (2, 11): {"CE_sgl": 2.73e-4, "CE_ptl": 5.00e-4, "SEL_ptl": 1.249e-4},
        (3, 11): {"CE_sgl": 1.215e-4, "CE_ptl": 5.30e-4, "SEL_ptl": 3.04e-5, "CE_ful": 3.03e-5},
    }
    for (number, A), values in golden.items():
        for name, value in values.items():
            row = _figures(rows, f"instance {number}, S=10, A={A}", name)[100_000]
            assert row["measured"] == pytest.approx(value, abs=4 * 1.12 * row["standard_error"] + 0.003 * value)


def test_one_size_has_no_slope(tmp_path, capsys):
    words = ["--instances", "[1]", "--sizes", "500,1000", "--repeats", "10", "--output", str(tmp_path)]
    assert cli.main(["study", "finite", *words]) == 0
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert {row["part"] for row in rows} == {"risk"}
    assert "fewer than two sizes are 1,000 or more" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "curves.png").exists()
