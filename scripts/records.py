"""What the benchmarks measure, as rows of results/*.csv: where and when, and the file they are appended to."""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import hashlib
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent


def environment(device: str) -> dict[str, Any]:
    """What a row must say of where and when it was measured."""
    import torch  # here: a script that forks its runs decides when it is loaded

    return {
        "device": device,
        "machine": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else "",
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    """Model, cores that this process may use, and the vector instructions that torch takes."""
    import torch

    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    vectors = torch.backends.cpu.get_cpu_capability()  # AVX2, AVX512: the library's products depend on it
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores, {vectors}"


def _commit() -> str:
    """The commit, with -dirty behind it if files differ; where the checkout came without git, a hash of the sources."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    sources = sorted([*(ROOT / "csrc").rglob("*.*"), *(ROOT / "ijckd_fast").rglob("*.py")])
    return "sources-" + hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:10]


def add_save(parser: argparse.ArgumentParser, name: str) -> None:
    """The option --save [CSV], by default results/NAME."""
    parser.add_argument(
        "--save",
        nargs="?",
        const=ROOT / "results" / name,
        type=pathlib.Path,
        metavar="CSV",
        help=f"append the rows to this file, as soon as they are there; without a name results/{name}",
    )


def check(path: pathlib.Path | None, columns: Sequence[str], option: str = "--save") -> None:
    """UserError if rows of these columns could not be appended to `path`: before an hour is spent on them. None:
    nothing to save.
    """
    from ijckd_fast.errors import UserError

    if path is None:
        return
    if path.exists() and (found := path.read_text().partition("\n")[0].strip()) != ",".join(columns):
        raise UserError(
            f"{option}: {path} has other columns ({found[:60]}...): name another file or move this one away"
        )
    if not path.parent.is_dir():
        raise UserError(f"{option}: there is no folder {path.parent}: make it first")


def parse_args(parser: argparse.ArgumentParser, columns: Sequence[str]) -> argparse.Namespace:
    """The command line of a script that appends rows of these columns; usage if it could not."""
    from ijckd_fast.errors import UserError

    args = parser.parse_args()
    try:
        check(args.save, columns)
    except UserError as error:
        parser.error(str(error))
    return args


def append(path: pathlib.Path | None, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends rows, under a header if the file is new; every row has these columns and no other. None: nothing to
    save.
    """
    if path is None:
        return
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
