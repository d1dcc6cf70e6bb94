"""`benchmark.py index`: how fast a data folder is scanned, and what time and memory a start with a large index takes.

The scan reads real pictures; the starts read index files made up for as many images and class folders, or archives, as
ImageNet and ImageNet-21k have, each in a process of its own, in turn. Folders, archives and Parquet files are there,
the images are not: a start does not ask for them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import loader_benchmark
import records

# What needs more packages than torch is imported where it is used: the other half of benchmark.py must run without.

COLUMNS = (
    "what", "workload", "files", "folders", "seconds", "seconds_least", "seconds_most", "images_per_s", "order_seconds",
    "batch_ms", "peak_mb", "held_mb", "repeats", "threads", "machine", "pyarrow", "numpy", "pillow", "python", "commit",
    "date",
)  # fmt: skip

PICTURES = 200  # that differ; the other files are hard links to them

START = """
import json, resource, sys, time
from ijckd_fast.data import Augment, DataFolder, TrainPlan

def megabytes(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) * 1024 / 1e6

before = megabytes("VmRSS")
began = time.perf_counter()
folder = DataFolder(sys.argv[1], val_fraction=float(sys.argv[2]) or None)
scans = folder.scans(("train",) if folder.val_fraction is None else ("train", "val"), trust_folders=True)
indexes = [found.index for found in scans]
seconds = time.perf_counter() - began
plan = TrainPlan(indexes[0], Augment(), 256, seed=0)
began = time.perf_counter()
plan.batch(0)
order = time.perf_counter() - began
times = []
for step in range(1, 51):
    began = time.perf_counter()
    plan.batch(step)
    times.append(time.perf_counter() - began)
print(json.dumps({"files": sum(map(len, indexes)), "seconds": seconds, "order_seconds": order,
    "batch_ms": 1e3 * sorted(times)[25], "peak_mb": megabytes("VmHWM") - before,
    "held_mb": megabytes("VmRSS") - before}))
"""


def make_up_index(root: pathlib.Path, images: int, folders: int) -> None:
    """root/train with empty class folders, and an index file that says that there were `images` in them."""
    import numpy as np
    import pyarrow as pa

    from ijckd_fast.data.index import kept
    from ijckd_fast.data.sources.listing import list_images

    names = [f"train/n{i:08d}" for i in range(folders)]
    for name in names:
        (root / name).mkdir(parents=True)
    time.sleep(2.1)  # a folder that changed just now is not trusted
    counts = np.diff(np.linspace(0, images, folders + 1).astype(np.int64)).tolist()
    files = kept.Files.none()
    paths = []
    for name, count in zip(names, counts, strict=True):
        paths.append(pa.array([f"{name}/{name[6:]}_{i}.JPEG".encode() for i in range(count)], pa.large_binary()))
        files.groups.append(kept.Group(name, count, list_images(str(root), name).stamps))
    files.paths = pa.chunked_array(paths)
    _make_up_facts(files, images)
    kept.save_files([root / kept.CACHE_FOLDER], "train", files)


def make_up_archives(root: pathlib.Path, images: int, archives: int) -> None:
    """The same of root/imagenet1k-train-*.tar, empty archives, with an info file and labels of 1000 classes."""
    names = [f"imagenet1k-train-{i:04d}.tar" for i in range(archives)]
    for name in names:
        (root / name).write_bytes(bytes(1024))
    counts = [len(ids) for ids in _dealt(images, archives)]
    train = {"name": "train", "num_samples": images, "filenames": names, "shard_lengths": counts}
    (root / "_info.json").write_text(json.dumps({"splits": {"train": train}}))
    _make_up_shards(root, names, images, "{name}/n{label:08d}_{i}.jpg", [str(k) for k in range(1000)], "KEY.cls")


def make_up_parquet(root: pathlib.Path, images: int, count: int) -> None:
    """The same of root/data/train-*.parquet, files without rows, with the names of 1000 classes in their schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    classes = [f"class {k}, with names of about this length" for k in range(1000)]
    features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    columns = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())]
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    names = [f"data/train-{i:05d}-of-{count:05d}.parquet" for i in range(count)]
    (root / "data").mkdir()
    for name in names:
        pq.write_table(pa.schema(columns, about).empty_table(), root / name)
    _make_up_shards(root, names, images, "{name}/image.bytes[{i}]", classes, "column label")


