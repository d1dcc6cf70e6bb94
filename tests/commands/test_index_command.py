"""`ijckd-fast index`: what is in a folder, and what of it is left out."""

from __future__ import annotations

import shutil

from command_line import rows_of
from PIL import Image

from ijckd_fast import cli


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
