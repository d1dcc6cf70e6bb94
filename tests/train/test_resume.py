"""A run that is killed and resumed ends with the same bits as one that never was."""

from __future__ import annotations

import errno
import functools
import io
import itertools
import json
import os
import random
import signal
import threading
from pathlib import Path

import pytest
import recorded_run
import torch
import torch.nn.functional as F
import yaml
from hub_shards import write_hub
from processes import Run
from rich.console import Console
from tiny_run import config, differing, distilled, options, settings, write_teacher, write_tree

from ijckd_fast import cli
from ijckd_fast.data import build_index
from ijckd_fast.data.prepare import BlockPack, pack
from ijckd_fast.errors import UserError
from ijckd_fast.nets import Tapped
from ijckd_fast.train import FiniteGuard, Stopped, checkpoint, run_folder, train as loud_train
from ijckd_fast.train.config import FREE_ON_RESUME

train = functools.partial(loud_train, console=Console(quiet=True))
TOTAL = 60


def _steps(folder) -> int:
    rows = run_folder.read_log(folder)
    return rows[-1]["step"] if rows else 0


def _assert_same_end(folder, undisturbed):
    a, b = (checkpoint.load(each / "last.pt") for each in (folder, undisturbed))
    for state in (a, b):
        del state["seconds"]
        for row in (state["best"], state["evaluated"]):
            row.pop("seconds", None)  # both may be one and the same row
            row.pop("images_per_s", None)
        state["config"] = {key: value for key, value in state["config"].items() if key not in FREE_ON_RESUME}
    assert a["step"] == b["step"]
    assert differing(a, b) == []


def _figures(folder) -> list[dict]:
    """The rows of the log without what depends on the clock."""
    clock = ("images_per_s", "loader_wait_percent", "memory_mb", "seconds")
    return [{key: value for key, value in row.items() if key not in clock} for row in run_folder.read_log(folder)]


@pytest.mark.parametrize(("backend", "layout"), [("dali", "folders"), ("dali", "archives"), ("blocks", "pack")])
def test_killed_at_a_random_step(data, teacher, tmp_path, backend, layout):
    """60 steps of the whole objective, stages too, with mixing and EMA, kill -9 twice at random steps between
    checkpoints: the same batches, the same weights."""
    if layout == "archives":
        data = write_hub(tmp_path / "hub", [build_index(data, "train"), build_index(data, "val")], per_shard=10)
    if layout == "pack":
        pack(data, tmp_path / "pack", BlockPack(short=0, shard_gb=4000 / 2**30), workers=1)
        data = tmp_path / "pack"
    changes = {
        **distilled(teacher), "epochs": TOTAL // 4, "data_backend": backend, "ema_decay": 0.9, "checkpoint_steps": 7,
        "log_interval": 1, "warmup_epochs": 2, "schedule": "cosine", "label_smoothing": 0.1, "mixup": 0.2, "at": 10.0,
        "hint": 1.0,
    }  # fmt: skip
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    records = tmp_path / "undisturbed.txt", tmp_path / "killed.txt"
    seed = random.randrange(10_000)
    kills = sorted(random.Random(seed).sample(range(5, TOTAL - 3), 2))
    print(f"kills at steps {kills}: random.Random({seed})")

    with recorded_run.recording(records[0]):
        train(config(data, undisturbed, **{**changes, "checkpoint_steps": 1000}))
    start = functools.partial(Run, tmp_path, 1, recorded_run.recorded, str(records[1]))
    run = start(["train", *options(settings(data, folder, **changes))])
    for kill in kills:
        run.wait_until(lambda kill=kill: _steps(folder) >= kill)
        run.signal(signal.SIGKILL)
        assert run.ends() == [-signal.SIGKILL]
        run = start(["train", "--resume", str(folder)])
    assert run.ends() == [0], run.output()
    want, got = map(recorded_run.read, records)
    assert [seen.step for seen in want] == list(range(TOTAL))
    assert len(set(want)) == TOTAL
    assert set(got) == set(want)
    begins = [b.step for a, b in itertools.pairwise(got) if b.step != a.step + 1]  # where a resumed run went on
    assert len(begins) <= len(kills)
    assert all(step % 7 == 0 for step in begins)
    assert (got[0], got[-1]) == (want[0], want[-1])
    _assert_same_end(folder, undisturbed)
    assert _figures(folder) == _figures(undisturbed)
    assert json.loads((folder / "summary.json").read_text())["complete"]


