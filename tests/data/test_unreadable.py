"""Files that go bad after they were indexed: what stands in for them, what is left out, when it is too many."""

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from image_tree import DAMAGE, photo, write_split
from loading import AUGMENT, EXECUTORS

from ijckd_fast.data import (
    Augment,
    EvalPlan,
    TooManyUnreadable,
    TrainPlan,
    build_index,
    make_loader,
)
from ijckd_fast.errors import UserError

REPOSITORY = Path(__file__).parents[2]


ROT = {
    **DAMAGE,
    "gone": lambda path: path.unlink(),
    "became a folder": lambda path: (path.unlink(), path.mkdir()),
    "smaller image": lambda path: photo(30, 40).save(path),
    "larger image": lambda path: photo(96, 128).save(path),
    "turned image": lambda path: photo(64, 48).save(path),
}


WHOLE = Augment(image_size=24, eval_resize=28, scale=(1.0, 1.0))  # a crop that reaches every damage


def collected(plan, backend="pillow", **more):
    """Of every step the ids and the images; and what was said of bad files."""
    said = []
    with make_loader(backend, plan, stop=4, on_bad=lambda path, why: said.append((path, why)), **more) as loader:
        got = [(b.ids.tolist(), b.labels.tolist(), b.images.clone()) for b in loader]
    return got, said, loader


@pytest.mark.parametrize("backend", EXECUTORS)
@pytest.mark.parametrize("rot", ROT)
def test_another_image_of_its_class_stands_in_for_a_file_that_rots_in_training(own, backend, rot):
    plan = TrainPlan(own, WHOLE, 6, seed=0)
    before, _, _ = collected(plan, backend)
    bad = Path(own.absolute(17))
    ROT[rot](bad)
    got, said, loader = collected(TrainPlan(own, WHOLE, 6, seed=0), backend)
    ((path, why),) = said
    assert path == str(bad)
    assert loader.bad_files == said
    if rot.endswith("image"):
        assert "64x48 were indexed" in why
    same = np.flatnonzero(own.labels == own.labels[17]).tolist()
    stand_in = same[(same.index(17) + 1) % len(same)]
    for (ids, labels, images), (ids_before, labels_before, images_before) in zip(got, before, strict=True):
        assert labels == labels_before
        assert ids == [stand_in if i == 17 else i for i in ids_before]
        for i, x, y in zip(ids_before, images, images_before, strict=True):
            assert torch.equal(x, y) == (i != 17)
    assert sum(ids.count(17) for ids, _, _ in before) == 1  # or nothing was shown
    # whenever and with whatever else in flight it is found
    for more in ({"prefetch": 1}, {"prefetch": 4, "threads": 3}):
        again, _, _ = collected(TrainPlan(own, WHOLE, 6, seed=0), backend, **more)
        assert all(torch.equal(x, y) for (_, _, x), (_, _, y) in zip(got, again, strict=True))


@pytest.mark.parametrize("backend", EXECUTORS)
@pytest.mark.parametrize("rot", ROT)
def test_evaluation_leaves_a_file_that_rots_out(own, backend, rot):
    bad = Path(own.absolute(17))
    good = bad.read_bytes()
    plan = EvalPlan(own, WHOLE, 6)
    before, _, _ = collected(plan, backend)
    ROT[rot](bad)
    got, said, _ = collected(plan, backend)
    assert [path for path, _ in said] == [str(bad)]
    assert [i for ids, _, _ in got for i in ids] == [i for i in range(len(own)) if i != 17]
    for (ids, _, images), (ids_before, _, images_before) in zip(got, before, strict=True):
        kept = [ids_before.index(i) for i in ids]
        assert torch.equal(images, images_before[kept])
    _, again, _ = collected(plan, backend)  # reported once
    assert again == []
    if bad.is_dir():
        bad.rmdir()
    bad.write_bytes(good)
    got, _, _ = collected(EvalPlan(own, WHOLE, 6), backend)
    assert [i for ids, _, _ in got for i in ids] == list(range(len(own)))


