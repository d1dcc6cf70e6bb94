"""Hard cases of classifier_loss in every dtype: errors of loss and gradient against float64 of the same inputs, beside
eager's own.

Runs on the CPU's ops; test_emulated_ops.py runs it again on the CUDA kernels (IJCKD_KERNELS=cuda). A failure prints the
whole table.
"""

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ijckd_fast import head
from ijckd_fast.head import reference

KERNELS = os.environ.get("IJCKD_KERNELS", "cpu")
SEEDS = 4  # an error is the root of the mean square over the seeds: of one mean loss it is a matter of luck
ROUNDING = 2**-22  # of a float32 result itself, which eager may hit by luck


class Case(NamedTuple):
    """Arguments of classifier_loss in float64, `weight` already representable in the dtype."""

    z: Tensor  # [B, Ct]
    weight: Tensor  # [K, Ct]
    labels: Tensor  # [B]
    terms: dict[str, float]
    pooled_t: Tensor | None = None  # [B, Ct]


def frozen_head(K: int, Ct: int, B: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A classifier with the decaying spectrum of trained ones, and features as after ReLU and pooling: logits up to
    about 20.
    """

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    left, right = (torch.linalg.qr(randn(n, Ct))[0] for n in (K, Ct))
    weight = left * (1 + torch.arange(Ct, dtype=torch.float64)) ** -0.7 @ right.T
    weight *= 1.2 / weight.norm(dim=1).mean()
    chosen = weight[torch.randint(0, K, (B,), generator=g)]
    features = (randn(B, Ct) * 0.45 + 0.2).relu() + 5.4 * chosen / weight.norm(dim=1).mean()
    return weight.to(dtype).double(), features.relu().float().double()


def confident(dtype, g, B=64, K=1000):
    """Losses of 1e-8 to 1e-6: the label's logit alone, far above the others."""
    weight = torch.randn(K, 8, generator=g, dtype=torch.float64) / 64
    weight[0] = torch.eye(8, dtype=torch.float64)[0]
    z = torch.randn(B, 8, generator=g, dtype=torch.float64) / 8
    z[:, 0] = math.log(K) - torch.linspace(-8, -6, B, dtype=torch.float64) * math.log(10)
    return Case(z, weight.to(dtype).double(), torch.zeros(B, dtype=torch.int64), {"ce": 1})


def close_features(dtype, g, B=64, K=1000, Ct=128):
    """z within 0.7 % of pooled_t, as late in training."""
    weight, features = frozen_head(K, Ct, B, dtype, g)
    d = torch.randn(B, Ct, generator=g, dtype=torch.float64)
    d *= 0.007 * features.norm(dim=1, keepdim=True) / d.norm(dim=1, keepdim=True)
    return Case(features + d, weight, torch.zeros(B, dtype=torch.int64), {"ce": 0, "sr": 1}, features)


def low_eigenspace(dtype, g, B=64, K=1000, Ct=128):
    """z - pooled_t where W sees it least, which is what training leaves to the end: the lowest eighth of W^T W."""
    weight, features = frozen_head(K, Ct, B, dtype, g)
    directions = torch.linalg.eigh(weight.T @ weight)[1][:, : Ct // 8]
    d = torch.randn(B, Ct // 8, generator=g, dtype=torch.float64) @ directions.T * 0.1
    return Case(features + d, weight, torch.zeros(B, dtype=torch.int64), {"ce": 0, "sr": 1}, features)


def large_logits(dtype, g, term, B=64, K=1000, Ct=32):
    """Logits of +-1e3, teacher's and student's, in cross-entropy or in KL."""
    weight = torch.randn(K, Ct, generator=g, dtype=torch.float64).to(dtype).double()
    z = torch.randn(B, Ct, generator=g, dtype=torch.float64)
    z *= 1000 / (z @ weight.T).abs().amax(1, keepdim=True)
    pooled_t = z + torch.randn(B, Ct, generator=g, dtype=torch.float64)
    return Case(z, weight, torch.randint(0, K, (B,), generator=g), {"ce": 0, term: 1}, pooled_t)


def many_classes(dtype, g, B=48, K=21841, Ct=32):
    """Probabilities of 1e-5 and far below."""
    weight, features = frozen_head(K, Ct, B, dtype, g)
    return Case(features, weight, torch.randint(0, K, (B,), generator=g), {"ce": 1, "label_smoothing": 0.1})


def saturated(dtype, g, B=64, K=1000, Ct=32):
    """The label's logit a thousand below the largest."""
    weight = torch.randn(K, Ct, generator=g, dtype=torch.float64).to(dtype).double()
    z = torch.randn(B, Ct, generator=g, dtype=torch.float64)
    logits = z @ weight.T
    z *= 1000 / (logits.amax(1) - logits.amin(1))[:, None]
    return Case(z, weight, logits.argmin(1), {"ce": 1})


CASES: dict[str, Callable[..., Case]] = {
    "confident": confident,
    "confident, K 21841": lambda dtype, g: confident(dtype, g, K=21841),
    "z near pooled_t": close_features,
    "z near pooled_t, by W^T W": lambda dtype, g: close_features(dtype, g, K=2048),
    "low eigenspace": low_eigenspace,
    "low eigenspace, by W^T W": lambda dtype, g: low_eigenspace(dtype, g, K=2048),
    "logits of 1000": lambda dtype, g: large_logits(dtype, g, "ce"),
    "logits of 1000, KL": lambda dtype, g: large_logits(dtype, g, "kl"),
    "K 21841": many_classes,
    "saturated": saturated,
}

DTYPES = [torch.float32, torch.bfloat16] + ([torch.float16] if KERNELS == "cuda" else [])
# Relative bounds of (loss, dz), three times what was measured, but 1e-7 at least.
COLUMNS = [
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
    *(("cuda", t) for t in (torch.float32, torch.bfloat16, torch.float16)),
]
BOUNDS: dict[str, tuple[tuple[float, float], ...]] = {
    "confident": ((1e-7, 3e-6), (2e-3, 2e-1), (1e-7, 3e-6), (2e-3, 2e-1), (2e-3, 2e-1)),
    "confident, K 21841": ((1e-7, 3e-7), (2e-2, 2e-1), (1e-7, 3e-5), (2e-2, 2e-1), (3e-4, 2e-1)),
    "z near pooled_t": ((1e-7, 4e-7), (5e-4, 8e-3), (1e-7, 4e-7), (5e-4, 8e-3), (4e-5, 1e-3)),
    "z near pooled_t, by W^T W": ((1e-7, 7e-7), (8e-7, 7e-7), (1e-7, 3e-7), (6e-4, 8e-3), (7e-5, 2e-3)),
    "low eigenspace": ((2e-7, 4e-6), (3e-4, 4e-1), (1e-7, 4e-6), (3e-4, 4e-1), (3e-5, 5e-2)),
    "low eigenspace, by W^T W": ((1e-6, 4e-5), (2e-5, 4e-5), (1e-7, 3e-6), (4e-4, 5e-1), (2e-5, 5e-2)),
    "logits of 1000": ((1e-7, 4e-6), (6e-4, 1e-1), (1e-7, 4e-6), (6e-4, 1e-1), (5e-5, 8e-3)),
    "logits of 1000, KL": ((4e-5, 4e-5), (2e-1, 6e-1), (6e-5, 4e-5), (2e-1, 6e-1), (5e-2, 8e-2)),
    "K 21841": ((1e-7, 1e-6), (2e-4, 8e-3), (1e-7, 8e-7), (2e-4, 8e-3), (4e-5, 9e-4)),
    "saturated": ((1e-7, 4e-6), (4e-4, 6e-2), (1e-7, 4e-6), (4e-4, 6e-2), (1e-4, 2e-2)),
}  # fmt: skip


def run(op, case: Case, dtype: torch.dtype) -> tuple[float, Tensor]:
    """(loss, dz) with `weight` in dtype, all else in its accumulator."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    z = case.z.to(acc, copy=True).requires_grad_()
    scale = 65536 if op is reference and dtype == torch.float16 else 1  # the loss scale that eager needs
    pooled_t = None if case.pooled_t is None else case.pooled_t.to(acc)
    loss, *_ = op.classifier_loss(z, case.weight.to(dtype), None, case.labels, pooled_t=pooled_t, **case.terms)
    (scale * loss).backward()
    return loss.item(), z.grad.double() / scale


def errors(build: Callable[..., Case], dtype: torch.dtype) -> list[list[float]]:
    """[[loss, dz] of ours, [loss, dz] of eager], relative."""
    squares = torch.zeros(2, 2, dtype=torch.float64)
    seeds = SEEDS // 2 if KERNELS == "cuda" and dtype != torch.float32 else SEEDS  # emulated tiles take seconds for one
    for seed in range(seeds):
        case = build(dtype, torch.Generator().manual_seed(seed))
        # what every form is given: z and pooled_t in float32
        case = case._replace(
            z=case.z.float().double(), pooled_t=None if case.pooled_t is None else case.pooled_t.float().double()
        )
        wanted, gradient = run(reference, case, torch.float64)
        for i, op in enumerate((head, reference)):
            loss, dz = run(op, case, dtype)
            squares[i, 0] += (loss / wanted - 1) ** 2 / seeds
            squares[i, 1] += ((dz - gradient).norm() / gradient.norm()) ** 2 / seeds
    return squares.sqrt().tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_cases(dtype):
    lines, failed = [f"{'':28}{'loss':>9}{'bound':>9}{'eager':>9}   {'dz':>9}{'bound':>9}{'eager':>9}"], []
    for name, build in CASES.items():
        ours, eager = errors(build, dtype)
        bounds = BOUNDS[name][COLUMNS.index((KERNELS, dtype))]
        cells = [f"{o:9.1e}{b:9.1e}{e:9.1e}" for o, b, e in zip(ours, bounds, eager, strict=True)]
        ok = all(o <= min(b, 2 * e + ROUNDING) for o, b, e in zip(ours, bounds, eager, strict=True))
        lines.append(f"{name:28}{'   '.join(cells)}{'' if ok else '  <-'}")
        failed += [] if ok else [name]
    assert not failed, "\n".join([f"{KERNELS} {dtype}: {failed}", *lines])
