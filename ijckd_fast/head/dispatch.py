"""How the ops are called: which library, autocast, gradients in eager mode and under the compiler, refusals."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ijckd_fast.head.libraries import REBUILD, load_libraries

HAS_CUDA_LIBRARY = load_libraries()  # the registrations in connector.py and classifier.py need the schemas
ops = torch.ops.ijckd  # as csrc/bindings.cpp lists them


def check_library(x: Tensor, op: str) -> None:
    """Raises RuntimeError where x lies on a GPU and the ops for GPUs were not built."""
    if x.is_cuda and not HAS_CUDA_LIBRARY:
        raise RuntimeError(
            f"{op}: tensors on a GPU need _C_cuda.so, which was not built: install nvcc and run {REBUILD}"
        )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast takes matrix products on x's device; None where it is off or x is float64."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def own_products(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """For calls of ops on x under autocast, which would otherwise change a CPU op's own float32 products."""
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return torch.autocast("cpu", enabled=False)
    return contextlib.nullcontext()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and losses: float64 for float64, float32 for all others. csrc/dtype.h has the same."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_rows(x: Tensor) -> Tensor:
    """[B, C, H, W] or [B, C] -> [B, H*W, C]: a view of a channels-last map, a copy of another."""
    return x.flatten(2).transpose(1, 2).contiguous() if x.dim() == 4 else x.unsqueeze(1)


# Enters an op below its registered autograd. Not public: where a torch no longer has it, the op is entered from above
# and finds no gradient to record.
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)


def differentiable(
    op: Any, setup: Callable[..., None], backward: Callable[..., tuple[Tensor | None, ...]], trained: int
) -> Callable[..., tuple[Tensor, ...]]:
    """Registers the gradient of `op`; returns the op to call.

    What torch.library makes of `setup` and `backward` serves the compiler. Eager calls take an autograd.Function of the
    same two, which costs Python less.

    setup      (ctx, inputs, output), as torch.library.register_autograd expects it
    backward   (ctx, *gradients of the outputs) -> gradients of the first `trained` arguments; the others get none
    """
    untrained = len(op._schema.arguments) - trained

    def library_setup(ctx, inputs, output):
        # torch.library takes a list of tensors apart into single arguments, but not one that holds a None; the
        # gradients must have the same form.
        ctx.untrained = [
            [None] * len(x) if isinstance(x, (list, tuple)) and all(isinstance(t, Tensor) for t in x) else None
            for x in inputs[trained:]
        ]
        setup(ctx, inputs, output)

    def library_backward(ctx, *grads):
        return (*backward(ctx, *grads), *ctx.untrained)

    def forward(ctx, *args):
        with _below_autograd():
            output = op(*args)
        setup(ctx, args, output)
        return output

    def eager_backward(ctx, *grads):
        return (*backward(ctx, *grads), *[None] * untrained)

    torch.library.register_autograd(op._schema.name, library_backward, setup_context=library_setup)
    # Not with a setup_context of its own: for that apply binds the arguments to names first, and backward costs more.
    methods = {"forward": forward, "backward": eager_backward}
    function: Any = type(op._opname, (torch.autograd.Function,), {k: staticmethod(f) for k, f in methods.items()})

    def call(*args):
        eager = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return function.apply(*args) if eager else op(*args)

    return call


def refuse_double_backward(op: str) -> None:
    """Raises RuntimeError in a backward that is itself recorded."""
    # autograd runs a backward with gradients enabled only when asked for create_graph
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: double backward is not supported; call backward without create_graph")
