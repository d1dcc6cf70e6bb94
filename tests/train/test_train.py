"""The loop: what it computes, what it writes, that it never waits for the device, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import importlib.machinery
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from host_waits import HostWaits
from rich.console import Console
from tiny_run import config, differing, distilled, write_teacher
from torch import nn

from ijckd_fast import files
from ijckd_fast.data import Batch, build_index
from ijckd_fast.distill import PARTS, PRESETS, Distiller, get_objective
from ijckd_fast.errors import UserError
from ijckd_fast.evaluate import Evaluation, evaluate
from ijckd_fast.nets import create_model, fingerprint
from ijckd_fast.parallel import Processes
from ijckd_fast.train import (
    Ema,
    FiniteGuard,
    Meter,
    Stopwatch,
    build_distiller,
    build_optimizer,
    checkpoint,
    learning_rate,
    make_config,
    refuse_weak_teacher,
    resolve,
    run_folder,
    train as loud_train,
)
from ijckd_fast.train.build import prepare
from ijckd_fast.train.config import load_preset, preset_names
from ijckd_fast.train.progress import bottleneck

train = functools.partial(loud_train, console=Console(quiet=True))


# --- schedules, optimizer, guard, average


def _schedule(step, **changes):
    settings = {
        "steps_per_epoch": 10, "epochs": 20, "lr": 0.2, "schedule": "step", "milestones": (8, 12), "gamma": 0.1,
        "warmup_epochs": 0,
    }  # fmt: skip
    return learning_rate(step, **{**settings, **changes})


def test_step_schedule():
    assert [_schedule(s) for s in (0, 79, 80, 119, 120, 199)] == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.002, 0.002])


def test_cosine_schedule_with_warm_up():
    lr = [_schedule(s, schedule="cosine", warmup_epochs=2) for s in range(200)]
    assert lr[:20] == pytest.approx([0.2 * (s + 1) / 20 for s in range(20)])
    assert lr[20] == 0.2
    assert lr[110] == pytest.approx(0.1)
    assert lr[199] == pytest.approx(0.1 * (1 + math.cos(math.pi * 179 / 180)))
    assert all(a >= b for a, b in itertools.pairwise(lr[20:]))


def _net_and_batches(steps=6):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(144, 2)
    )
    return net.to(memory_format=torch.channels_last), [torch.randn(5, 3, 8, 8) for _ in range(steps)]


def _optimizer(net, name="sgd", **changes):
    settings = {
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": False,
        "betas": (0.9, 0.99),
        "weight_decay": 1e-2,
        "decay_norms": True,
    }
    return build_optimizer(net, name=name, **{**settings, **changes})


def test_sgd_is_torchs_own():
    ours, batches = _net_and_batches()
    theirs, _ = _net_and_batches()
    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}
    a, b = _optimizer(ours, **settings), torch.optim.SGD(theirs.parameters(), **settings, foreach=False, fused=False)
    for images in batches:
        for net, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            net(images).square().mean().backward()
            optimizer.step()
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw", "lamb"])
@pytest.mark.parametrize("bad", ["loss", "gradient", "input"])
def test_guard_makes_a_bad_step_do_nothing(bad, optimizer_name):
    """Also as the very first step. The net then goes on as if the step had not been."""
    net, batches = _net_and_batches()
    spared, _ = _net_and_batches()
    results = []
    for each, skip in ((net, {0, 3}), (spared, set())):
        optimizer = _optimizer(each, optimizer_name)
        guard = FiniteGuard(each, optimizer, torch.device("cpu"))
        oks = []
        for step, images in enumerate(batches):
            if not skip and step in {0, 3}:
                continue
            broken = step in skip
            guard.before_forward()
            loss = each(images * float("inf") if broken and bad == "input" else images).square().mean()
            loss = loss * float("nan") if broken and bad == "loss" else loss
            optimizer.zero_grad()
            loss.backward()
            if broken and bad == "gradient":
                next(each.parameters()).grad[0, 0, 0, 0] = float("inf")
            ok, norm = guard.judge(loss)
            guard.update(ok)
            if optimizer_name == "lamb" and broken:
                for group in optimizer.param_groups:
                    group["step"] -= 1  # the one thing that goes on
            oks.append(bool(ok))
        results.append(oks)
        assert torch.isfinite(norm)
    assert results == [[False, True, True, False, True, True], [True] * 4]
    state, expected = net.state_dict(), spared.state_dict()
    assert differing(dict(state), dict(expected)) == []


def test_guard_restores_the_connectors_statistics(data, teacher):
    settings = resolve(config(data, data, **distilled(teacher)))
    distiller = build_distiller(settings, 3, torch.device("cpu")).train()
    optimizer = _optimizer(distiller, weight_decay=0)
    guard = FiniteGuard(distiller, optimizer, torch.device("cpu"))
    before = {k: v.clone() for k, v in distiller.state_dict().items() if "num_batches" not in k}
    labels = torch.arange(8) % 3
    for value, ok in ((float("nan"), False), (1.0, True)):
        guard.before_forward()
        out = distiller(torch.randn(8, 3, 16, 16) * value, labels, progress=0)
        out.loss.backward()
        judged, _ = guard.judge(out.loss)
        assert bool(judged) is ok
        guard.update(judged)
        optimizer.zero_grad()
        after = {k: v for k, v in distiller.state_dict().items() if k in before}
        moved = differing(before, after)
        assert moved == [] if not ok else ".connector.running_mean" in moved


def test_ema_follows_weights_and_statistics():
    net, batches = _net_and_batches()
    guard = FiniteGuard(net, _optimizer(net, momentum=0, weight_decay=0), torch.device("cpu"))
    ema = Ema(net, 0.9)
    expected = {k: v.clone() for k, v in net.state_dict().items() if v.is_floating_point()}
    for n, images in enumerate(batches, 1):
        guard.before_forward()
        net(images).sum().backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.01 * p.grad
        ema.update(n)
        decay = min(0.9, (1 + n) / (10 + n))
        for k, average in expected.items():
            average.mul_(decay).add_(net.state_dict()[k], alpha=1 - decay)
    live = {k: v.clone() for k, v in net.state_dict().items()}
    with ema.swapped_in():
        for k, average in expected.items():
            torch.testing.assert_close(net.state_dict()[k], average)
            assert not torch.equal(net.state_dict()[k], live[k])
    assert differing(dict(net.state_dict()), live) == []


# --- evaluation


def test_evaluate_counts_every_image_once():
    torch.manual_seed(0)
    logits, labels = torch.randn(23, 7), torch.randint(0, 7, (23,))
    teacher = torch.randint(0, 7, (23,))
    ids = torch.arange(23)
    loader = [Batch(logits[part], labels[part], ids[part]) for part in ids.split(5)]
    of_teacher = Evaluation(0.0, 0.0, None, 23, 1.0, teacher.flip(0), ids.flip(0))  # seen in another order
    result = evaluate(lambda images: images, loader, device=torch.device("cpu"), teacher=of_teacher)
    order = logits.argsort(1, descending=True)
    assert result.images == 23
    assert result.top1 == pytest.approx(100 * (order[:, 0] == labels).float().mean().item())
    assert result.top5 == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).float().mean().item())
    assert result.agreement == pytest.approx(100 * (order[:, 0] == teacher).float().mean().item())
    assert torch.equal(result.predictions, order[:, 0])
    assert torch.equal(result.ids, ids)
    # a file that only one of the two could read
    some = result._replace(predictions=teacher[3:], ids=ids[3:])
    result = evaluate(lambda images: images, loader[:4], device=torch.device("cpu"), teacher=some)
    assert result.agreement == pytest.approx(100 * (order[3:20, 0] == teacher[3:20]).float().mean().item())
    with pytest.raises(UserError, match="no image to evaluate on"):
        evaluate(lambda images: images, [], device=torch.device("cpu"))


# --- whole runs


def test_learns_and_leaves_a_complete_folder(data, tmp_path):
    summary = train(config(data, tmp_path, epochs=12, eval_every=3, tensorboard=True, warmup_epochs=1))
    rows = run_folder.read_log(tmp_path)
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(losses) == 12
    assert losses[-1] < 0.5 * losses[0]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in evaluations] == [12, 24, 36, 48]
    assert summary["last"] == {k: v for k, v in evaluations[-1].items() if k != "kind"}
    assert summary["best"]["top1_percent"] == max(row["top1_percent"] for row in evaluations) > 60
    assert summary["params"] == 5_395
    train_row = {"kind", "step", "epoch", "loss", "ce", "grad_norm", "top1_train_percent", "lr", "images_per_s"}
    assert train_row | {"loader_wait_percent", "memory_mb", "skipped_steps", "unreadable_files"} == set(rows[0])
    assert json.loads((tmp_path / "summary.json").read_text())["last"] == summary["last"]
    environment = json.loads((tmp_path / "env.json").read_text())
    assert environment["torch"] == torch.__version__
    text = (tmp_path / "report.md").read_text()
    assert f"| last epoch | 48 | {summary['last']['top1_percent']:.2f} |" in text
    assert "5,395 parameters" in text
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert any((tmp_path / "tensorboard").iterdir())

    # The checkpoint answers as the run did, and serves as a teacher by name.
    best = checkpoint.load(tmp_path / "best.pt")
    assert best["evaluated"] == summary["best"]
    model = create_model("resnet8x0.25", 3, checkpoint=tmp_path / "best.pt", image_size=16)
    assert (
        differing(
            model.net.state_dict(),
            {k.removeprefix("student.net."): v for k, v in best["learner"].items() if k.startswith("student.net.")},
        )
        == []
    )


@pytest.mark.parametrize("objective", list(PRESETS))
def test_every_objective_trains_and_freezes_the_teacher(data, teacher, tmp_path, objective):
    changes = {**distilled(teacher), "objective": objective, "epochs": 2, "log_interval": 2}
    before = fingerprint(create_model("resnet8x0.5", 3, checkpoint=teacher, image_size=16))
    summary = train(config(data, tmp_path, **changes))
    assert summary["last"]["agreement_percent"] is not None
    assert checkpoint.load(tmp_path / "last.pt")["inputs"]["teacher"] == before
    row = run_folder.read_log(tmp_path)[0]
    weights = get_objective(objective)
    parts = {name for name in PARTS if getattr(weights, name, 0)}
    rising = {objective.replace("-", "_")} if objective in ("dkd", "sdd-dkd") else set()
    assert parts | rising == set(PARTS) & set(row)
    if not rising:  # its warm-up factor is not part of the figure
        assert row["loss"] == pytest.approx(sum(getattr(weights, name) * row[name] for name in parts), rel=1e-5)


def test_compiled_nets_hand_over_their_stages(data, teacher, tmp_path, monkeypatch):
    """Also after a run of the same nets that kept none; by the compiler's front end alone, as its back ends take
    minutes.
    """
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compile_(net, backend="eager"))
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    for objective in ("kd", "at"):
        changes = {**distilled(teacher), "objective": objective, "fold_teacher": False, "compile": True}
        settings = resolve(config(data, tmp_path, **changes))
        distiller, by_hand = (build_distiller(settings, 3, torch.device("cpu")).train() for _ in range(2))
        prepare(settings, distiller, Processes())
        out, wanted = (each(images, labels, progress=0) for each in (distiller, by_hand))
        torch.testing.assert_close(out.parts, wanted.parts)
    assert "at" in out.parts


def test_first_weights_and_batches_are_the_seeds(data, teacher, tmp_path):
    """The student starts from the same weights whatever teaches it, from others with another seed."""

    def first(seed, **changes):
        settings = resolve(config(data, tmp_path, seed=seed, **changes))
        return build_distiller(settings, 3, torch.device("cpu")).student.net.state_dict()

    assert differing(first(1), first(1, **distilled(teacher))) == []
    assert differing(first(1), first(2)) != []


def test_bfloat16_and_reference_head(data, teacher, tmp_path):
    losses = {}
    for name, changes in {
        "fused": {},
        "reference": {"head": "reference"},
        "bfloat16": {"amp_dtype": "bfloat16"},
    }.items():
        train(config(data, tmp_path / name, **distilled(teacher), **changes))
        losses[name] = [row["loss"] for row in run_folder.read_log(tmp_path / name) if row["kind"] == "train"]
        weights = checkpoint.load(tmp_path / name / "last.pt")["learner"]
        assert all(w.dtype == torch.float32 for w in weights.values() if w.is_floating_point())
    assert losses["reference"][0] == pytest.approx(losses["fused"][0], rel=1e-4)
    assert losses["reference"] == pytest.approx(losses["fused"], rel=0.02)  # rounding grows from step to step
    assert losses["bfloat16"] != losses["fused"]
    assert losses["bfloat16"] == pytest.approx(losses["fused"], rel=0.05)


def test_ema_is_what_is_evaluated_and_deployed(data, tmp_path):
    train(config(data, tmp_path, ema_decay=0.9))
    state = checkpoint.load(tmp_path / "last.pt")
    assert differing(state["ema"], {k: v for k, v in state["learner"].items() if k in state["ema"]}) == []
    assert differing(state["live"], state["learner"]) != []


@pytest.mark.parametrize("objective", ["ce", "ijckd", "dkd"])
def test_steps_never_wait_for_the_device(data, teacher, tmp_path, objective):
    """Three times the steps between two log lines, and not one wait more."""
    counts = []
    for steps in (4, 12):
        changes = {
            **distilled(teacher),
            "objective": objective,
            "ema_decay": 0.9,
            "log_interval": 1000,
            "eval_every": 1000,
        }
        with HostWaits() as waits:
            train(config(data, tmp_path / str(steps), max_steps=steps, **changes))
        counts.append(waits.count)
    assert counts[0] > 0  # logging and evaluating do wait, and are seen
    assert counts[0] == counts[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_never_wait_for_a_gpu(data, teacher, tmp_path, monkeypatch):
    step = Distiller.forward

    def watched(self, *arguments, **named):
        torch.cuda.set_sync_debug_mode("error")
        return step(self, *arguments, **named)

    monkeypatch.setattr(Distiller, "forward", watched)
    read = Meter.take

    def logging(self):
        torch.cuda.set_sync_debug_mode("default")
        return read(self)

    monkeypatch.setattr(Meter, "take", logging)
    changes = {
        **distilled(teacher),
        "device": "cuda",
        "data_backend": "synthetic",
        "ema_decay": 0.9,
        "log_interval": 12,
    }
    train(config(data, tmp_path, max_steps=12, eval_every=1000, **changes))


def _spoil(monkeypatch, steps):
    """The losses of the steps with these numbers (from 1) are NaN."""
    original, calls = Distiller.forward, []

    def step(self, *arguments, **named):
        calls.append(1)
        out = original(self, *arguments, **named)
        return out._replace(loss=out.loss * float("nan")) if len(calls) in steps else out

    monkeypatch.setattr(Distiller, "forward", step)


def test_steps_that_are_not_finite_are_skipped_and_counted(data, tmp_path, monkeypatch):
    _spoil(monkeypatch, {1, 6, 7})
    summary = train(config(data, tmp_path))
    rows = [row for row in run_folder.read_log(tmp_path) if row["kind"] == "train"]
    assert [row["skipped_steps"] for row in rows] == [1, 3, 3, 3, 3]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert summary["skipped_steps"] == 3
    checkpoint.load(tmp_path / "last.pt")  # refuses weights that are not finite


def test_too_many_skipped_steps_stop_the_run(data, tmp_path, monkeypatch):
    _spoil(monkeypatch, range(9, 100))
    with pytest.raises(
        UserError,
        match=(
            r"stopped at step 12: 4 steps .*--nonfinite-limit allows; the last good checkpoint is .*last\.pt "
            r"\(step 10\)"
        ),
    ):
        train(config(data, tmp_path, nonfinite_limit=3, checkpoint_steps=5))
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 10
    with pytest.raises(UserError, match="no checkpoint had been written yet"):
        train(config(data, tmp_path, nonfinite_limit=3), overwrite=True)


def _save_calls(monkeypatch):
    """Names and steps of the checkpoints that a run writes."""
    original, saved = checkpoint.Writer.save, []

    def save(self, path, state, then=None):
        saved.append((path.name, state["step"]))
        original(self, path, state, then)

    monkeypatch.setattr(checkpoint.Writer, "save", save)
    return saved


@pytest.mark.parametrize(
    ("room", "accumulate", "wanted"),
    [
        (
            3,
            1,
            "with 8 images .* on cpu; the last good checkpoint is .*last.pt \\(step 5\\). 2 fit: start again with "
            "--accumulate 4 ",
        ),
        (3, 2, "with 4 images .* 2 fit: start again with --accumulate 4 .* or resume where more memory is free"),
        (0, 1, "Not even one image fits: choose a smaller student"),
    ],
    ids=["whole", "in parts", "nothing fits"],
)
def test_out_of_memory_saves_and_says_what_fits(data, tmp_path, monkeypatch, room, accumulate, wanted):
    original, steps = Distiller.forward, []

    def step(self, images, labels, **named):
        steps.append(len(labels))
        if len(steps) > 5 * accumulate and len(labels) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, images, labels, **named)

    settings = config(data, tmp_path / "run", max_steps=8, accumulate=accumulate)
    with monkeypatch.context() as small:
        small.setattr(Distiller, "forward", step)
        with pytest.raises(UserError, match=f"out of memory at step 5 .*{wanted}"):
            train(settings)
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] == 5
    if room:
        train(settings, resume=True)
        train(config(data, tmp_path / "undisturbed", max_steps=8, accumulate=accumulate))
        ends = [checkpoint.load(tmp_path / name / "last.pt") for name in ("run", "undisturbed")]
        assert differing(*({key: end[key] for key in ("learner", "optimizer", "random", "step")} for end in ends)) == []


@pytest.mark.parametrize(
    ("room", "wanted"), [(3, "2 fit: start again with --batch-size 2, in more"), (0, "Not even one")]
)
def test_out_of_memory_with_a_loss_over_the_whole_batch(data, teacher, tmp_path, monkeypatch, room, wanted):
    """Which refuses parts, and a single image."""
    original = Distiller.forward

    def step(self, images, labels, **named):
        out = original(self, images, labels, **named)
        if len(labels) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return out

    monkeypatch.setattr(Distiller, "forward", step)
    with pytest.raises(UserError, match=f"out of memory at step 0 with 8 images .* {wanted}"):
        train(config(data, tmp_path, **{**distilled(teacher), "objective": "dist"}))


def test_sigusr1_saves_and_goes_on(data, tmp_path, monkeypatch):
    saved, update, calls = _save_calls(monkeypatch), FiniteGuard.update, []

    def updating(self, ok):
        calls.append(1)
        if len(calls) in (2, 5):
            os.kill(os.getpid(), signal.SIGUSR1)
        return update(self, ok)

    monkeypatch.setattr(FiniteGuard, "update", updating)
    before = signal.getsignal(signal.SIGUSR1)
    assert train(config(data, tmp_path, max_steps=8))["complete"]
    assert saved == [("last.pt", 2), ("last.pt", 5), ("best.pt", 8), ("last.pt", 8)]
    assert signal.getsignal(signal.SIGUSR1) == before


class _WeightsAndBiases(types.ModuleType):
    """Stands for the package `wandb`."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.begun, self.rows, self.finished = [], [], 0

    def init(self, **how):
        self.begun.append(how)
        return self

    def log(self, row, step):
        self.rows.append((step, row))

    def finish(self):
        self.finished += 1


