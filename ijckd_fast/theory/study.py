"""`ijckd-fast study linear|finite`: what linear.py and finite.py predict, measured on random draws, each figure beside its closed form."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ijckd_fast import files
from ijckd_fast.errors import UserError
from ijckd_fast.theory import finite, linear

if TYPE_CHECKING:
    from rich.console import Console

Row = dict[str, Any]
COLUMNS = (
    "study",
    "part",
    "case",
    "axis",
    "at",
    "quantity",
    "measured",
    "standard_error",
    "relation",
    "expected",
    "allowed",
    "holds",
    "source",
    "repeats",
    "seed",
)
REPORT = "report.md"
MIN_REPEATS = 10
# Of about 200 figures at once some are 3 standard errors off; one of 4 is off in 16,000.
ERRORS_ALLOWED = 4
LAWS = "isotropic,angle:1,angle:3,angle:1:0.2"
_LINEAR_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95, 0.99, 1, 1.2, 2)  # of the dimension
_DELTAS = (0.0, 0.25, 0.5, 1.0, 2.0)
_STARTS = (1e-2, 1e-4, 1e-6)
_TEACHER_NORM = 2.0  # in the gradient runs; elsewhere only its direction counts
SLOPE_FROM = 1000  # samples: slopes are taken from here on, as in arXiv 2310.07838
EXPONENTS = {(1, "CE_sgl"): -0.5, (2, "SEL_ptl"): -1.0, (3, "CE_ful"): -1.0}


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
    """Measures the linear student of linear.py and writes study.csv, risk.png, perturbation.png and report.md to `output`.

    dimension           d of the risk tables, at least 4; teacher along the first axis
    sizes               n, numbers of training inputs, each the first n of one set; default: 1 % to 200 % of d
    laws                of the inputs, separated by commas, as `linear.parse_law` reads them
    repeats, points     training sets per law, and fresh test inputs for each
    gradient_dimension  d of the runs by gradient descent, at least 8
    gradient_sizes      their n, none equal to that d
    returns             rows with the keys COLUMNS. `relation` is what `measured` is held to: `=` or `<=` `expected`, with `allowed` to
                        spare and the verdict in `holds`; `about`: shown beside it, without verdict; empty: nothing to compare with.
                        `standard_error` is that of measured - expected over the draws, null where no chance is involved
    """
    if dimension < 4:
        raise UserError(f"--dimension must be at least 4, got {dimension}")
    if sizes is None:
        sizes = sorted({max(1, round(share * dimension)) for share in _LINEAR_SHARES})
    sizes = _checked(sizes, repeats, seed)
    chosen = [linear.parse_law(text) for text in laws.split(",") if text.strip()]
    if not chosen:
        raise UserError(
            "--laws names no law of inputs: wanted some of isotropic, angle:K, angle:K:MARGIN, separated by commas"
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
        _write_csv(output, rows)
        _plot_risks(output / "risk.png", rows)
        _plot_perturbation(output / "perturbation.png", rows)
        for law in chosen:
            case = f"{law.name}, d={dimension}"
            wanted = ("E R", "E R against the bound", "E R, hard labels")
            shown = [row for row in rows if row["part"] == "risk" and row["case"] == case and row["quantity"] in wanted]
            _print_table(console, f"transfer risk, {case}", shown)
        _report(
            output,
            rows,
            console,
            "Linear distillation",
            f"""A linear teacher distilled into a linear student through soft labels alone (arXiv 2105.13093): {repeats} training
