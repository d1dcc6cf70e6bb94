"""Consoles that go away, are full, or were never there: nothing raises, and what ends a command is still known."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

PRELUDE = "import os, sys; from ijckd_fast import streams; streams.guard(); "


def run(code: str, redirected: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Python in bash, with redirections of it."""
    return subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {redirected}', sys.executable, PRELUDE + code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


SAY = "print('x' * 100_000); print('told', file=sys.stderr); sys.stdout.flush(); "


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "redirected",
    ["", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", "&>/dev/full", "1</dev/null"],
)
def test_nothing_raises(redirected, unbuffered):
    done = run(SAY + "sys.exit(3)", redirected, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 3
    assert done.stderr == ("" if "2>" in redirected or "&>" in redirected else "told\n")
    assert len(done.stdout) == (100_001 if redirected in ("", "2>&-", "2>/dev/full") else 0)


@pytest.mark.parametrize("redirected", ["| head -c 1", "2>&1 | true", "> >(true) 2> >(true)"])
def test_readers_that_go_away(tmp_path, redirected):
    """30 times more is said than a pipe holds."""
    code = f"[({SAY.replace('; ', ', ')}) for _ in range(30)]; open({str(tmp_path / 'end')!r}, 'w')"
    done = run(code, f"{redirected}; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 0
    assert "Broken" not in done.stderr
    assert (tmp_path / "end").exists()


def test_a_closed_descriptor_is_not_given_to_a_file(tmp_path):
    code = f"file = open({str(tmp_path / 'file')!r}, 'w'); os.system('echo stray; echo stray >&2'); file.write('ours')"
    assert run(code, "<&- >&- 2>&-").returncode == 0
    assert (tmp_path / "file").read_text() == "ours"


@pytest.mark.parametrize(
    ("redirected", "lost"),
    [
        ("", "None"),
        (">/dev/full", "No space left on device"),
        ("1</dev/null", "Bad file descriptor"),
        (">&-", "None"),
        ("> >(true)", "None"),
    ],
)
def test_what_was_lost_to_a_reader(redirected, lost):
    wait = "import time; time.sleep(0.1); " if "true" in redirected else ""
    done = run(wait + SAY + "print(getattr(streams.lost_output(), 'strerror', None), file=sys.stderr)", redirected)
    assert done.stderr.splitlines()[-1] == lost


def test_a_complaint_finds_another_way(capfd):
    code = "streams.complain('no such folder')"
    assert run(code).stderr == "no such folder\n"
    for redirected in ("2>&-", "2>/dev/full"):
        assert run(code, redirected).stdout == "no such folder\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_character_on_any_console(encoding):
    done = run("print('Ω\\udcff'); print('Ω\\udcff', file=sys.stderr)", PYTHONIOENCODING=encoding)
    shown = ("Ω" if encoding == "utf-8" else "\\u03a9") + "\\udcff\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, shown)


def test_streams_of_others_are_left_alone():
    code = "import io; sys.stdout = io.StringIO(); streams.guard(); print(type(sys.stdout).__name__, file=sys.stderr)"
    assert run(code).stderr == "StringIO\n"


def test_no_stream_at_all():
    """As in a program that has none, or has taken them away."""
    code = "sys.stdout = sys.stderr = sys.stdin = None; streams.guard(); " + SAY + "streams.complain('text'); "
    assert run(code + "sys.exit(3 if streams.lost_output() is None else 4)").returncode == 3


def test_a_stream_that_must_not_wait_waits():
    """Another process of the terminal may have set it to O_NONBLOCK."""
    code = "os.set_blocking(1, False); print('x' * 1_000_000, flush=True); assert streams.lost_output() is None"
    assert len(run(code, "| (sleep 0.2; cat)").stdout) == 1_000_001


def test_a_terminal_that_closes():
    """Bars and lines go nowhere then, nobody is there to miss them, and the process ends as it would have."""
    code = """
from rich.console import Console
from rich.progress import Progress
with Progress(console=Console(stderr=True)) as bar:
    task = bar.add_task("reading", total=8)
    bar.refresh()
    input()
    for _ in range(8):
        bar.advance(task)
        bar.refresh()
        Console().print("line")
print("last", flush=True)
sys.exit(5 if streams.lost_output() is None else 6)
"""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    assert os.read(ours, 100)
    os.close(ours)
    child.communicate(b"\n")
    assert child.returncode == 5
