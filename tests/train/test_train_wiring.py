"""That the loop hands its settings on: each piece has tests of its own, these see that the loop uses it as it was asked
to.
"""

from __future__ import annotations

import functools
import io
import math

import pytest
import torch
from rich.console import Console
from tiny_run import config, distilled
from torch import nn

from ijckd_fast import head as ops
from ijckd_fast.data import build_index
from ijckd_fast.distill import Distiller
from ijckd_fast.errors import UserError
from ijckd_fast.evaluate import evaluate
from ijckd_fast.nets import Tapped
from ijckd_fast.train import (
    build_distiller,
    build_indexes,
    build_val_loader,
    checkpoint,
    resolve,
    run_folder,
    train as loud_train,
)

train = functools.partial(loud_train, console=Console(quiet=True))


def _watch_steps(monkeypatch, look):
    """Calls look(distiller, images, labels, progress) at the beginning of every step."""
    original = Distiller.forward

    def step(self, images, labels, **named):
        look(self, images, labels, named["progress"])
        return original(self, images, labels, **named)

    monkeypatch.setattr(Distiller, "forward", step)


def test_the_averaged_weights_are_evaluated(data, tmp_path, monkeypatch):
    """The logits of the evaluation inside the loop are those of the saved average, not those of the live weights."""
    original, seen = Distiller.predict, []

    def predict(self, images):
        seen.append(original(self, images))
        return seen[-1]

    # So high a learning rate that after eight steps the two answer otherwise: top-1 61 and 33 %, no logit near a tie.
    settings = resolve(config(data, tmp_path, ema_decay=0.999, lr=0.3, max_steps=8))
    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "predict", predict)
        train(settings)
    in_loop = torch.cat(seen)  # [18, 3]
    (row,) = [row for row in run_folder.read_log(tmp_path) if row["kind"] == "eval"]
    assert row["step"] == 8

    state = checkpoint.load(tmp_path / "last.pt")
    logits, results, cpu = {}, {}, torch.device("cpu")
    for which in ("learner", "live"):
        distiller = build_distiller(settings, 3, cpu).eval()
        distiller.load_state_dict(state[which])
        with build_val_loader(settings, build_indexes(settings)[1], cpu) as loader:
            logits[which] = torch.cat([distiller.predict(images) for images, *_ in loader])
            results[which] = evaluate(distiller.predict, loader, device=cpu)
    torch.testing.assert_close(in_loop, logits["learner"])
    assert (in_loop - logits["live"]).abs().max() > 0.1
    assert (row["top1_percent"], row["top5_percent"]) == (results["learner"].top1, results["learner"].top5)
    assert row["top1_percent"] != results["live"].top1


_COSINE = [0.5 + 0.5 * math.cos(math.pi * n / 10) for n in range(10)]


@pytest.mark.parametrize(
    ("changes", "factors"),
    [
        ({"schedule": "step", "milestones": (1, 2), "gamma": 0.5}, [1] * 4 + [0.5] * 4 + [0.25] * 4),
        ({"schedule": "cosine", "milestones": (1, 2), "gamma": 0.5, "warmup_epochs": 0.5}, [0.5, 1, *_COSINE]),
    ],
    ids=["step", "cosine"],
)
def test_learning_rate_follows_the_schedule_asked_for(data, tmp_path, changes, factors):
    """Four steps to the epoch, three epochs: in the log, and in the optimizer at the end."""
    train(config(data, tmp_path, epochs=3, log_interval=1, lr=0.04, **changes))
    logged = [row["lr"] for row in run_folder.read_log(tmp_path) if row["kind"] == "train"]
    assert logged == pytest.approx([0.04 * factor for factor in factors])
    (group,) = checkpoint.load(tmp_path / "last.pt")["optimizer"]["param_groups"]
    assert group["lr"] == logged[-1]


def _layouts(tensors):
    """Which memory layouts four-dimensional tensors have; those of one channel or one pixel have both, and are left
    out.
    """
    names = set()
    for x in tensors:
        plain, last = x.is_contiguous(), x.is_contiguous(memory_format=torch.channels_last)
        if not (plain and last):
            names.add("channels last" if last else "plain" if plain else "neither")
    return names


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_layout_inside_the_step(data, teacher, tmp_path, monkeypatch, channels_last):
    steps: list[dict[str, set[str]]] = []
    features = Tapped.staged_features

    def look(distiller, images, _labels, _progress):
        found = {"images": _layouts([images])}
        for name, net in (("student", distiller.student), ("teacher", distiller.teacher)):
            found[name] = _layouts(part.weight for part in net.modules() if isinstance(part, nn.Conv2d))
        steps.append(found)

    def tapped(self, images, need_map=False):
        map_, pooled, stages = features(self, images, need_map)
        if steps and self.training:  # the student, inside a step
            steps[-1]["map"] = _layouts([map_, *stages])
        return map_, pooled, stages

    _watch_steps(monkeypatch, look)
    monkeypatch.setattr(Tapped, "staged_features", tapped)
    train(config(data, tmp_path, max_steps=2, channels_last=channels_last, at=1.0, **distilled(teacher)))

    assert len(steps) == 2  # the second one: after an update
    wanted = {"channels last"} if channels_last else {"plain"}
    for found in steps:
        assert found["student"] == found["teacher"] == wanted
        assert found["images"] == found["map"] == wanted