sets per law of inputs, {points:,} fresh test inputs each, seed {seed}. The student is the closed form, which the gradient runs
below confirm; its risk is taken at its angle to the teacher (exact for these laws) and, beside it, counted on the test inputs.
The hard-label student is least squares on sign(w*.x), of least norm where n < d: at n = d it interpolates noise and its risk
peaks, the distilled one's does not. In isotropic data the bound says nothing (1): angles gather at pi/2. `angle:K:MARGIN` are
inputs that keep a margin to the teacher's plane. Moved outside the span of its training inputs (perturbation) a student keeps
its loss and its risk grows: it is the start at 0 that selects a good one among all minima.""",
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
        row = partial(_row, {**base, "part": "gradient descent", "case": f"{name}, d={d}", "axis": "n"})
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
    wanted = linear.projection(x, teacher)
    reach = float(np.linalg.norm(wanted))
    aim = 0.05
    for layers in (2, 3):
        case = f"{layers} layers, d={d}, n={n}"
        row = partial(_row, {**base, "part": "deep-linear students", "case": case, "axis": "|w(0)|"})
        norms = (*_STARTS, linear.start_norm_for(aim, _TEACHER_NORM, layers))
        starts = [linear.balanced_start(direction, norm, layers, d) for norm in norms]
        run = linear.deep_linear_student(x, teacher, [np.stack(factors) for factors in zip(*starts, strict=True)])
        for norm, w in zip(norms, run.w, strict=True):
            before = linear.conserved_quantity(x, norm * direction / np.linalg.norm(direction), layers)
            away = linear.deep_distance(before, reach, layers)
            kept, distance = linear.conserved_quantity(x, w, layers), np.linalg.norm(w - wanted)
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

    row = partial(_row, {**base, "part": "risk", "axis": "n"})
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
    row = partial(_row, {**base, "part": "monotone", "axis": "n"})
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
    row = partial(_row, {**base, "part": "perturbation", "case": f"{base['case']}, n={n}", "axis": "delta"})
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
    """What the mean share of wrong test inputs is held to, for students of risks `exact` [repeats]; two inputs are the resolution."""
    error = math.sqrt(float(np.sum(exact * (1 - exact)) / points)) / len(exact)
    return {"relation": "=", "expected": float(exact.mean()), "error": error, "slack": 2 / (points * len(exact))}


def study_finite(
    output: Path,
    *,
    instances: Sequence[int] = (0, 1, 2, 3),
    inputs: int | None = None,
    labels: int | None = None,
    sizes: Sequence[int] | None = None,
    repeats: int = 4000,
    curve_repeats: int = 100,
    seed: int = 0,
    console: Console,
) -> list[Row]:
    """Measures the four learners of finite.py and writes study.csv, curves.png and slopes.png and report.md to `output`.

    instances       some of 0, 1, 2, 3, as `finite.make_instance` makes them
    inputs, labels  S and A; default: (100, 25) and (1, 100) for instance 0, (10, 10) for 1, (10, 11) for 2 and 3
    sizes           n; default: nine from 1e3 to 1e5, from 1e2 on for instance 0. Slopes are taken from n = 1000 on
    repeats         draws for each n; curve_repeats: the same for instance 0
    returns         rows as `study_linear`
    """
    for option, given in (("--repeats", repeats), ("--curve-repeats", curve_repeats)):
        _checked([1] if sizes is None else sizes, given, seed, option)
    if not instances:
        raise UserError("--instances names none: wanted some of 0, 1, 2, 3")
    shapes = []
    for number in dict.fromkeys(instances):
        if number == 0 and inputs is None and labels is None:
            shapes += [(0, 100, 25), (0, 1, 100)]
        else:
            S, A = (100, 25) if number == 0 else (10, 10) if number == 1 else (10, 11)
            shapes.append((number, S if inputs is None else inputs, A if labels is None else labels))
    taken = {}
    for shape in shapes:
        ns = (
            sizes or np.round(np.logspace(2 if shape[0] == 0 else 3, 5, 7 if shape[0] == 0 else 9)).astype(int).tolist()
        )
        taken[shape] = sorted(set(ns))
        for n in taken[shape]:
            finite.make_instance(*shape, n)  # so that a mistake is told before anything is drawn

    with files.lock(output, "--output"):
        rows: list[Row] = []
        for shape, ns in taken.items():
            many = curve_repeats if shape[0] == 0 else repeats
            found = _finite_rows(shape, ns, many, seed)
            rows += found
            case = found[0]["case"]
            _print_table(console, f"risk, {case}", [row for row in found if row["part"] == "risk"])
            slopes = [row for row in found if row["part"] == "slope"]
            if slopes:
                _print_table(console, f"slopes of log risk over log n, {case}", slopes)
        _write_csv(output, rows)
        plots = []
        for name, numbers in (("curves.png", (0,)), ("slopes.png", (1, 2, 3))):
            cases = [row["case"] for row in rows if int(row["case"].split(",")[0].split()[1]) in numbers]
            if cases:
                _plot_learners(output / name, rows, list(dict.fromkeys(cases)))
                plots.append(name)
        _report(
            output,
            rows,
            console,
            "Knowledge transfer over finite domains",
            f"""Four learners on tables of counts (arXiv 2310.07838): CE_sgl sees hard labels (level 1), CE_ptl and SEL_ptl the
