"""Every executor: the same bits whatever the settings, what comes out, what is refused."""

import dataclasses
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import AUGMENT, EXECUTORS, batches, identical, pixels

from ijckd_fast.data import (
    Augment,
    Batch,
    EvalPlan,
    Loader,
    Mixing,
    TrainPlan,
    make_loader,
)
from ijckd_fast.data.load import mixed, warped
from ijckd_fast.errors import UserError

PADDED = Augment(image_size=24, eval_resize=28, crop_padding=5)
WARPED = Augment(image_size=24, eval_resize=28, affine_rotate=20, affine_scale=0.2, affine_shear=15, affine_shift=0.1)
REPOSITORY = Path(__file__).parents[2]
ALL = [*EXECUTORS, "blocks"]


@pytest.fixture
def indexed(request, indexed):
    """The 60 images, in blocks for the executor that reads them."""
    of_blocks = getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") == "blocks"
    return request.getfixturevalue("packed") if of_blocks else indexed


# --- the same bits whatever the settings ------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [AUGMENT, PADDED, WARPED], ids=["resized crops", "padded crops", "warps"])
@pytest.mark.parametrize("backend", ALL)
def test_batches_do_not_depend_on_threads_prefetch_or_start(indexed, backend, augment):
    plan = TrainPlan(indexed, augment, 8, seed=3)  # 7 steps per epoch: 16 steps cross two borders
    first = batches(backend, plan, threads=1, prefetch=1, stop=16)
    assert [len(batch.ids) for batch in first] == [8] * 16
    assert not torch.equal(first[0].images, first[7].images)
    for threads, prefetch in ((1, 4), (2, 1), (2, 4)):
        assert identical(batches(backend, plan, threads=threads, prefetch=prefetch, stop=16), first)
    for start in (5, 7, 15):
        fresh = TrainPlan(indexed, augment, 8, seed=3)
        assert identical(batches(backend, fresh, start=start, stop=16), first[start:])


@pytest.mark.parametrize("backend", ALL)
def test_evaluation_batches_do_not_depend_on_threads_or_prefetch(indexed, backend):
    plan = EvalPlan(indexed, AUGMENT, 8)
    first = batches(backend, plan, threads=1, prefetch=1)
    assert [len(batch.ids) for batch in first] == [8] * 7 + [4]
    assert torch.cat([batch.ids for batch in first]).tolist() == list(range(60))
    assert identical(batches(backend, plan, threads=2, prefetch=4), first)
    assert identical(batches(backend, plan, start=3), first[3:])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(("world", "augment"), [(2, AUGMENT), (3, WARPED)], ids=["2", "3-warps"])
def test_ranks_together_make_the_single_process_batch(indexed, backend, world, augment):
    alone = batches(backend, TrainPlan(indexed, augment, 4 * world, seed=3), stop=8)
    ranks = [batches(backend, TrainPlan(indexed, augment, 4, 3, rank, world), stop=8) for rank in range(world)]
    union = [
        Batch(*(torch.cat(parts) for parts in list(zip(*step, strict=True))[:3])) for step in zip(*ranks, strict=True)
    ]
    assert identical(union, alone)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_ranks_see_every_image_once_with_the_same_pixels(indexed, backend, world):
    alone = torch.cat([batch.images for batch in batches(backend, EvalPlan(indexed, AUGMENT, 60))])
    seen = []
    for rank in range(world):
        for batch in batches(backend, EvalPlan(indexed, AUGMENT, 7, rank, world)):
            assert torch.equal(batch.images, alone[batch.ids])
            assert torch.equal(batch.labels, torch.from_numpy(indexed.labels)[batch.ids])
            seen += batch.ids.tolist()
    assert sorted(seen) == list(range(60))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(("batch_size", "augment"), [(3, AUGMENT), (6, AUGMENT), (6, PADDED)])
def test_from_an_epoch_on_with_two_processes_instead_of_one(indexed, backend, batch_size, augment):
    """Whether the global batch stays (3 each) or doubles (6 each), the epoch has the same images, crops and flips."""

    def epoch(world: int, batch_size: int, number: int):
        """Of each image seen: what its pixels are made of, and the pixels."""
        seen = []
        for rank in range(world):
            plan = TrainPlan(indexed, augment, batch_size, 3, rank, world)
            steps = range(number * plan.steps_per_epoch, (number + 1) * plan.steps_per_epoch)
            for k, batch in zip(steps, batches(backend, plan, start=steps[0], stop=steps[-1] + 1), strict=True):
                made_of = plan.batch(k)
                assert made_of.ids.tolist() == batch.ids.tolist()
                for i, image in enumerate(batch.images):
                    crop = (*made_of.anchor[i].tolist(), *made_of.shape[i].tolist())
                    seen.append((int(made_of.ids[i]), crop, int(made_of.flip[i]), image.numpy().tobytes()))
        return sorted(seen)

    alone = [epoch(1, 6, number) for number in (0, 1, 2)]
    assert all([row[0] for row in rows] == list(range(60)) for rows in alone)
    assert alone[0] != alone[1] != alone[2]
    for number in (1, 2):
        assert epoch(2, batch_size, number) == alone[number]


