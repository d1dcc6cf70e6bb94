import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings, strategies as st

from ijckd_fast.data import Augment, EvalPlan, Index, Paths, TrainPlan, ViewPlan
from ijckd_fast.data.counter_rng import permutation, uniforms
from ijckd_fast.data.plan import mixing, padded_crop, random_resized_crop, resize_and_center_crop
from ijckd_fast.errors import UserError


def make_index(n: int, size: tuple[int, int] = (64, 48), classes: int = 3) -> Index:
    """An index of files that do not exist: a plan never opens one."""
    labels = np.arange(n) % classes
    names = tuple(f"c{i}" for i in range(classes))
    paths = [f"train/{names[label]}/{i}.jpg" for i, label in enumerate(labels)]
    return Index("/data", "train", names, Paths.of(paths), labels, np.full((n, 2), size, np.int32), [], "hash")


# --- random numbers ---------------------------------------------------------------------------------------------------


def splitmix64(x: int) -> int:
    """The published finaliser on Python integers, independent of numpy's wrap-around."""
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@settings(deadline=None)
@given(st.integers(-(2**70), 2**70), st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 60))
def test_uniforms_follow_the_published_generator(seed, stream, i, draw):
    key = splitmix64(splitmix64(splitmix64(seed % 2**64) ^ stream) ^ i)
    want = (splitmix64((key + draw * 0xD1342543DE82EF95) % 2**64) >> 11) * 2.0**-53
    assert uniforms(seed, stream, np.array([i]), draw + 1)[0, draw] == want


def test_splitmix64_has_its_published_first_output():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # splitmix64.c seeded with 0


def test_uniforms_are_uniform_and_unrelated():
    u = uniforms(3, 5, np.arange(20_000), 4)
    assert abs(u.mean() - 0.5) < 0.005
    for column in u.T:
        assert np.abs(np.histogram(column, 20, (0, 1))[0] - 1000).max() < 150
    other = np.concatenate([u, uniforms(3, 6, np.arange(20_000), 1), uniforms(4, 5, np.arange(20_000), 1)], 1)
    assert np.abs(np.corrcoef(other.T) - np.eye(6)).max() < 0.03


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 100), st.integers(1, 400))
def test_permutation_is_one(seed, stream, n):
    assert np.array_equal(np.sort(permutation(seed, stream, n)), np.arange(n))


def test_permutations_of_epochs_and_seeds_are_unrelated():
    orders = [permutation(seed, epoch, 5000) for seed in range(3) for epoch in range(3)]
    assert np.abs(np.corrcoef(orders) - np.eye(9)).max() < 0.06


# --- torchvision's crop rule ------------------------------------------------------------------------------------------


def torchvision_crop(monkeypatch, draws, height, width, augment):
    """torchvision's own get_params, fed with `draws` [4 * tries] in float64 instead of its generator."""
    stream = iter(draws)

    class Number(float):
        item = float.__float__

        def uniform_(self, low, high):
            return Number(low + (high - low) * next(stream))

    def pair(values):
        return [Number(value) for value in values]

    def randint(low, high, size):
        return SimpleNamespace(item=lambda: low + math.floor(next(stream) * (high - low)))

    class Generator:
        """One try takes area, ratio, y, x in turn; a try that does not fit leaves y and x unused."""

        def __init__(self):
            self.tries = 0

        def empty(self, _):
            nonlocal stream
            if self.tries % 2 == 0:
                stream = iter(draws[2 * self.tries :])
            self.tries += 1
            return Number()

    fake = SimpleNamespace(
        tensor=pair,
        log=lambda values: [Number(math.log(value)) for value in values],
        exp=lambda value: Number(math.exp(value)),
        empty=Generator().empty,
        randint=randint,
    )
    with monkeypatch.context() as patch:
        patch.setattr(torchvision.transforms.transforms, "torch", fake)
        image = torch.empty(3, height, width, device="meta")
        return torchvision.transforms.RandomResizedCrop.get_params(image, list(augment.scale), list(augment.ratio))