teacher's probability of the label drawn (level 2), CE_ful the teacher's whole distribution (level 3). {repeats:,} draws for each
n ({curve_repeats:,} for instance 0), seed {seed}. Instances 1, 2 and 3 are made to be hard for CE_sgl, SEL_ptl and CE_ful in
turn, and change with n: there the risk falls as n^-1/2, n^-1 and n^-1 at best. An input never drawn gets the uniform
distribution; what SEL_ptl leaves open is spread evenly over the labels not seen. A slope is missing where a risk is 0 within
rounding, or where fewer than two sizes are {SLOPE_FROM:,} or more.""",
            plots,
        )
    return rows


def _finite_rows(shape: tuple[int, int, int], sizes: Sequence[int], repeats: int, seed: int) -> list[Row]:
    number, S, A = shape
    generator = np.random.default_rng([seed, *shape])
    common = {"study": "finite", "case": f"instance {number}, S={S}, A={A}", "repeats": repeats, "seed": seed}
    rows: list[Row] = []
    exact: dict[str, list[float]] = {"CE_sgl": [], "CE_ful": []}
    for n in sizes:
        instance = finite.make_instance(number, S, A, n)
        found = finite.risks(instance, n, repeats, generator)
        exact["CE_sgl"].append(finite.ce_sgl_risk(instance, n))
        exact["CE_ful"].append(finite.ce_ful_risk(instance, n))
        row = partial(_row, {**common, "part": "risk", "axis": "n"}, n)
        by = "exact mean"
        rows.append(row("CE_sgl", found["CE_sgl"], relation="=", expected=exact["CE_sgl"][-1], source=by))
        told: Row = {}
        if number == 0:  # S/n: more than is left of the way to the limit once each input is drawn some hundred times
            relation, bias = "=" if n >= 100 * S else "about", finite.ce_ptl_bias(instance)
            told = {"relation": relation, "expected": bias, "slack": S / n, "source": "limit for large n, of pi*^2"}
        rows.append(row("CE_ptl", found["CE_ptl"], **told))
        if number == 2:
            wanted, by = finite.sel_ptl_risk_on_instance_2(S, A, n), "mean but for a share of A/n"
            rows.append(
                row("SEL_ptl", found["SEL_ptl"], relation="=", expected=wanted, slack=wanted * A / n, source=by)
            )
        else:
            wanted, by = finite.missing_mass(instance, n), "mean mass of the pairs not drawn"
            rows.append(row("SEL_ptl", found["SEL_ptl"], relation="<=", expected=wanted, source=by))
        told = {
            "expected": exact["CE_ful"][-1],
            "error": finite.ce_ful_error(instance, n, repeats),
            "source": "exact mean",
        }
        rows.append(row("CE_ful", found["CE_ful"], relation="=", **told))
    if number == 0:
        return rows

    taken = [i for i, n in enumerate(sizes) if n >= SLOPE_FROM]
    if len(taken) < 2:
        return rows
    ns = np.array(sizes, dtype=np.float64)[taken]
    slopes: list[Row] = []
    span = f"{sizes[taken[0]]}..{sizes[taken[-1]]}"
    row = partial(_row, {**common, "part": "slope", "axis": "n"}, span)
    for name in finite.LEARNERS:
        of_learner = [made for made in rows if made["quantity"] == name]
        means = np.array([of_learner[i]["measured"] for i in taken])
        errors = np.array([of_learner[i]["standard_error"] for i in taken])
        if means.min() <= 1e-14 or (errors > means / 4).any():
            continue  # 0 within rounding, or events too rare for a logarithm
        fitted, error = finite.slope(ns, means, errors)
        told = {}
        if (number, name) in EXPONENTS:
            by = "exponent of the minimax rate"
            told = {"relation": "=", "expected": EXPONENTS[number, name], "slack": 0.03, "source": by}
        slopes.append(row(name, fitted, error=error, **told))
        if name in exact:
            closed = finite.slope(ns, np.array(exact[name])[taken], np.zeros(len(taken)))[0]
            told = {"relation": "=", "expected": closed, "source": "slope of the exact means"}
            slopes.append(row(f"{name}, exact", fitted, error=error, **told))
    return rows + slopes


# ---- What both write ----


def _checked(sizes: Sequence[int], repeats: int, seed: int, option: str = "--repeats") -> list[int]:
    if not sizes or min(sizes) < 1:
        raise UserError(f"--sizes must be numbers of 1 or more, got {list(sizes)}")
    if repeats < MIN_REPEATS:
        raise UserError(
            f"{option} must be at least {MIN_REPEATS} for a standard error to hold the figures to, got {repeats}"
        )
    if seed < 0:
        raise UserError(f"--seed must be 0 or more, got {seed}")
    return sorted(set(sizes))


def _error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _row(
    base: Row,
    at: Any,
    quantity: str,
    measured: Any,
    *,
    relation: str = "",
    expected: float | None = None,
    error: float = 0.0,
    slack: float = 1e-12,
    source: str = "",
) -> Row:
    """One figure, with its verdict where it has a relation to something expected.

    measured  a number, or one per repeat, whose mean and standard error are taken
    error     standard error of measured - expected; the greater of this and of that taken counts
    slack     may be added to the errors allowed: how far off the expected value is known to be, by default a rounding
    """
    values = np.asarray(measured, dtype=np.float64)
    if values.ndim:
        error = max(error, _error(values))
    mean = float(values.mean())
    allowed = holds = None
    if relation in ("=", "<="):
        allowed = ERRORS_ALLOWED * error + slack
        off = mean - float(expected or 0)
        holds = bool((off if relation == "<=" else abs(off)) <= allowed)
    row = {
        **base,
        "at": at,
        "quantity": quantity,
        "measured": mean,
        "standard_error": error if values.ndim or error else None,
        "relation": relation,
        "expected": expected,
        "allowed": allowed,
        "holds": holds,
        "source": source,
    }
    return {column: row[column] for column in COLUMNS}


def _groups(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["part"], row["case"]), []).append(row)
    return groups


def _pivot(rows: Sequence[Row], separator: str) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of a table of one group: a line for each `at`, a column for each quantity."""
    quantities = list(dict.fromkeys(row["quantity"] for row in rows))
    lines: dict[Any, dict[str, str]] = {}
    for i, row in enumerate(rows):
        again = any((row["at"], row["measured"]) == (other["at"], other["measured"]) for other in rows[:i])
        lines.setdefault(row["at"], {})[row["quantity"]] = _cell(row, separator, bare=again and row["relation"] == "<=")
    return [rows[0]["axis"], *quantities], [
        [str(at), *(cells.get(q, "") for q in quantities)] for at, cells in lines.items()
    ]


