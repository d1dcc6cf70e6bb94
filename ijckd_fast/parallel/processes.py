"""The processes of one run: who this one is, what they tell each other, and what is said when one of them is gone.

One process is the ordinary case and costs nothing: every method of `Processes` then returns what it was given.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ijckd_fast import signals
from ijckd_fast.errors import UserError
from ijckd_fast.parallel.agreement import agree, refuse_differences
from ijckd_fast.parallel.watch import Watch

T = TypeVar("T")
MEETING = datetime.timedelta(minutes=10)  # that the processes have for finding each other
PATIENCE = datetime.timedelta(minutes=10)  # without a sign of life from a process
# For one that gives signs of life: rank 0, say, which scans the images for the first time.
_LONGEST_WAIT = datetime.timedelta(hours=24)
# NCCL ends a process in its own words; the watch has told by then.
_AFTER_THE_WATCH = datetime.timedelta(minutes=5)
_starts = itertools.count()  # what an earlier run of these processes has left in a launcher's store is not read


@dataclass(frozen=True)
class Processes:
    """This process among those of its run.

    rank, world  which of how many; the one with rank 0 writes files and talks
    local_rank   which of those on this machine: its GPU
    control      group in which the processes exchange Python objects over the CPU and wait for one another; None: world
                 is 1
    watch        the signs of life of all of them; None: world is 1, or the caller has connected them
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    control: dist.ProcessGroup | None = None
    watch: Watch | None = None

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

    def each(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches. One that takes longer to come than a process may be silent ends this one: its disk hangs."""
        return iter(batches) if self.watch is None else self.watch.each(batches)

    def at_step(self, step: int) -> None:
        """Lets the others know where this process is, for what they say when it gives no sign of life any more."""
        if self.watch is not None:
            self.watch.step = step

    def resumed_by(self, how: str) -> None:
        """What a sentence says in its end that ends this process because another one is missing."""
        if self.watch is not None:
            self.watch.resume = how

    @contextlib.contextmanager
    def telling(self, told: Callable[[str], None]) -> Iterator[None]:
        """Inside, `told` is called with that sentence too, from another thread."""
        if self.watch is None:
            yield
            return
        self.watch.last_words.append(told)
        try:
            yield
        finally:
            self.watch.last_words.remove(told)

    def leave(self) -> None:
        """From here on this process needs none of the others, and they may end."""
        if self.watch is not None:
            self.watch.leave()


def world_size() -> int:
    """How many processes the launcher (torchrun, or srun without it) says this run has; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or (os.environ.get("SLURM_NTASKS") if _by_srun() else None) or 1)


def all_processes() -> dist.ProcessGroup | None:
    """The group of all processes that torch.distributed connects, whoever did; None where this one is alone."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD


def local_world_size() -> int:
    """How many of them are on this machine, as far as the launcher says; 1 where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)


def _by_srun() -> bool:
    """Whether srun started this process as one of several that know where to meet."""
    return "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ


