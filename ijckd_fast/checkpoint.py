"""Checkpoints that survive a power cut, and the random-number state they carry."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ijckd_fast.errors import UserError

FORMAT = "ijckd-fast checkpoint 1"


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """Writes `state` (tensors, numbers, strings, lists, dicts) to `path` so that the file is always whole.

    The bytes go to `path` + ".tmp", are flushed to the disk (fsync), and replace `path` in one step; the folder entry is
    flushed too. Whatever interrupts this (kill -9, power, a full disk), `path` is the old file or the new one.
    Raises UserError when the disk is full or the folder cannot be written; the old file is then as it was.
    """
    path = Path(path)
    buffer = io.BytesIO()  # serialised in memory first: a write error then is a plain OSError of our own write
    torch.save({"format": FORMAT, **state}, buffer)
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        tmp.unlink(missing_ok=True)
        kept = f"the previous {path} is untouched" if path.exists() else "there was no earlier one"
        size = f"{len(buffer.getbuffer()) / 1e6:.1f} MB"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left to write the checkpoint {path} ({size}); {kept}: free some space, then continue with "
                f"ijckd-fast train --resume {path.parent}"
            ) from error
        raise UserError(f"cannot write the checkpoint {path} ({size}): {error.strerror}; {kept}") from error


def load(path: str | Path) -> dict[str, Any]:
    """Reads a file written by `save` onto the CPU, with weights_only=True (no code of the file is ever run).

    Raises UserError when it is missing, truncated, not a checkpoint of ours, or holds NaN or infinite weights.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give the folder of a run, or a last.pt or best.pt in it")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        # which of these a damaged zip gives depends on the place of the damage
        size = path.stat().st_size
        other = path.with_name({"last.pt": "best.pt", "best.pt": "last.pt"}.get(path.name, path.name))
        advice = "train anew"
        if other != path and other.is_file():
            advice = f"use the run's other checkpoint, {other} (ijckd-fast train --resume {other} goes on from it)"
        raise UserError(f"{path} ({size} bytes) is damaged or truncated: {advice}") from error
    except Exception as error:  # pickle.UnpicklingError: not a torch file, or one with objects in it
        raise UserError(f"{path} is not a checkpoint of ijckd-fast (wanted a last.pt or best.pt of a run)") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of ijckd-fast train (wanted a last.pt or best.pt of a run)")
    for name, tensor in state["learner"].items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"{path} holds NaN or infinite values in '{name}': use an earlier checkpoint, or train anew with a smaller --lr"
            )
    return state


def load_into(module: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Loads `weights` (a state_dict) into `module`; UserError naming the first differing entries when it is another model's."""
    own = module.state_dict()
    problems = [f"'{key}' is missing" for key in own if key not in weights]
    problems += [f"'{key}' is not in this model" for key in weights if key not in own]
    problems += [
        f"'{key}' has shape {list(weights[key].shape)}, wanted {list(own[key].shape)}"
        for key in own
        if key in weights and own[key].shape != weights[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{path} belongs to another model: {', '.join(problems[:3])}{more}; set --student, --teacher and --connector as it was trained"
        )
    module.load_state_dict(weights)


def fingerprint(module: nn.Module) -> str:
    """Hex digest of the names, shapes and bytes of a module's state: two modules with equal digests compute the same."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in module.state_dict().items():
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{list(value.shape)}{value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def random_state() -> dict[str, Any]:
    """State of the generators of torch (CPU and, if used, every GPU), numpy and Python, in types weights_only can load."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - the state of others' code
    version, ints, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
        "python": [version, list(ints), gauss],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, ints, gauss = state["python"]
    random.setstate((version, tuple(ints), gauss))
