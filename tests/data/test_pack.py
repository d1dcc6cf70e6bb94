import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from image_tree import DAMAGE, photo, write_split
from PIL import Image
from tiny_run import config, differing, write_tree

from ijckd_fast import cli
from ijckd_fast.data import TooManyUnreadable, build_index
from ijckd_fast.data.prepare import BlockPack, JpegPack, pack, pack_jpeg
from ijckd_fast.data.prepare.pack_format import packed_sizes
from ijckd_fast.errors import UserError
from ijckd_fast.train import checkpoint, train

REPOSITORY = Path(__file__).parents[2]
SMALL = JpegPack(short=40, shard_images=5)
BLOCKS = BlockPack(short=40, shard_gb=12000 / 2**30)  # 3 files for training too


@pytest.fixture
def data(tmp_path) -> Path:
    """13 training images, of shorter sides 37, 40 and 48, and 4 validation images."""
    write_split(tmp_path / "data", "train", {"cat": 6, "dog": 7})
    write_split(tmp_path / "data", "val", {"cat": 2, "dog": 2})
    return tmp_path / "data"


def members(out: Path, split: str) -> list[tuple[str, bytes]]:
    """(name, bytes) of every member of every shard."""
    found = []
    for path in sorted((out / split).iterdir()):
        with tarfile.open(path) as tar:
            found += [(member.name, tar.extractfile(member).read()) for member in tar]
    return found


def images(out: Path, split: str) -> dict[int, tuple[bytes, int]]:
    """(bytes of the image, label) by id."""
    found = members(out, split)
    assert [name[9:] for name, _ in found] == [".jpg", ".cls"] * (len(found) // 2)
    assert [name[:9] for name, _ in found[::2]] == [name[:9] for name, _ in found[1::2]]
    return {int(a[:9]): (image, int(label)) for (a, image), (_, label) in zip(found[::2], found[1::2], strict=True)}


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def shards(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(out).items() if name.endswith((".tar", ".blocks"))}


def jpeg(image: Image.Image, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **settings)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


# --- what is in a pack ------------------------------------------------------------------------------------------------


def test_training_images_are_made_smaller_and_small_ones_copied(data, tmp_path):
    rows = pack(data, tmp_path / "out", SMALL, workers=1)
    index = build_index(data, "train")
    found = images(tmp_path / "out", "train")
    assert list(found) == list(range(13))  # in the index's order
    assert [label for _, label in found.values()] == index.labels.tolist()
    copied = 0
    for i, (packed, _) in found.items():
        original = Path(index.absolute(i)).read_bytes()
        width, height = index.sizes[i].tolist()
        image = opened(packed)
        if min(width, height) <= 40:
            assert packed == original
            copied += 1
        else:
            assert image.size == {(64, 48): (53, 40), (48, 64): (40, 53)}[width, height]
            assert (image.format, image.mode, image.info.get("progressive")) == ("JPEG", "RGB", None)
            resized = opened(original).resize(image.size, Image.Resampling.LANCZOS)
            assert packed == jpeg(resized, quality=90, subsampling="4:2:0", optimize=True)
    assert copied == 5
    names = sorted(path.name for path in (tmp_path / "out" / "train").iterdir())
    assert names == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\ndog\n"
    train, val = rows
    assert (train["images"], train["shards"], train["resize_images"], train["copy_images"]) == (13, 3, 8, 5)
    assert (train["kept"], train["quarantined"], train["left_out"]) == (0, 0, [])
    state = json.loads((tmp_path / "out" / "pack.json").read_text())
    assert state["settings"] == SMALL.recorded()
    assert state["splits"] == {"train": train, "val": val}
    assert train["source_hash"] == index.hash
    assert train["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out" / "train").iterdir())
    assert train["source_bytes"] == sum(Path(index.absolute(i)).stat().st_size for i in range(13))


def test_validation_images_are_the_originals(data, tmp_path):
    (row,) = pack(data, tmp_path / "out", JpegPack(short=32), splits=["val"], workers=1)
    index = build_index(data, "val")
    found = images(tmp_path / "out", "val")
    assert [packed for packed, _ in found.values()] == [Path(index.absolute(i)).read_bytes() for i in range(4)]
    assert (row["mean_abs_difference"], row["psnr_db"], row["copy_images"]) == (0, None, 4)
    assert not (tmp_path / "out" / "train").exists()