def _dealt(images: int, files: int) -> list[range]:
    """The images in each of so many files."""
    ends = [images * k // files for k in range(files + 1)]
    return list(itertools.starmap(range, itertools.pairwise(ends)))


def _make_up_shards(
    root: pathlib.Path, names: list[str], images: int, called: str, labels: list[str], labels_from: str
) -> None:
    """An index file that says that `images` are in the files root/names; called: with name, i in the file, label."""
    import numpy as np
    import pyarrow as pa

    from ijckd_fast.data.index import kept
    from ijckd_fast.data.sources import open_source
    from ijckd_fast.data.sources.listing import stamp_of

    time.sleep(2.1)
    files = kept.Files.none()
    files.labels_asked = open_source(root, "train").labels_asked
    numbers = np.array([files.labels.number(label) for label in labels])
    paths, g = [], np.random.default_rng(0)
    for name, ids in zip(names, _dealt(images, len(names)), strict=True):
        mine = [called.format(name=name, i=i, label=k).encode() for i, k in enumerate(g.integers(0, 1000, len(ids)))]
        paths.append(pa.array(mine, pa.large_binary()))
        files.groups.append(kept.Group(name, len(ids), (stamp_of(str(root), name),), (), labels_from))
    files.paths = pa.chunked_array(paths)
    _make_up_facts(files, images)
    files.facts["crc32"] = g.integers(1, 2**32, images)
    files.members = np.zeros(images, kept.MEMBERS)
    files.members["offset"] = g.integers(512, 10**8, images)
    files.members["label"] = numbers[np.arange(images) % len(numbers)]
    kept.save_files([root / kept.CACHE_FOLDER], "train", files)


def _make_up_facts(files: Any, images: int) -> None:
    import numpy as np

    from ijckd_fast.data.index import kept

    g = np.random.default_rng(0)
    files.facts = np.zeros(images, kept.FACTS)
    for name, least, most in (
        ("length", 5_000, 200_000),
        ("mtime_ns", 10**18, 2 * 10**18),
        ("width", 100, 600),
        ("height", 100, 600),
    ):
        files.facts[name] = g.integers(least, most, images)
    files.facts["format"] = files.formats.number("JPEG")
    for name in ("orientation", "full", "known"):
        files.facts[name] = 1


class Start(NamedTuple):
    """images, in so many class folders, archives or Parquet files, which make_up makes; val_fraction: held out."""

    images: int
    files: int
    make_up: Callable[[pathlib.Path, int, int], None]
    val_fraction: float = 0


STARTS = {
    "imagenet": Start(1_281_167, 1000, make_up_index),
    "imagenet-21k": Start(14_197_122, 21_841, make_up_index),
    "imagenet-wds": Start(1_281_167, 1024, make_up_archives),
    "imagenet-wds-val-fraction": Start(1_281_167, 1024, make_up_archives, 0.02),
    "imagenet-parquet": Start(1_281_167, 294, make_up_parquet),
}
"""imagenet-wds: in one folder with the info file of timm/imagenet-1k-wds; imagenet-parquet: as ILSVRC/imagenet-1k."""


def add_parser(commands: Any) -> None:
    """`benchmark.py index`."""
    parser = commands.add_parser(
        "index",
        help="the scan of a data folder, and the start with an index of millions of images",
        description="Times a first scan (every file decoded), a second start that asks for every file and one that "
        "asks for the folders only, on hard links to ImageNet-like pictures; then the start with made-up index files "
        "of ImageNet's sizes, with the memory it takes. Prints a table; the last line is one JSON object "
        '{"rows": [...]}.',
    )
    parser.add_argument(
        "--files", type=int, default=20_000, help="pictures to scan, in classes of a hundred; 0: no scan"
    )
    parser.add_argument("--starts", nargs="*", choices=tuple(STARTS), default=list(STARTS), help="made-up index files")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="decoding threads; default: all cores"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="of each start; the first scan is timed a third as often"
    )
    records.add_save(parser, "index.csv")


