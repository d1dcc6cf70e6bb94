import errno
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from image_tree import DAMAGE, photo, write_split
from PIL import Image
from torchvision.transforms import functional

from ijckd_fast.data import (
    Augment,
    Batch,
    EvalPlan,
    Index,
    Loader,
    Mixing,
    TooManyUnreadable,
    TrainPlan,
    build_index,
    make_loader,
)
from ijckd_fast.data.load.loader import mixed
from ijckd_fast.errors import UserError

AUGMENT = Augment(image_size=24, eval_resize=28)
PADDED = Augment(image_size=24, eval_resize=28, crop_padding=5)
REPOSITORY = Path(__file__).parents[2]
EXECUTORS = ["dali", "pillow"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Index:
    """60 images of four shapes in three classes; not to be changed."""
    root = tmp_path_factory.mktemp("data")
    write_split(root, "train", {"cat": 20, "dog": 20, "eel": 20})
    return build_index(root, "train")


@pytest.fixture
def own(tmp_path) -> Index:
    """24 images in two classes, to be changed."""
    write_split(tmp_path, "train", {"cat": 12, "dog": 12}, size=(48, 64))
    return build_index(tmp_path, "train")


def batches(backend: str, plan, **settings) -> list[Batch]:
    with make_loader(backend, plan, **settings) as loader:
        return list(loader)


def identical(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        (x is None and y is None) or torch.equal(x, y)
        for p, q in zip(a, b, strict=True)
        for x, y in zip(p, q, strict=True)
    )


def pixels(images: torch.Tensor) -> np.ndarray:
    """[B, S, S, 3] float64 in 0..255, the normalisation undone."""
    mean, std = (np.array(values) for values in (AUGMENT.mean, AUGMENT.std))
    return 255 * (images.permute(0, 2, 3, 1).double().numpy() * std + mean)


# --- the same bits whatever the settings ------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [AUGMENT, PADDED], ids=["resized crops", "padded crops"])
@pytest.mark.parametrize("backend", EXECUTORS)
def test_batches_do_not_depend_on_threads_prefetch_or_start(data, backend, augment):
    plan = TrainPlan(data, augment, 8, seed=3)  # 7 steps per epoch: 16 steps cross two borders
    first = batches(backend, plan, threads=1, prefetch=1, stop=16)
    assert [len(batch.ids) for batch in first] == [8] * 16
    assert not torch.equal(first[0].images, first[7].images)
    for threads, prefetch in ((1, 4), (2, 1), (2, 4)):
        assert identical(batches(backend, plan, threads=threads, prefetch=prefetch, stop=16), first)
    for start in (5, 7, 15):
        fresh = TrainPlan(data, augment, 8, seed=3)
        assert identical(batches(backend, fresh, start=start, stop=16), first[start:])


@pytest.mark.parametrize("backend", EXECUTORS)
def test_evaluation_batches_do_not_depend_on_threads_or_prefetch(data, backend):
    plan = EvalPlan(data, AUGMENT, 8)
    first = batches(backend, plan, threads=1, prefetch=1)
    assert [len(batch.ids) for batch in first] == [8] * 7 + [4]
    assert torch.cat([batch.ids for batch in first]).tolist() == list(range(60))
    assert identical(batches(backend, plan, threads=2, prefetch=4), first)
    assert identical(batches(backend, plan, start=3), first[3:])


@pytest.mark.parametrize("backend", EXECUTORS)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_make_the_single_process_batch(data, backend, world):
    alone = batches(backend, TrainPlan(data, AUGMENT, 4 * world, seed=3), stop=8)
    ranks = [batches(backend, TrainPlan(data, AUGMENT, 4, 3, rank, world), stop=8) for rank in range(world)]
    union = [
        Batch(*(torch.cat(parts) for parts in list(zip(*step, strict=True))[:3])) for step in zip(*ranks, strict=True)
    ]
    assert identical(union, alone)


@pytest.mark.parametrize("backend", EXECUTORS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_ranks_see_every_image_once_with_the_same_pixels(data, backend, world):
    alone = torch.cat([batch.images for batch in batches(backend, EvalPlan(data, AUGMENT, 60))])
    seen = []
    for rank in range(world):
        for batch in batches(backend, EvalPlan(data, AUGMENT, 7, rank, world)):
            assert torch.equal(batch.images, alone[batch.ids])
            assert torch.equal(batch.labels, torch.from_numpy(data.labels)[batch.ids])
            seen += batch.ids.tolist()
    assert sorted(seen) == list(range(60))


@pytest.mark.parametrize("backend", EXECUTORS)
@pytest.mark.parametrize(("batch_size", "augment"), [(3, AUGMENT), (6, AUGMENT), (6, PADDED)])
def test_from_an_epoch_on_with_two_processes_instead_of_one(data, backend, batch_size, augment):
    """Whether the global batch stays (3 each) or doubles (6 each), the epoch has the same images, crops and flips."""

    def epoch(world: int, batch_size: int, number: int):
        """Of each image seen: what its pixels are made of, and the pixels."""
        seen = []
        for rank in range(world):
            plan = TrainPlan(data, augment, batch_size, 3, rank, world)
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


# --- torchvision's pixels ---------------------------------------------------------------------------------------------


def test_pillow_evaluation_is_torchvisions(tmp_path):
    """Odd sizes, enlarged and shrunk, shorter side already right: equal to the last bit before normalising."""
    shapes = [(28, 28), (28, 77), (60, 28), (13, 20), (91, 37), (101, 333), (29, 30), (200, 201), (57, 56)]
    for n, (height, width) in enumerate(shapes):
        folder = tmp_path / "val" / f"c{n}"
        folder.mkdir(parents=True)
        photo(height, width, n).save(folder / "x.png")
    index = build_index(tmp_path, "val")
    transforms = torchvision.transforms
    chain = transforms.Compose([transforms.Resize(28), transforms.CenterCrop(24), transforms.PILToTensor()])
    (batch,) = batches("pillow", EvalPlan(index, AUGMENT, 100))
    want = np.stack([chain(Image.open(index.absolute(i))).permute(1, 2, 0).numpy() for i in range(len(shapes))])
    assert np.abs(pixels(batch.images) - want).max() < 1e-3
    normalise = transforms.Normalize(AUGMENT.mean, AUGMENT.std)
    want_float = normalise(torch.from_numpy(want).permute(0, 3, 1, 2) / 255)
    assert (batch.images - want_float).abs().max() < 1e-5
    (dali,) = batches("dali", EvalPlan(index, AUGMENT, 100))
    assert np.abs(pixels(dali.images) - want).max() < 1.1


def test_pillow_training_is_torchvisions(data):
    plan = TrainPlan(data, AUGMENT, 30, seed=3)
    (batch,) = batches("pillow", plan, stop=1)
    numbers = plan.batch(0)
    flips = 0
    for i, path in enumerate(numbers.paths):
        (y, x), (h, w) = numbers.anchor[i].tolist(), numbers.shape[i].tolist()
        with Image.open(path) as image:
            want = functional.resized_crop(image.convert("RGB"), y, x, h, w, [24, 24])
        if numbers.flip[i]:
            want = functional.hflip(want)
            flips += 1
        assert np.abs(pixels(batch.images)[i] - np.asarray(want)).max() < 1e-3
    assert 5 < flips < 25


SHAPES = [(32, 32), (32, 32), (32, 47), (40, 32), (64, 48), (20, 31), (200, 203)]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Index:
    """A PNG of each of SHAPES (h, w)."""
    folder = tmp_path_factory.mktemp("small") / "train" / "all"
    folder.mkdir(parents=True)
    for n, (height, width) in enumerate(SHAPES):
        photo(height, width, n).save(folder / f"{n}.png")
    return build_index(folder.parent.parent, "train")


class _RandomCrop(torchvision.transforms.RandomCrop):
    """torchvision's own, at given places instead of its draws."""

    place: tuple[int, int]

    def get_params(self, img, output_size):
        return (*self.place, *output_size)


@pytest.mark.parametrize("backend", EXECUTORS)
def test_padded_crops_are_torchvisions(small, backend):
    """RandomCrop(32, padding=4) after Resize(32): images of image_size and others, several epochs, flips included."""
    plan = TrainPlan(small, Augment(image_size=32, eval_resize=32, crop_padding=4), len(SHAPES), seed=5)
    places, flips = set(), 0
    for step, batch in enumerate(batches(backend, plan, stop=40)):
        numbers = plan.batch(step)
        got = pixels(batch.images)
        for i, path in enumerate(numbers.paths):
            crop = _RandomCrop(32, padding=4)
            y, x = (numbers.anchor[i] + 4).tolist()  # torchvision counts from the border's corner
            crop.place = y, x
            with Image.open(path) as image:
                want = np.asarray(crop(torchvision.transforms.Resize(32)(image)))
            if numbers.flip[i]:
                want = want[:, ::-1]
                flips += 1
            exact = backend == "pillow" or min(numbers.size[i]) == 32
            assert np.abs(got[i] - want).max() < 1e-3 if exact else np.abs(got[i] - want).mean() < 0.5
            black = np.zeros((32, 32), bool)  # by hand: the rows and columns of the border
            height, width = numbers.resize[i].tolist()
            black[: max(0, 4 - y)], black[max(0, height + 4 - y) :] = True, True
            black[:, : max(0, 4 - x)], black[:, max(0, width + 4 - x) :] = True, True
            black = black[:, ::-1] if numbers.flip[i] else black
            assert np.abs(got[i][black]).max(initial=0) < 1e-3
            places |= {(y, x)} if tuple(numbers.size[i]) == (32, 32) else set()
    assert len(places) > 40  # of 81, by 80 draws
    assert {0, 8} <= {y for y, _ in places} & {x for _, x in places}  # the outermost ones too
    assert 100 < flips < 180


def test_dali_s_padded_crops_are_pillow_s(small, data):
    """The same where nothing is resized, by rounding apart where it is."""
    augment = Augment(image_size=32, eval_resize=32, crop_padding=4)
    for index, batch_size in ((small, len(SHAPES)), (data, 20)):
        plan = TrainPlan(index, augment, batch_size, seed=1)
        for dali, pillow in zip(*(batches(backend, plan, stop=12) for backend in EXECUTORS), strict=True):
            same = torch.from_numpy(index.sizes[dali.ids].min(1) == 32)
            # but for the last bit of the normalisation
            torch.testing.assert_close(dali.images[same], pillow.images[same], rtol=0, atol=2e-6)
            assert np.abs(pixels(dali.images) - pixels(pillow.images)).mean((1, 2, 3)).max() < 0.6
            assert torch.equal(dali.ids, pillow.ids)


@pytest.mark.parametrize("backend", EXECUTORS)
def test_evaluation_of_images_of_its_size_leaves_their_pixels(small, backend):
    augment = Augment(image_size=32, eval_resize=32, crop_padding=4)
    (batch,) = batches(backend, EvalPlan(small, augment, len(SHAPES)))
    for i in (0, 1):
        with Image.open(small.absolute(i)) as image:
            assert np.abs(pixels(batch.images)[i] - np.asarray(image)).max() < 1e-3


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Index:
    """One class per kind of file that is unusual and fine."""
    root = tmp_path_factory.mktemp("odd")
    rotated = Image.Exif()
    rotated[274] = 6
    picture = photo(120, 160, 3)
    gray16 = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    files = {
        "jpeg": lambda path: picture.save(path, quality=90),
        "progressive": lambda path: picture.save(path, quality=90, progressive=True),
        "fullchroma": lambda path: picture.save(path, quality=90, subsampling=0),
        "grayscale": lambda path: picture.convert("L").save(path),
        "cmyk": lambda path: picture.convert("CMYK").save(path),
        "png": lambda path: picture.save(path, format="PNG"),
        "alpha": lambda path: picture.convert("RGBA").save(path, format="PNG"),
        "palette": lambda path: picture.quantize(64).save(path, format="PNG"),
        "gray16": lambda path: gray16.save(path, format="PNG"),
        "webp": lambda path: picture.save(path, format="WEBP"),
        "exif": lambda path: picture.save(path, quality=90, exif=rotated),
    }
    for name, write in files.items():
        folder = root / "train" / name
        folder.mkdir(parents=True)
        write(folder / "x.JPEG")
    return build_index(root, "train")


def test_dali_and_pillow_make_the_same_pixels(odd):
    assert not odd.quarantined
    (dali,), (pillow,) = (batches(backend, EvalPlan(odd, AUGMENT, 100)) for backend in EXECUTORS)
    difference = np.abs(pixels(dali.images) - pixels(pillow.images))
    for name, image in zip(odd.classes, difference, strict=True):
        assert image.max() < 1.1, name  # one grey level of rounding
        assert image.mean() < 0.5, name
    spread = pixels(pillow.images).std(axis=(1, 2, 3))
    assert spread.min() > 20  # pictures, not plain areas that agree by chance

    plan = TrainPlan(odd, AUGMENT, len(odd), seed=0)
    for dali, pillow in zip(*(batches(backend, plan, stop=20) for backend in EXECUTORS), strict=True):
        difference = np.abs(pixels(dali.images) - pixels(pillow.images)).mean(axis=(1, 2, 3))
        for name, mean in zip((odd.classes[i] for i in dali.ids), difference, strict=True):
            assert mean < 0.6, name
        assert torch.equal(dali.labels, pillow.labels)


def test_exif_rotation_is_ignored(odd):
    """As torchvision does: the rotated file has the pixels of the plain one."""
    for backend in EXECUTORS:
        (batch,) = batches(backend, EvalPlan(odd, AUGMENT, 100))
        plain, rotated = (batch.images[odd.classes.index(name)] for name in ("jpeg", "exif"))
        assert torch.equal(plain, rotated)


# --- files that go bad after indexing ---------------------------------------------------------------------------------

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
        match=r"no image of class .* can be read any more, the last one was .*is the disk still there",
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


def test_what_only_pillow_can_decode_is_set_aside_too(own):
    """The index keeps such files out; here one slips in after it."""
    bad = Path(own.absolute(17))
    photo(48, 64).save(bad, format="GIF")
    got, said, _ = collected(EvalPlan(own, AUGMENT, 6), "dali")
    ((path, why),) = said
    assert path == str(bad)
    assert why.startswith("an image that only Pillow can decode, not DALI (")
    assert sum(len(ids) for ids, _, _ in got) == 23


# --- mixing, views, sizes --------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("backend", [*EXECUTORS, "synthetic"])
def test_mixed_batches_are_the_plain_ones_mixed(data, backend, padding):
    settings = {"image_size": 24, "eval_resize": 28, "crop_padding": padding}
    plain = TrainPlan(data, Augment(**settings), 8, seed=5)
    plan = TrainPlan(data, Augment(**settings, mixup=0.2, cutmix=1.0), 8, seed=5)
    for k, (a, b) in enumerate(zip(batches(backend, plain, stop=7), batches(backend, plan, stop=7), strict=True)):
        want = mixed(a, plan.batch(k).mixing)
        assert all(torch.equal(x, y) for x, y in zip(b, want, strict=True))
        assert b.mix.dtype == torch.float32
        assert not torch.equal(a.images, b.images)
    evaluated = batches(backend, EvalPlan(data, plan.augment, 8))
    assert all(batch.labels_b is None and batch.mix is None for batch in evaluated)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("backend", [*EXECUTORS, "synthetic"])
def test_images_grow_with_the_epochs(data, backend, padding):
    augment = Augment(image_size=24, eval_resize=28, sizes=((0, 16), (1, 20), (3, 32)), crop_padding=padding)
    plan = TrainPlan(data, augment, 20, seed=0)  # 3 steps an epoch
    got = batches(backend, plan, stop=12)
    assert [batch.images.shape[-1] for batch in got] == [16] * 3 + [20] * 6 + [32] * 3
    (evaluated,) = batches(backend, EvalPlan(data, augment, 60))
    assert evaluated.images.shape == (60, 3, 24, 24)
    (alone,) = batches(backend, plan, start=7, stop=8)  # from the middle on
    assert torch.equal(alone.images, got[7].images)
    if backend == "dali":
        with make_loader("pillow", plan, start=9, stop=10) as loader:
            assert abs(pixels(next(loader).images) - pixels(got[9].images)).mean() < 0.5


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*EXECUTORS, "synthetic"])
def test_batch_layout(data, backend):
    for plan in (TrainPlan(data, AUGMENT, 8, seed=0), EvalPlan(data, AUGMENT, 8)):
        with make_loader(backend, plan) as loader:
            batch = next(loader)
        assert batch.images.shape == (8, 3, 24, 24)
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert not batch.images.is_contiguous()
        assert (batch.labels.dtype, batch.labels.shape) == (torch.int64, (8,))
        assert (batch.ids.dtype, batch.ids.shape) == (torch.int64, (8,))
        assert type(batch.images) is torch.Tensor
        assert torch.equal(batch.labels, torch.from_numpy(data.labels)[batch.ids])
        with make_loader(backend, plan, dtype=torch.bfloat16) as loader:
            half = next(loader).images
        assert half.dtype == torch.bfloat16
        assert half.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(half, batch.images.bfloat16())


