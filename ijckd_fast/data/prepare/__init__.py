"""What makes data folders: downloaded archives (imagenet.py, cifar.py), the embedded digits, the glyphs of typefaces
(glyphs.py), and packs (packing.py).
"""

from __future__ import annotations

from ijckd_fast.data.prepare.cifar import prepare_cifar
from ijckd_fast.data.prepare.digits import write_digits
from ijckd_fast.data.prepare.glyphs import prepare_glyphs
from ijckd_fast.data.prepare.imagenet import prepare_imagenet
from ijckd_fast.data.prepare.pack_blocks import BlockPack
from ijckd_fast.data.prepare.pack_jpeg import JpegPack
from ijckd_fast.data.prepare.pack_loss import PackLoss, pack_loss
from ijckd_fast.data.prepare.pack_report import pack_table
from ijckd_fast.data.prepare.packing import pack

__all__ = [
    "BlockPack",
    "JpegPack",
    "PackLoss",
    "pack",
    "pack_loss",
    "pack_table",
    "prepare_cifar",
    "prepare_glyphs",
    "prepare_imagenet",
    "write_digits",
]
