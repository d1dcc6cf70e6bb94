"""The DALI executor: one pipeline from paths to normalised pixels. Nothing of DALI is visible outside this file.

DALI orders and draws nothing: an external source feeds it each BatchPlan, so that its batches are the plan's and a
restart at any step needs no saved state.
"""

# mypy: disable-error-code="attr-defined"
# (DALI makes the constants of its types module at run time)

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import nvidia.dali
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from ijckd_fast.data.load.loader import Loader, Unreadable
from ijckd_fast.data.load.pillow import make_image
from ijckd_fast.data.plan import BatchPlan, EvalPlan, Plan
from ijckd_fast.data.sources import Place
from ijckd_fast.errors import UserError

VERSION: str = nvidia.dali.__version__
_FAR_OUTSIDE = 65536  # pixels: moves a crop off any image


def _encoded(place: Place) -> np.ndarray:
    """[n] uint8. What cannot be read is no image: the pipeline then fails as it does for a file."""
    try:
        return np.frombuffer(place.read(), np.uint8)
    except OSError:
        return np.zeros(1, np.uint8)


def _inputs(plan: BatchPlan, only: int | None = None) -> tuple:
    """What the pipeline's external source takes of a whole batch, or of one image of it.

    First the paths of files, or from shards the encoded images themselves.
    """
    part = slice(None) if only is None else slice(only, only + 1)
    if plan.places is None:
        first = [np.frombuffer(os.fsencode(path), np.uint8) for path in plan.paths[part]]
    else:
        first = [_encoded(place) for place in plan.places[part]]
    target = plan.shape if plan.resize is None else plan.resize
    result = np.full_like(target, plan.image_size)
    return first, plan.size[part], plan.anchor[part], target[part], result[part], plan.flip[part]