def test_killed_before_the_first_checkpoint(data, tmp_path):
    folder = tmp_path / "run"
    run = Run(tmp_path, 1, cli.main, ["train", *options(settings(data, folder, log_interval=1))])
    run.wait_until(lambda: _steps(folder) > 0)
    run.signal(signal.SIGKILL)
    assert run.ends() == [-signal.SIGKILL]
    assert not (folder / "last.pt").exists()
    train(config(data, folder, log_interval=1), resume=True)
    train(config(data, tmp_path / "undisturbed", log_interval=1))
    _assert_same_end(folder, tmp_path / "undisturbed")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_says_how_to_go_on(data, tmp_path, number, code):
    folder = tmp_path / "run"
    run = Run(tmp_path, 1, cli.main, ["train", *options(settings(data, folder, epochs=1000, log_interval=1))])
    run.wait_until(lambda: _steps(folder) >= 3)
    run.signal(number)
    assert run.ends() == [code], run.output()
    output = run.output()
    assert f"stopped by {number.name} at step" in output
    assert f"ijckd-fast train --resume {folder}" in output
    assert "Traceback" not in output
    assert checkpoint.load(folder / "last.pt")["step"] == _steps(folder)


def _stop_at(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """The process gets the signal during the update of step `step`."""
    original, calls = FiniteGuard.update, []

    def updating(self, ok):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return original(self, ok)

    monkeypatch.setattr(FiniteGuard, "update", updating)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "betas": (0.8, 0.99), "lr": 0.01},
        {"optimizer": "lamb", "lr": 0.01, "decay_norms": False},
        {"accumulate": 2},
        {"clip_grad": 0.1},
        {"ema_decay": 0.9},
        {"decay_norms": False, "nesterov": True},
        {"amp_dtype": "bfloat16"},
        {"fold_teacher": False},
        {"crop_padding": 3, "mixup": 0.2, "affine_rotate": 15.0, "affine_scale": 0.2},
        {"objective": "ijckd-pooled", "connector": "linear"},
        {"drop_path": 0.4, "student": "timm/test_resnet"},
    ],
    ids=lambda changes: "{}={}".format(*next(iter(changes.items()))),
)
def test_stopped_at_a_random_step_with_every_option(data, teacher, tmp_path, monkeypatch, changes):
    _stop_and_go_on(data, tmp_path, monkeypatch, **{**distilled(teacher), **changes})


def _stop_and_go_on(data, tmp_path, monkeypatch, **settings) -> None:
    """7 steps, and again with a stop at a random one: equal checkpoints and logs."""
    settings["max_steps"] = 7
    train(config(data, tmp_path / "undisturbed", **settings))
    step = random.randrange(2, 7)
    with monkeypatch.context() as stopping:
        _stop_at(stopping, step)
        with pytest.raises(Stopped, match=f"at step {step} of 7"):
            train(config(data, tmp_path / "run", **settings))
    train(config(data, tmp_path / "run", **settings), resume=True)
    _assert_same_end(tmp_path / "run", tmp_path / "undisturbed")
    assert _figures(tmp_path / "run") == _figures(tmp_path / "undisturbed")


def test_stopped_with_a_compiled_student(data, tmp_path, monkeypatch):
    """By the compiler's front end alone: what its back ends make of the graphs takes minutes."""
    compile_, compiled = torch.nn.Module.compile, []

    def compile_in_front(self):
        compiled.append(self)
        compile_(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_in_front)
    _stop_and_go_on(data, tmp_path, monkeypatch, compile=True)
    assert len(compiled) == 3  # the student of each part of a run


