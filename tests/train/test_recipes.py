"""The packaged teacher-student pairs: published settings, nets that fit together and learn, costs as the docs state."""

import dataclasses
import functools
import json
import math
import pathlib
import re

import pytest
import torch
import yaml
from rich.console import Console
from tiny_run import settings, write_tree

from ijckd_fast import cli
from ijckd_fast.commands.recipes import table_head, table_line
from ijckd_fast.errors import UserError
from ijckd_fast.nets import create_model
from ijckd_fast.train import build, load_run, make_config, train
from ijckd_fast.train.config import load_preset, pair_names, preset_names
from ijckd_fast.train.pairs import CLASSES, build_pair, cost_row

DOCS = (pathlib.Path(__file__).parents[2] / "docs" / "recipes.md").read_text()

# Teacher, student and learning rate of the tables of CRD (the first twelve) and SimKD, by preset without 'cifar100_'.
CIFAR_PAIRS = {
    "wrn40_2_wrn16_2": ("wrn_40_2", "wrn_16_2", 0.05),
    "wrn40_2_wrn40_1": ("wrn_40_2", "wrn_40_1", 0.05),
    "r56_r20": ("resnet56", "resnet20", 0.05),
    "r110_r32": ("resnet110", "resnet32", 0.05),
    "r32x4_r8x4": ("resnet32x4", "resnet8x4", 0.05),
    "vgg13_vgg8": ("cifar/vgg13", "vgg8", 0.05),
    "vgg13_mobilenetv2": ("cifar/vgg13", "mobilenetv2x0.5", 0.01),
    "r50_mobilenetv2": ("cifar/resnet50", "mobilenetv2x0.5", 0.01),
    "r50_vgg8": ("cifar/resnet50", "vgg8", 0.05),
    "r32x4_shufflenetv1": ("resnet32x4", "shufflenetv1", 0.01),
    "r32x4_shufflenetv2": ("resnet32x4", "shufflenetv2x1", 0.01),
    "wrn40_2_shufflenetv1": ("wrn_40_2", "shufflenetv1", 0.01),
    "r32x4_vgg8": ("resnet32x4", "vgg8", 0.05),
    "r32x4_shufflenetv2x1.5": ("resnet32x4", "shufflenetv2x1.5", 0.01),
}
# Parameters of the factor-2 connector, of IJCKD's and SimKD's scripts.
CONNECTORS = {
    "cifar100_r32x4_r8x4": 214_016,
    "cifar100_r32x4_vgg8": 246_784,
    "imagenet_r34_r18": 854_016,
    "imagenet_r50_mobilenetv1": 12_591_104,
}
CIFAR_RECIPE = {
    "epochs": 240,
    "global_batch": 64,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "step",
    "milestones": [150, 180, 210],
    "gamma": 0.1,
    "image_size": 32,
    "eval_resize": 32,
    "hflip": 0.5,
    "mean": [0.5071, 0.4867, 0.4408],
    "std": [0.2675, 0.2565, 0.2761],
}


def test_cifar_presets_share_every_setting_but_the_pair_s_own():
    presets = {name: load_preset(name) for name in preset_names() if name.startswith("cifar100_")}
    assert set(presets) == {"cifar100_teacher", *(f"cifar100_{pair}" for pair in CIFAR_PAIRS)}
    shared = {}
    for name, values in presets.items():
        own = {key: values.pop(key, None) for key in ("teacher", "student", "lr", "objective")}
        if name == "cifar100_teacher":
            assert own == {"teacher": None, "student": "resnet32x4", "lr": 0.05, "objective": "ce"}
        else:
            assert (own["teacher"], own["student"], own["lr"]) == CIFAR_PAIRS[name.removeprefix("cifar100_")], name
            assert own["objective"] == "ijckd"
        shared[name] = values
    recipe = shared.pop("cifar100_teacher")
    assert recipe.items() >= CIFAR_RECIPE.items()
    assert [name for name, values in shared.items() if values != recipe] == []


@functools.cache
def teacher(name: str, classes: int, size: int):
    """Frozen, and therefore one for all pairs that have it, to save time."""
    return create_model(name, classes, image_size=size)


