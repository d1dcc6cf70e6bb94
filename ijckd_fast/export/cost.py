"""What one image costs, by part: parameters, multiply-accumulates, milliseconds on this CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ijckd_fast.export.deployed import Deployed, random_images
from ijckd_fast.nets import Backbone, count_macs, count_parameters


def _median_ms(calls: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Median wall time of each call in ms, all taking turns, after a fifth as many rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs + runs // 5):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times[runs // 5 :]) for name, times in seconds.items()}


@torch.no_grad()
def measure_cost(
    module: Deployed, image_size: int, runs: int, onnx_answer: Callable[[Tensor], Tensor] | None
) -> dict[str, dict[str, Any]]:
    """Cost of one image [1, 3, S, S] on the CPU, by part.

    runs     timed calls of each, of which the median is taken
    returns  {part: {"params", "macs", "torch_ms", "onnxruntime_ms"}} of the parts 'backbone', 'connector',
             'classifier', 'total' and 'student alone', the backbone with a classifier of its own for as many classes.
             None where not measured. The connector's time has pooling in it: to the teacher's map size, and to z.
    """
    image = random_images(image_size)[:1]
    x = module.features(image)  # [1, Cs, H, W] or [1, Cs]
    z = module.connect(x)  # [1, C]
    pooled = module.backbone.features(image)[1]  # [1, Cs]
    own = nn.Linear(module.backbone.channels, module.classifier.out_features)
    calls: dict[str, Callable[[], Any]] = {
        "backbone": lambda: module.features(image),
        "connector": lambda: module.connect(x),
        "classifier": lambda: module.classifier(z),
        "total": lambda: module(image),
        "student alone": lambda: own(module.backbone.features(image)[1]),
    }
    if onnx_answer is not None:
        calls["onnxruntime"] = lambda: onnx_answer(image)
    ms = _median_ms(calls, runs)

    def row(name: str, *parts: tuple[nn.Module, Tensor]) -> dict[str, Any]:
        return {
            "params": sum(count_parameters(part) for part, _ in parts),
            "macs": sum(count_macs(part, inputs) for part, inputs in parts),
            "torch_ms": ms[name] if any(count_parameters(part) for part, _ in parts) else 0.0,
            "onnxruntime_ms": ms.get("onnxruntime") if name == "total" else None,
        }

    alone = module.backbone.net, image
    backbone = Backbone(module.backbone, module.takes_map), image
    connector, classifier = (module.connector, x), (module.classifier, z)
    return {
        "backbone": row("backbone", backbone),
        "connector": row("connector", connector),
        "classifier": row("classifier", classifier),
        "total": row("total", backbone, connector, classifier),
        "student alone": row("student alone", alone, (own, pooled)),
    }


def cost_table(row: dict[str, Any]) -> Table:
    """The costs of `write_export`'s row as a table to print."""
    cost = row["cost"]
    threads = f"{cost['threads']} thread{'' if cost['threads'] == 1 else 's'}"
    table = Table(
        "part",
        "parameters",
        "MACs per image",
        "torch, ms",
        "onnxruntime, ms",
        title=f"one image on the CPU, {threads}, median of {cost['runs']}",
    )
    for name, part in cost["parts"].items():
        if name == "student alone":
            table.add_section()
        times = ("-" if part[key] is None else f"{part[key]:.3f}" for key in ("torch_ms", "onnxruntime_ms"))
        table.add_row(name, f"{part['params']:,}", f"{part['macs']:,}", *times)
    return table
