"""model.onnx: written by torch.onnx, answered by onnxruntime."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ijckd_fast import extras
from ijckd_fast.errors import UserError, out_of_memory, ran_out, reason_of
from ijckd_fast.export.deployed import Deployed, random_images


def require_onnx() -> None:
    """UserError, which says what to install, unless onnx, onnxruntime and onnxscript (for torch.onnx) are there."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        try:
            __import__(name)
        except ImportError as error:
            raise UserError(
                f"model.onnx needs {name}, which could not be loaded ({error}): {extras.install(name)}, or leave ONNX "
                "out with --no-onnx"
            ) from error


def onnx_bytes(module: Deployed, image_size: int, metadata: dict[str, str]) -> bytes:
    """The module as an ONNX file: input 'images' [batch, 3, S, S], output 'logits' [batch, K], any batch size.

    raises  UserError where the exporter cannot express one of the net's operations
    """
    with _quiet(), _explained():
        program = torch.onnx.export(
            module,
            (random_images(image_size),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        for node in program.model.graph.all_nodes():  # else every node holds the paths of the files it was traced in
            node.metadata_props.clear()
        program.model.metadata_props.update(metadata)
        return program.model_proto.SerializeToString()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Inside, an error of the exporter or of onnxruntime becomes a UserError: its first cause, and the operation."""
    try:
        yield
    except Exception as error:  # many kinds: of tracing, of translation, of the graph's checks
        if out_of_memory(error):
            raise ran_out("writing model.onnx", "leave it out with --no-onnx, or free memory", error) from error
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__) is not None:
            chain.append(cause)
        operation = re.search(r"target=torch\.ops\.([\w.]+)", " ".join(map(str, chain)))
        reason = textwrap.shorten(reason_of(chain[-1]), 200, placeholder=" ...")
        raise UserError(
            "the net cannot be written as model.onnx"
            f"{f': its operation {operation[1]} is beyond the exporter of this torch' if operation else ''} ({reason})."
            " Leave ONNX out with --no-onnx: the other files do not need it; or train a student without it"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's prints, warnings and log lines."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def onnx_answer(path: Path) -> Callable[[Tensor], Tensor]:
    """onnxruntime on the CPU with torch's number of threads: images [B, 3, S, S] -> logits [B, K]."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with _explained():
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.contiguous().numpy()})[0])
