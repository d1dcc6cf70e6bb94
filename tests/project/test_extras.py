"""What beside torch each room may import, that an extra brings it, and what is said where it is not installed."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ijckd_fast import extras

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]

# A room that is not named imports nothing but Python's own modules.
MAY_IMPORT = {
    "caching": "numpy rich torch",
    "commands": "jsonargparse numpy nvidia rich torch yaml",  # doctor alone asks for nvidia's DALI
    "compare": "numpy rich scipy torch yaml",
    "console": "rich",
    "data": "PIL fontTools numpy nvidia pyarrow rich sklearn timm torch torchvision yaml",
    "distill": "torch typing_extensions",
    "evaluate": "numpy rich scipy torch",
    "export": "numpy onnxruntime rich safetensors timm torch",
    "files": "filelock",
    "head": "torch",
    "nets": "huggingface_hub numpy safetensors timm torch torchvision",
    "parallel": "timm torch",
    "plots": "matplotlib",
    "teacher_cache": "numpy safetensors torch",
    "theory": "numpy rich",
    "train": "jsonargparse numpy rich timm torch wandb yaml",
}
# Looked for by name instead of by an import: by torch.onnx and torch.utils.tensorboard, and by export/onnx_file.py.
BY_NAME = {"onnx", "onnxscript", "tensorboard"}


def imported(path: pathlib.Path) -> set[str]:
    """The first words of everything that a file imports, at any depth, but for ours and Python's own."""
    roots = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            roots.add(node.module.partition(".")[0])
    return roots - set(sys.stdlib_module_names) - {"ijckd_fast"}


def in_rooms() -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {}
    for path in sorted((ROOT / "ijckd_fast").rglob("*.py")):
        rooms.setdefault(path.relative_to(ROOT / "ijckd_fast").parts[0].removesuffix(".py"), set()).update(
            imported(path)
        )
    return rooms


def test_rooms_import_only_what_they_may():
    for room, roots in in_rooms().items():
        assert roots <= set(MAY_IMPORT.get(room, "").split()), room


def test_every_import_is_in_the_table_and_nothing_else_is():
    assert set().union(*in_rooms().values()) | BY_NAME == set(extras.PACKAGES) | {"torch"}


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def distributions(extra: str) -> set[str]:
    """Of an extra and of the extras of ours that it takes in."""
    found = set()
    for requirement in OPTIONAL[extra]:
        if ours := re.fullmatch(r"ijckd-fast\[([\w,]+)\]", requirement):
            found |= set().union(*map(distributions, ours[1].split(",")))
        else:
            found.add(name_of(requirement))
    return found


def test_every_package_is_in_the_extra_that_the_table_names():
    assert [name_of(requirement) for requirement in PROJECT["dependencies"]] == ["torch"]
    for package in extras.PACKAGES.values():
        own = {name_of(r) for r in OPTIONAL[package.extra]}
        assert name_of(package.distribution) in own, package
    assert {name_of(r) for r in OPTIONAL["cu12"]} == {"nvidia-dali-cuda120"}
    for extra in ("export", "demo", "wandb", "dev"):  # which bring what the command line itself needs
        assert distributions("train") <= distributions(extra)


def test_the_pins_are_those_of_the_extras():
    """requirements-dev.txt has one version of all that the repository's own commands need, and nothing else."""
    lines = [line for line in (ROOT / "requirements-dev.txt").read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line for line in lines)
    by_torch_or_timm = {"filelock", "huggingface-hub", "typing-extensions"}
    pinned, needed = {name_of(line) for line in lines}, (distributions("dev") | {"torch"}) - by_torch_or_timm
    assert needed <= pinned
    assert pinned - needed <= (distributions("docs") if "docs" in OPTIONAL else set())


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    def absent(name: str) -> str | None:
        return extras.missing("ijckd-fast export", ModuleNotFoundError(f"No module named {name!r}", name=name))

    assert absent("sklearn.datasets") == (
        "ijckd-fast export needs scikit-learn, which is not installed: pip install 'ijckd-fast[train]'"
    )
    assert absent("onnxruntime").endswith("pip install 'ijckd-fast[export]'")
    assert absent("wandb").endswith("pip install 'ijckd-fast[wandb]'")
    for cuda, extra in (("12.9", "cu12"), ("13.0", "cu13"), (None, "cu13")):
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(version=SimpleNamespace(cuda=cuda)))
        assert absent("nvidia.dali").endswith(
            f"needs NVIDIA DALI, which is not installed: pip install 'ijckd-fast[{extra}]'"
        )
    assert absent("torch") is None
    assert extras.missing("x", ModuleNotFoundError("said by a library itself")) is None
    assert extras.missing("x", ImportError("libfoo.so.1: cannot open shared object file", name="scipy")) is None


# Imports as they are where only torch is installed; what torch itself needs stays.
WITHOUT = """
import importlib.abc, sys
from ijckd_fast.extras import PACKAGES
gone = set(PACKAGES) - {"typing_extensions"}
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in gone:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""


def without_extras(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT + code], capture_output=True, text=True)


def test_the_head_works_with_torch_alone():
    done = without_extras("""
import torch
from ijckd_fast import FrozenClassifier, classifier_loss, connector_match
from ijckd_fast.head import reference
z, weight, labels = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4), torch.tensor([0, 4, 2])
loss = classifier_loss(z, weight, None, labels)[0]
loss.backward()
torch.testing.assert_close(loss, reference.classifier_loss(z, weight, None, labels)[0])
connector_match(z, torch.randn(6, 4))
import ijckd_fast
for name in ("load_run", "Distiller", "create_model"):
    try:
        getattr(ijckd_fast, name)
    except ModuleNotFoundError as error:
        print(error)
""")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) >= 2
    for line in said:
        assert re.fullmatch(
            r"ijckd_fast\.\w+ needs [\w-]+, which is not installed: pip install 'ijckd-fast\[train\]'", line
        )


@pytest.mark.parametrize("words", [["train", "--help"], ["doctor"], []])
def test_the_command_line_says_what_it_lacks(words):
    done = without_extras(f"from ijckd_fast import cli\nsys.exit(cli.main({words}))")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "ijckd-fast: ijckd-fast needs jsonargparse, which is not installed: pip install 'ijckd-fast[train]'\n"
    )


def test_a_command_says_what_it_lacks(monkeypatch, capsys):
    from command_line import complaint

    def lacking(_):
        raise ModuleNotFoundError("No module named 'scipy.special'", name="scipy.special")

    monkeypatch.setattr("ijckd_fast.commands.study.finite.run", lacking)
    text = complaint(capsys, "study", "finite")
    assert "ijckd-fast study finite needs scipy, which is not installed: pip install 'ijckd-fast[train]'" in text
