"""The settings of a training run's images, as settings.py has the others.

To add one: its declaration here, and where it acts.
"""

# Annotations are read at run time (jsonargparse), so they are not postponed.
import functools
from dataclasses import dataclass
from typing import Literal

from ijckd_fast.setting import Trait, setting

# results/parity.csv: rounding alone makes 0.14 to 0.18 grey levels; the mildest mistake, a bicubic for the bilinear
# filter, 2.37 on ImageNet-like pictures and 1.12 to 1.20 on the digits; a shift by a pixel 13 and more.
MAX_DRIFT = 0.5

_image = functools.partial(setting, group="images")


@dataclass(frozen=True)
class Images:
    """Which images there are, and how they become input."""

    image_size: int = _image(224, "side of the square network input, pixels", Trait.PLAN | Trait.CACHED | Trait.TEACHER)
    scale: tuple[float, float] = _image(
        (0.08, 1.0), "random crop: least and most share of the image area", Trait.PLAN | Trait.CACHED
    )
    ratio: tuple[float, float] = _image(
        (3 / 4, 4 / 3), "random crop: least and most width / height", Trait.PLAN | Trait.CACHED
    )
    crop_padding: int = _image(
        0,
        "above 0: resize each image so that its shorter side is image_size (as it is, if it is), pad it by this "
        "many black pixels on every side and cut a square of image_size at a random place, instead of the "
        "random resized crop, its --scale and --ratio: CIFAR's usual augmentation (4)",
        Trait.PLAN | Trait.CACHED,
        least=0,
    )
    hflip: float = _image(0.5, "probability of a horizontal flip in training", Trait.PLAN | Trait.CACHED)
    affine_rotate: float = _image(
        0.0,
        "training: turn each cropped square by up to so many degrees in either direction, 0 to 180; 0: off. Together "
        "with the three below it is one affine map about the centre, sampled bilinearly",
        Trait.PLAN | Trait.CACHED,
        least=0,
    )
    affine_scale: float = _image(
        0.0,
        "training: scale width and height, each for itself, by 1 plus or minus up to this, below 1; 0: off",
        Trait.PLAN | Trait.CACHED,
        least=0,
    )
    affine_shear: float = _image(
        0.0,
        "training: slant by up to so many degrees to either side, below 90; 0: off",
        Trait.PLAN | Trait.CACHED,
        least=0,
    )
    affine_shift: float = _image(
        0.0,
        "training: shift along each side by up to this share of it in either direction, below 1; 0: off",
        Trait.PLAN | Trait.CACHED,
        least=0,
    )
    affine_fill: float = _image(
        0.0,
        "grey level, 0 to 255, of what these four show from outside of the square; 0: black, as crop_padding's border",
        Trait.PLAN | Trait.CACHED,
        least=0,
    )
    mixup: float = _image(
        0.0,
        "alpha of the blending of images in pairs, 0.1 to 1; 0: off. Both nets see the blend",
        Trait.PLAN | Trait.UNCACHED,
    )
    cutmix: float = _image(
        0.0,
        "alpha of the cutting of a box from one image into another, 0.1 to 1; 0: off. With mixup: either, at even odds",
        Trait.PLAN | Trait.UNCACHED,
    )
    repeats: int = _image(
        1,
        "views of each image in an epoch (repeated augmentation), of so many times fewer images",
        Trait.PLAN | Trait.UNCACHED,
    )
    sizes: tuple[str, ...] = _image(
        (),
        "progressive resizing, PIXELS@EPOCH of each change, e.g. 128@0,192@30; default: image_size throughout",
        Trait.PLAN | Trait.UNCACHED,
    )
    eval_resize: int | None = _image(
        None,
        "evaluation: shorter side before the centre crop, pixels; default: image_size * 256 / 224, with "
        "crop_padding image_size",
        Trait.PLAN | Trait.CACHED,
    )
    mean: tuple[float, float, float] | None = _image(
        None,
        "RGB mean that is subtracted from the student's images, in units of [0, 1]; default: what the student's "
        "first weights were made with (an earlier run's, the library's), else ImageNet's, 0.485,0.456,0.406",
        Trait.PLAN | Trait.CACHED,
    )
    std: tuple[float, float, float] | None = _image(
        None,
        "RGB deviation that they are divided by, likewise; ImageNet's is 0.229,0.224,0.225",
        Trait.PLAN | Trait.CACHED,
    )
    teacher_mean: tuple[float, float, float] | None = _image(
        None,
        "mean of the images that the teacher's weights expect; where it is another than --mean, the teacher's images "
        "are converted on the device; default: what its weights were made with (an earlier run's, the library's for "
        "published ones, --mean for a file where that is given)",
        Trait.CACHED | Trait.TEACHER,
    )
    teacher_std: tuple[float, float, float] | None = _image(
        None, "deviation of those images, likewise", Trait.CACHED | Trait.TEACHER
    )
    train_only: str | None = _image(
        None,
        "train only on images in whose path, train/u4e00/klee_regular.png, this regular expression finds a match, e.g. "
        "'/(noto-sans|kiloji)_'; every class must keep an image; default: all",
        Trait.PLAN | Trait.CACHED | Trait.INDEXES,
    )
    train_per_class: int | None = _image(
        None,
        "train on this many images per class only, of those of train_only; default: all",
        Trait.PLAN | Trait.CACHED | Trait.INDEXES,
        least=1,
    )
    label_noise: float = _image(
        0.0,
        "share of the training labels to replace by another class, in [0, 1]",
        Trait.PLAN | Trait.CACHED | Trait.INDEXES,
    )
    data_backend: Literal["auto", "dali", "blocks", "pillow", "synthetic"] = _image(
        "auto", "what decodes the images; auto: blocks for a block pack, else dali", Trait.PLAN | Trait.CACHED
    )
    index_verify: Literal["full", "fast"] = _image(
        "full", "first scan of the data: decode every file, or headers only", Trait.FREE | Trait.CACHED | Trait.INDEXES
    )
    check_files: bool = _image(
        False,
        "ask for the length and time of every image at the start, as ijckd-fast index does; default: of every "
        "folder, which does not show a file rewritten in place",
        Trait.FREE | Trait.CACHED | Trait.INDEXES,
    )
    unreadable_limit: int | None = _image(
        None,
        "files that may turn out unreadable during the run before it stops; until then another image of the "
        "class stands in for each; default: a thousandth of them, at least 8",
        Trait.FREE | Trait.CACHED,
        least=0,
    )
    max_drift: float = _image(
        MAX_DRIFT,
        "how far the pixels of DALI, or of the block executor, may be from Pillow's before the run is refused, mean "
        "absolute difference in grey levels of 0..255; twice as far for a single image",
        Trait.FREE | Trait.CACHED,
        least=0,
    )
    workers: int = _image(
        0,
        "decoding threads; 0: with a GPU one for each core this process may use but one, without 2, since the "
        "nets compute there",
        Trait.FREE | Trait.CACHED | Trait.PER_PROCESS,
        least=0,
    )
    decode: Literal["cpu", "hybrid", "gpu"] = _image(
        "cpu",
        "DALI on a GPU: all on the decoding threads (cpu), decode there and resize on the GPU (hybrid), or "
        "decode on the GPU too; pixels are Pillow's but for rounding unless the GPU decodes",
        Trait.PLAN | Trait.CACHED,
    )
    hw_decoder_load: float = _image(
        0.65,
        "decode gpu: share of the images for the GPU's JPEG engine, in [0, 1]; the more threads, the less of it",
        Trait.CACHED | Trait.PER_PROCESS,
    )
    blocks_on: Literal["pinned", "gpu", "copies"] = _image(
        "pinned",
        "a block pack and a GPU, which makes the views: of blocks in the host's pinned memory (pinned), in the "
        "GPU's own, which then holds the whole pack (gpu), or of copies of each batch's images (copies); where the "
        "pack does not fit, the next of gpu, pinned, copies serves",
        Trait.FREE | Trait.CACHED | Trait.PER_PROCESS,
    )
    prefetch: int = _image(2, "batches decoded ahead", Trait.FREE | Trait.CACHED | Trait.PER_PROCESS, least=1)
