"""A teacher cache of images in Parquet files: that of the same images in class folders."""

from __future__ import annotations

import functools
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from parquet_files import AS_STORED, files_of
from rich.console import Console
from tiny_run import SETTINGS, config, differing, options, write_teacher

from ijckd_fast import cli
from ijckd_fast.data import build_index
from ijckd_fast.errors import UserError
from ijckd_fast.train import checkpoint, report, train as loud_train

train = functools.partial(loud_train, console=Console(quiet=True))
IMAGE_SETTINGS = {
    name: SETTINGS[name] for name in ("image_size", "eval_resize", "batch_size", "data_backend", "device")
}


def test_it_is_that_of_class_folders_and_a_changed_file_is_noticed(data, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "plot_training", lambda path, rows: None)
    hub = tmp_path / "hub"
    for split in ("train", "val"):
        files_of(hub, build_index(data, split), per_file=10)
    teacher = {"teacher": "resnet8x0.5", "teacher_checkpoint": str(write_teacher(tmp_path / "teacher.pt"))}
    learned, features = [], []
    for name, root in (("of folders", data), ("of files", hub)):
        made = {**teacher, **IMAGE_SETTINGS, "data_dir": str(root), "allow_weak_teacher": True, "views": 2}
        assert cli.main(["cache", str(tmp_path / name), *options(made)]) == 0
        features.append((tmp_path / name / "features.bin").read_bytes())
        run = {"teacher": f"cache:{tmp_path / name}", "allow_weak_teacher": True, "objective": "ijckd-pooled"}
        train(config(root, tmp_path / f"run {name}", epochs=2, **run))
        learned.append(checkpoint.load(tmp_path / f"run {name}" / "last.pt")["learner"])
    assert features[0] == features[1]
    assert not differing(*learned)

    changed = sorted((hub / "data").glob("train-*"))[1]
    with pytest.raises(UserError, match="has other training images"):
        train(config(data, tmp_path / "b", **{**run, "teacher": f"cache:{tmp_path / 'of files'}"}))
    _turn_round(changed)
    with pytest.raises(UserError, match="has other training images"):
        train(config(hub, tmp_path / "c", **run))
    _turn_round(changed)
    train(config(hub, tmp_path / "d", epochs=1, **run))


def _turn_round(path: Path) -> None:
    """The rows of a file in the other order."""
    table = pq.read_table(path)
    pq.write_table(table.take(list(range(len(table)))[::-1]), path, **AS_STORED)
