"""classifier_loss and what it takes of a classifier, against reference.py in float64; half precision against eager;
refusals.
"""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from op_cases import (
    BAD,
    F64,
    LOSS_CASES,
    assert_as_bad_as_eager,
    assert_equal_to,
    assert_no_worse_than_eager,
    loss_inputs,
    loss_keywords,
    refused,
    run_loss,
)

import ijckd_fast
from ijckd_fast import head
from ijckd_fast.head import reference


@pytest.mark.parametrize(
    ("case", "teacher"), [(c, t) for c in LOSS_CASES for t in ("pooled_t", "logits_t") if (c, t) != ("fm", "logits_t")]
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_classifier_loss_equals_reference(case, teacher, with_bias):
    z, weight, bias, labels, labels_b, mix, pooled_t = loss_inputs()
    changed = dict(LOSS_CASES[case])
    labels_b, mix = changed.pop("labels_b", labels_b), changed.pop("mix", mix)
    if teacher == "logits_t":
        pooled_t = None
        changed |= {"logits_t": torch.randn(5, 9, dtype=F64), "fm": 0.0}
    args = (z, weight, bias if with_bias else None, labels, labels_b, mix, pooled_t)
    assert_equal_to(
        run_loss(head.classifier_loss, *args, **changed), run_loss(reference.classifier_loss, *args, **changed)
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 80), st.integers(0, 99))
def test_classifier_loss_any_shape(B, Ct, K, seed):
    args = loss_inputs(B, Ct, K, seed=seed)
    assert_equal_to(run_loss(head.classifier_loss, *args), run_loss(reference.classifier_loss, *args))


@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize("case", LOSS_CASES)
def test_classifier_loss_one_class(case, B):
    args, changed = list(loss_inputs(B, 4, 1)), dict(LOSS_CASES[case])
    args[4], args[5] = changed.pop("labels_b", args[4]), changed.pop("mix", args[5])
    got = run_loss(head.classifier_loss, *args, **changed)
    assert_equal_to(got, run_loss(reference.classifier_loss, *args, **changed))
    assert got[2] == B  # the only class is the best one


@pytest.mark.parametrize("case", LOSS_CASES)
@pytest.mark.parametrize("K", [1, 9])
def test_classifier_loss_empty_batch(case, K):
    args, changed = list(loss_inputs(0, 6, K)), dict(LOSS_CASES[case])
    args[4], args[5] = changed.pop("labels_b", args[4]), changed.pop("mix", args[5])
    got = run_loss(head.classifier_loss, *args, **changed)
    assert_equal_to(got, run_loss(reference.classifier_loss, *args, **changed), equal_nan=True)
    assert got[0].isnan()
    assert got[3].shape == (0, 6)


def test_classifier_loss_reads_any_layout():
    def spread(x):
        """x with NaN (integers: -1) between its elements and its dimensions stored in the reverse order."""
        wide = torch.full([2 * n for n in x.shape[::-1]], float("nan") if x.is_floating_point() else -1, dtype=x.dtype)
        sliced = wide[(slice(None, None, 2),) * x.dim()].permute(*reversed(range(x.dim())))
        return sliced.copy_(x)

    args, logits_t = loss_inputs(), torch.randn(5, 9, dtype=F64)
    for changed in ({}, {"logits_t": logits_t, "fm": 0.0}):
        inputs = [*args[:6], None if changed else args[6]]
        variant = [None if x is None else spread(x) for x in inputs]
        other = changed | ({"logits_t": spread(logits_t)} if changed else {})
        assert not variant[0].is_contiguous()
        assert not variant[1].is_contiguous()
        z = variant[0].requires_grad_()  # run_loss would make it contiguous
        loss, parts, top1 = head.classifier_loss(z, *variant[1:4], **loss_keywords(*variant[4:], **other))
        (2.5 * loss).backward()
        assert_equal_to([loss.detach(), parts, top1, z.grad], run_loss(head.classifier_loss, *inputs, **changed), 0)


# What each case reads. A bias cancels in the difference of the logits.
READ = {
    "all": ("z", "weight", "bias", "pooled_t", "logits_t", "mix"),
    "ce": ("z", "weight", "bias", "mix"),
    "sr": ("z", "weight", "pooled_t", "logits_t"),
    "fm": ("z", "pooled_t"),
    "kl": ("z", "weight", "pooled_t", "logits_t"),
    "smoothing": ("z", "weight", "bias"),
}


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize(("case", "where"), [(case, where) for case in READ for where in READ[case]])
def test_classifier_loss_bad_values_are_not_hidden(case, where, bad):
    z, weight, bias, labels, labels_b, mix, pooled_t = loss_inputs()
    changed, logits_t = dict(LOSS_CASES[case]), torch.randn(5, 9, dtype=F64)
    labels_b, mix = changed.pop("labels_b", labels_b), changed.pop("mix", mix)
    inputs = {"z": z, "weight": weight, "bias": bias, "mix": mix, "pooled_t": pooled_t, "logits_t": logits_t}
    inputs[where][..., 2] = bad
    if where == "logits_t":
        pooled_t = None
        changed |= {"logits_t": logits_t, "fm": 0.0}
    args = (z, weight, bias, labels, labels_b, mix, pooled_t)
    results = [run_loss(m.classifier_loss, *args, **changed) for m in (head, reference)]
    assert_as_bad_as_eager(*results, everywhere=bad != bad and where != "bias")


