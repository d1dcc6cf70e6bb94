"""CIFAR's archives into class folders: small ones in the published format, and what is no such archive."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pickle
import re
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torchvision
from command_line import rows_of
from PIL import Image

from ijckd_fast import cli
from ijckd_fast.data import build_index
from ijckd_fast.data.prepare import cifar
from ijckd_fast.data.prepare.cifar import KINDS, prepare_cifar
from ijckd_fast.errors import UserError

_FINE = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm"""
_COARSE = """aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes
large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees vehicles_1
vehicles_2"""
_TEN = "airplane automobile bird cat deer dog frog horse ship truck"
FINE, COARSE, TEN = (names.split() for names in (_FINE, _COARSE, _TEN))
META = {
    "CIFAR-100": {"fine_label_names": FINE, "coarse_label_names": COARSE},
    "CIFAR-10": {"num_cases_per_batch": 10000, "label_names": TEN, "num_vis": 3072},
}
PUBLISHED = {kind.name: kind for kind in KINDS.values()}
OFFICIAL = {"CIFAR-100": torchvision.datasets.CIFAR100, "CIFAR-10": torchvision.datasets.CIFAR10}


class Python2Pickler(pickle._Pickler):
    """Protocol 2 as Python 2 wrote it: byte strings for str and arrays, ints for numpy's flags, memo from 1."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.memo[-1] = (0, None)

    def _save_string(self, text):
        data = text.encode("latin1") if isinstance(text, str) else text
        short = len(data) < 256
        self.write(b"U" + bytes([len(data)]) if short else b"T" + len(data).to_bytes(4, "little"))
        self.write(data)
        self.memoize(text)

    def _save_bool(self, flag):
        self.write(pickle.BININT1 + bytes([flag]))

    def save_global(self, function, name=None):
        if function.__name__ == "_reconstruct":
            self.write(b"cnumpy.core.multiarray\n_reconstruct\n")
            self.memoize(function)
        else:
            super().save_global(function, name)

    dispatch[str] = dispatch[bytes] = _save_string
    dispatch[bool] = _save_bool
    dispatch[type(np.empty(0).__reduce__()[0])] = save_global


def pickled(content) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file).dump(content)
    return file.getvalue()


def members(name: str, images: dict[str, np.ndarray], labels: dict[str, list[int]]) -> dict[str, bytes]:
    """Of an archive: images [N, 32, 32, 3] uint8 and labels by split, shared out to the parts of the kind."""
    kind = PUBLISHED[name]
    files = {kind.meta: pickled(META[name])}
    for split, parts in kind.parts.items():
        rows = images[split].transpose(0, 3, 1, 2).reshape(-1, 3072)
        for part, some in zip(parts, np.array_split(np.arange(len(rows)), len(parts)), strict=True):
            names = [f"x_s_{i:06d}.png" for i in some]
            which = [labels[split][i] for i in some]
            files[part] = pickled({"filenames": names, "batch_label": "x", kind.labels: which, "data": rows[some]})
    return {f"{kind.folder}/{name}": data for name, data in files.items()}


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, data in {**files, "cifar/readme.html": b"<html>"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def known(monkeypatch):
    """Makes an archive one of those whose checksum is known: with `train` and `val` images of each class."""

    def know(path: Path, name: str = "CIFAR-100", train: int = 2, val: int = 1) -> Path:
        small = dataclasses.replace(PUBLISHED[name], per_class={"train": train, "val": val})
        monkeypatch.setitem(KINDS, hashlib.md5(path.read_bytes()).hexdigest(), small)
        return path

    return know


@pytest.fixture(scope="module")
def content():
    """By kind: images and labels of 2 training images and 1 of val for each class, classes in disorder."""
    rng = np.random.default_rng(0)
    found = {}
    for name, names in (("CIFAR-100", FINE), ("CIFAR-10", TEN)):
        labels = {
            split: rng.permutation(np.repeat(np.arange(len(names)), n)).tolist()
            for split, n in (("train", 2), ("val", 1))
        }
        images = {split: rng.integers(0, 256, (len(which), 32, 32, 3), np.uint8) for split, which in labels.items()}
        found[name] = (images, labels)
    return found


@pytest.fixture
def archive(tmp_path, content, known) -> Path:
    return known(write_archive(tmp_path / "cifar-100-python.tar.gz", members("CIFAR-100", *content["CIFAR-100"])))


def tree(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", OFFICIAL)
def test_names_checksums_and_parts_are_the_published_ones(name):
    """torchvision has the md5 of the archives and of the pickled class names, written here from the list above."""
    official = OFFICIAL[name]
    kind = KINDS[official.tgz_md5]
    assert kind.name == name
    assert kind.folder == official.base_folder
    assert kind.parts["train"] == tuple(part for part, _ in official.train_list)
    assert kind.parts["val"] == tuple(part for part, _ in official.test_list)
    assert (kind.meta, kind.names) == (official.meta["filename"], official.meta["key"])
    assert hashlib.md5(pickled(META[name])).hexdigest() == official.meta["md5"]
    names = META[name][kind.names]
    assert len(names) == kind.classes
    assert names == sorted(names)  # the order of the folders is that of the labels
    assert sum(kind.classes * n for n in kind.per_class.values()) == 60_000


@pytest.mark.parametrize("name", OFFICIAL)
def test_unpacks_into_the_layout_that_is_read(tmp_path, content, known, monkeypatch, name):
    """With the pixels, labels and class names that torchvision's own reader finds in the archive."""
    images, labels = content[name]
    path = known(write_archive(tmp_path / "any name.tar.gz", members(name, images, labels)), name)
    done = prepare_cifar(tmp_path / "out", path)
    names = FINE if name == "CIFAR-100" else TEN
    n = len(names)
    assert done == {
        "train": {"images": 2 * n, "classes": n, "written": 2 * n},
        "val": {"images": n, "classes": n, "written": n},
    }
    assert (tmp_path / "out" / "classes.txt").read_text().split() == names
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "official", filter="data")
    monkeypatch.setattr(OFFICIAL[name], "_check_integrity", lambda self: True)  # of the real images
    for split in ("train", "val"):
        official = OFFICIAL[name](tmp_path / "official", train=split == "train")
        assert official.classes == names
        index = build_index(tmp_path / "out", split)
        assert index.classes == tuple(names)
        assert (index.sizes == 32).all()
        assert len(index) == len(labels[split])
        for i, file in enumerate(index.paths):
            number = int(Path(file).stem)
            pixels, label = official[number]
            assert index.labels[i] == label == labels[split][number]
            assert np.array_equal(np.asarray(pixels), images[split][number])
            with Image.open(index.absolute(i)) as image:
                assert (image.mode, image.format) == ("RGB", "PNG")
                assert np.array_equal(np.asarray(image), images[split][number])


