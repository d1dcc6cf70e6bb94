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
from typing import Any

import torch
import yaml

from ijckd_fast import files
from ijckd_fast.errors import UserError
from ijckd_fast.train.code_hash import code_hash
from ijckd_fast.train.config import completed

CONFIG, ENVIRONMENT, LOG, SUMMARY = "config.yaml", "env.json", "log.jsonl", "summary.json"
LAST, BEST, TEACHER, EVENTS = "last.pt", "best.pt", "teacher_val.npz", "tensorboard"
REPORT, PLOT, BOUND_PLOT = "report.md", "training.png", "bound_epochs.png"
STOPPED = "stopped.txt"
_BOUND = [f"{stem}.{kind}" for stem in ("bound", "bound-train") for kind in ("md", "json", "csv", "png")]
_OURS = (CONFIG, ENVIRONMENT, LOG, SUMMARY, LAST, BEST, TEACHER, EVENTS, REPORT, PLOT, BOUND_PLOT, STOPPED, *_BOUND)


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
    for name in _OURS:
        path = folder / name
        if name != TEACHER and path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (*kept(folder), *folder.glob("stopped-*.txt")):
        path.unlink()


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


def write_config(folder: Path, config: Any) -> None:
    """Saves a TrainConfig with every value filled in; `read_config` gives the dict back."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    files.write_text(folder / CONFIG, yaml.safe_dump(values, sort_keys=False))


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved settings of the run in `folder`; UserError when there is no run."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(
            f"no run in {folder} (it has no {CONFIG}): give the --output-dir of an earlier ijckd-fast train"
        )
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict):
        raise UserError(
            f"{path} is damaged (wanted 'setting: value' lines): restore it, or give the settings again in a new run"
        )
    return completed({key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file written by us, or None when there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else None


def version_that_wrote(folder: Path) -> str:
    """ "the version that wrote it", with its number and commit where env.json in the folder of the run has them."""
    environment: dict[str, Any] | None = None
    with contextlib.suppress(OSError, ValueError):
        environment = read_json(folder / ENVIRONMENT)
    known = environment if isinstance(environment, dict) else {}
    commit = (known.get("git_commit") or "")[:10]
    named = " at ".join(part for part in (known.get("ijckd_fast"), commit and f"commit {commit}") if part)
    return f"the version that wrote it{f' ({named}, says {ENVIRONMENT})' if named else ''}"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of log.jsonl; a last line cut short by a kill is left out."""
    rows = []
    path = folder / LOG
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_environment(folder: Path) -> None:
    """Saves what the run (or its latest part) runs on: versions, host, device, git commit of the package, if it has
    one.
    """
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
    files.write_text(folder / ENVIRONMENT, json.dumps(environment, indent=2) + "\n")


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
