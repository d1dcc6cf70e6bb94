"""scripts/zoo: what its rows say of sound nets, of wrong ones, and of those that take their process down."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import pathlib
import signal
import sys
import time

import pytest
import timm
import torch
import torchvision
from torch import nn

from ijckd_fast.nets import Tapped, create_model

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))  # what it imports beside itself
spec = importlib.util.spec_from_file_location("zoo", ROOT / "scripts" / "zoo.py")
zoo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zoo)
import zoo_checks  # noqa: E402
import zoo_nets  # noqa: E402


def test_every_family_has_its_net():
    assert zoo_nets.TIMM.keys() == set(zoo_nets.families())
    for family, name in zoo_nets.TIMM.items():
        assert name in timm.list_models(module=family)
    builders = {torchvision.models.get_model_builder(name).__module__ for name in torchvision.models.list_models()}
    ours = {torchvision.models.get_model_builder(name).__module__ for name in zoo_nets.TORCHVISION.values()}
    assert ours == {m for m in builders if m.count(".") == 2 and "quantization" not in m}
    known = {net.full for net in zoo_nets.every()}
    assert set(zoo_nets.SAMPLE) | set(zoo_nets.EXPORTED) <= known
    assert zoo_nets.named(["resnet18", "timm/vit_tiny_patch16_224", "timm/test_resnet"]) == [
        zoo_nets.Net("torchvision", "resnet", "resnet18"),
        zoo_nets.Net("timm", "vision_transformer", "vit_tiny_patch16_224"),
        zoo_nets.Net("timm", "", "test_resnet"),
    ]


def test_a_net_that_somebody_registered_is_no_family(monkeypatch):
    monkeypatch.setitem(timm.models._registry._module_to_models, "somebodys_nets", {"a_net"})
    assert "somebodys_nets" in timm.list_modules()
    assert "somebodys_nets" not in zoo_nets.families()


def test_a_family_that_is_not_listed_gives_its_smallest_net():
    assert zoo_nets.smallest("convmixer") == zoo_nets.TIMM["convmixer"]


def _of_each_kind(net: zoo_nets.Net, say) -> None:
    say(doing="work", map="layer")
    if net.name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif net.name == "exit":
        os._exit(3)
    elif net.name == "hang":
        time.sleep(60)
    elif net.name == "memory":
        torch.zeros(1 << 30)
    elif net.name == "error":
        raise RuntimeError("what it\nsays")
    say(refusals=["a"], advice=["--match pooled: ok"])
    say(refusals=["b", "a"])


@pytest.mark.parametrize(
    ("name", "ended"),
    [
        ("sound", "ok"),
        ("crash", "CRASHED by SIGSEGV in work"),
        ("exit", "CRASHED with exit code 3 in work"),
        ("hang", "TIMED OUT after 2 s in work"),
        ("memory", "OUT OF MEMORY in work: RuntimeError: "),
        ("error", "FAILED in work: RuntimeError: what it says"),
    ],
)
def test_whatever_happens_to_a_net_is_a_row_and_the_others_follow(tmp_path, name, ended):
    nets = [zoo_nets.Net("timm", "", name), zoo_nets.Net("timm", "x", "next")]
    limits = zoo.Limits(2.0 if name == "hang" else 60.0, 1024)
    row, last = zoo.run_all(nets, _of_each_kind, limits, 1, tmp_path)
    assert row["ended"].startswith(ended)
    assert (row["name"], row["map"]) == (name, "layer")
    assert zoo.faults(row) == ([] if name == "sound" else [row["ended"]])
    assert (last["ended"], last["refusals"], last["advice"]) == ("ok", "a | b", "--match pooled: ok")


@pytest.mark.parametrize(
    ("refusal", "ways"),
    [
        ("no map: choose another model, or pooled matching (match 'pooled') with a 'linear' or 'mlp' connector",
         [{"match": "pooled", "connector": "linear"}, {"match": "pooled", "connector": "mlp"}]),
        ("for the teacher take --objective ijckd-pooled, or for the student --match pooled --connector bottleneck:4",
         [{"objective": "ijckd-pooled"}, {"match": "pooled", "connector": "bottleneck:4"}]),
        ("choose another teacher, or --objective ijckd-pooled --connector linear (pooled vectors instead of maps), or"
         " match the map only: --objective kd --fm 1 --match map --connector bottleneck:2",
         [{"objective": "ijckd-pooled", "connector": "linear"},
          {"objective": "kd", "fm": "1", "match": "map", "connector": "bottleneck:2"}]),
        ("no stages: name the layers (--student-stages), or objective 'kd'", [{"objective": "kd"}]),
        ("choose another model", []),
    ],
)  # fmt: skip
def test_advice_is_read_from_the_sentence(refusal, ways):
    assert zoo_checks.advised(refusal) == ways


class Tiny(nn.Module):
    """With a layer that its forward does not use, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 10)
        self.unused = nn.Linear(2, 2)

    def forward(self, images):
        return self.fc(self.layer(images).mean((2, 3)))


