"""Every command on a block pack as on a folder of files, and which executor reads what."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from command_line import complaint, row_of, rows_of
from tiny_run import SETTINGS, config, differing, distilled, options, settings, write_teacher

from ijckd_fast import cli
from ijckd_fast.data.prepare import BlockPack, pack as make_pack
from ijckd_fast.train import build, checkpoint, load_run, resolve, run_folder, train

OWN_CHOICE = {"data_backend": "auto"}


@pytest.fixture(scope="module")
def pack(data, tmp_path_factory) -> Path:
    """The tiny images in blocks, several files."""
    out = tmp_path_factory.mktemp("pack") / "pack"
    make_pack(data, out, BlockPack(short=0, shard_gb=4000 / 2**30), workers=1)
    return out


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pt")


@pytest.fixture(scope="module")
def run(pack, weights, tmp_path_factory) -> Path:
    """A finished distillation from the pack."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert cli.main(["train", *options(settings(pack, folder, **distilled(weights), **OWN_CHOICE, epochs=2))]) == 0
    return folder


def figures(capsys, *words: object) -> dict:
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 0
    return row_of(capsys.readouterr().out)


def test_a_run_says_what_it_was_read_by(run, data):
    assert run_folder.read_config(run)["data_backend"] == "blocks"
    assert json.loads((run / "summary.json").read_text())["complete"]
    assert resolve(config(data, run, **OWN_CHOICE)).data_backend == "dali"
    assert resolve(config(data / "nowhere", run, **OWN_CHOICE)).data_backend == "dali"  # refused where it is read


def test_evaluate(run, pack, data, tmp_path, capsys):
    last = json.loads((run / "summary.json").read_text())["last"]
    row = figures(capsys, "evaluate", run)
    assert (row["top1_percent"], row["agreement_percent"]) == (last["top1_percent"], last["agreement_percent"])
    shutil.copytree(pack, tmp_path / "moved")
    assert figures(capsys, "evaluate", run, "--data-dir", tmp_path / "moved")["top1_percent"] == last["top1_percent"]
    # the originals are read by DALI or by Pillow, whichever is asked for
    for words in ((), ("--data-backend", "auto"), ("--data-backend", "dali"), ("--data-backend", "pillow")):
        assert figures(capsys, "evaluate", run, "--data-dir", data, *words)["images"] == last["images"]
    text = complaint(capsys, "evaluate", str(run), "--data-dir", str(data), "--data-backend", "blocks")
    assert f"reads block packs, but {data}/val holds image files; leave --data-backend out" in text
    text = complaint(capsys, "evaluate", str(run), "--data-backend", "dali")
    assert f"reads image files, but {pack}/val holds a block pack; leave --data-backend out" in text


def test_another_backend_knows_nothing_of_the_runs_own_settings(run, data, tmp_path, capsys):
    state = checkpoint.load(run / "last.pt")
    for name, value, backend in (("blocks_on", "gpu", "blocks"), ("decode", "hybrid", "dali")):
        path = tmp_path / name / "last.pt"
        path.parent.mkdir()
        checkpoint.save(path, {**state, "config": {**state["config"], "data_backend": backend, name: value}})
        for other in ("pillow", "dali"):
            assert figures(capsys, "evaluate", path, "--data-dir", data, "--data-backend", other)["images"] == 18


def test_export_and_bound(run, data, tmp_path, capsys):
    row = figures(capsys, "export", run, "--out", tmp_path / "export")  # compares answers on val
    assert row["checkpoint"] == str(run / "last.pt")
    for images in ((), ("--data-dir", data)):  # the originals are nearly the same pictures
        capsys.readouterr()
        assert cli.main(["bound", str(run), *map(str, images)]) == 0
        whole, *classes = rows_of(capsys.readouterr().out)
        assert (whole["images"], len(classes)) == (18, 3)


