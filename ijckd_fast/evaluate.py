"""Accuracy of a net on a split: top-1, top-5, and how often it agrees with the teacher."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ijckd_fast.data import Batch
from ijckd_fast.errors import UserError


class Evaluation(NamedTuple):
    """Shares of the split's images in percent.

    top1, top5   where the label is the highest, or among the five highest logits (all of them if K < 5)
    agreement    where the highest logit is the teacher's highest; None if there was no teacher to compare with
    images       how many there were, each counted once
    seconds      wall clock, reading the images included
    predictions  [images] int64 on the CPU, in the order of the loader
    """

    top1: float
    top5: float
    agreement: float | None
    images: int
    seconds: float
    predictions: Tensor

    def row(self) -> dict[str, float | int | None]:
        """As written to log.jsonl, units in the key names."""
        return {
            "top1_percent": self.top1,
            "top5_percent": self.top5,
            "agreement_percent": self.agreement,
            "images": self.images,
            "images_per_s": self.images / self.seconds,
            "seconds": self.seconds,
        }


@torch.no_grad()
def evaluate(
    logits_of: Callable[[Tensor], Tensor],
    loader: Iterable[Batch],
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    teacher: Tensor | None = None,
) -> Evaluation:
    """One pass over `loader` (each image once); the host waits for the device once, at the end.

    logits_of  images [B, 3, S, S] -> logits [B, K], e.g. Distiller.predict or Distiller.teacher_logits
    amp_dtype  autocast to it; None: float32
    teacher    [images] int64, the teacher's predictions in the loader's order (Evaluation.predictions of it)
    raises     UserError when the loader gives no image
    """
    start = time.perf_counter()
    hits = torch.zeros(2, dtype=torch.int64, device=device)  # top-1, top-5
    predictions = []
    for images, labels, _ids in loader:
        with torch.autocast(device.type, amp_dtype or torch.bfloat16, enabled=amp_dtype is not None):
            logits = logits_of(images)  # [B, K]
        highest = logits.topk(min(5, logits.shape[1]), 1).indices  # [B, 5]
        hit = highest == labels[:, None]
        hits += torch.stack([hit[:, 0].sum(), hit.any(1).sum()])
        predictions.append(highest[:, 0])
    if not predictions:
        raise UserError("there is no image to evaluate on: the validation split is empty")
    predicted = torch.cat(predictions).cpu()
    images_seen = len(predicted)
    top1, top5 = (100 * count / images_seen for count in hits.tolist())
    agreement = None if teacher is None else 100 * (predicted == teacher).sum().item() / images_seen
    return Evaluation(top1, top5, agreement, images_seen, time.perf_counter() - start, predicted)
