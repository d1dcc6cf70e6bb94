"""Files are whole or not there, whatever happens while they are written; and a folder is one process's."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from ijckd_fast import files
from ijckd_fast.errors import UserError


def failing(number: int):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def child_that(work) -> int:
    """Process id of a fork that does nothing but `work`, again and again."""
    child = os.fork()
    if child == 0:
        try:
            while True:
                work()
        finally:
            os._exit(1)
    return child


def kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has ended by itself
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# --- replacing ---


@pytest.mark.parametrize(
    ("write", "content"),
    [(files.write_text, "new"), (files.write_bytes, b"new"), (files.write_bytes, memoryview(b"new"))],
)
def test_a_file_is_replaced(tmp_path, write, content):
    path = tmp_path / "file"
    path.write_text("a longer old one")
    write(path, content)
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("durable", [True, False])
def test_killed_while_writing_leaves_a_whole_file(tmp_path, durable):
    """kill -9 at random moments of a process that does nothing but write: the file is always of one piece."""
    path, size = tmp_path / "file", 2_000_000
    path.write_bytes(b"0" * size)

    def write():
        files.write_bytes(path, random.randbytes(1) * size, durable=durable)

    kills = cut_short = 0
    while cut_short < 3 or kills < 10:
        kills += 1
        assert kills < 100  # else hardly a kill falls into a write, and nothing is shown
        child = child_that(write)
        time.sleep(random.uniform(0.01, 0.1))
        kill(child)
        cut_short += (tmp_path / "file.tmp").exists()
        content = path.read_bytes()
        assert content == content[:1] * size
    files.write_bytes(path, b"last")  # the remains are no hindrance
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    files.write_text(path, "old")
    monkeypatch.setattr(os, call, failing(errno.ENOSPC))
    with (
        pytest.raises(UserError, match=r"^no space left for the file: free some$"),
        files.disk_full_told("for the file", "free some"),
    ):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_not_durable_waits_for_no_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    files.write_bytes(tmp_path / "file", b"new", durable=False)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        files.write_bytes(tmp_path / "file", b"newer")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_the_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    path, calls = tmp_path / "file", []
    flush, replace = files.flush, os.replace
    monkeypatch.setattr(files, "flush", lambda which: (calls.append(which), flush(which)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    files.write_text(path, "new")
    assert calls == [tmp_path / "file.tmp", "replace", tmp_path]


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    path = tmp_path / "file"

    def interrupted(shared):
        with files.replacing(path, shared=shared) as tmp:
            tmp.write_text("half")
            raise KeyboardInterrupt

    for shared in (True, False):
        with pytest.raises(KeyboardInterrupt):
            interrupted(shared)
    assert os.listdir(tmp_path) == []


def test_processes_that_write_the_same_file_do_not_share_a_temporary_one(tmp_path):
    path = tmp_path / "file"
    begun, go_on = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with files.replacing(path, shared=True) as tmp:
                tmp.write_text("the child's")
                os.write(begun[1], b"x")
                os.read(go_on[0], 1)
            os._exit(0)
        finally:
            os._exit(1)
    os.read(begun[0], 1)
    with files.replacing(path, shared=True) as tmp:
        tmp.write_text("ours")
    assert path.read_text() == "ours"
    os.write(go_on[1], b"x")
    assert os.waitpid(child, 0)[1] == 0
    assert path.read_text() == "the child's"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_process_leaves_goes_and_what_a_living_one_writes_stays(tmp_path):
    """Files and folders; the living one is seen from another process, as from another machine or container."""
    mine, report, other = tmp_path / "mine", tmp_path / ".report.json", tmp_path / "other"
    ready, gate = os.pipe(), os.pipe()

    def claiming(ends: bool) -> int:
        child = os.fork()
        if child == 0:
            with files.claimed(mine) as a, files.claimed(mine, folder=True) as b, files.claimed(other) as c:
                for path in (a, b / "inside", c):
                    path.write_text("half")
                os.write(ready[1], b"x")
                if ends:
                    os.kill(os.getpid(), signal.SIGKILL)
                os.read(gate[0], 1)
                os.replace(a, mine)
                os.replace(b, report)
                c.unlink()
            os._exit(0)
        os.read(ready[0], 1)
        return child

    os.waitpid(claiming(ends=True), 0)
    (tmp_path / ".mine.123.tmp").write_text("as earlier versions named it")
    (tmp_path / ".mine.txt").write_text("somebody's")
    (tmp_path / ".mine.7.tmp").symlink_to(tmp_path / ".mine.txt")
    dead = {path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp") and not path.is_symlink()}
    living = claiming(ends=False)
    alive = {path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")} - dead
    files.remove_leftovers(tmp_path, "mine")
    left = {path.name for path in tmp_path.iterdir()}
    assert alive < left
    assert {name[:7] for name in left & dead} == {".other."}
    files.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == alive | {".mine.txt"}
    os.write(gate[1], b"x")
    assert os.waitpid(living, 0)[1] == 0
    assert mine.read_text() == (report / "inside").read_text() == "half"
    files.remove_leftovers(tmp_path / "not there")


@pytest.mark.parametrize(("number", "full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False)])
def test_only_a_full_disk_is_said_to_be_full(number, full):
    error = OSError(number, os.strerror(number))
    assert files.is_disk_full(error) is full
    with pytest.raises(UserError if full else PermissionError), files.disk_full_told("for this", "free some"):
        raise error


# --- folders ---

WHERE = ["a file", "a file/run", "/proc/run"]


@pytest.mark.parametrize("where", WHERE)
def test_a_folder_that_cannot_be_written(tmp_path, where):
    (tmp_path / "a file").touch()
    text = r"^--output-dir must be a folder that can be written, but .* is not \(.*\): choose another$"
    for refuse in (lambda folder: files.lock(folder).__enter__(), lambda f: files.require_writable(f, "--output-dir")):
        with pytest.raises(UserError, match=text):
            refuse(tmp_path / where)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
def test_a_folder_without_the_right_to_write(tmp_path):
    tmp_path.chmod(0o500)
    try:
        for refuse in (lambda: files.lock(tmp_path).__enter__(), lambda: files.require_writable(tmp_path, "--out")):
            with pytest.raises(UserError, match=r"must be a folder that can be written, .* is not .Permission denied"):
                refuse()
    finally:
        tmp_path.chmod(0o700)


def test_a_read_only_file_system(tmp_path, monkeypatch):
    with monkeypatch.context() as mounted:
        mounted.setattr(os, "open", failing(errno.EROFS))
        for refuse in (lambda: files.lock(tmp_path).__enter__(), lambda: files.require_writable(tmp_path, "--out")):
            with pytest.raises(UserError, match=r"must be a folder that can be written, .* \(Read-only file system\)"):
                refuse()
    with files.lock(tmp_path):  # what failed holds nothing
        pass


def test_a_folder_that_can_be_written_is_made_and_left_empty(tmp_path):
    files.require_writable(tmp_path / "a" / "b", "--out")
    assert os.listdir(tmp_path / "a" / "b") == []


# --- lock ---


def test_one_run_per_folder(tmp_path):
    text = rf"another run \(process {os.getpid()}\) is writing to .*: wait for it, or choose another --output-dir"
    with files.lock(tmp_path), pytest.raises(UserError, match=text):
        files.lock(tmp_path).__enter__()
    with files.lock(tmp_path):
        pass


def held_by_a_child(folder) -> int:
    """Process id of a fork that holds the folder."""
    child = os.fork()
    if child == 0:
        with files.lock(folder):
            time.sleep(60)
        os._exit(0)
    while not (folder / files.HOLDER).exists() or (folder / files.HOLDER).read_text() != str(child):
        time.sleep(0.005)
    return child


def test_another_process_is_named_and_its_death_is_no_hindrance(tmp_path):
    (tmp_path / files.HOLDER).write_text("1")  # of a run that died before
    child = held_by_a_child(tmp_path)
    try:
        with pytest.raises(
            UserError, match=rf"another run \(process {child}\) is writing .* choose another folder OUT$"
        ):
            files.lock(tmp_path, "folder OUT").__enter__()
        assert (tmp_path / files.HOLDER).read_text() == str(child)  # the refused one left it alone
    finally:
        kill(child)
    assert (tmp_path / files.HOLDER).read_text() == str(child)
    with files.lock(tmp_path):
        assert (tmp_path / files.HOLDER).read_text() == str(os.getpid())
    assert not (tmp_path / files.HOLDER).exists()


def test_a_holder_that_nobody_wrote_is_unknown(tmp_path):
    with files.lock(tmp_path):
        (tmp_path / files.HOLDER).unlink()
        with pytest.raises(UserError, match=r"another run \(process unknown\) is writing"):
            files.lock(tmp_path).__enter__()


def test_an_error_inside_gives_the_folder_back(tmp_path):
    with pytest.raises(KeyError), files.lock(tmp_path):
        raise KeyError
    with files.lock(tmp_path):
        pass


def test_a_folder_that_was_made_for_nothing_is_removed_again(tmp_path):
    there, folder = tmp_path / "there", tmp_path / "there" / "new" / "run"
    there.mkdir()
    with pytest.raises(KeyError), files.lock(folder):
        raise KeyError
    assert list(tmp_path.iterdir()) == [there]  # what was there before stays
    assert not list(there.iterdir())
    with files.lock(there):
        pass
    assert [path.name for path in there.iterdir()] == [files.LOCK]
    with files.lock(folder):
        (folder / "written").touch()
    assert {path.name for path in folder.iterdir()} == {files.LOCK, "written"}


# --- damage, and what cannot be read ---


def test_json_comes_back_and_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    path, values = tmp_path / "a.json", {"b": [1, 2.5, None], "a": {"c": "ü", "d": float("inf")}, "e": (1, 2)}
    files.write_json(path, values)
    expected, whole = {**values, "e": [1, 2]}, path.read_bytes()
    assert files.read_json(path, "make it again") == expected
    assert files.read_checked(path, "") == (expected, True)
    said = []
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            found, checked = files.read_checked(path, "make it again")
        except files.Damaged as error:
            said.append(str(error))
        else:
            assert {name: found[name] for name in expected} == expected
            assert checked or len(found) == len(expected) + 1  # the name of the check value itself
    assert all(re.fullmatch(rf"{path} is damaged .*\(.*\): make it again", text) for text in said)
    assert len(said) > 6 * len(whole)  # the other bits are of blanks, and of the check value's name


def test_json_that_is_no_object_or_older_or_not_there(tmp_path):
    path = tmp_path / "a.json"
    assert files.read_json(path, "") is None
    path.write_text('{"a": 1}')
    assert files.read_checked(path, "") == ({"a": 1}, False)
    for content in (b"", b"[1]", b'{"a": 1', b"\xff", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(files.Damaged, match=r"a\.json is damaged \(.*\): make it again"):
            files.read_json(path, "make it again")


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("x")
    for name, text in (
        ("folder", r"folder cannot be read \(Is a directory\): it is a folder, expected a file"),
        ("loop", r"loop cannot be read \(Too many levels of symbolic links\): its symbolic links lead in a circle"),
        ("file/a", r"file/a cannot be read \(Not a directory\): a part of its path is a file"),
    ):
        for read in (files.read_bytes, files.digest, lambda path: files.read_json(path, "")):
            with pytest.raises(UserError, match=text) as caught:
                read(tmp_path / name)
            assert not isinstance(caught.value, files.Damaged)
    monkeypatch.setattr(Path, "open", failing(errno.EACCES))
    monkeypatch.setattr("builtins.open", failing(errno.EIO))
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\): give this user the right"):
        files.read_bytes(tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot be read \(Input/output error\): the disk or the network fails"):
        files.digest(tmp_path / "file")


def test_a_digest_is_of_the_bytes(tmp_path):
    path = tmp_path / "file"
    found = set()
    for content in (b"", b"a", b"b", bytes(3 << 20), bytes((3 << 20) + 1)):
        path.write_bytes(content)
        found.add(files.digest(path))
        assert files.digest(path) == hashlib.blake2b(content, digest_size=16).hexdigest()
    assert len(found) == 5
    with pytest.raises(FileNotFoundError):
        files.digest(tmp_path / "none")
