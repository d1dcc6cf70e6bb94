"""Values at the edges: KL of equal and nearly equal rows, of large logits and biases, of a student far from its
teacher; logits_t beside pooled_t and in its own precision; mixup with a small share.

Runs on the CPU's ops; test_emulated_ops.py runs it again on the CUDA kernels (IJCKD_KERNELS=cuda), with fewer rows.
"""

import os

import pytest
import torch
from op_cases import ALONE, F64

from ijckd_fast import head
from ijckd_fast.head import reference

CUDA = os.environ.get("IJCKD_KERNELS", "cpu") == "cuda"
DTYPES = [F64, torch.float32, torch.bfloat16] + ([torch.float16] if CUDA else [])
SHIFTS = (0.0, 1e3, 1e5, 1e8)  # of all logits of a row
SOFT = {"ce": 0.0, "kl": 1.0, "temperature": 1.0}
ROUNDING = 2**-22


def accumulator(dtype):
    return F64 if dtype == F64 else torch.float32


def whole_numbers(K, dtype, B=3, Ct=8):
    """z [B, Ct], weight [K, Ct] whose logits are multiples of 8 up to 384: exact in any dtype and order of the sum, and
    beside a shift of 1e8 in float32.
    """
    g = torch.Generator().manual_seed(K)
    z = torch.randint(-2, 3, (B, Ct), generator=g).to(accumulator(dtype))
    return z, 8 * torch.randint(-3, 4, (K, Ct), generator=g).to(dtype)


def kl_and_grad(op, z, weight, bias=None, **keywords):
    z = z.clone().requires_grad_()
    labels = torch.zeros(len(z), dtype=torch.int64)
    loss, *_ = op.classifier_loss(z, weight, bias, labels, **(SOFT | keywords))
    loss.backward()
    return loss.item(), z.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [1, 2, 1000])
@pytest.mark.parametrize("T", [1.0, 4.0])
def test_kl_of_equal_rows_is_zero(K, T, dtype):
    z, weight = whole_numbers(K, dtype)
    for shift in SHIFTS:
        bias = torch.full((K,), shift, dtype=z.dtype)
        logits = z @ weight.to(z.dtype).T + bias
        for teacher in ({"pooled_t": z}, {"logits_t": logits}, {"logits_t": logits - 8}):
            kl, grad = kl_and_grad(head, z, weight, bias, temperature=T, sr=0.0, **teacher)
            assert kl == 0, f"{shift} {list(teacher)}"
            assert not grad.any(), f"{shift} {list(teacher)}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("apart", [1, 8], ids=["near", "far"])
def test_kl_does_not_change_with_a_constant(apart, dtype):
    z, weight = whole_numbers(40, dtype)
    z, pooled_t = apart * z, z.roll(1, 1)
    z = z if apart > 1 else pooled_t + torch.eye(*z.shape, dtype=z.dtype)
    logits_t = pooled_t @ weight.to(z.dtype).T
    found = set()
    for shift in SHIFTS:
        bias = torch.full((40,), shift, dtype=z.dtype)
        found |= {kl_and_grad(head, z, weight, bias, temperature=20.0, pooled_t=pooled_t)[0]}
        found |= {kl_and_grad(head, z, weight, bias, temperature=20.0, logits_t=logits_t + shift)[0]}
    oracle, _ = kl_and_grad(reference, z.double(), weight.double(), temperature=20.0, logits_t=logits_t.double())
    for kl in found:
        assert kl == pytest.approx(oracle, rel=1e-6)


@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_is_never_below_zero(dtype, size):
    g = torch.Generator().manual_seed(0)
    acc = accumulator(dtype)
    for i in range(12 if CUDA else 400):
        K = (1, 2, 7, 40)[i % 4]
        weight = torch.randn(K, 8, generator=g).to(dtype)
        z = size * torch.randn(1, 8, generator=g).to(acc)
        pooled_t = z + size * 10.0 ** -(i % 7) * torch.randn(1, 8, generator=g).to(acc)
        bias = (0, 1, 1e3, 1e8)[i % 5 % 4] * torch.randn(K, generator=g).to(acc)
        teacher = {"pooled_t": pooled_t} if i % 3 else {"logits_t": pooled_t @ weight.to(acc).T + bias}
        kl, _ = kl_and_grad(head, z, weight, bias, temperature=(1.0, 4.0)[i % 2], **teacher)
        assert 0 <= kl < float("inf"), f"pair {i}"


