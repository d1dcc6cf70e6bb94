"""Sums over many rows, positions and classes, and beside a large mean: errors against float64 of the same inputs, at
most twice eager's.

Runs on the CPU's ops; test_emulated_ops.py runs it again on the CUDA kernels.
"""

import math
import os
from typing import NamedTuple

import pytest
import torch
from op_cases import connector_inputs, run_connector
from torch import Tensor

from ijckd_fast import head
from ijckd_fast.head import connector, reference

KERNELS = os.environ.get("IJCKD_KERNELS", "cpu")
SEEDS = 3  # an error is the root of the mean square over the seeds
ROUNDING = 2**-22  # of a float32 result itself, which eager may hit by luck


class Sums(NamedTuple):
    """Arguments of connector_inputs; `mean` of every channel of the projection, by a constant first input."""

    shape: tuple[int, ...]  # of u
    norm: str = "train"
    match: str = "map"
    relu: bool = True
    mean: float = 0
    channels_last: bool = False
    Ct: int = 4


CASES = {
    "12000 vectors": Sums((12000, 5), norm="bias", match="pooled", relu=False),
    "12000 vectors, ReLU": Sums((12000, 5), norm="bias", match="map"),
    "12000 vectors, BatchNorm": Sums((12000, 5), match="pooled"),
    "112 x 112": Sums((2, 5, 112, 112), norm="bias"),
    "112 x 112, BatchNorm": Sums((2, 5, 112, 112)),
    "8 maps of 112 x 112": Sums((8, 5, 112, 112), norm="none"),
    "14 x 14, mean 10": Sums((24, 5, 14, 14), mean=10, channels_last=True),
    "9 x 9, mean 1e3": Sums((7, 5, 9, 9), mean=1e3),
    "14 x 14, mean 1e3": Sums((24, 5, 14, 14), mean=1e3),
    "14 x 14, mean 1e5": Sums((24, 5, 14, 14), mean=1e5, channels_last=True),
    "4500 vectors, mean 1e5": Sums((4500, 5), match="pooled", mean=1e5),
    "64 vectors, mean -1e3": Sums((64, 5), match="map", relu=False, mean=-1e3),
}  # fmt: skip


def inputs(case: Sums, dtype: torch.dtype, seed: int):
    leaves, keywords = connector_inputs(
        case.shape, case.Ct, norm=case.norm, match=case.match, relu=case.relu, dtype=dtype,
        channels_last=case.channels_last, seed=seed,
    )  # fmt: skip
    if case.mean:
        with torch.no_grad():
            leaves["u"][:, 0] = 1
            leaves["weight"][:, 0] = case.mean
    return leaves, keywords


def in_double(values):
    return {k: v.detach().double() if isinstance(v, Tensor) else v for k, v in values.items()}


def assert_no_worse(table: dict[str, list[float]]) -> None:
    """table: result -> (our error, eager's)"""
    wrong = [k for k, (ours, eager) in table.items() if not ours <= 2 * eager + ROUNDING]
    assert not wrong, f"{wrong}, of (ours, eager) " + ", ".join(f"{k}: {o:.1e} {e:.1e}" for k, (o, e) in table.items())


def cases_of(dtype: torch.dtype) -> list[str]:
    """A bfloat16 has 8 bits: beside a mean of 1e5 nothing is left of what varies."""
    return [name for name, case in CASES.items() if dtype != torch.bfloat16 or abs(case.mean) < 1e4]


@pytest.mark.parametrize(("dtype", "name"), [(t, n) for t in (torch.float32, torch.bfloat16) for n in cases_of(t)])
def test_connector_match_is_no_worse_than_eager(dtype, name):
    squares: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        leaves, keywords = inputs(CASES[name], dtype, seed)
        names = ["z", "fm", *(k for k in keywords if k.startswith("running")), *(f"gradient of {k}" for k in leaves)]
        if KERNELS == "cuda":  # the emulator has the CPU library's product in the place of the GPU's
            names[names.index("gradient of weight")] = ""
        oracle = run_connector(reference.connector_match, in_double(leaves), in_double(keywords))
        for i, op in enumerate((head.connector_match, reference.connector_match)):
            for k, result, want in zip(names, run_connector(op, leaves, keywords), oracle, strict=True):
                error = (result.double() - want).norm() / want.norm()
                squares.setdefault(k, [0, 0])[i] += error.item() ** 2 / SEEDS
    assert_no_worse({k: [math.sqrt(x) for x in both] for k, both in squares.items() if k})


