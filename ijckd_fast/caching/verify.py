"""Asks the teacher again for some of the views that a cache holds."""

from __future__ import annotations

import secrets
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ijckd_fast.caching.views import PlannedViews

_ROUNDING = 2.0**-8  # of a stored number: bfloat16 has 8 bits

# By autocast's type. In float32 sums come in another order, and a GPU may take TF32 products. The half types also round
# what each layer puts out: 8 units in their last place, of 8 and of 11 bits.
_DRIFT = {None: 2.0**-10, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}


def allowed_difference(again: Tensor, amp_dtype: torch.dtype | None) -> Tensor:
    """How far a stored feature may be from the one that is computed again in another batch.

    again      [n, Ct] float32, computed again
    amp_dtype  autocast's type of both computations; None: float32
    returns    [n, Ct]: bfloat16's rounding of the stored number, and a share of the largest feature of its image
    """
    return _ROUNDING * again.abs() + _DRIFT[amp_dtype] * again.abs().amax(1, keepdim=True)


class Verified(NamedTuple):
    """How many views agree, the largest absolute difference of a feature, a sentence for each that does not agree."""

    agree: int
    largest: float | None  # None: nothing was compared
    wrong: list[str]


def verify_cache(views: PlannedViews, count: int, seed: int | None, amp_dtype: torch.dtype | None) -> Verified:
    """Compares `count` views of a full cache, drawn from all, with the teacher; seed None: another draw each time."""
    if count == 0:
        return Verified(0, None, [])
    seed = secrets.randbits(32) if seed is None else seed
    index, writer = views.index, views.writer
    total = writer.layout.views * len(index)
    drawn = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))  # view * N + id
    drawn = drawn[~np.isin(drawn % len(index), list(writer.unreadable))]
    batches = views.batches(
        (view, (drawn[drawn // len(index) == view] % len(index)).tolist())
        for view in np.unique(drawn // len(index)).tolist()
    )
    agree, largest = 0, 0.0
    wrong = []
    with views.loader(batches) as loader:
        for (view, ids), batch in zip(batches, loader, strict=True):
            assert loader.followed is not None
            again = views.features(batch.images).cpu()  # [n, Ct]
            difference = (again - writer.read(view * len(index) + np.asarray(ids))).abs()  # [n, Ct]
            fits = (difference <= allowed_difference(again, amp_dtype)).all(1)  # [n]; NaN does not
            for row, i in enumerate(ids):
                if loader.followed.ids[row] != i:  # it can no longer be read: nothing to compare with
                    continue
                far = float(difference[row].max())
                largest = max(largest, far)
                if fits[row]:
                    agree += 1
                else:
                    wrong.append(
                        f"view {view} of {index.absolute(i)}: the cached features differ from the teacher's by"
                        f" {far:.4g}, and the largest of them is {float(again[row].abs().max()):.4g}"
                    )
    views.tell(
        f"verified: {agree} of {agree + len(wrong)} views computed again agree, largest difference {largest:.3g}"
        f" (--verify-seed {seed})"
    )
    return Verified(agree, largest, wrong)
