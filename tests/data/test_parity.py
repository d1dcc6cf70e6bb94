"""DALI held to Pillow on the user's images: the command shows how far they are apart, the trainer refuses too much."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import row_of, rows_of
from image_tree import photo, write_split
from PIL import Image
from rich.console import Console
from tiny_run import config, options, settings, write_tree

from ijckd_fast import cli
from ijckd_fast.data import Augment, DataFolder, TooManyUnreadable, build_index, parity
from ijckd_fast.data.load import pillow
from ijckd_fast.errors import UserError
from ijckd_fast.train import build, train as loud_train
from ijckd_fast.train.image_settings import MAX_DRIFT

AUGMENT = Augment(image_size=24, eval_resize=28)


@pytest.fixture
def data(tmp_path) -> Path:
    return write_tree(tmp_path / "data")


@pytest.fixture
def swapped_channels(monkeypatch):
    make = pillow.arrange
    monkeypatch.setattr(pillow, "arrange", lambda image, plan, i: make(image, plan, i)[:, :, ::-1])


def other_filter(image, plan, i):
    """As arrange, but for the filter: the mildest mistake there is."""
    (y, x), (h, w) = plan.anchor[i].tolist(), plan.shape[i].tolist()
    bicubic = pillow.Image.Resampling.BICUBIC
    if plan.resize is None:
        image = image.crop((x, y, x + w, y + h)).resize((plan.image_size, plan.image_size), bicubic)
    else:
        image = image.resize(tuple(plan.resize[i][::-1].tolist()), bicubic).crop((x, y, x + w, y + h))
    pixels = np.asarray(image)
    return pixels[:, ::-1] if plan.flip[i] else pixels


def test_equal_executors_pass(data):
    for split, images in (("train", 32), ("val", 18)):
        found = parity.compare(build_index(data, split), AUGMENT, images=32)
        assert (found.split, found.images) == (split, images)
        assert 0 < found.mean_levels < 0.3
        assert found.mean_levels <= found.worst_levels < MAX_DRIFT
        assert found.beyond_percent < 5
        assert (data / found.worst_path).is_file()
        assert (found.executor_top1_percent, found.pillow_top1_percent, found.disagreements) == (None, None, None)


def test_figures_are_those_of_the_pixels(data, monkeypatch):
    """One image of the sample, three levels brighter in Pillow: the worst, by three levels, in all of its pixels."""
    index = build_index(data, "val")
    make = pillow.arrange

    def brighter(image, plan, i):
        return make(image, plan, i) + np.uint8(3 * (plan.ids[i] == 7))

    before = parity.compare(index, AUGMENT, images=18)
    monkeypatch.setattr(pillow, "arrange", brighter)
    after = parity.compare(index, AUGMENT, images=18)
    assert after.worst_path == index.paths[7]
    assert after.worst_levels == pytest.approx(3, abs=0.3)
    assert after.mean_levels - before.mean_levels == pytest.approx(3 / 18, abs=0.02)
    assert after.beyond_percent - before.beyond_percent == pytest.approx(100 / 18, abs=0.5)


def test_the_same_sample_every_time_from_all_classes(data):
    index = build_index(data, "val")
    assert parity.compare(index, AUGMENT, images=9) == parity.compare(index, AUGMENT, images=9)
    plan = parity.sample_plan(index, AUGMENT, 9)
    assert len(set(plan.batch(0).labels.tolist())) == 3


@pytest.mark.parametrize("kind", ["sound", "border", "place"])
def test_padded_crops_are_compared(tmp_path, monkeypatch, kind):
    """PNGs that need no resize: equal; a white border, or a crop a pixel away, is far off."""
    folder = tmp_path / "train" / "all"
    folder.mkdir(parents=True)
    for n in range(32):
        photo(24, 24, n).save(folder / f"{n}.png")
    make = pillow.arrange

    def other(image, plan, i):
        if kind == "place":
            return make(image, dataclasses.replace(plan, anchor=plan.anchor + 1), i)
        return np.where(make(image, plan, i).any(2, keepdims=True), make(image, plan, i), np.uint8(255))

    if kind != "sound":
        monkeypatch.setattr(pillow, "arrange", other)
    augment = dataclasses.replace(AUGMENT, crop_padding=4)
    found = parity.compare(build_index(tmp_path, "train"), augment, images=32)
    assert found.mean_levels < 1e-4 if kind == "sound" else found.mean_levels > 10


def test_warps_mixing_and_growing_images_are_left_out_of_the_comparison(data):
    augment = Augment(
        image_size=24, eval_resize=28, affine_shear=9, affine_fill=9, mixup=0.2, cutmix=1.0, repeats=2,
        sizes=((0, 12), (1, 24)),
    )  # fmt: skip
    index = build_index(data, "train")
    assert parity.compare(index, augment, images=32) == parity.compare(index, AUGMENT, images=32)


@pytest.mark.parametrize("split", ["train", "val"])
def test_unreadable_files_of_the_sample_are_left_out(data, split):
    index = build_index(data, split)
    for i in (0, 1, 7):
        Path(index.absolute(i)).write_bytes(b"")
    photo(20, 24).save(index.absolute(8), format="GIF")  # Pillow reads it, DALI does not: compared all the same
    said = []
    with pytest.warns(UserWarning, match=f"{index.paths[8]} is decoded by Pillow from here on"):
        found = parity.compare(index, AUGMENT, images=len(index), on_bad=lambda path, why: said.append(path))
    assert {index.absolute(i) for i in (0, 1, 7)} == set(said)
    assert found.mean_levels < 0.3
    if split == "val":
        assert found.images == 15
    else:
        assert 32 < found.images <= 64


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_only_dali_reads_is_not_compared_with_another_image(data, split):
    index = build_index(data, split)
    turned = Image.Exif()
    turned[274] = 6
    photo(20, 24).save(index.absolute(9), format="TIFF", exif=turned)
    said = []
    found = parity.compare(index, AUGMENT, images=len(index), on_bad=lambda path, why: said.append(path))
    assert said == [index.absolute(9)]
    assert found.worst_levels < 0.5
    assert found.images == 17 if split == "val" else found.images < 64


def test_nothing_to_compare(data):
    index = build_index(data, "val")
    for i in range(len(index)):
        Path(index.absolute(i)).write_bytes(b"")
    with pytest.raises(TooManyUnreadable, match="can be read any more"):
        parity.compare(index, AUGMENT, images=18)


# --- the trainer ------------------------------------------------------------------------------------------------------

DALI = {"data_backend": "dali", "epochs": 1}


def train(data: Path, output: Path, **changes) -> str:
    """What a run says."""
    said = io.StringIO()
    loud_train(config(data, output, **{**DALI, **changes}), console=Console(file=said, width=1000))
    return said.getvalue()


def test_the_trainer_says_it_once_per_dataset(data, tmp_path, monkeypatch):
    sampled = []
    compare = parity.compare
    monkeypatch.setattr(
        parity, "compare", lambda index, *rest, **more: (sampled.append(index.split), compare(index, *rest, **more))[1]
    )
    text = train(data, tmp_path / "first")
    assert "DALI's pixels differ from Pillow's by 0." in text
    assert "on 128 train crops and 0." in text
    assert sampled == ["train", "val"]
    assert "DALI's" not in train(data, tmp_path / "second", seed=3)
    assert sampled == ["train", "val"]

    # what it was made with: another size, images, library
    train(data, tmp_path / "size", image_size=20, eval_resize=20)
    assert len(sampled) == 4
    photo(20, 24, seed=77).save(data / "val" / "ant" / "new.jpg")
    train(data, tmp_path / "images")
    assert len(sampled) == 6
    monkeypatch.setattr(parity.PIL, "__version__", "99.0")
    train(data, tmp_path / "library")
    assert len(sampled) == 8
    # damaged: made again
    for path in (data / ".ijckd-index").glob("parity-*.json"):
        path.write_text(path.read_text()[:40])
    assert "DALI's pixels differ" in train(data, tmp_path / "damaged")
    assert len(sampled) == 10


def test_pillow_needs_no_comparison(data, tmp_path):
    assert "DALI" not in train(data, tmp_path / "run", data_backend="pillow")
    assert not list((data / ".ijckd-index").glob("parity-*"))


@pytest.mark.usefixtures("swapped_channels")
def test_the_trainer_refuses_drift(data, tmp_path):
    with pytest.raises(UserError) as caught:
        train(data, tmp_path / "run")
    text = str(caught.value)
    assert "wanted at most 0.5" in text
    assert f"ijckd-fast bench loader --parity --data-dir {data}" in text
    assert "--data-backend pillow; --max-drift" in text
    named = text[text.index("the farthest is ") :].split()[3]
    assert Path(named).is_file()
    assert not (tmp_path / "run" / "config.yaml").exists()
    with pytest.raises(UserError, match=r"wanted at most 0\.5"):  # what is remembered is refused too
        train(data, tmp_path / "run")
    drift = int(text.split("--max-drift ")[1].split()[0])
    assert "val top-1" in train(data, tmp_path / "run", max_drift=float(drift))


@pytest.mark.usefixtures("swapped_channels")
def test_the_comparison_that_a_refusal_names_is_of_the_same_images_and_crops(data, tmp_path, capsys):
    shutil.rmtree(data / "val")
    with pytest.raises(UserError) as caught:
        train(data, tmp_path / "run", val_fraction=0.3, seed=3, max_drift=0.4)
    words = shlex.split(str(caught.value).split("look with ")[1].split(", try")[0])
    assert words[-6:] == ["--max-drift", "0.4", "--val-fraction", "0.3", "--val-seed", "3"]
    assert cli.main([*words[1:], "--device", "cpu"]) == 1  # beyond what is allowed
    val_row = rows_of(capsys.readouterr().out)[1]
    assert val_row["images"] == len(DataFolder(data, val_fraction=0.3, val_seed=3).index("val"))


def test_the_trainer_refuses_another_filter(tmp_path, monkeypatch):
    data = tmp_path / "photos"
    for split in ("train", "val"):
        write_split(data, split, {"cat": 12, "dog": 12, "eel": 12})
    monkeypatch.setattr(pillow, "arrange", other_filter)
    with pytest.raises(UserError, match=r"wanted at most 0\.5"):
        train(data, tmp_path / "run")


def test_drift_does_not_cost_the_run_that_would_be_overwritten(data, tmp_path, monkeypatch):
    train(data, tmp_path / "run")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(UserError, match="wanted at most 0 "):
        loud_train(config(data, tmp_path / "run", **DALI, max_drift=0.0), overwrite=True)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def spoil(data: Path, *names: str) -> None:
    """Zeros in these files, once they are indexed; neither length nor time tells."""
    for split in ("train", "val"):
        build_index(data, split)
    for name in names:
        status = (data / name).stat()
        (data / name).write_bytes(bytes(status.st_size))
        os.utime(data / name, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_class_that_cannot_be_read_is_the_loop_s_matter(data, tmp_path):
    spoil(data, *(f"train/bee/{n:03d}.jpg" for n in range(12)))
    said = io.StringIO()
    settings = config(data, tmp_path / "run", **DALI, unreadable_limit=99)
    with pytest.raises(UserError, match="everything is saved: fix the data and continue"):
        loud_train(settings, console=Console(file=said, width=1000))
    assert "DALI's pixels were not compared with Pillow's: no image of class 'bee'" in said.getvalue()


def test_unreadable_files_of_the_sample_do_not_stop_a_run(data, tmp_path):
    spoil(data, "train/bee/003.jpg", "val/cat/002.jpg")
    text = train(data, tmp_path / "run", epochs=2)
    assert "on 128 train crops and 0." in text
    assert "on 17 val crops" in text
    assert text.count("train/bee/003.jpg cannot be read any more") == 1


def test_a_data_folder_that_cannot_be_written(data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (data / ".ijckd-index").write_text("in the way: nothing can be created here, even by the superuser")
    assert "DALI's pixels differ" in train(data, tmp_path / "first")
    assert "DALI's pixels differ" not in train(data, tmp_path / "second")
    (tmp_path / "cache").rename(tmp_path / "gone")
    (tmp_path / "cache").write_text("neither here")
    with pytest.warns(UserWarning, match="could not be saved"):
        assert "DALI's pixels differ" in train(data, tmp_path / "third")


# --- the command ------------------------------------------------------------------------------------------------------


def bench(capsys, *arguments: str) -> tuple[int, str, list[dict]]:
    code = cli.main(["bench", "loader", "--parity", *arguments])
    out = capsys.readouterr().out
    return code, out, rows_of(out)


def test_command_without_a_net(data, capsys):
    code, out, rows = bench(capsys, "--data-dir", str(data), "--images", "18", "--image-size", "24")
    assert code == 0
    assert [(row["split"], row["images"]) for row in rows] == [("train", 18), ("val", 18)]
    for row in rows:
        assert row["mean_levels"] < 0.3
        assert row["worst_path"] in out
        assert (row["image_size"], row["max_drift"], row["executor_top1_percent"]) == (24, MAX_DRIFT, None)
        assert row["pillow"] == parity.PIL.__version__
    _, _, (alone,) = bench(capsys, "--data-dir", str(data), "--images", "18", "--image-size", "24", "--split", "val")
    assert alone == rows[1]
    padded = ("--data-dir", str(data), "--images", "18", "--image-size", "24", "--crop-padding", "4")
    _, _, rows = bench(capsys, *padded)
    augment = Augment(image_size=24, eval_resize=24, crop_padding=4)
    for row in rows:
        compared = parity.compare(build_index(data, row["split"]), augment, images=18)
        assert (row["mean_levels"], row["worst_levels"]) == (compared.mean_levels, compared.worst_levels)


@pytest.mark.usefixtures("swapped_channels")
def test_command_shows_drift(data, capsys):
    code, out, rows = bench(capsys, "--data-dir", str(data), "--images", "18", "--image-size", "24")
    assert code == 1
    assert "beyond the 0.5 grey levels that the trainer allows: train, val" in out
    assert min(row["mean_levels"] for row in rows) > MAX_DRIFT
    assert bench(capsys, "--data-dir", str(data), "--images", "18", "--image-size", "24", "--max-drift", "99")[0] == 0


def test_command_asks_a_run_s_net(data, tmp_path, capsys, monkeypatch):
    assert cli.main(["train", *options(settings(data, tmp_path / "run", epochs=8))]) == 0
    cli.main(["evaluate", str(tmp_path / "run")])
    top1 = row_of(capsys.readouterr().out)["top1_percent"]
    code, out, (row,) = bench(capsys, "--model", str(tmp_path / "run"), "--split", "val")
    assert (code, row["images"], row["image_size"]) == (0, 18, 16)
    assert row["pillow_top1_percent"] == pytest.approx(top1)
    assert row["executor_top1_percent"] == pytest.approx(top1, abs=6)
    assert f"{row['disagreements']} answers differ" in out
    assert bench(capsys, "--model", str(tmp_path / "run"), "--split", "val", "--image-size", "20")[0] == 0

    make = pillow.arrange
    monkeypatch.setattr(
        pillow, "arrange", lambda image, plan, i: np.roll(make(image, plan, i), 1, 2)
    )  # colours tell the classes
    code, _, (row,) = bench(capsys, "--model", str(tmp_path / "run" / "best.pt"), "--split", "val")
    assert code == 1
    assert row["disagreements"] > 9
    assert row["pillow_top1_percent"] < row["executor_top1_percent"]


def test_command_asks_a_model_with_published_weights(data, capsys, monkeypatch):
    create = build.create_model
    asked = []

    def without_download(name, num_classes, *, pretrained, **more):
        asked.append((name, num_classes, pretrained))
        torch.manual_seed(0)
        return create("resnet8x0.25", num_classes, **more)

    monkeypatch.setattr(build, "create_model", without_download)
    _, _, rows = bench(capsys, "--data-dir", str(data), "--model", "resnet18", "--image-size", "24", "--images", "18")
    assert asked == [("resnet18", 3, True)]
    assert all(row["executor_top1_percent"] is not None for row in rows)


def test_mistakes(data, tmp_path, capsys):
    complaint = functools.partial(_complaint, capsys)
    assert "expected --parity" in complaint("bench", "loader", "--data-dir", str(data))
    assert "Expected a Literal['loader']" in complaint("bench", "laoder", "--parity")
    assert "--images must be at least 1, got 0" in complaint("bench", "loader", "--parity", "--images", "0")
    assert "no --data-dir given" in complaint("bench", "loader", "--parity")
    assert "nothing': there is no such folder of a run and no such file" in complaint(
        "bench", "loader", "--parity", "--data-dir", str(data), "--model", str(tmp_path / "nothing")
    )


def _complaint(capsys, *arguments: str) -> str:
    assert cli.main(list(arguments)) == 2
    return capsys.readouterr().err
