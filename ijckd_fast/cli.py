"""The command line: `ijckd-fast COMMAND`, see COMMANDS. Arguments in, one function call, figures out.

Whatever needs torch is imported inside the command that needs it.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from jsonargparse import ActionYesNo, ArgumentParser

from ijckd_fast import files
from ijckd_fast.errors import UserError, did_you_mean, one_of

if TYPE_CHECKING:
    from ijckd_fast.data import Index
    from ijckd_fast.distill import Distiller
    from ijckd_fast.train import TrainConfig


class _Settings:
    """`ijckd_fast.train.config`, imported on first use: it needs torch, which `--help` and `doctor` do without."""

    def __getattr__(self, name: str) -> Any:
        from ijckd_fast.train import config

        return getattr(config, name)


settings = _Settings()


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for a user's mistake (one sentence on stderr), 128 + n for signal n."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        code = _dispatch(arguments)
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # One of several processes: to leave the usual way could wait for ever for those that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _dispatch(arguments: list[str]) -> int:
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_help())
            return 0
        name, *rest = arguments
        if name not in COMMANDS:
            raise UserError(
                f"unknown command '{name}': wanted one of {', '.join(COMMANDS)}{did_you_mean(name, COMMANDS)}"
            )
        return COMMANDS[name](_normalise(rest))
    except UserError as error:
        return _complain(str(error), 2)
    except ImportError as error:
        return _complain(f"{error}. `ijckd-fast doctor` says what is missing", 2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _complain(
            f"no space left on the device{f' for {error.filename}' if error.filename else ''}: free some space", 2
        )
    except KeyboardInterrupt as stop:  # train.Stopped carries the signal and says how to go on
        return _complain(str(stop) or "interrupted", 128 + getattr(stop, "signum", signal.SIGINT))


def train(arguments: list[str]) -> int:
    """Train or resume one net."""
    parser = _train_parser()
    given = parser.parse_args(
        _with_preset_paths(arguments), defaults=False
    ).as_dict()  # only what the user or a YAML file sets
    resume, overwrite = given.pop("resume", None), given.pop("overwrite", False)
    given.pop("config", None)
    if _values_of("--batch-size", arguments) and not _values_of("--global-batch", arguments):
        given.pop("global_batch", None)  # the preset's, which this option replaces
    students = _values_of("--student", arguments)
    if len(students) > 1:
        if resume is not None:
            raise UserError(
                "--resume goes on with one run, got several times --student: give the same command without --resume, it goes on with "
                "each student's run"
            )
        return _train_each(students, given, overwrite)

    from rich.console import Console

    from ijckd_fast.parallel.processes import world_size
    from ijckd_fast.train import run_folder, train as run

    if resume is None:
        run(settings.make_config(given), overwrite=overwrite, console=Console())
        return 0
    if overwrite:
        raise UserError("--resume continues a run and --overwrite deletes it: give one of them")
    folder, resume_from = Path(resume), run_folder.LAST
    if folder.suffix == ".pt":
        folder, resume_from = folder.parent, folder.name
    begun = run_folder.read_config(folder)
    if Path(given.get("teacher") or "").suffix == ".pt" or Path(given.get("teacher") or "-", run_folder.LAST).is_file():
        begun["teacher_checkpoint"] = None  # the teacher's run was moved: this path replaces the old one
    if "batch_size" in given and "global_batch" not in given and begun.get("global_batch"):
        wanted = begun["global_batch"] // world_size()
        if given["batch_size"] != wanted:
            raise UserError(
                f"{folder} takes {begun['global_batch']} images a step, which is {wanted} for each of {world_size()} processes, got "
                f"--batch-size {given['batch_size']}: leave it out, or start a new run in another --output-dir"
            )
    if (given.get("teacher") or "").startswith("cache:"):
        begun["teacher_cache"] = None  # likewise
    config = settings.make_config({**begun, **given, "output_dir": str(folder)})
    run(config, resume=True, resume_from=resume_from, console=Console())
    return 0


def _train_each(students: list[str], given: dict[str, Any], overwrite: bool) -> int:
    """Trains students one after the other, each in its own folder; a run that is there is gone on with, a finished one passed over."""
    from rich.console import Console

    from ijckd_fast.train import resolve, run_folder, train as run

    configs = []
    for student in students:
        values = {**given, "student": student}
        if given.get("output_dir") is not None:
            values["output_dir"] = str(Path(given["output_dir"], student.replace("/", "-")))
        configs.append(resolve(settings.make_config(values)))
    folders = [Path(config.output_dir or "") for config in configs]
    twice = [folder for folder in folders if folders.count(folder) > 1]
    if twice:
        raise UserError(f"two students would be trained in {twice[0]}, wanted one each: give each --student once")
    for number, (student, config, folder) in enumerate(zip(students, configs, folders, strict=True), 1):
        try:
            goes_on = not overwrite and (folder / run_folder.CONFIG).is_file()
            run(config, resume=goes_on, overwrite=overwrite, console=Console())
        except UserError as error:
            raise UserError(f"student {student} ({number} of {len(students)}): {error}") from error
    return 0


def _train_parser() -> _Parser:
    parser = _parser(
        "train",
        "Trains one net, by distillation or alone. Settings: --config first, options after it override. --student several times: one net "
        "after the other, each in its own folder (of --output-dir, if it is given); the same command again goes on where it stopped.",
    )
    parser.add_argument(
        "--config", action="config", help=f"YAML file, or a preset: {', '.join(settings.preset_names())}"
    )
    parser.add_argument(
        "--resume",
        type=str,
        help="folder of an interrupted run: goes on exactly where its last.pt (or the file named) was written",
    )
    parser.add_argument("--overwrite", action="store_true", help="delete the run that is in --output-dir")
    _add_settings(parser, settings.FIELDS)
    return parser


def _add_settings(parser: _Parser, names: Iterable[str]) -> None:
    """Options for settings of TrainConfig, under their headings."""
    groups: dict[str, Any] = {}
    heading = ""
    for name, field in settings.FIELDS.items():
        heading = settings.GROUPS.get(name, heading)
        if name not in names:
            continue
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        option = f"--{name.replace('_', '-')}"
        if settings.TYPES[name] is bool:
            groups[heading].add_argument(
                option,
                action=ActionYesNo(yes_prefix="", no_prefix="no-"),
                default=field.default,
                help=settings.help_of(name),
            )
        else:
            groups[heading].add_argument(
                option, type=settings.TYPES[name], default=field.default, help=settings.help_of(name)
            )


def cache(arguments: list[str]) -> int:
    """Write a teacher's features once, to train students without running it."""
    from ijckd_fast.distill import FROM_CACHE

    parser = _parser(
        "cache",
        "Writes a teacher's pooled features for V views (crop and flip) of every training image to OUT. ijckd-fast train --teacher "
        f"cache:OUT then never builds the teacher's backbone; objectives {one_of(FROM_CACHE)}, without mixup, cutmix, repeats and "
        "sizes, with the same images, seed, crops and data backend. Takes V x images x channels x 2 bytes. In the end some views are "
        "computed again and compared: exit code 1, and their names, if they differ. Interrupted, it goes on where it stopped when it "
        "is run again; a finished cache is verified again. The last line of standard output is one JSON object.",
    )
    parser.add_argument("out", type=str, help="folder for the cache: a new or empty one, or a cache to go on with")
    parser.add_argument(
        "--views",
        type=int,
        required=True,
        help="V, views of each image: epoch e of a training sees those of epoch e modulo V, so that with fewer views than epochs they are "
        "seen again; as many as --epochs lose nothing",
    )
    parser.add_argument(
        "--config", type=str, help="YAML file or preset that the students will be trained with; options override it"
    )
    parser.add_argument(
        "--chunk-images",
        type=int,
        default=settings.CACHE_CHUNK_IMAGES,
        help="images in a chunk, what is written at once and is lost at most when it is interrupted",
    )
    parser.add_argument(
        "--verify",
        type=int,
        default=settings.CACHE_VERIFY,
        help="views, drawn at random, to compute again when the cache is finished; 0: none",
    )
    parser.add_argument("--verify-seed", type=int, help="seed of that draw; default: another one each time")
    parser.add_argument("--overwrite", action="store_true", help="delete the cache that is in OUT")
    _add_settings(parser, settings.CACHE_FIELDS)
    chosen = parser.parse_args(arguments)
    given = parser.parse_args(arguments, defaults=False).as_dict()
    preset: dict[str, Any] = {}
    if chosen.config is not None:
        words = _with_preset_paths([f"--config={chosen.config}"])
        preset = _train_parser().parse_args(words, defaults=False).as_dict()  # typed, as in train
        preset = {name: preset[name] for name in (*settings.CACHE_FIELDS, *settings.UNCACHED_FIELDS) if name in preset}
    given = {name: given[name] for name in settings.CACHE_FIELDS if name in given}

    from rich.console import Console

    from ijckd_fast.caching.make import make_cache

    row, wrong = make_cache(
        settings.make_config({**preset, **given, "objective": "kd", "head": "reference"}),
        chosen.out,
        chosen.views,
        chunk_images=chosen.chunk_images,
        verify=chosen.verify,
        verify_seed=chosen.verify_seed,
        overwrite=chosen.overwrite,
        console=Console(),
        progress=sys.stderr.isatty(),
    )
    for line in wrong:
        print(line)
    if wrong:
        print(
            f"{len(wrong)} of the views computed again differ: the cache is not to be trained from; --overwrite makes it anew"
        )
    print(json.dumps(row))
    return 1 if wrong else 0


