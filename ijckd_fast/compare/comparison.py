"""Several methods in several regimes on one dataset, several seeds each: what is compared, its runs, and the file of their results.

Within a regime every method has the same loop, schedule and plan: seed s gives all of them the same training images, labels, crops and
order, and the same first weights of the student. So the difference of two methods is taken seed by seed, see `comparison_report`.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import io
import multiprocessing
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ijckd_fast import files
from ijckd_fast.data import write_digits
from ijckd_fast.distill.objectives import PRESETS
from ijckd_fast.errors import UserError, did_you_mean
from ijckd_fast.parallel import processes as distributed
from ijckd_fast.train import (
    Stopped,
    TrainConfig,
    build_indexes,
    build_teacher,
    checkpoint,
    digests,
    make_config,
    objective_of,
    open_cache,
    resolve,
    run_folder,
    stop_signal,
    teacher_fingerprint,
    train,
)
from ijckd_fast.train.code_hash import code_hash
from ijckd_fast.train.config import (
    COMPARISONS,
    FIELDS,
    FREE_ON_RESUME,
    load_preset,
    preset_names,
    preset_path,
    read_yaml,
    typed,
)

RESULTS = "runs.csv"
DIGITS = "digits"  # as data_dir: the embedded images, written to the output folder

# Settings that decide which images a step sees. A method may not set them: the seeds of two methods would not be pairs any more.
PLAN_FIELDS = (
    "class_list", "val_labels", "image_size", "scale", "ratio", "crop_padding", "hflip", "mixup", "cutmix", "repeats", "sizes",
    "eval_resize", "mean", "std", "train_per_class", "label_noise", "data_backend", "decode", "epochs", "batch_size", "global_batch",
    "max_steps",
)  # fmt: skip
_OWN = {  # settings that the comparison itself makes, and what to write instead
    "data_dir": "data_dir beside methods",
    "seed": "seeds beside methods",
    "output_dir": "--output",
}
_TEACHER_WEIGHTS = ("teacher_checkpoint", "teacher_pretrained", "teacher_cache")
# A finished run is used again whatever these say. Of data, teacher and cache `digests` compares the contents instead.
_FREE = FREE_ON_RESUME - {"student_checkpoint"}
_NAME = re.compile(r"[A-Za-z0-9][\w.+=-]*")  # of a method or regime: part of a folder's name and of a table


@dataclass(frozen=True)
class Comparison:
    """What is compared. `load_comparison` makes one of a YAML file, whose keys are these fields but for `name`."""

    name: str
    methods: Mapping[str, Mapping[str, Any]]  # settings of each on top of base and regime, with its objective
    base: Mapping[str, Any]  # settings of every run
    regimes: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})  # settings on top of base
    teacher: Mapping[str, Any] | str | None = (
        None  # settings of a teacher to train first; or what train's --teacher takes
    )
    against: tuple[str, ...] = ()  # methods that the others are compared with
    seeds: int = 5
    data_dir: str | None = None  # DIGITS or a folder
    about: str = ""  # a paragraph for the report

    def __post_init__(self) -> None:
        if not self.methods:
            raise UserError(f"{self.name} names no method: wanted methods, each a name with its settings")
        if not self.regimes:
            raise UserError(f"{self.name} names no regime: leave regimes out for a single one, that of base")
        for what, names in (("method", self.methods), ("regime", [name for name in self.regimes if name])):
            for name in names:
                if not _NAME.fullmatch(name):
                    raise UserError(
                        f"{what} {name!r} of {self.name}: wanted letters, digits and ._+=-, as in a folder's name; rename it"
                    )
        for name in ("teacher", DIGITS):
            if name in self.regimes:
                raise UserError(f"a regime of {self.name} is called {name!r}, as a folder of ours: rename it")
        for name in self.against:
            if name not in self.methods:
                raise UserError(
                    f"{self.name} compares against {name!r}, which is none of its methods ({', '.join(self.methods)})"
                    f"{did_you_mean(name, self.methods)}; add it to methods, or leave it out of against"
                )
        least = 2 if self.against else 1
        if self.seeds < least:
            raise UserError(
                f"{self.name}: seeds must be at least {least}, got {self.seeds}"
                + (
                    "; an interval needs two differences: raise seeds, or set against: [] for none"
                    if self.against
                    else ""
                )
            )
        self._check_settings()

    def _check_settings(self) -> None:
        for where, values in (
            ("base", self.base),
            *((f"regime {name}", values) for name, values in self.regimes.items()),
            *((f"method {name}", values) for name, values in self.methods.items()),
        ):
            for name, instead in _OWN.items():
                if name in values:
                    raise UserError(f"{where} of {self.name} sets {name}, which every run has its own: give {instead}")
            if where.startswith("method"):
                for name in PLAN_FIELDS:
                    if name in values:
                        raise UserError(
                            f"{where} of {self.name} sets {name}, which decides what the net sees: set it in base or in a regime, so "
                            "that all methods see the same"
                        )
        if self.trains_teacher:
            for where, values in (("base", self.base), *self.regimes.items(), *self.methods.items()):
                for name in _TEACHER_WEIGHTS:
                    if values.get(name):
                        raise UserError(
                            f"{self.name} trains a teacher and {where} sets {name} too: leave out one of them"
                        )

    @property
    def trains_teacher(self) -> bool:
        """Whether the teacher is trained as part of the comparison."""
        return isinstance(self.teacher, Mapping)


@dataclass(frozen=True)
class Run:
    """One net to train. config is resolved."""

    regime: str
    method: str
    seed: int
    config: TrainConfig

    @property
    def folder(self) -> Path:
        assert self.config.output_dir is not None
        return Path(self.config.output_dir)

    @property
    def name(self) -> str:
        return f"{self.regime} {self.method} seed {self.seed}".strip()


@dataclass(frozen=True)
class Outcome:
    """What `train_all` brought."""

    teacher: Mapping[str, Any] | None  # its summary where it was trained here
    runs: Mapping[str, Mapping[str, Mapping[int, Mapping[str, Any]]]]  # regime -> method -> seed -> summary.json
    failed: Mapping[str, str]  # name of a run -> why it failed


def load_comparison(name_or_path: str, *, seeds: int | None = None, data_dir: str | None = None) -> Comparison:
    """The comparison in a YAML file or a packaged one; seeds and data_dir replace the file's.

    Keys: methods (name -> settings; `name:` alone is the objective of that name), base (settings, or a preset's name; `config` among
    settings names a preset they change), teacher (the same: it is trained first; or what `ijckd-fast train --teacher` takes), regimes
    (name -> settings), against (methods to compare the others with), seeds, data_dir (a folder, or `digits`), about (text).
    raises   UserError for unknown keys and settings, values of a wrong type, and what cannot be compared
    """
    path = preset_path(name_or_path, COMPARISONS)
    values = read_yaml(path)
    known = [f.name for f in dataclasses.fields(Comparison) if f.name != "name"]
    for key in values:
        if key not in known:
            raise UserError(
                f"unknown key {str(key)!r} in {path}: wanted some of {', '.join(known)}{did_you_mean(str(key), known)}"
            )
    for key, kind, wanted in (
        ("methods", dict, "name: settings lines"),
        ("regimes", dict, "name: settings lines"),
        ("against", list, "a list of methods"),
        ("seeds", int, "a whole number"),
        ("data_dir", str, "a folder, or digits"),
        ("about", str, "text"),
    ):
        if key in values and (not isinstance(values[key], kind) or isinstance(values[key], bool)):
            raise UserError(f"{key} of {path}: wanted {wanted}, got {values[key]!r}")
    methods = {
        str(name): _method(str(name), settings, path) for name, settings in (values.get("methods") or {}).items()
    }
    more: dict[str, Any] = {key: values[key] for key in ("seeds", "data_dir", "about") if key in values}
    if "regimes" in values:
        more["regimes"] = {
            str(name): _settings(settings, f"regime {name} of {path}") for name, settings in values["regimes"].items()
        }
    if seeds is not None:
        more["seeds"] = seeds
    if data_dir is not None:
        more["data_dir"] = data_dir
    base = _preset(values.get("base"), f"base of {path}")
    if not isinstance(values.get("base"), dict) or "seed" not in values["base"]:
        base.pop("seed", None)  # that of a preset, which was for a run alone
    return Comparison(
        name=path.stem,
        methods=methods,
        base=base,
        teacher=_teacher(values.get("teacher"), f"teacher of {path}"),
        against=tuple(str(name) for name in values.get("against", ())),
        **more,
    )


def _settings(values: Any, where: str) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: wanted settings in braces or on indented lines, got {values!r}")
    return typed(values, where)


def _preset(values: Any, where: str) -> dict[str, Any]:
    """A preset's name, or settings, which change the preset named in `config`."""
    if isinstance(values, str):
        values = {"config": values}
    if not isinstance(values, dict):
        return _settings(values, where)
    preset = values.get("config")
    under = {} if preset is None else typed(load_preset(str(preset)), str(preset))
    return {**under, **_settings({key: value for key, value in values.items() if key != "config"}, where)}


