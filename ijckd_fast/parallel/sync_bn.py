"""BatchNorm whose statistics are those of the batches of all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Sum(torch.autograd.Function):
    """The sum over the processes of a group.

    Each process's loss depends on every process's x, so gradients are summed likewise.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_over(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x, any shape, summed over the processes of a group, with its gradient; None: this process alone, x itself.

    Where every process makes the same loss of the sum, the gradient of each process's x is that of all their losses,
    so the mean over the processes that DistributedDataParallel takes of a parameter's gradient is that of the loss.
    """
    if group is None:
        return x
    total: Tensor = _Sum.apply(x, group)
    return total


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batches of all processes of `group`, on any device.

    torch's own of this name takes GPU tensors only.

    input [B, C] or [B, C, H, W]; ranks may hold different B. In eval mode it is BatchNorm.
    """

    group: dist.ProcessGroup | None = None
    drop: nn.Module
    act: nn.Module

    @classmethod
    def of(cls, norm: nn.modules.batchnorm._BatchNorm, group: dist.ProcessGroup) -> SyncBatchNorm:
        """The same layer with the same tensors over `group`; timm's keeps its dropout and activation."""
        made = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        made.group = group
        made._parameters, made._buffers, made.training = norm._parameters, norm._buffers, norm.training
        made.drop, made.act = getattr(norm, "drop", nn.Identity()), getattr(norm, "act", nn.Identity())
        return made

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm takes [B, C, ...], got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.group is None:
            return self.act(self.drop(super().forward(input)))
        y = batch_norm(
            input,
            self.weight,
            self.bias,
            (self.running_mean, self.running_var, self.num_batches_tracked) if self.track_running_stats else None,
            momentum=self.momentum,
            eps=self.eps,
            group=self.group,
        )
        return self.act(self.drop(y.to(input.dtype)))


Running = tuple[Tensor | None, Tensor | None, Tensor | None]


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running | None,
    *,
    momentum: float | None,
    eps: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """BatchNorm in training, over the batches of all processes of `group` (None: this one's), on any device.

    input    [B, C, ...]; processes may hold different B
    running  (mean [C], variance [C], count []), updated in place as torch does; without one that is None
    returns  like input, float32 or, for float64 input, float64
    """
    x = input if input.dtype == torch.float64 else input.float()
    dims = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    count = x.new_full((1,), x.numel() / x.shape[1])
    # Two rounds, the mean first: a sum of squares loses the variance of channels far from 0.
    total = sum_over(torch.cat([x.sum(dims), count]), group)  # [C + 1]
    n = total[-1]
    mean = total[:-1] / n  # [C]
    centred = x - mean.view(shape)
    var = sum_over(centred.square().sum(dims), group) / n  # [C]
    if running is not None:
        _update(running, mean, var * n / (n - 1), momentum)
    y = centred * torch.rsqrt(var + eps).view(shape)
    return y if weight is None or bias is None else y * weight.view(shape) + bias.view(shape)


@torch.no_grad()
def _update(running: Running, mean: Tensor, var: Tensor, momentum: float | None) -> None:
    """Takes in a batch's mean [C] and unbiased variance [C], as torch's BatchNorm does."""
    *statistics, count = running  # no count in nets from before it was invented
    if count is not None:
        count.add_(1)
    for each, new in zip(statistics, (mean, var), strict=True):
        if each is None:
            continue
        share: float | Tensor = 0.0 if momentum is None else momentum
        if momentum is None and count is not None:  # the mean over all batches
            share = count.to(each.dtype).reciprocal()
        each.lerp_(new.to(each.dtype), share)


def synchronise_batch_norm(net: nn.Module, group: dist.ProcessGroup) -> None:
    """Makes every BatchNorm in `net` take its statistics over all processes of `group`.

    On a GPU each becomes torch's SyncBatchNorm, else ours.
    Parameters, buffers, their names and forward hooks stay, as do the activations within timm's BatchNormAct2d.
    """
    hooks = {name: module._forward_hooks for name, module in net.named_modules() if module._forward_hooks}
    if any(p.is_cuda for p in net.parameters()):
        from timm.layers import convert_sync_batchnorm  # torch's is not for timm's own layers

        for name, child in list(net.named_children()):
            setattr(net, name, convert_sync_batchnorm(child, group))
    else:
        _convert_children(net, group)
    for name, kept in hooks.items():
        net.get_submodule(name)._forward_hooks = kept


def _convert_children(module: nn.Module, group: dist.ProcessGroup) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, SyncBatchNorm.of(child, group))
        else:
            _convert_children(child, group)
