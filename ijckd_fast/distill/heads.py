"""Which implementation of the ops computes the losses: --head."""

from __future__ import annotations

from types import ModuleType

HEADS = ("fused", "reference")


def ops_of(head: str) -> ModuleType:
    """'fused': the C++/CUDA ops; 'reference': plain PyTorch. Both have the same names, e.g. connector_match.

    Imported here and not above, so that help and settings can be read where the ops are not built.
    """
    from ijckd_fast import head as ops
    from ijckd_fast.head import reference

    return ops if head == "fused" else reference
