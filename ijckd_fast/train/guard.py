"""A step whose loss or gradient is NaN or infinite changes nothing, and the host does not wait to know."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FiniteGuard:
    """Makes a step whose loss or gradient is NaN or infinite a step that changes nothing, without asking the device.

    `before_forward` keeps a copy of the running statistics (BatchNorm) and their counts of batches, which the forward
    pass updates. `update` puts them back if the step is bad, and leaves weights and optimizer alone: a fused optimizer
    reads the `found_inf` tensor, as for a GradScaler, another one's work is undone. Everything is a tensor on the
    device: the host never waits.

    armed  [] bool on the device; False makes every step one that changes nothing
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        # One vector holds all statistics of a dtype and one all counts, the modules get views of them: copying is one
        # operation each.
        dtypes = dict.fromkeys(buffer.dtype for buffer in module.buffers() if _is_statistic(buffer))
        self._statistics = [_laid_together(module, dtype, device) for dtype in dtypes]
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
        """The optimizer's step if ok [] bool (and armed), else none, and the running statistics are again those before
        the forward pass.

        LAMB's count of steps, on which its correction of the first averages depends, counts every step.
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


def _is_statistic(buffer: Tensor) -> bool:
    """Whether a forward pass in training mode may change it: any floating-point buffer, and BatchNorm's counts of
    batches.
    """
    return buffer.is_floating_point() or (buffer.dtype == torch.int64 and not buffer.dim())


def _laid_together(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One vector with the contents of all statistics of `module` that have this dtype, which become views of it."""
    slots = [
        (part, name, buffer)
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
        if buffer.dtype == dtype and _is_statistic(buffer)
    ]
    vector = torch.cat([buffer.detach().flatten() for *_, buffer in slots]).to(device)
    offset = 0
    for part, name, buffer in slots:
        view = vector[offset : offset + buffer.numel()].view(buffer.shape)
        persistent = name not in part._non_persistent_buffers_set
        part.register_buffer(name, view.data, persistent=persistent)  # .data: own version counter
        offset += buffer.numel()
    return vector