def _teacher(values: Any, where: str) -> dict[str, Any] | str | None:
    if isinstance(values, str) and values not in preset_names() and Path(values).suffix not in (".yaml", ".yml"):
        return values
    return None if values is None else _preset(values, where)


def _method(name: str, values: Any, path: Path) -> dict[str, Any]:
    settings = _settings(values, f"method {name} of {path}")
    if "objective" not in settings and name not in PRESETS:
        raise UserError(
            f"method {name!r} of {path} is no objective and names none: wanted objective, one of {', '.join(PRESETS)}"
            f"{did_you_mean(name, PRESETS)}"
        )
    return {"objective": name, **settings}


def folder_of(output: Path, regime: str, method: str, seed: int) -> Path:
    """Where a run of the comparison in `output` lies."""
    return output / regime / f"{method}-seed{seed}"


def plan(comparison: Comparison, output: Path) -> tuple[TrainConfig | None, list[Run]]:
    """(settings of the teacher to train first, every run in order), settled before anything is trained or written.

    raises   UserError where a run could not be trained as it is told, naming method and regime
    """
    if comparison.data_dir is None:
        raise UserError(
            f"{comparison.name} has no data_dir: give --data-dir with train/<class>/* and val/<class>/*, or {DIGITS}"
        )
    data_dir = str(output / DIGITS) if comparison.data_dir == DIGITS else comparison.data_dir
    teacher, given = None, {}
    if isinstance(comparison.teacher, Mapping):
        folder = output / "teacher"
        teacher = resolve(make_config({**comparison.teacher, "data_dir": data_dir, "output_dir": str(folder)}))
        named = comparison.base.get("teacher")
        if named not in (None, teacher.student):
            raise UserError(
                f"{comparison.name} trains {teacher.student} as the teacher, but base says teacher: {named}; leave that out"
            )
        given = {"teacher": teacher.student, "teacher_checkpoint": str(folder / run_folder.LAST)}
    elif comparison.teacher is not None:
        given = {"teacher": comparison.teacher}
    runs = []
    for regime, changes in comparison.regimes.items():
        for method, settings in comparison.methods.items():
            for seed in range(comparison.seeds):
                own = {
                    "data_dir": data_dir,
                    "seed": seed,
                    "output_dir": str(folder_of(output, regime, method, seed)),
                }
                values = {**comparison.base, **given, **changes, **settings, **own}
                try:
                    config = make_config(values)
                    if config.teacher is None and config.teacher_cache is None and objective_of(config).needs_teacher:
                        raise UserError(
                            "its objective needs a teacher, and there is none: give teacher beside methods, a preset to train first, "
                            "a run's folder or checkpoint, or a name with teacher_checkpoint or teacher_pretrained in base"
                        )
                    runs.append(Run(regime, method, seed, resolve(config)))
                except UserError as error:
                    where = f"method {method}" + (f" in regime {regime}" if regime else "")
                    raise UserError(f"{where} of {comparison.name}: {error}") from error
    return teacher, runs


