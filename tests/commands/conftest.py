"""A finished run that the tests of commands look at."""

from __future__ import annotations

import pytest
from tiny_run import distilled, options, settings, write_teacher

from ijckd_fast import cli


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Folder of a finished distillation."""
    folder = tmp_path_factory.mktemp("run")
    teacher = write_teacher(folder / "teacher.pt")
    assert cli.main(["train", *options(settings(data, folder / "run", **distilled(teacher)))]) == 0
    return folder / "run"
