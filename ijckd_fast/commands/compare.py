"""`ijckd-fast compare`: methods and regimes on one dataset, with intervals."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from ijckd_fast.commands import Arguments, Outcome

SUMMARY = "Several methods in several regimes on one dataset, several seeds each, with intervals."
DESCRIPTION = (
    "Trains every method of a comparison in each of its regimes, seeds 0 ... N - 1, by the same loop, schedule and "
    "plan: a seed gives all methods the same images, crops and order. Reports mean, deviation and the differences "
    "seed by seed with 95 % intervals. Runs that are in the output folder already, with the same settings, code, "
    "images and teacher, are used again, an interrupted one is continued; others there are replaced. Exit code 1, and "
    "their names, if runs failed. Where standard output is no terminal, its last line is one JSON object."
)
STOPPED = ", finished runs are kept, and every checkpoint: the same command continues where it stopped"


def add_arguments(parser: ArgumentParser) -> None:
    """The comparison, where to, and how much at a time."""
    from ijckd_fast.train.config import COMPARISONS, preset_names

    parser.add_argument(
        "--config",
        type=str,
        required=True,
        help=f"YAML file (docs/compare.md), or a packaged comparison: {', '.join(preset_names(COMPARISONS))}",
    )
    parser.add_argument(
        "--output", type=str, help="folder for the runs and the report; default: runs/NAME of the comparison"
    )
    parser.add_argument(
        "--data-dir",
        type=str,
        help="folder with train/<class>/* and val/<class>/* image files; default: the comparison's",
    )
    parser.add_argument(
        "--teacher",
        type=str,
        help=(
            "the run folder, checkpoint or cache:FOLDER of a teacher instead of the comparison's, which is not trained "
            "then; or a preset to train first"
        ),
    )
    parser.add_argument("--seeds", type=int, help="runs of each method in each regime; default: the comparison's")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs side by side, each a process that computes with one thread: the number of cores, or 1",
    )
    parser.add_argument(
        "--any-code",
        action="store_true",
        help=(
            "use runs that another version of ijckd-fast finished or began, too, even one that lacked some settings; "
            "default: they are trained again"
        ),
    )


def run(args: Arguments) -> Outcome:
    """Trains what is missing and reports; a row for each method in each regime."""
    from ijckd_fast.compare import load_comparison, refuse_mistakes

    comparison = load_comparison(args.config, seeds=args.seeds, data_dir=args.data_dir, teacher=args.teacher)
    refuse_mistakes(comparison, args.jobs)

    from rich.console import Console

    from ijckd_fast.compare import comparison_table, train_all, write_comparison_report
    from ijckd_fast.console import say
    from ijckd_fast.train.run_folder import REPORT

    output = Path(args.output or f"runs/{comparison.name}")
    console = Console()
    numbers = {
        "method": len(comparison.methods), "regime": len(comparison.regimes), "seed": comparison.seeds
    }  # fmt: skip
    counts = " x ".join(f"{number} {name}{'' if number == 1 else 's'}" for name, number in numbers.items())
    say(console, f"{comparison.name}: {counts} in {output}")
    outcome = train_all(comparison, output, jobs=args.jobs, any_code=args.any_code, console=console)
    rows = write_comparison_report(output, comparison, outcome)
    uncut = Console(width=max(console.width, 110 + 26 * len(comparison.against)))  # a narrow terminal wraps its lines
    for regime in comparison.regimes:
        uncut.print(comparison_table(regime, [row for row in rows if row["regime"] == regime], comparison.against))
    for name, why in outcome.failed.items():
        say(console, f"failed: {name}: {why}")
    if outcome.failed:
        say(
            console,
            f"{len(outcome.failed)} runs failed; the others are kept: the same command trains only what is missing",
        )
    if rows:
        say(console, f"report: {output / REPORT}")
    return Outcome(rows, 1 if outcome.failed else 0)
