"""The commands of `ijckd-fast`, a file each: `ijckd-fast prepare-cifar` is prepare_cifar.py.

Every module here that has a SUMMARY is a command; nothing else lists it. It holds

    SUMMARY                its line in `ijckd-fast --help`
    DESCRIPTION            what `ijckd-fast COMMAND --help` says before the options
    add_arguments(parser)  adds the options; options.py has those that several commands share
    run(args) -> Outcome   does the work and prints what people read; imports torch and all that is slow to import
    STOPPED                where a signal leaves something behind: what is said after "stopped by SIGTERM"

A package instead of a module (study) is a command that is followed by the name of another one, a module in it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

__all__ = ["Arguments", "Outcome"]

DESCRIPTION = "Knowledge distillation through the teacher's own classifier."


class Arguments(SimpleNamespace):
    """The values of a command's options by name (`--data-dir` is data_dir), the defaults included.

    given  only those that stand on the command line
    """

    def __init__(self, given: dict[str, Any], defaults: dict[str, Any]) -> None:
        super().__init__(**{**defaults, **given}, given=given)


class Outcome(NamedTuple):
    """What a command comes to.

    rows      its figures, printed as {"rows": [...]} on the last line of standard output unless that is a terminal;
              None: it has none, no such line
    code      exit code: 0, or 1 where the command did its work and the answer is no (answers differ, runs failed)
    in_files  whether all that was printed stands in files too: a console that is full is no failure then
    """

    rows: list[dict[str, Any]] | None = None
    code: int = 0
    in_files: bool = False