def evaluate(arguments: list[str]) -> int:
    """Accuracy, agreement and cost of a trained net."""
    parser = _parser(
        "evaluate",
        "Top-1, top-5, agreement with the teacher, images/s and deployed cost of a run on a val/ folder. The last line of "
        "standard output is one JSON object.",
    )
    parser.add_argument("run", type=str, help="folder of a run, or a last.pt or best.pt")
    parser.add_argument("--data-dir", type=str, help="folder with val/<class>/*; default: the run's")
    parser.add_argument(
        "--val-labels",
        type=str,
        help=f"{settings.help_of('val_labels')}; default: the run's, with the run's --data-dir",
    )
    parser.add_argument(
        "--best", action="store_true", help="of a folder take best.pt; default: last.pt, as in published results"
    )
    parser.add_argument(
        "--teacher-checkpoint", type=str, help="where the teacher's weights are now, if they were moved"
    )
    parser.add_argument("--teacher-cache", type=str, help="where the cache is now that the run was trained from")
    parser.add_argument("--batch-size", type=int, help="images per step; default: the run's")
    parser.add_argument("--workers", type=int, help="decoding threads; default: the run's")
    parser.add_argument("--data-backend", type=settings.TYPES["data_backend"], help="default: the run's")
    parser.add_argument("--device", type=settings.TYPES["device"], default="auto", help="auto: the GPU if there is one")
    given = parser.parse_args(arguments).as_dict()

    import torch

    from ijckd_fast.evaluate import evaluate as measure
    from ijckd_fast.teacher_cache.reader import TeacherCache
    from ijckd_fast.train import amp_dtype_of, augment_of, build_val_loader

    path, state, config = _begun(given.pop("run"), given.pop("best"), given)
    device = torch.device(config.device)
    index = _val_index(state, config)
    distiller = _trained(path, state, config)
    amp_dtype = amp_dtype_of(config)
    with build_val_loader(config, index, device) as loader:
        teacher = None
        if config.teacher_cache is not None:
            teacher = TeacherCache(config.teacher_cache).on_val(index, augment_of(config), config.data_backend)
            if teacher is None:
                print(
                    "the cache has the teacher's answers to other images, or with other settings: no agreement; --teacher-checkpoint "
                    "brings the teacher itself"
                )
        elif distiller.teacher is not None:
            teacher = measure(distiller.teacher_logits, loader, device=device, amp_dtype=amp_dtype)
        result = measure(
            distiller.predict,
            loader,
            device=device,
            amp_dtype=amp_dtype,
            teacher=teacher,
        )
    params, macs = distiller.deployed_cost(config.image_size)
    against = ""
    if teacher is not None:
        against = f", agreement with the teacher {result.agreement:.2f} % (its own top-1: {teacher.top1:.2f} %)"
    print(
        f"{path} (step {state['step']}): {config.student} by {config.objective} on {result.images} images of {index.root}/val"
        + ("" if result.images == len(index) else f" ({len(index) - result.images} more could not be read)")
    )
    print(f"top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %{against}")
    print(
        f"deployed: {params:,} parameters, {macs:,} multiply-accumulates per image; {result.images / result.seconds:,.0f} images/s"
    )
    row = {
        "checkpoint": str(path),
        "step": state["step"],
        **result.row(),
        "teacher_top1_percent": None if teacher is None else teacher.top1,
        "params": params,
        "macs": macs,
    }
    print(json.dumps(row))
    return 0


