import csv
import io
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from image_tree import photo, write_split

from ijckd_fast.data import build_index
from ijckd_fast.data.sources import read_class_list, read_labels
from ijckd_fast.errors import UserError

CLASSES = ("cat", "dog", "eel")


@pytest.fixture
def root(tmp_path) -> Path:
    """Classes of 2, 3 and 2 images in train, and val as Kaggle has it: six images in one folder."""
    write_split(tmp_path / "data", "train", {"cat": 2, "dog": 3, "eel": 2})
    (tmp_path / "data" / "val").mkdir()
    for i in range(6):
        photo(40, 48, seed=i).save(tmp_path / "data" / "val" / f"V_{i}.JPEG")
    return tmp_path / "data"


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


ROWS = {
    "kaggle": [
        "ImageId,PredictionString",
        *(f"V_{i},{CLASSES[i % 3]} 1 2 30 40 {CLASSES[i % 3]} 0 0 9 9 " for i in (3, 1, 2, 0, 5, 4)),
    ],
    "two columns": ["name,class", *(f"V_{i}.JPEG,{CLASSES[i % 3]}" for i in range(6))],
    "no titles": [f"V_{i}, {CLASSES[i % 3]}" for i in range(6)],
    "spaces": [f"V_{i}.JPEG {CLASSES[i % 3]}" for i in range(6)] + [""],
    "tabs": [f"V_{i}\t{CLASSES[i % 3]}" for i in range(6)],
    "tabs or spaces": [f"V_{i}{' ' if i else chr(9)} {CLASSES[i % 3]}" for i in range(6)],
    "quoted kaggle": [
        '"ImageId","PredictionString"',
        *(f'"V_{i}","{CLASSES[i % 3]} 1 2 30 40 {CLASSES[i % 3]} 0 0 9 9 "' for i in range(6)),
    ],
    "quotes and spaces": [f'"V_{i}.JPEG" "{CLASSES[i % 3]}"' for i in range(6)],
    "semicolons": ["Filename;Label", *(f"V_{i}.JPEG;{CLASSES[i % 3]}" for i in range(6))],
    "tabs and titles": ["file_name\tclass name", *(f"V_{i}.JPEG\t{CLASSES[i % 3]}" for i in range(6))],
    "class first": ["label,image", *(f"{CLASSES[i % 3]}, V_{i}.JPEG" for i in range(6))],
    "more columns": ["id,filename,width,breed", *(f"{i},V_{i}.JPEG,48,{CLASSES[i % 3]}" for i in range(6))],
    "pandas index": [",image_id,class", *(f"{i},V_{i},{CLASSES[i % 3]}" for i in range(6))],
}


@pytest.mark.parametrize("form", ROWS)
def test_flat_validation_folder(root, form, tmp_path):
    labels = write(tmp_path / "labels", *ROWS[form])
    for _ in range(2):
        found = build_index(root, "val", classes=CLASSES, labels=labels)
        assert list(found.paths) == [f"val/V_{i}.JPEG" for i in range(6)]
        assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert found.labels.dtype == np.int64
        assert found.classes == CLASSES
    swapped = build_index(root, "val", classes=("eel", "dog", "cat"), labels=labels)
    assert swapped.labels.tolist() == [2, 1, 0, 2, 1, 0]
    assert swapped.hash != found.hash
    assert build_index(root, "val", labels=labels).hash == found.hash  # its own classes, sorted


def test_a_label_that_changes_is_noticed_without_opening_a_file(root, tmp_path, monkeypatch):
    first = build_index(root, "val", classes=CLASSES, labels=write(tmp_path / "labels", *ROWS["spaces"]))
    changed = [row.replace("V_0.JPEG cat", "V_0.JPEG eel") for row in ROWS["spaces"]]
    monkeypatch.setattr("ijckd_fast.data.index.build.check_image", lambda *_: pytest.fail("opened"))
    found = build_index(root, "val", classes=CLASSES, labels=write(tmp_path / "labels", *changed), trust_folders=True)
    assert found.labels.tolist() == [2, 1, 2, 0, 1, 2]
    assert found.hash != first.hash