@pytest.mark.parametrize("backend", EXECUTORS)
def test_batches_stay_valid_after_later_ones_and_after_close(data, backend):
    plan = TrainPlan(data, AUGMENT, 8, seed=0)
    with make_loader(backend, plan, prefetch=1, stop=30) as loader:
        kept, copies = [], []
        for batch in loader:
            kept.append(batch)
            copies.append(Batch(*(tensor.clone() for tensor in batch[:3])))
            batch.images.mul_(1)  # may be written to
    gc.collect()
    batches(backend, plan, stop=30)  # whatever was freed is used again
    assert identical(kept, copies)


def test_writing_into_a_batch_does_not_reach_another(data):
    plan = TrainPlan(data, AUGMENT, 8, seed=0)
    clean = batches("dali", plan, stop=10)
    with make_loader("dali", plan, stop=10, prefetch=1) as loader:
        for batch, want in zip(loader, clean, strict=True):
            assert torch.equal(batch.images, want.images)
            batch.images.zero_()


@pytest.mark.parametrize("backend", [*EXECUTORS, "synthetic"])
def test_each_iteration_begins_at_the_start(data, backend):
    with make_loader(backend, EvalPlan(data, AUGMENT, 8)) as loader:
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


def test_training_has_no_end_and_stop_may_lie_before_the_start(data):
    plan = TrainPlan(data, AUGMENT, 8, seed=0)
    loader = make_loader("synthetic", plan)
    with pytest.raises(TypeError, match="no end"):
        len(loader)
    ids = [batch.ids.tolist() for batch, _ in zip(loader, range(20), strict=False)]
    assert ids == [plan.batch(step).ids.tolist() for step in range(20)]
    assert batches("dali", plan, start=3, stop=3) == []
    assert len(make_loader("dali", plan, start=5, stop=3)) == 0


