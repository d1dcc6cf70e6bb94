"""`benchmark.py loader`: images a second of each executor, and of torchvision's ImageFolder in a DataLoader.

Contenders take turns, so a slow minute of the machine hits all alike; a turn delivers whole batches, float32 unless the
contender's name says otherwise. The first batches of a turn are not timed: starting workers or building a pipeline is
once per epoch or run. Nothing is timed before its pixels are held to Pillow's.
"""

from __future__ import annotations

import argparse
import importlib.util
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
EPOCHS = 10_000  # without an end, for those whose loader has one: more than any turn
CHECKED = 64  # crops that are held to Pillow's before a contender is timed
MAX_DRIFT = 0.5  # grey levels that they may be off in the mean, as in training


class Contender(NamedTuple):
    """Who makes the batches ('ffcv', or an executor of ours), from the same images as what: files, jpeg (a pack of
    JPEGs), blocks (a block pack); and in which type.
    """

    backend: str
    data: str = "files"
    options: dict[str, Any] = {}  # noqa: RUF012 - of make_loader; nobody changes them
    dtype: torch.dtype = torch.float32


CONTENDERS = {
    "dali": Contender("dali"),
    "dali-hybrid": Contender("dali", options={"decode": "hybrid"}),
    "dali-gpu": Contender("dali", options={"decode": "gpu"}),
    "dali-packed": Contender("dali", "jpeg"),
    "blocks": Contender("blocks", "blocks"),
    "blocks-bf16": Contender("blocks", "blocks", dtype=torch.bfloat16),
    "blocks-gpu": Contender("blocks", "blocks", {"blocks_on": "gpu"}),
    "blocks-copies": Contender("blocks", "blocks", {"blocks_on": "copies"}),
    "pillow": Contender("pillow"),
    "pillow-packed": Contender("pillow", "jpeg"),
    "pillow-blocks": Contender("pillow", "blocks"),
    "ffcv": Contender("ffcv", "beton"),
}


class Turn(NamedTuple):
    """How long one is: so many batches, those that are not timed among them, and so many timed seconds, at least."""

    steps: int
    seconds: float


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
            Image.fromarray(photo(g, height, width)).save(folder / f"{i:06d}.jpg", quality=90)


def photo(g: np.random.Generator, height: int, width: int) -> np.ndarray:
    """[height, width, 3] uint8: noise with a 1/f amplitude spectrum, its colours correlated."""
    import numpy as np

    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falls = 1 / np.maximum(np.hypot(fy, fx), 1 / max(height, width)) ** 1.1
    spectrum = g.standard_normal((2, 3, *falls.shape))
    noise = np.fft.irfft2((spectrum[0] + 1j * spectrum[1]) * falls, s=(height, width))  # [3, height, width]
    noise[1:] = 0.85 * noise[:1] + 0.5 * noise[1:]
    noise = (noise - noise.mean((1, 2), keepdims=True)) / noise.std((1, 2), keepdims=True)
    return (127 + 50 * noise).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def cpu_seconds(workers: list[int]) -> float:
    """User and system time that this process and these have used, all their threads."""
    ticks = 0
    for pid in workers:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def timed(batches: Iterator[int], workers: Callable[[], list[int]], turn: Turn, device: str) -> Pass:
    """batches: gives the number of images of each batch as it arrives, without end; workers: processes besides this."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(UNTIMED):
        next(batches)
    wait()
    processes = workers()
    images, began, used = 0, time.perf_counter(), cpu_seconds(processes)
    for step, n in enumerate(batches, UNTIMED + 1):
        images += n
        if step >= turn.steps and time.perf_counter() - began >= turn.seconds:
            break
    wait()
    seconds = time.perf_counter() - began
    return Pass(images / seconds, 1e3 * (cpu_seconds(processes) - used) / images)


def ours(contender: Contender, plan: Any, threads: int, turn: Turn, device: str) -> Pass:
    """A turn of an executor of ours on a TrainPlan."""
    from ijckd_fast.data import make_loader

    more = {"threads": threads, "device": device, "dtype": contender.dtype, **contender.options}
    with make_loader(contender.backend, plan, **more) as loader:
        return timed((len(batch.labels) for batch in loader), list, turn, device)


def theirs(root: pathlib.Path, augment: Any, batch: int, threads: int, turn: Turn, device: str) -> Pass:
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
    sampler = torch.utils.data.RandomSampler(data, num_samples=EPOCHS * len(data))
    loader = torch.utils.data.DataLoader(
        data, batch, sampler=sampler, num_workers=threads, persistent_workers=True, pin_memory=device == "cuda"
    )
    iterator = iter(loader)

    def batches() -> Iterator[int]:
        for images, labels in iterator:
            images.to(device, non_blocking=True, memory_format=torch.channels_last)
            yield len(labels.to(device, non_blocking=True))

    return timed(batches(), lambda: [worker.pid for worker in iterator._workers], turn, device)


def write_beton(root: pathlib.Path, path: pathlib.Path, short: int) -> None:
    """FFCV's file of root/train, its images as raw pixels: what it decodes fastest, four times a block pack's bytes."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision import datasets

    fields = {"image": RGBImageField("raw", max_resolution=round(short * 4 / 3)), "label": IntField()}
    DatasetWriter(str(path), fields).from_indexed_dataset(datasets.ImageFolder(str(root / "train")))


