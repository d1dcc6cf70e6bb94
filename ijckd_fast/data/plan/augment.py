"""How images become network input: the settings of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ijckd_fast.errors import UserError
from ijckd_fast.normalisation import IMAGENET, Channels, Normalisation

AFFINE_OFF: dict[str, Any] = dict.fromkeys(
    ("affine_rotate", "affine_scale", "affine_shear", "affine_shift", "affine_fill"), 0.0
)
"""The settings of training's warps, as they are where there are none."""


@dataclass(frozen=True)
class Augment:
    """How images become network input.

    image_size   side of the square input, pixels
    scale        training crop's share of the image area, (least, most), in (0, 1]
    ratio        training crop's width / height, (least, most)
    crop_padding above 0: training's padded crop instead of the random resized crop, and so of scale and ratio. The
                 image is resized so that its shorter side is image_size (not touched where it is), gets a border of so
                 many black pixels on every side, and a square of image_size is cut at a random place: torchvision's
                 RandomCrop(image_size, padding). With sizes the epoch's side takes image_size's place, and the border
                 stays as wide
    hflip        probability of a horizontal flip in training
    affine_rotate, affine_scale, affine_shear, affine_shift
                 training's warp, an affine map of each cropped, resized and flipped square; all 0: none. How far, to
                 either side, it turns (degrees, in [0, 180]), scales width and height (difference from 1, in [0, 1)),
                 slants (degrees, in [0, 90)) and shifts (share of the side, in [0, 1)): see random_affine
    affine_fill  grey level, in [0, 255], of what a warp shows from outside of the square: black, as a padded crop's
                 border
    eval_resize  shorter side before the evaluation's centre crop, pixels; at least image_size
    mean, std    per RGB channel, in units of [0, 1]
    mixup        alpha of the Beta distribution that two training images are blended by (Zhang et al. 2018), in [0.1,
                 1]; 0 = off
    cutmix       alpha of the one that a box is cut from the one into the other by (Yun et al. 2019), likewise; with
                 both, each pair of images takes one of the two at even odds
    repeats      views of each image in an epoch, side by side in the batches (repeated augmentation, Hoffer et al.
                 2020); the epoch keeps its length and sees so many times fewer images
    sizes        progressive resizing: (first epoch, side) pairs, epochs rising from 0, instead of image_size in
                 training
    raises       UserError for values that make no sense
    """

    image_size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_padding: int = 0
    hflip: float = 0.5
    affine_rotate: float = 0.0
    affine_scale: float = 0.0
    affine_shear: float = 0.0
    affine_shift: float = 0.0
    affine_fill: float = 0.0
    eval_resize: int = 256
    mean: Channels = IMAGENET.mean
    std: Channels = IMAGENET.std
    mixup: float = 0.0
    cutmix: float = 0.0
    repeats: int = 1
    sizes: tuple[tuple[int, int], ...] = ()

    def size_at(self, epoch: int) -> int:
        """Side of the training images in an epoch, pixels."""
        return next((size for first, size in reversed(self.sizes) if first <= epoch), self.image_size)

    @property
    def warps(self) -> bool:
        """Whether training warps its squares."""
        return any((self.affine_rotate, self.affine_scale, self.affine_shear, self.affine_shift))

    def __post_init__(self) -> None:
        for name, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            if alpha != 0 and not 0.1 <= alpha <= 1:
                raise UserError(
                    f"{name} must be an alpha from 0.1 to 1, or 0 for none, found {alpha}; 0.2 and 1 are usual"
                )
        if self.repeats < 1:
            raise UserError(f"repeats (views of an image in an epoch) must be at least 1, found {self.repeats}")
        epochs = [epoch for epoch, _ in self.sizes]
        if self.sizes and (epochs[0] != 0 or epochs != sorted(set(epochs)) or min(size for _, size in self.sizes) < 1):
            raise UserError(
                f"sizes must be (first epoch, side in pixels) pairs with epochs rising from 0, found {self.sizes}; as "
                "settings e.g. 128@0,192@30"
            )
        if self.image_size < 1:
            raise UserError(f"image_size must be at least 1 pixel, found {self.image_size}")
        if self.eval_resize < self.image_size:
            raise UserError(
                f"eval_resize (the shorter side before the centre crop) must be at least image_size = "
                f"{self.image_size}, found {self.eval_resize}; set it to {self.image_size} for no margin"
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"scale must be two area fractions with 0 < least <= most <= 1, found {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"ratio must be two aspect ratios with 0 < least <= most, found {self.ratio}")
        side = min([self.image_size, *(size for _, size in self.sizes)])
        if not 0 <= self.crop_padding < side:
            raise UserError(
                f"crop_padding must be from 0 (off) to {side - 1} pixels, so that a crop always holds some of its "
                f"image of {side}, found {self.crop_padding}; 4 is usual for 32"
            )
        if self.crop_padding and (self.scale, self.ratio) != (Augment.scale, Augment.ratio):
            raise UserError(
                f"crop_padding {self.crop_padding} replaces the random resized crop, to which scale and ratio belong: "
                f"expected both unset, or at their defaults {Augment.scale} and {Augment.ratio}, found {self.scale} "
                f"and {self.ratio}; leave them out, or crop_padding"
            )
        if not 0 <= self.hflip <= 1:
            raise UserError(f"hflip must be a probability between 0 and 1, found {self.hflip}")
        self._refuse_impossible_warps()
        Normalisation(self.mean, self.std)  # refuses other units

    def _refuse_impossible_warps(self) -> None:
        if not 0 <= self.affine_rotate <= 180:
            raise UserError(
                f"affine_rotate must be from 0 (off) to 180 degrees, found {self.affine_rotate}; 10 turns by up to 10 "
                "in either direction"
            )
        if not 0 <= self.affine_scale < 1:
            raise UserError(
                f"affine_scale must be from 0 (off) to below 1, found {self.affine_scale}; 0.2 draws scales from 0.8 "
                "to 1.2"
            )
        if not 0 <= self.affine_shear < 90:
            raise UserError(
                f"affine_shear must be from 0 (off) to below 90 degrees, found {self.affine_shear}; 10 slants by up to "
                "10 to either side"
            )
        if not 0 <= self.affine_shift < 1:
            raise UserError(
                f"affine_shift must be a share of the side from 0 (off) to below 1, found {self.affine_shift}; 0.1 "
                "shifts by up to a tenth"
            )
        if not 0 <= self.affine_fill <= 255:
            raise UserError(
                f"affine_fill must be a grey level from 0 (black) to 255 (white), found {self.affine_fill}; choose the "
                "images' background"
            )
        if self.affine_fill and not self.warps:
            raise UserError(
                f"affine_fill {self.affine_fill:g} is what warps show from outside of the image: expected one of "
                "affine_rotate, affine_scale, affine_shear and affine_shift above 0 beside it, found none; set one, or "
                "leave affine_fill out"
            )


def check_views(views: int, augment: Augment) -> None:
    """UserError unless a fixed number of views of each image, and nothing beside them, can be what training sees."""
    if views < 1:
        raise UserError(f"the number of views of each image must be at least 1, found {views}")
    more = [f"{name} {value:g}" for name in ("mixup", "cutmix") if (value := getattr(augment, name))]
    more += [f"repeats {augment.repeats}"] if augment.repeats > 1 else []
    more += ["progressive sizes"] if augment.sizes else []
    if more:
        raise UserError(
            "a fixed number of views (a teacher's cache) means crops, flips and warps of single images of one "
            f"size, found {' and '.join(more)}, of which no view is the same as before: leave that out, or train with "
            "the teacher itself"
        )
