"""Accuracy on groups of images that names tell apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ijckd_fast.errors import UserError
from ijckd_fast.evaluate import Evaluation, by_group, groups_of

PATHS = ["val/a/pen_bold.png", "val/a/brush_x.png", "val/b/pen_bold.png", "val/b/pen_thin.png", "val/b/brush_x.png"]
LABELS = np.array([0, 0, 1, 1, 1])


class Names:
    """Of an index, what groups are made of."""

    folder = "DIR/val"

    def __init__(self, paths=PATHS):
        self.paths = paths

    def __len__(self):
        return len(self.paths)


def seen(ids, predictions) -> Evaluation:
    return Evaluation(0.0, 0.0, None, len(ids), 1.0, torch.tensor(predictions), torch.tensor(ids))


def test_groups_by_brackets_or_by_the_whole_match():
    assert groups_of(Names(), r"([^/_]+)_[^/]*$")[0] == ["brush", "pen"]
    names, of = groups_of(Names(), r"[^/]+(?=\.png)")
    assert (names, of.tolist()) == (["brush_x", "pen_bold", "pen_thin"], [1, 0, 1, 2, 0])
    assert groups_of(Names(), "val/(.)/(.*)_")[0] == ["a", "b"]


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("(", r"must be a regular expression, found '\('"),
        ("pen", r"finds none in 'val/a/brush_x.png'"),
        ("(x*)_", r"finds none in 'val/a/pen_bold.png'"),
        ("(q)?_", r"finds none in 'val/a/pen_bold.png'"),
    ],
)
def test_what_says_no_group_of_an_image_is_refused(pattern, text):
    with pytest.raises(UserError, match=text):
        groups_of(Names(), pattern)


def test_names_of_single_images_are_no_groups():
    with pytest.raises(UserError, match=r"at most 1,000 groups, but '\.\*' finds 1,001 in 1,001 images"):
        groups_of(Names([f"val/a/{i}.jpg" for i in range(1001)]), ".*")
    assert len(groups_of(Names([f"val/a/{i}.jpg" for i in range(1000)]), ".*")[0]) == 1000


def test_figures_of_each_group():
    names, of = groups_of(Names(), "val/./([a-z]+)_")
    student, teacher = seen([4, 2, 0, 1], [1, 0, 0, 1]), seen([0, 1, 2, 3], [0, 0, 0, 1])
    assert by_group(student, LABELS, names, of, teacher) == [
        {
            "group": "brush", "images": 2, "top1_percent": 50.0, "agreement_percent": 0.0,
            "teacher_top1_percent": 100.0,
        },
        {
            "group": "pen", "images": 2, "top1_percent": 50.0, "agreement_percent": 100.0,
            "teacher_top1_percent": 50.0,
        },
    ]  # fmt: skip
    alone = by_group(student, LABELS, names, of)
    assert [(row["top1_percent"], row["agreement_percent"]) for row in alone] == [(50.0, None), (50.0, None)]
    assert [row["group"] for row in by_group(seen([0], [0]), LABELS, names, of)] == ["pen"]
