"""The command line, `ijckd-fast COMMAND`: finds a command, runs it, prints its figures; a mistake is one sentence.

The commands are in commands/, a file each. What needs torch is imported inside the command that needs it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from typing import Any

from ijckd_fast import files
from ijckd_fast.commands.parser import parse
from ijckd_fast.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    returns  the exit code: that of its outcome; 2 for a user's mistake, one sentence on standard error; 128 + n for
             signal n
    raises   SystemExit after --help
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        code = _run((sys.argv[1:] if arguments is None else arguments) or ["--help"])
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # One of several processes: to leave the usual way could wait for ever for those that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(arguments: list[str]) -> int:
    try:
        command, args = parse(arguments)
        outcome = command.run(args)
    except UserError as error:
        return _complain(str(error), 2)
    except ImportError as error:
        return _complain(f"{error}. `ijckd-fast doctor` says what is missing", 2)
    except OSError as error:
        if not files.is_disk_full(error):
            raise
        place = f" for {error.filename}" if error.filename else ""
        return _complain(f"no space left on the device{place}: free some space", 2)
    except KeyboardInterrupt as stop:  # train.Stopped carries the signal and says how to continue
        return _complain(str(stop) or "interrupted", 128 + getattr(stop, "signum", signal.SIGINT))
    if outcome.rows is not None:
        print(json.dumps({"rows": outcome.rows}))
    return outcome.code


def _complain(text: str, code: int) -> int:
    print(f"ijckd-fast: {text}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"ijckd-fast: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