# --- warps, mixing, views, sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*ALL, "synthetic"])
def test_warped_batches_are_the_plain_ones_warped(indexed, backend):
    """To the bit, so that executors are apart by what they are apart without; before they are mixed."""
    plain = TrainPlan(indexed, AUGMENT, 8, seed=5)
    plan = TrainPlan(indexed, WARPED, 8, seed=5)
    got = batches(backend, plan, stop=7)
    for k, (a, b) in enumerate(zip(batches(backend, plain, stop=7), got, strict=True)):
        want = warped(a.images, plan.batch(k).affine, WARPED)
        assert torch.equal(b.images, want)
        assert (a.images - b.images).abs().mean() > 0.1
        assert b.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(a.ids, b.ids)
    for half, whole in zip(batches(backend, plan, stop=7, dtype=torch.bfloat16), got, strict=True):
        assert torch.equal(half.images, whole.images.bfloat16())  # rounded once
    (contiguous,) = batches(backend, plan, stop=1, channels_last=False)
    assert torch.equal(contiguous.images, got[0].images)
    assert contiguous.images.is_contiguous()
    mixing = TrainPlan(indexed, dataclasses.replace(WARPED, mixup=0.2, cutmix=1.0), 8, seed=5)
    (both,) = batches(backend, mixing, stop=1)
    assert torch.equal(both.images, mixed(got[0], mixing.batch(0).mixing).images)
    assert identical(*(batches(backend, EvalPlan(indexed, each.augment, 8)) for each in (plan, plain)))


@pytest.mark.parametrize("backend", ["dali", "blocks"])
def test_warps_by_another_executor_are_pillows(indexed, backend):
    """No farther apart than the squares are that are warped."""
    plain = TrainPlan(indexed, AUGMENT, 8, seed=5)
    plan = TrainPlan(indexed, dataclasses.replace(WARPED, affine_fill=255), 8, seed=5)
    made = [batches(name, each, stop=7) for each in (plain, plan) for name in (backend, "pillow")]
    for before, before_by_pillow, ours, pillows in zip(*made, strict=True):
        apart = abs(pixels(ours.images) - pixels(pillows.images))
        assert apart.mean() < 0.5
        assert apart.max() < abs(pixels(before.images) - pixels(before_by_pillow.images)).max() + 1e-3
        assert (pixels(ours.images) > 254.9).mean() > 0.05  # what is outside of the squares


def test_mixed_images_are_what_the_plan_says():
    g = torch.Generator().manual_seed(0)
    images, labels = torch.randn(5, 3, 8, 8, generator=g), torch.tensor([3, 1, 4, 1, 5])
    mixing = Mixing(
        partner=np.array([1, 0, 3, 2, 4]),
        blend=np.array([0.7, 0.7, 1, 1, 1], np.float32),
        box=np.array([[0, 0, 0, 0], [0, 0, 0, 0], [2, 3, 6, 8], [2, 3, 6, 8], [0, 0, 0, 0]], np.int32),
        share=np.array([0.7, 0.7, 0.6875, 0.6875, 1], np.float32),
    )
    got = mixed(Batch(images.contiguous(memory_format=torch.channels_last), labels, torch.arange(5)), mixing)
    want = images.clone()
    want[0], want[1] = 0.7 * images[0] + 0.3 * images[1], 0.7 * images[1] + 0.3 * images[0]
    want[2, :, 2:6, 3:8], want[3, :, 2:6, 3:8] = images[3, :, 2:6, 3:8], images[2, :, 2:6, 3:8]
    torch.testing.assert_close(got.images, want, rtol=1e-6, atol=1e-6)
    assert torch.equal(got.images[2:], want[2:])  # where nothing is blended, to the bit
    assert got.images.is_contiguous(memory_format=torch.channels_last)
    assert got.labels.tolist() == [3, 1, 4, 1, 5]
    assert got.labels_b.tolist() == [1, 3, 1, 4, 5]
    torch.testing.assert_close(got.mix, torch.tensor([0.7, 0.7, 0.6875, 0.6875, 1]))


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("backend", [*ALL, "synthetic"])
def test_mixed_batches_are_the_plain_ones_mixed(indexed, backend, padding):
    settings = {"image_size": 24, "eval_resize": 28, "crop_padding": padding}
    plain = TrainPlan(indexed, Augment(**settings), 8, seed=5)
    plan = TrainPlan(indexed, Augment(**settings, mixup=0.2, cutmix=1.0), 8, seed=5)
    for k, (a, b) in enumerate(zip(batches(backend, plain, stop=7), batches(backend, plan, stop=7), strict=True)):
        want = mixed(a, plan.batch(k).mixing)
        assert all(torch.equal(x, y) for x, y in zip(b, want, strict=True))
        assert b.mix.dtype == torch.float32
        assert not torch.equal(a.images, b.images)
    evaluated = batches(backend, EvalPlan(indexed, plan.augment, 8))
    assert all(batch.labels_b is None and batch.mix is None for batch in evaluated)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("backend", [*ALL, "synthetic"])
