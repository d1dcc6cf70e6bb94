"""Files that are given as weights: which are read, by their bytes, and what is said of the others."""

from __future__ import annotations

import argparse
import bz2
import errno
import gzip
import io
import lzma
import os
import pathlib
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from ijckd_fast.errors import UserError
from ijckd_fast.nets.weight_files import listing, read_file

STATE = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}


class Trainer:
    """Stands for any class that a checkpoint may drag along."""


def saved(content: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(data: bytes, how: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=how) as archive:
        member = tarfile.TarInfo("model.pth")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def numpy_archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: value.numpy() for name, value in STATE.items()})
    return buffer.getvalue()


def script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(3, 2), torch.ones(1, 3)), buffer)
    return buffer.getvalue()


def program() -> bytes:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),)), buffer)
    return buffer.getvalue()


def onnx_model() -> bytes:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value], [value])
    return onnx.helper.make_model(graph, producer_name="pytorch").SerializeToString()


def weights_in(content: Any) -> dict[str, Tensor]:
    return content.get("model", content)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("w.pth", saved(STATE)),
        ("w.pth", saved(STATE, _use_new_zipfile_serialization=False)),
        ("w.pth.tar", saved({"model": STATE})),
        ("w.safetensors", saved(STATE)),
        ("w.bin", safetensors.torch.save(STATE)),
        ("w.safetensors", safetensors.torch.save(STATE, metadata={"format": "pt"})),
        ("no suffix", saved(OrderedDict(STATE))),
        ("w.pt", saved({name: nn.Parameter(value) for name, value in STATE.items()})),
        ("w.pt", saved({"model": STATE, "args": argparse.Namespace(lr=0.1, output=pathlib.PosixPath("runs"))})),
        ("w.pt", saved({"model": STATE, "best": np.float64(76.1), "epoch": np.int64(3), "ok": np.bool_(True)})),
        ("w.pt", saved({"model": STATE, "losses": np.arange(3.0)})),
        ("w.pt", saved({"model": STATE, "best": np.float32(1)}, _use_new_zipfile_serialization=False)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_read(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    weights = weights_in(read_file(tmp_path / name))
    assert all(torch.equal(weights[key], value) for key, value in STATE.items())


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning"
PARTS = b'{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}'


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("w.pt", b"", r"is empty \(0 bytes\), .*: copy or download it again"),
        ("w.pt", LFS, "is a git-lfs pointer.*git lfs pull"),
        ("w.pth", PAGE, "is a web page.*download it again"),
        ("w.pth", b"<HTML>404", "is a web page"),
        ("w.pth", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
        ("w.pth", PARTS, "lists the files of a model"),
        ("model.safetensors.index.json", b"{}", "lists the files of a model in several parts, expected one file"),
        ("w.pt", script, r"is a TorchScript archive, .*torch\.jit\.load\(PATH, map_location='cpu'\)\.state_dict\(\)"),
        ("w.pt2", program, r"is a program of torch\.export, .*torch\.export\.load\(PATH\)\.state_dict"),
        ("w.npz", numpy_archive, r"is a NumPy archive \(\.npz\), expected PyTorch weights"),
        ("w.npy", b"\x93NUMPY\x01\x00v\x00", "is a NumPy array, expected PyTorch weights"),
        ("w.h5", b"\x89HDF\r\n\x1a\n" + bytes(100), r"is an HDF5 file \(of Keras\?\), expected PyTorch weights"),
        ("w.keras", zipped({"model.weights.h5": b"\x89HDF"}), "is a Keras model, expected PyTorch weights"),
        ("w.onnx", onnx_model, "is an ONNX model, expected PyTorch weights"),
        ("w.pth", onnx_model, "is an ONNX model"),
        ("w.tflite", b"\x1c\0\0\0TFL3\x14\0", "is of TensorFlow, expected PyTorch weights"),
        ("saved_model.pb", b"\x08\x01\x12\x02", "is of TensorFlow"),
        ("model.ckpt-100.data-00000-of-00001", b"\x01\x02\x03\x04", "is of TensorFlow"),
        ("w.pth.tar", tarred(saved(STATE), "w"), "is a tar archive, .*unpack it and give the file inside"),
        ("w.tgz", tarred(saved(STATE), "w:gz"), "is a gzip file, .*unpack it"),
        ("w.pth.gz", gzip.compress(saved(STATE)), "is a gzip file, .*unpack it"),
        ("w.pth.bz2", bz2.compress(saved(STATE)), "is a bzip2 file, .*unpack it"),
        ("w.pth.xz", lzma.compress(saved(STATE)), "is an xz file, .*unpack it"),
        ("w.zip", zipped({"best.pth": saved(STATE), "log.txt": b""}), "is a zip archive of 2 files without .*unpack"),
        ("w.pkl", pickle.dumps(STATE), r"is a Python pickle, expected a file of torch\.save"),
        ("w.pkl", pickle.dumps({"w": np.ones(2)}, protocol=2), "is a Python pickle"),
        ("w.pt", saved(nn.Linear(3, 2)), r"holds Python objects \(of torch\.nn\.modules\.linear\.Linear\) that"),
        ("w.pt", saved({"ema": Trainer(), "model": STATE}), r"Python objects \(of .*test_weight_files\.Trainer\)"),
        ("w.pt", saved(nn.Linear(3, 2), _use_new_zipfile_serialization=False), r"objects \(of torch\.nn\.modules\.lin"),
        ("w.csv", b"epoch,top1\n1,0.5\n", r"\(17 bytes\) is not a readable weights file; it is truncated or of anoth"),
        ("w.pt", saved(STATE)[:500], r"\(500 bytes\) is damaged or truncated \(it is no whole zip archive.*: copy or "),
        ("w.safetensors", safetensors.torch.save(STATE)[:-5], "is not a readable weights file; it is truncated"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)  # fmt: skip
def test_what_is_not_read_is_said_to_be_what_it_is(tmp_path, name, data: bytes | Callable[[], bytes], text):
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data())
    with pytest.raises(UserError, match=text):
        read_file(tmp_path / name)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("zip_format", [True, False])
def test_nothing_in_a_file_is_run(tmp_path, monkeypatch, zip_format):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pt").write_bytes(saved({"model": STATE, "x": Bomb()}, _use_new_zipfile_serialization=zip_format))
    with pytest.raises(UserError, match="holds Python objects"):
        read_file(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["__0_0.distcp", ".metadata"], "is a folder.*part of a distributed training.*dcp_to_torch FOLDER FILE"),
        (["model.safetensors", "config.json"], r"is a folder, expected a file: give .*model\.safetensors$"),
        (["pytorch_model.bin", "config.json"], r"give .*pytorch_model\.bin$"),
        (["last.pt", "best.pt"], r"give .*last\.pt$"),
        (["zero_to_fp32.py", "latest"], r"DeepSpeed's zero_to_fp32\.py in it makes one file"),
        (["epoch1.pth", "epoch2.pth", "log.txt"], r"give one of its files \(epoch1\.pth, epoch2\.pth\)"),
        ([], "give the path of a weights file"),
    ],
)
def test_of_a_folder_the_file_is_named(tmp_path, names, text):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=text):
        read_file(tmp_path)
    with pytest.raises(UserError, match="does not exist: give the path of a weights file"):
        read_file(tmp_path / "missing.pt")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "w.pt").write_bytes(saved(STATE))

    def forbidden(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("builtins.open", forbidden)  # root may read everything
    with pytest.raises(UserError, match=r"w\.pt cannot be read \(Permission denied\): give this user the right"):
        read_file(tmp_path / "w.pt")


def test_what_a_file_holds_is_listed():
    content = {"epoch": 3, "state": STATE, "optimizer": {"lr": 1}, "x": torch.ones(4)}
    assert listing(content) == (
        "'epoch' (int), 'state' (2 tensors: 'fc.weight' [2, 3], 'fc.bias' [2]), 'optimizer' (dict of 1), 'x' ([4])"
    )
    assert listing({str(i): i for i in range(9)}).endswith("'5' (int) and 3 more")
    assert (listing({}), listing([1])) == ("nothing", "one list")
