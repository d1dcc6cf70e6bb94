"""Subsets and label noise of an index."""

import numpy as np
import pytest
from image_tree import same_index, write_split

from ijckd_fast.data import Index, Paths, build_index
from ijckd_fast.errors import UserError


def test_subset_takes_as_many_of_each_class(root):
    full = build_index(root, "train")
    half = full.subset(per_class=3, seed=1)
    assert np.bincount(half.labels).tolist() == [3, 3, 3]
    assert list(half.paths) == sorted(half.paths)
    for i, path in enumerate(half.paths):
        j = full.paths.index(path)
        assert half.labels[i] == full.labels[j]
        assert half.sizes[i].tolist() == full.sizes[j].tolist()
    assert same_index(half, full.subset(per_class=3, seed=1))
    assert list(half.paths) != list(full.subset(per_class=3, seed=2).paths)
    assert set(full.subset(per_class=2, seed=1).paths) < set(half.paths)  # nested: the first of the same order
    assert len({full.hash, half.hash, full.subset(per_class=2, seed=1).hash, full.subset(3, seed=2).hash}) == 4
    assert full.subset() is full


def test_label_noise_changes_the_stated_share_to_other_classes():
    labels = np.repeat(np.arange(4), 500)
    paths = [f"train/c/{i}.jpg" for i in range(2000)]
    full = Index("/data", "train", tuple("abcd"), Paths.of(paths), labels, np.ones((2000, 2), np.int32), [], "hash")
    noisy = full.subset(label_noise=0.3, seed=5)
    changed = noisy.labels != labels
    assert changed.sum() == 600
    assert (full.labels == labels).all()  # the original is untouched
    moves = np.bincount(4 * labels[changed] + noisy.labels[changed], minlength=16).reshape(4, 4)
    assert moves.diagonal().sum() == 0
    assert moves[~np.eye(4, dtype=bool)].min() > 30  # 50 expected in each of the 12 other places
    assert noisy.hash != full.hash
    assert noisy.hash != full.subset(label_noise=0.2, seed=5).hash
    assert (noisy.labels == full.subset(label_noise=0.3, seed=5).labels).all()
    assert (noisy.labels != full.subset(label_noise=0.3, seed=6).labels).any()
    both = full.subset(per_class=10, label_noise=0.5, seed=5)
    assert (len(both), (both.labels != np.repeat(np.arange(4), 10)).sum()) == (40, 20)


@pytest.mark.parametrize("per_class", [0, 5, -1])
def test_subset_of_too_many_is_refused(root, per_class):
    with pytest.raises(UserError, match="class 'dog' has 4; choose a number from 1 to 4"):
        build_index(root, "train").subset(per_class=per_class)


def test_impossible_label_noise_is_refused(root):
    with pytest.raises(UserError, match=r"between 0 and 1, found 1\.5"):
        build_index(root, "train").subset(label_noise=1.5)
    write_split(root.parent / "one", "train", {"cat": 2})
    with pytest.raises(UserError, match="at least two classes"):
        build_index(root.parent / "one", "train").subset(label_noise=0.5)


def test_only_images_whose_path_matches(root):
    full = build_index(root, "train")
    few = full.subset(only="/00[02]")
    assert [path[-7:] for path in few.paths] == ["000.jpg", "002.jpg"] * 3
    assert [few.absolute(i) for i in range(6)] == [
        full.absolute(i) for i in range(len(full)) if i in (0, 2, 5, 7, 9, 11)
    ]
    assert few.classes == full.classes
    assert list(full.subset(1, only="/000", seed=3).paths) == [f"train/{name}/000.jpg" for name in full.classes]
    assert list(full.subset(only="train/(cat|dog|eel)/").paths) == list(full.paths)
    hashes = {full.hash, few.hash, full.subset(only="/00[01]").hash, full.subset(2, only="/00[02]").hash}
    assert len(hashes) == 4
    noisy = full.subset(label_noise=0.5, seed=1, only="/00[02]")
    assert (noisy.labels != few.labels).sum() == 3
    with pytest.raises(UserError, match="class 'cat' has 2; choose a number from 1 to 2"):
        full.subset(3, only="/00[02]")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("(", r"--train-only must be a regular expression, found '\('"),
        ("cat", r"of 2 of 3 classes \(e.g. 'dog'\) in .* it finds none in paths like 'train/dog/000.jpg'"),
        ("^cat/", r"of 3 of 3 classes"),
    ],
)
def test_what_leaves_nothing_of_a_class_is_refused(root, pattern, text):
    with pytest.raises(UserError, match=text):
        build_index(root, "train").subset(only=pattern)