def bound(arguments: list[str]) -> int:
    """Upper bounds on a student's error, what dominates them, what to change."""
    parser = _parser(
        "bound",
        "How far a trained student is from its teacher, in terms that bound its error through the teacher's classifier: the teacher's "
        "error, their disagreement, the margin form and the norm form. Beside them the distances of features and logits, the share "
        "of them that the classifier does not see, calibration, and each class. Says what dominates and what to change "
        "(docs/bound.md). For runs with a connector: ijckd, ijckd-pooled, srrl, simkd. Writes bound.md, bound.json, bound.csv and "
        "bound.png (bound-train.* for the training images). The last line of standard output is one JSON object.",
    )
    parser.add_argument("run", type=str, help="folder of a run, or a last.pt or best.pt")
    parser.add_argument(
        "--split",
        type=Literal["val", "train"],
        default="val",
        help="images to measure on; train: those the run was trained on, with their labels, in the evaluation's view",
    )
    parser.add_argument("--data-dir", type=str, help="folder with {train,val}/<class>/*; default: the run's")
    parser.add_argument(
        "--val-labels",
        type=str,
        help=f"{settings.help_of('val_labels')}; default: the run's, with the run's --data-dir",
    )
    parser.add_argument(
        "--best", action="store_true", help="of a folder take best.pt; default: last.pt, as in published results"
    )
    parser.add_argument("--output", type=str, help="folder for what is written; default: the run's folder")
    parser.add_argument(
        "--teacher-checkpoint",
        type=str,
        help="where the teacher's weights are now, if they were moved; wanted for a run that was trained from a cache",
    )
    parser.add_argument("--batch-size", type=int, help="images per step; default: the run's")
    parser.add_argument("--workers", type=int, help="decoding threads; default: the run's")
    parser.add_argument("--data-backend", type=settings.TYPES["data_backend"], help="default: the run's")
    parser.add_argument("--device", type=settings.TYPES["device"], default="auto", help="auto: the GPU if there is one")
    given = parser.parse_args(arguments).as_dict()
    split, output, run = given.pop("split"), given.pop("output"), Path(given.pop("run"))

    import torch
    from rich.console import Console

    from ijckd_fast.console import say
    from ijckd_fast.evaluate import BoundMeter, bound_stem, bound_table, chain_line, evaluate as measure, write_bound
    from ijckd_fast.train import amp_dtype_of, build_val_loader

    path, state, config = _begun(str(run), given.pop("best"), given)
    if state["config"]["connector"] == "none":
        raise UserError(
            f"{path} was trained by {state['config']['objective']} without a connector: wanted a run with one (ijckd, ijckd-pooled, srrl, "
            "simkd, or --connector), since the bound compares the student's connected features with the teacher's"
        )
    if config.connector == "none":  # _begun found no teacher
        raise UserError(
            f"the bound compares the student of {path} with its teacher {state['config']['teacher']}, whose weights are not there: give "
            "--teacher-checkpoint with their file"
        )
    if config.teacher_cache is not None:
        raise UserError(
            f"{path} was trained from the teacher cache {config.teacher_cache}, which has the teacher's features of views of the training "
            f"images, not of the {split} images in the evaluation's view: give --teacher-checkpoint with the weights of "
            f"{config.teacher}, and the teacher itself is asked"
        )
    folder = Path(output) if output is not None else path.parent
    files.require_writable(folder, "--output")
    device = torch.device(config.device)
    index = _split_index(state, config, split)
    if split == "train":
        index = index.subset(config.train_per_class, config.label_noise, config.seed)
    distiller = _trained(path, state, config)
    meter = BoundMeter(distiller)
    with build_val_loader(config, index, device) as loader:
        result = measure(meter.predict, loader, device=device, amp_dtype=amp_dtype_of(config), note=meter.note)
    images = meter.take()
    about = {
        "checkpoint": str(path),
        "step": state["step"],
        "split": split,
        "data": config.data_dir,
        "student": config.student,
        "teacher": config.teacher,
        "objective": config.objective,
        "connector": config.connector,
        "answers_through": config.infer_head,
        "evaluated_error_percent": 100 - result.top1,
        "unreadable": len(index) - result.images,
        "classes": index.num_classes,
        "channels": meter.geometry.weight.shape[1],
        "rank": meter.geometry.rank,
        "widest_class_distance": meter.geometry.widest,
        "seconds": result.seconds,
    }
    rows, advice = write_bound(folder, images, index.classes, about, distiller.objective)
    console = Console()
    console.print(bound_table(rows[0]))
    left_out = f" ({about['unreadable']} more could not be read)" if about["unreadable"] else ""
    say(
        console,
        f"{path} (step {state['step']}): {config.student} by {config.objective}, {split} images of {index.root}{left_out}",
    )
    say(
        console,
        "% of the images: student wrong <= teacher wrong + disagreement <= ... + margin form <= ... + norm form",
    )
    say(console, chain_line(rows[0]))
    if config.infer_head == "student":
        own = rows[0]["own_head_error_percent"]
        say(
            console,
            f"this student answers through its own classifier ({own:.2f} % wrong); the chain is about its answers through the teacher's",
        )
    for sentence in advice:
        say(console, f"- {sentence}")
    say(console, f"every figure, class by class, and plots: {folder / bound_stem(split)}.md, .csv, .json, .png")
    print(json.dumps({"rows": rows}))
    return 0


