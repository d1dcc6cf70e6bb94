"""The DALI executor: one pipeline from paths to normalised pixels.

Nothing of DALI is visible outside this file and ../index/dali.py, which has the decoder of both.

DALI orders and draws nothing: an external source feeds it each BatchPlan, so that its batches are the plan's and a
restart at any step needs no saved state.
"""

# mypy: disable-error-code="attr-defined"
# (DALI makes the constants of its types module at run time)

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from ijckd_fast.data.index.dali import decoded, last_line
from ijckd_fast.data.load.loader import Loader
from ijckd_fast.data.load.pillow import as_indexed, make_image, stored_image
from ijckd_fast.data.plan import BatchPlan, EvalPlan, Plan
from ijckd_fast.data.sources import Place
from ijckd_fast.data.unreadable import Unreadable
from ijckd_fast.errors import UserError, out_of_memory

_NOTHING = np.zeros(1, np.uint8)  # encoded, of an image that need not be decoded, or cannot be
_READ_AT_ONCE = 16  # images that one task of the pool reads from shards
_NO_PIXELS = np.zeros((1, 1, 3), np.uint8)  # decoded, of an image that DALI decodes itself


def _encoded(place: Place) -> np.ndarray:
    """[n] uint8. What cannot be read is no image: the pipeline then fails as it does for a file."""
    try:
        return np.frombuffer(place.read(), np.uint8)
    except OSError:
        return _NOTHING


def _pillows(plan: BatchPlan, i: int) -> np.ndarray | None:
    """The pixels [h, w, 3] uint8 that DALI would decode of image i of a batch, by Pillow; None where it cannot."""
    try:
        pixels = np.asarray(as_indexed(stored_image(plan, i), plan, i))
    except Unreadable:
        return None
    if plan.resize is not None:
        return pixels
    (y, x), (h, w) = plan.anchor[i].tolist(), plan.shape[i].tolist()
    return np.ascontiguousarray(pixels[y : y + h, x : x + w])


class _Fed:
    """What the pipeline's external source takes of a batch. Where Pillow decodes, or shards are read, it begins at
    once.
    """

    def __init__(self, plan: BatchPlan, by_pillow: np.ndarray, pool: ThreadPoolExecutor) -> None:
        """by_pillow: [B] bool."""
        self.plan = plan
        self._pixels = {i: pool.submit(_pillows, plan, i) for i in np.flatnonzero(by_pillow).tolist()}
        rows = np.flatnonzero(~by_pillow).tolist() if plan.places is not None else []
        parts = [rows[first : first + _READ_AT_ONCE] for first in range(0, len(rows), _READ_AT_ONCE)]
        self._encoded = [pool.submit(_read, plan, part) for part in parts]

    def inputs(self) -> tuple:
        """See `_inputs`. What Pillow cannot decode either is left to DALI, to fail as any other."""
        done = {i: future.result() for i, future in self._pixels.items()}
        encoded = {i: data for future in self._encoded for i, data in future.result().items()}
        return _inputs(self.plan, {i: pixels for i, pixels in done.items() if pixels is not None}, encoded)


def _read(plan: BatchPlan, rows: Sequence[int]) -> dict[int, np.ndarray]:
    """The encoded images [n] uint8 in these rows of a batch from shards, by row."""
    assert plan.places is not None
    return {i: _encoded(plan.places[i]) for i in rows}


def _inputs(
    plan: BatchPlan, pixels: Mapping[int, np.ndarray], encoded: Mapping[int, np.ndarray], only: int | None = None
) -> tuple:
    """What the pipeline's external source takes of a whole batch, or of one image of it.

    First the paths of files, or from shards the encoded images themselves, by row (where Pillow was to decode one and
    could not, it is read here); last the pixels of those that Pillow has decoded, by row, and which they are.
    """
    rows = range(len(plan.ids)) if only is None else range(only, only + 1)
    part = slice(rows.start, rows.stop)
    if plan.places is None:
        first = [np.frombuffer(os.fsencode(path), np.uint8) for path in plan.paths[part]]
    else:
        first = [_NOTHING if i in pixels else encoded[i] if i in encoded else _encoded(plan.places[i]) for i in rows]
    target = plan.shape if plan.resize is None else plan.resize
    result = np.full_like(target, plan.image_size)
    given = [np.array(i in pixels) for i in rows], [pixels.get(i, _NO_PIXELS) for i in rows]
    return first, plan.size[part], plan.anchor[part], target[part], result[part], plan.flip[part], *given