@pytest.mark.parametrize("teacher", ["pooled_t", "logits_t"])
def test_a_small_kl_has_its_digits(teacher):
    """KL of 1e-13 to 1e-5 beside log-sums of 25, whose differences would keep none of it."""
    g = torch.Generator().manual_seed(0)
    weight, z = torch.randn(40, 8, generator=g), 5 * torch.randn(4, 8, generator=g)
    for apart in (1e-2, 1e-4, 1e-6):
        pooled_t = z + apart * torch.randn(4, 8, generator=g)
        if teacher == "logits_t":  # in float64: rounded to float32, logits of 25 do not hold such differences
            z64 = z.double()
            given, weights = {"logits_t": pooled_t.double() @ weight.double().T}, weight.double()
            kl, _ = kl_and_grad(head, z64, weights, **given)
        else:
            kl, _ = kl_and_grad(head, z, weight, pooled_t=pooled_t)
        v = (z.double() - pooled_t.double()) @ weight.double().T
        p_t = (pooled_t.double() @ weight.double().T).softmax(1)
        v = v - (p_t * v).sum(1, keepdim=True)
        oracle = torch.log1p((p_t * v * v * (0.5 + v * (1 / 6 + v * (1 / 24 + v / 120)))).sum(1)).mean().item()
        assert kl == pytest.approx(oracle, rel=3e-6 if teacher == "pooled_t" else 1e-3), f"{apart}"


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_kl_of_a_broken_logit_is_eagers(where, value, dtype):
    """Infinite where eager's is, NaN where eager's is: of a masked class, say, that the teacher still gives a share."""
    g = torch.Generator().manual_seed(0)
    z, weight = torch.randn(1, 8, generator=g).to(dtype), torch.randn(9, 8, generator=g).to(dtype)
    for k in range(9):
        bias, logits_t = torch.zeros(9, dtype=dtype), torch.randn(1, 9, generator=g).to(dtype)
        if where != "teacher":
            bias[k] = value
        if where != "student":
            logits_t[0, k] = value
        kl, eager = (kl_and_grad(op, z, weight, bias, logits_t=logits_t)[0] for op in (head, reference))
        assert kl == pytest.approx(eager, nan_ok=True), f"class {k}"


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_cross_entropy_with_a_masked_class_is_eagers(dtype, label_smoothing):
    """A bias of -infinity takes a class out; only label smoothing, which gives it a share, makes the loss infinite."""
    g = torch.Generator().manual_seed(0)
    z, weight = torch.randn(5, 8, generator=g).to(dtype), torch.randn(9, 8, generator=g).to(dtype)
    bias = torch.zeros(9, dtype=dtype)
    bias[4] = -float("inf")
    labels = torch.tensor([0, 1, 2, 3, 5])
    results = []
    for op in (head, reference):
        leaf = z.clone().requires_grad_()
        loss, _, top1 = op.classifier_loss(leaf, weight, bias, labels, label_smoothing=label_smoothing)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf), top1))
    assert torch.isinf(results[1][0]) == (label_smoothing > 0)
    for ours, eagers in zip(*results, strict=True):
        torch.testing.assert_close(ours, eagers)


