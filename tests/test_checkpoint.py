"""Checkpoints: whole or not there, whatever happens while they are written; and what is refused on reading."""

from __future__ import annotations

import errno
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from torch import nn

from ijckd_fast import checkpoint, run_folder
from ijckd_fast.errors import UserError


def _state(value: float, size: int = 4) -> dict:
    return {"learner": {"weight": torch.full((size,), float(value))}, "step": int(value)}


def test_round_trip(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, _state(3))
    state = checkpoint.load(path)
    assert state["step"] == 3
    assert torch.equal(state["learner"]["weight"], torch.full((4,), 3.0))
    assert os.listdir(tmp_path) == ["last.pt"]


def test_killed_while_writing_leaves_a_whole_file(tmp_path):
    """kill -9 at random moments of a process that does nothing but save: the file always loads and is of one piece."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, _state(0, 1_000_000))
    kills = cut_short = 0
    while cut_short < 5:
        kills += 1
        assert kills < 100  # else hardly a kill falls into a write, and nothing is shown
        child = os.fork()
        if child == 0:
            value = 1.0
            while True:
                checkpoint.save(path, _state(value, 1_000_000))
                value += 1
        time.sleep(random.uniform(0.02, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        cut_short += (tmp_path / "last.pt.tmp").exists()
        state = checkpoint.load(path)
        assert (state["learner"]["weight"] == float(state["step"])).all()
    checkpoint.save(path, _state(9))  # the remains are no hindrance
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_no_space_left(tmp_path, monkeypatch, call):
    path = tmp_path / "last.pt"
    checkpoint.save(path, _state(1))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
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
        match=r"another model: '5.weight' is not in this model, '0.weight' has shape \[3, 2\], wanted \[2, 2\]",
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
    checkpoint.save(tmp_path / "last.pt", {**_state(1), "random": checkpoint.random_state()})
    expected = draw()
    assert draw() != expected
    checkpoint.set_random_state(checkpoint.load(tmp_path / "last.pt")["random"])
    assert draw() == expected


def test_fingerprint_sees_every_weight():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    digest = checkpoint.fingerprint(model)
    assert checkpoint.fingerprint(model) == digest
    with torch.no_grad():
        model[1].running_var[1] += 1e-7
    assert checkpoint.fingerprint(model) != digest


def test_one_run_per_folder(tmp_path):
    text = rf"another run \(process {os.getpid()}\) is writing to .*--output-dir"
    with run_folder.lock(tmp_path), pytest.raises(UserError, match=text):
        run_folder.lock(tmp_path).__enter__()
    with run_folder.lock(tmp_path):
        pass


def test_lock_of_a_dead_run_is_no_hindrance(tmp_path):
    child = os.fork()
    if child == 0:
        held = run_folder.lock(tmp_path)
        held.__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "lock").read_text() == str(child)
    with run_folder.lock(tmp_path):
        pass
