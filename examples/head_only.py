"""The fused head alone, in a training step of your own. It needs torch and nothing else of this package.

The student's map [B, Cs, H, W] goes through a 1x1 convolution, BatchNorm and ReLU to the teacher's Ct channels, is
matched with the teacher's map and pooled (`connector_match`); the pooled vector goes through the teacher's frozen
classifier into the losses (`classifier_loss`). Neither the connected map nor the logits [B, K] are kept whole.
"""

from __future__ import annotations

import torch
from torch import nn

from ijckd_fast import classifier_loss, connector_match


def main(steps: int = 10, device: str = "cpu") -> list[float]:
    """Trains a student's last map and a connector for `steps` steps on random tensors; returns the losses."""
    torch.manual_seed(0)
    B, K, Cs, Ct, H, W = 16, 100, 32, 64, 4, 4
    student = nn.Conv2d(3, Cs, 3, stride=8, padding=1).to(
        device
    )  # stands for a backbone: [B, 3, 32, 32] -> [B, Cs, H, W]
    projection = nn.Parameter(torch.randn(Ct, Cs, device=device) / Cs**0.5)  # [Ct, Cs]
    bn = nn.BatchNorm2d(Ct).to(device)  # its parameters and statistics; the op computes
    classifier = nn.Linear(Ct, K).to(device).requires_grad_(False)  # the teacher's
    images = torch.randn(B, 3, 32, 32, device=device)
    labels = torch.randint(0, K, (B,), device=device)
    map_t = torch.rand(B, Ct, H, W, device=device)  # the teacher's
    pooled_t = map_t.mean((2, 3))  # [B, Ct]
    optimizer = torch.optim.SGD([*student.parameters(), projection, *bn.parameters()], 0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        z, match = connector_match(
            student(images),
            projection,
            bn_weight=bn.weight,
            bn_bias=bn.bias,
            running_mean=bn.running_mean,
            running_var=bn.running_var,
            map_t=map_t,
        )  # [B, Ct], []
        loss, parts, _right = classifier_loss(
            z, classifier.weight, classifier.bias, labels, pooled_t=pooled_t, ce=1, sr=1
        )
        loss = loss + match
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[-1]:.4f}: cross-entropy {parts[0]:.4f}, logits {parts[1]:.4f}, maps {match:.4f}")
    return losses


if __name__ == "__main__":
    main()
