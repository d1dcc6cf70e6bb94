"""Names: extensions that are read and that are passed over, names that are equal and names that only look it."""

import gzip
import os
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from command_line import rows_of
from image_tree import jpeg_bytes, photo, write_split

from ijckd_fast import cli
from ijckd_fast.data import IMAGE_EXTENSIONS, build_index
from ijckd_fast.data.index import scan
from ijckd_fast.data.sources import PassedOver, listing
from ijckd_fast.errors import UserError

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))

# --- extensions -------------------------------------------------------------------------------------------------------


def test_every_extension_of_the_formats_that_are_read(root):
    folder = root / "train" / "cat"
    picture = photo(48, 64)
    formats = {".png": "PNG", ".apng": "PNG", ".bmp": "BMP", ".dib": "BMP", ".webp": "WEBP", ".tif": "TIFF"}
    formats |= {".tiff": "TIFF", ".ppm": "PPM", ".pnm": "PPM", ".pgm": "PPM", ".pbm": "PPM"}
    modes = {".pgm": "L", ".pbm": "1"}
    said = set()
    for i, extension in enumerate(IMAGE_EXTENSIONS):
        kind = formats.get(extension, "JPEG")
        said.add(kind)
        for name in (f"{i}{extension}", f"{i}_{extension.upper()[1:]}{extension.upper()}"):
            picture.convert(modes.get(extension, "RGB")).save(folder / name, format=kind)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = scan(root, "train")
    assert not [w for w in seen if "are not used" in str(w.message)]
    assert found.passed_over == []
    assert len(found.facts) == 15 + 2 * len(IMAGE_EXTENSIONS)
    assert {".jfif", ".jpe", ".jif", ".jfi", ".pbm", ".pnm", ".dib"} < set(IMAGE_EXTENSIONS)
    assert said == {found.formats[number] for number in set(found.facts["format"].tolist())}


def write_odd_ones(folder: Path) -> None:
    """Files that are passed over: 9 images by their name or content, 5 others, 2 that are hidden."""
    jpeg = jpeg_bytes(folder / "aside.jpg")
    (folder / "aside.jpg").unlink()
    for name in ("1", "2", "x.JPG_large", "x.jpg~", "wget.jpg?w=640", "x.jpg "):
        (folder / name).write_bytes(jpeg)
    photo(8, 8).save(folder / "x.dat", format="PNG")
    photo(8, 8).save(folder / "anim.GIF")
    (folder / "phone.heic").write_bytes(b"whatever is in it")
    (folder / "README").write_text("no image")
    (folder / "boxes.xml").write_text("<annotation/>")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "more.xml").write_text("<annotation/>")
    (folder / "list.csv").write_text("P5 is how a PGM file begins\n")
    (folder / "packed.gz").write_bytes(gzip.compress(jpeg))
    (folder / ".hidden").write_bytes(jpeg)
    (folder / "._000.jpg").write_bytes(b"resource fork")


ODD = {
    "an odd ending": (3, 3),
    "no extension": (3, 2),
    ".dat": (1, 1),
    ".gif": (1, 1),
    ".heic": (1, 1),
    ".jpg_large": (1, 1),
    ".xml": (2, 0),
    ".csv": (1, 0),
    ".gz": (1, 0),
}


def test_files_passed_over_are_counted_and_images_among_them_named(root, listed, monkeypatch):
    write_odd_ones(root / "train" / "cat")
    for trust in (False, True):
        with pytest.warns(UserWarning, match=r"9 files in .*train are images or look like them and are not used: "):
            found = scan(root, "train", trust_folders=trust)
        assert {row.kind: (row.files, row.images) for row in found.passed_over} == ODD
        assert list(ODD)[:2] == [row.kind for row in found.passed_over][:2]
        assert found.passed_over[1] == PassedOver("no extension", 3, 2, "train/cat/1")
        assert len(found.index) == 15
    assert len(listed) == 3  # the second time they were taken from the index
    os.mkfifo(root / "train" / "dog" / "pipe")  # is never waited for
    with pytest.warns(UserWarning, match="9 files"):
        assert scan(root, "train", trust_folders=True).passed_over[1].files == 4
    assert len(listed) == 4


def test_as_many_as_there_are_once_one_is_an_image(root):
    for i in range(30):
        (root / "train" / "dog" / f"{i:02d}").write_bytes(b"x" if i < 7 else jpeg_bytes(root / "aside"))
        (root / "train" / "eel" / f"{i:02d}").write_bytes(b"x" if i < 8 else jpeg_bytes(root / "aside"))
    with pytest.warns(UserWarning, match=r"23 files in .*no extension, e\.g\. train/dog/07"):
        (row,) = scan(root, "train").passed_over
    assert row == ("no extension", 60, 23, "train/dog/07")


def test_names_with_numbers_after_their_dots_are_one_kind(root):
    for i in range(100):
        (root / "train" / "dog" / f"frame.{i:04d}").write_bytes(b"x")
        (root / "train" / "dog" / f"frame.x{i:04d}").write_bytes(b"x")
    passed = scan(root, "train").passed_over
    assert sum(row.files for row in passed) == 200
    assert len(passed) <= 25


def test_images_beside_class_folders(root):
    photo(8, 8).save(root / "train" / "stray.jpg")
    (root / "train" / "README.md").write_text("x")
    with pytest.warns(UserWarning, match=r"1 files in .* 1 with \.jpg in train/ itself, e\.g\. train/stray\.jpg"):
        passed = scan(root, "train").passed_over
    assert passed == [(".jpg in train/ itself", 1, 1, "train/stray.jpg"), (".md", 1, 0, "train/README.md")]


