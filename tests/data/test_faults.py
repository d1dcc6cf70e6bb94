"""docs/data.md's table of bad files: every row is a case, and every case does what its row says."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from image_tree import DAMAGE, jpeg_bytes, photo, write_split
from PIL import Image
from rich.console import Console
from tiny_run import config, write_tree

from ijckd_fast.data import Augment, EvalPlan, Index, TrainPlan, build_index, make_loader
from ijckd_fast.train import train

EXECUTORS = ["DALI", "Pillow"]
AUGMENT = Augment(image_size=24, eval_resize=28, scale=(1.0, 1.0))  # crops that reach every damage
SIZE = (48, 64)  # (h, w) of the sound images
BATCH = 4
BAD = 15  # the last of 16 images, so that it can vanish before it is read
DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"


class Row(NamedTuple):
    index: str
    training: str
    evaluation: str


def documented() -> dict[str, Row]:
    """The table, by kind of file."""
    text = DOCUMENT.read_text()
    lines = text[text.index("| kind of file |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][0] == "kind of file"
    return {kind: Row(*rest) for kind, *rest in cells[2:]}


# --- ways to spoil a file; each takes the path of a sound one and returns where it is then ----------------------------


def replaced(write: Callable[[Path], object]) -> Callable[[Path], Path]:
    def spoil(path: Path) -> Path:
        path.unlink()
        write(path)
        return path

    return spoil


def picture(format: str, size: tuple[int, int] = SIZE, mode: str = "RGB", **options) -> Callable[[Path], Path]:
    return replaced(lambda path: photo(*size, seed=5).convert(mode).save(path, format=format, **options))


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    return replaced(lambda path: path.write_bytes(change(jpeg_bytes(path))))


def renamed(name: bytes) -> Callable[[Path], Path]:
    return lambda path: path.rename(path.with_name(os.fsdecode(name)))


def rotation() -> Image.Exif:
    exif = Image.Exif()
    exif[274] = 6
    return exif


def claiming(jpeg: bytes) -> bytes:
    frame = jpeg.index(b"\xff\xc0")  # SOF0: length 2, precision 1, height 2, width 2
    return jpeg[: frame + 5] + b"\xff\xff\xff\xff" + jpeg[frame + 9 :]


def scratched(jpeg: bytes) -> bytes:
    """Some bytes of the compressed data changed, none of them into or out of a marker."""
    changed = bytearray(jpeg)
    for i in range(jpeg.index(b"\xff\xda") + 100, len(jpeg) - 2, 97):
        if 0xFF not in jpeg[i - 1 : i + 2] and changed[i] not in (0, 0xFF ^ 0x15):
            changed[i] ^= 0x15
    assert changed != jpeg
    return bytes(changed)


CASES: dict[str, Callable[[Path], Path]] = {
    "empty": replaced(DAMAGE["zero bytes"]),
    "text named .jpg": replaced(DAMAGE["text"]),
    "zeros, of the same length": rewritten(lambda jpeg: bytes(len(jpeg))),
    "cut off inside the header": replaced(DAMAGE["truncated header"]),
    "cut in half": replaced(DAMAGE["truncated body"]),
    "last two bytes missing": replaced(DAMAGE["missing last bytes"]),
    "bytes before the image": rewritten(lambda jpeg: b"\r\n" + jpeg),
    "bytes after the image": rewritten(lambda jpeg: jpeg + b"junk" * 2000),
    "bytes changed inside the image": rewritten(scratched),
    "header that claims 65535 x 65535 pixels": rewritten(claiming),
    "link to nothing": replaced(lambda path: path.symlink_to("nowhere.jpg")),
    "link to itself": replaced(lambda path: path.symlink_to(path.name)),
    "no permission": lambda path: (path.chmod(0), path)[1],
    "folder named .jpg": replaced(lambda path: path.mkdir()),
    "named pipe": replaced(os.mkfifo),
    "hidden (`._x.jpg`)": renamed(b"._x.jpg"),
    "JPEG named .JFIF": renamed(b"x.JFIF"),
    "JPEG with no extension": renamed(b"x"),
    "JPEG named .jpg_large": renamed(b"x.jpg_large"),
    "vanishes during the run": lambda path: (path.unlink(), path)[1],
    "replaced by an image of another size": picture("JPEG", (30, 40)),
    "1 x 1 pixel": picture("JPEG", (1, 1)),
    "20,000 pixels wide": picture("JPEG", (8, 20_000)),
    "name that is not UTF-8": renamed(b"\xff\xfe.jpg"),
    "CMYK JPEG": picture("JPEG", mode="CMYK"),
    "PNG named .jpg": picture("PNG"),
    "EXIF rotation": picture("JPEG", exif=rotation()),
    "GIF named .jpg": picture("GIF"),
    "TIFF with a rotation": picture("TIFF", exif=rotation()),
    "TIFF of floats": picture("TIFF", mode="F"),
}
ROWS = documented()


def test_every_row_has_a_case_and_every_case_a_row():
    assert list(ROWS) == list(CASES)
    assert len(CASES) >= 14


# --- what is checked --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """As a user who may not read everything, also where the tests run as the superuser."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(65534)
    except PermissionError:
        pytest.skip("the superuser may read anything, and may not become anybody else here")
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def root(monkeypatch) -> Iterator[Path]:
    """16 images in two classes, in a folder that everybody can reach: pytest's own is private."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    write_split(folder, "train", {"cat": 8, "dog": 8}, size=SIZE)
    yield folder
    shutil.rmtree(folder)


class Seen(NamedTuple):
    ids: list[int]
    images: torch.Tensor  # [n, 3, 24, 24]
    bad: list[str]


def show(index: Index, executor: str, training: bool, during: Callable[[], object] = lambda: None) -> Seen:
    """One epoch or evaluation. `during` is called after the first batch. Every label is that of the image's folder."""
    bad: list[str] = []
    plan = TrainPlan(index, AUGMENT, BATCH, training_seed(index)) if training else EvalPlan(index, AUGMENT, BATCH)
    stop = plan.steps_per_epoch if training else None
    ids, images = [], []
    with make_loader(
        executor.lower(), plan, prefetch=1, stop=stop, on_bad=lambda path, why: bad.append(path)
    ) as loader:
        for batch in loader:
            ids += batch.ids.tolist()
            images.append(batch.images)
            assert [index.paths[i].split("/")[1] for i in batch.ids] == [index.classes[k] for k in batch.labels]
            during()
            during = lambda: None  # noqa: E731
    return Seen(ids, torch.cat(images), bad)