def test_a_cache_is_the_teacher_itself(pack, weights, tmp_path, capsys):
    """The same weights; another cache or the files themselves are refused."""
    images = {name: SETTINGS[name] for name in ("image_size", "eval_resize", "batch_size", "device")}
    given = {
        **images, "data_dir": str(pack), "teacher": "resnet8x0.5", "teacher_checkpoint": str(weights), "views": 2,
        "allow_weak_teacher": True,
    }  # fmt: skip
    folder = tmp_path / "cache"
    row = figures(capsys, "cache", folder, *options(given))
    assert (row["images"], row["verified"]) == (36, 64)
    common = {**OWN_CHOICE, "epochs": 2, "objective": "ijckd-pooled", "allow_weak_teacher": True}
    train(config(pack, tmp_path / "cached", teacher=f"cache:{folder}", **common))
    loaded = load_run(tmp_path / "cached")
    assert loaded.config.data_backend == "blocks"
    with_pillow = settings(pack, tmp_path / "other", teacher=f"cache:{folder}", **common) | {"data_backend": "pillow"}
    assert "data_backend blocks where pillow is expected" in complaint(capsys, "train", *options(with_pillow))


def test_compare(pack, tmp_path, capsys):
    base = {key: value for key, value in SETTINGS.items() if key not in ("objective", "data_backend")}
    comparison, ce = tmp_path / "own.yaml", {"objective": "ce"}
    comparison.write_text(
        yaml.safe_dump({"base": {**base, "epochs": 1}, "methods": {"a": ce, "b": {**ce, "lr": 0.01}}, "seeds": 1})
    )
    capsys.readouterr()
    words = ["compare", "--config", comparison, "--data-dir", pack, "--output", tmp_path / "out"]
    assert cli.main([str(word) for word in words]) == 0
    assert [row["method"] for row in rows_of(capsys.readouterr().out)] == ["a", "b"]
    (first, *_) = sorted((tmp_path / "out").glob("**/config.yaml"))
    assert run_folder.read_config(first.parent)["data_backend"] == "blocks"


def test_training_images_choose_and_validation_images_may_be_of_the_other_kind(data, pack, tmp_path, capsys):
    for train_split, val_split in ((pack, data), (data, pack)):
        root = tmp_path / f"train of {train_split.name}"
        root.mkdir()
        (root / "train").symlink_to(train_split / "train")
        (root / "val").symlink_to(val_split / "val")
        for name in ("classes.txt", "train.b2sums", "val.b2sums"):
            shutil.copy(pack / name, root / name)
        summary = train(config(root, root / "run", **OWN_CHOICE, epochs=1))
        assert summary["complete"]
        backend = run_folder.read_config(root / "run")["data_backend"]
        assert backend == ("blocks" if train_split == pack else "dali")
    for root, backend, text in (
        (pack, "dali", f"reads image files, but {pack}/train holds a block pack"),
        (data, "blocks", f"reads block packs, but {data}/train holds image files"),
    ):
        words = options(settings(root, tmp_path / "refused") | {"data_backend": backend})
        assert text in complaint(capsys, "train", *words)
    assert not (tmp_path / "refused" / "config.yaml").exists()


def test_the_same_weights_as_by_hand_however_it_is_asked_for(pack, tmp_path, monkeypatch):
    """And --blocks-on, which means something on a GPU alone, reaches every executor of blocks."""
    make, seen = build.make_loader, set()

    def watched(backend, plan, **settings):
        seen.add((backend, settings["blocks_on"]))
        return make(backend, plan, **settings)

    monkeypatch.setattr(build, "make_loader", watched)
    train(config(pack, tmp_path / "auto", **OWN_CHOICE, epochs=1))
    assert seen == {("blocks", "pinned")}
    more = {"workers": 1, "prefetch": 3, "blocks_on": "copies"}
    train(config(pack, tmp_path / "named", data_backend="blocks", **more, epochs=1))
    assert seen == {("blocks", "pinned"), ("blocks", "copies")}
    states = [checkpoint.load(tmp_path / name / "last.pt")["learner"] for name in ("auto", "named")]
    assert differing(*states) == []