def export(arguments: list[str]) -> int:
    """Files to deploy a trained net with: safetensors, ONNX, the student for timm."""
    parser = _parser(
        "export",
        "Writes what answers after training (backbone, connector and classifier, BatchNorm folded) as model.safetensors with config.json "
        "and as model.onnx, and the student's own weights as student.safetensors, in its library's names; compares their answers "
        "with the trained net's on real images first, and counts and times the parts. Works on the CPU. Exit code 1, and nothing "
        "written, if the answers differ. The last line of standard output is one JSON object.",
    )
    parser.add_argument("run", type=str, help="folder of a run, or a last.pt or best.pt")
    parser.add_argument(
        "--out", type=str, help="folder for the files: a new or empty one; default: export in the run's folder"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --out")
    parser.add_argument(
        "--best", action="store_true", help="of a folder take best.pt; default: last.pt, as in published results"
    )
    parser.add_argument(
        "--onnx",
        action=ActionYesNo(yes_prefix="", no_prefix="no-"),
        default=True,
        help="write model.onnx as well; needs the packages onnx, onnxruntime and onnxscript",
    )
    parser.add_argument(
        "--images", type=int, default=200, help="images of val/ to compare the answers on, evenly spread"
    )
    parser.add_argument("--data-dir", type=str, help="folder with val/<class>/*; default: the run's")
    parser.add_argument(
        "--val-labels",
        type=str,
        help=f"{settings.help_of('val_labels')}; default: the run's, with the run's --data-dir",
    )
    parser.add_argument(
        "--teacher-checkpoint", type=str, help="where the teacher's weights are now, if they were moved"
    )
    parser.add_argument("--workers", type=int, help="decoding threads; default: the run's")
    parser.add_argument("--data-backend", type=settings.TYPES["data_backend"], help="default: the run's")
    given = parser.parse_args(arguments).as_dict()
    run, out, overwrite, best = (given.pop(name) for name in ("run", "out", "overwrite", "best"))
    onnx, images = given.pop("onnx"), given.pop("images")
    if images < 1:
        raise UserError(f"--images must be at least 1, got {images}")

    import numpy as np
    import torch
    from rich.console import Console

    from ijckd_fast import export as exporting
    from ijckd_fast.console import say
    from ijckd_fast.train import build_val_loader

    folder = Path(out or (Path(run) if Path(run).is_dir() else Path(run).parent) / "export").absolute()
    path, state, config = _begun(run, best, {**given, "device": "cpu", "decode": "cpu"})
    weights = config.teacher_checkpoint
    if config.infer_head == "teacher" and weights is not None and not Path(weights).is_file():
        raise UserError(
            f"the teacher's weights {weights} are not there, and the student answers through the teacher's classifier: say with "
            "--teacher-checkpoint where they are now"
        )
    # What can be refused at once is, before any image is read.
    exporting.refuse_occupied(folder, overwrite)
    if onnx:
        exporting.require_onnx()
    index = _val_index(state, config)
    distiller = _trained(path, state, config)
    config = dataclasses.replace(config, batch_size=min(config.batch_size, 32))  # a GPU's batch may not fit here
    ids = np.unique(np.linspace(0, len(index) - 1, min(images, len(index))).round().astype(np.int64))
    with build_val_loader(config, index, torch.device("cpu"), ids=ids) as loader:
        try:
            row = exporting.write_export(folder, distiller, config, state, loader, onnx=onnx, overwrite=overwrite)
        except exporting.AnswersDiffer as error:
            return _complain(str(error), 1)
    console = Console()
    console.print(exporting.cost_table(row))
    for line in exporting.summary_lines(row, folder):
        say(console, line)
    print(json.dumps({"folder": str(folder), "checkpoint": str(path), **row}))
    return 0


def _begun(run: str, best: bool, given: dict[str, Any]) -> tuple[Path, dict[str, Any], TrainConfig]:
    """The checkpoint of a run (a folder, last.pt or best.pt), what is in it, and the run's settings changed by those given.

    Where the student answers alone and its teacher's weights are not there, the settings are those without a teacher.
    """
    from ijckd_fast.distill import get_objective
    from ijckd_fast.train import checkpoint, resolve, run_folder

    path = Path(run)
    if path.is_dir():
        path /= run_folder.BEST if best else run_folder.LAST
    state = checkpoint.load(path)
    values = settings.for_evaluation(state["config"])
    if values["amp_dtype"] == "float16" and given.get("device") != "cuda":
        values["amp_dtype"] = None  # what the device has
    begun = settings.make_config(values)
    if given.get("data_dir") is not None:
        begun = dataclasses.replace(begun, val_labels=None)
    config = dataclasses.replace(begun, **{name: value for name, value in given.items() if value is not None})
    cache = config.teacher_cache
    if given.get("teacher_checkpoint") is not None and given.get("teacher_cache") is None:
        cache = None  # the teacher itself
    elif cache is not None and not Path(cache).is_dir():
        if config.infer_head == "teacher":
            raise UserError(
                f"the teacher cache {cache}, whose classifier the student answers through, is not there: give --teacher-cache with its "
                "folder, or --teacher-checkpoint with the teacher's weights"
            )
        print(f"the teacher cache {cache} is not there: no agreement; --teacher-cache names it")
        cache = None
    config = dataclasses.replace(config, teacher_cache=cache)
    if config.infer_head == "student" and not (
        cache or config.teacher_pretrained or Path(config.teacher_checkpoint or "").is_file()
    ):
        # The student answers alone; without its teacher only the agreement is missing.
        if config.teacher_checkpoint is not None:
            print(
                f"the teacher's weights {config.teacher_checkpoint} are not there: no agreement; --teacher-checkpoint names them"
            )
        alone = get_objective("ce")
        weights = {name: getattr(alone, name) for name in settings.OBJECTIVE_FIELDS}
        config = dataclasses.replace(config, objective="ce", teacher=None, teacher_checkpoint=None, **weights)
        state["learner"] = {k: v for k, v in state["learner"].items() if k.startswith("student.")}
    return path, state, resolve(config)


def _val_index(state: dict[str, Any], config: TrainConfig) -> Index:
    """The validation images of a run, with the classes it was trained on."""
    return _split_index(state, config, "val")


def _split_index(state: dict[str, Any], config: TrainConfig, split: Literal["train", "val"]) -> Index:
    """All images of a split, with the classes a run was trained on."""
    from ijckd_fast.data import build_index

    return build_index(
        config.data_dir,
        split,
        classes=state["classes"],
        labels=config.val_labels if split == "val" else None,
        verify=config.index_verify,
        trust_folders=not config.check_files,
        progress=sys.stderr.isatty(),
    )


def _trained(path: Path, state: dict[str, Any], config: TrainConfig) -> Distiller:
    """The nets of a checkpoint as _begun returns it, to be evaluated. UserError where the teacher is another one."""
    import torch

    from ijckd_fast.train import build_distiller, checkpoint, teacher_fingerprint

    distiller = build_distiller(config, len(state["classes"]), torch.device(config.device))
    if distiller.teacher is not None and teacher_fingerprint(distiller.teacher) != state["inputs"]["teacher"]:
        raise UserError(
            f"the teacher {config.teacher} is not the one {path} was trained with (its weights differ): give that one as "
            "--teacher-checkpoint"
        )
    checkpoint.load_into(distiller, state["learner"], path)
    return distiller.eval()


def index(arguments: list[str]) -> int:
    """Scan a data folder once and list its bad files."""
    parser = _parser(
        "index",
        "Decodes every image of a folder once and remembers which are good, so that training starts in seconds and never dies "
        "of a bad file. Run again it opens only files whose length or time has changed; train and evaluate ask only for the "
        "times of the folders, which show files that come and go but not one rewritten in place. The last line of standard "
        "output is one JSON object.",
    )
    parser.add_argument("data_dir", type=str, help="folder with train/<class>/* and val/<class>/*")
    parser.add_argument("--workers", type=int, default=0, help="decoding threads; 0: one per core")
    parser.add_argument(
        "--verify",
        type=settings.TYPES["index_verify"],
        default="full",
        help="full: decode every file; fast: headers and trailers only, damage inside goes unseen",
    )
    parser.add_argument("--fast", action="store_true", help="the same as --verify fast")
    for name in ("class_list", "val_labels"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=str, help=settings.help_of(name))
    parser.add_argument("--refresh", action="store_true", help="forget an earlier scan")
    given = parser.parse_args(arguments)

    from rich.console import Console

    from ijckd_fast.data.index import scan, summarize, summary_table

    rows: list[dict[str, Any]] = []
    classes = None
    for split in ("train", "val"):
        start = time.perf_counter()
        found = scan(
            given.data_dir,
            split,
            classes=classes,
            class_list=given.class_list,
            labels=given.val_labels if split == "val" else None,
            workers=given.workers,
            verify="fast" if given.fast else given.verify,
            refresh=given.refresh,
            progress=sys.stderr.isatty(),
        )
        classes = found.index.classes
        rows.append(summarize(found, time.perf_counter() - start))
    Console().print(summary_table(rows, given.data_dir))
    for home in dict.fromkeys(row["files"] for row in rows if row["files"]):
        print(f"the index, and lists of what was left out and why: {home}")
    print(json.dumps({"rows": rows}))
    return 0


def prepare_imagenet(arguments: list[str]) -> int:
    """Unpack ImageNet's archives into class folders."""
    parser = _parser(
        "prepare-imagenet",
        "Unpacks ILSVRC2012_img_train.tar (or ImageNet-21k's archive of archives) and ILSVRC2012_img_val.tar into OUT/train/<wnid>/ "
        "and OUT/val/<wnid>/. Interrupted, it goes on where it stopped when it is run again. The last line of standard output is "
        "one JSON object.",
    )
    parser.add_argument("out", type=str, help="folder for train/ and val/")
    parser.add_argument("--train-tar", type=str, help="archive of one archive per class")
    parser.add_argument("--val-tar", type=str, help="archive of the validation images; needs --val-labels")
    parser.add_argument(
        "--val-labels", type=str, help="file that names each image's class, e.g. Kaggle's LOC_val_solution.csv"
    )
    given = parser.parse_args(arguments)

    from ijckd_fast.data.prepare import prepare_imagenet as unpack

    done = unpack(
        given.out,
        train_tar=given.train_tar,
        val_tar=given.val_tar,
        val_labels=given.val_labels,
        progress=sys.stderr.isatty(),
    )
    _say_unpacked(given.out, done)
    return 0


def prepare_cifar(arguments: list[str]) -> int:
    """Unpack CIFAR-100's or CIFAR-10's archive into class folders."""
    parser = _parser(
        "prepare-cifar",
        "Writes the images of cifar-100-python.tar.gz or cifar-10-python.tar.gz, which its checksum tells apart, as PNG files to "
        "OUT/train/<class>/ and OUT/val/<class>/ (CIFAR's test images; CIFAR-100's fine classes), and the classes in the order of the "
        "labels to OUT/classes.txt. Fetches nothing: the archives are at https://www.cs.toronto.edu/~kriz/cifar.html. Interrupted, it "
        "goes on where it stopped when it is run again. The last line of standard output is one JSON object.",
    )
    parser.add_argument("out", type=str, help="folder for train/ and val/")
    parser.add_argument("--archive", type=str, help="the python version of either archive, as it was downloaded")
    given = parser.parse_args(arguments)

    from ijckd_fast.data.prepare import prepare_cifar as unpack

    _say_unpacked(given.out, unpack(given.out, given.archive, progress=sys.stderr.isatty()))
    return 0


def _say_unpacked(out: str, done: dict[str, dict[str, int]]) -> None:
    for split, found in done.items():
        print(
            f"{out}/{split}: {found['images']:,} images of {found['classes']:,} classes, {found['written']:,} of them written now"
        )
    print(json.dumps(done))


def pack(arguments: list[str]) -> int:
    """Re-encode a data folder once, smaller, where decoding is too slow."""
    parser = _parser(
        "pack",
        "Writes the images of DATA_DIR to OUT/{train,val}/shard-*.tar: training images with a shorter side above --short made smaller and "
        "encoded as JPEG, smaller JPEGs as they are, other formats encoded at their size; validation images as they are, so that "
        "accuracies stay comparable. Random crops of a small part of an image lose detail below --short: 256 is the fast choice, 400 to "
        "500 the careful one; how much the evaluation's view of training images changes is measured and printed. Every shard is read back "
        "before it gets its name. Interrupted, it goes on where it stopped when it is run again. The last line of standard output is one "
        "JSON object.",
    )
    parser.add_argument("data_dir", type=str, help="folder with train/<class>/* and val/<class>/*")
    parser.add_argument("out", type=str, help="folder for the pack: a new or empty one, or a pack to go on with")
    parser.add_argument("--short", type=int, default=256, help="shorter side, pixels; 0: keep sizes")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs, 1 to 95")
    parser.add_argument("--shard-images", type=int, default=1000, help="images in a shard")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")
    parser.add_argument("--splits", nargs="+", choices=["train", "val"], default=["train", "val"], help="what to pack")
    for name in ("class_list", "val_labels"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=str, help=settings.help_of(name))
    parser.add_argument(
        "--unreadable-limit",
        type=int,
        help="files of a split that may turn out unreadable, though the index found them good, before it stops with exit code 2; until "
        "then each is named and left out; default: a thousandth of the files, at least 8",
    )
    parser.add_argument("--overwrite", action="store_true", help="delete the pack that is in OUT, both splits")
    given = parser.parse_args(arguments)

    from rich.console import Console

    from ijckd_fast.data.prepare import PackSettings as Settings, pack as run, pack_table as summary_table

    rows = run(
        given.data_dir,
        given.out,
        Settings(given.short, given.quality, given.shard_images),
        splits=given.splits,
        workers=given.workers,
        class_list=given.class_list,
        val_labels=given.val_labels,
        unreadable_limit=given.unreadable_limit,
        overwrite=given.overwrite,
        progress=sys.stderr.isatty(),
    )
    Console().print(summary_table(rows, given.out))
    print(json.dumps({"rows": rows}))
    return 0


def bench(arguments: list[str]) -> int:
    """How far DALI's pixels, and a net's answers, are from Pillow's."""
    parser = _parser(
        "bench",
        "bench loader --parity: makes the same crops of the same images of a folder by DALI and by Pillow and compares the pixels, and "
        "with --model a net's answers. Exit code 1 if they differ by more than the trainer allows. The last line of standard output "
        "is one JSON object.",
    )
    parser.add_argument("what", type=Literal["loader"], help="loader")
    parser.add_argument(
        "--parity", action="store_true", help="compare DALI with Pillow (wanted; there is no other comparison)"
    )
    parser.add_argument(
        "--data-dir", type=str, help="folder with train/<class>/* and val/<class>/*; default: the run's"
    )
    for name in ("class_list", "val_labels"):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=str, help=f"{settings.help_of(name)}; default: the run's"
        )
    parser.add_argument(
        "--model",
        type=str,
        help="a net to ask on both: folder or checkpoint of a run, or a model with published weights",
    )
    parser.add_argument("--images", type=int, default=256, help="crops of each split")
    parser.add_argument(
        "--split",
        type=Literal["train", "val", "both"],
        default="both",
        help="train: random crops and flips; val: the evaluation's central crops",
    )
    parser.add_argument("--image-size", type=int, help="side of the crops, pixels; default: the run's, or 224")
    parser.add_argument(
        "--crop-padding", type=int, help=f"{settings.help_of('crop_padding')}; default: the run's, or 0"
    )
    parser.add_argument("--workers", type=int, default=2, help="decoding threads of each")
    parser.add_argument("--device", type=settings.TYPES["device"], default="auto", help="of the net, and of --decode")
    parser.add_argument(
        "--decode", type=settings.TYPES["decode"], help=f"{settings.help_of('decode')}; default: the run's, or cpu"
    )
    parser.add_argument(
        "--max-drift",
        type=float,
        default=settings.FIELDS["max_drift"].default,
        help="mean absolute difference allowed, grey levels",
    )
    given = parser.parse_args(arguments)
    if not given.parity:
        raise UserError(
            "bench loader compares DALI with Pillow: wanted --parity, found no comparison to make; add --parity"
        )
    if given.images < 1:
        raise UserError(f"--images must be at least 1, got {given.images}")

    import torch
    from rich.console import Console
    from rich.table import Table

    from ijckd_fast.console import say
    from ijckd_fast.data import build_index, parity
    from ijckd_fast.nets import is_model_name
    from ijckd_fast.train import augment_of, build_distiller, resolve

    changed = {"device": given.device, "workers": given.workers}
    if given.data_dir is not None:
        changed["data_dir"] = given.data_dir
    for name in ("decode", "class_list", "val_labels", "image_size", "crop_padding"):
        if given[name] is not None:
            changed[name] = given[name]
    classes = run = None
    if given.model is not None and not is_model_name(given.model):
        if not Path(given.model).exists():
            raise UserError(
                f"--model must be the folder or checkpoint of a run, or the name of a model with published weights, got {given.model!r}"
            )
        run = _begun(given.model, False, changed)
        _, state, config = run
        if given.image_size is not None:
            shorter = settings.default_eval_resize(config.image_size, config.crop_padding)
            config = dataclasses.replace(config, eval_resize=shorter)
        classes = state["classes"]
    else:
        named = {} if given.model is None else {"student": given.model, "student_pretrained": True}
        config = resolve(settings.make_config({"objective": "ce", **named, **changed}))

    distiller = None
    rows = []
    for split in ("train", "val") if given.split == "both" else (given.split,):
        found = build_index(
            config.data_dir,
            split,
            classes=classes,
            class_list=config.class_list,
            labels=config.val_labels if split == "val" else None,
            verify=config.index_verify,
            trust_folders=not config.check_files,
            progress=sys.stderr.isatty(),
        )
        classes = found.classes
        if given.model is not None and distiller is None:
            device = torch.device(config.device)
            distiller = _trained(*run) if run else build_distiller(config, len(classes), device).eval()
        compared = parity.compare(
            found,
            augment_of(config),
            images=given.images,
            threads=config.workers,
            logits_of=None if distiller is None else distiller.predict,
            device=config.device,
            decode=config.decode,
            on_bad=lambda path, why: warnings.warn(f"{path} cannot be read any more ({why})", stacklevel=2),
        )
        rows.append(
            {
                **compared._asdict(),
                "max_drift": given.max_drift,
                "image_size": config.image_size,
                "index": found.hash,
                **parity.versions(),
            }
        )
    table = Table(
        "split",
        "images",
        "mean",
        "worst image's",
        "pixels beyond 1 level",
        title=f"|DALI - Pillow| in grey levels of 0..255, {config.data_dir}",
    )
    for row in rows:
        table.add_row(
            row["split"],
            f"{row['images']:,}",
            f"{row['mean_levels']:.3f}",
            f"{row['worst_levels']:.3f}",
            f"{row['beyond_percent']:.2f} %",
        )
    console = Console()
    console.print(table)
    for row in rows:
        answers = ""
        if distiller is not None:
            answers = (
                f"; top-1 of {given.model} {row['dali_top1_percent']:.2f} % by DALI, {row['pillow_top1_percent']:.2f} % by Pillow, "
                f"{row['disagreements']} answers differ"
            )
        say(console, f"{row['split']}: the farthest is {row['worst_path']}{answers}")
    beyond = [row["split"] for row in rows if row["mean_levels"] > given.max_drift]
    if beyond:
        print(f"beyond the {given.max_drift:g} grey levels that the trainer allows: {', '.join(beyond)}")
    print(json.dumps({"rows": rows}))
    return 1 if beyond else 0


