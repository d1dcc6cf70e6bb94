"""An image in blocks: its bytes, its planes and its views. The C++ is in csrc/; csrc/blocks.h defines every number.

An image of h x w pixels is three planes, Y, Cb and Cr of JFIF. Luma is padded to multiples of 8 by repeating its last
row and column, chroma has one sample for each 2 x 2. Every 4 x 4 samples are two end points and sixteen indices between
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class Bits(NamedTuple):
    """Bits of an index: 3 or 4."""

    luma: int
    chroma: int


BITS = {"6": Bits(3, 3), "7": Bits(4, 3), "7.5": Bits(4, 4)}  # by the bits that a pixel takes with them

# The columns of a row of `views`, int64. top, left, crop_h, crop_w: the crop, in the image's pixels, which is resized
# to the view. Where resized_h and resized_w are not 0, the whole image is resized to them first, and the crop, of the
# view's own size, is in the resized image's pixels: it may lie outside, where it is black.
VIEW_COLUMNS = (
    "file", "offset", "length", "checksum", "height", "width", "top", "left", "crop_h", "crop_w", "resized_h",
    "resized_w", "flip",
)  # fmt: skip

_Int = TypeVar("_Int", int, np.ndarray)


def blocks_length(h: _Int, w: _Int, bits: Bits) -> _Int:
    """Bytes of an image of h x w pixels, or of each of many (int64 arrays of one shape)."""
    chroma = -(-h // 8) * -(-w // 8)  # blocks of a chroma plane; luma has four times as many
    return _plane_length(4 * chroma, bits.luma) + 2 * _plane_length(chroma, bits.chroma)


def _plane_length(blocks: _Int, bits: int) -> _Int:
    return 8 * blocks if bits == 3 else -(-blocks // 4) * 8 + 8 * blocks


def encode(rgb: np.ndarray, bits: Bits) -> np.ndarray:
    """[h, w, 3] uint8 -> its bytes, [blocks_length(h, w, bits)] uint8: the same on every machine.

    raises RuntimeError for another shape or dtype, or a side beyond 65,535
    """
    return _ops().block_encode(_tensor(rgb), *bits).numpy()


def planes(data: np.ndarray, h: int, w: int, bits: Bits) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bytes of an image of h x w pixels -> Y [h, w], Cb and Cr [ceil(h / 2), ceil(w / 2)], uint8.

    raises RuntimeError where `data` has not the length that size and bits say
    """
    y, cb, cr = _ops().block_planes(_tensor(data), h, w, *bits)
    return y.numpy(), cb.numpy(), cr.numpy()


def checksum(data: np.ndarray) -> int:
    """Of bytes [n] uint8: 64 bits as a signed number, for an int64 column."""
    return _ops().block_checksum(_tensor(data))


def views(
    files: Sequence[Tensor], rows: Tensor, bits: Bits, shift: Sequence[float], scale: Sequence[float], out: Tensor
) -> Tensor:
    """Makes views of images in blocks: decoded, cropped, resized, mirrored, normalised.

    files    the files that rows name, [bytes] uint8 each; mapped ones will do
    rows     [B, 13] int64, see VIEW_COLUMNS
    shift    of each colour: out = (level - shift) * scale in float32, then rounded to out's dtype
    scale    of each colour; neither is used where out is uint8
    out      [B, S, S, 3] uint8, float32 or bfloat16, contiguous: written
    returns  [B] uint8: 0 for a view that was made, 1 where the image's bytes have not the row's checksum; such a view
             is all zeros
    raises   RuntimeError for rows that do not fit: another length than size and bits say, bytes beyond the file's end,
             a crop that is not within its image. Nothing is written then.

    One thread, without the interpreter's lock; the same bits on every machine.
    """
    return _ops().block_views(list(files), rows, *bits, list(shift), list(scale), out)


def check_rows(files: Sequence[Tensor], rows: Tensor, bits: Bits, side: int) -> Tensor:
    """What `views` says of rows, without making the views: for those that `views_at` shall make.

    files, rows  as for `views`, on the CPU; side: of the views, S
    returns      [B] uint8: 1 where the image's bytes have not the row's checksum
    raises       RuntimeError for rows that do not fit
    """
    return _ops().block_check(list(files), rows, *bits, side)


def views_at(
    files: Tensor, rows: Tensor, bits: Bits, shift: Sequence[float], scale: Sequence[float], out: Tensor
) -> Tensor:
    """`views`, made by a GPU on its current stream, with the same bits. The host does not wait for it.

    files    [n, 2] int64: address and bytes of each file that rows name, in memory that the GPU can read: its own, or
             pinned memory of the host. It must stay there until the views are made.
    rows     [B, 13] int64, B up to 65,535; each image begins at an address divisible by 8
    out      [B, S, S, 3] uint8, float32, bfloat16 or float16, contiguous: written
    returns  [B] uint8: 1 for a row that does not fit, whose view is all zeros; checksums are not compared, see
             check_rows

    files, rows and out are on one GPU. All may change between replays of a CUDA graph that holds the call.
    """
    return _ops().block_views_at(files, rows, *bits, list(shift), list(scale), out)


STAGES = ("checksum", "weights", "decode", "pass along x", "pass along y", "colours", "stores")
LANES = (8, 16, 32)


def view_stages(
    files: Sequence[Tensor], rows: Tensor, bits: Bits, shift: Sequence[float], scale: Sequence[float], out: Tensor,
    lanes: int = max(LANES), clock: bool = True,
) -> dict[str, int]:  # fmt: skip
    """`views`, and what each of STAGES took, in units of the processor's clock. For benchmarks and tests.

    lanes  of 16 bits in a vector, at most: 8 (SSE2), 16 (AVX2) or 32 (AVX-512); fewer where the processor has no more
    clock  otherwise it is not looked at, and all are 0
    """
    ticks = _ops().block_view_ticks(list(files), rows, *bits, list(shift), list(scale), out, lanes, clock)
    return dict(zip(STAGES, ticks.tolist(), strict=True))


def _ops() -> Any:
    """The compiled ops. torch comes with the first call: whoever only asks whether a folder holds packs needs none."""
    import torch

    from ijckd_fast.head import load_libraries

    load_libraries()
    return torch.ops.ijckd


def _tensor(array: np.ndarray) -> Tensor:
    """Without a copy where torch takes the array as it is: it warns of memory that must not be written to."""
    import torch

    dense = np.ascontiguousarray(array)
    return torch.from_numpy(dense if dense.flags.writeable else dense.copy())
