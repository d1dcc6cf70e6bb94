"""`ijckd-fast bench loader --parity`: DALI's pixels beside Pillow's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser

from ijckd_fast.commands import Arguments, Outcome
from ijckd_fast.commands.options import add_unset_settings
from ijckd_fast.errors import UserError

if TYPE_CHECKING:
    from ijckd_fast.train import FolderParity

SUMMARY = "How far DALI's pixels, and a net's answers, are from Pillow's."
DESCRIPTION = (
    "bench loader --parity: makes the same crops of the same images of a folder by DALI and by Pillow and compares "
    "the pixels, and with --model a net's answers. Exit code 1 if they differ by more than the trainer allows. The "
    "last line of standard output is one JSON object."
)


def add_arguments(parser: ArgumentParser) -> None:
    """The images, the crops, and the net to ask."""
    from ijckd_fast.train.config import FIELDS, TYPES

    parser.add_argument("what", type=Literal["loader"], help="loader")
    parser.add_argument(
        "--parity", action="store_true", help="compare DALI with Pillow (needed; there is no other comparison)"
    )
    parser.add_argument(
        "--data-dir", type=str, help="folder with train/<class>/* and val/<class>/*; default: the run's"
    )
    add_unset_settings(parser, "class_list", "val_labels", default="the run's")
    parser.add_argument(
        "--model",
        type=str,
        help="a net to ask on both: folder or checkpoint of a run, or a model with published weights",
    )
    parser.add_argument("--images", type=int, default=256, help="crops of each split")
    parser.add_argument(
        "--split",
        type=Literal["train", "val", "both"],
        default="both",
        help="train: random crops and flips; val: the evaluation's central crops",
    )
    parser.add_argument("--image-size", type=int, help="side of the crops, pixels; default: the run's, or 224")
    add_unset_settings(parser, "crop_padding", default="the run's, or 0")
    parser.add_argument("--workers", type=int, default=2, help="decoding threads of each")
    parser.add_argument("--device", type=TYPES["device"], default="auto", help="of the net, and of --decode")
    add_unset_settings(parser, "decode", default="the run's, or cpu")
    parser.add_argument(
        "--max-drift",
        type=float,
        default=FIELDS["max_drift"].default,
        help="mean absolute difference allowed, grey levels; twice as much for a single image",
    )


def run(args: Arguments) -> Outcome:
    """Compares; a row for each split."""
    if not args.parity:
        raise UserError(
            "bench loader compares DALI with Pillow: expected --parity, found no comparison to make; add --parity"
        )

    from ijckd_fast.train import folder_parity

    found = folder_parity(
        args.model,
        splits=("train", "val") if args.split == "both" else (args.split,),
        images=args.images,
        data_dir=args.data_dir,
        class_list=args.class_list,
        val_labels=args.val_labels,
        image_size=args.image_size,
        crop_padding=args.crop_padding,
        workers=args.workers,
        device=args.device,
        decode=args.decode,
    )
    _show(found, args.model)
    beyond = [row["split"] for row in found.rows if row["drift"] > args.max_drift]
    if beyond:
        print(f"beyond the {args.max_drift:g} grey levels that the trainer allows: {', '.join(beyond)}")
    return Outcome([{**row, "max_drift": args.max_drift} for row in found.rows], 1 if beyond else 0)


def _show(found: FolderParity, model: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from ijckd_fast.console import say

    heads = ("split", "images", "mean", "worst image's", "pixels beyond 1 level")
    table = Table(*heads, title=f"|DALI - Pillow| in grey levels of 0..255, {found.data_dir}")
    for row in found.rows:
        levels = f"{row['mean_levels']:.3f}", f"{row['worst_levels']:.3f}", f"{row['beyond_percent']:.2f} %"
        table.add_row(row["split"], f"{row['images']:,}", *levels)
    console = Console()
    console.print(table)
    for row in found.rows:
        answers = ""
        if row["disagreements"] is not None:
            answers = (
                f"; top-1 of {model} {row['dali_top1_percent']:.2f} % by DALI, {row['pillow_top1_percent']:.2f} % by "
                f"Pillow, {row['disagreements']} answers differ"
            )
        say(console, f"{row['split']}: the farthest is {row['worst_path']}{answers}")