def test_loss_scale_goes_on_where_it_stopped(data, teacher, tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler

    def growing(device, enabled):
        assert not enabled  # for float16 alone, which takes a GPU
        return scaler(device, init_scale=2.0**10, growth_interval=2)

    monkeypatch.setattr(torch.amp, "GradScaler", growing)
    _stop_and_go_on(data, tmp_path, monkeypatch, **distilled(teacher))
    assert checkpoint.load(tmp_path / "run" / "last.pt")["scaler"]["scale"] == 2.0**13  # grown three times in 7 steps


def _names(folder) -> list[str]:
    return [path.name for path in run_folder.kept(folder)]


def test_goes_on_from_a_checkpoint_that_was_kept(data, tmp_path, monkeypatch):
    keeping = {"checkpoint_steps": 4, "keep_checkpoints": 3}
    train(config(data, tmp_path / "undisturbed", **keeping))
    assert _names(tmp_path / "undisturbed") == ["checkpoint-12.pt", "checkpoint-16.pt", "checkpoint-20.pt"]
    run = tmp_path / "run"
    with monkeypatch.context() as stopping:
        _stop_at(stopping, 14)
        with pytest.raises(Stopped):
            train(config(data, run, **keeping))
    assert _names(run) == ["checkpoint-8.pt", "checkpoint-12.pt", "checkpoint-14.pt"]
    assert [checkpoint.load(path)["step"] for path in (*run_folder.kept(run), run / "last.pt")] == [8, 12, 14, 14]
    assert cli.main(["train", "--resume", str(run / "checkpoint-8.pt")]) == 0
    _assert_same_end(run, tmp_path / "undisturbed")
    assert _figures(run) == _figures(tmp_path / "undisturbed")
    assert _names(run)[1:] == ["checkpoint-16.pt", "checkpoint-20.pt"]


def test_mixed_views_of_growing_images_go_on_where_they_stopped(data, teacher, tmp_path, monkeypatch):
    """Every batch is the plan's: nothing of mixing, views and sizes is state of the run."""
    options = {
        **distilled(teacher), "epochs": 3, "mixup": 0.2, "cutmix": 1.0, "repeats": 2, "sizes": ("12@0", "16@1", "20@2"),
    }  # fmt: skip
    undisturbed = train(config(data, tmp_path / "undisturbed", **options))
    plain = train(config(data, tmp_path / "plain", **{**options, "mixup": 0.0, "cutmix": 0.0}))
    assert plain["last"] != undisturbed["last"]
    settings = config(data, tmp_path / "stopped", **options)
    _stop_at(monkeypatch, 7)
    with pytest.raises(Stopped):
        train(settings)
    train(settings, resume=True)
    _assert_same_end(tmp_path / "stopped", tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"sizes": ("128",)}, "--sizes must be PIXELS@EPOCH for every change, e.g. 128@0,192@30, got 128"),
        ({"sizes": ("128@1",)}, "epochs rising from 0"),
        ({"mixup": 3.0}, "mixup must be an alpha from 0.1 to 1"),
        ({"crop_padding": -1}, "--crop-padding must be at least 0, got -1"),
        ({"crop_padding": 16}, "crop_padding must be from 0 .* to 15 pixels"),
        ({"crop_padding": 2, "scale": (0.5, 1.0)}, "crop_padding 2 replaces the random resized crop"),
        ({"affine_rotate": -1.0}, "--affine-rotate must be at least 0, got -1.0"),
        ({"affine_scale": 1.0}, "affine_scale must be from 0 .* to below 1, found 1.0"),
        ({"affine_fill": 255.0}, "affine_fill 255 is what warps show .* found none; set one, or leave affine_fill out"),
    ],
)
def test_augmentations_that_make_no_sense_are_refused(data, tmp_path, setting, text):
    with pytest.raises(UserError, match=text):
        train(config(data, tmp_path / "run", **{**setting, "data_dir": str(tmp_path / "no data is looked at")}))


