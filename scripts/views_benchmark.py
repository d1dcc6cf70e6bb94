"""`benchmark.py views`: views of images in blocks, without plan or loader: by the CPU's op on one thread, or by a GPU's
kernel, of blocks in its own memory and in pinned memory of the host.

The images are of ImageNet's usual shape in a pack and random, since their content costs nothing; there are more of them
than caches hold. Nothing is timed before its bits are those of the CPU's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import records
import torch
from torch import Tensor

COLUMNS = (
    "what", "blocks_in", "dtype", "images_per_s", "images_per_s_p20", "images_per_s_p80", "us_per_image",
    "read_bytes_per_image", "written_bytes_per_image", "short", "bits", "image_size", "batch", "images", "repeats",
    "machine", "torch", "cuda", "python", "commit", "date",
)  # fmt: skip
DTYPES = {"uint8": torch.uint8, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Views(NamedTuple):
    """What is made of what.

    data   [bytes] uint8: all images, one after the other
    rows   [n, 13] int64, one view of each image
    """

    data: Tensor
    rows: Tensor
    bits: Any
    side: int
    shift: list[float]
    scale: list[float]


def make_views(images: int, short: int, bits: str, side: int) -> Views:
    """Random crops of images of short x 4/3 short, a third of them upright."""
    import numpy as np

    from ijckd_fast.data import Augment
    from ijckd_fast.data.blocks import BITS, blocks_length, checksum
    from ijckd_fast.data.plan import random_resized_crop

    long, augment = short * 4 // 3, Augment(image_size=side, eval_resize=side)
    ids = np.arange(images)
    size = np.where((ids % 3 == 0)[:, None], [long, short], [short, long])  # [n, 2] (h, w)
    lengths = -(-blocks_length(size[:, 0], size[:, 1], BITS[bits]) // 64) * 64
    offsets = np.concatenate([[0], lengths.cumsum()])
    data = np.random.default_rng(0).integers(0, 256, int(offsets[-1]), np.uint8)
    rows = np.zeros((images, 13), np.int64)
    rows[:, 1], rows[:, 2] = offsets[:-1], blocks_length(size[:, 0], size[:, 1], BITS[bits])
    rows[:, 3] = [checksum(data[at : at + length]) for at, length in rows[:, 1:3].tolist()]
    rows[:, 4:6] = size
    rows[:, 6:8], rows[:, 8:10], rows[:, 12] = random_resized_crop(0, 0, ids, size, augment)
    mean, std = np.float32(augment.mean) * 255, np.float32(augment.std) * 255
    return Views(torch.from_numpy(data), torch.from_numpy(rows), BITS[bits], side, mean.tolist(), (1 / std).tolist())


def by_cpu(made: Views, batch: int, out: Tensor) -> Callable[[int], None]:
    """Makes batch k of the views, into out [batch, S, S, 3]."""
    from ijckd_fast.data.blocks import views

    def run(k: int) -> None:
        views([made.data], _batch(made.rows, k, batch), made.bits, made.shift, made.scale, out)

    return run


def by_gpu(made: Views, batch: int, out: Tensor, blocks_in: str) -> Callable[[int], None]:
    """The same by the kernel; rows and addresses lie on the GPU already."""
    from ijckd_fast.data.blocks import views_at

    data = made.data.cuda() if blocks_in == "gpu" else made.data.pin_memory()
    files, rows = torch.tensor([[data.data_ptr(), len(data)]]).cuda(), made.rows.cuda()

    def run(k: int, held: Tensor = data) -> None:
        views_at(files, _batch(rows, k, batch), made.bits, made.shift, made.scale, out)

    return run


def _batch(rows: Tensor, k: int, batch: int) -> Tensor:
    first = k * batch % (len(rows) - batch + 1)
    return rows[first : first + batch]


def timed(run: Callable[[int], None], batches: int, first: int, device: str) -> float:
    """Seconds of so many batches, from batch `first` on."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    run(first)
    wait()
    began = time.perf_counter()
    for k in range(first + 1, first + 1 + batches):
        run(k)
    wait()
    return time.perf_counter() - began


