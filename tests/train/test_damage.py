"""Damaged, cut, foreign files of a run: the same result, a repair that is said, or a refusal that names the file."""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import complaint
from damage import FLIPS, damaged
from rich.console import Console
from tiny_run import config, differing, distilled

from ijckd_fast import cli, files
from ijckd_fast.errors import UserError
from ijckd_fast.train import Saved, load_run, loop, make_config, report, run_folder, settings_of, train as loud_train
from ijckd_fast.train.log import RunLog

train = functools.partial(loud_train, console=Console(quiet=True))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory, teacher):
    """A finished run of 2 epochs; not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(config(data, folder, epochs=2, eval_every=1, log_interval=1, **distilled(teacher)))
    (folder / "stopped.txt").write_text("of an earlier part\n")
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


class Reached(Exception):
    """A resumed run has passed all that is compared before it builds anything."""


@pytest.fixture
def stopping(monkeypatch):
    """Resumed runs end where their settings and their checkpoint are settled; what these are."""
    reached: dict[str, Any] = {}

    def set_up(config):
        reached["config"] = config
        raise Reached

    def read(path):
        reached["saved"] = Saved_read(path)
        return reached["saved"]

    Saved_read = Saved.read
    monkeypatch.setattr(loop, "set_up_torch", set_up)
    monkeypatch.setattr(Saved, "read", read)
    return reached


def _resume(folder: Path) -> tuple[bool, str]:
    """(whether the run would continue, or is finished; what was said), as by `train --resume`."""
    said = io.StringIO()
    try:
        settings = make_config({**settings_of(folder), "output_dir": str(folder)})
        loud_train(settings, resume=True, console=Console(file=said, width=2000))
    except Reached:
        pass
    except UserError as error:
        return False, str(error)
    return True, said.getvalue()


def test_a_run_whose_last_checkpoint_is_gone_continues_from_another(whole, run, stopping):
    """Not from the first step, which would take all that was trained away."""
    (run / "summary.json").unlink()
    (run / "last.pt").unlink()
    continues, said = _resume(run)
    assert continues
    assert f"{run} has no last.pt: continuing from best.pt" in said
    assert stopping["saved"].step > 0
    (run / "best.pt").rename(run / "checkpoint-4.pt")
    assert "has no last.pt: continuing from checkpoint-4.pt" in _resume(run)[1]


@pytest.mark.parametrize("name", ["last.pt", "config.yaml", "log.jsonl", "stopped.txt", "env.json", "best.pt"])
def test_a_run_that_is_resumed(whole, run, name, stopping, capsys):
    (run / "summary.json").unlink()
    assert _resume(run)[0]
    settings, state = stopping["config"], stopping["saved"].as_dict()
    refused, read = 0, name in ("last.pt", "config.yaml")
    for how in damaged(run / name, seed=1, count=FLIPS if read else 4):
        continues, said = _resume(run)
        if continues:
            assert stopping["config"] == settings, how
            assert differing(stopping["saved"].as_dict(), state) == [], how
        else:
            assert str(run / name) in said, how
            refused += 1
    assert refused >= (40 if name == "last.pt" else 0)
    assert read or refused == 0


def test_a_finished_run_that_is_resumed(whole, run, stopping, capsys):
    """Either it is finished, or its last checkpoint says so again, and that is said."""
    expected, again = json.loads((whole / "summary.json").read_text()), 0
    for how in damaged(run / "summary.json", seed=2):
        stopping.clear()
        continues, said = _resume(run)
        assert continues, (how, said)
        if "saved" in stopping:
            assert f"{run / 'summary.json'} is damaged" in said, how
            again += 1
        else:
            found = json.loads((run / "summary.json").read_text())
            assert {name: found[name] for name in expected if name in found and name != "check"} == {
                name: value for name, value in expected.items() if name != "check"
            }, how
    assert again > 30


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "config.yaml", "env.json", "summary.json", "log.jsonl"])
def test_a_run_that_is_loaded(run, name):
    """What evaluate and export begin with."""
    best = name == "best.pt"
    state = load_run(run, best=best).saved.as_dict()
    refused = 0
    for how in damaged(run / name, seed=3, count=4 if name.endswith((".json", ".jsonl")) else FLIPS):
        try:
            found = load_run(run, best=best)
        except UserError as error:
            text = str(error)
            assert str(run / name) in text, how
            refused += 1
        else:
            assert differing(found.saved.as_dict(), state) == [], how
    assert refused >= 40 if name.endswith(".pt") else refused == 0


def test_the_log_of_a_run_that_is_resumed(whole, run, capsys):
    state = Saved.read(run / "last.pt")
    rows = run_folder.read_log(whole)
    assert state.logged is not None
    assert state.logged[0] == len(rows) == 10
    silent = 0
    for how in damaged(run / "log.jsonl", seed=4):
        said: list[str] = []
        with RunLog(run, state.step, tensorboard=False, logged=state.logged, say=said.append):
            pass
        found = run_folder.read_log(run)
        assert all(row in rows for row in found), how
        assert found == rows or f"{run / 'log.jsonl'}" in said[0], how
        silent += not said
    assert silent < 10


def test_what_a_damaged_log_leaves(data, run, tmp_path, monkeypatch, capsys):
    """The lines behind it stay, it is said before a step is made, and the report is written."""
    path = run / "log.jsonl"
    (run / "summary.json").unlink()
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2].replace('"lr"', '"mr"'), *lines[3:]]) + "\n")
    monkeypatch.setattr(report, "write_report", lambda *given: reported.append(given))
    reported: list[Any] = []
    assert cli.main(["train", "--resume", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"{path} is damaged in line 3: it continues without" in said
    assert len(reported[0][2]) == len(lines) - 1 == len(path.read_text().splitlines())
    assert json.loads((run / "log-damaged.jsonl").read_text().splitlines()[2])["mr"] > 0
    path.write_text("")
    (run / "summary.json").unlink()
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert "has 0 of the 10 rows that were logged up to step 8" in capsys.readouterr().out
    summary = run_folder.read_json(run / "summary.json")
    assert summary is not None
    assert summary["images_per_s"] is None
    monkeypatch.undo()
    monkeypatch.setattr(report, "plot_training", lambda *_: None)
    report.write_report(run, summary, [])
    assert "| speed | not known without log.jsonl;" in (run / "report.md").read_text()


def test_another_runs_log_is_refused(whole, run):
    state = Saved.read(run / "last.pt")
    rows = [{**row, "loss": 9.0} if "loss" in row else row for row in run_folder.read_log(whole)]
    (run / "log.jsonl").write_text("".join(json.dumps({**r, "check": files.check_value(r)}) + "\n" for r in rows))
    with pytest.raises(UserError, match=r"log\.jsonl does not hold the rows .* another run's .* or delete it"):
        RunLog(run, state.step, tensorboard=False, logged=state.logged, say=print)


def test_a_log_of_an_earlier_version(run):
    rows = run_folder.read_log(run)
    path = run / "log.jsonl"
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n" + lines[0][:20])  # a kill has cut the last one
    assert run_folder.examine_log(run) == (rows, [])
    changes = [('"lr"', '"mr"'), ('"step": 1', '"step": "1"'), ('"train"', '["train"]'), ("0.25", '"0.25"')]
    bad = ["[]", "7", '{"kind": "train"}', *(lines[0].replace(old, new, 1) for old, new in changes)]
    path.write_text("\n".join([*bad, *lines]) + "\n")
    assert run_folder.examine_log(run) == (rows, list(range(1, 8)))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_no_space_for_a_line_of_the_log(data, tmp_path, monkeypatch, number):
    """The sentence names the file and how to continue, and so it does."""
    folder = tmp_path / "run"
    original, lines = io.FileIO.write, []

    class Full(io.FileIO):
        def write(self, line):
            lines.append(line)
            if len(lines) < 3:
                return original(self, line)
            if len(lines) == 3:
                return original(self, line[:10])  # what fits
            raise OSError(number, os.strerror(number))

    def opened(path, mode="r", buffering=-1, **how):
        return Full(path, "ab") if (mode, buffering) == ("ab", 0) else open(path, mode, buffering, **how)

    with monkeypatch.context() as full:
        full.setattr("ijckd_fast.train.log.open", opened, raising=False)
        with pytest.raises(UserError, match=rf"{folder}/log\.jsonl.* continue with ijckd-fast train --resume {folder}"):
            train(config(data, folder, epochs=1, log_interval=1))
    assert len((folder / "log.jsonl").read_text().split("\n")) == 3
    monkeypatch.setattr(report, "write_report", lambda *_: None)
    train(config(data, folder, epochs=1, log_interval=1), resume=True)
    assert [row["step"] for row in run_folder.read_log(folder) if row["kind"] == "train"] == [1, 2, 3, 4]


def test_settings_that_differ_from_the_checkpoints(data, whole, run, tmp_path, capsys, stopping):
    (run / "summary.json").unlink()
    path = run / "config.yaml"
    text = path.read_text()
    resume = ("train", "--resume", str(run))

    path.write_text(text.replace("lr: 0.05", "lr: 0.06"))
    assert "lr is 0.06, last.pt has 0.05. Delete it, and it is written again" in complaint(capsys, *resume)
    path.write_text("".join(line for line in text.splitlines(True) if not line.startswith("#")).replace("0.05", "0.06"))
    assert "check value, the last line, is not there): lr is 0.06" in complaint(capsys, *resume)
    for content in (
        b"",
        text[: text.index("lr:")].encode(),
        b"lr: \xff\n",
        b"[1]",
        b"a: [",
        b"1: 2\n",
        b"a: 2020-02-31\n",
    ):
        path.write_bytes(content)
        continues, said = _resume(run)
        assert continues, said
        assert f"{path} " in said
        assert "the settings are those of last.pt" in said
    path.unlink()
    assert f"{path} is not there: the settings are those of last.pt" in _resume(run)[1]
    path.write_text(text)

    # whole, and another run's
    settings = Saved.read(run / "last.pt").config
    assert settings_of(run) == settings
    other = config(data, run, **{**settings, "seed": 7, "workers": 1})
    run_folder.write_config(run, other)
    assert "last.pt was made with seed = 0, config.yaml beside it has 7" in complaint(capsys, *resume)
    with pytest.raises(UserError, match=r"last\.pt does not belong .* in config\.yaml seed is 7, last\.pt has 0"):
        load_run(run)
    # numbers and lists as another file format has them
    same = {**settings, "ce": 1, "milestones": list(settings["milestones"])}
    run_folder.write_config(run, config(data, run, **same))
    assert "ce: 1\n" in path.read_text()
    assert _resume(run)[0]
    load_run(run)
    # free settings are what config.yaml says: another start of the run has written it
    run_folder.write_config(run, config(data, run, **{**settings, "workers": 1}))
    assert settings_of(run)["workers"] == 1
    assert _resume(run)[0]
    load_run(run)
    # another checkpoint says them, and then none could
    (run / "last.pt").unlink()
    path.write_text(text.replace("lr: 0.05", "lr: 0.06"))
    assert "lr is 0.06, best.pt has 0.05" in complaint(capsys, *resume)
    (run / "best.pt").unlink()
    assert "restore it, or give the settings again in a new run" in complaint(capsys, *resume)
    path.unlink()
    assert "no run in" in complaint(capsys, *resume)


def test_settings_of_an_earlier_version(run):
    """No check value anywhere: taken as they are, with the types that they must have."""
    path = run / "config.yaml"
    text = "".join(line for line in path.read_text().splitlines(True) if not line.startswith("#"))
    (run / "env.json").write_text(json.dumps(run_folder.read_environment(run)))
    path.write_text(text)
    assert settings_of(run) == Saved.read(run / "last.pt").config
    path.write_text(text.replace("lr: 0.05", "lr: fast"))
    with pytest.raises(UserError, match=r"lr in .*config\.yaml: wanted float, got 'fast'"):
        settings_of(run)


def test_a_summary_that_is_not_this_runs(data, whole, run, capsys, stopping):
    path = run / "summary.json"
    summary = run_folder.read_json(path)
    assert summary is not None

    def said_of(values: dict, write=files.write_json) -> str:
        write(path, values)
        return _resume(run)[1]

    assert "this run is finished" in said_of(summary)
    of_another = {**summary, "config": {**summary["config"], "seed": 7}}
    assert "it is of a run with seed = 7, expected 0" in said_of(of_another)
    assert "it has no accuracies" in said_of({**summary, "last": None})
    assert "it lacks one of steps, params" in said_of({name: v for name, v in summary.items() if name != "macs"})
    # of an earlier version, without a check value
    unchecked = lambda path, values: path.write_text(json.dumps(values))  # noqa: E731
    assert "this run is finished" in said_of(summary, unchecked)
    edited = {**summary, "last": {**summary["last"], "top1_percent": 99.0}}
    assert "its accuracies are not in log.jsonl" in said_of(edited, unchecked)
    (run / "last.pt").unlink()
    path.write_text("{")
    assert f"{path} is damaged (not JSON" in complaint(capsys, "train", "--resume", str(run))


def test_a_checkpoint_of_an_earlier_version_is_looked_at_too(run):
    """No digest: the CRCs of its zip."""
    path = run / "last.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state, path)
    expected = load_run(run).saved.as_dict()
    refused = 0
    for how in damaged(path, seed=5):
        try:
            found = load_run(run).saved.as_dict()
        except UserError as error:
            text = str(error)
            assert f"{path} (" in text, how
            assert "best.pt" in text, how
            refused += 1
        else:
            assert differing(found, expected) == [], how
    assert refused > 30


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(run, monkeypatch, capsys):
    last = run / "last.pt"
    last.unlink()
    last.symlink_to(last)
    assert "last.pt cannot be read (Too many levels of symbolic links)" in complaint(capsys, "evaluate", str(run))
    last.unlink()
    last.mkdir()
    assert "last.pt cannot be read (Is a directory): it is a folder, expected a file" in complaint(
        capsys, "evaluate", str(run)
    )
    last.rmdir()
    last.touch()

    def forbidden(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("ijckd_fast.train.checkpoint.open", forbidden, raising=False)  # root may read everything
    with pytest.raises(UserError, match=r"last\.pt cannot be read \(Permission denied\): give this user the right"):
        load_run(run)