def test_rows_go_to_weights_and_biases(data, tmp_path, monkeypatch):
    settings = config(data, tmp_path / "run", max_steps=8, wandb="tints")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match=r"--wandb tints needs the package: pip install 'ijckd-fast\[wandb\]', or leave"
    ):
        train(settings)
    fake = _WeightsAndBiases()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    _spoil(monkeypatch, {5, 6, 7, 8})
    train(settings)
    assert [step for step, _ in fake.rows] == [4, 8, 8]
    logged = run_folder.read_log(tmp_path / "run")
    assert fake.rows[0][1] == {f"train/{k}": v for k, v in logged[0].items() if k not in ("kind", "step")}
    assert "train/loss" not in fake.rows[1][1]  # no step was good, so there is none
    assert fake.rows[2][1]["eval/top1_percent"] == logged[2]["top1_percent"]
    assert fake.finished == 1
    (tmp_path / "run" / "summary.json").unlink()
    train(settings, resume=True)
    first, again = fake.begun
    assert (first["project"], first["name"], first["resume"]) == ("tints", "run", "allow")
    assert first["config"]["max_steps"] == 8
    assert again["id"] == first["id"]
    assert fake.finished == 2


def test_a_line_of_progress_names_what_bounds_the_speed(data, tmp_path, monkeypatch):
    assert [bottleneck(percent).split()[0] for percent in (0, 20, 21, 100)] == ["compute-bound"] * 2 + [
        "data-bound"
    ] * 2
    said = io.StringIO()
    take = Stopwatch.take
    monkeypatch.setattr(Stopwatch, "take", lambda self: {**take(self), "loader_wait_percent": waits.pop(0)})
    waits = [60.0, 5.0]
    loud_train(config(data, tmp_path, max_steps=8), console=Console(file=said, width=200))
    lines = [line for line in said.getvalue().splitlines() if "images/s" in line]
    assert "step 4/8, epoch 1.00, lr 0.05, loss " in lines[0]
    speed, left = lines[0].split("images/s  ")[1].rsplit(", ", 1)
    assert speed == "data-bound (60 % waiting for data)"
    assert re.fullmatch(r"\d:\d\d:\d\d left", left)
    assert lines[1].split("images/s  ")[1] == "compute-bound (5 % waiting for data)"  # at the end nothing is left
    rows = [row for row in run_folder.read_log(tmp_path) if row["kind"] == "train"]
    assert all(10 < row["memory_mb"] < 100_000 for row in rows)


