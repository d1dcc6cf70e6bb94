"""`ijckd-fast export`: the files answer as the trained net does and load where they should, or are not written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command_line import row_of
from image_tree import photo
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_run import config, distilled, write_teacher, write_tree
from torch import nn

from ijckd_fast import cli, export
from ijckd_fast.data import build_index
from ijckd_fast.distill import Distiller, get_objective
from ijckd_fast.errors import UserError
from ijckd_fast.export import folder as export_folder, write
from ijckd_fast.export.onnx_file import onnx_bytes
from ijckd_fast.nets import count_parameters, create_model, fingerprint
from ijckd_fast.train import build_val_loader, checkpoint, load_run, resolve, train

SHAPES = {
    "map": {"objective": "ijckd"},
    "conv1x1": {"objective": "ijckd-pooled"},
    "linear": {"objective": "ijckd-pooled", "connector": "linear"},
    "mlp": {"objective": "ijckd-pooled", "connector": "mlp"},
    "own": {"objective": "kd"},
    "timm": {"objective": "srrl", "student": "timm/test_resnet", "image_size": 32, "eval_resize": 36},
}
# Students of other kinds in timm: tokens, and a norm between pooling and classifier.
KINDS = {
    kind: {**SHAPES["timm"], "objective": "kd", "student": f"timm/test_{kind}", "epochs": 1, "lr": 0.01}
    for kind in ("vit", "convnext")
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """data/ and teacher.pt"""
    folder = tmp_path_factory.mktemp("home")
    write_tree(folder / "data")
    write_teacher(folder / "teacher.pt")
    return folder


@pytest.fixture(scope="module")
def trained(home):
    """Gives the folder of a finished run by its name in SHAPES or KINDS, and trains it once."""

    def run(name: str) -> Path:
        folder = home / name
        if not folder.exists():
            settings = {**distilled(home / "teacher.pt"), **(SHAPES | KINDS)[name]}
            train(config(home / "data", folder, **settings), console=Console(quiet=True))
        return folder

    return run


@pytest.fixture(scope="module")
def exported(trained):
    """A pristine export of the run called 'map', to be copied."""
    folder = trained("map").parent / "map-export"
    if not folder.exists():
        assert cli.main(["export", str(trained("map")), "--out", str(folder)]) == 0
    return folder


def _export(capsys, *arguments) -> dict:
    """The figures of the command."""
    capsys.readouterr()
    assert cli.main(["export", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return row_of(out)


def _complaint(capsys, *arguments, code: int = 2) -> str:
    capsys.readouterr()
    assert cli.main(["export", *map(str, arguments)]) == code
    err = capsys.readouterr().err
    assert err.startswith("ijckd-fast: ")
    assert err.count("\n") == 1
    return err


def _distiller(run: Path) -> Distiller:
    return load_run(run).distiller


def _val_images(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All images [18, 3, S, S] and labels [18] of val/, as the run's evaluation sees them."""
    loaded = load_run(run)
    with loaded.loader(loaded.index()) as loader:
        batches = list(loader)
    return torch.cat([b.images for b in batches]).contiguous(), torch.cat([b.labels for b in batches])


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", SHAPES)
def test_the_files_answer_as_the_trained_net(name, trained, capsys):
    run = trained(name)
    before = _left(run)
    row = _export(capsys, run)
    folder = run / "export"
    assert _left(run) == sorted([*before, "export"])
    assert _left(folder) == sorted(export.FILES)
    assert {
        **json.loads((folder / "config.json").read_text()),
        "folder": str(folder),
        "checkpoint": row["checkpoint"],
    } == row

    distiller = _distiller(run)
    images, labels = _val_images(run)
    of_trained = distiller.predict(images)
    scale = float(of_trained.abs().max())
    module = export.load_exported(folder)
    assert not module.training
    torch.testing.assert_close(module(images), of_trained, rtol=0, atol=1e-5 * scale)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (18, 1, 5):  # any batch size
        (logits,) = session.run(["logits"], {"images": images[:batch].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), of_trained[:batch], rtol=0, atol=1e-4 * scale)
    top1 = 100 * float((of_trained.argmax(1) == labels).float().mean())
    assert row["evaluated"]["top1_percent"] == pytest.approx(top1)
    for found in row["compared"].values():
        assert (found["images"], found["disagreements"]) == (18, 0)
        assert found["difference"] <= 1e-5 * found["scale"]
        assert found["scale"] == pytest.approx(scale, rel=1e-3)

    assert not any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in module.modules())
    assert row["sha256"].keys() == {"model.safetensors", "model.onnx", "student.safetensors"}
    parts = row["cost"]["parts"]
    assert parts["total"]["params"] == count_parameters(module)
    for key in ("params", "macs"):
        assert parts["total"][key] == sum(parts[part][key] for part in ("backbone", "connector", "classifier"))
    macs = distiller.deployed_cost(images.shape[2])[1]
    assert (parts["total"]["macs"] < macs) if name in ("linear", "mlp") else (parts["total"]["macs"] == macs)
    assert row["connector_joined_with_classifier"] == (name in ("linear", "mlp"))
    if name == "linear":  # as large as the student with a classifier of its own
        assert parts["total"]["params"] == parts["student alone"]["params"]
        assert parts["connector"] == {"params": 0, "macs": 0, "torch_ms": 0.0, "onnxruntime_ms": None}
    assert parts["total"]["onnxruntime_ms"] > 0
    assert min(parts[part]["torch_ms"] for part in ("backbone", "classifier", "total", "student alone")) > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm", {"model_name": "test_resnet", "num_classes": 3}),
        ("vit", {"model_name": "test_vit", "num_classes": 3, "img_size": 32}),
        ("convnext", {"model_name": "test_convnext", "num_classes": 3}),
    ],
)
def test_student_weights_are_the_trained_ones(name, options, trained, capsys):
    """In the library's names; timm loads them with what the command says, and answers as the student."""
    import timm

    run = trained(name)
    row = _export(capsys, run, "--overwrite", "--no-onnx")
    images, _ = _val_images(run)
    net = timm.create_model(**row["timm"], checkpoint_path=str(run / "export" / "student.safetensors")).eval()
    begun = create_model(f"timm/{options['model_name']}", 3, image_size=32).eval()
    with torch.no_grad():
        logits = net(images)
        torch.testing.assert_close(logits, _distiller(run).predict(images))
        assert not torch.allclose(logits, begun(images), atol=1e-2)
    assert row["timm"] == options
    assert row["student_has_classifier"]


