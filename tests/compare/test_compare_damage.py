"""A comparison whose runs are damaged: the others are used, and no figure is another."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path

import pytest
import yaml
from damage import FLIPS, damaged
from rich.console import Console
from tiny_run import SETTINGS, write_teacher

from ijckd_fast import cli
from ijckd_fast.compare import Comparison, Outcome, demo, launch, report as comparison_report, reuse, train_all
from ijckd_fast.errors import UserError
from ijckd_fast.train import report, run_folder


@pytest.fixture(scope="module")
def comparison(data, tmp_path_factory) -> Comparison:
    weights = write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pt")
    settings = {key: value for key, value in SETTINGS.items() if key != "objective"}
    own = {"epochs": 1, "eval_every": 1, "log_interval": 1, "allow_weak_teacher": True}
    base = {**settings, **own, "teacher": "resnet8x0.5", "teacher_checkpoint": str(weights)}
    return Comparison("c", methods={"ce": {"objective": "ce"}}, base=base, seeds=2, data_dir=str(data))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without plots, which take the time."""
    monkeypatch.setattr(report, "write_report", lambda *_: None)
    monkeypatch.setattr(comparison_report, "plot_accuracy", lambda *_: None)


@pytest.fixture(scope="module")
def trained(comparison, tmp_path_factory):
    """Both runs of the comparison, finished; not to be changed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda *_: None)
        assert train_all(comparison, output, console=Console(quiet=True)).failed == {}
    return output


@pytest.fixture
def output(trained, tmp_path):
    """A copy."""
    return Path(shutil.copytree(trained, tmp_path / "out"))


def _again(comparison, output) -> tuple[Outcome, str, str]:
    """(what came of it, runs.csv, what was said)"""
    said = io.StringIO()
    outcome = train_all(comparison, output, console=Console(file=said, width=2000))
    comparison_report.write_comparison_report(output, comparison, outcome)
    return outcome, (output / "runs.csv").read_text(), said.getvalue()


@pytest.mark.parametrize("name", ["summary.json", "env.json", "config.yaml", "last.pt", "log.jsonl"])
def test_one_damaged_run(comparison, trained, output, monkeypatch, name):
    """Its figures are those that they were, or it has failed, with the file; the other run is always there."""
    path, summary = output / "ce-seed0" / name, trained / "ce-seed0" / "summary.json"
    lines = (trained / "runs.csv").read_text().splitlines()
    inputs = run_folder.read_json(summary)["inputs"]
    monkeypatch.setattr(reuse.InputDigests, "of", lambda *_: inputs)

    def finished_again(config, resume):
        assert resume  # never from scratch over what is there
        shutil.copy2(summary, output / "ce-seed0")

    monkeypatch.setattr(launch, "train_here", finished_again)
    again = failed = 0
    for how in damaged(path, seed=6, count=3 if name == "log.jsonl" else FLIPS):
        if name == "last.pt":
            (output / "ce-seed0" / "summary.json").unlink(missing_ok=True)
        outcome, table, said = _again(comparison, output)
        if outcome.failed:
            assert list(outcome.failed) == ["ce seed 0"], how
            assert str(path) in outcome.failed["ce seed 0"], how
            assert "ce seed 0: " in (output / "report.md").read_text(), how
            assert table.splitlines() == [lines[0], lines[2]], how
            failed += 1
        else:
            assert table.splitlines() == lines, how
            again += f"{path} " in said
    assert (failed > 30) == (name in ("env.json", "last.pt"))
    assert (again > 30) == (name in ("summary.json", "config.yaml"))


def test_runs_csv_is_never_read(comparison, trained, output):
    for how in damaged(output / "runs.csv", seed=7, count=3):
        assert _again(comparison, output)[1] == (trained / "runs.csv").read_text(), how


def test_a_damaged_summary_is_made_again_by_the_run_itself(comparison, trained, output):
    path = output / "ce-seed1" / "summary.json"
    path.write_text(path.read_text().replace('"top1_percent": ', '"top1_percent": 1'))
    _, table, said = _again(comparison, output)
    assert f"{path} is damaged or was changed (its check value is another): summary.json is written again" in said

    def figures(text):
        return [line.split(",")[:9] for line in text.splitlines()]

    assert figures(table) == figures((trained / "runs.csv").read_text())


def test_files_of_another_run(comparison, trained, output):
    """The sibling's: each is noticed, by its seed."""
    for name, text in (("config.yaml", "made with seed = 0"), ("last.pt", "made with seed = 1")):
        shutil.copy(trained / "ce-seed1" / name, output / "ce-seed0")
        (output / "ce-seed0" / "summary.json").unlink()
        outcome = _again(comparison, output)[0]
        if name == "config.yaml":
            assert outcome.failed == {}  # other settings: trained again, as the docs say
        else:
            assert text in outcome.failed["ce seed 0"]
        shutil.rmtree(output / "ce-seed0")
        shutil.copytree(trained / "ce-seed0", output / "ce-seed0")
    shutil.copy(trained / "ce-seed1" / "summary.json", output / "ce-seed0")
    outcome, table, said = _again(comparison, output)
    assert "it is of a run with seed = 1, expected 0" in said
    assert table.splitlines()[1].split(",")[4:9] == (trained / "runs.csv").read_text().splitlines()[1].split(",")[4:9]


