"""What reports call ImageNet's classes."""

from __future__ import annotations

from ijckd_fast.data import class_names


def test_numbers_and_wordnet_numbers_of_imagenet():
    names = class_names([str(i) for i in range(1000)])
    assert len(set(names)) > 997  # two pairs of its classes share a lemma
    assert (names[0], names[7], names[388], names[999]) == ("tench", "cock", "giant panda", "toilet tissue")
    assert class_names(["n01440764", "n02510455"]) == ("tench", "giant panda")
    assert class_names([f"{i:03d}" for i in range(1000)]) == names


def test_other_classes_have_their_own_names():
    for classes in (["cat", "n01440764"], ["0", "1"], [str(i + 1) for i in range(1000)], ["n0144076"]):
        assert class_names(classes) == tuple(classes)


def test_classes_that_are_code_points_have_their_characters():
    assert class_names(["u4e00", "u9fa5", "u20000"]) == ("一", "龥", "\U00020000")
    for classes in (["u4e00", "cat"], ["u4E00"], ["u4e0"], ["ud800"], ["u110000"], ["u04e00"]):
        assert class_names(classes) == tuple(classes)


def test_classes_of_imagenet_21k():
    assert class_names(["n00005787", "n99999999"]) == ("benthos", "n99999999")
