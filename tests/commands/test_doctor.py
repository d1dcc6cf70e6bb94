"""`ijckd-fast doctor`: what works here, whatever is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ijckd_fast import cli, head
from ijckd_fast.commands import doctor


def test_doctor(capsys, monkeypatch):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "training can run" in out

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    findings = {item.what: item for item in doctor.examine()}
    assert findings["DALI"].ok
    assert findings["CPU library of the ops"].ok
    looks = {"import_module": missing, "util": SimpleNamespace(find_spec=lambda name: None)}
    monkeypatch.setattr(doctor, "importlib", SimpleNamespace(**looks))
    for words in (["doctor"], ["doctor", "--thorough"]):
        assert cli.main(words) == 1
        out = capsys.readouterr().out
        assert "pyarrow: pip install 'ijckd-fast[train]', which stores the index" in out
        assert "wandb: pip install 'ijckd-fast[wandb]', for --wandb" in out
        assert "training cannot run" in out


def test_only_thorough_imports_what_is_merely_looked_for(tmp_path):
    """A package that cannot be imported is installed, until somebody tries."""
    (tmp_path / "onnxruntime.py").write_text("raise OSError('libfoo.so is not there')")
    code = "import sys; sys.argv = ['', *sys.argv[1:]]; from ijckd_fast import cli; cli.main(sys.argv[1:])"
    said, packages = {}, f"{code}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    for words in (["doctor"], ["doctor", "--thorough"]):
        path = os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parents[1])])
        done = subprocess.run(
            [sys.executable, "-c", packages, *words], env={**os.environ, "PYTHONPATH": path}, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        said[words[-1]] = done.stdout
    quick, thorough = (set(said[word].splitlines()[-1].split()) for word in ("doctor", "--thorough"))
    slow = {"timm", "torchvision", "sklearn", "matplotlib", "scipy"}
    assert slow & quick == set()
    assert slow <= thorough
    assert "libfoo.so is not there" not in said["doctor"]
    assert "libfoo.so is not there" in said["--thorough"]


@pytest.mark.parametrize(
    ("capabilities", "texts"),
    [
        ([(7, 0)], ["sm_70: none of our kernels, which need sm_75 or newer"]),
        ([(7, 5)], ["sm_75: library GEMMs and plain kernels (stage 0); the tensor-core kernels need sm_80 or newer"]),
        ([(8, 0)], ["sm_80: tensor-core kernels (stage 1)"]),
        ([(9, 0)], ["sm_90: Hopper's tensor-core kernels (stage 2)"]),
        ([(12, 0)], ["sm_120: tensor-core kernels (stage 1) of PTX"]),
        (
            [(9, 0), (7, 5), (9, 0)],
            ["3 x card 0, CUDA", "; sm_75: library GEMMs and plain", "; sm_90: Hopper's tensor-core"],
        ),
    ],
    ids=str,
)
def test_doctor_says_which_kernels_serve_the_gpu(monkeypatch, capabilities, texts):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_name", "card {}".format)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(head, "refused_launches", lambda device: "")
    gpu = {item.what: item for item in doctor.examine()}["GPU"]
    assert gpu.ok
    for text in texts:
        assert text in gpu.found


@pytest.mark.parametrize(
    ("refused", "texts"),
    [
        (0, []),
        (1, ["launches that overlap, so each waits for the end of the one before"]),
        (1 + 8, ["launches that overlap, so each waits for the end of the one before"]),
        (
            2 + 4,
            [
                "clusters, so blocks share no memory",
                "cooperative launches, so whole rows of logits take one launch more",
            ],
        ),
        (
            8,
            ["cooperative launches that overlap, so the one of whole rows of logits waits for the one before"],
        ),
    ],
)
def test_doctor_says_what_the_driver_refuses(monkeypatch, refused, texts):
    ops = SimpleNamespace(ijckd=SimpleNamespace(refused_launches=lambda like: refused))
    monkeypatch.setattr(torch, "ops", ops)
    want = f"the driver refuses {' and '.join(texts)}" if texts else ""
    assert head.refused_launches("cpu") == want


def test_doctor_says_how_to_build_a_missing_library(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "commands/doctor.py"))
    library = {item.what: item for item in doctor.examine()}["CPU library of the ops"]
    assert not library.ok
    assert "pip install -e ." in library.advice
    (tmp_path / "head").mkdir()
    (tmp_path / "head/_C.so").write_text("not a library")
    library = {item.what: item for item in doctor.examine()}["CPU library of the ops"]
    assert not library.ok
    assert "does not fit this torch" in library.advice


def test_doctor_outlives_a_missing_library(tmp_path):
    package = tmp_path / "ijckd_fast"
    shutil.copytree(Path(cli.__file__).parent, package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    command = [sys.executable, "-c", "import sys; from ijckd_fast.cli import main; sys.exit(main(['doctor']))"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "CPU library of the ops: " in done.stdout
    assert "training cannot run" in done.stdout
