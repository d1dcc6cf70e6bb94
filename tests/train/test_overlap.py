"""A teacher, or a start, that was trained on the images that validate a run."""

from __future__ import annotations

import dataclasses
import io
import re
import shutil

import pytest
from rich.console import Console
from tiny_run import config, distilled

from ijckd_fast import cli
from ijckd_fast.teacher_cache import TeacherCache
from ijckd_fast.train import checkpoint, resolve, train, warnings_of_seen_images

RUNS = {
    "all": {},
    "three": {"val_fraction": 0.3, "val_seed": 3},
    "of seed": {"val_fraction": 0.3, "seed": 3},
    "elsewhere": {"val_dir": "other"},
}


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Checkpoints of earlier runs on `data`; of one run, as its settings might have been."""
    root = tmp_path_factory.mktemp("runs")
    train(config(data, root / "all", max_steps=1), console=Console(quiet=True))
    saved = checkpoint.load(root / "all" / "last.pt")
    for name, more in RUNS.items():
        (root / name).mkdir(exist_ok=True)
        settings = dataclasses.asdict(resolve(config(data, root / name, max_steps=1, **more)))
        checkpoint.save(root / name / "last.pt", {**saved, "config": settings})
    return root


@pytest.mark.parametrize(
    ("run", "settings", "expected"),
    [
        ("all", {"val_fraction": 0.3}, "held out none, here they are those of --val-fraction 0.3 --val-seed 0"),
        ("all", {}, None),
        ("three", {}, None),  # the folder's own validation images, on which nobody is trained
        ("three", {"val_dir": "elsewhere"}, None),
        ("three", {"val_fraction": 0.3, "val_seed": 3}, None),
        ("three", {"val_fraction": 0.3, "seed": 3}, None),
        ("of seed", {"val_fraction": 0.2, "val_seed": 3}, None),  # a larger fraction holds out these and more
        ("three", {"val_fraction": 0.4, "val_seed": 3}, "--val-fraction 0.3 --val-seed 3, here .* 0.4 --val-seed 3;"),
        ("of seed", {"val_fraction": 0.3}, r"or give --val-fraction 0\.3 --val-seed 3 here$"),
        ("elsewhere", {"val_fraction": 0.3}, r"held out none \(--val-dir .*other\), here they are those of"),
    ],
)
def test_what_is_said(runs, data, tmp_path, run, settings, expected):
    weights = runs / run / "last.pt"
    teacher = {**distilled(weights), "teacher": "resnet8x0.25"}
    for role, more in (("teacher", teacher), ("student's start", {"student_checkpoint": str(weights)})):
        said = warnings_of_seen_images(resolve(config(data, tmp_path / "run", **{**more, **settings})))
        assert len(said) == (expected is not None)
        for text in said:
            assert text.startswith(f"warning: the {role}, {weights}, was trained on images that validate this run: ")
            assert re.search(expected, text.replace("; accuracies on them come out too high: train it with", ";")), text


def test_it_is_said_at_the_start_and_when_a_cache_is_made(runs, data, tmp_path, capsys):
    link = tmp_path / "same data"
    link.symlink_to(data)
    out = io.StringIO()
    teacher = {"objective": "kd", "teacher": str(runs / "three"), "val_fraction": 0.3, "allow_weak_teacher": True}
    train(config(link, tmp_path / "run", max_steps=1, **teacher), console=Console(file=out, width=999))
    assert out.getvalue().count("was trained on images that validate this run") == 1
    shutil.copytree(data, tmp_path / "other data")
    assert not warnings_of_seen_images(resolve(config(tmp_path / "other data", tmp_path / "b", **teacher)))

    cache = ["cache", str(tmp_path / "cache"), "--views", "1", "--teacher", str(runs / "three")]
    same = ["--image-size", "16", "--eval-resize", "16", "--data-backend", "pillow", "--device", "cpu"]
    assert cli.main([*cache, *same, "--data-dir", str(data), "--val-fraction", "0.3", "--allow-weak-teacher"]) == 0
    assert "was trained on images that validate this run" in " ".join(capsys.readouterr().out.split())
    cached = resolve(config(data, tmp_path / "c", **{**teacher, "teacher": f"cache:{tmp_path / 'cache'}"}))
    assert len(warnings_of_seen_images(cached, TeacherCache(tmp_path / "cache"))) == 1
