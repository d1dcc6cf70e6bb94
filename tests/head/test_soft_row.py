"""The terms of csrc/soft_row.h at the edges: equal rows, constants, confident rows, a sure teacher, few classes.

Their values and gradients at ordinary sizes are in the tables of op_cases.py. Runs on the CPU's ops;
test_emulated_ops.py runs it again on the CUDA kernels (IJCKD_KERNELS=cuda).
"""

import os

import pytest
import torch
import torch.nn.functional as F
from op_cases import F64, SOFT

from ijckd_fast import head
from ijckd_fast.head import reference

CUDA = os.environ.get("IJCKD_KERNELS", "cpu") == "cuda"
DTYPES = [F64, torch.float32, torch.bfloat16] + ([torch.float16] if CUDA else [])
TERMS = [{name: weight} for name, weight in SOFT.items()] + [{"kl": 1.0}]
STANDARDISED = [term | {"standardize": True} for term in TERMS if "hard" not in term]


def accumulator(dtype):
    return F64 if dtype == F64 else torch.float32


def inputs(B=6, Ct=24, K=75, dtype=torch.float32, seed=0):
    """z [B, Ct], weight [K, Ct], labels [B]"""
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(K, Ct, generator=g) / 3).to(dtype)
    return torch.randn(B, Ct, generator=g).to(accumulator(dtype)), weight, torch.randint(K, (B,), generator=g)


def loss_and_grad(op, z, weight, labels, bias=None, **keywords):
    z = z.detach().clone().requires_grad_()
    loss, parts, _ = op.classifier_loss(z, weight, bias, labels, **({"ce": 0.0} | keywords))
    loss.backward()
    return loss.detach(), parts, z.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("term", ["ttm", "wttm", "kl"])
def test_equal_rows_give_nothing(term, standardize, dtype):
    """With T and power 1, where both softmaxes are of one temperature."""
    g = torch.Generator().manual_seed(0)
    for K in (2, 3, 1000):
        z = torch.randint(-2, 3, (3, 8), generator=g).to(accumulator(dtype))
        weight = 8 * torch.randint(-3, 4, (K, 8), generator=g).to(dtype)  # exact logits, in any dtype
        labels = torch.zeros(3, dtype=torch.int64)
        more = {term: 1.0, "temperature": 1.0, "ttm_power": 1.0, "standardize": standardize}
        for teacher in ({"pooled_t": z}, {"logits_t": z @ weight.to(z.dtype).T}):
            loss, _, grad = loss_and_grad(head, z, weight, labels, **teacher, **more)
            assert loss == 0, f"{K} {list(teacher)}"
            assert not grad.any(), f"{K} {list(teacher)}"


@pytest.mark.parametrize("term", TERMS + STANDARDISED, ids=str)
def test_a_constant_changes_nothing(term):
    """All logits of a row, the student's and the teacher's, by the same whole number: exactly so in float64."""
    z, weight, labels = inputs(dtype=F64)
    logits_t = z.roll(1, 0) @ weight.T
    bias = torch.zeros(len(weight), dtype=F64)
    want = loss_and_grad(head, z, weight, labels, bias, logits_t=logits_t, temperature=2.0, **term)
    got = loss_and_grad(head, z, weight, labels, bias + 1024, logits_t=logits_t - 512, temperature=2.0, **term)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("confidence", [0, 5, 12, 30])
@pytest.mark.parametrize("term", TERMS + STANDARDISED, ids=str)
def test_confident_rows_are_no_worse_than_eagers(term, confidence):
    """Student and teacher far on the label's side, over eight seeds: the loss' error and the gradient's, in float32."""
    errors = torch.zeros(2, 2, dtype=F64)
    for seed in range(8):
        z, weight, labels = inputs(seed=seed)
        toward = confidence * weight[labels]
        pooled_t = z.roll(1, 0) + toward
        wide = [x.double() for x in (z + toward, weight)]
        more = {"temperature": 1.5, "ttm_power": 0.7, **term}
        oracle = loss_and_grad(reference, *wide, labels, pooled_t=pooled_t.double(), **more)
        for i, op in enumerate((head, reference)):
            got = loss_and_grad(op, z + toward, weight, labels, pooled_t=pooled_t, **more)
            for j in (0, 2):
                errors[i, j // 2] += ((got[j].double() - oracle[j]).norm() / (oracle[j].norm() + 1e-30)) ** 2
    ours, eagers = (errors / 8).sqrt()
    assert (ours <= 2 * eagers + 2**-20).all(), f"{ours.tolist()}, eager's {eagers.tolist()}"


def test_a_sure_teacher_makes_nkds_own_part_the_hard_loss():
    z, weight, labels = inputs(dtype=F64)
    logits_t = 1e4 * F.one_hot(labels, len(weight)).double()
    hard = loss_and_grad(head, z, weight, labels, logits_t=logits_t, hard=1.0)
    nkd = loss_and_grad(head, z, weight, labels, logits_t=logits_t, nkd=1.0, nkd_gamma=0.0)
    ce = loss_and_grad(head, z, weight, labels, ce=1.0)
    for got in (nkd, ce):
        torch.testing.assert_close(got[0], hard[0], rtol=1e-13, atol=0)
        torch.testing.assert_close(got[2], hard[2], rtol=1e-11, atol=1e-14)


def test_standardised_rows_do_not_see_a_scale():
    z, weight, labels = inputs(dtype=F64)
    logits_t = z.roll(1, 0) @ weight.T
    want, got = (
        loss_and_grad(head, z, weight, labels, logits_t=scale * logits_t, kl=1.0, standardize=True) for scale in (1, 50)
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)  # but for the 1e-7 beside the deviation


def test_a_row_of_equal_logits_has_no_direction():
    """Where torch's standard deviation has no derivative and makes NaN."""
    _, weight, labels = inputs(dtype=F64)
    z = torch.zeros(6, 24, dtype=F64)
    loss, _, grad = loss_and_grad(head, z, weight, labels, logits_t=torch.randn(6, 75, dtype=F64), kl=1.0,
                                  standardize=True)  # fmt: skip
    assert loss.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("term", TERMS + STANDARDISED, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_logit_never_makes_a_finite_loss(term, value):
    z, weight, labels = inputs(dtype=F64)
    bias = torch.zeros(len(weight), dtype=F64)
    bias[labels[1]] = value
    teacher = {"logits_t": z.roll(1, 0) @ weight.T}
    assert not loss_and_grad(head, z, weight, labels, bias, **teacher, **term)[0].isfinite()
    teacher["logits_t"][2, 7] = float("nan")
    if "hard" not in term:  # whose class is another one
        assert not loss_and_grad(head, z, weight, labels, **teacher, **term)[0].isfinite()
