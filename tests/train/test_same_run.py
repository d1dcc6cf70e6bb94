"""Processes of one run that differ in what moves its weights, or its meetings, are refused; what lies elsewhere is not
a difference.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny_run import config, distilled

from ijckd_fast.errors import UserError
from ijckd_fast.parallel import Processes, refuse_differences
from ijckd_fast.train import resolve, same_run


def facts_of(data, folder, teacher, how=(), **changes):
    values = {**distilled(teacher), **changes}
    given = {"resume": False, "resume_from": "last.pt", "overwrite": False, **dict(how)}
    return same_run.facts(resolve(config(data, folder, **values)), **given)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 0.2}, "--lr is 0.05 on rank 0 and 0.2 on rank 1"),
        ({"seed": 1}, "--seed is 0 on rank 0 and 1 on rank 1"),
        ({"mixup": 0.2}, "--mixup is 0.0 on rank 0 and 0.2 on rank 1"),
        ({"epochs": 6}, "--epochs is 5 on rank 0 and 6 on rank 1"),
        (
            {"batch_size": 9},
            "--batch-size is 8 on rank 0 and 9 on rank 1; --global-batch is 8 on rank 0 and 9 on rank 1",
        ),
        ({"log_interval": 3}, "--log-interval is 4 on rank 0 and 3 on rank 1"),
        ({"deterministic": True}, "--deterministic is False on rank 0 and True on rank 1"),
        ({"amp_dtype": "bfloat16"}, "--amp-dtype is float32 on rank 0 and bfloat16 on rank 1"),
        ({"student": "resnet8x0.5"}, "--student is resnet8x0.25 on rank 0 and resnet8x0.5 on rank 1"),
        ({"how": {"resume": True}}, "--resume is not given on rank 0 and last.pt on rank 1"),
        ({"how": {"overwrite": True}}, "--overwrite is not given on rank 0 and given on rank 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_difference_is_named(changes, said, data, teacher, tmp_path):
    mine = facts_of(data, tmp_path, teacher)
    with pytest.raises(UserError) as caught:
        refuse_differences([mine, facts_of(data, tmp_path, teacher, **changes)])
    assert str(caught.value).startswith(f"{said}: expected")


def test_other_code_and_other_libraries_are_named(data, teacher, tmp_path, monkeypatch):
    mine = facts_of(data, tmp_path, teacher)
    monkeypatch.setattr(same_run, "code_hash", lambda: "other")
    with pytest.raises(UserError, match=r"^the code of ijckd-fast is [0-9a-f]{16} on rank 0 and other on rank 1: "):
        refuse_differences([mine, facts_of(data, tmp_path, teacher)])
    monkeypatch.undo()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if before != "medium" else "high")
        with pytest.raises(UserError, match=r"^torch's precision of float32 products is "):
            refuse_differences([mine, facts_of(data, tmp_path, teacher)])
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_lies_elsewhere_and_how_fast_it_is_read_may_differ(data, teacher, tmp_path):
    elsewhere = tmp_path / "teacher.pt"
    shutil.copy(teacher, elsewhere)
    (tmp_path / "data").symlink_to(data)
    theirs = facts_of(tmp_path / "data", tmp_path / "out", elsewhere, workers=3, prefetch=5, hw_decoder_load=0.1)
    refuse_differences([facts_of(data, tmp_path, teacher), theirs])


class Two(Processes):
    """This process, and one that gives something else in one place."""

    def gather(self, item):
        return [item, {**item, **self.theirs}]


def two(**theirs: str) -> Two:
    processes = Two(world=2)
    object.__setattr__(processes, "theirs", {name.replace("_", " "): value for name, value in theirs.items()})
    return processes


def test_other_weights_are_named(data, teacher, tmp_path):
    inputs = {"teacher": "ab", "cached features": None}
    settings = config(data, tmp_path, student_checkpoint=str(teacher))
    same_run.refuse_other_inputs(settings, inputs, two())
    same_run.refuse_other_inputs(settings, inputs, Processes())
    with pytest.raises(UserError, match=r"^the digest of the teacher is ab on rank 0 and cd on rank 1: "):
        same_run.refuse_other_inputs(settings, inputs, two(the_digest_of_the_teacher="cd"))
    seen = []

    class Noted(Two):
        def gather(self, item):
            seen.append(item["the digest of the file --student-checkpoint"])
            return [item]

    same_run.refuse_other_inputs(settings, inputs, Noted(world=2))
    other = tmp_path / "other.pt"
    other.write_bytes(teacher.read_bytes()[:-1] + b"x")
    same_run.refuse_other_inputs(config(data, tmp_path, student_checkpoint=str(other)), inputs, Noted(world=2))
    same_run.refuse_other_inputs(config(data, tmp_path), inputs, Noted(world=2))
    assert len(set(seen)) == 3