@contextlib.contextmanager
def started(
    device: str,
    backend: str | None = None,
    *,
    facts: Mapping[str, str] | None = None,
    patience: datetime.timedelta = PATIENCE,
) -> Iterator[Processes]:
    """Inside, this process is one of those that the launcher started.

    torchrun says so by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. srun says so by SLURM_PROCID,
    SLURM_NTASKS and SLURM_LOCALID; MASTER_ADDR and MASTER_PORT must then be set as well.

    device    'cpu' or 'cuda'; for 'cuda' this process's GPU becomes the current one
    backend   'nccl' or 'gloo' for gradients; None: nccl with GPUs, gloo without
    facts     what must be equal in all of them, by names that an error may call them
    patience  without a sign of life from another process, after which this one ends: with a sentence, at once and with
              exit code 2, because it may wait in C code
    raises    UserError where they cannot meet, where torch lacks the backend, where a machine has fewer GPUs than
              processes, where `facts` differ, and where another process of the run has ended
    """
    world = world_size()
    if world == 1:
        yield Processes()
        return
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    local_rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    if dist.is_initialized():  # by a caller that has a use of its own for it
        processes = Processes(rank, world, local_rank, _control_group())
        refuse_differences(processes.gather(facts or {}))
        yield processes
        return
    if device == "cuda":
        local_rank = _own_gpu(local_rank)
    backend = _backend(device, backend)
    where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    watch = Watch(rank, world, patience.total_seconds(), where)
    with watch.hearing():
        control = _connected(watch, backend, facts or {})
        try:
            # Before the first step only the one with rank 0 keeps anything; the others wait for it, in C code.
            with signals.at_once() if rank else contextlib.nullcontext():
                processes = Processes(rank, world, local_rank, control, watch)
                yield processes
                processes.wait()  # the one that serves the store must not be the first to end
        except RuntimeError as error:
            if not lost_contact(error):
                raise
            why = watch.explained() or ("one of them has ended, and what it says for itself stands in its own output")
            raise UserError(
                f"process {rank} of {world} lost contact with the others: {why} ({_first_line(error)}). {watch.resume}"
            ) from error
    dist.destroy_process_group()  # not after an error: it would wait for those that are gone


def _connected(watch: Watch, backend: str, facts: Mapping[str, str]) -> dist.ProcessGroup:
    """Meets the other processes, compares `facts` with theirs, and connects them; returns the control group."""
    rank, world = watch.rank, watch.world
    try:
        store, *_ = next(dist.rendezvous("env://", rank, world, timeout=MEETING))
        store = dist.PrefixStore(f"ijckd_fast {next(_starts)}", store)
        watch.meet(store.clone())
        agree(store, rank, world, facts)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("default", store),
            rank=rank,
            world_size=world,
            timeout=_LONGEST_WAIT if backend == "gloo" else _nccl_timeout(watch.patience),
        )
        return _control_group()
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:  # a taken port, nobody there (DistNetworkError); no MASTER_ADDR
        raise UserError(
            f"process {rank} of {world} could not meet the others at {watch.where} ({_first_line(error)}): is the port"
            " free, the address that of the first machine, and are all processes started? torchrun --standalone finds"
            " a free port on one machine"
        ) from error


def _nccl_timeout(patience: float) -> datetime.timedelta:
    return max(MEETING, datetime.timedelta(seconds=patience) + _AFTER_THE_WATCH)


def _own_gpu(local_rank: int) -> int:
    """The number of this process's GPU, which becomes the current one."""
    gpus = torch.cuda.device_count()
    if gpus == 1:
        # The batch system shows each process a GPU of its own and no other, or this is the only process here.
        local_rank = 0
    if local_rank >= gpus or (gpus == 1 and local_world_size() > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ):
        raise UserError(
            f"{local_world_size()} processes of this machine want a GPU each, but torch finds {gpus}: start at most"
            f" {gpus} processes a machine (torchrun --nproc-per-node), or use --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return local_rank


def _backend(device: str, backend: str | None) -> str:
    """The backend for gradients."""
    backend = backend or ("nccl" if device == "cuda" else "gloo")
    if backend == "nccl" and (device != "cuda" or not dist.is_nccl_available()):
        found = "--device cpu" if device != "cuda" else "a torch without it"
        raise UserError(
            f"NCCL shares the gradients of GPUs, got {found}: use --dist-backend gloo, or a CUDA build of torch with"
            " GPUs"
        )
    return backend


def _control_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
    assert isinstance(group, dist.ProcessGroup)  # every process of the run is in it
    return group


def lost_contact(error: BaseException) -> bool:
    """Whether an error says that another process is gone; gloo, NCCL and the store each have their own words for it."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    texts = r"[Cc]onnection (closed|reset|refused)|Broken pipe|Timed out|gloo.*(timeout|error)"
    return re.search(texts, str(error)) is not None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
