"""How the ops are called: which library, autocast, gradients in eager mode and under the compiler, refusals."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ijckd_fast.head.libraries import REBUILD, load_libraries

HAS_CUDA_LIBRARY = load_libraries()  # the registrations in connector.py and classifier.py need the schemas
ops = torch.ops.ijckd  # as csrc/bindings.cpp lists them


def check_library(x: Tensor, op: str) -> None:
    """Raises RuntimeError where no kernels of ours, or none that were built, serve x, the first argument of an op."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_quantized:
        refuse_kinds(op, [("the first argument", x)])
    if x.is_cpu:
        return
    if not x.is_cuda:
        raise RuntimeError(f"{op}: tensors must be on a CPU or a CUDA GPU, got {x.device}")
    if not HAS_CUDA_LIBRARY:
        raise RuntimeError(
            f"{op}: tensors on a GPU need _C_cuda.so, which was not built: install nvcc and run {REBUILD}"
        )


def refuse_kinds(op: str, arguments: Iterable[tuple[str, Any]]) -> None:
    """Raises RuntimeError where one of the arguments, (name, value), is a tensor of a kind that no op takes, or lies
    elsewhere than the first. Called where torch has found no kernel: its own words name backends.
    """
    device: torch.device | None = None
    for name, x in arguments:
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise RuntimeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
        device = device or x.device
        if x.layout is not torch.strided:
            layout = str(x.layout).removeprefix("torch.").removeprefix("_")
            raise RuntimeError(f"{op}: {name} must be a dense tensor, got the layout {layout}: use .to_dense()")
        if x.is_quantized:
            raise RuntimeError(f"{op}: {name} must be a floating-point tensor, got {x.dtype}: use .dequantize()")
        if x.device != device:
            raise RuntimeError(f"{op}: {name} must be on {device} like the first argument, got {x.device}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast takes matrix products on x's device; None where it is off or x is float64."""
    device = "cpu" if x.is_cpu else x.device.type  # asking for the device itself takes longer
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def own_products(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """For calls of ops on x under autocast, which would otherwise change a CPU op's own float32 products."""
    if x.is_cpu and torch.is_autocast_enabled("cpu"):
        return torch.autocast("cpu", enabled=False)
    return _AS_IT_IS


_AS_IT_IS = contextlib.nullcontext()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and losses: float64 for float64, float32 for all others. csrc/dtype.h has the same."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_rows(x: Tensor) -> Tensor:
    """[B, C, H, W] or [B, C] -> [B, H*W, C]: a view of a channels-last map, a copy of another."""
    return x.flatten(2).transpose(1, 2).contiguous() if x.dim() == 4 else x.unsqueeze(1)


# Enters an op below its registered autograd. Not public: where a torch no longer has it, the op is entered from above
# and finds no gradient to record.
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)


# Whether torch.func is at work, whose tensors an autograd.Function would meet. Not public, either.
_in_transform = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


UNSCALED: Any = object()  # the gradient 1 of a loss, where no tensor of it exists


class Differentiable(NamedTuple):
    """An op with its gradient, as `differentiable` makes it."""

    # (arguments) -> the op's first results, recorded by autograd where it is on
    call: Callable[..., tuple[Tensor, ...]]
    # (which of the trained arguments need a gradient, arguments) -> (all results, gradients of results -> those of the
    # trained arguments); both in torch.no_grad()
    at_once: Callable[..., tuple[tuple[Tensor, ...], Callable[..., tuple[Tensor | None, ...]]]]


class _AtOnce:
    """What autograd's context is to a gradient that is made without autograd."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        pass

    def mark_non_differentiable(self, *results: Tensor) -> None:
        pass


def differentiable(
    op: Any,
    setup: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
    trained: int,
    results: int,
    listed: tuple[str, ...] = (),
) -> Differentiable:
    """Registers the gradient of `op`.

    What torch.library makes of `setup` and `backward` serves the compiler. Eager calls take an autograd.Function of the
    same two, which costs Python less.

    setup      (ctx, inputs, output), as torch.library.register_autograd expects it
    backward   (ctx, *gradients of the outputs) -> gradients of the first `trained` arguments; the others get none
    results    how many of the op's results are for the caller, the first; autograd handles no others
    listed     names of the tensors in the op's list of tensors, which may end before them
    """
    names = [argument.name for argument in op._schema.arguments]
    of_tensors = ["Tensor" in str(argument.type) for argument in op._schema.arguments]
    untrained = (None,) * (len(names) - trained)

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

    def below_autograd(*args):
        with _below_autograd():
            return op(*args)

    def forward(ctx, *args):
        output = below_autograd(*args)
        setup(ctx, args, output)
        return output[:results]

    def eager_backward(ctx, *grads):
        return backward(ctx, *grads) + untrained

    torch.library.register_autograd(op._schema.name, library_backward, setup_context=library_setup)
    # Not with a setup_context of its own: for that apply binds the arguments to names first, and backward costs more.
    methods = {"forward": forward, "backward": eager_backward}
    function: Any = type(op._opname, (torch.autograd.Function,), {k: staticmethod(f) for k, f in methods.items()})
    apply = function.apply

    def tensors_of(args) -> Iterator[tuple[str, Any]]:
        for name, holds, value in zip(names, of_tensors, args, strict=True):
            if name == "tensors":
                yield from zip(listed, value, strict=False)
            elif holds:
                yield {"mean": "running_mean", "var": "running_var"}.get(name, name), value

    def checked(enter, args):
        if torch.compiler.is_compiling():
            return op(*args)
        if _in_transform():
            raise RuntimeError(
                f"{op._opname}: torch.func's transforms (grad, vmap, jacrev and the like) are not supported: use "
                "torch.autograd, and a loop or a larger batch instead of vmap"
            )
        try:
            return enter(*args)
        except Exception:
            refuse_kinds(op._opname, tensors_of(args))
            raise

    def call(*args):
        return checked(apply if torch.is_grad_enabled() else below_autograd, args)

    def at_once(needs, *args):
        output = checked(below_autograd, args)
        ctx = _AtOnce(needs + (False,) * len(untrained))
        setup(ctx, args, output)
        return output, functools.partial(backward, ctx)

    return Differentiable(call, at_once)


def refuse_double_backward(op: str) -> None:
    """Raises RuntimeError in a backward that is itself recorded."""
    # autograd runs a backward with gradients enabled only when asked for create_graph
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: double backward is not supported; call backward without create_graph")
