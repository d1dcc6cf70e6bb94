"""Weights files of every format: what they hold, read without running anything that is in them, or what to do first."""

from __future__ import annotations

import argparse
import os
import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ijckd_fast.errors import UserError, out_of_memory, ran_out
from ijckd_fast.files import Damaged, cannot_read
from ijckd_fast.nets.intact import fault_by_neighbours, fault_in
from ijckd_fast.nets.listed import no_weights

_NUMPY = ("core", "_core")  # where NumPy 1 and 2 have the functions that make its numbers again
_PATHLIB = ("pathlib", "pathlib._local")  # the same for paths, by versions of Python
_TORCH_1_0 = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # the number that its files begin with, pickled
_SAVE = "torch.save(model.state_dict(), FILE)"
SHARDED = (
    "is part of a distributed training, whose tensors lie in several files, expected whole tensors: gather them there"
    " (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True), or join the files of a"
    " folder with python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
)


def read_file(path: Path) -> Any:
    """What a file of torch.save (either format) or safetensors holds, on the CPU: mostly dicts of tensors.

    The format is told from the bytes, whatever the file is called. Read with weights_only=True, so nothing in it is
    run; command lines, paths and numpy's numbers beside the weights are let through.

    raises  UserError where there is no file, one that cannot be read, or one of another format: which, and how weights
            are taken out of it; Damaged where its bytes are not those that were written, as far as that can be told
    """
    try:
        kind = os.stat(path).st_mode
        if stat.S_ISDIR(kind):
            raise UserError(f"checkpoint {str(path)!r} is a folder, expected a file: {_in_folder(path)}")
        if not stat.S_ISREG(kind):
            raise UserError(f"checkpoint {str(path)!r} is a device or a pipe, expected a file")
        with open(path, "rb") as file:
            return _read(path, file)
    except FileNotFoundError as error:
        raise no_weights(path) from error
    except OSError as error:
        raise cannot_read(path, error) from error


def _read(path: Path, file: BinaryIO) -> Any:
    is_safetensors = _is_safetensors(path)
    other = None if is_safetensors else _another_format(path)
    if other is not None:
        raise UserError(f"checkpoint {str(path)!r} {other}")
    what, size = f"checkpoint {str(path)!r}", path.stat().st_size
    if (fault := fault_in(file)) is not None:
        raise Damaged(f"{what} ({size} bytes) is damaged or truncated ({fault}): copy or download it again")
    if (fault := fault_by_neighbours(path, file)) is not None:
        raise Damaged(
            f"{what} ({size} bytes) is damaged or was changed ({fault}): copy or download it again, or give it another"
            " name if it was changed on purpose"
        )
    try:
        if is_safetensors:
            import safetensors.torch

            return safetensors.torch.load(file.read())
        # As an open file: of a path torch would believe the suffix.
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles of other versions; what does not work raises
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise ran_out(f"reading the weights in {path}", "free memory", error) from error
        raise _unreadable(path, error) from error


def _harmless() -> list[Any]:
    """What training scripts keep beside the weights and only holds values: command lines, paths, numbers."""
    makers: list[Any] = [value.__reduce__()[0] for value in (np.float64(0), np.zeros(1))]
    numbers = [(make, f"numpy.{part}.multiarray.{make.__name__}") for make in makers for part in _NUMPY]
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")]
    paths = [(kind, f"{part}.{kind.__name__}") for kind in (PurePosixPath, PosixPath) for part in _PATHLIB]
    return [argparse.Namespace, np.ndarray, np.dtype, *kinds, *numbers, *paths]


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    return len(head) == 9 and head[8:] == b"{" and 2 <= length <= path.stat().st_size - 8


_OTHER = f"expected PyTorch weights: take them out with that tool and save them under the net's own names with {_SAVE}"
_PACKED = "expected the weights file itself: unpack it and give the file inside"
_BY_BEGINNING: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a git-lfs pointer, expected the file that it stands for: run git lfs pull"),
    (b"\x89HDF\r\n", f"is an HDF5 file (of Keras?), {_OTHER}"),
    (b"\x93NUMPY", f"is a NumPy array, {_OTHER}"),
    (b"\x1f\x8b", f"is a gzip file, {_PACKED}"),
    (b"BZh", f"is a bzip2 file, {_PACKED}"),
    (b"\xfd7zXZ\x00", f"is an xz file, {_PACKED}"),
    (b"\x28\xb5\x2f\xfd", f"is a zstd file, {_PACKED}"),
    (b"7z\xbc\xaf", f"is a 7z archive, {_PACKED}"),
    (b"Rar!", f"is a rar archive, {_PACKED}"),
)


