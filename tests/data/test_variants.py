"""Odd variants of image formats: both executors show the same pixels of each, or the index leaves it out."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tarfile
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from command_line import rows_of
from image_tree import photo, write_split
from image_variants import HEIGHT, VARIANTS
from loading import EXECUTORS
from rich.console import Console
from tiny_run import config, write_tree

from ijckd_fast import cli
from ijckd_fast.data import Augment, EvalPlan, Plan, TrainPlan, build_index, make_loader, parity
from ijckd_fast.data.index import Scan, index as index_module, scan
from ijckd_fast.data.index.ask import AskDali
from ijckd_fast.data.index.check import By
from ijckd_fast.errors import UserError
from ijckd_fast.train import train

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
CROPS = Augment(image_size=HEIGHT, eval_resize=HEIGHT, crop_padding=9, mean=(0, 0, 0), std=(1, 1, 1))
AS_STORED = Augment(
    image_size=HEIGHT, eval_resize=HEIGHT, mean=(0, 0, 0), std=(1, 1, 1)
)  # no resize: pixels as decoded
SAID = {By.DALI: "DALI", By.PILLOW_ALONE: "Pillow: DALI cannot", By.PILLOW: "Pillow: DALI's differ"}
CMYK = "JPEG, CMYK without its Adobe mark"  # DALI's pixels differ
BILEVEL = "TIFF, 1"  # DALI cannot decode it
RGBA = "PNG, RGBA"  # odd, and DALI's pixels are Pillow's


class Row(NamedTuple):
    index: str
    by: str
    difference: str


def write(root: Path, split: str, names: list[str]) -> dict[str, str]:
    """root/split/all/<n>.jpg, a file for each variant; returns the variants by path."""
    folder = root / split / "all"
    folder.mkdir(parents=True)
    for n, name in enumerate(names):
        (folder / f"{n:03d}.jpg").write_bytes(VARIANTS[name]())
    return {f"{split}/all/{n:03d}.jpg": name for n, name in enumerate(names)}


def shown(plan: Plan, executor: str, stop: int | None = None) -> dict[int, torch.Tensor]:
    """The images of an epoch by id, in grey levels. Nothing may be set aside."""
    bad: list[str] = []
    with make_loader(executor, plan, stop=stop, on_bad=lambda path, why: bad.append(f"{path}: {why}")) as loader:
        seen = {i: 255 * image for batch in loader for i, image in zip(batch.ids.tolist(), batch.images, strict=True)}
    assert bad == []
    return seen


def apart(plan: Plan, stop: int | None = None) -> dict[int, float]:
    """The largest difference of the two executors, grey levels, by id."""
    dali, pillow = (shown(plan, executor, stop) for executor in EXECUTORS)
    assert sorted(dali) == sorted(pillow)
    return {i: float((dali[i] - pillow[i]).abs().max()) for i in dali}


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> tuple[Scan, dict[str, str]]:
    root = tmp_path_factory.mktemp("variants")
    names = write(root, "train", list(VARIANTS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is left out
        return scan(root, "train"), names


def test_every_variant_is_the_same_by_both_executors_or_left_out(everything):
    """docs/data.md's table says what becomes of each."""
    found, names = everything
    index = found.index
    by = dict(zip(index.paths, found.facts["by"][found.facts["reason"] == 0].tolist(), strict=True))
    difference = apart(EvalPlan(index, AS_STORED, 16))
    assert len(difference) == len(index)  # none is lost on the way
    assert max(difference.values()) < 1.01
    rows = {names[path]: Row(f"left out: `{why}`", "-", "-") for path, why in index.quarantined}
    for i, path in enumerate(index.paths):
        plain = ", plain" if index.variant(i) == "" else ""
        rows[names[path]] = Row("used" + plain, SAID[By(by[path])], f"{difference[i]:.0f}")
    assert len(rows) >= 60
    table = "".join(f"| {name} | {' | '.join(rows[name])} |\n" for name in VARIANTS)
    assert table in DOCUMENT.read_text(), table


def test_crops_of_every_variant(everything):
    index = everything[0].index
    assert max(apart(TrainPlan(index, CROPS, len(index), seed=1), stop=1).values()) < 1.01
    cut = dataclasses.replace(AS_STORED, scale=(0.1, 0.5))  # each crop cut out, then enlarged
    assert max(apart(TrainPlan(index, cut, len(index), seed=1), stop=1).values()) < 2.01  # two roundings


