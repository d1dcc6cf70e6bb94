"""Parquet files that are rarer than those of the hub: encrypted, empty, with nulls that nobody counts, replaced."""

from __future__ import annotations

import base64
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import complaint
from image_tree import write_split
from parquet_files import images_column, write_rows, write_table

from ijckd_fast.data import build_index
from ijckd_fast.data.index import scan
from ijckd_fast.errors import UserError

encryption = pytest.importorskip("pyarrow.parquet.encryption")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[bytes]:
    """Six."""
    root = tmp_path_factory.mktemp("folders")
    write_split(root, "train", {"cat": 6})
    return [path.read_bytes() for path in sorted(root.rglob("*.jpg"))]


# --- nulls ------------------------------------------------------------------------------------------------------------


DELTA = {"compression": "none", "column_encoding": {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}}


@pytest.mark.parametrize(
    "how", [{"compression": "snappy"}, {"compression": "zstd"}, DELTA], ids=["snappy", "zstd", "delta"]
)
@pytest.mark.parametrize("counted", [True, False])
def test_null_images_are_refused_as_in_files_that_are_not_compressed(tmp_path, images, how, counted, capsys):
    path = tmp_path / "hf" / "train.parquet"
    some = [images[0], None, images[2], images[3], None, images[5]]
    how = {**how, "write_statistics": counted, "row_group_size": 2}
    for column, text in (
        (some, "found null in row 1 and 1 others; remove these rows"),
        ([None] * 6, "found null in row 0 and 5 others; write the file with the images' bytes in it"),
    ):
        write_table(path, {"image": images_column(column), "label": [0, 1] * 3}, **how)
        with pytest.raises(UserError, match=rf"hf/train\.parquet must have a value of image\.bytes .*, {text}"):
            scan(tmp_path / "hf", "train", in_order=lambda *_: None)
        for command in (["index", str(tmp_path / "hf")], ["pack", str(tmp_path / "hf"), str(tmp_path / "out")]):
            assert text in complaint(capsys, *command)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_beside_a_null_does_not_hide_it(tmp_path, images):
    path = tmp_path / "train.parquet"
    columns = {"image": images_column([images[0], None, *images[2:]]), "label": [0, 1] * 3}
    write_table(path, columns, compression="snappy", row_group_size=2)
    with pq.ParquetFile(path) as file:
        chunk = file.metadata.row_group(2).column(0)
    data, start = bytearray(path.read_bytes()), chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(data)
    with pytest.raises(UserError, match="found null in row 1; remove these rows"):
        scan(tmp_path, "train", in_order=lambda *_: None)


# --- encryption -------------------------------------------------------------------------------------------------------


class Keys(encryption.KmsClient):
    """Wraps a key in nothing."""

    def __init__(self, config: object) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, master: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, wrapped: bytes, master: str) -> bytes:
        return base64.b64decode(wrapped)


@pytest.mark.parametrize("compression", ["none", "snappy"])
@pytest.mark.parametrize(
    ("plain_footer", "column", "found"),
    [
        (False, "label", "an encrypted footer"),
        (True, "image.bytes", "encrypted columns"),  # a look at one of them would end the process
        (True, "label", "encrypted columns"),
        (True, "image.path", "encrypted columns"),
    ],
)
def test_encrypted_files_are_named(tmp_path, images, plain_footer, column, found, compression):
    write_rows(tmp_path / "train-0.parquet", images[:4], [0, 1, 0, 1])
    table = pq.read_table(tmp_path / "train-0.parquet")
    config = encryption.EncryptionConfiguration("footer", column_keys={"a": [column]}, plaintext_footer=plain_footer)
    factory = encryption.CryptoFactory(Keys)
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), config)
    path = tmp_path / "train-1.parquet"
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties, compression=compression) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=rf"train-1\.parquet must be a Parquet file without .*, found {found}; read"):
        build_index(tmp_path, "train")


