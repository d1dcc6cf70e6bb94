"""Packs of Parquet files: the images' bytes, order, labels and class names, by one pass; and runs on what was made."""

from __future__ import annotations

import shlex
import tarfile
from pathlib import Path

import pytest
from command_line import complaint, row_of, rows_of
from image_tree import photo, write_split
from loading import AUGMENT, batches, identical
from parquet_files import files_of
from tiny_run import config, differing

from ijckd_fast import cli
from ijckd_fast.data import TrainPlan, build_index
from ijckd_fast.data.prepare import JpegPack, forecast, pack
from ijckd_fast.errors import UserError
from ijckd_fast.train import checkpoint, train

AS_THEY_ARE = JpegPack(short=0, shard_images=5)
COMPRESSED = {"compression": "snappy", "use_dictionary": True, "row_group_size": 4}


@pytest.fixture
def folders(tmp_path) -> Path:
    write_split(tmp_path / "folders", "train", {"cat": 7, "dog": 6})
    photo(30, 31, 5).save(tmp_path / "folders" / "train" / "dog" / "odd.png")
    write_split(tmp_path / "folders", "val", {"cat": 2, "dog": 2})
    return tmp_path / "folders"


def hub(root: Path, folders: Path, **how) -> Path:
    for split in ("train", "val"):
        files_of(root, build_index(folders, split), per_file=5, **how)
    return root


def packed(out: Path, split: str) -> list[tuple[bytes, int]]:
    """(bytes of the image, label), in the order of the pack."""
    found = []
    for path in sorted((out / split).iterdir()):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(member).read() for member in tar]
    return [(image, int(label)) for image, label in zip(found[::2], found[1::2], strict=True)]


@pytest.mark.parametrize(("how", "workers"), [(COMPRESSED, 2), (COMPRESSED, 1), ({}, 1)])
def test_bytes_order_labels_and_names_stay(tmp_path, folders, how, workers):
    root = hub(tmp_path / "hf", folders, **how)
    said: list[str] = []
    pack(root, tmp_path / "out", AS_THEY_ARE, workers=workers, say=said.append)
    for split in ("train", "val"):
        index = build_index(folders, split)
        expected = [(Path(index.absolute(i)).read_bytes(), int(index.labels[i])) for i in range(len(index))]
        assert packed(tmp_path / "out", split) == expected  # the PNG too
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\ndog\n"
    if how:
        assert len(said) == 2
        assert "compressed by SNAPPY: packing these 14 images, 0.0 MB takes at most that on the disk" in said[0]
        assert f"with {workers} processes, by the first 14 images" in said[0]
    else:
        assert not said
    plans = [TrainPlan(build_index(data, "train"), AUGMENT, 7, 3) for data in (folders, tmp_path / "out")]
    assert identical(*(batches("pillow", plan, stop=3) for plan in plans))


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path, folders, monkeypatch):
    root = hub(tmp_path / "hf", folders, **COMPRESSED)
    usage = forecast.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(UserError, match=r"out must have room for 0\.0 GB of images, found 0\.0 GB; free some"):
        pack(root, tmp_path / "out", AS_THEY_ARE, workers=1)
    assert not (tmp_path / "out").exists()


def test_smaller_images_can_be_made_of_them(tmp_path, folders):
    root = hub(tmp_path / "hf", folders, **COMPRESSED)
    for name, data in (("a", folders), ("b", root)):
        pack(data, tmp_path / name, JpegPack(short=36, shard_images=5), workers=1)
    assert packed(tmp_path / "a", "train") == packed(tmp_path / "b", "train")


