"""`ijckd-fast index`: scans a data folder once and lists its bad files."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from ijckd_fast import streams
from ijckd_fast.commands import Arguments, Outcome
from ijckd_fast.commands.options import DATA, add_unset_settings, data_folder

if TYPE_CHECKING:
    from ijckd_fast.data import DataFolder
    from ijckd_fast.data.sources import InOrder

SUMMARY = "Scan a data folder once and list its bad files."
DESCRIPTION = (
    "Decodes every image of a folder once and remembers which are good, so that training starts in seconds and never "
    "dies of a bad file. Run again it opens only files whose length or time has changed; train and evaluate ask only "
    "for the times of the folders, which show files that come and go but not one rewritten in place: that one is "
    "named when it is read. It says what layout it found, and the command that trains on it. Where standard output is "
    "no terminal, its last line is one JSON object."
)
STOPPED = ", what was decoded is kept: the same command continues where it stopped"


def add_arguments(parser: ArgumentParser) -> None:
    """The folder and how closely to look."""
    from ijckd_fast.train.config import TYPES

    parser.add_argument("data_dir", type=str, help="data folder, of any layout in docs/index.md")
    parser.add_argument("--workers", type=int, default=0, help="decoding threads; 0: one per core")
    parser.add_argument(
        "--verify",
        type=TYPES["index_verify"],
        default="full",
        help="full: decode every file; fast: headers and trailers only, damage inside goes unseen",
    )
    parser.add_argument("--fast", action="store_true", help="the same as --verify fast")
    add_unset_settings(parser, *DATA)
    parser.add_argument("--refresh", action="store_true", help="forget an earlier scan")


def run(args: Arguments) -> Outcome:
    """Scans both splits; a row for each."""
    from ijckd_fast.data.sources import require_folder

    require_folder(Path(args.data_dir))

    from rich.console import Console

    from ijckd_fast.data.index import summarize, summary_table

    rows: list[dict[str, Any]] = []
    in_order: list[InOrder] = []
    data = data_folder(args)
    scans = data.scans(
        workers=args.workers,
        verify="fast" if args.fast else args.verify,
        refresh=args.refresh,
        progress=streams.shows_bars(),
        least_classes=2,
        in_order=lambda found, _: in_order.append(found),
    )
    start = time.perf_counter()
    for found in scans:
        rows.append(summarize(found, time.perf_counter() - start))
        start = time.perf_counter()
    Console().print(summary_table(rows, args.data_dir))
    if said := data.about_val():
        print(said)
    for home in dict.fromkeys(row["files"] for row in rows if row["files"]):
        print(f"the index, and lists of what was left out and why: {home}")
    for one in in_order:
        print(
            f"{one.why}, where each image costs its whole row group: training needs these packed once, their bytes "
            f"unchanged ({one.amount})"
        )
    print(f"to train on it: {_training(data, packed=bool(in_order))}   # or --teacher RUN instead of --objective ce")
    return Outcome(rows)


def _training(data: DataFolder, packed: bool) -> str:
    """The command that trains on what was indexed, as a shell takes it. packed: behind the one that packs it."""
    train = ("--objective", "ce", "--student", "resnet18")
    if not packed:
        return data.command("train", "--data-dir", data.data_dir, last=train)
    out = f"{str(data.data_dir).rstrip('/')}-packed"
    pack = data.command("pack", data.data_dir, out, "--short", "0")
    return f"{pack} && {shlex.join(['ijckd-fast', 'train', '--data-dir', out, *train])}"
