"""scripts/pack_study.py: what its rows say. The accuracies themselves take minutes and are in results/."""

from __future__ import annotations

import csv
import importlib.util
import json
import pathlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ijckd_fast.data import prepare
from ijckd_fast.data.load.pillow import arrange

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))  # what it imports beside itself
spec = importlib.util.spec_from_file_location("pack_study", ROOT / "scripts" / "pack_study.py")
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)


def rows_of(capsys) -> list[dict]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


def test_loss_of_the_encoding_alone(capsys, tmp_path):
    saved = tmp_path / "loss.csv"
    assert study.main(["loss", "--views", "2", "--images", "4", "--save", str(saved)]) == 0
    rows = rows_of(capsys)
    seen = {(row["data"], row["codec"], row["split"]): row for row in rows}
    assert len(seen) == len(rows) == 2 * 4 * 2
    for (data, codec, split), row in seen.items():
        photographs = data != "pictures"
        assert row["views"] == row["images"] * (2 if photographs and split == "train" else 1)
        assert row["psnr_db"] >= row["psnr_db_of_mean_square"]
        kind, value = codec.split()
        if kind == "blocks":  # sides are padded to multiples of 8
            assert float(value) <= row["bits_per_pixel"] < 1.05 * float(value)
            assert row["mean_levels"] < seen[data, "jpeg 90", split]["mean_levels"]
    with saved.open(newline="") as file:
        assert [row["codec"] for row in csv.DictReader(file)] == [row["codec"] for row in rows]


def test_a_figure_of_loss_is_that_of_the_pixels(tmp_path, monkeypatch):
    """Of codecs that change an image in a known way."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "b").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(10, 200, (256, 300, 3), np.uint8)
    for name in ("a", "b"):
        Image.fromarray(pixels).save(tmp_path / "train" / name / "x.png")

    def brighter(image):
        def view(plan, i):
            return arrange(image, plan, i) + (3 if plan.ids[i] == 0 else 4)

        yield "brighter", 24.0, view

    monkeypatch.setattr(study, "encodings", brighter)
    for row in study.loss_rows("x", tmp_path, 3, 256):
        assert (row["mean_levels"], row["bits_per_pixel"], row["views"]) == (
            3.5,
            24.0,
            2 if row["split"] == "val" else 6,
        )
        assert row["psnr_db"] == pytest.approx(10 * np.log10(255**2 / 12), abs=0.01)
        assert row["psnr_db_of_mean_square"] == pytest.approx(10 * np.log10(255**2 / 12.5), abs=0.01)


def test_accuracies_are_compared_seed_by_seed(capsys, monkeypatch, tmp_path):
    def outcome(*accuracies):
        last = {seed: {"last": {"top1_percent": value, "images": 797}} for seed, value in enumerate(accuracies)}
        return SimpleNamespace(runs={"": {"ce": last, "ijckd": last}}, teacher={"last": {"top1_percent": 99.0}})

    monkeypatch.setattr(study, "train_all", lambda *_: (outcome(90.0, 92.0, 97.0), outcome(89.0, 91.0, 96.0)))
    monkeypatch.setattr(study, "top1_on_files", lambda folder, method, seed: (91.0, 92.0, 96.0)[seed])
    monkeypatch.setattr(prepare, "pack_loss", lambda *_: SimpleNamespace(mean_levels=1.25))
    saved = tmp_path / "digits.csv"
    assert study.main(["digits", "--seeds", "3", "--save", str(saved)]) == 0
    on_files, own = rows_of(capsys)[:2]
    assert (on_files["method"], on_files["evaluated_on"], own["evaluated_on"]) == ("ce", "files", "own")
    assert (own["files_top1_mean"], own["blocks_top1_mean"], own["difference"]) == (93.0, 92.0, -1.0)
    assert (own["difference_low"], own["difference_high"]) == (-1.0, -1.0)  # of every seed the same
    assert on_files["difference"] == 0
    assert on_files["difference_high"] == pytest.approx(4.303 / np.sqrt(3), abs=1e-3)  # t of 2 degrees of freedom
    assert (own["pack_mean_levels"], own["teacher_top1_percent"], own["val_images"]) == (1.25, 99.0, 797)
    assert len(saved.read_text().splitlines()) == 5
