"""Several methods in several regimes on one dataset, several seeds each, with intervals; the demo is one of them.

A comparison is a YAML file (`load_comparison`). `train_all` trains what is not there yet, `write_comparison_report`
puts the runs into tables and plots.

The names below are imported when they are asked for: what a comparison is, is known without torch.
"""

from __future__ import annotations

from ijckd_fast.lazy import exports

__all__, __getattr__ = exports(__name__, __file__)