def test_a_clock_that_is_set_changes_nothing(data, tmp_path, monkeypatch):
    """By a day to and fro, at every look: nothing is saved sooner or later, and no figure is odd."""
    saved, days = _save_calls(monkeypatch), itertools.cycle([0, 86_400, -86_400])
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + next(days))
    summary = train(config(data, tmp_path, max_steps=8))
    assert saved == [("best.pt", 8), ("last.pt", 8)]
    assert 0 < summary["seconds"] < 600
    assert 0 < summary["images_per_s"] < 1e6
    assert all(0 <= row["loader_wait_percent"] <= 100 for row in run_folder.read_log(tmp_path) if "loss" in row)


# --- what is refused, in a sentence, before anything is lost


class _Stubborn(nn.BatchNorm2d):
    """Takes the statistics of the batch whatever eval() says; one that admits it, one that does not."""

    admits = True

    def train(self, mode=True):
        return super().train(mode or self.admits)

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1)


@pytest.mark.parametrize(
    ("fault", "wanted"),
    [
        ("dropout", "gives other features for the same images a second time"),
        ("training mode", r"has a layer \(net\.bn1\) that stays in training mode"),
        ("statistics", r"changes its own buffers \(net\.bn1\.running_mean\)"),
    ],
    ids=["dropout", "training mode", "statistics"],
)
def test_a_teacher_that_eval_does_not_freeze(data, teacher, tmp_path, monkeypatch, fault, wanted):
    net = create_model("resnet8x0.5", 3, checkpoint=teacher, image_size=16)
    if fault == "dropout":
        net.net.layer3.register_forward_hook(lambda _module, _given, out: F.dropout(out, 0.5, training=True))
    else:
        net.net.bn1 = _Stubborn(11)
        net.net.bn1.admits = fault == "training mode"
    monkeypatch.setattr("ijckd_fast.train.build.build_teacher", lambda *_: net)
    text = f"teacher resnet8x0.5 {wanted}.*, wanted a net that eval.. makes one fixed function.*take another teacher"
    with pytest.raises(UserError, match=text):
        train(config(data, tmp_path, **distilled(teacher)))
    assert not (tmp_path / "config.yaml").exists()


