"""The command line: spelling, presets, help, errors in one sentence, and the figures of each command."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_run import config, distilled, options, settings, write_teacher, write_tree

from ijckd_fast import cli
from ijckd_fast.commands import doctor
from ijckd_fast.train import checkpoint, run_folder, train
from ijckd_fast.train.config import FIELDS, PRESET_FOLDER, help_of


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Folder of a finished distillation."""
    folder = tmp_path_factory.mktemp("run")
    teacher = write_teacher(folder / "teacher.pt")
    assert cli.main(["train", *options(settings(data, folder / "run", **distilled(teacher)))]) == 0
    return folder / "run"


def _complaint(capsys, *arguments: str) -> str:
    """The one line that a mistaken command prints."""
    assert cli.main(list(arguments)) == 2
    err = capsys.readouterr().err
    assert err.startswith("ijckd-fast: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def _last_json(text: str):
    return json.loads(text.strip().splitlines()[-1])


def test_preset_then_options(data, tmp_path, capsys):
    """A preset by short name, overridden by options; dashes and underscores, lists with and without brackets."""
    words = ["train", "--config", "r34_r18", "--lr", "0.3", "--milestones", "1,2", "--scale=[0.5,1]", "--print-config"]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 0
    import yaml

    values = yaml.safe_load(capsys.readouterr().out)
    assert (values["student"], values["teacher"], values["epochs"]) == ("resnet18", "torchvision/resnet34", 120)
    assert (values["lr"], values["milestones"], values["scale"]) == (0.3, [1, 2], [0.5, 1.0])

    folder = tmp_path / "run"
    (tmp_path / "mine.yaml").write_text(f"data_dir: {data}\nstudent: resnet8x0.25\nobjective: ce\nlr: 0.5\nepochs: 9\n")
    chosen = ["--output_dir", str(folder), "--lr", "5e-2", "--epochs=1", "--batch_size=12", "--no-tensorboard"]
    small = ["--image-size", "16", "--data-backend", "pillow", "--no-channels-last"]
    assert cli.main(["train", "--config", str(tmp_path / "mine.yaml"), *chosen, *small]) == 0
    saved = run_folder.read_config(folder)
    assert (saved["lr"], saved["epochs"], saved["batch_size"], saved["student"]) == (0.05, 1, 12, "resnet8x0.25")
    assert (saved["channels_last"], saved["eval_resize"], saved["amp_dtype"], saved["ce"]) == (False, 18, "float32", 1)
    assert checkpoint.load(folder / "last.pt")["step"] == 3
    out = capsys.readouterr().out
    assert "step 3/3: val top-1" in out
    assert "images/s" in out
    assert "waiting for data" in out


def test_help(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert f"usage: ijckd-fast {name}" in text
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in FIELDS:
        assert f"--{name.replace('_', '-')}" in text
        assert help_of(name) in text
    assert "images per step and per process" in text
    assert (
        "--lr LR peak learning rate for the global batch; never rescaled behind your back (type: float, default: 0.1)"
        in text
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["trian"], f"unknown command 'trian': wanted one of {', '.join(cli.COMMANDS)}; did you mean 'train'"),
        (["train", "--epoch", "3"], "unknown option --epoch of ijckd-fast train; did you mean '--epochs'"),
        (["train", "--learning_rat=1"], "unknown option --learning-rat"),
        (["train", "--lr", "fast"], "--lr: Expected a float. Got value: fast"),
        (["train", "--schedule", "poly"], "--schedule: Expected a Literal['step', 'cosine']. Got value: poly"),
        (["train", "--config", "r34_r81"], "no preset 'r34_r81': give a YAML file, or one of cifar100_r110_r32"),
        (["train", "--config", "r34_r81"], "did you mean 'r34_r18'"),
        (["train", "--config", "nowhere.yaml"], "no configuration file nowhere.yaml"),
        (["train", "--config", "digits_studnet"], "did you mean 'digits_student'"),
        (["train", "--objective", "ce"], "no --data-dir given"),
        (["train", "--objective", "ce", "--data-dir", "/nowhere"], "/nowhere is not a folder"),
        (["evaluate", "/nowhere"], "no checkpoint at /nowhere: give the folder of a run"),
        (["index", "/nowhere"], "/nowhere is not a folder"),
        (["demo", "--methods", "ce,srll"], "unknown method 'srll': wanted some of ijckd"),
        (["demo", "--seeds", "0"], "--seeds must be at least 1"),
        (["evaluate"], "ijckd-fast evaluate --help"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(capsys, monkeypatch, tmp_path, arguments, text):
    monkeypatch.chdir(tmp_path)
    assert text in _complaint(capsys, *arguments)
    assert not any(path.name != "runs" for path in tmp_path.iterdir())


def test_mistakes_in_a_yaml_file(capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lrr: 0.1\n")
    assert f"unknown setting 'lrr' in {file}; did you mean 'lr'" in _complaint(capsys, "train", "--config", str(file))
    file.write_text("lr: [0.1\n")
    assert f"{file} is not valid YAML" in _complaint(capsys, "train", "--config", str(file))
    file.write_text("lr\n")
    assert "must hold 'setting: value' lines" in _complaint(capsys, "train", "--config", str(file))
    file.write_text("lr: high\n")
    assert "--lr: Expected a float. Got value: high" in _complaint(capsys, "train", "--config", str(file))


def test_evaluate(run, data, capsys):
    capsys.readouterr()
    assert cli.main(["evaluate", str(run)]) == 0
    row = _last_json(capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    for key in ("top1_percent", "top5_percent", "agreement_percent", "images", "step"):
        assert row[key] == summary["last"][key]
    assert (row["params"], row["macs"]) == (summary["params"], summary["macs"])
    assert row["teacher_top1_percent"] == summary["teacher_top1_percent"]

    assert cli.main(["evaluate", str(run), "--best", "--data-dir", str(data), "--batch-size", "5"]) == 0
    assert _last_json(capsys.readouterr().out)["top1_percent"] == summary["best"]["top1_percent"]
    assert cli.main(["evaluate", str(run / "best.pt"), "--data-backend", "dali"]) == 0
    assert _last_json(capsys.readouterr().out)["checkpoint"] == str(run / "best.pt")


def test_evaluate_refuses(run, data, tmp_path, capsys):
    state = checkpoint.load(run / "last.pt")
    path = tmp_path / "last.pt"
    checkpoint.save(path, {**state, "config": {**state["config"], "student": "resnet8x0.5"}})
    assert f"{path} belongs to another model" in _complaint(capsys, "evaluate", str(path))
    path.write_bytes((run / "last.pt").read_bytes()[:5000])
    assert f"{path} (5000 bytes) is damaged or truncated" in _complaint(capsys, "evaluate", str(path))
    other = torch.load(run.parent / "teacher.pt")
    other["fc.bias"] += 1
    torch.save(other, tmp_path / "other.pt")
    words = ("evaluate", str(run), "--teacher-checkpoint", str(tmp_path / "other.pt"))
    assert "is not the one" in _complaint(capsys, *words)
    shutil.copytree(data / "val", tmp_path / "data" / "val")
    (tmp_path / "data" / "val" / "cat").rename(tmp_path / "data" / "val" / "cow")
    assert "'cow'" in _complaint(capsys, "evaluate", str(run), "--data-dir", str(tmp_path / "data"))


def test_index(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns(".*"))
    folder = tmp_path / "data" / "train" / "ant"
    (folder / "000.jpg").write_bytes(b"")
    turned = Image.Exif()
    turned[274] = 8
    Image.new("RGB", (20, 300)).save(folder / "001.jpg", exif=turned)
    Image.new("RGB", (20, 30)).save(folder / "002.jpg", format="PNG")
    assert cli.main(["index", str(tmp_path / "data")]) == 0
    out, err = capsys.readouterr()
    assert "ijckd-fast: warning: 1 of 36 files in" in err
    train, val = _last_json(out)["rows"]
    assert [(row["split"], row["images"], row["classes"], row["left_out"]) for row in (train, val)] == [
        ("train", 35, 3, 1),
        ("val", 18, 3, 0),
    ]
    assert train["images_per_class"] == [11, 12, 12]
    assert (train["shorter_side"][0], train["longer_side"][2]) == (20, 300)
    assert train["formats"] == {"JPEG": 34, "PNG": 1}
    assert (train["rotated"], val["rotated"]) == (1, 0)
    assert train["reasons"] == {"empty file": 1}
    assert val["bytes"] == sum(path.stat().st_size for path in (tmp_path / "data" / "val").glob("*/*"))
    assert (train["opened"], val["opened"]) == (36, 18)
    assert train["images_per_s"] > 0
    for text in ("11  12  12", "JPEG 34, PNG 1", "1 (empty file 1)", "36 at ", str(tmp_path / "data" / ".ijckd-index")):
        assert text in out
    assert cli.main(["index", str(tmp_path / "data"), "--fast"]) == 0
    out = capsys.readouterr().out
    assert [row["opened"] for row in _last_json(out)["rows"]] == [0, 0]
    assert "nothing new" in out


def test_class_list_and_val_labels_stay_with_the_run(tmp_path, monkeypatch, capsys):
    flat, folders, run = write_tree(tmp_path / "flat"), write_tree(tmp_path / "folders"), tmp_path / "run"
    rows = []
    for path in sorted((flat / "val").glob("*/*")):
        path.rename(flat / "val" / f"{path.parent.name}_{path.name}")
        rows.append(f"{path.parent.name}_{path.name},{path.parent.name}")
    for folder in (flat / "val").glob("*/"):
        folder.rmdir()
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    (tmp_path / "classes.txt").write_text("cat\nant\nbee\n")
    monkeypatch.chdir(tmp_path)
    summary = train(config(flat, run, class_list="classes.txt", val_labels="labels.csv"))
    assert summary["last"]["top1_percent"] > 60  # of 33 by chance: train and val agree on what the labels mean
    assert checkpoint.load(run / "last.pt")["classes"] == ["cat", "ant", "bee"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_folder.read_config(run)["class_list"] == str(tmp_path / "classes.txt")
    for arguments in ([], ["--data-dir", str(folders)], ["--data-dir", str(flat), "--val-labels", "../labels.csv"]):
        capsys.readouterr()
        assert cli.main(["evaluate", str(run), *arguments]) == 0
        row = _last_json(capsys.readouterr().out)
        assert (row["top1_percent"], row["images"]) == (summary["last"]["top1_percent"], 18)
    assert "--val-labels" in _complaint(capsys, "evaluate", str(run), "--data-dir", str(flat))
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    assert "1 unexpected ('cat')" in _complaint(
        capsys, "index", str(flat), "--class-list", str(tmp_path / "classes.txt")
    )


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
    monkeypatch.setattr(doctor.importlib, "import_module", missing)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "pip install pyarrow" in out
    assert "training cannot run" in out


@pytest.mark.parametrize(
    ("capabilities", "texts"),
    [
        ([(7, 0)], ["sm_70: none of our kernels, which need sm_75 or newer"]),
        ([(7, 5)], ["sm_75: library GEMMs and plain kernels (stage 0); the tensor-core kernels need sm_80 or newer"]),
        ([(8, 0)], ["sm_80: tensor-core kernels (stage 1)"]),
        ([(9, 0)], ["sm_90: Hopper's tensor-core kernels (stage 2)"]),
        ([(12, 0)], ["sm_120: tensor-core kernels (stage 1)"]),
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
    gpu = {item.what: item for item in doctor.examine()}["GPU"]
    assert gpu.ok
    for text in texts:
        assert text in gpu.found


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


def test_progress_bar_in_a_terminal(data, tmp_path):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    train(config(data, tmp_path), console=terminal)
    text = screen.getvalue()
    assert "20/20" in text
    assert "% waiting for data" in text
    assert "step 4/20, epoch" not in text  # the lines of a log file
    assert "val top-1" in text


def test_other_ends(monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/log.jsonl")

    monkeypatch.setitem(cli.COMMANDS, "train", full)
    assert "no space left on the device for /runs/log.jsonl: free some space" in _complaint(capsys, "train")

    def absent(_):
        raise ImportError("ijckd_fast: the compiled library _C.so is not there")

    monkeypatch.setitem(cli.COMMANDS, "train", absent)
    assert "`ijckd-fast doctor` says what is missing" in _complaint(capsys, "train")

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", interrupted)
    assert cli.main(["train"]) == 130


def test_presets_are_packaged_files():
    names = {path.name for path in PRESET_FOLDER.iterdir()}
    assert {name for name in names if not name.startswith("cifar100_")} == {
        "digits_student.yaml",
        "digits_teacher.yaml",
        "imagenet_r34_r18.yaml",
        "imagenet_r50_mobilenetv1.yaml",
    }


def test_as_a_process():
    """The exit code and the streams of a real process."""
    command = [sys.executable, "-m", "ijckd_fast.cli"]
    done = subprocess.run([*command, "train", "--epoch", "3"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("ijckd-fast: unknown option --epoch")
    assert done.stderr.count("\n") == 1


def test_doctor_outlives_a_missing_library(tmp_path):
    package = tmp_path / "ijckd_fast"
    shutil.copytree(Path(cli.__file__).parent, package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    command = [sys.executable, "-c", "import sys; from ijckd_fast.cli import main; sys.exit(main(['doctor']))"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "CPU library of the ops: " in done.stdout
    assert "training cannot run" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["evaluate", "RUN", "--device", "tpu"], "--device"),
        (["train", "--data-dir", "DATA", "--objective", "ce", "--output-dir", "FILE"], "--output-dir must be a folder"),
        (["demo", "--methods", ""], "--methods names no method"),
        (["index", "DATA", "--verify", "quick"], "--verify"),
    ],
)
def test_more_mistakes_are_one_sentence(capsys, data, run, tmp_path, arguments, text):
    file = tmp_path / "file"
    file.write_text("")
    places = {"RUN": str(run), "DATA": str(data), "FILE": str(file)}
    assert text in _complaint(capsys, *[places.get(a, a) for a in arguments])


@pytest.mark.parametrize("option", [["--milestones=1,2"], ["--milestones", "1,2"], ["--milestones", "[1,2]"]])
def test_lists_as_people_write_them(capsys, option):
    with pytest.raises(SystemExit):
        cli.main(["train", *option, "--print-config"])
    assert "milestones:\n- 1\n- 2\n" in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["srrl", "fitnet"])
def test_evaluate_a_student_that_answers_alone_without_its_teacher(data, tmp_path, capsys, objective):
    weights = write_teacher(tmp_path / "teacher.pt")
    train(config(data, tmp_path / "run", **{**distilled(weights), "objective": objective}), console=Console(quiet=True))
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 0
    with_teacher = _last_json(capsys.readouterr().out)
    weights.unlink()
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    alone = _last_json(out)
    assert "are not there: no agreement" in out
    assert alone["agreement_percent"] is None
    for key in ("top1_percent", "top5_percent", "params", "macs"):
        assert alone[key] == with_teacher[key]


def test_a_moved_run_and_its_moved_teacher(data, tmp_path, capsys):
    train(config(data, tmp_path / "T", student="resnet8x0.5", epochs=1), console=Console(quiet=True))
    student = {"objective": "ijckd", "teacher": str(tmp_path / "T"), "allow_weak_teacher": True}
    train(config(data, tmp_path / "S", **student), console=Console(quiet=True))
    (tmp_path / "S" / "summary.json").unlink()
    (tmp_path / "T").rename(tmp_path / "T2")
    (tmp_path / "S").rename(tmp_path / "S2")
    assert cli.main(["train", "--resume", str(tmp_path / "S2"), "--teacher", str(tmp_path / "T2")]) == 0