def test_a_pack_continues_to_the_same_bytes(tmp_path, folders):
    root = hub(tmp_path / "hf", folders, **COMPRESSED)
    pack(root, tmp_path / "out", AS_THEY_ARE, workers=1)
    shards = sorted((tmp_path / "out").glob("*/shard-*"))
    whole = [path.read_bytes() for path in shards]
    shards[0].unlink()
    (tmp_path / "out" / "train" / ".shard-000000.tar.tmp").write_bytes(whole[0][:999])  # as a kill leaves it
    rows = pack(root, tmp_path / "out", AS_THEY_ARE, workers=1)
    assert [row["kept"] for row in rows] == [len(shards) - 2, 1]
    assert [path.read_bytes() for path in shards] == whole


def test_index_names_the_command_that_trains(tmp_path, folders, capsys):
    root = hub(tmp_path / "hf", folders)
    assert cli.main(["index", str(root)]) == 0
    assert f"ijckd-fast train --data-dir {root} " in capsys.readouterr().out
    compressed = hub(tmp_path / "c", folders, **COMPRESSED)
    assert cli.main(["index", str(compressed), "--label-column", "label"]) == 0
    out = capsys.readouterr().out
    assert "compressed by SNAPPY, where each image costs its whole row group" in out
    command = f"ijckd-fast pack {compressed} {compressed}-packed --short 0 --label-column label && ijckd-fast train "
    assert f"to train on it: {command}--data-dir {compressed}-packed" in out
    said = complaint(
        capsys, "train", "--data-dir", str(compressed), "--objective", "ce", "--output-dir", str(tmp_path / "r")
    )
    assert f"ijckd-fast pack {compressed} {compressed}-packed --short 0, then give --data-dir" in said


def test_the_commands_of_a_refusal_work_where_images_are_held_out(tmp_path, folders, capsys, monkeypatch):
    root = tmp_path / "my hub"
    files_of(root, build_index(folders, "train"), per_file=5, names=False, **COMPRESSED)
    (tmp_path / "names").write_text("ant\nbee\n")
    monkeypatch.chdir(tmp_path)
    held_out = ["--val-fraction", "0.4", "--val-seed", "2"]
    run = ["train", "--objective", "ce", "--output-dir", "run", "--class-list", "names", *held_out]
    said = complaint(capsys, *run, "--data-dir", "my hub")
    pack_it, then = said.split("): ")[1].split(", then give ")
    words = shlex.split(pack_it)
    assert words[:2] == ["ijckd-fast", "pack"]
    assert {*held_out, str(tmp_path / "names")} < set(words)
    assert cli.main(words[1:]) == 0
    capsys.readouterr()
    option, packed = shlex.split(then)
    assert (option, packed) == ("--data-dir", str(tmp_path / "my hub-packed"))
    assert cli.main(["index", packed]) == 0
    train_row, val_row = rows_of(capsys.readouterr().out)
    assert train_row["images"] + val_row["images"] == 14
    assert (Path(packed) / "classes.txt").read_text() == "ant\nbee\n"


def test_a_pack_of_one_split_says_what_is_missing(tmp_path, folders, capsys):
    root = hub(tmp_path / "hf", folders)
    command = ["pack", str(root), str(tmp_path / "out"), "--short", "0", "--splits"]
    assert cli.main([*command, "train"]) == 0
    assert "to train on it, pack val too: the same command with --splits val" in capsys.readouterr().out
    assert cli.main([*command, "val"]) == 0
    assert f"to train on it: ijckd-fast train --data-dir {tmp_path}/out " in capsys.readouterr().out


def test_a_run_equals_that_of_folders(tmp_path, folders, capsys):
    root = hub(tmp_path / "hf", folders)
    states, rows = [], []
    for data in (folders, root):
        train(config(data, tmp_path / data.name / "run", epochs=1, batch_size=4))
        state = checkpoint.load(tmp_path / data.name / "run" / "last.pt")
        states.append((state["learner"], state["optimizer"], state["classes"]))
        capsys.readouterr()
        assert cli.main(["evaluate", str(tmp_path / data.name / "run"), "--device", "cpu"]) == 0
        rows.append(row_of(capsys.readouterr().out)["top1_percent"])
    assert not differing(*states)
    assert rows[0] == rows[1]