def test_student_weights_without_a_classifier(trained, capsys):
    run = trained("map")
    row = _export(capsys, run, "--out", run.parent / "no-timm", "--no-onnx")
    assert row["timm"] is None
    assert not row["student_has_classifier"]
    weights = load_file(run.parent / "no-timm" / "student.safetensors")
    assert weights.keys() == _distiller(run).student.native_state_dict().keys()
    assert not any(key.startswith("fc.") for key in weights)


@pytest.mark.parametrize(
    ("name", "drop", "loads"),
    [
        ("resnet18", False, True),
        ("resnet18", True, True),
        ("efficientnet_b0", False, False),
        ("resnet20", False, False),
    ],
)
def test_which_students_timm_loads(tmp_path, name, drop, loads):
    """torchvision's nets that timm has under the same layers' names, with and without a classifier."""
    model = create_model(name, 3, image_size=32).eval()
    if drop:
        model.drop_classifier()
    path = tmp_path / "student.safetensors"
    save_file(model.native_state_dict(), path)
    with torch.no_grad():
        options = export.timm_options(path, model, 32)
    assert options == ({"model_name": name, "num_classes": 0 if drop else 3} if loads else None)


def test_timm_must_give_the_same_answers(tmp_path, monkeypatch):
    model = create_model("timm/test_resnet", 3, image_size=32).eval()
    changed = {k: v + (k == "fc.bias") for k, v in model.native_state_dict().items()}
    save_file(changed, tmp_path / "student.safetensors")
    with torch.no_grad():
        assert export.timm_options(tmp_path / "student.safetensors", model, 32) is None


