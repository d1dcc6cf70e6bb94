"""`ijckd-fast study finite`: what finite.py predicts, measured on random draws, each figure beside its closed form."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ijckd_fast import files
from ijckd_fast.errors import UserError
from ijckd_fast.theory import finite
from ijckd_fast.theory.figures import Row, check_sizes, figure_row
from ijckd_fast.theory.plots import plot_learners
from ijckd_fast.theory.report import print_table, write_csv, write_study

if TYPE_CHECKING:
    from rich.console import Console

SLOPE_FROM = 1000  # samples: slopes are taken from here on, as in arXiv 2310.07838
EXPONENTS = {(1, "CE_sgl"): -0.5, (2, "SEL_ptl"): -1.0, (3, "CE_ful"): -1.0}


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
    """Measures the four learners of finite.py; writes study.csv, curves.png, slopes.png and report.md to `output`.

    instances       some of 0, 1, 2, 3, as `finite.make_instance` makes them
    inputs, labels  S and A; default: (100, 25) and (1, 100) for instance 0, (10, 10) for 1, (10, 11) for 2 and 3
    sizes           n; default: nine from 1e3 to 1e5, from 1e2 on for instance 0. Slopes are taken from n = 1000 on
    repeats         draws for each n; curve_repeats: the same for instance 0
    returns         rows as `study_linear`
    """
    for option, given in (("--repeats", repeats), ("--curve-repeats", curve_repeats)):
        check_sizes([1] if sizes is None else sizes, given, seed, option)
    if not instances:
        raise UserError("--instances names none: expected some of 0, 1, 2, 3")
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
            finite.make_instance(*shape, n)  # so that a mistake is reported before anything is drawn

    with files.lock(output, "--output"):
        rows: list[Row] = []
        for shape, ns in taken.items():
            many = curve_repeats if shape[0] == 0 else repeats
            found = _finite_rows(shape, ns, many, seed)
            rows += found
            case = found[0]["case"]
            print_table(console, f"risk, {case}", [row for row in found if row["part"] == "risk"])
            slopes = [row for row in found if row["part"] == "slope"]
            if slopes:
                print_table(console, f"slopes of log risk over log n, {case}", slopes)
        write_csv(output, rows)
        plots = []
        for name, numbers in (("curves.png", (0,)), ("slopes.png", (1, 2, 3))):
            cases = [row["case"] for row in rows if int(row["case"].split(",")[0].split()[1]) in numbers]
            if cases:
                plot_learners(output / name, rows, list(dict.fromkeys(cases)))
                plots.append(name)
        write_study(
            output,
            rows,
            console,
            "Knowledge transfer over finite domains",
            f"""Four learners on tables of counts (arXiv 2310.07838): CE_sgl sees hard labels (level 1), CE_ptl and
SEL_ptl the teacher's probability of the label drawn (level 2), CE_ful the teacher's whole distribution (level 3).
{repeats:,} draws for each n ({curve_repeats:,} for instance 0), seed {seed}. Instances 1, 2 and 3 are made to be hard
for CE_sgl, SEL_ptl and CE_ful in turn, and change with n: there the risk falls as n^-1/2, n^-1 and n^-1 at best. An
input never drawn gets the uniform distribution; what SEL_ptl leaves open is spread evenly over the labels not seen. A
slope is missing where a risk is 0 within rounding, or where fewer than two sizes are {SLOPE_FROM:,} or more.""",
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
        row = partial(figure_row, {**common, "part": "risk", "axis": "n"}, n)
        by = "exact mean"
        rows.append(row("CE_sgl", found["CE_sgl"], relation="=", expected=exact["CE_sgl"][-1], source=by))
        held: Row = {}
        if number == 0:  # S/n: more than is left of the way to the limit once each input is drawn some hundred times
            relation, bias = "=" if n >= 100 * S else "about", finite.ce_ptl_bias(instance)
            held = {"relation": relation, "expected": bias, "slack": S / n, "source": "limit for large n, of pi*^2"}
        rows.append(row("CE_ptl", found["CE_ptl"], **held))
        if number == 2:
            expected, by = finite.sel_ptl_risk_on_instance_2(S, A, n), "mean but for a share of A/n"
            rows.append(
                row("SEL_ptl", found["SEL_ptl"], relation="=", expected=expected, slack=expected * A / n, source=by)
            )
        else:
            expected, by = finite.missing_mass(instance, n), "mean mass of the pairs not drawn"
            rows.append(row("SEL_ptl", found["SEL_ptl"], relation="<=", expected=expected, source=by))
        held = {
            "expected": exact["CE_ful"][-1],
            "error": finite.ce_ful_error(instance, n, repeats),
            "source": "exact mean",
        }
        rows.append(row("CE_ful", found["CE_ful"], relation="=", **held))
    if number == 0:
        return rows

    taken = [i for i, n in enumerate(sizes) if n >= SLOPE_FROM]
    if len(taken) < 2:
        return rows
    ns = np.array(sizes, dtype=np.float64)[taken]
    slopes: list[Row] = []
    span = f"{sizes[taken[0]]}..{sizes[taken[-1]]}"
    row = partial(figure_row, {**common, "part": "slope", "axis": "n"}, span)
    for name in finite.LEARNERS:
        of_learner = [made for made in rows if made["quantity"] == name]
        means = np.array([of_learner[i]["measured"] for i in taken])
        errors = np.array([of_learner[i]["standard_error"] for i in taken])
        if means.min() <= 1e-14 or (errors > means / 4).any():
            continue  # 0 within rounding, or events too rare for a logarithm
        fitted, error = finite.slope(ns, means, errors)
        held = {}
        if (number, name) in EXPONENTS:
            by = "exponent of the minimax rate"
            held = {"relation": "=", "expected": EXPONENTS[number, name], "slack": 0.03, "source": by}
        slopes.append(row(name, fitted, error=error, **held))
        if name in exact:
            closed = finite.slope(ns, np.array(exact[name])[taken], np.zeros(len(taken)))[0]
            held = {"relation": "=", "expected": closed, "source": "slope of the exact means"}
            slopes.append(row(f"{name}, exact", fitted, error=error, **held))
    return rows + slopes