def test_a_bad_file_of_a_flat_folder_is_left_out_with_its_label(root, tmp_path):
    (root / "val" / "V_1.JPEG").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 of 6 files .*val/V_1\.JPEG: empty file"):
        found = build_index(root, "val", classes=CLASSES, labels=write(tmp_path / "labels", *ROWS["kaggle"]))
    assert found.labels.tolist() == [0, 2, 0, 1, 2]
    (root / "val" / "V_4.JPEG").write_bytes(b"")
    with pytest.raises(UserError, match=r"'dog' has none: its 2 image files are unreadable"):
        build_index(root, "val", classes=CLASSES, labels=tmp_path / "labels")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            lambda rows: rows[:-1],
            r"labels must name the class of each of the 6 images in .*val, but 1 are not in it \('V_5\.JPEG'\)",
        ),
        (
            lambda rows: [*rows, "V_9,cat", "V_8,dog"],
            r"each of the 8 images that .*labels names, but 2 are not there \('V_9', 'V_8'\)",
        ),
        (
            lambda rows: [*rows, "V_6,cow"],
            r"labels, line 7: 'V_6' has the class 'cow', which is none of the 3 classes .*'cat'",
        ),
        (lambda rows: [*rows, "V_1,eel"], r"'V_1' stands in lines 2 and 7"),
        (lambda rows: ["V_0", *rows[1:]], r"labels, line 1: expected 'name,class'.*LOC_val_solution\.csv, found 'V_0'"),
        (lambda rows: [*rows[:3], "V_3,", *rows[4:]], r"line 4: expected .* found 'V_3,'"),
        (lambda rows: [*rows[:3], "V_3 cat food", *rows[4:]], r"line 4: expected .* found 'V_3 cat food'"),
        (lambda rows: ["ImageId,PredictionString"], "found only column titles"),
        (lambda rows: [""], "found an empty file"),
    ],
)
def test_labels_that_do_not_fit(root, tmp_path, change, error):
    labels = write(tmp_path / "labels", *change(ROWS["no titles"]))
    with pytest.raises(UserError, match=error):
        build_index(root, "val", classes=CLASSES, labels=labels)


def test_label_files_of_windows_and_names_that_are_not_utf8(tmp_path):
    (tmp_path / "labels").write_bytes(b"\xef\xbb\xbfname,class\r\ncaf\xe9,cat\r\n")
    assert {name: label.name for name, label in read_labels(tmp_path / "labels").items()} == {
        os.fsdecode(b"caf\xe9"): "cat"
    }


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_names_with_separators_and_quotes_in_them(tmp_path, separator, end):
    said = {"a,b": "sea lion, big", "c;d": "x; y", "e\tf": 'an "odd" one', "g": "5' tall"}
    table = io.StringIO()
    writer = csv.writer(table, delimiter=separator, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("name", "class"), *said.items()])
    (tmp_path / "labels").write_bytes(b"\xef\xbb\xbf" + table.getvalue().encode())
    assert {name: label.name for name, label in read_labels(tmp_path / "labels").items()} == said
    assert [label.line for label in read_labels(tmp_path / "labels").values()] == [2, 3, 4, 5]


def test_another_separator_in_every_class_name(tmp_path):
    for rows, label in (
        (["a\tx, y", "b\tx, y"], "x, y"),
        (["a,\tx", "b,\tx"], "x"),
        (["a;x, y", "b;x, y"], "x, y"),
        (['"a","x; y"', '"b","x; y"'], "x; y"),
        (["a,x y", "b,x y"], "x y"),
        (["a,x 1 2", "b,x 1 2 3"], None),
    ):
        labels = read_labels(write(tmp_path / "labels", *rows))
        assert list(labels) == ["a", "b"]
        assert {found.name for found in labels.values()} == ({label} if label else {"x 1 2", "x 1 2 3"})


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("name,class\na,cat\n".encode("utf-16"), r"in UTF-8, found UTF-16 text .*iconv -f UTF-16"),
        ("a,cat\n".encode("utf-16-le"), r"in UTF-8, found UTF-16 text"),
        (b'a,cat\n"b,dog\nc,eel\n', r"quotes that do not fit, line 3: unexpected end of data"),
        (b'a,cat\n"b"x,dog\n', r"quotes that do not fit, line 2"),
        (b"a,sea lion, big\nb,cat\n", r"found 3 columns in the first row.*write titles above them"),
        (b"b,cat\na,sea lion, big\n", r"line 2: expected .* found 'a,sea lion,big'"),
        (b"name,class,label\na,cat,1\n", r"one with its class, found 'class', 'label' for one of them"),
        (b"name;class\na,cat\n", r"line 2: expected .* found 'a,cat'"),
        (b"a,cat,\nb,cat,\n", r"found 3 columns"),
    ],
)
def test_tables_of_another_form(tmp_path, content, error):
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(UserError, match=error):
        read_labels(tmp_path / "labels")


def test_titles_that_are_not_known(root, tmp_path):
    labels = write(tmp_path / "labels", "foto,klasse", *ROWS["no titles"])
    with pytest.raises(UserError, match=r"line 1: .*; if that line is column titles, write name,class"):
        build_index(root, "val", classes=CLASSES, labels=labels)


