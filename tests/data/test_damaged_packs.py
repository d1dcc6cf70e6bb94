"""Packs and index files with single bits changed, cut short, empty or another's: they give what they gave, are repaired
with a sentence, or are refused with the file's name and what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from damage import FLIPS, damages
from image_tree import write_split

from ijckd_fast import files
from ijckd_fast.data import Augment, EvalPlan, Index, build_index, make_loader, parity
from ijckd_fast.data.prepare import JpegPack, pack, pack_table
from ijckd_fast.data.sources import listing
from ijckd_fast.errors import UserError

CUTS = 6  # places at which a file is cut, nothing left among them
SMALL = JpegPack(short=32, shard_images=4)
VIEW = Augment(image_size=24, eval_resize=28)
PACKED = ["train/shard-000001.tar", "train.b2sums", "classes.txt", "pack.json"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split, images in (("train", 5), ("val", 1)):
        write_split(root, split, {"cat": images, "dog": images}, size=(40, 44))
    return root


def said_or_done(call: Callable[[], object]) -> tuple[object, list[str]]:
    """What a call returns, and its warnings; or None, and the sentence by which it refuses. Anything else is raised."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call()
        except UserError as error:
            return None, [str(error)]
    return result, [str(warning.message) for warning in caught]


def content(out: Path) -> dict[str, bytes]:
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name != "pack.json" and not name.startswith(".ijckd")}


def figures(out: Path) -> dict:
    state = json.loads((out / "pack.json").read_text())
    changing = ("kept", "seconds", "images_per_s")
    return {split: {k: v for k, v in row.items() if k not in changing} for split, row in state["splits"].items()}


