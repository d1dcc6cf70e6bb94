"""Webdataset archives as they are downloaded: which files are a split's, by an info file or by their names."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from hub_shards import read_info, sample, write_hub, write_info, write_shard
from image_tree import write_split
from loading import AUGMENT, EXECUTORS, batches

from ijckd_fast.data import DataFolder, EvalPlan, TrainPlan, build_index
from ijckd_fast.data.index import scan
from ijckd_fast.data.prepare import JpegPack, pack, packing
from ijckd_fast.data.prepare.pack_shards import make_shards
from ijckd_fast.data.sources.splits import split_of
from ijckd_fast.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(train, val): 18 and 6 images of four shapes in two classes."""
    root = tmp_path_factory.mktemp("folders")
    write_split(root, "train", {"cat": 9, "dog": 9})
    write_split(root, "val", {"cat": 3, "dog": 3})
    return build_index(root, "train"), build_index(root, "val")


@pytest.fixture
def root(tmp_path, folders):
    return write_hub(tmp_path / "hub", folders)


def both(root, **how):
    return [found.index for found in DataFolder(root).scans(**how)]


@pytest.mark.parametrize("backend", EXECUTORS)
def test_batches_equal_those_of_folders(root, folders, backend):
    for packed, index in zip(both(root), folders, strict=True):
        assert packed.classes == ("0", "1")
        np.testing.assert_array_equal(packed.labels, index.labels)
        plans = [(TrainPlan(one, AUGMENT, 6, 3), EvalPlan(one, AUGMENT, 7)) for one in (packed, index)]
        for a, b in zip(*plans, strict=True):
            stop = 5 if isinstance(a, TrainPlan) else None
            for x, y in zip(batches(backend, a, stop=stop), batches(backend, b, stop=stop), strict=True):
                assert torch.equal(x.images, y.images)
                assert torch.equal(x.labels, y.labels)
                assert torch.equal(x.ids, y.ids)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("imagenet1k-train-0000.tar", "train"),
        ("imagenet12k-validation-00.tar", "val"),
        ("Birds_VAL_3.tar", "val"),
        ("train-00000-of-00294.parquet", "train"),
        ("training.000.tar", "train"),
        ("validation12.tar", "val"),
        ("train-station-val-07.tar", "val"),
        ("imagenet-test-000.tar", "test"),
        ("strain-0.tar", None),
        ("valve-0.tar", None),
        ("trainval-00.tar", None),
        ("00000.tar", None),
    ],
)
def test_split_of_a_name(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize("name", ["imagenet1k-{}-{:04d}.tar", "My_{}_set.{}.tar", "{}/a-{}.tar", "{}{:03d}.TAR"])
@pytest.mark.parametrize("by", ["_info.json", "info.json", "names"])
def test_splits_by_info_and_by_names(tmp_path, folders, name, by):
    root = write_hub(tmp_path, folders, name)
    (root / "README.md").write_text("downloaded")
    if by == "names":
        (root / "_info.json").unlink()
    else:
        (root / "_info.json").rename(root / by)
    train, val = (found for found in DataFolder(root).scans())
    assert (len(train.index), len(val.index)) == (18, 6)
    assert train.layout == "webdataset shards"
    assert train.index.shards == tuple(name.format("train", n) for n in range(3))
    if "/" not in name:
        assert [(row.kind, row.files) for row in train.passed_over] == [(".md", 1)]
        assert val.index.folder == f"{root} (val)"
    else:
        assert by != "names" or val.index.folder == f"{root}/validation"
    again = [found.opened for found in DataFolder(root).scans()]
    assert again == [0, 0]


def test_the_order_of_an_info_file_counts(root):
    splits = read_info(root)
    for key in ("filenames", "shard_lengths"):
        splits["train"][key].reverse()
    write_info(root, splits)
    assert build_index(root, "train").shards[0] == "imagenet1k-train-0002.tar"


def test_img2dataset(tmp_path, folders):
    train, _ = folders
    for n in range(2):
        members = [sample(f"{n:05d}{i:04d}", train.place(9 * n + i).read(), n, {"url": "x"}) for i in range(9)]
        members = [member for one in members for member in one if not member[0].endswith(".cls")]
        write_shard(tmp_path / f"{n:05d}.tar", members)
        (tmp_path / f"{n:05d}_stats.json").write_text("{}")
        (tmp_path / f"{n:05d}.parquet").write_bytes(b"?")
    found = scan(tmp_path, "train")
    assert (len(found.index), found.labels_from) == (18, "label in KEY.json")
    assert {row.kind: row.files for row in found.passed_over} == {".json": 2, ".parquet": 2}
    with pytest.raises(UserError, match=r"has no folder 'val' .*--val-dir DIR, .*--val-fraction 0\.02"):
        build_index(tmp_path, "val")


def test_validation_is_val(tmp_path, folders):
    root = tmp_path / "data"
    shutil.copytree(folders[0].root, root, ignore=shutil.ignore_patterns(".*"))
    (root / "val").rename(root / "validation")
    found = build_index(root, "val")
    assert (len(found), found.folder, found.paths[0]) == (6, f"{root}/validation", "validation/cat/000.jpg")
    (root / "val").symlink_to("validation")
    assert build_index(root, "val").folder == f"{root}/val"
    (root / "val").unlink()
    (root / "val").mkdir()
    with pytest.raises(UserError, match=rf"in one folder, found {root}/val and {root}/validation, which mean the same"):
        build_index(root, "val")

    flat = tmp_path / "flat"
    for path in sorted((root / "validation").glob("*/*")):
        (flat / "validation").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, flat / "validation" / f"{path.parent.name}{path.name}")
    lines = [f"{path.stem},{path.name[:3]}" for path in (flat / "validation").iterdir()]
    (tmp_path / "labels").write_text("\n".join(lines))
    assert len(build_index(flat, "val", labels=tmp_path / "labels")) == 6


