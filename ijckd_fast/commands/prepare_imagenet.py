"""`ijckd-fast prepare-imagenet`: ImageNet's archives as class folders."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from ijckd_fast import streams
from ijckd_fast.commands import Arguments, Outcome
from ijckd_fast.commands.options import rows_of_splits

SUMMARY = "Unpack ImageNet's archives into class folders."
DESCRIPTION = (
    "Unpacks ILSVRC2012_img_train.tar (or ImageNet-21k's archive of archives) and ILSVRC2012_img_val.tar into "
    "OUT/train/<wnid>/ and OUT/val/<wnid>/. Interrupted, it continues where it stopped when it is run again. Where "
    "standard output is no terminal, its last line is one JSON object."
)
STOPPED = ", what was unpacked is kept: the same command continues where it stopped"


def add_arguments(parser: ArgumentParser) -> None:
    """The archives and where to."""
    parser.add_argument("out", type=str, help="folder for train/ and val/")
    parser.add_argument("--train-tar", type=str, help="archive of one archive per class")
    parser.add_argument("--val-tar", type=str, help="archive of the validation images; needs --val-labels")
    parser.add_argument(
        "--val-labels", type=str, help="file that names each image's class, e.g. Kaggle's LOC_val_solution.csv"
    )


def run(args: Arguments) -> Outcome:
    """Unpacks; a row for each split."""
    from ijckd_fast.data.prepare import prepare_imagenet

    done = prepare_imagenet(
        args.out,
        train_tar=args.train_tar,
        val_tar=args.val_tar,
        val_labels=args.val_labels,
        progress=streams.shows_bars(),
    )
    return Outcome(rows_of_splits(args.out, done))