CROPS = {
    "imagenet": (Augment(), 500, 375),
    "small": (Augment(), 32, 32),
    "few pixels": (Augment(scale=(0.5, 1.0)), 3, 2),
    "often falls back, wide": (Augment(scale=(0.3, 1.0)), 60, 200),
    "often falls back, tall": (Augment(scale=(0.3, 1.0)), 200, 60),
    "always falls back, wide": (Augment(), 4, 900),
    "always falls back, tall": (Augment(), 900, 4),
    "falls back to the whole image": (Augment(scale=(1.0, 1.0), ratio=(0.5, 3.0)), 2000, 2001),
    "ratio above the image's": (Augment(scale=(1.0, 1.0), ratio=(2.0, 2.0)), 99, 99),
    "ratio below the image's": (Augment(scale=(1.0, 1.0), ratio=(0.5, 0.5)), 99, 99),
}


@pytest.mark.parametrize("case", CROPS)
def test_crop_is_torchvisions_for_the_same_draws(monkeypatch, case):
    augment, height, width = CROPS[case]
    ids = np.arange(200)
    anchor, shape, _ = random_resized_crop(9, 2, ids, np.tile([[height, width]], (200, 1)), augment)
    draws = uniforms(9, 2, ids, 41)
    for i in ids:
        want = torchvision_crop(monkeypatch, draws[i, :40], height, width, augment)
        assert (*anchor[i], *shape[i]) == want


def test_crop_fallbacks_by_hand():
    wide = random_resized_crop(0, 0, np.arange(5), np.tile([[4, 900]], (5, 1)), Augment())
    tall = random_resized_crop(0, 0, np.arange(5), np.tile([[900, 4]], (5, 1)), Augment())
    assert (wide[0] == [0, 447]).all()  # x = (900 - 5) // 2
    assert (wide[1] == [4, 5]).all()  # w = round(4 * 4/3)
    assert (tall[0] == [447, 0]).all()
    assert (tall[1] == [5, 4]).all()


@pytest.mark.parametrize(("height", "width"), [(500, 375), (32, 32), (60, 200)])
def test_crop_distribution_is_torchvisions(height, width):
    """Two-sample Kolmogorov-Smirnov distance of each coordinate, area and ratio to torchvision's own draws."""
    n = 4000
    anchor, shape, flip = random_resized_crop(1, 0, np.arange(n), np.tile([[height, width]], (n, 1)), Augment())
    ours = np.concatenate([anchor, shape], 1).astype(float)
    torch.manual_seed(0)
    image = torch.empty(3, height, width, device="meta")
    get_params = torchvision.transforms.RandomResizedCrop.get_params
    theirs = np.array([get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)], float)
    limit = 1.95 * math.sqrt(2 / n)  # exceeded once in a thousand by equal distributions; the draws are fixed
    for a, b in [*zip(ours.T, theirs.T, strict=True), *((f(ours), f(theirs)) for f in (_area, _ratio))]:
        grid = np.union1d(a, b)
        distance = np.abs(_cdf(a, grid) - _cdf(b, grid)).max()
        assert distance < limit
    assert abs(flip.mean() - 0.5) < 0.03


def _area(crops):
    return crops[:, 2] * crops[:, 3]


def _ratio(crops):
    return crops[:, 3] / crops[:, 2]


def _cdf(values, grid):
    return np.searchsorted(np.sort(values), grid, side="right") / len(values)


@settings(deadline=None, max_examples=300)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.floats(0.01, 1),
    st.floats(0.3, 1),
    st.integers(0, 2**31),
)
def test_crop_lies_inside_every_image(height, width, least, ratio, seed):
    augment = Augment(scale=(least, 1.0), ratio=(ratio, 1 / ratio))
    anchor, shape, _ = random_resized_crop(seed, 0, np.arange(8), np.tile([[height, width]], (8, 1)), augment)
    assert (anchor >= 0).all()
    assert (shape >= 1).all()
    assert (anchor + shape <= [height, width]).all()


def test_flip_probability():
    size = np.tile([[32, 32]], (4000, 1))
    assert random_resized_crop(0, 0, np.arange(4000), size, Augment(hflip=0.0))[2].sum() == 0
    assert random_resized_crop(0, 0, np.arange(4000), size, Augment(hflip=1.0))[2].sum() == 4000
    assert abs(random_resized_crop(0, 0, np.arange(4000), size, Augment(hflip=0.2))[2].mean() - 0.2) < 0.03