# --- files without rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"compression": "snappy"}], ids=["as stored", "compressed"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("groups", [0, 1])
def test_files_without_rows_among_others(tmp_path, images, groups, first, how):
    full, empty = tmp_path / f"train-{int(first)}.parquet", tmp_path / f"train-{int(not first)}.parquet"
    write_rows(full, images[:4], [0, 1, 0, 1], ["cat", "dog"])
    schema = pq.read_schema(full)
    with pq.ParquetWriter(empty, schema, **how) as writer:
        if groups:
            writer.write_table(schema.empty_table())
    found = build_index(tmp_path, "train")
    assert [found.place(i).read() for i in range(4)] == images[:4]


@pytest.mark.parametrize("names", [None, ["cat", "dog"]])
def test_nothing_but_files_without_rows(tmp_path, images, names):
    write_rows(tmp_path / "train.parquet", [], [], names)
    with pytest.raises(UserError, match=r"\(train\) must hold images, found none in 1 Parquet files; fetch them again"):
        build_index(tmp_path, "train")


# --- other columns ----------------------------------------------------------------------------------------------------


def test_columns_of_other_kinds_are_listed_and_refused(tmp_path, images):
    path, same = tmp_path / "train.parquet", [image.ljust(9999, b"\0") for image in images[:2]]
    for column, said in (
        (pa.array(same, pa.binary(9999)), r"found image: fixed_size_binary\[9999\], label: int64"),
        (pa.array([[images[0]], [images[1]]]), "found image: list<element: binary>, label: int64"),
    ):
        write_table(path, {"image": column, "label": [0, 1]})
        with pytest.raises(UserError, match=said):
            build_index(tmp_path, "train")


# --- files that are elsewhere, or others than they were ---------------------------------------------------------------


def test_links_and_what_lies_beside(tmp_path, images):
    write_rows(tmp_path / "store" / "blob", images[:4], [0, 1, 0, 1], ["cat", "dog"])
    data = tmp_path / "hf" / "data"
    data.mkdir(parents=True)
    (data / "TRAIN-00000-of-00001.PARQUET").symlink_to(tmp_path / "store" / "blob")  # as the hub's cache has them
    (data / "train-1.parquet").mkdir()
    for name in ("README.md", "data/notes.txt", "data/train-00000-of-00001.parquet.incomplete", "data/.hidden"):
        (tmp_path / "hf" / name).write_text("")
    found = scan(tmp_path / "hf", "train")
    assert [found.index.place(i).read() for i in range(4)] == images[:4]
    assert {row.kind for row in found.passed_over} == {".txt", ".incomplete"}


@pytest.mark.parametrize("how", [{}, {"compression": "snappy"}], ids=["as stored", "compressed"])
def test_a_file_that_is_replaced_by_one_of_its_length_and_time(tmp_path, images, how):
    size = max(map(len, images))
    images = [image.ljust(size, b"\0") for image in images]
    path = tmp_path / "hf" / "train.parquet"
    write_rows(path, images[:3], [0, 1, 1], ["cat", "dog"], **how)
    long_ago = (10**18, 10**18)
    os.utime(path, ns=long_ago)
    before = scan(tmp_path / "hf", "train", in_order=lambda *_: None)
    assert before.opened == 3
    shutil.copy2(path, tmp_path / "copy")
    os.replace(tmp_path / "copy", path)  # the same bytes: what is known of them holds
    assert scan(tmp_path / "hf", "train", trust_folders=True, in_order=lambda *_: None).opened == 0
    write_rows(tmp_path / "other", images[3:], [1, 0, 1], ["cat", "dog"], **how)
    os.utime(tmp_path / "other", ns=long_ago)
    if not how:
        assert (tmp_path / "other").stat().st_size == path.stat().st_size
    os.replace(tmp_path / "other", path)
    found = scan(tmp_path / "hf", "train", trust_folders=True, in_order=lambda *_: None)
    assert (found.opened, found.index.labels.tolist()) == (3, [1, 0, 1])
    assert [found.index.place(i).read() for i in range(3)] == images[3:]