@pytest.mark.parametrize("name", pair_names())
def test_a_pair_builds_learns_and_deploys_what_the_docs_say(name, monkeypatch):
    monkeypatch.setattr(
        build, "build_teacher", lambda config, classes: teacher(config.teacher, classes, config.image_size)
    )
    torch.manual_seed(0)
    published = load_preset(name)["image_size"]
    size = published if "vit" in name else min(published, 64)  # a ViT is counted as it is built
    config, distiller = build_pair(name, image_size=size)
    row = {"preset": name, **cost_row(dataclasses.replace(config, image_size=published), distiller)}
    assert table_line(row) in DOCS.splitlines()
    classes = CLASSES[name.partition("_")[0]]
    channels_s, channels_t = distiller.student.channels, distiller.teacher.channels
    half = channels_t // 2
    connector = channels_s * half + 9 * half**2 + half * channels_t + 2 * (half + half + channels_t)
    if row["connector"] == "linear":
        connector = channels_s * channels_t + channels_t
    assert row["connector_params"] == connector == CONNECTORS.get(name, connector)
    assert row["deployed_params"] == row["student_params"] + connector + (channels_t - channels_s) * classes

    images, labels = torch.randn(2, 3, size, size), torch.randint(classes, (2,))
    teacher_before = [value.clone() for value in distiller.teacher.state_dict().values()]
    learned = dict(distiller.named_parameters())
    before = {key: value.detach().clone() for key, value in learned.items()}
    optimizer = torch.optim.SGD(learned.values(), config.lr, config.momentum, weight_decay=config.weight_decay)
    distiller.train()
    for step in range(2):
        out = distiller(images, labels, progress=step)
        optimizer.zero_grad()
        out.loss.backward()
        assert set(out.parts) == {"ce", "sr", "fm"}
        assert torch.isfinite(out.loss)
        assert [key for key, p in learned.items() if p.grad is None or not torch.isfinite(p.grad).all()] == []
        optimizer.step()
    assert [key for key, p in learned.items() if torch.equal(p, before[key])] == []
    assert all(map(torch.equal, distiller.teacher.state_dict().values(), teacher_before))
    assert distiller.eval().predict(images).shape == (2, classes)


# What DeiT's table 9 and ConvNeXt's table 5 have, as far as there are settings for it.
OF_2021 = {
    "objective": "ijckd-pooled", "connector": "linear", "epochs": 300, "optimizer": "adamw", "betas": [0.9, 0.999],
    "weight_decay": 0.05, "decay_norms": False, "schedule": "cosine", "label_smoothing": 0.1, "mixup": 0.8,
    "cutmix": 1.0, "drop_path": 0.1, "image_size": 224, "scale": [0.08, 1.0], "hflip": 0.5,
}  # fmt: skip
DEIT = {"global_batch": 1024, "lr": 1e-3, "warmup_epochs": 5, "ema_decay": 0.99996, "repeats": 3}
CONVNEXT = {"global_batch": 4096, "lr": 4e-3, "warmup_epochs": 20, "ema_decay": 0.9999}
MODERN = {
    "imagenet_vit_small_vit_tiny": ("timm/vit_small_patch16_224", "timm/vit_tiny_patch16_224", DEIT),
    "imagenet_r50_vit_tiny": ("torchvision/resnet50", "timm/vit_tiny_patch16_224", DEIT),
    "imagenet_convnext_small_r18": ("torchvision/convnext_small", "timm/resnet18", CONVNEXT),
}


@pytest.mark.parametrize("name", MODERN)
def test_presets_of_vit_and_convnext_have_their_papers_settings(name):
    teacher, student, recipe = MODERN[name]
    values = load_preset(name)
    assert values.items() >= {**OF_2021, **recipe, "teacher": teacher, "student": student}.items()
    assert ("repeats" in values) == ("repeats" in recipe)