def _cell(row: Row, separator: str, bare: bool = False) -> str:
    """Figure, error and what it is held to; bare: the last alone, where a column on the left shows the others."""
    text = "" if bare else f"{row['measured']:.4g}"
    if row["standard_error"] is not None and not bare:
        text += f" ± {row['standard_error']:.1g}"
    if row["relation"]:
        sign = {"=": "=", "<=": "≤", "about": "~"}[row["relation"]]
        text += f"{'' if bare else separator}{sign} {row['expected']:.4g}"
    return text + (" !" if row["holds"] is False else "")


def _print_table(console: Console, title: str, rows: Sequence[Row]) -> None:
    from rich.table import Table

    heads, lines = _pivot(rows, "\n")
    table = Table(*heads, title=title)
    for line in lines:
        table.add_row(*line)
    console.print(table)


def _verdict(rows: Iterable[Row]) -> str:
    judged = [row for row in rows if row["holds"] is not None]
    missed = [row for row in judged if not row["holds"]]
    text = f"{len(judged) - len(missed)} of {len(judged)} figures that have something to be held to are within what is allowed"
    for row in missed:
        text += (
            f"\n- not: {row['part']}, {row['case']}, {row['axis']} = {row['at']}: {row['quantity']} {_cell(row, ' ')}"
        )
    return text


