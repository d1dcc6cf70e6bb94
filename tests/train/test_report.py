"""The report of a run: which terms of the loss it plots, and what its plots show."""

from __future__ import annotations

import pytest
from rich.console import Console
from tiny_run import config

from ijckd_fast import plots
from ijckd_fast.train import run_folder, train
from ijckd_fast.train.report import loss_terms, plot_training


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


@pytest.fixture
def panels(monkeypatch, tmp_path):
    """The axes that plot_training draws of rows, by their titles."""

    def draw(rows):
        figures, figure = [], plots.figure

        def kept(*size):
            figures.append(figure(*size))
            return figures[-1]

        monkeypatch.setattr(plots, "figure", kept)
        plot_training(tmp_path / "training.png", rows)
        return {axes.get_title(): axes for axes in figures[0][0].axes if axes.get_title()}

    return draw


def _row(epoch: float, loss: float, **terms: float) -> dict:
    return {
        "kind": "train", "epoch": epoch, "loss": loss, **terms, "grad_norm": 1.0, "top1_train_percent": 40.0, "lr": 0.1,
        "images_per_s": 900.0, "loader_wait_percent": 3.0,
    }  # fmt: skip


def test_a_run_of_one_row_has_its_points(panels):
    found = panels(
        [_row(1.0, 2.3, ce=2.3), {"kind": "eval", "epoch": 1.0, "top1_percent": 50.0, "agreement_percent": 1}]
    )
    loss, images = found["loss and its unweighted terms"], found["% of the images"]
    assert [(line.get_label(), line.get_marker()) for line in loss.lines] == [("loss = ce", ".")]
    assert [line.get_marker() for line in images.lines] == ["."] * 3
    assert found["learning rate"].get_ylim()[0] == 0
    assert all(axes.lines for axes in found.values())
    labels = [text.get_text() for text in found["images/s, and waiting for data"].get_legend().get_texts()]
    assert labels == ["images/s, left", "% waiting for data, right"]


def test_terms_that_differ_in_a_row_are_two_curves(panels):
    rows = [_row(1.0, 2.0, ce=2.0, sr=0.1, fm=0.1), _row(2.0, 1.5, ce=1.4, sr=0.1, fm=0.1)]
    labels = [line.get_label() for line in panels(rows)["loss and its unweighted terms"].lines]
    assert labels == ["loss", "ce", "sr = fm"]


def test_a_lost_log_is_said_in_every_panel(panels):
    for title, axes in panels([]).items():
        assert [text.get_text() for text in axes.texts] == ["nothing logged"], title