def test_goes_on_where_it_was_killed(archive, tmp_path, monkeypatch):
    """As kill -9 leaves it: nothing is tidied up, the file in the making is there under another name."""
    replace, written = os.replace, []

    def until_the_fortieth(source, target):
        if len(written) == 40:
            raise KeyboardInterrupt
        written.append(target)
        replace(source, target)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", until_the_fortieth)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            prepare_cifar(out, archive)
    left = tree(out)
    assert len(left) == 41
    assert sum(path.endswith(".tmp") for path in left) == 1
    first, second = written[:2]
    first.write_bytes(first.read_bytes()[:100])  # as a power cut leaves it
    Image.new("RGB", (32, 32)).save(second)  # other pixels
    assert prepare_cifar(out, archive) == {
        "train": {"images": 200, "classes": 100, "written": 162},
        "val": {"images": 100, "classes": 100, "written": 100},
    }
    whole = tree(out)
    assert len(whole) == 301
    prepare_cifar(tmp_path / "undisturbed", archive)
    assert tree(tmp_path / "undisturbed") == whole
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert [split["written"] for split in prepare_cifar(out, archive).values()] == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == stamps
    assert tree(out) == whole


def complaint(out: Path, path: Path | None) -> str:
    with pytest.raises(UserError) as caught:
        prepare_cifar(out, path)
    assert not out.exists() or not list(out.rglob("*.png"))
    return str(caught.value)


