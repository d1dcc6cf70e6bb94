"""The folder of one run: which files it holds, who may start one there, its log and its environment."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ijckd_fast import files
from ijckd_fast.errors import UserError
from ijckd_fast.train.code_hash import code_hash
from ijckd_fast.train.config import completed, typed

CONFIG, ENVIRONMENT, LOG, SUMMARY = "config.yaml", "env.json", "log.jsonl", "summary.json"
LAST, BEST, TEACHER, EVENTS = "last.pt", "best.pt", "teacher_val.npz", "tensorboard"
REPORT, PLOT, BOUND_PLOT = "report.md", "training.png", "bound_epochs.png"
STOPPED, DAMAGED_LOG = "stopped.txt", "log-damaged.jsonl"
_BOUND = [f"{stem}.{kind}" for stem in ("bound", "bound-train") for kind in ("md", "json", "csv", "png")]
# In the order in which they are deleted: what is left by a kill on the way is no finished run, and has its settings.
_OURS = (
    SUMMARY, REPORT, LAST, BEST, TEACHER, EVENTS, LOG, DAMAGED_LOG, PLOT, BOUND_PLOT, STOPPED, *_BOUND, CONFIG,
    ENVIRONMENT,
)  # fmt: skip
_CHECKED = "# check value of the settings above, which ijckd-fast compares: "  # the last line of config.yaml
# What the report needs of the rows of a log that have no check value.
_NEEDED = {
    "train": ("epoch", "top1_train_percent", "lr", "images_per_s", "loader_wait_percent", "memory_mb"),
    "eval": ("epoch", "top1_percent", "agreement_percent"),
    "bound": ("epoch", "student_error_percent"),
}


def refuse_occupied(folder: Path) -> None:
    """UserError when `folder` holds a run. One that failed before its first log line left nothing worth keeping."""
    if any((folder / name).exists() for name in (LAST, BEST, SUMMARY)) or kept(folder) or read_log(folder):
        state = "a finished run" if (folder / SUMMARY).exists() else "a run that is not finished"
        raise UserError(
            f"{folder} holds {state}: continue it with --resume {folder}, choose another --output-dir, or give "
            "--overwrite to delete it"
        )


def clear(folder: Path) -> None:
    """Deletes an earlier run's files, but for the teacher's evaluation, which names what it is of."""
    (folder / SUMMARY).unlink(missing_ok=True)
    for path in (*kept(folder), *folder.glob("stopped-*.txt")):
        path.unlink()
    for name in _OURS:
        path = folder / name
        if name != TEACHER and path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def keep_as(folder: Path, name: str, count: int) -> None:
    """Keeps last.pt under `name` (checkpoint-STEP.pt) too, and of those up to its step the newest `count`. Later ones
    are of a run that was taken back to an earlier step; it writes them again when it comes there.
    """
    with files.replacing(folder / name) as tmp:
        tmp.unlink(missing_ok=True)
        try:
            os.link(folder / LAST, tmp)
        except OSError:  # a file system without links
            shutil.copyfile(folder / LAST, tmp)
    so_far = kept(folder)
    for old in so_far[: so_far.index(folder / name) + 1][:-count]:
        old.unlink(missing_ok=True)


def kept(folder: Path) -> list[Path]:
    """The checkpoints that `keep_as` left, oldest step first."""
    found = [path for path in folder.glob("checkpoint-*.pt") if path.stem.partition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.stem.partition("-")[2]))


def checkpoint_of(run: str | Path, best: bool = False) -> Path:
    """The checkpoint to look at: of a run's folder last.pt, or best.pt; else the file itself. UserError for none."""
    path = Path(run)
    if path.is_dir():
        path /= BEST if best else LAST
    if not os.path.lexists(path):  # a link that leads nowhere has its own sentence when it is read
        raise no_checkpoint(path)
    return path


def no_checkpoint(path: Path) -> UserError:
    """The sentence for a checkpoint that is not there."""
    return UserError(f"no checkpoint at {path}: give the folder of a run, or a last.pt or best.pt in it")


def to_continue_from(folder: Path) -> str:
    """The name of the checkpoint that a run continues from: last.pt, or where that is gone the newest that was kept, or
    best.pt. last.pt if there is none at all.
    """
    there = [path.name for path in (folder / LAST, *reversed(kept(folder)), folder / BEST) if path.is_file()]
    return there[0] if there else LAST


