"""`benchmark.py stages`: what a view of an image in blocks costs a core, and which stage of it how much.

Whole batches of random training crops are made of more images than a core's caches hold, by `views` itself: no plan, no
loader. With several threads each makes its part of the batch, and the time of all of them counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple

import loader_benchmark
import records
import torch
from torch import Tensor

# What needs more packages than torch is imported where it is used: the other half of benchmark.py must run without.

SHARES = ("checksum", "weights", "decode", "pass_along_x", "pass_along_y", "colours", "stores")  # of STAGES, in percent
COLUMNS = (
    "what", "workload", "bits", "dtype", "lanes", "threads", "core_us", "core_us_p20", "core_us_p80", "views_per_s",
    *SHARES, "images", "batch", "image_size", "repeats", "machine", "torch", "python", "commit", "date",
)  # fmt: skip
DTYPES = {"uint8": torch.uint8, "bfloat16": torch.bfloat16, "float32": torch.float32}
PICTURES = 8  # that differ; the other images are copies of them
HEIGHT, WIDTH = 256, 344  # of an image
LANES = {"DEFAULT": 8, "AVX2": 16, "AVX512": 32}  # by what torch calls the processor's vector instructions


class Data(NamedTuple):
    """One file of blocks [bytes] uint8, and the views to make of it: rows [images, 13] int64."""

    file: Tensor
    rows: Tensor


def add_parser(commands: Any) -> None:
    """`benchmark.py stages`."""
    parser = commands.add_parser(
        "stages",
        help="what a view of an image in blocks costs a core",
        description="Makes batches of random training crops of images in blocks, with vectors of each width that the "
        "processor has, in turns. Before, all widths' views are compared with one another, and with Pillow's. Prints a "
        'table; the last line is one JSON object {"rows": [...]}: core_us is the time of a core for one view, and the '
        "shares of its stages are percent, measured in turns of their own.",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--bits", choices=("6", "7", "7.5"), default="6", help="bits a pixel")
    parser.add_argument("--images", type=loader_benchmark.above(0), default=1024, help=f"of {HEIGHT} x {WIDTH} pixels")
    parser.add_argument("--batch", type=loader_benchmark.above(0), default=256)
    parser.add_argument("--image-size", type=loader_benchmark.above(0), default=224)
    parser.add_argument("--threads", type=loader_benchmark.above(0), nargs="+", default=[1])
    parser.add_argument("--repeats", type=loader_benchmark.above(0), default=9, help="turns, of all images each")
    records.add_save(parser, "view_stages.csv")


def run(args: argparse.Namespace, environment: dict[str, Any]) -> int:
    """Prints and saves the rows; the exit status."""
    records.check(args.save, COLUMNS)
    most = LANES.get(torch.backends.cpu.get_cpu_capability(), min(LANES.values()))
    widths = [lanes for lanes in LANES.values() if lanes <= most]
    data = make_up(args)
    reason = fault(data, widths, args)
    if reason:
        print(f"benchmark: refused to time views: {reason}", file=sys.stderr)
        return 1
    rows = []
    for threads in args.threads:
        measured = measure(data, widths, threads, args)
        for (dtype, lanes), (times, ticks) in measured.items():
            spread = statistics.quantiles(times, n=5) if len(times) > 1 else times * 4
            row = environment | {
                "what": "stages",
                "workload": f"{HEIGHT}x{WIDTH}",
                "bits": args.bits,
                "dtype": dtype,
                "lanes": lanes,
                "threads": threads,
                "core_us": round(statistics.median(times), 2),
                "core_us_p20": round(spread[0], 2),
                "core_us_p80": round(spread[3], 2),
                "views_per_s": round(1e6 * threads / statistics.median(times), 1),
                "images": args.images,
                "batch": args.batch,
                "image_size": args.image_size,
                "repeats": args.repeats,
            }
            row |= {name: round(100 * n / sum(ticks), 1) for name, n in zip(SHARES, ticks, strict=True)}
            rows.append({column: row.get(column) for column in COLUMNS})
    _print(rows)
    records.append(args.save, COLUMNS, rows)
    print(json.dumps({"rows": rows}), flush=True)
    return 0


def make_up(args: argparse.Namespace) -> Data:
    """Images like a pack's, one after the other as in its files; a crop of each as RandomResizedCrop makes them."""
    import numpy as np

    from ijckd_fast.data import Augment
    from ijckd_fast.data.blocks import BITS, VIEW_COLUMNS, checksum, encode
    from ijckd_fast.data.plan import random_resized_crop

    g, bits = np.random.default_rng(0), BITS[args.bits]
    pictures = [encode(loader_benchmark.photo(g, HEIGHT, WIDTH), bits) for _ in range(min(PICTURES, args.images))]
    room = -(-len(pictures[0]) // 64) * 64
    file = np.zeros((args.images, room), np.uint8)
    rows = np.zeros((args.images, len(VIEW_COLUMNS)), np.int64)
    size = np.tile(np.array([[HEIGHT, WIDTH]], np.int32), (args.images, 1))
    augment = Augment(image_size=args.image_size, eval_resize=args.image_size)
    rows[:, 6:8], rows[:, 8:10], rows[:, 12] = random_resized_crop(0, 0, np.arange(args.images), size, augment)
    for i, row in enumerate(rows):
        blocks = pictures[i % len(pictures)]
        file[i, : len(blocks)] = blocks
        row[:6] = (0, i * room, len(blocks), checksum(blocks), HEIGHT, WIDTH)
    return Data(torch.from_numpy(file.ravel()), torch.from_numpy(rows))


def fault(data: Data, widths: list[int], args: argparse.Namespace) -> str | None:
    """Why the views are wrong, or None: of every width and type, and beside Pillow's of the same planes."""
    from ijckd_fast.data.blocks import BITS, planes
    from ijckd_fast.data.load.planes import arrange_planes

    rows = data.rows[: 2 * PICTURES]
    side, few = args.image_size, Data(data.file, rows)
    for dtype in args.dtypes:
        made = [_batch(len(rows), side, dtype) for _ in widths]
        for lanes, out in zip(widths, made, strict=True):
            make(few, lanes, args.bits, out)
        if not all(torch.equal(made[0], other) for other in made):
            return f"{dtype} differs with the width of the vectors"
    levels = _batch(len(rows), side, "uint8")
    make(few, max(widths), args.bits, levels)
    plan: Any = SimpleNamespace(
        anchor=rows[:, 6:8], shape=rows[:, 8:10], flip=rows[:, 12], resize=None, image_size=side
    )
    for i, row in enumerate(rows.tolist()):
        blocks = data.file[row[1] : row[1] + row[2]].numpy()
        expected = arrange_planes(planes(blocks, HEIGHT, WIDTH, BITS[args.bits]), plan, i)
        off = abs(levels[i].numpy().astype(int) - expected).max()
        if off > 1:
            return f"a view is {off} grey levels from Pillow's"
    return None


def _batch(views: int, side: int, dtype: str) -> Tensor:
    """[views, side, side, 3], written to once, so that its memory is there."""
    return torch.ones(views, side, side, 3, dtype=DTYPES[dtype])


def make(data: Data, lanes: int, bits: str, out: Tensor, clock: bool = False) -> list[int]:
    """The views of data to out; what each stage took if there is a clock."""
    from ijckd_fast.data.blocks import BITS, view_stages
    from ijckd_fast.normalisation import IMAGENET

    shift, scale = [255 * m for m in IMAGENET.mean], [1 / (255 * s) for s in IMAGENET.std]
    return list(view_stages([data.file], data.rows, BITS[bits], shift, scale, out, lanes, clock).values())


def measure(
    data: Data, widths: list[int], threads: int, args: argparse.Namespace
) -> dict[tuple[str, int], tuple[list[float], list[int]]]:
    """By type and width: the time of a core for a view in each turn, microseconds; what the stages took in two more."""
    batches = {dtype: _batch(args.batch, args.image_size, dtype) for dtype in args.dtypes}
    found = {(dtype, lanes): ([], [0] * len(SHARES)) for dtype in args.dtypes for lanes in widths}
    with ThreadPoolExecutor(threads) as pool:

        def turn(dtype: str, lanes: int, clock: bool) -> tuple[float, list[list[int]]]:
            ticks, began = [], time.perf_counter()
            for first in range(0, args.images, args.batch):
                rows = data.rows[first : first + args.batch]
                parts = zip(rows.tensor_split(threads), batches[dtype][: len(rows)].tensor_split(threads), strict=True)
                jobs = [pool.submit(make, Data(data.file, r), lanes, args.bits, out, clock) for r, out in parts]
                ticks += [job.result() for job in jobs]
            return 1e6 * threads * (time.perf_counter() - began) / args.images, ticks

        for repeat in range(-1, args.repeats + 2):
            for (dtype, lanes), (times, stages) in found.items():
                clock = repeat >= args.repeats
                core_us, ticks = turn(dtype, lanes, clock)
                if clock:
                    stages[:] = map(sum, zip(stages, *ticks, strict=True))
                elif repeat >= 0:  # the first one finds all memory
                    times.append(core_us)
    return found


def _print(rows: list[dict[str, Any]]) -> None:
    print(f"{'dtype':9} lanes threads  us of a core [p20 p80]   {'  '.join(SHARES)}  (percent)")
    for r in rows:
        spread = f"{r['core_us']:7.1f} [{r['core_us_p20']:.1f} {r['core_us_p80']:.1f}]"
        shares = "  ".join(f"{r[name]:{len(name)}.1f}" for name in SHARES)
        print(f"{r['dtype']:9} {r['lanes']:5} {r['threads']:7}  {spread:23}  {shares}")


if __name__ == "__main__":
    sys.exit("a part of benchmark.py: run scripts/benchmark.py stages")