def test_other_formats_become_jpeg_and_metadata_goes(data, tmp_path):
    folder = data / "train" / "odd"
    folder.mkdir()
    rotated = Image.Exif()
    rotated[274] = 6
    picture = photo(36, 30, 3)
    gray16 = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 256 + 17)
    gray16.save(folder / "a.png")
    picture.convert("RGBA").save(folder / "b.png")
    photo(80, 60, 3).save(folder / "c.jpg", exif=rotated, comment="mine", quality=95)
    picture.convert("CMYK").save(folder / "d.jpg")
    (data / "val" / "odd").mkdir()
    picture.save(data / "val" / "odd" / "x.png")
    pack(data, tmp_path / "out", JpegPack(short=40, quality=95), workers=1)
    found = images(tmp_path / "out", "train")
    a, b, c, d = (opened(found[i][0]) for i in range(13, 17))
    assert [image.format for image in (a, b, c, d)] == ["JPEG"] * 4
    assert [image.size for image in (a, b, c, d)] == [(30, 36), (30, 36), (40, 53), (30, 36)]
    assert found[16][0] == (folder / "d.jpg").read_bytes()
    assert set(c.info) == {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    want = np.asarray(gray16) >> 8
    assert np.abs(np.asarray(a.convert("L")).astype(int) - want).mean() < 2
    assert np.abs(np.asarray(b).astype(int) - np.asarray(picture)).mean() < 12
    assert opened(images(tmp_path / "out", "val")[4][0]).format == "PNG"


def test_sizes():
    sizes = np.array([[500, 375], [375, 500], [256, 300], [257, 1000], [100, 90], [333, 333]], np.int32)
    want = [[341, 256], [256, 341], [256, 300], [256, 996], [100, 90], [256, 256]]
    assert packed_sizes(sizes, 256).tolist() == want
    assert packed_sizes(sizes, 0).tolist() == sizes.tolist()


def test_all_sizes_kept(data, tmp_path):
    train, _ = pack(data, tmp_path / "out", JpegPack(short=0), workers=1)
    index = build_index(data, "train")
    found = images(tmp_path / "out", "train")
    assert [packed for packed, _ in found.values()] == [Path(index.absolute(i)).read_bytes() for i in range(13)]
    assert train["pixels_ratio"] == 1


def test_the_stated_loss_is_what_the_evaluation_sees(data, tmp_path):
    write_split(tmp_path / "big", "train", {"cat": 3, "dog": 3}, size=(300, 400))
    (row,) = pack(tmp_path / "big", tmp_path / "out", JpegPack(short=128, quality=80), splits=["train"], workers=1)
    index = build_index(tmp_path / "big", "train")
    absolute, squared = [], []
    for i, (packed, _) in images(tmp_path / "out", "train").items():
        a, b = (
            np.asarray(x.resize((170, 128), Image.Resampling.BILINEAR).crop((29, 8, 29 + 112, 8 + 112)), np.float64)
            for x in (Image.open(index.absolute(i)), opened(packed))
        )
        absolute.append(np.abs(a - b).mean())
        squared.append(np.square(a - b).mean())
    assert row["view"] == [128, 112]
    assert row["sample"] == 6
    assert row["mean_abs_difference"] == pytest.approx(np.mean(absolute), rel=1e-3)
    assert row["psnr_db"] == pytest.approx(10 * np.log10(255**2 / np.mean(squared)), abs=0.01)
    assert row["pixels_ratio"] == pytest.approx(171 * 128 / (400 * 300))


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [SMALL, BLOCKS], ids=["jpeg", "blocks"])
def test_goes_on_where_it_stopped(data, tmp_path, monkeypatch, settings):
    out = tmp_path / "out"
    pack(data, tmp_path / "undisturbed", settings, workers=1)
    replace, written = os.replace, []

    def until_the_third_shard(source, target):
        if str(target).endswith(settings.suffix):
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", until_the_third_shard)
        with pytest.raises(KeyboardInterrupt):
            pack(data, out, settings, workers=1)
    assert len(shards(out)) == 2
    assert json.loads((out / "pack.json").read_text())["splits"]["train"]["complete"] is False
    times = {path.name: path.stat().st_mtime_ns for path in (out / "train").glob(f"*{settings.suffix}")}
    (out / "train" / f".shard-000002{settings.suffix}.99").write_bytes(b"what a killed process leaves")
    train, val = pack(data, out, settings, workers=1)
    assert (train["kept"], val["kept"], train["complete"]) == (2, 0, True)
    assert json.loads((out / "pack.json").read_text())["splits"] == {"train": train, "val": val}
    assert shards(out) == shards(tmp_path / "undisturbed")
    assert {name: (out / "train" / name).stat().st_mtime_ns for name in times} == times
    assert sorted(files(out)) == sorted(files(tmp_path / "undisturbed"))  # nothing else lies about
    assert pack(data, out, settings, workers=1)[0]["images_per_s"] is None


