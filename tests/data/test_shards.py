"""Webdataset shards: the same images in the same batches as from folders, whatever becomes of the archives."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from image_tree import DAMAGE, write_split
from loading import AUGMENT, batches

from ijckd_fast.data import EvalPlan, TrainPlan, build_index
from ijckd_fast.data.index import build
from ijckd_fast.data.sources import listing, shards
from ijckd_fast.errors import UserError


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def shards_of(root: Path, folders, by: str = "cls", per_shard: int = 7) -> None:
    """The images of an index as root/<split>/shard-<n>.tar. by: 'cls', numbers; 'name', class names; 'folder'."""
    for first in range(0, len(folders), per_shard):
        members = []
        for i in range(first, min(first + per_shard, len(folders))):
            name = folders.classes[folders.labels[i]]
            label = str(folders.labels[i]) if by == "cls" else name
            key = f"{name}/{i:05d}" if by == "folder" else f"{i:05d}"
            members.append((f"{key}.jpg", Path(folders.absolute(i)).read_bytes()))
            if by != "folder":
                members.append((f"{key}.cls", label.encode()))
        write_shard(root / folders.split / f"shard-{first // per_shard:03d}.tar", members)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """24 images of four shapes in two classes."""
    root = tmp_path_factory.mktemp("folders")
    write_split(root, "train", {"cat": 12, "dog": 12})
    return build_index(root, "train")


@pytest.fixture
def root(tmp_path, folders) -> Path:
    shards_of(tmp_path, folders)
    return tmp_path


@pytest.mark.parametrize("backend", ["dali", "pillow"])
@pytest.mark.parametrize("by", ["cls", "name", "folder"])
def test_batches_equal_those_of_folders(tmp_path, folders, by, backend):
    shards_of(tmp_path, folders, by)
    packed = build_index(tmp_path, "train")
    assert packed.shards == tuple(f"train/shard-{n:03d}.tar" for n in range(4))
    assert packed.classes == (("0", "1") if by == "cls" else ("cat", "dog"))
    np.testing.assert_array_equal(packed.labels, folders.labels)
    np.testing.assert_array_equal(packed.sizes, folders.sizes)
    assert packed.paths[8] == f"train/shard-001.tar/{'cat/' if by == 'folder' else ''}00008.jpg"
    for plan, stop in ((TrainPlan, 5), (EvalPlan, None)):
        of = [
            plan(index, AUGMENT, 7, 3) if plan is TrainPlan else plan(index, AUGMENT, 7) for index in (packed, folders)
        ]
        for a, b in zip(*(batches(backend, p, stop=stop) for p in of), strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)
            assert torch.equal(a.ids, b.ids)


def test_class_names(root, folders, tmp_path_factory):
    (root / "classes.txt").write_text("cat\ndog\n")
    assert build_index(root, "train").classes == ("cat", "dog")
    assert build_index(root, "train", classes=("x", "y")).classes == ("x", "y")
    wide = tmp_path_factory.mktemp("wide")
    (wide / "list").write_text("dog\ncat")
    shards_of(wide, folders, "name")
    pinned = build_index(wide, "train", class_list=wide / "list")
    assert pinned.classes == ("dog", "cat")
    np.testing.assert_array_equal(pinned.labels, 1 - folders.labels)
    with pytest.raises(UserError, match=r"label 'cat', which is none of the 2 classes \('a', 'b'\).*--class-list"):
        build_index(wide, "train", classes=("a", "b"))
    (root / "classes.txt").write_text("cat\n")
    with pytest.raises(UserError, match="label '1', which is none of the 1 classes"):
        build_index(root, "train")
    (root / "classes.txt").write_text("cat\ndog\neel\n")
    with pytest.raises(UserError, match=r"every class of .* but 'eel' has none"):
        build_index(root, "train")


def test_second_start_opens_no_shard_that_has_not_changed(root, folders, monkeypatch):
    monkeypatch.setattr(listing, "SETTLED_NS", 0)  # nobody changes them twice at one time
    listed, opened = [], []
    monkeypatch.setattr(
        shards.tarfile, "open", lambda path, *a, _open=tarfile.open, **k: listed.append(path) or _open(path, *a, **k)
    )
    check = build.check_image
    monkeypatch.setattr(build, "check_image", lambda place, full: opened.append(place) or check(place, full))
    first = build_index(root, "train")
    assert (len(listed), len(opened)) == (4, 24)
    again = build_index(root, "train")
    assert (len(listed), len(opened)) == (4, 24)
    assert again.hash == first.hash
    np.testing.assert_array_equal(again.members, first.members)
    monkeypatch.undo()

    members = [(f"{i:05d}.{kind}", content) for i in (0, 9) for kind, content in (
        ("jpg", Path(folders.absolute(i)).read_bytes()), ("cls", b"1"))]  # fmt: skip
    write_shard(root / "train" / "shard-003.tar", members)
    listed.clear()
    changed = build_index(root, "train")
    assert len(changed) == 23
    assert changed.labels[-2:].tolist() == [1, 1]


def test_other_members_are_not_read(tmp_path, folders):
    image = Path(folders.absolute(0)).read_bytes()
    write_shard(
        tmp_path / "train" / "a.tar",
        [("./x.JPEG", image), ("./x.json", b"{}"), ("./x.cls", b"0\n"), ("._y.jpg", b"?"), ("notes", b"?"),
         ("z.seg.png", b"?"), ("z.png", image), ("z.cls", b"1")],
    )  # fmt: skip
    with pytest.raises(UserError, match=r"one image for each key, found 'z\.seg\.png' and 'z\.png'"):
        build_index(tmp_path, "train")
    write_shard(
        tmp_path / "train" / "a.tar",
        [
            ("./x.JPEG", image),
            ("./x.json", b"{}"),
            ("./x.cls", b"0\n"),
            ("._y.jpg", b"?"),
            ("notes", b"?"),
            ("z.png", image),
            ("z.cls", b"1"),
        ],
    )
    found = build_index(tmp_path, "train")
    assert list(found.paths) == ["train/a.tar/./x.JPEG", "train/a.tar/z.png"]
    assert found.labels.tolist() == [0, 1]


def test_archives_beside_folders_are_what_these_were_unpacked_from(tmp_path):
    write_split(tmp_path, "train", {"cat": 2})
    (tmp_path / "train" / "cat.tar").write_bytes(b"no archive at all")
    assert len(build_index(tmp_path, "train")) == 2


@pytest.mark.parametrize(
    ("cut", "text"),
    [
        (lambda tar: tar[:-1024], "no end-of-archive mark"),
        (lambda tar: tar[: len(tar) // 2], "unexpected end of data"),
        (lambda tar: b"", "empty"),
        (lambda tar: b"<html>404</html>" * 200, "(truncated|invalid|bad) header|end"),
    ],
)
def test_a_damaged_shard_is_named(root, cut, text):
    path = root / "train" / "shard-002.tar"
    whole = path.read_bytes()
    # tarfile fills the archive up to 10 kB: its end is what comes after the last member
    end = max(i for i in range(0, len(whole), 512) if any(whole[i : i + 512])) + 512
    path.write_bytes(cut(whole[: end + 1024]))
    with pytest.raises(UserError, match=rf"shard-002\.tar must be an intact tar archive.*{text}.*restore it"):
        build_index(root, "train")


def test_an_image_without_a_label_is_named(tmp_path, folders):
    write_shard(tmp_path / "train" / "a.tar", [("x.jpg", Path(folders.absolute(0)).read_bytes())])
    with pytest.raises(UserError, match=r"name the class of each image.*but 1 have none \('x\.jpg'\)"):
        build_index(tmp_path, "train")


def test_labels_are_not_for_shards(root, tmp_path):
    (tmp_path / "labels.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"there are webdataset shards.*leave the label file out"):
        build_index(root, "train", labels=tmp_path / "labels.csv")


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_image_in_a_shard_is_left_out(tmp_path, folders, kind):
    DAMAGE[kind](tmp_path / "bad")
    members = [(f"{i:05d}.jpg", Path(folders.absolute(i)).read_bytes()) for i in range(5)]
    members[2] = ("00002.jpg", (tmp_path / "bad").read_bytes())
    members += [(f"{i:05d}.cls", b"0") for i in range(5)]
    write_shard(tmp_path / "train" / "a.tar", members)
    with pytest.warns(UserWarning, match=r"1 of 5 files in .* cannot be used"):
        found = build_index(tmp_path, "train")
    assert [path for path, _ in found.quarantined] == ["train/a.tar/00002.jpg"]
    assert [path[-9:] for path in found.paths] == ["00000.jpg", "00001.jpg", "00003.jpg", "00004.jpg"]
    for backend in ("dali", "pillow"):
        (batch,) = batches(backend, EvalPlan(found, AUGMENT, 7))
        assert batch.ids.tolist() == [0, 1, 2, 3]
    with pytest.warns(UserWarning, match="cannot be used"):  # nothing is looked at again, and nothing forgotten
        assert build_index(tmp_path, "train").hash == found.hash


@pytest.mark.parametrize("backend", ["dali", "pillow"])
@pytest.mark.parametrize("how", ["cut short", "gone", "rotten"])
def test_a_shard_that_changes_after_the_index(root, how, backend):
    found = build_index(root, "train")
    extent = found.place(8)
    assert extent.path == str(root / "train" / "shard-001.tar")
    whole = bytearray(Path(extent.path).read_bytes())
    if how == "gone":
        Path(extent.path).unlink()
        bad = list(range(7, 14))
    elif how == "cut short":
        os.truncate(extent.path, extent.offset + 100)
        bad = list(range(8, 14))
    else:
        whole[extent.offset : extent.offset + extent.length] = bytes(extent.length)
        Path(extent.path).write_bytes(whole)
        bad = [8]
    said = []
    got = batches(backend, EvalPlan(found, AUGMENT, 6), on_bad=lambda path, why: said.append(path), bad_limit=9)
    assert [i for batch in got for i in batch.ids.tolist()] == [i for i in range(24) if i not in bad]
    assert sorted(said) == [found.absolute(i) for i in bad]


def test_subsets_keep_their_places(root):
    found = build_index(root, "train")
    some = found.subset(per_class=5, seed=1)
    assert len(some) == 10
    for i, path in enumerate(some.paths):
        assert some.place(i) == found.place(list(found.paths).index(path))
