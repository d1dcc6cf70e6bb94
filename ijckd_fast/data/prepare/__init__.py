"""What makes data folders: downloaded archives (imagenet.py, cifar.py), the embedded digits, the glyphs of typefaces
(glyphs.py), and packs (packing.py).

The names below are imported when they are asked for: packs are made with torch's ops, folders are not.
"""

from __future__ import annotations

from ijckd_fast.lazy import exports

__all__, __getattr__ = exports(__name__, __file__)
