"""`benchmark.py loader`: images a second of each executor, and of torchvision's ImageFolder in a DataLoader.

Contenders take turns, a pass over the same number of images each, so a slow minute of the machine hits all alike. The
first batches of a pass are not timed: starting workers or building a pipeline is once per epoch or run.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import records
import torch

if TYPE_CHECKING:
    import numpy as np

# What needs more packages than torch is imported where it is used: the other half of benchmark.py must run without.

COLUMNS = (
    "what", "workload", "device", "threads", "contender", "baseline", "images_per_s", "baseline_images_per_s", "ratio",
    "images_per_s_p20", "images_per_s_p80", "cpu_ms_per_image", "baseline_cpu_ms_per_image", "images", "batch",
    "image_size", "repeats", "plan_percent", "machine", "torch", "dali", "torchvision", "pillow", "python", "commit",
    "date",
)  # fmt: skip
BASELINE = "torchvision"
UNTIMED = 4  # batches


class Pass(NamedTuple):
    """One contender's turn: images a second, and CPU milliseconds an image of this process and its workers."""

    images_per_s: float
    cpu_ms_per_image: float


def write_photos(
    root: pathlib.Path, images: int, classes: int = 10, size: tuple[int, int] = (500, 375), seed: int = 0
) -> None:
    """root/{train,val}/<class>/*.jpg, `images` in all, a tenth of them val. They cost what ImageNet's cost to decode.

    size    (width, height) of most; a third is upright, and sides vary by a tenth
    Pictures are noise whose spectrum falls as a photograph's, at quality 90: about 110 kB each at 500 x 375, as
    ImageNet's mean.
    """
    import numpy as np
    from PIL import Image

    g = np.random.default_rng(seed)
    for split, n in (("train", images - images // 10), ("val", images // 10)):
        for i in range(n):
            folder = root / split / f"c{i % classes:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            width, height = (round(side * g.uniform(0.9, 1.1)) for side in (size if i % 3 else size[::-1]))
            Image.fromarray(_photo(g, height, width)).save(folder / f"{i:06d}.jpg", quality=90)


def _photo(g: np.random.Generator, height: int, width: int) -> np.ndarray:
    """[height, width, 3] uint8: noise with a 1/f amplitude spectrum, its colours correlated."""
    import numpy as np

    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falls = 1 / np.maximum(np.hypot(fy, fx), 1 / max(height, width)) ** 1.1
    spectrum = g.standard_normal((2, 3, *falls.shape))
    noise = np.fft.irfft2((spectrum[0] + 1j * spectrum[1]) * falls, s=(height, width))  # [3, height, width]
    noise[1:] = 0.85 * noise[:1] + 0.5 * noise[1:]
    noise = (noise - noise.mean((1, 2), keepdims=True)) / noise.std((1, 2), keepdims=True)
    return (127 + 50 * noise).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def cpu_seconds(pids: list[int]) -> float:
    """User and system time that these processes have used, all their threads."""
    ticks = 0
    for pid in pids:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def timed(batches: Iterator[int], pids: Callable[[], list[int]], device: str) -> Pass:
    """batches: gives the number of images of each batch as it arrives; pids: of the processes at work."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(UNTIMED):
        next(batches)
    wait()
    processes = pids()
    images, began, used = 0, time.perf_counter(), cpu_seconds(processes)
    for n in batches:
        images += n
    wait()
    seconds = time.perf_counter() - began
    return Pass(images / seconds, 1e3 * (cpu_seconds(processes) - used) / images)


def ours(contender: str, plan: Any, threads: int, steps: int, device: str) -> Pass:
    """One pass of an executor of ours over `steps` batches of a TrainPlan."""
    from ijckd_fast.data import make_loader

    backend, _, how = contender.partition("-")
    more = {"decode": how} if how in ("hybrid", "gpu") else {}
    with make_loader(backend, plan, threads=threads, stop=steps, device=device, **more) as loader:
        return timed((len(batch.labels) for batch in loader), lambda: [os.getpid()], device)


def theirs(root: pathlib.Path, augment: Any, batch: int, threads: int, steps: int, device: str) -> Pass:
    """The same with torchvision's ImageFolder and transforms in a DataLoader of `threads` workers."""
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(augment.image_size, augment.scale, augment.ratio),
            transforms.RandomHorizontalFlip(augment.hflip),
            transforms.ToTensor(),
            transforms.Normalize(augment.mean, augment.std),
        ]
    )
    data = datasets.ImageFolder(str(root / "train"), transform)
    sampler = torch.utils.data.RandomSampler(data, num_samples=steps * batch)
    loader = torch.utils.data.DataLoader(
        data, batch, sampler=sampler, num_workers=threads, persistent_workers=True, pin_memory=device == "cuda"
    )
    iterator = iter(loader)

    def pids() -> list[int]:
        return [os.getpid(), *(worker.pid for worker in iterator._workers)]

    def batches() -> Iterator[int]:
        for images, labels in iterator:
            images.to(device, non_blocking=True, memory_format=torch.channels_last)
            yield len(labels.to(device, non_blocking=True))

    return timed(batches(), pids, device)


