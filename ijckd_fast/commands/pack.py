"""`ijckd-fast pack`: a data folder encoded once more, smaller, where decoding is too slow."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from jsonargparse import ArgumentParser

from ijckd_fast import streams
from ijckd_fast.commands import Arguments, Outcome
from ijckd_fast.commands.options import DATA, add_unset_settings, data_folder
from ijckd_fast.errors import UserError

SUMMARY = "Re-encode a data folder once, smaller, where decoding is too slow."
DESCRIPTION = (
    "Writes the images of DATA_DIR to OUT/{train,val}/shard-*. With --codec jpeg, to tar archives: training images "
    "with a shorter side above --short made smaller and encoded as JPEG, smaller JPEGs as they are, other formats "
    "encoded at their size; validation images as they are, so that accuracies stay comparable. With --codec blocks, "
    "to files of images in blocks of 4 x 4 samples, which need no JPEG decoder and take more space on disk, and are "
    "read by --data-backend pillow alone so far; all images are re-encoded, validation images too, so that accuracies "
    "are those of the re-encoded ones (ijckd-fast evaluate RUN --data-dir DATA_DIR has those of the originals). "
    "Random crops of a small part of an image lose detail below --short: 256 is the fast choice, 400 to 500 the "
    "careful one; how much the evaluation's view of the images changes is measured and printed. Every shard is read "
    "back before it gets its name, and its checksum is kept. Of shards and Parquet files --short 0 copies every image "
    "as it is, whatever its format; of compressed Parquet files, which training does not read, it says before it "
    "starts how much disk and time that takes. Interrupted, it continues where it stopped when it is run again; a "
    "finished pack is compared with its checksums then, and what is damaged is made again. Where standard output is "
    "no terminal, its last line is one JSON object."
)
STOPPED = ", finished shards are kept: the same command continues where it stopped"


def add_arguments(parser: ArgumentParser) -> None:
    """From where to where, and how small."""
    parser.add_argument("data_dir", type=str, help="folder with train/<class>/* and val/<class>/*")
    parser.add_argument("out", type=str, help="folder for the pack: a new or empty one, or a pack to continue")
    parser.add_argument(
        "--codec", choices=["jpeg", "blocks"], default="jpeg", help="how images are encoded: as JPEG, or in blocks"
    )
    parser.add_argument("--short", type=int, default=256, help="shorter side, pixels; 0: keep sizes")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs, 1 to 95; with --codec jpeg")
    parser.add_argument("--shard-images", type=int, default=1000, help="images in a shard; with --codec jpeg")
    parser.add_argument(
        "--bits", type=float, default=6, help="that a pixel takes in blocks: 6, 7 or 7.5; with --codec blocks"
    )
    parser.add_argument("--shard-gb", type=float, default=1, help="GiB of images in a file; with --codec blocks")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")
    parser.add_argument("--splits", nargs="+", choices=["train", "val"], default=["train", "val"], help="what to pack")
    add_unset_settings(parser, *DATA)
    parser.add_argument(
        "--unreadable-limit",
        type=int,
        help=(
            "files of a split that may turn out unreadable, though the index found them good, before it stops with "
            "exit code 2; until then each is named and left out; default: a thousandth of the files, at least 8"
        ),
    )
    parser.add_argument("--overwrite", action="store_true", help="delete the pack that is in OUT, both splits")


def _require_options_of(args: Arguments) -> None:
    """UserError for an option of another codec."""
    for codec, names, others in (
        ("jpeg", ("quality", "shard_images"), ("--bits", "--shard-gb")),
        ("blocks", ("bits", "shard_gb"), ("--quality", "--shard-images")),
    ):
        for name, other in zip(names, others, strict=True):
            if args.codec != codec and name in args.given:
                raise UserError(
                    f"--{name.replace('_', '-')} goes with --codec {codec}, found --codec {args.codec}, which has "
                    f"{other} instead; leave it out, or give --codec {codec}"
                )


def run(args: Arguments) -> Outcome:
    """Packs; a row for each split."""
    _require_options_of(args)

    from ijckd_fast.data.sources import require_folder

    require_folder(Path(args.data_dir), args.splits[0])

    from ijckd_fast.data.prepare import BlockPack, JpegPack

    settings = (
        JpegPack(args.short, args.quality, args.shard_images)
        if args.codec == "jpeg"
        else BlockPack(args.short, args.bits, args.shard_gb)
    )
    data = data_folder(args)

    from rich.console import Console

    from ijckd_fast.data.prepare import pack, pack_table

    rows = pack(
        data,
        args.out,
        settings,
        splits=args.splits,
        workers=args.workers,
        unreadable_limit=args.unreadable_limit,
        overwrite=args.overwrite,
        progress=streams.shows_bars(),
        say=lambda text: print(text, flush=True),
    )
    Console().print(pack_table(rows, args.out))
    if args.codec == "blocks" and "val" in args.splits:
        print(
            "accuracies on this pack are those of its re-encoded images; of the originals: "
            f"{data.command('evaluate', 'RUN', '--data-dir', data.data_dir, of_run=True)}"
        )
    missing = [split for split in ("train", "val") if not os.path.isdir(os.path.join(args.out, split))]
    if missing:
        print(f"to train on it, pack {missing[0]} too: the same command with --splits {missing[0]}")
    else:
        print(f"to train on it: ijckd-fast train --data-dir {shlex.quote(args.out)} --objective ce --student resnet18")
    return Outcome(rows)