# --- padded crops -----------------------------------------------------------------------------------------------------


def chi_square(counts, expected) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("padding", [1, 4])
def test_padded_crops_lie_anywhere_with_equal_chances(padding):
    """Every (y, x) of 32 x 32 images, against equal shares and against torchvision's own draws; flips besides."""
    n, places = 81 * 200, 2 * padding + 1
    augment = Augment(image_size=32, eval_resize=32, crop_padding=padding)
    resize, anchor, flip = padded_crop(11, 3, np.arange(n), np.tile([[32, 32]], (n, 1)), 32, augment)
    assert (resize == 32).all()
    assert [array.dtype for array in (resize, anchor, flip)] == [np.int32] * 3

    def counts(offsets):
        return np.bincount(np.ravel_multi_index(offsets.T, (places, places)), minlength=places**2)

    ours = counts(anchor + padding)
    torch.manual_seed(0)
    padded = torch.empty(3, 32 + 2 * padding, 32 + 2 * padding, device="meta")
    theirs = counts(np.array([torchvision.transforms.RandomCrop.get_params(padded, (32, 32))[:2] for _ in range(n)]))
    limit = {1: 42.7, 4: 155.4}[
        padding
    ]  # of chi-square with places^2 - 1 degrees of freedom, exceeded once in a million
    assert chi_square(ours, n / places**2) < limit
    assert ((ours - theirs) ** 2 / (ours + theirs)).sum() < limit
    assert chi_square(counts((anchor + padding) // 2), n / places**2) > limit  # the test can fail
    assert abs(flip.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(np.stack([anchor[:, 0], anchor[:, 1], flip])) - np.eye(3)).max() < 0.03


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 1500), st.integers(1, 1500), st.integers(2, 300), st.integers(1, 40), st.integers(0, 2**31))
def test_padded_crops_of_other_sizes_are_torchvisions(height, width, side, padding, seed):
    """Resize(side), then every place that RandomCrop(side, padding) could take and no other."""
    augment = Augment(image_size=side, eval_resize=side, crop_padding=min(padding, side - 1))
    resize, anchor, _ = padded_crop(seed, 0, np.arange(8), np.tile([[height, width]], (8, 1)), side, augment)
    theirs = torchvision.transforms.Resize(side)(torch.empty(1, height, width, device="meta"))
    assert (resize == list(theirs.shape[1:])).all()
    assert (anchor >= -augment.crop_padding).all()
    assert (anchor + side <= resize + augment.crop_padding).all()


def test_every_place_of_a_longer_side_is_taken():
    augment = Augment(image_size=8, eval_resize=8, crop_padding=2)
    _, anchor, _ = padded_crop(0, 0, np.arange(2000), np.tile([[16, 24]], (2000, 1)), 8, augment)
    assert set(anchor[:, 0].tolist()) == set(range(-2, 3))  # 8 x 12 pixels after the resize
    assert set(anchor[:, 1].tolist()) == set(range(-2, 7))


