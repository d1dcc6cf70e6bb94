"""Parquet files with images: the same images in the same batches as from folders, whatever way they are written."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from image_tree import DAMAGE, write_split
from loading import AUGMENT, EXECUTORS, assert_same_batches, batches
from parquet_files import features, files_of, images_column, write_rows, write_table

from ijckd_fast.data import EvalPlan, Fields, build_index
from ijckd_fast.data.index import build, scan
from ijckd_fast.data.sources import listing, parquet as parquet_source
from ijckd_fast.data.sources.parquet_columns import open_file
from ijckd_fast.data.sources.parquet_pages import Chunk, find_values
from ijckd_fast.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """24 images of four shapes in two classes."""
    root = tmp_path_factory.mktemp("folders")
    write_split(root, "train", {"cat": 12, "dog": 12})
    return build_index(root, "train")


@pytest.fixture(scope="module")
def images(folders) -> list[bytes]:
    return [Path(folders.absolute(i)).read_bytes() for i in range(len(folders))]


@pytest.fixture
def root(tmp_path, folders) -> Path:
    files_of(tmp_path, folders)
    return tmp_path


# --- where the values lie ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("kind", ["binary", "large", "struct", "null structs", "required"])
def test_values_are_found_where_pyarrow_reads_them(tmp_path, version, kind):
    rng = np.random.default_rng(0)
    settings = itertools.product((0, 1, 120), (False, True), (300, 1 << 20), (7, 1000), (False, True))
    for n, dictionary, page, group, repeated in settings:
        values = [rng.bytes(int(size)) for size in rng.integers(0, 400, n)]
        values = [values[i % 5] for i in range(n)] if repeated else values
        if kind not in ("required", "struct"):
            values = [None if i % 5 == 3 else value for i, value in enumerate(values)]
        if "struct" in kind:
            column = images_column(values)
        else:
            column = pa.array(values, pa.large_binary() if kind == "large" else pa.binary())
        path = tmp_path / "a.parquet"
        schema = pa.schema([pa.field("image", column.type, nullable=kind != "required")])
        how = {"use_dictionary": dictionary, "data_page_size": page, "row_group_size": group}
        pa.parquet.write_table(pa.table([column], schema), path, compression="none", data_page_version=version, **how)
        with open_file(path) as file, open(path, "rb") as raw:
            found = []
            for number in range(file.num_row_groups):
                chunk = file.metadata.row_group(number).column(0)
                if chunk.num_values:
                    first = min(at for at in (chunk.dictionary_page_offset, chunk.data_page_offset) if at)
                    levels = file.schema.column(0).max_definition_level
                    where = Chunk(first, chunk.total_compressed_size, chunk.num_values, levels)
                    places = find_values(raw.fileno(), where)
                    for offset, length in zip(places.offsets.tolist(), places.lengths.tolist(), strict=True):
                        found.append(None if offset < 0 else os.pread(raw.fileno(), length, offset))
        assert found == values


# --- batches ----------------------------------------------------------------------------------------------------------


WAYS = {
    "as stored": {},
    "pages of version 2": {"data_page_version": "2.0", "data_page_size": 2000},
    "dictionary": {"use_dictionary": True, "row_group_size": 4},
}


@pytest.mark.parametrize("backend", EXECUTORS)
@pytest.mark.parametrize("way", WAYS)
def test_batches_equal_those_of_folders(tmp_path, folders, way, backend):
    files_of(tmp_path, folders, **WAYS[way])
    found = build_index(tmp_path, "train")
    assert found.shards == tuple(f"data/train-0000{i}-of-00003.parquet" for i in range(3))
    assert found.classes == folders.classes
    assert found.paths[10] == "data/train-00001-of-00003.parquet/image.bytes[1]"
    np.testing.assert_array_equal(found.labels, folders.labels)
    np.testing.assert_array_equal(found.sizes, folders.sizes)
    assert_same_batches(backend, found, folders)


LAYOUTS = [
    "data/{split}-{i:05d}-of-{n:05d}.parquet",
    "{split}-{i:05d}-of-{n:05d}.parquet",
    "{split}/{i:04d}.parquet",
    "data/{split}-{i:05d}-of-{n:05d}-0123456789abcdef.parquet",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_hub(tmp_path, folders, layout):
    files_of(tmp_path, folders, layout)
    write_split(tmp_path / "other", "val", {"cat": 2, "dog": 3})
    files_of(tmp_path, build_index(tmp_path / "other", "val"), layout, per_file=2)
    assert len(build_index(tmp_path, "train")) == 24
    val = build_index(tmp_path, "val", classes=folders.classes)
    assert val.labels.tolist() == [0, 0, 1, 1, 1]
    assert len(val.shards) == 3


# --- columns ----------------------------------------------------------------------------------------------------------


def one_file(tmp_path: Path, columns: dict, about: dict | None = None, **how) -> Path:
    write_table(tmp_path / "train.parquet", columns, about, **how)
    return tmp_path


LABELS = [0, 1, 1, 2]
BINARY = {
    "binary": lambda images: pa.array(images, pa.binary()),
    "large": lambda images: pa.array(images, pa.large_binary()),
    "struct of large": lambda images: images_column(images, pa.large_binary()),
    "dictionary": lambda images: pa.array(images, pa.binary()).dictionary_encode(),
}


@pytest.mark.parametrize("kind", BINARY)
def test_columns_of_images(tmp_path, images, kind):
    four = images[:4]
    root = one_file(tmp_path, {"x": BINARY[kind](four), "label": LABELS})
    found = build_index(root, "train")
    assert [found.place(i).read() for i in range(4)] == four
    assert found.labels.tolist() == LABELS


@pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "uint64", "dictionary of numbers"])
def test_columns_of_numbers(tmp_path, images, kind):
    numbers = pa.array(LABELS, getattr(pa, kind)() if hasattr(pa, kind) else pa.int64())
    numbers = numbers.dictionary_encode() if kind.startswith("dictionary") else numbers
    root = one_file(tmp_path, {"image": images_column(images[:4]), "label": numbers})
    found = build_index(root, "train")
    assert (found.labels.tolist(), found.classes) == (LABELS, ("0", "1", "2"))
    (root / "classes.txt").write_text("ape\nbee\ncow\n")
    assert build_index(root, "train").classes == ("ape", "bee", "cow")


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary of strings"])
def test_strings_are_class_names_and_sorted(tmp_path, images, kind):
    words = pa.array(["7", "dog", "12", "7"], pa.large_string() if kind == "large_string" else pa.string())
    words = words.dictionary_encode() if kind.startswith("dictionary") else words
    root = one_file(tmp_path, {"image": images_column(images[:4]), "label": words})
    found = build_index(root, "train")
    assert (found.classes, found.labels.tolist()) == (("12", "7", "dog"), [1, 2, 0, 1])
    with pytest.raises(UserError, match=r"has the class '12', which is none of the 2 classes .*--class-list"):
        build_index(root, "train", classes=("7", "dog"))


def test_booleans_are_two_classes(tmp_path, images):
    root = one_file(tmp_path, {"image": images_column(images[:3]), "is_target": pa.array([True, False, True])})
    found = build_index(root, "train")
    assert (found.classes, found.labels.tolist()) == (("false", "true"), [1, 0, 1])


def test_nested_columns_by_dotted_names(tmp_path, images, monkeypatch):
    monkeypatch.setattr(listing, "SETTLED_NS", 0)  # so that the kept index is believed as far as it goes
    rows = [
        {"a": {"picture": {"bytes": image, "path": None}, "kind": i % 2}, "n": i} for i, image in enumerate(images[:4])
    ]
    root = one_file(tmp_path, {"sample": pa.array([row["a"] for row in rows]), "n": [row["n"] for row in rows]})
    found = build_index(root, "train", fields=Fields(image_column="sample.picture", label_column="sample.kind"))
    assert [found.place(i).read() for i in range(4)] == images[:4]
    assert found.labels.tolist() == [0, 1, 0, 1]
    assert found.paths[3] == "train.parquet/sample.picture.bytes[3]"
    other = build_index(root, "train", fields=Fields(label_column="n"))  # asks for another column than the kept index
    assert other.labels.tolist() == [0, 1, 2, 3]


def test_columns_whose_names_have_dots(tmp_path, images):
    columns = {"a.b": pa.array(images[:2], pa.binary()), "c": pa.array([{"x": 1}] * 2), "the.label": [0, 1]}
    found = build_index(one_file(tmp_path, columns), "train")
    assert [found.place(i).read() for i in range(2)] == images[:2]
    assert found.labels.tolist() == [0, 1]


def test_features_decide_where_the_schema_leaves_a_choice(tmp_path, images):
    two = images[:2]
    columns = {"image": images_column(two), "mask": images_column(two), "label": [0, 1], "label_text": ["a", "b"]}
    about = features(["cat", "dog"], mask={"dtype": "binary", "_type": "Value"})
    found = build_index(one_file(tmp_path, columns, about), "train")
    assert (found.classes, found.labels.tolist()) == (("cat", "dog"), [0, 1])
    one_file(tmp_path, columns)
    with pytest.raises(UserError, match=r"found 2 \('image', 'mask'\) among image: struct<.*--image-column image"):
        build_index(tmp_path, "train")
    with pytest.raises(
        UserError, match=r"found 2 \('label', 'label_text'\).*name the one that is meant by --label-column"
    ):
        build_index(tmp_path, "train", fields=Fields(image_column="image"))


@pytest.mark.parametrize(
    ("columns", "fields", "text"),
    [
        (
            {"label": [0]},
            {},
            r"train\.parquet must .*holds bytes of image files .* found label: int64; name the column by",
        ),
        ({"image": pa.array([[b"x"]]), "label": [0]}, {}, r"found image: list<.*: binary>, label: int64"),
        ({"image": pa.array([b"x"])}, {}, r"holds labels \(integers or strings\), found image: binary"),
        ({"image": pa.array([b"x"]), "label": pa.array([[1]])}, {}, r"holds labels .* label: list<"),
        ({"image": pa.array([b"x"]), "label": [0.5]}, {}, r"holds labels .* label: double"),
        ({"image": pa.array([b"x"]), "a": [0], "b": [1]}, {}, r"found 2 \('a', 'b'\) among image: binary, a: int64, b"),
        (
            {"image": pa.array([b"x"]), "label": [0]},
            {"image_column": "img"},
            r"--image-column img .*train\.parquet .*found no such column",
        ),
        (
            {"image": pa.array([b"x"]), "label": [0]},
            {"image_column": "label"},
            r"found int64; its columns are image: bin",
        ),
        ({"image": pa.array([b"x"]), "label": [0]}, {"label_column": "image"}, r"--label-column image .*found binary"),
    ],
)
def test_columns_that_are_not_there(tmp_path, columns, fields, text):
    with pytest.raises(UserError, match=text):
        build_index(one_file(tmp_path, columns), "train", fields=Fields(**fields))


# --- classes and labels -----------------------------------------------------------------------------------------------


def test_class_names_are_the_schemas(root, folders, tmp_path_factory):
    assert build_index(root, "train", classes=("dog", "cat")).labels.tolist() == [1] * 12 + [0] * 12
    with pytest.warns(UserWarning, match="called otherwise than those expected .*by their numbers, 0 to 1"):
        assert build_index(root, "train", classes=("n01", "n02")).labels.tolist() == [0] * 12 + [1] * 12
    with pytest.raises(UserError, match="has the class 'dog', which is none of the 2 classes"):
        build_index(root, "train", classes=("cat", "eel"))


def test_negative_labels_are_skipped_and_counted(tmp_path, images):
    labels = [0, -1, 1, -1, 0]
    write_rows(tmp_path / "train.parquet", images[:5], labels, ["cat", "dog"])
    found = scan(tmp_path, "train")
    assert found.index.labels.tolist() == [0, 1, 0]
    assert [found.index.place(i).read() for i in range(3)] == [images[0], images[2], images[4]]
    assert found.index.paths[1] == "train.parquet/image.bytes[2]"
    assert found.index.skipped == 2
    write_rows(tmp_path / "train.parquet", images[:3], [-1] * 3, ["cat", "dog"])
    with pytest.raises(
        UserError, match="found 3 images whose labels in label are all negative, as those of a test split"
    ):
        build_index(tmp_path, "train")


def test_labels_that_are_no_class(tmp_path, images):
    write_rows(tmp_path / "train.parquet", images[:5], [0, 1, 1, 7, 0], ["cat", "dog"])
    with pytest.raises(UserError, match=r"labels from 0 to 1, .*found 7 in row 3 of label.*--label-column"):
        build_index(tmp_path, "train")
    one_file(tmp_path, {"image": images_column(images[:3]), "label": pa.array([0, None, 1])})
    with pytest.raises(UserError, match="a value of label in each row, found null in row 1; remove these rows"):
        build_index(tmp_path, "train")
    one_file(tmp_path, {"image": images_column(images[:3]), "label": ["a", "", "b"]})
    with pytest.raises(UserError, match="name the class in each row, found '' in row 1 and 0 others"):
        build_index(tmp_path, "train")


@pytest.mark.parametrize("how", [{}, {"compression": "snappy"}], ids=["as stored", "compressed"])
def test_images_that_are_null(tmp_path, images, how):
    some = [images[0], None, images[2], None, images[4]]
    one_file(tmp_path, {"image": images_column(some), "label": [0] * 5}, row_group_size=2, **how)
    with pytest.raises(UserError, match=r"a value of image\.bytes in each row, found null in row (1 and 1 others|1); "):
        build_index(tmp_path, "train")
    one_file(tmp_path, {"image": images_column([None] * 3), "label": [0] * 3}, **how)
    with pytest.raises(
        UserError, match="found null in row 0 and 2 others; write the file with the images' bytes in it"
    ):
        build_index(tmp_path, "train")


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: b"<html>404</html>" * 20,
        lambda data: b"PAR1" + bytes(len(data) // 2) + data[4 + len(data) // 2 :],
    ],
    ids=["half", "footer", "empty", "other", "pages"],
)
def test_a_damaged_file_is_named(root, cut):
    path = root / "data" / "train-00001-of-00003.parquet"
    path.write_bytes(cut(path.read_bytes()))
    with pytest.raises(
        UserError, match=r"train-00001-of-00003\.parquet must be an intact Parquet file, .*fetch it again"
    ):
        build_index(root, "train")


def test_a_pointer_of_git_lfs_is_named(root):
    path = root / "data" / "train-00000-of-00003.parquet"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="Git LFS's pointer to the file: git lfs pull"):
        build_index(root, "train")


def test_files_that_are_missing_or_of_two_sets(root, images):
    (root / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(UserError, match=r"all 3 files that .* counts, found 2, without number 1; fetch them"):
        build_index(root, "train")
    write_rows(root / "data" / "train-00001-of-00003.parquet", images[:2], [0, 1], ["cat", "dog"])
    write_rows(root / "data" / "train-00000-of-00001.parquet", images[:2], [0, 1], ["cat", "dog"])
    with pytest.raises(
        UserError, match=r"of a split once, found 'train-00000-of-00001\.parquet', 'train-00000-of-00003"
    ):
        build_index(root, "train")


@pytest.mark.parametrize("other", ["columns", "types", "names"])
def test_files_of_two_schemas(root, images, other):
    path = root / "data" / "train-00002-of-00003.parquet"
    if other == "columns":
        write_table(path, {"img": images_column(images[:2]), "label": [0, 1]}, features(["cat", "dog"]))
    elif other == "types":
        labels = pa.array([0, 1], pa.int32())
        write_table(path, {"image": images_column(images[:2]), "label": labels}, features(["cat", "dog"]))
    else:
        write_rows(path, images[:2], [0, 1], ["dog", "cat"])
    with pytest.raises(UserError, match=r"must have one schema, found .*00000-of.*00002-of"):
        build_index(root, "train")


def test_second_start_opens_the_first_footer_alone(root, images, monkeypatch):
    monkeypatch.setattr(listing, "SETTLED_NS", 0)  # nobody changes them twice at one time
    listed, opened = [], []
    read, check = parquet_source._places, build.check_image
    monkeypatch.setattr(parquet_source, "_places", lambda path, *more: listed.append(path) or read(path, *more))
    monkeypatch.setattr(build, "check_image", lambda place, *more: opened.append(place) or check(place, *more))
    first = build_index(root, "train")
    assert (len(listed), len(opened)) == (3, 24)
    again = build_index(root, "train")
    assert (len(listed), len(opened)) == (3, 24)
    assert again.hash == first.hash
    np.testing.assert_array_equal(again.members, first.members)
    write_rows(root / "data" / "train-00002-of-00003.parquet", images[:2], [1, 1], ["cat", "dog"])
    changed = build_index(root, "train")
    assert changed.labels[-2:].tolist() == [1, 1]
    assert (len(listed), len(opened)) == (4, 26)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_image_is_left_out(tmp_path, images, kind):
    DAMAGE[kind](tmp_path / "bad")
    mine = [*images[:5]]
    mine[2] = (tmp_path / "bad").read_bytes()
    write_rows(tmp_path / "train.parquet", mine, [0] * 5)
    with pytest.warns(UserWarning, match=r"1 of 5 files in .* cannot be used"):
        found = build_index(tmp_path, "train")
    assert [path for path, _ in found.quarantined] == ["train.parquet/image.bytes[2]"]


@pytest.mark.parametrize("backend", EXECUTORS)
@pytest.mark.parametrize("how", ["cut short", "gone", "rotten"])
def test_a_file_that_changes_after_the_index(root, how, backend):
    found = build_index(root, "train")
    place = found.place(10)
    path = Path(place.path)
    if how == "gone":
        path.unlink()
        bad = list(range(9, 18))
    elif how == "cut short":
        os.truncate(path, place.offset + 100)
        bad = list(range(10, 18))
    else:
        data = bytearray(path.read_bytes())
        data[place.offset + place.length // 2] ^= 255
        path.write_bytes(data)
        bad = [10]
    seen: list[str] = []
    got = batches(backend, EvalPlan(found, AUGMENT, 24), bad_limit=24, on_bad=lambda path, why: seen.append(path))
    assert sorted(seen) == [found.absolute(i) for i in bad] or sorted(seen) == sorted(found.absolute(i) for i in bad)
    assert torch.cat([batch.ids for batch in got]).tolist() == [i for i in range(24) if i not in bad]


# --- images that are read one after the other -------------------------------------------------------------------------


IN_ORDER = {
    "snappy": {"compression": "snappy", "use_dictionary": True},
    "zstd": {"compression": "zstd"},
    "delta": {"compression": "none", "column_encoding": {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}},
}


@pytest.mark.parametrize("way", IN_ORDER)
def test_compressed_images_are_to_be_packed(tmp_path, folders, images, way):
    files_of(tmp_path / "hf", folders, row_group_size=4, **IN_ORDER[way])
    found = {"snappy": "compressed by SNAPPY", "zstd": "compressed by ZSTD", "delta": r"encoded \(DELTA_LENGTH"}[way]
    command = re.escape(f"ijckd-fast pack {tmp_path}/hf {tmp_path}/hf-packed --short 0 --label-column label, then")
    with pytest.raises(UserError, match=rf"found column image.bytes of .*{found}.* once, .*24 images, .*{command}"):
        build_index(tmp_path / "hf", "train", fields=Fields(label_column="label"))
    scanned = scan(tmp_path / "hf", "train", in_order=lambda *_: None)
    assert re.search(found, scanned.only_in_order.why)
    index = scanned.index
    assert [index.place(i).read() for i in range(24)] == images
    assert [index.place(i).read() for i in (23, 0, 5, 4)] == [images[i] for i in (23, 0, 5, 4)]  # slowly
    assert index.members[:, 2].tolist() == [len(image) for image in images]
    again = scan(tmp_path / "hf", "train", in_order=lambda *_: None)
    assert (again.opened, again.index.hash) == (0, index.hash)


def test_a_row_group_that_cannot_be_read_leaves_its_images_out(tmp_path, folders):
    files_of(tmp_path, folders, per_file=24, row_group_size=4, compression="snappy")
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    with open_file(path) as file:
        chunk = file.metadata.row_group(2).column(0)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + chunk.total_compressed_size] = bytes(
        chunk.total_compressed_size
    )
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="4 of 24 files in .* cannot be used"):
        index = scan(tmp_path, "train", in_order=lambda *_: None).index
    assert [path[-4:] for path, _ in index.quarantined] == ["s[8]", "s[9]", "[10]", "[11]"]
    assert "row group 2" in index.quarantined[0][1]


def test_a_configuration_in_a_folder_of_its_own_is_meant(tmp_path, folders):
    files_of(tmp_path, folders, "plain_text/{split}-{i:05d}-of-{n:05d}.parquet")
    with pytest.raises(UserError, match=rf"did you mean {tmp_path}/plain_text\?"):
        build_index(tmp_path, "train")
    assert len(build_index(tmp_path / "plain_text", "train")) == 24


def test_a_split_that_is_not_there_or_there_twice(tmp_path, folders, images):
    files_of(tmp_path, folders)
    write_rows(tmp_path / "data" / "test-00000-of-00001.parquet", images[:2], [0, 1], ["cat", "dog"])
    with pytest.raises(UserError, match=r"--val-dir DIR, .*--val-fraction .*if the test files have labels"):
        build_index(tmp_path, "val")
    write_rows(tmp_path / "train" / "0000.parquet", images[:2], [0, 1], ["cat", "dog"])
    with pytest.raises(
        UserError, match=r"in one place, found files of them in .*/train and beside it \('data/train-0000"
    ):
        build_index(tmp_path, "train")
