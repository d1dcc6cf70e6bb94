"""Compiles csrc/cuda/*.cu with g++ against the emulator (emulator.h): as a Python module of the launchers, and with the
GPU's host code in a `_C.so` whose ops take CPU tensors. Built files lie in build/emulator under a hash of all that went
in.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

HERE = pathlib.Path(__file__).parent.resolve()
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
REPLACED = {p.name for p in (HERE / "include").iterdir()}  # headers of which the emulator has its own
UNITS = tuple(sorted(p.name for p in (CSRC / "cuda").glob("*.cu")))

# No sanitizer's runtime is linked: the compiler's calls before each access go to emulator.cpp. Locals start as a bit
# pattern, so that a forgotten initialisation shows.
KERNEL_FLAGS = ["-x", "c++", "-std=c++17", "-O1", "-g1", "-fno-strict-aliasing", "-ftrivial-auto-var-init=pattern"]
SMALL = "-DIJCKD_SMALL_SIZES"  # large tiles, and several chunks of classes, at sizes that a CPU can emulate
KERNEL_FLAGS += [SMALL]
REAL = "-UIJCKD_SMALL_SIZES"  # after it
KERNEL_FLAGS += ["-Wno-unknown-pragmas"]  # #pragma unroll
KERNEL_FLAGS += ["-fno-threadsafe-statics"]  # whose guards -fsanitize=thread would watch
WATCHED = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-fsanitize=alignment"]
# The other build, with the runtimes of two sanitizers, which see what stays within a thread's stack, and overflows.
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
HOST_FLAGS = ["-std=c++20", "-O1"]
COMMON_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]


@functools.cache
def cuda_include() -> pathlib.Path | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = (pathlib.Path(home) / "include" for home in homes if home)
    return next((f for f in folders if (f / "cuda_bf16.h").exists() and (f / "cccl/nv/target").exists()), None)


def why_not() -> str | None:
    """Why the emulator cannot be built on this machine, or None."""
    if platform.machine() != "x86_64":
        return f"the emulator needs an x86-64 machine, this is {platform.machine()}"
    if shutil.which(compiler()) is None:
        return f"the emulator needs g++, no {compiler()} found: install it or set CXX"
    if cuda_include() is None:
        return "the emulator needs the CUDA toolkit's headers, none in $CUDA_HOME or /usr/local/cuda"
    return None


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def translate(source: str) -> str:
    """The one thing that a macro cannot do: shared memory is the emulator's, with guards around and poison inside."""
    dynamic = r"extern __shared__\s+(?:__align__\((\d+)\)\s+)?([^;]+?)\s+(\w+)\[\];"
    static = r"__shared__\s+(?:__align__\(\d+\)\s+)?([^;]+?)\s+(\w+)((?:\[[^\]]*\])*);"
    source = re.sub(
        dynamic, lambda m: f"auto* {m[3]} = static_cast<{m[2]}*>(emulator::dynamic_shared({m[1] or 16}));", source
    )
    return re.sub(static, r"auto& \2 = emulator::shared<\1\3>([] {});", source)


def run(command: list[str | pathlib.Path]) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


def kernel_command(*flags: str) -> list[str]:
    cuda = cuda_include()
    includes = [f"-I{HERE / 'include'}", f"-I{HERE}", "-isystem", str(cuda), "-isystem", f"{cuda}/cccl"]
    return [compiler(), *KERNEL_FLAGS, *flags, *COMMON_FLAGS, *includes]


def build_toolkit(folder: pathlib.Path) -> None:
    """The toolkit's headers, most of what the smaller units have to read, once for all of them."""
    names = ("cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h", "cooperative_groups.h")
    for kind, flags in (("watched", WATCHED), ("sanitized", SANITIZED)):
        header = folder / f"{kind}.h"
        header.write_text("".join(f"#include <{name}>\n" for name in names))
        command = [argument for argument in kernel_command(*flags) if argument not in ("-x", "c++")]
        run([*command, "-x", "c++-header", header, "-o", f"{header}.gch"])


