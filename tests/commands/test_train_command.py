"""`ijckd-fast train`: presets, YAML files and options, several students, moved runs, its screen."""

from __future__ import annotations

import io

import pytest
import yaml
from command_line import complaint
from rich.console import Console
from tiny_run import config, options, settings

from ijckd_fast import cli
from ijckd_fast.train import checkpoint, run_folder, train
from ijckd_fast.train.config import PRESET_FOLDER


def test_preset_then_options(data, tmp_path, capsys):
    """A preset by short name, overridden by options; dashes and underscores, lists with and without brackets."""
    words = ["train", "--config", "r34_r18", "--lr", "0.3", "--milestones", "1,2", "--scale=[0.5,1]", "--print-config"]
    assert cli.main(words) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert (values["student"], values["teacher"], values["epochs"]) == ("resnet18", "torchvision/resnet34", 120)
    assert (values["lr"], values["milestones"], values["scale"]) == (0.3, [1, 2], [0.5, 1.0])

    folder = tmp_path / "run"
    (tmp_path / "mine.yaml").write_text(f"data_dir: {data}\nstudent: resnet8x0.25\nobjective: ce\nlr: 0.5\nepochs: 9\n")
    chosen = ["--output_dir", str(folder), "--lr", "5e-2", "--epochs=1", "--batch_size=12", "--no-tensorboard"]
    small = ["--image-size", "16", "--data-backend", "pillow", "--no-channels-last"]
    assert cli.main(["train", "--config", str(tmp_path / "mine.yaml"), *chosen, *small]) == 0
    saved = run_folder.read_config(folder)
    assert (saved["lr"], saved["epochs"], saved["batch_size"], saved["student"]) == (0.05, 1, 12, "resnet8x0.25")
    assert (saved["channels_last"], saved["eval_resize"], saved["amp_dtype"], saved["ce"]) == (False, 18, "float32", 1)
    assert checkpoint.load(folder / "last.pt")["step"] == 3
    out = capsys.readouterr().out
    assert "step 3/3: val top-1" in out
    assert "images/s" in out
    assert "waiting for data" in out


def test_mistakes_in_a_yaml_file(capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lrr: 0.1\n")
    assert f"unknown setting 'lrr' in {file}; did you mean 'lr'" in complaint(capsys, "train", "--config", str(file))
    file.write_text("lr: [0.1\n")
    assert f"{file} is not valid YAML" in complaint(capsys, "train", "--config", str(file))
    file.write_text("lr\n")
    assert "must hold 'setting: value' lines" in complaint(capsys, "train", "--config", str(file))
    file.write_text("lr: high\n")
    assert f"lr in {file}: wanted float, got 'high': peak learning rate" in complaint(
        capsys, "train", "--config", str(file)
    )


@pytest.mark.parametrize("option", [["--milestones=1,2"], ["--milestones", "1,2"], ["--milestones", "[1,2]"]])
def test_lists_as_people_write_them(capsys, option):
    assert cli.main(["train", *option, "--print-config"]) == 0
    assert "milestones:\n- 1\n- 2\n" in capsys.readouterr().out


def test_progress_bar_in_a_terminal(data, tmp_path):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    train(config(data, tmp_path), console=terminal)
    text = screen.getvalue()
    assert "20/20" in text
    assert "% wait" in text
    assert "step 4/20, epoch" not in text  # the lines of a log file
    assert "val top-1" in text


def test_presets_are_packaged_files():
    names = {path.name for path in PRESET_FOLDER.iterdir()}
    assert {name for name in names if not name.startswith("cifar100_")} == {
        "digits_student.yaml",
        "digits_teacher.yaml",
        "glyphs_student.yaml",
        "glyphs_teacher.yaml",
        "imagenet_convnext_small_r18.yaml",
        "imagenet_r34_r18.yaml",
        "imagenet_r50_mobilenetv1.yaml",
        "imagenet_r50_vit_tiny.yaml",
        "imagenet_vit_small_vit_tiny.yaml",
    }


def test_a_moved_run_and_its_moved_teacher(data, tmp_path, capsys):
    train(config(data, tmp_path / "T", student="resnet8x0.5", epochs=1), console=Console(quiet=True))
    student = {"objective": "ijckd", "teacher": str(tmp_path / "T"), "allow_weak_teacher": True}
    train(config(data, tmp_path / "S", **student), console=Console(quiet=True))
    (tmp_path / "S" / "summary.json").unlink()
    (tmp_path / "T").rename(tmp_path / "T2")
    (tmp_path / "S").rename(tmp_path / "S2")
    assert cli.main(["train", "--resume", str(tmp_path / "S2"), "--teacher", str(tmp_path / "T2")]) == 0


def _printed(capsys, *words: str) -> dict:
    """The settings that the words come to."""
    assert cli.main(["train", *words, "--print-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_options_override_every_preset_and_later_presets_earlier_ones(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 5e-1\nepochs: 7\nmilestones: [1, 2]\n")
    (tmp_path / "b.yaml").write_text("lr: 0.25\nobjective: ce\n")
    a, b = str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")
    assert _printed(capsys, "--config", a) == {"lr": 0.5, "epochs": 7, "milestones": [1, 2]}
    both = {"lr": 0.25, "epochs": 7, "milestones": [1, 2], "objective": "ce"}
    assert _printed(capsys, "--config", a, f"--config={b}") == both
    for words in (("--lr", "1", "--config", a, "--config", b), ("--config", a, "--lr", "1", "--config", b)):
        assert _printed(capsys, *words) == {**both, "lr": 1.0}


def test_a_batch_size_replaces_the_preset_s_global_batch(capsys):
    batch = ("batch_size", "global_batch")
    for words, expected in (
        ([], (None, 256)),
        (["--batch-size", "64"], (64, None)),
        (["--batch_size=64", "--global-batch", "128"], (64, 128)),
    ):
        printed = _printed(capsys, "--config", "imagenet_r34_r18", *words)
        assert tuple(map(printed.get, batch)) == expected


@pytest.mark.parametrize(
    ("words", "value"), [((), None), (("--standardize-logits",), True), (("--no-standardize-logits",), False)]
)
def test_a_switch_of_the_objective_takes_no_value(capsys, words, value):
    assert cli.main(["train", *words, "--objective", "kd", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out).get("standardize_logits") is value


def test_print_config_leaves_out_what_is_asked(capsys):
    words = ["train", "--lr", "0.1", "--epochs", "3", "--clip-grad", "null"]
    for flags, text in (
        ("", "lr: 0.1\nepochs: 3\nclip_grad: null\n"),
        ("=skip_default", "epochs: 3\n"),
        ("=skip_unset", "lr: 0.1\nepochs: 3\n"),
        ("=skip_default,skip_unset", "epochs: 3\n"),
    ):
        assert cli.main([*words, f"--print-config{flags}"]) == 0
        assert capsys.readouterr().out == text
    assert "skip_default and skip_unset, got 'all'" in complaint(capsys, *words, "--print-config=all")


def test_a_folder_may_be_called_like_a_list(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {name: value for name, value in settings(data, tmp_path, epochs=1).items() if name != "output_dir"}
    assert cli.main(["train", *options(values), "--output-dir", "10,20"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["10,20"]
    assert cli.main(["evaluate", "10,20"]) == 0


def test_resume_is_of_one_run(capsys, tmp_path):
    two = ["--student", "resnet8x0.25", "--student", "resnet8x0.5"]
    assert "--resume continues one run, got several times --student" in complaint(
        capsys, "train", "--resume", str(tmp_path), *two
    )
    assert "give one of them" in complaint(capsys, "train", "--resume", str(tmp_path), "--overwrite")
