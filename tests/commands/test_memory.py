"""Memory that runs out, anywhere in a command: one sentence, with what to make smaller."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest
import torch
from command_line import complaint
from numpy.exceptions import AxisError
from processes import Run
from tiny_run import distilled, options, settings

from ijckd_fast import cli
from ijckd_fast.data.index import check
from ijckd_fast.data.unreadable import blames_file
from ijckd_fast.distill import Distiller
from ijckd_fast.errors import OutOfMemory, UserError, memory_told, out_of_memory
from ijckd_fast.train import build, checkpoint, report, run_folder, state

TORCHS = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 7 bytes")
CUDAS = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
NO_MEMORY = [
    TORCHS,
    CUDAS,
    MemoryError(),
    RuntimeError("std::bad_alloc"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("can't start new thread"),
    RuntimeError("could not create a primitive"),
    RuntimeError("unable to mmap 8 bytes from file <last.pt>: Cannot allocate memory (12)"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    ImportError("libx.so: failed to map segment from shared object"),
]
OTHERS = [
    RuntimeError("mat1 and mat2"),
    OSError(errno.ENOENT, "no such file"),
    ValueError("out of range"),
    AxisError(""),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
def test_every_word_for_it_is_understood(error):
    assert out_of_memory(error)
    with (
        pytest.raises(OutOfMemory, match=r"^out of memory cooking \(.+\): less salt$"),
        memory_told("cooking", "less salt"),
    ):
        raise error
    caused = UserError("the file is damaged")
    caused.__cause__ = error
    assert out_of_memory(caused)
    assert not blames_file(error)  # an image is not damaged because there was no memory to decode it


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_are_passed_on(error):
    assert not out_of_memory(error)
    assert not out_of_memory(UserError("out of memory, says a user"))
    with pytest.raises(type(error)), memory_told("cooking", "less salt"):
        raise error


def fail(error: BaseException):
    def failing(*_, **__):
        raise error

    return failing


IN_TRAINING = {
    "scan": (check, "_check_open_image", MemoryError(), "in a run with batches of 12 images of 16 pixels on cpu"),
    "plan": (build, "TrainPlan", MemoryError(), "in a run with batches of 12 images"),
    "building": (torch.nn.Conv2d, "__init__", TORCHS, "in a run with batches of 12 images of 16 pixels on cpu"),
    "asking": (torch.nn.Conv2d, "forward", TORCHS, "building 'resnet8x0.5' and asking it about 2 images of 16x16"),
    "teacher": (Distiller, "teacher_logits", TORCHS, "evaluating, with 12 images of 16 pixels at once on cpu"),
    "student": (Distiller, "predict", CUDAS, "evaluating, with 12 images of 16 pixels at once on cpu"),
    "copying": (checkpoint, "copied", TORCHS, "in a run with batches of 12 images"),
    "writing": (checkpoint, "save", MemoryError(), "in a run with batches of 12 images"),
    "random": (state, "random_state", OSError(errno.ENOMEM, "no"), "in a run with batches of 12 images"),
    "report": (report, "write_report", MemoryError(), "in a run with batches of 12 images"),
    "environment": (run_folder, "write_environment", OSError(errno.ENOMEM, "no"), "in a run with batches of 12"),
}


@pytest.mark.parametrize("place", IN_TRAINING)
def test_in_training_outside_a_step(place, data, teacher, tmp_path, monkeypatch, capsys):
    where, name, error, said = IN_TRAINING[place]
    shown = data
    if place == "scan":
        shown = tmp_path / "data"  # not scanned yet
        for split in ("train", "val"):
            (shown / split).mkdir(parents=True)
            for folder in (data / split).iterdir():
                (shown / split / folder.name).symlink_to(folder)
    monkeypatch.setattr(where, name, fail(error))
    values = {**distilled(teacher), "batch_size": 12, "epochs": 1, "eval_every": 1}
    text = complaint(capsys, "train", *options(settings(shown, tmp_path / "run", **values)))
    assert f"out of memory {said}" in text
    assert (tmp_path / "run" / run_folder.STOPPED).read_text().strip() in text


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["evaluate"], "evaluating, with 8 images of 16 pixels at once on cpu"),
        (["bound"], "in ijckd-fast bound"),
        (["export", "--out"], "in ijckd-fast export"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_of_a_finished_run(run, command, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.functional, "conv2d", fail(TORCHS))
    monkeypatch.setattr(Distiller, "predict", fail(TORCHS))
    name, *more = command
    text = complaint(capsys, name, str(run), *more, *([str(tmp_path / "out")] if more else []))
    assert "out of memory" in text


def _limited(megabytes: int, command: list[str]) -> int:
    """A command with so many megabytes of address space beyond what is taken already."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 1_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return cli.main(command)


@pytest.mark.parametrize("megabytes", [5, 500])
def test_a_process_that_may_take_no_more(megabytes, data, teacher, tmp_path):
    values = {**distilled(teacher), "image_size": 512, "eval_resize": 512, "batch_size": 36, "epochs": 1}
    run = Run(tmp_path, 1, _limited, megabytes, ["train", *options(settings(data, tmp_path / "run", **values))])
    assert run.ends() == [2]
    assert "ijckd-fast: out of memory" in run.output()
    assert "Traceback" not in run.output()