def test_images_grow_with_the_epochs(indexed, backend, padding):
    augment = Augment(image_size=24, eval_resize=28, sizes=((0, 16), (1, 20), (3, 32)), crop_padding=padding)
    plan = TrainPlan(indexed, augment, 20, seed=0)  # 3 steps an epoch
    got = batches(backend, plan, stop=12)
    assert [batch.images.shape[-1] for batch in got] == [16] * 3 + [20] * 6 + [32] * 3
    (evaluated,) = batches(backend, EvalPlan(indexed, augment, 60))
    assert evaluated.images.shape == (60, 3, 24, 24)
    (alone,) = batches(backend, plan, start=7, stop=8)  # from the middle on
    assert torch.equal(alone.images, got[7].images)
    if backend in ("dali", "blocks"):
        with make_loader("pillow", plan, start=9, stop=10) as loader:
            assert abs(pixels(next(loader).images) - pixels(got[9].images)).mean() < 0.5


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*ALL, "synthetic"])
def test_batch_layout(indexed, backend):
    for plan in (TrainPlan(indexed, AUGMENT, 8, seed=0), EvalPlan(indexed, AUGMENT, 8)):
        with make_loader(backend, plan) as loader:
            batch = next(loader)
        assert batch.images.shape == (8, 3, 24, 24)
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert not batch.images.is_contiguous()
        assert (batch.labels.dtype, batch.labels.shape) == (torch.int64, (8,))
        assert (batch.ids.dtype, batch.ids.shape) == (torch.int64, (8,))
        assert type(batch.images) is torch.Tensor
        assert torch.equal(batch.labels, torch.from_numpy(indexed.labels)[batch.ids])
        with make_loader(backend, plan, dtype=torch.bfloat16) as loader:
            half = next(loader).images
        assert half.dtype == torch.bfloat16
        assert half.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(half, batch.images.bfloat16())


@pytest.mark.parametrize("backend", ALL)
def test_batches_stay_valid_after_later_ones_and_after_close(indexed, backend):
    plan = TrainPlan(indexed, AUGMENT, 8, seed=0)
    with make_loader(backend, plan, prefetch=1, stop=30) as loader:
        kept, copies = [], []
        for batch in loader:
            kept.append(batch)
            copies.append(Batch(*(tensor.clone() for tensor in batch[:3])))
            batch.images.mul_(1)  # may be written to
    gc.collect()
    batches(backend, plan, stop=30)  # whatever was freed is used again
    assert identical(kept, copies)


@pytest.mark.parametrize("backend", ["dali", "blocks"])
def test_writing_into_a_batch_does_not_reach_another(indexed, backend):
    plan = TrainPlan(indexed, AUGMENT, 8, seed=0)
    clean = batches(backend, plan, stop=10)
    with make_loader(backend, plan, stop=10, prefetch=1) as loader:
        for batch, want in zip(loader, clean, strict=True):
            assert torch.equal(batch.images, want.images)
            batch.images.zero_()


@pytest.mark.parametrize("backend", [*ALL, "synthetic"])
def test_each_iteration_begins_at_the_start(indexed, backend):
    with make_loader(backend, EvalPlan(indexed, AUGMENT, 8)) as loader:
        assert len(loader) == 8
        whole = list(loader)
        assert identical(list(loader), whole)
        for batch in loader:  # left half-way
            if batch.ids[0] >= 16:
                break
        assert identical(list(loader), whole)
        with pytest.raises(StopIteration):
            next(loader)
        loader.close()
        assert identical([next(loader)], whole[:1])
        loader.close()
        loader.close()


def test_training_has_no_end_and_stop_may_lie_before_the_start(indexed):
    plan = TrainPlan(indexed, AUGMENT, 8, seed=0)
    loader = make_loader("synthetic", plan)
    with pytest.raises(TypeError, match="no end"):
        len(loader)
    ids = [batch.ids.tolist() for batch, _ in zip(loader, range(20), strict=False)]
    assert ids == [plan.batch(step).ids.tolist() for step in range(20)]
    assert batches("dali", plan, start=3, stop=3) == []
    assert len(make_loader("dali", plan, start=5, stop=3)) == 0