class DaliLoader(Loader):
    """See Loader. Geometry comes from the plan and the resize is antialiased: pixels equal Pillow's but for rounding.

    Where a GPU decodes they do not: nvJPEG has an inverse DCT of its own, and which decoder an image gets depends on
    its batch. Images that DALI's decoder makes other pixels of, or cannot decode, are decoded by Pillow in the same
    batch (Index.by_pillow). One of which this shows only now is named once by a warning.

    decode           'cpu': decode, resize and normalise on `threads` CPU threads, and a GPU gets the finished batch;
                     'hybrid': decode there, the rest on the GPU; 'gpu': the Huffman part of some images there, all else
                     on the GPU
    hw_decoder_load  decode 'gpu': share of the images that go to the GPU's JPEG engine, in [0, 1]. More threads want
                     less of it
    raises           UserError: decode other than 'cpu' without a GPU to deliver to; while iterating, what DALI says
                     where it fails on files of which each alone is fine
    With a GPU, float16 and bfloat16 batches leave DALI as float16 (it has no bfloat16), and batches arrive in the order
    of torch's current stream: the host waits for no copy.
    """

    _pipeline: Pipeline | None = None
    _pool: ThreadPoolExecutor | None = None

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
        self._by_pillow = plan.index.by_pillow(decoders_of_gpu=decode == "gpu")

    def _open(self, step: int | None = None) -> None:
        self._planned = self.start if step is None else step
        self._ahead: deque[_Fed] = deque()
        self._in_flight: deque[BatchPlan] = deque()
        self._changed.forget()
        self._release()
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="pillow-for-dali")
        self._pipeline = self._build(self._next_batch, self.plan.batch_size, self.prefetch)

    def _next_batch(self, _iteration: int) -> tuple:
        """Called by DALI, in the thread that runs the pipeline, once for each batch to be started."""
        while len(self._ahead) < 2 and not self._exhausted(self._planned):  # Pillow has the time of a batch
            plan = self.plan.batch(self._planned)
            assert self._pool is not None
            self._changed.ask(plan, self._pool)
            self._ahead.append(_Fed(plan, self._by_pillow[plan.ids], self._pool))
            self._planned += 1
        if not self._ahead:
            raise StopIteration
        fed = self._ahead.popleft()
        self._in_flight.append(fed.plan)
        return fed.inputs()

    def _build(self, source: Callable[[int], tuple], batch_size: int, prefetch: int) -> Pipeline:
        # the plan's BatchPlan.resize is None: cut from the stored image, of which the rest is not decoded
        crop_first = not isinstance(self.plan, EvalPlan) and not self.plan.augment.crop_padding
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
            # else of the resized image. result: (h, w) of what comes out. given: whether Pillow has decoded it, and its
            # pixels: those of the crop where it comes first, else of the whole image.
            count = 8 if self._by_pillow.any() else 6  # the last two only where they are used
            first, stored, anchor, target, result, flip, *given = fn.external_source(
                source=lambda k: source(k)[:count],
                num_outputs=count,
                batch=True,
                dtype=[types.UINT8, *[types.INT32] * 5, types.BOOL, types.UINT8][:count],
                ndim=[1, 1, 1, 1, 1, 0, 0, 3][:count],
            )
            crop = (anchor, target) if crop_first else (None, stored)
            if not given:
                image = self._decoded(first, stored, *crop, **decoder)
            else:  # the operators behind DALI's own `if given:`, which works on a function's source text
                which, pixels = given
                own = [x if x is None else fn._conditional.split(x, predicate=which)[1] for x in (first, stored, *crop)]
                pixels = fn.reshape(fn._conditional.split(pixels, predicate=which)[0], layout="HWC")
                image = fn._conditional.merge(
                    pixels.gpu() if self.decode == "gpu" else pixels, self._decoded(*own, **decoder), predicate=which
                )
            pipeline.set_outputs(self._finished(image, anchor, target, result, flip, crop_first))
        pipeline.build()
        return pipeline

    def _decoded(self, first: Any, stored: Any, anchor: Any, shape: Any, **decoder: Any) -> Any:
        """The part of the pipeline up to the decoder: see `decoded`."""
        encoded = first if self.plan.index.shards else fn.io.file.read(first)
        return decoded(encoded, stored, anchor, shape, **decoder)

    def _finished(self, image: Any, anchor: Any, target: Any, result: Any, flip: Any, crop_first: bool) -> Any:
        """The part of the pipeline after the decoder: resized, cropped, normalised, on the loader's device."""
        augment, on_gpu = self.plan.augment, self.device.type == "cuda"
        if self.decode == "hybrid":
            image = image.gpu()
        resize_to = fn.cast(result if crop_first else target, dtype=types.FLOAT)
        image = fn.resize(image, size=resize_to, interp_type=types.INTERP_LINEAR, antialias=True)
        if not crop_first:  # black where a padded crop reaches beyond the image
            image = fn.slice(image, start=anchor, shape=result, axes=[0, 1], out_of_bounds_policy="pad", fill_values=0)
        half = on_gpu and self._made_in in (torch.float16, torch.bfloat16)
        image = fn.crop_mirror_normalize(
            image,
            mirror=flip,
            # halves on a CPU cost more than the copy of floats that they would spare
            dtype=types.FLOAT16 if half and self.decode != "cpu" else types.FLOAT,
            output_layout="HWC",
            mean=[255 * value for value in augment.mean],
            std=[255 * value for value in augment.std],
        )
        return image.gpu() if on_gpu else image  # DALI's copy is from pinned memory, on its own stream

    def _fetch(self, step: int) -> tuple[Tensor, BatchPlan]:
        while True:
            assert self._pipeline is not None
            try:
                stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
                (images,) = self._pipeline.run(stream)
            except RuntimeError as error:  # of which file, DALI often does not say; and the pipeline is no longer valid
                if out_of_memory(error):
                    raise
                failed = list(self._in_flight)
                if not self._find_culprits(failed):  # not the data's fault, so DALI's own text stands
                    raise UserError(
                        f"DALI cannot make a batch of images of {self.plan.index.folder}: "
                        f"{last_line(error)}. Each file of it alone is fine, {failed[0].paths[0]} the first; try "
                        "--data-backend pillow"
                    ) from error
                self._open(step)
            else:
                # No copy: the tensor holds DALI's buffer, which DALI reuses only when the tensor is gone.
                return torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2), self._in_flight.popleft()

    def _find_culprits(self, plans: Sequence[BatchPlan]) -> bool:
        """Whether a file fails alone. What Pillow cannot decode is set aside, what DALI cannot Pillow takes over."""
        bad = False
        rows = [(plan, i) for plan in plans for i in range(len(plan.ids))]
        with ThreadPoolExecutor(self.threads) as pool:
            errors = list(pool.map(lambda row: self._error(*row), rows))
        for (plan, i), error in zip(rows, errors, strict=True):
            if error is not None:
                self._set_aside(plan, i, error)
                bad = True
        if bad:
            return True
        rows = [(plan, i) for plan, i in rows if not self._by_pillow[plan.ids[i]]]
        alone = self._build(lambda k: _inputs(rows[k][0], {}, {}, rows[k][1]), batch_size=1, prefetch=1)
        for plan, i in rows:
            try:
                alone.run()
            except RuntimeError as error:  # the next image is none the worse for it
                if out_of_memory(error):
                    raise
                bad = True
                if not self._by_pillow[plan.ids[i]]:
                    self._by_pillow[plan.ids[i]] = True
                    self._changed.named(plan.paths[i])
                    warnings.warn(
                        f"{plan.paths[i]} is decoded by Pillow from here on: DALI cannot ({last_line(error)})",
                        stacklevel=2,
                    )
        return bad

    def _error(self, plan: BatchPlan, i: int) -> str | None:
        """Why Pillow cannot make this image, or None."""
        try:
            make_image(plan, i)
        except Unreadable as error:
            return error.why
        return None

    def _release(self) -> None:
        self._pipeline = None  # the last reference: DALI stops its threads and frees its buffers
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
