"""A training loop of your own, in plain PyTorch. Random nets and pixels by default: python examples/plain_loop.py"""

from __future__ import annotations

import torch

from ijckd_fast.distill import Distiller, get_objective
from ijckd_fast.nets import create_model


def main(steps: int = 10, device: str = "cpu") -> list[float]:
    """Distills for `steps` steps on one random batch; returns the losses."""
    torch.manual_seed(0)
    student = create_model("resnet8", 10, image_size=32)
    teacher = create_model("resnet20", 10, image_size=32)  # load its weights, or give checkpoint="teacher.pt"
    distiller = Distiller(student, teacher, get_objective("ijckd")).to(device).train()  # the teacher moves along
    optimizer = torch.optim.SGD(distiller.parameters(), 0.05, momentum=0.9)
    images = torch.randn(16, 3, 32, 32, device=device)  # [B, 3, S, S]
    labels = torch.randint(0, 10, (16,), device=device)  # [B]
    losses = []
    for step in range(steps):
        out = distiller(images, labels)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
        print(step, f"loss {losses[-1]:.4f}", {name: round(part.item(), 4) for name, part in out.parts.items()})
    logits = distiller.eval().predict(images)  # [B, 10], of what is deployed
    print(f"top-1 on the batch: {(logits.argmax(1) == labels).float().mean():.0%}")
    return losses


if __name__ == "__main__":
    main()
