"""Mistakes that a user can fix: one sentence that says what was expected, what was found and what to do."""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """A mistake in the user's data, settings or files; the command line prints its text without a traceback."""


class OutOfMemory(UserError):
    """Memory ran out: what was being done, and what to make smaller."""


# What torch, CUDA's libraries, oneDNN (which finds none for its code), the C++ library, DALI, the loader of shared
# libraries and threads say where memory runs out: most of them as a RuntimeError.
_NO_MEMORY = re.compile(
    "out of memory|not enough memory|allocate memory|bad_alloc|alloc_failed|could not create a memory"
    "|could not create a primitive(?! desc)|failed to map segment|can't start new thread"
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the GPU or on the CPU, or was caused by one that does."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OutOfMemory):
            return True
        if not isinstance(seen, UserError) and _says_no_memory(seen):
            return True
        seen = seen.__cause__
    return False


def _says_no_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError by its name: torch is not imported here
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    said = str(error).lower()
    return isinstance(error, (RuntimeError, OSError, ImportError)) and _NO_MEMORY.search(said) is not None


def ran_out(what: str, remedy: str, error: BaseException) -> OutOfMemory:
    """What to raise where memory ran out: "out of memory WHAT: REMEDY", with what the error says."""
    while error.__cause__ is not None and isinstance(error, UserError):
        error = error.__cause__
    return OutOfMemory(f"out of memory {what} ({reason_of(error)[:200]}): {remedy}")


@contextlib.contextmanager
def memory_told(what: str, remedy: str) -> Iterator[None]:
    """Inside, memory that runs out is a UserError, "out of memory WHAT: REMEDY"; other errors are passed on."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not out_of_memory(error):
            raise
        raise ran_out(what, remedy, error) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "" or "; did you mean 'a' or 'b'?" with up to three names of `known` close to `name`."""
    near = difflib.get_close_matches(name.lower(), sorted(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def one_of(names: Iterable[str]) -> str:
    """'a, b or c', for a sentence."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def reason_of(error: BaseException) -> str:
    """What an error says, in one line; the name of its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
