"""`ijckd-fast evaluate`: figures equal to the training's, missing teachers, other data."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from command_line import complaint, row_of
from rich.console import Console
from tiny_run import config, distilled, write_teacher, write_tree

from ijckd_fast import cli
from ijckd_fast.train import checkpoint, run_folder, train


def test_evaluate(run, data, capsys):
    capsys.readouterr()
    assert cli.main(["evaluate", str(run)]) == 0
    row = row_of(capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    for key in ("top1_percent", "top5_percent", "agreement_percent", "images", "step"):
        assert row[key] == summary["last"][key]
    assert (row["params"], row["macs"]) == (summary["params"], summary["macs"])
    assert row["teacher_top1_percent"] == summary["teacher_top1_percent"]

    assert cli.main(["evaluate", str(run), "--best", "--data-dir", str(data), "--batch-size", "5"]) == 0
    assert row_of(capsys.readouterr().out)["top1_percent"] == summary["best"]["top1_percent"]
    assert cli.main(["evaluate", str(run / "best.pt"), "--data-backend", "dali"]) == 0
    assert row_of(capsys.readouterr().out)["checkpoint"] == str(run / "best.pt")


def test_evaluate_refuses(run, data, tmp_path, capsys):
    state = checkpoint.load(run / "last.pt")
    path = tmp_path / "last.pt"
    checkpoint.save(path, {**state, "config": {**state["config"], "student": "resnet8x0.5"}})
    assert f"{path} belongs to another model" in complaint(capsys, "evaluate", str(path))
    path.write_bytes((run / "last.pt").read_bytes()[:5000])
    assert f"{path} (5000 bytes) is damaged or truncated" in complaint(capsys, "evaluate", str(path))
    other = torch.load(run.parent / "teacher.pt")
    other["fc.bias"] += 1
    torch.save(other, tmp_path / "other.pt")
    words = ("evaluate", str(run), "--teacher-checkpoint", str(tmp_path / "other.pt"))
    assert "is not the one" in complaint(capsys, *words)
    shutil.copytree(data / "val", tmp_path / "data" / "val")
    (tmp_path / "data" / "val" / "cat").rename(tmp_path / "data" / "val" / "cow")
    assert "'cow'" in complaint(capsys, "evaluate", str(run), "--data-dir", str(tmp_path / "data"))


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
        row = row_of(capsys.readouterr().out)
        assert (row["top1_percent"], row["images"]) == (summary["last"]["top1_percent"], 18)
    assert "--val-labels" in complaint(capsys, "evaluate", str(run), "--data-dir", str(flat))
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    assert "1 unexpected ('cat')" in complaint(
        capsys, "index", str(flat), "--class-list", str(tmp_path / "classes.txt")
    )


@pytest.mark.parametrize("objective", ["srrl", "fitnet"])
def test_evaluate_a_student_that_answers_alone_without_its_teacher(data, tmp_path, capsys, objective):
    weights = write_teacher(tmp_path / "teacher.pt")
    train(config(data, tmp_path / "run", **{**distilled(weights), "objective": objective}), console=Console(quiet=True))
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 0
    with_teacher = row_of(capsys.readouterr().out)
    weights.unlink()
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    alone = row_of(out)
    assert "are not there: no agreement" in out
    assert alone["agreement_percent"] is None
    for key in ("top1_percent", "top5_percent", "params", "macs"):
        assert alone[key] == with_teacher[key]
