"""Every signal in every phase: what is kept, as a table in docs/signals.md has it, and that the command continues."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from image_tree import write_split
from rich.progress import Progress
from tiny_run import differing, distilled, options, settings, write_tree

from ijckd_fast import cli
from ijckd_fast.data.index import build
from ijckd_fast.distill import Distiller
from ijckd_fast.train import FiniteGuard, checkpoint, run_folder

ROOT = Path(__file__).parents[2]
ENDING = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
EVERY = pytest.mark.parametrize("number", [*ENDING, signal.SIGUSR1], ids=lambda number: number.name)
STEPS = 8  # two epochs, each with an evaluation


def told(phase: str, number: int) -> str:
    """A cell of the table in docs/signals.md."""
    lines = [line for line in (ROOT / "docs" / "signals.md").read_text().splitlines() if line.startswith("| ")]
    head, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    (row,) = [row for row in rows if row[0] == phase]
    return row[head.index(signal.Signals(number).name)]


def before(owner: object, name: str, count: int, do: Callable[[], None]) -> Callable[..., object]:
    """owner.name, but `do` comes before its call of that number."""
    original, calls = getattr(owner, name), []

    def called(*arguments, **named):
        calls.append(1)
        if len(calls) == count:
            do()
        return original(*arguments, **named)

    return called


def after(name: str, count: int, do: Callable[[], None]) -> Callable[..., object]:
    """Progress.advance, in which `do` comes after its call of that number on a bar of this name."""
    original, calls = Progress.advance, []

    def advance(self, task, *arguments):
        original(self, task, *arguments)
        if self.tasks[task].description == name:
            calls.append(1)
            if len(calls) == count:
                do()

    return advance


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture
def said(capsys):
    """Of a command: its exit code, and what it says of its end."""

    def run(words: list[str]) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.main(words)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, err.splitlines()[-1] if code else ""

    return run


def words(data: Path, folder: Path, teacher: Path) -> list[str]:
    changes = {"epochs": STEPS // 4, "eval_every": 1, "log_interval": 1, **distilled(teacher)}
    return ["train", *options(settings(data, folder, **changes))]


@pytest.fixture(scope="module")
def undisturbed(data, teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert cli.main(words(data, folder, teacher)) == 0
    return folder


def require_same_end(folder: Path, undisturbed: Path) -> None:
    states = [checkpoint.load(each / "last.pt") for each in (folder, undisturbed)]
    assert differing(*(state["learner"] for state in states)) == []
    kinds = [[(row["kind"], row["step"]) for row in run_folder.read_log(each)] for each in (folder, undisturbed)]
    assert kinds[0] == kinds[1]
    assert (folder / run_folder.SUMMARY).exists()
    assert not (folder / run_folder.STOPPED).exists()


def saves(monkeypatch) -> list[tuple[str, int]]:
    """The names and steps of the checkpoints that are written from now on."""
    save, written = checkpoint.save, []

    def saving(path, state):
        save(path, state)
        written.append((path.name, state["step"]))

    monkeypatch.setattr(checkpoint, "save", saving)
    return written


def of_checkpoints(folder: Path, step: int, line: str) -> str:
    """What is kept of a run that was stopped, or was to be, at a step; line: what it said."""
    at = checkpoint.load(folder / "last.pt")["step"]
    assert line == (f"ijckd-fast: {(folder / run_folder.STOPPED).read_text().strip()}"), (
        "the folder says what the console says"
    )
    assert f" at step {at} of {STEPS}, everything is saved: continue with ijckd-fast train --resume {folder}" in line
    return {step: "`last.pt` of this step", step + 1: "`last.pt` of the next step"}[at]


@EVERY
def test_first_scan(teacher, undisturbed, tmp_path, said, monkeypatch, number):
    data, folder, opened = write_tree(tmp_path / "data"), tmp_path / "run", []
    check = build.check_image
    monkeypatch.setattr(build, "check_image", lambda place, *rest: (opened.append(place.path), check(place, *rest))[1])
    monkeypatch.setattr(build, "FILES_PER_TASK", 1)
    index = data / ".ijckd-index" / "train.parquet"
    seen = []

    def look() -> None:
        seen.append(pq.read_metadata(index).num_rows if index.exists() else 0)

    written = saves(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", after("checking files", 5, kill(number)))
        if number == signal.SIGUSR1:
            patch.setattr(Progress, "advance", before(Progress, "advance", 25, look))
        code, line = said(words(data, folder, teacher))
    if number == signal.SIGUSR1:
        assert written[0] == ("last.pt", 1)
        assert 0 < seen[0] < 36
        cell = f"{code}: what was decoded; then `last.pt` of the first step"
    else:
        assert "before the first step, what was decoded for the index is kept: the same command begins again" in line
        kept = pq.read_metadata(index).num_rows
        assert 5 <= kept == len(opened) < 36
        assert not (folder / run_folder.LOG).exists()
        cell = f"{code}: what was decoded"
        opened.clear()
        assert said(words(data, folder, teacher))[0] == 0
        assert len(opened) == 54 - kept
    assert cell == told("first scan", number)
    require_same_end(folder, undisturbed)


@EVERY
def test_teachers_evaluation(data, teacher, undisturbed, tmp_path, said, monkeypatch, number):
    folder, written = tmp_path / "run", saves(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "teacher_logits", before(Distiller, "teacher_logits", 2, kill(number)))
        code, line = said(words(data, folder, teacher))
    if number == signal.SIGUSR1:
        assert written[0] == ("last.pt", 1)
        cell = f"{code}: `last.pt` of the first step"
    else:
        assert "before the first step" in line
        assert {path.name for path in folder.iterdir()} == {"lock", run_folder.STOPPED}
        cell = f"{code}: the index"
        monkeypatch.setattr(build, "check_image", None)  # which is not needed again
        assert said(words(data, folder, teacher))[0] == 0
    assert cell == told("teacher's evaluation", number)
    require_same_end(folder, undisturbed)


@EVERY
@pytest.mark.parametrize("phase", ["training", "evaluation", "checkpoint"])
def test_from_the_first_step_on(data, teacher, undisturbed, tmp_path, said, monkeypatch, phase, number):
    folder, written = tmp_path / "run", saves(monkeypatch)
    command, step = words(data, folder, teacher), 3
    with monkeypatch.context() as patch:
        if phase == "training":
            patch.setattr(FiniteGuard, "update", before(FiniteGuard, "update", step, kill(number)))
        elif phase == "evaluation":
            step = 4
            patch.setattr(Distiller, "predict", before(Distiller, "predict", 2, kill(number)))
        else:
            command += ["--checkpoint-steps", "3"]
            begun, sent = checkpoint.save, threading.Event()

            def slow(path, state):
                assert sent.wait(60)
                begun(path, state)

            def begin(self, path, *rest):
                start(self, path, *rest)
                if state_of(rest) == 3 and not sent.is_set():
                    kill(number)()
                sent.set()

            start = checkpoint.Writer.save
            patch.setattr(checkpoint, "save", slow)
            patch.setattr(checkpoint.Writer, "save", begin)
        code, line = said(command)
    if number == signal.SIGUSR1:
        at = [at for name, at in written if name == "last.pt"]
        what = {step: "`last.pt` of this step", step + 1: "`last.pt` of the next step"}
        cell = f"{code}: {' and '.join(what[each] for each in at if each in what)}"
    else:
        cell = f"{code}: {of_checkpoints(folder, step, line)}"
        if phase == "evaluation":
            cell += f" and {len([row for row in run_folder.read_log(folder) if row['kind'] == 'eval'])} evaluation"
        if phase == "checkpoint":
            assert [at for name, at in written if name == "last.pt"] == [3, 4]
        assert said(["train", "--resume", str(folder)])[0] == 0
    assert cell == told(phase, number)
    require_same_end(folder, undisturbed)


def state_of(rest: tuple) -> int:
    return rest[0]["step"]


@EVERY
def test_pack(tmp_path, said, monkeypatch, number):
    write_split(tmp_path / "data", "train", {"cat": 6, "dog": 6})
    out = tmp_path / "out"
    command = ["pack", str(tmp_path / "data"), "OUT", "--splits", "train", "--short", "40", "--shard-images", "3"]
    command += ["--workers", "1"]

    def shards(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (folder / "train").iterdir()}

    def packing(folder: Path) -> tuple[int, str]:
        return said([folder if word == "OUT" else word for word in command])

    assert packing(str(tmp_path / "undisturbed"))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", after("packing train", 2, kill(number)))
        code, line = packing(str(out))
    if number == signal.SIGUSR1:
        cell = f"{code}: it continues"
    else:
        assert "finished shards are kept: the same command continues where it stopped" in line
        assert sorted(shards(out)) == ["shard-000000.tar", "shard-000001.tar"]
        cell = f"{code}: finished shards"
        assert packing(str(out))[0] == 0
    assert cell == told("pack", number)
    assert shards(out) == shards(tmp_path / "undisturbed")


@EVERY
def test_cache(data, teacher, tmp_path, said, monkeypatch, number):
    def caching(folder: Path) -> tuple[int, str]:
        given = {"data_dir": data, "teacher": "resnet8x0.5", "teacher_checkpoint": teacher, "image_size": 16}
        given |= {"eval_resize": 16, "batch_size": 6, "data_backend": "pillow", "device": "cpu", "views": 1}
        return said(["cache", str(folder), "--allow-weak-teacher", "--chunk-images", "12", *options(given)])

    def chunks(folder: Path) -> int:
        return (folder / "progress.jsonl").read_text().count("\n")

    out = tmp_path / "out"
    assert caching(tmp_path / "undisturbed") == (0, "")
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", after("caching", 5, kill(number)))
        code, line = caching(out)
    if number == signal.SIGUSR1:
        cell = f"{code}: it continues"
    else:
        assert f"stopped by {number.name}, 2 of 3 chunks are there: the same ijckd-fast cache command continues" in line
        assert chunks(out) == 2
        cell = f"{code}: finished chunks"
        assert caching(out)[0] == 0
    assert chunks(out) == 3
    assert cell == told("cache", number)
    assert (out / "features.bin").read_bytes() == (tmp_path / "undisturbed" / "features.bin").read_bytes()