@pytest.mark.parametrize("apart", [0.3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_kl_of_a_student_far_from_its_teacher_is_no_worse_than_eagers(dtype, apart):
    """Half of the rows: the others are close, and keep the difference."""
    squares = torch.zeros(2, dtype=F64)
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        weight = (torch.randn(75, 24, generator=g) / 3).to(dtype)
        pooled_t = torch.randn(16, 24, generator=g)
        z = pooled_t + apart * torch.randn(16, 24, generator=g) * (torch.arange(16) % 2 + 1e-3)[:, None]
        oracle, _ = kl_and_grad(reference, z.double(), weight.double(), pooled_t=pooled_t.double())
        for i, op in enumerate((head, reference)):
            kl, _ = kl_and_grad(op, z, weight, pooled_t=pooled_t)
            squares[i] += (kl / oracle - 1) ** 2
    ours, eager = (squares / (seed + 1)).sqrt()
    assert ours <= 2 * eager + ROUNDING, f"{ours:.1e}, eager's {eager:.1e}"


def both(K=40, B=5, Ct=24, dtype=torch.float32):
    """z, weight, bias, labels, pooled_t, and logits_t that are no logits of pooled_t"""
    g = torch.Generator().manual_seed(0)
    z, pooled_t = torch.randn(2, B, Ct, generator=g).to(accumulator(dtype))
    weight, bias = torch.randn(K, Ct, generator=g).to(dtype), torch.randn(K, generator=g).to(z.dtype)
    logits_t = torch.randn(B, K, generator=g).to(z.dtype)
    return z, weight, bias, torch.randint(0, K, (B,), generator=g), pooled_t, logits_t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "terms", [ALONE["sr"], ALONE["kl"], ALONE["sr"] | {"fm": 0.3}, {"sr": 0.5, "kl": 0.7}], ids=str
)
@pytest.mark.parametrize("way", ["whole rows", "many classes", "projected"])
def test_logits_t_serves_also_beside_pooled_t(way, terms, dtype):
    """Whether or not the match would go by G: what pooled_t gives is fm alone."""
    z, weight, bias, labels, pooled_t, logits_t = both(11000 if way == "many classes" and not CUDA else 75, dtype=dtype)
    gram = head.classifier_gram(weight) if way == "many classes" else None

    def run(op, *wide, **teacher):
        args = [x.double() if wide else x for x in (z, weight, bias)]
        if way != "projected":
            return op.classifier_loss(*args, labels, gram=gram, **terms, **teacher)[:2]
        eye = torch.eye(z.shape[1], dtype=args[0].dtype)
        return op.projected_classifier_loss(args[0], eye, None, *args[1:], labels, **terms, **teacher)[:2]

    if way == "projected" and dtype in (torch.bfloat16, torch.float16):
        z = z.to(dtype).to(z.dtype)
    loss, parts = run(head, pooled_t=pooled_t, logits_t=logits_t)
    oracle, parts64 = run(reference, F64, pooled_t=pooled_t.double(), logits_t=logits_t.double())
    tolerance = {F64: 1e-11, torch.float32: 1e-5}.get(dtype, 0.02)
    torch.testing.assert_close(loss.double(), oracle, rtol=tolerance, atol=0)
    torch.testing.assert_close(parts.double(), parts64, rtol=tolerance, atol=0)
    if not terms.get("fm"):
        alone, _ = run(head, logits_t=logits_t)
        assert torch.equal(loss, alone)


@pytest.mark.parametrize("kind", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("terms", [SOFT, ALONE["sr"]], ids=["kl", "sr"])
def test_logits_t_is_read_in_its_own_precision(terms, kind):
    """At z = 0, where the student's logits have no rounding of their own."""
    z, weight, _, labels, _, logits_t = both(75, dtype=torch.bfloat16)
    z, logits_t = 0 * z, (5 * logits_t).to(kind)
    oracle = reference.classifier_loss(z.double(), weight.double(), None, labels, logits_t=logits_t.double(), **terms)[
        0
    ]
    loss = head.classifier_loss(z, weight, None, labels, logits_t=logits_t, **terms)[0]
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-6)
    if not CUDA:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = head.classifier_loss(z, weight.float(), None, labels, logits_t=logits_t, **terms)[0]
        assert torch.equal(again, loss)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("K", "label_smoothing"), [(75, 0.0), (75, 1e-6)] + ([] if CUDA else [(30000, 1e-6)]))
@pytest.mark.parametrize("ahead", ["labels", "labels_b"])
def test_mixup_keeps_the_digits_of_a_small_share(ahead, K, label_smoothing, dtype):
    """The label with nearly all of the target is far ahead, and the other, which has the rest, far behind."""
    g = torch.Generator().manual_seed(0)
    acc = accumulator(dtype)
    weight = torch.randn(K, 8, generator=g).to(dtype)
    weight[1] *= 3
    z = (4 * weight[1] + 0.25 * torch.randn(36, 8, generator=g).to(dtype)).to(dtype).to(acc)
    behind, first = (z.double() @ weight.double().T).argmin(1), torch.ones(36, dtype=torch.int64)
    labels, labels_b, mix = (first, behind, 1 - 1e-4) if ahead == "labels" else (behind, first, 1e-6)
    mix = torch.full((36,), mix, dtype=acc)
    mixed = {"labels_b": labels_b, "label_smoothing": label_smoothing}
    oracle = reference.classifier_loss(z.double(), weight.double(), None, labels, mix=mix.double(), **mixed)[0].item()
    loss = head.classifier_loss(z, weight, None, labels, mix=mix, **mixed)[0].item()
    eager = reference.classifier_loss(z, weight, None, labels, mix=mix, **mixed)[0].item()
    rounding = {F64: 1e-12}.get(dtype, 3e-6)  # the inputs are exact, and so are float's products of them
    allowed = 2 * abs(eager / oracle - 1) if dtype in (torch.bfloat16, torch.float16) else 0
    assert loss == pytest.approx(oracle, rel=rounding + allowed), f"eager {eager}"
