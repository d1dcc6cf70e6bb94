"""The demo at its real size for one method and seed: what it shows, writes, reuses and reports."""

from __future__ import annotations

import json

import pytest

from ijckd_fast import cli
from ijckd_fast.compare import cells, demo, launch, method_row, reuse
from ijckd_fast.train import run_folder
from ijckd_fast.train.config import load_preset

FAST = {"digits_teacher": {"epochs": 3}, "digits_student": {"epochs": 6, "eval_every": 3}}


@pytest.fixture
def fast(monkeypatch):
    """The demo's own presets with fewer epochs."""
    monkeypatch.setattr(demo, "load_preset", lambda name: {**load_preset(name), **FAST[name]})


def test_demo(fast, tmp_path, capsys, monkeypatch):
    words = ["demo", "--output", str(tmp_path), "--seeds", "2", "--methods", "ce,ijckd"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    rows = json.loads(out.strip().splitlines()[-1])["rows"]
    keys = ["method", "top1_mean", "top1_std", "seeds", "agreement_mean", "params", "macs", "seconds"]
    assert [list(row) for row in rows] == [keys, keys]
    assert [row["method"] for row in rows] == ["ce", "ijckd"]
    assert demo.TASK.split(".")[0] in " ".join(out.split())
    for row in rows:
        summaries = [
            json.loads((tmp_path / f"{row['method']}-seed{seed}" / "summary.json").read_text()) for seed in (0, 1)
        ]
        top1 = [summary["last"]["top1_percent"] for summary in summaries]
        assert row["top1_mean"] == pytest.approx(sum(top1) / 2)
        assert row["top1_std"] == pytest.approx(abs(top1[0] - top1[1]) / 2**0.5)
        assert row["seeds"] == 2
        for value in top1:
            assert f"{value:.2f} %" in out
    # The student is the same net; through the teacher's classifier it deploys a connector too.
    assert rows[0]["params"] == 5_514
    assert rows[1]["params"] == 5_514 - 170 + 12_032 + 650
    assert run_folder.read_config(tmp_path / "ce-seed0")["data_backend"] == "dali"
    assert run_folder.read_config(tmp_path / "ce-seed0")["hflip"] == 0
    assert json.loads((tmp_path / "ce-seed0" / "env.json").read_text())["torch_threads"] == 1
    report = (tmp_path / "report.md").read_text()
    assert f"| ijckd | {rows[1]['top1_mean']:.2f} ± {rows[1]['top1_std']:.2f} |" in report
    assert demo.TASK in report
    for plot in ("accuracy.png", "curves.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
        assert plot in report

    # Again: nothing is trained but what is missing or has other settings, and the figures are the same.
    for name in ("summary.json", "last.pt", "best.pt", "log.jsonl"):
        (tmp_path / "ce-seed1" / name).unlink()
    trained = []
    train = launch.train
    monkeypatch.setattr(
        launch, "train", lambda config, **named: (trained.append(config.output_dir), train(config, **named))[1]
    )
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert trained == [str(tmp_path / "ce-seed1")]
    assert out.count("finished earlier, used again") == 4
    again = json.loads(out.strip().splitlines()[-1])["rows"]
    for row, before in zip(again, rows, strict=True):
        assert {**row, "seconds": 0} == {**before, "seconds": 0}

    # Other settings, or other code, and the runs are made again.
    trained.clear()
    monkeypatch.setitem(FAST["digits_student"], "lr", 0.05)
    monkeypatch.setattr(reuse, "code_hash", lambda: "other")
    assert cli.main([*words[:-1], "ce"]) == 0
    assert trained == [str(tmp_path / name) for name in ("teacher", "ce-seed0", "ce-seed1")]


def test_one_seed_has_no_spread():
    summary = {
        "last": {"top1_percent": 90.0, "agreement_percent": 91.0},
        "params": 5,
        "macs": 6,
        "seconds": 1.5,
    }
    row = method_row("ce", {0: summary})
    assert row["top1_std"] is None
    assert "±" not in cells(row)[1]


def test_the_task_is_what_the_presets_say():
    teacher, student = load_preset("digits_teacher"), load_preset("digits_student")
    assert student["train_per_class"] == 10
    assert student["image_size"] == teacher["image_size"] == 16
    assert student["hflip"] == teacher["hflip"] == 0
    assert student["teacher"] == teacher["student"]
