"""`ijckd-fast export`: files to deploy a trained net with."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from jsonargparse import ActionYesNo, ArgumentParser

from ijckd_fast.commands import Arguments, Outcome
from ijckd_fast.commands.options import add_run, load
from ijckd_fast.errors import UserError
from ijckd_fast.train.config import FOLDER_FIELDS

SUMMARY = "Files to deploy a trained net with: safetensors, ONNX, the student for timm."
DESCRIPTION = (
    "Writes what answers after training (backbone, connector and classifier, BatchNorm folded) as model.safetensors "
    "with config.json and as model.onnx, and the student's own weights as student.safetensors, in its library's "
    "names; compares their answers with the trained net's on real images first, and counts and times the parts. Works "
    "on the CPU. Exit code 1, and nothing written, if the answers differ. Where standard output is no terminal, its "
    "last line is one JSON object."
)
STOPPED = ", nothing was written"

_BATCH = 32  # images at a time at most: a GPU's batch may not fit into a CPU's memory


def add_arguments(parser: ArgumentParser) -> None:
    """The run, where to write, and what to compare on."""
    add_run(parser, "data_dir", *FOLDER_FIELDS, "teacher_checkpoint", "teacher_weights", "workers", "data_backend")
    parser.add_argument(
        "--out", type=str, help="folder for the files: a new or empty one; default: export in the run's folder"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --out")
    parser.add_argument(
        "--onnx",
        action=ActionYesNo(yes_prefix="", no_prefix="no-"),
        default=True,
        help="write model.onnx as well; needs the packages onnx, onnxruntime and onnxscript",
    )
    parser.add_argument(
        "--images", type=int, default=200, help="images of val/ to compare the answers on, evenly spread"
    )


def run(args: Arguments) -> Outcome:
    """Compares and writes; one row. What can be refused is, before any image is read."""
    if args.images < 1:
        raise UserError(f"--images must be at least 1, got {args.images}")

    run = load(args, device="cpu", decode="cpu")

    import numpy as np
    from rich.console import Console

    from ijckd_fast import export
    from ijckd_fast.console import say

    run = dataclasses.replace(
        run, config=dataclasses.replace(run.config, batch_size=min(run.config.batch_size, _BATCH))
    )
    weights = run.config.teacher_checkpoint
    if run.config.infer_head == "teacher" and weights is not None and not Path(weights).is_file():
        raise UserError(
            f"the teacher's weights {weights} are not there, and the student answers through the teacher's "
            "classifier: say with --teacher-checkpoint where they are now"
        )
    folder = Path(args.out or run.path.parent / "export").absolute()
    export.refuse_occupied(folder, args.overwrite)
    if args.onnx:
        export.require_onnx()
    index = run.index()
    ids = np.unique(np.linspace(0, len(index) - 1, min(args.images, len(index))).round().astype(np.int64))
    with run.loader(index, ids) as loader:
        try:
            row = export.write_export(folder, run, loader, onnx=args.onnx, overwrite=args.overwrite)
        except export.AnswersDiffer as error:
            print(f"ijckd-fast: {error}", file=sys.stderr)
            return Outcome(code=1)
    console = Console()
    console.print(export.cost_table(row))
    for line in export.summary_lines(row, folder):
        say(console, line)
    return Outcome([{"folder": str(folder), "checkpoint": str(run.path), **row}])
