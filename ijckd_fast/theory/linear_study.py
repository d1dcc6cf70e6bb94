"""`ijckd-fast study linear`: what linear.py predicts, measured on random draws, each figure beside its closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ijckd_fast import files
from ijckd_fast.errors import UserError
from ijckd_fast.theory import linear
from ijckd_fast.theory.figures import Row, check_sizes, figure_row
from ijckd_fast.theory.plots import plot_perturbation, plot_risks
from ijckd_fast.theory.report import print_table, write_csv, write_study

if TYPE_CHECKING:
    from rich.console import Console

LAWS = "isotropic,angle:1,angle:3,angle:1:0.2"
_LINEAR_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95, 0.99, 1, 1.2, 2)  # of the dimension
_DELTAS = (0.0, 0.25, 0.5, 1.0, 2.0)
_STARTS = (1e-2, 1e-4, 1e-6)
_TEACHER_NORM = 2.0  # in the gradient runs; elsewhere only its direction counts


def study_linear(
    output: Path,
    *,
    dimension: int = 100,
    sizes: Sequence[int] | None = None,
    laws: str = LAWS,
    repeats: int = 200,
    points: int = 2000,
    gradient_dimension: int = 20,
    gradient_sizes: Sequence[int] = (5, 15, 40),
    seed: int = 0,
    console: Console,
) -> list[Row]:
    """Measures the linear student of linear.py; writes study.csv, risk.png, perturbation.png and report.md to `output`.

    dimension           d of the risk tables, at least 4; teacher along the first axis
    sizes               n, numbers of training inputs, each the first n of one set; default: 1 % to 200 % of d
    laws                of the inputs, separated by commas, as `linear.parse_law` reads them
    repeats, points     training sets per law, and fresh test inputs for each
    gradient_dimension  d of the runs by gradient descent, at least 8
    gradient_sizes      their n, none equal to that d
    returns             rows with the keys COLUMNS. `relation` is what `measured` is held to: `=` or `<=` `expected`,
                        with `allowed` to spare and the verdict in `holds`; `about`: shown beside it, without verdict;
                        empty: nothing to compare with. `standard_error` is that of measured - expected over the draws,
                        null where no chance is involved
    """
    if dimension < 4:
        raise UserError(f"--dimension must be at least 4, got {dimension}")
    if sizes is None:
        sizes = sorted({max(1, round(share * dimension)) for share in _LINEAR_SHARES})
    sizes = check_sizes(sizes, repeats, seed)
    chosen = [linear.parse_law(text) for text in laws.split(",") if text.strip()]
    if not chosen:
        raise UserError(
            "--laws names no law of inputs: expected some of isotropic, angle:K, angle:K:MARGIN, separated by commas"
        )
    if points < 1:
        raise UserError(f"--points must be at least 1, got {points}")
    if gradient_dimension < 8:
        raise UserError(f"--gradient-dimension must be at least 8, got {gradient_dimension}")
    if not gradient_sizes or min(gradient_sizes) < 1:
        raise UserError(f"--gradient-sizes must be numbers of 1 or more, got {list(gradient_sizes)}")

    with files.lock(output, "--output"):
        rows = _gradient_rows(gradient_dimension, gradient_sizes, seed)
        for number, law in enumerate(chosen):
            generator = np.random.default_rng([seed, 1, number])
            base = {"study": "linear", "case": f"{law.name}, d={dimension}", "repeats": repeats, "seed": seed}
            rows += _risk_rows(base, law, dimension, sizes, points, generator)
            generator = np.random.default_rng([seed, 2, number])
            rows += _perturbation_rows(base, law, dimension, points, generator)
        write_csv(output, rows)
        plot_risks(output / "risk.png", rows)
        plot_perturbation(output / "perturbation.png", rows)
        for law in chosen:
            case = f"{law.name}, d={dimension}"
            expected = ("E R", "E R against the bound", "E R, hard labels")
            shown = [
                row for row in rows if row["part"] == "risk" and row["case"] == case and row["quantity"] in expected
            ]
            print_table(console, f"transfer risk, {case}", shown)
        write_study(
            output,
            rows,
            console,
            "Linear distillation",
            f"""A linear teacher distilled into a linear student through soft labels alone (arXiv 2105.13093): {repeats}