def test_weak_teacher(data, teacher, tmp_path):
    # Three classes, 18 images: chance is 6 hits, and the first number that it hardly ever reaches is 13.
    changes = {**distilled(teacher), "allow_weak_teacher": False}
    text = (
        r"has a top-1 of .* near chance \(33.33 %\): it has \d+ hits; .* expected below 0.001 \(from 13 hits on\)\."
        r".*another order.*--class-list.*--teacher-mean.*--allow-weak-teacher"
    )
    with pytest.raises(UserError, match=text):
        train(config(data, tmp_path, **changes))
    # The folder holds no run yet, so that the corrected command simply works.
    train(config(data, tmp_path, **{**changes, "allow_weak_teacher": True}))


@pytest.mark.parametrize("objective", ["dist", "srd"])
def test_a_batch_in_parts_is_refused_for_losses_over_a_whole_batch(data, teacher, tmp_path, objective):
    changes = {**distilled(teacher), "objective": objective, "accumulate": 2}
    with pytest.raises(UserError, match=f"objective '{objective}' has statistics over all images .* --accumulate 2"):
        resolve(config(data, tmp_path, **changes))


def answers(predictions: list[int]) -> Evaluation:
    """As if the teacher had been asked about the first images of val."""
    ids = torch.arange(len(predictions))
    return Evaluation(50.0, 100.0, None, len(ids), 1.0, torch.tensor(predictions), ids)


