"""What an image in blocks has lost, and whether a net that learns from such images is as good.

    scripts/pack_study.py loss --save      # views of two photographs and of ImageNet-like pictures, beside JPEG's
    scripts/pack_study.py digits --save    # the demo's digits: students from files and from a block pack of them

loss: images are made smaller once (Lanczos, shorter side 256), then encoded; every view of what was encoded is compared
with the same view of what it was encoded from. So the figures are of the encoding alone, and of training's crops too.

digits: seed s has the same images, crops, order and first weights in both data folders, so that accuracies are compared
seed by seed. A student from blocks answers twice: on the validation files, like the one from files, and on those of its
pack.

The last line is one JSON object {"rows": [...]}.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import loader_benchmark
import numpy as np
import records
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough: the package need not be installed

if TYPE_CHECKING:
    from ijckd_fast.compare import Outcome
    from ijckd_fast.data import BatchPlan

WHERE = ("machine", "torch", "python", "commit", "date")
LOSS = (
    "what", "data", "codec", "bits_per_pixel", "split", "images", "views", "mean_levels", "psnr_db",
    "psnr_db_of_mean_square", "short", "image_size", "pillow", *WHERE,
)  # fmt: skip
DIGITS = (
    "what", "data", "method", "bits", "pack_mean_levels", "evaluated_on", "seeds", "files_top1_mean", "files_top1_std",
    "blocks_top1_mean", "blocks_top1_std", "difference", "difference_low", "difference_high", "val_images",
    "teacher_top1_percent", "dali", "pillow", *WHERE,
)  # fmt: skip
METHODS = ("ce", "ijckd")
QUALITY = 90
SIDE = 224

View = Callable[["BatchPlan", int], np.ndarray]


# --------------------------------------------------------------------------------------------------------------------
# loss


def write_photographs(root: pathlib.Path, short: int) -> None:
    """scikit-learn's two photographs as root/train/NAME/NAME.png, made smaller."""
    from sklearn.datasets import load_sample_images

    found = load_sample_images()
    for name, pixels in zip(found.filenames, found.images, strict=True):
        name = pathlib.Path(name).stem
        (root / "train" / name).mkdir(parents=True)
        _smaller(Image.fromarray(pixels), short).save(root / "train" / name / f"{name}.png")


def write_pictures(root: pathlib.Path, images: int, short: int) -> None:
    """The loader benchmark's pictures as root/train/CLASS/NUMBER.png, made smaller."""
    with tempfile.TemporaryDirectory() as folder:
        loader_benchmark.write_photos(pathlib.Path(folder), images)
        for path in pathlib.Path(folder).glob("*/*/*.jpg"):
            to = root / "train" / path.parent.name
            to.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as image:
                _smaller(image, short).save(to / f"{path.stem}.png")


def _smaller(image: Image.Image, short: int) -> Image.Image:
    from ijckd_fast.data.prepare.pack_format import packed_sizes

    size = packed_sizes(np.array([image.size]), short)[0].tolist()
    return image.convert("RGB").resize(tuple(size), Image.Resampling.LANCZOS)


def encodings(image: Image.Image) -> Iterator[tuple[str, float, View]]:
    """(codec, bits a pixel, views of the encoded image) of each way to encode it."""
    from ijckd_fast.data.blocks import BITS, encode, planes
    from ijckd_fast.data.load.planes import arrange_planes
    from ijckd_fast.data.prepare import pack_jpeg

    area = image.width * image.height
    for name, bits in BITS.items():
        data = encode(np.asarray(image), bits)
        stored = planes(data, image.height, image.width, bits)
        yield f"blocks {name}", 8 * len(data) / area, lambda plan, i, stored=stored: arrange_planes(stored, plan, i)
    file = pack_jpeg.encode(image, QUALITY)
    yield f"jpeg {QUALITY}", 8 * len(file) / area, lambda plan, i: pack_jpeg.view_of_jpeg("", file, plan, i)


