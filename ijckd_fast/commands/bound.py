"""`ijckd-fast bound`: upper bounds on a student's error, measured image by image, and what to change."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser

from ijckd_fast import files
from ijckd_fast.commands import Arguments, Outcome
from ijckd_fast.commands.options import add_run, load
from ijckd_fast.errors import UserError
from ijckd_fast.train.config import FOLDER_FIELDS

if TYPE_CHECKING:
    from ijckd_fast.data import Index
    from ijckd_fast.evaluate import Evaluation, Geometry
    from ijckd_fast.train import LoadedRun

SUMMARY = "Upper bounds on a student's error, what dominates them, what to change."
DESCRIPTION = (
    "How far a trained student is from its teacher, in terms that bound its error through the teacher's classifier: "
    "the teacher's error, their disagreement, the margin form and the norm form. Beside them the distances of "
    "features and logits, the share of them that the classifier does not see, calibration, and each class. Says what "
    "dominates and what to change (docs/bound.md). For runs with a connector: ijckd, ijckd-pooled, srrl, simkd, srd. "
    "Writes bound.md, bound.json, bound.csv and bound.png (bound-train.* for the training images). Where standard "
    "output is no terminal, its last line is one JSON object."
)


def add_arguments(parser: ArgumentParser) -> None:
    """The run, the images, and where to write."""
    add_run(
        parser,
        "data_dir", *FOLDER_FIELDS,
        "teacher_checkpoint", "teacher_weights", "batch_size", "workers", "data_backend",
        "device",
        data_dir="folder with {train,val}/<class>/*; default: the run's",
        teacher_checkpoint=(
            "where the teacher's weights are now, if they were moved; needed for a run that was trained from a cache"
        ),
    )  # fmt: skip
    parser.add_argument(
        "--split",
        type=Literal["val", "train"],
        default="val",
        help="images to measure on; train: those the run was trained on, with their labels, in the evaluation's view",
    )
    parser.add_argument("--output", type=str, help="folder for what is written; default: the run's folder")


def run(args: Arguments) -> Outcome:
    """Measures the bound and writes its report; rows: the overall one, then one for each class."""
    run = load(args)

    from ijckd_fast.evaluate import BoundMeter, evaluate, write_bound
    from ijckd_fast.train import trained_on

    _refuse_without_features(run, args.split)
    folder = run.path.parent if args.output is None else Path(args.output)
    files.require_writable(folder, "--output")
    index = run.index(args.split)
    if args.split == "train":
        index = trained_on(run.config, index)
    meter = BoundMeter(run.distiller)
    with run.loader(index) as loader:
        result = evaluate(meter.predict, loader, device=run.device, amp_dtype=run.amp_dtype, note=meter.note)
    about = _about(run, args.split, index, result, meter.geometry)
    rows, advice = write_bound(folder, meter.take(), index.classes, about, run.distiller.objective)
    _show(run, index, rows[0], advice, folder)
    return Outcome(rows)


def _refuse_without_features(run: LoadedRun, split: str) -> None:
    """UserError for a run of which the student's and the teacher's features cannot be compared."""
    begun = run.saved.config
    if begun["connector"] == "none":
        raise UserError(
            f"{run.path} was trained by {begun['objective']} without a connector: expected a run with one (ijckd, "
            "ijckd-pooled, srrl, simkd, or --connector), since the bound compares the student's connected features "
            "with the teacher's"
        )
    if run.config.connector == "none":  # the run is loaded without its teacher
        raise UserError(
            f"the bound compares the student of {run.path} with its teacher {begun['teacher']}, whose weights are not "
            "there: give --teacher-checkpoint with their file"
        )
    if run.config.teacher_cache is not None:
        raise UserError(
            f"{run.path} was trained from the teacher cache {run.config.teacher_cache}, which has the teacher's "
            f"features of views of the training images, not of the {split} images in the evaluation's view: give "
            f"--teacher-checkpoint with the weights of {run.config.teacher}, and the teacher itself is asked"
        )


def _about(run: LoadedRun, split: str, index: Index, result: Evaluation, geometry: Geometry) -> dict[str, Any]:
    """What was measured, as the report states it."""
    config = run.config
    return {
        "checkpoint": str(run.path),
        "step": run.saved.step,
        "split": split,
        "data": config.data_dir,
        "student": config.student,
        "teacher": config.teacher,
        "objective": config.objective,
        "connector": config.connector,
        "answers_through": config.infer_head,
        "evaluated_error_percent": 100 - result.top1,
        "unreadable": len(index) - result.images,
        "classes": index.num_classes,
        "channels": geometry.weight.shape[1],
        "rank": geometry.rank,
        "widest_class_distance": geometry.widest,
        "seconds": result.seconds,
    }


def _show(run: LoadedRun, index: Index, overall: dict[str, Any], advice: list[str], folder: Path) -> None:
    from rich.console import Console

    from ijckd_fast.console import say
    from ijckd_fast.evaluate import bound_stem, bound_table, chain_line

    console, config, split = Console(), run.config, overall["split"]
    console.print(bound_table(overall))
    left_out = f" ({overall['unreadable']} more could not be read)" if overall["unreadable"] else ""
    lines = [
        (
            f"{run.path} (step {run.saved.step}): {config.student} by {config.objective}, {split} images of "
            f"{index.root}{left_out}"
        ),
        "% of the images: student wrong <= teacher wrong + disagreement <= ... + margin form <= ... + norm form",
        chain_line(overall),
    ]
    if config.infer_head == "student":
        own = overall["own_head_error_percent"]
        lines.append(
            f"this student answers through its own classifier ({own:.2f} % wrong); the chain is about its answers "
            "through the teacher's"
        )
    lines += [f"- {sentence}" for sentence in advice]
    lines.append(f"every figure, class by class, and plots: {folder / bound_stem(split)}.md, .csv, .json, .png")
    for line in lines:
        say(console, line)