def test_a_teacher_is_judged_by_the_labels_of_the_images_it_saw(data, tmp_path):
    val = build_index(data, "val")  # six images of each of three classes
    said: list[str] = []
    judge = functools.partial(refuse_weak_teacher, config(data, tmp_path, teacher="resnet8"), val=val, say=said.append)
    judge(answers(val.labels.tolist()))
    assert said == []
    with pytest.raises(UserError, match=r"it has 12 hits; 12 or more come about by chance .* of 0\.0039, expected"):
        judge(answers([0] * 6 + [1] * 6 + [0] * 6))
    with pytest.raises(UserError, match=r"near chance \(33\.33 %\): it has 6 hits;"):
        judge(answers([2] * 18))
    everyone = answers(val.labels.tolist())
    judge(everyone._replace(ids=everyone.ids.flip(0), predictions=everyone.predictions.flip(0)))  # of several processes
    assert said == []


def test_a_val_split_too_small_to_judge_a_teacher_is_said_to_be(data, tmp_path):
    said: list[str] = []
    val = build_index(data, "val")
    few = answers([0, 0, 0, 1, 1, 1])._replace(ids=torch.tensor([0, 1, 6, 7, 12, 13]))
    refuse_weak_teacher(config(data, tmp_path, teacher="resnet8"), few, val, said.append)
    assert said == [
        "warning: 6 val images are too few to tell whether teacher resnet8 (3 hits) is better than chance (2.0 hits)"
    ]