def train_all(
    comparison: Comparison, output: Path, *, jobs: int = 1, any_code: bool = False, console: Console
) -> Outcome:
    """Trains what is not in `output` yet: its teacher, then every run, on one thread each; writes runs.csv.

    jobs      runs side by side, each a process of its own; 1: one after the other in this process
    any_code  use runs that other code of ijckd_fast finished or began too, even where it lacked some of the settings; else they are
              trained anew
    console   one line for each run
    returns   the summaries of all runs, and the errors of those that failed: one that fails does not end the others
    raises    UserError for what cannot be compared, or a teacher that fails; Stopped on SIGINT or SIGTERM, after every run was saved
    A run that is there with the same settings, code, images and teacher is used again, or gone on with where it was interrupted; any
    other in its folder is replaced. runs.csv has one line for each finished run, appended as it ends.
    """
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    if distributed.world_size() > 1:
        raise UserError(
            f"a comparison starts processes of its own, got {distributed.world_size()} of a launcher: run it without, and see --jobs"
        )
    teacher_config, runs = plan(comparison, output)
    threads = torch.get_num_threads()
    with files.lock(output, "--output"):
        if comparison.data_dir == DIGITS:
            write_digits(output / DIGITS)
        # the order of a sum, and so its last bits, depends on the number of threads: one, whatever jobs is
        torch.set_num_threads(1)
        try:
            return _train_all(comparison, output, teacher_config, runs, jobs, any_code, console)
        finally:
            torch.set_num_threads(threads)