class DaliLoader(Loader):
    """See Loader. Geometry comes from the plan and the resize is antialiased: pixels equal Pillow's but for rounding.

    Where a GPU decodes they do not: nvJPEG has an inverse DCT of its own, and which decoder an image gets depends on
    its batch.

    decode           'cpu': decode, resize and normalise on `threads` CPU threads, and a GPU gets the finished batch;
                     'hybrid': decode there, the rest on the GPU; 'gpu': the Huffman part of some images there, all else
                     on the GPU
    hw_decoder_load  decode 'gpu': share of the images that go to the GPU's JPEG engine, in [0, 1]. More threads want
                     less of it
    raises           UserError: decode other than 'cpu' without a GPU to deliver to
    With a GPU, float16 and bfloat16 batches leave DALI as float16 (it has no bfloat16), and batches arrive in the order
    of torch's current stream: the host waits for no copy.
    """

    _pipeline: Pipeline | None = None

    def __init__(
        self,
        plan: Plan,
        *,
        decode: Literal["cpu", "hybrid", "gpu"] = "cpu",
        hw_decoder_load: float = 0.65,
        **settings: Any,
    ) -> None:
        super().__init__(plan, **settings)
        if decode != "cpu" and self.device.type != "cuda":
            raise UserError(
                f"decode {decode!r} needs a GPU to deliver to, found device {str(self.device)!r}; take decode 'cpu'"
            )
        if not 0 <= hw_decoder_load <= 1:
            raise UserError(
                f"hw_decoder_load must be a share of the images between 0 and 1, found {hw_decoder_load}; 0.65 is "
                "DALI's own"
            )
        self.decode, self.hw_decoder_load = decode, hw_decoder_load

    def _open(self, step: int | None = None) -> None:
        self._planned = self.start if step is None else step
        self._in_flight: deque[BatchPlan] = deque()
        self._pipeline = self._build(self._next_batch, self.plan.batch_size, self.prefetch)

    def _next_batch(self, _iteration: int) -> tuple:
        """Called by DALI, in the thread that runs the pipeline, once for each batch to be started."""
        if self._exhausted(self._planned):
            raise StopIteration
        plan = self.plan.batch(self._planned)
        self._planned += 1
        self._in_flight.append(plan)
        return _inputs(plan)

    def _build(self, source: Callable[[int], tuple], batch_size: int, prefetch: int) -> Pipeline:
        augment = self.plan.augment
        # the plan's BatchPlan.resize is None: cut from the stored image, of which the rest is not decoded
        crop_first = not isinstance(self.plan, EvalPlan) and not augment.crop_padding
        on_gpu = self.device.type == "cuda"
        decoder: dict[str, Any] = {}
        if self.decode == "gpu":
            # the JPEG engine's buffers are made once for the largest image there is
            width, height = self.plan.index.sizes.max(0).tolist()
            decoder = {
                "device": "mixed", "hw_decoder_load": self.hw_decoder_load, "preallocate_width_hint": width,
                "preallocate_height_hint": height,
            }  # fmt: skip
        pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=self.threads,
            # None: needs neither GPU nor driver
            device_id=torch.empty(0, device=self.device).get_device() if on_gpu else None,
            prefetch_queue_depth=prefetch,
        )
        with pipeline:
            # stored: (h, w) as indexed. anchor: (y, x) of the crop. target: (h, w) of the crop where it comes first,
            # else of the resized image. result: (h, w) of what comes out.
            first, stored, anchor, target, result, flip = fn.external_source(
                source=source,
                num_outputs=6,
                batch=True,
                dtype=[types.UINT8, types.INT32, types.INT32, types.INT32, types.INT32, types.INT32],
                ndim=[1, 1, 1, 1, 1, 0],
            )
            encoded = first if self.plan.index.shards else fn.io.file.read(first)
            # The decoder must not see a file whose header cannot be parsed: DALI 2.4.0 then crashes the process in a
            # good part of the runs. peek_image_shape raises instead, and comes first because the crop depends on it.
            # The same dependency moves the crop off an image that is not of the size it was indexed with: an error too.
            peeked = fn.cast(fn.peek_image_shape(encoded, adjust_orientation=False), dtype=types.INT32)[0:2]
            off = (peeked - stored) * _FAR_OUTSIDE
            image: Any = fn.decoders.image_slice(
                encoded,
                anchor + off if crop_first else off,
                target if crop_first else stored,
                axes=[0, 1],
                output_type=types.RGB,
                adjust_orientation=False,
                **decoder,
            )
            if self.decode == "hybrid":
                image = image.gpu()
            resize_to = fn.cast(result if crop_first else target, dtype=types.FLOAT)
            image = fn.resize(image, size=resize_to, interp_type=types.INTERP_LINEAR, antialias=True)
            if not crop_first:  # black where a padded crop reaches beyond the image
                image = fn.slice(
                    image, start=anchor, shape=result, axes=[0, 1], out_of_bounds_policy="pad", fill_values=0
                )
            half = on_gpu and self.dtype in (torch.float16, torch.bfloat16)
            image = fn.crop_mirror_normalize(
                image,
                mirror=flip,
                # halves on a CPU cost more than the copy of floats that they would spare
                dtype=types.FLOAT16 if half and self.decode != "cpu" else types.FLOAT,
                output_layout="HWC",
                mean=[255 * value for value in augment.mean],
                std=[255 * value for value in augment.std],
            )
            pipeline.set_outputs(
                image.gpu() if on_gpu else image
            )  # DALI's copy is from pinned memory, on its own stream
        pipeline.build()
        return pipeline

    def _fetch(self, step: int) -> tuple[Tensor, BatchPlan]:
        while True:
            assert self._pipeline is not None
            try:
                stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
                (images,) = self._pipeline.run(stream)
            except RuntimeError:  # of which file, DALI often does not say; and the pipeline is no longer valid
                self._pipeline = None
                if not self._set_bad_files_aside():
                    raise  # every file alone is fine: not the data's fault, so DALI's own text stands
                self._open(step)
            else:
                # No copy: the tensor holds DALI's buffer, which DALI reuses only when the tensor is gone.
                return torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2), self._in_flight.popleft()

    def _set_bad_files_aside(self) -> bool:
        """Whether any file of the batches in flight fails alone. Pillow is asked first: it says what is wrong."""
        bad = False
        rows = [(plan, i) for plan in self._in_flight for i in range(len(plan.ids))]
        sound = []
        with ThreadPoolExecutor(self.threads) as pool:
            errors = pool.map(lambda row: self._error(*row), rows)
            for row, error in zip(rows, errors, strict=True):
                if error is None:
                    sound.append(row)
                else:
                    self._set_aside(*row, error)
                    bad = True
        if bad:
            return True
        alone = self._build(lambda k: _inputs(*sound[k]), batch_size=1, prefetch=1)
        for row in sound:
            try:
                alone.run()
            except RuntimeError as error:
                why = str(error).split("\n\n")[0]
                self._set_aside(*row, f"an image that only Pillow can decode, not DALI ({why})")
                return True
        return False

    def _error(self, plan: BatchPlan, i: int) -> str | None:
        """Why Pillow cannot make this image, or None."""
        try:
            make_image(plan, i)
        except Unreadable as error:
            return error.why
        return None

    def _release(self) -> None:
        self._pipeline = None  # the last reference: DALI stops its threads and frees its buffers
