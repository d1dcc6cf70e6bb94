"""Settings in layers: what an upper layer says replaces what contradicts it below, and nothing else."""

from __future__ import annotations

import pytest
import torch
from command_line import complaint
from rich.console import Console
from tiny_run import config

from ijckd_fast import cli
from ijckd_fast.train import run_folder, train
from ijckd_fast.train.config import preset_names, read_preset
from ijckd_fast.train.layered import layered, weights_at


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """Folder of a run that trained resnet8x0.5 on images of 16 pixels, resized to 20."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(config(data, folder, student="resnet8x0.5", epochs=1, eval_resize=20), console=Console(quiet=True))
    return folder


NET = {"teacher": "resnet34", "teacher_pretrained": True, "teacher_mean": (0.5, 0.5, 0.5)}


@pytest.mark.parametrize(
    ("lower", "upper", "left"),
    [
        ({"batch_size": 8, "global_batch": 64}, {"batch_size": 16}, {}),
        ({"batch_size": 8}, {"global_batch": 64}, {"batch_size": 8}),
        (NET, {"teacher": "RUN"}, {}),
        (NET, {"teacher": "FILE"}, {}),
        (NET, {"teacher": "resnet50"}, {"teacher_pretrained": True}),
        (NET, {"teacher": "resnet34"}, {name: NET[name] for name in ("teacher_pretrained", "teacher_mean")}),
        (NET, {"teacher_checkpoint": "f"}, {name: NET[name] for name in ("teacher", "teacher_mean")}),
        ({"teacher_checkpoint": "f", "teacher_weights": "ema"}, {"teacher_pretrained": True}, {}),
        ({"teacher_checkpoint": "f"}, {"teacher_pretrained": False}, {"teacher_checkpoint": "f"}),
        ({"teacher_cache": "c", "teacher": "x"}, {"teacher": "resnet34"}, {}),
        ({"teacher_cache": "c"}, {"teacher": "cache:d"}, {}),
        ({"student_checkpoint": "f", "student_weights": "ema"}, {"student": "RUN"}, {}),
        ({"student_pretrained": True, "student_stages": ("a",)}, {"student": "r"}, {"student_pretrained": True}),
        ({"student_pretrained": True}, {"student_checkpoint": "f"}, {}),
        ({"val_fraction": 0.1, "val_seed": 3}, {"val_dir": "v"}, {}),
        ({"val_labels": "l", "val_dir": "v"}, {"val_fraction": 0.1}, {}),
        ({"val_fraction": 0.1, "val_seed": 3}, {"val_labels": "l"}, {}),
        ({"nesterov": True}, {"optimizer": "lamb"}, {}),
        ({"nesterov": True}, {"momentum": 0.0}, {}),
        ({"nesterov": True}, {"optimizer": "sgd", "momentum": 0.8}, {"nesterov": True}),
        ({"nesterov": True}, {"optimizer": "adamw", "nesterov": True}, {}),
        ({"decode": "gpu", "blocks_on": "gpu"}, {"data_backend": "pillow"}, {}),
        ({"decode": "gpu"}, {"data_backend": "dali"}, {"decode": "gpu"}),
        ({"data_backend": "pillow"}, {"decode": "gpu"}, {}),
        ({"data_backend": "dali"}, {"blocks_on": "gpu"}, {}),
        ({"connector": "linear", "connector_init": "he", "log_bound": True}, {"objective": "kd"}, {}),
        ({"connector": "linear", "log_bound": True}, {"objective": "srrl"}, {"connector": "linear", "log_bound": True}),
        ({"connector": "linear", "log_bound": True}, {"objective": "kd", "fm": 1.0, "match": "pooled"}, None),
        ({"lr": 0.1, "temperature": 8.0}, {"lr": 0.2, "objective": "dkd"}, {"temperature": 8.0}),
    ],
    ids=str,
)
def test_what_is_contradicted_does_not_count(teacher, lower, upper, left):
    places = {"RUN": str(teacher), "FILE": str(teacher / "best.pt")}
    upper = {name: places.get(value, value) if isinstance(value, str) else value for name, value in upper.items()}
    left = lower if left is None else left
    assert layered(lower, upper) == {**left, **upper}


def test_within_a_layer_and_between_equal_ones_nothing_is_replaced():
    for name in preset_names():
        values, _ = read_preset(name)
        assert layered(values) == values
        assert layered(values, values) == values
    both = {"teacher_checkpoint": "f", "teacher_pretrained": True, "val_dir": "v", "val_fraction": 0.1}
    assert layered({}, both) == both


def test_a_model_s_name_is_no_path(teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet8x0.5").symlink_to(teacher)
    assert weights_at("resnet8x0.5") is None
    assert weights_at("./resnet8x0.5") == tmp_path.relative_to(tmp_path) / "resnet8x0.5" / "last.pt"
    assert weights_at("nothing") is None


@pytest.mark.parametrize("where", ["RUN", "FILE", "NAME"])
def test_a_teacher_of_a_run_brings_its_weights_and_its_image_size(data, tmp_path, teacher, where):
    """Over a preset with published weights of another net."""
    given = {
        "RUN": ["--teacher", str(teacher)],
        "FILE": ["--teacher", str(teacher / "last.pt")],
        "NAME": ["--teacher", "resnet8x0.5", "--teacher-checkpoint", str(teacher / "best.pt")],
    }[where]
    small = ["--student", "resnet8x0.25", "--epochs", "1", "--batch-size", "12", "--data-backend", "pillow"]
    here = ["--data-dir", str(data), "--output-dir", str(tmp_path), "--no-tensorboard", "--allow-weak-teacher"]
    (tmp_path / "mine.yaml").write_text("teacher: resnet34\nteacher_pretrained: true\nobjective: ijckd\n")
    assert cli.main(["train", "--config", str(tmp_path / "mine.yaml"), *given, *small, *here]) == 0
    found = run_folder.read_config(tmp_path)
    assert (found["teacher"], found["teacher_pretrained"]) == ("resnet8x0.5", False)
    assert (found["image_size"], found["eval_resize"]) == (16, 20)


def test_a_size_that_is_given_counts_and_a_teacher_of_another_one_is_named(data, tmp_path, teacher, capsys):
    words = ["train", "--data-dir", str(data), "--teacher", str(teacher), "--student", "resnet8x0.25"]
    small = [
        "--image-size",
        "40",
        "--data-backend",
        "pillow",
        "--epochs",
        "1",
        "--batch-size",
        "12",
        "--output-dir",
        str(tmp_path),
    ]
    saved = torch.load(teacher / "last.pt", weights_only=True)
    assert saved["config"]["image_size"] == 16
    spoilt = tmp_path / "spoilt.pt"
    for name, tensor in saved["learner"].items():
        if name.endswith("classifier.bias") or name.endswith("fc.bias"):
            saved["learner"][name] = torch.tensor([9e4, 0.0, 0.0]) + 0 * tensor
    torch.save(saved, spoilt)
    said = complaint(capsys, *words, *small, "--teacher", str(spoilt))
    assert "near chance" in said
    assert "it was trained with --image-size 16 --eval-resize 20, here it is 40 46; or " in said
