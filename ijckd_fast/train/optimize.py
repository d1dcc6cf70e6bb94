"""What a step does to the weights besides the gradient: its learning rate, the guard against NaN, the moving average."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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
    decay_norms  False: no weight decay for parameters with one dimension, which are BatchNorm's and biases
    SGD's momentum buffers start as zeros, which is the same as starting without any, so that a first step that the guard skips leaves
    them defined.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if not decay_norms:
        groups = [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
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


class FiniteGuard:
    """Makes a step whose loss or gradient is NaN or infinite a step that changes nothing, without asking the device.

    `before_forward` keeps a copy of the running statistics (BatchNorm) and their counts of batches, which the forward pass updates.
    `update` puts them back if the step is bad, and leaves weights and optimizer alone: a fused optimizer reads the `found_inf` tensor,
    as for a GradScaler, another one's work is undone. Everything is a tensor on the device: the host never waits.

    armed  [] bool on the device; False makes every step one that changes nothing
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        # One vector holds all statistics and one all counts, the modules get views of them: copying is one operation each.
        self._statistics = [
            _laid_together(module, torch.float32, device, lambda buffer: buffer.is_floating_point()),
            _laid_together(
                module, torch.int64, device, lambda buffer: buffer.dtype == torch.int64 and not buffer.dim()
            ),
        ]
        self._before = [vector.clone() for vector in self._statistics]
        self.armed = torch.ones((), dtype=torch.bool, device=device)
        self._optimizer = optimizer
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._fused = all(group.get("fused") for group in optimizer.param_groups)
        self._found_inf = torch.zeros((), device=device)
        if self._fused:
            optimizer.found_inf = self._found_inf  # type: ignore[attr-defined]

    def before_forward(self) -> None:
        """Keeps a copy of the running statistics, which the forward pass will update."""
        for old, now in zip(self._before, self._statistics, strict=True):
            old.copy_(now)

    def restore_statistics(self) -> None:
        """Puts back the running statistics that `before_forward` kept, after a step that did not come to its end."""
        for old, now in zip(self._before, self._statistics, strict=True):
            now.copy_(old)

    def judge(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """loss [] with gradients in place -> (ok [] bool, grad_norm [] float32: L2 norm of the whole gradient)."""
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])  # []
        return torch.isfinite(loss.detach()) & torch.isfinite(grad_norm), grad_norm

    def clip(self, grad_norm: Tensor, most: float) -> None:
        """Scales the gradient, of L2 norm grad_norm [], so that its norm is at most `most`."""
        torch.nn.utils.clip_grads_with_norm_(self._parameters, most, grad_norm)

    @torch.no_grad()
    def update(self, ok: Tensor) -> None:
        """The optimizer's step if ok [] bool (and armed), else none, and the running statistics are again those before the forward pass.

        LAMB's count of steps, of which its correction of the first averages depends, goes on in any case.
        """
        ok = ok & self.armed
        for old, now in zip(self._before, self._statistics, strict=True):
            now.copy_(torch.where(ok, now, old))
        if self._fused:
            self._found_inf.copy_(~ok)
            self._optimizer.step()
            return
        before = [(x, x.clone()) for x in (*self._parameters, *self._state())]
        self._optimizer.step()
        seen = {x for x, _ in before}
        before += [(x, torch.zeros_like(x)) for x in self._state() if x not in seen]  # made in the first step, of zeros
        for x, old in before:
            x.copy_(torch.where(ok, x, old))

    def _state(self) -> list[Tensor]:
        return [x for state in self._optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]


def _laid_together(
    module: nn.Module, dtype: torch.dtype, device: torch.device, wanted: Callable[[Tensor], bool]
) -> Tensor:
    """One vector with the contents of all buffers of `module` that are wanted, which become views of it."""
    slots = [
        (part, name, buffer)
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
        if wanted(buffer)
    ]
    flat = [buffer.detach().flatten().to(dtype) for *_, buffer in slots]
    vector = torch.cat(flat or [torch.zeros(0, dtype=dtype)]).to(device)
    offset = 0
    for part, name, buffer in slots:
        view = vector[offset : offset + buffer.numel()].view(buffer.shape)
        persistent = name not in part._non_persistent_buffers_set
        part.register_buffer(name, view.data, persistent=persistent)  # .data: own version counter
        offset += buffer.numel()
    return vector


class Ema:
    """Exponential moving average of a module's parameters and floating-point buffers, in float32 on their device.

    After update number n (from 1) the decay is min(decay, (1 + n) / (10 + n)), so that a short run is not dominated by its
    first weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._live = {k: v for k, v in module.state_dict(keep_vars=True).items() if v.is_floating_point()}
        self._average = {k: v.detach().clone() for k, v in self._live.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Takes in the module's present weights; `updates` counts from 1."""
        decay = min(self._decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self._average.values()), [v.detach() for v in self._live.values()], 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the module computes with the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for key, live in self._live.items():
            kept = live.detach().clone()
            live.copy_(self._average[key])
            self._average[key].copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names of the module's own state_dict."""
        return self._average

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state_dict` returned."""
        for key, average in self._average.items():
            average.copy_(state[key])