def broken(**changes):
    def apply(root):
        splits = read_info(root)
        splits["train"].update(changes)
        write_info(root, splits)

    return apply


def rename_key(root):
    splits = read_info(root)
    write_info(root, {**splits, "val": splits["validation"]})


def drop_split(root):
    write_info(root, {"train": read_info(root)["train"]})


def shared_file(root):
    splits = read_info(root)
    splits["validation"]["filenames"] = splits["train"]["filenames"][:1]
    write_info(root, splits)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (lambda root: (root / "imagenet1k-train-0001.tar").unlink(), r"names 3 files .*1 of them are not in .*1\.tar"),
        (lambda root: shutil.copy(root / "imagenet1k-train-0001.tar", root / "imagenet1k-train-0003.tar"),
         r"_info\.json names 3 files for the split 'train', but .* has 1 more of it \('imagenet1k-train-0003\.tar'\)"),
        (broken(shard_lengths=[7, 8, 3]), r"says that imagenet1k-train-0001\.tar holds 8 images, but .* has 7"),
        (broken(shard_lengths=[7, 6, 5]), r"says that imagenet1k-train-0001\.tar holds 6 images, but .* has 7"),
        (broken(shard_lengths=[7, 7]), "found 3 filenames and 2 shard_lengths"),
        (broken(num_samples=19), "sum of shard_lengths, found 19 and 18"),
        (broken(num_samples=20, shard_lengths=None), r"'train' has 20 images, but its 3 archives in .* have 18"),
        (broken(filenames="*.tar"), "filenames to be a list of file names"),
        (lambda root: (root / "_info.json").write_text("{"), r"_info\.json must be JSON"),
        (shared_file, r"found 'imagenet1k-train-0000\.tar' again in the split 'validation'"),
        (rename_key, r"must name each split once, found 'validation' and 'val'"),
    ],
)  # fmt: skip
def test_an_info_file_that_disagrees_with_the_archives(root, fault, text):
    fault(root)
    with pytest.raises(UserError, match=text):
        both(root)


def test_an_info_file_without_a_split_that_is_there(root):
    drop_split(root)
    with pytest.raises(UserError, match=r"names none of val, but .* has 'imagenet1k-validation-0000\.tar'"):
        both(root)


def test_a_split_in_two_places(root, folders):
    shutil.copytree(folders[0].root + "/val", root / "val")
    with pytest.raises(UserError, match=r"there is a folder .*/val, and .*_info\.json names other .*'validation'"):
        both(root)
    shutil.rmtree(root / "val")
    (root / "_info.json").unlink()
    shutil.copy(root / "imagenet1k-validation-0000.tar", root / "imagenet1k-val-0000.tar")
    with pytest.raises(UserError, match=r"found 'imagenet1k-val-0000\.tar' and '.*validation-0000\.tar', which"):
        both(root)