@pytest.mark.parametrize("backend", EXECUTORS)
def test_the_stand_in_does_not_depend_on_what_is_found_first(own, backend):
    """Two neighbours of a class, and the one that would stand in for them: found in another order, the same batches."""
    same = np.flatnonzero(own.labels == own.labels[17]).tolist()
    bad = [same[k % len(same)] for k in range(same.index(17), same.index(17) + 3)]
    for i in bad:
        Path(own.absolute(i)).unlink()
    runs = [collected(TrainPlan(own, WHOLE, 6, seed=0), backend)[0]]
    known = TrainPlan(own, WHOLE, 6, seed=0)
    for i in reversed(bad):
        known.stand_ins.add(i, "known")
    got, said, _ = collected(known, backend)
    assert said == []
    for (ids, _, images), (ids_known, _, images_known) in zip(runs[0], got, strict=True):
        assert ids == ids_known
        assert not set(ids) & set(bad)
        assert torch.equal(images, images_known)


@pytest.mark.parametrize("backend", EXECUTORS)
def test_a_batch_of_which_nothing_can_be_read_is_no_batch_of_an_evaluation(own, backend):
    for i in range(6, 12):
        Path(own.absolute(i)).write_bytes(b"")
    got, said, _ = collected(EvalPlan(own, WHOLE, 6), backend)
    assert [ids for ids, _, _ in got] == [list(range(6)), list(range(12, 18)), list(range(18, 24))]
    assert len(said) == 6


@pytest.mark.parametrize("backend", EXECUTORS)
def test_too_many_unreadable_files_end_the_iteration(own, backend):
    for i in (3, 9, 14):
        Path(own.absolute(i)).unlink()
    for plan in (EvalPlan(own, WHOLE, 6), TrainPlan(own, WHOLE, 6, seed=0)):
        with pytest.raises(
            TooManyUnreadable, match=r"3 files of .* cannot be read any more, more than the 2 allowed; the last was"
        ):
            collected(plan, backend, bad_limit=2)
    assert len(collected(EvalPlan(own, WHOLE, 6), backend, bad_limit=3)[1]) == 3


def test_a_class_of_which_nothing_can_be_read_ends_training_and_not_an_evaluation(own):
    for i in np.flatnonzero(own.labels == own.labels[17]):
        Path(own.absolute(i)).unlink()
    with pytest.raises(
        TooManyUnreadable,
        match=r"no image of class .* can be read any more, the last one was .*the disk is still there",
    ):
        collected(TrainPlan(own, WHOLE, 6, seed=0), bad_limit=99)
    got, said, _ = collected(EvalPlan(own, WHOLE, 6), bad_limit=99)
    assert [i for ids, _, _ in got for i in ids] == np.flatnonzero(own.labels != own.labels[17]).tolist()
    assert len(said) == 12
    for path in own.paths:
        Path(own.root, path).unlink(missing_ok=True)
    with pytest.raises(TooManyUnreadable, match=r"no image in .* can be read any more"):
        collected(EvalPlan(own, WHOLE, 6), bad_limit=99)