@pytest.mark.parametrize("backend", ALL)
def test_close_ends_its_threads(indexed, backend):
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    batches(backend, EvalPlan(indexed, AUGMENT, 8))  # what a library starts once for all is started now
    before = threads()
    loader = make_loader(backend, TrainPlan(indexed, AUGMENT, 8, seed=0), threads=5)
    next(loader)
    assert threads() > before
    loader.close()
    deadline = time.monotonic() + 10  # a thread's entry outlives it by a moment
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() <= before


def test_synthetic_opens_no_file(own):
    plan = EvalPlan(own, AUGMENT, 10)
    for path in own.paths:
        (Path(own.root) / path).unlink()
    result = batches("synthetic", plan)
    assert [len(batch.images) for batch in result] == [10, 10, 4]
    assert torch.cat([batch.labels for batch in result]).tolist() == own.labels.tolist()
    assert 0.9 < result[0].images.std() < 1.1


# --- choosing an executor ---------------------------------------------------------------------------------------------


def test_unknown_backend(indexed):
    with pytest.raises(
        UserError, match="one of auto, dali, blocks, pillow, synthetic, found 'dalli'; did you mean 'dali'"
    ):
        make_loader("dalli", EvalPlan(indexed, AUGMENT, 8))


def test_missing_dali_is_an_error_not_a_fallback(indexed, monkeypatch):
    monkeypatch.delitem(sys.modules, "ijckd_fast.data.load.dali", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"pip install 'ijckd-fast\[cu13\]', or choose --data-backend pillow"):
        make_loader("dali", EvalPlan(indexed, AUGMENT, 8))


def test_dali_is_loaded_only_when_used_and_without_noise(own):
    code = f"""
import sys
from ijckd_fast.data import Augment, EvalPlan, build_index, make_loader
assert "nvidia.dali" not in sys.modules
plan = EvalPlan(build_index({own.root!r}, "train"), Augment(image_size=24, eval_resize=28), 8)
list(make_loader("pillow", plan))
assert "nvidia.dali" not in sys.modules
assert len(list(make_loader("dali", plan))) == 3
assert "nvidia.dali" in sys.modules
loader = make_loader("dali", plan)
next(loader)  # left open: the interpreter must end all the same
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("setting", [{"threads": 0}, {"prefetch": 0}, {"start": -1}], ids=str)
@pytest.mark.parametrize("backend", [*ALL, "synthetic"])
def test_impossible_settings_are_refused(indexed, backend, setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        make_loader(backend, EvalPlan(indexed, AUGMENT, 8), **setting)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"decode": "hybrid"}, "decode 'hybrid' needs a GPU to deliver to, found device 'cpu'"),
        ({"decode": "gpu"}, "needs a GPU"),
        ({"hw_decoder_load": 1.5}, "a share of the images between 0 and 1, found 1.5"),
    ],
)
def test_impossible_settings_of_dali_are_refused(indexed, setting, text):
    with pytest.raises(UserError, match=text):
        make_loader("dali", EvalPlan(indexed, AUGMENT, 8), **setting)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("plan", ["train", "padded", "evaluation"])
@pytest.mark.parametrize(("decode", "levels"), [("cpu", 0.0), ("hybrid", 0.5), ("gpu", 3.0)])
def test_a_gpu_gets_the_same_images(indexed, plan, decode, levels):
    """levels: mean difference in grey levels. A GPU's resize rounds otherwise, its decoder has another inverse DCT."""
    plan = {
        "train": TrainPlan(indexed, AUGMENT, 8, 1),
        "padded": TrainPlan(indexed, PADDED, 8, 1),
        "evaluation": EvalPlan(indexed, AUGMENT, 8),
    }[plan]
    for dtype in (torch.float32, torch.bfloat16):
        on_gpu = batches("dali", plan, stop=5, device="cuda", decode=decode, dtype=dtype)
        for ours, cpu in zip(on_gpu, batches("dali", plan, stop=5, dtype=dtype), strict=True):
            assert ours.images.is_cuda
            assert ours.images.dtype == dtype
            assert ours.images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(ours.labels.cpu(), cpu.labels)
            assert torch.equal(ours.ids.cpu(), cpu.ids)
            rounding = 0.5 if dtype == torch.bfloat16 and decode != "cpu" else 0.0
            assert np.abs(pixels(ours.images.cpu()) - pixels(cpu.images)).mean() <= levels + rounding


@pytest.mark.parametrize("backend", [*ALL, "synthetic"])
def test_every_loader_is_a_loader(indexed, backend):
    assert isinstance(make_loader(backend, EvalPlan(indexed, AUGMENT, 8)), Loader)
