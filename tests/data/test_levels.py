"""Data folders that lie one level too high or too deep, or are called otherwise: refused, with what was meant."""

import os
import shutil
from pathlib import Path

import pytest
from command_line import complaint
from image_tree import photo, write_split

from ijckd_fast.data import Fields, build_index
from ijckd_fast.errors import UserError

CLASSES = ("cat", "dog", "eel")


@pytest.fixture
def root(tmp_path) -> Path:
    for split in ("train", "val"):
        write_split(tmp_path / "outer" / "data", split, dict.fromkeys(CLASSES, 1), size=(8, 8))
    return tmp_path / "outer" / "data"


def deeper(split: Path, *names: str) -> Path:
    """The content of a folder, moved into new folders in it."""
    aside = split.with_name("aside")
    split.rename(aside)
    deep = split.joinpath(*names)
    deep.parent.mkdir(parents=True)
    aside.rename(deep)
    return deep


@pytest.mark.parametrize("names", [("images",), ("Photos",), ("data", "images"), ("a", "b", "c")])
def test_class_folders_too_deep(root, names):
    deep = deeper(root / "train", *names)
    with pytest.raises(UserError) as error:
        build_index(root, "train")
    assert f"found 1 ({names[0]!r}) that does not look like one: did you mean {deep}?" in str(error.value)
    assert f"It holds 3 folders ('cat', 'dog', 'eel'): move them into {root / 'train'}" in str(error.value)
    for name in CLASSES:
        (deep / name).rename(root / "train" / name)
    shutil.rmtree(root / "train" / names[0])
    assert build_index(root, "train").classes == CLASSES


@pytest.mark.parametrize("names", [("images",), ("data", "images")])
def test_val_too_deep(root, names):
    deep = deeper(root / "val", *names)
    with pytest.raises(UserError) as error:
        build_index(root, "val", classes=CLASSES)
    assert "must have the 3 class folders that the training data has, found 1: 3 missing" in str(error.value)
    assert f"did you mean {deep}? It holds 3 folders" in str(error.value)


def test_val_too_deep_without_class_folders(root):
    shutil.rmtree(root / "val")
    (root / "val" / "images").mkdir(parents=True)
    photo(8, 8).save(root / "val" / "images" / "val_0.JPEG")
    with pytest.raises(UserError, match=r"did you mean the images in .*val/images\? Move them into .*--val-labels"):
        build_index(root, "val", classes=CLASSES)


@pytest.mark.parametrize("beside", ["labels", "masks"])
def test_class_folders_too_deep_beside_something_else(root, beside):
    deep = deeper(root / "train", "images")
    (root / "train" / beside).mkdir()
    (root / "train" / beside / ("0.txt" if beside == "labels" else "0.png")).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"found 2 .* that do not look like these: did you mean {deep}\?.*if it is a"):
        build_index(root, "train")


def test_a_class_that_is_called_images_is_one(root):
    (root / "train" / "cat").rename(root / "train" / "images")
    assert build_index(root, "train").classes == ("dog", "eel", "images")
    deeper(root / "train" / "images", "of_one_cat")
    assert build_index(root, "train").classes == ("dog", "eel", "images")
    for name in ("of_another", "of_a_third"):
        (root / "train" / "images" / name).mkdir()
        photo(8, 8).save(root / "train" / "images" / name / "0.jpg")
    photo(8, 8).save(root / "train" / "images" / "0.jpg")
    assert build_index(root, "train").classes == ("dog", "eel", "images")
    (root / "train" / "images" / "0.jpg").unlink()
    with pytest.raises(UserError, match=r"did you mean .*train/images\? .*\(or rename 'images' if it is a class\)"):
        build_index(root, "train")


def test_a_data_folder_in_the_folder_of_a_split(root):
    (root / "inner").mkdir()
    for split in ("train", "val"):
        (root / split).rename(root / "inner" / split)
    (root / "inner").rename(root / "train")
    with pytest.raises(UserError, match=rf"found 2 \('train', 'val'\).*did you mean {root}/train, which holds"):
        build_index(root, "train")
    deeper(root / "train", "imagenet")
    with pytest.raises(UserError, match=rf"did you mean {root}/train/imagenet as the data folder\?"):
        build_index(root, "train")