def compile_kernels(
    source: pathlib.Path, folder: pathlib.Path, include: pathlib.Path = CSRC, *flags: str, sanitized: bool = False
) -> pathlib.Path:
    """Object file of one .cu file; headers beside it come before those in `include`."""
    translated, compiled = folder / source.name, folder / f"{source.stem}.o"
    for header in source.parent.glob("*.cuh"):
        if header.name in REPLACED:
            continue
        with tempfile.NamedTemporaryFile(
            "w", dir=folder, delete=False
        ) as whole:  # another unit may be reading the one there
            whole.write(f'#line 1 "{header.name}"\n{translate(header.read_text())}')
        pathlib.Path(whole.name).replace(folder / header.name)
    translated.write_text(f'#line 1 "{source.name}"\n{translate(source.read_text())}')
    toolkit = built("toolkit") / ("sanitized.h" if sanitized else "watched.h")
    command = kernel_command(*(SANITIZED if sanitized else WATCHED), *flags)
    run([*command, f"-I{include}", "-include", toolkit, "-c", translated, "-o", compiled])
    return compiled


def compile_host(source: pathlib.Path, compiled: pathlib.Path, includes: list[str]) -> pathlib.Path:
    run([compiler(), *HOST_FLAGS, *COMMON_FLAGS, *includes, "-c", source, "-o", compiled])
    return compiled


