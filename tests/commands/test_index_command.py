"""`ijckd-fast index`: what is in a folder, and what of it is left out."""

from __future__ import annotations

import shlex
import shutil

import pytest
from command_line import row_of, rows_of
from hub_shards import write_hub, write_info, write_shard
from PIL import Image
from tiny_run import SETTINGS, options

from ijckd_fast import cli
from ijckd_fast.data import build_index
from ijckd_fast.train import run_folder


def test_index(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns(".*"))
    folder = tmp_path / "data" / "train" / "ant"
    (folder / "000.jpg").write_bytes(b"")
    turned = Image.Exif()
    turned[274] = 8
    Image.new("RGB", (20, 300)).save(folder / "001.jpg", exif=turned)
    Image.new("RGB", (20, 30)).save(folder / "002.jpg", format="PNG")
    assert cli.main(["index", str(tmp_path / "data")]) == 0
    out, err = capsys.readouterr()
    assert "ijckd-fast: warning: 1 of 36 files in" in err
    train, val = rows_of(out)
    assert [(row["split"], row["images"], row["classes"], row["left_out"]) for row in (train, val)] == [
        ("train", 35, 3, 1),
        ("val", 18, 3, 0),
    ]
    assert train["images_per_class"] == [11, 12, 12]
    assert (train["shorter_side"][0], train["longer_side"][2]) == (20, 300)
    assert train["formats"] == {"JPEG": 34, "PNG": 1}
    assert (train["rotated"], val["rotated"]) == (1, 0)
    assert train["reasons"] == {"empty file": 1}
    assert val["bytes"] == sum(path.stat().st_size for path in (tmp_path / "data" / "val").glob("*/*"))
    assert (train["opened"], val["opened"]) == (36, 18)
    assert train["images_per_s"] > 0
    for text in ("11  12  12", "JPEG 34, PNG 1", "1 (empty file 1)", "36 at ", str(tmp_path / "data" / ".ijckd-index")):
        assert text in out
    assert cli.main(["index", str(tmp_path / "data"), "--fast"]) == 0
    out = capsys.readouterr().out
    assert [row["opened"] for row in rows_of(out)] == [0, 0]
    assert "nothing new" in out


@pytest.mark.parametrize("of_val", [[], ["--val-fraction", "0.3", "--val-seed", "4"], ["--val-dir", "folders"]])
def test_the_command_that_index_prints_trains(data, tmp_path, monkeypatch, capsys, of_val):
    """On archives as they are downloaded, one image of which is of no class."""
    monkeypatch.chdir(tmp_path)
    hub = write_hub(tmp_path / "my hub", [build_index(data, "train"), build_index(data, "val")])
    image = next((data / "train").glob("*/*")).read_bytes()
    write_shard(hub / "more-train.tar", [("x.jpg", image), ("x.cls", b"-1"), ("y.jpg", image), ("y.cls", b"0")])
    (hub / "_info.json").unlink()
    names = "".join(f"{folder.name}\n" for folder in sorted((data / "train").iterdir()))
    (hub / "classes.txt").write_text(names)
    (tmp_path / "folders").symlink_to(data)
    assert cli.main(["index", "my hub", *of_val]) == 0
    out = capsys.readouterr().out
    train, val = rows_of(out)
    assert (train["layout"], train["labels_from"], train["skipped"]) == ("webdataset shards", "KEY.cls", 1)
    assert train["passed_over"] == {".txt": 1}
    held_out = "--val-fraction" in of_val
    assert (train["images"] + val["images"], train["skipped"]) == (37 if held_out else 37 + 18, 1)
    assert ("held out by --val-seed 4" in out) is held_out

    (line,) = [line for line in out.splitlines() if line.startswith("to train on it: ")]
    words = shlex.split(line.removeprefix("to train on it: "), comments=True)
    assert words[:4] == ["ijckd-fast", "train", "--data-dir", "my hub"]
    assert words[-4:] == ["--objective", "ce", "--student", "resnet18"]
    small = {**SETTINGS, "epochs": 1, "output_dir": "run"}
    assert cli.main([*words[1:-4], *options(small)]) == 0
    out = capsys.readouterr().out
    assert "1 images of" in out
    assert "have a negative label and are skipped" in out
    assert (f": {val['images']}" in out) is bool(of_val)
    if held_out:
        assert (run_folder.read_config(tmp_path / "run")["val_seed"]) == 4
    assert cli.main(["evaluate", "run"]) == 0
    out = capsys.readouterr().out
    assert row_of(out)["images"] == val["images"]
    assert ("more have a negative label" in out) is (val["skipped"] > 0)

    write_info(hub, {"train": {"filenames": ["more-train.tar"], "name": "train", "num_samples": 1}})
    assert cli.main(["index", "my hub", *of_val]) == 2