def _train_all(
    comparison: Comparison,
    output: Path,
    teacher_config: TrainConfig | None,
    runs: Sequence[Run],
    jobs: int,
    any_code: bool,
    console: Console,
) -> Outcome:
    inputs = _Inputs()
    teacher = None
    if teacher_config is not None:
        run = Run("", "teacher", teacher_config.seed, teacher_config)
        state = _state(run, inputs(teacher_config), any_code)
        if state != "finished":
            try:
                with _saying_how_to_go_on():
                    train(
                        teacher_config, resume=state == "begun", overwrite=state == "new", console=Console(quiet=True)
                    )
            except UserError as error:
                raise UserError(f"teacher of {comparison.name}: {error}") from error
        teacher = _summary(run)
        _tell(console, "teacher", teacher, state == "finished")

    summaries: dict[Run, dict[str, Any]] = {}
    failed: dict[Run, str] = {}
    states = {run: _state(run, inputs(run.config), any_code) for run in runs}
    for run in runs:
        if states[run] == "finished":
            summaries[run] = _summary(run)
    with _Results(output / RESULTS, comparison.name, summaries) as results:

        def ended(run: Run, error: str | None) -> None:
            if error is None:
                summaries[run] = _summary(run)
                if states[run] != "finished":
                    results.add(run, summaries[run])
                _tell(console, _padded(run, runs), summaries[run], states[run] == "finished")
            else:
                failed[run] = error
                console.print(f"{run.name} failed: {error}", highlight=False, markup=False, soft_wrap=True)

        for run in runs:
            if states[run] == "finished":
                ended(run, None)
        missing = [(run, states[run] == "begun") for run in runs if states[run] != "finished"]
        if jobs == 1:
            _one_by_one(missing, ended)
        else:
            _side_by_side(missing, jobs, ended)
    with _Results(output / RESULTS, comparison.name, {run: summaries[run] for run in runs if run in summaries}):
        pass  # in the order of the comparison

    nested: dict[str, dict[str, dict[int, dict[str, Any]]]] = {
        regime: {method: {} for method in comparison.methods} for regime in comparison.regimes
    }
    for run in runs:
        if run in summaries:
            nested[run.regime][run.method][run.seed] = summaries[run]
    return Outcome(teacher, nested, {run.name: error for run, error in failed.items()})