def test_trouble_of_the_machine_is_no_file_s_fault(own, monkeypatch):
    def no_more_files(*_args, **_kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("ijckd_fast.data.load.pillow.Image.open", no_more_files)
    with pytest.raises(OSError, match="Too many open files"):
        collected(EvalPlan(own, WHOLE, 6))


def test_a_header_that_cannot_be_parsed_does_not_crash_dali(tmp_path):
    """Without the guard, all of 24 such processes died of SIGSEGV."""
    write_split(tmp_path, "train", {"cat": 31, "dog": 32}, size=(150, 200))
    for name in ("text", "truncated header"):
        photo(150, 200).save(tmp_path / "train" / "dog" / f"{name}.jpg")
    index = build_index(tmp_path, "train")
    assert len(index) == 65
    for name in ("text", "truncated header"):
        DAMAGE[name](tmp_path / "train" / "dog" / f"{name}.jpg")
    code = f"""
import numpy as np
from ijckd_fast.data import Augment, Index, Paths, TrainPlan, make_loader
from ijckd_fast.errors import UserError
paths = Paths.of({list(index.paths)!r})
sizes = np.tile(np.array([[200, 150]], np.int32), (65, 1))
index = Index({index.root!r}, "train", ("cat", "dog"), paths, np.zeros(65, np.int64), sizes, [], "")
named = 0
for seed in range(20):
    said = []
    plan = TrainPlan(index, Augment(image_size=32, eval_resize=32), 65, seed)
    with make_loader("dali", plan, stop=1, on_bad=lambda path, why: said.append(path)) as loader:
        (batch,) = loader
    named += len(said) == 2 and len(batch.ids) == 65 and all(".jpg" in path for path in said)
print("named", named)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "named 20" in done.stdout


@pytest.mark.parametrize("ids", [[17], [16, 17, 18]])
def test_what_dali_turns_out_not_to_decode_is_decoded_by_pillow(own, ids):
    """The index finds such files; here they slip in after it. Each is named once."""
    for i in ids:
        photo(48, 64, seed=i).save(own.absolute(i), format="GIF")
    with pytest.warns(UserWarning, match="decoded by Pillow") as warned:
        got, said, loader = collected(EvalPlan(own, AUGMENT, 6), "dali")
    told = [str(each.message) for each in warned]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = [batch.images.clone() for batch in loader]
    assert [text.split()[0] for text in told] == [own.absolute(i) for i in ids]
    assert all("from here on: DALI cannot (nvImageCodec failure: '#4')" in text for text in told)
    assert said == []
    assert [i for batch, _, _ in got for i in batch] == list(range(len(own)))
    assert all(torch.equal(x, y) for (_, _, x), y in zip(got, again, strict=True))
    want, _, _ = collected(EvalPlan(own, AUGMENT, 6), "pillow")
    std = torch.tensor(AUGMENT.std)[:, None, None]
    assert all(((x - y) * 255 * std).abs().max() < 1.1 for (_, _, x), (_, _, y) in zip(got, want, strict=True))


def test_what_is_blamed_is_what_fails(own):
    for damage, advice in (
        ("gone", "see whether the disk is still there"),
        ("text", "changed since they were indexed"),
    ):
        for i in (3, 9):
            ROT[damage](Path(own.absolute(i)))
        for backend in EXECUTORS:
            with pytest.raises(TooManyUnreadable) as error:
                collected(EvalPlan(own, WHOLE, 6), backend, bad_limit=1)
            assert str(error.value).endswith(advice) or str(error.value).endswith(
                f"{advice}: build the index again (ijckd-fast index {own.root})"
            )
            assert ("disk" in str(error.value)) == (damage == "gone")


def test_what_dali_says_where_no_file_is_to_blame(own, monkeypatch):
    monkeypatch.setattr("ijckd_fast.data.load.dali.DaliLoader._find_culprits", lambda *_: False)
    Path(own.absolute(2)).unlink()
    with pytest.raises(UserError) as error:
        collected(EvalPlan(own, WHOLE, 6), "dali")
    text = str(error.value)
    assert f"DALI cannot make a batch of images of {own.root}/train: " in text
    assert own.absolute(2) in text.split(". Each file")[0]  # in DALI's own last line
    assert "no longer valid" not in text
    assert text.endswith("try --data-backend pillow")


# --- files that are rewritten in place ---


def rewritten(path: Path, quality: int = 92) -> None:
    photo(48, 64, seed=77).save(path, quality=quality)


@pytest.mark.parametrize("backend", EXECUTORS)
def test_a_file_that_is_rewritten_in_place_is_named_once_and_used_as_it_is(own, backend):
    plan = EvalPlan(own, WHOLE, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before, _, _ = collected(plan, backend)
    path = Path(own.absolute(17))
    assert own.sizes[17].tolist() == [64, 48]
    rewritten(path)
    with make_loader(backend, EvalPlan(own, WHOLE, 6)) as loader, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            after = [(batch.ids.tolist(), batch.images.clone()) for batch in loader]
    (text,) = [str(warning.message) for warning in caught]
    size = path.stat().st_size
    assert text.startswith(f"{path} has changed since it was indexed (now {size:,} bytes, written ")
    assert text.endswith(f"run ijckd-fast index {own.root}, or start with --check-files, to have it looked at")
    assert loader.bad_files == []
    for (ids, _, x), (_, y) in zip(before, after, strict=False):
        for i, a, b in zip(ids, x, y, strict=True):
            assert torch.equal(a, b) == (i != 17)
    fresh = build_index(own.root, "train")  # as the message says
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collected(EvalPlan(fresh, WHOLE, 6), backend)


def test_of_many_that_are_rewritten_some_are_named(own):
    for i in range(len(own)):
        path = Path(own.absolute(i))
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        collected(EvalPlan(own, WHOLE, 6))
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 9
    assert sum("has changed since it was indexed (now" in text for text in texts) == 8
    assert "more files have changed" in texts[-1]
