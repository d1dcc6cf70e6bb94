"""A home folder and a name for a user who has none, as in a container that is run under some number.

torch, matplotlib, DALI and others ask for them in places of their own, and raise, or make a folder that is named "~".
"""

from __future__ import annotations

import contextlib
import getpass
import os
import stat
import tempfile
import warnings
from pathlib import Path

_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # where getpass looks before it asks for an entry in passwd


def ensure() -> None:
    """Gives this process a HOME below the temporary folder where it has none, with a warning, and a USER where it has
    no name.
    """
    try:
        getpass.getuser()
    except (KeyError, ImportError, OSError):  # which of these depends on Python's version
        os.environ["USER"] = f"user{os.getuid()}"
    try:
        Path.home()
    except RuntimeError:
        with contextlib.suppress(OSError):  # nothing can be written anywhere: each command says so where it matters
            os.environ["HOME"] = str(_temporary())
            warnings.warn(
                f"user {os.getuid()} has no home folder (HOME is not set, and passwd has no entry): what is kept from "
                f"one command to the next goes to {os.environ['HOME']}; set HOME to choose another folder",
                stacklevel=2,
            )


def _temporary() -> Path:
    """A folder of this user alone, the same one each time."""
    folder = Path(tempfile.gettempdir(), f"ijckd-fast-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    about = folder.lstat()
    if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and os.access(folder, os.W_OK):
        return folder
    return Path(tempfile.mkdtemp(prefix="ijckd-fast-"))  # somebody else's