def training_seed(index: Index) -> int:
    """Of an order in which BAD comes in the last batch of 16 images."""
    return (
        next(seed for seed in range(99) if BAD in TrainPlan(index, AUGMENT, BATCH, seed).batch(3).ids)
        if len(index) == 16
        else 0
    )


def same_pixels(dali: Seen, pillow: Seen) -> bool:
    std = torch.tensor(AUGMENT.std)[:, None, None]
    return dali.ids == pillow.ids and bool(
        ((dali.images - pillow.images) * 255 * std).abs().mean((1, 2, 3)).max() < 0.6
    )


def of(cell: str, executor: str) -> str:
    """What a cell says of one executor."""
    found = re.search(rf"{executor}: ([^;]+)", cell)
    return found[1] if found else cell


@pytest.mark.filterwarnings("ignore:.*left out, e.g.")
@pytest.mark.parametrize("kind", [kind for kind, row in ROWS.items() if row.index != "-"])
def test_found_by_the_index(root, kind):
    said = ROWS[kind].index
    path = CASES[kind](root / "train" / "dog" / "007.jpg")
    name = str(path.relative_to(root))
    warned = said == "passed over, with a warning"
    with nobody(), pytest.warns(UserWarning, match="1 files .* are not used") if warned else contextlib.nullcontext():
        index = build_index(root, "train")
        again = build_index(root, "train")
    assert (again.hash, list(again.quarantined)) == (index.hash, list(index.quarantined))
    paths = [index.paths[i] for i in range(len(index))]
    assert (name in paths) == (said == "used")
    if said.startswith("left out: "):
        ((left_out, reason),) = index.quarantined
        assert left_out == name
        assert said.removeprefix("left out: ").strip("`") in reason
    else:
        assert said in ("used", "not listed") or warned
        assert not index.quarantined

    with nobody():
        shown = {(e, training): show(index, e, training) for e in EXECUTORS for training in (True, False)}
    for (_, training), seen in shown.items():
        assert seen.bad == []
        assert (
            sorted(seen.ids) == list(range(len(index)))
            if not training
            else len(set(seen.ids)) == len(index) // BATCH * BATCH
        )
    for training in (True, False):
        assert same_pixels(shown["DALI", training], shown["Pillow", training])


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("kind", [kind for kind, row in ROWS.items() if row.training != "-"])
def test_after_the_index(root, kind, executor):
    index = build_index(root, "train")
    path = Path(index.absolute(BAD))
    sound = {training: show(index, executor, training) for training in (True, False)}
    assert all(seen.ids.count(BAD) == 1 for seen in sound.values())
    content = path.read_bytes()
    for training, cell in ((True, ROWS[kind].training), (False, ROWS[kind].evaluation)):
        said = of(cell, executor)
        if kind == "vanishes during the run":
            seen = show(index, executor, training, during=lambda: CASES[kind](path))
        else:
            CASES[kind](path)
            with nobody():
                seen = show(index, executor, training)
        at = sound[training].ids.index(BAD)
        if said.startswith("used"):
            assert (seen.ids, seen.bad) == (sound[training].ids, [])
        elif said == "stand-in":
            assert training
            assert seen.bad == [str(path)]
            assert seen.ids == [8 if i == BAD else i for i in sound[training].ids]  # the next of its class, around
            assert torch.equal(seen.images[:at], sound[training].images[:at])
            assert torch.equal(seen.images[at + 1 :], sound[training].images[at + 1 :])
        else:
            assert (said, training) == ("left out", False)
            assert seen.bad == [str(path)]
            assert seen.ids == [i for i in sound[training].ids if i != BAD]
            assert torch.equal(seen.images, sound[training].images[:at])
        with contextlib.suppress(FileNotFoundError):
            path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(content)