def test_archives_of_no_split_are_counted(root):
    (root / "_info.json").unlink()
    for name in ("imagenet1k-test-0000.tar", "extra.tar"):
        shutil.copy(root / "imagenet1k-train-0001.tar", root / name)
    train, val = DataFolder(root).scans()
    assert [len(found.index) for found in (train, val)] == [18, 6]
    assert [(row.kind, row.files) for row in train.passed_over] == [(".tar", 2)]


def test_an_info_file_of_something_else_is_left_alone(root):
    (root / "_info.json").write_text(json.dumps([1, 2]))
    assert [len(index) for index in both(root)] == [18, 6]


def test_archives_beside_their_class_folders_are_left_alone(tmp_path, folders):
    root = tmp_path / "data"
    shutil.copytree(folders[0].root, root, ignore=shutil.ignore_patterns(".*"))
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "birds-train-00.tar"):
        (root / name).write_bytes(b"?")
    assert [index.shards for index in both(root)] == [(), ()]
    shutil.rmtree(root / "train")
    (root / "birds-train-00.tar").unlink()
    with pytest.raises(UserError, match=r"'ILSVRC2012_img_train\.tar'.* are unpacked by ijckd-fast prepare-imagenet"):
        build_index(root, "train")


# --- where there is no validation split -------------------------------------------------------------------------------


def test_a_fraction_is_held_out(root):
    for path in root.glob("*validation*"):
        path.unlink()
    (root / "_info.json").unlink()
    whole = build_index(root, "train")
    scans = list(DataFolder(root, val_fraction=0.4, val_seed=1).scans())
    train, val = (found.index for found in scans)
    assert set(train.paths) | set(val.paths) == set(whole.paths)
    assert len(train) + len(val) == len(whole)
    assert 0 < len(val) < len(train)
    assert (train.split, val.split, val.classes) == ("train", "val", whole.classes)
    assert len({train.hash, val.hash, whole.hash}) == 3
    for part, found in zip((train, val), scans, strict=True):
        assert found.facts["length"].tolist() == part.members[:, 2].tolist()
        for i, path in enumerate(part.paths):
            assert part.place(i) == whole.place(list(whole.paths).index(path))
    assert DataFolder(root, val_fraction=0.4, val_seed=1).index("val").hash == val.hash
    assert set(DataFolder(root, val_fraction=0.4, val_seed=2).index("val").paths) != set(val.paths)

    # of what is left, what was held out still is: a function of each image, not of the others
    (root / "imagenet1k-train-0001.tar").unlink()
    fewer = DataFolder(root, val_fraction=0.4, val_seed=1).index("val")
    assert set(fewer.paths) == {path for path in val.paths if "0001.tar" not in path}
    # and a larger fraction holds out these and more
    more = whole.held_out(0.6, 1)[1]
    assert set(more.paths) > set(val.paths)


def test_an_archive_that_is_replaced_by_one_of_its_length_and_time(tmp_path, folders):
    size = max(len(folders[0].place(i).read()) for i in range(6))
    images = [folders[0].place(i).read().ljust(size, b"\0") for i in range(6)]
    path, other = tmp_path / "hub" / "a-train-0.tar", tmp_path / "other"
    for where, ids in ((path, (0, 1, 2)), (other, (3, 4, 5))):
        write_shard(where, [member for i, k in enumerate(ids) for member in sample(str(i), images[k], i % 2)])
        os.utime(where, ns=(10**18, 10**18))
    assert scan(path.parent, "train").opened == 3
    os.replace(shutil.copy2(path, tmp_path / "copy"), path)  # the same bytes: what is known of them holds
    assert scan(path.parent, "train", trust_folders=True).opened == 0
    assert other.stat().st_size == path.stat().st_size
    os.replace(other, path)
    found = scan(path.parent, "train", trust_folders=True)
    assert found.opened == 3
    assert [found.index.place(i).read() for i in range(3)] == images[3:]


