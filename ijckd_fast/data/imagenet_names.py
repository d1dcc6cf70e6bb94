"""What people call the classes of ImageNet, which data folders call by WordNet's numbers (n01440764), or number, and
those of glyphs, which are called by code points (u4e00).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

_WNID = re.compile(r"n\d{8}")
_CODE_POINT = re.compile(r"u(?!d[89a-f]..$)[0-9a-f]{4}|u(?:[1-9a-f]|10)[0-9a-f]{4}")  # no half of a surrogate pair
_IMAGENET = 1000  # classes of ImageNet-1k


def class_names(classes: Sequence[str]) -> tuple[str, ...]:
    """A name for each class, for reports: its first WordNet lemma where it is one of ImageNet's, the character where it
    is a code point, else as it is called.

    classes  in the order of their labels. ImageNet's are called by their WordNet numbers; or there are 1000 that have
             no names of their own, only numbers: they are ImageNet-1k's, in the order of the sorted WordNet numbers.
             Characters are called as `ijckd-fast prepare-glyphs` does, u4e00, all of them
    """
    if len(classes) == _IMAGENET and all(name.isdecimal() and int(name) == i for i, name in enumerate(classes)):
        return tuple(_imagenet().values())
    if all(map(_CODE_POINT.fullmatch, classes)):
        return tuple(chr(int(name[1:], 16)) for name in classes)
    if not all(map(_WNID.fullmatch, classes)):
        return tuple(classes)
    known = _imagenet()
    return tuple(known.get(wnid) or _lemma(wnid) for wnid in classes)


@functools.cache
def _imagenet() -> dict[str, str]:
    """Short names of ImageNet-1k's classes by WordNet number, sorted: torchvision has the names, timm the numbers."""
    from timm.data import ImageNetInfo
    from torchvision.models import ResNet18_Weights

    names = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    return dict(zip(ImageNetInfo("imagenet-1k").label_names(), names, strict=True))


def _lemma(wnid: str) -> str:
    """Of a class of ImageNet-21k; the number itself where WordNet's list has none."""
    from timm.data import ImageNetInfo

    try:
        return ImageNetInfo("imagenet-22k").label_name_to_description(wnid, detailed=False).split(",")[0]
    except KeyError:
        return wnid