def test_a_class_of_which_nothing_is_read(root):
    for path in (root / "train" / "dog").iterdir():
        path.rename(path.with_suffix(".xyz"))
    (root / "train" / "dog" / "notes").write_text("x")
    with (
        pytest.raises(
            UserError,
            match=r"'dog' has none: it has no image file, only 4 with \.xyz, 1 with no extension, which are not read: "
            r"expected \.jpg, \.jpeg, ",
        ),
        pytest.warns(UserWarning, match=r"4 with \.xyz"),
    ):
        build_index(root, "train")


def test_a_split_of_which_nothing_is_read(root):
    (root / "val").mkdir()
    (root / "val" / "0.beton").write_bytes(b"beton")
    (root / "val" / "0.GIF").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match=r"val holds nothing that is read, only 1 with \.beton, 1 with \.gif \(e\.g"):
        build_index(root, "val")


def test_the_command_counts_them(root, capsys):
    write_split(root, "val", {"cat": 1, "dog": 1, "eel": 1})
    write_odd_ones(root / "train" / "cat")
    assert cli.main(["index", str(root)]) == 0
    out, err = capsys.readouterr()
    assert f"warning: 9 files in {root}/train are images or look like them" in err
    train, val = rows_of(out)
    assert train["passed_over"] == {kind: files for kind, (files, _) in ODD.items()}
    assert (train["passed_over_images"], val["passed_over"], val["passed_over_images"]) == (9, {}, 0)
    assert "passed over by their names" in out


def test_what_is_passed_over_makes_no_other_index(root, listed):
    first = build_index(root, "train")
    (root / "train" / "cat" / "boxes.xml").write_text("x")
    assert build_index(root, "train", trust_folders=True).hash == first.hash


# --- names that are equal, and names that look it ---------------------------------------------------------------------


def tree(root: Path, split: str, *names: str) -> Path:
    write_split(root, split, dict.fromkeys(names, 1), size=(8, 8))
    return root


@pytest.mark.parametrize(("ours", "theirs"), [(NFC, NFD), (NFD, NFC)])
def test_class_folders_in_the_other_unicode_form(tmp_path, ours, theirs, monkeypatch):
    monkeypatch.setattr(listing, "SETTLED_NS", 0)
    train = build_index(tree(tmp_path, "train", ours, "b", "zoo"), "train")
    assert set(train.classes) == {ours, "b", "zoo"}
    tree(tmp_path, "val", theirs, "b", "zoo")
    for trust in (False, True):
        with pytest.warns(UserWarning, match="1 class folders of .*val have the names expected in another Unicode"):
            val = build_index(tmp_path, "val", classes=train.classes, trust_folders=trust)
        assert val.classes == train.classes
        assert sorted(val.paths) == sorted(f"val/{name}/000.jpg" for name in (theirs, "b", "zoo"))
        for path, label in zip(val.paths, val.labels.tolist(), strict=True):
            assert unicodedata.normalize("NFC", path.split("/")[1]) == unicodedata.normalize("NFC", val.classes[label])


def test_a_class_list_in_the_other_unicode_form(tmp_path):
    tree(tmp_path, "train", NFD, "b")
    (tmp_path / "list").write_text(f"{NFC}\nb\n")
    with pytest.warns(UserWarning, match="in another Unicode form"):
        found = build_index(tmp_path, "train", class_list=tmp_path / "list")
    assert (found.classes, list(found.paths)) == ((NFC, "b"), [f"train/{NFD}/000.jpg", "train/b/000.jpg"])
    (tmp_path / "list").write_text(f"{NFC}\nb\n{NFD}\n")
    with pytest.raises(UserError, match=r"stands in lines 1 and 3, in another Unicode form \('caf\\xe9' and 'cafe\\u0"):
        build_index(tmp_path, "train", class_list=tmp_path / "list")


@pytest.mark.parametrize(
    "other", [NFD, f"{NFC} ", f" {NFC}", f"{NFC}\u200b", f"\ufeff{NFD}", f"{NFC}\r", f"{NFC}\u00a0"]
)
def test_two_class_folders_that_look_the_same(tmp_path, other):
    tree(tmp_path, "train", NFC, other, "b")
    with pytest.raises(
        UserError, match=r"class folders of .*train must differ in what can be seen, found .*'caf\\xe9'"
    ):
        build_index(tmp_path, "train")


def test_class_folders_that_differ_in_case_or_by_their_sign_are_two(tmp_path):
    names = ("A", "a", "\uff41", "1", "\u2460", "\u00b2", "2", "x y", "x_y")
    assert build_index(tree(tmp_path, "train", *names), "train").classes == tuple(sorted(names))


@pytest.mark.parametrize("other", ["Cat", "CAT", "cat ", " cat", "cat\u200b", "\uff43\uff41\uff54", "c-a_t"])
def test_class_folders_that_only_look_the_same_in_val(tmp_path, other):
    train = build_index(tree(tmp_path, "train", "cat", "b"), "train")
    tree(tmp_path, "val", other, "b")
    with pytest.raises(UserError, match=r"1 missing \('cat'\), 1 unexpected .*; did you mean 'cat' by .*\?$") as error:
        build_index(tmp_path, "val", classes=train.classes)
    assert ascii(other) in str(error.value)


def test_names_that_are_not_utf8_are_none_of_these(tmp_path):
    names = [os.fsdecode(b"caf\xe9"), os.fsdecode(b"caf\xe8"), NFC]
    train = build_index(tree(tmp_path, "train", *names), "train")
    tree(tmp_path, "val", *names)
    val = build_index(tmp_path, "val", classes=train.classes)
    assert val.classes == train.classes
    np.testing.assert_array_equal(val.labels, train.labels)
