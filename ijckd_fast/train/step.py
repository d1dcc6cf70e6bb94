"""One training step: both nets forward, backward, the guard against NaN, clipping, the optimizer, the moving average.

Everything it makes is on the device and nothing is waited for, so the same code runs step by step or, on a GPU, as one
CUDA graph.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ijckd_fast.data import Batch
from ijckd_fast.distill import Distiller, StepOutput
from ijckd_fast.errors import UserError, out_of_memory
from ijckd_fast.parallel import Processes
from ijckd_fast.train.ema import Ema
from ijckd_fast.train.guard import FiniteGuard

_WARM_UP = 3  # steps before a capture, in which libraries choose algorithms and make their workspaces

Shape = tuple[int, ...]


class TrainStep:
    """Takes a batch, changes the distiller's weights, and returns the step's figures.

    distiller   in training mode
    optimizer   of the distiller's parameters
    amp_dtype   autocast's, torch.float16 with a loss scale that adapts itself; None: float32
    accumulate  parts of a batch that go through the nets one after the other, for less memory; the update is that of
                the whole batch but for BatchNorm, whose statistics are then those of a part. Must divide the batch;
                UserError for an objective that needs it whole (dist)
    clip        largest L2 norm of the gradient; None: any
    ema_decay   of the moving average of the weights; 0: none
    processes   those that share the gradient; statistics of BatchNorm are shared only where the modules do so
                themselves
    cuda_graph  capture the step, once for each shape of a batch, and replay it: no kernel is launched from Python any
                more

    guard, ema, scaler  for checkpoints and logs: FiniteGuard, Ema or None, and torch's GradScaler (disabled but for
                        float16)
    """

    def __init__(
        self,
        distiller: Distiller,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        amp_dtype: torch.dtype | None = None,
        accumulate: int = 1,
        clip: float | None = None,
        ema_decay: float = 0.0,
        processes: Processes = Processes(),  # noqa: B008 - frozen
        cuda_graph: bool = False,
    ) -> None:
        distiller.objective.refuse_parts(accumulate)
        self._optimizer, self._device = optimizer, device
        self._amp_dtype, self._accumulate, self._clip = amp_dtype, accumulate, clip
        self._processes = processes
        self.guard = FiniteGuard(distiller, optimizer, device)
        # after the guard, which lays buffers together
        self.ema = Ema(distiller, ema_decay) if ema_decay else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
        self._distiller: Distiller | DistributedDataParallel = distiller
        self._exchanged: list[tuple[str, torch.nn.Parameter]] = []  # by name: those whose gradients are shared
        if processes.world > 1:
            self._exchanged = [(name, p) for name, p in distiller.named_parameters() if p.requires_grad]
            # Running statistics are not sent round in every step: rank 0's are those that are evaluated and saved.
            with warnings.catch_warnings():
                # its successor is not in every torch that is supported
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
                self._distiller = DistributedDataParallel(
                    distiller,
                    device_ids=[device] if device.type == "cuda" else None,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                )
        self._graphs: dict[Shape, tuple[torch.cuda.CUDAGraph, _Inputs, dict[str, Tensor]]] | None = (
            {} if cuda_graph else None
        )
        self._lr = torch.zeros((), device=device)
        # float32 would round the last step of a long epoch up to the next one
        self._progress = torch.zeros((), dtype=torch.float64, device=device)

    def __call__(
        self, batch: Batch, pooled_t: Tensor | None = None, *, step: int, lr: float, progress: float
    ) -> dict[str, Tensor]:
        """One update.

        pooled_t  [B, Ct] on the device: the teacher's pooled features of the batch, from a cache; None: the teacher is
                  run
        step      updates done so far
        lr        learning rate of this one
        progress  epochs done so far, fractions included
        returns   figures by name, each [] on the device: 'ok' (bool, whether the step changed anything), 'overflow'
                  (bool, float16: it did not because the loss scale was too large, which is now halved), 'loss', the
                  unweighted terms, 'grad_norm' (before clipping), 'correct' (images of this process's batch that the
                  inference head gets right)
        """
        if self._graphs is None:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            figures = self._update(_inputs(batch, pooled_t), progress)
        else:
            self._lr.fill_(lr)
            self._progress.fill_(progress)
            figures = self._replay(_inputs(batch, pooled_t))
        if self.ema is not None:
            self.ema.update(step + 1)
        return figures

    def _update(self, batch: _Inputs, progress: float | Tensor) -> dict[str, Tensor]:
        self._optimizer.zero_grad(set_to_none=True)
        self.guard.before_forward()
        figures = self._backward(batch, progress)
        self.scaler.unscale_(self._optimizer)
        ok, grad_norm = self.guard.judge(figures["loss"])
        if self._processes.world > 1:  # a NaN loss need not have a NaN gradient
            ok = self._processes.sum((~ok).float()) == 0
        if self._clip is not None:
            self.guard.clip(grad_norm, self._clip)
        self.guard.update(ok)
        overflow = torch.zeros_like(ok)
        if self.scaler.is_enabled():
            self.scaler.update()
            overflow = ~ok & torch.isfinite(figures["loss"])
        return {"ok": ok, "overflow": overflow, **figures, "grad_norm": grad_norm}

    def _backward(self, batch: _Inputs, progress: float | Tensor) -> dict[str, Tensor]:
        """Gradients of the mean loss over the batch, and the figures of it."""
        figures: dict[str, Tensor] = {}
        for i, part in enumerate(_parts(batch, self._accumulate), 1):
            step = self._distiller
            more = i < self._accumulate  # processes meet at the last part only
            with step.no_sync() if more and isinstance(step, DistributedDataParallel) else contextlib.nullcontext():
                with torch.autocast(
                    self._device.type,
                    self._amp_dtype or torch.bfloat16,
                    enabled=self._amp_dtype is not None,
                    cache_enabled=self._graphs is None,  # what a capture keeps would be of its own memory
                ):
                    out: StepOutput = step(
                        part.images,
                        part.labels,
                        labels_b=part.labels_b,
                        mix=part.mix,
                        pooled_t=part.pooled_t,
                        progress=progress,
                    )
                self.scaler.scale(out.loss / self._accumulate).backward()
            if not more:
                _refuse_unused(self._exchanged)
            mine = {"loss": out.loss.detach() / self._accumulate, "correct": out.correct}
            mine |= {name: value / self._accumulate for name, value in out.parts.items()}
            figures = {name: value + figures[name] if name in figures else value for name, value in mine.items()}
        return figures

    # --- as one CUDA graph ---

    def _replay(self, batch: _Inputs) -> dict[str, Tensor]:
        assert self._graphs is not None
        shape = tuple(batch.images.shape)
        if shape not in self._graphs:
            self._graphs[shape] = self._captured(batch)
        graph, inputs, figures = self._graphs[shape]
        for mine, given in zip(inputs, batch, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        graph.replay()
        return figures

    def _captured(self, batch: _Inputs) -> tuple[torch.cuda.CUDAGraph, _Inputs, dict[str, Tensor]]:
        """The step as a graph that reads the inputs returned and writes the figures returned. Changes no weight."""
        inputs = _each(batch, torch.clone)
        scale = self.scaler.state_dict()
        groups = self._optimizer.param_groups
        for group in groups:
            group["lr"] = self._lr  # a number would be frozen into the graph
        self.guard.armed.fill_(False)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._update(inputs, self._progress)
        torch.cuda.current_stream().wait_stream(stream)
        self._optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        adam = [group for group in groups if "capturable" in group]  # which wants the word; its fused form always is
        for group in adam:
            group["capturable"] = True
        # thread_local: the loader's threads may talk to the GPU meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            figures = self._update(inputs, self._progress)
        for group in adam:
            group["capturable"] = False
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(scale)
        self.guard.armed.fill_(True)
        return graph, inputs, figures

    # --- out of memory ---

    def largest_part_that_fits(self, batch: Batch, pooled_t: Tensor | None, progress: float) -> int:
        """After a step that ran out of memory: how many images, halving the batch again and again, go through both nets
        and back.

        Changes no weight and no statistic; 0 if not even one does.
        """
        self._optimizer.zero_grad(set_to_none=True)
        images = len(batch.labels) // self._accumulate // 2
        while images:
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                self._backward(_rows(_inputs(batch, pooled_t), slice(0, images * self._accumulate)), progress)
                break
            except (RuntimeError, ValueError) as error:  # ValueError: BatchNorm, of one value per channel
                if not out_of_memory(error) and images > 1:
                    raise
                images //= 2
        self._optimizer.zero_grad(set_to_none=True)
        self.guard.restore_statistics()
        return images


def _refuse_unused(exchanged: Sequence[tuple[str, torch.nn.Parameter]]) -> None:
    """UserError if one of the parameters has no gradient after a backward, though processes wait for it."""
    unused = [name for name, p in exchanged if p.grad is None]
    if unused:
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in unused))
        few = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
        raise UserError(
            f"{len(unused)} parameters got no gradient ({few}), but several processes exchange the gradients of all"
            " parameters: the net's forward does not use these layers, or what it makes of them is not part of the"
            " loss. Train with one process, choose another model, or freeze them in a net of your own"
            " (requires_grad_(False))"
        )


class _Inputs(NamedTuple):
    """What a step reads: of Batch, and of a cache."""

    images: Tensor
    labels: Tensor
    labels_b: Tensor | None
    mix: Tensor | None
    pooled_t: Tensor | None


def _inputs(batch: Batch, pooled_t: Tensor | None) -> _Inputs:
    return _Inputs(batch.images, batch.labels, batch.labels_b, batch.mix, pooled_t)


def _each(batch: _Inputs, made: Callable[[Tensor], Tensor]) -> _Inputs:
    images, labels, *others = (None if x is None else made(x) for x in batch)
    assert images is not None
    assert labels is not None
    return _Inputs(images, labels, *others)


def _rows(batch: _Inputs, rows: slice) -> _Inputs:
    return _each(batch, lambda x: x[rows])


def _parts(batch: _Inputs, n: int) -> list[_Inputs]:
    """The batch in n equal parts, in order."""
    size = len(batch.labels) // n
    return [batch] if n == 1 else [_rows(batch, slice(i * size, (i + 1) * size)) for i in range(n)]
