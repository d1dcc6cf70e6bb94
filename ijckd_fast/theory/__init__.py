"""The theory of distillation, measured beside its closed forms; no training, no torch.

`linear` (arXiv 2105.13093): a linear teacher distilled into linear and deep-linear students. `finite` (arXiv
2310.07838): what hard labels, the teacher's probability of one label, and all of its probabilities are worth. A study
draws data, measures what these predict, and writes a report.

The names below are imported when they are asked for.
"""

from __future__ import annotations

from ijckd_fast.lazy import exports

__all__, __getattr__ = exports(__name__, __file__)
