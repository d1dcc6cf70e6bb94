"""Nets to distil from and into: by name, with their taps, their weights and what they cost.

`create_model` builds one of ours, torchvision's or timm's nets and returns it as a `Tapped`: its map, its pooled
features and its classifier, however the net is written. timm and torchvision are imported only when a name is looked up
in them.

The names below are imported when they are asked for: whether a name is a model's, `listed.py` knows without torch.
"""

from ijckd_fast.lazy import exports

__all__, __getattr__ = exports(__name__, __file__)
