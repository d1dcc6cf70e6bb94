"""What a person sees of a run: the bar at every width, the lines of a log file."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from ijckd_fast.train.progress import TrainingProgress

ROW = {"loss": 2.30259, "images_per_s": 12345.6, "loader_wait_percent": 41.2, "epoch": 0.5, "lr": 0.1}


def shown(width: int, name: str, total: int) -> str:
    """The last state of the bar's line."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    with (show := TrainingProgress(console, name)):
        show.begin(0, total)
        for step in (total // 4, total // 2):
            show.step(step)
            show.row(step, ROW)
        show._bar.refresh()  # type: ignore[union-attr]
        lines = re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", screen.getvalue())
    return [line for line in lines if line.strip()][-1].rstrip()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
@pytest.mark.parametrize(
    ("name", "total"), [("ce resnet8", 24), ("ijckd resnet18", 600480), ("dkd timm/vit_small_patch16_224.augreg", 9999)]
)
def test_bar_count_time_and_loss_stay_whatever_the_width(width, name, total):
    line = shown(width, name, total)
    assert len(line) <= width
    assert "…" not in line[line.index("━") :]
    assert re.search(rf"\b{total // 2} */{total} (-|\d):(--|\d\d):(--|\d\d)", line)
    if width >= 80:
        assert "loss 2.3026" in line
        assert name[:10] in line
    if width >= 100:
        assert "41 % wait" in line
    if width >= 200:
        assert "data-bound (41 % waiting for data)" in line


def test_a_log_file_says_how_long_it_takes(monkeypatch):
    """Evaluations included, since they pass too; of a continued run by its own steps."""
    now = [100.0]
    monkeypatch.setattr("ijckd_fast.train.progress.time.monotonic", lambda: now[0])
    file = io.StringIO()
    show = TrainingProgress(Console(file=file), "ce resnet8")
    show.begin(60, 100)
    with show:
        for seconds, step in ((0, 60), (10, 62), (3000, 70), (3010, 100)):
            now[0] = 100.0 + seconds
            show.row(step, ROW)
    first, early, later, last = file.getvalue().splitlines()
    assert early.startswith("ce resnet8: step 62/100, epoch 0.50, lr 0.1, loss 2.3026  12,346 images/s  data-bound")
    assert early.endswith(", 0:03:10 left")
    assert later.endswith(", 2:30:00 left")
    for line in (first, last):
        assert line.endswith("(41 % waiting for data)")
