"""Accuracy on groups of a split's images that their names tell apart: typefaces, cameras, sites."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ijckd_fast.data import Index
from ijckd_fast.errors import UserError
from ijckd_fast.evaluate.accuracy import Evaluation

MOST = 1000  # groups: more are names of single images


def groups_of(index: Index, pattern: str) -> tuple[list[str], np.ndarray]:
    """(the groups' names, sorted; [N] int64, which of them each image is of).

    pattern  regular expression, searched in the image's path below the data folder, val/cat/a_01.jpg: its first group
             in brackets is the group's name, without brackets the whole match
    raises   UserError: no regular expression, an image without a match, more than MOST groups
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"--group-by must be a regular expression, found {pattern!r} ({error}); '([^/_]+)_[^/]*$' finds what "
            "stands before the last underscore of a file's name"
        ) from error
    names = []
    for path in index.paths:
        match = compiled.search(path)
        name = match[min(1, compiled.groups)] if match else None
        if not name:
            raise UserError(
                f"--group-by must say the group of every image, but {pattern!r} finds none in {path!r}; give another "
                "regular expression, or evaluate on files whose names say it, as those of a pack do not"
            )
        names.append(name)
    there, of = np.unique(np.array(names), return_inverse=True)
    if len(there) > MOST:
        raise UserError(
            f"--group-by must find at most {MOST:,} groups, but {pattern!r} finds {len(there):,} in {len(index):,} "
            f"images of {index.folder}, the first {str(there[0])!r}; put brackets around the part that images share"
        )
    return there.tolist(), of.astype(np.int64)


def by_group(
    evaluation: Evaluation, labels: np.ndarray, names: Sequence[str], of: np.ndarray, teacher: Evaluation | None = None
) -> list[dict[str, Any]]:
    """A row for each group of which an image was seen, in percent of its images.

    labels     [N] int64, of the whole split; names, of: as `groups_of` gives them
    teacher    its evaluation on the same split; agreement is of the images that both saw
    """
    ids = evaluation.ids.numpy()
    predicted = evaluation.predictions.numpy()
    right, group = predicted == labels[ids], of[ids]
    of_teacher = np.full(len(labels), -1, np.int64)
    if teacher is not None:
        of_teacher[teacher.ids.numpy()] = teacher.predictions.numpy()
    both = of_teacher[ids] >= 0
    same, teacher_right = predicted == of_teacher[ids], of_teacher[ids] == labels[ids]
    rows = []
    for number, name in enumerate(names):
        mine = group == number
        if not mine.any():
            continue
        rows.append(
            {
                "group": name,
                "images": int(mine.sum()),
                "top1_percent": _percent(right[mine]),
                "agreement_percent": _percent(same[mine & both]),
                "teacher_top1_percent": _percent(teacher_right[mine & both]),
            }
        )
    return rows


def _percent(hits: np.ndarray) -> float | None:
    return 100 * float(hits.mean()) if len(hits) else None
