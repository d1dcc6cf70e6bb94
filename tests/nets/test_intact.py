"""Weights files whose bytes are not those that were written: whatever can tell it is asked."""

from __future__ import annotations

import hashlib
import io
import json

import pytest
import safetensors.torch
import torch
from damage import damaged

from ijckd_fast.errors import UserError
from ijckd_fast.files import Damaged
from ijckd_fast.nets import create_model, fault_in, seal
from ijckd_fast.nets.weight_files import read_file

STATE = {"fc.weight": torch.randn(20, 30), "fc.bias": torch.zeros(20)}


def _saved(sealed: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    if sealed:
        seal(buffer)
    return buffer.getvalue()


def _same(found) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[name], value) for name, value in STATE.items())


@pytest.mark.parametrize("sealed", [True, False])
def test_a_damaged_zip_is_refused_wherever_the_bit_lies(tmp_path, sealed):
    path = tmp_path / "w.pt"
    path.write_bytes(_saved(sealed))
    assert _same(read_file(path))
    assert _same(torch.load(path))  # a sealed file is one of torch.save like any other
    refused = 0
    for how in damaged(path, seed=8, count=200):
        try:
            found = read_file(path)
        except UserError as error:
            text = str(error)
            assert str(path) in text, how
            refused += 1
        else:
            assert _same(found), how
    assert refused >= (200 if sealed else 120)  # the others are of padding and of fields that change nothing


def test_all_of_a_sealed_file_is_under_its_digest(tmp_path):
    data = _saved(sealed=True)
    for place in range(0, len(data) - 51, 7):  # before the seal
        changed = bytearray(data)
        changed[place] ^= 1
        assert fault_in(io.BytesIO(changed)) == "its bytes are not those of its digest"
    file = io.BytesIO(data)
    assert fault_in(file) is None
    assert file.tell() == 0
    assert fault_in(io.BytesIO(data[:-1])) == "its digest is cut off"
    assert fault_in(io.BytesIO(b"")) is None  # a matter of its format
    assert fault_in(io.BytesIO(safetensors.torch.save(STATE))) is None


def test_an_export_says_what_its_files_were(tmp_path):
    path = tmp_path / "student.safetensors"
    path.write_bytes(safetensors.torch.save(STATE))
    about = {"sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    for how in damaged(path, seed=9):
        with pytest.raises(UserError, match=r"student\.safetensors'") as caught:
            read_file(path)
        assert how in ("empty",) or "truncated" in str(caught.value) or isinstance(caught.value, Damaged)
    assert _same(read_file(path))
    for content in ("{", "[]", '{"sha256": 1}', '{"sha256": {"student.safetensors": "no digest"}}'):
        (tmp_path / "config.json").write_text(content)  # of another tool
        assert _same(read_file(path))


def test_names_that_say_a_digest(tmp_path, monkeypatch):
    """Of torchvision's files, and of Hugging Face's cache; anyone's own digits say nothing."""
    for name in ("mine-20240101.pth", "mine-deadbeef.pth"):
        (tmp_path / name).write_bytes(_saved(sealed=False))
        assert _same(read_file(tmp_path / name))
    published = tmp_path / "resnet18-f37072fd.pth"
    published.write_bytes(_saved(sealed=False))
    with pytest.raises(Damaged, match=r"expected f37072fd\.\.\. by the name that torchvision publishes"):
        read_file(published)
    (tmp_path / "blobs").mkdir()
    data = safetensors.torch.save(STATE)
    blob = tmp_path / "blobs" / hashlib.sha256(data).hexdigest()
    blob.write_bytes(data)
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert _same(read_file(tmp_path / "model.safetensors"))
    blob.write_bytes(data[:-1] + b"x")
    with pytest.raises(Damaged, match="by its name in Hugging Face's cache"):
        read_file(tmp_path / "model.safetensors")


def test_an_earlier_download_is_looked_at_again(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    path.write_bytes(_saved(sealed=False))
    with pytest.raises(Damaged, match=rf"{path}, downloaded before, is damaged \(its SHA-256 .*\): delete it"):
        create_model("torchvision/resnet18", 1000, pretrained=True, image_size=32)