@pytest.mark.parametrize("name", PACKED)
def test_the_same_command_again_repairs_a_pack_or_says_why_not(data, whole, out, name, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # most of the time
    before, sound = content(whole), (whole / name).read_bytes()
    counts = {"the same": 0, "repaired": 0, "refused": 0}
    for what, damaged in damages(sound, 1):
        (out / name).write_bytes(damaged)
        rows, said = said_or_done(lambda: pack(data, out, SMALL, splits=["train"], workers=1))
        if rows is None:
            assert name == "pack.json", (what, said)
            assert str(out / name) in said[0] or "holds a pack with format" in said[0]
            assert "--overwrite" in said[0]
            (out / name).write_bytes(sound)
            counts["refused"] += 1
            continue
        assert content(out) == before, what
        assert figures(out) == figures(whole), what
        told = any(name in text or "train.b2sums" in text for text in said)
        assert told or name == "pack.json" or not said, (what, said)
        if name == "train/shard-000001.tar":
            assert any(f"{out / name} was not what its checksum is of" in text for text in said)
        counts["repaired" if told else "the same"] += 1
    assert counts["the same"] == 0 or name in ("pack.json", "train.b2sums"), counts
    if name == "pack.json":
        assert counts["refused"] > FLIPS / 2


def seen(out: Path, backend: str = "pillow") -> tuple:
    """What is read of a pack's training images: of which classes they are, and their pixels."""
    index = build_index(out, "train")
    with make_loader(backend, EvalPlan(index, VIEW, 10), threads=1) as loader:
        (batch,) = loader
    return index.hash, index.classes, batch.ids.tolist(), batch.labels.tolist(), batch.images.numpy().tobytes()


@pytest.mark.parametrize("name", PACKED)
def test_a_pack_that_is_indexed_is_compared_with_its_checksums(out, name):
    expected, sound, refused = seen(out), (out / name).read_bytes(), 0
    for what, damaged in damages(sound, 2, 5 if name == "pack.json" else FLIPS):  # which readers do not open
        shutil.rmtree(out / ".ijckd-index")
        (out / ".ijckd-index").mkdir()
        (out / name).write_bytes(damaged)
        found, said = said_or_done(lambda: seen(out))
        if found is None:
            assert name in said[0], (what, said)
            assert "run the same ijckd-fast pack command again" in said[0]
            refused += 1
        else:
            assert found == expected, what
    # of the checksums the name of classes.txt may be another, and is then compared with none
    assert refused >= {"pack.json": 0, "train.b2sums": FLIPS}.get(name, FLIPS + CUTS)


@pytest.mark.parametrize(("backend", "flips"), [("pillow", FLIPS), ("dali", 3)])
def test_an_image_that_a_disk_damages_after_it_was_indexed_is_left_out_by_name(out, monkeypatch, backend, flips):
    """Such damage changes no times, so that the index does not look at the shard again."""
    monkeypatch.setattr(listing, "SETTLED_NS", -(1 << 62))
    monkeypatch.setattr(listing, "_as_before", lambda root, stamps: bool(stamps))
    expected, path = seen(out, backend), out / "train/shard-000001.tar"
    sound, noticed = path.read_bytes(), 0
    for what, damaged in damages(sound, 3, flips):
        path.write_bytes(damaged)
        found, said = said_or_done(lambda: seen(out, backend))
        assert found is not None
        if found != expected:
            (_, _, ids, _, _), (text, *_) = found, said
            assert str(path) in text, what
            assert "cannot be read any more" in text
            assert set(expected[2]) - set(ids) <= {4, 5, 6, 7}
            noticed += 1
    assert noticed >= 3  # most of so small an archive is the filling of its blocks


def test_an_index_that_is_damaged_is_built_again_by_name(data, tmp_path):
    root = Path(shutil.copytree(data, tmp_path / "data"))
    index = build_index(root, "train")
    path = root / ".ijckd-index" / "train.parquet"
    sound, built = path.read_bytes(), 0
    for what, damaged in damages(sound, 4):
        path.write_bytes(damaged)
        found, said = said_or_done(lambda: build_index(root, "train"))
        assert isinstance(found, Index), (what, said)
        assert (found.hash, found.classes) == (index.hash, index.classes), what
        assert np.array_equal(found.stamps, index.stamps)
        built += any(f"the index {path} cannot be read and is built again" in text for text in said)
        path.write_bytes(sound)
    assert built > FLIPS / 2


def test_a_damaged_comparison_of_pixels_is_made_again(data, tmp_path, monkeypatch):
    """Its figures decide whether a run is refused."""
    root = Path(shutil.copytree(data, tmp_path / "data"))
    train, val = (build_index(root, split) for split in ("train", "val"))
    row = parity.Parity("train", "dali", 10, 0.25, 0.5, "train/cat/000.jpg", 1.0, 3.0)
    monkeypatch.setattr(parity, "compare", lambda index, *_, **__: row._replace(split=index.split))
    expected, _ = parity.of_dataset(train, val, VIEW, threads=1)
    (path,) = (root / ".ijckd-index").glob("parity-*")
    sound, again = path.read_bytes(), 0
    for what, damaged in damages(sound, 4):
        path.write_bytes(damaged)
        found, known = parity.of_dataset(train, val, VIEW, threads=1)
        assert found == expected, what
        again += not known
    assert path.read_bytes() == sound
    assert again > FLIPS


def test_two_packs_into_one_folder_at_a_time(data, out):
    before = content(out)
    with files.lock(out), pytest.raises(UserError, match=r"another run \(process \d+\) is writing to .*folder OUT"):
        pack(data, out, SMALL, overwrite=True, workers=1)
    assert content(out) == before


def test_the_checksums_are_those_of_b2sum(out):
    for split in ("train", "val"):
        done = subprocess.run(["b2sum", "-c", f"{split}.b2sums"], cwd=out, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"{split}/shard-000000.tar: OK\n" in done.stdout
        assert "classes.txt: OK\n" in done.stdout


def without_checksums(out: Path) -> None:
    """As an earlier version wrote the pack."""
    for split in ("train", "val"):
        (out / f"{split}.b2sums").unlink()
    state = json.loads((out / "pack.json").read_text())
    del state["check"]
    (out / "pack.json").write_text(json.dumps(state, indent=1))


def test_a_pack_without_checksums_is_read_and_gets_some(data, whole, out):
    without_checksums(out)
    (out / ".pack.json.77.tmp").write_text("{")  # as a killed earlier version left it
    assert seen(out) == seen(whole)
    with pytest.warns(UserWarning, match=r"was packed before shards had checksums: the 3 that are there are taken"):
        train, _ = pack(data, out, SMALL, workers=1)
    assert train["kept"] == 3
    assert content(out) == content(whole)
    assert json.loads((out / "pack.json").read_text())["check"]


def test_shards_and_checksums_that_do_not_match_up_are_named(data, whole, out):
    sums = out / "train.b2sums"
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=r"shard-000002\.tar has no checksum in .*b2sum -l 128 train/shard-000002\.tar"):
        build_index(out, "train")
    with pytest.warns(UserWarning, match=r"shard-000002\.tar had no checksum .*made again"):
        pack(data, out, SMALL, splits=["train"], workers=1)
    (out / "train" / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match=r"train\.b2sums names train/shard-000000\.tar, which is not there"):
        build_index(out, "train")
    pack(data, out, SMALL, splits=["train"], workers=1)
    assert content(out) == content(whole)


def test_an_original_that_is_gone_does_not_stop_the_comparison(data, out, tmp_path):
    """Of a sample image whose shard is made, where it was an error that told to build the index again."""
    own = Path(shutil.copytree(data, tmp_path / "data"))
    pack(own, out, SMALL, workers=1)
    path = own / "train" / "cat" / "002.jpg"
    state = path.stat()
    path.write_bytes(bytes(state.st_size))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.warns(UserWarning, match=r"002\.jpg cannot be read any more .*stays, and is not compared with it"):
        (row,) = pack(own, out, SMALL, splits=["train"], workers=1)
    assert (row["kept"], row["images"], row["sample"]) == (3, 10, 9)
    for path in own.glob("val/*/*.jpg"):
        state = path.stat()
        path.write_bytes(bytes(state.st_size))
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = pack(own, out, SMALL, splits=["val"], workers=1)
    assert (rows[0]["sample"], rows[0]["mean_abs_difference"]) == (0, None)
    pack_table(rows, "title")