def plan_seconds(plan: Any, steps: int) -> float:
    """Of one batch of the plan, the median."""
    times = []
    for step in range(steps):
        began = time.perf_counter()
        plan.batch(step)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def above(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number above `least`."""

    def number(text: str) -> int:
        if int(text) <= least:
            raise argparse.ArgumentTypeError(f"must be above {least}, got {text}")
        return int(text)

    return number


def add_parser(commands: Any) -> None:
    """`benchmark.py loader`."""
    parser = commands.add_parser(
        "loader",
        help="the data loaders against torchvision's",
        description="Times each executor, a pass over training batches (random crop, flip, normalise) at a time, "
        "against a torchvision ImageFolder in a DataLoader with as many workers as the executor has threads. Prints a "
        'table; the last line is one JSON object {"rows": [...]} with ratio = images_per_s / baseline_images_per_s.',
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where batches are delivered")
    parser.add_argument(
        "--data-dir",
        type=pathlib.Path,
        help="folder with train/<class>/* (default: ImageNet-like pictures are written)",
    )
    parser.add_argument("--images", type=int, default=2000, help="pictures to write where there is no --data-dir")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=("dali", "dali-hybrid", "dali-gpu", "dali-packed", "pillow", "pillow-packed"),
        default=["dali", "dali-packed", "pillow"],
        help="executors; DALI's decode on the CPU, with the rest on the GPU (hybrid), or all on the GPU; -packed: on "
        "what ijckd-fast pack makes of the same images (default: dali dali-packed pillow)",
    )
    parser.add_argument("--short", type=int, default=256, help="of the pack: shorter side, pixels")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[len(os.sched_getaffinity(0))], help="default: all cores"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument(
        "--steps", type=above(UNTIMED), default=28, help="batches of a pass, the first four of which are not timed"
    )
    parser.add_argument("--repeats", type=above(0), default=5, help="passes of each contender")
    records.add_save(parser, "loader.csv")


def run(args: argparse.Namespace, environment: dict[str, Any]) -> int:
    """Prints and saves the rows; the exit status."""
    records.check(args.save, COLUMNS)
    import PIL
    import torchvision

    from ijckd_fast.data import Augment, TrainPlan, build_index
    from ijckd_fast.data.prepare import JpegPack, pack

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmark.py loader: --device cuda wants a GPU, and torch finds none; leave it out")
    versions = {"torchvision": torchvision.__version__, "pillow": PIL.__version__, "dali": dali_version()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = args.data_dir
        if root is None:
            root = pathlib.Path(folder)
            write_photos(root, args.images)
        index = build_index(root, "train", verify="fast", cache_dir=pathlib.Path(folder) / "index")
        augment = Augment(image_size=args.image_size, eval_resize=args.image_size * 8 // 7)
        plans = {"": TrainPlan(index, augment, args.batch, seed=0)}
        if any(name.endswith("-packed") for name in args.contenders):
            packed = pathlib.Path(folder) / "packed"
            pack(root, packed, JpegPack(short=args.short), splits=("train",))
            plans["-packed"] = TrainPlan(build_index(packed, "train"), augment, args.batch, seed=0)
        for threads in args.threads:
            passes: dict[str, list[Pass]] = {name: [] for name in (BASELINE, *args.contenders)}
            for _ in range(args.repeats):
                for name, done in passes.items():
                    if name == BASELINE:
                        done.append(theirs(root, augment, args.batch, threads, args.steps, args.device))
                    else:
                        plan = plans["-packed" if name.endswith("-packed") else ""]
                        done.append(ours(name, plan, threads, args.steps, args.device))
            planning = plan_seconds(plans[""], args.steps)
            rows += [
                _row(args, name, threads, passes, planning, len(index), environment | versions)
                for name in args.contenders
            ]
    _print(rows)
    records.append(args.save, COLUMNS, rows)
    print(json.dumps({"rows": rows}), flush=True)
    return 0


def dali_version() -> str:
    """Of the installed package; empty without one."""
    from importlib import metadata

    for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _row(
    args: argparse.Namespace, name: str, threads: int, passes: dict[str, list[Pass]], planning: float, images: int,
    where: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    speeds = sorted(p.images_per_s for p in passes[name])
    mine, base = (statistics.median(p.images_per_s for p in passes[who]) for who in (name, BASELINE))
    cpu, base_cpu = (statistics.median(p.cpu_ms_per_image for p in passes[who]) for who in (name, BASELINE))
    fifths = statistics.quantiles(speeds, n=5, method="inclusive") if len(speeds) > 1 else [speeds[0]] * 4
    row = {
        "what": "loader",
        "workload": str(args.data_dir.name) if args.data_dir else "photos",
        "device": args.device,
        "threads": threads,
        "contender": f"{name} {args.short}" if name.endswith("-packed") else name,
        "baseline": BASELINE,
        "images_per_s": mine,
        "baseline_images_per_s": base,
        "ratio": mine / base,
        "images_per_s_p20": fifths[0],
        "images_per_s_p80": fifths[3],
        "cpu_ms_per_image": cpu,
        "baseline_cpu_ms_per_image": base_cpu,
        "images": images,
        "batch": args.batch,
        "image_size": args.image_size,
        "repeats": args.repeats,
        "plan_percent": 100 * planning * mine / args.batch,
        **{k: where[k] for k in ("machine", "torch", "dali", "torchvision", "pillow", "python", "commit", "date")},
    }
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def _print(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'contender':16} threads  images/s [p20 p80]        torchvision  ratio  cpu ms/image  torchvision's  plan %"
    )
    for r in rows:
        spread = f"{r['images_per_s']:8.0f} [{r['images_per_s_p20']:.0f} {r['images_per_s_p80']:.0f}]"
        print(
            f"{r['contender']:16} {r['threads']:7}  {spread:24}  {r['baseline_images_per_s']:11.0f}  {r['ratio']:5.2f}"
            f"  {r['cpu_ms_per_image']:12.2f}  {r['baseline_cpu_ms_per_image']:13.2f}  {r['plan_percent']:6.2f}"
        )


if __name__ == "__main__":
    sys.exit("a part of benchmark.py: run scripts/benchmark.py loader")