def test_a_damaged_teacher(comparison, tmp_path):
    """All runs begin with it: one sentence, with what to do, and the same command makes it again."""
    base = {name: value for name, value in comparison.base.items() if not name.startswith("teacher")}
    own = dataclasses.replace(
        comparison, base=base, teacher={**base, "student": "resnet8x0.5", "objective": "ce"}, seeds=1
    )
    before = _again(own, tmp_path)[1]
    last = tmp_path / "teacher" / "last.pt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 8
    last.write_bytes(data)
    text = rf"teacher of c: {last} .* is damaged .* or delete {last.parent}, and the same command trains it again"
    with pytest.raises(UserError, match=text):
        _again(own, tmp_path)
    shutil.rmtree(last.parent)
    assert _again(own, tmp_path)[1] == before


def test_a_damaged_log_leaves_the_demos_curves(comparison, output, tmp_path):
    log = output / "ce-seed0" / "log.jsonl"
    log.write_text(log.read_text().replace('"kind": "eval"', '"kind": "ever"'))
    said = io.StringIO()
    demo._plot_curves(tmp_path / "curves.png", {"ce": {0: {}, 1: {}}}, output, Console(file=said, width=2000))
    assert said.getvalue() == f"warning: {log} is damaged: curves.png is without its damaged lines\n"
    assert (tmp_path / "curves.png").exists()


def test_the_command_says_it_and_ends_with_1(comparison, output, tmp_path, capsys):
    (output / "ce-seed0" / "env.json").write_text("{")
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"data_dir": comparison.data_dir, "base": dict(comparison.base), "seeds": 2,
                                    "methods": {"ce": {"objective": "ce"}}}))  # fmt: skip
    assert cli.main(["compare", "--config", str(file), "--output", str(output)]) == 1
    said = "".join(capsys.readouterr())
    assert "failed: ce seed 0: " in said
    assert "env.json is damaged (not JSON" in said
    assert "ce seed 1" in said
    assert "Traceback" not in said


def test_killed_while_an_earlier_run_is_deleted(comparison, trained, output, monkeypatch):
    """After each deletion of `clear`: the same command finds what it can work with, and never a finished run."""
    folder, unlink = output / "ce-seed0", Path.unlink
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    seen = []
    for count in range(1, len(paths) + 1):
        left = count

        def killed(path, missing_ok=False):
            nonlocal left
            if path.parent == folder and path.exists():
                if left == 0:
                    raise KeyboardInterrupt
                left -= 1
            unlink(path, missing_ok=missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", killed)
            try:
                run_folder.clear(folder)
            except KeyboardInterrupt:
                seen.append(count)
        begun = []
        with monkeypatch.context() as patch:
            patch.setattr(launch, "train_here", lambda config, resume, begun=begun: begun.append(resume))
            outcome = train_all(comparison, output, console=Console(quiet=True))
        assert len(begun) == 1, count
        assert list(outcome.runs[""]["ce"]) == [1]
        shutil.rmtree(folder)
        shutil.copytree(trained / "ce-seed0", folder)
    assert len(seen) > 4
