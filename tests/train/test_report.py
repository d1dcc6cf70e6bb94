"""The report of a run: which terms of the loss it plots."""

from __future__ import annotations

from rich.console import Console
from tiny_run import config

from ijckd_fast.train import run_folder, train
from ijckd_fast.train.report import loss_terms


def test_the_terms_are_those_of_the_log(data, tmp_path):
    """Whatever terms an objective has: they are read from the rows, no list names them."""
    train(config(data, tmp_path / "run", max_steps=4), console=Console(quiet=True))
    (row, *_) = run_folder.read_log(tmp_path / "run")
    assert loss_terms([row]) == ["loss", "ce"]
    assert loss_terms([{"epoch": 1.0, "loss": 1.5, "ce": 1.0, "new": 0.5, "grad_norm": 2.0, "lr": 0.1}])[1:] == [
        "ce",
        "new",
    ]
    assert loss_terms([]) == []
