"""`ijckd-fast study finite`: learners that see more or less of the teacher, on finite domains."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from ijckd_fast.commands import Arguments, Outcome

SUMMARY = "What one label, its probability, and all probabilities of a teacher are worth."
DESCRIPTION = (
    "Four learners that see hard labels (CE_sgl), the teacher's probability of the label drawn (CE_ptl, SEL_ptl) or "
    "all its probabilities (CE_ful): mean risk over the number of samples, slopes, and closed forms beside them "
    "(docs/theory.md). Writes report.md, study.csv and two plots. Where standard output is no terminal, its last line "
    "is one JSON object."
)


def add_arguments(parser: ArgumentParser) -> None:
    """Where to, the problems and their sizes."""
    parser.add_argument("--output", type=str, default="runs/study-finite", help="folder for the report")
    parser.add_argument(
        "--instances",
        type=list[int],
        default=[0, 1, 2, 3],
        help="problems: 0 fixed; 1, 2, 3 hard for CE_sgl, SEL_ptl, CE_ful",
    )
    parser.add_argument("--inputs", type=int, help="S; default: 100 and 1 for instance 0, 10 for the others")
    parser.add_argument(
        "--labels", type=int, help="A; default: 25 and 100 for instance 0, 10 for 1, 11 for 2 and 3, which need it odd"
    )
    parser.add_argument(
        "--sizes",
        type=list[int] | None,
        help="numbers of samples, n, as 1000,5000; default: nine from 1e3 to 1e5, for instance 0 seven from 1e2 on",
    )
    parser.add_argument(
        "--repeats", type=int, default=4000, help="draws for each n, at least 10; the paper took 64,000"
    )
    parser.add_argument("--curve-repeats", type=int, default=100, help="draws for each n of instance 0, at least 10")
    parser.add_argument("--seed", type=int, default=0, help="of every draw")


def run(args: Arguments) -> Outcome:
    """Measures and reports; a row for each figure."""
    from rich.console import Console

    from ijckd_fast.theory import study_finite

    rows = study_finite(
        Path(args.output),
        instances=args.instances,
        inputs=args.inputs,
        labels=args.labels,
        sizes=args.sizes,
        repeats=args.repeats,
        curve_repeats=args.curve_repeats,
        seed=args.seed,
        console=Console(),
    )
    return Outcome(rows)