def test_a_teacher_that_is_hardly_better_than_chance_is_warned_of(data, tmp_path):
    said: list[str] = []
    val = dataclasses.replace(build_index(data, "val"), labels=np.arange(18) % 2, classes=["ant", "bee"])
    many = answers([0, 1] * 9)  # a stand-in for thousands of images: each is asked about 300 times
    ids, predictions = many.ids.repeat(300), many.predictions.repeat(300)
    predictions[:2400] = 1 - predictions[:2400]
    judge = functools.partial(refuse_weak_teacher, config(data, tmp_path, teacher="resnet8"), val=val, say=said.append)
    judge(many._replace(ids=ids, predictions=predictions))
    assert len(said) == 1
    assert said[0].startswith("warning: teacher resnet8 is better than chance (50.00 %), but not by much: its classes")


def test_good_teacher_passes(data, tmp_path):
    train(config(data, tmp_path / "teacher", student="resnet8x0.5", epochs=12, warmup_epochs=1))
    changes = {**distilled(tmp_path / "teacher" / "best.pt"), "allow_weak_teacher": False}
    summary = train(config(data, tmp_path / "student", **changes))
    assert summary["teacher_top1_percent"] == checkpoint.load(tmp_path / "teacher" / "best.pt")["best"]["top1_percent"]


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_an_earlier_run_brings_its_name_and_weights(data, tmp_path, role):
    train(config(data, tmp_path / "earlier", student="resnet8x0.5", epochs=2))
    for path in (tmp_path / "earlier", tmp_path / "earlier" / "last.pt"):
        resolved = resolve(
            config(data, tmp_path / "new", objective="kd" if role == "teacher" else "ce", **{role: str(path)})
        )
        assert getattr(resolved, role) == "resnet8x0.5"
        distiller = build_distiller(resolved, 3, torch.device("cpu"))
        net = distiller.teacher if role == "teacher" else distiller.student
        earlier = checkpoint.load(tmp_path / "earlier" / "last.pt")["learner"]
        assert all(torch.equal(value, earlier[f"student.{name}"]) for name, value in net.state_dict().items())