@pytest.mark.parametrize("settings", [SMALL, BLOCKS], ids=["jpeg", "blocks"])
@pytest.mark.parametrize("length", [0, 1000, 6000, -12000])
def test_a_shard_that_is_not_whole_is_made_again(data, tmp_path, length, settings):
    pack(data, tmp_path / "out", settings, workers=1)
    whole = shards(tmp_path / "out")
    path = tmp_path / "out" / "train" / f"shard-000001{settings.suffix}"
    path.write_bytes(path.read_bytes()[:length])
    assert pack(data, tmp_path / "out", settings, workers=1)[0]["kept"] == 2
    assert shards(tmp_path / "out") == whole


def alive(session: int) -> list[int]:
    """Processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):  # it has ended since
            continue
        if state != "Z" and int(its_session) == session:
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize(
    "settings",
    [JpegPack(short=200, shard_images=5), BlockPack(short=200, shard_gb=210000 / 2**30)],
    ids=["jpeg", "blocks"],
)
def test_killed_with_its_workers(tmp_path, settings):
    """SIGKILL of the parent alone: no worker continues, and the next run ends with an undisturbed run's bytes."""
    root, out = tmp_path / "data", tmp_path / "out"
    write_split(root, "train", {"cat": 30, "dog": 30}, size=(300, 400))
    build_index(root, "train")
    code = f"""
from ijckd_fast.data.prepare import BlockPack, JpegPack, pack
pack({str(root)!r}, {str(out)!r}, {settings!r}, splits=["train"], workers=2)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("train/shard-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 20
    while (left := alive(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert left == []
    there = shards(out)
    assert 2 <= len(there) < 12
    (row,) = pack(root, out, settings, splits=["train"], workers=1)
    assert row["kept"] == len(there)
    pack(root, tmp_path / "undisturbed", settings, splits=["train"], workers=1)
    assert shards(out) == shards(tmp_path / "undisturbed")


def test_a_worker_that_is_killed(data, tmp_path):
    def kill_the_first() -> None:
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.005)
        os.kill(workers[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    with pytest.raises(UserError, match=r"a worker process was ended from outside.*run the same command again"):
        pack(data, tmp_path / "out", JpegPack(short=40, shard_images=1), workers=2)
    killer.join()
    pack(data, tmp_path / "out", JpegPack(short=40, shard_images=1), workers=1)


def test_other_settings_or_other_data_are_refused(data, tmp_path):
    out = tmp_path / "out"
    pack(data, out, SMALL, splits=["train"], workers=1)
    before = files(out)

    def complaint(settings=SMALL) -> str:
        with pytest.raises(UserError) as caught:
            pack(data, out, settings, workers=1)
        assert files(out) == before
        return str(caught.value)

    text = complaint(JpegPack(short=48, quality=80, shard_images=5))
    assert "holds a pack with short 40 where 48 is expected; quality 90 where 80 is expected. To continue" in text
    assert "--overwrite deletes it and begins again" in text
    photo(48, 64, 99).save(data / "train" / "dog" / "new.jpg")
    assert "the train images of then" in complaint()
    (data / "train" / "dog" / "new.jpg").unlink()
    pack(data, out, SMALL, workers=1)  # val is added
    before = files(out)
    whole = shards(out)
    for text in ("{", "[]", '{"format": 3}'):
        (out / "pack.json").write_text(text)
        before = files(out)
        assert "pack.json" in complaint() or "format 3" in complaint()
    (out / "classes.txt").unlink()  # as a kill at a bad moment leaves it
    rows = pack(data, out, JpegPack(short=32, shard_images=20), overwrite=True, workers=1)
    assert sorted(shards(out)) == ["train/shard-000000.tar", "val/shard-000000.tar"]
    assert rows[0]["resize_images"] == 13
    pack(data, out, SMALL, overwrite=True, workers=1)
    assert shards(out) == whole


# --- files and folders that are not as they should be
# ------------------------------------------------------------------


def rot(path: Path, into: bytes = b"<html>404 not found</html>") -> None:
    """Damage that an index does not see: length and time stay."""
    status = path.stat()
    assert len(into) <= status.st_size
    path.write_bytes(into.ljust(status.st_size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.filterwarnings("ignore:1 of 14 files")
def test_bad_files_are_left_out_and_counted(data, tmp_path):
    DAMAGE["truncated body"](data / "train" / "cat" / "bad.jpg")
    index = build_index(data, "train")
    gone, good = Path(index.absolute(7)), Path(index.absolute(7)).read_bytes()
    rot(gone)
    said = []
    train, _ = pack(data, tmp_path / "out", SMALL, workers=1, on_bad=lambda path, why: said.append((path, why)))
    assert (train["images"], train["quarantined"], train["shards"]) == (12, 1, 3)
    assert train["left_out"] == [list(said[0])]
    assert said[0][0] == str(gone)
    assert "not an image" in said[0][1]
    assert list(images(tmp_path / "out", "train")) == [i for i in range(13) if i != 7]
    with pytest.warns(UserWarning, match="cannot be read any more and is left out"):
        again, _ = pack(data, tmp_path / "out", SMALL, workers=1)
    assert (again["kept"], again["left_out"]) == (2, train["left_out"])  # tried again
    with pytest.raises(TooManyUnreadable, match=r"1 files .* more than the 0 allowed.*--unreadable-limit"):
        pack(data, tmp_path / "out", SMALL, workers=1, unreadable_limit=0, on_bad=lambda *_: None)
    times = gone.stat()
    gone.write_bytes(good)
    os.utime(gone, ns=(times.st_atime_ns, times.st_mtime_ns))
    complete, _ = pack(data, tmp_path / "out", SMALL, workers=1)
    assert (complete["images"], complete["kept"], complete["left_out"]) == (13, 2, [])


@pytest.mark.parametrize("size", [(20, 30), (64, 48)])
def test_an_image_of_another_size_than_indexed_is_left_out(data, tmp_path, size):
    index = build_index(data, "train")
    assert index.sizes[6].tolist() == [64, 48]
    rot(Path(index.absolute(6)), jpeg(photo(*size), quality=30))
    with pytest.warns(
        UserWarning, match=rf"left out \(an image of {size[1]}x{size[0]} pixels where 64x48 were indexed"
    ):
        pack(data, tmp_path / "out", SMALL, splits=["train"], workers=1)
    assert list(images(tmp_path / "out", "train")) == [i for i in range(13) if i != 6]


def test_a_class_of_which_nothing_is_left_is_an_error(data, tmp_path):
    index = build_index(data, "val")
    for i in (0, 1):
        rot(Path(index.absolute(i)))
    with pytest.raises(UserError, match=r"no image of class 'cat' in .*val can be read any more"):
        pack(data, tmp_path / "out", SMALL, workers=1, on_bad=lambda *_: None)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: b"", "not an image"),
        (lambda data: jpeg(photo(41, 53)), r"53x41 pixels where 53x40 were packed"),
    ],
    ids=["cut", "empty", "size"],
)
def test_an_encoder_that_spoils_an_image_is_found_out(data, tmp_path, monkeypatch, spoil, why):
    encode = pack_jpeg.encode
    monkeypatch.setattr(pack_jpeg, "encode", lambda image, quality: spoil(encode(image, quality)))
    with pytest.raises(UserError, match=rf"shard-000000\.tar does not read back as it was packed \(.*{why}"):
        pack(data, tmp_path / "out", SMALL, workers=1)
    assert not list((tmp_path / "out" / "train").iterdir())


@pytest.mark.parametrize("member", ["000000002.jpg", "000000002.cls"])
def test_a_disk_that_spoils_a_member_is_found_out(data, tmp_path, monkeypatch, member):
    add = pack_jpeg.add_member

    def spoiling(tar, name, content):
        add(tar, name, content[:-4] + b"\0\0\xff\xd9" if name == member and name.endswith("jpg") else content)
        if name == member and name.endswith("cls"):
            tar.fileobj.seek(-512, 1)
            tar.fileobj.write(b"7".ljust(512, b"\0"))

    monkeypatch.setattr(pack_jpeg, "add_member", spoiling)
    with pytest.raises(UserError, match="does not read back as it was packed"):
        pack(data, tmp_path / "out", SMALL, workers=1)


def test_a_disk_that_loses_the_last_image_is_found_out(data, tmp_path, monkeypatch):
    add = pack_jpeg.add_member
    monkeypatch.setattr(
        pack_jpeg, "add_member", lambda tar, name, content: name[:9] == "000000004" or add(tar, name, content)
    )
    with pytest.raises(UserError, match=r"does not read back as it was packed \(images are missing at its end\)"):
        pack(data, tmp_path / "out", SMALL, workers=1)


@pytest.mark.parametrize("settings", [SMALL, BLOCKS], ids=["jpeg", "blocks"])
def test_no_space(data, tmp_path, monkeypatch, settings):
    for split in ("train", "val"):
        build_index(data, split)  # or the index could not be saved either

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            UserError, match=r"cannot be packed into, there is no space left: free some\. Finished shards stay"
        ):
            pack(data, tmp_path / "out", settings, workers=1)
    pack(data, tmp_path / "out", settings, workers=1)


def test_places_that_are_refused(data, tmp_path):
    for out in (data / "train", data / "val" / "cat", data / "train" / "new"):
        with pytest.raises(UserError, match="must not lie among the images"):
            pack(data, out, SMALL, workers=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds other things \('thesis\.tex'\) and no pack\.json; give another"):
            pack(data, tmp_path / "mine", SMALL, overwrite=overwrite, workers=1)
    with pytest.raises(UserError, match="holds other things"):
        pack(data, data, SMALL, workers=1)
    with pytest.raises(UserError, match="a part of it is a file"):
        pack(data, tmp_path / "mine" / "thesis.tex" / "x", SMALL, workers=1)
    assert sorted(path.name for path in data.iterdir()) == [".ijckd-index", "train", "val"]
    pack(data, data / "pack", SMALL, workers=1)  # beside train/ and val/ it may lie


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"short": 31}, "at least 32 pixels, or 0 to keep sizes, found 31"),
        ({"short": -1}, "at least 32 pixels"),
        ({"quality": 0}, "from 1 to 95, found 0"),
        ({"quality": 96}, "from 1 to 95, found 96"),
        ({"shard_images": 0}, "at least 1, found 0"),
    ],
    ids=str,
)
def test_impossible_settings(setting, why):
    with pytest.raises(UserError, match=why):
        JpegPack(**setting)


def test_impossible_options(data, tmp_path):
    for option, text in (({"workers": -1}, "--workers must"), ({"unreadable_limit": -1}, "--unreadable-limit must")):
        with pytest.raises(UserError, match=text):
            pack(data, tmp_path / "out", SMALL, **option)
    with pytest.raises(UserError, match="--splits must be of train and val, found test"):
        pack(data, tmp_path / "out", SMALL, splits=["test"])
    assert not (tmp_path / "out").exists()


def test_a_class_name_that_does_not_fit_a_line(tmp_path):
    write_split(tmp_path / "data", "train", {"cat": 1, "a\nb": 1})
    with pytest.raises(UserError, match=r"classes\.txt has one class in a line, which 'a\\nb' does not fit"):
        pack(tmp_path / "data", tmp_path / "out", SMALL, splits=["train"], workers=1)


def test_command(data, tmp_path, capfd):
    """With two workers; the shards are one worker's."""
    out = tmp_path / "out"
    options = ["--short", "40", "--shard-images", "5"]
    assert cli.main(["pack", str(data), str(out), *options, "--workers", "2"]) == 0
    text = capfd.readouterr().out
    rows = json.loads(text.splitlines()[-1])["rows"]
    assert [(row["split"], row["images"]) for row in rows] == [("train", 13), ("val", 4)]
    assert "grey levels" in text
    pack(data, tmp_path / "one", SMALL, workers=1)
    assert shards(out) == shards(tmp_path / "one")
    assert cli.main(["pack", str(data), str(out), "--short", "48"]) == 2
    assert "short 40 where 48 is expected" in capfd.readouterr().err
    assert cli.main(["pack", str(data), str(out), "--splits", "test"]) == 2
    assert "test" in capfd.readouterr().err


def test_a_pack_trains_as_what_it_was_made_of(tmp_path):
    """With copied images: the same weights to the bit, by DALI."""
    write_tree(tmp_path / "data")
    pack(tmp_path / "data", tmp_path / "pack", JpegPack(short=0, shard_images=7), workers=1)
    states = []
    for name in ("data", "pack"):
        summary = train(config(tmp_path / name, tmp_path / f"run-{name}", data_backend="dali", epochs=2))
        state = checkpoint.load(tmp_path / f"run-{name}" / "last.pt")
        states.append((state["learner"], state["optimizer"], state["classes"], summary["last"]["top1_percent"]))
    assert not differing(*states)
