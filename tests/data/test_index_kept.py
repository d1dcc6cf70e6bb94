"""What an index keeps between two starts, and when it looks again."""

import os
import shutil
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_tree import photo, same_index, write_split

from ijckd_fast import files
from ijckd_fast.data import Index, build_index
from ijckd_fast.data.index import build, kept
from ijckd_fast.data.sources import listing

# --- the cache --------------------------------------------------------------------------------------------------------


def test_second_build_opens_no_image(root, checked):
    (root / "train" / "cat" / "bad.jpg").write_bytes(b"")
    with pytest.warns(UserWarning, match="left out"):
        first = build_index(root, "train")
    assert len(checked) == 16
    checked.clear()
    with pytest.warns(UserWarning, match=r"left out.*train\.quarantine\.json"):
        assert same_index(build_index(root, "train"), first)
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
    assert same_index(build_index(root, "train"), first)
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
    assert same_index(build_index(root, "train"), changed)
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
        assert same_index(build_index(root, "train"), first)
    assert len(checked) == 15
    checked.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_index(build_index(root, "train"), first)
    assert checked == []


def test_data_folder_that_cannot_be_written(root, tmp_path, checked):
    (root / ".ijckd-index").write_text("in the way: nothing can be created here, even by the superuser")
    first = build_index(root, "train")
    assert len(list((tmp_path / "user-cache" / "ijckd-fast").glob("*/train.parquet"))) == 1
    checked.clear()
    assert same_index(build_index(root, "train"), first)
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
    monkeypatch.setattr(build, "FILES_PER_TASK", 1)
    check = build.check_image

    def interrupt(place, *more):
        if place.path.endswith("eel/003.jpg"):
            time.sleep(0.2)  # the files before it are done by now
            raise KeyboardInterrupt
        return check(place, *more)

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
    assert same_index(one, many)


# --- folders that are taken at their word -----------------------------------------------------------------------------


def test_unchanged_folders_are_not_listed_again(root, listed, checked):
    first = build_index(root, "train")
    assert sorted(listed) == ["train/cat", "train/dog", "train/eel"]
    listed.clear()
    checked.clear()
    assert same_index(build_index(root, "train", trust_folders=True), first)
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
        assert same_index(found, build_index(root, "train", refresh=True))
        return found

    photo(30, 20).save(deep / "new.jpg")
    assert len(found_again(["new.jpg"])) == 21
    (deep / "new.jpg").rename(deep / "renamed.jpg")
    assert "train/dog/images/deep/renamed.jpg" in found_again(["renamed.jpg"]).paths
    (deep / "renamed.jpg").unlink()
    assert same_index(found_again([]), first)


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
    assert same_index(build_index(root, "train", trust_folders=True), first)
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
    monkeypatch.setattr(listing, "SETTLED_NS", 60_000_000_000)
    for _ in range(2):
        listed.clear()
        build_index(root, "train", trust_folders=True)
        assert len(listed) == 3
    monkeypatch.setattr(listing, "SETTLED_NS", 0)
    for now in (3, 0):
        listed.clear()
        build_index(root, "train", trust_folders=True)
        assert len(listed) == now


def test_a_file_rewritten_in_place_is_seen_when_every_file_is_asked(root, listed, checked):
    first = build_index(root, "train")
    checked.clear()
    photo(20, 30, seed=7).save(root / "train" / "dog" / "000.jpg")
    assert same_index(build_index(root, "train", trust_folders=True), first)
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
        assert same_index(build_index(root, "train", trust_folders=True), first)
    assert checked == ["away.jpg"]


def test_a_fast_verdict_does_not_stand_for_a_full_one_in_a_trusted_folder(root, listed, checked):
    build_index(root, "train", verify="fast")
    checked.clear()
    listed.clear()
    build_index(root, "train", verify="full", trust_folders=True)
    assert (len(checked), listed) == (15, [])


def test_an_interrupted_scan_is_finished_in_trusted_folders_too(root, listed, checked, monkeypatch):
    monkeypatch.setattr(build, "FILES_PER_TASK", 1)
    check = build.check_image

    def interrupt(place, *more):
        if place.path.endswith("dog/002.jpg"):
            time.sleep(0.2)
            raise KeyboardInterrupt
        return check(place, *more)

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
    monkeypatch.setattr(build, "FILES_PER_TASK", 1)
    monkeypatch.setattr(build, "SAVE_EVERY", 0.0)
    check = build.check_image
    saved = []

    def look(place, *more):
        if place.path.endswith("eel/005.jpg"):
            time.sleep(0.2)
            saved.append(pq.read_metadata(root / ".ijckd-index" / "train.parquet").num_rows)
        return check(place, *more)

    monkeypatch.setattr(build, "check_image", look)
    build_index(root, "train", workers=1)
    assert saved == [14]


def test_what_a_killed_scan_left_goes(root):
    build_index(root, "train")
    home = root / ".ijckd-index"
    for name in (".train.parquet.4711.tmp", ".val.quarantine.json.1-0123abcd.tmp"):
        (home / name).write_bytes(b"half")
    with files.replacing(home / "val.parquet", shared=True) as path:  # of a scan that is under way
        build_index(root, "train")
        assert sorted(os.listdir(home)) == sorted([path.name, "train.parquet", "train.quarantine.json"])
    assert (home / "val.parquet").exists()


def test_an_index_of_shards_without_checksums_is_built_again(data_of_shards):
    first = build_index(data_of_shards, "train")
    path = data_of_shards / ".ijckd-index" / "train.parquet"
    about = pq.ParquetFile(path).metadata.metadata
    table = pq.read_table(path).drop_columns(["crc32"])
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({key: value for key, value in about.items() if key != b"ARROW:schema"})
    with pytest.warns(UserWarning, match="is built again .it is from before images in shards had checksums"):
        again = build_index(data_of_shards, "train")
    assert np.array_equal(again.members, first.members)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_index(data_of_shards, "train")


@pytest.fixture
def data_of_shards(tmp_path):
    with_folders = tmp_path / "folders"
    write_split(with_folders, "train", {"cat": 2, "dog": 2}, size=(20, 20))
    (tmp_path / "shards" / "train").mkdir(parents=True)
    with tarfile.open(tmp_path / "shards" / "train" / "a.tar", "w") as tar:
        for path in sorted((with_folders / "train").rglob("*.jpg")):
            tar.add(path, path.relative_to(with_folders / "train"))
    return tmp_path / "shards"