def test_close_ends_dalis_and_pillows_threads(data):
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    for backend in EXECUTORS:
        batches(backend, EvalPlan(data, AUGMENT, 8))  # what a library starts once for all is started now
        before = threads()
        loader = make_loader(backend, TrainPlan(data, AUGMENT, 8, seed=0), threads=5)
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


def test_unknown_backend(data):
    with pytest.raises(UserError, match="one of dali, pillow, synthetic, found 'dalli'; did you mean 'dali'"):
        make_loader("dalli", EvalPlan(data, AUGMENT, 8))


def test_missing_dali_is_an_error_not_a_fallback(data, monkeypatch):
    monkeypatch.delitem(sys.modules, "ijckd_fast.data.load.dali", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match="pip install nvidia-dali-cuda130, or choose --data-backend pillow"):
        make_loader("dali", EvalPlan(data, AUGMENT, 8))


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
@pytest.mark.parametrize("backend", [*EXECUTORS, "synthetic"])
def test_impossible_settings_are_refused(data, backend, setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        make_loader(backend, EvalPlan(data, AUGMENT, 8), **setting)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"decode": "hybrid"}, "decode 'hybrid' needs a GPU to deliver to, found device 'cpu'"),
        ({"decode": "gpu"}, "needs a GPU"),
        ({"hw_decoder_load": 1.5}, "a share of the images between 0 and 1, found 1.5"),
    ],
)
def test_impossible_settings_of_dali_are_refused(data, setting, text):
    with pytest.raises(UserError, match=text):
        make_loader("dali", EvalPlan(data, AUGMENT, 8), **setting)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("plan", ["train", "padded", "evaluation"])
@pytest.mark.parametrize(("decode", "levels"), [("cpu", 0.0), ("hybrid", 0.5), ("gpu", 3.0)])
def test_a_gpu_gets_the_same_images(data, plan, decode, levels):
    """levels: mean difference in grey levels. A GPU's resize rounds otherwise, its decoder has another inverse DCT."""
    plan = {
        "train": TrainPlan(data, AUGMENT, 8, 1),
        "padded": TrainPlan(data, PADDED, 8, 1),
        "evaluation": EvalPlan(data, AUGMENT, 8),
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


def test_every_loader_is_a_loader(data):
    assert all(
        isinstance(make_loader(name, EvalPlan(data, AUGMENT, 8)), Loader) for name in ("dali", "pillow", "synthetic")
    )
