"""The smallest data and settings that exercise a whole training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_tree import photo
from PIL import Image

from ijckd_fast.nets import create_model
from ijckd_fast.train import TrainConfig, make_config

SETTINGS: dict[str, Any] = {
    "student": "resnet8x0.25",
    "objective": "ce",
    "image_size": 16,
    "eval_resize": 16,
    "epochs": 5,
    "batch_size": 8,  # 36 images: 4 steps per epoch
    "lr": 0.05,
    "log_interval": 4,
    "eval_every": 5,
    "data_backend": "pillow",
    "device": "cpu",
    "tensorboard": False,
}


def write_tree(root: Path) -> Path:
    """root/{train,val} with three classes, 36 and 18 images, which a small net tells apart by their tint in seconds."""
    for split, images in (("train", 12), ("val", 6)):
        for channel, name in enumerate(("ant", "bee", "cat")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for n in range(images):
                pixels = np.asarray(photo(20, 24, seed=1000 * channel + 100 * images + n)) // 2
                pixels[:, :, channel] += 80
                Image.fromarray(pixels).save(folder / f"{n:03d}.jpg", quality=92)
    return root


def write_teacher(path: Path, classes: int = 3) -> Path:
    """A file with random weights of resnet8x0.5."""
    torch.manual_seed(1)
    torch.save(create_model("resnet8x0.5", classes, image_size=16).native_state_dict(), path)
    return path


def settings(data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {**SETTINGS, "data_dir": str(data), "output_dir": str(output), **changes}


def config(data: Path, output: Path, **changes: Any) -> TrainConfig:
    return make_config(settings(data, output, **changes))


def distilled(teacher: Path) -> dict[str, Any]:
    """Settings that turn a plain run into one by the whole objective, from a teacher of random weights."""
    return {
        "objective": "ijckd",
        "teacher": "resnet8x0.5",
        "teacher_checkpoint": str(teacher),
        "allow_weak_teacher": True,
    }


def options(values: dict[str, Any]) -> list[str]:
    """The same settings on the command line."""
    words = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return words


def differing(a: Any, b: Any, where: str = "") -> list[str]:
    """Places at which two checkpoints (nested dicts, lists, tensors, numbers) do not have the same bits."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [f"{where}.{key}" for key in a.keys() ^ b.keys()]
        return keys + [place for key in a.keys() & b.keys() for place in differing(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [place for i in range(len(a)) for place in differing(a[i], b[i], f"{where}[{i}]")]
    return [] if a == b else [where]