def test_a_padded_crop_is_a_plan_s_crop():
    augment = Augment(image_size=32, eval_resize=32, crop_padding=4, sizes=((0, 16), (1, 32)))
    plan = TrainPlan(make_index(20, size=(64, 48)), augment, 5, seed=0)
    for step, side in ((0, 16), (4, 32)):
        batch = plan.batch(step)
        assert (batch.image_size, batch.resize.tolist()) == (side, [[side, side * 4 // 3]] * 5)
        assert (batch.shape == side).all()
        assert {array.dtype for array in (batch.anchor, batch.shape, batch.resize)} == {np.dtype(np.int32)}
    evaluation = EvalPlan(make_index(20, size=(64, 48)), augment, 5).batch(0)
    assert (evaluation.anchor == [0, 5]).all()  # the centre, as without padding
    assert evaluation.flip.sum() == 0


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"crop_padding": -1}, r"crop_padding must be from 0 \(off\) to 31 pixels, .* found -1"),
        ({"crop_padding": 32}, "from 0 .* to 31 pixels, so that a crop always holds some of its image of 32, found 32"),
        ({"crop_padding": 8, "sizes": ((0, 8), (1, 32))}, "to 7 pixels"),
        (
            {"crop_padding": 4, "scale": (0.5, 1.0)},
            r"crop_padding 4 replaces the random resized crop.*found \(0.5, 1.0\)",
        ),
        (
            {"crop_padding": 4, "ratio": (1.0, 1.0)},
            r"found \(0.08, 1.0\) and \(1.0, 1.0\); leave them out, or crop_padding",
        ),
    ],
)
def test_impossible_padding_is_refused(setting, text):
    with pytest.raises(UserError, match=text):
        Augment(image_size=32, eval_resize=32, **setting)


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 1500), st.integers(1, 1500), st.integers(1, 300), st.integers(0, 100))
def test_evaluation_geometry_is_torchvisions(height, width, crop, margin):
    transforms = torchvision.transforms
    resized = transforms.Resize(crop + margin)(torch.empty(1, height, width, device="meta"))
    resize, anchor = resize_and_center_crop(np.array([[height, width]]), crop + margin, crop)
    assert tuple(resize[0]) == tuple(resized.shape[1:])
    for axis in range(2):  # CenterCrop's formula, torchvision/transforms/functional.py
        assert anchor[0, axis] == round((resized.shape[1 + axis] - crop) / 2.0)


# --- plans ------------------------------------------------------------------------------------------------------------


WARPS = Augment(affine_rotate=30, affine_scale=0.2, affine_shear=10, affine_shift=0.1)
KINDS = pytest.mark.parametrize(
    "augment", [Augment(), Augment(crop_padding=40), WARPS], ids=["resized crops", "padded crops", "warps"]
)


def content(plan):
    """A BatchPlan as rows that can be compared and sorted: one per image, everything that decides its pixels."""
    resize = plan.shape if plan.resize is None else plan.resize
    affine = np.empty((len(plan.ids), 0)) if plan.affine is None else plan.affine.reshape(-1, 6)
    numbers = np.concatenate([plan.size, plan.anchor, plan.shape, resize, affine], 1).tolist()
    columns = zip(plan.ids.tolist(), plan.paths, plan.labels.tolist(), plan.flip.tolist(), numbers, strict=True)
    return [(*row[:-1], *row[-1]) for row in columns]


@KINDS
@settings(deadline=None, max_examples=60)
@given(world=st.integers(1, 4), batch_size=st.integers(1, 8), step=st.integers(0, 40), seed=st.integers(0, 1000))
def test_global_batch_does_not_depend_on_the_world_size(augment, world, batch_size, step, seed):
    index = make_index(100)
    alone = TrainPlan(index, augment, batch_size * world, seed)
    ranks = [TrainPlan(index, augment, batch_size, seed, rank, world) for rank in range(world)]
    assert all(plan.steps_per_epoch == alone.steps_per_epoch for plan in ranks)
    union = [row for plan in ranks for row in content(plan.batch(step))]
    assert union == content(alone.batch(step))


@KINDS
def test_batch_is_a_function_of_the_step_alone(augment):
    index = make_index(50)
    forward = TrainPlan(index, augment, 8, seed=3)
    batches = [content(forward.batch(step)) for step in range(20)]
    backward = TrainPlan(index, augment, 8, seed=3)
    assert [content(backward.batch(step)) for step in reversed(range(20))] == batches[::-1]
    assert content(TrainPlan(index, augment, 8, seed=4).batch(0)) != batches[0]


@KINDS
def test_epoch_shows_each_image_once_and_every_epoch_another_order_and_crop(augment):
    plan = TrainPlan(make_index(50), augment, 8, seed=0)
    assert plan.steps_per_epoch == 6
    assert plan.num_steps is None
    epochs = [[row for k in range(6) for row in content(plan.batch(6 * epoch + k))] for epoch in range(3)]
    for epoch in epochs:
        assert len({row[0] for row in epoch}) == 48
    assert len({tuple(row[0] for row in epoch) for epoch in epochs}) == 3
    crops = [{row[0]: row[4:] for row in epoch} for epoch in epochs]
    both = crops[0].keys() & crops[1].keys()
    assert sum(crops[0][i] == crops[1][i] for i in both) < 3


