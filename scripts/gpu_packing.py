#!/usr/bin/env python
"""Makes a folder of all that scripts/gpu_check.sh needs on a rented GPU machine that has Python 3.12, torch 2.11.0, no
network and little room: both libraries, the tests of single instructions compiled for sm_90a, wheels of what is missing
there. Needs nvcc, a C++ compiler, network for the wheels; no GPU.

The pack is checked before it is called one: its libraries are of the sources that lie here and need nothing of torch
but its stable ABI, its wheels are pure Python, for 3.12, and need nothing that is neither in the pack nor there, and
pack and checkout together stay within --limit. With --python, a Python 3.12 with torch 2.11.0, it is also tried.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from email.parser import Parser

import built_from

ROOT = pathlib.Path(__file__).resolve().parent.parent
PYTHON, TORCH = "3.12", "2.11.0"
WHEELS = ("jsonargparse==4.53.0", "pytest-timeout==2.4.0", "liger-kernel==0.8.5")
# what those may need and the machine has, by its list of packages; None: of unknown version
THERE = {"torch": TORCH, "triton": "3.6.0", "pyyaml": None, "pytest": None, "typing-extensions": None}
INSTRUCTIONS = {"instructions": "sm_90a", "hopper_instructions": "sm_90a"}
NEWEST_GLIBC = (2, 39)  # of Ubuntu 24.04


class Fault(Exception):
    """The pack would not serve; the text says why."""


def build(jobs: str) -> None:
    """Both libraries, into ijckd_fast/head: what did not change since the last build is not compiled."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # cmake and ninja
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ, IJCKD_CUDA="on", MAX_JOBS=jobs, PATH=path))
    if done.returncode:
        raise Fault("the libraries could not be built: see above")


def library_fault(library: pathlib.Path) -> str | None:
    """Why this library would not load there, or None."""
    if fault := built_from.fault(library):
        return fault
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-1] for line in listed.splitlines()]
    if unstable := [s for s in symbols if re.match(r"_ZNK?(2at|3c10|5torch)", s)]:
        return f"{library.name} needs more of torch than its stable ABI: {unstable[0]}"
    versions = {tuple(map(int, v.split("."))) for s in symbols for v in re.findall(r"@GLIBC_([0-9.]+)", s)}
    if max(versions) > NEWEST_GLIBC:
        return f"{library.name} needs glibc {'.'.join(map(str, max(versions)))}, the machine has 2.39"
    return None


def compile_instructions(into: pathlib.Path) -> None:
    """tests/gpu/*.cu, as tests/gpu/test_instructions.py would."""
    sys.path.append(str(ROOT / "tests"))
    from toolkit import nvcc

    compiler = nvcc()
    if compiler is None:
        raise Fault("there is no nvcc: set CUDA_HOME to the toolkit's folder")
    for name, architecture in INSTRUCTIONS.items():
        command = [compiler, "-shared", "-Xcompiler", "-fPIC", "-std=c++17", f"-arch={architecture}"]
        command += ["-I", ROOT / "csrc", "-I", ROOT / "csrc/cuda", ROOT / f"tests/gpu/{name}.cu"]
        done = subprocess.run([*command, "-o", into / f"{name}.so"], capture_output=True, text=True)
        if done.returncode:
            raise Fault(f"tests/gpu/{name}.cu could not be compiled: {done.stderr}")


def download(wanted: Sequence[str], into: pathlib.Path) -> None:
    """The wheels as the machine's pip would choose them, without what they need."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--dest", into]
    done = subprocess.run([*map(str, command), *wanted], capture_output=True, text=True)
    if done.returncode:
        raise Fault(f"the wheels could not be had: {done.stderr.strip()[-500:]}")


def wheel_fault(wheel: pathlib.Path, packed: dict[str, str], there: dict[str, str | None]) -> str | None:
    """Why this wheel would not serve there, or None. packed: name and version of every wheel of the pack."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.utils import canonicalize_name

    if not wheel.name.endswith("-none-any.whl"):
        return f"{wheel.name} is not pure Python: gpu_check unpacks wheels, it does not install them"
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        if any(".data/" in name for name in names):
            return f"{wheel.name} has files that want to be installed (.data/)"
        described = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(file.read(described).decode())
    if not SpecifierSet(metadata.get("Requires-Python", "")).contains(f"{PYTHON}.3"):
        return f"{wheel.name} is not for Python {PYTHON}: it wants {metadata['Requires-Python']}"
    for text in metadata.get_all("Requires-Dist", []):
        need = Requirement(text)
        if need.marker and not need.marker.evaluate({"python_version": PYTHON, "python_full_version": f"{PYTHON}.3",
                                                     "extra": ""}):  # fmt: skip
            continue
        name = canonicalize_name(need.name)
        if name not in packed and name not in there:
            return f"{wheel.name} needs {text}, which is neither in the pack nor on the machine"
        version = packed.get(name) or there.get(name)
        if version and not need.specifier.contains(version):
            return f"{wheel.name} needs {text}, and there is {version}"
    return None