def by_ffcv(path: pathlib.Path, images: int, augment: Any, batch: int, threads: int, turn: Turn, device: str) -> Pass:
    """The same with FFCV's own pipeline, normalised where it decodes. images: that the file has."""
    import numpy as np
    from ffcv import transforms
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    size = (augment.image_size, augment.image_size)
    levels = [255 * np.array(values) for values in (augment.mean, augment.std)]
    pipelines = {
        "image": [
            RandomResizedCropRGBImageDecoder(size, augment.scale, augment.ratio),
            transforms.RandomHorizontalFlip(augment.hflip),
            transforms.NormalizeImage(*levels, np.float32),
            transforms.ToTensor(),
            transforms.ToTorchImage(),
        ],
        "label": [IntDecoder(), transforms.ToTensor()],
    }
    loader = Loader(
        str(path), batch_size=batch, num_workers=threads, order=OrderOption.RANDOM, pipelines=pipelines, os_cache=True,
        indices=np.tile(np.arange(images), EPOCHS),
    )  # fmt: skip

    def batches() -> Iterator[int]:
        for pixels, labels in loader:
            pixels.to(device, non_blocking=True)
            yield len(labels.to(device, non_blocking=True))

    return timed(batches(), list, turn, device)


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
        description="Times each executor, a turn of training batches (random crop, flip, normalise) at a time, "
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
        choices=CONTENDERS,
        default=["dali", "dali-packed", "blocks", "blocks-bf16", "pillow", "ffcv"],
        help="executors; DALI's decode on the CPU, with the rest on the GPU (hybrid), or all on the GPU; -packed: on "
        "what ijckd-fast pack makes of the same images, blocks: on what it makes with --codec blocks, on a GPU from "
        "pinned memory (-gpu: from the GPU's own, -copies: from copies); -bf16: bfloat16, all others float32; ffcv: "
        "its own pipeline on raw pixels, left out where it is not installed (default: dali dali-packed blocks "
        "blocks-bf16 pillow ffcv)",
    )
    parser.add_argument("--short", type=int, default=256, help="of the packs: shorter side, pixels")
    parser.add_argument("--bits", type=float, default=6, help="of the block pack: bits a pixel")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[len(os.sched_getaffinity(0))], help="default: all cores"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument(
        "--steps", type=above(UNTIMED), default=28, help="batches of a turn, the first four of which are not timed"
    )
    parser.add_argument("--seconds", type=float, default=1, help="of a turn, timed: more batches until then")
    parser.add_argument("--repeats", type=above(0), default=5, help="turns of each contender")
    records.add_save(parser, "loader.csv")