def test_a_fraction_of_class_folders(folders):
    train, val = (found.index for found in DataFolder(folders[0].root, val_fraction=0.3).scans())
    assert len(train) + len(val) == 18
    assert all(path.startswith("train/") for path in val.paths)
    assert len(val.stamps) == len(val)


def test_fractions_that_cannot_be(folders):
    data = folders[0].root
    for fraction in (0, 1, -0.1, 1.5):
        with pytest.raises(UserError, match=r"--val-fraction must lie between 0 and 1"):
            DataFolder(data, val_fraction=fraction)
    with pytest.raises(UserError, match=r"--val-fraction 1e-09 holds out none of the 18 images"):
        list(DataFolder(data, val_fraction=1e-9).scans())
    with pytest.raises(UserError, match=r"--val-fraction 0\.999 .*leaves no training image of [12] of 2 classes"):
        list(DataFolder(data, val_fraction=0.999).scans())
    with pytest.raises(UserError, match=r"found both, elsewhere and 0\.5; leave one out"):
        DataFolder(data, val_fraction=0.5, val_dir="elsewhere")
    with pytest.raises(UserError, match=r"--val-seed 3 is what --val-fraction draws by"):
        DataFolder(data, val_seed=3)


def test_validation_images_from_another_folder(root, folders, tmp_path):
    for path in [*root.glob("*validation*"), root / "_info.json"]:
        path.unlink()
    (root / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "names").write_text("cat\ndog\n")
    plain = tmp_path / "plain"
    shutil.copytree(folders[0].root + "/val", plain)
    for val_dir in (folders[0].root, plain):
        train, val = (found.index for found in DataFolder(root, val_dir=val_dir, class_list=tmp_path / "names").scans())
        assert (len(train), len(val), val.classes) == (18, 6, ("cat", "dog"))
        assert val.labels.tolist() == folders[1].labels.tolist()
    assert val.folder == str(plain)
    assert val.absolute(0) == f"{plain}/cat/000.jpg"
    with pytest.raises(UserError, match="must have the 2 class folders that the training data has"):
        list(DataFolder(root, val_dir=tmp_path).scans())
    (root / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"in their order are the classes 0 to 1, name them, .* by --class-list FILE"):
        list(DataFolder(root, val_dir=plain).scans())
    for val_dir, text in (
        (root, "has no folder 'val'"),  # its archives are of train by their names
        (tmp_path / "nowhere", "--val-dir must be a data folder .* is not a folder"),
    ):
        with pytest.raises(UserError, match=text):
            list(DataFolder(root, val_dir=val_dir).scans())


def test_a_pack_of_archives_has_their_bytes(root, folders, tmp_path):
    """Training images are small enough: copied, as validation images always are."""
    rows = pack(root, tmp_path / "out", JpegPack(shard_images=10), workers=1)
    assert [(row["images"], row["copy_images"], row["left_out"]) for row in rows] == [(18, 18, []), (6, 6, [])]
    for packed, index in zip(both(tmp_path / "out"), folders, strict=True):
        assert packed.labels.tolist() == index.labels.tolist()
        assert [packed.place(i).read() for i in range(len(index))] == [index.place(i).read() for i in range(len(index))]
    with pytest.raises(UserError, match="found shards already that pack has made in"):
        pack(tmp_path / "out", tmp_path / "again", JpegPack(), workers=1)
    held_out = DataFolder(root, val_fraction=0.4, val_seed=1)
    rows = pack(held_out, tmp_path / "parts", JpegPack(), workers=1)
    assert [row["images"] for row in rows] == [len(found.index) for found in held_out.scans()]


def test_an_archive_that_changed_is_left_out_of_a_pack(root, tmp_path):
    index = build_index(root, "train")
    place = index.place(3)
    shard = bytearray((root / "imagenet1k-train-0000.tar").read_bytes())
    shard[place.offset + 100 : place.offset + 104] = b"\0\1\2\3"
    said = []

    def spoil(*args, **how):
        (root / "imagenet1k-train-0000.tar").write_bytes(shard)
        return make_shards(*args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "make_shards", spoil)
        pack(root, tmp_path / "out", JpegPack(), splits=["train"], workers=1, on_bad=lambda *bad: said.append(bad))
    assert [path for path, _ in said] == [index.absolute(3)]
    assert "other CRC-32" in said[0][1]
