"""The names of the nets for small images, and which net each of them is."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from ijckd_fast.errors import UserError

if TYPE_CHECKING:
    from torch import nn

_DEPTHS_OF_VGG = (8, 11, 13, 16, 19)
_WIDTHS_OF_SHUFFLENET_V2 = (0.5, 1.0, 1.5)
_WIDTH = r"(\d+(?:\.\d+)?)"
_RESNET = re.compile(rf"resnet(8|14|20|32|38|44|56|110|116)(?:x{_WIDTH})?")
_WIDE_RESNET = re.compile(r"wrn_(10|16|22|28|34|40)_([1-9]\d?)")
_VGG = re.compile(r"vgg(8|11|13|16|19)")
_MOBILENET_V2 = re.compile(rf"mobilenetv2x{_WIDTH}")
_SHUFFLENET_V2 = re.compile(rf"shufflenetv2x{_WIDTH}")

# The usual ones, for suggestions and help; other widths are built too.
NAMES = [
    *(f"resnet{depth}{width}" for depth in (8, 14, 20, 32, 38, 44, 56, 110, 116) for width in ("", "x2", "x4")),
    *(f"wrn_{depth}_{width}" for depth in (16, 40) for width in (1, 2, 4)),
    *(f"vgg{depth}" for depth in _DEPTHS_OF_VGG),
    *("resnet50", "mobilenetv2x0.5", "mobilenetv2x1", "shufflenetv1"),
    *(f"shufflenetv2x{width:g}" for width in _WIDTHS_OF_SHUFFLENET_V2),
]

# What the toolboxes of CRD and SimKD call nets of other names here, in lower case.
TOOLBOX_NAMES = {
    "resnet50": "resnet50",
    "mobilenetv2": "mobilenetv2x0.5",
    "mobile_half": "mobilenetv2x0.5",
    "mobilenetv2_1_0": "mobilenetv2x1",
    "shufflev1": "shufflenetv1",
    "shufflev2": "shufflenetv2x1",
    "shufflev2_1_5": "shufflenetv2x1.5",
}

# Those of them that torchvision has too: alone they mean torchvision's net, ours is 'cifar/NAME'.
SHARED_NAMES = ("resnet50", "vgg11", "vgg13", "vgg16", "vgg19")


def builder(name: str) -> Callable[[int], nn.Module] | None:
    """What makes the net of this name from a number of classes K; None for no name of ours.

    name     resnet{8,14,20,32,38,44,56,110,116}, alone or with x<width>; resnet50; wrn_<depth>_<width>;
             vgg{8,11,13,16,19}; mobilenetv2x<width>; shufflenetv1; shufflenetv2x{0.5,1,1.5}
    returns  (K) -> module [B, 3, S, S] -> logits [B, K], float32
    raises   UserError for a width of 0, or one that the net does not have
    """
    if not is_name(name):
        return None
    from ijckd_fast.nets import cifar  # here: names are known without torch

    if found := _RESNET.fullmatch(name):
        depth, width = int(found[1]), float(found[2] or "1")
        return lambda num_classes: cifar.SmallResNet(depth, width, num_classes)
    if found := _WIDE_RESNET.fullmatch(name):
        depth, factor = int(found[1]), int(found[2])
        return lambda num_classes: cifar.WideResNet(depth, factor, num_classes)
    if found := _VGG.fullmatch(name):
        layers = int(found[1])
        return lambda num_classes: cifar.SmallVGG(layers, num_classes)
    if found := _MOBILENET_V2.fullmatch(name):
        width = float(found[1])
        return lambda num_classes: cifar.SmallMobileNetV2(width, num_classes)
    if found := _SHUFFLENET_V2.fullmatch(name):
        width = float(found[1])
        return lambda num_classes: cifar.SmallShuffleNetV2(width, num_classes)
    return {"resnet50": cifar.SmallResNet50, "shufflenetv1": cifar.SmallShuffleNetV1}[name]


def is_name(name: str) -> bool:
    """Whether `builder` has a net of this name. UserError for a width of 0, or one that the net does not have."""
    for form in (_RESNET, _MOBILENET_V2, _SHUFFLENET_V2):
        if found := form.fullmatch(name):
            width = _positive(name, found[found.re.groups] or "1")
            if form is _SHUFFLENET_V2 and width not in _WIDTHS_OF_SHUFFLENET_V2:
                widths = ", ".join(f"{w:g}" for w in _WIDTHS_OF_SHUFFLENET_V2)
                raise UserError(
                    f"model {name!r}: ShuffleNetV2 has widths {widths} here, got {width:g}: choose one of them"
                )
            return True
    of_fixed_width = _WIDE_RESNET.fullmatch(name) or _VGG.fullmatch(name)
    return of_fixed_width is not None or name in ("resnet50", "shufflenetv1")


def _positive(name: str, width: str) -> float:
    if float(width) == 0:
        stem = name[: name.rindex("x")]
        raise UserError(f"model {name!r}: the width after 'x' must be greater than 0, e.g. '{stem}x0.5'")
    return float(width)


def small_form_hint(name: str) -> str:
    """Returns "" or "; for small images there is 'cifar/NAME'", for a library's net that we have in that form too."""
    short = name.rpartition("/")[2]
    if short not in SHARED_NAMES or name.startswith("cifar/"):
        return ""
    return f"; for small images there is 'cifar/{short}'"
