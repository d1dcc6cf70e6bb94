import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ijckd_fast.data import build_index, write_digits
from ijckd_fast.data.prepare import digits
from ijckd_fast.errors import UserError


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "d")


def fingerprint(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_split_is_stratified_and_complete(tree):
    train, val = (build_index(tree, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1000, 797)
    assert train.classes == val.classes == tuple("0123456789")
    assert not train.quarantined
    numbers = [int(Path(path).stem) for path in (*train.paths, *val.paths)]
    assert sorted(numbers) == list(range(1797))  # every digit once, in one split
    share = np.bincount(train.labels) / (np.bincount(train.labels) + np.bincount(val.labels))
    assert np.abs(share - 1000 / 1797).max() < 0.5 / 174  # as even as whole numbers allow, 174 in the smallest class


def test_labels_and_pixels_are_scikit_learns(tree):
    from sklearn.datasets import load_digits

    source = load_digits()
    for path in sorted(tree.glob("*/*/*.jpg"))[::50]:
        number = int(path.stem)
        assert int(path.parent.name) == source.target[number]
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "L", (32, 32))
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), float)
        assert np.corrcoef(small.ravel(), source.images[number].ravel())[0, 1] > 0.97


def test_second_call_writes_nothing(tree, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    monkeypatch.setattr(digits, "load_originals", lambda: pytest.fail("read scikit-learn's digits again"))
    assert write_digits(tree) == tree
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*")} == before


def test_deterministic_and_seeded(tree, tmp_path):
    here = {name: digest for name, digest in fingerprint(tree).items() if not name.startswith(".ijckd-index")}
    assert fingerprint(write_digits(tmp_path / "again")) == here
    assert fingerprint(write_digits(tmp_path / "other", seed=1)).keys() != here.keys()


@pytest.mark.parametrize("train", [10, 100, 1787])
def test_other_sizes_keep_every_class(tmp_path, train):
    root = write_digits(tmp_path / "d", train=train, size=16)
    index = build_index(root, "train")
    assert len(index) == train
    assert len(build_index(root, "val")) == 1797 - train
    assert (index.sizes == 16).all()


def test_killed_half_way_leaves_nothing_that_is_taken_as_complete(tmp_path):
    """The writing process is killed after its 300th image; the next call writes the whole tree."""
    root = tmp_path / "d"
    code = f"""
import os, signal
from PIL import Image
from ijckd_fast.data import write_digits
save, count = Image.Image.save, 0
def dying_save(*args, **kwargs):
    global count
    count += 1
    if count == 300:
        os.kill(os.getpid(), signal.SIGKILL)
    save(*args, **kwargs)
Image.Image.save = dying_save
write_digits({str(root)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".d.*.tmp/*/*/*.jpg"))) == 299
    assert not root.exists()
    assert len(list(write_digits(root).glob("*/*/*.jpg"))) == 1797
    assert list(tmp_path.iterdir()) == [root]


def test_failure_half_way_cleans_up(tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_digits(tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


def test_someone_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "d" / "train").mkdir(parents=True)
    (tmp_path / "d" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        write_digits(tmp_path / "d")
    assert (tmp_path / "d" / "notes.txt").read_text() == "mine"


def test_empty_folder_is_used(tmp_path):
    assert len(list(write_digits(tmp_path, train=100).glob("val/*/*.jpg"))) == 1697


def test_other_settings_in_the_same_folder_are_refused(tree):
    with pytest.raises(UserError, match="'size': 32"):
        write_digits(tree, size=16)


def test_tree_with_lost_files_is_refused(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "d")
    next((tmp_path / "d").glob("val/3/*.jpg")).unlink()
    with pytest.raises(UserError, match="found 1796; delete the folder"):
        write_digits(tmp_path / "d")


def test_two_processes_at_once(tmp_path, monkeypatch):
    """The other one finishes first: its tree stays, ours goes."""
    root = tmp_path / "d"
    rename = os.rename

    def late(source, target):
        shutil.copytree(source, tmp_path / "theirs")
        rename(tmp_path / "theirs", target)
        (target / "theirs").touch()
        rename(source, target)

    monkeypatch.setattr(digits.os, "rename", late)
    assert write_digits(root, train=100) == root
    assert (root / "theirs").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert json.loads((root / ".ijckd-digits.json").read_text())["train"] == 100


@pytest.mark.parametrize(("setting", "text"), [({"train": 5}, "from 10 to 1787"), ({"size": 4}, "at least 8")])
def test_values_out_of_range(tmp_path, setting, text):
    with pytest.raises(UserError, match=text):
        write_digits(tmp_path / "d", **setting)


def test_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'ijckd-fast\[train\]'"):
        write_digits(tmp_path / "d")
