"""What filling a cache and checking it have in common: the planned views, and what the teacher says to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from ijckd_fast.console import say
from ijckd_fast.data import Index, Loader
from ijckd_fast.nets import Tapped
from ijckd_fast.teacher_cache import CacheWriter
from ijckd_fast.train import TrainConfig, build_view_loader


class Teller:
    """Says one line on the console, whatever is in it."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, text: str) -> None:
        say(self._console, text)

    def bad_file(self, what: str) -> Callable[[str, str], None]:
        """(path, reason) -> a warning about a file that can no longer be read, and `what` happens now."""
        return lambda path, why: self(f"warning: {path} cannot be read any more ({why}): {what}")


def features_of(teacher: Tapped, device: torch.device, amp_dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """images [B, 3, S, S] -> the teacher's pooled features [B, Ct] float32, computed as in a training step.

    amp_dtype  autocast's; None: float32
    """

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        with torch.autocast(device.type, amp_dtype or torch.bfloat16, enabled=amp_dtype is not None):
            return teacher.features(images)[1].float()

    return features


@dataclass(frozen=True)
class PlannedViews:
    """The views that a cache holds, to be looked at by its teacher.

    config    resolved
    index     of the training images
    writer    of the cache; what it knows to be unreadable is not tried again
    features  as `features_of` gives it
    """

    config: TrainConfig
    index: Index
    writer: CacheWriter
    features: Callable[[Tensor], Tensor]
    tell: Teller

    def batches(self, parts: Iterable[tuple[int, Sequence[int]]]) -> list[tuple[int, Sequence[int]]]:
        """(view, ids) in pieces of at most batch_size images."""
        size = self.config.batch_size
        return [(view, ids[first : first + size]) for view, ids in parts for first in range(0, len(ids), size)]

    def loader(self, batches: Sequence[tuple[int, Sequence[int]]]) -> Loader:
        """Reads the images of these (view, ids), in order."""
        on_bad = self.tell.bad_file(
            "it is left out of the cache, and training has another image of its class in its place"
        )
        loader = build_view_loader(self.config, self.index, batches, torch.device(self.config.device), on_bad=on_bad)
        for i, (_, why) in self.writer.unreadable.items():
            loader.plan.stand_ins.add(i, why)
        return loader
