"""ijckd-fast: knowledge distillation through the teacher's own classifier (IJCKD, arXiv 2304.11004), with a fused head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "HAS_CUDA_LIBRARY",
    "FrozenClassifier",
    "classifier_gram",
    "classifier_loss",
    "connector_match",
    "projected_classifier_loss",
    "take_bad_rows",
]

if TYPE_CHECKING:
    from ijckd_fast.head import (
        FrozenClassifier,
        classifier_gram,
        classifier_loss,
        connector_match,
        projected_classifier_loss,
        take_bad_rows,
    )

    HAS_CUDA_LIBRARY: bool


def __getattr__(name: str) -> Any:
    # On first use only: `ijckd-fast --help` need not wait for torch, and `ijckd-fast doctor` can speak of a missing library.
    if name in __all__:
        from ijckd_fast import head

        return getattr(head, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
