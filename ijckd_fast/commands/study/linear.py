"""`ijckd-fast study linear`: a linear teacher distilled into linear and deep-linear students."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from ijckd_fast.commands import Arguments, Outcome

SUMMARY = "A linear teacher distilled into linear and deep-linear students."
DESCRIPTION = (
    "A linear student distilled from a linear teacher's soft labels, against one trained on hard labels: risk over "
    "the number of training inputs beside closed forms and bounds, gradient descent, deep-linear students, steps "
    "outside the inputs' span (docs/theory.md). Writes report.md, study.csv and two plots. Where standard output is "
    "no terminal, its last line is one JSON object."
)


def add_arguments(parser: ArgumentParser) -> None:
    """Where to, the inputs and their numbers."""
    from ijckd_fast.theory import LAWS

    parser.add_argument("--output", type=str, default="runs/study-linear", help="folder for the report")
    parser.add_argument("--dimension", type=int, default=100, help="of the inputs, d")
    parser.add_argument(
        "--sizes",
        type=list[int] | None,
        help="numbers of training inputs, n, as 10,50,90; default: 13 from d/100 to 2d",
    )
    parser.add_argument(
        "--laws",
        type=str,
        default=LAWS,
        help="of the inputs, separated by commas: isotropic; angle:K[:MARGIN], whose acute angle t to the teacher has "
        "P[t >= a] = (1 - a/(pi/2 - MARGIN))^K, radians",
    )
    parser.add_argument("--repeats", type=int, default=200, help="training sets per law, at least 10")
    parser.add_argument("--points", type=int, default=2000, help="fresh test inputs for each training set")
    parser.add_argument("--gradient-dimension", type=int, default=20, help="d of the runs by gradient descent")
    parser.add_argument(
        "--gradient-sizes",
        type=list[int],
        default=[5, 15, 40],
        help="their n; n = d is refused, because gradient descent does not end there",
    )
    parser.add_argument("--seed", type=int, default=0, help="of every draw")


def run(args: Arguments) -> Outcome:
    """Measures and reports; a row for each figure."""
    from rich.console import Console

    from ijckd_fast.theory import study_linear

    rows = study_linear(
        Path(args.output),
        dimension=args.dimension,
        sizes=args.sizes,
        laws=args.laws,
        repeats=args.repeats,
        points=args.points,
        gradient_dimension=args.gradient_dimension,
        gradient_sizes=args.gradient_sizes,
        seed=args.seed,
        console=Console(),
    )
    return Outcome(rows)
