"""What an image's RGB is: Pillow's, as torchvision has it."""

from __future__ import annotations

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """Alpha is dropped, 16-bit gray keeps its high byte."""
    if image.mode.startswith("I;16"):  # convert() would clip it at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