def test_plain_files_are_not_asked_about_and_dali_is_not_loaded(tmp_path, monkeypatch):
    write_split(tmp_path, "train", {"cat": 4})
    for n, mode in enumerate(("RGB", "L")):
        photo(48, 64, n).convert(mode).save(tmp_path / "train" / "cat" / f"{mode}.png")
        photo(48, 64, n).convert(mode).save(tmp_path / "train" / "cat" / f"{mode}.jpg", progressive=True)
    monkeypatch.setattr(AskDali, "can_be_asked", lambda _: pytest.fail("asked"))
    assert build_index(tmp_path, "train").odd is None


def test_an_index_made_without_dali_is_completed_when_dali_is_there(tmp_path, monkeypatch, checked):
    """The same images and hash either way; what nobody asked DALI about Pillow decodes."""
    names = write(tmp_path, "train", [CMYK, RGBA, "JPEG, 4:2:0", BILEVEL])
    with monkeypatch.context() as patch:
        patch.setattr(AskDali, "can_be_asked", lambda _: False)
        without = scan(tmp_path, "train")
    assert sorted(checked) == sorted(Path(path).name for path in names)
    assert without.facts["by"].tolist() == [By.UNASKED, By.UNASKED, By.DALI, By.UNASKED]
    assert max(apart(EvalPlan(without.index, AS_STORED, 4)).values()) < 1.01
    checked.clear()
    assert build_index(tmp_path, "train", ask_dali=False).by_pillow().tolist() == [True, True, False, True]
    assert checked == []
    completed = scan(tmp_path, "train")
    assert sorted(checked) == ["000.jpg", "001.jpg", "003.jpg"]
    assert completed.facts["by"].tolist() == [By.PILLOW, By.DALI, By.DALI, By.PILLOW_ALONE]
    assert completed.index.hash == without.index.hash
    checked.clear()
    again = build_index(tmp_path, "train", trust_folders=True)
    assert (again.by_pillow().tolist(), checked) == ([True, False, False, True], [])
    assert build_index(tmp_path, "train", ask_dali=False).by_pillow().tolist() == [True, False, False, True]
    monkeypatch.setattr(AskDali, "versions", "DALI 99")  # its answers are no other's, and kept though they are the same
    build_index(tmp_path, "train")
    assert sorted(checked) == ["000.jpg", "001.jpg", "003.jpg"]
    build_index(tmp_path, "train")
    assert len(checked) == 3


@pytest.mark.parametrize("verify", ["fast", "full"])
def test_odd_files_are_looked_at_whole(tmp_path, verify):
    write(tmp_path, "train", [CMYK, RGBA, "JPEG, 4:2:0"])
    found = scan(tmp_path, "train", verify=verify)
    assert found.facts["full"].tolist() == [True, True, verify == "full"]
    assert found.index.by_pillow().tolist() == [True, False, False]