def run(args: argparse.Namespace, environment: dict[str, Any]) -> int:
    """Prints and saves the rows; the exit status."""
    records.check(args.save, COLUMNS)
    import PIL
    import torchvision

    from ijckd_fast.data import Augment, TrainPlan, build_index

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmark.py loader: --device cuda wants a GPU, and torch finds none; leave it out")
    versions = {"torchvision": torchvision.__version__, "pillow": PIL.__version__, "dali": dali_version()}
    turn, rows, refused = Turn(args.steps, args.seconds), [], False
    contenders = {name: CONTENDERS[name] for name in args.contenders}
    if "ffcv" in contenders and importlib.util.find_spec("ffcv") is None:
        print("ffcv is left out: it is not installed", file=sys.stderr)
        del contenders["ffcv"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        root = args.data_dir
        if root is None:
            root = folder / "photos"
            write_photos(root, args.images)
        augment = Augment(image_size=args.image_size, eval_resize=args.image_size * 8 // 7)
        plans = {}
        for data, where in _make_data({one.data for one in contenders.values()}, root, folder, args).items():
            index = build_index(where, "train", verify="fast", cache_dir=folder / "index" / data)
            plans[data] = TrainPlan(index, augment, args.batch, seed=0)
        images = len(plans["files"].index)
        for name in list(contenders):
            why = fault(contenders[name], plans, args.device)
            if why is not None:
                print(f"refused to time {name}: {why}", file=sys.stderr)
                refused = True
                del contenders[name]
        for threads in args.threads:
            passes: dict[str, list[Pass]] = {name: [] for name in (BASELINE, *contenders)}
            for _ in range(args.repeats):
                for name, done in passes.items():
                    if name == BASELINE:
                        done.append(theirs(root, augment, args.batch, threads, turn, args.device))
                    elif name == "ffcv":
                        beton = folder / "train.beton"
                        done.append(by_ffcv(beton, images, augment, args.batch, threads, turn, args.device))
                    else:
                        plan = plans[contenders[name].data]
                        done.append(ours(contenders[name], plan, threads, turn, args.device))
            for name, one in contenders.items():
                plan = plans.get(one.data)
                planning = 0.0 if plan is None else plan_seconds(plan, args.steps)
                rows.append(_row(args, name, threads, passes, planning, images, environment | versions))
    _print(rows)
    records.append(args.save, COLUMNS, rows)
    print(json.dumps({"rows": rows}), flush=True)
    return int(refused)


def _make_data(
    kinds: set[str], root: pathlib.Path, folder: pathlib.Path, args: argparse.Namespace
) -> dict[str, pathlib.Path]:
    """The data folders of what contenders read, each made of the images in `root`; those of packs state their loss."""
    from ijckd_fast.data.prepare import BlockPack, JpegPack, pack, pack_loss

    packs = {"jpeg": JpegPack(short=args.short), "blocks": BlockPack(short=args.short, bits=args.bits)}
    found = {"files": root}
    for kind in sorted(kinds & packs.keys()):
        found[kind] = folder / kind
        pack(root, found[kind], packs[kind], splits=("train",))
        print(f"{kind} pack: {pack_loss(found[kind], 'train')}, in the evaluation's view against the files")
    if "beton" in kinds:
        write_beton(root, folder / "train.beton", args.short)
    return found


def fault(contender: Contender, plans: dict[str, Any], device: str) -> str | None:
    """Why a contender may not be timed: pixels too far from Pillow's, or a half type that is not float32 rounded."""
    from ijckd_fast.data import make_loader, parity

    if device == "cpu" and "blocks_on" in contender.options:
        return "where a GPU reads blocks means nothing without one"
    if contender.backend not in parity.EXECUTORS:
        return None
    plan = plans[contender.data]
    decode = contender.options.get("decode", "cpu")
    found = parity.compare(plan.index, plan.augment, images=CHECKED, device=device, decode=decode)
    if not parity.within(found, MAX_DRIFT):
        return f"it is {found.mean_levels:.2f} grey levels off Pillow in the mean, {found.most_levels:.0f} at most"
    if contender.dtype != torch.float32:
        batches = []
        for dtype in (torch.float32, contender.dtype):
            with make_loader(contender.backend, plan, device=device, stop=1, dtype=dtype) as loader:
                batches.append(next(loader).images)
        if not torch.equal(batches[0].to(contender.dtype), batches[1]):
            return f"its {contender.dtype} is not its float32 rounded"
    return None


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
        "contender": _title(name, args),
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


def _title(name: str, args: argparse.Namespace) -> str:
    """A contender with what its data were made with."""
    from importlib import metadata

    if name == "ffcv":
        return f"ffcv {metadata.version('ffcv')} {args.short}, raw"
    made = {"jpeg": f" {args.short}", "blocks": f" {args.short}, {args.bits:g} bits"}
    return name + made.get(CONTENDERS[name].data, "")


def _print(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'contender':24} threads  images/s [p20 p80]        torchvision  ratio  cpu ms/image  torchvision's  plan %"
    )
    for r in rows:
        spread = f"{r['images_per_s']:8.0f} [{r['images_per_s_p20']:.0f} {r['images_per_s_p80']:.0f}]"
        print(
            f"{r['contender']:24} {r['threads']:7}  {spread:24}  {r['baseline_images_per_s']:11.0f}  {r['ratio']:5.2f}"
            f"  {r['cpu_ms_per_image']:12.3f}  {r['baseline_cpu_ms_per_image']:13.2f}  {r['plan_percent']:6.2f}"
        )
    for r in rows:
        if r["contender"].startswith("blocks"):
            others = [o for o in rows if o["threads"] == r["threads"] and not o["contender"].startswith("blocks")]
            times = ", ".join(f"{r['images_per_s'] / o['images_per_s']:.1f} times {o['contender']}" for o in others)
            print(f"{r['contender']}, {r['threads']} threads: {r['ratio']:.1f} times {BASELINE}, {times}")


if __name__ == "__main__":
    sys.exit("a part of benchmark.py: run scripts/benchmark.py loader")
