"""A teacher's features from a cache: what is stored, that it trains like the teacher itself, and what is refused."""

from __future__ import annotations

import dataclasses
import errno
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import typing
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import row_of
from damage import FLIPS, damages
from processes import Run
from rich.console import Console
from tiny_run import SETTINGS, config, differing, options, settings, write_teacher, write_tree

from ijckd_fast import cli, files
from ijckd_fast.caching import make
from ijckd_fast.caching.verify import allowed_difference
from ijckd_fast.data import PillowLoader, TrainPlan, build_index
from ijckd_fast.errors import UserError
from ijckd_fast.evaluate import load_evaluation
from ijckd_fast.nets import Tapped, create_model, fingerprint
from ijckd_fast.teacher_cache import CacheWriter, TeacherCache, format as cache_format, reader
from ijckd_fast.train import (
    TrainConfig,
    amp_dtype_of,
    augment_of,
    build as training,
    build_indexes,
    checkpoint,
    report,
    resolve,
    run_folder,
    teacher_view_of,
    train as loud_train,
)

train = functools.partial(loud_train, console=Console(quiet=True))
VIEWS, IMAGES, CHUNK = 3, 36, 16
IMAGE_SETTINGS = {
    name: SETTINGS[name] for name in ("image_size", "eval_resize", "batch_size", "data_backend", "device")
}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Most of a second each, in dozens of runs."""
    monkeypatch.setattr(report, "plot_training", lambda path, rows: None)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pt")


def _words(folder: Path, data: Path, weights: Path, *more: str, **changes) -> list[str]:
    """The command that makes the cache."""
    values = {
        "data_dir": str(data), "teacher": "resnet8x0.5", "teacher_checkpoint": str(weights), "allow_weak_teacher": True,
        "views": VIEWS, "chunk_images": CHUNK, "verify": 16, **IMAGE_SETTINGS, **changes,
    }  # fmt: skip
    return ["cache", str(folder), *options(values), *more]


@pytest.fixture(scope="module")
def made(data, weights, tmp_path_factory):
    """A finished cache."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    assert cli.main(_words(folder, data, weights)) == 0
    return folder


@pytest.fixture
def cache(made, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "cache"))


def _from(folder: Path) -> dict:
    return {"teacher": f"cache:{folder}", "allow_weak_teacher": True, "objective": "ijckd-pooled"}


def _complaint(capsys, words: list[str], code: int = 2) -> str:
    capsys.readouterr()
    assert cli.main(words) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def _same_weights(a: Path, b: Path) -> list[str]:
    states = [checkpoint.load(each / "last.pt") for each in (a, b)]
    return differing(*({key: state[key] for key in ("learner", "optimizer", "step", "meter")} for state in states))


# --- what is stored ---


def test_features_are_the_teachers_of_the_planned_views(made, data, weights, capsys):
    cache = TeacherCache(made)
    assert (cache.views, cache.images, cache.channels, cache.num_classes) == (VIEWS, IMAGES, 32, 3)
    assert cache.name == "resnet8x0.5"
    teacher = create_model("resnet8x0.5", 3, checkpoint=weights, image_size=16).eval()
    assert cache.fingerprint == fingerprint(teacher)
    assert torch.equal(cache.classifier.weight, teacher.classifier.weight)
    assert torch.equal(cache.classifier.bias, teacher.classifier.bias)
    settings = resolve(config(data, Path("unused")))
    plan = TrainPlan(build_index(data, "train"), augment_of(settings), 8, seed=0)  # new views in every epoch
    seen = set()
    with PillowLoader(plan, stop=VIEWS * 4) as loader, torch.no_grad():
        for step, batch in enumerate(loader):
            view = step // 4
            pooled = teacher.features(batch.images)[1]
            cached = cache.pooled(batch.ids.numpy(), view)
            assert cached.dtype == torch.float32
            torch.testing.assert_close(cached, pooled.bfloat16().float(), rtol=2**-7, atol=1e-6)
            assert ((cached - pooled).abs() <= pooled.abs() * 2**-8 + 1e-5).all()
            seen |= {(view, i) for i in batch.ids.tolist()}
    assert len(seen) == VIEWS * 32
    stored = np.fromfile(made / "features.bin", np.uint16).reshape(VIEWS, IMAGES, 32)
    assert len(np.unique(stored.reshape(-1, 32), axis=0)) == VIEWS * IMAGES
    about = json.loads((made / "cache.json").read_text())
    assert about["classes"] == ["ant", "bee", "cat"]
    assert about["teacher"]["weights"] == str(weights)


def test_the_command_prints_its_figures_and_verifies_what_is_there(made, data, weights, capsys):
    stamps = {
        path.name: path.stat().st_mtime_ns for path in made.iterdir() if path.name in ("features.bin", "progress.jsonl")
    }
    assert cli.main(_words(made, data, weights, "--verify-seed", "7", verify=1000)) == 0
    out = capsys.readouterr().out
    row = row_of(out)
    assert list(row) == [
        "views", "images", "channels", "bytes", "seconds", "images_per_s", "verified", "max_difference", "path",
    ]  # fmt: skip
    assert (row["views"], row["images"], row["channels"]) == (VIEWS, IMAGES, 32)
    assert row["bytes"] == VIEWS * IMAGES * 32 * 2 == (made / "features.bin").stat().st_size
    assert (row["verified"], row["images_per_s"], row["path"]) == (VIEWS * IMAGES, None, str(made))
    assert 0 < row["max_difference"] < 0.05
    assert "9 of 9 chunks are there" in out
    assert "108 of 108 views computed again agree" in out
    assert "--verify-seed 7" in out
    assert {name: (made / name).stat().st_mtime_ns for name in stamps} == stamps