def demo(arguments: list[str]) -> int:
    """A teacher and one student by five methods, on digits, in a few minutes."""
    parser = _parser(
        "demo",
        "Writes the digits as JPEG files, trains a teacher, then the same small student by several methods, several seeds each. "
        "Runs that are there already are used again. The last line of standard output is one JSON object.",
    )
    parser.add_argument(
        "--output", type=str, default="runs/demo", help="folder for the images, the runs and the report"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs per method")
    parser.add_argument("--methods", type=str, default="ce,kd,srrl,simkd,ijckd", help="objectives, separated by commas")
    given = parser.parse_args(arguments)

    from rich.console import Console

    from ijckd_fast.compare import run_demo

    methods = [name.strip() for name in given.methods.split(",") if name.strip()]
    rows = run_demo(Path(given.output), seeds=given.seeds, methods=methods, console=Console())
    print(json.dumps({"rows": rows}))
    return 0


def compare(arguments: list[str]) -> int:
    """Several methods in several regimes on one dataset, several seeds each, with intervals."""
    parser = _parser(
        "compare",
        "Trains every method of a comparison in each of its regimes, seeds 0 ... N - 1, by the same loop, schedule and plan: a seed "
        "gives all methods the same images, crops and order. Reports mean, deviation and the differences seed by seed with 95 % "
        "intervals. Runs that are in the output folder already, with the same settings, code, images and teacher, are used again, an "
        "interrupted one goes on; others there are replaced. Exit code 1, and their names, if runs failed. The last line of standard "
        "output is one JSON object.",
    )
    parser.add_argument(
        "--config",
        type=str,
        required=True,
        help=f"YAML file (docs/compare.md), or a packaged comparison: {', '.join(settings.preset_names(settings.COMPARISONS))}",
    )
    parser.add_argument(
        "--output", type=str, help="folder for the runs and the report; default: runs/NAME of the comparison"
    )
    parser.add_argument("--data-dir", type=str, help=f"{settings.help_of('data_dir')}; default: the comparison's")
    parser.add_argument("--seeds", type=int, help="runs of each method in each regime; default: the comparison's")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs side by side, each a process that computes with one thread: the number of cores, or 1",
    )
    parser.add_argument(
        "--any-code",
        action="store_true",
        help="use runs that another version of ijckd-fast finished or began, too, even one that lacked some settings; default: they are "
        "trained anew",
    )
    given = parser.parse_args(arguments)

    from rich.console import Console

    from ijckd_fast.compare import comparison_table, load_comparison, train_all, write_comparison_report
    from ijckd_fast.console import say
    from ijckd_fast.train.run_folder import REPORT

    comparison = load_comparison(given.config, seeds=given.seeds, data_dir=given.data_dir)
    output = Path(given.output or f"runs/{comparison.name}")
    console = Console()
    counts = f"{len(comparison.methods)} methods x {len(comparison.regimes)} regimes x {comparison.seeds} seeds"
    say(console, f"{comparison.name}: {counts} in {output}")
    outcome = train_all(comparison, output, jobs=given.jobs, any_code=given.any_code, console=console)
    rows = write_comparison_report(output, comparison, outcome)
    uncut = Console(width=max(console.width, 110 + 26 * len(comparison.against)))  # a narrow terminal wraps its lines
    for regime in comparison.regimes:
        uncut.print(comparison_table(regime, [row for row in rows if row["regime"] == regime], comparison.against))
    for name, why in outcome.failed.items():
        say(console, f"failed: {name}: {why}")
    if outcome.failed:
        say(
            console,
            f"{len(outcome.failed)} runs failed; the others are kept: the same command trains only what is missing",
        )
    if rows:
        say(console, f"report: {output / REPORT}")
    print(json.dumps({"rows": rows}))
    return 1 if outcome.failed else 0


