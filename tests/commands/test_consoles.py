"""Commands whose console goes away, is full or was never there: what they do, and where they say what went wrong."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest
from processes import Run
from tiny_run import options, settings, write_tree

from ijckd_fast import cli
from ijckd_fast.train import run_folder

CLOSED = {0: "closed", 1: "closed", 2: "closed"}


def _stream(descriptor: int, mode: str, encoding: str):
    """As Python makes it when it starts."""
    try:
        return open(descriptor, mode, encoding=encoding, closefd=False)
    except OSError:
        return None


def _behind(where: dict[int, str], encoding: str, words: list[str]) -> int:
    """The command, with descriptors that are closed, or lead to a full device, a reader that is gone, or a file."""
    for descriptor, what in where.items():
        if what == "closed":
            os.close(descriptor)
        elif what == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)
        elif what == "gone":
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, descriptor)
        else:
            os.dup2(os.open(what, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdin, sys.stdout, sys.stderr = (_stream(n, "w" if n else "r", encoding) for n in range(3))
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    with contextlib.redirect_stdout(sys.stdout), contextlib.redirect_stderr(sys.stderr):
        return cli.main(words)


@pytest.fixture
def ends(tmp_path):
    """Exit code of a command behind such a console."""

    def run(where: dict[int, str], words: list[str], encoding: str = "utf-8") -> int:
        return Run(tmp_path, 1, _behind, where, encoding, words).ends()[0]

    return run


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """The images of tiny_run, one class with a name that is not ASCII."""
    root = write_tree(tmp_path_factory.mktemp("ünï"))
    for split in ("train", "val"):
        (root / split / "bee").rename(root / split / "βee")
    return root


def _train(data: Path, folder: Path, **changes) -> list[str]:
    return ["train", *options(settings(data, folder, **{"max_steps": 2, "log_interval": 1, **changes}))]


@pytest.mark.parametrize(
    "where",
    [CLOSED, {1: "gone", 2: "gone"}, {1: "full", 2: "full"}],
    ids=str,
)
def test_a_run_does_not_need_its_console(odd, tmp_path, ends, where):
    folder = tmp_path / "rün"
    assert ends(where, _train(odd, folder), encoding="ascii") == 0
    assert [(row["kind"], row["step"]) for row in run_folder.read_log(folder)] == [
        ("train", 1), ("train", 2), ("eval", 2)
    ]  # fmt: skip
    assert (folder / run_folder.SUMMARY).exists()
    assert not (folder / run_folder.STOPPED).exists()


def test_a_run_that_fails_without_a_console_says_so_in_its_folder(data, tmp_path, ends):
    folder = tmp_path / "run"
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    weak = {"objective": "kd", "teacher": "resnet8x0.5", "teacher_checkpoint": tmp_path / "broken.pt"}
    assert ends(CLOSED, _train(data, folder, **weak)) == 2
    assert f"{tmp_path / 'broken.pt'}" in (folder / run_folder.STOPPED).read_text()


@pytest.mark.parametrize(
    ("where", "code"),
    [({1: "full"}, 2), ({1: "full", 2: "full"}, 2), ({1: "gone"}, 0), ({1: "closed"}, 0), ({2: "gone"}, 0)],
    ids=str,
)
def test_figures_that_could_not_be_printed(data, tmp_path, ends, where, code):
    said = tmp_path / "said"
    assert ends({2: str(said), **where}, ["index", str(data)]) == code
    if where == {1: "full"}:
        assert said.read_text() == (
            "ijckd-fast: what was printed could not be written (No space left on device): free some space, or print"
            " elsewhere\n"
        )


def test_help_that_could_not_be_printed(ends):
    assert ends({1: "full"}, ["--help"]) == 2
    assert ends({1: "gone"}, ["--help"]) == 0


def test_a_mistake_is_said_where_it_can_be(tmp_path, ends):
    said = tmp_path / "said"
    assert ends({1: str(said), 2: "closed"}, ["index", "/nowhere"]) == 2
    assert "ijckd-fast: " in said.read_text()
    assert "/nowhere is not a folder" in said.read_text()
