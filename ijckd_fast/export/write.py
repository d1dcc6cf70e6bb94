"""Writes an export: files get their names only after they have answered as the trained net does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from ijckd_fast import files
from ijckd_fast.data import Batch
from ijckd_fast.export.answers import FOLDING_TOLERANCE, ONNX_TOLERANCE, compare_logits, logits_of, refuse_beyond
from ijckd_fast.export.cost import measure_cost
from ijckd_fast.export.deployed import Deployed, deployed_module
from ijckd_fast.export.description import describe
from ijckd_fast.export.folder import CONFIG, MODEL, ONNX, STUDENT, new_folder, refuse_occupied
from ijckd_fast.export.load import load_exported
from ijckd_fast.export.onnx_file import onnx_answer, onnx_bytes, require_onnx
from ijckd_fast.export.timm_call import timm_options

if TYPE_CHECKING:
    from ijckd_fast.train import LoadedRun


def write_export(
    folder: Path,
    run: LoadedRun,
    batches: Iterable[Batch],
    *,
    onnx: bool = True,
    overwrite: bool = False,
    runs: int = 25,
) -> dict[str, Any]:
    """Writes model.safetensors, config.json, student.safetensors, model.onnx, once they answer as the trained net does.

    run        of `load_run`, on the CPU
    batches    real images to compare on, at least one
    onnx       write model.onnx as well
    overwrite  replace an earlier export in `folder`
    runs       timed calls of each part
    returns    what config.json says
    raises     UserError: `folder` is occupied or cannot be written, there are no images, ONNX is asked for and not
               installed; AnswersDiffer: beyond FOLDING_TOLERANCE or ONNX_TOLERANCE. `folder` is then as it was.
    """
    refuse_occupied(folder, overwrite)
    if onnx:
        require_onnx()
    distiller, config = run.distiller, run.config
    student = distiller.student
    with new_folder(folder, overwrite) as made, torch.no_grad():
        module = deployed_module(distiller, config.image_size)
        row = describe(module, run)
        row["sha256"][MODEL] = _write_hashed(made / MODEL, _safetensors(module.state_dict()))
        row["sha256"][STUDENT] = _write_hashed(made / STUDENT, _safetensors(student.native_state_dict()))
        row["timm"] = timm_options(made / STUDENT, student, config.image_size)
        files.write_json(made / CONFIG, row)  # for load_exported; whole below
        answer = None
        if onnx:
            row["sha256"][ONNX] = _write_hashed(made / ONNX, onnx_bytes(module, config.image_size, _metadata(row)))
            answer = onnx_answer(made / ONNX)
        row["compared"] = _compared(distiller.predict, load_exported(made), answer, batches)
        row["cost"] = {
            "threads": torch.get_num_threads(),
            "runs": runs,
            "parts": measure_cost(module, config.image_size, runs, answer),
        }
        row = files.write_json(made / CONFIG, row)
    return row


def _write_hashed(path: Path, data: bytes) -> str:
    """Returns the SHA-256 of what it wrote."""
    files.write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def _safetensors(weights: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in weights.items()}, {"format": "pt"})


def _metadata(row: dict[str, Any]) -> dict[str, str]:
    """What model.onnx says of itself."""
    keys = ("format", "student", "image_size", "preprocessing", "classes")
    texts = {key: row[key] if isinstance(row[key], str) else json.dumps(row[key]) for key in keys}
    return {**texts, "num_classes": str(len(row["classes"]))}


def _compared(
    trained: Callable[[Tensor], Tensor],
    deployed: Deployed,
    onnx_answer: Callable[[Tensor], Tensor] | None,
    batches: Iterable[Batch],
) -> dict[str, Any]:
    """How much the logits of the files differ, as in config.json; AnswersDiffer where it is too much."""
    programs: list[Callable[[Tensor], Tensor]] = [trained, deployed, *([] if onnx_answer is None else [onnx_answer])]
    of_trained, of_deployed, *of_onnx = logits_of(programs, batches)
    compared = compare_logits(of_deployed, of_trained)
    refuse_beyond(compared, FOLDING_TOLERANCE, "the deployed module's logits differ from the trained net's")
    found = {"deployed with trained": compared._asdict()}
    for logits in of_onnx:
        compared = compare_logits(logits, of_deployed)
        refuse_beyond(compared, ONNX_TOLERANCE, "onnxruntime's logits differ from PyTorch's")
        found["onnxruntime with deployed"] = compared._asdict()
    return found
