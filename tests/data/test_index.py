"""The index of a split: what is in it, what is left out and why, what is refused."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from image_tree import DAMAGE, photo, same_index, write_split
from PIL import Image

from ijckd_fast.data import Paths, build_index
from ijckd_fast.data.index import index, scan
from ijckd_fast.errors import UserError


def test_lists_images_in_order_with_labels_and_sizes(root):
    found = build_index(root, "train")
    assert found.classes == ("cat", "dog", "eel")
    assert found.num_classes == 3
    assert len(found) == 15
    assert list(found.paths) == sorted(found.paths)
    assert found.paths[5] == "train/dog/000.jpg"
    assert found.labels.tolist() == [0] * 5 + [1] * 4 + [2] * 6
    assert found.labels.dtype == np.int64
    assert found.sizes.dtype == np.int32
    assert found.sizes[:4].tolist() == [[64, 48], [48, 64], [40, 40], [91, 37]]  # (width, height)
    assert found.quarantined == []
    assert found.absolute(5) == str(root.resolve() / "train/dog/000.jpg")
    assert Path(found.absolute(5)).is_file()


def test_looks_into_subfolders_and_skips_hidden_and_foreign_files(root):
    shutil.copytree(root / "train" / "cat", root / "train" / "dog" / "images" / "deep")
    for name in ("._000.jpg", "list.txt", "archive.tar", "anim.gif"):
        (root / "train" / "cat" / name).write_text("x")
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "README.md").write_text("x")
    (root / "train" / "cat" / "loop").symlink_to(root / "train")
    (root / "train" / "cat" / "self").symlink_to(root / "train" / "cat")
    with pytest.warns(UserWarning, match=r"1 with \.gif, e\.g\. train/cat/anim\.gif"):
        found = build_index(root, "train")
    assert found.classes == ("cat", "dog", "eel")
    own = [path for path in found.paths if "/loop/" not in path]
    assert len(own) == 20
    assert not [path for path in found.paths if "self" in path or path.count("loop") > 1]
    assert found.labels[found.paths.index("train/dog/images/deep/004.jpg")] == 1


# --- files that are fine --------------------------------------------------------------------------------------------


def test_grayscale_cmyk_png_and_exif_are_fine(root):
    folder = root / "train" / "cat"
    picture = photo(48, 64)
    rotated = Image.Exif()
    rotated[274] = 6
    picture.convert("L").save(folder / "gray.jpg")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.save(folder / "png.jpg", format="PNG")
    picture.convert("RGBA").save(folder / "alpha.png")
    picture.quantize(16).save(folder / "palette.png")
    picture.save(folder / "webp.webp")
    picture.save(folder / "exif.JPEG", exif=rotated)
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    for verify in ("full", "fast"):
        found = build_index(root, "train", verify=verify, refresh=True)
        assert found.quarantined == []
        assert len(found) == 23
        assert found.sizes[found.paths.index("train/cat/exif.JPEG")].tolist() == [64, 48]  # as stored, not as shown


def test_format_and_orientation_are_remembered(root):
    folder = root / "train" / "cat"
    for name, tag in (("upside_down.jpg", 3), ("nonsense.jpg", 77)):
        exif = Image.Exif()
        exif[274] = tag
        photo(48, 64).save(folder / name, exif=exif)
    photo(48, 64).save(folder / "garbage.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    photo(48, 64).save(folder / "not_exif.png", exif=b"nothing like it")
    photo(48, 64).save(folder / "webp.jpg", format="WEBP")
    for _ in range(2):  # fresh and from the cache
        found = scan(root, "train")
        said = {
            os.path.basename(path): (found.formats[fact["format"]], fact["orientation"])
            for path, fact in zip(found.index.paths, found.facts, strict=True)
        }
        assert said["upside_down.jpg"] == ("JPEG", 3)
        assert said["nonsense.jpg"] == said["garbage.jpg"] == said["000.jpg"] == ("JPEG", 1)
        assert said["not_exif.png"] == ("PNG", 1)
        assert said["webp.jpg"] == ("WEBP", 1)
        assert not found.facts["reason"].any()


# --- files that are not -----------------------------------------------------------------------------------------------

REASONS = {
    "truncated body": "truncated",
    "missing last bytes": "truncated",
    "truncated header": "Truncated",
    "zero bytes": "empty file",
    "text": "not an image",
}


@pytest.mark.parametrize("verify", ["full", "fast"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_left_out_with_its_reason(root, damage, verify):
    whole = build_index(root, "train", verify=verify)
    DAMAGE[damage](root / "train" / "dog" / "001.jpg")
    with pytest.warns(UserWarning, match=r"1 of 15 files .* left out, e\.g\. train/dog/001\.jpg"):
        found = build_index(root, "train", verify=verify)
    assert list(found.paths) == [path for path in whole.paths if path != "train/dog/001.jpg"]
    assert found.labels.tolist() == [0] * 5 + [1] * 3 + [2] * 6
    assert len(found.sizes) == 14
    ((path, reason),) = found.quarantined
    assert path == "train/dog/001.jpg"
    assert REASONS[damage] in reason
    report = json.loads((root / ".ijckd-index" / "train.quarantine.json").read_text())
    assert report == [{"path": path, "reason": reason}]
    assert found.hash != whole.hash


def test_report_forgets_a_bad_file_that_was_removed(root):
    (root / "train" / "dog" / "bad.jpg").write_bytes(b"")
    report = root / ".ijckd-index" / "train.quarantine.json"
    with pytest.warns(UserWarning, match="left out"):
        build_index(root, "train")
    assert [row["path"] for row in json.loads(report.read_text())] == ["train/dog/bad.jpg"]
    (root / "train" / "dog" / "bad.jpg").unlink()
    build_index(root, "train")
    assert json.loads(report.read_text()) == []


def test_formats_that_dali_and_pillow_read_differently_are_left_out(root):
    folder = root / "train" / "cat"
    picture = photo(48, 64)
    turned = Image.Exif()
    turned[274] = 6
    picture.save(folder / "gif.jpg", format="GIF")
    picture.convert("F").save(folder / "float.tif")
    picture.save(folder / "turned.tif", exif=turned)
    with pytest.warns(UserWarning, match="3 of 18"):
        found = build_index(root, "train")
    reasons = dict(found.quarantined)
    assert "a GIF image" in reasons["train/cat/gif.jpg"]
    assert "mode F" in reasons["train/cat/float.tif"]
    assert "orientation" in reasons["train/cat/turned.tif"]


def test_header_that_claims_too_many_pixels(root):
    path = root / "train" / "cat" / "bomb.jpg"
    data = bytearray((root / "train" / "cat" / "000.jpg").read_bytes())
    frame = data.index(b"\xff\xc0")  # SOF0: length 2, precision 1, height 2, width 2
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="DecompressionBombError"):
        assert len(build_index(root, "train")) == 15


def test_unreadable_file_is_looked_at_again_when_it_comes_back(root, checked):
    (root / "train" / "cat" / "away.jpg").symlink_to(root / "elsewhere.jpg")
    with pytest.warns(UserWarning, match="No such file"):
        assert len(build_index(root, "train")) == 15
    photo(48, 64).save(root / "elsewhere.jpg")
    checked.clear()
    assert len(build_index(root, "train")) == 16
    assert checked == ["away.jpg"]


@pytest.mark.parametrize("verify", ["full", "fast"])
def test_io_error_is_not_remembered(root, monkeypatch, checked, verify):
    real_open = open

    def failing(path, *args, **kwargs):
        if str(path).endswith("dog/002.jpg"):
            raise PermissionError(13, "Permission denied", path)
        return real_open(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", failing)
        with pytest.warns(UserWarning, match="cannot be read: Permission denied"):
            assert len(build_index(root, "train", verify=verify)) == 14
    checked.clear()
    assert len(build_index(root, "train", verify=verify)) == 15
    assert checked == ["002.jpg"]


# --- folders that are not what is expected
# ------------------------------------------------------------------------------


def test_missing_and_empty_folders(root, tmp_path):
    with pytest.raises(UserError, match=r"nowhere is not a folder"):
        build_index(tmp_path / "nowhere", "train")
    with pytest.raises(
        UserError,
        match=r"has no folder 'val' \('train'\); .*--val-dir .*--val-fraction .*or give the folder that holds",
    ):
        build_index(root, "val")
    (root / "val").mkdir()
    with pytest.raises(UserError, match=r"val is empty; put one folder of images per class into it"):
        build_index(root, "val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="it is empty"):
        build_index(tmp_path / "empty", "train")
    with pytest.raises(UserError, match="'train' or 'val'"):
        build_index(root, "test")
    with pytest.raises(UserError, match="'full' or 'fast'"):
        build_index(root, "train", verify="quick")


def test_flat_validation_folder(root):
    (root / "val").mkdir()
    photo(48, 64).save(root / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(UserError, match=r"1 image files and no class folder; sort them"):
        build_index(root, "val")


def test_class_folder_without_images(root):
    (root / "train" / "ant").mkdir()
    (root / "train" / "ant" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"'ant' has none: it has no image file"):
        build_index(root, "train")


def test_class_folder_with_bad_images_only(root):
    for path in (root / "train" / "dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"'dog' has none: its 4 image files are unreadable \(.*empty file"):
        build_index(root, "train")


def test_classes_in_another_order(root, checked):
    classes = ("eel", "cat", "dog")
    found = build_index(root, "train", classes=classes)
    assert found.classes == classes
    assert np.bincount(found.labels).tolist() == [6, 5, 4]
    assert [classes[label] for label in found.labels] == [path.split("/")[1] for path in found.paths]
    assert found.paths[0] == "train/eel/000.jpg"
    checked.clear()
    usual = build_index(root, "train")
    assert (usual.classes, list(usual.paths), checked) == (("cat", "dog", "eel"), sorted(usual.paths), [])
    assert found.hash != usual.hash
    assert same_index(build_index(root, "train", classes=classes), found)


def test_val_must_have_the_classes_of_train(root):
    classes = build_index(root, "train").classes
    write_split(root, "val", {"cat": 2, "eel": 2, "fox": 1})
    with pytest.raises(UserError, match=r"found 3: 1 missing \('dog'\), 1 unexpected \('fox'\)"):
        build_index(root, "val", classes=classes)
    shutil.move(root / "val" / "fox", root / "val" / "dog")
    assert build_index(root, "val", classes=classes).classes == classes


def test_progress_bar_goes_to_stderr(root, capfd):
    build_index(root, "train", progress=True)
    assert capfd.readouterr().out == ""


# --- hash and paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 2, 1000])
def test_hash_of_known_contents(monkeypatch, at_once):
    """Run folders hold it: it must not change from version to version."""
    monkeypatch.setattr(index, "HASHED_AT_ONCE", at_once)
    arrays = np.array([0, 0, 1]), np.array([[64, 48], [48, 64], [40, 40]], np.int32), np.array([700, 800, 900])
    pieces = [b"train/a/0.jpg", b"train/a/1.jpg"], [b"train/b/\xe9.jpg"]
    paths = Paths(pa.chunked_array([pa.array(piece, pa.large_binary()) for piece in pieces]))
    digest = index.content_hash("train", ("a", "b"), paths, *arrays)
    parts = [
        b'["train", ["a", "b"]]',
        b"train/a/0.jpg\0train/a/1.jpg\0train/b/\xe9.jpg",
        *(a.tobytes() for a in arrays),
    ]
    by_hand = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    assert digest == hashlib.sha256(by_hand).hexdigest()


def test_paths_in_pieces(monkeypatch):
    names = [f"train/{'x' * (i % 5)}/{i}.jpg" for i in range(100)]
    paths = Paths(
        pa.chunked_array([pa.array(map(os.fsencode, part), pa.large_binary()) for part in (names[:33], names[33:])])
    )
    assert (len(paths), paths[40], paths[-1], list(paths)) == (100, names[40], names[-1], names)
    assert list(paths[90:30:-7]) == names[90:30:-7]
    assert list(paths.only(np.arange(100) % 33 == 0)) == [names[0], names[33], names[66], names[99]]
    with pytest.raises(IndexError):
        paths[100]
    monkeypatch.setattr(index, "HASHED_AT_ONCE", 10)
    joined = b"\0".join(piece.to_pybytes() for piece in paths.joined())
    assert joined == "\0".join(names).encode()
    assert paths.joined_length == len(joined)


def test_names_that_are_not_utf8(root):
    name = os.fsdecode(b"caf\xe9.jpg")
    shutil.copy(root / "train" / "cat" / "000.jpg", root / "train" / "cat" / name)
    bad = os.fsdecode(b"b\xe9d.jpg")
    (root / "train" / "cat" / bad).write_bytes(b"")
    for _ in range(2):  # fresh and from the cache
        with pytest.warns(UserWarning, match="left out"):
            found = build_index(root, "train")
        assert f"train/cat/{name}" in found.paths
        assert found.quarantined[0][0] == f"train/cat/{bad}"


def test_hash_is_the_contents(root, tmp_path):
    first = build_index(root, "train")
    shutil.copytree(root, tmp_path / "copy")  # other place, other times
    assert build_index(tmp_path / "copy", "train").hash == first.hash
    shutil.move(tmp_path / "copy" / "train" / "cat" / "000.jpg", tmp_path / "copy" / "train" / "cat" / "0000.jpg")
    assert build_index(tmp_path / "copy", "train").hash != first.hash
