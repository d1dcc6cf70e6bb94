"""`ijckd-fast prepare-glyphs`: the ideographs of many typefaces as a task of thousands of classes."""

from __future__ import annotations

import shlex

from jsonargparse import ArgumentParser

from ijckd_fast import streams
from ijckd_fast.commands import Arguments, Outcome

SUMMARY = "Draw thousands of characters in many typefaces, as a data folder."
DESCRIPTION = (
    "Draws each character in the typefaces of a fixed list, white on black, to OUT/train/u4e00/DESIGN_WEIGHT.png and, "
    "in designs that are not in train, OUT/val/u4e00/DESIGN_WEIGHT.png: the same task for everyone. Typefaces are "
    "found by family and style where fontconfig looks and in the --fonts folders; those that are missing are named, "
    "with Debian's packages that have them, and end the command with exit code 2 unless --allow-missing. A character "
    "that a typeface lacks has no image of it. OUT gets its index, glyphs.json (typefaces, versions, digests of the "
    "pixels) and characters.txt (the classes' characters), all at once: a command that is stopped leaves no folder. "
    "Fetches nothing. Where standard output is no terminal, its last line is one JSON object."
)
STOPPED = ", nothing was left of the folder: the same command begins again"


def add_arguments(parser: ArgumentParser) -> None:
    """Where to, which characters, in which typefaces, how large."""
    parser.add_argument("out", type=str, help="a new or empty folder for train/ and val/")
    parser.add_argument(
        "--classes",
        choices=["jis1", "cjk"],
        default="jis1",
        help="jis1: the 2,965 kanji of JIS X 0208's first level; cjk: the 20,902 of U+4E00 to U+9FA5",
    )
    parser.add_argument(
        "--designs",
        type=str,
        help="designs to train on: a number, so many of the list's, or names, joined by commas; default: all. Those of "
        "val are always all there",
    )
    parser.add_argument("--image-size", type=int, default=32, help="side of the images, pixels")
    parser.add_argument(
        "--codec",
        choices=["png", "jpeg", "blocks"],
        default="png",
        help="png: class folders of PNG files; jpeg, blocks: a pack, as ijckd-fast pack --short 0 makes it of them",
    )
    parser.add_argument(
        "--fonts",
        action="append",
        type=str,
        help="folder with typefaces, which are preferred to those of the system; may be repeated",
    )
    parser.add_argument(
        "--allow-missing", action="store_true", help="do with the typefaces that are there: another task"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")


def run(args: Arguments) -> Outcome:
    """Draws; a row for each split."""
    from ijckd_fast.data.prepare import BlockPack, JpegPack, prepare_glyphs

    packed = {"png": None, "jpeg": JpegPack(short=0), "blocks": BlockPack(short=0)}
    rows = prepare_glyphs(
        args.out,
        classes=args.classes,
        designs=args.designs,
        image_size=args.image_size,
        packed=packed[args.codec],
        fonts=args.fonts or (),
        allow_missing=args.allow_missing,
        workers=args.workers,
        progress=streams.shows_bars(),
        say=lambda text: print(text, flush=True),
    )
    for row in rows:
        print(
            f"{args.out}/{row['split']}: {row['images']:,} images of {row['classes']:,} characters in {row['faces']} "
            f"typefaces of {row['designs']} designs, {row['written']:,} of them written now, {row['bytes']:,} bytes; "
            f"digest of the pixels {row['pixels_digest']}"
        )
    size = str(args.image_size)
    how = [] if size == "32" else ["--image-size", size, "--eval-resize", size]
    words = ["ijckd-fast", "train", "--config", "glyphs_teacher", "--data-dir", args.out, *how]
    print(f"to train on it: {shlex.join(words)}   # then glyphs_student with --teacher RUN")
    return Outcome(rows)
