"""The executor of block packs: its pixels, and files that go bad under it."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from image_tree import write_odd_tree
from loading import AUGMENT, batches, identical, pixels

from ijckd_fast.data import Augment, EvalPlan, Index, TooManyUnreadable, TrainPlan, build_index, make_loader
from ijckd_fast.data.blocks import views
from ijckd_fast.data.load.blocks import Mapped, normalised, view_rows
from ijckd_fast.data.prepare import BlockPack
from ijckd_fast.errors import UserError

SMALL = BlockPack(short=40, shard_gb=9000 / 2**30, bits=7.5)
PADDED = Augment(image_size=24, eval_resize=28, crop_padding=5)
TINY_CROPS = Augment(image_size=24, eval_resize=28, scale=(0.001, 0.05))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """26 training images, of odd sizes some of them, in several files once they are packed."""
    return write_odd_tree(tmp_path_factory.mktemp("data"), 11)


@pytest.fixture
def index(out) -> Index:
    return build_index(out, "train")


@pytest.mark.parametrize("augment", [AUGMENT, PADDED, TINY_CROPS], ids=["usual", "padded", "tiny crops"])
def test_pixels_are_pillows_within_a_level(index, augment):
    for plan, stop in ((TrainPlan(index, augment, 8, seed=1), 16), (EvalPlan(index, augment, 8), None)):
        for ours, pillows in zip(batches("blocks", plan, stop=stop), batches("pillow", plan, stop=stop), strict=True):
            assert torch.equal(ours.ids, pillows.ids)
            apart = np.abs(np.rint(pixels(ours.images)) - np.rint(pixels(pillows.images)))
            assert apart.max() <= 1
            assert apart.mean() < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_levels_that_are_normalised_elsewhere_have_the_same_bits(index, dtype):
    plan = TrainPlan(index, AUGMENT, 8, seed=1)
    (batch,) = batches("blocks", plan, stop=1, dtype=dtype)
    rows = view_rows(index, plan.batch(0))
    levels = torch.empty(8, 24, 24, 3, dtype=torch.uint8)
    files = [torch.from_numpy(np.fromfile(os.path.join(index.root, path), np.uint8)) for path in index.shards]
    shift = [np.float32(255) * np.float32(value) for value in AUGMENT.mean]
    scale = [1 / (np.float32(255) * np.float32(value)) for value in AUGMENT.std]
    assert not views(files, torch.from_numpy(rows), index.blocks, shift, scale, levels).any()
    assert torch.equal(normalised(levels, shift, scale).to(dtype).permute(0, 3, 1, 2), batch.images)


def test_memory_is_used_again_but_never_while_a_batch_lives(index):
    plan = TrainPlan(index, AUGMENT, 8, seed=1)
    seen, kept = [], []
    with make_loader("blocks", plan, stop=60, prefetch=1) as loader:
        for step, batch in enumerate(loader):
            seen.append(batch.images.data_ptr())
            if step % 10 == 0:
                kept.append((step, batch.images[0, 0], batch.images[0, 0].clone()))  # a part is enough
    assert len(set(seen)) <= 2 + 3 + len(kept)
    assert all(torch.equal(part, copy) for _, part, copy in kept)


def test_other_images_and_other_types_are_refused(data, index):
    with pytest.raises(UserError, match=r"reads block packs, but .*/train holds image files; leave --data-backend out"):
        make_loader("blocks", EvalPlan(build_index(data, "train"), AUGMENT, 8))
    with pytest.raises(UserError, match=r"makes float32 or bfloat16, found torch\.float16"):
        make_loader("blocks", EvalPlan(index, AUGMENT, 8), dtype=torch.float16)
    assert identical(batches("auto", EvalPlan(index, AUGMENT, 8)), batches("blocks", EvalPlan(index, AUGMENT, 8)))


# --- files that go bad after they were indexed ------------------------------------------------------------------------


def _flipped(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset + 9] ^= 4
    path.write_bytes(content)


def _cut(path: Path, offset: int) -> None:
    os.truncate(path, offset + 9)


DAMAGE: dict[str, Callable[[Path, int], None]] = {
    "altered": _flipped,
    "cut": _cut,
    "gone": lambda path, offset: path.unlink(),
    "empty": lambda path, offset: os.truncate(path, 0),
    "a folder": lambda path, offset: (path.unlink(), path.mkdir()),
    "of other images": lambda path, offset: path.write_bytes(bytes(path.stat().st_size)),
}


def shown(backend: str, index: Index, **settings):
    """Of 8 steps ids, labels and pixels; and what was said of bad images."""
    said: list[tuple[str, str]] = []
    plan = TrainPlan(index, AUGMENT, 6, seed=0)
    with make_loader(
        backend, plan, stop=8, bad_limit=20, on_bad=lambda path, why: said.append((path, why)), **settings
    ) as loader:
        got = [(batch.ids.tolist(), batch.labels.tolist(), pixels(batch.images)) for batch in loader]
    return got, said


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_stood_in_for_as_pillow_does(index, damage):
    """The same images stand in, the same is said; and nothing of it depends on threads or batches ahead."""
    last = int(np.flatnonzero(index.members[:, 0] == 1)[-1])  # of the second file
    shard, offset = index.members[last, :2].tolist()
    assert len(index.shards) > 2
    DAMAGE[damage](Path(index.root) / index.shards[shard], offset)
    ours, said = shown("blocks", index)
    theirs, said_by_pillow = shown("pillow", index)
    assert sorted(said) == sorted(said_by_pillow)
    assert len(said) >= 1
    assert all(index.shards[shard] in path for path, _ in said)
    for (ids, labels, images), (their_ids, their_labels, their_images) in zip(ours, theirs, strict=True):
        assert (ids, labels) == (their_ids, their_labels)
        assert np.abs(np.rint(images) - np.rint(their_images)).max() <= 1
    for more in ({"prefetch": 1, "threads": 1}, {"prefetch": 4, "threads": 3}):
        again, _ = shown("blocks", index, **more)
        assert all(np.array_equal(x[2], y[2]) for x, y in zip(ours, again, strict=True))


def map_all(loader, index: Index) -> None:
    assert all(loader._files.get(shard) is not None for shard in range(len(index.shards)))


def test_a_file_that_is_cut_while_it_is_mapped(index):
    """The images behind the cut are left out by name; to read them would end the process."""
    plan, said = EvalPlan(index, AUGMENT, 2), []
    shard = len(index.shards) - 1
    rows = np.flatnonzero(index.members[:, 0] == shard)
    with make_loader(
        "blocks", plan, prefetch=1, threads=1, bad_limit=20, on_bad=lambda path, why: said.append((path, why))
    ) as loader:
        map_all(loader, index)
        os.truncate(Path(index.root) / index.shards[shard], 64)
        ids = [i for batch in loader for i in batch.ids.tolist()]
    assert not set(ids) & set(rows.tolist())
    assert len(said) == len(rows)
    assert all("ends at byte 64, before the image at bytes" in why for _, why in said)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_what_the_machine_lacks_is_not_the_files_fault(index, monkeypatch, number):
    def refused(path: str) -> None:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(Mapped, "of", refused)
    with pytest.raises(OSError, match=os.strerror(number)):
        batches("blocks", EvalPlan(index, AUGMENT, 8))


def test_evaluation_leaves_a_bad_image_out_and_too_many_are_an_error(index):
    shard, offset = index.members[5, :2].tolist()
    _flipped(Path(index.root) / index.shards[shard], offset)
    with pytest.warns(UserWarning, match="has the checksum"):
        ids = torch.cat([batch.ids for batch in batches("blocks", EvalPlan(index, AUGMENT, 8))]).tolist()
    assert ids == [i for i in range(len(index)) if i != 5]
    with pytest.raises(TooManyUnreadable, match=r"1 file of .* more than the 0 allowed"):
        batches("blocks", EvalPlan(index, AUGMENT, 8), bad_limit=0, on_bad=lambda path, why: None)


def test_a_file_that_is_replaced_is_read_as_it_was(index):
    """Under its name lies another file now; what is mapped is the old one."""
    plan = EvalPlan(index, AUGMENT, 8)
    want = batches("blocks", plan)
    with make_loader("blocks", plan, prefetch=1) as loader:
        map_all(loader, index)
        for shard in index.shards:
            other = Path(index.root) / "other"
            other.write_bytes(bytes(4096))
            other.rename(Path(index.root) / shard)
        assert identical(list(loader), want)
