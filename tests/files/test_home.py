"""A user without a home folder or a name, as in a container."""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
import warnings
from pathlib import Path

import pytest

from ijckd_fast import home
from ijckd_fast.data.index.kept import cache_homes


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """This user has no entry in passwd, no HOME and no name."""

    def missing(_):
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(pwd, "getpwuid", missing)
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # what ensure() sets goes with the test
    monkeypatch.setenv("HOME", "")
    monkeypatch.delenv("HOME")
    monkeypatch.setenv("USER", "")
    monkeypatch.delenv("USER")
    return tmp_path


def test_a_temporary_home_is_given_and_said(nobody):
    with pytest.warns(UserWarning, match="has no home folder .* goes to .*; set HOME to choose another"):
        home.ensure()
    made = Path(os.environ["HOME"])
    assert made == nobody / f"ijckd-fast-{os.getuid()}"
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert Path.home() == made
    assert os.environ["USER"] == f"user{os.getuid()}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        home.ensure()  # nothing more to do


def test_somebody_elses_folder_is_not_taken(nobody):
    (nobody / f"ijckd-fast-{os.getuid()}").symlink_to(nobody)
    with pytest.warns(UserWarning, match="has no home folder"):
        home.ensure()
    assert Path(os.environ["HOME"]).name.startswith("ijckd-fast-")
    assert Path(os.environ["HOME"]) != nobody / f"ijckd-fast-{os.getuid()}"


def test_without_a_folder_for_temporary_files_commands_still_begin(nobody, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/dev/null/tmp")
    home.ensure()
    assert "HOME" not in os.environ


def test_who_has_a_home_keeps_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    home.ensure()
    assert os.environ["HOME"] == str(tmp_path)


def test_an_index_is_kept_with_the_images_alone_where_there_is_no_home(nobody, tmp_path):
    assert [folder.parent for folder in cache_homes(tmp_path, None)] == [tmp_path]
