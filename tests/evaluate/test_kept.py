"""The teacher's answers that are kept in a file: whole, or known not to be."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
from damage import damages

from ijckd_fast.errors import UserError
from ijckd_fast.evaluate import Evaluation, known_evaluation, load_evaluation, save_evaluation
from ijckd_fast.files import Damaged

KEPT = Evaluation(50.0, 75.0, None, 4, 1.5, torch.tensor([0, 2, 1, 1]), torch.arange(4))


@pytest.fixture
def path(tmp_path):
    save_evaluation(tmp_path / "val.npz", "of this", KEPT)
    return tmp_path / "val.npz"


def same(found: Evaluation) -> bool:
    plain = found.top1, found.top5, found.images, found.seconds
    ids = torch.equal(found.predictions, KEPT.predictions) and torch.equal(found.ids, KEPT.ids)
    return ids and plain == (50.0, 75.0, 4, 1.5) and found.predictions.dtype == torch.int64


def test_no_damage_gives_other_answers(path, tmp_path):
    sound, damaged = path.read_bytes(), 0
    save_evaluation(tmp_path / "other.npz", "of that", KEPT)
    others = [("another file", b"PK"), ("an array", (tmp_path / "other.npz").read_bytes()[:-1])]
    for what, content in [*damages(sound, 0, 200), *others]:
        path.write_bytes(content)
        said: list[str] = []
        found = known_evaluation(path, "of this", said.append)
        if found is None:
            (text,) = said
            assert str(path) in text, what
            assert "the teacher is evaluated again" in text, what
            damaged += 1
        else:
            assert same(found), what
            assert not said
    assert damaged > 100  # the others are in the archive's times and versions


def test_what_was_edited_is_not_taken(path):
    """Under right checksums of the archive."""
    arrays = dict(np.load(path))
    arrays["predictions"][1] = 0
    np.savez(path, **arrays)
    with pytest.raises(Damaged, match=r"its content is not what was written\): make it again"):
        load_evaluation(path, "make it again")


def test_what_is_not_there_is_made_without_a_word(path, tmp_path):
    assert known_evaluation(tmp_path / "none.npz", "of this", pytest.fail) is None
    assert same(known_evaluation(path, "of this", pytest.fail))


def test_answers_of_something_else_are_not_taken(path):
    said: list[str] = []
    assert known_evaluation(path, "of that", said.append) is None
    assert said == [f"{path} is of another teacher, other images or other settings: the teacher is evaluated again"]


def test_a_file_that_cannot_be_read_is_not_called_damaged(path, monkeypatch):
    def denied(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(type(path), "read_bytes", denied)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)") as caught:
        load_evaluation(path, "make it again")
    assert not isinstance(caught.value, Damaged)
    said: list[str] = []
    assert known_evaluation(path, "of this", said.append) is None
    assert "the teacher is evaluated again" in said[0]


def test_a_full_disk_is_told(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sound = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left for .*val\.npz: free some"):
        save_evaluation(path, "of this", KEPT)
    assert path.read_bytes() == sound


def test_a_file_of_an_earlier_version_is_read_or_made_again(path):
    arrays = {
        "key": "of this", "predictions": KEPT.predictions.numpy(), "ids": KEPT.ids.numpy(),
        "top1_top5_seconds": np.array([50.0, 75.0, 1.5]),
    }  # fmt: skip
    np.savez(path, **arrays)
    assert same(known_evaluation(path, "of this", pytest.fail))
    content = path.read_bytes()
    at = content.index(KEPT.predictions.numpy().tobytes())
    path.write_bytes(content[:at] + b"\1" + content[at + 1 :])
    with pytest.raises(Damaged, match=r"val\.npz is damaged \(.*CRC"):
        load_evaluation(path, "make it again")
    del arrays["ids"]
    np.savez(path, **arrays)
    assert known_evaluation(path, "of this", pytest.fail) is None