def _another_format(path: Path) -> str | None:
    """What a file is, and what to do with it, told from its first bytes or its name; None for one that may be read."""
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "is empty (0 bytes), expected a weights file: copy or download it again"
    for beginning, told in _BY_BEGINNING:
        if head.startswith(beginning):
            return told
    text, name = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower(), path.name.lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return (
            "is a web page, expected a weights file: the download ended at a page (a login, a confirmation, not found);"
            " download it again in a browser, or from the address of the file itself"
        )
    if name.endswith(".index.json") or (text.startswith(b"{") and b"weight_map" in text):
        return f"lists the files of a model in several parts, expected one file: load it with its library and {_SAVE}"
    if head[257:262] == b"ustar":
        return f"is a tar archive, {_PACKED} (a checkpoint of PyTorch before 0.4 is one too: load it there and {_SAVE})"
    if head[4:8] == b"TFL3" or name.endswith((".pb", ".index", ".meta")) or ".data-00000-of-" in name:
        return f"is of TensorFlow, {_OTHER}"
    if head[:1] == b"\x80" and _TORCH_1_0 not in head[:20]:
        return (
            "is a Python pickle, expected a file of torch.save: load it in the code that wrote it, if you trust it, and"
            f" save the tensors with {_SAVE}"
        )
    # ONNX: ir_version, then the producer or the graph, are the first fields of the message.
    if name.endswith(".onnx") or (head[0] == 8 and head[1:2] < b"\x20" and head[2:3] in (b"\x12", b"\x3a")):
        return f"is an ONNX model, {_OTHER}"
    return _in_zip(path) if head.startswith(b"PK\x03\x04") else None


def _in_zip(path: Path) -> str | None:
    """The same for a zip, which torch.save's files are too."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # truncated or damaged, which `fault_in` puts into words
        return None
    last = {name.rpartition("/")[2] for name in names}
    if any("/code/" in name for name in names) or "constants.pkl" in last:
        return (
            "is a TorchScript archive, expected a state_dict: take it out with"
            " torch.save(torch.jit.load(PATH, map_location='cpu').state_dict(), FILE)"
        )
    if "archive_format" in last or "serialized_exported_program.json" in last:
        return (
            "is a program of torch.export, expected a state_dict: take it out with"
            " torch.save(torch.export.load(PATH).state_dict, FILE)"
        )
    if "data.pkl" in last:
        return None
    if any(name.endswith(".npy") for name in names):
        return f"is a NumPy archive (.npz), {_OTHER}"
    if any(name.endswith(".h5") for name in names):
        return f"is a Keras model, {_OTHER}"
    return f"is a zip archive of {len(names)} files without weights of torch.save, {_PACKED}"


def _in_folder(path: Path) -> str:
    """What to give instead of a folder."""
    names = sorted(each.name for each in path.iterdir())
    for name in ("last.pt", "model.safetensors", "pytorch_model.bin", "model.pt", "model.pth"):
        if name in names:
            return f"give {path / name}"
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return "it " + SHARDED
    if "zero_to_fp32.py" in names:
        return "DeepSpeed's zero_to_fp32.py in it makes one file"
    weights = [n for n in names if n.endswith((".pt", ".pth", ".bin", ".safetensors", ".ckpt", ".tar"))]
    return f"give one of its files ({', '.join(weights[:5])})" if weights else "give the path of a weights file"


def _unreadable(path: Path, error: Exception) -> UserError:
    text = str(error)
    if re.search(r"DTensor|ShardedTensor|_fsdp", text):
        return UserError(f"checkpoint {str(path)!r} {SHARDED}")
    if "Unsupported global" in text or "Unsupported class" in text:
        found = re.search(r"(?:GLOBAL|class) ([\w.]+)", text)
        what = f" (of {found[1]})" if found else ""
        return UserError(
            f"checkpoint {str(path)!r} holds Python objects{what} that loading would execute, expected tensors only:"
            f" save its state_dict alone with {_SAVE}, in the code that wrote it and only if you trust the file"
        )
    return UserError(
        f"checkpoint {str(path)!r} ({path.stat().st_size} bytes) is not a readable weights file; it is truncated or of"
        f" another format: copy or download it again ({type(error).__name__})"
    )


def listing(content: Any) -> str:
    """What a file holds, for an error: its first keys with their kinds, a few names and shapes."""
    if not isinstance(content, Mapping):
        return f"one {_kind(content)}"
    items = [f"{str(key)!r} ({_kind(value)})" for key, value in list(content.items())[:6]]
    more = f" and {len(content) - 6} more" if len(content) > 6 else ""
    return (", ".join(items) or "nothing") + more


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if not isinstance(value, Mapping):
        return type(value).__name__
    tensors = [str(key) for key, each in value.items() if isinstance(each, Tensor)]
    if not tensors:
        return f"dict of {len(value)}"
    named = ", ".join(f"{key!r} {list(value[key].shape)}" for key in tensors[:3] if key in value)
    return f"{len(tensors)} tensors: {named}{', ...' if len(tensors) > 3 else ''}"
