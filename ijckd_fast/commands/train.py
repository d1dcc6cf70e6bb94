"""`ijckd-fast train`: one net after the other, begun, continued, or begun from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentParser

from ijckd_fast.commands import Arguments, Outcome
from ijckd_fast.commands.options import add_settings
from ijckd_fast.errors import UserError
from ijckd_fast.train.mistakes import refuse_mistakes

if TYPE_CHECKING:
    from ijckd_fast.train import TrainConfig

SUMMARY = "Train or resume one net."
DESCRIPTION = (
    "Trains one net, by distillation or alone. Settings: those of --config, and over them the options. --student "
    "several times: one net after the other, each in its own folder (of --output-dir, if it is given); the same "
    "command again continues where it stopped."
)
STOPPED = " before the first step, what was decoded for the index is kept: the same command begins again"

_PRINT_FLAGS = ("skip_default", "skip_unset")


def add_arguments(parser: ArgumentParser) -> None:
    """Every setting, and what is to become of a run that is there."""
    from ijckd_fast.train.config import preset_names

    parser.add_argument(
        "--config",
        action="append",
        help=f"YAML file, or a preset: {', '.join(preset_names())}; several times: later ones override earlier ones",
    )
    parser.add_argument(
        "--print-config",
        type=str,
        nargs="?",
        const="",
        metavar="FLAGS",
        help="print the settings that --config and the options give, as YAML, and exit; flags, separated by commas: "
        f"{', '.join(_PRINT_FLAGS)}",
    )
    parser.add_argument(
        "--resume",
        type=str,
        help="folder of an interrupted run: continues exactly where its last.pt (or the file named) was written",
    )
    parser.add_argument("--overwrite", action="store_true", help="delete the run that is in --output-dir")
    add_settings(parser, several=["student"])


def run(args: Arguments) -> Outcome:
    """Trains; everything that is written is in the run's folder."""
    from ijckd_fast.train import make_config
    from ijckd_fast.train.layered import teachers_run, with_pixels

    given, students = _settings(args), args.given.get("student", [])
    if args.print_config is not None:
        _print_settings(given, args.print_config)
        return Outcome()
    if args.resume is not None:
        _refuse_with_resume(students, args.overwrite)
        _continue(args.resume, given)
        return Outcome(in_files=True)
    given = with_pixels(given, teachers_run(given))
    if len(students) > 1:
        _train_each(students, given, args.overwrite)
    else:
        _train(make_config(given), overwrite=args.overwrite)
    return Outcome(in_files=True)


def _train(config: TrainConfig, **how: Any) -> None:
    refuse_mistakes(config)

    from rich.console import Console

    from ijckd_fast.train import train

    train(config, console=Console(), **how)


def _settings(args: Arguments) -> dict[str, Any]:
    """What --config and the options set, no defaults; of several students the last one."""
    from ijckd_fast.train.config import FIELDS, load_preset, preset_path, typed
    from ijckd_fast.train.layered import layered

    options = {name: value for name, value in args.given.items() if name in FIELDS}
    if "student" in options:
        options["student"] = options["student"][-1]
    objective = options.get("objective")
    for name in reversed(args.config or ()):
        objective = objective or load_preset(name).get("objective")
    presets = (typed(load_preset(name, objective), str(preset_path(name))) for name in args.config or ())
    return layered(*presets, options)


def _print_settings(values: dict[str, Any], flags: str) -> None:
    from ijckd_fast.train.config import FIELDS

    chosen = set(filter(None, flags.split(",")))
    if chosen - set(_PRINT_FLAGS):
        raise UserError(f"--print-config takes {' and '.join(_PRINT_FLAGS)}, got {flags!r}")
    if "skip_default" in chosen:
        values = {name: value for name, value in values.items() if value != FIELDS[name].default}
    if "skip_unset" in chosen:
        values = {name: value for name, value in values.items() if value is not None}
    print(yaml.safe_dump(values, sort_keys=False), end="")


def _refuse_with_resume(students: list[str], overwrite: bool) -> None:
    if len(students) > 1:
        raise UserError(
            "--resume continues one run, got several times --student: give the same command without --resume, it "
            "continues each student's run"
        )
    if overwrite:
        raise UserError("--resume continues a run and --overwrite deletes it: give one of them")


def _continue(resume: str, given: dict[str, Any]) -> None:
    """Continues a run, a folder or a checkpoint in it, with the settings that are given changed."""
    from ijckd_fast.train import run_folder

    folder, checkpoint = Path(resume), run_folder.LAST
    if folder.suffix == ".pt":
        folder, checkpoint = folder.parent, folder.name
    if not folder.is_dir():
        raise run_folder.config_refused(folder, run_folder.recorded(folder))

    from ijckd_fast.train import make_config, settings_of

    begun = settings_of(folder, checkpoint if (folder / checkpoint).exists() else run_folder.to_continue_from(folder))
    _refuse_another_batch(folder, begun, given)
    config = make_config({**begun, **_teacher_moved(given), **given, "output_dir": str(folder)})
    _train(config, resume=True, resume_from=checkpoint)


def _teacher_moved(given: dict[str, Any]) -> dict[str, None]:
    """The settings of a begun run that --teacher replaces: it says where the weights, or the cache, are now."""
    from ijckd_fast.train import run_folder
    from ijckd_fast.train.layered import CACHE

    teacher = given.get("teacher") or ""
    moved: dict[str, None] = {}
    if Path(teacher).suffix == ".pt" or (teacher and Path(teacher, run_folder.LAST).is_file()):
        moved["teacher_checkpoint"] = None
    if teacher.startswith(CACHE):
        moved["teacher_cache"] = None
    return moved


def _refuse_another_batch(folder: Path, begun: dict[str, Any], given: dict[str, Any]) -> None:
    """A run continues with the global batch it was begun with, however many processes there are now."""
    from ijckd_fast.parallel import world_size

    if "batch_size" not in given or "global_batch" in given or not begun.get("global_batch"):
        return
    expected = begun["global_batch"] // world_size()
    if given["batch_size"] != expected:
        raise UserError(
            f"{folder} takes {begun['global_batch']} images a step, which is {expected} for each of {world_size()} "
            f"processes, got --batch-size {given['batch_size']}: leave it out, or start a new run in another "
            "--output-dir"
        )


def _train_each(students: list[str], given: dict[str, Any], overwrite: bool) -> None:
    """Students one after the other, each in its own folder; a run that is there is continued, if it is not finished."""
    from ijckd_fast.train import make_config, resolve, run_folder

    configs = []
    for student in students:
        values = {**given, "student": student}
        if given.get("output_dir") is not None:
            values["output_dir"] = str(Path(given["output_dir"], student.replace("/", "-")))
        configs.append(resolve(make_config(values)))
    folders = [Path(config.output_dir or "") for config in configs]
    twice = [folder for folder in folders if folders.count(folder) > 1]
    if twice:
        raise UserError(f"two students would be trained in {twice[0]}, expected one each: give each --student once")
    for number, (student, config, folder) in enumerate(zip(students, configs, folders, strict=True), 1):
        begun = any((folder / name).exists() for name in (run_folder.CONFIG, run_folder.LAST))
        try:
            _train(config, resume=begun and not overwrite, overwrite=overwrite)
        except UserError as error:
            raise UserError(f"student {student} ({number} of {len(students)}): {error}") from error