def loss_rows(name: str, root: pathlib.Path, views: int, short: int) -> list[dict[str, Any]]:
    """Of the images in `root`: a row for each codec in training's crops, `views` of each image, and in evaluation's."""
    from ijckd_fast.data import Augment, EvalPlan, TrainPlan, build_index
    from ijckd_fast.data.load.pillow import arrange, stored_image

    index = build_index(root, "train")
    augment = Augment(image_size=SIDE, eval_resize=SIDE * 8 // 7)
    train, val = TrainPlan(index, augment, len(index), seed=0), EvalPlan(index, augment, len(index))
    seen: dict[tuple[str, str], list[tuple[float, float]]] = {}  # (mean difference, mean square) of each view
    sizes: dict[str, list[float]] = {}
    batches = [("val", val.batch(0)), *(("train", train.batch(step)) for step in range(views))]
    rows_of = [dict(zip(plan.ids.tolist(), range(len(plan.ids)), strict=True)) for _, plan in batches]
    for i in range(len(index)):
        image = stored_image(batches[0][1], rows_of[0][i])
        views_of = [(split, plan, rows[i]) for (split, plan), rows in zip(batches, rows_of, strict=True)]
        expected = [arrange(image, plan, row).astype(float) for _, plan, row in views_of]
        for codec, bits, view in encodings(image):
            sizes.setdefault(codec, []).append(bits)
            for (split, plan, row), pixels in zip(views_of, expected, strict=True):
                apart = view(plan, row) - pixels
                seen.setdefault((codec, split), []).append((np.abs(apart).mean(), np.square(apart).mean()))
    found = []
    for (codec, split), each in seen.items():
        means, squares = np.array(each).T
        found.append(
            {
                "what": "pack_loss", "data": name, "codec": codec, "bits_per_pixel": round(np.mean(sizes[codec]), 3),
                "split": split, "images": len(index), "views": len(each), "mean_levels": round(means.mean(), 3),
                "psnr_db": round(np.mean(10 * np.log10(255**2 / squares)), 2),
                "psnr_db_of_mean_square": round(10 * np.log10(255**2 / squares.mean()), 2), "short": short,
                "image_size": SIDE,
            }
        )  # fmt: skip
    return found


def run_loss(args: argparse.Namespace, where: dict[str, Any]) -> list[dict[str, Any]]:
    """Prints and returns the rows."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write_photographs(folder / "photographs", args.short)
        rows += loss_rows("scikit-learn's photographs", folder / "photographs", args.views, args.short)
        write_pictures(folder / "pictures", args.images, args.short)
        rows += loss_rows("pictures", folder / "pictures", 1, args.short)
    print("data                        codec       split  bits/pixel  views  levels   PSNR dB  of the mean square")
    for row in rows:
        print(
            f"{row['data']:26}  {row['codec']:10}  {row['split']:5}  {row['bits_per_pixel']:10.2f}  {row['views']:5}  "
            f"{row['mean_levels']:6.2f}  {row['psnr_db']:8.2f}  {row['psnr_db_of_mean_square']:8.2f}"
        )
    return [{**row, "pillow": where["pillow"], **{name: where[name] for name in WHERE}} for row in rows]


# --------------------------------------------------------------------------------------------------------------------
# digits


def train_all(folder: pathlib.Path, seeds: int, bits: float, epochs: int | None, jobs: int) -> tuple[Outcome, Outcome]:
    """Students by METHODS from the files in folder/files/digits, and from the pack of them in folder/pack, by the same
    teacher, which learns from the files.
    """
    from rich.console import Console

    from ijckd_fast import compare
    from ijckd_fast.data.prepare import BlockPack, pack
    from ijckd_fast.errors import UserError
    from ijckd_fast.train.config import load_preset

    shorter = {} if epochs is None else {"epochs": epochs, "warmup_epochs": 0}
    found = []
    for data, settings in (
        ("files", {"data_dir": compare.DIGITS, "teacher": {**load_preset("digits_teacher"), "tensorboard": False}}),
        ("blocks", {"data_dir": str(folder / "pack"), "teacher": str(folder / "files" / "teacher")}),
    ):
        if data == "blocks":
            pack(folder / "files" / compare.DIGITS, folder / "pack", BlockPack(bits=bits))
        comparison = compare.Comparison(
            name=data,
            methods={method: {"objective": method} for method in METHODS},
            base={
                **load_preset("digits_student"), "tensorboard": False, **shorter,
                "data_backend": "dali" if data == "files" else "blocks",
            },
            seeds=seeds,
            **settings,
        )  # fmt: skip
        outcome = compare.train_all(comparison, folder / data, jobs=jobs, console=Console())
        if outcome.failed:
            raise UserError(f"{len(outcome.failed)} runs failed, see above: {', '.join(outcome.failed)}")
        found.append(outcome)
    return found[0], found[1]


def top1_on_files(folder: pathlib.Path, method: str, seed: int) -> float:
    """Of a student from blocks on the validation files, percent."""
    from ijckd_fast import compare
    from ijckd_fast.evaluate import evaluate
    from ijckd_fast.train import load_run

    run = compare.folder_of(folder / "blocks", "", method, seed)
    loaded = load_run(run, data_dir=str(folder / "files" / compare.DIGITS), data_backend="dali")
    with loaded.loader(loaded.index()) as loader:
        return evaluate(loaded.distiller.predict, loader, device=loaded.device).top1


def run_digits(args: argparse.Namespace, where: dict[str, Any]) -> list[dict[str, Any]]:
    """Prints and returns the rows."""
    from ijckd_fast.compare import paired_interval
    from ijckd_fast.compare.figures import top1
    from ijckd_fast.data.prepare import pack_loss

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) if args.output is None else args.output
        files, blocks = train_all(folder, args.seeds, args.bits, args.epochs, args.jobs)
        assert files.teacher is not None
        loss = pack_loss(folder / "pack", "train")
        assert loss is not None
        for method in METHODS:
            ours = {
                "files": {seed: top1_on_files(folder, method, seed) for seed in range(args.seeds)},
                "own": top1(blocks.runs[""][method]),
            }
            theirs = top1(files.runs[""][method])
            for evaluated_on, accuracies in ours.items():
                interval = paired_interval(accuracies, theirs)
                assert interval is not None
                rows.append(
                    {
                        "what": "pack_study", "data": "digits", "method": method, "bits": args.bits,
                        "pack_mean_levels": loss.mean_levels, "evaluated_on": evaluated_on, "seeds": args.seeds,
                        **_spread("files", theirs), **_spread("blocks", accuracies),
                        **dict(zip(("difference", "difference_low", "difference_high"), interval, strict=True)),
                        "val_images": files.runs[""][method][0]["last"]["images"],
                        "teacher_top1_percent": files.teacher["last"]["top1_percent"],
                        **{name: where[name] for name in ("dali", "pillow", *WHERE)},
                    }
                )  # fmt: skip
    rows = [{name: round(x, 3) if isinstance(x, float) else x for name, x in row.items()} for row in rows]
    print("method  evaluated on   from files        from blocks       difference [95 % interval], points")
    for row in rows:
        both = (f"{row[f'{data}_top1_mean']:.2f} ± {row[f'{data}_top1_std']:.2f} %" for data in ("files", "blocks"))
        interval = f"{row['difference']:+.2f} [{row['difference_low']:+.2f}, {row['difference_high']:+.2f}]"
        print(f"{row['method']:6}  {row['evaluated_on']:12}   {'    '.join(both)}    {interval}")
    return rows


def _spread(name: str, accuracies: dict[int, float]) -> dict[str, float]:
    values = list(accuracies.values())
    return {f"{name}_top1_mean": statistics.mean(values), f"{name}_top1_std": statistics.stdev(values)}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="study", required=True)
    at_least_two = loader_benchmark.above(1)
    loss = commands.add_parser("loss", help="of the encoding alone, beside JPEG's")
    loss.add_argument("--views", type=loader_benchmark.above(0), default=500, help="training crops of each photograph")
    loss.add_argument(
        "--images", type=at_least_two, default=256, help="ImageNet-like pictures, a training crop of each"
    )
    loss.add_argument("--short", type=int, default=256, help="shorter side of the images, pixels")
    records.add_save(loss, "pack_loss.csv")
    digits = commands.add_parser("digits", help="accuracies from files and from blocks")
    digits.add_argument("--seeds", type=at_least_two, default=5)
    digits.add_argument("--bits", type=float, default=6, help="of the block pack: bits a pixel")
    digits.add_argument("--epochs", type=int, help="of the students (default: the demo's)")
    digits.add_argument("--jobs", type=int, default=2, help="runs side by side")
    digits.add_argument("--output", type=pathlib.Path, help="folder that keeps the runs (default: none does)")
    records.add_save(digits, "block_packs.csv")
    args = parser.parse_args(arguments)

    import PIL

    from ijckd_fast.errors import UserError

    columns, run = (LOSS, run_loss) if args.study == "loss" else (DIGITS, run_digits)
    versions = {"dali": loader_benchmark.dali_version(), "pillow": PIL.__version__}
    try:
        records.check(args.save, columns)
        rows = run(args, records.environment("cpu") | versions)
    except UserError as error:
        parser.error(str(error))
    records.append(args.save, columns, rows)
    print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
