"""Settings: what is declared of them is checked, and every list of them is computed from it."""

from __future__ import annotations

import subprocess
import sys
from typing import Literal

import pytest

from ijckd_fast.errors import UserError
from ijckd_fast.setting import Setting, fault
from ijckd_fast.train import TrainConfig, config as settings


@pytest.mark.parametrize(
    ("about", "hint", "value", "text"),
    [
        ({"least": 1}, int, 0, "must be at least 1, got 0"),
        ({"least": 1}, int, 1, None),
        ({"least": 1}, int | None, None, None),
        ({"least": 0}, float, float("nan"), "must be at least 0, got nan"),
        ({"least": 0}, float, float("inf"), None),
        ({"least": 0, "finite": True}, float, float("inf"), "must be a finite number >= 0, got inf"),
        ({"above": 0, "remedy": "take 1"}, float, 0.0, "must be above 0, got 0.0: take 1"),
        ({"above": 0, "finite": True}, float, 0.0, "must be a finite number > 0, got 0.0"),
        ({"least": 1, "finite": True}, int, 0, "must be a whole number >= 1, got 0"),
        ({"least": 0, "below": 1}, float, 1.0, r"must lie in [0, 1), got 1.0"),
        ({"least": 0, "below": 1}, tuple[float, float], (0.9, 1.0), r"must be two numbers in [0, 1), got (0.9, 1.0)"),
        ({"least": 0, "below": 1}, tuple[float, float], (0.9, 0.0), None),
        ({}, Literal["map", "none"], "maps", "must be one of map, none, got 'maps'"),
        ({}, Literal["map", "none"] | None, "none", None),
        ({}, str, "any", None),
    ],
)
def test_a_value_is_held_to_what_is_declared(about, hint, value, text):
    assert fault(Setting(help="", **about), hint, value) == text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"lr": 0.0}, r"--lr must be above 0, got 0\.0"),
        (
            {"clip_grad": -1.0},
            r"--clip-grad must be above 0, got -1\.0: 1 to 5 are usual; leave it out for no clipping",
        ),
        ({"ema_decay": 1.0}, r"--ema-decay must lie in \[0, 1\), got 1\.0: 0 turns it off, 0\.999 is usual"),
        ({"betas": (0.9, 1.0)}, r"--betas must be two numbers in \[0, 1\), got \(0\.9, 1\.0\)"),
        ({"optimizer": "sdg"}, "--optimizer must be one of sgd, adamw, lamb, got 'sdg'"),
    ],
)
def test_a_config_out_of_bounds_is_refused(values, text):
    with pytest.raises(UserError, match=text):
        TrainConfig(**values)


def test_a_setting_stands_in_a_group_and_has_a_description():
    for name in settings.FIELDS:
        assert settings.GROUPS[name]
        assert len(settings.help_of(name)) > 5
    order = list(dict.fromkeys(settings.GROUPS.values()))
    assert order == sorted(order, key=[*settings.GROUPS.values()].index)
    changes = sum(a != b for a, b in zip([*settings.GROUPS.values()], [*settings.GROUPS.values()][1:], strict=False))
    assert changes == len(order) - 1  # each group is in one piece


def test_lists_of_settings_fit_together():
    """What a run may be continued with is not what its images depend on, but for paths whose contents are compared."""
    free, plan = settings.FREE_ON_RESUME, set(settings.PLAN_FIELDS)
    assert free > settings.REUSED_WITH_ANY
    of_data = {"class_list", "val_labels", "val_dir", "label_key", "image_column", "label_column"}
    assert free & plan == {*of_data, "batch_size"}
    assert not set(settings.CACHE_FIELDS) & set(settings.UNCACHED_FIELDS)
    assert not free & set(settings.OBJECTIVE_FIELDS)
    assert set(settings.TEACHER_WEIGHTS) <= set(settings.TEACHER_FIELDS)
    assert settings.MADE_BY_COMPARISON.keys() == {"data_dir", "seed", "output_dir"}


def test_an_evaluation_takes_the_defaults_of_what_is_of_training_only():
    given = {"epochs": 3, "accumulate": 4, "wandb": "mine", "student_checkpoint": "student.pt", "compile": True}
    values = settings.for_evaluation(given)
    assert values["epochs"] == 3
    assert (values["accumulate"], values["wandb"], values["student_checkpoint"], values["compile"]) == (
        1,
        None,
        None,
        False,
    )
    assert (values["global_batch"], values["log_bound"], values["cuda_graph"]) == (None, False, False)


def test_paths_become_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = settings.absolute_paths(
        TrainConfig(data_dir="data", teacher_checkpoint="t.pt", teacher="t", output_dir="o")
    )
    assert (config.data_dir, config.teacher_checkpoint) == (str(tmp_path / "data"), str(tmp_path / "t.pt"))
    assert (config.class_list, config.teacher, config.output_dir) == (None, "t", "o")


@pytest.mark.parametrize(
    ("words", "unneeded"),
    [
        (["--help"], ["torch", "numpy"]),
        (["train", "--help"], ["torch", "numpy"]),
        (["index", "--help"], ["torch", "numpy"]),
        (["evaluate", "--help"], ["torch", "numpy"]),
    ],
    ids=" ".join,
)
def test_help_does_not_wait_for_what_it_does_not_need(words, unneeded):
    code = f"import sys; from ijckd_fast.cli import main\ntry: main({words!r})\nexcept SystemExit: pass\n"
    code += f"print([name for name in {unneeded!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
