"""Checkpoints: whole or not there, whatever happens while they are written; and what is refused on reading."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_run import config, differing
from torch import nn

from ijckd_fast.errors import UserError
from ijckd_fast.train import checkpoint, load_run, run_folder, train
from ijckd_fast.train.state import random_state, set_random_state


def _state(value: float, size: int = 4) -> dict:
    return {"learner": {"weight": torch.full((size,), float(value))}, "step": int(value)}


def test_round_trip(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, _state(3))
    state = checkpoint.load(path)
    assert state["step"] == 3
    assert torch.equal(state["learner"]["weight"], torch.full((4,), 3.0))
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("by", ["save", "Writer"])
def test_killed_while_writing_leaves_a_whole_file(tmp_path, by):
    """kill -9 at random moments of a process that does nothing but save: the file always loads and is of one piece."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, _state(0, 1_000_000))
    kills = cut_short = 0
    while cut_short < 5 or kills < 20:
        kills += 1
        assert kills < 100  # else hardly a kill falls into a write, and nothing is shown
        child = os.fork()
        if child == 0:
            value, save = 1.0, checkpoint.save if by == "save" else checkpoint.Writer().save
            while True:
                save(path, _state(value, 1_000_000))
                value += 1
        time.sleep(random.uniform(0.02, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        cut_short += (tmp_path / "last.pt.tmp").exists()
        state = checkpoint.load(path)
        assert (state["learner"]["weight"] == float(state["step"])).all()
    checkpoint.save(path, _state(9))  # the remains are no hindrance
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_state_may_change_while_it_is_written(tmp_path, monkeypatch):
    path, state, go_on, save = tmp_path / "last.pt", _state(3), threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *given: go_on.wait(60) and save(*given))
    called = []
    with checkpoint.Writer() as writer:
        writer.save(path, state, lambda: called.append(checkpoint.load(path)["step"]))
        state["learner"]["weight"].fill_(9)
        state["learner"]["bias"] = torch.ones(1)
        writer.check()
        assert not path.exists()
        assert not called
        go_on.set()
        writer.wait()
        assert called == [3]
    assert differing(checkpoint.load(path)["learner"], _state(3)["learner"]) == []


def test_what_goes_wrong_in_the_writers_thread_is_raised_once(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    with checkpoint.Writer() as writer:
        writer.save(path, _state(1))
        writer.wait()
        for ask in (writer.check, writer.wait, lambda: writer.save(path, _state(2))):
            with monkeypatch.context() as full:
                full.setattr(os, "fsync", _full)
                writer.save(path, _state(2))
                writer._thread.join()
            with pytest.raises(UserError, match=r"no space left .* previous .*last\.pt is untouched"):
                ask()
            writer.check()
            writer.wait()
            assert checkpoint.load(path)["step"] == 1
        writer.save(path, _state(3), lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            writer.wait()
        writer.save(path, _state(4))
    assert checkpoint.load(path)["step"] == 4


def test_a_writer_finishes_what_it_began_when_the_run_fails(tmp_path, monkeypatch):
    path, fsync = tmp_path / "last.pt", os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: time.sleep(0.1) or fsync(descriptor))

    def fail():
        with checkpoint.Writer() as writer:
            writer.save(path, _state(1), lambda: 1 / 0)
            raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        fail()
    assert checkpoint.load(path)["step"] == 1


def test_the_newest_checkpoints_are_kept(tmp_path):
    def keep(step, count):
        checkpoint.save(tmp_path / "last.pt", _state(step))
        run_folder.keep_as(tmp_path, f"checkpoint-{step}.pt", count)
        return [checkpoint.load(path)["step"] for path in run_folder.kept(tmp_path)]

    (tmp_path / "checkpoint-mine.pt").touch()
    assert [keep(step, 3) for step in (8, 9, 10, 100)] == [[8], [8, 9], [8, 9, 10], [9, 10, 100]]
    # taken back to an earlier step: what it goes on from is not thrown away for the sake of later ones
    assert keep(9, 1) == [9, 10, 100]
    assert keep(10, 1) == [10, 100]
    assert (tmp_path / "checkpoint-mine.pt").exists()


def _full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_no_space_left(tmp_path, monkeypatch, call):
    path = tmp_path / "last.pt"
    checkpoint.save(path, _state(1))

    monkeypatch.setattr(os, call, _full)
    with pytest.raises(
        UserError, match=r"no space left .*last\.pt .*MB.* previous .* untouched: free some space.*--resume"
    ):
        checkpoint.save(path, _state(2))
    monkeypatch.undo()
    assert checkpoint.load(path)["step"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


def test_unwritable_folder(tmp_path):
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*No such file"):
        checkpoint.save(tmp_path / "nowhere" / "last.pt", _state(1))


def test_read_only_folder(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, _state(1))

    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as mounted:
        mounted.setattr("builtins.open", read_only)
        with pytest.raises(
            UserError, match=r"cannot write the checkpoint .*: Read-only file system; the previous .* untouched"
        ):
            checkpoint.save(path, _state(2))
    assert checkpoint.load(path)["step"] == 1


def test_the_format_before_this_one(tmp_path):
    path = tmp_path / "last.pt"
    torch.save({"format": "ijckd-fast checkpoint 1", **_state(1)}, path)
    wanted = (
        r"last\.pt was written by another version .*\('ijckd-fast checkpoint 1', expected 'ijckd-fast "
        r"checkpoint 2'\): continue with the version that wrote it"
    )
    with pytest.raises(UserError, match=f"{wanted}$"):
        checkpoint.load(path)
    (tmp_path / "env.json").write_text('{"ijckd_fast": "0.0.9", "git_commit": "0123456789abcdef"}')
    with pytest.raises(UserError, match=rf"{wanted} \(0\.0\.9 at commit 0123456789, says env\.json\)$"):
        checkpoint.load(path)


def test_a_run_of_another_version(data, tmp_path):
    """What has a part less, or a setting that is not known here, is refused with the version that reads it."""
    train(config(data, tmp_path, epochs=1), console=Console(quiet=True))
    state = checkpoint.load(tmp_path / "last.pt")
    assert load_run(tmp_path).saved.step == state["step"]
    checkpoint.save(tmp_path / "last.pt", {**state, "config": {**state["config"], "wings": 2}})
    with pytest.raises(UserError, match=r"does not know \(wings\): continue with the version that wrote it \("):
        load_run(tmp_path)
    del state["threads"]
    checkpoint.save(tmp_path / "last.pt", state)
    with pytest.raises(UserError, match=r"last\.pt lacks 'threads', expected .* that wrote it \(.* or train again"):
        load_run(tmp_path)


def test_truncated(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, _state(1, 1000))
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"last\.pt \(\d+ bytes\) is damaged or truncated"):
            checkpoint.load(path)


def test_foreign_files(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load(path)
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(UserError, match="is not a checkpoint of ijckd-fast"):
        checkpoint.load(path)
    torch.save(nn.Linear(2, 2), path)  # a whole object: loading it would run code
    with pytest.raises(UserError, match="is not a checkpoint of ijckd-fast"):
        checkpoint.load(path)


def test_nan_weights(tmp_path):
    path = tmp_path / "last.pt"
    state = _state(1)
    state["learner"]["weight"][2] = float("nan")
    checkpoint.save(path, state)
    with pytest.raises(UserError, match="NaN or infinite values in 'weight'"):
        checkpoint.load(path)


def test_another_models_weights(tmp_path):
    weights = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(2), "5.weight": torch.ones(1)}
    model = nn.Sequential(nn.Linear(2, 2))
    before = model[0].weight.detach().clone()
    with pytest.raises(
        UserError,
        match=(
            r"last.pt belongs to another model: unexpected '5.weight'; of another shape '0.weight' is \[3, "
            r"2\], expected \[2, 2\]. Set --student"
        ),
    ):
        checkpoint.load_into(model, weights, "last.pt")
    assert torch.equal(model[0].weight, before)


def test_random_state_of_all_generators(tmp_path):
    def draw():
        return [
            torch.rand(3).tolist(),
            np.random.rand(3).tolist(),  # noqa: NPY002
            [random.random() for _ in range(3)],
            random.gauss(0, 1),
        ]

    draw()
    np.random.randn()  # noqa: NPY002 - leaves a cached second value
    checkpoint.save(tmp_path / "last.pt", {**_state(1), "random": random_state()})
    expected = draw()
    assert draw() != expected
    set_random_state(checkpoint.load(tmp_path / "last.pt")["random"])
    assert draw() == expected