def test_constant_channels_have_no_variance():
    """However large they are: BatchNorm gives its shift."""
    constants = torch.tensor([0.1, -3e4, 1e5, 1e-30, 0.0])
    running = {"running_mean": torch.zeros(5), "running_var": torch.ones(5)}
    z, _ = head.connector_match(
        torch.ones(37, 1, 5, 4), constants[:, None], bn_weight=torch.ones(5), bn_bias=torch.arange(5.0), momentum=1.0,
        relu=False, **running,
    )  # fmt: skip
    torch.testing.assert_close(z, torch.arange(5.0).expand(37, 5), rtol=0, atol=0)
    torch.testing.assert_close(running["running_mean"], constants, rtol=0, atol=0)
    assert running["running_var"].tolist() == [0] * 5


def test_ranks_statistics_are_joined_in_double(monkeypatch):
    """Of this rank's 150 vectors and another's 250, beside a mean that dwarfs what varies."""
    torch.manual_seed(0)
    u, weight = torch.randn(150, 3), torch.randn(6, 3)
    weight[:, 0], u[:, 0] = 1e5, 1
    other = torch.cat([99999 + torch.rand(6), 5 + torch.rand(6), torch.tensor([250.0])])
    mine = torch.empty(0)

    def all_gather(ranks, local, group):
        nonlocal mine
        mine = local
        ranks[0].copy_(local)
        ranks[1].copy_(other)

    monkeypatch.setattr(connector.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(connector.dist, "all_gather", all_gather)
    running = {"running_mean": torch.zeros(6), "running_var": torch.ones(6)}
    head.connector_match(
        u, weight, bn_weight=torch.ones(6), bn_bias=torch.zeros(6), momentum=1.0, process_group=object(), **running
    )
    parts = torch.stack([mine, other]).double()
    n, means, variances = parts[:, -1:], parts[:, :6], parts[:, 6:12]
    mean = (n * means).sum(0) / 400
    var = (n * (variances + (means - mean) ** 2)).sum(0) / 399
    torch.testing.assert_close(running["running_mean"], mean.float(), rtol=0, atol=0)
    torch.testing.assert_close(running["running_var"], var.float(), rtol=2e-7, atol=0)


def test_label_smoothing_over_many_classes_is_no_worse_than_eager():
    """The sum of W's rows and of the logits, of one sign all."""
    squares = [[0.0, 0.0], [0.0, 0.0]]
    for seed in range(SEEDS):
        g = torch.Generator().manual_seed(seed)
        B, K, Ct = 32, 60000, 4
        weight = 1 + torch.rand(K, Ct, generator=g)
        z, labels = (
            torch.rand(B, Ct, generator=g),
            torch.randint(0, K, (B,), generator=g),
        )

        def run(op, t, z=z, weight=weight, labels=labels):
            leaf = z.to(t, copy=True).requires_grad_()
            loss, *_ = op.classifier_loss(leaf, weight.to(t), None, labels, label_smoothing=1.0)
            loss.backward()
            return loss.double(), leaf.grad.double()

        oracle = run(reference, torch.float64)
        for i, op in enumerate((head, reference)):
            for k, (result, want) in enumerate(zip(run(op, torch.float32), oracle, strict=True)):
                squares[k][i] += ((result - want).norm() / want.norm()).item() ** 2 / SEEDS
    assert_no_worse({k: [math.sqrt(x) for x in both] for k, both in zip(("loss", "dz"), squares, strict=True)})
