"""From the words of a command line to a command and its arguments; every mistake in them is a sentence."""

from __future__ import annotations

import importlib
import pkgutil
import re
import typing
from argparse import Action
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

import ijckd_fast
from ijckd_fast import commands
from ijckd_fast.commands import Arguments
from ijckd_fast.errors import UserError, did_you_mean


def parse(words: Sequence[str]) -> tuple[ModuleType, Arguments]:
    """The command that a command line asks for, and what it gives to the command.

    raises  UserError, with the nearest name, for an unknown command or option; UserError for a value of another type;
            SystemExit after --help
    """
    parser = CommandParser(commands, "ijckd-fast")
    found = parser.parse_args(words, defaults=False)
    while parser.choices:
        parser, found = parser.choices[found.command], found[found.command]
    return parser.command, Arguments(found.as_dict(), parser.get_defaults().as_dict())


def commands_in(package: ModuleType) -> dict[str, ModuleType]:
    """The commands in a package by name: `train` first, the others by the alphabet."""
    modules = [
        importlib.import_module(f"{package.__name__}.{each.name}") for each in pkgutil.iter_modules(package.__path__)
    ]
    named = {
        module.__name__.rpartition(".")[2].replace("_", "-"): module for module in modules if hasattr(module, "SUMMARY")
    }
    return {name: named[name] for name in sorted(named, key=lambda name: (name != "train", name))}


class _Help(DefaultHelpFormatter):
    """The library's help, but where an option says its own default, or has none, it says neither another one nor
    "required".
    """

    def _get_help_string(self, action: Action) -> str:
        text = super()._get_help_string(action)
        if action.default in (None, "", ()) or "default: " in (action.help or ""):
            text = text.replace(", default: %(default)s", "").replace(" (default: %(default)s)", "")
        return text.replace("(required, ", "(") if "default: " in (action.help or "") else text


class CommandParser(ArgumentParser):
    """The options of one command, or the commands of a package of them.

    They are added when words are there to parse: `ijckd-fast index` does not wait for the hundred options of train.
    """

    def __init__(self, command: ModuleType, prog: str) -> None:
        version = ijckd_fast.__version__ if command is commands else None
        super().__init__(
            prog=prog,
            description=command.DESCRIPTION,
            allow_abbrev=False,
            print_config=None,
            version=version,
            formatter_class=_Help,
        )
        self.command = command
        self.choices: dict[str, CommandParser] = {}
        self._complete = False

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None, env: Any = None, defaults: bool = True, **_: Any
    ) -> Any:
        """As the library does, once the options are there."""
        assert args is not None
        self._add_options()
        if self.choices and not args:
            raise UserError(
                f"{self.prog} needs the name of a command, one of {', '.join(self.choices)}; {self.prog} --help says "
                "more"
            )
        return super().parse_args(self._as_declared(args), namespace, env, defaults)

    def validate(self, namespace: Any, *args: Any, **kwargs: Any) -> None:
        """As the library does, but a complaint about a command's arguments comes from the parser of that command."""
        if self.choices:
            self.choices[namespace.command].validate(namespace[namespace.command], *args, **kwargs)
            return
        try:
            super().validate(namespace, *args, **kwargs)
        except (TypeError, KeyError) as error:
            self.error(str(error), error)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises the library's complaint as a UserError, which says what to do. Known to the library: `self.args`."""
        if self.choices:
            word, names = self.args[0], ", ".join(self.choices)
            raise UserError(
                f"unknown command '{word}' of {self.prog}: expected one of {names}{did_you_mean(word, self.choices)}"
            )
        for word in self.args[: _end_of_options(self.args)]:
            name = word.partition("=")[0]
            if re.match("--?[a-zA-Z]", name) and name not in self._options():
                near = did_you_mean(name, self._options())
                raise UserError(f"unknown option {name} of {self.prog}{near}; {self.prog} --help lists all")
        raise UserError(f"{_in_words(message)}; {self.prog} --help describes every option")

    def _add_options(self) -> None:
        if self._complete:
            return
        self._complete = True
        if not hasattr(self.command, "__path__"):
            self.command.add_arguments(self)
            return
        self.usage = f"{self.prog} COMMAND [OPTIONS]"
        self.epilog = f"{self.prog} COMMAND --help describes the options of one."
        # Not required, as the library calls it: it would say so in the help. An empty command line is refused above.
        subcommands = self.add_subcommands(
            required=False, dest="command", title="commands", metavar="COMMAND", description=None, help=""
        )
        for name, module in commands_in(self.command).items():
            prog = f"{self.prog} {name}"
            self.choices[name] = CommandParser(module, prog)
            subcommands.add_subcommand(name, self.choices[name], help=module.SUMMARY)
            self.choices[name].prog = prog  # the library has put "[options]" into it

    def _options(self) -> dict[str, Any]:
        """By name; without --sizes+, which the library makes of every list."""
        return {name: action for action in self._actions for name in action.option_strings if not name.endswith("+")}

    def _as_declared(self, words: Sequence[str]) -> list[str]:
        """The words with --data_dir as --data-dir, and 30,60,90 as [30,60,90] where, and only where, a list is due."""
        options, end = self._options(), _end_of_options(words)
        found: list[str] = []
        is_value = False  # of an option that takes a list
        for word in words[:end]:
            if is_value:
                word, is_value = _bracketed(word), False
            elif word.startswith("--"):
                name, equals, value = word.partition("=")
                name = name.replace("_", "-")
                takes_list = name in options and _is_list(getattr(options[name], "_typehint", None))  # as type= gave it
                is_value = takes_list and not equals
                word = name + equals + (_bracketed(value) if takes_list else value)
            found.append(word)
        return [*found, *words[end:]]


def _end_of_options(words: Sequence[str]) -> int:
    return words.index("--") if "--" in words else len(words)


def _is_list(hint: Any) -> bool:
    """Whether a type, or an alternative of it (list[int] | None), is that of a list or tuple."""
    return typing.get_origin(hint) in (list, tuple) or any(map(_is_list, typing.get_args(hint)))


def _bracketed(value: str) -> str:
    written_out = value[:1] in ("[", "(", "") or value == "null"
    return value if written_out else f"[{value}]"


def _in_words(message: str) -> str:
    """The library's message as a sentence about an option: it gives its complaints as texts only."""
    text = " ".join(message.split())
    text = re.sub(r"<class '(\w+)'>", r"\1", text.replace("typing.", ""))
    wrong = re.match(r'Parser key "(\w+)": (.*)', text)
    return f"--{wrong[1].replace('_', '-')}: {wrong[2]}" if wrong else text
