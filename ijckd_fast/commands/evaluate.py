"""`ijckd-fast evaluate`: what a trained net gets right, how often it agrees with its teacher, what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from ijckd_fast.commands import Arguments, Outcome
from ijckd_fast.commands.options import add_run, load
from ijckd_fast.train.config import FOLDER_FIELDS

if TYPE_CHECKING:
    from ijckd_fast.data import Index, Loader
    from ijckd_fast.evaluate import Evaluation
    from ijckd_fast.train import LoadedRun

SUMMARY = "Accuracy, agreement and cost of a trained net."
DESCRIPTION = (
    "Top-1, top-5, agreement with the teacher, images/s and deployed cost of a run on a val/ folder; with --group-by "
    "the same of groups of its images that their names tell apart, a row each behind that of all. Where standard "
    "output is no terminal, its last line is one JSON object."
)


def add_arguments(parser: ArgumentParser) -> None:
    """The run, and what is to be another than it was in training."""
    weights = ("teacher_checkpoint", "teacher_weights", "teacher_cache")
    add_run(parser, "data_dir", *FOLDER_FIELDS, *weights, "batch_size", "workers", "data_backend", "device")
    parser.add_argument(
        "--group-by",
        type=str,
        help="regular expression, searched in each image's path, val/u4e00/klee_regular.png: what its brackets hold is "
        "the image's group; '([^/_]+)_[^/]*$' for the designs of prepare-glyphs; default: no groups",
    )


def run(args: Arguments) -> Outcome:
    """Evaluates a run on val/; one row, and with --group-by one for each group."""
    run = load(args)

    from ijckd_fast.evaluate import by_group, evaluate, groups_of

    index, distiller, config = run.index(), run.distiller, run.config
    groups = None if args.group_by is None else groups_of(index, args.group_by)
    with run.loader(index) as loader:
        teacher = _teacher_on(run, index, loader)
        result = evaluate(distiller.predict, loader, device=run.device, amp_dtype=run.amp_dtype, teacher=teacher)
    params, macs = distiller.deployed_cost(config.image_size)
    left_out = f" ({len(index) - result.images} more could not be read)" if result.images < len(index) else ""
    skipped = f" ({index.skipped:,} more have a negative label and are skipped)" if index.skipped else ""
    print(
        f"{run.path} (step {run.saved.step}): {config.student} by {config.objective} on {result.images} images of "
        f"{index.folder}{left_out}{skipped}"
    )
    against = ""
    if teacher is not None:
        against = f", agreement with the teacher {result.agreement:.2f} % (its own top-1: {teacher.top1:.2f} %)"
    print(f"top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %{against}")
    print(
        f"deployed: {params:,} parameters, {macs:,} multiply-accumulates per image; "
        f"{result.images / result.seconds:,.0f} images/s"
    )
    row = {
        "checkpoint": str(run.path),
        "step": run.saved.step,
        **result.row(),
        "teacher_top1_percent": None if teacher is None else teacher.top1,
        "params": params,
        "macs": macs,
    }
    if groups is None:
        return Outcome([row])
    of_groups = by_group(result, index.labels, *groups, teacher)
    _print_groups(of_groups)
    return Outcome([{"group": None, **row}, *of_groups])


def _print_groups(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("group", "images", "top-1 %", "agreement %", "teacher's top-1 %")
    for row in rows:
        shares = (row[f"{name}_percent"] for name in ("top1", "agreement", "teacher_top1"))
        name = Text(row["group"].encode("utf-8", "backslashreplace").decode())  # of a file: of any bytes, any brackets
        table.add_row(name, f"{row['images']:,}", *("-" if one is None else f"{one:.2f}" for one in shares))
    Console().print(table)


def _teacher_on(run: LoadedRun, index: Index, loader: Loader) -> Evaluation | None:
    """The teacher's answers to the same images, from the cache or its own; None without either."""
    from ijckd_fast.evaluate import evaluate
    from ijckd_fast.train import teacher_view_of

    if run.teacher_cache is not None:
        kept = run.teacher_cache.on_val(index, teacher_view_of(run.config), run.config.data_backend)
        if kept is None:
            print(
                "the cache has the teacher's answers to other images, or with other settings: no agreement; "
                "--teacher-checkpoint brings the teacher itself"
            )
        return kept
    if run.distiller.teacher is None:
        return None
    return evaluate(run.distiller.teacher_logits, loader, device=run.device, amp_dtype=run.amp_dtype)