def test_classifier_loss_large_logits():
    args = loss_inputs(scale=1e3)
    got = run_loss(head.classifier_loss, *args)
    assert all(x.isfinite().all() for x in got)
    assert_equal_to(got, run_loss(reference.classifier_loss, *args))


def test_classifier_loss_first_of_tied_logits_counts():
    z, weight = torch.ones(2, 3, dtype=F64), torch.ones(4, 3, dtype=F64)
    _, _, top1 = head.classifier_loss(z, weight, None, torch.tensor([0, 3]))
    assert top1.item() == 1


def test_classifier_loss_gradcheck():
    z, weight, bias, labels, *rest = loss_inputs()

    def op(z):
        return head.classifier_loss(z, weight, bias, labels, **loss_keywords(*rest))[0]

    assert torch.autograd.gradcheck(op, z.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher", ["pooled_t", "logits_t"])
def test_classifier_loss_no_worse_than_eager(dtype, teacher):
    z, weight, bias, labels, labels_b, mix, pooled_t = loss_inputs(64, 96, 203, dtype)
    oracle_in = [t.double() if t.is_floating_point() else t for t in (z, weight, bias, labels, labels_b, mix, pooled_t)]
    changed, changed64 = {}, {}
    if teacher == "logits_t":
        logits_t = torch.randn(64, 203, generator=torch.Generator().manual_seed(2))
        changed, changed64 = {"logits_t": logits_t, "fm": 0.0}, {"logits_t": logits_t.double(), "fm": 0.0}
        pooled_t = oracle_in[-1] = None
    oracle = run_loss(reference.classifier_loss, *oracle_in, **changed64)
    args = (z, weight, bias, labels, labels_b, mix, pooled_t)
    eager_args = (z, weight, bias.to(dtype), *args[3:])  # F.linear wants one dtype, as under autocast
    fused, eager = (
        run_loss(head.classifier_loss, *args, **changed),
        run_loss(reference.classifier_loss, *eager_args, **changed),
    )
    for i in (0, 1, 3):
        assert_no_worse_than_eager(fused[i], eager[i], oracle[i])


def test_logit_match_keeps_small_differences_in_bfloat16():
    """Late in training z is close to pooled_t; the difference of two bf16 logits would be rounding noise."""
    z, weight, bias, labels, *_ = loss_inputs(32, 64, 101, torch.bfloat16)
    pooled_t = z * (1 + 0.002 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1)))
    wanted = reference.classifier_loss(
        z.double(), weight.double(), bias.double(), labels, pooled_t=pooled_t.double(), ce=0, sr=1
    )[0]
    got = head.classifier_loss(z, weight, bias, labels, pooled_t=pooled_t, ce=0.0, sr=1.0)[0]
    assert abs(got.item() / wanted.item() - 1) < 0.01


def test_classifier_loss_under_autocast():
    z, weight, bias, *rest = loss_inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run_loss(head.classifier_loss, z, weight, bias, *rest)
    assert_equal_to(got, run_loss(head.classifier_loss, z, weight.to(torch.bfloat16), bias, *rest), 0)
    assert got[0].dtype == got[3].dtype == torch.float32


