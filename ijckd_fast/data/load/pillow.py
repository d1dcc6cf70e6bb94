"""The Pillow executor: torchvision's own operations on a thread pool. Slower than the others, which are held to it."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ijckd_fast.data.index import CANNOT_BE_READ
from ijckd_fast.data.index.rgb import to_rgb
from ijckd_fast.data.load.loader import Loader
from ijckd_fast.data.load.planes import arrange_planes
from ijckd_fast.data.plan import BatchPlan
from ijckd_fast.data.sources import BlockPlace, Place, WholeFile
from ijckd_fast.data.unreadable import Unreadable, blames_file


def decode(path: str, source: bytes | Place | None = None) -> Image.Image:
    """One file as an RGB image. An EXIF orientation is ignored, alpha is dropped, 16-bit gray keeps its high byte.

    path    what an error calls it
    source  its bytes, or where they lie; None: all of the file at `path`
    raises  Unreadable when it cannot be read or decoded
    """
    with (
        blamed_on(path),
        io.BytesIO(source) if isinstance(source, bytes) else (source or WholeFile(path)).open() as file,
        Image.open(file) as image,
    ):
        return to_rgb(image)


@contextmanager
def blamed_on(path: str) -> Iterator[None]:
    """Inside, whatever is an image's own fault is Unreadable."""
    try:
        yield
    except UnidentifiedImageError as error:  # whose text names the file object, by its address
        raise Unreadable(path, "not an image (its content is of no known image format)") from error
    except Exception as error:  # Pillow's parsers raise nearly anything on damaged input
        if not blames_file(error):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise Unreadable(path, f"{CANNOT_BE_READ}: {error.strerror}") from error
        raise Unreadable(path, f"{type(error).__name__}: {error}") from error


def make_image(plan: BatchPlan, i: int) -> np.ndarray:
    """Image i of a batch, decoded, cropped, resized and flipped: [S, S, 3] uint8. Raises Unreadable."""
    place = plan.places[i] if plan.places else None
    if isinstance(place, BlockPlace):
        with blamed_on(plan.paths[i]):
            planes = place.planes()
        return arrange_planes(planes, plan, i)
    return arrange(stored_image(plan, i), plan, i)


def stored_image(plan: BatchPlan, i: int) -> Image.Image:
    """Image i of a batch, decoded. Raises Unreadable."""
    return decode(plan.paths[i], plan.places[i] if plan.places else None)


def as_indexed(image: Image.Image, plan: BatchPlan, i: int) -> Image.Image:
    """Image i of a batch itself. Raises Unreadable when it has not the size it was indexed with."""
    if (image.height, image.width) != tuple(plan.size[i]):
        was = f"{plan.size[i][1]}x{plan.size[i][0]}"
        raise Unreadable(plan.paths[i], f"an image of {image.width}x{image.height} pixels where {was} were indexed")
    return image


def arrange(image: Image.Image, plan: BatchPlan, i: int) -> np.ndarray:
    """The RGB pixels of image i of a batch as it is stored -> cropped, resized and flipped: [S, S, 3] uint8.

    raises Unreadable when it has not the size it was indexed with
    """
    image = as_indexed(image, plan, i)
    (y, x), (h, w) = plan.anchor[i].tolist(), plan.shape[i].tolist()
    if plan.resize is None:  # crop first, so that no pixel outside it enters the resize (resize(box=...) would let it)
        image = image.crop((x, y, x + w, y + h)).resize((plan.image_size, plan.image_size), Image.Resampling.BILINEAR)
    else:  # Pillow too makes black what a crop has outside of the image
        nh, nw = plan.resize[i].tolist()
        image = image.resize((nw, nh), Image.Resampling.BILINEAR).crop((x, y, x + w, y + h))
    pixels = np.asarray(image)
    return pixels[:, ::-1] if plan.flip[i] else pixels


class PillowLoader(Loader):
    """See Loader. Prefetching keeps `prefetch` batches beyond the current one in the making, one task per image."""

    _pool: ThreadPoolExecutor | None = None

    def _open(self) -> None:
        augment = self.plan.augment
        self._shift = np.array(augment.mean, np.float32) * np.float32(255)
        self._scale = 1 / (np.array(augment.std, np.float32) * np.float32(255))
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="pillow-loader")
        self._ahead: deque[tuple[BatchPlan, list[Future[np.ndarray]]]] = deque()
        self._planned = self.start

    def _fetch(self, step: int) -> tuple[Tensor, BatchPlan]:
        assert self._pool is not None
        while len(self._ahead) <= self.prefetch and not self._exhausted(self._planned):
            plan = self.plan.batch(self._planned)
            self._changed.ask(plan, self._pool)
            self._ahead.append((plan, [self._pool.submit(self._normalised, plan, i) for i in range(len(plan.ids))]))
            self._planned += 1
        plan, futures = self._ahead.popleft()
        while not self._all_read(plan, futures):
            again = self.plan.batch(step)
            for i in np.flatnonzero(again.ids != plan.ids).tolist():
                futures[i] = self._pool.submit(self._normalised, again, i)
            plan = again
        images = np.stack([future.result() for future in futures])  # [B, S, S, 3] float32
        return torch.from_numpy(images).permute(0, 3, 1, 2), plan

    def _all_read(self, plan: BatchPlan, futures: list[Future[np.ndarray]]) -> bool:
        """Waits for the whole batch; what cannot be read is set aside."""
        bad = False
        for i, future in enumerate(futures):
            try:
                future.result()
            except Unreadable as error:
                self._set_aside(plan, i, error.why)
                bad = True
        return not bad

    def _made(self, plan: BatchPlan, i: int) -> np.ndarray:
        """The pixels of image i of a batch, [S, S, 3] uint8. Raises Unreadable."""
        return make_image(plan, i)

    def _normalised(self, plan: BatchPlan, i: int) -> np.ndarray:
        pixels = self._made(plan, i)
        return (pixels.astype(np.float32) - self._shift) * self._scale  # [S, S, 3] float32

    def _release(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            self._ahead.clear()
