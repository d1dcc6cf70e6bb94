"""Options that several commands have: those of a finished run, and settings of a training by name.

The settings are imported when options are added: their declarations need torch, which `--help` and `doctor` do without.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionYesNo, ArgumentParser

from ijckd_fast.commands import Arguments
from ijckd_fast.train.config import FOLDER_FIELDS

if TYPE_CHECKING:
    from ijckd_fast.data import DataFolder
    from ijckd_fast.train import LoadedRun

DATA = ("class_list", *FOLDER_FIELDS)
"""Settings that say of a data folder what it does not say itself; of a finished run FOLDER_FIELDS: it has its classes.
"""

_THE_RUNS = "default: the run's, with the run's --data-dir"

# What can be changed of a finished run that is looked at.
_OF_RUN = {
    "data_dir": "folder with val/<class>/*; default: the run's",
    "val_labels": f"file that names each image's class, for a val/ without class folders; {_THE_RUNS}",
    "val_dir": f"where the validation images are, if not in --data-dir; {_THE_RUNS}",
    "val_fraction": f"part of the training images that is held out for validation; {_THE_RUNS}",
    "val_seed": f"seed that --val-fraction draws by; {_THE_RUNS}",
    "label_key": f"of webdataset shards: cls or json:FIELD; {_THE_RUNS}",
    "image_column": f"of Parquet files: column with the images' bytes; {_THE_RUNS}",
    "label_column": f"of Parquet files: column with the labels; {_THE_RUNS}",
    "teacher_checkpoint": "where the teacher's weights are now, if they were moved",
    "teacher_weights": "which weights of that file: auto, ema, raw or a name; default: the run's",
    "teacher_cache": "where the cache is now that the run was trained from",
    "batch_size": "images per step; default: the run's",
    "workers": "decoding threads; default: the run's",
    "data_backend": "default: the run's",
    "device": "auto: the GPU if there is one",
}


def add_run(parser: ArgumentParser, *names: str, **helps: str) -> None:
    """The run to look at, --best, and those of _OF_RUN that are named, which `load` takes.

    helps  texts for named options instead of _OF_RUN's
    """
    from ijckd_fast.train.config import FIELDS, TYPES

    parser.add_argument("run", type=str, help="folder of a run, or a last.pt or best.pt")
    parser.add_argument(
        "--best", action="store_true", help="of a folder take best.pt; default: last.pt, as in published results"
    )
    for name in names:
        default = FIELDS[name].default if name == "device" else None
        parser.add_argument(option(name), type=TYPES[name], default=default, help=helps.get(name, _OF_RUN[name]))


def load(args: Arguments, **changes: Any) -> LoadedRun:
    """The run that the options of `add_run` ask for, with further `changes` of its settings; prints its notes."""
    from ijckd_fast.train import run_folder

    run_folder.checkpoint_of(args.run, args.best)  # a mistyped run waits for no torch
    from ijckd_fast.train import load_run

    asked = {name: getattr(args, name) for name in _OF_RUN if hasattr(args, name)}
    run = load_run(args.run, best=args.best, **asked, **changes)
    for note in run.notes:
        print(note)
    return run


def add_settings(parser: ArgumentParser, names: Iterable[str] | None = None, several: Iterable[str] = ()) -> None:
    """Settings of a training under their headings, with their defaults.

    names    which; None: all
    several  those that may be given more than once
    """
    from ijckd_fast.train.config import FIELDS, GROUPS, TYPES, help_of

    groups: dict[str, Any] = {}
    for name, field in FIELDS.items():
        heading = GROUPS[name]
        if names is not None and name not in names:
            continue
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        kind: dict[str, Any] = {"type": TYPES[name]}
        if TYPES[name] in (bool, bool | None):
            kind = {"action": ActionYesNo(yes_prefix="", no_prefix="no-")}
        elif name in several:
            kind = {"action": "append"}  # of words
        groups[heading].add_argument(option(name), **kind, default=field.default, help=help_of(name))


def add_unset_settings(parser: ArgumentParser, *names: str, default: str = "") -> None:
    """Settings of a training that are None where they are not given; `default` says what holds then."""
    from ijckd_fast.train.config import TYPES, help_of

    for name in names:
        text = help_of(name)
        if default:
            text = f"{text.partition('; default: ')[0]}; default: {default}"
        parser.add_argument(option(name), type=TYPES[name], help=text)


def data_folder(args: Arguments) -> DataFolder:
    """The folder DATA_DIR with what the options of DATA say of it."""
    from ijckd_fast.data import DataFolder

    return DataFolder.of(args)


def option(name: str) -> str:
    """--data-dir for data_dir."""
    return f"--{name.replace('_', '-')}"


def rows_of_splits(folder: str, done: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """A row for each split of what was unpacked into a folder; prints them for people."""
    for split, found in done.items():
        print(
            f"{folder}/{split}: {found['images']:,} images of {found['classes']:,} classes, {found['written']:,} of "
            "them written now"
        )
    return [{"split": split, **found} for split, found in done.items()]
