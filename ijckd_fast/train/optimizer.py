"""The optimizer of a run, and the learning rate of each of its steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def learning_rate(
    step: int,
    *,
    steps_per_epoch: int,
    epochs: float,
    lr: float,
    schedule: str,
    milestones: tuple[int, ...],
    gamma: float,
    warmup_epochs: float,
) -> float:
    """The learning rate of the update with index `step` (from 0), a pure function, so that resuming needs no state.

    Warm-up: linear from lr / n at the first of the n warm-up steps to lr at the last.
    "step": lr * gamma ** (number of milestones, in epochs, that have passed).
    "cosine": half a cosine from lr at the end of the warm-up to 0 at the end of the run.
    """
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "step":
        return lr * gamma ** sum(step >= milestone * steps_per_epoch for milestone in milestones)
    span = max(1, round(epochs * steps_per_epoch) - warmup_steps)
    return lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / span)))


def build_optimizer(
    module: nn.Module,
    *,
    name: str,
    lr: float,
    momentum: float,
    nesterov: bool,
    betas: tuple[float, float],
    weight_decay: float,
    decay_norms: bool,
) -> torch.optim.Optimizer:
    """The optimizer of every parameter of `module`, ready for `FiniteGuard`.

    name         'sgd' (PyTorch's fused one), 'adamw' (likewise; Loshchilov & Hutter) or 'lamb' (timm's; You et al.)
    decay_norms  False: no weight decay for parameters with one dimension, which are norms' and biases, nor for those
                 that a part's `no_weight_decay()` names, as timm's ViTs have it (class token, positions)
    SGD's momentum buffers start as zeros, which is the same as starting without any, so that a first step that the
    guard skips leaves them defined.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if not decay_norms:
        kept = _kept_from_decay(module)
        groups = [
            {"params": [p for p in parameters if p.dim() > 1 and p not in kept]},
            {"params": [p for p in parameters if p.dim() <= 1 or p in kept], "weight_decay": 0.0},
        ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, betas, weight_decay=weight_decay, fused=True)
    if name == "lamb":
        from timm.optim import Lamb

        return Lamb(groups, lr, betas=betas, weight_decay=weight_decay, max_grad_norm=None)  # clipping is the step's
    optimizer = torch.optim.SGD(groups, lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=True)
    if momentum:
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _kept_from_decay(module: nn.Module) -> set[nn.Parameter]:
    """Parameters that parts of `module` name in their `no_weight_decay()`."""
    kept = set()
    for part in module.modules():
        names = getattr(part, "no_weight_decay", None)
        if callable(names):
            own = dict(part.named_parameters())
            kept |= {own[name] for name in names() if name in own}
    return kept
