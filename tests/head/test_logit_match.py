"""The logit match by W^T W (csrc/cpu/logit_match.cpp) where a difference avoids the directions in which W is large: no
worse than eager, which multiplies by W.

Sizes are those from which the CPU takes W^T W: K Ct >= 2^18.
"""

import contextlib

import pytest
import torch
from torch import Tensor

from ijckd_fast import head
from ijckd_fast.head import reference

F64 = torch.float64
K, Ct, B = 4096, 64, 32
SEEDS = 3
ROUNDING = 2**-23  # of a float32 result itself


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=F64)


def across(u: Tensor, d: Tensor) -> Tensor:
    """d without its share along u."""
    u = u / u.norm()
    return d - (d @ u)[:, None] * u


def spectrum(g: torch.Generator, power: float) -> tuple[Tensor, Tensor]:
    """(W [K, Ct], its right singular vectors as rows, the largest first)"""
    left, right = (torch.linalg.qr(randn(g, n, Ct))[0] for n in (K, Ct))
    return left * (1 + torch.arange(Ct, dtype=F64)) ** -power @ right.T, right.T


def flat(g):
    return randn(g, K, Ct), randn(g, B, Ct)


def one_large_row(g):
    weight = randn(g, K, Ct)
    weight[7] *= 1e4
    return weight, across(weight[7], randn(g, B, Ct))


def some_large_rows(g):
    weight = randn(g, K, Ct)
    weight[:24] *= 1e4  # more than are kept beside W^T W
    directions = torch.linalg.svd(weight[:24], full_matrices=True)[2][24:]
    return weight, randn(g, B, Ct - 24) @ directions


def common_vector(g, size=1e3):
    common = randn(g, Ct)
    return randn(g, K, Ct) + size * common, across(common, randn(g, B, Ct))


def common_vector_and_any_difference(g):
    return common_vector(g)[0], randn(g, B, Ct)


def columns_of_any_size(g):
    return randn(g, K, Ct) * torch.logspace(0, 4, Ct, dtype=F64), randn(g, B, Ct)


def small_columns_alone(g):
    sizes = torch.logspace(0, 4, Ct, dtype=F64)
    return randn(g, K, Ct) * sizes, randn(g, B, Ct) * (sizes < 10)


def low_eigenspace(g, power=0.7):
    weight, directions = spectrum(g, power)
    return weight, randn(g, B, Ct // 8) @ directions[-Ct // 8 :]


def least_direction(g):
    weight, directions = spectrum(g, 2.0)
    return weight, randn(g, B, 1) @ directions[-1:]


def few_rows_apart(g):
    """All rows near four of them, and a difference that sees the distance alone."""
    centres = randn(g, 4, Ct) * 100
    weight = centres[torch.arange(K) % 4] + randn(g, K, Ct) / 10
    return weight, randn(g, B, Ct - 4) @ torch.linalg.svd(centres, full_matrices=True)[2][4:]


def rows_of_both_kinds(g):
    weight, d = one_large_row(g)
    d[::2] = randn(g, B // 2, Ct)
    return weight, d


CASES = [
    flat, one_large_row, some_large_rows, common_vector, common_vector_and_any_difference, columns_of_any_size,
    small_columns_alone, low_eigenspace, least_direction, few_rows_apart, rows_of_both_kinds,
]  # fmt: skip
# pooled_t over d: 0 is what eager does best with, no rounding of its two logits being larger than their difference
TEACHERS = [0, 1, 30]


def run(op, z, weight, pooled_t, bf16: bool) -> tuple[float, Tensor]:
    z = z.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
        labels = torch.zeros(len(z), dtype=torch.int64)
        _, parts, _ = out = op.classifier_loss(z, weight, None, labels, pooled_t=pooled_t, ce=0.0, sr=1.0)
    out[0].backward()
    return parts[1].item(), z.grad.double()


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_no_worse_than_eager(bf16):
    lines, failed = [], []
    for case in CASES:
        for size in TEACHERS:
            squares = torch.zeros(2, 2, dtype=F64)  # [[value, gradient] of ours, of eager's], relative errors
            for seed in range(SEEDS):
                g = torch.Generator().manual_seed(seed)
                weight, d = case(g)
                weight = (weight.bfloat16() if bf16 else weight).float()
                pooled_t = (randn(g, B, Ct) * size * d.norm(dim=1, keepdim=True) / Ct**0.5).float()
                z = (pooled_t.double() + d).float()
                z = z.bfloat16().float() if bf16 and size == 0 else z
                logits = (z.double() - pooled_t.double()) @ weight.double().T
                value, gradient = logits.square().mean(), logits @ weight.double() * (2 / (B * K))
                for i, op in enumerate((head, reference)):
                    got, dz = run(op, z, weight, pooled_t, bf16)
                    squares[i, 0] += (got / value - 1) ** 2 / SEEDS
                    squares[i, 1] += ((dz - gradient).norm() / gradient.norm()) ** 2 / SEEDS
            ours, eager = squares.sqrt()
            ok = bool((ours <= 2 * eager + ROUNDING).all())
            cells = "   ".join(f"{o:9.1e}{e:9.1e}" for o, e in zip(ours.tolist(), eager.tolist(), strict=True))
            lines.append(f"{case.__name__:34}{size:4}  {cells}{'' if ok else '  <-'}")
            failed += [] if ok else [case.__name__]
    assert not failed, "\n".join([f"{'':38}  {'value':>9}{'eager':>9}   {'dz':>9}{'eager':>9}", *lines])


@pytest.mark.parametrize("size", [1e-25, 1e-18, 1e14, 1e18])
def test_a_weight_of_any_size(size):
    """W^T W would leave float's range where W d does not."""
    g = torch.Generator().manual_seed(0)
    weight, d = (randn(g, K, Ct) * size).float(), (randn(g, B, Ct) / size).float()
    value, gradient = run(reference, d.double(), weight.double(), torch.zeros_like(d).double(), False)
    got, dz = run(head, d, weight, torch.zeros_like(d), False)
    assert abs(got / value - 1) < 1e-6
    assert ((dz - gradient).norm() / gradient.norm()).item() < 1e-6


def test_equal_features_and_a_weight_of_zeros_match_exactly():
    g = torch.Generator().manual_seed(0)
    weight, z = randn(g, K, Ct).float(), randn(g, B, Ct).float()
    for w, pooled_t in ((weight, z), (torch.zeros_like(weight), 2 * z)):
        value, dz = run(head, z, w, pooled_t, False)
        assert value == 0
        assert not dz.any()


@pytest.mark.parametrize("case", [flat, one_large_row])
def test_a_row_that_is_not_finite_changes_no_other(case):
    g = torch.Generator().manual_seed(0)
    weight, d = (x.float() for x in case(g))
    _, expected = run(head, d, weight, torch.zeros_like(d), False)
    d[3, 5] = float("nan")
    value, dz = run(head, d, weight, torch.zeros_like(d), False)
    assert value != value
    assert dz[3].isnan().all()
    others = torch.arange(B) != 3
    torch.testing.assert_close(dz[others], expected[others], rtol=1e-5, atol=1e-6 * expected.abs().max().item())
