"""Webdataset shards: the same images in the same batches as from folders, whatever becomes of the archives."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hub_shards import write_shard
from image_tree import DAMAGE, write_split
from loading import AUGMENT, assert_same_batches, batches

from ijckd_fast.data import EvalPlan, build_index
from ijckd_fast.data.index import build, scan
from ijckd_fast.data.sources import listing, shards
from ijckd_fast.errors import UserError


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
    assert_same_batches(backend, packed, folders)


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
    monkeypatch.setattr(build, "check_image", lambda place, *more: opened.append(place) or check(place, *more))
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


# --- names of members, and members that are links ---------------------------------------------------------------------


def write_members(path: Path, members: Iterable[tuple], format: int = tarfile.PAX_FORMAT) -> None:
    """(name, content) of files, (name, type, name of what it leads to) of links."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, *what in members:
            member = tarfile.TarInfo(name)
            if len(what) == 1:
                member.size = len(what[0])
                archive.addfile(member, io.BytesIO(what[0]))
            else:
                member.type, member.linkname = what
                archive.addfile(member)


def jpegs(folders, n: int) -> list[bytes]:
    return [Path(folders.absolute(i)).read_bytes() for i in range(n)]


def seen(root: Path) -> dict[str, tuple[str, bytes]]:
    """Of each image in train: its class, and its bytes as an executor reads them."""
    found = build_index(root, "train")
    names = [path.split(".tar/", 1)[1] for path in found.paths]
    label = [found.classes[label] for label in found.labels]
    return {name: (label[i], found.place(i).read()) for i, name in enumerate(names)}


def test_keys_with_dots_where_classes_come_from_folders(tmp_path, folders):
    data = jpegs(folders, 5)
    names = ["a/photo.0.jpg", "a/photo.1.jpg", "a/photo.jpg", "b/2024.01.01/x.jpg", "b/2024.01.01/x.seg.png"]
    write_members(tmp_path / "train" / "0.tar", zip(names, data, strict=True))
    labels = ["a", "a", "a", "2024.01.01", "2024.01.01"]
    assert seen(tmp_path) == dict(zip(names, zip(labels, data, strict=True), strict=True))


def test_keys_with_dots_and_labels_of_their_own(tmp_path, folders):
    data = jpegs(folders, 4)
    members = [(f"photo.{i}.jpg", data[i]) for i in range(3)] + [(f"photo.{i}.cls", b"%d" % i) for i in range(3)]
    members += [("x.CLS", b"1"), ("x.large.jpg", data[3])]  # by the key, as webdataset has it
    write_members(tmp_path / "train" / "0.tar", members)
    expected = {f"photo.{i}.jpg": (str(i), data[i]) for i in range(3)}
    assert seen(tmp_path) == {**expected, "x.large.jpg": ("1", data[3])}


def test_one_label_for_two_images(tmp_path, folders):
    one, two = jpegs(folders, 2)
    write_members(tmp_path / "train" / "0.tar", [("p.0.jpg", one), ("p.1.jpg", two), ("p.cls", b"0")])
    with pytest.raises(UserError, match=r"one image for each key, found 'p\.0\.jpg' and 'p\.1\.jpg' with 'p\.cls'"):
        build_index(tmp_path, "train")
    write_members(tmp_path / "train" / "0.tar", [("a/0.jpg", one), ("a/1.jpg", two), ("a/0.cls", b"0")])
    with pytest.raises(UserError, match=r"in a member KEY\.cls beside it, but 1 have none \('a/1\.jpg'\)"):
        build_index(tmp_path, "train")


def test_links_lead_to_members(tmp_path, folders):
    one, two, three = jpegs(folders, 3)
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    write_members(
        tmp_path / "train" / "0.tar",
        [
            ("./a/one.jpg", one),
            ("./a/.store/two", two),
            ("./a/later.jpg", soft, "../b/three.jpg"),  # what comes later
            ("./b/hard.jpg", hard, "./a/one.jpg"),
            ("./b/soft.jpg", soft, "../a/one.jpg"),
            ("./b/two.jpg", soft, "../a/.store/two"),
            ("./b/twice.jpg", soft, "soft.jpg"),
            ("./b/three.jpg", three),
        ],
    )
    assert seen(tmp_path) == {
        "./a/one.jpg": ("a", one),
        "./a/later.jpg": ("a", three),
        "./b/hard.jpg": ("b", one),
        "./b/soft.jpg": ("b", one),
        "./b/two.jpg": ("b", two),
        "./b/twice.jpg": ("b", one),
        "./b/three.jpg": ("b", three),
    }
    assert scan(tmp_path, "train").passed_over == []


