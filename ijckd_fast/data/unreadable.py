"""A file that cannot be read any more, and whether it is the file's fault."""

from __future__ import annotations

import errno

from ijckd_fast.errors import UserError, out_of_memory


class Unreadable(UserError):
    """A file that was good when it was indexed and is not now: `path`, and why."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(
            f"an image as it was indexed was expected at {path}, found: {why}; restore the file or build the index "
            "again"
        )
        self.path, self.why = path, why


# Errors of the machine, which say nothing about the file.
_NOT_THE_FILE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def blames_file(error: BaseException) -> bool:
    """Whether an error in reading a file is the file's."""
    return not out_of_memory(error) and getattr(error, "errno", None) not in _NOT_THE_FILE