@KINDS
def test_an_images_crop_depends_on_seed_epoch_and_id_only(augment):
    index = make_index(60)
    rows = {}
    for batch_size in (5, 12, 60):
        plan = TrainPlan(index, augment, batch_size, seed=1)
        for k in range(plan.steps_per_epoch):
            for row in content(plan.batch(2 * plan.steps_per_epoch + k)):
                assert rows.setdefault(row[0], row) == row
    assert len(rows) == 60


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 5))
def test_evaluation_shows_every_image_exactly_once(n, batch_size, world):
    seen = []
    for rank in range(world):
        plan = EvalPlan(make_index(n), Augment(), batch_size, rank, world)
        sizes = [len(plan.batch(k).ids) for k in range(plan.num_batches)]
        assert all(size == batch_size for size in sizes[:-1])
        assert all(0 < size <= batch_size for size in sizes)
        seen += [i for k in range(plan.num_batches) for i in plan.batch(k).ids]
    assert sorted(seen) == list(range(n))


def test_batch_plan_carries_labels_paths_and_sizes():
    plan = TrainPlan(make_index(30, size=(64, 48)), Augment(), 7, seed=0).batch(1)
    assert np.array_equal(plan.labels, plan.ids % 3)
    assert list(plan.paths) == [f"/data/train/c{i % 3}/{i}.jpg" for i in plan.ids]
    assert (plan.size == [48, 64]).all()  # (h, w) of an image indexed as (width, height) = (64, 48)
    assert [array.dtype for array in (plan.ids, plan.labels)] == [np.int64] * 2
    assert {array.dtype for array in (plan.size, plan.anchor, plan.shape, plan.flip)} == {np.dtype(np.int32)}
    assert plan.resize is None
    evaluation = EvalPlan(make_index(30, size=(64, 48)), Augment(image_size=24, eval_resize=36), 7).batch(4)
    assert (evaluation.resize == [36, 48]).all()
    assert (evaluation.anchor == [6, 12]).all()
    assert (evaluation.shape == 24).all()
    assert evaluation.flip.sum() == 0
    assert len(evaluation.ids) == 2


def test_evaluation_batch_out_of_range():
    with pytest.raises(IndexError, match="batch 3 of 3"):
        EvalPlan(make_index(30), Augment(), 10).batch(3)


def test_less_than_one_global_batch_is_refused():
    with pytest.raises(UserError, match=r"needs 128 images \(batch size 64 x 2 processes\).*has 100"):
        TrainPlan(make_index(100), Augment(), 64, seed=0, world=2)


@pytest.mark.parametrize(("batch_size", "rank", "world"), [(0, 0, 1), (1, 1, 1), (1, -1, 2), (1, 0, 0)])
def test_impossible_shards_are_refused(batch_size, rank, world):
    with pytest.raises(UserError):
        TrainPlan(make_index(100), Augment(), batch_size, 0, rank, world)
    with pytest.raises(UserError):
        EvalPlan(make_index(100), Augment(), batch_size, rank, world)


@pytest.mark.parametrize(
    "setting",
    [
        {"image_size": 0},
        {"image_size": 224, "eval_resize": 223},
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 0.2)},
        {"scale": (0.5, 1.5)},
        {"ratio": (0.0, 1.0)},
        {"ratio": (2.0, 1.0)},
        {"hflip": 1.5},
        {"std": (0.2, 0.0, 0.2)},
        {"mean": (0.5, 0.5)},
    ],
    ids=str,
)
def test_impossible_augmentation_is_refused(setting):
    with pytest.raises(UserError):
        Augment(**setting)


@KINDS
def test_a_stand_in_is_seen_with_the_crop_of_the_image_whose_place_it_takes(augment):
    """One that is in the batch anyway is not seen twice with one crop."""
    index = make_index(12)
    before, after = (TrainPlan(index, augment, 12, seed=3) for _ in range(2))
    bad = int(before.batch(0).ids[5])
    after.stand_ins.add(bad, "gone")
    a, b = before.batch(0), after.batch(0)
    assert b.ids[5] != bad
    assert b.labels.tolist() == a.labels.tolist()
    assert np.delete(b.ids, 5).tolist() == np.delete(a.ids, 5).tolist()
    for field in ("anchor", "shape", "flip", "size", "affine"):
        assert np.array_equal(getattr(a, field), getattr(b, field))
    assert b.kept.all()


