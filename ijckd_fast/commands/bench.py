"""`ijckd-fast bench loader --parity`: the loader's pixels beside Pillow's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser

from ijckd_fast.commands import Arguments, Outcome
from ijckd_fast.commands.options import DATA, add_unset_settings
from ijckd_fast.errors import UserError
from ijckd_fast.train.mistakes import require_data, require_net

if TYPE_CHECKING:
    from ijckd_fast.train import FolderParity

SUMMARY = "How far the loader's pixels, and a net's answers, are from Pillow's."
DESCRIPTION = (
    "bench loader --parity: makes the same crops of the same images of a folder by DALI (of a block pack by the block "
    "executor) and by Pillow and compares the pixels, and with --model a net's answers. Of a pack it shows beside "
    "this what packing has lost. Exit code 1 if the pixels differ by more than the trainer allows. Where standard "
    "output is no terminal, its last line is one JSON object."
)


def add_arguments(parser: ArgumentParser) -> None:
    """The images, the crops, and the net to ask."""
    from ijckd_fast.train.config import FIELDS, TYPES

    parser.add_argument("what", type=Literal["loader"], help="loader")
    parser.add_argument(
        "--parity", action="store_true", help="compare with Pillow (needed; there is no other comparison)"
    )
    parser.add_argument(
        "--data-dir", type=str, help="folder with train/<class>/* and val/<class>/*; default: the run's"
    )
    add_unset_settings(parser, *DATA, default="the run's")
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
            "bench loader compares the loader's pixels with Pillow's: expected --parity, found no comparison to make; "
            "add --parity"
        )

    if args.model is not None:
        require_net(args.model)
    if args.data_dir is not None:
        require_data(args.data_dir)

    from ijckd_fast.data import parity
    from ijckd_fast.train import folder_parity

    found = folder_parity(
        args.model,
        splits=("train", "val") if args.split == "both" else (args.split,),
        images=args.images,
        data_dir=args.data_dir,
        **{name: getattr(args, name) for name in DATA},
        image_size=args.image_size,
        crop_padding=args.crop_padding,
        workers=args.workers,
        device=args.device,
        decode=args.decode,
    )
    _show(found, args.model)
    beyond = [one.split for one in found.compared if not parity.within(one, args.max_drift)]
    if beyond:
        print(f"beyond the {args.max_drift:g} grey levels that the trainer allows: {', '.join(beyond)}")
    return Outcome([{**row, "max_drift": args.max_drift} for row in found.rows], 1 if beyond else 0)


def _show(found: FolderParity, model: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from ijckd_fast.console import say

    heads = ("split", "by", "images", "mean", "worst image's", "most", "pixels beyond 1 level")
    table = Table(*heads, title=f"|loader - Pillow| in grey levels of 0..255, {found.data_dir}")
    for one in found.compared:
        levels = (f"{value:.3f}" for value in (one.mean_levels, one.worst_levels, one.most_levels))
        table.add_row(one.split, one.backend, f"{one.images:,}", *levels, f"{one.beyond_percent:.2f} %")
    console = Console()
    console.print(table)
    for one, loss in zip(found.compared, found.losses, strict=True):
        answers = ""
        if one.disagreements is not None:
            answers = (
                f"; top-1 of {model} {one.executor_top1_percent:.2f} % by {one.backend}, "
                f"{one.pillow_top1_percent:.2f} % by Pillow, {one.disagreements} answers differ"
            )
        say(console, f"{one.split}: the farthest is {one.worst_path}{answers}")
        if loss is not None:
            say(console, f"{one.split}: packing itself has cost, against the originals, {loss}")
