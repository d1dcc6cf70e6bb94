"""What DALI makes of one image file: the index asks it about odd ones. The executor is ../load/dali.py."""

# mypy: disable-error-code="attr-defined"
# (DALI makes the constants of its types module at run time)

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import nvidia.dali
from nvidia.dali import Pipeline, fn, types

VERSION: str = nvidia.dali.__version__

_FAR_OUTSIDE = 65536  # pixels: moves a crop off any image
_NO_REASON = ("Critical error in pipeline", "Current pipeline object is no longer valid", "C++ context", "[frame")


class DaliDecoder:
    """Decodes one image at a time, as the executor does with its own; from any number of threads at once."""

    def __init__(self) -> None:
        self._idle: list[Pipeline] = []
        self._lock = threading.Lock()

    def decode(self, encoded: bytes, height: int, width: int) -> np.ndarray:
        """RGB pixels [h, w, 3] uint8.

        raises  RuntimeError where DALI cannot decode it, or sees another size; the next image is none the worse for it
        """
        size = np.array([height, width], np.int32)
        with self._pipeline() as pipeline:
            (images,) = pipeline.run(encoded=[np.frombuffer(encoded, np.uint8)], size=[size])
            return np.array(images.at(0))  # a copy: DALI's buffer is used again

    @contextmanager
    def _pipeline(self) -> Iterator[Pipeline]:
        with self._lock:
            pipeline = self._idle.pop() if self._idle else _build()
        try:
            yield pipeline
        finally:
            with self._lock:
                self._idle.append(pipeline)


def _build() -> Pipeline:
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        size = fn.external_source(name="size", dtype=types.INT32, ndim=1)
        pipeline.set_outputs(decoded(encoded, size, None, size))
    pipeline.build()
    return pipeline


def decoded(encoded: Any, stored: Any, anchor: Any, shape: Any, **decoder: Any) -> Any:
    """The part of a pipeline that decodes: RGB pixels [h, w, 3] of a crop. The arguments are data nodes.

    encoded  [n] uint8, the file
    stored   (h, w) that the image must have
    anchor   (y, x) of the crop, None: (0, 0); shape: its (h, w)
    decoder  more of the decoder's arguments
    """
    # The decoder must not see a file whose header cannot be parsed: DALI 2.4.0 then crashes the process in a
    # good part of the runs. peek_image_shape raises instead, and comes first because the crop depends on it.
    # The same dependency moves the crop off an image that is not of the size it was indexed with: an error too.
    peeked = fn.cast(fn.peek_image_shape(encoded, adjust_orientation=False), dtype=types.INT32)[0:2]
    off = (peeked - stored) * _FAR_OUTSIDE
    return fn.decoders.image_slice(
        encoded,
        off if anchor is None else anchor + off,
        shape,
        axes=[0, 1],
        output_type=types.RGB,
        adjust_orientation=False,
        **decoder,
    )


def last_line(error: RuntimeError) -> str:
    """What DALI says went wrong, of the many lines of its error."""
    lines = [line.strip().rstrip(": ") for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith(_NO_REASON)]
    return lines[-1] if lines else "no reason given"