def wheels_fault(folder: pathlib.Path, there: dict[str, str | None] | None = None) -> str | None:
    """Of all wheels together."""
    from packaging.utils import parse_wheel_filename

    parsed = [parse_wheel_filename(wheel.name)[:2] for wheel in folder.glob("*.whl")]
    packed = {str(name): str(version) for name, version in parsed}
    if len(packed) < len(parsed):
        return "a package is in the pack twice"
    found = (wheel_fault(wheel, packed, THERE if there is None else there) for wheel in sorted(folder.glob("*.whl")))
    return next((fault for fault in found if fault), None)


def try_with(python: str, pack: pathlib.Path) -> str:
    """What the machine's Python and torch say of libraries and wheels."""
    script = (
        "import sys, torch, pathlib\n"
        "pack = pathlib.Path(sys.argv[1])\n"
        "import jsonargparse, pytest_timeout\n"
        "for name in ('_C.so', '_C_cuda.so'): torch.ops.load_library(pack / name)\n"
        "x = torch.rand(3, 1, 4)\n"
        "y, mean, var = torch.ops.ijckd.connector_project(x, torch.eye(4))\n"
        "assert torch.equal(y.flatten(), x.flatten()), y\n"
        "print(f'{sys.version_info[0]}.{sys.version_info[1]} {torch.__version__}')\n"
    )
    with tempfile.TemporaryDirectory() as site:
        for wheel in (pack / "wheels").glob("*.whl"):
            with zipfile.ZipFile(wheel) as file:
                file.extractall(site)
        env = dict(os.environ, PYTHONPATH=site)
        done = subprocess.run([python, "-c", script, pack], capture_output=True, text=True, env=env)
    if done.returncode:
        raise Fault(f"{python} cannot use the pack: {done.stderr.strip()[-500:]}")
    version, torch_version = done.stdout.split()
    if (version, torch_version.split("+")[0]) != (PYTHON, TORCH):
        raise Fault(f"--python: {python} is Python {version} with torch {torch_version}, not {PYTHON} with {TORCH}")
    return f"both libraries load and the wheels import with Python {version} and torch {torch_version}"


def size_of(paths: Sequence[pathlib.Path]) -> float:
    """MiB of files."""
    return sum(path.stat().st_size for path in paths) / 2**20


def checkout_files() -> list[pathlib.Path]:
    """What travels of the checkout: files that git tracks, or would if they were added."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file() and not (ROOT / name).is_symlink()]


def make(out: pathlib.Path, limit: float, python: str | None, wheels: Sequence[str]) -> list[str]:
    """Writes the pack; lines of the report. Fault: what is wrong with it, and `out` is as it was."""
    checkout = size_of(checkout_files())  # before the folder below is a part of it
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as folder:
        new = pathlib.Path(folder, "pack")
        (new / "wheels").mkdir(parents=True)
        for name in built_from.LIBRARIES:
            library = ROOT / "ijckd_fast/head" / name
            if fault := library_fault(library):
                raise Fault(fault)
            shutil.copy2(library, new / name)
        compile_instructions(new)
        download(wheels, new / "wheels")
        if fault := wheels_fault(new / "wheels"):
            raise Fault(fault)
        tried = try_with(python, new) if python else "not tried with the machine's Python and torch (--python)"
        files = sorted(path for path in new.rglob("*") if path.is_file())
        packed = size_of(files)
        report = [f"{path.relative_to(new)}: {size_of([path]):.1f} MiB" for path in files]
        if packed + checkout > limit:
            raise Fault(
                f"pack and checkout are {packed:.1f} + {checkout:.1f} MiB, more than --limit {limit:g}:\n"
                + "\n".join(report)
            )
        described = {"sources": built_from.sources_hash(), "python": PYTHON, "torch": TORCH, "wheels": list(wheels)}
        (new / "pack.json").write_text(json.dumps(described, indent=1) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        new.replace(out)
    return [*report, tried, f"{packed:.1f} MiB and the checkout's {checkout:.1f}, of {limit:g}: {out} is ready"]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 if there is no pack."""
    parser = argparse.ArgumentParser(
        prog="gpu_pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "gpu_pack", metavar="DIR", help="default: gpu_pack")
    parser.add_argument("--limit", type=float, default=64, metavar="MIB", help="of pack and checkout (default: 64)")
    parser.add_argument("--python", metavar="PATH", help="a Python 3.12 with torch 2.11.0, to try the pack with")
    parser.add_argument("--no-build", action="store_true", help="take the libraries that lie in ijckd_fast/head")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    if out.exists() and any(out.iterdir()) and not (out / "pack.json").exists():
        print(f"gpu_pack: {out} is there and is no pack: name another folder", file=sys.stderr)
        return 1
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not args.no_build:
            build(os.environ.get("MAX_JOBS", str(os.cpu_count() or 2)))
        print("\n".join(make(out, args.limit, args.python, WHEELS)))
    except Fault as fault:
        print(f"gpu_pack: {fault}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