def recipes(arguments: list[str]) -> int:
    """The packaged teacher-student pairs and what each deploys."""
    parser = _parser(
        "recipes",
        "A table (Markdown) of the presets with a teacher: parameters, and multiply-accumulates per image in convolutions and linear "
        "layers, of the student with a classifier of its own and of what the preset deploys (backbone, connector, teacher's classifier). "
        "The nets are built with random weights: no data, nothing is downloaded. The last line of standard output is one JSON object.",
    )
    parser.add_argument("presets", type=str, nargs="*", default=[], help="names of presets; default: all")
    parser.add_argument("--objective", type=str, help="in the place of the presets'")
    parser.add_argument("--connector", type=str, help="in the place of the presets'")
    given = parser.parse_args(arguments).as_dict()

    from ijckd_fast.train import pairs

    changes = {key: given[key] for key in ("objective", "connector") if given[key] is not None}
    rows = []
    for name in given["presets"] or pairs.pair_names():
        rows.append({"preset": settings.preset_path(name).stem, **pairs.cost_row(*pairs.build_pair(name, **changes))})
        if len(rows) == 1:
            print(pairs.table_head())
        print(pairs.table_line(rows[-1]), flush=True)
    print(json.dumps({"rows": rows}))
    return 0


def study(arguments: list[str]) -> int:
    """The theory of distillation, measured beside its closed forms."""
    name = arguments[0] if arguments else ""
    if name in _STUDIES:
        return _STUDIES[name](arguments[1:])
    if name not in ("-h", "--help"):
        raise UserError(
            f"study wants its name first, linear or finite, got {name or 'none'}{did_you_mean(name, _STUDIES)}; ijckd-fast study --help "
            "says what each is"
        )
    _parser(
        "study",
        "linear: a linear teacher distilled into linear and deep-linear students (arXiv 2105.13093). finite: what hard labels, the "
        "teacher's probability of one label, and all of its probabilities are worth on finite domains (arXiv 2310.07838). Each writes a "
        "report, plots and a CSV file; ijckd-fast study linear|finite --help describes its options.",
        usage="ijckd-fast study linear|finite [options]",
    ).parse_args(arguments)
    return 0


