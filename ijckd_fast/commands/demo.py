"""`ijckd-fast demo`: the methods side by side on digits."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from ijckd_fast.commands import Arguments, Outcome

SUMMARY = "A teacher and one student by five methods, on digits, in a few minutes."
DESCRIPTION = (
    "Writes the digits as JPEG files, trains a teacher, then the same small student by several methods, several seeds "
    "each. Runs that are there already are used again. Where standard output is no terminal, its last line is one "
    "JSON object."
)
STOPPED = ", finished runs are kept, and every checkpoint: the same command continues where it stopped"


def add_arguments(parser: ArgumentParser) -> None:
    """Where to, and how much of it."""
    parser.add_argument(
        "--output", type=str, default="runs/demo", help="folder for the images, the runs and the report"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs per method")
    parser.add_argument("--methods", type=str, default="ce,kd,srrl,simkd,ijckd", help="objectives, separated by commas")


def run(args: Arguments) -> Outcome:
    """Trains what is missing and reports; a row for each method."""
    from rich.console import Console

    from ijckd_fast.compare import run_demo

    methods = [name.strip() for name in args.methods.split(",") if name.strip()]
    return Outcome(run_demo(Path(args.output), seeds=args.seeds, methods=methods, console=Console()))