# --- mixing, views, sizes ---------------------------------------------------------------------------------------------


def same_distribution(a, b) -> bool:
    """The two-sample Kolmogorov-Smirnov test at 1e-6: a chance in a million that equal distributions fail."""
    at = np.sort(np.concatenate([a, b]))
    distance = abs(
        np.searchsorted(np.sort(a), at, "right") / len(a) - np.searchsorted(np.sort(b), at, "right") / len(b)
    ).max()
    return distance < math.sqrt(-math.log(1e-6 / 2) / 2 * (1 / len(a) + 1 / len(b)))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (1600, 90)])
def test_random_resized_crop_has_torchvision_s_distribution(size):
    """50,000 draws of each; the last shape takes the central fallback at times."""
    n, (width, height) = 50_000, size
    augment = Augment()
    stored = np.tile(np.array([[height, width]], np.int32), (n, 1))
    anchor, shape, _ = random_resized_crop(11, 3, np.arange(n), stored, augment)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    crop = torchvision.transforms.RandomResizedCrop
    theirs = np.array(
        [crop.get_params(image, list(augment.scale), list(augment.ratio)) for _ in range(n)]
    )  # i, j, h, w
    ours = np.concatenate([anchor, shape], 1)
    features = {
        "y": (ours[:, 0], theirs[:, 0]),
        "x": (ours[:, 1], theirs[:, 1]),
        "height": (ours[:, 2], theirs[:, 2]),
        "width": (ours[:, 3], theirs[:, 3]),
        "area": tuple(c[:, 2] * c[:, 3] for c in (ours, theirs)),
        "ratio": tuple(c[:, 3] / c[:, 2] for c in (ours, theirs)),
        "bottom": tuple(c[:, 0] + c[:, 2] for c in (ours, theirs)),
        "right": tuple(c[:, 1] + c[:, 3] for c in (ours, theirs)),
    }
    different = [name for name, (a, b) in features.items() if not same_distribution(a, b)]
    assert different == []
    assert not same_distribution(ours[:, 2], theirs[:, 2] + 8)  # the test can fail


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0])
def test_mixup_blends_by_the_beta_distribution(alpha):
    plan = mixing(3, 7, np.arange(100_000), 224, Augment(mixup=alpha))
    assert np.array_equal(plan.partner, np.arange(100_000) ^ 1)
    assert np.array_equal(plan.blend, plan.share)
    assert not plan.box.any(1).any() or not (plan.box[:, 2:] - plan.box[:, :2]).any()
    assert np.array_equal(plan.blend[::2], plan.blend[1::2])  # one draw for a pair
    assert same_distribution(plan.blend[::2], np.random.default_rng(0).beta(alpha, alpha, 50_000).astype(np.float32))


def test_cutmix_cuts_boxes_of_the_drawn_area():
    plan = mixing(3, 7, np.arange(100_000), 224, Augment(cutmix=1.0))
    assert (plan.blend == 1).all()
    assert (plan.box >= 0).all()
    assert (plan.box <= 224).all()
    assert (plan.box[:, :2] <= plan.box[:, 2:]).all()
    area = (plan.box[:, 2:] - plan.box[:, :2]).astype(np.int64).prod(1)
    np.testing.assert_allclose(plan.share, 1 - area / 224**2, atol=1e-6)
    inner = (plan.box[:, :2] > 0).all(1) & (plan.box[:, 2:] < 224).all(1)
    sides = plan.box[inner, 2:] - plan.box[inner, :2]
    assert (sides[:, 0] == sides[:, 1]).all()
    # the authors' rand_bbox, on other random numbers
    g = np.random.default_rng(0)
    half = (224 * np.sqrt(1 - g.beta(1.0, 1.0, 50_000))).astype(int) // 2
    edges = [(np.clip(c - half, 0, 224), np.clip(c + half, 0, 224)) for c in g.integers(224, size=(2, 50_000))]
    theirs = 1 - (edges[0][1] - edges[0][0]) * (edges[1][1] - edges[1][0]) / 224**2
    assert same_distribution(plan.share[::2], theirs.astype(np.float32))
    assert same_distribution(plan.box[::2, 0], edges[0][0])
    assert same_distribution(plan.box[::2, 3], edges[1][1])