def test_in_shards(tmp_path):
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "a.tar", "w") as archive:
        for n, name in enumerate([CMYK, "JPEG, 4:2:0", BILEVEL, RGBA]):
            for end, data in (("jpg", VARIANTS[name]()), ("cls", b"0")):
                member = tarfile.TarInfo(f"{n}.{end}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    index = build_index(tmp_path, "train")
    assert index.by_pillow().tolist() == [True, False, True, False]
    for plan, stop in ((EvalPlan(index, AS_STORED, 3), None), (TrainPlan(index, CROPS, 2, 0), 2)):
        assert max(apart(plan, stop).values()) < 1.01


def test_a_subset_knows_its_own(tmp_path):
    write(tmp_path, "train", ["JPEG, 4:2:0", CMYK, "JPEG, gray", RGBA, BILEVEL])
    index = build_index(tmp_path, "train")
    part = index.subset(per_class=3, seed=2)
    for i, path in enumerate(part.paths):
        whole = list(index.paths).index(path)
        assert (part.variant(i), part.by_pillow()[i]) == (index.variant(whole), index.by_pillow()[whole])
    assert {part.variant(i) for i in range(3)} != {""}
    assert index.by_pillow(decoders_of_gpu=True).tolist() == [False, True, False, True, True]  # others than were asked


def test_what_pillow_decodes_for_dali_may_go_bad_too(tmp_path):
    write(tmp_path, "train", ["JPEG, 4:2:0", CMYK, "JPEG, gray", BILEVEL])
    index = build_index(tmp_path, "train")
    Path(index.absolute(1)).unlink()
    photo(30, 40).save(index.absolute(3), format="TIFF")
    for executor in EXECUTORS:
        bad: list[tuple[str, str]] = []
        plan = EvalPlan(index, AS_STORED, 2)
        with make_loader(executor, plan, on_bad=lambda path, why, bad=bad: bad.append((path, why))) as loader:
            ids = [i for batch in loader for i in batch.ids.tolist()]
        assert ids == [0, 2]
        assert [path for path, _ in bad] == [index.absolute(1), index.absolute(3)]
        assert bad[0][1] == "cannot be read: No such file or directory"
        assert "40x30 pixels where 56x48 were indexed" in bad[1][1]


def test_batches_and_threads_change_nothing(tmp_path):
    write(tmp_path, "train", ["JPEG, 4:2:0", CMYK, "JPEG, gray", RGBA, BILEVEL] * 2)
    index = build_index(tmp_path, "train")
    made = []
    for batch_size, more in ((1, {"prefetch": 4}), (3, {"threads": 1}), (10, {"prefetch": 1})):
        with make_loader("dali", EvalPlan(index, AS_STORED, batch_size), **more) as loader:
            made.append(torch.cat([batch.images for batch in loader]))
    assert len(made[0]) == 10
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


# --- what is said of them ---------------------------------------------------------------------------------------------


def test_the_command_counts_them(tmp_path, capsys):
    names = [CMYK, RGBA, "JPEG, 4:2:0", BILEVEL, RGBA]
    write(tmp_path, "train", names)
    write(tmp_path, "val", ["JPEG, 4:2:0"])
    for split in ("train", "val"):
        write_split(tmp_path, split, {"cat": 1})
    assert cli.main(["index", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    train_row, val_row = rows_of(out)
    assert (train_row["images"], train_row["left_out"], train_row["by_pillow"]) == (6, 0, 2)
    assert train_row["variants"] == {
        "PNG, RGBA 8 bit": {"dali": 2},
        "JPEG, 4 components, sampling 1x1 1x1 1x1 1x1, named 67 77 89 75, no mark": {"pillow": 1},
        "TIFF, 1, 1 bit, photometric 1, compression 1": {"pillow_alone": 1},
    }
    assert (val_row["by_pillow"], val_row["variants"]) == (0, {})
    text = re.sub(r"[│┃\s]+", " ", out)
    assert "decoded by Pillow" in text
    assert "PNG, RGBA 8 bit 2" in text


# --- the comparison before a training ---------------------------------------------------------------------------------


def add(data: Path, split: str, name: str, to: str) -> str:
    path = f"{split}/{to}/odd.jpg"
    (data / path).write_bytes(VARIANTS[name]())
    return path


def run(data: Path, output: Path, **changes) -> str:
    said = io.StringIO()
    settings = config(data, output, **{"data_backend": "dali", "epochs": 1, **changes})
    train(settings, console=Console(file=said, width=1000))
    return said.getvalue()


def test_the_comparison_looks_at_every_odd_variant(tmp_path):
    write(tmp_path, "train", ["JPEG, 4:2:0"] * 200 + [CMYK, RGBA, BILEVEL])
    index = build_index(tmp_path, "train")
    assert parity.odd_sample(index).tolist() == [200, 201, 202]
    found = parity.compare(index, AS_STORED, images=8)
    assert found.images == 8 + 3
    assert found.worst_levels < 0.5


def test_one_image_that_differs_is_refused_however_many_there_are(tmp_path, monkeypatch):
    """As if DALI's answer while indexing had been another. Few of 129 crops: far below the bound of the mean."""
    data = write_tree(tmp_path / "data")
    odd = add(data, "train", "BMP, 16 bit 555 by masks", "bee")
    text = run(data, tmp_path / "sound")
    assert (
        "1 of 37 train images are decoded by Pillow within DALI's batches, since DALI cannot or makes other pixels"
        in text
    )
    assert f"{odd} (BMP, RGB, 16 bit, compression 3)" in text
    monkeypatch.setattr(index_module.Index, "by_pillow", lambda self, *_, **__: np.zeros(len(self), bool))
    for path in (data / ".ijckd-index").glob("parity-*"):
        path.unlink()
    with pytest.raises(UserError, match=r"wanted at most 0\.5") as error:
        run(data, tmp_path / "refused", image_size=32, eval_resize=32)
    assert f"the farthest is {data.resolve() / odd} with" in str(error.value)
    (kept,) = (data / ".ijckd-index").glob("parity-*")
    row = json.loads(kept.read_text())["rows"][0]
    assert row["worst_levels"] > parity.ONE_IMAGE * 0.5
    assert row["mean_levels"] < 0.4