def test_dropout_continues_its_random_numbers(data, tmp_path, monkeypatch):
    features = Tapped.features

    def dropping(self, *arguments, **named):
        map_, pooled = features(self, *arguments, **named)
        return map_, F.dropout(pooled, 0.5, self.training)

    monkeypatch.setattr(Tapped, "features", dropping)
    train(config(data, tmp_path / "undisturbed"))
    with monkeypatch.context() as stopping:
        _stop_at(stopping, 7)
        with pytest.raises(Stopped, match="at step 7 of 20"):
            train(config(data, tmp_path / "run"))
    torch.rand(5)
    train(config(data, tmp_path / "run"), resume=True)
    _assert_same_end(tmp_path / "run", tmp_path / "undisturbed")
    assert _figures(tmp_path / "run") == _figures(tmp_path / "undisturbed")


def test_disk_full_at_a_checkpoint_then_resumed(data, tmp_path, monkeypatch):
    train(config(data, tmp_path / "undisturbed", checkpoint_steps=3))
    folder = tmp_path / "run"
    fsync, calls = os.fsync, []

    def filling(descriptor):
        if threading.current_thread().name == "checkpoint":  # the writer's
            calls.append(1)
        if len(calls) > 4:  # two checkpoints, each with its folder, before the disk is full
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", filling)
        with pytest.raises(UserError, match=r"no space left .* the previous .*last\.pt is untouched"):
            train(config(data, folder, checkpoint_steps=3))
    assert checkpoint.load(folder / "last.pt")["step"] == 6
    train(config(data, folder, checkpoint_steps=3), resume=True)
    _assert_same_end(folder, tmp_path / "undisturbed")


def _rot(path: Path) -> bytes:
    """Damage that a look at length and time does not show; returns what was there."""
    good, status = path.read_bytes(), path.stat()
    path.write_bytes(bytes(len(good)))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return good


@pytest.mark.parametrize("backend", ["pillow", "dali"])
def test_files_that_rot_after_indexing_do_not_stop_a_run(tmp_path, backend, teacher):
    data = write_tree(tmp_path / "data")
    for split in ("train", "val"):
        build_index(data, split)
    _rot(data / "train" / "bee" / "003.jpg")
    _rot(data / "val" / "cat" / "002.jpg")
    said = io.StringIO()
    settings = {"epochs": 2, "data_backend": backend, "eval_every": 1, **distilled(teacher)}
    summary = train(config(data, tmp_path / "run", **settings), console=Console(file=said, width=1000))
    assert summary["complete"]
    assert summary["unreadable_files"] == 2
    assert summary["last"]["images"] == 17
    assert summary["last"]["agreement_percent"] is not None
    for path, what in (
        ("train/bee/003.jpg", "another image of its class stands in"),
        ("val/cat/002.jpg", "it is left out"),
    ):
        (line,) = [line for line in said.getvalue().splitlines() if path in line]
        assert "cannot be read any more" in line
        assert what in line
    assert [row["unreadable_files"] for row in _figures(tmp_path / "run") if "loss" in row][-1] == 1
    assert "| unreadable files | 2" in (tmp_path / "run" / "report.md").read_text()


def test_too_many_unreadable_files_stop_the_run_where_it_can_go_on(data, tmp_path):
    undisturbed = train(config(data, tmp_path / "undisturbed", epochs=2))
    own = write_tree(tmp_path / "data")
    for split in ("train", "val"):
        build_index(own, split)
    bad = own / "train" / "bee" / "003.jpg"
    good = _rot(bad)
    with pytest.raises(UserError) as caught:
        train(config(own, tmp_path / "run", epochs=2, unreadable_limit=0))
    assert "1 file of" in str(caught.value)
    assert str(bad) in str(caught.value)
    assert f"everything is saved: fix the data and continue with ijckd-fast train --resume {tmp_path / 'run'}" in str(
        caught.value
    )
    status = bad.stat()
    bad.write_bytes(good)
    os.utime(bad, ns=(status.st_atime_ns, status.st_mtime_ns))
    resumed = train(config(own, tmp_path / "run", epochs=2), resume=True)
    assert resumed["last"]["top1_percent"] == undisturbed["last"]["top1_percent"]
    _assert_same_end(tmp_path / "run", tmp_path / "undisturbed")