def test_no_bad_rows_on_a_cpu():
    """There labels are checked at once, and no softmax saturates."""
    z, weight, bias, labels, *_ = loss_inputs(scale=1e3)
    head.classifier_loss(z, weight, bias, labels)
    bad = ijckd_fast.take_bad_rows("cpu")
    assert (bad.labels, bad.saturated) == (0, 0)
    assert all(type(count) is int for count in bad)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_classifier_gram_is_weight_times_weight_in_two_parts(dtype):
    weight = torch.randn(5000, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    gram = head.classifier_gram(weight)
    wanted = weight.double().T @ weight.double()
    assert gram.shape == (2, 12, 12)
    assert gram.dtype == torch.bfloat16
    assert torch.equal(gram[0], wanted.bfloat16())
    torch.testing.assert_close(gram.double().sum(0), wanted, rtol=0, atol=2**-16 * wanted.abs().max().item())


@pytest.mark.parametrize("module", [head, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("op", ["classifier_loss", "projected_classifier_loss"])
@pytest.mark.parametrize("used", [{"sr": 1.0}, {"ce": 1.0}, {"kl": 1.0}], ids=str)
def test_a_gram_of_another_kind_is_refused(module, op, used):
    """Whether or not the loss would read it, where its bytes would be taken for others."""
    z, weight, bias, labels, _, _, pooled_t = loss_inputs(dtype=torch.float32)
    gram = head.classifier_gram(weight)  # [2, 6, 6]

    def call(gram):
        inputs = (z,) if op == "classifier_loss" else (z, torch.eye(6), None)
        return getattr(module, op)(*inputs, weight, bias, labels, pooled_t=pooled_t, gram=gram, **used)

    call(gram)
    for wrong, got in (
        (gram.float(), "float32 [2, 6, 6]"),
        (gram.double(), "float64 [2, 6, 6]"),
        (gram.half(), "float16 [2, 6, 6]"),
        (gram[:1], "bfloat16 [1, 6, 6]"),
        (gram[0], "bfloat16 [6, 6]"),
        (head.classifier_gram(weight[:, :5]), "bfloat16 [2, 5, 5]"),
        (gram[:, :5], "non-contiguous bfloat16 [2, 5, 6]"),
        (gram.transpose(1, 2), "non-contiguous bfloat16 [2, 6, 6]"),
        (torch.stack([gram, gram], -1)[..., 0], "non-contiguous bfloat16 [2, 6, 6]"),
        (gram[:1].expand(2, 6, 6), "non-contiguous bfloat16 [2, 6, 6]"),
    ):
        expected = f"contiguous bfloat16 [2, Ct, Ct] = [2, 6, 6], got {got}: give classifier_gram(weight), or None"
        refused(f"gram must be what classifier_gram makes of this weight, {expected}", lambda wrong=wrong: call(wrong))


def test_classifier_loss_refuses():
    z, weight, bias, labels, labels_b, mix, pooled_t = loss_inputs()
    call = head.classifier_loss
    refused("z must be [B, Ct], got [5]", lambda: call(z[:, 0], weight, bias, labels))
    refused("weight must be [K, Ct] with Ct = 6 like z, got [9, 5]", lambda: call(z, weight[:, :5], bias, labels))
    refused(
        "z and weight must both be float64 or neither, got float64 and float32",
        lambda: call(z, weight.float(), None, labels),
    )
    refused("channels and classes must not be empty", lambda: call(z, weight[:0], None, labels))
    refused("channels and classes must not be empty", lambda: call(z[:, :0], weight[:, :0], None, labels))
    refused("bias must be [K] = [9], got [8]", lambda: call(z, weight, bias[:8], labels))
    refused(
        "weight must be a floating-point tensor (float64, float32, bfloat16, or float16 on a GPU), got int64",
        lambda: call(z, weight.long(), None, labels),
    )
    refused("z must be a floating-point tensor", lambda: call(z.long(), weight, None, labels))
    refused("float16 is for the GPU", lambda: call(z.float(), weight.half(), None, labels))
    refused("pooled_t must be [B, Ct] = [5, 6], got [5, 5]", lambda: call(z, weight, None, labels, pooled_t=z[:, :5]))
    refused(
        "logits_t must be [B, K] = [5, 9], got [9, 5]", lambda: call(z, weight, None, labels, logits_t=z.new_ones(9, 5))
    )
    refused(
        "mix must be [B] = [5], got [5, 1]", lambda: call(z, weight, None, labels, labels_b=labels_b, mix=mix[:, None])
    )
    refused("labels must be [B] = [5], got [4]", lambda: call(z, weight, bias, labels[:4]))
    refused("labels must be int64, got int32", lambda: call(z, weight, bias, labels.int()))
    refused(
        "labels must lie in [0, K) = [0, 9), got 9 at position 2",
        lambda: call(z, weight, bias, torch.tensor([0, 1, 9, 2, 3])),
    )
    refused(
        "labels_b must lie in [0, K) = [0, 9), got -1",
        lambda: call(z, weight, bias, labels, labels_b=-torch.ones(5, dtype=torch.int64), mix=mix),
    )
    refused("labels_b and mix go together", lambda: call(z, weight, bias, labels, labels_b=labels_b))
    refused("fm = 1 needs pooled_t", lambda: call(z, weight, bias, labels, fm=1.0))
    for name in ("sr", "kl", "hard", "ttm", "wttm", "nkd"):
        refused(f"{name} = 0.5 needs pooled_t or logits_t", lambda n=name: call(z, weight, bias, labels, **{n: 0.5}))
    refused(
        "ttm_power must be > 0, got 0",
        lambda: call(z, weight, bias, labels, pooled_t=pooled_t, wttm=1.0, ttm_power=0.0),
    )
    refused(
        "temperature must be > 0, got 0",
        lambda: call(z, weight, bias, labels, pooled_t=pooled_t, kl=1.0, temperature=0.0),
    )
    refused("label_smoothing must lie in [0, 1], got 1.5", lambda: call(z, weight, bias, labels, label_smoothing=1.5))
    refused("weight must not require grad", lambda: call(z, weight.clone().requires_grad_(), bias, labels))
    refused(
        "pooled_t must not require grad",
        lambda: call(z, weight, bias, labels, pooled_t=pooled_t.clone().requires_grad_(), sr=1.0),
    )
