"""Views of blocks made by a GPU have the bits of the CPU's, from the GPU's memory and from the host's. Skipped where
there is no GPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulator.block_cases import COLUMNS, crop, cut, image_of, wrong_rows
from torch import Tensor

from ijckd_fast.data.blocks import Bits, check_rows, checksum, views, views_at

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHIFT, SCALE = [123.675, 116.28, 103.53], [0.0171, 0.0175, -0.0174]
DTYPES = [torch.uint8, torch.float32, torch.bfloat16, torch.float16]
# (h, w), side, bits: enlarged, reduced, of few taps and of many, odd sides, extreme ratios
IMAGES = [
    ((1, 1), 1, Bits(3, 3)),
    ((1, 1), 224, Bits(4, 4)),
    ((19, 13), 7, Bits(3, 4)),
    ((256, 344), 224, Bits(3, 3)),
    ((344, 256), 225, Bits(4, 3)),
    ((1, 5000), 65, Bits(4, 4)),
    ((901, 64), 33, Bits(3, 3)),
]


def rows_of(h: int, w: int, side: int, seed: int = 0) -> list[dict[str, int]]:
    """All of the image, one pixel, a row, a column, random crops; the image resized, and cut inside and outside."""
    g = np.random.default_rng(seed)
    places = [(0, 0, h, w), (h - 1, w - 1, 1, 1), (h // 2, 0, 1, w), (0, w // 2, h, 1)]
    for _ in range(8):
        ch, cw = int(g.integers(1, h + 1)), int(g.integers(1, w + 1))
        places.append((int(g.integers(0, h - ch + 1)), int(g.integers(0, w - cw + 1)), ch, cw))
    found = [crop(h, w, place, int(g.integers(2))) for place in places]
    for tall, broad in ((side, 2 * side), (side + 5, side + 3), (max(1, side // 3), max(1, side // 2))):
        for top, left in ((0, 0), ((tall - side) // 2, (broad - side) // 2), (-3, broad - 2), (-side, 0)):
            found.append(cut(h, w, side, (tall, broad), (top, left), int(g.integers(2))))
    return found


class Case:
    """rows  [B, 13] on the CPU; files, pinned or not, and the table of their addresses on the GPU"""

    def __init__(self, image: tuple[tuple[int, int], int, Bits], where: str, seed: int = 0) -> None:
        (h, w), self.side, self.bits = image
        data = torch.from_numpy(image_of(h, w, self.bits))
        content = torch.cat([torch.zeros(64, dtype=torch.uint8), data])
        self.host = [torch.zeros(8, dtype=torch.uint8), content]
        self.files = [file.cuda() if where == "gpu" else file.pin_memory() for file in self.host]
        self.table = torch.tensor([[file.data_ptr(), len(file)] for file in self.files]).cuda()
        rows = [row | {"file": 1, "offset": 64, "length": len(data)} for row in rows_of(h, w, self.side, seed)]
        self.rows = torch.tensor([[row[name] for name in COLUMNS] for row in rows])
        self.rows[:, 3] = checksum(data.numpy())

    def out(self, dtype: torch.dtype, device: str) -> Tensor:
        return torch.full((len(self.rows), self.side, self.side, 3), 77, dtype=dtype, device=device)

    def expected(self, dtype: torch.dtype) -> Tensor:
        """The CPU's; float16 as its float32 is rounded to it."""
        assert not check_rows(self.host, self.rows, self.bits, self.side).any()
        out = self.out(torch.float32 if dtype == torch.float16 else dtype, "cpu")
        assert not views(self.host, self.rows, self.bits, SHIFT, SCALE, out).any()
        return out.to(dtype)

    def made(self, dtype: torch.dtype) -> Tensor:
        out = self.out(dtype, "cuda")
        status = views_at(self.table, self.rows.cuda(), self.bits, SHIFT, SCALE, out)
        assert not status.any()
        return out


@pytest.mark.parametrize("where", ["gpu", "pinned"])
@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_the_bits_of_the_cpu(image, where):
    case = Case(image, where)
    for dtype in DTYPES:
        assert torch.equal(case.made(dtype).cpu(), case.expected(dtype)), dtype


def test_rows_that_do_not_fit_are_told_and_read_nothing():
    case = Case(((5, 5), 5, Bits(3, 3)), "gpu")
    row = dict(zip(COLUMNS, case.rows[0].tolist(), strict=True))
    # byte 16 would do in this file
    rows = [row | wrong for wrong in wrong_rows(5, 5, 5, case.bits) if wrong != {"offset": 16}]
    rows.insert(7, row)
    table = torch.tensor([[r[name] for name in COLUMNS] for r in rows]).cuda()
    out = torch.full((len(rows), 5, 5, 3), 77, dtype=torch.uint8, device="cuda")
    status = views_at(case.table, table, case.bits, SHIFT, SCALE, out)
    assert status.tolist() == [k != 7 for k in range(len(rows))]
    assert torch.equal(out[7].cpu(), case.expected(torch.uint8)[0])
    assert not torch.cat([out[:7], out[8:]]).any()


@pytest.mark.parametrize("where", ["gpu", "pinned"])
def test_on_the_current_stream_without_a_wait(where):
    case = Case(IMAGES[3], where)
    expected, rows = case.expected(torch.bfloat16), case.rows.cuda()
    out, stream = case.out(torch.bfloat16, "cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # the default stream would be done long before
            views_at(case.table, rows, case.bits, SHIFT, SCALE, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out.cpu(), expected)


def test_a_cuda_graph_is_replayed_with_other_rows_and_files():
    case, other = Case(IMAGES[3], "gpu"), Case(IMAGES[3], "pinned", seed=1)
    rows, table, out = case.rows.cuda(), case.table.clone(), case.out(torch.bfloat16, "cuda")
    views_at(table, rows, case.bits, SHIFT, SCALE, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        status = views_at(table, rows, case.bits, SHIFT, SCALE, out)
    for now in (other, case):
        rows.copy_(now.rows)
        table.copy_(now.table)
        out.fill_(7)
        graph.replay()
        assert not status.any()
        assert torch.equal(out.cpu(), now.expected(torch.bfloat16))