def test_a_path_that_is_no_run_or_names_two_weights(data, teacher, tmp_path):
    with pytest.raises(
        UserError, match=r"is not a checkpoint.*weights from elsewhere need --teacher NAME --teacher-checkpoint"
    ):
        resolve(config(data, tmp_path, objective="kd", teacher=str(teacher)))
    with pytest.raises(UserError, match="other weights for the teacher are given too"):
        resolve(config(data, tmp_path, objective="kd", teacher=str(teacher), teacher_checkpoint=str(teacher)))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data_dir": ""}, "no --data-dir given"),
        ({"objective": "ijckt"}, "unknown objective 'ijckt'.*did you mean 'ijckd'"),
        ({"objective": "ijckd"}, "objective 'ijckd' needs a teacher"),
        ({"objective": "kd", "teacher": "resnet8x0.5"}, "teacher resnet8x0.5 has no weights: give --teacher-checkp"),
        ({"student": "resnet9"}, "unknown model 'resnet9'.*did you mean"),
        ({"batch_size": 37}, "37 images .*has 36; lower the batch size"),
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"decode": "gpu", "data_backend": "pillow"}, "--decode gpu is DALI's, got --data-backend pillow"),
        ({"blocks_on": "gpu", "data_backend": "pillow"}, "--blocks-on gpu is for block packs, got --data-backend pi"),
        ({"nesterov": True, "momentum": 0.0}, "--nesterov needs a --momentum"),
        ({"ema_decay": 1.0}, r"--ema-decay must lie in \[0, 1\)"),
        ({"eval_resize": 8}, "eval_resize"),
        ({"optimizer": "adamw", "nesterov": True}, "--nesterov is SGD's, got --optimizer adamw: leave it out"),
        ({"betas": (0.9, 1.0)}, r"--betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (-0.1, 0.9)}, "--betas must be two numbers"),
        ({"clip_grad": 0.0}, "--clip-grad must be above 0, got 0.0: 1 to 5 are usual"),
        ({"accumulate": 0}, "--accumulate must be at least 1"),
        ({"accumulate": 3}, "global batch of 8 images cannot .* --accumulate 3 in equal parts: wanted a multiple of 3"),
        ({"global_batch": 9, "accumulate": 2}, "global batch of 9 images cannot"),
        ({"amp_dtype": "float16"}, "--amp-dtype float16 needs a GPU, got --device cpu: use bfloat16 or float32"),
        ({"cuda_graph": True}, "--cuda-graph is for one GPU and sgd or adamw, got --device cpu"),
    ],
)  # fmt: skip
def test_impossible_settings(data, tmp_path, changes, text):
    with pytest.raises(UserError, match=text):
        train(config(data, tmp_path, **changes))


def test_the_margin_of_the_evaluation(data, tmp_path):
    own = {"eval_resize": None, "image_size": 32}
    assert resolve(config(data, tmp_path, **own)).eval_resize == 37
    assert resolve(config(data, tmp_path, **own, crop_padding=4)).eval_resize == 32  # none, as in training
    assert resolve(config(data, tmp_path, image_size=32, crop_padding=4, eval_resize=36)).eval_resize == 36


def test_the_global_batch_takes_the_place_of_a_processes(data, tmp_path):
    resolved = resolve(config(data, tmp_path, global_batch=12, batch_size=8, accumulate=3))
    assert (resolved.global_batch, resolved.batch_size) == (12, 12)
    assert resolve(config(data, tmp_path, batch_size=8)).global_batch == 8


def test_teacher_of_other_classes_or_nan(data, tmp_path):
    other = write_teacher(tmp_path / "other.pt", classes=5)
    with pytest.raises(UserError, match=r"classifies 5 classes, expected 3 as in the data"):
        train(config(data, tmp_path / "run", **distilled(other)))
    spoiled = write_teacher(tmp_path / "spoiled.pt")
    weights = torch.load(spoiled)
    weights["fc.weight"][0, 0] = float("nan")
    torch.save(weights, spoiled)
    with pytest.raises(UserError, match=r"spoiled\.pt: tensor 'fc.weight' holds NaN"):
        train(config(data, tmp_path / "run", **distilled(spoiled)))


def test_a_folder_holds_one_run(data, tmp_path):
    train(config(data, tmp_path))
    before = {
        path.name: path.read_bytes()
        for path in tmp_path.iterdir()
        if path.is_file() and path.name not in (files.LOCK, files.HOLDER)
    }
    with pytest.raises(
        UserError, match=r"holds a finished run: continue it with --resume .*--output-dir, or give --overwrite"
    ):
        train(config(data, tmp_path))
    with files.lock(tmp_path), pytest.raises(UserError, match=r"another run .* is writing to"):
        train(config(data, tmp_path), overwrite=True)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    (tmp_path / "notes.txt").write_text("mine")
    train(config(data, tmp_path, epochs=1), overwrite=True)
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 4
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_presets():
    """Each packaged preset is complete and valid; the ImageNet ones are the published recipes."""
    assert len(preset_names()) == 24
    for name in preset_names():
        values = load_preset(name)
        given = {"data_dir": "data", "allow_weak_teacher": True}
        resolve(make_config({**values, **given}))
    wanted = (
        "epochs",
        "global_batch",
        "lr",
        "milestones",
        "gamma",
        "momentum",
        "weight_decay",
        "objective",
        "image_size",
    )
    r18, mobilenet = (
        [make_config(load_preset(f"imagenet_{pair}")).__dict__[field] for field in wanted]
        for pair in ("r34_r18", "r50_mobilenetv1")
    )
    assert r18 == [120, 256, 0.1, (30, 60, 90), 0.1, 0.9, 1e-4, "ijckd", 224]
    assert mobilenet == [100, 512, 0.2, (30, 60, 90), 0.1, 0.9, 1e-4, "ijckd", 224]