def test_labels_that_are_links(tmp_path, folders):
    one, two, three = jpegs(folders, 3)
    members = [("0.jpg", one), ("0.cls", b"4"), ("1.jpg", two), ("1.cls", tarfile.LNKTYPE, "0.cls")]
    members += [("2.jpg", three), ("2.cls", tarfile.SYMTYPE, "two.txt"), ("two.txt", b"2\n")]
    write_members(tmp_path / "train" / "0.tar", members)
    (tmp_path / "classes.txt").write_bytes(b"".join(b"n%d\r\n" % i for i in range(5)))
    with pytest.raises(UserError, match="'n0' and 2 other classes has none"):
        build_index(tmp_path, "train")
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(UserError, match="'0' and 2 other classes has none"):
        build_index(tmp_path, "train")
    write_shard(tmp_path / "train" / "1.tar", [m for i in "013" for m in ((f"{i}.jpg", one), (f"{i}.cls", i.encode()))])
    assert {name: label for name, (label, _) in seen(tmp_path).items()} == {"0.jpg": "0", "1.jpg": "1", "2.jpg": "2",
                                                                           "3.jpg": "3"}  # fmt: skip


def test_links_that_lead_to_no_member_are_counted(tmp_path, folders):
    one, two = jpegs(folders, 2)
    soft = tarfile.SYMTYPE
    members = [("a/0.jpg", one), ("b/0.jpg", two), ("a/1.jpg", soft, "../../0.jpg"), ("a/2.jpg", soft, "/a/0.jpg")]
    members += [("a/3.jpg", soft, "4.jpg"), ("a/4.jpg", soft, "3.jpg"), ("a/5.jpg", tarfile.LNKTYPE, "a/gone.jpg")]
    members += [("c", soft, "a")]
    write_members(tmp_path / "train" / "0.tar", members)
    with pytest.warns(UserWarning, match=r"6 with links that lead to no member, e\.g\. train/0\.tar/a/1\.jpg"):
        found = scan(tmp_path, "train")
    assert found.passed_over == [("links that lead to no member", 6, 6, "train/0.tar/a/1.jpg")]
    assert list(found.index.paths) == ["train/0.tar/a/0.jpg", "train/0.tar/b/0.jpg"]


def test_the_last_member_of_a_name_has_it(tmp_path, folders):
    one, two, three = jpegs(folders, 3)
    members = [("a/0.jpg", one), ("b/0.jpg", tarfile.LNKTYPE, "a/0.jpg"), ("b/1.jpg", three)]
    members += [("a/0.jpg", tarfile.LNKTYPE, "a/0.jpg"), ("./a/0.jpg", two)]
    write_members(tmp_path / "train" / "0.tar", members)
    assert seen(tmp_path) == {"b/0.jpg": ("b", one), "b/1.jpg": ("b", three), "./a/0.jpg": ("a", two)}
    assert list(seen(tmp_path)) == ["b/0.jpg", "b/1.jpg", "./a/0.jpg"]  # where their bytes lie
    assert scan(tmp_path, "train").passed_over == [("later members of the same name", 1, 0, "train/0.tar/a/0.jpg")]
    (tmp_path / "unpacked").mkdir()  # as tar itself has it
    subprocess.run(["tar", "-xf", tmp_path / "train" / "0.tar", "-C", tmp_path / "unpacked"], check=True)
    assert (tmp_path / "unpacked" / "a" / "0.jpg").read_bytes() == two
    assert (tmp_path / "unpacked" / "b" / "0.jpg").read_bytes() == one


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_are_long_absolute_or_of_folders(tmp_path, folders, format):
    one, two, three = jpegs(folders, 3)
    long = "/".join(["a" * 60] * (2 if format == tarfile.USTAR_FORMAT else 5))
    name = "é" * (10 if format == tarfile.USTAR_FORMAT else 120) + ".jpg"
    members = [(f"{long}/{name}", one), ("/b/0.jpg", two), ("../c/0.jpg", three), ("c/x.jpg", tarfile.DIRTYPE, "")]
    members += [("__MACOSX/b/._0.jpg", b"?"), ("b/@eaDir/0.jpg", one), ("b/.thumbs/0.jpg", one)]
    write_members(tmp_path / "train" / "0.tar", members, format)
    expected = {f"{long}/{name}": ("a" * 60, one), "/b/0.jpg": ("b", two), "../c/0.jpg": ("c", three)}
    assert seen(tmp_path) == expected


