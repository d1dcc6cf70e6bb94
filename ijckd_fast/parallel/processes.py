"""The processes of one run: who this one is, what they tell each other, and what is said when one of them is gone.

One process is the ordinary case and costs nothing: every method of `Processes` then returns what it was given.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ijckd_fast.errors import UserError

# Waiting for rank 0 to scan the images for the first time, not for a peer that is gone: that one closes its connection.
_MEETING = datetime.timedelta(minutes=10)
_LONGEST_WAIT = datetime.timedelta(hours=24)


@dataclass(frozen=True)
class Processes:
    """This process among those of its run.

    rank, world  which of how many; the one with rank 0 writes files and talks
    local_rank   which of those on this machine: its GPU
    control      group in which processes tell each other Python objects over the CPU and wait for one another; None: world is 1
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group that shares gradients and statistics; None for one process alone."""
        return dist.group.WORLD if self.world > 1 else None

    def sum(self, x: Tensor) -> Tensor:
        """x, any shape, summed over all processes in place, without the host waiting for it."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def gather(self, item: Any) -> list[Any]:
        """What every process gave, in order of rank, to all of them; of tensors only those on the CPU."""
        if self.world == 1:
            return [item]
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item, group=self.control)
        return items

    def from_main(self, item: Any) -> Any:
        """What the process with rank 0 gave."""
        if self.world == 1:
            return item
        items = [item]
        dist.broadcast_object_list(items, src=0, group=self.control)
        return items[0]

    def most(self, *numbers: int) -> tuple[int, ...]:
        """The largest that any process gave of each number. The hosts meet for it, but none waits for its device."""
        if self.world == 1:
            return numbers
        largest = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.control)
        return tuple(largest.tolist())

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.world > 1:
            dist.barrier(group=self.control)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The process with rank 0 runs the block before the others, which then find what it has left on the disk."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def share_buffers(self, module: nn.Module) -> None:
        """Gives every process the floating-point buffers (BatchNorm's running statistics) of the one with rank 0."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)


def world_size() -> int:
    """How many processes the launcher (torchrun, or srun without it) says this run has; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or (os.environ.get("SLURM_NTASKS") if _by_srun() else None) or 1)


def local_world_size() -> int:
    """How many of them are on this machine, as far as the launcher says; 1 where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)


def _by_srun() -> bool:
    """Whether srun started this process as one of several that know where to meet."""
    return "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ


@contextlib.contextmanager
def started(device: str, backend: str | None = None) -> Iterator[Processes]:
    """Inside, this process is one of those that the launcher started (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, as torchrun
    sets them; SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID where srun started them with MASTER_ADDR and MASTER_PORT set).

    device   'cpu' or 'cuda'; for 'cuda' this process's GPU becomes the current one
    backend  'nccl' or 'gloo' for gradients; None: nccl with GPUs, gloo without
    raises   UserError where they cannot meet, where torch lacks the backend, where a machine has fewer GPUs than processes, and where
             another process of the run has ended
    """
    world = world_size()
    if world == 1:
        yield Processes()
        return
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    local_rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    if dist.is_initialized():  # by a caller that has a use of its own for it
        yield Processes(rank, world, local_rank, _control_group())
        return
    if device == "cuda":
        gpus = torch.cuda.device_count()
        if gpus == 1:
            local_rank = (
                0  # the batch system shows each process a GPU of its own and no other, or this is the only process here
            )
        if local_rank >= gpus or (gpus == 1 and local_world_size() > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ):
            raise UserError(
                f"{local_world_size()} processes of this machine want a GPU each, but torch finds {gpus}: start at most {gpus} processes a "
                "machine (torchrun --nproc-per-node), or use --device cpu"
            )
        torch.cuda.set_device(local_rank)
    backend = backend or ("nccl" if device == "cuda" else "gloo")
    if backend == "nccl" and (device != "cuda" or not dist.is_nccl_available()):
        found = "--device cpu" if device != "cuda" else "a torch without it"
        raise UserError(
            f"NCCL shares the gradients of GPUs, got {found}: use --dist-backend gloo, or a CUDA build of torch with GPUs"
        )
    where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    try:
        dist.init_process_group(backend, init_method="env://", rank=rank, world_size=world, timeout=_MEETING)
        control = _control_group()
    # DistNetworkError: taken port, nobody there; ValueError: no MASTER_ADDR
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {rank} of {world} could not meet the others at {where} ({_first_line(error)}): is the port free, the address that of "
            "the first machine, and are all processes started? torchrun --standalone finds a free port on one machine"
        ) from error
    try:
        yield Processes(rank, world, local_rank, control)
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        raise UserError(
            f"process {rank} of {world} lost contact with the others: one of them has ended, and what it says for itself stands in its own "
            f"output ({_first_line(error)}). Continue all of them with ijckd-fast train --resume from the last checkpoint"
        ) from error
    dist.destroy_process_group()  # not after an error: it would wait for those that are gone


def _control_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
    assert isinstance(group, dist.ProcessGroup)  # every process of the run is in it
    return group


def lost_contact(error: BaseException) -> bool:
    """Whether an error says that another process is gone, as gloo's, NCCL's and the store's do in words of their own."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    return (
        re.search(r"[Cc]onnection (closed|reset|refused)|Broken pipe|Timed out|gloo.*(timeout|error)", str(error))
        is not None
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class _Sum(torch.autograd.Function):
    """The sum over the processes of a group. Each one's loss depends on every process's x, so gradients are summed likewise."""

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


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batches of all processes of `group`, on any device: torch's own of this name takes GPU tensors only.

    input [B, C] or [B, C, H, W]; ranks may hold different B. In eval mode it is BatchNorm.
    """

    group: dist.ProcessGroup | None = None
    drop: nn.Module
    act: nn.Module

    @classmethod
    def of(cls, norm: nn.modules.batchnorm._BatchNorm, group: dist.ProcessGroup) -> SyncBatchNorm:
        """The same layer with the same tensors (timm's with its dropout and activation), over the processes of `group`."""
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
        x = input if input.dtype == torch.float64 else input.float()
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = x.new_full((1,), x.numel() / x.shape[1])
        # Two rounds, the mean first: a sum of squares loses the variance of channels far from 0.
        total = self._sum(torch.cat([x.sum(dims), count]))  # [C + 1]
        n = total[-1]
        mean = total[:-1] / n  # [C]
        centred = x - mean.view(shape)
        var = self._sum(centred.square().sum(dims)) / n  # [C]
        if self.track_running_stats:
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(var * n / (n - 1), momentum)
        y = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return self.act(self.drop(y.to(input.dtype)))

    def _sum(self, x: Tensor) -> Tensor:
        total: Tensor = _Sum.apply(x, self.group)
        return total


def synchronise_batch_norm(net: nn.Module, group: dist.ProcessGroup) -> None:
    """Makes every BatchNorm in `net` take its statistics over all processes of `group`: torch's SyncBatchNorm on a GPU, else ours.

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