def test_stages_by_name_are_those_that_are_compared(data, teacher, tmp_path, monkeypatch):
    compared = []
    _watch_steps(monkeypatch, lambda distiller, *_: compared.extend(distiller.stage_pairs))
    stages = {"student_stages": ("layer1", "layer2.0"), "teacher_stages": ("conv1", "layer2", "layer3")}
    train(config(data, tmp_path, max_steps=1, **{**distilled(teacher), "objective": "at"}, **stages))
    assert [(s.path, t.path) for s, t in compared] == [("layer1", "layer2"), ("layer2.0", "layer3")]
    assert tuple(run_folder.read_config(tmp_path)["student_stages"]) == stages["student_stages"]


def test_progress_is_in_epochs(data, tmp_path, monkeypatch):
    seen = []
    _watch_steps(monkeypatch, lambda _distiller, _images, _labels, progress: seen.append(progress))
    train(config(data, tmp_path, epochs=2))
    assert seen == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]


def test_subset_and_label_noise_reach_the_index(data, tmp_path, monkeypatch):
    """Eight images of each of three classes, in three steps of eight: an epoch sees each label of the index once."""
    labels: list[int] = []
    _watch_steps(monkeypatch, lambda _distiller, _images, batch, _progress: labels.extend(batch.tolist()))
    hashes = []
    for noise, only in ((0.5, None), (0.25, "/0(0[1-9]|10)")):
        labels.clear()
        folder = tmp_path / str(noise)
        train(config(data, folder, train_per_class=8, train_only=only, label_noise=noise, seed=3, epochs=1))
        hashes.append(checkpoint.load(folder / "last.pt")["inputs"]["training images"])
        index = build_index(data, "train").subset(8, noise, 3, only)
        assert hashes[-1] == index.hash
        assert sorted(labels) == sorted(index.labels.tolist())
    assert hashes[0] != hashes[1]


def _count_bad_rows(monkeypatch, answers):
    """What the device would have counted, one answer per reading, the first of them from before the run; returns the
    readings.
    """
    left, readings = [ops.BadRows(*a) for a in answers], []

    def take(device):
        readings.append(device)
        return left.pop(0)

    monkeypatch.setattr(ops, "take_bad_rows", take)
    return readings


def test_labels_that_the_device_could_not_use_stop_the_run(data, teacher, tmp_path, monkeypatch):
    """Read with the log, every fourth step; what was counted before the run is not held against it."""
    readings = _count_bad_rows(monkeypatch, [(7, 7), (0, 0), (5, 0)])
    wanted = (
        r"stopped at step 8: 5 images .* outside \[0, K\) = \[0, 3\), the classes of teacher "
        r"resnet8x0\.5.*ijckd-fast index"
    )
    with pytest.raises(UserError, match=wanted):
        train(config(data, tmp_path, **distilled(teacher)))
    assert readings == [torch.device("cpu")] * 3
    assert [row["step"] for row in run_folder.read_log(tmp_path) if row["kind"] == "train"] == [4, 8]


def test_saturated_rows_are_a_warning(data, teacher, tmp_path, monkeypatch):
    _count_bad_rows(monkeypatch, [(0, 0), (0, 3), (0, 0), (0, 2)])
    said = io.StringIO()
    loud_train(config(data, tmp_path, max_steps=12, **distilled(teacher)), console=Console(file=said, width=300))
    lines = [line for line in said.getvalue().splitlines() if "softmax saturated" in line]
    assert [line.split(" images")[0] for line in lines] == ["warning: 3", "warning: 2"]


def test_the_reference_head_counts_no_bad_rows(data, teacher, tmp_path, monkeypatch):
    """Its kernels are torch's, which stop the process."""
    assert _count_bad_rows(monkeypatch, []) == []
    train(config(data, tmp_path, max_steps=4, head="reference", **distilled(teacher)))
