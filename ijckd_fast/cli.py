"""The command line, `ijckd-fast COMMAND`: finds a command, runs it, prints its figures; a mistake is one sentence.

The commands are in commands/, a file each. What needs torch is imported inside the command that needs it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from ijckd_fast import extras, files, home, signals, streams
from ijckd_fast.errors import OutOfMemory, UserError, out_of_memory, ran_out

_SMALLER = (
    "give it less to hold at once (a smaller --batch-size or --image-size, fewer --workers, where it takes them), free "
    "memory, or take a machine with more"
)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    returns  the exit code: that of its outcome; 2 for a user's mistake, one sentence on standard error, and for figures
             that could not be printed; 128 + n for signal n
    raises   SystemExit after --help
    """
    streams.guard()
    with signals.handled(program=True) as asked, warnings.catch_warnings():
        warnings.showwarning = _show_warning
        home.ensure()
        try:
            code = _run((sys.argv[1:] if arguments is None else arguments) or ["--help"], asked)
        except SystemExit as end:
            raise SystemExit(end.code or _require_printed()) from end
    if arguments is None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what is left to do is Python's: no traceback for Ctrl-C
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # One of several processes: to leave the usual way could wait for ever for those that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(arguments: list[str], asked: signals.Asked) -> int:
    command = None
    try:
        from ijckd_fast.commands.parser import parse  # here, since it takes a while, in which a signal may come

        command, args = parse(arguments)
        outcome = command.run(args)
    except signals.Stopped as stop:
        return _stopped(stop, command)
    except OutOfMemory as error:
        return _complain(str(error), 2)
    except Exception as error:
        if not out_of_memory(error):
            return _failed(error, asked, command)
        return _complain(str(ran_out(f"in {_named(command)}", _SMALLER, error)), 2)
    except KeyboardInterrupt as stop:
        return _complain(str(stop) or "interrupted", 128 + signal.SIGINT)
    if outcome.rows is not None and not streams.is_watched():
        print(json.dumps({"rows": outcome.rows}))
    if asked.signum:  # a library has kept it to itself
        return _stopped(signals.Stopped(asked.signum), command)
    return outcome.code if outcome.in_files else _require_printed() or outcome.code


def _named(command: Any) -> str:
    """`ijckd-fast train`; without a command, where none was found yet, `ijckd-fast`."""
    words = "" if command is None else command.__name__.rpartition("commands.")[2].replace("_", "-")
    return f"ijckd-fast {words.replace('.', ' ')}".rstrip()


def _failed(error: Exception, asked: signals.Asked, command: Any) -> int:
    """Says what an error that ended the command means to a user; raises it where that is not known."""
    if isinstance(error, UserError):
        return _complain(str(error), 2)
    if isinstance(error, ImportError):
        text = extras.missing(_named(command), error)
        return _complain(text or f"{error}. `ijckd-fast doctor` says what is missing", 2)
    if isinstance(error, OSError) and files.is_disk_full(error):
        place = f" for {error.filename}" if error.filename else ""
        return _complain(f"no space left on the device{place}: free some space", 2)
    if isinstance(error, OSError) and error.filename is not None and not isinstance(error, FileNotFoundError):
        return _complain(str(files.cannot_use(error)), 2)
    if asked.signum:
        return _stopped(signals.Stopped(asked.signum), command)  # a library in C has made another error of it
    raise error


def _stopped(stop: signals.Stopped, command: Any) -> int:
    """Says what a signal has ended, and what the command has kept."""
    return _complain(f"{stop}{'' if stop.what else getattr(command, 'STOPPED', '')}", 128 + stop.signum)


def _require_printed() -> int:
    """0; 2 and a sentence where something that was printed did not reach a reader."""
    error = streams.lost_output()
    if error is None:
        return 0
    return _complain(
        f"what was printed could not be written ({error.strerror}): free some space, or print elsewhere", 2
    )


def _complain(text: str, code: int) -> int:
    streams.complain(f"ijckd-fast: {text}")
    _tell_launcher(f"ijckd-fast: {text}")
    return code


def _tell_launcher(text: str) -> None:
    """torchrun repeats what is in this file below its own traceback, which would otherwise bury the sentence."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        about = {"py_callstack": text, "timestamp": str(int(time.time()))}  # it shows the first of the two
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": about}}))


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"ijckd-fast: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
