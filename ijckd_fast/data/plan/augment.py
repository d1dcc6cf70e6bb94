"""How images become network input: the settings of it."""

from __future__ import annotations

from dataclasses import dataclass

from ijckd_fast.errors import UserError
from ijckd_fast.normalisation import IMAGENET, Channels, Normalisation


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
        Normalisation(self.mean, self.std)  # refuses other units


def check_views(views: int, augment: Augment) -> None:
    """UserError unless a fixed number of views of each image, and nothing beside them, can be what training sees."""
    if views < 1:
        raise UserError(f"the number of views of each image must be at least 1, found {views}")
    more = [f"{name} {value:g}" for name in ("mixup", "cutmix") if (value := getattr(augment, name))]
    more += [f"repeats {augment.repeats}"] if augment.repeats > 1 else []
    more += ["progressive sizes"] if augment.sizes else []
    if more:
        raise UserError(
            "a fixed number of views (a teacher's cache) means crops and flips of single images of one size, found "
            f"{' and '.join(more)}, of which no view is the same as before: leave that out, or train with the teacher "
            "itself"
        )
