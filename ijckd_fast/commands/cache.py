"""`ijckd-fast cache`: a teacher's features of every training image, written once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from ijckd_fast import streams
from ijckd_fast.commands import Arguments, Outcome
from ijckd_fast.commands.options import add_settings
from ijckd_fast.errors import one_of
from ijckd_fast.train.mistakes import require_data, require_net

if TYPE_CHECKING:
    from ijckd_fast.train import TrainConfig

SUMMARY = "Write a teacher's features once, to train students without running it."
DESCRIPTION = (
    "Writes a teacher's pooled features for V views (crop and flip) of every training image to OUT. ijckd-fast train "
    "--teacher cache:OUT then never builds the teacher's backbone, with the same images, seed, crops and data "
    "backend, without mixup, cutmix, repeats and sizes. Takes V x images x channels x 2 bytes. In the end some views "
    "are computed again and compared: exit code 1, and their names, if they differ. Interrupted, it continues where "
    "it stopped when it is run again; a finished cache is verified again, and what is damaged is made again. Where "
    "standard output is no terminal, its last line is one JSON object."
)
STOPPED = ", finished chunks are kept: the same command continues where it stopped"


def add_arguments(parser: ArgumentParser) -> None:
    """Where to, how many views, and the settings that a cache depends on."""
    from ijckd_fast.distill import FROM_CACHE
    from ijckd_fast.train.config import CACHE_CHUNK_IMAGES, CACHE_FIELDS, CACHE_VERIFY

    parser.epilog = f"Objectives that train from a cache: {one_of(FROM_CACHE)}."
    parser.add_argument("out", type=str, help="folder for the cache: a new or empty one, or a cache to continue")
    parser.add_argument(
        "--views",
        type=int,
        required=True,
        help=(
            "V, views of each image: epoch e of a training sees those of epoch e modulo V, so that with fewer views "
            "than epochs they are seen again; as many as --epochs lose nothing"
        ),
    )
    parser.add_argument(
        "--config", type=str, help="YAML file or preset that the students will be trained with; options override it"
    )
    parser.add_argument(
        "--chunk-images",
        type=int,
        default=CACHE_CHUNK_IMAGES,
        help="images in a chunk, what is written at once and is lost at most when it is interrupted",
    )
    parser.add_argument(
        "--verify",
        type=int,
        default=CACHE_VERIFY,
        help="views, drawn at random, to compute again when the cache is finished; 0: none",
    )
    parser.add_argument("--verify-seed", type=int, help="seed of that draw; default: another one each time")
    parser.add_argument("--overwrite", action="store_true", help="delete the cache that is in OUT")
    add_settings(parser, CACHE_FIELDS)


def run(args: Arguments) -> Outcome:
    """Writes the cache, or what is missing of it, and verifies it."""
    config = _config(args)
    require_data(config.data_dir)
    if config.teacher is not None:
        require_net(config.teacher)

    from rich.console import Console

    from ijckd_fast.caching import make_cache

    row, wrong = make_cache(
        config,
        args.out,
        args.views,
        chunk_images=args.chunk_images,
        verify=args.verify,
        verify_seed=args.verify_seed,
        overwrite=args.overwrite,
        console=Console(),
        progress=streams.shows_bars(),
    )
    for line in wrong:
        print(line)
    if wrong:
        print(
            f"{len(wrong)} of the views computed again differ: the cache is not to be trained from; --overwrite makes "
            "it from scratch"
        )
    return Outcome([row], 1 if wrong else 0)


def _config(args: Arguments) -> TrainConfig:
    """The settings of the students' training that matter to the cache: those of --config, and over them the options."""
    from ijckd_fast.train import make_config
    from ijckd_fast.train.config import CACHE_FIELDS, UNCACHED_FIELDS, load_preset, preset_path, typed
    from ijckd_fast.train.layered import layered, teachers_run, with_pixels

    preset: dict[str, Any] = {}
    if args.config is not None:
        of_preset = typed(load_preset(args.config), str(preset_path(args.config)))
        preset = {name: of_preset[name] for name in (*CACHE_FIELDS, *UNCACHED_FIELDS) if name in of_preset}
    given = {name: args.given[name] for name in CACHE_FIELDS if name in args.given}
    values = layered(preset, given)
    return make_config({**with_pixels(values, teachers_run(values)), "objective": "kd", "head": "reference"})
