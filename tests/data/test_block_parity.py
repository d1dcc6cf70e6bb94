"""Of a block pack the block executor is held to Pillow's view of the same planes, and what packing has lost is said."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from command_line import rows_of
from image_tree import write_split
from rich.console import Console
from tiny_run import config

from ijckd_fast import cli
from ijckd_fast.data import Augment, build_index, parity
from ijckd_fast.data.load import pillow
from ijckd_fast.data.prepare import BlockPack, JpegPack, pack, pack_loss
from ijckd_fast.errors import UserError
from ijckd_fast.train import train as loud_train

AUGMENT = Augment(image_size=24, eval_resize=28)
SMALL = BlockPack(short=40)
RUN = {"data_backend": "blocks", "epochs": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 8), ("val", 5)):
        write_split(root, split, {"cat": count, "dog": count, "eel": count})
    return root


@pytest.fixture
def two_levels(monkeypatch):
    """In one value of some of Pillow's images."""
    make = pillow.arrange_planes

    def other(planes, plan, i):
        pixels = make(planes, plan, i).copy()
        if plan.ids[i] % 7 == 3:
            pixels[5, 7, 1] ^= 2
        return pixels

    monkeypatch.setattr(pillow, "arrange_planes", other)


def train(data: Path, output: Path, **changes) -> str:
    """What a run says."""
    said = io.StringIO()
    loud_train(config(data, output, **{**RUN, **changes}), console=Console(file=said, width=1000))
    return said.getvalue()


def bench(capsys, root: Path, *arguments: str) -> tuple[int, str, list[dict]]:
    command = ["bench", "loader", "--parity", "--data-dir", str(root), "--images", "20", "--image-size", "24"]
    code = cli.main([*command, *arguments])
    text = capsys.readouterr().out
    return code, text, rows_of(text)


@pytest.mark.parametrize("crop_padding", [0, 4])
def test_never_more_than_a_level_apart(whole, crop_padding):
    augment = Augment(image_size=24, eval_resize=28, crop_padding=crop_padding)
    for split, images in (("train", 40), ("val", 15)):
        found = parity.compare(build_index(whole, split), augment, images=images)
        assert (found.split, found.backend, found.images) == (split, "blocks", 48 if split == "train" else 15)
        assert 0 < found.mean_levels <= found.worst_levels < 0.1
        assert found.most_levels == pytest.approx(1, abs=1e-3)
        assert found.beyond_percent == 0
        assert parity.within(found, 0.5)


@pytest.mark.usefixtures("two_levels")
def test_two_levels_in_one_value_are_too_far_whatever_is_allowed(whole, out, tmp_path, capsys):
    found = parity.compare(build_index(whole, "val"), AUGMENT, images=15)
    assert 1.9 < found.most_levels < 3.1
    assert found.beyond_percent > 0
    assert not parity.within(found, 99)
    assert parity.within(found._replace(backend="dali"), 0.5)
    code, text, _ = bench(capsys, whole, "--max-drift", "99")
    assert code == 1
    assert "that the trainer allows: train, val" in text
    with pytest.raises(UserError, match=r"the block executor's pixels differ from Pillow's by up to [23] grey levels"):
        train(out, tmp_path / "run", max_drift=99.0)


def test_the_trainer_says_it_once_with_what_packing_has_lost(data, out, tmp_path):
    text = train(out, tmp_path / "first")
    assert "the block executor's pixels differ from Pillow's by 0.0" in text
    assert "on 144 train crops and 0.0" in text
    rows = json.loads((out / "pack.json").read_text())["splits"]
    assert text.count("packing itself has cost") == 1
    for split, count in (("train", 24), ("val", 15)):
        row = rows[split]
        expected = f"{row['mean_abs_difference']:.2f} grey levels and {row['psnr_db']:.1f} dB on {count} {split} images"
        assert f"{expected} (JPEGs of quality 90: {row['jpeg_90_mean_abs_difference']:.2f} grey levels and" in text
    again = train(out, tmp_path / "second", seed=3)
    assert "the block executor's" not in again
    assert "packing" not in again
    content = (out / "pack.json").read_text()
    (out / "pack.json").write_text(content.replace("0", "1"))
    shutil.rmtree(out / ".ijckd-index")
    assert f"what packing has lost is not known: {out / 'pack.json'} is damaged" in train(out, tmp_path / "third")


def test_what_a_pack_says_of_its_loss(data, out, tmp_path, capsys):
    assert pack_loss(data, "train") is None
    loss = pack_loss(out, "val")
    assert (loss.split, loss.images) == ("val", 15)
    _, text, rows = bench(capsys, out)
    assert f"val: packing itself has cost, against the originals, {loss}" in text
    assert [row["backend"] for row in rows] == ["blocks", "blocks"]
    assert (rows[1]["pack_mean_levels"], rows[1]["pack_jpeg_psnr_db"]) == (loss.mean_levels, loss.jpeg_psnr_db)
    assert "dali" not in rows[1]
    pack(data, tmp_path / "jpeg", JpegPack(short=40), workers=1)
    _, text, rows = bench(capsys, tmp_path / "jpeg")
    assert "val: packing itself has cost, against the originals, 0.00 grey levels on 15 val images" in text
    assert "quality 90" not in text
    assert [row["backend"] for row in rows] == ["dali", "dali"]
    _, text, rows = bench(capsys, data)
    assert "packing" not in text
    assert rows[0]["pack_mean_levels"] is None
    state = json.loads((out / "pack.json").read_text())
    state["splits"]["val"] = {"source_hash": "", "complete": False}
    (out / "pack.json").write_text(json.dumps({name: state[name] for name in state if name != "check"}))
    assert pack_loss(out, "val") is None


def test_splits_of_two_kinds(data, out, monkeypatch):
    indexes = build_index(out, "train"), build_index(data, "val")
    rows, known = parity.of_dataset(*indexes, AUGMENT, threads=1)
    assert ([row.backend for row in rows], known) == (["blocks", "dali"], False)
    assert parity.of_dataset(*indexes, AUGMENT, threads=1) == (rows, True)
    versions = parity.versions
    for changed in ("blocks", "dali"):  # either executor's code: measured again
        other = {changed: "another"}
        monkeypatch.setattr(
            parity,
            "versions",
            lambda *of, new=other: versions(*of) | {name: new[name] for name in new.keys() & set(of)},
        )
        assert parity.of_dataset(*indexes, AUGMENT, threads=1) == (rows, False)


def test_needs_no_dali_and_depends_on_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "ijckd_fast.data.index.dali", None)
    found = parity.versions("blocks")
    assert set(found) == {"pillow", "executors"}
    with pytest.raises(ImportError):
        parity.versions("dali")
    assert any(path.suffix == ".so" for path in Path(parity.__file__).parents[1].glob(parity._CODE["blocks"][-1]))
