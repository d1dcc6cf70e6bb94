"""Whether two programs answer alike: their logits on the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ijckd_fast.data import Batch
from ijckd_fast.errors import UserError

# Largest differences of logits that are allowed, in units of the largest logit: folding reorders sums, onnxruntime
# reorders fewer of them.
FOLDING_TOLERANCE = 1e-3
ONNX_TOLERANCE = 1e-4


class LogitsCompared(NamedTuple):
    """Logits of two programs on the same images.

    images         how many
    difference     largest absolute difference of two logits
    scale          largest absolute logit
    disagreements  images whose highest logit is another
    """

    images: int
    difference: float
    scale: float
    disagreements: int

    def within(self, tolerance: float) -> bool:
        """Whether the difference is at most `tolerance` times the largest logit; False for NaN."""
        return self.difference <= tolerance * self.scale


def compare_logits(logits: Tensor, expected: Tensor) -> LogitsCompared:
    """Both [N, K], of the same images; the scale is that of `expected`."""
    difference, scale = float((logits - expected).abs().max()), float(expected.abs().max())
    return LogitsCompared(len(expected), difference, scale, int((logits.argmax(1) != expected.argmax(1)).sum()))


def logits_of(programs: list[Callable[[Tensor], Tensor]], batches: Iterable[Batch]) -> list[Tensor]:
    """Each program's logits [N, K] of the same images, of which only one batch is held at a time.

    raises  UserError where there is no image
    """
    rows = [[program(batch.images.contiguous()) for program in programs] for batch in batches]
    if not rows:
        raise UserError("there is no image to compare the export on: the validation split is empty")
    return [torch.cat(column) for column in zip(*rows, strict=True)]


class AnswersDiffer(UserError):
    """An exported file does not compute what the trained net does."""


def refuse_beyond(compared: LogitsCompared, tolerance: float, what: str) -> None:
    """AnswersDiffer, which begins with `what`, unless the difference is within the tolerance."""
    if not compared.within(tolerance):
        raise AnswersDiffer(
            f"{what} by up to {compared.difference:.3g} on {compared.images} images, expected at most {tolerance:g} of "
            f"the largest logit, {compared.scale:.3g} ({compared.disagreements} answers differ); nothing was written"
        )