@pytest.mark.parametrize(
    "kind", [kind for kind, row in ROWS.items() if "used" in row.training and ":" not in row.training]
)
def test_used_by_both_executors(root, kind):
    index = build_index(root, "train")
    CASES[kind](Path(index.absolute(BAD)))
    for training, cell in ((True, ROWS[kind].training), (False, ROWS[kind].evaluation)):
        assert same_pixels(*(show(index, e, training) for e in EXECUTORS)) == (cell == "used")
        assert cell in ("used", "used, with other pixels")


def test_a_cache_folder_that_may_not_be_looked_into(root):
    (root / "cache").mkdir(mode=0)
    with nobody():
        assert len(build_index(root, "train")) == 16


@pytest.mark.parametrize("backend", ["dali", "pillow"])
def test_a_run_names_a_bad_file_whose_name_is_not_utf8(tmp_path, backend):
    data = write_tree(tmp_path / "data")
    bad = renamed(b"\xff\xfe.jpg")(data / "train" / "bee" / "003.jpg")
    for split in ("train", "val"):
        build_index(data, split)
    status = bad.stat()
    bad.write_bytes(bytes(status.st_size))
    os.utime(bad, ns=(status.st_atime_ns, status.st_mtime_ns))
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # as strict as standard output
    run = config(data, tmp_path / "run", data_backend=backend, epochs=2)
    summary = train(run, console=Console(file=printed, width=1000))
    assert summary["unreadable_files"] == 1
    printed.seek(0)
    assert r"train/bee/\udcff\udcfe.jpg cannot be read any more" in printed.read()
