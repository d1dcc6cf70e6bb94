"""Records what the steps of scripts/benchmark.py launch on a Hopper GPU, at their true sizes: the GPU's host
code on emulated kernels, of which only a few blocks run and nothing is multiplied (emulator.h). Run by
scripts/kernel_model.py, with a package whose `_C.so` is that of `build.py recorded`; prints one line of JSON for each
workload.
"""

from __future__ import annotations

import ctypes
import json
import pathlib
import sys
import types
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ijckd_fast
from ijckd_fast import head  # before benchmark.py, which would take the checkout's

sys.path.append(str(pathlib.Path(__file__).parents[2] / "scripts"))
import benchmark

MULTIPROCESSORS = 132
# of torch's operations those that launch nothing
FREE = {"empty", "empty_strided", "empty_like", "new_empty", "resize_", "to", "contiguous", "view", "reshape"}
FREE |= {"_reshape_alias", "as_strided", "flatten", "detach", "detach_", "unsqueeze", "squeeze", "transpose", "t"}
FREE |= {"permute", "slice", "select", "alias"}


def untouched(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros of which no page lies in memory before it is written to."""
    elements = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    memory = np.zeros(elements * dtype.itemsize, dtype=np.uint8)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, stride)


def inputs(w: benchmark.Workload) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """(what a step of `w` reads, the classifier's gram), as on a GPU: the frozen classifier is in bfloat16 already."""
    with FakeTensorMode():
        like = benchmark.make_tensors(w, torch.bfloat16, "cpu")
    t = {}
    for name, x in like.items():
        dtype = torch.bfloat16 if name == "weight" else x.dtype
        t[name] = untouched(tuple(x.shape), x.stride(), dtype).requires_grad_(x.requires_grad)
    by_gram = w.K is not None and w.match == "sr" and not w.ce_only
    gram = untouched((2, w.Ct, w.Ct), (w.Ct**2, w.Ct, 1), torch.bfloat16) if by_gram else None
    return t, gram


def torch_kernels(profile: torch.profiler.profile) -> list[dict[str, Any]]:
    """What torch itself would launch: its operations that do work and consist of no others."""
    found = []
    for event in profile.events():
        space, _, name = event.name.partition("::")
        inner = {child.name.removeprefix("aten::") for child in event.cpu_children if child.name.startswith("aten::")}
        if space == "aten" and name not in FREE and inner <= FREE:
            sizes = [int(np.prod(shape)) for shape in event.input_shapes if shape]
            found.append({"name": name, "elements": max(sizes, default=1)})
    return found


def record(name: str, library: ctypes.CDLL) -> dict[str, Any]:
    w = benchmark.WORKLOADS[name]
    t, gram = inputs(w)

    def with_gram(op: Any) -> Any:
        return lambda *args, **terms: op(*args, **terms, **({"gram": gram} if gram is not None else {}))

    ops = types.SimpleNamespace(
        connector_match=head.connector_match,
        classifier_loss=with_gram(head.classifier_loss),
        projected_classifier_loss=with_gram(head.projected_classifier_loss),
    )
    step = benchmark.make_step(lambda t: benchmark.fused_loss(w, t, op=ops), t, "both", torch.bfloat16, 1.0)
    library.emulator_recorded()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        step()
    arrays = {**t, **({} if gram is None else {"gram": gram})}
    return {
        "workload": name,
        "launches": library.emulator_recorded().decode(),
        "inputs": {k: [x.data_ptr(), x.untyped_storage().nbytes()] for k, x in arrays.items()},
        "torch": torch_kernels(profile),
    }


def main() -> None:
    library = ctypes.CDLL(str(pathlib.Path(ijckd_fast.__file__).parent / "head/_C.so"))
    library.emulator_recorded.restype = ctypes.c_char_p
    library.emulator_record(MULTIPROCESSORS)
    for name in sys.argv[1:]:
        print(json.dumps(record(name, library)), flush=True)


if __name__ == "__main__":
    main()
