"""Block packs: images in blocks of 4 x 4 samples, of which a crop's part alone can be decoded.

codec.py      an image's bytes: made, decoded, checked, and views of them
pack_file.py  a file of many images, with a table of where each lies
"""

from __future__ import annotations

from ijckd_fast.data.blocks.codec import (
    BITS,
    LANES,
    STAGES,
    VIEW_COLUMNS,
    Bits,
    blocks_length,
    check_rows,
    checksum,
    encode,
    planes,
    view_stages,
    views,
    views_at,
)
from ijckd_fast.data.blocks.pack_file import (
    REMEDY,
    SUFFIX,
    VERSION,
    BlockFile,
    bits_per_pixel,
    layout,
    open_file,
    read_blocks,
    room,
    write_file,
)

__all__ = [
    "BITS",
    "LANES",
    "REMEDY",
    "STAGES",
    "SUFFIX",
    "VERSION",
    "VIEW_COLUMNS",
    "Bits",
    "BlockFile",
    "bits_per_pixel",
    "blocks_length",
    "check_rows",
    "checksum",
    "encode",
    "layout",
    "open_file",
    "planes",
    "read_blocks",
    "room",
    "view_stages",
    "views",
    "views_at",
    "write_file",
]
