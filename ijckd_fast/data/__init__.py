"""From folders of images to batches.

blocks/    images in blocks of samples: their bytes, their views
sources/   the kinds of data folders: how each is recognised, listed and read
index/     the images of a split, each looked at once
plan/      what every batch is, before an image is opened
load/      executors, which make its pixels
prepare/   what makes data folders: downloaded archives, the digits, packs
Each stands on those above it alone; all draw from counter_rng.py. imagenet_names.py: what people call the classes.

The names below are imported when they are asked for: what looks at files needs no torch.
"""

from __future__ import annotations

from ijckd_fast.lazy import exports

__all__, __getattr__ = exports(__name__, __file__)
