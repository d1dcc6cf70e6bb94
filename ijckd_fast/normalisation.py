"""How pixels become numbers for a net: the mean that is subtracted and the deviation that is divided by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from ijckd_fast.errors import UserError

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Normalisation:
    """(pixel - mean) / std per RGB channel, all in units of [0, 1].

    raises  UserError for other units, 0..255 above all, and for other than three numbers
    """

    mean: Channels
    std: Channels

    @classmethod
    def of(cls, mean: Iterable[float], std: Iterable[float]) -> Normalisation:
        """From what a file or a library has, such as lists."""
        return cls(cast("Channels", tuple(mean)), cast("Channels", tuple(std)))  # which looks at the lengths

    def __post_init__(self) -> None:
        mean, std = self.mean, self.std
        if len(mean) != 3 or len(std) != 3:
            raise UserError(f"mean and std must be three numbers each, for red, green and blue, found {mean} and {std}")
        if all(0 <= value <= 1 for value in mean) and all(0 < value <= 1 for value in std):
            return
        in_levels = all(0 <= value <= 255 for value in mean) and all(0 < value <= 255 for value in std)
        remedy = "divide them by 255" if in_levels else f"ImageNet's are {IMAGENET.mean} and {IMAGENET.std}"
        raise UserError(
            "mean and std must be in units of [0, 1] (each mean from 0 to 1, each std above 0 and at most 1), found "
            f"mean {mean} and std {std}: {remedy}"
        )

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean}, std {std}"


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""What the training images of ImageNet have, as torchvision's nets take it."""