def test_labels_in_the_other_unicode_form(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    (tmp_path / "val").mkdir()
    for name in (f"{nfc}1.jpg", f"{nfd}2.jpg", "3.jpg"):
        photo(8, 8).save(tmp_path / "val" / name)
    labels = write(tmp_path / "labels", f"{nfd}1,{nfc}t{nfd}", f"{nfc}2.jpg,{nfc}t{nfc}", f"3,b{nfd}")
    classes = (f"b{nfc}", f"{nfd}t{nfd}")
    with (
        pytest.warns(UserWarning, match=r"2 images in .*val have the names expected in another Unicode form"),
        pytest.warns(UserWarning, match=r"3 classes in .*labels have the names expected in another Unicode form"),
    ):
        found = build_index(tmp_path, "val", classes=classes, labels=labels)
    label = {path: found.classes[i] for path, i in zip(found.paths, found.labels.tolist(), strict=True)}
    assert label == {f"val/{nfc}1.jpg": classes[1], f"val/{nfd}2.jpg": classes[1], "val/3.jpg": classes[0]}
    photo(8, 8).save(tmp_path / "val" / f"{nfd}1.jpg")  # beside that of the other form: each is asked for its own
    write(labels, f"{nfd}1,{classes[0]}", f"{nfc}1,{classes[1]}", f"{nfd}2,{classes[1]}", f"3,{classes[1]}")
    found = build_index(tmp_path, "val", classes=classes, labels=labels)
    assert found.labels[list(found.paths).index(f"val/{nfd}1.jpg")] == 0
    assert found.labels[list(found.paths).index(f"val/{nfc}1.jpg")] == 1


def test_labels_that_only_look_like_the_names(root, tmp_path):
    labels = write(tmp_path / "labels", *(f"V_{i},{'Cat' if i == 0 else CLASSES[i % 3]}" for i in range(6)))
    with pytest.raises(UserError, match=r"has the class 'Cat'.*; did you mean 'cat' by 'Cat'\?"):
        build_index(root, "val", classes=CLASSES, labels=labels)
    write(labels, *(f"{'v' if i == 0 else 'V'}_{i}.JPEG,{CLASSES[i % 3]}" for i in range(6)))
    with pytest.raises(UserError, match=r"1 are not in it .*; did you mean 'V_0\.JPEG' by 'v_0\.JPEG'\?"):
        build_index(root, "val", classes=CLASSES, labels=labels)


def test_a_class_name_with_spaces_needs_a_comma(tmp_path):
    labels = read_labels(write(tmp_path / "labels", "a,sea lion", "b,sea lion 2"))
    assert [label.name for label in labels.values()] == ["sea lion", "sea lion 2"]


def test_labels_for_class_folders_and_none_for_a_flat_folder(root, tmp_path):
    with pytest.raises(UserError, match=r"6 image files and no class folder; sort them .*--val-labels"):
        build_index(root, "val", classes=CLASSES)
    with pytest.raises(UserError, match=r"there are class folders \('cat', 'dog', 'eel'\).*leave the label file out"):
        build_index(root, "train", labels=write(tmp_path / "labels", *ROWS["spaces"]))
    with pytest.raises(UserError, match=r"nowhere: expected a text file.*No such file or directory"):
        build_index(root, "val", labels=tmp_path / "nowhere")


# --- the class list ---------------------------------------------------------------------------------------------------


def test_class_list_pins_the_order(root, tmp_path):
    found = build_index(root, "train", class_list=write(tmp_path / "classes.txt", "eel", "cat ", "", "dog"))
    assert found.classes == ("eel", "cat", "dog")
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert found.paths[0] == "train/eel/000.jpg"
    assert found.hash != build_index(root, "train").hash


def test_class_lists_that_do_not_fit(root, tmp_path):
    path = tmp_path / "classes.txt"
    for lines, error in (
        (["cat", "dog"], r"the 2 class folders that .*classes\.txt lists, found 3: 1 unexpected \('eel'\)"),
        ([*CLASSES, "fox", "gnu"], r"found 3: 2 missing \('fox', 'gnu'\)"),
        ([*CLASSES, "cat"], r"classes\.txt: class 'cat' stands in lines 1 and 4"),
        ([""], "expected one class folder name in a line, found an empty file"),
    ):
        with pytest.raises(UserError, match=error):
            build_index(root, "train", class_list=write(path, *lines))
    with pytest.raises(UserError, match="No such file"):
        read_class_list(tmp_path / "nowhere")


def test_val_follows_the_class_list_of_train(root, tmp_path):
    shutil.rmtree(root / "val")
    write_split(root, "val", {"cat": 1, "dog": 2, "eel": 1})
    train = build_index(root, "train", class_list=write(tmp_path / "classes.txt", "eel", "cat", "dog"))
    val = build_index(root, "val", classes=train.classes)
    assert (val.classes, val.labels.tolist()) == (train.classes, [0, 1, 2, 2])
