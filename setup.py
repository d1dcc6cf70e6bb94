"""Builds csrc/ with CMake: the CPU library always, the CUDA one where nvcc is found. Of torch only the headers are
used.

Environment: TORCH_DIR (folder of the installed torch), IJCKD_CUDA=auto|on|off, IJCKD_ARCHS (CMake's CUDA
architectures), CUDA_HOME, MAX_JOBS.
"""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sysconfig
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = pathlib.Path(__file__).parent.resolve()


def torch_dir() -> pathlib.Path:
    if "TORCH_DIR" in os.environ:
        candidates = [pathlib.Path(os.environ["TORCH_DIR"])]
    else:
        spec = importlib.util.find_spec("torch")
        candidates = [pathlib.Path(spec.origin).parent] if spec and spec.origin else []
        # under pip's build isolation torch is not importable, but the environment that pip serves still has it
        candidates += [pathlib.Path(sysconfig.get_paths()[key]) / "torch" for key in ("purelib", "platlib")]
    for folder in candidates:
        if (folder / "include/torch/csrc/stable/library.h").exists():
            return folder
    raise SystemExit(
        "ijckd-fast builds against an installed torch >= 2.10 and found none: run `pip install torch` first, "
        "then `pip install --no-build-isolation -e .`; or set TORCH_DIR to torch's folder"
    )


class CMakeBuild(build_ext):
    user_options: ClassVar = [
        *build_ext.user_options,
        ("kernels", None, "the CUDA kernels only: torch need not be there"),
    ]
    boolean_options: ClassVar = [*build_ext.boolean_options, "kernels"]

    def initialize_options(self):
        super().initialize_options()
        self.kernels = False

    def get_ext_filename(self, fullname):
        # no Python tag: the libraries use torch's stable ABI and none of Python's
        return fullname.replace(".", os.sep) + ".so"

    def run(self):
        tmp = HERE / "build" / "cmake"  # kept, so that the next install compiles only what changed
        configure = [
            "cmake",
            "-S",
            str(HERE),
            "-B",
            str(tmp),
            f"-DIJCKD_KERNELS_ONLY={'ON' if self.kernels else 'OFF'}",
        ]
        if not self.kernels:
            configure.append(f"-DTORCH_DIR={torch_dir()}")
        configure.append(f"-DIJCKD_CUDA={os.environ.get('IJCKD_CUDA', 'auto')}")
        if archs := os.environ.get("IJCKD_ARCHS"):
            configure.append(f"-DIJCKD_ARCHS={archs}")
        if ninja := shutil.which("ninja"):
            # said every time: a cached path may lie in an isolated environment that is gone
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.check_call(configure)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 2))
        target = ["--target", "kernels"] if self.kernels else []
        subprocess.check_call(["cmake", "--build", str(tmp), "--parallel", jobs, *target])
        if self.kernels:
            return
        self.libraries = sorted(tmp.glob("_C*.so"))
        in_place = self.inplace or self.editable_mode
        package = HERE / "ijckd_fast/head" if in_place else pathlib.Path(self.build_lib) / "ijckd_fast/head"
        package.mkdir(parents=True, exist_ok=True)
        for old in package.glob("_C*.so"):
            old.unlink()  # never write into a mapped library, and never leave one of an earlier configuration
        for library in self.libraries:
            shutil.copy2(library, package / library.name)

    def get_outputs(self):
        return [
            str(pathlib.Path(self.build_lib) / "ijckd_fast/head" / so.name) for so in getattr(self, "libraries", [])
        ]

    def get_output_mapping(self):
        return {}


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("ijckd_fast.head._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
