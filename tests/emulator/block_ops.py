"""Run by test_emulated_ops.py on emulated CUDA kernels: block_views_at, whose kernels block_cases.py holds to their
definition.
"""

import block_oracle as oracle
import numpy as np
import pytest
import torch

from ijckd_fast.data.blocks import VIEW_COLUMNS, Bits, blocks_length, views_at

BITS = Bits(3, 4)
SHIFT, SCALE = [123.675, 116.28, 103.53], [0.0171, 0.0175, 0.0174]
DTYPES = [torch.uint8, torch.float32, torch.bfloat16, torch.float16]


def image(h: int, w: int) -> torch.Tensor:
    """Its bytes: chroma has a multiple of 4 blocks, and so none between its end points and its indices."""
    values = np.random.default_rng(0).integers(0, 256, blocks_length(h, w, BITS), np.uint8)
    return torch.from_numpy(values).clone()  # at an address that torch chooses, a multiple of 8


def table(*rows: dict[str, int]) -> torch.Tensor:
    return torch.tensor([[row[name] for name in VIEW_COLUMNS] for row in rows])


def addresses(*files: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[file.data_ptr(), len(file)] for file in files])


def crop(data: torch.Tensor, h: int, w: int, **changed: int) -> dict[str, int]:
    row = dict.fromkeys(VIEW_COLUMNS, 0) | {"length": len(data), "height": h, "width": w}
    return row | {"top": 2, "left": 1, "crop_h": h - 3, "crop_w": w - 1, "flip": 1} | changed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_at_any_dtype_equals_reference(dtype):
    h, w, side = 24, 31, 17
    data, other = image(h, w), image(8, 8)
    rows = [crop(data, h, w, file=1), crop(data, h, w, file=1, flip=0, top=0)]
    out = torch.full((3, side, side, 3), 77, dtype=dtype)
    wrong = rows[0] | {"crop_h": h + 1}
    status = views_at(addresses(other, data), table(*rows, wrong), BITS, SHIFT, SCALE, out)
    assert status.tolist() == [0, 0, 1]
    for row, got in zip(rows, out, strict=False):
        levels = torch.from_numpy(oracle.view(data.numpy(), row, *BITS, side).copy())
        normalised = (levels.float() - torch.tensor(SHIFT)) * torch.tensor(SCALE)
        assert torch.equal(got, levels if dtype == torch.uint8 else normalised.to(dtype))
    assert not out[2].any()


def test_views_at_of_no_rows_and_any_layout_equals_reference():
    data = image(24, 31)
    row, out = crop(data, 24, 31), torch.zeros(2, 5, 5, 3)
    files = addresses(data)
    assert views_at(files, table(row)[:0], BITS, SHIFT, SCALE, out[:0]).tolist() == []
    views_at(files, table(row, row), BITS, SHIFT, SCALE, out)
    again, spread = torch.zeros_like(out), torch.zeros(2, 26, dtype=torch.int64)
    spread[:, ::2] = table(row, row)
    views_at(files.t().contiguous().t(), spread[:, ::2], BITS, SHIFT, SCALE, again)
    assert out.any()
    assert torch.equal(again, out)


def test_views_at_bad_values_are_refused():
    rows, out, files = torch.zeros(2, 13, dtype=torch.int64), torch.zeros(2, 8, 8, 3), torch.zeros(1, 2).long()
    many = torch.zeros(65536, 13, dtype=torch.int64), torch.zeros(65536, 1, 1, 3)
    for arguments, text in (
        ((files[0], rows, BITS, SHIFT, SCALE, out), r"files must be int64 \[files, 2\], addresses and bytes, got"),
        ((files.int(), rows, BITS, SHIFT, SCALE, out), r"files must be int64 \[files, 2\].*got int32"),
        ((files, rows.int(), BITS, SHIFT, SCALE, out), r"rows must be int64 \[B, 13\], got int32 \[2, 13\]"),
        ((files, rows, Bits(3, 5), SHIFT, SCALE, out), "luma_bits and chroma_bits must be 3 or 4, got 3 and 5"),
        ((files, rows, BITS, SHIFT[:2], SCALE, out), "shift and scale must be 3 numbers each, got 2 and 3"),
        ((files, rows, BITS, SHIFT, [1, 2, float("inf")], out), "shift and scale must be finite"),
        ((files, rows, BITS, SHIFT, SCALE, out.double()), "out must be uint8, float32, bfloat16 or float16, got"),
        ((files, rows, BITS, SHIFT, SCALE, out[:1]), r"out must be \[B, S, S, 3\] with B = 2"),
        ((files, rows, BITS, SHIFT, SCALE, out.transpose(1, 2)), "out must be contiguous"),
        ((files, many[0], BITS, SHIFT, SCALE, many[1]), "at most 65535 views can be made at a time, got 65536"),
    ):
        with pytest.raises(RuntimeError, match="block_views_at: .*" + text):
            views_at(*arguments)