def test_a_map_larger_than_the_teachers_is_pooled_first():
    """SimKD's rule, also where the sizes do not divide; and against pooled features there is nothing to pool."""
    for size, objective, pooled in ((64, "ijckd", (2, 2)), (80, "simkd", (3, 3)), (64, "ijckd-pooled", None)):
        torch.manual_seed(0)
        student, teacher = (
            create_model("resnet8x0.25", 3, image_size=size),
            create_model("mobilenet_v1", 3, image_size=size),
        )
        distiller = Distiller(student, teacher, get_objective(objective)).eval()
        module = export.deployed_module(distiller, size)
        assert module.map_size == pooled
        images = torch.randn(3, 3, size, size)
        of_trained = distiller.predict(images)
        torch.testing.assert_close(module(images), of_trained, rtol=0, atol=1e-5 * float(of_trained.abs().max()))
        cost = export.measure_cost(module, size, 1, None)
        assert cost["total"]["macs"] == distiller.deployed_cost(size)[1]


def test_a_linear_connector_is_joined_only_where_that_is_cheaper():
    """64 -> 16 -> 100 is cheaper as two layers, 64 -> 16 -> 10 as one."""
    for classes, joined in ((100, False), (10, True)):
        student, teacher = (
            create_model("resnet8", classes, image_size=16),
            create_model("resnet8x0.25", classes, image_size=16),
        )
        distiller = Distiller(student, teacher, get_objective("ijckd-pooled", connector="linear")).eval()
        module = export.deployed_module(distiller, 16)
        assert module.joined == joined
        assert isinstance(module.connector, nn.Identity) == joined
        images = torch.randn(3, 3, 16, 16)
        torch.testing.assert_close(module(images), distiller.predict(images))