def test_resume_refuses_what_would_change_the_result(data, teacher, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as stopping:
        _stop_at(stopping, 5)
        with pytest.raises(Stopped):
            train(config(data, folder, **distilled(teacher)))

    def complaint(*arguments: str) -> str:
        assert cli.main(["train", "--resume", str(folder), *arguments]) == 2
        return capsys.readouterr().err

    assert "begun with lr = 0.05 and cannot be resumed with 0.2" in complaint("--lr", "0.2")
    assert "begun with epochs = 5" in complaint("--epochs", "6")
    assert "begun with connector = bottleneck:2" in complaint("--connector", "conv1x1")
    assert "give one of them" in complaint("--overwrite")
    before = (folder / "last.pt").read_bytes()

    image = next((data / "train" / "ant").iterdir())
    content = image.read_bytes()
    image.write_bytes((data / "train" / "bee" / "000.jpg").read_bytes())
    assert "the training images differ from those the run began with" in complaint("--check-files")
    image.write_bytes(content)
    assert cli.main(["index", str(data)]) == 0
    one_more = image.with_name("more.jpg")
    one_more.write_bytes(content)
    assert "the training images differ from those the run began with" in complaint()
    one_more.unlink()

    other = write_teacher(tmp_path / "other.pt")
    weights = torch.load(other)
    weights["fc.bias"][0] += 1
    torch.save(weights, other)
    assert "the teacher differ" in complaint("--teacher-checkpoint", str(other))

    last = folder / "last.pt"
    last.write_bytes(before[:1000])
    assert "is damaged or truncated" in complaint()
    last.write_bytes(before)

    # What changes nothing may change; the moved data are the same data.
    moved = data.with_name("moved")
    data.rename(moved)
    try:
        assert (
            cli.main(["train", "--resume", str(folder), "--data-dir", str(moved), "--workers", "1", "--lr", "0.05"])
            == 0
        )
    finally:
        moved.rename(data)
    train(config(data, tmp_path / "undisturbed", **distilled(teacher)))
    _assert_same_end(folder, tmp_path / "undisturbed")


def test_finished_run_is_not_trained_again(data, tmp_path, capsys):
    folder = tmp_path / "run"
    summary = train(config(data, folder))
    before = (folder / "last.pt").read_bytes()
    assert cli.main(["train", "--resume", str(folder / "last.pt")]) == 0
    assert "finished, nothing to resume" in capsys.readouterr().out
    assert (folder / "last.pt").read_bytes() == before
    assert train(config(data, folder), resume=True)["seconds"] == summary["seconds"]
    assert cli.main(["train", "--resume", str(folder / "best.pt")]) == 2
    assert "is finished, and best.pt is of a step on its way: delete summary.json" in capsys.readouterr().err


def test_killed_between_the_last_checkpoint_and_the_report(data, tmp_path):
    summary = train(config(data, tmp_path))
    for name in ("summary.json", "report.md"):
        (tmp_path / name).unlink()
    before = (tmp_path / "last.pt").read_bytes()
    again = train(config(data, tmp_path), resume=True)
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}
    assert (tmp_path / "last.pt").read_bytes() == before
    assert (tmp_path / "report.md").exists()


def test_resume_of_no_run(tmp_path, capsys):
    assert cli.main(["train", "--resume", str(tmp_path / "nothing")]) == 2
    assert "no run in" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()


def test_saved_settings_are_complete(data, tmp_path):
    """config.yaml alone, given to --config, repeats the run bit by bit."""
    train(config(data, tmp_path / "first"))
    values = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert None not in (values["ce"], values["eval_resize"], values["amp_dtype"], values["output_dir"])
    again = ["train", "--config", str(tmp_path / "first" / "config.yaml"), "--output-dir", str(tmp_path / "again")]
    assert cli.main(again) == 0
    _assert_same_end(tmp_path / "again", tmp_path / "first")