training sets per law of inputs, {points:,} fresh test inputs each, seed {seed}. The student is the closed form, which
the gradient runs below confirm; its risk is taken at its angle to the teacher (exact for these laws) and, beside it,
counted on the test inputs. The hard-label student is least squares on sign(w*.x), of least norm where n < d: at n = d
it interpolates noise and its risk peaks, the distilled one's does not. In isotropic data the bound says nothing (1):
angles gather at pi/2. `angle:K:MARGIN` are inputs that keep a margin to the teacher's plane. Moved outside the span of
its training inputs (perturbation) a student keeps its loss and its risk grows: it is the start at 0 that selects a good
one among all minima.""",
            ("risk.png", "perturbation.png"),
        )
    return rows


def _gradient_rows(d: int, sizes: Sequence[int], seed: int) -> list[Row]:
    generator = np.random.default_rng([seed, 0])
    teacher = generator.standard_normal(d)
    teacher *= _TEACHER_NORM / np.linalg.norm(teacher)
    base = {"study": "linear", "repeats": 1, "seed": seed}
    rows = []
    for name, start in (("start 0", None), ("random start", generator.standard_normal(d))):
        row = partial(figure_row, {**base, "part": "gradient descent", "case": f"{name}, d={d}", "axis": "n"})
        for n in sizes:
            x = generator.standard_normal((n, d))
            run = linear.gradient_student(x, teacher, start=start)
            off = np.linalg.norm(run.w - linear.distilled_student(x, teacher, start)) / _TEACHER_NORM
            by = "closed form; distance over the teacher's norm"
            rows.append(row(n, "distance", off, relation="=", expected=0.0, slack=1e-6, source=by))
            rows.append(row(n, "steps", run.steps))
            rows.append(row(n, "gradient left", run.gradient_norm))

    n = d // 4
    x = generator.standard_normal((n, d))
    direction = linear.descending_direction(x, teacher, generator.standard_normal(d))
    expected = linear.projection(x, teacher)
    reach = float(np.linalg.norm(expected))
    aim = 0.05
    for layers in (2, 3):
        case = f"{layers} layers, d={d}, n={n}"
        row = partial(figure_row, {**base, "part": "deep-linear students", "case": case, "axis": "|w(0)|"})
        norms = (*_STARTS, linear.start_norm_for(aim, _TEACHER_NORM, layers))
        starts = [linear.balanced_start(direction, norm, layers, d) for norm in norms]
        run = linear.deep_linear_student(x, teacher, [np.stack(factors) for factors in zip(*starts, strict=True)])
        for norm, w in zip(norms, run.w, strict=True):
            before = linear.conserved_quantity(x, norm * direction / np.linalg.norm(direction), layers)
            away = linear.deep_distance(before, reach, layers)
            kept, distance = linear.conserved_quantity(x, w, layers), np.linalg.norm(w - expected)
            at = f"{norm:.3g}"
            by = "the conserved quantity of the start"
            rows.append(row(at, "conserved", kept, relation="=", expected=before, slack=1e-3 * before, source=by))
            by = "root of the equation in `deep_distance`"
            rows.append(row(at, "distance", distance, relation="=", expected=away, slack=1e-3 * away, source=by))
            if norm == norms[-1]:
                by = "guaranteed by `start_norm_for`"
                rows.append(row(at, "distance, guaranteed", distance, relation="<=", expected=aim, slack=0, source=by))
    return rows


def _risk_rows(
    base: Row, law: linear.Law, d: int, sizes: Sequence[int], points: int, generator: np.random.Generator
) -> list[Row]:
    repeats, teacher = base["repeats"], np.eye(d)[0]
    soft, hard = np.empty((repeats, len(sizes), d)), np.empty((repeats, len(sizes), d))
    wrong = np.empty((repeats, 2 * len(sizes)))
    for repeat in range(repeats):
        x = law.sample(generator, (max(sizes),), d)  # [n_max, d]
        for i, n in enumerate(sizes):
            soft[repeat, i] = linear.distilled_student(x[:n], teacher)
            hard[repeat, i] = linear.hard_label_student(x[:n], np.sign(x[:n, 0]))
        students = np.concatenate([soft[repeat], hard[repeat]])  # [2 sizes, d]
        wrong[repeat] = linear.transfer_risk(students, teacher, law.sample(generator, (points,), d))
    angles = linear.angle(soft, teacher)  # [R, sizes]
    risk, hard_risk = law.risk(angles, d), law.risk(linear.angle(hard, teacher), d)

    row = partial(figure_row, {**base, "part": "risk", "axis": "n"})
    rows = []
    for i, n in enumerate(sizes):
        closed: Row = {}
        if isinstance(law, linear.Isotropic):
            closed = {
                "relation": "=",
                "expected": linear.isotropic_risk(n, d),
                "source": "mean angle to a random subspace, over pi",
            }
        rows.append(row(n, "E R", risk[:, i], **closed))
        bound = linear.risk_bound(lambda t: law.tail(t, d), n, d)
        by = "inf over b of p(b) + p(pi/2 - b)^n; 0 from n = d on"
        rows.append(row(n, "E R against the bound", risk[:, i], relation="<=", expected=bound, source=by))
        if isinstance(law, linear.AngleLaw) and n < d:
            if law.margin > 0:
                bound, by = linear.margin_bound(lambda t: law.tail(t, d), law.margin, n), "p(margin)^n"
            else:
                bound, by = linear.polynomial_bound(law.k, n), "(1 + (ln n)^k) / n^k"
            rows.append(row(n, "E R against the corollary", risk[:, i], relation="<=", expected=bound, source=by))
        if isinstance(law, linear.Isotropic):
            by = "n/d, at most 1"
            cos2 = np.cos(angles[:, i]) ** 2
            rows.append(row(n, "E cos^2", cos2, relation="=", expected=min(n / d, 1), source=by))
            limit = linear.isotropic_hard_label_risk(n, d)
            by = "limit for large n and d; none at hand for this d"
            rows.append(row(n, "E R, hard labels", hard_risk[:, i], relation="about", expected=limit, source=by))
        else:
            rows.append(row(n, "E R, hard labels", hard_risk[:, i]))
        for name, counted, exact in (
            ("on test inputs", wrong[:, i], risk[:, i]),
            ("on test inputs, hard labels", wrong[:, len(sizes) + i], hard_risk[:, i]),
        ):
            rows.append(row(n, name, counted.mean(), **_counted(exact, points), source="risk at the students' angles"))
    row = partial(figure_row, {**base, "part": "monotone", "axis": "n"})
    below = [i for i, n in enumerate(sizes) if n <= d]
    if len(below) > 1:
        rises = np.diff(angles[:, below], axis=1)  # [R, steps]
        span = f"{sizes[below[0]]}..{sizes[below[-1]]}"
        by = f"none: a larger span is nearer; of {rises.size} steps between sizes of one set"
        rows.append(
            row(
                span,
                "steps where the angle rises",
                float((rises > 1e-12).sum()),
                relation="=",
                expected=0.0,
                slack=0,
                source=by,
            )
        )
        falls = np.diff(risk[:, below], axis=1)
        worst = int(falls.mean(axis=0).argmax())
        by = "the expected risk falls with n; of the steps between sizes the one with the greatest change"
        rows.append(row(span, "greatest change of E R", falls[:, worst], relation="<=", expected=0.0, source=by))
    return rows


def _perturbation_rows(base: Row, law: linear.Law, d: int, points: int, generator: np.random.Generator) -> list[Row]:
    n, repeats, teacher = max(1, d // 5), base["repeats"], np.eye(d)[0]
    x = law.sample(generator, (repeats, n), d)  # [R, n, d]
    student = linear.distilled_student(x, teacher)  # [R, d]
    length = np.linalg.norm(student, axis=-1, keepdims=True)
    aside = linear.null_space_direction(x, teacher, generator)
    moved = np.stack([student + delta * length * aside for delta in _DELTAS], axis=1)  # [R, deltas, d]
    cos = np.cos(linear.angle(student, teacher))  # [R]
    wrong = np.stack(
        [linear.transfer_risk(w, teacher, law.sample(generator, (points,), d)) for w in moved]
    )  # [R, deltas]
    row = partial(figure_row, {**base, "part": "perturbation", "case": f"{base['case']}, n={n}", "axis": "delta"})
    rows = []
    for i, delta in enumerate(_DELTAS):
        loss = linear.distillation_loss(x, teacher, moved[:, i])
        by = "0 for every delta; the greatest over the repeats"
        rows.append(row(delta, "loss", float(np.abs(loss).max()), relation="=", expected=0.0, source=by))
        exact = law.risk(np.arccos(cos / math.sqrt(1 + delta**2)), d)
        by = "risk at the angle of cosine cos a / sqrt(1 + delta^2)"
        rows.append(row(delta, "risk on test inputs", wrong[:, i].mean(), **_counted(exact, points), source=by))
    return rows


def _counted(exact: np.ndarray, points: int) -> Row:
    """What the mean share of wrong test inputs is held to, for students of risks `exact` [repeats].

    Two inputs are the resolution.
    """
    error = math.sqrt(float(np.sum(exact * (1 - exact)) / points)) / len(exact)
    return {"relation": "=", "expected": float(exact.mean()), "error": error, "slack": 2 / (points * len(exact))}