def _write_csv(output: Path, rows: Iterable[Row]) -> None:
    with open(output / "study.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def _report(output: Path, rows: Sequence[Row], console: Console, title: str, text: str, plots: Iterable[str]) -> None:
    from ijckd_fast.console import say

    parts = [f"# {title}", text, "".join(f"![{Path(name).stem}]({name}) " for name in plots).rstrip()]
    parts.append(
        f"""A figure is followed by its standard error (±), where chance is involved, and by what it is held to: `=`, `≤`, or
`~` where that is only near; one that stands in a column on the left is not repeated. It is allowed {ERRORS_ALLOWED} standard errors
of the difference, and what the expected value itself is known to be off (`allowed` in study.csv); `!` marks one that is farther
off. {_verdict(rows)}."""
    )
    for (part, case), group in _groups(rows).items():
        heads, lines = _pivot(group, " ")
        table = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in (heads, *lines)]
        table.insert(1, "|---" * len(heads) + "|")
        sources = dict.fromkeys((row["quantity"], row["source"]) for row in group if row["source"])
        notes = "; ".join(f"{quantity}: {source}" for quantity, source in sources)
        parts += [f"## {part[0].upper()}{part[1:]}: {case}", "\n".join(table)] + (
            [f"Held to: {notes}."] if notes else []
        )
    parts.append("Every figure, with what it is held to and why: `study.csv`.")
    files.write_text(output / REPORT, "\n\n".join(parts) + "\n")
    for line in _verdict(rows).splitlines():
        say(console, line)
    say(console, f"report: {output / REPORT}")


def _series(
    rows: Iterable[Row], part: str, case: str, quantity: str, key: str = "measured"
) -> tuple[list[Any], list[Any]]:
    found = [row for row in rows if (row["part"], row["case"], row["quantity"]) == (part, case, quantity)]
    return [row["at"] for row in found], [row[key] for row in found]


def _plot_risks(path: Path, rows: Sequence[Row]) -> None:
    from ijckd_fast.plots import figure

    cases = [case for part, case in _groups(rows) if part == "risk"]
    drawing, axes = figure(2, (len(cases) + 1) // 2)
    for ax, case in zip(axes.flat, cases, strict=False):
        ax.plot(*_series(rows, "risk", case, "E R"), marker=".", label="distilled")
        ax.plot(*_series(rows, "risk", case, "E R, hard labels"), marker=".", label="hard labels")
        ax.plot(
            *_series(rows, "risk", case, "E R against the bound", "expected"), color="gray", label="bound, distilled"
        )
        ax.set(title=case, xlabel="n", ylabel="transfer risk")
        if not case.startswith("isotropic"):
            ax.set_yscale("symlog", linthresh=1e-4)
        ax.set_ylim(bottom=0)
        ax.legend(fontsize="small")
    for ax in axes.flat[len(cases) :]:
        ax.axis("off")
    drawing.savefig(path, dpi=150)


def _plot_perturbation(path: Path, rows: Sequence[Row]) -> None:
    from ijckd_fast.plots import figure

    drawing, ((ax,),) = figure(1)
    for number, case in enumerate(case for part, case in _groups(rows) if part == "perturbation"):
        ax.plot(*_series(rows, "perturbation", case, "risk on test inputs"), "o", markersize=4, color=f"C{number}")
        closed = _series(rows, "perturbation", case, "risk on test inputs", "expected")
        ax.plot(*closed, linewidth=1, color=f"C{number}", label=case)
    ax.set(xlabel="delta: length of the step outside the span over |w|", ylabel="transfer risk", ylim=(0, None))
    ax.legend(fontsize="small")
    drawing.savefig(path, dpi=150)


def _plot_learners(path: Path, rows: Sequence[Row], cases: Sequence[str]) -> None:
    from ijckd_fast.plots import figure

    drawing, axes = figure(len(cases))
    for ax, case in zip(axes.flat, cases, strict=True):
        for number, name in enumerate(finite.LEARNERS):
            for key, style in (("measured", "o-"), ("expected", ":")):
                at, values = _series(rows, "risk", case, name, key)
                shown = [(n, value) for n, value in zip(at, values, strict=True) if value is not None and value > 1e-14]
                if shown and (key == "measured" or name in ("CE_sgl", "CE_ful")):
                    label = name if key == "measured" else None
                    ax.plot(
                        *zip(*shown, strict=True), style, markersize=3, linewidth=1, color=f"C{number}", label=label
                    )
        ax.set(title=case, xlabel="n", ylabel="risk", xscale="log", yscale="log")
        ax.legend(fontsize="small")
    drawing.savefig(path, dpi=150)