def test_with_both_a_pair_is_blended_or_cut():
    plan = mixing(3, 7, np.arange(100_000), 32, Augment(mixup=0.2, cutmix=1.0))
    cut = (plan.box[:, 2:] > plan.box[:, :2]).all(1)
    assert (plan.blend[cut] == 1).all()
    assert 0.45 < (plan.blend == 1).mean() < 0.58  # half, and the blends that are 1 as good as 1
    assert np.array_equal(cut[::2], cut[1::2])


@pytest.mark.parametrize("padding", [0, 40])
def test_mixing_does_not_depend_on_the_number_of_processes(padding):
    augment = Augment(mixup=0.4, cutmix=1.0, repeats=2, crop_padding=padding, affine_rotate=5)
    index = make_index(64)
    whole = TrainPlan(index, augment, 16, seed=1)
    halves = [TrainPlan(index, augment, 8, seed=1, rank=rank, world=2) for rank in range(2)]
    for step in (0, 3, 5):
        one, two = whole.batch(step), [plan.batch(step) for plan in halves]
        assert np.array_equal(one.ids, np.concatenate([part.ids for part in two]))
        assert np.array_equal(one.anchor, np.concatenate([part.anchor for part in two]))
        assert np.array_equal(one.affine, np.concatenate([part.affine for part in two]))
        assert (one.anchor[::2] != one.anchor[1::2]).any()  # two views of an image
        assert (one.affine[::2] != one.affine[1::2]).any((1, 2)).all()
        for field in ("blend", "box", "share"):
            parts = [getattr(part.mixing, field) for part in two]
            assert np.array_equal(getattr(one.mixing, field), np.concatenate(parts))
        partners = np.concatenate([two[0].mixing.partner, two[1].mixing.partner + 8])
        assert np.array_equal(one.mixing.partner, partners)


@pytest.mark.parametrize("n", [1, 2, 7, 12])
@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_partners_come_in_pairs_of_different_images(n, repeats):
    keys = np.arange(n) // repeats
    plan = mixing(0, 0, keys, 16, Augment(mixup=1.0, repeats=repeats))
    assert np.array_equal(plan.partner[plan.partner], np.arange(n))
    alone = plan.partner == np.arange(n)
    assert (plan.share[alone] == 1).all()
    assert (keys[plan.partner[~alone]] != keys[~alone]).all()
    assert alone.sum() <= 2 * repeats - 1


def test_an_epoch_of_repeated_views():
    index = make_index(60)
    plan = TrainPlan(index, Augment(repeats=3), 12, seed=2)
    assert plan.steps_per_epoch == 5
    seen = [plan.batch(k) for k in range(5)]
    ids = np.concatenate([batch.ids for batch in seen])
    assert np.array_equal(ids[::3], ids[1::3])
    assert np.array_equal(ids[::3], ids[2::3])
    assert len(set(ids.tolist())) == 20
    crops = np.concatenate([np.concatenate([batch.anchor, batch.shape], 1) for batch in seen])
    assert (crops[::3] != crops[1::3]).any(1).mean() > 0.9
    assert (crops[1::3] != crops[2::3]).any(1).mean() > 0.9
    once = TrainPlan(index, Augment(), 12, seed=2).batch(0)
    first = np.flatnonzero(np.isin(once.ids, ids[::3]))[0]
    where = np.flatnonzero(ids[::3] == once.ids[first])[0]
    assert np.array_equal(
        crops[::3][where], np.concatenate([once.anchor[first], once.shape[first]])
    )  # the first view is the usual one


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"mixup": 0.05}, "mixup must be an alpha from 0.1 to 1, or 0 for none, found 0.05"),
        ({"cutmix": 2.0}, "cutmix must be an alpha from 0.1 to 1"),
        ({"repeats": 0}, "repeats .* must be at least 1, found 0"),
        ({"sizes": ((1, 128),)}, "epochs rising from 0"),
        ({"sizes": ((0, 128), (5, 160), (5, 192))}, "epochs rising from 0"),
        ({"sizes": ((0, 0),)}, "side in pixels"),
    ],
)
def test_augmentations_that_make_no_sense_are_refused(setting, text):
    with pytest.raises(UserError, match=text):
        Augment(**setting)