def test_archives_of_another_checksum_are_refused(archive, tmp_path):
    whole = archive.read_bytes()
    for data in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        archive.write_bytes(data)
        text = complaint(tmp_path / "out", archive)
        assert (
            "should have the md5 eb9058c3a382ffc7106e4002c42a8d85 (CIFAR-100) or c58f30108f718f92721af3b95e74349a "
            "(CIFAR-10)" in text
        )
        assert f"found {hashlib.md5(data).hexdigest()} ({len(data):,} bytes)" in text
        assert (
            "fetch the python version of CIFAR-100 or CIFAR-10 from https://www.cs.toronto.edu/~kriz/cifar.html" in text
        )
    assert cifar.PAGE in complaint(tmp_path / "out", None)
    assert f"there is no file {tmp_path}; give its path" in complaint(tmp_path / "out", tmp_path)


def test_archives_that_are_cut_short_or_overwritten(archive, tmp_path, known):
    """With the checksum that is known: it is not the checksum alone that refuses them."""
    whole = archive.read_bytes()
    cut = [whole[: len(whole) * part // 10] for part in (0, 1, 5, 9)]
    half = len(whole) // 2
    for data in (*cut, whole[:5], b"no gzip " * 100, whole[:half] + bytes([255]) * half):
        (tmp_path / "bad.tar.gz").write_bytes(data)
        text = complaint(tmp_path / "out", known(tmp_path / "bad.tar.gz"))
        assert "bad.tar.gz cannot be read as a tar.gz archive" in text
        assert "again" in text


class _Harm:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda place: _Harm(exec, f"open({str(place)!r}, 'w')"), "builtins.exec"),
        (lambda place: _Harm(__import__("os").mkdir, str(place)), "posix.mkdir"),
        (lambda place: {"data": _Harm(getattr, "x", "upper")}, "builtins.getattr"),
        (lambda place: np.float64(1), "numpy.*scalar"),
        (lambda place: [1], "expected a pickled dict, found list"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_that_call_functions_are_refused(tmp_path, content, known, harm, named, protocol):
    files = members("CIFAR-100", *content["CIFAR-100"])
    place = tmp_path / "harm"
    files["cifar-100-python/train"] = pickle.dumps(harm(place), protocol)
    text = complaint(tmp_path / "out", known(write_archive(tmp_path / "a.tar.gz", files)))
    assert re.search(named, text.replace("__builtin__", "builtins"))
    assert "a.tar.gz, cifar-100-python/train: expected" in text
    assert not place.exists()


def test_damaged_pickles_are_refused(tmp_path, content, known):
    files = members("CIFAR-100", *content["CIFAR-100"])
    whole = files["cifar-100-python/test"]
    for data in (b"", whole[: len(whole) // 2], b"\x80\x02q\x01.", b"\x80\x02K\x01R.", whole.replace(b"u1", b"u9", 1)):
        files["cifar-100-python/test"] = data
        text = complaint(tmp_path / "out", known(write_archive(tmp_path / "a.tar.gz", files)))
        assert (
            "cifar-100-python/test: expected a pickle of names, numbers and numpy arrays alone, found another" in text
        )


def _changed(**changes):
    def change(content: dict) -> dict:
        return content | {key: value(content) if callable(value) else value for key, value in changes.items()}

    return change


@pytest.mark.parametrize(
    ("part", "change", "text"),
    [
        ("meta", _changed(fine_label_names=FINE[:99]), "expected 100 class names as 'fine_label_names', found"),
        ("meta", _changed(fine_label_names=None), "expected 100 class names as 'fine_label_names', found None"),
        ("meta", _changed(fine_label_names=["../../x", *FINE[1:]]), "class names of small letters, found '../../x'"),
        ("meta", _changed(fine_label_names=[7, *FINE[1:]]), "class names of small letters, found 7"),
        (
            "train",
            _changed(data=lambda c: c["data"][:, :3071]),
            r"expected [200, 3072] uint8 pixels of the train images, found [200, 3071]",
        ),
        ("train", _changed(data=lambda c: c["data"][1:]), r"found [199, 3072] uint8"),
        (
            "test",
            _changed(data=lambda c: c["data"].astype(np.int32)),
            r"pixels of the val images, found [100, 3072] int32",
        ),
        (
            "test",
            _changed(data="x"),
            "expected the arrays 'data' and the lists 'fine_labels' of the val images, found others",
        ),
        ("test", _changed(fine_labels=lambda c: ["x"] * 100), "found others (ValueError"),
        ("test", _changed(fine_labels=lambda c: [-1] * 100), "found others (ValueError"),
        (
            "test",
            _changed(fine_labels=lambda c: [0, *range(1, 99), 0]),
            "should hold 1 val images of each of 100 classes, found 2",
        ),
        ("test", _changed(fine_labels=lambda c: [*range(99), 100]), "found 0 with label 99"),
        ("test", _changed(fine_labels=[*range(101)], data=np.zeros((101, 3072), np.uint8)), "found 1 with label 100"),
    ],
)  # fmt: skip
def test_content_that_is_not_cifar_s_is_refused(tmp_path, content, known, part, change, text):
    images, labels = content["CIFAR-100"]
    files = members("CIFAR-100", images, labels)
    name = f"cifar-100-python/{part}"
    files[name] = pickled(change(cifar.unpickled(files[name], "")))
    assert text in complaint(tmp_path / "out", known(write_archive(tmp_path / "a.tar.gz", files)))


def test_a_part_that_is_missing(tmp_path, content, known):
    files = members("CIFAR-10", *content["CIFAR-10"])
    del files["cifar-10-batches-py/data_batch_3"]
    path = known(write_archive(tmp_path / "a.tar.gz", files), "CIFAR-10")
    assert "should hold cifar-10-batches-py/data_batch_3, which is not in it" in complaint(tmp_path / "out", path)


@pytest.mark.parametrize(
    "stranger", ["train/apple/mine.png", "train/dog/00000.png", "val/apple/00000.png", "train/notes.txt"]
)
def test_other_files_in_the_folder_are_refused(archive, tmp_path, content, stranger):
    """00000.png of val is of another class than apple, by the fixture's order."""
    assert content["CIFAR-100"][1]["val"][0] != 0
    path = tmp_path / "out" / stranger
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    hidden = tmp_path / "out" / "train" / ".DS_Store"
    hidden.parent.mkdir(exist_ok=True)
    hidden.write_bytes(b"")
    with pytest.raises(UserError, match=rf"should hold the images of .* alone, found .*{stranger.split('/')[1]}"):
        prepare_cifar(tmp_path / "out", archive)
    assert sorted(tree(tmp_path / "out")) == sorted([stranger, "train/.DS_Store"])
    path.unlink()
    if path.parent.name == "dog":
        path.parent.rmdir()
    assert prepare_cifar(tmp_path / "out", archive)["val"]["written"] == 100


def test_command(archive, tmp_path, capsys):
    words = ["prepare-cifar", str(tmp_path / "out"), "--archive", str(archive)]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "200 images of 100 classes, 200 of them written now" in out
    assert rows_of(out)[1] == {"split": "val", "images": 100, "classes": 100, "written": 100}
    assert cli.main(words) == 0
    assert [row["written"] for row in rows_of(capsys.readouterr().out)] == [0, 0]
    assert cli.main(words[:2]) == 2
    assert (
        f"nothing to unpack: fetch the python version of CIFAR-100 or CIFAR-10 from {cifar.PAGE}"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        cli.main(["prepare-cifar", "--help"])
    assert cifar.PAGE in " ".join(capsys.readouterr().out.split())