class _Inputs:
    """The digests that a run would begin with now. Indexes and teachers serve more than one run and are looked at once."""

    def __init__(self) -> None:
        self._indexes: dict[tuple, Any] = {}
        self._teachers: dict[tuple, str | None] = {}

    def __call__(self, config: TrainConfig) -> dict[str, str | None]:
        of_data = (
            "data_dir",
            "class_list",
            "val_labels",
            "index_verify",
            "check_files",
            "train_per_class",
            "label_noise",
            "seed",
        )
        key = tuple(getattr(config, name) for name in of_data)
        if key not in self._indexes:
            self._indexes[key] = build_indexes(config)
        train_index, val_index = self._indexes[key]
        cache = open_cache(config, train_index)
        key = tuple(getattr(config, name) for name in ("teacher", *_TEACHER_WEIGHTS, "image_size"))
        if key not in self._teachers:
            teacher = build_teacher(config, train_index.num_classes)
            self._teachers[key] = None if teacher is None else teacher_fingerprint(teacher)
        return digests(train_index, val_index, self._teachers[key], cache)


def _state(run: Run, inputs: Mapping[str, str | None], any_code: bool) -> str:
    """'finished' or 'begun' where the run in the folder is this one, else 'new'."""
    environment = run_folder.read_json(run.folder / run_folder.ENVIRONMENT)
    if environment is None or not (any_code or environment["code_hash"] == code_hash()):
        return "new"
    found = run_folder.read_config(run.folder)
    compared = [name for name in FIELDS if name not in _FREE and (name in found or not any_code)]
    if any(found.get(name) != getattr(run.config, name) for name in compared):
        return "new"
    summary = run_folder.read_json(run.folder / run_folder.SUMMARY)
    if summary is not None:
        return "finished" if summary.get("inputs") == inputs else "new"
    last = run.folder / run_folder.LAST
    return "begun" if last.exists() and checkpoint.load(last)["inputs"] == inputs else "new"


def _summary(run: Run) -> dict[str, Any]:
    summary = run_folder.read_json(run.folder / run_folder.SUMMARY)
    assert summary is not None
    return summary


@contextlib.contextmanager
def _saying_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except Stopped as stop:
        raise _stopped(stop.signum) from stop


def _stopped(signum: int) -> Stopped:
    name = signal.Signals(signum).name
    return Stopped(signum, f"stopped by {name}, every run is saved: the same command goes on where it stopped")


def _one_by_one(missing: Iterable[tuple[Run, bool]], ended: Callable[[Run, str | None], None]) -> None:
    for run, resume in missing:
        try:
            with _saying_how_to_go_on():
                train(run.config, resume=resume, overwrite=not resume, console=Console(quiet=True))
        except Exception as error:
            ended(run, _reason(error))
        else:
            ended(run, None)