def test_members_passed_over_are_counted(tmp_path, folders):
    one, two = jpegs(folders, 2)
    members = [("a/0.jpg", one), ("b/0.jfif", two), ("a/0.json", b"{}"), ("b/0.json", b"{}"), ("b/1", one)]
    members += [("b/2.gif", b"GIF89a"), ("b/empty", b""), ("b/3.jpg_large", two)]
    write_members(tmp_path / "train" / "0.tar", members)
    (tmp_path / "train" / "sizes.json").write_text("{}")
    for _ in range(2):  # fresh and from the index
        with pytest.warns(UserWarning, match="3 files in .*train are images or look like them"):
            found = scan(tmp_path, "train")
        assert len(found.index) == 2
        counts = {row.kind: (row.files, row.images) for row in found.passed_over}
        assert counts == {"no extension": (2, 1), ".gif": (1, 1), ".jpg_large": (1, 1), ".json": (3, 0)}


def test_sparse_members_are_counted(tmp_path, folders):
    one, two = jpegs(folders, 2)
    write_members(tmp_path / "train" / "0.tar", [("a/0.jpg", one), ("b/0.jpg", two)])
    path = tmp_path / "hole.jpg"
    with open(path, "wb") as file:
        file.write(one)
        file.truncate(1 << 20)
        file.seek(1 << 20)
        file.write(two)
    command = ["tar", "--sparse", "--hole-detection=raw", "--transform", "s,^,a/,", "-C", tmp_path, "hole.jpg"]
    subprocess.run([*command, "-cf", tmp_path / "train" / "1.tar"], check=True)
    with pytest.warns(UserWarning, match="1 with sparse members"):
        assert len(build_index(tmp_path, "train")) == 2


def test_an_archive_behind_another_is_refused(tmp_path, folders):
    one, two = jpegs(folders, 2)
    for name, data in (("a", one), ("b", two)):
        write_members(tmp_path / f"{name}.tar", [(f"{name}/0.jpg", data), (f"{name}/1.jpg", data)])
    (tmp_path / "train").mkdir()
    joined = tmp_path / "train" / "0.tar"
    joined.write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    with pytest.raises(UserError, match=r"one tar archive, found another one behind its end.*'b/0\.jpg'.*ignore-zeros"):
        build_index(tmp_path, "train")
    joined.write_bytes((tmp_path / "a.tar").read_bytes() + b"what no reader of tar looks at" * 50)
    assert len(build_index(tmp_path, "train")) == 2


@pytest.mark.parametrize("name", ["1.tar.gz", "1.TGZ", "1.tar.zst"])
def test_a_compressed_shard_is_not_passed_over(root, name):
    (root / "train" / name).write_bytes(gzip.compress((root / "train" / "shard-000.tar").read_bytes()))
    with pytest.raises(UserError, match=rf"{name} must be an intact tar archive without compression"):
        build_index(root, "train")


def test_class_names_in_the_other_unicode_form(tmp_path, folders):
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    one, two = jpegs(folders, 2)
    write_members(tmp_path / "train" / "0.tar", [(f"{nfd}/0.jpg", one), ("b/0.jpg", two)])
    for known in (["classes.txt"], []):
        (tmp_path / "classes.txt").write_text(f"b\n{nfc}\n")
        if not known:
            (tmp_path / "classes.txt").unlink()
        with pytest.warns(UserWarning, match="1 classes in the shards in .* in another Unicode form"):
            found = build_index(tmp_path, "train", classes=None if known else ("b", nfc))
        assert (found.classes, found.labels.tolist()) == (("b", nfc), [1, 0])
    with pytest.raises(UserError, match=r"none of the 2 classes .*; did you mean 'B' by 'b'\?"):
        build_index(tmp_path, "train", classes=("B", nfd))
    write_members(tmp_path / "train" / "1.tar", [(f"{nfc}/0.jpg", one)])
    with pytest.raises(UserError, match=r"the class names in the shards in .* must differ in what can be seen"):
        build_index(tmp_path, "train")