def test_a_wrong_map_is_seen():
    model = Tapped(Tiny(), "tiny", 10, 32)
    assert zoo_checks._taps(model, 32)["map_check"] == "ok"
    features = model.features

    def other(images, need_map=False):
        map_, pooled = features(images, need_map)
        return map_ if map_ is None else map_ * (1 + torch.arange(8.0).view(8, 1, 1) / 100), pooled

    model.features = other
    assert zoo_checks._taps(model, 32)["map_check"].startswith("WRONG: by ")


def test_a_parameter_without_gradient_and_a_wrong_sum_are_seen(monkeypatch):
    student, teacher = Tapped(Tiny(), "tiny", 10, 32), create_model("resnet8x0.25", 10, image_size=32)
    sound = copy.deepcopy(teacher)
    outcome, why = zoo_checks._outcome(student, teacher, 32, "kd", {})
    assert (outcome, why) == ("wrong", "2 parameters without gradient (student.net.unused.weight, "
                                       "student.net.unused.bias)")  # fmt: skip
    assert zoo_checks._outcome(sound, student, 32, "kd", {}) == ("ok", "")
    step = zoo_checks.TrainStep.__call__

    def off(self, *args, **more):
        figures = step(self, *args, **more)
        return figures | {"loss": 1.01 * figures["loss"]}

    monkeypatch.setattr(zoo_checks.TrainStep, "__call__", off)
    outcome, why = zoo_checks._outcome(sound, teacher, 32, "kd", {})
    assert outcome == "wrong"
    assert why.startswith("the loss is ")


@pytest.mark.slow
def test_nets_of_each_kind(tmp_path, capsys):
    """A map, none, another size; saved, continued, and shown as a table."""
    saved = tmp_path / "zoo.csv"
    command = ["timm/test_resnet", "timm/test_vit", "--objectives", "ijckd", "kd", "--save", str(saved), "--image-size"]
    assert zoo.main([*command, "64"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    assert len(rows) == len(zoo.read(saved)) == 2
    assert {row["ended"] for row in rows.values()} == {"ok"}
    row = rows["test_resnet"]
    assert (row["map"], row["map_check"], row["image_size"]) == ("layer4", "ok", 64)
    assert (row["student_ok"], row["teacher_ok"], row["refusals"]) == ("ijckd kd", "ijckd kd", "")
    assert row["folded"] == row["norms"] > 0
    assert "kd" in rows["test_vit"]["student_ok"]
    assert all(way.endswith(": ok") for way in rows["test_vit"]["advice"].split(" | ") if way)

    assert zoo.main([*command, "64"]) == 0  # all have their row
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"rows": []}
    assert zoo.main(["--table", "--save", str(saved)]) == 0
    out = capsys.readouterr().out
    assert "| `timm/test_resnet` |" in out
    assert "| timm's other nets | 2 | 0 | 2 | 2 | " in out


@pytest.mark.slow
def test_the_sample_has_no_faults(tmp_path):
    """By small images and two objectives, without ONNX."""
    saved = tmp_path / "zoo.csv"
    small = ["--image-size", "64", "--objectives", "ijckd", "kd", "--no-export"]
    assert zoo.main(["--sample", *small, "--save", str(saved)]) == 0
    rows = {f"{row['library']}/{row['name']}": row for row in zoo.read(saved)}
    assert rows.keys() == set(zoo_nets.SAMPLE)
    assert {name for name, row in rows.items() if not row["student_ok"]} == {"torchvision/squeezenet1_1"}
    uses = [row["map_use"] for row in rows.values()]
    assert (uses.count("pooled"), uses.count("match only")) == (8, 1)


def test_the_page_shows_the_newest_rows():
    rows = zoo.read(zoo.ROWS)
    page = (ROOT / "docs" / "zoo.md").read_text()
    assert f"\n{zoo.table(rows)}\n" in page
    assert f"\n{zoo.summary(zoo.newest(rows))}\n" in page
    assert f"\n{zoo.left(rows)}\n" in page
    assert not any(zoo.faults(row) for row in zoo.newest(rows))


def test_mistakes(capsys):
    assert zoo.main(["resnet81"]) == 2
    assert "unknown model 'resnet81'" in capsys.readouterr().err
    assert zoo.main(["resnet18", "--objectives", "ijkd"]) == 2
    assert "unknown objective 'ijkd'" in capsys.readouterr().err
