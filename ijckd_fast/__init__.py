"""ijckd-fast: knowledge distillation through the teacher's own classifier (IJCKD, arXiv 2304.11004), with a fused head.

The names below are imported when they are asked for: `import ijckd_fast` needs nothing, the ops need torch alone.
"""

from __future__ import annotations

from ijckd_fast.lazy import exports

__version__ = "0.1.0"
__all__, __getattr__ = exports(__name__, __file__)