def _study_linear(arguments: list[str]) -> int:
    from ijckd_fast.theory import LAWS, study_linear

    parser = _parser(
        "study linear",
        "A linear student distilled from a linear teacher's soft labels, against one trained on hard labels: risk over the number of "
        "training inputs beside closed forms and bounds, gradient descent, deep-linear students, steps outside the inputs' span "
        "(docs/theory.md). Writes report.md, study.csv and two plots. The last line of standard output is one JSON object.",
    )
    parser.add_argument("--output", type=str, default="runs/study-linear", help="folder for the report")
    parser.add_argument("--dimension", type=int, default=100, help="of the inputs, d")
    parser.add_argument(
        "--sizes",
        type=list[int] | None,
        help="numbers of training inputs, n, as 10,50,90 or [10]; default: 13 from d/100 to 2d",
    )
    parser.add_argument(
        "--laws",
        type=str,
        default=LAWS,
        help="of the inputs, separated by commas: isotropic; angle:K[:MARGIN], whose acute angle t to the teacher has "
        "P[t >= a] = (1 - a/(pi/2 - MARGIN))^K, radians",
    )
    parser.add_argument("--repeats", type=int, default=200, help="training sets per law, at least 10")
    parser.add_argument("--points", type=int, default=2000, help="fresh test inputs for each training set")
    parser.add_argument("--gradient-dimension", type=int, default=20, help="d of the runs by gradient descent")
    parser.add_argument(
        "--gradient-sizes",
        type=list[int],
        default=[5, 15, 40],
        help="their n; n = d is refused, because gradient descent does not end there",
    )
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    given = parser.parse_args(arguments).as_dict()

    from rich.console import Console

    rows = study_linear(Path(given.pop("output")), **given, console=Console())
    print(json.dumps({"rows": rows}))
    return 0