@pytest.mark.parametrize(
    ("split", "name"),
    [
        ("train", "Train"), ("train", "TRAIN"), ("train", "training"), ("train", "train_images"),
        ("val", "Val"), ("val", "valid"), ("val", "Validation"), ("val", "test"), ("val", "dev"),
    ],
)  # fmt: skip
def test_splits_of_another_name(root, split, name):
    (root / split).rename(root / name)
    with pytest.raises(UserError, match=rf"no folder '{split}'.*did you mean {root}/{name}\? Rename it to '{split}'"):
        build_index(root, split)
    os.symlink(name, root / split)  # as the sentence says
    assert build_index(root, split).classes == CLASSES


def test_a_data_folder_one_level_off(root):
    above = root.parent
    for wrong, meant in ((above, root), (root / "train", root), (above.parent, root), (root / "val", root)):
        with pytest.raises(UserError, match=rf"no folder 'train' .*; did you mean {meant}\?$"):
            build_index(wrong, "train")
    (root / "train").rename(root / "Training")
    with pytest.raises(UserError, match=rf"; did you mean {root}\?$"):
        build_index(above, "train")


def test_class_folders_without_splits(root):
    (root / "train").rename(root.parent / "flowers")
    with pytest.raises(UserError, match=r"if the 3 folders \('cat', 'dog', 'eel'\) are the classes, move them into .*"):
        build_index(root.parent / "flowers", "train")


def test_the_right_data_folder_is_told_nothing(root):
    (root / "train" / "cat" / "images").mkdir()
    (root / "train" / "cat" / "000.jpg").rename(root / "train" / "cat" / "images" / "000.jpg")
    assert build_index(root, "train").classes == CLASSES
    shutil.rmtree(root / "val" / "dog")
    with pytest.raises(UserError, match=r"1 missing \('dog'\); make the names equal$"):
        build_index(root, "val", classes=CLASSES)
    shutil.rmtree(root / "val")
    with pytest.raises(UserError, match=r"holds train/ and val/$"):
        build_index(root, "val")


@pytest.mark.parametrize("name", ["__MACOSX", ".ipynb_checkpoints", "@eaDir", "lost+found"])
def test_folders_of_the_system_are_no_classes_and_hold_no_images(root, name):
    first = build_index(root, "train")
    for folder in (root / "train", root / "train" / "cat"):
        shutil.copytree(root / "val" / "cat", folder / name)
        (folder / name / "._000.jpg").write_bytes(b"x")
    assert build_index(root, "train").hash == first.hash


def test_one_class_is_none(root, capsys):
    for name in ("cat", "eel"):
        shutil.rmtree(root / "train" / name)
    assert len(build_index(root, "train")) == 1
    with pytest.raises(UserError, match=r"at least two classes, but .*train has 1: put one folder of images per class"):
        build_index(root, "train", least_classes=2)
    for command in (["index", str(root)], ["pack", str(root), str(root.parent / "pack")]):
        assert "a classifier needs at least two classes" in complaint(capsys, *command)
    train = ["train", "--data-dir", str(root), "--objective", "ce", "--student", "resnet8x0.25"]
    train += ["--output-dir", str(root.parent / "run")]
    assert "a classifier needs at least two classes" in complaint(capsys, *train)


def test_columns_are_for_files_that_have_some(tmp_path):
    write_split(tmp_path, "train", {"cat": 1, "dog": 1})
    write_split(tmp_path, "val", {"cat": 1, "dog": 1})
    with pytest.raises(UserError, match=r"--label-column would say .* has class folders .*leave the option out"):
        build_index(tmp_path, "train", fields=Fields(label_column="label"))
    assert len(build_index(tmp_path, "val", fields=Fields(label_column="label"))) == 2  # it is train's