def test_onnx_metadata(exported):
    model = onnx.load(exported / "model.onnx")
    onnx.checker.check_model(model)
    held = {entry.key: entry.value for entry in model.metadata_props}
    described = json.loads((exported / "config.json").read_text())
    assert held["num_classes"] == "3"
    assert json.loads(held["classes"]) == described["classes"] == ["ant", "bee", "cat"]
    assert json.loads(held["preprocessing"]) == described["preprocessing"]
    assert described["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert held["student"] == "resnet8x0.25"
    assert str(Path(export.__file__).parent).encode() not in (exported / "model.onnx").read_bytes()


def test_the_documented_onnxruntime_snippet(home, exported, monkeypatch, tmp_path, capsys):
    """docs/deploy.md's preprocessing makes the evaluation's pixels."""
    text = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
    code = re.search(r"runs this block -->\n```python\n(.*?)```", text, re.DOTALL)[1]
    folder = shutil.copytree(exported, tmp_path / "deploy")
    described = json.loads((folder / "config.json").read_text())
    paths = sorted((home / "data" / "val").glob("*/*"))
    shutil.copy(paths[0], folder / "image.jpg")
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(code, names)
    images, _ = _val_images(home / "map")
    np.testing.assert_allclose(np.stack([names["preprocess"](path) for path in paths]), images.numpy(), atol=1e-5)
    answer = export.load_exported(folder)(images[:1]).argmax(1)
    assert capsys.readouterr().out == f"{[described['classes'][k] for k in answer]}\n"
    # a margin around the crop, images higher than wide and wider than high, odd remainders
    names["steps"].update(resize_shorter_side=19, center_crop=16)
    sizes = ((20, 31), (47, 22), (23, 23))
    (tmp_path / "data" / "val" / "ant").mkdir(parents=True)
    paths = [tmp_path / "data" / "val" / "ant" / f"{n}.png" for n in range(len(sizes))]
    for path, (w, h) in zip(paths, sizes, strict=True):
        photo(h, w, seed=h).save(path)
    settings = resolve(config(tmp_path / "data", tmp_path, eval_resize=19))
    index = build_index(settings.data_dir, "val")
    with build_val_loader(settings, index, torch.device("cpu")) as loader:
        images = next(iter(loader)).images
    np.testing.assert_allclose(np.stack([names["preprocess"](path) for path in paths]), images.numpy(), atol=1e-5)


def test_options(trained, home, tmp_path, capsys):
    run = trained("map")
    row = _export(
        capsys, run, "--best", "--out", tmp_path / "a" / "b", "--no-onnx", "--images", 4, "--data-dir", home / "data"
    )
    assert row["checkpoint"] == str(run / "best.pt")
    assert row["step"] == checkpoint.load(run / "best.pt")["step"]
    assert _left(tmp_path / "a" / "b") == ["config.json", "model.safetensors", "student.safetensors"]
    assert row["compared"].keys() == {"deployed with trained"}
    assert row["compared"]["deployed with trained"]["images"] == 4
    assert row["cost"]["parts"]["total"]["onnxruntime_ms"] is None
    row = _export(capsys, run / "last.pt", "--out", tmp_path / "c", "--no-onnx")
    assert row["checkpoint"] == str(run / "last.pt")
    assert "--images must be at least 1, got 0" in _complaint(capsys, run, "--images", 0)
    assert "no checkpoint at /nowhere" in _complaint(capsys, "/nowhere")


def test_images_are_spread_over_the_classes(trained, tmp_path, monkeypatch, capsys):
    seen = []
    write_export = export.write_export

    def watched(folder, run, loader, **options):
        seen.extend(loader)
        return write_export(folder, run, seen, **options)

    monkeypatch.setattr(export, "write_export", watched)
    _export(capsys, trained("map"), "--out", tmp_path / "out", "--no-onnx", "--images", 3)
    assert torch.cat([batch.labels for batch in seen]).tolist() == [0, 1, 2]


def test_without_the_onnx_packages(trained, tmp_path, monkeypatch, capsys):
    for name in ("onnx", "onnxruntime", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            err = _complaint(capsys, trained("map"), "--out", tmp_path / "out")
        assert f"model.onnx needs {name}" in err
        assert "pip install 'ijckd-fast[export]', or leave ONNX out with --no-onnx" in err
    assert _left(tmp_path) == []


def test_occupied_folders(trained, exported, tmp_path, capsys):
    run = trained("map")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for more in ((), ("--overwrite",)):
        assert "holds files that no export wrote (thesis.tex)" in _complaint(capsys, run, "--out", mine, *more)
    assert (mine / "thesis.tex").read_text() == "years of work"
    assert "holds files that no export wrote" in _complaint(capsys, run, "--out", run, "--overwrite")
    assert "cannot be listed (Not a directory)" in _complaint(capsys, run, "--out", mine / "thesis.tex")
    assert "cannot write the export" in _complaint(capsys, run, "--out", mine / "thesis.tex" / "x", "--no-onnx")

    earlier = shutil.copytree(exported, tmp_path / "earlier")
    (earlier / "config.json").write_text("{}")
    assert "holds an earlier export: give --overwrite" in _complaint(capsys, run, "--out", earlier)
    assert (earlier / "config.json").read_text() == "{}"
    _export(capsys, run, "--out", earlier, "--overwrite", "--no-onnx")
    assert _left(earlier) == ["config.json", "model.safetensors", "student.safetensors"]
    export.load_exported(earlier)
    (tmp_path / "empty").mkdir()
    _export(capsys, run, "--out", tmp_path / "empty", "--no-onnx")
    assert _left(tmp_path) == ["earlier", "empty", "mine"]


@pytest.mark.parametrize(
    ("code", "text"),
    [(errno.ENOSPC, "no space left to write the export"), (errno.EROFS, "(Read-only file system)")],
)
def test_a_disk_that_does_not_take_it(trained, exported, tmp_path, monkeypatch, capsys, code, text):
    """Wherever it fails, the earlier export stays as it was and nothing is left beside it."""
    earlier = shutil.copytree(exported, tmp_path / "earlier")
    old = {path.name: path.read_bytes() for path in earlier.iterdir()}
    real_fsync, real_rename = os.fsync, Path.rename
    for at in range(8):  # two files of weights, config.json twice, each with its folder's entry; then the renaming
        calls = iter(range(100))

        def fsync(file, at=at, calls=calls):
            if next(calls) == at:
                raise OSError(code, os.strerror(code))
            real_fsync(file)

        monkeypatch.setattr(os, "fsync", fsync)
        assert text in _complaint(capsys, trained("map"), "--out", earlier, "--overwrite", "--no-onnx")
        assert {path.name: path.read_bytes() for path in earlier.iterdir()} == old
        assert _left(tmp_path) == ["earlier"]
    monkeypatch.setattr(os, "fsync", real_fsync)

    def rename(self, target):
        if self.name.endswith(".tmp"):
            raise OSError(code, os.strerror(code))
        return real_rename(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert text in _complaint(capsys, trained("map"), "--out", earlier, "--overwrite", "--no-onnx")
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == old
    assert _left(tmp_path) == ["earlier"]


def _killed_while_exporting(folder: Path, overwrite: bool, renames: int) -> None:
    """A process that writes an export of one file, and is killed with its second folder to be renamed, or before."""
    child = os.fork()
    if child == 0:
        rename, calls = Path.rename, iter(range(9))

        def dying(self, target):
            if next(calls) == renames:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)

        Path.rename = dying
        with export_folder.new_folder(folder, overwrite) as made:
            (made / "config.json").write_text("the new one")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_what_killed_exports_leave(tmp_path):
    folder = tmp_path / "[out]"
    _killed_while_exporting(folder, False, 0)
    assert len(_left(tmp_path)) == 1
    export.refuse_occupied(folder, False)
    assert _left(tmp_path) == []
    folder.mkdir()
    (folder / "config.json").write_text("the old one")
    _killed_while_exporting(folder, True, 1)  # the old one is aside, the new one has no name yet
    assert not folder.exists()
    with (
        pytest.warns(UserWarning, match=r"out\] is the earlier export again"),
        pytest.raises(UserError, match="earlier"),
    ):
        export.refuse_occupied(folder, False)
    assert (folder / "config.json").read_text() == "the old one"
    assert _left(tmp_path) == ["[out]"]


def test_two_exports_to_one_folder_at_a_time(tmp_path):
    folder = tmp_path / "out"
    writing = export_folder.new_folder(folder, False)
    second = writing.__enter__()
    (second / "config.json").write_text("second")
    with export_folder.new_folder(folder, False) as first:
        (first / "config.json").write_text("first")
        export.refuse_occupied(folder, False)  # of a third one: the two that are under way stay
    assert second.is_dir()
    with pytest.raises(UserError, match="holds an earlier export: give --overwrite"):
        writing.__exit__(None, None, None)
    assert (folder / "config.json").read_text() == "first"
    assert _left(tmp_path) == ["out"]


def test_a_module_that_answers_otherwise_is_not_written(trained, exported, tmp_path, monkeypatch, capsys):
    run = trained("map")
    connect = export.Deployed.connect
    with monkeypatch.context() as patch:
        patch.setattr(export.Deployed, "connect", lambda self, x: 1.01 * connect(self, x))
        err = _complaint(capsys, run, "--out", tmp_path / "out", "--no-onnx", code=1)
    assert "the deployed module's logits differ from the trained net's by up to" in err
    assert "on 18 images, expected at most 0.001 of the largest logit" in err
    answer = write.onnx_answer
    earlier = shutil.copytree(exported, tmp_path / "earlier")
    old = (earlier / "config.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(write, "onnx_answer", lambda path: lambda images: answer(path)(images) * 1.001)
        err = _complaint(capsys, run, "--out", earlier, "--overwrite", code=1)
    assert "onnxruntime's logits differ from PyTorch's" in err
    assert (earlier / "config.json").read_text() == old
    assert _left(tmp_path) == ["earlier"]


def test_nan_is_a_difference():
    logits = torch.tensor([[1.0, float("nan")]])
    assert not export.compare_logits(logits, torch.ones(1, 2)).within(1e-3)


def test_damaged_and_changed_exports_are_refused(exported, tmp_path):
    def damaged(name: str, change) -> str:
        folder = shutil.copytree(exported, tmp_path / "x", dirs_exist_ok=True)
        path = folder / name
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(UserError) as refused:
            export.load_exported(folder)
        assert str(refused.value).count("\n") == 0
        return str(refused.value)

    def edited(**changes):
        """As an earlier version would have written it: without a check value."""
        return lambda data: json.dumps({**json.loads(data), "check": None, **changes}).encode()

    middle = exported.joinpath("model.safetensors").stat().st_size // 2
    flipped = damaged("model.safetensors", lambda data: data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    assert "is not the file that config.json describes" in flipped
    assert "is not the file that config.json describes" in damaged("model.safetensors", lambda data: data[:1000])
    assert "config.json is damaged (not JSON" in damaged("config.json", lambda data: data[:300])
    assert "config.json is damaged (expected an object" in damaged("config.json", lambda data: b"[]")
    changed = damaged("config.json", lambda data: data.replace(b'"image_size": 16', b'"image_size": 17'))
    assert "config.json is damaged or was changed (its check value is another): export the run again" in changed
    assert "config.json is not of an export" in damaged("config.json", edited(format="ijckd-fast export 0"))
    for changes in (
        {"student": "resnet8x0.5"},
        {"classes": ["ant", "bee"]},
        {"connector": "conv1x1"},
        {"connector": None},
    ):
        assert "does not fit the net that config.json describes" in damaged("config.json", edited(**changes))
    for changes in ({"classes": None}, {"teacher_map_size": 4}, {"image_size": "16"}, {"student": "resnet9"}):
        assert "config.json describes cannot be built" in damaged("config.json", edited(**changes))
    for digests in ({}, None):
        assert "is not the file that config.json describes" in damaged("config.json", edited(sha256=digests))
    (tmp_path / "x" / "model.safetensors").unlink()
    shutil.copy(exported / "config.json", tmp_path / "x")
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        export.load_exported(tmp_path / "x")
    with pytest.raises(UserError, match=r"no export in .* \(it has no config\.json\)"):
        export.load_exported(tmp_path)


def test_a_missing_teacher(trained, home, tmp_path, capsys):
    """Whose classifier answers, it is needed; of a student that answers alone it is not."""
    run, own = trained("map"), trained("own")
    moved = home / "moved.pt"
    (home / "teacher.pt").rename(moved)
    try:
        err = _complaint(capsys, run, "--out", tmp_path / "a")
        assert "say with --teacher-checkpoint where they are now" in err
        _export(capsys, run, "--out", tmp_path / "a", "--teacher-checkpoint", moved, "--no-onnx")
        assert cli.main(["export", str(own), "--out", str(tmp_path / "b"), "--no-onnx"]) == 0
        row = json.loads((tmp_path / "b" / "config.json").read_text())
        assert (row["objective"], row["teacher"]) == ("kd", "resnet8x0.5")
        other = write_teacher(tmp_path / "other.pt")
        state = torch.load(other)
        state["fc.bias"] += 1
        torch.save(state, other)
        assert "is not the one" in _complaint(capsys, run, "--out", tmp_path / "c", "--teacher-checkpoint", other)
    finally:
        moved.rename(home / "teacher.pt")


def test_a_distiller_is_not_changed(trained):
    run = trained("map")
    distiller = _distiller(run)
    before = fingerprint(distiller)
    export.deployed_module(distiller, 16)
    assert fingerprint(distiller) == before


def test_an_operation_beyond_the_onnx_exporter_is_named():
    class Attention(nn.Module):
        """In five dimensions, as hiera's."""

        def forward(self, images):  # [B, 3, S, S] -> [B, 3]
            x = images[:, None, None].flatten(4)  # [B, 1, 1, 3, S * S]
            return torch.nn.functional.scaled_dot_product_attention(x, x, x).mean((1, 2, 4))

    with torch.no_grad(), pytest.raises(UserError, match=r"operation aten\.scaled_dot_product_attention.*--no-onnx"):
        onnx_bytes(Attention(), 8, {})
