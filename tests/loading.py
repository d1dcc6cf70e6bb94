"""Batches of the data tests: how they are collected and compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ijckd_fast.data import Augment, Batch, EvalPlan, Index, Plan, TrainPlan, make_loader

AUGMENT = Augment(image_size=24, eval_resize=28)
EXECUTORS = ["dali", "pillow"]  # of image files


def batches(backend: str, plan: Plan, **settings: Any) -> list[Batch]:
    with make_loader(backend, plan, **settings) as loader:
        return list(loader)


def identical(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        (x is None and y is None) or torch.equal(x, y)
        for p, q in zip(a, b, strict=True)
        for x, y in zip(p, q, strict=True)
    )


def assert_same_batches(backend: str, a: Index, b: Index) -> None:
    """The same images, labels and sample numbers, to the bit, in training and in evaluation."""
    assert identical(*(batches(backend, TrainPlan(index, AUGMENT, 7, 3), stop=5) for index in (a, b)))
    assert identical(*(batches(backend, EvalPlan(index, AUGMENT, 7)) for index in (a, b)))


def pixels(images: torch.Tensor) -> np.ndarray:
    """[B, S, S, 3] float64 in 0..255, the normalisation undone."""
    mean, std = (np.array(values) for values in (AUGMENT.mean, AUGMENT.std))
    return 255 * (images.permute(0, 2, 3, 1).double().numpy() * std + mean)