def together(*compilations: Callable[[], pathlib.Path]) -> list[pathlib.Path]:
    """The objects, compiled two at a time; what takes longest should come first."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda compilation: compilation(), compilations))


def link(objects: list[pathlib.Path], library: pathlib.Path, extra: tuple[str, ...] = ()) -> pathlib.Path:
    run([compiler(), "-shared", "-Wl,-Bsymbolic", *objects, *extra, "-ldl", "-o", library])
    return library


def build_runtime(folder: pathlib.Path, *flags: str) -> pathlib.Path:
    return compile_host(HERE / "emulator.cpp", folder / "emulator.o", [*flags, "-isystem", str(cuda_include())])


def python_includes() -> list[str]:
    import pybind11

    return ["-isystem", sysconfig.get_paths()["include"], "-isystem", pybind11.get_include()]


def build_pybind11(folder: pathlib.Path) -> None:
    """Its headers, which take most of the time to compile a binding, once for all of them."""
    header = folder / "pybind.h"
    header.write_text("#include <pybind11/numpy.h>\n#include <pybind11/pybind11.h>\n")
    flags = [*HOST_FLAGS, *COMMON_FLAGS, *python_includes()]
    run([compiler(), *flags, "-x", "c++-header", header, "-o", f"{header}.gch"])


def build_bindings(folder: pathlib.Path, source: str = "kernels.cpp") -> pathlib.Path:
    includes = ["-include", str(built("pybind11") / "pybind.h"), *python_includes()]
    includes += [f"-I{CSRC}", f"-I{HERE}", "-isystem", str(cuda_include())]
    return compile_host(HERE / source, folder / f"{pathlib.Path(source).stem}_bindings.o", includes)


def build_kernels(folder: pathlib.Path) -> None:
    units = [functools.partial(compile_kernels, CSRC / "cuda" / unit, folder) for unit in UNITS]
    runtime = functools.partial(build_runtime, folder, "-O3")
    link(together(functools.partial(build_bindings, folder), runtime, *units), folder / "emulated_kernels.so")


def build_broken(folder: pathlib.Path) -> None:
    sources = [HERE / unit for unit in ("broken_hopper.cu", "broken_cluster.cu", "broken_tile.cu", "broken.cu")]
    units = [functools.partial(compile_kernels, source, folder) for source in sources]
    objects = together(functools.partial(build_bindings, folder, "broken.cpp"), *units)
    link([*objects, built("kernels") / "emulator.o"], folder / "emulated_broken.so")


def build_sanitized(folder: pathlib.Path) -> None:
    sources = [*(CSRC / "cuda" / unit for unit in UNITS), HERE / "broken_locals.cu"]
    units = [functools.partial(compile_kernels, source, folder, sanitized=True) for source in sources]
    objects = together(functools.partial(build_runtime, folder, *SANITIZED), *units)
    link([*objects, built("kernels") / "kernels_bindings.o"], folder / "emulated_kernels.so", tuple(SANITIZED))


def sanitizer_environment() -> dict[str, str]:
    """In which a process that was not built so can load build_sanitized's library, and that can throw."""
    found = [
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    return {"LD_PRELOAD": ":".join(found), "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}


def host_units(folder: pathlib.Path, header: str, *flags: str) -> list[Callable[[], pathlib.Path]]:
    """The GPU's host code, with `header` before each file."""
    torch = torch_folder()
    arguments = [f"-I{CSRC}", f"-I{HERE}", "-isystem", f"{torch}/include", "-DTORCH_STABLE_ONLY", "-DIJCKD_CUDA"]
    arguments += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *flags, "-include", str(HERE / header)]
    others = {"blocks.cpp", "sources.cpp"}  # ops of the CPU alone; what a library was built from
    sources = [p for p in (*CSRC.glob("*.cpp"), *CSRC.glob("cuda/*.cpp")) if p.name not in others]
    return [functools.partial(compile_host, p, folder / f"{p.stem}_host.o", arguments) for p in sources]


def torch_folder() -> pathlib.Path:
    return pathlib.Path(importlib.util.find_spec("torch").origin).parent


def link_ops(objects: list[pathlib.Path], folder: pathlib.Path) -> None:
    link(
        objects,
        folder / "_C.so",
        tuple(str(torch_folder() / "lib" / name) for name in ("libtorch_cpu.so", "libc10.so")),
    )


def build_ops(folder: pathlib.Path) -> None:
    """`_C_cuda.so`'s host code on CPU tensors and emulated kernels, with the schemas: a `_C.so` for tests."""
    objects = [built("kernels") / f"{pathlib.Path(name).stem}.o" for name in (*UNITS, "emulator.cpp")]
    link_ops(objects + together(*host_units(folder, "host_on_cpu.h", SMALL)), folder)


def build_recorded(folder: pathlib.Path) -> None:
    """As build_ops, for launches at real sizes that are recorded (emulator.h): no library GEMM is computed either."""
    units = [functools.partial(compile_kernels, CSRC / "cuda" / unit, folder, CSRC, REAL) for unit in UNITS]
    runtime = functools.partial(build_runtime, folder, "-O3")
    link_ops(together(runtime, *units, *host_units(folder, "host_recorded.h")), folder)


BUILDERS = {
    "toolkit": build_toolkit,
    "pybind11": build_pybind11,
    "kernels": build_kernels,
    "broken": build_broken,
    "sanitized": build_sanitized,
    "ops": build_ops,
    "recorded": build_recorded,
}


def built(what: str) -> pathlib.Path:
    """Folder of the finished build of BUILDERS[what], made anew if anything that goes into it has changed."""
    digest = hashlib.sha256(f"{sys.version} {compiler()} {cuda_include()}".encode())
    version = subprocess.run([compiler(), "--version"], capture_output=True, check=True).stdout
    digest.update(version)
    sources = [p for folder in (CSRC, HERE) for p in folder.rglob("*") if p.suffix in {".h", ".cuh", ".cu", ".cpp"}]
    for source in sorted([*sources, HERE / "build.py"]):
        digest.update(source.read_bytes())
    parent = ROOT / "build" / "emulator"
    folder = parent / f"{what}-{digest.hexdigest()[:16]}"
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / f"{what}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it
        if not folder.exists():
            for old in parent.glob(f"{what}-*"):
                shutil.rmtree(old, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=parent) as temporary:
                unfinished = pathlib.Path(temporary) / what
                unfinished.mkdir()
                BUILDERS[what](unfinished)
                unfinished.rename(folder)
    return folder


def load(library: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(library.stem, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
