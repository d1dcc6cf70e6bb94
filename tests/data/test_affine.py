"""Training's warps: what is drawn, and what a map makes of a square."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from host_waits import HostWaits
from torchvision.transforms import InterpolationMode, functional

from ijckd_fast.data import Augment
from ijckd_fast.data.counter_rng import uniforms
from ijckd_fast.data.load import warped
from ijckd_fast.data.plan import affine, random_affine
from ijckd_fast.errors import UserError

LEVELS = {"mean": (0, 0, 0), "std": (1, 1, 1)}  # images are shares of 255
ALL = {"affine_rotate": 90.0, "affine_scale": 0.4, "affine_shear": 30.0, "affine_shift": 0.25}
SALT = 0xAFF1


def images(count: int, side: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(side)
    return torch.rand(count, 3, side, side, generator=g).contiguous(memory_format=torch.channels_last)


def drawn(monkeypatch, *draws: float, **settings: float) -> np.ndarray:
    """[1, 2, 3], the map for these draws in [-1, 1]: rotation, shear, scales of x and y, shifts along x and y."""
    with monkeypatch.context() as patch:
        patch.setattr(affine, "uniforms", lambda *_: (np.array([draws]) + 1) / 2)
        return random_affine(0, 0, np.arange(1), Augment(**settings))


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_maps_are_the_inverses_of_what_is_drawn():
    """By numpy's inverse of the matrices of the docstring, multiplied one after the other."""
    ids = np.arange(500)
    got = random_affine(7, 3, ids, Augment(**ALL))
    assert (got.dtype, got.shape) == (np.float32, (500, 2, 3))
    draws = 2 * uniforms(7 ^ SALT, 3, ids, 6) - 1
    for (a, s, d, e, x, y), ours in zip(draws * [np.pi / 2, np.pi / 6, 0.4, 0.4, 0.5, 0.5], got, strict=True):
        turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
        slant = np.array([[1, -np.tan(s), 0], [0, 1, 0], [0, 0, 1]])
        forward = np.array([[1, 0, x], [0, 1, y], [0, 0, 1]]) @ turn @ slant @ np.diag([1 + d, 1 + e, 1])
        np.testing.assert_allclose(ours, np.linalg.inv(forward)[:2], atol=2e-6)


def test_the_numbers_are_those_that_earlier_runs_saw():
    """A run that is resumed by another version, on another machine, sees the warps it would have seen."""
    got = random_affine(1, 2, np.array([3, 4]), Augment(**ALL))
    assert [[round(float(x), 4) for x in row] for row in got.reshape(2, 6)] == [
        [1.1769, -1.09, 0.3504, 1.1012, 0.4155, -0.0139],
        [0.9106, 0.1266, -0.2341, 0.3502, 0.8751, -0.4504],
    ]


def test_each_setting_moves_its_own_number_alone():
    ids = np.arange(200)
    for name, value in ALL.items():
        got = random_affine(0, 0, ids, Augment(**{name: value}))
        linear, offset = got[:, :, :2], got[:, :, 2]
        moved = {
            "affine_rotate": (linear[:, 0, 1] == -linear[:, 1, 0]).all() and (linear[:, 0, 1] != 0).all(),
            "affine_scale": not linear[:, [0, 1], [1, 0]].any() and (linear[:, 0, 0] != linear[:, 1, 1]).all(),
            "affine_shear": (linear[:, [0, 1, 1], [0, 0, 1]] == [1, 0, 1]).all() and linear[:, 0, 1].any(),
            "affine_shift": (linear == np.eye(2)).all(),
        }
        assert [each for each, is_so in moved.items() if is_so] == [name]
        assert offset.any() == (name == "affine_shift")
    turned = random_affine(0, 0, ids, Augment(affine_rotate=90))[:, :, :2]
    both = random_affine(0, 0, ids, Augment(affine_rotate=90, affine_shift=0.25))
    assert np.array_equal(both[:, :, :2], turned)  # the same rotation, whatever else is on


