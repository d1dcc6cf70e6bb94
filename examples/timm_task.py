"""Our objectives as a task of timm (timm.task, 1.0.31), which timm's train.py and loops like it call.

A task takes a batch and returns a dict with 'loss' and 'output'. Labels are class numbers: mixup that makes soft labels
belongs to `labels_b` and `mix` of the distiller.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.task.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ijckd_fast.distill import Distiller, get_objective
from ijckd_fast.nets import create_model


class Answers(nn.Module):
    """What timm validates and saves: images [B, 3, S, S] -> logits [B, K] of the trained student."""

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def forward(self, images: Tensor) -> Tensor:
        return self.distiller.predict(images)


class IjckdTask(TrainingTask):
    """progress: epochs done so far; set it where the objective has a warm-up (dkd)."""

    def __init__(self, distiller: Distiller, device: torch.device | None = None, **more: Any) -> None:
        super().__init__(device=device, **more)
        self.trainable_module = distiller
        self.progress: float | None = None

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> IjckdTask:
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        module = self.get_trainable_module(ema=ema) if module is None else module
        return None if module is None else Answers(unwrap_model(module))

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        out = self.trainable_module(input, target, progress=self.progress, with_logits=True)
        return {"loss": out.loss, "output": out.logits, **out.parts}


def main(steps: int = 10) -> list[float]:
    """Distills for `steps` steps on one random batch, as timm's loop does; returns the losses."""
    torch.manual_seed(0)
    student, teacher = (create_model(name, 10, image_size=32) for name in ("resnet8", "resnet20"))
    task = IjckdTask(Distiller(student, teacher, get_objective("srrl"))).train()
    task.setup_ema(decay=0.9)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), 0.05, momentum=0.9)
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))
    losses = []
    for step in range(steps):
        result = task(images, labels)
        optimizer.zero_grad()
        result["loss"].backward()
        torch.nn.utils.clip_grad_norm_(task.get_clip_parameters(), 5.0)
        optimizer.step()
        task.update_ema(step)
        losses.append(result["loss"].item())
    right = task.get_eval_model(ema=True).eval()(images).argmax(1) == labels
    print(f"loss {losses[-1]:.4f}; {right.float().mean():.0%} right by the average of the weights")
    return losses


if __name__ == "__main__":
    main()