def add_parser(commands: Any) -> None:
    """`benchmark.py views`."""
    parser = commands.add_parser(
        "views",
        help="views of images in blocks, without a loader",
        description="Times random crops of images in blocks, resized and normalised: on one thread of the CPU, its "
        "checksums included, or with --device cuda by a GPU's kernel. Prints a table; the last line is one JSON object "
        '{"rows": [...]}.',
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what makes the views")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: all that the device makes")
    parser.add_argument("--short", type=int, default=256, help="of the images: shorter side, pixels")
    parser.add_argument("--bits", choices=("6", "7", "7.5"), default="6", help="bits a pixel")
    parser.add_argument("--image-size", type=int, default=224, help="of the views")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--images", type=int, default=4096, help="that the views are of; at least a batch")
    parser.add_argument("--batches", type=int, default=20, help="of a turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each")
    records.add_save(parser, "views.csv")


def run(args: argparse.Namespace, environment: dict[str, Any]) -> int:
    """Prints and saves the rows; the exit status."""
    records.check(args.save, COLUMNS)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmark.py views: --device cuda wants a GPU, and torch finds none; leave it out")
    if args.images < args.batch:
        sys.exit(f"benchmark.py views: --images must be at least --batch, {args.batch}, got {args.images}")
    made = make_views(args.images, args.short, args.bits, args.image_size)
    names = args.dtypes or [name for name in DTYPES if args.device == "cuda" or name != "float16"]
    runs, refused = {}, False
    for name in names:
        for blocks_in in ("gpu", "pinned") if args.device == "cuda" else ("host",):
            out = torch.empty(args.batch, args.image_size, args.image_size, 3, dtype=DTYPES[name], device=args.device)
            one = by_cpu(made, args.batch, out) if blocks_in == "host" else by_gpu(made, args.batch, out, blocks_in)
            if _equals_cpu(made, args.batch, one, out):
                runs[name, blocks_in] = one
            else:
                print(f"benchmark: refused to time {name}, blocks in {blocks_in}: other bits", file=sys.stderr)
                refused = True
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for turn in range(args.repeats):
        for key, one in runs.items():
            seconds[key].append(timed(one, args.batches, turn * args.batches, args.device))
    rows = [_row(args, made, key, times, environment) for key, times in seconds.items()]
    for row in rows:
        spread = f"{row['images_per_s_p20']:,.0f} to {row['images_per_s_p80']:,.0f}"
        print(
            f"{row['dtype']:9} blocks in {row['blocks_in']:7} {row['images_per_s']:12,.0f} images/s ({spread}), "
            f"{row['us_per_image']:.2f} us each"
        )
    records.append(args.save, COLUMNS, rows)
    print(json.dumps({"rows": rows}), flush=True)
    return int(refused)


def _equals_cpu(made: Views, batch: int, one: Callable[[int], None], out: Tensor) -> bool:
    """Whether the first batch is the CPU's levels, normalised."""
    levels = torch.empty(out.shape, dtype=torch.uint8)
    by_cpu(made, batch, levels)(0)
    one(0)
    normalised = (levels.float() - torch.tensor(made.shift)) * torch.tensor(made.scale)
    return torch.equal(out.cpu(), levels if out.dtype == torch.uint8 else normalised.to(out.dtype))


def _row(
    args: argparse.Namespace, made: Views, key: tuple[str, str], times: list[float], where: dict[str, Any]
) -> dict[str, Any]:
    speeds = sorted(args.batch * args.batches / seconds for seconds in times)
    fifths = statistics.quantiles(speeds, n=5, method="inclusive") if len(speeds) > 1 else [speeds[0]] * 4
    crops = made.rows[:, 8:10].double().prod(1).mean().item()  # pixels
    row = {
        "what": "views",
        "blocks_in": key[1],
        "dtype": key[0],
        "images_per_s": statistics.median(speeds),
        "images_per_s_p20": fifths[0],
        "images_per_s_p80": fifths[3],
        "us_per_image": 1e6 / statistics.median(speeds),
        "read_bytes_per_image": round(crops * float(args.bits) / 8),
        "written_bytes_per_image": 3 * args.image_size**2 * DTYPES[key[0]].itemsize,
        **{name: getattr(args, name) for name in ("short", "bits", "image_size", "batch", "images", "repeats")},
        **{name: where[name] for name in ("machine", "torch", "cuda", "python", "commit", "date")},
    }
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