# --- training from it ---


def _live_as_cached(patch, weights: Path) -> dict:
    """Patches a training with the teacher itself to see the cache's views and features; returns its settings."""
    features = Tapped.features

    def rounded(self, images, need_map=False):
        map_, pooled = features(self, images, need_map)
        return map_, pooled.bfloat16().float() if self.name == "resnet8x0.5" else pooled

    patch.setattr(Tapped, "features", rounded)
    patch.setattr(training, "TrainPlan", lambda *arguments, views: TrainPlan(*arguments, views=VIEWS))
    # a folded BatchNorm rounds otherwise
    return {
        "teacher": "resnet8x0.5", "teacher_checkpoint": str(weights), "allow_weak_teacher": True, "fold_teacher": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "ijckd-pooled"},
        {"objective": "ijckd-pooled", "head": "reference"},
        {"objective": "ijckd-pooled", "connector": "linear"},
        {"objective": "ijckd", "match": "pooled", "kl": 1.0},
        {"objective": "srrl"},
        {"objective": "dkd"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_training_from_a_cache_is_training_with_the_teacher(made, data, weights, tmp_path, monkeypatch, changes):
    with monkeypatch.context() as patch:
        live = train(config(data, tmp_path / "live", **_live_as_cached(patch, weights), **changes))
    cached = train(config(data, tmp_path / "cached", **{**_from(made), **changes}))
    assert _same_weights(tmp_path / "live", tmp_path / "cached") == []
    for key in ("top1_percent", "agreement_percent"):
        assert live["last"][key] == cached["last"][key]
    for key in ("params", "macs", "teacher_top1_percent"):
        assert live[key] == cached[key]
    inputs = [checkpoint.load(tmp_path / name / "last.pt")["inputs"] for name in ("live", "cached")]
    assert inputs[0]["teacher"] == inputs[1]["teacher"]
    assert (inputs[0]["cached features"], inputs[1]["cached features"]) == (None, TeacherCache(made).digest)


@pytest.mark.parametrize("padding", [0, 3])
def test_by_dali_kd_too(data, weights, tmp_path, monkeypatch, padding):
    folder, images = tmp_path / "cache", {"data_backend": "dali", "crop_padding": padding}
    if padding:
        images |= {"affine_rotate": 20.0, "affine_scale": 0.2, "affine_shear": 5.0, "affine_shift": 0.1}
    assert cli.main(_words(folder, data, weights, **images)) == 0
    with monkeypatch.context() as patch:
        train(config(data, tmp_path / "live", **_live_as_cached(patch, weights), objective="kd", **images))
    train(config(data, tmp_path / "cached", **{**_from(folder), "objective": "kd", **images}))
    assert _same_weights(tmp_path / "live", tmp_path / "cached") == []
    with pytest.raises(UserError, match=f"crop_padding {padding} where 5 is expected"):
        train(config(data, tmp_path / "other", **{**_from(folder), "objective": "kd", **images, "crop_padding": 5}))


def test_the_backbone_is_never_built(made, data, tmp_path, monkeypatch, capsys):
    def none_of_the_teacher(name, *arguments, **named):
        assert name != "resnet8x0.5"
        return create_model(name, *arguments, **named)

    monkeypatch.setattr(training, "create_model", none_of_the_teacher)
    assert cli.main(["train", *options(settings(data, tmp_path / "run", **_from(made), epochs=1))]) == 0
    assert "3 views of each image, begun again every 3 epochs" in capsys.readouterr().out
    saved = run_folder.read_config(tmp_path / "run")
    assert (saved["teacher"], saved["teacher_cache"]) == ("resnet8x0.5", str(made))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert f"features from `{made}`" in (tmp_path / "run" / "report.md").read_text()
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 0
    row = row_of(capsys.readouterr().out)
    for key in ("top1_percent", "agreement_percent"):
        assert row[key] == summary["last"][key] is not None
    for key in ("params", "macs", "teacher_top1_percent"):
        assert row[key] == summary[key]


@pytest.mark.parametrize("objective", ["ijckd-pooled", "srrl", "dkd", "ce"])
def test_in_bfloat16(made, data, tmp_path, objective):
    changes = {**_from(made), "objective": objective, "amp_dtype": "bfloat16", "epochs": 2}
    summary = train(config(data, tmp_path / "run", **changes))
    assert summary["skipped_steps"] == 0
    assert summary["last"]["agreement_percent"] is not None


def test_published_weights(data, weights, tmp_path, monkeypatch):
    """As a preset wants them, which goes with a cache of them only."""

    def published(name, classes, *, checkpoint=None, pretrained=False, **named):
        return create_model(name, classes, checkpoint=weights if pretrained else checkpoint, **named)

    monkeypatch.setattr(training, "create_model", published)
    words = _words(tmp_path / "cache", data, weights, "--teacher-pretrained")
    words = [word for word in words if word not in ("--teacher-checkpoint", str(weights))]
    assert cli.main(words) == 0
    run = config(data, tmp_path / "run", **_from(tmp_path / "cache"), teacher_pretrained=True, epochs=1)
    assert train(run)["complete"]


def test_other_validation_settings_mean_no_agreement(made, data, tmp_path, capsys):
    run = ["train", *options(settings(data, tmp_path / "run", **{**_from(made), "epochs": 1, "eval_resize": 18}))]
    assert cli.main(run) == 0
    assert (
        "the cache holds the teacher's answers to other val images, or with other settings" in capsys.readouterr().out
    )
    assert "| teacher | resnet8x0.5, features from" in (tmp_path / "run" / "report.md").read_text()
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 0
    assert row_of(capsys.readouterr().out)["agreement_percent"] is None


def test_a_killed_training_resumes_to_the_bit_though_the_cache_moves(cache, data, tmp_path):
    changes = {**_from(cache), "epochs": 10, "checkpoint_steps": 7, "log_interval": 1}
    train(config(data, tmp_path / "undisturbed", **changes))
    folder = tmp_path / "run"
    run = Run(tmp_path, 1, cli.main, ["train", *options(settings(data, folder, **changes))])
    run.wait_until(lambda: len(run_folder.read_log(folder)) > 9)
    run.signal(signal.SIGKILL)
    assert run.ends() == [-signal.SIGKILL]
    step = checkpoint.load(folder / "last.pt")["step"]
    moved = cache.rename(tmp_path / "moved")
    run = Run(tmp_path, 1, cli.main, ["train", "--resume", str(folder), "--teacher", f"cache:{moved}"])
    run.wait_until(lambda: len(run_folder.read_log(folder)) > step + 5)
    run.signal(signal.SIGTERM)
    assert run.ends() == [143], run.output()
    assert 7 <= checkpoint.load(folder / "last.pt")["step"] < 40
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert _same_weights(folder, tmp_path / "undisturbed") == []


def test_resume_with_other_features_is_refused(made, cache, data, weights, tmp_path, capsys, monkeypatch):
    step = training.Distiller.forward

    def dying(self, images, *arguments, **named):
        if named["progress"] > 1.5:
            raise KeyboardInterrupt
        return step(self, images, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(training.Distiller, "forward", dying)
        for name, changes in (
            ("run", _from(made)),
            ("live", {**_from(made), "teacher": "resnet8x0.5", "teacher_checkpoint": str(weights)}),
        ):
            with pytest.raises(KeyboardInterrupt):
                train(config(data, tmp_path / name, **changes, checkpoint_steps=1))
    other = tmp_path / "other"
    assert cli.main(_words(other, data, weights, views=2)) == 0
    err = _complaint(capsys, ["train", "--resume", str(tmp_path / "run"), "--teacher", f"cache:{other}"])
    assert "the cached features differ from those the run began with" in err
    err = _complaint(capsys, ["train", "--resume", str(tmp_path / "live"), "--teacher-cache", str(made)])
    assert "the cached features differ" in err
    assert cli.main(["train", "--resume", str(tmp_path / "run"), "--teacher-cache", str(cache)]) == 0


def test_evaluate_finds_a_moved_cache_or_the_teacher_itself(cache, data, weights, tmp_path, capsys):
    rows = {}
    for objective in ("ijckd-pooled", "srrl"):
        changes = {**_from(cache), "objective": objective, "epochs": 1}
        rows[objective] = train(config(data, tmp_path / objective, **changes))["last"]
    (cache / "features.bin").unlink()  # a copy without the features serves
    moved = cache.rename(tmp_path / "moved")
    err = _complaint(capsys, ["evaluate", str(tmp_path / "ijckd-pooled")])
    assert (
        f"the teacher cache {cache}, whose classifier the student answers through, is not there: give --teacher-cache"
        in err
    )
    for objective in rows:
        for words in (["--teacher-cache", str(moved)], ["--teacher-checkpoint", str(weights)]):
            assert cli.main(["evaluate", str(tmp_path / objective), *words]) == 0
            row = row_of(capsys.readouterr().out)
            for key in ("top1_percent", "agreement_percent"):
                assert row[key] == rows[objective][key] is not None
    assert cli.main(["evaluate", str(tmp_path / "srrl")]) == 0
    out = capsys.readouterr().out
    assert f"the teacher cache {cache} is not there: no agreement" in out
    assert row_of(out)["agreement_percent"] is None


# --- interruptions, damage, a bad disk ---


def _chunks(folder: Path) -> list[int]:
    progress = folder / "progress.jsonl"
    lines = progress.read_text().split("\n")[:-1] if progress.exists() else []
    return [json.loads(line)["chunk"] for line in lines]


def test_a_cache_that_was_killed_and_stopped_continues_where_it_was(data, weights, tmp_path):
    many = {"views": 40, "chunk_images": 4}  # 360 chunks
    assert cli.main(_words(tmp_path / "undisturbed", data, weights, **many)) == 0
    folder = tmp_path / "cache"
    seed = random.randrange(10_000)
    first, second = sorted(random.Random(seed).sample(range(20, 250), 2))
    print(f"killed at chunk {first}, stopped at {second}: random.Random({seed})")
    words = _words(folder, data, weights, **many)
    run = Run(tmp_path, 1, cli.main, words)
    run.wait_until(lambda: len(_chunks(folder)) >= first)
    run.signal(signal.SIGKILL)
    assert run.ends() == [-signal.SIGKILL]
    with pytest.raises(
        UserError, match=r"is not finished \(\d+ of 360 chunks\): run the same ijckd-fast cache command again"
    ):
        TeacherCache(folder)
    run = Run(tmp_path, 1, cli.main, words)
    run.wait_until(lambda: len(_chunks(folder)) >= second)
    run.signal(signal.SIGTERM)
    assert run.ends() == [143], run.output()
    assert f"stopped by SIGTERM, {len(_chunks(folder))} of 360 chunks are there" in run.output()
    assert cli.main(words) == 0
    assert sorted(_chunks(folder)) == list(range(360))  # none twice
    assert (folder / "features.bin").read_bytes() == (tmp_path / "undisturbed" / "features.bin").read_bytes()
    assert TeacherCache(folder).digest == TeacherCache(tmp_path / "undisturbed").digest


@pytest.mark.parametrize(
    "fault",
    ["line cut off", "newline cut off", "chunk torn", "file cut off", "file gone", "progress gone", "classifier gone"],
)
def test_nothing_torn_is_trusted(cache, made, data, weights, capsys, fault):
    features, progress = cache / "features.bin", cache / "progress.jsonl"
    again = 1
    if fault in ("line cut off", "newline cut off"):
        progress.write_bytes(progress.read_bytes()[: -3 if fault == "line cut off" else -1])
    elif fault == "chunk torn":
        with open(features, "r+b") as file:
            file.seek(5000)
            file.write(bytes(64))
    elif fault == "file cut off":
        os.truncate(features, 4608)
        again = 3
    elif fault in ("file gone", "progress gone"):
        (features if fault == "file gone" else progress).unlink()
        again = 9
    else:
        (cache / "classifier.safetensors").unlink()
        again = 0
    capsys.readouterr()
    assert cli.main(_words(cache, data, weights)) == 0
    out = capsys.readouterr().out
    assert f"{9 - again} of 9 chunks are there" in out
    torn = {"chunk torn": "warning: images 0 to 15 of view 2 are not what was written, and are made again"}
    assert torn.get(fault, "") in out
    for name in ("features.bin", "classifier.safetensors"):
        assert (cache / name).read_bytes() == (made / name).read_bytes()
    assert TeacherCache(cache).digest == TeacherCache(made).digest


def test_a_view_that_is_not_the_teachers_is_named(cache, data, weights, capsys):
    """Wrong features under a right checksum: what only the teacher itself can tell."""
    features, progress = cache / "features.bin", cache / "progress.jsonl"
    rows = np.fromfile(features, np.uint16).reshape(VIEWS, IMAGES, 32)
    rows[1, [20, 21]] = rows[1, [21, 20]]
    rows.tofile(features)
    lines = [json.loads(line) for line in progress.read_text().splitlines()]
    lines[4]["crc32"] = zlib.crc32(rows[1, 16:32].tobytes())
    progress.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(_words(cache, data, weights, verify=1000)) == 1
    out = capsys.readouterr().out
    index = build_index(data, "train")
    assert f"view 1 of {index.absolute(20)}: the cached features differ" in out
    assert f"view 1 of {index.absolute(21)}: the cached features differ" in out
    assert "2 of the views computed again differ: the cache is not to be trained from" in out
    assert row_of(out)["verified"] == VIEWS * IMAGES - 2
    with pytest.raises(UserError, match="is not verified"):
        TeacherCache(cache)
    assert cli.main(_words(cache, data, weights, "--overwrite", verify=1000)) == 0
    assert TeacherCache(cache).views == VIEWS


@pytest.fixture
def rotten(tmp_path):
    """A data folder one of whose training images cannot be read any more: its id, and the folder."""
    root = write_tree(tmp_path / "data")
    for split in ("train", "val"):
        index = build_index(root, split)
        if split == "train":
            path = index.absolute(15)
    status = os.stat(path)
    Path(path).write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return root, path


def test_an_image_that_cannot_be_read_is_marked_and_stood_in_for(rotten, weights, tmp_path, monkeypatch, capsys):
    root, path = rotten
    folder = tmp_path / "cache"
    assert cli.main(_words(folder, root, weights, verify=1000)) == 0
    out = capsys.readouterr().out
    assert f"warning: {path} cannot be read any more" in out
    assert row_of(out)["verified"] == VIEWS * (IMAGES - 1)
    cache = TeacherCache(folder)
    assert list(cache.unreadable) == [15]
    about = json.loads((folder / "cache.json").read_text())
    assert [row[:2] for row in about["unreadable"]] == [[15, os.path.relpath(path, root)]]
    for view in range(VIEWS):
        assert cache.pooled(np.array([15]), view).isnan().all()
        assert cache.pooled(np.delete(np.arange(IMAGES), 15), view).isfinite().all()
    with monkeypatch.context() as patch:
        train(config(root, tmp_path / "live", **_live_as_cached(patch, weights), objective="ijckd-pooled"))
    said = io.StringIO()
    summary = loud_train(config(root, tmp_path / "run", **_from(folder)), console=Console(file=said, width=1000))
    assert summary["unreadable_files"] == 1
    assert summary["skipped_steps"] == 0
    (line,) = [line for line in said.getvalue().splitlines() if path in line]
    assert "another image of its class stands in" in line
    assert _same_weights(tmp_path / "live", tmp_path / "run") == []


def test_too_many_unreadable_images_stop_the_cache(rotten, weights, tmp_path, capsys):
    root, path = rotten
    err = _complaint(capsys, _words(tmp_path / "cache", root, weights, unreadable_limit=0))
    assert path in err
    assert "Finished chunks stay: fix the data and run the same ijckd-fast cache command again" in err
    assert _chunks(tmp_path / "cache") == []


def test_full_disks(data, weights, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "cache"
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        err = _complaint(capsys, _words(folder, data, weights))
    assert "the cache takes 6.91e-06 GB (3 views x 36 images x 32 channels x 2 bytes)" in err
    assert "has 1e-06 GB free: free some space" in err
    assert not (folder / "features.bin").exists()
    pwrite, calls = os.pwrite, []

    def filling(*arguments):
        calls.append(1)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", filling)
        err = _complaint(capsys, _words(folder, data, weights))
    assert f"no space left for the cache in {folder}: free some. Finished chunks stay" in err
    assert _chunks(folder) == [0, 1, 2, 3]
    assert cli.main(_words(folder, data, weights)) == 0
    assert _chunks(folder) == list(range(9))


def test_features_that_are_not_finite_are_refused(data, weights, tmp_path, capsys, monkeypatch):
    features = Tapped.features

    def overflowing(self, images, need_map=False):
        map_, pooled = features(self, images, need_map)
        if len(images) == 8:
            pooled[2, 3] = float("inf")
        return map_, pooled

    monkeypatch.setattr(Tapped, "features", overflowing)
    path = build_index(data, "train").absolute(2)
    err = _complaint(capsys, _words(tmp_path / "cache", data, weights))
    assert f"the features of teacher resnet8x0.5 for {path} are NaN or infinite" in err


def test_float16_agrees_with_itself_within_its_own_bound(data, weights, tmp_path, capsys, monkeypatch):
    """On the CPU, which `resolve` refuses because a training there is not supported: autocast itself knows float16."""

    def to_half(settings):
        return dataclasses.replace(resolve(settings), amp_dtype="float16")

    monkeypatch.setattr(make, "resolve", to_half)
    assert cli.main(_words(tmp_path / "cache", data, weights, verify=1000)) == 0
    assert "108 of 108 views computed again agree" in capsys.readouterr().out
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["settings"]["amp_dtype"] == "float16"


def test_float16_is_refused_on_the_cpu_before_anything_is_made(data, weights, tmp_path, capsys):
    folder = tmp_path / "cache"
    err = _complaint(capsys, _words(folder, data, weights, amp_dtype="float16"))
    assert "--amp-dtype float16 needs a GPU, got --device cpu: use bfloat16 or float32" in err
    assert not folder.exists()


@pytest.mark.parametrize("name", typing.get_args(typing.get_args(typing.get_type_hints(TrainConfig)["amp_dtype"])[0]))
def test_every_precision_of_a_training_has_a_bound(name, data):
    """Two computations of the same features: as they are stored, and one unit of autocast's type off."""
    amp_dtype = amp_dtype_of(config(data, Path("unused"), amp_dtype=name))
    again = torch.linspace(-4, 4, 64).expand(3, 64)
    unit = torch.finfo(amp_dtype or torch.float32).eps
    allowed = allowed_difference(again, amp_dtype)
    assert ((again - again.bfloat16().float()).abs() <= allowed).all()
    assert (allowed >= 4 * unit / 2).all()  # of the largest, 4, rounded
    assert (allowed < 4 * 2**-4).all()


# --- refusals ---


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seed": 1}, "has seed 0 where 1 is expected: train with the cache's settings"),
        ({"image_size": 12}, "image_size 16 where 12 is expected"),
        ({"scale": (0.5, 1.0)}, r"scale \[0.08, 1.0\] where \[0.5, 1.0\] is expected"),
        ({"hflip": 0.0, "seed": 3}, "seed 0 where 3 is expected; hflip 0.5 where 0.0 is expected"),
        ({"data_backend": "dali"}, "data_backend pillow where dali is expected"),
        ({"train_per_class": 5}, "other training images .* images 36 where 15 is expected"),
        ({"mixup": 0.2}, "found mixup 0.2, of which no view is the same as before: leave that out, or train with the"),
        ({"repeats": 2}, "found repeats 2"),
        ({"sizes": ("12@0", "16@1")}, "found progressive sizes"),
        ({"objective": "ijckd"}, r"'ijckd' compares the teacher's maps \(fm\), .* take --objective ijckd-pooled"),
        ({"objective": "simkd"}, r"'simkd' compares the teacher's maps \(fm\)"),
        ({"objective": "fitnet"}, r"'fitnet' compares the teacher's maps \(hint\), .* take --objective .*kd"),
        ({"objective": "ijckd-pooled", "at": 5.0}, r"compares the teacher's maps \(at\), .*: leave out --at, take"),
        ({"teacher": "resnet8", "teacher_cache": "CACHE"}, "cache of resnet8x0.5, wanted of resnet8: leave out --te"),
        ({"teacher_pretrained": True}, "is not a cache of the published weights of resnet8x0.5"),
        ({"teacher_cache": "CACHE"}, "is a cache and --teacher-cache .* is given too: leave out one"),
        ({"teacher_checkpoint": "OTHER"}, "is a cache of other weights of resnet8x0.5 than those in"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_trainings_that_the_cache_cannot_serve_are_refused(made, data, weights, tmp_path, changes, text):
    other = torch.load(weights)
    other["fc.bias"][0] += 1
    torch.save(other, tmp_path / "other.pt")
    places = {"CACHE": str(made), "OTHER": str(tmp_path / "other.pt")}
    changes = {name: places.get(value, value) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(UserError, match=text):
        train(config(data, tmp_path / "run", **{**_from(made), **changes}))


def test_a_cache_from_before_padded_crops_and_warps_is_one_without(cache, data, tmp_path):
    about = cache_format.read_about(cache)
    for name in ("crop_padding", "affine_rotate", "affine_scale", "affine_shear", "affine_shift", "affine_fill"):
        assert about["settings"].pop(name) == 0
    done, _ = cache_format.read_progress(cache / "progress.jsonl")
    cache_format.write_about(
        cache, {**about, "digest": cache_format.identity(about, done, cache_format.layout_of(about).chunks)}
    )
    assert train(config(data, tmp_path / "run", **_from(cache), epochs=1))["complete"]
    with pytest.raises(UserError, match="crop_padding 0 where 2 is expected: train with the cache's settings"):
        train(config(data, tmp_path / "other", **_from(cache), crop_padding=2))
    with pytest.raises(UserError, match=r"affine_shift 0\.0 where 0\.1 is expected; affine_fill 0\.0 where 9\.0 is"):
        train(config(data, tmp_path / "other", **_from(cache), affine_shift=0.1, affine_fill=9.0))


def test_the_right_weights_beside_the_cache_are_accepted(made, data, weights, tmp_path):
    values = {**_from(made), "teacher": None, "teacher_cache": str(made), "teacher_checkpoint": str(weights)}
    assert train(config(data, tmp_path / "run", **values, epochs=1))["config"]["teacher"] == "resnet8x0.5"


@pytest.mark.parametrize("what", ["image", "class"])
def test_other_images_than_the_caches_are_refused(made, data, tmp_path, what):
    own = Path(shutil.copytree(data, tmp_path / "data"))
    if what == "image":
        shutil.copy(own / "train" / "ant" / "000.jpg", own / "train" / "ant" / "more.jpg")
        text = "has other training images .* images 36 where 37 is expected"
    else:
        for split in ("train", "val"):
            shutil.rmtree(own / split / "cat")
        text = "num_classes 3 where 2 is expected"
    with pytest.raises(UserError, match=text):
        train(config(own, tmp_path / "run", **_from(made)))


def _flip_byte(cache: Path) -> None:
    for chunk in range(9):  # in each, as a few are looked at only
        with open(cache / "features.bin", "r+b") as file:
            file.seek(700 * chunk)
            byte = file.read(1)[0]
            file.seek(700 * chunk)
            file.write(bytes([byte ^ 1]))


def _change_the_classifier(cache: Path) -> None:
    path = cache / "classifier.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def _rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda cache: os.truncate(cache / "features.bin", 1000), "features.bin has 1,000 bytes, expected 6,912: it"),
        (lambda cache: (cache / "features.bin").unlink(), "features.bin has 0 bytes, expected 6,912"),
        (_flip_byte, r"features.bin is damaged: images \d+ to \d+ of view \d are not what was written. Run the same"),
        (lambda cache: _rewrite(cache / "cache.json", '"seed": 0', '"seed": 1'), "cache.json is damaged"),
        (lambda cache: (cache / "cache.json").write_text("{"), "cache.json is damaged"),
        (lambda cache: _rewrite(cache / "cache.json", "cache 1", "cache 2"), "'ijckd-fast teacher cache 2', expected"),
        (lambda cache: _rewrite(cache / "progress.jsonl", '"chunk": 3', '"chunk": 30'), "progress.jsonl is damaged"),
        (lambda cache: _rewrite(cache / "progress.jsonl", '"crc32": ', '"crc32": 1'), "progress.jsonl is damaged"),
        (lambda cache: (cache / "classifier.safetensors").write_bytes(b""), "safetensors is not the classifier"),
        (_change_the_classifier, "is not the classifier that was written .its checksum is not the one written"),
        (lambda cache: (cache / "cache.json").unlink(), "no teacher cache in .* give the folder that ijckd-fast cache"),
    ],
)  # fmt: skip
def test_a_damaged_cache_is_refused(cache, data, tmp_path, damage, text):
    damage(cache)
    with pytest.raises(UserError, match=text):
        train(config(data, tmp_path / "run", **_from(cache)))


def _seen(folder: Path, data: Path) -> tuple:
    """All that a training takes from a cache."""
    settings = resolve(config(data, Path("unused")))
    train_index, val_index = build_indexes(settings)
    view = teacher_view_of(settings)
    cache = TeacherCache(folder)
    cache.check(train_index, view, settings.seed, settings.data_backend)
    rows = [cache.pooled(np.arange(IMAGES), view).numpy().tobytes() for view in range(VIEWS)]
    weights = {name: tensor.tolist() for name, tensor in cache.teacher().classifier.state_dict().items()}
    on_val = cache.on_val(val_index, view, settings.data_backend)
    answers = on_val and (on_val.top1, on_val.predictions.tolist(), on_val.ids.tolist())
    plain = cache.name, cache.fingerprint, cache.published, cache.digest, cache.unreadable, cache.normalisation
    return *plain, cache.views, cache.num_classes, rows, weights, answers


FILES = ["cache.json", "features.bin", "progress.jsonl", "classifier.safetensors", "val.npz"]


@pytest.mark.parametrize("name", FILES)
def test_no_damage_is_trained_from(cache, data, name):
    """Single bits, cuts, another's bytes: what a training sees is the same, or it is refused by the file's name."""
    expected, sound = _seen(cache, data), (cache / name).read_bytes()
    refused = 0
    for what, damaged in [*damages(sound, 5), ("another's", sound[::-1])]:
        (cache / name).write_bytes(damaged)
        try:
            found = _seen(cache, data)
        except UserError as error:
            text = str(error)
            assert str(cache / name) in text or (name == "progress.jsonl" and str(cache) in text), (what, text)
            assert re.search("the same ijckd-fast cache command again|make the cache again", text), (what, text)
            refused += 1
        else:
            assert found == expected, what
    assert refused > (FLIPS + 6 if name == "features.bin" else 0.7 * FLIPS)


def test_only_what_is_damaged_is_made_again(cache, made, data, weights, capsys):
    """A chunk of features, and the teacher's answers."""
    for name, at in (("features.bin", 5000), ("val.npz", 300)):
        content = (cache / name).read_bytes()
        (cache / name).write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    (cache / "cache.json.tmp").write_text("of a killed process")
    capsys.readouterr()
    assert cli.main(_words(cache, data, weights)) == 0
    out = capsys.readouterr().out
    assert "8 of 9 chunks are there" in out
    assert "warning: images 0 to 15 of view 2 are not what was written, and are made again" in out
    assert re.search(rf"warning: {cache}/val.npz is damaged \(.*\): the teacher is evaluated again", out)
    assert _seen(cache, data) == _seen(made, data)
    assert sorted(path.name for path in cache.iterdir()) == sorted(path.name for path in made.iterdir())


def test_a_chunk_that_the_disk_does_not_give_back_is_made_again(cache, made, data, weights, capsys, monkeypatch):
    pread, failed = os.pread, []

    def failing(file, length, offset):
        if offset == 1024 and not failed:
            failed.append(offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(file, length, offset)

    monkeypatch.setattr(os, "pread", failing)
    assert cli.main(_words(cache, data, weights)) == 0
    assert "8 of 9 chunks are there" in capsys.readouterr().out
    assert failed
    assert _seen(cache, data) == _seen(made, data)


def test_each_chunk_is_compared_once_when_it_is_read_first(cache, monkeypatch):
    looked_at = []
    crc32 = reader.crc32
    monkeypatch.setattr(reader, "crc32", lambda *arguments: (looked_at.append(arguments[-1]), crc32(*arguments))[1])
    found = TeacherCache(cache)
    found.pooled(np.array([0, 35, 1]), 1)
    assert sorted(looked_at) == [3, 5]
    found.pooled(np.array([20, 2]), 1)
    found.pooled(np.arange(IMAGES), 1)
    assert sorted(looked_at) == [3, 4, 5]


def test_damage_met_on_the_way_stops_a_training_with_its_state(cache, data, weights, tmp_path, monkeypatch):
    """In the second epoch, and on a disk that fails: the run continues once the cache is whole again."""
    monkeypatch.setattr(reader, "_CHUNKS_LOOKED_AT", 0)
    train(config(data, tmp_path / "undisturbed", **_from(cache)))
    sound = (cache / "features.bin").read_bytes()
    (cache / "features.bin").write_bytes(sound[:2500] + bytes([sound[2500] ^ 1]) + sound[2501:])
    run = config(data, tmp_path / "run", **_from(cache))
    with pytest.raises(
        UserError, match=r"images 0 to 15 of view 1 are not .*at step 4, everything is saved: then cont"
    ):
        train(run)
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] == 4
    assert cli.main(_words(cache, data, weights)) == 0
    preadv = os.preadv

    def failing(file, buffers, offset):
        if offset >= 2 * IMAGES * 64:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(file, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        with pytest.raises(UserError, match=r"features\.bin cannot be read \(Input/output error\)"):
            train(run, resume=True)
    train(run, resume=True)
    assert _same_weights(tmp_path / "run", tmp_path / "undisturbed") == []


def test_a_damaged_teacher_val_of_a_run_is_made_again(data, weights, tmp_path):
    changes = {"objective": "srrl", "teacher": "resnet8x0.5", "teacher_checkpoint": str(weights), "epochs": 1}
    run = config(data, tmp_path / "run", **changes, allow_weak_teacher=True)
    first = train(run)
    path = tmp_path / "run" / "teacher_val.npz"
    sound = path.read_bytes()
    for damaged in (b"", sound[:400] + bytes([sound[400] ^ 2]) + sound[401:]):
        path.write_bytes(damaged)
        (tmp_path / "run" / "summary.json").unlink()  # as if it had been killed before the end
        said = io.StringIO()
        again = loud_train(run, resume=True, console=Console(file=said, width=1000))
        assert re.search(r"warning: .*teacher_val\.npz is damaged .*: the teacher is evaluated again", said.getvalue())
        assert again["last"]["agreement_percent"] == first["last"]["agreement_percent"]
        assert again["teacher_top1_percent"] == first["teacher_top1_percent"]
        assert load_evaluation(path, "") is not None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"views": 4}, "holds a teacher cache with views 3 where 4 is expected. To continue it give what it was begun"),
        ({"seed": 2}, "seed 0 where 2 is expected"),
        ({"amp_dtype": "bfloat16"}, "amp_dtype float32 where bfloat16 is expected"),
        ({"teacher_checkpoint": "OTHER"}, "a teacher of fingerprint"),
        ({"views": 0}, "views of each image must be at least 1, found 0"),
        ({"chunk_images": 0}, "--chunk-images must be at least 1, got 0"),
        ({"allow_weak_teacher": False}, "has a top-1 of .* near chance"),
        ({"teacher": "cache:CACHE"}, "a cache is made of a teacher itself"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_cache_of_something_else_is_not_gone_on_with(made, data, weights, tmp_path, capsys, changes, text):
    other = torch.load(weights)
    other["fc.bias"][0] += 1
    torch.save(other, tmp_path / "other.pt")
    changes = {name: str(tmp_path / "other.pt") if value == "OTHER" else value for name, value in changes.items()}
    err = _complaint(capsys, _words(made, data, weights, **changes))
    assert all(part in err for part in text.split(" .* ")), err
    TeacherCache(made)  # as it was


def test_a_refused_teacher_leaves_nothing_to_go_on_with(data, weights, tmp_path, capsys):
    folder = tmp_path / "cache"
    assert "near chance" in _complaint(capsys, _words(folder, data, weights, allow_weak_teacher=False))
    assert cli.main(_words(folder, data, weights, views=1, seed=4)) == 0


def test_folders_that_are_no_cache(made, data, weights, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds other things ('notes.txt') and no cache.json" in _complaint(capsys, _words(tmp_path, data, weights))
    with files.lock(made):
        assert "is writing to" in _complaint(capsys, _words(made, data, weights))
    words = [word for word in _words(tmp_path / "new", data, weights) if "teacher" not in word and "resnet" not in word]
    assert "no --teacher given" in _complaint(capsys, [word for word in words if word != str(weights)])


def test_a_cache_takes_the_students_settings(data, weights, tmp_path, capsys):
    preset = tmp_path / "mine.yaml"
    preset.write_text(
        "student: resnet8\nlr: 0.5\nimage_size: 16\neval_resize: 16\nhflip: 0\nscale: [0.5, 1]\nmixup: 0.2\n"
    )
    words = [
        "cache",
        str(tmp_path / "cache"),
        "--config",
        str(preset),
        "--data-dir",
        str(data),
        "--teacher",
        "resnet8x0.5",
    ]
    words += [
        "--teacher-checkpoint",
        str(weights),
        "--allow-weak-teacher",
        "--views=1",
        "--data-backend=pillow",
        "--device=cpu",
    ]
    assert "found mixup 0.2" in _complaint(capsys, words)
    preset.write_text(preset.read_text().replace("mixup: 0.2", "mixup: 0"))
    assert cli.main([*words, "--scale", "0.6,1"]) == 0
    about = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert (about["settings"]["hflip"], about["settings"]["scale"]) == (0, [0.6, 1])
    preset.write_text("views: 3\n")
    assert "unknown setting 'views'" in _complaint(capsys, words)
    assert "unknown option --lr" in _complaint(capsys, [*words, "--lr", "1"])


# --- one cache, many students ---


def test_students_one_after_the_other(made, data, tmp_path, capsys):
    values = settings(data, tmp_path / "out", **_from(made), epochs=1)
    students = ["--student", "resnet8x0.25", "--student=resnet8x0.5"]
    del values["student"]
    words = ["train", *options(values), *students]
    broken = [word.replace("--student=resnet8x0.5", "--student=resnet8x0.55x") for word in words]
    err = _complaint(capsys, broken)
    assert "student resnet8x0.55x (2 of 2): unknown model" in err
    first = tmp_path / "out" / "resnet8x0.25"
    assert checkpoint.load(first / "last.pt")["step"] == 4
    stamp = (first / "last.pt").stat().st_mtime_ns
    assert cli.main(words) == 0
    assert f"{first}: this run is finished, nothing to resume" in capsys.readouterr().out
    assert (first / "last.pt").stat().st_mtime_ns == stamp
    alone = {**values, "output_dir": str(tmp_path / "alone"), "student": "resnet8x0.5"}
    assert cli.main(["train", *options(alone)]) == 0
    assert _same_weights(tmp_path / "alone", tmp_path / "out" / "resnet8x0.5") == []
    assert "student resnet8x0.25 (1 of 2)" in _complaint(capsys, [*words, "--lr", "0.5"])  # a run with other settings
    assert cli.main([*words, "--lr", "0.5", "--overwrite"]) == 0
    assert run_folder.read_config(first)["lr"] == 0.5
    assert "--resume continues one run" in _complaint(capsys, [*words, "--resume", str(first)])
    assert "give each --student once" in _complaint(capsys, [*words, "--student", "resnet8x0.25"])


# --- pieces ---


def test_a_chunk_is_on_the_disk_before_it_is_said_to_be(tmp_path, monkeypatch):
    classifier = torch.nn.Linear(4, 2)
    named = {"name": "net", "fingerprint": "f", "weights": "published", "classifier": classifier, "classes": ("a", "b")}
    settings = {"index": "i", "images": 5, "num_classes": 2, "seed": 0}
    order = []
    with CacheWriter(tmp_path, **named, settings=settings, views=2, chunk_images=3, made_with={}) as writer:
        assert [writer.layout.part(chunk) for chunk in writer.pending] == [
            (0, range(0, 3)), (0, range(3, 5)), (1, range(0, 3)), (1, range(3, 5)),
        ]  # fmt: skip
        fsync, size = os.fsync, os.stat(tmp_path / "progress.jsonl").st_size
        monkeypatch.setattr(
            os, "fsync", lambda file: (order.append(os.stat(tmp_path / "progress.jsonl").st_size > size), fsync(file))
        )
        writer.write(1, np.arange(8, dtype=np.uint16).reshape(2, 4), [(4, "a/4.jpg", "gone")])
        assert order == [False, True]
        assert writer.pending == [0, 2, 3]
        assert writer.unreadable == {4: ("a/4.jpg", "gone")}
        assert writer.read(np.array([4])).isnan().all()
    stored = np.fromfile(tmp_path / "features.bin", np.uint16).reshape(2, 5, 4)
    assert stored[0, 3].tolist() == [0, 1, 2, 3]
    assert not stored[1].any()
