"""Answers against chance: who passes, who does not, whatever the number of classes, of images and their shares."""

import numpy as np
import pytest
from scipy import stats

from ijckd_fast.evaluate import LEVEL, against_chance


def balanced(num_classes: int, images: int) -> np.ndarray:
    return np.arange(images) % num_classes


@pytest.mark.parametrize(
    ("num_classes", "images", "needed"), [(2, 20, 18), (2, 1000, 550), (3, 18, 13), (10, 1000, 131), (1000, 1000, 6)]
)
def test_of_equal_classes_the_hits_are_binomial(num_classes, images, needed):
    labels = balanced(num_classes, images)
    found = against_chance(np.roll(labels, 1), labels, num_classes)
    assert (found.hits, found.expected, found.needed) == (0, images / num_classes, needed)
    by_chance = stats.binom(images, 1 / num_classes)
    assert by_chance.sf(needed - 1) < LEVEL <= by_chance.sf(needed - 2)
    half = against_chance(np.where(np.arange(images) < needed, labels, (labels + 1) % num_classes), labels, num_classes)
    np.testing.assert_allclose(half.probability, by_chance.sf(half.counted - 1), rtol=1e-6)
    assert half.passed == (num_classes < 50)  # of many classes the five best do not count


def test_of_unequal_classes_it_is_the_sum_of_their_binomials():
    rng = np.random.default_rng(0)
    labels = rng.choice(4, 60, p=(0.5, 0.3, 0.15, 0.05))
    predictions = np.where(rng.random(60) < 0.3, labels, rng.choice(4, 60))
    found = against_chance(predictions, labels, 4)
    each = np.bincount(labels, minlength=4)[predictions] / 60
    density = np.ones(1)
    for share in each:
        density = np.convolve(density, [1 - share, share])
    np.testing.assert_allclose(found.probability, density[found.hits :].sum(), rtol=1e-9)
    np.testing.assert_allclose(found.expected, each.sum())


@pytest.mark.parametrize(("num_classes", "images"), [(2, 40), (2, 5000), (10, 300), (100, 1000), (1000, 1000)])
def test_random_answers_do_not_pass_and_a_sane_teacher_does(num_classes, images):
    labels = balanced(num_classes, images)
    for seed in range(50):
        rng = np.random.default_rng(seed)
        random = rng.integers(0, num_classes, images)
        assert not against_chance(random, labels, num_classes).passed
        sane = np.where(rng.random(images) < (0.3 if num_classes > 2 else 0.85), labels, random)
        assert against_chance(sane, labels, num_classes).passed


def test_two_lucky_hits_of_a_thousand_are_chance():
    labels = balanced(1000, 1000)
    predictions = np.roll(labels, 1)
    predictions[[3, 700]] = labels[[3, 700]]
    assert not against_chance(predictions, labels, 1000).passed


def test_one_answer_to_everything_is_chance_however_unequal_the_classes():
    labels = np.repeat([0, 1], [995, 5])
    constant = against_chance(np.zeros(1000, int), labels, 2)
    assert (constant.hits, constant.expected, constant.passed, constant.enough) == (995, 995, False, True)
    # Five right of fifty alarms: fewer hits than the constant's, and far more than chance.
    alarmed = against_chance((np.arange(1000) >= 950).astype(int), labels, 2)
    assert alarmed.hits == 955
    assert alarmed.passed


def test_a_few_classes_that_keep_their_place_in_another_order_do_not_pass():
    labels = balanced(1000, 50_000)
    order = np.roll(np.arange(1000), 1)
    order[:4] = np.arange(4)
    order[4] = 999
    found = against_chance(order[labels], labels, 1000)
    assert (found.hits, found.counted, found.passed) == (200, 0, False)


@pytest.mark.parametrize(("num_classes", "images"), [(2, 9), (3, 6), (1000, 7)])
def test_of_too_few_images_not_even_right_answers_pass(num_classes, images):
    labels = balanced(num_classes, images)
    found = against_chance(labels, labels, num_classes)
    assert (found.hits, found.passed, found.enough) == (images, False, False)


@pytest.mark.parametrize(("num_classes", "images"), [(2, 10), (3, 9), (1000, 11)])
def test_a_few_more_are_enough(num_classes, images):
    labels = balanced(num_classes, images)
    assert against_chance(labels, labels, num_classes).passed
    assert against_chance(np.zeros_like(labels), labels, num_classes).enough


def test_weak_is_what_passes_below_twice_chance():
    labels = balanced(2, 10_000)
    for share, weak in ((0.55, True), (0.7, False)):
        predictions = np.where(np.arange(10_000) < 10_000 * share, labels, 1 - labels)
        found = against_chance(predictions, labels, 2)
        assert (found.passed, found.weak) == (True, weak)
