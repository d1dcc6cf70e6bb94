"""`ijckd-fast doctor`: what is installed, what of it works here, and what to do about the rest."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from jsonargparse import ArgumentParser

from ijckd_fast import extras
from ijckd_fast.commands import Arguments, Outcome
from ijckd_fast.extras import PACKAGES

SUMMARY = "What is installed, what works here, and what to do about the rest."
DESCRIPTION = (
    "Loads torch, DALI and the compiled libraries, and looks whether the other packages are installed; --thorough "
    "imports those too. Exit code 0 if training can run here."
)

# libraries.py has it too, but imports torch, which may be what is missing.
REBUILD = "`pip install -e .` in the repository"


class Finding(NamedTuple):
    """One line of the examination. needed: training cannot run without it. advice: what to do if it is not ok."""

    what: str
    ok: bool
    needed: bool
    found: str
    advice: str = ""


def examine(thorough: bool = False) -> list[Finding]:
    """Looks at everything a run needs; raises nothing. thorough: packages are imported, not only looked for."""
    find = _imported if thorough else _installed

    def look(module: str, purpose: str, *, needed: bool = False) -> Finding:
        return find(module, PACKAGES[module].distribution, needed=needed, advice=f"{extras.install(module)}, {purpose}")

    return [
        Finding("Python", True, True, platform.python_version()),
        Finding("CPU", True, True, f"{len(os.sched_getaffinity(0))} cores usable, {platform.machine()}"),
        _imported("torch", "torch", needed=True, advice="pip install 'torch>=2.10'"),
        _library(
            "_C.so",
            "CPU library of the ops",
            needed=True,
            compiler="a C++ compiler",
            commands=("c++", "g++", "clang++"),
        ),
        _library("_C_cuda.so", "CUDA library of the ops", needed=False, compiler="nvcc", commands=("nvcc",)),
        _gpu(),
        _dali(),
        look("torchvision", "for its models"),
        look("timm", "for its models"),
        look("tensorboard", "or train with --no-tensorboard"),
        look("matplotlib", "which draws the plots of a report", needed=True),
        look("fontTools", "for ijckd-fast prepare-glyphs"),
        look("scipy", "for the intervals of a comparison"),
        look("pyarrow", "which stores the index of the images", needed=True),
        look("sklearn", "for the demo's digits"),
        look("onnxruntime", "for ONNX files"),
        look("wandb", "for --wandb"),
        _processes(),
        _disk(),
    ]


def add_arguments(parser: ArgumentParser) -> None:
    """How closely to look."""
    parser.add_argument(
        "--thorough",
        action="store_true",
        help="import every package, which takes some ten seconds more and shows a broken installation",
    )


def run(args: Arguments) -> Outcome:
    """Prints the examination; exit code 1 if training cannot run."""
    from rich.console import Console
    from rich.table import Table

    console, findings = Console(), examine(args.thorough)
    table = Table("", "", "found")
    for item in findings:
        mark = "[green]ok" if item.ok else "[red]missing" if item.needed else "[yellow]absent"
        table.add_row(mark, item.what, item.found)
    console.print(table)
    for item in findings:
        if not item.ok and item.advice:
            console.print(f"{item.what}: {item.advice}", highlight=False, markup=False, soft_wrap=True)
    able = all(item.ok for item in findings if item.needed)
    console.print("training can run" if able else "training cannot run: see what is missing above")
    return Outcome(code=0 if able else 1)


def _imported(module: str, package: str, *, needed: bool, advice: str) -> Finding:
    try:
        importlib.import_module(module)
        return Finding(package, True, needed, version(package))
    except PackageNotFoundError:
        return Finding(package, True, needed, "of unknown version")
    except Exception as error:  # a broken installation may raise anything
        return Finding(package, False, needed, _first_line(error), advice)


def _installed(module: str, package: str, *, needed: bool, advice: str) -> Finding:
    """Whether a package is there, and in which version, without importing it."""
    try:
        if importlib.util.find_spec(module) is None:
            return Finding(package, False, needed, f"No module named {module!r}", advice)
        return Finding(package, True, needed, version(package))
    except PackageNotFoundError:
        return Finding(package, True, needed, "of unknown version")
    except Exception as error:  # as above
        return Finding(package, False, needed, _first_line(error), advice)


def _library(name: str, what: str, *, needed: bool, compiler: str, commands: tuple[str, ...]) -> Finding:
    path = Path(__file__).parents[1] / "head" / name
    build = f"{REBUILD} builds it"
    if not path.exists():
        if not any(shutil.which(command) for command in commands):
            build += f", once {compiler} is installed"
        return Finding(what, False, needed, f"no {path}", build)
    return _attempt(what, needed, lambda: _load(path), f"it does not fit this torch: {build} again, with torch >= 2.10")


def _load(path: Path) -> str:
    import torch

    torch.ops.load_library(path)
    return f"{path.name} loads with torch {torch.__version__}"


def _gpu() -> Finding:
    def look() -> str:
        import torch

        if not torch.cuda.is_available():
            built = (
                f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
            )
            raise RuntimeError(f"none usable; {built}")
        from ijckd_fast.head import HAS_CUDA_LIBRARY, kernels_for, refused_launches

        cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        capabilities = sorted({torch.cuda.get_device_capability(i) for i in range(len(cards))})
        refused = (refused_launches(f"cuda:{i}") for i in range(len(cards)) if HAS_CUDA_LIBRARY)
        kernels = [*map(kernels_for, capabilities), *sorted(set(filter(None, refused)))]
        return "; ".join([f"{len(cards)} x {cards[0]}, CUDA {torch.version.cuda}", *kernels])

    advice = (
        "training runs on the CPU; for a GPU install NVIDIA's driver and a CUDA build of torch (nvidia-smi shows the "
        "driver)"
    )
    return _attempt("GPU", False, look, advice)


def _dali() -> Finding:
    def look() -> str:
        import nvidia.dali

        from ijckd_fast.data.load.dali import DaliLoader  # also proves that our pipeline's operators are there

        return f"{nvidia.dali.__version__} ({DaliLoader.__name__} ready)"

    advice = f"{extras.install('nvidia.dali')}, or train with --data-backend pillow"
    return _attempt("DALI", False, look, advice)


def _processes() -> Finding:
    def look() -> str:
        import torch.distributed as dist

        there = {"nccl (GPUs)": dist.is_nccl_available(), "gloo (CPUs)": dist.is_gloo_available()}
        if not there["gloo (CPUs)"]:
            raise RuntimeError("this torch has no gloo")
        return ", ".join(name for name, has in there.items() if has)

    return _attempt(
        "several processes", False, look, "a run is of one process; another build of torch has gloo and nccl"
    )


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return Finding(
        "disk", free > 1, False, f"{free:.1f} GB free in {Path.cwd()}", "checkpoints need room: free some space"
    )


def _attempt(what: str, needed: bool, look: Callable[[], str], advice: str) -> Finding:
    try:
        return Finding(what, True, needed, look())
    except Exception as error:  # whatever a broken installation raises is the finding
        return Finding(what, False, needed, _first_line(error), advice)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
