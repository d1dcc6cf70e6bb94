"""Block packs: images in blocks of 4 x 4 samples, of which a view is made in less time than a JPEG's header is read.

codec.py   an image's bytes: made, decoded, checked, and views of them
"""

from __future__ import annotations

from ijckd_fast.data.blocks.codec import (
    BITS,
    VIEW_COLUMNS,
    Bits,
    blocks_length,
    checksum,
    encode,
    planes,
    views,
)

__all__ = [
    "BITS",
    "VIEW_COLUMNS",
    "Bits",
    "blocks_length",
    "checksum",
    "encode",
    "planes",
    "views",
]