# --- a fixed number of views ------------------------------------------------------------------------------------------


def _drawn(batch, row: int) -> tuple:
    """What is drawn for an image of a batch."""
    drawn = (batch.anchor, batch.shape, batch.flip, batch.affine)
    return tuple(array[row].tolist() for array in drawn if array is not None)


def _views(plan, epoch: int) -> dict[int, tuple]:
    """What an epoch draws for each image."""
    batches = [plan.batch(epoch * plan.steps_per_epoch + k) for k in range(plan.steps_per_epoch)]
    return {i: _drawn(batch, row) for batch in batches for row, i in enumerate(batch.ids.tolist())}


@KINDS
def test_epochs_with_views_repeat_crops_and_flips_but_no_order(augment):
    index = make_index(24)
    free, fixed = (TrainPlan(index, augment, 4, seed=5, views=views) for views in (None, 3))
    for epoch in range(7):
        for k in range(6):
            a, b = free.batch(6 * epoch + k), fixed.batch(6 * epoch + k)
            assert (a.ids == b.ids).all()
            assert (a.view, b.view) == (None, epoch % 3)
        assert _views(fixed, epoch) == _views(free, epoch % 3)
        assert (epoch < 3) == (_views(fixed, epoch) == _views(free, epoch))


@KINDS
def test_a_view_plan_shows_what_training_sees(augment):
    index = make_index(24)
    train = TrainPlan(index, augment, 4, seed=5, views=3)
    plan = ViewPlan(index, augment, [(2, range(0, 16)), (0, [7, 3]), (2, range(16, 24))], batch_size=16, seed=5)
    assert plan.num_steps == 3
    first, few, last = (plan.batch(k) for k in range(3))
    assert [list(first.ids), list(few.ids)] == [list(range(16)), [7, 3]]
    assert (first.view, few.view, first.mixing) == (2, 0, None)
    assert (first.resize is None) == (augment.crop_padding == 0)
    for batches, epoch in (((first, last), 5), ((few,), 3)):
        wanted = _views(train, epoch)
        for batch in batches:
            for row, i in enumerate(batch.ids.tolist()):
                assert _drawn(batch, row) == wanted[i]


@KINDS
def test_with_views_a_stand_in_is_seen_in_its_own(augment):
    index = make_index(24)
    plan = TrainPlan(index, augment, 24, seed=5, views=2)
    whole = _views(plan, 1)
    plan.stand_ins.add(4, "gone")
    batch = plan.batch(1)
    rows = np.flatnonzero(batch.ids == 7)  # the next of its class
    assert len(rows) == 2
    for row in rows:
        assert _drawn(batch, row) == whole[7]
    other = ViewPlan(index, Augment(), [(1, [4])], batch_size=1, seed=5)
    other.stand_ins.add(4, "gone")
    assert other.batch(0).ids.tolist() == [5]  # of any class: it is never looked at


@pytest.mark.parametrize(
    ("views", "augment", "text"),
    [
        (0, {}, "views of each image must be at least 1, found 0"),
        (2, {"mixup": 0.2, "repeats": 2}, "found mixup 0.2 and repeats 2, of which"),
        (2, {"cutmix": 1.0}, "found cutmix 1, of which"),
        (
            2,
            {"sizes": ((0, 64),)},
            "found progressive sizes, of which no view is the same .* train with the teacher itself",
        ),
    ],
)  # fmt: skip
def test_what_no_fixed_number_of_views_can_serve_is_refused(views, augment, text):
    with pytest.raises(UserError, match=text):
        TrainPlan(make_index(8), Augment(**augment), 4, seed=0, views=views)
