"""Checkpoint files that survive a power cut: written whole, with a digest, in a thread, and read with suspicion. What
is in them: state.py.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ijckd_fast import files
from ijckd_fast.errors import UserError, out_of_memory, ran_out
from ijckd_fast.nets import fault_in, require_fit, seal
from ijckd_fast.train import run_folder

FORMAT = "ijckd-fast checkpoint 2"


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """Writes `state` (tensors, numbers, strings, lists, dicts) to `path` so that the file is always whole, see
    `files.replacing`, with a digest of all of it, see `nets.seal`.

    raises  UserError when the disk is full or the folder cannot be written; the old file is then as it was
    """
    path = Path(path)
    buffer = io.BytesIO()  # serialised in memory first: a write error then is a plain OSError of our own write
    torch.save({"format": FORMAT, **state}, buffer)
    seal(buffer)
    data = buffer.getbuffer()
    try:
        files.write_bytes(path, data)
    except OSError as error:
        kept = f"the previous {path} is untouched" if path.exists() else "there was no earlier one"
        size = f"{len(data) / 1e6:.1f} MB"
        if files.is_disk_full(error):
            raise UserError(
                f"no space left to write the checkpoint {path} ({size}); {kept}: free some space, then continue with "
                f"ijckd-fast train --resume {path.parent}"
            ) from error
        raise UserError(f"cannot write the checkpoint {path} ({size}): {error.strerror}; {kept}") from error


class Writer:
    """Writes checkpoints in a thread of its own, one at a time, while training continues. Use as a context manager.

    A state is copied to the CPU's memory before `save` returns, so it may change from then on. What a kill interrupts
    leaves the file before it, as with `save` the function.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, path: Path, state: Mapping[str, Any], then: Callable[[], None] | None = None) -> None:
        """Begins to write `state` to `path`, and calls `then` when it is there; waits first for the writing before.
        Raises as `wait`.
        """
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(path, copied(state), then), name="checkpoint")
        self._thread.start()

    def _write(self, path: Path, state: Mapping[str, Any], then: Callable[[], None] | None) -> None:
        try:
            save(path, state)
            if then is not None:
                then()
        except BaseException as error:
            self._error = error

    def check(self) -> None:
        """Raises what went wrong with the last writing, if that has ended: UserError for a full disk, say. Costs
        nothing.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Returns when nothing is being written; raises as `check`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()  # the file is worth having; what went wrong first is what is told


def copied(state: Any) -> Any:
    """The same nested dicts, lists and tuples with copies of their tensors on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copied(value) for value in state)
    return state


def load(path: str | Path) -> dict[str, Any]:
    """Reads a file written by `save` onto the CPU, with weights_only=True (no code of the file is ever run).

    Raises UserError when it is missing, cannot be read, is not a checkpoint of ours, or holds NaN or infinite weights;
    Damaged where its bytes are not those that were written. Checkpoints of earlier versions have no digest: of those
    the zip's CRCs are compared.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            fault = fault_in(file)
            if fault is not None:
                raise _damaged(path, fault)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise run_folder.no_checkpoint(path) from error
    except OSError as error:
        raise files.cannot_read(path, error) from error
    except UserError:
        raise
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        if out_of_memory(error):
            raise ran_out(f"reading {path}", "free memory", error) from error
        raise _damaged(path, type(error).__name__) from error
    except Exception as error:  # pickle.UnpicklingError: not a torch file, or one with objects in it
        raise UserError(f"{path} is not a checkpoint of ijckd-fast (wanted a last.pt or best.pt of a run)") from error
    written_by = state.get("format") if isinstance(state, dict) else None
    if isinstance(written_by, str) and written_by.startswith("ijckd-fast checkpoint ") and written_by != FORMAT:
        raise UserError(
            f"{path} was written by another version of ijckd-fast ('{written_by}', expected '{FORMAT}'): continue with "
            f"{run_folder.version_that_wrote(path.parent)}"
        )
    if written_by != FORMAT:
        raise UserError(f"{path} is not a checkpoint of ijckd-fast train (wanted a last.pt or best.pt of a run)")
    for name, tensor in state["learner"].items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"{path} holds NaN or infinite values in '{name}': use an earlier checkpoint, or train again with a "
                "smaller --lr"
            )
    return state


def _damaged(path: Path, fault: str) -> files.Damaged:
    """Says which of the run's other checkpoints there are."""
    last, best = path.with_name(run_folder.LAST), path.with_name(run_folder.BEST)
    advice = "take another copy of it, or train again"
    for other in (last, *reversed(run_folder.kept(path.parent)), best):
        if other != path and other.is_file() and not other.samefile(path):  # one that is kept may be last.pt by a link
            advice = f"use the run's other checkpoint, {other} (ijckd-fast train --resume {other} continues from it)"
            break
    return files.Damaged(f"{path} ({path.stat().st_size} bytes) is damaged or truncated: {advice} (found: {fault})")


def load_into(module: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Loads `weights` (a state_dict) into `module`; UserError naming the first differing entries when it is another
    model's.
    """
    remedy = "Set --student, --teacher and --connector as it was trained"
    require_fit(weights, module.state_dict(), str(path), "belongs to another model", remedy)
    module.load_state_dict(weights)