def _study_finite(arguments: list[str]) -> int:
    parser = _parser(
        "study finite",
        "Four learners that see hard labels (CE_sgl), the teacher's probability of the label drawn (CE_ptl, SEL_ptl) or all its "
        "probabilities (CE_ful): mean risk over the number of samples, slopes, and closed forms beside them (docs/theory.md). Writes "
        "report.md, study.csv and two plots. The last line of standard output is one JSON object.",
    )
    parser.add_argument("--output", type=str, default="runs/study-finite", help="folder for the report")
    parser.add_argument(
        "--instances",
        type=list[int],
        default=[0, 1, 2, 3],
        help="problems: 0 fixed; 1, 2, 3 hard for CE_sgl, SEL_ptl, CE_ful",
    )
    parser.add_argument("--inputs", type=int, help="S; default: 100 and 1 for instance 0, 10 for the others")
    parser.add_argument(
        "--labels", type=int, help="A; default: 25 and 100 for instance 0, 10 for 1, 11 for 2 and 3, which need it odd"
    )
    parser.add_argument(
        "--sizes",
        type=list[int] | None,
        help="numbers of samples, n, as 1000,5000 or [1000]; default: nine from 1e3 to 1e5, for instance 0 seven from 1e2 on",
    )
    parser.add_argument(
        "--repeats", type=int, default=4000, help="draws for each n, at least 10; the paper took 64,000"
    )
    parser.add_argument("--curve-repeats", type=int, default=100, help="draws for each n of instance 0, at least 10")
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    given = parser.parse_args(arguments).as_dict()

    from rich.console import Console

    from ijckd_fast.theory import study_finite

    rows = study_finite(Path(given.pop("output")), **given, console=Console())
    print(json.dumps({"rows": rows}))
    return 0


_STUDIES = {"linear": _study_linear, "finite": _study_finite}


def doctor(arguments: list[str]) -> int:
    """What is installed, what works here, and what to do about the rest."""
    _parser("doctor", "Exit code 0 if training can run here.").parse_args(arguments)

    from rich.console import Console

    from ijckd_fast.commands.doctor import doctor as examine

    return 0 if examine(Console()) else 1


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "cache": cache,
    "evaluate": evaluate,
    "bound": bound,
    "export": export,
    "index": index,
    "prepare-imagenet": prepare_imagenet,
    "prepare-cifar": prepare_cifar,
    "pack": pack,
    "bench": bench,
    "demo": demo,
    "study": study,
    "recipes": recipes,
    "compare": compare,
    "doctor": doctor,
}


class _Parser(ArgumentParser):
    """Mistakes become UserErrors: one sentence, with the nearest option where one is unknown."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if unknown:
            name = unknown[1].split("=")[0]
            raise UserError(
                f"unknown option {name} of {self.prog}{did_you_mean(name, known)}; {self.prog} --help lists all"
            )
        text = " ".join(message.split())
        text = re.sub(r"<class '(\w+)'>", r"\1", text.replace("typing.", ""))
        wrong = re.match(r'Parser key "(\w+)": (.*)', text)
        if wrong:
            text = f"--{wrong[1].replace('_', '-')}: {wrong[2]}"
        raise UserError(f"{text}; {self.prog} --help describes every option")


def _parser(command: str, description: str, usage: str | None = None) -> _Parser:
    return _Parser(
        prog=f"ijckd-fast {command}",
        description=description,
        usage=usage,
        allow_abbrev=False,
        print_config="--print-%s",
    )


def _normalise(arguments: list[str]) -> list[str]:
    """--data_dir becomes --data-dir, the spelling of the help, and a list may be written 30,60,90 as well as [30,60,90]."""
    normal = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not name.startswith("--"):
            name, value = "", argument
        if re.fullmatch(r"-?[\d.eE+-]+(,-?[\d.eE+-]+)+", value):
            value = f"[{value}]"
        argument = name.replace("_", "-") + equals + value if name else value
        normal.append(argument)
    return normal


def _values_of(option: str, arguments: list[str]) -> list[str]:
    """Every value given to an option, in order."""
    values = []
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            values += [value] if equals else arguments[i + 1 : i + 2]
    return values


def _with_preset_paths(arguments: list[str]) -> list[str]:
    """The value of --config, a path or a preset's name, as a path to a file whose settings exist."""
    found = list(arguments)
    for i, argument in enumerate(found):
        name, equals, value = argument.partition("=")
        if name == "--config" and (equals or i + 1 < len(found)):
            path = settings.preset_path(value if equals else found[i + 1])
            settings.load_preset(str(path))
            found[i if equals else i + 1] = f"--config={path}" if equals else str(path)
    return found


def _help() -> str:
    lines = [f"  {name:16} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ijckd-fast COMMAND [OPTIONS]",
            "",
            "Knowledge distillation through the teacher's own classifier.",
            "",
            *lines,
            "",
            "ijckd-fast COMMAND --help describes the options of one.",
        ]
    )


def _complain(text: str, code: int) -> int:
    print(f"ijckd-fast: {text}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"ijckd-fast: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