def test_published_pairs_deploy_what_they_are_said_to(data, tmp_path):
    """Backbone + connector + teacher's classifier at 1000 classes, the published sizes; counting needs no weights."""
    costs = {}
    for pair in ("r34_r18", "r50_mobilenetv1"):
        values = {
            **load_preset(f"imagenet_{pair}"),
            "teacher_pretrained": False,
            "allow_weak_teacher": True,
            "data_dir": "x",
        }
        distiller = build_distiller(resolve(make_config(values)), 1000, torch.device("cpu"))
        costs[pair] = distiller.deployed_cost(224)[0]
    assert costs == {"r34_r18": 11_689_512 + 854_016, "r50_mobilenetv1": 4_231_976 - 1_025_000 + 12_591_104 + 2_049_000}


# ----------------------------------------------------------------------------------------------------------------------
# nothing is lost, nothing is taken for something else


def test_overwrite_deletes_only_when_nothing_can_be_refused_any_more(data, teacher, tmp_path):
    run = tmp_path / "run"
    train(config(data, run))
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix in (".pt", ".json", ".yaml")}
    with pytest.raises(UserError, match="lower the batch size"):
        train(config(data, run, batch_size=1000), overwrite=True)
    weak = {**distilled(teacher), "allow_weak_teacher": False}
    with pytest.raises(UserError, match="near chance"):
        train(config(data, run, **weak), overwrite=True)
    with pytest.raises(UserError, match="--overwrite would delete the teacher's weights"):
        train(config(data, run, objective="kd", teacher=str(run)), overwrite=True)
    assert all((run / name).read_bytes() == content for name, content in before.items())
    train(config(data, run, seed=1), overwrite=True)
    assert (run / "last.pt").read_bytes() != before["last.pt"]


def test_a_model_name_is_never_taken_for_a_folder(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(config(data, tmp_path / "resnet8x0.25", epochs=1))
    assert resolve(config(data, tmp_path / "new", student="resnet8x0.25")).student_checkpoint is None
    assert resolve(config(data, tmp_path / "new", student="./resnet8x0.25")).student_checkpoint is not None


def test_batch_of_one_says_what_to_do(data, teacher, tmp_path):
    settings = {**distilled(teacher), "connector": "mlp", "match": "pooled", "batch_size": 1}
    with pytest.raises(UserError, match="use --batch-size 2 or more"):
        train(config(data, tmp_path, **settings))


def test_gpu_without_the_cuda_library(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("ijckd_fast.train.resolving.load_libraries", lambda: False)
    with pytest.raises(UserError, match=r"_C_cuda.so was not built.*--device cpu, or --head reference"):
        resolve(config(data, tmp_path, device="cuda"))
    assert resolve(config(data, tmp_path, device="cuda", head="reference")).device == "cuda"


def test_every_field_of_the_objective_can_be_set(data, teacher, tmp_path):
    changes = {"dkd_alpha": 2.0, "dkd_beta": 3.0, "dkd_warmup": 0.5, "ce": 0.25}
    resolved = resolve(config(data, tmp_path, **{**distilled(teacher), "objective": "dkd", **changes}))
    objective = build_distiller(resolved, 3, torch.device("cpu")).objective
    assert {name: getattr(objective, name) for name in changes} == changes
    resolved = resolve(
        config(data, tmp_path, **{**distilled(teacher), "objective": "srrl", "ce_head": "teacher", "kl": 1.0})
    )
    assert (resolved.ce_head, resolved.kl_head) == ("teacher", "student")
    changes = {"at": 3.0, "hint": 2.0, "hint_stage": 2}
    resolved = resolve(config(data, tmp_path, **{**distilled(teacher), **changes}))
    distiller = build_distiller(resolved, 3, torch.device("cpu"))
    assert {name: getattr(distiller.objective, name) for name in changes} == changes
    assert [stage.path for stage, _ in distiller.stage_pairs] == ["layer1", "layer2", "layer3"]
    assert distiller.regressor.weight.shape == (16, 8)  # channels of layer2


def test_goes_on_from_the_checkpoint_that_is_named(data, tmp_path):
    run = tmp_path / "run"
    train(config(data, run, eval_every=2, epochs=4, max_steps=12))
    whole = checkpoint.load(run / "last.pt")["learner"]
    (run / "summary.json").unlink()
    (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:3000])
    again = functools.partial(train, make_config({**run_folder.read_config(run)}), resume=True)
    with pytest.raises(
        UserError, match=r"damaged or truncated: use the run's other checkpoint, .*best.pt \(ijckd-fast train --resume"
    ):
        again()
    again(resume_from="best.pt")
    assert differing(checkpoint.load(run / "last.pt")["learner"], whole) == []


def test_resume_computes_with_the_runs_threads(data, tmp_path):
    run, threads = tmp_path / "run", torch.get_num_threads()
    train(config(data, run, epochs=1))
    (run / "summary.json").unlink()
    try:
        torch.set_num_threads(threads + 1)
        train(make_config(run_folder.read_config(run)), resume=True)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("content", ["", "lr: [1"])
def test_damaged_settings(data, tmp_path, content):
    train(config(data, tmp_path, epochs=1))
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        run_folder.read_config(tmp_path)
