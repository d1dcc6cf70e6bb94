"""How timm builds the student from student.safetensors, where it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ijckd_fast.export.answers import FOLDING_TOLERANCE, compare_logits
from ijckd_fast.export.deployed import random_images
from ijckd_fast.nets import Tapped


def timm_options(path: Path, student: Tapped, image_size: int) -> dict[str, Any] | None:
    """What to give timm.create_model beside checkpoint_path=path so that it answers as the student does.

    path     the student's weights in its library's names
    student  the net they are of
    returns  None where timm builds no net of that name with these layers and answers
    """
    import timm

    images = random_images(image_size)
    name = student.name.rpartition("/")[2]
    if not timm.is_model(name):
        return None
    options: dict[str, Any] = {
        "model_name": name,
        "num_classes": 0 if student.classifier is None else student.num_classes,
    }
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        options["img_size"] = image_size
    try:
        answer = timm.create_model(**options, checkpoint_path=str(path)).eval()(images)
    except (RuntimeError, TypeError, ValueError):
        return None  # torchvision's net of this name has other layers, or other names for them
    expected = student.features(images)[1] if student.classifier is None else student(images)
    same = answer.shape == expected.shape and compare_logits(answer, expected).within(FOLDING_TOLERANCE)
    return options if same else None