def run(args: argparse.Namespace, environment: dict[str, Any]) -> int:
    """Prints and saves the rows; the exit status."""
    records.check(args.save, COLUMNS)
    import numpy
    import PIL
    import pyarrow

    where = environment | {
        "threads": args.threads,
        "pyarrow": pyarrow.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
    }
    measured = scans(args) if args.files else []
    measured += starts(args.starts, args.repeats)
    rows = [{column: (row | where | {"what": "index"}).get(column) for column in COLUMNS} for row in measured]
    _print(rows)
    records.append(args.save, COLUMNS, rows)
    print(json.dumps({"rows": rows}), flush=True)
    return 0


def scans(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The first scan, and the second start in both ways, of args.files pictures."""
    from ijckd_fast.data import build_index

    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        loader_benchmark.write_photos(root / "pictures", min(PICTURES, args.files))
        pictures = sorted((root / "pictures").rglob("*.jpg"))
        for i in range(args.files):
            path = root / "train" / f"c{i // 100:05d}" / f"{i:08d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(pictures[i % len(pictures)], path)
        time.sleep(2.1)  # a folder that changed just now is not trusted
        ways: dict[str, dict[str, Any]] = {
            "first scan": {"refresh": True},
            "second start, every file": {},
            "second start, folders": {"trust_folders": True},
        }
        rows = []
        for name, way in ways.items():
            times = []
            for _ in range(-(-args.repeats // 3) if name == "first scan" else args.repeats):
                began = time.perf_counter()
                index = build_index(root, "train", workers=args.threads, **way)
                times.append(time.perf_counter() - began)
            rows.append(_row(name, len(index), index.num_classes, times))
        rows[0]["images_per_s"] = round(args.files / rows[0]["seconds"], 1)
        return rows


def starts(names: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """The start with each of these of STARTS, in turn, in a new process each time."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            root = pathlib.Path(folder, name)
            root.mkdir()
            STARTS[name].make_up(root, STARTS[name].images, STARTS[name].files)
        for _, name in itertools.product(range(repeats), names):
            done = subprocess.run(
                [sys.executable, "-c", START, str(pathlib.Path(folder, name)), str(STARTS[name].val_fraction)],
                cwd=pathlib.Path(__file__).parent.parent,
                check=True,
                capture_output=True,
                text=True,
            )
            found[name].append(json.loads(done.stdout))
            if found[name][-1]["files"] != STARTS[name].images:
                sys.exit(f"refused to time {name}: {found[name][-1]['files']} images")
    others = ("order_seconds", "batch_ms", "peak_mb", "held_mb")
    return [
        _row(f"start, {name}", STARTS[name].images, STARTS[name].files, [one["seconds"] for one in measured])
        | {key: round(statistics.median(one[key] for one in measured), 3) for key in others}
        for name, measured in found.items()
    ]


def _row(name: str, files: int, folders: int, times: list[float]) -> dict[str, Any]:
    return {
        "workload": name,
        "files": files,
        "folders": folders,
        "seconds": round(statistics.median(times), 4),
        "seconds_least": round(min(times), 4),
        "seconds_most": round(max(times), 4),
        "repeats": len(times),
    }


def _print(rows: list[dict[str, Any]]) -> None:
    print(f"{'':33} {'files':>10} folders  {'s [least most]':24}  images/s  order s  batch ms  peak MB  held MB")
    for r in rows:
        spread = f"{r['seconds']:8.3f} [{r['seconds_least']:.3f} {r['seconds_most']:.3f}]"
        rest = [("images_per_s", 8), ("order_seconds", 7), ("batch_ms", 8), ("peak_mb", 7), ("held_mb", 7)]
        shown = "  ".join(
            f"{'' if r[key] is None else format(r[key], '.4g' if key != 'peak_mb' else '.0f'):>{width}}"
            for key, width in rest
        )
        print(f"{r['workload']:33} {r['files']:10,} {r['folders']:7,}  {spread:24}  {shown}")


if __name__ == "__main__":
    sys.exit("a part of benchmark.py: run scripts/benchmark.py index")
