"""The executor of block packs on a GPU has the bits of the CPU's, wherever the blocks lie. Skipped without a GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from image_tree import write_split
from loading import AUGMENT, batches

from ijckd_fast.data import EvalPlan, Index, TrainPlan, build_index
from ijckd_fast.data.load.gpu_blocks import GpuBlockLoader
from ijckd_fast.data.prepare import BlockPack, pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    root: Path = tmp_path_factory.mktemp("data")
    write_split(root / "files", "train", {"cat": 30, "dog": 30})
    write_split(root / "files", "val", {"cat": 2, "dog": 2})
    pack(root / "files", root / "pack", BlockPack(short=40, shard_gb=9000 / 2**30), workers=1)
    return build_index(root / "pack", "train", cache_dir=root / "index")


@pytest.mark.filterwarnings("ignore:the block pack .* must be pinned")  # where the system refuses
@pytest.mark.parametrize("blocks_on", ["pinned", "gpu", "copies"])
@pytest.mark.parametrize(
    ("dtype", "affine_rotate"),
    [(torch.float32, 0), (torch.bfloat16, 0), (torch.float32, 30)],
    ids=["float32", "bfloat16", "warps"],
)
def test_the_bits_of_the_cpu_without_a_wait(index, blocks_on, dtype, affine_rotate):
    """Many more batches than lie ahead, each of which the GPU still reads while the next are asked for.

    Warps are torch's own on either: the same but for rounding.
    """
    plan = TrainPlan(index, dataclasses.replace(AUGMENT, affine_rotate=affine_rotate), 8, seed=1)
    want = batches("blocks", plan, stop=40, dtype=dtype)
    got = []
    with GpuBlockLoader(plan, blocks_on=blocks_on, stop=40, dtype=dtype, device="cuda") as loader:
        got.append(next(iter(loader)).images.clone())  # sets up the rest, which may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in map(next, [loader] * 39):
                torch.cuda._sleep(1_000_000)
                got.append(batch.images.clone())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.cpu(), y.images, rtol=0, atol=1e-3 if affine_rotate else 0)


def test_evaluation_and_what_pinning_gave(index, record_property):
    plan = EvalPlan(index, AUGMENT, 7)
    with GpuBlockLoader(plan, device="cuda") as loader:
        got = [batch.images.cpu() for batch in loader]
        record_property("blocks_on", loader._store.on)
    assert all(torch.equal(x, y.images) for x, y in zip(got, batches("blocks", plan), strict=True))