def test_draws_are_even_and_unrelated_to_each_other():
    got = random_affine(0, 0, np.arange(20_000), Augment(affine_rotate=90, affine_shift=0.25)).astype(np.float64)
    angle = np.degrees(np.arctan2(got[:, 0, 1], got[:, 0, 0]))
    shift = -np.linalg.solve(got[:, :, :2], got[:, :, 2:])[:, :, 0] / 2  # of the side
    for values, bound in ((angle, 90), (shift[:, 0], 0.25), (shift[:, 1], 0.25)):
        assert np.abs(values).max() <= bound * (1 + 1e-6)
        assert np.abs(np.histogram(values, 20, (-bound, bound))[0] - 1000).max() < 150
    assert np.abs(np.corrcoef([angle, *shift.T]) - np.eye(3)).max() < 0.03


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"affine_rotate": 181}, r"affine_rotate must be from 0 \(off\) to 180 degrees, found 181; 10 turns by"),
        ({"affine_rotate": float("nan")}, "affine_rotate must be .* found nan"),
        ({"affine_scale": 1.0}, r"affine_scale must be from 0 \(off\) to below 1, found 1.0; 0.2 draws scales from"),
        ({"affine_scale": -0.1}, "affine_scale must be .* found -0.1"),
        ({"affine_shear": 90}, "affine_shear must be .* to below 90 degrees, found 90"),
        ({"affine_shift": 1}, "affine_shift must be a share of the side .* to below 1, found 1; 0.1 shifts by up to"),
        ({"affine_shift": 0.1, "affine_fill": 256}, r"affine_fill must be a grey level from 0 \(black\) to 255"),
        ({"affine_fill": 128}, "affine_fill 128 is what warps show .* one of affine_rotate, .* above 0 beside it"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_impossible_warps_are_refused(settings, text):
    with pytest.raises(UserError, match=text):
        Augment(**settings)


# --- what a map makes of a square -------------------------------------------------------------------------------------


def assert_shows(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same, but for the rounding of places to float32."""
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


def test_a_quarter_turn_is_rot90(monkeypatch):
    squares, augment = images(1, 24), Augment(**LEVELS)
    clockwise = drawn(monkeypatch, 1, 0, 0, 0, 0, 0, affine_rotate=90)
    assert_shows(warped(squares, clockwise, augment), squares.rot90(-1, (2, 3)))
    about = drawn(monkeypatch, -1, 0, 0, 0, 0, 0, affine_rotate=180)
    assert_shows(warped(squares, about, augment), squares.rot90(2, (2, 3)))


@pytest.mark.parametrize("fill", [0, 51])
def test_a_shift_by_whole_pixels_shows_the_pixels_and_the_fill(monkeypatch, fill):
    squares = images(1, 24)
    right_and_up = drawn(monkeypatch, 0, 0, 0, 0, 1, -0.5, affine_shift=0.25)  # by 6 and 3 pixels
    want = torch.full_like(squares, fill / 255)
    want[:, :, :-3, 6:] = squares[:, :, 3:, :-6]
    assert_shows(warped(squares, right_and_up, Augment(**LEVELS, affine_shift=0.25, affine_fill=fill)), want)


def test_half_the_size_is_the_mean_of_each_four(monkeypatch):
    squares = images(1, 24)
    want = torch.ones_like(squares)
    want[:, :, 6:18, 6:18] = torch.nn.functional.avg_pool2d(squares, 2)
    halved = drawn(monkeypatch, 0, 0, -1, -1, 0, 0, affine_scale=0.5)
    assert_shows(warped(squares, halved, Augment(**LEVELS, affine_scale=0.5, affine_fill=255)), want)
    narrow = drawn(monkeypatch, 0, 0, -1, 0, 0, 0, affine_scale=0.5)  # x alone
    want = torch.zeros_like(squares)
    want[:, :, :, 6:18] = torch.nn.functional.avg_pool2d(squares, (1, 2))
    assert_shows(warped(squares, narrow, Augment(**LEVELS)), want)


def test_a_shear_moves_the_upper_rows_to_the_right(monkeypatch):
    squares = images(1, 25)
    want = torch.zeros_like(squares)
    for row in range(25):
        by = 12 - row  # 45 degrees: as far as the row is above the centre
        want[:, :, row, max(0, by) : 25 + min(0, by)] = squares[:, :, row, max(0, -by) : 25 - max(0, by)]
    slanted = drawn(monkeypatch, 0, 1, 0, 0, 0, 0, affine_shear=45)
    assert_shows(warped(squares, slanted, Augment(**LEVELS)), want)


@pytest.mark.parametrize("side", [1, 2, 17, 32])
def test_warps_are_torchvisions_for_the_same_draws(side):
    augment = Augment(**LEVELS, affine_rotate=180, affine_shear=40, affine_shift=0.3)  # torchvision has one scale
    squares, ids = images(40, side), np.arange(40)
    got = warped(squares, random_affine(3, 5, ids, augment), augment)
    draws = 2 * uniforms(3 ^ SALT, 5, ids, 6) - 1
    for square, ours, (angle, shear, _, _, x, y) in zip(squares, got, draws, strict=True):
        shift, shears = [0.3 * side * x, 0.3 * side * y], [40 * shear, 0.0]
        want = functional.affine(square, 180 * angle, shift, 1.0, shears, InterpolationMode.BILINEAR)
        assert_shows(ours, want)


def test_the_fill_is_a_grey_level_under_every_normalisation():
    squares = images(8, 16)
    plain, usual = (Augment(**about, **ALL, affine_fill=200) for about in (LEVELS, {}))
    maps = random_affine(0, 0, np.arange(8), usual)
    mean, std = (torch.tensor(x)[:, None, None] for x in (usual.mean, usual.std))
    got = warped((squares - mean) / std, maps, usual) * std + mean
    assert_shows(got, warped(squares, maps, plain))
    assert 0.1 < torch.isclose(got, torch.tensor(200 / 255), atol=1e-5).float().mean() < 0.6


def test_an_images_bits_do_not_depend_on_its_batch_or_its_layout():
    """As those of crops do not; of sizes that no vector divides, too."""
    augment = Augment(**ALL)
    for side in (9, 24, 31):
        squares, maps = images(20, side), random_affine(0, 0, np.arange(20), augment)
        whole = warped(squares, maps, augment)
        assert torch.equal(whole[4:11], warped(squares[4:11], maps[4:11], augment))
        assert torch.equal(whole, torch.cat([warped(squares[i : i + 1], maps[i : i + 1], augment) for i in range(20)]))
        assert torch.equal(whole, warped(squares.contiguous(), maps, augment))


def test_warping_never_makes_the_host_wait_and_leaves_its_input():
    squares, augment = images(3, 8), Augment(**ALL)
    before = squares.clone()
    with HostWaits() as waits:
        assert warped(squares.bfloat16(), random_affine(0, 0, np.arange(3), augment), augment).dtype == torch.float32
        warped(squares, random_affine(0, 0, np.arange(3), augment), augment)
    assert waits.count == 0
    assert torch.equal(squares, before)