def write_config(folder: Path, config: Any) -> None:
    """Saves a TrainConfig with every value filled in, and a check value; `read_config` gives the dict back."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    files.write_text(folder / CONFIG, yaml.safe_dump(values, sort_keys=False) + f"{_CHECKED}{_check_of(values)}\n")


class Recorded(NamedTuple):
    """What config.yaml says.

    values   the settings; None where they cannot be read
    fault    what is wrong with the file: "is not there", "is damaged (...)", or, with values, "was changed ..."
    checked  whether a check value stands for them, which earlier versions did not write
    """

    values: dict[str, Any] | None
    fault: str | None
    checked: bool = False


def recorded(folder: Path) -> Recorded:
    """The resolved settings of the run in `folder`, as far as they can be read; UserError where they may not be."""
    try:
        data = files.read_bytes(folder / CONFIG)
    except FileNotFoundError:
        return Recorded(None, "is not there")
    try:
        values = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return Recorded(None, f"is damaged ({' '.join(str(error).split())})")
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        return Recorded(None, "is damaged (wanted 'setting: value' lines)")
    *_, last = data.decode(errors="replace").splitlines() or [""]
    value = last.removeprefix(_CHECKED)
    checked, fault = value != last, None
    if checked and value.strip() != _check_of(values):
        fault = "was changed since ijckd-fast wrote it, or is damaged (its check value is another)"
    elif not checked and _has_check(folder / ENVIRONMENT):
        fault = "was changed since ijckd-fast wrote it, or is cut off (its check value, the last line, is not there)"
    elif not checked:
        values = typed(values, str(folder / CONFIG))
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Recorded(completed(values), fault, checked)


def _has_check(path: Path) -> bool:
    """Whether a JSON file was written by a version that adds check values."""
    with contextlib.suppress(UserError):
        found = files.read_checked(path, "")
        return found is not None and found[1]
    return True  # damaged or not to be read: nothing says that it is older


def _check_of(values: dict[str, Any]) -> str | None:
    try:
        return files.check_value(values)
    except TypeError:  # a date, say: nothing that we write
        return None


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved settings of the run in `folder`; UserError where there is no run, Damaged."""
    found = recorded(folder)
    if found.values is not None and found.fault is None:
        return found.values
    raise config_refused(folder, found)


def config_refused(folder: Path, found: Recorded) -> UserError:
    """The sentence for a config.yaml that says nothing, where no checkpoint says it instead."""
    path = folder / CONFIG
    if found.values is None and not path.exists():
        return UserError(
            f"no run in {folder} (it has no {CONFIG}): give the --output-dir of an earlier ijckd-fast train"
        )
    return files.Damaged(f"{path} {found.fault}: restore it, or give the settings again in a new run")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file of a run, or None when there is no such file. UserError where it cannot be read,
    Damaged.
    """
    return files.read_json(path, f"restore it, or delete {path.parent} and train again")


def read_environment(folder: Path) -> dict[str, Any] | None:
    """What `write_environment` saved, as `read_json`."""
    return read_json(folder / ENVIRONMENT)


def version_that_wrote(folder: Path) -> str:
    """ "the version that wrote it", with its number and commit where env.json in the folder of the run has them."""
    environment: dict[str, Any] | None = None
    with contextlib.suppress(UserError):
        environment = read_environment(folder)
    known = environment or {}
    commit = str(known.get("git_commit") or "")[:10]
    named = " at ".join(str(part) for part in (known.get("ijckd_fast"), commit and f"commit {commit}") if part)
    return f"the version that wrote it{f' ({named}, says {ENVIRONMENT})' if named else ''}"


class Log(NamedTuple):
    """What log.jsonl holds.

    rows     those that are as they were written, without their check values
    damaged  numbers of the other lines, from 1; a last one that a kill has cut short is not among them
    """

    rows: list[dict[str, Any]]
    damaged: list[int]


def examine_log(folder: Path) -> Log:
    """Reads log.jsonl; UserError where it may not be read."""
    try:
        *lines, torn = files.read_bytes(folder / LOG).split(b"\n")
    except FileNotFoundError:
        return Log([], [])
    found = [_row(line) for line in lines]
    if (last := _row(torn)) is not None:
        found.append(last)
    has_checks = any(each is not None and each[1] for each in found)
    good = [each is not None and (each[1] or not has_checks) for each in found]
    rows = [each[0] for each, fine in zip(found, good, strict=True) if fine and each is not None]
    return Log(rows, [number for number, fine in enumerate(good, 1) if not fine])


def _row(line: bytes) -> tuple[dict[str, Any], bool] | None:
    """(a row, whether its check value stands for it); None where it is not what was written, or lacks what is needed"""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    value = row.pop(files.CHECK, None)
    if value is not None:
        return (row, True) if value == files.check_value(row) else None
    needed = _NEEDED.get(str(row.get("kind")))
    if needed is None or not isinstance(row.get("step"), int):
        return None
    numbers = all(name in row and isinstance(row[name], (int, float, type(None))) for name in needed)
    return (row, False) if numbers else None


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of log.jsonl without those that are damaged, see `examine_log`."""
    return examine_log(folder).rows


def write_environment(folder: Path) -> None:
    """Saves what the run (or its latest part) runs on: versions, host, device, git commit of the package, if it has
    one.
    """
    import torch  # here: a folder is looked at, and refused, without it

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    environment = {
        "ijckd_fast": version_of("ijckd-fast"),
        "code_hash": code_hash(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": len((_git("status", "--porcelain") or "").splitlines()),
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": gpu,
        "dali": version_of("nvidia-dali-cuda130"),
        "timm": version_of("timm"),
        "torchvision": version_of("torchvision"),
        "host": platform.platform(),
        "host_cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
    }
    files.write_json(folder / ENVIRONMENT, environment)


def version_of(package: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of git about the package's own checkout, or None when the package was not run from one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
