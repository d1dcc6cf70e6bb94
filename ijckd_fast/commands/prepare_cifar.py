"""`ijckd-fast prepare-cifar`: CIFAR's archives as class folders."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from ijckd_fast import streams
from ijckd_fast.commands import Arguments, Outcome
from ijckd_fast.commands.options import rows_of_splits

SUMMARY = "Unpack CIFAR-100's or CIFAR-10's archive into class folders."
DESCRIPTION = (
    "Writes the images of cifar-100-python.tar.gz or cifar-10-python.tar.gz, which its checksum tells apart, as PNG "
    "files to OUT/train/<class>/ and OUT/val/<class>/ (CIFAR's test images; CIFAR-100's fine classes), and the "
    "classes in the order of the labels to OUT/classes.txt. Fetches nothing: the archives are at "
    "https://www.cs.toronto.edu/~kriz/cifar.html. Interrupted, it continues where it stopped when it is run again. "
    "Where standard output is no terminal, its last line is one JSON object."
)
STOPPED = ", what was unpacked is kept: the same command continues where it stopped"


def add_arguments(parser: ArgumentParser) -> None:
    """The archive and where to."""
    parser.add_argument("out", type=str, help="folder for train/ and val/")
    parser.add_argument("--archive", type=str, help="the python version of either archive, as it was downloaded")


def run(args: Arguments) -> Outcome:
    """Unpacks; a row for each split."""
    from ijckd_fast.data.prepare import prepare_cifar

    return Outcome(rows_of_splits(args.out, prepare_cifar(args.out, args.archive, progress=streams.shows_bars())))
