import io
import os
import tarfile
from pathlib import Path

import pytest
from command_line import rows_of
from image_tree import photo

from ijckd_fast import cli
from ijckd_fast.data import build_index
from ijckd_fast.data.prepare import imagenet
from ijckd_fast.data.prepare.imagenet import prepare_imagenet
from ijckd_fast.errors import UserError

CLASSES = ("n01440764", "n01443537", "n02084071")


@pytest.fixture(autouse=True)
def _no_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    photo(40, 48, seed).save(file, format="JPEG")
    return file.getvalue()


def tar_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def archives(tmp_path) -> dict[str, Path]:
    """As ImageNet's: four images in each of three classes, six validation images."""
    inner = {
        f"{name}.tar": tar_of({f"{name}_{i}.JPEG": jpeg(10 * c + i) for i in range(4)})
        for c, name in enumerate(CLASSES)
    }
    (tmp_path / "train.tar").write_bytes(tar_of(inner))
    (tmp_path / "val.tar").write_bytes(tar_of({f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(100 + i) for i in range(6)}))
    rows = [f"ILSVRC2012_val_{i:08d},{CLASSES[i % 3]} 1 2 3 4" for i in (4, 0, 1, 5, 2, 3)]
    (tmp_path / "labels.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    return {"train_tar": tmp_path / "train.tar", "val_tar": tmp_path / "val.tar", "val_labels": tmp_path / "labels.csv"}


def tree(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_unpacks_into_the_layout_that_is_read(archives, tmp_path):
    done = prepare_imagenet(tmp_path / "out", **archives)
    assert done == {
        "train": {"images": 12, "classes": 3, "written": 12},
        "val": {"images": 6, "classes": 3, "written": 6},
    }
    found = tree(tmp_path / "out")
    assert found["train/n01443537/n01443537_2.JPEG"] == jpeg(12)
    assert found["val/n02084071/ILSVRC2012_val_00000005.JPEG"] == jpeg(105)
    assert len(found) == 18
    train = build_index(tmp_path / "out", "train")
    assert (len(train), train.classes) == (12, CLASSES)
    assert build_index(tmp_path / "out", "val", classes=CLASSES).labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_goes_on_where_it_stopped(archives, tmp_path, monkeypatch):
    replace, written = os.replace, []

    def until_the_seventh(source, target):
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append(target)
        replace(source, target)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", until_the_seventh)
        with pytest.raises(KeyboardInterrupt):
            prepare_imagenet(out, **archives)
    assert len(tree(out)) == 7
    cut = out / "train" / CLASSES[0] / f"{CLASSES[0]}_1.JPEG"
    cut.write_bytes(cut.read_bytes()[:100])  # as a power cut leaves it
    assert prepare_imagenet(out, **archives)["train"] == {"images": 12, "classes": 3, "written": 6}
    whole = tree(out)
    assert prepare_imagenet(out, **archives)["train"]["written"] == 0
    assert tree(out) == whole
    assert whole[f"train/{CLASSES[0]}/{CLASSES[0]}_1.JPEG"] == jpeg(1)


def test_one_archive_at_a_time(archives, tmp_path):
    prepare_imagenet(tmp_path / "out", train_tar=archives["train_tar"])
    assert not (tmp_path / "out" / "val").exists()
    prepare_imagenet(tmp_path / "out", val_tar=archives["val_tar"], val_labels=archives["val_labels"])
    assert len(tree(tmp_path / "out")) == 18


@pytest.mark.parametrize(
    "name", ["../n01440764.tar", "/n01440764.tar", "a/../../n01440764.tar", "n01440764.zip", "cat.tar"]
)
def test_outer_names_that_are_not_imagenet_s(tmp_path, name):
    (tmp_path / "train.tar").write_bytes(tar_of({name: tar_of({"n01440764_1.JPEG": jpeg(0)})}))
    with pytest.raises(
        UserError, match=r"train\.tar: expected one archive per class.*found .*is it ImageNet's archive"
    ):
        prepare_imagenet(tmp_path / "a" / "out", train_tar=tmp_path / "train.tar")
    assert not tree(tmp_path / "a") if (tmp_path / "a").exists() else True


@pytest.mark.parametrize("name", ["../../../x.JPEG", "/x.JPEG", "..JPEG", "x.exe", "a/../x.JPEG"])
def test_inner_names_that_are_not_imagenet_s(tmp_path, name):
    (tmp_path / "train.tar").write_bytes(tar_of({"n01440764.tar": tar_of({name: jpeg(0)})}))
    with pytest.raises(
        UserError, match=r"train\.tar, n01440764\.tar: expected images n01440764_10026\.JPEG only, found"
    ):
        prepare_imagenet(tmp_path / "a" / "b" / "out", train_tar=tmp_path / "train.tar")
    assert not list(tmp_path.rglob("*.JPEG"))
    assert not list(tmp_path.rglob("*.exe"))


def test_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        info = tarfile.TarInfo("x.JPEG")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    (tmp_path / "labels").write_text("x n01440764\n")
    with pytest.raises(UserError, match=r"found 'x\.JPEG', which is no plain file"):
        prepare_imagenet(tmp_path / "out", val_tar=tmp_path / "val.tar", val_labels=tmp_path / "labels")


def test_archives_that_are_cut_short_anywhere(archives, tmp_path):
    whole = archives["train_tar"].read_bytes()
    end = whole.rindex(jpeg(23)[-100:]) + 100  # the last image's
    for length in (0, 100, *range(512, end, 2048), end):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.tar (cannot be read as a tar archive|ends within)"):
            prepare_imagenet(tmp_path / "out", train_tar=tmp_path / "cut.tar")
    assert prepare_imagenet(tmp_path / "out", train_tar=archives["train_tar"])["train"]["images"] == 12


def test_labels_and_counts_that_do_not_fit(archives, tmp_path, monkeypatch):
    out = tmp_path / "out"
    labels = archives["val_labels"]
    whole = labels.read_text()

    def complaint(**more) -> str:
        with pytest.raises(UserError) as caught:
            prepare_imagenet(out, **{**archives, **more})
        return str(caught.value)

    labels.write_text(whole.replace("ILSVRC2012_val_00000004,n01443537 1 2 3 4\n", ""))
    assert "must name the class of every image" in complaint()
    labels.write_text(whole + "\nILSVRC2012_val_00000009,n01443537 1 2 3 4\n")
    assert "1 are not there ('ILSVRC2012_val_00000009')" in complaint()
    labels.write_text(whole.replace("n01443537", "n99999999"))
    assert "labels.csv, line 2: class 'n99999999' is no folder of" in complaint()
    labels.write_text(whole)
    assert "go together; give both" in complaint(val_labels=None)
    assert "nothing to unpack" in complaint(train_tar=None, val_tar=None, val_labels=None)
    assert "there is no file" in complaint(train_tar=tmp_path / "nowhere.tar")
    monkeypatch.setattr(imagenet, "COMPLETE", {"val.tar": 7})
    assert "val.tar should hold 7 images, found 6; fetch it again" in complaint()
    monkeypatch.undo()
    (out / "train" / CLASSES[1] / "mine.JPEG").write_bytes(jpeg(0))
    assert f"{CLASSES[1]} should hold the 4 images" in complaint()


def test_command(archives, tmp_path, capsys):
    options = [f"--{name.replace('_', '-')}={path}" for name, path in archives.items()]
    assert cli.main(["prepare-imagenet", str(tmp_path / "out"), *options]) == 0
    out = capsys.readouterr().out
    assert "12 images of 3 classes, 12 of them written now" in out
    assert rows_of(out)[1] == {"split": "val", "images": 6, "classes": 3, "written": 6}
    assert cli.main(["prepare-imagenet", str(tmp_path / "out")]) == 2
    assert "nothing to unpack" in capsys.readouterr().err