@pytest.mark.parametrize("name", MODERN)
def test_presets_of_vit_and_convnext_train(name, tmp_path):
    """Every setting but the sizes, with nets of the same kinds; the loss is that of mixed images, averages are kept."""
    small = {"convnext": "timm/test_convnext", "vit": "timm/test_vit", "resnet": "timm/test_resnet"}
    values = load_preset(name)
    nets = {role: next(net for kind, net in small.items() if kind in values[role]) for role in ("teacher", "student")}
    weights = tmp_path / "teacher.pt"
    torch.save(create_model(nets["teacher"], 3, image_size=32).native_state_dict(), weights)
    changes = {
        **nets, "teacher_pretrained": False, "teacher_checkpoint": str(weights), "allow_weak_teacher": True,
        "global_batch": 4, "image_size": 32, "eval_resize": 36, "max_steps": 3, "epochs": 2, "warmup_epochs": 1,
        "workers": 1, "log_interval": 1,
    }  # fmt: skip
    data = write_tree(tmp_path / "data")
    run = tmp_path / "run"
    train(make_config({**values, **settings(data, run), **values, **changes}), console=Console(quiet=True))
    state = torch.load(run / "last.pt")
    assert {"learner", "live"} <= state.keys()
    assert any(not torch.equal(state["live"][key], average) for key, average in state["learner"].items())
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    distiller = load_run(run).distiller
    assert distiller.connector.spec == "linear"
    assert distiller.predict(torch.randn(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("words", [["r32x4_shufflenetv2x1.5"], ["cifar100_teacher", "--student", "vgg8"]])
def test_presets_on_the_command_line(words, capsys):
    assert cli.main(["train", "--config", *words, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "epochs: 240" in printed
    assert f"student: {words[-1] if len(words) > 1 else 'shufflenetv2x1.5'}" in printed


def printed_settings(capsys, *words: str) -> dict:
    assert cli.main(["train", *words, "--print-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_a_preset_s_settings_of_an_objective(capsys, tmp_path):
    """They hold where that objective is trained, over the preset's others and under options and later files."""
    ours = {"temperature": 1, "dkd_beta": 0.5, "dkd_warmup": 1}
    assert not ours.keys() & printed_settings(capsys, "--config", "r34_r18").keys()
    assert not ours.keys() & printed_settings(capsys, "--config", "r34_r18", "--objective", "kd").keys()
    assert printed_settings(capsys, "--config", "r34_r18", "--objective", "dkd").items() >= ours.items()
    assert printed_settings(capsys, "--objective", "dkd", "--config", "r50_mobilenetv1")["dkd_beta"] == 2
    given = printed_settings(capsys, "--config", "r34_r18", "--objective", "dkd", "--dkd-beta", "3")
    assert given.items() >= {**ours, "dkd_beta": 3}.items()
    file = tmp_path / "mine.yaml"
    file.write_text("objective: dkd\ndkd_warmup: 5\n")
    both = printed_settings(capsys, "--config", "r34_r18", "--config", str(file))
    assert both.items() >= {**ours, "dkd_warmup": 5}.items()
    file.write_text(
        "objective: kd\ntemperature: 3\nobjectives: {kd: {temperature: 2, ce: 0.5}, dkd: {temperature: 1}}\n"
    )
    of_kd = printed_settings(capsys, "--config", str(file))
    assert (of_kd["temperature"], of_kd["ce"], "objectives" in of_kd) == (2, 0.5, False)
    assert printed_settings(capsys, "--config", str(file), "--objective", "at")["temperature"] == 3

    of_pair = printed_settings(capsys, "--config", "r34_r18", "--objective", "sdd-dkd")
    assert (of_pair["sdd_scales"], of_pair["sdd_warmup"], of_pair["temperature"]) == ([1, 2], 1, 1)
    given = printed_settings(capsys, "--config", "r34_r18", "--objective", "sdd-dkd", "--sdd-scales", "1,2,4")
    assert given["sdd_scales"] == [1, 2, 4]
    objective = build_pair("r56_r20", objective="dkd")[1].objective
    assert (objective.temperature, objective.dkd_beta, objective.dkd_warmup) == (4, 2, 20)
    assert build_pair("r56_r20", objective="dkd", dkd_beta=1.0)[1].objective.dkd_beta == 1


# The toolboxes' feature lists between the first and the pooled vector, cut to the shorter of the two; the nets that are
# in none of them have the stages that are found.
STAGES = {
    "cifar100_r32x4_shufflenetv2": ("layer1 layer2 layer3", "layer1 layer2 layer3"),
    "cifar100_r32x4_shufflenetv2x1.5": ("layer1 layer2 layer3", "layer1 layer2 layer3"),
    "cifar100_wrn40_2_wrn16_2": ("block1 block2 block3", "block1 block2 block3"),
    "cifar100_wrn40_2_wrn40_1": ("block1 block2 block3", "block1 block2 block3"),
    "cifar100_wrn40_2_shufflenetv1": ("layer1 layer2 layer3", "block1 block2 block3"),
    "cifar100_vgg13_vgg8": ("block1 block2 block3 block4", "block1 block2 block3 block4"),
    "cifar100_r32x4_vgg8": ("block1 block2 block3", "layer1 layer2 layer3"),
    "cifar100_r50_vgg8": ("block1 block2 block3 block4", "layer1 layer2 layer3 layer4"),
    "cifar100_r50_mobilenetv2": ("blocks.1 blocks.2 blocks.4 blocks.6", "layer1 layer2 layer3 layer4"),
    "cifar100_vgg13_mobilenetv2": ("blocks.1 blocks.2 blocks.4 blocks.6", "block1 block2 block3 block4"),
    "imagenet_r50_mobilenetv1": ("features.32 features.68 features.80", "layer1 layer2 layer3"),
}


@pytest.mark.parametrize("objective", ["at", "fitnet"])
def test_presets_name_the_toolboxes_stages(objective):
    named = {}
    for name in pair_names():
        values = load_preset(name, objective)
        assert "student_stages" not in load_preset(name)
        if "student_stages" in values:
            named[name] = " ".join(values["student_stages"]), " ".join(values["teacher_stages"])
    assert named == STAGES


def test_a_pair_compares_the_stages_that_its_preset_names():
    _, distiller = build_pair("cifar100_r32x4_vgg8", objective="at")
    assert [(s.path, t.path) for s, t in distiller.stage_pairs] == [(f"block{n}", f"layer{n}") for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("objectives: dkd", "expected settings by the names of objectives, got 'dkd': write e.g. dkd:"),
        ("objectives: {dkd: 4}", "expected settings by the names of objectives, got {'dkd': 4}"),
        ("objectives: {dkdd: {}}", "unknown objective 'dkdd' in objectives of .*: expected some of .*mean 'dkd'"),
        (
            "objectives: {kd: {temprature: 1}}",
            "unknown setting 'temprature' in kd in objectives of .*mean 'temperature'",
        ),
        ("objectives: {kd: {objective: at}}", "kd in objectives of .* names an objective too: leave that out"),
    ],
)
def test_mistakes_in_settings_of_an_objective(text, expected, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=expected):
        load_preset(str(file))


def test_a_preset_s_teacher_without_weights_is_refused(tmp_path, capsys):
    assert cli.main(["train", "--config", "cifar100_r56_r20", "--data-dir", str(tmp_path)]) == 2
    assert "teacher resnet56 has no weights: give --teacher-checkpoint FILE" in capsys.readouterr().err


def test_the_command_prints_the_table(capsys):
    assert (
        cli.main(["recipes", "digits_student", "r56_r20", "--objective", "ijckd-pooled", "--connector", "linear"]) == 0
    )
    *lines, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    assert lines == [*table_head().splitlines(), *map(table_line, rows)]
    assert [row["preset"] for row in rows] == ["digits_student", "cifar100_r56_r20"]
    assert rows[1]["connector"] == "linear"
    assert rows[1]["connector_params"] == 64 * 64 + 64
    assert rows[1]["deployed_params"] == 278_324 + 64 * 64 + 64

    assert cli.main(["recipes", "r56_r20", "--objective", "srrl"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert (row["connector"], row["connector_params"]) == ("none", 0)
    assert row["deployed_params"] == row["student_params"] == 278_324
    assert row["deployed_macs"] == row["student_macs"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["r56_r21"], "no preset 'r56_r21'"),
        (["cifar100_r56_r22"], "did you mean.*'cifar100_r56_r20'"),
        (
            ["cifar100_teacher"],
            "'cifar100_teacher' is no packaged pair of teacher and student: expected one of cifar100_r110_r32",
        ),
        (["r56_r20", "--objective", "simkdd"], "did you mean 'simkd'"),
    ],
)
def test_what_the_command_refuses(words, text, capsys):
    assert cli.main(["recipes", *words]) == 2
    assert re.search(text, capsys.readouterr().err)


def test_every_pair_s_data_is_known():
    with pytest.raises(UserError):
        build_pair("digits_teacher")
    for name in pair_names():
        make_config(load_preset(name))
        assert name.partition("_")[0] in CLASSES