def _reason(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {error}"


# What a run imports, some of it on its way: a second or more each. Not DALI: nothing says that it may be forked once it is loaded.
_IMPORTED = ["ijckd_fast.train.loop", "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg"]


def _side_by_side(missing: Sequence[tuple[Run, bool]], jobs: int, ended: Callable[[Run, str | None], None]) -> None:
    """Up to `jobs` runs at a time, each in a process that is forked from a server which has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    waiting = list(reversed(missing))
    running: dict[int, tuple[Run, Any, Any]] = {}
    told = False
    with stop_signal() as stop:
        try:
            while running or (waiting and not stop.signum):
                while waiting and len(running) < jobs and not stop.signum:
                    run, resume = waiting.pop()
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(target=_in_a_process, args=(sender, run.config, resume), name=run.name)
                    process.start()
                    sender.close()  # so that the end of the process ends the pipe
                    running[process.sentinel] = run, process, receiver
                if stop.signum and not told:
                    told = True
                    for _, process, _ in running.values():
                        process.terminate()  # SIGTERM: it saves first
                for sentinel in connection.wait(list(running), timeout=0.5):
                    run, process, receiver = running.pop(int(sentinel))  # type: ignore[arg-type]
                    process.join()
                    try:
                        error = receiver.recv()
                    except EOFError:
                        error = f"its process ended with code {process.exitcode} (-9: killed, often for want of memory)"
                    if error is None or not told:
                        ended(run, error)
        finally:
            for _, process, _ in running.values():
                process.terminate()
    if stop.signum:
        raise _stopped(stop.signum)


def _in_a_process(sender: Any, config: TrainConfig, resume: bool) -> None:
    os.setsid()  # Ctrl-C is for the process that started this one, which passes it on once
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    error = None
    try:
        train(config, resume=resume, overwrite=not resume, console=Console(quiet=True))
    except BaseException as raised:
        error = str(raised) if isinstance(raised, Stopped) else _reason(raised)
    sender.send(error)


def _end_with_parent() -> None:
    """A run that nobody waits for any more saves and ends, whatever ended the process that started it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


class _Results:
    """runs.csv: written anew from the runs that are there, then a line for each that ends; so it never holds a run twice."""

    def __init__(self, path: Path, comparison: str, finished: Mapping[Run, Mapping[str, Any]]) -> None:
        self._comparison = comparison
        rows = [self._row(run, summary) for run, summary in finished.items()]
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
        files.write_text(path, text.getvalue())
        self._file = open(path, "a", newline="")  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> _Results:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, run: Run, summary: Mapping[str, Any]) -> None:
        """Appends the line of a run that has ended."""
        csv.writer(self._file, lineterminator="\n").writerow(self._row(run, summary))
        self._file.flush()

    def _row(self, run: Run, summary: Mapping[str, Any]) -> list[Any]:
        environment = run_folder.read_json(run.folder / run_folder.ENVIRONMENT) or {}
        last = summary["last"]
        values = {
            "comparison": self._comparison,
            "regime": run.regime,
            "method": run.method,
            "seed": run.seed,
            "top1": f"{last['top1_percent']:.3f}",
            "agreement": _or_empty(last["agreement_percent"], ".3f"),
            "teacher_top1": _or_empty(summary["teacher_top1_percent"], ".3f"),
            "params": summary["params"],
            "macs": summary["macs"],
            "seconds": f"{summary['seconds']:.2f}",
            "date": datetime.date.fromtimestamp((run.folder / run_folder.SUMMARY).stat().st_mtime).isoformat(),
            "commit": (environment.get("git_commit") or "")[:10]
            + ("-dirty" if environment.get("git_changed_files") else ""),
            "code": environment.get("code_hash"),
            "torch": environment.get("torch"),
            "dali": environment.get("dali"),
            "device": run.config.device,
            "cores": environment.get("host_cores"),
        }
        return [values[column] for column in COLUMNS]


COLUMNS = (
    "comparison", "regime", "method", "seed", "top1", "agreement", "teacher_top1", "params", "macs", "seconds", "date", "commit", "code",
    "torch", "dali", "device", "cores",
)  # fmt: skip


def _or_empty(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _padded(run: Run, runs: Sequence[Run]) -> str:
    return run.name.ljust(max(len(each.name) for each in runs))


def _tell(console: Console, name: str, summary: Mapping[str, Any], reused: bool) -> None:
    last = summary["last"]
    agreement = "" if last["agreement_percent"] is None else f", agreement {last['agreement_percent']:6.2f} %"
    again = " (finished earlier, used again)" if reused else ""
    console.print(
        f"{name:14}  top-1 {last['top1_percent']:6.2f} %{agreement}, {summary['seconds']:5.1f} s{again}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
