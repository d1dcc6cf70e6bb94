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
