"""Weights files of other tools, from the option to the run's output and the commands on the run."""

from __future__ import annotations

import io

import pytest
import torch
from command_line import complaint
from rich.console import Console
from tiny_run import config, distilled, options, settings

from ijckd_fast import cli
from ijckd_fast.errors import UserError
from ijckd_fast.train import checkpoint, load_run, resolve, train


def trained(*args, **changes) -> str:
    """Runs a training of one epoch; returns what it said."""
    console = Console(file=io.StringIO(), width=1000)
    train(config(*args, epochs=1, **changes), console=console)
    return console.file.getvalue()


@pytest.fixture
def two_sets(teacher, tmp_path):
    """A file as timm's training script leaves it."""
    raw = torch.load(teacher)
    averaged = {name: value * 1.25 if value.is_floating_point() else value for name, value in raw.items()}
    torch.save({"state_dict": raw, "state_dict_ema": averaged, "epoch": 3}, tmp_path / "timm.pth.tar")
    return tmp_path / "timm.pth.tar"


def test_a_run_says_which_weights_it_took_and_is_evaluated_with_them(data, two_sets, tmp_path, capsys):
    said = trained(data, tmp_path / "auto", **distilled(two_sets))
    assert f"teacher: {two_sets}: it holds 2 sets of weights, 'state_dict' and 'state_dict_ema' (EMA)" in said
    assert "taken is 'state_dict_ema', which its tool evaluates; --teacher-weights or --student-weights" in said
    said = trained(data, tmp_path / "raw", **distilled(two_sets), teacher_weights="raw")
    assert "taken is 'state_dict';" in said
    auto, raw = (checkpoint.load(tmp_path / name / "last.pt")["inputs"]["teacher"] for name in ("auto", "raw"))
    assert auto != raw
    assert load_run(tmp_path / "raw").distiller.teacher is not None  # the run's own choice
    assert cli.main(["evaluate", str(tmp_path / "raw")]) == 0
    for command in ("evaluate", "bound", "export"):
        words = (command, str(tmp_path / "raw"), "--teacher-weights", "ema")
        assert "is not the one" in complaint(capsys, *words)
    with pytest.raises(UserError, match="no set of this net's weights that is 'best', which --teacher-weights or"):
        train(config(data, tmp_path / "best", **distilled(two_sets), teacher_weights="best"))


def test_the_students_weights_are_chosen_by_their_own_option(data, two_sets, tmp_path):
    student = {"student": "resnet8x0.5", "student_checkpoint": str(two_sets), "lr": 1e-9}
    first = {}
    for choice in ("ema", "raw"):
        said = trained(data, tmp_path / choice, student_weights=choice, **student)
        assert "student: " in said
        first[choice] = checkpoint.load(tmp_path / choice / "last.pt")["learner"]["student.net.conv1.weight"]
    torch.testing.assert_close(first["ema"], first["raw"] * 1.25, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_choice_without_a_file_is_refused(data, teacher, tmp_path, role):
    changes = distilled(teacher) if role == "student" else {"objective": "ce"}
    with pytest.raises(UserError, match=rf"--{role}-weights ema says which weights .* no --{role}-checkpoint is given"):
        resolve(config(data, tmp_path, **changes, **{f"{role}_weights": "ema"}))


def test_other_names_are_refused_with_the_option_that_loads_them(data, teacher, tmp_path, capsys):
    renamed = {f"x{number}.{name}": value for number, (name, value) in enumerate(torch.load(teacher).items())}
    torch.save({"state_dict": renamed}, tmp_path / "w.pt")
    values = settings(data, tmp_path / "run", epochs=1, **distilled(tmp_path / "w.pt"))
    error = complaint(capsys, "train", *options(values))
    assert "--rename-by-order" in error
    assert "'x0.conv1.weight' [11, 3, 3, 3]" in error
    assert cli.main(["train", *options(values), "--rename-by-order"]) == 0
    assert "its tensors are taken in their order ('state_dict.x0.conv1.weight' as" in capsys.readouterr().out
    train(config(data, tmp_path / "plain", epochs=1, **distilled(teacher)), console=Console(quiet=True))
    inputs = [checkpoint.load(tmp_path / name / "last.pt")["inputs"] for name in ("run", "plain")]
    assert inputs[0]["teacher"] == inputs[1]["teacher"]
    assert load_run(tmp_path / "run").distiller.teacher is not None  # the option is the run's


def test_a_cache_is_made_of_the_weights_that_are_chosen(data, two_sets, tmp_path, capsys):
    values = {
        "data_dir": str(data), "teacher": "resnet8x0.5", "teacher_checkpoint": str(two_sets), "image_size": 16,
        "eval_resize": 16, "data_backend": "pillow", "device": "cpu", "allow_weak_teacher": True, "views": 1,
        "teacher_weights": "raw",
    }  # fmt: skip
    assert cli.main(["cache", str(tmp_path / "cache"), *options(values)]) == 0
    out = capsys.readouterr().out
    assert "teacher: " in out
    assert "taken is 'state_dict';" in out.replace("\n", " ")
