import hashlib
import json
import os
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_tree import DAMAGE, photo, write_split
from PIL import Image

from ijckd_fast.data import Index, Paths, build_index
from ijckd_fast.data.index import build, index, kept, scan
from ijckd_fast.data.sources import ClassFolders, listing
from ijckd_fast.errors import UserError


@pytest.fixture(autouse=True)
def _no_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture
def root(tmp_path) -> Path:
    write_split(tmp_path / "data", "train", {"cat": 5, "dog": 4, "eel": 6})
    return tmp_path / "data"


@pytest.fixture
def checked(monkeypatch) -> list[str]:
    """The names of the files that are opened from now on, in the order of their opening."""
    seen: list[str] = []
    check = build.check_image

    def spy(place, full):
        seen.append(Path(place.path).name)
        return check(place, full)

    monkeypatch.setattr(build, "check_image", spy)
    return seen


def same(a: Index, b: Index) -> bool:
    return (a.hash, list(a.paths), a.classes, a.quarantined) == (b.hash, list(b.paths), b.classes, b.quarantined)


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
        files = scan(root, "train").files
        names = [os.path.basename(path.decode()) for path in files.paths.to_pylist()]
        said = {
            name: (files.formats[fact["format"]], fact["orientation"])
            for name, fact in zip(names, files.facts, strict=True)
        }
        assert said["upside_down.jpg"] == ("JPEG", 3)
        assert said["nonsense.jpg"] == said["garbage.jpg"] == said["000.jpg"] == ("JPEG", 1)
        assert said["not_exif.png"] == ("PNG", 1)
        assert said["webp.jpg"] == ("WEBP", 1)
        assert not files.facts["reason"].any()


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
    with pytest.raises(UserError, match=r"has no folder 'val' \('train'\); give the folder that holds train/ and val/"):
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
    assert same(build_index(root, "train", classes=classes), found)


def test_val_must_have_the_classes_of_train(root):
    classes = build_index(root, "train").classes
    write_split(root, "val", {"cat": 2, "eel": 2, "fox": 1})
    with pytest.raises(UserError, match=r"found 3: 1 missing \('dog'\), 1 unexpected \('fox'\)"):
        build_index(root, "val", classes=classes)
    shutil.move(root / "val" / "fox", root / "val" / "dog")
    assert build_index(root, "val", classes=classes).classes == classes


# --- the cache --------------------------------------------------------------------------------------------------------


def test_second_build_opens_no_image(root, checked):
    (root / "train" / "cat" / "bad.jpg").write_bytes(b"")
    with pytest.warns(UserWarning, match="left out"):
        first = build_index(root, "train")
    assert len(checked) == 16
    checked.clear()
    with pytest.warns(UserWarning, match=r"left out.*train\.quarantine\.json"):
        assert same(build_index(root, "train"), first)
    assert checked == []
    with pytest.warns(UserWarning, match="left out"):
        build_index(root, "train", refresh=True)
    assert len(checked) == 16


def test_only_what_changed_is_opened(root, checked):
    first = build_index(root, "train")
    checked.clear()
    photo(30, 20).save(root / "train" / "cat" / "new.jpg")
    assert len(build_index(root, "train")) == 16
    assert checked == ["new.jpg"]

    checked.clear()
    (root / "train" / "cat" / "new.jpg").unlink()
    assert same(build_index(root, "train"), first)
    assert checked == []

    photo(20, 30, seed=7).save(root / "train" / "dog" / "000.jpg")
    changed = build_index(root, "train")
    assert checked == ["000.jpg"]
    assert changed.sizes[5].tolist() == [30, 20]
    assert changed.hash != first.hash

    checked.clear()
    status = (root / "train" / "eel" / "000.jpg").stat()
    os.utime(
        root / "train" / "eel" / "000.jpg", ns=(status.st_atime_ns, status.st_mtime_ns + 1)
    )  # same length, new time
    assert same(build_index(root, "train"), changed)
    assert checked == ["000.jpg"]
    checked.clear()
    build_index(root, "train")
    assert checked == []


