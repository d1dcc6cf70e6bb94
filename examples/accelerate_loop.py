"""The loop of Hugging Face's accelerate, on any number of processes: accelerate launch examples/accelerate_loop.py

The distiller is prepared like any model: wrapped as a whole for several processes, while its teacher stays as it is.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from ijckd_fast.distill import Distiller, get_objective
from ijckd_fast.nets import create_model


def main(steps: int = 10, cpu: bool = True) -> list[float]:
    """Distills for `steps` steps on random images; returns the losses."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=2)
    student, teacher = (create_model(name, 10, image_size=32) for name in ("resnet8", "resnet20"))
    distiller = Distiller(student, teacher, get_objective("kd")).train()
    optimizer = torch.optim.SGD(distiller.parameters(), 0.05, momentum=0.9)
    data = TensorDataset(torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,)))
    distiller, optimizer, loader = accelerator.prepare(distiller, optimizer, DataLoader(data, batch_size=16))
    losses: list[float] = []
    while len(losses) < steps:
        for images, labels in loader:
            with accelerator.accumulate(distiller):
                out = distiller(images, labels, with_logits=True)
                accelerator.backward(out.loss)
                optimizer.step()
                optimizer.zero_grad()
            right = accelerator.gather_for_metrics(out.logits.argmax(1) == labels).float().mean()
            losses.append(out.loss.item())
            accelerator.print(f"loss {losses[-1]:.4f}, {right:.0%} right")
    learned = accelerator.unwrap_model(distiller).state_dict()
    accelerator.print(f"{sum(tensor.numel() for tensor in learned.values()):,} numbers to save, none of the teacher's")
    return losses[:steps]


if __name__ == "__main__":
    main()