def test_a_fast_verdict_does_not_stand_for_a_full_one(root, checked):
    data = (root / "train" / "cat" / "000.jpg").read_bytes()
    comment = b"\xff\xfe\x00\x04\xff\xd9"  # the bytes of an end-of-image marker, where they do not end the image
    (root / "train" / "cat" / "000.jpg").write_bytes(data[:2] + comment + data[2 : len(data) // 2])
    assert len(build_index(root, "train", verify="fast")) == 15
    checked.clear()
    with pytest.warns(UserWarning, match="truncated"):
        assert len(build_index(root, "train", verify="full")) == 14
    assert len(checked) == 15
    checked.clear()
    with pytest.warns(UserWarning, match="truncated"):
        assert len(build_index(root, "train", verify="fast")) == 14
    assert checked == []


def flips(data: bytes):
    return (data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in range(4, len(data)))


def reads_as_something_else(data: bytes, original: Path) -> bool:
    """Whether the damage would go unnoticed without page checksums."""
    try:
        return not pq.read_table(pa.BufferReader(data)).equals(pq.read_table(original))
    except (pa.ArrowException, OSError):
        return False


@pytest.mark.parametrize("damage", ["truncate", "flip", "folders", "text", "other version"])
def test_damaged_cache_is_rebuilt_with_a_warning(root, checked, damage, monkeypatch):
    first = build_index(root, "train")
    cache = root / ".ijckd-index" / "train.parquet"
    data = cache.read_bytes()
    if damage == "truncate":
        cache.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        cache.write_bytes(next(flipped for flipped in flips(data) if reads_as_something_else(flipped, cache)))
    elif damage == "folders":  # one of the cats would have become a dog
        moved = data.replace(b'["train/cat", 5, ', b'["train/cat", 4, ').replace(
            b'["train/dog", 4, ', b'["train/dog", 5, '
        )
        assert sum(a != b for a, b in zip(data, moved, strict=True)) == 2
        cache.write_bytes(moved)
    elif damage == "text":
        cache.write_text("not a Parquet file")
    else:
        with monkeypatch.context() as patch:
            patch.setattr(kept, "CACHE_VERSION", "0")
            build_index(root, "train", refresh=True)
    checked.clear()
    with pytest.warns(UserWarning, match=r"train\.parquet cannot be read and is built again"):
        assert same(build_index(root, "train"), first)
    assert len(checked) == 15
    checked.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(build_index(root, "train"), first)
    assert checked == []


def test_data_folder_that_cannot_be_written(root, tmp_path, checked):
    (root / ".ijckd-index").write_text("in the way: nothing can be created here, even by the superuser")
    first = build_index(root, "train")
    assert len(list((tmp_path / "user-cache" / "ijckd-fast").glob("*/train.parquet"))) == 1
    checked.clear()
    assert same(build_index(root, "train"), first)
    assert checked == []


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_read_only_data_folder(root, tmp_path):
    root.chmod(0o555)
    try:
        build_index(root, "train")
    finally:
        root.chmod(0o755)
    assert not (root / ".ijckd-index").exists()
    assert len(list((tmp_path / "user-cache" / "ijckd-fast").glob("*/train.parquet"))) == 1


def test_nowhere_to_write_still_works(root, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.warns(UserWarning, match="could not be saved"):
        assert len(build_index(root, "train", cache_dir=tmp_path / "file" / "cache")) == 15


def test_cache_dir_is_used_alone(root, tmp_path, checked):
    build_index(root, "train", cache_dir=tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["train.parquet", "train.quarantine.json"]
    assert not (root / ".ijckd-index").exists()
    checked.clear()
    build_index(root, "train", cache_dir=tmp_path / "cache")
    assert checked == []


def test_the_latest_of_two_caches_counts(root, tmp_path, checked):
    """A data folder that became read-only with an old index in it: the newer one in the user's cache is used."""
    build_index(root, "train")
    photo(20, 30).save(root / "train" / "dog" / "new.jpg")
    old = root / ".ijckd-index"
    old.rename(tmp_path / "aside")
    old.write_text("in the way")
    build_index(root, "train")
    old.unlink()
    (tmp_path / "aside").rename(old)
    checked.clear()
    assert len(build_index(root, "train")) == 16
    assert checked == []


def test_interrupted_scan_keeps_what_it_has(root, checked, monkeypatch):
    monkeypatch.setattr(build, "_FILES_PER_TASK", 1)
    check = build.check_image

    def interrupt(place, full):
        if place.path.endswith("eel/003.jpg"):
            time.sleep(0.2)  # the files before it are done by now
            raise KeyboardInterrupt
        return check(place, full)

    with monkeypatch.context() as patch:
        patch.setattr(build, "check_image", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_index(root, "train", workers=1)
    checked.clear()
    assert len(build_index(root, "train")) == 15
    assert "003.jpg" in checked
    assert len(checked) <= 3


def test_workers_do_not_change_the_index(root):
    (root / "train" / "cat" / "bad.jpg").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, many = (build_index(root, "train", workers=workers, refresh=True) for workers in (1, 8))
    assert same(one, many)


@pytest.mark.parametrize("at_once", [1, 2, 1000])
def test_hash_of_known_contents(monkeypatch, at_once):
    """Run folders hold it: it must not change from version to version."""
    monkeypatch.setattr(index, "_HASHED_AT_ONCE", at_once)
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
    assert list(paths.take(np.array([99, 0, 33]))) == [names[99], names[0], names[33]]
    with pytest.raises(IndexError):
        paths[100]
    monkeypatch.setattr(index, "_HASHED_AT_ONCE", 10)
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


def test_progress_bar_goes_to_stderr(root, capfd):
    build_index(root, "train", progress=True)
    assert capfd.readouterr().out == ""


# --- folders that are taken at their word -----------------------------------------------------------------------------


@pytest.fixture
def listed(monkeypatch) -> list[str]:
    """The folders that are listed from now on. Those changed just now may be trusted: no test waits two seconds."""
    seen: list[str] = []
    list_group = ClassFolders.list_group

    def spy(self, group):
        seen.append(group)
        return list_group(self, group)

    monkeypatch.setattr(ClassFolders, "list_group", spy)
    monkeypatch.setattr(listing, "_SETTLED_NS", 0)
    return seen


def test_unchanged_folders_are_not_listed_again(root, listed, checked):
    first = build_index(root, "train")
    assert sorted(listed) == ["train/cat", "train/dog", "train/eel"]
    listed.clear()
    checked.clear()
    assert same(build_index(root, "train", trust_folders=True), first)
    assert (listed, checked) == ([], [])
    build_index(root, "train")
    assert len(listed) == 3


def test_changed_folders_are_listed_again(root, listed, checked):
    deep = root / "train" / "dog" / "images" / "deep"
    shutil.copytree(root / "train" / "cat", deep)
    first = build_index(root, "train")

    def found_again(opened: list[str]) -> Index:
        listed.clear()
        checked.clear()
        found = build_index(root, "train", trust_folders=True)
        assert (listed, checked) == (["train/dog"], opened)
        assert same(found, build_index(root, "train", refresh=True))
        return found

    photo(30, 20).save(deep / "new.jpg")
    assert len(found_again(["new.jpg"])) == 21
    (deep / "new.jpg").rename(deep / "renamed.jpg")
    assert "train/dog/images/deep/renamed.jpg" in found_again(["renamed.jpg"]).paths
    (deep / "renamed.jpg").unlink()
    assert same(found_again([]), first)


def test_classes_that_come_and_go(root, listed, checked):
    first = build_index(root, "train")
    write_split(root, "train", {"bee": 2})
    listed.clear()
    checked.clear()
    found = build_index(root, "train", trust_folders=True)
    assert (listed, len(checked)) == (["train/bee"], 2)
    assert (found.classes, np.bincount(found.labels).tolist()) == (("bee", "cat", "dog", "eel"), [2, 5, 4, 6])
    assert [path.split("/")[1] for path in found.paths] == [found.classes[label] for label in found.labels]
    shutil.rmtree(root / "train" / "bee")
    listed.clear()
    assert same(build_index(root, "train", trust_folders=True), first)
    assert listed == []


def test_a_folder_whose_time_was_put_back_is_listed_again(root, listed):
    """As tar leaves it after another part of an archive has been unpacked into it."""
    build_index(root, "train")
    folder = root / "train" / "dog"
    before = folder.stat()
    photo(30, 20).save(folder / "new.jpg")
    os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    listed.clear()
    assert len(build_index(root, "train", trust_folders=True)) == 16
    assert listed == ["train/dog"]


def test_a_folder_that_changed_just_now_is_not_trusted(root, listed, monkeypatch):
    """The next change may leave the same time."""
    monkeypatch.setattr(listing, "_SETTLED_NS", 60_000_000_000)
    for _ in range(2):
        listed.clear()
        build_index(root, "train", trust_folders=True)
        assert len(listed) == 3
    monkeypatch.setattr(listing, "_SETTLED_NS", 0)
    for now in (3, 0):
        listed.clear()
        build_index(root, "train", trust_folders=True)
        assert len(listed) == now


def test_a_file_rewritten_in_place_is_seen_when_every_file_is_asked(root, listed, checked):
    first = build_index(root, "train")
    checked.clear()
    photo(20, 30, seed=7).save(root / "train" / "dog" / "000.jpg")
    assert same(build_index(root, "train", trust_folders=True), first)
    assert checked == []
    assert build_index(root, "train").hash != first.hash
    assert checked == ["000.jpg"]
    checked.clear()
    assert build_index(root, "train", trust_folders=True).hash != first.hash
    assert checked == []


def test_a_bad_file_replaced_by_a_good_one_is_seen_at_once(root, listed, checked):
    bad = root / "train" / "dog" / "001.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(b"")
    (root / "train" / "cat" / "away.jpg").symlink_to(root / "elsewhere.jpg")
    with pytest.warns(UserWarning, match="2 of 16"):
        build_index(root, "train")
    with pytest.warns(UserWarning, match="2 of 16"):
        build_index(root, "train", trust_folders=True)
    listed.clear()
    checked.clear()
    bad.write_bytes(whole)
    photo(48, 64).save(root / "elsewhere.jpg")
    assert len(build_index(root, "train", trust_folders=True)) == 16
    assert (sorted(checked), listed) == (["001.jpg", "away.jpg"], [])


def test_a_file_that_stays_away_does_not_make_every_start_write(root, listed, checked, monkeypatch):
    (root / "train" / "cat" / "away.jpg").symlink_to(root / "elsewhere.jpg")
    with pytest.warns(UserWarning, match="1 of 16"):
        first = build_index(root, "train")
    monkeypatch.setattr(build, "save_files", lambda *_: pytest.fail("written"))
    checked.clear()
    with pytest.warns(UserWarning, match="1 of 16"):
        assert same(build_index(root, "train", trust_folders=True), first)
    assert checked == ["away.jpg"]


def test_a_fast_verdict_does_not_stand_for_a_full_one_in_a_trusted_folder(root, listed, checked):
    build_index(root, "train", verify="fast")
    checked.clear()
    listed.clear()
    build_index(root, "train", verify="full", trust_folders=True)
    assert (len(checked), listed) == (15, [])


def test_an_interrupted_scan_is_finished_in_trusted_folders_too(root, listed, checked, monkeypatch):
    monkeypatch.setattr(build, "_FILES_PER_TASK", 1)
    check = build.check_image

    def interrupt(place, full):
        if place.path.endswith("dog/002.jpg"):
            time.sleep(0.2)
            raise KeyboardInterrupt
        return check(place, full)

    with monkeypatch.context() as patch:
        patch.setattr(build, "check_image", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_index(root, "train", workers=1)
    checked.clear()
    listed.clear()
    assert len(build_index(root, "train", trust_folders=True)) == 15
    assert "train/cat" not in listed  # which was done
    assert len(checked) < 10


def test_a_long_scan_saves_what_it_has(root, checked, monkeypatch):
    """A kill -9 runs no handler."""
    monkeypatch.setattr(build, "_FILES_PER_TASK", 1)
    monkeypatch.setattr(build, "_SAVE_EVERY", 0.0)
    check = build.check_image
    saved = []

    def look(place, full):
        if place.path.endswith("eel/005.jpg"):
            time.sleep(0.2)
            saved.append(pq.read_metadata(root / ".ijckd-index" / "train.parquet").num_rows)
        return check(place, full)

    monkeypatch.setattr(build, "check_image", look)
    build_index(root, "train", workers=1)
    assert saved == [14]


# --- subsets ----------------------------------------------------------------------------------------------------------


def test_subset_takes_as_many_of_each_class(root):
    full = build_index(root, "train")
    half = full.subset(per_class=3, seed=1)
    assert np.bincount(half.labels).tolist() == [3, 3, 3]
    assert list(half.paths) == sorted(half.paths)
    for i, path in enumerate(half.paths):
        j = full.paths.index(path)
        assert half.labels[i] == full.labels[j]
        assert half.sizes[i].tolist() == full.sizes[j].tolist()
    assert same(half, full.subset(per_class=3, seed=1))
    assert list(half.paths) != list(full.subset(per_class=3, seed=2).paths)
    assert set(full.subset(per_class=2, seed=1).paths) < set(half.paths)  # nested: the first of the same order
    assert len({full.hash, half.hash, full.subset(per_class=2, seed=1).hash, full.subset(3, seed=2).hash}) == 4
    assert full.subset() is full


def test_label_noise_changes_the_stated_share_to_other_classes():
    labels = np.repeat(np.arange(4), 500)
    paths = [f"train/c/{i}.jpg" for i in range(2000)]
    full = Index("/data", "train", tuple("abcd"), Paths.of(paths), labels, np.ones((2000, 2), np.int32), [], "hash")
    noisy = full.subset(label_noise=0.3, seed=5)
    changed = noisy.labels != labels
    assert changed.sum() == 600
    assert (full.labels == labels).all()  # the original is untouched
    moves = np.bincount(4 * labels[changed] + noisy.labels[changed], minlength=16).reshape(4, 4)
    assert moves.diagonal().sum() == 0
    assert moves[~np.eye(4, dtype=bool)].min() > 30  # 50 expected in each of the 12 other places
    assert noisy.hash != full.hash
    assert noisy.hash != full.subset(label_noise=0.2, seed=5).hash
    assert (noisy.labels == full.subset(label_noise=0.3, seed=5).labels).all()
    assert (noisy.labels != full.subset(label_noise=0.3, seed=6).labels).any()
    both = full.subset(per_class=10, label_noise=0.5, seed=5)
    assert (len(both), (both.labels != np.repeat(np.arange(4), 10)).sum()) == (40, 20)


@pytest.mark.parametrize("per_class", [0, 5, -1])
def test_subset_of_too_many_is_refused(root, per_class):
    with pytest.raises(UserError, match="class 'dog' has 4; choose a number from 1 to 4"):
        build_index(root, "train").subset(per_class=per_class)


def test_impossible_label_noise_is_refused(root):
    with pytest.raises(UserError, match=r"between 0 and 1, found 1\.5"):
        build_index(root, "train").subset(label_noise=1.5)
    write_split(root.parent / "one", "train", {"cat": 2})
    with pytest.raises(UserError, match="at least two classes"):
        build_index(root.parent / "one", "train").subset(label_noise=0.5)
